"""What a run uses of tuning's choices: remembered per machine and model, sought once, printed by the command."""

import contextlib
import dataclasses
import errno
import fcntl
import json

import pytest
import torch

from hdfast import tune
from hdfast.runtime.console import Console
from hdfast.runtime.errors import Interrupted
from hdfast.tuning import choice as choices
from hdfast.tuning import settle as settling
from hdfast.tuning.choice import Choice, Job, alone, path_of, remember, remembered
from hdfast.tuning.search import BUDGET, CAPTURING, FINE, LIMIT, OVERLAPPING, TIMES, TuningError
from hdfast.tuning.settle import settle, summary
from hdfast_kernels import dispatch
from tests.agent_cases import SPECS, make_actions, one_thread, small_config  # noqa: F401
from tests.loop_cases import door
from tests.tuning_cases import SIZES, own_cache  # noqa: F401

CPU = torch.device("cpu")


@pytest.fixture
def own_defaults():
    before = dispatch.use("cpu", None)
    yield
    dispatch.use("cpu", before)


def a_key(**changes):
    config = small_config(**changes.pop("config", {}))
    arguments = {"obs_specs": SPECS, "actions": make_actions(False), "device": CPU, "dtype": torch.float32}
    return Job(config=config, **{**arguments, **changes}).key


def test_a_choice_is_for_one_machine_and_model(monkeypatch):
    choice = Choice({"kl_balance": "native"}, True, {"kl_balance": {"right": True}}, overlap=True)
    assert remembered(a_key()) is None
    path = remember(a_key(), choice)
    assert path == path_of(a_key())
    assert remembered(a_key()) == choice
    assert remembered(a_key(actions=make_actions(False, width=9))) == choice, "the game does not matter"
    assert remembered(a_key(config={"train": {"ratio": 3.0}, "seed": 4})) == choice
    assert remembered(a_key(actions=make_actions(True))) is None
    assert remembered(a_key(dtype=torch.bfloat16)) is None
    assert remembered(a_key(config={"rssm": {"deter": 20}})) is None
    monkeypatch.setattr(choices, "_source", lambda: "edited")
    assert remembered(a_key()) is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda found: {},
        lambda found: [],
        lambda found: {**found, "ops": {"kl_balance": "cuda"}},
        lambda found: {**found, "ops": {"kl": "native"}},
        lambda found: {**found, "ops": 3},
        lambda found: {**found, "graph": "yes"},
        lambda found: {**found, "overlap": 1},
        lambda found: {key: value for key, value in found.items() if key != "overlap"},
        lambda found: {**found, "key": {**found["key"], "torch": "1.0"}},
    ],
)
def test_what_is_damaged_is_not_remembered(damage):
    path = remember(a_key(), Choice({"kl_balance": "native"}))
    path.write_text(json.dumps(damage(json.loads(path.read_text()))))
    assert remembered(a_key()) is None
    path.write_text("{")
    assert remembered(a_key()) is None


