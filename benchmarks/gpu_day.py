"""
All that is to be measured on a GPU, in the order of its worth: one command for the day there is one.

    python benchmarks/gpu_day.py [--minutes=9] [--dataset=fineweb] [--nanogpt=../nanoGPT]

The stages are smoke (does training work there: bf16, fp16, stop and resume, a micro-batch that does not fit),
tests (pytest -m gpu), speed (bench.py, and nanoGPT in turn with ours), recipe (candidates.py, and
compare_modded.py), learning (GPT-2 with AdamW and the recipe on equal data), sampling, and profile. Each runs
in processes of its own; one that fails or takes too long is a row of the table, and the next one runs. The
figures are written to a JSON file after each stage, and the same command goes on with the stages that are
missing there. Without --dataset, the text is Python's own library as bytes. docs/measuring.md says how to
read the results. It needs Linux or WSL.
"""

import dataclasses
import json
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import dataclass

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from bench import driver_version
from configurator import Config, from_command_line, key, run_script
from sologpt import hardware
from sologpt.errors import UserError
from sologpt.files import atomic_file

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
ITER = re.compile(
    r"^iter (\d+): loss ([\d.]+|nan|inf), time ([\d.]+)ms, mfu (?:([\d.]+)%|n/a),.* ([\d,]+) tok/s"
)
VAL = re.compile(r"^step (\d+): train loss \S+, val loss ([\d.]+|nan|inf)")
SMALLER = re.compile(r"(?:from iteration \d+ on|starts with) batch_size=(\d+)")


@dataclass
class Size:
    gpt2: str  # configs
    modern: str
    flags: list  # for all runs
    batch_sizes: tuple
    in_turn: int  # sequences of an iteration beside nanoGPT
    too_large: int  # a micro-batch that should not fit
    sampled: tuple  # sequences at once
    new_tokens: int
    learned: list  # flags of the recipe stage


TINY = "--n_layer=2 --n_head=1 --n_embd=128 --block_size=64 --compile=False".split()
LEARNED = "--size=tiny --iters=10 --eval_windows=32".split()
FAST, QUICK = "config/fineweb_125m_fast.py", "config/quickstart.py"
SIZES = {
    "124m": Size(
        "config/fineweb_125m.py", FAST, [], (8, 16, 32, 64), 128, 512, (8, 64), 128, ["--compile=True"]
    ),
    "tiny": Size(QUICK, QUICK, TINY, (2, 4), 4, 4, (2,), 4, LEARNED),
}


@dataclass
class DayConfig(Config):
    minutes: float = key(9.0, "time for all stages; one that would begin later is left out", above=0)
    dataset: str = key("", "folder of token files: one under data/, or a path; empty: Python's own library")
    nanogpt: str = key("", "checkout of nanoGPT to compare with; empty: leave it out")
    modded: str = key("", "checkout of modded-nanogpt to compare with; empty: leave it out")
    batch_sizes: str = key("", "micro-batches of the speed stage, as in 16,64; empty: 8,16,32,64")
    stages: str = key("smoke,tests,speed,recipe,learning,sampling,profile", "which, with commas between them")
    size: str = key("124m", "124m, or tiny to try this file without a GPU", choices=tuple(SIZES))
    device: str = key("", "cuda, cuda:N, mps or cpu; empty: the best available")
    out_dir: str = key("out-gpu-day", "folder for the runs")
    json: str = key("", "file of the figures; empty: benchmarks/results/gpu_day_NAME_OF_THE_CARD.json")

    def problems(self):
        found = []
        unknown = set(self.stages.split(",")) - STAGES.keys()
        if unknown:
            found.append(f"stages has {', '.join(sorted(unknown))}; there are {', '.join(STAGES)}")
        if not re.fullmatch(r"([1-9]\d*(,[1-9]\d*)*)?", self.batch_sizes):
            found.append(f"batch_sizes={self.batch_sizes!r} must be positive numbers with commas between")
        if not os.path.isdir(os.path.dirname(self.json) or "."):
            found.append(f"json={self.json!r}: there is no such folder")
        return found


