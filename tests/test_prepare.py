"""
Preparing text: what is read, what is written, and what is said when it cannot be.
References: a plain loop over the same texts; tiktoken itself; a run that nobody killed.
Run: pytest tests/test_prepare.py
"""

import ast
import contextlib
import csv
import functools
import gzip
import hashlib
import http.server
import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
import urllib.parse
import zlib
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
import tiktoken_ext.openai_public
import torch
from conftest import ENV, ROOT
from hypothesis import given
from hypothesis import strategies as st

import prepare_fineweb
from configurator import configure
from prepare_fineweb import (
    PrepareConfig,
    Progress,
    choose,
    encode_parts,
    push_out,
    train_command,
)
from sologpt import characters, documents, files, shards
from sologpt.documents import Part, Position, pieces, read_chunks, read_json, read_parts, read_text, retrying
from sologpt.errors import UserError
from sologpt.source import find_files, name_of
from sologpt.tokenizer import EOT, find_tokenizer, read_tokenizer

TEXTS = [f"Document {i}: " + "some words, ünd möre. " * (1 + i % 7) for i in range(200)]


def tokens_in(folder, split):
    """All tokens of a split, read without the project's own reader."""
    return np.concatenate(
        [np.fromfile(path, np.uint16)[512:] for path in sorted(folder.glob(f"*{split}*.bin"))]
    )


def documents_in(folder, eot=256):
    """The documents of each split, in order of appearance, as lists of ids."""
    found = {}
    for split in ("train", "val"):
        ids = tokens_in(folder, split)
        assert ids[0] == eot
        found[split] = [part[1:].tolist() for part in np.split(ids, np.flatnonzero(ids == eot)[1:])]
    return found


def prepare(run, *argv, **options):
    flags = ["--encoding=bytes", "--out_dir=out"]
    if "--encoding=characters" not in argv:
        flags.append("--workers=1")  # a process, whose start takes longer than these texts
    return run("prepare_fineweb.py", *flags, *argv, **options)


def write_jsonl(path, texts, name="text"):
    path.write_text("".join(json.dumps({name: text, "id": i}) + "\n" for i, text in enumerate(texts)))


def write_json(path, texts):
    path.write_text(json.dumps([{"id": i, "text": text} for i, text in enumerate(texts)], indent=1))


def write_csv(path, texts):
    with open(path, "w", newline="", encoding="utf-8") as f:
        rows = csv.writer(f)
        rows.writerow(["id", "text"])
        rows.writerows(enumerate(texts))


def write_arrow(path, texts, new=pyarrow.ipc.new_stream):
    table = pyarrow.table({"id": range(len(texts)), "text": texts})
    with new(path, table.schema) as f:
        f.write_table(table, max_chunksize=70)


def write_arrow_file(path, texts):
    write_arrow(path, texts, pyarrow.ipc.new_file)


def compressed(write, codec):
    def write_compressed(path, texts):
        write(path, texts)
        path.write_bytes(pyarrow.compress(path.read_bytes(), codec, asbytes=True))

    return write_compressed


