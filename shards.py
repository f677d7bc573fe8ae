"""
Token files: write them, find and read them, and the order in which training visits them.

Three formats are read, told apart by file name: shards with llm.c's header (`*train*_000001.bin`), build-nanogpt's
NumPy shards (`*train*_000001.npy`) and nanoGPT's raw uint16 `train.bin`. Only the first is written.
A split is cut into windows of block_size + 1 tokens that overlap by one: a window's inputs are all tokens but the
last, its targets all but the first. Windows never cross from one file into the next.
"""

import contextlib
import functools
import hashlib
import json
import os
import pickle
import re
import zlib
from dataclasses import dataclass

import numpy as np

HEADER_BYTES = 1024  # 256 int32: magic, version, token count, zeros (llm.c, dev/data/data_common.py)
FORMATS = {20240520: (1, np.dtype("<u2")), 20240801: (7, np.dtype("<u4"))}  # magic: (version, dtype)


@dataclass(frozen=True)
class Shard:
    path: str
    dtype: np.dtype
    offset: int  # bytes before the first token
    count: int  # tokens


# -----------------------------------------------------------------------------
# files


def shard_header(dtype, count):
    """Returns the bytes that stand before the tokens in a shard of count tokens of dtype, uint16 or uint32."""
    magic = {np.dtype("<u2"): 20240520, np.dtype("<u4"): 20240801}[dtype]
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, FORMATS[magic][0], count
    return header.tobytes()


def write_shard(path, tokens):
    """Writes tokens, a 1-D uint16 or uint32 array, to path in llm.c's format; there is never half a file under path."""
    with atomic_file(path) as f:
        f.write(shard_header(tokens.dtype, len(tokens)))
        f.write(tokens)


@contextlib.contextmanager
def atomic_file(path, previous=None):
    """Opens a temporary file for writing bytes; on success it is synced to disk and renamed to path, else removed.

    What was at path becomes previous, if that is given. At every moment one of the two is there, and whole."""
    partial = f"{path}.tmp"
    try:
        with open(partial, "wb") as f:
            yield f
            sync_and_rename(f, path, previous)
    except BaseException:
        if os.path.exists(partial):
            os.remove(partial)
        raise


def sync_and_rename(f, path, previous=None):
    """Makes the open file f, so far under a temporary name, the file at path: first to disk, then the name."""
    f.flush()
    os.fsync(f.fileno())
    f.close()
    if previous and os.path.exists(path):
        os.replace(path, previous)
    os.replace(f.name, path)
    sync_folder(os.path.dirname(path) or ".")


def sync_folder(folder):
    """Puts the names in folder on disk, so that a power cut cannot undo a rename. Windows does so by itself; a file
    system that cannot is no reason to fail: the file itself is there."""
    if os.name == "posix":
        with contextlib.suppress(OSError):
            handle = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)


class ShardWriter:
    """Writes the tokens of one split, as they come, into shards of shard_tokens each; the last may be shorter.

    files, a dict, gets {name: {"tokens": n, "sha256": hex}} of each shard that is whole and on disk; what it holds
    at the start is there already. open_tokens is the number of tokens in the shard under way, which has a temporary
    name and is removed on leaving the `with`.
    """

    def __init__(self, folder, prefix, split, shard_tokens, files):
        self.folder, self.prefix, self.split, self.shard_tokens = folder, prefix, split, shard_tokens
        self.files, self.open_tokens, self.file = files, 0, None

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.file:
            with contextlib.suppress(OSError):  # closing writes what is buffered, which a full disk refuses again
                self.file.close()
            with contextlib.suppress(FileNotFoundError):  # a signal came just after the renaming
                os.remove(self.file.name)

    def path(self):
        number = len(self.files) + (self.split == "train")  # as llm.c numbers them: val is 0, train starts at 1
        return os.path.join(self.folder, f"{self.prefix}_{self.split}_{number:06d}.bin")

    def write(self, tokens):
        """Appends tokens, a 1-D uint16 or uint32 array. Raises OSError, for a full disk for example."""
        while len(tokens):
            if not self.file:
                self.file = open(f"{self.path()}.tmp", "wb")
                self.file.write(bytes(HEADER_BYTES))
            some, tokens = np.split(tokens, [self.shard_tokens - self.open_tokens])
            self.file.write(some)
            self.open_tokens += len(some)
            self.dtype = some.dtype
            if self.open_tokens == self.shard_tokens:
                self.finish()

    def finish(self):
        """Ends the shard under way, if there is one."""
        if self.file:
            path = self.path()
            self.file.seek(0)
            self.file.write(shard_header(self.dtype, self.open_tokens))
            sync_and_rename(self.file, path)
            self.files[os.path.basename(path)] = dict(tokens=self.open_tokens, sha256=file_sha256(path))
            self.open_tokens, self.file = 0, None


