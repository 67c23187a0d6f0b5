"""Learning curves as a picture: a panel for each task, a colour for each folder of runs."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

_PANEL = (3.2, 2.3)  # inches
_ABOUT = "Thin lines are seeds. Where there are several, a thick one is their mean, in a band of its standard error."

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
    width, height = max(columns * _PANEL[0], 2 * _PANEL[0]), lines * _PANEL[1] + 0.8
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flat
    suites = {suite for suite, _ in panels}
    for axis, ((suite, task), found) in zip(axes, panels.items(), strict=False):
        axis.set_title(f"{suite} {task}" if len(suites) > 1 else task, fontsize="medium")
        _draw_task(axis, found, folders)
    for axis in list(figure.axes)[len(panels) :]:
        axis.set_visible(False)
    figure.supxlabel(f"agent steps\n{_ABOUT}", fontsize="small")
    if folders:
        handles = [figure.axes[0].plot([], [], color=f"C{i % 10}")[0] for i in range(len(folders))]
        figure.legend(
            handles, folders, loc="outside upper center", ncols=min(len(folders), 4), fontsize="small"
        )
    return figure


def _draw_task(axis: Axes, rows: Sequence[Mapping[str, Any]], folders: Sequence[str]) -> None:
    solved = all("success" in row for row in rows)
    for i, folder in enumerate(folders or [None]):
        seeds: dict[int, dict[int, float]] = {}
        for row in rows:
            if folder is None or row["logdir"] == folder:
                value = float(row["success" if solved else "score"])
                seeds.setdefault(row["seed"], {})[row["agent_steps"]] = value
        colour, several = f"C{i % 10}", len(seeds) > 1
        for curve in seeds.values():
            steps = sorted(curve)
            alpha = 0.35 if several else 1.0
            dot = "o" if len(steps) == 1 else None
            values = [curve[step] for step in steps]
            axis.plot(steps, values, color=colour, lw=1, alpha=alpha, marker=dot, ms=4)
        if several:
            common, mean, error = summary(list(seeds.values()))
            axis.plot(common, mean, color=colour, lw=2)
            axis.fill_between(common, mean - error, mean + error, color=colour, alpha=0.3, lw=0)
    axis.set_ylabel("success rate" if solved else "score", fontsize="small")
    if solved:
        axis.set_ylim(-0.03, 1.03)
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.tick_params(labelsize="small")
    axis.spines[["top", "right"]].set_visible(False)


def summary(curves: Sequence[Curve]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Agent steps at which all of several seeds were evaluated, the mean there, and its standard error: (K,) each."""
    steps = np.array(sorted(set.intersection(*(set(curve) for curve in curves))), dtype=np.int64)
    values = np.array([[curve[step] for step in steps] for curve in curves], dtype=np.float64)
    return steps, values.mean(0), values.std(0, ddof=1) / math.sqrt(len(curves))
