"""
Find the micro-batch that trains fastest on this machine.

    python bench.py config/fineweb_125m.py
    python bench.py config/fineweb_125m.py --sweep_batch_size=8,16 --sweep_loss_chunks=1,8
    python bench.py --hours=8

Tries several micro-batch sizes, each with the gradient_accumulation_steps that keep the tokens of an
iteration the same, and prints a table and the command to train with. Takes the configs and keys of train.py;
keys that only a run needs (out_dir, learning_rate, ...) have no effect.

Each row is measured in a process of its own, so that none inherits another's memory; one that runs out of
memory, even if the kernel kills it, is a row as well, and so is one whose gradients are not finite. After a
warm-up, a row alternates several times between a timed block of micro-steps (read a batch, forward,
backward), which waits for the device only at its ends, and a timed update (clip the gradients, optimizer
step, zero them). The medians of both give

    ms/iter = t(micro-step) * gradient_accumulation_steps + t(update)

so a row takes seconds, plus its start and compilation, even where an iteration takes a minute. spread is
(slowest - fastest) / median of the repetitions. peak GB is the most that torch allocated on a CUDA GPU
(nvidia-smi shows about 0.5 GB more), on a CPU the largest resident size of the process, libraries included;
beside it is the estimate that train.py prints before it starts.

--hours measures widths of the recommended model, or of the given config, around the one that sees 20 tokens
for each parameter in that time, and prints what each would see, and a command. The time includes compilation
and evaluations. The recommended row comes from a short run of train.py itself; the others are sums of their
parts, and slightly optimistic.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while torch is imported: no traceback

import contextlib
import dataclasses
import itertools
import json
import math
import multiprocessing
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass

import numpy as np
import torch

from configurator import ConfigError, configure, convert, from_command_line, key, parse, run_script
from model import make_gpt
from sologpt import budget, hardware, shards
from sologpt.errors import UserError, out_of_memory
from sologpt.files import unwritable
from sologpt.memory import memory_estimate
from sologpt.optim import allocate_moments, make_optimizers
from sologpt.report import parameters
from sologpt.tokenizer import gpt2_tokenizer, read_tokenizer
from train import TrainConfig, host_tensor, micro_batches, micro_step, model_config, prepare_model, update

ROW_SECONDS = 4.0  # for a row: about four blocks of micro-steps, or more that are shorter
TRIAL_SECONDS = 20.0  # of train.py itself, for --hours
MOST_REPEATS = 20  # blocks of a row
RECIPE = os.path.join("config", "fineweb_125m_fast.py")
NOT_FINITE = "gradients not finite"  # a row's status
MENDED = "try --dtype=float32, or leave out --matmul=fp8"
# keys of train.py that --hours chooses, whatever was given
CHOSEN = set("n_layer n_head n_embd max_minutes max_iters lr_decay_iters warmup_iters eval_interval".split())
SWEPT = ("batch_size", "activation_memory", "loss_chunks")


@dataclass
class BenchConfig(TrainConfig):
    # the benchmark; all else is train.py's
    sweep_batch_size: str = key(
        "",
        "sizes to try, as in 8,16,32; empty: those of batch_size times 1/4, ..., 8 that divide an iteration",
    )
    sweep_activation_memory: str = key("", "values of activation_memory to try; empty: the one that is set")
    sweep_loss_chunks: str = key("", "values of loss_chunks to try; empty: the one that is set")
    real_data: bool = key(False, "read the batches from the dataset; False: random tokens")
    profile: bool = key(False, "instead of a sweep, list the slowest operations at batch_size")
    hours: float = key(0.0, "instead of a sweep, what can be trained in this many hours; 0: a sweep", low=0)
    json: str = key("", "file to write all figures to")

    def problems(self):
        """Returns messages about conflicting values."""
        found = super().problems()
        for name in SWEPT:
            try:
                self.sweep(name)
            except UserError as e:
                found.append(f"sweep_{name}: {e}")
            if self.hours and getattr(self, f"sweep_{name}"):
                found.append(f"hours has its own sizes: leave sweep_{name} out")
        if self.hours and self.profile:
            found.append("hours and profile exclude each other; leave one of them out")
        for name in ("json", *(f"sweep_{name}" for name in SWEPT)):
            if self.profile and getattr(self, name):
                found.append(f"profile lists operations at one batch_size: leave {name} out")
        return found + unwritable("json", self.json)

    def sweep(self, name):
        """Returns the values of a key to try, ascending. Raises UserError for an invalid one."""
        text = getattr(self, f"sweep_{name}")
        values = [getattr(self, name)]
        if text:
            field = next(f for f in dataclasses.fields(self) if f.name == name)
            values = sorted({convert(parse(part.strip(), field), field) for part in text.split(",")})
        elif name == "batch_size":
            values = self.sizes_around()
        if name == "batch_size":
            self.check_sizes(values)
        if name == "activation_memory" and text and not self.compile and values != [1]:
            raise UserError("activation_memory needs torch.compile: set compile=True")
        return values

    def sizes_around(self):
        """Returns those of batch_size times 1/4, 1/2, 1, 2, 4 and 8 that divide an iteration."""
        S = self.sequences_per_iter
        sizes = [self.batch_size * 2**k // 4 for k in range(6) if self.batch_size * 2**k % 4 == 0]
        return [size for size in sizes if S % size == 0]

    def check_sizes(self, sizes):
        S = self.sequences_per_iter
        for size in sizes:
            if S % size:
                fitting = ", ".join(str(b) for b in range(1, S + 1) if S % b == 0)
                raise UserError(
                    f"{size} does not divide the {S} sequences of an iteration; these do: {fitting}"
                )


# -----------------------------------------------------------------------------
# one row, in a process of its own


def find_data(cfg):
    """Returns (folder of the dataset, its Tokenizer, a phrase that names both); without a dataset, None and
    GPT-2's. Raises FileNotFoundError if real_data asks for a dataset that is missing."""
    try:
        folder = shards.find_data(cfg.dataset)
    except FileNotFoundError:
        if cfg.real_data:
            raise
        return None, gpt2_tokenizer(), f"GPT-2's, as there is no dataset {cfg.dataset!r}"
    tokenizer = read_tokenizer(folder)
    return folder, tokenizer, f"{tokenizer.encoding}, of {folder}"


