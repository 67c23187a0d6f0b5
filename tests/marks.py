"""Marks that tests of several files carry."""

import pytest
import torch

from hdfast_kernels import dispatch

# On a machine with a GPU, torch and little else; where there is no GPU, a missing module is a fault to be seen.
needs_native = pytest.mark.skipif(
    torch.cuda.is_available() and not dispatch.native_built(), reason="the C++ module gathers on the host"
)
