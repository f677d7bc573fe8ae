"""
Write text with a trained model.

    python sample.py --out_dir=out --start="Once upon a time" --num_samples=3
    python sample.py --init_from=gpt2 --interactive=True
    python sample.py --out_dir=out --init_from=best --export=out-hf

The text goes to stdout, each sample followed by a line of dashes; everything else goes to stderr. A single sample
appears as it is written, several are drawn in one batch. --export writes the model for Hugging Face's transformers.
"""

import codecs
import dataclasses
import itertools
import json
import os
import sys
import time
from dataclasses import dataclass

import numpy as np
import torch

import checkpoint
import hardware
import huggingface
import shards
from configurator import Config, from_command_line, key
from model import GPT, GPTConfig


@dataclass
class SampleConfig(Config):
    init_from: str = key("resume", "resume: out_dir/ckpt.pt; best: out_dir/best.pt; gpt2, ..., gpt2-xl; a GPT-2 folder")
    out_dir: str = key("out", "folder that train.py wrote")
    start: str = key("\n", "prompt; FILE:prompt.txt reads it from a file, - from stdin; may hold <|endoftext|>")
    interactive: bool = key(False, "read prompts line by line; what was said before stays in the context")
    num_samples: int = key(10, "samples to draw, in one batch", low=1)
    max_new_tokens: int = key(500, "longest sample, in tokens", low=1)
    temperature: float = key(0.8, "below 1: safer, above 1: wilder; 0: always the likeliest token", low=0)
    top_k: int = key(200, "sample among the top_k likeliest tokens; 0: among all", low=0)
    top_p: float = key(1.0, "sample among the fewest tokens that have this share of the probability; 1: all", low=0)
    stop_at_eot: bool = key(False, "end a sample at the end-of-text token")
    seed: int = key(1337, "seed; sample i depends on it and on i, not on num_samples", low=0, below=2**63)
    out: str = key("", "file to write the samples to as well, one JSON object a line")
    export: str = key("", "write the model to this folder, for Hugging Face's transformers, instead of sampling")
    device: str = key("", "cuda, cuda:N, mps or cpu; empty: the best there is")
    dtype: str = key(
        "", "dtype of the weights; empty: what suits the device", choices=("", "bfloat16", "float16", "float32")
    )
    compile: bool = key(False, "torch.compile the step from token to token: pays off for long samples on a GPU")

    def problems(self):
        found = []
        if self.init_from not in ("resume", "best", *huggingface.PRETRAINED) and not os.path.isdir(self.init_from):
            names = ", ".join(huggingface.PRETRAINED)
            found.append(f"init_from must be 'resume', 'best', {names} or a folder, not {self.init_from!r}")
        if not 0 < self.top_p <= 1:
            found.append(f"top_p={self.top_p} must be above 0 and at most 1")
        if self.interactive and self.start == "-":
            found.append("interactive=True reads the prompts from stdin, so start cannot be read from there too")
        if self.export and self.init_from not in ("resume", "best"):
            found.append(f"export writes a checkpoint of train.py; {self.init_from!r} is in that format already")
        return found


def read_prompt(start):
    """Returns start, or what the UTF-8 file FILE:name or stdin, -, holds."""
    try:
        if start == "-":
            return sys.stdin.buffer.read().decode("utf-8")
        if start.startswith("FILE:"):
            with open(start.removeprefix("FILE:"), encoding="utf-8") as f:
                return f.read()
    except UnicodeDecodeError as e:
        raise ValueError(f"the prompt in {'stdin' if start == '-' else start[5:]} is not UTF-8: {e}") from None
    return start


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


def load_checkpoint(path):
    """Returns (model, tokenizer, state) of a checkpoint of ours or of nanoGPT's."""
    state = checkpoint.load(path)
    tokenizer = find_tokenizer(state, path)
    fields = state["model_args"] | dict(n_ids=tokenizer["vocab_size"], gelu=state["gelu"], arch=state["arch"])
    model = GPT(GPTConfig(**fields))
    checkpoint.restore_model(model, state, path)
    loss = f", val loss {float(state['best_val_loss']):.4f} at best" if "best_val_loss" in state else ""
    print(f"{path}: iteration {state.get('iter_num', '?')}{loss}", file=sys.stderr)
    return model, tokenizer, state


