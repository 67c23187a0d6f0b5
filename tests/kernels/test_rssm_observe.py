"""rssm_observe: the definition against float64, and the C++ against both, forward and every gradient."""

import contextlib
import functools

import pytest
import torch
from rssm_observe_cases import (
    DIFFERENTIABLE,
    UNIMIX,
    Sizes,
    cast,
    check_impossible_classes,
    check_level_case,
    expected,
    make_case,
)

from hdfast_kernels import dispatch, native, rssm_observe
from hdfast_kernels.dispatch import native_built

SHAPES = [
    Sizes(T=5, B=3, D=32, U=48, S=4, K=8),
    Sizes(T=4, B=1, D=17, U=9, S=3, K=5),
    Sizes(T=1, B=2, D=16, U=16, S=1, K=2),
]


def run(function, case: dict, seed: int = 1) -> dict[str, torch.Tensor]:
    """Outputs of function(case) and the gradients of a random linear function of deter, stoch and logp."""
    leaves = {name: case[name].detach().clone().requires_grad_() for name in DIFFERENTIABLE}
    out = function({**case, **leaves})
    generator = torch.Generator().manual_seed(seed)
    slopes = {
        k: torch.randn(out[k].shape, generator=generator, dtype=torch.float64)
        for k in ("deter", "stoch", "logp")
    }
    loss = sum((out[name] * slope.to(out[name])).sum() for name, slope in slopes.items())
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return out | {f"grad {name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}


def op(backend: str):
    def function(case: dict) -> dict:
        outputs = rssm_observe(**case, backend=backend)
        return dict(zip(("deter", "stoch", "index", "logp"), outputs, strict=True))

    return function


@pytest.mark.parametrize("sizes", SHAPES)
def test_reference_is_the_specification_in_float64(sizes):
    case = make_case(sizes)
    theirs, ours = run(expected, case), run(op("reference"), case)
    assert torch.equal(ours["index"], theirs["index"])
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-9, atol=1e-9)


def test_straight_through_reaches_earlier_steps_but_not_across_is_first():
    case = make_case(Sizes(T=3, B=2, D=8, U=8, S=2, K=4))
    case["is_first"][:] = torch.tensor([[True, True], [False, True], [False, False]])
    embed = case["embed"].requires_grad_()
    deter = op("reference")(case)["deter"]
    (gradient,) = torch.autograd.grad(deter[1].sum(), embed)
    assert gradient[0, 0].abs().max() > 0
    assert gradient[0, 1].abs().max() == 0
    assert gradient[1:].abs().max() == 0  # deter comes before the posterior of its own step


needs_native = pytest.mark.skipif(not native_built(), reason="the C++ module is not built")
ISAS = native.isas() if native_built() else []
WIDE = Sizes(T=6, B=16, D=128, U=96, S=8, K=16)  # full AMX tiles and panels
UNEVEN = Sizes(T=3, B=19, D=96, U=128, S=8, K=8)


@functools.cache
def truth(sizes: Sizes, seed: int, likely: bool, unimix: float) -> tuple[dict, dict]:
    case = make_case(sizes, seed, likely, unimix)
    return case, run(expected, case)


def errors(
    function, sizes: Sizes, dtype: torch.dtype, seeds: range, unimix: float = UNIMIX
) -> dict[str, float]:
    """Relative error against float64 of every output and gradient, over all seeds; indices must be equal."""
    wrong, size = {}, {}
    for seed in seeds:
        case, theirs = truth(sizes, seed, dtype == torch.bfloat16, unimix)
        ours = run(function, cast(case, dtype))
        assert torch.equal(ours["index"], theirs["index"])
        for name in ours.keys() - {"index"}:
            wrong[name] = wrong.get(name, 0) + (ours[name].double() - theirs[name]).square().sum().item()
            size[name] = size.get(name, 0) + theirs[name].square().sum().item()
    return {name: (wrong[name] / size[name]) ** 0.5 if size[name] else wrong[name] for name in wrong}


@needs_native
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [*SHAPES, WIDE, UNEVEN])
def test_native_errs_at_most_twice_as_much_as_pytorch(sizes, dtype, isa):
    seeds = range(12 if sizes in SHAPES else 1)  # with few numbers, errors are a matter of luck
    plain = errors(op("reference"), sizes, dtype, seeds)
    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns with NaN
    try:
        with native.force_isa(isa):
            fused = errors(op("native"), sizes, dtype, seeds)
    finally:
        torch.use_deterministic_algorithms(False)
    rounding = torch.finfo(torch.float32).eps
    too_large = {
        name: (fused[name], plain[name])
        for name in plain
        if not fused[name] <= 2 * max(plain[name], rounding)
    }
    assert not too_large


@needs_native
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("unimix", [0.0, 0.4])
def test_native_with_more_and_less_of_the_uniform_distribution(unimix, isa):
    plain = errors(op("reference"), SHAPES[0], torch.float32, range(6), unimix)
    with native.force_isa(isa):
        fused = errors(op("native"), SHAPES[0], torch.float32, range(6), unimix)
    assert {name: fused[name] for name in plain if not fused[name] <= 2 * plain[name]} == {}


@needs_native
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("sizes", [*SHAPES, WIDE])
def test_native_norms_of_equal_numbers(sizes, isa):
    with native.force_isa(isa):
        check_level_case(op("native"), run, sizes)


