"""`--config`: a run that begins with the configuration of another run, or of a JSON file."""

import dataclasses
import json
import math
from pathlib import Path

import pytest

from hdfast.config import parse
from hdfast.runtime.errors import ConfigError


def written(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_a_run_s_configuration_is_where_the_next_begins(tmp_path):
    """Flags change it, --size its widths; another suite drops its task; what concerned one call alone is not taken."""
    argv = ["--suite", "demo", "--task", "Catch", "--seed", "3", "--rssm.deter", "48", "--eval.every", "7"]
    first = parse([*argv, "--logdir", str(tmp_path), "--seeds", "4", "--dry-run"])
    file = written(tmp_path / "config.json", {"config": first.to_dict(), "created": {}})
    same = dataclasses.replace(first, seeds=1, dry_run=False)
    assert parse(["--config", str(file)]) == parse([f"--config={tmp_path}"]) == same
    assert parse(["--config", "no", "--config", str(file)]) == same
    changed = parse(["--config", str(file), "--seed", "5", "--rssm.units", "9"])
    rssm = dataclasses.replace(same.rssm, units=9)
    assert changed == dataclasses.replace(same, seed=5, rssm=rssm)
    sized = parse(["--size", "medium", "--config", str(file)])
    assert (sized.size, sized.rssm.deter, sized.network.depth, sized.eval.every) == ("medium", 1024, 48, 7)
    for flag, text in (("--size", "--size: no size 'dmo'"), ("--suite", "no suite 'dmo'")):
        with pytest.raises(ConfigError, match=f"^{text}; did you mean|^{text}; choose"):
            parse(["--config", str(file), flag, "dmo"])
    other = parse(["--config", str(file), "--suite", "dmc"])
    assert (other.suite, other.task, other.rssm.deter) == ("dmc", None, 48)
    bare = written(tmp_path / "bare.json", {"suite": "dmc", "size": "tiny", "eval": {"every": 0}})
    assert parse(["--config", str(bare)]) == parse(["--suite", "dmc", "--size", "tiny", "--eval.every", "0"])
    written(bare, {"eval": {"every": 0}})  # of any suite
    for suite in ("gym", "demo", "metaworld"):
        argv = ["--suite", suite]
        assert parse([*argv, "--config", str(bare)]) == parse([*argv, "--eval.every", "0"])


def test_arguments_of_an_environment_may_be_an_object(tmp_path):
    file = written(tmp_path / "own.json", {"suite": "gym", "env": {"kwargs": {"level": 3, "big": True}}})
    argv = ["--task", "mazes:Maze-v0", "--config", str(file)]
    assert parse(argv).env.kwargs == '{"big":true,"level":3}'


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, "it cannot be read: No such file or directory"),
        ("{", "it cannot be read: Expecting property name"),
        ([1], "it holds [1], expected an object of fields"),
        ({"config": 3}, "it holds 3, expected an object of fields"),
        ({"rssm": {"detr": 3}}, "config.rssm has no field 'detr'; did you mean 'deter'"),
        ({"rssm.deter": 3}, 'config has no field \'rssm.deter\'; expected {"rssm": {"deter": ...}}'),
        ({"rssm": {"deter": "many"}}, "config.rssm.deter cannot be 'many'; expected a whole number"),
        ({"agent_steps": 1.5}, "config.agent_steps cannot be 1.5; expected a whole number"),
        ({"agent_steps": math.inf}, "config.agent_steps cannot be inf; expected a whole number"),
        ({"train": {"ratio": -3}}, "--train.ratio -3.0 is out of range: expected 0 to"),
        ({"seed": -1}, "--seed -1 is out of range"),
        ({"train": {"ratio": "512"}}, "config.train.ratio cannot be '512'; expected a number"),
        ({"env": {"kwargs": [3]}}, "config.env.kwargs cannot be [3]; expected a string"),
        ({"logdir": 5}, "config.logdir cannot be 5; expected a string"),
        ({"init_from": 5}, "config.init_from cannot be 5; expected a string or null"),
        ({"log": {"tensorboard": 0}}, "config.log.tensorboard cannot be 0; expected true or false"),
        ({"env": 3}, "config.env cannot be 3; expected an object of fields"),
        ({"harmony": {"mode": "learnt"}}, "config.harmony.mode cannot be 'learnt'; did you mean 'learned'?"),
        ({"suite": "deno"}, "no suite 'deno'; did you mean 'demo'"),
        ({"size": "tinny"}, "no size 'tinny'; did you mean 'tiny'"),
    ],
)
def test_a_file_of_no_configuration_is_one_line(tmp_path, content, text):
    file = tmp_path / "config.json"
    if content is not None:
        written(file, content)
    with pytest.raises(ConfigError) as error:
        parse(["--config", str(file)])
    assert str(error.value).startswith(f"--config {file}: ")
    assert text in str(error.value)


