"""Watches memory in Triton's interpreter, which reads and writes whatever address a kernel computes.

A kernel may write only to the tensors that it was given, and read only their storages. And because the programs of a
launch run in no order, none may read or write what another writes, unless a grid barrier is between them; behind it,
what another wrote must be read past the first-level cache (".cg"), which may hold what was there before.
"""

import contextlib
from collections.abc import Iterable, Iterator
from typing import ClassVar

import numpy as np
import torch
from triton.runtime import interpreter

NOBODY, SEVERAL = -1, -2  # in place of a program's number


class Spans:
    """Stretches of memory, each given by its first byte, the byte behind its last, and the size of a number."""

    def __init__(self, spans: Iterable[tuple[int, int, int]]) -> None:
        merged: list[list[int]] = []
        for begin, end, size in sorted(spans):
            if merged and begin < merged[-1][1]:  # the same memory, given twice
                merged[-1][1:] = max(end, merged[-1][1]), min(size, merged[-1][2])
            else:
                merged.append([begin, end, size])
        self._begins, self._ends, self._sizes = np.array(merged, np.int64).reshape(-1, 3).T
        self._offsets = np.concatenate([[0], ((self._ends - self._begins) // self._sizes).cumsum()])
        self.numbers = int(self._offsets[-1])

    def hold(self, at: np.ndarray, size: int) -> bool:
        """Whether all numbers of `size` bytes at these addresses lie inside."""
        span = self._span(at)
        return bool((span >= 0).all() and (at + size <= self._ends[span]).all())

    def places(self, at: np.ndarray) -> np.ndarray:
        """Counted through all stretches, 0 to numbers - 1."""
        span = self._span(at)
        return self._offsets[span] + (at - self._begins[span]) // self._sizes[span]

    def _span(self, at: np.ndarray) -> np.ndarray:
        return np.searchsorted(self._begins, at, side="right") - 1


class Launch:
    """The memory of a launch: which program has read and written each number since the last grid barrier.

    kernel: its name, for messages.
    arguments: what it was given, tensors and others.
    """

    current: ClassVar["Launch | None"] = None

    def __init__(self, kernel: str, arguments: Iterable[object]) -> None:
        self.kernel = kernel
        tensors = [x for x in _flat(arguments) if isinstance(x, torch.Tensor) and x.numel()]
        self.storages, self.views = Spans(map(_storage, tensors)), Spans(map(_view, tensors))
        self.writers, self.readers, self.before = np.full((3, self.storages.numbers), NOBODY, np.int32)

    def barrier(self) -> None:
        """All programs have come to a grid barrier."""
        np.copyto(self.before, self.writers, where=self.writers != NOBODY)
        self.writers.fill(NOBODY)
        self.readers.fill(NOBODY)

    def access(
        self, pointers: np.ndarray, mask: np.ndarray, size: int, *, write: bool, cached: bool = False
    ) -> None:
        """A program reads or writes numbers of `size` bytes. Raises AssertionError where it must not."""
        pointers, mask = np.broadcast_arrays(pointers, mask)
        at = pointers[mask].astype(np.int64)
        if not at.size:
            return
        program = int(np.ravel_multi_index(_builder().grid_idx, _builder().grid_dim))
        does = f"{self.kernel}: program {program} {'writes' if write else 'reads'}"
        if not (self.views if write else self.storages).hold(at, size):
            raise AssertionError(f"{does} outside of its tensors")
        place = self.storages.places(at)
        if _anyone_else(self.writers[place], program) or (
            write and _anyone_else(self.readers[place], program)
        ):
            raise AssertionError(f"{does} what another program reads or writes, with no barrier in between")
        if cached and _anyone_else(self.before[place], program):
            raise AssertionError(f'{does} what another program has written, not by ".cg"')
        if write:
            self.writers[place] = program
        else:
            before = self.readers[place]
            self.readers[place] = np.where((before == NOBODY) | (before == program), program, SEVERAL)


@contextlib.contextmanager
def watched(kernel: str, arguments: Iterable[object]) -> Iterator[Launch]:
    """Inside the block, what kernels do is watched as that of one launch."""
    Launch.current = Launch(kernel, arguments)
    try:
        yield Launch.current
    finally:
        Launch.current = None


def patch() -> None:
    """Make this process's interpreter watch every launch; a second call does nothing."""
    if getattr(interpreter, "_hdfast_memory", False):
        return
    interpreter._hdfast_memory = True
    builder, call = interpreter.InterpreterBuilder, interpreter.GridExecutor.__call__
    load, store = builder.create_masked_load, builder.create_masked_store

    def masked_load(self, pointers, mask, other, cache, *args):
        _access(pointers, mask, write=False, cached=not str(cache).lower().endswith("cg"))
        return load(self, pointers, mask, other, cache, *args)

    def masked_store(self, pointers, value, mask, *args):
        _access(pointers, mask, write=True)
        return store(self, pointers, value, mask, *args)

    def launch(self, *args, **kwargs):
        with watched(self.fn.__name__, (*args, *kwargs.values())):
            return call(self, *args, **kwargs)

    builder.get_cache_policy = lambda self, modifier, eviction: (
        modifier
    )  # of Triton 3.9, where it forgets that
    builder.create_masked_load, builder.create_masked_store = masked_load, masked_store
    interpreter.GridExecutor.__call__ = launch


def _access(pointers, mask, **how: bool) -> None:
    if Launch.current is not None:
        size = interpreter._get_np_dtype(pointers.get_element_ty()).itemsize
        Launch.current.access(pointers.data, mask.data, size, **how)


def _builder() -> interpreter.InterpreterBuilder:
    return interpreter.interpreter_builder


def _anyone_else(who: np.ndarray, program: int) -> bool:
    return bool(((who != NOBODY) & (who != program)).any())


def _flat(arguments: Iterable[object]) -> Iterator[object]:
    for argument in arguments:
        if isinstance(argument, tuple):
            yield from _flat(argument)
        else:
            yield argument


def _storage(x: torch.Tensor) -> tuple[int, int, int]:
    """First byte, the byte behind the last, and the size of a number."""
    begin = x.untyped_storage().data_ptr()
    return begin, begin + x.untyped_storage().nbytes(), x.element_size()


def _view(x: torch.Tensor) -> tuple[int, int, int]:
    """The same of its own numbers, and those between them."""
    numbers = 1 + sum((length - 1) * stride for length, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + numbers * x.element_size(), x.element_size()
