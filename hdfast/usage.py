"""`--help`: every flag on one line, beside the default that the chosen suite and size give it."""

import ast
import dataclasses
import inspect
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args, get_origin

_COLUMN = 37  # where descriptions begin


def usage(config: Any, prog: str, others: Mapping[str, str]) -> str:
    """The flags that fill a nested dataclass, described by its docstrings, after other flags and their descriptions.

    config: an instance; its values are shown as the defaults.
    """
    head = f"usage: {prog} [--flag VALUE ...]\n\n{inspect.getdoc(type(config))}\n"
    notes = "Values shown are the defaults of the suite, size and file on this command line."
    before = [f"  {flag + ' -':<{_COLUMN - 3}} {about}" for flag, about in others.items()]
    return "\n".join([head + notes, *before, *_section(config, "")])


def _section(config: Any, prefix: str) -> Iterator[str]:
    about = _docstrings(type(config))
    nested = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            nested.append((field.name, value))
            continue
        name, shown = field.name.replace("_", "-"), value
        if isinstance(value, bool):
            name, shown = f"[no-]{name}", "yes" if value else "no"
        flag = f"  --{prefix}{name} {'-' if shown is None else shown}"
        choices = get_args(field.type) if get_origin(field.type) is Literal else ()
        text = [about.get(field.name, ""), f"One of {', '.join(choices)}." if choices else ""]
        yield f"{flag:<{_COLUMN - 1}} {' '.join(filter(None, text))}".rstrip()
    for name, value in nested:
        yield f"\n{inspect.getdoc(type(value))}"
        yield from _section(value, f"{prefix}{name}.".replace("_", "-"))


def _docstrings(kind: type) -> dict[str, str]:
    """Field name -> the string below it in the source, on one line."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(definition, ast.ClassDef)
    found = {}
    for node, following in zip(definition.body, definition.body[1:], strict=False):
        match node, following:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                found[name] = " ".join(text.split())
    return found
