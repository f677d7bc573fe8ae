"""What hostile users and machines do: nothing may be silently wrong, nothing lost, and what is refused is
one line. References: an undisturbed run, files and counts by hand. Run: pytest tests/test_hostile.py"""

import gzip
import json
import math
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
import weakref
import zipfile

import numpy as np
import pytest
import torch
from conftest import ENV, ROOT

from configurator import configure
from model import GPT, GPTConfig, make_gpt
from sologpt import checkpoint, files, fit, huggingface, shards
from sologpt.errors import UserError
from sologpt.files import sole_use
from sologpt.source import find_files
from sologpt.stop import Stopped, StopRequest
from sologpt.tokenizer import read_tokenizer
from train import TrainConfig


def read_metrics(folder, kind):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def one_line(outcome):
    """The error of a script that was refused; asserts that it is one line."""
    [line] = outcome.stderr.splitlines()
    assert line.startswith("error: ")
    return line


# -----------------------------------------------------------------------------
# two at once


def test_an_out_dir_belongs_to_one_run_until_that_ends_or_dies(run, byte_data, tiny, tmp_path):
    argv = [*tiny, "--max_iters=100000", "--checkpoint_interval=1"]
    command = [sys.executable, str(ROOT / "train.py"), *argv]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True, env=ENV) as first:
        next(line for line in first.stdout if line.startswith("saving checkpoint"))
        refused = one_line(run("train.py", *argv, status=1))
        assert (
            f"out is in use by process {first.pid} on " in refused and "choose another --out_dir" in refused
        )
        assert "step" in run("train.py", *argv, "--init_from=resume", "--eval_only=True").stdout  # reads only
        first.kill()
    state, _ = checkpoint.RunFiles(tmp_path / "out").load()
    at = state["iter_num"]
    out = run("train.py", *argv, "--init_from=auto", f"--max_iters={at + 1}")
    assert f"at iteration {at}," in out.stdout
    assert not (tmp_path / "out/.lock").exists() and not list((tmp_path / "out").glob("*.tmp"))


def a_thousand_lines(tmp_path):
    """Writes a.txt. Returns what to run to prepare it into out."""
    (tmp_path / "a.txt").write_text("".join(f"line {i}\n" for i in range(1000)))
    flags = "--encoding=bytes --input=a.txt --txt_documents=line --out_dir=out"
    return ["prepare_fineweb.py", *flags.split()]


def test_a_folder_that_is_being_prepared_is_not_prepared_by_another(run, tmp_path):
    argv = a_thousand_lines(tmp_path)
    with sole_use(tmp_path / "out"):
        assert f"out is in use by process {os.getpid()}" in one_line(run(*argv, status=1))
    assert "next: " in run(*argv).stdout
    with sole_use(tmp_path / "out"):  # what is done may be looked at by anybody
        assert "is prepared already" in run(*argv).stdout


def test_a_file_that_its_owner_removes_just_before_it_is_locked_keeps_nobody_out(tmp_path, monkeypatch):
    path, lock = tmp_path / ".lock", files.lock
    path.touch()

    def when_the_owner_has_left(f):
        monkeypatch.setattr(files, "lock", lock)
        path.unlink()
        return lock(f)

    monkeypatch.setattr(files, "lock", when_the_owner_has_left)
    with files.open_lock(str(path), str(tmp_path)) as f:
        assert path.exists() and os.path.samestat(os.fstat(f.fileno()), path.stat())


def test_two_processes_write_under_different_names(tmp_path):
    from sologpt.files import temporary_name

    script = "from sologpt.files import temporary_name; print(temporary_name('x'))"
    command = [sys.executable, "-c", script]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    other = process.stdout.strip()
    assert other != temporary_name("x") and other.startswith("x.") and other.endswith(".tmp")


def test_a_new_run_in_a_used_out_dir_never_mixes_with_the_old_one(run, trained, tiny, tmp_path):
    old = torch.load(tmp_path / "out/best.pt", weights_only=True)
    worse = [*tiny, "--n_layer=1", "--max_iters=6"]
    out = run("train.py", *worse)
    go_on = "to go on with it: --out_dir=out/earlier-1 --init_from=resume"
    assert f"moved an earlier run to out/earlier-1; {go_on}" in out.stdout
    assert torch.load(tmp_path / "out/earlier-1/best.pt", weights_only=True)["iter_num"] == old["iter_num"]
    (tmp_path / "new").mkdir()
    (tmp_path / "new/metrics.jsonl").touch()  # of a run that was killed before its first checkpoint
    out = run("train.py", *worse, "--out_dir=new", "--max_iters=0").stdout
    assert "moved an earlier run to new/earlier-1\n" in out
    best = checkpoint.load(tmp_path / "out/best.pt")
    assert best["model_args"]["n_layer"] == 1 and best["best_val_loss"] > old["best_val_loss"]
    assert [line["iter"] for line in read_metrics(tmp_path / "out", "iter")] == list(range(6))
    assert (
        "iteration 6, lowest val loss so far"
        in run("sample.py", "--init_from=best", "--device=cpu", "--num_samples=1").stderr
    )
    run("train.py", *worse, "--init_from=resume", "--max_iters=7")
    assert not (tmp_path / "out/earlier-2").exists()


@pytest.mark.parametrize("folder", ["", "data/toy/meta.json"])
def test_an_out_dir_that_is_no_folder_is_named(run, byte_data, tiny, folder):
    refused = run("train.py", *tiny, f"--out_dir={folder}", status=1).stderr
    assert refused == f"error: {folder!r} is no folder to write into; name another one\n"


