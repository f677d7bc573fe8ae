"""
What will it cost me? Prints docs/cost.md: hours, memory and disk of every config, by card.

    python benchmarks/cost.py > docs/cost.md

An hour is the FLOPs of the config's model (PaLM, appendix B) divided by FLOP/s: those of a bench.py report in
benchmarks/results, those that somebody has published for the card, or a share of its peak. A mark says which.
"""

import dataclasses
import json
import re
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from configurator import configure
from model import make_gpt
from sologpt.hardware import peak_flops
from sologpt.memory import checkpoint_bytes, memory_estimate
from sologpt.optim import allocate_moments, make_optimizers
from sologpt.tokenizer import gpt2_tokenizer
from train import TrainConfig, model_config

ROOT = Path(__file__).resolve().parent.parent

GPT2 = 854.7e6  # FLOPs for each token of GPT-2 124M, with 1,024 tokens of context
SMALL = 300.0e6  # of the model of config/fineweb_40m.py


@dataclasses.dataclass
class Card:
    name: str
    gigabytes: int
    sms: int

    @property
    def peak(self):
        return peak_flops(self.name, self.sms, "bfloat16")[0]


@dataclasses.dataclass
class Rate:
    """How fast somebody else's trainer is on a card."""

    card: str
    flops_per_token: float
    tokens_per_second: float  # the source's iterations or hours, divided
    source: str

    @property
    def flops(self):
        return self.flops_per_token * self.tokens_per_second


CARDS = [
    Card("RTX 3060", 12, 28),
    Card("RTX 4070", 12, 46),
    Card("RTX 4090", 24, 128),
    Card("A100", 40, 108),
    Card("H100 HBM3", 80, 132),
    Card("H200", 141, 132),
]
RATES = [
    Rate(
        "RTX 4070",
        GPT2,
        524_288 / 9.34408,
        "nanoGPT, 9,344 ms for 524,288 tokens in a log of [lzwjava/zz](https://github.com/lzwjava/zz)",
    ),
    Rate("RTX 4070", SMALL, 524_288 / 3.90479, "nanoGPT, 3,905 ms for 524,288 tokens, another log there"),
    Rate(
        "RTX 4090",
        GPT2,
        0.29 * 312e12 / GPT2,
        "nanoGPT, an mfu of 29 % of an A100's 312 TFLOP/s in its "
        "[issue 182](https://github.com/karpathy/nanoGPT/issues/182)",
    ),
    Rate(
        "A100",
        GPT2,
        600_000 * 491_520 / (4 * 86_400) / 8,
        "nanoGPT, 600,000 iterations of 491,520 tokens in about 4 days on 8 of them, by "
        "[its README](https://github.com/karpathy/nanoGPT#readme)",
    ),
    Rate(
        "H100 HBM3",
        GPT2,
        19_560 * 524_288 / (45 * 60) / 8,
        "llm.c, 19,560 iterations of 524,288 tokens in 45 minutes on 8 of them, by "
        "[modded-nanogpt's README](https://github.com/KellerJordan/modded-nanogpt#readme)",
    ),
]


def settings_of(path):
    """Returns the TrainConfig of a config file, for a GPU that computes in bf16."""
    return configure(TrainConfig, [str(path), "--compile=True"])


def model_of(cfg):
    """Returns a config's model, on the meta device: no memory, no numbers. The vocabulary is GPT-2's."""
    tokenizer = gpt2_tokenizer()
    with torch.device("meta"):
        ids = dict(vocab_size=tokenizer.embedding_rows(), n_ids=tokenizer.vocab_size)
        return make_gpt(model_config(cfg, ids))


def needs(cfg):
    """Returns a dict of what a run takes: FLOPs of a token, tokens, bytes of memory and of checkpoints."""
    model = model_of(cfg)
    optimizers = make_optimizers(model, cfg, torch.device("meta"))
    allocate_moments(optimizers)
    memory = memory_estimate(model, optimizers, cfg, "bfloat16")
    return dict(
        arch=cfg.arch,
        flops_per_token=model.flops_per_token(),
        tokens=cfg.max_iters * cfg.tokens_per_iter,
        memory=sum(memory.values()),
        checkpoints=checkpoint_bytes(memory, cfg.keep_before_cooldown),
    )


