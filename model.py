"""
GPT-2 in full, and below it what the modern architecture does differently.

GPT is GPT-2 (Radford et al. 2019, https://github.com/openai/gpt-2) with nanoGPT's parameter names and
initialisation (https://github.com/karpathy/nanoGPT), so that checkpoints of either load in the other.
ModernGPT learns more from each token; its docstring names the sources.

Shapes: B sequences, T positions, C = n_embd, H = n_head, D = C / H, V = vocab_size, L = cache positions.
"""

import dataclasses
import math

import torch
import torch.nn as nn
from torch.nn import functional as F

from sologpt import huggingface, optim, sampling, sizes
from sologpt.errors import UserError
from sologpt.layers import Linear, squared_relu
from sologpt.loss import capped, chunked_cross_entropy


@dataclasses.dataclass(frozen=True)
class GPTConfig:
    block_size: int = 1024  # longest context, in tokens
    vocab_size: int = 50304  # rows of the embedding: GPT-2's 50,257 ids, padded to a multiple of 64 for speed
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # biases in Linear and LayerNorm, as in OpenAI's GPT-2; False is a little faster
    n_ids: int = 0  # ids in use; further rows are padding. 0: 50,257 if vocab_size is 50,304, else all
    gelu: str = "none"  # approximation in F.gelu: "none" is exact; OpenAI's weights need "tanh"
    arch: str = "gpt2"  # or "modern"

    def __post_init__(self):
        if not self.n_ids:
            n_ids = 50257 if self.vocab_size == 50304 else self.vocab_size
            object.__setattr__(self, "n_ids", n_ids)
        sizes.check(self)


