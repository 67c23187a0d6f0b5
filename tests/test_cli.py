"""The command `python -m hdfast.train`: dry runs, wrong names, a whole suite in turn, and the table at its end."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch

import hdfast
from hdfast import __main__ as package
from hdfast import dry_run, loop, suites, train
from hdfast.agent.learner import Learner
from hdfast.config import LAST_SEED, validate
from tests.loop_cases import (
    TINY,
    differing,
    door,
    flags,
    lines,
    one_thread,  # noqa: F401
    path_of,
    saved,
    start,
    tiny,
)


@pytest.fixture
def two_tasks(monkeypatch):
    """The demo suite with a second task, human scores, and those of a published method."""
    catch = suites.get("demo").task("Catch")
    suite = dataclasses.replace(
        suites.get("demo"),
        tasks=(
            dataclasses.replace(catch, name="One", random=-1.0, human=1.0, published={"Paper": (0.5, 0.7)}),
            dataclasses.replace(catch, name="Two", random=-1.0, human=3.0, published={"Paper": (1.0,)}),
        ),
        measure="human-norm.",
    )
    monkeypatch.setitem(suites.SUITES, "demo", suite)


def test_a_dry_run_says_everything_as_json_and_leaves_nothing(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    code, out, err = door(train.main, [*flags(), "--dry-run", "--seeds", "2"], monkeypatch, capfd)
    assert (code, err) == (0, "")
    assert list(tmp_path.iterdir()) == []
    about = json.loads(out)
    assert about["tasks"] == ["Catch"]
    assert about["seeds"] == [0, 1]
    assert about["config"]["rssm"]["deter"] == TINY["rssm"]["deter"]
    assert about["config"]["eval"]["episodes"] == 2
    assert (about["device"]["device"], about["device"]["precision"]) == ("cpu", "float32")
    assert about["environment"]["actions"] == {"discrete": 3}
    image = about["environment"]["observations"]["image"]
    assert (image["shape"], image["dtype"]) == ([16, 16, image["shape"][2]], "uint8")
    parameters = about["parameters"]
    modules = parameters["modules"]
    assert parameters["total"] == sum(parameters[part] for part in ("world_model", "actor", "critic"))
    world_model = sum(count for name, count in modules.items() if name.startswith("world_model."))
    assert world_model == parameters["world_model"] + parameters["harmony"]
    assert parameters["harmony"] == 3
    assert (modules["actor"], modules["critic"]) == (parameters["actor"], parameters["critic"])
    memory = about["memory_bytes"]
    assert memory["total"] == sum(nbytes for name, nbytes in memory.items() if name != "total")
    row = image["shape"][2] * 256 + 4 + 4 + 3  # image, action, reward, three flags
    assert memory["replay"] == 40 * row  # all the rows that the run has
    slow_critic = parameters["critic"]
    trained = parameters["total"] + parameters["harmony"]
    assert memory["parameters"] == 4 * (trained + slow_critic)
    assert memory["optimizer"] == 2 * memory["gradients"] == 8 * trained
    assert memory["activations"] > 0


def test_a_dry_run_warns_of_too_little_memory(monkeypatch, capfd):
    about = dry_run.describe_device
    monkeypatch.setattr(dry_run, "describe_device", lambda device: {**about(device), "memory_bytes": 1000})
    code, out, err = door(train.main, [*flags(), "--dry-run"], monkeypatch, capfd)
    total = json.loads(out)["memory_bytes"]["total"] / 1e9
    hint = "lower --replay.capacity, --replay.batch or --size"
    told = f"warning: the run takes {total:.1f} GB of memory and cpu has 0.0 GB; {hint}\n"
    assert (code, err) == (0, told)


def test_a_dry_run_looks_for_what_the_run_would_begin_with(tmp_path, monkeypatch, capfd):
    where = tmp_path / "none"
    code, out, err = door(train.main, [*flags(), "--dry-run", "--init-from", str(where)], monkeypatch, capfd)
    assert (code, out) == (1, "")
    assert err.startswith(f"error: {where}: there is no run here")
    assert err.count("\n") == 1


def test_a_dry_run_of_the_main_job_has_the_parameters_of_the_authors(monkeypatch, capfd):
    code, out, _ = door(train.main, ["--task", "Pong", "--dry-run", "--device", "cpu"], monkeypatch, capfd)
    assert code == 0
    about = json.loads(out)
    counts = about["parameters"]
    assert {k: v for k, v in counts.items() if k != "modules"} == {
        "world_model": 15_687_811,
        "actor": 1_053_702,
        "critic": 1_181_439,
        "total": 17_922_952,
        "harmony": 3,
    }
    assert about["environment"]["observations"] == {"image": {"shape": [64, 64, 3], "dtype": "uint8"}}
    assert about["environment"]["action_repeat"] == 4
    assert about["memory_bytes"]["replay"] == 100_000 * (64 * 64 * 3 + 11)


def test_a_dry_run_runs_with_a_forced_backend(monkeypatch, capfd):
    monkeypatch.setenv("HDFAST_BACKEND", "native")
    code, out, err = door(train.main, ["--suite", "demo", "--device", "cpu", "--dry-run"], monkeypatch, capfd)
    assert (code, err) == (0, "")
    assert json.loads(out)["memory_bytes"]["activations"] > 0


@pytest.mark.parametrize("asked", [None, "2"])
def test_the_demo_computes_on_one_thread_unless_told_otherwise(monkeypatch, capfd, asked):
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if asked:
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
    torch.set_num_threads(2)
    try:
        code, out, err = door(
            train.main, ["--suite", "demo", "--device", "cpu", "--dry-run"], monkeypatch, capfd
        )
    finally:
        torch.set_num_threads(before)
    assert (code, err) == (0, "")
    assert json.loads(out)["device"]["threads"] == (2 if asked else 1)


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["--suite", "atari10k"], "no suite 'atari10k'; did you mean 'atari100k'?"),
        (["--task", "Pnog"], "no task 'Pnog' in suite atari100k; did you mean 'Pong'?"),
        (["--task", "Pong,Boxing"], "; several are trained by python -m hdfast.sweep --tasks"),
        (["--rsm.deter", "3"], "there is no option --rsm.deter; did you mean '--rssm.deter'"),
        (["--suite", "demo", ""], "there is no argument ''"),
        (["--suite", "demo", "--logdir", ""], "--logdir needs a value, got an empty one"),
        (["--agent-steps", "many"], "--agent-steps: 'many' is not a whole number"),
    ],
)
def test_a_wrong_name_is_one_line_and_code_2(tmp_path, monkeypatch, capfd, argv, text):
    monkeypatch.chdir(tmp_path)
    code, out, err = door(train.main, argv, monkeypatch, capfd)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert text in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_ends_before_it_learns_is_warned_of(tmp_path, monkeypatch, capfd):
    ran = []
    monkeypatch.setattr(train, "run", lambda config: ran.append(config.agent_steps))
    for agent_steps in ("632", "633"):  # (512 / 8 + 16 - 1) rows of 8 environments are 632 agent steps
        argv = ["--suite", "demo", "--logdir", str(tmp_path), "--agent-steps", agent_steps]
        code, _, err = door(train.main, argv, monkeypatch, capfd)
        warning = "warning: --agent-steps 632 ends before learning begins, at agent step 632\n"
        assert (code, err) == (0, warning if agent_steps == "632" else "")
        monkeypatch.setattr(train, "describe", lambda config: "{}")
        assert door(train.main, [*argv, "--dry-run"], monkeypatch, capfd) == (0, "{}\n", err)
    assert ran == [632, 633]


def test_a_run_without_an_update_is_warned_of(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(train, "run", lambda config: None)
    # 256 rows a batch at 0.1 of them an agent step: the first update comes 2,560 agent steps after the 632.
    for agent_steps, ratio, warned in (("3184", "0.1", True), ("3192", "0.1", False), ("3184", "0", False)):
        argv = [
            "--suite",
            "demo",
            "--logdir",
            str(tmp_path),
            "--agent-steps",
            agent_steps,
            "--train.ratio",
            ratio,
        ]
        code, _, err = door(train.main, argv, monkeypatch, capfd)
        warning = (
            "warning: --train.ratio 0.1 is an update every 2,560 agent steps: the run ends before the first\n"
        )
        assert (code, err) == (0, warning if warned else "")


def test_as_a_process(tmp_path):
    """Exit code, stdout and stderr of a real process; the other tests call its main."""
    process = start(["--suite", "demo", "--tsk", "Catch", "--logdir", str(tmp_path)])
    out, err = process.communicate(timeout=300)
    assert (process.returncode, out, err) == (
        2,
        "",
        "error: there is no option --tsk; did you mean '--task'?\n",
    )


def test_a_suite_alone_trains_its_tasks_in_turn_skips_and_resumes(tmp_path, monkeypatch, capfd, two_tasks):
    argv = [*flags(), "--logdir", str(tmp_path), "--seed", "3", "--seeds", "2"]
    one, two = (tiny(tmp_path, task=task, seed=3) for task in ("One", "Two"))
    ran, run = [], train.run

    def spied(config):
        ran.append((config.task, config.seed))
        return run(config)

    monkeypatch.setattr(train, "run", spied)
    step, updates = Learner.step, []

    def interrupted(self, sample):
        step(self, sample)
        updates.append(self)
        if len(updates) == 20:  # in the second task
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Learner, "step", interrupted)
        code, _, err = door(train.main, argv, monkeypatch, capfd)
    assert (code, err) == (130, "error: stopped by SIGINT\n")
    assert ran == [("One", 3), ("Two", 3)]
    first = saved(one)
    assert not (path_of(two) / "finished.json").exists()
    del ran[:]
    code, out, err = door(train.main, argv, monkeypatch, capfd)
    assert code == 0
    rows = path_of(two) / "replay"
    assert err == f"warning: {rows}: deleting rows that no checkpoint was loaded for\n"
    assert ran == [("One", 3), ("Two", 3), ("One", 4), ("Two", 4)]
    assert differing(saved(one), first) == set()  # skipped
    text = out[out.index("final evaluation") :].split()
    scores = {
        task: [
            lines(tiny(tmp_path, task=task, seed=seed), "scores", kind="evaluation")[-1]["score"]
            for seed in (3, 4)
        ]
        for task in ("One", "Two")
    }
    for task in ("One", "Two"):
        row = text[text.index(task) :]
        assert row[1] == "2"
        assert float(row[2]) == pytest.approx(sum(scores[task]) / 2, abs=0.006)
    assert "Paper" in text
    assert "iqm" in text
    del ran[:]
    before = out[out.index("final evaluation") :]
    monkeypatch.setattr(loop, "Session", None)  # nothing is left to train
    code, out, err = door(train.main, argv, monkeypatch, capfd)
    assert (code, err) == (0, "")
    assert out[out.index("final evaluation") :] == before


def test_the_seeds_of_a_suite_may_end_at_the_last_there_is(monkeypatch):
    """Each run is checked for itself, so it must not be taken for the first of as many seeds again."""
    ran = []
    monkeypatch.setattr(train, "run", lambda config: ran.append(validate(config)))
    monkeypatch.setattr(train.report, "show", lambda *args: None)
    argv = ["train", "--suite", "demo", "--seed", str(LAST_SEED - 1), "--seeds", "2"]
    monkeypatch.setattr(sys, "argv", argv)
    train.main()
    assert [(config.seed, config.seeds) for config in ran] == [(LAST_SEED - 1, 1), (LAST_SEED, 1)]


def test_one_task_of_the_suite(tmp_path, monkeypatch, capfd, two_tasks):
    argv = [*flags(agent_steps=12), "--logdir", str(tmp_path), "--task", "two"]
    code, out, err = door(train.main, argv, monkeypatch, capfd)
    assert (code, err) == (0, "")
    assert [p.name for p in (tmp_path / "demo").iterdir()] == ["Two"]
    assert "One" not in out


@pytest.mark.parametrize("name", ["evaluate", "sweep", "profile", "report"])
def test_help_is_short(name, monkeypatch, capfd):
    main = __import__(f"hdfast.{name}", fromlist=["main"]).main
    code, out, err = door(main, ["--help"], monkeypatch, capfd)
    assert (code, err) == (0, "")
    assert f"python -m hdfast.{name}" in out
    assert len(out.splitlines()) < 40


def test_the_package_itself_lists_its_doors(monkeypatch, capsys):
    doors = {
        path.stem
        for path in Path(loop.__file__).parent.glob("*.py")
        if "entry.main(main)" in path.read_text() and path.stem != "__main__"
    }
    monkeypatch.setattr(sys, "argv", ["hdfast"])
    package.main()
    assert {line.split()[2] for line in capsys.readouterr().out.splitlines()[1:]} == {
        f"hdfast.{door}" for door in doors
    }


@pytest.mark.parametrize(
    ("argument", "code", "out", "err"),
    [
        ("--version", 0, f"hdfast {hdfast.__version__}\n", ""),
        ("--help", 0, None, ""),
        (
            "trian", 2, "",
            "error: python -m hdfast takes no argument 'trian'; did you mean python -m hdfast.train?\n",
        ),
        (
            "--suite", 2, "",
            "error: python -m hdfast takes no argument '--suite'; python -m hdfast lists the commands\n",
        ),
    ],
)  # fmt: skip
def test_the_list_of_doors_is_no_door(argument, code, out, err, monkeypatch, capfd):
    got, printed, told = door(package.main, [argument, "more"], monkeypatch, capfd)
    assert got == code
    assert printed.startswith("Each command lists its flags") if out is None else printed == out
    assert told.startswith(err)
    assert told.count("\n") == bool(err)
