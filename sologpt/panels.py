"""
What is drawn of one or several runs, whatever draws it: panels of curves and marks, with their colours.
"""

import json
import math
import os
from dataclasses import dataclass, field

import numpy as np

from sologpt.errors import UserError

# Okabe and Ito's palette, for people who see colours differently: https://jfly.uni-koeln.de/color/
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
GREY = "#666666"
GREYS = ("#333333", "#777777", "#999999")  # of published results
DASHES = ("dash", "dot", "dashdot")  # of the references, and of the runs when the colours are used up
FEW = 60  # with fewer points a curve is not smoothed
START = 0.1  # first part of a run, in which the loss falls so fast that the rest would be a flat line
REFERENCES = os.path.join(os.path.dirname(os.path.abspath(__file__)), "references.json")
PANELS = (  # title, unit, columns of a History
    ("loss (nats per token)", "nats per token", ("loss", "val_loss")),
    ("validation loss (bits per byte)", "bits per byte", ("val_bpb",)),
    ("tokens per second", "tokens per second", ("tokens_per_s",)),
    ("MFU (% of the card's peak)", "%", ("mfu",)),
    ("gradient norm before clipping", "norm", ("norm",)),
    ("learning rate", "rate", ("lr",)),
    ("peak memory (GB)", "GB", ("peak_memory",)),
)


@dataclass
class Curve:
    """A line through x, y, both (points,). dash: solid or one of DASHES; markers: a dot at each point."""

    name: str
    x: np.ndarray
    y: np.ndarray
    color: str
    width: float = 1.6
    opacity: float = 1.0
    dash: str = "solid"
    markers: bool = False
    legend: bool = False  # whether a legend names it
    raw: bool = False  # every single value: pale, behind the others
    reference: bool = False


@dataclass
class Marks:
    """All events of a kind in a run: where they are drawn, and what they say."""

    kind: str
    x: np.ndarray
    y: np.ndarray
    texts: list
    color: str


@dataclass
class Panel:
    title: str
    unit: str
    curves: list
    marks: list = field(default_factory=list)
    log: bool = False  # a logarithmic y axis
    y_range: tuple = None  # (bottom, top); None: all there is


def make_panels(histories, over, reference=""):
    """Returns the Panels, those without data left out, and the range (left, right) of their x axes.

    over: tokens, iterations or hours. reference: a name in references.json, or empty. Raises UserError if
    there is nothing to draw.
    """
    runs = [Drawn(history, over, *style(i)) for i, history in enumerate(histories)]
    alone = len(runs) == 1
    right = max(run.right for run in runs)
    found = []
    for title, unit, columns in PANELS:
        curves = [curve for run in runs for column in columns for curve in run.curves(column, alone)]
        if curves:
            found.append(Panel(title, unit, curves))
    if not found:
        raise UserError(f"nothing in these files says over how many {over} to draw it; try another --over=")
    margin = 0.03
    for panel in found:
        if panel.unit == "nats per token":
            panel.marks = [marks for run in runs for marks in run.marks()]
            if reference:
                panel.curves += reference_curves(reference, right)
                margin = 0.15
        if panel.unit in ("nats per token", "bits per byte"):
            panel.y_range = after_the_start(panel, right)
        elif panel.unit == "norm":
            panel.log = spans_decades(panel)
        elif highest(panel) > 0:
            panel.y_range = 0, 1.08 * highest(panel)
    return found, (0, right * (1 + margin) or 1)


