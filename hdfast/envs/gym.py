"""Environments of your own: whatever is registered with gymnasium, stepped by its vector environments.

A task is what `gymnasium.make` takes: `CarRacing-v3`, or `my_envs:Maze-v0`, for which the module my_envs is imported
first. Episodes end when the environment says so: `terminated` is terminal, `truncated` (a time limit) is not.

Images are observations of (H, W, 3), (H, W, 1) or (H, W) uint8, of (3, H, W) or (1, H, W), or floats of 0 to 1 or 0 to
255 with three axes, alone or in a Dict under names of letters, digits, `_`, `-` and spaces (`/` and `.` become `-`),
also in a Dict inside it ("top" in "pixels" is called `pixels-top`). Where there is none, and one is asked for, the
environment is drawn (`render_mode="rgb_array"`). All other observations are vectors, Discrete ones one-hot, a Tuple, or
a Dict without images, inside the Dict joined into one; what has no fixed length is left out, if others are seen. Images
that are not all square with one side of 8, 16, 32 or 64 become 64 x 64 by Pillow's box filter; `image_size` sets
another power of two in place of 64. Each combination of MultiDiscrete and MultiBinary actions is one action of the
agent. Bounded Box actions are stretched to [-1, 1]; the bounds of a ClipAction are those that it clips to. Where `info`
holds `success`, an episode succeeds if one of its rows does; where it holds `is_success`, if its last row does. A
number counts from 0.5 on.

Axes: N environments, H, W pixels.
"""

import contextlib
import ctypes
import dataclasses
import importlib
import multiprocessing
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable, Set
from concurrent.futures import Future
from functools import partial
from multiprocessing import connection, forkserver, resource_tracker
from multiprocessing.util import Finalize
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from gymnasium.vector.utils import clear_mpi_env_vars

from hdfast.envs.base import ArraySpec, BatchEnv, EnvStep, env_seeds
from hdfast.envs.gym_errors import env_errors
from hdfast.envs.gym_spaces import actions_of, choices_of
from hdfast.envs.gym_thread import GymThread
from hdfast.envs.gym_view import SIGNALS, Maker
from hdfast.runtime.errors import ConfigError, EnvError, HdfastError, suggest
from hdfast.suites import Task, UnknownName


def find(env_id: str) -> EnvSpec:
    """What is registered under `env_id`, its module imported.

    Raises UnknownName, listing the nearest, where there is no such module or environment; MissingLibraryError where
    the module imports a missing package; EnvError for what it raises.
    """
    module, _, name = env_id.rpartition(":")
    _draw_without_display()
    before = set(gymnasium.registry)
    if module:
        with env_errors(module):
            try:
                importlib.import_module(module)
            except ModuleNotFoundError as error:
                if error.name is None or not f"{module}.".startswith(f"{error.name}."):
                    raise
                package = module.partition(".")[0]
                hint = f"install it, or start from the folder that holds {package}.py or {package}/"
                if error.name == module and module.endswith(".py"):  # the part before .py exists
                    hint = f"leave out .py: {module.removesuffix('.py')}:{name}"
                raise UnknownName(f"no module {error.name!r} to import for {env_id}", hint=hint) from error
    try:
        return gymnasium.spec(name)
    except gymnasium.error.Error:
        hint = _nearest(module, name, before)
        raise UnknownName(f"no environment {name!r} is registered with gymnasium{hint}") from None


def _nearest(module: str, name: str, before: Set[str]) -> str:
    """What may have been meant by `name`, of the environments of its module if it has one."""
    if not module:
        hint = suggest(name, gymnasium.registry)
        names = "ale_py:ALE/Pong-v5 or my_envs:Maze-v0"
        others = f"; those of a package are named with its module before a colon, such as {names}"
        return (hint if "did you mean" in hint else "") + others

    def package(spec: EnvSpec) -> str:
        made = spec.entry_point or spec.vector_entry_point
        origin = made if isinstance(made, str) else getattr(made, "__module__", "")
        return re.split("[.:]", origin)[0]

    top = module.partition(".")[0]
    theirs = [one for one, spec in gymnasium.registry.items() if package(spec) == top or one not in before]
    if not theirs:
        return f"; importing {module} registers none"
    return re.sub(r"'(.+?)'", rf"'{module}:\1'", suggest(name, theirs))  # so that it can be given as it is


