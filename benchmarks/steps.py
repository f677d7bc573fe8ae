"""
One iteration of nanoGPT, of our GPT-2 and of the recipe, in turn in one process: time and memory.

    python benchmarks/steps.py --nanogpt=../nanoGPT --dataset=fineweb --batch_size=16

All three are as wide and deep as config/fineweb_125m.py says, and take the same micro-batches, read by a
thread. nanoGPT's side is its own model and AdamW, with the loop of its train.py around them: autocast,
gradients summed over the micro-batches, clipped, scaled. A round is `iters` iterations of each, between two
waits for the device; the ratio of a round does not depend on how fast the machine happens to be. Memory is
the most that torch allocated for each alone, on a CUDA GPU. benchmarks/compare_nanogpt.py compares the whole
programs, from their start to the last checkpoint.
"""

import importlib.util
import json
import os
import shlex
import statistics
import sys
import time
from dataclasses import asdict, dataclass, replace

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from bench import driver_version
from configurator import from_command_line, key, run_script
from model import GPTConfig, make_gpt
from sologpt import hardware, shards
from sologpt.files import unwritable
from sologpt.optim import make_optimizers
from sologpt.tokenizer import read_tokenizer
from train import TrainConfig, inputs_and_targets, micro_batches, micro_step, prepare_model, update

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
GPT2 = os.path.join(ROOT, "config/fineweb_125m.py")
RECIPE = dict(arch="modern", optimizer="muon", learning_rate=4e-3)


@dataclass
class StepsConfig(TrainConfig):
    # comparison
    nanogpt: str = key("", "checkout of nanoGPT")
    rounds: int = key(5, "how often each takes its turn", low=1)
    iters: int = key(5, "iterations in a turn", low=1)
    json: str = key("", "file to write the figures to")

    def problems(self):
        found = super().problems()
        if not os.path.isfile(os.path.join(self.nanogpt, "model.py")):
            found.append(
                f"nanogpt={self.nanogpt!r} has no model.py; give a checkout of github.com/karpathy/nanoGPT"
            )
        if (self.arch, self.optimizer) != ("gpt2", "adamw"):
            found.append("leave arch and optimizer out: GPT-2 with AdamW and the recipe are both measured")
        return found + unwritable("json", self.json)


class NanoGPT:
    """nanoGPT's model and optimizer, and what its train.py does with them in an iteration."""

    def __init__(self, cfg, sizes, machine):
        spec = importlib.util.spec_from_file_location("nanogpt_model", os.path.join(cfg.nanogpt, "model.py"))
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        self.model = module.GPT(module.GPTConfig(**sizes, dropout=cfg.dropout)).to(machine.device)
        settings = (cfg.weight_decay, cfg.learning_rate, (cfg.beta1, cfg.beta2), machine.device.type)
        self.optimizer = self.model.configure_optimizers(*settings)
        self.forward = torch.compile(self.model) if cfg.compile else self.model
        self.scaler = torch.amp.GradScaler(machine.device.type, enabled=machine.dtype == "float16")
        self.cfg = cfg
        self.machine = machine

    def iteration(self, batches):
        accumulation = self.cfg.gradient_accumulation_steps
        for _ in range(accumulation):
            x, y = inputs_and_targets(next(batches), self.machine.device)
            with self.machine.autocast():
                _, loss = self.forward(x, y)
            self.scaler.scale(loss / accumulation).backward()
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.cfg.grad_clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)


class Ours:
    """An iteration as in our train.py, by its functions."""

    def __init__(self, cfg, sizes, machine):
        self.model = make_gpt(GPTConfig(**sizes, dropout=cfg.dropout, arch=cfg.arch))
        prepare_model(self.model, cfg, machine)
        self.optimizers = make_optimizers(self.model, cfg, machine.device)
        self.scaler = torch.amp.GradScaler(machine.device.type, enabled=machine.dtype == "float16")
        self.cfg = cfg
        self.machine = machine

    def iteration(self, batches):
        accumulation = self.cfg.gradient_accumulation_steps
        for _ in range(accumulation):
            micro_step(self.model, next(batches), self.scaler, self.machine, accumulation)
        update(self.model, self.optimizers, self.scaler, self.cfg.grad_clip)


def warmed_up(make, cfg, sizes, machine, batches):
    """Makes one of the three and takes two iterations, which compile it. Returns it and the most bytes of
    memory that it took, None off CUDA."""
    on_cuda = machine.device.type == "cuda"
    before = 0
    if on_cuda:
        torch.cuda.reset_peak_memory_stats(machine.device)
        before = torch.cuda.memory_allocated(machine.device)
    one = make(cfg, sizes, machine)
    for _ in range(2):
        one.iteration(batches)
    machine.synchronize()
    return one, hardware.peak_memory(machine.device) - before if on_cuda else None