def fill_zeros(model):
    """Gives matrices that start at zero random weights. With zeros most gradients would be zero, too, and a
    GPU multiplies zeros faster, as it needs less power: https://www.thonking.ai/p/strangely-matrix-multiplications
    """
    for weight in model.parameters():
        if weight.dim() == 2 and not weight.any():
            torch.nn.init.normal_(weight, std=0.02)


class Timed:
    """The model and optimizers of a run, whose micro-step and update, train.py's, are to be timed."""

    def __init__(self, cfg, machine):
        self.cfg, self.machine = cfg, machine
        torch.manual_seed(cfg.seed)
        folder, tokenizer, self.vocabulary = find_data(cfg)
        self.n_ids, vocab_size = tokenizer.vocab_size, tokenizer.embedding_rows()
        self.model = make_gpt(model_config(cfg, dict(vocab_size=vocab_size, n_ids=self.n_ids)))
        fill_zeros(self.model)
        prepare_model(self.model, cfg, machine)
        # learning_rate=0: weights stay finite after any number of updates
        self.optimizers = make_optimizers(
            self.model, dataclasses.replace(cfg, learning_rate=0.0), machine.device
        )
        self.scaler = torch.amp.GradScaler(machine.device.type, enabled=machine.dtype == "float16")
        allocate_moments(self.optimizers)
        self.estimate = sum(memory_estimate(self.model, self.optimizers, cfg, machine.dtype).values())
        random_tokens = np.random.RandomState(cfg.seed).randint(
            self.n_ids, size=(cfg.batch_size, cfg.block_size + 1)
        )
        self.batches = itertools.repeat(host_tensor(random_tokens, machine.device))
        if cfg.real_data:
            windows = shards.Windows(shards.find_shards(folder, "train"), cfg.block_size, self.n_ids)
            self.batches = micro_batches(windows, 0, cfg, machine.device)

    def one_micro_step(self):
        accumulation = self.cfg.gradient_accumulation_steps
        micro_step(self.model, next(self.batches), self.scaler, self.machine, accumulation)

    def one_update(self):
        self.norm = update(self.model, self.optimizers, self.scaler, self.cfg.grad_clip)

    def seconds(self, work, times=1):
        """Returns the mean seconds of work(), called this many times with a sync only at both ends."""
        self.machine.synchronize()
        start = time.perf_counter()
        for _ in range(times):
            work()
        self.machine.synchronize()
        return (time.perf_counter() - start) / times

    def warm_up(self):
        """Returns the seconds of the first micro-step, which compiles the model."""
        compiling = hardware.compiling() if self.cfg.compile else contextlib.nullcontext()
        with compiling:
            first = self.seconds(self.one_micro_step)
        self.seconds(self.one_update)
        return first


