"""What the record of a GPU tells: all of it as Markdown."""

from bench import gpu_tools
from bench.gpu_report import markdown
from tests.gpu_samples import MEMCHECK, RAW


def bench_row(op, implementation, us, group="g fp32", **more):
    return {"op": op, "group": group, "implementation": implementation, "us": us, **more}


def timing(part, backend, graph, us, **more):
    about = {"kind": "timing", "part": part, "size": "small", "precision": "bfloat16"}
    return {**about, "backend": backend, "graph": graph, **({"us": us} if us else {}), **more}


def full_record():
    rows = [
        {"kind": "peak", "what": "copy", "unit": "GB/s", "value": 2412.0},
        {"kind": "peak", "what": "grid barrier, 64 programs", "unit": "µs", "error": "RuntimeError: a | b"},
        timing("update", "reference", False, 40_000.0, gflop=600.0, parameters=17_900_000),
        timing("update", "triton", True, 10_000.0, gflop=600.0, parameters=17_900_000),
        timing("scan", "triton", True, None, error="OutOfResources: shared"),
        {
            "kind": "choice", "size": "small", "precision": "bfloat16", "graph": True,
            "ops": {"kl_balance": "triton", "image_loss": "reference"},
            "report": {
                "kl_balance": {"right": True, "why": ""},
                "linear": {"right": False, "why": "off | by 2"},
                "times": {"right": True, "ms": {"plain PyTorch": 40.0, "fused, graph": 9.5}},
            },
        },
        {"kind": "choice", "size": "small", "precision": "float32", "error": "TuningError: no memory"},
        {
            "kind": "profile", "part": "update", "size": "small", "backend": "triton", "graph": True,
            "kernels": 2100.0, "busy_us": 9000.0, "wall_us": 10_000.0, "idle_share": 0.1,
            "top": [{"name": "void at::native::" + "x" * 200, "launches": 64.0, "us": 900.0}],
        },
    ]  # fmt: skip
    benchmarks = [
        bench_row(
            "kl_balance",
            "triton",
            20.0,
            times_beside=3.0,
            gb_per_second=1500.0,
            share_of_peak=0.6,
            share_of_copies=0.9,
            launches=2,
        )
    ]
    test = {"file": "test_kl_balance", "name": "t[triton-cuda]"}
    return {
        "machine": {"name": "NVIDIA H100", "device": "cuda:0", "memory_bytes": 80e9, "driver": None},
        "seconds": 400.0,
        "steps": {
            "rates": {"status": "ok", "seconds": 3.0},
            "ncu": {"status": "skipped", "seconds": 0.0, "reason": "ncu is not installed"},
        },
        "rows": rows,
        "tests": [
            {**test, "outcome": "failed", "reason": "largest error | 3"},
            {**test, "outcome": "passed"},
        ],
        "benchmarks": benchmarks,
        "ncu": gpu_tools.ncu_rows(RAW),
        "memcheck": gpu_tools.sanitizer_row(MEMCHECK),
        "peers": [
            {
                "precision": "default", "batch": 16,
                "sheeprl": {"version": "0.8.4", "precision": "float32", "seconds": [0.25, 0.5, 0.2]},
                "hdfast": {"version": "1", "precision": "bfloat16", "seconds": [0.01, 0.01, 0.02]},
            }
        ],
        "training": [
            {"kind": "evaluation", "agent_steps": 1000 * k, "seconds": k, "score": 0.5} for k in range(3)
        ],
    }  # fmt: skip


def test_the_markdown_tells_it_all():
    text = markdown(full_record())
    assert text.startswith(
        "# NVIDIA H100\n\n`python bench/gpu_record.py`, 400 s: memory 80 GB, device cuda:0.\n"
    )
    for told in (
        "- An update of the small model in bfloat16: 10.00 ms with triton in a graph (60.0 TFLOP/s), "
        "4.0 x eager PyTorch.",
        "- 1 tests on the GPU passed, 1 failed.",
        "- Not complete: ncu (skipped).",
        "| ncu | skipped | ncu is not installed | 0 |",
        "| update small bfloat16 | 40,000 | 10,000 | 4.00 |",
        "| scan small bfloat16 |  | error |  |",
        "\n\n- 1 x OutOfResources: shared",
        "An update of the small model, 17.9 M parameters, B16 x T64, H15, is 600 GFLOP of matrix products.",
        "| small bfloat16 | plain PyTorch 40, fused, graph 9.5 | kl_balance, as a CUDA graph | "
        "linear (off \\| by 2) |",
        "| small float32 | TuningError: no memory |  |  |",
        "| grid barrier, 64 programs | RuntimeError: a \\| b | µs |",
        "| g fp32 | triton | 20.00 | 3.00 | 1,500 | 60% | 90% | 2 |",
        "| small, triton in a graph | 2,100 | 9,000 | 10,000 | 10% |",
        "| sheeprl | 0.8.4 | default | float32 | 250.0 | 25.00 |",
        "| hdfast | 1 | default | bfloat16 | 10.00 | 1.00 |",
        "| layer_norm_silu_forward | 2 | 8.000 | 4.00 | 82.5 | 35.0 | 65.0 | 40.0 |",
        "- memcheck: 2 errors in one update and one action of a small Triton model.",
        "\n\n- test_kl_balance::t[triton-cuda]: largest error \\| 3",
        "| 2,000 | 2 | 0.500 |",
    ):
        assert told in text, told
    for block in text.split("\n\n"):
        lines = [line.replace("\\|", "") for line in block.splitlines() if line.startswith("|")]
        assert len({line.count("|") for line in lines}) <= 1, block
        assert max(map(len, lines), default=0) < 300


def test_the_markdown_of_nothing():
    record = {"machine": {"name": "x", "device": "cpu"}, "seconds": 1.0, "steps": {}, "rows": []}
    text = markdown(record)
    assert text.startswith("# x\n\n`python bench/gpu_record.py`, 1 s: device cpu.\n")
    assert [line for line in text.splitlines() if line.startswith("## ")] == ["## Steps"]
