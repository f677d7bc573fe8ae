"""
How much does the recipe learn from a token, beside modded-nanogpt's tuned baseline and beside GPT-2?

    python benchmarks/compare_modded.py --modded=../modded-nanogpt --dataset=fineweb --size=3m --jobs=2

The peer is records/track_3_optimization/train_gpt_simple.py of
https://github.com/KellerJordan/modded-nanogpt: its model, initialisation, optimizers and schedule are those
of that file, read when this program runs. Ours in their place are the number of iterations, the sizes, a
torch.distributed of one process, and, with --dtype=float32, no casts to bfloat16. All three models are as
wide and deep, see the same windows in the same order in iterations of the same size, and are evaluated on the
same windows by the same sum; each is trained with its learning rates times each of `rates` and from several
seeds, and the recipe, at its best rate, also with a part of the tokens (its whole schedule in so many
iterations fewer).

Results are written to --json after every run, and a run that is in there is not made again. `jobs` runs go
at the same time, on a CPU of one thread each.
"""

import ast
import functools
import json
import multiprocessing
import os
import platform
import re
import statistics
import sys
import time
import types
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from configurator import Config, from_command_line, key, run_script
from model import GPTConfig, make_gpt
from sologpt import hardware, shards
from sologpt.errors import UserError
from sologpt.files import atomic_file, unwritable
from sologpt.optim import make_optimizers
from sologpt.tokenizer import read_tokenizer
from train import (
    TrainConfig,
    estimate_loss,
    inputs_and_targets,
    micro_batches,
    micro_step,
    prepare_model,
    set_learning_rate,
    update,
)

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SCRIPT = "records/track_3_optimization/train_gpt_simple.py"
SIZES = {  # parameters of the blocks; the vocabulary comes on top
    "tiny": "--n_layer=1 --n_embd=128 --block_size=32 --batch_size=4 --gradient_accumulation_steps=2",
    "1m": "--n_layer=4 --n_embd=128 --block_size=128 --batch_size=16 --gradient_accumulation_steps=1",
    "3m": "--n_layer=4 --n_embd=256 --block_size=256 --batch_size=16 --gradient_accumulation_steps=1",
    "10m": "--n_layer=6 --n_embd=384 --block_size=256 --batch_size=32 --gradient_accumulation_steps=1",
    "10m_short": "--n_layer=6 --n_embd=384 --block_size=256 --batch_size=16 --gradient_accumulation_steps=1",
    "short": "--n_layer=12 --n_embd=768 --block_size=1024 --batch_size=8 --gradient_accumulation_steps=16",
    "gpu": "--n_layer=12 --n_embd=768 --block_size=1024 --batch_size=64 --gradient_accumulation_steps=8",
}
CONFIGS = dict(ours="config/fineweb_125m_fast.py", gpt2="config/fineweb_125m.py")
HEAD = dict(ours=128, gpt2=64, peer=128)  # components of a head
WARMUP = 5  # iterations that are not timed
RECIPE = "arch optimizer learning_rate beta1 beta2 weight_decay grad_clip schedule cooldown_frac warmup_iters"
RECIPE = (*RECIPE.split(), "min_lr")  # runs in which these keys of a config were others do not compare


