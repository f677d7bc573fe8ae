"""
Cross-entropy that computes its gradients in the forward pass, in chunks of tokens: the logits of all tokens
never exist at once, and those of a chunk are read once for both.
"""

import math

import torch
from torch.nn import functional as F


def suitable_chunks(tokens, vocab_size):
    """Returns the number of chunks that keeps a chunk below 2**29 logits, 1 GB in 16 bits, but 16 at most.

    Every chunk reads the head and adds to its gradient once more, 0.5 GB of traffic for GPT-2's head; more
    than 16 would take torch.compile long.
    """
    return min(16, math.ceil(tokens * vocab_size / 2**29))


def capped(logits, softcap):
    """Returns logits smoothly limited to +-softcap, in fp32; unchanged if softcap is None."""
    if softcap is None:
        return logits
    return softcap * torch.tanh(logits.float() / softcap)


@torch.library.custom_op("sologpt::product", mutates_args=())
def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Returns a.T @ b, (V, C) in fp32, for a (n, V) and b (n, C) in the dtype of the matmuls."""
    if a.is_cuda:
        return torch.mm(a.t(), b, out_dtype=torch.float32)
    total = a.new_zeros(a.size(1), b.size(1), dtype=torch.float32)
    add_product_(total, a, b)
    return total


@product.register_fake
def shape_of_product(a, b):
    return a.new_empty(a.size(1), b.size(1), dtype=torch.float32)


@torch.library.custom_op("sologpt::add_product_", mutates_args=["total"])
def add_product_(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """Adds product(a, b) to total.

    An operation of its own, as torch.compile would postpone the sums of all chunks to the end, and keep every
    product until then.
    """
    if total.is_cuda:  # the matmul itself adds in fp32; elsewhere torch has no such matmul
        torch.addmm(total, a.t(), b, out_dtype=torch.float32, out=total)
        return
    # the product sums over many tokens, and fp16 ends at 65,504
    total.add_(a.t() @ (b / 128), alpha=128)


def chunk_loss(x, weight, targets, softcap, with_gradient):
    """Returns the summed cross-entropy of one chunk, an fp32 scalar, and its gradient with respect to the
    logits, (n, V) in the dtype of x; None without gradient. x: (n, C), targets: int64 (n,)."""
    logits = F.linear(x, weight).float()
    if softcap is not None:
        tanh = torch.tanh(logits / softcap)
        logits = softcap * tanh
    # comparing, instead of gather and scatter, lets torch.compile read the logits once for all that follows
    is_target = targets[:, None] == torch.arange(len(weight), device=x.device)
    target_logit = torch.where(is_target, logits, 0).sum(-1, keepdim=True)
    largest = logits.amax(-1, keepdim=True)
    total = (logits - largest).exp().sum(-1, keepdim=True)
    nats = largest + total.log() - target_logit
    ignored = (targets < 0)[:, None]
    loss = nats.masked_fill(ignored, 0).sum()
    if not with_gradient:
        return loss, None

    # The gradient is softmax - one-hot, and 0 where the loss does not count. It is not divided by the number
    # of targets yet, as fp16 would lose small values. As it depends on all results so far, and on few
    # operations, torch.compile puts it where the logits were: 1.6 GB less for (16, 1024, 50304).
    d = (logits - target_logit - nats.masked_fill(ignored, math.inf)).exp() - is_target.float()
    if softcap is not None:
        d = d * (1 - tanh * tanh)  # the derivative of tanh
    return loss, d.to(x.dtype)


class ChunkedCrossEntropy(torch.autograd.Function):
    """Computes the gradients in the forward pass, while a chunk's logits exist. See chunked_cross_entropy.

    weight16: the weight in 16 bits, or None; taken if it is in the dtype of x.
    """

    @staticmethod
    def forward(ctx, x, weight, weight16, targets, chunks, softcap, with_gradients):
        w = weight16
        if w is None or w.dtype != x.dtype:
            w = weight.to(x.dtype)
        loss = 0.0
        dx = []
        dw = None
        for x_chunk, targets_chunk in zip(x.chunk(chunks), targets.chunk(chunks), strict=True):
            part, d = chunk_loss(x_chunk, w, targets_chunk, softcap, with_gradients)
            loss += part
            if not with_gradients:
                continue
            if dw is None:
                dw = product(d, x_chunk)
            else:
                add_product_(dw, d, x_chunk)
            dx.append(d @ w)
        count = (targets >= 0).sum()
        if with_gradients:
            ctx.save_for_backward(torch.cat(dx), dw, count)
        return loss / count

    @staticmethod
    def backward(ctx, grad):
        dx, dw, count = ctx.saved_tensors
        scale = grad / count.clamp(min=1)  # the gradients are 0 if no target counts
        dx = (dx.float() * scale).to(dx.dtype)  # in fp32: a GPU would round scale to the dtype of dx
        return dx, dw * scale, None, None, None, None, None


def chunked_cross_entropy(x, head, targets, chunks, softcap=None):
    """Returns the mean cross-entropy in nats, an fp32 scalar, of the capped logits head(x) and targets.

    x is (N, C) in the dtype of the matmuls, head a Linear without bias, targets int64 (N,), -1 where one does
    not count. chunks: how many the tokens are processed in, of torch.chunk's sizes; 0: a suitable number.
    Sums over chunks are fp32.
    """
    chunks = min(len(x), chunks or suitable_chunks(len(x), len(head.weight)))
    weight16 = head.weight16
    if weight16 is not None:
        weight16 = weight16.detach()  # the gradient, in fp32, goes to the weight
    with_gradients = torch.is_grad_enabled()
    return ChunkedCrossEntropy.apply(x, head.weight, weight16, targets, chunks, softcap, with_gradients)
