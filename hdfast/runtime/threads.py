"""How long PyTorch's threads wait for each other before they let others have the core."""

import os

# Turns of an empty loop, 0.5 to 1.5 ms of it, after which a thread sleeps. By default it is ten times as many: where
# the cores have other work (environments, other runs), threads then wait for one that has no core, and keep others
# from theirs. Ten times fewer would do with less still, and take 8% longer where the cores are free.
SPINS = 30_000


def wait_briefly() -> None:
    """To be called before torch is imported, which reads it then; what the environment says already stays."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPINS))
