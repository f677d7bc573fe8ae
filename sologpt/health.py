"""
What goes wrong in a run without ending it at once: updates that are not finite, which are skipped, and too
many of them in a row; spikes, which are only pointed out.
"""

import math
import statistics
from collections import deque

from sologpt.display import say, warn
from sologpt.errors import UserError

RECENT = 100  # values that a spike is compared with
# A spike is so many times as far above the median as the ninth decile is: 7.7 standard deviations of values
# with a normal distribution. OLMo 2 (https://arxiv.org/abs/2501.00656) counts those above 7.
FAR = 6


class Recent:
    """The last values of a figure."""

    least = 4  # times the median: less is no spike, as norms of small batches reach three in healthy runs

    def __init__(self):
        self.values = deque(maxlen=RECENT)

    def spikes(self, value):
        """Returns whether a value is far above the recent ones, of which it is one from then on."""
        far = False
        if len(self.values) == RECENT:
            middle = statistics.median(self.values)
            spread = statistics.quantiles(self.values, n=10)[-1] - middle
            far = value > middle + FAR * spread and value > self.least * middle
        self.values.append(value)
        return far


class RecentLosses(Recent):
    least = 1.1  # losses vary little: a rise from 3.3 to 3.7 may be a spike, and a uniform guess has only 11


def watch_update(run, step_loss, norm):
    """Counts an update that was skipped, and warns of it; points out a gradient norm that spikes. In fp16 an
    infinite gradient is normal while the scaler finds out how large its scale may be: down to a scale of 1
    only a loss that is not finite counts. Raises UserError after max_bad_steps in a row."""
    at = run.progress
    finding_scale = run.scaler.is_enabled() and run.scaler.get_scale() >= 1
    decisive = norm
    if finding_scale:
        decisive = step_loss.item()  # waits for the GPU, as the scaler does
    if math.isfinite(decisive):
        at.bad_in_row = 0
        if math.isfinite(norm) and run.norms.spikes(norm):
            point_out_spike(run, at.iter_num, "gradient norm", norm, run.norms, step_loss.item(), norm)
        return
    at.bad_steps += 1
    at.bad_in_row += 1
    loss = step_loss.item()
    text = f"loss {loss:.4g} and gradient norm {norm:.4g} in iteration {at.iter_num}"
    warn(f"{text}: its update is skipped ({at.bad_in_row} in a row)")
    run.metrics.record("bad_step", at.iter_num, loss=loss, norm=norm, in_row=at.bad_in_row)
    if at.bad_in_row >= run.cfg.max_bad_steps:
        raise UserError(
            f"no finite gradient in the {at.bad_in_row} iterations {at.iter_num - at.bad_in_row + 1} to "
            f"{at.iter_num}; {run.files.saved_text}. Try {' or '.join(levers(run))}"
        )


def levers(run):
    """Returns what may help against gradients that are not finite, a list."""
    found = ["a lower --learning_rate"]
    if not 0 < run.cfg.grad_clip <= 1:
        found.append("--grad_clip=1.0")
    if run.machine.dtype != "float32":
        found.append("--dtype=float32")
    return found


def watch_loss(run, it, loss, norm):
    """Points out a loss far above those logged before. Losses between log lines are not read: that would wait
    for the GPU."""
    if math.isfinite(loss) and run.logged_losses.spikes(loss):
        point_out_spike(run, it, "loss", loss, run.logged_losses, loss, norm)


def point_out_spike(run, it, name, value, recent, loss, norm):
    """Says which sequences of the run were in iteration `it`, with a spike of the figure of that name;
    nothing else changes."""
    S = run.cfg.sequences_per_iter
    middle = statistics.median(recent.values)
    first, last = it * S, (it + 1) * S - 1
    say(f"spike in iteration {it}: {name} {value:.4g}, recently {middle:.4g}; sequences {first} to {last}")
    figures = dict(figure=name, loss=loss, norm=norm, first_sequence=first, last_sequence=last)
    run.metrics.record("spike", it, **figures)
