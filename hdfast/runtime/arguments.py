"""The flags of the small doors: argparse whose errors are one line, with the nearest right name."""

import argparse
import contextlib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from hdfast.runtime.errors import ConfigError, suggest


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Tells what the default is, but not that there is none."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return super()._get_help_string(action) if action.default not in (None, False, ()) else action.help


class Arguments(argparse.ArgumentParser):
    """An ArgumentParser that raises ConfigError where argparse would print its usage and exit."""

    def __init__(self, prog: str, description: str | None) -> None:
        super().__init__(
            prog=prog,
            description=description,
            allow_abbrev=False,
            formatter_class=_Help,
        )

    def parse_args(self, args: Sequence[str] | None = None) -> argparse.Namespace:  # type: ignore[override]
        """The flags in `args`, by default those of the command line. Raises: ConfigError."""
        parsed, unknown = self.parse_known_args(args)
        if unknown:
            name = unknown[0].partition("=")[0]
            known = [flag for flag in self._option_string_actions if flag.startswith("--")]
            if name.startswith("-"):
                raise ConfigError(f"there is no option {name}{suggest(name, known)}")
            folder = "--logdir" in known and os.path.isdir(name)  # no error for a long text
            hint = f"did you mean --logdir {name}?" if folder else "a value comes after its --flag"
            raise ConfigError(f"there is no argument {name}", hint=hint)
        return parsed

    def own(self) -> dict[str, str]:
        """The help of each flag, for a parser of other flags that suggests the nearest in place of a wrong one."""
        flags = self._option_string_actions.items()
        return {flag: action.help or "" for flag, action in flags if flag.startswith("--")}

    def error(self, message: str) -> NoReturn:
        """Raises ConfigError."""
        if found := re.fullmatch(r"argument (?:-\w/)?(--\S+): ignored explicit argument (.*)", message):
            raise ConfigError(f"{found[1]} is a switch and takes no value, such as {found[2]}")
        raise ConfigError(message)


def whole_number(text: str) -> int:
    """What int() reads, and whole numbers written like 1e5. Raises int()'s ValueError for all else."""
    try:
        return int(text)
    except ValueError:
        with contextlib.suppress(ValueError):
            if (number := float(text)).is_integer():
                return int(number)
        raise


def positive(text: str) -> int:
    """An integer of at least 1, as the `type` of a flag."""
    return _at_least(1, text)


def natural(text: str) -> int:
    """An integer of at least 0, as the `type` of a flag."""
    return _at_least(0, text)


def given_path(text: str) -> Path:
    """A path that is not empty, its `~` resolved (no shell does that behind `--flag=`), as the `type` of a flag."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty; '.' is the current folder")
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"{text}: there is no such home directory") from None


def _at_least(low: int, text: str) -> int:
    try:
        value = whole_number(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if value < low:
        raise argparse.ArgumentTypeError(f"{value} is out of range: expected {low} or more")
    return value
