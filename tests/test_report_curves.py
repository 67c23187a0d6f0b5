"""The learning curves of all runs, as CSV."""

import csv
import json
import math
import os
import shutil

import pytest

from hdfast import report, results, suites
from hdfast.runtime.logger import Logger
from tests.loop_cases import door
from tests.test_report import finish

ATARI = suites.get("atari100k")


def evaluate(path, *evaluations, action_repeat=1):
    """Logs an episode and (agent steps, columns) of each evaluation, as a run does."""
    with Logger(path, action_repeat=action_repeat, resumed_at=0, tensorboard=False, seconds=10.0) as logger:
        for agent_steps, more in evaluations:
            logger.score("episode", agent_steps=agent_steps, score=5.0, length=3)
            logger.score("evaluation", agent_steps=agent_steps, length=3.0, episodes=1, scores=[1.0], **more)


@pytest.fixture
def evaluated(tmp_path):
    """Runs of two suites, finished and not, one that was killed while it wrote, one without a line."""
    runs = tmp_path / "runs"
    for seed in (10, 2):
        path = finish(runs, "Pong", seed, 1.0, finished=seed == 2)
        evaluate(path, (100, {"score": -2.5, "standard_error": 0.5}), (20, {"score": 7.0}), action_repeat=4)
    with open(path / "scores.jsonl", "a") as file:
        file.write('{"kind": "evaluation", "agent_steps": 101, "score": 1.0}')
    (path / "finished.json").write_text("{")  # curves do not need it
    finish(runs, "Alien", 0, 0.0, finished=False)
    path = finish(runs, "my-Task-v0", 0, 1.0, suite="gym")
    about = json.loads((path / "config.json").read_text())
    about["config"]["task"] = "my/Task-v0"
    (path / "config.json").write_text(json.dumps(about))
    evaluate(path, (5, {"score": math.nan, "standard_error": 0.0, "success": 0.25}))
    return runs


def test_the_curves_are_every_evaluation_in_order(evaluated, tmp_path, monkeypatch, capfd):
    file = tmp_path / "curves.csv"
    argv = ["--logdir", str(evaluated), "--curves", str(file)]
    code, out, err = door(report.main, argv, monkeypatch, capfd)
    assert (code, out, err) == (0, f"5 evaluations of 3 runs: {file}\n", "")
    text = file.read_bytes().decode()
    assert text.startswith(
        "suite,task,seed,agent_steps,frames,seconds,episodes,score,standard_error,success\n"
    )
    assert "\r" not in text
    rows = list(csv.DictReader(text.splitlines()))
    assert all(10 <= float(row.pop("seconds")) < 70 for row in rows)
    assert [",".join(row.values()) for row in rows] == [
        "atari100k,Pong,2,20,80,1,7.0,,",
        "atari100k,Pong,2,100,400,1,-2.5,0.5,",
        "atari100k,Pong,10,20,80,1,7.0,,",
        "atari100k,Pong,10,100,400,1,-2.5,0.5,",
        "gym,my/Task-v0,0,5,5,1,NaN,0.0,0.25",
    ]
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["curves.csv"]


def test_the_curves_of_one_suite(evaluated, tmp_path, monkeypatch, capfd):
    file = tmp_path / "curves.csv"
    argv = ["--logdir", str(evaluated), "--curves", str(file)]
    code, out, err = door(report.main, [*argv, "--suite", "gym"], monkeypatch, capfd)
    assert (code, out, err) == (0, f"1 evaluation of 1 run: {file}\n", "")
    before = file.read_bytes()
    assert before.count(b"\n") == 2
    code, out, err = door(report.main, [*argv, "--suite", "dmc"], monkeypatch, capfd)
    assert (code, out) == (1, "")
    assert err.startswith(
        f"error: {evaluated}: there are no evaluations of dmc in this folder; a run evaluates"
    )
    assert err.count("\n") == 1
    for path in evaluated.glob("*/*/*/scores.jsonl"):
        path.unlink()
    code, out, err = door(report.main, argv, monkeypatch, capfd)
    assert (code, out) == (1, "")
    assert err.startswith(f"error: {evaluated}: there are no evaluations in this folder; a run evaluates")
    assert file.read_bytes() == before
    code, out, err = door(report.main, [*argv, "--json"], monkeypatch, capfd)
    assert (code, out, err) == (2, "", "error: argument --json: not allowed with argument --curves\n")


