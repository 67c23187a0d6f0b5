"""The scale of returns: running percentiles that keep advantages comparable across tasks (ALGORITHM §4)."""

import torch
from torch import Tensor, nn


def percentiles(values: Tensor, shares: tuple[float, ...]) -> Tensor:
    """The quantiles of (N,) values at these shares, interpolated linearly, as NumPy does by default.

    torch.quantile does the same in more launches, and in PyTorch 2.11 with a synchronisation.
    """
    ordered, last = values.sort().values, len(values) - 1
    ranks = [share * last for share in shares]
    below = [ordered[int(rank)] for rank in ranks]
    above = [ordered[min(int(rank) + 1, last)] for rank in ranks]
    return torch.stack([a.lerp(b, rank % 1) for a, b, rank in zip(below, above, ranks, strict=True)])


class ReturnRange(nn.Module):
    """Exponential moving average of two percentiles of imagined returns, started at zero, not debiased.

    Args:
        decay: weight of the old value at each update.
        low, high: the percentiles, as shares in [0, 1].
        floor: the least `scale`.
    """

    bounds: Tensor

    def __init__(self, decay: float = 0.99, low: float = 0.05, high: float = 0.95, floor: float = 1.0):
        super().__init__()
        self.decay, self.shares, self.floor = decay, (low, high), floor
        self.register_buffer("bounds", torch.zeros(2))

    def updated(self, returns: Tensor) -> Tensor:
        """The bounds after one more batch of `returns` (any shape), without storing them: (2,) float32."""
        now = percentiles(returns.detach().flatten().float(), self.shares)
        return self.decay * self.bounds + (1 - self.decay) * now

    def scale(self, bounds: Tensor) -> Tensor:
        """max(floor, high - low): what advantages are divided by."""
        return (bounds[1] - bounds[0]).clamp(min=self.floor)
