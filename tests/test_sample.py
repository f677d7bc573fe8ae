"""
Sampling as a user runs it, from a checkpoint that train.py wrote in the same test.
Run: pytest tests/test_sample.py
"""

import json
import math
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tiktoken
import torch
from conftest import ENV, ROOT
from test_model import without_a_cache

import sample
from model import GPT, GPTConfig
from sologpt import checkpoint, shards
from sologpt.tokenizer import ByteTokenizer

GREEDY = ["--temperature=0", "--num_samples=1", "--device=cpu"]


@pytest.fixture
def untrained(run, tmp_path):
    """run, where out/ckpt.pt holds random weights: as good as any for what does not depend on the text."""
    args = dict(n_layer=2, n_head=2, n_embd=32, block_size=64, bias=False, vocab_size=320, dropout=0.0)
    torch.manual_seed(0)
    model, tokenizer = GPT(GPTConfig(**args)), dict(encoding="bytes", vocab_size=257, eot_token=256)
    for p in model.parameters():
        p.data *= 2  # less uniform, but without ties that rounding decides
    (tmp_path / "out").mkdir()
    state = dict(model=model.state_dict(), model_args=args, tokenizer=tokenizer, iter_num=0)
    torch.save(state, tmp_path / "out/ckpt.pt")
    return run


def test_samples_continue_the_prompt_and_end_in_a_line_of_dashes(trained):
    out = trained("sample.py", *GREEDY, "--start=pack my ", "--max_new_tokens=30", "--num_samples=2")
    assert out.stdout == 2 * "pack my box with jugs now. pack my box\n---------------\n"
    assert "out/ckpt.pt: iteration 150" in out.stderr


def test_without_ckpt_pt_the_state_before_is_taken(trained, tmp_path):
    os.replace(tmp_path / "out/ckpt.pt", tmp_path / "out/ckpt_prev.pt")
    out = trained("sample.py", *GREEDY, "--out_dir=out", "--start=pack my ", "--max_new_tokens=3")
    assert "warning: out/ckpt.pt is missing; taking out/ckpt_prev.pt instead\n" in out.stderr
    assert "out/ckpt_prev.pt: iteration 150" in out.stderr and out.stdout.startswith("pack my box")


def test_the_seed_decides_the_samples(trained):
    argv = ["--device=cpu", "--max_new_tokens=40", "--num_samples=2", "--temperature=2.0"]
    first = trained("sample.py", *argv).stdout
    assert trained("sample.py", *argv).stdout == first
    assert trained("sample.py", *argv, "--seed=2").stdout != first
    one, two = first.split("\n---------------\n")[:2]
    assert one != two


def test_the_prompt_may_come_from_a_file(trained, tmp_path):
    (tmp_path / "prompt.txt").write_text("box wi")
    assert trained("sample.py", *GREEDY, "--start=FILE:prompt.txt", "--max_new_tokens=3").stdout.startswith(
        "box with "
    )


def test_a_sample_ends_at_end_of_text_if_asked(run, byte_data, tiny):
    ids = ByteTokenizer("bytes", 257, 256).encode("<|endoftext|>ab" * 500)
    for split in ("train", "val"):
        for path in byte_data.glob(f"*{split}*"):
            shards.write_shard(path, np.array(ids, dtype=np.uint16))
    run("train.py", *tiny, "--max_iters=40", "--lr_decay_iters=40", "--eval_interval=40")
    more = run("sample.py", *GREEDY, "--start=a", "--max_new_tokens=8").stdout
    assert more.startswith("ab<|endoftext|>ab<|endoftext|>ab<")
    assert run("sample.py", *GREEDY, "--start=a", "--stop_at_eot=True").stdout.startswith(
        "ab<|endoftext|>\n---"
    )
    assert run("sample.py", *GREEDY, "--start=<|endoftext|>", "--max_new_tokens=2").stdout.startswith(
        "<|endoftext|>ab\n"
    )
    # several end at different places: each is cut at its own
    argv = ["--device=cpu", "--num_samples=40", "--start=a", "--stop_at_eot=True", "--max_new_tokens=30"]
    samples = run("sample.py", *argv, "--temperature=1.5").stdout.split("\n---------------\n")[:-1]
    ended = [text for text in samples if "<|endoftext|>" in text]
    assert len(samples) == 40 and len(ended) > 5 and len({len(text) for text in ended}) > 1
    assert all(text.index("<|endoftext|>") == len(text) - len("<|endoftext|>") for text in ended)