# -----------------------------------------------------------------------------
# GPT-2


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # q, k, v side by side
        self.c_proj = Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.n_head = config.n_head
        self.dropout = config.dropout

    def qkv(self, x):
        """Returns queries, keys and values, (B, T, H, D) views of one tensor."""
        B, T, C = x.shape
        # unbind's backward pass concatenates the three gradients in one copy
        return self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head).unbind(2)

    def attend(self, q, k, v, past):
        """Returns (B, T, C), causal attention. past: a sampling.Past; None in training."""
        # transposes cost nothing: the kernels read any strides, and write y as (B, T, H, D)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        mask = None
        if past is not None:
            k, v = past.extend(k, v)  # stores them; returns all that q attends to
            mask = past.mask
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=mask is None)
        y = y.transpose(1, 2).flatten(2)
        return F.dropout(self.c_proj(y), self.dropout, self.training)

    def forward(self, x, past=None):
        q, k, v = self.qkv(x)
        return self.attend(q, k, v, past)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = config.dropout
        self.gelu = config.gelu

    def forward(self, x):
        x = F.gelu(self.c_fc(x), approximate=self.gelu)
        return F.dropout(self.c_proj(x), self.dropout, self.training)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, past=None):
        x = x + self.attn(self.ln_1(x), past)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """GPT-2. Weights are fp32; run it under torch.autocast for bf16 or fp16 matmuls."""

    softcap = None  # bound on the logits; None: unbounded

    def __init__(self, config):
        super().__init__()
        if type(self) is GPT and config.arch == "modern":
            raise UserError("arch='modern' needs ModernGPT: use make_gpt(config)")
        self.config = config
        self.loss_chunks = 0  # as in train.py; changes how, not what, is computed
        self.make_layers(config)
        self.init_weights()

    def make_layers(self, config):
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

    @torch.no_grad()
    def init_weights(self):
        """GPT-2's initialisation: N(0, 0.02), biases 0. The 2 * n_layer projections into the residual stream
        get std 0.02 / sqrt(2 * n_layer), so its variance does not grow with depth (paper, section 2.3)."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
                if getattr(module, "bias", None) is not None:
                    nn.init.zeros_(module.bias)
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * self.config.n_layer))

    def forward(self, idx, targets=None):
        """Returns (logits, loss) for idx, int64 (B, T).

        Without targets: logits (B, 1, V) of the last position, and None. With targets, int64 (B, T), -1 where
        ignored: logits (B, T, V), None with loss_chunks or if compiled, and the mean cross-entropy in nats.
        Raises UserError if T > block_size.
        """
        B, T = idx.shape
        if T > self.config.block_size:
            raise UserError(f"{T} tokens are more than block_size={self.config.block_size}")
        x = self.hidden(idx, torch.arange(T, device=idx.device)[None])
        if targets is None:
            return self.logits(x[:, -1:]), None
        targets = targets.reshape(B * T)
        if self.loss_chunks or torch.compiler.is_compiling():
            x = x.view(B * T, -1).to(self.matmul_dtype())
            return None, chunked_cross_entropy(x, self.lm_head, targets, self.loss_chunks, self.softcap)
        # faster if not compiled; what changes logits or loss belongs in chunk_loss too
        logits = self.logits(x)
        loss = F.cross_entropy(logits.view(B * T, -1), targets, ignore_index=-1)
        return logits, loss

    def hidden(self, idx, position, pasts=None):
        """Returns lm_head's input (B, T, C). idx: (B, T); position: (B, T) or (1, T); pasts: a
        sampling.Past for each block."""
        pasts = pasts or [None] * self.config.n_layer
        x = self.transformer.wte(idx) + self.transformer.wpe(position)
        if self.matmul_dtype() == torch.bfloat16:
            x = x.bfloat16()  # autocast alone would keep the residual stream, and its memory traffic, in fp32
        x = F.dropout(x, self.config.dropout, self.training)
        for block, past in zip(self.transformer.h, pasts, strict=True):
            x = block(x, past)
        return self.transformer.ln_f(x)

    def logits(self, x):
        """Returns logits (..., V) for x (..., C). Compiled training computes them in chunk_loss."""
        return capped(self.lm_head(x), self.softcap)

    def matmul_dtype(self):
        """Returns the dtype of matmuls: autocast's if it is on, else that of the weights."""
        weight = self.transformer.wte.weight
        device_type = weight.device.type
        if device_type != "meta" and torch.is_autocast_enabled(device_type):
            return torch.get_autocast_dtype(device_type)
        return weight.dtype

    # -------------------------------------------------------------------------
    # parameters, FLOPs and the optimizer

    def looked_up(self):
        """Returns the embeddings that are only looked up, never multiplied."""
        return [self.transformer.wpe]

    def get_num_params(self, non_embedding=True):
        """Returns the number of parameters; non_embedding leaves out those that are only looked up."""
        n = sum(p.numel() for p in self.parameters())
        if non_embedding:
            n -= sum(embedding.weight.numel() for embedding in self.looked_up())
        return n

    def flops_per_token(self):
        """Returns the FLOPs of one token, forward and backward: 6N + 12 * n_layer * n_embd * block_size.

        PaLM, appendix B (https://arxiv.org/abs/2204.02311). Attention counts in full although causal kernels
        compute half of it, and recomputation does not count: nanoGPT's convention, for comparable figures.
        """
        c = self.config
        return 6 * self.get_num_params() + 12 * c.n_layer * c.n_embd * c.block_size

    def estimate_mfu(self, fwdbwd_per_iter, dt, peak_flops=312e12):
        """Returns the model FLOPs utilization: the fraction of peak_flops (FLOP/s; the default is an A100's)
        reached by fwdbwd_per_iter sequences of block_size tokens, forward and backward, in dt seconds."""
        return self.flops_per_token() * self.config.block_size * fwdbwd_per_iter / dt / peak_flops

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        """Returns AdamW for all parameters; vectors do not decay. optimizer="muon" is in sologpt/optim.py."""
        return optim.adamw(self.named_parameters(), weight_decay, learning_rate, betas, device_type)

    # -------------------------------------------------------------------------
    # sampling; the loop is in sologpt/sampling.py

    def empty_cache(self, B, L):
        """Returns an empty cache of L positions: for each block keys and values, both (B, H, L, D)."""
        c = self.config
        shape = (B, c.n_head, L, c.n_embd // c.n_head)
        options = dict(dtype=self.matmul_dtype(), device=self.lm_head.weight.device)
        return [(torch.zeros(shape, **options), torch.zeros(shape, **options)) for _ in range(c.n_layer)]

    def prompt_logits(self, idx, last, cache=None):
        """Returns the logits (B, V) after positions last, int64 (B,), one in each row of idx (B, T), and
        fills the cache."""
        pasts = [sampling.Past(keys, values) for keys, values in cache] if cache else None
        x = self.hidden(idx, torch.arange(idx.size(1), device=idx.device)[None], pasts)
        return self.logits(x[torch.arange(len(x), device=x.device), last])

    def next_logits(self, token, position, cache):
        """Adds token at position, both int64 (B,), to the cache. Returns the logits (B, V) after it."""
        L = cache[0][0].size(2)
        mask = torch.arange(L, device=token.device) <= position.view(-1, 1, 1, 1)
        pasts = [sampling.Past(keys, values, position, mask) for keys, values in cache]
        x = self.hidden(token[:, None], position[:, None], pasts)
        return self.logits(x)[:, 0]

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, **options):
        """Returns idx, int64 (B, T), continued by max_new_tokens sampled ids; see sampling.generate."""
        return sampling.generate(self, idx, max_new_tokens, temperature, top_k, top_p, **options)

    # -------------------------------------------------------------------------
    # Hugging Face's format

    @classmethod
    def from_pretrained(cls, name, override_args=None):
        """Returns the GPT-2 in a folder that transformers or save_pretrained wrote, or OpenAI's of that name.

        Names are those in huggingface.PRETRAINED; they are downloaded once. override_args may set dropout
        (0.0) and a smaller block_size. Raises UserError, naming what this model cannot represent, and
        OSError for files that are not there.
        """
        fields, weights = huggingface.read_folder(name, **(override_args or {}))
        with torch.device("meta"):  # takes no memory and draws no random values
            model = cls(GPTConfig(**fields))
        huggingface.load_weights(model, weights, name)
        model.transformer.wte.weight = model.lm_head.weight  # tied again
        return model

    def save_pretrained(self, folder, eot_token=None):
        """Writes config.json, generation_config.json and model.safetensors (fp32) for transformers' GPT-2.

        Rows that pad the vocabulary are left out; biases that this model lacks are written as zeros.
        eot_token: the id that starts and ends a text.
        """
        huggingface.write_folder(folder, dataclasses.asdict(self.config), self.state_dict(), eot_token)


