"""
Train a GPT on one GPU (or CPU).

    python train.py config/fineweb_125m.py --batch_size=16 --gradient_accumulation_steps=32
    python train.py config/fineweb_125m.py --batch_size=16 --gradient_accumulation_steps=32 --init_from=resume

Reads token files from data/<dataset> and writes into out_dir: ckpt.pt (the newest complete state, to resume from) and
ckpt_prev.pt (the one before it), best.pt (the weights with the lowest validation loss) and metrics.jsonl (every figure
of the log). Ctrl-C or SIGTERM finishes the update in flight, saves, and prints the command that continues.
"""

import contextlib
import dataclasses
import gc
import json
import math
import os
import shlex
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

import checkpoint
import hardware
import huggingface
import shards
from checkpoint import say
from configurator import Config, from_command_line, key
from model import GPT, GPTConfig


@dataclass
class TrainConfig(Config):
    # files
    out_dir: str = key("out", "folder for ckpt.pt, ckpt_prev.pt, best.pt and metrics.jsonl")
    init_from: str = key(
        "scratch",
        "scratch; resume (out_dir/ckpt.pt); auto (resume if there is one); gpt2, ..., gpt2-xl; a GPT-2 folder",
    )
    always_save_checkpoint: bool = key(True, "False: after an evaluation save only if the validation loss fell")
    checkpoint_interval: int = key(0, "iterations between saves of ckpt.pt; 0: after evaluations, see above", low=0)
    allow_data_change: bool = key(False, "resume with other data or another tokenizer than before")
    # evaluation and log
    eval_interval: int = key(2000, "iterations between evaluations", low=1)
    eval_iters: int = key(200, "evaluation size, in dozens of sequences of each split, if it has them", low=1)
    eval_only: bool = key(False, "evaluate once and stop")
    log_interval: int = key(1, "iterations between log lines", low=1)
    wandb_log: bool = key(False, "log to Weights & Biases too (pip install wandb)")
    wandb_project: str = key("owt", "its project")
    wandb_run_name: str = key("gpt2", "its run name")
    # data
    dataset: str = key("openwebtext", "folder of token files: one under data/, or a path")
    gradient_accumulation_steps: int = key(5 * 8, "micro-batches in one iteration", low=1)
    batch_size: int = key(12, "micro-batch: sequences that go through the model at once", low=1)
    block_size: int = key(1024, "tokens in one sequence, the longest context", low=1)
    # model
    arch: str = key(
        "gpt2",
        "gpt2, or modern: learns more from each token, is for this project only; see model.py",
        choices=("gpt2", "modern"),
    )
    n_layer: int = key(12, "transformer blocks", low=1)
    n_head: int = key(12, "attention heads; divides n_embd", low=1)
    n_embd: int = key(768, "width of the model", low=1)
    dropout: float = key(
        0.0, "dropped fraction of activations; 0 for pretraining, 0.1 or more for finetuning", low=0, below=1
    )
    bias: bool = key(False, "biases in Linear and LayerNorm, as OpenAI's GPT-2 has")
    # optimizer
    optimizer: str = key(
        "adamw", "adamw, or muon: Muon for the matrices of the blocks, AdamW for the rest", choices=("adamw", "muon")
    )
    learning_rate: float = key(6e-4, "highest learning rate", low=0)
    max_iters: int = key(600000, "iterations (optimizer updates) of the whole run", low=0)
    weight_decay: float = key(1e-1, "weight decay of matrices; biases and LayerNorm have none", low=0)
    beta1: float = key(0.9, "decay of the mean of gradients", low=0, below=1)
    beta2: float = key(0.95, "decay of the mean of squared gradients", low=0, below=1)
    grad_clip: float = key(1.0, "largest gradient norm; 0: no clipping", low=0)
    max_bad_steps: int = key(10, "updates in a row without a finite gradient, each skipped, that end the run", low=1)
    # learning rate schedule
    decay_lr: bool = key(True, "warm up, then decay as schedule says; False: learning_rate throughout")
    schedule: str = key(
        "cosine", "cosine; wsd: constant after the warmup, at the end a linear cooldown", choices=("cosine", "wsd")
    )
    cooldown_frac: float = key(0.4, "wsd: the part of max_iters, the last, in which it falls to min_lr", low=0, high=1)
    keep_before_cooldown: bool = key(False, "wsd: save before_cooldown.pt before it falls, to extend the run from")
    warmup_iters: int = key(2000, "iterations of linear warmup", low=0)
    lr_decay_iters: int = key(600000, "cosine: iteration at which it reaches min_lr, usually max_iters", low=0)
    min_lr: float = key(6e-5, "lowest learning rate, usually learning_rate / 10", low=0)
    # machine
    seed: int = key(1337, "seed of weights, dropout and the order of data", low=0, below=2**32)
    device: str = key("", "cuda, cuda:N, mps or cpu; empty: the best there is")
    dtype: str = key(
        "", "dtype of matmuls; empty: what suits the device", choices=("", "bfloat16", "float16", "float32")
    )
    compile: bool = key(True, "torch.compile the model: some time at the start, faster from there on")
    compile_mode: str = key(  # no CUDA graphs: a micro-batch overwrites what the one before it has returned
        "default",
        "the second tries more kernels: minutes at the start",
        choices=("default", "max-autotune-no-cudagraphs"),
    )
    activation_memory: float = key(
        1.0, "share of the activations that a compiled model keeps; backward recomputes the rest", above=0, high=1
    )
    loss_chunks: int = key(1, "chunks of the tokens that head and loss take in turn, for less memory; 1: off", low=1)
    auto_fit: bool = key(True, "if memory runs out, halve batch_size and double gradient_accumulation_steps")
    peak_flops: float = key(
        0.0, "FLOP/s that mfu is measured against; 0: this GPU's dense peak from hardware.py", low=0
    )
    backend: str = key("nccl", "no effect here: it chose how several GPUs talk, and this trainer uses one")

    def problems(self):
        found = []
        if self.n_embd % self.n_head:
            down = self.n_embd // self.n_head * self.n_head
            near = [n for n in (down, down + self.n_head) if n]
            found.append(
                f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}; "
                f"set n_embd to {' or '.join(map(str, near))}, or change n_head"
            )
        if self.arch == "modern" and self.n_embd // self.n_head % 2:
            found.append(f"n_embd={self.n_embd} / n_head={self.n_head} is not even, as arch='modern' needs it")
        if self.keep_before_cooldown and self.schedule != "wsd":
            found.append("keep_before_cooldown=True needs schedule='wsd': a cosine has no constant part to go on from")
        for name, off in (("compile_mode", "default"), ("activation_memory", 1.0)):
            if not self.compile and getattr(self, name) != off:
                text = f"{name}={getattr(self, name)!r} acts through torch.compile only"
                found.append(f"{text}; set compile=True, or {name}={off!r}")
        names = ("scratch", "resume", "auto", *huggingface.PRETRAINED)
        if self.init_from not in names and not os.path.isdir(self.init_from):
            found.append(f"init_from must be {', '.join(map(repr, names))} or a folder, not {self.init_from!r}")
        return found


