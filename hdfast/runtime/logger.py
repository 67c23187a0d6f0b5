"""What a run logs: metrics.jsonl, scores.jsonl, tensorboard/, videos/; one history however often it resumes.

metrics.jsonl has a line per log step: agent_steps, frames, seconds, updates and every metric by its name.
scores.jsonl has a line per finished episode and evaluation: kind, score, length, agent_steps, and so on.
NaN and infinities are the strings "NaN", "Infinity", "-Infinity": every line is JSON, `float()` reads them.

In one agent step: log and score first, then `sync`, then the checkpoint. Resuming keeps the lines up to it.
"""

import contextlib
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Self

import numpy as np
import torch

from hdfast.runtime.errors import CallbackError, disk_errors, warn
from hdfast.runtime.files import plain, replacing, sync_directory, write_all
from hdfast.runtime.tensorboard import TensorBoard
from hdfast.runtime.video import encode_gif, save_gif

OnLine = Callable[[str, Mapping[str, Any]], object]
Metric = float | int | torch.Tensor
_WHEN = ("agent_steps", "frames", "seconds")  # columns of every line


class Logger:
    """The logs of one run, open for appending; a context manager.

    directory: the run's directory.
    action_repeat: frames per agent step.
    resumed_at: agent steps of the checkpoint the run goes on from; lines beyond it are cut. None: there is no
        checkpoint, the logs begin anew.
    evaluated_at: agent steps of the last evaluation that the checkpoint knows of; later ones are repeated, and their
        lines are cut. None: it knows of all up to resumed_at.
    seconds: wall time the run had taken up to that checkpoint.
    tensorboard: also write TensorBoard files. settings: of the run, for its HParams tab.
    on_line: gets each line after it is written: "metrics" or "scores", and its columns by name.

    Raises, here and in every method that writes: DiskFullError, RunError.
    """

    def __init__(
        self,
        directory: Path,
        *,
        action_repeat: int,
        resumed_at: int | None = None,
        evaluated_at: int | None = None,
        seconds: float = 0.0,
        tensorboard: bool = True,
        settings: Mapping[str, Any] = MappingProxyType({}),
        on_line: OnLine = lambda file, line: None,
    ) -> None:
        self._on_line = on_line
        self._directory, self._action_repeat = directory, action_repeat
        self._began = time.monotonic() - seconds
        self._files = {}
        self._tensorboard: TensorBoard | None = None
        with contextlib.ExitStack() as opened:
            for name in ("metrics", "scores"):
                path = directory / f"{name}.jsonl"
                with disk_errors(path, "write the log"):
                    cut(path, resumed_at, evaluated_at)
                    self._files[name] = opened.enter_context(open(path, "ab", buffering=0))
            with disk_errors(directory, "write the log"):
                sync_directory(directory)  # a log that is new must not vanish with the power
            if tensorboard:
                # The evaluation at that step is repeated, and TensorBoard hides all of a step or nothing.
                behind = resumed_at is not None and evaluated_at is not None and evaluated_at < resumed_at
                again = resumed_at if behind else None
                board = TensorBoard(
                    directory / "tensorboard",
                    resumed_at=resumed_at,
                    again=again is not None,
                    settings=settings,
                )
                opened.callback(board.close)
                if again is not None:
                    self._show_again(board, again)
                self._tensorboard = board
            self._opened = opened.pop_all()

    @property
    def seconds(self) -> float:
        """Wall time of the run so far, over all its sessions; store it in the checkpoint's meta."""
        return time.monotonic() - self._began

    def log(self, agent_steps: int, updates: int, metrics: Mapping[str, Metric]) -> dict[str, float]:
        """Write one line of metrics; all tensors (one element each) come to the host in one copy.

        Returns the metrics as Python numbers. Raises: ValueError on a metric named like a column of the line.
        """
        values = to_host(metrics)
        line = {**self._when(agent_steps), "updates": updates}
        if taken := line.keys() & values.keys():
            raise ValueError(f"metrics cannot be named {sorted(taken)}: these are columns of every line")
        self._append("metrics", {**line, **values})
        if self._tensorboard:
            self._tensorboard.scalars(agent_steps, _points({**line, **values}))
        return values

    def score(self, kind: str, *, agent_steps: int, score: float, length: float, **more: Any) -> None:
        """Write one line of scores.

        kind: "episode" or "evaluation".
        score: undiscounted return. length: agent steps. Of an evaluation, both are means.
        more: further JSON-able columns, such as an evaluation's single scores.
        """
        line = {"kind": kind, **self._when(agent_steps), "score": score, "length": length, **more}
        self._append("scores", line)
        if self._tensorboard:
            self._tensorboard.scalars(agent_steps, _points(line))

    def video(self, name: str, *, agent_steps: int, frames: np.ndarray) -> Path:
        """Save frames (T, H, W, C) uint8 as videos/<name>_<agent_steps>.gif and show them in TensorBoard."""
        path = self._directory / "videos" / f"{name}_{agent_steps:010d}.gif"
        gif = encode_gif(frames)
        save_gif(path, gif)
        if self._tensorboard:
            self._tensorboard.gif(agent_steps, name, gif)
        return path

    def sync(self) -> None:
        """Make every line durable: call it before a checkpoint that relies on them."""
        for file in self._files.values():
            with disk_errors(file.name, "write the log"):
                os.fsync(file.fileno())
        if self._tensorboard:
            self._tensorboard.sync()

    def close(self) -> None:
        """Close all files. Closing twice is allowed."""
        self._opened.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _show_again(self, tensorboard: TensorBoard, agent_steps: int) -> None:
        """Shows TensorBoard again what the logs and videos/ hold of an agent step."""
        for file in self._files.values():
            with disk_errors(file.name, "read the log"):
                lines = [json.loads(line) for line in Path(file.name).read_bytes().splitlines()]
            for line in lines:
                if line["agent_steps"] == agent_steps:
                    tensorboard.scalars(agent_steps, _points(line))
        for path in sorted((self._directory / "videos").glob(f"*_{agent_steps:010d}.gif")):
            name = path.stem.rpartition("_")[0]
            if name != "evaluate":  # that one comes from hdfast.evaluate, not from the run
                with disk_errors(path, "read the video"):
                    tensorboard.gif(agent_steps, name, path.read_bytes())

    def _when(self, agent_steps: int) -> dict[str, Any]:
        frames = agent_steps * self._action_repeat
        return {"agent_steps": agent_steps, "frames": frames, "seconds": round(self.seconds, 3)}

    def _append(self, name: str, line: Mapping[str, Any]) -> None:
        file = self._files[name]
        text = json.dumps(plain(line, name), allow_nan=False)
        with disk_errors(file.name, "write the log"):
            write_all(file, text.encode() + b"\n")
        try:
            self._on_line(name, dict(line))
        except Exception as error:
            what = ": ".join(filter(None, (type(error).__name__, str(error))))
            raise CallbackError(f"on_line raised {what}", where=f"a line of {name}.jsonl") from error


