"""The harmony of the world model's losses: fixed points, modes, and that every observation counts."""

import math

import numpy as np
import pytest
import torch

from hdfast.agent.harmony import build_harmonizer
from hdfast.agent.world_model import WorldModel
from hdfast.envs.base import ArraySpec
from tests.agent_cases import (
    IMAGE,
    VECTOR,
    make_actions,
    make_batch,
    make_learner,
    one_thread,  # noqa: F401
    small_config,
)

VALUES = {"reward": 2.0, "image": 50.0, "dyn": 3.0, "rep": 5.0, "cont": 0.25, "state": 7.0}
LOSSES = {name: torch.full((2, 3), value) for name, value in VALUES.items()}


def harmonizer(**harmony):
    return build_harmonizer(small_config(harmony=harmony), images=True, vectors=("state",))


def set_s(module, **s) -> None:
    module.log_sigma.data = torch.tensor([s[name] for name in module.groups])


def slope(module, losses) -> dict[str, float]:
    """d total / d s by group."""
    total, _ = module(losses)
    (gradient,) = torch.autograd.grad(total, module.log_sigma)
    return dict(zip(module.groups, gradient.tolist(), strict=True))


@pytest.mark.parametrize(("loss", "weight"), [(0.05, 4.0), (1.0, 0.618), (50.0, 0.0196)])
def test_weights_settle_at_the_paper_s_fixed_point(loss, weight):
    """w*(L) = (sqrt(1 + 4/L) - 1) / 2; for the KL, whose log term weighs 5/6, w*(6/5 L)."""
    exact = (math.sqrt(1 + 4 / loss) - 1) / 2
    assert exact == pytest.approx(weight, rel=5e-3)
    module = harmonizer()
    set_s(module, reward=-math.log(exact), image=-math.log(exact), kl=-math.log(exact))
    losses = {name: torch.full((4,), loss) for name in VALUES} | {
        "dyn": torch.full((4,), loss * 5 / 6),
        "rep": torch.full((4,), loss * 5 / 6),
    }
    assert all(abs(gradient) < 1e-6 for gradient in slope(module, losses).values())
    _, metrics = module(losses)
    for group in ("reward", "image", "kl"):
        assert metrics[f"harmony/weight_{group}"].item() == pytest.approx(exact, rel=1e-5)


def test_learned_weights_begin_where_they_are_told():
    _, metrics = harmonizer(reward=4.0, image=0.25)(LOSSES)
    weights = [metrics[f"harmony/weight_{group}"].item() for group in ("reward", "image", "kl")]
    assert weights == pytest.approx([4.0, 0.25, 1.0])
    vectors = build_harmonizer(small_config(harmony={"image": 0.5}), images=False, vectors=("state",))
    assert list(vectors.groups) == ["reward", "kl"]


def test_the_gradient_of_s_on_literal_numbers():
    """-L e^-s + sigmoid(s), at s = ln 2 where e^-s = 1/2 and sigmoid(s) = 2/3."""
    module = harmonizer()
    set_s(module, reward=math.log(2), image=0.0, kl=math.log(2))
    found = slope(module, LOSSES)
    assert found["reward"] == pytest.approx(-2 / 2 + 2 / 3)
    assert found["image"] == pytest.approx(-50 + 1 / 2)
    assert found["kl"] == pytest.approx(-(5 / 6 * 3 + 1 / 6 * 5) / 2 + 5 / 6 * 2 / 3)


