"""
A run's state on disk: ckpt.pt with everything that continuing needs, ckpt_prev.pt with the one before it, best.pt with
the best weights, metrics.jsonl.

Every .pt file is one dict of tensors and plain values, a superset of nanoGPT's, so that nanoGPT reads ours and we
read nanoGPT's; they load with weights_only=True and cannot run code.
"""

import contextlib
import dataclasses
import errno
import json
import math
import os
import shutil
import sys
import zipfile

import torch
from tqdm import tqdm

from shards import atomic_file

MODEL_ARGS = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")


def save(path, state, previous=None):
    """Writes the dict state to path. Until the new file is whole and on disk, the one that was there stays; then it
    becomes previous, if that is given.

    Raises OSError, as for any file, if the disk is full or the folder cannot be written, and ValueError if a weight or
    a moment is not finite: nothing could continue from there. Looking at them costs a pass over the state, no memory.
    """
    found = list(tensors(state))
    bounds = (bound for tensor in found if tensor.is_floating_point() for bound in tensor.aminmax())  # nan spreads
    if not all(math.isfinite(bound) for bound in bounds):
        raise ValueError(f"not saved to {path}: weights or optimizer moments that are not finite")
    needed = sum({tensor.data_ptr(): tensor.nbytes for tensor in found}.values())  # tied weights are written once
    free = shutil.disk_usage(os.path.dirname(path) or ".").free
    if needed > free:
        raise OSError(errno.ENOSPC, f"{needed / 1e6:,.1f} MB are needed, {free / 1e6:,.1f} MB are free", path)
    try:
        with atomic_file(path, previous) as f:
            torch.save(state, f)
    except RuntimeError as e:  # what torch makes of an OSError in the middle of its own format
        raise OSError(f"cannot write {path}: {e.__context__ or e}") from e


def tensors(value):
    """Yields all tensors in dicts within dicts."""
    if torch.is_tensor(value):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors(item)


def load(path):
    """Returns the dict saved at path, by us or by nanoGPT, with its tensors on the CPU.

    Parameter names lose the prefixes of torch.compile and DDP, and the attention mask that nanoGPT kept among them
    before torch 2.0 is left out. Raises FileNotFoundError without a file, and ValueError for one that is damaged (the
    checksum of every tensor is compared) or no checkpoint of a GPT.
    """
    if not os.path.exists(path):
        raise FileNotFoundError(f"there is no checkpoint {path}; train first, or name its folder with --out_dir=")
    try:
        if zipfile.is_zipfile(path):  # torch.load itself would take flipped bits for weights
            with zipfile.ZipFile(path) as archive:
                if archive.testzip():
                    raise ValueError(f"the checksum of {archive.testzip()} is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # torch and zipfile raise many kinds for a damaged or foreign file
        why = str(e).partition("\n")[0] or type(e).__name__
        raise ValueError(f"cannot read the checkpoint {path}, damaged or not one of ours: {why}") from None
    if not isinstance(state, dict) or not {"model", "model_args"} <= state.keys():
        raise ValueError(f"{path} is no checkpoint of a GPT: it lacks 'model' or 'model_args'")
    missing = [name for name in MODEL_ARGS if name not in state["model_args"]]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)} in its model_args")
    state["model_args"] = {name: state["model_args"][name] for name in MODEL_ARGS}
    # not among model_args, which are what nanoGPT's GPTConfig takes
    state["arch"], state["gelu"] = state.get("arch", "gpt2"), state.get("gelu", "none")
    weights = {strip(name): tensor for name, tensor in state["model"].items()}
    state["model"] = {name: tensor for name, tensor in weights.items() if not name.endswith(".attn.bias")}
    return state


def strip(name):
    while name.startswith(("_orig_mod.", "module.")):
        name = name.split(".", 1)[1]
    return name


def with_architecture(cfg, fields, path):
    """Returns cfg with the architecture of the checkpoint at path, which has these fields of GPTConfig. Raises
    ValueError, with all that differs, if the user has set another one."""
    saved = {name: fields[name] for name in ("arch", "n_layer", "n_head", "n_embd", "block_size", "bias")}
    differing = [name for name in saved if name in cfg.given and getattr(cfg, name) != saved[name]]
    if differing:
        listed = ", ".join(f"{name}={saved[name]}, not {getattr(cfg, name)}" for name in differing)
        raise ValueError(f"{path} is of another model: {listed}; leave these out, or start anew in another --out_dir")
    changed = dataclasses.replace(cfg, **saved)
    changed.given = cfg.given
    return changed


