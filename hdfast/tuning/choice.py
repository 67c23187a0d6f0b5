"""What was found right and fastest, and where it is remembered: one JSON file for each machine and model.

The folder is $HDFAST_CACHE, or hdfast in $XDG_CACHE_HOME, or ~/.cache/hdfast.
"""

import contextlib
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

import hdfast
import hdfast_kernels
from hdfast.agent.custom import check_optimizers, learner_class, source_of, with_options
from hdfast.agent.learner import Learner
from hdfast.config import Config
from hdfast.envs.base import ArraySpec, ContinuousActions, DiscreteActions
from hdfast.runtime.device import describe_device
from hdfast.runtime.files import plain, utc, write_json
from hdfast_kernels import dispatch

POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Choice:
    """How a run computes, not what.

    ops: backend by op, all others on their definition; None for the defaults of the device.
    graph: whether update and acting are CUDA graphs. report: what was tried and measured, in JSON's types.
    overlap: whether halves of two updates run beside each other in a graph.
    """

    ops: Mapping[str, str] | None = None
    graph: bool = False
    report: Mapping[str, Any] = field(default_factory=dict)
    overlap: bool = False

    def use(self, device: torch.device) -> dict[str, str]:
        """Applies the choice to the ops of this process on this type of device; returns the defaults it replaces.

        If HDFAST_BACKEND is set, ops without that backend run on their defaults.
        """
        return dispatch.use(device.type, None if os.environ.get("HDFAST_BACKEND") else self.ops)


@dataclass(frozen=True)
class Job:
    """What is to be computed: a run's updates and actions on this machine.

    obs_specs, actions: what the environment shows and accepts. config, dtype: of the run. device: where it learns.
    """

    obs_specs: Mapping[str, ArraySpec]
    actions: DiscreteActions | ContinuousActions
    config: Config
    device: torch.device
    dtype: torch.dtype

    @cached_property
    def key(self) -> dict[str, Any]:
        """All that a choice depends on: the machine, the versions of what runs on it, the shapes of the run."""
        about = describe_device(self.device)
        about.pop("device")
        config, seen = self.config, sorted(self.obs_specs.items())
        return plain(
            {
                "device": about,
                "torch": torch.__version__,
                "triton": _version("triton"),
                "hdfast": hdfast.__version__,
                "source": _source(),
                "dtype": str(self.dtype).removeprefix("torch."),
                "observations": {name: [list(spec.shape), str(spec.dtype)] for name, spec in seen},
                "actions": type(self.actions).__name__,  # their number does not affect speed
                "config": {
                    name: asdict(getattr(config, name)) for name in ("rssm", "network", "harmony", "loss")
                },
                "batch": config.replay.batch,
                "length": config.replay.length,
                "horizon": config.behavior.horizon,
                "actor_grad": config.behavior.actor_grad,
                "learner": source_of(config),
                "options": with_options(config).options,
                "graphs": config.train.graph != "off",
                "forced": os.environ.get("HDFAST_BACKEND") or None,
            }
        )

    def learner(self, seed: int = 0) -> Learner:
        """A new learner of the run's class; seed: decides its parameters and what it draws. Raises: HdfastError."""
        seen, config = (self.obs_specs, self.actions), with_options(self.config)
        with torch.random.fork_rng(devices=[]):  # for what a subclass makes beside the model and the behavior
            torch.manual_seed(seed + 1)
            learner = learner_class(config)(*seen, config, device=self.device, dtype=self.dtype, seed=seed)
        check_optimizers(learner)
        return learner


def path_of(key: Mapping[str, Any]) -> Path:
    """The file that remembers the choice for a key."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return _folder() / f"choice-{digest[:16]}.json"


def remembered(key: Mapping[str, Any]) -> Choice | None:
    """The choice for a key, None if there is none that can be read."""
    try:
        found = json.loads(path_of(key).read_bytes())
        choice = Choice(found["ops"], found["graph"], found["report"], found["overlap"])
        known = all(backend in dispatch.BACKENDS for backend in (choice.ops or {}).values())
        fits = found["key"] == key and known and set(choice.ops or {}) <= set(dispatch.ops())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return choice if fits and {type(choice.graph), type(choice.overlap)} == {bool} else None


def remember(key: Mapping[str, Any], choice: Choice) -> Path | None:
    """Keeps a choice and returns its file, None where nothing can be kept."""
    path = path_of(key)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        found = {name: getattr(choice, name) for name in ("ops", "graph", "overlap", "report")}
        write_json(path, {**found, "key": key, "time": utc()})
    except OSError:
        return None
    return path


@contextlib.contextmanager
def alone(
    key: Mapping[str, Any], check: Callable[[], None], waits: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """One process at a time for a key, where the folder can be written to.

    check: called while another process holds it; what it raises ends the wait. waits: called once before that.

    The runs of a sweep begin together. So the first one searches, undisturbed, and the others read what it found.
    """
    path = path_of(key).with_suffix(".lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError:
        yield
        return
    try:
        told = False
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not told:
                    waits()
                    told = True
                check()
                time.sleep(POLL_SECONDS)
            except OSError:  # a file system without locks
                break
        yield
    finally:
        os.close(descriptor)


def _folder() -> Path:
    if own := os.environ.get("HDFAST_CACHE"):
        return Path(own)
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path(os.path.expanduser("~")) / ".cache") / "hdfast"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _source() -> str:
    """A digest of the kernels, the agent that calls them and the code that tries them: edits call for new trials."""
    digest, home = hashlib.sha256(), Path(hdfast.__file__).parent
    folders = [Path(hdfast_kernels.__file__).parent, home / "agent", home / "tuning"]
    files = [home / "runtime" / "graphs.py", *(path for folder in folders for path in folder.glob("*.py"))]
    if (built := importlib.util.find_spec("hdfast_kernels._native")) is not None and built.origin:
        files.append(Path(built.origin))
    for path in sorted(files):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]
