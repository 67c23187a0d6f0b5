"""adam_step: every backend against torch.optim in float64, the clip, and the steps that are left out."""

import math

import pytest
import torch
from checks import backends, random

from hdfast_kernels import adam_step, backends_available, dispatch, native
from tests.calls import Calls

SHAPES = [(3, 5), (), (17000,), (2, 3, 4, 4)]
BACKENDS = backends("adam_step")
# Some compute 1 - beta^step in float32, which for 0.999 is off by 1e-5.
TIGHT = {"reference": 2e-5, "triton": 2e-6, "native": 2e-6}


class State:
    """Parameters, moments and step count of the shapes above."""

    def __init__(self, device="cpu", dtype=torch.float32):
        self.params = [random(*shape, seed=k).to(device, dtype) for k, shape in enumerate(SHAPES)]
        self.exp_avg = [torch.zeros_like(param) for param in self.params]
        self.exp_avg_sq = [torch.zeros_like(param) for param in self.params]
        self.step = torch.zeros((), device=device)

    def take(self, grads, lr=1e-2, **options):
        return adam_step(self.params, grads, self.exp_avg, self.exp_avg_sq, self.step, lr, **options)

    def tensors(self):
        return [*self.params, *self.exp_avg, *self.exp_avg_sq, self.step]


def gradients(seed, device="cpu", dtype=torch.float32):
    return [random(*shape, seed=10 * seed + k).to(device, dtype) for k, shape in enumerate(SHAPES)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_equals_torch_in_float64(weight_decay, backend):
    state, exact = State(backend.device), State(dtype=torch.float64)
    params = [param.requires_grad_() for param in exact.params]
    optimizer = torch.optim.Adam(params, lr=1e-2, betas=(0.8, 0.95), eps=1e-6, weight_decay=weight_decay)
    for seed in range(5):
        for param, grad in zip(params, gradients(seed, dtype=torch.float64), strict=True):
            param.grad = grad
        whole = torch.nn.utils.clip_grad_norm_(params, 100.0)  # adds 1e-6 to the norm
        optimizer.step()
        norm, applied = state.take(
            gradients(seed, backend.device),
            betas=(0.8, 0.95), eps=1e-6, weight_decay=weight_decay, max_norm=100.0, backend=backend.name,
        )  # fmt: skip
        assert whole > 100
        assert norm.item() == pytest.approx(whole.item(), rel=1e-5)
        assert applied.item() is True
    assert state.step.item() == 5
    for mine, theirs in zip(state.params, params, strict=True):
        assert (mine.cpu() - theirs).abs().max() < 2e-5


def test_the_definition_takes_all_parameters_at_once():
    """On CUDA foreach operations go one by one if any two of their tensors differ in memory order."""
    works = []
    for many in (1, 5):
        state, grads = State(), gradients(0)
        grads[3] = grads[3].contiguous(memory_format=torch.channels_last)
        assert grads[3].stride() != state.params[3].stride()
        for name in ("params", "exp_avg", "exp_avg_sq"):
            tensors = getattr(state, name)
            setattr(state, name, tensors + [tensor.clone() for tensor in tensors * (many - 1)])
        with Calls() as calls:
            state.take(grads * many, max_norm=1.0, backend="reference")
        for name, given in calls.made:
            lists = [one for one in given if isinstance(one, list)] if "_foreach" in name else []
            for tensors in zip(*lists, strict=True):
                assert len({tensor.stride() for tensor in tensors}) == 1, name
        works.append([name for name, _ in calls.made if "view" not in name and "clone" not in name])
    assert works[0] == works[1]  # only a gradient of another order is copied, at any number of parameters


@pytest.mark.parametrize("backend", BACKENDS)
def test_literal_numbers(backend):
    """The first step moves by the learning rate against the sign of the gradient, whatever its size."""
    params = [torch.tensor([1.0, 2.0], device=backend.device)]
    moments = [torch.zeros_like(params[0])], [torch.zeros_like(params[0])]
    step, lr = torch.zeros((), device=backend.device), torch.tensor(0.5, device=backend.device)
    grads = [torch.tensor([3.0, -4.0], device=backend.device)]
    norm, _ = adam_step(params, grads, *moments, step, lr, max_norm=1.0, backend=backend.name)
    assert norm.item() == 5.0
    assert params[0].tolist() == pytest.approx([0.5, 2.5], rel=1e-4)  # 1 - 0.999 in float32
    assert moments[0][0].tolist() == pytest.approx([0.06, -0.08], rel=1e-6)  # a tenth of the clipped gradient
    assert moments[1][0].tolist() == pytest.approx([0.36e-3, 0.64e-3], rel=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.999, 0.99999)])
