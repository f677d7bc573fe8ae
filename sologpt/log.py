"""
What a run reports while it runs: lines for the user, metrics.jsonl, and the time of its iterations.
"""

import contextlib
import dataclasses
import json
import math
import os
import time

import torch
from tqdm import tqdm

from sologpt import checkpoint, parallel
from sologpt.display import duration, say, warn
from sologpt.errors import UserError, first_line, out_of_memory
from sologpt.files import atomic_file
from sologpt.hardware import device_name, peak_memory
from sologpt.health import watch_loss
from sologpt.tracker import Tracker

PROMPT, CONTINUATION = 16, 64  # tokens of the samples while training


def progress_bar(cfg, initial):
    """Returns the bar of a run, shown if stderr is a terminal; its time left is that of the last log line."""
    layout = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}"
    if cfg.max_minutes:  # which iteration is the last is not known
        layout = "{n_fmt} iterations{postfix}"
    return tqdm(total=cfg.max_iters, initial=initial, disable=None, dynamic_ncols=True, bar_format=layout)


class Clock:
    """Times the iterations between two log lines; work in paused() is not training and does not count."""

    def __init__(self, machine):
        self.machine = machine
        self.all_seconds = 0.0
        self.all_iters = 0
        self.last = 0.0  # seconds of an iteration, at the last lap
        self.restart()

    def restart(self):
        self.start = time.perf_counter()
        self.iters = 0

    @contextlib.contextmanager
    def paused(self):
        """Returns a context whose time does not count. Waits for the device first."""
        self.machine.synchronize()  # updates in flight belong to the clock, what follows does not
        start = time.perf_counter()
        yield
        self.start += time.perf_counter() - start

    def lap(self):
        """Returns the mean seconds of the iterations since the last restart, counts them for the end, and
        restarts: what is logged then is part of the next iteration's time."""
        seconds = time.perf_counter() - self.start
        self.all_seconds += seconds
        self.all_iters += self.iters
        self.last = seconds / self.iters
        self.restart()
        return self.last

    def recent(self):
        """Returns the mean seconds of the iterations since the last lap, of those before it if there are
        none. No sync: each update has waited for the device."""
        if not self.iters:
            return self.last
        return (time.perf_counter() - self.start) / self.iters


def elapsed(run):
    """Returns the seconds of a Run of train.py since it began, all that it did and all its parts counted."""
    return time.perf_counter() - run.started


def share_of_time(run):
    """Returns the share of max_minutes that a Run will have used after one more iteration and evaluation."""
    return share_of(run.cfg, elapsed(run) + run.clock.recent() + run.progress.eval_seconds)


def share_of(cfg, seconds):
    """Returns the share of max_minutes that so many seconds are, at most 1; 0 without a limit."""
    if not cfg.max_minutes:
        return 0.0
    return min(1.0, seconds / (60 * cfg.max_minutes))


def rewind_metrics(path, iter_num, evaluates):
    """Drops the lines of metrics.jsonl from iter_num on, so that no iteration appears twice after resuming
    there. An evaluation at iter_num, and its samples, stay if the run will not evaluate there again; returns
    its line as bytes, empty if there is none. Lines that cannot be read are dropped too; a last one that was
    cut short is no news, others are counted."""
    lines = []
    unreadable = 0
    evaluation = b""
    if os.path.exists(path):
        with open(path, "rb") as f:
            for line in f:
                iteration, kind = iteration_and_kind(line)
                if iteration is None:
                    if line.endswith(b"\n"):
                        unreadable += 1
                    continue
                stays = iteration == iter_num and kind in ("eval", "sample") and not evaluates
                if iteration < iter_num or stays:
                    lines.append(line.rstrip(b"\n") + b"\n")  # the last one may lack its end
                if stays and kind == "eval":
                    evaluation = line
    if unreadable:
        warn(f"{path}: {unreadable} lines that cannot be read are left out")
    with atomic_file(path) as f:
        f.write(b"".join(lines))
    return evaluation


