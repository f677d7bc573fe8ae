"""
Preparing text: what is read, what is written, and what is said when it cannot be.
References: a plain loop over the same texts; tiktoken itself. Run: pytest tests/test_prepare.py
"""

import json
import os

import datasets
import numpy as np
import pytest
from test_shards import tokens_in

import prepare_fineweb
from prepare_fineweb import find_files, read_text, split_off

TEXTS = [f"Document {i}: " + "some words, ünd möre. " * (1 + i % 7) for i in range(200)]


def documents_in(folder, eot=256):
    """The documents of each split, in order of appearance, as lists of ids."""
    found = {}
    for split in ("train", "val"):
        ids = tokens_in(folder, split)
        assert ids[0] == eot
        found[split] = [part[1:].tolist() for part in np.split(ids, np.flatnonzero(ids == eot)[1:])]
    return found


def prepare(run, *argv, **options):
    return run("prepare_fineweb.py", "--encoding=bytes", "--out_dir=out", *argv, **options)


def write_jsonl(path, texts, name="text"):
    path.write_text("".join(json.dumps({name: text, "id": i}) + "\n" for i, text in enumerate(texts)))


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
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    count = -(-n["train"] // 5000)
    assert names == [f"fineweb_train_{i:06d}.bin" for i in range(1, count + 1)] + [
        "fineweb_val_000000.bin",
        "meta.json",
    ]
    assert all((tmp_path / "out" / name).stat().st_size == 1024 + 2 * 5000 for name in names[: count - 1])
    meta = json.loads((tmp_path / "out/meta.json").read_text())
    assert (meta["encoding"], meta["vocab_size"], meta["eot_token"]) == ("bytes", 257, 256)
    assert meta["source"] == f"a.jsonl: 1 files, {(tmp_path / 'a.jsonl').stat().st_size:,} bytes"
    for split in found:
        assert meta[split]["tokens"] == n[split] and meta[split]["documents"] == len(found[split])
    assert f"train: {n['train']:,} tokens of {len(found['train'])} documents in {count} shards, out" in out.stdout
    assert "next: python train.py config/fineweb_125m.py --dataset=out" in out.stdout


def test_the_same_source_gives_the_same_files_and_is_not_prepared_twice(run, tmp_path):
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    prepare(run, "--input=a.jsonl")
    first = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert "out is prepared already" in prepare(run, "--input=a.jsonl").stdout
    prepare(run, "--input=a.jsonl", "--out_dir=again")
    assert {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()} == first
    refused = prepare(run, "--input=a.jsonl", "--val_tokens=500", status=1)
    assert "out was prepared otherwise (val_tokens: 1000000 there, 500 now)" in refused.stderr
    write_jsonl(tmp_path / "a.jsonl", TEXTS[1:])
    assert "out was prepared otherwise (source: " in prepare(run, "--input=a.jsonl", status=1).stderr
    (tmp_path / "out/meta.json").unlink()
    assert "shards of an unfinished or foreign run" in prepare(run, "--input=a.jsonl", status=1).stderr


def test_text_jsonl_and_parquet_may_be_mixed_in_a_folder(run, tmp_path):
    (tmp_path / "in/deep").mkdir(parents=True)
    write_jsonl(tmp_path / "in/a.jsonl", TEXTS[:50])
    datasets.Dataset.from_dict({"text": TEXTS[50:100]}).to_parquet(tmp_path / "in/deep/b.parquet")
    for i, text in enumerate(TEXTS[100:150]):
        (tmp_path / f"in/{i:03d}.txt").write_text(text)
    (tmp_path / "in/ignored.py").write_text("not a text")
    prepare(run, "--input=in", HF_HOME=str(tmp_path / "hf"))
    found = documents_in(tmp_path / "out")
    assert sorted(found["train"] + found["val"]) == sorted(list(text.encode()) for text in TEXTS[:150])


def test_a_dataset_of_the_hubs_kind_is_streamed(run, tmp_path):
    """--repo takes a local folder too: the way that FineWeb-Edu takes from the hub, without the network."""
    (tmp_path / "repo").mkdir()
    datasets.Dataset.from_dict({"body": TEXTS, "id": list(range(200))}).to_parquet(tmp_path / "repo/train.parquet")
    prepare(run, "--repo=repo", "--subset=", "--text_key=body", HF_HOME=str(tmp_path / "hf"))
    found = documents_in(tmp_path / "out")
    assert sorted(found["train"] + found["val"]) == sorted(list(text.encode()) for text in TEXTS)


def test_max_tokens_stops_early(run, tmp_path):
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    prepare(run, "--input=a.jsonl", "--max_tokens=3000")
    meta = json.loads((tmp_path / "out/meta.json").read_text())
    assert 3000 <= meta["train"]["tokens"] + meta["val"]["tokens"] < 3300


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
    assert find_files("*.txt") == ["a.txt", "b.txt"]
    assert find_files("c.md,a.txt") == ["c.md", "a.txt"]
    assert [os.path.basename(path) for path in find_files(str(tmp_path))] == ["a.txt", "b.txt"]


@pytest.mark.parametrize(
    "content, divide, expected",
    [
        ("a\n\nb\nc", "file", ["a\n\nb\nc"]),
        ("a\r\n\r\nb\nc", "blank_line", ["a", "b\nc"]),
        ("a\n\nb\r\nc", "line", ["a", "", "b", "c"]),
        ("a<|endoftext|>b\n\nc", "blank_line", ["a", "b\n\nc"]),
        ("\ufeffa", "file", ["a"]),
    ],
)
def test_plain_text_is_divided_into_documents(tmp_path, content, divide, expected):
    path = tmp_path / "a.txt"
    path.write_bytes(content.encode())
    assert list(read_text(path, divide)) == expected


def test_a_tenth_of_a_small_source_goes_to_validation():
    encoded = [(text, np.zeros(10)) for text in TEXTS]
    splits = [split for split, _ in split_off(encoded, 1000, 0)]
    assert splits.count("val") == 20 and splits.count("train") == 180


def test_which_documents_validate_depends_on_their_text_not_on_the_run():
    encoded = [(text, np.full(10, i)) for i, text in enumerate(TEXTS)]
    chosen = [[int(t[0]) for split, t in split_off(e, 100, 0) if split == "val"] for e in (encoded, encoded[::-1])]
    assert sorted(chosen[0]) == sorted(chosen[1]) and len(chosen[0]) == 10


def test_short_first_documents_and_one_that_outweighs_the_rest(run, tmp_path):
    (tmp_path / "a.txt").write_text("a\n" + "a longer line\n" * 50)
    prepare(run, "--input=a.txt", "--txt_documents=line")
    found = documents_in(tmp_path / "out")
    assert len(found["train"]) + len(found["val"]) == 51 and 4 <= len(found["val"]) <= 8
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "x" * 5000}) + "\n" + json.dumps({"text": "y"}) + "\n")
    refused = prepare(run, "--input=b.jsonl", "--out_dir=b", status=1).stderr
    assert "to train on" in refused and not list((tmp_path / "b").iterdir())


