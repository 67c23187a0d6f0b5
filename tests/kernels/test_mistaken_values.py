"""What ops say to axes without an element, and to settings that mean nothing: one line naming op and argument."""

import math

import pytest
import torch
from test_mistakes import ANY, F32, I64, call, make


def test_no_groups():
    with pytest.raises(ValueError, match=r"weight has shape \(8, 6\), expected \(0 groups \* K, U\)"):
        call("onehot_linear", {}, ANY, index=torch.zeros(5, 0, dtype=I64), straight_through=None, onto=None)
    with pytest.raises(ValueError, match="needs T > 0, S > 0 and S dividing 8 classes"):
        call("rssm_observe", {}, ANY, uniform=torch.zeros(3, 2, 0))


@pytest.mark.parametrize(
    ("op", "arguments"),
    [
        ("sample_onehot", {"logits": ((3, 0), F32), "uniform": ((3,), F32)}),
        ("sample_index", {"logits": ((3, 0), F32), "uniform": ((3,), F32)}),
        ("strided_conv", {"x": ((2, 0, 4, 8), F32), "weight": ((8, 16, 4, 4), F32), "transposed": True}),
        ("image_deconv", {"x": ((2, 4, 0, 8), F32)}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_axes_without_an_element(op, arguments):
    with pytest.raises(ValueError, match=rf"^{op}: \S+ ha(s|ve) shape .*, expected .*at least"):
        call(op, {}, ANY, **{name: make(value, "cpu") for name, value in arguments.items()})


def test_is_first_of_another_dtype():
    with pytest.raises(ValueError, match=r"^rssm_observe: is_first is torch.float32, expected torch.bool$"):
        call("rssm_observe", {}, ANY, is_first=torch.zeros(3, 2))


@pytest.mark.parametrize(
    ("op", "arguments", "message"),
    [
        ("kl_balance", {"free": math.nan}, "free is NaN, expected a number of nats"),
        ("lambda_return", {"lam": 1.5}, r"lam is 1.5, expected a number in \[0, 1\]"),
        ("lambda_return", {"discount": 1.5}, r"discount is 1.5, expected a number in \(0, 1\]"),
        ("lambda_return", {"discount": math.nan}, r"discount is nan, expected a number in \(0, 1\]"),
        ("layer_norm_gru", {"eps": 0.0}, "eps is 0.0, expected a positive number"),
        ("layer_norm_silu", {"eps": math.nan}, "eps is nan, expected a positive number"),
        ("rssm_observe", {"eps": -1.0}, "eps is -1.0, expected a positive number"),
        ("rssm_observe", {"unimix": -1.0}, r"unimix is -1.0, expected a share in \[0, 1\)"),
        ("sample_index", {"unimix": math.nan}, r"unimix is nan, expected a share in \[0, 1\)"),
        (
            "two_hot_loss",
            {"high": math.inf},
            "needs at least 2 bins and finite low < high, got 7 from -20.0 to inf",
        ),
        (
            "two_hot_mean",
            {"low": 21.0},
            "needs at least 2 bins and finite low < high, got 7 from 21.0 to 20.0",
        ),
    ],
)
def test_settings_that_mean_nothing(op, arguments, message):
    with pytest.raises(ValueError, match=rf"^{op}: {message}$"):
        call(op, {}, ANY, **arguments)


def test_classes_that_are_no_integers():
    with pytest.raises(
        TypeError, match=r"^rssm_observe: initial_index is torch.float32, expected int64 or int32$"
    ):
        call("rssm_observe", {}, ANY, initial_index=torch.zeros(2))