def measure(timed, row_seconds):
    """Returns the figures of one row; the docstring of this file explains them."""
    cfg, machine, model = timed.cfg, timed.machine, timed.model
    accumulation = cfg.gradient_accumulation_steps
    first = timed.warm_up()
    # two at least: the second one adds to gradients that are there, as most micro-steps of a run do
    block = min(accumulation, max(2, round(row_seconds / 4 / timed.seconds(timed.one_micro_step))))
    timed.seconds(timed.one_update)
    micro, updates = [], []
    start = time.perf_counter()
    while not micro or (time.perf_counter() - start < row_seconds and len(micro) < MOST_REPEATS):
        micro.append(timed.seconds(timed.one_micro_step, block))
        updates.append(timed.seconds(timed.one_update))
    # a row would be fast nonsense; in fp16 the scaler may still look for its scale
    if not math.isfinite(timed.norm) and machine.dtype != "float16":
        raise FloatingPointError(NOT_FINITE)
    iters = [m * accumulation + u for m, u in zip(micro, updates, strict=True)]
    dt = statistics.median(micro) * accumulation + statistics.median(updates)
    figures = dict(
        ms_per_iter=1e3 * dt,
        micro_step_ms=1e3 * statistics.median(micro),
        update_ms=1e3 * statistics.median(updates),
        first_micro_step_s=first,
        repeats=len(iters),
        block=block,
        spread=(max(iters) - min(iters)) / dt,
        tokens_per_s=cfg.tokens_per_iter / dt,
        tflops=model.flops_per_token() * cfg.tokens_per_iter / dt / 1e12,
        mfu=None,
        peak_memory=peak_of_process(machine.device),
        estimated_memory=timed.estimate,
        reserved_memory=None,
    )
    if machine.peak:
        figures["mfu"] = model.estimate_mfu(cfg.sequences_per_iter, dt, machine.peak)
    if machine.device.type == "cuda":
        figures["reserved_memory"] = torch.cuda.max_memory_reserved(machine.device)
    return figures


def peak_of_process(device):
    """Returns the most bytes that this process has had: allocated by torch on a CUDA device, resident on the
    CPU; None where neither is known."""
    if device.type != "cpu":
        return hardware.peak_memory(device)
    try:
        import resource
    except ImportError:  # on Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def driver_version(device):
    """Returns the version of NVIDIA's driver; None for other devices, or if nvidia-smi cannot be asked."""
    if device.type != "cuda":
        return None
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(ask, capture_output=True, text=True, check=True).stdout.split()[0]


