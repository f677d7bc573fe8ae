"""
The model against transformers' GPT-2, against plain math, and against figures worked out by hand.
Run: pytest tests/test_model.py
"""

import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from model import GPT, GPTConfig, make_gpt
from sologpt import sampling
from sologpt.layers import Linear
from sologpt.loss import chunked_cross_entropy, suitable_chunks
from sologpt.sampling import pick

GPT2 = dict(n_layer=12, n_head=12, n_embd=768)
TINY = dict(block_size=32, vocab_size=97, n_layer=3, n_head=4, n_embd=48)


def tiny(seed=0, **changes):
    torch.manual_seed(seed)
    return GPT(GPTConfig(**TINY | changes)).eval()


def shake(model):
    """Random values everywhere, so that biases and LayerNorm weights, 0 and 1 at first, take part in a
    comparison."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model


def test_logits_and_loss_equal_those_of_transformers():
    ours = shake(tiny(bias=True))
    sizes = dict(vocab_size=97, n_positions=32, n_embd=48, n_layer=3, n_head=4)
    theirs = GPT2LMHeadModel(
        GPT2Config(**sizes, activation_function="gelu", bos_token_id=0, eos_token_id=0)
    ).eval()
    weights = theirs.state_dict()
    for name, p in ours.state_dict().items():
        # Conv1D there, Linear here
        transposed = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
        weights[name].copy_(p.t() if transposed else p)
    idx, targets = torch.randint(97, (2, 5, 32))
    with torch.no_grad():
        logits, loss = ours(idx, targets)
        expected = theirs(idx).logits
    assert (logits - expected).abs().max() < 1e-4
    assert loss.item() == pytest.approx(
        F.cross_entropy(expected.flatten(0, 1), targets.flatten()).item(), abs=1e-5
    )


def test_attention_equals_softmax_of_scaled_products():
    model = shake(tiny(bias=True, n_head=2))
    attention, x = model.transformer.h[0].attn, torch.randn(2, 7, 48)
    q, k, v = attention.c_attn(x).split(48, dim=2)
    heads = []
    for h in (slice(0, 24), slice(24, 48)):
        scores = q[..., h] @ k[..., h].transpose(1, 2) / math.sqrt(24)
        scores = scores.masked_fill(torch.ones(7, 7).triu(1).bool(), -math.inf)
        heads.append(scores.softmax(-1) @ v[..., h])
    expected = attention.c_proj(torch.cat(heads, dim=-1))
    assert torch.allclose(attention(x), expected, atol=1e-5)


def test_a_token_does_not_change_what_was_predicted_before_it():
    model, idx = shake(tiny()), torch.randint(97, (1, 32))
    changed = idx.clone()
    changed[0, 20] = (changed[0, 20] + 1) % 97
    before, after = model(idx, idx)[0], model(changed, idx)[0]
    assert torch.equal(before[:, :20], after[:, :20])
    assert not torch.allclose(before[:, 20:], after[:, 20:])


@pytest.mark.parametrize("vocab_size", [97, 320, 50304])
def test_initial_loss_is_that_of_a_uniform_guess(vocab_size):
    model = tiny(vocab_size=vocab_size)
    idx, targets = torch.randint(vocab_size, (2, 4, 32))
    assert model(idx, targets)[1].item() == pytest.approx(math.log(vocab_size), rel=0.05)


def test_initialisation_is_gpt2s():
    model = tiny(n_embd=192, bias=True)
    for name, p in model.named_parameters():
        if name.endswith("c_proj.weight"):
            assert p.std().item() == pytest.approx(0.02 / math.sqrt(2 * 3), rel=0.05), name
        elif p.dim() == 2:
            assert p.std().item() == pytest.approx(0.02, rel=0.05), name
        else:
            assert torch.equal(p, torch.full_like(p, float("ln" in name and name.endswith("weight")))), name


def test_parameter_names_are_nanogpts():
    expected = ["transformer.wte.weight", "transformer.wpe.weight"]
    for i in range(3):
        for part in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"):
            expected += [f"transformer.h.{i}.{part}.weight", f"transformer.h.{i}.{part}.bias"]
    expected += ["transformer.ln_f.weight", "transformer.ln_f.bias", "lm_head.weight"]
    assert list(tiny(bias=True).state_dict()) == expected
    assert list(tiny(bias=False).state_dict()) == [name for name in expected if not name.endswith(".bias")]


def test_targets_give_a_loss_and_all_logits_and_inference_the_last_position():
    model, idx = tiny(), torch.randint(97, (2, 9))
    logits, loss = model(idx)
    assert logits.shape == (2, 1, 97) and loss is None
    full, _ = model(idx, idx)
    assert full.shape == (2, 9, 97) and torch.allclose(full[:, -1:], logits, atol=1e-5)
    logits, loss = model.train()(idx, idx)
    assert torch.equal(logits, full) and loss.shape == () and loss.dtype == torch.float32
    model.loss_chunks = 2  # there are never logits of all positions
    logits, in_chunks = model(idx, idx)
    assert logits is None and in_chunks.item() == pytest.approx(loss.item(), rel=1e-6)


def test_targets_of_minus_one_do_not_count():
    model, (idx, targets) = tiny(), torch.randint(97, (2, 2, 8))
    masked = targets.clone()
    masked[1] = -1
    assert model(idx, masked)[1].item() == pytest.approx(model(idx[:1], targets[:1])[1].item(), rel=1e-5)


def gradients(model, idx, targets, dtype=torch.float32, scale=1.0):
    """The loss, and the gradients of the tied matrix, of a vector in the trunk and of the stream that the
    head reads, times scale in the backward pass as a GradScaler does it."""
    stream = []
    hook = model.transformer.ln_f.register_forward_hook(
        lambda module, x, y: (y.retain_grad(), stream.append(y))[0]
    )
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        loss = model.train()(idx, targets)[1]
    hook.remove()
    (loss * scale).backward()
    found = [model.lm_head.weight.grad, model.transformer.h[0].ln_1.weight.grad, stream[0].grad.float()]
    model.zero_grad()
    assert all(g.dtype == torch.float32 for g in found)
    return loss.detach(), [g / scale for g in found]


# of 5 * 31 tokens: 7 do not divide them, 1000 are too many
@pytest.mark.parametrize("chunks", [1, 2, 4, 7, 1000])
def test_a_loss_in_chunks_is_the_loss_and_has_its_gradients(chunks):
    model, (idx, targets) = shake(tiny(bias=True)), torch.randint(97, (2, 5, 31))
    targets[2], targets[0, :9] = -1, -1
    expected, reference = gradients(model, idx, targets)
    model.loss_chunks = chunks
    loss, found = gradients(model, idx, targets)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert all((a - b).abs().max() < 5e-6 * b.abs().max() for a, b in zip(found, reference, strict=True))


@pytest.mark.parametrize("chunks", [0, 2])
def test_a_batch_of_which_no_target_counts_adds_nothing_to_the_gradients(chunks):
    model, idx = shake(tiny()), torch.randint(97, (2, 8))
    model.train().loss_chunks = chunks
    model(idx, idx)[1].backward()
    before = [p.grad.clone() for p in model.parameters()]
    model(idx, torch.full_like(idx, -1))[1].backward()
    assert all(torch.equal(p.grad, grad) for p, grad in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("dtype, scale", [(torch.bfloat16, 1.0), (torch.float16, 2.0**16)])
def test_a_loss_in_chunks_is_as_exact_in_half_precision_as_the_plain_one(dtype, scale):
    """Both against fp32, in fp16 with the scale that a GradScaler begins with, without errors or a bias of
    its own."""
    model, (idx, targets) = shake(tiny(vocab_size=5000)), torch.randint(5000, (2, 8, 32))
    targets[0, 0] = -1
    exact, reference = gradients(model, idx, targets)
    plain = gradients(model, idx, targets, dtype, scale)
    model.loss_chunks = 4
    chunked = gradients(model, idx, targets, dtype, scale)
    for loss, _ in (plain, chunked):
        assert loss.item() == pytest.approx(exact.item(), rel=2e-2 if dtype == torch.bfloat16 else 2e-3)
    for ours, theirs, truth in zip(chunked[1], plain[1], reference, strict=True):
        assert ours.isfinite().all() and (ours - truth).norm() < 1.2 * (theirs - truth).norm()
        assert (ours * truth).sum() / truth.square().sum() == pytest.approx(1, abs=2e-3)


def test_a_loss_in_chunks_makes_no_logits_and_without_gradients_none_of_those():
    model, (idx, targets) = tiny(), torch.randint(97, (2, 8, 32))
    expected = model(idx, targets)[1]
    model.loss_chunks = 4
    sizes, linear = [], F.linear

    def spy(x, weight, bias=None):
        sizes.extend([x.numel() // 48] if len(weight) == 97 else [])
        return linear(x, weight, bias)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(F, "linear", spy)
        logits, loss = model(idx, targets)
    assert logits is None and loss.grad_fn is None and loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert sizes == [64] * 4
    assert model(idx, targets)[1].requires_grad  # evaluation mode alone does not turn gradients off


@pytest.mark.parametrize(
    "tokens, vocab_size, expected",
    # 0.41e9, 0.82e9, 2.5e9 and 13e9 logits in chunks of 0.54e9, but no more than 16; bytes need no chunks
    [(8192, 50304, 1), (16384, 50304, 2), (49152, 50304, 5), (262144, 50304, 16), (131072, 320, 1)],
)
def test_the_number_of_chunks_suits_the_logits(tokens, vocab_size, expected):
    assert suitable_chunks(tokens, vocab_size) == expected


# an evaluation that kept two micro-batches' logits took more memory than training a small model
@pytest.mark.parametrize("arch", ["gpt2", "modern"])
def test_a_compiled_model_evaluates_without_keeping_logits(arch):
    model = make_gpt(dataclasses.replace(tiny().config, arch=arch)).eval()
    idx, targets = torch.randint(97, (2, 4, 32))
    targets[0, :5] = -1
    with torch.no_grad():
        logits, expected = model(idx, targets)
        model.compile(dynamic=False)
        none, loss = model(idx, targets)
    assert none is None and loss.item() == pytest.approx(expected.item(), rel=1e-6)
    counted = targets >= 0
    assert expected.item() == pytest.approx(
        F.cross_entropy(logits[counted], targets[counted]).item(), rel=1e-6
    )


class HeadAlone(torch.nn.Module):
    """What the chunked loss is compiled with at least: something before it, and a head of 8 MB."""

    def __init__(self, chunks):
        super().__init__()
        self.before = torch.nn.Linear(256, 256)
        self.head = Linear(256, 8192, bias=False)
        self.chunks = chunks

    def forward(self, x, targets):
        return chunked_cross_entropy(self.before(x).relu(), self.head, targets, self.chunks)


def peak_memory(work):
    """Returns the most bytes that the tensors made by work() took at one time, as torch's profiler counts."""
    with torch.profiler.profile(profile_memory=True, acc_events=True) as profiler:
        work()
    events, sizes = profiler.profiler.kineto_results.experimental_event_tree(), []
    while events:
        event = events.pop()
        events += event.children
        if "alloc_size" in dir(event.typed[1]):
            sizes.append((event.start_time_ns, event.typed[1].alloc_size))  # negative: freed
    return max(itertools.accumulate(size for _, size in sorted(sizes)))