@needs_native
def test_native_gives_the_same_result_for_every_number_of_threads():
    case = cast(make_case(WIDE), torch.float32)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(run(op("native"), case))
    torch.set_num_threads(before)
    for name in ("deter", "stoch", "index", "logp", "grad embed", "grad action"):
        assert torch.equal(results[0][name], results[1][name])
        assert torch.equal(results[0][name], results[2][name])


@pytest.mark.parametrize("backend", ["reference", pytest.param("native", marks=needs_native)])
def test_gradient_of_one_output_alone_and_no_unimix(backend):
    """An output that the loss does not use has no gradient, which takes another path than a zero gradient."""
    case = make_case(SHAPES[0])
    for name in ("deter", "stoch", "logp"):
        gradients = []
        for dtype, which in ((torch.float64, "reference"), (torch.float32, backend)):
            leaves = {k: cast(case, dtype)[k].clone().requires_grad_() for k in DIFFERENTIABLE}
            out = op(which)({**cast(case, dtype), **leaves, "unimix": 0.0})[name]
            weight = torch.arange(out.numel(), dtype=dtype).view_as(out).sin()
            gradients.append(
                torch.autograd.grad((out * weight).sum(), list(leaves.values()), allow_unused=True)
            )
        for theirs, ours in zip(*gradients, strict=True):
            theirs = torch.zeros_like(ours) if theirs is None else theirs
            torch.testing.assert_close(ours, theirs.float(), rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize("backend", ["reference", pytest.param("native", marks=needs_native)])
def test_a_class_without_probability_is_not_drawn_until_none_is_left(backend):
    check_impossible_classes(op(backend))


@pytest.mark.parametrize("backend", ["reference", pytest.param("native", marks=needs_native)])
def test_no_sequences(backend):
    case = cast(make_case(SHAPES[0]), torch.float32)
    for name in ("embed", "action", "is_first", "uniform"):
        case[name] = case[name][:, :0]
    result = run(op(backend), case)
    assert result["stoch"].shape == (5, 0, 4, 8)
    assert result["grad gru"].abs().max() == 0


@pytest.mark.parametrize("wrong", [9, 8, -1, 2**40])
def test_an_initial_class_out_of_range(wrong):
    """C++ says so before it reads memory; the definition, which must not read values on the host, uses no class."""
    case = cast(make_case(SHAPES[0]), torch.float32)
    case["initial_index"][1] = wrong
    if native_built():
        with pytest.raises(IndexError, match=rf"^rssm_observe: index {wrong} of group 1 is not in \[0, 8\)$"):
            rssm_observe(**case, backend="native")
    case["is_first"][:] = True
    none = rssm_observe(**case, backend="reference")[0]
    case["initial_index"][1] = 0
    case["in_stoch"][8] = 0  # the row of that class
    assert torch.equal(rssm_observe(**case, backend="reference")[0], none)


def test_errors_name_what_does_not_fit():
    case = cast(make_case(SHAPES[0]), torch.float32)
    with pytest.raises(ValueError, match=r"action has shape \(4, 3, 48\), expected \(5, 3, 48\)"):
        rssm_observe(**{**case, "action": case["action"][:4]})
    with pytest.raises(ValueError, match="needs T > 0, S > 0 and S dividing 32"):
        rssm_observe(**{**case, "uniform": case["uniform"][..., :3]})
    with pytest.raises(ValueError, match=r"gru torch\.bfloat16"):
        rssm_observe(**{**case, "gru": case["gru"].bfloat16()})


@pytest.mark.parametrize(
    ("forced", "chosen"), [("", "triton"), ("fused", "triton"), ("persistent", "persistent")]
)
def test_too_many_sequences_for_one_launch_take_several_unless_one_is_asked_for(monkeypatch, forced, chosen):
    """HDFAST_BACKEND=fused asks for none: the op has no such backend, and takes its default."""
    monkeypatch.setattr(dispatch, "triton_installed", lambda: True)
    monkeypatch.setattr(dispatch, "triton_interpreted", lambda: True)
    monkeypatch.setenv("HDFAST_BACKEND", forced)
    case = cast(make_case(Sizes(T=1, B=2000, D=8, U=8, S=1, K=2)), torch.float32)
    before = dispatch.use("cpu", {"rssm_observe": "persistent"})
    with contextlib.ExitStack() as stack:
        stack.callback(dispatch.use, "cpu", before)
        for name in ("triton", "persistent"):
            stack.enter_context(dispatch.replaced("rssm_observe", name, lambda *_, name=name: name))
        assert rssm_observe(**case) == chosen


@pytest.mark.parametrize("asked", [None, "triton", "persistent"])
def test_more_classes_than_a_program_takes_run_in_plain_pytorch_unless_asked_for(monkeypatch, asked):
    monkeypatch.setattr(dispatch, "triton_installed", lambda: True)
    monkeypatch.setattr(dispatch, "triton_interpreted", lambda: True)
    monkeypatch.delenv("HDFAST_BACKEND", raising=False)
    case = cast(make_case(Sizes(T=1, B=2, D=8, U=8, S=1, K=129)), torch.float32)
    before = dispatch.use("cpu", {"rssm_observe": "persistent"})
    try:
        if asked is None:
            expected = rssm_observe(**case, backend="reference")
            assert all(map(torch.equal, rssm_observe(**case), expected))
        else:
            with pytest.raises(ValueError, match="129 classes a group, its kernels take up to 128"):
                rssm_observe(**case, backend=asked)
    finally:
        dispatch.use("cpu", before)
