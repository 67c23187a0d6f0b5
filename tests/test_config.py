"""Configuration: which setting wins, what the sizes are, and one line for everything invalid."""

import dataclasses
import itertools
import json
import re
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import pytest

from hdfast import suites
from hdfast.config import Config, default_config, parse, validate
from hdfast.flags import field_names
from hdfast.overrides import apply_overrides, ranges
from hdfast.runtime.errors import ConfigError
from hdfast.sizes import SIZES


def value_of(config, name):
    for part in name.split("."):
        config = getattr(config, part)
    return config


def test_defaults_give_way_to_the_suite_the_suite_to_the_size_and_all_to_flags(monkeypatch):
    suite = suites.get("demo")
    monkeypatch.setitem(
        suites.SUITES,
        "demo",
        dataclasses.replace(suite, defaults={"size": "tiny", "rssm": {"units": 7}, "eval": {"every": 123}}),
    )
    assert Config().eval.every == 5_000
    tiny = SIZES["tiny"]["rssm"]
    plain = parse(["--suite", "demo"])
    assert (plain.size, plain.eval.every, plain.rssm.units, plain.rssm.deter) == (
        "tiny",
        123,
        7,
        tiny["deter"],
    )
    sized = parse(["--suite", "demo", "--size", "medium"])
    assert (sized.eval.every, sized.rssm.units, sized.rssm.deter) == (123, 640, 1024)
    assert sized.rssm.stoch == Config().rssm.stoch != tiny["stoch"]  # nothing is left of the suite's own size
    flagged = parse(["--rssm.units", "9", "--suite=demo", "--size=medium", "--eval.every=5"])
    assert (flagged.eval.every, flagged.rssm.units, flagged.rssm.deter) == (5, 9, 1024)


def test_atari100k_is_the_paper():
    config = parse([])
    assert (config.suite, config.size, config.agent_steps) == ("atari100k", "small", 100_000)
    assert (config.replay.batch, config.replay.length, config.train.ratio) == (16, 64, 1024)
    assert (config.updates_per_step, config.env.num_envs, config.behavior.horizon) == (1.0, 1, 15)
    assert (config.eval.every, config.eval.episodes) == (5_000, 100)
    assert (config.loss.dyn, config.loss.rep, config.harmony.mode) == (0.5, 0.1, "learned")
    assert config.loss.cont_gradient


@pytest.mark.parametrize(
    ("flags", "little"),
    [
        (["--suite", "demo"], True),
        (["--suite", "demo", "--rssm.deter", "129"], False),
        (["--suite", "demo", "--replay.batch", "33"], False),
        (["--suite", "atari100k", "--size", "tiny"], False),
    ],
)
def test_little_work_is_that_of_the_demo(flags, little):
    assert parse(flags).little_work is little


def test_metaworld_is_the_authors_configuration():
    """`metaworld` of dreamerv3-jax/dreamerv3/configs.yaml."""
    config = parse(["--suite", "metaworld"])
    assert (config.rssm.deter, config.rssm.units, config.network.depth) == (1024, 640, 48)
    assert (config.network.units, config.network.layers) == (640, 3)
    assert (config.env.num_envs, config.replay.batch, config.replay.length) == (5, 50, 50)
    assert (config.train.ratio, config.train.prefill, config.agent_steps) == (500, 5_000, 255_000)
    assert (config.eval.every, config.eval.episodes) == (10_000, 10)
    assert not config.loss.cont_gradient


@pytest.mark.parametrize(
    ("size", "deter", "units", "depth", "layers"),
    [
        ("small", 512, 512, 32, 2),
        ("medium", 1024, 640, 48, 3),
        ("large", 2048, 768, 64, 4),
        ("xlarge", 4096, 1024, 96, 5),
    ],
)
def test_sizes(size, deter, units, depth, layers):
    config = parse(["--size", size])
    assert (config.rssm.deter, config.rssm.units) == (deter, units)
    assert (config.network.units, config.network.depth, config.network.layers) == (units, depth, layers)
    assert (config.rssm.stoch, config.rssm.classes) == (32, 32)
    assert config.size == size


