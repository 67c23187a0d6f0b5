"""One environment of gymnasium as the agent sees it.

Axes: H, W pixels.
"""

import fcntl
import functools
import importlib
import json
import multiprocessing
import os
import signal
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec, load_env_creator
from gymnasium.vector import VectorEnv
from gymnasium.wrappers import AddRenderObservation, TimeLimit
from PIL import Image

from hdfast.envs.gym_errors import env_errors, raised
from hdfast.envs.gym_spaces import (
    action_space_of,
    actions_of,
    channels_first,
    holds_image,
    is_image,
    key_of,
    like_image,
    outside,
    parts_of,
    shape_of,
    values_of,
    white_of,
    wrong,
)
from hdfast.runtime.errors import ConfigError, EnvError, HdfastError, MissingLibraryError, tell_warnings, warn
from hdfast.runtime.signals import in_forked

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # the learner handles them: it saves, then stops
_LOSSES = ("dyn", "rep", "cont")  # names of the agent's other losses; all images share one, "image"
_WITHOUT = "leave it out with gymnasium.wrappers.FilterObservation"
_TO_SEE = "let it observe (H, W, 3) uint8, or render 'rgb_array'; --env.obs state does without"
_ALONE = "an image stands alone or in a Dict, (H, W, 3)"
_SMALL = 24  # pixels; a smaller image, such as a map of 7 x 7 categories, may not be meant as a picture
_LARGEST = float(np.finfo(np.float32).max)


def _refuse_many(spec: EnvSpec) -> None:
    """Raises ConfigError for a registered VectorEnv, which is many environments in one."""
    creator = load_env_creator(spec.entry_point) if isinstance(spec.entry_point, str) else spec.entry_point
    if creator is None or (isinstance(creator, type) and issubclass(creator, VectorEnv)):
        hint = "register a single environment; hdfast makes its own copies, --env.num-envs of them"
        raise ConfigError("it is a VectorEnv", where=spec.id, hint=hint)


@functools.cache  # once, not again for evaluation
def _tell(text: str) -> None:
    warn(text)


