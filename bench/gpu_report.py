"""A record of bench/gpu_record.py as Markdown: how hdfast does on a GPU."""

import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

from bench.table import markdown as table
from bench.table import number
from hdfast.tuning.search import milliseconds

MODES = [
    ("reference", False),
    ("reference", True),
    ("triton", False),
    ("triton", True),
    ("triton-persistent", True),
    ("default", False),
    ("default", True),
]
UPDATES = ("update", "overlap")  # parts that are whole updates
NAME = 70  # characters of a kernel's name
SHOWN = 12  # kernels in a table


def markdown(record: dict[str, Any]) -> str:
    """All sections that the record has anything for, the most wanted first."""
    about = record["machine"]
    sections: list[tuple[str, Callable[[dict[str, Any]], list[str]]]] = [
        ("In short", summary),
        ("Steps", steps),
        ("Time of each part", timings),
        ("What a run finds for itself (hdfast.tune)", choices),
        ("An update of sheeprl's DreamerV3, in turns with ours in a graph", peers),
        ("Rates of the machine", peaks),
        ("Ops, forward and backward, beside eager PyTorch", ops),
        ("An update under torch.profiler", profiles),
        ("Kernels under ncu", ncu),
        ("compute-sanitizer", sanitizer),
        ("Tests", tests),
        ("Training, suite demo", training),
        ("Training, Atari 100k, Boxing", game),
    ]
    gigabytes = {"memory": f"{about['memory_bytes'] / 1e9:.0f} GB"} if "memory_bytes" in about else {}
    told = {
        key: value
        for key, value in about.items()
        if key not in ("name", "memory_bytes") and value is not None
    }
    known = [f"{key} {value}" for key, value in (gigabytes | told).items()]
    lines = [
        f"# {about['name']}",
        "",
        f"`python bench/gpu_record.py`, {record['seconds']:.0f} s: {', '.join(known)}.",
    ]
    for title, section in sections:
        body = section(record)
        if body:
            lines += ["", f"## {title}", "", *body]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).rstrip() + "\n"


def cell(text: str) -> str:
    """The text in a form that does not break a table."""
    return " ".join(text.split()).replace("|", "\\|")


def short(name: str) -> str:
    """A kernel's name without C++'s additions, shortened to NAME."""
    name = name.removeprefix("void ").replace("at::native::", "").replace("(anonymous namespace)::", "")
    return cell(name if len(name) <= NAME else name[: NAME - 1] + "…")


def percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def summary(record: dict[str, Any]) -> list[str]:
    """The main results, a line each."""
    lines = []
    updates = [
        row
        for row in record["rows"]
        if row["kind"] == "timing" and row["part"] in UPDATES and row["size"] == "small" and "us" in row
    ]
    for precision in sorted({row["precision"] for row in updates}):
        rows = [row for row in updates if row["precision"] == precision]
        best = min(rows, key=lambda row: row["us"])
        eager = next((row for row in rows if (row["backend"], row["graph"]) == ("reference", False)), None)
        text = f"- An update of the small model in {precision}: {best['us'] / 1e3:.2f} ms with {mode(best)}"
        if "gflop" in best:
            text += f" ({1e3 * best['gflop'] / best['us']:,.1f} TFLOP/s)"
        lines.append(text + (f", {eager['us'] / best['us']:.1f} x eager PyTorch." if eager else "."))
    counts = Counter(test["outcome"] for test in record.get("tests", []))
    if counts["passed"] or counts["failed"]:
        lines.append(f"- {counts['passed']} tests on the GPU passed, {counts['failed']} failed.")
    rest = [f"{name} ({step['status']})" for name, step in record["steps"].items() if step["status"] != "ok"]
    return lines + ([f"- Not complete: {', '.join(rest)}."] if rest else [])


def mode(row: dict[str, Any]) -> str:
    """A row's backend, whether it is a graph, and whether halves of two updates overlap in it."""
    overlap = " that overlaps the next" if row["part"] == "overlap" else ""
    return f"{row['backend']}{' in a graph' if row['graph'] else ''}{overlap}"


