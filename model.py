"""
GPT-2 in one file: embeddings, pre-LayerNorm blocks of causal attention and MLP, a tied output head.

Sources: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", and its code
(https://github.com/openai/gpt-2). Parameter names, initialisation and exact (erf) GELU are nanoGPT's
(https://github.com/karpathy/nanoGPT), whose checkpoints load here and which loads ours.

Shape letters: B sequences, T positions, C = n_embd, H = n_head, D = C / H, V = vocab_size.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch.nn import functional as F


@dataclass(frozen=True)
class GPTConfig:
    block_size: int = 1024  # longest context, in tokens
    vocab_size: int = 50304  # rows of the embedding: GPT-2's 50,257 ids, padded to a multiple of 64 for speed
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # biases in Linear and LayerNorm as OpenAI's GPT-2 has; without them: a little faster
    n_ids: int = 0  # ids that the tokenizer has; the rest of vocab_size is padding. 0: 50,257 of 50,304, else all

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


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # q, k and v in one matmul
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.n_head = config.n_head
        self.dropout = config.dropout

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head).unbind(2)  # each (B, T, H, D)
        # views, no copies: the kernels read q, k, v with their strides and write y so that the reshape is free
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=True,
        )  # (B, H, T, D)
        y = self.c_proj(y.transpose(1, 2).reshape(B, T, C))
        return F.dropout(y, self.dropout, self.training)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = config.dropout

    def forward(self, x):
        return F.dropout(self.c_proj(F.gelu(self.c_fc(x))), self.dropout, self.training)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """A GPT-2 language model. Weights are fp32; run it under torch.autocast for bf16 or fp16 matmuls."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(
            dict(
                wte=nn.Embedding(config.vocab_size, config.n_embd),
                wpe=nn.Embedding(config.block_size, config.n_embd),
                h=nn.ModuleList([Block(config) for _ in range(config.n_layer)]),
                ln_f=nn.LayerNorm(config.n_embd, bias=config.bias),
            )
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
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
        None in training. The loss is in here so that a compiled model fuses the fp32 upcast of the logits into
        it: at (16, 1024, 50304) they would take 3.3 GB of their own. Raises ValueError if T is above block_size.
        """
        B, T = idx.shape
        if T > self.config.block_size:
            raise ValueError(f"{T} tokens are more than block_size={self.config.block_size}")
        x = self.transformer.wte(idx) + self.transformer.wpe(torch.arange(T, device=idx.device))  # (B, T, C)
        kind = x.device.type
        if kind != "meta" and torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.bfloat16:
            x = x.bfloat16()  # the residual stream: autocast alone would keep it, and its memory traffic, in fp32
        x = F.dropout(x, self.config.dropout, self.training)
        for block in self.transformer.h:
            x = block(x)
        x = self.transformer.ln_f(x)
        if targets is None:
            return self.lm_head(x[:, -1:]), None
        logits = self.lm_head(x)
        loss = F.cross_entropy(logits.view(B * T, -1), targets.reshape(B * T), ignore_index=-1)
        return (None if self.training else logits), loss

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

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, stop_token=None):
        """Returns idx, int64 (B, T), continued by up to max_new_tokens sampled ids; call it in eval mode.

        temperature 0 takes the likeliest id. top_k (None or 0: all) samples among the k likeliest only. With
        stop_token it ends once every sequence has produced that id. Ids that only pad the vocabulary have no
        probability. A context longer than block_size is cut to its last block_size tokens.
        """
        done = torch.zeros(len(idx), dtype=torch.bool, device=idx.device)
        for _ in range(max_new_tokens):
            logits, _ = self(idx[:, -self.config.block_size :])
            logits = logits[:, -1, : self.config.n_ids].float()
            if temperature == 0:
                new = logits.argmax(-1, keepdim=True)
            else:
                if top_k:
                    kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
                    logits = logits.masked_fill(logits < kth, -math.inf)
                new = torch.multinomial(F.softmax(logits / temperature, dim=-1), 1)
            idx = torch.cat((idx, new), dim=1)
            if stop_token is not None:
                done |= new[:, 0] == stop_token
                if done.all():
                    break
        return idx
