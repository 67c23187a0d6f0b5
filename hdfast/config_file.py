"""`--config FILE`: the fields of a configuration from a JSON file, such as the config.json of a run."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hdfast.runtime.errors import ConfigError

FLAG = "--config"
ABOUT = "A run, or a JSON file such as its config.json, whose configuration the flags beside it change."
_OF_ONE_CALL = ("seeds", "dry_run")  # what one command asked for, no property of a run


def split(argv: Sequence[str]) -> tuple[list[str], Path | None]:
    """`argv` without `--config FILE`, and the file; the last of several.

    Raises: ConfigError if no file follows the flag.
    """
    left, file, rest = [], None, iter(argv)
    for arg in rest:
        flag, given, value = arg.partition("=")
        if flag != FLAG:
            left.append(arg)
            continue
        value = value if given else next(rest, "")
        if not value or value.startswith("--"):
            raise ConfigError(f"{FLAG} needs a value")
        file = Path(value)
    return left, file


def read(path: Path) -> dict[str, Any]:
    """The nested fields in a file: those of `{"config": {...}}`, as a run and --dry-run write it, or the object's own.

    A directory stands for its config.json.

    Raises: ConfigError if there is no such file, or no object in it, or a directory holds runs instead.
    """
    where = f"{FLAG} {path}"
    try:
        path = path.expanduser()
        if (
            path.is_dir()
            and not (path / "config.json").exists()
            and (runs := sorted(path.glob("**/config.json")))
        ):
            hint = f"try {runs[0].parent}"
            raise ConfigError(f"this is not a run, it holds {len(runs)}", where=where, hint=hint)
        content = json.loads((path / "config.json" if path.is_dir() else path).read_bytes())
    except OSError as error:
        raise ConfigError(f"it cannot be read: {error.strerror}", where=where) from None
    except (ValueError, RuntimeError) as error:  # no JSON, no such home directory
        raise ConfigError(f"it cannot be read: {error}", where=where) from None
    fields = content.get("config", content) if isinstance(content, dict) else content
    if not isinstance(fields, dict):
        raise ConfigError(f"it holds {fields!r:.50}, expected an object of fields", where=where)
    # Objects that flags hold as text, as one would write them there.
    env = fields.get("env")
    if isinstance(env, dict) and isinstance(env.get("kwargs"), dict):
        fields = fields | {"env": env | {"kwargs": json.dumps(env["kwargs"])}}
    if isinstance(fields.get("learner_options"), dict):
        fields = fields | {"learner_options": json.dumps(fields["learner_options"])}
    return {name: value for name, value in fields.items() if name not in _OF_ONE_CALL}
