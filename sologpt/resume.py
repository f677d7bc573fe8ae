"""
Resuming from a checkpoint: what has to match, how this run will differ, and where the last one stopped.
"""

import dataclasses
import time

from sologpt import checkpoint, huggingface
from sologpt.errors import UserError
from sologpt.log import warn


def load_state(cfg, files):
    """Returns the state to resume from, or None if there is none or it is not wanted."""
    if cfg.init_from == "resume" or (cfg.init_from == "auto" and files.exist()):
        state, reason = files.load()
        if reason:
            warn(f"{reason}; taking {files.newest} instead")
        if state["iter_num"] > cfg.max_iters:
            raise UserError(
                f"{files.newest} is at iteration {state['iter_num']}, past max_iters={cfg.max_iters}"
            )
        return state
    if files.exist() and not cfg.eval_only:
        print(f"{files.ckpt} of an earlier run will be overwritten; --init_from=resume would continue it")
    return None


def with_architecture(cfg, fields, source):
    """Returns train.py's cfg with the architecture in fields, those of GPTConfig for the model in source, a
    path or a name. Raises UserError, with all that differs, if the user has set another one."""
    saved = {name: fields[name] for name in ("arch", "n_layer", "n_head", "n_embd", "block_size", "bias")}
    differing = [name for name in saved if name in cfg.given and getattr(cfg, name) != saved[name]]
    if differing:
        listed = ", ".join(f"{name}={saved[name]}, not {getattr(cfg, name)}" for name in differing)
        raise UserError(
            f"{source} has another architecture: {listed}; omit these, or start anew in another --out_dir"
        )
    changed = dataclasses.replace(cfg, **saved)
    changed.given = cfg.given
    return changed


def check_vocabulary(vocab_size, source, tokenizer, folder):
    """Raises UserError if a model with vocab_size rows, from source, cannot train on the data in folder."""
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"{folder} has {tokenizer.vocab_size} token ids, the model in {source} only {vocab_size}"
        )
    if source in huggingface.PRETRAINED and tokenizer.encoding != "gpt2":
        raise UserError(f"{folder} was made with the encoding {tokenizer.encoding!r}, {source} with gpt2")


def check_data(cfg, state, data, folder, path):
    """Raises UserError, or warns if allowed, if data (a shards.fingerprint) is not that of path's state."""
    changes = data_changes(state, data)
    if not changes:
        return
    text = f"{folder} is not what {path} was trained on: {changes}"
    if not (cfg.allow_data_change or cfg.eval_only):
        raise UserError(f"{text}; to continue with it anyway: --allow_data_change=True")
    warn(text)


def data_changes(state, data):
    """Returns how data, from shards.fingerprint, differs from that of a state: up to four phrases in one
    string, empty if it does not, or if the state is nanoGPT's, which records no data."""
    before = state.get("data", data)
    differing = [name for name in sorted(before | data) if before.get(name) != data.get(name)]
    phrases = [
        f"{name}: {data.get(name, 'missing')}, was {before.get(name, 'missing')}" for name in differing[:4]
    ]
    if len(differing) > 4:
        phrases.append(f"and {len(differing) - 4} more")
    return "; ".join(phrases)


def restore(run, state):
    """Loads all of a state into a new Run of train.py."""
    path = run.files.newest
    at, iter_num = run.at, state["iter_num"]
    checkpoint.restore_model(run.model, state, path)
    checkpoint.restore_optimizers(run.optimizers, state, path)
    if state.get("scaler"):
        run.scaler.load_state_dict(state["scaler"])
    if "rng" in state:  # nanoGPT keeps none
        checkpoint.set_rng(state["rng"], run.machine.device)
    at.iter_num = run.first_iter = iter_num
    at.best_val_loss = float(state["best_val_loss"])
    at.tokens_seen = state.get("tokens_seen", iter_num * run.cfg.tokens_per_iter)
    at.bad_steps = state.get("bad_steps", 0)
    at.bad_in_row = state.get("bad_in_row", 0)
    run.started = time.perf_counter() - state.get("seconds", 0.0)
    print(f"resuming from {path} at iteration {iter_num}, best val loss {at.best_val_loss:.4f}")


def warn_of_changes(cfg, state, get_lr):
    """Warns of how a run with cfg will differ from the one it resumes: by a learning rate, from train.py's
    get_lr, that is more than 1 % off at this iteration, and by another order of the data."""
    if cfg.eval_only:
        return
    it = state["iter_num"]
    known = {f.name for f in dataclasses.fields(cfg)}
    before = dataclasses.replace(cfg, **{k: v for k, v in state.get("config", {}).items() if k in known})
    lr, lr_before = get_lr(it, cfg), get_lr(it, before)
    if abs(lr - lr_before) > 0.01 * lr_before:
        expected = f"the schedule so far has {lr_before:.3e}"
        warn(f"the learning rate of iteration {it} is {lr:.3e}, {expected}")
    S, S_before = cfg.sequences_per_iter, before.sequences_per_iter
    if "data" in state and (S, cfg.seed) != (S_before, before.seed):  # nanoGPT's batches are random anyway
        warn(
            f"from here on the data comes in another order, parts of it twice or never: "
            f"{S} sequences per iteration and seed {cfg.seed}, so far {S_before} and seed {before.seed}"
        )
