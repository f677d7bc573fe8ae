"""
What only a GPU can show: the same numbers as on the CPU, and 16 bits near them. Skipped where there is none.
benchmarks/gpu_day.py runs these too. What runs do there is in test_gpu_runs.py.
Run: pytest tests/test_gpu.py -n0
"""

import copy
import itertools

import pytest
import torch

import train
from model import GPTConfig, make_gpt, rms_norm
from sologpt import hardware, optim, sampling
from sologpt.fp8 import has_fp8, use_fp8
from sologpt.layers import cast_weights
from train import TrainConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.usefixtures("exact_matmuls"),
    pytest.mark.filterwarnings("ignore:TensorFloat32"),  # torch would like it on; see exact_matmuls
]
TINY = dict(block_size=64, vocab_size=320, n_layer=3, n_head=2, n_embd=128)
ARCHS = pytest.mark.parametrize("arch", ["gpt2", "modern"])


def pair(arch, **changes):
    """Returns the same model, with random values everywhere, on the CPU and on the GPU."""
    torch.manual_seed(0)
    model = make_gpt(GPTConfig(**TINY | changes, arch=arch))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    twin = make_gpt(model.config)
    twin.load_state_dict(model.state_dict())
    return model, twin.cuda()


def batch():
    torch.manual_seed(1)
    return torch.randint(320, (4, 64)), torch.randint(320, (4, 64))


@ARCHS
@pytest.mark.parametrize("loss_chunks", [0, 1, 4])  # 0: torch's own loss if not compiled
@pytest.mark.parametrize("compile", [False, True])
def test_loss_and_gradients_are_those_of_the_cpu(arch, loss_chunks, compile):
    model, twin = pair(arch)
    idx, targets = batch()
    loss = model.train()(idx, targets)[1]
    loss.backward()
    twin.train().loss_chunks = loss_chunks
    if compile:
        torch._dynamo.reset()
        twin.compile(dynamic=False)
    found = twin(idx.cuda(), targets.cuda())[1]
    found.backward()
    value, expected = found.item(), loss.item()
    assert value == pytest.approx(expected, rel=1e-5)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert (q.grad.cpu() - p.grad).norm() <= 1e-4 * p.grad.norm() + 1e-7


@ARCHS
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_what_a_run_computes_is_near_fp32(arch, dtype):
    """All that is the default there: compiled, weights cast once an iteration, the loss in chunks of GPT-2's
    vocabulary, gradients of two micro-batches."""
    torch._dynamo.reset()
    sizes = dict(block_size=1024, vocab_size=50304, n_layer=2, n_head=6, n_embd=768, bias=False)
    _, plain = pair(arch, **sizes)
    model = copy.deepcopy(plain)
    machine = hardware.Machine(torch.device("cuda"), dtype, None, "")
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0, enabled=dtype == "float16")
    train.prepare_model(model.train(), TrainConfig(loss_chunks=4), machine)
    plain.train()
    for _ in range(2):
        tokens = torch.randint(50257, (4, 1025))
        idx, targets = train.inputs_and_targets(tokens, machine.device)
        loss = plain(idx, targets)[1] / 2
        loss.backward()
        found = train.micro_step(model, tokens, scaler, machine, 2)
        assert found.item() == pytest.approx(loss.item(), rel=2e-3)
    scale = scaler.get_scale()
    for (name, p), q in zip(plain.named_parameters(), model.parameters(), strict=True):
        if p.numel() > 2:  # a mixing weight has a sum of products that cancel
            assert (q.grad / scale - p.grad).norm() < 0.05 * p.grad.norm(), name


@ARCHS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near(arch, dtype):
    model, twin = pair(arch)
    idx, targets = batch()
    expected = model(idx, targets)[1].item()
    with torch.autocast("cuda", dtype):
        found = twin(idx.cuda(), targets.cuda())[1].item()
    assert found == pytest.approx(expected, rel=1e-2)


def test_autocast_leaves_a_norm_in_16_bits():
    x = torch.randn(2, 8, device="cuda", dtype=torch.bfloat16)
    with torch.autocast("cuda", torch.bfloat16):
        assert rms_norm(x).dtype == torch.bfloat16


