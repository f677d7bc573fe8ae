"""
What a run survives: kills, a second run in its folder, full disks, damaged files, changed data, signals,
closed streams, exceptions and missing memory. (fuzz.py: altered checkpoints and configurations;
prepare_faults.py: the same for preparing data.)

    python benchmarks/faults.py             100 kills, 220 damaged files; 15 to 20 minutes
    python benchmarks/faults.py --quick     a tenth of it

Each fault meets train.py in a process of its own, on a small model with dropout on a CPU; afterwards the run
is resumed with --init_from=auto, and its final state is compared, bit for bit, with that of a run that
nothing has happened to. "lost" counts the cases in which they differed, an iteration was missing or twice in
metrics.jsonl, or a traceback was printed. Some faults need Linux, some root (to mount a small disk); what
cannot be tried here says so.
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from sologpt import checkpoint, shards

ROOT = Path(__file__).parent.parent

EVAL_INTERVAL = 40
RUN = f"""--dataset=toy --device=cpu --compile=False --n_layer=2 --n_head=2 --n_embd=32 --block_size=16
--batch_size=4 --gradient_accumulation_steps=2 --dropout=0.2 --learning_rate=1e-2 --warmup_iters=5
--lr_decay_iters=200 --max_iters=200 --eval_interval={EVAL_INTERVAL} --eval_iters=1 --checkpoint_interval=5
--init_from=auto""".split()
ENV = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

# train.py with something done to it first; slow writes, so that a kill at a random moment often hits one
FAULTY = """
import os, runpy, sys, time
import torch
import model
{fault}
sys.argv[0] = {script!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""
SLOW_WRITES = """
fsync, replace = os.fsync, os.replace
os.fsync = lambda f: (time.sleep(0.05), fsync(f))
os.replace = lambda a, b: (time.sleep(0.01), replace(a, b), time.sleep(0.01))
"""
QUOTA = """
import errno
fsync, syncs = os.fsync, 0
def fsync_with_quota(f):
    global syncs
    syncs += 1
    if {first} <= syncs < {last}:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
    fsync(f)
os.fsync = fsync_with_quota
"""
AT_CALL = """
forward, calls = model.GPT.forward, 0
def faulty(self, idx, targets=None):
    global calls
    calls += self.training
    if self.training and {condition}:
        raise {error}
    return forward(self, idx, targets)
model.GPT.forward = faulty
"""


# -----------------------------------------------------------------------------
# runs


def prepare(folder):
    """Writes a text of 10,800 bytes as token shards into folder/data/toy."""
    data = folder / "data/toy"
    data.mkdir(parents=True)
    ids = np.frombuffer(b"pack my box with jugs now. " * 400, dtype=np.uint8).astype(np.uint16)
    shards.write_shard(data / "toy_train_000001.bin", ids)
    shards.write_shard(data / "toy_val_000000.bin", ids[:1000])
    sha256s = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in data.glob("*.bin")}
    meta = dict(encoding="bytes", vocab_size=257, eot_token=256)
    meta["files"] = {name: dict(tokens=0, sha256=sha256) for name, sha256 in sha256s.items()}
    (data / "meta.json").write_text(json.dumps(meta))


def read_until(process, wanted):
    """Reads the output of process up to the line that starts so, or to its end."""
    while (line := process.stdout.readline()) and not line.startswith(wanted):
        pass


def start(folder, out, *more, fault="", limit=None, closed=()):
    """Returns the process of a run with its state in folder/out. limit: bytes that a file may have; closed:
    numbers of the streams that are not open in it."""

    def prepare_process():
        if limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        for number in closed:
            os.close(number)

    code = FAULTY.format(fault=fault, script=str(ROOT / "train.py"))
    command = [sys.executable, "-c", code, *RUN, f"--out_dir={out}", *more]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, cwd=folder, env=ENV, text=True, stdout=pipe, stderr=pipe, preexec_fn=prepare_process
    )


def finish(folder, out, *more, **options):
    """Runs it to its end; returns exit status, stdout and stderr."""
    process = start(folder, out, *more, **options)
    stdout, stderr = process.communicate()
    return process.returncode, stdout, stderr