def about(timed):
    """Returns the context of the figures: a dict with the lines to print and entries for the JSON file."""
    machine, model = timed.machine, timed.model
    vocab_size = model.config.vocab_size
    flops = f"{model.flops_per_token() / 1e6:,.1f} MFLOP per token"
    lines = [
        machine.line,
        f"model: {parameters(model)}, {flops}",
        f"vocabulary: {timed.n_ids:,} ids in {vocab_size:,} rows ({timed.vocabulary})",
    ]
    return dict(
        lines=lines,
        device=hardware.device_name(machine.device),
        driver=driver_version(machine.device),
        dtype=machine.dtype,
        vocab_size=vocab_size,
        torch=torch.__version__,
        cuda=torch.version.cuda,
        threads=torch.get_num_threads(),
    )


def row_process(cfg, row_seconds, pipe):
    """Sends ("about", dict), then ("row", figures); if it fails, ("memory", None), (NOT_FINITE, None) or
    ("error", text)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the sweep handles Ctrl-C and ends this process
    try:
        timed = Timed(cfg, hardware.find_machine(cfg))
        pipe.send(("about", about(timed)))
        figures = profile(timed) if cfg.profile else measure(timed, row_seconds)
        pipe.send(("row", figures))
    except FloatingPointError:
        pipe.send((NOT_FINITE, None))
    except Exception as e:
        if out_of_memory(e):
            pipe.send(("memory", None))
        elif isinstance(e, (UserError, OSError)):
            pipe.send(("error", str(e)))
        else:
            raise  # a fault of the program: traceback and exit status show it


def profile(timed, count=5, rows=15):
    """Returns lines about the operations with the most self time in count micro-steps."""
    timed.warm_up()
    activities = [torch.profiler.ProfilerActivity.CPU]
    kind, attribute = torch.autograd.DeviceType.CPU, "self_cpu_time_total"
    # kernels only: an operation's time is that of the kernels it launched
    if timed.machine.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
        kind, attribute = torch.autograd.DeviceType.CUDA, "self_device_time_total"
    # acc_events: of one cycle it keeps the same, but torch 2.11 would warn without it
    with torch.profiler.profile(activities=activities, acc_events=True) as profiler:
        total = 1e6 * count * timed.seconds(timed.one_micro_step, count)
    events = [e for e in profiler.key_averages() if e.device_type == kind and not e.is_user_annotation]
    slowest = sorted(((getattr(e, attribute), e.count, e.key) for e in events), reverse=True)[:rows]
    return [f"{count} micro-steps in {total / 1e3:.1f} ms", *profile_table(slowest, total)]


def profile_table(operations, total):
    """Returns the lines of a table of operations, (microseconds, calls, name) each, and their shares of
    total."""
    if not operations:
        return [
            "torch's profiler saw no kernels: it needs CUPTI, which CUDA builds of torch bring along, and "
            "the right to read the GPU's performance counters, which containers often lack"
        ]
    lines = [f"{'ms':>10}{'share':>8}{'calls':>8}  operation"]
    lines += [f"{us / 1e3:10.2f}{100 * us / total:7.1f}%{n:8d}  {name[:80]}" for us, n, name in operations]
    return lines


# -----------------------------------------------------------------------------
# the sweep


def run_row(cfg, tell):
    """Returns (status, figures) of one row, measured in another process, whose "about" goes to tell().

    Status: measured, NOT_FINITE, out of memory or killed. Raises UserError for all else that ends the
    process.
    """
    context = multiprocessing.get_context("spawn")
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=row_process, args=(cfg, ROW_SECONDS, sending))
    process.start()
    sending.close()
    try:
        while True:
            kind, content = receiving.recv()
            if kind == "about":
                tell(content)
            elif kind == "error":
                raise UserError(content)
            else:
                process.join(30)  # time for torch.compile to clean up
                if kind == "row":
                    return "measured", content
                if kind == NOT_FINITE:
                    return NOT_FINITE, {}
                return "out of memory", {}
    except EOFError:
        process.join()
        if process.exitcode == -9:  # SIGKILL, which Windows does not have
            return "killed", {}
        raise UserError(
            f"the process that measured batch_size={cfg.batch_size} ended with exit status {process.exitcode}"
        ) from None
    finally:
        process.kill()
        process.join()


def recommend(rows):
    """Returns the row to train with: the one that takes least memory of those within 1 % of the fastest."""
    measured = [row for row in rows if row["status"] == "measured"]
    fastest = min(row["ms_per_iter"] for row in measured)
    near = [row for row in measured if row["ms_per_iter"] <= 1.01 * fastest]
    return min(near, key=lambda row: (row["peak_memory"] or 0, row["ms_per_iter"]))


def refused_by_training(argv):
    """Returns what train.py, for which a command will be printed, would refuse in a config file: keys of this
    script, as nanoGPT's real_data; None if nothing."""
    try:
        configure(TrainConfig, training_arguments(argv, {}))
    except ConfigError as e:
        return str(e).replace("\n", "; ")