def data_changes(state, data):
    """Returns in what data, from shards.fingerprint, differs from that of a state: up to four phrases in one string,
    empty if in nothing or if the state, one of nanoGPT's, does not say."""
    was = state.get("data", data)
    differing = [name for name in sorted(was | data) if was.get(name) != data.get(name)]
    listed = [f"{name}: {data.get(name, 'missing')}, was {was.get(name, 'missing')}" for name in differing[:4]]
    return "; ".join(listed + [f"and {len(differing) - 4} more"] * (len(differing) > 4))


def restore_model(model, state, path):
    """Loads the weights of a state from load(path). Raises ValueError if they are not those of this model."""
    try:
        model.load_state_dict(state["model"])
    except RuntimeError as e:
        first = " ".join(str(e).splitlines()[1:2]).strip()
        raise ValueError(f"the weights in {path} do not fit its model_args: {first}") from None


def restore_optimizers(optimizers, state, path):
    """Loads the moments of a state from load(path) into optimizers, dict(optimizer=AdamW) and perhaps muon=Muon.
    Settings (learning rate, decay, betas, fused) stay this run's.

    Raises ValueError if they are not those of this run's parameters."""
    was, now = ("muon" if "muon" in names else "adamw" for names in (state, optimizers))
    if was != now:
        raise ValueError(f"{path} is of a run with --optimizer={was}, not {now}; its moments cannot be taken over")
    for name, optimizer in optimizers.items():
        saved = state[name]
        sizes = [len(group["params"]) for group in saved["param_groups"]]
        if sizes != [len(group["params"]) for group in optimizer.param_groups]:
            kind = "Muon's" if name == "muon" else "AdamW's"
            raise ValueError(f"the optimizer state in {path} is not {kind} in two groups of this model's parameters")
        for group, current in zip(saved["param_groups"], optimizer.param_groups, strict=True):
            group.update({name: value for name, value in current.items() if name != "params"})
        optimizer.load_state_dict(saved)


def allocate_moments(optimizers):
    """Gives AdamW and Muon their moments now instead of in their first step, so that memory runs out, if it does, in a
    forward or backward pass, which can be repeated, and never in the middle of an update."""
    for name, optimizer in optimizers.items():
        for group in optimizer.param_groups:
            for p in group["params"]:
                if name == "muon":
                    optimizer.state[p] = dict(momentum_buffer=torch.zeros_like(p))
                else:
                    step = torch.zeros((), device=p.device if group["fused"] else "cpu")
                    optimizer.state[p] = dict(step=step, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))


def get_rng(device):
    """Returns torch's random state, which dropout draws from, on the CPU and on a CUDA device."""
    rng = dict(cpu=torch.get_rng_state())
    if device.type == "cuda":
        rng["cuda"] = torch.cuda.get_rng_state(device)
    return rng


def set_rng(rng, device):
    torch.set_rng_state(rng["cpu"])
    if device.type == "cuda" and "cuda" in rng:
        torch.cuda.set_rng_state(rng["cuda"], device)


def rewind_metrics(path, iter_num):
    """Drops what metrics.jsonl says of iter_num and later, and a last line that was cut short, so that no step appears
    twice after resuming there."""
    kept = []
    if os.path.exists(path):
        with open(path, encoding="utf-8") as f:
            for line in f:
                try:
                    if json.loads(line)["iter"] < iter_num:
                        kept.append(line)
                except (ValueError, KeyError, TypeError):
                    continue
    with atomic_file(path) as f:
        f.write("".join(kept).encode())


def say(text, file=sys.stdout):
    """Prints text, above the progress bar if there is one. Where it cannot be written, the log being on a full disk,
    it is left out: no reason to end a run."""
    try:
        tqdm.write(text, file)
    except BrokenPipeError:
        raise
    except OSError:
        pass