# torch.compile itself does that
def test_a_compiled_loss_takes_less_memory_the_more_chunks_it_has():
    x, targets = torch.randn(2048, 256), torch.randint(8192, (2048,))
    peaks = []
    for chunks in (1, 2, 8):
        torch._dynamo.reset()
        model = HeadAlone(chunks)
        compiled = torch.compile(model, dynamic=False)

        def step(model=model, compiled=compiled):
            compiled(x, targets).backward()
            model.zero_grad()

        step()
        peaks.append(peak_memory(step))
    assert peaks == sorted(peaks, reverse=True)
    # in one chunk the gradient of the logits takes their place: a second matrix of them would double this
    assert peaks[0] < 4 * 8192 * (256 + 256 + 2048) * 1.3
    # the head's gradient, a chunk's product and logits, and little else: not the products of all chunks
    assert peaks[-1] < 4 * 8192 * (256 + 256 + 2048 / 8) * 1.5


def test_dropout_acts_in_training_only():
    model, idx = tiny(dropout=0.5), torch.randint(97, (2, 9))
    assert torch.equal(model(idx)[0], model(idx)[0])
    model.train()
    assert model(idx, idx)[1] != model(idx, idx)[1]


def test_dropout_begins_with_the_embedding():
    model, idx = tiny(dropout=0.25).train(), torch.randint(97, (50, 32))
    seen = []
    model.transformer.h[0].register_forward_pre_hook(lambda block, args: seen.append(args[0]))
    model(idx, idx)
    whole = model.transformer.wte(idx) + model.transformer.wpe.weight
    kept = seen[0] != 0
    assert kept.float().mean().item() == pytest.approx(0.75, abs=0.01)
    assert torch.allclose(seen[0], whole / 0.75 * kept)


