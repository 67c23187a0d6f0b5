"""Harmonizer: the paper's fixed point and three-term total, the modes, and that no loss is left out."""

import contextlib
import copy
import doctest
import math

import pytest
import torch
import torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import make_fx

from hdfast_kernels import BackendError, Harmonizer, harmonizer
from hdfast_kernels.harmonizer import MODES

GROUPS = {"reward": {"reward": 1.0}, "image": {"image": 1.0}, "kl": {"dyn": 5 / 6, "rep": 1 / 6}}
REGULARIZER = {"kl": 5 / 6}


def losses(shape=(4, 8), extra=()):
    generator = torch.Generator().manual_seed(0)
    names = ("reward", "image", "dyn", "rep", "cont", *extra)
    return {name: torch.rand(shape, generator=generator, requires_grad=True) for name in names}


def test_docstring_example():
    assert doctest.testmod(harmonizer).failed == 0
    assert doctest.testmod(harmonizer).attempted >= 5


def test_learned_total_is_the_paper_s():
    module, given = Harmonizer(GROUPS, regularizer=REGULARIZER), losses()
    module.log_sigma.data = torch.tensor([0.3, -0.7, 1.1])
    total, metrics = module(given)
    s, mean = module.log_sigma, {name: loss.mean() for name, loss in given.items()}
    expected = (
        mean["reward"] * torch.exp(-s[0])
        + F.softplus(s[0])
        + mean["image"] * torch.exp(-s[1])
        + F.softplus(s[1])
        + 5 / 6 * (mean["dyn"] * torch.exp(-s[2]) + F.softplus(s[2]))
        + 1 / 6 * mean["rep"] * torch.exp(-s[2])
        + mean["cont"]
    )
    assert total.item() == pytest.approx(expected.item(), rel=1e-6)
    inputs = [*given.values(), module.log_sigma]
    for mine, theirs in zip(
        torch.autograd.grad(total, inputs), torch.autograd.grad(expected, inputs), strict=True
    ):
        assert torch.allclose(mine, theirs, rtol=1e-5, atol=1e-8)
    assert metrics["loss/dyn"].item() == pytest.approx(mean["dyn"].item())
    assert metrics["weighted/dyn"].item() == pytest.approx(mean["dyn"].item() * 5 / 6 * math.exp(-1.1))
    assert metrics["weighted/cont"].item() == pytest.approx(mean["cont"].item())
    assert metrics["harmony/s_kl"].item() == pytest.approx(1.1)
    assert metrics["harmony/weight_image"].item() == pytest.approx(math.exp(0.7))
    assert not any(value.requires_grad for value in metrics.values())


@pytest.mark.parametrize(("loss", "weight"), [(0.05, 4.0), (1.0, 0.618), (50.0, 0.0196)])
def test_descent_finds_the_fixed_point(loss, weight):
    module = Harmonizer({"only": {"only": 1.0}})
    for _ in range(40):  # Newton's method: the loss is convex in s
        total, metrics = module({"only": torch.full((3,), loss)})
        (slope,) = torch.autograd.grad(total, module.log_sigma)
        s = module.log_sigma.data
        curvature = loss * torch.exp(-s) + torch.sigmoid(s) * torch.sigmoid(-s)
        module.log_sigma.data -= 0.5 * slope / curvature
    assert metrics["harmony/weight_only"].item() == pytest.approx(weight, rel=5e-3)


def test_metrics_do_not_change_when_the_parameter_does():
    module = Harmonizer(GROUPS)
    _, metrics = module(losses())
    module.log_sigma.data.fill_(5.0)
    assert metrics["harmony/s_reward"].item() == 0.0


def test_fixed_weights_have_no_log_term_and_no_parameter():
    module = Harmonizer(GROUPS, mode="fixed", fixed={"reward": 10.0, "image": 0.0}, scales={"cont": 3.0})
    given = losses()
    mean = {name: loss.mean().item() for name, loss in given.items()}
    total, metrics = module(given)
    expected = 10 * mean["reward"] + 5 / 6 * mean["dyn"] + 1 / 6 * mean["rep"] + 3 * mean["cont"]
    assert total.item() == pytest.approx(expected, rel=1e-6)
    assert metrics["harmony/weight_reward"].item() == 10.0
    assert metrics["weighted/image"].item() == 0.0
    assert not list(module.parameters())
    assert not module.no_weight_decay()


def test_off_is_the_plain_scaled_sum():
    module = Harmonizer(GROUPS, mode="off", scales={"dyn": 0.5, "rep": 0.1})
    given = losses(extra=("vector",))
    mean = {name: loss.mean().item() for name, loss in given.items()}
    expected = sum(mean.values()) - 0.5 * mean["dyn"] - 0.9 * mean["rep"]
    total, metrics = module(given)
    assert total.item() == pytest.approx(expected, rel=1e-6)
    assert not any(name.startswith("harmony/") for name in metrics)
    assert not list(module.parameters())


