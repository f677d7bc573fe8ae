"""
Training as a user runs it: train.py in a process of its own, on a text small enough to be learned in
seconds. References: an uninterrupted run, the same step split otherwise, nanoGPT's formats built by hand,
tables by hand.
Run: pytest tests/test_train.py
"""

import dataclasses
import gc
import itertools
import json
import math
import os
import pickle
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ENV, ROOT, metrics

import train
from configurator import configure, key
from model import GPT, GPTConfig
from sologpt import checkpoint, fit, hardware, report, shards
from sologpt.display import duration
from sologpt.errors import UserError, out_of_memory
from sologpt.history import read_history
from train import TrainConfig, get_lr

STEP = re.compile(r"^step (\d+): train loss ([\d.]+), val loss ([\d.]+)", re.M)
ITER = re.compile(r"^iter (\d+): loss ([\d.]+), time ([\d.]+)ms, mfu (?:([\d.]+)%|n/a)", re.M)


def losses(process):
    return {int(it): loss for it, loss, *_ in ITER.findall(process.stdout)}


def weights(folder, name="ckpt.pt"):
    return torch.load(folder / name, weights_only=True)["model"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# -----------------------------------------------------------------------------
# the run and its log


def test_bits_per_byte_follow_the_validation_loss_if_the_bytes_are_known(run, byte_data, tiny, tmp_path):
    meta = json.loads((byte_data / "meta.json").read_text())
    before = run("train.py", *tiny, "--max_iters=0").stdout
    assert "bits/byte" not in before and metrics(tmp_path / "out", "eval")[0]["val_bpb"] is None
    meta |= dict(train=dict(tokens=10800, bytes=9000), val=dict(tokens=1000, bytes=800))
    (byte_data / "meta.json").write_text(json.dumps(meta))
    out = run("train.py", *tiny, "--max_iters=0").stdout
    [figures] = metrics(tmp_path / "out", "eval")
    assert figures["val_bpb"] == pytest.approx(math.log2(math.e) * figures["val_loss"] * 1.25)
    assert f", val loss {figures['val_loss']:.4f}, {figures['val_bpb']:.4f} bits/byte\n" in out


def test_a_run_updates_max_iters_times_and_evaluates_first_and_last(run, byte_data, tiny, tmp_path):
    out = run("train.py", *tiny, "--max_iters=10", "--peak_flops=312e12")
    assert [int(it) for it, *_ in STEP.findall(out.stdout)] == [0, 6, 10]
    assert list(losses(out)) == list(range(10))
    assert all(mfu for *_, mfu in ITER.findall(out.stdout))
    assert "tokens:     4 * 2 * 16 = 128 an iteration" in out.stdout
    assert "run:        10 * 128 = 1,280 tokens, 0.119 epochs" in out.stdout
    state = torch.load(tmp_path / "out/ckpt.pt", weights_only=True)
    assert state["iter_num"] == 10
    assert {int(s["step"]) for s in state["optimizer"]["state"].values()} == {10}
    assert float(STEP.findall(out.stdout)[-1][2]) < 4 < 5 < float(STEP.findall(out.stdout)[0][2])
    assert [line["iter"] for line in metrics(tmp_path / "out", "iter")] == list(range(10))
    assert [line["iter"] for line in metrics(tmp_path / "out", "eval")] == [0, 6, 10]


def test_without_a_known_peak_there_is_no_mfu(run, byte_data, tiny, tmp_path):
    out = run("train.py", *tiny, "--max_iters=1")
    assert "; mfu n/a, no peak is known for cpu\n" in out.stdout
    assert re.search(
        r"^iter 0: loss \d\.\d{4}, time \d+\.\d\dms, mfu n/a, 0\.0\d+ TFLOP/s, ", out.stdout, re.M
    )
    assert metrics(tmp_path / "out", "iter")[0]["mfu"] is None


def test_tokens_per_second_and_mfu_follow_from_the_time(run, byte_data, tiny, tmp_path):
    run("train.py", *tiny, "--peak_flops=1e12", "--log_interval=4")
    lines = metrics(tmp_path / "out", "iter")
    assert [line["iter"] for line in lines] == [0, 4, 8, 11]
    n = 320 * 32 + 2 * (12 * 32 * 32 + 2 * 32) + 32  # embedding, two blocks, final norm
    for line in lines:
        flops = (6 * n + 12 * 2 * 32 * 16) * 128
        assert line["tflops"] == pytest.approx(flops / line["dt"] / 1e12)
        assert line["mfu"] == pytest.approx(100 * line["tflops"])  # percent of 1 TFLOP/s


def test_bf16_trains_too(run, byte_data, tiny):
    out = run("train.py", *tiny, "--dtype=bfloat16")
    assert float(losses(out)[11]) < 4


def test_a_compiled_run_gives_the_same_losses(run, byte_data, tiny, monkeypatch):
    eager = losses(run("train.py", *tiny, "--out_dir=eager"))
    estimate_loss = train.estimate_loss
    graphs = []  # compiled before each call of it

    def counting(*args):
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        return estimate_loss(*args)

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(train, "estimate_loss", counting)
    out = run("train.py", *tiny, "--compile=True")
    assert graphs == [0] + [2] * 6  # the first time it is called to compile
    assert "compiling the model" in out.stdout
    assert [float(x) for x in losses(out).values()] == pytest.approx(
        [float(x) for x in eager.values()], abs=2e-3
    )
    times = [float(time) for _, _, time, _ in ITER.findall(out.stdout)]
    assert times[0] < 1000  # ms: compiling takes many seconds, and is not in it
    # at most eight lines, aligned, come before the first evaluation
    lines = out.stdout.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("step 0:"))
    assert first == 8 and lines[7].startswith("compiling the model")
    labels = [line.partition(":")[0] for line in lines[:7]]
    assert labels == ["device", "data", "model", "memory", "tokens", "run", "evaluation"]
    assert all(line[12] != " " and line[11] == " " for line in lines[:7])


def test_the_model_is_compiled_as_the_keys_say(monkeypatch):
    asked = []
    model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=4, vocab_size=16))
    monkeypatch.setattr(model, "compile", lambda **settings: asked.append(settings))
    cfg = TrainConfig(compile_mode="max-autotune-no-cudagraphs", loss_chunks=3)
    train.prepare_model(model, cfg, hardware.Machine(torch.device("cpu"), "float32", None, ""))
    assert asked == [dict(dynamic=False, mode="max-autotune-no-cudagraphs")] and model.loss_chunks == 3


# torch.compile itself does that
def test_a_compiled_run_that_saves_memory_gives_the_same_losses(run, byte_data, tiny, tmp_path):
    argv = [*tiny, "--n_layer=1"]  # half of the compiler's time
    eager = losses(run("train.py", *argv))
    chunked = losses(run("train.py", *argv, "--loss_chunks=3", "--out_dir=chunked"))
    out = run("train.py", *argv, "--compile=True", "--loss_chunks=3", "--activation_memory=0.8")
    for found in (chunked, losses(out)):
        assert [float(x) for x in found.values()] == pytest.approx(
            [float(x) for x in eager.values()], abs=2e-3
        )
    assert "loss_chunks" not in checkpoint.load(tmp_path / "chunked/ckpt.pt")["model_args"]


@pytest.mark.parametrize("setting", ["activation_memory=0.9", "compile_mode='max-autotune-no-cudagraphs'"])
def test_what_acts_through_the_compiler_is_not_taken_silently_without_it(setting):
    with pytest.raises(ValueError, match=f"{setting} needs torch.compile: set compile=True, or "):
        configure(TrainConfig, [f"--{setting}", "--compile=False"])
    configure(TrainConfig, [f"--{setting}"])


def test_the_memory_that_the_log_estimates_is_in_the_metrics_too(run, byte_data, tiny, tmp_path):
    out = run("train.py", *tiny, "--max_iters=1").stdout
    memory, [line] = (
        metrics(tmp_path / "out", "config")[0]["memory"],
        re.findall("^memory:     about .*$", out, re.M),
    )
    parameters = (320 + 16) * 32 + 2 * (12 * 32 * 32 + 2 * 32) + 32
    assert memory["weights"] == 4 * parameters and line.endswith(f"loss {memory['loss'] / 1e6:.1f}")
    # two moments a parameter and, in each of 15 tensors, the number of updates, fp32
    assert memory["optimizer"] == 8 * parameters + 4 * 15
    assert re.search("^model: .*, FLASH_ATTENTION$", out, re.M)
    assert metrics(tmp_path / "out", "iter")[0]["peak_memory"] is None and "peak memory" not in out  # no GPU


def test_garbage_is_collected_at_evaluations_only_and_a_leak_does_not_outlive_one(
    run, byte_data, tiny, faulty, monkeypatch
):
    """Each forward pass in training leaves a cycle, which only the garbage collector can free; counted are
    those that are there, in the iterations of two evaluation intervals."""

    class Cycle:
        pass

    alive, found = weakref.WeakSet(), []

    def leak(forward, model, idx, targets):
        found.append((len(alive), gc.isenabled()))
        cycle = Cycle()
        cycle.itself = cycle
        alive.add(cycle)
        return forward(model, idx, targets)

    faulty(lambda calls, model, idx: model.training, leak)
    freezes = []
    monkeypatch.setattr(gc, "freeze", lambda: freezes.append(1))
    run("train.py", *tiny)
    # two micro-batches an iteration, six iterations an evaluation
    assert found == [(n, False) for n in [*range(12)] * 2]
    assert gc.isenabled() and len(freezes) == 1  # conftest.py's; train.py leaves nothing frozen


def test_the_allocator_is_set_up_unless_the_user_has_done_so(monkeypatch):
    names = "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"
    for name in names:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "platform", "win32")
    hardware.use_expandable_segments()
    assert not set(names) & os.environ.keys()
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "backend:native")
    hardware.use_expandable_segments()
    assert "PYTORCH_ALLOC_CONF" not in os.environ
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF")
    monkeypatch.setattr(platform, "release", lambda: "6.6.114.1-microsoft-standard-WSL2")
    hardware.use_expandable_segments()
    assert "PYTORCH_ALLOC_CONF" not in os.environ
    monkeypatch.setattr(platform, "release", lambda: "6.8.0-generic")
    hardware.use_expandable_segments()
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"


def test_windows_driver_gives_no_more_than_the_gpu_has(monkeypatch):
    """As on a card of 12 GB of which a desktop has taken 3; torch holds 1 GB already."""
    limits = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (8e9, 12e9))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 1e9)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *args: limits.append(args))
    hardware.keep_to_gpu_memory(torch.device("cuda"))
    hardware.keep_to_gpu_memory(torch.device("cuda:1"))
    assert limits == [(pytest.approx(8.7 / 12), 0), (pytest.approx(8.7 / 12), 1)]


def test_learning_rate_by_hand():
    cfg = configure(
        TrainConfig, "--learning_rate=1.0 --min_lr=0.1 --warmup_iters=3 --lr_decay_iters=11".split()
    )
    expected = {
        0: 0.25,  # (0 + 1) / (3 + 1)
        2: 0.75,
        3: 1.0,  # the top of the cosine
        5: 0.1 + 0.9 * (1 + 2**-0.5) / 2,  # a quarter down: cos(pi / 4)
        7: 0.55,  # half way
        11: 0.1,
        500: 0.1,
    }
    assert {it: get_lr(it, cfg) for it in expected} == pytest.approx(expected)
    cfg.decay_lr = False
    assert get_lr(0, cfg) == get_lr(500, cfg) == 1.0
    cfg.decay_lr, cfg.warmup_iters, cfg.lr_decay_iters = True, 5, 5
    assert get_lr(5, cfg) == 0.1


def test_duration():
    assert [duration(s) for s in (0, 61, 3600, 360000)] == ["0m00s", "1m01s", "1h00m", "100h00m"]


# -----------------------------------------------------------------------------
# what must not change a run


def test_how_a_step_is_split_into_micro_batches_does_not_matter(run, byte_data, tiny, tmp_path):
    results = {}
    for batch_size, accumulation in ((1, 8), (2, 4), (8, 1)):
        argv = [
            *tiny,
            f"--batch_size={batch_size}",
            f"--gradient_accumulation_steps={accumulation}",
            "--max_iters=5",
        ]
        out = run("train.py", *argv, f"--out_dir=out{batch_size}")
        folder = tmp_path / f"out{batch_size}"
        norms = [line["norm"] for line in metrics(folder, "iter")]
        results[batch_size] = weights(folder), losses(out), metrics(folder, "eval"), norms
    for batch_size in (1, 2):
        ours, reference = results[batch_size], results[8]
        # the weights have moved by up to 5e-2; the norm is of the mean over micro-batches: AdamW would hide a
        # sum
        assert all(torch.allclose(ours[0][name], p, atol=2e-5) for name, p in reference[0].items())
        assert ours[3] == pytest.approx(reference[3], rel=1e-5)
        assert [float(x) for x in ours[1].values()] == pytest.approx(
            [float(x) for x in reference[1].values()], abs=2e-4
        )
        for a, b in zip(ours[2], reference[2], strict=True):
            assert a["val_loss"] == pytest.approx(b["val_loss"], abs=1e-4)


