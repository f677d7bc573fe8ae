"""
Token files: writing, finding and reading them, and the order in which training visits them.

Three formats are read, told apart by file name: shards with llm.c's header (`*train*_000001.bin`),
build-nanogpt's NumPy shards (`*train*_000001.npy`) and nanoGPT's raw uint16 `train.bin`. Only the first is
written. A split is cut into windows of block_size + 1 tokens that overlap by one: a window's inputs are all
its tokens but the last, its targets all but the first. No window has tokens of two files.
"""

import contextlib
import functools
import itertools
import json
import math
import os
import re
import string
import zlib
from dataclasses import dataclass

import numpy as np

from sologpt.display import warn
from sologpt.errors import UserError
from sologpt.files import atomic_file, remove, sha256_of, sync_and_rename, temporary_name

HEADER_BYTES = 1024  # 256 int32: magic, version, token count, zeros (llm.c, dev/data/data_common.py)
FORMATS = {20240520: (1, np.dtype("<u2")), 20240801: (7, np.dtype("<u4"))}  # magic: (version, dtype)


class DataError(UserError):
    """Token files that cannot be read any more, or contain ids that the tokenizer lacks: noticed in the
    middle of a run."""


@dataclass(frozen=True)
class Shard:
    path: str
    dtype: np.dtype
    offset: int  # bytes before the first token
    count: int  # tokens


# -----------------------------------------------------------------------------
# files


def shard_header(dtype, count):
    """Returns the header, bytes, of a shard of count tokens of dtype, uint16 or uint32."""
    magic = {np.dtype("<u2"): 20240520, np.dtype("<u4"): 20240801}[dtype]
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, FORMATS[magic][0], count
    return header.tobytes()


def write_shard(path, tokens):
    """Writes tokens, a 1-D uint16 or uint32 array, to path in llm.c's format, whole or not at all."""
    with atomic_file(path) as f:
        f.write(shard_header(tokens.dtype, len(tokens)))
        f.write(tokens)


class ShardWriter:
    """Writes the tokens of one split, as they come, to shards of shard_tokens each; the last may be shorter.

    files, a dict, gets {name: {"tokens": n, "sha256": hex}} of each shard that is whole and on disk; its
    entries at the start are those of shards written before. open_tokens is the number of tokens in the
    unfinished shard, which has a temporary name and is removed on leaving the `with`.
    """

    def __init__(self, folder, prefix, split, shard_tokens, files):
        self.folder = folder
        self.prefix = prefix
        self.split = split
        self.shard_tokens = shard_tokens
        self.files = files
        self.open_tokens = 0
        self.file = None

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.file:
            # closing writes what is buffered, which a full disk refuses again
            with contextlib.suppress(OSError):
                self.file.close()
            remove(self.file.name)  # already gone if a signal came just after the renaming

    def path(self):
        number = len(self.files)
        if self.split == "train":
            number += 1  # as llm.c numbers them: val is 0, train starts at 1
        return os.path.join(self.folder, f"{self.prefix}_{self.split}_{number:06d}.bin")

    def write(self, tokens):
        """Appends tokens, a 1-D uint16 or uint32 array. Raises OSError, for a full disk for example."""
        while len(tokens):
            if not self.file:
                self.file = open(temporary_name(self.path()), "wb")
                self.file.write(bytes(HEADER_BYTES))
            room = self.shard_tokens - self.open_tokens
            chunk = tokens[:room]
            tokens = tokens[room:]
            self.file.write(chunk)
            self.open_tokens += len(chunk)
            self.dtype = chunk.dtype
            if self.open_tokens == self.shard_tokens:
                self.finish()

    def finish(self):
        """Completes the unfinished shard, if there is one."""
        if not self.file:
            return
        path = self.path()
        self.file.seek(0)
        self.file.write(shard_header(self.dtype, self.open_tokens))
        sync_and_rename(self.file, path)
        self.files[os.path.basename(path)] = dict(tokens=self.open_tokens, sha256=sha256_of(path))
        self.open_tokens = 0
        self.file = None


