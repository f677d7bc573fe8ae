"""
What a run reports: lines for the user, metrics.jsonl, Weights & Biases, and the time of its iterations.
"""

import contextlib
import dataclasses
import json
import math
import os
import sys
import time

import torch
from tqdm import tqdm

from sologpt.display import duration
from sologpt.errors import UserError
from sologpt.files import atomic_file
from sologpt.hardware import peak_memory


def say(text, file=None):
    """Prints text to stdout or to file, above the progress bar if there is one. If it cannot be written, as
    with a log on a full disk, it is left out: no reason to end a run."""
    try:
        tqdm.write(text, file or sys.stdout)
    except BrokenPipeError:
        raise
    except OSError:
        pass


def warn(text):
    say(f"warning: {text}", sys.stderr)


def progress_bar(total, initial):
    """Returns the bar of a run, shown if stderr is a terminal; its time left is that of the last log line."""
    layout = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}"
    return tqdm(total=total, initial=initial, disable=None, dynamic_ncols=True, bar_format=layout)


class Clock:
    """Times the iterations between two log lines; work in paused() is not training and does not count."""

    def __init__(self, machine):
        self.machine = machine
        self.restart()

    def restart(self):
        self.start = time.perf_counter()
        self.iters = 0

    @contextlib.contextmanager
    def paused(self):
        self.machine.synchronize()  # updates in flight belong to the clock, what follows does not
        start = time.perf_counter()
        yield
        self.start += time.perf_counter() - start

    def seconds_per_iter(self):
        return (time.perf_counter() - self.start) / self.iters


def rewind_metrics(path, iter_num):
    """Drops the lines of metrics.jsonl from iter_num on, so that no iteration appears twice after resuming
    there, and lines that cannot be read; a last line that was cut short is no news, others are counted."""
    kept, unreadable = [], 0
    if os.path.exists(path):
        with open(path, "rb") as f:
            for line in f:
                iteration = iteration_of(line)
                if iteration is None:
                    unreadable += line.endswith(b"\n")
                elif iteration < iter_num:
                    kept.append(line)
    if unreadable:
        warn(f"{path}: {unreadable} lines that cannot be read are left out")
    with atomic_file(path) as f:
        f.write(b"".join(kept))


def iteration_of(line):
    """Returns the iteration of a line of metrics.jsonl, bytes; None if it cannot be read."""
    try:
        iteration = json.loads(line)["iter"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return iteration if type(iteration) is int else None


class Metrics:
    """metrics.jsonl, open for appending, and Weights & Biases if a run of it is given.

    A line that cannot be written, as on a full disk, is kept and written with the next one that can: a log is
    no reason to end a run.
    """

    def __init__(self, path, wandb=None):
        self.path = path
        self.wandb = wandb
        self.file = open(path, "ab", buffering=0)
        self.waiting = b""
        self.failing = False

    def record(self, kind, iter_num, **figures):
        """Writes one line. JSON has no infinity, as the first gradient norms in fp16 may be: that is null."""
        line = dict(kind=kind, iter=iter_num) | {
            name: finite_or_none(value) for name, value in figures.items()
        }
        self.write(json.dumps(line) + "\n")
        if self.wandb and kind in ("iter", "eval"):  # train_loss is train/loss there, as in nanoGPT
            self.wandb.log(
                dict(iter=iter_num) | {name.replace("_", "/"): value for name, value in figures.items()}
            )

    def write(self, line):
        self.waiting += line.encode()
        try:
            written = self.file.write(self.waiting)  # a full disk may take only a part
            self.waiting = self.waiting[written:]
            self.failing = False
        except OSError as e:
            if not self.failing:  # once, not with every line
                warn(f"cannot write {self.path}: {e.strerror}; trying again with each line")
            self.failing = True

    def sync(self):
        """Syncs the lines to disk, before a checkpoint, which must not know of iterations that they lack."""
        with contextlib.suppress(OSError):
            os.fsync(self.file.fileno())

    def close(self):
        self.file.close()


def finite_or_none(value):
    return None if isinstance(value, float) and not math.isfinite(value) else value


def open_metrics(run):
    """Returns the Metrics of a Run of train.py, with its first line, and prepares its out_dir."""
    cfg, iter_num = run.cfg, run.at.iter_num
    wandb = start_wandb(cfg) if cfg.wandb_log else None
    path = os.devnull  # eval_only leaves out_dir alone: a run may be writing there
    if not cfg.eval_only:
        path = run.files.metrics
        run.files.remove_partial()
        if run.files.newest is None:
            set_aside(run.files)
        rewind_metrics(path, iter_num)
    metrics = Metrics(path, wandb)
    kind = "resume" if iter_num else "config"
    metrics.record(kind, iter_num, config=dataclasses.asdict(cfg), torch=torch.__version__, memory=run.memory)
    return metrics


def set_aside(files):
    """Moves what an earlier run has left in out_dir out of the way of a new one."""
    folder = files.set_aside()
    if folder:
        say(f"moved an earlier run to {folder}; --init_from=resume would have continued it")


def start_wandb(cfg):
    """Returns the module wandb with a run begun. Raises UserError if it is not installed."""
    try:
        import wandb
    except ImportError:
        raise UserError("wandb_log=True needs wandb: pip install wandb, or --wandb_log=False") from None
    wandb.init(project=cfg.wandb_project, name=cfg.wandb_run_name, config=dataclasses.asdict(cfg))
    return wandb


def log_iteration(run, step_loss, norm, lr):
    """Prints and records the iteration that a Run of train.py has just done. step_loss: a tensor on the
    device; norm, lr: floats."""
    cfg, at = run.cfg, run.at
    loss = step_loss.item()  # waits for the update too, so that the clock is right
    dt = run.clock.seconds_per_iter()
    left = cfg.max_iters - 1 - at.iter_num
    evaluations = (cfg.max_iters - 1) // cfg.eval_interval - at.iter_num // cfg.eval_interval + 1
    eta = left * dt + evaluations * run.eval_seconds
    tflops = run.model.flops_per_token() * cfg.tokens_per_iter / dt / 1e12
    mfu, mfu_text = None, "n/a"
    if run.machine.peak:
        mfu = 100 * run.model.estimate_mfu(cfg.sequences_per_iter, dt, run.machine.peak)
        mfu_text = f"{mfu:.2f}%"
    speed = f"{cfg.tokens_per_iter / dt:,.0f} tok/s"
    say(
        f"iter {at.iter_num}: loss {loss:.4f}, time {dt * 1000:.2f}ms, mfu {mfu_text}, {tflops:.2f} TFLOP/s, "
        f"{speed}, norm {norm:.3f}, lr {lr:.2e}, eta {duration(eta)}"
    )
    run.bar.set_postfix_str(f"loss {loss:.3f}, {speed}, mfu {mfu_text}, eta {duration(eta)}")
    figures = dict(loss=loss, dt=dt, mfu=mfu, tflops=tflops, norm=norm, lr=lr, tokens=at.tokens_seen)
    figures["peak_memory"] = peak_memory(run.machine.device)
    run.metrics.record("iter", at.iter_num, **figures)
