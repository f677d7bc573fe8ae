"""
The files of a run: whole or not there, whatever happens while they are written or to them afterwards.
Reference: the states that went in.
Run: pytest tests/test_checkpoint.py
"""

import dataclasses
import errno
import json
import math
import os
import random
import re
import resource
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

from model import GPT, GPTConfig
from sologpt import checkpoint, fit, log, memory, optim, report, resume, shards
from sologpt.tokenizer import BPETokenizer, ByteTokenizer
from train import TrainConfig

BYTES = ByteTokenizer("bytes", 257, 256)
ARGS = dict(n_layer=1, n_head=1, n_embd=8, block_size=4, bias=False, vocab_size=16, dropout=0.0)


def state(iter_num):
    torch.manual_seed(iter_num)
    model = GPT(GPTConfig(**ARGS))
    optimizer = dict(state={0: dict(exp_avg=torch.rand(5))})
    return dict(
        model=model.state_dict(), model_args=ARGS, optimizer=optimizer, iter_num=iter_num, best_val_loss=1.0
    )


def resumed(folder):
    """What a new process would resume from in folder: iteration, file name, and why it is not ckpt.pt, if it
    is not."""
    files = checkpoint.RunFiles(str(folder))
    loaded, why = files.load()
    expected = state(loaded["iter_num"])
    assert all(torch.equal(loaded["model"][name], p) for name, p in expected["model"].items())
    return loaded["iter_num"], files.newest.removeprefix(f"{folder}/"), why


def test_the_state_before_the_newest_is_kept(tmp_path):
    files = checkpoint.RunFiles(str(tmp_path))
    assert not files.exist()
    for iter_num in (5, 10, 15):
        assert files.save(state(iter_num)) and files.saved_iter == iter_num
    assert checkpoint.load(files.ckpt)["iter_num"] == 15 and checkpoint.load(files.previous)["iter_num"] == 10
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt.pt", "ckpt_prev.pt"]


def test_a_checkpoint_of_another_kind_of_gpt_is_refused(tmp_path):
    path = tmp_path / "ckpt.pt"
    untied = state(5)
    untied["model"]["lm_head.weight"] = untied["model"]["lm_head.weight"] + 1
    torch.save(untied, path)
    model = GPT(GPTConfig(**ARGS))
    with pytest.raises(ValueError, match="has an untied output head; GPT-2's is tied"):
        checkpoint.restore_model(model, checkpoint.load(path), path)
    untied["model"]["lm_head.weight"] = untied["model"]["transformer.wte.weight"].clone()
    torch.save(untied, path)
    checkpoint.restore_model(model, checkpoint.load(path), path)
    torch.save(state(5) | dict(model_args=ARGS | dict(softcap=15.0, activation="relu")), path)
    with pytest.raises(ValueError, match="its model_args have activation, softcap, unknown here"):
        checkpoint.load(path)


