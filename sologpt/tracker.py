"""
Figures of a run, sent to wandb, trackio or TensorBoard as well. None of these may end a run: the first thing
that goes wrong is a warning, and ends the sending.
"""

import contextlib
import dataclasses
import importlib
import os
import sys

from sologpt import parallel
from sologpt.display import warn
from sologpt.errors import first_line

TRACKERS = ("wandb", "trackio", "tensorboard")
NAMES = dict(train_loss="train/loss", val_loss="val/loss", val_bpb="val/bpb")


class Wandb:
    """wandb, or trackio, which has the same functions."""

    def __init__(self, name, cfg):
        self.name = name
        self.module = importlib.import_module(name)
        settings = dataclasses.asdict(cfg)
        self.module.init(project=cfg.wandb_project, name=cfg.wandb_run_name, config=settings)
        if name == "wandb":
            self.module.define_metric("*", step_metric="iter")  # the axis of its plots

    def send(self, iter_num, figures):
        row = dict(iter=iter_num) | figures
        if self.name == "wandb":
            self.module.log(row)  # with a step it would drop rows of a run that goes on from an earlier one
        else:
            self.module.log(row, step=iter_num)

    def close(self):
        failure = sys.exc_info()[1]
        if isinstance(failure, Exception) and self.name == "wandb":
            self.module.finish(exit_code=1)  # else it would be shown as finished
        else:
            self.module.finish()


class TensorBoard:
    """Files in out_dir/tensorboard, for `tensorboard --logdir=out_dir`."""

    def __init__(self, cfg, first):
        from torch.utils.tensorboard import SummaryWriter

        folder = os.path.join(cfg.out_dir, "tensorboard")
        self.writer = SummaryWriter(folder, purge_step=first)  # a resumed run does these iterations again

    def send(self, iter_num, figures):
        if "val/loss" in figures:  # an iteration after it has these two
            figures = {name: value for name, value in figures.items() if name not in ("tokens", "elapsed")}
        for name, value in figures.items():
            self.writer.add_scalar(name, value, iter_num)

    def close(self):
        self.writer.close()


class Tracker:
    """What cfg.tracker names, or nothing. first: the first step that it is going to get."""

    def __init__(self, cfg, first):
        self.name = cfg.tracker
        if cfg.wandb_log and not self.name:
            self.name = "wandb"
        if parallel.rank():
            self.name = ""
        self.rest = "; metrics.jsonl has all figures"
        if cfg.eval_only:
            self.rest = ""
        self.sink = None
        if self.name == "tensorboard" and cfg.eval_only:
            return  # a run may be writing there
        with self.guarded("started"):
            if self.name == "tensorboard":
                self.sink = TensorBoard(cfg, first)
            elif self.name:
                self.sink = Wandb(self.name, cfg)

    def send(self, iter_num, figures):
        """Sends {name: number} of an iteration; train_loss is called train/loss there, as in nanoGPT."""
        if self.sink:
            named = {NAMES.get(name, name): value for name, value in figures.items() if value is not None}
            with self.guarded("reached"):
                self.sink.send(iter_num, named)

    def close(self):
        if self.sink:
            with self.guarded("closed"):
                self.sink.close()

    @contextlib.contextmanager
    def guarded(self, what):
        """Returns a context in which an exception is a warning, and the last thing that is tried."""
        try:
            yield
        except ImportError as e:
            self.sink = None
            warn(f"no {self.name} ({e}): pip install {self.name}{self.rest}")
        except Exception as e:  # each has errors of its own
            self.sink = None
            warn(f"{self.name} cannot be {what}: {first_line(e)}{self.rest}")
