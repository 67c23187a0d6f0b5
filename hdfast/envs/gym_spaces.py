"""How the agent sees the spaces of a gymnasium environment: images, vectors, actions, and what it cannot take.

Axes: H, W pixels, C channels.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, TypeGuard

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.wrappers import ClipAction

from hdfast.envs.base import ContinuousActions, DiscreteActions
from hdfast.runtime.errors import ConfigError

_NAME = re.compile(r"[\w -]+")
MOST_ACTIONS = 1_024  # combinations of several discrete choices; each is an action of its own to the agent
# Names of replay's other columns.
_TAKEN = ("action", "reward", "is_first", "is_last", "is_terminal", "starts")


def key_of(space: spaces.Space) -> str:
    """The name of an observation that has none of its own."""
    return "image" if is_image(space) else "state"


def parts_of(space: spaces.Space, name: str) -> dict[str, spaces.Space]:
    """The observations of environment `name`, under the names that the agent uses. Raises: ConfigError."""
    if not isinstance(space, spaces.Dict):
        return {key_of(space): space}
    theirs: dict[str, str] = {}
    found: dict[str, spaces.Space] = {}
    for key, part in _opened(space):
        if (other := theirs.setdefault(called(key), key)) != key:
            what = f"observations {other!r} and {key!r} would both be called {called(key)!r}"
            raise ConfigError(what, where=name)
        found[called(key)] = part
    return found


def values_of(space: spaces.Dict, observation: Mapping[Any, Any]) -> dict[str, Any]:
    """An observation of that space, or part of one, under the names of `parts_of`."""
    found: dict[str, Any] = {}
    for key, value in observation.items():
        part = space.spaces.get(key)
        if isinstance(part, spaces.Dict) and isinstance(value, Mapping) and _opens(key, part):
            found |= {called(f"{key}/{inner}"): one for inner, one in values_of(part, value).items()}
        else:
            found[called(key)] = value
    return found


def _opened(space: spaces.Dict) -> Iterator[tuple[Any, spaces.Space]]:
    """The parts of a Dict by name; "pixels/top" for one of an inner Dict with images, which are seen as such."""
    for key, part in space.items():
        if isinstance(part, spaces.Dict) and _opens(key, part):
            yield from ((f"{key}/{inner}", one) for inner, one in _opened(part))
        else:
            yield key, part


def _opens(key: Any, part: spaces.Dict) -> bool:
    """Whether an inner Dict is seen part by part, not as one vector."""
    return all(isinstance(name, str) for name in (key, *part)) and any(
        is_image(one) or (isinstance(one, spaces.Dict) and _opens(name, one)) for name, one in part.items()
    )


def called(key: Any) -> Any:
    """The agent's name for an observation of a Dict: "-" replaces "/", and "." between letters, if that is valid."""
    new = re.sub(r"(?<=\w)\.(?=\w)", "-", key.replace("/", "-")) if isinstance(key, str) else ""
    return new if _NAME.fullmatch(new) else key


def is_image(space: spaces.Space) -> TypeGuard[spaces.Box]:
    """Whether a space is meant as an image; `wrong` says whether the agent can take it."""
    return isinstance(space, spaces.Box) and (
        len(space.shape) == 3 or (len(space.shape) == 2 and space.dtype == np.uint8)
    )


def holds_image(space: spaces.Space) -> bool:
    """Whether a space contains an image, as a Dict or a stack of frames does."""
    match space:
        case spaces.Dict():
            return any(map(holds_image, space.values()))
        case spaces.Tuple():
            return any(map(holds_image, space))
        case _:
            return is_image(space) or (isinstance(space, spaces.Box) and len(space.shape) > 3)


def like_image(space: spaces.Space) -> TypeGuard[spaces.Box]:
    """Whether a vector may be meant as an image: numbers of two axes, in the range of a picture's."""
    return isinstance(space, spaces.Box) and (
        len(space.shape) == 2 and min(space.shape) >= 8 and white_of(space) is not None
    )


def channels_first(space: spaces.Box) -> bool:
    """Whether an image is (C, H, W); an ambiguous shape is not."""
    return len(space.shape) == 3 and space.shape[2] not in (1, 3) and space.shape[0] in (1, 3)


def shape_of(space: spaces.Box) -> tuple[int, int, int]:
    """(H, W, C) of an image."""
    if channels_first(space):
        channels, height, width = space.shape
        return height, width, channels
    height, width, *channels_last = space.shape
    return height, width, math.prod(channels_last)


def white_of(space: spaces.Box) -> int | None:
    """The value of white in an image of 0 to 1 or of 0 to 255; None for any other range."""
    if space.dtype == np.uint8:
        return 255
    if space.dtype in (np.float32, np.float64) and (space.low == 0).all():
        return next((white for white in (1, 255) if (space.high == white).all()), None)
    return None


