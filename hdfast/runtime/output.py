"""Output that stdout or stderr cannot take harms no run: dropped if closed, in ASCII if a character is lacking."""

import codecs
import os
import sys

ERRORS = "hdfast"  # name of the handler of characters that an encoding lacks
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
    """From now on, no character raises an encoding error on stdout or stderr of this process.

    A closed one leads nowhere; its number is taken, so that a library's output cannot end up in a file of a run.
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
