"""
The 16-bit weights of training: all numbers are those of autocast alone.
Run: pytest tests/test_layers.py
"""

import copy
import math

import pytest
import torch

from configurator import configure
from model import GPTConfig, make_gpt
from sologpt import hardware, optim
from sologpt.layers import Linear, cast_weights, squared_relu
from train import TrainConfig, estimate_loss, micro_step, set_up, update

ARCHS = pytest.mark.parametrize("arch", ["gpt2", "modern"])


def make_models(arch, **changes):
    """Returns the same model twice, with random values everywhere; the second has 16-bit weights."""
    torch.manual_seed(0)
    sizes = dict(block_size=16, vocab_size=64, n_layer=2, n_head=2, n_embd=32)
    plain = make_gpt(GPTConfig(**sizes, arch=arch)).train()
    with torch.no_grad():
        for p in plain.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    model = copy.deepcopy(plain)
    cast_weights(model, "bfloat16")
    return plain, model


@ARCHS
@pytest.mark.parametrize("loss_chunks", [0, 2])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_losses_gradients_and_updates_are_those_of_autocast(arch, optimizer, loss_chunks):
    cfg = configure(TrainConfig, ["--device=cpu", "--dtype=bfloat16", f"--optimizer={optimizer}"])
    machine = hardware.find_machine(cfg)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    batches = torch.randint(64, (3, 2, 4, 17))
    runs = []
    for model in make_models(arch):
        model.loss_chunks = loss_chunks
        optimizers = optim.make_optimizers(model, cfg, machine.device)
        numbers = []
        for micro_batches in batches:
            numbers += [micro_step(model, tokens, scaler, machine, 2) for tokens in micro_batches]
            numbers += [p.grad.clone() for p in model.parameters()]
            numbers.append(update(model, optimizers, scaler, 1.0))
            assert all(p.grad is None for p in model.parameters())
        runs.append(numbers + list(model.state_dict().values()))
    plain, cast = runs
    assert len(plain) == len(cast)
    for a, b in zip(plain, cast, strict=True):
        assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))


def test_both_passes_are_in_the_dtype_of_the_run_and_the_loss_keeps_no_graph(
    byte_data, tiny, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    cfg = configure(TrainConfig, [*tiny, "--dtype=bfloat16"])
    run = set_up(cfg, hardware.find_machine(cfg))
    seen = []
    run.model.transformer.h[0].mlp.c_fc.register_forward_hook(lambda layer, args, out: seen.append(out.dtype))
    loss = micro_step(run.model, torch.zeros(4, 17, dtype=torch.int64), run.scaler, run.machine, 2)
    estimate_loss(run.model, run.val_data, 4, 4, run.machine)
    assert seen == [torch.bfloat16] * 2
    assert not loss.requires_grad and run.model.lm_head.weight.grad is not None


@ARCHS
def test_the_matmuls_read_the_16_bit_weights(arch):
    """Else the test above would compare autocast with itself."""
    _, model = make_models(arch)
    model.loss_chunks = 1
    idx = torch.randint(64, (4, 16))
    layers = [layer for layer in model.transformer.h.modules() if isinstance(layer, Linear)]
    assert len(layers) == 2 * 4
    with torch.no_grad():
        for layer in layers:
            layer.weight.fill_(math.nan)
        model.lm_head.weight16.zero_()
    with torch.autocast("cpu", torch.bfloat16):
        assert model(idx, idx)[1].item() == pytest.approx(math.log(64))
    # outside of autocast, as where a run draws samples, it is the weights
    assert model(idx, idx)[1].isnan()


@ARCHS
def test_a_compiled_model_has_the_gradients_of_one_that_is_not_compiled(arch):
    torch._dynamo.reset()
    plain, model = make_models(arch)
    model.loss_chunks = 2
    model.compile(dynamic=False)
    idx, targets = torch.randint(64, (2, 4, 16))
    for _ in range(2):  # the second adds to the first
        with torch.autocast("cpu", torch.bfloat16):
            plain(idx, targets)[1].backward()
            model(idx, targets)[1].backward()
    for p, q in zip(plain.parameters(), model.parameters(), strict=True):
        if p.dim() == 2:  # those of vectors are sums in which much cancels
            assert (p.grad - q.grad).norm() <= 0.1 * p.grad.norm()


@ARCHS
def test_gradients_in_fp16_are_those_of_autocast(arch):
    idx, targets = torch.randint(64, (2, 4, 16))
    grads = []
    for model, dtype in zip(make_models(arch), ("float32", "float16"), strict=True):
        cast_weights(model, dtype)
        for _ in range(2):
            with torch.autocast("cpu", torch.float16):
                loss = model(idx, targets)[1]
            (1024 * loss).backward()
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)