def training_arguments(argv, flags):
    """Returns arguments for train.py: flags, a dict, and those of this script's arguments that it has too."""
    own = BenchConfig.__dataclass_fields__.keys() - TrainConfig.__dataclass_fields__.keys()
    left_out = own | flags.keys() | {"dry_run", "eval_only"}
    kept = [arg for arg in argv if arg.partition("=")[0].removeprefix("--") not in left_out]
    return [*kept, *(f"--{name}={value}" for name, value in flags.items())]


def training_command(argv, flags):
    """Returns the command that trains with flags, a dict, given the arguments of this script."""
    return shlex.join(["python", "train.py", *training_arguments(argv, flags)])


def columns_of(cfg):
    """Returns the columns of the table: {key of a row: (heading, format)}."""
    columns = dict(batch_size=("batch_size", "{}"), gradient_accumulation_steps=("accumulation", "{}"))
    for name in SWEPT[1:]:
        if getattr(cfg, f"sweep_{name}"):
            columns[name] = (name, "{:g}")
    columns["ms_per_iter"] = ("ms/iter", "{:,.2f}")
    columns["tokens_per_s"] = ("tokens/s", "{:,.0f}")
    columns["tflops"] = ("TFLOP/s", "{:.3g}")
    columns["mfu"] = ("MFU", "{:.2%}")
    columns["peak_memory"] = ("peak GB", "{:.2f}")
    columns["estimated_memory"] = ("estimate GB", "{:.2f}")
    columns["spread"] = ("spread", "{:.1%}")
    return columns


def column_width(heading):
    return max(13, len(heading) + 2)


def table_line(row, columns):
    """Returns a row's line, for columns from columns_of; if it was not measured, what is known of it."""
    measured = row["status"] == "measured"
    line = ""
    for name, (heading, form) in columns.items():
        value = row.get(name)
        if value is None and not measured:
            continue
        if name.endswith("_memory") and value is not None:
            value /= 1e9
        cell = "n/a" if value is None else form.format(value)
        line += f"{cell:>{column_width(heading)}}"
    return line if measured else f"{line}  {row['status']:>11}"


def sweep(cfg, tell):
    """Measures and prints all rows. Returns them."""
    columns = columns_of(cfg)
    rows = []
    for activation_memory in cfg.sweep("activation_memory"):
        for loss_chunks in cfg.sweep("loss_chunks"):
            fits = True
            for batch_size in cfg.sweep("batch_size"):
                changes = dict(
                    batch_size=batch_size, gradient_accumulation_steps=cfg.sequences_per_iter // batch_size
                )
                changes |= dict(activation_memory=activation_memory, loss_chunks=loss_chunks)
                status, figures = "not tried", {}  # a smaller batch_size did not fit
                if fits:
                    status, figures = run_row(dataclasses.replace(cfg, **changes), tell)
                fits = status in ("measured", NOT_FINITE)
                if not rows:
                    print("".join(f"{heading:>{column_width(heading)}}" for heading, _ in columns.values()))
                rows.append(changes | dict(status=status) | figures)
                print(table_line(rows[-1], columns))
    return rows


# -----------------------------------------------------------------------------
# what can be trained in some hours


