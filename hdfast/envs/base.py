"""The one batched interface behind which every source of data stands.

Axes: N environments of one batch. A row is what one environment returns for one agent step.

Auto-reset: after a row with `is_last` the next action of that environment is ignored, and the row it
returns is `is_first` with reward 0. Every row therefore counts as one agent step, reset rows included, and
frames = agent_steps * action_repeat.
"""

import importlib
import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import ModuleType, TracebackType
from typing import Any, Self

import numpy as np

from hdfast.runtime.errors import MissingLibraryError


@dataclass(frozen=True)
class ArraySpec:
    """Shape and dtype of one environment's array, without the batch axis."""

    shape: tuple[int, ...]
    dtype: np.dtype

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", np.dtype(self.dtype))

    @property
    def is_image(self) -> bool:
        """Whether it is (H, W, C)."""
        return len(self.shape) == 3

    def check(self, array: object, num_envs: int, where: str) -> None:
        """Refuses anything but a batch (num_envs, ...) of these, which numpy would silently cast or broadcast.

        Raises: TypeError (no numpy array, another dtype) or ValueError (another shape); messages begin with `where`.
        """
        shape = (num_envs, *self.shape)
        if not isinstance(array, np.ndarray):
            raise TypeError(f"{where} is a {type(array).__name__}, expected a numpy array")
        if array.dtype != self.dtype:
            raise TypeError(f"{where} has dtype {array.dtype}, expected {self.dtype}")
        if array.shape != shape:
            raise ValueError(f"{where} has shape {array.shape}, expected {shape}")

    def row_of(self, value: object, where: str) -> np.ndarray:
        """One of these from what a user has: for a vector any numbers, and a number for a vector of one.

        Raises: TypeError (an image of another dtype, no numbers) or ValueError (another shape, numbers that are not
        finite); messages begin with `where`.
        """
        array = np.asarray(value)
        if array.shape == () and self.shape == (1,):
            array = array[None]
        if array.shape != self.shape:
            raise ValueError(f"{where} has shape {array.shape}, expected {self.shape}")
        if self.dtype.kind == "f" and array.dtype.kind in "biuf":
            with np.errstate(over="ignore"):  # what is too large becomes infinite
                array = array.astype(self.dtype)
            if not np.isfinite(array).all():
                raise ValueError(f"{where} has numbers that are not finite")
        if array.dtype != self.dtype:
            raise TypeError(f"{where} has dtype {array.dtype}, expected {self.dtype}")
        return array


@dataclass(frozen=True)
class DiscreteActions:
    """Actions are int32 (N,) in [0, count)."""

    count: int

    @property
    def spec(self) -> ArraySpec:
        return ArraySpec((), np.dtype(np.int32))

    def sample(self, rng: np.random.Generator, num_envs: int) -> np.ndarray:
        """Uniform random actions, int32 (num_envs,)."""
        return rng.integers(self.count, size=num_envs, dtype=np.int32)

    def error(self, action: np.ndarray) -> str | None:
        """What is wrong with the values of a well-formed batch of actions, or None."""
        if action.size and not (action.min() >= 0 and action.max() < self.count):
            return f"values in [{action.min()}, {action.max()}], expected 0 to {self.count - 1}"
        return None


@dataclass(frozen=True)
class ContinuousActions:
    """Actions are float32 (N, size) in [-1, 1]."""

    size: int

    @property
    def spec(self) -> ArraySpec:
        return ArraySpec((self.size,), np.dtype(np.float32))

    def sample(self, rng: np.random.Generator, num_envs: int) -> np.ndarray:
        """Uniform random actions, float32 (num_envs, size)."""
        return rng.uniform(-1, 1, (num_envs, self.size)).astype(np.float32)

    def error(self, action: np.ndarray) -> str | None:
        """What is wrong with the values of a well-formed batch of actions, or None."""
        if not np.isfinite(action).all():
            return f"{np.count_nonzero(~np.isfinite(action))} values that are not finite"
        if action.size and np.abs(action).max() > 1:
            return f"values in [{action.min():g}, {action.max():g}], expected -1 to 1"
        return None


@dataclass(frozen=True)
class EnvStep:
    """One row of every environment, in arrays that belong to the receiver.

    obs holds (N, ...) arrays as in `obs_specs`; reward is float32 (N,), received on arriving at this row
    and 0 where is_first; is_first, is_last and is_terminal are bool (N,), and is_terminal implies is_last.
    info holds (N,) or (N, ...) arrays that no agent may see (`success` of Meta-World and gym).
    """

    obs: dict[str, np.ndarray]
    reward: np.ndarray
    is_first: np.ndarray
    is_last: np.ndarray
    is_terminal: np.ndarray
    info: dict[str, np.ndarray] = field(default_factory=dict)


