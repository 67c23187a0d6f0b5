"""Pure functions on distributions: unimix categoricals, the squashed Normal of continuous actors.

Axes: K classes, A action width.
"""

import math

import torch
from torch import Tensor


def unimix_log_probs(logits: Tensor, unimix: float) -> Tensor:
    """Log-probabilities of (1 - unimix) · softmax(logits) + unimix / K, float32.

    Args:
        logits: (..., K).
        unimix: share of the uniform distribution; 0 is a plain log-softmax.
    """
    logits = logits.float()
    if unimix == 0:
        return logits.log_softmax(-1)
    return torch.log((1 - unimix) * logits.softmax(-1) + unimix / logits.shape[-1])


def categorical_entropy(logp: Tensor) -> Tensor:
    """Entropy in nats of (..., K) log-probabilities."""
    return -(logp.exp() * logp).sum(-1)


def normal_parameters(mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    """Mean in (-1, 1) and standard deviation in (0.1, 1) from raw network outputs (..., A), float32."""
    return mean.float().tanh(), 0.9 * (std.float() + 2).sigmoid() + 0.1


def normal_entropy(std: Tensor) -> Tensor:
    """Entropy in nats, summed over the action axis A."""
    return (0.5 * math.log(2 * math.pi * math.e) + std.log()).sum(-1)


def normal_log_prob(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Log-density of x (..., A) in nats, summed over the action axis A."""
    return (-0.5 * ((x - mean) / std).square() - std.log() - 0.5 * math.log(2 * math.pi)).sum(-1)


def clip_action(action: Tensor) -> Tensor:
    """a / max(1, |a|) elementwise, with the gradient stopped through the scale (ALGORITHM: action clip 1)."""
    return action / action.detach().abs().clamp(min=1.0)
