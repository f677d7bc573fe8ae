"""
What a run has left in metrics.jsonl, read in one pass and in memory that hardly grows with the file.
"""

import json
import math
import os
from dataclasses import dataclass, field

import numpy as np

from sologpt.errors import UserError

POINTS = 2000  # most groups of a Series: more than a screen has columns
CHUNK = 4096  # rows that a Series reduces at a time
LINE = 2**20  # characters; what is longer is no line of ours
MOMENTS = 200  # most events of a kind that are kept, and most samples
TEXT = 2000  # characters of a prompt or sample that are kept
LARGEST = 1e30  # no figure of ours is larger: damage, and it would overflow

# figures of an `iter` line and of an `eval` line, after the three that say when
ITER = ("loss", "norm", "lr", "mfu", "peak_memory", "tokens_per_s")
EVAL = ("train_loss", "val_loss", "val_bpb")
WHEN = ("iterations", "tokens", "hours")
SIZES = ("batch_size", "gradient_accumulation_steps", "block_size")  # their product: tokens per iteration
# kinds of lines that are marked in a picture, and what they are called there
EVENTS = dict(
    resume="resumed",
    checkpoint="checkpoint",
    bad_step="skipped update",
    spike="spike",
    smaller_batch="smaller micro-batch",
)

OTHERS = ("config", "compiled", "eval", "sample", "done")
# of a line `config` or `resume`: what the machine made of the keys
FOUND = ("device", "dtype", "peak_flops", "processes")

decode = json.JSONDecoder().raw_decode  # a fifth faster than json.loads


class NothingYet(UserError):
    """No file of a run yet, or none with an iteration."""


class Series:
    """A table of numbers, NaN where one is missing, of which only groups of successive rows are kept.

    A group has `stride` rows, a power of 2. It keeps, for every column, the sum and the number of the finite
    values, the lowest and the highest. Whenever there are more than POINTS groups, two become one.
    """

    def __init__(self, columns):
        self.columns = columns
        self.stride = 1
        self.rows = []  # not grouped yet: at most CHUNK, or one group
        self.groups = np.empty((4, 0, len(columns)))  # sum, number, lowest, highest

    def add(self, row):
        self.rows.append(row)
        if len(self.rows) >= max(CHUNK, self.stride):
            self.reduce()

    def reduce(self):
        """Moves the rows that fill whole groups into groups."""
        whole = len(self.rows) // self.stride * self.stride
        table = as_numbers(self.rows[:whole]).reshape(-1, self.stride, len(self.columns))
        self.groups = np.concatenate([self.groups, grouped(table)], axis=1)
        del self.rows[:whole]
        while self.groups.shape[1] > POINTS:
            self.halve()

    def halve(self):
        if self.groups.shape[1] % 2:  # a group without values, to go with the last one
            empty = grouped(np.full((1, 1, len(self.columns)), math.nan))
            self.groups = np.concatenate([self.groups, empty], axis=1)
        first, second = self.groups[:, 0::2], self.groups[:, 1::2]
        self.groups = np.stack(
            [
                first[0] + second[0],
                first[1] + second[1],
                np.fmin(first[2], second[2]),
                np.fmax(first[3], second[3]),
            ]
        )
        self.stride *= 2

    def finish(self):
        """Reduces what is left; the last group may be smaller than the others."""
        self.reduce()
        if self.rows:
            rest = as_numbers(self.rows)[None]
            self.groups = np.concatenate([self.groups, grouped(rest)], axis=1)
            self.rows = []

    def __len__(self):
        return self.groups.shape[1]

    def mean(self, column):
        """Returns the mean of each group, (groups,); NaN where no value is finite."""
        total, number = self.groups[:2, :, self.columns.index(column)]
        return np.divide(total, number, out=np.full(len(self), math.nan), where=number > 0)

    def low(self, column):
        return self.groups[2, :, self.columns.index(column)]

    def high(self, column):
        return self.groups[3, :, self.columns.index(column)]

    def points(self, x_column, y_column):
        """Returns the means of two columns, (points,) each, without groups that lack one of them."""
        return both_finite(self.mean(x_column), self.mean(y_column))

    def lows_and_highs(self, x_column, y_column):
        """Returns x and y, (points,) each, of a line from the lowest to the highest value of each group and
        on to the next group: on a screen it looks as a line through all values would."""
        x, low, high = self.mean(x_column), self.low(y_column), self.high(y_column)
        if self.stride == 1:
            return both_finite(x, low)
        return both_finite(np.repeat(x, 2), np.stack([low, high], axis=1).ravel())


def both_finite(x, y):
    there = np.isfinite(x) & np.isfinite(y)
    return x[there], y[there]


def as_numbers(rows):
    """Returns rows of what JSON gave for figures as an array; NaN for null and for what is no number."""
    try:
        return np.array(rows, dtype=float)
    except (ValueError, TypeError, OverflowError):
        return np.array([[number(value) for value in row] for row in rows])


