"""Learning curves as a picture: a panel for each task, a colour for each folder of runs."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from hdfast.tables import short

_PANEL = (3.2, 2.3)  # inches
_LETTER, _HANDLE, _LINE = (
    0.075,
    0.5,
    0.2,
)  # inches of a legend: a letter, what stands before a name, a line's height
_STYLES = ("-", "--", ":", "-.")  # of ten colours each

Curve = Mapping[int, float]  # agent steps -> value


def draw_curves(rows: Sequence[Mapping[str, Any]], folders: Sequence[str] = ()) -> Figure:
    """A panel for each suite and task of `rows`, in their order.

    A task shows its success rate if every evaluation of it has one, else its score.

    rows: of `hdfast.results.curves`, at least one; of several folders if each has a `logdir`.
    folders: these folders, in the order of their colours; empty if there is but one.
    """
    panels: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        panels.setdefault((row["suite"], row["task"]), []).append(row)
    columns = min(max(math.ceil(math.sqrt(len(panels))), 1), 6)
    lines = math.ceil(len(panels) / columns)
    width, names = max(columns, 2) * _PANEL[0], short(folders)
    beside = max(1, int(width / (_LETTER * max(map(len, names), default=1) + _HANDLE)))
    height = lines * _PANEL[1] + _LINE * math.ceil(len(names) / beside) + 0.4
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flat
    suites = {suite for suite, _ in panels}
    for axis, ((suite, task), found) in zip(axes, panels.items(), strict=False):
        axis.set_title(f"{suite} {task}" if len(suites) > 1 else task, fontsize="medium")
        _draw_task(axis, found, folders)
    for axis in list(figure.axes)[len(panels) :]:
        axis.set_visible(False)
    figure.supxlabel("agent steps", fontsize="small")
    if names:
        handles = [figure.axes[0].plot([], [], **_look(i))[0] for i in range(len(names))]
        figure.legend(
            handles, names, loc="outside upper center", ncols=min(len(names), beside), fontsize="small"
        )
    return figure


def save(figure: Figure, file: BinaryIO, kind: str) -> None:
    """Writes a picture of a kind such as "png", with fonts that journals accept (Type 42, not 3)."""
    with matplotlib.rc_context({"pdf.fonttype": 42}):
        figure.savefig(file, format=kind, dpi=200)


def _look(number: int) -> dict[str, Any]:
    """Colour and style of a folder's lines."""
    return {"color": f"C{number % 10}", "ls": _STYLES[number // 10 % len(_STYLES)]}


def _draw_task(axis: Axes, rows: Sequence[Mapping[str, Any]], folders: Sequence[str]) -> None:
    """Draws what is finite: each seed, and where there are several their mean, in a band of its standard error."""
    solved = all("success" in row for row in rows)
    for i, folder in enumerate(folders or [None]):
        seeds: dict[int, dict[int, float]] = {}
        for row in rows:
            value = float(row["success" if solved else "score"])
            if math.isfinite(value) and (folder is None or row["logdir"] == folder):
                seeds.setdefault(row["seed"], {})[row["agent_steps"]] = value
        several = len(seeds) > 1
        for curve in seeds.values():
            steps = sorted(curve)
            values = [curve[step] for step in steps]
            axis.plot(
                steps, values, **_look(i), lw=1, alpha=0.35 if several else 1.0, marker=_dot(steps), ms=4
            )
        if several:
            common, mean, error = summary(list(seeds.values()))
            axis.plot(common, mean, **_look(i), lw=2, marker=_dot(common), ms=6)
            axis.fill_between(common, mean - error, mean + error, color=f"C{i % 10}", alpha=0.3, lw=0)
    axis.set_ylabel("success rate" if solved else "score", fontsize="small")
    if solved:
        axis.set_ylim(-0.03, 1.03)
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.tick_params(labelsize="small")
    axis.spines[["top", "right"]].set_visible(False)


def _dot(steps: Sequence[int] | np.ndarray) -> str | None:
    """The marker of a single point, which is no line."""
    return "o" if len(steps) == 1 else None


def summary(curves: Sequence[Curve]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Agent steps, mean of two seeds or more, and its standard error, (K,) each.

    The steps are those of any seed, from the last first to the first last evaluation; between two evaluations of a seed
    its values are those of a straight line.
    """
    first, last = max(min(curve) for curve in curves), min(max(curve) for curve in curves)
    steps = np.array(
        sorted({step for curve in curves for step in curve if first <= step <= last}), dtype=np.int64
    )
    values = np.stack(
        [np.interp(steps, sorted(curve), [curve[step] for step in sorted(curve)]) for curve in curves]
    )
    return steps, values.mean(0), values.std(0, ddof=1) / math.sqrt(len(curves))
