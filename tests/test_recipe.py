"""
The modern recipe against independent math: rotations as complex multiplication, Muon against an SVD and
against torch's own Muon, norms and caps by hand, the schedule wsd by hand, and runs of it against
uninterrupted ones.
Run: pytest tests/test_recipe.py
"""

import math
import os
import re
import shutil

import pytest
import torch
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

from configurator import ConfigError, configure
from model import GPT, GPTConfig, make_gpt, rms_norm, rotate
from sologpt import checkpoint
from sologpt.optim import Muon, allocate_moments, evened, make_optimizers, muon_momentum, orthogonalize
from sologpt.sizes import width_problem
from train import TrainConfig, get_lr, set_learning_rate

TINY = dict(block_size=32, vocab_size=97, n_layer=3, n_head=2, n_embd=48, bias=False)


# -----------------------------------------------------------------------------
# Muon


@pytest.mark.parametrize("shape", [(48, 48), (192, 48), (48, 192)])
def test_an_orthogonalized_matrix_has_the_singular_vectors_of_the_old_one_and_values_near_1(shape):
    torch.manual_seed(0)
    matrices = torch.randn(3, *shape) * torch.tensor([1e-4, 1.0, 1e3])[:, None, None]
    for before, after in zip(matrices, orthogonalize(matrices).float(), strict=True):
        U, _, Vh = torch.linalg.svd(before, full_matrices=False)
        values = U.T @ after @ Vh.T  # diagonal, if the vectors are the same
        assert values.diagonal().min() > 0.3 and values.diagonal().max() < 1.3
        assert (values - values.diagonal().diag()).abs().max() < 0.1  # products in bf16
        nearest = U @ Vh  # the nearest matrix with orthonormal rows or columns
        assert torch.cosine_similarity(after.flatten(), nearest.flatten(), dim=0) > 0.97


def evened_by_hand(update, squares):
    """One neuron after the other, each a row, or of a wide matrix a column. squares, {neuron: running mean},
    are moved."""
    tall = update if update.size(0) >= update.size(1) else update.T
    rows = []
    for i, row in enumerate(tall):
        squares[i] = 0.95 * squares.get(i, 0.0) + 0.05 * row.square().mean()
        rows.append(row / squares[i].sqrt())
    even = torch.stack(rows) if tall is update else torch.stack(rows).T
    return even * update.norm() / even.norm()


def test_muon_is_torchs_muon_of_each_matrix_with_q_k_and_v_apart_and_even_rows():
    torch.manual_seed(0)
    lr, weight_decay = 0.02, 0.1
    fused, tall, wide = torch.randn(144, 48), torch.randn(192, 48), torch.randn(48, 192)
    ours = [torch.nn.Parameter(w.clone()) for w in (fused, tall, wide)]
    groups = [dict(params=ours[:1], parts=3), dict(params=ours[1:], parts=1)]
    mine = Muon(groups, lr=lr, weight_decay=weight_decay)
    expected = [w.clone() for w in (*fused.chunk(3), tall, wide)]
    # with these, theirs moves to minus its update
    theirs = [torch.nn.Parameter(torch.zeros_like(w)) for w in expected]
    torchs = torch.optim.Muon(theirs, adjust_lr_fn="match_rms_adamw", lr=1.0, weight_decay=0.0)
    squares = [{} for _ in expected]
    for momentum in (0.85, 0.9, 0.95):
        grads = [torch.randn_like(w) * torch.rand(len(w), 1) for w in (fused, tall, wide)]
        grads[0][:48] *= 100  # of q: it must not make the updates of k and v small
        for p, grad in zip(ours, grads, strict=True):
            p.grad = grad.clone()  # ours overwrites it
        for p, grad in zip(theirs, (*grads[0].chunk(3), *grads[1:]), strict=True):
            p.data.zero_()
            p.grad = grad
        for optimizer in (mine, torchs):
            for group in optimizer.param_groups:
                group["momentum"] = momentum
            optimizer.step()
        for w, p, seen in zip(expected, theirs, squares, strict=True):
            w.mul_(1 - lr * weight_decay).sub_(lr * evened_by_hand(-p.detach(), seen))
    split = [part.detach() for part in (*ours[0].chunk(3), *ours[1:])]
    before = (*fused.chunk(3), tall, wide)
    moved = [(b - a).abs().mean() for a, b in zip(before, split, strict=True)]
    for p, w, distance in zip(split, expected, moved, strict=True):
        # on some CPUs bf16 products of a batch are summed in another order than single ones
        assert (p - w).square().mean().sqrt() < 0.03 * distance
    assert max(moved[:3]) < 1.2 * min(moved[:3])


