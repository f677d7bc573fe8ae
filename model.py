"""
GPT-2 in one file: embeddings, pre-LayerNorm blocks of causal attention and MLP, a tied output head.

Sources: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", and its code
(https://github.com/openai/gpt-2). Parameter names, initialisation and exact (erf) GELU are nanoGPT's
(https://github.com/karpathy/nanoGPT), whose checkpoints load here and which loads ours. from_pretrained and
save_pretrained read and write the folders of Hugging Face's transformers.

Shape letters: B sequences, T positions, C = n_embd, H = n_head, D = C / H, V = vocab_size, L = room in the cache.
"""

import dataclasses
import math

import torch
import torch.nn as nn
from torch.nn import functional as F


@dataclasses.dataclass(frozen=True)
class GPTConfig:
    block_size: int = 1024  # longest context, in tokens
    vocab_size: int = 50304  # rows of the embedding: GPT-2's 50,257 ids, padded to a multiple of 64 for speed
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # biases in Linear and LayerNorm as OpenAI's GPT-2 has; without them: a little faster
    n_ids: int = 0  # ids that the tokenizer has; the rest of vocab_size is padding. 0: 50,257 of 50,304, else all
    gelu: str = "none"  # its approximation, as F.gelu names it: "none" is exact, OpenAI's weights want "tanh"

    def __post_init__(self):
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must be at least 0 and below 1")
        if not self.n_ids:
            object.__setattr__(self, "n_ids", 50257 if self.vocab_size == 50304 else self.vocab_size)
        if self.n_ids > self.vocab_size:
            raise ValueError(f"n_ids={self.n_ids} is more than vocab_size={self.vocab_size} holds")
        if self.gelu not in ("none", "tanh"):
            raise ValueError(f"gelu={self.gelu!r} must be 'none' (exact) or 'tanh'")


class Linear(nn.Linear):
    """nn.Linear, with a matrix-vector product for a single vector (C,): on a CPU, twice as fast in bf16."""

    def forward(self, x):
        if x.dim() > 1 or x.dtype != self.weight.dtype:  # another dtype: autocast, which knows linear only
            return super().forward(x)
        return torch.mv(self.weight, x) if self.bias is None else torch.addmv(self.bias, self.weight, x)


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # q, k and v in one matmul
        self.c_proj = Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.n_head = config.n_head
        self.dropout = config.dropout

    def forward(self, x, cache=None, position=None, mask=None):
        """Returns (B, T, C) for x (B, T, C), each position attending to itself and those before it.

        With a cache, this layer's keys and values, each (B, H, L, D), those of x are kept in it: from the start on, or,
        given position (B,), there. Then x is one token, (B, C) or (C,), which attends to what mask (B, 1, 1, L) shows.
        """
        B = len(x) if cache is None else len(cache[0])
        qkv = self.c_attn(x).view(B, -1, 3, self.n_head, x.size(-1) // self.n_head)
        # views, no copies: the kernels read q, k, v with their strides and write y so that the reshape is free
        q, k, v = qkv.transpose(1, 3).unbind(2)  # each (B, H, T, D)
        for kept, new in zip(cache or (), (k, v), strict=False):
            if position is None:
                kept[:, :, : new.size(2)] = new
            else:
                kept[torch.arange(B, device=x.device), :, position] = new[:, :, 0]
        if position is not None:
            k, v = cache
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=mask is None)  # (B, H, T, D)
        y = self.c_proj(y.transpose(1, 2).reshape(x.shape))
        return F.dropout(y, self.dropout, self.training)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = config.dropout
        self.gelu = config.gelu

    def forward(self, x):
        return F.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate=self.gelu)), self.dropout, self.training)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, *cached):
        x = x + self.attn(self.ln_1(x), *cached)
        return x + self.mlp(self.ln_2(x))


def loss_of_chunk(x, weight, targets, with_gradients):
    """Returns the sum over x, (n, C), of the cross-entropies of its logits and targets, int64 (n,), fp32, and the
    gradients of that sum by x, in its dtype, and by weight, fp32, or None. What is done to the logits would come after
    the first line, and its derivative as a factor of their gradient."""
    logits = F.linear(x, weight).float()
    counted, total = targets >= 0, logits.logsumexp(-1, keepdim=True)
    loss = (total - logits.gather(1, targets.clamp(min=0)[:, None])).squeeze(1).masked_fill(~counted, 0).sum()
    if not with_gradients:
        return loss, None, None
    # by the logits. Not yet divided by the number of targets: fp16 would lose what is small; no scatter: this fuses
    d = (logits - total).exp() - (targets[:, None] == torch.arange(len(weight), device=x.device)).float()
    d = d.masked_fill(~counted[:, None], 0).to(x.dtype)
    return loss, d @ weight, (d.t() @ (x / 128)).float() * 128  # a sum over many tokens: fp16 ends at 65,504


