"""The recurrent state-space model: what the agent believes, and how an action changes it (ALGORITHM §2).

Axes: T time, B batch, D deter, S groups, K classes, U units, A action width, E embedding width.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hdfast.agent.distributions import clip_action, unimix_log_probs
from hdfast.agent.networks import EPS, Latent, Linear, Norm, init_normal_
from hdfast.agent.rounding import in_type
from hdfast_kernels import (
    expand_onehot,
    layer_norm_gru,
    linear,
    onehot_linear,
    rssm_observe,
    sample_index,
    sample_onehot,
)


class Observed(NamedTuple):
    """What the posterior scan yields, time-major: latent (T, B, ...), log-probabilities (T, B, S, K) float32."""

    latent: Latent
    post_logp: Tensor
    prior_logp: Tensor


class CastWeights(NamedTuple):
    """The recurrent weights in the type of the matrix work, cast once per update rather than once per step."""

    in_stoch: Tensor  # (S*K, U)
    in_action: Tensor  # (A, U)
    gru: Tensor  # (3D, D+U)
    prior_hidden: Tensor  # (U, D)
    prior_weight: Tensor  # (S*K, U)
    prior_bias: Tensor  # (S*K,)


class Rollout:
    """M states in memory of their own, into which `RSSM.imagine_into` writes one after the other; without gradients.

    Nothing is copied then: neither states to stack them, nor deter to put it beside the GRU's other input.

    Args:
        start: the first state, (N, ...). steps: how many follow; M is one more.
        units: U. classes: K. dtype: of the matrix work.

    Attributes:
        states: all of them, (M, N, ...). each: one by one, M times (N, ...).
        joined: for each state the GRU's input (N, D + U): deter, rounded, then the other input. Empty in deter's dtype.
    """

    def __init__(self, start: Latent, steps: int, units: int, classes: int, dtype: torch.dtype):
        def room(first: Tensor) -> Tensor:
            whole = first.new_empty((steps + 1, *first.shape))
            whole[0] = first
            return whole

        dense, width = expand_onehot(start.index, classes, dtype), start.deter.shape[-1]
        joined = rounded = None
        if dtype != start.deter.dtype:
            joined = start.deter.new_empty((steps + 1, *start.deter.shape[:-1], width + units), dtype=dtype)
            rounded = joined[..., :width]
            rounded[0] = start.deter
        dense = None if dense is None else room(dense)
        self.states = Latent(deter=room(start.deter), index=room(start.index), rounded=rounded, dense=dense)
        parts = [[None] * (steps + 1) if part is None else part.unbind() for part in self.states]
        self.each = [Latent._make(part) for part in zip(*parts, strict=True)]
        self.joined = () if joined is None else joined.unbind()


class RSSM(nn.Module):
    """Categorical RSSM with one LayerNorm over the three GRU gates and a learned initial state.

    Args:
        deter, units, stoch, classes: D, U, S, K.
        unimix: uniform share of every categorical.
        action: width A of the action, one-hot or continuous.
        discrete: actions arrive as class indices (…) rather than vectors (…, A).
        embed: width E of the embedding.
    """

    def __init__(
        self,
        *,
        deter: int,
        units: int,
        stoch: int,
        classes: int,
        unimix: float,
        action: int,
        discrete: bool,
        embed: int,
    ):
        super().__init__()
        self.stoch, self.classes, self.unimix, self.discrete = stoch, classes, unimix, discrete
        latent = stoch * classes
        self.initial_deter = nn.Parameter(torch.zeros(deter))
        self.in_stoch = nn.Parameter(init_normal_(torch.empty(latent, units), latent + action, units))
        self.in_action = nn.Parameter(init_normal_(torch.empty(action, units), latent + action, units))
        self.in_norm = Norm(units)
        self.gru = nn.Parameter(
            init_normal_(torch.empty(3 * deter, deter + units), deter + units, 3 * deter)
        )  # input order: [deter, x]
        self.gru_norm = Norm(3 * deter)
        self.prior_hidden = nn.Parameter(init_normal_(torch.empty(units, deter), deter, units))
        self.prior_norm = Norm(units)
        self.prior_out = Linear(units, latent)
        self.post_deter = nn.Parameter(init_normal_(torch.empty(units, deter), deter + embed, units))
        self.post_embed = nn.Parameter(init_normal_(torch.empty(units, embed), deter + embed, units))
        self.post_norm = Norm(units)
        self.post_out = Linear(units, latent)

    def cast(self, dtype: torch.dtype) -> CastWeights:
        """The weights of the imagination step in `dtype`."""
        return CastWeights(
            in_type(self.in_stoch, dtype),
            in_type(self.in_action, dtype),
            in_type(self.gru, dtype),
            in_type(self.prior_hidden, dtype),
            in_type(self.prior_out.weight, dtype),
            in_type(self.prior_out.bias, dtype),
        )

    def initial(self, weights: CastWeights) -> Latent:
        """The state before anything is seen: deter (D,), index (S,), the mode of the prior at that deter."""
        deter = self.initial_deter.tanh()
        with torch.no_grad():
            index = self._prior_logits(deter, weights).argmax(-1)
        return Latent(deter, index)

    def observe(
        self, embed: Tensor, action: Tensor, is_first: Tensor, uniform: Tensor, dtype: torch.dtype
    ) -> Observed:
        """Posterior over a batch of windows; all that does not depend on the recurrent state stays outside the scan.

        Args:
            embed: (T, B, E).
            action: (T, B) int or (T, B, A) float, the action chosen at each row; the scan uses it one row later.
            is_first: (T, B) bool; must be true at t = 0, where the window starts from the learned initial state.
            uniform: (T, B, S) numbers in [0, 1) that draw the posterior latents.
        """
        weights = self.cast(dtype)
        initial = self.initial(weights)
        previous = torch.cat([torch.zeros_like(action[:1]), action[:-1]])
        action = self.project_action(previous, weights) * (~is_first)[..., None].to(dtype)
        deter, stoch, index, post_logp = rssm_observe(
            linear(embed.to(dtype), in_type(self.post_embed, dtype)),
            action,
            is_first,
            uniform,
            initial.deter,
            initial.index,
            in_stoch=weights.in_stoch,
            in_norm_weight=self.in_norm.weight,
            in_norm_bias=self.in_norm.bias,
            gru=weights.gru,
            gru_norm_weight=self.gru_norm.weight,
            gru_norm_bias=self.gru_norm.bias,
            post_deter=in_type(self.post_deter, dtype),
            post_norm_weight=self.post_norm.weight,
            post_norm_bias=self.post_norm.bias,
            logit_weight=in_type(self.post_out.weight, dtype),
            logit_bias=in_type(self.post_out.bias, dtype),
            unimix=self.unimix,
            eps=EPS,
        )
        prior_logp = unimix_log_probs(self._prior_logits(deter, weights), self.unimix)
        return Observed(Latent(deter, index, stoch), post_logp, prior_logp)

    def observe_step(
        self,
        latent: Latent,
        action: Tensor,
        embed: Tensor,
        is_first: Tensor,
        uniform: Tensor,
        weights: CastWeights,
    ) -> Latent:
        """One row of the same scan, for acting: the posterior after `action` led from `latent` to `embed`.

        Args:
            latent: deter (B, D), index (B, S). action: (B,) int or (B, A). embed: (B, E). is_first: (B,) bool.
            uniform: (B, S).
        """
        dtype = weights.gru.dtype
        initial = self.initial(weights)
        deter = torch.where(is_first[:, None], initial.deter, latent.deter)
        index = torch.where(is_first[:, None], initial.index, latent.index)
        action = self.project_action(action, weights) * (~is_first)[:, None].to(dtype)
        deter = self._recur(Latent(deter, index), action, weights)
        x = linear(deter.to(dtype), in_type(self.post_deter, dtype)) + linear(
            embed.to(dtype), in_type(self.post_embed, dtype)
        )
        logits = self.post_out(self.post_norm.silu(x), dtype).unflatten(-1, (self.stoch, self.classes))
        return self._draw(deter, logits, uniform)

    def imagine_step(self, latent: Latent, action: Tensor, uniform: Tensor, weights: CastWeights) -> Latent:
        """The prior after `action`: (N, ...) latents, (N,) or (N, A) actions, (N, S) uniform numbers."""
        deter = self._recur(latent, self.project_action(action, weights), weights)
        drawn = self._draw(deter, self._prior_logits(deter, weights), uniform)
        return drawn.expand_once(self.classes, weights.gru.dtype)

    def rollout(self, start: Latent, steps: int, dtype: torch.dtype) -> Rollout:
        """Memory for the states that follow `start` (N, ...) in so many steps."""
        return Rollout(start, steps, self.in_stoch.shape[1], self.classes, dtype)

    def imagine_into(
        self, rollout: Rollout, t: int, action: Tensor, uniform: Tensor, weights: CastWeights
    ) -> None:
        """`imagine_step` from state t of a rollout, written into state t + 1, without gradients.

        Args: action, uniform, weights: as of `imagine_step`.
        """
        before, after = rollout.each[t], rollout.each[t + 1]
        x = onehot_linear(
            before.index, weights.in_stoch, None, self.project_action(action, weights), before.dense
        )
        if rollout.joined:
            joined = rollout.joined[t]
            self.in_norm.silu(x, out=joined[..., before.deter.shape[-1] :])
        else:
            joined = torch.cat([before.deter, self.in_norm.silu(x)], -1)
        layer_norm_gru(
            linear(joined, weights.gru), before.deter, self.gru_norm.weight, self.gru_norm.bias, EPS,
            out=after.deter, rounded=after.rounded,
        )  # fmt: skip
        logits = self._prior_logits(after.deter_as(joined.dtype), weights)
        sample_index(logits, uniform, self.unimix, out=after.index, dense=after.dense)

    def project_action(self, action: Tensor, weights: CastWeights) -> Tensor:
        """The action's part of the input layer: a row per discrete action, or a product with the clipped vector."""
        if self.discrete:
            if weights.in_action.is_cuda:  # there a gather's gradient takes ten times as long as a product
                return onehot_linear(action.long()[..., None], weights.in_action)
            return F.embedding(action.long(), weights.in_action)
        return clip_action(action).to(weights.in_action.dtype) @ weights.in_action

    def _recur(self, latent: Latent, action: Tensor, weights: CastWeights) -> Tensor:
        """Next deter from a latent and a projected action (N, U)."""
        x = onehot_linear(latent.index, weights.in_stoch, latent.stoch, action, latent.dense)
        x = self.in_norm.silu(x)
        gates = linear(torch.cat([latent.deter_as(x.dtype), x], -1), weights.gru)
        return layer_norm_gru(gates, latent.deter, self.gru_norm.weight, self.gru_norm.bias, EPS)

    def _draw(self, deter: Tensor, logits: Tensor, uniform: Tensor) -> Latent:
        """The state of deter (..., D) that uniform numbers (..., S) draw; without gradients it has no `stoch`."""
        if not torch.is_grad_enabled():
            return Latent(deter, sample_index(logits, uniform, self.unimix))
        stoch, index, _ = sample_onehot(logits, uniform, self.unimix)
        return Latent(deter, index, stoch)

    def _prior_logits(self, deter: Tensor, weights: CastWeights) -> Tensor:
        """(..., D) -> (..., S, K)."""
        x = self.prior_norm.silu(linear(deter.to(weights.gru.dtype), weights.prior_hidden))
        logits = linear(x, weights.prior_weight, weights.prior_bias)
        return logits.unflatten(-1, (self.stoch, self.classes))
