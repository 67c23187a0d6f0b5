"""Environments of your own: whatever is registered with gymnasium, stepped by its vector environments.

A task is what `gymnasium.make` takes: `CarRacing-v3`, or `my_envs:Maze-v0`, for which the module my_envs is imported
first. Episodes end as the environment says: `terminated` is terminal, `truncated` (a time limit) is not.

Images are observations of (H, W, 3), (H, W, 1) or (H, W) uint8, alone or under any names in a Dict, else the
environment is drawn (`render_mode="rgb_array"`). All other observations are vectors, Discrete ones one-hot. Images that
are not all square with one side of 8, 16, 32 or 64 become 64 x 64 by Pillow's box filter. Bounded Box actions are
stretched to [-1, 1]. Where `info` holds `success` or `is_success`, an episode succeeds if one of its rows does.

Axes: N environments, H, W pixels.
"""

import importlib
import math
import multiprocessing
import os
import signal
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from gymnasium.wrappers import AddRenderObservation
from PIL import Image

from hdfast.envs.base import ArraySpec, BatchEnv, ContinuousActions, DiscreteActions, EnvStep, env_seeds
from hdfast.runtime.errors import ConfigError, MissingLibraryError, RunError, suggest
from hdfast.suites import Task, UnknownName

SIZE = 64
_AS_THEY_ARE = (8, 16, 32, 64)  # sides of images that are not resized
_TAKEN = ("action", "reward", "is_first", "is_last", "is_terminal")  # what replay calls its other columns


def find(env_id: str) -> EnvSpec:
    """What is registered under `env_id`, its module imported.

    Raises UnknownName, listing the nearest, where there is no such module or environment; MissingLibraryError where
    the module imports what is not there.
    """
    module, _, name = env_id.rpartition(":")
    if module:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name is not None and f"{module}.".startswith(f"{error.name}."):
                hint = f"install it, or start from the folder that holds {module.partition('.')[0]}.py"
                raise UnknownName(f"no module {error.name!r} to import for {env_id}", hint=hint) from error
            raise MissingLibraryError(
                f"{module} needs {error.name}", hint=f"pip install {error.name}"
            ) from error
    try:
        return gymnasium.spec(name)
    except gymnasium.error.Error:
        hint = suggest(name, gymnasium.registry)
        if not module and "did you mean" not in hint:
            hint = "; one of your own is named with its module, my_envs:Maze-v0"
        raise UnknownName(f"no environment {name!r} is registered with gymnasium{hint}") from None