def test_one_batch_can_be_learned_by_heart():
    model = tiny().train()
    optimizer = model.configure_optimizers(0.0, 1e-2, (0.9, 0.95), "cpu")
    idx, targets = torch.randint(97, (2, 2, 16))
    for _ in range(60):
        optimizer.zero_grad()
        loss = model(idx, targets)[1]
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1


def test_matrices_decay_and_vectors_do_not():
    model = tiny(bias=True)
    decay, rest = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu").param_groups
    assert (decay["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    assert len(decay["params"]) == 2 + 4 * 3 and all(p.dim() == 2 for p in decay["params"])
    assert len(rest["params"]) == 8 * 3 + 2 and all(p.dim() == 1 for p in rest["params"])
    assert decay["fused"]


@pytest.mark.parametrize(
    "why, sizes, parameters, tokens, milliseconds, tflops, percent",
    [
        ("RTX 4070 of an A100", GPT2, 123.59, 524288, 9344.08, 312, 15.37),
        ("RTX 4070 of itself", GPT2, 123.59, 524288, 9344.08, 58.3, 82.3),
        ("RTX 4070 of an A100", GPT2 | dict(n_embd=384), 40.56, 524288, 3904.79, 312, 12.91),
        ("H200 of an A100", dict(n_layer=48, n_head=25, n_embd=1600), 1555, 1048576, 21167, 312, 163.8),
        ("H200 of itself", dict(n_layer=48, n_head=25, n_embd=1600), 1555, 1048576, 21167, 989.4, 51.6),
    ],
)
def test_mfu_of_published_runs(why, sizes, parameters, tokens, milliseconds, tflops, percent):
    with torch.device("meta"):
        model = GPT(GPTConfig(**sizes, bias=False))
    assert model.get_num_params() / 1e6 == pytest.approx(parameters, rel=2e-3)
    mfu = model.estimate_mfu(tokens // 1024, milliseconds / 1000, tflops * 1e12)
    # what the H200's log shows is a moving average, 0.4 % above what its own time per iteration gives
    assert 100 * mfu == pytest.approx(percent, rel=5e-3 if "H200" in why else 1e-3)


def test_flops_of_gpt2_by_hand():
    with torch.device("meta"):
        model = GPT(GPTConfig(bias=False))
    # 50304 * 768 embedding, 12 layers of 12 * 768^2 matrices and 2 * 768 norms, 768 final norm; attention 12
    # L C T
    n = 50304 * 768 + 12 * (12 * 768**2 + 2 * 768) + 768
    assert model.get_num_params() == n == 123_587_328
    assert model.get_num_params(non_embedding=False) == n + 1024 * 768
    assert model.flops_per_token() == 6 * n + 12 * 12 * 768 * 1024


def test_greedy_generation_takes_the_likeliest_token_and_slides_past_the_block():
    model, idx = shake(tiny()), torch.randint(97, (2, 30))
    out = model.generate(idx, 6, temperature=0)
    assert torch.equal(out[:, :30], idx) and out.shape == (2, 36)
    for t in range(30, 36):
        expected = model(out[:, max(0, t - 32) : t])[0][:, -1].argmax(-1)
        assert torch.equal(out[:, t], expected)


@pytest.mark.parametrize(
    "options", [dict(), dict(temperature=0), dict(top_k=90), dict(temperature=5.0, top_k=0)]
)
def test_padded_ids_are_never_generated(options):
    model = tiny(n_ids=5)
    with torch.no_grad():
        # what pads is made the likeliest by far
        model.lm_head.weight[5:] = 10 * model.lm_head.weight[:1].sign()
        out = model.generate(torch.zeros(64, 1, dtype=torch.long), 20, **options)
    assert out.max() < 5


def test_samples_follow_the_softmax_of_the_logits_over_temperature():
    model, start = shake(tiny(vocab_size=6)), torch.zeros(1, 1, dtype=torch.long)
    torch.manual_seed(0)
    drawn = model.generate(start.expand(20000, 1), 1, temperature=0.5)[:, 1].bincount(minlength=6) / 20000
    expected = (model(start)[0][0, 0] / 0.5).softmax(-1)
    assert torch.allclose(drawn, expected, atol=0.015)


def test_top_k_leaves_the_k_likeliest_only():
    model, start = shake(tiny()), torch.zeros(1, 1, dtype=torch.long)
    allowed = set(model(start)[0][0, 0].topk(3).indices.tolist())
    drawn = model.generate(start.expand(500, 1), 1, temperature=3.0, top_k=3)[:, 1]
    assert set(drawn.tolist()) == allowed


def test_generation_stops_at_the_stop_token():
    model, start = shake(tiny()), torch.zeros(1, 1, dtype=torch.long)
    full = model.generate(start, 20, temperature=0)[0].tolist()
    stop = full[5]
    stopped = model.generate(start, 20, temperature=0, stop_token=stop)[0].tolist()
    assert stopped == full[: full.index(stop, 1) + 1]


def test_generation_goes_on_until_every_row_has_stopped():
    model, start, noise = shake(tiny(vocab_size=3)), torch.zeros(4, 1, dtype=torch.long), torch.rand(4, 20)
    full = model.generate(start, 20, noise=noise)
    stops = (full[:, 1:] == 2).int().argmax(1)
    assert len(set(stops.tolist())) > 1 and (full == 2).any(1).all()
    stopped = model.generate(start, 20, noise=noise, stop_token=2)
    assert torch.equal(stopped, full[:, : stops.max() + 2])


def by_hand(logits, u, temperature, top_k, top_p):
    """The id that pick should take for one row: plain Python in double precision, no tensors."""
    ids = range(len(logits))
    if temperature == 0:
        return max(ids, key=logits.__getitem__)
    if top_k or top_p < 1:
        ids = sorted(ids, key=lambda i: -logits[i])[: top_k or None]
    mass = [math.exp((logits[i] - max(logits)) / temperature) for i in ids]
    share, kept = 0.0, []
    for i, m in zip(ids, mass, strict=True):
        if share < top_p * sum(mass):
            kept.append((i, m))
        share += m
    left = (1 - u) * sum(m for _, m in kept)
    for i, m in kept:
        left -= m
        if left <= 0:
            return i
    return kept[-1][0]


def without_a_cache(model, prompt, count, noise, *options):
    """Continues prompt, a list of ids, as nanoGPT does: the whole window again for each token."""
    text = list(prompt)
    for n in range(count):
        with torch.no_grad():
            logits = model(torch.tensor([text[-model.config.block_size :]]))[0][0, 0, : model.config.n_ids]
        text.append(by_hand(logits.tolist(), noise[n].item(), *options))
    return text


SMALL = GPT(GPTConfig(block_size=12, vocab_size=37, n_layer=2, n_head=2, n_embd=16, n_ids=31)).eval()
with torch.random.fork_rng():
    torch.manual_seed(0)
    for p in SMALL.parameters():
        p.data = torch.randn_like(p) * 0.3


# the same examples each time: in one of many thousands rounding decides between two ids
@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(1, 18), min_size=1, max_size=4),
    count=st.integers(1, 16),
    temperature=st.sampled_from([0, 0.7, 1.0]),
    top_k=st.sampled_from([0, 5]),
    top_p=st.sampled_from([1.0, 0.6]),
    seed=st.integers(0, 2**31),
)
def test_the_cache_changes_nothing(lengths, count, temperature, top_k, top_p, seed):
    """Prompts of different length in one batch, below, at and above block_size=12: each row equals that
    prompt alone without a cache, for the same noise."""
    generator = torch.Generator().manual_seed(seed)
    idx = torch.randint(31, (len(lengths), max(lengths)), generator=generator)
    noise = torch.rand(len(lengths), count, generator=generator)
    options = (temperature, top_k, top_p)
    out = SMALL.generate(idx, count, *options, noise=noise, lengths=torch.tensor(lengths))
    assert out.shape == (len(lengths), max(lengths) + count)
    for row, prompt, length, u in zip(out.tolist(), idx.tolist(), lengths, noise, strict=True):
        assert row[: length + count] == without_a_cache(SMALL, prompt[:length], count, u, *options)


@pytest.mark.parametrize(
    "idx, options, message",
    [
        (torch.zeros(2, 3), {}, "ids are torch.float32; they must be torch.int64 or torch.int32"),
        (torch.zeros(2, 3).long(), dict(temperature=-1.0), "temperature=-1.0 must be at least 0"),
        (torch.zeros(2, 3).long(), dict(top_k=-1), "top_k=-1 must be at least 0"),
        (torch.zeros(2, 3).long(), dict(max_new_tokens=-1), "max_new_tokens=-1 must be at least 0"),
        (torch.zeros(2, 3).long(), dict(noise=torch.zeros(1, 4)), r"shape \(1, 4\); it must be \(2, 4\)"),
        (torch.zeros(2, 3).long(), dict(noise=torch.zeros(2, 3)), r"shape \(2, 3\); it must be \(2, 4\)"),
        (torch.zeros(2, 3).long(), dict(lengths=torch.tensor([3])), r"the shape \(1,\), not \(2,\)"),
        (
            torch.zeros(2, 3).long(),
            dict(lengths=torch.tensor([3, 4])),
            "lengths has 4, but the prompts have only 3 ids",
        ),
    ],
)
def test_arguments_that_would_be_misunderstood_are_refused(idx, options, message):
    with pytest.raises(ValueError, match=message):
        SMALL.generate(idx, **(dict(max_new_tokens=4) | options))


def test_a_prompt_may_be_int32_as_in_nanogpt():
    idx = torch.tensor([[3, 1, 2]])
    out = SMALL.generate(idx.int(), 5, temperature=0)
    assert out.dtype == torch.int64 and torch.equal(out, SMALL.generate(idx, 5, temperature=0))


def test_a_temperature_next_to_zero_is_greedy():
    logits = torch.tensor([[0.0, 1.0, 0.5]])
    assert pick(logits, torch.tensor([0.5]), 1e-46).tolist() == [1]


def test_a_token_is_computed_once_until_the_window_slides():
    """What each call reads, counted at the first matmul: the prompt, then a token a call, then whole
    windows."""
    rows = []
    hook = SMALL.transformer.h[0].mlp.c_fc.register_forward_hook(
        lambda m, x, y: rows.append(x[0].numel() // 16)
    )
    SMALL.generate(torch.zeros(1, 5, dtype=torch.long), 11)
    hook.remove()
    assert rows == [5] + [1] * 7 + [12] * 3


def test_generation_is_a_function_of_the_noise_of_its_row():
    idx, noise = torch.zeros(3, 4, dtype=torch.long), torch.rand(3, 10)
    together = SMALL.generate(idx, 10, noise=noise)
    for i in range(3):
        assert torch.equal(SMALL.generate(idx[:1], 10, noise=noise[i : i + 1])[0], together[i])
    assert torch.equal(SMALL.generate(idx, 6, noise=noise), together[:, :10])


def test_the_stream_is_the_text_as_it_grows():
    idx = torch.zeros(2, 4, dtype=torch.long)
    texts = [text.tolist() for text in sampling.stream(SMALL, idx, 10, temperature=0)]
    full = SMALL.generate(idx, 10, temperature=0)
    assert texts == [full[:, : 5 + n].tolist() for n in range(10)]
    assert torch.equal(SMALL.generate(idx, 0), idx)


def test_top_p_keeps_the_fewest_ids_that_reach_it():
    logits = torch.tensor([0.1, 0.4, 0.3, 0.2]).log().expand(4000, 4)
    noise = torch.linspace(0, 1, 4001)[:-1]
    for top_p, allowed in ((0.05, {1}), (0.4, {1}), (0.41, {1, 2}), (0.85, {1, 2, 3}), (1.0, {0, 1, 2, 3})):
        drawn = pick(logits, noise, 1.0, None, top_p)
        assert set(drawn.tolist()) == allowed
    # four quarters, exact in floating point: two are half, and a third is too much
    assert len(set(pick(torch.zeros(4000, 4), noise, 1.0, None, 0.5).tolist())) == 2
    share = pick(logits, noise, 1.0, None, 0.5).bincount(minlength=4) / 4000
    assert torch.allclose(share, torch.tensor([0, 4 / 7, 3 / 7, 0]), atol=1e-3)


def test_the_extremes_of_noise_and_temperature_give_ids_of_the_vocabulary():
    logits = torch.full((2, 5), -math.inf)
    logits[:, 2] = 3e38
    noise = torch.tensor([0.0, 1 - 2**-24])
    for options in ((1.0,), (1e-30,), (0,), (1e30,), (1.0, 3, 0.5)):
        assert pick(logits, noise, *options).tolist() == [2, 2]


@pytest.mark.parametrize("B", [1, 3])
def test_bf16_weights_and_bf16_autocast_sample_as_their_uncached_passes_do(B):
    """Rounding may turn one id of a near tie into another: compared is the logit of the id that was taken."""
    half, idx = shake(tiny(n_embd=64)).bfloat16(), torch.randint(97, (B, 9))
    text = half.generate(idx, 12, temperature=0)
    logits = half(text, text)[0].float()[:, 8:-1]
    taken = logits.gather(2, text[:, 9:, None])[..., 0]
    assert text.shape == (B, 21) and (logits.amax(2) - taken).max() < 0.05 * logits.std()
    with torch.autocast("cpu", torch.bfloat16):
        assert half.float().generate(idx, 12, temperature=0)[:, :10].equal(text[:, :10])


@pytest.mark.parametrize(
    "idx, message",
    [
        (torch.zeros(1, 0, dtype=torch.long), "the prompt is empty"),
        (torch.tensor([[3, 31]]), "the prompt has token ids 3 to 31, the model 0 to 30"),
        (torch.tensor([[3, -1]]), "the prompt has token ids -1 to 3"),
    ],
)
def test_a_prompt_that_the_model_cannot_read_is_refused(idx, message):
    with pytest.raises(ValueError, match=message):
        SMALL.generate(idx, 3)


def test_a_row_without_a_prompt_is_refused():
    with pytest.raises(ValueError, match="a prompt is empty"):
        SMALL.generate(torch.ones(2, 3, dtype=torch.long), 3, lengths=torch.tensor([0, 3]))


def test_a_model_that_has_diverged_is_refused():
    model = tiny()
    model.transformer.wte.weight.data[5, 5] = math.nan
    with pytest.raises(ValueError, match="the model's logits are not finite"):
        model.generate(torch.zeros(1, 3, dtype=torch.long), 3)


@pytest.mark.parametrize("stop_token", [None, 0])
@pytest.mark.parametrize("how", [dict(temperature=0), dict(), dict(top_k=5), dict(top_k=5, top_p=0.9)])
def test_logits_that_are_not_finite_at_some_later_token_are_refused(stop_token, how):
    model = tiny()  # of as many rows as ids
    model.transformer.wpe.weight.data[6] = math.nan  # of the seventh position, read for the eighth token
    prompt = torch.ones(1, 3, dtype=torch.long)  # which goes on with ones
    assert model.generate(prompt, 4).shape == (1, 7)
    with pytest.raises(ValueError, match="the model's logits are not finite"):
        model.generate(prompt, 6, stop_token=stop_token, **how)


def test_the_step_compiles_to_one_graph_whatever_the_position():
    model = tiny()
    idx, graphs = torch.randint(97, (2, 4)), []
    expected = model.generate(idx, 12, temperature=0)

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    step = torch.compile(sampling.step, fullgraph=True, dynamic=False, backend=backend)
    assert torch.equal(model.generate(idx, 12, temperature=0, step=step), expected) and len(graphs) == 1


def test_a_context_longer_than_the_block_is_refused():
    with pytest.raises(ValueError, match="33 tokens are more than block_size=32"):
        tiny()(torch.zeros(1, 33, dtype=torch.long))


def test_shapes_can_be_worked_out_without_memory():
    with torch.device("meta"):
        logits, _ = GPT(GPTConfig(n_layer=2)).eval()(torch.zeros(3, 7, dtype=torch.long))
    assert logits.shape == (3, 1, 50304)


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(n_embd=770), "n_embd=770 is not divisible by n_head=12"),
        (dict(n_layer=0), "n_layer=0 must be at least 1"),
        (dict(dropout=1.0), "dropout=1.0 must be at least 0 and below 1"),
        (dict(n_ids=50305), "n_ids=50305 is more than vocab_size=50304"),
    ],
)
def test_an_impossible_model_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(**wrong)


