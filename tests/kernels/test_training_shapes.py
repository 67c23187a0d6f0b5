"""Every op with as many rows as in training, 1,024 or 16,384 (imagination), on a GPU; with fewer rows on the CPU.

The tests of each op take small and odd shapes, on every backend; here are the many programs and the large offsets.
rssm_observe has no other test on a GPU.
"""

import functools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import test_harmony_loss
import test_image_deconv
import test_image_loss
import test_kl_balance
import test_lambda_return
import test_layer_norm_gru
import test_layer_norm_silu
import test_linear
import test_onehot_linear
import test_sample_onehot
import test_strided_conv
import test_two_hot
import torch
from checks import backends, check_against_fp64, floor_of, poisoned_memory
from rssm_observe_cases import Sizes, cast, expected, make_case
from test_rssm_observe import op, run
from test_rssm_observe_triton import triton_op
from torch import Tensor

import hdfast_kernels as hk
from hdfast_kernels import dispatch

OBSERVE, IMAGINE = 1024, 16 * 1024
FEWER = 64  # on the CPU rows are divided by this

Inputs = Callable[[int, torch.dtype, str], dict[str, Any]]
INPUTS: dict[tuple[str, int], Inputs] = {
    ("layer_norm_silu", IMAGINE): lambda n, *of: test_layer_norm_silu.inputs((n, 512), *of),
    ("layer_norm_silu", OBSERVE): lambda n, *of: test_layer_norm_silu.inputs((n, 32, 32, 32), *of),
    ("layer_norm_gru", OBSERVE): lambda n, *of: test_layer_norm_gru.inputs((n,), 512, *of),
    ("two_hot_mean", IMAGINE): lambda n, *of: {"logits": test_two_hot.logits((n, 255), *of, scale=0.5)},
    ("two_hot_loss", IMAGINE): lambda n, dtype, device: {
        "logits": test_two_hot.logits((n, 255), dtype, device),
        "target": test_two_hot.targets((n,), device),
    },
    ("image_loss", OBSERVE): lambda n, *of: test_image_loss.inputs((n, 64, 64, 3), *of),
    ("kl_balance", OBSERVE): lambda n, *of: test_kl_balance.inputs((n,), 32, 32, *of),
    ("sample_onehot", IMAGINE): lambda n, *of: test_sample_onehot.inputs((n,), 32, 32, *of),
    ("onehot_linear", OBSERVE): lambda n, *of: test_onehot_linear.inputs((n,), 32, 32, 512, *of),
    ("lambda_return", IMAGINE): lambda n, *of: test_lambda_return.inputs(15, n // 16, *of),
    ("image_deconv", OBSERVE): lambda n, *of: test_image_deconv.inputs((n, 32, 32, 32, 3), *of),
    ("strided_conv", OBSERVE): lambda n, *of: test_strided_conv.inputs((n, 32, 32, 32, 3), False, *of),
    ("linear", IMAGINE): lambda n, *of: test_linear.inputs((n,), 512, 255, *of),
    ("harmony_loss", OBSERVE): lambda n, *of: test_harmony_loss.inputs((n // 16, 16), *of),
}


def call(name: str, backend: str) -> Callable[..., Any]:
    if name == "harmony_loss":
        return test_harmony_loss.named(hk.harmony_loss, backend=backend)
    return partial(getattr(hk, name), backend=backend)


CASES = [
    pytest.param(name, rows, backend.values[0], id=f"{name}-{rows}-{backend.id}", marks=backend.marks)
    for name, rows in INPUTS
    for backend in backends(name, reference=False)
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("name", "rows", "backend"), CASES)
def test_errs_no_more_than_twice_plain_pytorch(name, rows, backend, dtype):
    fewer = 1 if backend.device == "cuda" else FEWER
    inputs = INPUTS[name, rows](rows // fewer, dtype, backend.device)
    check_against_fp64(call(name, backend.name), call(name, "reference"), inputs)


def test_every_op_with_a_kernel_is_here():
    kernels = dispatch.first_of(("triton", "fused")).keys()
    # sample_index draws like sample_onehot, image_input and gather_windows have no gradient, adam_step depends on no
    # shapes: their own tests have large inputs
    elsewhere = {"rssm_observe", "sample_index", "image_input", "gather_windows", "adam_step"}
    assert kernels == {name for name, _ in INPUTS} | elsewhere


SMALL = Sizes(T=3, B=5, D=32, U=48, S=4, K=8)
TRAINING = Sizes(T=3, B=16, D=512, U=512, S=32, K=32)


@functools.cache
def truth(sizes: Sizes, likely: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Arguments, outputs and gradients in float64."""
    case = make_case(sizes, likely=likely)
    return case, {name: value.detach() for name, value in run(expected, case).items()}


def scan_errors(function: Callable, sizes: Sizes, dtype: torch.dtype, device: str) -> dict[str, float]:
    """Relative root mean square errors of outputs and gradients against float64; classes must be equal."""
    case, theirs = truth(sizes, dtype == torch.bfloat16)
    there = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in cast(case, dtype).items()}
    ours = run(function, there)
    ours = {name: value.detach().cpu() for name, value in ours.items()}
    assert torch.equal(ours["index"], theirs["index"])
    floats = ours.keys() - {"index"}
    return {name: float((ours[name].double() - theirs[name]).norm() / theirs[name].norm()) for name in floats}


needs_native = pytest.mark.skipif(not dispatch.native_built(), reason="the C++ module is not built")
SCANS = [
    pytest.param(op("native"), "cpu", id="native", marks=needs_native),
    pytest.param(op("triton"), "cuda", id="triton-cuda", marks=pytest.mark.gpu),
    pytest.param(triton_op(persistent=True), "cuda", id="triton-cuda-persistent", marks=pytest.mark.gpu),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("sizes", [SMALL, TRAINING], ids=["small", "training"])
@pytest.mark.parametrize(("function", "device"), SCANS)
def test_rssm_observe_errs_no_more_than_twice_plain_pytorch(function, device, sizes, dtype):
    if device == "cpu" and sizes is TRAINING:
        pytest.skip("tests/kernels/test_rssm_observe.py has whole tiles for the CPU")
    plain = scan_errors(op("reference"), sizes, dtype, device)
    with poisoned_memory():
        fused = scan_errors(function, sizes, dtype, device)
    unit = floor_of(dtype, device) * torch.finfo(dtype).eps
    wrong = {name: (fused[name], plain[name]) for name in plain if not fused[name] <= 2 * plain[name] + unit}
    assert not wrong