class RunFiles:
    """Where a run keeps its state in out_dir: ckpt.pt, the one before it in ckpt_prev.pt, and best.pt.

    before_cooldown.pt is a state to branch from. saved_iter is the iteration that ckpt.pt holds; None unless it is
    whole and of this run.
    """

    def __init__(self, out_dir):
        self.out_dir, self.saved_iter = out_dir, None
        names = ("ckpt", "ckpt_prev", "best", "before_cooldown")
        self.ckpt, self.previous, self.best, self.before_cooldown = (os.path.join(out_dir, f"{n}.pt") for n in names)
        self.newest, self.kept = None, "nothing of this run is saved yet"  # the newest whole state; which that is

    def exist(self):
        return os.path.exists(self.ckpt) or os.path.exists(self.previous)

    def load(self):
        """Returns (state, None) of ckpt.pt or, if that is damaged or missing, (state, why) of ckpt_prev.pt.

        Raises what load(ckpt.pt) raises if there is no other, or ValueError if neither can be resumed from."""
        state, why, self.newest = None, None, self.ckpt
        try:
            state = load(self.ckpt)
        except (FileNotFoundError, ValueError) as e:
            if not os.path.exists(self.previous):
                raise
            why = str(e) if os.path.exists(self.ckpt) else f"{self.ckpt} is missing"
            self.newest = self.previous
        try:
            state = state or load(self.previous)
        except ValueError as e:
            raise ValueError(f"{why}; and {e}") from None
        if not {"optimizer", "iter_num", "best_val_loss"} <= state.keys():
            raise ValueError(f"{self.newest} holds weights only, no optimizer state to resume from")
        self.saved_iter = state["iter_num"] if self.newest == self.ckpt else None
        self.kept = f"{self.newest} holds iteration {state['iter_num']}"
        return state, why

    def save(self, state):
        """Writes ckpt.pt; what was there becomes ckpt_prev.pt, if it is whole and of this run. Returns as save_best."""
        if not self.write(self.ckpt, state, None if self.saved_iter is None else self.previous):
            return False
        if self.newest is None:
            remove(self.previous)  # of an earlier run
        self.newest, self.saved_iter = self.ckpt, state["iter_num"]
        self.kept = f"{self.ckpt} holds iteration {self.saved_iter}"
        return True

    def save_best(self, state):
        """Writes best.pt. Returns whether that was possible; if not, the disk being full, it says so, and what was
        there stays: the run can go on and try again."""
        return self.write(self.best, state)

    def save_before_cooldown(self, state):
        """Writes before_cooldown.pt. Returns as save_best."""
        return self.write(self.before_cooldown, state)

    def write(self, path, state, previous=None):
        try:
            save(path, state, previous)
        except OSError as e:
            if e.errno == errno.ENOSPC and previous and os.path.exists(previous):
                say(f"warning: deleting {previous} to save iteration {state['iter_num']}: {e}", sys.stderr)
                remove(previous)  # ckpt.pt is whole, and a new state is worth more than a third one
                return self.write(path, state, previous)
            say(f"warning: cannot save iteration {state['iter_num']}: {e}; {self.kept}", sys.stderr)
            return False
        except ValueError as e:
            raise ValueError(f"{e}; {self.kept}. Try a lower --learning_rate or --grad_clip=1.0 from there") from None
        return True

    def remove_partial(self):
        """Removes what a killed run may have left of a file that it was writing."""
        for name in ("ckpt.pt", "best.pt", "before_cooldown.pt", "metrics.jsonl"):
            remove(os.path.join(self.out_dir, f"{name}.tmp"))


def remove(path):
    with contextlib.suppress(FileNotFoundError):
        os.remove(path)


class Metrics:
    """metrics.jsonl, open for appending. A line that cannot be written, the disk being full, is kept and written with
    the next one that can: a log is no reason to end a run."""

    def __init__(self, path):
        self.path, self.file, self.waiting, self.failing = path, open(path, "ab", buffering=0), b"", False

    def write(self, line):
        self.waiting += line.encode()
        try:
            self.waiting = self.waiting[self.file.write(self.waiting) :]  # on a full disk only a part may go
            self.failing = False
        except OSError as e:
            if not self.failing:  # once, not with every line
                say(f"warning: cannot write {self.path}: {e.strerror}; trying again with each line", sys.stderr)
            self.failing = True

    def sync(self):
        """Puts the lines on disk: called before a checkpoint, which must not know of steps that they do not."""
        with contextlib.suppress(OSError):
            os.fsync(self.file.fileno())
