"""What a run is made of: its sections (`hdfast.sections`) in one dataclass, and the command line that fills it.

Precedence, weakest first: the defaults below, the suite's own settings, the file of ``--config``, ``--size``, all
other flags of the command line.
"""

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

from hdfast import config_file, suites
from hdfast.flags import field_names, parse_flags, peek
from hdfast.overrides import Range, apply_overrides, check_ranges
from hdfast.runtime.errors import ConfigError
from hdfast.runtime.files import filled, plain
from hdfast.sections import (
    BehaviorConfig,
    CheckpointConfig,
    EnvConfig,
    EvalConfig,
    HarmonyConfig,
    LogConfig,
    LossConfig,
    NetworkConfig,
    OptimizerConfig,
    ReplayConfig,
    RSSMConfig,
    SomeSteps,
    TrainConfig,
)
from hdfast.sizes import widths

Size = Literal["tiny", "small", "medium", "large", "xlarge"]
LAST_SEED = 2**31 - 1
LEAST_WEIGHT = 1e-30  # of a loss that harmony begins with
# Fields of env that have an effect only in these suites.
_TAKERS = {"kwargs": ("gym",), "time_limit": ("gym",), "image_size": ("gym", "dmc", "metaworld")}

# What may differ between the sessions of one run: where it runs and how it reports, not what it computes.
RESUMABLE_CHANGES = (
    "suite",
    "seeds",
    "logdir",
    "dry_run",
    "device",
    "precision",
    "env.threads",
    "train.graph",
    "train.tune",
    "train.nonfinite_limit",
    "checkpoint",
    "eval",
    "log",
)
GROWING = ("agent_steps",)  # what may grow in a later session


@dataclass(frozen=True)
class Config:
    """Train HarmonyDream. Every task of the suite is trained in turn unless --task names one."""

    suite: str = "atari100k"
    """atari100k, dmc, metaworld or demo; gym for your own environments."""
    task: str | None = None
    """One task of the suite; all of them in turn if left out. With gym: what gymnasium.make takes."""
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
    """Type of matrix products and convolutions; parameters, statistics and losses stay float32."""
    agent_steps: SomeSteps = 100_000
    """Agent steps of a run, with random ones and the first row of each episode (frames: times the action repeat)."""
    learner: str | None = None
    """module:Class, a subclass of hdfast.agent.learner.Learner that learns in its place."""
    learner_options: str = "{}"
    """With --learner: values of its class's own `options`, a JSON object such as '{"scale": 0.5}'."""
    init_from: str | None = None
    """Run (or file of a checkpoint) whose parameters a new run starts with; its policy acts from the first step."""
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
    def options(self) -> dict[str, Any]:
        """The options of a learner of one's own, by name; those that were not given are there once it is made."""
        return json.loads(self.learner_options)

    @property
    def tasks(self) -> list[suites.Task]:
        """The tasks to train: the one that is named, or all of the suite. Raises UnknownName, listing the nearest."""
        return suites.get(self.suite).select([self.task] if self.task else [])

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
    def updates(self) -> int:
        """Updates in the whole run."""
        return max(0, int((self.total_agent_steps - self.prefill_agent_steps) * self.updates_per_step))

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
        return plain(dataclasses.asdict(self))


def settings_of(config: Config) -> dict[str, Any]:
    """What a run computes, by the names of the flags, without what a later session may change."""
    kept = {*RESUMABLE_CHANGES, *GROWING, "task", "init_from", "learner_options"}
    names = [name for name in field_names(config) if kept.isdisjoint((name, name.partition(".")[0]))]
    own = {f"learner_options.{name}": value for name, value in config.options.items()}
    return {**{name: attrgetter(name)(config) for name in names}, **own}


def with_defaults(saved: Mapping[str, Any]) -> dict[str, Any]:
    """A config as it was saved, with the defaults of the fields that are newer than it."""
    return filled(saved, Config().to_dict())


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


def parse(
    argv: Sequence[str] | None = None,
    prog: str = "python -m hdfast.train",
    others: Mapping[str, str] = MappingProxyType({}),
) -> Config:
    """Parses the command line of a training run.

    others: flags of the door, already taken out of `argv`, with their help.

    Raises:
        ConfigError: a wrong flag or value; the message says which and what would be right.
        SystemExit: ``--help``.
    """
    argv, file = config_file.split(sys.argv[1:] if argv is None else argv)
    suite, size = peek(argv, "--suite"), peek(argv, "--size")
    default = default_config(suite or "atari100k", size) if file is None else _from_file(file, suite, size)
    asked = parse_flags(argv, default, prog, {config_file.FLAG: config_file.ABOUT, **others})
    try:
        return validate(asked)
    except ConfigError as error:
        if file is not None and _refused(default) == str(error):  # with or without the flags
            raise ConfigError(error.what, where=f"{config_file.FLAG} {file}", hint=error.hint) from None
        raise


def check_no_dry_run(config: Config) -> None:
    """Raises: ConfigError if a dry run is asked of a door without one."""
    if config.dry_run:
        raise ConfigError("only hdfast.train has a dry run", where="--dry-run", hint="leave it out")


