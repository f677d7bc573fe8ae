"""
What does each part of the recipe bring? A ladder from GPT-2 with AdamW to arch="modern" with Muon.

    python benchmarks/recipe.py --dataset=fineweb --size=3m --jobs=2

Each rung has the parts of all those above it, and is trained from several seeds on the same windows in the
same order. Models, sizes, data and results are as in compare_modded.py, which also searches learning rates
and gives the recipe fewer tokens.
"""

import os
import statistics
import sys
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn as nn

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import candidates
import compare_modded
from compare_modded import Results, keys_of, not_numbers, numbers, train_as

from configurator import Config, from_command_line, key, run_script
from sologpt import optim
from sologpt.files import unwritable

PARTS = dict(
    cooldown="constant learning rate, then a cooldown over the last 0.7, instead of a cosine",
    muon="Muon for the matrices of the blocks",
    rows="even rows in its updates",
    blocks="rotary positions, normalised q and k, heads of 128, RMSNorm, squared ReLU, projections from zero",
    head="head of its own, from zero, with 768 / n_embd times the learning rate",
    cap="capped logits",
    embedding="shortcut from the embedding",
    values="shortcut from the first block's values",
    table="value embeddings",
    smear="smeared embedding",
    rates="4 times the learning rate for mixing weights and value embeddings, betas 0.8 and eps 1e-10",
)


@dataclass
class RecipeConfig(Config):
    dataset: str = key("fineweb", "folder of token files with GPT-2's ids: one under data/, or a path")
    size: str = key("3m", "size of the models; gpu: 124M", choices=tuple(compare_modded.SIZES))
    vocab: int = key(8192, "keep the most frequent ids, all others become one; 0: all, as for a GPU", low=0)
    iters: int = key(400, "iterations of a run", low=10)
    gpt2_learning_rate: float = key(2e-3, "of GPT-2 with AdamW", above=0)
    seeds: str = key("1,2,3", "of weights and the order of data")
    eval_windows: int = key(512, "windows of the validation split to evaluate on", low=1)
    evaluations: int = key(16, "how often a run is evaluated, before its end", low=1)
    jobs: int = key(1, "runs at the same time, of one thread each if there are several", low=1)
    device: str = key("", "cuda, cuda:N or cpu; empty: the best available")
    dtype: str = key(
        "bfloat16", "of the matmuls; on a CPU without bf16 float32 is faster", choices=("bfloat16", "float32")
    )
    compile: bool = key(False, "compile the models; the first iterations then take a minute")
    json: str = key("out-recipe.json", "file of the results")
    plot: str = key("", "PNG file to draw the curves to (pip install matplotlib)")

    def problems(self):
        found = not_numbers("seeds", self.seeds)
        return found + unwritable("json", self.json) + unwritable("plot", self.plot)


@dataclass(frozen=True)
class Run:
    parts: int  # how many of PARTS it has
    seed: int
    iters: int
    rate: float = 1.0

    @property
    def model(self):
        """Returns whose keys it starts from, ours or gpt2."""
        return "ours" if self.has("blocks") else "gpt2"

    def has(self, part):
        return part in list(PARTS)[: self.parts]


class Rung(compare_modded.Ours):
    """GPT-2 or the modern architecture with some of PARTS, through the functions of train.py."""

    def __init__(self, cfg, keys, vocab_size, run, machine):
        if run.has("cooldown"):
            keys = replace(keys, schedule="wsd", min_lr=0.0)
        if run.has("muon"):
            recipe = keys_of(cfg, Run(len(PARTS), run.seed, run.iters))
            keys = replace(keys, optimizer="muon", learning_rate=recipe.learning_rate)
        super().__init__(cfg, keys, vocab_size, run, machine)

    def make_model(self, keys, vocab_size):
        model = super().make_model(keys, vocab_size)
        if self.run.has("blocks"):
            leave_out(model, self.run)
        return model

    def make_optimizers(self, keys, machine):
        optimizers = super().make_optimizers(keys, machine)
        if not self.run.has("rates"):
            for group in optimizers["optimizer"].param_groups:
                group |= dict(betas=(0.9, keys.beta2), eps=1e-8)
                if group["rate"] == optim.FAST_RATE:
                    group["rate"] = 1.0
        if self.run.has("muon") and not self.run.has("rows"):
            optimizers["muon"].__class__ = candidates.Muon
            optimizers["muon"].parts = {"uneven_rows"}
        return optimizers