def test_the_moments_take_what_a_beta_lacks_to_one(betas, backend):
    """This is not 1 minus a beta that was rounded to float32."""
    state = State(backend.device)
    for seed in range(3):
        state.take(gradients(seed, backend.device), betas=betas, backend=backend.name)
    for which, (moment, beta) in enumerate(zip((state.exp_avg, state.exp_avg_sq), betas, strict=True)):
        seen = [[grad ** (1 + which) for grad in gradients(seed, dtype=torch.float64)] for seed in range(3)]
        for got, first, second, third in zip(moment, *seen, strict=True):
            exact = (1 - beta) * (beta**2 * first + beta * second + third)
            assert (got.cpu() - exact).abs().max() < 3e-7 * exact.abs().max()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.99)])
@pytest.mark.parametrize("done", [0, 1, 2, 6, 999, 98912])
def test_both_moments_are_debiased(done, betas, backend):
    """If the moments have seen only this gradient, the step is as long as the learning rate."""
    grad = torch.tensor([2.0, -0.25], dtype=torch.float64)
    seen = [1 - beta**done for beta in betas]
    moments = [
        [(grad * seen[0]).float().to(backend.device)],
        [(grad**2 * seen[1]).float().to(backend.device)],
    ]
    param, step = torch.zeros(2, device=backend.device), torch.tensor(float(done), device=backend.device)
    grads = [grad.float().to(backend.device)]
    adam_step([param], grads, *moments, step, 1e-3, betas, backend=backend.name)
    assert step.item() == done + 1
    assert param.tolist() == pytest.approx([-1e-3, 1e-3], rel=TIGHT[backend.name])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("max_norm", [math.inf, 1.0], ids=["unclipped", "clipped"])
def test_many_tensors_as_one(max_norm, backend):
    """In one flat tensor, like a model's on CUDA, each number changes as in its own tensor."""
    many, one = State(backend.device), State(backend.device)

    def flat(tensors):
        return [torch.cat([tensor.reshape(-1) for tensor in tensors])]

    one.params, one.exp_avg, one.exp_avg_sq = map(flat, (one.params, one.exp_avg, one.exp_avg_sq))
    for seed in range(3):
        grads = gradients(seed, backend.device)
        options = {"max_norm": max_norm, "weight_decay": 0.1, "backend": backend.name}
        for mine, theirs in zip(one.take(flat(grads), **options), many.take(grads, **options), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=0)
    for name in ("params", "exp_avg", "exp_avg_sq"):
        (mine,), (theirs,) = getattr(one, name), flat(getattr(many, name))
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_tensors_in_any_order_of_memory(backend):
    """Channels-last, as convolutions prefer, and every other row of a larger tensor."""
    plain, other = State(backend.device), State(backend.device)
    for name in ("params", "exp_avg", "exp_avg_sq"):
        tensors = getattr(other, name)
        tensors[3] = tensors[3].contiguous(memory_format=torch.channels_last)
    wide = torch.zeros(6, 5, device=backend.device)
    wide[::2] = other.params[0]
    other.params[0] = wide[::2]
    assert not any(tensor.is_contiguous() for tensor in (other.params[0], other.exp_avg[3]))
    for seed in range(3):
        grads = gradients(seed, backend.device)
        plain.take(grads, max_norm=1.0, backend=backend.name)
        other.take(grads, max_norm=1.0, backend=backend.name)
    for mine, theirs in zip(other.tensors(), plain.tensors(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-8)
    assert wide[1::2].abs().max() == 0
    assert other.params[3].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf, None])
def test_a_step_that_is_left_out_changes_nothing(poison, backend):
    state = State(backend.device)
    state.take(gradients(0, backend.device), backend=backend.name)
    before, grads = [tensor.clone() for tensor in state.tensors()], gradients(1, backend.device)
    apply = torch.tensor(poison is not None, device=backend.device)
    if poison is not None:
        grads[2][-1] = poison
    kept = [grad.clone() for grad in grads]
    norm, applied = state.take(grads, weight_decay=0.1, max_norm=1.0, apply=apply, backend=backend.name)
    assert applied.item() is False
    assert norm.isfinite().item() is (poison is None)
    assert all(map(torch.equal, before, state.tensors()))
    assert all(torch.equal(old.nan_to_num(), new.nan_to_num()) for old, new in zip(kept, grads, strict=True))
    # and the next one goes on as if nothing had happened
    state.take(gradients(2, backend.device), backend=backend.name)
    assert state.step.item() == 2
    assert all(tensor.isfinite().all() for tensor in state.tensors())


