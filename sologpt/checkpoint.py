"""
A run's state on disk: ckpt.pt with all that resuming needs, ckpt_prev.pt with the state before it, and
best.pt with the best weights.

Every .pt file is one dict of tensors and plain values, a superset of nanoGPT's, so that nanoGPT reads ours
and we read nanoGPT's; they load with weights_only=True and cannot run code.
"""

import dataclasses
import errno
import math
import os
import shutil
import time
import zipfile

import torch

from sologpt.errors import UserError
from sologpt.files import atomic_file, remove
from sologpt.log import warn

MODEL_ARGS = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")


# -----------------------------------------------------------------------------
# one file


def save(path, state, previous=None):
    """Writes the dict state to path. The file that was there stays until the new one is whole and on disk,
    and then becomes previous, if that is given.

    Raises OSError, as for any file, if the disk is full or the folder cannot be written, and UserError if a
    weight or a moment is not finite, as nothing could continue from there.
    The check costs a pass over the state, but no memory.
    """
    found = list(tensors(state))
    floats = [tensor for tensor in found if tensor.is_floating_point()]
    bounds = (bound for tensor in floats for bound in tensor.aminmax())  # a NaN spreads to both
    if not all(math.isfinite(bound) for bound in bounds):
        raise UserError(f"not saved to {path}: weights or optimizer moments that are not finite")
    # tied weights are written once
    needed = sum({tensor.data_ptr(): tensor.nbytes for tensor in found}.values())
    free = shutil.disk_usage(os.path.dirname(path) or ".").free
    if needed > free:
        raise OSError(errno.ENOSPC, f"{needed / 1e6:,.1f} MB are needed, {free / 1e6:,.1f} MB are free", path)
    try:
        with atomic_file(path, previous) as f:
            torch.save(state, f)
    except RuntimeError as e:  # torch's form of an OSError in the middle of writing
        raise OSError(f"cannot write {path}: {e.__context__ or e}") from e


def tensors(value):
    """Yields all tensors in nested dicts."""
    if torch.is_tensor(value):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors(item)


def load(path):
    """Returns the dict saved at path, by us or by nanoGPT, with its tensors on the CPU.

    Parameter names lose the prefixes of torch.compile and DDP, and the attention mask that nanoGPT kept among
    them before torch 2.0 is left out. Raises FileNotFoundError without a file, and UserError for one that is
    damaged (every tensor's checksum is compared) or not the checkpoint of a GPT.
    """
    if not os.path.exists(path):
        raise FileNotFoundError(
            f"there is no checkpoint {path}; train first, or name its folder with --out_dir="
        )
    try:
        check_archive(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # torch and zipfile raise many kinds for a damaged or foreign file
        reason = str(e).partition("\n")[0] or type(e).__name__
        raise UserError(f"cannot read the checkpoint {path}, damaged or not one of ours: {reason}") from None
    if not isinstance(state, dict) or not {"model", "model_args"} <= state.keys():
        raise UserError(f"{path} is no checkpoint of a GPT: it lacks 'model' or 'model_args'")
    missing = [name for name in MODEL_ARGS if name not in state["model_args"]]
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)} in its model_args")
    state["model_args"] = {name: state["model_args"][name] for name in MODEL_ARGS}
    state.setdefault("arch", "gpt2")  # not in model_args, which nanoGPT passes to its GPTConfig
    state.setdefault("gelu", "none")
    weights = {strip(name): tensor for name, tensor in state["model"].items()}
    state["model"] = {name: tensor for name, tensor in weights.items() if not name.endswith(".attn.bias")}
    return state


def check_archive(path):
    """Raises BadZipFile at a wrong checksum: torch.load itself would take flipped bits for weights."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        if damaged := archive.testzip():
            raise zipfile.BadZipFile(f"the checksum of {damaged} is wrong")


def strip(name):
    while name.startswith(("_orig_mod.", "module.")):
        name = name.split(".", 1)[1]
    return name


# -----------------------------------------------------------------------------
# between a state and a run


def describe(model, tokenizer):
    """Returns what a state says of a model: all that make_gpt and make_tokenizer need to rebuild both."""
    model_args = {name: getattr(model.config, name) for name in MODEL_ARGS}
    return dict(
        model_args=model_args, gelu=model.config.gelu, arch=model.config.arch, tokenizer=tokenizer.fields()
    )


def weights_state(run):
    """Returns what best.pt holds of a Run of train.py: the weights before iteration iter_num, a description
    of them, and how far the run has come."""
    state = describe(run.model, run.tokenizer)
    state["model"] = run.model.state_dict()
    state["data"] = run.fingerprint
    state["config"] = dataclasses.asdict(run.cfg)
    state["seconds"] = time.perf_counter() - run.started
    return state | dataclasses.asdict(run.at)


def whole_state(run):
    """Returns what ckpt.pt holds: everything that resuming needs."""
    moments = {name: optimizer.state_dict() for name, optimizer in run.optimizers.items()}
    return weights_state(run) | moments | dict(scaler=run.scaler.state_dict(), rng=run.rng)


def model_fields(state, tokenizer):
    """Returns GPTConfig's fields, a dict, for the model in a state from load and its Tokenizer."""
    return state["model_args"] | dict(arch=state["arch"], gelu=state["gelu"], n_ids=tokenizer.vocab_size)