def _draw_without_display() -> None:
    """Lets the package mujoco draw through EGL where there is no display, for which it would look in vain."""
    if os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY") or "MUJOCO_GL" in os.environ:
        return
    with contextlib.suppress(OSError):
        ctypes.CDLL("libEGL.so.1")
        os.environ["MUJOCO_GL"] = "egl"


class GymEnv(BatchEnv):
    """Environments of one id.

    Several are stepped in a process each, or with `threads` 1 in this process; in either case while the learner
    works. obs: `image`, `state` (the vectors), `both`, or `auto`: image where one is observed, else state.
    image_size, kwargs, time_limit: as `hdfast.envs.make`.

    stop: called while waiting for them. If they do not answer within GRACE_SECONDS of its first raising, whoever waits
    raises the same, and close() kills them.

    Raises UnknownName; MissingLibraryError where a package that the environment needs is missing; ConfigError for
    observations or actions that the agent cannot take, with what would be right, for arguments that the environment
    does not take, and for a script that keeps processes from starting; EnvError, also later, for what an environment
    raises, for numbers that are not finite, and where its process dies.
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
        obs: str = "auto",
        image_size: int = 64,
        kwargs: str = "{}",
        time_limit: int = 0,
        stop: Callable[[], object] = lambda: None,
    ) -> None:
        self.name = task.name
        self._seeds: list[int | None] | None = list(env_seeds(seed, num_envs))
        spec, module = find(task.env_id), task.env_id.rpartition(":")[0]
        make = Maker(spec, obs, image_size, kwargs, time_limit, os.getpid(), module=module)
        kind: type[AsyncVectorEnv | SyncVectorEnv] = (
            AsyncVectorEnv if num_envs > 1 and threads != 1 else SyncVectorEnv
        )
        self._vector = kind.__new__(kind)  # its processes are known while it is being made
        self._stop, self._thread = stop, GymThread(stop)
        # Also called if this is garbage, or still open when Python exits, which would wait for ever.
        self._kill = Finalize(self, _kill, (self._vector, self._thread), exitpriority=0)
        self._broken = self._made = False
        try:
            self._result(self._thread.submit(partial(_make, self._vector, make, num_envs)))
        except BaseException:
            self._kill()
            raise
        self._made = True
        seen: Any = self._vector.single_observation_space
        super().__init__(
            task.name,
            num_envs=num_envs,
            obs_specs={key: ArraySpec(space.shape, space.dtype) for key, space in seen.items()},
            actions=actions_of(self._vector.single_action_space, task.name),
            action_repeat=action_repeat,
        )
        self._over = np.zeros(num_envs, bool)
        self._tells_success = False  # some report it only at the end of an episode
        self._answer: Future[tuple[Any, ...]]

    def _reset(self) -> EnvStep:
        obs, _ = self._result(self._thread.submit(partial(self._vector.reset, seed=self._seeds)))
        self._seeds = None  # a later reset goes on with what they have drawn
        zero, never = np.zeros(self.num_envs, np.float32), np.zeros(self.num_envs, bool)
        return self._row(obs, zero, never, never, {}, is_first=~never)

    def _send(self, action: np.ndarray) -> None:
        self._answer = self._thread.submit(partial(self._vector.step, self._theirs(action)))

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

    def row_of(self, observation: Any) -> dict[str, np.ndarray]:
        """As `BatchEnv.row_of`, for an observation in the environment's own space, or the frame where it is drawn.

        Raises EnvError where the observation is none of that space, ValueError for environments in other processes.
        """
        if not isinstance(self._vector, SyncVectorEnv):
            raise ValueError(f"{self.name}: its environments are in processes of their own; take one alone")
        with env_errors(self.name):
            seen: Any = self._vector.envs[0]
            return {key: array[None] for key, array in seen.row_of(observation).items()}

    def own_action(self, action: np.ndarray) -> Any:
        first = self._theirs(action[:1])[0]
        return int(first) if isinstance(self._vector.single_action_space, spaces.Discrete) else first

    def _theirs(self, action: np.ndarray) -> np.ndarray:
        """Actions (N,) or (N, size) in [-1, 1] as the environment counts or scales them."""
        space: Any = self._vector.single_action_space
        if (choices := choices_of(space)) is not None:
            numbers = np.stack(np.unravel_index(action, choices), -1).reshape(len(action), *space.shape)
            return (numbers + getattr(space, "start", 0)).astype(space.dtype)
        middle, reach = space.high / 2 + space.low / 2, space.high / 2 - space.low / 2
        stretched = middle + reach * action.reshape(len(action), *space.shape)
        return np.clip(stretched, space.low, space.high).astype(space.dtype)

    def _result(self, answer: Future[Any]) -> Any:
        self._thread.wait(answer)
        try:
            return answer.result()
        except HdfastError as error:
            # gymnasium wraps the error that a process sent in another of the same type
            raise error.what if isinstance(error.what, HdfastError) else error from error.__cause__
        except (EOFError, ConnectionError) as error:
            if isinstance(self._vector, SyncVectorEnv):
                raise
            self._broken = True
            self._stop()  # the signal that ended the process may have been sent to all
            if not self._made and _script_imported(self._vector):
                what = f"the processes of its environments do not begin ({error!r})"
                hint = "a script calls hdfast below `if __name__ == '__main__':`, or with --env.threads 1"
                raise ConfigError(what, where=self.name, hint=hint) from None
            hint = "with --env.threads 1 all are in one process, which may tell more"
            how = _how_it_ended(self._vector) or repr(error)
            raise EnvError(
                f"the process of an environment has ended ({how})", where=self.name, hint=hint
            ) from error

    def _close(self) -> None:
        try:
            if not self._broken:
                closing = self._thread.submit(self._vector.close)
                # a process ended unasked, or hangs
                with contextlib.suppress(EOFError, ConnectionError, TimeoutError):
                    self._thread.wait(closing, last=True)
                    closing.result()
        finally:
            self._kill()


def _make(vector: SyncVectorEnv | AsyncVectorEnv, make: Maker, num_envs: int) -> None:
    """Makes N environments that reset at the step after an episode's last."""
    makers = [make, *[dataclasses.replace(make, quiet=True)] * (num_envs - 1)]
    if isinstance(vector, SyncVectorEnv):
        SyncVectorEnv.__init__(vector, makers, autoreset_mode=AutoresetMode.NEXT_STEP)
        return
    warnings.filterwarnings("ignore", r"\x1b\[31mERROR: ")  # gymnasium's, about an error that it then raises
    _start_server()
    AsyncVectorEnv.__init__(vector, makers, autoreset_mode=AutoresetMode.NEXT_STEP, context="forkserver")


