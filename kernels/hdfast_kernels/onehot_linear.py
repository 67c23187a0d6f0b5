"""A linear layer whose input is a stack of one-hot vectors: the sum of one row of the weight per group.

    y = onto + sum over s of weight[s * K + index[s]]        (equal to onto + concat(one_hot(index)) @ weight)

Axes: N rows (all leading axes), S groups, K classes, U units.

It reads S of S*K rows: K times fewer operations than the GEMM. The latents of DreamerV3 (arXiv 2301.04104)
are such stacks, sampled with straight-through gradients; `straight_through` carries that gradient to the
latents without a forward GEMM. On a GPU, tensor cores are faster still once the one-hot matrix is in memory:
`expand_onehot` makes it once for all layers that read the same latents.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import dispatch
from ._triton import tl, triton
from .autograd import once_differentiable, without_autocast
from .numerics import as_contiguous, check_axes, check_device, check_shape, check_tensor, compute_dtype
from .onehot_linear_native import onehot_linear_native
from .tiles import as_rows, row_tile

# Forward gathers from a table that lies in the L2 cache (1 MiB at 1,024 x 512 bfloat16) and is bound by
# latency: 8 numbers a thread are one 16-byte load, and 8 groups at once keep 8 of them in flight. On an H200 it takes
# 7.7 µs for 1,024 rows, a product with a one-hot matrix made in registers 11.3, a library's with one in memory 4.
FORWARD_COLUMNS, FORWARD_TILE, FORWARD_THREAD, FORWARD_UNROLL = 512, 1024, 8, 8
EXPAND_BLOCK = 2048  # numbers of a one-hot matrix that a program writes, 16 a thread
# Backward is a product of matrices, the one-hot one made in registers. No two programs share an output: no atomics, and
# the rows are added up in one order. In bfloat16 a program has 4 groups, whose 128 classes fill the tensor cores and
# read the gradient once; float32 has no more registers than for one group. More classes than 128, as of an
# environment's actions, are split among programs. Where rows are many, so are the programs: each has a part of the
# rows, at least BACKWARD_PART tiles of them, and the parts are added up after.
BACKWARD_CLASSES, BACKWARD_COLUMNS, BACKWARD_PART, BACKWARD_PARTS = 128, 128, 32, 8
# Numbers that PyTorch's backward pass of a bag of embeddings counts in 32 bits on CUDA; it keeps one for each of them.
_EMBEDDING_LIMIT = 2**29


def onehot_linear_reference(
    index: Tensor, weight: Tensor, straight_through: Tensor | None = None, onto: Tensor | None = None
) -> Tensor:
    """The definition, in plain PyTorch; see `onehot_linear`."""
    groups, rows, dtype = index.shape[-1], weight.shape[0], compute_dtype(weight)
    first_row = torch.arange(0, rows, rows // groups, device=index.device)  # (S,)
    bags = (index + first_row).reshape(-1, groups)  # (..., S) -> (N, S)
    # In the compute dtype: the dense gradient of a bfloat16 table would add up thousands of rows in bfloat16.
    table, most = weight.to(dtype), max(1, (_EMBEDDING_LIMIT - 1) // (groups * weight.shape[1]))
    if groups == 1:
        parts = [F.embedding(bags, table)]  # with no bags to sort for the gradient
    else:
        parts = [F.embedding_bag(some, table, mode="sum") for some in bags.split(most)]
    out = parts[0] if len(parts) == 1 else torch.cat(parts)
    out = out.view(*index.shape[:-1], weight.shape[1])
    out = (out if onto is None else out + onto).to(weight.dtype)
    return out if straight_through is None else _StraightThrough.apply(out, straight_through, weight)


class _StraightThrough(torch.autograd.Function):
    """Passes `out` on, and hands the latents the gradient they would have had from a dense linear layer."""

    @staticmethod
    def forward(ctx, out: Tensor, straight_through: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.latent_shape, ctx.latent_dtype = straight_through.shape, straight_through.dtype
        return out.view_as(out)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        (weight,) = ctx.saved_tensors
        grad_latent = None
        if ctx.needs_input_grad[1]:
            grad_latent = straight_through_gradient(grad, weight, ctx.latent_shape, ctx.latent_dtype)
        return grad, grad_latent, None


def straight_through_gradient(grad: Tensor, weight: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """grad (..., U), weight (S*K, U) -> the latents' gradient (..., S, K): one GEMM, in every backend."""
    return (grad @ weight.mT).view(shape).to(dtype)