class BatchEnv(ABC):
    """N environments of one task that step together.

    reset() first; then step(action), or send(action) and later recv() with other work between the two.
    Actions are checked before they reach the source, because the fast ones read out of bounds instead of
    complaining. `source` names the package they come from.
    """

    source: str

    def __init__(
        self,
        name: str,
        *,
        num_envs: int,
        obs_specs: dict[str, ArraySpec],
        actions: DiscreteActions | ContinuousActions,
        action_repeat: int,
    ) -> None:
        self.name = name
        self.num_envs = num_envs
        self.obs_specs = obs_specs
        self.actions = actions
        self.action_repeat = action_repeat
        self._started = False
        self._pending = False
        self._closed = False

    def reset(self) -> EnvStep:
        """Begin a new episode in every environment, at any time; all rows are is_first."""
        self._require(not self._pending, "reset() while an action is on its way: call recv() first")
        step = self._reset()
        self._started = True
        return step

    def send(self, action: np.ndarray) -> None:
        """Start one agent step with one action per environment; the answer comes from recv().

        Raises TypeError (no numpy array, wrong dtype), ValueError (wrong shape, out of range, not finite)
        or RuntimeError (before reset(), twice without recv(), after close()), before anything reaches the
        source.
        """
        self._require(self._started, "send() before reset()")
        self._require(not self._pending, "send() twice without recv()")
        self._check(action)
        self._send(action)
        self._pending = True

    def recv(self) -> EnvStep:
        """The rows that follow the last send(), in the order of the environments."""
        self._require(self._pending, "recv() without send()")
        step = self._recv()
        self._pending = False
        return step

    def step(self, action: np.ndarray) -> EnvStep:
        """send() and recv() in one."""
        self.send(action)
        return self.recv()

    def row_of(self, observation: Any) -> dict[str, np.ndarray]:
        """An observation of a single environment of the user's own as rows (1, ...), one for each of `obs_specs`.

        observation: a mapping by name, or the value itself where the agent sees only one. A vector may be of any
            numbers, and a number stand for a vector of one.

        Raises ValueError where one is missing, has another shape, or is not finite, TypeError where it is of another
        type.
        """
        names = ", ".join(self.obs_specs)
        if isinstance(observation, Mapping):
            named = observation
        elif len(self.obs_specs) == 1:
            named = dict.fromkeys(self.obs_specs, observation)
        else:
            kind = type(observation).__name__
            raise TypeError(f"{self.name}: the observation is of type {kind}, expected {names} by name")
        if missing := [key for key in self.obs_specs if key not in named]:
            raise ValueError(
                f"{self.name}: the observation has no {missing[0]!r}, but {', '.join(map(str, named))}"
            )
        return {
            key: spec.row_of(named[key], f"{self.name}: observation {key!r}")[None]
            for key, spec in self.obs_specs.items()
        }

    def own_action(self, action: np.ndarray) -> Any:
        """The first of the actions (N, ...), as a single environment of the user's own takes it."""
        return action[0]

    def close(self) -> None:
        """Free the environments; closing twice is fine, anything else afterwards is a RuntimeError."""
        if not self._closed:
            self._close()
            self._closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _require(self, right: bool, what: str) -> None:
        if self._closed:
            raise RuntimeError(f"{self.name}: this environment is closed")
        if not right:
            raise RuntimeError(f"{self.name}: {what}")

    def _check(self, action: np.ndarray) -> None:
        self.actions.spec.check(action, self.num_envs, f"{self.name}: action")
        if (error := self.actions.error(action)) is not None:
            raise ValueError(f"{self.name}: action has {error}")

    @abstractmethod
    def _reset(self) -> EnvStep: ...

    @abstractmethod
    def _send(self, action: np.ndarray) -> None: ...

    @abstractmethod
    def _recv(self) -> EnvStep: ...

    @abstractmethod
    def _close(self) -> None: ...


def installed(*packages: str) -> bool:
    """Whether the packages are installed, without importing them."""
    return all(importlib.util.find_spec(package) is not None for package in packages)


def load(module: str, *, needed_by: str, install: str) -> ModuleType:
    """Import the package that a source relies on.

    It is imported in a separate thread: envpool keeps an exception from its import, and with it every frame of the
    stack, which would keep a run's replay and parameters alive as long as the process.

    Raises MissingLibraryError where it is not installed, with the command that installs it, and where it does
    not load, with the reason.
    """
    package = module.partition(".")[0]
    if not installed(package):
        raise MissingLibraryError(f"{needed_by} needs {package}", hint=install)
    try:
        with ThreadPoolExecutor(1, "import") as thread:
            return thread.submit(importlib.import_module, module).result()
    except (ImportError, OSError) as error:
        raise MissingLibraryError(
            f"{needed_by}: {package} does not load: {error}", hint="install what it names"
        ) from error


def env_seeds(seed: int, num_envs: int) -> list[int]:
    """One 31-bit seed per environment.

    Batches of neighbouring seeds share no environment (with seed + env_id they would), and the first environments of
    a larger batch are those of a smaller one.
    """
    if seed < 0:
        raise ValueError(f"seed is {seed}, expected 0 or more")
    return [int(word) & 0x7FFFFFFF for word in np.random.SeedSequence(seed).generate_state(num_envs)]
