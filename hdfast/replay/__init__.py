"""Where data is kept: the ring of rows (`ring`) and its append-only log on disk (`log`), which `reading` reads."""

from hdfast.replay.chunk import ReplayError
from hdfast.replay.reading import episodes
from hdfast.replay.ring import Replay

__all__ = ["Replay", "ReplayError", "episodes"]
