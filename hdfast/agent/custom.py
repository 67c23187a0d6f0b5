"""`--learner module:Class`: a learner of your own, a subclass of `Learner`, in place of it."""

import dataclasses
import hashlib
import importlib
import inspect
import json
import traceback
from pathlib import Path
from typing import Any

from hdfast.agent.learner import Learner
from hdfast.agent.optimizer import Adam
from hdfast.config import Config, json_text
from hdfast.runtime.errors import ConfigError, MissingLibraryError, RunError, suggest

FLAG = "--learner"


def learner_class(config: Config) -> type[Learner]:
    """The class that `config.learner` names, or Learner.

    Raises: ConfigError where there is no such module or class, it is no subclass of Learner, or it has another `update`
    or `step`; MissingLibraryError where its module imports a missing package; RunError for what its module raises.
    """
    if config.learner is None:
        return Learner
    where = f"{FLAG} {config.learner}"
    module, _, name = config.learner.partition(":")
    if not module or not name:
        raise ConfigError(
            "expected a module and a class in it", where=where, hint="such as my_agent:MyLearner"
        )
    if module.endswith(".py") or not all(part.isidentifier() for part in module.split(".")):
        stem = Path(module).name.removesuffix(".py")
        raise ConfigError(
            "expected the name of a module, not a path", where=where, hint=f"such as {stem}:{name}"
        )
    try:
        found = vars(importlib.import_module(module))
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if not f"{module}.".startswith(f"{missing}."):
            raise MissingLibraryError(f"{module} needs {missing}", where=where, hint="install it") from error
        package = module.partition(".")[0]
        hint = f"install it, or start from the folder that holds {package}.py or {package}/"
        raise ConfigError(f"there is no module {missing!r}", where=where, hint=hint) from error
    except (Exception, SystemExit) as error:
        raise RunError(
            f"importing {module} raised {_said(error)}", where=where, details=_frames(error)
        ) from error
    known = {key: one for key, one in found.items() if isinstance(one, type) and issubclass(one, Learner)}
    if name not in known:
        what = (
            f"{name} is no subclass of hdfast.agent.learner.Learner"
            if name in found
            else f"no class {name!r}"
        )
        others = [key for key, one in known.items() if one is not Learner]
        raise ConfigError(f"{what} in {module}", where=where, hint=suggest(name, others))
    for method in ("update", "step"):  # not called by every way in which a run updates
        if getattr(known[name], method) is not getattr(Learner, method):
            hint = "override learn_model and learn_behavior, the halves of a step"
            raise ConfigError(
                f"{name} overrides {method}, which training may not call", where=where, hint=hint
            )
    return known[name]


def with_options(config: Config) -> Config:
    """`config` with a value for each of the options that its learner has.

    Raises: as `learner_class`. ConfigError for an option that the learner does not have, or of another type.
    """
    kind, given = learner_class(config), config.options
    known = _defaults(kind)
    for name, value in given.items():
        where = f"--learner-options {json_text({name: value})}"
        if name not in known:
            raise ConfigError(f"{kind.__name__} has no option {name!r}{suggest(name, known)}", where=where)
        default = known[name]
        if type(default) is float and type(value) is int:
            given[name] = float(value)
        elif default is not None and type(value) is not type(default):
            hint = f"expected {type(default).__name__}, such as {default!r}"
            raise ConfigError(f"{name} is {value!r}", where=where, hint=hint)
    return dataclasses.replace(config, learner_options=json_text({**known, **given}))


def options_of_run(config: Config, saved: str) -> str:
    """The options of `config`, or `saved`, those that a run began with, if all that is new has its default.

    Raises: as `learner_class`.
    """
    began = {**_defaults(learner_class(config)), **json.loads(saved)}
    return saved if began == config.options else config.learner_options


def _defaults(kind: type[Learner]) -> dict[str, Any]:
    """A learner's options as JSON has them. Raises: ConfigError where it cannot."""
    try:
        return json.loads(json_text(dict(kind.options)))
    except TypeError as error:
        what = f"{kind.__name__}.options: {error}"
        raise ConfigError(what, where=FLAG, hint="JSON's types can be options") from error


def check_optimizers(learner: Learner) -> None:
    """Raises: ConfigError for an entry of `optimizers` that is no Adam, or learns what would not be saved."""
    saved = {id(parameter) for _, module in learner.modules() for parameter in module.parameters()}
    for name, optimizer in learner.optimizers.items():
        where = f"{type(learner).__name__}.optimizers[{name!r}]"
        if not isinstance(optimizer, Adam):
            hint = "hdfast.agent.optimizer.Adam, or a subclass of it with another step"
            raise ConfigError(f"it is of type {type(optimizer).__name__}, expected {hint}", where=where)
        if any(id(parameter) not in saved for parameter in optimizer.parameters):
            hint = "put them into an nn.Module that is an attribute of the learner"
            raise ConfigError("it learns parameters that would not be saved", where=where, hint=hint)


def source_of(config: Config) -> str | None:
    """The learner's name and a digest of its file; None for hdfast's own. Raises: as `learner_class`."""
    if config.learner is None:
        return None
    file = inspect.getsourcefile(learner_class(config))
    content = Path(file).read_bytes() if file is not None else b""
    return f"{config.learner} {hashlib.sha256(content).hexdigest()[:16]}"


def _said(error: BaseException) -> str:
    return ": ".join(filter(None, (type(error).__name__, str(error).strip())))


def _frames(error: BaseException) -> list[str]:
    """The lines that led to it, but for those of the import system."""
    own = (Path(__file__), Path(importlib.__file__))
    return [
        f"{frame.filename}:{frame.lineno} in {frame.name}: {frame.line}"
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith("<frozen ") and Path(frame.filename) not in own
    ]