def test_muon_leaves_frozen_matrices_as_they_are():
    weights = [torch.randn(144, 48), torch.randn(192, 48), torch.randn(48, 192)]
    moved = []
    for frozen in ([], [0], [0, 2]):  # [0]: all of its group
        params = [torch.nn.Parameter(w.clone()) for w in weights]
        muon = Muon([dict(params=params[:1], parts=3), dict(params=params[1:], parts=1)], lr=0.02)
        for i, p in enumerate(params):
            p.grad = None if i in frozen else torch.ones_like(p).cumsum(1).sin()
        for group in muon.param_groups:
            group["momentum"] = 0.9
        muon.step()
        assert [torch.equal(p, w) for p, w in zip(params, weights, strict=True)] == [
            i in frozen for i in range(3)
        ]
        moved.append(params[1].detach())
    assert torch.equal(moved[0], moved[1]) and torch.equal(moved[0], moved[2])


def test_an_optimizer_or_schedule_that_is_half_added_is_not_another_one():
    model = GPT(GPTConfig(**TINY))
    cfg = TrainConfig(optimizer="muom")
    with pytest.raises(AssertionError):
        make_optimizers(model, cfg, torch.device("cpu"))
    with pytest.raises(AssertionError):
        get_lr(3000, TrainConfig(schedule="linear"))
    with pytest.raises(NotImplementedError, match="say here what SGD keeps for a parameter"):
        allocate_moments(dict(optimizer=torch.optim.SGD(model.parameters(), momentum=0.9)))


@pytest.mark.parametrize("shape", [(6, 4), (4, 6)])
def test_the_running_squares_of_the_rows_take_a_twentieth_of_each_new_one(shape):
    updates = torch.randn(3, *shape)
    along = 2 if shape[0] > shape[1] else 1
    before = torch.rand_like(updates.sum(along, keepdim=True))
    squares = before.clone()
    evened(updates.clone(), squares)
    new = (updates**2).mean(along, keepdim=True)
    assert torch.allclose(squares, before + (new - before) / 20)


