"""Fields of a nested dataclass replaced by those of a nested dict, and the range that a number may have."""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from hdfast.runtime.errors import ConfigError, suggest


@dataclass(frozen=True)
class Range:
    """The range of a number, both ends included: ``Annotated[int, Range(1, 64)]``."""

    low: float
    high: float


def ranges(kind: Any, prefix: str = "") -> Iterator[tuple[str, Range]]:
    """Dotted name and range of every field of a dataclass that has one, nested ones included."""
    for name, hint in get_type_hints(kind, include_extras=True).items():
        if dataclasses.is_dataclass(hint):
            yield from ranges(hint, f"{prefix}{name}.")
        elif get_origin(hint) is Annotated:
            yield from ((prefix + name, one) for one in hint.__metadata__ if isinstance(one, Range))


def check_ranges(config: Any) -> None:
    """Raises: ConfigError naming the flag of a number out of its range, its value and the range."""
    for name, right in ranges(type(config)):
        value = config
        for part in name.split("."):
            value = getattr(value, part)
        if not right.low <= value <= right.high:
            flag = "--" + name.replace("_", "-")
            raise ConfigError(f"{flag} {value} is out of range: expected {right.low:,} to {right.high:,}")


def apply_overrides(config: Any, overrides: Mapping[str, Any], where: str = "config") -> Any:
    """Returns `config` with a nested dict of fields replaced, such as another config's `to_dict`.

    Raises: ConfigError on an unknown field, TypeError on a value that is not of the field's type.
    """
    kinds = get_type_hints(type(config))
    changes = {}
    for key, value in overrides.items():
        if key not in kinds:
            section, dot, inner = key.partition(".")
            hint = (
                f'; expected {{"{section}": {{"{inner}": ...}}}}'
                if dot and section in kinds
                else suggest(key, kinds)
            )
            raise ConfigError(f"{where} has no field {key!r}{hint}")
        nested = dataclasses.is_dataclass(kinds[key]) and isinstance(value, dict)
        name = f"{where}.{key}"
        changes[key] = (
            apply_overrides(getattr(config, key), value, name) if nested else _typed(value, kinds[key], name)
        )
    return dataclasses.replace(config, **changes)


def _typed(value: Any, kind: Any, name: str) -> Any:
    """`value` as a flag of this type would give it. Raises: TypeError."""
    if get_origin(kind) is Literal:
        if isinstance(value, bool) and "on" in get_args(kind):  # as saved before there was a third choice
            value = "on" if value else "off"
        right = value in get_args(kind)
    else:
        if kind is int and isinstance(value, float) and value.is_integer():  # 1e5
            value = int(value)
        also = {float: int, Path: str}.get(kind, kind)  # in JSON, and 64 where a float belongs is 64.0
        right = isinstance(value, kind | also) and (kind is bool or not isinstance(value, bool))
    if not right:
        raise TypeError(f"{name} cannot be {value!r:.50}{_right(value, kind)}")
    return kind(value) if kind in (float, Path) else value


def _right(value: Any, kind: Any) -> str:
    """What would be right in place of `value`, as the end of a message."""
    if get_origin(kind) is Literal:
        return suggest(str(value), get_args(kind))
    names = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "a string",
        Path: "a string",
    }
    return f"; expected {names.get(kind, 'a string or null' if get_args(kind) else 'an object of fields')}"
