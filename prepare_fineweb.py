"""
Turn text into token shards that train.py reads.

    # FineWeb-Edu, 10B tokens, streamed from the hub (20 GB)
    python prepare_fineweb.py
    # your own .txt, .jsonl, .json, .csv, .parquet and .arrow files
    python prepare_fineweb.py --input=books/
    # Python's own library, without any download
    python prepare_fineweb.py --input=stdlib --encoding=bytes
    # tiny Shakespeare by characters, as nanoGPT's data/shakespeare_char has it
    python prepare_fineweb.py --encoding=characters --out_dir=data/shakespeare_char \\
        --input=https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt

Writes NAME_val_000000.bin, NAME_train_000001.bin, ... in llm.c's format, NAME being that of the input or of
--repo, and meta.json last. A document is the end-of-text token followed by the tokens of its text; it may
run on into the next shard. Validation takes whole documents from all over the source, by a hash of their
text: the same text gives the same split.

The script can be killed at any moment: the same command continues after the last whole shard, and the files
end up the same, byte for byte, as those of an uninterrupted run, whatever the number of workers.
"""

import contextlib
import errno
import glob
import hashlib
import heapq
import io
import json
import math
import multiprocessing
import os
import queue
import re
import shlex
import signal
import sys
import time
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from configurator import Config, from_command_line, key, run_script
from sologpt import characters, shards
from sologpt.display import duration, print_aligned
from sologpt.documents import Position, pieces, read_chunks
from sologpt.errors import UserError, first_line
from sologpt.files import atomic_file, free_bytes, remove, remove_temporary, sole_use
from sologpt.source import (
    ENDINGS,
    KINDS,
    contents_of,
    find_files,
    find_hub_files,
    is_address,
    name_of,
    size_of,
    text_bytes,
    times_of,
)
from sologpt.stop import SIGNALS, StopRequest
from sologpt.tokenizer import EOT, FORMAT, find_tokenizer

# characters that tiktoken gets at a time: without spaces between them, it takes about 50 bytes for each
PIECE = 2**18
# English text has about 4.4 bytes a GPT-2 token; the source's own ratio replaces it with the first chunk
BYTES_PER_TOKEN = 4.4
# configs by the most tokens that they are for; fineweb_125m_fast for more
CONFIGS = ((3e6, "text_1m"), (30e6, "text_10m"), (1e9, "text_100m"))
# what these configs have as their dataset
DATASETS = dict(
    quickstart="data/stdlib", shakespeare_char="data/shakespeare_char", fineweb_125m_fast="data/fineweb"
)
REPO = "HuggingFaceFW/fineweb-edu"  # its folder and shards are called fineweb


@dataclass
class PrepareConfig(Config):
    input: str = key(
        "",
        f"stdlib; or files, folders, globs of {' '.join(KINDS)} (also .gz, .zst, except for the first two), "
        f"https://..., separated by commas; empty: the hub",
    )
    endings: str = key("", "further file name extensions of texts in folders, as in .md,.rst")
    repo: str = key(REPO, "dataset on the Hugging Face hub, or a local folder of one")
    subset: str = key("sample-10BT", "subset of the dataset; may be empty")
    split: str = key("train", "split of the dataset")
    text_key: str = key("text", "name of the text: a key of JSON's objects, a column of the other kinds")
    txt_documents: str = key(
        "file",
        f"what a document is in a .txt file without {EOT}",
        choices=("file", "blank_line", "line"),
    )
    encoding: str = key(
        "gpt2", "bytes (no download), characters (nanoGPT's files), or tiktoken's: gpt2, cl100k_base, ..."
    )
    out_dir: str = key(
        "", "folder to write; empty: data/fineweb, or data/NAME of --input=path/to/NAME or --repo=OWNER/NAME"
    )
    shard_tokens: int = key(100_000_000, "tokens in one shard", low=1000, below=2**31)
    val_tokens: int = key(
        1_000_000, "minimum tokens for validation; a source below ten times that gives a tenth", low=1
    )
    max_tokens: int = key(0, "stop after this many tokens; 0: take everything", low=0)
    workers: int = key(0, "processes that tokenize; 0: one for each core", low=0)
    skip_bad_files: bool = key(False, "skip the rest of a file that cannot be read, instead of ending")
    dry_run: bool = key(False, "say what tokens, disk and (for local text) time it takes, and stop")

    def problems(self):
        found = []
        if self.val_tokens > self.shard_tokens:
            found.append(
                f"val_tokens={self.val_tokens} must fit into one shard of shard_tokens={self.shard_tokens}"
            )
        if self.encoding == "characters":
            if not self.input:
                found.append("encoding='characters' is for a small text of your own: set --input")
            for name in sorted(self.given & {"val_tokens", "shard_tokens", "txt_documents", "workers"}):
                found.append(
                    f"{name} has no effect with encoding='characters', which writes nanoGPT's train.bin and "
                    f"val.bin: all text in one, its last tenth for validation; omit it"
                )
        for ending in filter(None, self.endings.split(",")):
            if not ending.strip().startswith("."):
                found.append(f"endings begin with a dot, as in .md,.rst; not {ending!r}")
            if ending.strip().lower() in ENDINGS:
                found.append(f"endings: {ending.strip()} is read already, and not always as text; omit it")
        return found

    @property
    def name(self):
        """What folder and shards are named after: the input, or the dataset on the hub."""
        if self.input or self.repo == REPO:
            return name_of(self.input)
        return name_of(self.repo)

    @property
    def folder(self):
        return self.out_dir or os.path.join("data", self.name)


