"""bench.peers without a peer: taking turns with processes, what they can do wrong, the table, the set-up."""

import subprocess
import sys
from pathlib import Path

import pytest

from bench.peers import __main__ as peers
from bench.peers.workers import Worker, take_turns
from hdfast.runtime import errors
from hdfast.runtime.errors import MissingLibraryError, RunError

ROOT = Path(__file__).parents[1]
SERVE = """
import os, sys, time
from bench.peers.turns import serve

def build(settings):
    print("noise on stdout while it builds")
    done = []
    def update():
        print("noise in an update")
        done.append(1)
        {update}
    return update, {{"version": "1", "limit": settings["limit"]}}

{start}
"""


def worker(update: str = "time.sleep(0.02)", start: str = "serve(build)", **options) -> Worker:
    command = [sys.executable, "-c", SERVE.format(update=update, start=start)]
    return Worker("peer", command, {"limit": 3}, cwd=ROOT, **options)


def test_a_worker_tells_about_itself_and_takes_turns():
    with worker() as peer:
        assert peer.about == {"version": "1", "limit": 3}
        assert all(0.02 <= peer.update() < 5 for _ in range(3))
        process = peer._process
        assert process.poll() is None
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        ({"start": "raise ImportError('no module')"}, "peer: ended with exit code 1: ImportError: no module"),
        ({"start": "sys.exit(3)"}, "peer: ended with exit code 3: it said nothing"),
        ({"start": "time.sleep(60)", "limit_s": 0.2}, "peer: no answer within 0.2 seconds"),
    ],
)
def test_a_worker_that_cannot_be_built(wrong, what):
    with pytest.raises(RunError) as error:
        worker(**wrong)
    assert str(error.value) == what


def test_a_worker_that_fails_in_an_update():
    with worker("if len(done) == 2: raise MemoryError('too large')") as peer:
        peer.update()
        for _ in range(2):  # the second time it is gone already
            with pytest.raises(RunError, match="peer: ended with exit code 1: MemoryError: too large"):
                peer.update()


def test_a_worker_that_hangs_is_ended():
    with worker("time.sleep(60)", limit_s=2) as peer:
        with pytest.raises(RunError, match="no answer within 2 seconds"):
            peer.update()
        peer.close(wait_s=0.1)
        assert peer._process.returncode == -9


def test_a_command_that_is_not_there():
    with pytest.raises(RunError, match="peer: cannot start no/such/python: No such file"):
        Worker("peer", ["no/such/python"], {}, cwd=ROOT)


class Told:
    """In the place of a worker: its updates take 1, 2, 3, ... seconds."""

    def __init__(self, name: str, calls: list[str]):
        self.name, self.calls = name, calls

    def update(self) -> float:
        self.calls.append(self.name)
        return float(self.calls.count(self.name))


def test_turns_go_there_and_back_and_warmups_do_not_count():
    calls: list[str] = []
    times = take_turns([Told("a", calls), Told("b", calls)], rounds=3, warmups=1)
    assert "".join(calls) == "abbaabba"
    assert times == [[2.0, 3.0, 4.0], [2.0, 3.0, 4.0]]


def test_the_report_gives_medians_rates_and_their_ratio():
    about = {"version": "1", "gflop": 900.0, "parameters": 17_922_952, "threads": 2, "torch": "2"}
    text = peers.report(
        ["theirs", "ours"], [{**about, "gflop": None}, about], [[9.0, 6.0, 8.0], [3.0, 2.0, 2.0]]
    )
    head, _, theirs, ours, _, ratio = text.splitlines()
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in (head, theirs, ours)]
    assert cells[0][:7] == ["", "version", "median s", "min s", "max s", "GFLOP", "GFLOP/s"]
    assert cells[1][:7] == ["theirs", "1", "8.00", "6.00", "9.00", "", ""]
    assert cells[2][:8] == ["ours", "1", "2.00", "2.00", "3.00", "900", "450", "17,922,952"]
    assert ratio == "theirs takes 4.00 x as long as ours (3.00 to 4.00 in 3 rounds)"


def test_ours_takes_turns():
    """The smallest batch, through the process that `bench.peers` starts."""
    settings = {"batch": 1, "length": 2, "horizon": 1, "device": "cpu", "threads": 1}
    settings |= {"precision": "float32", "graph": False, "compile": False}
    with Worker("ours", [sys.executable, "-m", "bench.peers.hdfast_update"], settings, cwd=ROOT) as ours:
        assert ours.about["parameters"] == 17_922_952
        assert ours.about["threads"] == 1
        assert ours.about["gflop"] > 0 < ours.update()


def test_an_installed_peer_is_used_as_it_is(tmp_path, monkeypatch):
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text("#!/bin/sh\necho 1.2\n")
    python.chmod(0o755)
    assert peers.interpreter(tmp_path, "sheeprl==1.2") == python
    monkeypatch.setattr(peers.venv.EnvBuilder, "create", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(MissingLibraryError, match=r"sheeprl==1\.3: no environment for it: full"):
        peers.interpreter(tmp_path, "sheeprl==1.3")  # another version is installed anew


def test_without_an_index_the_command_ends_with_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setattr(peers, "VENV", tmp_path / "peer")
    with pytest.raises(SystemExit) as end:
        errors.main(lambda: peers.main(["--device", "cpu"]))
    assert end.value.code == MissingLibraryError.exit_code
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2
    assert said[0] == f"installing {peers.PACKAGE} into peer"
    assert f"{peers.PACKAGE}: cannot be installed: ERROR: No matching distribution found" in said[1]


def test_a_wrong_flag_is_answered_with_the_right_one():
    command = [sys.executable, "-m", "bench.peers", "--round", "1"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    assert "there is no option --round; did you mean '--rounds'" in result.stderr


def test_what_is_installed_is_ignored_by_git():
    place = peers.VENV.relative_to(ROOT)
    done = subprocess.run(["git", "check-ignore", "-q", f"{place}/bin/python"], cwd=ROOT)
    assert done.returncode == 0
