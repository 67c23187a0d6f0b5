"""What tests of replay do where the C++ module is not built."""

from collections.abc import Iterator

import pytest
import torch

from hdfast_kernels import dispatch


@pytest.fixture(autouse=True)
def definitions_on_the_host() -> Iterator[None]:
    """Import it where a replay on the host gathers: without the C++ module it then does so by definition.

    On a machine with a GPU, torch and little else; where there is no GPU, a missing module is a fault to be seen.
    """
    if dispatch.native_built() or not torch.cuda.is_available():
        yield
        return
    before = dispatch.use("cpu", {})
    yield
    dispatch.use("cpu", before)