class GymEnv(BatchEnv):
    """Environments of one id.

    More than one are stepped in a process each, or with `threads` 1 in this process; whichever, while the learner
    works. obs: `image`, `state` (the vectors) or `both`.

    Raises UnknownName; MissingLibraryError where a package that the environment needs is missing; ConfigError for
    observations or actions that the agent cannot take, with what would be right; later RunError where an
    environment's process dies. What the environment itself raises is passed on.
    """

    source = "gymnasium"

    def __init__(
        self,
        task: Task,
        *,
        num_envs: int,
        seed: int,
        action_repeat: int,
        threads: int = 0,
        obs: str = "image",
    ) -> None:
        self._seeds: list[int] | None = env_seeds(seed, num_envs)
        make, apart = _Maker(find(task.env_id), obs, os.getpid()), num_envs > 1 and threads != 1
        # One thread makes, steps and closes them: OpenGL contexts belong to the thread that made them.
        self._stepper = ThreadPoolExecutor(1, "gymnasium")
        self._broken = False
        try:
            self._vector = self._stepper.submit(_vector, make, num_envs, apart).result()
        except BaseException:
            self._stepper.shutdown()
            raise
        super().__init__(
            task.name,
            num_envs=num_envs,
            obs_specs={
                key: ArraySpec(space.shape, space.dtype)
                for key, space in self._vector.single_observation_space.items()
            },
            actions=_actions(self._vector.single_action_space, task.name),
            action_repeat=action_repeat,
        )
        self._over = np.zeros(num_envs, bool)
        self._tells_success = False  # some tell it at the end of an episode only
        self._answer: Future[tuple[Any, ...]]

    def _reset(self) -> EnvStep:
        obs, _ = self._result(self._stepper.submit(self._vector.reset, seed=self._seeds))
        self._seeds = None  # a later reset goes on with what they have drawn
        zero, never = np.zeros(self.num_envs, np.float32), np.zeros(self.num_envs, bool)
        return self._row(obs, zero, never, never, {}, is_first=~never)

    def _send(self, action: np.ndarray) -> None:
        self._answer = self._stepper.submit(self._vector.step, self._theirs(action))

    def _recv(self) -> EnvStep:
        obs, reward, terminated, truncated, info = self._result(self._answer)
        return self._row(obs, reward, terminated, truncated, info, is_first=self._over)

    def _row(
        self,
        obs: dict[str, np.ndarray],
        reward: np.ndarray,
        terminated: np.ndarray,
        truncated: np.ndarray,
        info: dict[str, np.ndarray],
        *,
        is_first: np.ndarray,
    ) -> EnvStep:
        self._over = terminated | truncated
        self._tells_success |= "success" in info
        success = info.get("success", np.zeros(self.num_envs, bool))
        return EnvStep(
            obs=dict(obs),
            reward=reward.astype(np.float32),
            is_first=is_first.copy(),
            is_last=self._over.copy(),
            is_terminal=terminated.copy(),
            info={"success": success} if self._tells_success else {},
        )

    def _theirs(self, action: np.ndarray) -> np.ndarray:
        """Actions (N,) or (N, size) in [-1, 1] as the environment counts or scales them."""
        space = self._vector.single_action_space
        if isinstance(space, spaces.Discrete):
            return action + space.start
        middle, reach = space.high / 2 + space.low / 2, space.high / 2 - space.low / 2
        stretched = middle + reach * action.reshape(self.num_envs, *space.shape)
        return np.clip(stretched, space.low, space.high).astype(space.dtype)

    def _result(self, answer: Future[Any]) -> Any:
        try:
            return answer.result()
        except (EOFError, ConnectionError) as error:
            if isinstance(self._vector, SyncVectorEnv):
                raise
            self._broken = True
            hint = "with --env.threads 1 all are in one process, which may tell more"
            raise RunError(
                f"the process of an environment has ended ({error!r})", where=self.name, hint=hint
            ) from error

    def _close(self) -> None:
        self._stepper.submit(_close, self._vector, self._broken).result()
        self._stepper.shutdown()


def _vector(make: "_Maker", num_envs: int, apart: bool) -> SyncVectorEnv | AsyncVectorEnv:
    """N environments that reset at the step after their last; `apart` in a process each."""
    makers = [make] * num_envs
    if not apart:
        return SyncVectorEnv(makers, autoreset_mode=AutoresetMode.NEXT_STEP)
    # A fork of this process would take torch's threads and CUDA along. Those of a small server do not, and share the
    # torch that each would load by itself, because it imports what this process was started with (`hdfast.train`).
    multiprocessing.get_context("forkserver").set_forkserver_preload(["__main__", "torch"])
    return AsyncVectorEnv(makers, autoreset_mode=AutoresetMode.NEXT_STEP, context="forkserver")


def _close(vector: SyncVectorEnv | AsyncVectorEnv, broken: bool) -> None:
    """Closes the environments. broken: one of their processes does not answer any more."""
    if not broken:
        vector.close()
        return
    for process in vector.processes:
        process.kill()
        process.join()
    vector.closed = True  # its own close() would wait for their answers


@dataclass(frozen=True)
class _Maker:
    """Makes one environment, seen as `obs` says, in this process (`owner`) or in one of its own."""

    spec: EnvSpec
    obs: str
    owner: int

    def __call__(self) -> gymnasium.Env:
        if os.getpid() != self.owner:  # to stop is for the learner to say, when it has saved
            for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(signum, signal.SIG_IGN)
        try:
            env = gymnasium.make(self.spec)
            if self.obs != "state" and not any(map(_is_image, _parts(env.observation_space).values())):
                if "rgb_array" not in env.metadata.get("render_modes", ()):
                    hint = (
                        "let it observe (H, W, 3) uint8, or render 'rgb_array'; --env.obs state does without"
                    )
                    raise ConfigError(
                        "there is no image in its observations, and it draws none",
                        where=self.spec.id,
                        hint=hint,
                    )
                env.close()
                env = gymnasium.make(self.spec, render_mode="rgb_array")
                env = AddRenderObservation(env, render_only=False, render_key="image")
        except gymnasium.error.DependencyNotInstalled as error:
            raise MissingLibraryError(f"{self.spec.id}: {error}") from error
        return _Seen(env, self.obs)


