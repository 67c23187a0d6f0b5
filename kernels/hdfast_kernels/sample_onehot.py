"""Samples of a stack of categoricals, straight-through or the classes alone, by inverse CDF from uniform numbers.

    p     = (1 - unimix) * softmax(logits) + unimix / K
    logp  = log p
    index = number of classes k with cdf_k <= uniform, at most K - 1        cdf in float32, in class order
    stoch = one_hot(index) + p - sg(p)

Axes: N rows (all leading axes), S groups, K classes.

The uniform numbers are an input, so every backend draws the same class from the same numbers (except for ties of
cdf and uniform within rounding), a captured graph needs no generator of its own, and a test can choose the
sample.

Source: DreamerV3 (arXiv 2301.04104), 1% uniform mixture; straight-through gradients (arXiv 1308.3432).
"""

import torch
from torch import Tensor

from . import dispatch
from ._triton import tl, triton
from .autograd import once_differentiable
from .numerics import (
    as_contiguous,
    check_axes,
    check_device,
    check_out,
    check_shape,
    check_unimix,
    compute_dtype,
)
from .sample_onehot_native import sample_index_native, sample_onehot_native
from .tiles import as_rows, reciprocal, row_tile, softmax_rows


def sample_onehot_reference(
    logits: Tensor, uniform: Tensor, unimix: float = 0.01
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition, in plain PyTorch; see `sample_onehot`."""
    probs, logp, index = _draw(logits, uniform, unimix)
    stoch = one_hot(index, logits.shape[-1]).view(probs.shape) + (
        probs - probs.detach()
    )  # the bracket is exactly zero
    return stoch.to(logits.dtype), index, probs.log() if logp is None else logp


def sample_index_reference(
    logits: Tensor,
    uniform: Tensor,
    unimix: float = 0.01,
    out: Tensor | None = None,
    dense: Tensor | None = None,
) -> Tensor:
    """The definition, in plain PyTorch; see `sample_index`."""
    _, _, index = _draw(logits.detach(), uniform, unimix)
    if dense is not None:
        dense.copy_(one_hot(index, logits.shape[-1]))
    return index if out is None else out.copy_(index)


def _draw(logits: Tensor, uniform: Tensor, unimix: float) -> tuple[Tensor, Tensor | None, Tensor]:
    """p, log p if p follows from it, and the class that each uniform number draws."""
    classes, logits, logp = logits.shape[-1], logits.to(compute_dtype(logits)), None
    if unimix:
        probs = torch.softmax(logits, dim=-1) * (1 - unimix) + unimix / classes
    else:
        logp = torch.log_softmax(logits, dim=-1)  # stays finite where a probability underflows
        probs = logp.exp()
    cdf = probs.detach().cumsum(dim=-1)
    index = (cdf <= uniform.unsqueeze(-1)).sum(dim=-1).clamp_(max=classes - 1)  # (..., S, K) -> (..., S)
    return probs, logp, index


def one_hot(index: Tensor, classes: int) -> Tensor:
    """(..., S) -> (..., S * classes) bool."""
    return (index.unsqueeze(-1) == torch.arange(classes, device=index.device)).flatten(-2)


@triton.jit
def sample_onehot_forward(
    logits_ptr,
    uniform_ptr,
    stoch_ptr,
    index_ptr,
    logp_ptr,
    rows,
    STOCH: tl.constexpr,  # whether to write the one-hot vectors
    LOGP: tl.constexpr,  # whether to write the log-probabilities
    UNIMIX: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # (ROWS,) of N * S categoricals
    class_ = tl.arange(0, BLOCK)[None, :]  # (1, BLOCK)
    at, inside = row[:, None] * K + class_, (row < rows)[:, None] & (class_ < K)
    logits = tl.load(logits_ptr + at, mask=inside, other=0.0).to(tl.float32)
    uniform = tl.load(uniform_ptr + row, mask=row < rows, other=0.0)
    maximum, weight, total = softmax_rows(logits, class_ < K)
    probs = weight * reciprocal(total)[:, None]
    if UNIMIX > 0:
        probs = tl.where(class_ < K, probs * (1.0 - UNIMIX) + UNIMIX / K, 0.0)
    cdf = tl.cumsum(probs, axis=1)
    index = tl.sum(((cdf <= uniform[:, None]) & (class_ < K)).to(tl.int32), axis=1)
    index = tl.minimum(index, K - 1)
    if STOCH:
        stoch = tl.where(class_ == index[:, None], 1.0, 0.0)
        tl.store(stoch_ptr + at, stoch.to(stoch_ptr.dtype.element_ty), mask=inside)
    if LOGP:
        logp = tl.log(probs) if UNIMIX > 0 else logits - maximum[:, None] - tl.log(total)[:, None]
        tl.store(logp_ptr + at, logp, mask=inside)
    tl.store(index_ptr + row, index.to(tl.int64), mask=row < rows)


@triton.jit
def sample_onehot_backward(
    logits_ptr,
    dstoch_ptr,
    dlogp_ptr,
    dlogits_ptr,
    rows,
    HAS_DSTOCH: tl.constexpr,
    HAS_DLOGP: tl.constexpr,
    UNIMIX: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    class_ = tl.arange(0, BLOCK)[None, :]
    at, inside = row * K + class_, (row < rows) & (class_ < K)
    logits = tl.load(logits_ptr + at, mask=inside, other=0.0).to(tl.float32)
    _, weight, total = softmax_rows(logits, class_ < K)
    softmax = weight * reciprocal(total)[:, None]
    mixed = (1.0 - UNIMIX) * softmax
    # the gradient to log softmax: d log p / d log softmax is the share of the softmax in p
    slope = tl.zeros((ROWS, BLOCK), tl.float32)
    if HAS_DSTOCH:
        slope += mixed * tl.load(dstoch_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_DLOGP:
        dlogp = tl.load(dlogp_ptr + at, mask=inside, other=0.0)
        if UNIMIX > 0:
            dlogp *= mixed / (mixed + UNIMIX / K)
        slope += dlogp
    dlogits = slope - softmax * tl.sum(slope, axis=1)[:, None]
    tl.store(dlogits_ptr + at, dlogits.to(dlogits_ptr.dtype.element_ty), mask=inside)


class _SampleOnehot(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, uniform: Tensor, unimix: float) -> tuple[Tensor, Tensor, Tensor]:
        K = logits.shape[-1]
        flat, tile, (uniform,) = as_rows(logits, K), row_tile(K), as_contiguous((uniform,))
        stoch, logp = torch.empty_like(flat), torch.empty_like(flat, dtype=torch.float32)
        index = torch.empty(len(flat), dtype=torch.int64, device=logits.device)
        sample_onehot_forward[(tile.programs(len(flat)),)](
            flat, uniform, stoch, index, logp, len(flat), True, True, unimix, K, tile.rows, tile.block,
            num_warps=tile.warps,
        )  # fmt: skip
        ctx.save_for_backward(flat)
        ctx.unimix = unimix
        ctx.mark_non_differentiable(index)
        ctx.set_materialize_grads(False)
        return stoch.view(logits.shape), index.view(logits.shape[:-1]), logp.view(logits.shape)

    @staticmethod
    @once_differentiable("sample_onehot")
    def backward(
        ctx, dstoch: Tensor | None, _: None, dlogp: Tensor | None
    ) -> tuple[Tensor | None, None, None]:
        given = [grad for grad in (dstoch, dlogp) if grad is not None]
        if not given:
            return None, None, None
        (logits,) = ctx.saved_tensors
        (rows, K), tile, dlogits = logits.shape, row_tile(logits.shape[1]), torch.empty_like(logits)
        dstoch, dlogp = (logits if grad is None else as_rows(grad, K) for grad in (dstoch, dlogp))
        sample_onehot_backward[(tile.programs(rows),)](
            logits, dstoch, dlogp, dlogits, rows, dstoch is not logits, dlogp is not logits, ctx.unimix,
            K, tile.rows, tile.block, num_warps=tile.warps,
        )  # fmt: skip
        return dlogits.view(given[0].shape), None, None


def sample_onehot(
    logits: Tensor, uniform: Tensor, unimix: float = 0.01, *, backend: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw one-hot latents, with straight-through gradients, and give their log-probabilities.

    Args:
        logits: (..., S, K) float32 or bfloat16, unnormalised.
        uniform: (..., S) float32 in [0, 1), one number per categorical.
        unimix: share of the uniform distribution in [0, 1).
        backend: "reference", "triton" or "native"; None lets `dispatch` choose.

    Returns:
        stoch: (..., S, K) in logits' dtype; its value is exactly one-hot, its gradient that of p.
        index: (..., S) int64, the class drawn.
        logp: (..., S, K) float32, log p with the mixture; at least log(unimix / K). Has a gradient.

    Raises ValueError on shapes or devices that do not fit or unimix outside [0, 1); `dispatch.BackendError` if
    the backend cannot run here.
    """
    _check("sample_onehot", logits, uniform, unimix)
    return dispatch.resolve("sample_onehot", backend, logits)(logits, uniform, unimix)


def _sample_index_triton(
    logits: Tensor, uniform: Tensor, unimix: float, out: Tensor | None = None, dense: Tensor | None = None
) -> Tensor:
    K = logits.shape[-1]
    flat, tile, (uniform,) = as_rows(logits.detach(), K), row_tile(K), as_contiguous((uniform,))
    index = torch.empty(logits.shape[:-1], dtype=torch.int64, device=logits.device) if out is None else out
    sample_onehot_forward[(tile.programs(len(flat)),)](
        flat, uniform, flat if dense is None else dense, index, flat, len(flat), dense is not None, False,
        unimix, K, tile.rows, tile.block, num_warps=tile.warps,
    )  # fmt: skip
    return index


def _sample_index_native(
    logits: Tensor, uniform: Tensor, unimix: float, out: Tensor | None = None, dense: Tensor | None = None
) -> Tensor:
    index = sample_index_native(logits, uniform, unimix, out)
    if dense is not None:
        dense.copy_(one_hot(index, logits.shape[-1]))
    return index


def sample_index(
    logits: Tensor,
    uniform: Tensor,
    unimix: float = 0.01,
    *,
    out: Tensor | None = None,
    dense: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Draw the same classes as `sample_onehot`, and nothing else: where no gradient is wanted, as in acting.

    Args: as of `sample_onehot`, and
        out: optional (..., S) int64, contiguous, for the classes.
        dense: optional (..., S * K) float32 or bfloat16, contiguous, that receives them as a one-hot matrix, which
            `onehot_linear` takes.

    Returns (..., S) int64. Not differentiable.

    Raises ValueError on shapes or devices that do not fit or unimix outside [0, 1), TypeError if out or dense has
    another dtype, `dispatch.BackendError` if the backend cannot run here.
    """
    _check("sample_index", logits, uniform, unimix)
    for name, tensor, shape, dtypes in (
        ("out", out, uniform.shape, (torch.int64,)),
        ("dense", dense, (*logits.shape[:-2], logits.shape[-2:].numel()), dispatch.FUSED_DTYPES),
    ):
        if tensor is not None:
            dtype = tensor.dtype if tensor.dtype in dtypes else dtypes[0]
            check_out("sample_index", name, tensor, shape, dtype, contiguous=True)
    check_device("sample_index", logits=logits, out=out, dense=dense)
    return dispatch.resolve("sample_index", backend, logits)(logits, uniform, unimix, out, dense)


def _check(op: str, logits: Tensor, uniform: Tensor, unimix: float) -> None:
    check_axes(op, "logits", logits, "...", "K")
    if not logits.shape[-1]:
        raise ValueError(f"{op}: logits have shape {tuple(logits.shape)}, expected at least one class")
    check_shape(op, "uniform", uniform, logits.shape[:-1])
    check_device(op, logits=logits, uniform=uniform)
    check_unimix(op, unimix)


dispatch.register(
    "sample_onehot",
    reference=sample_onehot_reference,
    triton=_SampleOnehot.apply,
    native=sample_onehot_native,
)
dispatch.register(
    "sample_index",
    reference=sample_index_reference,
    triton=_sample_index_triton,
    native=_sample_index_native,
)
