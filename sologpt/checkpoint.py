"""
A run's state on disk: ckpt.pt with all that resuming needs, ckpt_prev.pt with the state before it,
best.pt with the best weights, and before_cooldown.pt for longer runs to start from.

Every .pt file is one dict of tensors and plain values, a superset of nanoGPT's: we read nanoGPT's, and it
reads ours of arch="gpt2". They load with weights_only=True and cannot run code.
"""

import collections
import dataclasses
import errno
import itertools
import math
import os
import pickle
import shutil
import time
import zipfile

import numpy as np
import torch

from sologpt import parallel
from sologpt.display import say, warn
from sologpt.errors import UserError, first_line, first_mismatch, out_of_memory
from sologpt.files import atomic_file, remove, remove_temporary
from sologpt.optim import new_moments
from sologpt.tokenizer import make_tokenizer

NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
NUMBER = (int, float)
# types of the parts of a state
TYPES = dict(
    model=dict,
    model_args=dict,
    arch=str,
    gelu=str,
    more_args=dict,
    tokenizer=dict,
    data=dict,
    config=dict,
    dtype=str,
    optimizer=dict,
    muon=dict,
    scaler=dict,
    rng=dict,
    iter_num=int,
    best_val_loss=(*NUMBER, torch.Tensor),
    tokens_seen=int,
    seconds=NUMBER,
    bad_steps=int,
    bad_in_row=int,
    resumed=int,
    eval_seconds=NUMBER,
    pretrained=bool,
    other_tokens=int,
    shifting=bool,
    steps=list,
)
# those that are never negative
COUNTS = "iter_num tokens_seen other_tokens seconds bad_steps bad_in_row resumed eval_seconds".split()
# and of its model_args: the fields of GPTConfig that nanoGPT has too
MODEL_ARGS = dict(
    n_layer=int, n_head=int, n_embd=int, block_size=int, bias=bool, vocab_size=int, dropout=NUMBER
)


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
    if not all_finite(tensor for tensor in found if tensor.is_floating_point()):
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
        number = getattr(e.__context__, "errno", errno.EIO)
        raise OSError(number, getattr(e.__context__, "strerror", str(e)), path) from e


def all_finite(floats):
    """Whether tensors of floats hold no NaN and no infinity. One sync for each device, whatever their
    number."""
    bounds = collections.defaultdict(list)
    for tensor in floats:
        low, high = tensor.aminmax()  # a NaN spreads to both
        bounds[tensor.device] += [low.float(), high.float()]
    for bounds_of_device in bounds.values():
        if not torch.stack(bounds_of_device).isfinite().all():
            return False
    return True


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
    them before torch 2.0 is left out. A model of the modern architecture from before it had value embeddings
    and smear gets zeros for these, which change nothing, and "earlier_version" in the state is True.

    Raises FileNotFoundError without a file, and UserError for one that is damaged (every tensor's checksum is
    compared) or not the checkpoint of a GPT.
    """
    if not os.path.exists(path):
        raise FileNotFoundError(
            f"there is no checkpoint {path}; train first, or name its folder with --out_dir="
        )
    try:
        check_archive(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # torch and zipfile raise many kinds for a damaged or foreign file
        if out_of_memory(e):
            raise
        reason = first_line(e)
        if isinstance(e, pickle.UnpicklingError):  # torch's text is how to load it all the same
            reason = "it is not a torch checkpoint, or it holds objects that could run code"
        raise UserError(f"cannot read the checkpoint {path}, damaged or not one of ours: {reason}") from None
    if not isinstance(state, dict) or not {"model", "model_args"} <= state.keys():
        raise UserError(f"{path} is not a GPT checkpoint: it lacks 'model' or 'model_args'")
    check_types(state, path)
    state["model_args"] = dict(bias=True) | state["model_args"]  # nanoGPT's oldest had no choice
    missing = [name for name in MODEL_ARGS if name not in state["model_args"]]
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)} in its model_args")
    unknown = sorted(map(str, state["model_args"].keys() - MODEL_ARGS.keys()))
    if unknown:
        raise UserError(f"{path} is of another model: its model_args have {', '.join(unknown)}, unknown here")
    state.setdefault("arch", "gpt2")  # not in model_args, which nanoGPT passes to its GPTConfig
    state.setdefault("gelu", "none")
    state.setdefault("more_args", {})
    weights = {strip(name): tensor for name, tensor in state["model"].items()}
    state["model"] = {name: tensor for name, tensor in weights.items() if not name.endswith(".attn.bias")}
    check_sizes(state, path)
    state["earlier_version"] = state["arch"] == "modern" and "smear" not in state["model"]
    if state["earlier_version"]:
        table = torch.zeros(1, 1).expand_as(state["model"]["transformer.wte.weight"])  # takes no memory
        state["model"] |= {"transformer.wve.weight": table, "smear": torch.zeros(1)}
        state["model"]["smear_gate"] = torch.zeros(min(12, state["model_args"]["n_embd"]))  # GATE_WIDTH
    return state


def summary(path):
    """Returns iter_num, best_val_loss, config and, but for nanoGPT's, data of a checkpoint, without reading
    its tensors, in a dict; None if there is none or it cannot be read."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        found = dict(iter_num=int(state["iter_num"]), best_val_loss=float(state["best_val_loss"]))
        found["config"] = dict(state.get("config", {}))
        if "data" in state:
            found["data"] = dict(state["data"])
        return found
    except Exception:  # torch raises many kinds for a damaged file; load, which needs it, says which
        return None


