"""A run step by step: what it stores, when it learns, evaluates and logs, and that a seed determines it.

Axes: N environments, T window length.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hdfast import loop, session
from hdfast.agent.learner import Learner
from hdfast.agent.policy import Policy
from hdfast.envs.base import ContinuousActions
from hdfast.runtime.errors import ConfigError
from hdfast.runtime.progress import Progress
from hdfast.streams import stream_seed
from tests.loop_cases import (
    differing,
    lines,
    one_thread,  # noqa: F401
    open_files,
    path_of,
    saved,
    script,
    tiny,
    train,
)


@pytest.fixture
def counted(monkeypatch):
    """Replaces learning by counting, for tests of the loop's arithmetic."""
    calls = []
    monkeypatch.setattr(Learner, "step", lambda self, sample: calls.append(sample(2, 4)))
    return calls


def test_a_fixed_seed_decides_every_bit(tmp_path):
    first, again, other = (tiny(tmp_path / name, seed=seed) for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    summaries = [train(config) for config in (first, again, other)]
    assert saved(first).meta["agent_steps"] == 40
    assert int(saved(first).tensors["learner.updates"]) == 15
    assert differing(saved(first), saved(again)) == set()
    strip = [{k: v for k, v in summary.items() if k != "seconds"} for summary in summaries]
    assert strip[0] == strip[1]
    for name in ("metrics", "scores"):
        timed = {"seconds", "steps_per_second", "updates_per_second"}
        rows = [
            [{k: v for k, v in line.items() if k not in timed} for line in lines(config, name)]
            for config in (first, again)
        ]
        assert rows[0] == rows[1]
        assert rows[0]
    logs = [sorted((path_of(config) / "replay").iterdir()) for config in (first, again)]
    assert [p.read_bytes() for p in logs[0]] == [p.read_bytes() for p in logs[1]]
    wrong = differing(saved(first), saved(other))
    assert {"learner.model.gru", "policy.generator", "replay.generator", "learner.generator"} <= {
        name.replace("rssm.", "") for name in wrong
    }


def test_watching_a_run_does_not_change_it(tmp_path):
    """Evaluations, videos, logs and checkpoints do not draw from the generators of learning and acting."""
    quiet = tiny(tmp_path / "quiet", replay={"length": 8}, log={"every": 1000})
    watched = tiny(
        tmp_path / "watched",
        replay={"length": 8},
        eval={"every": 6},
        log={"every": 3, "video_every": 8, "tensorboard": True},
        checkpoint={"seconds": 0},
    )
    train(quiet)
    train(watched)
    assert len(list((path_of(watched) / "videos").iterdir())) == 3  # at 24, 32 and 40, after the prefill
    assert differing(saved(quiet), saved(watched)) <= {
        "evaluation",
        "replay.log_crc",
    }  # the log is split at other places


@pytest.mark.parametrize(
    ("num_envs", "ratio", "prefill", "agent_steps"),
    [(1, 2.7, 5, 49), (2, 8.0, 4, 40), (4, 20.0, 1, 41), (3, 0.0, 9, 30), (2, 4.0, 1000, 40)],
)
def test_updates_are_the_ratio_of_the_steps_after_the_prefill(
    tmp_path, monkeypatch, capfd, counted, num_envs, ratio, prefill, agent_steps
):
    script(monkeypatch)
    config = tiny(
        tmp_path,
        agent_steps=agent_steps,
        env={"num_envs": num_envs},
        train={"ratio": ratio, "prefill": prefill},
    )
    train(config)
    total = -(-agent_steps // num_envs) * num_envs  # environments step together
    rows = next(n for n in itertools.count(1) if (n - 4 + 1) * num_envs >= prefill)  # of each, for T = 4
    owed = max(total - rows * num_envs, 0) * ratio / 8  # B x T rows an update
    meta = saved(config).meta
    assert meta["agent_steps"] == config.total_agent_steps == total
    assert f"agent_steps={total}/{total} done=100.0%" in capfd.readouterr().out
    assert meta["learning_from"] == (rows * num_envs if rows * num_envs <= total else None)
    assert len(counted) == int(saved(config).tensors["learner.updates"]) == math.floor(owed)


def test_rows_hold_what_was_seen_and_the_action_chosen_then(tmp_path, monkeypatch, counted):
    env = script(monkeypatch)
    config = tiny(tmp_path)
    train(config)
    train_env = env["train"][0]
    assert len(train_env.sent) == 20
    with loop.RunDir.open(config.logdir, "demo", "Catch", 0, config.to_dict()) as rundir:
        suite, stop = loop.get("demo"), loop.StopRequest()
        session = loop.Session(config, suite, suite.task("Catch"), rundir, torch.device("cpu"), stop)
    replay = session.replay
    assert replay.rows_added == 20
    starts = torch.arange(2) * replay.ring
    stored = {key: value.numpy() for key, value in replay.gather(starts, 20).items()}
    session.logger.close()
    replay.close()
    rows = train_env.rows[:20]
    np.testing.assert_array_equal(stored["image"], [row.obs["image"] for row in rows])
    np.testing.assert_array_equal(stored["action"], train_env.sent)
    for key in ("reward", "is_first", "is_last", "is_terminal"):
        np.testing.assert_array_equal(stored[key], [getattr(row, key) for row in rows])
    # Episodes of 3 and 4 rows after the reset row; the first ends by itself, the second by its time limit.
    assert np.flatnonzero(stored["is_first"][:, 0]).tolist() == [0, 4, 8, 12, 16]
    assert np.flatnonzero(stored["is_last"][:, 1]).tolist() == [4, 9, 14, 19]
    assert np.flatnonzero(stored["is_terminal"][:, 1]).tolist() == [4, 14]


def test_the_learner_works_while_the_environment_does(tmp_path, monkeypatch):
    events = []
    script(monkeypatch, events=events)
    monkeypatch.setattr(Learner, "step", lambda self, sample: events.append("learn"))
    train(tiny(tmp_path, train={"ratio": 8.0}))
    steps = " ".join(events[: events.index("close")])
    assert steps.count("send learn learn recv") == 15
    assert steps.count("send recv") - 4 == 5  # the prefill; four rows belong to the evaluation


def test_a_random_policy_until_the_prefill_is_complete(tmp_path, monkeypatch, counted):
    seen = []
    act = Policy.__call__
    monkeypatch.setattr(
        Policy, "__call__", lambda *args: seen.append(args[1]["image"][0, 0, 0, 0]) or act(*args)
    )
    env = script(monkeypatch)
    train(tiny(tmp_path, agent_steps=400, eval={"episodes": 1}))
    assert seen[:195] == list(range(5, 200))  # rows 0 to 4 make the four windows
    random = np.concatenate(env["train"][0].sent[:5])
    assert len(set(random.tolist())) > 1
    rng = np.random.default_rng(stream_seed(0, "prefill", 4))
    np.testing.assert_array_equal(env["train"][0].sent[2], rng.integers(3, size=2))


def test_evaluations_come_when_due_and_at_the_end_on_their_own_environments(tmp_path, monkeypatch, counted):
    env = script(monkeypatch)
    config = tiny(tmp_path, eval={"every": 15, "episodes": 5, "num_envs": 3})
    summary = train(config)
    assert len(env["train"]) == len(env["eval"]) == 1
    assert env["eval"][0].num_envs == 3
    assert "close" in env["train"][0].events
    assert "close" in env["eval"][0].events
    found = lines(config, "scores", kind="evaluation")
    assert [line["agent_steps"] for line in found] == [16, 30, 40]
    for line in found:
        assert line["episodes"] == len(line["scores"]) == 5
        assert line["score"] == pytest.approx(np.mean(line["scores"]))
        # two episodes of 3 and 4 rows, one of 5: each environment plays its share
        assert line["length"] == pytest.approx((3 + 3 + 4 + 4 + 5) / 5)
        assert line["success"] == 1.0
    assert {k: summary[k] for k in ("score", "episodes", "updates")} == {
        "score": found[-1]["score"],
        "episodes": 5,
        "updates": 15,
    }


def test_a_run_is_saved_before_it_is_evaluated(tmp_path, monkeypatch, counted):
    """An evaluation can take long; what was learnt before must not be lost with it."""
    script(monkeypatch)
    config, found, play = tiny(tmp_path, eval={"every": 20}), [], session.evaluation.play

    def played(*args, **options):
        found.append(saved(config).meta["agent_steps"])
        return play(*args, **options)

    monkeypatch.setattr(session.evaluation, "play", played)
    train(config)
    assert found == [20, 40]


def test_a_run_may_be_evaluated_otherwise_from_now_on(tmp_path, monkeypatch, counted):
    """Evaluation does not affect what is learned, so that it is still the same run."""
    script(monkeypatch)
    train(tiny(tmp_path, agent_steps=20, eval={"every": 20, "episodes": 2}))
    config = tiny(tmp_path, agent_steps=40, eval={"every": 10, "episodes": 1})
    train(config)
    found = lines(config, "scores", kind="evaluation")
    assert [(line["agent_steps"], line["episodes"]) for line in found] == [(20, 2), (30, 1), (40, 1)]


def test_evaluation_at_the_end_alone(tmp_path, monkeypatch, counted):
    env = script(monkeypatch)
    config = tiny(tmp_path, eval={"every": 0, "episodes": 1, "num_envs": 8})
    train(config)
    assert env["eval"][0].num_envs == 1  # no more than there are episodes
    assert [line["agent_steps"] for line in lines(config, "scores", kind="evaluation")] == [40]


def test_steps_that_are_no_whole_steps_of_all_environments_are_told(tmp_path, monkeypatch, capfd):
    script(monkeypatch)
    config = tiny(tmp_path, agent_steps=7)
    train(config)
    assert "; 8 agent steps, whole steps of 2 environments" in capfd.readouterr().out
    assert saved(config).meta["agent_steps"] == 8


def test_updates_are_told_as_they_come(tmp_path, monkeypatch):
    told, update = [], Progress.update

    def watch(self, **what):
        told.append(what)
        update(self, **what)

    monkeypatch.setattr(Progress, "update", watch)
    script(monkeypatch)
    train(tiny(tmp_path, train={"ratio": 8.0}))
    steps = [i for i, what in enumerate(told) if "agent_steps" in what]
    within = told[steps[-2] + 1 : steps[-1]]
    assert [what["updates"] for what in within if "updates" in what] == [told[steps[-1]]["updates"] - 1, 30]


def test_scores_come_as_episodes_end(tmp_path, monkeypatch, counted):
    env = script(monkeypatch)
    config = tiny(tmp_path)
    train(config)
    sent = np.stack(env["train"][0].sent)
    found = lines(config, "scores", kind="episode")
    # Row k of both is agent steps 2k+1 and 2k+2: an episode that ends in row k is told at 2k+2.
    assert [(x["agent_steps"], x["length"]) for x in found] == [
        *((8, 3), (10, 4), (16, 3), (20, 4), (24, 3), (30, 4)),
        *((32, 3), (40, 3), (40, 4)),
    ]
    assert all(line["frames"] == line["agent_steps"] for line in found)
    rewards = [
        k + sent[k - 1, 1] / 100 for k in (6, 7, 8, 9)
    ]  # of the second episode of the second environment
    assert found[3]["score"] == pytest.approx(sum(rewards))


def test_metrics_tensorboard_and_videos(tmp_path, capfd):
    config = tiny(
        tmp_path,
        replay={"length": 8},
        train={"ratio": 8.0},
        log={"every": 10, "video_every": 20, "tensorboard": True},
    )
    train(config)
    found = lines(config, "metrics")
    assert [line["agent_steps"] for line in found] == [10, 20, 30, 40]
    assert [line["replay_rows"] for line in found] == [10, 20, 30, 40]
    assert [line["updates"] for line in found] == [0, 1, 6, 11]
    last = found[-1]
    weights = [f"harmony/weight_{part}" for part in ("reward", "image", "kl")]
    losses = [f"loss/{part}" for part in ("reward", "image", "dyn", "rep", "cont")]
    for name in (*weights, *losses, "loss_model", "loss_actor", "loss_critic", "skipped_updates"):
        assert math.isfinite(last[name]), name
    assert {last[name] for name in weights} != {1.0}  # they change
    folder = path_of(config)
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    assert {*weights, *losses, "updates", "score/evaluation", "score/episode"} <= set(tags["scalars"])
    assert [event.step for event in events.Scalars(weights[0])] == [20, 30, 40]
    assert events.Scalars(weights[0])[-1].value == pytest.approx(last[weights[0]])
    assert tags["images"] == ["open_loop_image"]
    names = [path.name for path in sorted((folder / "videos").iterdir())]
    assert names == ["open_loop_image_0000000020.gif", "open_loop_image_0000000040.gif"]
    out = capfd.readouterr().out.splitlines()
    assert out[0].startswith(f"{folder}: new run; replay: room for 40 rows")
    assert out[1] == "[Catch seed 0] agent_steps=0/40 done=0.0%"  # before the first step, which may take long
    assert out[-1].startswith("[Catch seed 0] agent_steps=40/40 done=100.0%")
    for word in ("score=", "eval=", "harmony=reward:", "kl:", "image:"):
        assert word in out[-1]


def test_videos_show_some_of_the_windows_that_were_learnt_from_last(tmp_path, monkeypatch):
    script(monkeypatch)
    sample, predict, sampled, shown = session.Replay.sample, session.films, [], []

    def sampling(*args):
        sampled.append(sample(*args))
        return sampled[-1]

    def predicting(learner, batch):
        shown.append(({key: value.clone() for key, value in batch.items()}, sampled[-1]))
        return predict(learner, batch)

    monkeypatch.setattr(session.Replay, "sample", sampling)
    monkeypatch.setattr(session, "films", predicting)
    replay = {"batch": 8, "length": 8}
    train(tiny(tmp_path, replay=replay, train={"ratio": 32.0}, log={"video_every": 20}))
    assert len(shown) == 2
    for batch, last in shown:
        assert batch.keys() == last.keys()
        assert batch["reward"].shape == (8, 6)  # windows side by side, no more than a film has room for
        for key, rows in last.items():
            first = rows[:6] if key == "starts" else rows[:, :6]
            assert torch.equal(batch[key], first), key
    train(tiny(tmp_path / "short", replay={"length": 5}, log={"video_every": 20}))
    assert len(shown) == 2  # the model would see all rows of such windows, and imagine none


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_continuous_actions_and_vector_observations(tmp_path, monkeypatch, precision):
    env = script(monkeypatch, actions=ContinuousActions(2), state=True)
    config = tiny(tmp_path, precision=precision, log={"video_every": 10}, replay={"length": 8})
    train(config)
    sent = np.stack(env["train"][0].sent)
    assert sent.dtype == np.float32
    assert np.abs(sent).max() <= 1
    assert len(np.unique(sent)) > sent.size / 2  # clipped ones would be equal
    assert int(saved(config).tensors["learner.updates"]) > 0
    assert int(saved(config).tensors["learner.skipped"]) == 0
    assert list((path_of(config) / "videos").iterdir()) == []
    assert "loss/state" in lines(config, "metrics")[-1]


def test_a_dry_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"^--dry-run: only hdfast\.train has a dry run; leave it out$"):
        loop.run(tiny(tmp_path, dry_run=True))
    assert list(tmp_path.iterdir()) == []


def test_a_session_that_cannot_begin_leaves_nothing_open(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("too late")

    made, closed, close = script(monkeypatch), [], session.Replay.close
    monkeypatch.setattr(session.Replay, "close", lambda self: (closed.append(self), close(self)))
    monkeypatch.setattr(session, "Progress", fail)
    with pytest.raises(RuntimeError, match="too late"):  # whose traceback keeps the session alive
        train(tiny(tmp_path))
    assert len(closed) == 1
    assert made["train"][0].events == ["close"]
    assert open_files(tmp_path) == []
