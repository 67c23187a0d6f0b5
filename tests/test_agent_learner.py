"""The whole update: against float64, bit-identical from a seed, resumable, and harmless when a number is not finite.

Axes: T time, B batch, H horizon, N = T*B starting states.
"""

import numpy as np
import pytest
import torch

from hdfast.agent.behavior import Draws
from hdfast.agent.learner import Learner
from hdfast.agent.updates import Updates
from hdfast.envs.base import ArraySpec
from tests import reference
from tests.agent_cases import (
    differing,
    make_actions,
    make_batch,
    make_learner,
    one_thread,  # noqa: F401
    small_config,
    snapshot,
)
from tests.authors_parameters import counterparts, fill, in_their_layout
from tests.authors_trace import middle
from tests.traces import Sizes, make_parameters
from tests.traces import make_batch as make_trace_batch


def learn(learner: Learner, *batches) -> Learner:
    for batch in batches:
        learner.update(lambda *_, batch=batch: batch)
    return learner


# Against float64.

# Rates with which the three steps are large, and an eps with which they do not depend on the sign of a tiny gradient.
OPTIMIZER = {
    "model_lr": 0.02,
    "model_eps": 0.1,
    "model_clip": 20.0,
    "actor_lr": 0.03,
    "actor_eps": 0.1,
    "actor_clip": 0.02,
    "critic_lr": 0.01,
    "critic_eps": 0.2,
    "critic_clip": 100.0,
}


def first_adam_step(parameters, gradients, lr: float, eps: float, clip: float):
    """Clip by the global norm, then Adam, whose first step is lr * g / (|g| + eps); and the norm."""
    norm = np.sqrt(sum((g**2).sum() for g in gradients.values()))
    scale = min(1.0, clip / norm)
    step = {k: lr * scale * g / (np.abs(scale * g) + eps) for k, g in gradients.items()}
    return {k: parameters[k] - step[k] for k in step}, norm


class Expected:
    """One update in float64: the model's step, then imagination inside the model it leads to."""

    def __init__(self, sizes: Sizes, slow_updates: int, seed: int):
        rng = np.random.default_rng(seed)
        parameters, batch = make_parameters(sizes, rng), make_trace_batch(sizes, rng)
        parameters["task_behavior/critic/updates/value"] = np.array(slow_updates)
        opt = OPTIMIZER
        before = reference.Program(parameters, batch, sizes.stoch, rng)
        before.model()
        gradients = {k: g.numpy() for k, g in before.grad.items()}
        rates = [opt["model_lr"], opt["model_eps"], opt["model_clip"]]
        model, norm = first_adam_step(parameters, gradients, *rates)
        self.metrics = {"loss_model": before.out["model_loss"].item(), "grad_norm_model": norm}
        posterior = {k: before.out[k] for k in ("post_deter", "post_stoch", "post_logit")}

        def imagine(parameters, draws) -> reference.Program:
            program = reference.Program(parameters, batch, sizes.stoch, draws)
            program.out |= posterior
            program.behavior(sizes.horizon)
            return program

        changed = {**parameters, **model}
        drawn = {k: v.detach().numpy() for k, v in imagine(changed, rng).out.items() if k.startswith("traj_")}
        drawn |= {f"traj2_{k}": drawn[f"traj_{k}"] for k in ("stoch", "action")}  # one rollout serves both
        after = imagine(changed, drawn)
        self.effect_of_the_model_s_step = (
            (imagine(parameters, drawn).out["imag_return"] - after.out["imag_return"]).abs().max().item()
        )
        gradients = {k: g.numpy() for k, g in after.grad.items()}
        updated = {}
        for name, part in {"actor": "ac/actor", "critic": "critic/net"}.items():
            chosen = {k: g for k, g in gradients.items() if k.startswith(f"task_behavior/{part}/")}
            rates = [opt[f"{name}_{k}"] for k in ("lr", "eps", "clip")]
            new, self.metrics[f"grad_norm_{name}"] = first_adam_step(parameters, chosen, *rates)
            self.metrics[f"loss_{name}"] = after.out[f"{name}_loss"].item()
            updated |= new
        rate = 0.02 if slow_updates else 1.0
        for name in [k for k in parameters if k.startswith("task_behavior/critic/slow/")]:
            fast = updated[name.replace("/slow/", "/net/")]
            updated[name] = parameters[name] + rate * (fast - parameters[name])
        low, high = after.out["retnorm_after"].tolist()
        updated["task_behavior/ac/retnorm_extr/low/value"] = np.array(low)
        updated["task_behavior/ac/retnorm_extr/high/value"] = np.array(high)
        updated["task_behavior/critic/updates/value"] = np.array(slow_updates + 1)
        self.parameters, self.batch, self.after = parameters, batch, {**model, **updated}
        self.uniform = middle(posterior["post_logit"], posterior["post_stoch"]).transpose(0, 1)
        out = after.out
        latent = middle(out["traj_logit"][1:], out["traj_stoch"][1:])
        if sizes.continuous:
            action = ((out["traj_action"] - out["actor_mean"]) / out["actor_std"])[:-1].float()
        else:
            action = middle(out["actor_logits"], out["traj_action"])[:-1]

        def time_major(x: torch.Tensor) -> torch.Tensor:
            """(H, B*T, ...) -> (H, T*B, ...)."""
            return x.detach().unflatten(1, (sizes.batch, sizes.length)).transpose(1, 2).flatten(1, 2)

        self.draws = Draws(time_major(latent), time_major(action))


