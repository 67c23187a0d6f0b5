"""What envpool's MuJoCo tasks share: images through EGL, states, and an action repeat that sums the reward.

Axes: N environments, all at the same row of their episodes: only the time limit ends these tasks, so
that they reset together. An agent step runs on a thread of its own, between send and recv, and so does the
drawing of images, on one thread for each core: every environment is always drawn by the same thread, which
owns its OpenGL context.

EGL takes the GPU where there is one (MUJOCO_EGL_DEVICE_ID selects it), else Mesa's software rasteriser.
"""

import functools
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from hdfast.envs.base import ArraySpec, ContinuousActions, EnvStep, installed
from hdfast.envs.pool import PoolEnv, library, make_pool, preload_egl
from hdfast.runtime.errors import MissingLibraryError
from hdfast.suites import Task

EGL_INSTALL = "apt-get install libegl1 libgl1-mesa-dri libopengl0"
_PROBE = """
import ctypes
ctypes.CDLL("libEGL.so.1", mode=ctypes.RTLD_GLOBAL)
import envpool, numpy
pool = envpool.make("CartpoleBalance-v1", env_type="gymnasium", num_envs=1, render_mode="rgb_array",
                    render_width=8, render_height=8, render_camera_id=0)
pool.reset()
pool.render(numpy.zeros(1, numpy.int32))
"""


@functools.cache
def require_egl(python: str = sys.executable, seconds: float = 120.0) -> None:
    """Draw one image in another process, because an OpenGL failure kills its process.

    Raises MissingLibraryError with what went wrong there, and with the Debian packages that images need.
    """
    try:
        probe = subprocess.run(
            [python, "-c", _PROBE], capture_output=True, text=True, timeout=seconds, cwd=tempfile.gettempdir()
        )
    except subprocess.TimeoutExpired as error:
        raise MissingLibraryError(f"EGL draws no image within {seconds:g} s", hint=EGL_INSTALL) from error
    if probe.returncode != 0:
        said = probe.stderr.strip().splitlines() or [f"the process ended with {probe.returncode}"]
        raise MissingLibraryError(f"EGL cannot draw images here: {said[-1]}", hint=EGL_INSTALL)


# Shadows and antialiasing are most of the cost of drawing in software: 30 ms for an image of 64 x 64 pixels, 3 ms
# without.
WITHOUT_SHADOWS = {r"<quality\b[^>]*>": '<quality shadowsize="0" offsamples="0"/>'}


def link_models(source: Path, into: Path, changes: Mapping[str, str]) -> None:
    """Links a folder of MuJoCo models file by file into another, with changes made in the copies of XML files.

    changes: regular expressions, and what `re.sub` puts in their place.
    """
    for path in sorted(source.rglob("*")):
        target = into / path.relative_to(source)
        if path.is_dir():
            target.mkdir(parents=True, exist_ok=True)
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        text = changed = path.read_text() if path.suffix == ".xml" else ""
        for pattern, replacement in changes.items():
            changed = re.sub(pattern, replacement, changed)
        if changed != text:
            target.write_text(changed)
        else:
            target.symlink_to(path)


