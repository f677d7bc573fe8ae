"""
An export of arch="modern" against the model that it was made of: in this process, through the code in the
folder, and in a process that knows nothing of this project, through transformers' Auto classes, offline.
Run: pytest tests/test_export_modern.py
"""

import ast
import dataclasses
import importlib.util
import inspect
import json
import math
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ENV, ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoTokenizer, DynamicCache

from model import GPT, GPTConfig, make_gpt
from sologpt import huggingface, remote_code
from sologpt.tokenizer import BPETokenizer, ByteTokenizer

BYTES = ByteTokenizer("bytes", 257, 256)
GPT2 = BPETokenizer("gpt2", 50257, 50256)
BPE_CACHED = os.environ.get("TIKTOKEN_CACHE_DIR")


def modern(seed=0, **changes):
    """A ModernGPT with random values everywhere: at first its head and projections are zero."""
    sizes = dict(block_size=32, vocab_size=128, n_ids=97, n_layer=3, n_head=4, n_embd=48, bias=False)
    torch.manual_seed(seed)
    model = make_gpt(GPTConfig(arch="modern", **sizes | changes)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
        model.lm_head.weight[model.config.n_ids :] *= 100  # if padding could be drawn, it would be
    return model


def load(folder, **options):
    """The model in a folder, by the code in it, imported from there and not from transformers' cache."""
    spec = importlib.util.spec_from_file_location("modeling_sologpt", folder / "modeling_sologpt.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model, report = module.SoloGPTForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(report.values()), report
    return model.eval()


def exported(folder, model, eot_token=3, **options):
    model.save_pretrained(folder, eot_token)
    return load(folder, **options)


def left_padded(prompts, padding=5):
    """Returns ids and attention mask, both (B, the longest)."""
    longest = max(map(len, prompts))
    ids = [F.pad(prompt, (longest - len(prompt), 0), value=padding) for prompt in prompts]
    mask = [F.pad(torch.ones_like(prompt), (longest - len(prompt), 0)) for prompt in prompts]
    return torch.stack(ids), torch.stack(mask)


def greedy(model, ids, mask, count, **options):
    settings = dict(max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=5) | options
    return model.generate(ids, attention_mask=mask, **settings)


# -----------------------------------------------------------------------------
# the same numbers


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 99),
    n_layer=st.integers(1, 3),
    n_head=st.integers(1, 3),
    pairs=st.integers(1, 5),
    n_ids=st.integers(6, 70),
    padding=st.integers(0, 30),
    block_size=st.integers(8, 24),
    bias=st.booleans(),
)
def test_logits_and_greedy_text_are_ours_at_any_size(tmp_path, seed, n_head, pairs, n_ids, padding, **sizes):
    sizes |= dict(n_head=n_head, n_embd=2 * pairs * n_head, n_ids=n_ids, vocab_size=n_ids + padding)
    model = modern(seed, **sizes)
    other = exported(tmp_path, model)
    block_size = sizes["block_size"]
    idx = torch.randint(n_ids, (2, block_size))
    with torch.no_grad():
        expected = model(idx, idx)[0][..., :n_ids]
        logits = other(idx).logits
        first = other(idx[:, :5])  # and what follows, token by token
        steps = [first.logits]
        for t in range(5, block_size):
            step = other(idx[:, t : t + 1], past_key_values=first.past_key_values)
            steps.append(step.logits)
    assert logits.shape == expected.shape and logits.dtype == torch.float32
    assert (logits - expected).abs().max() < 1e-4
    assert (torch.cat(steps, dim=1) - expected).abs().max() < 1e-4
    # prompts of many lengths in one batch, up to the end of the context
    prompts = [torch.randint(n_ids, (length,)) for length in (1, 4, block_size - 3)]
    ids, mask = left_padded(prompts)
    for use_cache in (True, False):
        texts = greedy(other, ids, mask, 3, use_cache=use_cache)
        for prompt, text in zip(prompts, texts, strict=True):
            assert torch.equal(text[-len(prompt) - 3 :], model.generate(prompt[None], 3, temperature=0)[0])


