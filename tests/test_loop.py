"""
The training loop against the same loop written out by hand: learning rate, mean over micro-batches,
clipping and AdamW as formulas; logged times against a clock that moves only when it is told to.
Run: pytest tests/test_loop.py
"""

import math
import time

import numpy as np
import pytest
import torch
from conftest import metrics

import train
from model import GPT, GPTConfig, make_gpt
from sologpt import checkpoint, log, shards


def state_of(folder, name="ckpt.pt"):
    return torch.load(folder / name, weights_only=True)


# -----------------------------------------------------------------------------
# updates


class Reference:
    """A model, and training it as the papers' formulas say, a parameter at a time."""

    def __init__(self, model_args, data):
        torch.manual_seed(1337)  # the default seed, of which train.py makes its model too
        self.model = GPT(GPTConfig(**model_args)).train()
        self.windows = shards.Windows(shards.find_shards(data, "train"), 16, 257)
        self.params = list(self.model.parameters())
        self.m = [torch.zeros_like(p) for p in self.params]
        self.v = [torch.zeros_like(p) for p in self.params]

    def gradients(self, it):
        """Returns loss and gradients of iteration it, the means over its two micro-batches of four."""
        losses, sums = [], [torch.zeros_like(p) for p in self.params]
        for first in (8 * it, 8 * it + 4):
            tokens = torch.from_numpy(self.windows.read(self.windows.training(first, 4, 1337)))
            loss = self.model(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())[1]
            grads = torch.autograd.grad(loss, self.params)
            sums = [a + b for a, b in zip(sums, grads, strict=True)]
            losses.append(loss.item())
        return sum(losses) / 2, [grad / 2 for grad in sums]

    @torch.no_grad()
    def iteration(self, it, lr, beta1, beta2, weight_decay, grad_clip):
        """Updates the parameters (Loshchilov and Hutter 2019, algorithm 2). Returns loss and norm."""
        with torch.enable_grad():
            loss, grads = self.gradients(it)
        norm = math.sqrt(sum(grad.double().square().sum().item() for grad in grads))
        shrink = min(1.0, grad_clip / norm)
        for p, grad, m, v in zip(self.params, grads, self.m, self.v, strict=True):
            if p.dim() == 2:
                p -= lr * weight_decay * p
            m += (1 - beta1) * (shrink * grad - m)
            v += (1 - beta2) * ((shrink * grad) ** 2 - v)
            m_hat = m / (1 - beta1 ** (it + 1))
            v_hat = v / (1 - beta2 ** (it + 1))
            p -= lr * m_hat / (v_hat.sqrt() + 1e-8)
        return loss, norm


def rate(it):
    """The learning rate of tiny's run: two iterations of warmup to 1e-2, a cosine to 6e-5 at 12."""
    if it < 2:
        return 1e-2 * (it + 1) / 3
    return 6e-5 + (1e-2 - 6e-5) * (1 + math.cos(math.pi * (it - 2) / 10)) / 2


def test_updates_are_those_of_the_formulas_and_new_settings_count_after_resuming(
    run, byte_data, tiny, tmp_path
):
    first = dict(beta1=0.8, beta2=0.9, weight_decay=2.0, grad_clip=1.6)
    second = dict(beta1=0.5, beta2=0.99, weight_decay=20.0, grad_clip=1.4)
    flags = [[f"--{name}={value}" for name, value in settings.items()] for settings in (first, second)]
    run("train.py", *tiny, *flags[0], "--max_iters=6")
    run("train.py", *tiny, *flags[1], "--init_from=resume")
    state = state_of(tmp_path / "out")
    reference = Reference(state["model_args"], byte_data)
    lines = metrics(tmp_path / "out", "iter")
    clipped = []
    for it in range(12):
        settings = first if it < 6 else second
        loss, norm = reference.iteration(it, rate(it), **settings)
        assert lines[it]["lr"] == pytest.approx(rate(it))
        assert (lines[it]["loss"], lines[it]["norm"]) == pytest.approx((loss, norm), rel=1e-4)
        clipped.append(norm > settings["grad_clip"])
    assert 3 <= sum(clipped) <= 9  # otherwise AdamW would not tell a scale from another
    for name, p in reference.model.named_parameters():
        assert torch.allclose(state["model"][name], p, atol=1e-5), name


