"""rssm_observe in Triton: how the kernels of rssm_observe_kernels are launched, and what is done after the scan.

Forward and backward are five launches a step, inside a CUDA graph, or one launch for all steps (`persistent`). The
gradients of matrices, norms, embed and action follow from what the scan leaves, in a few operations on T*B rows.

Axes: T time, B batch, D deter, U units, S groups, K classes.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from ._triton import triton
from .layer_norm_gru import layer_norm_gru_reference
from .layer_norm_silu import layer_norm_silu_reference
from .rssm_observe_kernels import observe_backward, observe_forward


@dataclass(frozen=True)
class Layout:
    """How a step is split into programs."""

    programs: int  # by columns
    row_programs: int  # by sequences
    BLOCK: int  # columns of a program
    DEPTH: int  # of one of SPLIT parts of a sum


# A tensor-core tile has 16 rows. 8 warps share a sum, each with a part of its depth: as deep as compiles without
# spilling on sm_80, 90 and 100, 64 at most (an operand then takes 32 registers a thread). 8 columns are the least of
# a tensor-core tile; 16 where there are more programs than multiprocessors. Programs that wait for each other must
# all be running: persistent, they must not exceed the multiprocessors. More than an A100's are not used: 128 programs
# of 8 columns would fit into one wave of an H100, and spill there or on a B200, whatever the depth.
ROWS, SPLIT, MULTIPROCESSORS = 16, 8, 108


def multiprocessors(device: torch.device) -> int:
    """How many programs may run at the same time."""
    if device.type != "cuda":
        return MULTIPROCESSORS
    return min(MULTIPROCESSORS, torch.cuda.get_device_properties(device).multi_processor_count)


def layout(B: int, D: int, U: int, low: torch.dtype, persistent: bool, at_once: int) -> Layout:
    """The split of a step for a chip with `at_once` multiprocessors.

    Raises ValueError where a persistent kernel would need more than 32 columns a program.
    """
    row_programs, columns, block = max(1, -(-B // ROWS)), max(D, U), 8
    widest = 32 if persistent else 16
    while -(-columns // block) * row_programs > at_once and block < widest:
        block *= 2
    programs = -(-columns // block)
    if persistent and programs * row_programs > at_once:
        raise ValueError(
            f"rssm_observe: {B} sequences with {columns} columns do not fit one persistent launch"
        )
    part = 16 if low == torch.float32 else 32 if persistent else 64
    depth = min(part, max(16, triton.next_power_of_2(-(-columns // SPLIT))))
    return Layout(programs, row_programs, block, depth)


def _launch(
    kernel, tensors, numbers, grid: Layout, constants: dict, stages: int, starts: range, persistent: bool
) -> None:
    """All stages of all steps, in one launch or in one launch each."""
    common = {
        "PROGRAMS": grid.programs,
        "ROWS": ROWS,
        "BLOCK": grid.BLOCK,
        "SPLIT": SPLIT,
        "DEPTH": grid.DEPTH,
    }
    common |= {
        "SLOTS": triton.next_power_of_2(grid.programs),
        "num_warps": SPLIT,
        "num_stages": 1,
    } | constants
    counter = torch.zeros(1, dtype=torch.int32, device=tensors[0].device)
    run = kernel[(grid.programs, grid.row_programs)]
    if persistent:
        arguments = (*tensors, counter, starts[0], *numbers)
        run(*arguments, STAGE=-1, STEPS=len(starts), launch_cooperative_grid=True, **common)
        return
    for start in starts:
        for stage in range(stages):
            run(*tensors, counter, start, *numbers, STAGE=stage, STEPS=1, **common)


class _Observe(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, persistent: bool, *arguments):
        *tensors, unimix, eps = arguments
        embed, action, is_first, uniform, initial_deter, initial_index, in_stoch, *weights = map(
            _contiguous, tensors
        )
        T, B, S = uniform.shape
        D, U, K = len(initial_deter), embed.shape[-1], len(in_stoch) // S
        is_first = is_first.view(torch.uint8)
        grid = layout(B, D, U, in_stoch.dtype, persistent, multiprocessors(embed.device))

        def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=embed.device)

        deter, stoch, logp = empty(T, B, D), empty(T, B, S, K), empty(T, B, S, K)
        index = empty(T, B, S, dtype=torch.int64)
        in_sum, gates_sum, post_sum = empty(T, B, U), empty(T, B, 3 * D), empty(T, B, U)
        moments, partial = empty(3, T, B, 2), empty(T, grid.programs, B, 2)
        constants = {"T": T, "D": D, "U": U, "S": S, "K": K, **_chunks(grid, D=D, U=U)}
        constants |= {"CLASSES": max(8, triton.next_power_of_2(K)), "unimix": unimix}
        inputs = (embed, action, is_first, uniform, initial_deter, initial_index, in_stoch, *weights)
        outputs = (deter, stoch, index, logp, in_sum, gates_sum, post_sum, moments, partial)
        groups = {"GROUPS": triton.next_power_of_2(S)}
        _launch(
            observe_forward, inputs + outputs, (B, eps), grid, constants | groups, 5, range(T), persistent
        )
        saved = (is_first, initial_deter, initial_index, in_stoch, *weights)
        ctx.save_for_backward(*saved, deter, index, logp, in_sum, gates_sum, post_sum, moments)
        ctx.settings = grid, constants, eps, persistent
        ctx.dtypes = [tensor.dtype for tensor in tensors]
        ctx.mark_non_differentiable(index)
        return deter, stoch, index, logp

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_deter, grad_stoch, _, grad_logp):
        is_first, initial_deter, initial_index, in_stoch, *rest = ctx.saved_tensors
        in_weight, in_bias, gru, gru_weight, gru_bias, post_deter, post_weight, post_bias, logit_weight, _ = (
            rest[:10]
        )
        deter, index, logp, in_sum, gates_sum, post_sum, moments = rest[10:]
        grid, constants, eps, persistent = ctx.settings
        (T, B, D), (S, K), U, low = deter.shape, logp.shape[2:], len(post_deter), gru.dtype

        def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=deter.device)

        of_logits, of_gates = empty(T, B, S * K, dtype=low), empty(T, B, 3 * D, dtype=low)
        of_y, of_x, of_total, of_before = empty(T, B, U), empty(T, B, U), empty(T, B, D), empty(T, B, D)
        inputs = (
            *(
                is_first,
                initial_deter,
                in_stoch,
                in_weight,
                in_bias,
                gru.t().contiguous(),
                gru_weight,
                gru_bias,
            ),
            *(post_deter.t().contiguous(), post_weight, post_bias, logit_weight.t().contiguous()),
            *(deter, logp, in_sum, gates_sum, post_sum, moments),
            *(grad_deter.contiguous(), grad_stoch.contiguous(), grad_logp.contiguous()),
        )
        outputs = (of_logits, of_y, of_total, of_gates, of_before, of_x, empty(T, grid.programs, B, 2))
        if grid.BLOCK > 8:  # backward holds more operands than forward
            grid = replace(grid, DEPTH=min(grid.DEPTH, 32))
        constants = constants | _chunks(grid, D=D, U=U, GATE=3 * D, LATENT=S * K)
        steps = range(T - 1, -1, -1)
        _launch(observe_backward, inputs + outputs, (B,), grid, constants, 5, steps, persistent)

        first = is_first.view(torch.bool).clone()
        first[:1] = True
        before = torch.where(first[..., None], initial_deter, deter.roll(1, 0))
        chosen = torch.where(first[..., None], initial_index, index.roll(1, 0))
        x, (of_in, of_in_weight, of_in_bias) = _pull(
            layer_norm_silu_reference, (in_sum, in_weight, in_bias), of_x, eps
        )
        y, (of_post, of_post_weight, of_post_bias) = _pull(
            layer_norm_silu_reference, (post_sum, post_weight, post_bias), of_y, eps
        )
        _, (_, direct, of_gru_weight, of_gru_bias) = _pull(
            layer_norm_gru_reference, (gates_sum, before, gru_weight, gru_bias), of_total, eps
        )
        latent = (chosen[..., None] == torch.arange(K, device=chosen.device)).flatten(-2).to(low)
        of_initial = ((direct + of_before) * first[..., None]).sum((0, 1))
        gradients = (
            *(of_post, of_in, None, None, of_initial, None),
            *(_outer(latent, of_in.to(low)), of_in_weight, of_in_bias),
            *(_outer(of_gates, torch.cat([before, x], -1).to(low)), of_gru_weight, of_gru_bias),
            *(_outer(of_post.to(low), deter.to(low)), of_post_weight, of_post_bias),
            *(_outer(of_logits, y.to(low)), of_logits.sum((0, 1), dtype=torch.float32)),
        )
        typed = [g if g is None else g.to(d) for g, d in zip(gradients, ctx.dtypes, strict=True)]
        return None, *typed, None, None


def _contiguous(tensor: Tensor) -> Tensor:
    return tensor.contiguous()


def _chunks(grid: Layout, **lengths: int) -> dict[str, int]:
    return {f"{name}_CHUNKS": -(-length // (SPLIT * grid.DEPTH)) for name, length in lengths.items()}


def _pull(
    function, inputs: tuple[Tensor, ...], grad: Tensor, eps: float
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """function(*inputs, eps) and the gradients of the inputs."""
    with torch.enable_grad():
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        out = function(*leaves, eps)
        return out.detach(), torch.autograd.grad(out, leaves, grad)


def _outer(grad: Tensor, operand: Tensor) -> Tensor:
    """The gradient of a matrix: grad (T, B, out), operand (T, B, in) -> (out, in), in one GEMM."""
    return grad.flatten(0, 1).mT @ operand.flatten(0, 1)


def rssm_observe_triton(*arguments: Tensor | float, persistent: bool = False) -> tuple[Tensor, ...]:
    """`rssm_observe` in Triton, same arguments; `persistent`: one launch a direction, not five a step."""
    return _Observe.apply(persistent, *arguments)
