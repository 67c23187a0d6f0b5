import contextlib
import json
from pathlib import Path

import numpy as np
import pytest

from hdfast.runtime import files


def test_plain_gives_json_of_every_kind_that_a_run_holds():
    value = {
        "path": Path("runs") / "x",
        "tuple": (1, 2.5, None, True),
        "array": np.array([[1.5, np.nan]]),
        "float32": np.float32(0.1),
        "int": np.int64(3),
        "flag": np.bool_(True),
        "bad": [float("inf"), -np.inf],
    }
    assert json.loads(json.dumps(files.plain(value), allow_nan=False)) == {
        "path": "runs/x",
        "tuple": [1, 2.5, None, True],
        "array": [[1.5, "NaN"]],
        "float32": 0.1,
        "int": 3,
        "flag": True,
        "bad": ["Infinity", "-Infinity"],
    }
    assert float("Infinity") == np.inf  # so that what is written can be read back


def test_plain_names_the_entry_it_cannot_write():
    with pytest.raises(TypeError, match=r"config\.env\[1\]\.f: function has no JSON form"):
        files.plain({"env": [0, {"f": test_plain_names_the_entry_it_cannot_write}]}, "config")
    with pytest.raises(TypeError, match="keys are strings, got 1"):
        files.plain({1: 2})


def test_replacing_leaves_the_old_file_when_the_block_fails(tmp_path):
    path = tmp_path / "a.json"
    files.write_json(path, {"old": 1})
    with contextlib.suppress(KeyboardInterrupt), files.replacing(path) as file:
        file.write(b"new")
        raise KeyboardInterrupt
    assert json.loads(path.read_text()) == {"old": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_write_all_goes_on_after_a_short_write():
    class Slow:
        taken = b""

        def write(self, data):
            self.taken += bytes(data[:3])
            return min(3, len(data))

    slow = Slow()
    files.write_all(slow, b"0123456789")
    assert slow.taken == b"0123456789"