def test_sizes_grow():
    widths = [(s["rssm"]["deter"], s["rssm"]["units"], s["network"]["depth"]) for s in SIZES.values()]
    assert list(SIZES) == ["tiny", "small", "medium", "large", "xlarge"]
    assert all(
        a < b for small, large in itertools.pairwise(widths) for a, b in zip(small, large, strict=True)
    )


def another(config, name):
    """Text and value of a flag that is not at its default."""
    section, _, field = name.rpartition(".")
    kind = get_type_hints(type(value_of(config, section) if section else config))[field]
    value = value_of(config, name)
    named = {
        "suite": ("demo", "demo"),
        "task": ("pong", "Pong"),
        "env.kwargs": ('{"level": 3}', '{"level":3}'),
        "env.image_size": ("128", 128),
        "learner_options": ('{"scale": 2}', '{"scale":2}'),
    }
    if name in named:
        return named[name]
    if get_origin(kind) is Literal:
        choice = next(choice for choice in get_args(kind) if choice != value)
        return choice, choice
    if kind is float:
        return "0.25", 0.25
    if kind is int:
        return str(value + 1), value + 1
    return "other", Path("other") if kind is Path else "other"


def test_every_number_has_a_range():
    numbers = {n for n in field_names(Config()) if type(value_of(Config(), n)) in (int, float)}
    assert {name for name, _ in ranges(Config)} == numbers
    for name, right in ranges(Config):
        assert right.low <= value_of(Config(), name) <= right.high


