"""
Resuming from a checkpoint: what has to match, how this run will differ, and where the last one stopped.
"""

import dataclasses
import math
import os
import zlib

import torch

from sologpt import checkpoint, huggingface, parallel, shards
from sologpt.display import warn
from sologpt.errors import UserError
from sologpt.layers import recast_weights
from sologpt.log import share_of


def init_from_problem(init_from):
    """Returns what is wrong with a value of train.py's init_from, or None."""
    names = ("scratch", "resume", "auto", *huggingface.PRETRAINED)
    if init_from == "best":
        return (
            "init_from='best' is for sample.py, as best.pt holds weights only; use init_from='resume', or, "
            "to finetune GPT-2's weights, sample.py --init_from=best --export=FOLDER and init_from=FOLDER"
        )
    if init_from not in names and not os.path.isdir(init_from):
        return f"init_from must be {', '.join(map(repr, names))} or a folder, not {init_from!r}"
    return None


def load_state(cfg, files):
    """Returns the state to resume from, or None if there is none or it is not wanted."""
    if cfg.init_from == "resume" or (cfg.init_from == "auto" and files.exist()):
        state, reason = files.load()
        if reason:
            warn(f"{reason}; taking {files.newest} instead")
        if state["iter_num"] > cfg.max_iters and not cfg.eval_only:
            raise UserError(
                f"{files.newest} is at iteration {state['iter_num']}, past max_iters={cfg.max_iters}; "
                f"to train on, raise --max_iters"
            )
        return state
    if cfg.init_from == "auto":
        print(f"note: init_from='auto' finds nothing to resume in {cfg.out_dir}: a new model from scratch")
    return None


def with_architecture(cfg, fields, source, resuming):
    """Returns train.py's cfg with the architecture in fields, those of GPTConfig for the model in source, a
    path or a name. If the user has set another one, raises UserError, with all that differs, when resuming;
    else, as in nanoGPT, the model's is taken, with a warning."""
    saved = {name: value for name, value in fields.items() if hasattr(cfg, name) and name != "dropout"}
    differing = [name for name in saved if name in cfg.given and getattr(cfg, name) != saved[name]]
    listed = ", ".join(f"{name}={saved[name]}, not {getattr(cfg, name)}" for name in differing)
    if differing and resuming:
        flags = " ".join(f"--{name}={saved[name]}" for name in differing)
        raise UserError(
            f"{source} has another architecture: {listed}; add {flags} to go on with it, or start anew in "
            f"another --out_dir"
        )
    if differing:
        warn(f"the architecture is that of {source}: {listed}")
    changed = dataclasses.replace(cfg, **saved)
    changed.given = cfg.given
    changed.overruled = differing
    return changed


def check_vocabulary(vocab_size, source, tokenizer, folder, state):
    """Raises UserError if a model with vocab_size rows, from source, cannot train on the data in folder.
    state: the one that is resumed from, if any."""
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"{folder} has {tokenizer.vocab_size} token ids, the model in {source} only {vocab_size}"
        )
    if state and "tokenizer" not in state and not tokenizer.fits_nanogpts(vocab_size):
        raise UserError(
            f"the {tokenizer.vocab_size} ids of {folder} ({tokenizer.encoding}) are not the {vocab_size} "
            f"that nanoGPT trained {source} with; put nanoGPT's token files there, and their meta.pkl if any"
        )


def check_tokenizer(cfg, source, tokenizer, folder):
    """Raises UserError, or warns if allowed, if the pretrained model in source has another tokenizer than the
    data in folder, or does not say which it has."""
    theirs = huggingface.read_folder_tokenizer(source)
    if theirs == tokenizer:
        return
    text = f"{source} does not say which tokenizer it was trained with"
    if theirs:
        text = f"{source} was trained with the tokenizer {theirs.encoding} of {theirs.vocab_size} ids"
    text += f"; the data in {folder} are made with {tokenizer.encoding} of {tokenizer.vocab_size}"
    if not (cfg.allow_data_change or cfg.eval_only):
        raise UserError(f"{text}. If it is the same, or to train on it anyway: --allow_data_change=True")
    warn(text)


def check_data(cfg, state, data, folder, path):
    """Returns whether data, a shards.fingerprint, differs from that of path's state. Warns if so; raises
    UserError if that is not allowed."""
    changes = data_changes(state, data)
    if not changes:
        return False
    text = f"{folder} is not what {path} was trained on: {changes}"
    if not (cfg.allow_data_change or cfg.eval_only):
        raise UserError(f"{text}; to continue with it anyway: --allow_data_change=True")
    warn(text)
    return True


