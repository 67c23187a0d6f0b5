"""The table of a suite: scores from disk, human-normalised scores, published scores and aggregates."""

import json
import math
import shutil

import pytest
from rich.console import Console

from hdfast import report, results, suites, tables
from hdfast.config import default_config
from hdfast.overrides import apply_overrides
from hdfast.runtime.rundir import RunDir
from tests.loop_cases import door

ATARI = suites.get("atari100k")


def finish(logdir, task, seed, score, *, suite="atari100k", finished=True, **more):
    """Makes a run's directory with this final score, and more in its summary."""
    with RunDir.open(logdir, suite, task, seed, {"seed": seed, "task": task}) as run:
        if finished:
            run.mark_finished({"score": score, "episodes": 100, **more})
    return run.path


def text_of(suite, rows, width=120):
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(tables.table(suite, rows))
    return console.export_text()


def cells(text, start):
    return next(line for line in text.splitlines() if line.strip().startswith(start)).split()


def test_scores_of_finished_runs_alone(tmp_path, capfd):
    finish(tmp_path, "Pong", 0, 14.0)
    finish(tmp_path, "Pong", 3, 18.0)
    finish(tmp_path, "Pong", 4, 0.0, finished=False)
    finish(tmp_path, "Boxing", 0, float("nan"))
    (tmp_path / "atari100k" / "Alien" / "seed0").mkdir(parents=True)  # not a run yet
    finish(tmp_path, "Pong", 5, 7.0).rename(tmp_path / "atari100k" / "Pong" / "seed5-old")
    rows = {row.task.name: row for row in results.collect(tmp_path, ATARI)}
    assert list(rows) == [task.name for task in ATARI.tasks]
    assert rows["Pong"].scores == {0: 14.0, 3: 18.0}
    assert rows["Pong"].mean == 16.0
    assert math.isnan(rows["Boxing"].mean)
    assert rows["Alien"].scores == rows["Qbert"].scores == {}
    assert math.isnan(rows["Alien"].mean)
    one = results.collect(tmp_path, ATARI, [ATARI.task("Pong")])
    assert [row.task.name for row in one] == ["Pong"]
    assert capfd.readouterr().err == ""


def test_the_table_is_worked_out_by_hand(tmp_path):
    """Pong: random -20.7, human 14.6. Boxing: 0.1, 12.1. Alien: 227.8, 7127.7 (Wang et al. 2016)."""
    for seed, score in enumerate((-20.7, 14.6)):  # normalised 0 and 1
        finish(tmp_path, "Pong", seed, score)
    finish(tmp_path, "Boxing", 0, 24.1)  # 2
    finish(tmp_path, "Alien", 0, 1607.78)  # 0.2
    text = text_of(ATARI, results.collect(tmp_path, ATARI))
    header = cells(text, "task")
    assert header == ["task", "seeds", "score", "human-norm.", "HarmonyDream", "DreamerV3,", "rerun"]
    # The published columns are means over five seeds: of 19.1 19.8 19.6 17.2 17.5, and of 11.4 19.6 14.3 15.1 20.
    assert " ".join(cells(text, "Pong")) == "Pong 2 -3.05 ± 17.65 0.500 ± 0.500 18.6 16.1"
    assert cells(text, "Boxing") == ["Boxing", "1", "24.1", "2.000", "79.6", "78.3"]
    assert cells(text, "Alien") == ["Alien", "1", "1,608", "0.200", "889.7", "785.7"]
    assert cells(text, "Qbert") == ["Qbert", "0", "-", "-", "3,933", "2,872"]
    # Ours: task means 0.5, 2, 0.2. Runs in order 0, 0.2, 1, 2: without the outer quarters 0.2 and 1.
    mean, median, iqm = (cells(text, f"human-norm. {name}") for name in ("mean", "median", "iqm"))
    assert mean[:4] == ["human-norm.", "mean", "3", "0.900"]
    assert median[:4] == ["human-norm.", "median", "3", "0.500"]
    assert iqm[:4] == ["human-norm.", "iqm", "3", "0.600"]
    # The published aggregates are over the same three games: 1.1147, 6.6267 and 0.0959 for HarmonyDream's means.
    harmony = [(18.64 + 20.7) / 35.3, (79.62 - 0.1) / 12, (889.7 - 227.8) / 6899.9]
    assert float(mean[4]) == pytest.approx(sum(harmony) / 3, abs=6e-4)
    assert float(median[4]) == pytest.approx(harmony[0], abs=6e-4)


