"""One environment of gymnasium as the agent sees it, and what is told where it does not behave.

Axes: H, W pixels.
"""

import contextlib
import fcntl
import functools
import importlib
import math
import multiprocessing
import os
import re
import signal
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from gymnasium.wrappers import AddRenderObservation
from PIL import Image

from hdfast.envs.base import ContinuousActions, DiscreteActions
from hdfast.runtime.errors import ConfigError, EnvError, HdfastError, MissingLibraryError, tell_warnings, warn

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # to stop is for the learner, when it has saved
SIZE = 64
_AS_THEY_ARE = (8, 16, 32, 64)  # sides of images that are not resized
_TAKEN = ("action", "reward", "is_first", "is_last", "is_terminal")  # what replay calls its other columns
_LOSSES = ("dyn", "rep", "cont")  # what the agent calls its other losses; images have one together, "image"
_TO_SEE = "let it observe (H, W, 3) uint8, or render 'rgb_array'; --env.obs state does without"
_LARGEST = float(np.finfo(np.float32).max)


@contextlib.contextmanager
def told(name: str) -> Iterator[None]:
    """Turns what environment `name` raises in the block into one line; its own frames are the details.

    Raises: EnvError; MissingLibraryError where it imports what is not there. Errors that are one line already pass.
    """
    try:
        yield
    except HdfastError:
        raise
    except gymnasium.error.DependencyNotInstalled as error:
        raise MissingLibraryError(str(error), where=name) from error
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and error.name:
            package = error.name.partition(".")[0]
            raise MissingLibraryError(f"{name} needs {error.name}", hint=f"pip install {package}") from error
        raise _raised(error, name) from error


def _raised(error: BaseException, name: str, hint: str = "") -> EnvError:
    """The one line of what environment `name` raised."""
    ours = (
        *(Path(module.__file__).parent for module in (gymnasium, importlib)),
        Path(__file__).parents[1],
    )
    frames = [
        f"{frame.filename}:{frame.lineno} in {frame.name}: {frame.line}"
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith("<frozen ")
        and not any(Path(frame.filename).is_relative_to(folder) for folder in ours)
    ]
    what = ": ".join(filter(None, (type(error).__name__, str(error).strip())))
    return EnvError(f"it raised {what}", where=name, hint=hint, details=frames)


@functools.cache  # once, not again for evaluation
def _tell_unseen(name: str, seen: tuple[str, ...], unseen: tuple[str, ...]) -> None:
    warn(f"{name}: sees {', '.join(seen)}, not {', '.join(unseen)}; --env.obs both sees all")


