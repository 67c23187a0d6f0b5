"""The learner: one update is one function of static shapes, with no host synchronisation and no branch on data.

Axes: T time, B batch, H horizon, N = T*B starting states, S groups, A action width.
"""

import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from hdfast.agent.behavior import Actor, Behavior, Draws
from hdfast.agent.model_step import ModelStep
from hdfast.agent.networks import parameter_counts
from hdfast.agent.optimizer import Adam
from hdfast.agent.rounding import rounded
from hdfast.agent.world_model import WorldModel
from hdfast.config import Config
from hdfast.envs.base import ArraySpec, ContinuousActions, DiscreteActions
from hdfast.runtime.device import restore_generator
from hdfast.runtime.errors import ConfigError, MissingLibraryError
from hdfast.runtime.profiling import phase
from hdfast_kernels import BackendError, dispatch

Sampler = Callable[[int, int], dict[str, Tensor]]


def check_backends(device: torch.device) -> None:
    """Reports an op that cannot run on `device` before the first step of a run, not at its first update.

    Raises:
        ConfigError: HDFAST_BACKEND names a backend that cannot.
        MissingLibraryError: the default backend is not built or not installed.
    """
    for op in dispatch.ops():
        try:
            dispatch.resolve_name(op, None, torch.empty(0, device=device))
        except BackendError as error:
            kind = ConfigError if os.environ.get("HDFAST_BACKEND") else MissingLibraryError
            raise kind(str(error)) from error


