"""`--config FILE`: the fields of a configuration from a JSON file, such as the config.json of a run."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hdfast.runtime.errors import ConfigError

FLAG = "--config"
ABOUT = "A run, or a JSON file such as its config.json, whose configuration the flags beside it change."
_OF_ONE_CALL = ("seeds", "dry_run")  # what a command line asked for, not what a run is


def split(argv: Sequence[str]) -> tuple[list[str], Path | None]:
    """`argv` without `--config FILE`, and the file; of several the last.

    Raises: ConfigError where no file stands behind it.
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
    """The nested fields in a file: of `{"config": {...}}`, as a run and --dry-run write it, or of the object itself.

    A directory stands for its config.json.

    Raises: ConfigError where there is no such file, or no object in it.
    """
    where = f"{FLAG} {path}"
    try:
        path = path.expanduser()
        content = json.loads((path / "config.json" if path.is_dir() else path).read_bytes())
    except OSError as error:
        raise ConfigError(f"it cannot be read: {error.strerror}", where=where) from None
    except (ValueError, RuntimeError) as error:  # no JSON, no such home directory
        raise ConfigError(f"it cannot be read: {error}", where=where) from None
    fields = content.get("config", content) if isinstance(content, dict) else content
    if not isinstance(fields, dict):
        raise ConfigError(f"it holds {fields!r:.50}, right is an object of fields", where=where)
    return {name: value for name, value in fields.items() if name not in _OF_ONE_CALL}
