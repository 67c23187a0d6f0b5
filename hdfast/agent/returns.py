"""The scale of returns: running percentiles that keep advantages comparable across tasks (ALGORITHM §4)."""

import torch
from torch import Tensor, nn


class ReturnRange(nn.Module):
    """Exponential moving average of the 5% and 95% percentiles of imagined returns, started at zero, not debiased.

    Args:
        decay: weight of the old value at each update.
    """

    def __init__(self, decay: float = 0.99, low: float = 0.05, high: float = 0.95):
        super().__init__()
        self.decay = decay
        self.register_buffer("bounds", torch.zeros(2))
        self.register_buffer("quantiles", torch.tensor([low, high]), persistent=False)

    def updated(self, returns: Tensor) -> Tensor:
        """The bounds after one more batch of `returns` (any shape), without storing them: (2,) float32."""
        now = torch.quantile(returns.detach().flatten().float(), self.quantiles)
        return self.decay * self.bounds + (1 - self.decay) * now

    @staticmethod
    def scale(bounds: Tensor) -> Tensor:
        """max(1, high - low): what advantages are divided by."""
        return (bounds[1] - bounds[0]).clamp(min=1.0)
