"""
An estimate of the memory that training takes, and what to say if there is not enough.
"""

import contextlib
import dataclasses

import torch

from sologpt.errors import UserError, out_of_memory
from sologpt.hardware import available_memory, total_memory
from sologpt.loss import suitable_chunks


def memory_estimate(model, optimizers, cfg, dtype):
    """Returns memory_needed for a run of train.py, whose optimizers have their moments already."""
    params = model.get_num_params(non_embedding=False)
    states = [state for optimizer in optimizers.values() for state in optimizer.state.values()]
    optimizer_bytes = sum(moment.nbytes for state in states for moment in state.values())
    levers = (cfg.compile, cfg.activation_memory, cfg.loss_chunks)
    return memory_needed(params, optimizer_bytes, model.config, cfg.batch_size, dtype, *levers)


def memory_needed(
    params, optimizer, config, batch_size, dtype, compile, activation_memory=1.0, loss_chunks=0
):
    """Returns an estimate of training's peak: bytes of weights, gradients, optimizer, activations and loss.

    params: number of parameters, all in fp32. optimizer: bytes of the optimizer's state. config: a GPTConfig.
    The rest is as in train.py. Left out: dropout's masks, and what the CUDA context and the libraries take.
    """
    tokens = batch_size * config.block_size
    activations = activation_bytes(config, tokens, dtype, compile, activation_memory)
    loss = loss_bytes(config, tokens, dtype, compile, loss_chunks)
    gradients = 4 * params
    # a compiled backward pass returns all of its gradients at its end, with activations and loss used up
    if compile:
        gradients += max(4 * params - activations - loss, 0)
    sizes = dict(
        weights=4 * params, gradients=gradients, optimizer=optimizer, activations=activations, loss=loss
    )
    return {name: round(bytes) for name, bytes in sizes.items()}


# numbers, times n_embd, that the blocks keep for each token and layer until the backward pass
KEPT = {  # arch: {dtype: (compiled, not compiled)}
    "gpt2": {"bfloat16": (16, 18), "float16": (18, 18), "float32": (16, 16)},
    "modern": {"bfloat16": (21, 28), "float16": (22, 28), "float32": (23, 21)},
}
CHEAP = {"gpt2": 4.5, "modern": 7.5}  # of these, what an activation_memory just below 1 recomputes


def activation_bytes(config, tokens, dtype, compile, activation_memory):
    """Returns the bytes that the blocks keep for the backward pass.

    In 16 bits that includes a copy of every matrix, except at an activation_memory below 1, where no copies
    and not even what is CHEAP are kept. The numbers, and those of loss_bytes, are fitted to what torch 2.11
    asks of CUDA's allocator in 35 cases of 124M parameters (docs/memory.md); Korthikanti et al. 2022
    (https://arxiv.org/abs/2205.05198, section 4.1) count 34 bytes in 16 bits, without attention's scores,
    which fused attention does not keep.
    """
    size = bytes_of(dtype)
    C, V, layers = config.n_embd, config.vocab_size, config.n_layer
    if_compiled, if_not = KEPT[config.arch][dtype]
    kept = if_compiled if compile else if_not
    total = size * tokens * C * (kept * layers + 2)
    if size == 2:
        total += 2 * (12 * layers * C * C + V * C)
    if compile and activation_memory < 1:
        least = size * tokens * C * ((kept - CHEAP[config.arch]) * layers + 2)
        total = min(least, activation_memory * total)
    return total


def loss_bytes(config, tokens, dtype, compile, loss_chunks):
    """Returns the bytes that the logits of a chunk and their gradient take, and the head's gradient, which
    compiled or in chunks comes before all others."""
    V, C = config.vocab_size, config.n_embd
    if compile:
        loss_chunks = loss_chunks or suitable_chunks(tokens, V)
    if loss_chunks:  # the head's gradient exists from the forward pass on
        return chunk_bytes(config, dtype, compile) * tokens // loss_chunks + 4 * V * C
    if config.arch == "modern":  # the cap's gradient too
        return 16 * V * tokens
    return (8 + bytes_of(dtype)) * V * tokens  # fp32 log-probabilities and their gradient, and the logits'


def chunk_bytes(config, dtype, compile):
    """Returns the bytes of a token's logits, whose place their gradient takes; not compiled, steps between
    are there too."""
    if compile:
        return bytes_of(dtype) * config.vocab_size
    return 16 * config.vocab_size