def test_an_export_into_a_file_is_refused(trained):
    refused = trained("sample.py", "--export=data/toy/meta.json", status=1).stderr
    assert refused.endswith("error: 'data/toy/meta.json' is no folder to write into; name another one\n")


def test_a_tilde_that_no_shell_has_replaced_makes_no_folder_of_that_name(run, trained, tiny, tmp_path):
    home = os.path.expanduser("~/mine")
    for argv in (
        ["train.py", *tiny, "--out_dir=~/mine"],
        ["sample.py", "--export=~/mine"],
        ["prepare_fineweb.py", "--input=data/toy/meta.json", "--encoding=bytes", "--out_dir=~/mine"],
    ):
        refused = run(*argv, status=1).stderr
        assert f"error: ~/mine: the shell has left the ~ as it is; write {home}\n" in refused
    assert not (tmp_path / "~").exists()


# -----------------------------------------------------------------------------
# data that change


def test_the_best_loss_on_other_data_does_not_count(run, trained, tiny, byte_copy, tmp_path):
    old = (tmp_path / "out/best.pt").read_bytes()
    argv = [*tiny, f"--dataset={byte_copy}", "--init_from=resume", "--max_iters=162", "--lr_decay_iters=162"]
    out = run("train.py", *argv, "--allow_data_change=True")
    assert "the best val loss, and best.pt, start anew" in out.stdout
    best = checkpoint.load(tmp_path / "out/best.pt")
    evals = [line["val_loss"] for line in read_metrics(tmp_path / "out", "eval") if line["iter"] >= 150]
    assert (tmp_path / "out/best.pt").read_bytes() != old and best["best_val_loss"] == min(evals)


def test_a_run_that_has_no_best_loss_on_its_data_yet_names_none(trained, tmp_path):
    state = torch.load(tmp_path / "out/ckpt.pt", weights_only=True)
    torch.save(state | dict(best_val_loss=math.inf), tmp_path / "out/ckpt.pt")
    assert trained("sample.py", "--export=hf").stderr.startswith("out/ckpt.pt: iteration 150\n")
    card = (tmp_path / "hf/README.md").read_text()
    assert "training iterations | 150" in card and "lowest" not in card


@pytest.fixture
def byte_copy(tmp_path):
    """A folder of other data: bytes in the opposite order."""
    folder = tmp_path / "data/other"
    folder.mkdir(parents=True)
    ids = np.frombuffer(b".won sguj htiw xob ym kcap " * 400, dtype=np.uint8).astype(np.uint16)
    for split in ("train", "val"):
        shards.write_shard(folder / f"x_{split}_000001.bin", ids)
    (folder / "meta.json").write_text('{"encoding": "bytes", "vocab_size": 257, "eot_token": 256}')
    return "other"


def prepare_toy(run, tmp_path, status=0):
    (tmp_path / "a.txt").write_text("".join(f"pack my box with {i} jugs now.\n" for i in range(2000)))
    argv = ["--input=a.txt", "--txt_documents=line", "--encoding=bytes", "--out_dir=data/toy"]
    argv += ["--shard_tokens=30000", "--val_tokens=2000", "--workers=1"]
    return run("prepare_fineweb.py", *argv, status=status)


def test_a_shard_changed_anywhere_is_noticed_by_the_sha256_of_meta_json(run, tiny, tmp_path):
    prepare_toy(run, tmp_path)
    run("train.py", *tiny, "--max_iters=3")
    resume = [*tiny, "--init_from=resume", "--max_iters=4"]
    path = tmp_path / "data/toy/a_train_000002.bin"
    before = path.stat()
    tokens = np.memmap(path, np.uint16, "r+", 1024)
    assert len(tokens) > 4096
    tokens[20000] ^= 1
    tokens.flush()
    os.utime(path, ns=(before.st_atime_ns, time.time_ns() + 10**9))
    refused = one_line(run("train.py", *resume, status=1))
    assert "a_train_000002.bin: 30,000 uint16 tokens" in refused and "sha256" in refused
    refused = one_line(prepare_toy(run, tmp_path, status=1))
    assert "a_train_000002.bin is missing or not the file that meta.json lists; put it back" in refused
    tokens[20000] ^= 1
    tokens.flush()
    # newer than meta.json, and the same again
    os.utime(path, ns=(before.st_atime_ns, time.time_ns() + 10**9))
    assert "warning" not in run("train.py", *resume).stderr


def test_a_run_whose_data_go_away_is_saved(run, byte_data, tiny, tmp_path, monkeypatch):
    whole = run("train.py", *tiny, "--out_dir=whole")
    paths = sorted(byte_data.glob("*train*"))
    kept = {path: path.read_bytes() for path in paths}
    forward, calls = GPT.forward, []

    def hook(self, idx, targets=None):
        calls.append(self.training)
        if calls.count(True) == 7:
            for path in paths:
                with open(path, "r+b") as f:
                    f.truncate(1100)
        return forward(self, idx, targets)

    monkeypatch.setattr(GPT, "forward", hook)
    out = run("train.py", *tiny, status=1)
    line = out.stderr.splitlines()[-1]
    at = checkpoint.load(tmp_path / "out/ckpt.pt")["iter_num"]
    assert "has become shorter" in line and f"(out/ckpt.pt holds iteration {at})" in line and 3 <= at <= 4
    monkeypatch.undo()
    for path, raw in kept.items():
        path.write_bytes(raw)
    monkeypatch.chdir(ROOT)
    run("train.py", *tiny, "--init_from=resume")
    ends = [checkpoint.load(tmp_path / folder / "ckpt.pt")["model"] for folder in ("whole", "out")]
    assert all(torch.equal(p, ends[1][name]) for name, p in ends[0].items()) and whole.returncode == 0


