"""
GPT in one file, in two architectures: embeddings, blocks of causal attention and MLP, an output head.

arch="gpt2" is GPT-2: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", and its
code (https://github.com/openai/gpt-2). Parameter names, initialisation and exact (erf) GELU are nanoGPT's
(https://github.com/karpathy/nanoGPT), whose checkpoints load here and which loads ours. from_pretrained and
save_pretrained read and write the folders of Hugging Face's transformers.

arch="modern" is the same skeleton with what has since been found to learn more from each token, collected by
modded-nanogpt (https://github.com/KellerJordan/modded-nanogpt) and measured here by benchmarks/recipe.py: rotary
positions (Su et al. 2021, https://arxiv.org/abs/2104.09864), normalised queries and keys (Henry et al. 2020,
https://arxiv.org/abs/2010.04245), squared ReLU (So et al. 2021, https://arxiv.org/abs/2109.08668), RMSNorm without
weights (Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467), a head of its own, the head and all projections
into the stream zero at first, capped logits (Gemma 2, https://arxiv.org/abs/2408.00118, section 2), and shortcuts to
every block: from the embedding, and from the first block's values (Zhou et al. 2024, https://arxiv.org/abs/2410.17897).

Shape letters: B sequences, T positions, C = n_embd, H = n_head, D = C / H, V = vocab_size, L = room in the cache.
"""

import collections
import dataclasses
import math

import torch
import torch.nn as nn
from torch.nn import functional as F

SOFTCAP = 15.0  # arch="modern": the largest logit, as in modded-nanogpt since January 2025
ROTARY_BASE = 10000.0  # arch="modern": the slowest pair of components turns by 1 / ROTARY_BASE radians a position


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
    arch: str = "gpt2"  # or "modern", see above

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
        if self.arch not in ("gpt2", "modern"):
            raise ValueError(f"arch={self.arch!r} must be 'gpt2' or 'modern'")
        if self.arch == "modern" and self.n_embd // self.n_head % 2:
            raise ValueError(f"n_embd={self.n_embd} / n_head={self.n_head} must be even: arch='modern' rotates pairs")


class Linear(nn.Linear):
    """nn.Linear, with a matrix-vector product for a single vector (C,): on a CPU, twice as fast in bf16."""

    def forward(self, x):
        if x.dim() > 1 or x.dtype != self.weight.dtype:  # another dtype: autocast, which knows linear only
            return super().forward(x)
        return torch.mv(self.weight, x) if self.bias is None else torch.addmv(self.bias, self.weight, x)


def make_norm(config):
    """Returns what the blocks and the head read the residual stream through: LayerNorm, or RMSNorm without weights."""
    if config.arch == "gpt2":
        return nn.LayerNorm(config.n_embd, bias=config.bias)
    return nn.RMSNorm(config.n_embd, eps=1e-6, elementwise_affine=False)


