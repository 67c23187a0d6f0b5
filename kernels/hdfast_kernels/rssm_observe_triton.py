"""rssm_observe in Triton: how the kernels of rssm_observe_kernels are launched, and the work after the scan.

Forward is six launches a step and backward seven, inside a CUDA graph, or each is one launch for all steps
(`persistent`). The gradients of matrices and norms follow from what the scan stores, in a few operations on T*B rows.

Axes: T time, B batch, D deter, U units, S groups, K classes.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ._triton import triton
from .autograd import once_differentiable
from .layer_norm_gru import _LayerNormGRU
from .layer_norm_silu import _LayerNormSiLU
from .numerics import as_contiguous
from .rssm_observe_kernels import observe_backward, observe_forward


@dataclass(frozen=True)
class Layout:
    """How a step is split into programs."""

    programs: int  # by columns
    row_programs: int  # by sequences
    BLOCK: int  # columns of a program
    SPLIT: int  # parts of a sum, one for each warp
    DEPTH: int  # depth of one part
    WHOLE: int  # products of up to so many chunks are one block of code


# A program has ROWS sequences, as a tensor-core tile has, and 8 columns, the fewest of one; 16 where there would be
# more programs than multiprocessors. Each of its WARPS sums a part of the depth, as deep as compiles without
# spilling on sm_80, 90 and 100. They are few, since they exchange their sums: on an H200 the scan takes 3.2 ms with 4,
# 3.9 with 8 and 6.3 with 16; float32 spills with 4. In a persistent launch programs wait for each other, so all must
# run at once, on at most MULTIPROCESSORS, an A100's: 128 programs of 8 columns would fit an H100, but spill there.
ROWS, MULTIPROCESSORS = 16, 108
WARPS = {torch.bfloat16: 4, torch.float32: 8}
UNROLL = 32  # rows of the latent's matrix that are read at once
# A program takes all classes of a group, as columns of a product: with more than 64 it is less deep, so that an operand
# needs at most so many bytes of shared memory, and it spills, with 128 up to 3 KB a thread.
MOST_CLASSES, OPERAND = 128, 64 * 1024


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
    split = WARPS[low]
    deepest = 64 if persistent else 128
    part = 16 if low == torch.float32 else deepest if block == 8 else deepest // 2
    whole = 3 if low == torch.float32 else 32  # float32 would spill
    return Layout(programs, row_programs, block, split, _depth(part, columns, split), whole)


def fits_one_launch(B: int, D: int, U: int, matrix: Tensor) -> bool:
    """Whether all programs for B sequences can run at the same time, `matrix` being one of the op's."""
    try:
        layout(B, D, U, matrix.dtype, True, multiprocessors(matrix.device))
    except ValueError:
        return False
    return True


