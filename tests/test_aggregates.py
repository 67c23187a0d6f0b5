"""Mean, median and interquartile mean over tasks and runs, and their intervals."""

import dataclasses
import itertools

import numpy as np
import pytest

from hdfast.aggregates import Aggregate, aggregate, interval


def test_aggregate_pools_runs_for_the_interquartile_mean_only():
    # Means 2.5 and 5; pooled 0 1 2 4 4 5 6 7 without two at each end: 2 4 4 5.
    got = aggregate([[0, 1, 2, 7], [4, 4, 5, 7 - 1]])
    assert got.mean == pytest.approx((2.5 + 4.75) / 2)
    assert got.median == pytest.approx((2.5 + 4.75) / 2)
    assert got.iqm == pytest.approx((2 + 4 + 4 + 5) / 4)
    # Tasks with unequal numbers of runs weigh the same in mean and median.
    assert aggregate([[0.0], [3.0, 3.0, 3.0]]).mean == 1.5
    # Fewer than four runs: nothing is cut.
    assert aggregate([[1.0], [2.0], [6.0]]) == Aggregate(mean=3.0, median=2.0, iqm=3.0)
    for nothing in ([], [[]], [[1.0], []]):
        with pytest.raises(ValueError, match="at least one score"):
            aggregate(nothing)


def ends(scores, **options):
    """The low ends of the intervals of mean, median and IQM, then the high ends."""
    return [end for side in interval(scores, **options) for end in dataclasses.astuple(side)]


def test_the_interval_of_two_runs_reaches_from_the_worst_to_the_best():
    """A quarter of the resamples draws the worse of two runs twice; of two tasks with two, a sixteenth."""
    assert ends([[1.0, 3.0]]) == [1, 1, 1, 3, 3, 3]
    # The worst: 0 0 10 10, the best: 1 1 30 30; without one at each end 0 10 and 1 30.
    assert ends([[0.0, 1.0], [10.0, 30.0]]) == [5, 5, 5, 15.5, 15.5, 15.5]
    assert ends([[2.0, 2.0], [5.0, 5.0, 5.0]]) == [3.5, 3.5, 4, 3.5, 3.5, 4]  # 2 2 5 5 5 without two
    assert ends([[1.0, 2.0, 4.0]]) == ends([[1.0, 2.0, 4.0]])


def test_the_interval_is_that_of_all_resamples_there_are():
    """Against all resamples, each equally likely, of three tasks with two, three and three runs."""
    scores = [[0.3, 1.1], [2.0, 2.3, 3.1], [0.0, 0.9, 5.0]]
    every = [itertools.product(runs, repeat=len(runs)) for runs in scores]
    found = np.array([dataclasses.astuple(aggregate(sample)) for sample in itertools.product(*every)])
    assert len(found) == 4 * 27 * 27
    drawn = np.reshape(ends(scores, resamples=100_000), (2, 3))
    for k in range(3):  # about one resample in forty is beyond each end
        low, high = drawn[:, k]
        assert np.mean(found[:, k] < low - 1e-9) <= 0.0265
        assert np.mean(found[:, k] <= low + 1e-9) >= 0.0235
        assert np.mean(found[:, k] > high + 1e-9) <= 0.0265
        assert np.mean(found[:, k] >= high - 1e-9) >= 0.0235
        assert low < dataclasses.astuple(aggregate(scores))[k] < high


def test_runs_are_drawn_within_their_task():
    """Very different scores of tasks do not widen the interval: each task keeps its number of runs."""
    low, high = interval([[0.0, 1.0, 2.0], [1000.0, 1001.0, 1002.0]])
    assert high.mean - low.mean < 2
    assert low.iqm > 250
    assert high.iqm < 750


def test_a_score_that_is_not_a_number_is_not_the_best():
    """Sorted last, it would be cut off as the best run of the interquartile mean."""
    assert np.isnan(dataclasses.astuple(aggregate([[0.0, 1.0, 2.0, np.nan]]))).all()