@pytest.mark.parametrize("name", field_names(Config()))
def test_every_field_is_a_typed_flag(name):
    of = {
        "env.kwargs": "gym",
        "env.time_limit": "gym",
        "env.image_size": "gym",
        "env.render": "dmc",
        "env.obs": "dmc",
    }
    suite = ["--suite", of[name]] if name in of else []
    default = parse(suite)
    if isinstance(value_of(default, name), bool):
        head, _, tail = name.replace("_", "-").rpartition(".")
        for flag, right in ((tail, True), (f"no-{tail}", False)):
            assert value_of(parse([f"--{head}.{flag}" if head else f"--{flag}"]), name) is right
        return
    if name == "behavior.discount_horizon":
        text, right = "8.5", 8.5
    else:
        text, right = another(default, name)
    modes = {f"harmony.{loss}": "fixed" for loss in ("reward", "image", "kl")}  # in which it has an effect
    modes |= {f"loss.{loss}": "off" for loss in ("reward", "image")}
    mode = [*suite, *(["--harmony.mode", modes[name]] if name in modes else [])]
    mode += ["--learner", "mine:Mine"] if name == "learner_options" else []
    default = parse(mode)
    for flag in (name, name.replace("_", "-")):
        got = parse([f"--{flag}", text, *mode])
        assert value_of(got, name) == right
        assert type(value_of(got, name)) is type(right)
    if name not in ("suite", "size"):  # these change other fields, too
        changed = {n for n in field_names(got) if value_of(got, n) != value_of(default, n)}
        assert changed == {name}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--suite atari10k", "no suite 'atari10k'; did you mean 'atari100k'?"),
        ("--task Pnog", "no task 'Pnog' in suite atari100k; did you mean 'Pong'?"),
        ("--size smal", "--size: no size 'smal'; did you mean 'small'?"),
        ("--siz small", "there is no option --siz; did you mean '--size'"),
        ("--rssm.detr 4", "there is no option --rssm.detr; did you mean '--rssm.deter'"),
        ("--rssm 4", "there is no option --rssm; did you mean '--rssm."),
        ("--log.no-tensorbord", "did you mean '--log.no-tensorboard' or '--log.tensorboard'?"),
        ("--no-log.tensorboard", "did you mean '--log.tensorboard' or '--log.no-tensorboard'?"),
        (
            "--harmony.mode learnt",
            "--harmony.mode cannot be 'learnt'; did you mean 'learned'?",
        ),
        ("--precision fp16", "--precision cannot be 'fp16'; choose from 'auto', 'float32', 'bfloat16'"),
        ("--agent-steps 1.5", "--agent-steps: '1.5' is not a whole number"),
        ("--agent-steps inf", "--agent-steps: 'inf' is not a whole number"),
        ("--agent-steps 1e", "--agent-steps: '1e' is not a whole number"),
        ("--train.ratio much", "--train.ratio: 'much' is not a number"),
        ("--rssm.deter", "--rssm.deter needs a value"),
        ("--seed --dry-run", "--seed needs a value"),
        ("--logdir=", "--logdir needs a value, got an empty one"),
        ("--logdir ~nobody-at-all/runs", "--logdir ~nobody-at-all/runs: there is no such home directory"),
        (
            "--seed 2147483647 --seeds 2",
            "--seed 2147483647 --seeds 2 ends at seed 2,147,483,648, out of range: expected up to 2,147,483,647",
        ),
        (
            "Pong",
            "there is no argument 'Pong'; a value comes after its --flag, and a switch has none: --dry",
        ),
        (
            "--task Pong Breakout",
            "there is no argument 'Breakout'; a value comes after its --flag",
        ),
        (
            "--dry-run=false",
            "--dry-run is a switch and takes no value, such as 'false'; --no-dry-run turns it off",
        ),
        (
            "--log.tensorboard no --seed 1",
            "--log.tensorboard is a switch and takes no value, such as 'no'; --log.no-tensorboard turns it off",
        ),
        ("--replay.batch 0", "--replay.batch 0 is out of range: expected 1 to 1,048,576"),
        ("--train.ratio nan", "--train.ratio nan is out of range"),
        ("--optimizer.model-lr -1", "--optimizer.model-lr -1.0 is out of range"),
        ("--loss.kl 1", "there is no option --loss.kl"),
        ("--loss.rep inf", "--loss.rep inf is out of range"),
        ("--behavior.entropy nan", "--behavior.entropy nan is out of range"),
        ("--seed -1", "--seed -1 is out of range: expected 0 to 2,147,483,647"),
        (
            "--harmony.mode off --harmony.kl 2",
            "--harmony.kl has no effect with --harmony.mode off; --harmony.mode learned or fixed takes it",
        ),
        ("--harmony.image 0", "--harmony.image 0.0 is no weight to start from; expected 1e-30 or more"),
        (
            "--behavior.return-low 0.5 --behavior.return-high 0.5",
            "--behavior.return-low 0.5 is not below --behavior.return-high 0.5",
        ),
        (
            "--loss.image 2",
            "--loss.image has no effect with --harmony.mode learned; --harmony.mode off takes it",
        ),
        ("--harmony.mode fixed --loss.reward 2", "--loss.reward has no effect with --harmony.mode fixed;"),
        (
            "--loss.dyn 0 --loss.rep 0",
            "--loss.dyn and --loss.rep are both 0, and harmony splits the KL by them",
        ),
        (
            "--behavior.discount-horizon 1",
            "--behavior.discount-horizon 1.0 is out of range: expected 1.001 to",
        ),
        ("--optimizer.actor-eps 0", "--optimizer.actor-eps 0.0 is out of range: expected 1e-30 to"),
        ("--optimizer.model-clip 0", "--optimizer.model-clip 0.0 is out of range: expected 1e-30 to"),
        (
            "--env.kwargs {}x --suite gym",
            "--env.kwargs {}x is no JSON: Extra data: line 1 column 3 (char 2); expected",
        ),
        (
            "--env.kwargs [3] --suite gym",
            "--env.kwargs [3] is no JSON object; expected an object such as --env.kwargs '{",
        ),
        ('--env.kwargs {"a":1}', "--env.kwargs has no effect in suite atari100k; --suite gym takes it"),
        ("--env.obs state", "--env.obs cannot be 'state' in suite atari100k; choose from 'image'"),
        ("--env.render fast", "--env.render cannot be 'fast' in suite atari100k; choose from 'full'"),
        (
            "--suite dmc --env.source ale",
            "--env.source cannot be 'ale' in suite dmc; choose from 'auto', 'envpool'",
        ),
        (
            "--env.time-limit 9 --suite dmc",
            "--env.time-limit has no effect in suite dmc; --suite gym takes it",
        ),
        (
            "--env.image-size 128 --suite demo",
            "--env.image-size has no effect in suite demo; --suite gym or dmc or metaworld takes it",
        ),
        (
            "--env.image-size 96 --suite dmc",
            "--env.image-size 96 is no power of two; expected a power of two such as 64 or 128",
        ),
        ("--env.image-size 512 --suite dmc", "--env.image-size 512 is out of range: expected 8 to 256"),
        ("--env.time-limit -1 --suite gym", "--env.time-limit -1 is out of range: expected 0 to"),
        (
            "--replay.capacity 100",
            "--replay.capacity 100 is too small: 1 environment(s) with windows of 64 rows need at least 128",
        ),
    ],
)
def test_what_cannot_be_is_one_line(argv, message):
    with pytest.raises(ConfigError) as error:
        parse(argv.split())
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert error.value.details == ()
    assert error.value.exit_code == 2