class Failed(Exception):
    """A process that ended with an error, or was stopped as the time was up; the message is a row's text."""


class Day:
    """What the stages share: where the runs and the data are, and how much time is left."""

    def __init__(self, cfg, device):
        self.cfg = cfg
        self.device = device
        self.size = SIZES[cfg.size]
        if cfg.batch_sizes:
            batch_sizes = tuple(int(size) for size in cfg.batch_sizes.split(","))
            self.size = dataclasses.replace(self.size, batch_sizes=batch_sizes)
        self.end = time.monotonic() + 60 * cfg.minutes
        self.dataset = os.path.abspath(os.path.join(cfg.out_dir, "data"))

    def seconds_left(self):
        return self.end - time.monotonic()

    def run(self, script, *argv, on_line=None, **env):
        """Runs a script of this project, or a module after -m; returns (stdout, stderr, exit status). Each
        line of stdout is given to on_line with the process. Raises Failed if the time is up."""
        if not script.startswith("-m"):
            script = os.path.join(ROOT, script)
        command = [sys.executable, *script.split(" "), *argv]
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
        lines, errors = [], []
        with subprocess.Popen(command, cwd=ROOT, env=os.environ | env, **pipes) as process:
            reader = threading.Thread(target=lambda: errors.extend(process.stderr))
            reader.start()
            timer = threading.Timer(max(self.seconds_left(), 1), kill_group, [process])
            timer.start()
            for line in process.stdout:
                lines.append(line)
                if on_line:
                    on_line(process, line)
            reader.join()
        late = not timer.is_alive()
        timer.cancel()
        if late:
            raise Failed(f"stopped as the time was up: {os.path.basename(script)} {shlex.join(argv)}")
        return "".join(lines), "".join(errors), process.returncode

    def checked(self, script, *argv, **options):
        """As run, but returns (stdout, stderr). Raises Failed, with the last line of stderr, on an error."""
        out, err, status = self.run(script, *argv, **options)
        if status:
            last = (err.strip() or "nothing on stderr").splitlines()[-1]
            raise Failed(f"{os.path.basename(script)} {shlex.join(argv)} ended with {status}: {last}")
        return out, err

    def train(self, name, config, iters, *argv, stop_at=None):
        """Runs train.py in out_dir/name, stopped by Ctrl-C at iteration stop_at; returns its figures."""

        def on_line(process, line):
            if stop_at is not None and line.startswith(f"iter {stop_at}:"):
                process.send_signal(signal.SIGINT)

        flags = [f"--max_iters={iters}", f"--lr_decay_iters={iters}", "--warmup_iters=5", "--log_interval=1"]
        flags += [f"--eval_interval={iters}", "--eval_iters=2", f"--dataset={self.dataset}"]
        flags += [f"--out_dir={os.path.join(self.cfg.out_dir, name)}", f"--device={self.device}"]
        script = ("train.py", config, *self.size.flags, *flags, *argv)
        env = dict(TORCH_LOGS="recompiles,graph_breaks")
        out, err, status = self.run(*script, on_line=on_line, **env)
        if status and stop_at is None:
            raise Failed(f"train.py in {name} ended with {status}: {(err.strip() or out).splitlines()[-1]}")
        return figures_of_a_run(out, err)


def kill_group(process):
    os.killpg(process.pid, signal.SIGKILL)