def test_the_data_folder_is_not_needed(trained, tmp_path):
    (tmp_path / "data/toy/meta.json").write_text("gone")
    assert "pack my box" in trained("sample.py", *GREEDY, "--start=pack", "--max_new_tokens=7").stdout


def test_a_sample_depends_on_the_seed_and_its_number_only(untrained, tmp_path):
    """Alone, where it is streamed, and in batches of two sizes: the same text, cut where max_new_tokens
    says."""

    def lines(*argv):
        out = untrained("sample.py", "--device=cpu", "--start=漢字", "--out=out.jsonl", *argv)
        lines = [
            json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        # an unpaired byte is U+FFFD on stdout as in the file, and a text that was cut may end in the middle
        # of one
        assert out.stdout == "".join(f"{line['prompt']}{line['text']}\n---------------\n" for line in lines)
        assert f"{sum(line['tokens'] for line in lines):,} tokens in " in out.stderr.splitlines()[-1]
        return lines

    one, five = (
        lines("--num_samples=1", "--max_new_tokens=80"),
        lines("--num_samples=5", "--max_new_tokens=80"),
    )
    assert one[0] == five[0] | dict(sample=0) and len({line["text"] for line in five}) == 5
    assert (
        [line["tokens"] for line in five] == [80] * 5
        and five[4]["sample"] == 4
        and five[0]["prompt"] == "漢字"
    )
    short = lines("--num_samples=3", "--max_new_tokens=20", "--top_k=257")
    assert all(len(line["text"]) == 20 or "\ufffd" in line["text"] for line in short)


def test_top_k_and_top_p_that_leave_one_token_are_greedy(untrained):
    argv = ["--device=cpu", "--max_new_tokens=40", "--num_samples=2"]
    greedy = untrained("sample.py", *argv, "--temperature=0").stdout
    assert untrained("sample.py", *argv, "--top_k=1", "--temperature=3.0").stdout == greedy
    assert untrained("sample.py", *argv, "--top_p=1e-6", "--top_k=0").stdout == greedy
    out = untrained("sample.py", *argv, "--top_k=500", "--temperature=0")
    assert out.stdout == greedy and "top_k=500 takes all of the vocabulary, which has 257 ids" in out.stderr


def test_a_prompt_may_come_from_stdin(trained, tmp_path):
    argv = ["sample.py", *GREEDY, "--start=-", "--max_new_tokens=3"]
    assert trained(*argv, input=b"box wi").stdout.startswith("box with ")
    out = trained(*argv, input=b"\xff", status=1)
    assert out.stderr.splitlines()[-1].startswith("error: the prompt in stdin is not UTF-8")


def test_a_file_and_stdin_give_the_same_prompt_whatever_its_line_ends(trained, tmp_path):
    raw = b"\xef\xbb\xbfbox\r\nwi"
    (tmp_path / "prompt.txt").write_bytes(raw)
    argv = ["sample.py", *GREEDY, "--max_new_tokens=3"]
    expected = trained(*argv, "--start=box\nwi").stdout
    assert trained(*argv, "--start=FILE:prompt.txt").stdout == expected
    assert trained(*argv, "--start=-", input=raw).stdout == expected


def test_a_conversation_keeps_what_was_said_and_an_empty_line_goes_on(trained, tmp_path):
    argv = ["sample.py", *GREEDY, "--interactive=True", "--max_new_tokens=5", "--out=o"]
    assert trained(*argv, input=b"pack my\n\n\n").stdout == " box \nwith \njugs \n"
    lines = [json.loads(line) for line in (tmp_path / "o").read_text().splitlines()]
    assert [(line["prompt"], line["text"]) for line in lines] == [
        ("pack my", " box "),
        ("", "with "),
        ("", "jugs "),
    ]


def test_lines_of_a_file_from_windows_are_prompts_without_its_line_ends(trained, spawn, tmp_path):
    argv = ["sample.py", *GREEDY, "--interactive=True", "--max_new_tokens=5", "--out=o"]
    assert spawn(*argv, input=b"pack my\r\n").stdout == " box \n"
    assert json.loads((tmp_path / "o").read_text())["prompt"] == "pack my"


class Pieces(list):
    """A stdout that keeps what is written to it, piece by piece."""

    write, flush = list.append, lambda self: None


@pytest.mark.parametrize(
    "raw, pieces",
    [
        ("aé漢🙂".encode(), ["a", "é", "漢", "🙂"]),
        ("漢".encode()[:2] + b"a", ["\ufffda"]),
        ("漢".encode()[:2], ["\ufffd"]),
        (b"\xff\x80a", ["\ufffd", "\ufffd", "a"]),
        (b"\xf0\x9f<", ["\ufffd<|endoftext|>"]),
    ],
)
def test_a_character_is_written_when_it_is_whole(monkeypatch, raw, pieces):
    """A byte a token; the byte < stands for the end-of-text token. Whatever comes, the text is that of
    decode."""
    tokenizer = ByteTokenizer("bytes", 257, ord("<"))
    written = Pieces()
    monkeypatch.setattr(sys, "stdout", written)
    texts = (torch.tensor([list(raw[: i + 1])]) for i in range(len(raw)))
    ids = list(sample.write_stream(texts, tokenizer))
    monkeypatch.undo()
    assert [piece for piece in written if piece not in ("", "\n")] == pieces
    assert ids == list(raw) and "".join(pieces) == tokenizer.decode(ids)


def test_a_folder_without_a_known_tokenizer_is_refused(run, tmp_path):
    sizes = dict(block_size=8, n_layer=1, n_head=1, n_embd=4)
    for rows in (21128, 60000):
        GPT(GPTConfig(**sizes, vocab_size=rows)).save_pretrained(tmp_path / "other")
        out = run("sample.py", "--init_from=other", "--device=cpu", status=1)
        assert "other does not say which tokenizer it has; name it, as in --encoding=gpt2" in out.stderr


def test_a_prompt_longer_than_the_context_is_cut_with_a_note(untrained):
    text = "".join(chr(97 + i * i % 26) for i in range(100))
    argv = ["sample.py", *GREEDY, "--max_new_tokens=8"]
    long = untrained(*argv, f"--start={text}")
    short = untrained(*argv, f"--start={text[-64:]}")
    assert "note: of the prompt's 100 tokens the last 64 count" in long.stderr and "note" not in short.stderr
    assert long.stdout == text[:-64] + short.stdout


def test_noise_is_a_function_of_seed_and_sample():
    first = sample.draw_noise(2**32 - 1, 3, 1000)
    assert np.array_equal(sample.draw_noise(2**32 - 1, 3, 10), first[:10]) and first.dtype == np.float32
    assert first.min() >= 0 and first.max() < 1 and abs(first.mean() - 0.5) < 0.05
    others = [sample.draw_noise(seed, i, 1000) for seed in (0, 1, 2**31) for i in (0, 1, 2)] + [first]
    assert np.abs(np.corrcoef(others) - np.eye(10)).max() < 0.15


def test_the_best_weights_can_be_sampled(trained, tmp_path):
    assert (
        "out/best.pt: iteration 150"
        in trained("sample.py", *GREEDY, "--init_from=best", "--max_new_tokens=1").stderr
    )


def test_a_compiled_model_gives_the_same_text(trained):
    argv = [*GREEDY, "--start=pack my ", "--max_new_tokens=12"]
    assert trained("sample.py", *argv, "--compile=True").stdout == trained("sample.py", *argv).stdout


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--start="], "the prompt is empty"),
        (["--init_from=out"], "out is no model in Hugging Face's format: it has no config.json"),
        (["--out=nowhere/x"], "No such file or directory: 'nowhere/x'"),
        (["--start=FILE:nowhere.txt"], "No such file or directory: 'nowhere.txt'"),
        (["--out_dir=elsewhere"], "there is no checkpoint elsewhere/ckpt.pt; train first"),
    ],
)
def test_a_mistake_is_one_line(untrained, argv, message):
    out = untrained("sample.py", "--device=cpu", *argv, status=1)
    assert message in out.stderr.splitlines()[-1] and not out.stdout


