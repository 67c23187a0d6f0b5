"""The names that a run logs are those in hdfast/agent/METRICS.md; and what the newer of them measure."""

import math
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

import hdfast.agent
from hdfast import session
from hdfast.envs.base import ContinuousActions
from hdfast.runtime import progress
from tests.agent_cases import make_batch, make_learner
from tests.loop_cases import (
    lines,
    one_thread,  # noqa: F401
    path_of,
    script,
    tiny,
    train,
)

TABLE = Path(hdfast.agent.__file__).with_name("METRICS.md")
WHEN = {"agent_steps", "frames", "seconds"}


def listed() -> dict[str, list[str]]:
    """Section of METRICS.md -> the names in the first column of its tables, in order."""
    found: dict[str, list[str]] = {}
    for line in TABLE.read_text().splitlines():
        if line.startswith("## "):
            names = found.setdefault(line.removeprefix("## "), [])
        elif match := re.match(r"\| `([^`]+)` \|", line):
            names.append(match[1])
    return found


def logged(config) -> dict[str, set[str]]:
    """Section -> the names that a run has written; "<vector>" stands for the observation `state`."""
    written = {
        f"{name}.jsonl": {key for line in lines(config, name) for key in line}
        for name in ("metrics", "scores")
    }
    events = EventAccumulator(str(path_of(config) / "tensorboard"))
    events.Reload()
    written["tensorboard/"] = set(events.Tags()["scalars"])
    (content,) = events.PluginTagToContent("hparams").values()
    settings = HParamsPluginData.FromString(content).session_start_info.hparams
    assert settings["harmony.mode"].string_value == config.harmony.mode
    assert not {"logdir", "agent_steps", "eval.every"} & settings.keys()  # what may change, as the tab cannot
    return {
        section: {re.sub(r"/state$", "/<vector>", name) for name in names}
        for section, names in written.items()
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[dict[str, set[str]]]:
    """What runs log: images and discrete actions in learned harmony, a vector and continuous actions in other modes.

    Rates are measured from the first two steps on, however short the run.
    """
    folder, log = tmp_path_factory.mktemp("metrics"), {"every": 10, "tensorboard": True}
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(progress, "_SAMPLE_SECONDS", 0.0)
        config = tiny(folder, log=log)
        train(config)
        found.append(logged(config))
        script(patch, actions=ContinuousActions(2), state=True)
        for seed, mode in enumerate(("fixed", "off"), 1):
            config = tiny(folder, log=log, seed=seed, harmony={"mode": mode})
            train(config)
            found.append(logged(config))
    return found


def test_the_table_has_every_name_that_a_run_writes_and_no_other(runs):
    table = listed()
    for section in ("metrics.jsonl", "scores.jsonl"):
        assert set(table[section]) == set().union(*(run[section] for run in runs)), section
        assert len(set(table[section])) == len(table[section]), section
    points = set(table["metrics.jsonl"]) - WHEN | set(table["tensorboard/"])
    assert points == set().union(*(run["tensorboard/"] for run in runs))


def test_which_names_are_missing_where_the_table_says_so(runs):
    learned, fixed, off = (run["metrics.jsonl"] for run in runs)
    images = {"loss/image", "weighted/image", "harmony/s_image", "harmony/weight_image"}
    vectors = {"loss/<vector>", "weighted/<vector>"}
    scalars = {"harmony/s_reward", "harmony/s_kl"}
    assert learned - fixed == images | scalars
    assert fixed - off == {"harmony/weight_reward", "harmony/weight_kl"}
    assert fixed - learned == vectors
    assert off <= fixed
    episodes, scripted = (run["scores.jsonl"] for run in runs[:2])
    assert scripted - episodes == {"success"}


def test_a_line_has_no_rates_before_there_are_any_and_no_more_rows_than_replay_holds(tmp_path, monkeypatch):
    script(monkeypatch)
    monkeypatch.setattr(session, "Progress", partial(progress.Progress, clock=lambda: 0.0))
    config = tiny(tmp_path, replay={"capacity": 20}, log={"every": 10})
    train(config)
    found = lines(config, "metrics")
    assert [line["replay_rows"] for line in found] == [10, 20, 20, 20]
    assert not any(name.endswith("_per_second") for line in found for name in line)


def test_every_line_of_the_tables_has_its_columns():
    rows = [line for line in TABLE.read_text().splitlines() if line.startswith("| `")]
    assert len(rows) > 50
    for row in rows:
        cells = [cell.strip() for cell in row.split("|")]
        assert [bool(cell) for cell in cells] == [False, True, True, True, False], row


def loss_of(learner, batch, uniform, dtype=torch.float32):
    return learner.model.loss(batch, uniform, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kl_free_is_the_share_of_rows_below_the_free_nats(dtype):
    learner = make_learner(loss={"free_nats": 0.0})
    batch = make_batch(learner)
    uniform = learner.uniform(*batch["reward"].shape, learner.config.rssm.stoch)
    output = loss_of(learner, batch, uniform, dtype)
    kl = output.losses["dyn"].flatten().sort().values
    assert kl[0] > 0
    assert output.metrics["kl_free"].item() == 0
    for below in (1, 7, 18):
        learner.model.free_nats = (kl[below - 1].item() + kl[min(below, 17)].item()) / 2 + 1e-4 * (
            below == 18
        )
        found = loss_of(learner, batch, uniform, dtype).metrics["kl_free"]
        assert found.item() == pytest.approx(below / 18)
        assert (found.dtype, found.shape, found.requires_grad) == (torch.float32, (), False)


def test_entropies_are_of_whole_latents():
    """The sum over a latent's groups, in nats: as much as all groups have, and the mean over rows."""
    learner = make_learner()
    batch = make_batch(learner)
    rssm = learner.model.rssm
    uniform = learner.uniform(*batch["reward"].shape, rssm.stoch)
    output = loss_of(learner, batch, uniform, torch.float32)
    for name, logp in (("post", output.observed.post_logp), ("prior", output.observed.prior_logp)):
        expected = torch.distributions.Categorical(logits=logp).entropy().sum() / batch["reward"].numel()
        assert output.metrics[f"{name}_entropy"].item() == pytest.approx(expected.item(), rel=1e-5)
    for parameter in (*rssm.prior_out.parameters(), *rssm.post_out.parameters()):
        parameter.data.zero_()
    metrics = loss_of(learner, batch, uniform, torch.float32).metrics
    for name in ("post", "prior"):
        assert metrics[f"{name}_entropy"].item() == pytest.approx(rssm.stoch * math.log(rssm.classes))


@pytest.mark.parametrize("free_nats", [0.3, 1.0, 1e3])
def test_a_clipped_row_counts_whatever_the_floor_is_rounded_to(free_nats):
    """0.3 in float32 is another number, yet rows at the floor must equal it."""
    learner = make_learner(loss={"free_nats": free_nats})
    for part in (learner.model.rssm.prior_out, learner.model.rssm.post_out):  # both uniform: a KL of zero
        part.weight.data.zero_()
        part.bias.data.zero_()
    batch = make_batch(learner)
    learner.update(lambda *_: batch)
    metrics = learner.metrics()
    assert metrics["kl_free"] == 1
    assert metrics["loss/dyn"] == metrics["loss/rep"] == pytest.approx(free_nats)
