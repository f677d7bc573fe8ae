"""
What would the recipe gain from parts that others found worth their lines, and lose without its own?

    python benchmarks/candidates.py --dataset=fineweb --size=3m --jobs=2

Twenty-four candidates, in 64 runs (or those of --only: up to 4, 8 or 16 in 8, 16 or 32): every candidate is
on in half of the runs and off in half, with every other one as often on as off. The difference of both means
is its effect, measured with all runs; effects of two candidates on each other do not mix into it (a
folded-over Hadamard design of resolution IV: Box, Hunter and Hunter, Statistics for Experimenters, chapter
6). There are several seeds, with four runs of each in which every candidate is as often on as off. Below zero
is better.

What stays in the recipe is then measured by compare_modded.py. Models, sizes, data and results are as there.
"""

import collections
import math
import os
import random
import sys
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
from torch.nn import functional as F

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import compare_modded
from compare_modded import Results, train_as

from configurator import Config, from_command_line, key, run_script
from model import GATE_WIDTH, GPTConfig, ModernAttention, ModernGPT, rms_norm, rotate
from sologpt import loss, optim
from sologpt.errors import UserError
from sologpt.files import unwritable
from train import micro_step, set_learning_rate, update

CANDIDATES = dict(
    scale="scores times 0.12 instead of 1 / sqrt(D)",
    normed_embedding="embedding N(0, 1), normalised, with 25 times the learning rate",
    no_fast_rate="mixing weights and the table of values at the learning rate of the rest",
    usual_adamw="AdamW's beta1 0.9 and eps 1e-8 instead of 0.8 and 1e-10",
    short_cooldown="cooldown over the last 0.4",
    no_warmup="no warmup",
    no_value_embeddings="without the table of values",
    uneven_rows="Muon's updates as they are orthogonalized",
    cautious="Muon's weight decay only where it goes the way of the update",
    polar_express="orthogonalization with other coefficients in each step",
    gate="a gate on each head's output, from 12 components of its input",
    no_smear="without the share of the token before in each embedding",
    faster_head="twice the learning rate for the head",
    half_rotary="half of the pairs not rotated, the others at base 1,024",
    slower_muon="0.6 times the learning rate for Muon",
    no_value_shortcut="without the shortcut from the first block's values",
    half_batch="two updates from each batch, from half of its sequences each",
    falling_decay="weight decay falls as the learning rate does",
    averaged="evaluated with a mean of the weights, of about the last 20 iterations",
    long_skip="the stream after the first third of the blocks also goes into the last third",
    final_rate="cooldown to 0.05 of the learning rate instead of 0",
    ramp="in the first third of the run two updates from each batch, from half of its sequences each",
    no_head_decay="no weight decay of the head",
    pairs="a vector of each pair of neighbours, from a hash table of 5 V rows, in the embedding",
)


@dataclass
class CandidatesConfig(Config):
    dataset: str = key("fineweb", "folder of token files with GPT-2's ids: one under data/, or a path")
    size: str = key("3m", "size of the models", choices=tuple(compare_modded.SIZES))
    vocab: int = key(8192, "keep the most frequent ids, all others become one; 0: all", low=0)
    only: str = key("", "names of candidates with commas between them; empty: all")
    iters: int = key(400, "iterations of a run", low=10)
    eval_windows: int = key(1024, "windows of the validation split to evaluate on", low=1)
    evaluations: int = key(1, "how often a run is evaluated, before its end", low=1)
    jobs: int = key(1, "runs at the same time, of one thread each if there are several", low=1)
    device: str = key("", "cuda, cuda:N or cpu; empty: the best available")
    dtype: str = key("bfloat16", "dtype of matmuls", choices=("bfloat16", "float32"))
    compile: bool = key(False, "compile the loss, which all runs share, and on a GPU each run's blocks")
    json: str = key("out-candidates.json", "file of the results")

    @property
    def names(self):
        return self.only.split(",") if self.only else list(CANDIDATES)

    def problems(self):
        unknown = sorted(set(self.names) - set(CANDIDATES))
        if unknown:
            return [f"only has {', '.join(unknown)}; there are {', '.join(CANDIDATES)}"]
        return unwritable("json", self.json)


@dataclass(frozen=True)
class Run:
    parts: str  # names of CANDIDATES with spaces between them
    seed: int
    iters: int
    model: str = "ours"
    rate: float = 1.0


# -----------------------------------------------------------------------------
# the design


