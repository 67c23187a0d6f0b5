"""What the tests of ops share: error budgets against float64, poisoned memory, the backends that run here.

`check_against_fp64` is the one judge of accuracy: measured against the reference in float64, an implementation may err
at most twice as much as the reference in the dtype of the inputs.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from hdfast_kernels import backends_available, dispatch

if dispatch.triton_interpreted():
    import interpreter_approximations
    import interpreter_bf16
    import interpreter_memory

    interpreter_approximations.patch()
    interpreter_bf16.patch()
    interpreter_memory.patch()

BUDGET = 2.0  # times the error of plain PyTorch
# Units in the last place of the largest value, allowed on top: with few numbers plain PyTorch may be lucky.
FLOOR = 1.0
# The same for float32 kernels with a GPU's exp, division and root: each errs up to 2 units, PyTorch's half a unit.
FAST_FLOOR = 10.0


def floor_of(dtype: torch.dtype, device: str | torch.device) -> float:
    """The floor for results of this dtype that are computed on `device`."""
    fast = torch.device(device).type == "cuda" or dispatch.triton_interpreted()
    return FAST_FLOOR if fast and dtype == torch.float32 else FLOOR


@dataclass(frozen=True)
class Backend:
    """A backend of an op on a device, as a test parameter."""

    name: str
    device: str

    def __str__(self) -> str:
        return self.name if self.device == "cpu" else f"{self.name}-{self.device}"


def backends(op: str, *, reference: bool = True) -> list[Any]:
    """pytest parameters: every backend of `op` that runs here, and is in HDFAST_TEST_BACKENDS if that is set."""
    wanted = os.environ.get("HDFAST_TEST_BACKENDS", "reference,triton,fused,native").split(",")
    out = []
    for device in ("cpu", "cuda"):
        if device == "cuda" and (not torch.cuda.is_available() or dispatch.triton_interpreted()):
            continue
        for name in backends_available(op, torch.empty(0, device=device)):
            if name in wanted and (reference or name != "reference"):
                marks = [pytest.mark.gpu] if device == "cuda" else []
                out.append(pytest.param(Backend(name, device), id=str(Backend(name, device)), marks=marks))
    return out


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Normal float64 numbers that bfloat16 can represent, so that every dtype starts from the same inputs."""
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (numbers * scale).bfloat16().double()


def check_against_fp64(
    op: Callable[..., Any],
    reference: Callable[..., Any],
    inputs: dict[str, Any],
    *,
    budget: float = BUDGET,
    floor: float | None = None,
) -> dict[str, Tensor]:
    """Compare op(**inputs) and all its gradients with reference(**inputs) in float64; AssertionError names what errs.

    `inputs` are tensors and constants in the dtypes that `op` is to take; gradients for the floating-point tensors that
    require one are those of a random linear function of all differentiable outputs. `reference` runs twice, on the same
    inputs and on float64 copies; `op` may err `budget` times as much as the first does, plus `floor` units in the last
    place of the largest value (None: `floor_of`), both by the largest error and by the root mean square. Memory that
    `op` allocates is filled with NaN beforehand. Integer outputs must be equal.

    Returns the results of `op`: outputs by their position ("0", "1", ...), gradients as "grad " and the input's name.
    """
    with poisoned_memory():
        got = _outputs_and_gradients(op, inputs)
    plain = _outputs_and_gradients(reference, inputs)
    exact = _outputs_and_gradients(reference, {name: _to_float64(value) for name, value in inputs.items()})
    assert got.keys() == plain.keys(), f"results {sorted(got)}, expected {sorted(plain)}"
    for name, value in got.items():
        assert value.shape == plain[name].shape, f"{name}: shape {value.shape}, expected {plain[name].shape}"
        assert value.dtype == plain[name].dtype, f"{name}: {value.dtype}, expected {plain[name].dtype}"
        if not value.is_floating_point():
            assert torch.equal(value, plain[name]), f"{name}: integers differ"
            continue
        assert value.isfinite().all(), (
            f"{name}: {(~value.isfinite()).sum()} of {value.numel()} are not finite"
        )
        scale = exact[name].abs().max().item() if value.numel() else 0.0
        least = floor_of(value.dtype, value.device) if floor is None else floor
        unit = torch.finfo(value.dtype).eps * scale
        for kind, measure in (("largest", _largest), ("root mean square", _root_mean_square)):
            mine, theirs = measure(value, exact[name]), measure(plain[name], exact[name])
            assert mine <= budget * theirs + least * unit, (
                f"{name}: {kind} error {mine:.3g}, plain PyTorch errs {theirs:.3g}; "
                f"largest value {scale:.3g} in {value.dtype}"
            )
    return got


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Inside the block, torch.empty gives NaN (integers: the largest), so that what is never written shows."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = fill


def _outputs_and_gradients(function: Callable[..., Any], inputs: dict[str, Any]) -> dict[str, Tensor]:
    leaves = {
        name: value.detach().clone().requires_grad_()
        if isinstance(value, Tensor) and value.requires_grad
        else value
        for name, value in inputs.items()
    }
    outputs = function(**leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    wanted = {name: leaf for name, leaf in leaves.items() if isinstance(leaf, Tensor) and leaf.requires_grad}
    result = {str(position): output.detach() for position, output in enumerate(outputs)}
    if wanted:
        ends = [output for output in outputs if output.requires_grad]
        slopes = [
            _transposed(random(*end.shape, seed=100 + k).to(end.device, end.dtype))
            for k, end in enumerate(ends)
        ]
        gradients = torch.autograd.grad(ends, list(wanted.values()), slopes)
        result |= {f"grad {name}": gradient for name, gradient in zip(wanted, gradients, strict=True)}
    return result


def _transposed(tensor: Tensor) -> Tensor:
    """The same numbers with the last two axes swapped in memory: gradients may come in any layout."""
    return tensor.mT.contiguous().mT if tensor.dim() > 1 else tensor


def _to_float64(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().double().requires_grad_(value.requires_grad)
    return value


def _largest(value: Tensor, exact: Tensor) -> float:
    return (value.double() - exact).abs().max().item() if value.numel() else 0.0


def _root_mean_square(value: Tensor, exact: Tensor) -> float:
    return (value.double() - exact).square().mean().sqrt().item() if value.numel() else 0.0
