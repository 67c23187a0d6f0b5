"""`--vary rssm.deter=128,256`: every combination of the values of some flags, each with a folder of its own."""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

from hdfast.config import Config
from hdfast.flags import field_names
from hdfast.runtime.errors import ConfigError, suggest

FLAG = "--vary"
# What else decides where runs lie, and what to do instead.
_NOT = {
    "suite": "sweep one suite at a time",
    "task": "--tasks names several",
    "seed": "--seeds trains several",
    "seeds": "--seeds trains several",
    "logdir": "every variant has a folder of its own below it",
    "dry_run": "a sweep has none",
}


@dataclass(frozen=True)
class Variant:
    """One combination: the name of its folder, such as "rssm.deter=128,harmony.mode=off", and its flags."""

    folder: str
    flags: tuple[str, ...]


def variants(given: Sequence[str]) -> list[Variant]:
    """All combinations of what `--vary` was given, the first name varying slowest; one without flags if nothing.

    given: "name=value,value", the name as in a flag of training.

    Raises: ConfigError for what is no such text, a name that is none or cannot vary, or a value given twice.
    """
    axes = [_axis(text) for text in given]
    names = [name for name, _ in axes]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f"{twice[0]} is varied twice", where=FLAG)
    found = []
    for chosen in itertools.product(*(values for _, values in axes)):
        pairs = list(zip(names, chosen, strict=True))
        folder = ",".join(re.sub(r"[^A-Za-z0-9._=+-]", "-", f"{name}={value}") for name, value in pairs)
        found.append(Variant(folder, tuple(flag for pair in pairs for flag in _flags(*pair))))
    folders = [one.folder for one in found]
    if same := [folder for folder in folders if folders.count(folder) > 1]:
        raise ConfigError(f"two variants would be {same[0]}", where=FLAG, hint="is a value given twice?")
    return found


def _axis(text: str) -> tuple[str, list[str]]:
    name, given, values = text.removeprefix("--").replace("-", "_").partition("=")
    values = text.partition("=")[2]  # as it was written
    known = [known for known in field_names(Config()) if known not in _NOT]
    if not given or not all(chosen := _values(values)):
        hint = "such as --vary harmony.mode=learned,off rssm.deter=128,256"
        raise ConfigError(f"expected a flag and its values, got {text!r}", where=FLAG, hint=hint)
    if name in _NOT:
        raise ConfigError(f"{name.replace('_', '-')} cannot vary", where=FLAG, hint=_NOT[name])
    if name not in known:
        flags = [one.replace("_", "-") for one in known]
        raise ConfigError(
            f"{text.partition('=')[0]} is no flag of hdfast.train{suggest(name, flags)}", where=FLAG
        )
    return name.replace("_", "-"), chosen


def _values(text: str) -> list[str]:
    """The text cut at its commas, but not at those inside brackets, as JSON has them."""
    depth, found = 0, [""]
    for sign in text:
        depth += (sign in "[{") - (sign in "]}")
        if sign == "," and depth <= 0:
            found.append("")
        else:
            found[-1] += sign
    return found


def _flags(name: str, value: str) -> tuple[str, ...]:
    """The flags that set a field to a value; a switch is set by true and false."""
    field: object = Config()
    for part in name.replace("-", "_").split("."):
        field = getattr(field, part)
    if not isinstance(field, bool):
        return (f"--{name}", value)
    if value not in ("true", "false"):
        raise ConfigError(f"{name} is a switch: expected true or false, got {value!r}", where=FLAG)
    section, dot, last = name.rpartition(".")
    return (f"--{section}{dot}{'' if value == 'true' else 'no-'}{last}",)
