"""
What a run will do, said before it starts, and what it has done, said at its end.
"""

import json
import math
import os
import shlex
import statistics
import sys

import torch

from sologpt import parallel
from sologpt.display import duration, print_aligned, say
from sologpt.files import free_bytes
from sologpt.hardware import attention_backend, peak_memory
from sologpt.log import elapsed
from sologpt.memory import checkpoint_bytes, memory_line
from sologpt.page import page_of_run


def notes(cfg):
    """Returns lines about values of train.py's keys that are allowed but perhaps not meant."""
    found = schedule_notes(cfg)
    for name, schedule in (("lr_decay_iters", "wsd"), ("cooldown_frac", "cosine")):
        if name in cfg.given and cfg.schedule == schedule:
            found.append(f"note: {name} has no effect with schedule={cfg.schedule!r}")
    if cfg.keep_before_cooldown and cfg.max_minutes:
        found.append("note: keep_before_cooldown=True has no effect with max_minutes")
    if cfg.sample_interval % cfg.eval_interval:
        common = math.lcm(cfg.sample_interval, cfg.eval_interval)
        text = f"samples are drawn at evaluations, every {cfg.eval_interval:,} iterations"
        found.append(f"note: {text}, so sample_interval={cfg.sample_interval} acts every {common:,}")
    if cfg.checkpoint_interval and "always_save_checkpoint" in cfg.given:
        found.append("note: always_save_checkpoint has no effect with checkpoint_interval")
    if "backend" in cfg.given and parallel.processes() == 1:
        found.append(f"note: backend={cfg.backend!r} has no effect: it is for several processes")
    return found


def busy_note(device):
    """Returns a note about a computer whose cores are all at work already, or None."""
    if device.type != "cpu" or torch.get_num_threads() == 1 or not hasattr(os, "getloadavg"):
        return None
    load, cores = os.getloadavg()[0], os.cpu_count()
    if load < cores:
        return None
    return f"this computer is busy (load {load:.1f} on {cores} cores): OMP_NUM_THREADS=1 may be faster"


def schedule_notes(cfg):
    warmup = cfg.warmup_iters
    unless = ""
    if cfg.max_minutes:
        unless = ", unless max_minutes ends the warmup earlier"
    if not cfg.decay_lr:
        return ["note: decay_lr=False: the learning rate has neither warmup nor decay"]
    if cfg.min_lr > cfg.learning_rate:
        return [f"note: lr rises to min_lr={cfg.min_lr:g}: it is above learning_rate={cfg.learning_rate:g}"]
    if 0 < cfg.max_iters <= warmup:
        return [f"note: the learning rate still rises when this run ends: warmup_iters={warmup}{unless}"]
    if cfg.schedule == "wsd" and cfg.cooldown_start < warmup:
        text = f"note: the cooldown begins at {cfg.cooldown_start}, before the warmup ends at {warmup}"
        return [text + unless]
    if cfg.schedule == "cosine" and cfg.lr_decay_iters < warmup:
        text = f"note: after warmup_iters={warmup} lr drops to min_lr: lr_decay_iters={cfg.lr_decay_iters}"
        return [text + unless]
    if cfg.schedule == "cosine" and cfg.lr_decay_iters < cfg.max_iters:
        return [f"note: lr stays at min_lr from lr_decay_iters={cfg.lr_decay_iters} to {cfg.max_iters}"]
    if cfg.schedule == "cosine" and 0 < cfg.max_iters < cfg.lr_decay_iters:
        ends = f"max_iters={cfg.max_iters} is before lr_decay_iters={cfg.lr_decay_iters}"
        if cfg.max_minutes:
            ends += ", unless max_minutes ends it earlier"
        return [f"note: lr does not fall to min_lr: {ends}"]
    return []


def parameters(model):
    """Returns the numbers of parameters as text: of those in matmuls, which MFU counts, and of the others."""
    in_matmuls = model.get_num_params()
    looked_up = model.get_num_params(non_embedding=False) - in_matmuls
    return f"{in_matmuls / 1e6:.2f}M parameters in matmuls + {looked_up / 1e6:.2f}M looked up"


def describe(run):
    """Prints what a Run of train.py will do; numbers with the product that makes them."""
    cfg, model = run.cfg, run.model
    lines = [
        f"data: {run.folder}, {run.train_data.tokens:,} train + {run.val_data.tokens:,} val tokens, "
        f"{run.tokenizer.encoding}, {run.tokenizer.vocab_size:,} ids in {model.config.vocab_size:,} rows",
        f"model: {parameters(model)}, {model.flops_per_token() / 1e6:,.1f} MFLOP per token",
    ]
    if backend := attention_backend(run.machine, model.config):
        lines[-1] += f", {backend}"
    how_often = "once"
    if not cfg.eval_only:
        lines += plan(run)
        how_often = f"every {cfg.eval_interval:,} iterations"
    lines.append(
        f"evaluation: {how_often}, 12 * {cfg.eval_iters} = {cfg.eval_windows:,} windows of "
        f"{len(run.train_data):,} train and {len(run.val_data):,} val"
    )
    print_aligned(lines)
    for note in data_notes(run):
        print(f"note: {note}")