def load_pretrained(name):
    """Returns (model, tokenizer) of a folder in Hugging Face's format or of a GPT-2 of OpenAI's."""
    model = GPT.from_pretrained(name)
    tokenizer, rows = shards.read_tokenizer(name), model.config.vocab_size  # meta.json, if we exported it, else GPT-2's
    if rows - tokenizer["vocab_size"] not in range(64):  # fewer rows, or more than padding explains
        raise ValueError(f"{name} does not say what its {rows} token ids mean; it has no meta.json, as --export writes")
    model.config = dataclasses.replace(model.config, n_ids=tokenizer["vocab_size"])
    return model, tokenizer


def export(folder, model, tokenizer, state):
    """Writes model, tokenizer and model card to folder, as far as Hugging Face's format can hold them."""
    model.save_pretrained(folder, tokenizer["eot_token"])
    padding = (model.config.vocab_size - model.config.n_ids) * model.config.n_embd
    huggingface.write_card(folder, state, model.get_num_params(non_embedding=False) - padding)
    try:
        huggingface.write_tokenizer(folder, tokenizer, model.config.block_size)
    except ValueError as e:
        print(f"the weights are in {folder}, but no tokenizer: {e}", file=sys.stderr)
    else:
        print(f"model and tokenizer are in {folder}", file=sys.stderr)


def draw_noise(seed, sample, count):
    """Returns count numbers, fp32, uniform on [0, 1): each sample has a stream of its own, however many are drawn."""
    return np.random.Generator(np.random.Philox([seed, sample])).random(count, dtype=np.float32)


def compile_step(model, device, B):
    """Compiles the step of model for B sequences: on CUDA into a graph, which costs one launch a token.

    A graph finds its tensors where they were when it was recorded: all calls share a cache, of block_size positions.
    """
    if obstacle := hardware.compile_obstacle(device):
        raise ValueError(f"{obstacle}; or run without it: --compile=False")
    cache = model.empty_cache(B, model.config.block_size)
    model.empty_cache = lambda B, L: cache
    mode = "reduce-overhead" if device.type == "cuda" else None
    model.step = torch.compile(model.step, fullgraph=True, dynamic=False, mode=mode)
    for buffer in itertools.chain(*cache):
        torch._dynamo.mark_static_address(buffer)  # an input that is written in place would bar the graph otherwise


def token_speller(tokenizer):
    """Returns a function from a token id to the bytes of its text, which may be a part of a character."""
    encoding, eot = tokenizer["encoding"], tokenizer["eot_token"]
    if encoding == "characters":
        return lambda i: tokenizer["itos"][i].encode("utf-8", "replace")
    if encoding == "bytes":
        return lambda i: b"<|endoftext|>" if i == eot else bytes([i])
    bpe = shards.load_bpe(encoding)

    def spell(i):
        try:
            return bpe.decode_single_token_bytes(i)
        except KeyError:  # tiktoken's larger encodings leave out some ids
            return "\ufffd".encode()

    return spell