def grouped(table):
    """Returns sums, numbers, minima and maxima of the finite values of table (groups, rows, columns)."""
    with np.errstate(invalid="ignore"):
        finite = np.abs(table) < LARGEST
    table = np.where(finite, table, math.nan)
    return np.stack(
        [
            np.where(finite, table, 0).sum(axis=1),
            finite.sum(axis=1),
            np.fmin.reduce(table, axis=1),
            np.fmax.reduce(table, axis=1),
        ]
    )


class Sparse:
    """A list of at most limit items: evenly spaced ones of those appended, and always the newest."""

    def __init__(self, limit=MOMENTS):
        self.limit = limit
        self.items = []
        self.newest = None
        self.step = 1
        self.count = 0

    def append(self, item):
        self.newest = item
        if self.count % self.step == 0:
            if len(self.items) == self.limit:
                del self.items[1::2]
                self.step *= 2
            if self.count % self.step == 0:
                self.items.append(item)
        self.count += 1

    def __iter__(self):
        yield from self.items
        if self.items and self.items[-1] is not self.newest:
            yield self.newest


@dataclass
class Moment:
    """Something that happened once. text: its figures, in words; samples: pairs of prompt and text."""

    iterations: float
    tokens: float
    hours: float
    text: str = ""
    samples: list = field(default_factory=list)


@dataclass
class History:
    """A run, as far as its metrics.jsonl tells.

    The loss of iteration n stands where n updates are done, so that training and validation losses at one
    place are of the same weights.
    """

    name: str
    config: dict = field(default_factory=dict)  # the newest one
    torch: str = ""
    iters: Series = field(default_factory=lambda: Series((*WHEN, *ITER)))
    evals: Series = field(default_factory=lambda: Series((*WHEN, *EVAL)))
    events: dict = field(default_factory=lambda: {kind: Sparse() for kind in EVENTS})
    samples: Sparse = field(default_factory=Sparse)
    final: dict = field(default_factory=dict)  # the figures of a line `done`
    losses: list = None  # of the last evaluation, in the order of EVAL
    best_val_loss: float = math.inf
    best_iter: float = math.nan
    last: Moment = None  # after the last line
    exact_hours: bool = True  # False: the sum over iterations, without evaluations, checkpoints and so on
    skipped: int = 0  # lines that could not be read, or are of an unknown kind

    @property
    def tokens_per_iter(self):
        return math.prod(number(self.config.get(key)) for key in SIZES)


def number(value):
    """Returns what JSON gave for a figure as a float; NaN if it is not a number."""
    if type(value) is float:
        return value
    if type(value) is int:
        try:
            return float(value)
        except OverflowError:
            return math.nan
    return math.nan