@pytest.mark.parametrize(
    "line",
    [
        "",
        "[1]",
        "\0" * 9,
        '{"agent_steps": 3}',
        '{"kind": "evaluation", "score": 1.0}',
        '{"kind": "evaluation", "agent_steps": 3}',
        '{"kind": "evaluation", "agent_steps": "3", "score": 1.0}',
        '{"kind": "evaluation", "agent_steps": 3, "score": [1.0]}',
        '{"kind": "evaluation", "agent_steps": 3, "score": 1.0, "frames": "many"}',
    ],
)
def test_a_damaged_line_is_told_and_left_out(tmp_path, capfd, line):
    path = finish(tmp_path, "Pong", 0, 1.0)
    evaluate(path, (1, {"score": 1.0}))
    with open(path / "scores.jsonl", "a") as file:
        file.write(f"{line}\n")
    assert [row["agent_steps"] for row in results.curves(tmp_path, ATARI)] == [1]
    assert capfd.readouterr().err == f"warning: {path / 'scores.jsonl'}: 1 damaged line left out\n"


def test_scores_that_cannot_be_read_hide_no_other(tmp_path, capfd):
    (finish(tmp_path, "Pong", 0, 1.0) / "scores.jsonl").mkdir()
    evaluate(finish(tmp_path, "Pong", 1, 1.0), (1, {"score": 1.0}))
    assert [row["seed"] for row in results.curves(tmp_path, ATARI)] == [1]
    path = tmp_path / "atari100k" / "Pong" / "seed0" / "scores.jsonl"
    assert capfd.readouterr().err == f"warning: {path}: cannot read the scores: Is a directory\n"


def test_a_copied_folder_adds_no_rows(evaluated, capfd):
    task = suites.get("gym"), evaluated / "gym" / "my-Task-v0"
    before = results.curves(evaluated, task[0])
    shutil.copytree(task[1], evaluated / "gym" / "backup")
    shutil.copytree(task[1] / "seed0", task[1] / "seed1")
    assert results.curves(evaluated, task[0]) == before
    assert len(before) == 1
    warned = capfd.readouterr().err.splitlines()  # of each once
    assert [line.partition(": left out: it holds gym my/")[0] for line in warned] == [
        f"warning: {evaluated / 'gym' / 'backup'}",
        f"warning: {task[1] / 'seed1'}",
    ]


def test_where_no_curves_can_be_written(evaluated, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    for name, why in (
        ("nowhere/curves.csv", "No such file or directory"),
        ("x" * 300, "File name too long"),
        (".", "it is there, and not a file"),
        (os.devnull, "it is there, and not a file"),
    ):
        argv = ["--logdir", str(evaluated), "--curves", name]
        code, out, err = door(report.main, argv, monkeypatch, capfd)
        assert (code, out, err) == (1, "", f"error: {name}: cannot write the curves: {why}\n")
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    code, out, err = door(report.main, ["--curves", ""], monkeypatch, capfd)
    assert (code, err) == (2, "error: argument --curves: it is empty; '.' is the current folder\n")


def test_a_link_to_the_curves_stays_one(tmp_path):
    (tmp_path / "link.csv").symlink_to("curves.csv")
    report.write_curves(tmp_path / "link.csv", [])
    assert (tmp_path / "link.csv").is_symlink()
    assert (tmp_path / "curves.csv").read_text() == ",".join(results.CURVES) + "\n"
