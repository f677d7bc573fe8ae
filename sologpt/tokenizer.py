"""
What token ids mean: a Tokenizer turns text into ids and ids into text.

Three kinds, told apart by `encoding`: "bytes" (an id for each byte), "characters" (nanoGPT's meta.pkl), and
every other name is one of tiktoken's. A checkpoint and a data folder keep only the fields of a tokenizer,
which are plain values; tiktoken's files are loaded at the first text to encode or decode, not in training.
"""

import dataclasses
import functools
import json
import math
import os
import pickle

import numpy as np

from sologpt.errors import UserError
from sologpt.shards import token_files

EOT = "<|endoftext|>"
FORMAT = 1  # of meta.json


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Base class of the three kinds."""

    encoding: str
    vocab_size: int  # number of ids
    eot_token: int | None  # the id of <|endoftext|>; None: there is none

    def __post_init__(self):
        eot_type = type(self.eot_token)
        if (
            type(self.encoding) is not str
            or type(self.vocab_size) is not int
            or eot_type not in (int, type(None))
        ):
            raise TypeError("these are not the types of a tokenizer's fields")

    def encode(self, text):
        """Returns the ids of a text, a list; <|endoftext|> becomes the end-of-text id. Raises UserError for
        text that is not valid Unicode, or that the tokenizer cannot represent."""
        try:
            text.encode()
        except UnicodeEncodeError as e:
            raise UserError(
                f"the text is not UTF-8: an invalid byte or half a character at {e.start}"
            ) from None
        return self.ids_of(text)

    def ids_of(self, text):
        """Returns what encode returns, for valid text."""
        raise NotImplementedError

    def encode_document(self, text):
        """Returns the ids of a document's text, NumPy; <|endoftext|> in it is text like any other."""
        raise NotImplementedError

    def spell(self, i):
        """Returns the bytes that id i stands for, which may be a part of a character."""
        raise NotImplementedError

    def decode(self, ids):
        """Returns the text of ids; bytes that are not UTF-8 become U+FFFD."""
        return b"".join(map(self.spell, ids)).decode("utf-8", "replace")

    def embedding_rows(self):
        """Returns the vocab_size of a new model: the number of ids, padded to a multiple of 64 for speed."""
        return math.ceil(self.vocab_size / 64) * 64

    def fits_nanogpts(self, rows):
        """Whether a model of nanoGPT's with so many rows may be of these ids."""
        return rows == self.embedding_rows()

    def fields(self):
        """Returns a dict of plain values, from which make_tokenizer makes it again; checkpoints keep it."""
        return dataclasses.asdict(self)


class ByteTokenizer(Tokenizer):
    def __post_init__(self):
        super().__post_init__()
        if self.vocab_size > 257:
            raise UserError(f"the encoding 'bytes' has 257 ids, not vocab_size={self.vocab_size}")

    def ids_of(self, text):
        if self.eot_token is None:
            return list(text.encode())
        first, *others = text.split(EOT)
        ids = list(first.encode())
        for part in others:
            ids += [self.eot_token, *part.encode()]
        return ids

    def encode_document(self, text):
        return np.frombuffer(text.encode(), dtype=np.uint8)

    def spell(self, i):
        if i == self.eot_token:
            return EOT.encode()
        return bytes([i]) if i < 256 else "\ufffd".encode()  # a 257th id that is no end of text

    def ranks(self):
        """Returns {bytes: id} of all tokens but the end of text."""
        return {bytes([b]): b for b in range(256)}


@dataclasses.dataclass(frozen=True)
class CharacterTokenizer(Tokenizer):
    itos: dict  # {id: text}

    def __post_init__(self):
        super().__post_init__()
        if not all(type(i) is int and type(text) is str for i, text in self.itos.items()):
            raise TypeError("itos must be a dict from ids to texts")

    @functools.cached_property
    def stoi(self):
        return {text: i for i, text in self.itos.items()}

    def ids_of(self, text):
        missing = sorted(set(text) - set(self.stoi))
        if missing and not self.itos:
            raise UserError("the model's data have a meta.pkl without itos, so its ids mean no characters")
        if missing:
            raise UserError(
                f"the model's vocabulary of {len(self.stoi)} characters lacks {''.join(missing)!r}"
            )
        return [self.stoi[character] for character in text]

    def spell(self, i):
        # nanoGPT's meta.pkl may give a vocab_size and no names, or not all
        return self.itos.get(i, "\ufffd").encode("utf-8", "replace")

    def embedding_rows(self):
        """Returns the number of ids: nanoGPT does not pad the vocabulary of its own character data either."""
        return self.vocab_size


class BPETokenizer(Tokenizer):
    @functools.cached_property
    def bpe(self):
        return load_bpe(self.encoding)

    def ids_of(self, text):
        return self.bpe.encode(text, allowed_special={EOT}, disallowed_special=())

    def encode_document(self, text):
        return self.bpe.encode_to_numpy(text, disallowed_special=())

    def fits_nanogpts(self, rows):
        return rows >= self.vocab_size  # OpenAI's weights are not padded

    def spell(self, i):
        try:
            return self.bpe.decode_single_token_bytes(i)
        except KeyError:  # tiktoken's larger encodings leave out some ids
            return "\ufffd".encode()

    def ranks(self):
        """Returns {bytes: id} of all tokens but the end of text."""
        ids = [i for i in range(self.bpe.n_vocab) if i != self.eot_token]
        return {self.bpe.decode_single_token_bytes(i): i for i in ids}


def gpt2_tokenizer():
    """Returns the Tokenizer of GPT-2's 50,257 ids."""
    return BPETokenizer("gpt2", 50257, 50256)