@triton.jit
def onehot_linear_forward(
    index_ptr,
    weight_ptr,
    onto_ptr,
    y_ptr,
    rows,
    ONTO: tl.constexpr,  # whether there is something to add to
    S: tl.constexpr,
    K: tl.constexpr,
    U: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]  # (ROWS, 1)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]  # (1, BLOCK)
    inside = (row < rows) & (column < U)
    y = tl.zeros((ROWS, BLOCK), tl.float32)
    if ONTO:
        y += tl.load(onto_ptr + row * U + column, mask=inside, other=0.0).to(tl.float32)
    for group in tl.range(S, loop_unroll_factor=UNROLL):
        picked = tl.load(index_ptr + row * S + group, mask=row < rows, other=0).to(tl.int64) + group * K
        y += tl.load(weight_ptr + picked * U + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * U + column, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def onehot_linear_expand_forward(index_ptr, dense_ptr, numbers, K: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK numbers of the one-hot matrix (N, S*K) of classes (N, S)."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    group = at // K
    picked = tl.load(index_ptr + group, mask=at < numbers, other=-1).to(tl.int32)
    here = picked == (at - group * K).to(tl.int32)
    tl.store(dense_ptr + at, tl.where(here, 1.0, 0.0).to(dense_ptr.dtype.element_ty), mask=at < numbers)


@triton.jit
def onehot_linear_backward(
    index_ptr,
    dy_ptr,
    dweight_ptr,
    rows,
    ITERATIONS: tl.constexpr,  # tiles of ROWS that cover a part of the rows
    S: tl.constexpr,
    K: tl.constexpr,
    U: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    CLASSES: tl.constexpr,
    SHARES: tl.constexpr,  # programs among which the classes of a group are split, CLASSES for each
    BLOCK: tl.constexpr,
):
    """A part's sum of some groups' rows of the weight gradient: one_hot.T @ dy, with the one-hot made in registers."""
    group = tl.program_id(0) // SHARES * GROUPS + tl.arange(0, GROUPS)  # (GROUPS,)
    first = tl.program_id(0) % SHARES * CLASSES
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]  # (1, BLOCK)
    part = tl.program_id(2).to(tl.int64)
    class_ = first + tl.arange(0, CLASSES)[None, :, None]
    dweight = tl.zeros((GROUPS * CLASSES, BLOCK), tl.float32)
    for iteration in range(ITERATIONS):
        row = (part * ITERATIONS + iteration) * ROWS + tl.arange(0, ROWS)
        known = (row < rows)[None, :] & (group < S)[:, None]  # (GROUPS, ROWS)
        picked = tl.load(index_ptr + row[None, :] * S + group[:, None], mask=known, other=-1)
        inside = (row < rows)[:, None] & (column < U)
        dy = tl.load(dy_ptr + row[:, None] * U + column, mask=inside, other=0.0)  # (ROWS, BLOCK)
        one_hot = tl.where(picked[:, None, :] == class_, 1.0, 0.0).to(dy.dtype)  # (GROUPS, CLASSES, ROWS)
        one_hot = tl.reshape(one_hot, (GROUPS * CLASSES, ROWS))
        dweight = tl.dot(one_hot, dy, dweight, input_precision="ieee")  # tf32 would round a float32 dy
    line = tl.arange(0, GROUPS * CLASSES)[:, None]
    group = tl.program_id(0) // SHARES * GROUPS + line // CLASSES
    class_ = first + line % CLASSES
    at = (part * S * K + group * K + class_) * U + column
    tl.store(
        dweight_ptr + at,
        dweight.to(dweight_ptr.dtype.element_ty),
        mask=(group < S) & (class_ < K) & (column < U),
    )


class _OnehotLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, index: Tensor, weight: Tensor, straight_through: Tensor | None, onto: Tensor | None
    ) -> Tensor:
        S, (SK, U) = index.shape[-1], weight.shape
        flat, (weight,) = as_rows(index, S), as_contiguous((weight,))
        y = weight.new_empty((len(flat), U))
        tile = row_tile(min(U, FORWARD_COLUMNS), FORWARD_TILE, FORWARD_THREAD)
        onehot_linear_forward[(tile.programs(len(flat)), triton.cdiv(U, tile.block))](
            flat,
            weight,
            y if onto is None else as_rows(onto, U),
            y,
            len(flat),
            onto is not None,
            S,
            SK // S,
            U,
            tile.rows,
            tile.block,
            min(S, FORWARD_UNROLL),
            num_warps=tile.warps,
        )
        ctx.save_for_backward(flat, weight)
        ctx.latent = None if straight_through is None else (straight_through.shape, straight_through.dtype)
        return y.view(*index.shape[:-1], U)

    @staticmethod
    @once_differentiable("onehot_linear")
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        index, weight = ctx.saved_tensors
        dweight = dlatent = None
        if ctx.needs_input_grad[1]:
            dweight = _weight_gradient(index, as_rows(dy, weight.shape[1]), weight)
        if ctx.needs_input_grad[2]:
            dlatent = straight_through_gradient(dy, weight, *ctx.latent)
        return None, dweight, dlatent, dy if ctx.needs_input_grad[3] else None


