"""What a run says of users' own environments that may surprise: what is not seen, or seen otherwise than meant."""

import dataclasses
import re

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from hdfast.envs import gym_spaces, gym_view
from tests import gym_envs, loop_cases
from tests.test_envs_gym import make


def told_of(space, monkeypatch, capfd, **settings):
    """What is seen of an environment that observes `space`, and what is told."""
    gym_view._tell.cache_clear()
    spec = dataclasses.replace(gymnasium.spec("Count-v0"), id="Some-v0", kwargs={"observation": space})
    monkeypatch.setitem(gymnasium.registry, "Some-v0", spec)
    with make("Some", **settings) as env:
        return sorted(env.obs_specs), capfd.readouterr().err.replace("warning: Some-v0: ", "")


@pytest.mark.parametrize("threads", ["0", "1"])
def test_a_run_tells_once_which_vectors_it_does_not_see(tmp_path, threads):
    """Not again for its evaluations, nor for each of its environments."""
    task = ["--suite", "gym", "--task", "tests.gym_envs:Goals-v0", "--eval.every", "20"]
    argv = [*loop_cases.flags()[2:], *task, "--env.threads", threads, "--logdir", str(tmp_path)]
    process = loop_cases.start(argv)
    _, err = process.communicate(timeout=300)
    said = "warning: Goals-v0: sees depth, image, not arm, goal; --env.obs both sees all\n"
    assert (process.returncode, err) == (0, said)


@pytest.mark.parametrize(
    ("name", "obs"),
    [("Goals", "both"), ("Goals", "state"), ("Drawn", "image"), ("Drawn", "auto"), ("Count", "auto")],
)
def test_nothing_is_told_where_all_is_seen_that_was_asked_for(name, obs, capfd):
    make(name, obs=obs).close()
    assert capfd.readouterr().err == ""


def test_images_that_are_seen_as_numbers_are_told(capfd):
    told = "frames need no stacking, the agent remembers"
    make("Frames", obs="image").close()  # draws it
    hidden = "sees what it draws, not the images in state; an image stands alone or in a Dict, (H, W, 3)"
    assert capfd.readouterr().err == f"warning: Frames-v0: {hidden}\n"
    make("Frames", obs="auto").close()
    what = f"Frames-v0: sees the images in state as a vector of 768 numbers; {told}"
    assert capfd.readouterr().err == f"warning: {what}\n"


@pytest.mark.parametrize(
    ("name", "obs", "seen", "said"),
    [
        ("Sentence", "auto", ["image"], "sees image, not task, way; --env.obs both sees way"),
        ("Sentence", "state", ["way"], "observation 'task' is Sentence, which has no fixed length"),
        ("Sentence", "both", ["image", "way"], "observation 'task' is Sentence, which has no fixed length"),
        ("List", "both", ["image"], r"observation 'list' is Sequence\(.*, which has no fixed length"),
        (
            "EmptyPart",
            "state",
            ["arm"],
            r"observation 'hand' is Box\(.*\(2, 0\), float32\), which holds no number",
        ),
        ("TakenStarts", "state", ["hand"], "cannot be called 'starts'; replay has a column of that name"),
        *(
            (name, "both", ["image"], re.escape(f"an observation cannot be called {key!r}; expected letters"))
            for name, key in gym_envs.NAMES.items()
            if name.startswith("Misnamed")
        ),
    ],
)
def test_vectors_that_the_agent_cannot_take_are_left_out_beside_others_and_told(name, obs, seen, said, capfd):
    gym_view._tell.cache_clear()
    with make(name, obs=obs) as env:
        assert sorted(env.obs_specs) == seen
        env.reset()
        env.step(np.zeros(1, np.int32))
    what = said if "sees" in said else f"goes on without what the agent cannot take: .*{said}"
    assert re.search(rf"^warning: {name}-v0: {what}", capfd.readouterr().err)


def test_an_image_too_small_for_a_picture_is_told(capfd):
    make("Cells").close()
    what = "Cells-v0: enlarges image from 7 x 7 pixels; if its numbers are categories, not brightness, let it observe"
    assert what in capfd.readouterr().err


def test_text_has_no_fixed_length_wherever_it_is(monkeypatch, capfd):
    text, arm = spaces.Text(5), gym_envs.box(2)
    for space in (text, spaces.Dict({"in": spaces.Tuple((arm, text))}), spaces.OneOf((arm, text))):
        assert "which has no fixed length" in (gym_spaces.wrong("task", space) or "")
    assert gym_spaces.wrong("way", spaces.Dict({"in": spaces.Tuple((arm, arm))})) is None
    seen, said = told_of(spaces.Dict({"arm": arm, "task": text}), monkeypatch, capfd)
    assert seen == ["arm"]
    assert said.startswith("goes on without what the agent cannot take: observation 'task' is Text(1, 5, ")


@pytest.mark.parametrize(
    ("space", "numbers"),
    [
        (gym_envs.unit(64, 64), "4,096"),
        (gym_envs.unit(8, 9, high=255, dtype=np.float64), "72"),
        (gym_envs.unit(64, 7), None),
        (gym_envs.unit(64), None),
        (gym_envs.box(64, 64), None),
        (spaces.MultiBinary((8, 8)), None),
    ],
)
def test_a_vector_that_may_be_meant_as_an_image_is_told(space, numbers, monkeypatch, capfd):
    what = f"sees state as a vector of {numbers} numbers; as an image it would be {(*space.shape, 1)}\n"
    assert told_of(space, monkeypatch, capfd) == (["state"], what if numbers else "")


@pytest.mark.parametrize(
    ("names", "advice"),
    [
        (("dyn",), "dyn; --env.obs both sees all, with another name for dyn"),
        (
            ("arm", "image", "rep"),
            "arm, image, rep; --env.obs both sees all, with another name for image, rep",
        ),
        (("arm",), "arm; --env.obs both sees all"),
    ],
)
def test_what_would_be_refused_is_not_advised_under_its_name(names, advice, monkeypatch, capfd):
    space = spaces.Dict({"camera": gym_envs.pixels(8, 8, 3), **dict.fromkeys(names, gym_envs.box(2))})
    assert told_of(space, monkeypatch, capfd)[1].startswith(f"sees camera, not {advice}\n")
    renamed = {f"{key}_": part for key, part in space.items()}
    assert told_of(spaces.Dict(renamed), monkeypatch, capfd, obs="both")[1] == ""