def test_a_new_run_sets_the_files_of_an_old_one_aside(tmp_path):
    for number in (1, 2):
        old = checkpoint.RunFiles(str(tmp_path))
        old.save(state(90)), old.save(state(95)), old.write(old.best, state(80))
        (tmp_path / "mine.txt").touch()
        assert checkpoint.RunFiles(str(tmp_path)).set_aside() == str(tmp_path / f"earlier-{number}")
        moved = sorted(path.name for path in (tmp_path / f"earlier-{number}").iterdir())
        assert moved == ["best.pt", "ckpt.pt", "ckpt_prev.pt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["earlier-1", "earlier-2", "mine.txt"]
    assert checkpoint.RunFiles(str(tmp_path)).set_aside() is None
    assert resumed(tmp_path / "earlier-1")[0] == 95


@pytest.mark.parametrize("broken", ["damaged", "missing"])
def test_a_broken_ckpt_never_takes_the_place_of_the_good_one_before_it(tmp_path, broken):
    files = checkpoint.RunFiles(str(tmp_path))
    files.save(state(5))
    files.save(state(10))
    path = tmp_path / "ckpt.pt"
    path.write_bytes(path.read_bytes()[:-100]) if broken == "damaged" else path.unlink()
    files = checkpoint.RunFiles(str(tmp_path))
    loaded, why = files.load()
    assert (
        loaded["iter_num"] == 5
        and files.saved_iter is None
        and files.saved_text.endswith("ckpt_prev.pt holds iteration 5")
    )
    assert ("damaged or not one of ours" if broken == "damaged" else f"{path} is missing") in why
    files.save(state(11))
    assert checkpoint.load(files.ckpt)["iter_num"] == 11 and checkpoint.load(files.previous)["iter_num"] == 5
    files.save(state(12))
    assert checkpoint.load(files.previous)["iter_num"] == 11


def test_the_prefixes_of_ddp_and_of_torch_compile_are_taken_off_parameter_names(tmp_path):
    plain = state(1)
    for prefix in ("module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."):
        renamed = {prefix + name: p for name, p in plain["model"].items()}
        torch.save(plain | dict(model=renamed), tmp_path / "ckpt.pt")
        loaded = checkpoint.load(tmp_path / "ckpt.pt")["model"]
        assert loaded.keys() == plain["model"].keys()
        assert all(torch.equal(loaded[name], p) for name, p in plain["model"].items())


def test_two_damaged_states_are_both_named(tmp_path):
    files = checkpoint.RunFiles(str(tmp_path))
    files.save(state(5))
    files.save(state(10))
    for name in ("ckpt.pt", "ckpt_prev.pt"):
        (tmp_path / name).write_bytes(b"junk")
    with pytest.raises(
        ValueError, match="cannot read the checkpoint .*ckpt.pt, .*cannot read .*ckpt_prev.pt, "
    ):
        files.load()


def test_a_cut_or_flipped_ckpt_is_either_read_right_or_not_at_all(tmp_path):
    files = checkpoint.RunFiles(str(tmp_path))
    files.save(state(5))
    files.save(state(10))
    path, rng, seen = tmp_path / "ckpt.pt", random.Random(1), set()
    raw = path.read_bytes()
    for i in range(60):
        flipped = bytearray(raw)
        flipped[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped if i % 2 else raw[: rng.randrange(len(raw))])
        iter_num, name, why = resumed(tmp_path)
        assert (iter_num, name) == ((5, "ckpt_prev.pt") if why else (10, "ckpt.pt"))
        seen.add(name)
    assert "ckpt_prev.pt" in seen


@pytest.mark.parametrize("call", ["fsync", "replace ckpt_prev", "replace ckpt"])
def test_a_write_that_fails_at_any_point_leaves_a_whole_state(tmp_path, monkeypatch, capsys, call):
    files = checkpoint.RunFiles(str(tmp_path))
    files.save(state(5))
    files.save(state(10))

    def fails(*paths):
        if call == "fsync" or str(paths[1]).endswith(f"{call.split()[1]}.pt"):
            raise OSError(errno.EIO, "Input/output error")
        return replace(*paths)

    replace = os.replace
    monkeypatch.setattr(os, call.split()[0], fails)
    assert not files.save(state(15)) and "warning: cannot save iteration 15: " in capsys.readouterr().err
    monkeypatch.undo()
    assert resumed(tmp_path)[0] == 10 and not list(tmp_path.glob("*.tmp"))
    assert files.save(state(20)) and resumed(tmp_path)[0] == 20
    assert checkpoint.load(files.previous)["iter_num"] == 10


def test_a_disk_that_fills_while_torch_writes_gives_the_room_of_the_older_state(
    tmp_path, monkeypatch, capsys
):
    """torch turns the error of a full disk into a RuntimeError; it is raised as long as ckpt_prev.pt is
    there."""
    files = checkpoint.RunFiles(str(tmp_path))
    files.save(state(5))
    files.save(state(10))
    save = torch.save

    def without_room(value, f):
        if not os.path.exists(files.previous):
            return save(value, f)
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError:
            raise RuntimeError("unexpected pos 64 vs 0") from None

    monkeypatch.setattr(torch, "save", without_room)
    assert files.save(state(15))
    err = capsys.readouterr().err
    assert err == f"warning: deleting {files.previous} to save iteration 15: No space left on device\n"
    # the newest state is whole, and so is the one before it
    assert checkpoint.load(files.ckpt)["iter_num"] == 15 and checkpoint.load(files.previous)["iter_num"] == 10


@pytest.mark.parametrize("links", [True, False])
def test_no_state_is_deleted_if_the_new_one_cannot_be_renamed(tmp_path, monkeypatch, links):
    """On some file systems a rename needs room, too."""
    files = checkpoint.RunFiles(str(tmp_path))
    files.save(state(5))
    files.save(state(10))
    replace = os.replace

    def without_room(source, target):
        if target == files.ckpt:
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    def without_links(source, target):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "replace", without_room)
    if not links:
        monkeypatch.setattr(os, "link", without_links)
    assert not files.save(state(15))
    assert resumed(tmp_path)[0] == 10
    monkeypatch.setattr(os, "replace", replace)
    assert files.save(state(20)) and resumed(tmp_path)[0] == 20
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt.pt", "ckpt_prev.pt"]
    assert checkpoint.load(files.previous)["iter_num"] == 10


