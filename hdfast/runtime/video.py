"""Animated GIFs, and the grid in which an open-loop prediction is shown.

Axes: T frames, B examples, H, W pixels, C channels (1 or 3).
"""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from hdfast.runtime.errors import disk_errors
from hdfast.runtime.files import replacing

_GAP = 1  # pixels around each image of a grid
_FRAME = (32, 32, 32)
_SEEN = (0, 160, 0)  # the model has seen these frames
_IMAGINED = (200, 0, 0)  # the model predicts these from actions alone


def encode_gif(frames: np.ndarray, *, frames_per_second: float = 15.0, min_side: int = 256) -> bytes:
    """frames (T, H, W, C) uint8 as an endless GIF, each pixel repeated until H and W are at least min_side.

    The format counts hundredths of a second, so the rate is rounded to 100 / n frames a second, n >= 2.

    Raises: ValueError on another shape, dtype or no frames.
    """
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] not in (1, 3) or 0 in frames.shape:
        raise ValueError(
            f"a GIF is made of (T, H, W, 1 or 3) uint8 frames, got {frames.shape} {frames.dtype}"
        )
    scale = max(1, -(-min_side // min(frames.shape[1:3])))
    # Reducing to 256 colours is what costs: an octree before enlarging takes 1 ms a frame, the default 40 ms.
    small = [Image.fromarray(frame).quantize(method=Image.Quantize.FASTOCTREE) for frame in _colour(frames)]
    size = (frames.shape[2] * scale, frames.shape[1] * scale)
    images = [image.resize(size, Image.Resampling.NEAREST) for image in small]
    delay_ms = 10 * max(2, round(100 / frames_per_second))
    buffer = io.BytesIO()
    images[0].save(buffer, "GIF", save_all=True, append_images=images[1:], duration=delay_ms, loop=0)
    return buffer.getvalue()


def save_gif(path: Path, gif: bytes) -> None:
    """Write `encode_gif`'s bytes atomically. Raises: DiskFullError, RunError."""
    with disk_errors(path, "write the video"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            file.write(gif)


def open_loop_grid(truth: np.ndarray, model: np.ndarray, *, context: int) -> np.ndarray:
    """One column per example, truth over model over error: (T, 3 * (H + 2), B * (W + 2), 3) uint8.

    truth: (T, B, H, W, C) uint8. model: the same shape, uint8, or float with 1.0 for 255.
    context: how many frames the model has seen; its images have a green border for those, red for imagined ones.
    The error is (model - truth + 1) / 2 on the scale of 0 to 1, as in DreamerV3's videos: grey is right.
    """
    if truth.shape != model.shape or truth.ndim != 5:
        raise ValueError(f"truth and model are both (T, B, H, W, C), got {truth.shape} and {model.shape}")
    target = truth.astype(np.float32) / 255
    guess = model.astype(np.float32) / 255 if model.dtype == np.uint8 else model.astype(np.float32)
    rows = np.stack([target, guess, (guess - target + 1) / 2], axis=1)  # (T, 3, B, H, W, C)
    cells = _colour((np.clip(rows, 0, 1) * 255 + 0.5).astype(np.uint8))
    length, kinds, examples, height, width, _ = cells.shape
    grid = np.empty((length, kinds, examples, height + 2 * _GAP, width + 2 * _GAP, 3), np.uint8)
    grid[:] = _FRAME
    grid[:context, 1], grid[context:, 1] = _SEEN, _IMAGINED
    grid[..., _GAP:-_GAP, _GAP:-_GAP, :] = cells
    grid = grid.transpose(0, 1, 3, 2, 4, 5)  # (T, 3, H + 2, B, W + 2, 3)
    return grid.reshape(length, kinds * grid.shape[2], examples * grid.shape[4], 3)


def _colour(image: np.ndarray) -> np.ndarray:
    return np.broadcast_to(image, (*image.shape[:-1], 3))
