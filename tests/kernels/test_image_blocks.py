"""image_blocks: an image cut into blocks of pixels, and reassembled."""

import pytest
import torch
import torch.nn.functional as F
from checks import backends, poisoned_memory, random

from hdfast_kernels import image_blocks
from hdfast_kernels.image_blocks import blocks_of

TRITON = [one for one in backends("strided_conv") if one.values[0].name == "triton"]
# The least; odd; colours in several tiles, the last not whole; four; two, wide; none.
IMAGES = [(1, 2, 2, 1), (2, 3, 5, 3), (2, 37, 70, 3), (1, 6, 3, 4), (1, 2, 151, 2), (0, 4, 4, 3)]


@pytest.mark.parametrize("backend", TRITON)
def test_literal_numbers(backend):
    image = torch.arange(1.0, 17.0, device=backend.device).view(1, 4, 4, 1)
    blocks, sums = blocks_of(image, summed=True)
    assert sums.tolist() == [136.0]
    assert blocks.shape == (1, 3, 3, 16)
    assert torch.all(blocks.view(3, 3, 4, 4)[..., 1:] == 0)
    assert blocks.view(3, 3, 4, 4)[..., 0].tolist() == [
        [[0, 0, 0, 1], [0, 0, 2, 3], [0, 0, 4, 0]],
        [[0, 5, 0, 9], [6, 7, 10, 11], [8, 0, 12, 0]],
        [[0, 13, 0, 0], [14, 15, 0, 0], [16, 0, 0, 0]],
    ]


