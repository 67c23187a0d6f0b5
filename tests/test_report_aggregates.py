"""What the tables of a suite aggregate, and what they say of the precision of scores."""

from rich.console import Console

from hdfast import report, results, suites, tables
from tests.loop_cases import door
from tests.test_report import cells, finish, text_of


def test_suites_without_humans_aggregate_their_own_measure(tmp_path):
    """DeepMind Control's scores, of at most 1,000 in each task, and Meta-World's success rates."""
    dmc, metaworld = suites.get("dmc"), suites.get("metaworld")
    for seed in (0, 1):
        finish(tmp_path, "walker_walk", seed, 900.0 + seed, suite="dmc")
        finish(tmp_path, "reach", seed, 7.0, suite="metaworld", success=0.5)
    alone = text_of(dmc, results.collect(tmp_path, dmc))
    assert "mean" not in alone  # the mean over one task is its score
    for seed in (0, 1):
        finish(tmp_path, "hopper_hop", seed, 100.0 + seed, suite="dmc")
        finish(tmp_path, "push", seed, 3.0, suite="metaworld", success=1.0)
    finish(tmp_path, "soccer", 0, 3.0, suite="metaworld")  # a run that does not tell
    rows = results.collect(tmp_path, dmc)
    text = text_of(dmc, rows)
    assert " ".join(cells(text, "score mean")) == "score mean 2 500.5 [500.0, 501.0]"
    assert " ".join(cells(text, "score iqm")[:4]) == "score iqm 2 500.5"
    about = tables.as_dict(dmc, rows)
    assert about["aggregate"] == {"of": "score", "mean": 500.5, "median": 500.5, "iqm": 500.5}
    assert about["interval"]["mean"] == [500.0, 501.0]
    rows = results.collect(tmp_path, metaworld)
    assert " ".join(cells(text_of(metaworld, rows), "success mean")) == "success mean 2 75% [75%, 75%]"
    assert tables.as_dict(metaworld, rows)["aggregate"]["of"] == "success"
    shown = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    shown.print(tables.side_by_side(dmc, {"a": results.collect(tmp_path, dmc)}))
    assert " ".join(cells(shown.export_text(), "score median")) == "score median 2 500.5 [500.0, 501.0]"


def test_an_end_of_an_interval_that_rounds_to_zero_has_no_sign(tmp_path):
    dmc = suites.get("dmc")
    for task in ("walker_walk", "hopper_hop"):
        for seed, score in enumerate((-0.002, 1.002)):
            finish(tmp_path, task, seed, score, suite="dmc")
    text = text_of(dmc, results.collect(tmp_path, dmc))
    assert " ".join(cells(text, "score mean")) == "score mean 2 0.50 [0.00, 1.00]"


def test_a_success_rate_of_one_run_among_several_has_no_error(tmp_path):
    metaworld = suites.get("metaworld")
    finish(tmp_path, "reach", 0, 3.0, suite="metaworld", success=0.5)
    finish(tmp_path, "reach", 1, 3.0, suite="metaworld")  # of a version that did not tell
    about = tables.as_dict(metaworld, results.collect(tmp_path, metaworld))
    assert about["standard_error"] == {"reach": {"score": 0.0}}


def test_scores_in_another_precision_than_the_published_ones_are_told(tmp_path, monkeypatch, capfd):
    finish(tmp_path, "Pong", 0, 14.6, precision="float32")
    finish(tmp_path, "Catch", 0, 1.0, suite="demo", precision="bfloat16")
    argv = ["--logdir", str(tmp_path)]
    assert "float32" not in door(report.main, argv, monkeypatch, capfd)[1]
    finish(tmp_path, "Alien", 0, 14.6, precision="bfloat16")
    out = door(report.main, argv, monkeypatch, capfd)[1]
    assert "mean over seeds; in bfloat16, where published scores are of float32\n" in out
    assert out.count("float32") == 1
