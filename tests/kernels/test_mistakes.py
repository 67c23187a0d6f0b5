"""What ops say to tensors on two devices, without memory, with too few axes: one line naming op and tensor.

PyTorch itself computes with some of these: a product with a meta tensor is whatever was in memory.
"""

import re

import numpy as np
import pytest
import torch

import hdfast_kernels as hk
from hdfast_kernels import dispatch

F32, I64, U8, BOOL = torch.float32, torch.int64, torch.uint8, torch.bool
# The arguments of every op: shape and dtype, or a value that is not a tensor. A list stands for a list of tensors.
# fmt: off
OPS = {
    "adam_step": {
        **{name: [((3,), F32), ((2, 2), F32)] for name in ("params", "grads", "exp_avg", "exp_avg_sq")},
        "step": ((), F32), "lr": ((), F32), "apply": ((), BOOL),
    },
    "gather_windows": {"storage": ((12, 3), F32), "starts": ((2,), I64), "length": 2, "ring": 6},
    "harmony_loss": {
        "losses": [((5,), F32), ((5,), F32)], "log_sigma": ((1,), F32),
        "group": (0, -1), "weight": (1.0, 1.0), "regularizer": (1.0,),
    },
    "image_deconv": {"x": ((2, 4, 4, 8), F32), "weight": ((8, 3, 4, 4), F32), "bias": ((3,), F32)},
    "image_input": {"image": ((2, 3), U8), "dtype": F32},
    "image_loss": {"pred": ((2, 3, 3, 3), F32), "image": ((2, 3, 3, 3), U8)},
    "kl_balance": {"post_logp": ((2, 3, 4), F32), "prior_logp": ((2, 3, 4), F32)},
    "lambda_return": {"reward": ((3, 4), F32), "cont": ((4, 4), F32), "value": ((4, 4), F32)},
    "layer_norm_gru": {
        "gates": ((2, 12), F32), "deter": ((2, 4), F32), "weight": ((12,), F32), "bias": ((12,), F32),
    },
    "layer_norm_silu": {"x": ((2, 4), F32), "weight": ((4,), F32), "bias": ((4,), F32)},
    "linear": {"x": ((2048, 256), F32), "weight": ((512, 256), F32), "bias": ((512,), F32)},
    "onehot_linear": {
        "index": ((5, 2), I64), "weight": ((8, 6), F32), "straight_through": ((5, 2, 4), F32), "onto": ((5, 6), F32)
    },
    "rssm_observe": {
        "embed": ((3, 2, 8), F32), "action": ((3, 2, 8), F32), "is_first": ((3, 2), BOOL),
        "uniform": ((3, 2, 2), F32), "initial_deter": ((6,), F32), "initial_index": ((2,), I64),
        "in_stoch": ((8, 8), F32), "in_norm_weight": ((8,), F32), "in_norm_bias": ((8,), F32),
        "gru": ((18, 14), F32), "gru_norm_weight": ((18,), F32), "gru_norm_bias": ((18,), F32),
        "post_deter": ((8, 6), F32), "post_norm_weight": ((8,), F32), "post_norm_bias": ((8,), F32),
        "logit_weight": ((8, 8), F32), "logit_bias": ((8,), F32),
    },
    "sample_index": {"logits": ((2, 3, 4), F32), "uniform": ((2, 3), F32)},
    "sample_onehot": {"logits": ((2, 3, 4), F32), "uniform": ((2, 3), F32)},
    "strided_conv": {"x": ((2, 4, 4, 8), F32), "weight": ((16, 8, 4, 4), F32)},
    "two_hot_loss": {"logits": ((2, 7), F32), "target": ((2,), F32)},
    "two_hot_mean": {"logits": ((2, 7), F32)},
}
# fmt: on


def is_tensor(value) -> bool:
    return isinstance(value, list) or (isinstance(value, tuple) and isinstance(value[-1], torch.dtype))