# -----------------------------------------------------------------------------
# tokenizing


def token_dtype(vocab_size):
    if vocab_size <= 2**16:
        return np.dtype(np.uint16)
    return np.dtype(np.uint32)


class Encoded(NamedTuple):
    tokens: np.ndarray  # of all parts, one after another
    parts: list  # of (begins, whole, tokens, bytes of text, hash of the text)


def encode_parts(parts, tokenizer):
    """Returns the Encoded of a chunk; every document begins with the end-of-text token."""
    arrays, rows = [], []
    end_of_text = np.array([tokenizer.eot_token])
    for text, begins, whole in parts:
        text = without_surrogates(text)
        raw = text.encode()
        encoded = [tokenizer.encode_document(piece) for piece in pieces(text, PIECE)]
        if begins:
            arrays.append(end_of_text)
        arrays += encoded
        digest = int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "big")
        n = sum(map(len, encoded))
        if begins:
            n += 1  # the end-of-text token
        rows.append((begins, whole, n, len(raw), digest))
    dtype = token_dtype(tokenizer.vocab_size)
    if not arrays:
        return Encoded(np.empty(0, dtype), rows)
    return Encoded(np.concatenate(arrays, dtype=dtype, casting="unsafe"), rows)


def without_surrogates(text):
    """Returns the text with U+FFFD for a lone surrogate, which JSON can hold, as in tiktoken's encode()."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def work(pipe, encoding):
    """Runs in a worker: a chunk in, its Encoded out, until the other end is closed or its process dead."""
    for number in SIGNALS:  # ignored here too for Windows, where that is not inherited
        signal.signal(number, signal.SIG_IGN)
    tokenizer = find_tokenizer(encoding)
    with contextlib.suppress(EOFError, OSError):
        while True:
            pipe.send(encode_parts(pipe.recv(), tokenizer))


class Workers:
    """Processes that tokenize, as tiktoken gains little from threads; spawned, as that works alike on every
    system. A thread here waits for each, so that a killed one is noticed, whatever it was doing."""

    def __init__(self, encoding, count):
        context = multiprocessing.get_context("spawn")
        self.count = count
        self.threads = ThreadPoolExecutor(count)
        self.idle = queue.SimpleQueue()
        self.processes = []
        # a stop reaches all processes at once: the workers inherit that they ignore it, this process decides
        before = {number: signal.signal(number, signal.SIG_IGN) for number in SIGNALS}
        for _ in range(count):
            pipe, its_end = context.Pipe()
            process = context.Process(target=work, args=(its_end, encoding), daemon=True)
            process.start()
            its_end.close()
            self.processes.append((process, pipe))
            self.idle.put(pipe)
        for number, handler in before.items():
            signal.signal(number, handler)

    def submit(self, parts):
        """Returns a future of the Encoded of these parts."""
        return self.threads.submit(self.encode, parts)

    def encode(self, parts):
        pipe = self.idle.get()
        try:
            pipe.send(parts)
            return pipe.recv()
        except (EOFError, OSError):
            raise OSError(
                "a worker process died, perhaps because memory ran out; "
                "the same command continues, also with fewer --workers"
            ) from None
        finally:
            self.idle.put(pipe)

    def close(self):
        self.threads.shutdown(cancel_futures=True)
        for process, pipe in self.processes:
            pipe.close()
            process.join()


def encode_chunks(chunks, workers):
    """Yields (position, Encoded) of each chunk, in order. Reading runs two chunks per worker ahead."""
    waiting = deque()
    for position, parts in chunks:
        waiting.append((position, workers.submit(parts)))
        while len(waiting) > 2 * workers.count:
            position, encoded = waiting.popleft()
            yield position, encoded.result()
    for position, encoded in waiting:
        yield position, encoded.result()


# -----------------------------------------------------------------------------
# the choice of validation, and progress


class Held(NamedTuple):
    """A document that validation holds so far. The smallest in the heap has the largest hash."""

    negative_hash: int
    number: int  # of the document, which tells equal texts apart
    n_bytes: int
    tokens: np.ndarray


@dataclass
class Progress:
    """The state of a preparation between two chunks of text; saved to disk after each whole shard."""

    position: Position = Position()
    # train and val together
    counts: dict = field(default_factory=lambda: dict(tokens=0, documents=0, bytes=0))
    heap: list = field(default_factory=list)  # of Held, for validation
    held: int = 0  # tokens in the heap
    eligible: int = 0  # tokens of all documents that were short enough for the heap
    files: dict = field(default_factory=dict)  # whole train shards, as in meta.json
    # tokens of the train shard under way
    tail: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint16))
    # tokens of the documents in the heap by their negative_hash: all copies of a text have one
    copies: Counter = field(default_factory=Counter)

    def hold(self, held):
        """Puts a Held into the heap."""
        heapq.heappush(self.heap, held)
        self.held += len(held.tokens)
        self.copies[held.negative_hash] += len(held.tokens)

    def save(self, path, settings):
        """Writes it to path, together with its settings, which are plain values."""
        tokens = [self.tail, *(held.tokens for held in self.heap)]
        facts = dict(position=self.position, counts=self.counts, eligible=self.eligible, files=self.files)
        facts["settings"] = settings
        facts["heap"] = [(*held[:3], len(held.tokens)) for held in self.heap]
        with atomic_file(path) as f:
            np.savez(f, facts=json.dumps(facts), tokens=np.concatenate(tokens), tail=len(self.tail))

    @classmethod
    def load(cls, path):
        """Returns the (Progress, settings) that save wrote. Raises UserError for a damaged file."""
        try:
            with np.load(path) as saved:
                facts, tokens, tail = json.loads(str(saved["facts"])), saved["tokens"], int(saved["tail"])
            lengths = [entry.pop() for entry in facts["heap"]]
            parts = np.split(tokens, np.cumsum([tail, *lengths]))
            progress = cls(Position(*facts["position"]), facts["counts"], eligible=facts["eligible"])
            progress.files = facts["files"]
            progress.tail = parts[0]
            for entry, part in zip(facts["heap"], parts[1:-1], strict=True):
                progress.hold(Held(*entry, part))
            return progress, facts["settings"]
        except Exception as e:  # NumPy and zipfile raise many kinds
            raise UserError(
                f"{path} is damaged ({first_line(e)}); delete it and the shards beside it, and begin again"
            ) from None


def choose(progress, encoded, val_tokens, max_tokens):
    """Returns the tokens of an encoded chunk that go to training, up to max_tokens of both splits in all.

    Validation keeps the documents with the smallest hashes: a heap of at least val_tokens tokens, out of
    which a smaller hash pushes the largest. So it samples the whole source without knowing its size in
    advance. A document in the heap reaches training late, or never. One that came in parts always goes to
    training: it alone would be more than the usual validation.
    """
    heap, counts = progress.heap, progress.counts
    train = []
    start = 0  # of the part in encoded.tokens
    for begins, whole, n, n_bytes, digest in encoded.parts:
        if max_tokens and counts["tokens"] >= max_tokens:
            break
        tokens = encoded.tokens[start : start + n]
        start += n
        room = max_tokens - counts["tokens"]
        if max_tokens and n > room:  # the rest of this document is not taken
            n_bytes = n_bytes * room // n
            n = room
            tokens = tokens[:n]
        counts["tokens"] += n
        if begins:
            counts["documents"] += 1
        counts["bytes"] += n_bytes
        if whole:
            progress.eligible += n
        if not whole or (heap and progress.held >= val_tokens and -digest < heap[0].negative_hash):
            train.append(tokens)
        else:
            progress.hold(Held(-digest, counts["documents"], n_bytes, tokens.copy()))
            train += push_out(progress, val_tokens)
    return np.concatenate([*train, encoded.tokens[:0]])


def push_out(progress, wanted):
    """Returns the tokens of the documents with the largest hashes, and takes these out of the heap, while
    `wanted` tokens remain. Equal texts leave together: the same document is never in both splits."""
    heap, out = progress.heap, []
    while heap:
        largest = heap[0].negative_hash
        size = progress.copies[largest]
        if size == progress.held or progress.held - size < wanted:
            break
        progress.held -= size
        del progress.copies[largest]
        while heap[0].negative_hash == largest:
            out.append(heapq.heappop(heap).tokens)
    return out


# -----------------------------------------------------------------------------
# the output folder


def differences(there, now):
    return "; ".join(
        f"{name}: {there.get(name)!r} there, {now[name]!r} now"
        for name in now
        if there.get(name) != now[name]
    )


def prepared_already(out_dir, settings):
    """Returns the meta.json of out_dir, a dict, if it is complete with these settings; None if it is not
    complete. Raises UserError if it holds other data."""
    path = os.path.join(out_dir, "meta.json")
    if not os.path.exists(path):
        return None
    try:
        with open(path, encoding="utf-8") as f:
            there = dict(json.load(f))
        files = {name: int(about["tokens"]) for name, about in there["files"].items()}
        if not files:
            raise UserError("it lists no files")
        int(there["train"]["tokens"])
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as e:
        raise UserError(
            f"{path} is damaged, or not a preparation's ({e}); choose another --out_dir, or delete it and "
            f"the shards beside it"
        ) from None
    if differing := differences(there, settings):
        raise UserError(
            f"{out_dir} was prepared with other settings ({differing}); choose another --out_dir, or delete "
            f"meta.json and the shards there"
        )
    if changed := first_changed(out_dir, files) or first_replaced(out_dir):
        raise UserError(
            f"{changed} is missing or not the file that meta.json lists; put it back, or delete meta.json "
            f"and the shards in {out_dir}, and begin again"
        )
    return there


def first_changed(out_dir, files):
    """Returns the path of the first of these shards, {name: tokens}, that out_dir lacks or has with another
    number of tokens; None if there is none."""
    for name, tokens in files.items():
        path = os.path.join(out_dir, name)
        if not os.path.exists(path) or shards.read_header(path).count != tokens:
            return path
    return None


def first_replaced(out_dir):
    """Returns the path of the first shard whose sha256 is not that in meta.json; None if there is none. Only
    files that are newer than meta.json are hashed."""
    for name, sha256 in shards.recorded_sha256s(out_dir).items():
        path = os.path.join(out_dir, name)
        if shards.current_sha256(path, sha256) != sha256:
            return path
    return None


def shards_in(folder):
    return glob.glob(f"{glob.escape(folder)}/*_[0-9]*.bin")


def unfinished(out_dir, path, settings):
    """Returns the Progress saved at path, and its settings, or a new one where nothing is there to be lost.
    Raises UserError if out_dir holds shards that are not from a run with these settings."""
    if os.path.exists(path):
        progress, saved_settings = Progress.load(path)
        differing = differences(saved_settings, settings)
        if not differing:
            whole = {name: int(about["tokens"]) for name, about in progress.files.items()}
            if changed := first_changed(out_dir, whole):
                raise UserError(
                    f"{changed} is missing or was changed, so this preparation cannot go on; put it back, or "
                    f"delete {path} and the shards, and begin again"
                )
            return progress, saved_settings
        if shards_in(out_dir):
            raise UserError(
                f"{out_dir} holds an unfinished run with other settings ({differing}); "
                f"use those to continue it, or choose another --out_dir, or delete {path} and the shards"
            )
    for name in sorted(os.listdir(out_dir)):
        if name.endswith((".bin", ".npy")) or name == "meta.pkl":
            raise UserError(
                f"{out_dir} holds tokens of another origin ({name}); delete them or choose another --out_dir"
            )
    return Progress(), settings


@contextlib.contextmanager
def ending_well(progress_path):
    """If the preparation fails, removes its progress file where no whole shard is there to continue from,
    and says what to do about a full disk."""
    folder = os.path.dirname(progress_path)
    try:
        yield
    except BaseException as e:
        if not shards_in(folder):
            remove(progress_path)
        if isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OSError(
                f"cannot write to {folder}: {e.strerror}; make room, and the same command continues"
            ) from e
        raise


def expected_tokens(job, counts):
    """Returns about how many tokens the source gives in all; 0: unknown. counts: what it has given so far."""
    cfg = job.cfg
    bytes_per_token = BYTES_PER_TOKEN
    if counts["bytes"]:
        bytes_per_token = counts["bytes"] / counts["tokens"]
    elif cfg.encoding == "bytes":
        bytes_per_token = 1
    expected = job.text_size / bytes_per_token
    # FineWeb's samples: sample-10BT has 10 billion GPT-2 tokens
    if not cfg.input and (named := re.search(r"(\d+)BT$", cfg.subset)):
        expected = int(named[1]) * 1e9
        if cfg.encoding == "bytes":
            expected *= BYTES_PER_TOKEN
    if cfg.max_tokens:
        expected = min(expected or cfg.max_tokens, cfg.max_tokens)
    return int(expected)


def check_space(out_dir, tokens, itemsize):
    """Raises OSError if this many tokens do not fit on the disk of out_dir."""
    free, needed = free_bytes(out_dir), tokens * itemsize
    if needed > free:
        raise OSError(
            f"about {needed / 1e9:,.3f} GB are still to be written, and {out_dir} has {free / 1e9:,.3f} GB "
            f"free; make room and run the same command, or choose another --out_dir, or take less with "
            f"--max_tokens"
        )


# -----------------------------------------------------------------------------
# the whole preparation


@dataclass
class Job:
    """What is to be prepared, from what, and where to."""

    cfg: PrepareConfig
    out_dir: str
    settings: dict  # all that shapes the tokens, plain values, as in meta.json
    files: list  # paths or addresses, in the order of the source
    text_size: int  # approximate bytes of text in them; 0 for the hub
    source_times: str  # digest of their sizes and times of change; empty for the hub

    @property
    def progress_path(self):
        return os.path.join(self.out_dir, "unfinished.npz")

    @property
    def itemsize(self):
        return token_dtype(self.settings["vocab_size"]).itemsize


def train_command(cfg, tokens):
    """Returns the command to run after a preparation that gave so many tokens, with a config that suits."""
    name = next((name for most, name in CONFIGS if tokens < most), "fineweb_125m_fast")
    if cfg.input == "stdlib" and cfg.encoding == "bytes":
        name = "quickstart"
    if cfg.encoding == "characters" and name == "text_1m":
        name = "shakespeare_char"
    command = ["python", "train.py", f"config/{name}.py"]
    if cfg.folder != DATASETS.get(name):
        parent, dataset = os.path.split(cfg.folder)
        if parent != "data":
            dataset = cfg.folder if os.path.isabs(cfg.folder) else os.path.join(".", cfg.folder)
        command.append(f"--dataset={dataset}")
    return shlex.join(command)


def plan(cfg):
    """Returns the Job. Files of the hub are still to be found, local ones are there."""
    out_dir = cfg.folder
    settings = dict(format=FORMAT) | find_tokenizer(cfg.encoding).fields()
    settings["source"] = f"{cfg.repo} {cfg.subset} {cfg.split}"
    for name in ("text_key", "txt_documents", "shard_tokens", "val_tokens", "max_tokens"):
        settings[name] = getattr(cfg, name)
    if cfg.input:
        files = find_and_say(cfg)
    elif os.path.isdir(cfg.repo):
        if os.path.realpath(cfg.repo) == os.path.realpath(out_dir):
            raise UserError(f"{out_dir} is the source (--repo); name another --out_dir for its tokens")
        files = find_hub_files(cfg.repo, cfg.subset, cfg.split)
    else:
        return Job(cfg, out_dir, settings, [], 0, "")
    return Job(cfg, out_dir, settings, files, text_size(cfg, files), times_of(files))


def text_size(cfg, files):
    """Returns the approximate bytes of text in files."""
    return sum(text_bytes(path, cfg.text_key) for path in files)


def find_and_say(cfg):
    """Returns the files of the input, and says how many there are and what was passed over, by frequency."""
    more = tuple(ending.strip().lower() for ending in cfg.endings.split(",") if ending.strip())
    files, passed_over = find_files(cfg.input, ENDINGS + more)
    ours = os.path.realpath(os.path.join(cfg.folder, "meta.json"))  # where it is written among its source
    files = [path for path in files if os.path.realpath(path) != ours]
    common = [(reason, count) for reason, count in passed_over.most_common(8) if count]
    others = ", ".join(f"{count:,} {reason}" for reason, count in common)
    text = f"source: {len(files):,} files"
    if others:
        text += f"; passed over: {others}"
    print(text)
    return files


def describe_source(job):
    """Returns what the settings say of files, a digest of their contents included. Reads all local ones,
    unless nothing has changed since an earlier preparation, or what they give would not fit on the disk
    anyway."""
    record = record_in(job.out_dir)
    start = f"{job.cfg.input.rstrip('/') or job.settings['source']}: "
    if record.get("source_times") == job.source_times and str(record.get("source")).startswith(start):
        return record["source"]
    if not record:
        check_space(job.out_dir, expected_tokens(job, Progress().counts), job.itemsize)
    size = sum(map(size_of, job.files))
    digest = contents_of(job.files, job.cfg.skip_bad_files)
    return f"{start}{len(job.files)} files, {size:,} bytes, sha256 {digest[:16]}"


def record_in(out_dir):
    """Returns what a preparation into out_dir, finished or not, recorded; empty if nothing, or damaged."""
    if record := shards.read_meta(out_dir):
        return record
    try:
        return Progress.load(os.path.join(out_dir, "unfinished.npz"))[1]
    except UserError:
        return {}


def begin(job):
    """Starts or continues a preparation. Returns its (Progress, settings). Raises OSError on a full disk."""
    cfg, out_dir = job.cfg, job.out_dir
    progress, saved = unfinished(out_dir, job.progress_path, job.settings)
    settings = job.settings | dict(source_times=job.source_times)
    if not job.source_times:  # the hub's files as they were at the start, whatever has changed there since
        job.files = saved.get("hub_files") or find_hub_files(cfg.repo, cfg.subset, cfg.split)
        settings["hub_files"] = job.files
    before = progress.counts["tokens"]
    check_space(out_dir, expected_tokens(job, progress.counts) - before, job.itemsize)
    for partial in glob.glob(f"{glob.escape(out_dir)}/*_[0-9]*.bin.*.tmp"):
        os.remove(partial)
    for path in (job.progress_path, os.path.join(out_dir, "meta.json")):
        remove_temporary(path)
    progress.save(job.progress_path, settings)
    if before:
        print(f"continuing {out_dir} after {before:,} tokens in {len(progress.files)} whole shards")
    return progress, settings


def number_of_workers(cfg):
    if cfg.workers:
        return cfg.workers
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def write_train(job, progress, settings, train, stop):
    """Writes the training tokens, one chunk of text at a time. Asked to stop, it ends the script; the same
    command continues after the last whole shard."""
    cfg, counts = job.cfg, progress.counts
    train.write(progress.tail)
    with (
        tqdm(unit="tok", unit_scale=True, disable=None, dynamic_ncols=True, initial=counts["tokens"]) as bar,
        contextlib.closing(Workers(cfg.encoding, number_of_workers(cfg))) as workers,
    ):
        chunks = read_chunks(job.files, cfg, progress.position)
        for position, encoded in encode_chunks(chunks, workers):
            progress.position = position
            if stop.number:
                bar.close()
                print("stopped; the same command continues after the last whole shard", file=sys.stderr)
                sys.exit(128 + stop.number)
            whole = len(progress.files)
            tokens = choose(progress, encoded, cfg.val_tokens, cfg.max_tokens)
            train.write(tokens)
            bar.total = expected_tokens(job, counts) or None
            bar.update(counts["tokens"] - bar.n)
            if len(progress.files) > whole:
                progress.tail = tokens[len(tokens) - train.open_tokens :]
                progress.save(job.progress_path, settings)
                check_space(job.out_dir, (bar.total or 0) - counts["tokens"], job.itemsize)
            if cfg.max_tokens and counts["tokens"] >= cfg.max_tokens:
                break


def write_val(job, progress, train, val):
    """Writes the validation tokens, and the last training tokens: those that validation does not need.
    Returns the counts {split: {"tokens": n, "documents": n, "bytes": n}}."""
    for tokens in push_out(progress, min(job.cfg.val_tokens, progress.eligible // 10)):
        train.write(tokens)
    documents = sorted(progress.heap, key=lambda held: held.number)  # in the order of the source
    n_val = dict(tokens=sum(len(held.tokens) for held in documents), documents=len(documents))
    n_val["bytes"] = sum(held.n_bytes for held in documents)
    n_train = {name: count - n_val[name] for name, count in progress.counts.items()}
    if not documents or n_train["tokens"] <= n_val["tokens"]:
        raise UserError(
            f"{n_train['tokens']:,} tokens to train on and {n_val['tokens']:,} to validate: "
            f"{why_too_few(job, progress)}"
        )
    for held in documents:
        val.write(held.tokens)
    val.finish()
    train.finish()
    return dict(train=n_train, val=n_val)


def why_too_few(job, progress):
    """Returns why the documents do not make two splits, and what helps."""
    cfg, position, tokens = job.cfg, progress.position, progress.counts["tokens"]
    if not tokens:
        return (
            f"no text was read: {position.empty:,} empty documents, {position.bad_files:,} files that could "
            f"not be read to their end"
        )
    advice = []
    if cfg.max_tokens and tokens >= cfg.max_tokens:
        advice.append(f"raise --max_tokens={cfg.max_tokens}")
    if any(".txt" in path.lower() for path in job.files):
        advice.append(f"separate them by {EOT}")
        if cfg.txt_documents == "file":
            advice.append("use --txt_documents=blank_line")
    if not advice:
        advice.append("add some")
    text = "validation takes whole documents, all copies of one together, and these are too few, or one is "
    text += f"huge: {', or '.join(advice)}"
    if shards_in(job.out_dir):
        text += f"; first delete {job.progress_path} and the shards beside it"
    return text


def write_meta(job, progress, counts, files):
    """Writes meta.json, last: with it the folder is complete."""
    if job.source_times and times_of(job.files) != job.source_times:
        # not to be continued even if they are as before again: what was read may be neither
        never = job.settings | dict(source="files that changed while they were read")
        progress.save(job.progress_path, never)
        server = ""
        if any(map(is_address, job.files)):
            server = ", or their server says so at each request (then download them first)"
        raise UserError(
            f"the files of {job.cfg.input or job.cfg.repo} were changed while they were read{server}; "
            f"delete {job.progress_path} and the shards beside it, and prepare them again"
        )
    position = progress.position
    meta = job.settings | dict(source_times=job.source_times) | counts | dict(files=files)
    meta |= dict(empty_documents=position.empty, bad_files=position.bad_files)
    meta |= dict(endings=job.cfg.endings, skip_bad_files=job.cfg.skip_bad_files)
    with atomic_file(os.path.join(job.out_dir, "meta.json")) as f:
        f.write(json.dumps(meta, indent=1).encode())
    os.remove(job.progress_path)


def prepare(job, stop):
    """Does the job, or what is left of it, and says what it did."""
    progress, settings = begin(job)
    before = progress.counts["tokens"]
    start = time.perf_counter()
    prefix = job.cfg.name
    shard_tokens = job.cfg.shard_tokens
    with (
        ending_well(job.progress_path),
        shards.ShardWriter(job.out_dir, prefix, "train", shard_tokens, progress.files) as train,
        shards.ShardWriter(job.out_dir, prefix, "val", shard_tokens, {}) as val,
    ):
        write_train(job, progress, settings, train, stop)
        counts = write_val(job, progress, train, val)
    files = val.files | train.files
    write_meta(job, progress, counts, files)

    seconds = time.perf_counter() - start
    for writer in (train, val):
        n = counts[writer.split]
        print(
            f"{writer.split}: {n['tokens']:,} tokens of {n['documents']:,} documents, "
            f"{n['bytes']:,} bytes of text; shards: {len(writer.files)}"
        )
    wanted = min(job.cfg.val_tokens, progress.counts["tokens"] // 10)
    if counts["val"]["tokens"] < wanted // 2:
        print(
            "note: validation takes whole documents, and most are too long for the "
            f"{wanted:,} tokens that it needs"
        )
    if counts["val"]["tokens"] > 2 * wanted:
        print(
            f"note: validation needs {wanted:,} tokens, and has more, since it takes whole documents, equal "
            f"ones together: remove copies from the source, or divide long documents"
        )
    skipped = progress.position
    print(
        f"skipped: {skipped.empty:,} empty documents, "
        f"{skipped.bad_files:,} files that could not be read to their end"
    )
    size = sum(os.path.getsize(os.path.join(job.out_dir, name)) for name in files)
    rate = (progress.counts["tokens"] - before) / seconds
    print(f"wrote {size / 1e6:,.1f} MB to {job.out_dir} in {seconds:.1f} s, {rate:,.0f} tokens/s")
    print(f"next: {train_command(job.cfg, counts['train']['tokens'])}")


def report_if_done(job):
    """Returns whether the job has been done already; says so if it has, and what to do next."""
    record = prepared_already(job.out_dir, job.settings)
    if not record:
        return False
    with contextlib.suppress(OSError):  # prepared data may be read-only
        remove(job.progress_path)  # left over where a run was killed just before removing it
    if bad_files := record.get("bad_files"):
        print(f"note: {bad_files:,} files could not be read to their end then, and their rest was skipped")
    print(f"{job.out_dir} is prepared already. Next: {train_command(job.cfg, record['train']['tokens'])}")
    return True


def prepare_characters(cfg):
    """Prepares nanoGPT's data by characters."""
    sources = find_and_say(cfg)
    if cfg.dry_run:
        print_dry_run(cfg, text_size(cfg, sources), 2, "seconds")
        return
    files = characters.files_of(texts_in(sources, cfg), cfg.max_tokens)
    with sole_use(cfg.folder):
        new = characters.write(cfg.folder, files)
    n_train = len(files["train.bin"]) // 2
    n_val = len(files["val.bin"]) // 2
    print(f"train: {n_train:,} characters; val: {n_val:,}, the last tenth")
    done = f"{cfg.folder} is prepared already"
    if new:
        done = f"wrote {', '.join(new)} to {cfg.folder}"
    print(done)
    print(f"next: {train_command(cfg, n_train)}")


