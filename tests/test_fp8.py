"""
Matmuls in FP8, as torchao emulates them on a CPU. References: the rounding written out by hand, the same run
in bf16.
Run: pytest tests/test_fp8.py
"""

import re
import sys

import pytest
import torch
from torch.nn import functional as F

from model import GPTConfig, make_gpt
from sologpt import checkpoint
from sologpt.fp8 import check_fp8, use_fp8
from sologpt.hardware import Machine

SIZES = dict(block_size=32, vocab_size=97, n_layer=2, n_head=2, n_embd=32)
CPU = Machine(torch.device("cpu"), "bfloat16", None, "")


def rounded(x):
    """Returns x, rounded to e4m3 after a scaling that makes its largest value 448, e4m3's own."""
    scale = 448 / x.abs().max().double()
    return ((x.float() * scale.float()).to(torch.float8_e4m3fn).float() / scale.float()).bfloat16()


def test_a_layer_multiplies_what_e4m3_keeps_of_its_input_and_weight():
    model = make_gpt(GPTConfig(**SIZES))
    layer, x = model.transformer.h[1].mlp.c_fc, torch.randn(3, 5, 32)
    bias = torch.nn.init.normal_(layer.bias, std=0.02).detach()
    expected = F.linear(rounded(x), rounded(layer.weight.detach()), bias.bfloat16())
    use_fp8(model, CPU)
    with CPU.autocast():
        found = model.transformer.h[1].mlp.c_fc(x)
    assert (found - expected).norm() < 0.008 * expected.norm()  # bf16's own rounding
    plain = F.linear(x.bfloat16(), layer.weight.bfloat16(), bias.bfloat16())
    assert (found - plain).norm() > 2 * (found - expected).norm()


@pytest.mark.parametrize("arch", ["gpt2", "modern"])
def test_only_the_blocks_change_and_the_weights_keep_their_names(arch):
    model = make_gpt(GPTConfig(**SIZES, arch=arch))
    before, head = dict(model.state_dict()), model.lm_head
    use_fp8(model, CPU)
    assert model.state_dict().keys() == before.keys() and model.lm_head is head
    assert all(p.data_ptr() == before[name].data_ptr() for name, p in model.named_parameters())
    kinds = {type(m).__name__ for m in model.transformer.h.modules() if isinstance(m, torch.nn.Linear)}
    assert kinds == {"Float8Linear"}


def test_a_run_learns_as_in_bf16_and_its_checkpoint_is_like_any_other(run, byte_data, tiny, tmp_path):
    flags = [*tiny, "--dtype=bfloat16", "--n_embd=32", "--max_iters=30"]
    final = []
    for matmul in ("", "fp8"):
        out = run("train.py", *flags, f"--matmul={matmul}", f"--out_dir=out{matmul}")
        final.append(float(re.findall(r"step 30: .* val loss ([\d.]+)", out.stdout)[0]))
    assert "warning: matmul='fp8' is emulated on a CPU" in out.stderr
    assert final[0] != final[1] and abs(final[0] - final[1]) < 0.05
    states = [checkpoint.load(tmp_path / name / "ckpt.pt")["model"] for name in ("out", "outfp8")]
    assert states[0].keys() == states[1].keys()
    assert all(states[1][name].dtype == p.dtype == torch.float32 for name, p in states[0].items())
    out = run("train.py", *flags, "--max_iters=31", "--init_from=resume", "--out_dir=outfp8")
    assert "that change from here on: matmul=, was fp8" in out.stderr


@pytest.mark.parametrize(
    "machine, sizes, text",
    [
        (
            Machine(torch.device("cpu"), "float32", None, ""),
            {},
            "needs dtype='bfloat16' for all else, not 'f",
        ),
        (CPU, dict(n_embd=40), "n_embd=40 must be a multiple of 16"),
        (CPU, dict(block_size=24), "block_size=24 must be a multiple of 16"),
        (
            Machine(torch.device("mps"), "bfloat16", None, ""),
            {},
            "needs an NVIDIA GPU that multiplies in FP8",
        ),
    ],
)
def test_what_cannot_multiply_in_fp8_is_refused(machine, sizes, text):
    with pytest.raises(ValueError, match=text):
        check_fp8(GPTConfig(**SIZES | sizes), machine)


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (12, 0)])
def test_nvidia_gpus_have_fp8_from_8_9_on(monkeypatch, capability):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    machine = Machine(torch.device("cuda"), "bfloat16", None, "")
    if capability >= (8, 9):
        check_fp8(GPTConfig(**SIZES), machine)
    else:
        with pytest.raises(ValueError, match=r"compute capability 8.9 \(RTX 40, L40, H100\) or newer"):
            check_fp8(GPTConfig(**SIZES), machine)


def test_without_torchao_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    with pytest.raises(ValueError, match=r"needs torchao: pip install '\.\[fp8\]', or leave --matmul out"):
        use_fp8(make_gpt(GPTConfig(**SIZES)), CPU)
