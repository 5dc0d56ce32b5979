"""The picture of a page of results: a bar for each setting of ours, grouped by the peer that it is compared with."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

_WIDTH_INCHES = 9.0
_ROW_INCHES = 0.27
_DPI = 200
_REACHED = "#4c78a8"
_MISSED = "#d1495b"
_SHOWN = "#a9bcd0"
_INK = "#333333"
_GREY = "#999999"


def draw(results: Sequence[dict[str, Any]], path: Path, *, title: str) -> None:
    """Writes a PNG: ratios of tokens/s with their spread over the turns, a line at the peer's speed, ticks at goals.

    Args:
        results: with `comparison`, `variant`, `entry`, `ratio`, `spread` and `goal`; results of one comparison
            must be adjacent.
    """
    groups = [(key, list(found)) for key, found in itertools.groupby(results, key=_group)]
    rows = sum(len(found) + 1.6 for _, found in groups)
    figure = Figure(figsize=(_WIDTH_INCHES, rows * _ROW_INCHES + 1.5), dpi=_DPI)
    FigureCanvasAgg(figure)
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.1)
    axes = figure.subplots()
    widest = max(1.0, *(max(result["spread"][1], result["goal"]) for result in results))
    places, labels, y = [], [], 0.0
    for name, found in groups:
        axes.text(0.012 * widest, y, name, fontsize=9.5, color=_INK, weight="bold", va="center")
        for result in found:
            y += 1
            _bar(axes, result, y, widest=widest)
            places.append(y)
            labels.append(result["entry"])
        y += 1.6
    axes.axvline(1.0, color=_INK, linewidth=0.9, zorder=2)
    axes.set_yticks(places, labels)
    axes.set_ylim(y - 0.8, -0.9)
    axes.set_xlim(0, widest * 1.14)
    axes.set_xlabel("tokens/s, ours over the peer's (1 = as fast as the peer)")
    axes.set_title(title, loc="left", fontsize=11.5, color=_INK, pad=30)
    _legend(axes)
    _style(axes)
    figure.savefig(path, format="png")


def _group(result: dict[str, Any]) -> str:
    return f"{result['comparison']}{result['variant']}"


def _bar(axes: Axes, result: dict[str, Any], y: float, *, widest: float) -> None:
    ratio, (low, high), goal = result["ratio"], result["spread"], result["goal"]
    color = _SHOWN if not goal else _REACHED if ratio >= goal else _MISSED
    axes.barh(y, ratio, height=0.66, color=color, zorder=1)
    whiskers = [[ratio - low], [high - ratio]]
    axes.errorbar(ratio, y, xerr=whiskers, color=_INK, linewidth=0.9, capsize=2.2, zorder=3)
    if goal:
        axes.plot([goal, goal], [y - 0.45, y + 0.45], color="black", linewidth=2.2, solid_capstyle="butt", zorder=4)
    beyond = max(high, goal) + 0.014 * widest
    # A white background, so that the line at 1 does not cross the figures.
    box = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
    axes.text(beyond, y, f"{ratio:.2f}", fontsize=8.5, color=_INK, va="center", zorder=5, bbox=box)


def _legend(axes: Axes) -> None:
    marks = [
        Line2D([], [], color=_REACHED, linewidth=6, label="goal reached"),
        Line2D([], [], color=_MISSED, linewidth=6, label="goal missed"),
        Line2D([], [], color=_SHOWN, linewidth=6, label="no goal"),
        Line2D([], [], color="black", marker="|", markersize=9, markeredgewidth=2.2, linestyle="none", label="goal"),
        Line2D([], [], color=_INK, marker="_", markersize=9, linestyle="none", label="spread over the turns"),
    ]
    axes.legend(
        handles=marks,
        loc="lower left",
        bbox_to_anchor=(0, 1.0),
        ncols=len(marks),
        frameon=False,
        fontsize=8.5,
        labelcolor=_INK,
        handlelength=1.2,
        columnspacing=1.4,
        borderaxespad=0.4,
    )


def _style(axes: Axes) -> None:
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_GREY)
    axes.grid(axis="x", color="#e6e6e6", linewidth=0.7, zorder=0)
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0, labelsize=8.5, colors=_INK)
    axes.tick_params(axis="x", length=3, labelsize=9, colors="#555555")
    axes.xaxis.label.set(color=_INK, fontsize=9.5)


def draw_scaling(axes_found: Sequence[dict[str, Any]], path: Path, *, measures: dict[str, str]) -> None:
    """Writes a PNG with a panel for each axis of `scaling.py`: measures and arithmetic, relative to the first point.

    Args:
        axes_found: with `label`, `exponents` and `points`, which hold `x`, `flops` and the measures.
        measures: the title of each measure, by its key.
    """
    columns = min(3, len(axes_found) + 1)
    rows = -(-(len(axes_found) + 1) // columns)
    figure = Figure(figsize=(3.2 * columns, 3.0 * rows), dpi=_DPI)
    FigureCanvasAgg(figure)
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.12)
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for panel, found in zip(panels, axes_found, strict=False):
        _panel(panel, found, measures)
    for panel in panels[len(axes_found) :]:
        panel.axis("off")
    handles, labels = panels[0].get_legend_handles_labels()
    names = [label.split(" ^")[0] for label in labels]
    panels[-1].legend(handles, names, loc="center", frameon=False, fontsize=10, labelcolor=_INK)
    panels[-1].text(
        0.5,
        0.1,
        "relative to the first point; numbers: fitted exponents",
        ha="center",
        fontsize=8,
        color="#555555",
        wrap=True,
        transform=panels[-1].transAxes,
    )
    figure.savefig(path, format="png")


def _panel(panel: Axes, found: dict[str, Any], measures: dict[str, str]) -> None:
    points, exponents = found["points"], found["exponents"]
    xs = [point["x"] for point in points]
    styles = {"step_s": (_REACHED, "o-"), "cpu_s_per_step": ("#6b8f71", "s-"), "grown_mib": (_MISSED, "^-")}
    for key, name in {"flops": "arithmetic", **measures}.items():
        color, style = styles.get(key, (_INK, "--"))
        values = [point[key] / points[0][key] for point in points]
        panel.plot(xs, values, style, color=color, linewidth=1.3, markersize=4.5, label=f"{name} ^{exponents[key]:.2f}")
    panel.set_xscale("log", base=2)
    panel.set_yscale("log", base=2)
    # The limits leave room for the exponents, and an axis along which nothing grows looks flat.
    drawn = [point[key] / points[0][key] for point in points for key in ("flops", *measures)]
    panel.set_ylim(min(0.8, min(drawn) / 1.15), max(4.0, max(drawn) * 1.3))
    panel.set_xticks(xs, [str(x) for x in xs])
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    lines = [f"{name} {exponents[key]:.2f}" for key, name in {"flops": "arithmetic", **measures}.items()]
    panel.text(0.04, 0.96, "\n".join(lines), fontsize=7.5, color=_INK, va="top", transform=panel.transAxes)
    panel.set_title(found["label"], loc="left", fontsize=10.5, color=_INK)
    _style(panel)
    panel.spines["left"].set_visible(True)
    panel.spines["left"].set_color(_GREY)
    panel.grid(axis="y", color="#e6e6e6", linewidth=0.7)
    panel.minorticks_off()
