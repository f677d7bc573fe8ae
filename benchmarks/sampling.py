"""
Tokens per second of sampling, against nanoGPT and against what the memory could deliver.

    python benchmarks/sampling.py --nanogpt=../nanoGPT --json=benchmarks/results/sampling_cpu.json

Both sample from the same random weights of GPT-2's smallest size, in turn, `repeats` times; the table has
medians. The bound is the time to move all weights once, which each token needs, at the bandwidth of a sum
over as many bytes (which only reads, as sampling does) and of a copy of them (where bytes read and bytes
written count).
"""

import importlib.util
import json
import os
import platform
import shlex
import statistics
import sys
import time
from dataclasses import dataclass

import torch

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

import sample
from configurator import Config, from_command_line, key, run_script
from model import GPT, GPTConfig
from sologpt import hardware

MOVES = 32  # of all weights in one measurement of a bound


@dataclass
class BenchmarkConfig(Config):
    nanogpt: str = key("", "checkout of nanoGPT; empty: leave it out")
    json: str = key("", "file to write the figures to")
    max_new_tokens: int = key(256, "tokens to sample after a prompt of one", low=2)
    prompt_tokens: int = key(512, "prompt for the time to the first token", low=1)
    batch_size: int = key(8, "sequences of the batched measurement; 64 suits a GPU", low=2)
    repeats: int = key(3, "measurements of each kind, in turn", low=1)
    device: str = key("", "cuda, cuda:N, mps or cpu; empty: the best available")
    compile: bool = key(False, "compile the step, as sample.py --compile=True does")


