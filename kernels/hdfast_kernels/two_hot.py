"""Regression by classification over bins that are evenly spaced in symlog space.

    bins  = linspace(low, high, K)
    code  = two-hot code of symlog(target): weight 1 - w on the bin below it, w on the bin above
    loss  = -sum_k code_k * log softmax(logits)_k
    mean  = symexp(sum_k softmax(logits)_k * bins_k)                    mean first, symexp after

with symlog(x) = sign(x) log(1 + |x|) and symexp its inverse. Axes: N rows (all leading axes), K bins.

Source: DreamerV3 (arXiv 2301.04104), equations 8-10, as its code computes them in the version that
HarmonyDream builds on.
"""

import math

import torch
from torch import Tensor

from . import dispatch
from ._triton import tl, triton
from .autograd import once_differentiable
from .numerics import as_contiguous, check_axes, check_device, check_shape, compute_dtype
from .tiles import readable_columns, reciprocal, row_tile, rows_apart, softmax_rows
from .two_hot_native import two_hot_loss_native, two_hot_mean_native

# Numbers in a tile and for each thread: four rows of 255 for one warp. Rows of 255 cannot be read in 16 bytes, and
# with more warps Triton spreads each row over all of them: every sum crosses warps, at twice the instructions.
TILE, THREAD = 1024, 32


def symlog(x: Tensor) -> Tensor:
    """sign(x) log(1 + |x|), element by element."""
    return x.sign() * x.abs().log1p()


def symexp(x: Tensor) -> Tensor:
    """sign(x) (e^|x| - 1), element by element. Its gradient is e^|x|, at zero too."""
    return torch.where(x < 0, -torch.expm1(-x), torch.expm1(x))


def symlog_bins(low: float, high: float, bins: int, like: Tensor) -> Tensor:
    """(bins,) evenly spaced from low to high, on the device and in the compute dtype of `like`; made once."""
    key = low, high, bins, compute_dtype(like), like.device
    # A tensor made while PyTorch traces has no memory, and is not cached.
    keep = type(like) in (Tensor, torch.nn.Parameter)
    found = _bins.get(key) if keep else None
    if found is None:
        found = _make_bins(*key)
        if keep and type(found) is Tensor:
            _bins[key] = found
    return found


_bins: dict[tuple[float, float, int, torch.dtype, torch.device], Tensor] = {}