@ARCHS
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_weights_give_the_gradients_of_autocast(arch, dtype):
    _, plain = pair(arch)
    model = copy.deepcopy(plain)
    cast_weights(model, dtype)
    idx, targets = (part.cuda() for part in batch())
    for _ in range(2):  # the second adds to the first
        for m in (plain.train(), model.train()):
            with torch.autocast("cuda", getattr(torch, dtype)):
                loss = m(idx, targets)[1]
            (1024 * loss).backward()
    for p, q in zip(plain.parameters(), model.parameters(), strict=True):
        assert (p.grad - q.grad).norm() <= 1e-3 * p.grad.norm() + 1e-6


@ARCHS
def test_fp8_is_near_bf16(arch):
    pytest.importorskip("torchao.float8", reason="needs torchao: pip install '.[fp8]'")
    machine = hardware.Machine(torch.device("cuda"), "bfloat16", None, "")
    if not has_fp8(machine.device):
        pytest.skip("this GPU has no FP8")
    _, plain = pair(arch)
    model = copy.deepcopy(plain)
    use_fp8(model, machine)
    idx, targets = (part.cuda() for part in batch())
    losses = []
    for m in (plain, model):
        with machine.autocast():
            losses.append(m(idx, targets)[1].item())
    assert losses[0] != losses[1] and losses[1] == pytest.approx(losses[0], rel=2e-2)


@ARCHS
def test_an_update_of_the_recipe_is_that_of_the_cpu(arch, monkeypatch):
    # fp32 on both, as either may lack bf16
    monkeypatch.setattr(optim, "has_bf16", lambda device: False)
    weights = []
    # without biases: that of the keys has no gradient but rounding, of which AdamW makes a whole step
    for model in pair(arch, bias=False):
        device = next(model.parameters()).device
        cfg = TrainConfig(arch=arch, optimizer="muon", learning_rate=1e-2)
        optimizers = optim.make_optimizers(model, cfg, device)
        optim.allocate_moments(optimizers)
        scaler = torch.amp.GradScaler(device.type, enabled=False)
        before = [p.detach().cpu().clone() for p in model.parameters()]
        idx, targets = (part.to(device) for part in batch())
        model.train()(idx, targets)[1].backward()
        norm = train.update(model, optimizers, scaler, 1.0)
        moved = [p.detach().cpu() - b for p, b in zip(model.parameters(), before, strict=True)]
        weights.append((norm, moved))
    (norm, cpu), (found, gpu) = weights
    assert found == pytest.approx(norm, rel=1e-4)
    for a, b in zip(cpu, gpu, strict=True):
        assert (a - b).norm() < 0.01 * a.norm()


def static_cache(model, B):
    """Returns an empty cache that a CUDA graph may write into, as sample.py's."""
    cache = model.empty_cache(B, 64)
    for buffer in itertools.chain(*cache):
        torch._dynamo.mark_static_address(buffer)
    return cache


@ARCHS
def test_a_compiled_step_of_sampling_takes_the_same_ids(arch):
    torch._dynamo.reset()
    hardware.avoid_cudnn_attention()
    _, model = pair(arch)
    model.eval()
    prompt, noise = torch.randint(320, (3, 5), device="cuda"), torch.rand(3, 40)
    settings = dict(temperature=0.9, top_k=50, top_p=0.95, noise=noise)
    plain = sampling.generate(model, prompt, 40, **settings)
    cache = static_cache(model, 3)
    step = torch.compile(sampling.step, fullgraph=True, dynamic=False, mode="reduce-overhead")
    with torch.no_grad():
        *_, text = sampling.stream(model, prompt, 40, 0.9, 50, 0.95, noise=noise, cache=cache, step=step)
    assert (text == plain).float().mean() > 0.95  # rounding may turn an id of a near tie


@ARCHS
def test_a_compiled_step_of_sampling_in_16_bits_is_near(arch):
    """Of fp32 on the CPU; 16 bits have another attention than fp32, here with a mask and one query."""
    torch._dynamo.reset()
    hardware.avoid_cudnn_attention()
    model, twin = pair(arch)
    twin = twin.eval().bfloat16()
    idx = batch()[0][:, :12]
    cache = static_cache(twin, 4)
    step = torch.compile(twin.next_logits, fullgraph=True, dynamic=False, mode="reduce-overhead")
    with torch.no_grad():
        twin.prompt_logits(idx[:, :6].cuda(), torch.full((4,), 5, device="cuda"), cache)
        for i in range(6, 12):  # the graph is recorded at the second one
            found = step(idx[:, i].cuda(), torch.full((4,), i, device="cuda"), cache).float().cpu()
            expected = model.eval()(idx[:, : i + 1])[0][:, 0]
            assert (found - expected).norm() < 0.05 * expected.norm()
