"""
Training with nanoGPT and with this project: tokens/s, memory, time to the first step, loss after the same
tokens.

    python benchmarks/compare_nanogpt.py config/gpt2_124m.py --nanogpt=../nanoGPT --max_iters=60

Takes the configs and keys of train.py. Both programs' own train.py run in turn, `pairs` times, each in a
process of its own, on the same token files (a part of the dataset, written in nanoGPT's format), with the
same model, optimizer, schedule and tokens per iteration, each pair with another seed. Each evaluates before
the first and after the last update only.

tokens/s and the time to the first step are taken from when the lines of the log arrive here, one clock for
both: nanoGPT's own `time` is of single iterations, some with an evaluation in it. own_ms in the JSON file is
the median of what each log says of iterations without one. Peak memory is what torch allocated at most on a
CUDA GPU, else the largest resident size. The loss is that of both last checkpoints over the same windows, by
this project's evaluator.
"""

import json
import math
import os
import pickle
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass

import numpy as np
import torch
from sampling import processor

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

from bench import driver_version
from configurator import from_command_line, key, run_script
from model import GPT, GPTConfig
from sologpt import checkpoint, hardware, shards
from sologpt.errors import UserError
from sologpt.files import unwritable
from sologpt.tokenizer import read_tokenizer
from train import TrainConfig, estimate_loss

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
ITER = re.compile(r"^iter (\d+): loss ([\d.]+|nan|inf), time ([\d.]+)ms")
WARMUP = 10  # iterations that are not timed
RUN = """
import atexit, os, re, runpy, sys, torch

set_seed = torch.manual_seed
torch.manual_seed = lambda seed: set_seed(int(os.environ["COMPARED_SEED"]))  # nanoGPT's own is always 1337

@atexit.register
def report():
    try:
        with open("/proc/self/status") as f:  # getrusage would begin with the size of the parent process
            resident = int(re.search(r"VmHWM:\\s+(\\d+)", f.read())[1]) * 1024
    except OSError:
        import resource
        unit = 1 if sys.platform == "darwin" else 1024
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    peak = resident
    if torch.cuda.is_initialized():
        peak = max(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count()))
    print("peak", peak, flush=True)

sys.argv[0] = "train.py"
runpy.run_path("train.py", run_name="__main__")
"""


@dataclass
class CompareConfig(TrainConfig):
    # comparison
    nanogpt: str = key("", "checkout of nanoGPT")
    nanogpt_batch_size: int = key(
        0, "its micro-batch, for the same sequences an iteration; 0: batch_size", low=0
    )
    ours_dtype: str = key(
        "", "dtype of a second run of ours in each pair; empty: none", choices=("", "bfloat16")
    )
    pairs: int = key(3, "runs of each, in turn", low=1)
    train_tokens: int = key(20_000_000, "tokens of the dataset to train on", low=1)
    val_tokens: int = key(1_000_000, "tokens of the dataset to evaluate both on", low=1)
    json: str = key("", "file to write the figures to")

    def problems(self):
        found, S = super().problems(), self.batch_size * self.gradient_accumulation_steps
        if not os.path.isfile(os.path.join(self.nanogpt, "train.py")):
            found.append(
                f"nanogpt={self.nanogpt!r} has no train.py; give a checkout of github.com/karpathy/nanoGPT"
            )
        if (self.arch, self.optimizer, self.schedule) != ("gpt2", "adamw", "cosine"):
            found.append("nanoGPT has only --arch=gpt2 --optimizer=adamw --schedule=cosine; set these")
        if self.nanogpt_batch_size and S % self.nanogpt_batch_size:
            found.append(
                f"nanogpt_batch_size={self.nanogpt_batch_size} does not divide {S} sequences an iteration"
            )
        first_timed = math.ceil(WARMUP / self.log_interval) * self.log_interval
        if self.max_iters <= first_timed + self.log_interval:  # nanoGPT logs multiples of log_interval
            found.append(
                f"max_iters={self.max_iters} leaves nothing to time with log_interval={self.log_interval}"
            )
        return found + unwritable("json", self.json)


