"""
What a machine can train in a given time: how many tokens each size of a model would see, and which size they
suit.

A size is a width, with a layer for each 64 of it, as in GPT-2's smallest. Its speed is measured, or lies
between two that are.
"""

import dataclasses
import math

import numpy as np

# tokens for each parameter that give the lowest loss for their compute, in Hoffmann et al. 2022, table 3
# (https://arxiv.org/abs/2203.15556): 400M parameters and 8.0B tokens
OPTIMAL = 20
WIDTHS = [*range(64, 256, 32), *range(256, 1024, 64), *range(1024, 4097, 128)]
ITERATIONS = 2000  # that a run should have at least, by smaller iterations
EVALUATING = 0.03  # share of the time for evaluations
# beta2 of runs with at most so many tokens an iteration, so that squared gradients are averaged over about as
# many tokens as with 0.95 at half a million (Marek et al. 2025, https://arxiv.org/abs/2507.07101)
FEW_TOKENS = 2**17
BETA2 = 0.99


@dataclasses.dataclass
class Size:
    """A model, without its speed."""

    n_layer: int
    n_head: int
    n_embd: int
    params: int  # in matmuls
    flops_per_token: float


@dataclasses.dataclass
class Speed:
    """What a size takes with this batch_size: seconds of the parts of an iteration, and memory."""

    batch_size: int
    micro_step: float
    update: float
    first: float  # the first micro-step, with compilation
    peak_memory: float | None = None  # bytes
    measured: bool = True


@dataclasses.dataclass
class Plan:
    """A run of a size in a given time: the keys of train.py, and the tokens that it will have seen."""

    size: Size
    speed: Speed
    keys: dict
    rate: float  # tokens per second of training
    iters: int
    evaluations: int
    tokens: int
    tried: bool = False  # rate and tokens are those of a Trial

    @property
    def ratio(self):
        return self.tokens / self.size.params


@dataclasses.dataclass
class Trial:
    """What train.py itself took in a short run of a Plan, in seconds."""

    startup: float  # until the first iteration: with compilation and the first evaluation
    iteration: float
    evaluation: float