def test_muon_decays_too_and_gets_the_momentum_of_each_iteration():
    cfg = train.TrainConfig(optimizer="muon", weight_decay=0.3, warmup_iters=200, learning_rate=2e-3)
    model = GPT(GPTConfig(block_size=16, vocab_size=97, n_layer=1, n_head=2, n_embd=32))
    optimizers = train.optim.make_optimizers(model, cfg, torch.device("cpu"))
    assert {group["weight_decay"] for group in optimizers["muon"].param_groups} == {0.3}
    for it, momentum in ((0, 0.85), (150, 0.9), (600, 0.95)):
        lr = train.set_learning_rate(optimizers, it, cfg)
        assert lr == train.get_lr(it, cfg)
        groups = optimizers["optimizer"].param_groups + optimizers["muon"].param_groups
        assert {group["lr"] for group in groups} == {lr}
        assert [g["momentum"] for g in optimizers["muon"].param_groups] == pytest.approx([momentum] * 2)


def test_a_finite_loss_with_an_infinite_gradient_is_no_update(run, byte_data, tiny, tmp_path, monkeypatch):
    forward = GPT.forward

    def forward_only(self, idx, targets=None):
        logits, loss = forward(self, idx, targets)
        if loss.requires_grad:
            loss.register_hook(lambda grad: grad * math.inf)
        return logits, loss

    run("train.py", *tiny, "--max_iters=3")
    before = state_of(tmp_path / "out")["model"]
    monkeypatch.setattr(GPT, "forward", forward_only)
    out = run("train.py", *tiny, "--init_from=resume", "--max_iters=5", "--weight_decay=10.0")
    assert out.stderr.count("its update is skipped") == 2
    assert all(line["loss"] > 1 for kind in ("iter", "bad_step") for line in metrics(tmp_path / "out", kind))
    after = state_of(tmp_path / "out")
    assert after["bad_steps"] == 2 and all(torch.equal(after["model"][name], p) for name, p in before.items())


@pytest.mark.parametrize("bad", ["lm_head.weight", "transformer.h.0.attn.c_attn.weight"])
def test_an_infinite_gradient_of_one_optimizer_keeps_the_other_from_stepping_too(bad):
    """As in fp16 with Muon: unscaling finds infinities in the gradients of either AdamW or Muon."""
    cfg = train.TrainConfig(arch="modern", optimizer="muon", learning_rate=1e-2, decay_lr=False)
    model = make_gpt(GPTConfig(16, 97, n_layer=1, n_head=2, n_embd=32, bias=False, arch="modern"))
    optimizers = train.optim.make_optimizers(model, cfg, torch.device("cpu"))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)

    def step(bad=None):
        x = torch.arange(32).view(2, 16) % 97
        scaler.scale(model(x, x)[1]).backward()
        if bad:
            model.get_parameter(bad).grad.view(-1)[3] = math.inf
        return train.update(model, optimizers, scaler, 1.0)

    def moments():
        states = [state for optimizer in optimizers.values() for state in optimizer.state.values()]
        return [moment.clone() for state in states for moment in state.values()]

    step()
    weights = {name: p.clone() for name, p in model.named_parameters()}
    before = moments()
    assert not math.isfinite(step(bad)) and scaler.get_scale() == 4.0
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, moments(), strict=True))
    assert math.isfinite(step()) and not torch.equal(model.lm_head.weight, weights["lm_head.weight"])


# -----------------------------------------------------------------------------
# the best weights


