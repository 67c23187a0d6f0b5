"""What one process does of a run, from its start or resumption to its stop: act, store, learn, evaluate, log, save.

Axes: N environments, B batch, T window length.
"""

import contextlib
import math
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch

from hdfast import evaluation, init_from
from hdfast.advice import RewardScale, check_settings
from hdfast.agent.open_loop import CONTEXT, EXAMPLES, films
from hdfast.agent.policy import Policy
from hdfast.agent.updates import Updates, captured_updates
from hdfast.config import Config, settings_of
from hdfast.envs.base import BatchEnv
from hdfast.replay import Replay
from hdfast.replay.contents import replay_specs
from hdfast.runtime import checkpoint, errors
from hdfast.runtime.console import say
from hdfast.runtime.device import resolve_precision, restore_generator
from hdfast.runtime.errors import CallbackError, EnvError, Interrupted, NonFiniteError, OutputFullError
from hdfast.runtime.logger import Logger, OnLine
from hdfast.runtime.profiling import annotate
from hdfast.runtime.progress import Progress
from hdfast.runtime.rundir import RunDir
from hdfast.runtime.signals import StopRequest
from hdfast.streams import make_envs, stream_seed
from hdfast.suites import Suite, Task
from hdfast.tuning.choice import Job
from hdfast.tuning.settle import settle
from hdfast_kernels import dispatch