def _end_with_parent() -> None:
    """From now on this process is killed when the one that started it is gone, however it went.

    By the kernel, with SIGIO from a pipe whose other end the parent holds: a thread of its own would wait for the
    GIL, which an environment that hangs may never give back. Its server of forks is its parent only in name.
    """
    parent = multiprocessing.parent_process()
    signal.signal(signal.SIGIO, signal.SIG_DFL)
    fcntl.fcntl(parent.sentinel, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(parent.sentinel, fcntl.F_SETFL, os.O_ASYNC)
    if not parent.is_alive():  # it went before
        os._exit(1)


@dataclass(frozen=True)
class Maker:
    """Makes one environment, seen as `obs` says, in this process (`owner`) or in one of its own.

    quiet: in one of its own it passes over warnings, which another process gives.
    """

    spec: EnvSpec
    obs: str
    owner: int
    quiet: bool = False

    def __call__(self) -> gymnasium.Env:
        if os.getpid() != self.owner:
            for signum in SIGNALS:
                signal.signal(signum, signal.SIG_IGN)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # for what an environment starts
            _end_with_parent()
            tell_warnings()
            if self.quiet:
                warnings.simplefilter("ignore")
        with told(self.spec.id):
            env = gymnasium.make(self.spec)
            parts = _parts(env.observation_space)
            drawn = self.obs != "state" and not any(map(_is_image, parts.values()))
            if drawn:
                if "rgb_array" not in env.metadata.get("render_modes", ()):
                    raise ConfigError(
                        "there is no image in its observations, and it draws none",
                        where=self.spec.id,
                        hint=_TO_SEE,
                    )
                env.close()
                try:
                    env = gymnasium.make(self.spec, render_mode="rgb_array")
                    env = AddRenderObservation(env, render_only=False, render_key="image")
                except gymnasium.error.DependencyNotInstalled as error:
                    hint = "--env.obs state does without drawing"
                    raise MissingLibraryError(str(error), where=self.spec.id, hint=hint) from error
                except NotImplementedError as error:
                    raise _raised(error, self.spec.id, _TO_SEE) from error
            seen = Seen(env, self.obs, drawn=drawn)
        unseen = tuple(key for key, space in parts.items() if not _is_image(space) and not _wrong(key, space))
        if self.obs == "image" and not drawn and unseen and os.getpid() == self.owner:
            _tell_unseen(self.spec.id, tuple(seen.observation_space), unseen)
        return seen


class Seen(gymnasium.ObservationWrapper):
    """Observations as a Dict of images (H, W, 1 or 3) uint8 and vectors (n,) float32; of `info` the success alone.

    drawn: its one image is drawn, of any size, and not observed.
    """

    def __init__(self, env: gymnasium.Env, obs: str, *, drawn: bool) -> None:
        super().__init__(env)
        self._drawn = drawn
        self._name = name = env.spec.id
        parts = _parts(env.observation_space)
        images = {key: space for key, space in parts.items() if _is_image(space) and obs != "state"}
        vectors = {key: space for key, space in parts.items() if not _is_image(space) and obs != "image"}
        self._whole = not isinstance(env.observation_space, spaces.Dict)
        for key, space in ({**images, **vectors} or parts).items():  # or what it would be told to see
            if (wrong := _wrong(key, space)) is not None:
                raise ConfigError(wrong, where=name)
        for key in vectors.keys() & {*_LOSSES, *(["image"] if images else [])}:
            what = (
                f"an observation that is no image cannot be called {key!r}; the agent has a loss of that name"
            )
            raise ConfigError(what, where=name)
        if not images and not vectors:
            raise ConfigError(
                "its observations hold no vectors", where=name, hint="--env.obs image sees the images"
            )
        actions_of(env.action_space, name)
        sides = {side for space in images.values() for side in space.shape[:2]}
        self._side = next(iter(sides)) if len(sides) == 1 and sides <= set(_AS_THEY_ARE) else SIZE
        self._images, self._vectors = images, vectors
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
        with told(self._name):
            return super().reset(seed=seed, options=options)[0], {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, bool]]:
        with told(self._name):
            obs, reward, terminated, truncated, info = super().step(action)
            number = np.asarray(reward)
            if not (number.size == 1 and number.dtype.kind in "biuf" and abs(number.item()) <= _LARGEST):
                raise EnvError(f"its reward is {reward!r:.50}, right is a finite number", where=self._name)
            return obs, float(number.item()), bool(terminated), bool(truncated), _success(info)

    def close(self) -> None:
        try:
            with told(self._name):
                super().close()
        except HdfastError as error:  # whatever came of it has been saved
            warnings.warn(f"{error}; it was being closed", stacklevel=2)

    def observation(self, observation: Any) -> dict[str, np.ndarray]:
        parts = {_key(self.env.observation_space): observation} if self._whole else observation
        return {
            key: self._vector(key, parts[key]) if key in self._vectors else self._image(key, parts[key])
            for key in self.observation_space
        }

    def _vector(self, key: str, value: Any) -> np.ndarray:
        vector = spaces.flatten(self._vectors[key], value).astype(np.float32)
        right = self.observation_space[key].shape
        if vector.shape != right:
            raise EnvError(
                f"observation {key!r} has {len(vector)} numbers, right are {right[0]}", where=self._name
            )
        if not np.isfinite(vector).all():
            raise EnvError(f"observation {key!r} has numbers that are not finite", where=self._name)
        return vector

    def _image(self, key: str, value: Any) -> np.ndarray:
        image, space = np.asarray(value), self._images[key]
        same = image.shape == space.shape
        if self._drawn:
            same = (image.ndim, image.shape[2:]) == (len(space.shape), space.shape[2:])
        if image.dtype != np.uint8 or not same:
            what = f"observation {key!r} is {image.shape} {image.dtype}, its space says {space.shape} uint8"
            raise EnvError(what, where=self._name)
        return self._resized(image)

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
    if not isinstance(key, str) or not re.fullmatch(r"[\w -]+", key):
        return f"an observation cannot be called {key!r}; right are letters, digits, '_', '-' and ' '"
    if key in _TAKEN:
        return f"an observation cannot be called {key!r}; replay has a column of that name"
    if not _is_image(space):
        return (
            None if space.is_np_flattenable else f"observation {key!r} is {space}, which has no fixed length"
        )
    if space.dtype != np.uint8 or (len(space.shape) == 3 and space.shape[2] not in (1, 3)):
        right = "an image is (H, W, 3), (H, W, 1) or (H, W) uint8; gymnasium.wrappers.TransformObservation makes one"
        return f"observation {key!r} is {space.shape} {space.dtype}; {right}"
    return None


def actions_of(space: spaces.Space, name: str) -> DiscreteActions | ContinuousActions:
    """Raises ConfigError for actions that the agent does not have."""
    if isinstance(space, spaces.Discrete):
        return DiscreteActions(int(space.n))
    if not isinstance(space, spaces.Box) or not np.issubdtype(space.dtype, np.floating):
        raise ConfigError(f"its actions are {space}; right are Discrete, or a Box of floats", where=name)
    if not space.is_bounded():
        hint = "give them bounds, gymnasium.wrappers.RescaleAction or ClipAction"
        raise ConfigError(f"its actions have no bounds: {space}", where=name, hint=hint)
    if not (space.high > space.low).any():
        raise ConfigError(f"its actions leave no choice: {space}", where=name)
    return ContinuousActions(math.prod(space.shape))
