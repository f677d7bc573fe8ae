"""
Train a GPT on one GPU (or CPU).

    python train.py config/fineweb_125m.py --batch_size=16 --gradient_accumulation_steps=32
    torchrun --standalone --nproc_per_node=4 train.py config/fineweb_125m.py  # on four GPUs

Reads token files from data/<dataset>. Writes into out_dir: ckpt.pt (the newest complete state, to resume
from), ckpt_prev.pt (the one before), best.pt (weights with the lowest validation loss) and metrics.jsonl
(the log's figures). An earlier run there is moved to earlier-1/.

Ctrl-C or SIGTERM drops the unfinished iteration, saves, and prints the command that continues.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while torch is imported: no traceback

import contextlib
import dataclasses
import gc
import itertools
import math
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import numpy as np
import torch
from tqdm import tqdm

from configurator import Config, from_command_line, key, run_script
from model import GPT, GPTConfig, make_gpt
from sologpt import checkpoint, fit, hardware, health, log, optim, parallel, report, resume, shards, sizes
from sologpt.display import print_aligned, say
from sologpt.errors import UserError, out_of_memory
from sologpt.files import sole_use
from sologpt.fp8 import use_fp8
from sologpt.layers import cast_weights, recast_weights
from sologpt.stop import Stopped, StopRequest
from sologpt.tokenizer import Tokenizer, read_tokenizer
from sologpt.tracker import TRACKERS


@dataclasses.dataclass
class TrainConfig(Config):
    synonyms = dict(
        lr="learning_rate", lr_min="min_lr", wd="weight_decay", clip="grad_clip", steps="max_iters"
    )

    # files
    out_dir: str = key("out", "folder to write into")
    init_from: str = key(
        "scratch", "scratch; resume; auto: resume if possible; gpt2, ..., gpt2-xl or a GPT-2 folder"
    )
    always_save_checkpoint: bool = key(
        True, "save at every evaluation; False: only at a new lowest val loss and at the end"
    )
    checkpoint_interval: int = key(
        0, "iterations between saves of ckpt.pt; 0: as always_save_checkpoint says", low=0
    )
    allow_data_change: bool = key(False, "resume or finetune even if data or tokenizer has changed")
    # evaluation and log
    eval_interval: int = key(2000, "iterations between evaluations", low=1)
    eval_iters: int = key(200, "size of an evaluation: 12 * eval_iters sequences of each split", low=1)
    eval_only: bool = key(False, "evaluate once and stop")
    log_interval: int = key(1, "iterations between log lines", low=1)
    dry_run: bool = key(False, "print the plan, memory and disk, then stop")
    sample_interval: int = key(0, "iterations between samples of text, drawn at evaluations; 0: none", low=0)
    tracker: str = key("", "where else to send the figures of metrics.jsonl", choices=("", *TRACKERS))
    wandb_log: bool = key(False, "nanoGPT's key for tracker='wandb'")
    wandb_project: str = key("owt", "project in wandb or trackio")
    wandb_run_name: str = key("gpt2", "name of the run in wandb or trackio")
    # data
    dataset: str = key("openwebtext", "folder of token files: one under data/, or a path")
    gradient_accumulation_steps: int = key(5 * 8, "micro-batches in one iteration", low=1)
    batch_size: int = key(12, "sequences in a micro-batch, which the model processes at once", low=1)
    block_size: int = key(1024, "tokens in one sequence, the longest context", low=1)
    # model
    arch: str = key("gpt2", "gpt2: as nanoGPT's; modern: learns more per token", choices=("gpt2", "modern"))
    n_layer: int = key(12, "transformer blocks", low=1)
    n_head: int = key(12, "attention heads; must divide n_embd (modern: n_embd / 2)", low=1)
    n_embd: int = key(768, "width of the model", low=1)
    dropout: float = key(0.0, "fraction of activations to drop; 0.1 or more for finetuning", low=0, below=1)
    bias: bool = key(False, "biases in Linear and LayerNorm, as OpenAI's GPT-2 has")
    # optimizer
    optimizer: str = key("adamw", "muon: Muon for the blocks, AdamW for the rest", choices=("adamw", "muon"))
    learning_rate: float = key(6e-4, "peak learning rate", low=0)
    max_iters: int = key(600000, "iterations (optimizer updates) of the whole run", low=0)
    max_minutes: float = key(0.0, "finish run and schedule within this many minutes; 0: no limit", low=0)
    weight_decay: float = key(1e-1, "weight decay of matrices; biases and LayerNorm have none", low=0)
    beta1: float = key(0.9, "decay of the mean of gradients", low=0, below=1)
    beta2: float = key(0.95, "decay of the mean of squared gradients", low=0, below=1)
    grad_clip: float = key(1.0, "largest gradient norm; 0: no clipping", low=0)
    max_bad_steps: int = key(10, "end the run after this many non-finite gradients in a row", low=1)
    # learning rate schedule
    decay_lr: bool = key(True, "warm up, then decay as schedule says; False: learning_rate throughout")
    schedule: str = key("cosine", "cosine; wsd: constant, then a linear cooldown", choices=("cosine", "wsd"))
    cooldown_frac: float = key(0.7, "wsd: last fraction of max_iters, a linear fall to min_lr", low=0, high=1)
    keep_before_cooldown: bool = key(False, "wsd: save before_cooldown.pt, from which a longer run can go on")
    warmup_iters: int = key(2000, "iterations of linear warmup", low=0)
    lr_decay_iters: int = key(600000, "cosine: iteration that reaches min_lr, usually max_iters", low=0)
    min_lr: float = key(6e-5, "final learning rate, usually learning_rate / 10", low=0)
    # machine
    seed: int = key(1337, "seed of weights, dropout and the order of data", low=0, below=2**32)
    device: str = key("", "cuda, cuda:N, mps or cpu; empty: the best available")
    dtype: str = key("", "dtype of matmuls; empty: what suits the device", choices=("", *hardware.DTYPES))
    matmul: str = key("", "fp8: the blocks' matmuls in FP8 (RTX 40, H100 or newer)", choices=("", "fp8"))
    compile: bool = key(True, "torch.compile the model: slower to start, then faster")
    compile_mode: str = key(
        "default",
        "max-autotune-no-cudagraphs: tunes kernels for minutes; matmuls only from 68 SMs on",
        choices=("default", "max-autotune-no-cudagraphs"),
    )
    activation_memory: float = key(
        1.0, "0.8 recomputes cheap activations of a compiled model instead of keeping them", low=0.8, high=1
    )
    loss_chunks: int = key(0, "chunks of the loss, saving memory; 0: automatic if compiled, else none", low=0)
    auto_fit: bool = key(True, "if memory is short, halve batch_size and double gradient_accumulation_steps")
    peak_flops: float = key(0.0, "FLOP/s that mfu is measured against; 0: this GPU's dense peak", low=0)
    backend: str = key("nccl", "how several GPUs communicate; CPUs use gloo", choices=("nccl", "gloo"))

    @property
    def sequences_per_iter(self):
        return self.batch_size * self.gradient_accumulation_steps

    @property
    def tokens_per_iter(self):
        return self.sequences_per_iter * self.block_size

    @property
    def eval_windows(self):
        return 12 * self.eval_iters  # nanoGPT's batch_size, fixed so that losses compare

    @property
    def cooldown_start(self):
        # a Fraction: in floats 0.07 * 100 is 7.000000000000001, and ceil gives 8
        return self.max_iters - math.ceil(Fraction(str(self.cooldown_frac)) * self.max_iters)

    def problems(self):
        """Returns messages about conflicting values."""
        found = []
        if problem := sizes.width_problem(self.n_embd, self.n_head, self.arch):
            found.append(problem)
        if self.keep_before_cooldown and self.schedule != "wsd":
            found.append(
                "keep_before_cooldown=True needs schedule='wsd': a cosine has no constant part to branch from"
            )
        if self.wandb_log and self.tracker not in ("", "wandb"):
            found.append(f"wandb_log=True means tracker='wandb', not {self.tracker!r}; leave one of them out")
        if 0 < self.peak_flops < 1e9:
            found.append(f"peak_flops={self.peak_flops:g} must be in FLOP/s, like 312e12")
        for name, off in (("compile_mode", "default"), ("activation_memory", 1.0)):
            value = getattr(self, name)
            if not self.compile and value != off:
                text = f"{name}={value!r} needs torch.compile"
                found.append(f"{text}: set compile=True, or {name}={off!r}")
        if problem := resume.init_from_problem(self.init_from):
            found.append(problem)
        return found


# -----------------------------------------------------------------------------
# learning rate


def get_lr(it, cfg, time_used=0.0):
    """Returns the learning rate of iteration it: a linear warmup, then as cfg.schedule says.

    cosine: down to min_lr at lr_decay_iters, then min_lr. wsd: constant, then from cooldown_start linearly
    down to min_lr at max_iters. time_used, the share of max_minutes, counts instead of the share of
    iterations if it is larger.
    """
    if not cfg.decay_lr:
        return cfg.learning_rate
    # max_minutes ends the warmup after a tenth of the time, but not before ten iterations
    warm = max((it + 1) / (cfg.warmup_iters + 1), min(10 * time_used, (it + 1) / 10))
    if warm < 1:
        return cfg.learning_rate * warm
    if cfg.schedule == "wsd":
        cooldown_left = (cfg.max_iters - it) / max(1, cfg.max_iters - cfg.cooldown_start)
        if cfg.cooldown_frac:
            cooldown_left = min(cooldown_left, (1 - time_used) / cfg.cooldown_frac)
        return cfg.min_lr + min(1, cooldown_left) * (cfg.learning_rate - cfg.min_lr)
    assert cfg.schedule == "cosine"
    if it >= cfg.lr_decay_iters:
        return cfg.min_lr
    progress = (it - cfg.warmup_iters) / max(1, cfg.lr_decay_iters - cfg.warmup_iters)
    progress = max(progress, time_used)
    return cfg.min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (cfg.learning_rate - cfg.min_lr)


def set_learning_rate(optimizers, it, cfg, time_used=0.0):
    """Sets learning rate and momentum of the optimizers for iteration it. Returns the learning rate."""
    lr = get_lr(it, cfg, time_used)
    for optimizer in optimizers.values():
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("rate", 1.0)  # by kind of parameter: optim.rate
            if "momentum" in group:  # Muon's
                group["momentum"] = optim.muon_momentum(it)
    return lr


# -----------------------------------------------------------------------------
# batches


def micro_batches(windows, first, cfg, device):
    """Yields this process's micro-batches from number `first` on, int64 (B, T + 1) in host memory, each read
    by a thread while the model works on the one before. Resuming needs only the number."""
    numbers = itertools.count(first + parallel.rank(), parallel.processes())

    def load(number):
        first_sequence = cfg.batch_size * number
        return host_tensor(windows.read_training(first_sequence, cfg.batch_size, cfg.seed), device)

    with ThreadPoolExecutor(max_workers=1) as reader:
        upcoming = reader.submit(load, next(numbers))
        for number in numbers:
            tokens = upcoming.result()
            upcoming = reader.submit(load, number)
            yield tokens


def host_tensor(tokens, device):
    """Returns NumPy tokens as a tensor, pinned for a CUDA device so that copying overlaps with other work."""
    tensor = torch.from_numpy(tokens)
    return tensor.pin_memory() if device.type == "cuda" else tensor


def inputs_and_targets(tokens, device):
    """Returns inputs and targets, int64 (B, T) on device, of tokens (B, T + 1); no sync if pinned."""
    tokens = tokens.to(device, non_blocking=device.type == "cuda")
    return tokens[:, :-1].contiguous(), tokens[:, 1:].clone()


# -----------------------------------------------------------------------------
# one iteration; bench.py times these two


def micro_step(model, tokens, scaler, machine, accumulation):
    """Runs one of `accumulation` micro-batches forward and backward. Returns its share of the iteration's
    loss, a tensor on the device: reading it here would wait for the GPU."""
    x, y = inputs_and_targets(tokens, machine.device)
    with machine.autocast():
        loss = model(x, y)[1]  # naming the logits would keep them in memory
    loss = loss / accumulation  # micro-batches have as many targets each: the shares add up to the mean
    scaler.scale(loss).backward()
    return loss.detach()


def update(model, optimizers, scaler, grad_clip):
    """Clips and applies the gradients if they are finite, and frees them. Returns the unclipped norm."""
    with fit.no_retry_if_out_of_memory():  # a half-done update cannot be repeated
        for optimizer in optimizers.values():
            scaler.unscale_(optimizer)
        # after unscaling, and before Muon's step overwrites the gradients
        total_norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        norm = total_norm.item()  # waits for the GPU, once an iteration; in fp16 the scaler does too
        if 0 < grad_clip < norm:
            torch.nn.utils.clip_grads_with_norm_(model.parameters(), grad_clip, total_norm)
        if math.isfinite(norm):
            for optimizer in optimizers.values():
                scaler.step(optimizer)
            recast_weights(model)  # to 16 bits
    scaler.update()
    model.zero_grad(set_to_none=True)
    return norm


# -----------------------------------------------------------------------------
# the run


@dataclasses.dataclass
class Progress:
    """How far a run has come; a checkpoint holds these fields too, by name."""

    iter_num: int = 0
    best_val_loss: float = math.inf
    tokens_seen: int = 0
    bad_steps: int = 0  # skipped updates, in total
    bad_in_row: int = 0
    resumed: int = 0  # how many times
    pretrained: bool = False  # at iteration 0 already
    other_tokens: int = 0  # seen of other data
    eval_seconds: float = 0.0  # last evaluation, with samples


@dataclasses.dataclass
class Run:
    """What the loop works with."""

    # made by set_up
    cfg: TrainConfig
    machine: hardware.Machine
    folder: str  # of the data
    tokenizer: Tokenizer
    train_data: shards.Windows
    val_data: shards.Windows
    fingerprint: dict  # of the data
    model: GPT
    optimizers: dict  # by their names in a checkpoint
    files: checkpoint.RunFiles
    scaler: torch.amp.GradScaler = None
    memory: dict = None  # the estimate, in bytes
    # how far it has come
    progress: Progress = dataclasses.field(default_factory=Progress)
    started: float = None  # set_up's start, minus the time of earlier sessions
    first_iter: int = 0  # where this process began
    evaluated_iter: int = -1  # of the last evaluation
    losses: dict = None  # of that evaluation
    norms: health.Recent = dataclasses.field(default_factory=health.Recent)
    logged_losses: health.Recent = dataclasses.field(default_factory=health.RecentLosses)
    done: bool = False
    rng: dict = None  # torch's random state at the beginning of the iteration
    # made by main
    metrics: log.Metrics = None
    clock: log.Clock = None
    stop: StopRequest = None
    bar: tqdm = None


def train(run):
    """Evaluates, saves, updates and logs until the run is done.

    A request to stop, or running out of memory, leaves this function as an exception. That frees its frame
    and all activations; run.progress and run.rng say where to continue.
    """
    cfg = run.cfg
    at = run.progress
    clock = run.clock
    machine = run.machine
    run.rng = checkpoint.get_rng(machine.device)  # if memory runs out while compiling
    if cfg.compile:
        compile_passes(run)
    accumulation = cfg.gradient_accumulation_steps
    batches = micro_batches(run.train_data, at.iter_num * accumulation, cfg, machine.device)
    step_loss = torch.zeros((), device=machine.device)
    norm = 0.0
    lr = 0.0
    gc.disable()  # a collection would stall the loop; evaluate() collects
    clock.restart()

    while True:
        run.rng = checkpoint.start_rng(run)
        # raises Stopped after Ctrl-C; the largest share of max_minutes counts
        time_used = parallel.agree(run.stop, log.share_of_time(run))
        run.done = at.iter_num == cfg.max_iters or time_used == 1
        if run.done and clock.iters:  # max_minutes are over
            log.log_iteration(run, at.iter_num - 1, step_loss, norm, lr)

        # evaluate
        eval_due = run.done or cfg.eval_only or at.iter_num % cfg.eval_interval == 0
        improved = False
        if eval_due and run.evaluated_iter != at.iter_num:  # not again after running out of memory
            with clock.paused():
                improved = evaluate(run)
                if cfg.sample_interval and at.iter_num % cfg.sample_interval == 0:
                    log.log_samples(run)
        if cfg.eval_only:
            return

        # save: until the update, weights, run.rng and iter_num agree
        if cfg.checkpoint_interval:
            save_due = at.iter_num % cfg.checkpoint_interval == 0
        else:
            save_due = eval_due and (improved or cfg.always_save_checkpoint)
        if at.iter_num == 0 or at.bad_in_row:
            save_due = False  # nothing new, or amid skipped updates
        already_saved = run.files.saved_iter == at.iter_num and not improved
        if (save_due or run.done) and not already_saved:
            with clock.paused():
                checkpoint.save_checkpoint(run)
        if cfg.keep_before_cooldown and at.iter_num == cfg.cooldown_start and not cfg.max_minutes:
            with clock.paused():
                checkpoint.save_before_cooldown(run)
        if run.done:
            return

        # update: forward and backward of every micro-batch, then the optimizers
        lr = set_learning_rate(run.optimizers, at.iter_num, cfg, time_used)
        step_loss.zero_()
        with run.stop.interrupts():  # Ctrl-C breaks off an iteration, which may take minutes
            for _ in range(accumulation // parallel.processes()):
                step_loss += micro_step(run.model, next(batches), run.scaler, machine, accumulation)
        parallel.sum_gradients(run, step_loss)  # over all processes
        norm = update(run.model, run.optimizers, run.scaler, cfg.grad_clip)
        health.watch_update(run, step_loss, norm)  # counts skipped updates; too many end the run
        at.tokens_seen += cfg.tokens_per_iter
        clock.iters += 1
        run.bar.update()

        # log
        if at.iter_num % cfg.log_interval == 0 or at.iter_num == cfg.max_iters - 1:
            log.log_iteration(run, at.iter_num, step_loss, norm, lr)
        at.iter_num += 1


def compile_passes(run):
    """Runs each pass once, so that torch compiles it. The random state is restored."""
    cfg, machine = run.cfg, run.machine
    say("compiling the model (may take a minute)")
    start = time.perf_counter()
    tokens = torch.zeros(cfg.batch_size, cfg.block_size + 1, dtype=torch.int64)
    cuda_devices = [machine.device] if machine.device.type == "cuda" else []
    try:
        with run.stop.interrupts(), hardware.compiling(), torch.random.fork_rng(cuda_devices):
            count = parallel.processes()  # a window for each
            estimate_loss(run.model, run.val_data, count, cfg.batch_size, machine)
            if not cfg.eval_only:
                micro_step(run.model, tokens, run.scaler, machine, cfg.gradient_accumulation_steps)
    except UserError:
        run.stop.check()  # Ctrl-C kills the compiler's processes too: a stop, not an error
        raise
    run.model.zero_grad(set_to_none=True)
    machine.synchronize()
    run.metrics.record("compiled", run.progress.iter_num, seconds=time.perf_counter() - start)


@torch.no_grad()
def estimate_loss(model, windows, count, batch_size, machine):
    """Returns this process's part of the mean loss, a float, over count windows of a split, always the same,
    whatever the batch_size. No random state is touched; one sync, at the end."""
    spread = windows.spread(count)
    chosen = spread[parallel.rank() :: parallel.processes()]
    total = torch.zeros((), device=machine.device)
    model.eval()
    for first in tqdm(range(0, len(chosen), batch_size), "evaluating", leave=False, disable=None):
        chunk = chosen[first : first + batch_size]
        whole_batch = np.resize(chunk, batch_size)  # the last batch repeats windows
        tokens = host_tensor(windows.read(whole_batch), machine.device)
        x, y = inputs_and_targets(tokens, machine.device)
        y[len(chunk) :] = -1  # repeats do not count; one shape, one graph
        with machine.autocast():
            loss = model(x, y)[1]
        total += loss.float() * len(chunk)
    model.train()
    return total.item() / len(spread)


def evaluate(run):
    """Logs the losses of both splits. Returns whether val loss is the lowest so far; if so, saves best.pt."""
    cfg, at = run.cfg, run.progress
    start = time.perf_counter()
    with run.stop.interrupts():
        losses = [
            estimate_loss(run.model, split, cfg.eval_windows, cfg.batch_size, run.machine)
            for split in (run.train_data, run.val_data)
        ]
    train_loss, val_loss = parallel.all_reduce(losses, parallel.SUM, run.stop)
    text = f"step {at.iter_num}: train loss {train_loss:.4f}, val loss {val_loss:.4f}"
    val_bpb = None
    if tokens_per_byte := shards.tokens_per_byte(run.val_data.shards):
        val_bpb = val_loss / math.log(2) * tokens_per_byte
        text += f", {val_bpb:.4f} bits/byte"
    say(text)
    run.losses = dict(train_loss=train_loss, val_loss=val_loss, val_bpb=val_bpb)
    run.metrics.record("eval", at.iter_num, **run.losses, tokens=at.tokens_seen, elapsed=log.elapsed(run))
    gc.collect()
    run.evaluated_iter = at.iter_num
    at.eval_seconds = time.perf_counter() - start
    if cfg.eval_only or not val_loss < at.best_val_loss:  # a NaN is never the best
        return False
    if checkpoint.save_best(run, val_loss):  # before ckpt.pt, which records its loss
        at.best_val_loss = val_loss
    return True


# -----------------------------------------------------------------------------
# if memory runs out, or data cannot be read


def train_until_it_fits(run):
    """Calls train, with ever smaller micro-batches while memory runs out. Saves if stopped."""
    while True:
        try:
            with parallel.leaving_together(run.stop):
                train(run)
            return
        except (shards.DataError, parallel.Lost) as e:
            checkpoint.save_progress(run)  # nothing of the iteration has been applied yet
            raise UserError(f"{e} ({run.files.saved_text})") from None
        except Stopped:
            if not run.cfg.eval_only and run.files.saved_iter != run.progress.iter_num:
                checkpoint.save_checkpoint(run)
            return
        except UserError:
            raise  # out_of_memory could misread its text
        except Exception as e:
            if not out_of_memory(e):
                raise
        finally:
            gc.enable()  # train has disabled it
        # here exception and activations are gone
        fit.use_smaller_batch(run)


# -----------------------------------------------------------------------------
# setting up and ending


def model_config(cfg, fields):
    """Returns the GPTConfig of the keys; fields, a dict, fills in the rest."""
    keys = {name: getattr(cfg, name) for name in GPTConfig.__dataclass_fields__ if hasattr(cfg, name)}
    config = GPTConfig(**fields | keys)
    fit.check_size(config)
    return config


def prepare_model(model, cfg, machine):
    """Moves the model to the device, and applies matmul, loss_chunks, dtype and compile."""
    model.loss_chunks = cfg.loss_chunks
    if cfg.matmul == "fp8":
        use_fp8(model, machine)
    if cfg.compile:
        hardware.keep_activations(cfg.activation_memory)
        model.compile(dynamic=False, mode=cfg.compile_mode)
    model.to(machine.device)
    cast_weights(model, machine.dtype)


def set_up(cfg, machine):
    """Returns the Run that the keys ask for. Raises UserError or OSError if they cannot be met."""
    started = time.perf_counter()
    torch.manual_seed(cfg.seed)
    files = checkpoint.RunFiles(cfg.out_dir)

    # the model to resume or finetune, if any
    state = resume.load_state(cfg, files)
    source = cfg.init_from
    pretrained = None
    fields = {}  # GPTConfig's
    if state:  # resuming
        source = files.newest
        fields = checkpoint.model_fields(state, source, GPTConfig)
    elif cfg.init_from not in ("scratch", "auto"):  # finetuning
        overrides = dict(dropout=cfg.dropout)
        if "block_size" in cfg.given:
            overrides["block_size"] = cfg.block_size
        pretrained = GPT.from_pretrained(source, overrides)
        fields = dataclasses.asdict(pretrained.config)
    if fields:
        cfg = resume.with_architecture(cfg, fields, source, resuming=bool(state))

    # data
    folder = shards.find_data(cfg.dataset)
    tokenizer = read_tokenizer(folder)
    vocab_size = fields.get("vocab_size", tokenizer.embedding_rows())
    resume.check_vocabulary(vocab_size, source, tokenizer, folder, state)
    if pretrained:
        resume.check_tokenizer(cfg, source, tokenizer, folder)
    train_data, val_data = shards.open_splits(folder, cfg.block_size, tokenizer.vocab_size)
    fingerprint = shards.fingerprint(train_data.shards + val_data.shards, tokenizer)
    data_changed = False
    if state:
        data_changed = resume.check_data(cfg, state, fingerprint, folder, source)
    shards.warn_if_replaced(folder, fingerprint)

    # model and optimizers
    config = model_config(cfg, fields | dict(vocab_size=vocab_size, n_ids=tokenizer.vocab_size))
    model = pretrained or make_gpt(config)
    model.config = config  # with this tokenizer's n_ids, which a pretrained one lacks
    prepare_model(model, cfg, machine)
    optimizers = optim.make_optimizers(model, cfg, machine.device)
    run = Run(cfg, machine, folder, tokenizer, train_data, val_data, fingerprint, model, optimizers, files)
    run.started = started
    run.progress.pretrained = pretrained is not None
    run.scaler = torch.amp.GradScaler(machine.device.type, enabled=machine.dtype == "float16")
    if state:
        resume.restore(run, state, data_changed)  # weights, moments, progress
        resume.warn_of_changes(cfg, machine, state, get_lr, fingerprint)
    elif not cfg.eval_only:
        optim.allocate_moments(optimizers)
    run.memory = fit.fit_batch_size(model, optimizers, cfg, machine)  # may lower cfg.batch_size
    resume.check_alike(run)  # across processes
    return run


def finish(run, argv):
    """Says how the run ended. Exits with 128 + signal if one stopped it; raises OSError if not saved."""
    at = run.progress
    if run.cfg.eval_only:
        if run.evaluated_iter < 0:
            sys.exit(128 + run.stop.number)
        return
    if run.files.saved_iter != at.iter_num:
        raise OSError(f"iteration {at.iter_num}, the last one, could not be saved; {run.files.saved_text}")
    if not run.done or run.evaluated_iter != at.iter_num:
        say(f"stopped at iteration {at.iter_num}; continue with: {report.resume_command(argv, run.cfg)}")
        sys.exit(128 + run.stop.number)
    report.sum_up(run)


@parallel.only_process_0_prints()
def main(argv):
    cfg = from_command_line(TrainConfig, __doc__, argv)
    machine = hardware.find_machine(cfg)
    machine = hardware.connect_processes(cfg, machine)
    print_aligned([machine.line])
    for note in report.notes(cfg):
        print(note)
    lock = contextlib.nullcontext()
    if not (cfg.eval_only or cfg.dry_run or parallel.rank()):  # none of these writes to out_dir
        lock = sole_use(cfg.out_dir)
    with lock:
        run = set_up(cfg, machine)
        report.describe(run)
        if cfg.dry_run:
            report.print_dry_run(run)
            return
        run.clock = log.Clock(machine)
        run.bar = log.progress_bar(cfg, run.progress.iter_num)
        run.stop = StopRequest("stopping; Ctrl-C again leaves without saving")
        run.metrics = log.prepare_out_dir(run)
        with contextlib.closing(run.metrics), run.stop, run.bar:
            train_until_it_fits(run)
            finish(run, argv)


if __name__ == "__main__":
    run_script(main)