@pytest.mark.parametrize(
    ("sizes", "slow_updates"),
    [
        (Sizes(image=(16, 16, 3), batch=3, length=4, horizon=4), 0),
        (Sizes(image=(8, 8, 3), state=4, continuous=True, batch=2, length=5), 7),
    ],
    ids=["discrete", "continuous"],
)
def test_one_update_against_float64(sizes, slow_updates):
    """Every parameter after an update: losses, gradients, clips, Adam, their order, slow critic, return range."""
    expected = Expected(sizes, slow_updates, seed=5)
    batch = {k: torch.from_numpy(v).transpose(0, 1) for k, v in expected.batch.items()}
    if not sizes.continuous:
        batch["action"] = batch["action"].argmax(-1)
    specs = {k: ArraySpec(v.shape[2:], v.dtype) for k, v in expected.batch.items() if k in ("image", "state")}
    config = small_config(
        rssm={"deter": sizes.deter, "units": sizes.units, "stoch": sizes.stoch, "classes": sizes.classes},
        network={
            "units": sizes.head_units,
            "layers": sizes.head_layers,
            "depth": sizes.depth,
            "mlp_layers": sizes.mlp_layers,
            "mlp_units": sizes.mlp_units,
            "bins": sizes.bins,
        },
        behavior={"horizon": sizes.horizon},
        replay={"batch": sizes.batch, "length": sizes.length},
        optimizer=OPTIMIZER,
    )
    learner = Learner(specs, make_actions(sizes.continuous, sizes.actions), config)
    table = counterparts(learner.model, learner.behavior)
    assert table.keys() == expected.parameters.keys()
    for name, value in expected.parameters.items():
        fill(table[name], torch.tensor(value))
    learner.uniform = lambda *_: expected.uniform
    learner.draws = lambda _: expected.draws
    learn(learner, batch | {"starts": torch.arange(sizes.batch)})
    metrics = learner.metrics()
    for name, value in expected.metrics.items():
        assert metrics[name] == pytest.approx(value, rel=1e-4), name
    assert expected.effect_of_the_model_s_step > 0.01
    for name, value in expected.after.items():
        before = expected.parameters[name]
        step = np.abs(value - before).max()
        assert step > 0, name
        error = np.abs(in_their_layout(table[name]).detach().double().numpy() - value).max()
        assert error <= 2e-3 * step + 2e-7 * np.abs(before).max(), name


# Determinism and resumption.


@pytest.fixture(params=[False, True], ids=["discrete", "continuous"])
def continuous(request) -> bool:
    return request.param


def batches(learner: Learner, count: int, start: int = 0):
    return [make_batch(learner, seed) for seed in range(start, start + count)]


def test_a_seed_decides_everything(continuous):
    """Three updates on the CPU, bit for bit; another seed gives another agent."""
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(runs))  # the global generator must not matter
        learner = make_learner(continuous, seed=seed, spread=False)
        runs.append((snapshot(learner), snapshot(learn(learner, *batches(learner, 3)))))
    assert differing(runs[0][0], runs[1][0]) == set()
    assert differing(runs[0][1], runs[1][1]) == set()
    constant = {"skipped", "model.harmonizer._extra_state"}
    assert runs[0][1].keys() - differing(*runs[0]) == constant  # everything else moved
    other = differing(runs[0][0], runs[2][0])
    assert {"model.rssm.gru", "behavior.critic.first.deter_weight", "generator"} <= other


def test_making_a_learner_leaves_the_global_generator_alone():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    make_learner(spread=False)
    assert torch.equal(torch.rand(1), expected)


