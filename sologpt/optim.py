"""
What updates the weights: AdamW, and Muon for the matrices of the blocks.
"""

import collections
import math

import torch

from sologpt.hardware import has_bf16

# Parameters whose names end so learn faster under AdamW: a mixing weight (x_mix, v_mix, smear) has further to
# go than an entry of a matrix, and a row of the table wve learns only where its token occurs.
FAST = ("x_mix", "v_mix", "smear", "wve.weight")
FAST_RATE = 4.0  # times learning_rate; in modded-nanogpt it is about that between vectors and the head


def rate(name, p):
    """Returns the factor on the learning rate of a parameter that AdamW trains, hence also on its weight
    decay, which AdamW multiplies by the rate.

    That of an untied head falls with the width, as in Yang et al. 2022 (https://arxiv.org/abs/2203.03466,
    table 3); learning_rate is meant for GPT-2's width, 768.
    """
    if name == "lm_head.weight":
        return 768 / p.size(1)
    if name.endswith(FAST):
        return FAST_RATE
    return 1.0


def adamw(named_params, weight_decay, learning_rate, betas, device_type, eps=1e-8):
    """Returns fused AdamW. For each rate it has a group of matrices, which decay, and one of biases and
    norms, which do not; GPT-2 has one rate. eps: AdamW's."""
    members = collections.defaultdict(list)
    for name, p in named_params:
        members[rate(name, p), p.dim() >= 2].append(p)
    groups = []
    for (factor, is_matrix), params in members.items():
        decay = weight_decay if is_matrix else 0.0
        groups.append(dict(params=params, weight_decay=decay, rate=factor, lr=factor * learning_rate))
    fused = device_type in ("cuda", "cpu", "mps")  # one kernel for all tensors instead of several for each
    return torch.optim.AdamW(groups, betas=betas, eps=eps, fused=fused)


def make_optimizers(model, cfg, device):
    """Returns the optimizers of a run by their names in a checkpoint, a dict.

    cfg.optimizer="adamw": {"optimizer": AdamW of all parameters}. "muon": Muon, under "muon", takes the
    matrices of the blocks, AdamW the embeddings, the head and all vectors.
    """
    settings = (cfg.weight_decay, cfg.learning_rate, (cfg.beta1, cfg.beta2), device.type)
    if cfg.optimizer == "adamw":
        return dict(optimizer=model.configure_optimizers(*settings))
    assert cfg.optimizer == "muon"
    matrices = {name: p for name, p in model.transformer.h.named_parameters() if p.dim() == 2}
    of_muon = set(matrices.values())
    groups = [
        dict(params=[p for name, p in matrices.items() if name.endswith("c_attn.weight")], parts=3),
        dict(params=[p for name, p in matrices.items() if not name.endswith("c_attn.weight")], parts=1),
    ]
    rest = [(name, p) for name, p in model.named_parameters() if p not in of_muon]
    muon = Muon(groups, lr=cfg.learning_rate, weight_decay=cfg.weight_decay)
    # gradients of a token that is rare are small, and 1e-8 would make its steps small, too
    return dict(optimizer=adamw(rest, *settings, eps=1e-10), muon=muon)


def allocate_moments(optimizers):
    """Gives AdamW and Muon their moments now instead of in their first step.

    So memory runs out in a forward or backward pass, which can be repeated, rather than in an update.
    """
    for optimizer in optimizers.values():
        for group in optimizer.param_groups:
            for p in group["params"]:
                optimizer.state[p] = new_moments(optimizer, group, p)


def new_moments(optimizer, group, p):
    if isinstance(optimizer, Muon):
        return optimizer.new_moments(p)
    if not isinstance(optimizer, torch.optim.AdamW):
        raise NotImplementedError(f"say here what {type(optimizer).__name__} keeps for a parameter")
    device = p.device if group["fused"] else "cpu"
    step = torch.zeros((), device=device)
    return dict(step=step, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))


def muon_momentum(it):
    """Returns Muon's momentum of iteration it: 0.85 rising to 0.95 in 300 iterations, as the first gradients
    are soon out of date (modded-nanogpt, record of 6 November 2024)."""
    return 0.85 + 0.1 * min(1, it / 300)