def iteration_and_kind(line):
    """Returns both of a line of metrics.jsonl, bytes; Nones if it cannot be read."""
    try:
        entry = json.loads(line)
        iteration = entry["iter"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None, None
    if type(iteration) is not int:
        return None, None
    return iteration, entry.get("kind")


class Metrics:
    """metrics.jsonl, open for appending; what is an iteration's or an evaluation's goes to a Tracker too.

    A line that cannot be written, as on a full disk, is kept and written with the next one that can: a log is
    no reason to end a run.
    """

    def __init__(self, path, tracker):
        self.path = path
        self.tracker = tracker
        self.evaluated_iter = -1  # of an evaluation that is there already
        self.file = open(path, "ab", buffering=0)
        self.waiting = b""
        self.failing = False

    def record(self, kind, iter_num, **figures):
        """Writes one line. JSON has no infinity, as the first gradient norms in fp16 may be: that is null."""
        if kind == "eval" and iter_num == self.evaluated_iter:
            return
        line = dict(kind=kind, iter=iter_num) | {
            name: finite_or_none(value) for name, value in figures.items()
        }
        self.write(json.dumps(line) + "\n")
        if kind in ("iter", "eval"):
            self.tracker.send(iter_num, figures)

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
        self.tracker.close()
        self.file.close()


def finite_or_none(value):
    return None if isinstance(value, float) and not math.isfinite(value) else value


def prepare_out_dir(run):
    """Prepares the out_dir of a Run of train.py: removes partial files, moves an earlier run aside, and drops
    metrics from iter_num on. Returns the open Metrics, with a first line."""
    cfg, iter_num = run.cfg, run.progress.iter_num
    if cfg.sample_interval:
        run.tokenizer.decode([0])  # may need a download: better missed now than at the first evaluation
    evaluation = b""
    path = os.devnull  # eval_only leaves out_dir alone: a run may be writing there
    if not (cfg.eval_only or parallel.rank()):
        path = run.files.metrics
        run.files.remove_partial()
        if run.files.newest is None and (folder := run.files.set_aside()):
            text = f"moved an earlier run to {folder}"
            if checkpoint.RunFiles(folder).exist():
                text += f"; to go on with it: --out_dir={folder} --init_from=resume"
            say(text)
        evaluates = iter_num % cfg.eval_interval == 0 or iter_num == cfg.max_iters or share_of_time(run) == 1
        evaluation = rewind_metrics(path, iter_num, evaluates)
    metrics = Metrics(path, Tracker(cfg, first=iter_num))
    if evaluation:
        figures = json.loads(evaluation)
        metrics.tracker.send(figures.pop("iter"), {name: figures[name] for name in figures if name != "kind"})
        # compiling may take what is left of max_minutes, so that it evaluates after all
        metrics.evaluated_iter = iter_num
    kind = "resume" if iter_num else "config"
    facts = dict(config=dataclasses.asdict(cfg), torch=torch.__version__, memory=run.memory)
    facts |= dict(
        device=device_name(run.machine.device), dtype=run.machine.dtype, peak_flops=run.machine.peak
    )
    facts |= dict(processes=parallel.processes(), tokens=run.progress.tokens_seen)
    facts["best_val_loss"] = run.progress.best_val_loss
    metrics.record(kind, iter_num, **facts)
    return metrics


def log_iteration(run, it, step_loss, norm, lr):
    """Prints and records iteration `it`, which a Run of train.py has just done. step_loss: a tensor on the
    device; norm, lr: floats."""
    cfg, at = run.cfg, run.progress
    loss = step_loss.item()  # waits for the update too, so that the clock is right
    dt = run.clock.lap()
    left = cfg.max_iters - 1 - it
    evaluations = (cfg.max_iters - 1) // cfg.eval_interval - it // cfg.eval_interval + 1
    eta = left * dt + evaluations * at.eval_seconds
    if cfg.max_minutes:
        eta = max(0, min(eta, 60 * cfg.max_minutes - elapsed(run)))
    tflops = run.model.flops_per_token() * cfg.tokens_per_iter / dt / 1e12
    mfu, mfu_text = None, "n/a"
    if run.machine.peak:
        mfu = 100 * run.model.estimate_mfu(cfg.sequences_per_iter, dt, run.machine.peak)
        mfu_text = f"{mfu:.2f}%"
    speed = f"{cfg.tokens_per_iter / dt:,.0f} tok/s"
    if parallel.processes() > 1:
        speed += f" of {parallel.processes()} processes"
    say(
        f"iter {it}: loss {loss:.4f}, time {dt * 1000:.2f}ms, mfu {mfu_text}, {tflops:.3g} TFLOP/s, "
        f"{speed}, norm {norm:.3f}, lr {lr:.2e}, eta {duration(eta)}"
    )
    run.bar.set_postfix_str(f"loss {loss:.3f}, {speed}, mfu {mfu_text}, eta {duration(eta)}")
    figures = dict(loss=loss, dt=dt, mfu=mfu, tflops=tflops, norm=norm, lr=lr, tokens=at.tokens_seen)
    figures["peak_memory"] = peak_memory(run.machine.device)
    run.metrics.record("iter", it, **figures, elapsed=elapsed(run))
    watch_loss(run, it, loss, norm)


def log_samples(run):
    """Prints and records how the model continues the beginnings of three validation windows; the same ones
    each time, drawn with the same numbers, so that only the model differs. Torch's random state is left
    alone."""
    start = time.perf_counter()
    model, block_size = run.model, run.cfg.block_size
    windows = torch.from_numpy(run.val_data.read(run.val_data.spread(3)))
    prompts = windows[:, : min(PROMPT, max(1, block_size // 2))].to(run.machine.device)
    length = min(CONTINUATION, block_size - prompts.size(1))
    noise = torch.rand(len(prompts), length, generator=torch.Generator().manual_seed(run.cfg.seed))
    model.eval()
    try:
        with run.stop.interrupts():
            texts = model.generate(prompts, length, temperature=0.8, noise=noise).tolist()
    except Exception as e:  # no reason to end a run, or to make its micro-batches smaller
        if not isinstance(e, UserError) and not out_of_memory(e):
            raise
        warn(f"no samples at iteration {run.progress.iter_num}: {first_line(e)}")
        return
    finally:
        model.train()
    samples = []
    for ids in texts:
        prompt = run.tokenizer.decode(ids[: prompts.size(1)])
        text = run.tokenizer.decode(ids[prompts.size(1) :])
        samples.append(dict(prompt=prompt, text=text))
        say(f"sample {run.progress.iter_num}: {as_json(prompt)} -> {as_json(text)}")
    run.metrics.record("sample", run.progress.iter_num, samples=samples)
    run.progress.eval_seconds += time.perf_counter() - start


def as_json(text):
    """Returns a text in one line."""
    return json.dumps(text, ensure_ascii=False)