def steps(record: dict[str, Any]) -> list[str]:
    rows = [
        [name, step["status"], cell(step.get("reason", "")), f"{step['seconds']:.0f}"]
        for name, step in record["steps"].items()
    ]
    return [table(["step", "", "reason", "seconds"], rows, texts=3)]


def timings(record: dict[str, Any]) -> list[str]:
    times: dict[tuple[str, ...], dict[tuple[str, bool], dict[str, Any]]] = defaultdict(dict)
    for row in record["rows"]:
        if row["kind"] == "timing":
            times[row["part"], row["size"], row["precision"]][row["backend"], row["graph"]] = row
    if not times:
        return []
    modes = [mode for mode in MODES if any(mode in found for found in times.values())]
    rows = []
    for about, found in times.items():
        known = {mode: found[mode]["us"] for mode in modes if "us" in found.get(mode, {})}
        texts = [
            number(known[mode], 4) if mode in known else "error" if mode in found else "" for mode in modes
        ]
        first = known.get(modes[0])
        gain = f"{first / min(known.values()):.2f}" if first else ""
        rows.append([" ".join(about), *texts, gain])
    head = ["µs", *(f"{backend}{', graph' if graph else ''}" for backend, graph in modes)]
    errors = Counter(row["error"] for row in record["rows"] if row["kind"] == "timing" and "error" in row)
    lines = [table([*head, "best, x first"], rows)]
    lines += ["", *(f"- {count} x {cell(error)}" for error, count in errors.items())] if errors else []
    work = next((row for row in record["rows"] if row.get("part") == "update" and "gflop" in row), None)
    if work:
        lines += [
            "",
            f"An update of the {work['size']} model, {work['parameters'] / 1e6:.1f} M parameters, B16 x T64, ",
        ]
        lines[-1] += f"H15, is {work['gflop']:,.0f} GFLOP of matrix products."
    return lines


def choices(record: dict[str, Any]) -> list[str]:
    """A line for each model: its updates' times, the ops that run fused, and those that are not right."""
    rows = []
    for row in record["rows"]:
        if row["kind"] != "choice":
            continue
        model = f"{row['size']} {row['precision']}"
        if "error" in row:
            rows.append([model, cell(row["error"]), "", ""])
            continue
        ms = ", ".join(f"{name} {one:.3g}" for name, one in milliseconds(row["report"]).items())
        ops = ", ".join(sorted(op for op, backend in (row["ops"] or {}).items() if backend != "reference"))
        wrong = [f"{op} ({line['why']})" for op, line in row["report"].items() if not line["right"]]
        rows.append([model, ms, ops + (", as a CUDA graph" if row["graph"] else ""), cell("; ".join(wrong))])
    return [table(["model", "ms an update", "runs fused", "not right"], rows, texts=4)] if rows else []


def peers(record: dict[str, Any]) -> list[str]:
    rows = []
    for result in record.get("peers", []):
        programs = {name: about for name, about in result.items() if isinstance(about, dict)}
        ours = statistics.median(programs["hdfast"]["seconds"])
        for name, about in programs.items():
            median = statistics.median(about["seconds"])
            told = [name, about["version"], result["precision"], about["precision"], number(1e3 * median, 4)]
            rows.append([*told, f"{median / ours:.2f}"])
    head = ["", "version", "asked for", "precision", "median ms", "x ours"]
    return [table(head, rows, texts=4)] if rows else []


def peaks(record: dict[str, Any]) -> list[str]:
    rows = [
        [row["what"], number(row["value"], 4) if "value" in row else cell(row["error"]), row["unit"]]
        for row in record["rows"]
        if row["kind"] == "peak"
    ]
    return [table(["", "", ""], rows)] if rows else []


