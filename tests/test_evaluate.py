"""Playing a checkpoint of a run: the command, and the agent for a notebook."""

import dataclasses
import io
import json
import re
import shutil
import sys
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch

from hdfast import evaluate, loop, session
from hdfast.envs.base import ContinuousActions
from hdfast.runtime.errors import ConfigError
from hdfast.trained import load
from hdfast_kernels import two_hot_mean
from tests import loop_cases
from tests.loop_cases import (
    door,
    one_thread,  # noqa: F401
    path_of,
    script,
    tiny,
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of Catch."""
    config = tiny(tmp_path_factory.mktemp("runs"))
    loop_cases.train(config)
    return config


class Terminal(io.StringIO):
    """An output that passes for a terminal."""

    def isatty(self):
        return True


def test_a_terminal_is_told_how_many_episodes_are_done(run, monkeypatch, capsys):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    argv = ["evaluate", str(path_of(run)), "--episodes", "12", "--num-envs", "1", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", argv)
    evaluate.main()
    assert json.loads(capsys.readouterr().out)["episodes"] == 12
    assert "0/12" in terminal.getvalue()
    assert "12/12" in terminal.getvalue()
    assert re.search(r"\x1b\[2K\n?$", terminal.getvalue())  # the line is erased at the end
    monkeypatch.setenv("TERM", "dumb")  # progress is then lines of text
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    monkeypatch.setattr(evaluate, "PLAIN_SECONDS", 0.0)
    evaluate.main()
    assert terminal.getvalue().splitlines()[-1] == "episodes=12/12"


def test_evaluate_plays_the_newest_checkpoint_and_only_reads(run, monkeypatch, capfd):
    path = path_of(run)
    before = {p: p.stat().st_mtime_ns for p in path.rglob("*")}
    with loop.RunDir.open(run.logdir, "demo", "Catch", 0, run.to_dict()):  # while it is being trained
        argv = [str(path), "--episodes", "7", "--num-envs", "3", "--device", "cpu"]
        code, out, err = door(evaluate.main, argv, monkeypatch, capfd)
    assert (code, err) == (0, "")
    assert out.count("\n") == 1
    found = json.loads(out)
    assert {p: p.stat().st_mtime_ns for p in before if p.name != "lock"} == {
        p: t for p, t in before.items() if p.name != "lock"
    }
    assert found["run"] == str(path)
    assert (found["agent_steps"], found["checkpoint"]) == (40, "0000000040.safetensors")
    scores = found["scores"]
    assert found["episodes"] == len(scores) == 7
    assert set(scores) <= {-1.0, 1.0}
    assert found["score"] == pytest.approx(np.mean(scores))
    assert found["standard_error"] == pytest.approx(np.std(scores, ddof=1) / np.sqrt(7))
    assert found["length"] == 9
    assert "success" not in found
    assert (
        evaluate.evaluate(path, episodes=7, num_envs=3, device="cpu")["scores"] == scores
    )  # a seed decides it
    others = [
        evaluate.evaluate(path, episodes=7, num_envs=3, seed=s, device="cpu")["scores"] for s in (1, 2, 3)
    ]
    assert others != [scores] * 3


def test_evaluate_plays_an_older_checkpoint_that_is_named(tmp_path, monkeypatch, capfd):
    run = tiny(tmp_path / "runs", eval={"every": 20})  # each evaluation is of a checkpoint
    loop_cases.train(run)
    older, newest = sorted(path_of(run).glob("checkpoints/*.safetensors"))
    capfd.readouterr()
    with load(older) as trained:
        assert (trained.checkpoint.path, trained.config.task) == (older, "Catch")
        assert trained.checkpoint.meta["agent_steps"] < 40
    scores = evaluate.evaluate(str(older), episodes=2, video=True)
    assert (scores["checkpoint"], scores["run"]) == (older.name, str(path_of(run)))
    assert scores["video"] == str(path_of(run) / f"videos/evaluate_{scores['agent_steps']:010d}.gif")
    monkeypatch.chdir(older.parent)
    assert evaluate.evaluate(older.name, episodes=2) == {
        **{name: value for name, value in scores.items() if name != "video"},
        "run": str(path_of(run)),
    }
    absent = older.with_name("1.safetensors")
    there = f"there are {newest.name}, {older.name}"
    damaged = tmp_path / "seed0/checkpoints" / older.name
    shutil.copytree(path_of(run), tmp_path / "seed0")
    damaged.write_bytes(older.read_bytes()[:-1])
    for path, text in (
        (absent, f"{absent}: there is no such checkpoint; {there}"),
        (damaged, f"{damaged}: checkpoint is damaged (its checksum does not match)"),
    ):
        assert door(evaluate.main, [str(path)], monkeypatch, capfd) == (3, "", f"error: {text}\n")


def test_evaluate_meets_episodes_that_training_did_not(run, tmp_path, monkeypatch):
    seeds, make = [], loop.envs.make
    monkeypatch.setattr(
        loop.envs, "make", lambda *a, seed, **k: seeds.append(seed) or make(*a, seed=seed, **k)
    )
    loop_cases.train(tiny(tmp_path, agent_steps=2, eval={"every": 2}))
    for seed in (0, 1):  # 0 is also the seed of the run
        evaluate.evaluate(path_of(run), episodes=1, seed=seed, device="cpu")
    assert len(set(seeds)) == len(seeds) == 4


def test_evaluate_acts_with_the_parameters_that_were_saved(run, monkeypatch):
    seen = []
    play = evaluate.evaluation.play
    monkeypatch.setattr(
        evaluate.evaluation,
        "play",
        lambda env, act, *args, **kw: seen.append(act) or play(env, act, *args, **kw),
    )
    evaluate.evaluate(path_of(run), episodes=1)
    (policy,) = seen
    saved = loop_cases.saved(run).tensors
    for part in ("model", "behavior"):
        for name, value in getattr(policy.learner, part).state_dict().items():
            assert torch.equal(value, saved[f"learner.{part}.{name}"]), name
    assert policy.num_envs == 1


def test_greedy_evaluation_repeats_and_is_told_only_where_asked_for(run, monkeypatch, capfd):
    path, seen, play = path_of(run), [], evaluate.evaluation.play
    monkeypatch.setattr(
        evaluate.evaluation, "play", lambda env, act, *a, **k: seen.append(act) or play(env, act, *a, **k)
    )
    argv = [str(path), "--episodes", "7", "--num-envs", "3", "--device", "cpu"]
    sampled, greedy, again = (
        json.loads(door(evaluate.main, [*argv, *more], monkeypatch, capfd)[1])
        for more in ([], ["--greedy"], ["--greedy"])
    )
    assert greedy == again == evaluate.evaluate(path, episodes=7, num_envs=3, device="cpu", greedy=True)
    assert greedy["greedy"] is True
    assert greedy.keys() - sampled.keys() == {"greedy"}
    assert [policy.greedy for policy in seen] == [False, True, True, True]


def test_numbers_out_of_range_are_one_line_in_a_notebook_too(run):
    for call, text in (
        (
            lambda path: evaluate.evaluate(path, episodes=0),
            "--episodes 0 is out of range: expected 1 or more",
        ),
        (lambda path: evaluate.evaluate(path, seed=-1), "--seed -1 is out of range: expected 0 or more"),
        (lambda path: load(path, seed=-1), "--seed -1 is out of range: expected 0 or more"),
        (lambda path: load(path, num_envs=0), "--num-envs 0 is out of range: expected 1 to 4,096"),
    ):
        with pytest.raises(ConfigError) as error:
            call(path_of(run))
        assert str(error.value) == text


def test_a_trained_agent_acts_in_a_notebook(run):
    with load(str(path_of(run)), num_envs=2, device="cpu") as trained:
        step, rows = trained.env.reset(), 0
        while not step.is_last.any():
            step = trained.env.step(trained.policy(step.obs, step.is_first))
            rows += 1
    assert (rows, trained.checkpoint.meta["agent_steps"], trained.config.task) == (9, 40, "Catch")
    assert step.reward.tolist() in ([1, 1], [1, -1], [-1, 1], [-1, -1])
    with pytest.raises(RuntimeError, match="this environment is closed"):
        trained.env.reset()


def test_a_checkpoint_of_another_model_is_one_line(run, tmp_path, monkeypatch, capfd):
    copy = tmp_path / "seed0"
    shutil.copytree(path_of(run), copy)
    text = (copy / "config.json").read_text()
    (copy / "config.json").write_text(text.replace('"deter": 16', '"deter": 24'))
    code, out, err = door(evaluate.main, [str(copy), "--device", "cpu"], monkeypatch, capfd)
    assert (code, out) == (3, "")
    first, detail = err.splitlines()
    assert first.startswith(
        f"error: {copy}/checkpoints/0000000040.safetensors: the checkpoint does not fit; is its"
    )
    assert "size mismatch for" in detail


@pytest.mark.parametrize(
    ("changed", "code", "text"),
    [
        (
            {"rssm": 3},
            1,
            "the file is damaged (config.rssm cannot be 3; expected an object of fields); restore it",
        ),
        ({"rssm": {"deter": "512"}}, 1, "the file is damaged (config.rssm.deter cannot be '512'; "),
        ({"rssm": {"unimix": [0.1]}}, 1, "the file is damaged (config.rssm.unimix cannot be [0.1]; "),
        ({"suite": 5}, 1, "the file is damaged (config.suite cannot be 5; "),
        ({"seed": True}, 1, "the file is damaged (config.seed cannot be True; "),
        ({"size": "smal"}, 1, "the file is damaged (config.size cannot be 'smal'; "),
        ({"task": None}, 1, "the file is damaged (config.task is missing)"),
        ({"task": "Pong"}, 2, "no task 'Pong' in suite demo; suite atari100k has it; did another version"),
        ({"rssm": {"deter": -1}}, 2, "--rssm.deter -1 is out of range: expected 1 to 65,536; did another"),
        ({"rssm": {"layers": 2}}, 2, "config.rssm has no field 'layers'; choose from"),
    ],
)
def test_a_config_that_cannot_be_is_one_line(run, tmp_path, monkeypatch, capfd, changed, code, text):
    copy = tmp_path / "seed0"
    shutil.copytree(path_of(run), copy)
    about = json.loads((copy / "config.json").read_text())
    for key, value in changed.items():
        about["config"][key] = {**about["config"][key], **value} if isinstance(value, dict) else value
    (copy / "config.json").write_text(json.dumps(about))
    got, out, err = door(evaluate.main, [str(copy), "--device", "cpu"], monkeypatch, capfd)
    assert (got, out) == (code, "")
    assert err.startswith(f"error: {copy}/config.json: {text}")
    assert err.count("\n") == 1


def test_a_run_of_an_older_version_is_played_and_gone_on_with(run, tmp_path, capfd):
    """Its config.json lacks fields that were added since, whose defaults are what it did."""
    copy = tmp_path / "demo" / "Catch" / "seed0"
    shutil.copytree(path_of(run), copy)
    (copy / "finished.json").unlink()
    about = json.loads((copy / "config.json").read_text())
    for name in ("train.graph", "rssm.unimix", "loss"):
        section, _, field = name.partition(".")
        about["config"][section].pop(field) if field else about["config"].pop(section)
    (copy / "config.json").write_text(json.dumps(about))
    with load(copy, device="cpu") as trained:
        assert dataclasses.replace(trained.config, logdir=run.logdir) == run
    capfd.readouterr()
    loop_cases.train(tiny(tmp_path))
    assert "going on at agent step 40" in capfd.readouterr().out
    after = json.loads((copy / "config.json").read_text())
    assert after["config"] == about["config"]
    assert [line.partition(":")[0] for line in after["resumed"][-1]["changed"]] == ["logdir"]
    with pytest.raises(ConfigError, match="another config") as error:
        loop_cases.train(tiny(tmp_path, rssm={"unimix": 0.02}))
    assert error.value.details == ("rssm.unimix: 0.01 -> 0.02",)


def test_evaluate_knows_success_and_wants_images_for_a_video(tmp_path, monkeypatch):
    script(monkeypatch, actions=ContinuousActions(2), state=True)
    monkeypatch.setattr("hdfast.trained.make_envs", session.make_envs)
    config = tiny(tmp_path, agent_steps=12)
    loop_cases.train(config)
    assert evaluate.evaluate(path_of(config), episodes=4)["success"] == 1.0
    with pytest.raises(ConfigError, match="--video: this task shows no images"):
        evaluate.evaluate(path_of(config), episodes=1, video=True)


def test_a_notebook_may_write_the_home_directory_as_a_tilde(run, monkeypatch):
    monkeypatch.setenv("HOME", str(run.logdir.parent))
    at = Path("~") / path_of(run).relative_to(run.logdir.parent)
    with load(str(at)) as trained:
        assert trained.checkpoint.meta["agent_steps"] == 40
    assert evaluate.evaluate(at, episodes=1)["run"] == str(path_of(run))


def test_evaluate_tells_what_is_wrong_in_one_line(run, tmp_path, monkeypatch, capfd):
    with loop.RunDir.open(tmp_path, "demo", "Catch", 0, run.to_dict()) as new:
        pass
    for argv, code, text in (
        ([str(tmp_path / "no")], 1, f"{tmp_path / 'no'}: there is no run here (no config.json)"),
        ([str(tmp_path)], 2, f"{tmp_path}: this is not a run, it holds 1; try {new.path}"),
        (
            [str(new.path / "checkpoints")],
            1,
            f"{new.path / 'checkpoints'}: there is no run here (no config.json); try {new.path}",
        ),
        (
            [str(new.path)],
            3,
            f"{new.path}: there is no checkpoint yet; the first is written after --checkpoint.seconds of training",
        ),
        ([], 2, "the following arguments are required: run"),
        (["x" * 300], 1, f"{'x' * 300}: cannot read the run: File name too long"),
        ([""], 2, "argument run: it is empty; '.' is the current folder"),
        (["~/no"], 1, f"{Path.home() / 'no'}: there is no run here (no config.json)"),
        (
            ["~nobody-of-this-name/no"],
            2,
            "argument run: ~nobody-of-this-name/no: there is no such home directory",
        ),
        (
            [str(path_of(run)), "--episodes", "0"],
            2,
            "argument --episodes: 0 is out of range: expected 1 or more",
        ),
        (
            [str(path_of(run)), "--episodes", "99999", "--num-envs", "9999"],
            2,
            "--num-envs 9999 is out of range: expected 1 to 4,096",
        ),
        ([str(path_of(run)), "--seed", "x"], 2, "argument --seed: 'x' is not a whole number"),
        (
            [str(path_of(run)), "--episods", "3"],
            2,
            "there is no option --episods; did you mean '--episodes'?",
        ),
        ([str(path_of(run)), "more"], 2, "there is no argument more; a value comes after its --flag"),
        ([str(path_of(run)), "--video=yes"], 2, "--video is a switch and takes no value, such as 'yes'"),
        ([str(path_of(run)), "--device", "gpu"], 2, "--device: no device 'gpu'; did you mean 'cpu'?"),
    ):
        got, out, err = door(evaluate.main, argv, monkeypatch, capfd)
        assert (got, out, err) == (code, "", f"error: {text}\n")


@pytest.mark.parametrize(
    ("name", "obs"),
    [
        ("Arm", "auto"),
        ("From5", "auto"),
        ("Multi", "auto"),
        ("Goals", "both"),
        ("Drawn", "image"),
        ("Drawn", "both"),
        ("Catch", "image"),
    ],
)
def test_it_acts_in_an_environment_of_ones_own_as_in_its_own(name, obs, tmp_path):
    """With observations and actions in the environment's own form, the episode is the same."""
    drawn, ours = name == "Drawn", name != "Catch"
    task = {"suite": "gym", "task": f"tests.gym_envs:{name}-v0"} if ours else {}
    config = tiny(tmp_path, agent_steps=4, env={"obs": obs}, **task)
    loop_cases.train(config)
    folder = path_of(config) if not ours else next(tmp_path.glob("gym/*/seed0"))
    with load(folder, seed=3, device="cpu") as trained:
        step, theirs, rows = trained.env.reset(), [], []
        while not step.is_last.any():
            rows.append({key: value[0] for key, value in step.obs.items()})
            action = trained.policy(step.obs, step.is_first)
            theirs.append(trained.env.own_action(action))
            step = trained.env.step(action)
    with load(folder, seed=3, device="cpu") as trained:
        if not ours:  # a single observation: alone, or by its name
            assert [trained.act(rows[0]["image"]), *map(trained.act, rows[1:])] == theirs
            return
        env = gymnasium.make(config.task, **({"render_mode": "rgb_array"} if drawn else {}))
        observation, _ = env.reset()

        def seen():
            if not drawn:
                return observation
            return env.render() if obs == "image" else {"image": env.render(), "state": observation}

        for i, expected in enumerate(theirs):
            action = trained.act(seen(), is_first=i == 0)
            assert env.action_space.contains(action)
            assert np.array_equal(action, expected)
            observation, *_ = env.step(action)
        assert trained.act(seen(), is_first=True) is not None


def test_what_it_cannot_act_on_is_told(run):
    with load(path_of(run), device="cpu") as trained:
        with pytest.raises(ValueError, match="Catch: the observation has no 'image', but pixels"):
            trained.act({"pixels": np.zeros((16, 16, 3), np.uint8)})
        with pytest.raises(
            ValueError, match=r"Catch: observation 'image' has shape \(8, 8, 3\), expected \(16, 16, 3\)"
        ):
            trained.act(np.zeros((8, 8, 3), np.uint8))
    several = load(path_of(run), num_envs=2, device="cpu")
    with several, pytest.raises(ValueError, match=r"act\(\) is for one environment, this was loaded for 2"):
        several.act(np.zeros((16, 16, 3), np.uint8))


def test_what_the_readme_looks_at_in_a_notebook(run):
    text = (Path(__file__).parents[1] / "README.md").read_text()
    (code,) = re.findall(r"what the agent believes.*?```python\n(.*?)```", text, re.DOTALL)
    with load(path_of(run), num_envs=3) as trained:
        step = trained.env.reset()
        trained.policy(step.obs, step.is_first)
        seen = {"torch": torch, "trained": trained}
        exec(code, seen)
        model = trained.policy.learner.model
    assert seen["image"].shape == (3, 16, 16, 3)
    assert seen["reward"].shape == seen["value"].shape == (3,)
    assert not torch.equal(seen["reward"], seen["value"])
    logits = model.reward_logits(seen["latent"], torch.float32)
    assert torch.equal(seen["reward"], two_hot_mean(logits))