# -----------------------------------------------------------------------------
# helpers


def get_lr(it, cfg):
    """Returns the learning rate of iteration it. Both schedules begin with a linear warmup. cosine: down to min_lr at
    lr_decay_iters, min_lr from there on; wsd: constant, from cooldown_start on linearly down to min_lr at max_iters."""
    if not cfg.decay_lr:
        return cfg.learning_rate
    if it < cfg.warmup_iters:
        return cfg.learning_rate * (it + 1) / (cfg.warmup_iters + 1)
    if cfg.schedule == "wsd":
        left = (cfg.max_iters - it) / max(1, cfg.max_iters - cooldown_start(cfg))
        return cfg.min_lr + min(1, left) * (cfg.learning_rate - cfg.min_lr)
    if it >= cfg.lr_decay_iters:
        return cfg.min_lr
    progress = (it - cfg.warmup_iters) / (cfg.lr_decay_iters - cfg.warmup_iters)
    return cfg.min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (cfg.learning_rate - cfg.min_lr)


def cooldown_start(cfg):
    """Returns the iteration at which the cooldown of the schedule wsd begins."""
    return cfg.max_iters - math.ceil(cfg.cooldown_frac * cfg.max_iters)


def get_momentum(it):
    """Returns Muon's momentum of iteration it: 0.85 rising to 0.95 in 300 iterations, as the gradients of the first
    ones are soon out of date (modded-nanogpt, record of 6 November 2024)."""
    return 0.85 + 0.1 * min(1, it / 300)


