"""
Which sizes a model can have.
"""

from sologpt.errors import UserError


def check(config):
    """Raises UserError if no model can have the fields of this GPTConfig."""
    for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
        if getattr(config, name) < 1:
            raise UserError(f"{name}={getattr(config, name)} must be at least 1")
    if not 0 <= config.dropout < 1:
        raise UserError(f"dropout={config.dropout} must be at least 0 and below 1")
    if config.n_ids > config.vocab_size:
        raise UserError(
            f"n_ids={config.n_ids} is more than vocab_size={config.vocab_size}; n_ids=0 means all of them"
        )
    if config.gelu not in ("none", "tanh"):
        raise UserError(f"gelu={config.gelu!r} must be 'none' (exact) or 'tanh'")
    if config.arch not in ("gpt2", "modern"):
        raise UserError(f"arch={config.arch!r} must be 'gpt2' or 'modern'")
    if problem := width_problem(config.n_embd, config.n_head, config.arch):
        raise UserError(problem)


def width_problem(n_embd, n_head, arch):
    """Returns why n_head heads cannot share n_embd, or None."""
    divisor = n_head
    name = f"n_head={n_head}"
    if arch == "modern":
        divisor = 2 * n_head
        name = f"2 * n_head={divisor}, as arch='modern' rotates pairs"
    if n_embd % divisor == 0:
        return None
    down = n_embd // divisor * divisor
    near = " or ".join(str(n) for n in (down, down + divisor) if n)
    return f"n_embd={n_embd} is not divisible by {name}; set n_embd to {near}, or change n_head"