def check_types(state, path):
    """Raises UserError for a part of a state that is not of its type, or a number out of range."""
    check_type_of_each(state, TYPES, path)
    check_type_of_each(state["model_args"], MODEL_ARGS, path)
    for name, tensor in state["model"].items():
        if type(name) is not str or not torch.is_tensor(tensor):
            raise UserError(f"{path} is damaged: its model holds {name!r}, which is not a named tensor")
    for name, text in state.get("data", {}).items():
        if type(name) is not str or type(text) is not str:
            raise UserError(f"{path} is damaged: its data holds {name!r}, which is not a named text")
    for name in COUNTS:
        if not 0 <= state.get(name, 0) < 2**63:
            raise UserError(f"{path} is damaged: its {name} is {state[name]}")
    for name in state.get("more_args", {}):
        if type(name) is not str or name in (*MODEL_ARGS, "arch", "gelu", "n_ids"):
            raise UserError(f"{path} is damaged: its more_args hold {name!r}")
    try:
        loss = torch.as_tensor(state.get("best_val_loss", 0.0))
    except (ValueError, OverflowError):  # an integer that is too large
        loss = torch.tensor(math.nan)
    if loss.numel() != 1 or loss.isnan():
        raise UserError(f"{path} is damaged: its best_val_loss is {state['best_val_loss']}")
    dropout = state["model_args"].get("dropout", 0.0)
    if not 0 <= dropout < 1:
        raise UserError(f"{path} is damaged: its dropout is {dropout}")
    if "tokenizer" in state:
        try:
            make_tokenizer(state["tokenizer"])
        except UserError as e:
            raise UserError(f"{path} is damaged: {e}") from None


def check_type_of_each(values, types, path):
    for name in types.keys() & values.keys():
        value, allowed = values[name], types[name]
        is_flag = type(value) is bool and allowed is not bool  # for Python a bool is an int too
        if is_flag or not isinstance(value, allowed):
            raise UserError(f"{path} is damaged: its {name} is of the type {type(value).__name__}")


def check_sizes(state, path):
    """Raises UserError if model_args do not match the weights, before a model of perhaps enormous sizes is
    made."""
    args, weights = state["model_args"], state["model"]
    layers = {name.split(".")[2] for name in weights if name.startswith("transformer.h.")}
    table = weights.get("transformer.wte.weight", torch.empty(0))
    shape = list(table.shape)
    if len(layers) != args["n_layer"] or shape != [args["vocab_size"], args["n_embd"]]:
        raise UserError(
            f"the weights in {path} do not fit its model_args: {len(layers)} layers, an embedding of {shape}"
        )


