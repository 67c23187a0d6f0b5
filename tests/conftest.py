"""For all tests: OpenMP threads sleep while they wait, float32 is not TF32, GPU tests are skipped without a GPU."""

import os

# Before torch is imported. Threads that spin at every barrier make the suite many times slower if anything else runs on
# the machine: on two busy cores a small torch op took 1.7 ms instead of 0.4 ms.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

torch.backends.cudnn.allow_tf32 = False  # as in a run, see `hdfast.runtime.device.prepare_device`

NUMBER = itertools.count()


@pytest.fixture(autouse=True, scope="session")
def _nothing_remembered(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests do not depend on what hdfast.tune found on this machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HDFAST_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Makes a module of some text, and returns its name, which no other test's has."""
    monkeypatch.syspath_prepend(tmp_path)

    def make(text: str) -> str:
        name = f"my_agent_{next(NUMBER)}"
        (tmp_path / f"{name}.py").write_text(text)
        return name

    return make


@pytest.fixture
def named(module: Callable[[str], str]) -> Callable[[str], str]:
    """Makes a module of some text, and returns the name of its class Mine."""
    return lambda text: f"{module(text)}:Mine"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
