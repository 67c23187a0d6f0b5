"""The sections of a run's configuration, as frozen dataclasses: `--env.obs` is the field `obs` of `EnvConfig`."""

from dataclasses import dataclass
from typing import Annotated, Literal

from hdfast.overrides import Range

MOST_ENVS = 4096

Envs = Annotated[int, Range(1, MOST_ENVS)]
Steps = Annotated[int, Range(0, 2**40)]
SomeSteps = Annotated[int, Range(1, 2**40)]
Width = Annotated[int, Range(1, 2**16)]
Layers = Annotated[int, Range(1, 64)]
Share = Annotated[float, Range(0, 1)]
Scale = Annotated[float, Range(0, 1e9)]
Positive = Annotated[float, Range(1e-30, 1e9)]


@dataclass(frozen=True)
class EnvConfig:
    """Where data comes from."""

    num_envs: Envs = 1
    """Environments stepped together."""
    source: Literal["auto", "envpool", "ale"] = "auto"
    """Which package emulates Atari; auto takes envpool where it is installed."""
    obs: Literal["auto", "image", "state", "both"] = "image"
    """What the agent observes of robots and gym; auto: images, or the state of gym environments without any."""
    render: Literal["full", "fast"] = "full"
    """How MuJoCo draws: fast leaves out shadows and antialiasing; same physics, slightly different images."""
    image_size: Annotated[int, Range(8, 256)] = 64
    """Side in pixels of images of robots, and of images from gym that are resized; a power of two."""
    threads: Annotated[int, Range(0, 4096)] = 0
    """Environment threads; 0 lets the source choose. With gym: 0 for one process each, 1 for none."""
    kwargs: str = "{}"
    """With gym: keyword arguments of gymnasium.make, a JSON object such as '{"level": 3}'."""
    time_limit: Annotated[int, Range(0, 2**31 - 1)] = 0
    """With gym: agent steps after which an episode is truncated; 0 leaves it to the environment."""


@dataclass(frozen=True)
class ReplayConfig:
    """Where data is kept, and how much of it one update reads."""

    capacity: Annotated[int, Range(1, 2**40)] = 1_000_000
    """Rows kept, all environments together."""
    batch: Annotated[int, Range(1, 2**20)] = 16
    """Windows per update (B)."""
    length: Annotated[int, Range(2, 2**16)] = 64
    """Rows per window (T)."""


@dataclass(frozen=True)
class TrainConfig:
    """How often the agent learns."""

    ratio: Annotated[float, Range(0, 2**20)] = 1024.0
    """Rows replayed per agent step: 1024 at B16 x T64 is one update per agent step."""
    prefill: SomeSteps = 1024
    """Windows collected before learning starts, by random actions or by the policy of --init-from."""
    graph: Literal["auto", "on", "off", "overlap"] = "auto"
    """CUDA graphs; overlap: the actor learns beside the next world model; auto: the fastest that is correct."""
    tune: bool = True
    """On CUDA, find the fastest correct kernels, once per machine and model; hdfast.tune shows them."""
    nonfinite_limit: Annotated[int, Range(1, 2**31)] = 10
    """Updates that may be skipped for a NaN or infinite loss before the run stops."""


@dataclass(frozen=True)
class RSSMConfig:
    """The recurrent state-space model."""

    deter: Width = 512
    """Width of the recurrent state (D)."""
    units: Width = 512
    """Width of its hidden layers (U)."""
    stoch: Annotated[int, Range(1, 1024)] = 32
    """Categorical latents (S)."""
    classes: Annotated[int, Range(2, 1024)] = 32
    """Classes of each latent (K)."""
    unimix: Annotated[float, Range(0, 0.5)] = 0.01
    """Share of the uniform distribution mixed into every categorical."""


@dataclass(frozen=True)
class NetworkConfig:
    """Encoder, decoder and heads."""

    units: Width = 512
    """Width of the heads, actor and critic."""
    layers: Layers = 2
    """Hidden layers of the heads, actor and critic."""
    depth: Annotated[int, Range(1, 4096)] = 32
    """Channels of the first convolution; doubled at each of the next."""
    mlp_layers: Layers = 5
    """Hidden layers of the vector encoder and decoder."""
    mlp_units: Width = 1024
    """Width of the vector encoder and decoder."""
    bins: Annotated[int, Range(3, 4096)] = 255
    """Bins of the two-hot reward and value distributions."""