@pytest.mark.parametrize("mode", harmonizer.MODES)
def test_a_loss_in_no_group_is_added(mode):
    given = losses(extra=("velocity",))
    module = Harmonizer(GROUPS, mode=mode)
    with_it, metrics = module(given)
    without, _ = module({name: loss for name, loss in given.items() if name != "velocity"})
    assert (with_it - without).item() == pytest.approx(given["velocity"].mean().item(), abs=1e-5)
    assert "weighted/velocity" in metrics


def test_shapes_may_differ_and_order_does_not_matter():
    module, given = Harmonizer(GROUPS), losses()
    total, _ = module(given)
    reordered = dict(reversed(given.items()))
    assert module(reordered)[0].item() == pytest.approx(total.item(), rel=1e-6)
    reordered["image"] = given["image"].mean()
    assert module(reordered)[0].item() == pytest.approx(total.item(), rel=1e-6)


def test_a_copy_and_a_bfloat16_module_work():
    module, given = Harmonizer(GROUPS), losses()
    total = module(given)[0].item()
    assert copy.deepcopy(module)(given)[0].item() == total
    assert module.to(torch.bfloat16)(given)[0].dtype == torch.float32


def test_called_under_inference_mode_first_it_still_trains():
    module = Harmonizer(GROUPS)
    with torch.inference_mode():
        module(losses())
    module(losses())[0].backward()
    assert module.log_sigma.grad.abs().min() > 0
    assert module.no_weight_decay() == {name for name, _ in module.named_parameters()}


@pytest.mark.parametrize("mode", harmonizer.MODES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_total_is_float32_whatever_the_losses_are(dtype, mode):
    given = {name: loss.detach().to(dtype).requires_grad_() for name, loss in losses().items()}
    module = Harmonizer(GROUPS, mode=mode)
    for values in (given, {**given, "image": given["image"].mean()}):
        total, metrics = module(values)
        assert total.dtype == torch.float32
        assert {metric.dtype for metric in metrics.values()} == {torch.float32}
    total.backward()
    assert given["dyn"].grad.dtype == dtype
    assert given["dyn"].grad.abs().min() > 0


@pytest.mark.parametrize("mode", ["learned", "off"])
def test_a_fixed_weight_that_the_mode_would_not_use(mode):
    with pytest.raises(
        ValueError, match=f"mode is '{mode}' and would not use fixed={{'image': 0.5}}, expected mode 'fixed'"
    ):
        Harmonizer(GROUPS, mode=mode, fixed={"reward": 1.0, "image": 0.5})
    Harmonizer(
        GROUPS, mode=mode, fixed=dict.fromkeys(GROUPS, 1.0)
    )  # its default, so that configs may pass it


def test_weights_to_begin_with():
    module = Harmonizer(GROUPS, initial={"image": 0.01, "kl": 2.0})
    losses = {name: torch.rand(4) for name in ("reward", "image", "dyn", "rep")}
    metrics = module(losses)[1]
    weights = [metrics[f"harmony/weight_{group}"].item() for group in ("reward", "image", "kl")]
    assert weights == pytest.approx([1.0, 0.01, 2.0])
    assert torch.equal(Harmonizer(GROUPS).log_sigma, torch.zeros(3))
    for mode in ("fixed", "off"):
        with pytest.raises(
            ValueError, match=r"would not use initial={'image': 0.5}, expected mode 'learned'"
        ):
            Harmonizer(GROUPS, mode=mode, initial={"image": 0.5})
        Harmonizer(GROUPS, mode=mode, initial={"image": 1.0})
    with pytest.raises(ValueError, match=r"initial is {'kl': 0}, expected weights from 1e-30 to 1e30"):
        Harmonizer(GROUPS, initial={"kl": 0})
    with pytest.raises(
        ValueError, match="initial of a group that does not exist: 'imge'; did you mean 'image'"
    ):
        Harmonizer(GROUPS, initial={"imge": 1})


@pytest.mark.parametrize("backend", ["reference", None])
def test_what_pytorch_traces_leaves_nothing_behind(backend):
    """Tensors made during tracing have no memory."""
    losses = {name: torch.rand(4) for name in ("reward", "image", "dyn", "rep")}
    harmonizer = Harmonizer(GROUPS, backend=backend)
    with contextlib.suppress(RuntimeError, AssertionError):  # it has a parameter, or C++ cannot be traced
        make_fx(lambda losses: harmonizer(losses)[0], tracing_mode="fake")(losses)
    for again in (harmonizer, Harmonizer(GROUPS, backend=backend)):
        total, metrics = again(losses)
        assert all(type(value) is torch.Tensor for value in (total, *metrics.values()))
        assert total.isfinite()


def test_scales_and_groups_may_change():
    harmonizer = Harmonizer({"a": {"x": 1.0}}, scales={"y": 5.0})
    losses = {"x": torch.zeros(3), "y": torch.ones(3)}
    before = harmonizer(losses)[0].item()
    harmonizer.scales["y"] = 2.0
    total, metrics = harmonizer(losses)
    assert before - total.item() == pytest.approx(3.0)
    assert metrics["weighted/y"].item() == 2.0


def test_a_file_of_it_is_of_no_device(tmp_path):
    harmonizer = Harmonizer(GROUPS)
    losses = {name: torch.rand(4) for name in ("reward", "image", "dyn", "rep")}
    total = harmonizer(losses)[0]
    torch.save(harmonizer, tmp_path / "harmonizer.pt")
    moved = torch.load(tmp_path / "harmonizer.pt", map_location="meta", weights_only=False)
    moved.to_empty(device="cpu").load_state_dict(harmonizer.state_dict())
    assert moved(losses)[0].item() == total.item()


def test_a_state_is_of_the_same_groups_in_the_same_order():
    """Otherwise an image's scalar of 1e-4 would weigh the reward."""
    image, reward = {"image": {"image": 1.0}}, {"reward": {"reward": 1.0}}
    state = Harmonizer(image | reward, initial={"image": 1e-4}).state_dict()
    for groups, own in ((reward | image, '"reward", "image"'), ({"x": {"x": 1.0}} | reward, '"x", "reward"')):
        other = Harmonizer(groups)
        with pytest.raises(RuntimeError, match=rf'groups \["image", "reward"\], expected \[{own}\]$'):
            other.load_state_dict(state)
        assert not other.log_sigma.any()
    same = Harmonizer(image | reward)
    same.load_state_dict(state)
    assert same.log_sigma.tolist() == pytest.approx([math.log(1e4), 0.0])
    del state["_extra_state"]  # as it was before there were names
    assert not same.load_state_dict(state).missing_keys


@pytest.mark.parametrize("mode", ["fixed", "off"])
def test_without_scalars_a_state_fits_other_groups(mode):
    one, other = (Harmonizer({name: {name: 1.0}}, mode=mode) for name in "ab")
    other.load_state_dict(one.state_dict())


def test_metrics_may_be_changed():
    for mode in MODES:
        harmonizer = Harmonizer({"a": {"x": 1.0}}, mode=mode)
        for _ in range(2):
            metrics = harmonizer({"x": torch.ones(3)})[1]
            found = {name: value.item() for name, value in metrics.items()}
            for value in metrics.values():
                value += 1
        assert found["loss/x"] == found["weighted/x"] == found.get("harmony/weight_a", 1.0) == 1.0


def test_losses_of_two_devices():
    with pytest.raises(ValueError, match="loss 'y' is on meta, 'x' on cpu"):
        Harmonizer({"a": {"x": 1.0}})({"x": torch.ones(3), "y": torch.ones(3, device="meta")})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"groups": {"a": {}}}, ValueError, "group 'a' is empty, expected a mapping from its losses"),
        ({"groups": {"a": {"x": math.nan}}}, ValueError, r"weights are {'x': nan}, expected finite numbers"),
        ({"scales": {"y": math.inf}}, ValueError, r"weights are {'y': inf}, expected finite numbers"),
        ({"regularizer": {"a": math.nan}}, ValueError, r"weights are {'a': nan}, expected finite numbers"),
        (
            {"backend": "trition"},
            BackendError,
            "backend is 'trition', expected one of reference, triton, native",
        ),
    ],
)
def test_settings_that_mean_nothing(arguments, error, message):
    with pytest.raises(error, match=f"^Harmonizer: {message}"):
        Harmonizer(**{"groups": {"a": {"x": 1.0}}, **arguments})


