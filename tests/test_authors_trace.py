"""hdfast against the authors' traces, and against traces of kinds for which the authors' program gave none."""

import copy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests import authors_trace, reference
from tests.agent_cases import one_thread  # noqa: F401
from tests.authors_trace import Comparison
from tests.traces import AUTHORS, AUTHORS_CONTINUOUS, Sizes, Trace, load, make_trace


@pytest.fixture(scope="module")
def authors() -> Trace:
    return load(AUTHORS)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Trace:
    """A trace with all that a trace can have: continuous actions, an image and a vector."""
    path = tmp_path_factory.mktemp("trace") / "small.npz"
    return load(make_trace(path, Sizes(image=(8, 8, 3), continuous=True, state=4), seed=1))


def test_it_prints_a_line_for_everything_in_the_authors_trace(capsys):
    assert authors_trace.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    archive = np.load(AUTHORS)
    assert {line.split()[2] for line in lines if line.startswith("ok   grad")} == {
        key.removeprefix("grad:agent/") for key in archive.files if key.startswith("grad:")
    }
    compared = {line.split()[1] for line in lines if line.startswith("ok ")}
    inputs_and_unread = {"retnorm_before", "initial_logit", "prior_stoch"}
    assert {key[4:] for key in archive.files if key.startswith("out:")} - compared == inputs_and_unread
    assert lines[-1] == f"113 of 113 quantities of {AUTHORS} agree"


@pytest.mark.parametrize("path", [AUTHORS, AUTHORS_CONTINUOUS], ids=lambda path: path.stem)
def test_hdfast_agrees_with_the_authors_program(path):
    report = Comparison(load(path)).run()
    assert report.bad == []
    assert all(error <= bound / 10 for _, error, bound in report.lines)  # well within the bounds


@pytest.mark.parametrize("path", [AUTHORS, AUTHORS_CONTINUOUS], ids=lambda path: path.stem)
def test_the_reference_agrees_with_the_authors_program(path):
    """In float64, with the authors' draws: only the rounding of their float32 remains."""
    theirs = load(path)
    outputs, gradients = reference.run(
        {k: v.numpy() for k, v in theirs.parameters.items()},
        {k: v.numpy() for k, v in theirs.inputs.items()},
        groups=theirs.outputs["post_stoch"].shape[-2],
        horizon=len(theirs.outputs["traj_stoch"]) - 1,
        draws={k: v.numpy() for k, v in theirs.outputs.items()},
    )
    assert theirs.outputs.keys() - outputs.keys() <= {
        "initial_logit",
        "prior_stoch",
        "traj2_cont",
        "traj2_weight",
    }
    assert gradients.keys() == theirs.gradients.keys()
    for name in outputs.keys() & theirs.outputs.keys():
        expected = theirs.outputs[name].numpy()
        assert np.abs(outputs[name] - expected).max() <= 1e-5 * max(1.0, np.abs(expected).max()), name
    for name, ours in gradients.items():
        expected = theirs.gradients[name].numpy()
        assert np.abs(ours - expected).max() <= 3e-5 * np.abs(expected).max(), name


@pytest.mark.parametrize(
    "sizes",
    [
        Sizes(state=4, image=(32, 32, 3), head_layers=3, batch=3, length=7),
        Sizes(continuous=True, image=(16, 16, 1), actions=2, length=4),
        Sizes(
            continuous=True,
            state=1,
            image=(8, 8, 3),
            stoch=6,
            classes=2,
            head_layers=1,
            mlp_layers=3,
            horizon=5,
        ),
        Sizes(image=(64, 64, 4), depth=2, batch=1, actions=18, bins=255, stoch=2, classes=33),
    ],
    ids=lambda s: f"{'continuous' if s.continuous else 'discrete'}{'-state' * bool(s.state)}-{s.image[0]}px",
)
def test_hdfast_agrees_with_the_reference(sizes, tmp_path):
    trace = load(make_trace(tmp_path / "trace.npz", sizes, seed=3))
    comparison = Comparison(trace)
    report = comparison.run()
    assert report.bad == []
    assert report.left_out == []
    assert comparison.used >= {f"grad {name}" for name in trace.gradients} | trace.outputs.keys()
    assert comparison.behavior.reinforce is not sizes.continuous
    assert ("vector" in comparison.model.encoder) == (sizes.state > 0)
    assert max(error / bound for _, error, bound in report.lines) < 0.1  # well within the bounds


