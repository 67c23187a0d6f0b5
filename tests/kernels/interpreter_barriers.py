"""Grid barriers in Triton's interpreter, which runs programs one after another and would wait forever.

Every program becomes a greenlet; at a barrier it hands over to the next, and all go on once all have arrived.
"""

import contextlib
import inspect
from collections.abc import Iterator
from types import ModuleType
from typing import ClassVar

import greenlet
import interpreter_memory
from triton.runtime import interpreter


class _Grid(interpreter.GridExecutor):
    """Runs the programs of a launch side by side, from barrier to barrier."""

    barriers: ClassVar[list[int]] = []  # how many each launch met, of those that met any

    def __call__(self, *args, **kwargs):
        known = inspect.getfullargspec(self.fn).args
        scope = interpreter._patch_lang(self.fn)
        builder = interpreter.interpreter_builder
        try:
            arguments = inspect.getcallargs(
                self.fn, *args, **{name: value for name, value in kwargs.items() if name in known}
            )
            arguments = {
                name: value if name in self.constexprs else interpreter._implicit_cvt(value)
                for name, value in arguments.items()
            }
            grid = (*self.grid, 1, 1)[:3]
            builder.set_grid_dim(*grid)
            places = [(x, y, z) for x in range(grid[0]) for y in range(grid[1]) for z in range(grid[2])]
            programs = [greenlet.greenlet(lambda: self.fn(**arguments)) for _ in places]
            met = -1
            order = list(zip(places, programs, strict=True))
            with interpreter_memory.watched(self.fn.__name__, (*args, *kwargs.values())) as launch:
                while not all(program.dead for program in programs):
                    if any(program.dead for program in programs):
                        raise AssertionError("some programs ended before a barrier that others wait at")
                    for place, program in order:
                        builder.set_grid_idx(*place)
                        program.switch()
                    met += 1
                    launch.barrier()
                    order.reverse()  # so that a missing barrier shows, whichever program should have waited
            _Grid.barriers += [met] if met else []
        finally:
            if scope is not None:
                scope.restore()


@contextlib.contextmanager
def cooperative(module: ModuleType, *, left_out: tuple[int, int] | None = None) -> Iterator[type[_Grid]]:
    """Inside the block, programs of `module`'s kernels take turns, handing over at `grid_barrier`.

    left_out: (launch, barrier), counted from 0, that programs pass without waiting.
    """

    def hand_over(counter, target):
        program = greenlet.getcurrent()
        program.met = getattr(program, "met", -1) + 1
        if (len(_Grid.barriers), program.met) != left_out:
            program.parent.switch()

    executor, barrier = interpreter.GridExecutor, module.grid_barrier
    interpreter.GridExecutor, _Grid.barriers = _Grid, []
    module.grid_barrier = hand_over
    try:
        yield _Grid
    finally:
        interpreter.GridExecutor, module.grid_barrier = executor, barrier
