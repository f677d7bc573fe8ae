"""
Panels drawn by matplotlib into a picture, and the loss drawn with block characters into a terminal.
"""

import math
import os
import warnings

import numpy as np

from sologpt.errors import UserError, first_line
from sologpt.files import atomic_file
from sologpt.history import EVENTS
from sologpt.panels import GREY, START, highest, make_panels, short

FORMATS = (".png", ".svg")
MARKERS = dict(resume=">", checkpoint="|", bad_step="x", spike="^", smaller_batch="v")
LINES = dict(solid="-", dash=(0, (5, 2)), dot=(0, (1, 1.5)), dashdot=(0, (5, 1.5, 1, 1.5)))
BLOCKS = " ▁▂▃▄▅▆▇█"
ROWS = 18  # of a picture in the terminal, without its axis
LABEL = 8  # columns of the numbers beside it


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
    except ValueError as e:  # MPLBACKEND names none of its own
        raise UserError(f"matplotlib does not start: {first_line(e)}") from None
    panels, x_range = make_panels(histories, over, reference)
    rows = 2 + len(panels) // 2  # the first panel is as high as two others, and twice as wide
    styles = {"font.size": 9, "axes.titlesize": 10, "svg.fonttype": "none", "svg.hashsalt": "sologpt"}
    with matplotlib.rc_context(styles), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)  # a folder's name: drawn as a box
        figure = Figure(figsize=(10, 1.2 + 1.7 * rows), dpi=110, layout="constrained")
        grid = figure.add_gridspec(rows, 2)
        for i, panel in enumerate(panels):
            place = grid[2 + (i - 1) // 2, (i - 1) % 2]
            if i == 0:
                place = grid[:2, :]
            draw_panel(figure.add_subplot(place), panel, x_range, over)
        kind = os.path.splitext(path)[1]
        undated = {"Date": None} if kind == ".svg" else {}
        with atomic_file(path) as f:
            figure.savefig(f, format=kind[1:], metadata=undated)


def draw_panel(axes, panel, x_range, over):
    """Draws a Panel into axes of matplotlib."""
    for curve in panel.curves:
        label = drawable(curve.name) if curve.legend else "_nolegend_"
        (line,) = axes.plot(curve.x, curve.y, color=curve.color, alpha=curve.opacity, label=label)
        line.set(linewidth=curve.width, linestyle=LINES[curve.dash])
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
            text = f"reaches {highest(panel):.2f}, above"
            runs = [curve for curve in panel.curves if not curve.reference]
            # the lowest and the highest of a first group are both at its place
            if any(highest(panel) in curve.y[curve.x == curve.x[0]] for curve in runs):
                text = f"begins at {highest(panel):.2f}, above"
            axes.set_title(text, loc="right", color=GREY, fontsize=8)
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
    look = dict(ls="", ms=7, mew=1.3, mfc="white")
    for marks in all_marks:
        axes.plot(marks.x, marks.y, marker=MARKERS[marks.kind], color=marks.color, zorder=4, **look)
    for kind in dict.fromkeys(marks.kind for marks in all_marks):
        axes.plot([], [], marker=MARKERS[kind], color=GREY, label=EVENTS[kind], **look)


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
    x, y = history.iters.points(over, "loss")
    val_x, val_y = history.evals.points(over, "val_loss")
    if not len(x):
        x, y = val_x, val_y
    if not len(x):
        raise UserError(f"{history.name} has no loss over {over}; try another --over=")
    columns = max(20, width - LABEL - 2)
    ends = history.iters.high(over)  # also of iterations whose loss is not a number
    last = max(ends[np.isfinite(ends)].max(initial=1e-9), val_x.max(initial=0))
    edges = np.linspace(0, last, columns + 1)
    heights = by_column(x, y, edges)
    bottom, top = value_range(heights, val_x, val_y, edges)

    eighths = np.clip((heights - bottom) / (top - bottom), 0, 1) * ROWS * 8
    rows = [[block(height - 8 * row) for height in eighths] for row in range(ROWS)]  # from the lowest
    mark = "\033[33mo\033[0m" if color else "o"
    for place, loss in zip(val_x, val_y, strict=True):
        column = min(columns - 1, int(place / edges[-1] * columns))
        row = math.floor((loss - bottom) / (top - bottom) * ROWS)
        if column >= 0 and 0 <= row < ROWS:
            rows[row][column] = mark

    title = f"{history.name}: loss over {over}"
    if len(val_x):
        title += ", o: validation"
    return "\n".join([title, *labelled(rows, bottom, top), *x_axis(edges)])


def by_column(x, y, edges):
    """Returns the mean of y in each interval between two edges; where there is none, on the line between its
    neighbours, or NaN before the first and after the last."""
    number, _ = np.histogram(x, edges)
    total, _ = np.histogram(x, edges, weights=y)
    means = np.interp((edges[:-1] + edges[1:]) / 2, x, y, left=np.nan, right=np.nan)
    return np.divide(total, number, out=means, where=number > 0)


def value_range(heights, val_x, val_y, edges):
    """Returns the losses at the bottom and the top of the picture: all but those of the START."""
    first = int(START * len(heights))
    later = np.concatenate([heights[first:], val_y[val_x >= edges[first]]])
    if np.isnan(later).all():
        later = heights
    bottom, top = np.nanmin(later), np.nanmax(later)
    if not top > bottom:
        margin = max(0.5, 1e-3 * abs(top))
        return bottom - margin, top + margin
    margin = 0.1 * (top - bottom)
    return bottom - margin, top + margin


def block(eighths):
    """Returns the character that is filled so far from below."""
    return BLOCKS[int(min(8, max(0, eighths)))]


def labelled(rows, bottom, top):
    """Returns the rows as lines, the highest first, the loss at the top edge of every fourth before it."""
    lines = []
    for number in reversed(range(ROWS)):
        label = ""
        if number % 4 == 1:
            label = f"{bottom + (number + 1) * (top - bottom) / ROWS:.3f}"
        lines.append(f"{label:>{LABEL}} ┤" + "".join(rows[number]).rstrip())
    return lines


def x_axis(edges):
    """Returns the two lines below the picture."""
    columns = len(edges) - 1
    middle, right = short(edges[columns // 2]), short(edges[-1])
    numbers = "0".ljust(columns // 2 - len(middle) // 2) + middle
    return [
        " " * LABEL + " └" + "─" * columns,
        " " * LABEL + "  " + numbers + right.rjust(columns - len(numbers)),
    ]