def texts_in(sources, cfg):
    """Yields the texts of all documents of these files, in parts, with a line end between two documents. As
    nanoGPT reads them: \\r\\n and \\r become \\n."""
    newlines = None
    for _, parts in read_chunks(sources, cfg, Position()):
        for part in parts:
            if part.begins and newlines:
                yield newlines.decode("", final=True) + "\n"
            if part.begins:
                newlines = io.IncrementalNewlineDecoder(None, translate=True)  # a part may end within \r\n
            yield newlines.decode(without_surrogates(part.text))
    if newlines:
        yield newlines.decode("", final=True)


def dry_run_job(job):
    """Prints what a job would take; its first chunk of local text is tokenized to know how long."""
    cfg = job.cfg
    tokens = expected_tokens(job, Progress().counts)
    time_text = "not known before it runs"
    if cfg.input:
        position, parts = next(read_chunks(job.files, cfg, Position()))
        tokenizer = find_tokenizer(cfg.encoding)
        start = time.perf_counter()
        encoded = encode_parts(parts, tokenizer)
        rate = len(encoded.tokens) / (time.perf_counter() - start)
        counts = dict(tokens=len(encoded.tokens), bytes=sum(n_bytes for _, _, _, n_bytes, _ in encoded.parts))
        tokens = expected_tokens(job, counts)
        if position.file == len(job.files):  # that was everything
            tokens = len(encoded.tokens)
        seconds = tokens / max(rate, 1)
        workers = number_of_workers(cfg)
        time_text = f"about {duration(math.ceil(seconds / workers))} with {workers} workers, by the first MB"
    print_dry_run(cfg, tokens, job.itemsize, time_text)


