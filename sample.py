"""
Write text with a trained model.

    python sample.py --start="Once upon a time" --num_samples=3
    python sample.py --init_from=gpt2 --interactive=True
    python sample.py --out_dir=out --init_from=best --export=out-hf

Without --out_dir it takes the newest checkpoint, and says which.

The text goes to stdout, each sample followed by a line of dashes (not in a conversation); everything else
goes to stderr. A single sample appears token by token; several are drawn in one batch.

--export writes the model for Hugging Face's transformers; arch="modern" loads with trust_remote_code=True.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while torch is imported: no traceback

import codecs
import dataclasses
import itertools
import json
import math
import os
import sys
import time
from dataclasses import dataclass
from typing import TextIO

import numpy as np
import torch
from tqdm import tqdm

from configurator import Config, from_command_line, key, run_script
from model import GPT, GPTConfig, make_gpt
from sologpt import checkpoint, hardware, huggingface, sampling
from sologpt.display import warn
from sologpt.errors import UserError
from sologpt.files import newest
from sologpt.fit import check_size
from sologpt.report import parameters
from sologpt.tokenizer import Tokenizer, find_tokenizer, make_tokenizer, read_tokenizer

EXPORT_KEYS = {"export", "init_from", "out_dir", "encoding", "device"}


@dataclass
class SampleConfig(Config):
    init_from: str = key(
        "resume", "resume: out_dir/ckpt.pt; best: out_dir/best.pt; gpt2, ..., gpt2-xl; a GPT-2 folder"
    )
    out_dir: str = key("", "folder that train.py wrote; empty: the newest of out*/ and out*/*/")
    start: str = key(
        "\n", "prompt; FILE:prompt.txt reads it from a file, - from stdin; may hold <|endoftext|>"
    )
    interactive: bool = key(
        False, "read prompts line by line, each after the latest part of the conversation"
    )
    num_samples: int = key(10, "samples to draw, in one batch", low=1)
    max_new_tokens: int = key(500, "longest sample, in tokens", low=1)
    temperature: float = key(0.8, "below 1: safer, above 1: wilder; 0: always the likeliest token", low=0)
    top_k: int = key(200, "sample among the top_k likeliest tokens; 0: among all", low=0)
    top_p: float = key(
        1.0, "sample among the fewest tokens whose probabilities add up to this; 1: all", above=0, high=1
    )
    stop_at_eot: bool = key(False, "end a sample at the end-of-text token")
    seed: int = key(1337, "seed; sample i depends on it and on i, not on num_samples", low=0, below=2**32)
    out: str = key("", "file to write the samples to as well, one JSON object a line; overwritten")
    export: str = key(
        "", "write the model to this folder, for Hugging Face's transformers, instead of sampling"
    )
    encoding: str = key("", "tokenizer of a folder, if not the one it names: bytes or a name of tiktoken's")
    device: str = key("", "cuda, cuda:N, mps or cpu; empty: the best available")
    dtype: str = key("", "dtype of the weights; empty: what suits the device", choices=("", *hardware.DTYPES))
    compile: bool = key(False, "torch.compile the step to the next token: pays off for long samples on a GPU")

    @property
    def sequences(self):
        """Returns how many sequences are drawn at once."""
        if self.interactive:
            return 1
        return self.num_samples

    def problems(self):
        """Returns messages about conflicting values."""
        found = []
        known = self.init_from in ("resume", "best", *huggingface.PRETRAINED)
        if not known and not os.path.isdir(self.init_from):
            names = ", ".join(huggingface.PRETRAINED)
            found.append(f"init_from must be 'resume', 'best', {names} or a folder, not {self.init_from!r}")
        if self.encoding and known:
            found.append(f"encoding is for a GPT-2 folder; the tokenizer of {self.init_from!r} is known")
        if 0 < self.temperature < 1e-6:
            found.append(f"temperature={self.temperature} must be 0 or at least 1e-6")
        if self.interactive and self.start == "-":
            found.append(
                "interactive=True reads the prompts from stdin, so --start=- cannot read from it as well"
            )
        if self.interactive and "num_samples" in self.given and self.num_samples > 1:
            found.append("interactive=True draws one sample at a time: leave num_samples out")
        if self.export and self.init_from not in ("resume", "best"):
            found.append(
                f"export writes a checkpoint of train.py; {self.init_from!r} is in that format already"
            )
        return found


# -----------------------------------------------------------------------------
# the model


def load(cfg):
    """Returns (model, tokenizer, state) of what init_from names; state is None unless it is a checkpoint."""
    if cfg.init_from not in ("resume", "best"):
        model, tokenizer = load_pretrained(cfg.init_from, cfg.encoding)
        return model, tokenizer, None
    folder = cfg.out_dir
    if not folder:
        folder = os.path.dirname(newest(["ckpt.pt", "ckpt_prev.pt", "best.pt"], "name its --out_dir="))
    files = checkpoint.RunFiles(folder)
    if cfg.init_from == "resume":
        if os.path.exists(files.best) and not files.exist():
            raise UserError(f"there is no {files.ckpt} yet; --init_from=best takes {files.best}")
        state, reason = files.load_either()
        if reason:
            warn(f"{reason}; taking {files.newest} instead")
        return build(state, files.newest)
    if os.path.exists(files.ckpt) and not os.path.exists(files.best):
        raise UserError(
            f"there is no {files.best}: nanoGPT writes none, and train.py only when an evaluation improves "
            f"on the start; --init_from=resume takes the newest weights"
        )
    return load_checkpoint(files.best)


def load_checkpoint(path):
    """Returns (model, tokenizer, state) of a checkpoint, ours or nanoGPT's."""
    return build(checkpoint.load(path), path)