def test_a_folder_that_is_deleted_during_a_run_is_made_anew(tmp_path, capsys):
    files = checkpoint.RunFiles(str(tmp_path / "out"))
    (tmp_path / "out").mkdir()
    files.save(state(5))
    shutil.rmtree(tmp_path / "out")
    assert files.save(state(10)) and resumed(tmp_path / "out")[0] == 10
    assert capsys.readouterr().err == f"warning: {tmp_path / 'out'} is no longer there; it is made anew\n"


def test_a_disk_without_room_is_noticed_before_writing(tmp_path, monkeypatch, capsys):
    files, size = checkpoint.RunFiles(str(tmp_path)), sum(t.nbytes for t in checkpoint.tensors(state(1)))
    disk = dict(free=size)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), disk))
    # the tied matrix, counted twice in size, is written once
    assert files.save(state(1)) and files.save(state(2))
    disk["free"] = 1000
    assert not files.write(files.best, state(3))
    reason = f"cannot write {files.best}: 0.0 MB are needed, 0.0 MB are free; "
    assert f"cannot save iteration 3: {reason}" in capsys.readouterr().err
    # ckpt_prev.pt makes room for a newer state, and ckpt.pt, which is whole, stays
    assert not files.save(state(3)) and "deleting" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt.pt"] and resumed(tmp_path)[0] == 2


@pytest.mark.parametrize("part, wrong", [("model", math.inf), ("model", math.nan), ("optimizer", -math.inf)])
def test_what_is_not_finite_is_not_saved(tmp_path, part, wrong):
    files, bad = checkpoint.RunFiles(str(tmp_path)), state(10)
    files.save(state(5))
    list(checkpoint.tensors(bad[part]))[0].view(-1)[3] = wrong
    with pytest.raises(
        ValueError, match="moments that are not finite; .*ckpt.pt holds iteration 5. Try a lower --lear"
    ):
        files.save(bad)
    assert resumed(tmp_path) == (5, "ckpt.pt", None)


def test_metrics_a_state_and_its_name_reach_the_disk_in_this_order(
    run, byte_data, tiny, tmp_path, monkeypatch
):
    """In any other a power cut, which no test can make, could leave a state without its metrics, or none."""
    synced, fsync = [], os.fsync

    def noting(f):
        synced.append(os.fstat(f).st_ino)
        fsync(f)

    monkeypatch.setattr(os, "fsync", noting)
    run("train.py", *tiny)
    order = [(tmp_path / "out" / name).stat().st_ino for name in ("metrics.jsonl", "ckpt.pt", ".")]
    last = len(synced) - 1 - synced[::-1].index(order[1])
    assert synced[last - 1 : last + 2] == order


def test_a_state_that_is_saved_already_is_not_saved_again(tmp_path):
    """It would take the place of the one before it."""
    files = checkpoint.RunFiles(str(tmp_path))
    files.save(state(5))
    files.save(state(10))
    run = SimpleNamespace(files=files, first_iter=0, progress=SimpleNamespace(iter_num=10), metrics=None)
    checkpoint.save_progress(run)  # of which a second saving would need more
    assert checkpoint.load(files.previous)["iter_num"] == 5


def test_what_a_killed_run_was_writing_is_removed(tmp_path):
    for name in ("ckpt.pt.123.tmp", "best.pt.tmp", "metrics.jsonl.4.tmp", "mine.tmp"):
        (tmp_path / name).touch()
    checkpoint.RunFiles(str(tmp_path)).remove_partial()
    assert [path.name for path in tmp_path.iterdir()] == ["mine.tmp"]


