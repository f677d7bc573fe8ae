"""
In and out of Hugging Face's format, against transformers and its tokenizers, without any network.
Run: pytest tests/test_huggingface.py
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import tiktoken
import torch
from conftest import ENV, ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, GPT2Model

from configurator import from_command_line
from model import GPT, GPTConfig
from sologpt import hardware, huggingface, report, resume
from sologpt.errors import UserError
from sologpt.tokenizer import BPETokenizer, ByteTokenizer, CharacterTokenizer, read_tokenizer
from train import TrainConfig, set_up

BYTES = ByteTokenizer("bytes", 257, 256)
GPT2 = BPETokenizer("gpt2", 50257, 50256)
BPE_CACHED = os.environ.get("TIKTOKEN_CACHE_DIR")
NANOGPT = os.environ.get("NANOGPT")
SIZES = dict(vocab_size=97, n_positions=32, n_embd=48, n_layer=3, n_head=4, bos_token_id=0, eos_token_id=0)


def shake(model):
    """Random values everywhere, so that biases and LayerNorm weights, 0 and 1 at first, take part in a
    comparison."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model.eval()


def ours(**changes):
    return shake(
        GPT(GPTConfig(**dict(block_size=32, vocab_size=97, n_layer=3, n_head=4, n_embd=48) | changes))
    )


def theirs(**changes):
    return shake(GPT2LMHeadModel(GPT2Config(**SIZES | changes)))


def compare(mine, other, n_ids):
    """Logits at every position, and a greedy text of each, which runs to the end of the context."""
    idx = torch.randint(n_ids, (3, 20))
    with torch.no_grad():
        logits, expected = mine(idx, idx)[0][..., :n_ids], other(idx).logits
        greedy = other.generate(
            idx, attention_mask=torch.ones_like(idx), max_new_tokens=12, eos_token_id=None
        )
    assert expected.shape == (3, 20, n_ids) and (logits - expected).abs().max() < 1e-4
    assert torch.equal(mine.generate(idx, 12, temperature=0), greedy)


# -----------------------------------------------------------------------------
# out


@pytest.mark.parametrize("bias, n_ids", [(True, 97), (True, 90), (False, 97), (False, 90)])
def test_transformers_computes_what_was_exported(tmp_path, bias, n_ids):
    model = ours(bias=bias, n_ids=n_ids, gelu="tanh" if bias else "none")
    model.save_pretrained(tmp_path / "hf", eot_token=3)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(report.values()), report
    compare(model, loaded.eval(), n_ids)
    assert loaded.generation_config.eos_token_id == loaded.config.bos_token_id == 3
    assert loaded.config.n_ctx == loaded.config.n_positions == 32  # llama.cpp's converter reads the one
    # and back, where biases that were not there are zeros
    again = GPT.from_pretrained(tmp_path / "hf").eval()
    idx = torch.randint(n_ids, (2, 32))
    assert torch.equal(again(idx, idx)[0], model(idx, idx)[0][..., :n_ids])
    assert again.config.gelu == model.config.gelu and again.lm_head.weight is again.transformer.wte.weight


def without_positions(model):
    del model.transformer["wpe"]


def with_norm(model):
    model.transformer.h[1].ln_3 = torch.nn.LayerNorm(48, bias=False)


def with_own_head(model):
    model.lm_head.weight = torch.nn.Parameter(2 * model.lm_head.weight)


@pytest.mark.parametrize(
    "change, reason",
    [
        (without_positions, "only one of the two has transformer.wpe.weight"),
        (with_norm, "only one of the two has transformer.h.1.ln_3.bias"),
        (with_own_head, "whose head is the embedding's matrix"),
    ],
)
def test_a_changed_gpt2_is_not_exported_as_transformers_one(tmp_path, change, reason):
    model = ours(bias=False)
    change(model)
    with pytest.raises(UserError, match=f"this model is not transformers' GPT-2.*{re.escape(reason)}"):
        model.save_pretrained(tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=60))
def check_texts(encode, decode, loaded, text):
    ids = encode(text)
    assert loaded(text)["input_ids"] == ids
    assert loaded.decode(ids) == decode(ids)


