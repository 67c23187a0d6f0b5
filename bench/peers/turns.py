"""The side of the process that is timed: it answers every line it reads with the seconds of one update.

Only the standard library is imported, because a peer's interpreter has nothing of ours.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any


def serve(build: Callable[[dict[str, Any]], tuple[Callable[[], None], dict[str, Any]]]) -> None:
    """Builds what is timed from the settings (JSON, the first argument), answers what it is, and takes turns.

    build: settings -> an update, which waits for all that it starts on a device, and facts about it.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not look like an answer

    def answer(values: dict[str, Any]) -> None:
        answers.write(json.dumps(values) + "\n")
        answers.flush()

    update, about = build(json.loads(sys.argv[1]))
    answer(about)
    for _ in sys.stdin:  # until the other side closes it
        began = time.perf_counter()
        update()
        answer({"seconds": time.perf_counter() - began})
