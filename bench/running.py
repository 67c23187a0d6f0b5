"""A run of the real loop (act, store, learn, log) that goes on by as many agent steps as it is asked to."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from bench.agent import backend
from hdfast import suites
from hdfast.config import Config, default_config, validate
from hdfast.overrides import apply_overrides
from hdfast.runtime.device import resolve_device
from hdfast.runtime.rundir import RunDir
from hdfast.runtime.signals import StopRequest
from hdfast.session import Session

# Evaluation, videos and checkpoints are left out: a run spends little time on them.
SELDOM = {
    "eval": {"every": 0},
    "log": {"video_every": 0, "tensorboard": False},
    "checkpoint": {"seconds": 1e9},
}


def config_of(suite: str, task: str, logdir: Path, prefill: int) -> Config:
    """The suite's own configuration with a prefill of `prefill`, without what a run does seldom, and without tuning.

    What tuning found would depend on this machine's past, and would stay in force for all later benchmarks.
    """
    graph = (
        "on" if resolve_device("auto").type == "cuda" else "auto"
    )  # what tuning nearly always chooses on CUDA
    train = {"prefill": prefill, "tune": False, "graph": graph}
    config = apply_overrides(default_config(suite), {**SELDOM, "train": train})
    return validate(apply_overrides(config, {"task": task, "logdir": logdir}))


@contextlib.contextmanager
def sessions(configs: Sequence[tuple[Config, str | None]]) -> Iterator[list[Callable[[int], None]]]:
    """A new run for each configuration and backend (None: the default), as a function that takes agent steps.

    Raises: HdfastError, as a run of the configuration would.
    """

    def going(session: Session, name: str | None) -> Callable[[int], None]:
        def go(agent_steps: int) -> None:
            with backend(name):
                session.train(session.agent_steps + agent_steps)

        return go

    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(StopRequest())
        functions = []
        for config, name in configs:
            suite = suites.get(config.suite)
            rundir = stack.enter_context(
                RunDir.open(config.logdir, config.suite, config.task, config.seed, config.to_dict())
            )
            session = Session(config, suite, suite.task(config.task), rundir, resolve_device("auto"), stop)
            functions.append(going(stack.enter_context(session), name))
        yield functions
