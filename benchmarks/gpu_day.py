"""
All that is to be measured on a GPU, in the order of its worth: one command for the day there is one.

    python benchmarks/gpu_day.py [--minutes=9] [--dataset=fineweb] [--nanogpt=FOLDER] [--modded=FOLDER]

The stages are smoke (does training work there: GPT-2 and the recipe in 16 bits, stopped and resumed, with
micro-batches that do not fit), tests (those that need a GPU), speed (bench.py, and nanoGPT in turn with
ours), learning (GPT-2 with AdamW, the recipe and modded-nanogpt's baseline on equal data), sampling, profile,
and recipe (small models: compare_modded.py and candidates.py). A stage has parts, each in processes of its
own with a limit of time, and those of several stages take turns: what tells most comes first. One that fails
or takes too long is a row of the table, and the next one runs. The figures are written to a JSON file after
each part; the same command goes on with the parts that are missing there, then with those that failed.
Without --dataset, the text is Python's own library as bytes.
docs/measuring.md says how to read the results. It needs Linux or WSL.
"""

import importlib.util
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from bench import NOT_FINITE, driver_version
from configurator import Config, from_command_line, key, run_script
from model import GPT, GPTConfig
from sologpt import hardware
from sologpt.errors import UserError
from sologpt.files import atomic_file, unwritable
from sologpt.fp8 import has_fp8
from sologpt.memory import memory_needed
from sologpt.tokenizer import read_tokenizer

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
STAGES = ("smoke", "tests", "speed", "learning", "sampling", "profile", "recipe")
ITER = re.compile(
    r"^iter (\d+): loss ([\d.]+|nan|inf), time ([\d.]+)ms, mfu (?:([\d.]+)%|n/a),.* ([\d,]+) tok/s"
)
SMALLER = re.compile(r"(?:from iteration \d+ on|starts with) batch_size=(\d+)")
SEQUENCES = 512  # of an iteration in the speed stage
SHORT_ITERATION = 131072  # tokens of an iteration in the learning stage


@dataclass
class Size:
    gpt2: str  # configs
    modern: str
    flags: list  # for all runs
    batch_sizes: tuple
    in_turn: int  # sequences of an iteration beside nanoGPT
    sampled: tuple  # sequences at once
    new_tokens: int
    learned: str  # size of compare_modded.py's models in the learning stage
    small: list  # flags of the recipe stage


TINY = "--n_layer=2 --n_head=1 --n_embd=128 --block_size=64 --compile=False".split()
FAST, QUICK = "config/fineweb_125m_fast.py", "config/quickstart.py"
SIZES = {
    "124m": Size(
        gpt2="config/fineweb_125m.py",
        modern=FAST,
        flags=[],
        batch_sizes=(16, 64, 8, 32),
        in_turn=128,
        sampled=(8, 64),
        new_tokens=128,
        learned="short",
        small=["--compile=True"],
    ),
    "tiny": Size(
        gpt2=QUICK,
        modern=QUICK,
        flags=TINY,
        batch_sizes=(2, 4),
        in_turn=4,
        sampled=(2,),
        new_tokens=4,
        learned="tiny",
        small="--size=tiny --iters=10 --eval_windows=32".split(),
    ),
}


