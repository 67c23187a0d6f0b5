"""The doors beside training: evaluate, sweep and profile."""

import dataclasses
import gzip
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hdfast import evaluate, loop, profile, suites, sweep
from hdfast.agent.behavior import Behavior
from hdfast.envs.base import ContinuousActions
from hdfast.runtime.errors import Interrupted, MissingLibraryError, RunError
from hdfast.runtime.signals import StopRequest
from tests import loop_cases
from tests.loop_cases import (
    door,
    flags,
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


def test_evaluate_plays_the_newest_checkpoint_and_only_reads(run, monkeypatch, capfd):
    path = path_of(run)
    before = {p: p.stat().st_mtime_ns for p in path.rglob("*")}
    with loop.RunDir.open(run.logdir, "demo", "Catch", 0, run.to_dict()):  # beside the trainer
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


def test_evaluate_meets_episodes_that_training_did_not(run, tmp_path, monkeypatch):
    seeds, make = [], loop.envs.make
    monkeypatch.setattr(
        loop.envs, "make", lambda *a, seed, **k: seeds.append(seed) or make(*a, seed=seed, **k)
    )
    loop_cases.train(tiny(tmp_path, agent_steps=2, eval={"every": 2}))
    for seed in (0, 1):  # 0 is the seed of the run, too
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


def test_evaluate_writes_a_video_of_the_first_episode(run):
    found = evaluate.evaluate(path_of(run), episodes=3, num_envs=2, video=True, device="cpu")
    path = Path(found["video"])
    assert path == path_of(run) / "videos" / "evaluate_0000000040.gif"
    with Image.open(path) as image:
        assert image.n_frames == 10  # the reset row and nine more
        assert image.size == (256, 256)
    path.unlink()


def test_a_video_that_cannot_be_written_is_told_after_its_episode_not_after_all(run, tmp_path):
    copy = tmp_path / "seed0"
    shutil.copytree(path_of(run), copy)
    shutil.rmtree(copy / "videos")
    (copy / "videos").touch()
    began = time.monotonic()
    with pytest.raises(RunError, match="cannot write the video"):
        evaluate.evaluate(copy, episodes=1_000_000, num_envs=2, video=True, device="cpu")
    assert time.monotonic() - began < 30


def test_a_trained_agent_acts_in_a_notebook(run):
    with evaluate.load(str(path_of(run)), num_envs=2, device="cpu") as trained:
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


def test_evaluate_knows_success_and_wants_images_for_a_video(tmp_path, monkeypatch):
    script(monkeypatch, actions=ContinuousActions(2), state=True)
    monkeypatch.setattr(evaluate, "make_envs", loop.make_envs)
    config = tiny(tmp_path, agent_steps=12)
    loop_cases.train(config)
    assert evaluate.evaluate(path_of(config), episodes=4)["success"] == 1.0
    with pytest.raises(evaluate.ConfigError, match="--video: this task is not seen through images"):
        evaluate.evaluate(path_of(config), episodes=1, video=True)


def test_evaluate_tells_what_is_wrong_in_one_line(run, tmp_path, monkeypatch, capfd):
    with loop.RunDir.open(tmp_path, "demo", "Catch", 0, run.to_dict()) as new:
        pass
    for argv, code, text in (
        ([str(tmp_path / "no")], 1, f"{tmp_path / 'no'}: there is no run here (no config.json)"),
        ([str(tmp_path)], 2, f"{tmp_path}: this is not a run, it holds 1; try {new.path}"),
        (
            [str(new.path)],
            3,
            f"{new.path}: there is no checkpoint yet; the first is written after 1e+09 seconds of training",
        ),
        ([], 2, "the following arguments are required: run"),
        (
            [str(path_of(run)), "--episodes", "0"],
            2,
            "argument --episodes: 0 is out of range: right is 1 or more",
        ),
        ([str(path_of(run)), "--seed", "x"], 2, "argument --seed: 'x' is not a whole number"),
        (
            [str(path_of(run)), "--episods", "3"],
            2,
            "there is no option --episods; did you mean '--episodes'?",
        ),
        ([str(path_of(run)), "more"], 2, "there is no argument more"),
        ([str(path_of(run)), "--device", "gpu"], 2, "--device: no device 'gpu'; did you mean 'cpu'?"),
    ):
        got, out, err = door(evaluate.main, argv, monkeypatch, capfd)
        assert (got, out, err) == (code, "", f"error: {text}\n")


def jobs(tmp_path, *bodies):
    """Sweep jobs that run pieces of Python instead of training."""
    return [
        sweep.Job(f"job {i}", (sys.executable, "-c", body), tmp_path / f"{i}" / "train.log")
        for i, body in enumerate(bodies)
    ]


def test_sweep_makes_a_job_of_every_task_and_seed(tmp_path):
    suite = suites.get("atari100k")
    made = sweep.jobs_of(suite, suite.tasks[:2], range(3, 5), ["--size", "tiny"], tmp_path)
    assert [job.name for job in made] == ["Alien seed 3", "Amidar seed 3", "Alien seed 4", "Amidar seed 4"]
    flags_of_train = ("--suite", "atari100k", "--task", "Amidar", "--seed", "3", "--size", "tiny")
    assert made[1].command == (sys.executable, "-m", "hdfast.train", *flags_of_train)
    assert made[1].log == tmp_path / "atari100k" / "Amidar" / "seed3" / "train.log"


def test_sweep_runs_so_many_at_a_time_and_lists_failures(tmp_path):
    meet = """
import pathlib, sys, time
mine, other = map(pathlib.Path, sys.argv[1:3])
mine.touch()
for _ in range(6000):  # one of the two could end well without the other running, both could not
    if other.exists():
        break
    time.sleep(0.01)
else:
    sys.exit("alone for a minute")
"""
    codes = [0, 4, 0, 0, 2]
    made = jobs(tmp_path, *(f"raise SystemExit({code})" for code in codes))
    here, there = str(tmp_path / "here"), str(tmp_path / "there")
    for i, files in enumerate([(here, there), (there, here)]):
        command = (*made[i].command[:2], f"{meet}\n{made[i].command[2]}", *files)
        made[i] = dataclasses.replace(made[i], command=command)
    running, said = [0], []

    class Watching(sweep.LocalPool):
        def start(self, job, slot):
            running.append(running[-1] + 1)
            return super().start(job, slot)

        def poll(self, handle):
            code = super().poll(handle)
            if code is not None:
                running.append(running[-1] - 1)
            return code

    with StopRequest() as stop:
        failed = sweep.run(Watching(2), made, 2, stop, said.append)
    assert failed == {"job 1": 4, "job 4": 2}
    assert max(running) == 2
    assert len(said) == 10
    assert said[0] == f"[1/5] job 0: started, output in {tmp_path / '0' / 'train.log'}"
    assert sorted(line.rpartition(" after ")[0] for line in said if " after " in line) == [
        "[1/5] job 0: done",
        "[2/5] job 1: exit code 4",
        "[3/5] job 2: done",
        "[4/5] job 3: done",
        "[5/5] job 4: exit code 2",
    ]
    assert made[0].log.read_text().startswith("$ ")


def test_sweep_gives_each_run_its_device_and_its_share_of_the_cores(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    body = """
import os, sys
alone = os.getpgrp() == os.getpid()  # Ctrl-C at the terminal reaches the sweep alone, which passes it on
print(sys.argv[1:], os.environ['OMP_NUM_THREADS'], alone)
"""
    made = jobs(tmp_path, *[body] * 5)
    with StopRequest() as stop:
        assert sweep.run(sweep.LocalPool(3, ["cuda:0", "cuda:1"]), made[:3], 3, stop, lambda line: None) == {}
    told = [job.log.read_text().splitlines()[-1] for job in made[:3]]
    assert told == [f"['--device', 'cuda:{i}'] 2 True" for i in (0, 1, 0)]
    with StopRequest() as stop:  # narrow networks gain nothing from their share
        sweep.run(sweep.LocalPool(3, threads=1), made[4:], 3, stop, lambda line: None)
    assert made[4].log.read_text().splitlines()[-1] == "[] 1 True"
    monkeypatch.setenv("OMP_NUM_THREADS", "5")  # asked for
    with StopRequest() as stop:
        sweep.run(sweep.LocalPool(3, threads=1), made[3:4], 3, stop, lambda line: None)
    assert made[3].log.read_text().splitlines()[-1] == "[] 5 True"


def test_sweep_passes_a_signal_on_once_and_waits(tmp_path):
    body = """
import signal, sys, time
def save(signum, frame):
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(0.5)
    print("saved", flush=True)
    sys.exit(143)
signal.signal(signal.SIGTERM, save)
print("ready", flush=True)
time.sleep(60)
"""
    made = jobs(tmp_path, body, body, body)
    said = []
    with StopRequest() as stop:

        class Stopping(sweep.LocalPool):
            def poll(self, handle):
                if not stop and all("ready" in job.log.read_text() for job in made[:2]):
                    os.kill(os.getpid(), signal.SIGINT)
                return super().poll(handle)

        with pytest.raises(Interrupted) as error:
            sweep.run(Stopping(2), made, 2, stop, said.append)
    assert error.value.exit_code == 130
    assert "stopping 2 runs, each with a checkpoint" in said
    assert [job.log.read_text().splitlines()[-1] for job in made[:2]] == ["saved", "saved"]
    assert not made[2].log.exists()  # never begun


def test_sweep_stops_its_runs_when_nobody_reads_what_it_says(tmp_path):
    made = jobs(tmp_path, *["import time; time.sleep(60)"] * 2)
    said = []

    def say(line):
        said.append(line)
        raise BrokenPipeError

    with StopRequest() as stop, pytest.raises(BrokenPipeError):
        sweep.run(sweep.LocalPool(2), made, 2, stop, say)
    assert [line.partition(" after ")[0] for line in said] == [
        f"[1/2] job 0: started, output in {made[0].log}",
        "stopping 1 runs, each with a checkpoint",
        "[1/2] job 0: exit code -15",
    ]


def test_sweep_stops_its_runs_when_one_cannot_be_started(tmp_path):
    (tmp_path / "1").touch()  # where a directory should be
    made = jobs(tmp_path, "import time; time.sleep(60)", "pass")
    said = []
    with StopRequest() as stop, pytest.raises(sweep.RunError, match="cannot write the log"):
        sweep.run(sweep.LocalPool(2), made, 2, stop, said.append)
    assert said[1:] == ["stopping 1 runs, each with a checkpoint", said[2]]
    assert said[2].startswith("[1/2] job 0: exit code -15 after")


def test_the_door_of_sweep(tmp_path, monkeypatch, capfd):
    """Real training processes: two seeds that work; then a run whose flag cannot be, told at its end."""
    train_flags = [*flags(agent_steps=12)[2:], "--logdir", str(tmp_path)]
    monkeypatch.setenv("PYTHONPATH", loop_cases.PYTHONPATH)
    pools, pool = [], sweep.LocalPool
    monkeypatch.setattr(
        sweep, "LocalPool", lambda *args, threads: pools.append(threads) or pool(*args, threads=threads)
    )
    argv = ["--suite", "demo", "--seeds", "2", "--seed", "4", "--jobs", "2", "--", *train_flags]
    code, out, err = door(sweep.main, argv, monkeypatch, capfd)
    assert (code, err) == (0, "")
    assert out.splitlines()[0].startswith("[1/2] Catch seed 4: started, output in")
    row = next(line for line in out.splitlines() if line.strip().startswith("Catch")).split()
    assert row[:2] == ["Catch", "2"]
    for seed in (4, 5):
        log = tmp_path / "demo" / "Catch" / f"seed{seed}" / "train.log"
        assert "agent_steps=12/12 done=100.0%" in log.read_text()
        assert json.loads((log.parent / "config.json").read_text())["config"]["seed"] == seed
    assert pools == [1]  # the demo is narrow
    argv = ["--suite", "demo", "--seeds", "1", "--", *train_flags, "--device", "cuda:7"]
    code, out, err = door(sweep.main, argv, monkeypatch, capfd)
    assert code == 1
    first, detail = err.splitlines()
    assert first == "error: 1 of 1 runs failed"
    assert detail.startswith("  Catch seed 0: exit code 2: error: --device: ")
    argv = ["--suite", "demo", "--seed", "4", "--seeds", "1", "--", *train_flags, "--agent-steps", "20"]
    code, out, err = door(sweep.main, argv, monkeypatch, capfd)
    assert code == 1  # the line that says what is wrong, not the last of the differences below it
    assert "seed4: this run has another config" in err.splitlines()[1]


def test_sweep_tells_what_is_wrong_in_one_line(monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "ray", None)
    for argv, code, text in (
        (["--suit", "demo"], 2, "there is no option --suit; did you mean '--suite'"),
        (["--suite", "dmo"], 2, "no suite 'dmo'; did you mean 'demo'"),
        (["--suite", "demo", "--tasks", "Pong"], 2, "no task 'Pong' in suite demo"),
        (["--suite", "demo", "--jobs", "0"], 2, "argument --jobs: 0 is out of range"),
        (["--agent-steps", "5"], 2, "--agent-steps is a flag of hdfast.train; put it behind --"),
        (["--log.no-tensorboard"], 2, "--log.no-tensorboard is a flag of hdfast.train; put it behind --"),
        (["--", "--task", "Pong"], 2, "--task cannot stand behind --"),
        (["--", "--rssm.detr", "3"], 2, "there is no option --rssm.detr; did you mean '--rssm.deter'"),
        (["--ray", "auto"], 6, "--ray needs ray; pip install 'hdfast[cluster]'"),
    ):
        got, out, err = door(sweep.main, argv, monkeypatch, capfd)
        assert (got, out) == (code, "")
        assert err.startswith(f"error: {text}")
        assert err.count("\n") == 1
    with pytest.raises(MissingLibraryError):
        sweep.RayPool("auto")


@pytest.mark.slow
def test_sweep_on_ray(tmp_path):
    ray = pytest.importorskip("ray", reason="the extra `cluster` is not installed")
    made = jobs(tmp_path, "print('ran')", "raise SystemExit(3)")
    pool = sweep.RayPool("local")
    try:
        with StopRequest() as stop:
            assert sweep.run(pool, made, 2, stop, lambda line: None) == {"job 1": 3}
        assert made[0].log.read_text().splitlines()[1] == "ran"
        body = "import time; print('ready', flush=True); time.sleep(120)"
        (job,) = jobs(tmp_path / "stop", body)
        with StopRequest() as stop:

            class Stopping:
                start, stop = staticmethod(pool.start), staticmethod(pool.stop)

                def poll(self, handle):
                    if not stop and job.log.exists() and "ready" in job.log.read_text():
                        os.kill(os.getpid(), signal.SIGTERM)
                    return pool.poll(handle)

            began = time.monotonic()
            with pytest.raises(Interrupted):
                sweep.run(Stopping(), [job], 1, stop, lambda line: None)
            assert time.monotonic() - began < 60
    finally:
        ray.shutdown()


def test_profile_measures_the_phases_of_an_update(tmp_path, monkeypatch, capfd):
    trace = tmp_path / "trace.json.gz"
    argv = [*flags(), "--updates", "3", "--warmup", "1", "--top", "5", "--trace", str(trace)]
    code, out, err = door(profile.main, argv, monkeypatch, capfd)
    assert (code, err) == (0, "")
    lines = [line.split() for line in out.splitlines() if line.strip()]
    assert "B2 T4 H2, float32 on" in out.splitlines()[0]
    assert out.splitlines()[0].endswith("ms CPU per update")
    table = {
        " ".join(words[:-2]): (float(words[-2]), words[-1]) for words in lines if words[-1].endswith("%")
    }
    names = (*profile.PHASES, "the rest")
    phases = {name: table[name][0] for name in names}
    assert all(ms > 0 for name, ms in phases.items() if name != "the rest")
    assert abs(sum(int(table[name][1].rstrip("%")) for name in names) - 100) <= 4
    assert len(table) == len(names) + 5
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    spans = [event for event in events if event.get("ph") == "X"]
    names = [span["name"] for span in spans]
    assert {name: names.count(name) for name in ("update", "imagination")} == {"update": 3, "imagination": 3}
    ranges = [(span["ts"], span["ts"] + span["dur"]) for span in spans if span["name"] in profile.PHASES]
    ops = [any(a <= span["ts"] <= b for a, b in ranges) for span in spans if span.get("cat") == "cpu_op"]
    assert sum(ops) > 0.8 * len(ops) > 0  # by number: their time is the machine's
    assert "nsys" not in out  # it is a CPU


def test_profile_attributes_time_to_the_phase_that_took_it(tmp_path, monkeypatch):
    imagine = Behavior.imagine
    monkeypatch.setattr(Behavior, "imagine", lambda *args: time.sleep(0.3) or imagine(*args))
    learner, update = profile.build(tiny(tmp_path))
    found = profile.measure(learner, update, 1)
    assert found.phases["imagination"] > 300
    assert found.wall > 300
    assert found.cpu < found.wall - 250  # sleeping is not work
    assert not set(profile.PHASES) & {name for name, _, _ in found.ops}


def test_profile_under_other_profilers(monkeypatch, capfd):
    code, out, err = door(
        profile.main, [*flags(), "--plain", "--updates", "1", "--warmup", "0"], monkeypatch, capfd
    )
    assert (code, err) == (0, "")
    assert out.count("\n") == 1
    assert profile.nsight(["--suite", "demo", "--logdir", "a b"]).splitlines() == [
        "timeline: nsys profile --trace=cuda,nvtx --capture-range=cudaProfilerApi "
        "python -m hdfast.profile --plain --suite demo --logdir 'a b'",
        "kernels:  ncu --profile-from-start off --set basic --launch-count 200 "
        "python -m hdfast.profile --plain --suite demo --logdir 'a b'",
    ]


def test_profile_tells_what_is_wrong_in_one_line(tmp_path, monkeypatch, capfd):
    missing = tmp_path / "no" / "trace.json"
    for argv, code, text in (
        (["--updates", "0"], 2, "argument --updates: 0 is out of range: right is 1 or more"),
        (["--suite", "dmo"], 2, "no suite 'dmo'; did you mean 'demo'"),
        (["--rssm.detr", "3"], 2, "there is no option --rssm.detr; did you mean '--rssm.deter'"),
        (
            [*flags(), "--trace", str(missing)],
            1,
            f"{missing}: cannot write the trace: No such file or directory",
        ),
    ):
        got, out, err = door(profile.main, argv, monkeypatch, capfd)
        assert (got, out) == (code, "")
        assert err.startswith(f"error: {text}")
        assert err.count("\n") == 1


@pytest.mark.parametrize("name", ["evaluate", "sweep", "profile", "report"])
def test_help_is_short(name, monkeypatch, capfd):
    main = __import__(f"hdfast.{name}", fromlist=["main"]).main
    code, out, err = door(main, ["--help"], monkeypatch, capfd)
    assert (code, err) == (0, "")
    assert f"python -m hdfast.{name}" in out
    assert len(out.splitlines()) < 40
