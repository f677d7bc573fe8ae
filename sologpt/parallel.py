"""
Several processes that train one model, each on a GPU of its own; docs/several_gpus.md says how, and why it is
not done by DistributedDataParallel. With one process, nothing here has any effect.
"""

import contextlib
import os
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from sologpt.errors import UserError, first_line, out_of_memory
from sologpt.stop import Stopped

TIMEOUT = timedelta(minutes=30)  # for a process that does not answer; it may be saving, or compiling
MAX, MIN, SUM = "MAX", "MIN", "SUM"  # names in dist.ReduceOp, which some builds of torch for one GPU lack


class Lost(UserError):
    """Another process has failed or does not answer: this one cannot go on."""


def from_torchrun(name, default):
    """Returns the integer in an environment variable that torchrun sets; the default if it is not set, or
    empty. Raises UserError for what is no such number, or below the default."""
    text = os.environ.get(name) or str(default)
    if not text.isdecimal() or int(text) < default:
        raise UserError(
            f"{name}={text} in the environment must be a whole number, {default} or more; correct or unset it"
        )
    return int(text)


def processes():
    return from_torchrun("WORLD_SIZE", 1)


def rank():
    """Returns the number of this process, from 0 on. Process 0 writes the log and all files."""
    return from_torchrun("RANK", 0) if processes() > 1 else 0


def connected():
    return processes() > 1 and dist.is_initialized()


@contextlib.contextmanager
def only_process_0_prints():
    """Returns a context in which only process 0 is heard, and at whose end they wait for each other."""
    if rank():
        sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")
    try:
        yield
    except BaseException as e:
        # torchrun ends all when one has ended, so process 0 goes first: it may have to save, and says why
        if isinstance(e, SystemExit) and connected():
            all_reduce([0.0], SUM)
            dist.destroy_process_group()
        elif rank() and isinstance(e, (UserError, OSError, SystemExit)):
            time.sleep(5 + rank())
        if rank():
            sys.stderr = sys.__stderr__
        raise
    if connected():
        all_reduce([0.0], SUM)
        dist.destroy_process_group()


@contextlib.contextmanager
def leaving_together(stop):
    """Returns a context that all processes leave once one raises in it: their next agree() tells them."""
    stop.agreed = False
    try:
        yield
    except BaseException as e:
        if processes() > 1 and not stop.agreed:
            agree(stop, error=e)
        raise


def agree(stop, time_used=0.0, error=None):
    """Shares this process's signal, error and share of time with all. Returns the largest share.

    Raises Stopped or OutOfMemoryError in all if one says so, and Lost in the others if one has failed. Every
    sum comes right after an agreement, so that nobody waits in it for a process that has left.
    """
    if processes() == 1:
        stop.check()
        return time_used
    no_memory = out_of_memory(error) and not isinstance(error, UserError)
    failed = error is not None and not no_memory and not isinstance(error, Stopped)
    one_failed, number, no_memory, time_used = all_reduce([failed, stop.number, no_memory, time_used], MAX)
    stop.agreed = bool(one_failed or number or no_memory)
    if one_failed:
        message = str(error) if failed else None
        messages = [None] * processes()
        dist.all_gather_object(messages, message)
        if failed:
            return None  # leaving_together raises its own error
        first = next(text for text in messages if text is not None)
        raise Lost(f"another process has failed: {first}")
    if number:  # not stop.number, as a signal that has just come is for the next agreement
        stop.number = int(number)
        raise Stopped
    if no_memory:
        raise torch.OutOfMemoryError("another process is out of memory")
    return time_used


def sum_gradients(run, step_loss):
    """Sums the gradients and step_loss, a tensor, of all processes, in place."""
    if processes() > 1:
        run.machine.synchronize()  # else a process waits in the sum for others that compute, or have ended
        agree(run.stop)
        combine([step_loss] + [p.grad for p in run.model.parameters() if p.grad is not None], SUM)


def all_reduce(numbers, op, stop=None):
    """Returns floats combined with those of the other processes; given stop, these agree first."""
    if processes() == 1:
        return numbers
    if stop:
        agree(stop)
    tensor = torch.tensor(numbers, dtype=torch.float64)
    combine([tensor], op)
    return tensor.tolist()


def combine(tensors, op):
    """Combines tensors with those of the other processes, in place. Raises Lost if one does not answer. On
    GPUs it returns before the sum is done; if that never ends, NCCL's watchdog ends the process."""
    try:
        reduce_op = getattr(dist.ReduceOp, op)
        for work in [dist.all_reduce(tensor, reduce_op, async_op=True) for tensor in tensors]:
            work.wait()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as e:
        text = f"another process has ended, or not answered for {TIMEOUT.seconds} s, or cannot be reached"
        raise Lost(f"{text}: {first_line(e)}") from None
