"""
Write text with a trained model.

    python sample.py --out_dir=out --start="Once upon a time" --num_samples=3

The text goes to stdout, each sample followed by a line of dashes; everything else goes to stderr.
"""

import os
import sys
from dataclasses import dataclass

import torch

import checkpoint
import hardware
import shards
from configurator import Config, from_command_line, key
from model import GPT, GPTConfig


@dataclass
class SampleConfig(Config):
    init_from: str = key("resume", "resume: out_dir/ckpt.pt, the newest weights; best: out_dir/best.pt")
    out_dir: str = key("out", "folder that train.py wrote")
    start: str = key("\n", "prompt; FILE:prompt.txt reads it from a file; may hold <|endoftext|>")
    num_samples: int = key(10, "samples to draw", low=1)
    max_new_tokens: int = key(500, "longest sample, in tokens", low=1)
    temperature: float = key(0.8, "below 1: safer, above 1: wilder; 0: always the likeliest token", low=0)
    top_k: int = key(200, "sample among the top_k likeliest tokens; 0: among all", low=0)
    stop_at_eot: bool = key(False, "end a sample at the end-of-text token")
    seed: int = key(1337, "seed of the samples", low=0, below=2**63)
    device: str = key("", "cuda, cuda:N, mps or cpu; empty: the best there is")
    dtype: str = key(
        "", "dtype of matmuls; empty: what suits the device", choices=("", "bfloat16", "float16", "float32")
    )
    compile: bool = key(False, "torch.compile the model: pays off for long or many samples on a GPU")

    def problems(self):
        if self.init_from in ("resume", "best"):
            return []
        if self.init_from.startswith("gpt2"):
            return [f"init_from={self.init_from!r}: OpenAI's weights cannot be loaded yet; use resume or best"]
        return [f"init_from must be 'resume' or 'best', not {self.init_from!r}"]


def read_prompt(start):
    """Returns start, or what the UTF-8 file holds that FILE:name names."""
    if not start.startswith("FILE:"):
        return start
    path = start.removeprefix("FILE:")
    try:
        with open(path, encoding="utf-8") as f:
            return f.read()
    except UnicodeDecodeError as e:
        raise ValueError(f"the prompt file {path} is not UTF-8: {e}") from None


def find_tokenizer(state, path):
    """Returns the tokenizer of a checkpoint: what train.py recorded, else (nanoGPT's own) that of its data folder,
    GPT-2's without a meta.pkl there. Raises ValueError if the model cannot be GPT-2's."""
    if "tokenizer" in state:
        return state["tokenizer"]
    folder = os.path.join("data", state.get("config", {}).get("dataset", ""))
    tokenizer, vocab_size = shards.read_tokenizer(folder), state["model_args"]["vocab_size"]
    if tokenizer["vocab_size"] > vocab_size:
        raise ValueError(f"{path} does not say what its {vocab_size} token ids mean; put its meta.pkl into {folder}")
    print(f"{path} names no tokenizer; taking {tokenizer['encoding']}, as {folder} suggests", file=sys.stderr)
    return tokenizer


if __name__ == "__main__":
    cfg = from_command_line(SampleConfig, __doc__)
    device, _ = hardware.pick_device(cfg.device)
    dtype, _ = hardware.pick_dtype(cfg.dtype, device)
    torch.manual_seed(cfg.seed)

    path = os.path.join(cfg.out_dir, "best.pt" if cfg.init_from == "best" else "ckpt.pt")
    state = checkpoint.load(path)
    tokenizer = find_tokenizer(state, path)
    model = GPT(GPTConfig(**state["model_args"], n_ids=tokenizer["vocab_size"]))
    checkpoint.restore_model(model, state, path)
    model.eval().to(device)
    if cfg.compile:
        if obstacle := hardware.compile_obstacle(device):
            raise ValueError(f"{obstacle}; or run without it: --compile=False")
        model.compile(dynamic=True)  # the context grows by a token a step
    loss = f", val loss {float(state['best_val_loss']):.4f} at best" if "best_val_loss" in state else ""
    print(f"{path}: iteration {state.get('iter_num', '?')}{loss}; {device.type}, {dtype}", file=sys.stderr)

    encode, decode = shards.text_codec(tokenizer)
    prompt = encode(read_prompt(cfg.start))
    if not prompt:
        raise ValueError('the prompt is empty; give at least one character with --start=, or --start="<|endoftext|>"')
    stop_token = tokenizer["eot_token"] if cfg.stop_at_eot else None
    if cfg.stop_at_eot and stop_token is None:
        raise ValueError(f"stop_at_eot=True, but the encoding {tokenizer['encoding']!r} has no end-of-text token")

    idx = torch.tensor([prompt], device=device)
    with hardware.autocast(device, dtype):
        if cfg.compile:
            with hardware.compiling(), torch.no_grad():
                model(idx[:, -model.config.block_size :])
        for _ in range(cfg.num_samples):
            out = model.generate(idx, cfg.max_new_tokens, cfg.temperature, cfg.top_k, stop_token)
            print(decode(out[0].tolist()))
            print("---------------", flush=True)
