"""The world model: encoder, RSSM, decoder, reward and continuation heads, and the harmony of their losses.

Axes: T time, B batch, D deter, S groups, K classes. Losses are per (t, b) and then averaged (ALGORITHM §1-§3).

Several images are stacked as channels into one encoder and one decoder, must have one size, and their losses add up
to the observation loss that the harmony scalar weighs, whatever their keys are called. Each vector key keeps weight 1
outside harmony, as in the authors' code; no key is dropped.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hdfast.agent.distributions import categorical_entropy
from hdfast.agent.harmony import build_harmonizer
from hdfast.agent.networks import ImageDecoder, ImageEncoder, Latent, LatentMLP, VectorEncoder
from hdfast.agent.rssm import RSSM, Observed
from hdfast.config import Config
from hdfast.envs.base import ArraySpec, ContinuousActions, DiscreteActions
from hdfast_kernels import image_loss, kl_balance, two_hot_loss, two_hot_mean
from hdfast_kernels.two_hot import symlog


class ModelOutput(NamedTuple):
    """What one pass of the world model yields."""

    loss: Tensor  # scalar
    observed: Observed  # time-major posterior
    losses: dict[str, Tensor]  # (T, B) each
    metrics: dict[str, Tensor]  # scalars on the device


class LossError(ValueError):
    """Losses of a subclass's own that cannot be added to the others."""


