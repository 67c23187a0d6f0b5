"""onehot_linear: values and gradients equal those of a dense layer on one-hot latents, on every backend."""

from functools import partial

import pytest
import torch
from checks import backends, check_against_fp64, random
from torch.profiler import ProfilerActivity, profile

from hdfast_kernels import expand_onehot, onehot_linear

# leading axes, S, K, U: one row; odd; the agent's 32 x 32; no rows; one group; more rows than a block; whole tiles;
# rows that are added up in parts; more classes than one program of a backward pass takes, in one group, too
CASES = [
    ((1,), 3, 5, 7),
    ((3, 3), 5, 7, 33),
    ((6,), 32, 32, 48),
    ((0,), 2, 4, 8),
    ((9,), 1, 2, 1),
    ((150,), 4, 40, 140),
    ((40,), 3, 8, 256),
    ((4200,), 3, 5, 24),
    ((130,), 32, 32, 70),
    ((70,), 2, 130, 16),
    ((40,), 1, 300, 24),
]


def dense(index, weight, straight_through, onto=0.0):
    """The definition: straight-through one-hot latents times the weight, in float32 or float64."""
    classes = weight.shape[0] // index.shape[-1]
    one_hot = (index.unsqueeze(-1) == torch.arange(classes, device=index.device)).to(straight_through.dtype)
    latents = one_hot + (straight_through - straight_through.detach())
    compute = torch.promote_types(weight.dtype, torch.float32)
    return (latents.flatten(-2).to(compute) @ weight.to(compute) + onto).to(weight.dtype)


def inputs(rows, S, K, U, dtype, device, index_dtype=torch.int64):
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(0, K, (*rows, S), generator=generator)
    return {
        "index": index.to(device, index_dtype),
        "weight": random(S * K, U, scale=0.3).to(device, dtype).requires_grad_(),
        "straight_through": random(*rows, S, K, seed=1).to(device, dtype).requires_grad_(),
        "onto": random(*rows, U, seed=2).to(device, dtype).requires_grad_(),
    }