def what_can_be_trained(cfg, argv, tell):
    """Prints what sizes would see in cfg.hours, and the command for the one that suits. Returns the rows and
    that one."""
    seconds = 3600 * cfg.hours
    folder, tokenizer, _ = find_data(cfg)
    train_tokens = None
    if folder:
        train_tokens = sum(shard.count for shard in shards.find_shards(folder, "train"))

    def size_of(width):
        n_layer, n_head, n_embd = budget.shape(width, cfg.arch)
        sizes = dict(n_layer=n_layer, n_head=n_head, n_embd=n_embd)
        with torch.device("meta"):
            shaped = dataclasses.replace(cfg, **sizes)
            ids = dict(vocab_size=tokenizer.embedding_rows(), n_ids=tokenizer.vocab_size)
            model = make_gpt(model_config(shaped, ids))
        return budget.Size(**sizes, params=model.get_num_params(), flops_per_token=model.flops_per_token())

    measured, widths = measure_around_optimum(cfg, seconds, size_of, tell)
    plans = make_plans(cfg, seconds, size_of, measured, widths)
    best = budget.nearest_to_optimal(plans)
    if best.tokens // best.iters <= budget.FEW_TOKENS and "beta2" not in cfg.given:
        best.keys["beta2"] = budget.BETA2
    with tempfile.TemporaryDirectory() as scratch:
        dataset = folder or random_dataset(scratch, cfg, tokenizer)
        try:
            trial = run_trial(argv, best, dataset, scratch)
        except UserError:
            print(f"in {cfg.hours:g} hours, by the sum of their parts, as the trial failed:")
            print("\n".join(budget.table(plans, best, train_tokens)))
            raise
    if trial:
        as_tried = budget.as_tried(best, trial, seconds)
        plans[plans.index(best)] = as_tried
        best = as_tried
    print(f"in {cfg.hours:g} hours, compilation and evaluations included:")
    print("\n".join(budget.table(plans, best, train_tokens)))
    keys = dict(best.keys)
    if cfg.schedule == "wsd":
        del keys["lr_decay_iters"]
    if cfg.keep_before_cooldown:
        keys["keep_before_cooldown"] = False  # without effect in a run by the clock
    print(f"train it with:\n{training_command(argv, keys)}")
    return [dataclasses.asdict(p) for p in plans], dataclasses.asdict(best)


def measure_around_optimum(cfg, seconds, size_of, tell):
    """Returns ({width: its measured Speed}, all widths of interest). The first one tells how fast the machine
    is; the others lie around the one with 20 tokens for each parameter."""
    measured = {}

    def measure_width(width):
        if width not in measured and (speed := speed_of(cfg, size_of(width), tell)):
            measured[width] = speed

    device, _ = hardware.pick_device(cfg.device)
    first_width = 128 if device.type == "cpu" else 512
    measure_width(first_width)
    for _ in range(2):  # a wider model may be faster, which makes a still wider one optimal
        if not measured:
            raise UserError("the first size does not fit into memory; try a smaller --block_size")
        size = size_of(max(measured))
        speed = measured[max(measured)]
        rate = size.flops_per_token * cfg.block_size * speed.batch_size / speed.micro_step
        position = budget.optimal(rate, seconds, size_of)
        measure_width(budget.WIDTHS[position])
    low, high = max(0, position - 2), min(len(budget.WIDTHS) - 1, position + 2)
    measure_width(budget.WIDTHS[low])
    measure_width(budget.WIDTHS[high])
    fitting = [width for width in budget.WIDTHS[low : high + 1] if width <= max(measured)]
    return measured, fitting or sorted(measured)