def turn(one, iters, batches, machine):
    """Returns the seconds of an iteration, the mean of a turn."""
    machine.synchronize()
    start = time.perf_counter()
    for _ in range(iters):
        one.iteration(batches)
    machine.synchronize()
    return (time.perf_counter() - start) / iters


def make_all(cfg, machine, batches, vocab_size):
    """Returns {name: what takes its iterations} and {name: peak memory}."""
    sizes = {name: getattr(cfg, name) for name in ("block_size", "n_layer", "n_head", "n_embd", "bias")}
    sizes["vocab_size"] = vocab_size
    recipe = replace(cfg, **RECIPE)
    wide_heads = sizes | dict(n_head=max(1, cfg.n_embd // 128))
    made = {
        "nanoGPT": warmed_up(NanoGPT, cfg, sizes, machine, batches),
        "GPT-2": warmed_up(Ours, cfg, sizes, machine, batches),
        "recipe": warmed_up(Ours, recipe, wide_heads, machine, batches),
    }
    contenders = {name: one for name, (one, _) in made.items()}
    return contenders, {name: peak for name, (_, peak) in made.items()}


def rounds(cfg, contenders, batches, machine):
    """Returns {name: seconds of an iteration, one a round}; no one is always first."""
    seconds = {name: [] for name in contenders}
    for number in range(cfg.rounds):
        for name in list(contenders)[:: -1 if number % 2 else 1]:
            seconds[name].append(turn(contenders[name], cfg.iters, batches, machine))
    return seconds


def main(argv):
    cfg = from_command_line(StepsConfig, __doc__, [GPT2, *argv])
    machine = hardware.find_machine(cfg)
    folder = shards.find_data(cfg.dataset)
    tokenizer = read_tokenizer(folder)
    windows, _ = shards.open_splits(folder, cfg.block_size, tokenizer.vocab_size)
    batches = micro_batches(windows, 0, cfg, machine.device)
    contenders, peaks = make_all(cfg, machine, batches, tokenizer.embedding_rows())
    seconds = rounds(cfg, contenders, batches, machine)
    report_on(cfg, machine, seconds, peaks, mfu_of(contenders, cfg, seconds, machine))
    batches.close()


def mfu_of(contenders, cfg, seconds, machine):
    """Returns {name: MFU, a fraction, by the count of each model itself; None where the peak is unknown}."""
    mfu = dict.fromkeys(contenders)
    if machine.peak:
        for name, one in contenders.items():
            of_a100 = one.model.estimate_mfu(cfg.sequences_per_iter, statistics.median(seconds[name]))
            mfu[name] = of_a100 * 312e12 / machine.peak
    return mfu


def report_on(cfg, machine, seconds, peaks, mfu):
    """Prints the table and writes the JSON file."""
    card = hardware.device_name(machine.device)
    print(f"{card}; torch {torch.__version__}; {machine.dtype}; compile={cfg.compile}")
    print(f"{cfg.tokens_per_iter:,} tokens an iteration in micro-batches of {cfg.batch_size}\n")
    print("| | ms an iteration | tokens/s | MFU | of nanoGPT's | peak GB |\n|---|---|---|---|---|---|")
    for name, some in seconds.items():
        ratios = [theirs / ours for ours, theirs in zip(some, seconds["nanoGPT"], strict=True)]
        middle = statistics.median(some)
        peak = f"{peaks[name] / 1e9:.2f}" if peaks[name] else "n/a"
        shown = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        rate = f"{cfg.tokens_per_iter / middle:,.0f}"
        share = f"{mfu[name]:.1%}" if mfu[name] else "n/a"
        print(f"| {name} | {1e3 * middle:,.1f} | {rate} | {share} | {shown} | {peak} |")
    if cfg.json:
        argv = [arg for arg in sys.argv[1:] if not arg.startswith(("--json=", "--nanogpt="))]
        command = shlex.join(["python", "benchmarks/steps.py", *argv, "--nanogpt=../nanoGPT"])
        report = dict(command=command, device=card, driver=driver_version(machine.device))
        report |= dict(torch=torch.__version__, dtype=machine.dtype, keys=asdict(cfg) | dict(nanogpt=""))
        with open(cfg.json, "w", encoding="utf-8") as f:
            report |= dict(tokens_per_iter=cfg.tokens_per_iter, seconds=seconds, peak_memory=peaks, mfu=mfu)
            json.dump(report, f, indent=1)


if __name__ == "__main__":
    run_script(main)
