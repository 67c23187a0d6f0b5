"""image_deconv: the decoder's last transposed convolution, on every backend."""

from functools import partial

import pytest
import torch
from checks import backends, check_against_fp64, random

from hdfast_kernels import image_deconv
from hdfast_kernels.dispatch import BackendError
from hdfast_kernels.image_deconv import image_deconv_reference
from tests.calls import Calls

# images, H, W, inputs and channels: one pixel; odd; one row; one column; gray; a game's frame; wide; two; none. Then
# whole vectors of inputs, whose gradients are our own convolutions
SHAPES = [
    (1, 1, 1, 3, 3),
    (3, 5, 7, 5, 3),
    (2, 1, 9, 8, 2),
    (2, 6, 1, 4, 3),
    (2, 8, 8, 16, 1),
    (4, 32, 32, 32, 3),
    (1, 4, 19, 33, 4),
    (0, 8, 8, 4, 3),
    (3, 5, 7, 48, 3),
    (2, 3, 9, 16, 4),
    (1, 1, 1, 32, 2),
    (0, 8, 8, 16, 3),
    (1, 3, 1, 1, 1),
    (1, 17, 23, 8, 3),
]
TRITON = [one for one in backends("image_deconv") if one.values[0].name == "triton"]


def inputs(shape, dtype, device):
    images, height, width, deep, channels = shape
    return {
        "x": random(images, height, width, deep).to(device, dtype).requires_grad_(),
        "weight": random(deep, channels, 4, 4, seed=1, scale=0.1).to(device, torch.float32).requires_grad_(),
        "bias": random(channels, seed=2).to(device, torch.float32).requires_grad_(),
    }


@pytest.mark.parametrize("backend", backends("image_deconv", reference=False))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_errs_no_more_than_twice_plain_pytorch(shape, dtype, backend):
    op = partial(image_deconv, backend=backend.name)
    check_against_fp64(op, image_deconv_reference, inputs(shape, dtype, backend.device))


def test_one_column_of_more_channels_than_an_image_has():
    """On a CPU with AMX, PyTorch's convolutions of bfloat16 read memory beside such a map."""
    for _ in range(10):
        given = inputs((2, 16, 1, 7, 5), torch.bfloat16, "cpu")
        rounded = {name: one.detach().bfloat16().double().requires_grad_() for name, one in given.items()}
        right, found = image_deconv_reference(**rounded), image_deconv(**given)
        torch.autograd.backward((right, found), (torch.ones_like(right), torch.ones_like(found)))
        assert torch.allclose(found.double(), right, rtol=0.02, atol=0.02)
        for name, one in given.items():
            assert torch.allclose(one.grad.double(), rounded[name].grad, rtol=0.02, atol=0.05), name


@pytest.mark.parametrize("backend", backends("image_deconv"))
def test_literal_numbers(backend):
    x = torch.tensor([[[[2.0], [3.0]]]], device=backend.device)  # one row of two pixels
    weight = torch.arange(16.0, device=backend.device).reshape(1, 1, 4, 4)
    out = image_deconv(x, weight, torch.tensor([100.0], device=x.device), backend=backend.name)
    # Output rows 0 and 1 are rows 1 and 2 of the kernel, columns 2s - 1 + j.
    assert out.squeeze().tolist() == [
        [100 + 2 * 5, 100 + 2 * 6 + 3 * 4, 100 + 2 * 7 + 3 * 5, 100 + 3 * 6],
        [100 + 2 * 9, 100 + 2 * 10 + 3 * 8, 100 + 2 * 11 + 3 * 9, 100 + 3 * 10],
    ]


@pytest.mark.parametrize("backend", backends("image_deconv"))
def test_only_the_gradients_that_are_wanted(backend):
    for deep in (8, 16):
        x, weight, bias = inputs((2, 4, 4, deep, 3), torch.float32, backend.device).values()
        image_deconv(x.detach(), weight, bias.detach(), backend=backend.name).sum().backward()
        assert (x.grad, bias.grad) == (None, None)
        assert weight.grad.shape == weight.shape
        image_deconv(x, weight.detach(), bias.detach(), backend=backend.name).sum().backward()
        assert x.grad.shape == x.shape


@pytest.mark.parametrize("backend", backends("image_deconv", reference=False))
def test_channels_first_activations(backend):
    arguments = inputs((2, 5, 4, 6, 3), torch.float32, backend.device)
    arguments["x"] = (
        arguments["x"].detach().permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1).requires_grad_()
    )
    check_against_fp64(partial(image_deconv, backend=backend.name), image_deconv_reference, arguments)
    assert image_deconv(**arguments, backend=backend.name).is_contiguous()


@pytest.mark.parametrize("backend", TRITON)
def test_triton_asks_pytorch_for_no_convolution(backend):
    """Except in float32, where everything is left to the reference."""
    for dtype, asked in ((torch.bfloat16, 0), (torch.float32, 2)):
        arguments = inputs((2, 5, 4, 8, 3), dtype, backend.device)
        with Calls() as calls:
            image_deconv(**arguments, backend="triton").float().square().sum().backward()
        assert sum("aten.convolution" in name for name, _ in calls.made) == asked


def test_gradients_of_the_reference():
    arguments = (
        value.detach().double().requires_grad_()
        for value in inputs((1, 2, 3, 2, 2), torch.float32, "cpu").values()
    )
    assert torch.autograd.gradcheck(image_deconv_reference, tuple(arguments))


def test_many_channels_are_left_to_pytorch():
    x, weight, bias = inputs((1, 2, 2, 4, 5), torch.float32, "cpu").values()
    assert torch.equal(image_deconv(x, weight, bias), image_deconv_reference(x, weight, bias))
    for backend in ("triton", "native"):
        with pytest.raises(BackendError, match=f"{backend} makes images of at most 4 channels, not 5"):
            image_deconv(x, weight, bias, backend=backend)


def test_mistakes_are_answered():
    x, weight, bias = inputs((1, 2, 2, 4, 3), torch.float32, "cpu").values()
    with pytest.raises(ValueError, match=r"x has shape \(2, 2, 4\), expected \(N, H, W, K\)"):
        image_deconv(x[0], weight, bias)
    with pytest.raises(ValueError, match=r"weight has shape \(4, 3, 4, 4\), expected \(3, 3, 4, 4\)"):
        image_deconv(x[..., :3], weight, bias)
    with pytest.raises(ValueError, match=r"bias has shape \(2,\), expected \(3,\)"):
        image_deconv(x, weight, bias[:2])