def build(state, path):
    """Returns what load_checkpoint does, of a state that is loaded already."""
    tokenizer = checkpoint_tokenizer(state, path)
    config = GPTConfig(**checkpoint.model_fields(state, path, GPTConfig), n_ids=tokenizer.vocab_size)
    if state.get("iter_num") == 0 and not checkpoint.began_trained(state):
        raise UserError(f"{path} is of iteration 0, before anything was learned; train on from it first")
    check_size(config)
    model = make_gpt(config)
    checkpoint.restore_model(model, state, path)
    lowest = ""
    if math.isfinite(state.get("best_val_loss", math.inf)):  # else none, or none on these data
        kind = "lowest val loss so far"
        if "data" not in state and state.get("config", {}).get("always_save_checkpoint") is not False:
            kind = "val loss"  # nanoGPT then keeps that of the last evaluation
        lowest = f", {kind} {float(state['best_val_loss']):.4f}"
        best = checkpoint.summary(os.path.join(os.path.dirname(path), "best.pt"))
        if best and best["iter_num"] != state.get("iter_num"):
            lowest += f", at iteration {best['iter_num']}: --init_from=best"
    print(f"{path}: iteration {state.get('iter_num', '?')}{lowest}", file=sys.stderr)
    return model, tokenizer, state


def checkpoint_tokenizer(state, path):
    """Returns the Tokenizer that train.py recorded in a checkpoint; nanoGPT records none, so then that of its
    data folder: GPT-2's without a meta.pkl. Raises UserError if the model is not of that tokenizer's ids."""
    if "tokenizer" in state:
        return make_tokenizer(state["tokenizer"])
    folder = os.path.join("data", str(state.get("config", {}).get("dataset", "")))
    tokenizer = read_tokenizer(folder)
    vocab_size = state["model_args"]["vocab_size"]
    if not tokenizer.fits_nanogpts(vocab_size):
        advice = f"put its meta.pkl into {folder}"
        if os.path.exists(os.path.join(folder, "meta.json")):
            advice = f"{folder} has others ({tokenizer.encoding}): put nanoGPT's data there, or move it away"
        raise UserError(f"{path} does not say what its {vocab_size} token ids mean; {advice}")
    reason = f"as {folder} suggests"
    if not os.path.isdir(folder):
        reason = f"as there is no {folder}"
    print(f"{path} names no tokenizer; taking {tokenizer.encoding}, {reason}", file=sys.stderr)
    return tokenizer


