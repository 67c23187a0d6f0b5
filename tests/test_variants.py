"""`hdfast.sweep --vary`: combinations of settings, their folders, and the table of all of them."""

import json
import re
from pathlib import Path

import pytest

from hdfast import report, sweep
from hdfast.runtime.errors import ConfigError
from hdfast.variants import Variant, variants
from tests import loop_cases
from tests.loop_cases import door, flags, one_thread  # noqa: F401
from tests.test_report import finish


def test_every_combination_has_a_folder_and_flags():
    assert variants([]) == [Variant("", ())]
    found = variants(["rssm.deter=128,256", "--env.image-size=32", "train.tune=true,false"])
    assert [one.folder for one in found] == [
        f"rssm.deter={deter},env.image-size=32,train.tune={tune}"
        for deter in (128, 256)
        for tune in ("true", "false")
    ]
    assert found[1].flags == ("--rssm.deter", "128", "--env.image-size", "32", "--train.no-tune")
    assert found[2].flags[-1] == "--train.tune"
    (one,) = variants(["env.kwargs={/}"])
    assert one == Variant("env.kwargs=---", ("--env.kwargs", "{/}"))
    found = variants(['env.kwargs={"a":1,"b":[2,3]},{},{"a":2}'])
    assert [one.flags[1] for one in found] == ['{"a":1,"b":[2,3]}', "{}", '{"a":2}']
    assert found[0].folder == "env.kwargs=--a--1--b---2-3--"
    (one,) = variants(["env.image_size=32"])
    assert one.flags == ("--env.image-size", "32")


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (["rssm.detr=3"], "--vary: rssm.detr is no flag of hdfast.train; did you mean 'rssm.deter'"),
        (["seed=1,2"], "--vary: seed cannot vary; --seeds trains several"),
        (["logdir=a"], "--vary: logdir cannot vary; every variant has a folder of its own below it"),
        (["dry_run=true"], "--vary: dry-run cannot vary; a sweep has none"),
        (
            ["log.no-tensorboard=true"],
            "--vary: log.no-tensorboard is no flag of hdfast.train; did you mean 'log.ten",
        ),
        (["rssm.deter"], "--vary: expected a flag and its values, got 'rssm.deter'; such as --vary"),
        (["rssm.deter=1,,2"], "--vary: expected a flag and its values"),
        (["rssm.deter=1,1"], "--vary: two variants would be rssm.deter=1; is a value given twice?"),
        (["rssm.deter=1", "rssm.deter=2"], "--vary: rssm.deter is varied twice"),
        (["train.tune=yes"], "--vary: train.tune is a switch: expected true or false, got 'yes'"),
    ],
)
def test_what_cannot_be_varied(given, text):
    with pytest.raises(ConfigError, match=f"^{re.escape(text)}"):
        variants(given)


def test_a_sweep_over_settings(tmp_path, monkeypatch, capfd):
    """Two variants of two seeds in processes of their own; their table, that of a report, and a second call."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", loop_cases.PYTHONPATH)
    own = ["--suite", "demo", "--seeds", "2", "--jobs", "2", "--vary", "harmony.mode=learned,off"]
    argv = [*own, "--", *flags(agent_steps=12)[2:], "--logdir", "s"]
    code, out, err = door(sweep.main, argv, monkeypatch, capfd)
    assert (code, err) == (0, "")
    order = re.findall(r"^\[(\d)/4\] Catch seed (\d), harmony.mode=(\w+): started", out, re.MULTILINE)
    assert order == [("1", "0", "learned"), ("2", "0", "off"), ("3", "1", "learned"), ("4", "1", "off")]
    for mode in ("learned", "off"):
        for seed in (0, 1):
            run = tmp_path / "s" / f"harmony.mode={mode}" / "demo" / "Catch" / f"seed{seed}"
            config = json.loads((run / "config.json").read_text())["config"]
            assert (config["harmony"]["mode"], config["seed"]) == (mode, seed)
            assert (run / "train.log").exists()
    header = next(line for line in out.splitlines() if line.split()[:2] == ["task", "seeds"])
    assert header.split()[2:] == ["harmony.mode=learned", "harmony.mode=off"]
    shown = out[out.index("demo: score") :]
    code, out, err = door(report.main, ["--logdir", "s"], monkeypatch, capfd)
    assert (code, err) == (0, "")
    assert out.startswith(shown)
    assert 'harmony.mode: "learned" -> "off"' in out
    code, out, err = door(sweep.main, argv, monkeypatch, capfd)
    assert (code, err) == (0, "")
    assert out.endswith(shown)


def test_every_variant_is_looked_at_before_a_run_begins(tmp_path, monkeypatch, capfd):
    nowhere = tmp_path / "nowhere"
    for vary, text, expected in (
        ("rssm.deter=64,0", "--rssm.deter 0 is out of range", 2),
        ("learner=nowhere:A", "--learner nowhere:A: there is no module 'nowhere'", 2),
        ("device=cpu,cpuu", "--device: no device .cpuu.; did you mean .cpu.", 2),
        (f"init-from={nowhere}", f"{nowhere}: there is no run here", 1),
    ):
        argv = ["--suite", "demo", "--vary", vary, "--", "--logdir", str(tmp_path / "runs")]
        code, out, err = door(sweep.main, argv, monkeypatch, capfd)
        assert (code, out) == (expected, "")
        assert re.match(f"error: {text}", err)
        assert not (tmp_path / "runs").exists()


def test_vary_may_be_repeated(tmp_path, monkeypatch, capfd):
    ran, threads, looked_at = [], [], []
    monkeypatch.setattr(sweep, "run", lambda pool, jobs, *_: ran.extend(job.name for job in jobs) or {})
    monkeypatch.setattr(sweep, "LocalPool", lambda *_, **options: threads.append(options["threads"]))
    monkeypatch.setattr(sweep, "resolve_device", looked_at.append)
    axes = ["--vary", "harmony.mode=learned,off", "--vary", "rssm.unimix=0.01,0.02"]
    argv = ["--suite", "demo", "--seeds", "1", *axes, "--", "--logdir", str(tmp_path)]
    assert door(sweep.main, argv, monkeypatch, capfd)[0] == 0
    assert ran == [
        f"Catch seed 0, harmony.mode={mode},rssm.unimix={unimix}"
        for mode in ("learned", "off")
        for unimix in ("0.01", "0.02")
    ]
    wide = [*argv[: argv.index("--")], "--vary", "rssm.deter=64,512", *argv[argv.index("--") :]]
    assert door(sweep.main, wide, monkeypatch, capfd)[0] == 0
    assert threads == [1, None]  # a share of the cores, where any of them has use for it
    assert looked_at == []  # which could keep some of a GPU's memory from the runs


def test_a_report_shows_plain_runs_and_variants_in_the_order_of_their_numbers(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    for folder in (".", "lr=1e-2", "lr=1e-10", "deter=128", "deter=64"):
        finish(Path("runs", folder), "Catch", 0, 1.0, suite="demo")
    code, out, err = door(report.main, [], monkeypatch, capfd)
    assert (code, err) == (0, "")
    header = next(line for line in out.splitlines() if line.split()[:2] == ["task", "seeds"])
    assert header.split()[2:] == ["runs", "deter=64", "deter=128", "lr=1e-10", "lr=1e-2"]