def write_data(cfg, folder):
    """Writes train.bin, val.bin and, unless the tokens are GPT-2's, meta.pkl as nanoGPT reads them."""
    source = shards.find_data(cfg.dataset)
    for split, most in (("train", cfg.train_tokens), ("val", cfg.val_tokens)):
        with open(os.path.join(folder, f"{split}.bin"), "wb") as f:
            for shard in shards.find_shards(source, split):
                tokens = np.memmap(shard.path, shard.dtype, "r", shard.offset, (shard.count,))[:most]
                if len(tokens) and tokens.max() >= 2**16:
                    raise UserError(f"{shard.path} has ids above 65,535, which nanoGPT's files cannot hold")
                f.write(tokens.astype("<u2"))
                most -= len(tokens)
    tokenizer = read_tokenizer(source)
    if tokenizer.encoding != "gpt2":
        with open(os.path.join(folder, "meta.pkl"), "wb") as f:
            pickle.dump(dict(vocab_size=tokenizer.embedding_rows()), f)  # the same rows for both


def write_config(path, values, program):
    """Writes those of values, a dict, that the train.py in folder program has as keys to the config file at
    path."""
    with open(os.path.join(program, "train.py"), encoding="utf-8") as f:
        known = set(re.findall(r"^ *(\w+)(?:: \w+)? = ", f.read(), re.M))
    with open(path, "w", encoding="utf-8") as f:
        f.writelines(f"{name} = {value!r}\n" for name, value in values.items() if name in known)


def train(program, values, folder):
    """Runs the train.py in folder program with values, a dict of keys; its files go into folder. Returns its
    figures.

    Raises ValueError, with the end of what it printed, if it fails.
    """
    config = os.path.join(folder, "compared.py")
    write_config(config, values | dict(out_dir=folder), program)
    command = [sys.executable, "-u", "-c", RUN, config]
    env = os.environ | dict(PYTHONDONTWRITEBYTECODE="1", COMPARED_SEED=str(values["seed"]))
    start, arrived, own, peak, last = time.perf_counter(), {}, [], None, ""
    with open(os.path.join(folder, "stderr.txt"), "w+", encoding="utf-8") as errors:
        process = subprocess.Popen(
            command, cwd=program, stdout=subprocess.PIPE, stderr=errors, text=True, env=env
        )
        for line in process.stdout:
            now = time.perf_counter()
            if match := ITER.match(line):
                it = int(match[1])
                arrived[it] = now
                if WARMUP <= it < values["max_iters"]:
                    own.append(float(match[3]))
            elif line.startswith("peak "):
                peak = int(line.split()[1])
        if process.wait():
            errors.seek(0)
            last = (errors.read().strip() or "nothing on stderr").splitlines()[-1]
            raise UserError(f"train.py in {os.path.basename(os.path.abspath(program))} failed: {last}")
    # nanoGPT makes one more, with an evaluation
    timed = [it for it in arrived if WARMUP <= it < values["max_iters"]]
    dt = (arrived[timed[-1]] - arrived[timed[0]]) / (timed[-1] - timed[0])
    tokens = values["batch_size"] * values["gradient_accumulation_steps"] * values["block_size"]
    figures = dict(tokens_per_s=tokens / dt, ms_per_iter=1e3 * dt, own_ms=statistics.median(own))
    return figures | dict(peak_memory=peak, first_step_s=arrived[0] - start)


def final_loss(folder, data, cfg, machine):
    """Returns the loss of folder/ckpt.pt over the windows of data's val.bin, nats per token."""
    state = checkpoint.load(os.path.join(folder, "ckpt.pt"))
    if state["iter_num"] != cfg.max_iters:
        raise UserError(f"the last checkpoint is of iteration {state['iter_num']}, not of {cfg.max_iters}")
    model = GPT(GPTConfig(**state["model_args"])).to(machine.device)
    model.load_state_dict(state["model"])
    windows = shards.Windows(shards.find_shards(data, "val"), cfg.block_size, model.config.vocab_size)
    return estimate_loss(model, windows, len(windows), cfg.batch_size, machine)


