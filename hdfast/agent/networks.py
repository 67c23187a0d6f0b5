"""Layers of the world model, the actor and the critic.

Axes: N rows, D deter, S groups, K classes, U units, C channels. Parameters are float32; `dtype` is the type
of the matrix work. No layer in front of a LayerNorm has a bias. Initialisation follows DreamerV3 (thuml/HarmonyDream,
dreamerv3-jax/dreamerv3/nets.py, class Initializer): variance 1 / mean(fan_in, fan_out), a truncated normal for
hidden layers and a uniform distribution for output layers.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hdfast.agent.rounding import in_type
from hdfast_kernels import (
    expand_onehot,
    image_deconv,
    image_input,
    layer_norm_silu,
    linear,
    onehot_linear,
    strided_conv,
)

EPS = 1e-3
_TRUNCATION_STD = 0.87962566103423978  # standard deviation of a unit normal truncated at two


class Latent(NamedTuple):
    """A state of the world model.

    deter: (..., D) float32.
    index: (..., S) int64, the classes drawn.
    stoch: (..., S, K), the classes as a straight-through one-hot sample; None where no gradient flows through the draw.
    rounded: deter in the type of the matrix work, cached for the layers that read it; None where gradients flow.
    dense: (..., S*K), the classes as a one-hot matrix in that type, cached where layers multiply by it; else None.
    """

    deter: Tensor
    index: Tensor  # type: ignore[assignment]
    stoch: Tensor | None = None
    rounded: Tensor | None = None
    dense: Tensor | None = None

    def deter_as(self, dtype: torch.dtype) -> Tensor:
        """deter in the type of the matrix work."""
        if self.rounded is not None and self.rounded.dtype == dtype:
            return self.rounded
        return self.deter.to(dtype)

    def expand_once(self, classes: int, dtype: torch.dtype) -> "Latent":
        """The same state, with its K = `classes` one-hot latents cached as a dense matrix, where that is faster."""
        if self.dense is not None:
            return self
        return self._replace(dense=expand_onehot(self.index, classes, dtype))

    def detach(self) -> "Latent":
        """The same state without gradients."""
        return Latent(self.deter.detach(), self.index, None, self.rounded, self.dense)

    def before_last(self) -> "Latent":
        """All states but the last along the first axis."""
        return Latent._make(None if part is None else part[:-1] for part in self)

    def after_first(self) -> "Latent":
        """All states but the first along the first axis."""
        return Latent._make(None if part is None else part[1:] for part in self)

    def flatten(self, start: int = 0, end: int = 1) -> "Latent":
        """Merges the leading axes `start`..`end` of every part."""
        return Latent._make(None if part is None else part.flatten(start, end) for part in self)


def init_normal_(weight: Tensor, fan_in: int, fan_out: int) -> Tensor:
    """Truncated normal of variance 1 / mean(fan_in, fan_out), in place."""
    std = math.sqrt(2.0 / (fan_in + fan_out)) / _TRUNCATION_STD
    return nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


def init_uniform_(weight: Tensor, fan_in: int, fan_out: int, scale: float = 1.0) -> Tensor:
    """Uniform of variance scale / mean(fan_in, fan_out), in place; scale 0 gives zeros."""
    limit = math.sqrt(3.0 * scale * 2.0 / (fan_in + fan_out))
    return nn.init.uniform_(weight, -limit, limit)


class Norm(nn.Module):
    """Scale and shift of a LayerNorm over the last axis, always applied in float32."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def silu(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """SiLU(LN(x)), (..., width); without gradients also into columns `out` of a matrix."""
        return layer_norm_silu(x, self.weight, self.bias, EPS, out=out)


class Linear(nn.Module):
    """Output layer: x · Wᵀ + b, uniform initialisation. (..., inputs) -> (..., outputs)."""

    def __init__(self, inputs: int, outputs: int, scale: float = 1.0):
        super().__init__()
        self.weight = nn.Parameter(init_uniform_(torch.empty(outputs, inputs), inputs, outputs, scale))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def at(self, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        """The layer with its weights cast once, for many calls."""
        weight, bias = in_type(self.weight, dtype), in_type(self.bias, dtype)
        return lambda x: linear(x.to(dtype), weight, bias)

    def forward(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return self.at(dtype)(x)


class Hidden(nn.Module):
    """Hidden layer: SiLU(LN(x · Wᵀ)). (..., inputs) -> (..., units)."""

    def __init__(self, inputs: int, units: int):
        super().__init__()
        self.weight = nn.Parameter(init_normal_(torch.empty(units, inputs), inputs, units))
        self.norm = Norm(units)

    def at(self, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        """The layer with its weight cast once, for many calls."""
        weight = in_type(self.weight, dtype)
        return lambda x: self.norm.silu(linear(x.to(dtype), weight))

    def forward(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return self.at(dtype)(x)


class LatentProjection(nn.Module):
    """[deter, stoch] · W (+ b) without building the concatenation: a GEMM on deter plus gathered rows for stoch.

    deter_weight is (outputs, D) as in torch, stoch_weight (S·K, outputs) so that a class is a contiguous row.
    """

    def __init__(self, deter: int, stoch: int, outputs: int, bias: bool = False):
        super().__init__()
        fan_in = deter + stoch
        init = init_uniform_ if bias else init_normal_
        self.deter_weight = nn.Parameter(init(torch.empty(outputs, deter), fan_in, outputs))
        self.stoch_weight = nn.Parameter(init(torch.empty(stoch, outputs), fan_in, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None

    def at(self, dtype: torch.dtype) -> Callable[[Latent], Tensor]:
        """The layer with its weights cast once, for many calls."""
        deter_weight, stoch_weight = in_type(self.deter_weight, dtype), in_type(self.stoch_weight, dtype)
        bias = None if self.bias is None else in_type(self.bias, dtype)

        def project(latent: Latent) -> Tensor:
            deter = linear(latent.deter_as(dtype), deter_weight, bias)
            return onehot_linear(latent.index, stoch_weight, latent.stoch, deter, latent.dense)

        return project

    def forward(self, latent: Latent, dtype: torch.dtype) -> Tensor:
        return self.at(dtype)(latent)


def _slot(name: str) -> str:
    """The key of a module in an nn.ModuleDict: `name`, changed if nn.ModuleDict has such an attribute."""
    return f"{name}/" if hasattr(nn.ModuleDict(), name) else name


class LatentMLP(nn.Module):
    """MLP on a latent: hidden layers of `units`, then one output layer per entry of `outputs`.

    Args:
        deter, stoch: D and S·K.
        units, layers: width and number of hidden layers.
        outputs: width of each output layer, by name.
        scale: variance scale of the output layers; 0 starts them at zero.
    """

    def __init__(
        self, deter: int, stoch: int, units: int, layers: int, outputs: dict[str, int], scale: float = 1.0
    ):
        super().__init__()
        self.first = LatentProjection(deter, stoch, units)
        self.norm = Norm(units)
        self.hidden: Any = nn.ModuleList(Hidden(units, units) for _ in range(layers - 1))
        self._names = tuple(outputs)
        self.out: Any = nn.ModuleDict(
            {_slot(name): Linear(units, width, scale) for name, width in outputs.items()}
        )

    def at(self, dtype: torch.dtype) -> Callable[[Latent], dict[str, Tensor]]:
        """The network with its weights cast once, for many calls."""
        first, hidden = self.first.at(dtype), [layer.at(dtype) for layer in self.hidden]
        out = {name: layer.at(dtype) for name, layer in zip(self._names, self.out.values(), strict=True)}

        def outputs(latent: Latent) -> dict[str, Tensor]:
            x = self.norm.silu(first(latent))
            for layer in hidden:
                x = layer(x)
            return {name: layer(x) for name, layer in out.items()}

        return outputs

    def forward(self, latent: Latent, dtype: torch.dtype) -> dict[str, Tensor]:
        return self.at(dtype)(latent)


def image_stages(resolution: tuple[int, int]) -> int:
    """Number of stride-2 stages between `resolution` (H, W) and 4 x 4 pixels.

    Raises:
        ValueError: the image is not square, or its side is not 8, 16, 32, ...
    """
    height, width = resolution
    stages = max(height // 4, 1).bit_length() - 1
    if height != width or stages < 1 or 4 << stages != height:
        raise ValueError(
            f"images of {height}x{width} pixels are not supported: the side must be 8, 16, 32, 64, 128, ..."
        )
    return stages


class ImageEncoder(nn.Module):
    """Convolutions k4 s2 from (N, H, W, C) uint8 to (N, 4·4·channels), LayerNorm over channels, SiLU.

    Source: ALGORITHM §3; several images enter as stacked channels.
    """

    def __init__(self, resolution: tuple[int, int], channels: int, depth: int):
        super().__init__()
        widths = [depth << i for i in range(image_stages(resolution))]
        self.kernels = nn.ParameterList()
        self.norms: Any = nn.ModuleList()
        for inputs, outputs in zip([channels, *widths], widths, strict=False):
            kernel = torch.empty(outputs, inputs, 4, 4)
            self.kernels.append(nn.Parameter(init_normal_(kernel, 16 * inputs, 16 * outputs)))
            self.norms.append(Norm(outputs))
        self.outputs = 16 * widths[-1]

    def forward(self, image: Tensor, dtype: torch.dtype) -> Tensor:
        x = image_input(image, dtype)
        for kernel, norm in zip(self.kernels, self.norms, strict=True):
            x = norm.silu(strided_conv(x, kernel))
        return x.flatten(1)


class ImageDecoder(nn.Module):
    """Latent to images: linear to (4, 4, channels), then deconvolutions k4 s2 up to (N, H, W, C), + 0.5.

    LayerNorm over channels and SiLU between the deconvolutions; the last has a bias instead (ALGORITHM §3).
    """

    def __init__(self, deter: int, stoch: int, resolution: tuple[int, int], channels: int, depth: int):
        super().__init__()
        stages = image_stages(resolution)
        widths = [depth << i for i in reversed(range(stages))]
        self.first = LatentProjection(deter, stoch, 16 * widths[0], bias=True)
        self.kernels = nn.ParameterList()
        self.norms: Any = nn.ModuleList()
        for i, (inputs, outputs) in enumerate(zip(widths, [*widths[1:], channels], strict=True)):
            init = init_uniform_ if i == stages - 1 else init_normal_
            kernel = torch.empty(inputs, outputs, 4, 4)
            self.kernels.append(nn.Parameter(init(kernel, 16 * inputs, 16 * outputs)))
            if i < stages - 1:
                self.norms.append(Norm(outputs))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, latent: Latent, dtype: torch.dtype) -> Tensor:
        x = self.first(latent, dtype).unflatten(-1, (4, 4, -1))
        for kernel, norm in zip(self.kernels[:-1], self.norms, strict=True):
            x = norm.silu(strided_conv(x, kernel, transposed=True))
        return image_deconv(x, self.kernels[-1], self.bias + 0.5)


class VectorEncoder(nn.Module):
    """MLP on the concatenated vectors, already in symlog space. (..., sum of widths) float32 -> (..., units)."""

    def __init__(self, inputs: int, units: int, layers: int):
        super().__init__()
        widths = [inputs] + [units] * (layers - 1)
        self.hidden = nn.ModuleList(Hidden(width, units) for width in widths)
        self.outputs = units

    def forward(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        for layer in self.hidden:
            x = layer(x, dtype)
        return x


def parameter_counts(modules: dict[str, nn.Module]) -> dict[str, int]:
    """Number of parameters of each module, by name."""
    return {name: sum(p.numel() for p in module.parameters()) for name, module in modules.items()}