def orthogonalize(matrices):
    """Returns matrices (N, A, B) with the singular vectors of the given ones and all singular values near 1
    (about 0.7 to 1.2), in bf16 where bf16 matmuls are fast.

    Five steps of a Newton-Schulz iteration whose coefficients favour speed over an accuracy that makes no
    difference here (Jordan 2024, https://kellerjordan.github.io/posts/muon/).
    """
    x = matrices.float()
    if has_bf16(matrices.device):
        x = matrices.bfloat16()
    tall = x.size(1) > x.size(2)
    if tall:
        x = x.mT  # the products below then have the shorter side
    # above a singular value of 1 the iteration would diverge
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, polynomial, x, beta=3.4445)
    return x.mT if tall else x


def evened(updates, squares):
    """Returns orthogonalized updates (N, A, B) with each row divided by its running root mean square, so that
    all neurons learn at the same rate; of wide matrices each column. Each update keeps its norm.

    squares, (N, A, 1) or (N, 1, B), are the running means of squares; they and updates are overwritten (Li et
    al. 2025, https://arxiv.org/abs/2510.05491: NorMuon).
    """
    along = 2 if squares.size(2) == 1 else 1
    norms = updates.norm(dim=along, keepdim=True)  # of rows or columns; the other norms follow from these
    squares.lerp_(norms.square() / updates.size(along), 0.05)
    scale = (squares + 1e-10).rsqrt()
    norm = norms.norm(dim=(1, 2), keepdim=True)
    scale *= norm / ((norms * scale).norm(dim=(1, 2), keepdim=True) + 1e-10)  # c_fc's first update is zero
    return updates.mul_(scale)


class Muon(torch.optim.Muon):
    """torch.optim.Muon with few launches: all matrices of a shape at once, instead of about 20 launches each;
    and with evened rows.

    A parameter may hold several matrices of one size on top of each other, as c_attn holds q, k and v: a
    group's `parts`, 1 or 3, says how many; each is orthogonalized by itself.

    Updates are scaled to the size of AdamW's, so that learning rate and weight decay are AdamW's too (Liu et
    al. 2025, https://arxiv.org/abs/2502.16982, section 2.2).
    """

    def new_moments(self, p):
        """Returns the state of a parameter (A, B) before its first update: its momentum, and the squares that
        evened takes."""
        A, B = p.shape
        squares = (A, 1) if A >= B else (1, B)
        return dict(momentum_buffer=torch.zeros_like(p), squares=p.new_zeros(squares))

    @torch.no_grad()
    def step(self):
        """Updates all parameters that have a gradient, which is overwritten."""
        same_shape = collections.defaultdict(list)
        for group in self.param_groups:
            settings = (group["lr"], group["weight_decay"])
            weights, updates, squares = self.momentum_updates(group)
            for matrix in zip(weights, updates, squares, strict=True):
                same_shape[matrix[0].shape, settings].append(matrix)
        for (shape, (lr, weight_decay)), matrices in same_shape.items():
            weights, updates, squares = zip(*matrices, strict=True)
            updates = orthogonalize(torch.stack(updates))
            # without this format, tall ones would stay transposed, and be added to their weights one by one
            updates = updates.to(weights[0].dtype, memory_format=torch.contiguous_format)
            stacked = torch.stack(squares)
            updates = evened(updates, stacked)
            torch._foreach_copy_(squares, stacked.unbind())
            torch._foreach_mul_(weights, 1 - lr * weight_decay)
            torch._foreach_add_(weights, updates.unbind(), alpha=-0.2 * math.sqrt(max(shape)) * lr)

    def momentum_updates(self, group):
        """Updates the momenta of a group. Returns its matrices, their updates, which take the place of the
        gradients, and their squares, in lists."""
        params = [p for p in group["params"] if p.grad is not None]  # others are frozen
        if not params:
            return [], [], []
        grads = [p.grad for p in params]
        for p in params:
            if not self.state[p]:
                self.state[p].update(self.new_moments(p))
        means = [self.state[p]["momentum_buffer"] for p in params]
        torch._foreach_lerp_(means, grads, 1 - group["momentum"])
        torch._foreach_lerp_(grads, means, group["momentum"])  # Nesterov's momentum
        squares = [self.state[p]["squares"] for p in params]

        def split(tensors):
            return [part for tensor in tensors for part in tensor.chunk(group["parts"])]

        return split(params), split(grads), split(squares)
