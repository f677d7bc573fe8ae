"""
Turn text into token shards that train.py reads.

    python prepare_fineweb.py                                   FineWeb-Edu, 10B tokens, streamed from the hub (20 GB)
    python prepare_fineweb.py --input=books/ --out_dir=data/books     your own .txt, .jsonl and .parquet files
    python prepare_fineweb.py --input=stdlib --encoding=bytes         Python's own library, without any download

Writes fineweb_val_000000.bin, fineweb_train_000001.bin, ... in llm.c's format, and meta.json last. A document is the
end-of-text token followed by the tokens of its text; it may run on into the next shard. Validation takes whole
documents from all over the source, chosen by a hash of their text: the same text gives the same split.
"""

import glob
import hashlib
import heapq
import itertools
import json
import os
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

import shards
from configurator import Config, from_command_line, key

EOT = "<|endoftext|>"


@dataclass
class PrepareConfig(Config):
    input: str = key("", "stdlib, or a file, folder or glob (several: comma) of .txt, .jsonl, .parquet; empty: the hub")
    repo: str = key("HuggingFaceFW/fineweb-edu", "dataset on the Hugging Face hub, or a local folder of one")
    subset: str = key("sample-10BT", "its subset; may be empty")
    split: str = key("train", "its split")
    text_key: str = key("text", "name of the text in a .jsonl object or .parquet column")
    txt_documents: str = key(
        "file", f"what a document is in a .txt without {EOT} between them", choices=("file", "blank_line", "line")
    )
    encoding: str = key("gpt2", "bytes (no download) or a tiktoken name: gpt2, cl100k_base, ...")
    out_dir: str = key("", "folder to write; empty: data/fineweb, or data/stdlib for --input=stdlib")
    shard_tokens: int = key(100_000_000, "tokens in one shard", low=1000, below=2**31)
    val_tokens: int = key(
        1_000_000, "tokens for validation, at least; a source below ten times that gives a tenth", low=1
    )
    max_tokens: int = key(0, "stop after so many tokens; 0: take everything", low=0)

    def problems(self):
        if self.val_tokens > self.shard_tokens:
            return [f"val_tokens={self.val_tokens} must fit into one shard of shard_tokens={self.shard_tokens}"]
        return []


# -----------------------------------------------------------------------------
# text in


def find_files(source):
    """Returns the files that `source` (see --input) stands for, in a fixed order. Raises FileNotFoundError for none."""
    if source == "stdlib":
        root = sysconfig.get_paths()["stdlib"]
        found = glob.glob(f"{glob.escape(root)}/**/*.py", recursive=True)
        skipped = {"test", "tests", "idle_test", "site-packages", "dist-packages"}  # broken on purpose, or not its own
        found = [path for path in found if not skipped & set(os.path.relpath(path, root).split(os.sep))]
        if not found:
            raise FileNotFoundError(
                f"this Python has no library sources in {root}; use --input=FOLDER with texts of yours"
            )
        return sorted(found)
    found = []
    for part in [source] if os.path.exists(source) else source.split(","):
        if os.path.isdir(part):
            patterns = [f"{glob.escape(part)}/**/*.{ending}" for ending in ("txt", "jsonl", "parquet")]
            matching = sum((glob.glob(pattern, recursive=True) for pattern in patterns), [])
        else:
            names = [part] if os.path.isfile(part) else glob.glob(part, recursive=True)
            matching = [name for name in names if os.path.isfile(name)]
        if not matching:
            raise FileNotFoundError(f"--input={part}: no such file, and no .txt, .jsonl or .parquet file there")
        found += sorted(matching)
    return found


def read_text(path, divide):
    """Yields the documents of a plain text file: parts between <|endoftext|> if it holds any, else as divide says."""
    with open(path, "rb") as f:
        raw = f.read()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise ValueError(
            f"{path} is not UTF-8 text: {e.reason} at byte {e.start}; convert it or leave it out"
        ) from None
    if EOT in text:
        yield from text.split(EOT)
    elif divide == "blank_line":
        yield from text.replace("\r\n", "\n").split("\n\n")
    elif divide == "line":
        yield from text.splitlines()
    else:
        yield text


