"""For all tests: OpenMP threads sleep while they wait, float32 is not TF32, GPU tests are skipped without a GPU."""

import os

# Before torch is imported. Threads that spin at every barrier make the suite many times slower if anything else runs on
# the machine: on two busy cores a small torch op took 1.7 ms instead of 0.4 ms.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from collections.abc import Iterator

import pytest
import torch

torch.backends.cudnn.allow_tf32 = False  # as in a run, see `hdfast.runtime.device.prepare_device`


@pytest.fixture(autouse=True, scope="session")
def _nothing_remembered(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests do not depend on what hdfast.tune found on this machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HDFAST_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
