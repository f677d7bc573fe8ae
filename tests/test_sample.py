"""
Sampling as a user runs it, from a checkpoint that train.py wrote in the same test.
Run: pytest tests/test_sample.py
"""

import numpy as np
import pytest
import torch

import shards

GREEDY = ["--temperature=0", "--num_samples=1", "--device=cpu"]


@pytest.fixture
def trained(run, byte_data, tiny):
    run("train.py", *tiny, "--max_iters=150", "--lr_decay_iters=150", "--eval_interval=150")
    return run


def test_samples_continue_the_prompt_and_end_in_a_line_of_dashes(trained):
    out = trained("sample.py", *GREEDY, "--start=pack my ", "--max_new_tokens=30", "--num_samples=2")
    assert out.stdout == 2 * "pack my box with jugs now. pack my box\n---------------\n"
    assert "out/ckpt.pt: iteration 150" in out.stderr


def test_the_seed_decides_the_samples(trained):
    argv = ["--device=cpu", "--max_new_tokens=40", "--num_samples=2", "--temperature=2.0"]
    first = trained("sample.py", *argv).stdout
    assert trained("sample.py", *argv).stdout == first
    assert trained("sample.py", *argv, "--seed=2").stdout != first
    one, two = first.split("\n---------------\n")[:2]
    assert one != two


def test_the_prompt_may_come_from_a_file(trained, tmp_path):
    (tmp_path / "prompt.txt").write_text("box wi")
    assert trained("sample.py", *GREEDY, "--start=FILE:prompt.txt", "--max_new_tokens=3").stdout.startswith("box with ")


def test_a_sample_ends_at_end_of_text_if_asked(run, byte_data, tiny):
    ids = shards.text_codec(dict(encoding="bytes", vocab_size=257, eot_token=256))[0]("<|endoftext|>ab" * 500)
    for split in ("train", "val"):
        for path in byte_data.glob(f"*{split}*"):
            shards.write_shard(path, np.array(ids, dtype=np.uint16))
    run("train.py", *tiny, "--max_iters=40", "--lr_decay_iters=40", "--eval_interval=40")
    more = run("sample.py", *GREEDY, "--start=a", "--max_new_tokens=8").stdout
    assert more.startswith("ab<|endoftext|>ab<|endoftext|>ab<")
    assert run("sample.py", *GREEDY, "--start=a", "--stop_at_eot=True").stdout.startswith("ab<|endoftext|>\n---")
    assert run("sample.py", *GREEDY, "--start=<|endoftext|>", "--max_new_tokens=2").stdout.startswith(
        "<|endoftext|>ab\n"
    )


def test_the_data_folder_is_not_needed(trained, byte_data):
    (byte_data / "meta.json").write_text("gone")
    assert "pack my box" in trained("sample.py", *GREEDY, "--start=pack", "--max_new_tokens=7").stdout


def test_the_best_weights_can_be_sampled(trained, tmp_path):
    assert (
        "out/best.pt: iteration 150" in trained("sample.py", *GREEDY, "--init_from=best", "--max_new_tokens=1").stderr
    )


def test_a_compiled_model_gives_the_same_text(trained):
    argv = [*GREEDY, "--start=pack my ", "--max_new_tokens=12"]
    assert trained("sample.py", *argv, "--compile=True").stdout == trained("sample.py", *argv).stdout


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--start="], "the prompt is empty"),
        (["--start=FILE:nowhere.txt"], "No such file or directory: 'nowhere.txt'"),
        (["--out_dir=elsewhere"], "there is no checkpoint elsewhere/ckpt.pt; train first"),
    ],
)
def test_a_mistake_is_one_line(trained, argv, message):
    out = trained("sample.py", "--device=cpu", *argv, status=1)
    assert message in out.stderr.splitlines()[-1] and not out.stdout


def test_a_character_that_the_model_never_saw_is_named(trained, tmp_path):
    state = torch.load(tmp_path / "out/ckpt.pt", weights_only=True)
    state["tokenizer"] = dict(encoding="characters", vocab_size=2, eot_token=None, itos={0: "a", 1: "b"})
    torch.save(state, tmp_path / "out/ckpt.pt")
    out = trained("sample.py", "--device=cpu", "--start=abc", status=1)
    assert "the model's vocabulary of 2 characters lacks 'c'" in out.stderr
    out = trained("sample.py", "--device=cpu", "--start=ab", "--stop_at_eot=True", status=1)
    assert "has no end-of-text token" in out.stderr
    text = trained("sample.py", "--device=cpu", "--start=ab", "--max_new_tokens=50", "--temperature=9.0").stdout
    assert set(text) == set("ab-\n")  # ids above the vocabulary, though rows exist for them, never come


def test_an_out_dir_of_nanogpts_kind_falls_back_to_gpt2(trained, tmp_path):
    state = torch.load(tmp_path / "out/ckpt.pt", weights_only=True)
    del state["tokenizer"]
    state["config"]["dataset"] = "gone"
    torch.save(state, tmp_path / "out/ckpt.pt")
    out = trained("sample.py", "--device=cpu", status=1)
    assert "does not say what its 320 token ids mean; put its meta.pkl into data/gone" in out.stderr
    state["model_args"]["vocab_size"] = 50304
    for name in ("lm_head.weight", "transformer.wte.weight"):
        state["model"][name] = torch.zeros(50304, 32)
    torch.save(state, tmp_path / "out/ckpt.pt")
    (tmp_path / "cache").mkdir()
    offline = dict(
        TIKTOKEN_CACHE_DIR=str(tmp_path / "cache"), https_proxy="http://127.0.0.1:9", HTTPS_PROXY="http://127.0.0.1:9"
    )
    out = trained("sample.py", "--device=cpu", status=1, **offline)
    assert (
        "tiktoken's 'gpt2', the two files vocab.bpe and encoder.json" in out.stderr
        and "TIKTOKEN_CACHE_DIR" in out.stderr
    )
    assert "names no tokenizer; taking gpt2, as data/gone suggests" in out.stderr
