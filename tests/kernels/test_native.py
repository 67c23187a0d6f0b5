"""The C++ backend below the ops: every instruction set against float64, its OpenMP threads, its memory, its errors.

The ops' own files test the fastest instruction set of this machine; this one tests all of them.
"""

import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from checks import check_against_fp64, random
from torch._subclasses.fake_tensor import FakeTensorMode

import hdfast_kernels as hk
from hdfast_kernels import native

if not hk.dispatch.native_built():
    pytest.skip("the C++ module is not built", allow_module_level=True)


def reference(name):
    module = "two_hot" if name.startswith("two_hot") else name
    return getattr(sys.modules[f"hdfast_kernels.{module}"], f"{name}_reference")


def number(*shape, dtype=torch.float32, seed=0, scale=1.0):
    return random(*shape, seed=seed, scale=scale).to(dtype).requires_grad_()


def layer_norm_silu(dtype, width):
    affine = {"weight": number(width, seed=1), "bias": number(width, seed=2)}
    return {"x": number(37, width, dtype=dtype, scale=3.0), **affine}


def layer_norm_gru(dtype, width):
    affine = {"weight": number(3 * width, seed=1), "bias": number(3 * width, seed=2)}
    return {
        "gates": number(5, 3 * width, dtype=dtype),
        "deter": number(5, width, dtype=dtype, seed=3),
        **affine,
    }


def two_hot_loss(dtype, bins):
    target = torch.tensor([0.0, -1.5, 1e6, -1e6, 3e9, 0.3, 17.0])
    return {"logits": number(7, bins, dtype=dtype, scale=5.0), "target": target}


def two_hot_mean(dtype, bins):
    return {"logits": number(7, bins, dtype=dtype, scale=2.0)}


def image_loss(dtype, side):
    image = torch.randint(256, (3, side, 5, 3), generator=torch.Generator().manual_seed(0)).byte()
    return {"pred": number(3, side, 5, 3, dtype=dtype), "image": image}


def image_deconv(dtype, side):
    affine = {"weight": number(9, 3, 4, 4, seed=1, scale=0.1), "bias": number(3, seed=2)}
    return {"x": number(2, 3, side, 9, dtype=dtype), **affine}


def kl_balance(dtype, classes):
    post, prior = (random(6, 3, classes, seed=seed, scale=2.0).log_softmax(-1) for seed in (0, 1))
    return {"post_logp": post.to(dtype).requires_grad_(), "prior_logp": prior.to(dtype).requires_grad_()}


def sample_onehot(dtype, classes):
    logits = number(6, 3, classes, dtype=dtype, scale=2.0)
    probs = 0.99 * logits.detach().double().softmax(-1) + 0.01 / classes
    middle = (probs.cumsum(-1) - probs / 2).gather(-1, probs.argmax(-1, keepdim=True))
    return {"logits": logits, "uniform": middle.squeeze(-1).float()}


def onehot_linear(dtype, units):
    index = torch.randint(3, (11, 4), generator=torch.Generator().manual_seed(0))
    latent = torch.nn.functional.one_hot(index, 3).to(dtype).requires_grad_()
    onto = number(11, units, dtype=dtype, seed=1)
    return {
        "index": index,
        "weight": number(12, units, dtype=dtype),
        "straight_through": latent,
        "onto": onto,
    }


def lambda_return(dtype, columns):
    cont = torch.rand(5, columns, generator=torch.Generator().manual_seed(0)).to(dtype)
    return {
        "reward": number(4, columns, dtype=dtype), "cont": cont, "value": number(5, columns, dtype=dtype, seed=1)
    }  # fmt: skip


CASES = [
    layer_norm_silu, layer_norm_gru, two_hot_loss, two_hot_mean, image_loss, image_deconv, kl_balance,
    sample_onehot, onehot_linear, lambda_return,
]  # fmt: skip
# One lane, some lanes, whole vectors of each instruction set (1, 2 and 4 of them take a path of their own), more.
WIDTHS = [2, 7, 8, 16, 32, 64, 130]


@pytest.mark.parametrize("isa", native.isas())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_every_instruction_set_errs_no_more_than_twice_plain_pytorch(case, dtype, isa):
    name = case.__name__
    with native.force_isa(isa):
        assert native.isa() == isa
        for width in WIDTHS:
            op = partial(getattr(hk, name), backend="native")
            check_against_fp64(op, reference(name), case(dtype, width))


@pytest.mark.parametrize("isa", native.isas())
def test_many_rows_on_many_threads(isa, monkeypatch):
    """Enough rows for the threads to share them, and for every block of column sums to fill."""
    monkeypatch.setattr(native, "threads", lambda: 3)
    x = number(1700, 32)
    affine = {"weight": number(32, seed=1), "bias": number(32, seed=2)}
    with native.force_isa(isa):
        op = partial(hk.layer_norm_silu, backend="native")
        first, second = (
            check_against_fp64(op, reference("layer_norm_silu"), {"x": x, **affine}) for _ in range(2)
        )
        assert all(torch.equal(first[name], second[name]) for name in first)

        index = torch.randint(4, (5000, 6), generator=torch.Generator().manual_seed(0))
        arguments = {"index": index, "weight": number(24, 130)}
        check_against_fp64(partial(hk.onehot_linear, backend="native"), reference("onehot_linear"), arguments)