@dataclass
class DayConfig(Config):
    minutes: float = key(9.0, "time for all stages; a part that would begin later is left out", above=0)
    dataset: str = key("", "folder of token files: one under data/, or a path; empty: Python's own library")
    nanogpt: str = key("", "checkout of nanoGPT to compare with; empty: leave it out")
    modded: str = key("", "checkout of modded-nanogpt to compare with; empty: leave it out")
    batch_sizes: str = key("", "micro-batches of the speed stage, as in 16,64; empty: 16,64,8,32")
    stages: str = key(",".join(STAGES), "which, with commas between them")
    size: str = key("124m", "124m, or tiny to try this file without a GPU", choices=tuple(SIZES))
    device: str = key("", "cuda, cuda:N, mps or cpu; empty: the best available")
    out_dir: str = key("out-gpu-day", "folder for the runs, which are removed when they are done")
    json: str = key("", "file of the figures; empty: benchmarks/results/gpu_day_NAME_OF_THE_CARD.json")

    def problems(self):
        found = []
        unknown = set(self.stages.split(",")) - set(STAGES)
        if unknown:
            found.append(f"stages has {', '.join(sorted(unknown))}; there are {', '.join(STAGES)}")
        if not re.fullmatch(r"([1-9]\d*(,[1-9]\d*)*)?", self.batch_sizes):
            found.append(f"batch_sizes={self.batch_sizes!r} must be positive numbers with commas between")
        found += unwritable("json", self.json)
        for name, file in (("nanogpt", "model.py"), ("modded", "records")):
            folder = getattr(self, name)
            if folder and not os.path.exists(os.path.join(folder, file)):
                found.append(f"{name}={folder!r} has no {file}; give a checkout")
        return found


class Failed(Exception):
    """A process that ended with an error or took too long, or figures that are not as they should be. The
    message is a row's text. output: the lines that the process had written, if it was stopped."""

    output = ()


class OutOfTime(Failed):
    """The time of the whole day was up."""


@dataclass
class Part:
    stage: str
    name: str
    minutes: float  # it is stopped after these
    work: Callable  # work(day, figures, sentences) fills both, so that a failure loses nothing of them

    @property
    def title(self):
        return f"{self.stage}: {self.name}"


# -----------------------------------------------------------------------------
# processes


class Day:
    """What the parts share: where the runs and the data are, and how much time is left."""

    def __init__(self, cfg, device, entries):
        self.cfg = cfg
        self.device = device
        self.entries = entries  # {title: what is in the JSON file}
        self.size = SIZES[cfg.size]
        self.batch_sizes = self.size.batch_sizes
        if cfg.batch_sizes:
            self.batch_sizes = tuple(int(size) for size in cfg.batch_sizes.split(","))
        self.dtype, _ = hardware.pick_dtype("", device)
        self.end = time.monotonic() + 60 * cfg.minutes
        self.end_of_part = self.end
        self.dataset = os.path.join(cfg.out_dir, "data")

    def seconds_left(self):
        return self.end_of_part - time.monotonic()

    def run(self, script, *argv, on_line=None, **env):
        """Runs a script of this project, or a module after -m; returns (stdout, stderr, exit status). Each
        line of stdout is given to on_line with the process. Raises Failed, with the last lines, if it takes
        too long."""
        words = script.split()
        if words[0] != "-m":
            words = [os.path.join(ROOT, script)]
        command = [sys.executable, *words, *argv]
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
        lines, errors = [], []
        with subprocess.Popen(command, cwd=ROOT, env=os.environ | env, **pipes) as process:
            reader = threading.Thread(target=lambda: errors.extend(process.stderr))
            reader.start()
            timer = threading.Timer(max(self.seconds_left(), 1), kill_group, [process])
            timer.start()
            try:
                for line in process.stdout:
                    lines.append(line)
                    if on_line:
                        on_line(process, line)
                reader.join()
            except BaseException:  # a Ctrl-C, too: the process is in a session of its own and does not get it
                kill_group(process)
                raise
            finally:
                late = not timer.is_alive()
                timer.cancel()
        if late:
            kind = OutOfTime if self.end_of_part == self.end else Failed
            last = " ".join((lines + errors)[-1:]).strip()
            name = os.path.basename(script)
            stopped = kind(f"{name} {shlex.join(argv)} was stopped; its last line: {last}")
            stopped.output = [line.rstrip("\n") for line in lines + errors]
            raise stopped
        return "".join(lines), "".join(errors), process.returncode

    def checked(self, script, *argv, **options):
        """As run, but returns (stdout, stderr). Raises Failed, with the last line of stderr, on an error."""
        out, err, status = self.run(script, *argv, **options)
        if status:
            last = (err.strip() or "nothing on stderr").splitlines()[-1]
            raise Failed(f"{os.path.basename(script)} {shlex.join(argv)} ended with {status}: {last}")
        return out, err

    def measured(self, script, *argv):
        """As checked, but returns what the script writes to its --json, also before it ends with an error."""
        path = os.path.join(self.cfg.out_dir, "figures.json")
        with suppress(FileNotFoundError):
            os.remove(path)
        try:
            self.checked(script, *argv, f"--device={self.device}", f"--json={path}")
        except Failed:
            if not os.path.exists(path):
                raise
        with open(path) as f:
            return json.load(f)

    def figures_of(self, stage, name):
        """Returns the figures of a part that is done, from the JSON file. Raises Failed if there are none."""
        entry = self.entries.get(f"{stage}: {name}", {})
        if entry.get("asked") != asked_of(stage, self) or entry["status"] != "done":
            raise Failed(f"it needs the figures of {stage}: {name}, which is not done")
        return entry["figures"]

    def train(self, iters, config, *argv, stop_at=None):
        """Runs train.py with a config, stopped by Ctrl-C at iteration stop_at; returns its figures."""

        def on_line(process, line):
            if stop_at is not None and line.startswith(f"iter {stop_at}:"):
                process.send_signal(signal.SIGINT)

        folder = os.path.join(self.cfg.out_dir, "run")
        if "--init_from=resume" not in argv:
            shutil.rmtree(folder, ignore_errors=True)
        flags = [f"--max_iters={iters}", f"--lr_decay_iters={iters}", "--warmup_iters=5", "--log_interval=1"]
        flags += [f"--eval_interval={iters}", "--eval_iters=2", f"--dataset={self.dataset}"]
        flags += [f"--out_dir={folder}", f"--device={self.device}"]
        script = ("train.py", config, *self.size.flags, *flags, *argv)
        env = dict(TORCH_LOGS="recompiles,graph_breaks")
        out, err, status = self.run(*script, on_line=on_line, **env)
        if status and stop_at is None:
            raise Failed(f"train.py ended with {status}: {(err.strip() or out).splitlines()[-1]}")
        if stop_at is None:
            shutil.rmtree(folder, ignore_errors=True)
        return figures_of_a_run(out, err)