def test_out_replaces_samples_and_nothing_else(trained, tmp_path):
    argv = ["sample.py", *GREEDY, "--max_new_tokens=4"]
    checkpoint = (tmp_path / "out/ckpt.pt").read_bytes()
    error = trained(*argv, "--out=out/ckpt.pt", status=1).stderr
    assert "error: --out=out/ckpt.pt is a file already, and not of samples; name another one\n" in error
    assert (tmp_path / "out/ckpt.pt").read_bytes() == checkpoint
    (tmp_path / "empty").touch()
    for name in ("new", "empty", "new"):
        trained(*argv, f"--out={name}", "--start=a")
        [line] = (tmp_path / name).read_text().splitlines()
        assert json.loads(line)["prompt"] == "a"


def test_earlier_samples_stay_until_there_is_a_new_one(trained, tmp_path):
    argv = ["sample.py", *GREEDY, "--start=a", "--max_new_tokens=4", "--out=o"]
    trained(*argv)
    samples = (tmp_path / "o").read_text()
    state = torch.load(tmp_path / "out/ckpt.pt", weights_only=True)
    state["model"]["transformer.wte.weight"].fill_(math.nan)
    torch.save(state, tmp_path / "out/ckpt.pt")
    assert trained(*argv, status=1).stderr.count("error: ") == 1
    assert samples and (tmp_path / "o").read_text() == samples