@pytest.mark.parametrize(
    "tokenizer",
    [BYTES, pytest.param(GPT2, marks=pytest.mark.skipif(not BPE_CACHED, reason="set TIKTOKEN_CACHE_DIR"))],
)
def test_the_tokenizer_of_the_folder_is_the_same(tmp_path, tokenizer):
    ours(vocab_size=tokenizer.vocab_size).save_pretrained(tmp_path, tokenizer.eot_token)
    huggingface.write_tokenizer(tmp_path, tokenizer, 32)
    loaded, encode, decode = AutoTokenizer.from_pretrained(tmp_path), tokenizer.encode, tokenizer.decode
    assert loaded.eos_token_id == tokenizer.eot_token and len(loaded) == tokenizer.vocab_size
    assert loaded.model_max_length == 32
    for text in (
        Path(__file__).read_text(encoding="utf-8"),
        "",
        "naïve 漢字 🙂🙂  \r\n\t x",
        " a<|endoftext|>b <|endoftext|>",
        "it's they'LL 123,456 ...!?  ",
    ):
        assert loaded(text)["input_ids"] == encode(text)
        assert loaded.decode(encode(text)) == text
    check_texts(encode, decode, loaded)
    broken = encode("🙂")[:-1] + encode("a")  # a character that was cut short, as a model may write it
    assert loaded.decode(broken) == decode(broken)
    assert read_tokenizer(tmp_path) == tokenizer


@pytest.mark.skipif(not BPE_CACHED, reason="set TIKTOKEN_CACHE_DIR to a folder with tiktoken's gpt2 files")
def test_the_merges_are_all_that_bpe_needs():
    """By replaying them: every token of GPT-2 comes out of its bytes, merged in the order of the list."""
    bpe = tiktoken.get_encoding("gpt2")
    tokens = [bpe.decode_single_token_bytes(i) for i in range(50256)]
    merges = huggingface.bpe_merges({token: i for i, token in enumerate(tokens)})
    # GPT-2's ids are in that order
    assert len(merges) == 50000 and [a + b for a, b in merges] == tokens[256:]


def test_a_tokenizer_of_characters_is_the_same(tmp_path):
    letters = "\n\t abcABC1.é漢🙂'<|endoftext|>"
    itos = dict(enumerate(sorted(set(letters))))
    tokenizer = CharacterTokenizer("characters", len(itos), None, itos)
    ours(vocab_size=len(itos)).save_pretrained(tmp_path)
    huggingface.write_tokenizer(tmp_path, tokenizer, 32)
    loaded, encode, decode = AutoTokenizer.from_pretrained(tmp_path), tokenizer.encode, tokenizer.decode
    assert loaded.eos_token_id is None and len(loaded) == len(itos)
    for text in ("", letters, "  ab\n\n A 漢🙂🙂 ", "<|endoftext|>"):
        assert loaded(text)["input_ids"] == encode(text) and loaded.decode(encode(text)) == text == decode(
            encode(text)
        )
    with pytest.raises(Exception, match="Missing .UNK."):
        loaded("z")
    partial = CharacterTokenizer("characters", len(itos) + 2, None, itos)
    with pytest.raises(ValueError, match=f"names only {len(itos)} of {len(itos) + 2} ids"):
        huggingface.tokenizer_json(partial)


def test_an_earlier_export_stays_if_a_new_one_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "README.md").write_text("trained with soloGPT")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ValueError, match="safetensors, which Hugging Face's format needs, is not installed"):
        with huggingface.replacing_export(tmp_path):
            pass
    assert (tmp_path / "README.md").exists()


def test_an_earlier_export_stays_if_the_disk_is_full(trained, tmp_path):
    trained("sample.py", "--export=hf", "--device=cpu")
    before = {path.name: path.read_bytes() for path in (tmp_path / "hf").iterdir()}
    command = f"ulimit -f 8; exec {sys.executable} {ROOT / 'sample.py'} --export=hf --device=cpu"  # 8 KB
    for _ in range(2):
        outcome = subprocess.run(command, shell=True, cwd=tmp_path, env=ENV, capture_output=True, text=True)
        assert outcome.returncode == 1 and outcome.stderr.splitlines()[-1].startswith("error: ")
        assert "Traceback" not in outcome.stderr
        assert {path.name: path.read_bytes() for path in (tmp_path / "hf").iterdir()} == before
    (tmp_path / "hf/unfinished").mkdir()  # of an export that was killed
    trained("sample.py", "--export=hf", "--device=cpu", "--init_from=best")
    assert {path.name for path in (tmp_path / "hf").iterdir()} == set(before)


