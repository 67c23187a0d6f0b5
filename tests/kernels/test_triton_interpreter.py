"""The Triton kernels, run on the CPU by Triton's interpreter: every op's tests once more, in their own process.

In the other process `backends` offers triton for CPU tensors, and the other tests of this file check the interpreter
itself.
"""

import contextlib

import checks  # noqa: F401  mends the interpreter
import numpy as np
import pytest
import torch

from tests.interpreter import KERNELS, inside, interpreted, outside

# Groups that take about as long, a process each, and how many tests of each must pass.
GROUPS = (
    (24, "layer_norm_gru"),
    (49, "image_blocks", "layer_norm_silu"),
    (200, "image_deconv", "image_input", "image_loss", "strided_conv"),
    (160, "onehot_linear", "sample_onehot", "two_hot"),
    (
        *(
            160,
            "adam_step",
            "gather_windows",
            "harmony_loss",
            "into",
            "kl_balance",
            "lambda_return",
            "mistakes",
        ),
        "triton_interpreter",
    ),
)


@outside
@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group[1])
def test_every_op_under_the_interpreter(group):
    least, *names = group
    files = [KERNELS / f"test_{name}.py" for name in names]
    interpreted(*files, least=least, only="triton", HDFAST_TEST_BACKENDS="triton")


@inside
def test_triton_rounds_bfloat16_as_pytorch_does():
    from hdfast_kernels._triton import tl, triton

    @triton.jit
    def cast(x_ptr, y_ptr, N: tl.constexpr):
        at = tl.arange(0, N)
        tl.store(y_ptr + at, tl.load(x_ptr + at).to(tl.bfloat16))

    x = torch.randn(4096, generator=torch.Generator().manual_seed(0)) * torch.logspace(-38, 38, 4096)
    x[:6] = torch.tensor([1.999, 3.999, -7.99, float("inf"), float("nan"), 3.4e38])
    y = torch.empty(4096, dtype=torch.bfloat16)
    cast[(1,)](x, y, 4096)
    assert torch.equal(y.view(torch.int16)[5:], x.bfloat16().view(torch.int16)[5:])
    assert torch.equal(y[:4], x[:4].bfloat16())
    assert y[4].isnan()


@inside
def test_triton_multiplies_bfloat16():
    from hdfast_kernels._triton import tl, triton

    @triton.jit
    def product(a_ptr, b_ptr, c_ptr, N: tl.constexpr):
        i = tl.arange(0, N)
        at = i[:, None] * N + i[None, :]
        tl.store(c_ptr + at, tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at)))

    a, b = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    c = torch.empty(16, 16)
    product[(1,)](a, b, c, 16)
    assert torch.allclose(c, a.float() @ b.float(), rtol=1e-5, atol=1e-5)


@inside
@pytest.mark.parametrize(
    ("read", "written", "what"),
    [(32, 32, None), (30, 31, None), (33, 32, "reads outside of its"), (32, 33, "writes outside of its")],
)
def test_only_tensors_that_were_given_are_touched(read, written, what):
    from hdfast_kernels._triton import tl, triton

    @triton.jit
    def copy(x_ptr, y_ptr, READ, WRITTEN, BLOCK: tl.constexpr):
        at = tl.arange(0, BLOCK)
        tl.store(y_ptr + at, tl.load(x_ptr + at, mask=at < READ, other=0.0), mask=at < WRITTEN)

    x, y = torch.randn(32), torch.zeros(40)[:32]  # y has room behind it that is not its own
    with contextlib.nullcontext() if what is None else pytest.raises(Exception, match=what):
        copy[(1,)](x, y, read, written, 64)
    assert torch.equal(y[:30], x[:30] if what is None else torch.zeros(30))


@inside
@pytest.mark.parametrize(
    ("inplace", "shift", "what"),
    [
        (False, 0, None),
        (True, 0, None),
        (False, 8, None),
        (True, 8, "program 1 writes"),
        (False, 16, "program 1 writes"),
    ],
)
def test_programs_of_a_launch_share_nothing_that_one_of_them_writes(inplace, shift, what):
    from hdfast_kernels._triton import tl, triton

    @triton.jit
    def add(x_ptr, y_ptr, z_ptr, SHIFT, BLOCK: tl.constexpr):
        program = tl.program_id(0)
        at = tl.arange(0, BLOCK)
        x = tl.load(x_ptr + program * BLOCK + at) + tl.load(z_ptr)  # which both read
        tl.store(y_ptr + program * (BLOCK - SHIFT) + at, x, mask=at < BLOCK - SHIFT % BLOCK)

    x, z = torch.randn(32), torch.ones(1)
    y, expected = x if inplace else torch.empty(32), x + 1
    with contextlib.nullcontext() if what is None else pytest.raises(Exception, match=what):
        add[(2,)](x, y, z, shift, 16)
    if shift == 0:
        assert torch.equal(y, expected)


@inside
def test_what_another_program_wrote_before_a_barrier_is_read_past_the_first_level_cache():
    from interpreter_memory import Launch
    from triton.runtime.interpreter import interpreter_builder

    x = torch.zeros(4)
    pointers, mask = x.data_ptr() + 4 * np.arange(4), np.ones(4, bool)
    launch = Launch("exchange", [x])
    interpreter_builder.set_grid_dim(2, 1, 1)
    for program in (0, 1):
        interpreter_builder.set_grid_idx(program, 0, 0)
        launch.access(pointers[2 * program :][:2], mask[:2], 4, write=True)
    for _ in range(2):
        launch.barrier()
        launch.access(pointers[2:], mask[2:], 4, write=False, cached=True)  # its own
        launch.access(pointers, mask, 4, write=False, cached=False)
        with pytest.raises(AssertionError, match="program 1 reads what another program has written"):
            launch.access(pointers, mask, 4, write=False, cached=True)


@inside
def test_loads_past_the_first_level_cache_are_known_by_their_modifier(monkeypatch):
    from interpreter_memory import Launch

    from hdfast_kernels._triton import tl, triton

    @triton.jit
    def copy(x_ptr, y_ptr):
        at = tl.arange(0, 16)
        past = tl.load(x_ptr + at, mask=at < 8, cache_modifier=".cg") + tl.load(x_ptr, cache_modifier=".cg")
        tl.store(
            y_ptr + at, past + tl.load(x_ptr + at) + tl.load(x_ptr + at, mask=at < 8, cache_modifier=".ca")
        )

    cached = []
    monkeypatch.setattr(
        Launch, "access", lambda *args, write, **how: cached.append(how) if not write else None
    )
    copy[(1,)](torch.randn(16), torch.zeros(16))
    assert [how["cached"] for how in cached] == [False, False, True, True]