def style(i):
    """Returns colour and dash of run i."""
    return COLORS[i % len(COLORS)], ("solid", *DASHES)[i // len(COLORS) % 4]


class Drawn:
    """A History with its colour, over one of the three x axes."""

    def __init__(self, history, over, color, dash):
        self.history, self.over, self.color, self.dash = history, over, color, dash
        ends = [series.high(over) for series in (history.iters, history.evals) if len(series)]
        self.right = max((float(np.nanmax(end)) for end in ends if np.isfinite(end).any()), default=0.0)

    def curves(self, column, alone):
        """Returns the Curves of a column: the values, and a smoother one if there are many of them.
        alone: this is the only run, so colours tell training from validation."""
        history = self.history
        if column in history.evals.columns:
            return self.evaluations(column, alone)
        x, y = history.iters.points(self.over, column)
        if not len(x):
            return []
        if column == "peak_memory":
            y = y / 1e9
        line = Curve(self.name(column, alone), x, y, self.color, dash=self.dash)
        line.legend = column == "loss"
        line.markers = len(x) == 1  # a line needs two points
        if column == "loss" and not alone:
            line.width, line.opacity = 1.2, 0.7  # the validation loss stands out
        if len(x) < FEW or column in ("lr", "peak_memory"):
            return [line]
        line.y = smoothed(y)
        x, y = history.iters.lows_and_highs(self.over, column)
        raw = Curve("every value", x, y, self.color, width=0.6, opacity=0.3, raw=True)
        return [raw, line]

    def evaluations(self, column, alone):
        x, y = self.history.evals.points(self.over, column)
        if not len(x):
            return []
        curve = Curve(self.name(column, alone), x, y, self.color, dash=self.dash, markers=len(x) <= 60)
        curve.legend = column == "val_loss"
        if alone:
            curve.color = COLORS[1]
        elif column == "val_loss":
            curve.width = 2.2
        return [curve]

    def name(self, column, alone):
        names = dict(loss="training", val_loss="validation")
        if alone:
            return names.get(column, self.history.name)
        if column in names:
            return f"{self.history.name}, {names[column]}"
        return self.history.name

    def marks(self):
        """Returns Marks for the events, on the curve of the training loss."""
        x, y = self.history.iters.points(self.over, "loss")
        if not len(x):
            x, y = self.history.evals.points(self.over, "val_loss")
        found = []
        for kind, moments in self.history.events.items():
            places = np.array([getattr(moment, self.over) for moment in moments], dtype=float)
            if len(places) and len(x):
                heights = np.interp(places, x, smoothed(y))
                texts = [f"{self.history.name}, iteration {m.iterations:,}: {m.text}" for m in moments]
                found.append(Marks(kind, places, heights, texts, self.color))
        return found


def smoothed(y):
    """Returns the running mean of the running median of y, (points,): a spike does not lift the median."""
    medians = np.nanmedian(windows(y), axis=1)
    return np.nanmean(windows(medians), axis=1)


def windows(y):
    """Returns each value with a sixtieth of all values on either side of it, (points, window); NaN for those
    beyond the ends."""
    beside = len(y) // FEW
    padded = np.pad(y, beside, constant_values=math.nan)
    return np.lib.stride_tricks.sliding_window_view(padded, 2 * beside + 1)


def after_the_start(panel, right):
    """Returns the range of y in which the curves lie after the START; None if that is nearly all of them."""
    firm = [curve for curve in panel.curves if not curve.raw]
    starts = [right / 2 if curve.reference else START * curve.x.max() for curve in firm]
    parts = [curve.y[(curve.x >= x) & (curve.x <= right)] for curve, x in zip(firm, starts, strict=True)]
    later = np.concatenate(parts)
    if len(later) < 3:
        return None
    bottom, top = later.min(), later.max()
    if not bottom < top < highest(panel) - 0.3 * (top - bottom):
        return None
    margin = 0.08 * (top - bottom)
    if len(firm) < len(panel.curves):
        margin *= 2  # for some of the pale values
    return bottom - margin, top + margin


def highest(panel):
    """Returns the highest value of the runs, published ones apart."""
    return max(curve.y.max() for curve in panel.curves if not curve.reference)


def spans_decades(panel):
    """Whether the values are all positive, and the highest is more than 20 times the lowest."""
    lowest = min(curve.y.min() for curve in panel.curves)
    return lowest > 0 and highest(panel) > 20 * lowest


# -----------------------------------------------------------------------------
# what others have published


def references(name):
    """Returns the published results of that name: dicts with `name`, `data`, `source` (a URL), and `val_loss`
    (pairs of a step and a loss) with `tokens_per_step`, or a `level`, the loss of finished weights."""
    with open(REFERENCES, encoding="utf-8") as f:
        return json.load(f)[name]


def reference_curves(name, right):
    """Returns Curves over tokens; a level is a line from 0 to 2 * right, as wide as anybody looks."""
    curves = []
    for i, result in enumerate(references(name)):
        if "level" in result:
            x, y = np.array([0.0, 2 * right]), np.full(2, result["level"])
        else:
            steps, losses = np.array(result["val_loss"]).T
            x, y = steps * result["tokens_per_step"], losses
        name = f"{result['name']} ({result['data']})"
        curve = Curve(name, x, y, GREYS[i % 3], width=1.2, dash=DASHES[i % 3], legend=True, reference=True)
        curve.markers = "level" not in result
        curves.append(curve)
    return curves


def short(value):
    """Returns a number as a few characters: 1.5B, 300M, 12k, 0.25."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size * 0.9995:
            return f"{value / size:.4g}{unit}"
    return f"{value:.4g}"