def load_pretrained(name, encoding):
    """Returns (model, tokenizer) of a folder in Hugging Face's format or of one of OpenAI's GPT-2 models.
    encoding names the tokenizer, if not empty; else the folder must."""
    model = GPT.from_pretrained(name)
    if encoding:
        tokenizer = find_tokenizer(encoding)
    else:
        tokenizer = huggingface.read_folder_tokenizer(name)
    if not tokenizer:
        raise UserError(f"{name} does not say which tokenizer it has; name it, as in --encoding=gpt2")
    rows = model.config.vocab_size
    if tokenizer.vocab_size > rows:
        ids = f"the tokenizer {tokenizer.encoding} has {tokenizer.vocab_size} ids"
        raise UserError(f"{ids}, the model in {name} only {rows}")
    model.config = dataclasses.replace(model.config, n_ids=tokenizer.vocab_size)
    return model, tokenizer


def export(folder, model, tokenizer, state):
    """Writes model, tokenizer and model card to folder, in Hugging Face's format."""
    added = ", ".join(state["more_args"])
    if added and model.config.arch == "gpt2":
        print(f"note: transformers' GPT-2 has no {added}: it computes without", file=sys.stderr)
    with torch.device("meta"):  # takes no memory
        unpadded = make_gpt(dataclasses.replace(model.config, vocab_size=model.config.n_ids))
    done = f"model and tokenizer are in {folder}"
    with huggingface.replacing_export(folder) as unfinished:
        huggingface.write_card(unfinished, state, unpadded.get_num_params(non_embedding=False))
        model.save_pretrained(unfinished, tokenizer.eot_token)
        try:
            huggingface.write_tokenizer(unfinished, tokenizer, model.config.block_size)
        except UserError as e:
            done = f"the weights are in {folder}, but no tokenizer: {e}"
    print(done, file=sys.stderr)
    if model.config.arch == "modern":
        print("transformers loads it with trust_remote_code=True", file=sys.stderr)


# -----------------------------------------------------------------------------
# drawing


@dataclass
class Session:
    """What samples are drawn with, and how many tokens that gave in how many seconds."""

    cfg: SampleConfig
    model: GPT
    tokenizer: Tokenizer
    device: torch.device
    out: TextIO
    options: dict = dataclasses.field(default_factory=dict)  # more arguments of sampling.stream
    samples: int = 0
    tokens: int = 0
    seconds: float = 0.0


def check_room(cfg, model, prompt):
    """Raises UserError if the samples that are asked for cannot fit into memory, before that is tried."""
    count = cfg.sequences
    c = model.config
    length = len(prompt) + cfg.max_new_tokens
    cached = min(length, c.block_size) * c.n_layer * 2 * c.n_embd * model.lm_head.weight.itemsize
    needed = count * (cached + 16 * length)  # an id and a random number for each token
    available = hardware.total_memory(model.lm_head.weight.device)
    if available and needed > available:
        raise UserError(
            f"num_samples={count} of max_new_tokens={cfg.max_new_tokens} need {needed / 1e9:,.1f} GB, and "
            f"there are {available / 1e9:,.1f} GB; ask for fewer"
        )


def draw(session, context, first, count):
    """Returns sampling.stream for samples first to first + count - 1, which continue the ids of context."""
    cfg = session.cfg
    noise = np.stack([draw_noise(cfg.seed, first + i, cfg.max_new_tokens) for i in range(count)])
    idx = torch.tensor([context], device=session.device).expand(count, -1)
    stop_token = None
    if cfg.stop_at_eot:
        stop_token = session.tokenizer.eot_token
    return sampling.stream(
        session.model,
        idx,
        cfg.max_new_tokens,
        temperature=cfg.temperature,
        top_k=cfg.top_k,
        top_p=cfg.top_p,
        stop_token=stop_token,
        noise=torch.from_numpy(noise),
        **session.options,
    )


def draw_noise(seed, sample, count):
    """Returns count numbers, fp32, uniform on [0, 1), from the sample's own random stream."""
    return np.random.Generator(np.random.Philox([seed, sample])).random(count, dtype=np.float32)


