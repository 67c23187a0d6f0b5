"""Whether an op or a captured graph is right: what is wrong is found, and nothing right is rejected."""

import pytest
import torch

from hdfast.agent.updates import Updates
from hdfast.tuning import trials as trying
from hdfast.tuning.choice import Job
from hdfast.tuning.trials import EAGER, GRAPH, OVERLAP, Trials
from hdfast_kernels import dispatch
from tests.agent_cases import SPECS, make_actions, one_thread, small_config  # noqa: F401
from tests.recorder import CaptureError, record_instead_of_capturing

CPU = torch.device("cpu")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SIZES = {"replay": {"batch": 4, "length": 8}}


@pytest.fixture(autouse=True)
def _no_backend_forced(monkeypatch):
    monkeypatch.delenv("HDFAST_BACKEND", raising=False)


def make_trials(dtype=torch.float32, device=CPU, continuous=False) -> Trials:
    job = Job(SPECS, make_actions(continuous), small_config(**SIZES), torch.device(device), dtype)
    trials = Trials(job)
    trials.measure_definition()
    return trials


@pytest.mark.parametrize("continuous", [False, True], ids=["discrete", "continuous"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("device", DEVICES)
def test_every_op_is_right(device, dtype, continuous):
    trials = make_trials(dtype, device, continuous)
    ops = trials.candidates()
    assert set(ops.values()) == {*trying.FUSED[device]}
    assert {op: trials.judge({op: backend}).why for op, backend in ops.items()} == dict.fromkeys(ops, "")
    assert trials.judge(ops).right, "all together"


def scaled(op: str, factor: float):
    """An op's definition with its first tensor, and so its gradient, too large or too small."""

    def wrong(*args, **kwargs):
        out = dispatch.implementation(op, "reference")(*args, **kwargs)
        if isinstance(out, torch.Tensor):
            given = any(out is argument for argument in args)  # to be written into
            return out.mul_(factor) if given else out * factor
        first, *rest = out
        return type(out)(first * factor, *rest) if hasattr(out, "_fields") else (first * factor, *rest)

    return wrong


WRONG = (
    "layer_norm_silu",
    "layer_norm_gru",
    "two_hot_loss",
    "lambda_return",
    "image_loss",
    "linear",
    "strided_conv",
)


@pytest.mark.parametrize("op", WRONG)
def test_a_wrong_op_is_found_out(op):
    with dispatch.replaced(op, "native", scaled(op, 1.1)):
        trials = make_trials(torch.bfloat16)
        found = trials.judge({op: "native"})
        assert not found.right
        assert found.why.startswith("float32: ")
        assert " is off by " in found.why
        assert trials.judge({op: "reference"}).right


@pytest.mark.parametrize(
    ("wrong_at", "starts", "why"),
    [({1, 2}, [0], ""), ({0}, [0, 1], ""), ({0, 1}, [0, 1, 2], ""), ({0, 1, 2}, [0, 1, 2], "wrong at 0")],
)
def test_what_goes_astray_from_every_start_is_wrong(wrong_at, starts, why, monkeypatch):
    trials = make_trials()
    asked = []

    def fault(ops, dtype, nudge, expected):
        asked.append(nudge)
        return f"wrong at {nudge}" if nudge in wrong_at else ""

    monkeypatch.setattr(trials, "_fault", fault)
    found = trials.judge({})
    assert (found.right, found.why, asked) == (not why, why, starts)


def test_an_op_that_is_not_finite_is_found_out():
    with dispatch.replaced("kl_balance", "native", scaled("kl_balance", float("nan"))):
        assert not make_trials().judge({"kl_balance": "native"}).right


def test_an_optimizer_that_steps_too_far_is_found_out():
    reference = dispatch.implementation("adam_step", "reference")

    def far(parameters, gradients, mean, square, steps, lr, *rest, **kwargs):
        return reference(parameters, gradients, mean, square, steps, 1.2 * lr, *rest, **kwargs)

    with dispatch.replaced("adam_step", "native", far):
        assert make_trials().judge({"adam_step": "native"}).why.startswith("float32: step of ")


def test_nothing_is_tried_where_the_environment_decides(monkeypatch):
    monkeypatch.setenv("HDFAST_BACKEND", "reference")
    assert make_trials().candidates() == {}


@pytest.mark.parametrize("way", [GRAPH, OVERLAP])
def test_a_captured_update_and_action_are_right(way, monkeypatch):
    made = record_instead_of_capturing(monkeypatch)
    assert make_trials().judge_graph({}, way).right
    assert all(step.recording is not None for step in made), "both were replayed"
    assert len(made) == 2


def test_a_wrong_capture_is_found_out(monkeypatch):
    record_instead_of_capturing(monkeypatch)
    trials = make_trials()

    def draws_nothing(learner):
        pass

    def learns_nothing(learner):
        for shape in ((8, 4, 4), (4, 32, 4), (4, 32)):
            torch.rand(shape, generator=learner.generator)

    def captured_as(replay):
        def captured(learner, sample, generators, *, overlap):
            calls = []

            def step():
                calls.append(1)
                learner.step(sample) if len(calls) <= trying.WARMUP else replay(learner)

            return Updates(learner, step)

        return captured

    monkeypatch.setattr(trying, "captured_updates", captured_as(draws_nothing))
    assert trials.judge_graph({}).why == "a captured update draws other random numbers"
    assert trials.judge_graph({}, OVERLAP).why == "an overlapped update draws other random numbers"
    monkeypatch.setattr(trying, "captured_updates", captured_as(learns_nothing))
    assert " off by " in trials.judge_graph({}).why


def test_a_capture_that_one_latent_leads_astray_is_tried_from_elsewhere(monkeypatch):
    """With nondeterministic kernels the captured update may round otherwise than both eager ones."""
    record_instead_of_capturing(monkeypatch)
    trials = make_trials()
    updates, astray = trials._updates, []

    def once(ops, way, nudge):
        found = updates(ops, way, nudge)
        if way == GRAPH and nudge in astray:
            found = {name: value if name == "generator" else 2 * value for name, value in found.items()}
        return found

    monkeypatch.setattr(trials, "_updates", once)
    astray[:] = [0, 1]
    assert trials.judge_graph({}).right
    astray[:] = [0, 1, 2]
    assert trials.judge_graph({}).why.startswith("a captured update has gradient of ")


def test_graphs_are_timed_beside_each_other(monkeypatch):
    """Each draws from the generator with which it was captured."""
    made = record_instead_of_capturing(monkeypatch)
    times = make_trials().milliseconds(({}, EAGER), ({}, GRAPH), ({}, OVERLAP), ({}, GRAPH))
    assert len(times) == 4
    assert min(times) > 0
    assert [step.recording is not None for step in made] == [True, True, True]


def test_what_a_graph_cannot_hold_is_told(monkeypatch):
    record_instead_of_capturing(monkeypatch)
    trials = make_trials()
    step = trials.learner.step
    monkeypatch.setattr(trials.learner, "step", lambda sample: (step(sample), trials.learner.skipped.item()))
    with pytest.raises(CaptureError):
        trials.judge_graph({})