def test_the_spread_over_seeds_stands_beside_the_means(tmp_path, monkeypatch, capfd):
    """The standard error of 12, 14, 19 is sqrt((9 + 1 + 16) / 2 / 3) = 2.08; human - random is 35.3 and 12."""
    argv = ["--logdir", str(tmp_path), "--suite", "atari100k"]
    for seed, score in enumerate((12.0, 14.0, 19.0)):
        finish(tmp_path, "Pong", seed, score)
    for seed, score in enumerate((0.1, 24.1)):  # normalised 0 and 2
        finish(tmp_path, "Boxing", seed, score)
    code, out, err = door(report.main, argv, monkeypatch, capfd)
    assert (code, err) == (0, "")
    title = (
        "atari100k: score of the final evaluation, mean over seeds ± standard error; [95% bootstrap interval]"
    )
    assert out.splitlines()[0] == title
    assert max(map(len, out.splitlines())) <= 120
    assert " ".join(cells(out, "Pong")) == "Pong 3 15.0 ± 2.1 1.011 ± 0.059 18.6 16.1"
    assert " ".join(cells(out, "Boxing")) == "Boxing 2 12.1 ± 12.0 1.000 ± 1.000 79.6 78.3"
    # Boxing draws 0 0, 0 2 or 2 2; Pong's mean goes from 0.926 to 1.125, most often in between.
    mean = cells(out, "human-norm. mean")
    assert mean[:4] == ["human-norm.", "mean", "2", "1.006"]
    low, high = float(mean[4].strip("[,")), float(mean[5].strip("]"))
    assert 0.926 / 2 <= low < 0.53
    assert 1.49 < high <= 2.125 / 2 + 0.5
    _, out, _ = door(report.main, [*argv, "--json"], monkeypatch, capfd)
    about = json.loads(out)
    pong = about["standard_error"].pop("Pong")
    assert pong == pytest.approx({"score": 2.081666, "human_normalized": 2.081666 / 35.3})
    assert about["standard_error"] == {"Boxing": pytest.approx({"score": 12.0, "human_normalized": 1.0})}
    assert list(about["interval"]) == list(about["aggregate"])[1:] == ["mean", "median", "iqm"]
    assert [f"{end:.2f}" for end in about["interval"]["mean"]] == [mean[4].strip("[,"), mean[5].strip("]")]
    finish(tmp_path, "Alien", 0, 227.8)  # a task with a single run
    code, out, err = door(report.main, argv, monkeypatch, capfd)
    assert (code, err, "[" in out) == (0, "", False)
    assert out.startswith("atari100k: score of the final evaluation, mean over seeds ± standard error\n")
    assert cells(out, "Pong")[2:5] == ["15.0", "±", "2.1"]
    assert cells(out, "Alien")[2:4] == ["227.8", "0.000"]
    _, out, _ = door(report.main, [*argv, "--json"], monkeypatch, capfd)
    assert json.loads(out)["interval"] is None
    assert "Alien" not in json.loads(out)["standard_error"]