def kill_group(process):
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def figures_of_a_run(out, err):
    """Returns what train.py's output says, a dict; times without those of the first iterations."""
    iters = [match for match in map(ITER.match, out.splitlines()) if match]
    settled = iters[3:] or iters
    peak = re.search(r"^memory: +([\d.]+) GB at most", out, re.M)
    attention = re.search(r"^model: .*, ([A-Z_]+)$", out, re.M)
    return dict(
        losses={match[1]: float(match[2]) for match in iters},
        ms_per_iter=median(match[3] for match in settled),
        mfu=median(match[4] for match in settled if match[4]),
        tokens_per_s=median(match[5].replace(",", "") for match in settled),
        peak_gb=float(peak[1]) if peak else None,
        attention=attention[1] if attention else None,
        batch_sizes=[int(size) for size in SMALLER.findall(err)],
        warnings=[line for line in err.splitlines() if "warning" in line.lower()],
        recompiles=err.count("Recompiling function"),
        graph_breaks=err.count("Graph break"),
    )


def median(texts):
    """Returns the median of numbers that are still text; None if there are none."""
    numbers = [float(text) for text in texts]
    return statistics.median(numbers) if numbers else None


def percent(share):
    return f"MFU {share:.1%}" if share else "MFU n/a"


# -----------------------------------------------------------------------------
# smoke and tests


SMOKE = ("--gradient_accumulation_steps=4", "--learning_rate=1e-3")