def test_metrics_that_cannot_be_written_are_written_later(tmp_path, capsys):
    metrics = log.Metrics(tmp_path / "metrics.jsonl", None)
    metrics.write("1\n")
    good, metrics.file = metrics.file, open("/dev/full", "ab", buffering=0)
    metrics.write("2\n"), metrics.write("3\n")
    metrics.file.close()
    metrics.file = good
    metrics.write("4\n")
    metrics.sync()
    good.close()
    assert (tmp_path / "metrics.jsonl").read_text() == "1\n2\n3\n4\n"
    assert capsys.readouterr().err.count("No space left on device; trying again with each line") == 1


def test_a_line_of_which_the_disk_takes_only_a_part_is_completed_later(tmp_path):
    metrics = log.Metrics(tmp_path / "metrics.jsonl", None)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5, limits[1]))
    try:
        metrics.write("1234567\n")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "metrics.jsonl").read_text() == "12345"
    metrics.write("8\n")
    metrics.file.close()
    assert (tmp_path / "metrics.jsonl").read_text() == "1234567\n8\n"


def test_moments_given_in_advance_change_nothing():
    models = [GPT(GPTConfig(**ARGS)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [model.configure_optimizers(0.1, 1e-2, (0.9, 0.95), "cpu") for model in models]
    optim.allocate_moments(dict(optimizer=optimizers[1]))
    for model, optimizer in zip(models, optimizers, strict=True):
        for _ in range(3):
            model(torch.arange(4)[None], torch.arange(4)[None])[1].backward()
            optimizer.step()
    first, second = (optimizer.state_dict()["state"] for optimizer in optimizers)
    assert all(torch.equal(first[i][name], second[i][name]) for i in first for name in first[i])
    assert all(torch.equal(p, q) for p, q in zip(*(model.parameters() for model in models), strict=True))


def test_moments_after_different_numbers_of_updates_fit_only_if_the_state_says_so():
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2)) for _ in range(2)])
    optim.allocate_moments(dict(optimizer=optimizer))
    saved = optimizer.state_dict()
    for recorded, steps, fits in (
        (None, (3.0, 3.0), True),
        (None, (3.0, 4.0), False),  # of a state from before they were recorded
        (None, (-1.0, -1.0), False),
        ([3.0, 4.0], (3.0, 4.0), True),
        ([3.0, 4.0], (3.0, 5.0), False),
    ):
        for number, step in enumerate(steps):
            saved["state"][number]["step"] = torch.tensor(step)
        assert checkpoint.moments_fit(saved, optimizer, recorded) == fits


def test_the_fingerprint_of_data_tells_other_data_apart(tmp_path):
    path = tmp_path / "a_train_000001.bin"

    def of(tokens, tokenizer=BYTES):
        shards.write_shard(path, torch.tensor(tokens, dtype=torch.uint16).numpy())
        return json.loads(json.dumps(shards.fingerprint(shards.find_shards(tmp_path, "train"), tokenizer)))

    known = of([1, 2, 3])
    assert known == of([1, 2, 3]) and known[path.name].startswith("3 uint16 tokens (CRC ")
    assert resume.data_changes(dict(data=known), known) == resume.data_changes({}, known) == ""
    for other in (of([1, 2, 4]), of([1, 2, 3, 4])):
        assert (
            resume.data_changes(dict(data=known), other)
            == f"{path.name}: {other[path.name]}, was {known[path.name]}"
        )
    assert "tokenizer: gpt2 of" in resume.data_changes(
        dict(data=known), of([1, 2, 3], BPETokenizer("gpt2", 50257, 50256))
    )
    shutil.copy(path, tmp_path / "a_train_000002.bin")
    assert "a_train_000002.bin: 3 uint16" in resume.data_changes(dict(data=known), of([1, 2, 3]))
    many = {f"{i}.bin": "x" for i in range(9)}
    assert resume.data_changes(dict(data={}), many).endswith("3.bin: x, was missing; and 5 more")
    assert "000002.bin: missing, was 3" in resume.data_changes(dict(data=of([1, 2, 3])), known)


