"""How far a run is: a live line on a terminal, plain `key=value` lines when the output is piped."""

import contextlib
import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Self, TextIO

from rich.cells import cell_len
from rich.console import ConsoleOptions, RenderResult
from rich.live import Live
from rich.text import Text

from hdfast.runtime.console import Console
from hdfast.runtime.errors import OutputFullError

WINDOW_SECONDS = 60.0  # rates and the time left are measured over this much of the past, and
WINDOW_UPDATES = 20  # at least so many updates, once there are any
EPISODES = 20  # the last ones, whose mean score is shown
_SAMPLE_SECONDS = 0.5
_BAR = (10, 40)  # narrowest and widest, in cells


class Progress:
    """Shows one run; a context manager. `update` is cheap and may be called at every agent step.

    `update` and `message` raise BrokenPipeError, once, where the output is a pipe that nobody reads any more, and
    OutputFullError where it is a file without room.

    total_agent_steps: agent steps of the whole run. action_repeat: frames per agent step.
    title: names the run, such as "Pong seed 0".
    live_seconds, plain_seconds: least time between drawings on a terminal, and between plain lines.
    stream: where to write, stdout if None, nowhere if that is closed; it is drawn live when that is a terminal that
        can move its cursor.
    """

    def __init__(
        self,
        total_agent_steps: int,
        *,
        action_repeat: int = 1,
        title: str = "",
        live_seconds: float = 0.25,
        plain_seconds: float = 30.0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = Console(stream, highlight=False)
        self._live: Live | None = None
        if self._console.file.isatty() and not self._console.is_dumb_terminal:
            self._live = Live(_Line(self), console=self._console, auto_refresh=False)
        self._total, self._action_repeat, self._title = total_agent_steps, action_repeat, title
        self._agent_steps = self._updates = 0
        self._scores: deque[float] = deque(maxlen=EPISODES)
        self._evaluation = math.nan
        self._harmony: dict[str, float] = {}
        self._phase = ""
        self._done: tuple[int, int] | None = None
        self._clock = clock
        self._every_seconds = live_seconds if self._live else plain_seconds
        self._next_seconds = -math.inf
        self._said = ""  # the last plain line
        self._samples: deque[tuple[float, int, int]] = deque()  # (seconds, agent steps, updates)

    def update(
        self,
        *,
        agent_steps: int | None = None,
        updates: int | None = None,
        score: float | None = None,
        evaluation: float | None = None,
        harmony: Mapping[str, float] | None = None,
        phase: str | None = None,
        done: tuple[int, int] | None = None,
    ) -> None:
        """Say what changed; drawn when enough time has passed since the last drawing, or the phase is new.

        Rates count from the first call with agent_steps (give updates with it): earlier steps of
        a resumed run are not taken for speed. Updates without agent_steps, within a step, do not change them.
        agent_steps, updates: counts so far. score: of the last episode; the mean of the last EPISODES is shown.
        evaluation: mean of the last one.
        harmony: weights by name, in the order to be shown. phase: a word for what is going on, such as "evaluate".
        done: how much of the phase, out of how much; forgotten when another begins.
        """
        self._agent_steps = self._agent_steps if agent_steps is None else agent_steps
        self._updates = self._updates if updates is None else updates
        self._scores.extend([] if score is None else [score])
        self._evaluation = self._evaluation if evaluation is None else evaluation
        self._harmony = self._harmony if harmony is None else dict(harmony)
        new_phase = phase is not None and phase != self._phase
        self._phase = self._phase if phase is None else phase
        self._done = done if new_phase or done is not None else self._done
        now = self._clock()
        within_step = done is not None or (updates is not None and agent_steps is None)
        if agent_steps is not None or (
            self._samples and not within_step
        ):  # rates are of whole steps of training
            self._sample(now)
        if now >= self._next_seconds or new_phase:
            self._draw(now)

    def message(self, text: str) -> None:
        """Print a line that stays, above the live one."""
        self._console.print(text, markup=False, soft_wrap=True)

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(BrokenPipeError, OutputFullError):  # report what ended the block instead
            if self._live or self.plain_line() != self._said:
                self._draw(self._clock())
            if self._live:
                self._live.stop()

    @property
    def steps_per_second(self) -> float:
        """Agent steps per second over the last minute; NaN before there is anything to measure."""
        return self._rate(1)

    @property
    def updates_per_second(self) -> float:
        """Updates per second over the last minute; NaN before there is anything to measure."""
        return self._rate(2)

    @property
    def seconds_left(self) -> float:
        """Wall time to the end at the present rate; infinite while nothing moves, NaN before there are updates.

        Until then steps are random, and much faster.
        """
        learning = self._samples and self._samples[-1][2] > 0
        rate = self.steps_per_second if learning else math.nan
        return (self._total - self._agent_steps) / rate if rate else math.inf

    def fields(self) -> dict[str, str]:
        """What is shown, as text by name; what is not known yet is left out."""
        values = {
            "frames/s": self.steps_per_second * self._action_repeat,
            "updates/s": self.updates_per_second,
            "score": sum(self._scores) / len(self._scores) if self._scores else math.nan,
            "eval": self._evaluation,
        }
        shown = {"updates": f"{self._updates}"} if self._updates else {}
        shown |= {name: _number(value) for name, value in values.items() if not math.isnan(value)}
        if self._harmony:
            shown["harmony"] = " ".join(f"{name}:{_number(value)}" for name, value in self._harmony.items())
        if not math.isnan(self.seconds_left):
            shown["left"] = _duration(self.seconds_left)
        if self._phase:
            shown["phase"] = self._phase
            if self._done is not None:
                shown["phase"] += " {}/{}".format(*self._done)
        return shown

    def plain_line(self) -> str:
        """One line of `key=value` words."""
        percent = 100 * self._agent_steps / self._total
        words = [f"agent_steps={self._agent_steps}/{self._total}", f"done={percent:.1f}%"]
        words += [f"{name}={text.replace(' ', ',')}" for name, text in self.fields().items()]
        return " ".join([f"[{self._title}]", *words] if self._title else words)

    def live_lines(self, width: int, *, dash: str = "━") -> list[Text]:
        """The same for a terminal of `width` cells: title, bar of dashes, steps, fields; wrapped between fields."""
        steps = f"{self._agent_steps:,}/{self._total:,}"
        head = Text()
        head.append(f"{self._title} " if self._title else "", style="bold")
        parts = [Text.assemble((f"{name} ", "dim"), text) for name, text in self.fields().items()]
        rest = sum(2 + cell_len(part.plain) for part in parts)
        fixed = cell_len(head.plain) + 1 + len(steps)
        bar = min(max(width - fixed - rest, _BAR[0]), _BAR[1], max(width - fixed, 0))
        done = round(bar * min(self._agent_steps / self._total, 1.0))
        head.append(dash * done, style="green")
        head.append(dash * (bar - done), style="dim")
        head.append(f" {steps}")
        lines = [head]
        for part in parts:
            if cell_len(lines[-1].plain) + 2 + cell_len(part.plain) > width:
                lines.append(Text())
            lines[-1].append("  " if lines[-1].plain else "").append_text(part)
        return lines

    def _draw(self, now: float) -> None:
        self._next_seconds = now + self._every_seconds
        if self._live:
            self._live.refresh()
        else:
            self._said = self.plain_line()
            self.message(self._said)
            self._console.file.flush()

    def _sample(self, now: float) -> None:
        samples = self._samples
        if samples and samples[-1][2] == 0 < self._updates:
            samples.clear()  # learning begins: earlier rates say nothing about later ones
        if not samples or now - samples[-1][0] >= _SAMPLE_SECONDS:
            samples.append((now, self._agent_steps, self._updates))
            while len(samples) > 2 and now - samples[1][0] >= WINDOW_SECONDS:
                if 0 < self._updates - samples[1][2] < WINDOW_UPDATES:
                    break
                samples.popleft()

    def _rate(self, column: int) -> float:
        if len(self._samples) < 2:
            return math.nan
        first, last = self._samples[0], self._samples[-1]
        return (last[column] - first[column]) / (last[0] - first[0])


class _Line:
    """Drawn anew by rich whenever the live display is refreshed, at the width the terminal then has."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def __rich_console__(self, console: object, options: ConsoleOptions) -> RenderResult:
        yield from self._progress.live_lines(options.max_width, dash="-" if options.ascii_only else "━")


def _number(value: float) -> str:
    """Three digits or so: 12345, 123, 12.3, 1.23, 0.12, and 1.2e+30."""
    size = abs(value)
    if 1e7 <= size < math.inf:
        return f"{value:.3g}"
    digits = 0 if size >= 99.95 else 1 if size >= 9.995 else 2
    return f"{value:.{digits}f}" if math.isfinite(value) else str(value)


def _duration(seconds: float) -> str:
    if math.isinf(seconds):
        return "?"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}"