@dataclass
class CompareConfig(Config):
    modded: str = key("", "checkout of modded-nanogpt")
    dataset: str = key("fineweb", "folder of token files with GPT-2's ids: one under data/, or a path")
    size: str = key(
        "3m",
        "size of the models; gpu: 124M; short: 124M with a quarter, 10m_short: 10m with half of the tokens "
        "an iteration",
        choices=tuple(SIZES),
    )
    vocab: int = key(8192, "keep the most frequent ids, all others become one; 0: all, as for a GPU", low=0)
    iters: int = key(600, "iterations of a whole run", low=10)
    models: str = key("peer,ours,gpt2", "which of the three, with commas between them")
    rates: str = key("0.5,1,2", "factors on the learning rates")
    gpt2_learning_rate: float = key(2e-3, "the learning rate that is factor 1 for GPT-2 with AdamW", above=0)
    parts: str = key("0.75,0.6", "parts of the tokens that ours is also trained with; empty: none")
    seeds: str = key("1,2,3", "of weights and the order of data")
    eval_windows: int = key(512, "windows of the validation split to evaluate on", low=1)
    evaluations: int = key(10, "how often a run is evaluated, before its end", low=1)
    jobs: int = key(1, "runs at the same time, of one thread each if there are several", low=1)
    device: str = key("", "cuda, cuda:N or cpu; empty: the best available")
    dtype: str = key(
        "bfloat16", "of the matmuls; on a CPU without bf16 float32 is faster", choices=("bfloat16", "float32")
    )
    compile: bool = key(False, "compile all models; the first iterations then take a minute")
    json: str = key("out-compare-modded.json", "file of the results")
    plot: str = key("", "PNG file to draw the curves to (pip install matplotlib)")

    def problems(self):
        found = []
        if "peer" in self.models.split(",") and not os.path.isfile(os.path.join(self.modded, SCRIPT)):
            found.append(f"modded={self.modded!r} has no {SCRIPT}; give a checkout of modded-nanogpt")
        unknown = set(self.models.split(",")) - {"peer", *CONFIGS}
        if unknown:
            found.append(f"models has {', '.join(sorted(unknown))}; there are peer, {', '.join(CONFIGS)}")
        found += not_numbers("rates", self.rates) + not_numbers("seeds", self.seeds)
        if self.parts:
            found += not_numbers("parts", self.parts)
        if not found:
            few = [part for part in numbers(self.parts) if round(part * self.iters) <= WARMUP]
            found += [f"parts={part:g} of {self.iters} iterations are too few to time" for part in few]
        return found + unwritable("json", self.json) + unwritable("plot", self.plot)


@dataclass(frozen=True)
class Run:
    model: str
    rate: float  # factor on its learning rates
    iters: int
    seed: int


def numbers(text):
    return [float(x) for x in text.split(",") if x]


def not_numbers(key, text):
    """Returns messages, none or one, if the text of a key is not one or more numbers."""
    try:
        if numbers(text):
            return []
    except ValueError:
        pass
    return [f"{key}={text!r} must be one or more numbers with commas between them"]


# -----------------------------------------------------------------------------
# data


class FrequentIds(shards.Windows):
    """Windows in which the most frequent ids are 0, 1, ..., and all others one more."""

    def read(self, windows, shifts=0):
        return self.new_id[super().read(windows, shifts)]


def new_ids(train, vocab):
    """Returns for each id, int64 (n_ids,), its rank by frequency in the first 2**24 training tokens, but at
    most vocab - 1."""
    shard = train.shards[0]
    tokens = np.fromfile(shard.path, shard.dtype, 2**24, offset=shard.offset)
    by_count = np.bincount(tokens, minlength=train.n_ids).argsort(kind="stable")[::-1]
    rank = np.empty(train.n_ids, dtype=np.int64)
    rank[by_count] = np.arange(train.n_ids)
    return np.minimum(rank, vocab - 1)


def open_data(cfg, block_size):
    """Returns the Windows of both splits, and the number of rows that an embedding of their ids needs."""
    folder = shards.find_data(cfg.dataset)
    tokenizer = read_tokenizer(folder)
    train, val = shards.open_splits(folder, block_size, tokenizer.vocab_size)
    if not cfg.vocab:
        return train, val, tokenizer.embedding_rows()
    for windows in (train, val):
        windows.__class__ = FrequentIds
        windows.new_id = new_ids(train, cfg.vocab)
    return train, val, cfg.vocab


# -----------------------------------------------------------------------------
# the peer, from its own file


