"""What the Triton kernels compile to on real GPUs, without having one: `python -m hdfast_kernels.report`.

Each op is called at its training shapes on meta tensors, forward and backward, exactly as an agent calls it;
every kernel launch is caught, compiled for the GPUs asked for, and taken apart with the tools that Triton's
wheel brings. So the report shows the very kernels, constants and launch settings that would run.

Axes in the shapes: B*T = 1,024 rows of the world model, H*N = 15 x 1,024 rows of imagination.
"""

import argparse
import contextlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from . import dispatch
from .report_cases import Case, cases, with_kernels

# What a chip gives one program (thread block): shared memory in bytes by compute capability, and registers a thread.
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
REGISTER_LIMIT = 255

# What to count in the machine code: all instructions, products of tensor cores, special functions (exp, log, 1/x),
# loads and stores of global memory, with those of 16 bytes and of 1 or 2, traffic of spilled registers, exchanges in a
# warp, barriers, atomics.
INSTRUCTIONS = {
    "all": r"(?m)^\s*/\*[0-9a-f]{4,}\*/\s.*;",
    "mma": r"\b(?:HMMA|HGMMA|UTCHMMA|OMMA)\b",
    "mufu": r"\bMUFU\b",
    "ldg": r"\bLDG(?:STS)?\b",
    "ldg128": r"\bLDG(?:STS)?\b[.\w]*\.128\b",
    "ldg16": r"\bLDG(?:STS)?\b[.\w]*\.[US](?:8|16)\b",
    "stg": r"\bSTG\b",
    "stg128": r"\bSTG\b[.\w]*\.128\b",
    "local": r"\b(?:LDL|STL)\b",
    "shfl": r"\bSHFL\b",
    "bar": r"\bBAR\b",
    # But for those that keep account of a program's tensor memory on sm_100, and give nothing back.
    "atom": r"\b(?:ATOM|ATOMG|RED|REDG)\b|\bATOMS\b(?!\.(?:OR|AND) RZ)",
}