@pytest.mark.parametrize(
    "tokenizer, message",
    [
        (
            BPETokenizer("r50k_base", 50257, 50256),
            "'r50k_base' cannot be exported, only gpt2, bytes and characters",
        ),
        (CharacterTokenizer("characters", 2, None, {0: "a", 1: "bc"}), "'bc', which is not one character"),
    ],
)
def test_a_tokenizer_that_cannot_be_exported_is_named(tokenizer, message):
    with pytest.raises(ValueError, match=message):
        huggingface.tokenizer_json(tokenizer)


# -----------------------------------------------------------------------------
# in


@pytest.mark.parametrize("changes", [dict(), dict(activation_function="gelu"), dict(n_inner=192)])
def test_a_folder_of_transformers_is_computed_alike(tmp_path, changes):
    other = theirs(**changes)
    other.save_pretrained(tmp_path)
    model = GPT.from_pretrained(tmp_path).eval()
    assert model.config.gelu == ("none" if "activation_function" in changes else "tanh")
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())
    compare(model, other, 97)


def test_old_cut_and_half_precision_folders_are_read(tmp_path):
    from safetensors.torch import load_file, save_file

    other = theirs()
    other.half().save_pretrained(tmp_path / "cut", max_shard_size="40KB")
    assert len(list((tmp_path / "cut").glob("model-*.safetensors"))) > 1
    model = GPT.from_pretrained(tmp_path / "cut").eval()
    compare(model, other.float(), 97)
    # as OpenAI's files on the hub are: no prefix, and with the causal mask of every layer
    GPT2Model(other.config).save_pretrained(tmp_path / "old")
    weights = {name.removeprefix("transformer."): w.clone() for name, w in other.state_dict().items()}
    weights |= {f"h.{i}.attn.bias": torch.ones(1, 1, 32, 32).tril() for i in range(3)}
    save_file(weights, tmp_path / "old/model.safetensors")
    assert "h.0.attn.c_attn.weight" in load_file(tmp_path / "old/model.safetensors")
    compare(GPT.from_pretrained(tmp_path / "old").eval(), other, 97)


def test_dropout_and_a_shorter_context_can_be_chosen(tmp_path):
    theirs().save_pretrained(tmp_path)
    model, full = (
        GPT.from_pretrained(tmp_path, dict(dropout=0.25, block_size=8)),
        GPT.from_pretrained(tmp_path),
    )
    assert (model.config.dropout, full.config.dropout) == (0.25, 0.0)
    assert model.transformer.h[0].attn.dropout == 0.25
    idx = torch.randint(97, (2, 8))
    assert torch.equal(model.eval()(idx)[0], full.eval()(idx)[0])
    with pytest.raises(ValueError, match="9 tokens are more than block_size=8"):
        model(torch.zeros(1, 9, dtype=torch.long))
    with pytest.raises(ValueError, match="block_size=33 is more than .* was trained with: 32"):
        GPT.from_pretrained(tmp_path, dict(block_size=33))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(activation_function="relu"), "activation_function='relu'"),
        (dict(model_type="llama"), "model_type='llama'"),
        (dict(n_inner=99), "n_inner=99"),
        (dict(n_embd="48", n_positions=None), "n_positions=None, n_embd='48'"),
        (dict(n_embd=None, activation_function=[]), r"activation_function=\[\], n_embd=None"),
        (dict(layer_norm_epsilon=1e-6), "layer_norm_epsilon=1e-06"),
        (dict(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx=True"),
        (dict(tie_word_embeddings=False), "tie_word_embeddings=False"),
        (dict(n_layer=2), "has weights of 3 layers, and its config.json says 2"),
        (dict(n_layer=10**7), "has weights of 3 layers, and its config.json says 10000000"),
        (dict(vocab_size=98), "are not those of a GPT-2 language model: size mismatch for transformer.wte"),
        (dict(n_head=5), "n_embd=48 is not divisible by n_head=5"),
    ],
)
def test_a_model_that_cannot_be_represented_is_refused_by_name(tmp_path, change, message):
    theirs().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=message):
        GPT.from_pretrained(tmp_path)


def test_a_head_of_its_own_is_refused_and_a_copy_of_the_embedding_is_none(tmp_path):
    from safetensors.torch import save_file

    other = theirs()
    other.save_pretrained(tmp_path)
    weights = {name: w.clone() for name, w in other.state_dict().items()}  # with lm_head.weight
    save_file(weights, tmp_path / "model.safetensors")
    compare(GPT.from_pretrained(tmp_path).eval(), other, 97)
    weights["lm_head.weight"][5, 5] += 1
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="has an untied output head; here it is tied"):
        GPT.from_pretrained(tmp_path)