def main(argv):
    cfg = from_command_line(CompareConfig, __doc__, argv)
    machine = hardware.find_machine(cfg)
    device, dtype, S = machine.device, machine.dtype, cfg.sequences_per_iter
    shared = asdict(cfg) | dict(
        device=str(device), dtype=dtype, init_from="scratch", wandb_log=False, eval_only=False
    )
    shared |= dict(
        eval_interval=cfg.max_iters, eval_iters=1, always_save_checkpoint=True, checkpoint_interval=0
    )
    theirs = cfg.nanogpt_batch_size or cfg.batch_size
    contenders = {
        "nanoGPT": (cfg.nanogpt, shared | dict(batch_size=theirs, gradient_accumulation_steps=S // theirs)),
        "soloGPT": (ROOT, shared),
    }
    if cfg.ours_dtype:
        contenders[f"soloGPT, {cfg.ours_dtype}"] = ROOT, shared | dict(dtype=cfg.ours_dtype)
    processor_name = processor() if device.type == "cpu" else hardware.device_name(device)
    print(
        f"{processor_name}, {torch.get_num_threads()} threads; torch {torch.__version__}; {dtype}; "
        f"compile={cfg.compile}"
    )
    print(f"{S * cfg.block_size:,} tokens an iteration, {cfg.max_iters:,} iterations, {cfg.pairs} pairs")

    runs = {name: [] for name in contenders}
    with tempfile.TemporaryDirectory() as data:
        write_data(cfg, data)
        for pair in range(cfg.pairs):
            for name in list(contenders)[:: -1 if pair % 2 else 1]:  # no one is always first
                program, values = contenders[name]
                with tempfile.TemporaryDirectory() as folder:
                    figures = train(program, values | dict(dataset=data, seed=cfg.seed + pair), folder)
                    figures["val_loss"] = final_loss(folder, data, cfg, machine)
                    hardware.forget_compiled(device)  # its memory is the next program's
                runs[name].append(figures)
                shown = ", ".join(f"{key} {value:,.4g}" for key, value in figures.items())
                print(f"{name}: {shown}", file=sys.stderr)

    # -------------------------------------------------------------------------
    # the table

    medians = {
        name: {key: statistics.median(run[key] for run in some) for key in some[0]}
        for name, some in runs.items()
    }
    ratios = {
        name: [
            run["tokens_per_s"] / nano["tokens_per_s"]
            for run, nano in zip(some, runs["nanoGPT"], strict=True)
        ]
        for name, some in runs.items()
    }
    print("| | micro-batch | tokens/s | of nanoGPT's | ms/iter | peak GB | first step | val loss |")
    print("|---|---|---|---|---|---|---|---|")
    for name, m in medians.items():
        ratio, low, high = statistics.median(ratios[name]), min(ratios[name]), max(ratios[name])
        losses = [run["val_loss"] for run in runs[name]]
        cells = [name, contenders[name][1]["batch_size"], f"{m['tokens_per_s']:,.0f}"]
        cells += [f"{ratio:.2f} ({low:.2f} to {high:.2f})", f"{m['ms_per_iter']:,.2f}"]
        cells += [f"{m['peak_memory'] / 1e9:.2f}", f"{m['first_step_s']:.1f} s"]
        cells += [f"{m['val_loss']:.4f} ({min(losses):.4f} to {max(losses):.4f})"]
        print(f"| {' | '.join(map(str, cells))} |")
    if cfg.json:
        argv = [arg for arg in sys.argv[1:] if not arg.startswith(("--json=", "--nanogpt="))]
        command = shlex.join(["python", "benchmarks/compare_nanogpt.py", *argv, "--nanogpt=../nanoGPT"])
        report = dict(
            command=command, device=processor_name, driver=driver_version(device), torch=torch.__version__
        )
        report |= dict(threads=torch.get_num_threads(), dtype=dtype, compile=cfg.compile, medians=medians)
        with open(cfg.json, "w", encoding="utf-8") as f:
            json.dump(report | dict(ratios=ratios, runs=runs), f, indent=1)


if __name__ == "__main__":
    run_script(main)
