"""
What to do where memory is not enough: before a run, when it runs out, and what to tell the user.
"""

import contextlib
import dataclasses

import torch

from sologpt import parallel
from sologpt.checkpoint import save_progress, set_rng
from sologpt.display import warn
from sologpt.errors import UserError, out_of_memory
from sologpt.hardware import available_memory, forget_compiled, total_memory
from sologpt.memory import block_params, keeps_scores, memory_estimate, memory_needed


def fit_batch_size(model, optimizers, cfg, machine):
    """Lowers cfg.batch_size until memory_estimate is within 1.1 times a GPU's free memory (more would fail at
    the first step, after compiling) or 0.8 times a computer's (the system kills a process that takes all of
    it). Returns that estimate. An evaluation alone takes less, and is simply tried.

    Raises UserError if the smallest batch_size that auto_fit allows cannot fit into a computer's memory.
    """
    on_cpu = machine.device.type == "cpu"
    has = total_memory(machine.device) if on_cpu else available_memory(machine.device)
    needed = memory_estimate(model, optimizers, cfg, machine.dtype)
    if has is None or cfg.eval_only:
        return needed
    if on_cpu:
        has /= parallel.from_torchrun("LOCAL_WORLD_SIZE", 1)  # processes share it
    has = parallel.all_reduce([has], parallel.MIN)[0]
    limit = 0.8 * has if on_cpu else 1.1 * has
    asked, first_estimate = cfg.batch_size, sum(needed.values())
    while sum(needed.values()) > limit and cfg.batch_size > 1 and cfg.auto_fit:
        lower_batch_size(cfg)
        needed = memory_estimate(model, optimizers, cfg, machine.dtype)
    if on_cpu and sum(needed.values()) > limit:
        params = model.get_num_params(non_embedding=False)
        raise UserError(no_room(params, needed["optimizer"], model.config, cfg, machine, limit))
    if cfg.batch_size < asked:
        warn(
            f"batch_size={asked} would take about {first_estimate / 1e9:,.1f} GB, more than the "
            f"{limit / 1e9:,.1f} that a run may try; the same run starts with batch_size={cfg.batch_size}, "
            f"gradient_accumulation_steps={cfg.gradient_accumulation_steps}"
        )
    return needed


def use_smaller_batch(run):
    """Rewinds the iteration of a Run of train.py and halves batch_size. Raises UserError at batch_size=1 or
    auto_fit=False."""
    cfg, at, device = run.cfg, run.progress, run.machine.device
    run.model.train()  # it may have been evaluating
    run.model.zero_grad(set_to_none=True)
    set_rng(run.rng, device)
    forget_compiled(device)
    save_progress(run)
    if cfg.batch_size == 1 or not cfg.auto_fit:
        params = run.model.get_num_params(non_embedding=False)
        available = available_memory(device)
        advice = no_room(params, run.memory["optimizer"], run.model.config, cfg, run.machine, available)
        raise UserError(f"{advice} ({run.files.saved_text}, this is iteration {at.iter_num})")
    text = f"out of memory with batch_size={cfg.batch_size}; from iteration {at.iter_num} on"
    lower_batch_size(cfg)
    warn(f"{text} batch_size={cfg.batch_size}, gradient_accumulation_steps={cfg.gradient_accumulation_steps}")
    sizes = dict(batch_size=cfg.batch_size, gradient_accumulation_steps=cfg.gradient_accumulation_steps)
    run.metrics.record("smaller_batch", at.iter_num, **sizes)


def lower_batch_size(cfg):
    """Lowers the batch_size of train.py's cfg to smaller_batch's; the command that resumes will have it."""
    cfg.batch_size, cfg.gradient_accumulation_steps = smaller_batch(cfg.batch_size, cfg.sequences_per_iter)
    cfg.overruled = set(cfg.overruled) | {"batch_size", "gradient_accumulation_steps"}


def smaller_batch(batch_size, sequences):
    """Returns (batch_size, gradient_accumulation_steps) for as many sequences per iteration as before: half
    of batch_size, which must be at least 2, or the next smaller number that divides those of each process."""
    shares = sequences // parallel.processes()
    smaller = next(b for b in range(batch_size // 2, 0, -1) if shares % b == 0)
    return smaller, sequences // smaller


def no_room(params, optimizer, config, cfg, machine, available):
    """Returns what to tell train.py's user if memory runs out and batch_size may not or cannot be lowered.

    params, optimizer, config: as in memory_needed. cfg: train.py's keys. available: bytes; None: unknown.
    """
    dtype = "fp8" if cfg.matmul == "fp8" else machine.dtype
    text = f"out of memory with batch_size={cfg.batch_size}"
    if cfg.batch_size > 1:
        batch_size, accumulation = smaller_batch(cfg.batch_size, cfg.sequences_per_iter)
        flags = f"--batch_size={batch_size} --gradient_accumulation_steps={accumulation}"
        return f"{text}; {flags} is the same run in less memory, and --auto_fit=True finds it automatically"

    def total(block_size=config.block_size, **changes):
        shorter = dataclasses.replace(config, block_size=block_size)
        levers = dict(activation_memory=cfg.activation_memory, loss_chunks=cfg.loss_chunks) | changes
        levers["scores"] = keeps_scores(config, machine.device)
        return sum(memory_needed(params, optimizer, shorter, 1, dtype, cfg.compile, **levers).values())

    needed = total()
    text += f"; by estimate {params / 1e6:.1f}M parameters need {needed / 1e9:.2f} GB with one sequence"
    smaller = "a smaller --block_size, --n_layer or --n_embd"
    if available is None:
        return f"{text}: use {smaller}"
    text += f", and {available / 1e9:.2f} GB are available"
    if needed <= available:
        if cfg.loss_chunks < 8:
            smaller = f"--loss_chunks=8, or {smaller}"
        return f"{text}, so it should fit, but does not: try {smaller}"
    levers = dict(loss_chunks=8)
    if total(**levers) > available and cfg.compile:
        levers["activation_memory"] = 0.8
    if total(**levers) <= available:
        return f"{text}, enough with {' '.join(f'--{name}={value}' for name, value in levers.items())}"
    lengths = [T for T in range(64, config.block_size, 64) if total(T) <= available]
    if lengths:
        return f"{text}, enough for about --block_size={lengths[-1]}"
    most = available * params / total(64)
    return (
        f"{text}, not enough for more than {most / 1e6:.0f}M parameters: use a smaller --n_layer or --n_embd"
    )


@contextlib.contextmanager
def no_retry_if_out_of_memory():
    """Returns a context for an update: if memory runs out in the middle of it, some weights are new and some
    are not, or another process has made the update, so that it cannot be repeated. Raises UserError then."""
    try:
        yield
    except Exception as e:
        if out_of_memory(e):
            raise UserError(
                "out of memory in the middle of an update, which cannot be repeated. It needs as much at "
                "any batch_size: free memory and resume, or lower --n_layer or --n_embd"
            ) from None
        raise


def check_size(config):
    """Raises UserError if the weights of a model with this GPTConfig cannot fit into this computer's memory,
    where they are made, before that is tried."""
    tables = 3 if config.arch == "modern" else 1
    params = block_params(config) + tables * config.vocab_size * config.n_embd
    has = total_memory(torch.device("cpu"))
    if has and 4 * params > has:
        raise UserError(
            f"n_layer={config.n_layer} of n_embd={config.n_embd} with {config.vocab_size:,} token ids make a "
            f"model of {params / 1e9:,.1f}B parameters, {4 * params / 1e9:,.1f} GB, and this computer has "
            f"{has / 1e9:,.1f} GB; lower them"
        )
