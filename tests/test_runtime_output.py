"""Outputs that are closed, or whose encoding lacks a character: a run and its tables are the same as elsewhere."""

import io
import os
import subprocess
import sys

import pytest

from hdfast import evaluate, report, sweep, train
from hdfast.runtime import entry
from hdfast.runtime.console import Console
from hdfast.runtime.output import encodable
from tests.loop_cases import PYTHONPATH, flags, one_thread, path_of, tiny  # noqa: F401
from tests.test_report import finish


def ended(main, argv, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["door", *argv])
    with pytest.raises(SystemExit) as stop:
        entry.main(main)
    return stop.value.code


@pytest.mark.parametrize("closed", [["stdout"], ["stderr"], ["stdout", "stderr"]], ids=" ".join)
def test_doors_with_closed_outputs_do_the_same(tmp_path, monkeypatch, capfd, closed):
    logdir, run = ["--logdir", str(tmp_path)], path_of(tiny(tmp_path))
    calls = [
        (train.main, [*flags(), *logdir], 0),
        (train.main, [*flags(), *logdir], 0),  # finished already
        (train.main, [*flags(), *logdir, "--rssm.deter", "8"], 2),
        (train.main, [*flags(), *logdir, "--seed", "1", "--agent-steps", "1"], 0),  # with a warning
        (report.main, logdir, 0),
        (report.main, ["--logdir", str(tmp_path / "no")], 2),
        (evaluate.main, [str(run), "--episodes", "2", "--device", "cpu"], 0),
        (evaluate.main, [str(tmp_path)], 2),
    ]
    if len(closed) == 2:
        calls.append((sweep.main, ["--suite", "demo", "--seeds", "1", "--", *flags()[2:], *logdir], 0))
    for main, argv, code in calls:
        for name in closed:
            monkeypatch.setattr(sys, name, None)
        assert ended(main, argv, monkeypatch) == code, (main, argv)
    assert (run / "finished.json").exists()
    out, err = capfd.readouterr()
    said = {"stdout": "Catch" in out, "stderr": "error: " in err}
    assert [name for name, heard in said.items() if not heard] == closed


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_no_file_takes_the_number_of_an_output_that_is_closed(tmp_path, closed):
    """Otherwise that file would get what a C library prints to the output."""
    code = (
        "import os, sys; from hdfast.runtime import entry, errors\n"
        "def door():\n"
        f" with open({str(tmp_path / 'file')!r}, 'w') as file: assert file.fileno() > 2\n"
        " for number in (1, 2): os.write(number, b'said')\n"
        " print('told'); errors.warn('told'); sys.stderr.write('told')\n"
        " return 7\n"
        "entry.main(door)"
    )
    shell = ["sh", "-c", f'exec "$@" {closed}', "sh", sys.executable, "-c", code]
    environment = {**os.environ, "PYTHONPATH": PYTHONPATH}
    done = subprocess.run(shell, env=environment, capture_output=True, text=True, timeout=60)
    out = "" if ">&-" in closed.split() else "saidtold\n"
    err = "" if "2>&-" in closed else "saidwarning: told\ntold"
    assert (done.returncode, done.stdout, done.stderr) == (7, out, err)
    assert (tmp_path / "file").read_bytes() == b""


@pytest.mark.parametrize(
    ("encoding", "text"), [("utf-8", "━±ö…"), ("latin-1", "-±ö..."), ("ascii", r"-+-\xf6...")]
)
def test_what_an_encoding_lacks_is_put_in_ascii(encoding, text):
    assert encodable("━±ö…", encoding) == text
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    Console(stream).print("━±ö…")
    assert stream.buffer.getvalue().decode(encoding) == text + "\n"
    assert encodable("\udcff", "utf-8") == r"\udcff"  # from a path that is not valid text


@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
def test_a_table_is_printed_in_every_encoding(tmp_path, monkeypatch, encoding):
    for seed in range(2):
        finish(tmp_path / "größe", "Catch", seed, float(seed), suite="demo")
    finish(tmp_path / "other", "Catch", 0, 0.5, suite="demo")
    argv = ["--logdir", *(str(tmp_path / name) for name in ("größe", "other"))]
    environment = {**os.environ, "PYTHONPATH": PYTHONPATH, "PYTHONIOENCODING": encoding}
    command = [sys.executable, "-m", "hdfast.report", *argv]
    done = subprocess.run(command, env=environment, capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, b"")
    plus = "+-" if encoding == "ascii" else "±"
    out = done.stdout.decode(encoding)
    assert f"mean over seeds {plus} standard error" in out
    (row,) = (line for line in out.splitlines() if "Catch" in line)
    assert row.split("|")[3].strip() == f"0.50 {plus} 0.50"
