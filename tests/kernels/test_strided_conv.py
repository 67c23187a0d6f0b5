"""strided_conv: the convolutions between the layers of encoder and decoder, on every backend."""

from functools import partial

import pytest
import torch
from checks import backends, check_against_fp64, random

from hdfast_kernels import dispatch, image_blocks, native, strided_conv
from hdfast_kernels.strided_conv import strided_conv_reference
from tests.calls import Calls

ISAS = native.isas() if dispatch.native_built() else []

# images, H and W of the smaller map, channels of the smaller and of the larger map: one pixel; odd; an image; those of
# the layers, a block of several images, a row in several blocks, every width of a tile; none. The last have tiles of
# 2 x 2 enough, on two threads, for 9 multiplications in place of 16: the layers; sides and blocks that are not whole;
# every width of a panel. Then images of few channels: gray; two; colours; four; several of them. Last, channels that
# fill the processor's tiles: one pixel; odd sides; blocks of images and of rows, the last not whole; deep;
# none. And few pixels for the channels of their map.
SHAPES = [
    (1, 1, 1, 16, 16),
    (3, 5, 7, 5, 6),
    (2, 8, 8, 32, 3),
    (9, 4, 4, 256, 16),
    (3, 8, 8, 80, 32),
    (2, 16, 16, 48, 48),
    (1, 3, 150, 16, 32),
    (5, 3, 5, 112, 16),
    (1, 16, 16, 48, 48),
    (2, 1, 150, 16, 32),
    (0, 4, 4, 16, 16),
    (2, 16, 16, 64, 32),
    (10, 8, 8, 128, 64),
    (35, 4, 4, 256, 128),
    (13, 7, 9, 80, 48),
    (9, 7, 9, 64, 48),
    (5, 10, 13, 16, 112),
    (131, 2, 2, 48, 16),
    (3, 5, 7, 48, 1),
    (2, 3, 3, 32, 2),
    (5, 32, 32, 32, 3),
    (2, 3, 9, 16, 4),
    (2, 4, 5, 80, 9),
    (3, 1, 11, 16, 12),
    (0, 4, 4, 16, 3),
    (1, 1, 1, 32, 32),
    (3, 5, 7, 64, 32),
    (75, 3, 4, 32, 96),
    (1, 7, 301, 64, 64),
    (2, 3, 2, 544, 32),
    (0, 4, 4, 32, 32),
    (1, 4, 4, 40, 24),
    (2, 3, 2, 25, 7),
]


def inputs(shape, transposed, dtype, device="cpu"):
    images, height, width, small, large = shape
    large_map = (images, 2 * height, 2 * width, large)
    x = random(images, height, width, small) if transposed else random(*large_map)
    weight = random(small, large, 4, 4, seed=1, scale=0.1)
    return {
        "x": x.to(device, dtype).requires_grad_(),
        "weight": weight.to(device, torch.float32).requires_grad_(),
        "transposed": transposed,
    }