class MujocoEnv(PoolEnv):
    """One MuJoCo task of envpool.

    obs: `image` gives uint8 (N, image_size, image_size, 3) under that key, `state` the vectors of the task, float32 (N,
    ...), and `both` both. State alone needs no OpenGL.
    render: `full` as the task's authors have it, `fast` without shadows and antialiasing: the same physics,
    slightly other images.
    assets: the folder of the task's models under envpool's `mujoco/`.
    models: the same folder from elsewhere, to be drawn in place of envpool's.
    looks: changes to the models for drawing, as in `link_models`.
    unused: vectors that envpool gives but the task does not have.
    flip: turn the camera's images upside down.
    pool_settings: further settings of the task's pool.
    """

    def __init__(
        self,
        task: Task,
        *,
        num_envs: int,
        seed: int,
        action_repeat: int,
        threads: int,
        obs: str,
        render: str,
        image_size: int,
        camera: int,
        assets: str,
        models: Path | None = None,
        looks: Mapping[str, str] | None = None,
        unused: frozenset[str] = frozenset(),
        flip: bool = False,
        **pool_settings: Any,
    ) -> None:
        self._image, self._state, self._unused, self._flip = obs != "state", obs != "image", unused, flip
        self._side = image_size
        assert task.time_limit is not None
        settings = {"max_episode_steps": task.time_limit * action_repeat, **pool_settings}
        self._folder = tempfile.TemporaryDirectory(prefix="hdfast-assets-")
        if self._image:
            if not installed("envpool"):
                raise MissingLibraryError(f"{task.name} needs envpool", hint="pip install envpool")
            require_egl()
            if not preload_egl():
                raise MissingLibraryError(
                    f"{task.name}: envpool was imported before hdfast could load EGL for it",
                    hint="make the first environment with hdfast, or import envpool later",
                )
            settings |= {
                "render_mode": "rgb_array",
                "render_width": image_size,
                "render_height": image_size,
                "render_camera_id": camera,
            }
            changes = {**(looks or {}), **(WITHOUT_SHADOWS if render == "fast" else {})}
            if models or looks:
                self.source = "envpool, other models"
            if models or changes:
                envpools = library(task.name).make_spec(task.env_id).config.base_path
                folder = Path(self._folder.name)
                link_models(models or Path(envpools, "mujoco", assets), folder / "mujoco" / assets, changes)
                settings["base_path"] = self._folder.name
        pool = make_pool(task.env_id, num_envs=num_envs, seed=seed, threads=threads, **settings)
        specs = {}
        if self._state:
            for key, space in self._vectors(pool.observation_space).items():
                specs[key] = ArraySpec((int(np.prod(space.shape)),), np.dtype(np.float32))
        if self._image:
            specs["image"] = ArraySpec((image_size, image_size, 3), np.dtype(np.uint8))
        super().__init__(
            task.name,
            pool,
            num_envs=num_envs,
            obs_specs=specs,
            actions=ContinuousActions(pool.action_space.shape[0]),
            action_repeat=action_repeat,
        )
        self._stepper = ThreadPoolExecutor(1, "mujoco")
        painters = min(num_envs, threads or os.cpu_count() or 1) if self._image else 0
        self._painters = [ThreadPoolExecutor(1, "egl") for _ in range(painters)]
        self._answer: Future[EnvStep]
        # A quadruped's joints have other bounds than -1 and 1; the agent's are stretched to them.
        low, high = pool.action_space.low.astype(np.float64), pool.action_space.high.astype(np.float64)
        self._middle, self._reach = (high + low) / 2, (high - low) / 2

    def own_action(self, action: np.ndarray) -> np.ndarray:
        return self._stretched(action[0])

    def _stretched(self, action: np.ndarray) -> np.ndarray:
        return (self._middle + self._reach * action).astype(self._pool.action_space.dtype)

    def _send(self, action: np.ndarray) -> None:
        self._answer = self._stepper.submit(self._advance, self._stretched(action))

    def _recv(self) -> EnvStep:
        return self._answer.result()

    def _advance(self, action: np.ndarray) -> EnvStep:
        obs, reward, terminated, truncated, info = self._pool.step(action)
        for _ in range(self.action_repeat - 1):
            if info["elapsed_step"].any():  # not a reset row, which ignores the action
                obs, more, terminated, truncated, info = self._pool.step(action)
                reward = reward + more
        return self._row(obs, reward, terminated, truncated, info)

    def _observe(self, obs: Any, info: dict[str, Any]) -> dict[str, np.ndarray]:
        arrays = {}
        if self._state:
            for key, value in self._vectors(obs).items():
                arrays[key] = value.reshape(self.num_envs, -1).astype(np.float32)
        if self._image:
            arrays["image"] = self._draw()
        return arrays

    def _vectors(self, obs: Any) -> dict[str, Any]:
        """The vectors of an observation, or of its space, by name; one without a name is called `state`."""
        named = dict(obs.items()) if hasattr(obs, "items") else {"state": obs}
        return {key: value for key, value in named.items() if key not in self._unused}

    def _draw(self) -> np.ndarray:
        stride = len(self._painters)
        jobs = [
            painter.submit(self._pool.render, np.arange(first, self.num_envs, stride, dtype=np.int32))
            for first, painter in enumerate(self._painters)
        ]
        image = np.empty((self.num_envs, self._side, self._side, 3), np.uint8)
        for first, job in enumerate(jobs):
            image[first::stride] = job.result()[:, ::-1] if self._flip else job.result()
        return image

    def _close(self) -> None:
        self._stepper.shutdown()
        super()._close()
        for painter in self._painters:
            painter.shutdown()
        self._folder.cleanup()