def make(value, device: str):
    if isinstance(value, list):
        return [make(one, device) for one in value]
    return torch.zeros(value[0], dtype=value[1], device=device) if is_tensor(value) else value


def call(op: str, devices: dict[str, str], backend: str, **others):
    arguments = {name: make(value, devices.get(name, "cpu")) for name, value in OPS[op].items()}
    return getattr(hk, op)(**{**arguments, **others}, backend=backend)


TENSORS = [
    (op, name) for op, arguments in OPS.items() for name, value in arguments.items() if is_tensor(value)
]
ANY = "any"  # is none: where this is given, a check has to come before the backend is chosen, and be that of all
BACKENDS = ["reference", "native"] if dispatch.native_built() else ["reference"]
WITHOUT_GRADIENT = ("adam_step", "gather_windows", "image_input", "sample_index")


def numbers(value, generator: torch.Generator):
    """Like `make`, with random numbers; classes and starts are zero."""
    if isinstance(value, list):
        return [numbers(one, generator) for one in value]
    if not is_tensor(value) or value[1] != F32:
        return make(value, "cpu")
    return torch.rand(value[0], generator=generator, dtype=F32, device="cpu")


def with_numbers(op: str) -> tuple[dict, list[torch.Tensor]]:
    """Arguments of an op, always the same random numbers, and those that get gradients."""
    generator = torch.Generator("cpu").manual_seed(0)
    arguments = {name: numbers(value, generator) for name, value in OPS[op].items()}
    flat = [one for value in arguments.values() for one in (value if isinstance(value, list) else [value])]
    floats = [one for one in flat if isinstance(one, torch.Tensor) and one.dtype == F32]
    for one in floats:
        one.requires_grad_(op not in WITHOUT_GRADIENT)
    return arguments, floats


def all_of(op: str, backend: str = "native") -> list[torch.Tensor]:
    """What the op returns or changes, and its gradients, for the same random numbers."""
    arguments, floats = with_numbers(op)
    out = getattr(hk, op)(**arguments, backend=backend)
    found = list(out) if isinstance(out, tuple) else [out]
    for one in [one for one in found if one.requires_grad]:
        one.sum().backward(retain_graph=True)
    return [*found, *(one.detach() if one.grad is None else one.grad for one in floats)]


@pytest.mark.skipif(not dispatch.native_built(), reason="the C++ module is not built")
@pytest.mark.parametrize("op", OPS)
def test_the_defaults_of_pytorch_change_nothing(op, monkeypatch):
    """Memory that C++ writes has the dtype and device that C++ assumes."""
    right = all_of(op)
    for dtype in (torch.float64, torch.bfloat16):
        torch.set_default_dtype(dtype)
        try:
            found = all_of(op)
        finally:
            torch.set_default_dtype(F32)
        assert all(map(torch.equal, right, found)), dtype
    with torch.device("meta"):
        found = all_of(op)
    assert all(map(torch.equal, right, found))


ODD_LINEAR = {
    "x": ((2048, 255), F32),
    "weight": ((257, 255), F32),
    "bias": ((257,), F32),
}  # is not PyTorch's own
OF_OURS = [
    (op, backend)
    for op in OPS
    for backend in ("fused", "native")
    if backend in hk.backends_available(op, torch.empty(0, dtype=F32, device="cpu"))
    and (op, backend) != ("linear", "native")  # at these shapes PyTorch's own product
]


@pytest.mark.parametrize(("op", "backend"), OF_OURS)
def test_autocast_changes_nothing(op, backend, monkeypatch):
    """An op computes in the dtypes of its arguments, and C++ reads what it was given."""
    monkeypatch.setitem(OPS, "linear", ODD_LINEAR)
    right = all_of(op, backend)
    with torch.autocast("cpu", torch.bfloat16):
        found = all_of(op, backend)
        with torch.no_grad():  # it goes on behind them
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    assert [one.dtype for one in found] == [one.dtype for one in right]
    assert all(map(torch.equal, right, found))