def test_a_saved_learner_goes_on_bit_for_bit(continuous):
    one = make_learner(continuous)
    data = batches(one, 3)
    learn(one, *data[:2])
    two = make_learner(continuous, seed=9)
    learn(two, *batches(two, 1, start=5))
    two.load_state_dict(snapshot(one))
    assert differing(snapshot(one), snapshot(two)) == set()
    assert two.updates == 2
    assert differing(snapshot(learn(one, data[2])), snapshot(learn(two, data[2]))) == set()


def test_a_half_that_other_code_saved_is_completed_and_its_metrics_are_left_out():
    learner = make_learner()
    first, second = batches(learner, 2)
    half = learner.learn_model(lambda *_: first)
    saved = half._replace(metrics=half.metrics | {"of_other_code": torch.ones(())}).state_dict()
    Updates(learner, lambda: None).load_state_dict(saved)
    learn(learner, second)
    assert "of_other_code" not in learner.metrics()
    other = make_learner()
    other.learn_behavior(other.learn_model(lambda *_: first))
    learn(other, second)
    assert differing(snapshot(learner), snapshot(other)) == set()


def test_a_state_that_does_not_fit_is_an_error():
    learner = make_learner()
    state = snapshot(learner)
    with pytest.raises(RuntimeError, match=r"rssm\.gru"):
        learner.load_state_dict({k: v for k, v in state.items() if k != "model.rssm.gru"})
    with pytest.raises(KeyError):
        learner.load_state_dict({k: v for k, v in state.items() if k != "optimizer.actor.steps"})


# Which loss moves what.


def moved(learner: Learner) -> set[str]:
    """Which of model, actor, critic and slow critic three updates move."""
    names = {"model.": "model", "behavior.actor.": "actor", "behavior.critic.": "critic"}
    names |= {"behavior.slow_critic.": "slow"}
    before = snapshot(learner)
    changed = differing(before, snapshot(learn(learner, *batches(learner, 3))))
    return {part for prefix, part in names.items() if any(k.startswith(prefix) for k in changed)}


def test_each_loss_moves_its_own_part(continuous):
    still = {"model_lr": 0.0, "actor_lr": 0.0, "critic_lr": 0.0}
    assert moved(make_learner(continuous)) == {"model", "actor", "critic", "slow"}
    for part in ("model", "actor", "critic"):
        only = {**still, f"{part}_lr": 1e-3}
        learner = make_learner(continuous, optimizer=only)
        learner.behavior.slow_critic.load_state_dict(learner.behavior.critic.state_dict())
        assert moved(learner) == {part} | ({"slow"} if part == "critic" else set())
        assert all(p.grad is None for p in learner.model.parameters())


def test_a_part_s_step_is_the_same_whether_or_not_the_others_move(continuous):
    """Within one update, actor and critic learn from the same parameters of each other."""
    ends = []
    for critic_lr, actor_lr in ((3e-5, 3e-5), (0.0, 3e-5), (3e-5, 0.0)):
        learner = make_learner(continuous, optimizer={"critic_lr": critic_lr, "actor_lr": actor_lr})
        ends.append(snapshot(learn(learner, make_batch(learner))))
    for other, part in ((ends[1], "behavior.actor."), (ends[2], "behavior.critic.")):
        assert not any(name.startswith((part, "model.")) for name in differing(ends[0], other))


# Numbers that are not finite.


def test_a_batch_that_is_not_finite_changes_nothing_and_is_counted(continuous):
    learner = make_learner(continuous)
    learn(learner, make_batch(learner))
    before, metrics = snapshot(learner), learner.metrics()
    assert metrics
    for k, (key, value) in enumerate([("reward", "nan"), ("state", "inf")], 1):
        bad = make_batch(learner, 7)
        bad[key][2, 1] = float(value)
        learn(learner, bad)
        assert differing(before, snapshot(learner)) == {"generator", "updates", "skipped"}
        assert learner.skipped.item() == k
        assert torch.equal(learner.bad_starts, bad["starts"])
    assert learner.metrics() == {}  # means are over the finite updates
    good = make_batch(learner, 8)
    learn(learner, bad, good)
    assert learner.skipped.item() == 3
    assert torch.equal(learner.bad_starts, bad["starts"])
    assert torch.equal(learner.last_starts, good["starts"])
    assert all(np.isfinite(list(learner.metrics().values())))
    assert {"model.rssm.gru", "behavior.actor.mlp.norm.weight"} <= differing(before, snapshot(learner))