class ChunkedCrossEntropy(torch.autograd.Function):
    """See cross_entropy. The forward pass computes the gradients too, while a chunk's logits are there."""

    @staticmethod
    def forward(ctx, x, weight, targets, chunks, with_gradients):
        w, loss, dx, dw = weight.to(x.dtype), 0.0, [], 0.0
        for some, t in zip(x.chunk(chunks), targets.chunk(chunks), strict=True):
            part, by_x, by_weight = loss_of_chunk(some, w, t, with_gradients)
            loss += part
            if with_gradients:
                dx.append(by_x)
                dw += by_weight
        count = (targets >= 0).sum()
        if with_gradients:
            ctx.save_for_backward(torch.cat(dx), dw, count)
        return loss / count

    @staticmethod
    def backward(ctx, grad):
        dx, dw, count = ctx.saved_tensors
        scale = grad / count
        return (dx.float() * scale).to(dx.dtype), dw * scale, None, None, None  # a GPU rounds scale to dx's dtype


def cross_entropy(x, weight, targets, chunks):
    """Returns the mean cross-entropy in nats, an fp32 scalar, of the logits x @ weight.T and targets, int64 (N,), -1
    where one does not count, for x (N, C) in the dtype of the matmuls and weight (V, C) in fp32.

    chunks parts of the tokens, of the sizes that torch.chunk gives, are dealt with one after the other, so that the
    logits of all, and their gradient, never exist at once. Sums over chunks are fp32.
    """
    return ChunkedCrossEntropy.apply(x, weight, targets, chunks, torch.is_grad_enabled())


def pick(logits, noise, temperature, top_k=None, top_p=None):
    """Returns the next ids, int64 (B,), for logits (B, V) and noise, uniform on [0, 1), fp32 (B,).

    An id is where the cumulative distribution reaches 1 - noise, so it is a function of these arguments alone: the
    same noise gives the same text whatever the device or the batch, up to rounding in the logits.
    """
    if temperature == 0:
        return logits.argmax(-1)
    ids, V, nucleus = None, logits.size(-1), top_p is not None and top_p < 1
    if top_k or nucleus:
        logits, ids = logits.topk(min(top_k or V, V))  # the likeliest first
    logits = logits.float() - logits.amax(-1, keepdim=True)  # no overflow, however small the temperature is
    p = F.softmax(logits / temperature, dim=-1)
    if nucleus:
        p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0)  # the fewest whose sum reaches top_p
    mass = p.cumsum(-1)
    chosen = torch.searchsorted(mass, (1 - noise[:, None]) * mass[:, -1:])  # in (0, mass]: never an id without mass
    return (chosen if ids is None else ids.gather(-1, chosen)).squeeze(-1)


