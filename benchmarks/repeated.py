"""
What does it bring that the windows of the data begin elsewhere in each epoch?

    python prepare_fineweb.py --input=stdlib --encoding=bytes --max_tokens=600000 --out_dir=data/small
    python benchmarks/repeated.py config/quickstart.py --dataset=small --epochs=3

Takes the configs and keys of train.py, which trains for that many epochs of the dataset from each of the
seeds, once as it is and once with the windows of the first epoch in all of them. Everything else is the same,
and so is the validation split. Give so little data that three epochs are more than the model can take without
overfitting; where it cannot, there is little to gain.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass

import torch
from compare_modded import not_numbers, numbers
from sampling import processor

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from bench import read_metrics
from configurator import from_command_line, key, run_script
from sologpt import shards
from sologpt.errors import UserError
from sologpt.files import unwritable
from sologpt.tokenizer import read_tokenizer
from train import TrainConfig

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TRAIN = """
import sys, train
from configurator import run_script
from sologpt.shards import Windows
Windows.shifting = sys.argv.pop(1) == "shifted"
run_script(train.main)
"""


@dataclass
class RepeatedConfig(TrainConfig):
    # comparison
    epochs: int = key(3, "how often a run sees the data", low=2)
    seeds: str = key("1,2,3,4", "of weights and the order of data")
    json: str = key("", "file to write the figures to")

    def problems(self):
        found = super().problems() + not_numbers("seeds", self.seeds)
        if self.schedule != "wsd":
            found.append("a cosine has a length of its own; give --schedule=wsd")
        return found + unwritable("json", self.json)


def iterations(cfg):
    """Returns how many iterations cfg.epochs are, rounded down."""
    folder = shards.find_data(cfg.dataset)
    windows, _ = shards.open_splits(folder, cfg.block_size, read_tokenizer(folder).vocab_size)
    return cfg.epochs * len(windows) // cfg.sequences_per_iter


def train(kind, cfg, iters, seed):
    """Returns the last evaluation of a run, kind 'shifted' or 'same', as metrics.jsonl has it."""
    own = ("epochs", "seeds", "json", "out_dir", "max_iters", "seed", "init_from")
    flags = [f"--{name}={getattr(cfg, name)}" for name in sorted(cfg.given) if name not in own]
    with tempfile.TemporaryDirectory() as folder:
        flags += [f"--out_dir={folder}", f"--max_iters={iters}", f"--seed={seed}"]
        command = [sys.executable, "-c", TRAIN, kind, *flags]
        env = os.environ | dict(PYTHONPATH=ROOT)
        process = subprocess.run(command, env=env, capture_output=True, text=True)
        if process.returncode:
            raise UserError(f"train.py failed: {process.stderr.strip()}")
        evaluations = [line for line in read_metrics(folder) if line["kind"] == "eval"]
    return evaluations[-1]


def main(argv):
    cfg = from_command_line(RepeatedConfig, __doc__, argv)
    iters = iterations(cfg)
    kinds = dict(shifted="shifted in each epoch", same="the same in each epoch")
    runs = []
    for seed in map(int, numbers(cfg.seeds)):
        for kind in kinds:
            entry = train(kind, cfg, iters, seed)
            runs.append(dict(windows=kind, seed=seed, iters=entry["iter"]))
            runs[-1] |= dict(val_loss=entry["val_loss"], train_loss=entry["train_loss"])
            print(runs[-1], file=sys.stderr, flush=True)

    print("| windows | validation loss: mean, each seed | training loss: mean |\n|---|---|---|")
    for kind, about in kinds.items():
        some = [run for run in runs if run["windows"] == kind]
        losses = [run["val_loss"] for run in some]
        each = ", ".join(f"{loss:.4f}" for loss in losses)
        trained = statistics.mean(run["train_loss"] for run in some)
        print(f"| {about} | {statistics.mean(losses):.4f}: {each} | {trained:.4f} |")
    if cfg.json:
        machine = dict(cpu=processor(), torch=torch.__version__, threads=torch.get_num_threads())
        keys = {name: getattr(cfg, name) for name in sorted(cfg.given) if name != "json"}
        with open(cfg.json, "w", encoding="utf-8") as f:
            json.dump(dict(keys=keys, machine=machine, runs=runs), f, indent=1)


if __name__ == "__main__":
    run_script(main)