@pytest.mark.parametrize("backend", backends("strided_conv", reference=False))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("transposed", [False, True], ids=["halve", "double"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_errs_no_more_than_twice_plain_pytorch(shape, transposed, dtype, backend, monkeypatch):
    monkeypatch.setattr(native, "threads", lambda: 2)
    op = partial(strided_conv, backend=backend.name)
    check_against_fp64(op, strided_conv_reference, inputs(shape, transposed, dtype, backend.device))


# Images of N, H and W, C and O channels: gray, the least; odd both ways; two; four, one side odd; colours, the other; a
# row of tiles that is not whole.
IMAGES = [
    (1, 2, 2, 1, 1),
    (2, 5, 7, 1, 16),
    (1, 3, 3, 2, 5),
    (2, 7, 6, 4, 8),
    (3, 4, 9, 3, 16),
    (1, 26, 50, 3, 4),
]
TRITON = [one for one in backends("strided_conv") if one.values[0].name == "triton"]


def image_inputs(shape, dtype, device="cpu"):
    *size, outputs = shape
    return {
        "x": random(*size).to(device, dtype).requires_grad_(),
        "weight": random(outputs, size[-1], 4, 4, seed=1, scale=0.1)
        .to(device, torch.float32)
        .requires_grad_(),
    }


@pytest.mark.parametrize("backend", backends("strided_conv", reference=False))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", IMAGES, ids=str)
def test_images_of_any_sides(shape, dtype, backend):
    arguments = image_inputs(shape, dtype, backend.device)
    check_against_fp64(partial(strided_conv, backend=backend.name), strided_conv_reference, arguments)


@pytest.mark.parametrize("backend", backends("strided_conv"))
def test_images_and_weights_that_lie_otherwise(backend):
    x, weight = image_inputs((2, 6, 8, 3, 8), torch.float32, backend.device).values()
    expected = strided_conv(x, weight, backend=backend.name)
    x = x.detach().permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    weight = weight.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    out = strided_conv(x, weight, backend=backend.name)
    assert out.is_contiguous()
    torch.testing.assert_close(out, expected)
    out.square().sum().backward()
    assert weight.grad.shape == weight.shape


@pytest.mark.parametrize("backend", TRITON)
def test_triton_computes_nothing_that_is_not_wanted(backend, monkeypatch):
    """If the image needs no gradient, only the gradient of the kernel."""
    x, weight = image_inputs((2, 6, 8, 3, 8), torch.bfloat16, backend.device).values()
    monkeypatch.setattr(image_blocks, "_doubled", lambda *_: pytest.fail("an image has a gradient"))
    strided_conv(x.detach(), weight, backend="triton").sum().backward()
    assert weight.grad.any()


@pytest.mark.parametrize("backend", TRITON)
def test_triton_leaves_the_rest_to_the_reference(backend):
    """Many channels, transposed convolutions, float32."""
    low, full = torch.bfloat16, torch.float32
    for shape, transposed, dtype in (
        ((2, 4, 4, 8, 5), False, low), ((2, 4, 4, 8, 3), True, low), ((2, 4, 4, 8, 3), False, full),
    ):  # fmt: skip
        arguments = inputs(shape, transposed, dtype, backend.device)
        with Calls() as calls:
            strided_conv(**arguments, backend="triton")
        with Calls() as expected:
            strided_conv_reference(**arguments)
        assert [name for name, _ in calls.made] == [name for name, _ in expected.made]


def asked_of_pytorch(arguments):
    """Which convolutions PyTorch is asked for: "forward", and the inputs whose gradients it computes."""
    with Calls() as calls:
        strided_conv(**arguments, backend="native").float().square().sum().backward()
    asked = {"forward" for name, _ in calls.made if "aten.convolution.default" in name}
    for name, given in calls.made:
        if "convolution_backward" in name:
            asked |= {of for of, wanted in zip(("x", "weight", "bias"), given[-1], strict=True) if wanted}
    return asked


needs_avx512 = pytest.mark.skipif(
    not ISAS or native.isa() not in ("avx512", "amx"), reason="needs AVX512-BF16"
)


@needs_avx512
@pytest.mark.parametrize("transposed", [False, True], ids=["halve", "double"])
def test_what_is_native_is_not_pytorchs(transposed, monkeypatch):
    """All but halving in bfloat16; and the gradient of the kernel keeps digits that PyTorch would round away."""
    monkeypatch.setattr(native, "threads", lambda: 2)
    for dtype, left in ((torch.float32, set()), (torch.bfloat16, {"x"} if transposed else {"forward"})):
        arguments = inputs((8, 8, 8, 32, 32), transposed, dtype)
        assert asked_of_pytorch(arguments) == left
        grad = arguments["weight"].grad
        assert not torch.equal(grad, grad.bfloat16().float())


@needs_avx512
@pytest.mark.parametrize("transposed", [False, True], ids=["halve", "double"])
def test_what_pytorch_computes_faster_is_pytorchs(transposed, monkeypatch):
    """Few tiles per thread; sides with which tiles waste much; channels that do not fill the vectors."""
    monkeypatch.setattr(native, "threads", lambda: 2)
    for shape in ((7, 8, 8, 32, 32), (64, 5, 5, 32, 32), (64, 1, 8, 32, 32)):
        assert asked_of_pytorch(inputs(shape, transposed, torch.float32)) == {"forward", "x"}
    arguments = inputs((8, 8, 8, 32, 24), transposed, torch.float32)
    assert asked_of_pytorch(arguments) == {"forward", "x", "weight"}


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("transposed", [False, True], ids=["halve", "double"])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("channels", [(48, 16), (48, 3), (64, 32)], ids=str)
def test_every_instruction_set_on_threads(isa, dtype, transposed, threads, channels, monkeypatch):
    monkeypatch.setattr(native, "threads", lambda: threads)
    arguments = inputs((53, 4, 5, *channels), transposed, dtype)
    with native.force_isa(isa):
        op = partial(strided_conv, backend="native")
        first, second = (check_against_fp64(op, strided_conv_reference, arguments) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.skipif(not ISAS, reason="the C++ module is not built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("transposed", [False, True], ids=["halve", "double"])
def test_maps_larger_than_the_caches(transposed, dtype):
    """They are stored past the caches, in many blocks; each image is the same as among few."""
    x = random(1040, 8, 8, 32) if transposed else random(1040, 32, 32, 16)
    weight = random(*((32, 64) if transposed else (64, 16)), 4, 4, seed=1, scale=0.1).float()
    op = partial(strided_conv, weight=weight, transposed=transposed, backend="native")
    many = op(x.to(dtype))
    assert many.numel() * many.element_size() >= 32 << 20
    for few in (slice(16), slice(-16, None)):
        assert torch.equal(many[few], op(x[few].to(dtype)))


@pytest.mark.skipif(not ISAS, reason="the C++ module is not built")
@pytest.mark.parametrize("transposed", [False, True], ids=["halve", "double"])
def test_weights_larger_than_the_caches(transposed, monkeypatch):
    monkeypatch.setattr(native, "threads", lambda: 1)
    op = partial(strided_conv, backend="native")
    check_against_fp64(op, strided_conv_reference, inputs((64, 2, 2, 512, 480), transposed, torch.float32))


@pytest.mark.parametrize("backend", backends("strided_conv"))
def test_sides_that_are_not_even(backend):
    x, weight = random(2, 7, 9, 16).float(), random(16, 16, 4, 4, seed=1).float()
    x, weight = x.to(backend.device).requires_grad_(), weight.to(backend.device).requires_grad_()
    out = strided_conv(x, weight, backend=backend.name)
    assert out.shape == (2, 3, 4, 16)
    out.sum().backward()
    assert weight.grad.shape == weight.shape


@pytest.mark.parametrize("backend", backends("strided_conv"))
def test_only_the_gradients_that_are_wanted(backend):
    for wanted, other in (("x", "weight"), ("weight", "x")):
        arguments = inputs((2, 4, 4, 16, 16), False, torch.float32, backend.device)
        arguments[other] = arguments[other].detach()
        strided_conv(**arguments, backend=backend.name).sum().backward()
        assert arguments[wanted].grad.shape == arguments[wanted].shape


def test_gradients_of_the_reference():
    for transposed in (False, True):
        x, weight, _ = inputs((1, 2, 1, 2, 3), transposed, torch.float64).values()
        weight = weight.detach().double().requires_grad_()
        assert torch.autograd.gradcheck(
            lambda x, w, t=transposed: strided_conv_reference(x, w, t), (x, weight)
        )


def test_mistakes_are_answered():
    x, weight, _ = inputs((1, 2, 2, 4, 3), False, torch.float32).values()
    with pytest.raises(
        ValueError, match=r"x has shape \(4, 4, 3\), expected \(N, H, W, C\), H and W at least 2"
    ):
        strided_conv(x[0], weight)
    with pytest.raises(ValueError, match=r"weight has shape \(4, 3, 4, 4\), expected \(O, 2, 4, 4\)"):
        strided_conv(x[..., :2], weight)
    with pytest.raises(ValueError, match=r"weight has shape \(4, 3, 4, 4\), expected \(3, O, 4, 4\)"):
        strided_conv(x, weight, transposed=True)


@pytest.mark.skipif(not dispatch.native_built(), reason="the C++ module is not built")
@pytest.mark.parametrize("sides", [(8, 8), (7, 9), (2, 3)], ids=str)
@pytest.mark.parametrize("low", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_where_weights_are_most_of_what_moves_a_map_is_a_product(sides, low):
    """Like the last layers of an encoder acting on one image; in bfloat16 these are oneDNN's nevertheless."""
    x, weight = random(1, *sides, 12).to(low), random(40, 12, 4, 4, seed=1, scale=0.1).float()
    with Calls() as calls:
        out = strided_conv(x, weight, backend="native")
    names = {name for name, _ in calls.made}
    assert ("aten.mm.default" in names) is ("aten.convolution.default" not in names) is (low == torch.float32)
    expected = strided_conv(x.double(), weight.double(), backend="reference")
    off = 2e-2 if low == torch.bfloat16 else 1e-5
    torch.testing.assert_close(out.double(), expected, rtol=off, atol=off)