def test_all_samples_are_recorded_even_if_nobody_reads_them(trained, tmp_path):
    argv = ["--device=cpu", "--num_samples=3", "--max_new_tokens=4", f"--out_dir={tmp_path / 'out'}"]
    reading, writing = os.pipe()
    os.close(reading)  # as `head` does when it has had enough
    command = [sys.executable, "sample.py", *argv, f"--out={tmp_path / 'o'}"]
    outcome = subprocess.run(command, cwd=ROOT, env=ENV, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert outcome.returncode == 1 and "Traceback" not in outcome.stderr
    assert len((tmp_path / "o").read_text().splitlines()) == 3


def test_a_character_that_the_model_never_saw_is_named(trained, tmp_path):
    state = torch.load(tmp_path / "out/ckpt.pt", weights_only=True)
    state["tokenizer"] = dict(encoding="characters", vocab_size=2, eot_token=None, itos={0: "a", 1: "b"})
    torch.save(state, tmp_path / "out/ckpt.pt")
    out = trained("sample.py", "--device=cpu", "--start=abc", status=1)
    assert "the model's vocabulary of 2 characters lacks 'c'" in out.stderr
    out = trained("sample.py", "--device=cpu", status=1)
    assert "lacks '\\n'; give a --start of characters that it has\n" in out.stderr
    out = trained("sample.py", "--device=cpu", "--start=ab", "--stop_at_eot=True", status=1)
    assert "has no end-of-text token" in out.stderr
    text = trained(
        "sample.py", "--device=cpu", "--start=ab", "--max_new_tokens=50", "--temperature=9.0"
    ).stdout
    assert set(text) == set("ab-\n")  # ids above the vocabulary, though rows exist for them, never come


def test_an_out_dir_of_nanogpts_kind_falls_back_to_gpt2(trained, tmp_path, monkeypatch):
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
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})  # what this process has loaded so far
    offline = dict(
        TIKTOKEN_CACHE_DIR=str(tmp_path / "cache"),
        https_proxy="http://127.0.0.1:9",
        HTTPS_PROXY="http://127.0.0.1:9",
    )
    out = trained("sample.py", "--device=cpu", status=1, **offline)
    assert (
        "tiktoken's 'gpt2', the two files vocab.bpe and encoder.json" in out.stderr
        and "TIKTOKEN_CACHE_DIR" in out.stderr
    )
    assert "names no tokenizer; taking gpt2, as there is no data/gone" in out.stderr


def test_values_that_do_not_go_together_are_refused_at_once(run):
    argv = ["--init_from=gpt3", "--top_p=0", "--interactive=True", "--start=-", "--export=x"]
    out = run("sample.py", *argv, "--num_samples=3", status=2)
    for message in (
        "init_from must be 'resume', 'best', gpt2, gpt2-medium, gpt2-large, gpt2-xl or a folder, not 'gpt3'",
        "--top_p: top_p must be above 0, not 0.0",
        "interactive=True reads the prompts from stdin",
        "interactive=True draws one sample at a time: leave num_samples out",
        "export writes a checkpoint of train.py",
    ):
        assert message in out.stderr