def test_a_sha256_that_only_one_of_two_has_is_no_difference():
    plain, known, other = "3 tokens", "3 tokens, sha256 ab", "3 tokens, sha256 cd"
    for a, b in ((plain, known), (known, plain), (known, known)):
        assert shards.same_file(a, b)
    assert not shards.same_file(known, other) and not shards.same_file(plain, "4 tokens, sha256 ab")


def test_the_scale_of_fp16_is_that_of_the_state():
    run = SimpleNamespace(scaler=torch.amp.GradScaler("cpu"), machine=None)
    before = torch.amp.GradScaler("cpu", init_scale=8.0)
    resume.restore_scaler_and_rng(run, dict(scaler=before.state_dict()), "ckpt.pt")
    assert run.scaler.get_scale() == 8.0


# -----------------------------------------------------------------------------
# memory


def test_the_room_for_checkpoints_by_hand():
    sizes = dict(weights=4, gradients=100, optimizer=8)
    assert memory.checkpoint_bytes(sizes, False) == 3 * (4 + 8) + 4
    assert memory.checkpoint_bytes(sizes, True) == 4 * (4 + 8) + 4
    assert memory.checkpoint_bytes(sizes, True, resumed=True) == 4 * (4 + 8) + 2 * 4


@pytest.mark.parametrize(
    "batch_size, sequences, expected",
    [(12, 480, (6, 80)), (2, 2, (1, 2)), (5, 10, (2, 5)), (5, 15, (1, 15)), (9, 18, (3, 6)), (7, 7, (1, 7))],
)
def test_a_smaller_batch_divides_the_same_sequences(batch_size, sequences, expected):
    assert fit.smaller_batch(batch_size, sequences) == expected


def test_a_run_that_has_made_its_batch_smaller_is_continued_with_it(monkeypatch):
    """Or dropout would draw other masks, and memory run out again."""
    monkeypatch.setattr(sys, "argv", ["train.py"])
    argv = ["c.py", "--batch_size=8", "--seed=3", "--init_from=auto"]
    cfg = TrainConfig(batch_size=8, gradient_accumulation_steps=5)
    assert report.resume_command(argv, cfg) == (
        "python train.py c.py --batch_size=8 --seed=3 --init_from=resume"
    )
    fit.lower_batch_size(cfg)
    fit.lower_batch_size(cfg)
    assert report.resume_command(argv, cfg) == (
        "python train.py c.py --seed=3 --batch_size=2 --gradient_accumulation_steps=20 --init_from=resume"
    )


@pytest.mark.parametrize("device, share", [("cpu", 0.8), ("cuda", 1.1)])
def test_a_batch_that_takes_more_than_this_share_of_memory_is_made_smaller(device, share, monkeypatch):
    model, machine = GPT(GPTConfig(**ARGS)), SimpleNamespace(device=torch.device(device), dtype="float32")
    keys = dict(batch_size=512, gradient_accumulation_steps=1, compile=False)
    needed = sum(memory.memory_estimate(model, {}, TrainConfig(**keys), "float32").values())
    for has, batch_size in ((1.01 * needed / share, 512), (0.99 * needed / share, 256)):
        for name in ("total_memory", "available_memory"):
            monkeypatch.setattr(fit, name, lambda device, has=has: has)
        cfg = TrainConfig(**keys)
        fit.fit_batch_size(model, {}, cfg, machine)
        assert cfg.batch_size == batch_size