def train_thirty(day, figures, sentences, config, dtype):
    figures |= day.train(30, config, *SMOKE, f"--dtype={dtype}")
    losses = list(figures["losses"].values())
    mfu = (figures["mfu"] or 0) / 100
    sentences.append(
        f"{dtype}, 30 iterations: loss {losses[0]:.2f} to {losses[-1]:.2f}, "
        f"{figures['tokens_per_s']:,.0f} tokens/s, {percent(mfu)}, peak {figures['peak_gb'] or 'n/a'} GB, "
        f"attention {figures['attention']}, {figures['recompiles']} recompiles, "
        f"{figures['graph_breaks']} graph breaks, {len(figures['warnings'])} warnings"
    )
    sentences += figures["warnings"][:2]
    if not losses[-1] < losses[0]:  # nan, too
        raise Failed("the loss does not fall")


def resume(day, figures, sentences):
    """Stops a run and resumes it; its losses should be those of the run that was not stopped."""
    whole = day.figures_of("smoke", day.dtype)["losses"]
    argv = (day.size.gpt2, *SMOKE, f"--dtype={day.dtype}")
    figures["stopped"] = day.train(30, *argv, stop_at=10)
    figures["resumed"] = day.train(30, *argv, "--init_from=resume")
    losses = figures["resumed"]["losses"]
    differences = [abs(loss - whole[it]) for it, loss in losses.items()]
    figures["difference"] = max(differences)
    first = min(losses, key=int)
    sentences.append(f"resumed at {first}: losses differ by up to {figures['difference']:.4f}")
    if not all(difference < 0.05 for difference in differences):  # NaN neither
        raise Failed("that is more than rounding")


def train_too_large(day, figures, sentences, batch_size):
    argv = ("--gradient_accumulation_steps=1", f"--batch_size={batch_size}", f"--dtype={day.dtype}")
    figures |= day.train(2, day.size.gpt2, *argv)
    sizes = figures["batch_sizes"]
    fits = f"fits as {sizes[-1]}" if sizes else "fits"
    sentences.append(f"batch_size={batch_size}: {fits}, peak {figures['peak_gb'] or 'n/a'} GB")


def largest_below(day, share):
    """Returns the largest even micro-batch of config/fineweb_125m.py that by estimate needs less than this
    share of the memory that is free, and the share that it needs."""
    of_cuda = 0.5e9  # what CUDA itself takes in a process
    free = hardware.available_memory(day.device) - of_cuda
    config = GPTConfig(vocab_size=read_tokenizer(day.dataset).embedding_rows(), bias=False)
    with torch.device("meta"):
        params = GPT(config).get_num_params(non_embedding=False)

    def needed(batch_size):
        return sum(memory_needed(params, 8 * params, config, batch_size, day.dtype, True).values()) / free

    batch_size = max(size for size in range(2, 10000, 2) if needed(size) < share)
    return batch_size, needed(batch_size)


def too_large(day, figures, sentences):
    """Trains with a micro-batch that is made smaller before it is tried, as it needs 1.1 times as much memory
    as there is; half of it fits."""
    batch_size, _ = largest_below(day, 1.5)
    train_too_large(day, figures, sentences, batch_size)
    if not any("may try" in text for text in figures["warnings"]):
        raise Failed("it was not made smaller before it was tried")


def runs_out(day, figures, sentences):
    """Trains with a micro-batch that needs a little more memory than there is, but is tried."""
    batch_size, share = largest_below(day, 1.09)
    train_too_large(day, figures, sentences, batch_size)
    if not any("out of memory" in text for text in figures["warnings"]):
        raise Failed(f"memory did not run out, though by estimate it should take {share:.2f} of what is free")


def gpu_tests(day, figures, sentences, file):
    # in one process, with or without pytest-xdist; torch 2.11 gives warnings that later ones do not
    argv = "-o addopts= -W ignore::DeprecationWarning -m gpu -v -ra --tb=short --show-capture=no".split()
    out, err, status = day.run("-m pytest", *argv, file)
    figures |= dict(status=status, output=out[-20000:])
    last = (out.strip() or err.strip()).splitlines()[-1]
    sentences.append(f"{file}: {last}")
    if status:
        raise Failed(f"pytest ended with {status}")


# -----------------------------------------------------------------------------
# speed