def _points(line: Mapping[str, Any]) -> dict[str, float]:
    """The curves that have a point in a line of a log, with that point."""
    if kind := line.get("kind"):
        return {
            f"{name}/{kind}": float(line[name]) for name in ("score", "length", "success") if name in line
        }
    return {name: float(value) for name, value in line.items() if name not in _WHEN}


def to_host(metrics: Mapping[str, Metric]) -> dict[str, float]:
    """Metrics as Python numbers, in the order given; tensors of one element are copied to the host together.

    A float32 becomes the shortest decimal that reads back the same: 0.1, not 0.10000000149011612.
    """
    values: dict[str, Any] = dict(metrics)
    tensors = {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}
    if tensors:
        copied = torch.stack([tensor.detach().reshape(()).double() for tensor in tensors.values()]).tolist()
        for (name, tensor), value in zip(tensors.items(), copied, strict=True):
            if not tensor.is_floating_point():
                values[name] = int(value)
            else:
                values[name] = value if tensor.dtype == torch.float64 else float(str(np.float32(value)))
    return values


def cut(path: Path, agent_steps: int | None, evaluated_at: int | None = None) -> None:
    """Keep the whole lines of a log up to and including `agent_steps`, or no line when that is None.

    If `evaluated_at` is not None, evaluations are kept up to that. Damaged lines are left out, with a warning
    unless it is the last one alone, which a kill may leave unfinished. Atomic. A file that needs no cut, or does not
    exist, is left alone.
    """
    if not path.exists():
        return
    lines = path.read_bytes().splitlines(keepends=True)
    kept, damaged = [], []
    for number, line in enumerate(lines if agent_steps is not None else [], 1):
        try:
            found = json.loads(line)
            evaluation = found.get("kind") == "evaluation" and evaluated_at is not None
            if found["agent_steps"] <= (evaluated_at if evaluation else agent_steps) and line.endswith(b"\n"):
                kept.append(line)
        except (ValueError, LookupError, TypeError, AttributeError):
            damaged.append(number)
    if damaged and damaged != [len(lines)]:
        numbers = ", ".join(map(str, damaged[:5])) + (", ..." if len(damaged) > 5 else "")
        warn(f"{path}: left out what was damaged: line {numbers}")
    if len(kept) < len(lines):
        with replacing(path) as file:
            file.writelines(kept)