@pytest.mark.parametrize("isa", native.isas())
def test_long_sums(isa):
    """Sums over a large image, many bins, classes and rows, for which a single float is not precise enough."""
    image = torch.randint(256, (1, 512, 512, 3), generator=torch.Generator().manual_seed(0)).byte()
    apart = random(8, 64, 2048), random(8, 64, 2048, seed=1, scale=0.02)
    near = (logits.log_softmax(-1).float() for logits in (apart[0], apart[0] + apart[1]))
    cases = [
        ("image_loss", {"pred": number(1, 512, 512, 3, scale=0.5), "image": image}),
        ("two_hot_mean", {"logits": number(64, 4096, scale=0.1)}),
        ("two_hot_mean", {"logits": number(8, 100_000, scale=0.1)}),
        ("kl_balance", dict(zip(("post_logp", "prior_logp"), near, strict=True)) | {"free": 0.0}),
    ]
    with native.force_isa(isa):
        for name, arguments in cases:
            check_against_fp64(partial(getattr(hk, name), backend="native"), reference(name), arguments)
        rows, bias = torch.ones(1 << 17, 2), torch.zeros(2, requires_grad=True)
        hk.layer_norm_silu(rows, torch.ones(2), bias, backend="native").backward(torch.full_like(rows, 0.2))
        _, mean = hk.harmony_loss(
            [torch.full((1 << 21,), 0.1)], torch.empty(0), (-1,), (1.0,), (), backend="native"
        )
    assert bias.grad.tolist() == pytest.approx([0.1 * (1 << 17)] * 2, rel=1e-6)
    assert mean.item() == pytest.approx(0.1, rel=1e-6)


@pytest.mark.parametrize("isa", native.isas()[1:])  # the slowest has no such instructions
def test_what_is_larger_than_the_caches_is_stored_past_them(isa):
    """From 32 MiB on, with other instructions: repeated rows give the same numbers as the rows once."""
    cases = [
        *(
            ("layer_norm_silu", number(64, width, dtype=dtype), [torch.ones(width), torch.zeros(width)], [])
            for width, dtype in ((32, torch.float32), (128, torch.bfloat16))
        ),
        (
            "image_loss",
            number(2, 64, 64, 3, dtype=torch.bfloat16),
            [],
            [torch.full((2, 64, 64, 3), 99).byte()],
        ),
    ]
    for name, few, others, repeated in cases:
        found, most = [], (32 << 20) // few.nbytes + 1
        for times in (1, most):
            given, *more = (torch.cat([one.detach()] * times) for one in (few, *repeated))
            with native.force_isa(isa):
                out = getattr(hk, name)(given.requires_grad_(), *others, *more, backend="native")
                found.append((out, *torch.autograd.grad(out, given, torch.ones_like(out))))
        for once, often in zip(*found, strict=True):
            assert torch.equal(often.view(most, *once.shape), once.expand(most, *once.shape)), name


@pytest.mark.parametrize("isa", native.isas())
def test_a_nan_stays_one(isa):
    x = torch.randn(3, 40)
    x[1, 17] = torch.nan
    with native.force_isa(isa):
        for dtype in (torch.float32, torch.bfloat16):
            y = hk.layer_norm_silu(x.to(dtype), torch.ones(40), torch.zeros(40), backend="native")
            assert y.isnan().all(dim=1).tolist() == [False, True, False]
            loss = hk.two_hot_loss(x.to(dtype), torch.zeros(3), backend="native")
            assert loss.isnan().tolist() == [False, True, False]
            gates, affine = x.repeat(1, 3).to(dtype), (torch.ones(120), torch.zeros(120))
            deter = hk.layer_norm_gru(gates, torch.zeros(3, 40), *affine, backend="native")
            assert deter.isnan().all(dim=1).tolist() == [False, True, False]
            kl, _, _ = hk.kl_balance(
                x.to(dtype).view(3, 4, 10), -torch.ones(3, 4, 10).to(dtype), backend="native"
            )
            assert kl.isnan().tolist() == [False, True, False]
            for wild in (torch.nan, torch.inf):
                logits = torch.zeros(3, 4, 10, dtype=dtype)
                logits[1, 2, 3] = wild
                logp = hk.sample_onehot(logits, torch.full((3, 4), 0.5), backend="native")[2]
                assert logp.isnan().all(-1).tolist() == [
                    [False] * 4,
                    [False, False, True, False],
                    [False] * 4,
                ]


@pytest.mark.parametrize("isa", native.isas())
def test_infinite_targets_are_the_end_bins(isa):
    logits, ends = torch.randn(2, 255), torch.tensor([torch.inf, -torch.inf])
    with native.force_isa(isa):
        loss = hk.two_hot_loss(logits, ends, backend="native")
        assert torch.equal(loss, hk.two_hot_loss(logits, 1e30 * ends.sign(), backend="native"))


