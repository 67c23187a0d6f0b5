"""rssm_observe in Triton: its arithmetic, in another process under the interpreter, and its compiled code."""

import re

import checks  # noqa: F401  mends the interpreter
import pytest
import torch
from rssm_observe_cases import Sizes, cast, check_impossible_classes, check_level_case, make_case
from test_rssm_observe import errors, op, run

from hdfast_kernels import dispatch, report, report_cases
from tests.interpreter import inside, interpreted, outside

needs_triton = pytest.mark.skipif(
    not dispatch.triton_installed(), reason="needs triton; `pip install triton`"
)
compiled = pytest.mark.skipif(dispatch.triton_interpreted(), reason="TRITON_INTERPRET=1 compiles nothing")
SMALL = Sizes(T=2, B=3, D=16, U=16, S=2, K=4)
ODD = Sizes(
    T=2, B=17, D=12, U=20, S=4, K=9
)  # two row programs, groups that share a program, masked everything


def triton_op(persistent: bool):
    def function(case: dict) -> dict:
        from hdfast_kernels.rssm_observe_triton import rssm_observe_triton

        outputs = rssm_observe_triton(
            *case.values(), 1e-3, persistent=persistent
        )  # unimix is the last entry of a case
        return dict(zip(("deter", "stoch", "index", "logp"), outputs, strict=True))

    return function


@outside
def test_under_the_interpreter():
    interpreted(__file__, least=28)


@inside
@pytest.mark.parametrize(
    ("sizes", "dtype"), [(SMALL, torch.float32), (SMALL, torch.bfloat16), (ODD, torch.float32)]
)
def test_triton_errs_at_most_twice_as_much_as_pytorch(sizes, dtype):
    from checks import floor_of, poisoned_memory

    plain = errors(op("reference"), sizes, dtype, range(1))
    with poisoned_memory():
        fused = errors(op("triton"), sizes, dtype, range(1))
    unit = floor_of(dtype, "cpu") * torch.finfo(dtype).eps  # with few numbers plain PyTorch may be lucky
    too_large = {n: (fused[n], plain[n]) for n in plain if not fused[n] <= 2 * plain[n] + unit}
    assert not too_large


@inside
@pytest.mark.parametrize("unimix", [0.0, 0.4])
def test_more_and_less_of_the_uniform_distribution(unimix):
    plain = errors(op("reference"), SMALL, torch.float32, range(1), unimix)
    fused = errors(op("triton"), SMALL, torch.float32, range(1), unimix)
    unit = 4 * torch.finfo(torch.float32).eps
    assert {name: fused[name] for name in plain if not fused[name] <= 2 * plain[name] + unit} == {}


@inside
@pytest.mark.parametrize("sizes", [SMALL, ODD])
def test_norms_of_equal_numbers(sizes):
    check_level_case(op("triton"), run, sizes)


@inside
def test_a_class_without_probability_is_not_drawn_until_none_is_left():
    check_impossible_classes(op("triton"))


@inside
@pytest.mark.parametrize("sizes", [SMALL, ODD])
def test_one_launch_does_what_a_launch_for_each_stage_does(sizes):
    from interpreter_barriers import cooperative

    from hdfast_kernels import rssm_observe_kernels

    case = cast(make_case(sizes), torch.float32)
    stages = run(triton_op(persistent=False), case)
    with cooperative(rssm_observe_kernels) as launch:
        together = run(op("persistent"), case)
    assert launch.barriers == [6 * sizes.T, 7 * sizes.T]
    for name, value in stages.items():
        assert torch.equal(value, together[name]), name


@inside
@pytest.mark.parametrize("launch", [0, 1])
@pytest.mark.parametrize("barrier", range(7))
def test_no_barrier_of_the_launch_can_be_left_out(launch, barrier):
    """Of the six of a step forward, and the seven of one backward."""
    from interpreter_barriers import cooperative

    from hdfast_kernels import rssm_observe_kernels

    case = cast(make_case(SMALL), torch.float32)
    with (
        cooperative(rssm_observe_kernels, left_out=(launch, barrier)),
        pytest.raises(Exception, match="with no barrier in between"),
    ):
        run(op("persistent"), case)


@inside
@pytest.mark.parametrize("wrong", [4, -(2**40)])
def test_an_initial_class_out_of_range_reads_nothing(wrong):
    """Like the definition; without the mask the interpreter reads memory outside of the tensor."""
    case = cast(make_case(SMALL), torch.float32)
    case["initial_index"][0] = wrong  # would be the next group's first class if it were read
    case["is_first"][1, 1] = True
    plain, fused = run(op("reference"), case), run(op("triton"), case)
    assert torch.equal(plain["index"], fused["index"])
    for name in plain:
        torch.testing.assert_close(fused[name], plain[name], rtol=1e-4, atol=1e-5)


def arguments(dtype: torch.dtype, T: int, B: int, D: int, U: int, S: int, K: int) -> list[torch.Tensor]:
    case = cast(make_case(Sizes(1, 1, 4, 4, 1, 2)), dtype)
    case.pop("unimix")
    shapes = [(T, B, U), (T, B, U), (T, B), (T, B, S), (D,), (S,), (S * K, U), (U,), (U,), (3 * D, D + U)]
    shapes += [(3 * D,), (3 * D,), (U, D), (U,), (U,), (S * K, U), (S * K,)]
    return [
        report_cases.meta(*shape, dtype=value.dtype, grad=value.is_floating_point())
        for shape, value in zip(shapes, case.values(), strict=True)
    ]


@needs_triton
@compiled
def test_a_barrier_releases_and_asks_until_all_are_there():
    """In machine code: the compiler may drop what Triton asked for if it seems useless."""
    from hdfast_kernels.rssm_observe_triton import rssm_observe_triton

    with report.compiling(90) as kernels:
        small = arguments(torch.bfloat16, 2, 16, 32, 32, 4, 8)
        outputs = rssm_observe_triton(*small, 0.01, 1e-3, persistent=True)
        report_cases.backward(outputs[0], outputs[1], outputs[3])
    scans = [kernel for kernel in kernels if kernel.metadata.name.startswith("observe")]
    assert len(scans) == 2
    for stages, kernel in zip((6, 7), scans, strict=True):
        ptx = kernel.asm["ptx"]
        asks = re.findall(
            r"bar\.sync\s+0;(?:(?!bra|bar\.sync).)*?atom\.global\S*\.cas.*?\sbra\s", ptx, re.DOTALL
        )
        assert len(re.findall(r"(?:atom|red)\.\S*release\S*\.add", ptx)) == len(asks) == stages
        assert "ld.global.nc" not in ptx  # a load that would not see what other programs wrote


@needs_triton
@pytest.mark.parametrize("at_once", [108, 96])
def test_programs_that_wait_for_each_other_all_run(at_once):
    from hdfast_kernels.rssm_observe_triton import layout

    for B, D, U in (
        (1, 512, 512),
        (16, 512, 512),
        (17, 512, 640),
        (64, 512, 512),
        (16, 1024, 640),
        (48, 1024, 640),
    ):
        split = layout(B, D, U, torch.bfloat16, True, at_once)
        assert split.programs * split.row_programs <= at_once
        assert split.programs * split.BLOCK >= max(D, U)
    with pytest.raises(ValueError, match="1000 sequences with 512 columns do not fit one persistent launch"):
        layout(1000, 512, 512, torch.bfloat16, True, at_once)
    assert layout(1000, 512, 512, torch.bfloat16, False, at_once).BLOCK == 16