def test_what_is_no_folder_of_a_model_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="it has no config.json"):
        GPT.from_pretrained(tmp_path)
    with pytest.raises(
        FileNotFoundError,
        match="there is no folder 'nowhere', and the only known names are gpt2, gpt2-medium",
    ):
        GPT.from_pretrained("nowhere")
    theirs().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x10" + 40 * b"\0")
    with pytest.raises(ValueError, match=r"cannot read .*model.safetensors: "):
        GPT.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no model.safetensors"):
        GPT.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is damaged"):
        GPT.from_pretrained(tmp_path)


# -----------------------------------------------------------------------------
# the scripts


def test_a_checkpoint_is_exported_and_loads_without_our_code(run, byte_data, tiny, tmp_path):
    run("train.py", *tiny, "--max_iters=150", "--lr_decay_iters=150", "--eval_interval=150")
    run("sample.py", "--init_from=best", "--export=hf")
    loaded, tokenizer = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "hf"),
        AutoTokenizer.from_pretrained(tmp_path / "hf"),
    )
    prompt = tokenizer("pack my", return_tensors="pt")
    text = tokenizer.decode(loaded.generate(**prompt, max_new_tokens=9)[0])
    assert text == "pack my box with"
    # in a batch the shorter ones are padded on the left
    tokenizer.pad_token = tokenizer.eos_token
    batch = tokenizer(["my", "pack my"], padding=True, return_tensors="pt")
    for continued in tokenizer.decode(loaded.generate(**batch, max_new_tokens=9)):
        assert continued.endswith("my box with")
    # transformers 4 would add token_type_ids, which are embeddings to a GPT-2
    written = json.loads((tmp_path / "hf/tokenizer_config.json").read_text())
    assert written["model_input_names"] == ["input_ids", "attention_mask"]
    argv = ["--init_from=hf", "--temperature=0", "--num_samples=1", "--max_new_tokens=9", "--start=pack my"]
    assert run("sample.py", *argv).stdout == text + "\n---------------\n"
    card = (tmp_path / "hf/README.md").read_text()
    loss = torch.load(tmp_path / "out/best.pt", weights_only=True)["best_val_loss"]
    assert f"| lowest validation loss of the run | {loss:.4f} nats per token |" in card
    # 150 * 4 * 2 * 16
    assert "| training tokens | 19,200 |" in card and card.startswith("---\nlibrary_name: transformers\n")
    out = run("train.py", *tiny, "--init_from=hf", "--max_iters=0", "--eval_only=True", "--bias=True")
    assert float(out.stdout.rsplit("val loss ")[-1].split()[0]) == pytest.approx(loss, abs=2e-4)
    # the command that continues has what a config file sets otherwise
    (tmp_path / "mine.py").write_text("bias = False\nn_layer = 3\nmax_iters = 2\n")
    argv = [*tiny, "mine.py", "--out_dir=tuned", "--init_from=hf"]
    out = run("train.py", *argv)
    assert "warning: the architecture is that of hf: n_layer=2, not 3, bias=True, not False\n" in out.stderr
    cfg = from_command_line(TrainConfig, "", [str(tmp_path / "mine.py")])
    cfg = resume.with_architecture(cfg, dict(n_layer=2, bias=True), "hf", resuming=False)
    command = shlex.split(report.resume_command(argv, cfg))
    assert command[-4:] == ["--out_dir=tuned", "--bias=True", "--n_layer=2", "--init_from=resume"]
    assert "resuming from tuned/ckpt.pt" in run("train.py", *command[2:], "--max_iters=3").stdout


def test_finetuning_drops_out_as_asked(trained, tiny, tmp_path, monkeypatch):
    trained("sample.py", "--export=hf", "--device=cpu")
    monkeypatch.chdir(tmp_path)
    cfg = from_command_line(TrainConfig, "", [*tiny, "--init_from=hf", "--dropout=0.3"])
    model = set_up(cfg, hardware.find_machine(cfg)).model
    block = model.transformer.h[0]
    assert model.config.dropout == block.attn.dropout == block.mlp.dropout == 0.3


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """cached(name, **sizes) puts a tiny model where the hub's cache keeps OpenAI's of that name, offline."""

    def cached(name, owner="openai-community--", **sizes):
        repo = tmp_path / f"hub/models--{owner}{name}"
        (repo / "refs").mkdir(parents=True)
        (repo / "refs/main").write_text("0" * 40)
        theirs(**sizes).save_pretrained(repo / "snapshots" / ("0" * 40))
        # as HF_HUB_CACHE and HF_HUB_OFFLINE in the environment of a new process
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    return cached