def test_logits_of_padded_rows_are_those_of_the_rows_alone(tmp_path):
    model = modern()
    other = exported(tmp_path, model)
    prompts = [torch.randint(97, (length,)) for length in (3, 11, 1, 17)]
    left, mask = left_padded(prompts)
    right = torch.stack([F.pad(prompt, (0, 17 - len(prompt)), value=5) for prompt in prompts])
    with torch.no_grad():
        on_the_left = other(left, mask).logits
        on_the_right = other(right, mask.flip(1)).logits
        assert on_the_left.isfinite().all() and on_the_right.isfinite().all()
        assert (
            other.visible(mask, None, 0, torch.arange(17)).any(-1).all()
        )  # else older versions of torch give NaN
        for row, prompt in enumerate(prompts):
            alone = model(prompt[None], prompt[None])[0][0, :, :97]
            assert (on_the_left[row, -len(prompt) :] - alone).abs().max() < 1e-4
            assert (on_the_right[row, : len(prompt)] - alone).abs().max() < 1e-4


def test_padding_between_tokens_changes_nothing_either(tmp_path):
    """As in the second turn of a batch whose first answers ended at different places."""
    model = modern()
    other = exported(tmp_path, model)
    text = torch.randint(97, (1, 9))
    alone = model(text, text)[0][0, :, :97]
    padding = torch.full((1, 3), 5)
    ids = torch.cat((padding, text[:, :4], padding, text[:, 4:]), dim=1)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 1, 1, 1, 1, 1]])
    with torch.no_grad():
        whole = other(ids, mask).logits
        first = other(ids[:, :9], mask[:, :9].float())  # a cache that ends in padding
        rest = other(ids[:, 9:], mask, past_key_values=first.past_key_values).logits
        kept = other(ids, mask, logits_to_keep=torch.tensor([4, 14])).logits
    found = whole[0, mask[0] == 1]
    assert (found - alone).abs().max() < 1e-4
    assert (torch.cat((first.logits, rest), dim=1) - whole).abs().max() < 1e-4
    assert (kept - whole[:, [4, 14]]).abs().max() < 1e-4


def test_in_bfloat16_it_is_ours_in_bfloat16(tmp_path):
    """With its table of rotations, which is wrong for late positions if its angles are computed in bf16."""
    model = modern(block_size=1024, n_head=2)
    other = exported(tmp_path, model, dtype=torch.bfloat16)
    in_autocast = load(tmp_path)
    idx = torch.randint(97, (1, 1024))
    with torch.no_grad():
        exact = model(idx, idx)[0][..., :97]
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(in_autocast(idx).logits, model(idx, idx)[0][..., :97])
        model.bfloat16()
        assert torch.equal(other(idx).logits, model(idx, idx)[0][..., :97])
    assert other.dtype == torch.bfloat16 and (other(idx).logits - exact).abs().max() < 0.2


def test_the_loss_is_the_cross_entropy_of_the_next_tokens(tmp_path):
    model = modern()
    other = exported(tmp_path, model)
    idx = torch.randint(97, (2, 20))
    labels = idx.clone()
    labels[0, :7] = -100
    with torch.no_grad():
        expected = model(idx, idx)[0][..., :97].log_softmax(-1)
        out = other(idx, labels=labels)
    nats = [-expected[b, t - 1, idx[b, t]] for b in range(2) for t in range(1, 20) if b == 1 or t >= 7]
    assert out.loss.item() == pytest.approx(torch.stack(nats).mean().item(), rel=1e-5)
    loss = other.train()(idx, labels=labels)
    assert loss.past_key_values is None
    loss.loss.backward()
    assert all(p.grad.isfinite().all() for p in other.parameters())


def test_the_context_ends_at_block_size_with_a_clear_error(tmp_path):
    model = modern()
    other = exported(tmp_path, model)
    idx = torch.randint(97, (1, 32))
    assert torch.equal(greedy(other, idx[:, :31], None, 1), model.generate(idx[:, :31], 1, temperature=0))
    message = (
        "33 tokens, with padding, are more than block_size=32, .* cut the prompt or lower max_new_tokens"
    )
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        other(torch.zeros(1, 33, dtype=torch.long))
    # the 33rd token is chosen after 32, the 34th is not
    expected = model.generate(idx[:, :30], 2, temperature=0)
    assert torch.equal(greedy(other, idx[:, :30], torch.ones(1, 30), 3)[:, :32], expected)
    with pytest.raises(ValueError, match=message):
        greedy(other, idx[:, :30], torch.ones(1, 30), 4)


