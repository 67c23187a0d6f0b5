"""Ops do nothing that a CUDA graph cannot record: no value is read on the host, no shape depends on data.

Tensors on the meta device have shapes but no values, so that both fail at once.
"""

import pytest
import torch

from hdfast_kernels import Harmonizer, dispatch, report_cases
from hdfast_kernels.harmonizer import MODES


@pytest.mark.parametrize("case", report_cases.cases(), ids=lambda case: f"{case.op}-{case.role}")
def test_references_need_no_values(case):
    case.call(dispatch.implementation(case.op, "reference"))


@pytest.mark.parametrize("mode", MODES)
def test_harmonizer_needs_no_values(mode):
    harmonizer = Harmonizer({"reward": {"reward": 1.0}, "kl": {"dyn": 0.8, "rep": 0.2}}, mode=mode).to("meta")
    losses = {name: report_cases.meta(64, 16, grad=True) for name in ("reward", "dyn", "rep", "cont")}
    total, metrics = harmonizer(losses)
    total.backward()
    assert losses["dyn"].grad.shape == (64, 16)
    assert all(metric.is_meta for metric in metrics.values())


def test_a_host_read_would_be_seen():
    with pytest.raises(RuntimeError, match="meta"):
        torch.empty(3, device="meta").sum().item()
