"""Named ranges around the parts of a run: for Nsight Systems with the `nvtx` package, and those of torch.profiler."""

import contextlib
import functools
from collections.abc import Iterator
from types import TracebackType
from typing import Any

from torch.profiler import record_function

DOMAIN = "hdfast"


@functools.cache
def annotate(name: str) -> contextlib.AbstractContextManager[None]:
    """A context that Nsight shows as the range `name` in the domain "hdfast"; may be nested and entered again.

    A no-op without nvtx 0.2.12 or newer.

    In a CUDA graph, ranges show at its capture, not at its replay.
    """
    try:
        from nvtx import get_domain
    except ImportError:
        return contextlib.nullcontext()
    if not hasattr(domain := get_domain(DOMAIN), "push_range"):
        return contextlib.nullcontext()
    return _Range(domain, domain.get_event_attributes(message=name))


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
    """A part of an update, as a range for both; costs microseconds while neither looks."""
    with annotate(name), record_function(name):
        yield


class _Range(contextlib.AbstractContextManager[None]):
    """Keeps no state of its own, so that one object serves every use of a name."""

    __slots__ = ("_attributes", "_domain")

    def __init__(self, domain: Any, attributes: Any) -> None:
        self._domain, self._attributes = domain, attributes

    def __enter__(self) -> None:
        self._domain.push_range(self._attributes)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._domain.pop_range()