@pytest.mark.parametrize(
    ("scores", "text"),
    [
        ((0.96, 0.98), "0.97 ± 0.01"),
        ((999.0, 1002.0), "1,000 ± 2"),
        ((1000.0,), "1,000"),
        ((10.0,), "10.0"),
        ((0.014,), "0.014"),
        ((1e13, 3e13), "2e+13 ± 1e+13"),
        ((5.0, 5.0, 5.0), "5.00 ± 0.00"),
        ((1.0, math.inf), "inf"),
        ((1.0, math.nan), "-"),
        ((-1e308, 1e308), "0.00 ± inf"),
        ((-0.001, 0.0), "-0.0005 ± 0.0005"),
        ((0.0011,), "0.0011"),
        ((0.0, 0.0), "0.00 ± 0.00"),
        ((0.1, 0.1, 0.1), "0.10 ± 0.00"),
    ],
)
def test_how_a_score_and_its_error_are_written(tmp_path, scores, text):
    demo = suites.get("demo")
    for seed, score in enumerate(scores):
        finish(tmp_path, "Catch", seed, score, suite="demo")
    shown = cells(text_of(demo, results.collect(tmp_path, demo)), "Catch")
    assert shown == ["Catch", str(len(scores)), *text.split()]


def test_nothing_trained_yet(tmp_path):
    text = text_of(ATARI, results.collect(tmp_path, ATARI))
    assert cells(text, "Pong") == ["Pong", "0", "-", "-", "18.6", "16.1"]
    assert "human-norm. mean" not in text
    about = tables.as_dict(ATARI, results.collect(tmp_path, ATARI))
    assert (about["standard_error"], about["aggregate"], about["interval"]) == (None, None, None)


def test_what_was_trained_beside_the_tasks_of_the_suite_is_shown(tmp_path):
    dmc = suites.get("dmc")
    finish(tmp_path, "point_mass_easy", 0, 7.0, suite="dmc")
    finish(tmp_path, "walker_walk", 0, 900.0, suite="dmc")
    rows = results.collect(tmp_path, dmc)
    assert [row.task.name for row in rows] == [*(task.name for task in dmc.tasks), "point_mass_easy"]
    assert rows[-1].scores == {0: 7.0}


def test_a_suite_without_humans(tmp_path):
    demo = suites.get("demo")
    finish(tmp_path, "Catch", 0, 0.96, suite="demo")
    text = text_of(demo, results.collect(tmp_path, demo))
    assert cells(text, "task") == ["task", "seeds", "score"]
    assert cells(text, "Catch") == ["Catch", "1", "0.96"]
    assert "human" not in text


def test_success_rates_stand_beside_the_scores(tmp_path):
    """The published results of Meta-World are shares of solved episodes."""
    metaworld = suites.get("metaworld")
    for seed, success in enumerate((0.5, 1.0)):
        finish(tmp_path, "lever-pull", seed, 100.0 * seed, suite="metaworld", success=success)
    rows = results.collect(tmp_path, metaworld)
    text = text_of(metaworld, rows)
    assert cells(text, "task") == ["task", "seeds", "score", "success"]
    assert " ".join(cells(text, "lever-pull")) == "lever-pull 2 50.0 ± 50.0 75% ± 25%"
    assert cells(text, "reach") == ["reach", "0", "-", "-"]
    about = tables.as_dict(metaworld, rows)
    assert about["success"] == {"lever-pull": {"0": 0.5, "1": 1.0}}
    assert about["standard_error"] == {"lever-pull": {"score": 50.0, "success": 0.25}}
    assert tables.as_dict(ATARI, results.collect(tmp_path, ATARI))["success"] is None


