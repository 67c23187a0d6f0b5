"""bench.peers without a peer: taking turns with processes, how they can fail, the table, the set-up."""

import ast
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench.peers import __main__ as peers
from bench.peers import places
from bench.peers.known import PEERS, Checkout
from bench.peers.places import Program
from bench.peers.workers import Worker, take_turns
from hdfast.runtime import entry
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
        ({"start": "sys.exit(3)"}, "peer: ended with exit code 3: no output"),
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
        for _ in range(2):  # the second time it has already ended
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


def test_a_worker_has_its_own_environment_variables():
    code = "import os; print('{\"path\": \"%s\"}' % os.environ['PYTHONPATH'])"
    with Worker("peer", [sys.executable, "-c", code], {}, cwd=ROOT, env={"PYTHONPATH": "a:b"}) as peer:
        assert peer.about == {"path": "a:b"}


class Told:
    """In place of a worker: its updates take 1, 2, 3, ... seconds."""

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


def test_the_report_gives_medians_rates_and_ratios_to_the_last():
    about = {"version": "1", "precision": "float32", "gflop": 900.0, "parameters": 17_922_952, "threads": 2}
    about["on"] = "torch 2"
    text = peers.report(
        ["theirs", "ours"], [{**about, "gflop": None}, about], [[9.0, 6.0, 8.0], [3.0, 2.0, 2.0]]
    )
    head, _, theirs, ours = text.splitlines()
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in (head, theirs, ours)]
    assert cells[0][:8] == ["", "version", "precision", "median s", "min s", "max s", "x ours", "in rounds"]
    assert cells[1] == [
        "theirs", "1", "float32", "8.00", "6.00", "9.00", "4.00", "3.00 to 4.00", "", "", "17,922,952", "2", "torch 2"
    ]  # fmt: skip
    assert cells[2][3:11] == ["2.00", "2.00", "3.00", "1.00", "1.00 to 1.00", "900", "450", "17,922,952"]


def test_ours_takes_turns():
    """With the smallest model and batch, in the process that `bench.peers` starts."""
    settings = {"size": "tiny", "batch": 1, "length": 2, "horizon": 1, "device": "cpu", "threads": 1}
    settings |= {"precision": "float32", "graph": False, "compile": False}
    with Worker("ours", peers.OURS.command, settings, cwd=ROOT) as ours:
        assert ours.about["parameters"] == 829_896
        assert ours.about["threads"] == 1
        assert ours.about["precision"] == "float32"
        assert ours.about["gflop"] > 0 < ours.update()


def test_every_peer_has_a_worker_of_its_own_and_a_pinned_version():
    assert len(peers.BY_NAME) == len(PEERS)
    for peer in PEERS:
        source = (ROOT / "bench" / "peers" / peer.worker).read_text()
        assert "serve_torch(build)" in source or "serve_jax(build)" in source
        assert peer.version
        assert set(peer.precisions) <= set(peers.PRECISIONS)
        if peer.checkout:
            assert len(peer.checkout.commit) == 40