def test_with_more_tokens_it_still_computes_the_same_and_is_saved_whole(tmp_path):
    ours = modern(n_ids=97, vocab_size=97)
    other = exported(tmp_path, ours)
    other.resize_token_embeddings(100)
    idx = torch.randint(97, (2, 8))
    expected = ours(idx, idx)[0]
    other.save_pretrained(tmp_path / "larger")
    shutil.copy(tmp_path / "modeling_sologpt.py", tmp_path / "larger")
    for model in (other.eval(), load(tmp_path / "larger")):
        logits = model(idx).logits
        assert logits.shape == (2, 8, 100)
        torch.testing.assert_close(logits[..., :97], expected, atol=1e-5, rtol=1e-5)
        assert model(torch.full((1, 3), 99)).logits.isfinite().all()
    other.resize_token_embeddings(1000, mean_resizing=False)
    for weight in (other.gpt.transformer.wte, other.gpt.transformer.wve, other.gpt.lm_head):
        assert weight.weight[100:].std().item() == pytest.approx(0.02, rel=0.05)
    torch.testing.assert_close(other(idx).logits[..., :97], expected, atol=1e-5, rtol=1e-5)


def test_what_it_cannot_do_is_refused(tmp_path):
    other = exported(tmp_path, modern())
    idx = torch.randint(97, (2, 4))
    torch.testing.assert_close(other(idx, logits_to_keep=1).logits, other(idx).logits[:, -1:])
    for name in ("output_hidden_states", "output_attentions"):
        with pytest.raises(ValueError, match=f"does not serve {name}"):
            other(idx, **{name: True})
    other.config.output_hidden_states = True
    with pytest.raises(ValueError, match="does not serve output_hidden_states"):
        other(idx)
    other.config.output_hidden_states = False
    embeddings = other.get_input_embeddings()(idx)
    for ids in (idx, None):
        with pytest.raises(ValueError, match="does not serve inputs_embeds, it needs input_ids"):
            other(ids, inputs_embeds=embeddings)
    filled = DynamicCache()
    for layer in range(3):
        filled.update(torch.zeros(2, 4, 5, 12), torch.zeros(2, 4, 5, 12), layer)
    with pytest.raises(ValueError, match="this cache lacks the embeddings"):
        other(idx, past_key_values=filled)
    with pytest.raises(ValueError, match="needs a DynamicCache, not a StaticCache"):
        greedy(other, idx, torch.ones_like(idx), 2, cache_implementation="static")
    past = other(idx).past_key_values
    message = r"attention_mask has the shape \(2, 1\), it must be \(2, 5\)"
    with pytest.raises(ValueError, match=message):
        other(idx[:, :1], torch.ones(2, 1), past_key_values=past)
    assert not other.supports_gradient_checkpointing
    with pytest.raises(ValueError, match="is an export of arch='modern'.*--init_from=resume"):
        GPT.from_pretrained(tmp_path)


def test_what_is_asked_for_in_other_ways_is_done(tmp_path):
    other = exported(tmp_path, modern())
    idx = torch.randint(97, (2, 4))
    expected = other(idx, labels=idx)
    loss, logits, cache = other(idx, labels=idx, return_dict=False)
    assert torch.equal(loss, expected.loss) and torch.equal(logits, expected.logits)
    assert cache.get_seq_length() == 4
    other.config.use_cache = False
    assert other(idx).past_key_values is None


