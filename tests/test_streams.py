"""Seeds: one for each use of randomness, the same for ever, and what environments are made with."""

import pytest

from hdfast import envs, session, suites
from hdfast.config import default_config
from hdfast.overrides import apply_overrides
from hdfast.streams import make_envs, stream_seed
from tests.loop_cases import one_thread, script, tiny, train  # noqa: F401


def test_each_use_has_a_seed_of_its_own_that_torch_takes():
    uses = [
        (seed, stream, *more) for seed in (0, 1) for stream in ("train", "eval") for more in ((), (0,), (7,))
    ]
    seeds = {stream_seed(*use) for use in uses}
    assert len(seeds) == len(uses)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_no_two_uses_in_a_run_share_a_seed(tmp_path, monkeypatch):
    script(monkeypatch)
    given = []

    def spied(*use):
        given.append(stream_seed(*use))
        return given[-1]

    monkeypatch.setattr(session, "stream_seed", spied)
    train(tiny(tmp_path, train={"ratio": 0.0}, eval={"every": 20}))
    assert len(set(given)) == len(given) == 3 + 5 + 2  # parts of the agent, random actions, evaluations


def test_seeds_are_what_they_were_so_that_a_run_can_go_on_with_newer_code():
    assert stream_seed(0, "policy") == 2_679_328_660_500_096_656
    assert stream_seed(3, "prefill", 4) == 186_943_407_120_352_991


@pytest.mark.parametrize("stream", ["train", "eval"])
def test_environments_get_their_number_their_settings_and_a_seed_for_where_they_begin(stream, monkeypatch):
    made = []
    monkeypatch.setattr(envs, "make", lambda *names, **settings: made.append((names, settings)))
    config = apply_overrides(default_config("demo"), {"seed": 5, "env": {"num_envs": 2, "image_size": 32}})
    task = suites.get("demo").task("Catch")
    for steps in ({}, {"agent_steps": 0}, {"agent_steps": 40}):
        make_envs(config, task, num_envs=3, stream=stream, **steps)
    names, settings = made[0]
    assert names == ("demo", "Catch")
    assert (settings["num_envs"], settings["image_size"]) == (3, 32)
    first, again, later = (settings["seed"] for _, settings in made)
    assert first == again == stream_seed(5, stream, 0) % 2**31
    assert later == stream_seed(5, stream, 40) % 2**31
