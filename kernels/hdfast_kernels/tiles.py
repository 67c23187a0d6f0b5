"""Tiles of rows: how the Triton kernels split their work, and the device functions they share.

A program works on a tile of ROWS x BLOCK numbers, BLOCK the columns of a row rounded up to a power of two: a
row is reduced in registers and read once. Launch settings are data, chosen by the reasons given here and
checked by `python -m hdfast_kernels.report`; there is no autotuning, which would time kernels inside a
captured graph.
"""

from dataclasses import dataclass

from torch import Tensor

from ._triton import tl, triton

# Numbers in a tile and for each thread of a kernel that streams: two 16-byte loads of bfloat16 for each
# operand, enough bytes in flight at 4 programs a multiprocessor, and few enough registers for that many.
TILE, THREAD = 2048, 16
# At most this many programs accumulate the gradient of a parameter, each in its own row of partial sums,
# which one reduction adds up in a fixed order: 4 a multiprocessor of an H100 (132), and no atomics, so that a
# run repeats bit by bit.
PARTIALS = 528
# Rows, and warps, of a tile whose rows belong to one warp each.
WARPS = 4
# Rows and columns of them that a program of that reduction reads at once.
SUM_ROWS, SUM_COLUMNS = 1024, 8


@dataclass(frozen=True)
class Tile:
    """ROWS x BLOCK numbers for one program of `warps` warps; see `row_sums` for rows in parts."""

    rows: int
    block: int
    warps: int
    parts: int = 1

    @property
    def lanes(self) -> int:
        """Columns of a part."""
        return self.block // self.parts

    def programs(self, rows: int) -> int:
        """How many tiles cover that many rows; at least 1, since a launch of none is an error."""
        return max(1, -(-rows // self.rows))


def row_tile(columns: int, numbers: int = TILE, thread: int = THREAD) -> Tile:
    """As many rows as fit a tile of so many numbers; a wider row gets its own tile, and more warps."""
    block = triton.next_power_of_2(columns)
    rows = max(1, numbers // block)
    return Tile(rows, block, min(16, max(1, rows * block // (32 * thread))))


def tile_of_warps(columns: int, itemsize: int) -> Tile | None:
    """A row for each of four warps, in parts that the warp loads with 16 bytes a thread.

    None for rows that fit one such part, which `row_tile` gives to one warp anyway, and for rows of more than 512
    columns, for which a warp has too few registers.
    """
    block, lanes = triton.next_power_of_2(columns), 32 * 16 // itemsize
    return Tile(WARPS, block, WARPS, block // lanes) if lanes < block <= 512 else None


def as_rows(x: Tensor, columns: int) -> Tensor:
    """(..., columns) -> (N, columns), contiguous; also for an empty batch."""
    return x.resolve_neg().contiguous().view(x.numel() // columns, columns)


def rows_apart(x: Tensor, columns: int) -> Tensor:
    """(..., columns) -> (N, columns) with numbers side by side in a row, rows any distance apart; a view if possible.

    So the kernels read the aligned rows of a padded layer without a copy.
    """
    flat = x.resolve_neg().flatten(0, -2) if x.dim() > 1 else x.resolve_neg()[None]
    return flat if flat.stride(1) == 1 else as_rows(flat, columns)


def readable_columns(flat: Tensor, block: int) -> int:
    """How many columns of each row of (N, columns) a kernel may read: `block` if memory has that many, else its own.

    What lies beyond the row must not matter to the kernel. It then needs no mask, which would rule out 16-byte loads.
    """
    (rows, columns), stride = flat.shape, flat.stride(0)
    end = flat.storage_offset() + (rows - 1) * stride + block
    inside = stride >= block and end * flat.element_size() <= flat.untyped_storage().nbytes()
    return block if rows and inside else columns


@triton.jit
def _signed_tanh(x, magnitude):
    """tanh from |tanh|, with a minimax polynomial near zero, where 1 - exp would be pure rounding error."""
    square = x * x
    near = x + x * square * (-0.333330631 + square * (0.133149073 - square * 0.0503722690))
    return tl.where(square < 0.09, near, tl.where(x < 0, -magnitude, magnitude))


@triton.jit
def tanh(x):
    """tanh to a few units in the last place, from exp, which the interpreter has too."""
    decay = tl.exp(-2.0 * tl.abs(x))
    return _signed_tanh(x, (1.0 - decay) / (1.0 + decay))


@triton.jit
def tanh_and_slope(x):
    """tanh, and its derivative: also from exp, as 1 - tanh^2 would be rounding error where tanh is nearly one."""
    decay = tl.exp(-2.0 * tl.abs(x))
    share = 1.0 / (1.0 + decay)
    return _signed_tanh(x, (1.0 - decay) * share), 4.0 * decay * share * share


@triton.jit
def sigmoid(x):
    """1 / (1 + e^-x) from a power of two and the reciprocal of a root, which flush subnormal numbers to zero.

    tl.sigmoid handles those in exp and in the division, with twice the instructions, and is no more precise.
    """
    root = tl.rsqrt(1.0 + tl.exp2(x * -1.4426950408889634))
    return root * root


@triton.jit
def reciprocal(x):
    """1 / x to a unit in the last place: a step of Newton's from the fast division, for a tenth of the exact one."""
    near = 1.0 / x
    return near + near * (1.0 - x * near)


@triton.jit
def softmax_rows(x, inside):
    """Each row's maximum (ROWS,), exp(x - maximum), and the sum of the latter (ROWS,); over columns `inside`."""
    maximum = tl.max(tl.where(inside, x, float("-inf")), axis=1)
    weight = tl.where(inside, tl.exp(x - maximum[:, None]), 0.0)
    return maximum, weight, tl.sum(weight, axis=1)


@triton.jit
def row_sums(x, PARTS: tl.constexpr):
    """Sums of rows that lie in a tile in PARTS pieces: (PARTS * ROWS, LANES) -> (PARTS * ROWS, 1).

    Row r has tile rows r, r + ROWS, ...; each of them gets the sum of all. With ROWS a multiple of the warps, and as
    many LANES as a warp loads at once, a row belongs to one warp, and its sum needs no barrier.
    """
    if PARTS == 1:
        return tl.sum(x, axis=1)[:, None]
    else:
        ROWS: tl.constexpr = x.shape[0] // PARTS
        total = tl.sum(tl.sum(tl.reshape(x, (PARTS, ROWS, x.shape[1])), axis=0), axis=1)
        return tl.reshape(tl.broadcast_to(total[None, :, None], (PARTS, ROWS, 1)), (PARTS * ROWS, 1))


@triton.jit
def normalise(x, inside, COLUMNS: tl.constexpr, eps, PARTS: tl.constexpr = 1):
    """Layer norm of a tile's rows without its affine part, and the rows' mean and rstd, each (PARTS * ROWS, 1).

    The mean's rounding error is the mean of the centred row, and is subtracted as well: otherwise a row of equal
    numbers would come out as that error times rstd, a large number. Its sum runs beside that of the squares.
    """
    mean = row_sums(x, PARTS) * (1.0 / COLUMNS)
    centred = tl.where(inside, x - mean, 0.0)
    missed = row_sums(centred, PARTS) * (1.0 / COLUMNS)
    variance = row_sums(centred * centred, PARTS) * (1.0 / COLUMNS) - missed * missed
    rstd = tl.rsqrt(tl.maximum(variance, 0.0) + eps)
    return centred * rstd - missed * rstd, mean + missed, rstd


@triton.jit
def sum_partials(partial_ptr, total_ptr, programs, columns, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The sums over programs of (kinds, programs, columns) float32, for some columns of one kind."""
    kind = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in range(0, programs, ROWS):
        row = first + tl.arange(0, ROWS)[:, None]
        at = (kind * programs + row) * columns + column
        total += tl.load(partial_ptr + at, mask=(row < programs) & (column < columns), other=0.0)
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(total_ptr + kind * columns + slot, tl.sum(total, axis=0), mask=slot < columns)


def sum_of_partials(partial: Tensor) -> Tensor:
    """(kinds, programs, columns) float32 -> (kinds, columns): what all programs have added up, in one order.

    A program takes 32 bytes of each row, all of which are on their way at once.
    """
    kinds, programs, columns = partial.shape
    total = partial.new_empty((kinds, columns))
    rows = min(SUM_ROWS, triton.next_power_of_2(programs))
    warps = max(1, rows * SUM_COLUMNS // (32 * THREAD))
    sum_partials[(triton.cdiv(columns, SUM_COLUMNS), kinds)](
        partial, total, programs, columns, rows, SUM_COLUMNS, num_warps=warps
    )
    return total