def file_sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def read_header(path):
    """Returns the Shard at path, a file in llm.c's format. Raises ValueError if it is not, or not whole."""
    size = os.path.getsize(path)
    header = np.fromfile(path, dtype="<i4", count=3)
    if len(header) < 3 or header[0] not in FORMATS or header[1] != FORMATS[header[0]][0]:
        raise ValueError(f"{path} does not start with llm.c's shard header; write it again with prepare_fineweb.py")
    dtype, count = FORMATS[header[0]][1], int(header[2])
    expected = HEADER_BYTES + count * dtype.itemsize
    if size != expected:
        raise ValueError(
            f"{path} has {size:,} bytes, its header promises {count:,} tokens in {expected:,}: it was cut short or "
            f"damaged; copy or prepare it again"
        )
    return Shard(path, dtype, HEADER_BYTES, count)


def read_npy(path):
    """Returns the Shard at path, a 1-D uint16 or uint32 array saved by NumPy. Raises ValueError if it is not."""
    try:
        array = np.load(path, mmap_mode="r")
    except (ValueError, EOFError) as e:
        raise ValueError(f"{path} is not a whole .npy file ({e}); copy or prepare it again") from None
    if array.ndim != 1 or array.dtype not in (np.dtype("<u2"), np.dtype("<u4")):
        raise ValueError(f"{path} holds {array.dtype} of shape {array.shape}; tokens are uint16 or uint32, 1-D")
    return Shard(path, array.dtype, array.offset, array.size)