def test_what_to_do_without_memory_for_one_sequence_by_hand():
    config = GPTConfig(n_layer=12, n_embd=768, n_head=12, block_size=1024, vocab_size=50304)
    cfg = TrainConfig(batch_size=1, compile=False)

    def advice(available, cfg=cfg, config=config, device="cuda"):
        machine = SimpleNamespace(device=torch.device(device), dtype="bfloat16")
        return fit.no_room(124_400_000, 8 * 124_400_000, config, cfg, machine, available)

    # 16 * 124.4e6 = 1,990e6; copies of 12 * 12 * 768^2 + 50,304 * 768 weights in bf16: 247e6; and 1,024 times
    # 2 * 768 * (18 * 12 + 2) = 335e3 and 10 * 50,304 = 503e3
    start = "out of memory with batch_size=1; by estimate 124.4M parameters need 3.10 GB with one sequence"
    assert advice(None) == f"{start}: use a smaller --block_size, --n_layer or --n_embd"
    assert advice(4e9).startswith(
        f"{start}, and 4.00 GB are available, so it should fit, but does not: try --loss_ch"
    )
    # 8 chunks: 129e6 for their part, 20 bytes a logit there, and twice 155e6 for the matrix's gradient
    assert advice(3.0e9).endswith("3.00 GB are available, enough with --loss_chunks=8")
    # 2,600e6 - 2,237e6 = 363e6 over 838e3 a token: 433
    assert advice(2.6e9).endswith("2.60 GB are available, enough for about --block_size=384")
    # 1.5e9 of those 2,237e6 and 54e6 of 64 tokens, times 124.4e6
    assert advice(1.5e9).endswith(
        "not enough for more than 81M parameters: use a smaller --n_layer or --n_embd"
    )
    assert "does not: try a smaller --block_size" in advice(4e9, dataclasses.replace(cfg, loss_chunks=32))
    # compiled: 2 * 768 * (16 * 12 + 4) = 301e3 and 2 * 50,304 a token, and 155e6 once, make less than the
    # gradients later on: 170e6 of the blocks, in 16 bits, and three times 155e6
    assert "need 2.87 GB" in advice(None, TrainConfig(batch_size=1))
    most = re.search("not enough for more than ([0-9]+)M", advice(2.5e9, TrainConfig(batch_size=1)))[1]
    assert 100 < int(most) < 124
    # 13 bytes for each of 1,024 * 1,024 scores of 144 heads: 1.96e9 more
    dropout = dataclasses.replace(config, dropout=0.1)
    assert "need 5.06 GB" in advice(None, config=dropout, device="cpu")
    assert "need 3.10 GB" in advice(None, config=dropout)


# -----------------------------------------------------------------------------
# benchmarks/fuzz.py, which is run by hand for large numbers, with small ones


def test_fuzzed_configurations_are_right_or_refused(tmp_path):
    from benchmarks import fuzz

    assert ROOT == fuzz.ROOT and fuzz.fuzz_configure(360, tmp_path) >= 300


def test_nanogpts_oldest_checkpoints_have_biases_without_saying_so(tmp_path):
    args = {name: value for name, value in ARGS.items() if name != "bias"}
    with_biases = GPT(GPTConfig(**args, bias=True))
    torch.save(state(5) | dict(model=with_biases.state_dict(), model_args=args), tmp_path / "ckpt.pt")
    loaded = checkpoint.load(tmp_path / "ckpt.pt")
    model = GPT(GPTConfig(**loaded["model_args"]))
    checkpoint.restore_model(model, loaded, "ckpt.pt")
    idx = torch.arange(4)[None]
    assert torch.equal(model.eval()(idx)[0], with_biases.eval()(idx)[0])
    # one of today's that has lost the word is still refused
    torch.save(state(5) | dict(model_args=args), tmp_path / "ckpt.pt")
    loaded = checkpoint.load(tmp_path / "ckpt.pt")
    with pytest.raises(ValueError, match="do not fit its model_args"):
        checkpoint.restore_model(GPT(GPTConfig(**loaded["model_args"])), loaded, "ckpt.pt")


def test_too_little_memory_to_read_a_checkpoint_is_not_called_damage(tmp_path, monkeypatch):
    """A stand-in for a machine with less memory than the file needs: ckpt_prev.pt would need as much."""
    model = GPT(GPTConfig(block_size=8, vocab_size=16, n_layer=1, n_head=1, n_embd=8))
    args = dict(n_layer=1, n_head=1, n_embd=8, block_size=8, bias=True, vocab_size=16, dropout=0.0)
    for name in ("ckpt.pt", "ckpt_prev.pt"):
        torch.save(dict(model=model.state_dict(), model_args=args), tmp_path / name)

    def full(*args, **options):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    monkeypatch.setattr(torch, "load", full)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        checkpoint.RunFiles(str(tmp_path)).load_either()


def test_a_last_line_of_metrics_without_its_end_gets_one(tmp_path):
    """A process that is killed between the two, or an editor: the next line would be glued to it."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "iter", "iter": 0}\n{"kind": "iter", "iter": 1}')
    log.rewind_metrics(str(path), 2, True)
    assert path.read_text() == '{"kind": "iter", "iter": 0}\n{"kind": "iter", "iter": 1}\n'
