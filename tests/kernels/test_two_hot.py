"""two_hot_loss and two_hot_mean: literal numbers, the end bins, and every backend against float64."""

import math
from functools import partial

import pytest
import torch
from checks import backends, check_against_fp64, random
from torch.fx.experimental.proxy_tensor import make_fx

from hdfast_kernels import tiles, two_hot_loss, two_hot_mean
from hdfast_kernels.two_hot import symexp, symlog, two_hot_loss_reference, two_hot_mean_reference

# leading axes and bins: one row of the fewest; odd; the agent's 255; no rows
SHAPES = [(1, 2), (3, 5, 41), (40, 255), (0, 7), (300, 16)]


def logits(shape, dtype, device, scale=2.0):
    return random(*shape, scale=scale).to(device, dtype).requires_grad_()


def targets(shape, device):
    """Ordinary, tiny and huge ones; the last are beyond the end bins."""
    scale = (
        torch.tensor([1.0, 1e-3, 100.0, 1e6, 1e12, 0.0])
        .repeat(math.prod(shape))[: math.prod(shape)]
        .view(shape)
    )
    return (random(*shape, seed=1) * scale).to(device, torch.float32)


@pytest.mark.parametrize("backend", backends("two_hot_loss", reference=False))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_loss_errs_no_more_than_twice_plain_pytorch(shape, dtype, backend):
    arguments = {
        "logits": logits(shape, dtype, backend.device),
        "target": targets(shape[:-1], backend.device),
    }
    check_against_fp64(partial(two_hot_loss, backend=backend.name), two_hot_loss_reference, arguments)


@pytest.mark.parametrize("backend", backends("two_hot_mean", reference=False))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_mean_errs_no_more_than_twice_plain_pytorch(shape, dtype, backend):
    op = partial(two_hot_mean, backend=backend.name)
    check_against_fp64(op, two_hot_mean_reference, {"logits": logits(shape, dtype, backend.device)})


def apart(op, logits, width, end=None, **others):
    """The op on rows of logits that begin `width` numbers apart, with NaN between them, up to the `end` of memory."""
    rows, K = logits.flatten(0, -2).shape
    memory = torch.full((rows * width,), math.nan, dtype=logits.dtype, device=logits.device)
    memory = memory[: (rows - 1) * width + K] if end == "of the last row" else memory
    memory = memory.clone()  # exactly that long
    memory.as_strided((rows, K), (width, 1)).copy_(logits.detach().flatten(0, -2))
    straight = memory.as_strided((rows, K), (width, 1)).view(logits.shape)

    class Apart(torch.autograd.Function):
        @staticmethod
        def forward(ctx, logits):
            return straight

        @staticmethod
        def backward(ctx, grad):
            return grad

    return op(Apart.apply(logits), **others)


@pytest.mark.parametrize("backend", backends("two_hot_loss", reference=False))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("end", [None, "of the last row"])
@pytest.mark.parametrize(
    ("shape", "width"), [((3, 5, 41), 48), ((3, 5, 41), 64), ((9, 15), 16), ((9, 15), 19)]
)
def test_rows_that_lie_apart(shape, width, end, dtype, backend):
    given = logits(shape, dtype, backend.device)
    for op, reference, more in (
        (two_hot_loss, two_hot_loss_reference, {"target": targets(shape[:-1], backend.device)}),
        (two_hot_mean, two_hot_mean_reference, {}),
    ):
        arguments = {"logits": given, **more}
        check_against_fp64(
            partial(apart, partial(op, backend=backend.name), width=width, end=end), reference, arguments
        )


def test_rows_that_lie_apart_are_read_in_place():
    memory = torch.zeros(6, 16)
    for given, columns in (
        (memory[:, :15], 16),
        (memory[:, 1:16], 15),
        (memory[::2, :9], 16),
        (memory[:, :4], 4),
    ):
        rows = tiles.rows_apart(given, given.shape[1])
        assert rows.data_ptr() == given.data_ptr()
        assert tiles.readable_columns(rows, 16 if given.shape[1] > 4 else 4) == columns
    assert tiles.readable_columns(torch.zeros(0, 15), 16) == 15
    assert tiles.rows_apart(memory[:4].mT, 4).is_contiguous()
    assert tiles.rows_apart(torch.zeros(5), 5).shape == (1, 5)


@pytest.mark.parametrize("backend", backends("two_hot_loss", reference=False))
@pytest.mark.parametrize("scale", [1e-6, 1e-3, 0.03])
def test_small_targets_keep_their_digits(scale, backend):
    """In one plus a small target, rounding leaves little of the target."""
    target = torch.rand(256, generator=torch.Generator().manual_seed(0)) * scale
    arguments = {
        "logits": logits((256, 255), torch.float32, backend.device),
        "target": target.to(backend.device),
    }
    bins = {"low": 0.0, "high": 1.0}
    check_against_fp64(partial(two_hot_loss, backend=backend.name), two_hot_loss_reference, arguments | bins)