def test_bfloat16_stays_near_the_authors_program(authors, monkeypatch):
    """The matrix work in bfloat16, with the same latents: bounds are twice what was measured."""
    monkeypatch.setattr(authors_trace, "DTYPE", torch.bfloat16)
    report = Comparison(authors).run()
    assert report.faults == []
    for name, error, _ in report.lines:
        assert error <= (0.12 if name.startswith("grad") else 0.05), name
    drawn = {
        name: error
        for name, error, _ in report.lines
        if name.endswith(("_stoch", "traj_action", "traj_cont"))
    }
    assert len(drawn) == 5  # initial and posterior latents, imagined ones, their actions and ends
    assert set(drawn.values()) == {0.0}


def test_draws_are_not_mere_modes(small):
    """Otherwise these traces would not test sampling by given numbers."""
    mode = small.outputs["post_logit"].argmax(-1)
    drawn = small.outputs["post_stoch"].argmax(-1)
    assert 0.1 < (mode != drawn).float().mean() < 0.9
    assert small.inputs["is_first"][:, 1:].any()
    assert small.inputs["action"].abs().max() > 1
    assert Comparison(small).run().bad == []


def spoilt(trace: Trace, changes: dict[tuple[str, str], object]) -> list[str]:
    """What the comparison finds bad in a copy of the trace with entries changed, added, or dropped (None)."""
    trace = copy.deepcopy(trace)
    for (section, name), change in changes.items():
        entries = getattr(trace, section)
        entries[name] = change(entries[name]) if callable(change) else change
        if change is None:
            del entries[name]
    return Comparison(trace).run().bad


def moved(share: float):
    """Changes the largest entry by a share of itself (or of 1, if that is more)."""

    def change(x):
        x = x.clone()
        at = x.abs().argmax()
        x.view(-1)[at] += share * max(1.0, x.view(-1)[at].abs().item())
        return x

    return change


def test_wrong_values_and_gradients_are_bad_and_missing_ones_are_skipped(small):
    values = [
        "post_deter",
        "prior_logit",
        "loss_state",
        "traj_cont",
        "imag_return",
        "actor_std",
        "traj2_deter",
    ]
    critic, actor = "task_behavior/critic/net/h0/kernel", "task_behavior/ac/actor/dist_out/std/bias"
    largest = {name: small.gradients[name].abs().max() for name in (critic, actor)}
    changes = {("outputs", name): moved(2e-4) for name in values} | {
        ("outputs", "post_logit"): moved(2e-5),
        ("outputs", "embed"): lambda x: x * float("nan"),
        ("outputs", "recon"): None,
        ("gradients", critic): lambda x: x + 5e-4 * largest[critic],
        ("gradients", actor): lambda x: x + 2e-3 * largest[actor],
    }
    assert set(spoilt(small, changes)) == {*values, "embed", f"grad {actor}"}


def test_a_wrong_parameter_is_bad(small):
    bad = spoilt(small, {("parameters", "wm/har_s3/harmony_s"): lambda x: x + 0.01})
    assert {"harmony_s3", "grad wm/har_s3/harmony_s", "grad wm/rssm/img_stats/bias"} <= set(bad)
    assert not {"post_deter", "loss_dyn", "grad wm/cont/h0/kernel"} & set(bad)


