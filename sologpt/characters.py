"""
nanoGPT's data by characters: train.bin, val.bin and meta.pkl, to the byte those of its
data/shakespeare_char/prepare.py.
"""

import os
import pickle

import numpy as np

from sologpt.errors import UserError
from sologpt.files import atomic_file
from sologpt.tokenizer import PlainUnpickler

MOST = 2**16  # characters that uint16 can number


def files_of(texts, max_tokens):
    """Returns {file name: content, bytes} for texts, each of which goes on where the one before ends: every
    different character is a token, numbered in the order of Unicode; the last tenth is for validation.

    max_tokens: characters to take in all; 0: every one. All of them are in memory together. Raises UserError
    if they are too few, or too many different ones.
    """
    codes = np.concatenate([np.empty(0, np.uint32), *map(code_points, texts)])
    if max_tokens:
        codes = codes[:max_tokens]
    if len(codes) < 10:
        raise UserError(f"only {len(codes)} characters: too few to train on nine tenths of them")
    alphabet, ids = np.unique(codes, return_inverse=True)
    if len(alphabet) > MOST:
        raise UserError(
            f"{len(alphabet):,} different characters, and uint16 has {MOST:,} ids; use --encoding=gpt2"
        )
    itos = {i: chr(code) for i, code in enumerate(alphabet)}
    stoi = {character: i for i, character in itos.items()}
    ids = ids.astype("<u2")
    n_train = int(len(ids) * 0.9)
    # train.bin is written last: without meta.pkl the others would be taken for GPT-2's tokens
    return {
        # protocol 4 as Python 3.8 to 3.13 write for nanoGPT
        "meta.pkl": pickle.dumps(dict(vocab_size=len(itos), itos=itos, stoi=stoi), protocol=4),
        "val.bin": ids[n_train:].tobytes(),
        "train.bin": ids[:n_train].tobytes(),
    }


def code_points(text):
    """Returns the characters of a text as their numbers in Unicode, NumPy uint32."""
    return np.frombuffer(text.encode("utf-32-le"), np.uint32)


def write(folder, files):
    """Writes files, {name: content}, and returns the names of those that were not there yet. Raises UserError
    if the folder holds other tokens: they may be the work of hours."""
    for name in sorted(os.listdir(folder)):
        if name in files:
            other = not holds(os.path.join(folder, name), files[name])
        else:
            # beside meta.json, train.py would not read meta.pkl
            other = name.endswith((".bin", ".npy")) or name in ("meta.json", "unfinished.npz")
        if other:
            raise UserError(
                f"{folder} holds other data ({name}); choose another --out_dir or delete that file"
            )
    new = []
    for name, content in files.items():
        if not os.path.exists(os.path.join(folder, name)):
            new.append(name)
            with atomic_file(os.path.join(folder, name)) as f:
                f.write(content)
    return new


def holds(path, content):
    """Whether the file at path has this content, bytes. A meta.pkl may have been written by another Python,
    and so with other bytes."""
    with open(path, "rb") as f:
        found = f.read(len(content) + 1)
    if not path.endswith(".pkl"):
        return found == content
    with open(path, "rb") as f:
        try:
            return PlainUnpickler(f).load() == pickle.loads(content)
        except Exception:  # of many kinds, for what is no pickle
            return False