def data_changes(state, data):
    """Returns how data, from shards.fingerprint, differs from that of a state: up to four phrases in one
    string, empty if it does not, or if the state is nanoGPT's, which records no data."""
    before = state.get("data", data)
    names = sorted(before | data)
    differing = [name for name in names if not shards.same_file(before.get(name), data.get(name))]
    phrases = [
        f"{name}: {data.get(name, 'missing')}, was {before.get(name, 'missing')}" for name in differing[:4]
    ]
    if len(differing) > 4:
        phrases.append(f"and {len(differing) - 4} more")
    return "; ".join(phrases)


def of_training(data):
    """Returns those entries of a shards.fingerprint that are of training files."""
    return {name: entry for name, entry in data.items() if shards.split_of(name) == "train"}


def check_alike(run):
    """Raises UserError if the processes of a Run of train.py would not do the same: those of several machines
    may see other files."""
    start = repr((dataclasses.asdict(run.cfg), run.machine.dtype, run.fingerprint, run.progress))
    number = float(zlib.crc32(start.encode()))
    # the largest and the smallest are this one only if all are equal
    if parallel.all_reduce([number, -number], parallel.MAX) != [number, -number]:
        raise UserError("the processes differ in command, data or out_dir; start all with the same ones")


def restore(run, state, data_changed):
    """Loads all of a state into a new Run of train.py. Its best loss is kept if later ones compare to it."""
    path = run.files.newest
    at = run.progress
    iter_num = state["iter_num"]
    checkpoint.restore_model(run.model, state, path)
    recast_weights(run.model)
    checkpoint.restore_optimizers(run.optimizers, state, path)
    restore_scaler_and_rng(run, state, path)
    run.train_data.shifting = state.get("shifting", "data" not in state)  # nanoGPT's has no order to keep
    at.iter_num = run.first_iter = iter_num
    at.best_val_loss, best_note = lowest_loss(run.files.best, state)
    at.tokens_seen = state.get("tokens_seen", iter_num * settings_before(run.cfg, state).tokens_per_iter)
    at.other_tokens = state.get("other_tokens", 0)
    if data_changed:
        at.other_tokens = at.tokens_seen
    at.pretrained = checkpoint.began_trained(state)
    at.bad_steps = state.get("bad_steps", 0)
    at.bad_in_row = state.get("bad_in_row", 0)
    at.resumed = state.get("resumed", 0) + 1
    at.eval_seconds = float(state.get("eval_seconds", 0.0))
    run.started -= state.get("seconds", 0.0)
    print(f"resuming from {path} at iteration {iter_num}, best val loss {at.best_val_loss:.4f}")
    if reason := other_evaluations(run, state, data_changed):
        at.best_val_loss = math.inf
        best_note = f"{reason}: the best val loss, and best.pt, start anew"
    if run.cfg.eval_only:
        return
    run.files.nanogpts = "data" not in state and path == run.files.ckpt
    run.files.best_anew = math.isinf(at.best_val_loss) and checkpoint.summary(run.files.best) is not None
    if run.files.nanogpts:
        best_note += f"; nanoGPT's checkpoint becomes {run.files.best_before}"
    elif run.files.best_anew:
        best_note += f"; the one that is there becomes {run.files.best_before}"
    for note in [best_note, *notes_on_the_end(run, state)]:
        if note:
            print(f"note: {note}")


def notes_on_the_end(run, state):
    """Returns notes if a resumed Run of train.py has nothing left to do, or nothing constant to keep."""
    cfg = run.cfg
    notes = []
    absent = not os.path.exists(run.files.before_cooldown)
    if cfg.keep_before_cooldown and absent and state["iter_num"] > cfg.cooldown_start:
        notes.append(f"no {run.files.before_cooldown}: this run is past iteration {cfg.cooldown_start}")
    if state["iter_num"] == cfg.max_iters:
        notes.append(
            f"that is all of max_iters={cfg.max_iters}; to train on, raise --max_iters (docs/recipe.md)"
        )
    seconds = state.get("seconds", 0.0)
    if share_of(cfg, seconds) == 1:
        used = f"this run has taken {seconds / 60:.1f} minutes, all of max_minutes={cfg.max_minutes:g}"
        notes.append(f"{used}; to train on, raise --max_minutes")
    return notes


def other_evaluations(run, state, data_changed):
    """Returns why the validation losses of a state do not compare to those of a Run of train.py that resumes
    from it, or None if they do."""
    if data_changed:
        return "the data has changed"
    if "data" not in state:
        saved = state.get("config", {})
        trained_on = os.path.basename(os.path.normpath(str(saved.get("dataset", run.folder))))
        if trained_on != os.path.basename(os.path.normpath(run.folder)):
            warn(f"{run.files.newest} was trained on {trained_on}, from here on it is {run.folder}")
        return "nanoGPT evaluates random batches"
    if settings_before(run.cfg, state).eval_iters != run.cfg.eval_iters:
        return "eval_iters has changed"
    return None