def test_learned_on_literal_numbers():
    module = harmonizer()
    assert module.log_sigma.tolist() == [0.0, 0.0, 0.0]
    log2 = math.log(2)
    kl = 5 / 6 * 3 + 1 / 6 * 5
    total, _ = module(LOSSES)  # all weights one, all log terms ln 2
    assert total.item() == pytest.approx(2 + log2 + 50 + log2 + kl + 5 / 6 * log2 + 0.25 + 7)
    set_s(module, reward=log2, image=-log2, kl=math.log(4))
    total, metrics = module(LOSSES)
    log_terms = math.log(3) + math.log(1.5) + 5 / 6 * math.log(5)
    assert total.item() == pytest.approx(2 / 2 + 50 * 2 + kl / 4 + log_terms + 0.25 + 7)
    assert metrics["harmony/weight_reward"].item() == pytest.approx(0.5)
    assert metrics["harmony/s_image"].item() == pytest.approx(-log2)
    for name, weight in {
        "reward": 0.5,
        "image": 2,
        "dyn": 5 / 24,
        "rep": 1 / 24,
        "cont": 1,
        "state": 1,
    }.items():
        assert metrics[f"loss/{name}"].item() == pytest.approx(VALUES[name])
        assert metrics[f"weighted/{name}"].item() == pytest.approx(VALUES[name] * weight)


def test_fixed_weights_on_literal_numbers():
    """The paper's study of domination: constants in place of e^-s, and no log term."""
    module = harmonizer(mode="fixed", reward=100.0, image=0.5, kl=2.0)
    total, _ = module(LOSSES)
    assert total.item() == pytest.approx(100 * 2 + 0.5 * 50 + 2 * (5 / 6 * 3 + 1 / 6 * 5) + 0.25 + 7)
    assert not list(module.parameters())


def test_off_is_dreamerv3():
    module = harmonizer(mode="off")
    total, _ = module(LOSSES)
    assert total.item() == pytest.approx(2 + 50 + 0.5 * 3 + 0.1 * 5 + 0.25 + 7)
    assert not list(module.parameters())


@pytest.mark.parametrize(("mode", "scalars"), [("learned", 3), ("fixed", 0), ("off", 0)])
def test_a_learner_of_each_mode_learns_and_logs(mode, scalars):
    learner = make_learner(harmony={"mode": mode})
    assert learner.parameter_counts()["harmony"] == scalars
    before = {k: v.clone() for k, v in learner.model.harmonizer.named_parameters()}
    learner.update(lambda *_: make_batch(learner))
    metrics = learner.metrics()
    for name in ("reward", "image", "dyn", "rep", "cont", "state"):
        assert math.isfinite(metrics[f"loss/{name}"])
        assert math.isfinite(metrics[f"weighted/{name}"])
    groups = () if mode == "off" else ("reward", "image", "kl")
    assert {k for k in metrics if k.startswith("harmony/weight_")} == {f"harmony/weight_{g}" for g in groups}
    learned = groups if mode == "learned" else ()
    assert {k for k in metrics if k.startswith("harmony/s_")} == {f"harmony/s_{g}" for g in learned}
    for name, parameter in learner.model.harmonizer.named_parameters():  # moved by Adam's learning rate
        moved = (parameter - before[name]).abs()
        assert torch.allclose(moved, torch.full_like(moved, learner.config.optimizer.model_lr), rtol=1e-2)


def world_model(**specs) -> tuple[WorldModel, dict]:
    learner = make_learner(specs=specs)
    batch = make_batch(learner)
    uniform = learner.uniform(*batch["reward"].shape, learner.config.rssm.stoch)
    return learner.model, learner.model.loss(batch, uniform, torch.float32)


def test_several_images_and_vectors_are_all_weighed():
    """Images, whatever their keys, are one observation under one harmony scalar; each vector keeps weight 1."""
    model, output = world_model(
        front=IMAGE,
        wrist=ArraySpec((8, 8, 1), np.uint8),
        state=VECTOR,
        speed=ArraySpec((), np.float32),
    )
    assert set(output.losses) == {"reward", "image", "dyn", "rep", "cont", "state", "speed"}
    assert all(loss.shape == output.losses["reward"].shape for loss in output.losses.values())
    s = dict(zip(model.harmonizer.groups, model.harmonizer.log_sigma.tolist(), strict=True))
    mean = {name: loss.mean().item() for name, loss in output.losses.items()}
    expected = (
        sum(mean[name] * math.exp(-s[name]) + math.log1p(math.exp(s[name])) for name in ("reward", "image"))
        + (5 / 6 * mean["dyn"] + 1 / 6 * mean["rep"]) * math.exp(-s["kl"])
        + 5 / 6 * math.log1p(math.exp(s["kl"]))
        + mean["cont"]
        + mean["state"]
        + mean["speed"]
    )
    assert output.loss.item() == pytest.approx(expected, rel=1e-5)


