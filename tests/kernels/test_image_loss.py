"""image_loss: squared error against uint8 pixels, on every backend."""

from functools import partial

import pytest
import torch
from checks import backends, check_against_fp64, random

from hdfast_kernels import image_loss
from hdfast_kernels.image_loss import image_loss_reference

# leading axes and image: one pixel; odd; a game's frame; batch and time of gray ones; none
SHAPES = [(1, 1, 1, 1), (3, 5, 7, 3), (2, 64, 64, 3), (2, 3, 16, 16, 1), (0, 8, 8, 3)]


def inputs(shape, dtype, device):
    image = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return {
        "pred": (0.5 + random(*shape, scale=0.5)).to(device, dtype).requires_grad_(),
        "image": image.to(device),
    }


@pytest.mark.parametrize("backend", backends("image_loss", reference=False))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_errs_no_more_than_twice_plain_pytorch(shape, dtype, backend):
    op = partial(image_loss, backend=backend.name)
    check_against_fp64(op, image_loss_reference, inputs(shape, dtype, backend.device))


@pytest.mark.parametrize("backend", backends("image_loss", reference=False))
def test_channels_first_prediction(backend):
    arguments = inputs((2, 3, 9, 8), torch.float32, backend.device)
    pred, image = arguments["pred"].detach().permute(0, 2, 3, 1), arguments["image"].permute(0, 2, 3, 1)
    op = partial(image_loss, backend=backend.name)
    check_against_fp64(op, image_loss_reference, {"pred": pred.requires_grad_(), "image": image})


@pytest.mark.parametrize("backend", backends("image_loss"))
def test_literal_numbers(backend):
    image = torch.tensor([[[[0, 51, 255]]]], dtype=torch.uint8, device=backend.device)  # 0, 0.2, 1
    pred = torch.tensor([[[[0.5, 0.2, -1.0]]]], device=backend.device, requires_grad=True)
    loss = image_loss(pred, image, backend=backend.name)
    loss.backward()
    assert loss.tolist() == pytest.approx([0.25 + 4.0], rel=1e-6)
    assert pred.grad.flatten().tolist() == pytest.approx([1.0, 0.0, -4.0], abs=1e-6)


def test_gradients_of_the_reference():
    arguments = inputs((2, 3, 2, 3), torch.float64, "cpu")
    assert torch.autograd.gradcheck(image_loss_reference, tuple(arguments.values()))


def test_mistakes_are_answered():
    with pytest.raises(
        ValueError, match=r"image_loss: pred has shape \(2, 3\), expected \(\.\.\., H, W, C\)"
    ):
        image_loss(torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.uint8))
    with pytest.raises(TypeError, match=r"image has dtype torch\.float32, expected uint8"):
        image_loss(torch.zeros(1, 2, 2, 3), torch.zeros(1, 2, 2, 3))
    with pytest.raises(ValueError, match=r"image has shape \(2, 2, 3\), expected \(1, 2, 2, 3\)"):
        image_loss(torch.zeros(1, 2, 2, 3), torch.zeros(2, 2, 3, dtype=torch.uint8))