def ops(record: dict[str, Any]) -> list[str]:
    rows = [
        [
            cell(row["group"]),
            row["implementation"],
            number(row["us"], 4),
            f"{row['times_beside']:.2f}" if "times_beside" in row else "",
            number(row.get("gb_per_second")),
            percent(row.get("share_of_peak")),
            percent(row.get("share_of_copies")),
            str(row.get("launches", "")),
        ]
        for row in sorted(record.get("benchmarks", []), key=lambda row: (row["group"], row["us"]))
    ]
    head = ["", "implementation", "median µs", "x eager", "GB/s", "of a copy"]
    head += ["default: of copies alike", "default: launches"]  # only taken of what runs by default
    return [table(head, rows, texts=2)] if rows else []


def profiles(record: dict[str, Any]) -> list[str]:
    found = [row for row in record["rows"] if row["kind"] == "profile" and "busy_us" in row]
    if not found:
        return []
    what = "kernels" if record["machine"]["device"].startswith("cuda") else "ops"
    names = [f"{row['size']}, {mode(row)}" for row in found]
    keys = ("kernels", "busy_us", "wall_us")
    rows = [
        [name, *(number(row[key], 4) for key in keys), percent(row["idle_share"])]
        for name, row in zip(names, found, strict=True)
    ]
    lines = [table(["update", what, "busy µs", "wall µs", "idle"], rows)]
    for name, row in zip(names, found, strict=True):
        most = [
            [short(one["name"]), f"{one['launches']:g}", number(one["us"], 4)] for one in row["top"][:SHOWN]
        ]
        lines += ["", table([name, "launches", "µs"], most)]
    return lines


def ncu(record: dict[str, Any]) -> list[str]:
    rows = [
        [
            short(row["name"]),
            str(row["launches"]),
            number(row["us"], 4),
            number(row["us"] / row["launches"]),
            *(number(row[key]) for key in ("dram_percent", "sm_percent", "occupancy_percent", "registers")),
        ]
        for row in record.get("ncu", [])[: 2 * SHOWN]
    ]
    head = ["kernel of an update", "launches", "µs", "µs each", "dram %", "sm %", "occupancy %", "registers"]
    return [table(head, rows)] if rows else []


def sanitizer(record: dict[str, Any]) -> list[str]:
    lines = []
    for tool in ("memcheck", "racecheck"):
        found = record.get(tool)
        if found and found["errors"] is not None:
            lines.append(
                f"- {tool}: {found['errors']} errors in one update and one action of a small Triton model."
            )
            lines += [f"  - {count} x {cell(kind)}" for kind, count in found["kinds"].items()]
    return lines


def tests(record: dict[str, Any]) -> list[str]:
    found = record.get("tests", [])
    by_file: dict[str, Counter[str]] = defaultdict(Counter)
    for test in found:
        by_file[test["file"]][test["outcome"]] += 1
    kinds = ("passed", "failed", "skipped")
    rows = [[name, *(str(counts[kind] or "") for kind in kinds)] for name, counts in sorted(by_file.items())]
    wrong = [test for test in found if test["outcome"] == "failed"]
    lines = [table(["file", *kinds], rows), ""] if rows else []
    return lines + [f"- {test['file']}::{cell(test['name'])}: {cell(test['reason'])}" for test in wrong[:40]]


def training(record: dict[str, Any], name: str = "training", bins: int = 12) -> list[str]:
    """Evaluations, or if there are fewer than three, mean scores of the episodes in `bins` parts of the run."""
    lines = record.get(name, [])
    evaluations = [line for line in lines if line["kind"] == "evaluation"]
    if len(evaluations) < 3:
        episodes = [line for line in lines if line["kind"] == "episode"]
        size = -(-len(episodes) // bins) or 1
        parts = [episodes[i : i + size] for i in range(0, len(episodes), size)]
        evaluations = [{**part[-1], "score": sum(one["score"] for one in part) / len(part)} for part in parts]
    rows = [
        [f"{line['agent_steps']:,}", f"{line['seconds']:.0f}", number(line["score"])] for line in evaluations
    ]
    return [table(["agent steps", "seconds", "score"], rows, texts=0)] if rows else []


def game(record: dict[str, Any]) -> list[str]:
    """The same for the game of Atari 100k."""
    return training(record, "game")