class WorldModel(nn.Module):
    """Learns to predict observations, rewards and episode ends from latents.

    Args:
        obs_specs: shape and dtype of each observation, images as (H, W, C) uint8, vectors as (n,) float.
        actions: what the environment accepts.
        config: the run's configuration.

    Raises:
        ValueError: images of different sizes or of a side that is not 8, 16, 32, ...; nothing to observe; an
            observation that is neither an image nor a vector.

    A subclass may name other classes of modules, made with the same arguments as ImageEncoder, ImageDecoder,
    VectorEncoder and RSSM. An encoder of images is made with (height, width), channels and depth, has the width of what
    it returns as `outputs`, and gets (N, H, W, C) uint8, cameras side by side as channels, and the dtype of the matrix
    work, which may be another in acting than in learning.
    """

    image_encoder_type: type[nn.Module] = ImageEncoder
    image_decoder_type: type[nn.Module] = ImageDecoder
    vector_encoder_type: type[nn.Module] = VectorEncoder
    rssm_type: type[RSSM] = RSSM

    def __init__(
        self,
        obs_specs: Mapping[str, ArraySpec],
        actions: DiscreteActions | ContinuousActions,
        config: Config,
    ):
        super().__init__()
        self.images = {k: v.shape for k, v in obs_specs.items() if v.is_image}
        self.vectors = {k: math.prod(v.shape) for k, v in obs_specs.items() if len(v.shape) <= 1}
        self.scalars = {k for k, v in obs_specs.items() if not v.shape}
        unknown = [k for k in obs_specs if k not in self.images and k not in self.vectors]
        if unknown or not obs_specs:
            raise ValueError(f"observations must be images (H, W, C) or vectors (n,): got {dict(obs_specs)}")
        resolutions = {(height, width) for height, width, _ in self.images.values()}
        if len(resolutions) > 1:
            raise ValueError(f"images must have one size, got {self.images}")
        rssm, net = config.rssm, config.network
        self.discrete = isinstance(actions, DiscreteActions)
        self.free_nats, self.cont_gradient = config.loss.free_nats, config.loss.cont_gradient
        deter, stoch = rssm.deter, rssm.stoch * rssm.classes
        self.encoder, self.decoder = nn.ModuleDict(), nn.ModuleDict()
        embed = 0
        if self.images:
            resolution = resolutions.pop()
            channels = sum(shape[2] for shape in self.images.values())
            self.encoder["image"] = images = self.image_encoder_type(resolution, channels, net.depth)
            self.decoder["image"] = self.image_decoder_type(deter, stoch, resolution, channels, net.depth)
            embed += cast(int, images.outputs)
        if self.vectors:
            width = sum(self.vectors.values())
            self.encoder["vector"] = vectors = self.vector_encoder_type(width, net.mlp_units, net.mlp_layers)
            self.decoder["vector"] = LatentMLP(deter, stoch, net.mlp_units, net.mlp_layers, self.vectors)
            embed += cast(int, vectors.outputs)
        self.embed = embed
        self.rssm = self.rssm_type(
            deter=deter,
            units=rssm.units,
            stoch=rssm.stoch,
            classes=rssm.classes,
            unimix=rssm.unimix,
            action=actions.count if isinstance(actions, DiscreteActions) else actions.size,
            discrete=self.discrete,
            embed=embed,
        )
        self.reward = LatentMLP(deter, stoch, net.units, net.layers, {"logits": net.bins}, scale=0.0)
        self.cont = LatentMLP(deter, stoch, net.units, net.layers, {"logit": 1})
        self.harmonizer = build_harmonizer(config, images=bool(self.images), vectors=tuple(self.vectors))

    def encode(self, obs: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """Embeds observations with any leading axes: (..., H, W, C) uint8 and (..., n) -> (..., E)."""
        parts = []
        if self.images:
            x = _cat([obs[k] for k in self.images])
            lead = x.shape[:-3]
            parts.append(self.encoder["image"](x.flatten(0, -4), dtype).unflatten(0, lead))
        if self.vectors:
            x = symlog(self._vector(obs))
            parts.append(self.encoder["vector"](x, dtype))
        if (embed := _cat(parts)).shape[-1] != self.embed:
            raise ValueError(
                f"the encoder gives {embed.shape[-1]} numbers a row, its `outputs` say {self.embed}"
            )
        return embed

    def decode(self, latent: Latent, dtype: torch.dtype) -> dict[str, Tensor]:
        """Predicts every observation from (N, ...) latents: images (N, H, W, C), vectors (N, n) in symlog space."""
        out: dict[str, Tensor] = {}
        if self.images:
            image = self.decoder["image"](latent, dtype)
            channels = [shape[2] for shape in self.images.values()]
            # A single image is not split: the gradient of a split is a copy.
            images = [image] if len(channels) == 1 else image.split(channels, -1)
            out.update(zip(self.images, images, strict=True))
        if self.vectors:
            out.update(self.decoder["vector"](latent, dtype))
        return out

    def reward_logits(self, latent: Latent, dtype: torch.dtype) -> Tensor:
        """(..., bins) two-hot logits of the reward received on arriving in `latent`."""
        return self.reward(latent, dtype)["logits"]

    def expected_reward(self, latent: Latent, dtype: torch.dtype) -> Tensor:
        """(...) float32 mean of the reward received on arriving in `latent`."""
        return two_hot_mean(self.reward_logits(latent, dtype))

    def cont_logit(self, latent: Latent, dtype: torch.dtype) -> Tensor:
        """(...) float32 logit of the episode going on after `latent`."""
        return self.cont(latent, dtype)["logit"].squeeze(-1).float()

    def observe(self, batch: Mapping[str, Tensor], uniform: Tensor, dtype: torch.dtype) -> Observed:
        """The posterior over a time-major batch; `uniform` (T, B, S) draws its latents."""
        embed = self.encode(batch, dtype)
        return self.rssm.observe(embed, batch["action"], batch["is_first"], uniform, dtype)

    def loss(self, batch: Mapping[str, Tensor], uniform: Tensor, dtype: torch.dtype) -> ModelOutput:
        """All losses of a time-major batch and their harmony.

        Args:
            batch: observations, `action`, `reward` (T, B) float, `is_first`, `is_terminal` (T, B) bool.
            uniform: (T, B, S) numbers in [0, 1) that draw the posterior latents.
            dtype: type of the matrix work.

        Raises: LossError for what `more_losses` must not return.
        """
        lead = batch["reward"].shape
        observed = self.observe(batch, uniform, dtype)
        latent = observed.latent.flatten(0, 1)  # (T, B, ...) -> (T*B, ...)
        latent = latent.expand_once(self.rssm.classes, dtype)
        losses: dict[str, Tensor] = {}
        logits = self.reward_logits(latent, dtype)
        losses["reward"] = two_hot_loss(logits, batch["reward"].flatten(0, 1)).unflatten(0, lead)
        decoded = self.decode(latent, dtype)
        if self.images:
            per_key = [image_loss(decoded[k], batch[k].flatten(0, 1)) for k in self.images]
            losses["image"] = sum(per_key[1:], per_key[0]).unflatten(0, lead)
        losses["dyn"], losses["rep"], kl = kl_balance(observed.post_logp, observed.prior_logp, self.free_nats)
        cont = 1 - batch["is_terminal"].flatten(0, 1).to(torch.float32)
        logit = self.cont_logit(latent if self.cont_gradient else latent.detach(), dtype)
        cont_loss = F.binary_cross_entropy_with_logits(logit, cont, reduction="none")
        losses["cont"] = cont_loss.unflatten(0, lead)
        for key, width in self.vectors.items():
            target = symlog(batch[key].to(torch.float32).reshape(-1, width))
            error = (decoded[key].float() - target).square()
            losses[key] = torch.where(error < 1e-8, 0.0, error).sum(-1).unflatten(0, lead)
        losses |= _checked(self.more_losses(latent, batch, dtype), losses, lead)
        loss, metrics = self.harmonizer(losses)
        with torch.no_grad():
            metrics["kl"] = kl.mean()
            metrics["kl_free"] = (losses["dyn"] <= self.free_nats).float().mean()  # clipped ones are equal
            metrics["post_entropy"] = categorical_entropy(observed.post_logp).sum(-1).mean()
            metrics["prior_entropy"] = categorical_entropy(observed.prior_logp).sum(-1).mean()
        return ModelOutput(loss, observed, losses, metrics)

    def more_losses(
        self, latent: Latent, batch: Mapping[str, Tensor], dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """Losses of a subclass by name, (T, B) each, which are added with a scale of 1 and logged; none by default.

        A subclass that wants other scales, or a harmony scalar for them, makes another `harmonizer`.

        Their names must not be those of the other losses.

        Args:
            latent: posterior (T*B, ...) states, time-major; gradients reach them. batch, dtype: see `loss`.
        """
        return {}

    def _vector(self, obs: Mapping[str, Tensor]) -> Tensor:
        """(..., n) float32: all vector observations, concatenated; a scalar counts as a vector of one."""
        parts = [obs[k].to(torch.float32) for k in self.vectors]
        parts = [x[..., None] if k in self.scalars else x for k, x in zip(self.vectors, parts, strict=True)]
        return _cat(parts)


def _checked(more: Mapping[str, Tensor], taken: Mapping[str, Tensor], shape: torch.Size) -> dict[str, Tensor]:
    """What `more_losses` returned.

    Raises: LossError unless it is losses (T, B) whose names are not among the `taken`.
    """
    if not isinstance(more, Mapping):
        raise LossError(f"more_losses returned a {type(more).__name__}, expected a mapping of losses by name")
    for name, loss in more.items():
        if name in taken:
            raise LossError(f"more_losses: {name!r} is the name of another loss; expected one of its own")
        if not isinstance(loss, Tensor) or loss.shape != shape or not loss.is_floating_point():
            got = f"{loss.dtype} {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise LossError(
                f"more_losses: {name!r} is {got}, expected floats of shape (T, B) = {tuple(shape)}"
            )
    return dict(more)


def _cat(parts: list[Tensor]) -> Tensor:
    """Side by side along the last axis; a single one is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)