def plan(run):
    """Returns lines about the memory, the iterations and the length of training."""
    cfg = run.cfg
    # its label must not begin as log lines do, with iter or step
    tokens = (
        f"tokens: {cfg.batch_size} * {cfg.gradient_accumulation_steps} * {cfg.block_size} = "
        f"{cfg.tokens_per_iter:,} an iteration (batch_size * gradient_accumulation_steps * block_size)"
    )
    if parallel.processes() > 1:
        share = cfg.gradient_accumulation_steps // parallel.processes()
        tokens += f", {share} micro-batches on each of {parallel.processes()} processes"
    memory = f"memory: {memory_line(run.memory, run.machine.device)}"
    return [memory, tokens, f"run: {whole_run(cfg, run.progress, len(run.train_data))}"]


def whole_run(cfg, at, windows):
    """Returns the length of a run in tokens and epochs of that many windows, and its schedule, as text. at:
    its Progress."""
    if cfg.max_minutes:
        iters = f"{cfg.max_iters:,} iterations of {cfg.tokens_per_iter:,} tokens"
        return f"{cfg.max_minutes:g} minutes, or {iters} if these end first"
    text = f"{cfg.max_iters - at.iter_num:,} * {cfg.tokens_per_iter:,}"
    if at.tokens_seen:
        text = f"{at.tokens_seen:,} + {text}"
    tokens = at.tokens_seen + (cfg.max_iters - at.iter_num) * cfg.tokens_per_iter
    text += f" = {tokens:,} tokens, {epochs_of(at, tokens, cfg, windows)}"
    # with a longer warmup there is nothing constant, as notes() says
    if cfg.decay_lr and cfg.schedule == "wsd" and cfg.warmup_iters <= cfg.cooldown_start:
        constant = cfg.cooldown_start - cfg.warmup_iters
        cooldown = cfg.max_iters - cfg.cooldown_start
        text += (
            f"; {cfg.warmup_iters:,} iterations of warmup, {constant:,} constant, {cooldown:,} of cooldown"
        )
    return text


def epochs_of(at, tokens, cfg, windows):
    """Returns how many epochs of that many windows so many tokens are, as text; those of other data, which
    Progress at knows, do not count."""
    epochs = (tokens - at.other_tokens) / cfg.block_size / windows
    since = " since the data changed" if at.other_tokens else ""
    return f"{epochs:.3g} epochs{since}"


def data_notes(run):
    """Returns notes about a busy computer, and data that are few for what they are used for."""
    cfg = run.cfg
    found = []
    if busy := busy_note(run.machine.device):
        found.append(busy)
    for split, windows in (("train", run.train_data), ("val", run.val_data)):
        if len(windows) < cfg.eval_windows:
            found.append(f"{split} has only {len(windows):,} windows; all of them are evaluated")
    if cfg.eval_only:
        return found
    at = run.progress
    tokens = at.tokens_seen - at.other_tokens + (cfg.max_iters - at.iter_num) * cfg.tokens_per_iter
    epochs = tokens / cfg.block_size / len(run.train_data)
    if epochs > 20 and cfg.dropout == 0 and not cfg.max_minutes:
        found.append(
            f"{epochs:,.0f} epochs without dropout will memorise the text; watch the val loss, and try "
            f"--dropout=0.2, fewer --max_iters or a smaller model (config/text_1m.py)"
        )
    return found


# what decides how long an iteration takes
SPEED = (
    "arch n_layer n_head n_embd block_size batch_size gradient_accumulation_steps optimizer device dtype "
    "matmul compile compile_mode activation_memory loss_chunks dataset dropout"
).split()


def print_dry_run(run):
    """Prints what a dry run adds to describe: time, if an earlier run in out_dir shows it, and disk."""
    cfg = run.cfg
    if cfg.eval_only:
        print_aligned(["dry run: nothing was written"])
        return
    left = cfg.max_iters - run.progress.iter_num
    time_text = "not known for these settings; python bench.py with the same arguments measures it"
    if dt := seconds_of_earlier_run(run.files.metrics, cfg):
        shown = f"the {dt:.3g} s each that {cfg.out_dir} shows"
        time_text = f"{duration(left * dt)} for {left:,} iterations of {shown}, without evaluations"
    if cfg.max_minutes:
        minutes = max(0.0, cfg.max_minutes - elapsed(run) / 60)
        time_text = f"about {minutes:.3g} minutes at most, evaluations included"
    resumed = run.progress.iter_num > 0
    written = checkpoint_bytes(run.memory, cfg.keep_before_cooldown, resumed) / 1e9
    free = free_bytes(cfg.out_dir) / 1e9
    print_aligned(
        [
            f"time: {time_text}",
            f"disk: at most {written:,.2f} GB of checkpoints in {cfg.out_dir}, {free:,.1f} GB are free",
            "dry run: nothing was written",
        ]
    )