def test_the_door(tmp_path, monkeypatch, capfd):
    finish(tmp_path, "Pong", 1, 14.6)
    code, out, err = door(report.main, ["--logdir", str(tmp_path)], monkeypatch, capfd)
    assert (code, err) == (0, "")
    assert out.startswith("atari100k: score of the final evaluation, mean over seeds\n")
    assert cells(out, "Pong")[:4] == ["Pong", "1", "14.6", "1.000"]
    code, out, _ = door(report.main, ["--logdir", str(tmp_path), "--json"], monkeypatch, capfd)
    assert code == 0
    (about,) = json.loads(out)
    assert about["tasks"]["Pong"] == {"1": 14.6}
    assert about["aggregate"] == {"of": "human-norm.", "mean": 1.0, "median": 1.0, "iqm": 1.0}
    code, out, err = door(report.main, ["--suite", "atari"], monkeypatch, capfd)
    assert (code, out) == (2, "")
    assert err == "error: no suite 'atari'; did you mean 'atari100k'?\n"
    missing = tmp_path / "rnus"
    code, out, err = door(report.main, ["--logdir", str(missing)], monkeypatch, capfd)
    assert (code, out, err) == (2, "", f"error: --logdir: there is no folder {missing}\n")
    code, out, err = door(report.main, ["--logdir", "x" * 300], monkeypatch, capfd)
    assert (code, out) == (1, "")
    assert err == f"error: {'x' * 300}: cannot read the folder: File name too long\n"
    code, out, err = door(report.main, ["--logdir", ""], monkeypatch, capfd)
    assert (code, out) == (2, "")
    assert err == "error: argument --logdir: it is empty; '.' is the current folder\n"
    code, out, err = door(report.main, ["--jsn"], monkeypatch, capfd)
    assert (code, out, err) == (2, "", "error: there is no option --jsn; did you mean '--json'?\n")
    for given, hint in (
        (str(tmp_path), f"did you mean --logdir {tmp_path}?"),
        (str(missing), "a value comes after its --flag"),
        ("x" * 300, "a value comes after its --flag"),
    ):
        code, out, err = door(report.main, [given], monkeypatch, capfd)
        assert (code, out, err) == (2, "", f"error: there is no argument {given}; {hint}\n")


def test_without_a_suite_every_suite_that_has_runs_is_shown(tmp_path, monkeypatch, capfd):
    argv = ["--logdir", str(tmp_path)]
    (tmp_path / "demo" / "Catch" / "seed7").mkdir(parents=True)  # not a run yet
    code, out, err = door(report.main, argv, monkeypatch, capfd)
    assert (code, out) == (1, "")
    assert err.startswith(f"error: {tmp_path}: there are no runs in this folder; a run is <logdir>/<suite>/")
    assert err.count("\n") == 1
    run = finish(tmp_path, "Catch", 0, 0.96, suite="demo")
    for inside in (run, run.parent, run.parent.parent):
        err = door(report.main, ["--logdir", str(inside)], monkeypatch, capfd)[2]
        assert err.startswith(
            f"error: {inside}: there are no runs in this folder; --logdir {tmp_path} is the"
        )
    for folder, inside, shown in ((run, ".", tmp_path), (tmp_path, "demo", ".")):
        monkeypatch.chdir(folder)
        err = door(report.main, ["--logdir", inside], monkeypatch, capfd)[2]
        assert err.endswith(f"; --logdir {shown} is the folder that holds {inside}\n")
    finish(tmp_path, "Catch", 1, math.nan, suite="demo")
    finish(tmp_path, "walker_walk", 0, 900.0, suite="dmc", finished=False)
    code, out, err = door(report.main, argv, monkeypatch, capfd)
    assert (code, err) == (0, "")
    assert [line.partition(":")[0] for line in out.splitlines() if ":" in line] == ["demo", "dmc"]
    assert cells(out, "Catch") == ["Catch", "2", "-"]
    assert "walker_walk" not in out
    assert out.endswith("no run is finished yet\n\n")
    code, out, _ = door(report.main, [*argv, "--json"], monkeypatch, capfd)
    assert [about["suite"] for about in json.loads(out)] == ["demo", "dmc"]
    code, out, _ = door(report.main, [*argv, "--json", "--suite", "demo"], monkeypatch, capfd)
    assert (code, json.loads(out)["tasks"]) == (0, {"Catch": {"0": 0.96, "1": "NaN"}})
    code, out, _ = door(report.main, [*argv, "--suite", "atari100k"], monkeypatch, capfd)
    assert (code, cells(out, "Pong")[:3]) == (0, ["Pong", "0", "-"])