def test_the_best_weights_are_those_of_the_lowest_validation_loss(run, byte_data, tiny, tmp_path):
    """Validation is of another text, which a model of the training text predicts ever worse."""
    ids = np.frombuffer(b"The quick brown fox; 0123456789! " * 40, dtype=np.uint8).astype(np.uint16)
    shards.write_shard(byte_data / "fineweb_val_000000.bin", ids)
    run("train.py", *tiny, "--max_iters=60", "--lr_decay_iters=60", "--eval_interval=5")
    evals = metrics(tmp_path / "out", "eval")
    lowest = min(evals[1:], key=lambda line: line["val_loss"])
    assert lowest["iter"] < 60 == min(evals, key=lambda line: line["train_loss"])["iter"]
    best, newest = state_of(tmp_path / "out", "best.pt"), state_of(tmp_path / "out")
    assert (best["iter_num"], newest["iter_num"]) == (lowest["iter"], 60)
    assert best["best_val_loss"] == newest["best_val_loss"] == pytest.approx(lowest["val_loss"], abs=1e-7)


def test_weights_whose_loss_is_nan_are_not_the_best(run, byte_data, tiny, tmp_path):
    run("train.py", *tiny, "--max_iters=6")
    best = (tmp_path / "out/best.pt").read_bytes()
    huge = ["--init_from=resume", "--decay_lr=False", "--learning_rate=1e30", "--max_iters=7"]
    run("train.py", *tiny, *huge)
    last = metrics(tmp_path / "out", "eval")[-1]
    assert (last["iter"], last["val_loss"]) == (7, None)
    assert (tmp_path / "out/best.pt").read_bytes() == best


def test_states_are_saved_at_evaluations_or_only_if_they_are_better(run, byte_data, tiny, tmp_path):
    def saved(*more):
        run("train.py", *tiny, "--max_iters=11", "--eval_interval=5", *more)
        return [row["iter"] for row in metrics(tmp_path / "out", "checkpoint")]

    still = ["--learning_rate=0.0", "--min_lr=0.0"]
    assert saved() == saved(*still) == [5, 10, 11]
    assert saved("--always_save_checkpoint=False") == [5, 10, 11]
    assert saved("--always_save_checkpoint=False", *still) == [11]