def test_where_nothing_can_be_kept_a_run_goes_on(monkeypatch, tmp_path, capsys):
    """A search that could time something would have been kept, so that it is told of."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("HDFAST_CACHE", str(tmp_path / "file" / "below"))
    assert remember(a_key(), Choice()) is None
    with alone(a_key(), lambda: None):
        assert remembered(a_key()) is None
    monkeypatch.setattr(settling, "AUTOMATIC", ("cpu",))
    for report in ({}, {TIMES: {"right": True, "ms": {"plain PyTorch": 2.0}}}):
        monkeypatch.setattr(
            settling, "search", lambda job, report=report, **options: Choice({}, False, report)
        )
        assert settled([]) == Choice({}, False, report)
        told = "the result cannot be kept here, so it will be searched for again"
        assert capsys.readouterr().err == (
            f"warning: {tmp_path / 'file' / 'below'}: {told}\n" if report else ""
        )


def test_where_files_cannot_be_locked_nobody_waits(monkeypatch):
    def flock(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with alone(a_key(), lambda: pytest.fail("it waits")):
        assert remember(a_key(), Choice())


def test_one_process_tries_and_the_others_wait(monkeypatch):
    waited, told = [], []

    def check():
        waited.append(1)
        if len(waited) == 3:
            raise Interrupted(15)

    monkeypatch.setattr(choices, "POLL_SECONDS", 0)
    with alone(a_key(), lambda: pytest.fail("nobody else is there")), pytest.raises(Interrupted):  # noqa: SIM117
        with alone(a_key(), check, lambda: told.append(1)):
            pass
    assert (waited, told) == ([1] * 3, [1])
    with alone(a_key(config={"rssm": {"deter": 20}}), check):
        pass


def settled(say, **changes) -> Choice:
    config = small_config(**{**SIZES, **changes})
    job = Job(SPECS, make_actions(False), config, CPU, torch.float32)
    return settle(job, check=lambda: None, say=say.append)


def test_a_run_searches_once_where_it_does_so_by_itself(monkeypatch):
    said, searched = [], []
    found = Choice({"kl_balance": "native"}, False, {TIMES: {"ms": {"plain PyTorch": 12.34, "fused": 5.0}}})

    def search(job, *, check, tell, limit, budget):
        searched.append(job)
        return found

    monkeypatch.setattr(settling, "search", search)
    assert settled(said) == Choice()
    assert (said, searched) == ([], []), "not on the CPU"
    monkeypatch.setattr(settling, "AUTOMATIC", ("cpu",))
    assert settled(said, train={"tune": False}) == Choice()
    assert not searched
    assert settled(said) == found
    assert settled(said) == found
    assert len(searched) == 1
    assert len(said) == 2
    assert "--train.no-tune" in said[0]
    assert said[1].startswith("1 op in native (ms an update: plain PyTorch 12.3, fused 5); kept in ")
    assert settled(said, train={"tune": False}) == Choice(), "nor what is remembered"


def test_a_run_that_waited_for_another_computes_as_that_found(monkeypatch):
    found = Choice({"kl_balance": "native"}, False, {TIMES: {"right": True, "ms": {"plain PyTorch": 2.0}}})

    @contextlib.contextmanager
    def taken(key, check, waits):
        waits()
        remember(key, found)
        yield

    monkeypatch.setattr(settling, "AUTOMATIC", ("cpu",))
    monkeypatch.setattr(settling, "alone", taken)
    monkeypatch.setattr(settling, "search", lambda *_, **options: pytest.fail("it searches again"))
    said = []
    assert settled(said) == found
    assert [line.partition(": ")[2] for line in said] == [
        "another run is finding the fastest kernels; waiting for it"
    ]


def test_a_search_that_could_time_nothing_is_not_remembered(monkeypatch):
    """For example because of another program on the card, which may be gone the next time."""
    nothing = Choice(None, False, {TIMES: {"right": False, "why": "OutOfMemoryError: ..."}})
    monkeypatch.setattr(settling, "AUTOMATIC", ("cpu",))
    monkeypatch.setattr(settling, "search", lambda job, **options: nothing)
    said = []
    assert settled(said) == nothing
    assert said[1] == "no update could be timed, so ops run as by default"
    assert remembered(a_key(config=SIZES)) is None


def test_every_run_is_told_what_failed_in_the_search(monkeypatch, capsys):
    """Once something is remembered nobody sees the search again, and a compiler that was missing may be there."""
    report = {
        "kl_balance": {"right": True, "why": ""},
        "linear": {"right": False, "why": "RuntimeError: no C compiler"},
        TIMES: {"right": True, "ms": {"plain PyTorch": 2.0, "fused": 1.0}},
        FINE: {"right": False, "why": "the time for all trials was over"},
        OVERLAPPING: {"right": False, "why": "stale"},
    }
    found = Choice({"kl_balance": "native"}, False, report)
    monkeypatch.setattr(settling, "AUTOMATIC", ("cpu",))
    monkeypatch.setattr(settling, "search", lambda job, **options: found)
    for _ in range(2):
        assert settled([]) == found
        assert capsys.readouterr().err == (
            "warning: left out, because they failed when they were tried: linear (RuntimeError: no C compiler); "
            f"{OVERLAPPING} (stale). `python -m hdfast.tune --again` with the flags of this run tries them again\n"
        )


@pytest.mark.parametrize("error", [TuningError, OSError])
def test_a_run_goes_on_where_the_search_fails(error, monkeypatch, capsys):
    def search(job, **options):
        raise error("no memory")

    monkeypatch.setattr(settling, "AUTOMATIC", ("cpu",))
    monkeypatch.setattr(settling, "search", search)
    assert settled([]) == Choice()
    assert "computes as by default: no memory" in capsys.readouterr().err
    assert remembered(a_key(config=SIZES)) is None


def test_where_nobody_reads_what_is_said_the_run_ends(monkeypatch):
    def say(line):
        raise BrokenPipeError

    monkeypatch.setattr(settling, "AUTOMATIC", ("cpu",))
    job = Job(SPECS, make_actions(False), small_config(**SIZES), CPU, torch.float32)
    with pytest.raises(BrokenPipeError):
        settle(job, check=lambda: None, say=say)


def test_a_choice_is_used(own_defaults):
    Choice({"kl_balance": "native"}).use(CPU)
    assert dispatch.resolve_name("kl_balance", None, torch.zeros(1)) == "native"
    assert dispatch.resolve_name("image_loss", None, torch.zeros(1)) == "reference"
    Choice({}).use(CPU)
    assert dispatch.defaults("cpu") == {}
    Choice().use(CPU)
    assert dispatch.defaults("cpu") == dispatch.CPU_DEFAULT, "nothing of the run before is left"


def test_a_choice_leaves_ops_without_the_forced_backend_to_their_defaults(own_defaults, monkeypatch):
    """A search under HDFAST_BACKEND finds no ops to choose, which is no reason to run the others on the reference."""
    monkeypatch.setenv("HDFAST_BACKEND", "fused")
    Choice({}).use(CPU)
    found = {op: dispatch.resolve_name(op, None, torch.zeros(1)) for op in ("linear", "kl_balance")}
    assert found == {"linear": "fused", "kl_balance": dispatch.CPU_DEFAULT["kl_balance"]}


def test_the_door_says_that_it_waits_for_another(monkeypatch, capfd):
    waited = []

    @contextlib.contextmanager
    def taken(key, check, waits):
        waits()
        waited.append(key)
        yield

    monkeypatch.setattr(settling, "alone", taken)
    monkeypatch.setattr(settling, "search", lambda job, **options: Choice({}, False, {}))
    code, out, _ = door(tune.main, ["--suite", "demo"], monkeypatch, capfd)
    assert (code, len(waited)) == (0, 1)
    assert out.splitlines()[1].endswith(": another run is finding the fastest kernels; waiting for it")


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["--agan"], "there is no option --agan; did you mean '--again'?"),
        (["--dry-run"], "--dry-run: only hdfast.train has a dry run; leave it out"),
        (
            ["--suite", "demo", "--device", "cpu", "--train.graph", "on"],
            "--train.graph: a CUDA graph needs a CUDA device; leave it out on the CPU",
        ),
    ],
)
def test_a_wrong_flag_is_answered_with_what_is_right(argv, text, monkeypatch, capfd):
    assert door(tune.main, argv, monkeypatch, capfd) == (2, "", f"error: {text}\n")


@pytest.mark.parametrize(
    ("forced", "text"),
    [
        (
            "native",
            "HDFAST_BACKEND=native decides what ops run on, so that nothing is left to find; unset it",
        ),
        ("natve", "adam_step: HDFAST_BACKEND=natve cannot run: there is no such backend; choose one of"),
    ],
)
def test_where_a_backend_is_forced_the_door_searches_nothing(forced, text, monkeypatch, capfd):
    monkeypatch.setenv("HDFAST_BACKEND", forced)
    code, out, err = door(tune.main, ["--suite", "demo", "--device", "cpu"], monkeypatch, capfd)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"error: {text}")


def test_a_forced_backend_is_not_called_plain_pytorch(monkeypatch):
    ms = {"plain PyTorch": 4400.0, "plain PyTorch, graph": 9.5}
    found = Choice({}, True, {TIMES: {"ms": ms}})
    assert summary(found) == (
        "plain PyTorch, as a CUDA graph (ms an update: plain PyTorch 4,400, plain PyTorch, graph 9.5)"
    )
    monkeypatch.setenv("HDFAST_BACKEND", "triton")
    assert summary(found) == (
        "HDFAST_BACKEND=triton, as a CUDA graph "
        "(ms an update: HDFAST_BACKEND=triton 4,400, HDFAST_BACKEND=triton, graph 9.5)"
    )


@pytest.mark.parametrize(
    ("line", "row"),
    [
        ({"right": True, "overlap": True, "ms": {"a": 9.0, "b": 7.5}}, "yes 1.20 beside each other"),
        ({"right": True, "overlap": False, "ms": {"a": 9.0, "b": 10.0}}, "yes 0.90 one after the other"),
        ({"right": False, "why": "stale", "overlap": False}, "no one after the other"),
    ],
)
def test_the_table_tells_whether_updates_overlap(line, row, capsys):
    report = {CAPTURING: {"right": True, "why": ""}, OVERLAPPING: line}
    Console().print(tune.table(Choice({}, True, report, overlap=line["overlap"])), width=110)
    rows = [" ".join(text.split()) for text in capsys.readouterr().out.splitlines()]
    assert "update and act yes CUDA graph" in rows
    assert f"halves of two updates {row}" in rows


def test_the_door_tells_and_remembers(monkeypatch, capfd):
    report = {
        "kl_balance": {"right": True, "why": ""},
        "linear": {"right": False, "why": "off"},
        TIMES: {"right": True, "ms": {"plain PyTorch": 2.0, "fused": 1.0}},
        FINE: {"right": True, "without": {"kl_balance": 1.25}},
    }
    searched = []

    def search(job, *, check, tell, limit, budget):
        assert (limit, budget) == (LIMIT * tune.PATIENCE, BUDGET * tune.PATIENCE)  # nobody waits for it
        searched.append(job)
        tell({"begin": "linear"})
        tell({"end": "linear", "right": False, "why": "off"})
        for _ in range(3):
            tell({"begin": FINE})
        tell({"end": FINE, "right": True})
        return Choice({"kl_balance": "native"}, False, report)

    monkeypatch.setattr(settling, "search", search)
    code, out, err = door(tune.main, ["--suite", "demo"], monkeypatch, capfd)
    assert (code, err) == (0, "")
    assert out.splitlines()[1:3] == ["  linear: no: off", f"  {FINE} ..."]
    assert FINE not in "".join(out.splitlines()[3:])
    rows = [line.split() for line in out.splitlines()]
    assert ["kl_balance", "yes", "1.25", "native"] in rows
    assert ["linear", "no", "reference"] in rows
    assert "1 op in native (ms an update: plain PyTorch 2, fused 1)" in out
    assert "as found before" not in out
    code, out, err = door(tune.main, ["--suite", "demo"], monkeypatch, capfd)
    assert (code, err) == (0, "")
    kept = path_of(searched[0].key)
    assert out.splitlines()[1] == f"  as found before, from {kept}; --again tries it again"
    assert len(searched) == 1
    code, out, err = door(tune.main, ["--suite", "demo", "--again"], monkeypatch, capfd)
    assert (code, err) == (0, "")
    assert "as found before" not in out
    assert len(searched) == 2
    assert searched[0].config.suite == "demo"
    assert dataclasses.asdict(searched[0].config) == dataclasses.asdict(searched[1].config)


def test_a_door_that_is_stopped_says_what_is_remembered(monkeypatch, capfd):
    def stopped(job, **options):
        raise Interrupted(2)

    monkeypatch.setattr(settling, "search", stopped)
    told = door(tune.main, ["--suite", "demo"], monkeypatch, capfd)
    assert (told[0], told[2]) == (130, "error: stopped by SIGINT; nothing is remembered\n")
    found = Choice({}, False, {TIMES: {"right": True, "ms": {"plain PyTorch": 2.0}}})
    monkeypatch.setattr(settling, "search", lambda job, **options: found)
    assert door(tune.main, ["--suite", "demo"], monkeypatch, capfd)[0] == 0
    monkeypatch.setattr(settling, "search", stopped)
    told = door(tune.main, ["--suite", "demo", "--again"], monkeypatch, capfd)
    assert (told[0], told[2]) == (130, "error: stopped by SIGINT; what was remembered stays\n")
