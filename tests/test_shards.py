"""
Token files in their three formats, and the order in which training visits them.
References: headers and files written by hand with struct and NumPy; the order rule of the README.
Run: pytest tests/test_shards.py
"""

import hashlib
import json
import os
import struct
import subprocess
import sys
import time

import numpy as np
import pytest

from sologpt import shards
from sologpt.files import atomic_file, sha256_of
from sologpt.shards import DataError, Windows, find_data, find_shards, write_shard

IDS = np.arange(1000, dtype=np.uint16) * 7 % 251


def tokens_in(folder, split):
    """All tokens of a split, by way of windows of one token each."""
    windows = Windows(find_shards(folder, split), 1, 2**32)
    rows = windows.read(np.arange(len(windows)))
    ends = np.cumsum([shard.count - 1 for shard in windows.shards])
    return np.concatenate([np.append(part[:, 0], part[-1, 1]) for part in np.split(rows, ends[:-1])])


def windows_of(tmp_path, *parts, block_size=10):
    for number, part in enumerate(parts, 1):
        write_shard(tmp_path / f"a_train_{number:06d}.bin", np.asarray(part, dtype=np.uint16))
    return Windows(find_shards(tmp_path, "train"), block_size, 1000)


# -----------------------------------------------------------------------------
# formats


def test_a_shard_has_llmcs_header_and_its_tokens(tmp_path):
    path = tmp_path / "x_train_000001.bin"
    write_shard(path, IDS)
    raw = path.read_bytes()
    assert struct.unpack("<256i", raw[:1024]) == (20240520, 1, 1000) + (0,) * 253
    assert np.array_equal(np.frombuffer(raw[1024:], dtype="<u2"), IDS)
    write_shard(path, IDS.astype(np.uint32) + 100_000)
    raw = path.read_bytes()
    assert struct.unpack("<3i", raw[:12]) == (20240801, 7, 1000)
    assert np.array_equal(np.frombuffer(raw[1024:], dtype="<u4"), IDS.astype(np.uint32) + 100_000)


def test_all_three_formats_are_read(tmp_path):
    header = struct.pack("<256i", 20240520, 1, 600, *[0] * 253)
    for split in ("train", "val"):
        for kind in ("llmc", "npy", "nano"):
            (tmp_path / kind).mkdir(exist_ok=True)
        (tmp_path / "llmc" / f"edu_fineweb_{split}_000000.bin").write_bytes(header + IDS[:600].tobytes())
        write_shard(tmp_path / "llmc" / f"edu_fineweb_{split}_000001.bin", IDS[600:].astype(np.uint32))
        np.save(tmp_path / "npy" / f"edufineweb_{split}_000000.npy", IDS[:600])
        np.save(tmp_path / "npy" / f"edufineweb_{split}_000001.npy", IDS[600:].astype(np.uint32))
        IDS.tofile(tmp_path / "nano" / f"{split}.bin")
        for kind in ("llmc", "npy", "nano"):
            assert np.array_equal(tokens_in(tmp_path / kind, split), IDS), kind
            counts = [shard.count for shard in find_shards(tmp_path / kind, split)]
            assert sum(counts) == 1000 and {type(count) for count in counts} == {int}


def test_headered_shards_come_before_npy_before_raw(tmp_path):
    IDS[:100].tofile(tmp_path / "train.bin")
    IDS[:100].tofile(tmp_path / "val.bin")
    assert find_shards(tmp_path, "train")[0].count == 100
    np.save(tmp_path / "b_train_000001.npy", IDS[:200])
    assert find_shards(tmp_path, "train")[0].count == 200
    write_shard(tmp_path / "c_train_000001.bin", IDS[:300])
    assert find_shards(tmp_path, "train")[0].count == 300
    with pytest.raises(FileNotFoundError, match="has no val tokens.*in the format of the other split"):
        find_shards(tmp_path, "val")


