"""What stdout and stderr cannot take harms no run: dropped where one is closed, in ASCII where it lacks a character."""

import codecs
import os
import sys

ERRORS = "hdfast"  # the name of the handler of what an encoding lacks
_INSTEAD = {"━": "-", "±": "+-", "…": "...", "×": "x"}


def _instead(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    put = [_INSTEAD.get(one) or one.encode("ascii", "backslashreplace").decode() for one in lacking]
    return "".join(put), error.end


codecs.register_error(ERRORS, _instead)


def encodable(text: str, encoding: str) -> str:
    """`text` with ASCII for the characters that an encoding lacks: "+-" for "±", "\\xf6" for "ö"."""
    return text.encode(encoding, ERRORS).decode(encoding)


def prepare() -> None:
    """From now on, whatever is written to stdout and stderr of this process raises for no encoding.

    One that is closed leads nowhere; its number is taken, so that no file of a run gets what a library says there.
    """
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is None:
            _occupy(number)
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (open as long as the process)
        elif getattr(stream, "errors", "") == "strict" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=ERRORS)


def _occupy(number: int) -> None:
    """Opens the null device as that descriptor, for child processes too, unless it is in use."""
    try:
        os.fstat(number)
    except OSError:
        null = os.open(os.devnull, os.O_WRONLY)
        if null == number:
            os.set_inheritable(null, True)
        else:
            os.dup2(null, number)
            os.close(null)