def wrong(key: str, space: spaces.Space) -> str | None:
    """Why the agent cannot take an observation, and what would be right; None if it can."""
    if not isinstance(key, str) or not _NAME.fullmatch(key):
        return f"an observation cannot be called {key!r}; expected letters, digits, '_', '-' and ' '"
    if key in _TAKEN:
        return f"an observation cannot be called {key!r}; replay has a column of that name"
    if not is_image(space):
        if not _has_fixed_length(space):
            own = type(space).__module__.partition(".")[0] == "gymnasium"
            return (
                f"observation {key!r} is {space if own else type(space).__name__}, which has no fixed length"
            )
        return None if spaces.flatdim(space) else f"observation {key!r} is {space}, which holds no number"
    if 0 in space.shape:
        return f"observation {key!r} is {space.shape} {space.dtype}, which holds no pixel"
    what = f"observation {key!r} is {space.shape} {space.dtype}"
    makes = "gymnasium.wrappers.TransformObservation makes one"
    if shape_of(space)[2] not in (1, 3):
        stack = "; leave out stacks of frames, the agent remembers"
        return f"{what}; an image is (H, W, 3), (H, W, 1) or (H, W) uint8; {makes}{stack}"
    if white_of(space) is None:
        within = f" of {space.low.min():g} to {space.high.max():g}"
        return f"{what}{within}; an image is uint8, or floats of 0 to 1 or 0 to 255; {makes}"
    return None


def _has_fixed_length(space: spaces.Space) -> bool:
    """False for text, too, which gymnasium would flatten into codes of characters."""
    match space:
        case spaces.Text():
            return False
        case spaces.Dict():
            return all(map(_has_fixed_length, space.values()))
        case spaces.Tuple() | spaces.OneOf():
            return all(map(_has_fixed_length, space.spaces))
    try:
        return space.is_np_flattenable
    except NotImplementedError:  # somebody's own kind of space, such as a sentence
        return False


def outside(space: spaces.Space, value: Any, key: str) -> str | None:
    """Which number of observation `key` is out of range of a Discrete or MultiDiscrete in its space; None if none is.

    gymnasium would raise an IndexError, or count from the end. No other faults are checked here.
    """
    match space:
        case spaces.Dict():
            parts = ((part, value[name], f"{key}/{name}") for name, part in space.items())
        case spaces.Tuple():
            parts = (
                (part, one, f"{key}/{n}") for n, (part, one) in enumerate(zip(space, value, strict=False))
            )
        case spaces.OneOf():
            return outside(space.spaces[value[0]], value[1], key)
        case spaces.Discrete():
            number = np.asarray(value)
            low, high = int(space.start), int(space.start + space.n) - 1
            if number.dtype.kind in "biu" and number.size == 1 and low <= number.item() <= high:
                return None
            return f"observation {key!r} is {value!s:.50}, expected a whole number from {low} to {high}"
        case spaces.MultiDiscrete():
            numbers, least, most = np.asarray(value), space.start, space.start + space.nvec - 1
            if numbers.dtype.kind not in "biu" or numbers.shape != space.shape:
                given = f"{numbers.shape} {numbers.dtype}"
                return f"observation {key!r} is {given}, expected {space.shape} of whole numbers"
            if not (out := (numbers < least) | (numbers > most)).any():
                return None
            at = tuple(np.argwhere(out)[0].tolist())
            right = f"expected a whole number from {least[at]} to {most[at]}"
            return f"observation {key!r} has {numbers[at]} at {list(at)}, {right}"
        case _:
            return None
    return next((what for part in parts if (what := outside(*part))), None)


def action_space_of(env: gymnasium.Env) -> spaces.Space:
    """The actions that an environment takes; if its ClipAction takes all numbers, those that it clips to."""
    layer = env
    while _unbounded(layer.action_space) and isinstance(layer, gymnasium.Wrapper):
        inner = layer.env
        passes = not isinstance(layer, gymnasium.ActionWrapper) and layer.action_space == inner.action_space
        if not (passes or isinstance(layer, ClipAction)):
            break
        layer = inner
    return layer.action_space


def _unbounded(space: spaces.Space) -> bool:
    return isinstance(space, spaces.Box) and not space.is_bounded()


def choices_of(space: spaces.Space) -> tuple[int, ...] | None:
    """How many values each number of a discrete action can have; None if actions are not discrete."""
    match space:
        case spaces.Discrete():
            return (int(space.n),)
        case spaces.MultiDiscrete():
            return tuple(space.nvec.flatten().tolist())
        case spaces.MultiBinary():
            return (2,) * math.prod(space.shape)
        case _:
            return None


def actions_of(space: spaces.Space, name: str) -> DiscreteActions | ContinuousActions:
    """Raises ConfigError for actions that the agent does not have."""
    if (choices := choices_of(space)) is not None:
        count = math.prod(choices)
        if len(choices) > 1 and count > MOST_ACTIONS:
            given = " ".join(str(space).split())  # a table is put on one line
            what = f"its actions are {given}, {count:,} combinations; expected up to {MOST_ACTIONS:,}"
            raise ConfigError(what, where=name)
        return DiscreteActions(count)
    if not isinstance(space, spaces.Box) or not np.issubdtype(space.dtype, np.floating):
        right = "Discrete, MultiDiscrete, MultiBinary, or a Box of floats"
        raise ConfigError(f"its actions are {space}; expected {right}", where=name)
    if _unbounded(space):
        hint = "gymnasium.wrappers.TransformAction(env, f, Box(low, high)) gives them bounds"
        raise ConfigError(f"its actions have no bounds: {space}", where=name, hint=hint)
    if not (space.high > space.low).any():
        raise ConfigError(f"its actions leave no choice: {space}", where=name)
    return ContinuousActions(math.prod(space.shape))
