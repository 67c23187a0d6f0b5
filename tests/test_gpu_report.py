"""What the record of a GPU tells: which backends should run, predictions, and all of it as Markdown."""

import pytest

from bench import gpu_tools
from bench.gpu_defaults import proposal
from bench.gpu_predictions import RATES, compared, predictions, rates_of
from bench.gpu_report import markdown
from tests.gpu_samples import MEMCHECK, RAW


def bench_row(op, implementation, us, group="g fp32", **more):
    return {"op": op, "group": group, "implementation": implementation, "us": us, **more}


def test_triton_is_proposed_where_it_is_right_and_faster_everywhere():
    ops = dict.fromkeys(
        ("image_loss", "kl_balance", "two_hot_loss", "lambda_return"), ("reference", "triton")
    )
    ops |= {"rssm_observe": ("reference", "triton", "persistent"), "linear": ("reference", "native")}
    ops["adam_step"] = ("reference", "fused", "native")
    tests = [
        {"file": f"test_{name}", "name": "t[triton-cuda]", "outcome": outcome, "reason": ""}
        for name, outcome in (("image_loss", "passed"), ("kl_balance", "failed"), ("two_hot", "passed"))
    ]
    tests.append({"file": "test_native_adam", "name": "t[fused-cuda]", "outcome": "passed", "reason": ""})
    tests.append(
        {
            "file": "test_training_shapes",
            "name": "t[rssm_observe-triton-cuda]",
            "outcome": "passed",
            "reason": "",
        }
    )
    benchmarks = [bench_row(name, "reference", 10.0) for name in ops]
    benchmarks += [bench_row(name, "fused" if name == "adam_step" else "triton", 4.0) for name in ops]
    benchmarks += [
        bench_row("two_hot_loss", i, us, "g bf16") for i, us in (("reference", 3.0), ("triton", 4.0))
    ]
    scan = {"kind": "timing", "part": "scan", "size": "small", "precision": "bfloat16", "graph": True}
    rows = [{**scan, "backend": "reference", "us": 9.0}, {**scan, "backend": "triton", "us": 3.0}]
    found = {
        row["op"]: (row["backend"], row["why"])
        for row in proposal({"tests": tests, "benchmarks": benchmarks, "rows": rows}, ops)
    }
    assert found == {
        "adam_step": ("fused", "1 tests passed; 2.50 to 2.50 x the reference"),
        "image_loss": ("triton", "1 tests passed; 2.50 to 2.50 x the reference"),
        "kl_balance": ("reference", "1 of 1 tests failed"),
        "lambda_return": ("reference", "no test of it ran on a GPU"),
        "linear": ("reference", "has no fused kernel"),
        "rssm_observe": ("triton", "1 tests passed; 2.50 to 3.00 x the reference"),
        "two_hot_loss": ("reference", "1 tests passed; 0.75 to 2.50 x the reference"),
    }


def test_one_launch_is_proposed_where_it_is_right_and_faster_than_many():
    def found(outcome, us):
        tests = [
            {"file": "test_training_shapes", "name": f"t[rssm_observe-triton-cuda{kind}]", "outcome": told}
            for kind, told in (("", "passed"), ("-persistent", outcome))
        ]
        scan = {"part": "scan", "size": "small", "precision": "bfloat16", "graph": True}
        times = {"reference": 9.0, "triton": 3.0, "triton-persistent": us}
        rows = [{**scan, "backend": backend, "us": time} for backend, time in times.items()]
        ops = {"rssm_observe": ("reference", "triton", "persistent")}
        return proposal({"tests": tests, "rows": rows}, ops)[0]

    assert found("passed", 2.0)["backend"] == "persistent"
    assert found("passed", 2.0)["why"] == "1 tests passed; 1.50 to 1.50 x triton"
    assert [found("passed", 4.0)["backend"], found("failed", 2.0)["backend"]] == ["triton", "triton"]


def timing(part, backend, graph, us, **more):
    about = {"kind": "timing", "part": part, "size": "small", "precision": "bfloat16"}
    return {**about, "backend": backend, "graph": graph, **({"us": us} if us else {}), **more}


def test_predictions_stand_beside_what_was_measured():
    scan = next(p.value for p in predictions("H100") if p.what == "scan, Triton in a graph")
    rows = [
        {"kind": "peak", "what": "copy", "unit": "GB/s", "value": 2412.0},
        timing("scan", "triton", True, 2 * scan),
        timing("act 1", "reference", True, None, error="RuntimeError: no"),
    ]
    nbytes = 0.8 * 3350e9 * 1e-3  # a millisecond
    benchmarks = [
        bench_row("image_loss", "triton", 1500.0, bytes=nbytes),
        bench_row("image_loss", "eager", 9.0),
    ]
    found = {row["what"]: row for row in compared("NVIDIA H100 80GB HBM3", rows, benchmarks)}
    assert found["copy"]["ratio"] == pytest.approx(0.8)
    assert found["scan, Triton in a graph"]["ratio"] == pytest.approx(2.0)
    assert found["g fp32, Triton"]["predicted"] == pytest.approx(1000.0)
    assert found["act 1, graph"]["measured"] is None
    assert found["act 1, graph"]["ratio"] is None
    assert len(found) == len(predictions("H100")) + 1


def test_a_faster_card_is_predicted_to_be_faster():
    assert rates_of("NVIDIA A100-SXM4-80GB") == ("A100", RATES["A100"])
    assert rates_of("AMD EPYC")[0] == "H100"
    a100, h100 = ({p.what: p.value for p in predictions(card)} for card in ("A100", "H100"))
    assert a100["update, Triton in a graph"] > h100["update, Triton in a graph"]


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
    ops = {"kl_balance": ("reference", "triton")}
    record = {
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
    record["predictions"] = compared("H100", rows, benchmarks)
    record["cuda_default"] = proposal(record, ops)
    return record


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
        "| kl_balance | reference | 1 of 2 tests failed |",
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
    record |= {
        "predictions": compared("x", [], []),
        "cuda_default": proposal(record, {"adam_step": ("reference",)}),
    }
    text = markdown(record)
    assert "nothing is measured without a GPU" in text
    assert "CUDA_DEFAULT: dict[str, str] = {}" in text
    assert "- Right and faster when fused: nothing that was seen here." in text
    assert "## Training" not in text
