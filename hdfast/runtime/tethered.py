"""Becomes a command that gets SIGHUP, which asks a run to save itself and end, when the process that began it is gone.

`python -I tethered.py PARENT COMMAND [ARGUMENT ...]`, PARENT being that process's number. Its death is noticed however
it came, and also if it came before this begins. `nohup` is for terminals, not for this.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # of linux/prctl.h; it outlasts exec


def main(parent: str, *command: str) -> None:
    for signum in (signal.SIGHUP, signal.SIGPIPE, signal.SIGXFSZ):  # Python itself ignores the last two
        signal.signal(signum, signal.SIG_DFL)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGHUP)
    if os.getppid() != int(parent):
        os.kill(os.getpid(), signal.SIGHUP)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(*sys.argv[1:])
