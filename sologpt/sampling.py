"""
From a model's logits to text: which token comes next, what the model keeps of the past, and the loop over
tokens.
"""

from typing import NamedTuple

import torch
from torch.nn import functional as F

from sologpt.errors import UserError


def pick(logits, noise, temperature, top_k=None, top_p=None):
    """Returns the next ids, int64 (B,), for logits (B, V) and noise, fp32 (B,), uniform on [0, 1).

    An id is where the cumulative distribution reaches 1 - noise, so it is a function of these arguments
    alone: the same noise gives the same text on any device and in any batch, up to rounding of the logits.
    """
    if temperature < 1e-6:  # 0, or as good as 0: divided by it, logits become infinite
        return logits.argmax(-1)
    V = logits.size(-1)
    nucleus = top_p is not None and top_p < 1
    ids = None
    if top_k or nucleus:
        logits, ids = logits.topk(min(top_k or V, V))  # the likeliest first
    logits = logits.float() - logits.amax(-1, keepdim=True)  # no overflow at any temperature
    p = F.softmax(logits / temperature, dim=-1)
    if nucleus:
        p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0)  # keeps the fewest ids whose sum reaches top_p
    mass = p.cumsum(-1)
    # looks for a value in (0, mass], so never takes an id without mass
    chosen = torch.searchsorted(mass, (1 - noise[:, None]) * mass[:, -1:])
    chosen = chosen.clamp(max=p.size(-1) - 1)  # beyond all ids if p is NaN, which stream refuses later
    if ids is not None:
        chosen = ids.gather(-1, chosen)
    return chosen.squeeze(-1)


class Past(NamedTuple):
    """The keys and values of one layer, or the embeddings: those of the tokens so far, and room for the next
    ones."""

    keys: torch.Tensor  # (B, H, L, D)
    values: torch.Tensor  # (B, H, L, D)
    position: torch.Tensor = None  # (B,): where one new token goes; None: a prompt, stored from 0 on
    mask: torch.Tensor = None  # (B, 1, 1, L): the positions that the new token sees

    def extend(self, k, v):
        """Stores new keys and values, (B, H, T, D). Returns all those that the new tokens attend to."""
        if self.position is None:
            self.keys[:, :, : k.size(2)] = k
            self.values[:, :, : v.size(2)] = v
            return k, v
        rows = torch.arange(len(k), device=k.device)
        self.keys[rows, :, self.position] = k[:, :, 0].to(self.keys.dtype)  # under autocast they may differ
        self.values[rows, :, self.position] = v[:, :, 0].to(self.values.dtype)
        return self.keys, self.values

    def before(self, x):
        """Stores embeddings (B, T, C), as keys of one head. Returns those of the token before each; what
        precedes the first is arbitrary."""
        if self.position is None:
            self.keys[:, 0, : x.size(1)] = x
            return x.roll(1, dims=1)
        rows = torch.arange(len(x), device=x.device)
        self.keys[rows, 0, self.position] = x[:, 0].to(self.keys.dtype)
        return self.keys[rows, :, self.position - 1]


def step(model, token, position, cache, noise, temperature, top_k, top_p):
    """Returns the ids, int64 (B,), that follow token (B,) at position (B,), given the cache of the past; and
    whether the logits are finite, bool ().

    All shapes are the same at every step, so that it compiles to one CUDA graph.
    """
    logits = model.next_logits(token, position, cache)
    return pick(logits[:, : model.config.n_ids], noise, temperature, top_k, top_p), logits.isfinite().all()


def check_arguments(idx, n_ids, max_new_tokens, temperature, top_k, noise, lengths):
    """Raises UserError for what stream would stumble over, or take for something else. Waits for the GPU."""
    B, T = idx.shape
    if idx.dtype not in (torch.int32, torch.int64):
        raise UserError(f"the prompt's ids are {idx.dtype}; they must be torch.int64 or torch.int32")
    if max_new_tokens < 0:
        raise UserError(f"max_new_tokens={max_new_tokens} must be at least 0")
    if top_k is not None and top_k < 0:
        raise UserError(f"top_k={top_k} must be at least 0, or None")
    if not temperature >= 0:
        raise UserError(f"temperature={temperature} must be at least 0")
    if noise is not None and (noise.dim() != 2 or len(noise) != B or noise.size(1) < max_new_tokens):
        raise UserError(f"noise has the shape {tuple(noise.shape)}; it must be {(B, max_new_tokens)}")
    if lengths is not None and lengths.shape != (B,):
        raise UserError(f"lengths has the shape {tuple(lengths.shape)}, not ({B},)")
    if lengths is not None and lengths.max() > T:
        raise UserError(f"lengths has {lengths.max()}, but the prompts have only {T} ids")
    if not idx.numel():
        raise UserError("the prompt is empty; sampling needs a token to start from")
    if lengths is not None and lengths.min() < 1:
        raise UserError("a prompt is empty; sampling needs a token to start from")
    if idx.min() < 0 or idx.max() >= n_ids:
        raise UserError(f"the prompt has token ids {idx.min()} to {idx.max()}, the model 0 to {n_ids - 1}")


