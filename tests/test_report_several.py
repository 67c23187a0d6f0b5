"""Several folders of runs side by side: one table shows what harmony gains."""

import csv
import json
import shutil
from pathlib import Path

import pytest

from hdfast import report, results
from hdfast.config import default_config
from tests.loop_cases import door
from tests.test_report import cells, configured, finish
from tests.test_report_curves import evaluate


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """`runs` and `runs-off`, named as from the folder that holds them; both have finished Pong and Boxing."""
    monkeypatch.chdir(tmp_path)
    runs, off = Path("runs"), Path("runs-off")
    for seed, score in enumerate((-20.7, 14.6)):  # normalised 0 and 1
        finish(runs, "Pong", seed, score)
    finish(off, "Pong", 0, 7.0, finished=False)
    finish(off, "Pong", 1, 50.0)  # normalised 2.003
    finish(runs, "Boxing", 0, 24.1)  # 2
    finish(off, "Boxing", 0, 0.1)  # 0
    finish(runs, "Alien", 0, 7127.7)  # 1, and none without harmony
    return ["--logdir", "runs", "runs-off"]


def said(out, start):
    return " ".join(cells(out, start))


def test_folders_stand_side_by_side(folders, monkeypatch, capfd):
    code, out, err = door(report.main, folders, monkeypatch, capfd)
    assert (code, err) == (0, "")
    assert out.startswith("atari100k: score of the final evaluation, mean over seeds ± standard error\n")
    assert said(out, "task") == "task seeds runs runs-off"
    assert said(out, "Pong") == "Pong 2 / 1 -3.05 ± 17.65 50.0"
    assert said(out, "Boxing") == "Boxing 1 24.1 0.10"
    assert said(out, "Alien") == "Alien 1 / 0 7,128 -"
    assert "Qbert" not in out  # no folder has finished it
    # Over Pong and Boxing, in both folders: 0.5 and 2 against 2.003 and 0.
    assert said(out, "human-norm. mean") == "human-norm. mean 2 1.250 1.001"
    assert said(out, "human-norm. median") == "human-norm. median 2 1.250 1.001"
    assert said(out, "human-norm. iqm") == "human-norm. iqm 2 1.000 1.001"
    again = door(report.main, ["--logdir", "runs", "--logdir", "runs-off"], monkeypatch, capfd)
    assert again == (code, out, err)  # giving the flag twice changes nothing
    _, out, _ = door(report.main, ["--logdir", "runs-off", "runs"], monkeypatch, capfd)
    assert said(out, "Pong") == "Pong 1 / 2 50.0 -3.05 ± 17.65"


def test_each_folder_has_its_interval(folders, monkeypatch, capfd):
    for seed, score in ((0, 14.6), (1, 49.9)):  # normalised 1 and 2
        finish(Path("runs-more"), "Pong", seed, score)
    argv = ["--suite", "atari100k", "--logdir", "runs", "runs-more"]
    code, out, err = door(report.main, argv, monkeypatch, capfd)
    assert (code, err) == (0, "")
    assert out.splitlines()[0].endswith("mean over seeds ± standard error; [95% bootstrap interval]")
    # Of Pong alone, which is in both: Boxing and Alien, with one seed each, would leave no interval.
    assert said(out, "human-norm. mean") == "human-norm. mean 1 0.500 [0.00, 1.00] 1.500 [1.00, 2.00]"


def test_a_folder_that_has_finished_nothing_leaves_the_others_aggregates(folders, monkeypatch, capfd):
    finish(Path("new"), "Pong", 0, 0.0, finished=False)
    code, out, _ = door(report.main, [*folders, "new"], monkeypatch, capfd)
    assert code == 0
    assert said(out, "Pong") == "Pong 2 / 1 / 0 -3.05 ± 17.65 50.0 -"
    assert said(out, "human-norm. mean") == "human-norm. mean 2 1.250 1.001 -"
    finish(Path("other"), "Qbert", 0, 163.9)  # which leaves no task in all folders
    code, out, _ = door(report.main, [*folders, "other"], monkeypatch, capfd)
    assert (code, said(out, "Qbert")) == (0, "Qbert 0 / 0 / 1 - - 163.9")
    assert "human-norm." not in out
    finish(Path("newer"), "Pong", 0, 0.0, finished=False)
    code, out, err = door(report.main, ["--logdir", "new", "newer"], monkeypatch, capfd)
    assert (code, err) == (0, "")
    assert out == "atari100k: score of the final evaluation, mean over seeds\nno run is finished yet\n\n"