class _DenseLinear(torch.autograd.Function):
    """onto + dense @ weight, dense the one-hot matrix (..., S*K): what `_OnehotLinear` is, as products of a library."""

    @staticmethod
    def forward(
        ctx, dense: Tensor, weight: Tensor, straight_through: Tensor | None, onto: Tensor | None
    ) -> Tensor:
        flat = as_rows(dense, len(weight))
        y = flat @ weight if onto is None else torch.addmm(as_rows(onto, weight.shape[1]), flat, weight)
        ctx.save_for_backward(flat, weight)
        ctx.latent = None if straight_through is None else (straight_through.shape, straight_through.dtype)
        return y.view(*dense.shape[:-1], weight.shape[1])

    @staticmethod
    @once_differentiable("onehot_linear")
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        flat, weight = ctx.saved_tensors
        dweight = dlatent = None
        if ctx.needs_input_grad[1]:
            dweight = flat.mT @ as_rows(dy, weight.shape[1])
        if ctx.needs_input_grad[2]:
            dlatent = straight_through_gradient(dy, weight, *ctx.latent)
        return None, dweight, dlatent, dy if ctx.needs_input_grad[3] else None


def _weight_gradient(index: Tensor, dy: Tensor, weight: Tensor) -> Tensor:
    """index (rows, S), dy (rows, U) -> the gradient of weight (S*K, U), in its dtype."""
    (rows, S), (SK, U), half = index.shape, weight.shape, weight.dtype == torch.bfloat16
    # a tensor core's product has at least 16 rows
    classes = min(BACKWARD_CLASSES, max(16, triton.next_power_of_2(SK // S)))
    shares = triton.cdiv(SK // S, classes)
    groups = max(1, min(triton.next_power_of_2(S), BACKWARD_CLASSES // classes)) if half else 1
    tile = 64 if half else 32
    tiles = triton.cdiv(rows, tile)
    parts = max(1, min(tiles // BACKWARD_PART, BACKWARD_PARTS))
    out = weight.new_empty((parts, SK, U), dtype=weight.dtype if parts == 1 else torch.float32)
    onehot_linear_backward[(triton.cdiv(S, groups) * shares, triton.cdiv(U, BACKWARD_COLUMNS), parts)](
        index, dy, out, rows, triton.cdiv(tiles, parts), S, SK // S, U, tile, groups, classes, shares,
        BACKWARD_COLUMNS, num_warps=8, num_stages=3 if half else 2,
    )  # fmt: skip
    return out[0] if parts == 1 else out.sum(0).to(weight.dtype)


def onehot_linear(
    index: Tensor,
    weight: Tensor,
    straight_through: Tensor | None = None,
    onto: Tensor | None = None,
    dense: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """A linear layer without bias on one-hot latents that are given by their class indices.

    Args:
        index: (..., S) integer, the class of each group in [0, K), K = weight.shape[0] // S. Only native checks
            that: elsewhere the result for other values is undefined.
        weight: (S*K, U) float32 or bfloat16, group-major: row s*K + k belongs to class k of group s.
        straight_through: optional (..., S, K) latents that `index` stands for. Their value is not read; they
            receive the gradient `grad @ weight.T`.
        onto: optional (..., U) in weight's dtype, what the rows are added to before the sum is rounded.
        dense: optional (..., S*K) in weight's dtype, what `expand_onehot` makes of index, without a gradient. Triton
            leaves the product to a library then; the others do not read it.
        backend: "reference", "triton" or "native"; None lets `dispatch` choose.

    Returns (..., U) in weight's dtype, summed in float32. Differentiable in weight, onto and, as said, in
    straight_through.

    Raises ValueError on shapes or devices that do not fit; TypeError if index is not integer, or onto or dense of
    another dtype than weight; IndexError, from native, for a class outside [0, K); `dispatch.BackendError` if the
    backend cannot run here.
    """
    check_axes("onehot_linear", "index", index, "...", "S")
    check_tensor("onehot_linear", "weight", weight)
    groups = index.shape[-1]
    if index.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"onehot_linear: index has dtype {index.dtype}, expected int64 or int32")
    if weight.ndim != 2 or not groups or weight.shape[0] % groups:
        raise ValueError(
            f"onehot_linear: weight has shape {tuple(weight.shape)}, expected ({groups} groups * K, U)"
        )
    if straight_through is not None:
        check_shape(
            "onehot_linear", "straight_through", straight_through, (*index.shape, weight.shape[0] // groups)
        )
    if onto is not None:
        check_shape("onehot_linear", "onto", onto, (*index.shape[:-1], weight.shape[1]))
        if onto.dtype != weight.dtype:
            raise TypeError(
                f"onehot_linear: onto has dtype {onto.dtype}, expected that of weight, {weight.dtype}"
            )
    if dense is not None:
        check_shape("onehot_linear", "dense", dense, (*index.shape[:-1], weight.shape[0]))
        if dense.dtype != weight.dtype:
            raise TypeError(
                f"onehot_linear: dense has dtype {dense.dtype}, expected that of weight, {weight.dtype}"
            )
    check_device(
        "onehot_linear", weight=weight, index=index, straight_through=straight_through, onto=onto, dense=dense
    )
    if dense is not None and dispatch.resolve_name("onehot_linear", backend, weight) == "triton":
        return without_autocast(_DenseLinear.apply)(dense.detach(), weight, straight_through, onto)
    return dispatch.resolve("onehot_linear", backend, weight)(index, weight, straight_through, onto)


def expand_onehot(index: Tensor, classes: int, dtype: torch.dtype) -> Tensor | None:
    """The one-hot matrix of classes (..., S) integer in [0, classes), (..., S * classes) of `dtype`.

    None where `onehot_linear` is faster without: in float32, and where it does not run on Triton.
    """
    like = torch.empty(0, dtype=dtype, device=index.device)
    if dtype != torch.bfloat16 or dispatch.resolve_name("onehot_linear", None, like) != "triton":
        return None
    return dispatch.recorded("onehot_matrix", onehot_matrix)(index.contiguous(), classes, dtype)


def onehot_matrix(index: Tensor, classes: int, dtype: torch.dtype) -> Tensor:
    """`expand_onehot` in Triton."""
    dense = torch.empty((*index.shape[:-1], index.shape[-1] * classes), dtype=dtype, device=index.device)
    programs = max(1, triton.cdiv(dense.numel(), EXPAND_BLOCK))
    with dispatch.launching_on(index.device):
        onehot_linear_expand_forward[(programs,)](
            index, dense, dense.numel(), classes, EXPAND_BLOCK, num_warps=4
        )
    return dense


dispatch.register(
    "onehot_linear",
    reference=onehot_linear_reference,
    triton=_OnehotLinear.apply,
    native=onehot_linear_native,
)
