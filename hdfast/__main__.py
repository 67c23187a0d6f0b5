"""`python -m hdfast`: lists the commands."""

import difflib
import sys

import hdfast
from hdfast.runtime import entry
from hdfast.runtime.errors import ConfigError

DOORS = {
    "train": "trains the tasks of a suite",
    "evaluate": "plays the newest checkpoint of a run, or another",
    "report": "prints the tables of finished runs",
    "sweep": "trains several tasks and seeds at a time",
    "profile": "shows where the time of an update goes",
    "tune": "finds the fastest kernels for a model on this machine",
}


def main() -> None:
    argument = next(iter(sys.argv[1:]), "--help")
    if argument == "--version":
        sys.stdout.write(f"hdfast {hdfast.__version__}\n")
        return
    if argument not in ("-h", "--help"):
        near = difflib.get_close_matches(argument, DOORS, n=1)
        hint = f"did you mean python -m hdfast.{near[0]}?" if near else "python -m hdfast lists the commands"
        raise ConfigError(f"python -m hdfast takes no argument {argument!r}", hint=hint)
    lines = [f"  python -m hdfast.{name:<9} {what}" for name, what in DOORS.items()]
    sys.stdout.write("\n".join(["Each command lists its flags with --help.", *lines]) + "\n")


if __name__ == "__main__":
    entry.main(main)