def read_peer(path, dtype):
    """Returns (definitions, set-up) of the peer's script, two code objects: its imports, classes and
    functions; and what its loop over trials does before training, without the number of iterations. With
    dtype="float32" what it casts to bfloat16 stays in float32.

    Raises UserError if the script is not laid out as it was when this was written.
    """
    with open(path, encoding="utf-8") as f:
        tree = ast.parse(f.read())
    for node in ast.walk(tree):
        if dtype == "float32" and isinstance(node, ast.Attribute) and node.attr == "bfloat16":
            node.attr = "float"  # a method of a tensor, and a dtype of torch
    kinds = (ast.Import, ast.ImportFrom, ast.ClassDef, ast.FunctionDef)
    definitions = [node for node in tree.body if isinstance(node, kinds)]
    trials = [node for node in tree.body if isinstance(node, ast.For)]
    body = trials[0].body if trials else []
    last = [i for i, node in enumerate(body) if getattr(node, "name", "") == "set_hparams"]
    if not last:
        raise UserError(f"{path} has no loop that defines set_hparams; this file knows an earlier version")
    setup = [node for node in body[: last[0] + 1] if not assigns(node, "train_steps")]
    parts = [ast.Module(body=nodes, type_ignores=[]) for nodes in (definitions, setup)]
    return [compile(part, path, "exec") for part in parts]


def assigns(node, name):
    return isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == name


def alone():
    """Returns what the peer calls of torch.distributed, for one process."""
    return types.SimpleNamespace(
        get_world_size=lambda: 1, get_rank=lambda: 0, all_gather=lambda parts, part: None
    )


class Peer:
    """modded-nanogpt's model and optimizers."""

    def __init__(self, cfg, keys, vocab_size, run, machine):
        definitions, setup = read_peer(os.path.join(cfg.modded, SCRIPT), cfg.dtype)
        self.names = {"__name__": "peer"}
        exec(definitions, self.names)
        self.names |= dict(dist=alone(), train_steps=run.iters)
        self.model = self.names["GPT"](vocab_size, keys.n_layer, keys.n_embd).to(machine.device)
        if cfg.compile:
            self.model.compile(dynamic=False)
        self.names["model"] = self.model
        exec(setup, self.names)
        for optimizer in self.names["optimizers"]:
            for group in optimizer.param_groups:
                group["initial_lr"] *= run.rate
        self.machine = machine

    def loss(self, tokens):
        """Returns the sum of the losses of all tokens, as its forward does."""
        return self.model(*inputs_and_targets(tokens, self.machine.device))

    def iteration(self, it, batches, accumulation):
        for _ in range(accumulation):
            self.loss(next(batches)).backward()
        self.names["set_hparams"](it)
        for optimizer in self.names["optimizers"]:
            optimizer.step()
        self.model.zero_grad(set_to_none=True)

    @torch.no_grad()
    def evaluate(self, windows, count, batch_size):
        self.model.eval()
        total = 0
        for chosen in windows.spread(count).reshape(-1, batch_size):
            total += self.loss(torch.from_numpy(windows.read(chosen)))
        self.model.train()
        return total.item() / (count * windows.block_size)


# -----------------------------------------------------------------------------
# ours


class Ours:
    """This project's model and optimizers, through the functions that train.py itself calls."""

    def __init__(self, cfg, keys, vocab_size, run, machine):
        self.run = run
        self.model = self.make_model(keys, vocab_size)
        prepare_model(self.model, keys, machine)
        self.optimizers = self.make_optimizers(keys, machine)
        self.scaler = torch.amp.GradScaler(machine.device.type, enabled=machine.dtype == "float16")
        self.keys = keys
        self.machine = machine

    def make_model(self, keys, vocab_size):
        sizes = {name: getattr(keys, name) for name in ("block_size", "n_layer", "n_head", "n_embd", "bias")}
        return make_gpt(GPTConfig(**sizes, vocab_size=vocab_size, arch=keys.arch))

    def make_optimizers(self, keys, machine):
        return make_optimizers(self.model, keys, machine.device)

    def iteration(self, it, batches, accumulation):
        set_learning_rate(self.optimizers, it, self.keys)
        for _ in range(accumulation):
            micro_step(self.model, next(batches), self.scaler, self.machine, accumulation)
        update(self.model, self.optimizers, self.scaler, self.keys.grad_clip)

    def evaluate(self, windows, count, batch_size):
        return estimate_loss(self.model, windows, count, batch_size, self.machine)


