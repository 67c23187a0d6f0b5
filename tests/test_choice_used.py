"""What tuning remembers is used by runs and by agents that are loaded, and by nothing after them."""

import dataclasses

import pytest
import torch

from hdfast.agent.policy import Policy
from hdfast.runtime.errors import ConfigError
from hdfast.trained import load
from hdfast.tuning.choice import Choice, Job, remember
from hdfast_kernels import dispatch
from tests import loop_cases
from tests.loop_cases import one_thread, path_of, tiny  # noqa: F401
from tests.tuning_cases import own_cache  # noqa: F401


def backend() -> str:
    return dispatch.resolve_name("kl_balance", None, torch.zeros(1))


@pytest.mark.skipif(not dispatch.native_built(), reason="the C++ module is not built")
def test_a_choice_is_used_while_it_is_wanted(tmp_path, monkeypatch):
    used = []
    config = tiny(tmp_path)
    loop_cases.train(config)
    with load(path_of(config)) as trained:
        assert backend() == "native"  # the default, as nothing is remembered
        seen = trained.env.obs_specs, trained.env.actions
        dtype = trained.policy.learner.dtype
    job = Job(*seen, config, torch.device("cpu"), dtype)
    assert remember(job.key, Choice({"image_loss": "native"}))
    step = Policy.__call__

    def seeing(self, *args):
        used.append(backend())
        return step(self, *args)

    monkeypatch.setattr(Policy, "__call__", seeing)
    with load(path_of(config)) as trained:
        assert backend() == "reference"
        with pytest.raises(ConfigError), load(path_of(config), num_envs=0):
            pass
        assert backend() == "reference"
    assert backend() == "native"
    more = dataclasses.replace(config, agent_steps=44)
    loop_cases.train(more)
    assert set(used) == {"reference"}
    assert backend() == "native"
    used.clear()
    loop_cases.train(tiny(tmp_path / "untuned", train={"tune": False}))
    with load(path_of(tiny(tmp_path / "untuned", train={"tune": False}))):
        assert backend() == "native"
    assert set(used) == {"native"}