@pytest.mark.parametrize("use_cache", [False, True])
def test_no_token_sees_a_later_one_at_any_positions(tmp_path, use_cache):
    other = exported(tmp_path, modern())
    idx = torch.randint(97, (1, 12))
    changed = torch.cat((idx[:, :-1], (idx[:, -1:] + 1) % 97), dim=1)
    positions = torch.arange(5, 17)[None]  # none of them is 0
    first, second = (other(ids, position_ids=positions, use_cache=use_cache).logits for ids in (idx, changed))
    assert torch.equal(first[:, :-1], second[:, :-1]) and not torch.equal(first[:, -1], second[:, -1])
    # rotary positions are relative, and the padding before a text is not part of it
    padded = F.pad(idx, (3, 0), value=5)
    mask = F.pad(torch.ones_like(idx), (3, 0))
    counted = other(padded, mask, position_ids=torch.arange(15)[None], use_cache=use_cache).logits
    for logits in (first, counted[:, 3:]):
        torch.testing.assert_close(logits, other(idx).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("options", [{}, dict(use_cache=False)])
def test_packed_texts_do_not_see_each_other(tmp_path, options):
    """What transformers' DataCollatorWithFlattening makes of a batch."""
    other = exported(tmp_path, modern())
    texts = [torch.randint(97, (1, length)) for length in (9, 1, 14)]
    positions = torch.cat([torch.arange(text.size(1)) for text in texts])[None]
    packed = other(torch.cat(texts, dim=1), position_ids=positions, **options).logits
    alone = torch.cat([other(text).logits for text in texts], dim=1)
    torch.testing.assert_close(packed, alone, atol=1e-4, rtol=1e-4)


def test_what_replaces_torchs_linear_layers_finds_all_of_them(tmp_path):
    """As bitsandbytes and torch's own quantization do, by their type."""
    other = exported(tmp_path, modern())
    linear = [module for module in other.modules() if type(module) is torch.nn.Linear]
    assert len(linear) == 3 * 4 + 1
    # a head of integers says nothing about the dtype of embeddings
    other.gpt.lm_head.weight = torch.nn.Parameter(torch.zeros(97, 48, dtype=torch.int8), requires_grad=False)
    assert other.gpt.matmul_dtype() == torch.float32


def test_every_part_is_called_as_a_module_and_the_device_is_that_of_the_ids(tmp_path, monkeypatch):
    """accelerate loads what was offloaded when a module is called, before its forward; until then it is on
    the device meta, and the whole model seems to be."""
    other = exported(tmp_path, modern())
    monkeypatch.setattr(type(other), "device", torch.device("meta"))
    called = set()
    for module in other.modules():
        module.register_forward_pre_hook(lambda module, inputs: called.add(module))
    other(torch.randint(97, (2, 4)))
    with_weights = {module for module in other.modules() if list(module.named_parameters(recurse=False))}
    assert other.gpt in with_weights and with_weights <= called


def test_a_folder_that_lacks_a_weight_is_refused(tmp_path):
    exported(tmp_path, modern())
    weights = load_file(tmp_path / "model.safetensors")
    short = "the folder has no {} of the size that this model needs"
    for key in ("gpt.rotary", "gpt.transformer.wve.weight", "gpt.transformer.h.1.x_mix"):
        some = {name: w for name, w in weights.items() if name != key}
        save_file(some, tmp_path / "model.safetensors", metadata=dict(format="pt"))
        with pytest.raises(ValueError, match=short.format(re.escape(key))):
            load(tmp_path)
    save_file(weights, tmp_path / "model.safetensors", metadata=dict(format="pt"))
    with pytest.raises(ValueError, match=short.format("gpt.rotary")):
        load(tmp_path, block_size=64, ignore_mismatched_sizes=True)
    load(tmp_path)


# -----------------------------------------------------------------------------
# the same code


def named_definitions(text):
    """Returns {name: syntax tree} of the functions, classes and methods in the text of a module."""
    found = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = ast.dump(node)
        elif isinstance(node, ast.ClassDef):
            found[node.name] = ast.dump(ast.ClassDef(node.name, node.bases, [], [], node.decorator_list))
            for part in node.body:
                if isinstance(part, ast.FunctionDef):
                    found[f"{node.name}.{part.name}"] = ast.dump(part)
                else:  # its docstring, or a constant
                    found[f"{node.name}: {ast.unparse(part)}"] = ast.dump(part)
    return found


def test_the_code_is_that_of_model_py_and_what_is_left_out_is_named():
    source = (ROOT / "model.py").read_text(encoding="utf-8")
    ours = named_definitions(source)
    theirs = named_definitions(remote_code.modeling_file(source))
    left_out = set(remote_code.LEFT_OUT)
    assert left_out <= ours.keys()
    for name in ours:
        owner = re.match(r"\w+", name)[0]
        if name in left_out or owner in left_out:
            assert name not in theirs
        else:
            assert ours[name] == theirs[name], name
    for part in remote_code.NEEDED:
        [definition] = ast.parse(inspect.getsource(part)).body
        for name, text in named_definitions(ast.unparse(definition)).items():
            assert theirs[name] == text
    # what computes a logit is all there
    names = "rotate ModernBlock.forward ModernAttention.forward ModernGPT.hidden ModernGPT.embed GPT.logits"
    assert set(names.split()) <= theirs.keys()


def test_the_file_is_whole(tmp_path):
    """A name that model.py imports, or that is left out although something needs it, is undefined there."""
    modern().save_pretrained(tmp_path)
    path = tmp_path / "modeling_sologpt.py"
    for command in (["check"], ["format", "--check"]):
        command = ["ruff", *command, "--no-cache", "--config", str(ROOT / "pyproject.toml"), str(path)]
        process = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True)
        assert process.returncode == 0, process.stdout
    lines = path.read_text().splitlines()
    modules = [line.split()[1] for line in lines if line.startswith(("import ", "from "))]
    imported = {module.partition(".")[0] for module in modules}
    assert imported == {"math", "torch", "transformers"}