def shape(width, arch):
    """Returns (n_layer, n_head, n_embd) of a width, with heads of 64, or of the 128 that suit arch='modern';
    of 32 where that does not divide it."""
    head = 64
    if arch == "modern" and width % 128 == 0:
        head = 128
    if width % head:
        head = 32
    return max(2, width // 64), width // head, width


def interpolate(size, known):
    """Returns the Speed of a size between those in known, [(Size, Speed)]: seconds grow like powers of the
    FLOPs and of the parameters."""
    known = sorted(known, key=lambda pair: pair[0].flops_per_token)
    sizes, speeds = zip(*known, strict=True)
    nearest = min(known, key=lambda pair: abs(pair[0].n_embd - size.n_embd))[1]
    per_sequence = between(
        size.flops_per_token,
        [s.flops_per_token for s in sizes],
        [s.micro_step / s.batch_size for s in speeds],
    )
    update = between(size.params, [s.params for s in sizes], [s.update for s in speeds])
    first = between(size.params, [s.params for s in sizes], [s.first for s in speeds])
    micro_step = per_sequence * nearest.batch_size
    return Speed(nearest.batch_size, micro_step, update, first, nearest.peak_memory, measured=False)


def between(x, xs, ys):
    return float(np.exp(np.interp(math.log(x), np.log(xs), np.log(ys))))


def plan(size, speed, seconds, block_size, most_sequences, most_eval_iters):
    """Returns the Plan of a run of so many seconds, with at most most_sequences sequences in an iteration and
    most_eval_iters dozens of windows in an evaluation."""
    left = max(0.0, seconds - 1.5 * speed.first)  # the graph of evaluations is compiled too
    per_sequence = speed.micro_step / speed.batch_size
    sequences = left / per_sequence
    per_iter = min(most_sequences, max(1, round(sequences / ITERATIONS)))
    batch_size = min(speed.batch_size, per_iter)
    accumulation = max(1, per_iter // batch_size)
    iteration = per_sequence * batch_size * accumulation + speed.update
    evaluations, eval_iters = evaluating(EVALUATING * left, per_sequence, most_eval_iters)
    left -= evaluations * evaluation_seconds(eval_iters, per_sequence)
    iters = max(1, int(left / iteration))
    keys = dict(n_layer=size.n_layer, n_head=size.n_head, n_embd=size.n_embd)
    keys |= dict(batch_size=batch_size, gradient_accumulation_steps=accumulation, eval_iters=eval_iters)
    keys |= dict(max_minutes=max(0.001, round(seconds / 60, 3)), **lengths(iters, evaluations))
    tokens = batch_size * accumulation * block_size
    return Plan(size, speed, keys, tokens / iteration, iters, evaluations, iters * tokens)


def lengths(iters, evaluations):
    """Returns the keys that depend on how many iterations there will be; the time ends the run, not they."""
    interval = math.ceil(iters / (evaluations - 1))
    return dict(
        warmup_iters=iters // 20, eval_interval=interval, max_iters=10 * iters, lr_decay_iters=10 * iters
    )


def as_tried(plan, trial, seconds):
    """Returns the Plan of the same run with what a Trial of it took, instead of its parts one by one."""
    left = max(0.0, seconds - trial.startup - (plan.evaluations - 1) * trial.evaluation)
    iters = max(1, int(left / trial.iteration))
    tokens = plan.tokens // plan.iters
    keys = plan.keys | lengths(iters, plan.evaluations)
    changes = dict(keys=keys, rate=tokens / trial.iteration, iters=iters, tokens=iters * tokens)
    return dataclasses.replace(plan, **changes, tried=True)


def evaluating(seconds, per_sequence, most_eval_iters):
    """Returns (evaluations, eval_iters) that take about so many seconds: the first, the last and, if there is
    time, some between."""
    for evaluations in (11, 5, 2):
        eval_iters = int(seconds / evaluations / evaluation_seconds(1, per_sequence))
        if eval_iters:
            return evaluations, min(most_eval_iters, eval_iters)
    return 2, 1


def evaluation_seconds(eval_iters, per_sequence):
    """Returns the time of an evaluation: 12 * eval_iters windows of both splits, at a third of training's
    work."""
    return 2 * 12 * eval_iters * per_sequence / 3


def nearest_to_optimal(plans):
    return min(plans, key=lambda p: abs(math.log(p.ratio / OPTIMAL)))


def optimal(rate, seconds, size_of):
    """Returns the position in WIDTHS of the largest width that sees OPTIMAL tokens for each parameter or more
    at this rate in FLOP/s. size_of(width) is its Size."""
    fitting = 0
    for position, width in enumerate(WIDTHS):
        size = size_of(width)
        if seconds * rate / size.flops_per_token < OPTIMAL * size.params:
            break
        fitting = position
    return fitting


def table(plans, best, train_tokens):
    """Returns the lines of a table of plans. train_tokens: of the prepared data; None: there are none."""
    heads = "n_embd n_layer parameters tokens/s tokens per_param batch_size peak_GB epochs".split()
    lines = ["".join(f"{head:>11}" for head in heads)]
    for p in plans:
        memory, epochs = "n/a", "n/a"
        if p.speed.measured and p.speed.peak_memory and p.speed.batch_size == p.keys["batch_size"]:
            memory = f"{p.speed.peak_memory / 1e9:.2f}"
        if train_tokens:
            epochs = f"{p.tokens / train_tokens:.3g}"
        cells = [p.size.n_embd, p.size.n_layer, f"{p.size.params / 1e6:.1f}M", f"{p.rate:,.0f}"]
        cells += [f"{p.tokens / 1e6:,.1f}M", f"{p.ratio:.1f}", p.keys["batch_size"], memory, epochs]
        line = "".join(f"{cell:>11}" for cell in cells)
        if not p.speed.measured and not p.tried:
            line += "  interpolated"
        if p is best:
            line += f"  nearest to {OPTIMAL} tokens per parameter"
        lines.append(line)
    return lines