def bench(day, figures, sentences, config, batch_size, *flags):
    accumulation = max(1, SEQUENCES // batch_size)
    argv = [config, *day.size.flags, f"--batch_size={batch_size}", f"--dtype={day.dtype}", *flags]
    argv += [f"--gradient_accumulation_steps={accumulation}", f"--sweep_batch_size={batch_size}"]
    figures |= day.measured("bench.py", *argv)
    [row] = figures["rows"]
    if row["status"] == NOT_FINITE:
        raise Failed(row["status"])
    if row["status"] != "measured":
        sentences.append(row["status"])
        return
    peak = ""
    if row["peak_memory"]:
        peak = f"peak {row['peak_memory'] / 1e9:.2f} GB, estimated {row['estimated_memory'] / 1e9:.2f}, "
    sentences.append(
        f"{row['tokens_per_s']:,.0f} tokens/s, {percent(row['mfu'])}, {peak}"
        f"{row['update_ms']:.1f} of {row['ms_per_iter']:,.0f} ms for the update, "
        f"first micro-step after {row['first_micro_step_s']:.0f} s"
    )


def bench_fp8(day, figures, sentences):
    if not has_fp8(day.device) or importlib.util.find_spec("torchao") is None:
        raise Failed("not measured: it needs an RTX 40, H100 or newer, and pip install '.[fp8]'")
    bench(day, figures, sentences, day.size.gpt2, 16, "--matmul=fp8")


def beside_nanogpt(day, figures, sentences, batch_size):
    argv = [*day.size.flags, f"--batch_size={batch_size}", f"--dataset={gpt2_ids(day)}", "--rounds=3"]
    argv += [f"--gradient_accumulation_steps={max(1, day.size.in_turn // batch_size)}", "--iters=3"]
    argv += [f"--nanogpt={day.cfg.nanogpt}", f"--dtype={day.dtype}"]
    try:
        figures |= day.measured("benchmarks/steps.py", *argv)
    except Failed as e:
        if "out of memory" not in str(e).lower():
            raise
        sentences.append("memory is not enough for all three")
        return
    theirs = figures["seconds"]["nanoGPT"]
    tokens = figures["tokens_per_iter"]
    for name, seconds in figures["seconds"].items():
        ratio = statistics.median(a / b for a, b in zip(theirs, seconds, strict=True))
        middle = statistics.median(seconds)
        peak = ""
        if figures["peak_memory"][name]:
            peak = f", peak {figures['peak_memory'][name] / 1e9:.2f} GB"
        mfu = percent(figures["mfu"][name])
        sentences.append(f"{name}: {tokens / middle:,.0f} tokens/s, {mfu}, {ratio:.2f} of nanoGPT's{peak}")


def gpt2_ids(day):
    """Returns a folder of tokens with GPT-2's vocabulary: the dataset that was named, or random ones."""
    if day.cfg.dataset or day.cfg.size == "tiny":
        return day.dataset
    folder = os.path.join(day.cfg.out_dir, "random")
    os.makedirs(folder, exist_ok=True)
    for split, count in (("train", 5_000_000), ("val", 500_000)):
        ids = np.random.default_rng(0).integers(50257, size=count, dtype=np.uint16)
        ids.tofile(os.path.join(folder, f"{split}.bin"))
    return folder


# -----------------------------------------------------------------------------
# learning, sampling, profile, recipe


def learning(day, figures, sentences):
    """All models on the same tokens, as many as nine tenths of the time that is left allow. A run that is
    done is not made again."""
    models = ["gpt2", "ours"]
    if day.cfg.modded:
        models.append("peer")
    path = results_file(day, "learning")
    iters = affordable_iterations(day, len(models))
    if os.path.exists(path):  # of a day that was cut short: the runs that are done count
        with open(path) as f:
            iters = json.load(f)["runs"][0]["iters"]
    argv = [f"--models={','.join(models)}", f"--modded={day.cfg.modded}", f"--iters={iters}"]
    argv += ["--rates=1", "--seeds=1", "--parts=", "--vocab=0", "--evaluations=5"]
    argv += ["--gpt2_learning_rate=6e-4"]  # nanoGPT's
    argv += [f"--size={day.size.learned}", f"--dtype={candidates_dtype(day)}", f"--dataset={day.dataset}"]
    argv += [f"--compile={not day.size.flags}", f"--device={day.device}", f"--json={path}"]
    try:
        day.checked("benchmarks/compare_modded.py", *argv)
    finally:
        figures |= read_results(path)
        tell_losses(figures, sentences)


def tell_losses(figures, sentences):
    for run in figures.get("runs", []):
        tokens = run["curve"][-1][0]
        sentences.append(
            f"{run['model']}: val loss {run['loss']:.4f} after {tokens / 1e6:.2f}M tokens, "
            f"{1e3 * run['seconds']:,.0f} ms an iteration"
        )


def results_file(day, name):
    """Returns the path of a script's results, which hold runs of one commit, card, torch and dataset."""
    same = repr((asked_of("learning", day), hardware.device_name(day.device), commit()))
    return os.path.join(day.cfg.out_dir, f"{name}_{zlib.crc32(same.encode()):08x}.json")


def read_results(path):
    if not os.path.exists(path):
        return {}
    with open(path) as f:
        return json.load(f)


def affordable_iterations(day, runs):
    """Returns how many iterations of `runs` models end in nine tenths of the time that is left. Raises
    OutOfTime if they are too few to compare anything."""
    rate = 0.7 * day.figures_of("smoke", day.dtype)["tokens_per_s"]  # of GPT-2: others may be slower
    starting = 60  # seconds of a run that are not training
    iters = int((0.9 * day.seconds_left() / runs - starting) * rate / SHORT_ITERATION)
    if day.cfg.size == "tiny":
        return 20
    if iters < 300:
        raise OutOfTime(f"{iters} iterations would be too few to compare anything; --minutes=60 may do")
    return min(3000, iters)


def candidates_dtype(day):
    return "bfloat16" if day.dtype == "bfloat16" else "float32"  # these scripts have no fp16


def table_rows(out):
    """Returns the rows of the last table in out, but for its head."""
    lines = [line for line in out.splitlines() if line.startswith("| ")]
    return [line.strip("| ").replace(" |", ",") for line in lines[1:]]


def sampling(day, figures, sentences, batch_size, compile):
    argv = [f"--batch_size={batch_size}", f"--compile={compile}", f"--nanogpt={day.cfg.nanogpt}"]
    argv += [f"--max_new_tokens={day.size.new_tokens}"]
    figures |= day.measured("benchmarks/sampling.py", *argv)
    for name, rate in figures["tokens_per_s"].items():
        of_bound = ""
        if name in figures["of_bound"]:
            of_bound = f", {figures['of_bound'][name]:.0%} of the bound that reading the weights sets"
        sentences.append(f"{name}: {rate:,.1f} tokens/s{of_bound}")


def profile(day, figures, sentences):
    argv = [day.size.gpt2, *day.size.flags, "--profile=True", f"--device={day.device}", "--batch_size=16"]
    out, _ = day.checked("bench.py", *argv, f"--dtype={day.dtype}", "--gradient_accumulation_steps=1")
    lines = [" ".join(line.split()) for line in out.splitlines()]
    after = next(i for i, line in enumerate(lines) if "micro-steps in" in line) + 1
    figures["output"] = lines
    sentences += lines[after : after + 6]


def small_models(day, figures, sentences, script):
    """Runs candidates.py or compare_modded.py. A run that the time cuts off is not lost with the others: each
    script goes on where it was."""
    jobs = 1
    free = hardware.available_memory(day.device)
    if free:
        jobs = min(8, max(1, int(free / 4e9)))
    path = results_file(day, script.removesuffix(".py"))
    flags = [f"--dataset={day.dataset}", f"--device={day.device}", f"--jobs={jobs}", *day.size.small]
    flags += [f"--dtype={candidates_dtype(day)}", f"--json={path}"]
    if script == "compare_modded.py":
        flags.append(f"--modded={day.cfg.modded}")
    try:
        out, _ = day.checked(f"benchmarks/{script}", *flags)
    finally:
        figures |= read_results(path)
    sentences += table_rows(out)


def parts_of(day):
    """Returns all Parts, in the order of their worth."""
    cfg, size = day.cfg, day.size
    on_cuda = day.device.type == "cuda"
    thirty = partial(train_thirty, config=size.gpt2)
    parts = [Part("smoke", day.dtype, 3, partial(thirty, dtype=day.dtype))]
    parts.append(Part("smoke", "recipe", 3, partial(train_thirty, config=size.modern, dtype=day.dtype)))
    parts.append(Part("tests", "values", 5, partial(gpu_tests, file="tests/test_gpu.py")))
    for batch_size in day.batch_sizes:
        for name, config in (("gpt2", size.gpt2), ("recipe", size.modern)):
            work = partial(bench, config=config, batch_size=batch_size)
            parts.append(Part("speed", f"{name}, {batch_size}", 4, work))
        if cfg.nanogpt:
            work = partial(beside_nanogpt, batch_size=batch_size)
            parts.append(Part("speed", f"beside nanoGPT, {batch_size}", 5, work))
    for compile in (True, False):
        for batch_size in size.sampled:
            work = partial(sampling, batch_size=batch_size, compile=compile)
            parts.append(Part("sampling", f"1 and {batch_size}{', compiled' * compile}", 5, work))
    parts.append(Part("smoke", "resume", 5, resume))
    if on_cuda:
        parts.append(Part("smoke", "runs out", 5, runs_out))
        parts.append(Part("smoke", "too large", 5, too_large))
    if on_cuda and day.dtype != "float16":
        parts.append(Part("smoke", "float16", 3, partial(thirty, dtype="float16")))
    parts.append(Part("tests", "runs", 8, partial(gpu_tests, file="tests/test_gpu_runs.py")))
    parts.append(Part("profile", "a micro-step", 4, profile))
    parts.append(Part("speed", "fp8, 16", 5, bench_fp8))
    parts.append(Part("learning", "equal tokens", math.inf, learning))
    if cfg.modded:
        work = partial(small_models, script="compare_modded.py")
        parts.append(Part("recipe", "beside modded-nanogpt", math.inf, work))
    parts.append(Part("recipe", "candidates", math.inf, partial(small_models, script="candidates.py")))
    return [part for part in parts if part.stage in cfg.stages.split(",")]


# -----------------------------------------------------------------------------
# the day


def prepare_data(day):
    """Makes day.dataset what the user has named, or Python's own library as bytes."""
    if day.cfg.dataset:
        named = os.path.join(ROOT, "data", day.cfg.dataset)
        day.dataset = os.path.abspath(named if os.path.isdir(named) else day.cfg.dataset)
        if not os.path.isdir(day.dataset):
            raise UserError(f"--dataset={day.cfg.dataset}: there is neither {named} nor {day.dataset}")
    elif not os.path.exists(os.path.join(day.dataset, "meta.json")):
        day.checked("prepare_fineweb.py", "--input=stdlib", "--encoding=bytes", f"--out_dir={day.dataset}")


def asked_of(stage, day):
    """Returns what decides a stage's figures, besides the card: with another of these it is done again."""
    asked = dict(size=day.cfg.size, dataset=day.dataset, torch=torch.__version__)
    if stage in ("speed", "sampling"):
        asked["nanogpt"] = day.cfg.nanogpt
    if stage in ("learning", "recipe"):
        asked["modded"] = day.cfg.modded
    return asked


def order(parts, day):
    """Returns those of the parts that are to be done. What failed comes last, as it may fail again, and
    before it what had most of a day and was not done."""
    missing, long, failed = [], [], []
    for part in parts:
        entry = day.entries.get(part.title, {})
        if entry.get("asked") != asked_of(part.stage, day):
            missing.append(part)
        elif entry["status"] == "no time" and entry["seconds"] > 0.6 * 60 * day.cfg.minutes:
            long.append(part)
        elif entry["status"] == "no time":
            missing.append(part)
        elif entry["status"] == "failed":
            failed.append(part)
        else:
            print(f"{part.title}: done already", file=sys.stderr)
    return missing + long + failed


def attempt(part, day):
    """Returns a part's entry in the JSON file."""
    start = time.monotonic()
    day.end_of_part = min(day.end, start + 60 * part.minutes)
    entry = dict(status="done", asked=asked_of(part.stage, day), figures={}, sentences=[])
    try:
        part.work(day, entry["figures"], entry["sentences"])
    except OutOfTime as e:
        entry["status"] = "no time"
        entry["sentences"].append(str(e))
        keep_output(entry, e)
    except Exception as e:  # also figures that are not as expected, in whatever way
        entry["status"] = "failed"
        entry["sentences"].append(f"{type(e).__name__}: {e}")
        keep_output(entry, e)
    return entry | dict(seconds=time.monotonic() - start, commit=commit(), driver=driver_version(day.device))


def keep_output(entry, error):
    output = getattr(error, "output", ())
    if output:
        entry["figures"]["output"] = output[-1000:]


def commit():
    """Returns the commit of this clone, or None."""
    command = ["git", "-C", ROOT, "rev-parse", "HEAD"]
    with suppress(OSError):
        found = subprocess.run(command, capture_output=True, text=True)
        return found.stdout.strip() or None
    return None


def print_table(parts, day):
    print("| stage: part | seconds | result |\n|---|---|---|")
    shown = {part.title for part in parts}
    for part in parts:
        entry = day.entries.get(part.title)
        if entry is None:
            continue
        if entry["asked"] != asked_of(part.stage, day):
            shown.remove(part.title)
            continue
        for sentence in entry["sentences"]:
            print(f"| {part.title}, {entry['status']} | {entry['seconds']:.0f} | {sentence} |")
    others = day.entries.keys() - shown
    if others:
        print(f"\nnot shown, as of other stages or settings: {', '.join(sorted(others))}")


def main(argv):
    cfg = from_command_line(DayConfig, __doc__, argv)
    device, _ = hardware.pick_device(cfg.device)
    card = hardware.device_name(device)
    name = re.sub(r"[^a-z0-9]+", "_", card.lower())
    if cfg.size == "tiny":
        name += "_tiny"
    path = cfg.json or os.path.join(ROOT, "benchmarks/results", f"gpu_day_{name}.json")
    for folder in ("nanogpt", "modded"):  # the scripts run in the project's folder
        if getattr(cfg, folder):
            setattr(cfg, folder, os.path.abspath(getattr(cfg, folder)))
    cfg.out_dir = os.path.abspath(cfg.out_dir)
    os.makedirs(cfg.out_dir, exist_ok=True)
    versions = dict(python=platform.python_version(), torch=torch.__version__, cuda=torch.version.cuda)
    report = dict(device=card, versions=versions, parts={})
    if os.path.exists(path):
        with open(path, encoding="utf-8") as f:
            earlier = json.load(f)
        if earlier["device"] != card:
            raise UserError(f"{path} is of another card, {earlier['device']}; name a file with --json=")
        report["parts"] = earlier.get("parts", {})  # a file of before there were parts has none
    day = Day(cfg, device, report["parts"])
    try:
        prepare_data(day)
    except Failed as e:
        raise UserError(str(e)) from None
    parts = parts_of(day)
    for part in order(parts, day):
        if day.end - time.monotonic() < 5:
            print("the time is up; the same command goes on", file=sys.stderr)
            break
        print(f"{part.title} ...", file=sys.stderr, flush=True)
        day.entries[part.title] = attempt(part, day)
        with atomic_file(path) as f:
            f.write(json.dumps(report, indent=1).encode())
    print(f"{card}, driver {driver_version(device)}, torch {torch.__version__}\n")
    print_table(parts, day)
    print(f"\nall figures are in {path}")


if __name__ == "__main__":
    run_script(main)
