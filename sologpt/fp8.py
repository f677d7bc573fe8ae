"""
Matmuls in FP8, with torchao (https://github.com/pytorch/ao), which only this needs.
"""

import torch

from sologpt.display import warn
from sologpt.errors import UserError


def use_fp8(model, machine):
    """Makes the linear layers of the blocks multiply in FP8, forward and backward; the head stays as it is.

    Activations and weights are rounded to e4m3, gradients to e5m2, each tensor scaled so that its largest
    value just fits (Micikevicius et al. 2022, https://arxiv.org/abs/2209.05433); products add up in fp32.
    Weights stay fp32 parameters of the same names, so checkpoints are the same. On a CPU torchao rounds alike
    and multiplies in bf16, to try it out. Raises UserError if the machine, its dtype or the sizes do not
    allow it.
    """
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError:
        raise UserError("matmul='fp8' needs torchao: pip install '.[fp8]', or leave --matmul out") from None
    check_fp8(model.config, machine)
    emulate = machine.device.type == "cpu"
    if emulate:
        warn("matmul='fp8' is emulated on a CPU: rounded as a GPU would, and slower than without")
    convert_to_float8_training(
        model,
        config=Float8LinearConfig(emulate=emulate),
        module_filter_fn=lambda module, name: name.startswith("transformer.h."),
    )


def check_fp8(config, machine):
    """Raises UserError if the machine or the sizes of a GPTConfig do not allow FP8."""
    if machine.dtype != "bfloat16":
        raise UserError(f"matmul='fp8' needs dtype='bfloat16' for all else, not {machine.dtype!r}")
    for name in ("n_embd", "block_size"):  # both are summed over, in the backward pass too
        if getattr(config, name) % 16:
            raise UserError(f"{name}={getattr(config, name)} must be a multiple of 16 for matmul='fp8'")
    if not has_fp8(machine.device):
        raise UserError(
            "matmul='fp8' needs an NVIDIA GPU that multiplies in FP8: compute capability 8.9 (RTX 40, L40, "
            "H100) or newer; leave --matmul out"
        )


def has_fp8(device):
    """Whether torch multiplies in FP8 there; the CPU counts, as torchao emulates it."""
    if device.type != "cuda":
        return device.type == "cpu"
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 9)