def read_header(path):
    """Returns the Shard at path, a file in llm.c's format. Raises UserError if it is not, or not whole."""
    size = os.path.getsize(path)
    header = np.fromfile(path, dtype="<i4", count=3)
    if len(header) < 3 or header[0] not in FORMATS or header[1] != FORMATS[header[0]][0]:
        hint = ""
        if os.path.exists(os.path.join(os.path.dirname(path), "train.bin")):
            hint = ", or move it away, as its name hides nanoGPT's train.bin"
        raise UserError(
            f"{path} does not start with llm.c's shard header; write it again with prepare_fineweb.py{hint}"
        )
    dtype = FORMATS[header[0]][1]
    count = int(header[2])
    expected = HEADER_BYTES + count * dtype.itemsize
    if size != expected:
        raise UserError(
            f"{path} has {size:,} bytes, its header promises {count:,} tokens in {expected:,}: it was cut "
            f"short or damaged; copy or prepare it again"
        )
    return Shard(path, dtype, HEADER_BYTES, count)


def read_npy(path):
    """Returns the Shard at path, a .npy file of 1-D uint16 or uint32 tokens. Raises UserError for others."""
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except OSError:
        raise
    except Exception as e:  # of many kinds, for a damaged header
        raise UserError(f"{path} is not a whole .npy file ({e}); copy or prepare it again") from None
    if array.ndim != 1 or array.dtype not in (np.dtype("<u2"), np.dtype("<u4")):
        raise UserError(
            f"{path} holds {array.dtype} of shape {array.shape}; tokens are uint16 or uint32, 1-D"
        )
    size, expected = os.path.getsize(path), array.offset + array.nbytes
    if size != expected:
        raise UserError(
            f"{path} has {size:,} bytes, its header promises {expected:,}: it was damaged; copy it again"
        )
    return Shard(path, array.dtype, array.offset, array.size)