def gpt2_data(tmp_path, dataset):
    folder = tmp_path / "data" / dataset
    folder.mkdir(parents=True)
    for split in ("train", "val"):
        (torch.arange(2100) % 200 * 251).short().numpy().tofile(folder / f"{split}.bin")


TINY_GPT2 = dict(vocab_size=50257, n_positions=1024, n_embd=8, n_layer=1, n_head=1)


def test_training_goes_on_from_openais_weights_and_keeps_their_gelu(run, cached, tmp_path):
    cached("gpt2", **TINY_GPT2)
    gpt2_data(tmp_path, "toy")
    argv = [
        "--init_from=gpt2",
        "--dataset=toy",
        "--compile=False",
        "--batch_size=1",
        "--gradient_accumulation_steps=1",
    ]
    argv += [
        "--block_size=16",
        "--eval_iters=1",
        "--max_iters=2",
        "--learning_rate=0",
        "--decay_lr=False",
        "--dropout=0.1",
    ]
    out = run("train.py", *argv)
    model = GPT.from_pretrained(tmp_path / "hub/models--openai-community--gpt2/snapshots" / ("0" * 40)).eval()
    state = torch.load(tmp_path / "out/ckpt.pt", weights_only=True)
    assert (
        state["gelu"] == "tanh"
        and state["model_args"]["dropout"] == 0.1
        and state["model_args"]["block_size"] == 16
    )
    assert state["model_args"].keys() == {
        "n_layer",
        "n_head",
        "n_embd",
        "block_size",
        "bias",
        "vocab_size",
        "dropout",
    }
    assert torch.equal(state["model"]["transformer.wpe.weight"], model.transformer.wpe.weight[:16])
    resumed = run("train.py", *argv[1:], "--init_from=resume", "--max_iters=3")
    first, last = (text.stdout.rsplit("val loss ")[-1].split()[0] for text in (out, resumed))
    assert first == last  # as the learning rate is 0
    assert torch.load(tmp_path / "out/ckpt.pt", weights_only=True)["gelu"] == "tanh"
    sampled = ["--start=FILE:ids", "--temperature=0", "--num_samples=1", "--max_new_tokens=4"]
    (tmp_path / "ids").write_text("a")
    if BPE_CACHED:
        assert run("sample.py", *sampled).stdout == run("sample.py", *sampled, "--init_from=gpt2").stdout
    out = run("train.py", *argv, "--n_layer=2", "--eval_only=True")  # nanoGPT says nothing
    assert "warning: the architecture is that of gpt2: n_layer=1, not 2\n" in out.stderr
    out = run("train.py", *argv[1:], "--init_from=gpt2-xl", status=1)
    assert (
        "cannot download gpt2-xl from the Hugging Face hub" in out.stderr
        and len(out.stderr.splitlines()) == 1
    )


@pytest.mark.skipif(not NANOGPT, reason="set NANOGPT to a checkout of nanoGPT")
def test_nanogpts_configs_that_start_from_openais_weights_run(run, cached, tmp_path):
    gpt2_data(tmp_path, "shakespeare")
    shutil.copytree(tmp_path / "data/shakespeare", tmp_path / "data/openwebtext")
    cached("gpt2-xl", owner="", **TINY_GPT2)  # as nanoGPT has downloaded it
    fewer = ["--gradient_accumulation_steps=1", "--max_iters=1"]  # its 32 * 20 take too long here
    for name, arguments in (("finetune_shakespeare", fewer), ("eval_gpt2_xl", [])):
        out = run("train.py", f"{NANOGPT}/config/{name}.py", "--compile=False", "--device=cpu", *arguments)
        assert "step 0: train loss " in out.stdout
    assert os.path.exists(tmp_path / "out-shakespeare/ckpt.pt")


def test_a_gpt2_that_does_not_name_its_gelu_has_transformers_default(tmp_path):
    other = theirs()
    other.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["activation_function"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    compare(GPT.from_pretrained(tmp_path).eval(), type(other).from_pretrained(tmp_path).eval(), 97)
    GPT(GPTConfig(8, 97, 1, 1, 8, dropout=0.25)).save_pretrained(tmp_path / "ours")
    config = json.loads((tmp_path / "ours/config.json").read_text())
    assert config["resid_pdrop"] == config["embd_pdrop"] == config["attn_pdrop"] == 0.25