def printable(text):
    """Returns text without control characters and the like, which SVG, HTML and terminals cannot show."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


# -----------------------------------------------------------------------------
# reading


def find_metrics(folder):
    """Returns the path of the metrics.jsonl in folder, which may itself be such a file. Raises NothingYet."""
    if os.path.isfile(folder):
        return folder
    path = os.path.join(folder, "metrics.jsonl")
    if not os.path.isdir(folder):
        raise NothingYet(
            f"there is no folder {folder}; name an out_dir of train.py, as in python plot.py out"
        )
    if not os.path.isfile(path):
        raise NothingYet(f"{folder} has no metrics.jsonl, which train.py writes; name the out_dir of a run")
    return path


def read_history(folder):
    """Returns the History of a run's folder. Lines that cannot be read are counted, not fatal. Raises
    NothingYet if there is no file, or nothing in it to draw."""
    path = find_metrics(folder)
    reader = Reader(History(printable(str(folder).rstrip("/\\") or str(folder))))
    with open(path, encoding="utf-8", errors="replace", newline="\n") as f:
        while line := f.readline(LINE):
            reader.read(line)
    history = reader.history
    history.iters.finish()
    history.evals.finish()
    if not len(history.iters) and not len(history.evals):
        raise NothingYet(f"{printable(path)} has no iteration yet that could be drawn")
    return history


class Reader:
    """Fills a History line by line.

    Remembers how far the run was at the last `iter` line, to work out how far it was at lines that do not
    say so.
    """

    def __init__(self, history):
        self.history = history
        self.updates = 0  # done after the last `iter` line
        self.tokens = 0.0  # seen by then
        self.seconds = 0.0  # taken by then
        self.seconds_per_iter = 0.0
        self.tokens_per_iter = math.nan

    def read(self, line):
        try:
            figures, end = decode(line)
            iteration, kind = figures["iter"], figures["kind"]
        except (ValueError, KeyError, TypeError, RecursionError):
            if line.endswith("\n"):  # else it is being written
                self.history.skipped += 1
            return
        sound = type(iteration) is int and type(kind) is str and 0 <= iteration < 2**53
        if not sound or line[end:].strip():
            self.history.skipped += 1
        elif kind == "iter":
            self.read_iteration(iteration, figures)
        elif kind in OTHERS or kind in EVENTS:
            self.read_other(iteration, kind, figures)
        else:
            self.history.skipped += 1

    def read_iteration(self, n, figures):
        h = self.history
        dt, elapsed = number(figures.get("dt")), number(figures.get("elapsed"))
        tokens = number(figures.get("tokens"))
        iterations = n + 1 - self.updates
        if math.isnan(tokens):
            tokens = self.tokens + iterations * self.tokens_per_iter
        elif math.isnan(self.tokens_per_iter):
            self.tokens_per_iter = tokens / (n + 1)
        if math.isfinite(elapsed):
            self.seconds = elapsed
        elif math.isfinite(dt):
            self.seconds += iterations * dt
            h.exact_hours = False
        self.updates, self.tokens = n + 1, tokens
        h.last = Moment(n + 1, tokens, self.seconds / 3600)
        tokens_per_s = math.nan
        if 0 < dt < math.inf:
            self.seconds_per_iter = dt
            tokens_per_s = self.tokens_per_iter / dt
        row = [n, tokens - self.tokens_per_iter, self.seconds / 3600]
        h.iters.add([*row, *map(figures.get, ITER[:-1]), tokens_per_s])

    def read_other(self, n, kind, figures):
        h = self.history
        if kind in ("config", "resume"):
            self.read_config(n, figures)
        elif kind == "done":
            h.final = plain(figures)
            figures["elapsed"] = figures.get("seconds")
        moment = self.moment(n, figures)
        h.last = moment
        if kind == "eval":
            self.read_evaluation(moment, figures)
        elif kind == "sample":
            moment.samples = samples_of(figures)
            h.samples.append(moment)
        elif kind in EVENTS:
            if kind == "smaller_batch" and "gradient_accumulation_steps" in figures:  # an older run lacks it
                h.config |= plain(figures)
            moment.text = in_words(figures)
            h.events[kind].append(moment)

    def read_config(self, n, figures):
        h = self.history
        if type(figures.get("config")) is dict:
            h.config = plain(figures["config"])
            found = {name: figures[name] for name in FOUND if figures.get(name) is not None}
            h.config |= plain(found)
            h.torch = printable(str(figures.get("torch", ""))[:TEXT])
            self.tokens_per_iter = h.tokens_per_iter
        if figures.get("best_val_loss", 0) is None:  # it starts anew: those before do not compare
            h.best_val_loss, h.best_iter = math.inf, math.nan
        tokens = number(figures.get("tokens"))
        if math.isfinite(tokens):
            self.seconds += max(0, n - self.updates) * self.seconds_per_iter  # in no `iter` line
            self.updates, self.tokens = n, tokens
        elif not self.updates:  # the lines before this one are not here
            self.updates, self.tokens = n, n * self.tokens_per_iter

    def read_evaluation(self, moment, figures):
        h = self.history
        h.losses = [number(figures.get(name)) for name in EVAL]
        h.evals.add([moment.iterations, moment.tokens, moment.hours, *h.losses])
        val_loss = h.losses[1]
        if val_loss < h.best_val_loss:
            h.best_val_loss, h.best_iter = val_loss, moment.iterations

    def moment(self, n, figures):
        """Returns the Moment after n updates."""
        ahead = n - self.updates
        seconds = self.seconds + ahead * self.seconds_per_iter
        elapsed = number(figures.get("elapsed"))
        if math.isfinite(elapsed):
            seconds = elapsed
        tokens = number(figures.get("tokens"))
        if not math.isfinite(tokens):
            tokens = n * self.tokens_per_iter
            if self.tokens:
                tokens = self.tokens + ahead * self.tokens_per_iter
        return Moment(n, tokens, max(0.0, seconds) / 3600)


def samples_of(figures):
    """Returns the pairs (prompt, text) of a line `sample`."""
    samples = figures.get("samples")
    if type(samples) is not list:
        return []
    pairs = [(s.get("prompt", ""), s.get("text", "")) for s in samples if type(s) is dict]
    return [(printable(str(prompt)[:TEXT]), printable(str(text)[:TEXT])) for prompt, text in pairs]


def plain(figures):
    """Returns what a line says that is text, a number or a bool, apart from its kind and iteration."""
    wanted = {name: value for name, value in figures.items() if name not in ("kind", "iter")}
    return {name: value for name, value in wanted.items() if type(value) in (str, int, float, bool)}


def in_words(figures):
    """Returns the figures of a line as text: `loss 3.21, norm 15`."""
    return ", ".join(f"{name.replace('_', ' ')} {shown(value)}" for name, value in plain(figures).items())


def shown(value):
    """Returns a figure or setting as text, cut short."""
    text = str(value)
    if type(value) is float:
        text = f"{value:.6g}"
    return printable(text[:200])