def test_data_that_are_removed_during_a_run_are_named(run, byte_data, tiny, tmp_path, monkeypatch):
    forward, calls = GPT.forward, []

    def hook(self, idx, targets=None):
        calls.append(self.training)
        if calls.count(True) == 7:
            shutil.rmtree(byte_data)
        return forward(self, idx, targets)

    monkeypatch.setattr(GPT, "forward", hook)
    error = run("train.py", *tiny, status=1).stderr.splitlines()[-1]
    assert re.match(
        r"error: cannot read data/toy/fineweb_train_00000\d.bin: No such file or directory", error
    )
    assert checkpoint.load(tmp_path / "out/ckpt.pt")["iter_num"] >= 3


@pytest.mark.parametrize("unfinished", [False, True])
def test_a_source_that_was_edited_is_another_source_even_of_the_same_size(
    run, tmp_path, unfinished, monkeypatch
):
    def edit(old, new):
        path = tmp_path / "a.txt"
        path.write_text(path.read_text().replace(old, new))
        os.utime(path, ns=(0, path.stat().st_mtime_ns + 10**9))

    if unfinished:
        with monkeypatch.context() as patch:
            # as if it were killed there
            patch.setattr("prepare_fineweb.write_val", lambda *args: sys.exit(3))
            (tmp_path / "data/toy").mkdir(parents=True)
            with pytest.raises(AssertionError):
                prepare_toy(run, tmp_path)
        assert (tmp_path / "data/toy/unfinished.npz").exists()
    else:
        prepare_toy(run, tmp_path)
    argv = ["--input=a.txt", "--txt_documents=line", "--encoding=bytes", "--out_dir=data/toy"]
    argv += ["--shard_tokens=30000", "--val_tokens=2000"]
    edit("box with 700 jugs", "bag with 700 jugs")
    refused = one_line(run("prepare_fineweb.py", *argv, status=1))
    assert "other settings (source: 'a.txt: 1 files, " in refused
    edit("bag with 700 jugs", "box with 700 jugs")  # another time of change, the same content
    assert ("wrote" if unfinished else "is prepared already") in run("prepare_fineweb.py", *argv).stdout


def test_a_source_that_changes_while_it_is_read_is_not_called_complete(run, tmp_path, monkeypatch):
    import prepare_fineweb

    write_val = prepare_fineweb.write_val

    def and_edit(*args):
        os.utime(tmp_path / "a.txt", ns=(0, 0))
        return write_val(*args)

    monkeypatch.setattr(prepare_fineweb, "write_val", and_edit)
    with pytest.raises(
        AssertionError, match="were changed while they were read; delete data/toy/unfinished.npz and the"
    ):
        prepare_toy(run, tmp_path)
    assert not (tmp_path / "data/toy/meta.json").exists()
    # nor is it when the same command finds what was there at first
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    text = "unfinished run with other settings .source: 'files that changed while they were read' there"
    with pytest.raises(AssertionError, match=text):
        prepare_toy(run, tmp_path)
    with pytest.raises(UserError, match="the preparation of data/toy is not finished"):
        read_tokenizer("data/toy")


# -----------------------------------------------------------------------------
# folders of texts


def test_links_in_a_circle_or_across_give_each_file_once(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "text.txt").write_text(name)
    (tmp_path / "a/self").symlink_to(tmp_path / "a")
    (tmp_path / "a/across").symlink_to(tmp_path / "b")
    (tmp_path / "b/across").symlink_to(tmp_path / "a")
    (tmp_path / "b/again.txt").symlink_to(tmp_path / "a/text.txt")
    (tmp_path / "elsewhere.txt").symlink_to(tmp_path / "a/text.txt")
    (tmp_path / ".hidden.txt").write_text("hidden")
    assert find_files(f"{tmp_path}/**/text.txt")[0] == [str(tmp_path / f"{name}/text.txt") for name in "ab"]
    assert find_files(f"{tmp_path}/.*.txt")[0] == [str(tmp_path / ".hidden.txt")]
    found, passed_over = find_files(str(tmp_path))
    assert sorted(os.path.realpath(path) for path in found) == [
        str(tmp_path / f"{name}/text.txt") for name in "ab"
    ]
    assert passed_over["linked twice"] == 5


def test_many_crossing_links_take_a_time_that_grows_with_the_files(tmp_path):
    for i in range(12):
        (tmp_path / str(i)).mkdir()
        (tmp_path / str(i) / "t.txt").write_text("x")
    for i in range(12):
        for j in range(12):
            (tmp_path / str(i) / f"to{j}").symlink_to(tmp_path / str(j))
    seen = []
    scandir, os.scandir = os.scandir, lambda path: (seen.append(path), scandir(path))[1]
    try:
        found, _ = find_files(str(tmp_path))
    finally:
        os.scandir = scandir
    assert len(found) == 12 and len(seen) <= 13 + 12 * 12  # each link is looked at once