def test_without_out_dir_it_takes_the_newest_run(trained, tmp_path):
    shutil.copytree(tmp_path / "out", tmp_path / "out-new")
    shutil.copytree(tmp_path / "out-new", tmp_path / "out/sub")
    for age, folder in enumerate(("out-new", "out/sub", "out")):
        for path in (tmp_path / folder).glob("*.pt"):
            os.utime(path, (10**9 - age, 10**9 - age))
    short = ["--num_samples=1", "--max_new_tokens=1"]
    assert trained("sample.py", *short).stderr.startswith("out-new/ckpt.pt: iteration 150")
    # an older run whose best.pt is younger than that of the newest run, which was resumed
    os.utime(tmp_path / "out-new/best.pt", (10**9 - 9, 10**9 - 9))
    assert trained("sample.py", *short, "--init_from=best").stderr.startswith(
        "out-new/best.pt: iteration 150"
    )
    (tmp_path / "out-new/best.pt").unlink()
    error = trained("sample.py", *short, "--init_from=best", status=1).stderr
    assert error.startswith("error: there is no out-new/best.pt: ")
    # a run that has saved nothing but its best weights so far
    (tmp_path / "out-new/ckpt.pt").rename(tmp_path / "out-new/best.pt")
    (tmp_path / "out-new/ckpt_prev.pt").unlink(missing_ok=True)
    error = trained("sample.py", *short, status=1).stderr
    assert error == "error: there is no out-new/ckpt.pt yet; --init_from=best takes out-new/best.pt\n"
    (tmp_path / "out-new/best.pt").unlink()
    assert trained("sample.py", *short).stderr.startswith("out/sub/ckpt.pt: iteration 150")
    (tmp_path / "out/sub").rename(tmp_path / "out/earlier-1")  # moved aside by the run in out
    assert trained("sample.py", *short).stderr.startswith("out/ckpt.pt: iteration 150")
    (tmp_path / "out/earlier-1").rename(tmp_path / "out-earlier-1")
    assert trained("sample.py", *short).stderr.startswith("out-earlier-1/ckpt.pt: iteration 150")


def test_without_any_run_it_says_so(run, tmp_path):
    error = run("sample.py", status=1).stderr
    assert error == "error: no ckpt.pt in out*/ or out*/*/: train a model, or name its --out_dir=\n"


def test_a_model_that_was_trained_with_dropout_is_sampled_without(trained, tmp_path):
    argv = ["sample.py", *GREEDY, "--start=pack my ", "--max_new_tokens=30"]
    expected = trained(*argv).stdout
    state = torch.load(tmp_path / "out/ckpt.pt", weights_only=True)
    state["model_args"]["dropout"] = 0.9
    torch.save(state, tmp_path / "out/ckpt.pt")
    assert trained(*argv).stdout == expected


@pytest.mark.parametrize("temperature, top_k, top_p", [(0.5, 0, 1.0), (2.0, 7, 1.0), (1.5, 0, 0.8)])
def test_flags_of_sampling_do_what_they_say(untrained, tmp_path, temperature, top_k, top_p):
    state = checkpoint.load(tmp_path / "out/ckpt.pt")
    model = GPT(GPTConfig(**state["model_args"], n_ids=257)).eval()
    model.load_state_dict(state["model"])
    flags = [f"--temperature={temperature}", f"--top_k={top_k}", f"--top_p={top_p}", "--seed=3", "--out=o"]
    untrained("sample.py", "--device=cpu", "--start=a", "--num_samples=2", "--max_new_tokens=12", *flags)
    for number, line in enumerate((tmp_path / "o").read_text(encoding="utf-8").splitlines()):
        noise = torch.from_numpy(sample.draw_noise(3, number, 12))
        ids = without_a_cache(model, [97], 12, noise, temperature, top_k, top_p)
        assert json.loads(line)["text"] == ByteTokenizer("bytes", 257, 256).decode(ids[1:])


def test_weights_are_sampled_in_the_dtype_that_is_asked_for(untrained, monkeypatch):
    next_logits, seen = GPT.next_logits, []

    def watched(model, *given):
        seen.append(model.lm_head.weight.dtype)
        return next_logits(model, *given)

    monkeypatch.setattr(GPT, "next_logits", watched)
    untrained("sample.py", "--device=cpu", "--num_samples=2", "--max_new_tokens=3", "--dtype=bfloat16")
    assert set(seen) == {torch.bfloat16}


def test_every_turn_has_numbers_of_its_own(trained, monkeypatch):
    draw_noise, turns = sample.draw_noise, []

    def watched(seed, number, count):
        turns.append(number)
        return draw_noise(seed, number, count)

    monkeypatch.setattr(sample, "draw_noise", watched)
    trained("sample.py", "--device=cpu", "--interactive=True", "--max_new_tokens=2", input=b"a\n\n\n")
    assert turns == [0, 1, 2]
