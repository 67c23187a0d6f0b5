"""What the workers of peers in JAX have in common. It runs on a peer's interpreter, which has nothing of ours."""

import os

import jax
from turns import serve


def serve_jax(build):
    """Takes turns with an update in JAX, which is compiled beforehand.

    build: settings -> an update that returns all it computes, the sizes of the parameters it learns, and the
        precision of its matrix work.
    """

    def complete(settings):
        # XLA starts a thread for every core that it may use.
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: settings["threads"]])
        step, sizes, precision = build(settings)
        for _ in range(2):  # the second may compile anew, for what the first returned
            jax.block_until_ready(step())
        return lambda: jax.block_until_ready(step()), {
            "precision": precision,
            "on": f"jax {jax.__version__}",
            "threads": len(os.sched_getaffinity(0)),
            "parameters": sum(sizes),
            "gflop": None,
        }

    serve(complete)
