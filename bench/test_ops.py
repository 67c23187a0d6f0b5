"""Every op at the shapes of training, forward and backward, beside eager PyTorch in the same rounds.

`eager` is what one would write without the op, in the dtype of the activations; `reference`, `native`, `triton` and so
on are the op's backends; `compile` is torch.compile of eager, for a few ops. Groups are op, role and dtype: `observe`
has B16 x T64 rows, `imagine` 1,024 x 16, `conv` the activations of an encoder layer for 1,024 images (for
`strided_conv` those that it halves), `images` the images themselves.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import hdfast_kernels as hk
from bench.agent import backend
from bench.conftest import DEVICE
from hdfast_kernels import backends_available, dispatch

OBSERVE, IMAGINE = 16 * 64, 1024 * 16
D = U = 512
S = K = 32
BINS = 255
COMPILED = {"layer_norm_silu", "layer_norm_gru", "kl_balance", "two_hot_loss", "image_loss"}


def number(*shape: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    return (scale * torch.randn(shape, device=DEVICE)).to(dtype).requires_grad_()


def classes(rows: int) -> Tensor:
    return torch.randint(K, (rows, S), device=DEVICE)


def eager_layer_norm_silu(x, weight, bias):
    return F.silu(F.layer_norm(x, x.shape[-1:], weight.to(x.dtype), bias.to(x.dtype), 1e-3))


def eager_layer_norm_gru(gates, deter, weight, bias):
    normed = F.layer_norm(gates, gates.shape[-1:], weight.to(gates.dtype), bias.to(gates.dtype), 1e-3)
    reset, cand, update = normed.chunk(3, -1)
    update = torch.sigmoid(update - 1)
    return update * torch.tanh(torch.sigmoid(reset) * cand) + (1 - update) * deter


def eager_two_hot_loss(logits, target):
    """As in the PyTorch ports of DreamerV3: cross-entropy with a dense two-hot code."""
    bins = torch.linspace(-20, 20, BINS, device=logits.device)
    x = (torch.sign(target) * torch.log1p(target.abs())).unsqueeze(-1)
    below = ((bins <= x).sum(-1) - 1).clamp(0, BINS - 1)
    above = (BINS - (bins > x).sum(-1)).clamp(0, BINS - 1)
    equal, x = below == above, x.squeeze(-1)
    to_below = torch.where(equal, 1, (bins[below] - x).abs())
    to_above = torch.where(equal, 1, (bins[above] - x).abs())
    total = to_below + to_above
    code = F.one_hot(below, BINS) * (to_above / total).unsqueeze(-1)
    code = code + F.one_hot(above, BINS) * (to_below / total).unsqueeze(-1)
    return -(code * torch.log_softmax(logits.float(), -1)).sum(-1)


def eager_two_hot_mean(logits):
    bins = torch.linspace(-20, 20, BINS, device=logits.device)
    mean = (torch.softmax(logits.float(), -1) * bins).sum(-1)
    return torch.sign(mean) * torch.expm1(mean.abs())


def eager_image_input(image, dtype):
    return (image.float() / 255 - 0.5).to(dtype)


def eager_image_loss(pred, image):
    return (pred.float() - image.float() / 255).square().sum((-3, -2, -1))


def eager_image_deconv(x, weight, bias):
    kernel = weight.to(x.dtype, memory_format=torch.channels_last)
    out = F.conv_transpose2d(x.permute(0, 3, 1, 2), kernel, bias.to(x.dtype), stride=2, padding=1)
    return out.permute(0, 2, 3, 1)


def eager_strided_conv(x, weight):
    kernel = weight.to(x.dtype, memory_format=torch.channels_last)
    return F.conv2d(x.permute(0, 3, 1, 2), kernel, stride=2, padding=1).permute(0, 2, 3, 1)


def eager_kl_balance(post, prior):
    def kl(p, q):
        return (p.exp() * (p - q)).sum((-2, -1)).clamp(min=1.0)

    return kl(post.detach(), prior), kl(post, prior.detach())


def eager_sample_onehot(logits, uniform):
    """Draws as torch.distributions does, while all backends draw with `uniform`."""
    probs = 0.99 * torch.softmax(logits.float(), -1) + 0.01 / K
    index = torch.multinomial(probs.detach().flatten(0, -2), 1).view(logits.shape[:-1])
    stoch = F.one_hot(index, K) + probs - probs.detach()
    return stoch.to(logits.dtype), index, probs.log()


def eager_sample_index(logits, uniform):
    probs = 0.99 * torch.softmax(logits.float(), -1) + 0.01 / K
    return torch.multinomial(probs.flatten(0, -2), 1).view(logits.shape[:-1])


def eager_onehot_linear(index, weight):
    return F.one_hot(index, K).flatten(-2).to(weight.dtype) @ weight


def eager_harmony_loss(*inputs):
    *losses, log_sigma = inputs
    scale = torch.exp(-log_sigma)
    means = torch.stack([loss.mean() for loss in losses])
    reward, image, dyn, rep, cont = means
    total = reward * scale[0] + image * scale[1] + (5 / 6 * dyn + 1 / 6 * rep) * scale[2] + cont
    bound = torch.log(1 + torch.exp(log_sigma))
    return total + bound[0] + bound[1] + 5 / 6 * bound[2], means.detach()


def harmony_loss(*inputs, backend):
    constants = (0, 1, 2, 2, -1), (1.0, 1.0, 5 / 6, 1 / 6, 1.0), (1.0, 1.0, 5 / 6)
    return hk.harmony_loss(inputs[:-1], inputs[-1], *constants, backend=backend)


def eager_lambda_return(reward, cont, value, discount=1 - 1 / 333, lam=0.95):
    returns = [value[-1]]
    for t in reversed(range(len(reward))):
        mixed = (1 - lam) * value[t + 1] + lam * returns[-1]
        returns.append(reward[t] + discount * cont[t + 1] * mixed)
    return torch.stack(returns[:0:-1]), torch.cumprod(discount * cont, 0) / discount


@dataclass(frozen=True)
class Case:
    """An op at one shape: its inputs, and what one would write without the op."""

    op: str
    role: str
    eager: Callable[..., Any]
    inputs: Callable[[torch.dtype], tuple[Tensor, ...]]
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    call: Callable[..., Any] | None = None
    gflop: float | None = None

    @property
    def function(self) -> Callable[..., Any]:
        return self.call or getattr(hk, self.op)


def affine(width: int) -> tuple[Tensor, Tensor]:
    return number(width), number(width)


CASES = [
    *(
        Case("layer_norm_silu", role, eager_layer_norm_silu, lambda t, s=shape: (number(*s, dtype=t), *affine(s[-1])))
        for role, shape in {
            "observe": (OBSERVE, U),
            "imagine": (IMAGINE, U),
            "conv32": (1024, 32, 32, 32),
            "conv64": (1024, 16, 16, 64),
            "conv128": (1024, 8, 8, 128),
            "conv256": (1024, 4, 4, 256),
        }.items()
    ),
    Case(
        "layer_norm_gru", "imagine", eager_layer_norm_gru,
        lambda t: (number(OBSERVE, 3 * D, dtype=t), number(OBSERVE, D, dtype=t), *affine(3 * D)),
    ),
    *(
        Case(
            "two_hot_loss", role, eager_two_hot_loss,
            lambda t, n=rows: (number(n, BINS, dtype=t), 10 * torch.randn(n, device=DEVICE)),
        )
        for role, rows in {"observe": OBSERVE, "imagine": IMAGINE}.items()
    ),
    Case(
        "sample_index", "imagine", eager_sample_index,
        lambda t: (number(1024, S, K, dtype=t).detach(), torch.rand(1024, S, device=DEVICE)),
    ),
    Case("two_hot_mean", "imagine", eager_two_hot_mean, lambda t: (number(IMAGINE, BINS, dtype=t),)),
    *(
        Case(
            "linear", role, F.linear,
            lambda t, n=rows: (number(n, U, dtype=t), number(D, U, scale=0.03, dtype=t)),
            gflop=6 * rows * D * U / 1e9,
        )
        for role, rows in {"observe": OBSERVE, "imagine": IMAGINE}.items()
    ),
    Case(
        "linear", "bins", F.linear,
        lambda t: (number(IMAGINE, U, dtype=t), number(BINS, U, scale=0.03, dtype=t)),
        gflop=6 * IMAGINE * BINS * U / 1e9,
    ),
    Case(
        "image_input", "observe", eager_image_input,
        lambda t: (torch.randint(256, (1024, 64, 64, 3), device=DEVICE).byte(), t),
    ),
    Case(
        "image_loss", "observe", eager_image_loss,
        lambda t: (number(1024, 64, 64, 3, dtype=t), torch.randint(256, (1024, 64, 64, 3), device=DEVICE).byte()),
    ),
    Case(
        "image_deconv", "observe", eager_image_deconv,
        lambda t: (number(1024, 32, 32, 32, dtype=t), number(32, 3, 4, 4, scale=0.05), number(3)),
    ),
    *(
        Case(
            "strided_conv", f"conv{wide // 2}", eager_strided_conv,
            lambda t, c=wide // 2, s=side: (number(1024, s, s, c, dtype=t), number(2 * c, c, 4, 4, scale=0.03)),
            gflop=6 * 1024 * 64 * 16 * 64 * 128 / 1e9,
        )
        for wide, side in ((64, 32), (128, 16), (256, 8))
    ),
    Case(
        "strided_conv", "images", eager_strided_conv,
        lambda t: (number(1024, 64, 64, 3, dtype=t).detach(), number(32, 3, 4, 4, scale=0.1)),
        gflop=4 * 1024 * 32 * 32 * 16 * 3 * 32 / 1e9,
    ),
    Case(
        "kl_balance", "observe", eager_kl_balance,
        lambda t: tuple(
            torch.randn(OBSERVE, S, K, device=DEVICE).log_softmax(-1).to(t).requires_grad_() for _ in range(2)
        ),
    ),
    *(
        Case(
            "sample_onehot", role, eager_sample_onehot,
            lambda t, n=rows: (number(n, S, K, dtype=t), torch.rand(n, S, device=DEVICE)),
        )
        for role, rows in {"observe": OBSERVE, "imagine": IMAGINE}.items()
    ),
    *(
        Case(
            "onehot_linear", role, eager_onehot_linear,
            lambda t, n=rows: (classes(n), number(S * K, U, scale=0.03, dtype=t)),
        )
        for role, rows in {"observe": OBSERVE, "imagine": IMAGINE}.items()
    ),
    Case(
        "harmony_loss", "observe", eager_harmony_loss,
        lambda t: (*(number(64, 16) for _ in range(5)), number(3)), (torch.float32,), harmony_loss,
    ),
    Case(
        "lambda_return", "imagine", eager_lambda_return,
        lambda t: (number(15, 1024), torch.rand(16, 1024, device=DEVICE), number(16, 1024)), (torch.float32,),
    ),
]  # fmt: skip


def tensors(values: Any) -> list[Tensor]:
    return [
        value for value in (values if isinstance(values, tuple) else (values,)) if isinstance(value, Tensor)
    ]


def both_directions(function: Callable[..., Any], inputs: tuple[Tensor, ...]) -> Callable[[], None]:
    """Forward, and backward from fixed gradients of all differentiable outputs to all inputs that require one."""
    leaves = [x for x in tensors(inputs) if x.requires_grad]
    if not leaves:
        return lambda: function(*inputs)
    slopes = [torch.randn_like(y) for y in tensors(function(*inputs)) if y.requires_grad]

    def run() -> None:
        ends = [y for y in tensors(function(*inputs)) if y.requires_grad]
        torch.autograd.grad(ends, leaves, slopes)

    return run


def least_bytes(function: Callable[..., Any], inputs: tuple[Tensor, ...]) -> int:
    """Forward and (if there is one) backward read the inputs; outputs are written; gradients are read and written."""
    inputs, outputs = tensors(inputs), tensors(function(*inputs))
    directions = 2 if any(x.requires_grad for x in inputs) else 1
    moved = directions * sum(x.nbytes for x in inputs) + sum(y.nbytes for y in outputs)
    return moved + sum(x.nbytes for x in (*inputs, *outputs) if x.requires_grad)


def by_default(op: str, dtype: torch.dtype) -> str:
    """The backend that runs if none is chosen."""
    with backend(None):
        return dispatch.resolve_name(op, None, torch.empty(0, device=DEVICE, dtype=dtype))


def beside_eager(
    compare, run, eager, nbytes=None, *, name: str, op: str, dtype: torch.dtype, **info: Any
) -> None:
    compare(
        run,
        None if name == "eager" else eager,
        implementation=name,
        against="eager",
        default=name == by_default(op, dtype),
        nbytes=nbytes,
        dtype=dtype,
        op=op,
        graph=True,
        **info,
    )


def implementations() -> list[Any]:
    """Parameters of test_op: all implementations of all cases on this machine, eager first."""
    made = []
    for case in CASES:
        for dtype in case.dtypes:
            names = ["eager", *backends_available(case.op, torch.empty(0, device=DEVICE, dtype=dtype))]
            if case.op in COMPILED and case.role in ("observe", "imagine") and dtype == torch.float32:
                names.append("compile")
            short = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
            group = f"{case.op} {case.role} {short}"
            made += [
                pytest.param(case, dtype, name, id=f"{case.op}-{case.role}-{short}-{name}",
                             marks=pytest.mark.benchmark(group=group))
                for name in names
            ]  # fmt: skip
    return made


@pytest.mark.parametrize(("case", "dtype", "name"), implementations())
def test_op(compare, case, dtype, name):
    torch.manual_seed(0)
    inputs = case.inputs(dtype)
    eager = both_directions(case.eager, inputs)
    if name == "eager":
        run = eager
    elif name == "compile":
        run = both_directions(torch.compile(case.eager, dynamic=False), inputs)
    else:
        run = both_directions(partial(case.function, backend=name), inputs)
    info = {"gflop": case.gflop}
    if case.gflop is None:
        info = {"nbytes": least_bytes(partial(case.function, backend="reference"), inputs)}
    beside_eager(compare, run, eager, name=name, op=case.op, dtype=dtype, role=case.role, **info)


GATHER = ["eager", *backends_available("gather_windows", torch.empty(0, device=DEVICE))]


@pytest.mark.parametrize("name", GATHER)
@pytest.mark.benchmark(group="gather_windows sample uint8")
def test_gather_windows(compare, name):
    storage = torch.randint(256, (20_000, 64, 64, 3), dtype=torch.uint8, device=DEVICE)
    starts = torch.randint(20_000, (16,), device=DEVICE)
    steps = torch.arange(64, device=DEVICE).unsqueeze(1)

    def eager():
        return storage[(starts + steps) % len(storage)]

    run = (
        eager
        if name == "eager"
        else lambda: hk.gather_windows(storage, starts, 64, len(storage), backend=name)
    )
    nbytes = 2 * eager().nbytes
    beside_eager(compare, run, eager, nbytes, name=name, op="gather_windows", dtype=torch.uint8)


ADAM = ["eager", "torch.optim", *backends_available("adam_step", torch.empty(0, device=DEVICE))]


@pytest.mark.parametrize("name", ADAM)
@pytest.mark.benchmark(group="adam_step small fp32")
def test_adam_step(compare, name):
    """With the small model's parameters and clip; `eager` and `torch.optim` are PyTorch's Adam, foreach and fused."""
    shapes = [(3 * D, D + U), *[(1024, 512)] * 12, (4096, 1536), (256, 128, 4, 4), *[(512,)] * 40]
    params = [number(*shape, scale=0.02) for shape in shapes]
    grads = [torch.randn_like(param) for param in params]
    zeros = [[torch.zeros_like(param) for param in params] for _ in range(2)]
    step = torch.zeros((), device=DEVICE)

    def optimizer(**options):
        own = [param.detach().clone().requires_grad_() for param in params]
        for param, grad in zip(own, grads, strict=True):
            param.grad = grad
        adam = torch.optim.Adam(own, lr=1e-4, **options)

        def run():
            torch.nn.utils.clip_grad_norm_(own, 1000.0)
            adam.step()

        return run

    eager = optimizer(foreach=True, capturable=DEVICE.type == "cuda")
    if name in ("eager", "torch.optim"):
        run = eager if name == "eager" else optimizer(fused=True, capturable=DEVICE.type == "cuda")
    else:
        values = [param.detach() for param in params]
        run = partial(hk.adam_step, values, grads, *zeros, step, 1e-4, max_norm=1000.0, backend=name)
    nbytes = 8 * sum(
        param.nbytes for param in params
    )  # gradients read twice; parameters and moments read and written
    beside_eager(compare, run, eager, nbytes, name=name, op="adam_step", dtype=torch.float32)