@pytest.mark.parametrize(("op", "backend"), [case for case in OF_OURS if case[0] not in WITHOUT_GRADIENT])
def test_differentiating_twice_is_refused(op, backend, monkeypatch):
    """A gradient penalty must not be ignored silently, whoever asks for its gradient."""
    monkeypatch.setitem(OPS, "linear", ODD_LINEAR)
    arguments, floats = with_numbers(op)
    out = getattr(hk, op)(**arguments, backend=backend)
    ends = [one for one in (out if isinstance(out, tuple) else (out,)) if one.requires_grad]
    assert ends
    total = sum(one.sum() for one in ends)
    with pytest.raises(RuntimeError, match=rf"^{op}: its kernels cannot be differentiated twice, .* can$"):
        torch.autograd.grad(total, floats, create_graph=True, allow_unused=True)


@pytest.mark.parametrize("op", [op for op in OPS if op not in (*WITHOUT_GRADIENT, "onehot_linear")])
def test_the_reference_is_differentiated_twice(op):
    arguments, floats = with_numbers(op)
    out = getattr(hk, op)(**arguments, backend="reference")
    ends = [one for one in (out if isinstance(out, tuple) else (out,)) if one.requires_grad]
    slopes = torch.autograd.grad(
        sum(one.square().sum() for one in ends), floats, create_graph=True, allow_unused=True
    )
    penalty = sum(slope.square().sum() for slope in slopes if slope is not None)
    second = torch.autograd.grad(penalty, floats, allow_unused=True)
    assert any(slope is not None and slope.abs().max() > 0 for slope in second)


# Other tensors of these ops may have any float dtype; the named ones decide the dtype of the computation.
DECIDING = {
    "adam_step": ("params", "exp_avg", "exp_avg_sq", "step"), "harmony_loss": (), "image_deconv": ("x",),
    "kl_balance": ("post_logp",), "lambda_return": ("value",), "layer_norm_gru": ("gates", "deter"),
    "layer_norm_silu": ("x",), "rssm_observe": ("in_stoch", "gru", "post_deter", "logit_weight"),
    "sample_index": ("logits",), "sample_onehot": ("logits",), "strided_conv": ("x",), "two_hot_loss": ("logits",),
}  # fmt: skip


@pytest.mark.skipif(not dispatch.native_built(), reason="the C++ module is not built")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=["bf16", "fp64"])
@pytest.mark.parametrize("op", DECIDING)
def test_numbers_of_another_dtype_beside_those_that_decide(op, dtype):
    """C++ reads float32 wherever it expects that."""

    def results(other):
        arguments, _ = with_numbers(op)
        for name, value in arguments.items():
            decides = op == "harmony_loss" and name == "losses"
            for place, one in enumerate(value if isinstance(value, list) else [value]):
                if not isinstance(one, torch.Tensor) or one.dtype != F32 or name in DECIDING[op]:
                    continue
                changed = one.detach().bfloat16().to(F32 if decides and place == 0 else other)
                changed.requires_grad_(one.requires_grad)
                if isinstance(value, list):
                    value[place] = changed
                else:
                    arguments[name] = changed
        out = getattr(hk, op)(**arguments, backend="native")
        out = out if isinstance(out, tuple) else (out,)
        each = [value if isinstance(value, list) else [value] for value in arguments.values()]
        floats = [one for some in each for one in some if isinstance(one, torch.Tensor) and one.requires_grad]
        ends = [one for one in out if one.requires_grad]
        slopes = torch.autograd.grad([one.sum() for one in ends], floats, allow_unused=True) if ends else ()
        return [*out, *slopes, *arguments.get("params", ())]

    for right, got in zip(results(F32), results(dtype), strict=True):
        assert (
            (got is None)
            if right is None
            else torch.allclose(got.float(), right.float(), rtol=0.01, atol=0.01)
        )


