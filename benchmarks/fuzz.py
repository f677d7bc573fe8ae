"""
What is read from outside, altered at random: checkpoints, config files and command lines.

    python benchmarks/fuzz.py [--quick] [--seed=1]      1,000 states, 6,060 configurations; 5 minutes

A state is altered in one place, by another type, shape or number, or by something missing. train.py must
refuse it in one line, or the part must not matter: then the resumed run ends bit for bit as it would have.
"""

import argparse
import copy
import dataclasses
import functools
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.faults import ENV, ROOT, RUN, finish, prepare, same
from configurator import ConfigError, configure
from prepare_fineweb import PrepareConfig
from sample import SampleConfig
from sologpt import hardware
from sologpt.errors import UserError
from train import TrainConfig, micro_batches, micro_step, set_up, update

# -----------------------------------------------------------------------------
# states

WRONG = [None, True, -1, 3, 2.5, float("nan"), 10**30, "", "text", "\0", [], [1], {}, {"a": 1}]
WRONG += [-1.0, 0, float("inf"), 10**400]
WRONG += [
    torch.zeros(0),
    torch.zeros(3),
    torch.zeros(2, 2, dtype=torch.int64),
    torch.zeros(()),
    torch.ones(1),
]
# parts that say what a run was like, and do not decide how it goes on: numbers of the right type
FREE = {"config", "best_val_loss", "tokens_seen", "other_tokens", "pretrained", "seconds", "bad_steps"}
FREE |= {"bad_in_row", "iter_num"}


def places(state, path=()):
    """Yields the paths of all parts of nested dicts and lists."""
    items = state.items() if isinstance(state, dict) else enumerate(state)
    for key, value in items:
        yield (*path, key)
        if isinstance(value, (dict, list)):
            yield from places(value, (*path, key))


def altered(state, path, rng):
    """Returns a copy of a state whose part at path is gone or another thing, and what was done."""
    state = copy.deepcopy(state)
    holder = state
    for key in path[:-1]:
        holder = holder[key]
    if rng.random() < 0.2:
        del holder[path[-1]]
        return state, "gone"
    holder[path[-1]] = rng.choice(WRONG)
    return state, repr(holder[path[-1]])


def next_losses(argv):
    """Returns the losses of the next two iterations of a resumed run, in this process."""
    cfg = configure(TrainConfig, argv)
    machine = hardware.find_machine(cfg)
    run = set_up(cfg, machine)
    batches = micro_batches(run.train_data, run.progress.iter_num, cfg, machine.device)
    losses = []
    for _ in range(2):
        losses.append(micro_step(run.model, next(batches), run.scaler, machine, 1))
        update(run.model, run.optimizers, run.scaler, cfg.grad_clip)
    return losses + [run.progress.iter_num]


