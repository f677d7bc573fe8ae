"""
Lines for the user, and how times are written in them. Imports nothing heavy.
"""

import os
import sys

from tqdm import tqdm

from sologpt.stop import StopRequest


def say(text, file=None):
    """Prints text to stdout or to file, above the progress bar if there is one. If it cannot be written, as
    with a log on a full disk, it is left out: no reason to end a run.

    If whoever read stdout has ended, as `tee` does by the same Ctrl-C, that is a request to stop, and what
    follows goes to stderr. Raises BrokenPipeError where there is nothing to save.
    """
    file = file or sys.stdout
    try:
        tqdm.write(text, file)
    except BrokenPipeError:
        if not StopRequest.in_force:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())  # or flushing at the end fails again
        if file is sys.stdout:
            StopRequest.in_force.reader_has_ended()
            sys.stdout = sys.stderr
    except OSError:
        pass


def warn(text):
    say(f"warning: {text}", sys.stderr)


def duration(seconds):
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"


def print_aligned(lines):
    """Prints lines of the form `name: text` with their texts one below another."""
    for line in lines:
        name, _, text = line.partition(": ")
        say(f"{name + ':':<11} {text}")