@dataclass(frozen=True)
class Kernel:
    """One compiled kernel; `instructions` counts, in the machine code, the patterns of INSTRUCTIONS."""

    op: str
    role: str
    name: str
    sm: int
    registers: int  # a thread
    stack_bytes: int  # a thread; where spilled registers go
    shared_bytes: int  # a program
    warps: int
    instructions: dict[str, int]

    @property
    def programs_per_multiprocessor(self) -> int:
        """How many programs fit by registers (65,536, given out in units of 8 a thread) and shared memory."""
        by_registers = 65536 // (-(-max(self.registers, 1) // 8) * 8 * 32 * self.warps)
        by_shared = SHARED_LIMIT[self.sm] // max(self.shared_bytes, 1)
        return min(by_registers, by_shared, 64 // self.warps, 32)  # 64 warps and 32 programs at most

    def faults(self) -> list[str]:
        """What keeps this kernel from running on its chip, or makes it slow without need."""
        out = []
        if self.instructions["local"]:  # a stack that is never accessed costs nothing
            out.append(f"spills: {self.instructions['local']} accesses to {self.stack_bytes} bytes of stack")
        if self.shared_bytes > SHARED_LIMIT[self.sm]:
            out.append(f"{self.shared_bytes} bytes of shared memory, the chip has {SHARED_LIMIT[self.sm]}")
        if self.registers > REGISTER_LIMIT:
            out.append(f"{self.registers} registers a thread, the chip has {REGISTER_LIMIT}")
        return out


class _StubDriver:
    """Stands where Triton looks for a GPU, so that it compiles for one that is not there."""

    def __init__(self, sm: int):
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget("cuda", sm, 32)

    def get_current_target(self):
        return self._target

    def get_current_device(self) -> int:
        return self._target.arch

    def set_current_device(self, device: int) -> None: ...

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")


@contextlib.contextmanager
def compiling(sm: int) -> Iterator[list[Any]]:
    """Inside the block, launching a Triton kernel compiles it for sm_<sm>, lists it, and runs nothing."""
    from triton import JITFunction
    from triton.runtime import driver

    compiled: list[Any] = []
    run, active = JITFunction.run, driver._active

    def compile_only(self, *args, **kwargs):
        compiled.append(run(self, *args, **{**kwargs, "warmup": True, "enable_fp_fusion": True}))
        return compiled[-1]

    driver.set_active(_StubDriver(sm))
    JITFunction.run = compile_only
    try:
        yield compiled
    finally:
        JITFunction.run = run
        driver._active = active


def inspect(cubin: bytes) -> tuple[int, int, dict[str, int]]:
    """Registers a thread, stack bytes a thread, and the instructions of a compiled kernel."""
    import triton.backends.nvidia

    tools = Path(triton.backends.nvidia.__file__).parent / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (
            subprocess.run(
                [tools / tool, option, file.name], capture_output=True, text=True, check=True
            ).stdout
            for tool, option in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )
    registers, stack = (int(re.findall(rf"{name}:(\d+)", usage)[0]) for name in ("REG", "STACK"))
    return registers, stack, {name: len(re.findall(pattern, code)) for name, pattern in INSTRUCTIONS.items()}


def compile_case(case: Case, sm: int) -> list[Kernel]:
    """The kernels that one case launches, each once, compiled for sm_<sm>."""
    with compiling(sm) as compiled:
        case.call(with_kernels(case.op, case.backend))
    kernels = []
    for kernel in {id(kernel): kernel for kernel in compiled}.values():
        registers, stack, instructions = inspect(kernel.asm["cubin"])
        meta = kernel.metadata
        kernels.append(
            Kernel(
                case.op, case.role, meta.name, sm, registers, stack, meta.shared, meta.num_warps, instructions
            )
        )
    return kernels


def table(kernels: Iterable[Kernel]) -> str:
    """The kernels as text, one a line."""
    head = ("kernel", "shape", "sm", "regs", "spill", "shared", "warps", "per SM", *INSTRUCTIONS)
    rows = [
        (k.name, k.role, k.sm, k.registers, k.stack_bytes, k.shared_bytes, k.warps, k.programs_per_multiprocessor,
         *k.instructions.values())
        for k in kernels
    ]  # fmt: skip
    lines = [tuple(map(str, row)) for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if position < 2 else cell.rjust(width)
            for position, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns 0 if every kernel is without fault, 1 if not, 2 if nothing could be compiled."""
    parser = argparse.ArgumentParser(
        prog="python -m hdfast_kernels.report", description=__doc__.split("\n\n")[0]
    )
    known = list(dict.fromkeys(case.op for case in cases()))
    chips = list(SHARED_LIMIT)
    only = f"only these ops: {', '.join(known)}"
    parser.add_argument("--sm", type=int, nargs="+", choices=chips, default=chips, help="only these chips")
    parser.add_argument("--op", nargs="+", choices=known, default=known, metavar="OP", help=only)
    parser.add_argument("--quick", action="store_true", help="one shape an op")
    parser.add_argument("--json", action="store_true", help="a JSON array instead of a table")
    options = parser.parse_args(arguments)
    if not dispatch.triton_installed():
        sys.stderr.write("triton is not installed; install it with `pip install triton`\n")
        return 2
    if dispatch.triton_interpreted():
        sys.stderr.write("TRITON_INTERPRET=1 is set, so that nothing is compiled; unset it\n")
        return 2
    chosen = [case for case in cases() if case.op in options.op and (case.quick or not options.quick)]
    kernels = [kernel for case in chosen for sm in options.sm for kernel in compile_case(case, sm)]
    listing = [asdict(kernel) | {"faults": kernel.faults()} for kernel in kernels]
    sys.stdout.write((json.dumps(listing, indent=1) if options.json else table(kernels)) + "\n")
    faults = [f"{k.name} ({k.role}, sm_{k.sm}): {fault}" for k in kernels for fault in k.faults()]
    sys.stderr.write(("\n".join(faults) or f"{len(kernels)} kernels without fault") + "\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