def read_raw(path):
    """Returns the Shard at path, nanoGPT's headerless uint16 tokens. Raises UserError at an odd size, and for
    what would be taken for tokens: text, larger numbers, a header of llm.c's or NumPy's."""
    size = os.path.getsize(path)
    split = os.path.basename(path).removesuffix(".bin")
    with open(path, "rb") as f:
        start = f.read(8192)
    if len(start) >= 4 and int.from_bytes(start[:4], "little") in FORMATS:
        raise UserError(f"{path} starts with llm.c's shard header; rename it to NAME_{split}_000001.bin")
    if start.startswith(b"\x93NUMPY"):
        raise UserError(f"{path} is a .npy file; rename it to NAME_{split}_000001.npy")
    has_tokenizer = os.path.exists(os.path.join(os.path.dirname(path), "meta.pkl"))
    if len(start) >= 64 and not has_tokenizer and not start.translate(None, string.printable.encode()):
        raise UserError(f"{path} is text, or a web page, and no tokens; write them with prepare_fineweb.py")
    if size % 2:
        raise UserError(
            f"{path} has an odd number of bytes ({size:,}), so it is not uint16 tokens or was cut short; "
            f"copy or prepare it again"
        )
    first = np.frombuffer(start, dtype="<u2")
    lower, upper = first[::2], first[1::2]
    # characters of one a line have a 0, its end, at each odd place, but none at an even one
    one_a_line = lower.all() and has_tokenizer
    if len(first) >= 64 and lower.any() and not upper.any() and not one_a_line:
        raise UserError(
            f"{path} has 0 for every other token, as numbers of 32 or 64 bits have; write it again with "
            f".astype(np.uint16), or with larger ids as .npy shards"
        )
    return Shard(path, np.dtype("<u2"), 0, size // 2)


def find_data(dataset):
    """Returns the folder of a dataset: data/<dataset>, or dataset as a path. Raises FileNotFoundError."""
    places = [os.path.join("data", dataset), dataset]
    if dataset.startswith(".."):  # nanoGPT looks in data/.. only
        places.reverse()
    elif dataset.startswith("."):  # ./books is never data/books
        places = [dataset]
    for folder in places:
        if dataset and os.path.isdir(folder):
            return folder
    names = [name for name in sorted(os.listdir("data")) if is_data(name)] if os.path.isdir("data") else []
    holds = f"data/ holds {', '.join(names[:5])}; " if names else ""
    raise FileNotFoundError(
        f"there is no folder {' or '.join(places)} for dataset={dataset!r}; {holds}write one with "
        f"python prepare_fineweb.py (FineWeb-Edu) or python prepare_fineweb.py --input=FOLDER (your own text)"
    )


def is_data(name):
    """Whether data/<name> is a folder with token files."""
    folder = os.path.join("data", name)
    return os.path.isdir(folder) and any(file.endswith((".bin", ".npy")) for file in os.listdir(folder))


def token_files(folder):
    """Returns (names of the token files of both splits, in order; what reads one) of the first format of
    which the folder holds any file; without any, no names and None."""
    formats = (
        (r".*(train|val).*_\d+\.bin", read_header),
        (r".*(train|val).*_\d+\.npy", read_npy),
        (r"(train|val)\.bin", read_raw),
    )
    for pattern, read in formats:
        names = [name for name in sorted(os.listdir(folder)) if re.fullmatch(pattern, name)]
        if names:
            return names, read
    return [], None


def find_shards(folder, split):
    """Returns the Shards of split, 'train' or 'val', in name order. Raises FileNotFoundError for none."""
    names, read = token_files(folder)
    of_split = [name for name in names if split_of(name) == split]
    if of_split:
        return [read(os.path.join(folder, name)) for name in of_split]
    raise FileNotFoundError(
        f"{folder} has no {split} tokens (looked for *{split}*_NNNNNN.bin, *{split}*_NNNNNN.npy and "
        f"{split}.bin, in the format of the other split); write them with python prepare_fineweb.py"
    )


def split_of(name):
    """Returns a token file's split, train or val: which comes last in its name, as in val_train_000001.bin.
    Whole words count before parts of one: train_medieval_000001.bin is for training. None for other names."""
    whole_words = re.findall(r"(?<![^_.-])(?:train|val)(?![^_.-])", name)
    parts_of_words = re.findall("train|val", name)
    found = whole_words or parts_of_words
    if not found:
        return None
    return found[-1]


def fingerprint(shards, tokenizer):
    """Returns {file name: what it holds}, all strings, of the Shards and their Tokenizer; checkpoints keep
    it.

    Each file has its length, a CRC of its first 4,096 tokens and, if meta.json lists it, a sha256: that of
    meta.json, or computed anew if the file is newer. Other files may change unnoticed if length and start
    stay.
    """
    found = {}
    recorded = recorded_sha256s(os.path.dirname(shards[0].path))
    for shard in shards:
        name = os.path.basename(shard.path)
        start = np.fromfile(shard.path, shard.dtype, min(shard.count, 4096), offset=shard.offset)
        crc = zlib.crc32(start.tobytes())
        found[name] = f"{shard.count:,} {shard.dtype.name} tokens (CRC {crc:08x} at its start)"
        if name in recorded:
            found[name] += f"{SHA256}{current_sha256(shard.path, recorded[name])[:16]}"
    crc = zlib.crc32(json.dumps(tokenizer.fields(), sort_keys=True).encode())
    found["tokenizer"] = f"{tokenizer.encoding} of {tokenizer.vocab_size:,} ids (CRC {crc:08x})"
    return found


SHA256 = ", sha256 "  # in a fingerprint, between what every file has and what only some have


def same_file(a, b):
    """Whether two entries of fingerprints, strings or None, are of the same content, as far as both say."""
    if a is None or b is None:
        return a == b
    start, _, sha256 = a.partition(SHA256)
    other_start, _, other_sha256 = b.partition(SHA256)
    if sha256 and other_sha256 and sha256 != other_sha256:
        return False
    return start == other_start


def warn_if_replaced(folder, fingerprint):
    """Warns of files whose sha256 in a fingerprint is not the one in meta.json."""
    changed = []
    for name, sha256 in recorded_sha256s(folder).items():
        if name in fingerprint and not fingerprint[name].endswith(SHA256 + sha256[:16]):
            changed.append(name)
    if changed:
        files = f"{folder}: {some(changed)}"
        warn(f"{files}: damaged or replaced since meta.json was written; better copy or prepare it again")


def read_meta(folder):
    """Returns what folder's meta.json holds, a dict; empty if there is none or it cannot be read."""
    try:
        with open(os.path.join(folder, "meta.json"), encoding="utf-8") as f:
            return dict(json.load(f))
    except (OSError, ValueError, TypeError, RecursionError):
        return {}


def recorded_sha256s(folder):
    """Returns {file name: sha256} of the shards that folder's meta.json lists; empty if it lists none."""
    try:
        files = read_meta(folder)["files"]
        return {name: str(about["sha256"]) for name, about in files.items()}
    except (KeyError, TypeError, AttributeError):  # meta.json may be somebody else's
        return {}


def current_sha256(path, recorded):
    """Returns the sha256 of a file, given the one in meta.json: computed only if the file is newer than
    that."""
    meta = os.path.join(os.path.dirname(path), "meta.json")
    if os.stat(path).st_mtime_ns <= os.stat(meta).st_mtime_ns:
        return recorded
    return sha256_of(path)


def tokens_per_byte(shards):
    """Returns the tokens of a split's Shards per byte of its texts in UTF-8, which turns a loss into bits per
    byte; None if the data's meta.json does not say, counts other tokens, or is not there."""
    folder, name = os.path.split(shards[0].path)
    try:
        counts = read_meta(folder)[split_of(name)]
        ratio = counts["tokens"] / counts["bytes"]
    except (KeyError, TypeError, ArithmeticError):  # meta.json may be somebody else's
        return None
    if counts["tokens"] != sum(shard.count for shard in shards) or not 0 < ratio < math.inf:
        return None
    return ratio


# -----------------------------------------------------------------------------
# windows and their order


# a batch may straddle two epochs; 4 bytes a window: 40 MB for 10B tokens at 1024
@functools.lru_cache(maxsize=2)
def epoch_order(n, seed, epoch):
    """Returns the order in which an epoch visits n windows, uint32 (n,): a function of its arguments alone.

    NumPy promises that the stream of RandomState never changes, so a run resumes under any later NumPy.
    """
    order = np.arange(n, dtype=np.uint32)
    np.random.RandomState([seed, epoch]).shuffle(order)
    return order


@functools.lru_cache(maxsize=2)
def epoch_shift(block_size, seed, epoch):
    """Returns how many tokens later the windows of an epoch begin than those of the first: a new random
    number in each, so that repeated text is cut elsewhere."""
    if epoch == 0:
        return 0
    return int(np.random.RandomState([seed, epoch, block_size]).randint(block_size))


def open_splits(folder, block_size, n_ids):
    """Returns the Windows of train and of val. Raises as find_shards and Windows do, and warns of shards that
    seem to be missing, and of token files that are not read."""
    splits = [find_shards(folder, split) for split in ("train", "val")]
    names, read = token_files(folder)
    if read is read_raw and n_ids > 2**16:
        raise UserError(
            f"{folder} has a vocabulary of {n_ids:,} ids, but uint16 tokens, which end at 65,535; write them "
            f"as uint32 to NAME_train_000001.npy and NAME_val_000000.npy, without meta.pkl"
        )
    listed = recorded_sha256s(folder).keys()
    if listed and (unlisted := sorted(set(names) - listed)):
        warn(f"{folder} has {some(unlisted)}, which its meta.json does not list; going on with them")
    if missing := sorted(listed - set(names)):
        warn(f"{folder} lacks {some(missing)}, which its meta.json lists; going on without")
    elif missing := gaps(names):
        warn(f"{folder} lacks {some(missing)}, if its numbers have no gaps; going on without")
    token_like = [name for name in sorted(os.listdir(folder)) if name.endswith((".bin", ".npy"))]
    if unread := [name for name in token_like if name not in names]:
        warn(f"{folder}: not read, as their names do not go with {names[0]}: {some(unread)}")
    return [Windows(shards, block_size, n_ids) for shards in splits]


def gaps(names):
    """Returns the names that are missing between those of shards in order: a_000002.bin between a_000001.bin
    and a_000003.bin. Of each gap at most five, to be shown."""
    missing = []
    for name, following in itertools.pairwise(names):
        stem, number, ending = numbered(name)
        next_stem, next_number, next_ending = numbered(following)
        if (stem, ending) == (next_stem, next_ending):
            absent = range(int(number) + 1, int(next_number))[:5]
            missing += [f"{stem}{n:0{len(number)}d}{ending}" for n in absent]
    return [name for name in missing if name not in names]  # numbers without zeros come in another order


def numbered(name):
    """Returns the parts of a token file's name before, of and after its last number, which may be empty."""
    return re.fullmatch(r"(.*?)(\d*)(\.\w+)", name).groups()


def some(names):
    """Returns the first four names as text."""
    more = ", ..." if len(names) > 4 else ""
    return ", ".join(names[:4]) + more


def read_tokens(f, shard, start, count):
    """Returns count tokens of an open file as bytes. Raises DataError if it ends before them."""
    f.seek(shard.offset + start * shard.dtype.itemsize)
    tokens = f.read(count * shard.dtype.itemsize)
    if len(tokens) < count * shard.dtype.itemsize:
        raise DataError(f"{shard.path} has become shorter; copy or prepare it again")
    return tokens


class Windows:
    """The windows of one split. len() is their number; their tokens are read from disk when asked for."""

    shifting = True  # in each epoch; False for a run that began before there were shifts

    def __init__(self, shards, block_size, n_ids):
        self.shards = shards
        self.block_size = block_size
        self.n_ids = n_ids  # that the tokenizer has
        self.tokens = sum(shard.count for shard in shards)
        counts = [max(shard.count - 1, 0) // block_size for shard in shards]
        self.ends = np.cumsum(counts)  # number of windows up to and including each shard
        if not len(self):
            raise UserError(
                f"{os.path.dirname(shards[0].path)}: {len(shards)} file(s) with {self.tokens:,} tokens like "
                f"{os.path.basename(shards[0].path)} hold no window of block_size={block_size} (+ 1) tokens; "
                f"prepare more data or lower --block_size"
            )

    def __len__(self):
        return int(self.ends[-1])

    def training(self, first, count, seed):
        """Returns the windows, int64 (count,), of sequences first to first + count - 1 of a training run:
        every window once an epoch, each epoch shuffled anew. Raises DataError past the last epoch."""
        if first + count > len(self) * 2**32:  # as far as NumPy's seeds go
            raise DataError(
                f"sequence {first + count:,} is past the {2**32:,} epochs of the order of the data"
            )
        chosen = np.empty(count, dtype=np.int64)
        for i in range(count):
            epoch, place = divmod(first + i, len(self))
            chosen[i] = epoch_order(len(self), seed, epoch)[place]
        return chosen

    def shifts(self, first, count, seed):
        """Returns the tokens, int64 (count,), by which the windows of those sequences begin later than they
        do in the first epoch."""
        if not self.shifting:
            return np.zeros(count, dtype=np.int64)
        epochs = np.arange(first, first + count) // len(self)
        return np.array([epoch_shift(self.block_size, seed, int(epoch)) for epoch in epochs])

    def read_training(self, first, count, seed):
        """Returns the tokens, as read does, of sequences first to first + count - 1 of a training run."""
        return self.read(self.training(first, count, seed), self.shifts(first, count, seed))

    def spread(self, count):
        """Returns up to count windows, int64, evenly spread over the split: always the same ones."""
        count = min(count, len(self))
        return np.arange(count) * len(self) // count

    def read(self, windows, shifts=0):
        """Returns the tokens, int64 (len(windows), block_size + 1), of the windows with these numbers, each
        beginning so many tokens later. One that would then leave its file goes on at the file's beginning,
        which a shift has freed: no two windows of an epoch share an input.

        Raises DataError for a file that has become shorter or is gone, and for an id that the tokenizer
        lacks: the model may have no row for it, and on a GPU that would be a device-side assert.
        """
        tokens = np.empty((len(windows), self.block_size + 1), dtype=np.int64)
        shifts = np.broadcast_to(shifts, windows.shape)
        owners = np.searchsorted(self.ends, windows, side="right")
        for owner in np.unique(owners):
            shard = self.shards[owner]
            rows = np.flatnonzero(owners == owner)
            first = self.ends[owner - 1] if owner else 0
            starts = (windows[rows] - first) * self.block_size + shifts[rows]
            starts = starts % shard.count
            tokens[rows] = self.read_from(shard, starts)
            self.check_ids(shard, starts, tokens[rows])
        return tokens

    def read_from(self, shard, starts):
        """Returns the tokens of the windows that begin at starts in one file. No memory map: that would grow
        to the size of the file in RSS, and a file that is cut short would kill the process."""
        size = self.block_size + 1
        pieces = []
        try:
            with open(shard.path, "rb") as f:
                for start in starts.tolist():
                    before_end = min(size, shard.count - start)
                    pieces.append(read_tokens(f, shard, start, before_end))
                    pieces.append(read_tokens(f, shard, 0, size - before_end))
        except OSError as e:
            raise DataError(f"cannot read {shard.path}: {e.strerror}") from None
        return np.frombuffer(b"".join(pieces), dtype=shard.dtype).reshape(len(starts), size)

    def check_ids(self, shard, starts, tokens):
        if tokens.max() < self.n_ids:
            return
        row, column = np.argwhere(tokens >= self.n_ids)[0]
        position = (starts[row] + column) % shard.count
        raise DataError(
            f"{shard.path} has the token id {tokens[row, column]} at position {position:,}, but "
            f"its tokenizer has only the ids below {self.n_ids}: it was made with another one than its "
            f"meta.json or meta.pkl says (without either: GPT-2's); correct or add that file, or prepare the "
            f"data again"
        )