def keys_of(cfg, run):
    """Returns the TrainConfig of a run: our config of the recipe or of GPT-2, in this size."""
    width = int(re.search(r"n_embd=(\d+)", SIZES[cfg.size])[1])
    config = os.path.join(ROOT, CONFIGS.get(run.model, CONFIGS["ours"]))
    argv = [config, *SIZES[cfg.size].split(), f"--seed={run.seed}"]
    argv += [f"--n_head={width // HEAD[run.model]}", f"--compile={cfg.compile}", f"--dtype={cfg.dtype}"]
    if cfg.size != "gpu":
        argv.append("--beta2=0.99")  # few tokens per iteration, as in config/text_1m.py
    keys = from_command_line(TrainConfig, "", argv)
    rate = keys.learning_rate
    if run.model == "gpt2":
        rate = cfg.gpt2_learning_rate
    scaled = dict(
        warmup_iters=round(keys.warmup_iters / keys.max_iters * run.iters),
        learning_rate=rate * run.rate,
        min_lr=keys.min_lr / keys.learning_rate * rate * run.rate,
        max_iters=run.iters,
        lr_decay_iters=run.iters,
    )
    return replace(keys, **scaled)


# -----------------------------------------------------------------------------
# runs


def train(cfg, run):
    return train_as(Peer if run.model == "peer" else Ours, cfg, run)


def train_as(made, cfg, run):
    """Trains one model. Returns its run and results, a dict: the validation losses along it as (tokens,
    nats), the last one, and the median seconds of an iteration."""
    keys = keys_of(cfg, run)
    machine = hardware.find_machine(replace(keys, device=cfg.device))
    hardware.forget_compiled(machine.device)  # of the runs before
    stance = "default" if cfg.compile else "force_eager"
    with torch.compiler.set_stance(stance):  # also for what the peer compiles by itself
        curve, seconds = train_on(open_data(cfg, keys.block_size), made, cfg, keys, run, machine)
    return asdict(run) | dict(curve=curve, loss=curve[-1][1], seconds=statistics.median(seconds[WARMUP:]))


