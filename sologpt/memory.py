"""
An estimate of the memory that training takes.
"""

from sologpt.hardware import available_memory, total_memory
from sologpt.loss import suitable_chunks


def memory_estimate(model, optimizers, cfg, dtype):
    """Returns memory_needed for a run of train.py, whose optimizers have their moments already."""
    params = model.get_num_params(non_embedding=False)
    states = [state for optimizer in optimizers.values() for state in optimizer.state.values()]
    optimizer_bytes = sum(moment.nbytes for state in states for moment in state.values())
    levers = (cfg.compile, cfg.activation_memory, cfg.loss_chunks)
    scores = keeps_scores(model.config, model.transformer.wte.weight.device)
    if cfg.matmul == "fp8":
        dtype = "fp8"
    return memory_needed(params, optimizer_bytes, model.config, cfg.batch_size, dtype, *levers, scores)


def keeps_scores(config, device):
    """Whether attention keeps its scores for the backward pass: on a CPU no fused kernel has dropout."""
    return device.type == "cpu" and config.dropout > 0


def memory_needed(
    params,
    optimizer,
    config,
    batch_size,
    dtype,
    compile,
    activation_memory=1.0,
    loss_chunks=0,
    scores=False,
):
    """Returns an estimate of training's peak: bytes of weights, gradients, optimizer, activations and loss.
    Weights in 16 bits count as activations.

    params: number of parameters, all in fp32. optimizer: bytes of the optimizer's state. config: a GPTConfig.
    dtype: "fp8" for matmul="fp8". scores: see keeps_scores. The rest is as in train.py. Left out: dropout's
    other masks, and what the CUDA context and the libraries take. The numbers here and below are fitted to
    what torch 2.11 asks of CUDA's allocator (docs/memory.md).
    """
    tokens = batch_size * config.block_size
    of_blocks = block_params(config)
    of_head = config.vocab_size * config.n_embd
    recomputes = compile and activation_memory < 1
    activations = activation_bytes(config, tokens, dtype, compile, recomputes)
    loss = loss_bytes(config, tokens, dtype, compile, loss_chunks)
    if recomputes:  # which begins when the loss has left only the head's gradient
        loss = max(loss, 4 * of_head + bytes_of(dtype) * tokens * config.n_embd * RECOMPUTED)
    gradients = 4 * params
    # What comes when the backward pass has freed activations and loss: Muon's update needs 4.4 bytes more for
    # each of its parameters, which are those with a state of 4 bytes, not 8. A compiled backward pass ends
    # with all gradients of the blocks, and with 12 bytes for each weight of the head.
    later = 1.1 * (8 * params - optimizer)
    if compile:
        later = max(later, bytes_of(dtype) * of_blocks + 12 * of_head)
    gradients += max(later - activations - loss, 0)
    activations += casts_bytes(config, dtype)  # there all the time
    if scores:  # 13 bytes for each, with dropout's mask and what it leaves; compiled 9
        activations += 13 * tokens * config.block_size * config.n_head * config.n_layer
    sizes = dict(
        weights=4 * params, gradients=gradients, optimizer=optimizer, activations=activations, loss=loss
    )
    return {name: round(size) for name, size in sizes.items()}


def casts_bytes(config, dtype):
    """Returns the bytes of what layers.cast_weights makes; in FP8 the blocks have layers of torchao's."""
    if dtype == "float32":
        return 0
    blocks = 0 if dtype == "fp8" else block_params(config)
    return 2 * (blocks + config.vocab_size * config.n_embd)


def block_params(config):
    """Returns the number of weights in the blocks' matrices."""
    return 12 * config.n_layer * config.n_embd**2


def checkpoint_bytes(memory, keep_before_cooldown, resumed=False):
    """Returns the most bytes of checkpoints of a run with this memory_estimate: ckpt.pt, ckpt_prev.pt, a
    third one that is being written, best.pt, before_cooldown.pt and, in a resumed run, best_before.pt."""
    state = memory["weights"] + memory["optimizer"]
    states = 3
    if keep_before_cooldown:
        states += 1
    models = 1
    if resumed:
        models += 1
    return states * state + models * memory["weights"]


# numbers, times n_embd, that the blocks keep for each token and layer until the backward pass
KEPT = {  # arch: {dtype: (compiled, not compiled)}; in FP8 some are half as long
    "gpt2": {"bfloat16": (16, 18), "float16": (18, 18), "float32": (16, 16), "fp8": (10.2, 18)},
    "modern": {"bfloat16": (16.3, 16.5), "float16": (17.5, 19.5), "float32": (16, 17), "fp8": (14.3, 16.5)},
}
CHEAP = {"gpt2": 5.8, "modern": 3.9}  # of these, what an activation_memory of 0.8 recomputes
RECOMPUTED = 22  # and what recomputing a block takes


def activation_bytes(config, tokens, dtype, compile, recomputes):
    """Returns the bytes that the blocks keep for the backward pass, without what is CHEAP if it recomputes.

    An activation_memory of 0.8, 0.9 or 0.99 keeps the same. Korthikanti et al. 2022
    (https://arxiv.org/abs/2205.05198, section 4.1) count 34 bytes in 16 bits, without attention's scores,
    which fused attention does not keep.
    """
    size = bytes_of(dtype)
    C, layers = config.n_embd, config.n_layer
    if_compiled, if_not = KEPT[config.arch][dtype]
    kept = if_compiled if compile else if_not
    at_the_ends = 4 if compile else 2  # what embedding and loss keep
    if recomputes:
        kept -= CHEAP[config.arch]
    return size * tokens * C * (kept * layers + at_the_ends)


def loss_bytes(config, tokens, dtype, compile, loss_chunks):
    """Returns the bytes that the logits of a chunk and their gradient take, and the head's gradient, which
    compiled or in chunks comes before all others."""
    V, C = config.vocab_size, config.n_embd
    bytes_per_logit = 20  # with its gradient and intermediate results
    if compile:  # the gradient takes the logits' place
        bytes_per_logit = bytes_of(dtype)
        loss_chunks = loss_chunks or suitable_chunks(tokens, V)
    if loss_chunks:  # the head's gradient exists from the forward pass on
        return bytes_per_logit * V * tokens // loss_chunks + 4 * V * C
    if config.arch == "modern":  # the cap's gradient too
        return 16 * V * tokens
    return (8 + bytes_of(dtype)) * V * tokens  # fp32 log-probabilities and their gradient, and the logits'


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
