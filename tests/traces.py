"""Trace files: one update of an agent, with all of its inputs and outputs.

A trace is an .npz of `param:agent/<name>` (the parameters, by the authors' names), `in:<key>` (the batch,
(B, T, ...)), `out:<quantity>` and `grad:agent/<name>`. Two were written by the authors' own program
(thuml/HarmonyDream, dreamerv3-jax, under JAX on a CPU): `AUTHORS`, with discrete actions and an image, and
`AUTHORS_CONTINUOUS`, with continuous actions, an image and a vector. `make_trace` writes such files for other
sizes and kinds, with the float64 reference.

Axes: B batch, T time.
"""

import math
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tests import reference

Arrays = dict[str, np.ndarray]

AUTHORS = Path(__file__).parent / "data" / "authors_trace.npz"
AUTHORS_CONTINUOUS = Path(__file__).parent / "data" / "authors_trace_continuous.npz"

NEEDED = {
    "param:agent/": (
        "wm/rssm/initial",
        "wm/rssm/img_in/kernel",
        "wm/rew/h0/kernel",
        "wm/rew/dist_out/out/bias",
    ),
    "in:": ("action", "reward", "is_first", "is_terminal"),
    "out:": ("post_stoch", "post_logit"),
}


class TraceError(Exception):
    """The file is not a trace; the message is one line that says why."""


@dataclass
class Trace:
    """The four sections of a trace without their prefixes; all floats are float32."""

    parameters: dict[str, Tensor]
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    gradients: dict[str, Tensor]

    @property
    def continuous(self) -> bool:
        return "task_behavior/ac/actor/dist_out/std/kernel" in self.parameters

    @property
    def observations(self) -> dict[str, Tensor]:
        """The inputs that the trace's model observes: uint8 images, and vectors for which it has a decoder."""
        images = {k: v for k, v in self.inputs.items() if v.dtype == torch.uint8 and v.ndim == 5}
        vectors = {
            k: v for k, v in self.inputs.items() if f"wm/dec/mlp/dist_{k}/out/kernel" in self.parameters
        }
        return images | vectors


def load(path: Path) -> Trace:
    """Reads a trace.

    Raises:
        TraceError: the file cannot be read, or lacks what every trace has.
    """
    if not path.exists():
        raise TraceError(f"{path}: no such file")
    sections: dict[str, dict[str, Tensor]] = {"param:agent/": {}, "in:": {}, "out:": {}, "grad:agent/": {}}
    try:
        if not zipfile.is_zipfile(path):
            raise TraceError(f"{path}: not a trace: it is no .npz archive")
        with np.load(path) as archive:
            for key in archive.files:
                for prefix, section in sections.items():
                    if key.startswith(prefix):
                        section[key.removeprefix(prefix)] = _tensor(archive[key])
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise TraceError(f"{path}: not a trace: {str(error).splitlines()[0]}") from None
    missing = [p + name for p, names in NEEDED.items() for name in names if name not in sections[p]]
    for key in ("traj", "traj2"):
        rollout = {f"{key}_{part}" for part in ("deter", "stoch", "action")}
        if rollout & sections["out:"].keys():
            missing += sorted(f"out:{name}" for name in rollout - sections["out:"].keys())
    if missing:
        raise TraceError(f"{path}: not a trace: it lacks {', '.join(missing)}")
    trace = Trace(*sections.values())
    lead = trace.inputs["is_first"].shape
    for name, array in {**trace.inputs, "post_stoch": trace.outputs["post_stoch"]}.items():
        if len(lead) != 2 or array.shape[:2] != lead:
            raise TraceError(
                f"{path}: not a trace: {name} has shape {tuple(array.shape)}, expected (B, T, ...)"
            )
    return trace


def _tensor(array: np.ndarray) -> Tensor:
    tensor = torch.from_numpy(np.array(array))
    return tensor.float() if tensor.is_floating_point() else tensor


@dataclass(frozen=True)
class Sizes:
    """What determines a trace's shapes; `state` is the width of the vector observation, 0 for none."""

    image: tuple[int, int, int] = (16, 16, 3)
    state: int = 0
    continuous: bool = False
    actions: int = 3
    batch: int = 2
    length: int = 5
    horizon: int = 3
    deter: int = 16
    units: int = 12
    stoch: int = 3
    classes: int = 5
    depth: int = 4
    head_units: int = 10
    head_layers: int = 2
    mlp_units: int = 9
    mlp_layers: int = 2
    bins: int = 41


