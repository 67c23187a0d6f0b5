import errno
import os
import pickle
import re
import signal
import subprocess
import sys
import traceback

import pytest

from hdfast.runtime import errors


def test_a_message_is_one_line_what_where_hint():
    error = errors.ConfigError("no size 'smol'", where="--size", hint="did you\nmean 'small'?")
    assert str(error) == "--size: no size 'smol'; did you mean 'small'?"
    assert str(errors.RunError("plain")) == "plain"


def test_suggest_ends_a_message_whether_appended_or_given_as_hint():
    end = errors.suggest("smol", ["tiny", "small"])
    assert end == "; did you mean 'small'?"
    assert str(errors.ConfigError(f"no size 'smol'{end}")) == str(
        errors.ConfigError("no size 'smol'", hint=end)
    )


@pytest.mark.parametrize(
    ("name", "choices", "end"),
    [
        ("pong", ["Pong", "Qbert"], "; did you mean 'Pong'?"),
        ("walk", ["walker", "walker2", "hopper"], "; did you mean 'walker' or 'walker2'?"),
        ("zzz", ["a", "b"], "; choose from 'a', 'b'"),
        ("zzz", [f"a{i}" for i in range(20)], " and 8 more"),
        ("zzz", [], ""),
    ],
)
def test_suggest_names_the_nearest_or_lists(name, choices, end):
    assert errors.suggest(name, choices).endswith(end)


def test_every_error_survives_pickling():
    for error in (
        errors.ConfigError("what", where="there", hint="try", details=["a", "b"]),
        errors.Interrupted(signal.SIGTERM),
    ):
        copy = pickle.loads(pickle.dumps(error))
        assert (str(copy), copy.exit_code, copy.details) == (str(error), error.exit_code, error.details)


def test_a_traceback_tells_the_details_too():
    error = errors.ConfigError("what", details=["a: 1 -> 2"])
    assert "".join(traceback.format_exception(error)).endswith("ConfigError: what\n  a: 1 -> 2\n")


def test_disk_errors_tell_a_full_disk_from_another_trouble():
    full, denied = (OSError(number, os.strerror(number)) for number in (errno.ENOSPC, errno.EACCES))
    with (
        pytest.raises(
            errors.DiskFullError, match=r"^/x: cannot write it: No space left on device; make room"
        ),
        errors.disk_errors("/x", "write it"),
    ):
        raise full
    with (
        pytest.raises(errors.RunError, match=r"^/x: cannot write it: Permission denied; elsewhere$"),
        errors.disk_errors("/x", "write it", hint="elsewhere"),
    ):
        raise denied


SMALLER = "a smaller --size, --replay.batch, --replay.length or --replay.capacity takes less"
DOOR = "from hdfast.runtime.entry import main\nfrom hdfast.runtime.errors import *\n"


def run_door(body):
    code = f"{DOOR}import errno, signal\ndef door():\n {body}\nmain(door)"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("body", "code", "stderr"),
    [
        ("pass", 0, ""),
        ("return 7", 7, ""),
        ("raise ConfigError('no', hint='yes', details=['a: 1 -> 2'])", 2, "error: no; yes\n  a: 1 -> 2\n"),
        ("raise RunError('stop')", 1, "error: stop\n"),
        ("raise CheckpointError('stop')", 3, "error: stop\n"),
        ("raise NonFiniteError('nan')", 5, "error: nan\n"),
        ("raise MissingLibraryError('gl')", 6, "error: gl\n"),
        ("raise MemoryError", 1, f"error: there is not enough memory; {SMALLER}\n"),
        (
            "import torch; torch.empty(2**60, dtype=torch.uint8)",
            1,
            f"error: there is not enough memory for 1152921504606846976 bytes; {SMALLER}\n",
        ),
        (
            "import torch; raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.5 GiB. GPU 0')",
            1,
            f"error: there is not enough memory for 2.5 GiB; {SMALLER}\n",
        ),
        (
            "from rich import no_such_name as _",
            6,
            "error: rich does not load: cannot import name 'no_such_name' from 'rich' (PLACE); "
            "pip install --force-reinstall rich\n",
        ),
        (
            "raise Interrupted(signal.SIGTERM)",
            143,
            "error: stopped by SIGTERM; the same command resumes it\n",
        ),
        ("raise KeyboardInterrupt", 130, "error: stopped by SIGINT\n"),
        (
            "raise OSError(errno.ENOSPC, 'No space left on device', '/x')",
            4,
            "error: /x: No space left on device; make room and run it again\n",
        ),
        (
            "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40)); "
            "files = [open('/dev/null') for _ in range(50)]",
            1,
            "error: too many open files: this process may have 40; "
            "`ulimit -n` allows more, and fewer --env.num-envs need less\n",
        ),
    ],
)
def test_main_turns_errors_into_one_line_and_a_code(body, code, stderr):
    result = run_door(body)
    said = re.sub(r"\(/\S+\)", "(PLACE)", result.stderr)
    assert (result.returncode, said) == (code, stderr)