@dataclass(frozen=True)
class HarmonyConfig:
    """The balance of observation, reward and dynamics losses (HarmonyDream, section 3)."""

    mode: Literal["learned", "fixed", "off"] = "learned"
    """learned: three scalars, from the weights below on; fixed: these weights; off: DreamerV3's own loss scales."""
    reward: Scale = 1.0
    """Weight of the reward loss, at first or (mode fixed) always."""
    image: Scale = 1.0
    """Weight of the image loss, likewise."""
    kl: Scale = 1.0
    """Weight of the two KL losses, split 5 to 1, likewise; fixed at 0.6 it gives DreamerV3's scales."""


@dataclass(frozen=True)
class LossConfig:
    """Loss scales of the world model."""

    dyn: Scale = 0.5
    """Scale of KL(sg(posterior) || prior), which trains the prior; with harmony only its ratio to rep counts."""
    rep: Scale = 0.1
    """Scale of KL(posterior || sg(prior)), which trains the posterior."""
    reward: Scale = 1.0
    """Scale of the reward loss (harmony off)."""
    cont: Scale = 1.0
    """Scale of the loss of the continuation head."""
    image: Scale = 1.0
    """Scale of the image loss (harmony off)."""
    vector: Scale = 1.0
    """Scale of the loss of each vector observation."""
    free_nats: Scale = 1.0
    """KL losses below this many nats have no gradient."""
    cont_gradient: bool = True
    """Let the continuation loss train the latents too, not only its head."""


@dataclass(frozen=True)
class BehaviorConfig:
    """Actor and critic, trained in imagination."""

    horizon: Annotated[int, Range(1, 1024)] = 15
    """Imagined agent steps (H)."""
    discount_horizon: Annotated[float, Range(1.001, 1e9)] = 333.0
    """Discount is 1 - 1 / discount_horizon (at 1 it would be 0)."""
    lam: Share = 0.95
    """Lambda of the lambda-return."""
    entropy: Scale = 3e-4
    """Scale of the actor's entropy bonus."""
    slow_rate: Share = 0.02
    """How far the slow critic moves towards the critic at each update."""
    return_decay: Share = 0.99
    """Decay of the running percentiles of the returns."""
    return_low: Share = 0.05
    """The lower of these percentiles, as a share."""
    return_high: Share = 0.95
    """The upper one."""
    return_floor: Positive = 1.0
    """Advantages are divided by the range between them, or by this if it is larger."""
    unimix: Annotated[float, Range(0, 0.5)] = 0.01
    """Share of the uniform distribution in the policy of discrete actions."""
    actor_grad: Literal["auto", "reinforce"] = "auto"
    """auto: REINFORCE for discrete actions, and through the dynamics for continuous ones; or REINFORCE for both."""


@dataclass(frozen=True)
class OptimizerConfig:
    """Adam for each of the three parts."""

    # An eps of 0 would divide by the zeros of parameters without gradient, and with a clip of 0 nothing would learn.
    model_lr: Scale = 1e-4
    """Learning rate of the world model, harmony scalars included."""
    model_eps: Positive = 1e-8
    """Adam's epsilon of the world model."""
    model_clip: Positive = 1000.0
    """Global norm to which the world model's gradient is clipped."""
    actor_lr: Scale = 3e-5
    """Learning rate of the actor."""
    actor_eps: Positive = 1e-5
    """Adam's epsilon of the actor."""
    actor_clip: Positive = 100.0
    """Global norm to which the actor's gradient is clipped."""
    critic_lr: Scale = 3e-5
    """Learning rate of the critic."""
    critic_eps: Positive = 1e-5
    """Adam's epsilon of the critic."""
    critic_clip: Positive = 100.0
    """Global norm to which the critic's gradient is clipped."""


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation on environments of its own, with sampled actions."""

    every: Steps = 5_000
    """Agent steps between evaluations; 0 evaluates at the end only."""
    episodes: Annotated[int, Range(1, 1_000_000)] = 100
    """Episodes per evaluation."""
    num_envs: Envs = 8
    """Evaluation environments stepped together."""


@dataclass(frozen=True)
class CheckpointConfig:
    """How much a killed run can lose."""

    seconds: Scale = 120.0
    """Seconds of wall time between checkpoints."""
    keep: Annotated[int, Range(1, 1000)] = 2
    """Checkpoints kept."""


@dataclass(frozen=True)
class LogConfig:
    """What a run writes while it runs."""

    every: SomeSteps = 500
    """Agent steps between lines of metrics.jsonl and points in TensorBoard."""
    video_every: Steps = 10_000
    """Agent steps between videos of open-loop prediction; 0 writes none."""
    tensorboard: bool = True
    """Write TensorBoard files beside the JSON lines."""