def negated(value, grad: bool = False):
    """The same numbers, negated in memory, as are those of `z.conj().imag`."""
    if isinstance(value, list):
        return [negated(one, grad) for one in value]
    if not isinstance(value, torch.Tensor) or value.dtype != F32:
        return value
    return torch._neg_view(-value.detach()).requires_grad_(grad)


@pytest.mark.parametrize(
    ("op", "backend"),
    [
        (op, backend)
        for op in OPS
        for backend in ("triton", "fused", "native")
        if backend in hk.backends_available(op, torch.empty(0, dtype=F32, device="cpu"))
        and op not in ("adam_step", "gather_windows", "image_input")
        and (op, backend) != ("rssm_observe", "triton")  # takes the interpreter seconds
    ],
)
def test_numbers_that_are_negated_when_they_are_read(op, backend, monkeypatch):
    """Gradients do not show that they are negated. Such arguments are refused by native, see below."""
    monkeypatch.setitem(OPS, "linear", ODD_LINEAR)
    found = []
    for change in (lambda value, grad=False: value, negated):
        arguments, floats = with_numbers(op)
        if backend != "native":
            arguments = {name: change(value, floats[0].requires_grad) for name, value in arguments.items()}
            each = [value if isinstance(value, list) else [value] for value in arguments.values()]
            floats = [one for some in each for one in some if getattr(one, "dtype", None) == F32]
        out = getattr(hk, op)(**arguments, backend=backend)
        out = out if isinstance(out, tuple) else (out,)
        found.append([one.detach() for one in out])
        if ends := [one for one in out if one.requires_grad]:
            slopes = [
                change(torch.ones_like(end) + torch.arange(end.numel()).view(end.shape)) for end in ends
            ]
            found[-1] += torch.autograd.grad(ends, floats, slopes, allow_unused=True)
    for right, got in zip(*found, strict=True):
        assert (got is None) if right is None else torch.equal(got, right)


WITHOUT_A_FRACTION = {
    "adam_step": ("params", "grads", "exp_avg", "exp_avg_sq"), "harmony_loss": ("losses",), "image_deconv": ("x",),
    "image_loss": ("pred",), "kl_balance": ("post_logp",), "lambda_return": ("value",), "layer_norm_gru": ("deter",),
    "layer_norm_silu": ("x",), "onehot_linear": ("weight", "onto"), "sample_index": ("logits",),
    "rssm_observe": ("gru", "in_stoch", "post_deter", "logit_weight"), "sample_onehot": ("logits",),
    "strided_conv": ("x",), "two_hot_loss": ("logits",), "two_hot_mean": ("logits",),
}  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", WITHOUT_A_FRACTION)
def test_integers_in_place_of_numbers_with_a_fraction(op, backend):
    def whole(value):
        return [whole(one) for one in value] if isinstance(value, list) else (value[0], I64)

    others = {name: make(whole(OPS[op][name]), "cpu") for name in WITHOUT_A_FRACTION[op]}
    with pytest.raises(
        TypeError, match=f"^{op}: expected a tensor of floating-point numbers, got torch.int64"
    ):
        call(op, {}, backend, **others)


@pytest.mark.skipif(not dispatch.native_built(), reason="the C++ module is not built")
def test_a_tensor_that_is_negated_when_it_is_read():
    x = torch._neg_view(torch.ones(3, 4))
    with pytest.raises(ValueError, match=r"negated when it is read; use .resolve_neg"):
        hk.layer_norm_silu(x, torch.ones(4), torch.zeros(4), backend="native")
    storage = torch.ones(6, 3, dtype=torch.complex64).conj()
    with pytest.raises(
        ValueError, match=r'^gather_windows: native .* conjugated when it is read; use backend="ref'
    ):
        hk.gather_windows(storage, torch.tensor([0]), 2, 6, backend="native")


