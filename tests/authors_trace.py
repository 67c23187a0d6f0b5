"""hdfast's own modules and losses against a trace of the authors' own program.

Run: python -m tests.authors_trace [FILE]

The trace's parameters are loaded into hdfast's modules, and uniform and normal numbers are chosen with which
hdfast draws the trace's latents and actions; a line for each quantity and each gradient says how far apart
the two are. Exit code 0: all agree; 1: something does not; 2: FILE is not a trace.

Axes: T time, B batch, H horizon, N = B*T starting states in the trace's order, D deter, S groups, K classes,
A action width. The trace's batches are (B, T, ...), hdfast's (T, B, ...).
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hdfast.agent.behavior import Behavior, Draws, Scores, Trajectory
from hdfast.agent.distributions import normal_parameters, unimix_log_probs
from hdfast.agent.networks import Latent
from hdfast.agent.world_model import WorldModel
from hdfast.config import Config
from hdfast.envs.base import ArraySpec, ContinuousActions, DiscreteActions
from hdfast.sections import NetworkConfig, ReplayConfig, RSSMConfig
from hdfast_kernels import two_hot_mean
from tests.authors_parameters import HARMONY, counterparts, fill, in_their_layout
from tests.traces import AUTHORS, Trace, TraceError, load

DTYPE = torch.float32
VALUE_BOUND = 1e-4  # of max(1, largest entry)
GRADIENT_BOUND = 1e-3  # of the largest entry, or of SMALLEST if all entries are smaller
SMALLEST = 1e-6
ROW_KEYS = ("action", "reward", "is_first", "is_last", "is_terminal")
NOT_COMPARED = {
    "initial_logit": "zeros in the authors' state, which nothing reads",
    "prior_stoch": "a draw from the prior, which nothing reads",
}


def build(trace: Trace) -> tuple[WorldModel, Behavior]:
    """hdfast's modules in the sizes of the trace, with hdfast's own initial parameters.

    Raises:
        TraceError: hdfast cannot have these sizes.
    """
    p = trace.parameters

    def layers(name: str) -> int:
        return sum(k.startswith(f"{name}/h") and k.endswith("/kernel") for k in p)

    batch, length = trace.inputs["is_first"].shape
    stoch, classes = trace.outputs["post_stoch"].shape[-2:]
    sizes = {}
    if "wm/enc/cnn/s0res/kernel" in p:
        sizes["depth"] = p["wm/enc/cnn/s0res/kernel"].shape[-1]
    if "wm/enc/mlp/h0/kernel" in p:
        sizes |= {"mlp_layers": layers("wm/enc/mlp"), "mlp_units": p["wm/enc/mlp/h0/kernel"].shape[1]}
    config = Config(
        rssm=RSSMConfig(
            deter=len(p["wm/rssm/initial"]),
            units=p["wm/rssm/img_in/kernel"].shape[1],
            stoch=stoch,
            classes=classes,
        ),
        network=NetworkConfig(
            units=p["wm/rew/h0/kernel"].shape[1],
            layers=layers("wm/rew"),
            bins=len(p["wm/rew/dist_out/out/bias"]),
            **sizes,
        ),
        replay=ReplayConfig(batch=batch, length=length),
    )
    width = trace.inputs["action"].shape[-1]
    actions = ContinuousActions(width) if trace.continuous else DiscreteActions(width)
    specs = {k: ArraySpec(tuple(v.shape[2:]), v.numpy().dtype) for k, v in trace.observations.items()}
    try:
        return WorldModel(specs, actions, config), Behavior(actions, config)
    except ValueError as error:
        raise TraceError(f"hdfast has no model of these sizes: {error}") from None


def middle(logp: Tensor, drawn: Tensor) -> Tensor:
    """The uniform number (...) in the middle of the drawn class's interval of the distribution function.

    Args:
        logp: (..., K) log-probabilities. drawn: (..., K) one-hot.
    """
    p = logp.detach().double().exp()
    index = drawn.argmax(-1, keepdim=True)
    return (p.cumsum(-1).gather(-1, index) - p.gather(-1, index) / 2).squeeze(-1).float()


@dataclass
class Report:
    """What agrees and what does not.

    lines: name, error and bound of everything compared. faults: what no error can express. left_out: what was
    not compared, and why.
    """

    lines: list[tuple[str, float, float]] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def value(self, name: str, ours: Tensor, theirs: Tensor) -> None:
        """Error relative to max(1, largest entry)."""
        self._add(name, ours, theirs, 1.0, VALUE_BOUND)

    def gradient(self, name: str, ours: Tensor, theirs: Tensor) -> None:
        """Error relative to the largest entry."""
        self._add(f"grad {name}", ours, theirs, SMALLEST, GRADIENT_BOUND)

    def _add(self, name: str, ours: Tensor, theirs: Tensor, least: float, bound: float) -> None:
        if ours.shape != theirs.shape:
            self.faults.append(
                f"{name}: hdfast's shape is {tuple(ours.shape)}, the trace's {tuple(theirs.shape)}"
            )
            return
        ours, theirs = ours.detach().double(), theirs.double()
        error = (ours - theirs).abs().max() / theirs.abs().max().clamp(min=least)
        self.lines.append((name, error.item(), bound))

    @property
    def bad(self) -> list[str]:
        """Names of the lines that do not agree, and the faults. A NaN does not agree."""
        return [name for name, error, bound in self.lines if not error <= bound] + self.faults

    @property
    def total(self) -> int:
        return len(self.lines) + len(self.faults)

    def show(self) -> None:
        width = max((len(name) for name, _, _ in self.lines), default=0)
        for name, error, bound in self.lines:
            print(f"{'ok ' if error <= bound else 'BAD'}  {name:{width}s}  {error:.1e}  (bound {bound:.0e})")
        for fault in self.faults:
            print(f"BAD  {fault}")
        for name in self.left_out:
            print(f"--   {name}")


class Comparison:
    """A trace and hdfast's modules with the trace's parameters; `run` compares them."""

    def __init__(self, trace: Trace):
        self.trace, self.report = trace, Report()
        self.model, self.behavior = build(trace)
        self.table = counterparts(self.model, self.behavior)
        self.used: set[str] = set()
        self._load_parameters()

    def run(self) -> Report:
        """Compares everything in the trace."""
        self._world_model()
        rollouts = {k: self._imagine(k) for k in ("traj", "traj2") if f"{k}_deter" in self.trace.outputs}
        if "traj" in rollouts:
            self._critic(*rollouts["traj"])
        if rollouts:  # where actions are continuous, the authors rolled out anew for the actor's gradient
            self._actor(*list(rollouts.values())[-1])
        for name in self.trace.gradients:
            if f"grad {name}" not in self.used:
                self.report.faults.append(f"grad {name}: hdfast has no such gradient")
        for name in self.trace.inputs.keys() - self.trace.observations.keys() - set(ROW_KEYS):
            self.report.left_out.append(f"in:{name} is not read: the trace's model does not observe it")
        for name in self.trace.outputs:
            if name not in self.used:
                why = NOT_COMPARED.get(name, "hdfast computes no such quantity")
                self.report.left_out.append(f"{name} is not compared: {why}")
        return self.report

    def _load_parameters(self) -> None:
        filled: set[Tensor] = set()
        for name, theirs in self.trace.parameters.items():
            parts = self.table.get(name)
            if parts is None:
                self.report.faults.append(f"parameter {name}: hdfast has no such parameter")
            elif (shape := in_their_layout(parts).shape) != theirs.shape:
                self.report.faults.append(
                    f"parameter {name}: hdfast's shape is {tuple(shape)}, the trace's {tuple(theirs.shape)}"
                )
            else:
                fill(parts, theirs)
                filled |= {part.ours for part in parts}
        for module in (self.model, self.behavior):
            for name, parameter in module.named_parameters():
                if parameter not in filled:
                    self.report.faults.append(f"hdfast's parameter {name}: the trace has none for it")

    def _value(self, name: str, ours: Tensor) -> None:
        """Compares with `out:name`, if the trace has it."""
        if name in self.trace.outputs:
            self.used.add(name)
            self.report.value(name, ours, self.trace.outputs[name])

    def _gradients(self, loss: Tensor, module: nn.Module, prefix: str) -> None:
        """Compares the gradients of `loss` in `module`, whose names in the trace begin with `prefix`."""
        parameters = list(module.parameters())
        found = torch.autograd.grad(
            loss, parameters, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        gradient = dict(zip(parameters, found, strict=True))
        for name, theirs in self.trace.gradients.items():
            if name.startswith(prefix) and name in self.table:
                self.used.add(f"grad {name}")
                self.report.gradient(name, in_their_layout(self.table[name], gradient.__getitem__), theirs)

    def _world_model(self) -> None:
        model, out = self.model, self.trace.outputs
        batch = {k: v.transpose(0, 1).contiguous() for k, v in self.trace.inputs.items()}  # -> (T, B, ...)
        batch["is_first"] = F.pad(batch["is_first"][1:].bool(), (0, 0, 1, 0), value=True)
        if not self.trace.continuous:
            batch["action"] = batch["action"].argmax(-1)
        uniform = middle(out["post_logit"], out["post_stoch"]).transpose(0, 1)
        result = model.loss(batch, uniform, DTYPE)
        latent = result.observed.latent
        with torch.no_grad():
            initial = model.rssm.initial(model.rssm.cast(DTYPE))
            reward = model.reward_logits(latent, DTYPE)
            decoded = model.decode(latent.flatten(0, 1), DTYPE)
        for name, ours in {
            "initial_deter": initial.deter,
            "initial_stoch": F.one_hot(initial.index, model.rssm.classes),
        }.items():
            if name in out:
                self._value(name, ours.expand_as(out[name]))
        time_major = {
            "embed": model.encode(batch, DTYPE),
            "post_deter": latent.deter,
            "prior_deter": latent.deter,
            "post_stoch": F.one_hot(latent.index, model.rssm.classes),
            "post_logit": result.observed.post_logp,
            "prior_logit": result.observed.prior_logp,
            "reward_logits": reward,
            "reward_mean": two_hot_mean(reward),
            "cont_prob": model.cont_logit(latent, DTYPE).sigmoid(),
            **{f"loss_{name}": loss for name, loss in result.losses.items()},
        }
        if "image" in decoded:
            time_major["recon"] = decoded["image"].unflatten(0, latent.deter.shape[:2])
        for name, ours in time_major.items():
            self._value(name, ours.transpose(0, 1))
        for i, group in enumerate(HARMONY.values(), 1):
            if group in model.harmonizer.groups:
                self._value(f"harmony_s{i}", result.metrics[f"harmony/s_{group}"])
        self._value("model_loss", result.loss)
        self._gradients(result.loss, model, "wm/")

    def _policy(self, latent: Latent) -> dict[str, Tensor]:
        """The actor's outputs for each state, by the trace's names."""
        actor = self.behavior.actor
        out = actor.mlp(latent.detach(), DTYPE)
        if self.trace.continuous:
            return dict(
                zip(("actor_mean", "actor_std"), normal_parameters(out["mean"], out["std"]), strict=True)
            )
        return {"actor_logits": unimix_log_probs(out["logits"], actor.unimix)}

    def _imagine(self, key: str) -> tuple[Trajectory, Scores]:
        """hdfast's rollout from the trace's starting states, with draws that lead to its latents and actions."""
        out, rssm, behavior = self.trace.outputs, self.model.rssm, self.behavior
        deter, stoch, action = (out[f"{key}_{part}"] for part in ("deter", "stoch", "action"))
        with torch.no_grad():
            policy = self._policy(Latent(deter, stoch.argmax(-1)))
            prior = unimix_log_probs(rssm._prior_logits(deter[1:], rssm.cast(DTYPE)), rssm.unimix)
        if self.trace.continuous:
            chosen = (action - policy["actor_mean"]) / policy["actor_std"]
        else:
            chosen = middle(policy["actor_logits"], action)
        draws = Draws(middle(prior, stoch[1:]), chosen[:-1])
        behavior.horizon = len(deter) - 1
        start = Latent(deter[0], stoch[0].argmax(-1))
        cont = 1 - self.trace.inputs["is_terminal"].flatten().float()
        trajectory = behavior.imagine(self.model, start, cont, draws, DTYPE)
        scores = behavior.score(trajectory, DTYPE)
        with torch.no_grad():
            logits = rssm._prior_logits(trajectory.latent.deter[1:], rssm.cast(DTYPE))
        self._value(f"{key}_deter", trajectory.latent.deter)
        self._value(f"{key}_stoch", F.one_hot(trajectory.latent.index, rssm.classes))
        drawn = trajectory.action if self.trace.continuous else F.one_hot(trajectory.action, action.shape[-1])
        self.used |= {f"{key}_action", f"{key}_logit"}
        self.report.value(f"{key}_action", drawn, action[:-1])
        if f"{key}_logit" in out:  # the first is the posterior's, compared above
            self.report.value(f"{key}_logit", unimix_log_probs(logits, rssm.unimix), out[f"{key}_logit"][1:])
        self._value(f"{key}_cont", trajectory.cont)
        self._value(f"{key}_weight", scores.weight)
        return trajectory, scores

    def _critic(self, trajectory: Trajectory, scores: Scores) -> None:
        behavior = self.behavior
        loss = behavior.critic_loss(trajectory, scores, DTYPE)
        with torch.no_grad():
            slow = two_hot_mean(behavior.slow_critic(trajectory.latent, DTYPE)["logits"])
            policy = self._policy(trajectory.latent)
        for name, ours in policy.items():
            self._value(name, ours)
        self._value("imag_reward", trajectory.reward)
        self._value("critic_logits", scores.logits)
        self._value("imag_value", scores.value[:-1])
        self._value("imag_return", scores.returns)
        self._value("slow_mean", slow)
        self._value("critic_loss", loss)
        self._gradients(loss, behavior.critic, "task_behavior/critic/net/")

    def _actor(self, trajectory: Trajectory, scores: Scores) -> None:
        behavior, out = self.behavior, self.trace.outputs
        if "retnorm_before" in out:  # an input of the authors' loss
            self.used.add("retnorm_before")
            behavior.return_range.bounds.copy_(out["retnorm_before"])
        bounds = behavior.return_range.updated(scores.returns)
        loss, _ = behavior.actor_loss(trajectory, scores, bounds)
        self._value("retnorm_after", bounds)
        self._value("actor_loss", loss)
        self._gradients(loss, behavior.actor, "task_behavior/ac/actor/")


def main(argv: Sequence[str] | None = None) -> int:
    """Compares one trace, prints the lines, and returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.authors_trace", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "file", type=Path, nargs="?", default=AUTHORS, help="trace (.npz); default: %(default)s"
    )
    path = parser.parse_args(argv).file
    try:
        report = Comparison(load(path)).run()
    except TraceError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    report.show()
    print(f"{report.total - len(report.bad)} of {report.total} quantities of {path} agree")
    return 1 if report.bad else 0


if __name__ == "__main__":
    sys.exit(main())