@pytest.mark.parametrize("backend", backends("onehot_linear"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("rows", "S", "K", "U"), CASES, ids=str)
def test_errs_no_more_than_twice_a_dense_layer(rows, S, K, U, dtype, backend):
    arguments = inputs(rows, S, K, U, dtype, backend.device)
    check_against_fp64(partial(onehot_linear, backend=backend.name), dense, arguments)


def one_hot(index, classes, dtype):
    return (index.unsqueeze(-1) == torch.arange(classes, device=index.device)).flatten(-2).to(dtype)


def with_matrix(index, weight, straight_through=None, onto=None, *, backend):
    matrix = one_hot(index, weight.shape[0] // index.shape[-1], weight.dtype)
    return onehot_linear(index, weight, straight_through, onto, matrix, backend=backend)


@pytest.mark.parametrize("backend", backends("onehot_linear"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("rows", "S", "K", "U"), CASES, ids=str)
def test_a_one_hot_matrix_beside_the_classes_changes_nothing(rows, S, K, U, dtype, backend):
    arguments = inputs(rows, S, K, U, dtype, backend.device)
    op = partial(with_matrix, backend=backend.name)
    check_against_fp64(op, dense, arguments)
    del arguments["onto"]
    check_against_fp64(op, dense, arguments)


@pytest.mark.parametrize("backend", backends("onehot_linear"))
@pytest.mark.parametrize(
    ("rows", "S", "K"), [((1,), 1, 1), ((3, 5), 4, 7), ((70,), 32, 32), ((0,), 2, 4)], ids=str
)
def test_the_one_hot_matrix(rows, S, K, backend, monkeypatch):
    monkeypatch.setenv("KINETO_LOG_LEVEL", "6")  # as `profile.measure`: it is read once in a process
    monkeypatch.setenv("HDFAST_BACKEND", backend.name)
    index = torch.randint(0, K, (*rows, S), generator=torch.Generator().manual_seed(1)).to(backend.device)
    with profile(activities=[ProfilerActivity.CPU]) as found:
        made = expand_onehot(index, K, torch.bfloat16)
    assert ("hdfast::onehot_matrix" in {event.name for event in found.events()}) == (made is not None)
    if backend.name == "triton":
        assert torch.equal(made, one_hot(index, K, torch.bfloat16))
    else:
        assert made is None
    assert expand_onehot(index, K, torch.float32) is None


@pytest.mark.parametrize("backend", backends("onehot_linear"))
def test_without_straight_through_and_with_int32(backend):
    arguments = inputs((5,), 4, 6, 12, torch.float32, backend.device, torch.int32)
    latents = arguments.pop("straight_through").detach()
    del arguments["onto"]
    check_against_fp64(
        partial(onehot_linear, backend=backend.name),
        partial(dense, straight_through=latents.double()),
        arguments,
    )


@pytest.mark.parametrize("backend", backends("onehot_linear"))
def test_the_value_of_the_latents_is_not_read(backend):
    arguments = inputs((5,), 4, 6, 12, torch.float32, backend.device)
    latents = torch.full_like(arguments["straight_through"], float("nan"))
    y = onehot_linear(arguments["index"], arguments["weight"], latents, backend=backend.name)
    assert y.isfinite().all()


@pytest.mark.parametrize("backend", backends("onehot_linear"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("rows", [(3,), (16, 9)], ids=str)
def test_one_group_is_an_embedding(rows, dtype, backend):
    arguments = inputs(rows, 1, 6, 40, dtype, backend.device)
    index, weight = arguments["index"], arguments["weight"]
    y = onehot_linear(index, weight, backend=backend.name)
    assert torch.equal(y, torch.nn.functional.embedding(index[..., 0], weight))
    y.sum().backward()
    count = torch.bincount(index.flatten(), minlength=6).to(dtype)
    assert torch.equal(weight.grad, count[:, None].expand(6, 40))


@pytest.mark.parametrize("backend", backends("onehot_linear"))
def test_literal_numbers(backend):
    weight = torch.tensor([[1.0, 2.0], [10.0, 20.0], [100.0, 200.0], [1000.0, 2000.0]], device=backend.device)
    index = torch.tensor([[1, 0], [0, 1]], device=backend.device)  # rows 1 and 2; rows 0 and 3
    assert onehot_linear(index, weight, backend=backend.name).tolist() == [[110.0, 220.0], [1001.0, 2002.0]]


@pytest.mark.parametrize("backend", backends("onehot_linear"))
def test_weight_gradient_repeats_bit_by_bit(backend):
    arguments = inputs((300,), 3, 4, 20, torch.float32, backend.device)
    slope = random(300, 20, seed=3).to(backend.device, torch.float32) / 3

    def gradient():
        y = onehot_linear(arguments["index"], arguments["weight"], backend=backend.name)
        return torch.autograd.grad(y, arguments["weight"], slope)[0]

    assert torch.equal(gradient(), gradient())


@pytest.mark.parametrize("backend", backends("onehot_linear"))
def test_what_is_added_to_comes_in_any_layout_and_takes_a_gradient_alone(backend):
    arguments = inputs((5,), 4, 6, 12, torch.float32, backend.device)
    index, weight, onto = arguments["index"], arguments["weight"].detach(), random(12, 5).mT
    onto = onto.to(backend.device, torch.float32).requires_grad_()
    y = onehot_linear(index, weight, onto=onto, backend=backend.name)
    torch.testing.assert_close(y, onto + onehot_linear(index, weight, backend=backend.name))
    y.backward(torch.arange(60.0, device=y.device).view(5, 12))
    assert torch.equal(onto.grad, torch.arange(60.0, device=y.device).view(5, 12))


def test_mistakes_are_answered():
    with pytest.raises(TypeError, match=r"index has dtype torch\.float32"):
        onehot_linear(torch.zeros(2, 3), torch.ones(12, 4))
    with pytest.raises(ValueError, match=r"weight has shape \(10, 4\), expected \(3 groups \* K, U\)"):
        onehot_linear(torch.zeros(2, 3, dtype=torch.int64), torch.ones(10, 4))
    with pytest.raises(ValueError, match=r"straight_through has shape \(2, 3, 5\), expected \(2, 3, 4\)"):
        onehot_linear(torch.zeros(2, 3, dtype=torch.int64), torch.ones(12, 4), torch.ones(2, 3, 5))
    with pytest.raises(ValueError, match=r"onto has shape \(2, 5\), expected \(2, 4\)"):
        onehot_linear(torch.zeros(2, 3, dtype=torch.int64), torch.ones(12, 4), onto=torch.ones(2, 5))
    with pytest.raises(TypeError, match=r"onto has dtype torch\.bfloat16, expected that of weight"):
        onehot_linear(
            torch.zeros(2, 3, dtype=torch.int64), torch.ones(12, 4), onto=torch.ones(2, 4).bfloat16()
        )