def lowest_loss(best, state):
    """Returns the lowest validation loss that a state or best.pt, at this path, knows of, and what is to be
    said: a killed run may have saved best.pt later than the state. Infinite if that run had other data or
    another eval_iters, or if best.pt cannot be read."""
    loss = float(state["best_val_loss"])
    newest_best = checkpoint.summary(best)
    if newest_best is None and os.path.exists(best):
        return math.inf, f"{best} cannot be read; the next evaluation writes it anew"
    if newest_best is None:  # as where only ckpt.pt was copied, or before there was one
        return math.nextafter(loss, math.inf), ""  # so that the same weights, evaluated again, are written
    compares = eval_iters_of(newest_best["config"]) == eval_iters_of(state.get("config", {}))
    other_data = data_changes(state, newest_best.get("data", state.get("data", {})))
    if other_data or not compares:
        return math.inf, f"{best} is of other data or another eval_iters; it starts anew"
    best_iter, best_loss = newest_best["iter_num"], newest_best["best_val_loss"]
    if best_iter <= state["iter_num"] or not best_loss < loss:
        return loss, ""
    kept = f"{best}, of iteration {best_iter} and val loss {best_loss:.4f}, is kept until a lower one"
    return math.nextafter(best_loss, math.inf), kept  # reached again, the same loss is an improvement


def eval_iters_of(config):
    """Returns eval_iters of a saved config; None if that is no number."""
    value = config.get("eval_iters")
    return value if type(value) is int else None


def restore_scaler_and_rng(run, state, path):
    """Loads the state of the gradient scaler and torch's random state; nanoGPT keeps neither."""
    try:
        if state.get("scaler") and run.scaler.is_enabled():
            run.scaler.load_state_dict(state["scaler"])
            torch.full((), run.scaler.get_scale())  # fails now if the scale is no number
        if "rng" in state:
            checkpoint.set_rng(state["rng"], run.machine.device)
    except (RuntimeError, TypeError, KeyError, AttributeError) as e:
        raise UserError(f"{path} is damaged: its gradient scaler or random state: {e}") from None


SETTINGS = "dropout weight_decay grad_clip beta1 beta2 eval_iters matmul max_minutes".split()


def warn_of_changes(cfg, machine, state, get_lr, data):
    """Warns of how a run with cfg will differ from the one it resumes: by a learning rate, from train.py's
    get_lr, that is more than 1 % off at this iteration or a later one, by other SETTINGS or another dtype,
    and by another order of the data, of which a shards.fingerprint is given."""
    if cfg.eval_only:
        return
    it = state["iter_num"]
    before = settings_before(cfg, state)
    seconds = state.get("seconds", 0.0)
    share, share_before = share_of(cfg, seconds), share_of(before, seconds)
    end = min(cfg.max_iters, before.max_iters)
    for later in range(it, max(end, it + 1), max(1, (end - it) // 100)):
        lr = get_lr(later, cfg, share)
        lr_before = get_lr(later, before, share_before)
        if abs(lr - lr_before) > 0.01 * lr_before:
            so_far = f"the schedule so far has {lr_before:.3e}"
            text = f"the learning rate of iteration {later} is {lr:.3e}, {so_far}"
            if later == it:
                warn(text)
            else:  # as from before_cooldown.pt
                print(f"note: {text}")
            break
    changed = [name for name in SETTINGS if getattr(cfg, name) != getattr(before, name)]
    phrases = [f"{name}={getattr(cfg, name)}, was {getattr(before, name)}" for name in changed]
    if state.get("dtype", machine.dtype) != machine.dtype:
        phrases.append(f"dtype={machine.dtype}, was {state['dtype']}")
    S, S_before = cfg.sequences_per_iter, before.sequences_per_iter
    if "data" not in state and S != S_before:
        phrases.append(f"{S} sequences per iteration, was {S_before}")
    if phrases:
        warn(f"settings that change from here on: {'; '.join(phrases)}")
    if "data" not in state:  # nanoGPT's batches are random anyway
        return
    reasons = []
    if data_changes(dict(data=of_training(state["data"])), of_training(data)):
        reasons.append("other training data")
    if (S, cfg.seed) != (S_before, before.seed):
        reasons.append(
            f"{S} sequences per iteration and seed {cfg.seed}, so far {S_before} and seed {before.seed}"
        )
    if reasons:
        warn(
            f"from here on the data comes in another order; parts of it will be seen twice or never: "
            f"{'; '.join(reasons)}"
        )


# what nanoGPT does, and its checkpoints do not say
NANOGPTS = dict(schedule="cosine", max_minutes=0.0)


def settings_before(cfg, state):
    """Returns cfg with the values that the state was saved with, as far as it records them."""
    return cfg.with_saved(NANOGPTS | state.get("config", {}))
