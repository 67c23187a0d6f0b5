"""image_input: pixels as input of the encoder, on every backend."""

import pytest
import torch
from checks import backends

from hdfast_kernels import image_input
from hdfast_kernels.image_input import image_input_reference

# One pixel; odd; a game's frame; batch and time; more than a block of the native op by one; none.
SHAPES = [(1,), (3, 5, 7, 3), (64, 64, 3), (2, 3, 16, 16, 1), (2**14 + 1,), (0, 8, 8, 3)]


def inputs(shape, device="cpu"):
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0)).byte().to(device)


@pytest.mark.parametrize("backend", backends("image_input", reference=False))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_as_exact_as_its_type(shape, dtype, backend):
    image = inputs(shape, backend.device)
    out = image_input(image, dtype, backend=backend.name)
    exact = image_input_reference(image, torch.float64)
    assert out.dtype == dtype
    assert out.shape == image.shape
    # Three operations in float32, and the rounding to the type.
    unit = torch.finfo(dtype).eps / 2 + 3 * torch.finfo(torch.float32).eps
    assert torch.all((out.double() - exact).abs() <= unit * exact.abs())


@pytest.mark.parametrize("backend", backends("image_input"))
def test_literal_numbers(backend):
    image = torch.tensor([0, 51, 255], dtype=torch.uint8, device=backend.device)
    out = image_input(image, torch.float32, backend=backend.name)
    assert out.tolist() == pytest.approx([-0.5, -0.3, 0.5], abs=1e-7)


@pytest.mark.parametrize("backend", backends("image_input"))
def test_channels_first_images(backend):
    image = inputs((2, 3, 9, 8), backend.device).permute(0, 2, 3, 1)
    out = image_input(image, torch.float32, backend=backend.name)
    assert torch.allclose(out, image_input_reference(image, torch.float32), rtol=0, atol=1e-7)


@pytest.mark.parametrize("backend", backends("image_input", reference=False))
def test_more_than_the_caches_hold(backend):
    """Written past the caches on the CPU, with rows that end within a vector or not."""
    interpreted = backend.device == "cpu" and backend.name == "triton"  # for which a few blocks are many
    many = 2**14 if interpreted else 2**25
    for pixels in (many, many + 5):
        image = inputs((pixels,), backend.device)
        out = image_input(image, torch.bfloat16, backend=backend.name)
        expected = image_input_reference(image, torch.bfloat16)
        assert torch.allclose(out, expected, rtol=2**-7, atol=0)


def test_mistakes_are_answered():
    with pytest.raises(TypeError, match=r"image has dtype torch\.float32, expected uint8"):
        image_input(torch.zeros(1, 2, 2, 3), torch.float32)