class Learner:
    """Owns the parameters, their optimizers and the random numbers of learning.

    Args:
        obs_specs, actions: what the environment shows and accepts.
        config: the run's configuration.
        device: where everything lives.
        dtype: type of the matrix work, float32 or bfloat16; parameters and losses stay float32.
        seed: initial parameters and all draws of learning follow from it.

    Raises: ConfigError, MissingLibraryError where an op cannot run on the device; see `check_backends`. ValueError
    where a subclass of Behavior has parameters outside of actor and critics, which nothing would train.

    A subclass may learn with subclasses of the modules, which it names in `model_type` and `behavior_type`. Its name,
    `--learner my_agent:MyLearner`, belongs to a run like any other setting, and so do its `options`: names and
    default values, such as `options = {"scale": 1.0}`, which `--learner-options` sets and its modules read in
    `config.options["scale"]`. It may override `acting`, and the halves of an update, `learn_model` and
    `learn_behavior`. Scalar tensors that it adds to a step's metrics are logged, the same names in every update:
    `half._replace(metrics=half.metrics | {"mine": value})`. Halves of two updates may run beside each other: what
    `learn_behavior` reads, `learn_model` changes after it has called `wait()`.

    A module of its own that is an attribute is saved and restored with the others, and a parameter of its own belongs
    into one; `.to(self.device)` moves it. What learns it belongs into `optimizers`: an `Adam`, or a subclass with
    another `step`. A second behavior, with rewards of its own, that acts in training::

        def __init__(self, *args, **settings):
            super().__init__(*args, **settings)
            self.explorer = Curious(self.actions, self.config).to(self.device)  # a Behavior
            self.optimizers |= self.behavior_optimizers(self.explorer, "explorer_")

        def learn_behavior(self, half):
            applied, metrics = self.update_behavior(self.explorer, half, "explorer_")
            super().learn_behavior(half._replace(applied=applied, metrics=half.metrics | metrics))

        def acting(self, training):
            return self.explorer.actor if training else self.behavior.actor

    On CUDA an update is recorded once and then replayed, so that numbers of Python stay what they were. A schedule is
    computed on the device, from the steps that the optimizer has made::

        def learn_model(self, sample, wait=lambda: None):
            optimizer = self.optimizers["model"]
            optimizer.lr = self.config.optimizer.model_lr * ((optimizer.steps + 1) / 1000).clamp(max=1)
            return super().learn_model(sample, wait)
    """

    model_type: type[WorldModel] = WorldModel
    behavior_type: type[Behavior] = Behavior
    options: Mapping[str, Any] = MappingProxyType({})

    def __init__(
        self,
        obs_specs: Mapping[str, ArraySpec],
        actions: DiscreteActions | ContinuousActions,
        config: Config,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ):
        self.config, self.actions, self.dtype = config, actions, dtype
        self.obs_specs = dict(obs_specs)
        self.device = torch.device(device)
        check_backends(self.device)
        with torch.random.fork_rng(devices=[]):  # parameters are drawn on the host: the same on every device
            torch.manual_seed(seed)
            self.model = self.model_type(obs_specs, actions, config)
            self.behavior = self.behavior_type(actions, config)
        self.model.to(self.device)
        self.behavior.to(self.device)
        self.optimizers = {
            "model": self._adam("model", self.model),
            **self.behavior_optimizers(self.behavior),
        }
        self.generator = torch.Generator(self.device)
        self.generator.manual_seed(seed)
        self.updates = 0
        self.skipped = torch.zeros((), dtype=torch.int64, device=self.device)
        self.bad_starts = torch.zeros(config.replay.batch, dtype=torch.int64, device=self.device)
        self.last_starts = torch.zeros_like(self.bad_starts)
        self._metric_names: list[str] = []
        self._metric_sum = torch.zeros(0, device=self.device)
        self._metric_count = torch.zeros((), device=self.device)

    def update(self, sample: Sampler) -> None:
        """One update on a batch of `sample(B, T)`, counted in `updates`; see `step`."""
        self.step(sample)
        self.updates += 1

    def step(self, sample: Sampler) -> None:
        """World model, actor, critic and slow critic learn from one batch; only device tensors change.

        `sample` returns a time-major batch: observations, `action`, `reward`, `is_first`, `is_terminal` (T, B, ...)
        and `starts` (B,). Model, actor and critic learn in this order; the first whose loss or gradient is not finite
        changes nothing, and neither do those after it. Such an update is counted in `skipped`, and its `starts` are
        kept in `bad_starts`. `last_starts` holds those of the last update.
        """
        self.learn_behavior(self.learn_model(sample))

    def learn_model(self, sample: Sampler, wait: Callable[[], None] = lambda: None) -> ModelStep:
        """The first half of a step: the world model learns. `wait` is called before its parameters change."""
        config, optimizer = self.config, self.optimizers["model"]
        with phase("sample"):
            batch = sample(config.replay.batch, config.replay.length)
        with phase("world model"):
            with torch.no_grad():
                uniform = self.uniform(*batch["reward"].shape, config.rssm.stoch)
            with rounded(optimizer, self.dtype):
                output = self.model.loss(batch, uniform, self.dtype)
            gradients = _gradients(optimizer, output.loss)
        wait()
        with phase("optimizers"):
            norm, applied = optimizer.step(gradients, output.loss.isfinite())
        metrics = {"loss_model": output.loss.detach(), **output.metrics, "grad_norm_model": norm}
        latent = output.observed.latent.flatten(0, 1).detach()
        cont = 1 - batch["is_terminal"].flatten().float()
        return ModelStep(latent, cont, applied, batch["starts"], metrics)

    def learn_behavior(self, half: ModelStep) -> None:
        """The second half: actor, critic and slow critic learn from the states that the first inferred."""
        applied, metrics = self.update_behavior(self.behavior, half)
        self.skipped += ~applied
        self.last_starts.copy_(half.starts)
        self.bad_starts.copy_(torch.where(applied, self.bad_starts, half.starts))
        self._accumulate(half.metrics | metrics, applied)

    @torch.no_grad()
    def not_finite(self, batch: Mapping[str, Tensor]) -> list[str]:
        """The losses of the world model that are not finite on a batch as `sample` returns it; for messages."""
        uniform = self.uniform(*batch["reward"].shape, self.config.rssm.stoch)
        losses = self.model.loss(batch, uniform, self.dtype).losses
        return [name for name, loss in losses.items() if not loss.isfinite().all()]

    def acting(self, training: bool) -> Actor:
        """The actor that acts in environments, of training or of evaluation; a subclass may explore with another."""
        return self.behavior.actor

    def draws(self, count: int) -> Draws:
        """The random numbers of one imagined rollout from `count` states."""
        config = self.config
        latent = self.uniform(config.behavior.horizon, count, config.rssm.stoch)
        if isinstance(self.actions, DiscreteActions):
            return Draws(latent, self.uniform(config.behavior.horizon, count))
        shape = (config.behavior.horizon, count, self.actions.size)
        return Draws(latent, torch.randn(shape, generator=self.generator, device=self.device))

    def forget_metrics(self) -> None:
        """The metrics of the next update may be others; what has been added up so far is left out of the means."""
        self._metric_names = []

    def uniform(self, *shape: int) -> Tensor:
        """Float32 numbers in [0, 1) from the learner's generator."""
        return torch.rand(shape, generator=self.generator, device=self.device)

    def metrics(self) -> dict[str, float]:
        """Means over the finite updates since the last call, with one copy to the host; empty if there were none."""
        if not self._metric_names:
            return {}
        count, *sums = torch.cat([self._metric_count[None], self._metric_sum]).tolist()
        self._metric_count.zero_()
        self._metric_sum.zero_()
        return (
            {name: total / count for name, total in zip(self._metric_names, sums, strict=True)}
            if count
            else {}
        )

    def parameter_counts(self) -> dict[str, int]:
        """Parameters by part, and of a subclass's own modules.

        `harmony` counts the scalars that balance the losses, the other counts leave them out.
        """
        harmony = parameter_counts({"harmony": self.model.harmonizer})["harmony"]
        counts = parameter_counts(self.parts())
        counts["world_model"] -= harmony
        return {**counts, "total": sum(counts.values()), "harmony": harmony}

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that learning depends on, as tensors by name."""
        state = {f"{name}.{k}": v for name, module in self.modules() for k, v in module.state_dict().items()}
        for name, optimizer in self.optimizers.items():
            state |= {f"optimizer.{name}.{k}": v for k, v in optimizer.state_dict().items()}
        state["generator"] = self.generator.get_state()
        state["updates"] = torch.tensor(self.updates)
        state["skipped"] = self.skipped
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restores a `state_dict` in place.

        Raises:
            KeyError, RuntimeError: an entry is missing or of another shape.
        """

        def part(prefix: str) -> dict[str, Tensor]:
            return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}

        for name, module in self.modules():
            module.load_state_dict(part(f"{name}."))
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(part(f"optimizer.{name}."))
        restore_generator(self.generator, state["generator"])
        self.updates = int(state["updates"])
        self.skipped.copy_(state["skipped"])

    def load_parameters(self, state: Mapping[str, Tensor]) -> None:
        """Takes what another learner's modules hold, from its `state_dict`; optimizers and generator stay.

        The harmony scalars stay, too, if the other learner has none or different ones: they adapt quickly.

        Raises:
            RuntimeError: an entry is missing, or has another shape; others may already have been copied.
        """
        for name, module in self.modules():
            prefix = f"{name}."
            given = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            own = {k: v for k, v in module.state_dict().items() if k.startswith("harmonizer.")}
            theirs = {k: v for k, v in given.items() if k.startswith("harmonizer.")}
            if {k: v.shape for k, v in own.items()} != {k: v.shape for k, v in theirs.items()}:
                given = {k: v for k, v in given.items() if k not in theirs} | own
            module.load_state_dict(given)

    def load_shared_parameters(self, state: Mapping[str, Tensor]) -> list[str]:
        """As `load_parameters`, from a learner that may have other modules, such as one more head.

        Returns: the parts of this learner, such as `model.rewarded`, that the other has not: they stay as they are.

        Raises: RuntimeError as `load_parameters`, also if the other has no world model or no behavior.
        """
        own = {f"{name}.{k}": v for name, module in self.modules() for k, v in module.state_dict().items()}
        given = {_part(key) for key in state}
        parts = {_part(key) for key in own}
        expected = {"model", "behavior"} - {part.partition(".")[0] for part in given}
        alone = {part for part in parts - given if part.partition(".")[0] not in expected}
        shared = {key: value for key, value in state.items() if _part(key) in parts}
        self.load_parameters(shared | {key: value for key, value in own.items() if _part(key) in alone})
        return sorted(alone)

    def modules(self) -> list[tuple[str, nn.Module]]:
        """The world model, the behavior and what a subclass has beside and outside them, by the attributes' names."""
        found: list[tuple[str, nn.Module]] = []
        for name, value in vars(self).items():
            if isinstance(value, nn.Module) and all(value not in set(one.modules()) for _, one in found):
                found.append((name, value))
        return found

    def parts(self) -> dict[str, nn.Module]:
        """What learns, by name: the world model, the parts of the behavior and a subclass's own modules."""
        own = {name: one for name, one in self.modules() if name not in ("model", "behavior")}
        return {"world_model": self.model, **self.behavior.parts(), **own}

    def behavior_optimizers(self, behavior: Behavior, prefix: str = "") -> dict[str, Adam]:
        """Optimizers for a behavior that is on the learner's device, for `update_behavior`, by name.

        Raises: ValueError for parameters outside of actor and critics, which nothing would train.
        """
        trained = (behavior.actor, behavior.critic, behavior.slow_critic)
        known = {id(parameter) for module in trained for parameter in module.parameters()}
        if other := [name for name, p in behavior.named_parameters() if id(p) not in known]:
            what = f"{type(behavior).__name__}: no optimizer would train {', '.join(other)}"
            raise ValueError(f"{what}; put them into its actor or its critic")
        behavior.slow_parameters.tensors()  # their memory moves now, not while an update is captured
        return {prefix + part: self._adam(part, module) for part, module in behavior.parts().items()}

    def update_behavior(
        self, behavior: Behavior, half: ModelStep, prefix: str = ""
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """A behavior learns from what it imagines.

        Args:
            behavior: whose optimizers are `optimizers[prefix + "actor"]` and `optimizers[prefix + "critic"]`.
            half: the states that it starts from; it learns nothing unless `half.applied`.

        Returns:
            applied: scalar bool, whether it has learnt. metrics: scalars, their names beginning with the prefix.
        """
        actor, critic = self.optimizers[f"{prefix}actor"], self.optimizers[f"{prefix}critic"]
        with phase("imagination"):
            draws = self.draws(half.cont.shape[0])
            # Without REINFORCE the actor's weights are cast at every step, see `Behavior._roll_out`.
            with rounded(actor, self.dtype) if behavior.reinforce else nullcontext():
                trajectory = behavior.imagine(self.model, half.latent, half.cont, draws, self.dtype)
        with phase("actor-critic"):
            with rounded(critic, self.dtype):
                scores = behavior.score(trajectory, self.dtype)
            bounds = behavior.return_range.updated(scores.returns)
            actor_loss, metrics = behavior.actor_loss(trajectory, scores, bounds)
            critic_loss = behavior.critic_loss(trajectory, scores, self.dtype)
            finite = half.applied & actor_loss.isfinite() & critic_loss.isfinite()
            critic_gradients = _gradients(critic, critic_loss, keep_graph=not behavior.reinforce)
            actor_gradients = _gradients(actor, actor_loss)
        with phase("optimizers"):
            actor_norm, applied = actor.step(actor_gradients, finite)
            critic_norm, applied = critic.step(critic_gradients, applied)
        with phase("actor-critic"):
            behavior.return_range.bounds.copy_(torch.where(applied, bounds, behavior.return_range.bounds))
            behavior.update_slow_critic(applied, critic.held.tensors())
        metrics |= {"loss_actor": actor_loss.detach(), "loss_critic": critic_loss.detach()}
        metrics |= {"grad_norm_actor": actor_norm, "grad_norm_critic": critic_norm}
        return applied, {prefix + name: value for name, value in metrics.items()}

    def _adam(self, part: str, module: nn.Module) -> Adam:
        settings = {name: getattr(self.config.optimizer, f"{part}_{name}") for name in ("lr", "eps", "clip")}
        return Adam(module.parameters(), **settings)

    @torch.no_grad()
    def _accumulate(self, metrics: dict[str, Tensor], applied: Tensor) -> None:
        if not self._metric_names:
            for name, value in metrics.items():
                if not isinstance(value, Tensor) or value.shape:
                    got = (
                        f"of shape {tuple(value.shape)}"
                        if isinstance(value, Tensor)
                        else type(value).__name__
                    )
                    raise ValueError(f"metric {name!r} is {got}, expected a tensor without axes")
            self._metric_names = list(metrics)
            self._metric_sum = torch.zeros(len(metrics), device=self.device)
            self._metric_count.zero_()
        if metrics.keys() != set(self._metric_names):
            other = metrics.keys() ^ set(self._metric_names)
            raise ValueError(
                f"metrics must be the same in all updates, got only at times: {', '.join(sorted(other))}"
            )
        values = torch.stack([metrics[name].float() for name in self._metric_names])
        self._metric_sum += torch.where(applied, values, 0.0)
        self._metric_count += applied


def _part(key: str) -> str:
    """`model.reward` of `model.reward.hidden.0.weight`."""
    return ".".join(key.split(".")[:2])


def _gradients(optimizer: Adam, loss: Tensor, keep_graph: bool = False) -> list[Tensor]:
    """Of a loss, in the order of the optimizer's parameters; zeros where it does not depend on one."""
    found = torch.autograd.grad(loss, optimizer.parameters, retain_graph=keep_graph, materialize_grads=True)
    return list(found)
