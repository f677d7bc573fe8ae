"""
Figures in wandb, trackio and TensorBoard: what was logged is read back from the files that each keeps without
a network or an account, and one that fails ends no run.
Run: pytest tests/test_tracker.py
"""

import glob
import importlib.util
import json
import shutil
import sqlite3
import sys
import types

import pytest
from conftest import metrics

from configurator import configure
from sologpt.tracker import Tracker
from train import TrainConfig


def needs(package):
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"pip install {package}")


def expected(out_dir):
    """Returns the rows of metrics.jsonl that go to a tracker, in order, as (iteration, {name: number})."""
    rows = [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]
    found = []
    for row in rows:
        if row["kind"] in ("iter", "eval"):
            figures = {name: value for name, value in row.items() if name not in ("kind", "iter")}
            found.append((row["iter"], figures))
    assert len(found) == 3 + 12
    return found


def by_slash(figures):
    """Returns {name: number} under the names of nanoGPT's: train/loss, val/loss; what is unknown left out."""
    names = dict(train_loss="train/loss", val_loss="val/loss", val_bpb="val/bpb")
    return {names.get(name, name): value for name, value in figures.items() if value is not None}


def wandb_records(path):
    """Yields the records of a .wandb file: LevelDB's log format behind 7 bytes of header."""
    with open(path, "rb") as f:
        raw = f.read()
    position, record = 7, b""
    while position + 7 <= len(raw):
        left = 2**15 - position % 2**15
        if left < 7:  # a block's end holds no header
            position += left
            continue
        length, kind = int.from_bytes(raw[position + 4 : position + 6], "little"), raw[position + 6]
        record += raw[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or a last part
            yield record
            record = b""


@needs("wandb")
def test_wandb_has_what_the_log_has(spawn, byte_data, tiny, tmp_path):
    flags = ["--wandb_log=True", "--wandb_project=p", "--wandb_run_name=r"]
    spawn("train.py", *tiny, *flags, WANDB_MODE="offline", WANDB_SILENT="true")
    from wandb.proto import wandb_internal_pb2

    found = []
    for raw in wandb_records(glob.glob(f"{tmp_path}/wandb/offline-run-*/*.wandb")[0]):
        record = wandb_internal_pb2.Record.FromString(raw)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            assert (record.run.project, record.run.display_name) == ("p", "r")
        if kind == "history":
            items = {"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
            found.append({name: json.loads(value) for name, value in items.items()})
    assert len(found) == 15
    for row, (iteration, figures) in zip(found, expected(tmp_path / "out"), strict=True):
        assert row["iter"] == iteration
        assert {name: row[name] for name in by_slash(figures)} == by_slash(figures)


@pytest.mark.parametrize("name, failed", [("wandb", [dict(exit_code=1)]), ("trackio", [{}])])
def test_a_run_that_ends_with_an_error_is_not_finished_in_wandb(
    run, byte_data, tiny, monkeypatch, name, failed
):
    finished = []
    axes = []
    module = types.SimpleNamespace(
        init=lambda **given: None,
        define_metric=lambda name, step_metric: axes.append((name, step_metric)),
        log=lambda figures, step=None: None,
        finish=lambda **given: finished.append(given),
    )
    monkeypatch.setitem(sys.modules, name, module)
    flags = ["--learning_rate=1e30", "--grad_clip=0", "--max_bad_steps=2", f"--tracker={name}"]
    out = run("train.py", *tiny, *flags, status=1)
    assert finished == failed and "Try a lower --learning_rate or --grad_clip=1.0\n" in out.stderr
    run("train.py", *tiny, f"--tracker={name}")
    assert finished[1:] == [{}] and axes == dict(wandb=[("*", "iter")] * 2, trackio=[])[name]


@needs("trackio")
def test_trackio_has_what_the_log_has(spawn, byte_data, tiny, tmp_path):
    spawn("train.py", *tiny, "--tracker=trackio", "--wandb_project=p", TRACKIO_DIR=str(tmp_path / "tracked"))
    with sqlite3.connect(tmp_path / "tracked/p.db") as database:
        rows = [json.loads(row) for (row,) in database.execute("select metrics from metrics order by id")]
        steps = [step for (step,) in database.execute("select step from metrics order by id")]
    assert steps == [row["iter"] for row in rows]
    for row, (iteration, figures) in zip(rows, expected(tmp_path / "out"), strict=True):
        assert row["iter"] == iteration
        assert {name: row[name] for name in by_slash(figures)} == pytest.approx(by_slash(figures))


@needs("tensorboard")
def test_tensorboard_has_what_the_log_has_and_a_resumed_run_no_iteration_twice(
    spawn, byte_data, tiny, tmp_path
):
    spawn("train.py", *tiny, "--tracker=tensorboard", "--max_iters=8")
    spawn("train.py", *tiny, "--tracker=tensorboard", "--init_from=resume")
    # back again, where the first run ended with an evaluation that is not repeated
    shutil.move(tmp_path / "out/ckpt_prev.pt", tmp_path / "out/ckpt.pt")
    argv = [*tiny, "--tracker=tensorboard", "--init_from=resume", "--eval_interval=5"]
    assert "at iteration 8," in spawn("train.py", *argv).stdout
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "out/tensorboard")).Reload()
    tags = [("loss", "iter", "loss"), ("val/loss", "eval", "val_loss"), ("lr", "iter", "lr")]
    tags += [("tokens", "iter", "tokens"), ("elapsed", "iter", "elapsed")]  # evaluations have these too
    for tag, kind, name in tags:
        rows = metrics(tmp_path / "out", kind)
        there = {event.step: event.value for event in events.Scalars(tag)}
        assert len(there) == len(events.Scalars(tag))
        assert there == pytest.approx({row["iter"]: row[name] for row in rows})


def test_a_tracker_that_is_not_installed_is_a_warning(run, byte_data, tiny, tmp_path, monkeypatch):
    for name in ("wandb", "trackio"):
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not there
        out = run("train.py", *tiny, f"--tracker={name}", f"--out_dir={name}")
        assert f"warning: no {name} (" in out.stderr and f"pip install {name}" in out.stderr
        assert out.stderr.count("warning") == 1
        assert len(metrics(tmp_path / name, "iter")) == 12


@pytest.mark.parametrize("failing", ["init", "log", "finish"])
def test_a_tracker_that_fails_is_one_warning_and_the_run_goes_on(
    run, byte_data, tiny, tmp_path, monkeypatch, failing
):
    calls = []

    def function(name):
        def call(*args, **kwargs):
            calls.append(name)
            if name == failing and calls.count(name) == 1:
                raise OSError(28, "No space left on device")

        return call

    names = ("init", "define_metric", "log", "finish")
    module = types.SimpleNamespace(**{name: function(name) for name in names})
    monkeypatch.setitem(sys.modules, "wandb", module)
    out = run("train.py", *tiny, "--tracker=wandb")
    assert out.stderr.count("warning: wandb cannot be ") == 1 and "No space left on device" in out.stderr
    assert len(metrics(tmp_path / "out", "iter")) == 12
    assert calls.count(failing) == 1  # nothing is tried again
    assert calls.count("log") == dict(init=0, log=1, finish=15)[failing]


def test_without_a_tracker_nothing_is_imported():
    tracker = Tracker(configure(TrainConfig, []), 0)
    tracker.send(0, dict(loss=1.0))
    tracker.close()
    assert tracker.sink is None