def measured_rates():
    """Returns {(device, config): FLOP/s} of the reports that bench.py has written on a GPU."""
    found = {}
    for path in (ROOT / "benchmarks/results").glob("*.json"):
        report = json.loads(path.read_text())
        if isinstance(report, dict) and report.get("driver") and report.get("recommended"):
            config = re.search(r"config/(\w+\.py)", report["command"])
            if config and "tflops" in report["recommended"]:
                found[report["device"], config[1]] = report["recommended"]["tflops"] * 1e12
    return found


def shares():
    """Returns the lowest and the highest share of its peak that a GeForce was seen at."""
    peaks = {card.name: card.peak for card in CARDS}
    found = [rate.flops / peaks[rate.card] for rate in RATES if "RTX" in rate.card]
    return min(found), max(found)


def measured_on(card, measured):
    """Returns {config: FLOP/s} of those in measured, from measured_rates, that are of a card."""
    found = {}
    for (device, config), rate in measured.items():
        words = set(re.findall(r"\w+", device)) - {"NVIDIA", "GeForce", "SXM4", "40GB", "80GB"}
        if words == set(card.name.split()):
            found[config] = rate
    return found


def cell(card, name, need, measured):
    """Returns the hours of a config's run on a card, as text with the mark of where they are from."""
    flops = need["flops_per_token"] * need["tokens"]
    ours = measured_on(card, measured)
    if name in ours:
        return f"{hours(flops / ours[name])} m"
    known = [rate for rate in RATES if rate.card == card.name]
    if ours and not known:
        return f"{hours(flops / max(ours.values()))} e"
    if not known:
        low, high = shares()
        return f"{hours(flops / (high * card.peak))} to {hours(flops / (low * card.peak))} e"
    nearest = min(known, key=lambda rate: abs(rate.flops_per_token - need["flops_per_token"]))
    time = hours(flops / nearest.flops)
    if need["arch"] == "gpt2" and abs(nearest.flops_per_token / need["flops_per_token"] - 1) < 0.01:
        return f"{time} p"
    return f"{time} e"


def hours(seconds):
    if seconds < 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.0f} h"


def page():
    """Returns docs/cost.md."""
    low, high = shares()
    measured = measured_rates()
    needed = {}
    for path in sorted(ROOT.glob("config/*.py")):
        cfg = settings_of(path)
        if cfg.tokens_per_iter > 100_000:  # the others take minutes, most of them for launching kernels
            needed[path.name] = needs(cfg)
    lines = [
        "# What will it cost me?",
        "",
        "Hours of training alone on one card, written by `python benchmarks/cost.py > docs/cost.md`.",
        "",
        f"| config | memory | {' | '.join(f'{card.name}, {card.gigabytes} GB' for card in CARDS)} |",
        "|---" * (len(CARDS) + 2) + "|",
    ]
    for name, need in needed.items():
        cells = " | ".join(cell(card, name, need, measured) for card in CARDS)
        lines.append(f"| `{name}` | {need['memory'] / 1e9:.1f} GB | {cells} |")
    lines += [
        "",
        "* **m**: measured with this project; bench.py's report is in benchmarks/results",
        "* **p**: published for this model in another trainer; soloGPT's own time is not measured yet",
        "* **e**: estimated, from the FLOPs of the model and the FLOP/s that a published or measured one",
        "  reaches on the card; on the RTX 3060 from its peak, of which GeForce cards reach",
        f"  {low:.0%} to {high:.0%}",
        "",
        "Published:",
        "",
    ]
    lines += [f"* {rate.card}: {rate.tokens_per_second:,.0f} tokens/s, {rate.source}" for rate in RATES]
    lines += [
        "",
        "Memory is train.py's estimate in bf16; CUDA takes some 0.5 GB more. Where it is more than the card",
        "has, train.py takes a smaller micro-batch: the same iteration, somewhat slower. Evaluations,",
        "compilation and checkpoints come on top; `python bench.py config/NAME.py` measures your own card.",
        "",
        "| config | disk for checkpoints, at most | tokens in all |",
        "|---|---|---|",
    ]
    for name, need in needed.items():
        lines.append(f"| `{name}` | {need['checkpoints'] / 1e9:.1f} GB | {need['tokens'] / 1e9:.1f}B |")
    lines += [
        "",
        "A token takes 2 bytes on disk: FineWeb-Edu's 10B are 20 GB. `--dry_run=True` of train.py and of",
        "prepare_fineweb.py says what your own settings and data take, without doing it.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    print(page())