def compile_step(session, count):
    """Compiles the step to the next token for count sequences: on CUDA into a graph, one launch per token.

    A graph uses the memory addresses of its recording, so all calls share one cache of block_size positions.
    """
    model = session.model
    cache = model.empty_cache(count, model.config.block_size)
    for buffer in itertools.chain(*cache):
        # otherwise an input that is written in place would rule out the graph
        torch._dynamo.mark_static_address(buffer)
    mode = "reduce-overhead" if session.device.type == "cuda" else None
    step = torch.compile(sampling.step, fullgraph=True, dynamic=False, mode=mode)
    session.options = dict(cache=cache, step=step)
    with hardware.compiling():
        # the graph is recorded at the second step
        for _ in itertools.islice(draw(session, [0], 0, count), 4):
            pass


def write_stream(texts, tokenizer):
    """Yields the ids of texts, a sampling.stream of one sequence, and prints each as soon as it is drawn; a
    character appears with its last byte."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for text in texts:
        token = text[0, -1].item()
        print(decoder.decode(tokenizer.spell(token)), end="", flush=True)
        yield token
    print(decoder.decode(b"", final=True))


def record(session, sample, prompt, ids):
    """Writes a sample to the --out file, the first one in place of earlier samples, and counts its tokens."""
    text = session.tokenizer.decode(ids)
    line = dict(sample=sample, seed=session.cfg.seed, prompt=prompt, text=text, tokens=len(ids))
    if not session.samples and os.path.isfile(session.cfg.out):
        session.out.truncate(0)
    session.samples += 1
    session.out.write(json.dumps(line, ensure_ascii=False) + "\n")
    session.tokens += len(ids)


# -----------------------------------------------------------------------------
# samples, or a conversation


def write_samples(session, prompt):
    """Writes num_samples continuations of the ids of prompt."""
    start = time.perf_counter()
    text = session.tokenizer.decode(prompt)
    if session.cfg.num_samples == 1:
        print(text, end="", flush=True)
        ids = list(write_stream(draw(session, prompt, 0, 1), session.tokenizer))
        session.seconds = time.perf_counter() - start
        record(session, 0, text, ids)
        print("---------------")
        return
    samples = draw_batch(session, prompt)
    session.seconds = time.perf_counter() - start
    for i, ids in enumerate(samples):  # before they are printed: `head` may end that
        record(session, i, text, ids)
    for ids in samples:
        print(session.tokenizer.decode(prompt + ids))
        print("---------------", flush=True)


def draw_batch(session, prompt):
    """Returns the ids of num_samples continuations of one batch; stop_at_eot cuts them after end-of-text."""
    texts = draw(session, prompt, 0, session.cfg.num_samples)
    total = session.cfg.max_new_tokens
    for text in tqdm(texts, "sampling", total, leave=False, disable=None, unit="tok"):
        whole = text  # each holds all tokens so far
    samples = [row[len(prompt) :] for row in whole.tolist()]
    eot = session.tokenizer.eot_token
    if session.cfg.stop_at_eot:
        for ids in samples:
            if eot in ids:
                del ids[ids.index(eot) + 1 :]
    return samples


def converse(session, history):
    """Continues each line that is read from stdin, with the conversation so far as its context."""
    block_size, max_new_tokens = session.model.config.block_size, session.cfg.max_new_tokens
    room = max(block_size - max_new_tokens, block_size // 2)  # older tokens are forgotten, for speed
    print("this is a base model: it continues your text, and does not answer", file=sys.stderr)
    print("Enter alone writes more; Ctrl-C interrupts, Ctrl-D ends", file=sys.stderr)
    sign = ""
    if sys.stdin.isatty() and sys.stdout.isatty():  # input() writes it to stdout
        sign = "> "
    for turn in itertools.count():
        try:
            line = input(sign).removesuffix("\r")  # of a file from Windows
            history = history + session.tokenizer.encode(line)
        except (EOFError, KeyboardInterrupt):
            break
        except UserError as e:  # a character that the model does not know
            print(e, file=sys.stderr)
            continue
        if not history:
            continue
        ids = []
        start = time.perf_counter()
        try:
            for token in write_stream(draw(session, history[-room:], turn, 1), session.tokenizer):
                ids.append(token)
        except KeyboardInterrupt:
            print()
        session.seconds += time.perf_counter() - start
        history = history + ids
        record(session, turn, line, ids)


def read_prompt(start):
    """Returns start, or the UTF-8 text of the file in FILE:name or, for -, of stdin."""
    if start == "-":
        source, raw = "stdin", sys.stdin.buffer.read()
    elif start.startswith("FILE:"):
        source = start.removeprefix("FILE:")
        with open(source, "rb") as f:
            raw = f.read()
    else:
        return start
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise UserError(f"the prompt in {source} is not UTF-8: {e}") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")  # an editor's line ends, not the model's


def prompt_ids(cfg, tokenizer):
    """Returns the ids of --start; none for a conversation that begins without. Raises UserError for an empty
    one, and for characters that the model does not know."""
    if cfg.interactive and "start" not in cfg.given:
        return []
    text = read_prompt(cfg.start)
    try:
        prompt = tokenizer.encode(text)
    except UserError as e:  # "\n", the default, is a character too
        raise UserError(f"{e}; give a --start of characters that it has") from None
    if not prompt and not cfg.interactive:
        hint = ""
        if tokenizer.eot_token is not None:
            hint = ', or --start="<|endoftext|>"'
        raise UserError(f"the prompt is empty; give at least one character with --start={hint}")
    return prompt


def open_output(path):
    """Returns the --out file, open for appending line by line: what is there stays until the first sample.
    Raises UserError if that is not of samples: out_dir is easily mistyped."""
    if os.path.isfile(path) and os.path.getsize(path):
        with open(path, "rb") as f:
            if not f.read(16).startswith(b'{"sample": '):
                raise UserError(f"--out={path} is a file already, and not of samples; name another one")
    return open(path or os.devnull, "a", encoding="utf-8", buffering=1)


def main(argv):
    cfg = from_command_line(SampleConfig, __doc__, argv)
    device, _ = hardware.pick_device(cfg.device)
    hardware.check_gpu(device)
    hardware.avoid_cudnn_attention()
    dtype, _ = hardware.pick_dtype(cfg.dtype, device)
    if cfg.compile:
        hardware.check_compiler(device)
    model, tokenizer, state = load(cfg)
    if cfg.export:
        if idle := ", ".join(sorted(cfg.given - EXPORT_KEYS)):
            print(f"note: export writes fp32 and draws nothing; without effect: {idle}", file=sys.stderr)
        export(cfg.export, model, tokenizer, state)
        return

    # the weights themselves, not autocast: in 16 bits, half the bytes to read for each token
    model.eval().to(device, getattr(torch, dtype))
    print(f"{parameters(model)}; {device.type}, {dtype}", file=sys.stderr)
    n_ids = model.config.n_ids
    if "top_k" in cfg.given and cfg.top_k > n_ids:
        print(f"top_k={cfg.top_k} takes all of the vocabulary, which has {n_ids} ids", file=sys.stderr)
    prompt = prompt_ids(cfg, tokenizer)
    if cfg.stop_at_eot and tokenizer.eot_token is None:
        raise UserError(f"stop_at_eot=True, but the encoding {tokenizer.encoding!r} has no end-of-text token")
    check_room(cfg, model, prompt)
    block_size = model.config.block_size
    if len(prompt) > block_size and not cfg.interactive:
        print(f"note: of the prompt's {len(prompt)} tokens the last {block_size} count", file=sys.stderr)
    with open_output(cfg.out) as out:
        session = Session(cfg, model, tokenizer, device, out)
        if cfg.compile:
            compile_step(session, cfg.sequences)
        if cfg.interactive:
            converse(session, prompt)
        else:
            write_samples(session, prompt)
    if session.seconds:
        rate = f"{session.tokens / session.seconds:,.1f} tokens/s"
        print(f"{session.tokens:,} tokens in {session.seconds:.1f}s, {rate}", file=sys.stderr)


if __name__ == "__main__":
    run_script(main)
