"""Initial parameters, their number, and the outputs that start at zero.

Source of the rules: thuml/HarmonyDream, dreamerv3-jax/dreamerv3/nets.py, class Initializer.
"""

import math

import pytest
import torch
from torch import nn

from hdfast.agent.behavior import Behavior
from hdfast.agent.networks import Norm
from hdfast.agent.world_model import WorldModel
from hdfast.config import Config
from hdfast.envs.base import ArraySpec, ContinuousActions, DiscreteActions
from hdfast.overrides import apply_overrides
from hdfast.sizes import SIZES
from hdfast_kernels import two_hot_mean
from tests.agent_cases import SPECS, make_batch, make_learner, one_thread  # noqa: F401

ATARI = {"image": ArraySpec((64, 64, 3), "uint8")}


@pytest.fixture(scope="module")
def modules() -> nn.ModuleDict:
    """Modules wide enough for statistics, small enough for a quick test."""
    config = apply_overrides(
        Config(),
        {
            "rssm": {"deter": 96, "units": 80, "stoch": 8, "classes": 12},
            "network": {"units": 72, "layers": 2, "depth": 8, "mlp_layers": 2, "mlp_units": 88},
        },
    )
    torch.manual_seed(0)
    specs = {"image": ArraySpec((32, 32, 3), "uint8"), "state": ArraySpec((40,), "float32")}
    actions = ContinuousActions(24)
    return nn.ModuleDict({"model": WorldModel(specs, actions, config), "behavior": Behavior(actions, config)})


D, U, L, A, H, V = 96, 80, 96, 24, 72, 88  # deter, units, S*K, action, head units, vector units
E = 16 * 32 + V  # embedding: 4x4 pixels of 8, 16, 32 channels, and the vector's
HEADS = ("model.reward", "model.cont", "behavior.actor.mlp", "behavior.critic", "behavior.slow_critic")

NORMAL = {  # truncated at two deviations: (fan_in, fan_out) of the whole layer, of which a parameter may be a part
    "model.rssm.in_stoch": (L + A, U),
    "model.rssm.in_action": (L + A, U),
    "model.rssm.gru": (D + U, 3 * D),
    "model.rssm.prior_hidden": (D, U),
    "model.rssm.post_deter": (D + E, U),
    "model.rssm.post_embed": (D + E, U),
    "model.encoder.image.kernels.0": (16 * 3, 16 * 8),
    "model.encoder.image.kernels.1": (16 * 8, 16 * 16),
    "model.encoder.image.kernels.2": (16 * 16, 16 * 32),
    "model.decoder.image.kernels.0": (16 * 32, 16 * 16),
    "model.decoder.image.kernels.1": (16 * 16, 16 * 8),
    "model.encoder.vector.hidden.0.weight": (40, V),
    "model.encoder.vector.hidden.1.weight": (V, V),
    "model.decoder.vector.first.deter_weight": (D + L, V),
    "model.decoder.vector.first.stoch_weight": (D + L, V),
    "model.decoder.vector.hidden.0.weight": (V, V),
    **{f"{head}.first.deter_weight": (D + L, H) for head in HEADS},
    **{f"{head}.first.stoch_weight": (D + L, H) for head in HEADS},
    **{f"{head}.hidden.0.weight": (H, H) for head in HEADS},
}
UNIFORM = {
    "model.rssm.prior_out.weight": (U, L),
    "model.rssm.post_out.weight": (U, L),
    "model.decoder.image.first.deter_weight": (D + L, 16 * 32),
    "model.decoder.image.first.stoch_weight": (D + L, 16 * 32),
    "model.decoder.image.kernels.2": (16 * 8, 16 * 3),
    "model.decoder.vector.out.state.weight": (V, 40),
    "model.cont.out.logit.weight": (H, 1),
    "behavior.actor.mlp.out.mean.weight": (H, A),
    "behavior.actor.mlp.out.std.weight": (H, A),
}
ZERO = {
    "model.rssm.initial_deter",
    "model.harmonizer.log_sigma",
    *(f"{head}.out.logits.weight" for head in ("model.reward", "behavior.critic", "behavior.slow_critic")),
}


def check_spread(x: torch.Tensor, std: float, limit: float) -> None:
    """Standard deviation within five of its standard errors, range inside the limit and near it."""
    n = x.numel()
    assert x.std().item() == pytest.approx(std, rel=5 / math.sqrt(n))
    assert abs(x.mean().item()) < 5 * std / math.sqrt(n)
    assert x.abs().max() <= limit * 1.0001
    if n >= 500:
        assert x.abs().max() > 0.95 * limit


@pytest.mark.parametrize("name", NORMAL)
def test_hidden_layers_start_as_truncated_normals(modules, name):
    """The variance after truncation is 1 / mean(fan_in, fan_out)."""
    std = 1 / math.sqrt(sum(NORMAL[name]) / 2)
    check_spread(modules.get_parameter(name).detach(), std, limit=2 * std / 0.87962566103423978)


@pytest.mark.parametrize("name", UNIFORM)
def test_output_layers_start_uniform(modules, name):
    std = 1 / math.sqrt(sum(UNIFORM[name]) / 2)
    check_spread(modules.get_parameter(name).detach(), std, limit=math.sqrt(3) * std)