def test_what_has_no_counterpart_is_bad(small):
    changes = {
        ("parameters", "wm/extra/kernel"): torch.zeros(2),
        ("parameters", "wm/rssm/img_in/norm/bias"): None,
        ("parameters", "wm/rssm/gru/norm/bias"): lambda x: x[1:],
        ("gradients", "wm/extra/kernel"): torch.zeros(2),
        ("gradients", "task_behavior/critic/slow/h0/kernel"): torch.zeros(2),
        ("outputs", "loss_rep"): lambda x: x[:, 1:],
    }
    bad = spoilt(small, changes)
    for fault in (
        "parameter wm/extra/kernel: hdfast has no such parameter",
        "hdfast's parameter rssm.in_norm.bias: the trace has none for it",
        "parameter wm/rssm/gru/norm/bias: hdfast's shape is (48,), the trace's (47,)",
        "hdfast's parameter rssm.gru_norm.bias: the trace has none for it",
        "grad wm/extra/kernel: hdfast has no such gradient",
        "grad task_behavior/critic/slow/h0/kernel: hdfast has no such gradient",
        "loss_rep: hdfast's shape is (2, 5), the trace's (2, 4)",
    ):
        assert fault in bad


def test_what_the_model_does_not_observe_is_left_out(small):
    trace = copy.deepcopy(small)
    trace.inputs["log_lives"] = torch.zeros(2, 5)
    report = Comparison(trace).run()
    assert report.bad == []
    assert report.left_out == ["in:log_lives is not read: the trace's model does not observe it"]


def test_a_trace_without_rollouts_is_compared_as_far_as_it_goes(small):
    trace = copy.deepcopy(small)
    for section in (trace.outputs, trace.gradients):
        for name in [k for k in section if k.startswith(("traj", "task_behavior"))]:
            del section[name]
    report = Comparison(trace).run()
    assert report.bad == []
    assert {f"grad {name}" for name in trace.gradients} <= {name for name, _, _ in report.lines}


def test_the_exit_code_says_bad(tmp_path, capsys):
    path = make_trace(tmp_path / "trace.npz", Sizes(image=(8, 8, 1)))
    entries = dict(np.load(path))
    np.savez(path, **{**entries, "out:model_loss": entries["out:model_loss"] * 1.001})
    assert authors_trace.main([str(path)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines if line.startswith("BAD")] == [["BAD", "model_loss"]]
    agree, _, total = lines[-1].split()[:3]
    assert int(total) - int(agree) == 1


def not_a_trace(kind: str, folder: Path) -> Path:
    path = folder / f"{kind}.npz"
    if kind == "text":
        path.write_text("not a trace")
    elif kind == "folder":
        path.mkdir()
    elif kind == "array":
        with path.open("wb") as file:
            np.save(file, np.zeros(3))
    elif kind == "other":
        np.savez(path, weights=np.zeros(3))
    elif kind == "objects":
        np.savez(path, **{"in:reward": np.array([None, 1])})
    elif kind == "strings":
        np.savez(path, **{"in:reward": np.array(["a", "b"])})
    elif kind == "truncated":
        path.write_bytes(AUTHORS.read_bytes()[:100_000])
    elif kind == "damaged":
        data = bytearray(AUTHORS.read_bytes())
        data[50_000:50_100] = bytes(100)
        path.write_bytes(data)
    elif kind == "shapes":
        entries = dict(np.load(AUTHORS))
        np.savez(path, **{**entries, "in:reward": entries["in:reward"].T})
    elif kind == "half_a_rollout":
        np.savez(path, **{k: v for k, v in np.load(AUTHORS).items() if k != "out:traj_action"})
    elif kind == "image_size":
        entries = dict(np.load(AUTHORS))
        np.savez(path, **{**entries, "in:image": entries["in:image"][:, :, :48]})
    return path


@pytest.mark.parametrize(
    "kind",
    [
        *("missing", "text", "folder", "array", "other", "objects", "strings", "truncated", "damaged"),
        *("shapes", "half_a_rollout", "image_size"),
    ],
)
def test_what_is_not_a_trace_is_answered_in_one_line(kind, tmp_path, capsys):
    path = not_a_trace(kind, tmp_path)
    assert authors_trace.main([str(path)]) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_it_runs_as_a_module(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "tests.authors_trace", str(tmp_path / "none.npz")],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {tmp_path / 'none.npz'}: no such file\n"