def test_what_is_no_mapping_or_no_tensor():
    with pytest.raises(
        TypeError, match=r"group 'a' is \['x'\], expected a mapping from its losses to their weights"
    ):
        Harmonizer({"a": ["x"]})
    with pytest.raises(TypeError, match=r"groups is \['x'\], for each group by name expected a mapping"):
        Harmonizer(["x"])
    with pytest.raises(TypeError, match="loss 'x' is a float, expected a tensor"):
        Harmonizer({"a": {"x": 1.0}})({"x": 1.0})
    with pytest.raises(TypeError, match="losses are a list, expected a mapping"):
        Harmonizer({"a": {"x": 1.0}})([torch.ones(2)])


@pytest.mark.parametrize(
    ("arguments", "given", "message"),
    [
        ({"groups": GROUPS, "mode": "learn"}, "", "mode is 'learn', expected one of learned, fixed, off"),
        ({"groups": GROUPS, "regularizer": {"lk": 1.0}}, "", "'lk'; did you mean 'kl'"),
        ({"groups": GROUPS, "fixed": {"rewards": 1.0}}, "", "did you mean 'reward'"),
        ({"groups": {"a": {"x": 1.0}, "b": {"x": 1.0}}}, "", "more than one group: x"),
        ({"groups": GROUPS}, "reward image dyn cont", "'rep'"),
        (
            {"groups": GROUPS, "scales": {"vektor": 1.0}},
            "reward image dyn rep vector",
            "did you mean 'vector'",
        ),
        ({"groups": GROUPS, "mode": "off", "scales": {"image": 1.0}}, "reward", "'image'"),
        ({"groups": {}}, "", "no losses"),
    ],
)
def test_mistakes_are_answered(arguments, given, message):
    with pytest.raises(ValueError, match=message):
        Harmonizer(**arguments)({name: torch.ones(2) for name in given.split()})