def train_on(data, made, cfg, keys, run, machine):
    """Returns the curve of validation losses, and the seconds of each iteration."""
    windows, val, vocab_size = data
    torch.manual_seed(run.seed)
    trained = made(cfg, keys, vocab_size, run, machine)
    batches = micro_batches(windows, 0, keys, machine.device)
    count = max(1, min(cfg.eval_windows, len(val)) // keys.batch_size) * keys.batch_size
    curve, seconds = [], []
    for it in range(run.iters):
        if it % max(1, run.iters // cfg.evaluations) == 0:
            curve.append((it * keys.tokens_per_iter, trained.evaluate(val, count, keys.batch_size)))
        start = time.perf_counter()
        trained.iteration(it, batches, keys.gradient_accumulation_steps)
        machine.synchronize()
        seconds.append(time.perf_counter() - start)
    batches.close()
    curve.append((run.iters * keys.tokens_per_iter, trained.evaluate(val, count, keys.batch_size)))
    return curve, seconds


class Results:
    """The runs that train(cfg, run) has made so far, in the JSON file."""

    def __init__(self, cfg, train):
        self.cfg = cfg
        self.train = train
        described = asdict(cfg)
        same = ("dataset", "size", "vocab", "eval_windows", "dtype", "compile", "gpt2_learning_rate")
        about = {name: described[name] for name in same if name in described}
        about["recipes"] = {}
        for model in ("ours", "gpt2") if "gpt2_learning_rate" in described else ("ours",):
            keys = keys_of(cfg, Run(model, rate=1.0, iters=1000, seed=1))
            about["recipes"][model] = {name: getattr(keys, name) for name in RECIPE}
        machine = dict(python=platform.python_version(), torch=torch.__version__, cores=os.cpu_count())
        self.content = dict(about=about, machine=machine, runs=[])
        if os.path.exists(cfg.json):
            with open(cfg.json, encoding="utf-8") as f:
                self.content = json.load(f)
            if self.content["about"] != about:
                raise UserError(
                    f"{cfg.json} holds runs of other settings or of another recipe; name another file with "
                    "--json="
                )

    def of(self, run):
        found = [entry for entry in self.content["runs"] if entry.items() >= asdict(run).items()]
        return found[0] if found else None

    def make(self, runs):
        """Makes those of the runs that are missing, cfg.jobs at a time, several in processes of their own."""
        missing = [run for run in runs if not self.of(run)]
        failed = []
        for run, result in self.results_of(missing):
            try:
                self.keep(run, result())
            except Exception as e:  # the results of the others are kept
                failed.append(f"{run}: {e}")
        if failed:
            raise UserError("; ".join(failed))

    def results_of(self, runs):
        """Yields (run, a function that returns its result or raises its error), as they end."""
        if self.cfg.jobs == 1:
            for run in runs:
                yield run, functools.partial(self.train, self.cfg, run)
            return
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(self.cfg.jobs, spawn, torch.set_num_threads, [1]) as pool:
            futures = {pool.submit(self.train, self.cfg, run): run for run in runs}
            for future in as_completed(futures):
                yield futures[future], future.result

    def keep(self, run, entry):
        self.content["runs"].append(entry)
        with atomic_file(self.cfg.json) as f:
            f.write(json.dumps(self.content).encode())
        print(f"{run}: {entry['loss']:.4f}", file=sys.stderr, flush=True)

    def mean(self, model, rate, iters):
        """Returns the mean loss over the seeds."""
        seeds = [int(seed) for seed in numbers(self.cfg.seeds)]
        return statistics.mean(self.of(Run(model, rate, iters, seed))["loss"] for seed in seeds)


def main(argv):
    cfg = from_command_line(CompareConfig, __doc__, argv)
    results = Results(cfg, train)
    models, rates, seeds = cfg.models.split(","), numbers(cfg.rates), numbers(cfg.seeds)
    results.make(
        [Run(model, rate, cfg.iters, int(seed)) for seed in seeds for model in models for rate in rates]
    )
    best = {model: min(rates, key=lambda rate: results.mean(model, rate, cfg.iters)) for model in models}
    rows = [(model, rate, cfg.iters) for model in models for rate in rates]
    if "ours" in models:
        parts = [round(part * cfg.iters) for part in numbers(cfg.parts)]
        results.make([Run("ours", best["ours"], iters, int(seed)) for seed in seeds for iters in parts])
        rows += [("ours", best["ours"], iters) for iters in parts]
    print("| model | learning rates | tokens | validation loss: mean, each seed | ms an iteration |")
    print("|---|---|---|---|---|")
    for model, rate, iters in rows:
        entries = [results.of(Run(model, rate, iters, int(seed))) for seed in seeds]
        each = ", ".join(f"{entry['loss']:.4f}" for entry in entries)
        mean = statistics.mean(entry["loss"] for entry in entries)
        ms = 1e3 * statistics.median(entry["seconds"] for entry in entries)
        tokens = entries[0]["curve"][-1][0]
        print(f"| {model} | x {rate:g} | {tokens / 1e6:.2f}M | {mean:.4f}: {each} | {ms:.1f} |")
    if cfg.plot:
        draw(cfg, results, best)


def draw(cfg, results, best):
    """Draws validation loss over tokens, the mean of the seeds and their range, each at its best rates."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = dict(peer="modded-nanogpt, track 3", ours="the recipe", gpt2="GPT-2, AdamW")
    axes = pyplot.figure(figsize=(9, 5.5), layout="constrained").subplots()
    for model, rate in best.items():
        runs = [results.of(Run(model, rate, cfg.iters, int(seed))) for seed in numbers(cfg.seeds)]
        tokens = [tokens / 1e6 for tokens, _ in runs[0]["curve"][1:]]
        losses = np.array([[loss for _, loss in run["curve"][1:]] for run in runs])
        axes.plot(tokens, losses.mean(0), marker=".", label=f"{names[model]} (rates x {rate:g})")
        axes.fill_between(tokens, losses.min(0), losses.max(0), alpha=0.2)
    axes.set(xlabel="million tokens", ylabel="validation loss, nats per token", yscale="log")
    for formatted in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        formatted("{x:g}")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    axes.figure.savefig(cfg.plot, dpi=110)


if __name__ == "__main__":
    run_script(main)