# -----------------------------------------------------------------------------
# the modern architecture

GATE_WIDTH = 12  # components of the embedding that smear_gate reads, as in modded-nanogpt


def rms_norm(x):
    # autocast would make the result fp32, from torch 2.12 on
    with torch.autocast(x.device.type, enabled=False):
        return F.rms_norm(x, x.shape[-1:], eps=1e-6)


def rotate(x, cos, sin):
    """Returns x (B, T, H, D), each pair of components i and i + D / 2 rotated by an angle proportional to the
    position, so that products of queries and keys depend on their distance only. cos and sin of the angles:
    (B or 1, T, 1, D), the first half of sin negated."""
    halves_swapped = x.unflatten(-1, (2, -1)).flip(-2).flatten(-2)  # torch.compile fuses this, unlike cat
    return (x * cos + halves_swapped * sin).to(x.dtype)


class ModernAttention(CausalSelfAttention):
    def __init__(self, config, has_ve):
        super().__init__(config)
        # shares of this block's values and the first block's
        self.v_mix = nn.Parameter(torch.tensor([0.5, 0.5]))
        self.has_ve = has_ve

    def forward(self, x, first_v, ve, cos, sin, past=None):
        """Returns (B, T, C) and first_v, the values of the first block (given as None there). first_v and ve,
        the tokens' value embeddings, are (B, T, H, D)."""
        q, k, v = self.qkv(x)
        q = rotate(rms_norm(q), cos, sin)
        k = rotate(rms_norm(k), cos, sin)
        if first_v is None:
            first_v = v
        mixed = self.v_mix[0] * v + self.v_mix[1] * first_v
        if self.has_ve:
            mixed = mixed + ve
        return self.attend(q, k, mixed, past), first_v


class ModernMLP(MLP):
    def forward(self, x):
        x = squared_relu(self.c_fc(x))
        return F.dropout(self.c_proj(x), self.dropout, self.training)


class ModernBlock(nn.Module):
    def __init__(self, config, has_ve):
        super().__init__()
        self.attn = ModernAttention(config, has_ve)
        self.mlp = ModernMLP(config)
        self.x_mix = nn.Parameter(torch.tensor([1.0, 0.0]))  # shares of the residual stream and the embedding

    def forward(self, x, x0, first_v, ve, cos, sin, past=None):
        """Returns the residual stream (B, T, C) after this block, and first_v; x0 is the embedding."""
        x = self.x_mix[0] * x + self.x_mix[1] * x0
        y, first_v = self.attn(rms_norm(x), first_v, ve, cos, sin, past)
        x = x + y
        return x + self.mlp(rms_norm(x)), first_v