def test_a_name_that_the_dataset_does_not_know_is_one_line(run, tmp_path):
    (tmp_path / "repo").mkdir()
    datasets.Dataset.from_dict({"text": TEXTS}).to_parquet(tmp_path / "repo/train.parquet")
    hub = dict(HF_HOME=str(tmp_path / "hf"), status=1)
    out = prepare(run, "--repo=repo", "--subset=", "--split=trian", **hub)
    assert "cannot read repo: " in out.stderr and "trian" in out.stderr and len(out.stderr.splitlines()) == 1
    out = prepare(run, "--repo=repo", "--subset=", "--text_key=body", **hub)
    assert "no text under 'body' (--text_key); it has text" in out.stderr


def test_a_damaged_meta_json_is_named(run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/meta.json").write_text("{")
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    assert "out/meta.json is damaged" in prepare(run, "--input=a.jsonl", status=1).stderr


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
        (b"ok \xff", ["--input=a.txt"], "a.txt is not UTF-8 text: invalid start byte at byte 3"),
        (
            b"one document",
            ["--input=a.txt"],
            "0 tokens to train on and 13 to validate: validation takes whole documents",
        ),
        (b"  \n", ["--input=a.txt"], "0 tokens to train on and 0 to validate"),
        (b'{"text": "x"}\n{"text": ', ["--input=a.jsonl"], "a.jsonl:2 is not JSON"),
        (
            b'{"body": "x", "id": 3}',
            ["--input=a.jsonl"],
            "a.jsonl:1 has no text under 'text' (--text_key); it has body, id",
        ),
        (b"PAR1 damaged", ["--input=a.parquet"], "cannot read a.parquet: "),
        (b"x", ["--input=a.txt", "--encoding=gpt3"], "encoding='gpt3' is not known; use one of bytes, "),
    ],
)
def test_a_mistake_is_one_line(run, tmp_path, content, argv, message):
    (tmp_path / argv[0].removeprefix("--input=")).write_bytes(content) if "none" not in argv[0] else None
    out = run("prepare_fineweb.py", "--encoding=bytes", *argv, status=1)
    said = [line for line in out.stderr.splitlines() if not line.startswith("Failed to read schema")]  # datasets' own
    assert len(said) == 1 and message in said[0]
    assert not (tmp_path / "data/fineweb/meta.json").exists()


def test_contradicting_options_are_wrong_usage(run):
    assert (
        "must fit into one shard"
        in run("prepare_fineweb.py", "--val_tokens=2000", "--shard_tokens=1000", status=2).stderr
    )


def test_bytes_are_uint16_after_an_end_of_text_token():
    assert prepare_fineweb.find_encoder("bytes")[0]("é").tolist() == [256, 0xC3, 0xA9]
    assert prepare_fineweb.find_encoder("bytes")[0]("é").dtype == np.uint16


def test_a_lone_surrogate_becomes_the_replacement_character():
    assert prepare_fineweb.find_encoder("bytes")[0]("\ud800x").tolist() == [256, 0xEF, 0xBF, 0xBD, ord("x")]