# -----------------------------------------------------------------------------
# time


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only in these: an update takes 2, the losses of a split 100, a file 1,000."""
    now = [time.perf_counter()]  # a Run's own default is bound to the real clock

    def taking(seconds, function):
        def slow(*args):
            now[0] += seconds
            return function(*args)

        return slow

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(train, "update", taking(2, train.update))
    monkeypatch.setattr(train, "estimate_loss", taking(100, train.estimate_loss))
    monkeypatch.setattr(checkpoint, "save", taking(1000, checkpoint.save))
    return now


def test_only_updates_count_as_the_time_of_an_iteration(run, byte_data, tiny, tmp_path, clock):
    argv = [*tiny, "--log_interval=5", "--checkpoint_interval=4", "--eval_interval=3"]
    out = run("train.py", *argv)
    lines = metrics(tmp_path / "out", "iter")
    # the second line is of five iterations, the last one of one
    assert [(line["iter"], line["dt"]) for line in lines] == [(0, 2.0), (5, 2.0), (10, 2.0), (11, 2.0)]
    assert out.stdout.count(" time 2000.00ms,") == 4 and out.stdout.count(f" {128 / 2:.0f} tok/s,") == 4
    # what is left: 11, 6, 1 and 0 iterations of 2 s, and 4, 3, 1 and 1 evaluations of 200 s
    assert [line.split("eta ")[1] for line in out.stdout.splitlines() if "eta " in line] == [
        "13m42s",
        "10m12s",
        "3m22s",
        "3m20s",
    ]


def test_logging_counts_as_the_time_of_the_next_iteration(run, byte_data, tiny, tmp_path, clock, monkeypatch):
    def slowly(*args):
        clock[0] += 3

    monkeypatch.setattr(log, "watch_loss", slowly)
    run("train.py", *tiny, "--log_interval=4")
    # the line of iteration 0 is part of 1 to 4, that of 4 of 5 to 8, and that of 8 of 9 to 11
    assert [line["dt"] for line in metrics(tmp_path / "out", "iter")] == [2.0, 2.75, 2.75, 3.0]


def test_getting_ready_counts_as_no_iterations_time(run, byte_data, tiny, tmp_path, clock, monkeypatch):
    prepare_out_dir = log.prepare_out_dir

    def slowly(*args):
        clock[0] += 70
        return prepare_out_dir(*args)

    monkeypatch.setattr(log, "prepare_out_dir", slowly)
    run("train.py", *tiny, "--max_iters=1")
    assert [line["dt"] for line in metrics(tmp_path / "out", "iter")] == [2.0]


def test_a_run_by_the_clock_leaves_time_for_its_last_evaluation(run, byte_data, tiny, tmp_path, clock):
    endless = [f"--{name}=100000" for name in ("max_iters", "lr_decay_iters", "eval_interval")]
    out = run("train.py", *tiny, *endless, "--max_minutes=10").stdout
    # an evaluation of 200 s, 99 or 100 updates of 2 s, and an evaluation again
    assert 590 < metrics(tmp_path / "out", "eval")[-1]["elapsed"] <= 604
    assert [line.split("eta ")[1] for line in out.splitlines() if "eta " in line][:2] == ["6m38s", "6m36s"]


def test_a_run_by_the_clock_logs_its_last_iteration_and_knows_its_speed(
    run, byte_data, tiny, tmp_path, clock
):
    endless = [f"--{name}=100000" for name in ("max_iters", "lr_decay_iters", "eval_interval")]
    out = run("train.py", *tiny, *endless, "--max_minutes=10", "--log_interval=70").stdout
    done = metrics(tmp_path / "out", "done")[0]["iter"]
    lines = metrics(tmp_path / "out", "iter")
    assert [line["iter"] for line in lines] == [0, 70, done - 1] and 95 < done <= 100
    assert lines[-1]["tokens"] == 128 * done and lines[-1]["lr"] < 1e-3
    assert [line["dt"] for line in lines] == [2.0, 2.0, 2.0]
    assert f"speed: {' ' * 5}64 tok/s without compilation" in out


def test_samples_count_as_time_of_their_evaluation(run, byte_data, tiny, tmp_path, clock, monkeypatch):
    generate = GPT.generate

    def slowly(*args, **options):
        clock[0] += 50
        return generate(*args, **options)

    monkeypatch.setattr(GPT, "generate", slowly)
    run("train.py", *tiny, "--sample_interval=6")
    assert state_of(tmp_path / "out")["eval_seconds"] == pytest.approx(250)


def test_time_and_tokens_go_on_from_where_they_were(run, byte_data, tiny, tmp_path, clock):
    run("train.py", *tiny, "--max_iters=6", "--lr_decay_iters=12")
    first = state_of(tmp_path / "out")
    # evaluations at 0 and 6, best.pt, and ckpt.pt itself not yet
    assert first["seconds"] == pytest.approx(2 * 200 + 6 * 2 + 1000, abs=60)
    assert first["tokens_seen"] == 6 * 128
    clock[0] += 10**6  # between two processes
    out = run("train.py", *tiny, "--init_from=resume")
    second = state_of(tmp_path / "out")
    # evaluations at 6, again, and 12
    assert second["seconds"] == pytest.approx(first["seconds"] + 2 * 200 + 6 * 2 + 1000)
    assert second["tokens_seen"] == 12 * 128
    assert [line["tokens"] for line in metrics(tmp_path / "out", "iter")] == [128 * n for n in range(1, 13)]
    assert "done: iteration 12 after 1h03m, 1,536 tokens" in out.stdout
