"""The lock on a run's directory, and processes that are forked while it is held."""

import os
import socket

from hdfast.runtime import lock


def test_a_forked_process_does_not_hold_the_run(tmp_path):
    """Such as an environment's own, which may outlive a run that is killed."""
    ours, theirs = socket.socketpair()
    held = lock.hold(tmp_path)
    child = os.fork()
    if not child:
        ours.close()
        theirs.send(b"1")
        theirs.recv(1)  # until the other side is closed
        os._exit(0)
    theirs.close()
    ours.recv(1)
    lock.release(held)
    try:
        lock.release(lock.hold(tmp_path))
    finally:
        ours.close()
        os.waitpid(child, 0)