def test_gpt2s_padded_vocabulary_is_known():
    assert GPTConfig().n_ids == 50257 and GPTConfig(vocab_size=65).n_ids == 65


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("chunks", [1, 3])
# torch.compile itself does that
def test_torch_compile_takes_the_model_with_its_loss_as_one_graph(training, chunks):
    model, (idx, targets) = tiny(dropout=0.1).train(training), torch.randint(97, (2, 4, 32))
    model.loss_chunks = chunks
    # raises at the first graph break
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="eager")
    with torch.autocast("cpu", torch.bfloat16):
        assert compiled(idx, targets)[1].item() == pytest.approx(math.log(97), rel=0.05)


def test_building_a_model_prints_nothing(capfd):
    tiny()
    assert capfd.readouterr() == ("", "")


def test_bf16_autocast_keeps_the_residual_stream_in_bf16_and_stays_close_to_fp32():
    model, (idx, targets) = tiny().train(), torch.randint(97, (2, 4, 32))
    expected = model(idx, targets)[1]
    streams = []
    hooks = [
        block.register_forward_hook(lambda *args: streams.append(args[2][0].dtype))
        for block in model.transformer.h
    ]
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(idx, targets)[1]
    loss.backward()
    assert len(hooks) == 3 and streams == [torch.bfloat16] * 3
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected.item(), rel=1e-2)
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters())


def test_a_loss_in_chunks_of_large_logits_is_the_plain_one():
    model, (idx, targets) = shake(tiny(bias=True)), torch.randint(97, (2, 5, 31))
    with torch.no_grad():
        model.lm_head.weight.mul_(400)
        assert model(idx, targets)[0].max() > 100  # e^89 is infinite in fp32
    expected, reference = gradients(model, idx, targets)
    model.loss_chunks = 3
    loss, found = gradients(model, idx, targets)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert all((a - b).abs().max() < 1e-4 * b.abs().max() for a, b in zip(found, reference, strict=True))
