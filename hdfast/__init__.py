"""hdfast: HarmonyDream at the speed of the hardware."""

import sys

__version__ = "0.1.0"

if sys.argv[:1] == ["-m"]:  # `python -m hdfast.train` imports all it needs before its `entry.main` runs
    from hdfast.runtime import entry, threads

    entry.begin()
    threads.wait_briefly()