def _from_file(file: Path, suite: str | None, size: str | None) -> Config:
    """The defaults of the file's suite and size with the fields of the file on top.

    suite, size: from the command line; they win over those in the file. A file without a suite gets the defaults of
    `suite`. If `suite` is not the file's own, its task and gym's own settings are dropped.

    Raises: ConfigError.
    """
    fields, sized = config_file.read(file), {} if size is None else {**widths(size), "size": size}
    other = None if suite is None else suites.get(suite).name
    try:
        own = default_config(str(fields.get("suite", other or "atari100k")), fields.get("size"))
        config = apply_overrides(own, fields)
        if other not in (None, own.suite):
            unfit = (name for name, takers in _TAKERS.items() if suites.get(other).source not in takers)
            env = dataclasses.replace(config.env, **{name: getattr(EnvConfig(), name) for name in unfit})
            config = dataclasses.replace(config, suite=other, task=None, env=env)
        return apply_overrides(config, sized)
    except TypeError as error:
        raise ConfigError(str(error), where=f"{config_file.FLAG} {file}") from None
    except ConfigError as error:
        raise ConfigError(error.what, where=f"{config_file.FLAG} {file}", hint=error.hint) from None


def _refused(config: Config) -> str | None:
    """What `validate` says against a configuration."""
    try:
        validate(config)
    except ConfigError as error:
        return str(error)
    return None


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
        raise ConfigError(f"{asked} ends at seed {last:,}, out of range: expected up to {LAST_SEED:,}")
    options = _object("--learner-options", config.learner_options, '{"scale": 0.5}')
    if options and config.learner is None:
        raise ConfigError("--learner-options has no effect without --learner", hint="name the learner, too")
    config = dataclasses.replace(
        config, env=_checked_env(config.env, suite), learner_options=json_text(options)
    )
    _check_weights(config)
    low, high = config.behavior.return_low, config.behavior.return_high
    if not low < high:
        raise ConfigError(f"--behavior.return-low {low} is not below --behavior.return-high {high}")
    if config.harmony.mode != "off" and not config.loss.dyn + config.loss.rep:
        raise ConfigError("--loss.dyn and --loss.rep are both 0, and harmony splits the KL by them")
    rows = config.replay.length * config.env.num_envs
    if config.replay.capacity < 2 * rows:
        raise ConfigError(
            f"--replay.capacity {config.replay.capacity} is too small: {config.env.num_envs} environment(s) with "
            f"windows of {config.replay.length} rows need at least {2 * rows}"
        )
    return config


def _check_weights(config: Config) -> None:
    """Raises: ConfigError for a weight of a loss that the mode of harmony does not use, or cannot."""
    mode = config.harmony.mode
    others = {
        "harmony": (("learned", "fixed"), ("reward", "image", "kl")),
        "loss": (("off",), ("reward", "image")),
    }
    for section, (modes, names) in others.items():
        for name in names:
            given, default = (getattr(getattr(one, section), name) for one in (config, Config()))
            if given != default and mode not in modes:
                what = f"--{section}.{name} has no effect with --harmony.mode {mode}"
                raise ConfigError(what, hint=f"--harmony.mode {' or '.join(modes)} takes it")
            if section == "harmony" and mode == "learned" and given < LEAST_WEIGHT:
                hint = f"expected {LEAST_WEIGHT:g} or more"
                raise ConfigError(f"--harmony.{name} {given} is no weight to start from", hint=hint)


def _checked_env(env: EnvConfig, suite: suites.Suite) -> EnvConfig:
    """`env`, with its kwargs in canonical form. Raises: ConfigError."""
    for name, takers in _TAKERS.items():
        if getattr(env, name) != getattr(EnvConfig(), name) and suite.source not in takers:
            flag = f"--env.{name}".replace("_", "-")
            hint = f"--suite {' or '.join(takers)} takes it"
            raise ConfigError(f"{flag} has no effect in suite {suite.name}", hint=hint)
    obs = "image" if env.obs == "auto" and suite.source != "gym" else env.obs
    suite.check_env(source=env.source, obs=obs, render=env.render)
    if env.image_size.bit_count() != 1:
        near = 1 << env.image_size.bit_length()
        hint = f"expected a power of two such as {near // 2} or {near}"
        raise ConfigError(f"--env.image-size {env.image_size} is no power of two", hint=hint)
    return dataclasses.replace(env, kwargs=json_text(_object("--env.kwargs", env.kwargs, '{"level": 3}')))


def _object(flag: str, text: str, example: str) -> dict[str, Any]:
    """The JSON object in a flag's text. Raises: ConfigError."""
    hint = f"expected an object such as {flag} '{example}'"
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{flag} {text} is no JSON: {error}", hint=hint) from None
    if not isinstance(found, dict):
        raise ConfigError(f"{flag} {text} is no JSON object", hint=hint)
    return found


def json_text(value: Mapping[str, Any]) -> str:
    """An object as JSON; equal ones give the same text. Raises: TypeError, ValueError for what JSON cannot say."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))