def test_a_damaged_run_is_told_and_hides_no_other(tmp_path, monkeypatch, capfd):
    for suite, task, name, text in (
        ("atari100k", "Pong", "finished.json", "{"),
        ("atari100k", "Pong", "finished.json", '{"summary": {"scores": [1]}}'),
        ("gym", "Maze-v0", "config.json", '{"config": {"task": [3]}, "created": {}, "resumed": []}'),
    ):
        path = finish(tmp_path, task, 0, 1.0, suite=suite)
        finish(tmp_path, task, 1, 12.0, suite=suite)
        (path / name).write_text(text)
        argv = ["--logdir", str(tmp_path), "--suite", suite]
        code, out, err = door(report.main, argv, monkeypatch, capfd)
        # A run with only its configuration damaged still has a score.
        seeds, score = ("1", "12.0") if name == "finished.json" else ("2", "6.50")
        assert (code, cells(out, task)[:3]) == (0, [task, seeds, score])
        assert err.startswith(f"warning: {path / name}: the file is damaged")
        assert err.count("\n") == 1
        (path / "finished.json").unlink()


def configured(folder, seed, *, finished=True, **overrides):
    """A run of demo Catch with that configuration."""
    config = apply_overrides(default_config("demo"), {"seed": seed, "task": "Catch", **overrides}).to_dict()
    with RunDir.open(folder, "demo", "Catch", seed, config) as run:
        if finished:
            run.mark_finished({"score": float(seed)})
    return run.path


def test_seeds_that_compute_something_else_are_warned_of(tmp_path, monkeypatch, capfd):
    elsewhere = {"device": "cpu", "precision": "float32", "seeds": 3, "logdir": tmp_path, "log": {"every": 7}}
    configured(tmp_path, 0)
    machine = {
        "env": {"threads": 2},
        "train": {"graph": "off", "tune": False},
        "checkpoint": {"seconds": 5.0},
    }
    configured(tmp_path, 1, **elsewhere, **machine)
    configured(tmp_path, 2, finished=False, agent_steps=7)
    finish(tmp_path, "Pong", 0, 1.0)
    argv = ["--logdir", str(tmp_path), "--suite", "demo"]
    code, out, err = door(report.main, argv, monkeypatch, capfd)
    assert (code, err) == (0, "")
    configured(tmp_path, 3, agent_steps=7)
    configured(tmp_path, 4, agent_steps=7, env={"obs": "state"})
    code, out, err = door(report.main, argv, monkeypatch, capfd)
    assert (code, err) == (0, "warning: demo Catch: its seeds differ in agent_steps, env.obs\n")
    assert cells(out, "Catch") == ["Catch", "4", "2.00", "±", "0.91"]
    code, out, err = door(report.main, [*argv, "--json"], monkeypatch, capfd)
    assert (code, err) == (0, "warning: demo Catch: its seeds differ in agent_steps, env.obs\n")
    assert json.loads(out)["tasks"]["Catch"] == {"0": 0.0, "1": 1.0, "3": 3.0, "4": 4.0}


def test_seeds_of_different_precision_are_told_whatever_was_asked_for(tmp_path, capfd):
    for seed, precision in enumerate(["bfloat16", "float32", None, "bfloat16"]):
        finish(tmp_path, "Pong", seed, 1.0, **({"precision": precision} if precision else {}))
        finish(tmp_path, "Boxing", seed, 1.0, **({"precision": "bfloat16"} if precision else {}))
    results.collect(tmp_path, suites.get("atari100k"))
    said = "warning: atari100k Pong: its seeds differ in precision (bfloat16 and float32)\n"
    assert capfd.readouterr().err == said
    finish(tmp_path, "Alien", 0, 1.0)
    finish(tmp_path, "Alien", 1, 1.0, episodes=10)
    results.collect(tmp_path, suites.get("atari100k"), [suites.get("atari100k").task("Alien")])
    assert (
        capfd.readouterr().err == "warning: atari100k Alien: its seeds differ in eval.episodes (10 and 100)\n"
    )


