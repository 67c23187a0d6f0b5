"""The flags that fill a nested dataclass: tyro's parser, with errors worded like all others."""

import contextlib
import dataclasses
import io
import itertools
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from hdfast.runtime.arguments import whole_number
from hdfast.runtime.errors import ConfigError, suggest
from hdfast.usage import usage

T = TypeVar("T")


def parse_flags(argv: Sequence[str], default: T, prog: str, others: Mapping[str, str]) -> T:
    """The dataclass `default` with the fields that the flags in `argv` name, by tyro's parser.

    others: other flags, already taken out of `argv`, with their help.

    Raises:
        ConfigError: tyro's errors as one line, with the nearest right name.
        SystemExit: ``--help``, which is printed.
    """
    import tyro

    flags = [f"--{name.replace('_', '-')}" for name in field_names(default)]
    negated = [_off(flag) for flag in flags]
    for arg in argv:
        name = arg.partition("=")[0].replace("_", "-")
        if name.startswith("--") and name not in (*flags, *negated, "--help"):
            off = [_off(flag) for flag in flags if isinstance(_value_of(flag, default), bool)]
            raise ConfigError(f"there is no option {name}{suggest(name, [*flags, *off, *others])}")
    for arg, value in itertools.pairwise(["-", *argv, "-"]):
        if (arg.startswith("--") and not value) or re.fullmatch("--[^=]+=", arg):
            # Path("") would be the current folder
            raise ConfigError(f"{arg.removesuffix('=')} needs a value, got an empty one")
        if not value:
            raise ConfigError("there is no argument ''")
    if {"-h", "--help"} & set(argv):
        sys.stdout.write(usage(default, prog, others) + "\n")
        raise SystemExit(0)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), _whole_numbers():
            return tyro.cli(type(default), default=default, args=argv, prog=prog)
    except SystemExit:
        # The first paragraph of the box that tyro draws, without its frame.
        lines = [line.strip("│╭╮╰╯─ ") for line in said.getvalue().splitlines()]
        text = " ".join(itertools.takewhile(bool, lines[1:])) or "the command line cannot be parsed"
        raise ConfigError(_of_a_switch(argv, default) or _in_our_words(text)) from None


def _whole_numbers() -> contextlib.AbstractContextManager[Any]:
    """In the block, tyro reads an int by `whole_number`."""
    from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec

    registry = ConstructorRegistry()

    @registry.primitive_rule
    def _(info: Any) -> Any:
        if info.type is not int:
            return None
        return PrimitiveConstructorSpec(
            nargs=1,
            metavar="INT",
            instance_from_str=lambda texts: whole_number(texts[0]),
            is_instance=lambda value: isinstance(value, int),
            str_from_instance=lambda value: [str(value)],
        )

    return registry


def _in_our_words(text: str) -> str:
    """Rewords an error of tyro's parser like all others; an unknown one stays as it is."""
    if found := re.match(r"invalid choice '(.*)' for argument '(--\S+)'. Expected one of \((.*)\)", text):
        value, flag, choices = found.groups()
        named = re.findall(r"'(.*?)'", choices)
        return f"{flag} cannot be {value!r}{suggest(value, named)}"
    if found := re.match(r"Error parsing (--\S+): (invalid literal|could not convert).*: '(.*)'", text):
        flag, problem, value = found.groups()
        return f"{flag}: {value!r} is not a {'whole ' if problem == 'invalid literal' else ''}number"
    if found := re.match(r"Missing value for argument '(--\S+)'", text):
        return f"{found[1]} needs a value"
    if found := re.match(r"Unrecognized options: ([^,]+)", text):
        hint = "a value comes after its --flag, and a switch has none: --dry-run, --no-dry-run"
        return f"there is no argument {found[1].split()[0]!r}; {hint}"
    return text


def _of_a_switch(argv: Sequence[str], default: Any) -> str | None:
    """The message for a switch with a value, which switches do not take."""
    for arg, after in itertools.pairwise([*argv, "-"]):
        flag, given, value = arg.partition("=")
        value = value if given else after
        if flag.startswith("--") and isinstance(_value_of(flag, default), bool) and value[:1] != "-":
            return f"{flag} is a switch and takes no value, such as {value!r}; {_off(flag)} turns it off"
    return None


def _off(flag: str) -> str:
    """What turns a switch off: --log.no-tensorboard."""
    return re.sub(r"([^.-][^.]*)$", r"no-\1", flag.replace("_", "-"))


def _value_of(flag: str, config: Any) -> Any:
    """The field that a flag names, None if there is none."""
    for name in flag.removeprefix("--").replace("-", "_").split("."):
        config = getattr(config, name, None)
    return config


def field_names(config: Any, prefix: str = "") -> list[str]:
    """Dotted names of all fields, nested ones included."""
    names: list[str] = []
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        nested = dataclasses.is_dataclass(value)
        names += field_names(value, f"{prefix}{item.name}.") if nested else [prefix + item.name]
    return names


def peek(argv: Sequence[str], flag: str) -> str | None:
    """The last value given to `flag`, before the full parser knows its defaults."""
    value = None
    for i, arg in enumerate(argv):
        if arg == flag and i + 1 < len(argv):
            value = argv[i + 1]
        elif arg.startswith(flag + "="):
            value = arg.partition("=")[2]
    return value
