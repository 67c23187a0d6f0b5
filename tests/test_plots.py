"""Learning curves as pictures: what is drawn of rows, and the files that `hdfast.report --curves` writes."""

import math
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from hdfast import plots, report
from tests.test_report_curves import (
    door,
    evaluated,  # noqa: F401
)


def row(step, score, *, task="Pong", seed=0, suite="atari100k", **more):
    return {"suite": suite, "task": task, "seed": seed, "agent_steps": step, "score": score, **more}


def lines_of(axis):
    """(agent steps, values, width) of each line of a panel that has points."""
    return [
        (*map(list, line.get_data()), line.get_linewidth()) for line in axis.lines if len(line.get_xdata())
    ]


def test_the_mean_is_over_seeds_from_where_all_have_begun_to_where_one_ends():
    steps, mean, error = plots.summary(
        [{10: 1.0, 20: 2.0, 30: 9.0}, {20: 6.0, 10: 3.0}, {12: 2.0, 20: 1.0, 25: 0.0}]
    )
    assert steps.tolist() == [12, 20]
    np.testing.assert_allclose(mean, [(1.2 + 3.6 + 2) / 3, 3])  # the first two by straight lines
    np.testing.assert_allclose(error, [np.std([1.2, 3.6, 2], ddof=1) / 3**0.5, math.sqrt(7 / 3)])
    steps, mean, error = plots.summary([{1: 0.0}, {2: 0.0}])
    assert steps.shape == mean.shape == error.shape == (0,)


def test_names_of_folders_leave_out_what_they_share(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert plots.short([]) == []
    assert plots.short(["runs"]) == ["runs"]
    assert plots.short(["study/a=1", "study/a=2"]) == ["a=1", "a=2"]
    assert plots.short(["runs", f"{tmp_path}/off"]) == ["runs", "off"]
    assert plots.short(["runs", "runs/a=1"]) == ["runs", "a=1"]


def test_every_name_of_many_folders_lies_within_the_picture():
    folders = [f"study/harmony.mode=learned,optimizer.model-lr={k}e-4" for k in range(12)]
    figure = plots.draw_curves([row(k, 1.0, logdir=folder) for k, folder in enumerate(folders)], folders)
    figure.draw_without_rendering()
    box, page = figure.legends[0].get_window_extent(), figure.bbox
    assert page.x0 <= box.x0
    assert box.x1 <= page.x1
    assert box.y1 <= page.y1
    assert figure.axes[0].get_window_extent().height > 100
    styles = [(handle.get_color(), handle.get_linestyle()) for handle in figure.legends[0].legend_handles]
    assert len(set(styles)) == 12


def test_a_panel_shows_each_seed_and_the_mean_of_several():
    rows = [
        row(20, 4.0),
        row(10, 1.0),
        row(10, 3.0, seed=1),
        row(20, "NaN", seed=1),
        row(7, 5.0, task="Alien"),
    ]
    figure = plots.draw_curves(rows)
    pong, alien = (axis for axis in figure.axes if axis.get_visible())
    assert (pong.get_title(), alien.get_title(), pong.get_ylabel()) == ("Pong", "Alien", "score")
    first, second, mean = lines_of(pong)
    assert first[:2] == ([10, 20], [1.0, 4.0])
    assert second[:2] == ([10], [3.0])  # what is not a number is left out
    assert mean[:2] == ([10], [2.0])
    assert mean[2] > first[2]
    assert len(pong.collections) == 1
    assert [line[:2] for line in lines_of(alien)] == [([7], [5.0])]
    assert not alien.collections
    assert not figure.legends


def test_folders_have_colours_and_a_legend_and_suites_are_named_where_there_are_two():
    rows = [
        row(1, 0.0, logdir="a"),
        row(1, 1.0, logdir="b"),
        row(1, 2.0, suite="dmc", task="walker_walk", logdir="b"),
    ]
    figure = plots.draw_curves(rows, ["b", "a"])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["b", "a"]
    pong, walker = figure.axes
    assert (pong.get_title(), walker.get_title()) == ("atari100k Pong", "dmc walker_walk")
    drawn = [line for line in pong.lines if len(line.get_xdata())]
    assert [(list(line.get_ydata()), line.get_color()) for line in drawn] == [([1.0], "C0"), ([0.0], "C1")]
    assert [handle.get_color() for handle in figure.legends[0].legend_handles] == ["C0", "C1"]


def test_success_is_shown_where_every_evaluation_has_it():
    rows = [row(1, 700.0, success=0.5), row(2, 800.0, success=1.0)]
    (axis,) = plots.draw_curves(rows).axes
    assert lines_of(axis)[0][:2] == ([1, 2], [0.5, 1.0])
    assert axis.get_ylabel() == "success rate"
    (axis,) = plots.draw_curves([*rows, row(3, 900.0)]).axes
    assert lines_of(axis)[0][1] == [700.0, 800.0, 900.0]


@pytest.mark.parametrize("name", ["curves.png", "curves.PDF", "curves.svg"])
def test_the_end_of_the_file_decides_what_it_holds(evaluated, tmp_path, monkeypatch, capfd, name):  # noqa: F811
    file = tmp_path / name
    code, out, err = door(
        report.main, ["--logdir", str(evaluated), "--curves", str(file)], monkeypatch, capfd
    )
    assert (code, out, err) == (0, f"5 evaluations of 3 runs: {file}\n", "")
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == [name]
    match file.suffix:
        case ".png":
            with Image.open(file) as image:
                assert np.asarray(image.convert("L")).std() > 5  # not a blank page
        case ".PDF":
            assert file.read_bytes().startswith(b"%PDF-")
            assert b"/Type3" not in file.read_bytes()
        case ".svg":
            assert ElementTree.parse(file).getroot().tag.endswith("svg")


@pytest.mark.parametrize("name", ["curves.jpg", "curves.eps"])
def test_another_ending_is_refused(evaluated, tmp_path, monkeypatch, capfd, name):  # noqa: F811
    file = tmp_path / name
    code, out, err = door(
        report.main, ["--logdir", str(evaluated), "--curves", str(file)], monkeypatch, capfd
    )
    assert (code, out) == (2, "")
    assert err == (
        f"error: --curves {file}: nothing is written as {file.suffix}; expected .png, .pdf, .svg, .csv\n"
    )
    assert not file.exists()