def leave_out(model, run):
    """Takes those parts of the modern architecture out of a model that the run does not have."""
    if not run.has("head"):
        model.lm_head.weight = model.transformer.wte.weight  # tied, as GPT-2's
    if not run.has("cap"):
        model.softcap = 1e4  # far above any logit
    model.smear.requires_grad_(run.has("smear"))  # else it stays at 0
    model.transformer.wve.requires_grad_(run.has("table"))
    for block in model.transformer.h:
        block.x_mix.requires_grad_(run.has("embedding"))  # else it stays at 1, 0
        block.attn.has_ve &= run.has("table")
        if not run.has("values"):
            block.attn.v_mix = nn.Parameter(torch.tensor([1.0, 0.0]), requires_grad=False)


def train(cfg, run):
    return train_as(Rung, cfg, run)


def tokens_to(loss, curves):
    """Returns after how many tokens the mean of curves of (tokens, loss) is at a loss, linearly between its
    points, or None."""
    tokens = [tokens for tokens, _ in curves[0]]
    means = [statistics.mean(point[1] for point in points) for points in zip(*curves, strict=True)]
    for i in range(1, len(tokens)):
        if means[i] <= loss:
            share = (means[i - 1] - loss) / (means[i - 1] - means[i])
            return tokens[i - 1] + share * (tokens[i] - tokens[i - 1])
    return None


def main(argv):
    cfg = from_command_line(RecipeConfig, __doc__, argv)
    results = Results(cfg, train)
    seeds = [int(seed) for seed in numbers(cfg.seeds)]
    ladder = [[Run(parts, seed, cfg.iters) for seed in seeds] for parts in range(len(PARTS) + 1)]
    results.make([run for runs in zip(*ladder, strict=True) for run in runs])  # all of a seed first

    rungs = [[results.of(run) for run in runs] for runs in ladder]
    names = ["GPT-2, AdamW, cosine", *[f"+ {about}" for about in PARTS.values()]]
    losses = np.array([[entry["loss"] for entry in rung] for rung in rungs])
    goal = statistics.mean(losses[0])  # as tokens_to takes the mean
    print(
        "| rung, each with those above it | validation loss: mean, each seed | change: mean, each seed "
        "| tokens to the first one's loss | ms an iteration |\n|---|---|---|---|---|"
    )
    for i, rung in enumerate(rungs):
        changes = losses[i] - losses[max(i - 1, 0)]
        tokens = tokens_to(goal, [entry["curve"] for entry in rung])
        share = "not reached"
        if tokens:
            share = f"{tokens / rung[0]['curve'][-1][0]:.2f}"
        ms = 1e3 * statistics.median(entry["seconds"] for entry in rung)
        print(f"| {names[i]} | {listed(losses[i], '.4f')} | {listed(changes, '+.3f')} | {share} | {ms:.0f} |")
    if cfg.plot:
        draw(cfg.plot, rungs)


def listed(values, digits):
    """Returns the mean of values and each of them, as text."""
    each = ", ".join(f"{value:{digits}}" for value in values)
    return f"{values.mean():{digits}}: {each}"


def draw(path, rungs):
    """Draws the mean curves of the rungs to a PNG file, of the first and the last also the range."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    axes = pyplot.figure(figsize=(9, 5.5), layout="constrained").subplots()
    colours = pyplot.get_cmap("viridis")(np.linspace(0, 0.95, len(rungs)))
    labels = ["GPT-2, AdamW", *[f"+ {name}" for name in PARTS]]
    for label, rung, colour in zip(labels, rungs, colours, strict=True):
        tokens = [tokens / 1e6 for tokens, _ in rung[0]["curve"][1:]]
        losses = np.array([[loss for _, loss in entry["curve"][1:]] for entry in rung])
        axes.plot(tokens, losses.mean(0), color=colour, marker=".", label=label)
        if rung in (rungs[0], rungs[-1]):
            axes.fill_between(tokens, losses.min(0), losses.max(0), color=colour, alpha=0.2)
    axes.set(xlabel="million tokens", ylabel="validation loss, nats per token", yscale="log")
    for formatted in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        formatted("{x:g}")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    axes.figure.savefig(path, dpi=110)


if __name__ == "__main__":
    run_script(main)