def test_what_is_passed_over_is_counted_and_endings_may_be_in_capitals(run, tmp_path):
    (tmp_path / "in/.git").mkdir(parents=True)
    (tmp_path / "in/.git/x.txt").write_text("hidden")
    (tmp_path / "in/.hidden.txt").write_text("hidden")
    (tmp_path / "in/code.py").write_text("no text")
    (tmp_path / "in/A.JSONL").write_text("".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(50)))
    out = run("prepare_fineweb.py", "--encoding=bytes", "--input=in", "--out_dir=out").stdout
    assert "source: 1 files; passed over: 2 hidden, 1 .py\n" in out
    assert json.loads((tmp_path / "out/meta.json").read_text())["train"]["documents"] > 40


def test_a_folder_that_cannot_be_read_is_an_error(run, tmp_path, monkeypatch):
    (tmp_path / "in/closed").mkdir(parents=True)
    (tmp_path / "in/a.txt").write_text("text")
    scandir = os.scandir

    def refusing(path):  # root may read anything, so the system is imitated
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    refused = one_line(run("prepare_fineweb.py", "--encoding=bytes", "--input=in", "--out_dir=out", status=1))
    assert "Permission denied: 'in/closed'" in refused


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.zst"])
def test_a_compressed_file_without_a_byte_is_a_bad_file(run, tmp_path, name):
    (tmp_path / name).touch()
    refused = one_line(
        run("prepare_fineweb.py", "--encoding=bytes", f"--input={name}", "--out_dir=out", status=1)
    )
    assert f"cannot read {name} after 0 documents: empty" in refused
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"", mtime=0))  # is no error, but no text either
    refused = one_line(
        run("prepare_fineweb.py", "--encoding=bytes", "--input=b.txt.gz", "--out_dir=out", status=1)
    )
    assert "0 tokens to train on" in refused


@pytest.mark.parametrize("files", [[], {}, "x", None, {"a.bin": 7}, {"a.bin": {"tokens": "many"}}])
def test_a_meta_json_whose_list_of_files_is_damaged_is_not_taken_for_complete(run, tmp_path, files):
    argv = a_thousand_lines(tmp_path)
    run(*argv)
    path = tmp_path / "out/meta.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(files=files)))
    assert "out/meta.json is damaged" in one_line(run(*argv, status=1))


# -----------------------------------------------------------------------------
# other people's models


