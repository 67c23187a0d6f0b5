"""For tests of replay on machines where the C++ module is not built."""

from collections.abc import Iterator

import pytest
import torch

from hdfast_kernels import dispatch


@pytest.fixture(autouse=True)
def definitions_on_the_host() -> Iterator[None]:
    """Importing it lets a replay on the host gather with the op's definition if the C++ module is missing.

    Only on a machine with a GPU, which may have torch and little else; elsewhere a missing module must show.
    """
    if dispatch.native_built() or not torch.cuda.is_available():
        yield
        return
    before = dispatch.use("cpu", {})
    yield
    dispatch.use("cpu", before)