def check_archive(path):
    """Raises BadZipFile at a wrong checksum, since torch.load itself would take flipped bits for weights, and
    for compressed parts: torch writes none, and they could be of any size in memory."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        if any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist()):
            raise zipfile.BadZipFile("it has compressed parts, which torch.save does not write")
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
    fields = dataclasses.asdict(model.config)
    del fields["n_ids"]  # the tokenizer's
    state = dict(arch=fields.pop("arch"), gelu=fields.pop("gelu"), tokenizer=tokenizer.fields())
    state["model_args"] = {name: fields.pop(name) for name in MODEL_ARGS}
    state["more_args"] = fields  # what somebody has added to GPTConfig
    return state


def weights_state(run):
    """Returns what best.pt holds of a Run of train.py: the weights before iteration iter_num, a description
    of them, and how far the run has come."""
    state = describe(run.model, run.tokenizer)
    state["model"] = run.model.state_dict()
    state["data"] = run.fingerprint
    state["config"] = dataclasses.asdict(run.cfg)
    state["dtype"] = run.machine.dtype
    state["seconds"] = time.perf_counter() - run.started
    return state | dataclasses.asdict(run.progress)


def whole_state(run):
    """Returns what ckpt.pt holds: everything that resuming needs."""
    moments = {name: optimizer.state_dict() for name, optimizer in run.optimizers.items()}
    rest = dict(scaler=run.scaler.state_dict(), rng=run.rng, shifting=run.train_data.shifting)
    rest["steps"] = steps_of(moments["optimizer"])
    return weights_state(run) | moments | rest


def steps_of(saved):
    """Returns how many updates each parameter has had, from AdamW's state_dict: fewer if it was frozen for a
    while. Raises TypeError if one is no number."""
    steps = [moments["step"] for moments in saved["state"].values()]
    steps = [step.item() if torch.is_tensor(step) else step for step in steps]
    if not {type(step) for step in steps} <= {int, float}:
        raise TypeError
    return steps


def began_trained(state):
    """Whether the weights were trained at iteration 0 already, as a finetuned model's are. Earlier versions
    recorded only how the last process began."""
    init_from = state.get("config", {}).get("init_from")
    return state.get("pretrained", init_from not in ("scratch", "auto"))


def model_fields(state, path, config_class):
    """Returns the fields of config_class, GPTConfig, but n_ids, for the model in a state from load(path).
    Raises UserError if it was trained where GPTConfig has fields that this one lacks."""
    unknown = state["more_args"].keys() - config_class.__dataclass_fields__.keys()
    if unknown:
        listed = ", ".join(sorted(unknown))
        raise UserError(
            f"the model in {path} has {listed}, which this model.py lacks; use the one that wrote it"
        )
    return state["model_args"] | state["more_args"] | dict(arch=state["arch"], gelu=state["gelu"])


def restore_model(model, state, path):
    """Loads the weights of a state from load(path). Raises UserError if they do not fit the model, or if
    GPT-2's head is not its embedding, which would have taken the head's weights."""
    try:
        model.load_state_dict(state["model"])
    except RuntimeError as e:
        raise UserError(f"the weights in {path} do not fit its model_args: {first_mismatch(e)}") from None
    head, table = state["model"]["lm_head.weight"], state["model"]["transformer.wte.weight"]
    if model.config.arch == "modern" or head.data_ptr() == table.data_ptr():  # tied, even if of NaN
        return
    if not torch.equal(head, table):
        raise UserError(f"{path} has an untied output head; GPT-2's is tied to the token embedding")


def restore_optimizers(optimizers, state, path):
    """Loads the moments of a state from load(path) into optimizers, dict(optimizer=AdamW) and perhaps
    muon=Muon. Settings (learning rate, decay, betas, fused) stay this run's.

    Raises UserError if the moments do not fit this run's optimizers and parameters.
    """
    if state["earlier_version"]:
        raise UserError(
            f"{path} has an earlier version of arch='modern', which sample.py reads but train.py cannot "
            f"resume; finish it with the soloGPT that began it, or start anew in another --out_dir"
        )
    before = "muon" if "muon" in state else "adamw"
    now = "muon" if "muon" in optimizers else "adamw"
    if before != now:
        raise UserError(
            f"{path} was saved with --optimizer={before}, not {now}; resume with --optimizer={before}"
        )
    what_now = "finish it with the soloGPT that began it, or start anew in another --out_dir"
    reason = ""
    if "data" not in state:
        reason = " (an old nanoGPT's)"
        what_now = "export it with sample.py --export=FOLDER, then train with --init_from=FOLDER"
    for name, optimizer in optimizers.items():
        saved = state[name]
        kind = "AdamW"
        if name == "muon":
            kind = "Muon"
            reason = " (as that of earlier versions)"
        try:
            fits = moments_fit(saved, optimizer, state.get("steps"))
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError):  # it is built otherwise
            fits = False
        if not fits:
            raise UserError(
                f"the optimizer state in {path} does not fit {kind} for this model: groups of parameters "
                f"or moments differ{reason}; {what_now}"
            )
        for group, current in zip(saved["param_groups"], optimizer.param_groups, strict=True):
            group.update({name: value for name, value in current.items() if name != "params"})
        optimizer.load_state_dict(saved)


def moments_fit(saved, optimizer, recorded):
    """Whether the state_dict of an optimizer has the moments of this one's parameters, and nothing else:
    torch itself would take moments of any shape, and crash in the update. recorded: the steps_of AdamW, which
    must be all the same where a state does not have them."""
    if any(type(part) is not dict for part in (*saved["param_groups"], *saved["state"].values())):
        return False
    groups = [group["params"] for group in saved["param_groups"]]
    params = [group["params"] for group in optimizer.param_groups]
    numbers = [number for group in groups for number in group]
    if [len(group) for group in groups] != [len(group) for group in params]:
        return False
    if set(saved["state"]) != set(numbers):
        return False
    expected = []
    for group in optimizer.param_groups:
        expected += [moment_shapes(optimizer, group, p) for p in group["params"]]
    for number, shapes in zip(numbers, expected, strict=True):
        moments = saved["state"][number]
        if not shapes.keys() <= moments.keys() <= {*shapes, "step"}:
            return False
        for name, shape in shapes.items():
            if moments[name].shape != shape or not moments[name].is_floating_point():
                return False
    if isinstance(optimizer, torch.optim.Muon):
        return True
    steps = steps_of(saved)
    if recorded is not None:
        return steps == recorded
    return len(set(steps)) == 1 and steps[0] >= 0


def moment_shapes(optimizer, group, p):
    """Returns the shapes of a parameter's moments by their names, a dict."""
    moments = new_moments(optimizer, group, p.to("meta"))  # takes no memory
    return {name: moment.shape for name, moment in moments.items() if name != "step"}