def read_raw(path):
    """Returns the Shard at path, nanoGPT's headerless uint16 tokens. Raises ValueError at an odd number of bytes."""
    size = os.path.getsize(path)
    if size % 2:
        raise ValueError(
            f"{path} has an odd number of bytes ({size:,}), so it is not uint16 tokens or was cut short; copy or "
            f"prepare it again"
        )
    return Shard(path, np.dtype("<u2"), 0, size // 2)


def find_data(dataset):
    """Returns the folder of a dataset: data/<dataset>, or dataset itself as a path. Raises FileNotFoundError."""
    for folder in (os.path.join("data", dataset), dataset):
        if dataset and os.path.isdir(folder):
            return folder
    raise FileNotFoundError(
        f"there is no folder {os.path.join('data', dataset)} for dataset={dataset!r}; "
        f"write it with python prepare_fineweb.py, or name another with --dataset="
    )


def find_shards(folder, split):
    """Returns the Shards of split, 'train' or 'val', in name order. Raises FileNotFoundError if there are none.

    The first format of which the folder holds any file is the format of both splits."""
    for pattern, read in (
        (r".*(train|val).*_\d+\.bin", read_header),
        (r".*(train|val).*_\d+\.npy", read_npy),
        (r"(train|val)\.bin", read_raw),
    ):
        names = [name for name in sorted(os.listdir(folder)) if re.fullmatch(pattern, name)]
        mine = [name for name in names if (name.rfind("train") > name.rfind("val")) == (split == "train")]
        if mine:
            return [read(os.path.join(folder, name)) for name in mine]
        if names:
            break
    raise FileNotFoundError(
        f"{folder} has no {split} tokens (looked for *{split}*_000001.bin, *{split}*_000001.npy and {split}.bin, "
        f"in the format of the other split); write them with python prepare_fineweb.py"
    )


def fingerprint(shards, tokenizer):
    """Returns {file name: what it holds} of the Shards and of their tokenizer, all strings, to be kept in a checkpoint.
    Other data give another one, unless all names, lengths and first 4,096 tokens, which it reads, are the same."""
    found = {}
    for shard in shards:
        data = np.memmap(shard.path, shard.dtype, "r", shard.offset, (shard.count,)) if shard.count else np.empty(0)
        crc = zlib.crc32(data[:4096].tobytes())
        found[os.path.basename(shard.path)] = f"{shard.count:,} {shard.dtype.name} tokens (CRC {crc:08x} at its start)"
    crc = zlib.crc32(json.dumps(tokenizer, sort_keys=True).encode())
    return found | {"tokenizer": f"{tokenizer['encoding']} of {tokenizer['vocab_size']:,} ids (CRC {crc:08x})"}


# -----------------------------------------------------------------------------
# what the tokens mean


class PlainUnpickler(pickle.Unpickler):
    """Reads a pickle of plain dicts, strings and numbers, and nothing that could run code."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it refers to {module}.{name}; only dicts, strings and numbers are read")


def read_tokenizer(folder):
    """Returns the tokenizer of a data folder, a dict of plain values that is also kept in checkpoints.

    encoding: 'bytes', 'characters' or a tiktoken name; vocab_size: the number of ids; eot_token: the end-of-text id or
    None; for characters, itos: {id: text}. From meta.json (prepare_fineweb.py) or meta.pkl (nanoGPT); without either it
    is GPT-2's, as in nanoGPT. Raises ValueError for a file that cannot be read.
    """
    path = os.path.join(folder, "meta.json")
    if os.path.exists(path):
        try:
            with open(path, encoding="utf-8") as f:
                meta = json.load(f)
            eot = meta["eot_token"]
            return dict(
                encoding=str(meta["encoding"]),
                vocab_size=int(meta["vocab_size"]),
                eot_token=None if eot is None else int(eot),
            )
        except (ValueError, KeyError, TypeError) as e:
            raise ValueError(f"{path} is damaged ({e!r}); prepare the data again") from None
    path = os.path.join(folder, "meta.pkl")
    if os.path.exists(path):
        try:
            with open(path, "rb") as f:
                meta = PlainUnpickler(f).load()
            itos = meta.get("itos", {})
            itos = {int(i): str(text) for i, text in (itos.items() if isinstance(itos, dict) else enumerate(itos))}
            return dict(encoding="characters", vocab_size=int(meta["vocab_size"]), eot_token=None, itos=itos)
        except Exception as e:  # a damaged pickle may raise anything
            raise ValueError(f"cannot read {path}: {e!r}") from None
    return dict(encoding="gpt2", vocab_size=50257, eot_token=50256)


def text_codec(tokenizer):
    """Returns (encode, decode) of a tokenizer from read_tokenizer: encode(str) -> list of ids, decode(ids) -> str.

    "<|endoftext|>" in the text becomes the end-of-text id and back. Raises ValueError for text or an encoding that is
    unknown; encoding with a tiktoken name needs tiktoken's files, from its cache or the network.
    """
    encoding, eot = tokenizer["encoding"], tokenizer["eot_token"]
    if encoding == "bytes":
        return functools.partial(encode_bytes, eot=eot), functools.partial(decode_bytes, eot=eot)
    if encoding == "characters":
        itos = tokenizer["itos"]
        return functools.partial(encode_characters, stoi={text: i for i, text in itos.items()}), (
            lambda ids: "".join(itos[i] for i in ids)
        )
    bpe = load_bpe(encoding)
    return functools.partial(bpe.encode, allowed_special={"<|endoftext|>"}), bpe.decode


def load_bpe(encoding):
    """Returns tiktoken's Encoding of that name. Raises ValueError if there is none or its files cannot be had."""
    import tiktoken

    if encoding not in tiktoken.list_encoding_names():
        names = ", ".join(["bytes", *tiktoken.list_encoding_names()])
        raise ValueError(f"encoding={encoding!r} is not known; use one of {names}")
    try:
        return tiktoken.get_encoding(encoding)
    except OSError as e:  # requests' errors are OSErrors
        files = "the two files vocab.bpe and encoder.json" if encoding == "gpt2" else "the file of merges"
        raise ValueError(
            f"cannot download tiktoken's {encoding!r}, {files} ({type(e).__name__}). On a machine with a network run "
            f"TIKTOKEN_CACHE_DIR=DIR python -c \"import tiktoken; tiktoken.get_encoding('{encoding}')\", "
            f"copy DIR here and set TIKTOKEN_CACHE_DIR to it"
        ) from None


def encode_bytes(text, eot):
    ids = []
    for i, part in enumerate(text.split("<|endoftext|>")):
        ids += [eot] * (i > 0) + list(part.encode("utf-8", "replace"))
    return ids


def decode_bytes(ids, eot):
    documents = [[]]
    for i in ids:
        if i == eot:
            documents.append([])
        else:
            documents[-1].append(i)
    return "<|endoftext|>".join(bytes(document).decode("utf-8", "replace") for document in documents)


def encode_characters(text, stoi):
    missing = sorted(set(text) - set(stoi))
    if missing:
        raise ValueError(f"the model's vocabulary of {len(stoi)} characters lacks {''.join(missing)!r}")
    return [stoi[character] for character in text]


# -----------------------------------------------------------------------------
# windows and their order


@functools.lru_cache(maxsize=2)  # a step may straddle two epochs; 4 bytes a window: 40 MB for 10B tokens at 1024
def epoch_order(n, seed, epoch):
    """Returns the order in which an epoch visits n windows, uint32 (n,), a function of its arguments alone.

    RandomState, because NumPy promises that its stream never changes, so a run resumes under any later NumPy.
    """
    order = np.arange(n, dtype=np.uint32)
    np.random.RandomState([seed, epoch]).shuffle(order)
    return order


class Windows:
    """The windows of one split. len() is their number; what they hold is read from disk when asked for."""

    def __init__(self, shards, block_size, vocab_size):
        self.shards, self.block_size, self.vocab_size = shards, block_size, vocab_size
        self.tokens = sum(shard.count for shard in shards)
        counts = [max(shard.count - 1, 0) // block_size for shard in shards]
        self.ends = np.cumsum(counts)  # number of windows up to and including each shard
        if not len(self):
            raise ValueError(
                f"{os.path.dirname(shards[0].path)}: {len(shards)} file(s) with {self.tokens:,} tokens like "
                f"{os.path.basename(shards[0].path)} hold no window of block_size={block_size} (+ 1) tokens; "
                f"prepare more data or lower --block_size"
            )

    def __len__(self):
        return int(self.ends[-1])

    def training(self, first, count, seed):
        """Returns the windows, int64 (count,), of sequences first to first + count - 1 of a training run: every window
        once an epoch, each epoch shuffled anew."""
        epochs, positions = np.divmod(np.arange(first, first + count), len(self))
        pairs = zip(epochs, positions, strict=True)
        return np.array([epoch_order(len(self), seed, int(e))[p] for e, p in pairs], dtype=np.int64)

    def spread(self, count):
        """Returns up to count windows, int64, spread evenly over the split: always the same ones."""
        count = min(count, len(self))
        return np.arange(count) * len(self) // count

    def read(self, windows):
        """Returns the tokens, int64 (len(windows), block_size + 1), of the windows of those numbers.

        Every file is mapped anew for each call, so that a process never holds more of it than it is reading: a mapping
        that stays grows to the whole file in RSS. Raises ValueError for an id that the model has no row for, which on
        a GPU would otherwise be a device-side assert.
        """
        tokens = np.empty((len(windows), self.block_size + 1), dtype=np.int64)
        owners = np.searchsorted(self.ends, windows, side="right")
        for owner in np.unique(owners):
            rows, shard = np.flatnonzero(owners == owner), self.shards[owner]
            first = self.ends[owner - 1] if owner else 0
            starts = (windows[rows] - first) * self.block_size
            data = np.memmap(shard.path, shard.dtype, "r", shard.offset, (shard.count,))
            tokens[rows] = data[starts[:, None] + np.arange(self.block_size + 1)]
        if tokens.max() >= self.vocab_size:
            paths = ", ".join(self.shards[owner].path for owner in np.unique(owners)[:3])
            raise ValueError(
                f"token id {tokens.max()} in {paths} is not below the model's vocab_size={self.vocab_size}; the data "
                f"was made with another tokenizer than its meta.json or meta.pkl (none: GPT-2) or the checkpoint says"
            )
        return tokens