class Session:
    """One process's share of a run; a context manager.

    Args:
        config, suite, task: what to train.
        rundir: the run's directory, locked.
        device: where learning happens.
        stop: checked at every step.
        on_line: gets every line of the logs, see `Logger`.
    """

    def __init__(
        self,
        config: Config,
        suite: Suite,
        task: Task,
        rundir: RunDir,
        device: torch.device,
        stop: StopRequest,
        on_line: OnLine = lambda file, line: None,
    ):
        self._on_line = on_line
        self.config, self.suite, self.task, self.rundir, self.stop = config, suite, task, rundir, stop
        saved = checkpoint.load_latest(rundir.checkpoints)
        begin = 0 if saved is None else saved.meta["agent_steps"]
        start = init_from.checkpoint_for(config) if saved is None else None
        stop.say = say
        self._make_envs = partial(make_envs, config, task, stop=stop.check)
        self.eval_env: BatchEnv | None = None
        with contextlib.ExitStack() as opened:
            self.env = self._make_envs(num_envs=config.env.num_envs, stream="train", agent_steps=begin)
            opened.callback(self.env.close)
            check_settings(config, self.env.obs_specs, self.env.actions)
            self._build(opened, device, saved, start)
            self._opened = opened.pop_all()  # closed by __exit__

    def _build(
        self,
        opened: contextlib.ExitStack,
        device: torch.device,
        saved: checkpoint.Checkpoint | None,
        start: checkpoint.Checkpoint | None,
    ) -> None:
        """Makes the rest of the run around its environments, and restores it from `saved`.

        opened: gets what must be closed.
        start: a checkpoint of another run, whose parameters a new run begins with.
        """
        config, rundir, dtype = self.config, self.rundir, resolve_precision(self.config.precision, device)
        seen = self.env.obs_specs, self.env.actions
        job = Job(*seen, config, device, dtype)
        choice = settle(job, check=self.stop.check, say=say)
        opened.callback(dispatch.use, device.type, choice.use(device))  # undone at the end
        auto = config.train.graph == "auto"
        self.graph = choice.graph if auto else config.train.graph != "off"
        overlap = choice.overlap if auto else config.train.graph == "overlap"
        self.learner = job.learner(stream_seed(config.seed, "learner"))
        if start is not None:
            init_from.load_parameters(self.learner, start, config)
        seed = stream_seed(config.seed, "policy")
        self.policy = Policy(self.learner, self.env.num_envs, seed, graph=self.graph, training=True)
        self.replay = Replay(
            replay_specs(*seen),
            num_envs=self.env.num_envs,
            capacity=config.replay_rows,
            device=device,
            directory=rundir.replay,
            seed=stream_seed(config.seed, "replay"),
            checkpoints=config.checkpoint.keep,
        )
        opened.push(self._close_replay)
        self._update = Updates(self.learner, partial(self.learner.step, self.replay.sample))
        if self.graph:
            self._update = captured_updates(
                self.learner, self.replay.sample, self.replay.generators, overlap=overlap
            )
        self.reward_scale = RewardScale(config, f"{self.task.name} seed {config.seed}")
        self.agent_steps = 0
        self.step_from: int | None = None  # agent steps before the step that is under way
        self.learning_from: int | None = None  # agent steps at which the prefill was complete
        self.evaluated_at = 0
        self.evaluation: dict[str, Any] | None = None
        seconds = 0.0 if saved is None else self._restore(saved)
        how = {"precision": str(dtype).removeprefix("torch."), "environment": self.env.source}
        how["learner"] = job.key["learner"]  # with a digest of its file
        for line in rundir.note_backends(
            {**how, "ops": dispatch.backends_of(device), "graph": self.graph, "overlap": overlap}
        ):
            if line.startswith(tuple(how)):
                errors.warn(f"{rundir.path}: goes on with another {line}")
        self.resumed_at = self.agent_steps
        self.skipped_before = int(self.learner.skipped)
        self.saved_at = time.monotonic()
        self.logger = Logger(
            rundir.path,
            action_repeat=self.suite.action_repeat,
            resumed_at=None if saved is None else self.agent_steps,
            evaluated_at=self.evaluated_at,
            seconds=seconds,
            tensorboard=config.log.tensorboard,
            settings=settings_of(config),
            on_line=self._on_line,
        )
        opened.callback(self.logger.close)
        self.progress = Progress(
            config.total_agent_steps,
            action_repeat=self.suite.action_repeat,
            title=f"{self.task.name} seed {config.seed}",
        )

    def __enter__(self) -> "Session":
        self.progress.__enter__()
        self.stop.say = self.progress.message
        return self

    def __exit__(self, *error: Any) -> None:
        self._opened.push(self.progress)  # the first to end
        self._opened.__exit__(*error)  # each is closed, whatever the others raise

    def _close_replay(self, kind: type[BaseException] | None, *_: Any) -> None:
        try:
            self.replay.close()
        except errors.HdfastError:
            if kind is None:  # otherwise the first error is the one to report
                raise

    def run(self) -> dict[str, Any]:
        """Steps until the run is complete, evaluates at the end, and marks the run finished.

        Raises:
            Interrupted: a signal came; the run is saved.
            EnvError, CallbackError: an environment, or on_line, misbehaves; the run is saved.
            BrokenPipeError, OutputFullError: the output has no reader (`... | head`) or no room; the run is saved.
            NonFiniteError: too many updates were skipped; the run and the offending batch are saved.
        """
        total = self.config.total_agent_steps
        going_on = f"going on at agent step {self.agent_steps:,}"
        begins = going_on if self.agent_steps else f"new run; {self.replay.describe()}"
        if self.config.init_from is not None and not self.agent_steps:
            begins += f"; it begins with the parameters of {self.config.init_from}"
        if total != self.config.agent_steps:
            begins += f"; {total:,} agent steps, whole steps of {self.env.num_envs} environments"
        try:
            self.progress.message(f"{self.rundir.path}: {begins}")
            self.progress.update(agent_steps=self.agent_steps, updates=self.learner.updates)
            if self.agent_steps < total or self.step_from is not None:
                self.train(total)
            if self.evaluation is None or self.evaluated_at != self.agent_steps:
                self._evaluate()
        except (Interrupted, NonFiniteError, EnvError, CallbackError, BrokenPipeError, OutputFullError):
            self._save()
            raise
        self._save()
        assert self.evaluation is not None
        summary = {
            **self.evaluation,
            "updates": self.learner.updates,
            "seconds": self.logger.seconds,
            "precision": str(self.learner.dtype).removeprefix("torch."),
        }
        self.rundir.mark_finished(summary)
        return summary

    def train(self, total: int) -> None:
        """Steps, and does the updates owed, until there are `total` agent steps. Raises: as `run`."""
        config, meter = self.config, evaluation.EpisodeMeter(self.env.num_envs)
        if self.step_from is not None:  # the last session was stopped in the middle of a step
            self._learn()
            self._end_step(self.step_from)
        step = self.env.reset()
        while self.agent_steps < total:
            self.stop.check()
            if self._evaluation_due():
                self._evaluate()
            finished = meter.add(step)
            self.reward_scale.add(step.reward)
            with annotate("act"):
                action = self._act(step.obs, step.is_first)
            self.env.send(action)  # the environment works while the learner does
            with annotate("replay"):
                self.replay.add(
                    {
                        **step.obs,
                        "action": action,
                        "reward": step.reward,
                        "is_first": step.is_first,
                        "is_last": step.is_last,
                        "is_terminal": step.is_terminal,
                    }
                )
            self.step_from, self.agent_steps = self.agent_steps, self.agent_steps + self.env.num_envs
            with contextlib.ExitStack() as scores:  # each has its line, even if on_line raises at another
                for episode in reversed(finished):
                    scores.callback(self._score, episode)
            with annotate("learn"):
                self._learn()
            with annotate("receive"):
                step = self.env.recv()
            self._end_step(self.step_from)
            if time.monotonic() - self.saved_at >= config.checkpoint.seconds:
                self._save()

    def _end_step(self, before: int) -> None:
        """Ends the step begun at `before`: progress, and log line (the run's last step has one) and video if due."""
        config = self.config
        self.progress.update(agent_steps=self.agent_steps, updates=self.learner.updates)
        self.step_from = None
        if self._crossed(config.log.every, before) or self.agent_steps >= config.total_agent_steps:
            self._log()
        if config.log.video_every and self._crossed(config.log.video_every, before):
            self._video()

    def _act(self, obs: Mapping[str, np.ndarray], is_first: np.ndarray) -> np.ndarray:
        """The policy's actions; random ones while replay is being filled, unless the policy comes from --init-from."""
        if self.learning_from is not None or self.config.init_from is not None:
            return self.policy(obs, is_first)
        rng = np.random.default_rng(stream_seed(self.config.seed, "prefill", self.agent_steps))
        return self.env.actions.sample(rng, self.env.num_envs)

    def _learn(self) -> None:
        """Does the updates owed up to this agent step."""
        config = self.config
        batch, length = config.replay.batch, config.replay.length
        if self.learning_from is None:
            windows = (self.replay.rows_added - length + 1) * self.env.num_envs
            if windows < config.train.prefill:
                return
            self.learning_from = self.agent_steps
            return
        owed = int((self.agent_steps - self.learning_from) * config.updates_per_step)
        while self.learner.updates < owed:
            self.stop.check()
            self.replay.stage(batch, length)
            self._update()
            self.learner.updates += 1
            self.progress.update(updates=self.learner.updates)
            if self.learner.device.type == "cpu":
                self._check_finite()

    def _check_finite(self) -> None:
        skipped = int(self.learner.skipped) - self.skipped_before
        if skipped < self.config.train.nonfinite_limit:
            return
        path = self.rundir.path / "nonfinite_batch"
        batch = self.replay.gather(self.learner.bad_starts, self.config.replay.length)
        checkpoint.save(path, batch, {"agent_steps": self.agent_steps}, number=self.learner.updates, keep=1)
        late = self.learner.device.type != "cpu"  # seen at a log line: replay may have overwritten rows
        replaced = late and self.replay.rows_added > self.replay.ring
        wrong = [f"loss/{name}" for name in self.learner.not_finite(batch)]
        exact = self.learner.dtype == torch.float32
        other = "begin another run with lower learning rates" if exact else "with --precision float32"
        raise NonFiniteError(
            f"{skipped} updates had a loss or gradient that is not finite, the last {'by' if late else 'at'} "
            f"update {self.learner.updates}; its batch is in {path}"
            + (", except for rows that newer ones have replaced" if replaced else "")
            + (f"; not finite on it: {', '.join(wrong)}" if wrong else ""),
            where=self.rundir.path,
            hint=f"go on with a higher --train.nonfinite-limit, or {other}",
        )

    def _score(self, episode: evaluation.Episode) -> None:
        more = {} if episode.success is None else {"success": episode.success}
        self.logger.score(
            "episode", agent_steps=self.agent_steps, score=episode.score, length=episode.length, **more
        )
        self.progress.update(score=episode.score)

    def _log(self) -> None:
        self._check_finite()
        metrics = self.learner.metrics()
        metrics["skipped_updates"] = float(self.learner.skipped)
        metrics["replay_rows"] = min(self.replay.rows_added, self.replay.ring) * self.env.num_envs
        rates = {name: getattr(self.progress, name) for name in ("steps_per_second", "updates_per_second")}
        metrics |= {name: rate for name, rate in rates.items() if not math.isnan(rate)}
        values = self.logger.log(self.agent_steps, self.learner.updates, metrics)
        prefix = "harmony/weight_"
        weights = {k.removeprefix(prefix): v for k, v in values.items() if k.startswith(prefix)}
        self.progress.update(harmony=weights or None)
        self.reward_scale.check(self.learner.updates, values)

    def _video(self) -> None:
        length = self.config.replay.length
        if self.learning_from is None or length <= CONTEXT:
            return
        batch = self.replay.gather(self.learner.last_starts[:EXAMPLES], length)
        for key, frames in films(self.learner, batch).items():
            self.logger.video(f"open_loop_{key}", agent_steps=self.agent_steps, frames=frames)

    def _evaluate(self) -> None:
        self._update.finish()
        self._save()  # an evaluation can be long: a kill during it then costs nothing that was learnt
        config = self.config.eval
        if self.eval_env is None:
            num_envs = min(config.num_envs, config.episodes)
            self.eval_env = self._make_envs(num_envs=num_envs, stream="eval", agent_steps=self.agent_steps)
            self._opened.callback(self.eval_env.close)
        seed = stream_seed(self.config.seed, "evaluation", self.agent_steps)
        policy = Policy(self.learner, self.eval_env.num_envs, seed, graph=self.graph)
        self.progress.update(phase="evaluate", done=(0, config.episodes))

        def tell(done: int) -> None:
            self.progress.update(done=(done, config.episodes))

        with annotate("evaluate"):
            episodes = evaluation.play(self.eval_env, policy, config.episodes, self.stop.check, tell=tell)
        self.evaluation = evaluation.summarize(episodes)
        self.evaluated_at = self.agent_steps
        self.logger.score("evaluation", agent_steps=self.agent_steps, **self.evaluation)
        self.progress.update(phase="", evaluation=self.evaluation["score"])

    def _save(self) -> None:
        """Makes the logs durable, then replay, then writes the checkpoint that relies on both."""
        with annotate("checkpoint"):
            self.logger.sync()
            self.replay.flush()
            tensors = {f"learner.{k}": v for k, v in self.learner.state_dict().items()}
            tensors |= {f"half.{k}": v for k, v in self._update.state_dict().items()}
            tensors |= {f"replay.{k}": v for k, v in self.replay.state_dict().items()}
            tensors["policy.generator"] = self.policy.generator.get_state()
            meta = {
                "agent_steps": self.agent_steps,
                "step_from": self.step_from,
                "learning_from": self.learning_from,
                "evaluated_at": self.evaluated_at,
                "evaluation": self.evaluation,
                "seconds": self.logger.seconds,
            }
            keep = self.config.checkpoint.keep
            checkpoint.save(self.rundir.checkpoints, tensors, meta, number=self.agent_steps, keep=keep)
        if self.agent_steps > self.resumed_at:
            self.rundir.grow()
        self.saved_at = time.monotonic()

    def _restore(self, saved: checkpoint.Checkpoint) -> float:
        """Restores a checkpoint; returns the run's seconds so far."""
        meta = saved.meta
        self.replay.load_state_dict(saved.part("replay."))
        with checkpoint.fitting(self.rundir.checkpoints):
            self.learner.load_state_dict(saved.part("learner."))
            self._update.load_state_dict(saved.part("half."))
        restore_generator(self.policy.generator, saved.tensors["policy.generator"])
        self.agent_steps, self.learning_from = meta["agent_steps"], meta["learning_from"]
        self.step_from = meta.get("step_from")
        self.evaluated_at, self.evaluation = meta["evaluated_at"], meta["evaluation"]
        return float(meta["seconds"])

    def _evaluation_due(self) -> bool:
        """Whether a multiple of `eval.every` was passed since the last evaluation, in this session or before it."""
        every = self.config.eval.every
        return bool(every) and self.agent_steps // every > self.evaluated_at // every

    def _crossed(self, every: int, before: int) -> bool:
        """Whether a multiple of `every` agent steps lies between `before` and now."""
        return self.agent_steps // every > before // every
