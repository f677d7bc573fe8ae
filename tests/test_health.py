"""
Spikes of loss and gradient norm: what counts as one, and what is said of it.
Run: pytest tests/test_health.py
"""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import metrics

from sologpt import shards
from sologpt.health import RECENT, Recent, RecentLosses, watch_update
from train import TrainConfig


def test_a_spike_is_far_above_the_recent_values():
    """Of 1.00, 1.01, ... 1.99 the median is 1.495, the ninth decile 1.899: far is 1.495 + 6 * 0.404."""
    order = list(range(100))
    random.Random(0).shuffle(order)

    def filled():
        recent = RecentLosses()
        assert not any(recent.spikes(1 + i / 100) for i in order)
        return recent

    assert not filled().spikes(3.8) and filled().spikes(4.0)
    recent = filled()
    assert recent.spikes(100.0) and not recent.spikes(1.5)
    assert len(recent.values) == RECENT and 100.0 in recent.values
    # values that hardly vary: four times is the least that counts for a norm
    recent = Recent()
    for i in range(RECENT):
        assert not recent.spikes(1 + i / 1e6)
    assert not recent.spikes(3.9) and recent.spikes(4.1)


def test_a_falling_loss_never_spikes():
    noise = random.Random(1)
    recent = RecentLosses()
    assert not any(recent.spikes(11 * (i + 1) ** -0.3 * noise.lognormvariate(0, 0.1)) for i in range(5000))


def test_a_loss_need_not_double_to_be_a_spike():
    noise = random.Random(2)
    recent = RecentLosses()
    assert not any(recent.spikes(noise.gauss(3.3, 0.03)) for _ in range(1000))
    assert not recent.spikes(3.6) and recent.spikes(3.7)


@pytest.mark.parametrize("log_interval", [1, 1000])
def test_a_spike_is_pointed_out_with_its_sequences(run, byte_data, tiny, tmp_path, log_interval):
    """The data are all the same, apart from the sequences of one iteration."""
    flags = [*tiny, "--max_iters=185", "--lr_decay_iters=185", "--eval_interval=400"]
    flags += ["--batch_size=1", "--gradient_accumulation_steps=1", f"--log_interval={log_interval}"]
    first, *others = sorted(byte_data.glob("*train*.bin"))
    for path in others:
        path.unlink()
    windows = shards.Windows(shards.find_shards(byte_data, "train"), 16, 257)
    odd = int(windows.training(180, 1, 1337)[0])
    tokens = np.tile(np.arange(97, 113, dtype=np.uint16), len(windows) + 1)
    tokens[odd * 16 + 1 : odd * 16 + 16] = np.random.RandomState(0).randint(0, 96, 15)
    shards.write_shard(first, tokens)
    out = run("train.py", *flags).stdout
    rows = metrics(tmp_path / "out", "spike")
    assert {(row["iter"], row["first_sequence"], row["last_sequence"]) for row in rows} >= {(180, 180, 180)}
    assert "spike in iteration 180: gradient norm " in out and "; sequences 180 to 180\n" in out
    assert ("spike in iteration 180: loss " in out) == (log_interval == 1)
    assert not [row for row in rows if row["iter"] < 180]


@pytest.mark.parametrize("scale, bad", [(65536.0, 0), (1.0, 0), (0.5, 1)])
def test_infinite_gradients_in_fp16_are_the_scales_fault_until_it_is_low(scale, bad):
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    scaler.scale(torch.ones(1))
    progress = SimpleNamespace(bad_in_row=0, bad_steps=0, iter_num=7)
    run = SimpleNamespace(scaler=scaler, progress=progress, cfg=TrainConfig())
    run.metrics = SimpleNamespace(record=lambda *args, **figures: None)
    watch_update(run, torch.tensor(3.0), float("nan"))
    assert run.progress.bad_in_row == run.progress.bad_steps == bad
