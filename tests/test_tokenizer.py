"""
What token ids mean: read from a data folder, encoded and decoded, for the three kinds of tokenizers.
References: bytes and ids by hand.
Run: pytest tests/test_tokenizer.py
"""

import json
import pickle

import pytest
import tiktoken

from sologpt.errors import UserError
from sologpt.tokenizer import (
    EOT,
    BPETokenizer,
    ByteTokenizer,
    CharacterTokenizer,
    find_tokenizer,
    make_tokenizer,
    read_tokenizer,
)


def test_the_tokenizer_is_read_from_meta_json_or_meta_pkl_or_is_gpt2s(tmp_path):
    assert read_tokenizer(tmp_path) == BPETokenizer("gpt2", 50257, 50256)
    meta = dict(vocab_size=3, itos={0: "a", 1: "b", 2: "\n"}, stoi={"a": 0, "b": 1, "\n": 2})
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta))
    for itos in (["a", "b", "\n"], meta["itos"]):
        (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta | dict(itos=itos)))
        tokenizer = read_tokenizer(tmp_path)
        assert tokenizer.itos == meta["itos"]
    assert tokenizer == CharacterTokenizer("characters", 3, None, meta["itos"])
    assert make_tokenizer(tokenizer.fields()) == tokenizer
    # as nanoGPT trains with it: more ids than names
    assert CharacterTokenizer("characters", 4, None, meta["itos"]).decode([0, 3, 1]) == "a\ufffdb"
    (tmp_path / "meta.json").write_text(
        json.dumps(dict(encoding="bytes", vocab_size=257, eot_token=256, more=1))
    )
    with pytest.raises(UserError, match="has a meta.json and a meta.pkl, which may differ"):
        read_tokenizer(tmp_path)
    (tmp_path / "meta.pkl").unlink()
    assert read_tokenizer(tmp_path) == ByteTokenizer("bytes", 257, 256)


class Exploit:
    def __reduce__(self):
        return (exec, ("import pathlib; pathlib.Path('exploited').touch()",))


@pytest.mark.parametrize("content", [pickle.dumps(Exploit()), b"junk", pickle.dumps([1]), b""])
def test_a_meta_pkl_cannot_run_code_and_a_damaged_one_is_named(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "meta.pkl").write_bytes(content)
    with pytest.raises(ValueError, match="cannot read .*meta.pkl"):
        read_tokenizer(str(tmp_path))
    assert not (tmp_path / "exploited").exists()


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        "[" * 100_000,
        '{"encoding": "bytes"}',
        '{"encoding": "bytes", "vocab_size": "x", "eot_token": 1}',
        '{"encoding": "bytes", "vocab_size": 256.9, "eot_token": 1}',
        '{"encoding": "bytes", "vocab_size": Infinity, "eot_token": 1}',
        '{"encoding": "bytes", "vocab_size": -3, "eot_token": null}',
        '{"encoding": "bytes", "vocab_size": 257, "eot_token": 257}',
        '{"encoding": "bytes", "vocab_size": 257, "eot_token": true}',
        '{"encoding": "bytes", "vocab_size": 257, "eot_token": 1e400}',
        '{"encoding": "nope", "vocab_size": 257, "eot_token": 256}',
        '{"encoding": null, "vocab_size": 257, "eot_token": 256}',
        '{"encoding": "gpt2", "vocab_size": 100, "eot_token": 99}',
        '{"encoding": "gpt2", "vocab_size": 50257, "eot_token": null}',
    ],
)
def test_a_damaged_meta_json_is_named(tmp_path, content):
    (tmp_path / "meta.json").write_text(content)
    with pytest.raises(ValueError, match="meta.json is damaged"):
        read_tokenizer(str(tmp_path))


def test_a_meta_json_of_a_later_format_is_refused(tmp_path):
    meta = dict(encoding="bytes", vocab_size=257, eot_token=256)
    for version in (2, "1"):
        (tmp_path / "meta.json").write_text(json.dumps(meta | dict(format=version)))
        with pytest.raises(UserError, match=f"has the format {version!r}, and this soloGPT knows only 1"):
            read_tokenizer(tmp_path)
    (tmp_path / "meta.json").write_text(json.dumps(meta | dict(format=1)))
    assert read_tokenizer(tmp_path).vocab_size == 257


@pytest.mark.parametrize("name", ["a_train_000001.bin", "a_val_000001.npy"])
def test_a_meta_pkl_beside_shards_is_not_applied_to_them(tmp_path, name):
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(dict(vocab_size=2, itos=["a", "b"])))
    (tmp_path / "train.bin").write_bytes(bytes(8))
    assert read_tokenizer(tmp_path).encoding == "characters"
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError, match=f"is about nanoGPT's train.bin, but the folder has {name}, which is"):
        read_tokenizer(tmp_path)
    (tmp_path / "meta.pkl").unlink()
    assert read_tokenizer(tmp_path).encoding == "gpt2"