def read_jsonl(path, text_key):
    """Yields the text_key of each line's JSON object."""
    with open(path, "rb") as f:
        for number, line in enumerate(f, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as e:
                raise ValueError(f"{path}:{number} is not JSON: {e}") from None
            if not isinstance(row, dict) or not isinstance(row.get(text_key), str):
                there = ", ".join(row) if isinstance(row, dict) else f"only {type(row).__name__}"
                raise ValueError(f"{path}:{number} has no text under {text_key!r} (--text_key); it has {there}")
            yield row[text_key]


def read_dataset(text_key, **arguments):
    """Yields the text_key column of a dataset that the datasets library streams: local Parquet or the hub's."""
    import datasets

    name = arguments.get("data_files") or arguments["path"]
    try:
        for row in datasets.load_dataset(streaming=True, **arguments):
            if not isinstance(row.get(text_key), str):
                raise ValueError(f"no text under {text_key!r} (--text_key); it has {', '.join(row)}")
            yield row[text_key]
    except Exception as e:  # of many kinds: a damaged file, a name that the hub does not know, the network
        raise ValueError(f"cannot read {name}: {str(e).partition(chr(10))[0] or type(e).__name__}") from e


def documents(cfg):
    """Yields every text of the source in order."""
    if not cfg.input:
        yield from read_dataset(cfg.text_key, path=cfg.repo, name=cfg.subset or None, split=cfg.split)
        return
    for path in find_files(cfg.input):
        if path.endswith(".parquet"):
            yield from read_dataset(cfg.text_key, path="parquet", data_files=path, split="train")
        elif path.endswith(".jsonl"):
            yield from read_jsonl(path, cfg.text_key)
        else:
            yield from read_text(path, cfg.txt_documents)


# -----------------------------------------------------------------------------
# tokens out


def find_encoder(encoding):
    """Returns (encode, vocab_size, eot_token): encode(text) gives the NumPy tokens of one document, the end-of-text
    token first. "<|endoftext|>" inside the text is text like any other there."""
    if encoding == "bytes":
        vocab_size, eot = 257, 256

        def tokens_of(text):
            return np.frombuffer(text.encode(), dtype=np.uint8)
    else:
        bpe = shards.load_bpe(encoding)
        vocab_size, eot = bpe.n_vocab, bpe.eot_token

        def tokens_of(text):
            return bpe.encode_to_numpy(text, disallowed_special=())

    dtype = np.uint16 if vocab_size <= 2**16 else np.uint32

    def encode(text):
        try:
            tokens = tokens_of(text)
        except UnicodeEncodeError:  # a lone surrogate, which JSON can hold: U+FFFD, as tiktoken's own encode() does
            tokens = tokens_of(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
        return np.concatenate([[eot], tokens]).astype(dtype)

    return encode, vocab_size, eot


def encode_all(texts, encode):
    """Yields (text, tokens) in order. The encoders, which release the GIL, run on all cores, some texts ahead."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        texts = iter(texts)
        while batch := list(itertools.islice(texts, 512)):
            yield from zip(batch, pool.map(encode, batch), strict=True)


def split_off(encoded, val_tokens, max_tokens):
    """Yields ('train', tokens) and, at the end, ('val', tokens) of each document.

    Validation keeps the documents with the smallest hashes: a heap of at least val_tokens tokens (a tenth of what has
    been seen, while that is less), out of which a smaller hash pushes the largest. So it is a sample of the whole
    source without knowing its size beforehand. A document in the heap reaches training late, or never.
    """
    heap, held, seen = [], 0, 0
    for number, (text, tokens) in enumerate(encoded):
        digest = int.from_bytes(hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest(), "big")
        heapq.heappush(heap, (-digest, number, tokens))
        held += len(tokens)
        seen += len(tokens)
        while len(heap) > 1 and held - len(heap[0][2]) >= min(val_tokens, seen // 10):
            tokens = heapq.heappop(heap)[2]
            held -= len(tokens)
            yield "train", tokens
        if max_tokens and seen >= max_tokens:
            break
    for _, _, tokens in sorted(heap, key=lambda entry: entry[1]):
        yield "val", tokens


def write_shards(pieces, out_dir, prefix, shard_tokens, bar):
    """Writes the (split, tokens) pieces as shards; returns {split: {"tokens": n, "documents": n, "shards": n}}.
    Raises ValueError if training does not get the larger part."""
    counts = {split: dict(tokens=0, documents=0, shards=0) for split in ("train", "val")}
    waiting = {"train": [], "val": []}

    def flush(split, everything):
        tokens = np.concatenate(waiting[split])
        while len(tokens) >= shard_tokens or (everything and len(tokens)):
            number = counts[split]["shards"] + (split == "train")
            path = os.path.join(out_dir, f"{prefix}_{split}_{number:06d}.bin")
            shards.write_shard(path, tokens[:shard_tokens])
            counts[split]["shards"] += 1
            tokens = tokens[shard_tokens:]
        waiting[split] = [tokens]

    for split, tokens in pieces:
        waiting[split].append(tokens)
        counts[split]["tokens"] += len(tokens)
        counts[split]["documents"] += 1
        bar.update(len(tokens))
        if counts[split]["tokens"] // shard_tokens > counts[split]["shards"]:
            flush(split, everything=False)
    train, val = counts["train"]["tokens"], counts["val"]["tokens"]
    if train <= val:
        raise ValueError(
            f"{train:,} tokens to train on and {val:,} to validate: validation takes whole documents, and these are "
            f"too few, or one is huge. Separate them by {EOT}, or use --txt_documents=blank_line"
        )
    for split in waiting:
        flush(split, everything=True)
    return counts


def check_target(out_dir, meta):
    """Returns True if out_dir holds exactly what would be written. Raises ValueError if it holds something else."""
    path = os.path.join(out_dir, "meta.json")
    if os.path.exists(path):
        try:
            with open(path, encoding="utf-8") as f:
                there = dict(json.load(f))
        except (ValueError, TypeError) as e:
            raise ValueError(f"{path} is damaged ({e}); delete {out_dir} or choose another --out_dir") from None
        differing = [
            f"{name}: {there.get(name)!r} there, {meta[name]!r} now" for name in meta if there.get(name) != meta[name]
        ]
        if differing:
            raise ValueError(
                f"{out_dir} was prepared otherwise ({'; '.join(differing)}); choose another --out_dir or delete it"
            )
        return True
    if glob.glob(f"{glob.escape(out_dir)}/*_[0-9]*.bin"):
        raise ValueError(
            f"{out_dir} holds shards of an unfinished or foreign run; delete them or choose another --out_dir"
        )
    return False


if __name__ == "__main__":
    cfg = from_command_line(PrepareConfig, __doc__)
    stdlib = cfg.input == "stdlib"
    out_dir = cfg.out_dir or ("data/stdlib" if stdlib else "data/fineweb")
    prefix = "stdlib" if stdlib else "fineweb"
    encode, vocab_size, eot = find_encoder(cfg.encoding)
    source = f"{cfg.repo} {cfg.subset} {cfg.split}"
    if cfg.input:
        files = find_files(cfg.input)
        source = f"{cfg.input}: {len(files)} files, {sum(map(os.path.getsize, files)):,} bytes"
    options = ("text_key", "txt_documents", "shard_tokens", "val_tokens", "max_tokens")
    meta = dict(format=1, encoding=cfg.encoding, vocab_size=vocab_size, eot_token=eot, source=source)
    meta |= {name: getattr(cfg, name) for name in options}
    train_command = f"python train.py config/{'quickstart' if stdlib else 'fineweb_125m'}.py"
    if cfg.out_dir:
        train_command += f" --dataset={out_dir}"
    if check_target(out_dir, meta):
        print(f"{out_dir} is prepared already. Next: {train_command}")
        raise SystemExit
    os.makedirs(out_dir, exist_ok=True)

    start = time.perf_counter()
    empty = 0

    def texts():
        global empty
        for text in documents(cfg):
            if text.strip():
                yield text
            else:
                empty += 1

    with tqdm(unit="tok", unit_scale=True, disable=None, dynamic_ncols=True) as bar:  # on a terminal
        pieces = split_off(encode_all(texts(), encode), cfg.val_tokens, cfg.max_tokens)
        counts = write_shards(pieces, out_dir, prefix, cfg.shard_tokens, bar)
    with shards.atomic_file(os.path.join(out_dir, "meta.json")) as f:
        f.write(json.dumps(meta | counts | dict(empty_documents=empty), indent=1).encode())
    seconds = time.perf_counter() - start
    for split, n in counts.items():
        print(f"{split}: {n['tokens']:,} tokens of {n['documents']:,} documents in {n['shards']} shards, {out_dir}")
    rate = sum(n["tokens"] for n in counts.values()) / seconds
    print(f"took {seconds:.1f}s, {rate:,.0f} tokens/s; {empty} empty documents were skipped")
    print(f"next: {train_command}")
