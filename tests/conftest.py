"""What holds for every test: OpenMP threads that wait asleep, float32 that is float32, no GPU tests without a GPU."""

import os

# Before torch is imported. Threads that spin at every barrier make the suite many times slower wherever something
# else runs on the machine: a small torch op took 1.7 ms against 0.4 ms on two busy cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from collections.abc import Iterator

import pytest
import torch

torch.backends.cudnn.allow_tf32 = False  # as in a run, see `hdfast.runtime.device.prepare_device`


@pytest.fixture(autouse=True, scope="session")
def _nothing_remembered(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What hdfast.tune found on this machine decides no test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HDFAST_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
