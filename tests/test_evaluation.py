"""Playing episodes to their end, and telling progress."""

import json
import re
from functools import partial

import numpy as np

from hdfast import evaluate, evaluation, session
from hdfast.envs.base import EnvStep
from hdfast.runtime.progress import Progress
from tests import loop_cases
from tests.loop_cases import (
    Scripted,
    door,
    one_thread,  # noqa: F401
    script,
    tiny,
)


def test_it_is_told_at_every_step_how_many_episodes_are_done():
    told = []
    act = lambda obs, is_first: np.zeros(2, np.int32)  # noqa: E731
    episodes = evaluation.play(Scripted(2), act, 3, tell=told.append)
    assert len(episodes) == 3
    assert told == [0, 0, 0, 1, 2, 2, 2, 3]  # after 3 and 4 rows, and the first again after 4 more


def test_an_episode_succeeds_if_one_of_its_rows_does():
    meter = evaluation.EpisodeMeter(3)
    ended = []
    # Rows of three environments: solved on the way, never, and only in the previous episode.
    for first, last, success in (
        ("111", "000", "001"),
        ("000", "000", "100"),
        ("000", "001", "001"),
        ("001", "000", "000"),
        ("000", "111", "000"),
    ):
        is_first, is_last, success = (np.array([c == "1" for c in flags]) for flags in (first, last, success))
        step = EnvStep({}, np.ones(3, np.float32), is_first, is_last, is_last, {"success": success})
        ended += [(one.env, one.success, one.score, one.length) for one in meter.add(step)]
    assert ended == [(2, True, 2.0, 2), (0, True, 4.0, 4), (1, False, 4.0, 4), (2, False, 1.0, 1)]


def test_each_evaluation_of_a_run_draws_numbers_of_its_own(tmp_path, monkeypatch):
    script(monkeypatch)
    states, training, policy = [], [], session.Policy

    def made(learner, num_envs, seed, **options):
        found = policy(learner, num_envs, seed, **options)
        states.append(found.generator.get_state())
        training.append(found.training)
        return found

    monkeypatch.setattr(session, "Policy", made)
    loop_cases.train(tiny(tmp_path, eval={"every": 10}))
    assert len(states) == len({state.numpy().tobytes() for state in states}) == 1 + 4  # training, evaluations
    assert training == [True, *[False] * 4]  # so that a learner of one's own can explore in training alone


def test_a_later_session_is_evaluated_on_other_episodes(tmp_path, monkeypatch):
    script(monkeypatch)
    begun, make = [], session.make_envs

    def made(*args, stream, agent_steps=0, **options):
        begun.append((stream, agent_steps))  # of which their seed is made
        return make(*args, stream=stream, **options)

    monkeypatch.setattr(session, "make_envs", made)
    for agent_steps in (20, 40):
        loop_cases.train(tiny(tmp_path, agent_steps=agent_steps, train={"ratio": 0.0}))
    assert begun == [("train", 0), ("eval", 20), ("train", 20), ("eval", 40)]


def test_a_run_tells_how_many_episodes_of_an_evaluation_are_done(tmp_path, monkeypatch, capfd):
    script(monkeypatch)
    monkeypatch.setattr(session, "Progress", partial(Progress, plain_seconds=0))
    loop_cases.train(tiny(tmp_path, agent_steps=4, eval={"episodes": 3}))
    found = re.findall(r"phase=(\S+)", capfd.readouterr().out)
    assert list(dict.fromkeys(found)) == [f"evaluate,{done}/3" for done in range(4)]


def test_scores_that_are_not_finite_are_json_all_the_same(monkeypatch, capfd):
    monkeypatch.setattr(
        evaluate, "evaluate", lambda *_, **__: {"score": float("inf"), "scores": [float("nan")]}
    )
    code, out, _ = door(evaluate.main, ["runs/demo/Catch/seed0"], monkeypatch, capfd)
    assert (code, json.loads(out)) == (0, {"score": "Infinity", "scores": ["NaN"]})