def normed_and_rotated(x, rotary):
    """Returns queries or keys x (B, H, T, D) with RMS 1, each pair of components i and i + D / 2 rotated by an angle
    that grows with the position, so that their products depend on the distance. rotary: cosines and sines of these
    angles, each (T, D / 2) or (B, 1, 1, D / 2)."""
    (cos, sin), (a, b) = rotary, F.rms_norm(x, x.shape[-1:], eps=1e-6).chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).to(x.dtype)


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # q, k and v in one matmul
        self.c_proj = Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.modern = config.arch == "modern"
        if self.modern:
            self.v_mix = nn.Parameter(torch.tensor([0.5, 0.5]))  # shares of this block's values and the first one's

    def forward(self, x, rotary, first_v=None, cache=None, position=None, mask=None):
        """Returns (B, T, C) for x (B, T, C), each position attending to itself and those before it, and this block's
        values (B, H, T, D). rotary and first_v, the first block's values (None there), matter to arch="modern" only.

        With a cache, this layer's keys and values, each (B, H, L, D), those of x are kept in it: from the start on, or,
        given position (B,), there. Then x is one token, (B, C) or (C,), which attends to what mask (B, 1, 1, L) shows.
        """
        B = len(x) if cache is None else len(cache[0])
        # views, no copies: the kernels read q, k, v (B, H, T, D) with their strides and write y so that the reshape is
        # free; and backward concatenates their gradients into c_attn's layout at once
        parts = self.c_attn(x).chunk(3, dim=-1)
        q, k, v = (part.view(B, -1, self.n_head, x.size(-1) // self.n_head).transpose(1, 2) for part in parts)
        own_v = v
        if self.modern:
            q, k = normed_and_rotated(q, rotary), normed_and_rotated(k, rotary)
            v = self.v_mix[0] * v + self.v_mix[1] * (v if first_v is None else first_v)
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
        return F.dropout(y, self.dropout, self.training), own_v


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = config.dropout
        self.gelu = config.gelu
        self.modern = config.arch == "modern"

    def forward(self, x):
        x = self.c_fc(x)
        x = F.relu(x).square() if self.modern else F.gelu(x, approximate=self.gelu)
        return F.dropout(self.c_proj(x), self.dropout, self.training)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = make_norm(config)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = make_norm(config)
        self.mlp = MLP(config)
        self.modern = config.arch == "modern"
        if self.modern:
            self.x_mix = nn.Parameter(torch.tensor([1.0, 0.0]))  # shares of the residual stream and the embedding

    def forward(self, x, x0, *attention):
        """Returns the residual stream (B, T, C) after this block, and its values; x0 is the embedding, which only
        arch="modern" reads again."""
        if self.modern:
            x = self.x_mix[0] * x + self.x_mix[1] * x0
        y, v = self.attn(self.ln_1(x), *attention)
        x = x + y
        return x + self.mlp(self.ln_2(x)), v


def capped(logits, softcap):
    """Returns logits, fp32, limited to softcap in size, smoothly; as they are if that is None."""
    return logits if softcap is None else softcap * torch.tanh(logits.float() / softcap)


def loss_of_chunk(x, weight, targets, softcap, with_gradients):
    """Returns the sum over x, (n, C), of the cross-entropies of its logits and targets, int64 (n,), fp32, and the
    gradients of that sum by x, in its dtype, and by weight, fp32, or None."""
    logits = capped(F.linear(x, weight), softcap).float()
    counted, total = targets >= 0, logits.logsumexp(-1, keepdim=True)
    loss = (total - logits.gather(1, targets.clamp(min=0)[:, None])).squeeze(1).masked_fill(~counted, 0).sum()
    if not with_gradients:
        return loss, None, None
    # by the logits. Not yet divided by the number of targets: fp16 would lose what is small; no scatter: this fuses
    d = (logits - total).exp() - (targets[:, None] == torch.arange(len(weight), device=x.device)).float()
    if softcap is not None:
        d = d * (1 - (logits / softcap).square())  # tanh' = 1 - tanh^2
    d = d.masked_fill(~counted[:, None], 0).to(x.dtype)
    return loss, d @ weight, (d.t() @ (x / 128)).float() * 128  # a sum over many tokens: fp16 ends at 65,504


class ChunkedCrossEntropy(torch.autograd.Function):
    """See cross_entropy. The forward pass computes the gradients too, while a chunk's logits are there."""

    @staticmethod
    def forward(ctx, x, weight, targets, chunks, softcap, with_gradients):
        w, loss, dx, dw = weight.to(x.dtype), 0.0, [], 0.0
        for some, t in zip(x.chunk(chunks), targets.chunk(chunks), strict=True):
            part, by_x, by_weight = loss_of_chunk(some, w, t, softcap, with_gradients)
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
        return (dx.float() * scale).to(dx.dtype), dw * scale, None, None, None, None  # a GPU rounds scale to dx's dtype


def cross_entropy(x, weight, targets, chunks, softcap=None):
    """Returns the mean cross-entropy in nats, an fp32 scalar, of the logits x @ weight.T, capped, and targets, int64
    (N,), -1 where one does not count, for x (N, C) in the dtype of the matmuls and weight (V, C) in fp32.

    chunks parts of the tokens, of the sizes that torch.chunk gives, are dealt with one after the other, so that the
    logits of all, and their gradient, never exist at once. Sums over chunks are fp32.
    """
    return ChunkedCrossEntropy.apply(x, weight, targets, chunks, softcap, torch.is_grad_enabled())


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


def orthogonalize(matrices):
    """Returns, for matrices (N, A, B), those with the same singular vectors and all singular values near 1 (0.7 to 1.2
    or so): five steps of a Newton-Schulz iteration whose coefficients prefer speed to an accuracy that makes no
    difference here (Jordan 2024, https://kellerjordan.github.io/posts/muon/). In bf16, where its products are fast."""
    mkldnn = matrices.is_cpu and torch.backends.mkldnn.is_available()
    fast = matrices.is_cuda or (mkldnn and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    x = matrices.bfloat16() if fast else matrices.float()
    x = x.mT if x.size(1) > x.size(2) else x  # the products below have the shorter side
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)  # no singular value above 1: it would diverge there
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.mT if matrices.size(1) > matrices.size(2) else x


class Muon(torch.optim.Muon):
    """torch.optim.Muon with another way of going through its parameters: all matrices of one shape at once, in a few
    launches instead of some 20 for each, and those that one parameter holds on top of each other, q, k and v, apart.

    A group's `fused` says how many that are, 1 or 3. Learning rate and weight decay are AdamW's: the update is scaled
    to be of the same size (Liu et al. 2025, https://arxiv.org/abs/2502.16982, section 2.2).
    """

    @torch.no_grad()
    def step(self):
        """Updates all parameters; each must have a gradient."""
        for group in self.param_groups:
            same_shape = collections.defaultdict(list)
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                mean = state["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(mean, group["momentum"])  # Nesterov's momentum
                n = group["fused"]
                same_shape[len(p) // n, p.size(1)] += zip(p.chunk(n), update.chunk(n), strict=True)
            for shape, pairs in same_shape.items():
                weights, updates = zip(*pairs, strict=True)
                updates = orthogonalize(torch.stack(updates)).to(weights[0].dtype)
                torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(weights, updates.unbind(), alpha=-0.2 * math.sqrt(max(shape)) * group["lr"])


class GPT(nn.Module):
    """A language model. Weights are fp32; run it under torch.autocast for bf16 or fp16 matmuls."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.softcap = None if config.arch == "gpt2" else SOFTCAP
        self.loss_chunks = 1  # see cross_entropy; how to compute, not what, so not a part of config
        self.transformer = nn.ModuleDict(
            dict(
                wte=nn.Embedding(config.vocab_size, config.n_embd),
                wpe=nn.Embedding(config.block_size, config.n_embd),
                h=nn.ModuleList([Block(config) for _ in range(config.n_layer)]),
                ln_f=make_norm(config),
            )
        )
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        if config.arch == "gpt2":
            self.transformer.wte.weight = self.lm_head.weight  # tied: one matrix embeds tokens and scores them
        else:
            del self.transformer.wpe
            D = config.n_embd // config.n_head
            angles = torch.arange(config.block_size)[:, None] * ROTARY_BASE ** (-torch.arange(0, D, 2) / D)
            self.register_buffer("rotary", torch.stack((angles.cos(), angles.sin())), persistent=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """GPT-2's initialisation: N(0, 0.02), biases 0; the 2L projections that write into the residual stream
        get std 0.02 / sqrt(2L), which keeps the stream's variance independent of depth (paper, section 2.3).
        arch="modern": there and in the head zeros, so that the first loss is ln(V) and each block begins as none."""
        modern = self.config.arch == "modern"
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
                if getattr(module, "bias", None) is not None:
                    nn.init.zeros_(module.bias)
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(p, std=0.0 if modern else 0.02 / math.sqrt(2 * self.config.n_layer))
        if modern:
            nn.init.zeros_(self.lm_head.weight)

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
            return self.logits(x[:, -1:]), None
        if self.loss_chunks > 1:
            x = x.view(B * T, -1).to(self.matmul_dtype())
            targets = targets.reshape(B * T)
            return None, cross_entropy(x, self.lm_head.weight, targets, self.loss_chunks, self.softcap)
        logits = self.logits(x)
        loss = F.cross_entropy(logits.view(B * T, -1), targets.reshape(B * T), ignore_index=-1)
        return (None if self.training else logits), loss

    def logits(self, x):
        """Returns the scores of all ids, (..., V), for what the head reads, x (..., C)."""
        return capped(self.lm_head(x), self.softcap)

    def hidden(self, idx, cache=None):
        """Returns what the head reads, (B, T, C), for idx (B, T); a cache gets the keys and values of all positions."""
        T = idx.size(1)
        if T > self.config.block_size:
            raise ValueError(f"{T} tokens are more than block_size={self.config.block_size}")
        x, rotary = self.embed(idx, torch.arange(T, device=idx.device))
        return self.blocks(F.dropout(x, self.config.dropout, self.training), rotary, cache)

    def embed(self, idx, position):
        """Returns the embedding (..., C) of ids at a position, both int64 (...), in the dtype of the residual stream,
        and the cosines and sines of their rotations, each (..., D / 2), or None for arch="gpt2", which has wpe."""
        gpt2, x = self.config.arch == "gpt2", self.transformer.wte(idx)
        if gpt2:
            x = x + self.transformer.wpe(position)
        if self.matmul_dtype() == torch.bfloat16:
            x = x.bfloat16()  # autocast alone would keep the residual stream, and its memory traffic, in fp32
        return x, None if gpt2 else self.rotary[:, position]

    def blocks(self, x, rotary, cache=None, *step):
        """Returns what the head reads for the embedding x; cache has a pair for each block, step is attention's."""
        x0, first_v = x, None
        for i, block in enumerate(self.transformer.h):
            x, v = block(x, x0, rotary, first_v, cache and cache[i], *step)
            first_v = v if i == 0 else first_v
        return self.transformer.ln_f(x)

    def matmul_dtype(self):
        """Returns the dtype of matmuls here: autocast's where it is on, else that of the weights."""
        weight = self.lm_head.weight
        kind = weight.device.type
        autocast = kind != "meta" and torch.is_autocast_enabled(kind)
        return torch.get_autocast_dtype(kind) if autocast else weight.dtype

    def get_num_params(self, non_embedding=True):
        """The number of parameters, without embeddings that are only looked up unless non_embedding is False: those of
        positions or, for arch="modern", of tokens. GPT-2's token embedding counts: it does its matmul as the head.
        """
        n = sum(p.numel() for p in self.parameters())
        looked_up = self.transformer.wpe if self.config.arch == "gpt2" else self.transformer.wte
        return n - looked_up.weight.numel() if non_embedding else n

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

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type, leave_out=()):
        """Returns fused AdamW in two groups: matrices decay by weight_decay, biases and LayerNorm weights do not."""
        params = [p for p in self.parameters() if p not in set(leave_out)]
        groups = [
            dict(params=[p for p in params if p.dim() >= 2], weight_decay=weight_decay),
            dict(params=[p for p in params if p.dim() < 2], weight_decay=0.0),
        ]
        fused = device_type in ("cuda", "cpu", "mps")  # one kernel for all tensors instead of several for each
        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=fused)

    def configure_muon(self, weight_decay, learning_rate, betas, device_type):
        """Returns (AdamW, as above, of the embeddings, the head and all vectors, Muon of the blocks' matrices)."""
        matrices = {name: p for name, p in self.transformer.h.named_parameters() if p.dim() == 2}
        groups = [
            dict(params=[p for name, p in matrices.items() if name.endswith("c_attn.weight")], fused=3),
            dict(params=[p for name, p in matrices.items() if not name.endswith("c_attn.weight")], fused=1),
        ]
        adamw = self.configure_optimizers(weight_decay, learning_rate, betas, device_type, matrices.values())
        return adamw, Muon(groups, lr=learning_rate, weight_decay=weight_decay)

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
        x, rotary = self.embed(token, position)  # (B, C)
        x = x.squeeze(0)  # one sequence: a vector, see Linear
        rotary = None if rotary is None else rotary[:, :, None, None]  # for (B, H, 1, D / 2)
        mask = torch.arange(cache[0][0].size(2), device=x.device) <= position.view(-1, 1, 1, 1)  # (B, 1, 1, L)
        logits = self.logits(self.blocks(x, rotary, cache, position, mask)).view(len(token), -1)
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
                logits = self.logits(x[rows, lengths - start - 1])  # (B, V): what follows each row's last token
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
        eot_token: the id that starts and ends a text. Raises ValueError if it is no GPT-2, but arch="modern"."""
        import huggingface

        if self.config.arch != "gpt2":
            raise ValueError(f"arch={self.config.arch!r} cannot be exported: Hugging Face's GPT-2 is arch='gpt2'")
        huggingface.write_folder(folder, dataclasses.asdict(self.config), self.state_dict(), eot_token)