def test_muon_takes_the_matrices_of_the_blocks_and_adamw_all_else():
    model = GPT(GPTConfig(**TINY))
    adamw, muon = make_optimizers(model, TrainConfig(optimizer="muon"), torch.device("cpu")).values()
    mine = {id(p) for group in muon.param_groups for p in group["params"]}
    others = {id(p) for group in adamw.param_groups for p in group["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in mine}
    parts = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert names == {f"transformer.h.{i}.{part}.weight" for i in range(3) for part in parts}
    assert not mine & others and len(mine | others) == len(list(model.parameters()))
    # c_attn, of three matrices each, and others
    assert [len(group["params"]) for group in muon.param_groups] == [3, 9]
    assert [group["parts"] for group in muon.param_groups] == [3, 1]


def test_learning_rates_and_decay_by_kind_of_parameter():
    model = make_gpt(GPTConfig(**TINY, arch="modern"))
    names = {id(p): name for name, p in model.named_parameters()}
    cfg = TrainConfig(arch="modern", optimizer="muon", schedule="wsd", learning_rate=0.1, warmup_iters=0)
    optimizers = make_optimizers(model, cfg, torch.device("cpu"))
    set_learning_rate(optimizers, 5, cfg)
    found = {}
    for group in [group for optimizer in optimizers.values() for group in optimizer.param_groups]:
        for p in group["params"]:
            found[names[id(p)]] = (pytest.approx(group["lr"]), group["weight_decay"])
    assert found.keys() == {name for name, _ in model.named_parameters()}
    expected = {
        "transformer.wte.weight": (0.1, 0.1),
        "transformer.wve.weight": (0.4, 0.1),
        "lm_head.weight": (1.6, 0.1),  # 48 wide instead of 768
        "smear": (0.4, 0.0),
        "smear_gate": (0.1, 0.0),
        "transformer.h.1.x_mix": (0.4, 0.0),
        "transformer.h.1.attn.v_mix": (0.4, 0.0),
        "transformer.h.1.mlp.c_fc.weight": (0.1, 0.1),
    }
    assert {name: found[name] for name in expected} == expected
    gpt2 = GPT(GPTConfig(**TINY)).configure_optimizers(0.1, 0.1, (0.9, 0.95), "cpu")  # its head is tied
    assert [(group["lr"], group["weight_decay"]) for group in gpt2.param_groups] == [(0.1, 0.1), (0.1, 0.0)]


# -----------------------------------------------------------------------------
# schedules


def test_wsd_by_hand():
    argv = (
        "--schedule=wsd --learning_rate=1.0 --min_lr=0.1 --warmup_iters=3 --max_iters=20 --cooldown_frac=0.5"
    )
    cfg = configure(TrainConfig, argv.split())
    assert cfg.cooldown_start == 10
    expected = {0: 0.25, 2: 0.75, 3: 1.0, 10: 1.0, 11: 0.91, 15: 0.55, 19: 0.19, 20: 0.1}
    assert {it: get_lr(it, cfg) for it in expected} == pytest.approx(expected)
    cfg.cooldown_frac = 0.0
    assert get_lr(19, cfg) == 1.0
    cfg.cooldown_frac = 0.33  # 6.6 of 20 iterations: 7
    assert (
        cfg.cooldown_start == 13
        and get_lr(13, cfg) == 1.0
        and get_lr(14, cfg) == pytest.approx(0.1 + 0.9 * 6 / 7)
    )


def test_the_momentum_of_muon_rises_for_300_iterations():
    assert [muon_momentum(it) for it in (0, 150, 300, 10**6)] == pytest.approx([0.85, 0.9, 0.95, 0.95])


# -----------------------------------------------------------------------------
# the architecture


def modern(seed=0, **changes):
    torch.manual_seed(seed)
    model = make_gpt(GPTConfig(**TINY | dict(arch="modern") | changes)).eval()
    with torch.no_grad():  # nothing stays at the zeros and ones of the start
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
        model.lm_head.weight.mul_(5)  # so that the cap is felt
    return model


def rms_normed(x):
    return x / x.square().mean(-1, keepdim=True).add(1e-6).sqrt()


def as_complex(x):
    a, b = x.chunk(2, dim=-1)
    return torch.complex(a, b)


def plain_logits(model, idx):
    """The architecture written down a second time, from its description, one head and one position after the
    other."""
    weights, config = dict(model.named_parameters()), model.config
    H, D = config.n_head, config.n_embd // config.n_head
    turn = torch.polar(torch.ones(D // 2), 10000.0 ** (-2 * torch.arange(D // 2) / D))  # of one position
    embedding = weights["transformer.wte.weight"][idx]  # (T, C)
    x = embedding.clone()
    for t in range(1, len(idx)):
        gate = torch.sigmoid((embedding[t, :12] * weights["smear_gate"]).sum())
        x[t] += weights["smear"] * gate * embedding[t - 1]
    x0 = x
    first_v = None
    for i in range(config.n_layer):
        w = {name.removeprefix(f"transformer.h.{i}."): p for name, p in weights.items()}
        x = w["x_mix"][0] * x + w["x_mix"][1] * x0
        q, k, v = (rms_normed(x) @ w["attn.c_attn.weight"].T).view(-1, 3, H, D).unbind(1)
        first_v = v if i == 0 else first_v
        v = w["attn.v_mix"][0] * v + w["attn.v_mix"][1] * first_v
        if i in (0, 2):  # of three blocks; the last one, and every second before it
            v = v + weights["transformer.wve.weight"][idx].view(-1, H, D)
        y = torch.zeros_like(x)
        for t in range(len(idx)):
            for h in range(H):
                a, b = as_complex(rms_normed(q[t, h])) * turn**t, as_complex(rms_normed(k[: t + 1, h]))
                b = b * torch.stack([turn**s for s in range(t + 1)])
                p = ((a * b.conj()).real.sum(-1) / D**0.5).softmax(0)
                y[t, h * D : (h + 1) * D] = p @ v[: t + 1, h]
        x = x + y @ w["attn.c_proj.weight"].T
        x = x + (rms_normed(x) @ w["mlp.c_fc.weight"].T).clamp(min=0) ** 2 @ w["mlp.c_proj.weight"].T
    return 15 * torch.tanh(rms_normed(x) @ weights["lm_head.weight"].T / 15)


def test_logits_are_those_of_the_description():
    model, idx = modern(), torch.randint(97, (2, 12))
    with torch.no_grad():
        logits, loss = model(idx, idx)
        expected = torch.stack([plain_logits(model, row) for row in idx])
    assert (logits - expected).abs().max() < 2e-4
    assert logits.abs().max() < 15 and expected.abs().max() > 8
    log_p = expected.log_softmax(-1)[torch.arange(2)[:, None], torch.arange(12), idx]
    assert loss.item() == pytest.approx(-log_p.mean().item(), abs=1e-4)


def test_attention_depends_on_distances_only():
    """The second half of a text of one repeated token per half sees the same distances wherever it stands."""
    model = modern(n_layer=1)
    late, early = torch.full((1, 30), 5), torch.full((1, 20), 5)
    with torch.no_grad():
        # all values equal: any weights give the same
        assert torch.allclose(model(late)[0], model(early)[0], atol=1e-4)
        q = torch.randn(1, 1, 32, 24)
        k = torch.randn(1, 1, 1, 24).expand(1, 1, 32, 24)
        q = q[:, :, :1].expand_as(k)
        scores = rotate(rms_norm(q), *model.rotary) @ rotate(rms_norm(k), *model.rotary).mT
    for distance in range(32):
        along = scores[0, 0].diagonal(-distance)
        assert torch.allclose(along, along[0].expand_as(along), atol=1e-4)


def test_the_first_loss_is_that_of_a_uniform_guess_exactly():
    model = make_gpt(GPTConfig(**TINY, arch="modern")).eval()
    idx, targets = torch.randint(97, (2, 4, 32))
    assert model(idx, targets)[1].item() == pytest.approx(math.log(97), abs=1e-6)


def test_at_first_each_block_is_the_identity():
    model, seen = make_gpt(GPTConfig(**TINY, arch="modern")), []
    for block in model.transformer.h:
        block.register_forward_hook(lambda block, args, out: seen.append((args[0], out[0])))
        assert block.attn.v_mix.tolist() == [0.5, 0.5]
    model(torch.randint(97, (2, 8)))
    assert len(seen) == 3 and all(torch.equal(x, y) for x, y in seen)


def test_dropout_is_of_the_embedding_and_of_what_each_part_adds():
    model, idx, seen = modern(dropout=0.25).train(), torch.randint(97, (50, 32)), []
    block = model.transformer.h[0]
    block.register_forward_pre_hook(lambda block, args: seen.extend(args[:2]))
    block.attn.register_forward_hook(lambda attn, args, out: seen.append(out[0]))
    block.mlp.register_forward_hook(lambda mlp, args, out: seen.append(out))
    model(idx, idx)
    assert len(seen) == 4 and torch.equal(seen[0], seen[1])  # the shortcut has the same embedding
    for x in seen:
        assert (x != 0).float().mean().item() == pytest.approx(0.75, abs=0.01)


def test_capped_logits_are_fp32_under_autocast():
    model, idx = modern(), torch.randint(97, (2, 32))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = model(idx, idx)[0]
        uncapped = model.lm_head(model.hidden(idx, torch.arange(32)[None]))
    assert uncapped.dtype == torch.bfloat16
    assert torch.equal(logits, 15 * torch.tanh(uncapped.float() / 15))


def test_sampling_with_the_cache_takes_the_ids_that_full_passes_take():
    model, idx = modern(), torch.randint(97, (2, 7))
    lengths, noise = torch.tensor([4, 7]), torch.rand(2, 40)
    text = model.generate(idx, 40, 1.0, noise=noise, lengths=lengths)  # past block_size, 32
    for row, n in enumerate(lengths.tolist()):
        ids = idx[row, :n].tolist()
        for u in noise[row]:
            with torch.no_grad():
                p = model(torch.tensor([ids[-32:]]))[0][0, -1].softmax(-1)
            ids.append(int(torch.searchsorted(p.cumsum(-1), 1 - u)))
        assert text[row, : n + 40].tolist() == ids


@pytest.mark.parametrize("arch", ["gpt2", "modern"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("B", [1, 2])
def test_sampling_under_autocast_takes_likely_ids_of_full_passes(arch, dtype, B):
    model, idx = modern(arch=arch), torch.randint(97, (B, 7))
    with torch.autocast("cpu", dtype), torch.no_grad():
        text = model.generate(idx, 20, temperature=0)
        logits = model(text, text)[0].float()[:, 6:-1]
    taken = logits.gather(2, text[:, 7:, None])[..., 0]  # rounding may turn one id of a near tie into another
    assert text.shape == (B, 27) and (logits.amax(2) - taken).max() < 0.05 * logits.std()


@given(st.integers(1, 200), st.integers(1, 20), st.sampled_from(["gpt2", "modern"]))
def test_a_width_that_is_proposed_is_taken(n_embd, n_head, arch):
    problem = width_problem(n_embd, n_head, arch)
    if problem is None:
        GPTConfig(n_embd=n_embd, n_head=n_head, arch=arch)
        return
    proposed = re.search(r"set n_embd to (\d+)(?: or (\d+))?,", problem).groups()
    for width in filter(None, proposed):
        assert width_problem(int(width), n_head, arch) is None


def test_a_modern_config_never_makes_gpt2_silently():
    with pytest.raises(ValueError, match="arch='modern' needs ModernGPT: use make_gpt"):
        GPT(GPTConfig(**TINY, arch="modern"))


def test_a_cache_has_no_views_of_its_own_buffers():
    """torch.compile would not record a CUDA graph that writes into memory which two inputs share."""
    buffers = [buffer for pair in modern().empty_cache(3, 32) for buffer in pair]
    assert not any(buffer._is_view() or not buffer.numel() for buffer in buffers)
    assert len({buffer.data_ptr() for buffer in buffers}) == len({id(buffer) for buffer in buffers})


def test_one_sequence_is_sampled_as_it_is_in_a_batch():
    model, idx, noise = modern(), torch.randint(97, (1, 3)), torch.rand(1, 20)
    alone = model.generate(idx, 20, noise=noise)
    assert torch.equal(alone, model.generate(idx.repeat(2, 1), 20, noise=noise.repeat(2, 1))[:1])


def test_torch_compile_takes_it_as_one_graph():
    model, idx = modern().train(), torch.randint(97, (2, 32))
    expected = model(idx, idx)[1].item()
    # raises at the first graph break
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert compiled(idx, idx)[1].item() == pytest.approx(expected, rel=0.02)


def test_the_chunked_loss_of_capped_logits_has_the_same_gradients():
    plain, chunked = modern().train(), modern().train()
    chunked.loss_chunks = 3
    idx, targets = torch.randint(97, (2, 2, 16))
    targets[0, :5] = -1
    losses = [model(idx, targets)[1] for model in (plain, chunked)]
    for loss in losses:
        (3 * loss).backward()
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-6)
    for (name, p), q in zip(plain.named_parameters(), chunked.parameters(), strict=True):
        assert (p.grad - q.grad).abs().max() < 1e-5 * max(1, p.grad.abs().max()), name


def test_bf16_autocast_keeps_the_residual_stream_in_bf16():
    model, seen = modern(), []
    for block in model.transformer.h:
        block.register_forward_hook(
            lambda module, args, out: seen.extend((args[0].dtype, args[1].dtype, out[0].dtype))
        )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(torch.randint(97, (1, 8)))
    assert set(seen) == {torch.bfloat16}


def test_flops_of_the_modern_125m_by_hand():
    with torch.device("meta"):
        model = make_gpt(
            GPTConfig(arch="modern", vocab_size=50304, n_layer=12, n_head=6, n_embd=768, bias=False)
        )
    matrices = 12 * 12 * 768**2  # c_attn 3, c_proj 1, c_fc 4, c_proj 4, of 768 * 768 each, in 12 blocks
    vectors = 12 * 4 + 1 + 12  # mixes, smear and its gate
    head = 50304 * 768
    # the embeddings of the input and of values are looked up, not multiplied
    assert model.get_num_params() == matrices + vectors + head
    assert model.get_num_params(non_embedding=False) == matrices + vectors + 3 * head
    assert model.flops_per_token() == 6 * (matrices + vectors + head) + 12 * 12 * 768 * 1024


# -----------------------------------------------------------------------------
# runs

RECIPE = "--arch=modern --optimizer=muon --schedule=wsd --min_lr=0 --cooldown_frac=0.5".split()


def state_of(folder, name="ckpt.pt"):
    return torch.load(folder / name, weights_only=True)


def test_a_resumed_run_of_the_recipe_is_bit_for_bit_the_uninterrupted_one(run, byte_data, tiny, tmp_path):
    argv = [*tiny, *RECIPE, "--dropout=0.1", "--max_iters=12"]
    run("train.py", *argv, "--out_dir=whole", "--eval_interval=100")
    run("train.py", *argv, "--out_dir=parts", "--checkpoint_interval=5", "--eval_interval=100")
    os.replace(tmp_path / "parts" / "ckpt_prev.pt", tmp_path / "parts" / "ckpt.pt")  # of iteration 10
    assert state_of(tmp_path / "parts")["iter_num"] == 10
    run("train.py", *argv, "--out_dir=parts", "--init_from=resume", "--eval_interval=100")
    whole, parts = state_of(tmp_path / "whole"), state_of(tmp_path / "parts")
    for part in ("optimizer", "muon"):
        for i, moments in whole[part]["state"].items():
            assert all(torch.equal(moments[name], parts[part]["state"][i][name]) for name in moments)
    assert all(torch.equal(p, parts["model"][name]) for name, p in whole["model"].items())
    assert whole["muon"]["state"][0]["momentum_buffer"].abs().max() > 0


def test_the_state_before_a_cooldown_is_of_the_iterations_that_led_to_it(run, byte_data, tiny, tmp_path):
    """After going back, as after kill -9, other iterations may lead there."""
    argv = [*tiny, *RECIPE, "--eval_interval=100"]
    out, path = tmp_path / "out", tmp_path / "out/ckpt.pt"
    run("train.py", *argv, "--max_iters=3", "--cooldown_frac=0.0")
    back = path.read_bytes()
    argv += ["--max_iters=8", "--init_from=resume", "--keep_before_cooldown=True"]
    for learning_rate in (1e-2, 2e-3, 1e-3):
        path.write_bytes(back)
        printed = run("train.py", *argv, f"--learning_rate={learning_rate}").stdout
        assert "before_cooldown.pt is kept" not in printed
        assert state_of(out, "before_cooldown.pt")["config"]["learning_rate"] == learning_rate
    # resumed where it is, it is that of the longer run
    shutil.copy(out / "before_cooldown.pt", path)
    printed = run("train.py", *argv, "--max_iters=20").stdout
    assert "before_cooldown.pt is kept" not in printed
    assert state_of(out, "before_cooldown.pt")["iter_num"] == 10
    # one that is asked for too late
    path.write_bytes(back)
    run("train.py", *argv)
    os.remove(out / "before_cooldown.pt")
    text = "note: no out/before_cooldown.pt: this run is past iteration 5\n"
    assert text in run("train.py", *argv, "--max_iters=10").stdout


def test_a_run_is_extended_from_before_its_cooldown(run, byte_data, tiny, tmp_path):
    argv = [*tiny, *RECIPE, "--keep_before_cooldown=True"]
    out = run("train.py", *argv, "--out_dir=short", "--max_iters=8")
    assert "; 2 iterations of warmup, 2 constant, 4 of cooldown\n" in out.stdout
    kept = state_of(tmp_path / "short", "before_cooldown.pt")
    assert kept["iter_num"] == 4
    run("train.py", *argv, "--out_dir=long", "--max_iters=12")
    # in its own folder the state of a longer run has been through the cooldown
    out = run("train.py", *argv, "--out_dir=short", "--max_iters=20", "--init_from=resume").stdout
    assert "short/before_cooldown.pt is kept: it is from before the first cooldown of this run" in out
    assert state_of(tmp_path / "short", "before_cooldown.pt")["iter_num"] == 4
    (tmp_path / "longer").mkdir()
    shutil.copy(tmp_path / "short" / "before_cooldown.pt", tmp_path / "longer" / "ckpt.pt")
    out = run("train.py", *argv, "--out_dir=longer", "--max_iters=12", "--init_from=resume")
    assert "warning" not in out.stderr
    # the cooldown of the 8 iterations would have gone on to fall here
    expected = "note: the learning rate of iteration 5 is 1.000e-02, the schedule so far has 7.500e-03\n"
    assert expected in out.stdout
    long, longer = state_of(tmp_path / "long"), state_of(tmp_path / "longer")
    assert longer["iter_num"] == 12
    assert all(torch.equal(p, longer["model"][name]) for name, p in long["model"].items())


def test_both_kinds_of_parameters_are_counted(run, byte_data, tiny, tmp_path):
    # blocks of 12 * 32^2, the head's 320 rows of 32; and twice as many rows that are looked up
    out = run("train.py", *tiny, "--arch=modern", "--n_head=1", "--max_iters=1").stdout
    head = 320 * 32
    in_matmuls = 2 * 12 * 32**2 + head
    assert f"model:      {in_matmuls / 1e6:.2f}M parameters in matmuls + {2 * head / 1e6:.2f}M" in out
    weights = torch.load(tmp_path / "out/ckpt.pt", weights_only=True)["model"].values()
    assert sum(p.numel() for p in weights) == pytest.approx(in_matmuls + 2 * head, rel=0.01)


def test_a_model_that_has_not_learned_anything_is_not_sampled(run, byte_data, tiny):
    run("train.py", *tiny, "--max_iters=0")
    out = run("sample.py", "--device=cpu", status=1)
    assert out.stderr == (
        "error: out/ckpt.pt is of iteration 0, before anything was learned; train on from it first\n"
    )


def test_the_recipe_is_sampled_from_its_checkpoint(run, byte_data, tiny):
    run("train.py", *tiny, *RECIPE, "--max_iters=60", "--eval_interval=60")
    out = run(
        "sample.py",
        "--start=pack my",
        "--num_samples=1",
        "--max_new_tokens=9",
        "--temperature=0",
        "--device=cpu",
    )
    assert out.stdout.startswith("pack my box with")


def test_the_parts_that_an_earlier_architecture_lacks_change_nothing(run, byte_data, tiny, tmp_path):
    run("train.py", *tiny, *RECIPE, "--max_iters=2")
    state = state_of(tmp_path / "out")
    later = ("transformer.wve.weight", "smear", "smear_gate")
    for name in later:
        state["model"][name].zero_()
    torch.save(state, tmp_path / "out/ckpt.pt")
    sampling = ("sample.py", "--num_samples=2", "--max_new_tokens=40", "--device=cpu", "--seed=3")
    expected = run(*sampling).stdout
    for name in later:
        del state["model"][name]
    torch.save(state, tmp_path / "out/ckpt.pt")
    assert run(*sampling).stdout == expected


def test_a_checkpoint_of_an_earlier_architecture_is_sampled_but_not_trained(run, byte_data, tiny, tmp_path):
    (tmp_path / "out").mkdir()
    shutil.copy(ROOT / "tests/checkpoints/modern.pt", tmp_path / "out/ckpt.pt")
    state = checkpoint.load(tmp_path / "out/ckpt.pt")
    model = make_gpt(GPTConfig(**checkpoint.model_fields(state, "ckpt.pt", GPTConfig))).eval()
    checkpoint.restore_model(model, state, "ckpt.pt")
    with torch.no_grad():
        logits = model(torch.arange(8)[None] * 7)[0][0, -1]
    # what the model.py that saved it gives
    assert logits[[32, 101, 105]].tolist() == pytest.approx([-0.019635, -0.040602, 0.071344], abs=1e-5)
    assert logits.sum().item() == pytest.approx(-11.21483, abs=1e-3) and logits.argmax() == 103
    assert run("sample.py", "--num_samples=1", "--max_new_tokens=9", "--device=cpu").stdout
    out = run("train.py", *tiny, *RECIPE, "--n_layer=1", "--n_embd=16", "--init_from=resume", status=1)
    assert out.stderr == (
        "error: out/ckpt.pt has an earlier version of arch='modern', which sample.py reads but train.py "
        "cannot resume; finish it with the soloGPT that began it, or start anew in another --out_dir\n"
    )


@pytest.mark.parametrize(
    "first, then, message",
    [
        ([], ["--optimizer=muon"], "was saved with --optimizer=adamw, not muon"),
        (["--optimizer=muon"], [], "was saved with --optimizer=muon, not adamw"),
        ([], ["--arch=modern"], "has another architecture: arch=gpt2, not modern"),
    ],
)
def test_a_run_is_not_resumed_as_another_kind(run, byte_data, tiny, first, then, message):
    run("train.py", *tiny, *first, "--max_iters=2", "--lr_decay_iters=12")
    failed = run("train.py", *tiny, *then, "--init_from=resume", status=1)
    assert message in failed.stderr and failed.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--cooldown_frac=1.5", "--schedule=wsd"], "cooldown_frac"),
        (["--keep_before_cooldown=True"], "keep_before_cooldown=True needs schedule='wsd'"),
        (["--arch=modern", "--n_embd=32", "--n_head=32"], r"n_embd=32 is not divisible by 2 \* n_head=64"),
    ],
)
def test_what_does_not_go_together_is_refused(argv, message):
    with pytest.raises(ConfigError, match=message):
        configure(TrainConfig, argv)


def test_beside_muon_adamw_moves_rows_whose_gradients_are_tiny():
    model = make_gpt(GPTConfig(16, 97, n_layer=1, n_head=2, n_embd=32, bias=False, arch="modern"))
    cfg = TrainConfig(arch="modern", optimizer="muon", weight_decay=0.0, learning_rate=1e-2)
    optimizers = make_optimizers(model, cfg, torch.device("cpu"))
    table = model.transformer.wte.weight
    before = table.detach().clone()
    for p in model.parameters():
        p.grad = torch.full_like(p, 1e-9)
    optimizers["optimizer"].step()
    # Adam's first step: lr * g / (|g| + eps), by GPT-2's eps of 1e-8 an eleventh of lr
    assert torch.allclose(before - table, torch.tensor(1e-2 / 1.1), rtol=1e-3)