def test_every_field_of_the_model_is_in_the_config(tmp_path):
    model = modern(dropout=0.25)
    other = exported(tmp_path, model)
    for field in dataclasses.fields(GPTConfig):
        expected = getattr(model.config, field.name)
        if field.name == "vocab_size":
            expected = 97
        assert getattr(other.config, field.name) == expected
    assert other.config.max_position_embeddings == 32 and other.config.num_hidden_layers == 3


# -----------------------------------------------------------------------------
# elsewhere

LOAD = """
import importlib.util, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
assert importlib.util.find_spec("sologpt") is None and importlib.util.find_spec("model") is None
folder = sys.argv[1]
"""


def elsewhere(tmp_path, *argv):
    """Runs Python with these arguments in a folder, and an environment, from which this project cannot be
    imported. Returns what it wrote to stdout."""
    folder = tmp_path / "elsewhere"
    folder.mkdir(exist_ok=True)
    env = {name: value for name, value in ENV.items() if not name.startswith(("PYTHON", "HF_"))}
    env |= dict(HF_HOME=str(tmp_path / "cache"), HF_HUB_OFFLINE="1")
    command = [sys.executable, "-W", "error::UserWarning", *map(str, argv)]
    process = subprocess.run(command, cwd=folder, env=env, capture_output=True, encoding="utf-8")
    assert process.returncode == 0, process.stderr
    return process.stdout


COMPARE = (
    LOAD
    + """
reference = torch.load(sys.argv[2], weights_only=True)
model, report = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
assert not any(report.values()), report
with torch.no_grad():
    logits = model(reference["ids"]).logits
options = dict(attention_mask=reference["mask"], max_new_tokens=12, do_sample=False, eos_token_id=None)
texts = [model.generate(reference["padded"], use_cache=c, pad_token_id=5, **options) for c in (True, False)]
model.save_pretrained("again")  # as after fine-tuning
again = AutoModelForCausalLM.from_pretrained("again", trust_remote_code=True)
assert torch.equal(again(reference["ids"]).logits, logits)
torch.save(dict(logits=logits, texts=texts), sys.argv[3])
"""
)


def test_a_process_without_our_code_computes_the_same(tmp_path):
    model = modern(bias=True)
    model.save_pretrained(tmp_path / "hf", 3)
    prompts = [torch.randint(97, (length,)) for length in (3, 20, 1)]
    padded, mask = left_padded(prompts)
    ids = torch.randint(97, (2, 32))
    torch.save(dict(ids=ids, padded=padded, mask=mask), tmp_path / "reference.pt")
    elsewhere(tmp_path, "-c", COMPARE, tmp_path / "hf", tmp_path / "reference.pt", tmp_path / "result.pt")
    result = torch.load(tmp_path / "result.pt", weights_only=True)
    with torch.no_grad():
        assert (result["logits"] - model(ids, ids)[0][..., :97]).abs().max() < 1e-4
    for texts in result["texts"]:
        for prompt, text in zip(prompts, texts, strict=True):
            assert torch.equal(text[-len(prompt) - 12 :], model.generate(prompt[None], 12, temperature=0)[0])


RECIPE = ["--arch=modern", "--optimizer=muon", "--schedule=wsd", "--bias=False", "--block_size=96"]
WRITE = (
    LOAD
    + """
generator = pipeline("text-generation", folder, trust_remote_code=True)
print(generator("pack my", max_new_tokens=9, do_sample=False)[0]["generated_text"])
"""
)