def fuzz_states(folder, times, rng):
    """Returns how many states were altered, refused, and read as something that they are not."""
    refused = wrong = 0
    for optimizer in ("adamw", "muon"):
        argv = [*RUN[:-1], f"--optimizer={optimizer}", "--init_from=resume", f"--out_dir={optimizer}"]
        finish(folder, optimizer, f"--optimizer={optimizer}", "--max_iters=10")
        path = folder / optimizer / "ckpt.pt"
        state = torch.load(path, weights_only=True)
        (folder / optimizer / "ckpt_prev.pt").unlink()
        expected = next_losses(argv)
        found = list(places(state))
        for _ in range(times // 2):
            place = rng.choice(found)
            if rng.random() < 0.5:  # most places are in the moments: give the others their share
                place = rng.choice([other for other in found if len(other) <= 2])
            other, how = altered(state, place, rng)
            torch.save(other, path)
            try:
                good = same(next_losses(argv), expected) or place[0] in FREE
            except (UserError, OSError) as e:
                refused += 1
                good = str(e).strip() != ""
            except Exception as e:
                good = False
                how += f": {e!r}"
            if not good:
                wrong += 1
                print(f"LOST: {place} = {how}", file=sys.stderr)
    return times, refused, wrong


# -----------------------------------------------------------------------------
# configurations

CONFIGS = {"train.py": TrainConfig, "sample.py": SampleConfig, "prepare_fineweb.py": PrepareConfig}
NAMES = {script: [field.name for field in dataclasses.fields(cls)] for script, cls in CONFIGS.items()}
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
VALUES = st.one_of(
    TEXT,
    st.sampled_from(
        ["True", "False", "0", "-1", "1e-3", "1e999", "nan", "0x10", "''", "'", "None", "cpu", "1_000"]
    ),
    st.integers().map(str),
    st.floats().map(str),
)


def arguments(script):
    """A strategy: argument lists for a script, some right, most wrong in one way or several."""
    setting = st.builds("--{}={}".format, st.sampled_from(NAMES[script]), VALUES)
    bare = st.sampled_from(NAMES[script]).flatmap(
        lambda name: st.sampled_from([f"--{name}", f"--no-{name}", name])
    )
    return st.lists(
        st.one_of(setting, setting, bare, TEXT.filter(lambda t: t not in ("-h", "--help"))), max_size=6
    )


def sources(script):
    """A strategy: config files for a script: assignments of all kinds of values, and text that is no Python
    at all."""
    plain = st.one_of(st.integers(), st.floats(), st.booleans(), st.none(), TEXT)
    value = st.one_of(
        st.recursive(plain, st.lists, max_leaves=3).map(repr),
        st.sampled_from(
            [*NAMES[script], "1 / 0", "open", "lambda: 0", "(1, 2)", "1e3", "10 ** 5000", "__name__"]
        ),
        VALUES,
    )
    line = st.builds("{} = {}".format, st.sampled_from([*NAMES[script], "_x", "learning_rat"]), value)
    noise = st.one_of(
        TEXT, st.sampled_from(["import math", "def f(: pass", "(" * 300, "raise SystemExit", "\t x = 1"])
    )
    return st.lists(st.one_of(line, line, line, noise), max_size=6).map("\n".join)


def check(cls, argv):
    """Raises AssertionError if configure lets a wrong value through, and whatever else it raises but
    ConfigError."""
    try:
        config = configure(cls, argv)
    except ConfigError as e:
        assert str(e).strip()
        return
    for field in dataclasses.fields(cls):
        value, limits = getattr(config, field.name), field.metadata
        assert type(value) is field.type, field.name
        assert not limits["choices"] or value in limits["choices"], field.name
        assert limits["low"] is None or value >= limits["low"], field.name
        assert limits["below"] is None or value < limits["below"], field.name
        assert field.type is not float or abs(value) < float("inf"), field.name
    for name, text in (argument[2:].split("=", 1) for argument in argv if argument.startswith("--")):
        last = [argument for argument in argv if argument.startswith(f"--{name}=")][-1]
        if (
            cls.__dataclass_fields__[name].type in (int, float)
            and f"--{name}={text}" == last
            and argv[-1] == last
        ):
            assert getattr(config, name) == cls.__dataclass_fields__[name].type(eval(text, {}, {})), argv


def for_each(strategy, times, one):
    """Calls one() with that many examples of a strategy. The first that raises is made as small as can be and
    shown."""

    @settings(max_examples=times, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(strategy)
    def call(example):
        one(example)

    call()


def fuzz_configure(times, folder):
    """Reads fuzzed argument lists and config files in this process; returns how many. Raises at the first
    fault."""
    tried = 0

    def read(cls, argv):
        nonlocal tried
        tried += 1
        check(cls, argv)

    def read_file(cls, source):
        (folder / "fuzzed.py").write_text(source, encoding="utf-8", newline="")
        read(cls, [str(folder / "fuzzed.py")])

    for script, cls in CONFIGS.items():
        for_each(arguments(script), times // 6, functools.partial(read, cls))
        for_each(sources(script), times // 6, functools.partial(read_file, cls))
    return tried


def fuzz_scripts(times, folder):
    """Runs the scripts with fuzzed arguments, which all end at the latest at a folder that is not there.
    Returns how often, and how often there was a traceback or another exit status than 1 or 2."""
    tried = wrong = 0
    last = {
        "train.py": "--dataset=nowhere",
        "sample.py": "--out_dir=nowhere",
        "prepare_fineweb.py": "--input=nowhere",
    }

    def run(script, argv):
        nonlocal tried, wrong
        argv = [argument for argument in argv if "\0" not in argument] + [last[script]]
        command = [sys.executable, str(ROOT / script), *argv]
        process = subprocess.run(command, cwd=folder, env=ENV, capture_output=True, text=True)
        bad = process.returncode not in (1, 2) or "Traceback" in process.stderr or not process.stderr.strip()
        tried, wrong = tried + 1, wrong + bad
        if bad:
            print(f"LOST: {argv} ends with {process.returncode}: {process.stderr}", file=sys.stderr)

    for script in CONFIGS:
        for_each(arguments(script), times // 3, functools.partial(run, script))
    return tried, wrong


# -----------------------------------------------------------------------------

if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a tenth of the cases")
    parser.add_argument("--seed", type=int, default=1, help="of the altered places in states")
    options = parser.parse_args()
    share = 10 if options.quick else 1
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        prepare(folder)
        os.chdir(folder)
        print("| what was altered | times | lost |\n|---|---|---|", flush=True)
        tried, refused, wrong = fuzz_states(folder, 1000 // share, random.Random(options.seed))
        print(f"| one part of ckpt.pt; refused {refused} times, else it did not matter | {tried} | {wrong} |")
        tried = fuzz_configure(6000 // share, folder)
        print(f"| command lines and config files | {tried} | 0 |", flush=True)
        tried, wrong = fuzz_scripts(60 // share, folder)
        print(f"| command lines, a process each | {tried} | {wrong} |", flush=True)
