"""
Updates that are not finite: counted, skipped, and too many of them in a row end the run.
"""

import math

from sologpt.display import warn
from sologpt.errors import UserError


def count_bad_steps(run, step_loss, norm):
    """Counts an update that was skipped, and warns of it. In fp16 an infinite gradient is normal while the
    scaler finds out how large its scale may be: there only a loss that is not finite counts."""
    at = run.at
    if math.isfinite(step_loss.item() if run.scaler.is_enabled() else norm):
        at.bad_in_row = 0
        return
    at.bad_steps += 1
    at.bad_in_row += 1
    loss = step_loss.item()
    text = f"loss {loss:.4g} and gradient norm {norm:.4g} in iteration {at.iter_num}"
    warn(f"{text}: its update is skipped ({at.bad_in_row} in a row)")
    run.metrics.record("bad_step", at.iter_num, loss=loss, norm=norm, in_row=at.bad_in_row)


def check_bad_steps(run):
    at = run.at
    if at.bad_in_row >= run.cfg.max_bad_steps:
        raise UserError(
            f"no finite gradient in the {at.bad_in_row} iterations {at.iter_num - at.bad_in_row + 1} to "
            f"{at.iter_num}; {run.files.kept}. Try a lower --learning_rate, --grad_clip=1.0 or "
            f"--dtype=float32 from there"
        )