@pytest.mark.parametrize("backend", backends("two_hot_mean", reference=False))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("low", "high"), [(-1.0, 4.0), (-4.0, 1.0), (2.0, 5.0), (-5.0, -2.0)])
def test_bins_that_are_not_symmetric(low, high, dtype, backend):
    given, bins = logits((12, 31), dtype, backend.device), {"low": low, "high": high}
    target = torch.linspace(-20, 20, 12, device=backend.device)
    check_against_fp64(
        partial(two_hot_loss, backend=backend.name),
        two_hot_loss_reference,
        {"logits": given, "target": target, **bins},
    )
    check_against_fp64(
        partial(two_hot_mean, backend=backend.name), two_hot_mean_reference, {"logits": given, **bins}
    )


@pytest.mark.parametrize("backend", backends("two_hot_mean", reference=False))
@pytest.mark.parametrize(("scale", "offset"), [(1e-3, 0.0), (1e3, 0.0), (2.0, 1e4), (300.0, -1e4)])
def test_extreme_logits(scale, offset, backend):
    given = (logits((12, 31), torch.float32, backend.device, scale).detach() + offset).requires_grad_()
    bins = {"low": -3.0, "high": 3.0}
    check_against_fp64(
        partial(two_hot_loss, backend=backend.name),
        two_hot_loss_reference,
        {"logits": given, "target": targets((12,), backend.device), **bins},
    )
    check_against_fp64(
        partial(two_hot_mean, backend=backend.name), two_hot_mean_reference, {"logits": given, **bins}
    )


@pytest.mark.parametrize("backend", backends("two_hot_loss", reference=False))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_largest_logit_is_found_wherever_it_is(dtype, backend):
    """Subtracting any other would overflow: exp(10^4)."""
    rows = (1e4 * torch.eye(255)).to(backend.device, dtype)
    target = torch.linspace(-100, 100, 255, device=backend.device)
    losses = [two_hot_loss(rows, target, backend=name) for name in (backend.name, "reference")]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-3)
    means = [two_hot_mean(rows, backend=name) for name in (backend.name, "reference")]
    torch.testing.assert_close(*means, rtol=1e-4, atol=1e-4)
    assert losses[0].isfinite().all()


@pytest.mark.parametrize("backend", backends("two_hot_mean"))
def test_bfloat16_logits_are_computed_with_in_float32(backend):
    given, target = logits((4, 63), torch.bfloat16, backend.device), targets((4,), backend.device)
    for op in (
        partial(two_hot_mean, backend=backend.name),
        partial(two_hot_loss, target=target, backend=backend.name),
    ):
        assert torch.allclose(op(given), op(given.float()), rtol=1e-5, atol=1e-6)


def test_called_under_inference_mode_first_it_still_trains():
    given = logits((3, 21), torch.float32, "cpu")
    with torch.inference_mode():
        two_hot_mean(given, -3.25, 4.0, backend="reference")
    two_hot_mean(given, -3.25, 4.0, backend="reference").sum().backward()
    assert given.grad.abs().max() > 0


def test_symlog_and_symexp_invert_each_other():
    x = torch.tensor([-1e6, -1.0, -1e-6, 0.0, 1e-6, 1.0, 1e6], dtype=torch.float64)
    assert torch.allclose(symexp(symlog(x)), x, rtol=1e-12, atol=0)
    assert symlog(torch.tensor(math.e - 1)).item() == pytest.approx(1.0)


def test_symexp_has_the_right_gradient_at_zero():
    x = torch.tensor([-2.0, 0.0, 2.0], requires_grad=True)
    symexp(x).sum().backward()
    assert x.grad.tolist() == pytest.approx([math.exp(2), 1.0, math.exp(2)])


@pytest.mark.parametrize("backend", backends("two_hot_loss"))
def test_loss_of_literal_numbers(backend):
    # Three bins at -1, 0, 1; symlog(target) = 0.25 lies a quarter of the way from bin 1 to bin 2.
    logits = torch.tensor([[1.0, 2.0, 3.0]], device=backend.device)
    target = torch.tensor([math.expm1(0.25)], device=backend.device)
    log_total = math.log(math.exp(1) + math.exp(2) + math.exp(3))
    expected = -(0.75 * (2 - log_total) + 0.25 * (3 - log_total))
    loss = two_hot_loss(logits, target, low=-1, high=1, backend=backend.name)
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_mean_of_literal_numbers():
    logits = torch.tensor(
        [[0.0, math.log(2.0), math.log(5.0)]]
    )  # probabilities 1/8, 2/8, 5/8 of bins -1, 0, 1
    assert two_hot_mean(logits, low=-1, high=1).item() == pytest.approx(math.expm1(0.5), rel=1e-6)