def outcome(folder, out):
    """Returns what must not depend on what happened: weights, moments, random state, losses in
    metrics.jsonl."""
    state = checkpoint.load(folder / out / "ckpt.pt")
    lines = [json.loads(line) for line in (folder / out / "metrics.jsonl").read_text().splitlines()]
    figures = [
        [
            line.get(name)
            for name in ("kind", "iter", "loss", "norm", "lr", "tokens", "train_loss", "val_loss")
        ]
        for line in lines
        if line["kind"] in ("iter", "eval")
    ]
    moments = state["optimizer"]["state"]  # its settings are not state: each iteration sets the learning rate
    names = ("rng", "iter_num", "best_val_loss", "tokens_seen")
    return [state["model"], moments] + [state[name] for name in names] + [figures]


def same(a, b):
    if torch.is_tensor(a):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def resumed_equals(folder, out, reference, parts=None):
    """Whether the run in folder/out, resumed without faults, ends as the reference did (in its first
    parts)."""
    status, _, errors = finish(folder, out)
    good = status == 0 and "Traceback" not in errors and same(outcome(folder, out)[:parts], reference[:parts])
    if not good:
        print(f"LOST: {out}, exit status {status}: {errors[-500:]}", file=sys.stderr)
    else:
        shutil.rmtree(folder / out)
    return good


# -----------------------------------------------------------------------------
# faults: each returns (what was tried, times, lost)


def kills(folder, reference, times, rng):
    """kill -9 at random moments, again and again until the run ends by itself; then the next run."""
    done, lost, in_a_write, runs = 0, 0, 0, 0
    while done < times:
        out, status = f"kill{runs}", None
        while status is None:
            process = start(folder, out, fault=SLOW_WRITES)
            read_until(process, "evaluation:")  # the loop comes next
            try:
                status = process.wait(rng.uniform(0, 2)) if done < times else process.wait()
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                done += 1
                names = {path.name for path in (folder / out).glob("*")}
                between = "ckpt_prev.pt" in names and "ckpt.pt" not in names
                in_a_write += between or any(name.endswith(".tmp") for name in names)
            finally:
                process.stdout.close()
                process.stderr.close()
        runs += 1
        lost += (
            status != 0
            or bool(list((folder / out).glob("*.tmp")))
            or not resumed_equals(folder, out, reference)
        )
    return (
        f"kill -9 at a random moment, {in_a_write} of them while a file was written, in {runs} runs",
        done,
        lost,
    )


def two_at_once(folder, reference, times, rng):
    """A second run is started in the out_dir of the first, is refused, or takes over from where a killed one
    was; whichever is alive is killed at a random moment."""
    refused = lost = 0
    for i in range(times):
        out = f"two{i}"
        first = start(folder, out, fault=SLOW_WRITES)
        read_until(first, "iter 0:")
        second = start(folder, out, fault=SLOW_WRITES)
        if i % 2:  # as a scheduler does that takes the first for dead, and then kills it
            time.sleep(rng.uniform(0, 5))
            first.kill()
        _, errors = second.communicate()
        was_refused = f"{out} is in use by process {first.pid}" in errors
        refused += was_refused
        clean = was_refused and second.returncode == 1 and len(errors.splitlines()) == 1
        clean = clean or (i % 2 and second.returncode == 0)
        first.kill()
        first.communicate()
        lost += not (clean and resumed_equals(folder, out, reference))
    return f"a second run in the same out_dir; refused {refused} times, else the first was dead", times, lost


def signals(folder, reference, times, rng):
    """SIGTERM, SIGHUP and Ctrl-C at random moments of the loop; exit status and the printed command are
    checked too."""
    lost = 0
    for i in range(times):
        number = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)[i % 3]
        process = start(folder, f"signal{i}", fault=SLOW_WRITES)
        read_until(process, "iter 0:")
        time.sleep(rng.uniform(0, 2))
        process.send_signal(number)
        stdout, errors = process.communicate()
        clean = (
            process.returncode == 128 + number
            and "--init_from=resume" in stdout
            and "Traceback" not in errors
        )
        lost += not (clean and resumed_equals(folder, f"signal{i}", reference))
    return "Ctrl-C, SIGTERM or SIGHUP at a random moment", times, lost