class _Seen(gymnasium.ObservationWrapper):
    """Observations as a Dict of images (H, W, 1 or 3) uint8 and vectors (n,) float32; of `info` the success alone."""

    def __init__(self, env: gymnasium.Env, obs: str) -> None:
        super().__init__(env)
        name, parts = env.spec.id, _parts(env.observation_space)
        images = {key: space for key, space in parts.items() if _is_image(space) and obs != "state"}
        vectors = {key: space for key, space in parts.items() if not _is_image(space) and obs != "image"}
        self._whole = not isinstance(env.observation_space, spaces.Dict)
        if not images and not vectors:
            raise ConfigError(
                "its observations hold no vectors", where=name, hint="--env.obs image sees the images"
            )
        _actions(env.action_space, name)
        for key, space in {**images, **vectors}.items():
            if (wrong := _wrong(key, space)) is not None:
                raise ConfigError(wrong, where=name)
        sides = {side for space in images.values() for side in space.shape[:2]}
        self._side = next(iter(sides)) if len(sides) == 1 and sides <= set(_AS_THEY_ARE) else SIZE
        self._vectors = vectors
        self.observation_space = spaces.Dict(
            {
                **{key: self._image_space(space) for key, space in images.items()},
                **{
                    key: spaces.Box(-np.inf, np.inf, (spaces.flatdim(space),), np.float32)
                    for key, space in vectors.items()
                },
            }
        )

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        return super().reset(seed=seed, options=options)[0], {}

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, bool]]:
        *row, info = super().step(action)
        return *row, _success(info)

    def observation(self, observation: Any) -> dict[str, np.ndarray]:
        parts = {_key(self.env.observation_space): observation} if self._whole else observation
        return {
            key: spaces.flatten(self._vectors[key], parts[key]).astype(np.float32)
            if key in self._vectors
            else self._resized(np.asarray(parts[key]))
            for key in self.observation_space
        }

    def _image_space(self, space: spaces.Box) -> spaces.Box:
        return spaces.Box(0, 255, (self._side, self._side, math.prod(space.shape[2:])), np.uint8)

    def _resized(self, image: np.ndarray) -> np.ndarray:
        if image.shape[:2] != (self._side, self._side):
            picture = Image.fromarray(image[..., 0] if image.shape[2:] == (1,) else image)
            image = np.asarray(picture.resize((self._side, self._side), Image.Resampling.BOX))
        return image.reshape(self._side, self._side, -1)


def _success(info: dict[str, Any]) -> dict[str, bool]:
    """{"success": whether it is reached}, empty where the environment does not tell."""
    for name in ("success", "is_success"):
        value = np.asarray(info.get(name))
        if value.size == 1 and value.dtype.kind in "biuf":
            return {"success": bool(value.item() > 0)}
    return {}


def _key(space: spaces.Space) -> str:
    """What an observation without a name is called."""
    return "image" if _is_image(space) else "state"


def _parts(space: spaces.Space) -> dict[str, spaces.Space]:
    return dict(space.spaces) if isinstance(space, spaces.Dict) else {_key(space): space}


def _is_image(space: spaces.Space) -> bool:
    """Whether it is meant as one; whether the agent can take it is for `_wrong` to say."""
    return isinstance(space, spaces.Box) and (
        len(space.shape) == 3 or (len(space.shape) == 2 and space.dtype == np.uint8)
    )


def _wrong(key: str, space: spaces.Space) -> str | None:
    """What keeps the agent from taking an observation, and what would be right; None if nothing does."""
    if key in _TAKEN:
        return f"an observation cannot be called {key!r}; replay has a column of that name"
    if not _is_image(space):
        return (
            None if space.is_np_flattenable else f"observation {key!r} is {space}, which has no fixed length"
        )
    if space.dtype != np.uint8 or (len(space.shape) == 3 and space.shape[2] not in (1, 3)):
        right = "an image is (H, W, 3), (H, W, 1) or (H, W) uint8"
        return f"observation {key!r} is {space.shape} {space.dtype}; {right}"
    return None


def _actions(space: spaces.Space, name: str) -> DiscreteActions | ContinuousActions:
    """Raises ConfigError for actions that the agent does not have."""
    if isinstance(space, spaces.Discrete):
        return DiscreteActions(int(space.n))
    if not isinstance(space, spaces.Box) or not np.issubdtype(space.dtype, np.floating):
        raise ConfigError(f"its actions are {space}; right are Discrete, or a Box of floats", where=name)
    if not space.is_bounded():
        hint = "give them bounds, gymnasium.wrappers.RescaleAction or ClipAction"
        raise ConfigError(f"its actions have no bounds: {space}", where=name, hint=hint)
    return ContinuousActions(math.prod(space.shape))
