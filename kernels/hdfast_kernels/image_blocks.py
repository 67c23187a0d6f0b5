"""The convolutions of images in Triton, in bfloat16: kernel 4, stride 2, padding 1, written as products over blocks.

A library convolves 16 channels or more as fast as it multiplies matrices, and the 3 of an image many times slower. So
the image, with a border of zeros, is cut into blocks of 2 x 2 pixels, whose numbers are the channels of a position:

    blocks[n, p, q, (a, b, c)] = image[n, 2p - 1 + a, 2q - 1 + b, c]         a, b in 0..1; c in 0..3, zero from C on

Axes: N images, H x W pixels of the smaller map, O its channels; the image has 2H or 2H + 1 rows (columns alike) and C
channels, at most 4; P = H + 1, Q = W + 1 positions. A tap i of the kernel is i = 2t + a, t in 0..1. Along the rows,
and alike along the columns:

    halved[r] = sum over i of image[2r - 1 + i] * weight[i]                  the definition
              = sum over t and a of blocks[r + t, a] * weight[2t + a]        as 2r - 1 + i = 2(r + t) - 1 + a
    doubled[2r - 1 + i] += x[r] * weight[i]                                  the definition
    blocks[p, a] = sum over t of x[p - t] * weight[2t + a]                   of doubled, as p = r + t

Each is the gradient of the other, so that these two products and the gradient of the kernel are all it takes: blocks
are read as rows of a matrix, and a doubled map is put together as an image before it is stored. In float32 a library
is faster (bench/results/nvidia-h200), so float32 stays with the reference.
"""

import torch
from torch import Tensor

from ._triton import tl, triton
from .autograd import once_differentiable
from .numerics import as_contiguous
from .tiles import sum_of_partials

CHANNELS = 4  # of an image, at most: the 4 pixels of a block then have 16
POSITIONS, WARPS = 128, 4  # in a tile of the kernel that cuts, 16 numbers a thread
# TILE: pixels of the smaller maps in a tile of a product. 128 have few neighbours in other tiles, whose blocks would be
# read again, and leave registers for several programs a multiprocessor, whose loads hide each other's latency. They
# have one pipeline stage: copies made ahead would bypass the L1 cache, where neighbours find each other's blocks.
# PROGRAMS: that share a kernel's gradient, 6 on each multiprocessor of an H100.
# LINES, DOWN: columns of a tile that is doubled, as few as fill the tensor cores, and the most rows of it; it reads one
# more than it writes.
# MOST_OUTPUTS, MOST_INPUTS: channels of the smaller maps that a program has at a time, as results and to sum over.
TILE, PROGRAMS, LINES, DOWN, MOST_OUTPUTS, MOST_INPUTS = 128, 6 * 132, 64, 12, 64, 64


