"""
Panels drawn by matplotlib into a picture, and the loss drawn with block characters into a terminal.
"""

import math
import os
import warnings

import numpy as np

from sologpt.errors import UserError
from sologpt.files import atomic_file
from sologpt.history import EVENTS
from sologpt.panels import GREY, highest, make_panels, short, smoothed

FORMATS = (".png", ".svg")
MARKERS = dict(resume=">", checkpoint="|", bad_step="x", spike="^", smaller_batch="v")
LINES = dict(solid="-", dash=(0, (5, 2)), dot=(0, (1, 1.5)), dashdot=(0, (5, 1.5, 1, 1.5)))
BLOCKS = " ▁▂▃▄▅▆▇█"
ROWS = 18  # of a picture in the terminal, without its axis


# -----------------------------------------------------------------------------
# a picture


def write_picture(histories, path, over="tokens", reference=""):
    """Writes a .png or .svg of the runs to path. Raises UserError if matplotlib is not installed."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError(
            "a picture needs matplotlib: pip install '.[plot]'; --text=True draws the loss without it"
        ) from None
    panels, x_range = make_panels(histories, over, reference)
    rows = 2 + len(panels) // 2  # the first panel is as high as two others, and twice as wide
    styles = {"font.size": 9, "axes.titlesize": 10, "svg.fonttype": "none", "svg.hashsalt": "sologpt"}
    with matplotlib.rc_context(styles), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)  # a folder's name: drawn as a box
        figure = Figure(figsize=(10, 1.2 + 1.7 * rows), dpi=110, layout="constrained")
        grid = figure.add_gridspec(rows, 2)
        for i, panel in enumerate(panels):
            place = grid[:2, :] if i == 0 else grid[2 + (i - 1) // 2, (i - 1) % 2]
            draw_panel(figure.add_subplot(place), panel, x_range, over)
        kind = os.path.splitext(path)[1]
        undated = {"Date": None} if kind == ".svg" else {}
        with atomic_file(path) as f:
            figure.savefig(f, format=kind[1:], metadata=undated)


def draw_panel(axes, panel, x_range, over):
    """Draws a Panel into axes of matplotlib."""
    for curve in panel.curves:
        label = drawable(curve.name) if curve.legend else "_nolegend_"
        (line,) = axes.plot(
            curve.x, curve.y, color=curve.color, lw=curve.width, alpha=curve.opacity, label=label
        )
        line.set_linestyle(LINES[curve.dash])
        if curve.markers:
            line.set(marker="o", markersize=3)
    draw_marks(axes, panel.marks)
    axes.set_title(panel.title, loc="left")
    axes.set_xlabel(over)
    axes.set_xlim(x_range)
    if panel.log:
        axes.set_yscale("log")
    if panel.y_range:
        axes.set_ylim(panel.y_range)
        if highest(panel) > panel.y_range[1]:
            axes.set_title(f"begins at {highest(panel):.2f}, above", loc="right", color=GREY, fontsize=8)
    axes.xaxis.set_major_formatter(lambda value, _: short(value))
    if panel.unit == "tokens per second":
        axes.yaxis.set_major_formatter(lambda value, _: short(value))
    axes.grid(color="#e6e6e6", lw=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    entries = len(axes.get_legend_handles_labels()[0])
    if entries:
        axes.legend(loc="upper right", fontsize=8, framealpha=0.9, ncols=1 + entries // 6)


def draw_marks(axes, all_marks):
    """Draws Marks, each kind with its own marker, and names the kinds that occur in the legend."""
    for marks in all_marks:
        marker = MARKERS[marks.kind]
        axes.plot(
            marks.x, marks.y, ls="", marker=marker, ms=7, mew=1.3, color=marks.color, mfc="white", zorder=4
        )
    for kind in dict.fromkeys(marks.kind for marks in all_marks):
        axes.plot([], [], ls="", marker=MARKERS[kind], ms=7, color=GREY, mfc="white", label=EVENTS[kind])


def drawable(name):
    """Returns a name that matplotlib draws as it is: `$` would begin a formula, a first `_` hide it."""
    if name.startswith("_"):
        name = "./" + name
    return name.replace("$", r"\$")


# -----------------------------------------------------------------------------
# a terminal


def terminal_text(history, over, width, color):
    """Returns the loss of a run as lines of text, `width` columns wide: an area of block characters for
    training, o for validation, yellow if color. Raises UserError if there is no loss."""
    x, y = points(history.iters, over, "loss")
    val_x, val_y = points(history.evals, over, "val_loss")
    if not len(x):
        x, y = val_x, val_y
    if not len(x):
        raise UserError(f"{history.name} has no loss over {over}; try another --over=")
    margin = 9  # of the labels on the left
    columns = max(10, width - margin - 1)
    edges = np.linspace(0, max(x[-1], x.max()) or 1, columns + 1)
    heights = by_column(x, smoothed(y, len(y) // 100), edges)
    drawn = np.concatenate([heights, val_y])
    later = np.concatenate([heights[columns // 20 :], val_y[val_x >= edges[columns // 20]]])
    top = later.max()
    if drawn.max() < 1.3 * top:
        top = drawn.max()
    bottom = drawn.min() - 0.1 * (top - drawn.min())
    if not top > bottom:
        bottom, top = bottom - 0.5, top + 0.5
    levels = np.clip((heights - bottom) / (top - bottom), 0, 1) * ROWS * 8
    rows = [[BLOCKS[int(min(8, max(0, level - 8 * row)))] for level in levels] for row in range(ROWS)]
    for place, loss in zip(val_x, val_y, strict=True):
        column = min(columns - 1, int(np.searchsorted(edges, place, side="right")) - 1)
        row = math.floor((loss - bottom) / (top - bottom) * ROWS)
        if 0 <= column and 0 <= row < ROWS:
            rows[row][column] = "\033[33mo\033[0m" if color else "o"
    lines = [f"{history.name}: loss over {over}" + ("; o: validation" if len(val_x) else "")]
    for row in reversed(range(ROWS)):
        label = ""
        if row % 4 == 3 or row == 0:
            label = f"{bottom + (row + 1) * (top - bottom) / ROWS:.3f}"
        lines.append(f"{label:>{margin - 2}} ┤" + "".join(rows[row]).rstrip())
    lines.append(" " * (margin - 1) + "└" + "─" * (columns))
    right = short(edges[-1])
    middle = short(edges[columns // 2])
    axis = "0" + middle.rjust(columns // 2 + len(middle) // 2 - 1)
    lines.append(" " * margin + axis + right.rjust(columns - len(axis)))
    return "\n".join(lines)


def points(series, over, column):
    """Returns x and y of a column, without points that lack one of them."""
    x, y = series.mean(over), series.mean(column)
    there = np.isfinite(x) & np.isfinite(y)
    return x[there], y[there]


def by_column(x, y, edges):
    """Returns the mean of y in each interval between two edges; where there is none, on the line between its
    neighbours."""
    number, _ = np.histogram(x, edges)
    total, _ = np.histogram(x, edges, weights=y)
    middle = (edges[:-1] + edges[1:]) / 2
    means = np.interp(middle, x, y)
    filled = number > 0
    means[filled] = total[filled] / number[filled]
    return means