def second_signals(folder, reference, times, rng):
    """A second Ctrl-C soon after the first: the process leaves at once, perhaps in the middle of a write."""
    lost = 0
    for i in range(times):
        process = start(folder, f"second{i}", fault=SLOW_WRITES)
        read_until(process, "iter 20:")
        process.send_signal(signal.SIGINT)
        time.sleep(rng.uniform(0, 0.1))
        process.send_signal(signal.SIGINT)
        process.communicate()
        lost += process.returncode != 130 or not resumed_equals(folder, f"second{i}", reference)
    return "a second Ctrl-C, within a tenth of a second", times, lost


def exceptions(folder, reference, times, rng):
    """A fault of the program itself, in some forward pass."""
    lost = 0
    for i in range(times):
        fault = AT_CALL.format(condition=f"calls == {rng.randrange(1, 400)}", error="RuntimeError('a fault')")
        status, _, errors = finish(folder, f"exception{i}", fault=fault)
        lost += (
            status != 1 or "a fault" not in errors or not resumed_equals(folder, f"exception{i}", reference)
        )
    return "an exception in the loop", times, lost


def file_limits(folder, reference, times, rng):
    """A limit on the size of a file, as a quota has, that a checkpoint exceeds; every second time best.pt
    fits."""
    lost, size = 0, 0
    for i in range(times):
        out = f"limit{i}"
        # where the reference is evaluated, too
        stop = finish(folder, out, f"--max_iters={EVAL_INTERVAL * rng.randrange(1, 4)}")
        size = size or (folder / out / "ckpt.pt").stat().st_size
        limit = rng.randrange(size // 3, size - 1000) if i % 2 else rng.randrange(50_000, size // 3)
        before = (folder / out / "ckpt.pt").read_bytes()
        status, stdout, errors = finish(folder, out, limit=limit)
        clean = (stop[0], status) == (0, 1) and "iter 199:" in stdout and "Traceback" not in errors
        clean = clean and "could not be saved" in errors and (folder / out / "ckpt.pt").read_bytes() == before
        lost += not (clean and resumed_equals(folder, out, reference))
    return "files may not grow to the size of a checkpoint (RLIMIT_FSIZE)", times, lost


def quotas(folder, reference, times, rng):
    """A file system that says only when a file is synced that there is no room for it, as network file
    systems do; a stand-in, for a random span of time."""
    lost = 0
    for i in range(times):
        first = rng.randrange(2, 40)
        fault = QUOTA.format(first=first, last=first + rng.randrange(1, 20))
        status, _, errors = finish(folder, f"quota{i}", fault=fault)
        clean = status == 0 and "Traceback" not in errors and "Disk quota exceeded" in errors
        lost += not (clean and resumed_equals(folder, f"quota{i}", reference, parts=4))
    return "a quota, noticed when a file is synced (stand-in)", times, lost


def mount(path, *options):
    path.mkdir(exist_ok=True)
    return not subprocess.run(["mount", *options, str(path)], capture_output=True).returncode


def full_disks(folder, reference, times, rng):
    """A disk that has room for one checkpoint, or two, but not for the next one, metrics.jsonl and the log
    being on it too; every second time something else fills it up whenever there is room. Later it has room
    again.

    Only weights, moments, random state and iteration are compared: lines of metrics.jsonl that found no room
    until the process ended, and a best.pt that found none, are lost, and the run cannot help it.
    """
    lost = failed = 0
    for i in range(times):
        disk = folder / f"disk{i}"
        if not mount(disk, "-t", "tmpfs", "-o", f"size={rng.randrange(600, 1500)}k", "tmpfs"):
            return "a full disk: needs the right to mount one", 0, 0
        try:
            process = start(folder, disk / "out", fault=f"sys.stdout = open('{disk}/log', 'w')")
            while process.poll() is None:
                time.sleep(0.02)
                if i % 2 and (disk / "out/ckpt.pt").exists():
                    with contextlib.suppress(OSError), open(disk / "ballast", "ab") as f:
                        f.write(bytes(shutil.disk_usage(disk).free))
            errors = process.communicate()[1]
            failed += "could not be saved" in errors
            # 120 is Python's own for a log, here on the same disk, whose last lines cannot be written
            clean = process.returncode in ((1, 120) if "could not be saved" in errors else (0, 120))
            mount(disk, "-o", "remount,size=100m")
            lost += (
                "Traceback" in errors
                or not clean
                or not resumed_equals(folder, disk / "out", reference, parts=4)
            )
        finally:
            subprocess.run(["umount", str(disk)])
    return f"a full disk (tmpfs of 0.6 to 1.5 MB); {failed} times the end could not be saved", times, lost


def read_only(folder, reference, times, rng):
    """A disk that becomes read-only while the run is on, as after an I/O error, and one that is from the
    start."""
    lost = 0
    for i in range(times):
        disk = folder / f"ro{i}"
        if not mount(disk, "-t", "tmpfs", "-o", "size=100m", "tmpfs"):
            return "a read-only out_dir: needs the right to mount one", 0, 0
        try:
            process = start(folder, disk / "out", fault=SLOW_WRITES)
            read_until(process, f"iter {rng.randrange(6, 20)}:")
            process.send_signal(signal.SIGSTOP)
            # refused while a file is open for writing: metrics.jsonl is
            mounted = mount(disk, "-o", "remount,ro")
            process.send_signal(signal.SIGCONT)
            errors = process.communicate()[1]
            clean = "Traceback" not in errors and process.returncode == (1 if mounted else 0)
            clean = clean and mount(disk, "-o", "remount,ro")
            status, _, errors = finish(folder, disk / "out")
            clean = clean and status == 1 and len(errors.splitlines()) == 1 and "Read-only" in errors
            mount(disk, "-o", "remount,rw")
            lost += not (clean and resumed_equals(folder, disk / "out", reference))
        finally:
            subprocess.run(["umount", str(disk)])
    return "a read-only out_dir", times, lost


def damaged(folder, reference, times, rng, damage):
    """Whatever is done to ckpt.pt, the state that is read is its own or that of ckpt_prev.pt; one case in
    twenty is resumed to its end by train.py."""
    finish(folder, "whole", f"--max_iters={3 * EVAL_INTERVAL}")
    files = checkpoint.RunFiles(folder / "whole")
    raw, lost, fell_back = Path(files.ckpt).read_bytes(), 0, 0
    both = checkpoint.load(files.ckpt), checkpoint.load(files.previous)
    for i in range(times):
        Path(files.ckpt).write_bytes(damage(raw, rng))
        try:
            state, why = files.load()
        except Exception as e:
            print(f"LOST: {e!r}", file=sys.stderr)
            lost += 1
            continue
        fell_back += bool(why)
        lost += not same(state, both[bool(why)])
        if i % 20 == 0:
            shutil.copytree(folder / "whole", folder / f"damaged{i}")
            lost += not resumed_equals(folder, f"damaged{i}", reference)
    shutil.rmtree(folder / "whole")
    return fell_back, times, lost


def truncated(folder, reference, times, rng):
    fell_back, *counts = damaged(
        folder, reference, times, rng, lambda raw, rng: raw[: rng.randrange(len(raw))]
    )
    return f"ckpt.pt cut short at a random length; ckpt_prev.pt taken {fell_back} times", *counts


def flip_a_bit(raw, rng):
    where, raw = rng.randrange(len(raw)), bytearray(raw)
    raw[where] ^= 1 << rng.randrange(8)
    return bytes(raw)


def flipped(folder, reference, times, rng):
    fell_back, *counts = damaged(folder, reference, times, rng, flip_a_bit)
    return f"a bit of ckpt.pt flipped; ckpt_prev.pt taken {fell_back} times, else it was padding", *counts


def closed_streams(folder, reference, times, rng):
    """stdin, stdout and stderr, or some of them, are closed, as a badly written service does."""
    lost = 0
    for i in range(times):
        closed = [number for number in range(3) if i + 1 >> number & 1]
        status, _, errors = finish(folder, f"closed{i}", closed=closed)
        lost += (status, errors) != (0, "") or not resumed_equals(folder, f"closed{i}", reference)
    return "streams closed, in every combination", times, lost


def changed_data(folder, reference, times, rng):
    """A token somewhere in a shard is changed between two runs: refused, until it is changed back."""
    lost = 0
    for i in range(times):
        out = f"changed{i}"
        finish(folder, out, f"--max_iters={EVAL_INTERVAL * rng.randrange(1, 4)}")
        before = (folder / out / "ckpt.pt").read_bytes()
        path = rng.choice(sorted((folder / "data/toy").glob("*.bin")))
        raw = path.read_bytes()
        where = rng.randrange(shards.HEADER_BYTES, len(raw), 2)
        path.write_bytes(raw[:where] + bytes([raw[where] ^ 1]) + raw[where + 1 :])
        status, _, errors = finish(folder, out)
        clean = status == 1 and len(errors.splitlines()) == 1 and "is not what" in errors
        clean = clean and (folder / out / "ckpt.pt").read_bytes() == before
        path.write_bytes(raw)
        lost += not (clean and resumed_equals(folder, out, reference))
    return "one token of the data changed before resuming", times, lost


def vanished_data(folder, reference, times, rng):
    """A shard is cut short or deleted while the run is on: it saves, and says so in one line."""
    lost = 0
    for i in range(times):
        out = f"vanished{i}"
        path = folder / "data/toy/toy_train_000001.bin"
        raw = path.read_bytes()
        process = start(folder, out, "--checkpoint_interval=1000")
        read_until(process, f"iter {rng.randrange(1, 60)}:")
        if i % 2:
            os.truncate(path, rng.randrange(len(raw)))
        else:
            path.unlink()
        _, errors = process.communicate()
        clean = process.returncode == 1 and "Traceback" not in errors and str(path.name) in errors
        clean = clean and checkpoint.load(folder / out / "ckpt.pt")["iter_num"] > 0
        path.write_bytes(raw)
        lost += not (clean and resumed_equals(folder, out, reference))
    return "a shard cut short or deleted during the run", times, lost


def missing_memory(folder, reference, times, rng):
    """torch.OutOfMemoryError, raised by a stand-in, from a random pass on for micro-batches above 1 or 2: the
    run ends, and equals, bit for bit, what resuming its last state before the fault with the smaller
    batch_size gives."""
    lost = 0
    for i in range(times):
        out, fits, at = f"memory{i}", rng.choice((1, 2)), rng.randrange(12, 398)
        condition = f"calls >= {at} and len(idx) > {fits}"
        fault = AT_CALL.format(condition=condition, error="torch.OutOfMemoryError('out of memory')")
        rarely = ("--checkpoint_interval=1000", "--eval_interval=1000")
        status, _, errors = finish(folder, out, *rarely, fault=fault)
        (folder / f"{out}b").mkdir()
        shutil.copy(folder / out / "ckpt_prev.pt", folder / f"{out}b/ckpt.pt")
        smaller = (f"--batch_size={fits}", f"--gradient_accumulation_steps={8 // fits}")
        finish(folder, f"{out}b", *rarely, *smaller)
        clean = status == 0 and "Traceback" not in errors and f"from iteration {(at - 1) // 2} on" in errors
        # all but the figures: those before the fault are in the first run's metrics.jsonl only
        lost += not (clean and same(outcome(folder, out)[:-1], outcome(folder, f"{out}b")[:-1]))
    return "out of memory in a random micro-batch (stand-in)", times, lost


# -----------------------------------------------------------------------------

if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a tenth of the cases")
    parser.add_argument("--seed", type=int, default=1, help="of the random moments and places")
    parser.add_argument("--only", default="", help="one fault, by the name of its function")
    options = parser.parse_args()
    share, rng = (10 if options.quick else 1), random.Random(options.seed)
    plan = dict(kills=100, two_at_once=20, signals=12, second_signals=10, exceptions=10, file_limits=10)
    plan |= dict(quotas=10, full_disks=10, read_only=4, truncated=20, flipped=200, closed_streams=7)
    plan |= dict(changed_data=10, vanished_data=10, missing_memory=10)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        prepare(folder)
        finish(folder, "reference")
        reference = outcome(folder, "reference")
        print("| fault | times | lost |\n|---|---|---|", flush=True)
        for name, times in plan.items():
            if options.only in ("", name):
                what, times, lost = globals()[name](folder, reference, max(2, times // share), rng)
                print(f"| {what} | {times} | {lost} |", flush=True)
