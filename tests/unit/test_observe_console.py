"""The output of a run on the user's screen."""

import io
import math
import re

import pytest

from stack.observe.console import Console, _clock
from stack.observe.metrics import StepRecord
from tests.helpers.rows import row


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Flushed(io.StringIO):
    """A stream whose text counts as seen only after a flush."""

    seen = ""

    def flush(self) -> None:
        self.seen = self.getvalue()


def play(out: io.StringIO, records: list[StepRecord], total: int = 100, log_every: int = 5) -> None:
    console = Console(total, log_every=log_every, out=out)
    console.start("the headline")
    for record in records:
        console.step(record)
    console.close("the summary")


def test_plain_lines() -> None:
    out = io.StringIO()
    play(out, [row(step, heldout_loss=2.5 if step == 7 else None) for step in range(1, 12)])
    assert out.getvalue().splitlines() == [
        "the headline",
        "   step       loss  grad norm         lr     tokens/s    s/step  bubble       GiB   held-out",
        "  1/100     8.2500     1.5000   1.00e-03        5,440     3.000   12.3%      1.50",
        "  5/100     1.6500     1.5000   1.00e-03        5,440     3.000   12.3%      1.50",
        "  7/100     1.1786     1.5000   1.00e-03        5,440     3.000   12.3%      1.50     2.5000",
        " 10/100     0.8250     1.5000   1.00e-03        5,440     3.000   12.3%      1.50",
        "the summary",
    ]


def test_first_and_last_step_are_always_shown() -> None:
    out = io.StringIO()
    play(out, [row(step) for step in (3, 4, 5, 6, 7)], total=7, log_every=100)
    steps = [line.split("/")[0].strip() for line in out.getvalue().splitlines() if re.match(r" *\d", line)]
    assert steps == ["3", "7"]


@pytest.mark.parametrize(
    "wild",
    [
        {"loss": math.nan, "grad_norm": math.inf, "bubble_fraction": math.nan},
        {"loss": 123456.789, "grad_norm": 9.9e300, "lr": 1e-12, "tokens_per_s": 12345678.0},
        {"loss": -1e300, "step_time_s": 99999.0, "memory_peak_bytes": 140 << 30, "bubble_fraction": 1.0},
    ],
)
def test_columns_keep_their_width(wild: dict) -> None:
    out = io.StringIO()
    play(out, [row(1), row(1000, **wild)], total=1000)
    title, tame, odd = out.getvalue().splitlines()[1:4]
    assert len(tame) == len(odd)
    assert tame.index("1/1000") == odd.index("1000/1000") + 3
    # The numbers of each column end at the end of its title.
    ends = [match.end() for match in re.finditer(r"\S+(?: norm)?", title)][:-1]
    assert all(line[end : end + 1] in ("", " ") and line[end - 1] != " " for line in (tame, odd) for end in ends)


def test_the_titles_come_back_for_who_reads_the_end() -> None:
    out = io.StringIO()
    play(out, [row(step) for step in range(1, 101)], log_every=1)
    assert sum("grad norm" in line for line in out.getvalue().splitlines()) == 3


def test_every_line_is_flushed() -> None:
    out = Flushed()
    console = Console(10, log_every=1, out=out)
    console.start("headline")
    assert out.seen.endswith("headline\n")
    console.step(row(1))
    assert "1/10" in out.seen
    console.note("a note")
    assert out.seen.endswith("a note\n")


@pytest.mark.parametrize(("encoding", "shown"), [("utf-8", "runs/\u00fcn\u00ef"), ("ascii", "runs/\\xfcn\\xef")])
def test_a_path_is_shown_as_the_stream_can(encoding, shown) -> None:
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    Console(10, log_every=1, out=out).note("runs/\u00fcn\u00ef")
    assert out.buffer.getvalue().decode(encoding) == f"{shown}\n"


def test_a_terminal_gets_a_bar_with_an_eta_and_ends_clean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    out = Terminal()
    console = Console(100, log_every=5, out=out)
    console.start("the headline")
    for step in range(1, 51):
        console.step(row(step))
    console._live.refresh()
    text = out.getvalue()
    # 50 steps of 3 s are left.
    assert "[==========          ]  50/100  0:00:00 < 0:02:30  loss 0.1650  5,440 tokens/s" in text
    assert " 50/100     0.1650     1.5000" in text
    console.note("caf\u00e9 [bold]not markup[/bold] :smile:")
    console.close("the summary")
    console.close()
    text = out.getvalue()
    assert text.isascii()
    assert "caf\\xe9 [bold]not markup[/bold] :smile:" in text
    assert "\x1b[?25l" in text
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")
    assert "the summary" in text[text.rindex("\x1b[?25h") :]


def test_a_narrow_terminal_crops_the_bar_in_ascii(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "40")
    out = Terminal()
    play(out, [row(step) for step in range(1, 30)])
    assert out.getvalue().isascii()


def test_a_log_file_gets_no_escape_codes_even_when_colour_is_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    out = io.StringIO()
    play(out, [row(1)])
    assert "\x1b" not in out.getvalue()


def test_an_attempt_that_repeats_steps_starts_its_own_pace() -> None:
    console = Console(100, log_every=5, out=io.StringIO())
    for record in (row(8), row(9), row(10), row(5, time=9000.0)):
        console.step(record)
    assert console._eta() == "-:--:--"
    console.step(row(6, time=9002.0))
    assert console._eta() == "0:03:08"


def test_clock() -> None:
    assert [_clock(seconds) for seconds in (0, 59.6, 3661, 90061)] == ["0:00:00", "0:01:00", "1:01:01", "1d 1:01:01"]


def test_an_evaluation_ahead_of_the_first_step_is_a_line_with_its_loss_alone() -> None:
    out = io.StringIO()
    play(out, [StepRecord.before_training(7.5, attempt=1, time=1.0), row(1), row(2)])
    lines = out.getvalue().splitlines()[2:-1]
    assert [line.split() for line in lines] == [["0/100", "7.5000"], lines[1].split()]
    assert lines[0].index("7.5000") + len("7.5000") == len(lines[0])
    assert lines[1].startswith("  1/100     8.2500")
    assert "nan" not in out.getvalue()
    terminal = Terminal()
    play(terminal, [StepRecord.before_training(7.5, attempt=1, time=1.0)])
    assert "nan" not in terminal.getvalue()