def make_tokenizer(fields):
    """Returns the Tokenizer with these fields, a dict. Raises UserError if they are not a tokenizer's."""
    kinds = dict(bytes=ByteTokenizer, characters=CharacterTokenizer)
    try:
        return kinds.get(fields["encoding"], BPETokenizer)(**fields)
    except (TypeError, KeyError):  # other fields, or none
        raise UserError("the description of the tokenizer is damaged") from None


def find_tokenizer(encoding):
    """Returns the Tokenizer of an encoding: "bytes", or a name of tiktoken's, whose files are loaded now."""
    if encoding == "bytes":
        return ByteTokenizer("bytes", 257, 256)
    bpe = load_bpe(encoding)
    if EOT not in bpe.special_tokens_set:
        raise UserError(f"encoding={encoding!r} has no {EOT}, which begins every document; use another one")
    return BPETokenizer(encoding, bpe.n_vocab, bpe.eot_token)


def encoding_names():
    import tiktoken

    return tiktoken.list_encoding_names()


def load_bpe(encoding):
    """Returns tiktoken's Encoding of that name. Raises UserError if it is unknown or cannot be downloaded."""
    import tiktoken

    if encoding not in encoding_names():
        names = ", ".join(["bytes", "characters (of prepare_fineweb.py)", *encoding_names()])
        raise UserError(f"encoding={encoding!r} is not known; use one of {names}")
    try:
        return tiktoken.get_encoding(encoding)
    except (OSError, ValueError) as e:  # requests' errors; a file that is not what it should be
        files = "the two files vocab.bpe and encoder.json" if encoding == "gpt2" else "the file of merges"
        command = f"import tiktoken; tiktoken.get_encoding('{encoding}')"
        raise UserError(
            f"cannot download tiktoken's {encoding!r}, {files} ({type(e).__name__}): on a machine with a "
            f'network run TIKTOKEN_CACHE_DIR=DIR python -c "{command}", copy DIR here and set '
            f"TIKTOKEN_CACHE_DIR to it; data of prepare_fineweb.py --encoding=bytes need no download"
        ) from None


# -----------------------------------------------------------------------------
# the tokenizer of a data folder


class PlainUnpickler(pickle.Unpickler):
    """Reads a pickle of plain dicts, strings and numbers, and nothing that could run code."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(
            f"it refers to {module}.{name}; only Python's own dicts, strings and numbers are read"
        )


def read_tokenizer(folder):
    """Returns the Tokenizer of a data folder, from meta.json (prepare_fineweb.py) or meta.pkl (nanoGPT);
    without either it is GPT-2's, as in nanoGPT. Raises UserError for both, for a meta.pkl beside other files
    than nanoGPT's, for a file that cannot be read, and for a preparation that is not finished."""
    path = os.path.join(folder, "meta.json")
    if os.path.exists(path):
        if os.path.exists(os.path.join(folder, "meta.pkl")):
            raise UserError(
                f"{folder} has a meta.json and a meta.pkl, which may differ on what its ids mean; move away "
                f"the one that is not of its tokens"
            )
        return read_meta_json(path)
    if os.path.exists(os.path.join(folder, "unfinished.npz")):
        raise UserError(
            f"the preparation of {folder} is not finished; the same prepare_fineweb.py command continues it"
        )
    path = os.path.join(folder, "meta.pkl")
    if not os.path.exists(path):
        return gpt2_tokenizer()
    names, _ = token_files(folder)
    if names and names[0] not in ("train.bin", "val.bin"):
        raise UserError(
            f"{path} is about nanoGPT's train.bin, but the folder has {names[0]}, which is read instead; "
            f"move one of them away"
        )
    return read_meta_pkl(path)


def read_meta_json(path):
    try:
        with open(path, encoding="utf-8") as f:
            meta = json.load(f)
        fields = {name: meta[name] for name in ("encoding", "vocab_size", "eot_token")}
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise UserError(f"{path} is damaged ({e!r}); prepare the data again") from None
    encoding = fields["encoding"]
    ids = fields["vocab_size"]
    eot = fields["eot_token"]
    version = meta.get("format", FORMAT)
    if version != FORMAT:
        raise UserError(
            f"{path} has the format {version!r}, and this soloGPT knows only {FORMAT}: read the data with "
            f"the soloGPT that prepared them, or prepare them again"
        )
    if encoding != "bytes" and encoding not in encoding_names():
        raise UserError(f"{path} is damaged: the encoding {encoding!r} is not known; prepare the data again")
    if type(ids) is not int or ids < 1:
        raise UserError(f"{path} is damaged: vocab_size {ids!r} is no number of ids; prepare the data again")
    if encoding == "gpt2" and fields != gpt2_tokenizer().fields():
        raise UserError(
            f"{path} is damaged: gpt2 has 50257 ids, the last one <|endoftext|>, not vocab_size {ids} and "
            f"eot_token {eot!r}; prepare the data again"
        )
    if eot is not None and (type(eot) is not int or not 0 <= eot < ids):
        raise UserError(
            f"{path} is damaged: eot_token {eot!r} is none of the {ids} ids; prepare the data again"
        )
    return make_tokenizer(fields)


def read_meta_pkl(path):
    try:
        with open(path, "rb") as f:
            meta = PlainUnpickler(f).load()
        itos = meta.get("itos", {})
        pairs = itos.items() if isinstance(itos, dict) else enumerate(itos)
        itos = {int(i): str(text) for i, text in pairs}
        return CharacterTokenizer("characters", int(meta["vocab_size"]), None, itos)
    except Exception as e:  # a damaged pickle may raise anything
        raise UserError(f"cannot read {path}: {e!r}") from None
