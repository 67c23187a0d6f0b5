import fcntl
import io
import math
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios

import pytest

from hdfast.runtime.progress import EPISODES, WINDOW_SECONDS, Progress


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def piped(total=100_000, **options):
    clock, stream = Clock(), io.StringIO()
    return Progress(total, stream=stream, clock=clock, **options), clock, stream


def test_piped_lines_are_plain_and_come_at_intervals():
    progress, clock, stream = piped(action_repeat=4, title="Pong seed 0", plain_seconds=30)
    with progress:
        for second in range(91):
            clock.now = 1000.0 + second
            progress.update(agent_steps=10 * second, updates=5 * second)
            if second == 40:
                progress.update(
                    score=-20.0, evaluation=-18.75, harmony={"reward": 1.0, "image": 0.5, "kl": 1.337}
                )
    assert stream.getvalue().splitlines() == [
        "[Pong seed 0] agent_steps=0/100000 done=0.0%",
        "[Pong seed 0] agent_steps=300/100000 done=0.3% updates=150 frames/s=40.0 updates/s=5.00 left=2:46:10",
        "[Pong seed 0] agent_steps=600/100000 done=0.6% updates=300 frames/s=40.0 updates/s=5.00 score=-20.0 eval=-18.8"
        " harmony=reward:1.00,image:0.50,kl:1.34 left=2:45:40",
        "[Pong seed 0] agent_steps=900/100000 done=0.9% updates=450 frames/s=40.0 updates/s=5.00 score=-20.0 eval=-18.8"
        " harmony=reward:1.00,image:0.50,kl:1.34 left=2:45:10",
    ]


def test_updates_within_a_step_are_told_and_rates_stay_those_of_whole_steps():
    progress, clock, stream = piped(total=1000, plain_seconds=30)
    for second in range(11):
        clock.now = 1000.0 + second
        progress.update(agent_steps=10 * second, updates=0)
    for updates in range(1, 5):  # of 20 seconds each, all in one step
        clock.now += 20
        progress.update(updates=updates)
    assert [line.split()[1:] for line in stream.getvalue().splitlines()] == [
        ["done=0.0%"],
        ["done=10.0%", "updates=1", "frames/s=10.0", "updates/s=0.00"],
        ["done=10.0%", "updates=3", "frames/s=10.0", "updates/s=0.00"],
    ]
    for step in range(1, 3):
        clock.now += 20
        progress.update(agent_steps=100 + step, updates=4 + step)
    assert progress.updates_per_second == pytest.approx(1 / 20)
    assert progress.seconds_left == pytest.approx((1000 - 102) * 20)


def test_a_new_phase_is_told_at_once():
    progress, clock, stream = piped(plain_seconds=30)
    progress.update(agent_steps=1, phase="fill")
    clock.now += 1
    progress.update(agent_steps=2, phase="fill")
    progress.update(phase="train")
    progress.update(phase="train")
    assert re.findall(r"phase=(\w+)", stream.getvalue()) == ["fill", "train"]


def test_a_phase_tells_how_much_of_it_is_done_and_rates_stay_those_of_training():
    progress, clock, stream = piped(total=1000, plain_seconds=30)
    for second in range(11):
        clock.now = 1000.0 + second
        progress.update(agent_steps=10 * second, updates=5 * second)
    progress.update(phase="evaluate", done=(0, 8))
    for done in range(1, 9):
        clock.now += 15
        progress.update(done=(done, 8))
    progress.update(phase="")
    rates = "agent_steps=100/1000 done=10.0% updates=50 frames/s=10.0 updates/s=5.00 left=0:01:30"
    lines = stream.getvalue().splitlines()[1:]
    assert lines[:5] == [f"{rates} phase=evaluate,{done}/8" for done in (0, 2, 4, 6, 8)]
    assert "phase" not in lines[5]
    assert progress.live_lines(200)[0].plain.count("evaluate") == 0
    progress.update(phase="evaluate", done=(3, 8))
    assert progress.live_lines(200)[0].plain.endswith("phase evaluate 3/8")


def test_rates_are_those_of_the_last_minute_and_do_not_count_what_a_resumed_run_had():
    progress, clock, _ = piped(total=10_000)
    steps = 5000
    progress.update(phase="resume")
    clock.now += 1
    progress.update(agent_steps=steps, updates=4000)
    for second in range(1, 200):
        steps += 20 if second <= 100 else 2
        clock.now = 1001.0 + second
        progress.update(agent_steps=steps, updates=4000 + 3 * second)
        if second == 10:
            assert progress.steps_per_second == pytest.approx(20)
    assert progress.steps_per_second == pytest.approx(2)
    assert progress.updates_per_second == pytest.approx(3)
    assert progress.seconds_left == pytest.approx((10_000 - steps) / 2)
    assert WINDOW_SECONDS == 60


def test_random_steps_tell_nothing_of_the_time_left():
    """They are hundreds of times as fast as steps with an update."""
    progress, clock, _ = piped(total=10_000)
    for step in range(0, 1001, 100):
        clock.now += 1
        progress.update(agent_steps=step, updates=0)
        assert math.isnan(progress.seconds_left)
    assert progress.steps_per_second == pytest.approx(100)
    for step in range(1, 30):
        clock.now += 10
        progress.update(agent_steps=1000 + step, updates=step)
        if step == 1:
            assert "left" not in progress.fields()
    assert progress.steps_per_second == pytest.approx(0.1)
    assert progress.seconds_left == pytest.approx((10_000 - 1029) * 10)


def test_slow_updates_are_measured_over_more_than_a_minute():
    progress, clock, _ = piped(total=10_000)
    for step in range(100):
        clock.now += 5 if step % 10 else 60  # now and then an evaluation
        progress.update(agent_steps=step, updates=step + 1)
    assert progress.steps_per_second == pytest.approx(20 / (18 * 5 + 2 * 60), rel=0.2)