def print_dry_run(cfg, tokens, itemsize, time_text):
    """Prints what a preparation that gives about so many tokens would take."""
    tokens = min(tokens, cfg.max_tokens or tokens)
    needed = tokens * itemsize / 1e9
    free = free_bytes(cfg.folder) / 1e9
    if not tokens:
        print("how many tokens that gives is not known: the source does not say how long it is")
        return
    lines = [f"tokens: about {tokens:,}"]
    lines.append(f"disk: {needed:,.3f} GB in {cfg.folder}, where {free:,.1f} GB are free")
    lines.append(f"time: {time_text}")
    if os.path.exists(os.path.join(cfg.folder, "meta.json")):
        lines.append(f"note: {cfg.folder} has been prepared already")
    print_aligned([*lines, f"next: {train_command(cfg, tokens)}"])


def main(argv):
    cfg = from_command_line(PrepareConfig, __doc__, argv)
    if cfg.encoding == "characters":
        prepare_characters(cfg)
        return
    job = plan(cfg)
    if cfg.dry_run:
        dry_run_job(job)
        return
    if job.source_times:
        job.settings["source"] = describe_source(job)
    if report_if_done(job):
        return
    with StopRequest("stopping; Ctrl-C again leaves at once") as stop, sole_use(job.out_dir):
        if not report_if_done(job):  # by another process, meanwhile
            prepare(job, stop)


if __name__ == "__main__":
    run_script(main)
