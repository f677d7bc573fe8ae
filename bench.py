"""
Find the micro-batch that trains fastest on this machine.

    python bench.py config/fineweb_125m.py
    python bench.py config/fineweb_125m.py --sweep_batch_size=8,16 --sweep_loss_chunks=1,8

Tries sizes of micro-batch, with as many gradient_accumulation_steps as keep the tokens of an iteration, and prints a
table and the command to train with. Takes the configs and keys of train.py; what only a run needs (out_dir,
learning_rate, ...) has no effect.

Each row is measured in a process of its own, so that none inherits another's memory, and one that runs out of memory,
even if the kernel kills it, is a row as well. After a warm-up a row times, in turn and several times, a block of
micro-steps (reading a batch, forward, backward), waiting for the device only at its ends, and the update (clipping, the
check that gradients are finite, optimizer step, zeroing them). From the medians of both

    ms/iter = t(micro-step) * gradient_accumulation_steps + t(update)

so a row takes some seconds, and its start and compilation, where an iteration takes a minute. spread is what its
repetitions differ by, (slowest - fastest) / median. Peak memory is what torch has allocated on a CUDA GPU at most
(nvidia-smi shows some 0.5 GB more), on a CPU the largest resident size of the process, libraries included; beside it is
the estimate that train.py prints before it starts.
"""

import contextlib
import dataclasses
import json
import math
import multiprocessing
import os
import shlex
import signal
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

import checkpoint
import hardware
import shards
from configurator import convert, from_command_line, key, parse
from model import GPT, GPTConfig
from train import TrainConfig, as_batch, embedding_rows, make_optimizers, memory_estimate, to_device

BLOCK_SECONDS, ROW_SECONDS, MOST_REPEATS = 1.0, 4.0, 20  # a block of micro-steps, all blocks of a row, their number
SWEPT = ("batch_size", "activation_memory", "loss_chunks")


@dataclass
class BenchConfig(TrainConfig):
    # benchmark
    sweep_batch_size: str = key("", "sizes to try, as in 8,16,32; empty: batch_size times 1/4, 1/2, 1, 2, 4 and 8")
    sweep_activation_memory: str = key("", "values of activation_memory to try; empty: the one that is set")
    sweep_loss_chunks: str = key("", "values of loss_chunks to try; empty: the one that is set")
    real_data: bool = key(False, "read the batches from the dataset; False: random tokens")
    profile: bool = key(False, "instead of a sweep, list the operations that take the time, at batch_size")
    json: str = key("", "file to write all figures to")

    def problems(self):
        found = super().problems()
        for name in SWEPT:
            try:
                self.sweep(name)
            except ValueError as e:
                found.append(f"sweep_{name}: {e}")
        return found

    def sweep(self, name):
        """Returns the values of a key to try, ascending. Raises ValueError for one that the key cannot have."""
        field = next(f for f in dataclasses.fields(self) if f.name == name)
        S = self.batch_size * self.gradient_accumulation_steps
        values = [self.batch_size * 2**k // 4 for k in range(6) if self.batch_size * 2**k % 4 == 0]
        values = [b for b in values if S % b == 0] if name == "batch_size" else [getattr(self, name)]
        if text := getattr(self, f"sweep_{name}"):
            values = sorted({convert(parse(part.strip(), field), field) for part in text.split(",")})
        if name == "batch_size" and (odd := [b for b in values if S % b]):
            sizes = ", ".join(str(b) for b in range(1, S + 1) if S % b == 0)
            raise ValueError(f"{odd[0]} does not divide the {S} sequences of an iteration; these do: {sizes}")
        if name == "activation_memory" and text and not self.compile and values != [1]:
            raise ValueError("activation_memory acts through torch.compile only; set compile=True")
        return values


# -----------------------------------------------------------------------------
# one row, in a process of its own


def find_vocabulary(cfg):
    """Returns (folder of the dataset or None, ids, rows of the embedding, a phrase that says which vocabulary it is).
    Raises FileNotFoundError if real_data is wanted and not there."""
    try:
        folder = shards.find_data(cfg.dataset)
    except FileNotFoundError:
        if cfg.real_data:
            raise
        return None, 50257, 50304, f"GPT-2's, as there is no dataset {cfg.dataset!r}"
    tokenizer = shards.read_tokenizer(folder)
    return folder, tokenizer["vocab_size"], embedding_rows(tokenizer), f"{tokenizer['encoding']}, of {folder}"


def loader_of(cfg, folder, n_ids, vocab_size, device):
    """Returns a function that gives the micro-batch that begins at a sequence, or the same random one every time."""
    if cfg.real_data:
        windows = shards.Windows(shards.find_shards(folder, "train"), cfg.block_size, vocab_size)
    random_tokens = np.random.RandomState(cfg.seed).randint(n_ids, size=(cfg.batch_size, cfg.block_size + 1))

    def load(first):
        tokens = random_tokens
        if cfg.real_data:
            tokens = windows.read(windows.training(first, cfg.batch_size, cfg.seed))
        return as_batch(tokens, device)

    return load


def trainer(cfg, device, dtype):
    """Returns (model, estimate of its memory in bytes, micro_step, update); the latter two do what an iteration of
    train.py does, and random tokens, unless cfg.real_data, go the way of its batches too."""
    folder, n_ids, vocab_size, _ = find_vocabulary(cfg)
    torch.manual_seed(cfg.seed)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    model_args = {name: getattr(cfg, name) for name in checkpoint.MODEL_ARGS if name != "vocab_size"}
    model = GPT(GPTConfig(**model_args, vocab_size=vocab_size, n_ids=n_ids, arch=cfg.arch)).to(device)
    # learning_rate=0: the same work, and weights that stay finite however often
    optimizers = make_optimizers(model, dataclasses.replace(cfg, learning_rate=0.0), device)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == "float16")
    checkpoint.allocate_moments(optimizers)
    model.loss_chunks = cfg.loss_chunks
    if cfg.compile:
        torch._functorch.config.activation_memory_budget = cfg.activation_memory
        model.compile(dynamic=False, mode=cfg.compile_mode)

    load, loader = loader_of(cfg, folder, n_ids, vocab_size, device), ThreadPoolExecutor(max_workers=1)
    first, upcoming, step_loss = 0, loader.submit(load, 0), torch.zeros((), device=device)

    def micro_step():
        nonlocal first, upcoming, step_loss
        x, y = to_device(upcoming.result(), device)
        first += cfg.batch_size
        upcoming = loader.submit(load, first)
        with hardware.autocast(device, dtype):
            _, loss = model(x, y)
        loss = loss / cfg.gradient_accumulation_steps
        step_loss += loss.detach()
        scaler.scale(loss).backward()

    def update():
        for optimizer in optimizers.values():
            scaler.unscale_(optimizer)
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
        if math.isfinite(size := norm.item()):
            if size > cfg.grad_clip > 0:
                torch.nn.utils.clip_grads_with_norm_(model.parameters(), cfg.grad_clip, norm)
            for optimizer in optimizers.values():
                scaler.step(optimizer)
        scaler.update()
        model.zero_grad(set_to_none=True)

    return model, sum(memory_estimate(model, optimizers, cfg, dtype).values()), micro_step, update


