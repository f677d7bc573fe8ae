"""
What runs do on a GPU: they go on elsewhere, learn in fp16, fit into memory, which is as estimated; and the
card is in the table. Skipped where there is none. benchmarks/gpu_day.py runs these too.
Run: pytest tests/test_gpu_runs.py -n0
"""

import gc
import json
import math

import pytest
import torch

import train
from configurator import configure
from model import GPTConfig, make_gpt
from sologpt import checkpoint, hardware, memory, optim
from train import TrainConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.usefixtures("exact_matmuls"),
    pytest.mark.filterwarnings("ignore:TensorFloat32"),  # torch would like it on; see exact_matmuls
]


def losses_of(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["iter"]: line["loss"] for line in lines if line["kind"] == "iter"}


def test_a_run_moves_between_gpu_and_cpu(run, byte_data, tiny, tmp_path):
    argv = [*tiny, "--dtype=float32"]
    run("train.py", *argv, "--out_dir=cpu")
    run("train.py", *argv, "--out_dir=mixed", "--device=cuda", "--max_iters=4")
    run("train.py", *argv, "--out_dir=mixed", "--init_from=resume", "--max_iters=8")
    run("train.py", *argv, "--out_dir=mixed", "--init_from=resume", "--device=cuda")
    assert losses_of(tmp_path / "mixed") == pytest.approx(losses_of(tmp_path / "cpu"), rel=1e-2)
    text = run(
        "sample.py", "--out_dir=mixed", "--device=cuda", "--num_samples=2", "--max_new_tokens=20"
    ).stdout
    assert text.count("---------------") == 2


def test_fp16_with_its_scaler_learns_and_resumes(run, byte_data, tiny, tmp_path):
    argv = [*tiny, "--device=cuda", "--dtype=float16", "--optimizer=muon"]
    run("train.py", *argv, "--max_iters=40", "--lr_decay_iters=40")
    found = losses_of(tmp_path / "out")
    assert all(math.isfinite(loss) for loss in found.values()) and found[39] < found[0] - 0.5
    before = checkpoint.load(tmp_path / "out/ckpt.pt")["scaler"]
    run("train.py", *argv, "--init_from=resume", "--max_iters=41", "--lr_decay_iters=41")
    after = checkpoint.load(tmp_path / "out/ckpt.pt")["scaler"]
    assert after["_growth_tracker"] in (before["_growth_tracker"] + 1, 0)  # 0 if it has halved
    assert after["scale"] in (before["scale"], before["scale"] / 2)


def test_memory_that_runs_out_makes_the_micro_batch_smaller(run, byte_data, tiny, monkeypatch):
    monkeypatch.setattr(hardware, "keep_to_gpu_memory", lambda device: None)  # Windows' own limit
    free, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction(min(1.0, 1.5e9 / total))
    try:
        large = ["--batch_size=8192", "--gradient_accumulation_steps=1", "--max_iters=2", "--n_embd=128"]
        out = run("train.py", *tiny, *large, "--device=cuda", "--dtype=float32")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "out of memory with batch_size=8192; from iteration 0 on batch_size=" in out.stderr
    assert "done: iteration 2" in out.stdout


# -----------------------------------------------------------------------------
# memory and the card


@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--loss_chunks=8",
        "--arch=modern --optimizer=muon",
        "--compile=False",
        "--compile=False --arch=modern --optimizer=muon",
    ],
)
def test_the_estimate_of_memory_is_the_peak(flags):
    torch._dynamo.reset()
    argv = "--n_layer=6 --batch_size=8 --bias=False --device=cuda " + flags
    cfg = configure(TrainConfig, argv.split())
    machine = hardware.find_machine(cfg)
    gc.collect()  # a compiled model of another test refers to itself
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    sizes = dict(n_layer=6, n_head=12, n_embd=768, block_size=1024, vocab_size=50304, bias=False)
    model = make_gpt(GPTConfig(**sizes, arch=cfg.arch))
    train.prepare_model(model, cfg, machine)
    optimizers = optim.make_optimizers(model, cfg, machine.device)
    optim.allocate_moments(optimizers)
    scaler = torch.amp.GradScaler("cuda", enabled=machine.dtype == "float16")
    tokens = torch.randint(50257, (8, 1025))
    for _ in range(2):
        for _ in range(2):
            train.micro_step(model.train(), tokens, scaler, machine, 2)
            torch.cuda.reset_peak_memory_stats()
        train.micro_step(model, tokens, scaler, machine, 2)
        peak = torch.cuda.max_memory_allocated() - before
        train.update(model, optimizers, scaler, 1.0)
    estimate = sum(memory.memory_estimate(model, optimizers, cfg, machine.dtype).values())
    assert 0.95 * peak < estimate < 1.10 * peak


def test_this_card_has_a_peak():
    properties = torch.cuda.get_device_properties(0)
    device = torch.device("cuda")
    peak, why = hardware.device_peak(device, hardware.pick_dtype("", device)[0])
    if "depends on its power limit" in why:
        pytest.skip(why)
    assert peak, f"{properties.name} with {properties.multi_processor_count} SMs: {why}"
