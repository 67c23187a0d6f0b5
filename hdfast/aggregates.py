"""What a suite's scores come to in three numbers, and how far other seeds would have moved them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Aggregate:
    """The results of a suite in three numbers."""

    mean: float
    median: float
    iqm: float


def aggregate(scores: Sequence[Sequence[float]]) -> Aggregate:
    """Mean and median over tasks of each task's mean, and the interquartile mean over all runs of all tasks.

    scores: for each task the (human-normalised) scores of its runs. The interquartile mean leaves out the
    lowest and the highest quarter of the runs, rounded down, as rliable does (Agarwal et al. 2021); with
    several seeds it is not that of the tasks' means: HarmonyDream's published 0.607 would be 0.741.
    """
    if not scores or not all(len(runs) for runs in scores):
        raise ValueError("every task needs at least one score, and there has to be a task")
    (found,) = _aggregates([np.asarray([runs], np.float64) for runs in scores])
    return Aggregate(*found.tolist())


def interval(scores: Sequence[Sequence[float]], resamples: int = 2_000) -> tuple[Aggregate, Aggregate]:
    """The ends of the 95% interval of each aggregate, by a stratified bootstrap as in rliable.

    Each task's runs are resampled with replacement; the ends are the 2.5% and 97.5% percentiles over
    the resamples. The draws are the same in every call.
    """
    rng = np.random.default_rng(0)
    drawn = [rng.choice(np.asarray(runs, np.float64), (resamples, len(runs))) for runs in scores]
    low, high = np.percentile(_aggregates(drawn), [2.5, 97.5], axis=0)
    return Aggregate(*low.tolist()), Aggregate(*high.tolist())


def _aggregates(scores: Sequence[np.ndarray]) -> np.ndarray:
    """Mean, median and IQM (R, 3) of R samples of all tasks, each (R, its runs)."""
    means = np.stack([runs.mean(-1) for runs in scores], -1)
    pooled = np.sort(np.concatenate(scores, -1), -1)
    cut = pooled.shape[-1] // 4
    iqm = pooled[:, cut : pooled.shape[-1] - cut].mean(-1)
    iqm[np.isnan(pooled[:, -1])] = np.nan  # sorted last, where a cut would take it for the best run
    return np.stack([means.mean(-1), np.median(means, -1), iqm], -1)