def seconds(work, device, times=1):
    """Returns the seconds that work() takes on average, called so many times with a sync at both ends only."""
    hardware.synchronize(device)
    start = time.perf_counter()
    for _ in range(times):
        work()
    hardware.synchronize(device)
    return (time.perf_counter() - start) / times


def measure(micro_step, update, accumulation, device):
    """Returns the figures of time of one row; see the docstring of this file."""
    with hardware.compiling():
        first = seconds(micro_step, device)
    seconds(update, device)
    n = min(accumulation, max(1, round(BLOCK_SECONDS / seconds(micro_step, device))))
    seconds(update, device)
    micro, updates, start = [], [], time.perf_counter()
    while not micro or (time.perf_counter() - start < ROW_SECONDS and len(micro) < MOST_REPEATS):
        micro.append(seconds(micro_step, device, n))
        updates.append(seconds(update, device))
    iters = [m * accumulation + u for m, u in zip(micro, updates, strict=True)]
    dt = statistics.median(micro) * accumulation + statistics.median(updates)
    figures = dict(ms_per_iter=1e3 * dt, micro_step_ms=1e3 * statistics.median(micro))
    figures |= dict(update_ms=1e3 * statistics.median(updates), first_micro_step_s=first)
    return figures | dict(repeats=len(iters), block=n, spread=(max(iters) - min(iters)) / dt)


def peak_memory(device):
    """Returns the bytes of memory that this process has had at most: allocated by torch on a CUDA device, resident on
    the CPU; None where neither is known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(ImportError):  # on Windows
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit if device.type == "cpu" else None


def driver_version(device):
    """Returns the version of NVIDIA's driver; None for other devices, or if nvidia-smi cannot be asked."""
    if device.type != "cuda":
        return None
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(ask, capture_output=True, text=True, check=True).stdout.split()[0]


def about(model, cfg, device, device_why, dtype, dtype_why, peak_why):
    """Returns what a reader of the figures must know: a dict with the lines to print and entries for the JSON file."""
    name = hardware.device_name(device)
    *_, n_ids, vocab_size, which = find_vocabulary(cfg)
    lines = [
        f"device: {name} ({device_why}), {dtype} ({dtype_why})",
        f"mfu: {peak_why}",
        f"model: {model.get_num_params() / 1e6:.2f}M parameters, {model.flops_per_token() / 1e6:,.1f} MFLOP per token",
        f"vocabulary: {n_ids:,} ids in {vocab_size:,} rows ({which})",
    ]
    versions = dict(torch=torch.__version__, cuda=torch.version.cuda, threads=torch.get_num_threads())
    return dict(lines=lines, device=name, driver=driver_version(device), dtype=dtype, vocab_size=vocab_size) | versions