def make_parameters(sizes: Sizes, rng: np.random.Generator) -> Arrays:
    """Random float32 parameters without special values: nothing is zero, one, or symmetric."""
    out: Arrays = {}

    def draw(name: str, *shape: int, scale: float, mean: float = 0.0) -> None:
        out[name] = (mean + scale * rng.standard_normal(shape)).astype(np.float32)

    def norm(name: str, width: int) -> None:
        draw(f"{name}/norm/scale", width, scale=0.2, mean=1.0)
        draw(f"{name}/norm/bias", width, scale=0.2)

    def linear(name: str, inputs: int, outputs: int, normed: bool = True, scale: float = 1.0) -> None:
        draw(f"{name}/kernel", inputs, outputs, scale=scale / math.sqrt(inputs))
        if normed:
            norm(name, outputs)
        else:
            draw(f"{name}/bias", outputs, scale=0.2)

    def mlp(name: str, inputs: int, units: int, layers: int, **outputs: int) -> None:
        for i in range(layers):
            linear(f"{name}/h{i}", units if i else inputs, units)
        for output, width in outputs.items():
            linear(f"{name}/{output.replace('__', '/')}", units, width, normed=False, scale=1.5)

    s = sizes
    latent = s.stoch * s.classes
    feature, embed = s.deter + latent, 0
    side, _, channels = s.image
    stages = int(math.log2(side / 4))
    widths = [s.depth * 2**i for i in range(stages)]
    for i, (inputs, outputs) in enumerate(zip([channels, *widths], widths, strict=False)):
        draw(f"wm/enc/cnn/s{i}res/kernel", 4, 4, inputs, outputs, scale=0.25 / math.sqrt(inputs))
        norm(f"wm/enc/cnn/s{i}res", outputs)
    linear("wm/dec/cnn/in", feature, 16 * widths[-1], normed=False)
    for i, (inputs, outputs) in enumerate(zip(widths[::-1], [*widths[-2::-1], channels], strict=True)):
        draw(f"wm/dec/cnn/s{i}res/kernel", 4, 4, outputs, inputs, scale=0.5 / math.sqrt(inputs))
        if i < stages - 1:
            norm(f"wm/dec/cnn/s{i}res", outputs)
        else:
            draw(f"wm/dec/cnn/s{i}res/bias", outputs, scale=0.2)
    embed += 16 * widths[-1]
    if s.state:
        mlp("wm/enc/mlp", s.state, s.mlp_units, s.mlp_layers)
        mlp("wm/dec/mlp", feature, s.mlp_units, s.mlp_layers, dist_state__out=s.state)
        embed += s.mlp_units
    draw("wm/rssm/initial", s.deter, scale=0.5)
    linear("wm/rssm/img_in", latent + s.actions, s.units)
    linear("wm/rssm/gru", s.deter + s.units, 3 * s.deter)
    linear("wm/rssm/img_out", s.deter, s.units)
    linear("wm/rssm/img_stats", s.units, latent, normed=False, scale=2.0)
    linear("wm/rssm/obs_out", s.deter + embed, s.units)
    linear("wm/rssm/obs_stats", s.units, latent, normed=False, scale=2.0)
    mlp("wm/rew", feature, s.head_units, s.head_layers, dist_out__out=s.bins)
    mlp("wm/cont", feature, s.head_units, s.head_layers, dist_out__out=1)
    for i in (1, 2, 3):
        draw(f"wm/har_s{i}/harmony_s", scale=0.7)
    std = {"dist_out__std": s.actions} if s.continuous else {}
    mlp("task_behavior/ac/actor", feature, s.head_units, s.head_layers, dist_out__out=s.actions, **std)
    for name in ("net", "slow"):
        mlp(f"task_behavior/critic/{name}", feature, s.head_units, s.head_layers, dist_out__out=s.bins)
    out["task_behavior/critic/updates/value"] = np.array(2, np.int32)
    out["task_behavior/ac/retnorm_extr/low/value"] = np.array(-1.5, np.float32)
    out["task_behavior/ac/retnorm_extr/high/value"] = np.array(2.25, np.float32)
    return out


def make_batch(sizes: Sizes, rng: np.random.Generator) -> Arrays:
    """A random batch (B, T, ...): episodes begin and end inside windows, continuous actions exceed [-1, 1]."""
    lead = (sizes.batch, sizes.length)
    is_first = rng.random(lead) < 0.25
    is_first[:, 0] = True
    is_terminal = rng.random(lead) < 0.25
    action = rng.standard_normal((*lead, sizes.actions))
    if not sizes.continuous:
        action = np.eye(sizes.actions)[action.argmax(-1)]
    batch = {
        "image": rng.integers(256, size=(*lead, *sizes.image), dtype=np.uint8),
        "reward": (4 * rng.standard_normal(lead)).astype(np.float32),
        "is_first": is_first,
        "is_last": is_terminal,
        "is_terminal": is_terminal,
        "action": action.astype(np.float32),
    }
    if sizes.state:
        batch["state"] = (3 * rng.standard_normal((*lead, sizes.state))).astype(np.float32)
    return batch


def make_trace(path: Path, sizes: Sizes, seed: int = 0) -> Path:
    """Writes a trace of random parameters, batch and draws."""
    rng = np.random.default_rng(seed)
    parameters, batch = make_parameters(sizes, rng), make_batch(sizes, rng)
    outputs, gradients = reference.run(
        parameters, batch, groups=sizes.stoch, horizon=sizes.horizon, draws=rng
    )
    entries = {f"param:agent/{k}": v for k, v in parameters.items()} | {
        f"in:{k}": v for k, v in batch.items()
    }
    entries |= {f"out:{k}": v.astype(np.float32) for k, v in outputs.items()}
    entries |= {f"grad:agent/{k}": v.astype(np.float32) for k, v in gradients.items()}
    np.savez(path, **entries)
    return path