def _depth(most: int, columns: int, split: int) -> int:
    """As deep as `columns` need, up to `most`."""
    return min(most, max(16, triton.next_power_of_2(-(-columns // split))))


def backward_layout(grid: Layout, columns: int, low: torch.dtype) -> Layout:
    """The same split, as deep as backward's operands allow."""
    part = 16 if low == torch.float32 else 128 if grid.BLOCK == 8 else 32
    return replace(grid, DEPTH=_depth(part, columns, grid.SPLIT))


def for_classes(grid: Layout, classes: int, low: torch.dtype) -> Layout:
    """The same split, no deeper than a product of all classes of a group, a power of two, has room for."""
    return replace(grid, DEPTH=min(grid.DEPTH, OPERAND // (grid.SPLIT * classes * low.itemsize)))


def _launch(
    kernel, tensors, numbers, grid: Layout, constants: dict, stages: int, starts: range, persistent: bool
) -> None:
    """All stages of all steps, in one launch or in one launch each."""
    common = {
        "PROGRAMS": grid.programs,
        "ROWS": ROWS,
        "BLOCK": grid.BLOCK,
        "SPLIT": grid.SPLIT,
        "DEPTH": grid.DEPTH,
        "WHOLE": grid.WHOLE,
        "num_warps": grid.SPLIT,
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
    def forward(ctx, persistent: bool, *arguments):
        *tensors, unimix, eps = arguments
        embed, action, is_first, uniform, initial_deter, initial_index, in_stoch, *weights = as_contiguous(
            tensors
        )
        T, B, S = uniform.shape
        D, U, K, low = len(initial_deter), embed.shape[-1], len(in_stoch) // S, in_stoch.dtype
        is_first = is_first.view(torch.uint8)
        if K > MOST_CLASSES:
            raise ValueError(f"rssm_observe: {K} classes a group, its kernels take up to {MOST_CLASSES}")
        grid = layout(B, D, U, low, persistent, multiprocessors(embed.device))

        def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=embed.device)

        deter, stoch, logp = empty(T, B, D), empty(T, B, S, K), empty(T, B, S, K)
        index = empty(T, B, S, dtype=torch.int64)
        in_sum, gates_sum, post_sum = empty(T, B, U), empty(T, B, 3 * D), empty(T, B, U)
        x, y = empty(T, B, U, dtype=low), empty(T, B, U, dtype=low)
        low_deter = deter if low == deter.dtype else empty(T, B, D, dtype=low)
        moments = empty(2, T, B, 2)
        constants = {"T": T, "D": D, "U": U, "S": S, "K": K, "unimix": unimix, **_widths(D=D, U=U)}
        constants["CLASSES"] = max(8, triton.next_power_of_2(K))
        grid = for_classes(grid, constants["CLASSES"], low)
        constants_forward = constants | {"UNROLL": min(S, UNROLL)} | _chunks(grid, D=D, U=U)
        inputs = (embed, action, is_first, uniform, initial_deter, initial_index, in_stoch, *weights)
        outputs = (deter, stoch, index, logp, in_sum, gates_sum, post_sum, x, low_deter, y, moments)
        _launch(observe_forward, inputs + outputs, (B, eps), grid, constants_forward, 6, range(T), persistent)
        saved = (is_first, initial_deter, initial_index, in_stoch, *weights)
        ctx.save_for_backward(
            *saved, deter, index, logp, in_sum, gates_sum, post_sum, x, low_deter, y, moments
        )
        ctx.settings = grid, constants, eps, persistent
        ctx.dtypes = [tensor.dtype for tensor in tensors]
        ctx.mark_non_differentiable(index)
        return deter, stoch, index, logp

    @staticmethod
    @once_differentiable("rssm_observe")
    def backward(ctx, grad_deter, grad_stoch, _, grad_logp):
        is_first, initial_deter, initial_index, in_stoch, *rest = ctx.saved_tensors
        in_weight, in_bias, gru, gru_weight, gru_bias, post_deter, post_weight, post_bias, logit_weight, _ = (
            rest[:10]
        )
        deter, index, logp, in_sum, gates_sum, post_sum, x, low_deter, y, moments = rest[10:]
        grid, constants, eps, persistent = ctx.settings
        (T, B, D), (S, K), U, low = deter.shape, logp.shape[2:], len(post_deter), gru.dtype

        def empty(width: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(T, B, width, dtype=dtype, device=deter.device)

        of_logits, of_gates, of_post, of_in = (empty(width, low) for width in (S * K, 3 * D, U, U))
        of_y, of_x, of_total, of_kept, of_before = empty(U), empty(U), empty(D), empty(D), empty(D)
        columns = (matrix.t().contiguous() for matrix in (gru, post_deter, logit_weight))
        gru_columns, post_columns, logit_columns = columns
        inputs = (
            *(is_first, initial_deter, in_stoch, in_weight, in_bias, gru_columns, gru_weight, gru_bias),
            *(post_columns, post_weight, post_bias, logit_columns),
            *(deter, logp, in_sum, gates_sum, post_sum, moments),
            *(grad_deter.contiguous(), grad_stoch.contiguous(), grad_logp.contiguous()),
        )
        outputs = (of_logits, of_y, of_post, of_total, of_gates, of_kept, of_before, of_x, of_in)
        grid = for_classes(backward_layout(grid, max(D, U), low), constants["CLASSES"], low)
        constants = constants | _chunks(grid, U=U, GATE=3 * D, LATENT=S * K)
        steps = range(T - 1, -1, -1)
        _launch(observe_backward, inputs + outputs, (B, eps), grid, constants, 7, steps, persistent)

        first = is_first.view(torch.bool).clone()
        first[:1] = True
        before = torch.where(first[..., None], initial_deter, deter.roll(1, 0))
        chosen = torch.where(first[..., None], initial_index, index.roll(1, 0))
        in_gradients = _pull(_LayerNormSiLU, (in_sum, in_weight, in_bias), of_x, eps)
        post_gradients = _pull(_LayerNormSiLU, (post_sum, post_weight, post_bias), of_y, eps)
        _, _, *gru_gradients = _pull(_LayerNormGRU, (gates_sum, before, gru_weight, gru_bias), of_total, eps)
        latent = (chosen[..., None] == torch.arange(K, device=chosen.device)).flatten(-2).to(low)
        of_initial = ((of_kept + of_before) * first[..., None]).sum((0, 1))
        embed_dtype, action_dtype = ctx.dtypes[:2]
        gradients = (
            *(
                of_post if embed_dtype == low else post_gradients[0],
                of_in if action_dtype == low else in_gradients[0],
            ),
            *(None, None, of_initial, None),
            *(_outer(latent, of_in), *in_gradients[1:]),
            *(_outer(of_gates, torch.cat([before.to(low), x], -1)), *gru_gradients),
            *(_outer(of_post, low_deter), *post_gradients[1:]),
            *(_outer(of_logits, y), of_logits.sum((0, 1), dtype=torch.float32)),
        )
        typed = [g if g is None else g.to(d) for g, d in zip(gradients, ctx.dtypes, strict=True)]
        return None, *typed, None, None


def _chunks(grid: Layout, **lengths: int) -> dict[str, int]:
    return {f"{name}_CHUNKS": -(-length // (grid.SPLIT * grid.DEPTH)) for name, length in lengths.items()}


def _widths(**lengths: int) -> dict[str, int]:
    return {f"{name}_WIDTH": triton.next_power_of_2(length) for name, length in lengths.items()}


def _pull(op, inputs: tuple[Tensor, ...], grad: Tensor, eps: float) -> tuple[Tensor, ...]:
    """The gradients of the inputs of op(*inputs, eps)."""
    with torch.enable_grad():
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        return torch.autograd.grad(op.apply(*leaves, eps), leaves, grad)


def _outer(grad: Tensor, operand: Tensor) -> Tensor:
    """The gradient of a matrix: grad (T, B, out), operand (T, B, in) -> (out, in), in one GEMM."""
    return grad.flatten(0, 1).mT @ operand.flatten(0, 1)


def rssm_observe_triton(*arguments: Tensor | float, persistent: bool = False) -> tuple[Tensor, ...]:
    """`rssm_observe` in Triton, same arguments; `persistent`: one launch a direction, not six or seven a step."""
    return _Observe.apply(persistent, *arguments)