@pytest.mark.parametrize("isa", native.isas() if dispatch.native_built() else [])
def test_any_number_of_threads_gives_the_same_bits(isa, monkeypatch):
    results = []
    for threads in (1, 2, 5):
        monkeypatch.setattr(native, "threads", lambda threads=threads: threads)
        state = State()
        with native.force_isa(isa):
            for seed in range(2):
                state.take(gradients(seed), max_norm=1.0, backend="native")
        results.append(state.tensors())
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_the_norm_of_many_small_numbers():
    """A sum of squares in float would stop growing."""
    count = 1 << 24
    params = [torch.zeros(count)]
    norm, _ = adam_step(
        params, [torch.full((count,), 0.1)], [torch.zeros(count)], [torch.zeros(count)], torch.zeros(()), 0.0,
        backend="native",
    )  # fmt: skip
    assert norm.item() == pytest.approx(0.1 * 4096, rel=1e-6)


def test_gradients_of_any_layout():
    state, other = State(), State()
    grads = gradients(0)
    strided = [*grads[:3], grads[3].to(memory_format=torch.channels_last)]
    state.take(grads, backend="native")
    other.take(strided, backend="native")
    assert all(map(torch.equal, state.tensors(), other.tensors()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_in_bfloat16_are_those_numbers(backend):
    state, other = State(backend.device), State(backend.device)
    low = [grad.bfloat16() for grad in gradients(0, backend.device)]
    norm, _ = state.take(low, backend=backend.name)
    expected, _ = other.take([grad.float() for grad in low], backend=backend.name)
    assert norm.dtype == torch.float32
    assert norm.item() == expected.item()
    assert all(map(torch.equal, state.tensors(), other.tensors()))


def test_mistakes_are_answered():
    state = State()
    with pytest.raises(ValueError, match="4 params, 3 grads, 4 exp_avg, 4 exp_avg_sq; expected as many"):
        state.take(gradients(0)[:-1])
    with pytest.raises(ValueError, match=r"0 params, 0 grads, .*, and at least 1"):
        adam_step([], [], [], [], state.step, 0.1)
    state.step = torch.zeros(1)
    with pytest.raises(ValueError, match=r"step is torch.float32 \(1,\), expected a float32 scalar tensor"):
        state.take(gradients(0))
    state.step = 1
    with pytest.raises(ValueError, match="step is 1, expected a float32 scalar tensor"):
        state.take(gradients(0))
    state = State()
    for apply, got in (
        (True, "True"),
        (torch.ones(()), r"torch.float32 \(\)"),
        (torch.tensor([True]), r"torch.bool \(1,\)"),
    ):
        with pytest.raises(ValueError, match=f"apply is {got}, expected a bool scalar tensor"):
            state.take(gradients(0), apply=apply)
    with pytest.raises(ValueError, match=r"lr is torch.float32 \(2,\), expected a float32 scalar tensor"):
        state.take(gradients(0), lr=torch.tensor([1e-2, 1e-3]))
    for betas in ((0.9, 1.0), (-0.1, 0.999), (0.9, math.nan)):
        with pytest.raises(ValueError, match=r"betas are \(.*\), expected two numbers in \[0, 1\)"):
            state.take(gradients(0), betas=betas)
    grads = gradients(0)
    grads[2] = None
    with pytest.raises(ValueError, match=r"grads\[2\] is None, expected a tensor"):
        state.take(grads)
    grads[2] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"grads\[2\] has shape \(3,\), expected \(17000,\)"):
        state.take(grads)
    assert not any(tensor.any() for tensor in state.tensors()[len(SHAPES) :]), "and nothing was changed"
    state = State()
    state.exp_avg_sq[0] = state.exp_avg_sq[0].double()
    for backend in {"native", "triton"} & {*backends_available("adam_step", state.step)}:
        with pytest.raises(TypeError, match=r"a tensor is torch.float64, expected float32"):
            state.take(gradients(0), backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_backward_through_what_was_computed_before_is_refused(backend):
    param = torch.ones(3, device=backend.device, requires_grad=True)
    loss = (param * param).sum()
    state = [torch.zeros(3, device=backend.device) for _ in range(2)]
    step = torch.zeros((), device=backend.device)
    adam_step([param], [torch.ones_like(param)], *([one] for one in state), step, 0.1, backend=backend.name)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_norm_of_nothing_clipped_to_nothing(backend):
    param, zeros = (
        torch.ones(3, device=backend.device),
        [torch.zeros(3, device=backend.device) for _ in range(3)],
    )
    step = torch.zeros((), device=backend.device)
    norm, applied = adam_step(
        [param], [zeros[0]], [zeros[1]], [zeros[2]], step, 1e-3, max_norm=0.0, backend=backend.name
    )
    assert (norm.item(), applied.item(), step.item()) == (0.0, True, 1.0)
    assert param.tolist() == [1.0, 1.0, 1.0]