def test_evaluation_does_not_change_training(run, byte_data, tiny, tmp_path):
    often = run("train.py", *tiny, "--dropout=0.1", "--eval_interval=1", "--eval_iters=3", "--out_dir=often")
    rarely = run("train.py", *tiny, "--dropout=0.1", "--eval_interval=100", "--out_dir=rarely")
    assert losses(often) == losses(rarely)
    assert same(weights(tmp_path / "often"), weights(tmp_path / "rarely"))


def test_validation_loss_is_that_of_the_windows_spread_over_the_split(run, byte_data, tiny, tmp_path):
    run("train.py", *tiny, "--eval_iters=2", "--batch_size=7")
    state = checkpoint.load(tmp_path / "out/ckpt.pt")
    model = GPT(GPTConfig(**state["model_args"])).eval()
    model.load_state_dict(state["model"])
    ids = np.fromfile(byte_data / "fineweb_val_000000.bin", dtype="<u2")[512:]
    starts = [i * 62 // 24 * 16 for i in range(24)]  # 62 windows of 16 in 1,000 tokens, 24 of them
    rows = torch.from_numpy(np.stack([ids[s : s + 17] for s in starts]).astype(np.int64))
    expected = model(rows[:, :-1], rows[:, 1:])[1].item()
    assert metrics(tmp_path / "out", "eval")[-1]["val_loss"] == pytest.approx(expected, abs=1e-5)


# -----------------------------------------------------------------------------
# stopping and going on


def interrupt(argv, cwd, at, number, *, times=1):
    """Runs train.py, sends it the signal when it logs iteration `at`; returns its output and exit status."""
    command = [sys.executable, str(ROOT / "train.py"), *argv]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    before = signal.signal(number, signal.SIG_DFL)  # nohup and a shell's `&` have some signals ignored
    with subprocess.Popen(command, cwd=cwd, text=True, env=ENV, **pipes) as process:
        signal.signal(number, before)
        seen = ""
        for line in process.stdout:
            seen += line
            if line.startswith(f"iter {at}:"):
                for _ in range(times):
                    process.send_signal(number)
                    time.sleep(0.01)  # else two are one
        errors = process.stderr.read()
    assert "Traceback" not in errors
    assert "stopping; Ctrl-C again leaves without saving\n" in errors
    return seen, process.returncode


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_resumes_as_if_nothing_had_happened(
    run, byte_data, tiny, tmp_path, number, status
):
    argv = [*tiny, "--dropout=0.2", "--max_iters=200", "--lr_decay_iters=200", "--eval_interval=70"]
    whole = run("train.py", *argv, "--out_dir=whole")
    first, code = interrupt([*argv, "--out_dir=parts"], tmp_path, 20, number)
    assert code == status
    stopped_at = int(
        re.search(r"stopped at iteration (\d+); continue with: python .*--init_from=resume$", first, re.M)[1]
    )
    assert 21 <= stopped_at < 200
    second = run("train.py", *argv, "--out_dir=parts", "--init_from=resume")
    assert min(losses(second)) == stopped_at
    joined = {int(it): loss for it, loss, *_ in ITER.findall(first)} | losses(second)
    assert joined == losses(whole)
    assert same(weights(tmp_path / "parts"), weights(tmp_path / "whole"))
    for kind in ("iter", "eval"):
        assert [x["iter"] for x in metrics(tmp_path / "parts", kind)] == [
            x["iter"] for x in metrics(tmp_path / "whole", kind)
        ]


@pytest.mark.parametrize("number, status", [(signal.SIGHUP, 129), (signal.SIGTERM, 143)])
def test_a_second_signal_of_a_session_that_ends_does_not_break_off_the_save(
    byte_data, tiny, tmp_path, number, status
):
    argv = [*tiny, "--max_iters=100000", "--n_embd=512"]
    out, code = interrupt(argv, tmp_path, 20, number, times=3)
    assert code == status
    stopped_at = int(re.search(r"^stopped at iteration (\d+); continue with", out, re.M)[1])
    assert checkpoint.load(tmp_path / "out/ckpt.pt")["iter_num"] == stopped_at >= 21


@pytest.mark.parametrize(
    "flags, line, seconds, never",
    [
        # in an evaluation
        (["--eval_iters=50", "--n_embd=512", "--n_layer=12"], "evaluation:", 1.0, "step 0:"),
        # in an iteration of hours
        (["--gradient_accumulation_steps=1000000"], "step 0:", 1.0, "iter 0:"),
        # in the compiler
        (["--compile=True", "--n_layer=12"], "compiling the model", 3.0, "step 0:"),
    ],
)
def test_it_stops_soon_wherever_it_is(byte_data, tiny, tmp_path, flags, line, seconds, never):
    """The signal goes to all processes, as a terminal sends Ctrl-C; the compiler is one of them."""
    command = [sys.executable, str(ROOT / "train.py"), *tiny, *flags]
    env = ENV | dict(TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"))  # empty, so that it compiles for long
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with subprocess.Popen(
        command, cwd=tmp_path, text=True, env=env, start_new_session=True, **pipes
    ) as process:
        next(text for text in process.stdout if text.startswith(line))
        time.sleep(seconds)
        os.killpg(process.pid, signal.SIGINT)
        out, errors = process.communicate(timeout=300)
    assert process.returncode == 130 and "Traceback" not in errors and "failed" not in errors
    assert "stopped at iteration 0; continue with: python" in out and never not in out
    assert not metrics(tmp_path / "out", "compiled")  # broken off in the middle
    assert checkpoint.load(tmp_path / "out/ckpt.pt")["iter_num"] == 0


def piped(argv, reader, cwd):
    """Starts bash with train.py's output in a pipe to a reader, in a process group of its own."""
    command = f"{shlex.join([sys.executable, str(ROOT / 'train.py'), *argv])} | {reader}"
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    command = ["bash", "-c", f"set -o pipefail; {command}"]
    return subprocess.Popen(command, cwd=cwd, text=True, env=ENV, start_new_session=True, **pipes)


def test_ctrl_c_that_ends_the_reader_of_the_log_too_saves_and_says_so(byte_data, tiny, tmp_path):
    """As in `train.py | tee log`, where a terminal sends it to both."""
    # a state that takes longer to save than tee to end, even on one core
    argv = [*tiny, "--max_iters=1000000", "--eval_interval=1000000", "--n_embd=512"]
    with piped(argv, "tee log", tmp_path) as process:
        while not (tmp_path / "log").exists() or "iter 20:" not in (tmp_path / "log").read_text():
            assert process.poll() is None
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        errors = process.communicate(timeout=60)[1]
    stopped_at = int(re.search(r"^stopped at iteration (\d+); continue with: python ", errors, re.M)[1])
    assert checkpoint.load(tmp_path / "out/ckpt.pt")["iter_num"] == stopped_at >= 20
    assert "Traceback" not in errors and "BrokenPipe" not in errors


def test_a_reader_that_has_had_enough_ends_a_run_which_is_saved(byte_data, tiny, tmp_path):
    with piped([*tiny, "--max_iters=1000000"], "head -n 30", tmp_path) as process:
        out, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + 13 and out.count("\n") == 30
    assert "\nnobody reads the output any more: stopping\n" in errors
    stopped_at = int(re.search(r"^stopped at iteration (\d+); continue with: python ", errors, re.M)[1])
    assert checkpoint.load(tmp_path / "out/ckpt.pt")["iter_num"] == stopped_at > 0
    assert "Traceback" not in errors and "BrokenPipe" not in errors


def test_finetuning_that_only_makes_a_model_worse_keeps_it_as_the_best(trained, tiny, tmp_path):
    trained("sample.py", "--export=hf", "--device=cpu")
    flags = [*tiny, "--learning_rate=3.0", "--warmup_iters=0", "--max_iters=2", "--eval_interval=1"]
    out = trained("train.py", *flags, "--init_from=hf", "--out_dir=tuned")
    assert "next: python sample.py --out_dir=tuned --init_from=best" in re.sub(" +", " ", out.stdout)
    best = torch.load(tmp_path / "tuned/best.pt", weights_only=True)
    assert best["iter_num"] == 0 and min(float(val) for *_, val in STEP.findall(out.stdout)) == pytest.approx(
        best["best_val_loss"], abs=1e-4
    )
    old = weights(tmp_path / "out")
    name = "transformer.h.1.mlp.c_fc.weight"
    assert torch.equal(best["model"][name], old[name])
    # also if it was stopped before its first evaluation, and goes on by itself
    trained("train.py", *flags, "--init_from=hf", "--out_dir=auto", "--max_iters=0")
    (tmp_path / "auto/best.pt").unlink()
    trained("train.py", *flags, "--init_from=auto", "--out_dir=auto")
    assert same(weights(tmp_path / "auto", "best.pt"), weights(tmp_path / "tuned", "best.pt"))
    # but random weights are no model to keep
    trained("train.py", *flags, "--out_dir=random", "--max_iters=0")
    (tmp_path / "random/best.pt").unlink()
    trained("train.py", *flags, "--init_from=resume", "--out_dir=random", "--learning_rate=30.0")
    assert not (tmp_path / "random/best.pt").exists()
    out = trained("train.py", *flags, "--out_dir=anew", "--learning_rate=30.0")
    assert min(float(val) for *_, val in STEP.findall(out.stdout)[1:]) > float(STEP.findall(out.stdout)[0][2])
    error = trained("sample.py", "--out_dir=anew", "--init_from=best", status=1).stderr
    assert "train.py only when an evaluation improves on the start; --init_from=resume takes the" in error


def test_auto_starts_anew_or_resumes(run, byte_data, tiny):
    out = run("train.py", *tiny, "--init_from=auto", "--max_iters=6").stdout
    assert "note: init_from='auto' finds nothing to resume in out: a new model from scratch" in out
    out = run("train.py", *tiny, "--init_from=auto")
    assert "resuming from out/ckpt.pt at iteration 6" in out.stdout and min(losses(out)) == 6
    out = run("train.py", *tiny, "--init_from=auto")
    assert not losses(out) and [int(it) for it, *_ in STEP.findall(out.stdout)] == [12]


def test_best_weights_are_kept_apart_from_the_newest(run, byte_data, tiny, tmp_path):
    run("train.py", *tiny, "--max_iters=6")
    best = weights(tmp_path / "out", "best.pt")
    assert same(best, weights(tmp_path / "out"))
    # a huge learning rate makes it worse from here: the newest state moves on, the best one stays
    out = run("train.py", *tiny, "--init_from=resume", "--learning_rate=3.0", "--min_lr=3.0")
    assert float(STEP.findall(out.stdout)[-1][2]) > float(STEP.findall(out.stdout)[0][2])
    assert same(best, weights(tmp_path / "out", "best.pt")) and not same(best, weights(tmp_path / "out"))
    state = torch.load(tmp_path / "out/ckpt.pt", weights_only=True)
    assert state["best_val_loss"] == pytest.approx(float(STEP.findall(out.stdout)[0][2]), abs=1e-4)


def test_eval_only_evaluates_a_resumed_model_and_leaves_it_alone(run, byte_data, tiny, tmp_path):
    run("train.py", *tiny, "--max_iters=5")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    out = run("train.py", *tiny, "--init_from=resume", "--eval_only=True")
    assert [int(it) for it, *_ in STEP.findall(out.stdout)] == [5] and not losses(out)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    # nothing is said of a run that does not take place
    labels = re.findall(r"^(\w+): +", out.stdout, re.M)
    assert labels == ["device", "data", "model", "evaluation"] and "evaluation: once, 12 * 1 = " in out.stdout
    out = run("train.py", *tiny, "--eval_only=True")  # of a model from scratch, beside what is there
    assert [int(it) for it, *_ in STEP.findall(out.stdout)] == [0] and "overwritten" not in out.stdout
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_best_is_not_overwritten_by_worse_weights_after_going_back(run, byte_data, tiny, tmp_path):
    """As after kill -9: the newest best.pt is of a later iteration than the newest state."""
    argv = [*tiny, "--eval_interval=4", "--checkpoint_interval=6"]
    whole = run("train.py", *argv)
    best, path = (tmp_path / "out/best.pt").read_bytes(), tmp_path / "out/ckpt.pt"
    lowest = float(STEP.findall(whole.stdout)[-1][2])
    shutil.move(tmp_path / "out/ckpt_prev.pt", path)
    back = path.read_bytes()
    out = run("train.py", *argv, "--init_from=resume", "--learning_rate=1e-4").stdout
    assert f"note: out/best.pt, of iteration 12 and val loss {lowest:.4f}, is kept until a lower one" in out
    assert (tmp_path / "out/best.pt").read_bytes() == best
    assert checkpoint.load(path)["best_val_loss"] == pytest.approx(lowest, abs=1e-4)
    # and a run that goes the same way again ends with the same files
    path.write_bytes(back)
    again = run("train.py", *argv, "--init_from=resume")
    assert losses(again).items() <= losses(whole).items()
    assert same(weights(tmp_path / "out", "best.pt"), weights(tmp_path / "out"))


def test_a_best_that_is_gone_is_written_anew(run, byte_data, tiny, tmp_path):
    """Without it the loss to beat would be one whose weights nobody has."""
    argv = [*tiny, "--init_from=resume", "--learning_rate=3.0", "--min_lr=3.0"]
    run("train.py", *tiny, "--max_iters=6")
    best = tmp_path / "out/best.pt"
    state = (tmp_path / "out/ckpt.pt").read_bytes()
    best.unlink()  # as if only ckpt.pt had been copied
    out = run("train.py", *argv).stdout
    lowest, worse = (float(loss) for _, _, loss in STEP.findall(out))
    assert worse > lowest  # evaluated first, at iteration 6
    assert checkpoint.load(best)["iter_num"] == 6
    assert checkpoint.load(best)["best_val_loss"] == pytest.approx(lowest, abs=1e-4)
    # cut off, and no loss of this run is as low again
    (tmp_path / "out/ckpt.pt").write_bytes(state)
    os.truncate(best, 1000)
    out = run("train.py", *argv, "--eval_interval=9").stdout
    assert "note: out/best.pt cannot be read; the next evaluation writes it anew" in out
    assert checkpoint.load(best)["iter_num"] >= 9 and checkpoint.load(best)["best_val_loss"] > lowest


@pytest.mark.parametrize("flag", ["--dataset=other", "--eval_iters=2"])
def test_a_best_of_other_data_or_another_evaluation_is_not_this_runs(run, byte_data, tiny, tmp_path, flag):
    """Such a run was tried from the same state, and killed before its first ckpt.pt."""
    run("train.py", *tiny, "--max_iters=6")
    path = tmp_path / "out/ckpt.pt"
    back = path.read_bytes()
    shutil.copytree(byte_data, tmp_path / "data/other")
    for shard in (tmp_path / "data/other").glob("*.bin"):
        shards.write_shard(shard, np.full(5000, 7, dtype=np.uint16))  # soon learned
    argv = [*tiny, "--init_from=resume", "--allow_data_change=True"]
    run("train.py", *argv, "--learning_rate=0.1", "--max_iters=30", flag)
    path.write_bytes(back)
    out = run("train.py", *argv)
    assert "note: out/best.pt is of other data or another eval_iters; it starts anew" in out.stdout
    lowest = min(float(loss) for _, _, loss in STEP.findall(out.stdout))
    best = checkpoint.load(tmp_path / "out/best.pt")
    assert best["config"]["dataset"] == "toy" and best["config"]["eval_iters"] == 1
    assert best["best_val_loss"] == pytest.approx(lowest, abs=1e-4)


def test_resuming_another_model_is_refused_and_says_what_differs(run, byte_data, tiny):
    run("train.py", *tiny, "--max_iters=1")
    out = run("train.py", *tiny, "--init_from=resume", "--n_embd=64", "--block_size=8", status=1)
    assert (
        "n_embd=32, not 64" in out.stderr
        and "block_size=16, not 8" in out.stderr
        and "n_head" not in out.stderr
        and "; add --n_embd=32 --block_size=16 to go on with it, or start anew in another --out" in out.stderr
    )
    keys_not_given = [arg for arg in tiny if not re.match("--(n_|block_size)", arg)]
    assert losses(run("train.py", *keys_not_given, "--init_from=resume", "--max_iters=3"))


# -----------------------------------------------------------------------------
# killed, and faults on the way

NAN = float("nan")


@pytest.fixture
def faulty(monkeypatch):
    """faulty(condition, fault) makes GPT's forward pass call fault(forward, self, idx, targets) instead where
    condition(calls, model, idx) holds; calls counts the passes in training from 1 on."""

    def install(condition, fault):
        forward, calls = GPT.forward, itertools.count(1)

        def broken(self, idx, targets=None):
            number = next(calls) if self.training else 0
            if condition(number, self, idx):
                return fault(forward, self, idx, targets)
            return forward(self, idx, targets)

        monkeypatch.setattr(GPT, "forward", broken)

    return install


def gives_nan(forward, model, idx, targets):
    return None, forward(model, idx, targets)[1] * NAN


def runs_out_of_memory(*args):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.")


FAULTY = f"""
import os, runpy, sys
sys.path.insert(0, {str(ROOT)!r})
from sologpt import files
{{fault}}
sys.argv[0] = {str(ROOT / "train.py")!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run_with(fault, argv, cwd, status):
    """Runs train.py, in a process of its own, after the lines `fault`; returns the process."""
    command = [sys.executable, "-c", FAULTY.format(fault=fault), *argv]
    process = subprocess.run(command, cwd=cwd, env=ENV, capture_output=True, text=True)
    assert process.returncode == status and "Traceback" not in process.stderr, process.stdout + process.stderr
    return process


# where the process kills itself
KILLS = {
    "while the file is half written": "os.fsync = lambda f: kill('ckpt.pt.*.tmp')",
    "when ckpt.pt is ckpt_prev.pt, too": "os.replace = lambda a, b: (replace(a, b), kill('ckpt_prev.pt'))",
    "between the names, where there are no hard links": """
os.link = lambda *paths: os.open("nowhere/x", os.O_RDONLY)
os.replace = lambda a, b: (replace(a, b), kill('ckpt_prev.pt'))""",
    "when the new ckpt.pt is there": "files.sync_folder = lambda folder: kill('ckpt_prev.pt', 'ckpt.pt')",
}


def test_a_run_killed_while_it_saves_resumes_as_if_nothing_had_happened(run, byte_data, tiny, tmp_path):
    argv = [*tiny, "--dropout=0.2", "--checkpoint_interval=3", "--init_from=auto"]
    whole = run("train.py", *argv, "--out_dir=whole")
    for moment in KILLS:
        fault = f"""
import pathlib, signal
replace, out = os.replace, pathlib.Path({moment!r})
def kill(*there):  # in the save of iteration 6, when that of iteration 3 is there
    if all(list(out.glob(name)) for name in there) and '"checkpoint"' in (out / "metrics.jsonl").read_text():
        os.kill(os.getpid(), signal.SIGKILL)
{KILLS[moment]}
"""
        folder, argv[-1] = tmp_path / moment, f"--out_dir={moment}"
        run_with(fault, [*argv, "--init_from=auto"], tmp_path, status=-signal.SIGKILL)
        names = {path.name for path in folder.iterdir()}
        between, over = moment.startswith("between"), moment.startswith("when the new")
        partial = [name for name in names if name.startswith("ckpt.pt.")]
        assert ("ckpt.pt" in names, bool(partial)) == (not between, not over)
        second = run("train.py", *argv, "--init_from=auto")
        file, at = "ckpt_prev.pt" if between else "ckpt.pt", 6 if over else 3
        assert f"resuming from {moment}/{file} at iteration {at}," in second.stdout
        assert (
            f"{moment}/ckpt.pt is missing; taking {moment}/ckpt_prev.pt instead" in second.stderr
        ) == between
        assert losses(second) == {it: loss for it, loss in losses(whole).items() if it >= at}
        assert same(weights(folder), weights(tmp_path / "whole"))
        for kind in ("iter", "eval"):
            parts, reference = (metrics(out, kind) for out in (folder, tmp_path / "whole"))
            assert [(x["iter"], x.get("loss")) for x in parts] == [
                (x["iter"], x.get("loss")) for x in reference
            ]
        assert not list(folder.glob("*.tmp"))


def test_a_damaged_checkpoint_gives_way_to_the_one_before(run, byte_data, tiny, tmp_path):
    whole = run("train.py", *tiny, "--checkpoint_interval=4", "--out_dir=whole")
    assert [line["iter"] for line in metrics(tmp_path / "whole", "checkpoint")] == [4, 8, 12]
    assert [line["iter"] for line in metrics(tmp_path / "whole", "eval")] == [0, 6, 12]
    run("train.py", *tiny, "--checkpoint_interval=4", "--max_iters=8", "--eval_interval=8")
    path = tmp_path / "out/ckpt.pt"
    path.write_bytes(path.read_bytes()[:-1000])
    before = (tmp_path / "out/ckpt_prev.pt").read_bytes()
    out = run("train.py", *tiny, "--init_from=auto", "--checkpoint_interval=20")
    assert re.search(
        "^warning: cannot read .*ckpt.pt, damaged .*; taking out/ckpt_prev.pt instead$", out.stderr, re.M
    )
    assert min(losses(out)) == 4 and losses(out)[11] == losses(whole)[11]
    assert same(weights(tmp_path / "out"), weights(tmp_path / "whole"))
    assert (tmp_path / "out/ckpt_prev.pt").read_bytes() == before  # the damaged one did not take its place


def test_a_stop_without_room_to_save_says_so(byte_data, tiny, tmp_path):
    limited = f"ulimit -f 20; exec {sys.executable} {ROOT / 'train.py'} {' '.join(tiny)} --max_iters=100000"
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with subprocess.Popen(["bash", "-c", limited], cwd=tmp_path, text=True, env=ENV, **pipes) as process:
        while (line := process.stdout.readline()) and not line.startswith("iter 3:"):
            pass
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate()
    assert process.returncode == 1 and "Traceback" not in errors
    last = errors.splitlines()[-1]
    assert re.fullmatch(
        r"error: iteration \d+, .* could not be saved; nothing of this run is saved yet", last
    )


def test_a_bad_step_is_skipped_and_resuming_across_it_is_exact(run, byte_data, tiny, tmp_path, faulty):
    argv = [*tiny, "--dropout=0.2", "--batch_size=8", "--gradient_accumulation_steps=1"]
    windows, bad = shards.Windows(shards.find_shards(byte_data, "train"), 16, 320), [2, 5, 6]
    # the passes to break are known by the sum of their inputs, so that a resumed run meets them too
    sums = [int(windows.read(windows.training(8 * it, 8, 1337))[:, :-1].sum()) for it in range(12)]
    assert len(set(sums)) == 12
    broken = [sums[it] for it in bad]
    faulty(lambda calls, model, idx: model.training and int(idx.sum()) in broken, gives_nan)
    out = run("train.py", *argv, "--out_dir=whole")
    found = metrics(tmp_path / "whole", "bad_step")
    assert [(line["iter"], line["in_row"], line["norm"]) for line in found] == [
        (2, 1, None),
        (5, 1, None),
        (6, 2, None),
    ]
    assert (
        "warning: loss nan and gradient norm nan in iteration 5: its update is skipped (1 in a row)"
        in out.stderr
    )
    assert re.search(r"^trouble: +3 updates were not finite, and skipped$", out.stdout, re.M)
    assert out.stderr.count("its update is skipped") == len(bad) == 3
    state = torch.load(tmp_path / "whole/ckpt.pt", weights_only=True)
    assert {int(s["step"]) for s in state["optimizer"]["state"].values()} == {12 - len(bad)}
    assert state["bad_steps"] == len(bad) and state["tokens_seen"] == 12 * 128
    assert all(p.isfinite().all() for p in state["model"].values())
    run("train.py", *argv, "--out_dir=parts", "--max_iters=6")
    run("train.py", *argv, "--out_dir=parts", "--init_from=resume")
    assert same(weights(tmp_path / "parts"), state["model"])
    resumed = torch.load(tmp_path / "parts/ckpt.pt", weights_only=True)
    assert resumed["bad_steps"] == len(bad) and resumed["tokens_seen"] == 12 * 128
    assert metrics(tmp_path / "parts", "bad_step") == found


def test_a_run_that_has_blown_up_stops(run, byte_data, tiny, tmp_path):
    run("train.py", *tiny, "--max_iters=6")
    before = weights(tmp_path / "out")
    argv = [*tiny, "--init_from=resume", "--decay_lr=False", "--learning_rate=1e30", "--max_bad_steps=3"]
    out = run("train.py", *argv, status=1)
    assert out.stderr.count("its update is skipped") == 3
    last = out.stderr.splitlines()[-1]
    assert last.startswith(
        "error: no finite gradient in the 3 iterations 7 to 9; out/ckpt.pt holds iteration 6. Try a low"
    )
    assert same(weights(tmp_path / "out"), before)
    # a state saved amid skipped updates would have the weights that led to them: it replaces no good one
    out = run("train.py", *argv, "--checkpoint_interval=1", "--max_iters=30", status=1)
    assert "in the 3 iterations 7 to 9; out/ckpt.pt holds iteration 7" in out.stderr
    assert same(weights(tmp_path / "out", "ckpt_prev.pt"), before)
    shutil.move(tmp_path / "out/ckpt_prev.pt", tmp_path / "out/ckpt.pt")
    # here the weights are infinite when the run is over: they do not replace the good ones
    out = run("train.py", *argv, "--learning_rate=3e38", "--weight_decay=10.0", "--max_iters=7", status=1)
    assert "moments that are not finite; out/ckpt.pt holds iteration 6" in out.stderr
    assert same(weights(tmp_path / "out"), before)


# -----------------------------------------------------------------------------
# out of memory: there is none on a CPU, so a stand-in raises what torch raises on a GPU


def test_a_batch_that_does_not_fit_becomes_smaller_micro_batches_of_the_same_run(
    run, byte_data, tiny, tmp_path, faulty, monkeypatch
):
    argv = [*tiny, "--dropout=0.2", "--max_iters=8"]
    faulty(lambda calls, model, idx: len(idx) > 2, runs_out_of_memory)  # already in the first evaluation
    out = run("train.py", *argv, "--batch_size=9", "--gradient_accumulation_steps=2", "--out_dir=big")
    monkeypatch.undo()
    assert re.findall("out of memory with .*", out.stderr) == [
        "out of memory with batch_size=9; from iteration 0 on batch_size=3, gradient_accumulation_steps=6",
        "out of memory with batch_size=3; from iteration 0 on batch_size=1, gradient_accumulation_steps=18",
    ]
    run("train.py", *argv, "--batch_size=1", "--gradient_accumulation_steps=18", "--out_dir=small")
    assert same(weights(tmp_path / "big"), weights(tmp_path / "small"))
    for kind in ("iter", "eval"):
        big, small = (metrics(tmp_path / folder, kind) for folder in ("big", "small"))
        assert [(x["iter"], x.get("loss"), x.get("val_loss")) for x in big] == [
            (x["iter"], x.get("loss"), x.get("val_loss")) for x in small
        ]


def test_memory_that_runs_out_later_is_saved_from_first(run, byte_data, tiny, tmp_path, faulty):
    argv = [*tiny, "--dropout=0.2", "--eval_interval=20"]
    # the second micro-batch of iteration 5: the first one's gradients are there, and random numbers have been
    # drawn
    faulty(lambda calls, model, idx: calls >= 12 and len(idx) > 2, runs_out_of_memory)
    out = run("train.py", *argv)
    lines = (out.stdout + out.stderr).splitlines()
    smaller = "from iteration 5 on batch_size=2, gradient_accumulation_steps=4"
    assert f"warning: out of memory with batch_size=4; {smaller}" in lines
    assert [line["iter"] for line in metrics(tmp_path / "out", "iter")] == list(range(12))
    assert [line["iter"] for line in metrics(tmp_path / "out", "checkpoint")] == [5, 12]
    (tmp_path / "small").mkdir()
    shutil.copy(tmp_path / "out/ckpt_prev.pt", tmp_path / "small/ckpt.pt")
    smaller = ("--batch_size=2", "--gradient_accumulation_steps=4", "--out_dir=small", "--init_from=resume")
    assert min(losses(run("train.py", *argv, *smaller))) == 5
    assert same(weights(tmp_path / "out"), weights(tmp_path / "small"))


def test_memory_that_runs_out_in_an_update_ends_the_run_as_that_cannot_be_repeated(
    run, byte_data, tiny, tmp_path, monkeypatch
):
    run("train.py", *tiny, "--max_iters=3")
    before = weights(tmp_path / "out")
    monkeypatch.setattr(torch.optim.AdamW, "step", runs_out_of_memory)
    out = run("train.py", *tiny, "--init_from=resume", "--eval_interval=100", status=1)
    assert out.stderr.splitlines()[-1].startswith("error: out of memory in the middle of an update, which")
    assert same(weights(tmp_path / "out"), before)


def test_memory_that_runs_out_before_an_update_is_applied_ends_the_run_too(
    run, byte_data, tiny, tmp_path, monkeypatch
):
    """As another process may have applied it by then."""
    monkeypatch.setattr(torch.nn.utils, "get_total_norm", runs_out_of_memory)
    out = run("train.py", *tiny, status=1)
    assert out.stderr.splitlines()[-1].startswith("error: out of memory in the middle of an update, which")


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
        "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
        "[enforce fail at alloc_cpu.cpp] . DefaultCPUAllocator: can't allocate memory: you tried to allocate",
    ],
)
def test_memory_runs_out_by_many_names_and_not_because_of_the_compiler(text):
    error = RuntimeError(text)
    assert out_of_memory(error)
    with pytest.raises(RuntimeError) as raised, hardware.compiling():
        raise error
    assert raised.value is error
    with pytest.raises(UserError, match="torch.compile failed: no ptxas; try --compile=False"):
        with hardware.compiling():
            raise RuntimeError("no ptxas")


def test_without_auto_fit_the_run_ends_with_what_to_do(run, byte_data, tiny, faulty):
    faulty(lambda calls, model, idx: calls >= 12, runs_out_of_memory)
    out = run("train.py", *tiny, "--auto_fit=False", status=1)
    assert out.stderr.splitlines()[-1] == (
        "error: out of memory with batch_size=4; --batch_size=2 --gradient_accumulation_steps=4 is the same "
        "run in less memory, and --auto_fit=True finds it automatically "
        "(out/ckpt.pt holds iteration 5, this is iteration 5)"
    )


def test_without_room_for_one_sequence_the_run_ends_with_what_to_do(run, byte_data, tiny, faulty):
    faulty(lambda calls, model, idx: True, runs_out_of_memory)
    out = run("train.py", *tiny, "--batch_size=2", "--out_dir=new", status=1)
    first, error = out.stderr.splitlines()
    assert "from iteration 0 on batch_size=1, gradient_accumulation_steps=4" in first
    assert (
        "batch_size=1; by estimate 0.0M parameters need 0.00 GB" in error and "smaller --block_size" in error
    )


# -----------------------------------------------------------------------------
# what a resumed run does otherwise


def test_other_data_are_refused_unless_allowed(run, byte_data, tiny, tmp_path):
    run("train.py", *tiny, "--max_iters=3")
    shutil.copy(byte_data / "fineweb_train_000001.bin", byte_data / "fineweb_train_000004.bin")
    resume = [*tiny, "--init_from=resume", "--max_iters=4"]
    out = run("train.py", *resume, status=1)
    assert (
        "data/toy is not what out/ckpt.pt was trained on: fineweb_train_000004.bin: 3,600 uint16 tokens"
        in out.stderr
    )
    assert ", was missing; to continue with it anyway: --allow_data_change=True" in out.stderr
    error = run("train.py", *resume, "--allow_data_change=True").stderr
    assert "warning: data/toy is not what" in error
    assert "comes in another order; parts of it will be seen twice or never: other training data\n" in error
    assert "warning" not in run("train.py", *resume).stderr  # these are its data now
    shutil.copy(byte_data / "fineweb_val_000000.bin", byte_data / "fineweb_val_000001.bin")
    error = run("train.py", *resume, "--allow_data_change=True").stderr
    assert "warning: data/toy is not what" in error and "another order" not in error


def test_a_loss_on_other_windows_is_no_best_one(run, byte_data, tiny, tmp_path):
    run("train.py", *tiny, "--max_iters=3")
    argv = [*tiny, "--init_from=resume", "--max_iters=4", "--learning_rate=0.0", "--min_lr=0.0"]
    again = run("train.py", *argv).stdout
    assert "start anew" not in again
    before = torch.load(tmp_path / "out/best.pt", weights_only=True)
    out = run("train.py", *argv, "--max_iters=5", "--eval_iters=2").stdout
    assert "eval_iters has changed: the best val loss, and best.pt, start anew" in out
    after = torch.load(tmp_path / "out/best.pt", weights_only=True)
    assert before["config"]["eval_iters"] != after["config"]["eval_iters"] == 2
    assert "start anew; the one that is there becomes out/best_before.pt\n" in out
    assert same(weights(tmp_path / "out", "best_before.pt"), before["model"])
    # a lower loss on the same windows takes its place, and an evaluation by itself writes nothing
    kept = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.pt")}
    out = run("train.py", *argv, "--max_iters=5", "--eval_iters=3", "--eval_only=True").stdout
    assert "anew" not in out and "to train on" not in out
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.pt")} == kept


def test_epochs_are_counted_from_a_change_of_data_on(run, byte_data, tiny, tmp_path):
    run("train.py", *tiny, "--max_iters=9", "--eval_interval=9")
    shutil.copytree(byte_data, tmp_path / "data/other")
    for shard in (tmp_path / "data/other").glob("*.bin"):
        shards.write_shard(shard, np.full(1601, 7, dtype=np.uint16))
    windows = 3 * 100  # of 16 tokens, in three shards
    argv = [*tiny, "--init_from=resume", "--allow_data_change=True", "--dataset=other"]
    out = run("train.py", *argv).stdout
    share = f"{3 * 4 * 2 / windows:.3g} epochs since the data changed"  # 3 iterations of 4 * 2 sequences
    assert f"1,152 + 3 * 128 = 1,536 tokens, {share}\n" in out
    assert re.search(rf"^data: +data/other, {share}$", out, re.M)
    # nor are they forgotten when that run is resumed
    out = run("train.py", *argv, "--max_iters=15").stdout
    assert f"1,920 tokens, {6 * 4 * 2 / windows:.3g} epochs since the data changed" in out


def test_minutes_that_are_over_before_the_first_iteration_are_pointed_out(run, byte_data, tiny):
    out = run("train.py", *tiny, "--max_minutes=1e-9").stdout
    assert re.search(r"^trouble: +max_minutes=1e-09 ran out before the first iteration$", out, re.M)


def test_a_run_that_has_used_its_minutes_says_so(run, byte_data, tiny):
    run("train.py", *tiny, "--max_iters=3")
    out = run("train.py", *tiny, "--init_from=resume", "--max_minutes=1e-9").stdout
    assert "minutes, all of max_minutes=1e-09; to train on, raise --max_minutes" in out


def test_data_with_more_ids_than_the_model_has_rows_are_refused(run, byte_data, tiny):
    run("train.py", *tiny, "--max_iters=1")
    (byte_data / "meta.json").write_text('{"encoding": "gpt2", "vocab_size": 50257, "eot_token": 50256}')
    out = run("train.py", *tiny, "--init_from=resume", "--allow_data_change=True", status=1)
    assert out.stderr == "error: data/toy has 50257 token ids, the model in out/ckpt.pt only 320\n"


def test_another_learning_rate_or_order_of_data_is_pointed_out(run, byte_data, tiny):
    run("train.py", *tiny, "--max_iters=12")
    resumed = [*tiny, "--init_from=resume", "--max_iters=12"]
    for min_lr in ("6e-5", "6.05e-5"):
        assert "warning" not in run("train.py", *resumed, f"--min_lr={min_lr}").stderr
    assert "iteration 12 is 6.300e-05, the" in run("train.py", *resumed, "--min_lr=6.3e-5").stderr
    argv = [
        *tiny,
        "--init_from=resume",
        "--max_iters=14",
        "--lr_decay_iters=24",
        "--batch_size=6",
        "--seed=5",
    ]
    argv += ["--min_lr=1e-3", "--eval_iters=100"]
    # 12 of 24 iterations: (12 - 2) / (24 - 2) of the way down from 1e-2 to 1e-3, instead of the old min_lr of
    # 6e-5
    lr = 1e-3 + 0.5 * (1 + math.cos(math.pi * 10 / 22)) * (1e-2 - 1e-3)
    out = run("train.py", *argv)
    assert out.stderr.splitlines() == [
        f"warning: the learning rate of iteration 12 is {lr:.3e}, the schedule so far has 6.000e-05",
        "warning: settings that change from here on: eval_iters=100, was 1",
        "warning: from here on the data comes in another order; parts of it will be seen twice or never: "
        "12 sequences per iteration and seed 5, so far 8 and seed 1337",
    ]
    assert "note: val has only 62 windows; all of them are evaluated" in out.stdout


# -----------------------------------------------------------------------------
# a checkpoint of the version before the classes GPT and ModernGPT, of iteration 6 of 12: what that version
# went on to (for arch="modern" see test_recipe.py)


def test_a_checkpoint_of_an_older_version_goes_on_as_it_would_have_there(run, byte_data, tiny, tmp_path):
    (tmp_path / "out").mkdir()
    shutil.copy(ROOT / "tests/checkpoints/gpt2.pt", tmp_path / "out/ckpt.pt")
    argv = [*tiny, "--n_layer=1", "--n_embd=16", "--dropout=0.1", "--init_from=resume"]
    assert not run("train.py", *argv).stderr
    expected = [4.624204, 4.481507, 4.349643, 4.284407, 4.219733, 4.194811]
    assert [line["loss"] for line in metrics(tmp_path / "out", "iter")] == pytest.approx(expected, abs=2e-4)
    assert metrics(tmp_path / "out", "eval")[-1]["val_loss"] == pytest.approx(4.170765, abs=2e-4)


def test_a_run_from_before_epochs_were_shifted_goes_on_unshifted(run, byte_data, tiny, tmp_path, monkeypatch):
    """Two epochs of 84 iterations; without a shift, as then, the second one has the same windows."""
    argv = [*tiny, "--max_iters=100", "--eval_interval=90", "--lr_decay_iters=100"]
    shifted = losses(run("train.py", *argv, "--out_dir=shifted"))
    monkeypatch.setattr(shards, "epoch_shift", lambda block_size, seed, epoch: 0)
    before = losses(run("train.py", *argv))
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert [it for it in before if before[it] != shifted[it]][0] in (84, 85)  # the epoch ends in iteration 84
    state = checkpoint.load(tmp_path / "out/ckpt_prev.pt")
    assert state["iter_num"] == 90 and state.pop("shifting") is True
    torch.save(state, tmp_path / "out/ckpt.pt")
    resumed = losses(run("train.py", *argv, "--init_from=resume"))
    assert resumed == {it: loss for it, loss in before.items() if it >= 90}
    assert checkpoint.load(tmp_path / "out/ckpt.pt")["shifting"] is False
    # and a new one resumes as it would have gone on
    shutil.move(tmp_path / "shifted/ckpt_prev.pt", tmp_path / "shifted/ckpt.pt")
    resumed = losses(run("train.py", *argv, "--out_dir=shifted", "--init_from=resume"))
    assert resumed == {it: loss for it, loss in shifted.items() if it >= 90}


# -----------------------------------------------------------------------------
# nanoGPT


def nanogpt_checkpoint(folder, iter_num):
    """Writes a checkpoint as nanoGPT does (prefixed names, best_val_loss a tensor); returns its model and
    optimizer."""
    torch.manual_seed(5)
    args = dict(n_layer=2, n_head=2, n_embd=32, block_size=16, bias=False, vocab_size=320, dropout=0.0)
    model = GPT(GPTConfig(**args))
    groups = [[p for p in model.parameters() if p.dim() >= 2], [p for p in model.parameters() if p.dim() < 2]]
    settings = [dict(params=groups[0], weight_decay=0.1), dict(params=groups[1], weight_decay=0.0)]
    optimizer = torch.optim.AdamW(settings, lr=1e-2, betas=(0.9, 0.95))
    idx = torch.from_numpy(np.frombuffer(b"pack my box with jugs now.", dtype=np.uint8).astype(np.int64))[
        None, :17
    ]
    for _ in range(iter_num):
        optimizer.zero_grad()
        model(idx[:, :-1], idx[:, 1:])[1].backward()
        optimizer.step()
    folder.mkdir()
    state = {"_orig_mod." + name: p for name, p in model.state_dict().items()}
    saved = dict(model=state, optimizer=optimizer.state_dict(), model_args=args, iter_num=iter_num)
    torch.save(saved | dict(best_val_loss=torch.tensor(2.5), config=dict(dataset="toy")), folder / "ckpt.pt")
    return model, optimizer


@pytest.mark.parametrize("always, kind", [(True, "val loss"), (False, "lowest val loss so far")])
def test_the_loss_of_nanogpts_checkpoint_is_the_lowest_only_if_it_saved_none_higher(
    run, byte_data, tmp_path, always, kind
):
    nanogpt_checkpoint(tmp_path / "out", 8)
    state = torch.load(tmp_path / "out/ckpt.pt", weights_only=True)
    state["config"]["always_save_checkpoint"] = always
    torch.save(state, tmp_path / "out/ckpt.pt")
    out = run("sample.py", "--out_dir=out", "--device=cpu", "--num_samples=1", "--max_new_tokens=1")
    assert f"out/ckpt.pt: iteration 8, {kind} 2.5000\n" in out.stderr


def test_a_checkpoint_of_nanogpt_is_resumed_and_sampled(run, byte_data, tiny, tmp_path):
    model, optimizer = nanogpt_checkpoint(tmp_path / "out", 8)
    args = [
        *tiny,
        "--init_from=resume",
        "--max_iters=9",
        "--decay_lr=False",
        "--grad_clip=0",
        "--batch_size=8",
    ]
    out = run("train.py", *args, "--gradient_accumulation_steps=1")
    assert "at iteration 8, best val loss 2.5000" in out.stdout
    assert "nanoGPT evaluates random batches: the best val loss, and best.pt, start anew" in out.stdout
    assert checkpoint.load(tmp_path / "out/ckpt.pt")["shifting"] is True
    best = torch.load(tmp_path / "out/best.pt", weights_only=True)["best_val_loss"]
    assert f"{best:.4f}" in [val for _, _, val in STEP.findall(out.stdout)] and "trained on" not in out.stderr
    # the ninth update by hand: sequences 64 to 71 of the run, its own optimizer
    windows = shards.Windows(shards.find_shards(byte_data, "train"), 16, 320)
    rows = torch.from_numpy(windows.read(windows.training(64, 8, 1337)))
    optimizer.zero_grad()
    model(rows[:, :-1], rows[:, 1:])[1].backward()
    optimizer.step()
    resumed = weights(tmp_path / "out")
    assert all(torch.allclose(resumed[name], p, atol=1e-6) for name, p in model.state_dict().items())
    shutil.rmtree(tmp_path / "out")
    nanogpt_checkpoint(tmp_path / "out", 100)
    byte_data.rename(byte_data.with_name("other"))
    out = run("train.py", *args, "--dataset=other", "--max_iters=100")
    assert "out/ckpt.pt was trained on toy, from here on it is data/other" in out.stderr
    text = run(
        "sample.py",
        "--start=pack my",
        "--temperature=0",
        "--max_new_tokens=9",
        "--num_samples=1",
        "--device=cpu",
    )
    assert text.stdout.splitlines()[0] == "pack my box with"


def test_nanogpts_weights_are_kept_as_they_may_be_its_best(run, byte_data, tiny, tmp_path):
    nanogpt_checkpoint(tmp_path / "out", 8)
    theirs = (tmp_path / "out/ckpt.pt").read_bytes()
    argv = [*tiny, "--init_from=resume", "--eval_interval=5", "--always_save_checkpoint=False"]
    out = run("train.py", *argv, "--max_iters=20", "--learning_rate=3.0").stdout
    assert "start anew; nanoGPT's checkpoint becomes out/best_before.pt\n" in out
    assert (tmp_path / "out/best_before.pt").read_bytes() == theirs
    assert checkpoint.load(tmp_path / "out/ckpt.pt")["iter_num"] == 20


def test_resuming_from_nanogpt_knows_its_schedule_and_the_tokens_it_has_seen(run, byte_data, tiny, tmp_path):
    nanogpt_checkpoint(tmp_path / "out", 8)
    state = torch.load(tmp_path / "out/ckpt.pt", weights_only=True)
    state["config"] |= dict(learning_rate=1e-2, min_lr=0, warmup_iters=0, lr_decay_iters=16.0, max_iters=16)
    state["config"] |= dict(batch_size=12, gradient_accumulation_steps=1)
    torch.save(state, tmp_path / "out/ckpt.pt")
    argv = ["--init_from=resume", "--max_iters=16", "--warmup_iters=0", "--eval_interval=4"]
    out = run("train.py", *tiny, *argv, "--schedule=wsd", "--cooldown_frac=0.4")
    # half way down a cosine from 1e-2 to 0
    assert "the learning rate of iteration 8 is 1.000e-02, the schedule so far has 5.000e-03" in out.stderr
    # 12 windows of 16 in each of its iterations, 4 * 2 in each of ours
    assert metrics(tmp_path / "out", "iter")[-1]["tokens"] == 8 * 12 * 16 + 8 * 8 * 16


def test_a_run_of_nanogpts_on_other_characters_or_in_other_batches_is_pointed_out(
    run, byte_data, tiny, tmp_path
):
    nanogpt_checkpoint(tmp_path / "out", 8)  # of 320 ids
    argv = [*tiny, "--init_from=resume", "--max_iters=8"]
    state = torch.load(tmp_path / "out/ckpt.pt", weights_only=True)
    state["config"] |= dict(batch_size=12, gradient_accumulation_steps=1)
    torch.save(state, tmp_path / "out/ckpt.pt")
    assert "8 sequences per iteration, was 12" in run("train.py", *argv).stderr
    nanogpt_checkpoint(tmp_path / "other", 8)
    shutil.rmtree(byte_data)
    byte_data.mkdir()
    for split in ("train", "val"):
        np.arange(5000, dtype=np.uint16).__mod__(250).tofile(byte_data / f"{split}.bin")
    for rows, status in ((320, 0), (300, 1)):
        characters = {i: chr(i) for i in range(rows)}
        (byte_data / "meta.pkl").write_bytes(pickle.dumps(dict(vocab_size=rows, itos=characters)))
        out = run("train.py", *argv, "--out_dir=other", "--eval_only=True", status=status)
        text = run("sample.py", "--out_dir=other", "--device=cpu", "--max_new_tokens=1", status=status)
    assert "the 300 ids of data/toy (characters) are not the 320 that nanoGPT trained" in out.stderr
    assert "does not say what its 320 token ids mean" in text.stderr


def test_a_run_of_nanogpts_on_gpt2s_ids_does_not_go_on_with_bytes(run, byte_data, tiny, tmp_path):
    """As after preparing data/shakespeare anew, where nanoGPT's token files were."""
    nanogpt_checkpoint(tmp_path / "out", 8)
    state = torch.load(tmp_path / "out/ckpt.pt", weights_only=True)
    state["model_args"]["vocab_size"] = 50304
    for name in ("lm_head.weight", "transformer.wte.weight"):
        state["model"][f"_orig_mod.{name}"] = torch.zeros(50304, 32)
    torch.save(state, tmp_path / "out/ckpt.pt")
    out = run("train.py", *tiny, "--init_from=resume", status=1)
    assert "the 257 ids of data/toy (bytes) are not the 50304 that nanoGPT trained out/ckpt.pt" in out.stderr
    text = run("sample.py", "--device=cpu", status=1).stderr
    assert "what its 50304 token ids mean; data/toy has others (bytes): put nanoGPT's data there" in text


def test_samples_of_a_model_of_another_vocabulary_are_of_the_ids_of_the_data(run, byte_data, tiny, tmp_path):
    nanogpt_checkpoint(tmp_path / "out", 8)
    run("sample.py", "--export=exported", "--device=cpu")  # of 257 ids
    few = tmp_path / "data/few"
    few.mkdir()
    for split in ("train", "val"):
        np.arange(2000, dtype=np.uint16).__mod__(5).tofile(few / f"{split}.bin")
    (few / "meta.pkl").write_bytes(pickle.dumps(dict(vocab_size=5, itos=dict(enumerate("abcde")))))
    argv = ["--init_from=exported", "--dataset=few", "--allow_data_change=True", "--sample_interval=6"]
    run("train.py", *tiny, *argv, "--out_dir=on", "--max_iters=1")
    [row] = metrics(tmp_path / "on", "sample")
    assert set("".join(text for sample in row["samples"] for text in sample.values())) <= set("abcde")


def test_moments_in_another_order_have_a_way_on(run, byte_data, tiny, tmp_path):
    nanogpt_checkpoint(tmp_path / "out", 8)
    state = torch.load(tmp_path / "out/ckpt.pt", weights_only=True)
    moments = state["optimizer"]["state"]
    moments[0], moments[2] = moments[2], moments[0]
    torch.save(state, tmp_path / "out/ckpt.pt")
    out = run("train.py", *tiny, "--init_from=resume", status=1)
    assert "(an old nanoGPT's); export it with sample.py --export=FOLDER" in out.stderr
    run("sample.py", "--export=exported", "--device=cpu")
    argv = [*tiny, "--init_from=exported", "--out_dir=on", "--max_iters=1"]
    assert "done: iteration 1" in run("train.py", *argv).stdout


def test_a_run_past_its_best_loss_says_where_that_is(run, byte_data, tiny, tmp_path):
    steady = [*tiny, "--decay_lr=False", "--out_dir=worse"]
    run("train.py", *steady, "--max_iters=6")
    out = run("train.py", *steady, "--init_from=resume", "--max_iters=12", "--learning_rate=0.9")
    assert re.search(r"^next: +python sample.py --out_dir=worse --init_from=best$", out.stdout, re.M)
    assert "lowest val loss so far" in run("sample.py", "--out_dir=worse", "--device=cpu").stderr
    # an evaluation alone does not need a larger max_iters
    out = run("train.py", *steady, "--init_from=resume", "--max_iters=5", "--eval_only=True")
    assert "step 12: train loss" in out.stdout
    assert (
        "past max_iters=5" in run("train.py", *steady, "--init_from=resume", "--max_iters=5", status=1).stderr
    )


def test_our_checkpoint_holds_what_nanogpt_reads(run, byte_data, tiny, tmp_path):
    run("train.py", *tiny, "--max_iters=2", "--compile=False")
    state = torch.load(tmp_path / "out/ckpt.pt", weights_only=True)
    assert {"model", "optimizer", "model_args", "iter_num", "best_val_loss", "config"} <= state.keys()
    # and what it does not know: scaler and random state, the GELU, what the data and their ids are
    assert {"scaler", "rng", "gelu", "arch", "tokenizer", "data", "dtype"} <= state.keys()
    names = {"n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout"}
    assert state["model_args"].keys() == names  # nanoGPT passes them on as GPTConfig(**model_args)
    assert state["config"]["dataset"] == "toy"
    assert list(state["model"])[:2] == ["transformer.wte.weight", "transformer.wpe.weight"]
    assert "lm_head.weight" in state["model"]


NANOGPT = os.environ.get("NANOGPT")


@pytest.mark.skipif(
    not NANOGPT, reason="set NANOGPT to a checkout of github.com/karpathy/nanoGPT to run the two in turn"
)
def test_nanogpt_itself_and_this_project_continue_each_others_runs(run, tmp_path):
    folder = tmp_path / "data/chars"
    folder.mkdir(parents=True)
    ids = np.frombuffer(b"abcabcabd" * 300, dtype=np.uint8) - 97
    for split in ("train", "val"):
        ids.astype(np.uint16).tofile(folder / f"{split}.bin")
    itos = dict(enumerate("abcd"))
    (folder / "meta.pkl").write_bytes(
        pickle.dumps(dict(vocab_size=4, itos=itos, stoi={c: i for i, c in itos.items()}))
    )
    for name in ("model.py", "train.py", "sample.py", "configurator.py"):
        shutil.copy(Path(NANOGPT) / name, tmp_path)
    argv = "--dataset=chars --device=cpu --compile=False --n_layer=2 --n_head=2 --n_embd=32 --block_size=9 "
    argv += "--batch_size=8 "
    argv += "--gradient_accumulation_steps=1 --learning_rate=1e-2 --eval_iters=2 --eval_interval=20 "
    argv += "--warmup_iters=2"
    settings = dict(cwd=tmp_path, capture_output=True, text=True, check=True, env=ENV)

    def theirs(script, *more):
        return subprocess.run([sys.executable, script, *more], **settings).stdout

    theirs("train.py", *argv.split(), "--max_iters=60")
    out = run("train.py", *argv.split(), "--init_from=resume", "--max_iters=100")
    assert min(losses(out)) == 60
    assert "resuming from out/ckpt.pt at iteration 60" in out.stdout
    ours = run(
        "sample.py",
        "--start=ab",
        "--max_new_tokens=30",
        "--num_samples=1",
        "--temperature=0.01",
        "--device=cpu",
    )
    sample = [
        "--start=ab",
        "--max_new_tokens=30",
        "--num_samples=1",
        "--temperature=0.01",
        "--device=cpu",
        "--dtype=float32",
    ]
    assert ours.stdout.splitlines()[0] in theirs("sample.py", *sample)
    assert "cab" in ours.stdout
    resumed = theirs("train.py", *argv.split(), "--init_from=resume", "--max_iters=120")
    assert "step 100:" in resumed and "iter 120:" in resumed


# -----------------------------------------------------------------------------
# mistakes: one line, exit status 1


@pytest.mark.parametrize(
    "change, message",
    [
        (["--dataset=nowhere"], "there is no folder data/nowhere or nowhere for dataset='nowhere'"),
        (
            ["--init_from=resume"],
            "there is no checkpoint out/ckpt.pt; train first, or name its folder with --out_dir=",
        ),
        (["--block_size=2000"], "hold no window of block_size=2000"),
        (["--dtype=float16"], "dtype='float16' needs a CUDA GPU, this is cpu; use bfloat16 or float32"),
        (["--out_dir=data/toy/meta.json/x"], "Not a directory"),
        (["--init_from=data/toy"], "data/toy is no model in Hugging Face's format: it has no config.json"),
    ],
)
def test_a_mistake_is_one_line(run, byte_data, tiny, change, message):
    out = run("train.py", *tiny, *change, status=1)
    assert message in out.stderr and len(out.stderr.splitlines()) == 1


def test_a_missing_compiler_is_explained(run, byte_data, tiny):
    out = run("train.py", *tiny, "--compile=True", status=1, PATH="/nowhere", CXX="")
    assert "g++ is not on the PATH (apt install g++); or run without it: --compile=False" in out.stderr


def test_the_plan_of_a_resumed_run_counts_what_it_has_seen(run, byte_data, tiny):
    run("train.py", *tiny, "--max_iters=6")
    argv = [*tiny, "--init_from=resume", "--gradient_accumulation_steps=4"]
    out = run("train.py", *argv).stdout
    assert "run:        768 + 6 * 256 = 2,304 tokens, " in out and "done: iteration 12 after" in out
    assert "2,304 tokens, best val loss" in out and " tok/s since it was resumed, without " in out


def test_weights_that_are_nan_are_not_recommended(run, byte_data, tiny):
    run("train.py", *tiny, "--max_iters=6")
    argv = [*tiny, "--learning_rate=1e30", "--grad_clip=0", "--max_bad_steps=100", "--init_from=resume"]
    out = run("train.py", *argv).stdout
    assert "val loss nan" in out and out.endswith("sample.py --out_dir=out --init_from=best\n")


def test_backend_is_for_several_processes(run, byte_data, tiny):
    out = run("train.py", *tiny, "--backend=gloo", "--max_iters=0", RANK="0", WORLD_SIZE="1")
    assert "backend='gloo' has no effect: it is for several processes" in out.stdout


def test_a_schedule_that_does_not_fit_the_run_is_pointed_out(run, byte_data, tiny):
    out = run("train.py", *tiny, "--warmup_iters=50", "--max_iters=1")
    assert "note: the learning rate still rises when this run ends: warmup_iters=50" in out.stdout
    out = run("train.py", *tiny, "--schedule=wsd", "--warmup_iters=11", "--cooldown_frac=0.5")
    assert "note: the cooldown begins at 6, before the warmup ends at 11" in out.stdout
    assert "constant" not in out.stdout  # of so many constant iterations
    out = run("train.py", *tiny, "--warmup_iters=5", "--lr_decay_iters=4", "--max_iters=6")
    assert "note: after warmup_iters=5 lr drops to min_lr: lr_decay_iters=4" in out.stdout
    out = run("train.py", *tiny, "--warmup_iters=1", "--lr_decay_iters=4", "--max_iters=6", "--dry_run=True")
    assert "note: lr stays at min_lr from lr_decay_iters=4 to 6" in out.stdout
    argv = ["--warmup_iters=50", "--max_iters=12", "--max_minutes=9", "--dry_run=True"]
    out = run("train.py", *tiny, *argv).stdout
    assert "ends: warmup_iters=50, unless max_minutes ends the warmup earlier\n" in out
    flags = ["--lr_decay_iters=20", "--dry_run=True"]
    text = "note: lr does not fall to min_lr: max_iters=12 is before lr_decay_iters=20"
    assert f"{text}\n" in run("train.py", *tiny, *flags).stdout
    out = run("train.py", *tiny, *flags, "--max_minutes=5").stdout
    assert f"{text}, unless max_minutes ends it earlier\n" in out
    out = run("train.py", *tiny, "--learning_rate=1e-5", "--dry_run=True").stdout
    assert "note: lr rises to min_lr=6e-05: it is above learning_rate=1e-05" in out
    out = run("train.py", *tiny, "--schedule=wsd", "--dry_run=True").stdout
    assert "note: lr_decay_iters has no effect with schedule='wsd'" in out
    flags = ["--always_save_checkpoint=True", "--checkpoint_interval=3", "--dry_run=True"]
    out = run("train.py", *tiny, *flags).stdout
    assert "note: always_save_checkpoint has no effect with checkpoint_interval" in out
    assert "has no effect" not in run("train.py", *tiny, "--dry_run=True").stdout
    assert (
        "cooldown_frac has no effect" in run("train.py", *tiny, "--cooldown_frac=1", "--dry_run=True").stdout
    )


@pytest.mark.parametrize("content", [b"", b"junk", b"PK\3\4 cut short"])
def test_a_damaged_checkpoint_is_one_line(run, byte_data, tiny, tmp_path, content):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/ckpt.pt").write_bytes(content)
    out = run("train.py", *tiny, "--init_from=resume", status=1)
    assert "cannot read the checkpoint out/ckpt.pt" in out.stderr


def test_a_checkpoint_that_does_not_fit_on_the_disk_leaves_the_one_before(run, byte_data, tiny, tmp_path):
    run("train.py", *tiny, "--max_iters=1")
    before = (tmp_path / "out/ckpt.pt").read_bytes()
    limited = f"ulimit -f {len(before) // 2048}; exec {sys.executable} {ROOT / 'train.py'} {' '.join(tiny)}"
    command = ["bash", "-c", limited + " --init_from=resume"]
    out = subprocess.run(command, cwd=tmp_path, env=ENV, capture_output=True, text=True)
    # a failed save does not stop training
    assert out.returncode == 1 and list(losses(out)) == list(range(1, 12))
    first, *_, last = out.stderr.splitlines()
    assert re.match(
        "warning: cannot save iteration 6: cannot write out/.*File too large.* out/ckpt.pt holds it", first
    )
    assert last == "error: iteration 12, the last one, could not be saved; out/ckpt.pt holds iteration 1"
    assert "Traceback" not in out.stderr
    assert (tmp_path / "out/ckpt.pt").read_bytes() == before
    assert not list((tmp_path / "out").glob("*.tmp"))


def test_a_compiler_that_does_not_work_is_one_line(run, spawn, byte_data, tiny, tmp_path):
    run("train.py", *tiny, "--max_iters=1")
    broken = dict(CXX="/bin/false", TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"), status=1)
    for script, argv in (("sample.py", ["--device=cpu"]), ("train.py", tiny)):
        out = spawn(script, *argv, "--compile=True", **broken)
        assert re.search(
            r"^error: torch.compile failed: .*C\+\+ compiler.*; try --compile=False$", out.stderr, re.M
        )


def test_a_flipped_bit_in_a_checkpoint_is_found(run, byte_data, tiny, tmp_path):
    run("train.py", *tiny, "--max_iters=1")
    path = tmp_path / "out/ckpt.pt"
    raw = bytearray(path.read_bytes())
    weight = checkpoint.load(path)["model"]["transformer.h.0.mlp.c_fc.weight"].numpy().tobytes()
    raw[raw.index(weight) + 7] ^= 1
    path.write_bytes(raw)
    out = run("train.py", *tiny, "--init_from=resume", status=1)
    assert "cannot read the checkpoint out/ckpt.pt" in out.stderr and "checksum" in out.stderr


def test_a_checkpoint_that_contradicts_itself_is_one_line(run, byte_data, tiny, tmp_path):
    run("train.py", *tiny, "--max_iters=1")
    path = tmp_path / "out/ckpt.pt"
    state = torch.load(path, weights_only=True)
    # what nanoGPT kept there before torch 2.0
    state["model"]["transformer.h.0.attn.bias"] = torch.ones(1, 1, 16, 16)
    torch.save(state, path)
    run("train.py", *tiny, "--init_from=resume", "--eval_only=True")
    state["optimizer"]["param_groups"] = state["optimizer"]["param_groups"][:1]
    torch.save(state, path)
    assert (
        "does not fit AdamW for this model" in run("train.py", *tiny, "--init_from=resume", status=1).stderr
    )
    del state["model"]["lm_head.weight"]
    torch.save(state, path)
    message = "the weights in out/ckpt.pt do not fit its model_args: Missing key"
    assert message in run("train.py", *tiny, "--init_from=resume", status=1).stderr
    assert message in run("sample.py", "--device=cpu", status=1).stderr


def test_weights_only_are_no_state_to_resume_from(run, byte_data, tiny, tmp_path):
    run("train.py", *tiny, "--max_iters=6")
    shutil.copy(tmp_path / "out/best.pt", tmp_path / "out/ckpt.pt")
    out = run("train.py", *tiny, "--init_from=resume", status=1)
    assert "out/ckpt.pt holds weights only, no optimizer state to resume from" in out.stderr


# -----------------------------------------------------------------------------
# learning

SHAKESPEARE = os.environ.get("SHAKESPEARE")


@pytest.mark.skipif(not SHAKESPEARE, reason="set SHAKESPEARE to tiny Shakespeare's input.txt")
def test_nanogpts_shakespeare_recipe_learns_as_it_does_there(run, tmp_path):
    """nanoGPT's smaller model, for a tenth of its iterations."""
    data = [f"--input={SHAKESPEARE}", "--encoding=characters", "--out_dir=data/shakespeare_char"]
    assert "next: python train.py config/shakespeare_char.py\n" in run("prepare_fineweb.py", *data).stdout
    smaller = """--device=cpu --compile=False --eval_iters=30 --eval_interval=200 --log_interval=100
    --block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --max_iters=200 --lr_decay_iters=200
    --dropout=0.0"""
    out = run("train.py", ROOT / "config/shakespeare_char.py", *smaller.split())
    # nanoGPT itself: 2.447 to 2.463 with three seeds (benchmarks/compare_nanogpt.py)
    assert 2.42 < float(STEP.findall(out.stdout)[-1][2]) < 2.49


# -----------------------------------------------------------------------------
# what a newcomer needs to be told


def test_a_batch_that_cannot_fit_is_made_smaller_before_it_is_tried(
    run, byte_data, tiny, tmp_path, monkeypatch
):
    """Here a computer with 4 MB: weights, gradients and moments take 0.6 of them."""
    monkeypatch.setattr(fit, "total_memory", lambda device: 4e6)
    wide = [*tiny, "--batch_size=64", "--gradient_accumulation_steps=1", "--max_iters=3"]
    out = run("train.py", *wide)
    started = re.search(
        r"would take about .* GB, .*; the same run starts with batch_size=(\d+), gr.*=(\d+)\n", out.stderr
    )
    smaller, accumulation = map(int, started.groups())
    assert smaller < 64 and smaller * accumulation == 64
    assert f"tokens:     {smaller} * {accumulation} * 16 = 1,024 an iteration" in out.stdout
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    whole = run("train.py", *wide, "--out_dir=whole")
    assert [float(x) for x in losses(out).values()] == pytest.approx(
        [float(x) for x in losses(whole).values()], abs=1e-3
    )


def test_an_evaluation_alone_needs_no_memory_for_training(run, byte_data, tiny, monkeypatch):
    run("train.py", *tiny, "--max_iters=6")
    monkeypatch.setattr(fit, "total_memory", lambda device: 5e5)
    out = run("train.py", *tiny, "--init_from=resume", "--eval_only=True")
    assert "step 6: train loss" in out.stdout and "batch_size=" not in out.stderr


def test_what_cannot_fit_into_a_computer_at_all_is_refused(run, byte_data, tiny, monkeypatch):
    monkeypatch.setattr(fit, "total_memory", lambda device: 5e5)
    refused = run("train.py", *tiny, status=1).stderr
    assert refused.splitlines()[-1].startswith(
        "error: out of memory with batch_size=1; by estimate 0.0M param"
    )
    refused = run("train.py", *tiny, "--auto_fit=False", status=1).stderr
    assert "--auto_fit=True finds it automatically" in refused


@pytest.mark.parametrize("dropout, warned", [(0.0, True), (0.1, False)])
def test_many_epochs_without_dropout_are_pointed_out(run, byte_data, tiny, dropout, warned):
    # 8 of 672 windows an iteration
    argv = ["--max_iters=2000", "--dry_run=True", f"--dropout={dropout}"]
    out = run("train.py", *tiny, *argv).stdout
    assert ("note: 24 epochs without dropout will memorise the text" in out) == warned


def test_a_finished_run_says_what_to_do_next(run, byte_data, tiny):
    out = run("train.py", *tiny, "--out_dir=my run").stdout
    assert out.endswith("\nnext:       python sample.py '--out_dir=my run'\n")


def test_init_from_best_is_explained(run, byte_data, tiny):
    error = run("train.py", *tiny, "--init_from=best", status=2).stderr
    assert "init_from='best' is for sample.py, as best.pt holds weights only; use init_from='resume'" in error


def test_a_dry_run_says_what_a_run_takes_and_writes_nothing(run, byte_data, tiny, tmp_path):
    out = run("train.py", *tiny, "--dry_run=True").stdout
    assert "time:       not known for these settings" in out and not (tmp_path / "out").exists()
    run("train.py", *tiny)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    rows = [json.loads(line) for line in before["metrics.jsonl"].splitlines()]
    dt = np.median([row["dt"] for row in rows if row["kind"] == "iter"])
    again = run("train.py", *tiny, "--max_iters=1000000", "--dry_run=True").stdout
    assert (
        f"{duration(1_000_000 * dt)} for 1,000,000 iterations of the {dt:.3g} s each that out shows" in again
    )
    assert "not known" in run("train.py", *tiny, "--n_embd=64", "--dry_run=True").stdout
    written = sum(len(before[name]) for name in ("ckpt.pt", "ckpt_prev.pt", "best.pt"))
    told = re.search(r"disk: +at most ([\d.]+) GB of checkpoints in out, ", again)
    assert float(told[1]) == round(written / 1e9, 2) and again.endswith("dry run:    nothing was written\n")
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}


def test_the_seconds_of_an_iteration_are_those_of_the_last_ones_with_the_same_settings(tmp_path):
    cfg, path = TrainConfig(), tmp_path / "metrics.jsonl"
    lines = []

    def seconds_after(kind, batch_size, *seconds):
        config = dataclasses.asdict(cfg) | dict(batch_size=batch_size)
        lines.append(dict(kind=kind, iter=0, config=config))
        lines.extend(dict(kind="iter", iter=0, dt=dt) for dt in seconds)
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return report.seconds_of_earlier_run(str(path), cfg)

    assert seconds_after("config", 2 * cfg.batch_size, 9.0, 9.0, 9.0) is None
    assert seconds_after("resume", cfg.batch_size, 3.0, 4.0, 5.0) == 4.0
    assert seconds_after("resume", cfg.batch_size, *[7.0] * 60, *[2.0] * 50) == 2.0
    assert seconds_after("resume", cfg.batch_size + 1, 9.0) is None


def test_resuming_a_finished_run_says_how_to_train_on(run, byte_data, tiny):
    run("train.py", *tiny)
    out = run("train.py", *tiny, "--init_from=resume").stdout
    assert "note: that is all of max_iters=12; to train on, raise --max_iters" in out
    error = run("train.py", *tiny, "--init_from=resume", "--max_iters=6", status=1).stderr
    assert "is at iteration 12, past max_iters=6; to train on, raise --max_iters" in error


def test_a_busy_computer_is_pointed_out(monkeypatch):
    monkeypatch.setattr(os, "getloadavg", lambda: (99.5, 0, 0))
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert report.busy_note(torch.device("cpu")) is None  # this process has one thread already
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert "busy (load 99.5 on 2 cores): OMP_NUM_THREADS=1" in report.busy_note(torch.device("cpu"))
    assert report.busy_note(torch.device("cuda")) is None
    monkeypatch.setattr(os, "getloadavg", lambda: (0.3, 0, 0))
    assert report.busy_note(torch.device("cpu")) is None


# -----------------------------------------------------------------------------
# by the clock, samples, the end


class Seconds:
    """Stands in for time.perf_counter: each question takes a second."""

    def __init__(self):
        self.now = time.perf_counter()

    def __call__(self):
        self.now += 1.0
        return self.now


def by_the_clock(patch, minutes, *flags):
    patch.setattr(time, "perf_counter", Seconds())
    return ["--max_iters=100000", "--lr_decay_iters=100000", f"--max_minutes={minutes}", *flags]


@pytest.mark.parametrize("schedule", ["wsd", "cosine"])
def test_max_minutes_ends_the_run_in_time_with_its_schedule_completed(
    run, byte_data, tiny, tmp_path, monkeypatch, schedule
):
    flags = by_the_clock(monkeypatch, 20, "--min_lr=0", f"--schedule={schedule}", "--eval_interval=50")
    out = run("train.py", *tiny, *flags)
    assert "run:        20 minutes, or 100,000 iterations of 128 tokens if these end first\n" in out.stdout
    rows = metrics(tmp_path / "out", "iter")
    last, final = rows[-1], metrics(tmp_path / "out", "eval")[-1]
    assert 20 < len(rows) < 1200 and final["iter"] == last["iter"] + 1
    assert 1200 - 30 < last["elapsed"] < 1200 < final["elapsed"] + 30 and final["elapsed"] < 1200 + 30
    highest = max(row["lr"] for row in rows)
    assert highest == pytest.approx(1e-2, rel=1e-2) and last["lr"] < 0.05 * highest
    for row in rows[3:]:  # the warmup counts iterations; from then on the clock decides
        used = row["elapsed"] / 1200
        share = min(1, (1 - used) / 0.7)
        if schedule == "cosine":
            share = 0.5 * (1 + math.cos(math.pi * used))
        assert row["lr"] == pytest.approx(1e-2 * share, abs=6e-4)
    assert "\ndone: iteration " in out.stdout


def test_the_time_before_the_first_iteration_counts_too(run, byte_data, tiny, tmp_path, monkeypatch):
    flags = by_the_clock(monkeypatch, 20, "--schedule=wsd", "--eval_interval=50")
    open_splits = shards.open_splits

    def slow(*args):
        time.perf_counter.now += 600
        return open_splits(*args)

    monkeypatch.setattr(shards, "open_splits", slow)
    run("train.py", *tiny, *flags)
    elapsed = [row["elapsed"] for row in metrics(tmp_path / "out", "iter")]
    assert elapsed[0] > 600 and 1200 - 30 < elapsed[-1] < 1200


def test_a_run_by_the_clock_resumes_with_what_is_left(run, byte_data, tiny, tmp_path, monkeypatch):
    flags = by_the_clock(monkeypatch, 10, "--schedule=wsd", "--eval_interval=20")
    run("train.py", *tiny, *flags)
    state = torch.load(tmp_path / "out/ckpt.pt", weights_only=True)
    assert 500 < state["seconds"] < 660
    flags = by_the_clock(monkeypatch, 20, "--schedule=wsd", "--eval_interval=20")
    run("train.py", *tiny, *flags, "--init_from=resume")
    rows = metrics(tmp_path / "out", "iter")
    before = [row for row in rows if row["iter"] < state["iter_num"]]
    assert len(before) == state["iter_num"] and 1150 < rows[-1]["elapsed"] < 1200
    again = [row["elapsed"] for row in rows[len(before) :]]
    assert again[0] > state["seconds"] and again == sorted(again)


def test_iterations_end_a_run_that_has_more_time(run, byte_data, tiny, tmp_path):
    run("train.py", *tiny)
    run("train.py", *tiny, "--max_minutes=1000", "--out_dir=timed")
    plain, timed = (metrics(tmp_path / name, "iter") for name in ("out", "timed"))
    for name in ("loss", "lr"):  # time counts as well as iterations, but there is much of it
        assert [row[name] for row in timed] == pytest.approx([row[name] for row in plain], rel=1e-3)


def test_samples_that_need_a_download_end_a_run_before_it_begins(spawn, byte_data, tiny, tmp_path):
    (byte_data / "meta.json").write_text('{"encoding": "gpt2", "vocab_size": 50257, "eot_token": 50256}')
    (tmp_path / "out").mkdir()
    (tmp_path / "out/ckpt.pt").touch()
    (tmp_path / "cache").mkdir()
    proxy = "http://127.0.0.1:9"
    offline = dict(TIKTOKEN_CACHE_DIR=str(tmp_path / "cache"), https_proxy=proxy, HTTPS_PROXY=proxy)
    out = spawn("train.py", *tiny, "--sample_interval=6", status=1, **offline)
    assert "cannot download tiktoken's 'gpt2'" in out.stderr and "iter 0" not in out.stdout
    assert os.listdir(tmp_path / "out") == ["ckpt.pt"]  # nothing was set aside


def test_samples_come_at_evaluations_and_leave_the_run_as_it_was(run, byte_data, tiny, tmp_path):
    plain = run("train.py", *tiny, "--dropout=0.1")
    sampled = run("train.py", *tiny, "--dropout=0.1", "--sample_interval=12", "--out_dir=sampled")
    assert losses(plain) == losses(sampled)  # dropout draws random numbers after the samples
    rows = metrics(tmp_path / "sampled", "sample")
    assert [row["iter"] for row in rows] == [0, 12] and not metrics(tmp_path / "out", "sample")
    text = byte_data_text(tmp_path)
    for row in rows:
        assert len(row["samples"]) == 3
        for sample in row["samples"]:
            assert sample["prompt"].encode() in text
            line = f"sample {row['iter']}: {json.dumps(sample['prompt'])} -> "
            assert line in sampled.stdout.replace("\ufffd", "?") or line in sampled.stdout
    assert [s["prompt"] for s in rows[0]["samples"]] == [s["prompt"] for s in rows[1]["samples"]]


def byte_data_text(tmp_path):
    return b"".join(path.read_bytes() for path in (tmp_path / "data/toy").glob("*val*.bin"))[1024::2]


def test_a_run_ends_with_a_summary_which_is_in_metrics_too(run, byte_data, tiny, tmp_path):
    run("train.py", *tiny, "--max_iters=6")
    out = run("train.py", *tiny, "--init_from=resume", page=True).stdout
    [done] = metrics(tmp_path / "out", "done")
    last = metrics(tmp_path / "out", "eval")[-1]
    assert (done["iter"], done["tokens"], done["resumed"], done["bad_steps"]) == (12, 12 * 128, 1, 0)
    assert {name: done[name] for name in ("train_loss", "val_loss", "val_bpb")} == {
        name: last[name] for name in ("train_loss", "val_loss", "val_bpb")
    }
    iters = [row for row in metrics(tmp_path / "out", "iter") if row["iter"] >= 6]
    assert done["tokens_per_s"] == pytest.approx(128 * len(iters) / sum(row["dt"] for row in iters))
    tail = out[out.index("done: ") :].splitlines()
    assert [line.partition(":")[0] for line in tail] == [
        "done", "model", "data", "at the end", "speed", "sessions", "page", "next",
    ]  # fmt: skip
    assert f"val loss {last['val_loss']:.4f}" in tail[3] and tail[5].split() == ["sessions:", "2"]


def test_the_warmup_takes_a_tenth_of_the_time_at_most():
    cfg = configure(
        TrainConfig, ["--schedule=wsd", "--warmup_iters=99", "--max_iters=1000", "--max_minutes=1"]
    )
    assert get_lr(49, cfg) == pytest.approx(6e-4 * 0.5) == get_lr(9, cfg, 0.05)
    assert get_lr(9, cfg, 0.0) == pytest.approx(6e-4 * 0.1)
    assert get_lr(9, cfg, 0.1) == get_lr(9, cfg, 0.15) == 6e-4
    # but ten iterations, if starting has used more time
    assert [get_lr(it, cfg, 0.2) for it in range(10)] == pytest.approx([6e-5 * n for n in range(1, 11)])
    cosine = configure(TrainConfig, ["--warmup_iters=99", "--lr_decay_iters=1000", "--max_minutes=1"])
    assert get_lr(9, cosine, 0.5) == pytest.approx((6e-4 + 6e-5) / 2)
    for end in (99, 50):  # a cosine that ends while iterations still warm up goes by the clock
        cosine.lr_decay_iters = end
        assert get_lr(10, cosine, 0.5) == pytest.approx((6e-4 + 6e-5) / 2)


def test_keys_that_a_time_limit_or_another_tracker_rules_out(run, byte_data, tiny, tmp_path):
    flags = ["--schedule=wsd", "--keep_before_cooldown=True", "--max_minutes=60"]
    out = run("train.py", *tiny, *flags).stdout
    assert "note: keep_before_cooldown=True has no effect with max_minutes" in out
    assert not (tmp_path / "out/before_cooldown.pt").exists()
    both = run("train.py", *tiny, "--wandb_log=True", "--tracker=tensorboard", status=2).stderr
    assert "wandb_log=True means tracker='wandb', not 'tensorboard'" in both
    for flops in ("312", "1e-300"):
        error = run("train.py", *tiny, f"--peak_flops={flops}", status=2).stderr
        assert f"peak_flops={flops} must be in FLOP/s, like 312e12" in error


def test_the_last_evaluation_of_a_run_stays_when_it_is_lengthened(run, byte_data, tiny, tmp_path):
    argv = [*tiny, "--eval_interval=5"]
    run("train.py", *argv, "--max_iters=7")
    last = metrics(tmp_path / "out", "eval")[-1]
    run("train.py", *argv, "--max_iters=9", "--init_from=resume")
    found = metrics(tmp_path / "out", "eval")
    assert [row["iter"] for row in found] == [0, 5, 7, 9] and found[2] == last
    # where the run evaluates again, the line is the new one
    run("train.py", *argv, "--max_iters=9", "--init_from=resume")
    run("train.py", *argv, "--max_iters=10", "--init_from=resume")
    run("train.py", *argv, "--max_iters=11", "--init_from=resume")
    assert [row["iter"] for row in metrics(tmp_path / "out", "eval")] == [0, 5, 7, 9, 10, 11]


def test_an_evaluation_is_recorded_once_even_if_compiling_takes_the_time_that_was_left(
    run, byte_data, tiny, tmp_path, monkeypatch
):
    argv = [*tiny, "--max_iters=7", "--eval_interval=5"]
    run("train.py", *argv)
    batches = train.micro_batches

    def much_later(*args):
        time.sleep(2)
        return batches(*args)

    monkeypatch.setattr(train, "micro_batches", much_later)
    state = torch.load(tmp_path / "out/ckpt.pt", weights_only=True)
    minutes = (state["seconds"] + state["eval_seconds"] + 1) / 60
    run("train.py", *argv, "--max_iters=9", f"--max_minutes={minutes}", "--init_from=resume")
    assert [row["iter"] for row in metrics(tmp_path / "out", "eval")] == [0, 5, 7]
    assert metrics(tmp_path / "out", "done")[-1]["iter"] == 7


def test_a_dry_run_counts_the_minutes_that_are_left(run, byte_data, tiny, tmp_path):
    run("train.py", *tiny, "--max_iters=3")
    state = torch.load(tmp_path / "out/ckpt.pt", weights_only=True)
    torch.save(state | dict(seconds=300.0), tmp_path / "out/ckpt.pt")
    out = run("train.py", *tiny, "--max_minutes=20", "--init_from=resume", "--dry_run=True").stdout
    assert "time:       about 15 minutes at most, evaluations included\n" in out


def test_a_resumed_run_knows_how_long_an_evaluation_takes(run, byte_data, tiny, tmp_path, monkeypatch):
    run("train.py", *tiny, "--max_iters=3")
    seconds = torch.load(tmp_path / "out/ckpt.pt", weights_only=True)["eval_seconds"]
    monkeypatch.chdir(tmp_path)
    cfg = configure(TrainConfig, [*tiny, "--max_minutes=1", "--init_from=resume"])
    resumed = train.set_up(cfg, hardware.find_machine(cfg))
    assert resumed.progress.eval_seconds == seconds > 0


@pytest.mark.parametrize(
    "error", [UserError("the model's logits are not finite"), torch.OutOfMemoryError("CUDA out of memory.")]
)
def test_samples_that_cannot_be_drawn_change_nothing_else(run, byte_data, tiny, tmp_path, monkeypatch, error):
    def failing(*args, **options):
        raise error

    monkeypatch.setattr(GPT, "generate", failing)
    out = run("train.py", *tiny, "--sample_interval=6")
    assert f"warning: no samples at iteration 6: {error}\n" in out.stderr
    assert "done: iteration 12" in out.stdout and not metrics(tmp_path / "out", "smaller_batch")


def test_samples_at_the_end_stay_when_a_run_is_lengthened(run, byte_data, tiny, tmp_path):
    argv = [*tiny, "--eval_interval=4", "--sample_interval=5"]
    run("train.py", *argv, "--max_iters=10")
    run("train.py", *argv, "--max_iters=12", "--init_from=resume")
    assert [row["iter"] for row in metrics(tmp_path / "out", "sample")] == [0, 10]


def test_every_resume_is_counted_and_another_time_limit_is_pointed_out(run, byte_data, tiny, tmp_path):
    run("train.py", *tiny, "--max_iters=6")
    run("train.py", *tiny, "--max_iters=8", "--init_from=resume", "--lr_decay_iters=12")
    run("train.py", *tiny, "--max_iters=9", "--init_from=resume", "--lr_decay_iters=12")
    [done] = metrics(tmp_path / "out", "done")
    assert done["resumed"] == 2
    state = torch.load(tmp_path / "out/ckpt.pt", weights_only=True)
    state["seconds"] = 55.0
    torch.save(state, tmp_path / "out/ckpt.pt")
    resumed = run("train.py", *tiny, "--init_from=resume", "--max_minutes=1")
    assert "warning: the learning rate of iteration 9 is " in resumed.stderr
    # without the limit, too, and where the learning rate of the moment is the same
    torch.save(state | dict(seconds=0.0), tmp_path / "out/ckpt.pt")
    flags = ["--init_from=resume", "--decay_lr=False"]
    run("train.py", *tiny, *flags, "--max_minutes=9", "--max_iters=10")
    error = run("train.py", *tiny, *flags, "--max_iters=11").stderr
    assert "warning: settings that change from here on: max_minutes=0.0, was 9.0\n" in error


@dataclasses.dataclass(frozen=True)
class WiderConfig(GPTConfig):
    act: str = "gelu"


@dataclasses.dataclass
class WiderKeys(TrainConfig):
    act: str = key("gelu", "what somebody has added")


def test_a_field_that_somebody_adds_to_the_model_is_saved_and_resumed(
    run, byte_data, tiny, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        patch.setattr(train, "GPTConfig", WiderConfig)
        patch.setattr(train, "TrainConfig", WiderKeys)
        run("train.py", *tiny, "--act=swish", "--max_iters=2")
        error = run("train.py", *tiny, "--act=gelu", "--init_from=resume", status=1).stderr
        assert "out/ckpt.pt has another architecture: act=swish, not gelu" in error
        patch.chdir(tmp_path)
        cfg = configure(WiderKeys, [*tiny, "--init_from=resume"])
        assert train.set_up(cfg, hardware.find_machine(cfg)).model.config.act == "swish"
    with monkeypatch.context() as patch:
        patch.setattr("sample.GPTConfig", WiderConfig)
        noted = run("sample.py", "--out_dir=out", "--export=hf").stderr
        assert "note: transformers' GPT-2 has no act: it computes without\n" in noted
    for script in ("train.py", "sample.py"):
        argv = [*tiny, "--init_from=resume"] if script == "train.py" else ["--out_dir=out"]
        error = run(script, *argv, status=1).stderr
        assert "the model in out/ckpt.pt has act, which this model.py lacks" in error


def test_a_run_in_which_a_parameter_was_frozen_for_a_while_resumes(
    run, byte_data, tiny, tmp_path, monkeypatch
):
    def frozen_at_first(*argv):
        update, calls = train.update, itertools.count()

        def without_positions(model, *args):
            if next(calls) < 3:
                model.transformer.wpe.weight.grad = None
            return update(model, *args)

        with monkeypatch.context() as patch:
            patch.setattr(train, "update", without_positions)
            run("train.py", *tiny, *argv)

    frozen_at_first("--out_dir=whole")
    frozen_at_first("--out_dir=parts", "--max_iters=6")
    run("train.py", *tiny, "--out_dir=parts", "--init_from=resume")
    assert same(weights(tmp_path / "parts"), weights(tmp_path / "whole"))


def test_evaluations_stand_at_their_tokens_after_a_resume_with_larger_batches(run, byte_data, tiny, tmp_path):
    run("train.py", *tiny, "--max_iters=7", "--eval_interval=2", "--log_interval=5")
    larger = [
        "--init_from=resume",
        "--gradient_accumulation_steps=8",
        "--eval_interval=2",
        "--log_interval=5",
    ]
    run("train.py", *tiny, *larger)
    history = read_history(str(tmp_path / "out"))
    small, large = 2 * 4 * 16, 8 * 4 * 16
    tokens = {0: 0, 2: 2 * small, 4: 4 * small, 6: 6 * small, 7: 7 * small}
    tokens |= {it: 7 * small + (it - 7) * large for it in (8, 10, 12)}
    found = dict(zip(history.evals.mean("iterations"), history.evals.mean("tokens"), strict=True))
    assert found == tokens

    (tmp_path / "other").mkdir()
    shutil.copy(tmp_path / "out/ckpt.pt", tmp_path / "other")
    run("train.py", *tiny, *larger, "--out_dir=other", "--max_iters=14")
    evals = read_history(str(tmp_path / "other")).evals
    assert dict(zip(evals.mean("iterations"), evals.mean("tokens"), strict=True)) == {
        12: tokens[12],
        14: tokens[12] + 2 * large,
    }


def test_what_acts_otherwise_than_it_seems_is_pointed_out(run, byte_data, tiny):
    out = run("train.py", *tiny, "--sample_interval=4", "--dry_run=True").stdout
    assert (
        "note: samples are drawn at evaluations, every 6 iterations, so sample_interval=4 acts every 12\n"
        in out
    )
    assert "GB of checkpoints in out" in out
    assert "samples are drawn" not in run("train.py", *tiny, "--sample_interval=12", "--dry_run=True").stdout
    out = run("train.py", *tiny, "--eval_only=True", "--dry_run=True").stdout
    assert out.endswith("dry run:    nothing was written\n") and "GB of checkpoints" not in out


def test_another_dropout_counts_after_resuming(run, byte_data, tiny, tmp_path, monkeypatch):
    run("train.py", *tiny, "--max_iters=2")
    monkeypatch.chdir(tmp_path)
    cfg = configure(TrainConfig, [*tiny, "--init_from=resume", "--dropout=0.3"])
    model = train.set_up(cfg, hardware.find_machine(cfg)).model
    block = model.transformer.h[0]
    assert model.config.dropout == block.attn.dropout == block.mlp.dropout == 0.3


def test_the_summary_has_mfu_in_percent(run, byte_data, tiny, tmp_path):
    out = run("train.py", *tiny, "--max_iters=3", "--peak_flops=1e12").stdout
    [done] = metrics(tmp_path / "out", "done")
    n = 320 * 32 + 2 * (12 * 32 * 32 + 2 * 32) + 32
    flops = 6 * n + 12 * 2 * 32 * 16
    assert done["mfu"] == pytest.approx(100 * flops * done["tokens_per_s"] / 1e12)
    assert f"tok/s, mfu {done['mfu']:.2f}% without" in out