def image_of(blocks, height, width, channels):
    """The inverse of `blocks_of`."""
    pairs = blocks.unflatten(3, (2, 2, 4)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
    return pairs[:, 1 : 1 + height, 1 : 1 + width, :channels]


@pytest.mark.parametrize("backend", TRITON)
@pytest.mark.parametrize("shape", IMAGES, ids=str)
def test_an_image_is_in_its_blocks(shape, backend):
    exact = random(*shape)
    image = exact.to(backend.device, torch.bfloat16)
    with poisoned_memory():
        blocks, sums = blocks_of(image, summed=True)
    assert blocks.dtype == image.dtype
    assert torch.equal(image_of(blocks, *shape[1:]), image)
    assert blocks.count_nonzero() == image.count_nonzero()  # everything but the pixels is zero
    assert sums.dtype == torch.float32
    torch.testing.assert_close(sums.double().cpu(), exact.sum((0, 1, 2)), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("backend", TRITON)
@pytest.mark.parametrize("lies", ["negated", "permuted"])
def test_images_and_slopes_that_lie_otherwise(lies, backend):
    """Activations to images, and images to activations, if memory is in another order."""
    other = {
        "negated": lambda one: torch._neg_view(-one),
        "permuted": lambda one: one.transpose(1, 2).contiguous().transpose(1, 2),
    }[lies]
    x = random(2, 3, 5, 16).to(backend.device, torch.bfloat16)
    image = random(2, 6, 10, 3, seed=1).to(backend.device, torch.bfloat16)
    weight = random(16, 3, 4, 4, seed=2).to(backend.device, torch.float32).requires_grad_()
    bias = random(3, seed=3).to(backend.device, torch.float32)
    results = []
    for change in (lambda one: one, other):
        halved = image_blocks.halve_image(change(image).requires_grad_(), weight)
        doubled = image_blocks.double_to_image(change(x).requires_grad_(), weight, bias)
        results.append([halved, doubled])
        for out, slope in ((halved, x), (doubled, image)):
            results[-1] += torch.autograd.grad(out, weight, change(slope))
    assert all(map(torch.equal, *results))


def test_what_is_left_to_the_library():
    """float32, and positions beyond 32 bits."""
    few, many = (torch.empty((n, 64, 64, 3), dtype=torch.bfloat16, device="meta") for n in (1024, 1 << 20))
    assert [image_blocks.takes(one, halved=True) for one in (few, few.float(), many)] == [
        True,
        False,
        False,
    ]
    assert image_blocks.takes(many[: 1 << 19, :32, :32], halved=False)
    assert not image_blocks.takes(many[..., :32, :32, :], halved=False)


# N, H and W of the smaller map, rows and columns of the image beyond twice that, O or K, C: the least; odd; gray; a map
# in several tiles, across and down; channels in several tiles; in a tile that is not whole; none.
MAPS = [
    (1, 1, 1, 0, 0, 1, 1),
    (3, 5, 7, 1, 0, 24, 3),
    (2, 4, 9, 0, 1, 16, 1),
    (2, 27, 68, 0, 0, 8, 3),
    (2, 3, 5, 1, 1, 150, 4),
    (1, 12, 11, 0, 0, 48, 2),
    (0, 4, 4, 0, 0, 16, 3),
]


@pytest.mark.parametrize("backend", TRITON)
@pytest.mark.parametrize("shape", MAPS, ids=str)
def test_products_of_bfloat16(shape, backend):
    """Halving, the gradient of a kernel, doubling without and with a bias: summed in float32, then rounded."""
    images, height, width, below, right, deep, channels = shape
    sizes = (images, 2 * height + below, 2 * width + right, channels), (images, height, width, deep)
    image, small = (random(*size, seed=k).to(backend.device, torch.bfloat16) for k, size in enumerate(sizes))
    weight = random(deep, channels, 4, 4, seed=2, scale=0.1).to(backend.device, torch.float32)
    bias = random(channels, seed=3).to(backend.device, torch.float32)
    with poisoned_memory():
        blocks, _ = blocks_of(image)
        got = [image_blocks._halved(blocks, weight), image_blocks._weight_gradient(blocks, small, weight)]
        got += [image_blocks._doubled(small, weight, sizes[0][1:], given) for given in (None, bias)]
    leaves = image.double().requires_grad_(), weight.double().requires_grad_()
    halved = F.conv2d(leaves[0].permute(0, 3, 1, 2), leaves[1], stride=2, padding=1).permute(0, 2, 3, 1)
    doubled, gradient = torch.autograd.grad(halved, leaves, small.double())
    expected = [halved.detach(), gradient, doubled, doubled + bias.double()]
    for value, exact, dtype in zip(
        got, expected, (torch.bfloat16, torch.float32, *[torch.bfloat16] * 2), strict=True
    ):
        assert (value.shape, value.dtype) == (exact.shape, dtype)
        scale = exact.abs().max().item() if exact.numel() else 0.0
        torch.testing.assert_close(value.double(), exact, rtol=2**-8, atol=1e-5 * scale)


@pytest.mark.parametrize("backend", TRITON)
def test_a_gradient_of_more_tiles_than_programs(backend, monkeypatch):
    """Each program then has several, and leaves out none; also with channels in three tiles."""
    monkeypatch.setattr(image_blocks, "PROGRAMS", 5)
    blocks = random(3, 17, 20, 16).to(backend.device, torch.bfloat16)
    for deep in (16, 130):
        small = random(3, 16, 19, deep, seed=1).to(backend.device, torch.bfloat16)
        weight = torch.empty((deep, 4, 4, 4), device=backend.device)
        got = image_blocks._weight_gradient(blocks, small, weight)
        windows = blocks.double().unfold(1, 2, 1).unfold(2, 2, 1).unflatten(3, (2, 2, 4))
        exact = torch.einsum("nrsabctu,nrso->octaub", windows, small.double()).reshape(weight.shape)
        torch.testing.assert_close(got.double(), exact, rtol=0.01, atol=1e-4)


@pytest.mark.parametrize("backend", TRITON)
def test_a_gradient_repeats_bit_by_bit(backend):
    blocks, small = (random(2, 33 - k, 33 - k, 16, seed=k).to(backend.device, torch.bfloat16) for k in (0, 1))
    weight = torch.empty((16, 3, 4, 4), device=backend.device)
    first, second = (image_blocks._weight_gradient(blocks, small, weight) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.gpu
def test_more_than_32_bits_count():
    images = (1 << 31) // (33 * 33 * 16) + 2
    image = torch.zeros((images, 64, 64, 3), dtype=torch.bfloat16, device="cuda")
    image[-1] = random(64, 64, 3).to(image)
    again = image_of(blocks_of(image)[0], 64, 64, 3)
    assert torch.equal(again[-1], image[-1])
    assert not again[:-1].any()


@pytest.mark.gpu
def test_products_of_more_than_32_bits_count():
    images = (1 << 31) // (32 * 32 * 32) + 2
    last = {"device": "cuda", "dtype": torch.bfloat16}
    small, weight = torch.zeros((images, 32, 32, 32), **last), random(32, 3, 4, 4, scale=0.1).float().cuda()
    small[-1] = random(32, 32, 32, seed=1).to(small)
    doubled = image_blocks._doubled(small, weight, (64, 64, 3))
    assert torch.equal(doubled[-1:], image_blocks._doubled(small[-1:], weight, (64, 64, 3)))
    assert not doubled[:-1].any()
    blocks, _ = blocks_of(doubled)
    halved = image_blocks._halved(blocks, weight)
    assert torch.equal(halved[-1:], image_blocks._halved(blocks[-1:], weight))
    assert not halved[:-1].any()
    got, expected = (image_blocks._weight_gradient(blocks[k:], small[k:], weight) for k in (0, images - 1))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-3)