class GPT(nn.Module):
    """A GPT-2 language model. Weights are fp32; run it under torch.autocast for bf16 or fp16 matmuls."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.loss_chunks = 1  # see cross_entropy; how to compute, not what, so not a part of config
        self.transformer = nn.ModuleDict(
            dict(
                wte=nn.Embedding(config.vocab_size, config.n_embd),
                wpe=nn.Embedding(config.block_size, config.n_embd),
                h=nn.ModuleList([Block(config) for _ in range(config.n_layer)]),
                ln_f=nn.LayerNorm(config.n_embd, bias=config.bias),
            )
        )
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight  # tied: one matrix embeds tokens and scores them
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """GPT-2's initialisation: N(0, 0.02), biases 0; the 2L projections that write into the residual stream
        get std 0.02 / sqrt(2L), which keeps the stream's variance independent of depth (paper, section 2.3)."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
                if getattr(module, "bias", None) is not None:
                    nn.init.zeros_(module.bias)
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * self.config.n_layer))

    def forward(self, idx, targets=None):
        """Returns (logits, loss) for idx, int64 (B, T) with T <= block_size.

        Without targets: logits (B, 1, V) of the last position, and None. With targets, int64 (B, T), -1 where a
        position does not count: the mean cross-entropy in nats, a scalar; logits are (B, T, V) in eval mode and
        None in training, and in either with loss_chunks above 1. The loss is in here so that a compiled model fuses
        the fp32 upcast of the logits into it: at (16, 1024, 50304) they would take 3.3 GB of their own. Raises
        ValueError if T is above block_size.
        """
        B, T = idx.shape
        x = self.hidden(idx)
        if targets is None:
            return self.lm_head(x[:, -1:]), None
        if self.loss_chunks > 1:
            x = x.view(B * T, -1).to(self.matmul_dtype())
            return None, cross_entropy(x, self.lm_head.weight, targets.reshape(B * T), self.loss_chunks)
        logits = self.lm_head(x)
        loss = F.cross_entropy(logits.view(B * T, -1), targets.reshape(B * T), ignore_index=-1)
        return (None if self.training else logits), loss

    def hidden(self, idx, cache=None):
        """Returns what the head reads, (B, T, C), for idx (B, T); a cache gets the keys and values of all positions."""
        T = idx.size(1)
        if T > self.config.block_size:
            raise ValueError(f"{T} tokens are more than block_size={self.config.block_size}")
        x = self.transformer.wte(idx) + self.transformer.wpe(torch.arange(T, device=idx.device))  # (B, T, C)
        if self.matmul_dtype() == torch.bfloat16:
            x = x.bfloat16()  # the residual stream: autocast alone would keep it, and its memory traffic, in fp32
        x = F.dropout(x, self.config.dropout, self.training)
        for i, block in enumerate(self.transformer.h):
            x = block(x, cache and cache[i])
        return self.transformer.ln_f(x)

    def matmul_dtype(self):
        """Returns the dtype of matmuls here: autocast's where it is on, else that of the weights."""
        weight = self.lm_head.weight
        kind = weight.device.type
        autocast = kind != "meta" and torch.is_autocast_enabled(kind)
        return torch.get_autocast_dtype(kind) if autocast else weight.dtype

    def get_num_params(self, non_embedding=True):
        """The number of parameters, without the position embeddings unless non_embedding is False.

        The token embedding counts: it is the output head too, and does its matmul there.
        """
        n = sum(p.numel() for p in self.parameters())
        return n - self.transformer.wpe.weight.numel() if non_embedding else n

    def flops_per_token(self):
        """FLOPs of forward and backward for one token: 6N + 12 * n_layer * n_embd * T at T = block_size.

        PaLM, appendix B (https://arxiv.org/abs/2204.02311). Attention counts in full although causal kernels
        do half of it, and recomputation does not count: nanoGPT's convention, so that figures compare.
        """
        c = self.config
        return 6 * self.get_num_params() + 12 * c.n_layer * c.n_embd * c.block_size

    def estimate_mfu(self, fwdbwd_per_iter, dt, peak_flops):
        """Model FLOPs utilization, a fraction: what fwdbwd_per_iter sequences of block_size tokens, forward and
        backward in dt seconds, are of peak_flops FLOP/s."""
        return self.flops_per_token() * self.config.block_size * fwdbwd_per_iter / dt / peak_flops

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        """Returns fused AdamW in two groups: matrices decay by weight_decay, biases and LayerNorm weights do not."""
        params = list(self.parameters())
        groups = [
            dict(params=[p for p in params if p.dim() >= 2], weight_decay=weight_decay),
            dict(params=[p for p in params if p.dim() < 2], weight_decay=0.0),
        ]
        fused = device_type in ("cuda", "cpu", "mps")  # one kernel for all tensors instead of several for each
        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=fused)

    # -------------------------------------------------------------------------
    # sampling

    def empty_cache(self, B, L):
        """Returns room for the keys and values of L positions: for each layer a pair of (B, H, L, D)."""
        c = self.config
        shape = (B, c.n_head, L, c.n_embd // c.n_head)
        like = dict(dtype=self.matmul_dtype(), device=self.lm_head.weight.device)
        return [(torch.zeros(shape, **like), torch.zeros(shape, **like)) for _ in range(c.n_layer)]

    def step(self, token, position, cache, noise, *options):
        """Returns the ids, int64 (B,), that follow token (B,) at position (B,), both int64, given its past in cache;
        noise and options are pick's. All shapes are the same at every step, so that it compiles to one CUDA graph."""
        x = self.transformer.wte(token) + self.transformer.wpe(position)  # (B, C)
        if self.matmul_dtype() == torch.bfloat16:
            x = x.bfloat16()
        x = x.squeeze(0)  # one sequence: a vector, see Linear
        mask = torch.arange(cache[0][0].size(2), device=x.device) <= position.view(-1, 1, 1, 1)  # (B, 1, 1, L)
        for block, layer in zip(self.transformer.h, cache, strict=True):
            x = block(x, layer, position, mask)
        logits = self.lm_head(self.transformer.ln_f(x)).view(len(token), -1)
        return pick(logits[:, : self.config.n_ids], noise, *options)

    @torch.no_grad()
    def stream(
        self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, stop_token=None, noise=None, lengths=None
    ):
        """Yields the text so far, int64 (B, T + n), after the n-th new token of each row; arguments are generate's.

        It is one tensor, which fills up. The first step reads the prompt and fills the cache, later ones read a token
        each. Past block_size every step reads the last block_size tokens anew, as nanoGPT does at every step: when
        the window slides, each token's position changes, and with it all keys and values.
        """
        (B, T), block_size, n_ids, device = idx.shape, self.config.block_size, self.config.n_ids, idx.device
        if not idx.numel():
            raise ValueError("the prompt is empty; sampling needs a token to start from")
        if idx.min() < 0 or idx.max() >= n_ids:
            raise ValueError(f"the prompt has token ids {idx.min()} to {idx.max()}, the model 0 to {n_ids - 1}")
        noise = torch.rand(B, max_new_tokens, device=device) if noise is None else noise.to(device)
        lengths = torch.full((B,), T, device=device) if lengths is None else lengths.to(device)
        cache = self.empty_cache(B, min(T + max_new_tokens, block_size))
        rows, done = torch.arange(B, device=device), torch.zeros(B, dtype=torch.bool, device=device)
        text = F.pad(idx, (0, max_new_tokens))
        for end, u in enumerate(noise[:, :max_new_tokens].t().contiguous(), T):  # end of the longest row
            if end == T or end > block_size:
                start = (lengths - block_size).clamp(min=0)  # of each row's window
                window = text.gather(1, start[:, None] + torch.arange(min(end, block_size), device=device))
                x = self.hidden(window, cache if end <= block_size else None)
                logits = self.lm_head(x[rows, lengths - start - 1])  # (B, V): what follows each row's last token
                if not logits.isfinite().all():
                    raise ValueError(
                        f"the model's logits are not finite: weights of NaN, or too large for {logits.dtype}"
                    )
                token = pick(logits[:, :n_ids], u, temperature, top_k, top_p)
            else:
                last = lengths - 1
                token = self.step(text[rows, last], last, cache, u, temperature, top_k, top_p)
            text[rows, lengths] = token
            lengths = lengths + 1
            yield text[:, : end + 1]
            if stop_token is not None:
                done |= text[rows, lengths - 1] == stop_token
                if done.all():
                    break

    def generate(self, idx, max_new_tokens, *args, **options):
        """Returns idx, int64 (B, T), continued by up to max_new_tokens sampled ids; call it in eval mode.

        temperature (1.0): 0 takes the likeliest id. top_k (None or 0: all) samples among the k likeliest only, top_p
        (None or 1: all) among the fewest that have this share of the probability. stop_token: ends once every row has
        produced that id. noise, fp32 (B, max_new_tokens), uniform on [0, 1): what the ids are drawn with, a row a
        sequence (None: torch's random numbers). lengths, int64 (B,): row b's prompt is its first lengths[b] ids, its
        new ids overwrite what follows them. Ids that only pad the vocabulary have no probability. A context longer
        than block_size is cut to its last block_size tokens. Raises ValueError for a prompt that is empty or holds ids
        that the tokenizer has not.
        """
        for text in self.stream(idx, max_new_tokens, *args, **options):
            idx = text
        return idx

    # -------------------------------------------------------------------------
    # in and out of Hugging Face's format

    @classmethod
    def from_pretrained(cls, name, override_args=None):
        """Returns the GPT-2 in a folder that transformers or save_pretrained wrote, or OpenAI's of a name in
        huggingface.PRETRAINED, downloaded once. override_args may set dropout (0.0) and a smaller block_size.

        Raises ValueError for what this model cannot represent, by name, and OSError for files that are not there.
        """
        import huggingface  # only here, as training and sampling do without its packages

        fields, weights = huggingface.read_folder(name, **(override_args or {}))
        with torch.device("meta"):  # takes no memory and draws no random values
            model = cls(GPTConfig(**fields))
        try:
            model.load_state_dict(weights, assign=True)
        except RuntimeError as e:
            first = " ".join(str(e).splitlines()[1:2]).strip()
            raise ValueError(f"the weights of {name} are not those of a GPT-2 language model: {first}") from None
        model.transformer.wte.weight = model.lm_head.weight  # tied again
        return model

    def save_pretrained(self, folder, eot_token=None):
        """Writes config.json, generation_config.json and model.safetensors (fp32), from which transformers loads this
        model as its GPT-2, to folder. Rows that pad the vocabulary are left out, biases that it lacks are zeros there.
        eot_token: the id that starts and ends a text."""
        import huggingface

        huggingface.write_folder(folder, dataclasses.asdict(self.config), self.state_dict(), eot_token)