@triton.jit
def image_blocks_forward(
    image_ptr, blocks_ptr, sums_ptr, H: tl.constexpr, W: tl.constexpr, C: tl.constexpr, P: tl.constexpr,
    Q: tl.constexpr, SUMMED: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    """Cuts (N, H, W, C) into (N, P, Q, 16); each program's sums over its positions are a row of (programs, 16)."""
    image = tl.program_id(0).to(tl.int64)
    position = tl.program_id(1) * POSITIONS + tl.arange(0, POSITIONS)
    number = tl.arange(0, 16)
    a, b, c = number // 8, number // 4 % 2, number % 4
    row, column = 2 * (position // Q) - 1, 2 * (position % Q) - 1
    inside = (row[:, None] + a >= 0) & (row[:, None] + a < H)
    inside &= (column[:, None] + b >= 0) & (column[:, None] + b < W)
    at = ((row * W + column) * C)[:, None] + ((a * W + b) * C + c)
    # nor is any row inside for positions beyond the last
    pixels = tl.load(image_ptr + image * (H * W * C) + at, mask=inside & (c < C), other=0.0)
    to = position[:, None] * 16 + number
    tl.store(blocks_ptr + image * (P * Q * 16) + to, pixels, mask=position[:, None] < P * Q)
    if SUMMED:
        program = image * tl.num_programs(1) + tl.program_id(1)
        tl.store(sums_ptr + program * 16 + number, tl.sum(pixels.to(tl.float32), axis=0))


@triton.jit
def windows(blocks_ptr, pixel, pixels, H: tl.constexpr, W: tl.constexpr):
    """(pixels, 64): for pixels of all the smaller maps, the blocks that each is made of; t, u, a, b, c."""
    # a row has one position more than pixels, a map one row more
    position = pixel + pixel // W + pixel // (H * W) * (W + 1)
    depth = tl.arange(0, 64)[None, :]
    at = position.to(tl.int64)[:, None] * 16 + (depth // 32 * ((W + 1) * 16) + depth % 32)
    return tl.load(blocks_ptr + at, mask=(pixel < pixels)[:, None], other=0.0)


@triton.jit
def image_halved_forward(
    blocks_ptr, kernel_ptr, out_ptr, pixels, H: tl.constexpr, W: tl.constexpr, OUTPUTS: tl.constexpr,
    TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Blocks (N, P, Q, 16), kernel (O, t, u, 16) -> (N, H, W, O): windows @ kernel.T, a tile of it."""
    pixel = tl.program_id(0) * TILE + tl.arange(0, TILE)
    output = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    at = output * 64 + tl.arange(0, 64)[:, None]
    kernel = tl.load(kernel_ptr + at, mask=output < OUTPUTS, other=0.0)
    out = tl.dot(windows(blocks_ptr, pixel, pixels, H, W), kernel)
    to = out_ptr + pixel.to(tl.int64)[:, None] * OUTPUTS + output
    tl.store(to, out.to(out_ptr.dtype.element_ty), mask=(pixel < pixels)[:, None] & (output < OUTPUTS))


@triton.jit
def image_doubled_forward(
    x_ptr, kernel_ptr, bias_ptr, image_ptr, lines, H: tl.constexpr, W: tl.constexpr, K: tl.constexpr,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, C: tl.constexpr, BIASED: tl.constexpr, LINES: tl.constexpr,
    DOWN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """x (N, H, W, K), kernel (16, 1 - t, 1 - u, K) -> image (N, HEIGHT, WIDTH, C): blocks, put together in registers.

    A line is a column q of an image, of which a program goes down DOWN positions: row p of x is read once, for position
    p and for the next. The two rows of pixels of a position are stored separately: eight numbers each, beside those of
    its neighbours.
    """
    line = tl.program_id(0) * LINES + tl.arange(0, LINES)[:, None]
    image, q = (line // (W + 1)).to(tl.int64), line % (W + 1)
    depth, result = tl.arange(0, 2 * BLOCK), tl.arange(0, 32)[None, :]  # 1 - u, k; 1 - t, a, b, c
    right, k = depth // BLOCK, depth % BLOCK
    column = q - 1 + right[None, :]
    inside = (column >= 0) & (column < W) & (line < lines)
    x_ptrs = x_ptr + image * (H * W * K) + ((q - 1) * K + (right * K + k)[None, :])
    kernel_ptrs = kernel_ptr + (result % 16 * (4 * K) + result // 16 * (2 * K)) + (right * K + k)[:, None]
    kernel = tl.load(kernel_ptrs, mask=(k < K)[:, None], other=0.0)
    pair = tl.arange(0, 8)[None, :]  # of pixels: b, c
    across, c = 2 * q - 1 + pair // 4, pair % 4
    stored = (across >= 0) & (across < WIDTH) & (line < lines)
    to = image_ptr + image * (HEIGHT * WIDTH * C) + (across * C + c)
    bias = tl.load(bias_ptr + c, mask=c < C, other=0.0) if BIASED else 0.0
    before, top = tl.zeros((LINES, 16), tl.float32), tl.program_id(1) * DOWN
    for step in range(DOWN + 1):
        p = top - 1 + step
        deep = tl.where((p >= 0) & (p < H), K, 0)
        both = tl.zeros((LINES, 32), tl.float32)
        for first in range(0, K, BLOCK):
            if K > BLOCK:
                kernel = tl.load(kernel_ptrs + first, mask=(first + k < K)[:, None], other=0.0)
            read = inside & (first + k < deep)[None, :]
            x = tl.load(x_ptrs + (p * (W * K) + first), mask=read, other=0.0)
            both = tl.dot(x, kernel, both)
        following, blocks = tl.split(tl.permute(tl.reshape(both, (LINES, 2, 16)), (0, 2, 1)))
        above, below = tl.split(tl.permute(tl.reshape(before + blocks, (LINES, 2, 8)), (0, 2, 1)))
        at = to + (2 * p - 1) * (WIDTH * C)
        colours = tl.where((p >= top) & (p > 0) & (p <= H), C, 0)
        tl.store(at, (above + bias).to(image_ptr.dtype.element_ty), mask=stored & (c < colours))
        colours = tl.where((p >= top) & (2 * p < HEIGHT), C, 0)
        tl.store(at + WIDTH * C, (below + bias).to(image_ptr.dtype.element_ty), mask=stored & (c < colours))
        before = following


@triton.jit
def image_weight_backward(
    blocks_ptr, small_ptr, partial_ptr, pixels, tiles, H: tl.constexpr, W: tl.constexpr, OUTPUTS: tl.constexpr,
    TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Blocks (N, P, Q, 16), small (N, H, W, O) -> (programs, 64, O): windows.T @ small, each over every n-th tile."""
    output = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    total = tl.zeros((64, BLOCK), tl.float32)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        pixel = tile * TILE + tl.arange(0, TILE)
        at = pixel.to(tl.int64)[:, None] * OUTPUTS + output
        small = tl.load(small_ptr + at, mask=(pixel < pixels)[:, None] & (output < OUTPUTS), other=0.0)
        total = tl.dot(tl.trans(windows(blocks_ptr, pixel, pixels, H, W)), small, total)
    to = (tl.program_id(0) * 64 + tl.arange(0, 64)[:, None]) * OUTPUTS + output
    tl.store(partial_ptr + to, total, mask=output < OUTPUTS)


def takes(image_or_map: Tensor, halved: bool) -> bool:
    """Whether these kernels take a tensor (N, H, W, channels): bfloat16, and few enough positions for 32 bits."""
    images, height, width, _ = image_or_map.shape
    share = 2 if halved else 1
    positions = images * (height // share + 1) * (width // share + 1)
    return image_or_map.dtype == torch.bfloat16 and positions < 2**30


def blocks_of(image: Tensor, summed: bool = False) -> tuple[Tensor, Tensor | None]:
    """(N, H, W, C) -> (N, H // 2 + 1, W // 2 + 1, 16), and (C,) float32 sums over all pixels if wanted."""
    (image,) = as_contiguous((image,))
    images, height, width, channels = image.shape
    down, across = height // 2 + 1, width // 2 + 1
    blocks = image.new_empty((images, down, across, 16))
    tiles = triton.cdiv(down * across, POSITIONS)
    sums = image.new_empty((images * tiles, 4, CHANNELS), dtype=torch.float32) if summed else None
    if images:
        image_blocks_forward[(images, tiles)](
            image, blocks, sums, height, width, channels, down, across, summed, POSITIONS, num_warps=WARPS
        )
    return blocks, None if sums is None else sums.sum((0, 1))[:channels]


def _channels_of_tile(channels: int, most: int) -> int:
    """Their number rounded up to a power of two, at least 16, as tensor cores need."""
    return max(16, min(triton.next_power_of_2(channels), most))


def _halved(blocks: Tensor, weight: Tensor) -> Tensor:
    """(N, P, Q, 16), (O, C, 4, 4) -> (N, H, W, O)."""
    outputs, channels = weight.shape[:2]
    kernel = blocks.new_zeros((outputs, 2, 2, 2, 2, CHANNELS))  # o, t, u, a, b, c
    kernel[..., :channels].copy_(_taps(weight).permute(0, 2, 4, 3, 5, 1))
    images, down, across, _ = blocks.shape
    out = blocks.new_empty((images, down - 1, across - 1, outputs))
    pixels, tile = out.shape[:-1].numel(), _channels_of_tile(outputs, MOST_OUTPUTS)
    if pixels:
        image_halved_forward[(triton.cdiv(pixels, TILE), triton.cdiv(outputs, tile))](
            blocks, kernel, out, pixels, down - 1, across - 1, outputs, TILE, tile, num_warps=WARPS, num_stages=1
        )  # fmt: skip
    return out


def _doubled(x: Tensor, weight: Tensor, size: tuple[int, int, int], bias: Tensor | None = None) -> Tensor:
    """(N, H, W, K), (K, C, 4, 4) -> (N, *size), and a bias (C,) added in float32."""
    (images, height, width, inputs), channels = x.shape, weight.shape[1]
    kernel = x.new_zeros((2, 2, CHANNELS, 2, 2, inputs))  # a, b, c, 1 - t, 1 - u, k
    kernel[:, :, :channels].copy_(_taps(weight).flip(2, 4).permute(3, 5, 1, 2, 4, 0))
    image = x.new_empty((images, *size))
    bias = bias if bias is None else as_contiguous((bias.float(),))[0]
    lines, tile = images * (width + 1), _channels_of_tile(inputs, MOST_INPUTS)
    parts = triton.cdiv(height + 1, DOWN)
    if lines:
        image_doubled_forward[(triton.cdiv(lines, LINES), parts)](
            x, kernel, bias, image, lines, height, width, inputs, *size, bias is not None, LINES,
            triton.cdiv(height + 1, parts), tile, num_warps=WARPS, num_stages=1,
        )  # fmt: skip
    return image


def _taps(weight: Tensor) -> Tensor:
    """(O, C, 4, 4) -> (O, C, t, a, u, b)."""
    return weight.reshape(*weight.shape[:2], 2, 2, 2, 2)


def _weight_gradient(blocks: Tensor, small: Tensor, weight: Tensor) -> Tensor:
    """Like `weight`; of `_halved` where `small` (N, H, W, O) is the gradient, of `_doubled` where `blocks` are."""
    outputs, channels = weight.shape[:2]
    taps = _windows_times(blocks, small).view(2, 2, 2, 2, CHANNELS, outputs)[:, :, :, :, :channels]
    taps = taps.permute(5, 4, 0, 2, 1, 3)  # of t, u, a, b, c, o
    return taps.to(weight.dtype, memory_format=torch.contiguous_format).reshape(weight.shape)


def _windows_times(blocks: Tensor, small: Tensor) -> Tensor:
    """(N, P, Q, 16), (N, H, W, O) -> (1, 64 * O) float32: every tap's channels times O, summed over all pixels."""
    height, width, outputs = small.shape[1:]
    pixels, tile = small.shape[:-1].numel(), _channels_of_tile(outputs, MOST_OUTPUTS)
    if not pixels:
        return blocks.new_zeros((1, 64 * outputs), dtype=torch.float32)
    tiles, across = triton.cdiv(pixels, TILE), triton.cdiv(outputs, tile)
    programs = min(tiles, max(1, PROGRAMS // across))
    partial = blocks.new_empty((1, programs, 64 * outputs), dtype=torch.float32)
    image_weight_backward[(programs, across)](
        blocks, small, partial, pixels, tiles, height, width, outputs, TILE, tile, num_warps=WARPS, num_stages=1
    )  # fmt: skip
    return sum_of_partials(partial)


class _HalveImage(torch.autograd.Function):
    @staticmethod
    def forward(ctx, image: Tensor, weight: Tensor) -> Tensor:
        blocks, _ = blocks_of(image)
        ctx.save_for_backward(blocks if ctx.needs_input_grad[1] else None, weight)
        ctx.size = image.shape[1:]
        return _halved(blocks, weight)

    @staticmethod
    @once_differentiable("strided_conv")
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (blocks, weight), grad, grad_image, grad_weight = ctx.saved_tensors, grad.contiguous(), None, None
        if ctx.needs_input_grad[0]:
            grad_image = _doubled(grad, weight, ctx.size)
        if ctx.needs_input_grad[1]:
            grad_weight = _weight_gradient(blocks, grad, weight)
        return grad_image, grad_weight


class _DoubleToImage(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        (x,), (_, height, width, _) = as_contiguous((x,)), x.shape
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        ctx.bias_dtype = bias.dtype
        return _doubled(x, weight, (2 * height, 2 * width, len(bias)), bias)

    @staticmethod
    @once_differentiable("image_deconv")
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        (x, weight), grad_x, grad_weight = ctx.saved_tensors, None, None
        blocks, grad_bias = blocks_of(grad, summed=ctx.needs_input_grad[2])
        if ctx.needs_input_grad[0]:
            grad_x = _halved(blocks, weight)
        if ctx.needs_input_grad[1]:
            grad_weight = _weight_gradient(blocks, x, weight)
        return grad_x, grad_weight, grad_bias if grad_bias is None else grad_bias.to(ctx.bias_dtype)


halve_image = _HalveImage.apply  # (N, H, W, C), (O, C, 4, 4) -> (N, H // 2, W // 2, O)
double_to_image = _DoubleToImage.apply  # (N, H, W, K), (K, C, 4, 4), (C,) -> (N, 2H, 2W, C)