def test_the_image_loss_is_the_sum_over_images():
    learner = make_learner(specs={"front": IMAGE, "wrist": ArraySpec((8, 8, 1), np.uint8)})
    batch = make_batch(learner)
    uniform = learner.uniform(*batch["reward"].shape, learner.config.rssm.stoch)
    output = learner.model.loss(batch, uniform, torch.float32)
    decoded = learner.model.decode(output.observed.latent.flatten(0, 1), torch.float32)
    expected = sum(
        (decoded[k] - batch[k].flatten(0, 1) / 255).square().sum((1, 2, 3)) for k in ("front", "wrist")
    ).view(batch["reward"].shape)
    assert torch.allclose(output.losses["image"], expected, rtol=1e-5)


@pytest.mark.parametrize(("miss", "counts"), [(0.5e-4, False), (2e-4, True)])
def test_a_vector_hit_within_the_tolerance_costs_nothing(miss, counts):
    """As in the authors' symlog distance (jaxutils.py, SymlogDist), which ignores squared errors below 1e-8."""
    learner = make_learner(specs={"state": VECTOR})
    batch = make_batch(learner)
    batch["state"][:] = torch.tensor([0.0, 1.0, -2.0, 30.0])
    out = learner.model.decoder["vector"].out["state"]
    out.weight.data.zero_()
    out.bias.data = torch.tensor([0.0, math.log(2), -math.log(3), math.log(31)]) + miss
    uniform = learner.uniform(*batch["reward"].shape, learner.config.rssm.stoch)
    loss = learner.model.loss(batch, uniform, torch.float32).losses["state"]
    (gradient,) = torch.autograd.grad(loss.sum(), out.bias)
    expected = 4 * miss**2 if counts else 0.0
    assert loss.flatten().tolist() == pytest.approx([expected] * 18, rel=0.02)
    assert (gradient != 0).all().item() is counts


@pytest.mark.parametrize("shapes", [True, False])
def test_the_continuation_loss_shapes_latents_where_it_is_told_to(shapes):
    """HarmonyDream's `grad_heads` for Meta-World leave out `cont`, which then trains only its head (configs.yaml)."""
    learner = make_learner(loss={"cont_gradient": shapes})
    batch = make_batch(learner)
    uniform = learner.uniform(*batch["reward"].shape, learner.config.rssm.stoch)
    loss = learner.model.loss(batch, uniform, torch.float32).losses["cont"].sum()
    names, parameters = zip(*learner.model.named_parameters(), strict=True)
    gradients = dict(zip(names, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True))
    reached = {name.partition(".")[0] for name, gradient in gradients.items() if gradient is not None}
    assert reached == ({"cont", "rssm", "encoder"} if shapes else {"cont"})


def test_without_images_there_are_two_scalars():
    model, output = world_model(state=VECTOR)
    assert set(model.harmonizer.groups) == {"reward", "kl"}
    assert model.harmonizer.log_sigma.shape == (2,)
    assert set(output.losses) == {"reward", "dyn", "rep", "cont", "state"}


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ({}, "observations must be"),
        ({"image": ArraySpec((8, 8), np.uint8)}, "images .* or vectors"),
        ({"a": IMAGE, "b": ArraySpec((16, 16, 3), np.uint8)}, "one size"),
        ({"image": ArraySpec((8, 16, 3), np.uint8)}, "8x16"),
        ({"image": ArraySpec((24, 24, 3), np.uint8)}, "24x24 pixels are not supported"),
        ({"image": ArraySpec((4, 4, 3), np.uint8)}, "4x4"),
    ],
)
def test_what_cannot_be_observed_is_an_error(specs, message):
    with pytest.raises(ValueError, match=message):
        WorldModel(specs, make_actions(continuous=False), small_config())