def test_every_document_lands_whole_in_one_split(run, tmp_path):
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    out = prepare(run, "--input=a.jsonl", "--shard_tokens=5000", "--val_tokens=1000")
    found = documents_in(tmp_path / "out")
    expected = [list(text.encode()) for text in TEXTS]
    assert sorted(found["train"] + found["val"]) == sorted(expected)
    n = {split: sum(len(document) + 1 for document in found[split]) for split in found}
    assert 1000 <= n["val"] < 1000 + max(map(len, expected))
    positions = [expected.index(document) for document in found["val"]]
    assert min(positions) < 60 and max(positions) > 140  # from all over the source
    assert positions == sorted(positions)
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    count = -(-n["train"] // 5000)
    assert names == [f"a_train_{i:06d}.bin" for i in range(1, count + 1)] + [
        "a_val_000000.bin",
        "meta.json",
    ]
    assert all((tmp_path / "out" / name).stat().st_size == 1024 + 2 * 5000 for name in names[: count - 1])
    meta = json.loads((tmp_path / "out/meta.json").read_text())
    assert (meta["encoding"], meta["vocab_size"], meta["eot_token"]) == ("bytes", 257, 256)
    assert meta["source"].startswith(f"a.jsonl: 1 files, {(tmp_path / 'a.jsonl').stat().st_size:,} bytes, ")
    for split in found:
        n_bytes = sum(map(len, found[split]))
        assert meta[split] == dict(tokens=n[split], documents=len(found[split]), bytes=n_bytes)
        assert (
            f"{split}: {n[split]:,} tokens of {len(found[split])} documents, {n_bytes:,} bytes" in out.stdout
        )
    assert sorted(meta["files"]) == names[:-1]
    for name, about in meta["files"].items():
        raw = (tmp_path / "out" / name).read_bytes()
        assert about == dict(tokens=(len(raw) - 1024) // 2, sha256=hashlib.sha256(raw).hexdigest())
    assert "next: python train.py config/text_1m.py --dataset=./out\n" in out.stdout


@pytest.mark.parametrize(
    "source, name",
    [
        ("", "fineweb"),
        ("stdlib", "stdlib"),
        ("my texts/", "my-texts"),
        ("books/*.txt,other", "books"),
        ("novel.txt.gz", "novel"),
        ("../books/**/*.md", "books"),
        ("https://example.org/a/novel.txt?raw=1", "novel"),
    ],
)
def test_folder_and_shards_are_named_after_the_source(source, name):
    assert name_of(source) == name


def test_a_comma_divides_unless_a_file_has_it_in_its_name(tmp_path):
    for name in ("a.txt", "b,c.txt"):
        (tmp_path / name).write_text(name)
    a, with_comma = str(tmp_path / "a.txt"), str(tmp_path / "b,c.txt")
    assert find_files(with_comma)[0] == [with_comma]
    assert find_files(f"{a},{tmp_path}")[0] == [a, with_comma]


def test_a_link_to_itself_and_slashes_too_many_are_no_traceback(run, tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    error = prepare(run, "--input=loop", "--out_dir=", status=1).stderr
    assert "--input=loop: no such file or folder" in error
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    assert find_files(f"//{tmp_path}/*.jsonl")[0] == [str(tmp_path / "a.jsonl")]


@pytest.mark.parametrize(
    "tokens, config",
    [
        (2_400_000, "text_1m"),
        (29_000_000, "text_10m"),
        (90_000_000, "text_100m"),
        (10**10, "fineweb_125m_fast"),
    ],
)
def test_the_next_command_has_a_config_for_so_much_text(tokens, config):
    cfg = configure(PrepareConfig, ["--input=novels"])
    assert train_command(cfg, tokens) == f"python train.py config/{config}.py --dataset=novels"


def test_a_folder_without_known_endings_says_which_it_has(run, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/a.md").write_text("# one")
    (tmp_path / "notes/b.md").write_text("# two")
    (tmp_path / "notes/c.rst").write_text("three")
    error = run("prepare_fineweb.py", "--input=notes", "--encoding=bytes", status=1).stderr
    assert "files, but .md, .rst; to read such files as text: --endings=.md\n" in error
    (tmp_path / "notes/picture.PNG").write_bytes(b"PNG")
    options = ["--encoding=bytes", "--val_tokens=2", "--out_dir=both"]
    out = run("prepare_fineweb.py", "--input=notes", "--endings=.md, .RST", *options).stdout
    assert "source: 3 files; passed over: 1 .PNG\n" in out
    wrong = run("prepare_fineweb.py", "--input=notes", "--endings=md", status=2).stderr
    assert "endings begin with a dot, as in .md,.rst; not 'md'" in wrong
    wrong = run("prepare_fineweb.py", "--input=notes", "--endings=.md,.CSV", *options, status=2).stderr
    assert "endings: .CSV is read already, and not always as text; omit it" in wrong
    (tmp_path / "notes/picture.PNG").unlink()
    out = run("prepare_fineweb.py", "--input=notes/**/*.*", "--encoding=bytes", "--val_tokens=2").stdout
    assert "source: 3 files" in out and (tmp_path / "data/notes/notes_val_000000.bin").exists()


def test_the_same_source_gives_the_same_files_and_is_not_prepared_twice(run, tmp_path):
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    prepare(run, "--input=a.jsonl")
    first = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert "out is prepared already" in prepare(run, "--input=a.jsonl").stdout
    meta = first["meta.json"].decode()
    (tmp_path / "out/meta.json").write_text(meta.replace('"train"', '"trian"'))
    assert "meta.json is damaged, or not a" in prepare(run, "--input=a.jsonl", status=1).stderr
    (tmp_path / "out/meta.json").write_text(meta)
    prepare(run, "--input=a.jsonl", "--out_dir=again")
    assert {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()} == first
    refused = prepare(run, "--input=a.jsonl", "--val_tokens=500", status=1)
    assert "out was prepared with other settings (val_tokens: 1000000 there, 500 now)" in refused.stderr
    for option, values in (
        ("txt_documents", "'file' there, 'line' now"),
        ("text_key", "'text' there, 'line' now"),
        ("max_tokens", "0 there, 2000000 now"),
        ("shard_tokens", "100000000 there, 2000000 now"),
    ):
        value = values.split()[2].strip("'")
        refused = prepare(run, "--input=a.jsonl", f"--{option}={value}", status=1)
        assert f"out was prepared with other settings ({option}: {values})" in refused.stderr
    write_jsonl(tmp_path / "a.jsonl", TEXTS[1:])
    assert (
        "out was prepared with other settings (source: " in prepare(run, "--input=a.jsonl", status=1).stderr
    )
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    (tmp_path / "out/a_val_000000.bin").write_bytes(b"")
    assert "does not start with llm.c's shard header" in prepare(run, "--input=a.jsonl", status=1).stderr
    (tmp_path / "out/meta.json").unlink()
    assert "out holds tokens of another origin" in prepare(run, "--input=a.jsonl", status=1).stderr


def test_text_jsonl_and_parquet_may_be_mixed_in_a_folder(run, tmp_path):
    (tmp_path / "in/deep").mkdir(parents=True)
    write_jsonl(tmp_path / "in/a.jsonl", TEXTS[:50])
    datasets.Dataset.from_dict({"text": TEXTS[50:100]}).to_parquet(tmp_path / "in/deep/b.parquet")
    for i, text in enumerate(TEXTS[100:150]):
        (tmp_path / f"in/{i:03d}.txt").write_text(text)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS[150:180]).encode()
    (tmp_path / "in/c.jsonl.gz").write_bytes(gzip.compress(lines[:999]) + gzip.compress(lines[999:]))
    separated = "<|endoftext|>".join(TEXTS[180:]).encode()
    (tmp_path / "in/d.txt.zst").write_bytes(pyarrow.compress(separated, codec="zstd", asbytes=True))
    (tmp_path / "in/ignored.py").write_text("not a text")
    prepare(run, "--input=in")
    found = documents_in(tmp_path / "out")
    assert sorted(found["train"] + found["val"]) == sorted(list(text.encode()) for text in TEXTS)


ODD_TEXTS = [
    *TEXTS,
    "",
    'a "quoted", word',
    "lines\r\n\nof\ta {text}, [1]",
    "漢字 \U0001f600\u2028",
    "x " * 999_999,
]


@pytest.mark.parametrize(
    "name, write",
    [
        ("a.json", write_json),
        ("a.json", lambda path, texts: path.write_text(json.dumps(texts, ensure_ascii=False), "utf-8-sig")),
        ("a.json.zst", compressed(write_json, "zstd")),
        ("a.json.gz", compressed(write_jsonl, "gzip")),  # as C4 calls them
        ("a.csv", write_csv),
        ("a.csv.gz", compressed(write_csv, "gzip")),
        ("a.arrow", write_arrow),
        ("a.arrow", write_arrow_file),
    ],
)
def test_every_kind_of_file_gives_the_shards_of_jsonl(run, tmp_path, name, write):
    write_jsonl(tmp_path / "a.jsonl", ODD_TEXTS)
    write(tmp_path / name, ODD_TEXTS)
    prepare(run, "--input=a.jsonl", "--shard_tokens=500000", "--val_tokens=9000", "--out_dir=jsonl")
    prepare(run, f"--input={name}", "--shard_tokens=500000", "--val_tokens=9000")
    found, expected = contents(tmp_path / "out"), contents(tmp_path / "jsonl")
    assert len(found) == 7 and found.pop("meta.json") != expected.pop("meta.json")  # they name their sources
    assert found == expected


@pytest.mark.parametrize("name", ["a.json", "a.csv", "stream.arrow", "file.arrow"])
def test_each_kind_is_continued_from_any_place(tmp_path, name, monkeypatch):
    write = dict(json=write_json, csv=write_csv, stream=write_arrow, file=write_arrow_file)
    write[name.removeprefix("a.").removesuffix(".arrow")](tmp_path / name, TEXTS)
    monkeypatch.setattr(documents, "CHUNK", 1500)  # some twenty places
    cfg = configure(PrepareConfig, [])
    files = [str(tmp_path / name)]
    chunks = list(read_chunks(files, cfg, Position()))
    assert [part.text for _, parts in chunks for part in parts] == TEXTS and len(chunks) > 9
    for i, (position, _) in enumerate(chunks[:-1], 1):
        assert list(read_chunks(files, cfg, position)) == chunks[i:]


@pytest.mark.parametrize("start", ["", "\ufeff", "\n \n"])
def test_a_json_file_with_an_object_a_line_is_read_as_such(tmp_path, start):
    path = tmp_path / "a.json"
    path.write_text(start + '{"text": "one"}\n\n{"text": null}\r\n{"text": "two"}', encoding="utf-8")
    assert list(documents.read_json(str(path), "text")) == [("one", True), ("", True), ("two", True)]
    path.write_text(start + '{\n  "text": "one"\n}', encoding="utf-8")
    with pytest.raises(UserError, match="neither a JSON array nor an object a line"):
        list(documents.read_json(str(path), "text"))


@pytest.mark.parametrize("write", [write_json, write_arrow, write_arrow_file])
def test_a_file_that_is_cut_off_anywhere_is_noticed(tmp_path, write):
    path = tmp_path / f"a{write.__name__.replace('write_', '.').removesuffix('_file')}"
    write(path, TEXTS[:80])
    raw, cfg = path.read_bytes(), configure(PrepareConfig, [])
    for end in range(0, len(raw), 61 if write is write_json else 13):
        path.write_bytes(raw[:end])
        with pytest.raises(UserError, match=f"cannot read {re.escape(str(path))} after [0-9]+ documents: .+"):
            list(read_chunks([str(path)], cfg, Position()))


def test_a_stream_without_its_end_was_cut_off_between_two_batches(run, tmp_path):
    write_arrow(tmp_path / "a.arrow", TEXTS)
    raw = (tmp_path / "a.arrow").read_bytes()
    assert raw.endswith(b"\xff\xff\xff\xff\0\0\0\0")
    (tmp_path / "a.arrow").write_bytes(raw[:-8])
    error = prepare(run, "--input=a.arrow", status=1).stderr
    assert "cannot read a.arrow after 200 documents: the end of the stream is missing" in error
    (tmp_path / "a.arrow").write_bytes(raw + raw)
    error = prepare(run, "--input=a.arrow", status=1).stderr
    assert "cannot read a.arrow after 200 documents: another stream follows the first one" in error


def test_a_folder_of_save_to_disk_is_read_without_what_it_says_of_itself(run, tmp_path):
    parts = dict(train=datasets.Dataset.from_dict({"text": TEXTS[:150]}))
    parts["test"] = datasets.Dataset.from_dict({"text": TEXTS[150:]})
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "in", num_shards=dict(train=2, test=1))
    out = prepare(run, "--input=in").stdout
    assert "source: 3 files; passed over: 5 of datasets' own .json\n" in out
    found = documents_in(tmp_path / "out")
    assert sorted(found["train"] + found["val"]) == sorted(list(text.encode()) for text in TEXTS)
    # saved again in fewer parts, with a cache beside it: datasets removes neither
    loaded = datasets.load_from_disk(tmp_path / "in/train").map(lambda row: dict(text=row["text"] + "!"))
    datasets.Dataset.from_dict({"text": TEXTS[:150]}).save_to_disk(tmp_path / "in/train")
    assert len(loaded) == 150 and len(list((tmp_path / "in/train").glob("*.arrow"))) == 4
    out = prepare(run, "--input=in", "--out_dir=again").stdout
    assert "source: 2 files; passed over: 5 of datasets' own .json, 3 of datasets' caches\n" in out
    assert documents_in(tmp_path / "again") == found
    (tmp_path / "other").mkdir()
    (tmp_path / "other/state.json").write_text('{"version": 1}')
    error = prepare(run, "--input=other", "--out_dir=other.out", status=1).stderr
    assert "other/state.json after 0 documents: line 1 has no text under 'text'" in error


def test_a_dataset_of_the_hubs_kind_is_streamed(spawn, tmp_path):
    """--repo takes a local folder too: the way that FineWeb-Edu takes from the hub, without the network."""
    (tmp_path / "repo").mkdir()
    datasets.Dataset.from_dict({"body": TEXTS, "id": list(range(200))}).to_parquet(
        tmp_path / "repo/train.parquet"
    )
    prepare(spawn, "--repo=repo", "--subset=", "--text_key=body", HF_HOME=str(tmp_path / "hf"))
    found = documents_in(tmp_path / "out")
    assert sorted(found["train"] + found["val"]) == sorted(list(text.encode()) for text in TEXTS)


def test_max_tokens_stops_early(run, tmp_path):
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    prepare(run, "--input=a.jsonl", "--max_tokens=3000")
    meta = json.loads((tmp_path / "out/meta.json").read_text())
    assert meta["train"]["tokens"] + meta["val"]["tokens"] == 3000


def test_max_tokens_cuts_the_document_that_goes_beyond_it(run, tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [*TEXTS[:20], "x" * 100_000, *TEXTS[20:]])
    prepare(run, "--input=a.jsonl", "--max_tokens=5000")
    meta = json.loads((tmp_path / "out/meta.json").read_text())
    before = sum(len(text.encode()) for text in TEXTS[:20])
    assert meta["train"]["tokens"] + meta["val"]["tokens"] == 5000 > before + 20
    assert meta["train"]["documents"] + meta["val"]["documents"] == 21
    assert meta["train"]["bytes"] + meta["val"]["bytes"] == 5000 - 21  # of the text that is taken
    found = documents_in(tmp_path / "out")
    assert b"x" * (5000 - before - 21) in [bytes(ids) for ids in found["train"] + found["val"]]


def test_a_document_that_max_tokens_cuts_is_in_the_split_of_its_whole_text(run, tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [*TEXTS[:40], *TEXTS[:40]])
    twice = sum(len(text.encode()) + 1 for text in TEXTS[:40])
    splits = set()
    for number in range(12):  # one of the first twelve, cut by a token when it comes again
        end = twice + sum(len(text.encode()) + 1 for text in TEXTS[: number + 1])
        prepare(run, "--input=a.jsonl", f"--max_tokens={end - 1}", f"--out_dir=out{number}")
        found = documents_in(tmp_path / f"out{number}")
        whole = list(TEXTS[number].encode())
        [split] = [name for name in found if whole[:-1] in found[name]]
        assert [name for name in found if whole in found[name]] == [split]
        splits.add(split)
    assert splits == {"train", "val"}


def test_the_standard_library_is_always_there(run, tmp_path):
    out = run("prepare_fineweb.py", "--input=stdlib", "--encoding=bytes")
    assert "next: python train.py config/quickstart.py" in out.stdout
    meta = json.loads((tmp_path / "data/stdlib/meta.json").read_text())
    assert meta["train"]["tokens"] > 5_000_000 and meta["val"]["tokens"] >= 1_000_000
    assert b"def " in bytes(i for i in tokens_in(tmp_path / "data/stdlib", "val") if i < 256)


def test_files_come_in_a_fixed_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("b.txt", "a.txt", "c.md"):
        (tmp_path / name).write_text("x")
    assert find_files("*.txt")[0] == ["a.txt", "b.txt"]
    assert find_files("c.md,a.txt,*.txt")[0] == ["c.md", "a.txt", "b.txt"]
    assert [os.path.basename(path) for path in find_files(str(tmp_path))[0]] == ["a.txt", "b.txt"]


@pytest.mark.parametrize(
    "content, divide, expected",
    [
        ("a\n\nb\nc", "file", ["a\n\nb\nc"]),
        ("a\r\n\r\nb\nc", "blank_line", ["a", "b\nc"]),
        ("a\n\nb\r\nc", "line", ["a", "", "b", "c"]),
        ("a\r\rb\r", "blank_line", ["a", "b\n"]),
        ("a\r\n\rb\r", "file", ["a\r\n\rb\r"]),
        ("a<|endoftext|>b\n\nc", "blank_line", ["a", "b\n\nc"]),
        ("\ufeffa", "file", ["a"]),
    ],
)
def test_plain_text_is_divided_into_documents(tmp_path, content, divide, expected):
    path = tmp_path / "a.txt"
    path.write_bytes(content.encode())
    assert list(read_text(str(path), divide)) == [(text, True) for text in expected]


def split(texts, val_tokens, chunk=7):
    """Returns the documents of each split, as bytes, chosen without files and processes."""
    progress, train = Progress(), []
    for first in range(0, len(texts), chunk):
        parts = [Part(text, True, True) for text in texts[first : first + chunk]]
        train += choose(progress, encode_parts(parts, find_tokenizer("bytes")), val_tokens, 0).tolist()
    for tokens in push_out(progress, min(val_tokens, progress.eligible // 10)):
        train += tokens.tolist()
    whole = " ".join("|" if i == 256 else str(i) for i in train).split("|")
    return [bytes(map(int, part.split())) for part in whole[1:]], [
        bytes(e[3][1:].tolist()) for e in progress.heap
    ]


def test_a_tenth_of_a_small_source_goes_to_validation():
    train, val = split([f"{i:09d}" for i in range(200)], 1000)
    assert (len(train), len(val)) == (180, 20)
    train, val = split([f"{i:09d}" for i in range(200)], 100)
    assert (len(train), len(val)) == (190, 10)


def test_validation_is_the_documents_with_the_smallest_hashes_in_whatever_order_they_come():
    texts = [f"{i:09d}" for i in range(200)]
    smallest = sorted(map(str.encode, texts), key=lambda text: hashlib.blake2b(text, digest_size=8).digest())[
        :10
    ]
    for order, chunk in ((texts, 7), (texts, 50), (texts[::-1], 7)):
        train, val = split(order, 100, chunk)
        assert sorted(val) == sorted(smallest) and sorted(train + val) == sorted(map(str.encode, texts))


def test_a_text_that_comes_often_is_never_in_both_splits():
    texts = [f"{i % 40:09d}" for i in range(400)]
    train, val = split(texts, 150)
    assert not set(train) & set(val) and len(train) + len(val) == 400 and len(val) == 20


def test_short_first_documents_and_one_that_outweighs_the_rest(run, tmp_path):
    (tmp_path / "a.txt").write_text("a\n" + "".join(f"a longer line {i:02d}\n" for i in range(50)))
    prepare(run, "--input=a.txt", "--txt_documents=line")
    found = documents_in(tmp_path / "out")
    assert len(found["train"]) + len(found["val"]) == 51 and 4 <= len(found["val"]) <= 8
    (tmp_path / "b.jsonl").write_text(
        json.dumps({"text": "x" * 5000}) + "\n" + json.dumps({"text": "y"}) + "\n"
    )
    refused = prepare(run, "--input=b.jsonl", "--out_dir=b", status=1).stderr
    assert "to train on" in refused and not (tmp_path / "b").exists()


def test_a_name_that_the_dataset_does_not_know_is_one_line(spawn, tmp_path):
    (tmp_path / "repo").mkdir()
    datasets.Dataset.from_dict({"text": TEXTS}).to_parquet(tmp_path / "repo/train.parquet")
    hub = dict(HF_HOME=str(tmp_path / "hf"), status=1)
    out = prepare(spawn, "--repo=repo", "--subset=", "--split=trian", **hub)
    assert (
        "repo  has no split 'trian' (--split); it has train" in out.stderr
        and len(out.stderr.splitlines()) == 1
    )
    out = prepare(spawn, "--repo=repo", "--subset=", "--text_key=body", **hub)
    assert "no text under 'body' (--text_key); it has text" in out.stderr
    out = prepare(spawn, "--repo=nowhere", "--subset=", HF_HUB_OFFLINE="1", **hub)
    assert "cannot open nowhere  (--repo, --subset): Couldn't reach" in out.stderr


def test_a_damaged_meta_json_is_named(run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/meta.json").write_text("{")
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    assert (
        "out/meta.json is damaged, or not a preparation's" in prepare(run, "--input=a.jsonl", status=1).stderr
    )


BPE_CACHED = os.environ.get("TIKTOKEN_CACHE_DIR")


@pytest.mark.skipif(not BPE_CACHED, reason="set TIKTOKEN_CACHE_DIR to a folder with tiktoken's gpt2 files")
def test_gpt2_tokens_are_tiktokens_and_a_separator_inside_a_text_is_text(run, tmp_path):
    import tiktoken

    texts = [*TEXTS, "a <|endoftext|> b", "\ud800 lone", "nul \0 and\r\nbreaks"]
    write_jsonl(tmp_path / "a.jsonl", texts)
    run("prepare_fineweb.py", "--input=a.jsonl", "--out_dir=out")
    bpe = tiktoken.get_encoding("gpt2")
    found = documents_in(tmp_path / "out", eot=50256)
    assert sorted(found["train"] + found["val"]) == sorted(bpe.encode_ordinary(text) for text in texts)


@pytest.mark.parametrize(
    "content, argv, message",
    [
        (b"", ["--input=none.txt"], "--input=none.txt: no such file"),
        (
            b"ok \xff",
            ["--input=a.txt"],
            "a.txt after 0 documents: not UTF-8 text: invalid start byte at byte 3",
        ),
        (
            b"one document",
            ["--input=a.txt"],
            "0 tokens to train on and 13 to validate: validation takes whole documents",
        ),
        (
            b"one",
            ["--input=a.txt", "--max_tokens=1"],
            "or one is huge: raise --max_tokens=1, or separate them by <|endoftext|>, or use --txt",
        ),
        (b'{"text": "one"}', ["--input=a.jsonl"], "or one is huge: add some\n"),
        (
            b"  \n",
            ["--input=a.txt"],
            "0 tokens to train on and 0 to validate: no text was read: 1 empty documents, 0 files",
        ),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
            ["--input=a.txt"],
            "only names the file that Git LFS keeps elsewhere; get it with: git lfs pull",
        ),
        (b'{"text": "x"}\n{"text": ', ["--input=a.jsonl"], "a.jsonl after 1 documents: line 2 is not JSON"),
        (b"[" * 10**5, ["--input=a.jsonl"], "cannot read a.jsonl after 0 documents: "),
        (
            b'{"body": "x", "id": 3}',
            ["--input=a.jsonl"],
            "line 1 has no text under 'text' (--text_key); it has body, id",
        ),
        (b'["x"]', ["--input=a.jsonl"], "line 1 is an array, not an object with a text under 'text'"),
        (
            b'[{"text": "x"}, {"text": 3}]',
            ["--input=a.json"],
            "item 2 has a number under 'text' (--text_key), not a text",
        ),
        (b'[{"body": "x"}]', ["--input=a.json"], "1 has no text under 'text' (--text_key); it has body"),
        (b'["x" "y"]', ["--input=a.json"], "a.json after 1 documents: character 5: Expecting ',' or ']'"),
        (b'["x"]\n["y"]', ["--input=a.json"], "after 1 documents: something follows the JSON array"),
        (
            b'["x\xff"]',
            ["--input=a.json"],
            "after 0 documents: not UTF-8 text: invalid start byte at byte",
        ),
        (b"id,body\n1,x", ["--input=a.csv"], "no text under 'text' (--text_key); it has id, body"),
        (b"", ["--input=a.csv"], "no text under 'text' (--text_key); it has nothing"),
        (b"id,text\n1,x\n2\n", ["--input=a.csv"], "after 1 documents: line 3: not as many columns as the"),
        (b'id,text\n1,x\n2,"y', ["--input=a.csv"], "a.csv after 1 documents: line 3: unexpected end of data"),
        (b"ARROW1 damaged", ["--input=a.arrow"], "cannot read a.arrow after 0 documents: "),
        (b"damaged", ["--input=a.arrow"], "cannot read a.arrow after 0 documents: "),
        (b"PAR1 damaged", ["--input=a.parquet"], "cannot read a.parquet after 0 documents: "),
        (
            gzip.compress(b"x" * 999, mtime=0)[:-9],
            ["--input=a.txt.gz"],
            "a.txt.gz after 0 documents: Truncated compressed",
        ),
        (b"not compressed", ["--input=a.txt.zst"], "cannot read a.txt.zst after 0 documents: "),
        (b"short", ["--input=a.txt", "--encoding=characters"], "only 5 characters: too few"),
        (b"x", ["--input=a.txt", "--encoding=gpt3"], "encoding='gpt3' is not known; use one of bytes, "),
    ],
)
def test_a_mistake_is_one_line(run, tmp_path, content, argv, message):
    (tmp_path / argv[0].removeprefix("--input=")).write_bytes(content) if "none" not in argv[0] else None
    out = prepare(run, *argv, status=1)
    assert len(out.stderr.splitlines()) == 1 and message in out.stderr
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("column, what", [("body", "it has id, text"), ("id", "holds int, not text")])
def test_a_column_that_is_not_there_or_no_text_is_one_line(run, tmp_path, column, what):
    write_arrow(tmp_path / "a.arrow", TEXTS)
    error = prepare(run, "--input=a.arrow", f"--text_key={column}", status=1).stderr
    assert f"'{column}' (--text_key)" in error and what in error and len(error.splitlines()) == 1


def test_a_missing_quote_does_not_take_the_rest_of_the_file_into_memory(tmp_path, monkeypatch):
    (tmp_path / "a.csv").write_text('text\none\n"two\n' + "a line\n" * 1000)
    limit = csv.field_size_limit
    monkeypatch.setattr(csv, "field_size_limit", lambda _: limit(70))
    with pytest.raises(UserError, match=r"after 1 documents: line 13: field larger than field limit \(70\)"):
        list(read_chunks([str(tmp_path / "a.csv")], configure(PrepareConfig, []), Position()))


def test_bad_files_are_passed_over_when_asked(run, tmp_path):
    (tmp_path / "in").mkdir()
    write_jsonl(tmp_path / "in/a.jsonl", TEXTS[:50])
    (tmp_path / "in/b.jsonl").write_text(json.dumps({"text": "the last good line"}) + "\n{")
    (tmp_path / "in/c.parquet").write_bytes(b"PAR1")
    write_jsonl(tmp_path / "in/d.jsonl", ["", " \n", None, *TEXTS[50:]])
    assert "b.jsonl after 1 documents" in prepare(run, "--input=in", status=1).stderr
    out = prepare(run, "--input=in", "--skip_bad_files=True")
    assert [line.partition(" after")[0] for line in out.stderr.splitlines()] == [
        "cannot read in/b.jsonl",
        "cannot read in/c.parquet",
    ]
    assert "skipped: 3 empty documents, 2 files" in out.stdout
    found = documents_in(tmp_path / "out")
    expected = [list(text.encode()) for text in [*TEXTS, "the last good line"]]
    assert sorted(found["train"] + found["val"]) == sorted(expected)


def test_the_documents_before_a_bad_byte_are_taken(run, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.txt").write_bytes("<|endoftext|>".join(TEXTS).encode() + b"\xff<|endoftext|>lost")
    out = prepare(run, "--input=in", "--skip_bad_files=True")
    assert f"cannot read in/a.txt after {len(TEXTS) - 1} documents: not UTF-8 text" in out.stderr
    found = documents_in(tmp_path / "out")
    assert sorted(found["train"] + found["val"]) == sorted(list(text.encode()) for text in TEXTS[:-1])


def test_what_is_no_text_is_not_read_as_text(run, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.txt").write_bytes("".join(TEXTS).encode("utf-16-le"))
    error = prepare(run, "--input=in", status=1).stderr
    assert "cannot read in/a.txt after 0 documents: not text: it has many NUL bytes" in error
    with tarfile.open(tmp_path / "books.tar.gz", "w:gz") as tar:
        tar.add(ROOT / "README.md", "book.txt")
    assert "not text" in prepare(run, "--input=books.tar.gz", status=1).stderr


def test_a_slash_at_the_end_of_the_input_makes_no_difference(run, tmp_path):
    (tmp_path / "in").mkdir()
    write_jsonl(tmp_path / "in/a.ndjson", TEXTS)
    prepare(run, "--input=in")
    assert "out is prepared already" in prepare(run, "--input=in/").stdout


@pytest.mark.parametrize("name", ["val.bin", "b_train_000001.npy", "meta.pkl"])
def test_nothing_is_written_beside_tokens_of_another_origin(run, tmp_path, name):
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_bytes(b"12")
    error = prepare(run, "--input=a.jsonl", status=1).stderr
    assert f"out holds tokens of another origin ({name})" in error
    assert [path.name for path in (tmp_path / "out").iterdir() if path.name != ".lock"] == [name]


def test_a_file_that_may_not_be_read_can_be_skipped_too(run, tmp_path, monkeypatch):
    """The tests may be root's, who may read anything: so it is refused here."""
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    write_jsonl(tmp_path / "b.jsonl", TEXTS)

    def refusing(path, *args, **options):
        if path == "b.jsonl":
            raise PermissionError(13, "Permission denied", path)
        return open(path, *args, **options)

    for module in (documents, files):
        monkeypatch.setattr(module, "open", refusing, raising=False)
    assert "Permission denied: 'b.jsonl'" in prepare(run, "--input=a.jsonl,b.jsonl", status=1).stderr
    out = prepare(run, "--input=a.jsonl,b.jsonl", "--skip_bad_files=True").stdout
    assert "1 files that could not be read to their end" in out
    meta = json.loads((tmp_path / "out/meta.json").read_text())
    assert meta["bad_files"] == 1 and meta["skip_bad_files"] and meta["endings"] == ""
    again = prepare(run, "--input=a.jsonl,b.jsonl", "--skip_bad_files=True").stdout
    assert "note: 1 files could not be read to their end then" in again and "is prepared already" in again


@pytest.mark.parametrize("kind", ["json", "csv"])
def test_a_byte_that_is_not_utf8_is_found_in_the_file(run, tmp_path, kind):
    write = dict(json=write_json, csv=write_csv)[kind]
    write(tmp_path / f"a.{kind}", ["some words, " * 20] * 20_000)
    raw = bytearray((tmp_path / f"a.{kind}").read_bytes())
    at = raw.index(b"some", 4_000_000)
    raw[at] = 0xFF
    (tmp_path / f"a.{kind}").write_bytes(raw)
    error = prepare(run, f"--input=a.{kind}", status=1).stderr
    assert f"documents: not UTF-8 text: invalid start byte at byte {at}. Repair it" in error


def test_contradicting_options_are_wrong_usage(run):
    assert (
        "must fit into one shard"
        in run("prepare_fineweb.py", "--val_tokens=2000", "--shard_tokens=1000", status=2).stderr
    )
    error = run("prepare_fineweb.py", "--encoding=characters", "--val_tokens=9", status=2).stderr
    assert "set --input" in error and "val_tokens has no effect with encoding='characters'" in error


# -----------------------------------------------------------------------------
# nanoGPT's data by characters


def nanogpts_files(text):
    """Returns what nanoGPT's data/shakespeare_char/prepare.py makes of a text, by its description."""
    alphabet = sorted(set(text))
    stoi = {character: i for i, character in enumerate(alphabet)}
    ids = [stoi[character] for character in text]
    cut = int(len(ids) * 0.9)
    meta = dict(vocab_size=len(alphabet), itos=dict(enumerate(alphabet)), stoi=stoi)
    return np.array(ids[:cut], np.uint16), np.array(ids[cut:], np.uint16), meta


def test_characters_without_their_alphabet_are_not_taken_for_gpt2s_tokens(run, tmp_path):
    """Whatever is written before the others, a preparation that is killed leaves nothing to train on."""
    *begun, last = characters.files_of(["To be, or not to be. " * 9], 0).items()
    characters.write(tmp_path, dict(begun))
    with pytest.raises(FileNotFoundError, match="has no train tokens"):
        shards.open_splits(tmp_path, 8, 50257)
    assert last[0] == "train.bin" and read_tokenizer(tmp_path).vocab_size == 10


def test_an_alphabet_that_another_python_has_pickled_is_the_same(run, tmp_path):
    (tmp_path / "a.txt").write_text("To be, or not to be. " * 9)
    flags = ["--input=a.txt", "--encoding=characters"]
    prepare(run, *flags)
    path = tmp_path / "out/meta.pkl"
    meta = pickle.loads(path.read_bytes())
    path.write_bytes(pickle.dumps(meta, protocol=5))
    assert "is prepared already" in prepare(run, *flags).stdout
    meta["itos"][0] = "x"
    for other in (pickle.dumps(meta), b"no pickle"):
        path.write_bytes(other)
        assert "out holds other data (meta.pkl)" in prepare(run, *flags, status=1).stderr


def test_line_ends_by_characters_are_as_python_reads_a_text_file(run, tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\rthree\n" * 9)
    prepare(run, "--input=a.txt", "--encoding=characters")
    train, _, meta = nanogpts_files((tmp_path / "a.txt").read_text())
    assert (tmp_path / "out/train.bin").read_bytes() == train.tobytes() and "\r" not in meta["stoi"]


@pytest.mark.parametrize("text", ["To be, or not to be. " * 9, "häßlich 漢字 \U0001f600\n\tx" * 5])
def test_characters_are_nanogpts_files(run, tmp_path, text):
    (tmp_path / "a.txt").write_text(text, newline="")
    out = prepare(run, "--input=a.txt", "--encoding=characters")
    train, val, meta = nanogpts_files(text)
    assert (tmp_path / "out/train.bin").read_bytes() == train.tobytes()
    assert (tmp_path / "out/val.bin").read_bytes() == val.tobytes()
    assert pickle.loads((tmp_path / "out/meta.pkl").read_bytes()) == meta
    assert f"train: {len(train)} characters; val: {len(val)}" in out.stdout
    tokenizer = read_tokenizer(tmp_path / "out")
    assert tokenizer.decode(np.concatenate([train, val]).tolist()) == text


def test_documents_by_characters_have_a_line_end_between_them(run, tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ["first text", "half \ud800 a character", "", "x" * 5_000_000])
    prepare(run, "--input=a.jsonl", "--encoding=characters", "--max_tokens=4000000")
    files = [tmp_path / "out/train.bin", tmp_path / "out/val.bin"]
    ids = np.concatenate([np.fromfile(path, np.uint16) for path in files])
    text = read_tokenizer(tmp_path / "out").decode(ids.tolist())
    assert len(text) == 4_000_000 and text.rstrip("x") == "first text\nhalf \ufffd a character\n"


def test_a_line_end_that_the_parts_of_a_text_divide_is_one(run, tmp_path):
    (tmp_path / "a.txt").write_bytes(b"123\r\n" * 900_000)  # one document, cut within \r\n
    prepare(run, "--input=a.txt", "--encoding=characters")
    count = sum((tmp_path / "out" / name).stat().st_size // 2 for name in ("train.bin", "val.bin"))
    assert count == 4 * 900_000


def test_one_text_too_long_for_validation_is_refused_and_a_tiny_validation_is_pointed_out(run, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/big.txt").write_bytes(b"some words " * 400_000)
    error = prepare(run, "--input=in", status=1).stderr
    assert "4,400,001 tokens to train on and 0 to validate" in error and "--txt_documents" in error
    # the same again, and with whole shards; then as it says
    error = prepare(run, "--input=in", "--shard_tokens=1000000", "--val_tokens=10", status=1).stderr
    assert error.endswith("; first delete out/unfinished.npz and the shards beside it\n")
    error = prepare(run, "--input=in", "--out_dir=by_line", "--txt_documents=line", status=1).stderr
    assert "--txt_documents" not in error
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "in/small.txt").write_bytes(b"hello there!")
    out = prepare(run, "--input=in", "--out_dir=both").stdout
    assert "val: 13 tokens" in out and "most are too long for the 440,001 tokens that it needs" in out


def test_an_unfinished_preparation_is_not_taken_for_gpt2s_tokens(run, tmp_path):
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    prepare(run, "--input=a.jsonl")
    (tmp_path / "out/meta.json").unlink()  # as if it had been killed at the very end
    (tmp_path / "out/unfinished.npz").touch()
    error = run("train.py", "--dataset=out", "--device=cpu", "--dry_run=True", status=1).stderr
    assert "the preparation of out is not finished; the same prepare_fineweb.py command continues it" in error


def test_characters_beside_another_preparations_meta_json_are_refused(run, tmp_path):
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    prepare(run, "--input=a.jsonl")
    for path in (tmp_path / "out").glob("*.bin"):
        path.unlink()
    error = prepare(run, "--input=a.jsonl", "--encoding=characters", status=1).stderr
    assert "out holds other data (meta.json)" in error
    # and the command of before says what is missing
    error = prepare(run, "--input=a.jsonl", status=1).stderr
    assert "is missing or not the file that meta.json lists; put it back, or delete meta.json" in error


def test_a_folder_may_be_prepared_in_its_place_and_loses_nothing(run, tmp_path):
    folder = tmp_path / "data/books"
    folder.mkdir(parents=True)
    write_jsonl(folder / "a.jsonl", TEXTS)
    (folder / "notes.tmp").write_text("mine")
    first = run("prepare_fineweb.py", "--input=data/books", "--encoding=bytes")
    again = run("prepare_fineweb.py", "--input=data/books", "--encoding=bytes")
    assert "wrote" in first.stdout and "data/books is prepared already" in again.stdout
    assert (folder / "notes.tmp").read_text() == "mine"


def test_two_columns_of_a_name_are_refused(run, tmp_path):
    (tmp_path / "a.csv").write_text("text,text\none,two\n")
    assert "2 columns are called 'text'" in prepare(run, "--input=a.csv", status=1).stderr


def test_characters_never_overwrite_other_data(run, tmp_path):
    (tmp_path / "a.txt").write_text("one two three four " * 9)
    first = prepare(run, "--input=a.txt", "--encoding=characters")
    (tmp_path / "out/val.bin").unlink()  # as if it had been killed
    second = prepare(run, "--input=a.txt", "--encoding=characters")
    third = prepare(run, "--input=a.txt", "--encoding=characters")
    assert "wrote meta.pkl, val.bin, train.bin to out" in first.stdout
    assert "wrote val.bin to out" in second.stdout and "out is prepared already" in third.stdout
    with open(tmp_path / "out/train.bin", "ab") as f:
        f.write(b"\0\0")
    longer = prepare(run, "--input=a.txt", "--encoding=characters", status=1).stderr
    assert longer.startswith("error: out holds other data (train.bin)")
    (tmp_path / "a.txt").write_text("another text " * 9)
    before = contents(tmp_path / "out")
    for encoding in ("characters", "bytes"):
        error = prepare(run, "--input=a.txt", f"--encoding={encoding}", status=1).stderr
        assert error.startswith("error: out holds ") and "choose another --out_dir" in error
    write_jsonl(tmp_path / "b.jsonl", TEXTS)
    prepare(run, "--input=b.jsonl", "--out_dir=shards")
    error = prepare(run, "--input=a.txt", "--encoding=characters", "--out_dir=shards", status=1).stderr
    assert "shards holds other data" in error
    assert contents(tmp_path / "out") == before


def test_too_many_characters_for_uint16_are_refused():
    text = "".join(map(chr, range(0x10000, 0x20001)))
    with pytest.raises(UserError, match="65,537 different characters"):
        characters.files_of([text], 0)


# -----------------------------------------------------------------------------
# one file from the network


class Files(http.server.BaseHTTPRequestHandler):
    """Serves `content` under every name; the first `cut` answers break off in the middle."""

    content, cut = b"", 0
    told = "{}"  # as the length of content; empty: nothing
    kind = "text/plain"
    etag = ""  # else another one at each request

    def log_message(self, *args):
        pass

    def do_GET(self):
        if "missing" in self.path:
            return self.send_error(404)
        self.send_response(200)
        if self.told:
            self.send_header("Content-Length", self.told.format(len(self.content)))
        self.send_header("ETag", self.etag or str(zlib.crc32(self.content)))
        if self.etag:
            Files.etag += "x"
        self.send_header("Content-Type", self.kind)
        self.end_headers()
        end = len(self.content)
        if Files.cut:
            Files.cut -= 1
            end //= 2
        with contextlib.suppress(ConnectionError):  # whoever wants the headers only
            self.wfile.write(self.content[:end])


@pytest.fixture
def address():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Files)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet", "a.json", "a.arrow"])
def test_a_file_is_read_from_its_address(run, tmp_path, address, name, monkeypatch):
    monkeypatch.setattr(documents, "PAUSES", (0, 0))
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    datasets.Dataset.from_dict({"text": TEXTS}).to_parquet(tmp_path / "a.parquet")
    write_json(tmp_path / "a.json", TEXTS)
    write_arrow(tmp_path / "a.arrow", TEXTS)
    Files.content = (tmp_path / name).read_bytes()
    prepare(run, f"--input={name}", "--out_dir=local")
    once = prepare(run, f"--input={address}/{name}?raw=1")
    assert tokens_in(tmp_path / "out", "train").tolist() == tokens_in(tmp_path / "local", "train").tolist()
    assert "next: python train.py config/text_1m.py --dataset=./out" in once.stdout
    assert "out is prepared already" in prepare(run, f"--input={address}/{name}?raw=1").stdout
    Files.content = Files.content + b" "
    error = prepare(run, f"--input={address}/{name}?raw=1", status=1).stderr
    assert "was prepared with other settings (source: " in error


def test_a_connection_that_breaks_off_is_asked_again(address, monkeypatch, capsys):
    monkeypatch.setattr(documents, "PAUSES", (0, 0))
    Files.content, Files.cut = b"line of text\n" * 100_000, 1
    cfg = configure(PrepareConfig, ["--txt_documents=file"])
    text = "".join(part.text for part in read_parts(f"{address}/a.txt", cfg))
    assert text.encode() == Files.content
    assert "the connection ended after 650,000 of 1,300,000 bytes" in capsys.readouterr().err


def test_a_damaged_file_at_an_address_is_no_failure_of_the_network(run, tmp_path, address):
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    Files.content = gzip.compress((tmp_path / "a.jsonl").read_bytes())[:-30]
    source = f"--input={address}/cut.jsonl.gz,a.jsonl"
    error = prepare(run, source, status=1).stderr
    assert "cut.jsonl.gz after 150 documents: " in error and "reached" not in error
    out = prepare(run, source, "--skip_bad_files=True")
    assert "reached" not in out.stderr and "1 files that could not be read to their end" in out.stdout


def test_an_address_that_is_wrong_is_one_line(run, address):
    error = prepare(run, "--input=https://[bad/a.txt", "--out_dir=", status=1).stderr
    assert error == "error: --input=https://[bad/a.txt is no address: Invalid IPv6 URL\n"
    odd = "http://127.0.0.1:9/a b.txt"
    for name in (f"{address}/missing.txt", "http://127.0.0.1:9/a.txt", "ftps://example.org/a.txt", odd):
        error = prepare(run, f"--input={name}", status=1).stderr
        assert f"error: --input={name} cannot be reached: " in error and error.count("\n") == 1


def test_a_server_that_names_another_version_at_each_request_is_pointed_out(run, address, monkeypatch):
    Files.content = b"".join(b'{"text": "some words, %d"}\n' % i for i in range(100))
    monkeypatch.setattr(Files, "etag", "1")
    error = prepare(run, f"--input={address}/a.jsonl", status=1).stderr
    assert "were changed while they were read, or their server says so at each request" in error


def test_a_web_page_is_no_file(run, address, monkeypatch):
    monkeypatch.setattr(Files, "kind", "text/html; charset=utf-8")
    Files.content = b"<html>" + b"some text " * 1000
    error = prepare(run, f"--input={address}/blob/main/a.txt", "--encoding=characters", status=1).stderr
    assert error.startswith(
        f"error: --input={address}/blob/main/a.txt is a web page; give the link to the file"
    )
    prepare(run, f"--input={address}/a.html", "--encoding=characters")


# -----------------------------------------------------------------------------
# a dry run


def test_a_dry_run_foretells_what_is_written(run, tmp_path):
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    out = prepare(run, "--input=a.jsonl", "--dry_run=True").stdout
    assert not (tmp_path / "out").exists()
    told = int(re.search(r"tokens: +about ([\d,]+)", out)[1].replace(",", ""))
    prepare(run, "--input=a.jsonl")
    meta = json.loads((tmp_path / "out/meta.json").read_text())
    assert told == meta["train"]["tokens"] + meta["val"]["tokens"]
    again = prepare(run, "--input=a.jsonl", "--dry_run=True", "--max_tokens=1000").stdout
    assert "tokens:     about 1,000\n" in again and "out has been prepared already" in again
    assert "next:       python train.py config/text_1m.py --dataset=./out\n" in again


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_dry_run_foretells_more_than_a_megabyte(run, tmp_path, kind):
    """Of texts of which GPT-2 makes more tokens than of English ones, beside a column that is larger."""
    if "TIKTOKEN_CACHE_DIR" not in os.environ:
        pytest.skip("set TIKTOKEN_CACHE_DIR to a folder with tiktoken's gpt2 files")
    text = "漢字 for a tokenizer of English. " * 20
    rows = [dict(text=f"{i} {text}", other="x" * 2000) for i in range(3000)]
    if kind == "jsonl":
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (tmp_path / "a.jsonl").write_text("".join(lines), encoding="utf-8")
    else:
        table = pyarrow.Table.from_pylist(rows)
        pyarrow.parquet.write_table(table, tmp_path / "a.parquet", use_dictionary=False)
    flags = [f"--input=a.{kind}", "--encoding=gpt2"]
    out = prepare(run, *flags, "--dry_run=True").stdout
    told = int(re.search(r"tokens: +about ([\d,]+)", out)[1].replace(",", ""))
    prepare(run, *flags)
    meta = json.loads((tmp_path / "out/meta.json").read_text())
    assert told == pytest.approx(meta["train"]["tokens"] + meta["val"]["tokens"], rel=0.1)


@pytest.mark.parametrize("told", ["", "many", "-5"])
def test_a_server_that_does_not_say_how_long_a_file_is(run, tmp_path, address, monkeypatch, told):
    Files.content = b"".join(b'{"text": "some words, %d"}\n' % i for i in range(100_000))
    monkeypatch.setattr(Files, "told", told)
    out = prepare(run, f"--input={address}/a.jsonl", "--dry_run=True").stdout
    assert "how many tokens that gives is not known" in out
    prepare(run, f"--input={address}/a.jsonl", "--max_tokens=20000")


def test_a_dry_run_asks_no_network(run, tmp_path):
    out = run(
        "prepare_fineweb.py", "--dry_run=True", "--encoding=bytes", HF_ENDPOINT="http://127.0.0.1:9"
    ).stdout
    assert "about 44,000,000,000\n" in out and "88.000 GB in data/fineweb" in out
    assert not (tmp_path / "data").exists()


# -----------------------------------------------------------------------------
# the hub: a server on this machine that answers as the real one does, asked by the real libraries

README = b"""---
configs:
- config_name: sample-10BT
  data_files: [{split: train, path: sample/10BT/*}]
- config_name: finer
  data_files: [{split: train, path: finer/train/*}, {split: test, path: finer/test/*}]
---
"""


class Hub(http.server.BaseHTTPRequestHandler):
    """One dataset, owner/name: its description, its list of files, and ranges of their bytes."""

    protocol_version = "HTTP/1.1"
    files, failures, revision = {}, [], "a" * 40

    def log_message(self, *args):
        pass

    def answer(self, status, body, **headers):
        self.send_response(status)
        for name, value in dict(Content_Length=len(body), **headers).items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(body if self.command == "GET" else b"")

    def do_GET(self):
        path = urllib.parse.unquote(urllib.parse.urlparse(self.path).path)
        if path == f"/api/datasets/owner/name/revision/{self.revision}" or path == "/api/datasets/owner/name":
            about = dict(
                id="owner/name", sha=self.revision, private=False, disabled=False, gated=False, tags=[]
            )
            about |= dict(downloads=0, likes=0, siblings=[dict(rfilename=name) for name in self.files])
            return self.answer(200, json.dumps(about).encode())
        if match := re.match(r"/api/datasets/owner/name/tree/[^/]+/(.+)", path):
            inside = [
                name.removeprefix(match[1] + "/") for name in self.files if name.startswith(match[1] + "/")
            ]
            entries = {
                f"{match[1]}/{name.split('/')[0]}": dict(type="directory", oid="0")
                if "/" in name
                else dict(type="file", oid="1", size=len(self.files[f"{match[1]}/{name}"]))
                for name in inside
            }
            return self.answer(
                200, json.dumps([entry | dict(path=name) for name, entry in entries.items()]).encode()
            )
        match = re.match(r"/datasets/owner/name/resolve/[^/]+/(.+)", path)
        if not match or match[1] not in self.files:
            return self.answer(404, b"", X_Error_Code="EntryNotFound")
        raw, headers = (
            self.files[match[1]],
            dict(ETag='"1"', X_Repo_Commit=self.revision, Accept_Ranges="bytes"),
        )
        if "Range" not in self.headers or self.command == "HEAD":
            return self.answer(200, raw, **headers)
        if self.failures:
            return self.answer(self.failures.pop(), b"")
        first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
        part = raw[first : last + 1]
        self.answer(206, part, Content_Range=f"bytes {first}-{first + len(part) - 1}/{len(raw)}", **headers)

    do_HEAD = do_GET


@pytest.fixture
def hub(tmp_path):
    Hub.files, Hub.failures = {"README.md": README}, []
    for number, part in enumerate((TEXTS[:80], TEXTS[80:]), 1):
        datasets.Dataset.from_dict({"text": part}).to_parquet(tmp_path / "part.parquet")
        Hub.files[f"sample/10BT/{number:03d}.parquet"] = (tmp_path / "part.parquet").read_bytes()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield dict(HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}", HF_HOME=str(tmp_path / "hf"))
    server.shutdown()
    server.server_close()
    thread.join()


# bounded, or its name, sample-10BT, would ask for room for 44 billion bytes of text
SMALL_HUB = ["--repo=owner/name", "--max_tokens=1000000"]


def test_the_hub_is_read_where_HF_ENDPOINT_says_and_into_the_same_shards(spawn, tmp_path, hub):
    out = prepare(spawn, *SMALL_HUB, **hub)
    meta = json.loads((tmp_path / "out/meta.json").read_text())
    assert meta["source"] == "owner/name sample-10BT train" and not out.stderr
    for name, raw in Hub.files.items():
        if name.endswith(".parquet"):
            (tmp_path / os.path.basename(name)).write_bytes(raw)
    prepare(spawn, "--input=001.parquet,002.parquet", "--out_dir=local")
    assert tokens_in(tmp_path / "out", "train").tolist() == tokens_in(tmp_path / "local", "train").tolist()
    assert len(documents_in(tmp_path / "out")["train"]) + len(documents_in(tmp_path / "out")["val"]) == 200


def test_of_several_subsets_and_splits_the_one_that_is_asked_for_is_read(spawn, tmp_path, hub):
    texts = [f"of the finer kind {i}" for i in range(100)]
    for split, part in (("train", texts), ("test", TEXTS[:50])):
        datasets.Dataset.from_dict({"words": part}).to_parquet(tmp_path / "part.parquet")
        Hub.files[f"finer/{split}/0.parquet"] = (tmp_path / "part.parquet").read_bytes()
    flags = ["--encoding=bytes", "--repo=owner/name", "--subset=finer", "--text_key=words"]
    spawn("prepare_fineweb.py", *flags, **hub)
    documents = documents_in(tmp_path / "data/name")
    assert sorted(documents["train"] + documents["val"]) == sorted(list(text.encode()) for text in texts)
    assert (tmp_path / "data/name/name_train_000001.bin").exists()
    spawn("prepare_fineweb.py", *flags, "--split=test", "--out_dir=test", **hub)
    documents = documents_in(tmp_path / "test")
    assert sorted(documents["train"] + documents["val"]) == sorted(list(text.encode()) for text in TEXTS[:50])
    wrong = spawn("prepare_fineweb.py", *flags, "--split=val", "--out_dir=wrong", status=1, **hub).stderr
    assert "has no split 'val' (--split); it has train, test" in wrong


def test_a_local_dataset_that_has_changed_is_not_taken_for_prepared(run, tmp_path):
    (tmp_path / "rows").mkdir()
    write_jsonl(tmp_path / "rows/train.jsonl", TEXTS)
    flags = ["--repo=rows", "--subset="]
    prepare(run, *flags)
    documents = documents_in(tmp_path / "out")
    assert sorted(documents["train"] + documents["val"]) == sorted(list(text.encode()) for text in TEXTS)
    assert "out is prepared already" in prepare(run, *flags).stdout
    write_jsonl(tmp_path / "rows/train.jsonl", [text.upper() for text in TEXTS])
    error = prepare(run, *flags, status=1).stderr
    assert "out was prepared with other settings (source: 'rows  train: 1 files, " in error


def test_if_no_file_could_be_read_that_is_said(run, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "x"}')
    error = prepare(run, "--input=a.jsonl", "--skip_bad_files=True", status=1).stderr
    assert "no text was read: 0 empty documents, 1 files that could not be read to their end\n" in error


def test_a_local_dataset_is_not_prepared_into_its_own_folder(run, tmp_path):
    (tmp_path / "data/rows").mkdir(parents=True)
    write_jsonl(tmp_path / "data/rows/train.jsonl", TEXTS)
    error = run("prepare_fineweb.py", "--repo=data/rows", "--subset=", "--encoding=bytes", status=1).stderr
    assert error == "error: data/rows is the source (--repo); name another --out_dir for its tokens\n"
    assert os.listdir(tmp_path / "data/rows") == ["train.jsonl"]


def test_damaged_bytes_of_a_parquet_file_with_checksums_are_an_error(run, tmp_path):
    table = pyarrow.table({"text": TEXTS})
    path = tmp_path / "a.parquet"
    flags = dict(use_dictionary=False, compression="none", write_page_checksum=True)
    pyarrow.parquet.write_table(table, path, **flags)
    prepare(run, "--input=a.parquet", "--out_dir=whole")
    raw = path.read_bytes()
    first = TEXTS[7].encode()
    path.write_bytes(raw.replace(first, first[:-1] + b"!"))
    assert "CRC checksum" in prepare(run, "--input=a.parquet", status=1).stderr


def test_folders_that_match_a_pattern_are_counted(run, tmp_path):
    for folder in ("b.jsonl", "c.jsonl", ".d.jsonl"):
        (tmp_path / folder).mkdir()
        write_jsonl(tmp_path / folder / "part.jsonl", TEXTS[:50])
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    assert "source: 1 files; passed over: 2 folders\n" in prepare(run, "--input=*.jsonl").stdout


def test_null_where_a_document_belongs_is_called_null(run, tmp_path):
    (tmp_path / "a.json").write_text('["a", null]')
    assert "item 2 is null, not an object" in prepare(run, "--input=a.json", status=1).stderr


def test_many_copies_that_fill_the_validation_split_are_pointed_out(run, tmp_path):
    texts = [f"A real document number {i} about something. " for i in range(100)]
    # the text whose hash is lowest, and so the last to leave the validation split
    texts_404 = [f"Page not found {i}" for i in range(2000)]
    copied = min(texts_404, key=lambda text: hashlib.blake2b(text.encode(), digest_size=8).digest())
    write_jsonl(tmp_path / "a.jsonl", [*texts, *[copied] * 100])
    out = prepare(run, "--input=a.jsonl").stdout
    assert re.search(r"note: validation needs \d+ tokens, and has more, since it takes whole documents", out)
    write_jsonl(tmp_path / "a.jsonl", texts)
    assert "note:" not in prepare(run, "--input=a.jsonl", "--out_dir=without").stdout


def test_a_network_that_fails_for_a_while_is_asked_again(spawn, tmp_path, hub):
    prepare(spawn, *SMALL_HUB, **hub)
    Hub.failures[:] = [404, 404]  # which the hub's own library takes for final
    again = prepare(spawn, *SMALL_HUB, "--out_dir=again", **hub)
    assert (
        not Hub.failures and "trying again in 1 s" in again.stderr and "trying again in 2 s" in again.stderr
    )
    assert contents(tmp_path / "again") == contents(tmp_path / "out")


def test_a_damaged_file_of_the_hub_is_no_failure_of_the_network(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(documents, "PAUSES", (0, 0))
    lines = b"".join(b'{"text": "%d"}\n' % i for i in range(9999))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines)[:-9000])
    with pytest.raises(OSError, match="runcated") as e:
        list(retrying(lambda: documents.read_jsonl(str(tmp_path / "a.jsonl.gz"), "text")))
    assert not isinstance(e.value, ConnectionError) and capsys.readouterr().err.count("trying again") == 2


def test_trying_again_ends_and_leaves_nothing_out(monkeypatch, capsys):
    monkeypatch.setattr(documents, "PAUSES", (0, 0))
    failures = []

    def rows():
        yield from (1, 2)
        if len(failures) < 2:
            failures.append(1)
            raise TimeoutError("the line is cut")
        yield 3
        raise TimeoutError("again\nand more")

    got = retrying(rows)
    assert [next(got) for _ in range(3)] == [1, 2, 3]
    with pytest.raises(
        ConnectionError, match=r"cannot be reached \(again\); the same command continues later"
    ):
        next(got)
    assert capsys.readouterr().err.count("trying again") == 4


# -----------------------------------------------------------------------------
# nasty text


def encoded(*texts, encoding="bytes"):
    return encode_parts([Part(text, True, True) for text in texts], find_tokenizer(encoding)).tokens


def test_bytes_are_uint16_after_an_end_of_text_token():
    assert encoded("é").tolist() == [256, 0xC3, 0xA9] and encoded("é").dtype == np.uint16


def test_a_lone_surrogate_becomes_the_replacement_character():
    assert encoded("\ud800x").tolist() == [256, 0xEF, 0xBF, 0xBD, ord("x")]


any_text = st.text(st.characters(codec=None, exclude_categories=()), max_size=30)  # surrogates and NULs too
nasty = any_text | st.sampled_from(
    ["<|endoftext|>", "\r\n", "\ufeff", "\x00", " \n\n ", "\ud83d\ude00", "\u2028", "_é'S"]
)


@given(st.lists(st.lists(nasty, max_size=5).map("".join), max_size=5))
def test_any_text_becomes_its_bytes(texts):
    expected = b"".join(
        b"|" + text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode() for text in texts
    )
    got = encode_parts([Part(text, True, True) for text in texts], find_tokenizer("bytes")) if texts else None
    assert got is None or bytes(ord("|") if i == 256 else i for i in got.tokens.tolist()) == expected


@given(
    st.lists(nasty, max_size=9).map("".join),
    st.sampled_from(["file", "blank_line", "line"]),
    st.integers(1, 40),
)
def test_text_files_are_divided_alike_however_they_are_read(tmp_path_factory, text, divide, block):
    """Blocks of a few bytes cut characters, line ends and separators at every place."""
    path = tmp_path_factory.mktemp("divided") / "a.txt"
    raw = text.encode("utf-8", "replace")
    path.write_bytes(raw)
    text = raw.decode("utf-8-sig")
    if divide != "file" and "<|endoftext|>" not in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
        expected = text.split("\n\n" if divide == "blank_line" else "\n")
    else:
        expected = text.split("<|endoftext|>")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "CHUNK", block)
        found = [text for text, ends in read_text(str(path), divide)]
    assert found == expected[: len(expected) - (not expected[-1])]


@given(
    st.lists(st.lists(nasty, max_size=5).map("".join), max_size=5),
    st.sampled_from([None, 0, 20]),
    st.booleans(),
    st.integers(1, 40),
)
def test_json_arrays_are_read_alike_in_whatever_blocks(tmp_path_factory, texts, indent, ascii, block):
    path = tmp_path_factory.mktemp("blocks") / "a.json"
    rows = [{"id": -1.5e3, "text": text, "more": {"a": [True, None]}} for text in texts]
    raw = json.dumps(rows, indent=indent, ensure_ascii=ascii).encode("utf-8", "replace")
    path.write_bytes(raw)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "CHUNK", block)
        found = [text for text, _ in read_json(str(path), "text")]
    assert found == [row["text"] for row in json.loads(raw)]


@pytest.mark.parametrize("name", ["gpt2", "r50k_base", "p50k_base", "cl100k_base", "o200k_base"])
@given(
    st.lists(nasty | st.sampled_from(["word", " word", " ", "\n", ".", "1", "don't", "漢"]), max_size=12).map(
        "".join
    )
)
def test_cutting_a_long_text_changes_no_token(name, text):
    """tiktoken cuts a text into pieces by a pattern before it merges bytes: no piece may cross the place of a
    cut."""
    import regex

    # the pattern without the vocabulary, which would be downloaded
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiktoken_ext.openai_public, "load_tiktoken_bpe", lambda *_, **__: {})
        patch.setattr(tiktoken_ext.openai_public, "data_gym_to_mergeable_bpe_ranks", lambda *_, **__: {})
        pattern = regex.compile(getattr(tiktoken_ext.openai_public, name)()["pat_str"])
    for match in documents.SAFE.finditer(text):
        before, after = text[: match.start()], text[match.start() :]
        assert pattern.findall(text) == pattern.findall(before) + pattern.findall(after), (before, after)


def test_a_long_text_is_cut_at_a_word_or_anywhere_if_it_has_none():
    text = "some words " * 60_000
    first, *others = cut = list(pieces(text, 200_000))
    assert "".join(cut) == text and 199_980 < len(first) <= 200_000
    assert len(cut) == 4 and all(piece.startswith(" ") for piece in others)
    assert list(map(len, pieces("x" * 300_000, 200_000))) == [200_000, 100_000]


def test_a_line_that_is_read_in_several_parts_is_one_document_in_any_kind_of_file(run, tmp_path):
    line = "all work and no play makes a dull line. " * 250_000  # 10 MB
    assert len(line) > 2 * documents.LONGEST
    others = [f"another text, number {i}" for i in range(5000)]
    write_jsonl(tmp_path / "a.jsonl", [*others, line])
    (tmp_path / "b.txt").write_text("\n".join([*others, line]))
    datasets.Dataset.from_dict({"text": [*others, line]}).to_parquet(tmp_path / "c.parquet")
    expected = np.bincount(np.frombuffer("".join([*others, line]).encode(), np.uint8))
    for name in ("a.jsonl", "b.txt", "c.parquet"):
        prepare(
            run, f"--input={name}", "--txt_documents=line", f"--out_dir={name}.out", "--shard_tokens=20000000"
        )
        train, val = (tokens_in(tmp_path / f"{name}.out", split) for split in ("train", "val"))
        ids = np.concatenate([train, val])
        assert len(val) < 20_000 and sum(ids == 256) == 5001  # the long one trains, and is one document
        assert np.array_equal(np.bincount(ids[ids < 256]), expected)


# -----------------------------------------------------------------------------
# killed, stopped, out of room: the files become those of a run that was left alone


@pytest.fixture
def big_source(tmp_path):
    """20,000 texts in four files, some 42 MB; returns the arguments that prepare them into 21 shards."""
    noise = random.Random(7)
    kinds = {"a.jsonl": write_jsonl, "b.json": write_json, "c.csv": write_csv, "d.arrow": write_arrow}
    for name, write in kinds.items():
        texts = ["".join(noise.choices("abcdefgh ", k=noise.randrange(2, 60))) * 72 for _ in range(4900)]
        write(tmp_path / name, [*texts, ""])
    return [f"--input={','.join(kinds)}", "--shard_tokens=2000000", "--val_tokens=300000", "--workers=2"]


def contents(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def start(tmp_path, *argv, **options):
    command = [sys.executable, str(ROOT / "prepare_fineweb.py"), "--encoding=bytes", *argv]
    return subprocess.Popen(
        command, cwd=tmp_path, env=ENV, text=True, stderr=subprocess.PIPE, stdout=subprocess.PIPE, **options
    )


def shards_in(folder):
    return len(list(folder.glob("*train*.bin")))


def test_killed_anywhere_it_continues_to_the_same_files(run, tmp_path, big_source):
    prepare(run, *big_source)
    expected, kills = contents(tmp_path / "out"), 0
    moments = random.Random(11)
    while not (tmp_path / "again/meta.json").exists():
        process = start(
            tmp_path, *big_source, "--out_dir=again", "--workers=3" if kills % 2 else "--workers=1"
        )
        before = shards_in(tmp_path / "again")
        while kills < 6 and process.poll() is None and shards_in(tmp_path / "again") < before + 1:
            time.sleep(0.01)
        if kills < 6 and process.poll() is None:
            time.sleep(moments.uniform(0, 0.1))
            process.kill()
            kills += 1
        out, err = process.communicate()
        assert not err and shards_in(tmp_path / "again") >= before
    assert kills >= 4 and contents(tmp_path / "again") == expected


def test_ctrl_c_before_anything_is_written_ends_it_at_once(run, tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("some text")

    def interrupted(job):
        signal.raise_signal(signal.SIGINT)
        pytest.fail("it goes on")

    monkeypatch.setattr(prepare_fineweb, "describe_source", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's `&` has SIGINT ignored
    try:
        out = run("prepare_fineweb.py", "--input=a.txt", "--encoding=bytes", "--out_dir=out", status=130)
    finally:
        signal.signal(signal.SIGINT, before)
    assert out.stderr.endswith("interrupted\n") and not (tmp_path / "out").exists()


def wait_for_two_shards(process, folder):
    """By then the first one is also noted as done."""
    while shards_in(folder) < 2:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopping_leaves_nothing_behind_but_what_continues(run, tmp_path, big_source, number):
    process = start(tmp_path, *big_source, "--out_dir=out", start_new_session=True)
    wait_for_two_shards(process, tmp_path / "out")
    os.killpg(process.pid, number)  # all processes, as a terminal does
    out, err = process.communicate()
    assert process.returncode == 128 + number
    assert err.splitlines()[1:] == [
        "stopping; Ctrl-C again leaves at once",
        "stopped; the same command continues after the last whole shard",
    ]
    assert out == "source: 4 files\n"
    for _ in range(100):  # the workers are gone; a Z would be waiting for whoever adopted it
        states = subprocess.run(
            ["ps", "-eo", "pgid=,stat="], capture_output=True, text=True
        ).stdout.splitlines()
        alive = [line for line in states if line.split()[0] == str(process.pid) and "Z" not in line]
        if not alive:
            break
        time.sleep(0.1)
    assert not alive
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert "unfinished.npz" in names and not any(name.endswith(".tmp") for name in names)
    refused = prepare(run, *big_source, "--val_tokens=200000", status=1).stderr
    assert "unfinished run with other settings (val_tokens: 300000 there, 200000 now)" in refused
    refused = prepare(run, *big_source, "--txt_documents=line", status=1).stderr
    assert "unfinished run with other settings (txt_documents: " in refused
    assert "continuing out after " in prepare(run, *big_source).stdout
    prepare(run, *big_source, "--out_dir=again")
    assert contents(tmp_path / "out") == contents(tmp_path / "again")


def test_a_full_disk_ends_it_cleanly_and_with_more_room_the_same_command_goes_on(run, tmp_path, big_source):
    limit = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (3_000_000, 3_000_000))
    process = start(tmp_path, *big_source, "--out_dir=out", preexec_fn=limit)
    _, err = process.communicate()
    assert process.returncode == 1
    assert err == "error: cannot write to out: File too large; make room, and the same command continues\n"
    assert not (tmp_path / "out").exists()
    prepare(run, *big_source)
    prepare(run, *big_source, "--out_dir=again")
    assert contents(tmp_path / "out") == contents(tmp_path / "again")


def test_a_source_that_cannot_fit_on_the_disk_is_refused_at_the_start(run, tmp_path, monkeypatch):
    with open(tmp_path / "a.txt", "wb") as f:
        f.truncate(10**13)  # takes no room itself
    monkeypatch.setattr("prepare_fineweb.free_bytes", lambda folder: 10**12)
    err = prepare(run, "--input=a.txt", status=1).stderr
    assert "about 20,000.000 GB are still to be written, and out has " in err and "--max_tokens" in err


def test_a_worker_that_is_killed_ends_it_with_one_line(run, tmp_path, big_source):
    process = start(tmp_path, *big_source, "--out_dir=out")
    wait_for_two_shards(process, tmp_path / "out")
    process.send_signal(signal.SIGSTOP)  # or it might have ended before pgrep
    workers = subprocess.run(
        ["pgrep", "-P", str(process.pid), "-f", "spawn_main"], capture_output=True, text=True
    ).stdout
    os.kill(int(workers.split()[0]), signal.SIGKILL)
    process.send_signal(signal.SIGCONT)
    out, err = process.communicate()
    assert (
        process.returncode == 1
        and err.startswith("error: a worker process died")
        and len(err.splitlines()) == 1
    )
    first = min((tmp_path / "out").glob("*_train_*.bin"))
    first.rename(tmp_path / "elsewhere")
    error = prepare(run, *big_source, status=1).stderr
    assert (
        f"{first.relative_to(tmp_path)} is missing or was changed, so this preparation cannot go on" in error
    )
    (tmp_path / "elsewhere").rename(first)
    assert "continuing out after " in prepare(run, *big_source).stdout


def test_a_damaged_state_is_named(run, tmp_path, big_source):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/unfinished.npz").write_bytes(b"PK")
    assert "out/unfinished.npz is damaged" in prepare(run, *big_source, status=1).stderr


@pytest.mark.parametrize("variable, script", [("LLM_C", "train_gpt2.py"), ("MODDED_NANOGPT", "train_gpt.py")])
def test_the_loaders_of_others_read_the_shards(run, tmp_path, variable, script):
    if variable not in os.environ:
        pytest.skip(f"set {variable} to a checkout")
    tree = ast.parse(Path(os.environ[variable], script).read_text())
    load = next(node for node in tree.body if getattr(node, "name", "") == "_load_data_shard")
    names = dict(np=np, torch=torch, Path=Path)
    exec(ast.unparse(load).replace("pin_memory=True", "pin_memory=False"), names)  # pinning needs a GPU
    write_jsonl(tmp_path / "fineweb.jsonl", TEXTS)
    prepare(run, "--input=fineweb.jsonl", "--shard_tokens=5000", "--val_tokens=1000")
    for split in ("train", "val"):
        files = sorted((tmp_path / "out").glob(f"fineweb_{split}_*.bin"))  # their pattern too
        theirs = np.concatenate([np.asarray(names["_load_data_shard"](path)) for path in files])
        assert np.array_equal(theirs, tokens_in(tmp_path / "out", split))


def test_shards_of_uint32_where_ids_need_it(tmp_path):
    with shards.ShardWriter(tmp_path, "fineweb", "train", 3, {}) as writer:
        writer.write(np.array([1, 70_000, 3, 4], dtype=np.uint32))
        writer.finish()
    first, second = shards.find_shards(tmp_path, "train")
    assert (first.count, second.count, first.dtype) == (3, 1, np.uint32) and prepare_fineweb.token_dtype(
        100_277
    ) == np.uint32
    assert np.fromfile(first.path, "<i4", 6).tolist() == [20240801, 7, 3, 0, 0, 0]
    assert [np.fromfile(shard.path, "<u4")[256:].tolist() for shard in (first, second)] == [
        [1, 70_000, 3],
        [4],
    ]


def test_a_preparation_goes_on_with_the_hubs_files_of_its_beginning(tmp_path, monkeypatch):
    """The dataset may have got another revision since: places in its files would be of the old one."""
    cfg = configure(PrepareConfig, ["--encoding=bytes", f"--out_dir={tmp_path}", "--max_tokens=1000"])
    for revision in ("1", "2"):
        found = [f"hf://a@{revision}/x.parquet"]
        monkeypatch.setattr(prepare_fineweb, "find_hub_files", lambda *given, found=found: found)
        job = prepare_fineweb.plan(cfg)
        prepare_fineweb.begin(job)
        assert job.files == ["hf://a@1/x.parquet"]


@pytest.mark.parametrize("length", range(30, 60))
def test_a_separator_is_whole_wherever_a_long_document_is_cut(tmp_path, monkeypatch, length):
    monkeypatch.setattr(documents, "LONGEST", 40)
    monkeypatch.setattr(documents, "CHUNK", 7)
    text = "x" * length + EOT + "rest"
    (tmp_path / "a.txt").write_text(text)
    found, part = [], ""
    for piece, ends in documents.read_text(str(tmp_path / "a.txt"), "file"):
        part += piece
        if ends:
            found.append(part)
            part = ""
    assert found == text.split(EOT)