def _end_with_parent() -> None:
    """From now on this process is killed when the one that started it is gone, however it ended.

    The kernel does it, with SIGIO from a pipe whose other end the parent holds: a thread would wait for the GIL, which
    an environment that hangs may never release. The fork server is only nominally its parent.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    signal.signal(signal.SIGIO, signal.SIG_DFL)
    fcntl.fcntl(parent.sentinel, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(parent.sentinel, fcntl.F_SETFL, os.O_ASYNC)
    if not parent.is_alive():  # it was gone before
        os._exit(1)


@dataclass(frozen=True)
class Maker:
    """Makes one environment, seen as `obs` says, in this process (`owner`) or in a separate one.

    image_size, kwargs, time_limit: as `hdfast.envs.make`.
    quiet: in a separate process, ignore warnings, because another process gives them.
    module: imported in a separate process, because an environment may make others that it registers.
    """

    spec: EnvSpec
    obs: str
    image_size: int
    kwargs: str
    time_limit: int
    owner: int
    quiet: bool = False
    module: str = ""

    def __call__(self) -> gymnasium.Env:
        if os.getpid() == self.owner:
            return self._seen()
        for signum in SIGNALS:
            signal.signal(signum, signal.SIG_IGN)
        # What an environment starts inherits SIG_IGN: Ctrl-C is not for it. But terminate() is, and a handler ends with
        # exec, or with the fork.
        signal.signal(signal.SIGTERM, lambda *_: None)
        signal.siginterrupt(signal.SIGTERM, False)
        in_forked.append({signal.SIGTERM: signal.SIG_DFL})
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # for processes that an environment starts
        _end_with_parent()
        try:
            if self.module:
                warnings.showwarning = lambda *_, **__: None  # the learner's process has told them
                with env_errors(self.module):
                    importlib.import_module(self.module)
            tell_warnings()
            if self.quiet:
                warnings.simplefilter("ignore")
            return self._seen()
        except HdfastError as error:  # gymnasium would print it instead of sending it
            return Unmade(error)

    def _seen(self) -> gymnasium.Env:
        with env_errors(self.spec.id):
            _refuse_many(self.spec)
            env = self._make()
            parts = parts_of(env.observation_space, self.spec.id)
            pictured = any(map(is_image, parts.values()))
            obs = self.obs if self.obs != "auto" else "image" if pictured else "state"
            drawn = obs != "state" and not pictured
            if drawn:
                env = self._drawing(env, parts)
            seen = Seen(env, obs, image_size=self.image_size, drawn=drawn)
        if os.getpid() == self.owner:
            self._tell(seen, parts, images_alone=obs == "image" and not drawn)
            if drawn and (hidden := [key for key, part in parts.items() if holds_image(part)]):
                _tell(f"{self.spec.id}: sees what it draws, not the images in {', '.join(hidden)}; {_ALONE}")
        return seen

    def _drawing(self, env: gymnasium.Env, parts: Mapping[str, spaces.Space]) -> gymnasium.Env:
        """Closes `env`, and makes it again so that each observation has an "image" that it draws."""
        if "rgb_array" not in env.metadata.get("render_modes", ()):
            inside = [key for key, part in parts.items() if holds_image(part)]
            lack = f"the images in {inside[0]} do not stand alone" if inside else "there is no image"
            what = f"{lack} in its observations, and it draws none"
            raise ConfigError(what, where=self.spec.id, hint=_TO_SEE)
        env.close()
        try:
            env = self._make(render_mode="rgb_array")
            return AddRenderObservation(env, render_only=False, render_key="image")
        except gymnasium.error.DependencyNotInstalled as error:
            hint = "--env.obs state does without drawing"
            raise MissingLibraryError(str(error), where=self.spec.id, hint=hint) from error
        except NotImplementedError as error:
            raise raised(error, self.spec.id, _TO_SEE) from error

    def _tell(self, seen: "Seen", parts: Mapping[str, spaces.Space], *, images_alone: bool) -> None:
        """Warns, once each, of what may surprise: what is not seen, or seen otherwise than meant; endless episodes."""
        name, keys = self.spec.id, tuple(seen.observation_space)
        unseen = [key for key in parts if key not in keys]
        if images_alone and unseen:
            more = [key for key in unseen if wrong(key, parts[key]) is None]
            also = f"; --env.obs both sees {'all' if more == unseen else ', '.join(more)}" if more else ""
            if refused := [key for key in more if key in (*_LOSSES, "image")]:
                also += f", with another name for {', '.join(refused)}"
            _tell(f"{name}: sees {', '.join(keys)}, not {', '.join(unseen)}{also}")
        for what in seen.left_out:
            _tell(f"{name}: goes on without what the agent cannot take: {what}")
        for key, (height, width) in seen.enlarged.items():
            right = "if its numbers are categories, not brightness, let it observe a picture"
            _tell(f"{name}: enlarges {key} from {height} x {width} pixels; {right}")
        for key, space in seen.vectors.items():
            if holds_image(space):
                right = _ALONE
                if isinstance(space, spaces.Box):
                    right = "frames need no stacking, the agent remembers"
                what = f"the images in {key} as a vector of {spaces.flatdim(space):,} numbers"
                _tell(f"{name}: sees {what}; {right}")
            elif like_image(space):
                what = f"{key} as a vector of {spaces.flatdim(space):,} numbers"
                _tell(f"{name}: sees {what}; as an image it would be {(*space.shape, 1)}")
        if seen.endless:
            what = "gymnasium knows of no time limit; if an episode may not end, --env.time-limit ends it"
            _tell(f"{name}: {what}")

    def _make(self, **more: Any) -> gymnasium.Env:
        """The registered environment, made with the arguments asked for and `more`."""
        given = {**json.loads(self.kwargs), **more}
        if self.time_limit:
            # Registered wrappers may count other steps than the agent's.
            given["max_episode_steps"] = -1
        try:
            env = gymnasium.make(self.spec, **given)
        except TypeError as error:
            if self.kwargs == "{}":
                raise
            hint = f"--env.kwargs gave it {self.kwargs}"
            first = error.__context__ or error  # gymnasium adds the arguments to the message
            raise raised(first, self.spec.id, hint, kind=ConfigError) from error
        return TimeLimit(env, self.time_limit) if self.time_limit else env


class Unmade(gymnasium.Env):
    """Stands for an environment that could not be made in a separate process: comparing its spaces raises `error`."""

    def __init__(self, error: HdfastError) -> None:
        self.observation_space = self.action_space = _Raising(error)


class _Raising(spaces.Dict):
    """A subclass of Dict, so that Python asks it first when it is compared with a Dict."""

    def __init__(self, error: HdfastError) -> None:
        self._error = error

    def __eq__(self, other: object) -> bool:
        raise self._error


class Seen(gymnasium.ObservationWrapper):
    """Observations as a Dict of images (H, W, 1 or 3) uint8 and vectors (n,) float32; `info` keeps success alone.

    image_size: side of the images, in pixels; a smaller power of two is kept if all images have it.
    drawn: its one image, of any size, is drawn, not observed.
    vectors: the environment's own spaces of the vectors that are seen.
    left_out: why the agent cannot take the vectors that were asked for and are not seen.
    enlarged: (H, W) of images so small that they may be no pictures.
    endless: whether gymnasium knows of no time limit.
    """

    observation_space: spaces.Dict  # type: ignore[override]

    def __init__(self, env: gymnasium.Env, obs: str, *, image_size: int, drawn: bool) -> None:
        super().__init__(env)
        self._drawn = drawn
        assert env.spec is not None
        self._name = name = env.spec.id
        self.endless = env.spec.max_episode_steps is None
        parts = parts_of(env.observation_space, name)
        images = {key: space for key, space in parts.items() if is_image(space) and obs != "state"}
        vectors = {key: space for key, space in parts.items() if not is_image(space) and obs != "image"}
        self._whole = not isinstance(env.observation_space, spaces.Dict)
        wanted = {**images, **vectors} or parts  # or those to choose from
        faults = {key: what for key, space in wanted.items() if (what := wrong(key, space)) is not None}
        for key, what in faults.items():
            if key not in vectors or len(faults) == len(wanted):
                others = [part for other, part in parts.items() if wrong(other, part) is None]
                hints = [f"or {_WITHOUT}"] if others and is_image(wanted[key]) and not drawn else []
                hints += [] if all(map(is_image, others)) else ["--env.obs state does without images"]
                raise ConfigError(what, where=name, hint="; ".join(hints))
        self.left_out = list(faults.values())
        vectors = {key: space for key, space in vectors.items() if key not in faults}
        for key in vectors.keys() & {*_LOSSES, *(["image"] if images else [])}:
            what = (
                f"an observation that is no image cannot be called {key!r}; the agent has a loss of that name"
            )
            raise ConfigError(what, where=name, hint=f"rename it, or {_WITHOUT}")
        if not images and not vectors:
            raise ConfigError(
                "its observations hold no vectors", where=name, hint="--env.obs image sees the images"
            )
        self.action_space = action_space_of(env)
        actions_of(self.action_space, name)
        sides = {side for space in images.values() for side in shape_of(space)[:2]}
        fits = len(sides) == 1 and sides <= {1 << k for k in range(3, image_size.bit_length())}
        self._side = next(iter(sides)) if fits else image_size
        self._images, self.vectors = images, vectors
        self.enlarged = {
            key: shape_of(space)[:2]
            for key, space in images.items()
            if not drawn and min(shape_of(space)[:2]) < min(_SMALL, self._side)
        }
        self._white = {key: white for key, space in images.items() if (white := white_of(space)) is not None}
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
        with env_errors(self._name):
            return super().reset(seed=seed, options=options)[0], {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, bool]]:
        with env_errors(self._name):
            obs, reward, terminated, truncated, info = super().step(action)
            number = np.asarray(reward)
            if not (number.size == 1 and number.dtype.kind in "biuf" and abs(number.item()) <= _LARGEST):
                raise EnvError(f"its reward is {reward!r:.50}, expected a finite number", where=self._name)
            success = _success(info, over=bool(terminated or truncated))
            return obs, float(number.item()), bool(terminated), bool(truncated), success

    def close(self) -> None:
        try:
            with env_errors(self._name):
                super().close()
        except HdfastError as error:  # everything it produced has been saved
            warnings.warn(f"{error}; it was being closed", stacklevel=2)

    def row_of(self, observation: Any) -> dict[str, np.ndarray]:
        """What the agent sees of an observation in the environment's own space.

        If the agent sees the drawn frame alone, `observation` is that frame; if it sees vectors too, a mapping of
        "image" and the vectors by name, with "state" for one without a name.
        """
        return self.observation({"image": observation} if self._drawn and not self.vectors else observation)

    def observation(self, observation: Any) -> dict[str, np.ndarray]:
        if self._whole:
            parts = {key_of(self.env.observation_space): observation}
        elif isinstance(observation, Mapping):
            own: Any = self.env.observation_space
            parts = values_of(own, observation)
        else:
            right = f"expected {', '.join(self.observation_space)} by name"
            raise EnvError(
                f"the observation is of type {type(observation).__name__}, {right}", where=self._name
            )
        if missing := [key for key in self.observation_space if key not in parts]:
            given = ", ".join(map(str, parts))
            hint = '{**observation, "image": env.render()} has it' if self._drawn else ""
            raise EnvError(f"the observation has no {missing[0]!r}, but {given}", where=self._name, hint=hint)
        return {
            key: self._vector(key, parts[key]) if key in self.vectors else self._image(key, parts[key])
            for key in self.observation_space
        }

    def _vector(self, key: str, value: Any) -> np.ndarray:
        if (what := outside(self.vectors[key], value, key)) is not None:
            raise EnvError(what, where=self._name)
        flat: Any = spaces.flatten(self.vectors[key], value)
        vector = flat.astype(np.float32)
        if vector.shape != self.observation_space[key].shape:
            right = spaces.flatdim(self.vectors[key])
            raise EnvError(
                f"observation {key!r} has {len(vector)} numbers, expected {right}", where=self._name
            )
        if not np.isfinite(vector).all():
            at = int(np.argmin(np.isfinite(vector)))
            what = f"observation {key!r} has numbers that are not finite, the first is number {at}"
            raise EnvError(what, where=self._name)
        return vector

    def _image(self, key: str, value: Any) -> np.ndarray:
        image, space = np.asarray(value), self._images[key]
        same = image.shape == space.shape
        if self._drawn:
            same = (image.ndim, image.shape[2:]) == (len(space.shape), space.shape[2:])
        floats = space.dtype != np.uint8
        if not same or not (image.dtype.kind == "f" if floats else image.dtype == np.uint8):
            seen, right = f"{image.shape} {image.dtype}", f"{space.shape} {space.dtype}"
            hint = "the agent sees what the environment draws: env.render()" if self._drawn else ""
            raise EnvError(
                f"observation {key!r} is {seen}, its space says {right}", where=self._name, hint=hint
            )
        if floats:
            white = self._white[key]
            image = np.rint(image * (255 / white))
            if not (image.min() >= 0 and image.max() <= 255):  # NaN is neither
                raise EnvError(f"observation {key!r} has numbers that are not 0 to {white}", where=self._name)
            image = image.astype(np.uint8)
        return self._resized(np.moveaxis(image, 0, -1) if channels_first(space) else image)

    def _image_space(self, space: spaces.Box) -> spaces.Box:
        return spaces.Box(0, 255, (self._side, self._side, shape_of(space)[2]), np.uint8)

    def _resized(self, image: np.ndarray) -> np.ndarray:
        if image.shape[:2] != (self._side, self._side):
            picture = Image.fromarray(image[..., 0] if image.shape[2:] == (1,) else image)
            image = np.asarray(picture.resize((self._side, self._side), Image.Resampling.BOX))
        return image.reshape(self._side, self._side, -1)


def _success(info: dict[str, Any], *, over: bool) -> dict[str, bool]:
    """{"success": whether this row solves the episode}, empty if the environment does not say.

    `success` counts in any row, as Meta-World has it, `is_success` in the last one, as gymnasium-robotics does.
    """
    for name, counts in (("success", True), ("is_success", over)):
        value = np.asarray(info.get(name))
        if value.size == 1 and value.dtype.kind in "biuf":
            return {"success": counts and bool(value.item() >= 0.5)}
    return {}
