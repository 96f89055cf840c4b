"""Lines in a log, a bar on a terminal."""

import io
import os
import pty
import select

import pytest

from pipeline.tracking.progress import Progress, as_clock, as_number


class Clock:
    """Seconds that a test sets."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_a_log_gets_one_line_a_period_one_at_every_evaluation_and_the_last():
    clock, log = Clock(), io.StringIO()
    with Progress("sft", 300, stream=log, clock=clock) as progress:
        for step in range(300):
            clock.now += 0.125
            progress.show(step + 1, f"nll {step}", news="held-out nll 2" if step == 59 else "")
    shown = [line.split()[1] for line in log.getvalue().splitlines()]
    # Eight steps a second: a line every 40 steps, counted again from the evaluation after 60.
    assert shown == ["40/300", "60/300", "100/300", "140/300", "180/300", "220/300", "260/300", "300/300"]


def test_time_left_is_that_of_this_attempt():
    clock, log = Clock(), io.StringIO()
    progress = Progress("align_policy", 40, done=10, stream=log, clock=clock)
    clock.now += 60.0
    progress.show(20, "reward 1.2")
    assert log.getvalue() == "align_policy            20/40  reward 1.2  2:00 left\n"


def test_a_terminal_gets_a_bar_that_is_drawn_anew_and_lines_above_it(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    reader, writer = pty.openpty()
    with open(writer, "w", buffering=1) as terminal:
        with Progress("sft", 3, stream=terminal) as progress:
            progress.show(1, "nll 3.25  61 texts/s", news="held-out nll 4")
            print("a remark of the stage")
            progress.show(3, "nll 2.5  60 texts/s")
        text = read_all(reader)
    assert "3/3  nll 2.5  60 texts/s  held-out nll 4  0:00 left" in text
    assert "━" in text
    assert text.index("a remark of the stage") < text.index("3/3")
    assert "\x1b[2K" in text  # the line is cleared before the bar is drawn again


def test_a_terminal_that_can_only_print_gets_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    reader, writer = pty.openpty()
    with open(writer, "w", buffering=1) as terminal:
        with Progress("sft", 3, stream=terminal) as progress:
            progress.show(3, "nll 2.5")
        assert read_all(reader) == "sft                       3/3  nll 2.5  0:00 left\r\n"


def read_all(descriptor):
    """What a closed work has written to its terminal so far."""
    text = b""
    while select.select([descriptor], [], [], 0.5)[0]:
        try:
            text += os.read(descriptor, 65536)
        except OSError:  # its other end is closed
            break
    os.close(descriptor)
    return text.decode()


@pytest.mark.parametrize(
    ("seconds", "clock"), [(0.4, "0:00"), (65.0, "1:05"), (3599.6, "1:00:00"), (3725.0, "1:02:05")]
)
def test_clock(seconds, clock):
    assert as_clock(seconds) == clock


@pytest.mark.parametrize(("value", "text"), [(0.12345, "0.1235"), (1830.4, "1,830"), (-2.5, "-2.5"), (3e-7, "3e-07")])
def test_number(value, text):
    assert as_number(value) == text