def test_everything_else_starts_at_zero_or_one(modules):
    """Together these tests cover every parameter; a slow critic's are drawn like the critic's."""
    scales = {f"{name}.weight" for name, module in modules.named_modules() if isinstance(module, Norm)}
    for name, parameter in modules.named_parameters():
        if name in scales:
            assert (parameter == 1).all(), name
        elif name.endswith("bias") or name in ZERO:
            assert (parameter == 0).all(), name
        else:
            assert name in NORMAL or name in UNIFORM, name


def test_a_fresh_agent_predicts_zero_rewards_and_values():
    """Zero outputs are uniform over the bins, which decodes to zero within rounding."""
    learner = make_learner(spread=False)
    batch = make_batch(learner)
    uniform = learner.uniform(*batch["reward"].shape, learner.config.rssm.stoch)
    output = learner.model.loss(batch, uniform, torch.float32)
    latent = output.observed.latent.flatten(0, 1)
    assert two_hot_mean(learner.model.reward_logits(latent, torch.float32)).abs().max() < 1e-6
    assert two_hot_mean(learner.behavior.critic(latent, torch.float32)["logits"]).abs().max() < 1e-6
    assert torch.allclose(output.losses["reward"], torch.tensor(math.log(41)))
    assert output.metrics["harmony/weight_reward"].item() == 1.0


def counts(size: str, specs=ATARI, actions=None) -> dict[str, int]:
    """Parameters by part, counted without memory."""
    config = apply_overrides(Config(), SIZES[size])
    actions = actions or DiscreteActions(6)
    with torch.device("meta"):
        model, behavior = WorldModel(specs, actions, config), Behavior(actions, config)
    parts = {
        "world_model": model,
        "actor": behavior.actor,
        "critic": behavior.critic,
        "harmony": model.harmonizer,
    }
    found = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    found["world_model"] -= found["harmony"]
    return found


def expected_counts(deter: int, units: int, depth: int, layers: int, actions: int) -> dict[str, int]:
    """The same from the formulas of ALGORITHM §2 and §3, for an image of 64x64x3 and S = K = 32."""
    latent, feature = 1024, deter + 1024
    widths = [depth, 2 * depth, 4 * depth, 8 * depth]

    def normed(inputs: int, outputs: int) -> int:
        return inputs * outputs + 2 * outputs

    def head(outputs: int) -> int:
        return normed(feature, units) + (layers - 1) * normed(units, units) + (units + 1) * outputs

    embed = 16 * widths[-1]
    encoder = sum(16 * i * o + 2 * o for i, o in zip([3, *widths], widths, strict=False))
    decoder = (feature + 1) * embed
    decoder += sum(16 * i * o + 2 * o for i, o in zip(widths[:0:-1], widths[-2::-1], strict=True))
    decoder += 16 * depth * 3 + 3
    rssm = deter + normed(latent + actions, units) + normed(deter + units, 3 * deter) + normed(deter, units)
    rssm += normed(deter + embed, units) + 2 * (units + 1) * latent
    return {
        "world_model": encoder + decoder + rssm + head(255) + head(1),
        "actor": head(actions),
        "critic": head(255),
        "harmony": 3,
    }


def test_small_has_the_authors_parameters():
    """With Pong's six actions, as printed by the authors' program."""
    found = counts("small")
    assert found == {"world_model": 15_687_811, "actor": 1_053_702, "critic": 1_181_439, "harmony": 3}
    assert sum(found.values()) - found["harmony"] == 17_922_952
    assert expected_counts(512, 512, 32, 2, actions=6) == found


@pytest.mark.parametrize(
    ("size", "widths"),
    [
        ("medium", (1024, 640, 48, 3)),
        ("large", (2048, 768, 64, 4)),
        ("xlarge", (4096, 1024, 96, 5)),
    ],
)
def test_the_larger_sizes_have_the_parameters_of_their_formulas(size, widths):
    assert counts(size) == expected_counts(*widths, actions=6)


def test_tiny_is_tiny():
    assert sum(counts("tiny").values()) < sum(counts("small").values()) / 10


def test_the_vector_networks_do_not_depend_on_the_size():
    """The authors' presets all have five layers of 1024 units; only the layers that read the latent grow."""
    specs = {"state": ArraySpec((24,), "float32")}
    for size in ("small", "medium"):
        config = apply_overrides(Config(), SIZES[size])
        assert (config.network.mlp_layers, config.network.mlp_units) == (5, 1024)
        with torch.device("meta"):
            model = WorldModel(specs, ContinuousActions(6), config)
        encoder = sum(p.numel() for p in model.encoder.parameters())
        assert encoder == (24 * 1024 + 2048) + 4 * (1024 * 1024 + 2048)
        feature = config.rssm.deter + 1024
        decoder = sum(p.numel() for p in model.decoder.parameters())
        assert decoder == (feature * 1024 + 2048) + 4 * (1024 * 1024 + 2048) + 1025 * 24


def test_a_learner_counts_its_parameters():
    learner = make_learner(specs=SPECS)
    found = learner.parameter_counts()
    assert found["total"] == found["world_model"] + found["actor"] + found["critic"]
    assert found["world_model"] + found["harmony"] == sum(p.numel() for p in learner.model.parameters())
    assert found["harmony"] == 3
