"""The Triton kernels compile for real GPUs, within the chips' limits and without spilling registers."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hdfast_kernels import dispatch, report, report_cases

pytestmark = [
    pytest.mark.skipif(not dispatch.triton_installed(), reason="needs triton; `pip install triton`"),
    pytest.mark.skipif(dispatch.triton_interpreted(), reason="TRITON_INTERPRET=1 compiles nothing"),
]
QUICK = [case for case in report_cases.cases() if case.quick]
REST = [
    (case, sm) for case in report_cases.cases() for sm in report.SHARED_LIMIT if not (case.quick and sm == 90)
]
FORWARD_ONLY = {"adam_step", "gather_windows", "image_input", "sample_index"}  # ops that have no gradient
IMAGE_PRODUCTS = ("image_halved_forward", "image_doubled_forward", "image_weight_backward")


def gate(kernels: list[report.Kernel]) -> None:
    names = [kernel.name for kernel in kernels]
    into = kernels[0].role.startswith("into ")  # memory of the caller's
    assert any(name.endswith("forward") for name in names), names
    assert any(name.endswith("backward") for name in names) or into or kernels[0].op in FORWARD_ONLY, names
    for kernel in kernels:
        assert not kernel.faults(), (kernel.name, kernel.role, kernel.sm, kernel.faults())
        waits = kernel.role.startswith("one launch") and kernel.name.startswith("observe")
        if waits:  # at barriers, so that all programs must run at once
            assert kernel.instructions["atom"] > 0, kernel.name
            assert kernel.programs_per_multiprocessor >= 1, kernel
        else:
            assert kernel.instructions["atom"] == 0, f"{kernel.name}: atomics make a run not repeat"


@pytest.mark.parametrize("case", QUICK, ids=lambda case: f"{case.op}-{case.backend}")
def test_training_shapes_on_sm_90(case):
    kernels = report.compile_case(case, 90)
    gate(kernels)
    for kernel in kernels:
        # These move the most bytes. Loads of 4 or 8 are those of a row's moments, and of pixels beside which the next
        # thread loads.
        if kernel.name.startswith(("layer_norm_silu", "image_input", "image_loss", "gather_windows")):
            assert kernel.instructions["ldg16"] == 0, kernel.instructions
        if kernel.name.startswith(("image_input", "gather_windows")):
            assert kernel.instructions["ldg128"] >= kernel.instructions["ldg"] - 1, kernel.instructions
        if kernel.name.startswith("layer_norm_silu"):
            assert kernel.instructions["ldg128"] >= kernel.instructions["ldg"] / 2, kernel.instructions
        if kernel.name in ("onehot_linear_backward", *IMAGE_PRODUCTS):
            assert kernel.instructions["mma"] > 0, kernel.instructions
        if kernel.name in IMAGE_PRODUCTS:  # everything but a bias is read in whole vectors
            assert kernel.instructions["ldg128"] >= kernel.instructions["ldg"] - 2, kernel.instructions


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("channels", [32, 128, 512, 1024, 2048])
def test_programs_that_are_to_run_at_once_do(channels, dtype):
    """A gradient of layer_norm_silu is split for as many programs as an H100 has room for, by their registers."""
    own = importlib.import_module("hdfast_kernels.layer_norm_silu")
    given = report_cases.meta(1 << 16, channels, dtype=dtype, grad=True)
    affine = [report_cases.meta(channels, grad=True) for _ in range(2)]
    with report.compiling(90) as kernels:
        report_cases.backward(report_cases.with_kernels("layer_norm_silu")(given, *affine, 1e-3))
    (kernel,) = (kernel for kernel in kernels if kernel.metadata.name == "layer_norm_silu_backward")
    found = report.inspect(kernel.asm["cubin"])
    about = report.Kernel(
        "layer_norm_silu", "", kernel.metadata.name, 90, *found[:2], kernel.metadata.shared,
        kernel.metadata.num_warps, found[2],
    )  # fmt: skip
    assert not about.faults()
    _, at_once = own.backward_tile(channels, dtype.itemsize)
    assert about.programs_per_multiprocessor * 132 >= at_once


def one_row() -> dict[str, Callable[[Callable], None]]:
    """A call of each op with one row: Triton makes 1 a constant of the kernel, which has no methods."""
    meta, backward, many = report_cases.meta, report_cases.backward, {"grad": True}
    low = {**many, "dtype": torch.bfloat16}
    return {
        "adam_step": lambda op: op(
            *([meta(1)] for _ in range(4)), meta(), meta(), (0.0, 0.999), 1.0, 1.0, float("inf"), None
        ),
        "gather_windows": lambda op: op(meta(1, 1, dtype=torch.uint8), meta(1, dtype=torch.int64), 1, 1),
        "harmony_loss": lambda op: backward(op([meta(1, **many)], meta(1, **many), (0,), (1.0,), (1.0,))[0]),
        "image_deconv": lambda op: backward(
            op(meta(1, 1, 1, 1, **low), meta(1, 1, 4, 4, **many), meta(1, **many))
        ),
        "image_input": lambda op: op(meta(1, dtype=torch.uint8), torch.float32),
        "image_loss": lambda op: backward(op(meta(1, 2, 2, 3, **many), meta(1, 2, 2, 3, dtype=torch.uint8))),
        "kl_balance": lambda op: backward(*op(meta(1, 2, 3, **many), meta(1, 2, 3, **many), 1.0)[:2]),
        "lambda_return": lambda op: backward(
            op(meta(1, 1, **many), meta(2, 1), meta(2, 1, **many), 0.99, 0.95)[0]
        ),
        "layer_norm_gru": lambda op: backward(
            op(meta(1, 21, **many), meta(1, 7, **many), meta(21, **many), meta(21, **many), 1e-3)
        ),
        "layer_norm_silu": lambda op: backward(
            op(meta(1, 7, **many), meta(7, **many), meta(7, **many), 1e-3)
        ),
        "onehot_linear": lambda op: backward(
            op(meta(1, 5, dtype=torch.int64), meta(15, 9, **many), meta(1, 5, 3, **many), meta(1, 9, **many))
        ),
        "rssm_observe": lambda op: backward(*(op(*one_sequence(), 0.01, 1e-3)[k] for k in (0, 1, 3))),
        "sample_index": lambda op: op(meta(1, 1, 3, **many), meta(1, 1), 0.01),
        "sample_onehot": lambda op: backward(*op(meta(1, 1, 3, **many), meta(1, 1), 0.01)[::2]),
        "strided_conv": lambda op: backward(op(meta(1, 2, 2, 1, **low), meta(1, 1, 4, 4, **many))),
        "two_hot_loss": lambda op: backward(op(meta(1, 9, **many), meta(1), -20.0, 20.0)),
        "two_hot_mean": lambda op: backward(op(meta(1, 9, **many), -20.0, 20.0)),
    }


def one_sequence() -> list[torch.Tensor]:
    """The tensors of rssm_observe for one step of one sequence, D = U = 8, two groups of three classes."""
    shapes = [(1, 1, 8), (1, 1, 8), (1, 1), (1, 1, 2), (8,), (2,), (6, 8), (8,), (8,), (24, 16), (24,), (24,)]
    shapes += [(8, 8), (8,), (8,), (6, 8), (6,)]
    given = {2: torch.bool, 5: torch.int64}
    return [
        report_cases.meta(*shape, dtype=given.get(k, torch.float32), grad=k not in (2, 3, 5))
        for k, shape in enumerate(shapes)
    ]


@pytest.mark.parametrize("op", dict.fromkeys(case.op for case in QUICK))
def test_one_row_compiles(op):
    with report.compiling(90) as kernels:
        one_row()[op](report_cases.with_kernels(op))
    assert len(kernels) >= (1 if op in FORWARD_ONLY else 2)


def test_every_op_with_triton_kernels_is_in_the_report():
    assert dispatch.first_of(("triton",)).keys() <= {case.op for case in QUICK}


@pytest.mark.slow
@pytest.mark.parametrize(("case", "sm"), REST, ids=lambda value: getattr(value, "role", value))
def test_all_shapes_on_all_chips(case, sm):
    gate(report.compile_case(case, sm))


def oldest_triton() -> str:
    """The lower bound in pyproject.toml, such as 3.6."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    wanted = " ".join(project["optional-dependencies"]["dev"])
    return re.search(r"triton>=([\d.]+)", wanted).group(1)