def test_what_the_folders_compute_otherwise_is_told_below_the_table(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    configured(Path("runs"), 0)
    configured(Path("again"), 1, logdir="again", device="cuda")
    configured(Path("off"), 0, harmony={"mode": "off"}, agent_steps=7)
    configured(Path("off"), 1, finished=False, agent_steps=9)  # the first run stands for all
    code, out, err = door(report.main, ["--logdir", "runs", "again", "off"], monkeypatch, capfd)
    assert (code, err) == (0, "")
    steps = default_config("demo").agent_steps
    assert (
        out.splitlines()[-1]
        == f'off against runs: agent_steps: {steps} -> 7, harmony.mode: "learned" -> "off"'
    )
    assert "again against" not in out
    (Path("off") / "demo" / "Another").mkdir()
    shutil.copytree(configured(Path("old"), 1, agent_steps=9), Path("off") / "demo" / "Another" / "seed1")
    code, again, err = door(report.main, ["--logdir", "runs", "again", "off"], monkeypatch, capfd)
    assert (code, again, err.count("\n")) == (0, out, 1)  # nor is a run that does not belong there


def test_suites_and_tasks_of_one_folder_alone(folders, monkeypatch, capfd):
    finish(Path("runs"), "Catch", 0, 0.96, suite="demo")
    finish(Path("runs-off"), "lever-pull", 0, 100.0, suite="metaworld", success=0.5)
    finish(Path("runs-off"), "mine-v0", 0, 3.0, suite="gym")
    code, out, err = door(report.main, folders, monkeypatch, capfd)
    assert (code, err) == (0, "")
    shown = [line.partition(":")[0] for line in out.splitlines() if ": score" in line]
    assert shown == ["atari100k", "demo", "gym", "metaworld"]
    assert said(out, "Catch") == "Catch 1 / 0 0.96 -"
    assert said(out, "mine-v0") == "mine-v0 0 / 1 - 3.00"
    assert "runs, success" in out
    assert said(out, "lever-pull") == "lever-pull 0 / 1 - 100.0 - 50%"
    code, out, _ = door(report.main, [*folders, "--suite", "atari100k"], monkeypatch, capfd)
    assert (code, "Catch" in out, said(out, "Boxing")) == (0, False, "Boxing 1 24.1 0.10")


def test_a_name_in_brackets_is_shown_as_it_is(folders, monkeypatch, capfd):
    Path("runs-off").rename("[red]off")
    code, out, _ = door(report.main, ["--logdir", "runs", "[red]off"], monkeypatch, capfd)
    assert (code, said(out, "task")) == (0, "task seeds runs [red]off")


def test_json_has_an_object_for_each_folder(folders, monkeypatch, capfd):
    code, out, err = door(report.main, [*folders, "--json"], monkeypatch, capfd)
    assert (code, err) == (0, "")
    about = json.loads(out)
    assert [folder["logdir"] for folder in about] == ["runs", "runs-off"]
    for folder in about:
        _, alone, _ = door(report.main, ["--logdir", folder["logdir"], "--json"], monkeypatch, capfd)
        assert folder["suites"] == json.loads(alone)
    assert about[0]["suites"][0]["tasks"]["Pong"] == {"0": -20.7, "1": 14.6}
    assert about[1]["suites"][0]["tasks"]["Pong"] == {"1": 50.0}


def test_curves_name_the_folder_first(folders, monkeypatch, capfd):
    for folder, score in (("runs", 1.0), ("runs-off", 2.0)):
        for seed in (1, 0):
            evaluate(Path(folder) / "atari100k" / "Pong" / f"seed{seed}", (5, {"score": score + seed}))
    file = Path("curves.csv")
    argv = ["--logdir", "runs-off", "--logdir", "runs", "--curves", str(file)]
    code, out, err = door(report.main, argv, monkeypatch, capfd)
    assert (code, out, err) == (0, "4 evaluations of 4 runs: curves.csv\n", "")
    rows = list(csv.DictReader(file.read_text().splitlines()))
    assert list(rows[0]) == ["logdir", *results.CURVES]
    assert [(row["logdir"], row["seed"], row["score"]) for row in rows] == [
        ("runs-off", "0", "2.0"),
        ("runs-off", "1", "3.0"),
        ("runs", "0", "1.0"),
        ("runs", "1", "2.0"),
    ]
    code, _, _ = door(report.main, ["--logdir", "runs", "--curves", str(file)], monkeypatch, capfd)
    assert (code, file.read_text().splitlines()[0]) == (0, ",".join(results.CURVES))
    finish(Path("a"), "Catch", 0, 1.0, suite="demo")
    finish(Path("b"), "Catch", 0, 1.0, suite="demo")
    code, out, err = door(report.main, ["--logdir", "a", "b", "--curves", "x.csv"], monkeypatch, capfd)
    assert (code, out) == (1, "")
    assert err.startswith("error: a, b: there are no evaluations in these folders; a run evaluates every")
    assert not Path("x.csv").exists()


def test_a_folder_without_runs_is_told(folders, monkeypatch, capfd):
    for name in ("empty", "void"):
        Path(name).mkdir()
    code, out, err = door(report.main, [*folders, "empty"], monkeypatch, capfd)
    assert (code, err) == (0, "warning: empty: there are no runs in this folder\n")
    assert said(out, "task") == "task seeds runs runs-off"
    code, out, err = door(report.main, ["--logdir", "empty", "runs", "--json"], monkeypatch, capfd)
    assert (code, err) == (0, "warning: empty: there are no runs in this folder\n")
    assert [folder["logdir"] for folder in json.loads(out)] == ["runs"]
    code, out, err = door(report.main, ["--logdir", "empty", "void"], monkeypatch, capfd)
    assert (code, out) == (1, "")
    assert err.startswith("error: empty, void: there are no runs in these folders; a run is <logdir>/<suite>")
    assert err.count("\n") == 1
    finish(Path("void"), "Catch", 0, 1.0, suite="demo")
    code, out, err = door(report.main, [*folders, "void", "--suite", "demo"], monkeypatch, capfd)
    assert code == 0
    assert err.splitlines() == [
        "warning: runs: there are no runs of demo in this folder",
        "warning: runs-off: there are no runs of demo in this folder",
    ]
    assert said(out, "task") == "task seeds void"
    code, out, err = door(report.main, [*folders, "--suite", "dmc"], monkeypatch, capfd)
    assert (code, out) == (1, "")
    assert err.startswith("error: runs, runs-off: there are no runs of dmc in these folders; a run is")


def test_wrong_folders(folders, monkeypatch, capfd):
    code, out, err = door(report.main, [*folders, "rnus"], monkeypatch, capfd)
    assert (code, out, err) == (2, "", "error: --logdir: there is no folder rnus\n")
    Path("link").symlink_to("runs")
    for name in ("runs/", "link"):
        code, out, err = door(report.main, [*folders, name], monkeypatch, capfd)
        told = f"error: --logdir: runs and {Path(name)} are the same folder\n"
        assert (code, out, err) == (2, "", told)
    code, out, err = door(report.main, ["--logdir"], monkeypatch, capfd)
    assert (code, out, err) == (2, "", "error: argument --logdir: expected at least one argument\n")


def test_a_warning_of_seeds_that_differ_names_the_folder(folders, monkeypatch, capfd):
    configured(Path("runs"), 0)
    configured(Path("runs"), 1, agent_steps=7)
    code, _, err = door(report.main, folders, monkeypatch, capfd)
    assert (code, err) == (0, "warning: runs: demo Catch: its seeds differ in agent_steps\n")


def test_without_the_flag_it_is_runs(folders, monkeypatch, capfd):
    named = door(report.main, ["--logdir", "runs"], monkeypatch, capfd)
    assert door(report.main, [], monkeypatch, capfd) == named
    assert named[0] == 0
    assert said(named[1], "Pong") == "Pong 2 -3.05 ± 17.65 0.500 ± 0.500 18.6 16.1"
    assert said(named[1], "Qbert") == "Qbert 0 - - 3,933 2,872"


def test_folders_of_long_names_stand_below_each_other(tmp_path, monkeypatch, capfd):
    """Beside each other the names of a sweep's variants would be cut."""
    monkeypatch.chdir(tmp_path)
    folders = [f"harmony.mode=learned,behavior.horizon={h}" for h in (5, 10, 15)]
    for k, folder in enumerate(folders):
        finish(Path("study", folder), "walker_walk", 0, 100.0 * k, suite="dmc")
        finish(Path("study", folder), "hopper_hop", 0, 200.0 * k, suite="dmc")
    code, out, err = door(report.main, ["--logdir", "study"], monkeypatch, capfd)
    assert (code, err) == (0, "")
    rows = [line.split() for line in out.splitlines()]
    assert ["task", "folder", "seeds", "score"] in rows
    for task, scale in (("hopper_hop", 200.0), ("walker_walk", 100.0)):
        at = next(i for i, words in enumerate(rows) if words[:1] == [task])
        assert rows[at][1:] == [folders[0], "1", "0.00"]
        assert rows[at + 1] == [folders[1], "1", f"{scale:.1f}"]
        assert rows[at + 2] == [folders[2], "1", f"{2 * scale:.1f}"]
        assert rows[at + 3] == []  # between tasks
    at = next(i for i, words in enumerate(rows) if words[:2] == ["score", "mean"])
    assert rows[at + 2] == [folders[2], "2", "300.0"]


def test_a_success_rate_takes_the_room_of_a_folder_and_a_long_name_is_never_cut(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    for length, below in ((20, False), (30, True), (150, True)):
        folders = [letter * length for letter in "xz"]
        for folder in folders:
            finish(Path(folder), "reach", 0, 1.0, suite="metaworld", success=0.5)
        code, out, err = door(report.main, ["--logdir", *folders], monkeypatch, capfd)
        assert (code, err) == (0, "")
        assert ("folder" in out.split()) == below
        assert [out.count(letter) >= length for letter in "xz"] == [True, True]  # on several lines