def test_a_split_is_recognised_whatever_else_is_in_the_name(tmp_path):
    names = dict(
        train=["medieval_train_000001.bin", "train_medieval_000001.bin", "val_train-medieval_000001.bin"],
        val=["pretrain_val_000000.bin", "pretrained_medieval_000000.bin", "train_val_trained_000000.bin"],
    )
    for name in names["train"] + names["val"]:
        write_shard(tmp_path / name, IDS)
    for split, expected in names.items():
        assert [os.path.basename(shard.path) for shard in find_shards(tmp_path, split)] == expected


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a_train_000001.bin", b"", "does not start with llm.c's shard header"),
        ("a_train_000001.bin", b"\1\2" * 2000, "does not start with llm.c's shard header"),
        ("a_train_000001.bin", struct.pack("<256i", 20240520, 7, 4, *[0] * 253), "does not start with"),
        (
            "a_train_000001.bin",
            struct.pack("<256i", 20240520, 1, 4, *[0] * 253) + b"1234567",
            "1,031 bytes.*cut short",
        ),
        ("a_train_000001.npy", b"\x93NUMPY", "is not a whole .npy file"),
        ("train.bin", b"123", "odd number of bytes"),
        ("train.bin", IDS.astype(np.int64).tobytes(), r"0 for every other token.*\.astype\(np\.uint16\)"),
        (
            "train.bin",
            IDS.astype(np.uint32).tobytes(),
            "0 for every other token, as numbers of 32 or",
        ),
        (
            "train.bin",
            struct.pack("<256i", 20240520, 1, 4, *[0] * 253) + b"12345678",
            "llm.c's shard header; rename it to NAME_train_000001.bin",
        ),
        ("train.bin", b"\x93NUMPY\1\0" + b"12" * 99, "is a .npy file; rename it to NAME_train_000001.npy"),
        ("train.bin", b"<!DOCTYPE html>\n" * 9, "is text, or a web page, and no tokens"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as e:
        find_shards(tmp_path, "train")
    assert name in str(e.value)


def test_a_vocabulary_beyond_uint16_is_not_in_a_file_of_uint16(tmp_path):
    for split in ("train", "val"):
        (IDS.astype(np.uint32) + 70_000).tofile(tmp_path / f"{split}.bin")
    with pytest.raises(ValueError, match="a vocabulary of 100,277 ids, but uint16 tokens"):
        shards.open_splits(tmp_path, 8, 100_277)
    for split in ("train", "val"):  # as the message says
        np.save(tmp_path / f"a_{split}_000000.npy", IDS.astype(np.uint32) + 70_000)
        (tmp_path / f"{split}.bin").unlink()
    train, _ = shards.open_splits(tmp_path, 8, 100_277)
    assert train.read(np.array([0])).tolist() == [(IDS[:9].astype(int) + 70_000).tolist()]


def test_bytes_after_the_end_of_an_npy_file_are_refused(tmp_path):
    np.save(tmp_path / "a_train_000001.npy", np.zeros(9, dtype=np.uint16))
    with open(tmp_path / "a_train_000001.npy", "ab") as f:
        f.write(bytes(100))
    with pytest.raises(ValueError, match="has 246 bytes, its header promises 146: it was damaged"):
        find_shards(tmp_path, "train")


def test_arrays_that_savez_wrote_are_no_npy_file(tmp_path):
    with open(tmp_path / "a_train_000001.npy", "wb") as f:
        np.savez(f, np.zeros(9, dtype=np.uint16))
    with pytest.raises(ValueError, match="a_train_000001.npy is not a whole .npy file"):
        find_shards(tmp_path, "train")


def test_a_path_that_begins_with_a_dot_is_no_name_in_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("data/books", "books"):
        os.makedirs(folder)
    assert find_data("books") == os.path.join("data", "books") and find_data("./books") == "./books"
    assert find_data(".") == "." and find_data("data/books") == "data/books"
    # nanoGPT looks in data/.. only
    os.mkdir("beside")
    assert find_data("../beside") == os.path.join("data", "../beside")


def test_an_npy_file_must_hold_a_row_of_tokens(tmp_path):
    np.save(tmp_path / "a_train_000001.npy", np.zeros((2, 3), dtype=np.uint16))
    with pytest.raises(ValueError, match=r"uint16 of shape \(2, 3\)"):
        find_shards(tmp_path, "train")
    np.save(tmp_path / "a_train_000001.npy", np.zeros(3, dtype=np.float32))
    with pytest.raises(ValueError, match="holds float32"):
        find_shards(tmp_path, "train")


def test_a_missing_folder_or_split_says_what_to_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder data/nowhere.*python prepare_fineweb.py"):
        find_data("nowhere")
    with pytest.raises(FileNotFoundError, match="no folder"):
        find_data("")
    write_shard(tmp_path / "a_train_000001.bin", IDS)
    with pytest.raises(FileNotFoundError, match="has no val tokens.*python prepare_fineweb.py"):
        find_shards(tmp_path, "val")


def test_one_character_a_line_is_not_taken_for_wider_numbers(run, tiny, tmp_path):
    text = "".join(f"{letter}\n" for letter in "acgt" * 800)
    (tmp_path / "dna.txt").write_text(text)
    run("prepare_fineweb.py", "--input=dna.txt", "--encoding=characters")
    tokens = tokens_in(tmp_path / "data/dna", "train")
    assert not tokens[1::2].any() and tokens[:8:2].tolist() == [1, 2, 3, 4]
    train = tmp_path / "data/dna/train.bin"
    train.write_bytes(np.resize(tokens, 2000).astype(np.uint32).tobytes())
    with pytest.raises(ValueError, match="0 for every other token"):
        find_shards(tmp_path / "data/dna", "train")


def test_a_shard_is_hashed_again_only_if_it_is_newer_than_meta_json(tmp_path):
    path, meta = tmp_path / "x_train_000001.bin", tmp_path / "meta.json"
    write_shard(path, IDS)
    meta.write_text("{}")
    os.utime(tmp_path, ns=(0, 0))
    for newer, expected in ((-1, "recorded"), (0, "recorded"), (1, sha256_of(path))):
        os.utime(path, ns=(0, meta.stat().st_mtime_ns + newer))
        assert shards.current_sha256(path, "recorded") == expected


def test_a_shard_that_meta_json_lists_and_is_not_there_is_pointed_out(tmp_path, capsys):
    for name in ("x_train_000001.bin", "x_val_000000.bin"):
        write_shard(tmp_path / name, IDS)
    listed = {name: dict(sha256="0") for name in ("x_val_000000.bin", "x_train_000001.bin")}
    (tmp_path / "meta.json").write_text(json.dumps(dict(files=listed)))
    shards.open_splits(tmp_path, 4, 2**16)
    assert capsys.readouterr().err == ""
    listed["x_train_000002.bin"] = dict(sha256="0")
    (tmp_path / "meta.json").write_text(json.dumps(dict(files=listed)))
    shards.open_splits(tmp_path, 4, 2**16)
    assert "lacks x_train_000002.bin, which its meta.json lists" in capsys.readouterr().err


def test_files_that_seem_to_be_missing_and_those_that_are_not_read_are_pointed_out(tmp_path, capsys):
    def warnings(*names):
        for name in names:
            write_shard(tmp_path / name, IDS)
        shards.open_splits(tmp_path, 4, 2**16)
        return capsys.readouterr().err

    first = [f"x_train_{number}.bin" for number in range(8, 12)]  # 10, 11, 8, 9 by name
    assert warnings("x_val_0.bin", *first) == ""
    assert "lacks x_train_12.bin, x_train_13.bin, if its numbers have no gaps" in warnings("x_train_14.bin")
    (tmp_path / "x_train_14.bin").unlink()
    error = warnings("x_TRAIN_12.bin", "train.bin")
    assert "not read, as their names do not go with x_train_10.bin: train.bin, x_TRAIN_12.bin" in error
    assert "lacks" not in error


def test_a_digest_is_of_all_of_a_file(tmp_path):
    content = np.random.RandomState(0).bytes(2_500_000)
    (tmp_path / "file").write_bytes(content)
    assert sha256_of(tmp_path / "file") == hashlib.sha256(content).hexdigest()


def test_all_bytes_have_left_the_process_when_they_are_synced_to_disk(tmp_path, monkeypatch):
    sizes, fsync = [], os.fsync

    def noting_the_size(f):
        sizes.append(os.fstat(f).st_size)
        fsync(f)

    monkeypatch.setattr(os, "fsync", noting_the_size)
    write_shard(tmp_path / "x_train_000001.bin", IDS)
    assert sizes[0] == 1024 + 2 * len(IDS)
    assert len(sizes) == 1 + (os.name == "posix")  # and the folder's


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_file(path) as f:
        f.write(b"half")
        raise RuntimeError
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["file"]


# -----------------------------------------------------------------------------
# windows and their order


def test_windows_are_the_tokens_in_steps_of_block_size_within_each_file(tmp_path):
    windows = windows_of(tmp_path, range(0, 35), range(100, 121), range(200, 205), range(300, 311))
    rows = windows.read(np.arange(len(windows)))
    # 4 + 5 tokens at file ends, and a short file, unused
    assert [row[0] for row in rows] == [0, 10, 20, 100, 110, 300]
    assert all(np.array_equal(row, np.arange(row[0], row[0] + 11)) for row in rows)
    assert rows.dtype == np.int64


def test_every_epoch_visits_every_window_once_in_another_order(tmp_path):
    windows = windows_of(tmp_path, range(500), range(500, 900))
    n = len(windows)
    epochs = [windows.training(e * n, n, seed=1).tolist() for e in range(3)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert epochs[0] != list(range(n))
    assert windows.training(0, n, seed=2).tolist() != epochs[0]


def test_a_sequence_depends_on_its_number_only(tmp_path):
    windows = windows_of(tmp_path, range(500))
    at_once = windows.training(0, 120, seed=1)
    for size in (1, 7, 40):
        in_parts = np.concatenate([windows.training(k, size, seed=1) for k in range(0, 120, size)])[:120]
        assert np.array_equal(in_parts, at_once)


def test_the_order_has_an_end_that_is_said(tmp_path):
    windows = windows_of(tmp_path, range(500))
    last = len(windows) * 2**32
    assert len(windows.training(last - 3, 3, seed=1)) == 3
    with pytest.raises(DataError, match="is past the 4,294,967,296 epochs"):
        windows.training(last - 3, 4, seed=1)


def test_the_order_is_the_same_in_every_version_and_on_every_machine():
    assert shards.epoch_order(10, 1337, 0).tolist() == [3, 4, 5, 9, 7, 1, 6, 0, 8, 2]
    assert shards.epoch_order(10, 1337, 1).tolist() == [0, 8, 2, 1, 3, 9, 6, 4, 5, 7]


def test_every_later_epoch_cuts_the_text_in_other_places(tmp_path):
    windows = windows_of(tmp_path, range(503), range(600, 814))  # the last 2 and 3 tokens are in no window
    n, B = len(windows), windows.block_size
    epochs = []
    for epoch in range(3):
        numbers, shifts = windows.training(epoch * n, n, 1), windows.shifts(epoch * n, n, 1)
        shift = shifts[0]
        assert shifts.tolist() == [shift] * n and 0 <= shift < B and bool(shift) == bool(epoch)
        rows = windows.read(numbers, shifts)
        # each window so much later, the last one of a file in part at its beginning
        expected = [np.arange(10 * i + shift, 10 * i + shift + B + 1) % 503 for i in range(50)]
        expected += [600 + np.arange(10 * i + shift, 10 * i + shift + B + 1) % 214 for i in range(21)]
        assert sorted(rows.tolist()) == sorted(window.tolist() for window in expected)
        inputs = rows[:, :-1]
        assert len(np.unique(inputs)) == inputs.size  # none twice
        epochs.append(shift)
    assert len(set(epochs)) == 3 and max(epochs) > 3  # so that a window goes on at the beginning
    # a batch across the end of an epoch
    assert windows.shifts(n - 1, 3, 1).tolist() == [0, epochs[1], epochs[1]]
    assert [shards.epoch_shift(1024, 1337, epoch) for epoch in range(4)] == [0, 407, 701, 289]
    windows.shifting = False
    assert windows.shifts(n - 1, 3, 1).tolist() == [0, 0, 0]


def test_evaluation_windows_are_spread_evenly_and_never_too_many(tmp_path):
    windows = windows_of(tmp_path, range(1001))
    assert windows.spread(4).tolist() == [0, 25, 50, 75]
    assert windows.spread(1000).tolist() == list(range(100))


def test_too_little_data_for_one_window_is_an_error(tmp_path):
    assert len(windows_of(tmp_path, range(11))) == 1
    with pytest.raises(ValueError, match=r"10 tokens.* no window of block_size=10.* lower --block_size"):
        windows_of(tmp_path, range(10))


def test_an_id_that_the_tokenizer_lacks_is_refused_with_its_place(tmp_path):
    windows = windows_of(tmp_path, range(500), range(990, 1011))  # of ids below 1000
    assert windows.read(np.array([48])).max() == 490
    with pytest.raises(
        DataError, match="a_train_000002.bin has the token id 1000 at position 10, but its tok.*below 1000"
    ):
        windows.read(np.array([48, 49, 50]))
    windows.n_ids = 491  # the highest id of these windows is the last one allowed, and the first one not
    assert windows.read(np.array([48])).max() == 490
    windows.n_ids = 490
    with pytest.raises(DataError, match="has the token id 490 at position 490, but .* below 490"):
        windows.read(np.array([48]))


def test_reading_a_large_file_does_not_fill_memory(tmp_path):
    write_shard(tmp_path / "a_train_000001.bin", np.zeros(200_000_000, dtype=np.uint16))  # 400 MB
    script = """
import resource, sys, numpy as np
from sologpt import shards
windows = shards.Windows(shards.find_shards(sys.argv[1], "train"), 1000, 10)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for first in range(0, 200_000 - 1, 100):
    windows.read(windows.training(first % len(windows), 100, seed=1))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    out = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert float(out.stdout) < (60 if sys.platform != "darwin" else 60 * 1024)  # MB; macOS counts in bytes


@pytest.mark.parametrize(
    "counts",
    [
        7,
        None,
        {"tokens": 1},
        {"tokens": 1, "bytes": 0},
        {"tokens": -1, "bytes": 3},
        {"tokens": float("nan"), "bytes": 3},
        {"tokens": 10**400, "bytes": 3},
    ],
)
def test_a_meta_json_of_another_shape_gives_no_bits_per_byte(tmp_path, counts):
    write_shard(tmp_path / "x_val_000000.bin", IDS[:1])
    found = find_shards(tmp_path, "val")
    (tmp_path / "meta.json").write_text(json.dumps({"val": {"tokens": 1, "bytes": 4}}))
    assert shards.tokens_per_byte(found) == 0.25
    (tmp_path / "meta.json").write_text(json.dumps({"val": counts}))
    assert shards.tokens_per_byte(found) is None
    (tmp_path / "meta.json").write_text('{"val": ')  # somebody writes it while a run evaluates
    assert shards.tokens_per_byte(found) is None


def test_files_that_are_not_those_of_meta_json_are_pointed_out_and_have_no_bits_per_byte(run, tiny, tmp_path):
    (tmp_path / "a.txt").write_text("".join(f"pack my box with {i} jugs now.\n" for i in range(2000)))
    argv = ["--input=a.txt", "--txt_documents=line", "--encoding=bytes", "--out_dir=data/toy", "--workers=1"]
    run("prepare_fineweb.py", *argv, "--shard_tokens=30000", "--val_tokens=2000")
    train = [*tiny, "--dataset=toy", "--max_iters=1"]
    whole = run("train.py", *train)
    assert "bits/byte" in whole.stdout and "warning" not in whole.stderr
    val = tmp_path / "data/toy/a_val_000000.bin"
    longer = np.resize(np.fromfile(val, np.uint16, offset=1024), 3000)
    write_shard(tmp_path / "data/toy/a_val_000001.bin", longer)
    out = run("train.py", *train)
    assert "toy has a_val_000001.bin, which its meta.json does not list" in out.stderr
    assert "bits/byte" not in out.stdout
    os.replace(tmp_path / "data/toy/a_val_000001.bin", val)
    os.utime(val, ns=(0, 2 * time.time_ns()))
    out = run("train.py", *train)
    assert "toy: a_val_000000.bin: damaged or replaced since meta.json was written" in out.stderr
    assert "bits/byte" not in out.stdout