def test_training_shapes_on_the_oldest_triton(tmp_path_factory):
    """The oldest Triton allowed compiles what the installed one does."""
    folder = tmp_path_factory.mktemp("triton", numbered=False)
    install = [
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--retries",
        "0",
        "--timeout",
        "15",
        "--target",
        folder,
    ]
    command = [sys.executable, *install, f"triton=={oldest_triton()}.0"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"no older triton to be had: {done.stderr.strip()[-300:]}")
    try:
        version = "import triton; print(triton.__version__)"
        for command, expected in (
            (["-c", version], f"{oldest_triton()}.0"),
            (["-m", "hdfast_kernels.report", "--quick", "--sm", "90"], "kernels without fault"),
        ):
            environment = {**os.environ, "PYTHONPATH": str(folder)}
            done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment)
            assert done.returncode == 0, done.stdout + done.stderr
            assert expected in done.stdout + done.stderr
    finally:
        shutil.rmtree(folder)  # 640 MB


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"stack_bytes": 8, "local": 3}, "spills: 3 accesses to 8 bytes of stack"),
        ({"shared_bytes": 200 * 1024}, "204800 bytes of shared memory, the chip has 166912"),
        ({"registers": 300}, "300 registers a thread"),
        ({}, None),
    ],
)
def test_the_gate_shuts(change, fault):
    numbers = {"registers": 64, "stack_bytes": 0, "shared_bytes": 1024, "warps": 4, "local": 0} | change
    instructions = dict.fromkeys(report.INSTRUCTIONS, 0) | {"local": numbers.pop("local")}
    kernel = report.Kernel("op", "role", "op_forward", 80, **numbers, instructions=instructions)
    assert fault in kernel.faults()[0] if fault else kernel.faults() == []