def get_rng(device):
    """Returns torch's random state, which dropout draws from, on the CPU and on a CUDA device."""
    rng = dict(cpu=torch.get_rng_state())
    if device.type == "cuda":
        rng["cuda"] = torch.cuda.get_rng_state(device)
    return rng


def start_rng(run):
    """Seeds torch for an iteration of a Run of train.py in all processes but 0, so that their dropout
    differs, and is the same in a resumed run. Returns the random state; that of process 0 goes on from
    iteration to iteration, and is saved."""
    if parallel.rank():
        seed = np.random.SeedSequence([run.cfg.seed, parallel.rank(), run.progress.iter_num])
        torch.manual_seed(int(seed.generate_state(1)[0]))
    return get_rng(run.machine.device)


def set_rng(rng, device):
    """Sets torch's random state to what get_rng returned."""
    torch.set_rng_state(rng["cpu"])
    if device.type == "cuda" and "cuda" in rng:
        torch.cuda.set_rng_state(rng["cuda"], device)


# -----------------------------------------------------------------------------
# the files of a run


class RunFiles:
    """The files in out_dir that hold a run's state.

    ckpt.pt, ckpt_prev.pt (the state before it), best.pt, best_before.pt (what that was before its losses were
    no longer comparable), and before_cooldown.pt (a state to branch from). saved_iter is the iteration that
    ckpt.pt holds; None unless it is whole and of this run.
    """

    def __init__(self, out_dir):
        self.out_dir = out_dir
        self.ckpt = os.path.join(out_dir, "ckpt.pt")
        self.previous = os.path.join(out_dir, "ckpt_prev.pt")
        self.best = os.path.join(out_dir, "best.pt")
        self.best_before = os.path.join(out_dir, "best_before.pt")
        self.before_cooldown = os.path.join(out_dir, "before_cooldown.pt")
        self.metrics = os.path.join(out_dir, "metrics.jsonl")
        self.saved_iter = None
        self.newest = None  # path of the newest whole state of this run
        self.best_anew = False  # whether the next best.pt does not compare to the one that is there
        self.nanogpts = False  # whether ckpt.pt is nanoGPT's, which may be the best of its run
        self.saved_text = "nothing of this run is saved yet"  # what the newest state is, in words

    def exist(self):
        return os.path.exists(self.ckpt) or os.path.exists(self.previous)

    def load(self):
        """Returns (state, None) of ckpt.pt or, if damaged or missing, (state, reason) of ckpt_prev.pt.

        Raises what load(ckpt.pt) raises if it is the only one, and UserError if neither can be resumed from.
        """
        state, reason = self.load_either()
        if not {"optimizer", "iter_num", "best_val_loss"} <= state.keys():
            raise UserError(f"{self.newest} holds weights only, no optimizer state to resume from")
        if "data" in state and "rng" not in state:  # nanoGPT's has neither
            raise UserError(f"{self.newest} is damaged: it lacks the random state")
        if self.newest == self.ckpt:
            self.saved_iter = state["iter_num"]
        self.saved_text = f"{self.newest} holds iteration {state['iter_num']}"
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
        """Writes ckpt.pt; the one before becomes ckpt_prev.pt if whole and of this run, or, if nanoGPT's,
        best_before.pt. Returns as write."""
        previous = None if self.saved_iter is None else self.previous
        if self.nanogpts:
            previous = self.best_before
        if not self.write(self.ckpt, state, previous):
            return False
        self.nanogpts = False
        self.newest = self.ckpt
        self.saved_iter = state["iter_num"]
        self.saved_text = f"{self.ckpt} holds iteration {self.saved_iter}"
        return True

    def write(self, path, state, previous=None, make_room=True):
        """Writes a state to path. Returns whether that was possible; if not, for example on a full disk, it
        warns, and the file that was there stays: the run can continue and try again. make_room: whether
        previous may be deleted for it. Of several processes the first one writes."""
        if parallel.rank():
            return True
        try:
            if not os.path.isdir(self.out_dir):
                warn(f"{self.out_dir} is no longer there; it is made anew")
                os.makedirs(self.out_dir)
            save(path, state, previous)
        except OSError as e:
            two = previous and os.path.exists(previous) and os.path.exists(path)
            if make_room and e.errno in NO_ROOM and two:
                warn(f"deleting {previous} to save iteration {state['iter_num']}: {e.strerror}")
                remove(previous)  # ckpt.pt is whole, and a new state is worth more than a second old one
                return self.write(path, state, previous, make_room=False)
            reason = f"cannot write {path}: {e.strerror or e}"
            warn(f"cannot save iteration {state['iter_num']}: {reason}; {self.saved_text}")
            return False
        except UserError as e:
            raise UserError(
                f"{e}; {self.saved_text}. Try a lower --learning_rate or --grad_clip=1.0"
            ) from None
        return True

    def remove_partial(self):
        """Removes files that a killed run had not finished writing."""
        for path in self.all():
            remove_temporary(path)

    def all(self):
        """Returns the paths of a run's files, ckpt.pt last: while it is there, a run can be resumed."""
        drawn = [os.path.join(self.out_dir, name) for name in ("run.html", "run.png", "tensorboard")]
        best = [self.best_before, self.best]
        return [*drawn, self.metrics, *best, self.before_cooldown, self.previous, self.ckpt]

    def set_aside(self):
        """Moves the files of an earlier run to earlier-1/, earlier-2/, ... in out_dir. Returns that folder,
        or None if there were none."""
        found = [path for path in self.all() if os.path.exists(path)]
        if not found:
            return None
        numbers = itertools.count(1)
        folders = (os.path.join(self.out_dir, f"earlier-{number}") for number in numbers)
        folder = next(folder for folder in folders if not os.path.exists(folder))
        os.makedirs(folder)
        for path in found:
            os.replace(path, os.path.join(folder, os.path.basename(path)))
        return folder


