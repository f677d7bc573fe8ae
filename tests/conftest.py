"""What the tests share: the project on the path, tiny data, and scripts run as a user runs them."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import shards

ROOT = Path(__file__).parent.parent
ENV = os.environ | {"OMP_NUM_THREADS": "1"}  # enough for models of this size, and the sums are the same each time
torch.set_num_threads(1)
TEXT = "pack my box with jugs now. " * 400  # 27 letters: in windows of 16, each comes at every position


@pytest.fixture(autouse=True)
def from_the_project_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture
def run(tmp_path):
    """run('train.py', '--key=value', ...) runs a script in tmp_path; returns the process, exit status checked."""

    def run(script, *argv, status=0, cwd=tmp_path, **env):
        command = [sys.executable, "-W", "error::UserWarning", str(ROOT / script), *map(str, argv)]
        process = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=ENV | env)
        assert process.returncode == status, process.stdout + process.stderr
        assert "Traceback" not in process.stderr and "Warning" not in process.stderr, process.stderr
        return process

    return run


@pytest.fixture
def byte_data(tmp_path):
    """A folder of byte tokens in our own format, cut into three train shards: a text small enough to be learned."""
    folder = tmp_path / "data" / "toy"
    folder.mkdir(parents=True)
    ids = np.frombuffer(TEXT.encode(), dtype=np.uint8).astype(np.uint16)
    for number, part in enumerate(np.array_split(ids, 3), 1):
        shards.write_shard(folder / f"fineweb_train_{number:06d}.bin", part)
    shards.write_shard(folder / "fineweb_val_000000.bin", ids[:1000])
    (folder / "meta.json").write_text('{"encoding": "bytes", "vocab_size": 257, "eot_token": 256}')
    return folder


TINY = """
--dataset=toy --device=cpu --compile=False --n_layer=2 --n_head=2 --n_embd=32 --block_size=16 --batch_size=4
--gradient_accumulation_steps=2 --warmup_iters=2 --lr_decay_iters=12 --max_iters=12 --eval_interval=6 --eval_iters=1
--learning_rate=1e-2
"""


@pytest.fixture
def tiny():
    """Arguments of a twelve-iteration run of a tiny model on byte_data; later ones win."""
    return TINY.split()