def test_every_op_is_here():
    assert OPS.keys() == set(dispatch.ops())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("op", "name"), TENSORS, ids="-".join)
def test_tensors_of_two_devices(op, name, backend):
    call(op, {}, backend)
    if sum(is_tensor(value) for value in OPS[op].values()) == 1:
        return
    with pytest.raises(ValueError, match=rf"^{op}: \S+ is on \w+, \S+ on \w+; expected one device$") as error:
        call(op, {name: "meta"}, backend)
    assert name in str(error.value)


@pytest.mark.parametrize(
    "name", [name for name, value in OPS["adam_step"].items() if isinstance(value, list)]
)
def test_one_of_many_tensors_is_on_another_device(name):
    wrong = [make(((3,), F32), "cpu"), make(((2, 2), F32), "meta")]
    with pytest.raises(
        ValueError, match=rf"^adam_step: {name}\[1\] is on meta, params\[0\] on cpu; expected one"
    ):
        call("adam_step", {}, "reference", **{name: wrong})


@pytest.mark.parametrize("kind", [np.asarray, torch.Tensor.tolist], ids=["array", "list"])
@pytest.mark.parametrize(("op", "name"), [one for one in TENSORS if one[0] != "adam_step"])
def test_what_is_no_tensor(op, name, kind):
    """A NumPy array has shape, dtype and device of its own, and is on no device that PyTorch knows."""
    if isinstance(OPS[op][name], list):
        value = [kind(one) for one in make(OPS[op][name], "cpu")]
        name, (one, *_) = f"{name}[0]", value
    else:
        value = one = kind(make(OPS[op][name], "cpu"))
    with pytest.raises(
        TypeError, match=rf"^{op}: {re.escape(name)} is a {type(one).__name__}, expected a tensor$"
    ):
        call(op, {}, "reference", **{name.partition("[")[0]: value})


@pytest.mark.parametrize("op", OPS)
def test_tensors_without_memory(op):
    """The definition gives shapes and dtypes, like any PyTorch operation; C++ has nothing to read."""
    everything = dict.fromkeys(OPS[op], "meta")
    out = call(op, everything, "reference")
    assert all(tensor.is_meta for tensor in (out if isinstance(out, tuple) else (out,)))
    with pytest.raises(hk.BackendError, match=rf"^{op}: backend=native cannot run: the tensor is on meta"):
        call(op, everything, "native")


@pytest.mark.parametrize(
    ("op", "name", "shapes", "axes"),
    [
        ("image_loss", "pred", [(), (3,), (3, 3)], "..., H, W, C"),
        ("kl_balance", "post_logp", [(), (4,)], "..., S, K"),
        ("layer_norm_gru", "deter", [()], "..., D"),
        ("layer_norm_silu", "x", [()], "..., C"),
        ("linear", "x", [()], "..., K"),
        ("onehot_linear", "index", [()], "..., S"),
        ("rssm_observe", "uniform", [(), (3, 2), (3, 2, 2, 1)], "T, B, S"),
        ("rssm_observe", "post_deter", [(), (8,), (8, 6, 1)], "U, D"),
        ("rssm_observe", "in_stoch", [(), (8,)], r"S\*K, U"),
        ("sample_index", "logits", [()], "..., K"),
        ("sample_onehot", "logits", [()], "..., K"),
        ("two_hot_loss", "logits", [()], "..., K"),
        ("two_hot_mean", "logits", [()], "..., K"),
    ],
)
def test_too_few_axes_or_too_many(op, name, shapes, axes):
    for shape in shapes:
        few = {
            other: torch.zeros(shape, dtype=value[1])
            for other, value in OPS[op].items()
            if is_tensor(value) and (op != "rssm_observe" or other == name)
        }
        with pytest.raises(ValueError, match=rf"^{op}: {name} has shape .*, expected \({axes}\)$"):
            call(op, {}, ANY, **few)
