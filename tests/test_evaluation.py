"""Playing episodes to their end, and how far that is."""

import re
from functools import partial

import numpy as np

from hdfast import evaluation, session
from hdfast.runtime.progress import Progress
from tests import loop_cases
from tests.loop_cases import (
    Scripted,
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


def test_a_run_tells_how_many_episodes_of_an_evaluation_are_done(tmp_path, monkeypatch, capfd):
    script(monkeypatch)
    monkeypatch.setattr(session, "Progress", partial(Progress, plain_seconds=0))
    loop_cases.train(tiny(tmp_path, agent_steps=4, eval={"episodes": 3}))
    found = re.findall(r"phase=(\S+)", capfd.readouterr().out)
    assert list(dict.fromkeys(found)) == [f"evaluate,{done}/3" for done in range(4)]
