"""How long PyTorch's threads wait for each other before they give up the core."""

import os

# Turns of an empty loop, 0.5 to 1.5 ms of it, after which a thread sleeps. The default is ten times as many: if the
# cores have other work (environments, other runs), threads then wait for one that has no core, and block the cores
# that others need. A tenth of this would block them even less, but take 8% longer on free cores.
SPINS = 30_000


def wait_briefly() -> None:
    """Call this before torch is imported, which then reads it; a value already in the environment stays."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPINS))