@pytest.mark.parametrize("written", ["2e4", "2E+4", "20_000", "20000.0", "20000"])
def test_whole_numbers_are_read_however_they_are_written(written):
    config = parse(["--agent-steps", written, "--replay.capacity", written])
    assert (config.agent_steps, config.replay.capacity) == (20_000, 20_000)
    assert isinstance(config.agent_steps, int)


def test_of_a_flag_given_twice_the_last_counts_with_all_it_brings():
    assert parse(["--size", "small", "--size=large"]) == parse(["--size", "large"])
    assert parse(["--suite=demo", "--suite", "dmc", "--seed", "1", "--seed", "2"]) == parse(
        ["--suite", "dmc", "--seed", "2"]
    )


def test_names_are_found_in_any_spelling_and_stored_in_their_own():
    config = parse(["--suite", "Atari-100K", "--task", "ms_pacman"])
    assert (config.suite, config.task) == ("atari100k", "MsPacman")


def test_a_home_directory_is_found_where_the_shell_leaves_it(monkeypatch):
    monkeypatch.setenv("HOME", "/me")
    assert parse(["--logdir=~/runs"]).logdir == Path("/me/runs")


def test_help_is_complete_and_short(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(["--suite", "demo", "--rssm.deter", "5", "-h"])
    assert not stop.value.code
    out, err = capsys.readouterr()
    assert err == ""
    shown = dict(re.findall(r"^  --(\S+) (\S+)", out, flags=re.MULTILINE))
    demo = default_config("demo")
    for name in field_names(demo):
        value = value_of(demo, name)
        if isinstance(value, bool):
            head, dot, tail = name.rpartition(".")
            name, value = f"{head}{dot}[no-]{tail}", "yes" if value else "no"
        assert shown.pop(name.replace("_", "-")) == ("-" if value is None else str(value))
    assert shown == {"config": "-"}
    assert "Width of the recurrent state (D)." in out
    assert "One of learned, fixed, off." in out
    assert len(out.splitlines()) < 120
    assert max(map(len, out.splitlines())) <= 180


def test_the_stored_form_is_json_and_reads_back(tmp_path):
    config = parse(["--suite", "demo", "--logdir", str(tmp_path), "--rssm.deter", "64", "--seed", "3"])
    stored = json.loads(json.dumps(config.to_dict()))
    assert stored["logdir"] == str(tmp_path)
    assert stored["rssm"]["deter"] == 64
    again = apply_overrides(Config(), stored)
    assert again == config


def test_overrides_know_their_fields():
    assert apply_overrides(Config(), {"rssm": {"deter": 3}}).rssm.deter == 3
    with pytest.raises(ConfigError, match=r"^config.rssm has no field 'detr'; did you mean 'deter'"):
        apply_overrides(Config(), {"rssm": {"detr": 3}})
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().seed = 3


@pytest.mark.parametrize("name", suites.SUITES)
def test_every_suite_has_a_config_that_can_be(name):
    config = validate(default_config(name))
    assert config.suite == name
    assert config.updates_per_step > 0


def test_what_is_seen_is_left_open_for_environments_of_ones_own_alone():
    for name in suites.SUITES:
        assert default_config(name).env.obs == ("auto" if name == "gym" else "image")


@pytest.mark.parametrize("name", suites.SUITES)
def test_a_suite_s_values_are_those_of_their_flags(name):
    """Resuming with a default given as a flag leaves config.json the same, even with 64.0 for 64."""
    config = default_config(name)
    for field in field_names(Config()):
        assert type(value_of(config, field)) is type(value_of(Config(), field)) or field == "task", field
    flag = ["--suite", name, "--train.ratio", str(config.train.ratio)]
    assert json.dumps(parse(flag).to_dict()) == json.dumps(parse(flag[:2]).to_dict())