def gpt2_folder(folder, **sizes):
    """A GPT-2 as transformers saves it, without a tokenizer."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = (
        dict(vocab_size=257, n_positions=64, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
        | sizes
    )
    torch.manual_seed(3)
    model = GPT2LMHeadModel(GPT2Config(**sizes))
    model.save_pretrained(folder)
    return model


def test_a_model_with_another_or_no_known_tokenizer_is_not_trained_on_any_data(run, trained, tiny, tmp_path):
    gpt2_folder(tmp_path / "theirs")
    sizes = [arg for arg in tiny if not arg.startswith(("--n_", "--block"))]
    argv = [*sizes, "--init_from=theirs", "--out_dir=fine", "--max_iters=1", "--block_size=16"]
    refused = one_line(run("train.py", *argv, status=1))
    assert (
        "theirs does not say which tokenizer it was trained with; the data in data/toy are made with bytes"
        in refused
    )
    assert "--allow_data_change=True" in refused
    allowed = run("train.py", *argv, "--allow_data_change=True")
    assert "warning: theirs does not say" in allowed.stderr
    run("sample.py", "--device=cpu", "--init_from=best", "--export=ours")
    text = (tmp_path / "ours/meta.json").read_text()
    other = text.replace("256", "255").replace("257", "256").replace("bytes", "r50k_base")
    (tmp_path / "ours/meta.json").write_text(other)
    argv[argv.index("--init_from=theirs")] = "--init_from=ours"
    refused = one_line(run("train.py", *argv, status=1))
    assert (
        "ours was trained with the tokenizer r50k_base of 256 ids; the data in data/toy are made with bytes"
        in refused
    )
    (tmp_path / "ours/meta.json").write_text(text)
    assert "warning" not in run("train.py", *argv).stderr


def test_a_folder_is_sampled_with_its_own_tokenizer_or_the_one_that_is_named(run, tmp_path):
    gpt2_folder(tmp_path / "theirs")
    argv = [
        "sample.py",
        "--device=cpu",
        "--init_from=theirs",
        "--num_samples=1",
        "--max_new_tokens=5",
        "--start=a",
    ]
    assert "does not say which tokenizer it has; name it, as in --encoding=gpt2" in one_line(
        run(*argv, status=1)
    )
    assert run(*argv, "--encoding=bytes").stdout.startswith("a")
    letters = dict(type="WordLevel", vocab={chr(97 + i): i for i in range(257)})
    (tmp_path / "theirs/tokenizer.json").write_text(json.dumps(dict(model=letters)))
    assert re.fullmatch("[a-\u0161]{6}\n---------------\n", run(*argv).stdout)
    for model in (None, dict(type="Unigram", vocab=[["a", -1.0], ["b", -2.0]])):
        (tmp_path / "theirs/tokenizer.json").write_text(json.dumps(dict(model=model)))
        assert "does not say which tokenizer it has" in one_line(run(*argv, status=1))
    (tmp_path / "theirs/tokenizer.json").write_text("{")
    assert run(*argv, "--encoding=bytes").stdout.startswith("a")
    assert "theirs/tokenizer.json is damaged" in one_line(run(*argv, status=1))


@pytest.mark.skipif("TIKTOKEN_CACHE_DIR" not in os.environ, reason="set TIKTOKEN_CACHE_DIR")
def test_gpt2s_own_vocabulary_is_recognised_in_either_of_its_files(tmp_path):
    from sologpt.tokenizer import find_tokenizer

    gpt2 = find_tokenizer("gpt2")
    content = huggingface.tokenizer_json(gpt2)
    (tmp_path / "vocab.json").write_text(json.dumps(content["model"]["vocab"]))
    assert huggingface.read_folder_tokenizer(str(tmp_path)) == gpt2
    content["model"]["vocab"]["!"], content["model"]["vocab"]["?"] = 30, 0
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert huggingface.read_folder_tokenizer(str(tmp_path)) is None


def test_weights_in_parts_are_those_of_the_index_and_no_others(tmp_path):
    theirs = gpt2_folder(tmp_path / "whole")
    theirs.save_pretrained(tmp_path / "parts", max_shard_size="40KB")
    parts = sorted((tmp_path / "parts").glob("model-*.safetensors"))
    assert len(parts) > 2
    shutil.copy(parts[0], tmp_path / "parts/model-00099-of-00099.safetensors")  # left over from another model
    shutil.copy(parts[0], tmp_path / "parts/model-0.safetensors")
    fields, weights = huggingface.read_folder(str(tmp_path / "parts"))
    _, expected = huggingface.read_folder(str(tmp_path / "whole"))
    assert weights.keys() == expected.keys() and all(
        torch.equal(w, expected[name]) for name, w in weights.items()
    )
    shutil.copy(tmp_path / "whole/model.safetensors", tmp_path / "parts")
    parts[1].unlink()
    huggingface.read_folder(str(tmp_path / "parts"))  # the whole file is enough
    (tmp_path / "parts/model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="is missing, and .*index.json names it"):
        huggingface.read_folder(str(tmp_path / "parts"))


def test_an_export_that_transformers_has_saved_over_is_not_deleted(run, trained, tmp_path):
    from transformers import GPT2LMHeadModel

    argv = ["sample.py", "--device=cpu", "--export=hf"]
    run(*argv)
    run(*argv)  # what only an export has written is written anew
    GPT2LMHeadModel.from_pretrained(tmp_path / "hf").save_pretrained(tmp_path / "hf")
    before = (tmp_path / "hf/model.safetensors").read_bytes()
    assert "not written by an export" in one_line_of(run(*argv, status=1))
    assert (tmp_path / "hf/model.safetensors").read_bytes() == before


def test_an_export_takes_nobodys_place_but_that_of_an_export(run, trained, tmp_path):
    argv = ["sample.py", "--device=cpu", "--export=hf"]
    gpt2_folder(tmp_path / "hf")
    before = {path.name: path.read_bytes() for path in (tmp_path / "hf").iterdir()}
    assert "hf holds config.json, not written by an export" in one_line_of(run(*argv, status=1))
    assert {path.name: path.read_bytes() for path in (tmp_path / "hf").iterdir()} == before
    shutil.rmtree(tmp_path / "hf")
    assert "model and tokenizer are in hf" in run(*argv).stderr
    (tmp_path / "hf/notes.txt").write_text("mine")
    assert "hf holds notes.txt, not written by an export" in one_line_of(run(*argv, status=1))
    (tmp_path / "hf/notes.txt").unlink()
    state = torch.load(tmp_path / "out/ckpt.pt", weights_only=True)
    state["tokenizer"]["encoding"] = "r50k_base"  # which cannot be exported: no tokenizer of before may stay
    torch.save(state, tmp_path / "out/ckpt.pt")
    assert "but no tokenizer" in run(*argv).stderr
    names = {path.name for path in (tmp_path / "hf").iterdir()}
    assert names == {"README.md", "config.json", "generation_config.json", "model.safetensors"}


def one_line_of(outcome):
    """The last line of stderr, which for sample.py follows lines about the model."""
    line = outcome.stderr.splitlines()[-1]
    assert line.startswith("error: ")
    return line


def test_the_card_has_the_tokens_that_were_seen(run, byte_data, tiny, tmp_path):
    run("train.py", *tiny, "--max_iters=4")
    run("train.py", *tiny, "--init_from=resume", "--max_iters=6", "--batch_size=8", "--eval_interval=2")
    run("sample.py", "--device=cpu", "--export=hf")
    assert f"| training tokens | {4 * 128 + 2 * 256:,} |" in (tmp_path / "hf/README.md").read_text()


# -----------------------------------------------------------------------------
# checkpoints and logs that somebody has altered


def test_other_settings_than_before_are_pointed_out_in_one_line(run, byte_data, tiny):
    run("train.py", *tiny, "--max_iters=3")
    more = ["--dropout=0.1", "--weight_decay=0.2", "--grad_clip=0.5", "--beta1=0.8", "--beta2=0.9"]
    out = run("train.py", *tiny, "--init_from=resume", "--max_iters=4", *more, "--dtype=bfloat16")
    assert out.stderr.splitlines() == [
        "warning: settings that change from here on: dropout=0.1, was 0.0; weight_decay=0.2, was 0.1; "
        "grad_clip=0.5, was 1.0; beta1=0.8, was 0.9; beta2=0.9, was 0.95; dtype=bfloat16, was float32"
    ]


def alter(state, path, value):
    """Sets, or with value ... deletes, what the keys in path lead to."""
    *way, last = path
    for key in way:
        state = state[key]
    if value is ...:
        del state[last]
    else:
        state[last] = value


ALTERED = [
    (("iter_num",), "3"),
    (("iter_num",), 3.0),
    (("iter_num",), True),
    (("iter_num",), -1),
    (("best_val_loss",), "low"),
    (("best_val_loss",), math.nan),
    (("best_val_loss",), torch.zeros(2)),
    (("tokens_seen",), None),
    (("tokens_seen",), -1),
    (("bad_in_row",), -1),
    (("seconds",), -5.0),
    (("seconds",), math.nan),
    (("resumed",), "x"),
    (("bad_steps",), []),
    (("model",), []),
    (("model", "lm_head.weight"), 7),
    (("model", "lm_head.weight"), ...),
    (("model", "lm_head.weight"), torch.zeros(320, 31)),
    (("model", 5), torch.zeros(1)),
    (("model_args",), [1]),
    (("model_args", "n_layer"), "2"),
    (("model_args", "n_layer"), 10**7),
    (("model_args", "n_embd"), 64),
    (("model_args", "vocab_size"), 10**9),
    (("model_args", "bias"), 1),
    (("model_args", "dropout"), 2.0),
    (("model_args", "n_head"), 3),
    (("arch",), 5),
    (("arch",), "gpt5"),
    (("gelu",), "sigmoid"),
    (("tokenizer",), "bytes"),
    (("tokenizer", "vocab_size"), "257"),
    (("data",), []),
    (("data", "tokenizer"), 7),
    (("config",), 7),
    (("optimizer",), []),
    (("optimizer", "state"), {}),
    (("optimizer", "state", 3), ...),
    (("optimizer", "state", 3, "exp_avg"), ...),
    (("optimizer", "state", 3, "exp_avg"), torch.zeros(5)),
    (("optimizer", "state", 3, "exp_avg_sq"), torch.zeros(96, 32, dtype=torch.int64)),
    (("optimizer", "state", 3, "step"), torch.zeros(3)),
    (("optimizer", "state", 3, "step"), math.nan),
    (("optimizer", "state", 3, "step"), torch.zeros(())),
    (("optimizer", "state", 3, "step"), [1]),
    (("optimizer", "state", 3, "step"), "7"),
    (("optimizer", "state", 3, "step"), True),
    (("optimizer", "state", 3, "step"), torch.ones(())),
    (("steps", 3), 149.0),
    (("steps",), []),
    (("more_args",), []),
    (("more_args",), {1: 2}),
    (("more_args",), {"n_layer": 3}),
    (("more_args",), {"softcap": 3}),
    (("optimizer", "state", 3, "step"), None),
    (("optimizer", "state", 99), {}),
    (("optimizer", "param_groups"), {}),
    (("optimizer", "param_groups", 0, "params"), [0, 1]),
    (("optimizer", "param_groups", 0), torch.zeros(0)),
    (("rng",), {}),
    (("rng",), ...),
    (("rng", "cpu"), torch.zeros(7, dtype=torch.uint8)),
    (("rng", "cpu"), torch.zeros(5056)),
    (("dtype",), 16),
]


@pytest.mark.parametrize("path, value", ALTERED, ids=lambda part: re.sub(r"\W+", "-", repr(part))[:40])
def test_an_altered_checkpoint_is_refused_in_one_line(run, trained, tiny, tmp_path, path, value):
    state = torch.load(tmp_path / "out/ckpt.pt", weights_only=True)
    alter(state, path, value)
    (tmp_path / "altered").mkdir()
    torch.save(state, tmp_path / "altered/ckpt.pt")
    argv = [*tiny, "--out_dir=altered", "--init_from=resume", "--max_iters=151", "--lr_decay_iters=151"]
    outcome = run("train.py", *argv, status=1)
    assert "ckpt.pt" in one_line_of(outcome) or str(value) in one_line_of(outcome)


def test_torchs_advice_to_run_the_code_in_a_checkpoint_is_not_passed_on(tmp_path):
    path = tmp_path / "ckpt.pt"
    torch.save(dict(model={}, model_args={}, more=torch.nn.Linear), path)
    with pytest.raises(UserError, match="or it holds objects that could run code$"):
        checkpoint.load(path)
    path.write_text("{}")
    with pytest.raises(UserError, match="it is not a torch checkpoint"):
        checkpoint.load(path)


def test_a_checkpoint_that_would_unpack_to_any_size_is_refused_unread(tmp_path):
    with zipfile.ZipFile(tmp_path / "ckpt.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"")
        with archive.open("archive/data/0", "w") as f:
            for _ in range(200):
                f.write(bytes(2**20))
    with pytest.raises(UserError, match="damaged or not one of ours: it has compressed parts"):
        checkpoint.load(tmp_path / "ckpt.pt")


def test_an_embedding_whose_rows_are_one_row_in_memory_does_not_make_a_model_of_any_size(trained, tmp_path):
    state = torch.load(tmp_path / "out/ckpt.pt", weights_only=True)
    alter(state, ("model_args", "vocab_size"), 10**11)
    for name in ("transformer.wte.weight", "lm_head.weight"):
        alter(state, ("model", name), torch.zeros(1, 32).expand(10**11, 32))
    torch.save(state, tmp_path / "out/ckpt.pt")
    out = trained("sample.py", "--device=cpu", status=1)
    assert "make a model of 3,200.0B parameters" in one_line_of(out)


def test_an_altered_optimizer_state_of_muon_is_refused(run, byte_data, tiny, tmp_path):
    run("train.py", *tiny, "--optimizer=muon", "--max_iters=2")
    state = torch.load(tmp_path / "out/ckpt.pt", weights_only=True)
    state["muon"]["state"][0]["momentum_buffer"] = torch.zeros(32, 96)
    torch.save(state, tmp_path / "out/ckpt.pt")
    out = run("train.py", *tiny, "--optimizer=muon", "--init_from=resume", status=1)
    assert "does not fit Muon for this model" in one_line(out)


def test_the_settings_of_an_altered_config_are_not_compared(run, trained, tiny, tmp_path):
    state = torch.load(tmp_path / "out/ckpt.pt", weights_only=True)
    argv = [*tiny, "--init_from=resume", "--lr_decay_iters=151"]
    for i, altered in enumerate(
        [
            dict(learning_rate="high", min_lr=None, dropout=[], batch_size="4"),
            dict(
                learning_rate=10**400,
                eval_iters=torch.zeros(0),
                warmup_iters=-1,
                batch_size=0,
                max_minutes=-1.0,
            ),
            dict(schedule="wsd", cooldown_frac=math.nan, beta1=2.0, max_minutes=math.nan),
        ]
    ):
        state["config"] |= altered
        torch.save(state, tmp_path / "out/ckpt.pt")
        out = run("train.py", *argv, f"--max_iters={151 + i}")
        assert "settings that change" not in out.stderr


def test_a_best_loss_without_end_is_damage(run, trained, tiny, tmp_path):
    state = torch.load(tmp_path / "out/ckpt.pt", weights_only=True)
    torch.save(state | dict(best_val_loss=10**30), tmp_path / "out/ckpt.pt")
    (tmp_path / "out/ckpt_prev.pt").unlink(missing_ok=True)
    damage = "out/ckpt.pt is damaged: its best_val_loss is 1000000000000000000000000000000"
    assert damage in one_line(run("train.py", *tiny, "--init_from=resume", status=1))
    assert damage in one_line_of(run("sample.py", "--out_dir=out", "--device=cpu", status=1))


def test_lines_of_metrics_that_cannot_be_read_are_left_out_and_counted(run, byte_data, tiny, tmp_path):
    run("train.py", *tiny, "--max_iters=3")
    path = tmp_path / "out/metrics.jsonl"
    nested = b'{"iter": 1, "x": ' + b"[" * 200_000 + b"]" * 200_000 + b"}\n"
    bad = [b"\xff\xfe\n", b"[]\n", b"{}\n", b'{"iter": "1"}\n', b"7\n", nested]
    path.write_bytes(bad[0] + path.read_bytes() + b"".join(bad[1:]) + b'{"kind": "iter", "it')
    out = run("train.py", *tiny, "--init_from=resume", "--max_iters=4")
    assert "warning: out/metrics.jsonl: 6 lines that cannot be read are left out" in out.stderr
    assert [line["iter"] for line in read_metrics(tmp_path / "out", "iter")] == [0, 1, 2, 3]
    assert "left out" not in run("train.py", *tiny, "--init_from=resume", "--max_iters=4").stderr


# -----------------------------------------------------------------------------
# the machine


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads Linux's /proc")
def test_memory_that_runs_out_on_a_cpu_makes_the_micro_batch_smaller(byte_data, tiny, tmp_path):
    """The limit is a real one, of address space: what the script takes with a small batch, and 300 MB. A
    micro-batch of 4096 * 16 tokens needs 84 MB for its logits alone, and as much again for each of their
    gradient and softmax."""
    start = (
        "import atexit, runpy, sys; "
        "atexit.register(lambda: print(open('/proc/self/status').read())); "
        f"sys.path.insert(0, {str(ROOT)!r}); "
        f"sys.argv[0] = {str(ROOT / 'train.py')!r}; "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    command = [sys.executable, "-c", start, *tiny, "--max_iters=1", "--out_dir=small"]
    small = subprocess.run(command, cwd=tmp_path, env=ENV, capture_output=True, text=True, check=True)
    limit = int(re.search(r"VmPeak:\s+(\d+) kB", small.stdout)[1]) + 300_000
    argv = [*tiny, "--batch_size=4096", "--gradient_accumulation_steps=1", "--max_iters=1", "--eval_iters=1"]
    script = f"ulimit -v {limit}; exec {sys.executable} {ROOT / 'train.py'} {' '.join(argv)}"
    out = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=ENV, capture_output=True, text=True)
    assert out.returncode == 0 and "Traceback" not in out.stderr, out.stderr
    assert re.search(r"out of memory with batch_size=4096; from iteration 0 on batch_size=2048", out.stderr)
    assert re.search(r"^done: iteration 1 after", out.stdout, re.M)


@pytest.mark.parametrize("closed", ["2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_closed_streams_do_not_end_a_run(byte_data, tiny, tmp_path, closed):
    command = f"{sys.executable} {ROOT / 'train.py'} {' '.join(tiny)} {closed}"
    process = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=ENV, capture_output=True)
    assert process.returncode == 0
    raw = (tmp_path / "out/metrics.jsonl").read_bytes()  # nothing but its own lines
    assert [json.loads(line)["kind"] for line in raw.splitlines()].count("iter") == 12
    assert checkpoint.load(tmp_path / "out/ckpt.pt")["iter_num"] == 12


def test_a_stop_request_may_come_from_a_terminal_that_is_closed_unless_nohup_has_said_otherwise():
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        with StopRequest("stopping") as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.number == signal.SIGHUP
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with StopRequest("stopping") as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.number == 0
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.number == signal.SIGTERM
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_in_a_place_where_python_drops_exceptions_interrupts_a_little_later(capfd):
    """As in a callback of the compiler's weak references."""

    class Value:
        pass

    def wait():
        end = time.perf_counter() + 60
        while time.perf_counter() < end:
            pass

    before = signal.getsignal(signal.SIGTERM), sys.unraisablehook
    first, second = Value(), Value()
    references = [
        weakref.ref(first, lambda _: signal.raise_signal(signal.SIGTERM)),
        weakref.ref(second, lambda _: wait()),  # in which the next one is raised, and dropped, too
    ]
    with StopRequest("stopping") as stop:
        with pytest.raises(Stopped), stop.interrupts():
            del first
            del second
            assert not any(reference() for reference in references)
            wait()
        assert stop.number == signal.SIGTERM
        time.sleep(0.3)  # with nothing to interrupt, no further one comes
    assert capfd.readouterr().err == "\nstopping\n"
    assert before == (signal.getsignal(signal.SIGTERM), sys.unraisablehook)


