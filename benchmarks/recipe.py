"""
How much more does the modern recipe learn from a token? A ladder from GPT-2 with AdamW to arch="modern"
with Muon.

    python prepare_fineweb.py --input=FOLDER --encoding=bytes --out_dir=data/corpus_bytes
    python benchmarks/recipe.py --dataset=corpus_bytes --jobs=2 --json=benchmarks/results/recipe_cpu.json

Every run is train.py itself on the same data in the same order, in a folder of its own under out_dir; a run
that is complete there is not made again, so a stopped benchmark goes on where it was. First learning rates
are searched, of the baseline and of the recipe; then each rung is run with the better rate of its optimizer;
then, over several seeds, the baseline, the recipe, and the recipe with only a part of the tokens (its whole
schedule, cooldown included, fits into that part). Printed are validation losses, the tokens and the time to
the baseline's final loss.
"""

import dataclasses
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

from configurator import Config, from_command_line, key, run_script

HERE = os.path.dirname(os.path.abspath(__file__))
SIZES = dict(
    cpu="--n_layer=4 --n_embd=256 --block_size=256 --batch_size=32 --gradient_accumulation_steps=1 "
    "--dtype=bfloat16",
    # 131,072 tokens an iteration
    gpu="config/fineweb_125m.py --batch_size=32 --gradient_accumulation_steps=4",
)
GPT2 = "--arch=gpt2 --optimizer={} --schedule={}"
MODERN = "--arch=modern --optimizer=muon --schedule=wsd"
# the parts of arch="modern" that the ladder adds one by one, the last one first
ALL = ("smear", "value table", "values", "embedding", "cap", "head")
RUNGS = {  # name: (flags, heads of 64 or 128, parts of arch="modern" that are left out)
    "GPT-2, AdamW, cosine": (GPT2.format("adamw", "cosine"), 64, ()),
    "+ wsd": (GPT2.format("adamw", "wsd"), 64, ()),
    "+ Muon": (GPT2.format("muon", "wsd"), 64, ()),
    "+ modern blocks": (MODERN, 128, ALL),
    "+ head of its own": (MODERN, 128, ALL[:5]),
    "+ capped logits": (MODERN, 128, ALL[:4]),
    "+ embedding shortcut": (MODERN, 128, ALL[:3]),
    "+ value shortcut": (MODERN, 128, ALL[:2]),
    "+ value embeddings": (MODERN, 128, ALL[:1]),
    "+ smeared embedding = recipe": (MODERN, 128, ()),
}
BASELINE, RECIPE = list(RUNGS)[0], list(RUNGS)[-1]


@dataclass
class RecipeConfig(Config):
    dataset: str = key("corpus_bytes", "folder of token files: one under data/, or a path")
    out_dir: str = key("out-recipe", "folder for the runs")
    size: str = key(
        "cpu", "cpu: 3.2M parameters, 8,192 tokens an iteration; gpu: 124M, 131,072", choices=tuple(SIZES)
    )
    iters: int = key(600, "iterations of a whole run", low=20)
    baseline_lrs: str = key(
        "5e-4,1e-3,2e-3", "learning rates to search for the baseline, with commas between them"
    )
    recipe_lrs: str = key("2e-3,4e-3,8e-3", "learning rates to search for the recipe")
    fractions: str = key("0.2,0.33,0.45", "parts of the tokens that the recipe is also run with")
    seeds: str = key("1337,1,2,3,4", "seeds of the last comparison; the first is that of everything else")
    jobs: int = key(1, "runs at the same time, of one thread each if there are several", low=1)
    flags: str = key("", "more flags for all runs, with spaces between them, such as --compile=False")
    json: str = key("", "file to write the figures to")
    plot: str = key("", "PNG file to draw the curves to (pip install matplotlib)")


@dataclass(frozen=True)
class Run:
    rung: str
    lr: float
    iters: int
    seed: int

    def folder(self, cfg):
        return os.path.join(
            cfg.out_dir, f"{list(RUNGS).index(self.rung)}-lr{self.lr:g}-{self.iters}-seed{self.seed}"
        )