@pytest.mark.parametrize("part", ["actor", "critic", "slow_critic"])
def test_a_behavior_that_is_not_finite_stays_as_it_is(part, continuous):
    """The model has already learned and keeps it; the actor, the critic and all that depends on them stay."""
    learner = make_learner(continuous)
    learn(learner, make_batch(learner))
    name = "actor.mlp.norm.weight" if part == "actor" else f"{part}.norm.weight"
    learner.behavior.get_parameter(name).data.fill_(3e38)  # overflows in the next layer
    before, batch = snapshot(learner), make_batch(learner, 1)
    changed = differing(before, snapshot(learn(learner, batch)))
    assert not {k for k in changed if k.startswith(("behavior.", "optimizer.actor", "optimizer.critic"))}
    assert "model.rssm.gru" in changed
    assert learner.skipped.item() == 1
    assert torch.equal(learner.bad_starts, batch["starts"])


@pytest.mark.parametrize("part", ["model", "actor", "critic"])
def test_a_gradient_that_is_not_finite_stops_its_own_step_and_those_after_it(part, continuous, monkeypatch):
    """Though the loss is finite."""
    learner = make_learner(continuous)
    learn(learner, make_batch(learner))
    weight = learner.optimizers[part].parameters[0]
    owner = learner.model if part == "model" else learner.behavior
    name = "loss" if part == "model" else f"{part}_loss"
    loss_of = getattr(owner, name)

    def spoilt(*args):
        nothing = 0 * (0 * weight.sum()).sqrt()  # its gradient is 0 times infinity
        if part == "model":
            output = loss_of(*args)
            return output._replace(loss=output.loss + nothing)
        if part == "actor":
            loss, metrics = loss_of(*args)
            return loss + nothing, metrics
        return loss_of(*args) + nothing

    monkeypatch.setattr(owner, name, spoilt)
    before, batch = snapshot(learner), make_batch(learner, 1)
    changed = differing(before, snapshot(learn(learner, batch)))
    steps = [f"optimizer.{name}.steps" for name in ("model", "actor", "critic")]
    assert [name for name in steps if name in changed] == steps[: steps.index(f"optimizer.{part}.steps")]
    assert "behavior.slow_updates" not in changed
    assert learner.skipped.item() == 1
    assert torch.equal(learner.bad_starts, batch["starts"])


# Metrics, types.


def test_metrics_are_means_over_updates():
    one = make_learner()
    assert one.metrics() == {}
    singles = []
    for batch in batches(one, 2):
        learn(one, batch)
        singles.append(one.metrics())
    two = make_learner()
    both = learn(two, *batches(two, 2)).metrics()
    assert both.keys() == singles[0].keys()
    for name, value in both.items():
        assert value == pytest.approx((singles[0][name] + singles[1][name]) / 2, rel=1e-5, abs=1e-7), name
    assert {"loss_model", "loss_actor", "loss_critic", "post_entropy", "prior_entropy"} <= both.keys()
    assert {"grad_norm_model", "grad_norm_actor", "grad_norm_critic", "value_mean"} <= both.keys()


def test_draws_are_uniform_or_normal():
    learner = make_learner(continuous=True)
    draws = learner.draws(5000)
    assert draws.latent.shape == (4, 5000, 4)
    assert 0 <= draws.latent.min() < 0.001
    assert 0.999 < draws.latent.max() < 1
    assert draws.action.shape == (4, 5000, 3)
    assert draws.action.std().item() == pytest.approx(1, abs=0.02)
    draws = make_learner(continuous=False).draws(5000)
    assert draws.action.shape == (4, 5000)
    assert draws.action.mean().item() == pytest.approx(0.5, abs=0.02)


def test_an_update_in_bfloat16_stays_near_float32(continuous):
    """Parameters, moments and losses stay float32; the model's losses differ only by rounding."""
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        learner = make_learner(continuous, dtype=dtype)
        learn(learner, make_batch(learner))
        found[dtype] = learner.metrics()
        state = snapshot(learner)
        assert {v.dtype for v in state.values() if v.is_floating_point()} == {torch.float32}
        assert learner.skipped.item() == 0
    exact, rough = found[torch.float32], found[torch.bfloat16]
    assert exact != rough
    for name in ("loss_model", "loss/image", "loss/reward", "loss/cont", "loss/state", "prior_entropy"):
        assert rough[name] == pytest.approx(exact[name], rel=0.03), name
    assert rough["loss_critic"] == pytest.approx(exact["loss_critic"], rel=0.05)
    assert rough["grad_norm_model"] == pytest.approx(exact["grad_norm_model"], rel=0.1)
