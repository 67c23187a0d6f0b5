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
    """What a robotic task, or one of gym, is seen through; auto: image, of gym state where none is observed."""
    render: Literal["full", "fast"] = "full"
    """fast drops shadows and antialiasing of MuJoCo scenes: same physics, slightly other images."""
    image_size: Annotated[int, Range(8, 256)] = 64
    """Side of the images of a robot, and of gym's that are resized, in pixels: a power of two."""
    threads: Annotated[int, Range(0, 4096)] = 0
    """Environment threads; 0 lets the source choose. Of gym: a process each, or 1 for none."""
    kwargs: str = "{}"
    """Of gym: what gymnasium.make is given by name, a JSON object such as '{"level": 3}'."""
    time_limit: Annotated[int, Range(0, 2**31 - 1)] = 0
    """Of gym: agent steps after which an episode is truncated; 0 leaves it to the environment."""


@dataclass(frozen=True)
class ReplayConfig:
    """Where data rests, and how much of it one update reads."""

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
    """Windows that a random policy, or the one of --init-from, collects before learning starts."""
    graph: Literal["auto", "on", "off", "overlap"] = "auto"
    """Update and acting as CUDA graphs; overlap: actor beside next world model; auto: the fastest that is right."""
    tune: bool = True
    """On CUDA, find the fastest kernels that are right, once for a machine and model; hdfast.tune shows them."""
    nonfinite_limit: Annotated[int, Range(1, 2**31)] = 10
    """Updates skipped for a NaN or infinite loss before the run stops."""


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
    """learned: three scalars; fixed: the constants below; off: DreamerV3's own loss scales."""
    reward: Scale = 1.0
    """Constant weight of the reward loss (mode fixed)."""
    image: Scale = 1.0
    """Constant weight of the image loss (mode fixed)."""
    kl: Scale = 1.0
    """Constant weight of the two KL losses, which share it 5 to 1 (mode fixed); DreamerV3's scales are 0.6."""


@dataclass(frozen=True)
class LossConfig:
    """Loss scales of the world model; reward and image where harmony is off; dyn : rep also splits its KL."""

    dyn: Scale = 0.5
    rep: Scale = 0.1
    reward: Scale = 1.0
    cont: Scale = 1.0
    image: Scale = 1.0
    vector: Scale = 1.0
    free_nats: Scale = 1.0
    """KL below this many nats is not pushed further down."""
    cont_gradient: bool = True
    """Whether the continuation loss shapes the latents too, not its head alone."""


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
    """Decay of the running 5% and 95% percentiles of the returns."""


@dataclass(frozen=True)
class OptimizerConfig:
    """Adam for each of the three parts.

    An eps of 0 would divide by the zeros of parameters without gradient, and a clip of 0 learn nothing.
    """

    model_lr: Scale = 1e-4
    model_eps: Positive = 1e-8
    model_clip: Positive = 1000.0
    actor_lr: Scale = 3e-5
    actor_eps: Positive = 1e-5
    actor_clip: Positive = 100.0
    critic_lr: Scale = 3e-5
    critic_eps: Positive = 1e-5
    critic_clip: Positive = 100.0


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
    """Wall time between checkpoints."""
    keep: Annotated[int, Range(1, 1000)] = 2
    """Checkpoints kept."""


@dataclass(frozen=True)
class LogConfig:
    """What a run says while it runs."""

    every: SomeSteps = 500
    """Agent steps between lines of metrics.jsonl and points in TensorBoard."""
    video_every: Steps = 10_000
    """Agent steps between videos of open-loop prediction; 0 writes none."""
    tensorboard: bool = True
    """Write TensorBoard files beside the JSON lines."""
