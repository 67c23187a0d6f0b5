"""What the compile report compiles: every op with Triton kernels, at the shapes of training, on meta tensors."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import dispatch
from .onehot_linear import onehot_matrix


@dataclass(frozen=True)
class Case:
    """One call of an op, at the shapes of one role in training."""

    op: str
    role: str
    call: Callable[
        [Callable[..., Any]], Any
    ]  # takes the op's implementation with Triton kernels, calls it and its backward
    quick: bool = False  # among the few that the test suite compiles every time
    backend: str = "triton"


def with_kernels(op: str, backend: str = "triton") -> Callable[..., Any]:
    """The implementation of an op that launches Triton kernels."""
    return dispatch.implementation(op, backend)


def meta(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> Tensor:
    """A tensor without memory: kernels see its shape, dtype and 16-byte alignment."""
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=grad)


def backward(*outputs: Tensor) -> None:
    """Run the backward pass of those outputs, as a loss of all of them would."""
    torch.autograd.backward(outputs, [torch.empty_like(output) for output in outputs])


def cases() -> list[Case]:
    """Every op at its training shapes: B*T = 1,024 rows of the world model, 16 x 1,024 of imagination.

    bfloat16 activations with float32 parameters, as mixed precision has them, and float32. Sizes: small (D = U = 512,
    depth 32), medium (D = 1,024, U = 640, depth 48), large (D = 2,048, U = 768), xlarge (D = 4,096).
    """
    low, full = torch.bfloat16, torch.float32

    def layer_norm_silu(rows: int, channels: int, dtype: torch.dtype):
        def call(op):
            affine = meta(channels, grad=True), meta(channels, grad=True)
            backward(op(meta(rows, channels, dtype=dtype, grad=True), *affine, 1e-3))

        return call

    def layer_norm_silu_into(rows: int, channels: int, width: int):
        def call(op):
            place = meta(rows, width, dtype=low)[:, -channels:]
            op(meta(rows, channels, dtype=low), meta(channels), meta(channels), 1e-3, place)

        return call

    def layer_norm_gru(rows: int, deter: int, dtype: torch.dtype):
        def call(op):
            gates, affine = meta(rows, 3 * deter, dtype=dtype, grad=True), meta(3 * deter, grad=True)
            backward(op(gates, meta(rows, deter, grad=True), affine, affine, 1e-3))

        return call

    def layer_norm_gru_into(rows: int, deter: int, width: int):
        def call(op):
            affine, rounded = meta(3 * deter), meta(rows, width, dtype=low)[:, :deter]
            op(
                meta(rows, 3 * deter, dtype=low), meta(rows, deter), affine, affine, 1e-3,
                meta(rows, deter), rounded,
            )  # fmt: skip

        return call

    def onehot_linear(rows: int, units: int, dtype: torch.dtype, groups: int = 32, classes: int = 32):
        def call(op):
            index = meta(rows, groups, dtype=torch.int64)
            weight = meta(groups * classes, units, dtype=dtype, grad=True)
            latent = meta(rows, groups, classes, dtype=dtype, grad=True)
            onto = meta(rows, units, dtype=dtype, grad=True)
            backward(op(index, weight, latent, onto))
            if op is with_kernels("onehot_linear"):
                onehot_matrix(index, classes, dtype)

        return call

    def sample_onehot(rows: int, dtype: torch.dtype):
        def call(op):
            stoch, _, logp = op(meta(rows, 32, 32, dtype=dtype, grad=True), meta(rows, 32), 0.01)
            backward(stoch, logp)

        return call

    def sample_index(rows: int, groups: int, classes: int, dtype: torch.dtype):
        return lambda op: op(meta(rows, groups, classes, dtype=dtype), meta(rows, groups), 0.01)

    def sample_index_into(rows: int, groups: int, classes: int):
        def call(op):
            out, dense = meta(rows, groups, dtype=torch.int64), meta(rows, groups * classes, dtype=low)
            op(meta(rows, groups, classes, dtype=low), meta(rows, groups), 0.01, out, dense)

        return call

    def kl_balance(op):
        backward(*op(meta(64, 16, 32, 32, grad=True), meta(64, 16, 32, 32, grad=True), 1.0)[:2])

    def two_hot_loss(rows: int, dtype: torch.dtype, width: int = 255):
        return lambda op: backward(
            op(meta(rows, width, dtype=dtype, grad=True)[:, :255], meta(rows), -20.0, 20.0)
        )

    def two_hot_mean(rows: int, dtype: torch.dtype, width: int = 255):
        return lambda op: backward(op(meta(rows, width, dtype=dtype, grad=True)[:, :255], -20.0, 20.0))

    def image_input(dtype: torch.dtype):
        return lambda op: op(meta(64, 16, 64, 64, 3, dtype=torch.uint8), dtype)

    def image_loss(dtype: torch.dtype):
        frames = 64, 16, 64, 64, 3
        return lambda op: backward(
            op(meta(*frames, dtype=dtype, grad=True), meta(*frames, dtype=torch.uint8))
        )

    def image_deconv(side: int, inputs: int, dtype: torch.dtype):
        def call(op):
            weight, bias = meta(inputs, 3, 4, 4, grad=True), meta(3, grad=True)
            backward(op(meta(1024, side, side, inputs, dtype=dtype, grad=True), weight, bias))

        return call

    def strided_conv(side: int, outputs: int, dtype: torch.dtype):
        def call(op):
            weight = meta(outputs, 3, 4, 4, grad=True)
            backward(op(meta(1024, side, side, 3, dtype=dtype, grad=True), weight))

        return call

    def harmony_loss(op):
        losses = [meta(64, 16, grad=True) for _ in range(6)]
        group, weight, regularizer = (
            (0, 1, 2, 2, -1, -1),
            (1.0, 1.0, 5 / 6, 1 / 6, 1.0, 1.0),
            (1.0, 1.0, 5 / 6),
        )
        backward(op(losses, meta(3, grad=True), group, weight, regularizer)[0])

    def lambda_return(op):
        backward(
            op(meta(15, 1024, grad=True), meta(16, 1024), meta(16, 1024, grad=True), 1 - 1 / 333, 0.95)[0]
        )

    def adam_step(*numbers: int):
        def call(op):
            tensors = ([meta(one) for one in numbers] for _ in range(4))
            scalars = meta(), 1e-4, (0.9, 0.999), 1e-8, 0.0, 1000.0, meta(dtype=torch.bool)
            op(*tensors, *scalars)

        return call

    def gather_windows(row: tuple[int, ...], dtype: torch.dtype):
        return lambda op: op(meta(100_000, *row, dtype=dtype), meta(16, dtype=torch.int64), 64, 100_000)

    def rssm_observe(T: int, B: int, D: int, U: int, dtype: torch.dtype, S: int = 32, K: int = 32):
        def call(op):
            def full(*shape: int) -> Tensor:
                return meta(*shape, grad=True)

            def low(*shape: int) -> Tensor:
                return meta(*shape, dtype=dtype, grad=True)

            deter, stoch, _, logp = op(
                *(low(T, B, U), low(T, B, U), meta(T, B, dtype=torch.bool), meta(T, B, S)),
                *(full(D), meta(S, dtype=torch.int64), low(S * K, U), full(U), full(U)),
                *(low(3 * D, D + U), full(3 * D), full(3 * D), low(U, D), full(U), full(U)),
                *(low(S * K, U), full(S * K), 0.01, 1e-3),
            )
            backward(deter, stoch, logp)

        return call

    def one_launch(role: str, call, quick: bool = False) -> Case:
        return Case("rssm_observe", f"one launch, {role}", call, quick, "persistent")

    return [
        Case("adam_step", "small 17.9M fp32", adam_step(17_900_032), quick=True),
        Case("adam_step", "two of odd sizes fp32", adam_step(1023, 1025)),
        Case("gather_windows", "64x16 frames 64x64x3", gather_windows((64, 64, 3), torch.uint8), quick=True),
        Case("gather_windows", "64x16 flags", gather_windows((), torch.bool)),
        Case("layer_norm_silu", "hidden 1024x512 bf16", layer_norm_silu(1024, 512, low), quick=True),
        Case("layer_norm_silu", "hidden 1024x512 fp32", layer_norm_silu(1024, 512, full)),
        Case("layer_norm_silu", "imagined 16384x512 bf16", layer_norm_silu(16384, 512, low)),
        Case("layer_norm_silu", "medium 1024x640 bf16", layer_norm_silu(1024, 640, low)),
        Case("layer_norm_silu", "vector 1024x1024 bf16", layer_norm_silu(1024, 1024, low)),
        Case("layer_norm_silu", "wide 1024x2048 bf16", layer_norm_silu(1024, 2048, low)),
        Case("layer_norm_silu", "into 1024x512 of 1024 bf16", layer_norm_silu_into(1024, 512, 1024)),
        Case("layer_norm_silu", "encoder 32x32x32 bf16", layer_norm_silu(1024 * 1024, 32, low), quick=True),
        Case("layer_norm_silu", "encoder 32x32x32 fp32", layer_norm_silu(1024 * 1024, 32, full)),
        Case("layer_norm_silu", "encoder 32x32x48 bf16", layer_norm_silu(1024 * 1024, 48, low)),
        Case("layer_norm_silu", "encoder 4x4x256 bf16", layer_norm_silu(1024 * 16, 256, low)),
        Case("layer_norm_gru", "observe 16x512 bf16", layer_norm_gru(16, 512, low)),
        Case("layer_norm_gru", "imagine 1024x512 bf16", layer_norm_gru(1024, 512, low), quick=True),
        Case("layer_norm_gru", "imagine 1024x512 fp32", layer_norm_gru(1024, 512, full)),
        Case("layer_norm_gru", "into 1024x512 of 1024 bf16", layer_norm_gru_into(1024, 512, 1024)),
        Case("layer_norm_gru", "medium 1024x1024 bf16", layer_norm_gru(1024, 1024, low)),
        Case("layer_norm_gru", "large 1024x2048 bf16", layer_norm_gru(1024, 2048, low)),
        Case("layer_norm_gru", "xlarge 1024x4096 bf16", layer_norm_gru(1024, 4096, low)),
        Case("layer_norm_gru", "xlarge 1024x4096 fp32", layer_norm_gru(1024, 4096, full)),
        Case("onehot_linear", "observe 16x32 to 512 bf16", onehot_linear(16, 512, low)),
        Case("onehot_linear", "imagine 1024x32 to 512 bf16", onehot_linear(1024, 512, low), quick=True),
        Case("onehot_linear", "imagine 1024x32 to 512 fp32", onehot_linear(1024, 512, full)),
        Case("onehot_linear", "actor-critic 16384x32 to 512 bf16", onehot_linear(16384, 512, low)),
        Case("onehot_linear", "actor-critic 16384x32 to 512 fp32", onehot_linear(16384, 512, full)),
        Case("onehot_linear", "medium 1024x32 to 640 bf16", onehot_linear(1024, 640, low)),
        Case("onehot_linear", "xlarge 1024x32 to 4096 bf16", onehot_linear(1024, 4096, low)),
        Case("onehot_linear", "1024 actions, 1024 to 512 bf16", onehot_linear(1024, 512, low, 1, 1024)),
        Case("onehot_linear", "1024 actions, 1024 to 512 fp32", onehot_linear(1024, 512, full, 1, 1024)),
        Case("sample_onehot", "imagine 1024x32x32 bf16", sample_onehot(1024, low), quick=True),
        Case("sample_onehot", "imagine 1024x32x32 fp32", sample_onehot(1024, full)),
        Case("sample_index", "imagine 1024x32x32 bf16", sample_index(1024, 32, 32, low), quick=True),
        Case("sample_index", "imagine 1024x32x32 fp32", sample_index(1024, 32, 32, full)),
        Case("sample_index", "into 1024x32x32 bf16", sample_index_into(1024, 32, 32)),
        Case("sample_index", "actions 1024x1x18 bf16", sample_index(1024, 1, 18, low)),
        Case("kl_balance", "observed 64x16x32x32 fp32", kl_balance, quick=True),
        Case("two_hot_loss", "imagined 15360x255 bf16", two_hot_loss(15360, low), quick=True),
        Case("two_hot_loss", "imagined 15360x255 of 256 bf16", two_hot_loss(15360, low, 256)),
        Case("two_hot_loss", "reward 1024x255 fp32", two_hot_loss(1024, full)),
        Case("two_hot_mean", "imagined 16384x255 bf16", two_hot_mean(16384, low), quick=True),
        Case("two_hot_mean", "imagined 16384x255 of 256 bf16", two_hot_mean(16384, low, 256)),
        Case("two_hot_mean", "imagined 16384x255 fp32", two_hot_mean(16384, full)),
        Case("image_input", "frames 64x16x64x64x3 bf16", image_input(low), quick=True),
        Case("image_input", "frames 64x16x64x64x3 fp32", image_input(full)),
        Case("image_loss", "frames 64x16x64x64x3 bf16", image_loss(low), quick=True),
        Case("image_loss", "frames 64x16x64x64x3 fp32", image_loss(full)),
        Case("image_deconv", "frames to 64x64x3 bf16", image_deconv(32, 32, low), quick=True),
        Case("image_deconv", "frames to 128x128x3 bf16", image_deconv(64, 48, low)),
        Case("strided_conv", "frames 64x64x3 bf16", strided_conv(64, 32, low), quick=True),
        Case("harmony_loss", "six of 64x16 fp32", harmony_loss, quick=True),
        Case("lambda_return", "imagined 15x1024 fp32", lambda_return, quick=True),
        Case("rssm_observe", "observe 64x16x512 bf16", rssm_observe(64, 16, 512, 512, low), quick=True),
        Case("rssm_observe", "observe 64x16x512 fp32", rssm_observe(64, 16, 512, 512, full)),
        Case("rssm_observe", "medium 64x16x1024 bf16", rssm_observe(64, 16, 1024, 640, low)),
        Case("rssm_observe", "medium 50x50x1024 bf16", rssm_observe(50, 50, 1024, 640, low)),
        Case("rssm_observe", "64x16x512, 64 classes bf16", rssm_observe(64, 16, 512, 512, low, 32, 64)),
        one_launch("small 64x16x512 bf16", rssm_observe(64, 16, 512, 512, low), quick=True),
        one_launch("small 64x16x512 fp32", rssm_observe(64, 16, 512, 512, full)),
    ]