def test_occupancy_of_literal_numbers():
    instructions = dict.fromkeys(report.INSTRUCTIONS, 0)

    def programs(registers, shared, warps):
        kernel = report.Kernel("op", "role", "op_forward", 90, registers, 0, shared, warps, instructions)
        return kernel.programs_per_multiprocessor

    assert programs(128, 0, 4) == 4  # 65,536 / (128 * 128)
    assert programs(121, 0, 4) == 4  # registers come in eights
    assert programs(32, 100 * 1024, 4) == 2  # 227 KiB / 100 KiB
    assert programs(16, 0, 8) == 8  # 64 warps
    assert programs(16, 0, 1) == 32


def test_a_spill_is_seen(monkeypatch):
    """Rows of 4,096 in one piece spill in the GRU's backward pass, which the report must notice."""
    monkeypatch.setattr(importlib.import_module("hdfast_kernels.layer_norm_gru"), "WIDEST", 4096)

    def call(op):
        gates, affine = report_cases.meta(1024, 3 * 4096, grad=True), report_cases.meta(3 * 4096, grad=True)
        report_cases.backward(op(gates, report_cases.meta(1024, 4096, grad=True), affine, affine, 1e-3))

    kernels = report.compile_case(report_cases.Case("layer_norm_gru", "xlarge", call), 90)
    assert [kernel.name for kernel in kernels if kernel.faults()] == ["layer_norm_gru_backward"]


def test_command_line(capsys, monkeypatch):
    command = ["--quick", "--op", "lambda_return", "--sm", "90"]
    assert report.main([*command, "--json"]) == 0
    out, err = capsys.readouterr()
    assert {kernel["name"] for kernel in json.loads(out)} == {
        "lambda_return_forward",
        "lambda_return_backward",
    }
    assert "2 kernels without fault" in err
    assert report.main(command) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split()[:4] == ["kernel", "shape", "sm", "regs"]
    assert len(lines) == 2
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert report.main(command) == 2
    assert "unset it" in capsys.readouterr().err