def test_main_tells_what_is_logged_as_a_warning():
    result = run_door("import logging; logging.getLogger('a.b').warning('%s\\nis odd', 'it')")
    assert (result.returncode, result.stderr) == (0, "warning: it is odd\n")
    result = run_door("import logging; logging.getLogger('a.b').info('it')")
    assert (result.returncode, result.stderr) == (0, "")


def test_main_tells_a_warning_of_python_in_one_line_without_its_place():
    result = run_door("import warnings; warnings.warn('\\x1b[33mWARN: it\\nis odd\\x1b[0m')")
    assert (result.returncode, result.stderr) == (0, "warning: it is odd\n")


def test_ctrl_c_while_a_door_is_imported_is_one_line(tmp_path):
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt")
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    command, environment = [sys.executable, "-m", "hdfast.train"], {**os.environ, "PYTHONPATH": path}
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert (result.returncode, result.stderr) == (130, "error: stopped by SIGINT\n")


def test_main_keeps_the_traceback_of_the_unexpected():
    for body in (
        "1 / 0",
        "import hdfast.no_such_module",
        "raise ImportError('of something else', name='else')",
        "raise BrokenPipeError(32, 'of an environment')",
        "raise OSError(errno.EIO, 'disk')",
    ):
        result = run_door(body)
        assert result.returncode == 1
        assert result.stderr.startswith("Traceback")


@pytest.mark.parametrize(
    ("hidden", "argv", "message"),
    [
        ("rich", ["report"], "hdfast needs rich; pip install rich"),
        ("numpy", ["sweep", "--help"], "hdfast needs numpy; pip install numpy"),
        ("PIL", ["train"], "hdfast needs PIL; pip install pillow"),
        ("safetensors", ["evaluate", "runs"], "hdfast needs safetensors; pip install safetensors"),
        ("tyro", ["train", "--dry-run"], "hdfast needs tyro; pip install tyro"),
        (
            "gymnasium",
            ["train", "--suite", "gym", "--task", "CartPole-v1", "--dry-run", "--device", "cpu"],
            "hdfast needs gymnasium; pip install gymnasium",
        ),
        (
            "typing_extensions",
            ["train", "--help"],
            "torch does not load: import of typing_extensions halted; None in sys.modules; pip install torch",
        ),
    ],
)
def test_a_package_that_is_not_there_is_one_line_of_every_door(tmp_path, hidden, argv, message):
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules[{hidden!r}] = None\n")
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    command = [sys.executable, "-m", f"hdfast.{argv[0]}", *argv[1:]]
    environment = {**os.environ, "PYTHONPATH": path}
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert (result.returncode, result.stdout, result.stderr) == (6, "", f"error: {message}\n")


def run_unread(body):
    """Runs a command whose stdout nobody reads; returns its exit code and stderr."""
    code = f"{DOOR}def door():\n {body}\nmain(door)"
    buffered = {**os.environ, "PYTHONUNBUFFERED": ""}
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=buffered
    )
    process.stdout.close()
    said = process.stderr.read()
    process.stderr.close()
    return process.wait(60), said


@pytest.mark.parametrize("count", [1, 200_000])  # noticed when the buffer is flushed at the end, or before
def test_main_ends_silently_when_its_reader_has_gone(count):
    assert run_unread(f"print('x' * {count})") == (141, "")


@pytest.mark.parametrize("body", ["print('x')", "print('x' * 200_000)", "print('x'); raise SystemExit(0)"])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_main_tells_in_one_line_that_stdout_has_no_room(body, unbuffered):
    code = f"{DOOR}def door():\n {body}\nmain(door)"
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=environment)
    assert done.returncode == 4
    assert done.stderr.count("\n") == 1
    assert done.stderr.endswith("No space left on device; make room and run it again\n")


def test_what_was_wrong_is_told_even_when_stdout_has_no_room():
    code = f"{DOOR}def door():\n print('x'); raise ConfigError('no')\nmain(door)"
    with open("/dev/full", "w") as full:
        environment = {**os.environ, "PYTHONUNBUFFERED": ""}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=environment)
    assert (done.returncode, done.stderr) == (2, "error: no\n")


def test_an_error_is_told_even_when_the_reader_of_stdout_has_gone():
    assert run_unread("print('x'); raise ConfigError('no')") == (141, "error: no\n")
