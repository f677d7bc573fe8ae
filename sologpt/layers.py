"""
Layers that take less memory, or less memory traffic, than torch's.

16-bit weights: autocast alone casts every weight in every micro-step, and its gradient back to fp32, before
autograd adds it to the sum. Reading and writing all that takes 24 bytes of traffic for each weight. With
casts made once an iteration it is 10, for the sum, and the products are the same.
"""

import functools

import torch
import torch.nn as nn
from torch.nn import functional as F


class Linear(nn.Linear):
    """nn.Linear, but with a matrix-vector product for a single token, twice as fast in bf16 on a CPU, and in
    training with a weight cast once an iteration."""

    weight16 = None  # in training: what autocast would make of weight

    def __getstate__(self):
        # copy.deepcopy leaves out weight16, as its hook would be lost
        return {name: value for name, value in self.__dict__.items() if name != "weight16"}

    def forward(self, x):
        if self.weight16 is not None and torch.is_autocast_enabled(x.device.type):
            return F.linear(x, self.weight16, self.bias)
        if x.numel() > self.in_features or x.dtype != self.weight.dtype:  # as under bf16 autocast
            return super().forward(x)
        token = x.reshape(-1)
        if self.bias is None:
            y = torch.mv(self.weight, token)
        else:
            y = torch.addmv(self.bias, self.weight, token)
        return y.view(*x.shape[:-1], -1)


def cast_weights(model, dtype):
    """Gives every Linear of a model a weight16: its weight in dtype, that of autocast; with "float32" none.

    It is neither a parameter nor saved nor copied with the model, and its gradients go to the weight.
    Whatever changes a weight later must call recast_weights.
    """
    if dtype == "float32":
        return
    for layer in linear_layers(model):
        layer.weight16 = layer.weight.detach().to(getattr(torch, dtype))
        if layer.weight.requires_grad:
            layer.weight16.requires_grad_()
            pass_on = functools.partial(pass_on_gradient, layer.weight)
            layer.weight16.register_post_accumulate_grad_hook(pass_on)


def pass_on_gradient(weight, weight16):
    """Adds the gradient of a weight16 to that of the weight, in fp32, unless it is frozen by now."""
    grad = weight16.grad
    if grad is None:  # the head's, compiled: chunked_cross_entropy gives the weight its gradient
        return
    weight16.grad = None  # before memory can run out: a gradient left here would count in the next try too
    if not weight.requires_grad:
        return
    if weight.grad is None:
        weight.grad = grad.float()
    else:
        weight.grad += grad


@torch.no_grad()
def recast_weights(model):
    """Casts the weights of a model again, if they have been cast."""
    layers = [layer for layer in linear_layers(model) if layer.weight16 is not None]
    if layers:
        torch._foreach_copy_([layer.weight16 for layer in layers], [layer.weight for layer in layers])


def linear_layers(model):
    return [module for module in model.modules() if isinstance(module, Linear)]


# -----------------------------------------------------------------------------
# squared ReLU


class SquaredReLU(torch.autograd.Function):
    """Keeps only its result, which the next matmul keeps anyway: the derivative is twice its root. Torch
    would keep the input too, a fifth of all that a block keeps. It has a first derivative only, which in fp16
    is 0 for inputs below 2e-4."""

    @staticmethod
    def forward(ctx, x):
        y = F.relu(x)
        # not y *= y, which torch 2.11 compiles to wrong gradients; nor y.square(), which is fp32 under
        # autocast on a GPU, so that the compiler keeps x instead
        y = y * y
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, grad):
        y = ctx.saved_tensors[0].float()
        root = (y + 1e-30).rsqrt().mul_(y)  # 0 for 0; sqrt() takes 20 times as long on a CPU where many are 0
        return root.mul_(2).mul_(grad).to(grad.dtype)


def squared_relu(x):
    """Returns the square of max(x, 0), element by element."""
    return SquaredReLU.apply(x)
