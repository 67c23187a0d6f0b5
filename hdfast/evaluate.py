"""Plays the newest checkpoint of a run, or one that is named, in new environments and prints the scores as JSON.

The run may be training meanwhile: it is only read, except that --video writes a GIF into its videos/.
"""

import contextlib
import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich import progress

from hdfast import evaluation
from hdfast.envs.base import BatchEnv, EnvStep
from hdfast.runtime import entry, errors
from hdfast.runtime.arguments import Arguments, given_path, natural, positive
from hdfast.runtime.console import Console
from hdfast.runtime.errors import ConfigError
from hdfast.runtime.files import plain
from hdfast.runtime.video import encode_gif, save_gif
from hdfast.trained import Trained, load

PLAIN_SECONDS = 30.0  # between two lines of progress, if there is no live one


def evaluate(
    run: str | Path,
    *,
    episodes: int = 100,
    seed: int = 0,
    num_envs: int = 8,
    device: str = "auto",
    video: bool = False,
    greedy: bool = False,
    env_kwargs: str | None = None,
    tell: Callable[[int], object] = lambda done: None,
) -> dict[str, Any]:
    """Scores of `episodes` episodes with the newest checkpoint of the run in directory `run`, or with the one it names.

    Args:
        episodes: at least 1.
        seed, num_envs, greedy, env_kwargs: as `load`; no more environments than episodes. The published protocol
            samples.
        video: also write an episode to videos/evaluate_<agent steps>.gif in the run's directory: the first, or one more
            where the agent sees no images. The name also has greedy, the seed and env_kwargs, where given:
            evaluate_0000400000_greedy_seed3.gif.
        tell: gets at every step how many episodes are done.

    Raises:
        As `load`. ConfigError: no episodes, a video of a task that shows and draws no images. RunError,
        DiskFullError: the video cannot be written.
    """
    if episodes < 1:
        raise ConfigError(f"--episodes {episodes} is out of range: expected 1 or more")
    envs = min(num_envs, episodes)
    asked: dict[str, Any] = {"seed": seed, "device": device, "greedy": greedy, "env_kwargs": env_kwargs}
    other = _otherwise(seed, greedy, env_kwargs)
    with load(run, num_envs=envs, **asked) as trained:
        agent_steps = trained.checkpoint.meta["agent_steps"]
        film = None
        if video and _image_of(trained.env) is not None:
            film = Film.of(trained, other)
        elif video:  # drawing takes longer than all else, so only the episode that is shown is drawn
            with load(trained.checkpoint.path, drawn=True, **asked) as drawn:
                film = Film.of(drawn, other)
                evaluation.play(drawn.env, drawn.policy, 1, watch=film)
        watch = film or (lambda step: None)
        played = evaluation.play(trained.env, trained.policy, episodes, watch=watch, tell=tell)
    played_by = trained.checkpoint
    about = {"run": str(played_by.run), "checkpoint": played_by.path.name, "agent_steps": agent_steps}
    if film is not None:
        about["video"] = str(film.path)
    if greedy:
        about["greedy"] = True
    if env_kwargs is not None:
        about["env_kwargs"] = json.loads(env_kwargs)
    return {**about, "seed": seed, **evaluation.summarize(played)}


class Film:
    """Writes the first episode of the first environment as a GIF, at its end or after its first LONGEST rows.

    key: the observation to keep. path: of the GIF. Raises ConfigError if the key is None.
    """

    LONGEST = 3000  # 200 seconds; the encoder holds all enlarged frames, some 200 MB

    def __init__(self, key: str | None, path: Path) -> None:
        if key is None:
            raise ConfigError("--video: this task shows no images")
        self.key, self.path, self._over = key, path, False
        self._frames: list[np.ndarray] = []

    @classmethod
    def of(cls, trained: Trained, other: str = "") -> "Film":
        """The film that belongs into the directory of a run; other: the end of its name."""
        name = f"evaluate_{trained.checkpoint.meta['agent_steps']:010d}{other}.gif"
        return cls(_image_of(trained.env), trained.checkpoint.run / "videos" / name)

    def __call__(self, step: EnvStep) -> None:
        """Takes one row of every environment. Raises: RunError, DiskFullError."""
        if not self._over:
            self._frames.append(step.obs[self.key][0].copy())  # a view would keep those of all environments
            ends, cut = bool(step.is_last[0]), len(self._frames) == self.LONGEST
            self._over = ends or cut
            if cut and not ends:
                errors.warn(f"{self.path}: the first {self.LONGEST:,} rows of an episode that goes on")
            if self._over:
                save_gif(self.path, encode_gif(np.stack(self._frames)))
                self._frames.clear()


def _otherwise(seed: int, greedy: bool, env_kwargs: str | None) -> str:
    """What sets a film apart from others of its checkpoint, as part of its name, such as "_greedy_seed3"."""
    parts = ["greedy"] * greedy + [f"seed{seed}"] * bool(seed)
    if env_kwargs is not None:
        text = re.sub(r"[\s{}\"]", "", env_kwargs)
        parts.append(re.sub(r"[^\w.]", "-", text, flags=re.ASCII)[:100])
    return "".join(f"_{part}" for part in parts if part)


def _image_of(env: BatchEnv) -> str | None:
    """The first image that the environments show."""
    return next((key for key, spec in env.obs_specs.items() if spec.is_image), None)


@contextlib.contextmanager
def _telling(episodes: int) -> Iterator[Callable[[int], object]]:
    """Shows on stderr how many episodes are done, and yields a function to call with that number.

    A live line if stderr is a terminal, else a line of text every PLAIN_SECONDS.
    """
    console = Console(sys.stderr)
    if not console.is_terminal or console.is_dumb_terminal:
        last = time.monotonic()

        def tell(done: int) -> None:
            nonlocal last
            if time.monotonic() >= last + PLAIN_SECONDS:
                last = time.monotonic()
                console.print(f"episodes={done}/{episodes}")

        yield tell
        return
    columns = (
        *(progress.TextColumn("episodes"), progress.BarColumn(), progress.MofNCompleteColumn()),
        *(progress.TimeElapsedColumn(), progress.TextColumn("left"), progress.TimeRemainingColumn()),
    )
    with progress.Progress(*columns, console=console, transient=True) as line:
        task = line.add_task("", total=episodes)
        yield lambda done: line.update(task, completed=done)


def main() -> None:
    parser = Arguments("python -m hdfast.evaluate", __doc__)
    parser.add_argument(
        "run",
        type=given_path,
        help="directory of a run, such as runs/atari100k/Pong/seed0, or one of its checkpoints",
    )
    parser.add_argument("--episodes", type=positive, default=100, help="episodes to play")
    parser.add_argument("--seed", type=natural, default=0, help="of environments and policy")
    parser.add_argument("--num-envs", type=positive, default=8, help="environments stepped together")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument(
        "--video",
        action="store_true",
        help="write the first episode as a GIF, or one more if it must be drawn for that",
    )
    parser.add_argument("--greedy", action="store_true", help="the likeliest actions instead of sampled ones")
    parser.add_argument(
        "--env.kwargs",
        dest="env_kwargs",
        metavar="JSON",
        help="with gym: keyword arguments of gymnasium.make that replace the run's of these names; its others stay",
    )
    flags = parser.parse_args()
    with _telling(flags.episodes) as tell:
        scores = evaluate(**vars(flags), tell=tell)
    sys.stdout.write(json.dumps(plain(scores), allow_nan=False) + "\n")


if __name__ == "__main__":
    entry.main(main)