def test_a_frozen_weight_has_no_gradient():
    _, model = make_models("gpt2")
    frozen = [model.transformer.h[0].mlp.c_fc.weight, model.transformer.h[1].mlp.c_fc.weight]
    frozen[0].requires_grad_(False)
    cast_weights(model, "bfloat16")
    frozen[1].requires_grad_(False)
    idx = torch.randint(64, (4, 16))
    with torch.autocast("cpu", torch.bfloat16):
        model(idx, idx)[1].backward()
    without = {name for name, p in model.named_parameters() if p.grad is None}
    assert without == {f"transformer.h.{i}.mlp.c_fc.weight" for i in (0, 1)}


def test_a_copy_of_the_model_has_no_16_bit_weights():
    """They would be those of another model, and their gradients would go nowhere."""
    _, model = make_models("gpt2")
    twin = copy.deepcopy(model)
    assert all(layer.weight16 is None for layer in twin.modules() if isinstance(layer, Linear))
    idx = torch.randint(64, (4, 16))
    for m in (model, twin):
        with torch.autocast("cpu", torch.bfloat16):
            m(idx, idx)[1].backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert p is not q and torch.equal(p.grad, q.grad)


def test_memory_that_runs_out_in_a_pass_leaves_no_gradient_to_the_next(monkeypatch):
    _, model = make_models("gpt2")
    idx = torch.randint(64, (4, 16))
    weight = model.transformer.h[0].mlp.c_fc.weight

    def backward():
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(idx, idx)[1]
        loss.backward()
        return [p.grad for p in model.parameters()]

    def no_memory(tensor):
        if tensor.shape == weight.shape:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return tensor.to(torch.float32)

    expected = backward()
    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr(torch.Tensor, "float", no_memory)
        backward()
    for grad, expected_grad in zip(backward(), expected, strict=True):
        assert torch.equal(grad, expected_grad)


def test_a_run_in_bf16_that_was_stopped_is_that_which_was_not(run, byte_data, tiny, tmp_path):
    argv = ["train.py", *tiny, "--dtype=bfloat16", "--sample_interval=6"]
    run(*argv, "--out_dir=whole")
    run(*argv, "--max_iters=6", "--out_dir=half")
    run(*argv, "--out_dir=half", "--init_from=resume")
    states = [torch.load(tmp_path / out / "ckpt.pt", weights_only=True) for out in ("whole", "half")]
    for name, weight in states[0]["model"].items():
        assert torch.equal(weight, states[1]["model"][name]), name


# -----------------------------------------------------------------------------
# squared ReLU


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 2**-7), (torch.float16, 2**-9)]
)
def test_squared_relu_is_torchs(dtype, tolerance):
    torch.manual_seed(0)
    x = torch.randn(1000, dtype=dtype)
    x[:4] = torch.tensor([0.0, -0.0, -1.0, 1e-4])
    results = []
    for function in (squared_relu, lambda x: torch.relu(x).square()):
        leaf = x.clone().requires_grad_()
        y = function(leaf)
        y.backward(torch.arange(1000, dtype=dtype) / 1000)
        results.append((y.detach(), leaf.grad))
    (y, grad), (expected, expected_grad) = results
    assert torch.equal(y, expected)
    # the squares of numbers below 2e-4 are 0 in fp16
    assert torch.allclose(grad, expected_grad, rtol=tolerance, atol=2**-12 if dtype == torch.float16 else 0)


def test_squared_relu_keeps_its_result_and_nothing_else():
    kept = []
    x = torch.randn(100, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor), lambda _: None):
        y = squared_relu(x)
    assert [tensor.data_ptr() for tensor in kept] == [y.data_ptr()]