def seconds_of_earlier_run(path, cfg):
    """Returns the median seconds of the last iterations in a metrics.jsonl whose run has the same SPEED, or
    None."""
    if not os.path.exists(path):
        return None
    same, seconds = False, []
    with open(path, encoding="utf-8", errors="replace") as f:
        for line in f:
            try:
                row = json.loads(line)
                if "config" in row:
                    same = all(row["config"].get(name) == getattr(cfg, name) for name in SPEED)
                    same = same and row.get("processes", 1) == parallel.processes()
                    seconds = []
                if row["kind"] == "iter":
                    seconds.append(float(row["dt"]))
            except (ValueError, KeyError, TypeError, AttributeError):
                continue
    if not same or not seconds:
        return None
    return statistics.median(seconds[-50:])


def resume_command(argv, cfg):
    """Returns the command that continues a run of train.py with these arguments, which gave cfg."""
    replaced = {"init_from", *cfg.overruled}
    kept = [arg for arg in argv if arg.partition("=")[0].removeprefix("--") not in replaced]
    overruled = [f"--{name}={getattr(cfg, name)}" for name in sorted(cfg.overruled)]
    return shlex.join([*launcher(), sys.argv[0], *kept, *overruled, "--init_from=resume"])


def launcher():
    """Returns the words before train.py in a command that starts this run."""
    if parallel.processes() == 1:
        return ["python"]
    per_machine = parallel.from_torchrun("LOCAL_WORLD_SIZE", 1)
    machines = parallel.processes() // per_machine
    where = ["--standalone"]
    if machines > 1:
        where = [f"--nnodes={machines}", "--rdzv_backend=c10d", "--rdzv_endpoint=HOST:PORT"]
    return ["torchrun", *where, f"--nproc_per_node={per_machine}"]


def sum_up(run):
    """Says what a finished Run of train.py has done, and records it."""
    if parallel.rank():
        return
    cfg, at, clock = run.cfg, run.progress, run.clock
    figures = dict(seconds=elapsed(run), tokens=at.tokens_seen, best_val_loss=at.best_val_loss, **run.losses)
    figures |= dict(bad_steps=at.bad_steps, resumed=at.resumed)
    figures |= dict(tokens_per_s=None, mfu=None, peak_memory=peak_memory(run.machine.device))
    if clock.all_iters:
        dt = clock.all_seconds / clock.all_iters
        figures["tokens_per_s"] = cfg.tokens_per_iter / dt
        if run.machine.peak:
            figures["mfu"] = 100 * run.model.estimate_mfu(cfg.sequences_per_iter, dt, run.machine.peak)
    run.metrics.record("done", at.iter_num, **figures)
    say(
        f"done: iteration {at.iter_num:,} after {duration(figures['seconds'])}, {at.tokens_seen:,} tokens, "
        f"best val loss {at.best_val_loss:.4f}"
    )
    lines = final_lines(run, figures)
    if page := page_of_run(cfg.out_dir):
        lines.append(f"page: {page}")
    if at.iter_num:  # else there is nothing to sample
        arguments = [f"--out_dir={cfg.out_dir}"]
        is_best = figures["val_loss"] <= at.best_val_loss  # a NaN is not
        if not is_best and os.path.exists(run.files.best):
            arguments.append("--init_from=best")
        script = os.path.join(os.path.dirname(sys.argv[0]), "sample.py")
        lines.append(f"next: python {shlex.join([script, *arguments])}")
    print_aligned(lines)


def final_lines(run, figures):
    """Returns the lines of a summary."""
    cfg, tokens = run.cfg, figures["tokens"]
    epochs = epochs_of(run.progress, tokens, cfg, len(run.train_data))
    last = f"val loss {figures['val_loss']:.4f}, train loss {figures['train_loss']:.4f}"
    if figures["val_bpb"]:
        last += f", {figures['val_bpb']:.4f} bits/byte"
    lines = [
        f"model: {parameters(run.model)}, arch={cfg.arch}, optimizer={cfg.optimizer}",
        f"data: {run.folder}, {epochs}",
        f"at the end: {last}",
    ]
    if figures["tokens_per_s"]:
        speed = f"{figures['tokens_per_s']:,.0f} tok/s"
        if figures["mfu"]:
            speed += f", mfu {figures['mfu']:.2f}%"
        if figures["resumed"]:
            speed += " since it was resumed,"
        lines.append(f"speed: {speed} without compilation, evaluations and checkpoints")
    if figures["peak_memory"]:
        lines.append(f"memory: {figures['peak_memory'] / 1e9:.2f} GB at most")
    by_the_clock = cfg.max_minutes > 0
    if cfg.keep_before_cooldown and not by_the_clock and not os.path.exists(run.files.before_cooldown):
        lines.append(f"missing: {run.files.before_cooldown} could not be saved, or this run began after it")
    if not run.progress.iter_num and cfg.max_iters:
        lines.append(f"trouble: max_minutes={cfg.max_minutes:g} ran out before the first iteration")
    if figures["bad_steps"]:
        lines.append(f"trouble: {figures['bad_steps']} updates were not finite, and skipped")
    if figures["resumed"]:
        lines.append(f"sessions: {figures['resumed'] + 1}")
    return lines
