"""One run, from wherever the last session of it ended to its end: which directory, which device, which signals."""

import dataclasses
import multiprocessing
import os
import sys
from pathlib import Path
from typing import Any

from hdfast import envs
from hdfast.agent.custom import options_of_run, with_options
from hdfast.agent.world_model import LossError
from hdfast.config import GROWING, RESUMABLE_CHANGES, Config, check_no_dry_run, validate, with_defaults
from hdfast.runtime.console import say
from hdfast.runtime.device import describe_device, ready_device
from hdfast.runtime.errors import ConfigError, disk_errors, warn
from hdfast.runtime.logger import OnLine
from hdfast.runtime.record import has_begun, path_of, read
from hdfast.runtime.rundir import RunDir
from hdfast.runtime.signals import StopRequest
from hdfast.session import Session
from hdfast.suites import get


def run(config: Config, *, on_line: OnLine = lambda file, line: None) -> dict[str, Any]:
    """Trains one task with one seed (`config.seed`) to its end, or goes on with it; returns its last evaluation.

    The task may be left out where the suite has one. A finished run is not touched: its saved summary is returned.
    On the CPU this process gets as many threads as the model gains from, and keeps the memory that it frees, see
    `hdfast.runtime.device.prepare_device`.

    on_line gets every line of metrics.jsonl and scores.jsonl, as `on_line("metrics", {"agent_steps": 500, ...})`. What
    it raises ends the run, with a checkpoint. After a kill the lines since the last checkpoint come again.

    A script must call it below `if __name__ == "__main__":`, because processes of gymnasium environments import it.

    Raises:
        HdfastError: see `hdfast.runtime.errors`; what was learnt until then is saved.
        ConfigError: also for losses of a learner of one's own that cannot be added. Nothing is saved then, so that a
            run that has learnt nothing can begin anew with its learner mended.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        sys.excepthook = lambda kind, error, trace: sys.stderr.write(f"error: {error}\n")
        raise ConfigError(
            "a run begins where a process of its environments imports the script",
            hint='write `if __name__ == "__main__":` before what the script does',
        )
    check_no_dry_run(config)
    config = validate(config)
    suite = get(config.suite)
    task, *more = config.tasks
    if more:
        raise ConfigError(f"a run is of one task, and {suite.name} has {1 + len(more)}", where="--task")
    config = dataclasses.replace(config, task=task.name)
    device = ready_device(config.device, config.little_work, config.train.graph)
    envs.check(config.suite, task.name)  # before a mistyped name becomes a directory
    config = with_options(config)
    config = as_begun(config, path_of(config.logdir, config.suite, task.folder, config.seed))
    with RunDir.open(
        config.logdir,
        config.suite,
        task.folder,
        config.seed,
        config.to_dict(),
        ignore=RESUMABLE_CHANGES,
        growing=GROWING,
        defaults=Config().to_dict(),
        device=describe_device(device),
    ) as rundir:
        if rundir.summary is not None:
            done = read(rundir.path).config["agent_steps"]
            say(
                f"{rundir.path}: finished already"
                + (f", at agent step {done:,}" if done > config.agent_steps else "")
            )
            return dict(rundir.summary)
        with StopRequest() as stop:
            try:
                session = Session(config, suite, task, rundir, device, stop, on_line)
            except BaseException:
                rundir.discard_unbegun()
                raise
            try:
                with session:
                    return session.run()
            except LossError as error:
                raise ConfigError(str(error), where=f"--learner {config.learner}") from error


def as_begun(config: Config, path: Path) -> Config:
    """`config` with the values that the run in directory `path` began with, if it has begun.

    --env.obs auto becomes what the run saw. --init-from is not read again, so the other run may be gone or renamed; the
    saved value is kept, and another on the command line draws a warning.
    """
    with disk_errors(path, "use the run's directory", hint="choose another --logdir"):
        begun = (path / "config.json").exists() and has_begun(path)
    if not begun:
        return config
    saved = with_defaults(read(path).config)
    match saved["env"]:
        case {"obs": "image" | "state" | "both" as obs} if config.env.obs == "auto":
            config = dataclasses.replace(config, env=dataclasses.replace(config.env, obs=obs))
    if config.learner is not None and saved["learner"] == config.learner:
        config = dataclasses.replace(config, learner_options=options_of_run(config, saved["learner_options"]))
    match saved["init_from"]:
        case None | str() as start:
            if config.init_from is not None and not _same_place(config.init_from, start):
                unread = f"goes on from its checkpoint, without --init-from {config.init_from}"
                own = "parameters of its own" if start is None else f"those of {start}"
                warn(f"{path}: {unread}; it began with {own}")
            config = dataclasses.replace(config, init_from=start)
    return config


def _same_place(run: str, other: str | None) -> bool:
    """Whether two names, of directories that need not exist, mean the same one."""
    return (
        other is not None and len({os.path.realpath(os.path.expanduser(name)) for name in (run, other)}) == 1
    )