def test_the_file_is_named_only_for_what_is_wrong_in_it(tmp_path):
    file = str(written(tmp_path / "config.json", {"train": {"ratio": -3}, "agent_steps": 1e5}))
    for argv, text in (
        (["--train.ratio", "-4"], "--train.ratio -4.0 is out of range"),
        (["--train.ratio", "4", "--seed", "-1"], "--seed -1 is out of range"),
    ):
        with pytest.raises(ConfigError, match=f"^{text}"):
            parse(["--config", file, *argv])
    mended = parse(["--config", file, "--train.ratio", "4"])
    assert (mended.train.ratio, mended.agent_steps, type(mended.agent_steps)) == (4, 100_000, int)


def test_a_folder_of_runs_is_told_with_the_first_of_them(tmp_path):
    for seed in (1, 0):
        (tmp_path / f"demo/Catch/seed{seed}").mkdir(parents=True)
        written(tmp_path / f"demo/Catch/seed{seed}/config.json", {})
    hint = f"try {tmp_path / 'demo/Catch/seed0'}"
    with pytest.raises(ConfigError, match=f"^--config {tmp_path}: this is not a run, it holds 2; {hint}$"):
        parse(["--config", str(tmp_path)])


@pytest.mark.parametrize("argv", [["--config"], ["--config="], ["--config", "--seed", "1"]])
def test_a_file_of_no_name_is_told(argv):
    with pytest.raises(ConfigError, match="--config needs a value"):
        parse(argv)


def test_arguments_of_an_environment_are_part_of_the_configuration_in_one_spelling(tmp_path):
    argv = ["--suite", "gym", "--task", "A-v0", "--env.time-limit", "9", "--env.image-size", "128"]
    first = parse([*argv, "--env.kwargs", '{"map": "a b", "level": 3}'])
    assert first.env.kwargs == '{"level":3,"map":"a b"}'
    assert first == parse([*argv, "--env.kwargs", '{ "level":3,"map":"a b" }'])
    file = written(tmp_path / "config.json", {"config": first.to_dict()})
    assert parse(["--config", str(file)]) == first
    assert parse(["--config", str(file), "--env.kwargs", "{}"]).env.kwargs == "{}"
    other = parse(["--config", str(file), "--suite", "dmc"])
    assert (other.env.kwargs, other.env.time_limit, other.env.image_size) == ("{}", 0, 128)
    assert parse(["--config", str(file), "--suite", "demo"]).env.image_size == 64


@pytest.mark.parametrize("suite", ["atari100k", "dmc"])
def test_the_file_in_the_readme_goes_with_every_suite(suite):
    found = parse(["--config", str(Path(__file__).parents[1] / "bench/one-core.json"), "--suite", suite])
    assert (found.suite, found.rssm.deter, found.train.ratio, found.optimizer.model_lr) == (
        suite,
        256,
        64,
        3e-4,
    )
    assert found.train.prefill == parse(["--suite", suite]).train.prefill
