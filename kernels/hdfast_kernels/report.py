"""What the Triton kernels compile to on real GPUs, found out without one: `python -m hdfast_kernels.report`.

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
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import dispatch
from .onehot_linear import onehot_matrix

# What a chip gives one program (thread block): shared memory in bytes by compute capability, and registers a thread.
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
REGISTER_LIMIT = 255

# What to count in the machine code: all instructions, products of tensor cores, special functions (exp, log, 1/x),
# loads and stores of global memory and those of 16 bytes among them, traffic of spilled registers, exchanges in a
# warp, barriers, atomics.
INSTRUCTIONS = {
    "all": r"(?m)^\s*/\*[0-9a-f]{4,}\*/\s.*;",
    "mma": r"\b(?:HMMA|HGMMA|UTCHMMA|OMMA)\b",
    "mufu": r"\bMUFU\b",
    "ldg": r"\bLDG(?:STS)?\b",
    "ldg128": r"\bLDG(?:STS)?\b[.\w]*\.128\b",
    "stg": r"\bSTG\b",
    "stg128": r"\bSTG\b[.\w]*\.128\b",
    "local": r"\b(?:LDL|STL)\b",
    "shfl": r"\bSHFL\b",
    "bar": r"\bBAR\b",
    # But for those that keep account of a program's tensor memory on sm_100, and give nothing back.
    "atom": r"\b(?:ATOM|ATOMG|RED|REDG)\b|\bATOMS\b(?!\.(?:OR|AND) RZ)",
}


@dataclass(frozen=True)
class Case:
    """One call of an op, at the shapes of one role in training."""

    op: str
    role: str
    call: Callable[
        [Callable[..., Any]], Any
    ]  # takes the op's implementation with Triton kernels, calls it and its backward
    quick: bool = False  # among the few that the test suite compiles every time


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
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage).group(1)) for name in ("REG", "STACK"))
    return registers, stack, {name: len(re.findall(pattern, code)) for name, pattern in INSTRUCTIONS.items()}


def with_kernels(op: str) -> Callable[..., Any]:
    """The implementation of an op that launches Triton kernels: all in Triton, or some beside kernels of PyTorch's."""
    implementations = dispatch._ops[op].implementations
    return implementations.get("triton") or implementations["fused"]


def compile_case(case: Case, sm: int) -> list[Kernel]:
    """The kernels that one case launches, each once, compiled for sm_<sm>."""
    with compiling(sm) as compiled:
        case.call(with_kernels(case.op))
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


def meta(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> Tensor:
    """A tensor without memory: kernels see its shape, dtype and 16-byte alignment."""
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=grad)


def backward(*outputs: Tensor) -> None:
    """Run the backward pass of those outputs, as a loss of all of them would."""
    torch.autograd.backward(outputs, [torch.empty_like(output) for output in outputs])