def leave_out(parts):
    """Takes parts of arch="modern" out of the model module of this process."""
    import model

    def init_weights(self, whole=model.ModernGPT.init_weights):
        whole(self)
        if "head" in parts:
            self.lm_head.weight = self.transformer.wte.weight  # tied, as GPT-2's
        if "smear" in parts:
            self.smear.requires_grad_(False)  # stays at 0
        if "value table" in parts:
            self.transformer.wve.weight.requires_grad_(False)
        for block in self.transformer.h:
            block.attn.adds_token_v &= "value table" not in parts
            if "embedding" in parts:
                block.x_mix.requires_grad_(False)  # stays at 1, 0
            if "values" in parts:
                block.attn.v_mix = torch.nn.Parameter(torch.tensor([1.0, 0.0]), requires_grad=False)

    model.ModernGPT.init_weights = init_weights
    if "cap" in parts:
        model.ModernGPT.softcap = 1e4  # far above any logit


def train(cfg, run):
    """Makes a run, unless it is there already. Raises RuntimeError with what train.py printed if that
    fails."""
    flags, head, parts = RUNGS[run.rung]
    width = 256 if cfg.size == "cpu" else 768
    argv = [*SIZES[cfg.size].split(), *flags.split(), f"--n_head={width // head}", f"--dataset={cfg.dataset}"]
    argv += [f"--learning_rate={run.lr}", f"--min_lr={0 if 'wsd' in flags else run.lr / 10}", "--bias=False"]
    argv += [f"--max_iters={run.iters}", f"--lr_decay_iters={run.iters}", f"--warmup_iters={run.iters // 20}"]
    argv += [
        "--beta2=0.95",
        f"--eval_interval={max(1, cfg.iters // 15)}",
        "--eval_iters=16",
    ]
    argv += [
        f"--checkpoint_interval={run.iters}",
        "--log_interval=10",
        f"--seed={run.seed}",
        "--init_from=auto",
    ]
    argv += [*cfg.flags.split(), f"--out_dir={run.folder(cfg)}"]
    script = os.path.join(HERE, "..", "train.py")
    start = f"import runpy, sys; sys.path.insert(0, {HERE!r}); import recipe; recipe.leave_out({parts!r}); "
    start += f"runpy.run_path({script!r}, run_name='__main__')"
    env = os.environ | (dict(OMP_NUM_THREADS="1") if cfg.jobs > 1 else {})
    if figures(cfg, run) is None:
        done = subprocess.run([sys.executable, "-c", start, *argv], env=env, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{shlex.join(argv)}\n{done.stdout}{done.stderr}")
    print(
        f"{run.rung}, lr {run.lr:g}, {run.iters} iterations, seed {run.seed}: {figures(cfg, run)['loss']:.4f}"
    )
    return run


def figures(cfg, run):
    """Returns what metrics.jsonl says of a complete run: its curve of (tokens, validation loss), the last
    loss, and seconds per iteration; None if it is not complete."""
    path = os.path.join(run.folder(cfg), "metrics.jsonl")
    if not os.path.exists(path):
        return None
    with open(path, encoding="utf-8") as f:
        lines = [json.loads(line) for line in f if line.endswith("\n")]
    evals = [line for line in lines if line["kind"] == "eval"]
    timed = [line for line in lines if line["kind"] == "iter"]
    if not evals or evals[-1]["iter"] != run.iters:
        return None
    per_iter = timed[-1]["tokens"] / run.iters
    curve = [(int(line["iter"] * per_iter), line["val_loss"]) for line in evals]
    return dict(
        curve=curve, loss=evals[-1]["val_loss"], seconds=statistics.median(line["dt"] for line in timed[1:])
    )


def tokens_to(curve, loss):
    """Returns after how many tokens a curve reaches a loss, linearly between its points; None if it does
    not."""
    for (a, before), (b, after) in zip(curve, curve[1:], strict=False):
        if after <= loss:
            return a + (b - a) * (before - loss) / (before - after)
    return None


def numbers(text, kind):
    return [kind(x) for x in text.split(",") if x]


def all_runs(cfg, runs):
    """Makes runs, cfg.jobs at a time, and returns their figures."""
    with ThreadPoolExecutor(cfg.jobs) as pool:
        list(pool.map(lambda run: train(cfg, run), runs))
    return {run: figures(cfg, run) for run in runs}


def draw(path, ladder):
    """Draws the curves of the rungs to a PNG file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    axes = pyplot.figure(figsize=(9, 5.5), layout="constrained").subplots()
    for run, result in ladder.items():
        tokens, losses = zip(*result["curve"][1:], strict=True)
        axes.plot([t / 1e6 for t in tokens], losses, marker=".", label=f"{run.rung} (lr {run.lr:g})")
    axes.set(xlabel="million tokens", ylabel="validation loss, nats per token", yscale="log")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    axes.figure.savefig(path, dpi=110)


def main(argv):
    cfg = from_command_line(RecipeConfig, __doc__, argv)
    seeds, fractions = numbers(cfg.seeds, int), numbers(cfg.fractions, float)
    lrs = {BASELINE: numbers(cfg.baseline_lrs, float), RECIPE: numbers(cfg.recipe_lrs, float)}
    search = all_runs(cfg, [Run(rung, lr, cfg.iters, seeds[0]) for rung in lrs for lr in lrs[rung]])
    best = {
        rung: min((r for r in search if r.rung == rung), key=lambda r: search[r]["loss"]).lr for rung in lrs
    }
    print(f"\nlearning rates: {best}\n")

    rate = {rung: best[RECIPE if "muon" in flags else BASELINE] for rung, (flags, _, _) in RUNGS.items()}
    ladder = all_runs(cfg, [Run(rung, rate[rung], cfg.iters, seeds[0]) for rung in RUNGS])
    parts = {fraction: round(fraction * cfg.iters) for fraction in fractions}
    final = all_runs(
        cfg,
        [Run(rung, best[rung], cfg.iters, seed) for seed in seeds for rung in (BASELINE, RECIPE)]
        + [Run(RECIPE, best[RECIPE], iters, seed) for seed in seeds for iters in parts.values()],
    )

    goal = statistics.mean(result["loss"] for run, result in final.items() if run.rung == BASELINE)
    base = ladder[Run(BASELINE, best[BASELINE], cfg.iters, seeds[0])]
    print(f"\nthe baseline's final loss, mean of {len(seeds)} seeds: {goal:.4f}\n")
    print("| rung | lr | val loss | tokens to the baseline's | ms an iteration |\n|---|---|---|---|---|")
    for run, result in ladder.items():
        tokens = tokens_to(result["curve"], base["loss"])
        share = f"{tokens / base['curve'][-1][0]:.2f}" if tokens else "not reached"
        print(
            f"| {run.rung} | {run.lr:g} | {result['loss']:.4f} | {share} | {1000 * result['seconds']:.0f} |"
        )
    print("\n| run | tokens of the baseline's | val loss, mean and each seed | time of the baseline's |")
    print("|---|---|---|---|")
    for rung, iters in [(BASELINE, cfg.iters), (RECIPE, cfg.iters), *((RECIPE, n) for n in parts.values())]:
        results = [result for run, result in final.items() if (run.rung, run.iters) == (rung, iters)]
        losses = [result["loss"] for result in results]
        time = (
            statistics.median(result["seconds"] for result in results) * iters / (base["seconds"] * cfg.iters)
        )
        each = " ".join(f"{loss:.4f}" for loss in losses)
        print(f"| {rung} | {iters / cfg.iters:.2f} | {statistics.mean(losses):.4f}: {each} | {time:.2f} |")

    if cfg.plot:
        draw(cfg.plot, ladder)
    if cfg.json:
        runs = {run: result for part in (search, ladder, final) for run, result in part.items()}
        with open(cfg.json, "w", encoding="utf-8") as f:
            machine = dict(python=platform.python_version(), torch=torch.__version__, cores=os.cpu_count())
            listed = [dataclasses.asdict(run) | result for run, result in runs.items()]
            json.dump(dict(command=shlex.join(sys.argv), machine=machine, runs=listed), f, indent=1)


if __name__ == "__main__":
    run_script(main)
