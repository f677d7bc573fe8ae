"""
A run's state on disk: ckpt.pt with everything that continuing needs, best.pt with the best weights, metrics.jsonl.

Both .pt files are one dict of tensors and plain values, a superset of nanoGPT's, so that nanoGPT reads ours and we
read nanoGPT's; they load with weights_only=True and cannot run code.
"""

import json
import os
import zipfile

import torch

from shards import atomic_file

MODEL_ARGS = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")


def save(path, state):
    """Writes the dict state to path. Until the new file is whole and on disk, the one that was there stays.

    Raises OSError, as for any file, if the disk is full or the folder cannot be written."""
    try:
        with atomic_file(path) as f:
            torch.save(state, f)
    except RuntimeError as e:  # what torch makes of an OSError in the middle of its own format
        raise OSError(f"cannot write {path}: {e.__context__ or e}") from e


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
    weights = {strip(name): tensor for name, tensor in state["model"].items()}
    state["model"] = {name: tensor for name, tensor in weights.items() if not name.endswith(".attn.bias")}
    return state


def strip(name):
    while name.startswith(("_orig_mod.", "module.")):
        name = name.split(".", 1)[1]
    return name


def restore_model(model, state, path):
    """Loads the weights of a state from load(path). Raises ValueError if they are not those of this model."""
    try:
        model.load_state_dict(state["model"])
    except RuntimeError as e:
        first = " ".join(str(e).splitlines()[1:2]).strip()
        raise ValueError(f"the weights in {path} do not fit its model_args: {first}") from None


def restore_optimizer(optimizer, saved, path):
    """Loads the moments of a saved optimizer state; settings (learning rate, decay, betas, fused) stay this run's.

    Raises ValueError if they are not those of this model's parameters."""
    sizes = [len(group["params"]) for group in saved["param_groups"]]
    if sizes != [len(group["params"]) for group in optimizer.param_groups]:
        raise ValueError(
            f"the optimizer state in {path} is not AdamW's in two groups, as nanoGPT and this project save it"
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