def bytes_of(dtype):
    return 4 if dtype == "float32" else 2


def memory_line(needed, device):
    """Returns memory_needed's estimate as text, in GB or, below one, in MB, with what the device has."""
    total = sum(needed.values())
    unit, unit_bytes, digits = "MB", 1e6, 1
    if total >= 1e9:
        unit, unit_bytes, digits = "GB", 1e9, 2
    available = ""
    if free := available_memory(device):
        available = f" of {free / 1e9:.1f} GB free"
    elif has := total_memory(device):
        available = f" of {has / 1e9:.1f} GB of RAM"
    parts = ", ".join(f"{name} {size / unit_bytes:.{digits}f}" for name, size in needed.items())
    return f"about {total / unit_bytes:.{digits}f} {unit}{available}: {parts}"


def smaller_batch(batch_size, sequences):
    """Returns (batch_size, gradient_accumulation_steps) for as many sequences per iteration as before: half
    of batch_size, which must be at least 2, or the next smaller number that divides the sequences."""
    smaller = next(b for b in range(batch_size // 2, 0, -1) if sequences % b == 0)
    return smaller, sequences // smaller


def no_room(params, optimizer, config, cfg, dtype, available):
    """Returns what to tell train.py's user if memory runs out and batch_size may not or cannot be lowered.

    params, optimizer, config: as in memory_needed. cfg: train.py's keys. available: bytes; None: unknown.
    """
    text = f"out of memory with batch_size={cfg.batch_size}"
    if cfg.batch_size > 1:
        batch_size, accumulation = smaller_batch(
            cfg.batch_size, cfg.batch_size * cfg.gradient_accumulation_steps
        )
        flags = f"--batch_size={batch_size} --gradient_accumulation_steps={accumulation}"
        return f"{text}; {flags} is the same run in less memory, and --auto_fit=True finds it automatically"

    def total(config, **changes):
        levers = dict(activation_memory=cfg.activation_memory, loss_chunks=cfg.loss_chunks) | changes
        return sum(memory_needed(params, optimizer, config, 1, dtype, cfg.compile, **levers).values())

    needed = total(config)
    text += f"; by estimate {params / 1e6:.1f}M parameters need {needed / 1e9:.2f} GB with one sequence"
    smaller = "a smaller --block_size, --n_layer or --n_embd"
    if available is None:
        return f"{text}: use {smaller}"
    text += f", and {available / 1e9:.2f} GB are available"
    if needed <= available:
        return f"{text}, so it should fit, but does not: try --loss_chunks=8, or {smaller}"
    levers = dict(loss_chunks=8)
    if total(config, **levers) > available and cfg.compile:
        levers["activation_memory"] = min(0.8, cfg.activation_memory)
    if total(config, **levers) <= available:
        return f"{text}, enough with {' '.join(f'--{name}={value}' for name, value in levers.items())}"
    lengths = [T for T in range(64, config.block_size, 64) if total(with_length(config, T)) <= available]
    if lengths:
        return f"{text}, enough for about --block_size={lengths[-1]}"
    most = available * params / (8 * params + optimizer)
    return (
        f"{text}, not enough for more than {most / 1e6:.0f}M parameters: use a smaller --n_layer or --n_embd"
    )


@contextlib.contextmanager
def nothing_half_done():
    """Returns a context for an update: if memory runs out in the middle of it, some weights are new and some
    are not, so that it cannot be repeated. Raises UserError then."""
    try:
        yield
    except Exception as e:
        if out_of_memory(e):
            raise UserError(
                "out of memory in the middle of an update, which cannot be repeated; resume from the last "
                "checkpoint with a smaller --batch_size"
            ) from None
        raise


def with_length(config, block_size):
    return dataclasses.replace(config, block_size=block_size)


def check_size(config):
    """Raises UserError if the weights of a model with this GPTConfig cannot fit into this computer's memory,
    where they are made, before that is tried."""
    params = 12 * config.n_layer * config.n_embd**2 + config.vocab_size * config.n_embd
    has = total_memory(torch.device("cpu"))
    if has and 4 * params > has:
        raise UserError(
            f"n_layer={config.n_layer} of n_embd={config.n_embd} make a model of {params / 1e9:,.1f}B "
            f"parameters, {4 * params / 1e9:,.1f} GB, and this computer has {has / 1e9:,.1f} GB; lower them"
        )
