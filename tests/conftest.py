"""
What the tests share: tiny data, and two ways to run a script. `run` calls its main in this process, which
has imported torch already; `spawn` starts a process of its own, for what only a process can show.
"""

import functools
import gc
import importlib
import inspect
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

from configurator import run_script
from sologpt import hardware, shards

ROOT = Path(__file__).parent.parent
os.environ["no_proxy"] = "127.0.0.1"  # the tests' own servers
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in a script's `&`, and then in all processes
    signal.signal(signal.SIGINT, signal.default_int_handler)
# enough for models of this size, and the sums are the same each time
ENV = os.environ | {"OMP_NUM_THREADS": "1"}
torch.set_num_threads(1)
# a busy machine is no reason to fail
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")
# what a test's source says if it starts processes or compiles
SLOW = re.compile(r"spawn|subprocess|start\(|interrupt\(|killed_|prepare|compile=True|torch\.compile|ENV\b")
TEXT = "pack my box with jugs now. " * 400  # 27 letters: in windows of 16, each comes at every position


def pytest_collection_modifyitems(items):
    for item in items:
        if SLOW.search(inspect.getsource(item.function)):
            item.add_marker("slow")


@pytest.fixture(autouse=True)
def the_same_start_for_all(monkeypatch):
    """Whatever tests came before."""
    monkeypatch.chdir(ROOT)
    torch.manual_seed(1)


class Outcome(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def check(outcome, status):
    """Asserts the exit status, and that nobody is shown a traceback or a warning of Python's."""
    assert outcome.returncode == status, outcome.stdout + outcome.stderr
    assert "Traceback" not in outcome.stderr and "Warning" not in outcome.stderr, outcome.stderr
    return outcome


def text_file(content=b""):
    return io.TextIOWrapper(io.BytesIO(content), encoding="utf-8", write_through=True)


def text_of(file):
    file.flush()
    return file.buffer.getvalue().decode()


def metrics(folder, kind):
    """Returns the rows of a kind in the metrics.jsonl of a run's folder."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == kind]


def run_here(cwd, script, *argv, status=0, input=b"", page=False, **env):
    """Runs a script's main as its last line does, in this process and the folder cwd, with these bytes on
    stdin and these variables in the environment; returns what a process would have given. page: a run of
    train.py writes its page, which takes longer than a tiny run; else plotly is not there."""
    main = importlib.import_module(script.removesuffix(".py")).main
    stdout, stderr = text_file(), text_file()
    code = 0
    gc.collect()
    gc.freeze()  # else each evaluation's gc.collect() looks through all that the tests have imported
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(cwd)
        patch.setattr(sys, "argv", [script])
        for name, file in (("stdin", text_file(input)), ("stdout", stdout), ("stderr", stderr)):
            patch.setattr(sys, name, file)
        for name, value in env.items():
            patch.setenv(name, value)
        if script == "train.py" and not page:
            patch.setitem(sys.modules, "plotly", None)
        try:
            run_script(main, [str(arg) for arg in argv])
        except SystemExit as e:
            code = e.code or 0
    if "--compile=True" in argv:
        torch._dynamo.reset()  # as a new process would begin
        hardware.keep_activations(1.0)
    return check(Outcome(code, text_of(stdout), text_of(stderr)), status)


@pytest.fixture
def run(tmp_path):
    """run('train.py', '--key=value', ...) is run_here in tmp_path."""
    return functools.partial(run_here, tmp_path)


@pytest.fixture
def spawn(tmp_path):
    """spawn('train.py', '--key=value', ...) is run in a process of its own."""

    def spawn(script, *argv, status=0, cwd=tmp_path, input=None, **env):
        command = [sys.executable, "-W", "error::UserWarning", str(ROOT / script), *map(str, argv)]
        process = subprocess.run(command, cwd=cwd, capture_output=True, input=input, env=ENV | env)
        return check(Outcome(process.returncode, process.stdout.decode(), process.stderr.decode()), status)

    return spawn


def write_byte_data(tmp_path):
    """Writes data/toy, byte tokens in our own format, in three train shards: a text small enough to be
    learned."""
    folder = tmp_path / "data" / "toy"
    folder.mkdir(parents=True)
    ids = np.frombuffer(TEXT.encode(), dtype=np.uint8).astype(np.uint16)
    for number, part in enumerate(np.array_split(ids, 3), 1):
        shards.write_shard(folder / f"fineweb_train_{number:06d}.bin", part)
    shards.write_shard(folder / "fineweb_val_000000.bin", ids[:1000])
    (folder / "meta.json").write_text('{"encoding": "bytes", "vocab_size": 257, "eot_token": 256}')
    return folder


@pytest.fixture
def exact_matmuls():
    """No TF32: fp32 is compared with fp32. Afterwards matmuls and attention are as they were, whatever a
    script has set."""
    precision = torch.get_float32_matmul_precision()
    cudnn = torch.backends.cuda.cudnn_sdp_enabled()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(precision)
    torch.backends.cuda.enable_cudnn_sdp(cudnn)


@pytest.fixture
def byte_data(tmp_path):
    return write_byte_data(tmp_path)


TINY = """
--dataset=toy --device=cpu --compile=False --n_layer=2 --n_head=2 --n_embd=32 --block_size=16 --batch_size=4
--gradient_accumulation_steps=2 --warmup_iters=2 --lr_decay_iters=12 --max_iters=12 --eval_interval=6
--eval_iters=1 --learning_rate=1e-2
"""


@pytest.fixture
def tiny():
    """Arguments of a twelve-iteration run of a tiny model on byte_data; later ones win."""
    return TINY.split()


@pytest.fixture(scope="session")
def trained_once(tmp_path_factory):
    """A folder with data/toy and, in out/, a run that has learned it."""
    folder = tmp_path_factory.mktemp("trained")
    write_byte_data(folder)
    run_here(
        folder, "train.py", *TINY.split(), "--max_iters=150", "--lr_decay_iters=150", "--eval_interval=150"
    )
    return folder


@pytest.fixture
def trained(trained_once, tmp_path, run):
    """run, in a copy of trained_once."""
    shutil.copytree(trained_once, tmp_path, dirs_exist_ok=True)
    return run