def test_a_field_that_an_older_version_did_not_have_counts_as_its_default(tmp_path, capfd):
    demo = suites.get("demo")
    configured(tmp_path, 0)
    path = configured(tmp_path, 1) / "config.json"
    about = json.loads(path.read_text())
    del about["config"]["env"]["render"], about["config"]["harmony"]
    path.write_text(json.dumps(about))
    results.collect(tmp_path, demo)
    assert capfd.readouterr().err == ""
    about["config"]["harmony"] = None
    path.write_text(json.dumps(about))
    results.collect(tmp_path, demo)
    assert "its seeds differ in harmony.mode, " in capfd.readouterr().err


def test_a_copied_or_renamed_folder_is_told_and_left_out(tmp_path, monkeypatch, capfd):
    demo, folder = tmp_path / "demo", tmp_path / "demo" / "Catch"
    for seed in (0, 1):
        configured(tmp_path, seed)
    shutil.copytree(folder, demo / "Catch_backup")
    shutil.copytree(folder / "seed1", folder / "seed2")
    argv, asked = ["--logdir", str(tmp_path)], "was it copied, moved or renamed?"
    code, out, err = door(report.main, argv, monkeypatch, capfd)
    assert (code, out.count("Catch"), cells(out, "Catch")[:3]) == (0, 1, ["Catch", "2", "0.50"])
    assert err.splitlines() == [
        f"warning: {demo / 'Catch_backup'}: left out: it holds demo Catch seed 0; {asked}",
        f"warning: {folder / 'seed2'}: left out: it holds demo Catch seed 1; {asked}",
    ]
    shutil.rmtree(folder / "seed2")
    finish(tmp_path, "Pong", 0, 14.0).parent.rename(tmp_path / "atari100k" / "Alien")
    code, out, err = door(report.main, [*argv, "--suite", "atari100k"], monkeypatch, capfd)
    assert (code, cells(out, "Alien")[:3]) == (0, ["Alien", "0", "-"])
    path = tmp_path / "atari100k" / "Alien" / "seed0"
    assert err == f"warning: {path}: left out: it holds atari100k Pong seed 0; {asked}\n"


def test_a_folder_of_another_suite_is_told_and_hides_no_other(tmp_path, monkeypatch, capfd):
    configured(tmp_path, 0)
    for name, suite in (("CartPole-v1", "gym"), ("walker_walk", "gym"), ("Caught", "demo"), ("Old", "deom")):
        path = finish(tmp_path, name, 0, 1.0, suite="demo")
        about = json.loads((path / "config.json").read_text())
        about["config"]["suite"] = suite
        (path / "config.json").write_text(json.dumps(about))
    code, out, err = door(report.main, ["--logdir", str(tmp_path)], monkeypatch, capfd)
    assert (code, [line.split() for line in out.splitlines()[4:]]) == (0, [["Catch", "1", "0.00"], []])
    asked = "was it copied, moved or renamed?"
    assert err.splitlines() == [
        f"warning: {tmp_path / 'demo' / name}: left out: {what}"
        for name, what in (
            ("CartPole-v1", f"it holds gym CartPole-v1 seed 0; {asked}"),
            ("Caught", "no task 'Caught' in suite demo; choose from 'Catch', 'Track', 'TrackGrey'"),
            ("Old", "no suite 'deom'; did you mean 'demo'?"),
            ("walker_walk", f"it holds gym walker_walk seed 0; {asked}"),
        )
    ]


def test_tasks_that_share_a_folder_have_their_own_runs(tmp_path, capfd):
    for seed, name in enumerate(("my/Maze-v0", "my-Maze-v0", "my/Maze-v0")):
        path = finish(tmp_path, "my-Maze-v0", seed, float(seed), suite="gym")
        about = json.loads((path / "config.json").read_text())
        about["config"]["task"] = name
        (path / "config.json").write_text(json.dumps(about))
    rows = results.collect(tmp_path, suites.get("gym"))
    found = {row.task.name: row.scores for row in rows}
    assert found == {"my/Maze-v0": {0: 0.0, 2: 2.0}, "my-Maze-v0": {1: 1.0}}
    assert capfd.readouterr().err == ""
