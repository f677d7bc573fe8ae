"""
Cross-entropy in chunks of tokens, so that the logits of all tokens never exist at once.
"""

import torch
from torch.nn import functional as F


def capped(logits, softcap):
    """Returns logits smoothly limited to +-softcap, in fp32; unchanged if softcap is None."""
    if softcap is None:
        return logits
    return softcap * torch.tanh(logits.float() / softcap)


@torch.library.custom_op("sologpt::add_product_", mutates_args=["total"])
def add_product_(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """Adds a.T @ b to total, (V, C) in fp32, for a (n, V) and b (n, C) in the dtype of the matmuls.

    An operation of its own, as torch.compile would put all chunks' sums off to the end, and keep every
    product until then.
    """
    # the product sums over many tokens, and fp16 ends at 65,504
    total.add_(a.t() @ (b / 128), alpha=128)


def chunk_loss(x, weight, targets, softcap, d_weight):
    """Returns the summed cross-entropy of one chunk, an fp32 scalar, and its gradient with respect to x, in
    the dtype of x. Adds that with respect to weight to d_weight, in fp32; if that is None, there are no
    gradients. x: (n, C), targets: int64 (n,)."""
    logits = capped(F.linear(x, weight), softcap).float()
    counted = targets >= 0
    total = logits.logsumexp(-1, keepdim=True)
    picked = logits.gather(1, targets.clamp(min=0)[:, None])
    loss = (total - picked).squeeze(1).masked_fill(~counted, 0).sum()
    if d_weight is None:
        return loss, None

    # The gradient with respect to the logits is softmax - one-hot. It is not divided by the number of targets
    # yet, as fp16 would lose small values; the comparison, instead of a scatter, fuses into one kernel.
    one_hot = targets[:, None] == torch.arange(len(weight), device=x.device)
    d = (logits - total).exp() - one_hot.float()
    if softcap is not None:
        d = d * (1 - (logits / softcap).square())  # the derivative of tanh is 1 - tanh^2
    d = d.masked_fill(~counted[:, None], 0).to(x.dtype)
    add_product_(d_weight, d, x)
    return loss, d @ weight


class ChunkedCrossEntropy(torch.autograd.Function):
    """Computes the gradients in the forward pass, while a chunk's logits exist. See chunked_cross_entropy."""

    @staticmethod
    def forward(ctx, x, weight, targets, chunks, softcap, with_gradients):
        w = weight.to(x.dtype)
        loss = 0.0
        dx = []
        dw = None
        if with_gradients:
            dw = torch.zeros_like(weight, dtype=torch.float32)
        for x_chunk, targets_chunk in zip(x.chunk(chunks), targets.chunk(chunks), strict=True):
            part, d_x = chunk_loss(x_chunk, w, targets_chunk, softcap, dw)
            loss += part
            dx.append(d_x)
        count = (targets >= 0).sum()
        if with_gradients:
            ctx.save_for_backward(torch.cat(dx), dw, count)
        return loss / count

    @staticmethod
    def backward(ctx, grad):
        dx, dw, count = ctx.saved_tensors
        scale = grad / count
        dx = (dx.float() * scale).to(dx.dtype)  # in fp32: a GPU would round scale to the dtype of dx
        return dx, dw * scale, None, None, None, None


def chunked_cross_entropy(x, weight, targets, chunks, softcap=None):
    """Returns the mean cross-entropy in nats, an fp32 scalar, of the capped logits x @ weight.T and targets.

    x is (N, C) in the dtype of the matmuls, weight (V, C) in fp32, targets int64 (N,), -1 where one does not
    count. The tokens are processed chunk by chunk, with torch.chunk's sizes. Sums over chunks are fp32.
    """
    return ChunkedCrossEntropy.apply(x, weight, targets, chunks, softcap, torch.is_grad_enabled())
