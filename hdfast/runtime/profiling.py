"""Named NVTX ranges around the parts of a run, for Nsight Systems; no-ops without the `nvtx` package."""

import contextlib
import functools
from types import TracebackType
from typing import Any

DOMAIN = "hdfast"


@functools.cache
def annotate(name: str) -> contextlib.AbstractContextManager[None]:
    """A context that shows as the range `name` in the domain "hdfast"; may be nested and entered again.

    In a CUDA graph, ranges show at its capture, not at its replay.
    """
    try:
        import nvtx
    except ImportError:
        return contextlib.nullcontext()
    domain = nvtx.get_domain(DOMAIN)
    return _Range(domain, domain.get_event_attributes(message=name))


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