def read_window(model, text, end, lengths, cache):
    """Returns the logits (B, V) after each row's last token, all finite, from a pass over its last block_size
    tokens.

    text is int64 (B, at least end), lengths (B,) at most end. Fills the cache while the text fits into it.
    """
    block_size = model.config.block_size
    start = (lengths - block_size).clamp(min=0)
    window = text.gather(1, start[:, None] + torch.arange(min(end, block_size), device=text.device))
    if end > block_size:
        cache = None
    logits = model.prompt_logits(window, lengths - start - 1, cache)
    check_finite(logits.isfinite().all(), logits.dtype)
    return logits


def check_finite(finite, dtype):
    if not finite:
        raise UserError(f"the model's logits are not finite: weights of NaN, or too large for {dtype}")


@torch.no_grad()
def stream(model, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, stop_token=None, noise=None,
           lengths=None, cache=None, step=step):  # fmt: skip
    """Yields the text so far, int64 (B, T + n), after the n-th new token of each row: views of one tensor.

    The first step reads the prompt and fills the cache; later steps read one token each. Past block_size
    every step reads the last block_size tokens again, as nanoGPT does at every step: when the window slides,
    each token's position changes, and with it all keys and values. Arguments are those of generate; to
    compile the step, pass sampling.step compiled, and a cache from model.empty_cache, so that its
    tensors are the same in every call.
    """
    B, T = idx.shape
    block_size, n_ids = model.config.block_size, model.config.n_ids
    device = idx.device
    check_arguments(idx, n_ids, max_new_tokens, temperature, top_k, noise, lengths)
    if noise is None:
        noise = torch.rand(B, max_new_tokens, device=device)
    if lengths is None:
        lengths = torch.full((B,), T)
    if cache is None:
        cache = model.empty_cache(B, min(T + max_new_tokens, block_size))
    noise = noise[:, :max_new_tokens].to(device).t().contiguous()  # a row for each step
    lengths = lengths.to(device)
    rows = torch.arange(B, device=device)
    done = torch.zeros(B, dtype=torch.bool, device=device)
    finite = torch.ones((), dtype=torch.bool, device=device)
    ids = F.pad(idx.long(), (0, max_new_tokens))
    for end, step_noise in enumerate(noise, T):  # end: of the longest prompt and what was drawn
        if end == T or end > block_size:
            logits = read_window(model, ids, end, lengths, cache)
            token = pick(logits[:, :n_ids], step_noise, temperature, top_k, top_p)
        else:
            last = lengths - 1
            token = ids[rows, last]
            token, step_finite = step(model, token, last, cache, step_noise, temperature, top_k, top_p)
            finite &= step_finite
        ids[rows, lengths] = token
        lengths = lengths + 1
        yield ids[:, : end + 1]
        if stop_token is not None:
            done |= token == stop_token
            if done.all():  # waits for the GPU, at every token
                break
    check_finite(finite, model.matmul_dtype())  # once, as it waits for the GPU


def generate(model, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, **options):
    """Returns idx, int64 (B, T), continued by up to max_new_tokens sampled ids; call it in eval mode.

    temperature: 0 takes the likeliest id. top_k: sample among the k likeliest ids; None or 0: among all.
    top_p: sample among the fewest ids that have this share of the probability; None or 1: among all. Options:

    - stop_token: end once every row has produced this id
    - noise, fp32 (B, max_new_tokens), uniform on [0, 1): to draw the ids with; None: torch's random numbers
    - lengths, int64 (B,): row b's prompt is its first lengths[b] ids; new ids overwrite what follows them

    Ids that only pad the vocabulary are never drawn. A context longer than block_size is cut to its last
    block_size tokens. Raises UserError for a prompt that is empty or has ids that the tokenizer lacks.
    """
    for text in stream(model, idx, max_new_tokens, temperature, top_k, top_p, **options):
        idx = text
    return idx