def out_of_memory(error):
    """Whether it is one of the many ways in which torch, CUDA's libraries or the system say that memory ran out."""
    words = ("allocate memory", "out of memory", "ALLOC_FAILED")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(word in str(error) for word in words)


def row_process(cfg, pipe):
    """Sends ("about", dict), then ("row", figures), or ("memory", None) or ("error", text) where it has failed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the sweep's business, which ends this process
    hardware.use_expandable_segments()
    try:
        device, device_why = hardware.pick_device(cfg.device)
        dtype, dtype_why = hardware.pick_dtype(cfg.dtype, device)
        peak, peak_why = hardware.device_peak(device, dtype)
        if cfg.peak_flops:
            peak, peak_why = cfg.peak_flops, f"{cfg.peak_flops / 1e12:g} TFLOP/s as given by peak_flops"
        if cfg.compile and (obstacle := hardware.compile_obstacle(device)):
            raise ValueError(f"{obstacle}; or run without it: --compile=False")
        model, estimate, micro_step, update = trainer(cfg, device, dtype)
        pipe.send(("about", about(model, cfg, device, device_why, dtype, dtype_why, peak_why)))
        if cfg.profile:
            pipe.send(("row", profile(micro_step, update, device)))
            return
        figures = measure(micro_step, update, cfg.gradient_accumulation_steps, device)
        dt, sequences = figures["ms_per_iter"] / 1e3, cfg.batch_size * cfg.gradient_accumulation_steps
        tokens = sequences * cfg.block_size
        figures |= dict(tokens_per_s=tokens / dt, tflops=model.flops_per_token() * tokens / dt / 1e12)
        figures["mfu"] = model.estimate_mfu(sequences, dt, peak) if peak else None
        figures |= dict(peak_memory=peak_memory(device), estimated_memory=estimate)
        figures["reserved_memory"] = torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None
        pipe.send(("row", figures))
    except Exception as e:
        if not out_of_memory(e) and not isinstance(e, (ValueError, OSError)):
            raise  # a fault of ours: its traceback, and the exit status says so
        pipe.send(("memory", None) if out_of_memory(e) else ("error", str(e)))


def profile(micro_step, update, device, count=5, rows=15):
    """Returns lines about the operations that took most time of their own in count micro-steps."""
    with hardware.compiling():
        seconds(micro_step, device)
    seconds(update, device)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        total = 1e6 * count * seconds(micro_step, device, count)
    kind, attribute = torch.autograd.DeviceType.CPU, "self_cpu_time_total"
    if device.type == "cuda":  # kernels only: an operation's time on the GPU is that of the kernels it launched
        kind, attribute = torch.autograd.DeviceType.CUDA, "self_device_time_total"
    events = [e for e in profiler.key_averages() if e.device_type == kind and not e.is_user_annotation]
    events = sorted(events, key=lambda event: -getattr(event, attribute))[:rows]
    lines = [f"{count} micro-steps in {total / 1e3:.1f} ms", f"{'ms':>10}{'share':>8}{'calls':>8}  operation"]
    for event in events:
        us = getattr(event, attribute)
        lines.append(f"{us / 1e3:10.2f}{100 * us / total:7.1f}%{event.count:8d}  {event.key[:80]}")
    return lines


# -----------------------------------------------------------------------------
# the sweep


def run_row(cfg, tell):
    """Returns (status, figures) of one row, measured in another process. tell gets what that says about itself.

    Status: measured, out of memory or killed. Raises ValueError for a user's error and if the process fails otherwise.
    """
    context = multiprocessing.get_context("spawn")
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=row_process, args=(cfg, sending))
    process.start()
    sending.close()
    try:
        while True:
            kind, content = receiving.recv()
            if kind == "about":
                tell(content)
            elif kind == "error":
                raise ValueError(content)
            else:
                process.join(30)  # it has things of torch.compile to tidy up
                return ("measured", content) if kind == "row" else ("out of memory", {})
    except EOFError:
        process.join()
        if process.exitcode == -signal.SIGKILL:
            return "killed", {}
        raise ValueError(
            f"the process that measured batch_size={cfg.batch_size} ended with exit status {process.exitcode}"
        ) from None
    finally:
        process.kill()
        process.join()


def recommend(rows):
    """Returns the row to train with: of those within 1 % of the fastest the one that takes least memory."""
    measured = [row for row in rows if row["status"] == "measured"]
    fastest = min(row["ms_per_iter"] for row in measured)
    near = [row for row in measured if row["ms_per_iter"] <= 1.01 * fastest]
    return min(near, key=lambda row: (row["peak_memory"] or 0, row["ms_per_iter"]))


def training_command(argv, flags):
    """Returns the command that trains with flags, a dict, given the arguments of this script."""
    mine = {f.name for f in dataclasses.fields(BenchConfig)} - {f.name for f in dataclasses.fields(TrainConfig)}
    kept = [arg for arg in argv if arg.partition("=")[0].removeprefix("--") not in mine | flags.keys()]
    return shlex.join(["python", "train.py", *kept, *(f"--{name}={value}" for name, value in flags.items())])


def cells(row, columns):
    """Returns the cells of a row as strings, for columns {key: (heading, format)}."""
    shown = [form.format(row[name]) if row.get(name) is not None else "n/a" for name, (_, form) in columns.items()]
    if row["status"] != "measured":
        known = [cell for cell, name in zip(shown, columns, strict=True) if name in row]
        return known + [f"  {row['status']}"]
    return shown


if __name__ == "__main__":
    cfg = from_command_line(BenchConfig, __doc__)
    S = cfg.batch_size * cfg.gradient_accumulation_steps
    tokens, headers, rows = S * cfg.block_size, {}, []

    def tell(found):
        """Prints, once, what a row's process says about device and model."""
        if not headers:
            headers.update(found)
            print("\n".join(headers.pop("lines")))
            if cfg.init_from not in ("scratch", "resume", "auto"):
                print(
                    f"note: init_from={cfg.init_from!r} is not loaded; the model is that of n_layer, n_head and n_embd"
                )
            print(f"iteration: {tokens:,} tokens in all rows{'' if cfg.real_data else ', random ones'}")

    if cfg.profile:
        status, lines = run_row(cfg, tell)
        print("\n".join(lines if status == "measured" else [f"batch_size={cfg.batch_size}: {status}"]))
        sys.exit(status != "measured")

    columns = dict(batch_size=("batch_size", "{}"), gradient_accumulation_steps=("accumulation", "{}"))
    columns |= {name: (name, "{:g}") for name in SWEPT[1:] if getattr(cfg, f"sweep_{name}")}
    columns |= dict(ms_per_iter=("ms/iter", "{:,.2f}"), tokens_per_s=("tokens/s", "{:,.0f}"))
    columns |= dict(tflops=("TFLOP/s", "{:.2f}"), mfu=("MFU", "{:.2%}"), peak_memory=("peak GB", "{:.2f}"))
    columns |= dict(estimated_memory=("estimate GB", "{:.2f}"), spread=("spread", "{:.1%}"))
    widths = [max(13, len(heading) + 2) for heading, _ in columns.values()]
    for activation_memory in cfg.sweep("activation_memory"):
        for loss_chunks in cfg.sweep("loss_chunks"):
            fits = True
            for batch_size in cfg.sweep("batch_size"):
                changes = dict(batch_size=batch_size, gradient_accumulation_steps=S // batch_size)
                changes |= dict(activation_memory=activation_memory, loss_chunks=loss_chunks)
                status, figures = "not tried", {}
                if fits:
                    status, figures = run_row(dataclasses.replace(cfg, **changes), tell)
                if not rows:
                    print("".join(f"{heading:>{w}}" for (heading, _), w in zip(columns.values(), widths, strict=True)))
                fits = status == "measured"
                rows.append(changes | dict(status=status) | figures)
                memory = {name: figures.get(name) for name in ("peak_memory", "estimated_memory")}
                gigabytes = {name: size / 1e9 for name, size in memory.items() if size}
                line = cells(rows[-1] | gigabytes, columns)
                print("".join(f"{cell:>{w}}" for cell, w in zip(line, widths[: len(line)], strict=True)))

    best = None
    if any(row["status"] == "measured" for row in rows):
        best = recommend(rows)
        flags = ["batch_size", "gradient_accumulation_steps", *(n for n in SWEPT[1:] if getattr(cfg, f"sweep_{n}"))]
        command = training_command(sys.argv[1:], {name: best[name] for name in flags})
        print(f"recommended, the least memory within 1 % of the fastest:\n{command}")
    if cfg.json:
        settings = dataclasses.asdict(cfg) | dict(json=os.path.basename(cfg.json))
        argv = ["bench.py", *(arg for arg in sys.argv[1:] if not arg.startswith("--json="))]
        report = dict(command=shlex.join(["python", *argv]), **headers, tokens_per_iter=tokens, settings=settings)
        with open(cfg.json, "w", encoding="utf-8") as f:
            json.dump(report | dict(rows=rows, recommended=best), f, indent=1)
    if not best:
        raise ValueError("no row fits into memory; try smaller ones: --sweep_batch_size=1, or --loss_chunks=8")
