"""
How fast prepare_fineweb.py is, against what tiktoken allows and against a pool in the style of
build-nanogpt and llm.c.

    python benchmarks/prepare_speed.py --input=FOLDER [--workers=2] [--rounds=3] [--json=FILE]

FOLDER holds .parquet files with a text column. Each round runs in turn: one process that does nothing but
tokenize texts already in memory (times --workers, that is the limit); the pool (multiprocessing.Pool.imap
over documents, encode_ordinary, one array a document, written with tofile); and prepare_fineweb.py as a user
runs it, from starting Python to meta.json. Prints medians, and the ratio of each to the limit of the same
round. Peak memory is the sum of the resident sizes of all its processes, sampled twenty times a second
(Linux).
"""

import argparse
import glob
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version

import numpy as np
import pyarrow.parquet
import tiktoken

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def cpu_name():
    with open("/proc/cpuinfo") as f:
        names = [line.partition(":")[2].strip() for line in f if line.startswith("model name")]
    return names[0] if names else platform.machine()


def texts_of(paths):
    for path in paths:
        for rows in pyarrow.parquet.ParquetFile(path).iter_batches(256, columns=["text"]):
            yield from rows["text"].to_pylist()


def limit(method, path):
    """Tokens a second of one process over the texts of one file, without reading it and without writing."""
    texts, bpe, n = list(texts_of([path])), tiktoken.get_encoding("gpt2"), 0
    start = time.perf_counter()
    for text in texts:
        n += len(
            getattr(bpe, method)(text, disallowed_special=())
            if "numpy" in method
            else getattr(bpe, method)(text)
        )
    return n / (time.perf_counter() - start)


def tokenize(text):
    bpe = tiktoken.get_encoding("gpt2")
    tokens = np.array([bpe.eot_token, *bpe.encode_ordinary(text)])
    assert (tokens < 2**16).all()
    return tokens.astype(np.uint16)


def pool(paths, workers, folder):
    """Tokens a second of the scripts that this one succeeds, reduced to what they have in common."""
    start, n = time.perf_counter(), 0
    with multiprocessing.Pool(workers) as processes, open(os.path.join(folder, "pool.bin"), "wb") as f:
        for tokens in processes.imap(tokenize, texts_of(paths), chunksize=16):
            tokens.tofile(f)
            n += len(tokens)
    return n / (time.perf_counter() - start)


def resident(pid):
    """Bytes resident in the process of that number and its descendants."""
    try:
        with open(f"/proc/{pid}/statm") as f:
            size = int(f.read().split()[1]) * os.sysconf("SC_PAGESIZE")
        with open(f"/proc/{pid}/task/{pid}/children") as f:
            return size + sum(resident(int(child)) for child in f.read().split())
    except OSError:
        return 0  # it has just ended


def ours(source, workers, folder):
    """Returns tokens a second of the whole command, and the peak of its memory in bytes."""
    argv = [
        sys.executable,
        os.path.join(ROOT, "prepare_fineweb.py"),
        f"--input={source}",
        f"--out_dir={folder}/ours",
    ]
    start, peak = time.perf_counter(), 0
    with subprocess.Popen([*argv, f"--workers={workers}"], stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            peak = max(peak, resident(process.pid))
            time.sleep(0.05)
    seconds = time.perf_counter() - start
    with open(f"{folder}/ours/meta.json") as f:
        meta = json.load(f)
    return (meta["train"]["tokens"] + meta["val"]["tokens"]) / seconds, peak


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--input", required=True)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json")
    args = parser.parse_args()
    paths = sorted(glob.glob(f"{glob.escape(args.input)}/*.parquet"))
    if not paths:
        raise SystemExit(f"{args.input} has no .parquet files")

    rounds = []
    for number in range(args.rounds):
        with tempfile.TemporaryDirectory() as folder:
            row = dict(encode_to_numpy=limit("encode_to_numpy", paths[0]))
            row["encode_ordinary"] = limit("encode_ordinary", paths[0])
            row["limit"] = args.workers * max(row.values())
            row["pool"] = pool(paths, args.workers, folder)
            row["ours"], row["peak_bytes"] = ours(args.input, args.workers, folder)
        rounds.append(row)
        print(
            f"round {number + 1}: " + ", ".join(f"{name} {n / 1e6:,.2f}M" for name, n in row.items()),
            file=sys.stderr,
        )

    print(f"{'':44}tokens/s   of the limit (median of {args.rounds}, {args.workers} workers)")
    for name, what in (
        ("encode_to_numpy", "tiktoken encode_to_numpy, one process"),
        ("encode_ordinary", "tiktoken encode_ordinary, one process"),
        ("limit", f"limit: {args.workers} * the faster of the two"),
        ("pool", "pool of processes, a document at a time"),
        ("ours", "prepare_fineweb.py, the whole command"),
    ):
        ratio = statistics.median(row[name] / row["limit"] for row in rounds)
        print(f"{what:40}{statistics.median(row[name] for row in rounds):12,.0f}   {ratio:.2f}")
    peak = max(row["peak_bytes"] for row in rounds)
    print(f"peak memory of prepare_fineweb.py, all processes: {peak / 1e6:,.0f} MB")
    if args.json:
        machine = dict(cpu=cpu_name(), cores=os.cpu_count(), python=platform.python_version())
        machine |= dict(
            tiktoken=version("tiktoken"),
            pyarrow=version("pyarrow"),
            command=f"prepare_speed.py --input=FOLDER --workers={args.workers}",
        )
        with open(args.json, "w") as f:
            json.dump(dict(machine=machine, rounds=rounds), f, indent=1)