# -----------------------------------------------------------------------------
# what a Run of train.py saves


def save_checkpoint(run):
    run.metrics.sync()
    if run.files.save(whole_state(run)):
        say(f"saving checkpoint to {run.cfg.out_dir}")
        run.metrics.record("checkpoint", run.progress.iter_num, best_val_loss=run.progress.best_val_loss)


def save_best(run, val_loss):
    """Writes best.pt, but not of random weights, unless they are all that a run is to have. Returns False if
    it could not be written."""
    at, files = run.progress, run.files
    if not at.pretrained and at.iter_num == 0 and run.cfg.max_iters > 0:
        return True
    previous = files.best_before if files.best_anew else None
    written = files.write(files.best, weights_state(run) | dict(best_val_loss=val_loss), previous)
    if written:
        files.best_anew = False
    return written


def save_before_cooldown(run):
    path = run.files.before_cooldown
    existing = summary(path)
    # one from first_iter or later is of iterations that this process makes anew
    if existing and existing["iter_num"] < run.first_iter:
        say(f"{path} is kept: it is from before the first cooldown of this run")
        return
    if run.files.write(path, whole_state(run)):
        say(f"saving {path}, from which a longer run can start (docs/recipe.md)")


def save_progress(run):
    """Saves the state before an unfinished iteration, unless this process has started from it or saved it."""
    iter_num = run.progress.iter_num
    if iter_num > run.first_iter and run.files.saved_iter != iter_num and not parallel.rank():
        save_checkpoint(run)
