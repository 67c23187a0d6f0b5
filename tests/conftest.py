"""What holds for every test: OpenMP threads that wait asleep, and no GPU tests without a GPU."""

import os

# Before torch is imported. Threads that spin at every barrier make the suite many times slower wherever something
# else runs on the machine: a small torch op took 1.7 ms against 0.4 ms on two busy cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