def _how_it_ended(vector: AsyncVectorEnv) -> str:
    """The signal or exit code that ended the first failed process; empty if none failed."""
    for code in filter(None, _exit_codes(vector)):
        return f"exit code {code}" if code > 0 else f"killed by signal {-code}, {signal.strsignal(-code)}"
    return ""


def _exit_codes(vector: AsyncVectorEnv) -> list[int | None]:
    """Exit codes of the started processes, None for one still running; one about to end gets a second."""
    begun = [process for process in getattr(vector, "processes", ()) if process.pid]
    connection.wait([process.sentinel for process in begun], 1)
    return [process.exitcode for process in begun]


def _script_imported(vector: AsyncVectorEnv) -> bool:
    """Whether a script started this, and its processes, or the fork server, may have failed to import it."""
    main = sys.modules["__main__"]
    codes = _exit_codes(vector)
    ended = not codes or 1 in codes
    return ended and main.__spec__ is None and hasattr(main, "__file__")


def _start_server() -> None:
    """Starts the server that forks the processes. It blocks the terminal's signals until `Maker` ignores them.

    A fork of this process would take torch's threads and CUDA along. Forks of a small server do not, and share one
    torch instead of loading it each, because the server imports the main module of this process (`hdfast.train`).
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload(["__main__", "torch"])
    resource_tracker.ensure_running()  # started later, it would unblock the signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # in this thread: the learner's gets them
    try:
        with clear_mpi_env_vars():  # as gymnasium starts its processes
            forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _kill(vector: SyncVectorEnv | AsyncVectorEnv, thread: GymThread) -> None:
    """Kills the remaining environments without asking them, except one that hangs in this process."""
    vector.closed = True  # its own close() would wait for their answers
    for process in getattr(vector, "processes", ()):
        if process.pid is not None:
            process.kill()
            process.join()
    thread.end()