def test_ctrl_c_while_torch_is_imported_leaves_no_traceback(tmp_path):
    for script in ("train.py", "sample.py", "bench.py"):
        process = subprocess.Popen(
            [sys.executable, str(ROOT / script), "--help"], cwd=tmp_path, stderr=subprocess.PIPE
        )
        maps = pathlib.Path(f"/proc/{process.pid}/maps")
        while b"libtorch" not in maps.read_bytes():  # its import has begun
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate()
        assert process.returncode in (-signal.SIGINT, 130) and errors in (b"", b"interrupted\n")


# -----------------------------------------------------------------------------
# prompts, and sizes that nobody has memory for


def test_a_prompt_that_is_not_utf8_is_an_error(spawn, trained, tmp_path):
    argv = ["--device=cpu", "--num_samples=1", "--max_new_tokens=1", "--temperature=0"]
    command = [
        sys.executable.encode(),
        str(ROOT / "sample.py").encode(),
        *map(str.encode, argv),
        b"--start=caf\xe9",
    ]
    process = subprocess.run(command, cwd=tmp_path, env=ENV | dict(LC_ALL="C.UTF-8"), capture_output=True)
    assert process.returncode == 2 and b"--start: start is not UTF-8 text" in process.stderr
    command[-1] = "--start=café".encode()
    for locale in ("C", "C.UTF-8"):
        process = subprocess.run(
            command, cwd=tmp_path, env=ENV | dict(LC_ALL=locale, PYTHONUTF8="0"), capture_output=True
        )
        assert process.returncode == 0 and process.stdout.startswith("café".encode()), process.stderr


