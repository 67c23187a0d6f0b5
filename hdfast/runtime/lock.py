"""The lock of a run's directory: one process at a time writes there.

It is the file `lock`, which says whose it is. Readers need none.
"""

import fcntl
import os
import socket
from pathlib import Path

from hdfast.runtime import errors
from hdfast.runtime.errors import RunError
from hdfast.runtime.files import utc

_own: dict[int, tuple[int, int]] = {}  # descriptor -> device and inode of the locks that this process holds


def _leave_to_parent() -> None:
    """Closes them in a forked process, such as an environment's own, which may outlive the run that is killed."""
    for descriptor in _own:
        os.close(descriptor)
    _own.clear()


os.register_at_fork(after_in_child=_leave_to_parent)


def hold(path: Path) -> int:
    """A descriptor that holds the lock on directory `path` until `release` or the end of the process, however it ends.

    Raises: RunError if another process, or an earlier call, holds it.
    """
    descriptor = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = _holder(descriptor)
        os.close(descriptor)
        hint = "wait for it, stop it, or choose another --logdir"
        raise RunError(f"this run is in use by {holder}", where=path, hint=hint) from None
    except OSError as error:
        errors.warn(f"{path}: cannot lock ({error.strerror}); make sure that no other process uses this run")
    try:
        os.ftruncate(descriptor, 0)
        holder = f"process {os.getpid()} on {socket.gethostname()} since {utc()}"
        os.pwrite(descriptor, f"{holder}\n".encode(), 0)
    except BaseException:
        os.close(descriptor)
        raise
    _own[descriptor] = _file_of(descriptor)
    return descriptor


def release(descriptor: int) -> None:
    """Gives up what `hold` returned."""
    if _own.pop(descriptor, None) is not None:
        os.close(descriptor)


def refuse_held(path: Path, *, hint: str) -> None:
    """Raises RunError if another process holds the run in directory `path`; there may be no run.

    It holds the lock only as long as it takes to see that nobody else does.
    """
    try:
        descriptor = os.open(path / "lock", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return
    try:
        if _file_of(descriptor) not in _own.values():
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        raise RunError(f"this run is in use by {_holder(descriptor)}", where=path, hint=hint) from None
    except OSError:
        return  # a file system without locks: whoever opened the run was warned
    finally:
        os.close(descriptor)  # with the lock


def _file_of(descriptor: int) -> tuple[int, int]:
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino


def _holder(descriptor: int) -> str:
    return os.read(descriptor, 4096).decode(errors="replace").strip() or "another process"