def _make_bins(low: float, high: float, bins: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    # In float64 and about the centre, so that symmetric bins are exactly symmetric: a uniform distribution
    # has mean zero.
    with torch.inference_mode(False):  # a tensor kept under inference_mode could not be used in training
        offset = torch.arange(bins, dtype=torch.float64, device="cpu") - (bins - 1) / 2
        return ((low + high) / 2 + offset * ((high - low) / (bins - 1))).to(device=device, dtype=dtype)


def two_hot_loss_reference(logits: Tensor, target: Tensor, low: float = -20.0, high: float = 20.0) -> Tensor:
    """The definition, in plain PyTorch; see `two_hot_loss`."""
    bins, dtype = logits.shape[-1], compute_dtype(logits)
    position = (symlog(target.detach().to(dtype)).clamp(low, high) - low) * ((bins - 1) / (high - low))
    below = position.long().clamp(0, bins - 2)  # as an integer: NaN must give a NaN loss, not a wild gather
    above_weight = position - below
    logp = torch.log_softmax(logits.to(dtype), dim=-1)
    picked = logp.gather(-1, torch.stack([below, below + 1], dim=-1))  # (..., K) -> (..., 2)
    return -torch.lerp(picked[..., 0], picked[..., 1], above_weight)


def two_hot_mean_reference(logits: Tensor, low: float = -20.0, high: float = 20.0) -> Tensor:
    """The definition, in plain PyTorch; see `two_hot_mean`."""
    bins = symlog_bins(low, high, logits.shape[-1], logits)
    return symexp((torch.softmax(logits.to(bins.dtype), dim=-1) * bins).sum(dim=-1))


@triton.jit
def _load_logits(logits_ptr, rows, stride, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Row (ROWS,), bin (1, BLOCK) and float32 logits (ROWS, BLOCK) of this program's tile.

    Rows lie `stride` apart. WIDTH columns are read; any beyond the bins, if memory has them, hold arbitrary numbers.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    bin_ = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows)[:, None] & (bin_ < WIDTH)
    logits = tl.load(logits_ptr + row[:, None] * stride + bin_, mask=inside, other=0.0)
    return row, bin_, logits.to(tl.float32)


@triton.jit
def _store_rows(dlogits_ptr, row, bin_, dlogits, rows, K: tl.constexpr):
    """Stores the gradient of a tile's logits, in rows of K."""
    at, inside = row[:, None] * K + bin_, (row < rows)[:, None] & (bin_ < K)
    tl.store(dlogits_ptr + at, dlogits.to(dlogits_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _position(target, LOW: tl.constexpr, HIGH: tl.constexpr, K: tl.constexpr):
    """The bin below symlog(target), in [0, K - 2], and the weight of the bin above; NaN where the target is."""
    size = tl.abs(target)
    size = tl.where(size > 1e38, 1e38, size)  # infinity + 1 - infinity would be NaN
    above = 1.0 + size
    root = tl.rsqrt(above)
    # The second term is what rounding lost: all of a small target.
    size = tl.log(above) + (size - (above - 1.0)) * root * root
    position = (tl.where(target < 0, -size, size) - LOW) * ((K - 1) / (HIGH - LOW))
    position = tl.where(position > K - 1, K - 1.0, tl.where(position < 0, 0.0, position))
    below = tl.where(position < K - 1, tl.floor(position), K - 2.0)  # also for NaN
    return below.to(tl.int32), position - below


@triton.jit
def _symexp(x):
    size = tl.abs(x)
    series = 1.0 + size * (1.0 / 7)
    for order in tl.static_range(6, 1, -1):
        series = (
            1.0 + size * (1.0 / order) * series
        )  # e^x - 1 = x (1 + x/2 (1 + x/3 (...))), which near zero would cancel
    size = tl.where(size < 0.35, size * series, tl.exp(size) - 1.0)
    return tl.where(x < 0, -size, size)


@triton.jit
def _mean_bin(bin_, probs, K: tl.constexpr):
    """Each bin's and each row's mean bin's value, as the distance from the centre in units of a bin's width.

    Bins (1, BLOCK) are exact in this unit, so that the mean (ROWS,) errs relative to itself, not to the end bins.
    """
    offset = bin_.to(tl.float32) - (K - 1) / 2
    return offset, tl.sum(probs * offset, axis=1)


@triton.jit
def two_hot_loss_forward(
    logits_ptr,
    target_ptr,
    loss_ptr,
    rows,
    stride,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    K: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, bin_, logits = _load_logits(logits_ptr, rows, stride, WIDTH, ROWS, BLOCK)
    target = tl.load(target_ptr + row, mask=row < rows, other=0.0).to(tl.float32)
    below, above_weight = _position(target, LOW, HIGH, K)
    maximum, _, total = softmax_rows(logits, bin_ < K)
    # the two logits once more, from the L1 cache: cheaper than to pick them out of the row
    picked_ptr = logits_ptr + row * stride + below
    low = tl.load(picked_ptr, mask=row < rows, other=0.0).to(tl.float32) - maximum
    high = tl.load(picked_ptr + 1, mask=row < rows, other=0.0).to(tl.float32) - maximum
    loss = tl.log(total) - (low + above_weight * (high - low))
    tl.store(loss_ptr + row, loss, mask=row < rows)


@triton.jit
def two_hot_loss_backward(
    logits_ptr,
    target_ptr,
    dloss_ptr,
    dlogits_ptr,
    rows,
    stride,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    K: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, bin_, logits = _load_logits(logits_ptr, rows, stride, WIDTH, ROWS, BLOCK)
    target = tl.load(target_ptr + row, mask=row < rows, other=0.0).to(tl.float32)
    dloss = tl.load(dloss_ptr + row, mask=row < rows, other=0.0)
    below, above_weight = _position(target, LOW, HIGH, K)
    _, weight, total = softmax_rows(logits, bin_ < K)
    step, share = bin_ - below[:, None], above_weight[:, None]
    code = tl.where(step == 0, 1.0 - share, tl.where(step == 1, share, 0.0))
    dlogits = dloss[:, None] * (weight * reciprocal(total)[:, None] - code)
    _store_rows(dlogits_ptr, row, bin_, dlogits, rows, K)


@triton.jit
def two_hot_mean_forward(
    logits_ptr,
    mean_ptr,
    rows,
    stride,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    K: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, bin_, logits = _load_logits(logits_ptr, rows, stride, WIDTH, ROWS, BLOCK)
    _, weight, total = softmax_rows(logits, bin_ < K)
    _, mean = _mean_bin(bin_, weight * reciprocal(total)[:, None], K)
    mean = (LOW + HIGH) / 2 + mean * ((HIGH - LOW) / (K - 1))
    tl.store(mean_ptr + row, _symexp(mean), mask=row < rows)


@triton.jit
def two_hot_mean_backward(
    logits_ptr,
    dmean_ptr,
    dlogits_ptr,
    rows,
    stride,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    K: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, bin_, logits = _load_logits(logits_ptr, rows, stride, WIDTH, ROWS, BLOCK)
    dmean = tl.load(dmean_ptr + row, mask=row < rows, other=0.0)
    _, weight, total = softmax_rows(logits, bin_ < K)
    probs = weight * reciprocal(total)[:, None]
    offset, mean = _mean_bin(bin_, probs, K)
    width = (HIGH - LOW) / (K - 1)
    dmean *= width * tl.exp(tl.abs((LOW + HIGH) / 2 + mean * width))
    dlogits = dmean[:, None] * probs * (offset - mean[:, None])
    _store_rows(dlogits_ptr, row, bin_, dlogits, rows, K)


class _TwoHotLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, target: Tensor, low: float, high: float) -> Tensor:
        K = logits.shape[-1]
        flat, (target,), tile = rows_apart(logits, K), as_contiguous((target,)), row_tile(K, TILE, THREAD)
        loss = torch.empty(target.shape, dtype=torch.float32, device=logits.device)
        two_hot_loss_forward[(tile.programs(len(flat)),)](
            flat, target, loss, len(flat), flat.stride(0), low, high, K, readable_columns(flat, tile.block),
            tile.rows, tile.block, num_warps=tile.warps,
        )  # fmt: skip
        ctx.save_for_backward(flat, target)
        ctx.low, ctx.high = low, high
        return loss

    @staticmethod
    @once_differentiable("two_hot_loss")
    def backward(ctx, dloss: Tensor) -> tuple[Tensor, None, None, None]:
        logits, target = ctx.saved_tensors
        (rows, K), tile = logits.shape, row_tile(logits.shape[1], TILE, THREAD)
        dlogits = logits.new_empty((rows, K))
        two_hot_loss_backward[(tile.programs(rows),)](
            logits, target, dloss.contiguous(), dlogits, rows, logits.stride(0), ctx.low, ctx.high, K,
            readable_columns(logits, tile.block), tile.rows, tile.block, num_warps=tile.warps,
        )  # fmt: skip
        return dlogits.view(*dloss.shape, K), None, None, None


class _TwoHotMean(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, low: float, high: float) -> Tensor:
        K = logits.shape[-1]
        flat, tile = rows_apart(logits, K), row_tile(K, TILE, THREAD)
        mean = torch.empty(logits.shape[:-1], dtype=torch.float32, device=logits.device)
        two_hot_mean_forward[(tile.programs(len(flat)),)](
            flat, mean, len(flat), flat.stride(0), low, high, K, readable_columns(flat, tile.block),
            tile.rows, tile.block, num_warps=tile.warps,
        )  # fmt: skip
        ctx.save_for_backward(flat)
        ctx.low, ctx.high = low, high
        return mean

    @staticmethod
    @once_differentiable("two_hot_mean")
    def backward(ctx, dmean: Tensor) -> tuple[Tensor, None, None]:
        (logits,) = ctx.saved_tensors
        (rows, K), tile = logits.shape, row_tile(logits.shape[1], TILE, THREAD)
        dlogits = logits.new_empty((rows, K))
        two_hot_mean_backward[(tile.programs(rows),)](
            logits, dmean.contiguous(), dlogits, rows, logits.stride(0), ctx.low, ctx.high, K,
            readable_columns(logits, tile.block), tile.rows, tile.block, num_warps=tile.warps,
        )  # fmt: skip
        return dlogits.view(*dmean.shape, K), None, None


def two_hot_loss(
    logits: Tensor, target: Tensor, low: float = -20.0, high: float = 20.0, *, backend: str | None = None
) -> Tensor:
    """Cross-entropy of the binned prediction with the two-hot code of symlog(target).

    Args:
        logits: (..., K) float32 or bfloat16, K >= 2.
        target: (...) any float dtype, in the unit of the reward or return; beyond the end bins it counts as
            the end bin.
        low, high: the end bins, in symlog space.
        backend: "reference", "triton" or "native"; None lets `dispatch` choose.

    Returns (...) float32 (float64 for float64 logits). Differentiable in logits; target gets no gradient. A
    NaN target gives a NaN loss.

    Raises ValueError on shapes, devices or bins that do not fit; `dispatch.BackendError` if the backend cannot run
    here.
    """
    _check_bins("two_hot_loss", logits, low, high)
    check_shape("two_hot_loss", "target", target, logits.shape[:-1])
    check_device("two_hot_loss", logits=logits, target=target)
    return dispatch.resolve("two_hot_loss", backend, logits)(logits, target, low, high)


def two_hot_mean(
    logits: Tensor, low: float = -20.0, high: float = 20.0, *, backend: str | None = None
) -> Tensor:
    """The value that a binned prediction stands for: symexp of the mean bin.

    Args:
        logits: (..., K) float32 or bfloat16, K >= 2.
        low, high: the end bins, in symlog space.
        backend: "reference", "triton" or "native"; None lets `dispatch` choose.

    Returns (...) float32 (float64 for float64 logits), in the unit of the reward or return. Differentiable.

    Raises ValueError on bins that do not fit; `dispatch.BackendError` if the backend cannot run here.
    """
    _check_bins("two_hot_mean", logits, low, high)
    return dispatch.resolve("two_hot_mean", backend, logits)(logits, low, high)


def _check_bins(op: str, logits: Tensor, low: float, high: float) -> None:
    check_axes(op, "logits", logits, "...", "K")
    if logits.shape[-1] < 2 or not -math.inf < low < high < math.inf:
        raise ValueError(
            f"{op}: needs at least 2 bins and finite low < high, got {logits.shape[-1]} from {low} to {high}"
        )


dispatch.register(
    "two_hot_loss",
    reference=two_hot_loss_reference,
    triton=_TwoHotLoss.apply,
    native=two_hot_loss_native,
)
dispatch.register(
    "two_hot_mean",
    reference=two_hot_mean_reference,
    triton=_TwoHotMean.apply,
    native=two_hot_mean_native,
)