def figures_of_a_run(out, err):
    """Returns what train.py's output says, a dict; times without those of the first iterations."""
    iters = [match for match in map(ITER.match, out.splitlines()) if match]
    evals = [match for match in map(VAL.match, out.splitlines()) if match]
    settled = iters[3:] or iters
    peak = re.search(r"^memory: +([\d.]+) GB at most", out, re.M)
    attention = re.search(r"^model: .*, ([A-Z_]+)$", out, re.M)
    return dict(
        losses={int(match[1]): float(match[2]) for match in iters},
        val_losses={int(match[1]): float(match[2]) for match in evals},
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


# -----------------------------------------------------------------------------
# stages: each fills figures, a dict, and sentences for the table, so that a failure loses nothing of them


def percent(mfu):
    return f"MFU {mfu:.1f} %" if mfu else "MFU n/a"


def smoke(day, figures, sentences):
    bf16 = day.train("bf16", day.size.gpt2, 30, "--dtype=bfloat16", "--gradient_accumulation_steps=4")
    figures["bf16"] = bf16
    losses = list(bf16["losses"].values())
    sentences.append(
        f"bf16, 30 iterations: loss {losses[0]:.2f} to {losses[-1]:.2f}, "
        f"{bf16['tokens_per_s']:,.0f} tokens/s, {percent(bf16['mfu'])}, peak {bf16['peak_gb'] or 'n/a'} GB, "
        f"attention {bf16['attention']}, "
        f"{bf16['recompiles']} recompiles, {bf16['graph_breaks']} graph breaks, "
        f"{len(bf16['warnings'])} warnings"
    )
    if not losses[-1] < losses[0]:
        sentences.append("THE LOSS DOES NOT FALL")
    if day.device.startswith("cuda"):
        fp16 = day.train("fp16", day.size.gpt2, 30, "--dtype=float16", "--gradient_accumulation_steps=4")
        figures["fp16"] = fp16
        sentences.append(f"fp16: loss to {list(fp16['losses'].values())[-1]:.2f}")

    argv = (day.size.gpt2, 30, "--dtype=bfloat16", "--gradient_accumulation_steps=4")
    figures["stopped"] = day.train("parts", *argv, stop_at=10)
    figures["resumed"] = day.train("parts", *argv, "--init_from=resume")
    pairs = [(loss, bf16["losses"][it]) for it, loss in figures["resumed"]["losses"].items()]
    figures["difference"] = max(abs(a - b) for a, b in pairs)
    sentences.append(f"stopped and resumed: losses differ by up to {figures['difference']:.4f}")

    large = ("--gradient_accumulation_steps=1", f"--batch_size={day.size.too_large}")
    figures["too_large"] = day.train("large", day.size.gpt2, 2, *large)
    sizes = figures["too_large"]["batch_sizes"]
    sentences.append(f"batch_size={day.size.too_large}: {f'fits as {sizes[-1]}' if sizes else 'fits'}")


def tests(day, figures, sentences):
    # in one process, with or without pytest-xdist; torch 2.11 gives warnings that later ones do not
    argv = "-o addopts= -W ignore::DeprecationWarning -m gpu -q -ra --tb=short --show-capture=no".split()
    out, err, status = day.run("-m pytest", *argv, "tests/test_gpu.py")
    figures |= dict(status=status, output=out[-20000:])
    last = (out.strip() or err.strip()).splitlines()[-1]
    sentences.append(f"pytest -m gpu: {last}")
    if status:
        raise Failed(f"pytest ended with {status}")


def speed(day, figures, sentences):
    swept = f"--sweep_batch_size={','.join(map(str, day.size.batch_sizes))}"
    for name, config in (("gpt2", day.size.gpt2), ("modern", day.size.modern)):
        path = os.path.join(day.cfg.out_dir, f"bench_{name}.json")
        shape = f"--gradient_accumulation_steps={512 // day.size.batch_sizes[0]}"
        argv = (config, *day.size.flags, f"--batch_size={day.size.batch_sizes[0]}", shape, swept)
        day.checked("bench.py", *argv, f"--device={day.device}", f"--json={path}")
        with open(path) as f:
            figures[name] = json.load(f)
        rows = [row for row in figures[name]["rows"] if row["status"] == "measured"]
        best = min(rows, key=lambda row: row["ms_per_iter"])
        share = best["update_ms"] / best["ms_per_iter"]
        sentences.append(
            f"{name}: best at batch_size={best['batch_size']}, {best['tokens_per_s']:,.0f} tokens/s, "
            f"{percent(100 * (best['mfu'] or 0))}, {share:.1%} of the time for updates"
        )
    if day.cfg.nanogpt:
        for batch_size in day.size.batch_sizes:
            try:
                figures[f"nanogpt_{batch_size}"], sentence = beside_nanogpt(day, batch_size)
            except Failed as e:
                if day.seconds_left() < 0:
                    raise
                sentences.append(f"batch_size={batch_size} beside nanoGPT: {e}")
                break  # larger ones take more memory
            sentences.append(sentence)


def beside_nanogpt(day, batch_size):
    path = os.path.join(day.cfg.out_dir, f"steps_{batch_size}.json")
    argv = [*day.size.flags, f"--batch_size={batch_size}", f"--dataset={day.dataset}"]
    argv += [
        f"--gradient_accumulation_steps={max(1, day.size.in_turn // batch_size)}",
        "--rounds=3",
        "--iters=3",
    ]
    argv += [f"--device={day.device}", f"--nanogpt={day.cfg.nanogpt}", f"--json={path}"]
    day.checked("benchmarks/steps.py", *argv)
    with open(path) as f:
        found = json.load(f)
    theirs, parts = found["seconds"]["nanoGPT"], []
    for name, seconds in found["seconds"].items():
        ratio = statistics.median(a / b for a, b in zip(theirs, seconds, strict=True))
        peak = found["peak_memory"][name]
        parts.append(f"{name} {ratio:.2f}, {peak / 1e9:.2f} GB" if peak else f"{name} {ratio:.2f}")
    return found, f"batch_size={batch_size}, of nanoGPT's tokens/s, and peaks: {'; '.join(parts)}"


def recipe(day, figures, sentences):
    """What is learned from a token: the candidates, and beside modded-nanogpt's baseline. A run that the time
    cuts off is not lost with the others: each script goes on where it was."""
    data = [f"--dataset={day.dataset}", f"--device={day.device}", "--jobs=8", *day.size.learned]
    scripts = {"candidates.py": []}
    if day.cfg.modded:
        scripts["compare_modded.py"] = [f"--modded={day.cfg.modded}"]
    for script, argv in scripts.items():
        path = os.path.join(day.cfg.out_dir, script.replace(".py", ".json"))
        out, _ = day.checked(f"benchmarks/{script}", *data, *argv, f"--json={path}")
        figures[script] = out.splitlines()
        sentences += [line.strip("| ").replace(" |", ",") for line in figures[script][2:]]


def learning(day, figures, sentences):
    """Both recipes on the same tokens, as many as nine tenths of the time that is left allow."""
    tokens_per_iter = ("--batch_size=32", "--gradient_accumulation_steps=4")
    slowest = starting = 0.0  # seconds of an iteration, and of all that is not training
    for name, config in (("gpt2", day.size.gpt2), ("modern", day.size.modern)):
        began = time.monotonic()
        trial = day.train(f"trial_{name}", config, 20, *tokens_per_iter)
        figures[f"trial_{name}"] = trial
        seconds = trial["ms_per_iter"] / 1e3
        slowest = max(slowest, seconds)
        starting = max(starting, time.monotonic() - began - 20 * seconds)
    iters = max(20, min(1000, int((0.45 * day.seconds_left() - starting) / slowest)))
    for name, config in (("gpt2", day.size.gpt2), ("modern", day.size.modern)):
        figures[name] = day.train(f"learn_{name}", config, iters, *tokens_per_iter)
        loss = list(figures[name]["val_losses"].values())[-1]
        sentences.append(f"{name}: val loss {loss:.4f} after {iters} iterations of the same data")


def sampling(day, figures, sentences):
    for batch_size in day.size.sampled:
        for compile in (False, True):
            path = os.path.join(day.cfg.out_dir, f"sampling_{batch_size}_{compile}.json")
            argv = [f"--batch_size={batch_size}", f"--compile={compile}", f"--device={day.device}"]
            argv += [
                f"--nanogpt={day.cfg.nanogpt}",
                f"--json={path}",
                f"--max_new_tokens={day.size.new_tokens}",
            ]
            out, _ = day.checked("benchmarks/sampling.py", *argv)
            with open(path) as f:
                figures[f"{batch_size}_{compile}"] = json.load(f)
            rows = [line.strip("| ") for line in out.splitlines() if "soloGPT" in line]
            sentences += [f"batch {batch_size}, compile={compile}: {row.replace(' |', ',')}" for row in rows]


def profile(day, figures, sentences):
    argv = [day.size.gpt2, *day.size.flags, "--profile=True", f"--device={day.device}", "--batch_size=16"]
    out, _ = day.checked("bench.py", *argv, "--gradient_accumulation_steps=1")
    lines = [" ".join(line.split()) for line in out.splitlines()]
    after = next(i for i, line in enumerate(lines) if "micro-steps in" in line) + 1
    figures["output"] = lines
    sentences += lines[after : after + 6]


STAGES = dict(smoke=smoke, tests=tests, speed=speed, recipe=recipe)
STAGES |= dict(learning=learning, sampling=sampling, profile=profile)


# -----------------------------------------------------------------------------
# the day


def prepare_data(day):
    """Makes day.dataset what the user has named, or Python's own library as bytes."""
    if day.cfg.dataset:
        named = os.path.join(ROOT, "data", day.cfg.dataset)
        day.dataset = os.path.abspath(named if os.path.isdir(named) else day.cfg.dataset)
    elif not os.path.exists(os.path.join(day.dataset, "meta.json")):
        day.checked("prepare_fineweb.py", "--input=stdlib", "--encoding=bytes", f"--out_dir={day.dataset}")


def asked_of(name, day):
    """Returns what decides a stage's figures, besides the card: with another of these it is done again."""
    cfg = day.cfg
    asked = dict(size=cfg.size, dataset=day.dataset, torch=torch.__version__)
    if name in ("speed", "sampling"):
        asked["nanogpt"] = cfg.nanogpt
    if name == "speed":
        asked["batch_sizes"] = day.size.batch_sizes
    if name == "recipe":
        asked["modded"] = cfg.modded
    return {key: str(value) for key, value in asked.items()}


def try_stage(day, name):
    """Returns a stage's entry in the JSON file."""
    start = time.monotonic()
    entry = dict(status="done", asked=asked_of(name, day), figures={}, sentences=[])
    try:
        STAGES[name](day, entry["figures"], entry["sentences"])
    except Exception as e:  # also figures that are not as expected, in whatever way
        entry["status"] = "failed"
        entry["sentences"].append(f"{type(e).__name__}: {e}")
    return entry | dict(seconds=time.monotonic() - start)


def main(argv):
    cfg = from_command_line(DayConfig, __doc__, argv)
    device, _ = hardware.pick_device(cfg.device)
    card = hardware.device_name(device)
    path = cfg.json or os.path.join(
        ROOT, "benchmarks/results", f"gpu_day_{re.sub(r'[^a-z0-9]+', '_', card.lower())}.json"
    )
    os.makedirs(cfg.out_dir, exist_ok=True)
    cfg.out_dir = os.path.abspath(cfg.out_dir)
    day = Day(cfg, str(device))
    report = dict(device=card, driver=driver_version(device), torch=torch.__version__, stages={})
    if os.path.exists(path):
        with open(path, encoding="utf-8") as f:
            earlier = json.load(f)
        if earlier["device"] != card:
            raise UserError(f"{path} is of another card, {earlier['device']}; name a file with --json=")
        report["stages"] = earlier["stages"]
    try:
        prepare_data(day)
    except Failed as e:
        raise UserError(str(e)) from None
    for name in cfg.stages.split(","):
        before = report["stages"].get(name, {})
        if before.get("status") == "done" and before.get("asked") == asked_of(name, day):
            print(f"{name} is done already", file=sys.stderr)
            continue
        if day.seconds_left() < 5:
            print(f"no time for {name}; the same command goes on there", file=sys.stderr)
            break
        print(f"{name} ...", file=sys.stderr, flush=True)
        report["stages"][name] = try_stage(day, name)
        with atomic_file(path) as f:
            f.write(json.dumps(report, indent=1).encode())
    print(f"{card}, driver {report['driver']}, torch {report['torch']}\n")
    print("| stage | seconds | result |\n|---|---|---|")
    for name, entry in report["stages"].items():
        for sentence in entry["sentences"]:
            print(f"| {name}, {entry['status']} | {entry['seconds']:.0f} | {sentence} |")
    print(f"\nall figures are in {path}")


if __name__ == "__main__":
    run_script(main)