def restore_model(model, state, path):
    """Loads the weights of a state from load(path). Raises UserError if they do not fit the model."""
    try:
        model.load_state_dict(state["model"])
    except RuntimeError as e:
        first = " ".join(str(e).splitlines()[1:2]).strip()
        raise UserError(f"the weights in {path} do not fit its model_args: {first}") from None


def restore_optimizers(optimizers, state, path):
    """Loads the moments of a state from load(path) into optimizers, dict(optimizer=AdamW) and perhaps
    muon=Muon. Settings (learning rate, decay, betas, fused) stay this run's.

    Raises UserError if the moments do not fit this run's optimizers and parameters.
    """
    before, now = ("muon" if "muon" in names else "adamw" for names in (state, optimizers))
    if before != now:
        raise UserError(
            f"{path} is of a run with --optimizer={before}, not {now}; moments differ: resume with the former"
        )
    for name, optimizer in optimizers.items():
        saved = state[name]
        sizes = [len(group["params"]) for group in saved["param_groups"]]
        if sizes != [len(group["params"]) for group in optimizer.param_groups]:
            kind = "Muon's" if name == "muon" else "AdamW's"
            raise UserError(
                f"the optimizer state in {path} is not {kind} in two groups of this model's parameters"
            )
        for group, current in zip(saved["param_groups"], optimizer.param_groups, strict=True):
            group.update({name: value for name, value in current.items() if name != "params"})
        optimizer.load_state_dict(saved)


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


# -----------------------------------------------------------------------------
# the files of a run


class RunFiles:
    """The files in out_dir that hold a run's state.

    ckpt.pt, ckpt_prev.pt (the state before it), best.pt, and before_cooldown.pt (a state to branch from).
    saved_iter is the iteration that ckpt.pt holds; None unless it is whole and of this run.
    """

    def __init__(self, out_dir):
        self.out_dir = out_dir
        self.ckpt = os.path.join(out_dir, "ckpt.pt")
        self.previous = os.path.join(out_dir, "ckpt_prev.pt")
        self.best = os.path.join(out_dir, "best.pt")
        self.before_cooldown = os.path.join(out_dir, "before_cooldown.pt")
        self.metrics = os.path.join(out_dir, "metrics.jsonl")
        self.saved_iter = None
        self.newest = None  # path of the newest whole state of this run
        self.kept = "nothing of this run is saved yet"  # which state that is, in words

    def exist(self):
        return os.path.exists(self.ckpt) or os.path.exists(self.previous)

    def load(self):
        """Returns (state, None) of ckpt.pt or, if damaged or missing, (state, reason) of ckpt_prev.pt.

        Raises what load(ckpt.pt) raises if it is the only one, and UserError if neither can be resumed from.
        """
        state, reason = self.load_either()
        if not {"optimizer", "iter_num", "best_val_loss"} <= state.keys():
            raise UserError(f"{self.newest} holds weights only, no optimizer state to resume from")
        if self.newest == self.ckpt:
            self.saved_iter = state["iter_num"]
        self.kept = f"{self.newest} holds iteration {state['iter_num']}"
        return state, reason

    def load_either(self):
        self.newest = self.ckpt
        try:
            return load(self.ckpt), None
        except (FileNotFoundError, UserError) as e:
            if not os.path.exists(self.previous):
                raise
            reason = str(e) if os.path.exists(self.ckpt) else f"{self.ckpt} is missing"
        self.newest = self.previous
        try:
            return load(self.previous), reason
        except UserError as e:
            raise UserError(f"{reason}; and {e}") from None

    def save(self, state):
        """Writes ckpt.pt; the one before becomes ckpt_prev.pt if whole and of this run. Returns as write."""
        previous = None if self.saved_iter is None else self.previous
        if not self.write(self.ckpt, state, previous):
            return False
        if self.newest is None:
            remove(self.previous)  # of an earlier run
        self.newest = self.ckpt
        self.saved_iter = state["iter_num"]
        self.kept = f"{self.ckpt} holds iteration {self.saved_iter}"
        return True

    def write(self, path, state, previous=None):
        """Writes a state to path. Returns whether that was possible; if not, for example on a full disk, it
        warns, and the file that was there stays: the run can continue and try again."""
        try:
            save(path, state, previous)
        except OSError as e:
            if e.errno == errno.ENOSPC and previous and os.path.exists(previous):
                warn(f"deleting {previous} to save iteration {state['iter_num']}: {e}")
                remove(previous)  # ckpt.pt is whole, and a new state is worth more than a second old one
                return self.write(path, state, previous)
            warn(f"cannot save iteration {state['iter_num']}: {e}; {self.kept}")
            return False
        except UserError as e:
            raise UserError(
                f"{e}; {self.kept}. Try a lower --learning_rate or --grad_clip=1.0 from there"
            ) from None
        return True

    def remove_partial(self):
        """Removes files that a killed run had not finished writing."""
        for path in (self.ckpt, self.best, self.before_cooldown, self.metrics):
            remove(f"{path}.tmp")
