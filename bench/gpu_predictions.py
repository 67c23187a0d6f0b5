"""What the design expects of a GPU, worked out from its rates before any measurement, beside what is measured.

Axes: T time, B windows, H imagined steps.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

T, B, H = 64, 16, 15


@dataclass(frozen=True)
class Rates:
    """From a data sheet: memory in GB/s, dense bfloat16 products on tensor cores and plain float32 in TFLOP/s."""

    memory: float
    bfloat16: float
    float32: float


RATES = {
    "H100": Rates(3350, 990, 67),
    "H200": Rates(4800, 990, 67),
    "A100": Rates(2039, 312, 19.5),
}
ASSUMED = "H100"  # if the card is none of these

# Assumptions, which the table puts to the test.
COPY, PRODUCT = 0.90, 0.70  # of the data sheet: a large copy, a product of 8,192 x 8,192
NARROW = 0.35  # of the data sheet: the update's products, with 1,024 rows and widths of 512
STREAM = 0.80  # of the memory rate: a kernel that reads and writes each number once
GRAPH_US = 2.0  # from one kernel of a graph to the next
LAUNCH_US = (
    20.0  # host time of an eager launch with autograd and Python; 6 was too little for a virtual machine
)
CALL_US = 6.0  # an op in a graph, forward and backward: three launches
WAIT_US = 20.0  # two copies over PCIe and a wake-up
BARRIER_US = 1.1

# What the small model needs, counted on a CPU. First the aten calls that are not views, with every op on its
# reference: in a step of the scan, in a step of imagination (both forward and backward), in the rest of the update, in
# an action. Then with fused ops, one call per direction and some for adding up partial sums and for Adam: in a step of
# imagination, in the rest of the update, in a whole rollout (forward). GFLOP are those of bench.agent.gflop.
SCAN_LAUNCHES, IMAGINE_LAUNCHES, OTHER_LAUNCHES, ACT_LAUNCHES = 110, 64, 1018, 87
FUSED_IMAGINE_LAUNCHES, FUSED_OTHER_LAUNCHES, FUSED_ROLLOUT_LAUNCHES = 18, 502, 331
UPDATE_GFLOP, IMAGINE_GFLOP = 633.0, 141.1
PARAMETER_BYTES = 4 * 17.9e6
# µs per step of the scan at B16, D = U = 512, S = K = 32, forward and backward. Fused: six and seven launches in a
# graph; persistent: as many barriers, and weights from L2. Derived from times of single stages on an H200, three times
# those first predicted (11.5 + 13.0 and 8.0 + 9.0): every stage takes 1.8 µs or more, and those with a norm took 8.
SCAN_US = {"graph": 18.5 + 20.3, "persistent": 20.5 + 20.5}
IMAGE_BYTES = T * B * 64 * 64 * 3
# Encoder and decoder each hold 1,024 images of 32 x 32 x 32, 16 x 16 x 64, ... in bfloat16, which pass through memory
# 11 times: product and norm read and write them (4), and their backward passes do so with the gradients (7). Adam
# passes 11 times over the parameters (3 of them to lay out the gradients and take their norm), casts 1.5 times.
LAYER_BYTES = 2 * T * B * sum(32**2 * 32 >> i for i in range(4))
UPDATE_BYTES = 2 * 11 * LAYER_BYTES + 12.5 * PARAMETER_BYTES


@dataclass(frozen=True)
class Prediction:
    """The `value` of `what` in `unit` and the reason for it; `key` finds the measurement."""

    what: str
    unit: str
    value: float
    why: str
    key: tuple[Any, ...]


def rates_of(card: str) -> tuple[str, Rates]:
    """Name and data sheet of a card, or those of ASSUMED."""
    name = next((name for name in RATES if name in card), ASSUMED)
    return name, RATES[name]


def predictions(card: str) -> list[Prediction]:
    """For the small model in bfloat16, B16 x T64, H15, on a card."""
    _, rates = rates_of(card)

    def stream(nbytes: float) -> float:
        return nbytes / (STREAM * rates.memory * 1e3)

    def products(gflop: float) -> float:
        return gflop / (NARROW * rates.bfloat16 * 1e3) * 1e6

    fused = H * FUSED_IMAGINE_LAUNCHES + FUSED_OTHER_LAUNCHES
    rest = products(UPDATE_GFLOP) + stream(UPDATE_BYTES) + GRAPH_US * fused
    scan = {name: T * step for name, step in SCAN_US.items()}
    imagine = GRAPH_US * FUSED_ROLLOUT_LAUNCHES + products(IMAGINE_GFLOP)
    launches = T * SCAN_LAUNCHES + H * IMAGINE_LAUNCHES + OTHER_LAUNCHES

    def part(name: str, backend: str, graph: bool) -> tuple[Any, ...]:
        return "timing", name, backend, graph

    return [
        Prediction(
            "copy", "GB/s", COPY * rates.memory, f"{COPY:.0%} of {rates.memory:,.0f} GB/s", ("peak", "copy")
        ),
        Prediction(
            "product bfloat16", "GFLOP/s", PRODUCT * rates.bfloat16 * 1e3,
            f"{PRODUCT:.0%} of {rates.bfloat16:,.0f} TFLOP/s", ("peak", "product bfloat16"),
        ),
        Prediction(
            "product float32", "GFLOP/s", PRODUCT * rates.float32 * 1e3,
            f"{PRODUCT:.0%} of {rates.float32:,.0f} TFLOP/s, without TF32", ("peak", "product float32"),
        ),
        Prediction(
            "grid barrier, 64 programs", "µs", BARRIER_US, "one atomic round trip through L2 and one poll",
            ("peak", "grid barrier, 64 programs"),
        ),
        Prediction(
            "scan, eager reference", "µs", LAUNCH_US * T * SCAN_LAUNCHES,
            f"{T * SCAN_LAUNCHES:,} launches of {LAUNCH_US:g} µs",
            part("scan", "reference", False),
        ),
        Prediction(
            "scan, Triton in a graph", "µs", scan["graph"],
            f"{T} steps of {SCAN_US['graph']:.1f} µs, 13 launches each", part("scan", "triton", True),
        ),
        Prediction(
            "scan, persistent in a graph", "µs", scan["persistent"],
            f"{T} steps of {SCAN_US['persistent']:.1f} µs, 13 barriers each", part("scan", "triton-persistent", True),
        ),
        Prediction(
            "imagine, graph", "µs", imagine,
            f"{FUSED_ROLLOUT_LAUNCHES} launches of {GRAPH_US:g} µs, and {IMAGINE_GFLOP:g} GFLOP at {NARROW:.0%}",
            part("imagine", "triton", True),
        ),
        Prediction(
            "update, eager reference", "µs", LAUNCH_US * launches,
            f"{launches:,} launches of {LAUNCH_US:g} µs: bound by the host",
            part("update", "reference", False),
        ),
        Prediction(
            "update, Triton in a graph", "µs", rest + scan["graph"],
            f"{UPDATE_GFLOP:g} GFLOP at {NARROW:.0%}, {UPDATE_BYTES / 1e9:.1f} GB at {STREAM:.0%}, "
            f"{fused:,} launches of {GRAPH_US:g} µs, and the scan",
            part("update", "triton", True),
        ),
        Prediction(
            "update, persistent scan in a graph", "µs", rest + scan["persistent"], "the same with the persistent scan",
            part("update", "triton-persistent", True),
        ),
        Prediction(
            "update that overlaps the next", "µs", rest + scan["persistent"] - imagine,
            "the same, with imagination beside the scan, which leaves most of the chip free",
            part("overlap", "triton-persistent", True),
        ),
        Prediction(
            "act 1, eager reference", "µs", LAUNCH_US * ACT_LAUNCHES + WAIT_US,
            f"{ACT_LAUNCHES} launches of {LAUNCH_US:g} µs, {WAIT_US:g} µs for the copies",
            part("act 1", "reference", False),
        ),
        Prediction(
            "act 1, graph", "µs", GRAPH_US * ACT_LAUNCHES + stream(1.5 * PARAMETER_BYTES) + WAIT_US,
            f"{ACT_LAUNCHES} launches of {GRAPH_US:g} µs, {PARAMETER_BYTES / 1e6:.0f} MB cast, the copies",
            part("act 1", "reference", True),
        ),
        Prediction(
            "sample, graph", "µs", stream(2 * IMAGE_BYTES) + GRAPH_US * 25,
            f"{2 * IMAGE_BYTES / 1e6:.0f} MB at {STREAM:.0%} and 25 launches", part("sample", "reference", True),
        ),
    ]  # fmt: skip


def op_prediction(row: dict[str, Any], card: str) -> float | None:
    """µs of a Triton op, forward and backward: the time to stream the `bytes` it moves, but no less than CALL_US."""
    if not row.get("bytes"):
        return None
    return max(CALL_US, row["bytes"] / (STREAM * rates_of(card)[1].memory * 1e3))


def measured(key: tuple[Any, ...], rows: Iterable[dict[str, Any]]) -> float | None:
    """The measurement of a prediction among the rows of bench.gpu_work (small model, bfloat16)."""
    for row in rows:
        if "error" in row or row["kind"] != key[0]:
            continue
        if row["kind"] == "peak" and row["what"] == key[1]:
            return row["value"]
        small = (row.get("size"), row.get("precision")) == ("small", "bfloat16")
        if row["kind"] == "timing" and small and (row["part"], row["backend"], row["graph"]) == key[1:]:
            return row["us"]
    return None


def compared(card: str, rows: list[dict[str, Any]], benchmarks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Predictions with what was measured (None if nothing was) and the ratio of the two."""
    out = []
    for one in predictions(card):
        found = measured(one.key, rows)
        out.append(
            {"what": one.what, "unit": one.unit, "predicted": one.value, "measured": found, "why": one.why}
        )
    for row in benchmarks:
        value = op_prediction(row, card) if row.get("implementation") == "triton" else None
        if value is not None:
            why = f"{row['bytes'] / 1e6:,.1f} MB at {STREAM:.0%}, no less than {CALL_US:g} µs for launches"
            what = f"{row['group']}, Triton"
            out.append({"what": what, "unit": "µs", "predicted": value, "measured": row["us"], "why": why})
    return [one | {"ratio": one["measured"] and one["measured"] / one["predicted"]} for one in out]