@pytest.mark.parametrize("isa", native.isas())
def test_the_candidate_of_the_gru_is_right_near_zero_and_stays_within_one(isa):
    """With both other gates open the next state is tanh of the candidate, which must not be rounded beyond 1."""
    small = torch.logspace(-30, 0, 2048)
    cand = torch.cat([-small, torch.linspace(-12, 12, 4096), small])
    width, open_ = len(cand), torch.full_like(cand, 100.0)
    with native.force_isa(isa):
        zeros = torch.zeros(1, width)
        weight, bias = torch.zeros(3 * width), torch.cat([open_, cand, open_])
        deter = hk.layer_norm_gru(zeros.repeat(1, 3), zeros, weight, bias, backend="native")[0]
    assert deter.abs().max() <= 1
    torch.testing.assert_close(deter.double(), cand.double().tanh(), rtol=3e-7, atol=0)


def test_an_instruction_set_that_is_not_here():
    before = native.isa()
    with (
        pytest.raises(ValueError, match="'altivec' is not compiled in or not supported here"),
        native.force_isa("altivec"),
    ):
        pass
    with pytest.raises(KeyError), native.force_isa("generic"):
        raise KeyError
    assert native.isa() == before


def test_an_instruction_set_that_the_environment_names(monkeypatch):
    before, code = native.isa(), "from hdfast_kernels import native; print(native.isa())"
    environment = {**os.environ, "HDFAST_ISA": "generic"}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert ran.stdout.strip() == "generic", ran.stderr
    with native.force_isa(before):  # restores it
        for isa in native.isas():
            monkeypatch.setenv("HDFAST_ISA", isa)
            native.module.cache_clear()
            assert native.isa() == isa
    monkeypatch.setenv("HDFAST_ISA", "altivec")
    native.module.cache_clear()
    for _ in range(2):  # a refusal is not remembered as a success
        with pytest.raises(
            native.IsaError, match="HDFAST_ISA=altivec cannot run here; choose one of generic"
        ):
            native.isa()
    monkeypatch.setenv("HDFAST_ISA", "")
    assert native.isa() == before


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_one_openmp_runtime_serves_torch_and_the_ops():
    native.module()
    mapped = Path("/proc/self/maps").read_text().splitlines()
    runtimes = {
        line.split()[-1] for line in mapped if "libgomp" in line or "libomp" in line or "libiomp" in line
    }
    assert len({Path(path).resolve() for path in runtimes}) == 1, runtimes


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_what_cpp_would_misread_is_refused():
    with pytest.raises(ValueError, match=r"contiguous CPU tensors, got one on cpu with shape \(3, 2\)"):
        native.ptr(torch.ones(2, 3).T)
    with pytest.raises(ValueError, match="contiguous CPU tensors, got one on meta"):
        native.ptr(torch.ones(2, device="meta"))
    with pytest.raises(TypeError, match=r"float32 or bfloat16, got torch\.float16"):
        native.is_bf16(torch.ones(2, dtype=torch.float16))
    with FakeTensorMode(), pytest.raises(ValueError, match="with memory, got a FakeTensor without"):
        native.ptr(torch.ones(2))


def test_a_class_out_of_range_is_found_before_memory_is_read():
    weight = torch.ones(6, 4)
    for wrong in (3, -1):
        with pytest.raises(IndexError, match=rf"index {wrong} of group 1 is not in \[0, 3\)"):
            hk.onehot_linear(torch.tensor([[0, 2], [1, wrong]]), weight, backend="native")


FAULTS = """
import resource
import torch
from hdfast_kernels import native

torch.set_num_threads(1)
native.module()
def faults(times):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        torch.ones(40 << 20, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
returned = [faults(30), faults(30)][1]  # once the allocator has a block that fits, if it keeps one
assert native.keep_freed_memory()
kept = [faults(30), faults(30)][1]
print(kept, returned)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="of glibc's allocator")
def test_memory_that_is_kept_is_not_faulted_in_again():
    root = Path(hk.__file__).parents[1]
    command = [sys.executable, "-c", FAULTS]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    kept, returned = map(int, result.stdout.split())
    assert kept < returned / 10, result.stdout


def test_a_module_of_other_sources_is_refused(tmp_path, monkeypatch):
    """As in an editable install after `git pull`: its ops may expect other arguments than they are given."""
    if not native.SOURCES.is_dir():
        pytest.skip("this is no editable install: the sources are not beside the package")
    shutil.copytree(native.SOURCES, tmp_path / "csrc")
    monkeypatch.setattr(native, "SOURCES", tmp_path / "csrc")
    assert native.module.__wrapped__() is native.module()
    with (tmp_path / "csrc" / "ops" / "kl_balance.cpp").open("a") as file:
        file.write("\n")
    with pytest.raises(
        hk.BackendError, match=r"was built before .*csrc changed; build it with `pip install -e"
    ):
        native.module.__wrapped__()