def test_bytes_round_trip_with_end_of_text():
    tokenizer = ByteTokenizer("bytes", 257, 256)
    text = "naïve <|endoftext|>\0 日本<|endoftext|>"
    assert tokenizer.encode("aé<|endoftext|>") == [97, 0xC3, 0xA9, 256]
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode([0xC3, 256, 97]) == "\ufffd<|endoftext|>a"
    assert bytes(tokenizer.encode_document(text)) == text.encode()


def test_bytes_without_an_end_of_text_have_none():
    plain = ByteTokenizer("bytes", 256, None)
    assert plain.encode("a<|endoftext|>") == list(b"a<|endoftext|>")


def test_characters_round_trip_and_a_foreign_one_is_named():
    tokenizer = CharacterTokenizer("characters", 2, None, {0: "a", 1: "b"})
    assert tokenizer.encode("abba") == [0, 1, 1, 0] and tokenizer.decode([1, 0]) == "ba"
    with pytest.raises(UserError, match="vocabulary of 2 characters lacks 'cz'"):
        tokenizer.encode("abzc")
    with pytest.raises(UserError, match="a meta.pkl without itos"):
        CharacterTokenizer("characters", 2, None, {}).encode("a")


def test_an_unknown_encoding_lists_the_known_ones():
    for use in (find_tokenizer, lambda name: BPETokenizer(name, 50257, 50256).encode("a")):
        with pytest.raises(UserError, match="encoding='gpt-2' is not known; use one of bytes, .*gpt2"):
            use("gpt-2")


def test_special_tokens_of_other_encodings_are_text_in_a_prompt(monkeypatch):
    letters = {bytes([i]): i for i in range(256)}
    special = {EOT: 256, "<|fim|>": 257}
    bpe = tiktoken.Encoding("odd", pat_str=".", mergeable_ranks=letters, special_tokens=special)
    monkeypatch.setattr("sologpt.tokenizer.load_bpe", lambda encoding: bpe)
    odd = find_tokenizer("odd")
    assert odd.encode("a<|fim|>" + EOT) == [*b"a<|fim|>", 256]
    bpe = tiktoken.Encoding("odd", pat_str=".", mergeable_ranks=letters, special_tokens={"<|end|>": 256})
    with pytest.raises(ValueError, match="encoding='odd' has no <|endoftext|>"):
        find_tokenizer("odd")


def test_ids_that_an_encoding_leaves_out_are_spelt_as_unknown(monkeypatch):
    ranks = {b"a": 0, b"b": 1}
    bpe = tiktoken.Encoding("gaps", pat_str=".", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 5})
    monkeypatch.setattr("sologpt.tokenizer.load_bpe", lambda encoding: bpe)
    tokenizer = BPETokenizer("gaps", 6, 5)
    unknown = b"\xef\xbf\xbd"
    assert [tokenizer.spell(i) for i in range(6)] == [b"a", b"b", unknown, unknown, unknown, b"<|endoftext|>"]


def test_a_byte_that_is_none_is_spelt_as_unknown():
    assert ByteTokenizer("bytes", 257, None).decode([97, 256, 98]) == "a\ufffdb"


def test_a_new_model_has_rows_for_all_ids_in_a_multiple_of_64():
    assert BPETokenizer("gpt2", 50257, 50256).embedding_rows() == 50304
    assert ByteTokenizer("bytes", 257, 256).embedding_rows() == 320
    assert ByteTokenizer("bytes", 256, 255).embedding_rows() == 256
    assert CharacterTokenizer("characters", 65, None, {}).embedding_rows() == 65  # nanoGPT's own


def test_bytes_have_no_more_ids_than_bytes_and_one(tmp_path):
    (tmp_path / "meta.json").write_text('{"encoding": "bytes", "vocab_size": 65536, "eot_token": 256}')
    with pytest.raises(ValueError, match="'bytes' has 257 ids, not vocab_size=65536"):
        read_tokenizer(tmp_path)
    (tmp_path / "meta.json").write_text('{"encoding": "bytes", "vocab_size": 256, "eot_token": null}')
    assert read_tokenizer(tmp_path).decode([0x68, 0x69]) == "hi"


def test_a_download_that_is_not_what_it_should_be_is_no_traceback(monkeypatch):
    """A stand-in for a page to log in to, in place of the file: tiktoken compares its sha256."""

    def wrong(encoding):
        raise ValueError("Hash mismatch for data downloaded from a page to log in to")

    monkeypatch.setattr(tiktoken, "get_encoding", wrong)
    with pytest.raises(UserError, match="cannot download tiktoken's 'r50k_base'"):
        BPETokenizer("r50k_base", 50257, 50256).encode("a")
