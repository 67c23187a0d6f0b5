"""What the world model thinks will happen: a few rows seen, the rest imagined from the actions alone.

Axes: T time, B batch, H, W pixels, C channels.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from hdfast.agent.learner import Learner
from hdfast.agent.networks import Latent
from hdfast.runtime.video import open_loop_grid

EXAMPLES = 6  # windows in a film
CONTEXT = 5  # rows that the model sees of each


@torch.no_grad()
def open_loop(learner: Learner, batch: Mapping[str, Tensor], *, context: int = CONTEXT) -> dict[str, Tensor]:
    """Predicts every image of a batch: reconstructs the first rows, and imagines the rest.

    The beginning of an episode that a run has stored, as a batch of one, in a block of `hdfast.trained.load`::

        learner = trained.policy.learner
        episode = next(hdfast.replay.episodes("runs/demo/Catch/seed0"))
        batch = {key: torch.from_numpy(rows[:64, None]).to(learner.device) for key, rows in episode.items()}
        images = open_loop(learner, batch)["image"][:, 0]  # (T, H, W, C); the truth is batch["image"][:, 0] / 255

    Args:
        learner: owns the world model that predicts; its generator is not touched.
        batch: time-major (T, B, ...) as `Replay.sample` gives it, on the learner's device. Its first row must be
            is_first: set it where a window begins in the middle of an episode.
        context: rows that the model sees, at least one. If there are no more it imagines none.

    Returns:
        (T, B, H, W, C) float32 in [0, 1] for every image key; empty if there is none.
    """
    model, dtype = learner.model, learner.dtype
    length, count = batch["reward"].shape
    stoch = learner.config.rssm.stoch
    generator = torch.Generator(learner.device).manual_seed(0)
    uniform = torch.rand(length, count, stoch, generator=generator, device=learner.device)
    seen = model.observe(
        {k: v[:context] for k, v in batch.items() if k != "starts"}, uniform[:context], dtype
    )
    weights = model.rssm.cast(dtype)
    deter, index = list(seen.latent.deter), list(seen.latent.index)
    for t in range(context, length):
        latent = model.rssm.imagine_step(
            Latent(deter[-1], index[-1]), batch["action"][t - 1], uniform[t], weights
        )
        deter.append(latent.deter)
        index.append(latent.index)
    decoded = model.decode(Latent(torch.cat(deter), torch.cat(index)), dtype)
    return {key: decoded[key].float().clamp(0, 1).unflatten(0, (length, count)) for key in model.images}


def films(learner: Learner, batch: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """`open_loop` beside the truth as frames, see `open_loop_grid`, for every image of one or three channels.

    batch: as `open_loop`, of more than CONTEXT rows.
    """
    return {
        key: open_loop_grid(batch[key].cpu().numpy(), model.cpu().numpy(), context=CONTEXT)
        for key, model in open_loop(learner, batch).items()
        if batch[key].shape[-1] in (1, 3)
    }