def cases() -> list[Case]:
    """Every op at its training shapes: B*T = 1,024 rows of the world model, 16 x 1,024 of imagination.

    bfloat16 activations with float32 parameters, as mixed precision has them, and float32. Sizes: small (D = U = 512,
    depth 32), medium (D = 1,024, U = 640, depth 48), large (D = 2,048, U = 768), xlarge (D = 4,096).
    """
    low, full = torch.bfloat16, torch.float32

    def layer_norm_silu(rows: int, channels: int, dtype: torch.dtype):
        def call(op):
            affine = meta(channels, grad=True), meta(channels, grad=True)
            backward(op(meta(rows, channels, dtype=dtype, grad=True), *affine, 1e-3))

        return call

    def layer_norm_gru(rows: int, deter: int, dtype: torch.dtype):
        def call(op):
            gates, affine = meta(rows, 3 * deter, dtype=dtype, grad=True), meta(3 * deter, grad=True)
            backward(op(gates, meta(rows, deter, grad=True), affine, affine, 1e-3))

        return call

    def onehot_linear(rows: int, units: int, dtype: torch.dtype):
        def call(op):
            index, weight = meta(rows, 32, dtype=torch.int64), meta(1024, units, dtype=dtype, grad=True)
            latent, onto = (
                meta(rows, 32, 32, dtype=dtype, grad=True),
                meta(rows, units, dtype=dtype, grad=True),
            )
            backward(op(index, weight, latent, onto))
            if op is with_kernels("onehot_linear"):
                onehot_matrix(index, 32, dtype)

        return call

    def sample_onehot(rows: int, dtype: torch.dtype):
        def call(op):
            stoch, _, logp = op(meta(rows, 32, 32, dtype=dtype, grad=True), meta(rows, 32), 0.01)
            backward(stoch, logp)

        return call

    def sample_index(rows: int, groups: int, classes: int, dtype: torch.dtype):
        return lambda op: op(meta(rows, groups, classes, dtype=dtype), meta(rows, groups), 0.01)

    def kl_balance(op):
        backward(*op(meta(64, 16, 32, 32, grad=True), meta(64, 16, 32, 32, grad=True), 1.0))

    def two_hot_loss(rows: int, dtype: torch.dtype, width: int = 255):
        return lambda op: backward(
            op(meta(rows, width, dtype=dtype, grad=True)[:, :255], meta(rows), -20.0, 20.0)
        )

    def two_hot_mean(rows: int, dtype: torch.dtype, width: int = 255):
        return lambda op: backward(op(meta(rows, width, dtype=dtype, grad=True)[:, :255], -20.0, 20.0))

    def image_input(dtype: torch.dtype):
        return lambda op: op(meta(64, 16, 64, 64, 3, dtype=torch.uint8), dtype)

    def image_loss(dtype: torch.dtype):
        frames = 64, 16, 64, 64, 3
        return lambda op: backward(
            op(meta(*frames, dtype=dtype, grad=True), meta(*frames, dtype=torch.uint8))
        )

    def image_deconv(side: int, inputs: int, dtype: torch.dtype):
        def call(op):
            weight, bias = meta(inputs, 3, 4, 4, grad=True), meta(3, grad=True)
            backward(op(meta(1024, side, side, inputs, dtype=dtype, grad=True), weight, bias))

        return call

    def strided_conv(side: int, outputs: int, dtype: torch.dtype):
        def call(op):
            weight = meta(outputs, 3, 4, 4, grad=True)
            backward(op(meta(1024, side, side, 3, dtype=dtype, grad=True), weight))

        return call

    def harmony_loss(op):
        losses = [meta(64, 16, grad=True) for _ in range(6)]
        group, weight, regularizer = (
            (0, 1, 2, 2, -1, -1),
            (1.0, 1.0, 5 / 6, 1 / 6, 1.0, 1.0),
            (1.0, 1.0, 5 / 6),
        )
        backward(op(losses, meta(3, grad=True), group, weight, regularizer)[0])

    def lambda_return(op):
        backward(
            op(meta(15, 1024, grad=True), meta(16, 1024), meta(16, 1024, grad=True), 1 - 1 / 333, 0.95)[0]
        )

    def adam_step(*numbers: int):
        def call(op):
            tensors = ([meta(one) for one in numbers] for _ in range(4))
            scalars = meta(), 1e-4, (0.9, 0.999), 1e-8, 0.0, 1000.0, meta(dtype=torch.bool)
            op(*tensors, *scalars)

        return call

    def rssm_observe(T: int, B: int, D: int, U: int, dtype: torch.dtype):
        def call(op):
            def full(*shape: int) -> Tensor:
                return meta(*shape, grad=True)

            def low(*shape: int) -> Tensor:
                return meta(*shape, dtype=dtype, grad=True)

            deter, stoch, _, logp = op(
                *(low(T, B, U), low(T, B, U), meta(T, B, dtype=torch.bool), meta(T, B, 32)),
                *(full(D), meta(32, dtype=torch.int64), low(1024, U), full(U), full(U)),
                *(low(3 * D, D + U), full(3 * D), full(3 * D), low(U, D), full(U), full(U)),
                *(low(1024, U), full(1024), 0.01, 1e-3),
            )
            backward(deter, stoch, logp)

        return call

    return [
        Case("adam_step", "small 17.9M fp32", adam_step(17_900_032), quick=True),
        Case("adam_step", "two of odd sizes fp32", adam_step(1023, 1025)),
        Case("layer_norm_silu", "hidden 1024x512 bf16", layer_norm_silu(1024, 512, low), quick=True),
        Case("layer_norm_silu", "hidden 1024x512 fp32", layer_norm_silu(1024, 512, full)),
        Case("layer_norm_silu", "imagined 16384x512 bf16", layer_norm_silu(16384, 512, low)),
        Case("layer_norm_silu", "medium 1024x640 bf16", layer_norm_silu(1024, 640, low)),
        Case("layer_norm_silu", "vector 1024x1024 bf16", layer_norm_silu(1024, 1024, low)),
        Case("layer_norm_silu", "encoder 32x32x32 bf16", layer_norm_silu(1024 * 1024, 32, low), quick=True),
        Case("layer_norm_silu", "encoder 32x32x32 fp32", layer_norm_silu(1024 * 1024, 32, full)),
        Case("layer_norm_silu", "encoder 32x32x48 bf16", layer_norm_silu(1024 * 1024, 48, low)),
        Case("layer_norm_silu", "encoder 4x4x256 bf16", layer_norm_silu(1024 * 16, 256, low)),
        Case("layer_norm_gru", "observe 16x512 bf16", layer_norm_gru(16, 512, low)),
        Case("layer_norm_gru", "imagine 1024x512 bf16", layer_norm_gru(1024, 512, low), quick=True),
        Case("layer_norm_gru", "imagine 1024x512 fp32", layer_norm_gru(1024, 512, full)),
        Case("layer_norm_gru", "medium 1024x1024 bf16", layer_norm_gru(1024, 1024, low)),
        Case("layer_norm_gru", "large 1024x2048 bf16", layer_norm_gru(1024, 2048, low)),
        Case("layer_norm_gru", "xlarge 1024x4096 bf16", layer_norm_gru(1024, 4096, low)),
        Case("layer_norm_gru", "xlarge 1024x4096 fp32", layer_norm_gru(1024, 4096, full)),
        Case("onehot_linear", "observe 16x32 to 512 bf16", onehot_linear(16, 512, low)),
        Case("onehot_linear", "imagine 1024x32 to 512 bf16", onehot_linear(1024, 512, low), quick=True),
        Case("onehot_linear", "imagine 1024x32 to 512 fp32", onehot_linear(1024, 512, full)),
        Case("onehot_linear", "actor-critic 16384x32 to 512 bf16", onehot_linear(16384, 512, low)),
        Case("onehot_linear", "actor-critic 16384x32 to 512 fp32", onehot_linear(16384, 512, full)),
        Case("onehot_linear", "medium 1024x32 to 640 bf16", onehot_linear(1024, 640, low)),
        Case("onehot_linear", "xlarge 1024x32 to 4096 bf16", onehot_linear(1024, 4096, low)),
        Case("sample_onehot", "imagine 1024x32x32 bf16", sample_onehot(1024, low), quick=True),
        Case("sample_onehot", "imagine 1024x32x32 fp32", sample_onehot(1024, full)),
        Case("sample_index", "imagine 1024x32x32 bf16", sample_index(1024, 32, 32, low), quick=True),
        Case("sample_index", "imagine 1024x32x32 fp32", sample_index(1024, 32, 32, full)),
        Case("sample_index", "actions 1024x1x18 bf16", sample_index(1024, 1, 18, low)),
        Case("kl_balance", "observed 64x16x32x32 fp32", kl_balance, quick=True),
        Case("two_hot_loss", "imagined 15360x255 bf16", two_hot_loss(15360, low), quick=True),
        Case("two_hot_loss", "imagined 15360x255 of 256 bf16", two_hot_loss(15360, low, 256)),
        Case("two_hot_loss", "reward 1024x255 fp32", two_hot_loss(1024, full)),
        Case("two_hot_mean", "imagined 16384x255 bf16", two_hot_mean(16384, low), quick=True),
        Case("two_hot_mean", "imagined 16384x255 of 256 bf16", two_hot_mean(16384, low, 256)),
        Case("two_hot_mean", "imagined 16384x255 fp32", two_hot_mean(16384, full)),
        Case("image_input", "frames 64x16x64x64x3 bf16", image_input(low), quick=True),
        Case("image_input", "frames 64x16x64x64x3 fp32", image_input(full)),
        Case("image_loss", "frames 64x16x64x64x3 bf16", image_loss(low), quick=True),
        Case("image_loss", "frames 64x16x64x64x3 fp32", image_loss(full)),
        Case("image_deconv", "frames to 64x64x3 bf16", image_deconv(32, 32, low), quick=True),
        Case("image_deconv", "frames to 64x64x3 fp32", image_deconv(32, 32, full)),
        Case("image_deconv", "frames to 128x128x3 bf16", image_deconv(64, 48, low)),
        Case("strided_conv", "frames 64x64x3 bf16", strided_conv(64, 32, low), quick=True),
        Case("strided_conv", "frames 64x64x3 fp32", strided_conv(64, 32, full)),
        Case("harmony_loss", "six of 64x16 fp32", harmony_loss, quick=True),
        Case("lambda_return", "imagined 15x1024 fp32", lambda_return, quick=True),
        Case("rssm_observe", "observe 64x16x512 bf16", rssm_observe(64, 16, 512, 512, low), quick=True),
        Case("rssm_observe", "observe 64x16x512 fp32", rssm_observe(64, 16, 512, 512, full)),
        Case("rssm_observe", "medium 64x16x1024 bf16", rssm_observe(64, 16, 1024, 640, low)),
        Case("rssm_observe", "medium 50x50x1024 bf16", rssm_observe(50, 50, 1024, 640, low)),
    ]


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
    parser.add_argument("--sm", type=int, nargs="+", choices=list(SHARED_LIMIT), default=list(SHARED_LIMIT))
    parser.add_argument("--op", nargs="+", choices=known, default=known, help="only these ops")
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