class ModernGPT(GPT):
    """GPT-2 with the improvements since then that modded-nanogpt collected
    (https://github.com/KellerJordan/modded-nanogpt), measured here by benchmarks/recipe.py:

    - rotary positions (Su et al. 2021, https://arxiv.org/abs/2104.09864)
    - normalised queries and keys (Henry et al. 2020, https://arxiv.org/abs/2010.04245)
    - squared ReLU (So et al. 2021, https://arxiv.org/abs/2109.08668)
    - RMSNorm without weights (Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467)
    - capped logits (Gemma 2, https://arxiv.org/abs/2408.00118, section 2)
    - shortcuts from the embedding and from the first block's values (Zhou et al. 2024,
      https://arxiv.org/abs/2410.17897)
    - value embeddings (modded-nanogpt, record of 4 December 2024): every other block, the last included,
      adds a vector for each token to its values, from one table for all
    - smeared embeddings (modded-nanogpt, record of 18 September 2025): a gated share of the previous one
    - an untied output head; the head and all projections into the residual stream start at zero
    """

    softcap = 15.0  # as in modded-nanogpt since January 2025
    rotary_base = 10000.0  # the slowest pair turns by about 1 / rotary_base radians per position

    def make_layers(self, config):
        # every other block, counted from the last
        have_ve = [(config.n_layer - 1 - i) % 2 == 0 for i in range(config.n_layer)]
        self.transformer = nn.ModuleDict()
        self.transformer.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.transformer.wve = nn.Embedding(config.vocab_size, config.n_embd)
        self.transformer.h = nn.ModuleList([ModernBlock(config, has_ve) for has_ve in have_ve])
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        self.smear = nn.Parameter(torch.zeros(1))
        self.smear_gate = nn.Parameter(torch.zeros(min(GATE_WIDTH, config.n_embd)))
        D = config.n_embd // config.n_head
        frequencies = self.rotary_base ** (-torch.arange(0, D, 2) / D)
        angles = torch.arange(config.block_size)[:, None] * frequencies
        cos, sin = angles.cos(), angles.sin()
        rotary = torch.stack((torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)))  # (2, T, D)
        self.register_buffer("rotary", rotary, persistent=False)

    @torch.no_grad()
    def init_weights(self):
        """GPT-2's, but head and c_proj are zero: the first loss is ln(V), each block the identity."""
        super().init_weights()
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight") or name == "lm_head.weight":
                nn.init.zeros_(p)

    def hidden(self, idx, position, pasts=None):
        """As GPT's; the last of pasts is the embedding's."""
        pasts = pasts or [None] * (self.config.n_layer + 1)
        x = self.embed(idx, position, pasts[-1])
        if self.matmul_dtype() == torch.bfloat16:
            x = x.bfloat16()
        x = x0 = F.dropout(x, self.config.dropout, self.training)
        first_v = None
        ve = self.transformer.wve(idx).to(self.matmul_dtype()).unflatten(-1, (self.config.n_head, -1))
        cos, sin = self.rotary[:, position].unsqueeze(3)
        for block, past in zip(self.transformer.h, pasts[:-1], strict=True):
            x, first_v = block(x, x0, first_v, ve, cos, sin, past)
        return rms_norm(x)

    def embed(self, idx, position, past):
        """Returns each token's embedding plus a gated share of the one before."""
        x = self.transformer.wte(idx)
        gate = (x[..., : len(self.smear_gate)] @ self.smear_gate).sigmoid()
        share = (self.smear * gate).unsqueeze(-1)
        if past is not None:
            return x + share * (position > 0).unsqueeze(-1) * past.before(x)
        # cat, since torch.compile stores its result; it would recompute a sum in every block
        return torch.cat((x[:, :1], x[:, 1:] + share[:, 1:] * x[:, :-1]), dim=1)

    def looked_up(self):
        return [self.transformer.wte, self.transformer.wve]

    def empty_cache(self, B, L):
        """As GPT's, and then embeddings, which Past.before reads."""
        cache = super().empty_cache(B, L)
        embeddings = cache[0][0].new_zeros(B, 1, L, self.config.n_embd)
        return [*cache, (embeddings, embeddings)]  # Past.before uses keys only

    def save_pretrained(self, folder, eot_token=None):
        """Writes what GPT writes, and the code with which transformers loads it: trust_remote_code=True."""
        huggingface.write_modern_folder(folder, self, eot_token)


def make_gpt(config):
    """Returns a new model of config.arch."""
    if config.arch == "modern":
        return ModernGPT(config)
    return GPT(config)
