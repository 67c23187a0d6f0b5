"""`python -m hdfast`: which doors there are."""

import sys

DOORS = {
    "train": "trains the tasks of a suite",
    "evaluate": "plays the newest checkpoint of a run",
    "report": "prints the tables of finished runs",
    "sweep": "trains several tasks and seeds at a time",
    "profile": "shows where the time of an update goes",
    "tune": "finds the fastest kernels for a model on this machine",
}


def main() -> None:
    lines = [f"  python -m hdfast.{name:<9} {what}" for name, what in DOORS.items()]
    sys.stdout.write("\n".join(["Each tells its flags with --help.", *lines]) + "\n")


if __name__ == "__main__":
    main()
