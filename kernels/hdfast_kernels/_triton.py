"""Triton where it is installed, and a stand-in that lets the op files load where it is not.

Op files do `from ._triton import tl, triton`. Without Triton their kernels become stand-ins that raise when
launched; dispatch refuses `backend="triton"` before it comes to that.
"""

from typing import Any

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError as error:
    if error.name != "triton":
        raise

    class _Absent:
        """Takes the place of triton: usable as decorator and annotation, not as a kernel."""

        def __getattr__(self, name: str) -> "_Absent":
            if name.startswith("__"):
                raise AttributeError(name)
            return self

        def __call__(self, *args: Any, **kwargs: Any) -> "_Absent":
            return self

        def __getitem__(self, grid: Any) -> Any:
            raise ModuleNotFoundError("triton is not installed; `pip install triton`", name="triton")

    triton = tl = _Absent()

__all__ = ["tl", "triton"]
