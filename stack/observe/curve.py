"""Draws the picture of a run, curve.png: loss and speed against tokens."""

import io
from collections.abc import Mapping, Sequence
from itertools import groupby, pairwise
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from stack.disk import write_whole
from stack.errors import StackError
from stack.observe.jsonl import latest
from stack.observe.metrics import StepRecord

_SIZE_INCHES = (9.0, 5.2)
#: Gives a width of 1800 pixels, twice the width of a README column, so that the picture is sharp on a dense screen.
_DPI = 200
_TRAIN = "#4c78a8"
_HELDOUT = "#d1495b"
_SPEED = "#6b8f71"
_INK = "#333333"
_MARK = "#8a8a8a"
#: With more attempts than _MOST_WORDS, only attempts that changed a setting are labelled. A label lists at most
#: _MOST_CHANGES changes.
_MOST_WORDS = 6
_MOST_CHANGES = 3


def draw(
    records: Sequence[StepRecord], path: Path, *, title: str, changes: Mapping[int, Sequence[str]] | None = None
) -> None:
    """Writes a PNG of 1800 x 1040 pixels: training and held-out loss in nats per token above, tokens/s below.

    A dashed line marks the beginning of each attempt after the first, with the step from which it resumed and the
    settings that changed. Steps that a later attempt repeated are drawn pale, behind the repetition.

    Args:
        records: all rows of metrics.jsonl.
        path: the file to write.
        title: title of the picture.
        changes: number of an attempt -> its changes of the config, each a few words.

    Raises:
        StackError: no step is finished.
        OSError: the file cannot be written.
    """
    rows = latest(records)
    if not any(row.step for row in rows):
        raise StackError(f"{path} would be empty: the run finished no step")
    figure = Figure(figsize=_SIZE_INCHES, dpi=_DPI)
    FigureCanvasAgg(figure)
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.1)
    loss, speed = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": [3.2, 1]})
    _draw_loss(loss, rows)
    _draw_repeated(loss, records, rows)
    _draw_speed(speed, [row for row in rows if row.step])
    for axes in (loss, speed):
        _style(axes)
    begun = [(before, row) for before, row in pairwise(rows) if before.attempt != row.attempt]
    _draw_attempts(loss, speed, begun, changes or {})
    # The upper right corner is usually free, since the curve falls. The label of a late attempt is there, however.
    late = any(before.tokens_total > 0.7 * rows[-1].tokens_total for before, _ in begun)
    loss.legend(loc="center right" if late else "upper right", frameon=False, fontsize=9.5, labelcolor=_INK)
    loss.set_title(title, parse_math=False, loc="left", fontsize=11.5, color=_INK, pad=10)
    figure.align_ylabels()
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    write_whole(path, picture.getvalue())


def _draw_loss(axes: Axes, rows: list[StepRecord]) -> None:
    steps = [row for row in rows if row.step]
    tokens = [row.tokens_total for row in steps]
    axes.plot(tokens, [row.loss for row in steps], color=_TRAIN, linewidth=1.0, label="training", marker=_marker(steps))
    heldout = [(row.tokens_total, row.heldout_loss) for row in rows if row.heldout_loss is not None]
    if heldout:
        _draw_heldout(axes, heldout)
    axes.set_ylabel("loss (nats/token)")


def _draw_repeated(axes: Axes, records: Sequence[StepRecord], rows: list[StepRecord]) -> None:
    """Draws the steps that a later attempt repeated, as one pale line for each earlier attempt."""
    kept = {id(row) for row in rows}
    label: str | None = "repeated later"
    for _, attempt in groupby((row for row in records if row.step), key=lambda row: row.attempt):
        left = [row for row in attempt if id(row) not in kept]
        if left:
            tokens, losses = [row.tokens_total for row in left], [row.loss for row in left]
            axes.plot(
                tokens, losses, color=_TRAIN, alpha=0.35, linewidth=1.0, label=label, marker=_marker(left), zorder=1
            )
            label = None


def _draw_attempts(
    loss: Axes, speed: Axes, begun: list[tuple[StepRecord, StepRecord]], changes: Mapping[int, Sequence[str]]
) -> None:
    """Draws a dashed line at the beginning of each attempt, and a label. Among many attempts only those that changed a
    setting have a label.

    Args:
        loss: axes of the loss.
        speed: axes of the speed.
        begun: for each attempt the last row before it, and its first row.
        changes: as in `draw`.
    """
    for before, row in begun:
        for axes in (loss, speed):
            axes.axvline(before.tokens_total, color=_MARK, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
        changed = list(changes.get(row.attempt, ()))
        if not changed and len(begun) > _MOST_WORDS:
            continue
        more = [f"and {len(changed) - _MOST_CHANGES} more"] if len(changed) > _MOST_CHANGES else []
        loss.annotate(
            "\n".join([f"resumed after step {before.step}", *changed[:_MOST_CHANGES], *more]),
            (before.tokens_total, 0.99),
            xycoords=loss.get_xaxis_transform(),
            xytext=(3, 0),
            textcoords="offset points",
            rotation=90,
            fontsize=7.5,
            color=_MARK,
            va="top",
            parse_math=False,
        )


def _draw_heldout(axes: Axes, points: list[tuple[int, float]]) -> None:
    tokens, losses = zip(*points, strict=True)
    axes.plot(
        tokens,
        losses,
        color=_HELDOUT,
        linestyle="none",
        marker="o",
        markersize=5.5,
        markeredgecolor="white",
        markeredgewidth=0.8,
        label="held-out",
        zorder=3,
    )
    axes.annotate(
        f"{losses[-1]:.3f}",
        (tokens[-1], losses[-1]),
        xytext=(4, 8),
        textcoords="offset points",
        ha="right",
        fontsize=9.5,
        color=_HELDOUT,
    )


def _draw_speed(axes: Axes, rows: list[StepRecord]) -> None:
    speeds = [row.tokens_per_s for row in rows]
    axes.plot([row.tokens_total for row in rows], speeds, color=_SPEED, linewidth=1.0, marker=_marker(rows))
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_locator(MaxNLocator(3))
    axes.yaxis.set_major_formatter(FuncFormatter(_si))
    axes.set_ylabel("tokens/s")
    axes.set_xlabel("target tokens seen")
    axes.xaxis.set_major_formatter(FuncFormatter(_si))


def _marker(rows: list[StepRecord]) -> str:
    """The marker of a line: a dot for a single row, since a line through one point is invisible, else none."""
    return "." if len(rows) == 1 else ""


def _style(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#999999")
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(colors="#555555", labelsize=9.5, length=3)
    axes.yaxis.label.set(color=_INK, fontsize=10)
    axes.xaxis.label.set(color=_INK, fontsize=10)
    axes.margins(x=0.015)


def _si(value: float, _: int | None = None) -> str:
    """A number with a suffix for thousands (k), millions (M), billions (B) or trillions (T): 12000 as 12k."""
    for scale, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= scale:
            return f"{value / scale:g}{suffix}"
    return f"{value:g}"