def write_stream(texts, spell, ids):
    """Writes the newest token of each of texts, from model.stream for one sequence, and appends it to ids. A character
    appears when its last byte is there."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for text in texts:
        ids.append(text[0, -1].item())
        print(decoder.decode(spell(ids[-1])), end="", flush=True)
    print(decoder.decode(b"", final=True))


if __name__ == "__main__":
    cfg = from_command_line(SampleConfig, __doc__)
    device, _ = hardware.pick_device(cfg.device)
    dtype, _ = hardware.pick_dtype(cfg.dtype, device)
    if cfg.init_from in ("resume", "best"):
        path = os.path.join(cfg.out_dir, "best.pt" if cfg.init_from == "best" else "ckpt.pt")
        model, tokenizer, state = load_checkpoint(path)
    else:
        model, tokenizer = load_pretrained(cfg.init_from)
    if cfg.export:
        export(cfg.export, model, tokenizer, state)
        sys.exit()

    model.eval().to(device, getattr(torch, dtype))  # the weights themselves: half the bytes to read for each token
    n_ids, block_size = model.config.n_ids, model.config.block_size
    print(f"{model.get_num_params() / 1e6:.2f}M parameters; {device.type}, {dtype}", file=sys.stderr)
    if "top_k" in cfg.given and cfg.top_k > n_ids:
        print(f"top_k={cfg.top_k} takes all of the vocabulary, which has {n_ids} ids", file=sys.stderr)
    encode, _ = shards.text_codec(tokenizer)
    spell = token_speller(tokenizer)
    prompt = encode(read_prompt(cfg.start)) if not cfg.interactive or "start" in cfg.given else []
    if not prompt and not cfg.interactive:
        raise ValueError('the prompt is empty; give at least one character with --start=, or --start="<|endoftext|>"')
    stop_token = tokenizer["eot_token"] if cfg.stop_at_eot else None
    if cfg.stop_at_eot and stop_token is None:
        raise ValueError(f"stop_at_eot=True, but the encoding {tokenizer['encoding']!r} has no end-of-text token")
    out = open(cfg.out or os.devnull, "w", encoding="utf-8", buffering=1)  # line by line
    tokens, seconds = 0, 0.0

    def decode(ids):
        return b"".join(map(spell, ids)).decode("utf-8", "replace")

    def draw(context, first, count):
        """model.stream for count samples, of which the first has that number, all of them after the ids of context."""
        noise = np.stack([draw_noise(cfg.seed, first + i, cfg.max_new_tokens) for i in range(count)])
        idx = torch.tensor([context], device=device).expand(count, -1)
        options = (cfg.max_new_tokens, cfg.temperature, cfg.top_k, cfg.top_p, stop_token, torch.from_numpy(noise))
        return model.stream(idx, *options)

    def record(sample, prompt, ids):
        line = dict(sample=sample, seed=cfg.seed, prompt=prompt, text=decode(ids), tokens=len(ids))
        out.write(json.dumps(line, ensure_ascii=False) + "\n")

    if cfg.compile:
        count = 1 if cfg.interactive else cfg.num_samples
        compile_step(model, device, count)
        with hardware.compiling():
            for _ in itertools.islice(draw(prompt or [0], 0, count), 4):  # the graph is recorded at the second step
                pass

    # -------------------------------------------------------------------------
    # a conversation

    if cfg.interactive:
        history = prompt
        room = max(block_size - cfg.max_new_tokens, block_size // 2)  # what is older is forgotten, for speed
        print("a line is continued, an empty one goes on; Ctrl-C stops a text, Ctrl-D ends", file=sys.stderr)
        for turn in itertools.count():
            try:
                line = input("> " if sys.stdin.isatty() else "")
                history += encode(line)
            except (EOFError, KeyboardInterrupt):
                break
            except ValueError as e:  # a character that the model does not know
                print(e, file=sys.stderr)
                continue
            if not history:
                continue
            ids, start = [], time.perf_counter()
            try:
                write_stream(draw(history[-room:], turn, 1), spell, ids)
            except KeyboardInterrupt:
                print()
            seconds += time.perf_counter() - start
            tokens += len(ids)
            history += ids
            record(turn, line, ids)

    # -------------------------------------------------------------------------
    # samples

    else:
        start = time.perf_counter()
        if cfg.num_samples == 1:
            samples = [[]]
            print(decode(prompt), end="", flush=True)
            write_stream(draw(prompt, 0, 1), spell, samples[0])
            print("---------------")
        else:
            *_, text = draw(prompt, 0, cfg.num_samples)
            samples = [row[len(prompt) :] for row in text.tolist()]
            for i, ids in enumerate(samples):
                if stop_token in ids:
                    samples[i] = ids[: ids.index(stop_token) + 1]
        seconds = time.perf_counter() - start
        for i, ids in enumerate(samples):
            if cfg.num_samples > 1:
                print(decode(prompt + ids))
                print("---------------", flush=True)
            tokens += len(ids)
            record(i, decode(prompt), ids)

    if seconds:
        print(f"{tokens:,} tokens in {seconds:.1f}s, {tokens / seconds:,.1f} tokens/s", file=sys.stderr)
