"""What a run is made of: frozen dataclasses, the model sizes, and the command line that fills them.

Precedence, weakest first: the defaults below, the suite's own settings, the file of ``--config``, ``--size``, all
other flags of the command line.
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from hdfast import config_file, suites
from hdfast.flags import parse_flags, peek
from hdfast.overrides import Range, apply_overrides, check_ranges
from hdfast.runtime.errors import ConfigError
from hdfast.sizes import widths

Size = Literal["tiny", "small", "medium", "large", "xlarge"]
LAST_SEED = 2**31 - 1
MOST_ENVS = 4096

Envs = Annotated[int, Range(1, MOST_ENVS)]
Steps = Annotated[int, Range(0, 2**40)]
SomeSteps = Annotated[int, Range(1, 2**40)]
Width = Annotated[int, Range(1, 2**16)]
Layers = Annotated[int, Range(1, 64)]
Share = Annotated[float, Range(0, 1)]
Scale = Annotated[float, Range(0, 1e9)]
Positive = Annotated[float, Range(1e-30, 1e9)]

_OF_GYM = ("kwargs", "time_limit")  # fields of env that have no effect in any other suite


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
    graph: Literal["auto", "on", "off"] = "auto"
    """Update and acting as CUDA graphs; auto where they were found right and faster."""
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


@dataclass(frozen=True)
class Config:
    """Train HarmonyDream. Every task of the suite is trained in turn unless --task names one."""

    suite: str = "atari100k"
    """atari100k, dmc, metaworld or demo; gym for your own environments."""
    task: str | None = None
    """One task of the suite; all of them in turn if left out. Of gym: what gymnasium.make takes."""
    seed: Annotated[int, Range(0, LAST_SEED)] = 0
    """First random seed."""
    seeds: Annotated[int, Range(1, 10_000)] = 1
    """Seeds trained in turn, counting up from --seed."""
    logdir: Path = Path("runs")
    """Folder that holds all runs."""
    size: Size = "small"
    """Preset of widths and depths."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the matrix work; parameters, statistics and losses stay float32."""
    agent_steps: SomeSteps = 100_000
    """Agent steps of a run, random ones included (frames are agent steps times the action repeat)."""
    init_from: str | None = None
    """Directory of a run whose newest parameters a new run begins with; its policy then acts from the first step."""
    dry_run: bool = False
    """Build everything, print it as JSON and exit."""
    env: EnvConfig = field(default_factory=EnvConfig)
    replay: ReplayConfig = field(default_factory=ReplayConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    rssm: RSSMConfig = field(default_factory=RSSMConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    harmony: HarmonyConfig = field(default_factory=HarmonyConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    behavior: BehaviorConfig = field(default_factory=BehaviorConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)

    @property
    def updates_per_step(self) -> float:
        """Updates owed for each agent step."""
        return self.train.ratio / (self.replay.batch * self.replay.length)

    @property
    def total_agent_steps(self) -> int:
        """Agent steps at which a run ends: `agent_steps`, rounded up because all environments step together."""
        return -(-self.agent_steps // self.env.num_envs) * self.env.num_envs

    @property
    def prefill_agent_steps(self) -> int:
        """Agent steps after which replay holds `train.prefill` windows, and learning begins."""
        rows = -(-self.train.prefill // self.env.num_envs) + self.replay.length - 1
        return rows * self.env.num_envs

    @property
    def little_work(self) -> bool:
        """Whether the ops of an update are too short for CPU threads to share: layers of at most 128, and 512 rows."""
        width = max(self.rssm.deter, self.rssm.units, self.network.units)
        return width <= 128 and self.replay.batch * self.replay.length <= 512

    @property
    def replay_rows(self) -> int:
        """Rows that replay is to hold: its capacity, or all of the run where that is less."""
        return min(self.replay.capacity, self.total_agent_steps)

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values, as stored in ``config.json``."""
        return _plain(dataclasses.asdict(self))


def default_config(suite: str = "atari100k", size: str | None = None) -> Config:
    """The configuration a suite starts from.

    Args:
        suite: name of a suite in `hdfast.suites`.
        size: model preset; None takes the suite's own.

    Raises:
        ConfigError: no such suite or size; the message names the nearest.
    """
    found = suites.get(suite)
    own = found.defaults.get("size", "small")
    layers = [widths(size or own), found.defaults]
    if size is not None:  # wins over the suite's widths, which are meant for the suite's own size
        layers.reverse()
    config = apply_overrides(apply_overrides(Config(), layers[0]), layers[1])
    return dataclasses.replace(config, suite=found.name, size=size or own)


def parse(argv: Sequence[str] | None = None, prog: str = "python -m hdfast.train") -> Config:
    """Parses the command line of a training run.

    Raises:
        ConfigError: a flag or value that cannot be; the message says which and what would be right.
        SystemExit: ``--help``.
    """
    argv, file = config_file.split(sys.argv[1:] if argv is None else argv)
    suite, size = peek(argv, "--suite"), peek(argv, "--size")
    default = default_config(suite or "atari100k", size) if file is None else _from_file(file, suite, size)
    return validate(parse_flags(argv, default, prog, others={config_file.FLAG: config_file.ABOUT}))


def _from_file(file: Path, suite: str | None, size: str | None) -> Config:
    """What the fields in a file make of the defaults; its task, and what gym alone has, are not for another suite.

    suite, size: of the command line, which win over those in the file.

    Raises: ConfigError.
    """
    fields, sized = config_file.read(file), {} if size is None else {**widths(size), "size": size}
    other = None if suite is None else suites.get(suite).name
    try:
        own = default_config(str(fields.get("suite", "atari100k")), fields.get("size"))
        config = apply_overrides(own, fields)
        if other not in (None, own.suite):
            env = dataclasses.replace(config.env, **{name: getattr(EnvConfig(), name) for name in _OF_GYM})
            config = dataclasses.replace(config, suite=other, task=None, env=env)
        return apply_overrides(config, sized)
    except TypeError as error:
        raise ConfigError(str(error), where=f"{config_file.FLAG} {file}") from None
    except ConfigError as error:
        raise ConfigError(error.what, where=f"{config_file.FLAG} {file}", hint=error.hint) from None


def validate(config: Config) -> Config:
    """Checks every value that types alone cannot, resolves the task's name and `~`, and returns the configuration.

    Raises:
        ConfigError: naming the flag, its value and the bound it breaks.
    """
    suite = suites.get(config.suite)
    try:
        config = dataclasses.replace(config, suite=suite.name, logdir=config.logdir.expanduser())
    except RuntimeError:
        raise ConfigError(f"--logdir {config.logdir}: there is no such home directory") from None
    if config.task is not None:
        config = dataclasses.replace(config, task=suite.task(config.task).name)
    check_ranges(config)
    if (last := config.seed + config.seeds - 1) > LAST_SEED:
        asked = f"--seed {config.seed} --seeds {config.seeds}"
        raise ConfigError(f"{asked} ends at seed {last:,}, out of range: right is up to {LAST_SEED:,}")
    config = dataclasses.replace(config, env=_checked_env(config.env, suite))
    plain = Config()
    for section, mode, names in (
        ("harmony", "fixed", ("reward", "image", "kl")),
        ("loss", "off", ("reward", "image")),
    ):
        for name in names:
            given, default = (getattr(getattr(one, section), name) for one in (config, plain))
            if given != default and config.harmony.mode != mode:
                raise ConfigError(
                    f"--{section}.{name} has no effect with --harmony.mode {config.harmony.mode}",
                    hint=f"--harmony.mode {mode} takes it",
                )
    if config.harmony.mode != "off" and not config.loss.dyn + config.loss.rep:
        raise ConfigError("--loss.dyn and --loss.rep are both 0, and harmony splits the KL by them")
    rows = config.replay.length * config.env.num_envs
    if config.replay.capacity < 2 * rows:
        raise ConfigError(
            f"--replay.capacity {config.replay.capacity} is too small: {config.env.num_envs} environment(s) with "
            f"windows of {config.replay.length} rows need at least {2 * rows}"
        )
    return config


def _checked_env(env: EnvConfig, suite: suites.Suite) -> EnvConfig:
    """`env`, its kwargs written in one way. Raises: ConfigError."""
    for name in _OF_GYM:
        if getattr(env, name) != getattr(EnvConfig(), name) and suite.source != "gym":
            flag = f"--env.{name}".replace("_", "-")
            raise ConfigError(f"{flag} has no effect in suite {suite.name}", hint="--suite gym takes it")
    hint = """right is such as --env.kwargs '{"level": 3}'"""
    try:
        kwargs = json.loads(env.kwargs)
    except ValueError as error:
        raise ConfigError(f"--env.kwargs {env.kwargs} is no JSON: {error}", hint=hint) from None
    if not isinstance(kwargs, dict):
        raise ConfigError(f"--env.kwargs {env.kwargs} is no JSON object", hint=hint)
    return dataclasses.replace(env, kwargs=json.dumps(kwargs, sort_keys=True, separators=(",", ":")))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return str(value) if isinstance(value, Path) else value
