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


def chunk_loss(x, weight, targets, softcap, with_gradients):
    """Returns the summed cross-entropy of one chunk, an fp32 scalar, and its gradients with respect to x, in
    the dtype of x, and to weight, in fp32; None without with_gradients. x: (n, C), targets: int64 (n,)."""
    logits = capped(F.linear(x, weight), softcap).float()
    counted = targets >= 0
    total = logits.logsumexp(-1, keepdim=True)
    picked = logits.gather(1, targets.clamp(min=0)[:, None])
    loss = (total - picked).squeeze(1).masked_fill(~counted, 0).sum()
    if not with_gradients:
        return loss, None, None

    # The gradient with respect to the logits is softmax - one-hot. It is not divided by the number of targets
    # yet, as fp16 would lose small values; the comparison, instead of a scatter, fuses into one kernel.
    one_hot = targets[:, None] == torch.arange(len(weight), device=x.device)
    d = (logits - total).exp() - one_hot.float()
    if softcap is not None:
        d = d * (1 - (logits / softcap).square())  # the derivative of tanh is 1 - tanh^2
    d = d.masked_fill(~counted[:, None], 0).to(x.dtype)
    d_weight = (d.t() @ (x / 128)).float() * 128  # a sum over many tokens, and fp16 ends at 65,504
    return loss, d @ weight, d_weight


class ChunkedCrossEntropy(torch.autograd.Function):
    """Computes the gradients in the forward pass, while a chunk's logits exist. See chunked_cross_entropy."""

    @staticmethod
    def forward(ctx, x, weight, targets, chunks, softcap, with_gradients):
        w = weight.to(x.dtype)
        loss = 0.0
        dx = []
        dw = 0.0
        for x_chunk, targets_chunk in zip(x.chunk(chunks), targets.chunk(chunks), strict=True):
            part, d_x, d_weight = chunk_loss(x_chunk, w, targets_chunk, softcap, with_gradients)
            loss += part
            if with_gradients:
                dx.append(d_x)
                dw += d_weight
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