def test_a_bad_line_in_a_conversation_is_named_and_the_rest_goes_on(trained, tmp_path):
    argv = [
        "sample.py",
        "--device=cpu",
        "--temperature=0",
        "--interactive=True",
        "--max_new_tokens=5",
        "--out=o",
    ]
    out = trained(*argv, input=b"pack my\n\xff\xfe\n\n")
    assert "the text is not UTF-8" in out.stderr
    lines = [json.loads(line) for line in (tmp_path / "o").read_text(encoding="utf-8").splitlines()]
    assert [(line["prompt"], line["text"]) for line in lines] == [("pack my", " box "), ("", "with ")]


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--max_new_tokens=1000000000000"], "max_new_tokens=1000000000000 need "),
        (["--num_samples=1000000000"], "num_samples=1000000000 of max_new_tokens=500 need "),
        (["--temperature=5e-324"], "temperature=5e-324 must be 0 or at least 1e-6"),
    ],
)
def test_more_samples_than_fit_into_memory_are_refused_at_once(trained, argv, message):
    start = time.perf_counter()
    out = trained("sample.py", "--device=cpu", *argv, status=2 if "temperature" in argv[0] else 1)
    assert message in out.stderr and time.perf_counter() - start < 10


def test_a_model_that_no_computer_holds_is_refused_at_once(run, byte_data, tiny):
    refused = one_line(run("train.py", *tiny, "--n_layer=10000000", "--n_embd=768", status=1))
    assert "n_layer=10000000 of n_embd=768 with 320 token ids make a model of 70,778.9B parameters" in refused


@pytest.mark.parametrize("arch", ["gpt2", "modern"])
def test_the_smallest_memory_for_a_model_is_that_of_its_weights(monkeypatch, arch):
    config = GPTConfig(arch=arch, n_layer=1, n_head=1, n_embd=64, block_size=8, vocab_size=5000)
    weights = 4 * make_gpt(config).get_num_params(non_embedding=False)
    monkeypatch.setattr(fit, "total_memory", lambda device: weights)
    fit.check_size(config)
    monkeypatch.setattr(fit, "total_memory", lambda device: 0.99 * weights)
    with pytest.raises(UserError, match="with 5,000 token ids make a model of"):
        fit.check_size(config)


def test_the_cooldown_begins_exactly_where_the_fraction_says():
    def start(fraction, max_iters):
        return configure(
            TrainConfig, [f"--cooldown_frac={fraction}", f"--max_iters={max_iters}"]
        ).cooldown_start

    assert start(0.07, 100) == 93  # 0.07 * 100 is a little more than 7 in binary
    assert (start(0.29, 100), start(0.1, 30), start(0.333, 100), start(1.0, 10), start(0.0, 10)) == (
        71,
        27,
        66,
        0,
        10,
    )