@pytest.mark.parametrize(
    "file", sorted({"noise.py", "turns.py", "torch_peer.py", "jax_peer.py", *(peer.worker for peer in PEERS)})
)
def test_what_runs_on_a_peer_s_interpreter_imports_nothing_of_ours(file):
    found = set()
    for node in ast.walk(ast.parse((ROOT / "bench" / "peers" / file).read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level
            found.add(node.module.partition(".")[0])
    assert found
    assert not found & {"bench", "hdfast", "hdfast_kernels"}


@pytest.mark.parametrize(("device", "jax"), [("cpu", "jax==0.4.33"), ("cuda", "jax[cuda12]==0.4.33")])
def test_what_is_installed_is_that_of_the_device(device, jax):
    assert jax in places.requirements(peers.BY_NAME["dreamerv3"], device)
    version = places.torch.__version__.partition("+")[0]
    assert places.requirements(peers.BY_NAME["sheeprl"], device) == ["sheeprl==0.8.4", f"torch=={version}"]


def test_an_installed_peer_is_used_as_it_is(tmp_path, monkeypatch):
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.touch()
    (tmp_path / "installed.txt").write_text("one==1.2\ntwo\n")
    assert places.interpreter(tmp_path, ["one==1.2", "two"], "peer") == python
    monkeypatch.setattr(places.venv.EnvBuilder, "create", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(MissingLibraryError, match="peer: no environment for it: full"):
        places.interpreter(tmp_path, ["one==1.3", "two"], "peer")  # another version is installed anew


@pytest.mark.slow  # makes a virtual environment with pip
def test_without_an_index_the_command_ends_with_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setattr(peers, "PLACE", tmp_path)
    with pytest.raises(SystemExit) as end:
        entry.main(lambda: peers.main(["--device", "cpu"]))
    assert end.value.code == MissingLibraryError.exit_code
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2
    assert said[0].startswith("installing sheeprl==0.8.4, torch==")
    assert "sheeprl: cannot be installed: ERROR: No matching distribution found" in said[1]
    assert not (tmp_path / "sheeprl" / "installed.txt").exists()


def test_without_a_checkout_the_command_ends_with_the_line_that_makes_one(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        entry.main(lambda: peers.main(["--peer", "dreamerv3-torch", "--checkouts", str(tmp_path)]))
    assert end.value.code == MissingLibraryError.exit_code
    checkout, folder = peers.BY_NAME["dreamerv3-torch"].checkout, tmp_path / "dreamerv3-torch"
    assert capsys.readouterr().err == (
        f"error: dreamerv3-torch: no checkout of it; git clone {checkout.url} {folder} "
        f"&& git -C {folder} checkout {checkout.commit}\n"
    )


def git(folder: Path, *arguments: str) -> str:
    who = ["-c", "user.name=a", "-c", "user.email=a@example.com", "-c", "core.hooksPath=/dev/null"]
    command = ["git", "-C", str(folder), *who, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_a_peer_can_run_on_the_python_that_runs_ours(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(places, "checked_out", lambda checkout, folder, name: folder)
    monkeypatch.setenv("PYTHONPATH", "/carried")
    monkeypatch.setattr(places, "interpreter", None)  # nothing is installed
    monkeypatch.setattr(places.metadata, "version", lambda package: f"{package} 0.9")
    found = places.program(peers.BY_NAME["sheeprl"], tmp_path, tmp_path, "cuda", here=True)
    assert (found.command[0], found.version) == (sys.executable, "sheeprl 0.9")
    assert found.variables["PYTHONPATH"] == "/carried"
    found = places.program(peers.BY_NAME["dreamerv3-torch"], tmp_path, tmp_path, "cuda", here=True)
    assert found.variables["PYTHONPATH"] == f"{tmp_path / 'dreamerv3-torch'}:/carried"
    monkeypatch.setattr(places, "interpreter", lambda folder, packages, name: folder / "python")
    found = places.program(peers.BY_NAME["sheeprl"], tmp_path, tmp_path, "cuda")
    assert "PYTHONPATH" not in found.variables  # with an environment of its own it must not see our packages
    monkeypatch.undo()
    with pytest.raises(SystemExit) as end:
        entry.main(lambda: peers.main(["--device", "cpu", "--here"]))
    assert end.value.code == MissingLibraryError.exit_code
    assert capsys.readouterr().err.startswith("error: sheeprl: it is not installed here; leave out --here")


def test_a_checkout_is_that_of_its_commit(tmp_path):
    git(tmp_path, "init", "-q")
    git(tmp_path, "commit", "-q", "--allow-empty", "-m", "first")
    commit = git(tmp_path, "rev-parse", "HEAD")
    checkout = Checkout("https://example.com/someone/something", commit)
    assert checkout.name == "something"
    assert places.checked_out(checkout, tmp_path, "peer") == tmp_path
    other = dataclasses.replace(checkout, commit="0" * 40)
    with pytest.raises(MissingLibraryError) as error:
        places.checked_out(other, tmp_path, "peer")
    switch = f"git -C {tmp_path} checkout {other.commit}"
    assert (
        str(error.value) == f"peer: its checkout is not the one that is timed: at commit {commit}; {switch}"
    )


def test_a_peer_is_imported_from_the_folders_of_its_checkout(tmp_path, monkeypatch):
    monkeypatch.setattr(places, "checked_out", lambda checkout, folder, name: folder)
    monkeypatch.setattr(places, "interpreter", lambda folder, packages, name: folder / "python")
    peer = peers.BY_NAME["harmonydream-jax"]
    found = places.program(peer, tmp_path / "place", tmp_path / "checkouts", "cpu")
    folder = tmp_path / "checkouts" / "HarmonyDream"
    assert found.variables["PYTHONPATH"] == ":".join(str(folder / path) for path in peer.paths)
    assert found.command[0] == str(tmp_path / "place" / "harmonydream-jax" / "python")
    assert Path(found.command[1]).exists()
    assert found.version == "0a22e33"


TELLING = """
from bench.peers.turns import serve

def build(settings):
    about = {"gflop": 1.0, "parameters": 1, "threads": 1, "on": "torch 2", "rep_loss": settings.get("rep_loss")}
    return lambda: None, {**about, "precision": settings["precision"]}

serve(build)
"""


def test_a_peer_is_left_out_of_a_precision_that_it_does_not_have(tmp_path, monkeypatch, capsys):
    """With other programs in place of the peers and of ours: the sections, the messages, and the numbers."""
    start = [sys.executable, "-c", TELLING]
    monkeypatch.setattr(peers, "OURS", Program("hdfast", start, "0"))
    monkeypatch.setattr(
        peers, "program", lambda peer, *_, **__: Program(peer.name, start, peer.version, None, peer.options)
    )
    file = tmp_path / "numbers.json"
    options = ["--rounds", "2", "--device", "cpu", "--json", str(file)]
    peers.main(["--peer", "r2dreamer-decoder", "dreamerv3-torch", *options])
    said = capsys.readouterr().out
    assert said.count("small, B16 x T64, H15") == 3
    assert said.count("no bfloat16 in dreamerv3-torch\n") == said.count("\nno ") == 1
    results = json.loads(file.read_text())["results"]
    names = ["r2dreamer-decoder", "dreamerv3-torch", "hdfast"]
    assert [[name for name in names if name in one] for one in results] == [
        names,
        names,
        [names[0], names[2]],
    ]
    for one, precision in zip(results, ["default", "float32", "bfloat16"], strict=True):
        assert one["r2dreamer-decoder"]["rep_loss"] == "dreamer"
        assert one["hdfast"]["precision"] == precision
        assert len(one["hdfast"]["seconds"]) == 2
    peers.main(["--peer", "dreamerv3-torch", "--precision", "bfloat16", *options])
    assert capsys.readouterr().out == "no bfloat16 in dreamerv3-torch\n\n"


def test_a_wrong_flag_is_answered_with_the_right_one():
    command = [sys.executable, "-m", "bench.peers", "--round", "1"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    assert "there is no option --round; did you mean '--rounds'" in result.stderr


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="this is no clone")
def test_what_is_installed_is_ignored_by_git():
    place = peers.PLACE.relative_to(ROOT)
    done = subprocess.run(["git", "check-ignore", "-q", f"{place}/sheeprl/bin/python"], cwd=ROOT)
    assert done.returncode == 0