@pytest.mark.parametrize("backend", backends("two_hot_mean"))
def test_small_means_keep_their_digits(backend):
    logits = torch.zeros(1, 2, device=backend.device)
    mean = two_hot_mean(logits, low=0.0, high=1e-3, backend=backend.name)
    assert mean.item() == pytest.approx(math.expm1(5e-4), rel=1e-6)


@pytest.mark.parametrize("backend", backends("two_hot_mean"))
def test_bins_between_ends_that_float32_rounds(backend):
    """Near the middle, the rounding of the ends costs digits of a bin."""
    logits = torch.zeros(1, 255, device=backend.device)
    logits[0, 128] = 200.0
    mean = two_hot_mean(logits, low=-20.3, high=19.9, backend=backend.name)
    assert mean.item() == pytest.approx(-math.expm1(20.3 - 128 * 40.2 / 254), rel=1e-6)


@pytest.mark.parametrize("backend", backends("two_hot_mean"))
def test_uniform_logits_mean_zero_with_a_gradient(backend):
    logits = torch.zeros(4, 255, device=backend.device, requires_grad=True)
    mean = two_hot_mean(logits, backend=backend.name)
    assert mean.abs().max() < 1e-6
    mean.sum().backward()
    assert logits.grad[0].tolist() == pytest.approx([k * 20 / 127 / 255 for k in range(-127, 128)], abs=1e-6)


@pytest.mark.parametrize("backend", backends("two_hot_loss"))
@pytest.mark.parametrize(
    ("target", "bin_"), [(1e30, 254), (math.inf, 254), (-1e30, 0), (-math.inf, 0), (0.0, 127)]
)
def test_targets_on_and_beyond_the_bins(target, bin_, backend):
    logits = torch.randn(1, 255, generator=torch.Generator().manual_seed(0)).to(backend.device)
    loss = two_hot_loss(logits, torch.tensor([target], device=backend.device), backend=backend.name)
    assert loss.item() == pytest.approx(-logits.log_softmax(-1)[0, bin_].item(), rel=1e-5)


@pytest.mark.parametrize("backend", backends("two_hot_loss"))
def test_nan_target_gives_nan_loss(backend):
    target = torch.tensor([math.nan, 0.0], device=backend.device)
    loss = two_hot_loss(torch.zeros(2, 255, device=backend.device), target, backend=backend.name)
    assert loss.isnan().tolist() == [True, False]


def test_gradients_of_the_references():
    given, target = random(3, 5).requires_grad_(), torch.tensor([0.3, -2.0, 9.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda given: two_hot_loss_reference(given, target, -2, 2), given)
    assert torch.autograd.gradcheck(lambda given: two_hot_mean_reference(given, -2, 2), given)


def test_loss_is_the_cross_entropy_of_the_dense_code():
    given, target = random(50, 255), random(50, seed=1, scale=300.0)
    bins = torch.linspace(-20, 20, 255, dtype=torch.float64)
    code = (1 - (symlog(target)[:, None] - bins).abs() / (bins[1] - bins[0])).clamp(
        min=0
    )  # a tent at each bin
    expected = -(code * given.log_softmax(-1)).sum(-1)
    assert torch.allclose(two_hot_loss(given, target), expected, rtol=1e-9)


def test_bins_that_pytorch_made_while_tracing_are_not_kept():
    logits = random(2, 93)
    make_fx(lambda x: two_hot_mean(x, backend="reference"), tracing_mode="fake")(logits)
    assert type(two_hot_mean(logits, backend="reference")) is torch.Tensor


def test_mistakes_are_answered():
    with pytest.raises(ValueError, match=r"target has shape \(3, 1\), expected \(3,\)"):
        two_hot_loss(torch.zeros(3, 5), torch.zeros(3, 1))
    with pytest.raises(ValueError, match="at least 2 bins and finite low < high, got 5 from 1 to 1"):
        two_hot_mean(torch.zeros(3, 5), low=1, high=1)


@pytest.mark.parametrize("backend", backends("two_hot_loss", reference=False))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("rows", [1, 20])
def test_bins_of_probability_zero(rows, dtype, backend):
    """Their logits are minus infinity, their gradients zero; the targets lie elsewhere."""
    given = logits((rows, 255), dtype, backend.device).detach()
    given[:, :60] = given[:, 200:] = -math.inf
    target = random(rows, seed=1).to(backend.device)
    for op, reference in (
        (partial(two_hot_loss, target=target), partial(two_hot_loss_reference, target=target)),
        (two_hot_mean, two_hot_mean_reference),
    ):
        results = []
        for call in (partial(op, backend=backend.name), reference):
            x = given.clone().requires_grad_()
            y = call(x)
            results.append((y.detach(), *torch.autograd.grad(y.sum(), [x])))
        for got, expected in zip(*results, strict=True):
            assert got.isfinite().all()
            torch.testing.assert_close(
                got, expected, rtol=2e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-4
            )
        assert not results[0][1][:, :60].any()