def speed_of(cfg, size, tell):
    """Returns the measured Speed of a size, with a smaller micro-batch if memory runs out; None if one
    sequence is too many."""
    batch_size = cfg.batch_size
    sizes = dict(n_layer=size.n_layer, n_head=size.n_head, n_embd=size.n_embd)
    while batch_size:
        accumulation = min(2, max(1, cfg.sequences_per_iter // batch_size))
        changes = sizes | dict(batch_size=batch_size, gradient_accumulation_steps=accumulation)
        status, row = run_row(dataclasses.replace(cfg, **changes), tell)
        print(f"n_embd={size.n_embd}, batch_size={batch_size}: {status}")
        if status == NOT_FINITE:
            raise UserError(f"{status}: {MENDED}")
        if status == "measured":
            return budget.Speed(
                batch_size=batch_size,
                micro_step=row["micro_step_ms"] / 1e3,
                update=row["update_ms"] / 1e3,
                first=row["first_micro_step_s"],
                peak_memory=row["peak_memory"],
            )
        batch_size //= 2
    return None


def make_plans(cfg, seconds, size_of, measured, widths):
    """Returns a Plan for each width; measured is {width: Speed} of some."""
    known = [(size_of(width), speed) for width, speed in measured.items()]
    plans = []
    for width in widths:
        size = size_of(width)
        speed = measured.get(width) or budget.interpolate(size, known)
        plans.append(
            budget.plan(size, speed, seconds, cfg.block_size, cfg.sequences_per_iter, cfg.eval_iters)
        )
    return plans


def recipe():
    """Returns the path of the recommended config: as it is called here, or else the absolute one."""
    if os.path.exists(RECIPE):
        return RECIPE
    return os.path.join(os.path.dirname(os.path.abspath(__file__)), RECIPE)


def run_trial(argv, plan, dataset, scratch):
    """Runs train.py itself, with a Plan's keys, for some seconds or a few iterations, besides compilation and
    two evaluations; its files go into scratch. Returns the Trial; None if it came to no iteration."""
    per_sequence = plan.speed.micro_step / plan.speed.batch_size
    evaluations = 2 * budget.evaluation_seconds(plan.keys["eval_iters"], per_sequence)
    iteration = plan.tokens / plan.iters / plan.rate
    enough = 3 * plan.speed.first + evaluations + max(TRIAL_SECONDS, 4 * iteration)
    minutes = min(plan.keys["max_minutes"], enough / 60)
    out_dir = os.path.join(scratch, "out")
    flags = plan.keys | dict(max_minutes=minutes, max_iters=10**6, eval_interval=10**6, log_interval=1)
    flags |= dict(init_from="scratch", tracker="", wandb_log=False, sample_interval=0, checkpoint_interval=0)
    flags |= dict(eval_only=False, dry_run=False)
    flags |= dict(keep_before_cooldown=False, dataset=os.path.abspath(dataset), out_dir=out_dir)
    arguments = training_arguments(argv, flags)
    print(f"n_embd={plan.size.n_embd}: train.py itself, for {60 * minutes:.0f} s")
    script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "train.py")
    done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True)
    rows = read_metrics(out_dir)
    iters = [row for row in rows if row["kind"] == "iter"]
    # if only the end could not be saved, as in a small TMPDIR, all figures are there
    ended = iters and rows[-1]["kind"] == "eval"
    if done.returncode and not ended:
        lines = done.stderr.strip() or done.stdout.strip() or "no output"
        last = lines.splitlines()[-1].removeprefix("error: ")
        raise UserError(f"train.py ended with exit status {done.returncode}: {last}")
    if not iters:
        print("that was too short for an iteration: its row is the sum of its parts")
        return None
    settled = iters[max(1, len(iters) // 4) :] or iters  # the first ones are slower
    last_evaluation = [row for row in rows if row["kind"] == "eval"][-1]
    return budget.Trial(
        startup=iters[0]["elapsed"] - iters[0]["dt"],
        iteration=statistics.mean(row["dt"] for row in settled),
        evaluation=last_evaluation["elapsed"] - iters[-1]["elapsed"],
    )


def read_metrics(out_dir):
    """Returns the whole lines of a run's metrics.jsonl, dicts; none if there is no file."""
    path = os.path.join(out_dir, "metrics.jsonl")
    if not os.path.exists(path):
        return []
    with open(path, encoding="utf-8") as f:
        return [json.loads(line) for line in f if line.endswith("\n")]


def random_dataset(scratch, cfg, tokenizer):
    """Writes a dataset of random tokens into scratch, with as many windows in each split as an evaluation
    takes. Returns its folder."""
    folder = os.path.join(scratch, "data")
    os.mkdir(folder)
    count = max(1000, cfg.eval_windows) * cfg.block_size + 1
    ids = np.random.RandomState(0).randint(tokenizer.vocab_size, size=count).astype(np.uint16)
    for name in ("random_train_000001.bin", "random_val_000000.bin"):
        shards.write_shard(os.path.join(folder, name), ids)
    return folder


def write_json(path, cfg, argv, headers, rows, best):
    settings = dataclasses.asdict(cfg) | dict(json=os.path.basename(path))
    command = ["python", "bench.py", *(arg for arg in argv if not arg.startswith("--json="))]
    report = dict(
        command=shlex.join(command), **headers, tokens_per_iter=cfg.tokens_per_iter, settings=settings
    )
    with open(path, "w", encoding="utf-8") as f:
        json.dump(report | dict(rows=rows, recommended=best), f, indent=1)


def recommend_one(rows, cfg, argv, refused):
    """Prints the command that trains as the best row of a sweep. Returns that row, or None."""
    if not any(row["status"] == "measured" for row in rows):
        return None
    best = recommend(rows)
    flags = ["batch_size", "gradient_accumulation_steps"]
    flags += [name for name in SWEPT[1:] if getattr(cfg, f"sweep_{name}")]
    command = training_command(argv, {name: best[name] for name in flags})
    print(f"recommended, the least memory within 1 % of the fastest:\n{command}")
    if refused:
        print(f"note: train.py knows no keys of bench.py; remove them there first: {refused}")
    return best


def main(argv):
    cfg = from_command_line(BenchConfig, __doc__, argv)
    if cfg.hours and not any(arg.endswith(".py") for arg in argv):
        argv = [recipe(), *argv]
        cfg = from_command_line(BenchConfig, __doc__, argv)
    refused = refused_by_training(argv)
    if refused and cfg.hours:
        raise UserError(f"train.py is to take the same files, without keys of bench.py: {refused}")
    headers = {}

    def tell(found):
        """Prints, once, what a row's process says about device and model."""
        if headers:
            return
        headers.update(found)
        print("\n".join(headers.pop("lines")))
        if cfg.init_from != "scratch":
            sizes = "the model has the size of n_layer, n_head and n_embd"
            print(f"note: init_from={cfg.init_from!r} is not loaded; {sizes}")
        if not cfg.hours:
            kind = "" if cfg.real_data else ", random ones"
            print(f"iteration: {cfg.tokens_per_iter:,} tokens in all rows{kind}")

    if cfg.profile:
        status, lines = run_row(cfg, tell)
        if status != "measured":
            raise UserError(f"batch_size={cfg.batch_size}: {status}; try a smaller one")
        print("\n".join(lines))
        return
    if cfg.hours:
        given = {arg.partition("=")[0].removeprefix("--") for arg in argv}
        if chosen := ", ".join(sorted(given & CHOSEN)):
            print(f"note: without effect, as --hours chooses them: {chosen}")
        rows, best = what_can_be_trained(cfg, argv, tell)
        if cfg.json:
            write_json(cfg.json, cfg, argv, headers, rows, best)
        return
    rows = sweep(cfg, tell)
    best = recommend_one(rows, cfg, argv, refused)
    if cfg.json:
        write_json(cfg.json, cfg, argv, headers, rows, best)
    if not best and any(row["status"] == NOT_FINITE for row in rows):
        raise UserError(f"no row was measured: {MENDED}")
    if not best:
        raise UserError("no row fits into memory; try --sweep_batch_size=1 or --loss_chunks=8")


if __name__ == "__main__":
    run_script(main)