def make_optimizers(model, cfg, device):
    """Returns the optimizers of a run by their names in a checkpoint: optimizer is AdamW, muon is Muon, if wanted."""
    settings = cfg.weight_decay, cfg.learning_rate, (cfg.beta1, cfg.beta2), device.type
    if cfg.optimizer == "adamw":
        return dict(optimizer=model.configure_optimizers(*settings))
    adamw, muon = model.configure_muon(*settings)
    return dict(optimizer=adamw, muon=muon)


def memory_estimate(model, optimizers, cfg, dtype):
    """Returns hardware.memory_needed of a run, whose optimizers have their moments already."""
    params = model.get_num_params(non_embedding=False)
    moments = checkpoint.tensors({name: optimizer.state for name, optimizer in optimizers.items()})
    size, levers = sum(tensor.nbytes for tensor in moments), (cfg.compile, cfg.activation_memory, cfg.loss_chunks)
    return hardware.memory_needed(params, size, model.config, cfg.batch_size, dtype, *levers)


def embedding_rows(tokenizer):
    """Returns the vocab_size of a new model: the tokenizer's number of ids, rounded up to a multiple of 64, which suits
    the matmul kernels; as it is if there is a meta.pkl, that is for nanoGPT's own data, whose models are not padded."""
    n_ids = tokenizer["vocab_size"]
    return n_ids if tokenizer["encoding"] == "characters" else math.ceil(n_ids / 64) * 64


def as_batch(tokens, device):
    """Returns inputs and targets, int64 (B, T) in host memory, of tokens, NumPy int64 (B, T + 1). For a CUDA device
    they are pinned, so that their copy to it overlaps with its work."""
    tokens = torch.from_numpy(tokens)
    x, y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    return (x.pin_memory(), y.pin_memory()) if device.type == "cuda" else (x, y)


def to_device(batch, device):
    """Returns the tensors of as_batch on device; the copy is asynchronous where that is safe, from pinned memory."""
    return (tensor.to(device, non_blocking=device.type == "cuda") for tensor in batch)


@torch.no_grad()
def estimate_loss(model, windows, count, batch_size, device, dtype):
    """Returns the mean loss, a float, over count windows of a split: the same ones each time, whatever the batch_size,
    without touching any random state. One sync, at the end."""
    chosen, total = windows.spread(count), torch.zeros((), device=device)
    model.eval()
    for first in range(0, len(chosen), batch_size):
        some = chosen[first : first + batch_size]
        x, y = as_batch(windows.read(np.resize(some, batch_size)), device)
        y[len(some) :] = -1  # a last, short batch is filled up with rows that do not count: one shape, one graph
        with hardware.autocast(device, dtype):
            _, loss = model(*to_device((x, y), device))
        total += loss.float() * len(some)
    model.train()
    return total.item() / len(chosen)


def resume_warnings(cfg, state):
    """Returns what a run that resumes state does otherwise than the run that saved it: a learning rate that differs by
    more than 1 % at that iteration, and another order of the data."""
    it, then = state["iter_num"], dataclasses.asdict(cfg) | state.get("config", {})
    old = dataclasses.replace(cfg, **{name: then[name] for name in dataclasses.asdict(cfg)})
    now, was, found = get_lr(it, cfg), get_lr(it, old), []
    if abs(now - was) > 0.01 * was:
        found.append(f"the learning rate of iteration {it} is {now:.3e}, by the schedule so far it was to be {was:.3e}")
    S, before = (c.batch_size * c.gradient_accumulation_steps for c in (cfg, old))
    if "data" in state and (S, cfg.seed) != (before, old.seed):  # nanoGPT's batches are random anyway
        found.append(
            f"from here on the data comes in another order, some of it again or never: {S} sequences an iteration and "
            f"seed {cfg.seed}, so far {before} and seed {old.seed}"
        )
    return found


def tokens_per_byte(folder, split):
    """Returns the tokens of a split per byte of its texts, in UTF-8, which make bits per byte of a loss; None if the
    data's meta.json does not say, or there is none."""
    try:
        with open(os.path.join(folder, "meta.json"), encoding="utf-8") as f:
            counts = json.load(f)[split]
        return counts["tokens"] / counts["bytes"]
    except (FileNotFoundError, KeyError, TypeError, ZeroDivisionError):  # meta.json may be somebody else's
        return None


def duration(seconds):
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"


stop_signals = []