def test_the_last_line_is_not_said_twice():
    progress, _, stream = piped()
    with progress:
        progress.update(agent_steps=1, phase="evaluate")
        progress.update(phase="")
    assert len(stream.getvalue().splitlines()) == 2
    with progress:
        progress.update(score=1.0)  # too soon to be drawn, but the last value of the run
    assert stream.getvalue().splitlines()[2].endswith("score=1.00")


def test_a_run_that_stands_still_has_no_known_end():
    progress, clock, _ = piped()
    progress.update(agent_steps=0, updates=1)
    for _ in range(100):
        clock.now += 1
        progress.update()
    assert progress.fields() == {"updates": "1", "frames/s": "0.00", "updates/s": "0.00", "left": "?"}


def test_a_message_is_kept_as_it_is():
    progress, _, stream = piped()
    text = "[bold]not markup[/bold] " + "x" * 300
    progress.message(text)
    assert stream.getvalue() == text + "\n"


@pytest.mark.parametrize("width", [20, 40, 60, 80, 120, 200])
def test_the_live_line_fits_every_width_and_leaves_nothing_out(width):
    progress, clock, _ = piped(title="Pong")
    progress.update(agent_steps=0, updates=1)
    clock.now += 10
    progress.update(agent_steps=50_000, updates=11, score=1.0, evaluation=2.0, phase="train")
    lines = [line.plain for line in progress.live_lines(width)]
    text = "\n".join(lines)
    assert all(len(line) <= width for line in lines)
    for word in (
        "Pong",
        "50,000/100,000",
        "frames/s 5000",
        "updates/s 1.00",
        "score 1.00",
        "eval 2.00",
        "left 0:00:10",
    ):
        assert word in text
    if width == 200:
        assert len(lines) == 1
        bar = [span for span in progress.live_lines(width)[0].spans if "green" in str(span.style)]
        assert bar[0].end - bar[0].start == text.count("━") // 2 == 20
    (line, *_) = progress.live_lines(width)  # only the title is bold, however the fields are wrapped
    assert not str(line.style)
    assert [line.plain[s.start : s.end] for s in line.spans if "bold" in str(s.style)] == ["Pong "]


def test_telling_costs_a_few_calls_and_draws_nothing():
    progress, clock, stream = piped()
    progress.update(agent_steps=0)
    before, calls = stream.getvalue(), []
    sys.setprofile(lambda frame, event, arg: calls.append(event) if event.endswith("call") else None)
    try:
        for agent_steps in range(1000):
            clock.now += 1e-3
            progress.update(agent_steps=agent_steps, updates=agent_steps)
    finally:
        sys.setprofile(None)
    assert len(calls) / 1000 < 10
    assert stream.getvalue() == before


SHOW = """
import sys, time
from hdfast.runtime import errors
from hdfast.runtime.progress import Progress
with Progress(1000, title="Pong", live_seconds=0) as progress:
    progress.update(agent_steps=100)
    progress.message("a message")
    errors.warn("a warning")
    time.sleep(0.6)
    progress.update(agent_steps=1000, score=21.0)
print("after")
"""


def in_a_terminal(term, encoding="utf-8"):
    """What a process writes to an 80-column terminal of type `term`, decoded with this encoding."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    environment = {
        name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")
    }
    process = subprocess.Popen(
        [sys.executable, "-c", SHOW],
        stdout=theirs,
        stderr=theirs,
        env={**environment, "TERM": term, "PYTHONIOENCODING": encoding},
    )
    os.close(theirs)
    written = b""
    while select.select([ours], [], [], 60)[0]:
        try:
            chunk = os.read(ours, 4096)
        except OSError:  # on Linux, the last writer is gone
            break
        written += chunk
    os.close(ours)
    assert process.wait(60) == 0
    return written.decode(encoding)


def test_on_a_terminal_the_line_is_redrawn_below_the_messages():
    written = in_a_terminal("xterm-256color")
    assert "\x1b[?25l" in written  # the cursor is hidden
    assert "\x1b[?25h" in written  # and comes back
    assert written.index("a message") < written.index("warning: a warning") < written.index("1,000/1,000")
    assert written.rstrip().endswith("after")
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written)
    assert "Pong ━" in plain
    assert "score 21.0" in plain


@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
def test_a_terminal_that_has_no_line_to_draw_gets_a_dashed_bar(encoding):
    written = in_a_terminal("xterm-256color", encoding)
    assert "Pong ---" in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written)
    assert "a message" in written


def test_nothing_is_said_where_stdout_is_closed(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    with Progress(10) as progress:
        progress.update(agent_steps=1)
        progress.message("nobody")


def test_a_terminal_that_cannot_move_its_cursor_gets_plain_lines():
    written = in_a_terminal("dumb")
    assert "\x1b" not in written
    assert "[Pong] agent_steps=100/1000 done=10.0%" in written


def test_forced_colours_do_not_make_a_pipe_live():
    environment = {**os.environ, "FORCE_COLOR": "1", "TTY_COMPATIBLE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", SHOW], capture_output=True, text=True, env=environment, check=True
    )
    assert "\x1b" not in result.stdout
    assert result.stdout.splitlines()[0] == "[Pong] agent_steps=100/1000 done=10.0%"
    assert result.stderr == "warning: a warning\n"


def test_the_score_is_the_mean_of_the_last_episodes():
    progress = Progress(1000, action_repeat=1, title="")
    for score in [-100.0] * 5 + [1.0, 2.0] * (EPISODES // 2):
        progress.update(score=score)
    assert progress.fields()["score"] == "1.50"