def signs(count):
    """Returns +1 and -1, int (runs, count), a run's candidates in each row: twice as many runs as candidates,
    these rounded up to a power of two."""
    rows = np.array([[1]])
    while len(rows) < count:
        rows = np.block([[rows, rows], [rows, -rows]])
    return np.concatenate([rows, -rows])[:, :count]


def all_runs(names, iters):
    """Returns the runs of the design. Four have the same seed, among them two opposites of two others. Of one
    or two candidates, whose design would have few runs, every combination has several seeds."""
    if len(names) < 3:
        some = sorted({"", *names, " ".join(names)})
        return [Run(parts, seed, iters) for seed in range(8 // len(some)) for parts in some]
    design = signs(len(names))
    runs = []
    for number, row in enumerate(design):
        parts = [name for name, sign in zip(names, row, strict=True) if sign > 0]
        runs.append(Run(" ".join(parts), number % max(1, len(design) // 4), iters))
    random.Random(0).shuffle(runs)  # a part of them, if they are stopped, is not one-sided
    return runs


def effects(names, entries):
    """Returns {candidate: (effect, standard error)} by least squares, from results of most of the runs. What
    the runs of a seed have in common is no effect, and no error either."""
    on = np.array([[1 if name in entry["parts"].split() else -1 for name in names] for entry in entries])
    losses = np.array([entry["loss"] for entry in entries])
    seeds = np.array([entry["seed"] for entry in entries])
    design = np.column_stack([on / 2, seeds[:, None] == np.unique(seeds)])
    found, _, rank, _ = np.linalg.lstsq(design, losses, rcond=None)
    freedom = len(losses) - rank
    if rank < design.shape[1] or not freedom:
        raise UserError(f"{len(losses)} finite runs are too few to tell {len(names)} effects apart")
    variance = ((losses - design @ found) ** 2).sum() / freedom
    errors = np.sqrt(variance * np.diag(np.linalg.inv(design.T @ design)))
    return {name: (found[i], errors[i]) for i, name in enumerate(names)}


# -----------------------------------------------------------------------------
# the candidates


class Attention(ModernAttention):
    def __init__(self, config, has_ve, parts):
        super().__init__(config, has_ve and "no_value_embeddings" not in parts)
        self.parts = parts
        self.gate = nn.Linear(GATE_WIDTH, config.n_head, bias=False)
        nn.init.zeros_(self.gate.weight)

    def forward(self, x, first_v, ve, cos, sin, past=None):
        q, k, v = self.qkv(x)
        q = rotate(rms_norm(q), cos, sin)
        k = rotate(rms_norm(k), cos, sin)
        mixed = v
        if first_v is None:
            first_v = v
        if "no_value_shortcut" not in self.parts:
            mixed = self.v_mix[0] * v + self.v_mix[1] * first_v
        if self.has_ve:
            mixed = mixed + ve
        scale = 0.12 if "scale" in self.parts else None
        q, k, mixed = q.transpose(1, 2), k.transpose(1, 2), mixed.transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, mixed, is_causal=True, scale=scale).transpose(1, 2)
        if "gate" in self.parts:
            y = y * (2 * self.gate(x[..., :GATE_WIDTH]).sigmoid()).unsqueeze(-1)
        return self.c_proj(y.flatten(2)), first_v


class Candidate(ModernGPT):
    """The modern architecture with those of CANDIDATES that are in parts."""

    def __init__(self, config, parts):
        object.__setattr__(self, "parts", parts)  # make_layers needs it, before nn.Module is set up
        super().__init__(config)
        self.compiled_loss = None

    def make_layers(self, config):
        super().make_layers(config)
        for block in self.transformer.h:
            block.attn = Attention(config, block.attn.has_ve, self.parts)
        if "half_rotary" in self.parts:
            quarter = config.n_embd // config.n_head // 4
            speeds = torch.cat([1024 ** -torch.linspace(0, 1, quarter), torch.zeros(quarter)])
            angles = torch.arange(config.block_size)[:, None] * speeds
            cos, sin = angles.cos(), angles.sin()
            self.rotary = torch.stack((torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)))
        self.skip = nn.Parameter(torch.zeros(1))
        self.pairs = nn.Embedding(5 * config.vocab_size if "pairs" in self.parts else 1, config.n_embd)
        if "long_skip" in self.parts:
            third = config.n_layer // 3
            self.transformer.h[third].register_forward_pre_hook(self.keep_stream)
            self.transformer.h[config.n_layer - 1 - third].register_forward_pre_hook(self.add_stream)

    def keep_stream(self, block, args):
        self.kept = args[0]

    def add_stream(self, block, args):
        return args[0] + self.skip * self.kept, *args[1:]

    @torch.no_grad()
    def init_weights(self):
        super().init_weights()
        for block in self.transformer.h:
            nn.init.zeros_(block.attn.gate.weight)
        nn.init.zeros_(self.pairs.weight)
        if "normed_embedding" in self.parts:
            nn.init.normal_(self.transformer.wte.weight)

    def forward(self, idx, targets):
        if self.compiled_loss is None:
            return super().forward(idx, targets)
        x = self.hidden(idx, torch.arange(idx.size(1), device=idx.device)[None])
        chunks = loss.suitable_chunks(targets.numel(), self.config.vocab_size)
        x, targets = x.flatten(0, 1), targets.flatten()
        return None, self.compiled_loss(x, self.lm_head, targets, chunks, self.softcap)

    def embed(self, idx, position, past):
        x = self.transformer.wte(idx)
        if "no_smear" not in self.parts:
            x = super().embed(idx, position, past)
        if "pairs" in self.parts:
            pairs = idx.roll(1, dims=1) * 1_000_003 + idx  # that of the first token is any
            x = x + self.pairs(pairs % self.pairs.num_embeddings)
        return rms_norm(x) if "normed_embedding" in self.parts else x


# five odd polynomials, each the best one after those before (Amsel et al. 2025, https://arxiv.org/abs/2505.16932)
POLAR = (
    (8.28721, -23.59589, 17.30039),
    (4.10706, -2.94785, 0.54484),
    (3.94869, -2.90890, 0.55182),
    (3.31842, -2.48849, 0.51005),
    (2.30065, -1.66890, 0.41881),
)


def orthogonalized(matrices, parts):
    """Returns matrices (N, A, B), orthogonalized as Muon does it, or as the candidate does."""
    if "polar_express" not in parts:
        return optim.orthogonalize(matrices)
    x = matrices.bfloat16() if matrices.is_cuda else matrices.float()
    tall = x.size(1) > x.size(2)
    if tall:
        x = x.mT
    x = x / (1.02 * x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for a, b, c in POLAR:
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if tall else x


class Muon(optim.Muon):
    """Muon with those of CANDIDATES that are in parts."""

    parts = frozenset()

    @torch.no_grad()
    def step(self):
        same_shape = collections.defaultdict(list)
        for group in self.param_groups:
            settings = (group["lr"], group["weight_decay"])
            for matrix in zip(*self.momentum_updates(group), strict=True):
                same_shape[matrix[0].shape, settings].append(matrix)
        for (shape, (lr, weight_decay)), matrices in same_shape.items():
            weights, updates, squares = (torch.stack(members) for members in zip(*matrices, strict=True))
            updates = orthogonalized(updates, self.parts).to(weights.dtype)
            if "uneven_rows" not in self.parts:
                updates = optim.evened(updates, squares)
            decay = lr * weight_decay
            if "cautious" in self.parts:
                decay = decay * (updates * weights >= 0)
            rate = 0.2 * math.sqrt(max(shape)) * lr
            if "slower_muon" in self.parts:
                rate = 0.6 * rate
            weights = weights * (1 - decay) - rate * updates
            for (weight, _, square), new, new_square in zip(matrices, weights, squares, strict=True):
                weight.copy_(new)
                square.copy_(new_square)


class Ours(compare_modded.Ours):
    """The recipe with some candidates, through the functions of train.py."""

    def __init__(self, cfg, keys, vocab_size, run, machine):
        self.parts = frozenset(run.parts.split())
        sizes = {name: getattr(keys, name) for name in ("block_size", "n_layer", "n_head", "n_embd", "bias")}
        self.model = Candidate(GPTConfig(**sizes, vocab_size=vocab_size, arch="modern"), self.parts)
        self.model.to(machine.device)
        if cfg.compile:
            self.model.compiled_loss = torch.compile(loss.chunked_cross_entropy, dynamic=False)
        if cfg.compile and machine.device.type == "cuda":  # on a CPU it takes longer than it saves
            for block in self.model.transformer.h:
                block.compile(dynamic=False)
        if "short_cooldown" in self.parts:
            keys.cooldown_frac = 0.4
        if "no_warmup" in self.parts:
            keys.warmup_iters = 0
        if "final_rate" in self.parts:
            keys.min_lr = 0.05 * keys.learning_rate
        self.optimizers = self.make_optimizers(keys, machine)
        self.scaler = torch.amp.GradScaler(machine.device.type, enabled=False)
        self.keys = keys
        self.machine = machine
        self.means = [p.detach().clone() for p in self.model.parameters()]

    def make_optimizers(self, keys, machine):
        """Returns the recipe's optimizers, with learning rates by kind of parameter."""
        optimizers = optim.make_optimizers(self.model, keys, machine.device)
        muon = optimizers["muon"]
        muon.__class__ = Muon
        muon.parts = self.parts
        gates = [p for name, p in self.model.transformer.h.named_parameters() if name.endswith("gate.weight")]
        for group in muon.param_groups:  # make_optimizers takes gates for matrices of the blocks
            group["params"] = [p for p in group["params"] if not any(p is gate for gate in gates)]
        adamw = optimizers["optimizer"]
        adamw.add_param_group(dict(params=gates, weight_decay=0.0))
        for group in adamw.param_groups:
            if "usual_adamw" in self.parts:
                group |= dict(betas=(0.9, keys.beta2), eps=1e-8)
            if "no_fast_rate" in self.parts and group.get("rate") == optim.FAST_RATE:
                group["rate"] = 1.0
        if "normed_embedding" in self.parts:
            own_group(adamw, self.model.transformer.wte.weight)["rate"] = 25.0
        own_group(adamw, self.model.skip)["rate"] = optim.FAST_RATE
        own_group(adamw, self.model.pairs.weight)["rate"] = optim.FAST_RATE
        head = own_group(adamw, self.model.lm_head.weight)
        if "faster_head" in self.parts:
            head["rate"] *= 2
        if "no_head_decay" in self.parts:
            head["weight_decay"] = 0.0
        return optimizers

    def iteration(self, it, batches, accumulation):
        lr = set_learning_rate(self.optimizers, it, self.keys)
        if "falling_decay" in self.parts:
            self.scale_decay(lr / self.keys.learning_rate)
        tokens = [next(batches) for _ in range(accumulation)]
        ramps = "ramp" in self.parts and it < self.keys.max_iters / 3
        if ramps or "half_batch" in self.parts:
            halves = [half for batch in tokens for half in batch.chunk(2)]
            self.learn(halves[:accumulation])
            self.learn(halves[accumulation:])
        else:
            self.learn(tokens)
        if "averaged" in self.parts:
            torch._foreach_lerp_(self.means, [p.detach() for p in self.model.parameters()], 0.05)

    def scale_decay(self, share):
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["weight_decay"] = group.setdefault("full_decay", group["weight_decay"]) * share

    def learn(self, micro_batches):
        """Makes one update from micro-batches."""
        for tokens in micro_batches:
            micro_step(self.model, tokens, self.scaler, self.machine, len(micro_batches))
        for p in self.model.parameters():
            if p.grad is None:  # of a gate that is off
                p.grad = torch.zeros_like(p)
        update(self.model, self.optimizers, self.scaler, self.keys.grad_clip)

    def evaluate(self, windows, count, batch_size):
        if "averaged" not in self.parts:
            return super().evaluate(windows, count, batch_size)
        self.swap_means()
        found = super().evaluate(windows, count, batch_size)
        self.swap_means()
        return found

    @torch.no_grad()
    def swap_means(self):
        for p, mean in zip(self.model.parameters(), self.means, strict=True):
            own = p.clone()
            p.copy_(mean)
            mean.copy_(own)


def own_group(adamw, matrix):
    """Moves a matrix to a group of its own, with the settings that it had. Returns that group."""
    for group in adamw.param_groups:
        others = [p for p in group["params"] if p is not matrix]
        if len(others) < len(group["params"]):
            group["params"] = others
            own = group | dict(params=[matrix])
    adamw.add_param_group(own)
    return adamw.param_groups[-1]


def train(cfg, run):
    return train_as(Ours, cfg, run)


def main(argv):
    cfg = from_command_line(CandidatesConfig, __doc__, argv)
    results = Results(cfg, train)
    runs = all_runs(cfg.names, cfg.iters)
    results.make(runs)
    entries = [results.of(run) for run in runs]
    finite = [entry for entry in entries if math.isfinite(entry["loss"])]
    if len(finite) < len(entries):
        print(f"{len(entries) - len(finite)} runs diverged and are left out")
    print("| candidate | effect on the validation loss | |\n|---|---|---|")
    found = effects(cfg.names, finite)
    for name in sorted(found, key=lambda name: found[name][0]):
        print(f"| {name} | {found[name][0]:+.4f} ± {found[name][1]:.4f} | {CANDIDATES[name]} |")


if __name__ == "__main__":
    run_script(main)
