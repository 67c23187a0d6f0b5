"""Harmony weighting of any agent's losses, as a module: HarmonyDream's contribution without the rest of it.

Axes: L losses, G groups of losses that share one learned weight.

Source: HarmonyDream (arXiv 2310.00344); the op and its formula are in harmony_loss.py.
"""

import difflib
import json
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hdfast_kernels import dispatch
from hdfast_kernels.dispatch import FUSED_DTYPES
from hdfast_kernels.harmony_loss import harmony_loss

MODES = ("learned", "fixed", "off")


@dataclass(frozen=True)
class _Plan:
    """How one set of losses is reduced: the constants of `harmony_loss`, and on the device for metrics."""

    group: tuple[int, ...]  # (L,), -1 for none
    weight: tuple[float, ...]  # (L,)
    row: Tensor  # (L,) int64, group on the device
    factor: Tensor  # (L,) float32, weight
    fixed: Tensor  # (G,) float32, the groups' weights in mode "fixed"; else empty


class Harmonizer(nn.Module):
    """Sums named losses into one, with a weight per group that keeps the groups in balance.

    In mode "learned" each group g has a scalar s_g, and with the mean of each loss L_l the sum is

        sum_g (exp(-s_g) * sum_{l in g} weight_l * L_l + regularizer_g * log(1 + exp(s_g)))
        + sum of the losses in no group, times their scales.

    The scalars are the parameter `log_sigma` (G,), float32, in the order of the groups, zero at the start: weights of
    1. A state holds the groups' names, too, and is refused by a module whose groups are others or in another order.
    Train them with the model, with the same optimizer, but WITHOUT weight decay, which would pull the weights to 1.
    Exclude the parameter by its name, `log_sigma`, or by `no_weight_decay()`. Losses must not be negative, as those of
    densities can be: the weight of a group whose mean stays below zero grows without bound. Ten lines bring harmony
    into any agent:

        >>> harmonizer = Harmonizer(
        ...     {"reward": {"reward": 1.0}, "image": {"image": 1.0}, "kl": {"dyn": 5 / 6, "rep": 1 / 6}},
        ...     regularizer={"kl": 5 / 6},
        ... )
        >>> optimizer = torch.optim.AdamW([
        ...     {"params": [torch.nn.Parameter(torch.zeros(3))]},  # your model's
        ...     {"params": harmonizer.parameters(), "weight_decay": 0.0},
        ... ])
        >>> losses = {name: torch.rand(16, 64) for name in ("reward", "image", "dyn", "rep", "cont")}
        >>> total, metrics = harmonizer(losses)  # then total.backward(), optimizer.step(), log the metrics
        >>> sorted(name for name in metrics if name.startswith("harmony/weight"))
        ['harmony/weight_image', 'harmony/weight_kl', 'harmony/weight_reward']

    torch.compile takes it into its graph (`fullgraph=True`) and fuses it with the losses, unless a backend is named,
    here or by HDFAST_BACKEND.

    A group settles at a weight of (sqrt(1 + 4 / L) - 1) / 2, which is about 1 / L where its loss L is large. Adam moves
    a scalar by its learning rate a step, so that a loss of 1e5 takes 11 / lr of them. Begin with a weight near there,
    as initial={"image": 1e-5}, or give the scalars a larger learning rate.

    Mode "fixed" gives each group a constant weight instead of exp(-s_g), and no log term (the paper's study
    of domination sweeps the reward's weight over 1, 10, 100). Mode "off" ignores the groups: every loss has
    its plain scale. Neither has a parameter.

    A loss that is in no group is added with its scale. No loss is ever dropped: a name in `groups` or
    `scales` that `forward` is not given is an error, and so is a name that two groups claim.

    Args:
        groups: for each group the losses in it and their weights inside it.
        mode: "learned", "fixed" or "off".
        regularizer: the factor of log(1 + exp(s)) of a group; 1 by default.
        fixed: the weight of a group; 1 by default. Other numbers are for mode "fixed" alone.
        initial: the weight of a group at the start; 1 by default. Other numbers are for mode "learned" alone.
        scales: the factor of a loss that no group weighs: of losses in no group, and in mode "off" of every
            loss; 1 by default. DreamerV3 in mode "off": {"dyn": 0.5, "rep": 0.1}.
        backend: passed on to `harmony_loss`.

    Raises ValueError on an unknown mode, an unknown group in regularizer, fixed or initial, a weight that the mode
    would not use or that is not finite, an initial weight beyond 1e-30 and 1e30, a group without losses, or a loss in
    two groups; TypeError if groups, or one of them, is no mapping; `dispatch.BackendError` on an unknown backend.
    """

    def __init__(
        self,
        groups: Mapping[str, Mapping[str, float]],
        *,
        mode: str = "learned",
        regularizer: Mapping[str, float] | None = None,
        fixed: Mapping[str, float] | None = None,
        initial: Mapping[str, float] | None = None,
        scales: Mapping[str, float] | None = None,
        backend: str | None = None,
    ):
        super().__init__()
        if mode not in MODES:
            raise ValueError(f"Harmonizer: mode is {mode!r}, expected one of {', '.join(MODES)}")
        expected = "expected a mapping from its losses to their weights, as {'reward': 1.0}"
        if not isinstance(groups, Mapping):
            raise TypeError(f"Harmonizer: groups is {groups!r}, for each group by name {expected}")
        for name, members in groups.items():
            if not isinstance(members, Mapping):
                raise TypeError(f"Harmonizer: group {name!r} is {members!r}, {expected}")
            if not members:
                raise ValueError(f"Harmonizer: group {name!r} is empty, {expected}")
        if backend is not None and backend not in (known := dispatch.backends_registered("harmony_loss")):
            raise dispatch.BackendError(
                f"Harmonizer: backend is {backend!r}, expected one of {', '.join(known)}"
            )
        self.mode = mode
        self.groups = {name: dict(members) for name, members in groups.items()}
        self.scales = dict(scales or {})
        self.backend = backend
        regularizer, fixed, initial = dict(regularizer or {}), dict(fixed or {}), dict(initial or {})
        for where in (*self.groups.values(), self.scales, regularizer, fixed):
            if wrong := {name: weight for name, weight in where.items() if not math.isfinite(weight)}:
                raise ValueError(f"Harmonizer: weights are {wrong}, expected finite numbers")
        for argument, given in (("regularizer", regularizer), ("fixed", fixed), ("initial", initial)):
            _check_known(given, self.groups, f"{argument} of a group that does not exist")
        for argument, given, used in (("fixed", fixed, "fixed"), ("initial", initial, "learned")):
            if mode != used and (unused := {name: weight for name, weight in given.items() if weight != 1}):
                raise ValueError(
                    f"Harmonizer: mode is {mode!r} and would not use {argument}={unused}, expected mode {used!r}"
                )
        if wrong := {name: weight for name, weight in initial.items() if not 1e-30 <= weight <= 1e30}:
            raise ValueError(f"Harmonizer: initial is {wrong}, expected weights from 1e-30 to 1e30")
        grouped = [loss for group in self.groups.values() for loss in group]
        if twice := sorted({loss for loss in grouped if grouped.count(loss) > 1}):
            raise ValueError(f"Harmonizer: in more than one group: {', '.join(twice)}")
        self.fixed = {name: float(fixed.get(name, 1.0)) for name in self.groups}
        self.regularizer = tuple(float(regularizer.get(name, 1.0)) for name in self.groups)
        if mode == "learned":
            weights = [float(initial.get(name, 1.0)) for name in self.groups]
            self.log_sigma = nn.Parameter(-torch.tensor(weights, dtype=torch.float32).log())
        self._names = json.dumps(list(self.groups) if mode == "learned" else [])
        self._plans: dict[tuple[Any, ...], _Plan] = {}

    def no_weight_decay(self) -> set[str]:
        """The names of the parameters that an optimizer must not decay."""
        return {"log_sigma"} if self.mode == "learned" else set()

    def forward(self, losses: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Reduce the losses, each by its mean, to one scalar.

        Args:
            losses: by name, float tensors on one device: one value per row, all of one shape (which is
                fastest), or of several shapes, scalars too. What is neither float32 nor bfloat16 is made float32.

        Returns:
            total: float32 scalar, differentiable in the losses and log_sigma.
            metrics: detached scalars on the device, made without a synchronisation: `loss/<name>` the raw
                mean, `weighted/<name>` the same times its weight; and in the modes "learned" and "fixed" for
                each group `harmony/weight_<group>`, in "learned" also `harmony/s_<group>`.

        Raises ValueError if a loss that `groups` or (if used) `scales` names is missing or empty, no loss is given, or
        two are on different devices;
        TypeError if losses is no mapping or a loss no tensor.
        """
        if not isinstance(losses, Mapping):
            raise TypeError(
                f"Harmonizer: losses are a {type(losses).__name__}, expected a mapping from their names"
            )
        if not losses:
            raise ValueError("Harmonizer: no losses were given")
        for name, loss in losses.items():
            if not isinstance(loss, Tensor):
                raise TypeError(f"Harmonizer: loss {name!r} is a {type(loss).__name__}, expected a tensor")
        names, first = tuple(losses), next(iter(losses))
        for name, loss in losses.items():
            if loss.device != losses[first].device:
                raise ValueError(
                    f"Harmonizer: loss {name!r} is on {loss.device}, {first!r} on {losses[first].device}"
                )
        values = [loss if loss.dtype in FUSED_DTYPES else loss.float() for loss in losses.values()]
        if any(value.shape != values[0].shape for value in values):
            for name, value in zip(names, values, strict=True):
                if not value.numel():
                    raise ValueError(f"Harmonizer: loss {name!r} is empty and has no mean")
            values = [value.float().mean() for value in values]
        plan = self._plan(names, values[0].device)
        learned = self.mode == "learned"
        s = self.log_sigma.float() if learned else values[0].new_empty(0, dtype=torch.float32)
        total, means = harmony_loss(
            values, s, plan.group, plan.weight, self.regularizer if learned else (), backend=self.backend
        )
        return total, self._metrics(names, means, s.detach(), plan)

    def _metrics(self, names: tuple[str, ...], means: Tensor, s: Tensor, plan: _Plan) -> dict[str, Tensor]:
        weights = torch.exp(-s)  # (G,); empty unless learned
        factor = plan.factor * torch.cat([weights, weights.new_ones(1)])[plan.row]  # (L,); -1 is the one
        metrics = dict(zip((f"loss/{name}" for name in names), means.unbind(), strict=True))
        metrics |= zip((f"weighted/{name}" for name in names), (means * factor).unbind(), strict=True)
        if self.mode == "learned":
            metrics |= zip((f"harmony/s_{group}" for group in self.groups), s.clone().unbind(), strict=True)
            metrics |= zip(
                (f"harmony/weight_{group}" for group in self.groups), weights.unbind(), strict=True
            )
        elif self.mode == "fixed":
            metrics |= zip(
                (f"harmony/weight_{group}" for group in self.groups), plan.fixed.clone().unbind(), strict=True
            )
        return metrics

    def get_extra_state(self) -> Tensor:
        """The names of the groups that have scalars, in their order: JSON as uint8, for a `state_dict`."""
        return torch.tensor(list(self._names.encode()), dtype=torch.uint8, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        """Raises RuntimeError if a state's groups are not these: its scalars would be given to other losses."""
        theirs = bytes(state.tolist()).decode()
        if theirs != self._names:
            raise RuntimeError(f"Harmonizer: the state is of the groups {theirs}, expected {self._names}")

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *others: Any) -> None:
        """As any module does, but the names come first, and states from before there were names are taken."""
        names, missing = f"{prefix}_extra_state", others[2]
        if names in state_dict:
            self.set_extra_state(state_dict[names])
        super()._load_from_state_dict(state_dict, prefix, *others)
        if names in missing:
            missing.remove(names)

    def __getstate__(self) -> dict[str, Any]:
        """The state to copy or pickle, without the constants, which its reader may want on another device."""
        return {**super().__getstate__(), "_plans": {}}

    def _plan(self, names: tuple[str, ...], device: torch.device) -> _Plan:
        """The constants for these losses, made at the first call (a graph's warm-up, not its capture)."""
        if self.mode != "off":
            for members in self.groups.values():
                _check_known(members, names, "a group's loss was not given")
        scales = {
            name: scale
            for name, scale in self.scales.items()
            if self.mode == "off" or not self._grouped(name)
        }
        _check_known(scales, names, "a loss with a scale was not given")
        numbers, weights = {}, {name: float(self.scales.get(name, 1.0)) for name in names}
        if self.mode != "off":
            for number, (group, members) in enumerate(self.groups.items()):
                for loss, weight in members.items():
                    numbers[loss] = number if self.mode == "learned" else -1
                    weights[loss] = float(weight) * (1.0 if self.mode == "learned" else self.fixed[group])
        # The names are not enough: groups and scales may have been changed since.
        key = (
            tuple(numbers.get(name, -1) for name in names),
            tuple(weights[name] for name in names),
            tuple(self.fixed.values()) if self.mode == "fixed" else (),
            device,
        )
        plan = self._plans.get(key)
        if plan is None:
            plan = self._make_plan(*key)
            if type(plan.row) is Tensor:  # a tensor made while PyTorch traces has no memory
                self._plans[key] = plan
        return plan

    def _make_plan(
        self,
        group: tuple[int, ...],
        weight: tuple[float, ...],
        fixed: tuple[float, ...],
        device: torch.device,
    ) -> _Plan:
        row = torch.tensor(group, device=device)
        factors, constants = (
            torch.tensor(values, dtype=torch.float32, device=device) for values in (weight, fixed)
        )
        return _Plan(group, weight, row, factors, constants)

    def _grouped(self, loss: str) -> bool:
        return any(loss in members for members in self.groups.values())

    def extra_repr(self) -> str:
        return f"mode={self.mode}, groups={self.groups}, scales={self.scales}"


def _check_known(names: Iterable[str], known: Collection[str], problem: str) -> None:
    """Raise ValueError for the first name that is not known, with the nearest that is."""
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(
                f"Harmonizer: {problem}: {name!r}; {hint}there are {', '.join(map(repr, known))}"
            )