def test_a_checkpoint_is_exported_and_its_card_says_how_it_is_loaded(run, byte_data, tiny, tmp_path):
    run("train.py", *tiny, *RECIPE, "--max_iters=60", "--lr_decay_iters=60", "--eval_interval=60")
    out = run("sample.py", "--init_from=best", "--device=cpu", "--export=hf")
    assert out.stderr.splitlines()[1:] == [
        "model and tokenizer are in hf",
        "transformers loads it with trust_remote_code=True",
    ]
    argv = ["--temperature=0", "--num_samples=1", "--max_new_tokens=9", "--start=pack my", "--device=cpu"]
    text = run("sample.py", "--init_from=best", *argv).stdout.splitlines()[0]
    assert text == "pack my box with"
    card = (tmp_path / "hf/README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0].replace('"."', "folder")
    written = elsewhere(tmp_path, "-c", WRITE + code, tmp_path / "hf")
    assert written.startswith(f"{text}\nOnce upon a time")
    loss = torch.load(tmp_path / "out/best.pt", weights_only=True)["best_val_loss"]
    assert f"| lowest validation loss of the run | {loss:.4f} nats per token |" in card
    # two embeddings and the head, 257 * 32 each, two blocks of 12 * 32 * 32 and four shares, the smear's gate
    assert f"| parameters | {3 * 257 * 32 + 2 * (12 * 32 * 32 + 4) + 13:,} |" in card
    assert "modern" in card and "GPT-2" not in card
    # again, over what is there
    again = run("sample.py", "--init_from=best", "--device=cpu", "--export=hf", "--dtype=bfloat16").stderr
    assert "note: export writes fp32 and draws nothing; without effect: dtype\n" in again
    assert "are in hf" in again
    failed = run("sample.py", "--init_from=hf", "--device=cpu", status=1).stderr
    assert "hf is an export of arch='modern', which only transformers reads" in failed


@pytest.mark.parametrize(
    "tokenizer",
    [BYTES, pytest.param(GPT2, marks=pytest.mark.skipif(not BPE_CACHED, reason="set TIKTOKEN_CACHE_DIR"))],
)
def test_the_tokenizer_is_the_same_and_needs_no_code(tmp_path, tokenizer):
    modern(vocab_size=50304, n_ids=tokenizer.vocab_size).save_pretrained(tmp_path, tokenizer.eot_token)
    huggingface.write_tokenizer(tmp_path, tokenizer, 32)
    loaded = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=False)
    text = "naïve 漢字 🙂🙂  \r\n\t x<|endoftext|>it's"
    assert loaded(text)["input_ids"] == tokenizer.encode(text)
    assert loaded.decode(tokenizer.encode(text)) == text
    assert len(loaded) == load(tmp_path).config.vocab_size == tokenizer.vocab_size


# -----------------------------------------------------------------------------
# the harness that published figures come from

TASK = """
task: mine
dataset_path: json
dataset_kwargs: {data_files: {test: mine.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}]
"""


@pytest.mark.skipif(
    not importlib.util.find_spec("lm_eval") or not importlib.util.find_spec("accelerate"),
    reason="pip install 'lm_eval[hf]'",
)
def test_the_harness_sees_our_bits_per_byte(tmp_path):
    model = modern(n_ids=257, vocab_size=320)
    model.save_pretrained(tmp_path / "hf", BYTES.eot_token)
    huggingface.write_tokenizer(tmp_path / "hf", BYTES, 32)
    texts = ["pack my box", "with naïve jugs", "漢字 now."]  # each shorter than the context
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "mine.yaml").write_text(TASK)
    (folder / "mine.jsonl").write_text("".join(json.dumps(dict(text=text)) + "\n" for text in texts))
    arguments = f"pretrained={tmp_path / 'hf'},trust_remote_code=True"
    argv = ["--model", "hf", "--model_args", arguments, "--include_path", ".", "--tasks", "mine"]
    table = elsewhere(tmp_path, "-m", "lm_eval", *argv, "--device", "cpu", "--batch_size", "3")
    nats = 0
    for text in texts:
        ids = torch.tensor([[BYTES.eot_token, *text.encode()]])
        with torch.no_grad():
            logits = model(ids, ids)[0][0, :-1, :257]
        nats += F.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
    expected = nats / math.log(2) / len("".join(texts).encode())
    assert f"bits_per_byte|↓  |{expected:.4f}|" in table