def ask_to_stop(number, frame):
    """Signal handler: after the first Ctrl-C or SIGTERM the loop saves and leaves, a second one leaves at once."""
    if stop_signals:
        os._exit(128 + number)
    stop_signals.append(number)
    with contextlib.suppress(OSError):  # a log on a full disk. No print: the signal may have come in the middle of one
        os.write(2, b"\nstopping after this iteration; once more to leave without saving\n")


if __name__ == "__main__":
    cfg = from_command_line(TrainConfig, __doc__)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("this trainer uses one GPU; start it with python train.py, not with torchrun")
    if "backend" in cfg.given:
        print(f"backend={cfg.backend!r} has no effect: training runs on one GPU")
    if cfg.decay_lr and 0 < cfg.max_iters <= cfg.warmup_iters:
        print(f"note: the learning rate still rises when this run ends: warmup_iters={cfg.warmup_iters}")
    elif cfg.decay_lr and cfg.schedule == "wsd":
        if cooldown_start(cfg) < cfg.warmup_iters:
            print(f"note: the cooldown begins at {cooldown_start(cfg)}, before the warmup ends at {cfg.warmup_iters}")
    elif cfg.decay_lr and cfg.lr_decay_iters < cfg.warmup_iters:
        print(f"note: after warmup_iters={cfg.warmup_iters} it drops to min_lr: lr_decay_iters={cfg.lr_decay_iters}")

    # -------------------------------------------------------------------------
    # machine

    hardware.use_expandable_segments()
    device, device_why = hardware.pick_device(cfg.device)
    dtype, dtype_why = hardware.pick_dtype(cfg.dtype, device)
    peak, peak_why = hardware.device_peak(device, dtype)
    if cfg.peak_flops:
        peak, peak_why = cfg.peak_flops, f"{cfg.peak_flops / 1e12:g} TFLOP/s as given by peak_flops"
    print(f"device: {hardware.device_name(device)} ({device_why}), {dtype} ({dtype_why})")
    print(f"mfu: {'of ' if peak else 'n/a, '}{peak_why}")
    if cfg.compile and (obstacle := hardware.compile_obstacle(device)):
        raise ValueError(f"{obstacle}; or run without it: --compile=False")
    torch.manual_seed(cfg.seed)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # tf32 for what is left in fp32, as nanoGPT

    # -------------------------------------------------------------------------
    # what to continue from

    state, pretrained, files = None, None, checkpoint.RunFiles(cfg.out_dir)
    if cfg.init_from == "resume" or (cfg.init_from == "auto" and files.exist()):
        state, why = files.load()
        if why:
            say(f"warning: {why}; taking {files.newest} instead", sys.stderr)
        cfg = checkpoint.with_architecture(cfg, state["model_args"] | dict(arch=state["arch"]), files.newest)
        if state["iter_num"] > cfg.max_iters:
            raise ValueError(f"{files.newest} is at iteration {state['iter_num']}, past max_iters={cfg.max_iters}")
    elif files.exist() and not cfg.eval_only:
        print(f"{files.ckpt} of an earlier run will be overwritten; --init_from=resume would continue it")
    if cfg.init_from not in ("scratch", "resume", "auto"):
        pretrained = GPT.from_pretrained(cfg.init_from, dict(dropout=cfg.dropout, block_size=cfg.block_size))
        cfg = checkpoint.with_architecture(cfg, dataclasses.asdict(pretrained.config), cfg.init_from)

    # -------------------------------------------------------------------------
    # data

    folder = shards.find_data(cfg.dataset)
    tokenizer = shards.read_tokenizer(folder)
    n_ids, vocab_size = tokenizer["vocab_size"], embedding_rows(tokenizer)
    if state or pretrained:
        vocab_size = state["model_args"]["vocab_size"] if state else pretrained.config.vocab_size
        if n_ids > vocab_size:
            source = files.newest if state else cfg.init_from
            raise ValueError(f"{folder} has {n_ids} token ids, the model in {source} only {vocab_size}")
        if cfg.init_from in huggingface.PRETRAINED and tokenizer["encoding"] != "gpt2":
            raise ValueError(
                f"{folder} was made with the encoding {tokenizer['encoding']!r}, {cfg.init_from} with gpt2"
            )
    train_data, val_data = (
        shards.Windows(shards.find_shards(folder, split), cfg.block_size, vocab_size) for split in ("train", "val")
    )
    data = shards.fingerprint(train_data.shards + val_data.shards, tokenizer)
    if state and (changes := checkpoint.data_changes(state, data)):
        text = f"{folder} is not what {files.newest} was trained on: {changes}"
        if not (cfg.allow_data_change or cfg.eval_only):
            raise ValueError(f"{text}; to go on with it all the same: --allow_data_change=True")
        say(f"warning: {text}", sys.stderr)

    # -------------------------------------------------------------------------
    # model and optimizer

    model_args = {name: getattr(cfg, name) for name in checkpoint.MODEL_ARGS if name != "vocab_size"}
    model_args["vocab_size"] = vocab_size
    gelu = state["gelu"] if state else "none"
    model = (pretrained or GPT(GPTConfig(**model_args, n_ids=n_ids, gelu=gelu, arch=cfg.arch))).to(device)
    optimizers = make_optimizers(model, cfg, device)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == "float16")
    sequences_per_iter = cfg.batch_size * cfg.gradient_accumulation_steps
    tokens_per_iter = sequences_per_iter * cfg.block_size
    iter_num, best_val_loss, tokens_seen, earlier_seconds, bad_steps, bad_in_row = 0, math.inf, 0, 0.0, 0, 0
    if state:
        checkpoint.restore_model(model, state, files.newest)
        checkpoint.restore_optimizers(optimizers, state, files.newest)
        if state.get("scaler"):
            scaler.load_state_dict(state["scaler"])
        if "rng" in state:  # nanoGPT keeps none
            checkpoint.set_rng(state["rng"], device)
        iter_num, best_val_loss = state["iter_num"], float(state["best_val_loss"])
        tokens_seen, earlier_seconds = state.get("tokens_seen", iter_num * tokens_per_iter), state.get("seconds", 0.0)
        bad_steps, bad_in_row = state.get("bad_steps", 0), state.get("bad_in_row", 0)
        print(f"resuming from {files.newest} at iteration {iter_num}, best val loss {best_val_loss:.4f}")
        for warning in () if cfg.eval_only else resume_warnings(cfg, state):
            say(f"warning: {warning}", sys.stderr)
        state = None  # frees its memory
    else:
        checkpoint.allocate_moments(optimizers)

    # -------------------------------------------------------------------------
    # numbers, with the products that make them

    val_tokens_per_byte = tokens_per_byte(folder, "val")
    eval_windows = 12 * cfg.eval_iters  # 12 is nanoGPT's default batch_size; a fixed number, so that losses compare
    print(f"data: {folder}, {train_data.tokens:,} train + {val_data.tokens:,} val tokens, {tokenizer['encoding']}")
    print(
        f"model: {model.get_num_params() / 1e6:.2f}M parameters, {model.flops_per_token() / 1e6:,.1f} MFLOP per token"
    )
    print(f"vocabulary: {n_ids:,} ids in {vocab_size:,} rows")
    if backend := hardware.attention_backend(device, dtype, model.config):
        print(f"attention: {backend}")
    needed = memory_estimate(model, optimizers, cfg, dtype)
    if not cfg.eval_only:
        print(f"memory: {hardware.memory_line(needed, device)}")
    print(
        f"iteration: {cfg.batch_size} * {cfg.gradient_accumulation_steps} * {cfg.block_size} = {tokens_per_iter:,} "
        f"tokens per iteration (batch_size * gradient_accumulation_steps * block_size)"
    )
    print(
        f"run: {cfg.max_iters:,} * {tokens_per_iter:,} = {cfg.max_iters * tokens_per_iter:,} tokens, "
        f"{cfg.max_iters * sequences_per_iter / len(train_data):.2f} epochs of {len(train_data):,} windows"
    )
    if cfg.decay_lr and cfg.schedule == "wsd":
        constant = cooldown_start(cfg) - cfg.warmup_iters
        print(
            f"learning rate: {cfg.warmup_iters:,} iterations of warmup, {constant:,} constant, "
            f"{cfg.max_iters - cooldown_start(cfg):,} of cooldown"
        )
    print(
        f"evaluation: 12 * {cfg.eval_iters} = {eval_windows:,} windows of train and val, which have "
        f"{len(train_data):,} and {len(val_data):,}, every {cfg.eval_interval:,} iterations"
    )
    for split, windows in (("train", train_data), ("val", val_data)):
        if len(windows) < eval_windows:
            print(f"note: {split} has only {len(windows):,} windows; all of them are evaluated")

    # -------------------------------------------------------------------------
    # logs

    wandb = None
    if cfg.wandb_log:
        try:
            import wandb
        except ImportError:
            raise ValueError("wandb_log=True needs wandb: pip install wandb, or --wandb_log=False") from None
        wandb.init(project=cfg.wandb_project, name=cfg.wandb_run_name, config=dataclasses.asdict(cfg))
    metrics_path = os.devnull  # eval_only leaves the folder of a run, which may be going on, as it is
    if not cfg.eval_only:
        os.makedirs(cfg.out_dir, exist_ok=True)
        files.remove_partial()
        metrics_path = os.path.join(cfg.out_dir, "metrics.jsonl")
        checkpoint.rewind_metrics(metrics_path, iter_num)
    metrics = checkpoint.Metrics(metrics_path)

    def record(kind, **figures):
        """Writes one line of metrics.jsonl; JSON has no infinity, which fp16's first gradient norms may be: null."""
        finite = {name: None if isinstance(x, float) and not math.isfinite(x) else x for name, x in figures.items()}
        metrics.write(json.dumps(dict(kind=kind, iter=iter_num) | finite) + "\n")
        if wandb and kind in ("iter", "eval"):  # train_loss is train/loss there, as in nanoGPT
            wandb.log(dict(iter=iter_num) | {name.replace("_", "/"): x for name, x in figures.items()})

    record("resume" if iter_num else "config", config=dataclasses.asdict(cfg), torch=torch.__version__, memory=needed)

    # -------------------------------------------------------------------------
    # batches, read by a thread while the model works on the one before

    def load(micro_batch):
        """Micro-batch of that number, counted from the start of the run: all that resuming needs to know."""
        chosen = train_data.training(cfg.batch_size * micro_batch, cfg.batch_size, cfg.seed)
        return as_batch(train_data.read(chosen), device)

    loader = ThreadPoolExecutor(max_workers=1)
    micro_batch = iter_num * cfg.gradient_accumulation_steps
    upcoming = loader.submit(load, micro_batch)

    # -------------------------------------------------------------------------
    # what is saved: best.pt has the first part, ckpt.pt both

    def weights(best_val_loss):
        """The model before iteration iter_num, what it is, and how far the run has come."""
        seconds = earlier_seconds + time.perf_counter() - run_start
        progress = dict(iter_num=iter_num, best_val_loss=best_val_loss, tokens_seen=tokens_seen, seconds=seconds)
        described = dict(model_args=model_args, gelu=model.config.gelu, arch=cfg.arch, tokenizer=tokenizer, data=data)
        described["config"] = dataclasses.asdict(cfg)
        return dict(model=model.state_dict(), bad_steps=bad_steps, bad_in_row=bad_in_row) | progress | described

    def whole_state():
        moments = {name: optimizer.state_dict() for name, optimizer in optimizers.items()}
        return weights(best_val_loss) | moments | dict(scaler=scaler.state_dict(), rng=rng)

    def save_checkpoint():
        metrics.sync()
        if files.save(whole_state()):
            say(f"saving checkpoint to {cfg.out_dir}")
            record("checkpoint", best_val_loss=best_val_loss)

    # -------------------------------------------------------------------------
    # the loop: evaluate, save, update, log

    model.loss_chunks = cfg.loss_chunks
    if cfg.compile:
        torch._functorch.config.activation_memory_budget = cfg.activation_memory
        model.compile(dynamic=False, mode=cfg.compile_mode)
    signal.signal(signal.SIGINT, ask_to_stop)
    signal.signal(signal.SIGTERM, ask_to_stop)
    bar = tqdm(total=cfg.max_iters, initial=iter_num, disable=None, dynamic_ncols=True, unit="it")  # on a terminal
    run_start = window_start = time.perf_counter()  # a window is what lies between two log lines
    window_iters, eval_seconds, step_loss = 0, 0.0, torch.zeros((), device=device)
    first_iter, evaluated_iter, compiled = iter_num, None, not cfg.compile
    while True:
        rng, out_of_memory = checkpoint.get_rng(device), False  # what the iteration begins with, should it begin again
        try:
            if not compiled:
                say("compiling the model (may take a minute)")
                start = time.perf_counter()
                # one pass that is not part of the run, its clock or its random numbers
                with hardware.compiling(), torch.random.fork_rng([device] if device.type == "cuda" else []):
                    with hardware.autocast(device, dtype):
                        _, loss = model(*to_device(upcoming.result(), device))
                    scaler.scale(loss).backward()
                model.zero_grad(set_to_none=True)
                hardware.synchronize(device)
                say(f"compiled in {time.perf_counter() - start:.1f}s")
                window_start, compiled = time.perf_counter(), True

            done, improved = iter_num == cfg.max_iters, False
            # whoever asks to stop need not wait for an evaluation: the resumed run begins with it
            due = done or cfg.eval_only or (iter_num % cfg.eval_interval == 0 and not stop_signals)
            if due and evaluated_iter != iter_num:
                hardware.synchronize(device)  # updates still in flight belong to the clock, what follows does not
                start = time.perf_counter()
                train_loss, val_loss = (
                    estimate_loss(model, windows, eval_windows, cfg.batch_size, device, dtype)
                    for windows in (train_data, val_data)
                )
                bpb = val_loss / math.log(2) * val_tokens_per_byte if val_tokens_per_byte else None
                shown = f", {bpb:.4f} bits/byte" if bpb else ""
                say(f"step {iter_num}: train loss {train_loss:.4f}, val loss {val_loss:.4f}{shown}")
                record("eval", train_loss=train_loss, val_loss=val_loss, val_bpb=bpb)
                gc.collect()  # the only time but for the first iteration, see there
                evaluated_iter, improved = iter_num, val_loss < best_val_loss
                eval_seconds = time.perf_counter() - start
                if cfg.eval_only:
                    break
                # best.pt first: ckpt.pt says how good its weights are. Those of iteration 0 are not worth a file
                if improved and (iter_num == 0 < cfg.max_iters or files.save_best(weights(val_loss))):
                    best_val_loss = val_loss
                window_start += time.perf_counter() - start

            stopping = bool(stop_signals)  # read once: a signal that comes after this waits for the next iteration
            every = cfg.checkpoint_interval
            save_due = iter_num % every == 0 if every else due and (improved or cfg.always_save_checkpoint)
            if (done or stopping or (save_due and iter_num)) and (improved or files.saved_iter != iter_num):
                hardware.synchronize(device)
                start = time.perf_counter()
                save_checkpoint()
                window_start += time.perf_counter() - start
            if cfg.keep_before_cooldown and iter_num == cooldown_start(cfg):
                hardware.synchronize(device)
                start = time.perf_counter()
                if files.save_before_cooldown(whole_state()):
                    say(f"saving {files.before_cooldown}, from which a longer run can go on (README)")
                window_start += time.perf_counter() - start
            if done or stopping:
                break

            if gc.isenabled():  # the first iteration: what is there by now, the compiler's objects above all, stays.
                start = time.perf_counter()  # Looking through it every now and then would halt the loop
                gc.collect()
                gc.freeze()
                gc.disable()
                window_start += time.perf_counter() - start

            lr = get_lr(iter_num, cfg)
            for group in (group for optimizer in optimizers.values() for group in optimizer.param_groups):
                group["lr"] = lr
                if "momentum" in group:
                    group["momentum"] = get_momentum(iter_num)
            step_loss.zero_()
            for _ in range(cfg.gradient_accumulation_steps):
                x, y = to_device(upcoming.result(), device)
                micro_batch += 1
                upcoming = loader.submit(load, micro_batch)
                with hardware.autocast(device, dtype):
                    _, loss = model(x, y)
                loss = loss / cfg.gradient_accumulation_steps  # micro-batches are equal in size: the sum is the mean
                step_loss += loss.detach()  # stays on the device: reading it here would wait for the GPU
                scaler.scale(loss).backward()
            for optimizer in optimizers.values():
                scaler.unscale_(optimizer)
            norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        except torch.OutOfMemoryError:
            out_of_memory = True  # dealt with below: in here the exception would keep the activations alive
        if out_of_memory:
            x = y = loss = norm = None  # and with them the activations
            model.train()  # it may have been evaluating
            model.zero_grad(set_to_none=True)
            checkpoint.set_rng(rng, device)
            hardware.forget_compiled(device)
            if iter_num > first_iter and files.saved_iter != iter_num:
                save_checkpoint()
            if cfg.batch_size == 1 or not cfg.auto_fit:
                available = hardware.available_memory(device)
                params = model.get_num_params(non_embedding=False)
                why = hardware.no_room(params, needed["optimizer"], model.config, cfg, dtype, available)
                raise ValueError(f"{why} ({files.kept}, this is iteration {iter_num})")
            text = f"warning: out of memory with batch_size={cfg.batch_size}; from iteration {iter_num} on"
            cfg.batch_size, cfg.gradient_accumulation_steps = hardware.smaller_batch(cfg.batch_size, sequences_per_iter)
            text += f" batch_size={cfg.batch_size}, gradient_accumulation_steps={cfg.gradient_accumulation_steps}"
            say(text, sys.stderr)
            micro_batch = iter_num * cfg.gradient_accumulation_steps
            upcoming = loader.submit(load, micro_batch)
            compiled, window_start, window_iters = not cfg.compile, time.perf_counter(), 0
            continue

        # Waits for the GPU, once an iteration: it then idles until the update has been launched. With fp16 an infinite
        # gradient is usual: all optimizers skip the update, the scaler lowers its scale, and only a bad loss is bad.
        size = norm.item()
        bad = not math.isfinite(step_loss.item() if scaler.is_enabled() else size)
        bad_steps, bad_in_row = bad_steps + bad, bad_in_row + 1 if bad else 0
        if bad:
            text = f"loss {step_loss.item():.4g} and gradient norm {size:.4g} in iteration {iter_num}"
            say(f"warning: {text}: its update is skipped ({bad_in_row} in a row)", sys.stderr)
            record("bad_step", loss=step_loss.item(), norm=size, in_row=bad_in_row)
        elif math.isfinite(size):
            if size > cfg.grad_clip > 0:  # else there is nothing to scale: a pass over the gradients less
                torch.nn.utils.clip_grads_with_norm_(model.parameters(), cfg.grad_clip, norm)
            for optimizer in optimizers.values():
                scaler.step(optimizer)
        scaler.update()
        model.zero_grad(set_to_none=True)
        tokens_seen += tokens_per_iter
        window_iters += 1
        bar.update()

        if iter_num % cfg.log_interval == 0 or iter_num == cfg.max_iters - 1:
            loss = step_loss.item()  # waits for the update, too: the clock tells the truth
            dt = (time.perf_counter() - window_start) / window_iters
            left = cfg.max_iters - 1 - iter_num
            eta = left * dt + math.ceil(left / cfg.eval_interval) * eval_seconds
            tflops = model.flops_per_token() * tokens_per_iter / dt / 1e12
            mfu = 100 * model.estimate_mfu(sequences_per_iter, dt, peak) if peak else None
            say(
                f"iter {iter_num}: loss {loss:.4f}, time {dt * 1000:.2f}ms, mfu {f'{mfu:.2f}%' if peak else 'n/a'}, "
                f"{tflops:.2f} TFLOP/s, {tokens_per_iter / dt:,.0f} tok/s, norm {size:.3f}, lr {lr:.2e}, "
                f"eta {duration(eta)}"
            )
            figures = dict(norm=size, lr=lr, tokens=tokens_seen, peak_memory=hardware.peak_memory(device))
            record("iter", loss=loss, dt=dt, mfu=mfu, tflops=tflops, **figures)
            window_start, window_iters = time.perf_counter(), 0
        if bad_in_row >= cfg.max_bad_steps:
            raise ValueError(
                f"no finite gradient in the {bad_in_row} iterations {iter_num - bad_in_row + 1} to {iter_num}; "
                f"{files.kept}. Try a lower --learning_rate, --grad_clip=1.0 or --dtype=float32 from there"
            )
        iter_num += 1

    bar.close()
    loader.shutdown(cancel_futures=True)
    if cfg.eval_only:
        sys.exit()
    if files.saved_iter != iter_num:
        raise OSError(f"iteration {iter_num}, the last one, could not be saved; {files.kept}")
    if not done:
        argv = [arg for arg in sys.argv if not arg.startswith("--init_from=")] + ["--init_from=resume"]
        say(f"stopped at iteration {iter_num}; continue with: {shlex.join(['python', *argv])}")
        sys.exit(128 + stop_signals[0])
    seconds = earlier_seconds + time.perf_counter() - run_start
    skipped = f", {bad_steps} updates skipped" if bad_steps else ""
    peak_memory = hardware.peak_memory(device)
    most = f", peak memory {peak_memory / 1e9:.2f} GB" if peak_memory else ""
    say(
        f"done: iteration {iter_num:,} after {duration(seconds)}, {tokens_seen:,} tokens{skipped}, "
        f"best val loss {best_val_loss:.4f}{most}"
    )
