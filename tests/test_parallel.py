"""
Several processes, started by torchrun, with gloo on a CPU. Reference: the same run by one process.
Run: pytest tests/test_parallel.py
"""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ENV, ROOT, TINY, metrics, run_here, write_byte_data

from configurator import configure
from sologpt import checkpoint, fit, hardware, parallel
from sologpt.errors import UserError
from train import TrainConfig

START = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
ARGV = [
    *TINY.split(),
    "--gradient_accumulation_steps=4",
    "--max_iters=30",
    "--lr_decay_iters=30",
    "--eval_interval=10",
]
MODERN = ["--arch=modern", "--optimizer=muon", "--learning_rate=2e-3"]

# runs train.py's main several times in the same two processes, each time with other arguments and a fault
SCRIPT = f"""
import itertools, json, os, signal, sys, time
from datetime import timedelta
sys.path.insert(0, {str(ROOT)!r})
import torch, train
from configurator import run_script
from model import GPT
from sologpt import parallel, shards

forward, rank = GPT.forward, int(os.environ["RANK"])
read = shards.Windows.read

def install(fault):
    calls = itertools.count(1)

    def faulty(self, idx, targets=None):
        number = next(calls) if self.training else 0
        return eval(fault)(number, forward, self, idx, targets) or forward(self, idx, targets)

    GPT.forward = faulty

def nan(number, forward, model, idx, targets):
    if number == 5 and rank == 1:
        return None, forward(model, idx, targets)[1] * float("nan")

def full(number, forward, model, idx, targets):
    if number >= 6 and rank == 1 and len(idx) > 2:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.")

def killed(number, forward, model, idx, targets):
    if number == 22 and rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)

def broken(number, forward, model, idx, targets):
    if number == 22 and rank == 1:
        raise shards.DataError("data/toy is gone")

def hangs(number, forward, model, idx, targets):
    if number == 22 and rank == 1:
        time.sleep(600)

def none(*args):
    pass

for argv, fault in json.loads(sys.argv[1]):
    install(fault)
    parallel.TIMEOUT = timedelta(seconds=3 if fault == "hangs" else 60)
    run_script(train.main, argv)
"""


def start(folder, runs):
    """Returns the process of torchrun that does these runs, (arguments, name of a fault) each."""
    (folder / "script.py").write_text(SCRIPT)
    command = [*START, str(folder / "script.py"), json.dumps(runs)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    return subprocess.Popen(command, cwd=folder, text=True, env=ENV, **pipes)


def both(folder, runs, status=0):
    """Returns what two processes write to stdout and stderr in these runs."""
    with start(folder, runs) as process:
        out, errors = process.communicate(timeout=120)
    assert process.returncode == status, out + errors
    return out, errors


def losses(folder):
    return [row["loss"] for row in metrics(folder, "iter")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the runs that need no more than two processes which stay alive."""
    folder = tmp_path_factory.mktemp("parallel")
    write_byte_data(folder)
    runs = [
        ([*ARGV, "--out_dir=gpt2"], "none"),
        ([*ARGV, *MODERN, "--out_dir=modern"], "none"),
        ([*ARGV, "--dropout=0.2", "--out_dir=dropout"], "none"),
        ([*ARGV, "--out_dir=parts", "--max_iters=10"], "none"),
        ([*ARGV, "--out_dir=nan", "--max_iters=8"], "nan"),
        ([*ARGV, "--out_dir=full", "--max_iters=8"], "full"),
    ]
    out, errors = both(folder, runs)
    (folder / "stdout").write_text(out)
    (folder / "stderr").write_text(errors)
    return folder