def processor():
    """Returns the name of the CPU, as Linux knows it."""
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as f:
            for line in f:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def synchronize(device):
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def seconds(work, device):
    """Returns the seconds that work() takes, all of the device's work included."""
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def load_nanogpt(folder, model, device):
    """Returns nanoGPT's GPT, from a checkout in folder, with the weights of model, ours."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", os.path.join(folder, "model.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    names = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")
    theirs = module.GPT(module.GPTConfig(**{name: getattr(model.config, name) for name in names}))
    theirs.load_state_dict(model.state_dict())
    return theirs.eval().to(device)


def weights_read(model):
    """Returns a copy of the matrices that each token needs as one tensor of integers, which sum() takes as
    fast as memory gives them; a sum of each matrix would measure launches on a GPU."""
    matrices = [p.data for name, p in model.named_parameters() if p.dim() == 2 and "wpe" not in name]
    return torch.cat([matrix.flatten().view(torch.int64) for matrix in matrices])


def reading(weights):
    """Returns a function that reads all weights MOVES times."""
    return lambda: [weights.sum() for _ in range(MOVES)]


def copying(weights):
    """Returns a function that copies all weights MOVES times."""
    target = torch.empty_like(weights)
    return lambda: [target.copy_(weights) for _ in range(MOVES)]


def main(argv):
    cfg = from_command_line(BenchmarkConfig, __doc__, argv)
    device, _ = hardware.pick_device(cfg.device)
    hardware.avoid_cudnn_attention()  # as sample.py does
    torch.manual_seed(0)
    fp32 = GPT(GPTConfig(bias=False)).eval()
    bf16 = GPT(GPTConfig(bias=False)).eval()
    bf16.load_state_dict(fp32.state_dict())
    models = {"fp32": fp32.to(device), "bf16": bf16.to(device, torch.bfloat16)}
    start = torch.zeros(1, 1, dtype=torch.long, device=device)
    prompt = torch.randint(fp32.config.n_ids, (1, cfg.prompt_tokens), device=device)
    one, many = cfg.max_new_tokens, cfg.max_new_tokens // 4

    def sampling(model, idx, count, **options):
        return lambda: model.generate(idx, count, temperature=0.8, top_k=200, **options)

    def options(model, count):
        """Returns what sample.py gives generate() for so many sequences. top_p is that of the first compiled
        step: another one would compile anew."""
        session = sample.Session(sample.SampleConfig(), model, None, device, None)
        if cfg.compile:
            sample.compile_step(session, count)
        return session.options | dict(top_p=session.cfg.top_p)

    # -------------------------------------------------------------------------
    # what is measured: name: (work, how often that does what the figure is of)

    kinds = {}
    gigabytes = {}
    if cfg.nanogpt:
        theirs = load_nanogpt(cfg.nanogpt, fp32, device)
        kinds["nanoGPT, fp32"] = sampling(theirs, start, one), one
        kinds["nanoGPT, first token"] = sampling(theirs, prompt, 1), 1
    for dtype, model in models.items():
        kinds[f"soloGPT, {dtype}"] = sampling(model, start, one, **options(model, 1)), one
        weights = weights_read(model)
        gigabytes[dtype] = weights.nbytes / 1e9
        kinds[f"reading the weights, {dtype}"] = reading(weights), MOVES
        kinds[f"copying the weights, {dtype}"] = copying(weights), MOVES
        batch = start.expand(cfg.batch_size, 1)
        work = sampling(model, batch, many, **options(model, cfg.batch_size))
        kinds[f"soloGPT, {dtype}, batch"] = work, many
    kinds["soloGPT, first token"] = sampling(fp32, prompt, 1), 1
    kinds["soloGPT, full pass"] = torch.no_grad()(lambda: fp32(prompt)), 1

    times = {name: [] for name in kinds}
    for _ in range(cfg.repeats):
        for name, (work, count) in kinds.items():
            times[name].append(seconds(work, device) / count)
            print(f"{name}: {times[name][-1] * 1e3:.2f} ms", file=sys.stderr)
    ms = {name: 1e3 * statistics.median(some) for name, some in times.items()}

    # -------------------------------------------------------------------------
    # the table

    rates = {}
    of_bound = {}
    machine = f"{processor()}, {torch.get_num_threads()} threads; {device}; torch {torch.__version__}"
    print(f"{machine}; {gigabytes} GB")
    print(f"124M; {one} tokens after 1, {cfg.batch_size} * {many} in a batch")
    print(f"first token after {cfg.prompt_tokens}")
    print("| what | ms | tokens/s | of nanoGPT | of the read bound | of the copy bound |")
    print("|---|---|---|---|---|---|")
    for name in ms:
        figures = [f"{ms[name]:.1f}"]
        if name.startswith(("nanoGPT, fp32", "soloGPT, fp32", "soloGPT, bf16")):
            rate = 1e3 / ms[name] * (cfg.batch_size if "batch" in name else 1)
            rates[name] = rate
            figures += [f"{rate:.1f}", f"{rate * ms['nanoGPT, fp32'] / 1e3:.1f}x" if cfg.nanogpt else ""]
            if name in ("soloGPT, fp32", "soloGPT, bf16"):
                read, copy = (ms[f"{kind} the weights, {name[-4:]}"] for kind in ("reading", "copying"))
                of_bound[name] = read / ms[name]
                figures += [f"{100 * read / ms[name]:.0f} %", f"{100 * copy / 2 / ms[name]:.0f} %"]
        print(f"| {name} | {' | '.join(figures + [''] * (5 - len(figures)))} |")
    if cfg.json:
        figures = dict(
            command=shlex.join(["python", *sys.argv]), cpu=processor(), threads=torch.get_num_threads()
        )
        figures |= dict(device=str(device), torch=torch.__version__, gigabytes=gigabytes, median_ms=ms)
        figures |= dict(tokens_per_s=rates, of_bound=of_bound)
        figures |= dict(all_ms={name: [1e3 * t for t in some] for name, some in times.items()})
        with open(cfg.json, "w", encoding="utf-8") as f:
            json.dump(figures, f, indent=1)


if __name__ == "__main__":
    run_script(main)
