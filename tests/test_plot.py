"""
plot.py and what it stands on: figures against ones worked out by hand, damaged and hostile files, and the
page in a real browser (Debian's chromium with chromedriver; skipped without them).
Run: pytest tests/test_plot.py
"""

import base64
import contextlib
import functools
import html
import io
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import xml.etree.ElementTree

import numpy as np
import pytest
from conftest import ENV, ROOT

from plot import PlotConfig, split_arguments
from sologpt.figures import draw_panel, terminal_text
from sologpt.files import newest
from sologpt.history import POINTS, Series, Sparse, printable, read_history
from sologpt.page import page_of_run, results, traces
from sologpt.panels import make_panels, references, short, smoothed

CONFIG = dict(batch_size=2, gradient_accumulation_steps=5, block_size=10, learning_rate=0.1, max_iters=8)


def line(kind, iteration, **figures):
    return json.dumps(dict(kind=kind, iter=iteration) | figures)


def write(folder, lines):
    """Writes lines, text or bytes, as the metrics.jsonl of a run. Returns the folder's path as text."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [text.encode() if isinstance(text, str) else text for text in lines]
    (folder / "new").write_bytes(b"\n".join(lines) + b"\n")
    os.replace(folder / "new", folder / "metrics.jsonl")  # whole, whenever somebody looks
    return str(folder)


def falling(iterations, **config):
    """The lines of a run whose loss falls from 10 to 5 in a straight line."""
    lines = [line("config", 0, config=CONFIG | config, torch="2.13.0", memory=None)]
    for i in range(iterations):
        loss = 10 - 5 * i / iterations
        if i % 10 == 0:
            lines.append(line("eval", i, train_loss=loss, val_loss=loss + 0.5, val_bpb=loss / 4))
        figures = dict(norm=1.0 + i, lr=0.1, tokens=100 * (i + 1), peak_memory=3 * 10**9, mfu=40.0)
        lines.append(line("iter", i, loss=loss, dt=0.5, elapsed=0.6 * (i + 1), **figures))
    return lines


EVENTS = [
    line("resume", 20, config=CONFIG, torch="2.13.0"),
    line("checkpoint", 10, best_val_loss=9.0),
    line("checkpoint", 20, best_val_loss=8.0),
    line("bad_step", 15, loss=None, norm=None, in_row=1),
    line("spike", 25, loss=30.5, norm=99.0, first_sequence=250, last_sequence=259),
    line("smaller_batch", 12, batch_size=1, gradient_accumulation_steps=10),
]
DONE = line("done", 60, seconds=3600.0, tokens=6000, tokens_per_s=190.0, val_loss=6.3)


# -----------------------------------------------------------------------------
# reading


def test_lines_stand_where_their_weights_were(tmp_path):
    """100 tokens an iteration; a line every 3 iterations of 2 s each, without the evaluation in between."""
    lines = [
        line("config", 0, config=CONFIG),
        line("eval", 0, train_loss=5.0, val_loss=5.5),
        line("iter", 0, loss=4.0, dt=4.0, tokens=100),
        line("iter", 3, loss=3.0, dt=2.0, tokens=400),
        line("eval", 5, train_loss=2.0, val_loss=2.5),
        line("checkpoint", 5, best_val_loss=2.5),
        line("iter", 6, loss=1.0, dt=3.0, tokens=700),
    ]
    history = read_history(write(tmp_path / "run", lines))
    assert history.iters.mean("iterations").tolist() == [0, 3, 6]
    assert history.iters.mean("tokens").tolist() == [0, 300, 600]
    assert history.iters.mean("hours") * 3600 == pytest.approx([4, 10, 19])
    assert history.iters.mean("tokens_per_s") == pytest.approx([25, 50, 100 / 3])
    assert history.evals.mean("tokens").tolist() == [0, 500]
    assert history.evals.mean("hours") * 3600 == pytest.approx([0, 10 + 2])
    assert (history.best_val_loss, history.best_iter, history.exact_hours) == (2.5, 5, False)
    (checkpoint,) = history.events["checkpoint"]
    assert (checkpoint.tokens, checkpoint.text) == (500, "best val loss 2.5")
    assert history.skipped == 0


def test_elapsed_counts_where_a_line_has_it(tmp_path):
    lines = [
        line("config", 0, config=CONFIG),
        line("iter", 0, loss=4.0, dt=1.0, tokens=100, elapsed=360.0),
        line("eval", 1, val_loss=3.0, elapsed=720.0),
    ]
    history = read_history(write(tmp_path / "run", lines))
    assert history.iters.mean("hours").tolist() == [0.1] and history.evals.mean("hours").tolist() == [0.2]
    assert history.exact_hours


def test_a_run_that_began_elsewhere_begins_where_it_was_resumed(tmp_path):
    """As a longer run from before_cooldown.pt does, in a folder of its own."""
    lines = [line("resume", 50, config=CONFIG), line("iter", 50, loss=4.0, dt=2.0)]
    history = read_history(write(tmp_path / "run", lines))
    assert history.iters.mean("tokens").tolist() == [5000]
    assert history.iters.mean("hours") * 3600 == pytest.approx([2])


def test_an_old_file_without_a_config_is_drawn_too(tmp_path):
    lines = [line("iter", i, loss=4.0 - i, dt=2.0, tokens=100 * (i + 1)) for i in range(3)]
    history = read_history(write(tmp_path / "run", lines))
    assert history.iters.mean("tokens").tolist() == [0, 100, 200]
    assert history.iters.mean("tokens_per_s").tolist() == [50, 50, 50]


def test_thinned_series_keep_means_and_extremes():
    rng = np.random.default_rng(0)
    table = rng.normal(size=(3 * POINTS + 777, 2))
    table[rng.random(table.shape) < 0.1] = math.nan
    series = Series(("a", "b"))
    for row in table.tolist():
        series.add(row)
    series.finish()
    assert series.stride == 4 and POINTS / 2 < len(series) <= POINTS
    for group in range(len(series)):
        rows = table[4 * group : 4 * group + 4, 1]
        rows = rows[np.isfinite(rows)]
        if len(rows):
            assert series.mean("b")[group] == pytest.approx(rows.mean())
            assert (series.low("b")[group], series.high("b")[group]) == (rows.min(), rows.max())
        else:
            assert math.isnan(series.mean("b")[group])
    assert series.groups[1].sum() == np.isfinite(table).sum()


def test_thinned_series_do_not_depend_on_when_they_are_thinned():
    """40,000 rows pass through several chunks and many halvings."""
    values = np.random.default_rng(1).normal(size=40000)
    series = Series(("a",))
    for value in values:
        series.add([value])
    series.finish()
    expected = values[: len(values) // series.stride * series.stride].reshape(-1, series.stride)
    assert series.mean("a")[: len(expected)] == pytest.approx(expected.mean(axis=1))
    assert series.high("a").max() == values.max() and series.low("a").min() == values.min()


def test_few_of_many_events_are_kept_evenly():
    sparse = Sparse(limit=4)
    for i in range(22):
        sparse.append(i)
    assert list(sparse) == [0, 8, 16, 21] and sparse.count == 22


DAMAGE = [
    b'{"kind": "iter", "iter": 7, "loss": 3.1, "dt"',  # cut short
    b"\x00\xff\xfe\x80 \xc3\x28",
    b"",
    b"[1, 2]",
    b"null",
    b'"iter"',
    b'{"kind": "iter", "iter": 3, "loss": 1.0}{"kind": "iter", "iter": 4, "loss": 1.0}',  # two in one
    b'{"kind": "iter"}',
    b'{"iter": 3}',
    b'{"kind": "iter", "iter": "3", "loss": 1.0}',
    b'{"kind": "iter", "iter": -3, "loss": 1.0}',
    b'{"kind": "iter", "iter": 1.5, "loss": 1.0}',
    b'{"kind": ["iter"], "iter": 3}',
    b'{"kind": "of a later version", "iter": 3}',
    b"[" * 100_000,
    b'{"kind": "iter", "iter": ' + b"9" * 5000 + b"}",
    b"x" * (2**20 - 1),
]
ODD = [  # counted as lines, but without a figure that could be drawn
    b'{"kind": "iter", "iter": 3, "loss": null, "dt": null, "norm": null}',
    b'{"kind": "iter", "iter": 3, "loss": Infinity, "dt": -Infinity, "norm": NaN, "tokens": NaN}',
    b'{"kind": "iter", "iter": 3, "loss": "low", "dt": [], "norm": {}, "tokens": "x", "elapsed": "y"}',
    b'{"kind": "iter", "iter": 3, "loss": 1e308, "dt": 0, "norm": 1' + b"0" * 400 + b"}",
    b'{"kind": "iter", "iter": 9007199254740991, "dt": 1e300}',
    b'{"kind": "eval", "iter": 3, "val_loss": [1], "train_loss": null}',
    b'{"kind": "config", "iter": 0, "config": {"batch_size": "many", "block_size": [[1]]}, "torch": 5}',
    b'{"kind": "config", "iter": 0, "config": [1]}',
    b'{"kind": "sample", "iter": 3, "samples": [1, {"prompt": 2}, {"text": null}]}',
    b'{"kind": "sample", "iter": 3, "samples": "x"}',
    b'{"kind": "smaller_batch", "iter": 3, "batch_size": null}',
    b'{"kind": "spike", "iter": 3, "loss": 1' + b"0" * 400 + b"}",
    b'{"kind": "done", "iter": 3, "best": {"a": 1}}',
]


def test_damage_is_skipped_and_counted(tmp_path):
    lines = falling(40)
    mixed = [*lines[:20], *DAMAGE, *lines[20:], *EVENTS]
    history, clean = read_history(write(tmp_path / "a", mixed)), read_history(write(tmp_path / "b", lines))
    assert history.skipped == len(DAMAGE) and clean.skipped == 0
    assert np.array_equal(history.iters.groups, clean.iters.groups)
    assert np.array_equal(history.evals.groups, clean.evals.groups)


def test_a_line_that_is_being_written_is_no_damage(tmp_path):
    folder = write(tmp_path / "a", falling(40))
    with open(tmp_path / "a/metrics.jsonl", "ab") as f:
        f.write(b'{"kind": "iter", "it')
    assert read_history(folder).skipped == 0


def test_a_best_loss_that_does_not_compare_any_more_is_forgotten(tmp_path):
    lines = falling(40)
    lines += [line("resume", 40, config=CONFIG, best_val_loss=None), line("eval", 40, val_loss=7.0)]
    history = read_history(write(tmp_path / "a", lines))
    assert (history.best_val_loss, history.best_iter) == (7.0, 40)


def test_a_file_with_damage_is_drawn_with_one_warning(run, tmp_path):
    write(tmp_path / "out", [*falling(40), *DAMAGE, *ODD, *EVENTS])
    for over in ("tokens", "iterations", "hours"):
        done = run("plot.py", "out", f"--over={over}", "--out=a.svg", "--html=a.html", "--text=True")
        assert done.stderr == (
            "warning: out: lines of metrics.jsonl left out as damaged or of an unknown kind: 17\n"
        )
        xml.etree.ElementTree.parse(tmp_path / "a.svg")


def test_a_file_of_odd_lines_alone_is_one_line(run, tmp_path):
    write(tmp_path / "out", ODD)
    assert run("plot.py", "out", status=1).stderr.count("\n") == 1
    write(tmp_path / "out", [line("config", 0, config=CONFIG)])
    expected = f"error: {os.path.join('out', 'metrics.jsonl')} has no iteration yet that could be drawn\n"
    assert run("plot.py", "out", status=1).stderr == expected


PEAK = """
import re, sys
from sologpt.history import read_history
history = read_history(sys.argv[1])
peak = re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]
print(history.iters.groups[1, :, 0].sum(), peak)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_file(tmp_path):
    peaks = []
    for count in (3_000, 300_000):
        figures = '"loss": 3.1415, "dt": 0.5, "mfu": 40.1, "norm": 0.5, "lr": 0.001, "peak_memory": 123456789'
        lines = [
            f'{{"kind": "iter", "iter": {i}, {figures}, "tokens": {100 * i + 100}}}' for i in range(count)
        ]
        folder = write(tmp_path / str(count), lines)
        command = [sys.executable, "-c", PEAK, folder]
        out = subprocess.run(command, cwd=ROOT, env=ENV, capture_output=True, text=True, check=True).stdout
        rows, peak = map(float, out.split())
        assert rows == count
        peaks.append(peak / 1e3)
    assert peaks[1] - peaks[0] < 15  # MB; the file has 45


# -----------------------------------------------------------------------------
# what is drawn


def panels_of(*folders, over="tokens", reference=""):
    panels, _ = make_panels([read_history(folder) for folder in folders], over, reference)
    return {panel.unit: panel for panel in panels}


def test_panels_without_data_are_left_out(tmp_path):
    assert set(panels_of(write(tmp_path / "a", falling(40)))) == {
        "nats per token",
        "bits per byte",
        "tokens per second",
        "%",
        "norm",
        "rate",
        "GB",
    }
    bare = [line("config", 0, config=CONFIG), line("iter", 0, loss=3.0, dt=None, mfu=None, norm=None)]
    assert set(panels_of(write(tmp_path / "b", bare))) == {"nats per token"}


def test_every_point_of_a_short_run_is_drawn(tmp_path):
    panels = panels_of(write(tmp_path / "a", falling(40)))
    training, validation = panels["nats per token"].curves
    assert training.x.tolist() == [100 * i for i in range(40)]
    assert training.y == pytest.approx([10 - 5 * i / 40 for i in range(40)])
    assert validation.x.tolist() == [0, 1000, 2000, 3000]
    assert validation.y == pytest.approx([10.5, 9.25, 8.0, 6.75])
    assert panels["GB"].curves[0].y.tolist() == [3.0] * 40
    assert panels["tokens per second"].curves[0].y == pytest.approx([200.0] * 40)
    assert panels["norm"].log and not panels["rate"].log


def test_a_long_run_is_drawn_raw_and_smooth(tmp_path):
    rng = np.random.default_rng(2)
    losses = 3 + rng.normal(size=5000)
    losses[2500] = 50.0
    lines = [line("iter", i, loss=loss, tokens=i + 1) for i, loss in enumerate(losses.tolist())]
    raw, smooth = panels_of(write(tmp_path / "a", lines))["nats per token"].curves
    assert raw.raw and raw.y.max() == 50.0 and raw.y.min() == losses.min()
    assert smooth.y.max() < 4 and abs(smooth.y.mean() - 3) < 0.1


def test_smoothing_is_the_running_mean_of_the_running_median():
    y = np.random.default_rng(3).normal(size=200)
    medians = [np.median(y[max(0, i - 3) : i + 4]) for i in range(200)]
    assert smoothed(y) == pytest.approx([np.mean(medians[max(0, i - 3) : i + 4]) for i in range(200)])
    assert smoothed(np.where(np.arange(200) == 99, 1e6, 1.0)).max() == 1  # a spike


def test_events_are_marked_on_the_curve(tmp_path):
    panel = panels_of(write(tmp_path / "a", [*falling(40), *EVENTS]))["nats per token"]
    marks = {marks.kind: marks for marks in panel.marks}
    assert set(marks) == {"resume", "checkpoint", "bad_step", "spike", "smaller_batch"}
    assert marks["checkpoint"].x.tolist() == [1000, 2000]
    assert marks["checkpoint"].y == pytest.approx([10 - 5 / 4, 7.5])
    assert (
        marks["spike"]
        .texts[0]
        .endswith("iteration 25: loss 30.5, norm 99, first sequence 250, last sequence 259")
    )


def test_the_first_fall_of_the_loss_does_not_flatten_the_rest(tmp_path):
    lines = [line("iter", i, loss=3 + 8 * math.exp(-i), tokens=i + 1) for i in range(100)]
    panel = panels_of(write(tmp_path / "a", lines))["nats per token"]
    assert 2.9 < panel.y_range[0] < 3 < panel.y_range[1] < 3.1


def test_a_short_run_beside_a_long_one_is_in_the_frame(tmp_path):
    losses = [3 + 2.5 * math.exp(-i / 100) for i in range(2000)]
    lines = [line("iter", i, loss=loss, tokens=i + 1) for i, loss in enumerate(losses)]
    panel = panels_of(write(tmp_path / "long", lines), write(tmp_path / "short", lines[:150]))
    frame = panel["nats per token"].y_range
    assert frame is None or frame[0] < losses[149] < losses[20] < frame[1]


def test_a_note_says_whether_what_leaves_the_frame_is_the_start(run, tmp_path):
    steady = [3 - i / 1e4 for i in range(2000)]
    spiked = [*steady[:1000], 12.0, *steady[1001:]]
    falling = [loss + 8 * math.exp(-i) for i, loss in enumerate(steady)]
    for losses, note in ((spiked, "reaches 12.00, above"), (falling, "begins at 11.00, above")):
        write(tmp_path / "a", [line("iter", i, loss=loss, tokens=i + 1) for i, loss in enumerate(losses)])
        run("plot.py", "a", "--out=a.svg")
        assert note in (tmp_path / "a.svg").read_text()


def test_runs_differ_in_colour(tmp_path):
    folders = [write(tmp_path / str(i), falling(20)) for i in range(8)]
    curves = panels_of(*folders)["bits per byte"].curves
    assert len({(curve.color, curve.dash) for curve in curves}) == 8
    assert [curve.name for curve in curves] == folders


def test_published_results_are_drawn_over_tokens(tmp_path):
    panel = panels_of(write(tmp_path / "a", falling(40)), reference="gpt2_124m")["nats per token"]
    published = [curve for curve in panel.curves if curve.reference]
    llmc = published[0]
    assert llmc.name == "llm.c, GPT-2, AdamW (FineWeb)"
    assert (llmc.x[-1], llmc.y[-1]) == (19560 * 524288, 3.2722)
    assert len(published) == len(references("gpt2_124m"))


def test_every_published_result_has_its_source():
    """And falls, as a validation loss does."""
    for result in references("gpt2_124m"):
        assert re.match(r"https://github\.com/.*/blob/[0-9a-f]{40}/", result["source"])
        assert result["data"] in ("FineWeb", "FineWeb-Edu")
        if "level" not in result:
            steps, losses = zip(*result["val_loss"], strict=True)
            assert list(steps) == sorted(set(steps)) and list(losses) == sorted(set(losses), reverse=True)
            assert 3.27 < losses[-1] < 3.28


def test_numbers_are_short():
    assert [short(n) for n in (0, 0.25, 999, 12_000, 1_500_000, 2.5e9)] == [
        "0",
        "0.25",
        "999",
        "12k",
        "1.5M",
        "2.5B",
    ]


# -----------------------------------------------------------------------------
# the terminal


def test_the_terminal_picture_fits_and_falls(tmp_path):
    history = read_history(write(tmp_path / "a", falling(200)))
    text = terminal_text(history, "iterations", 60, color=False).splitlines()
    assert max(map(len, text[1:])) <= 60 and len(text) <= 21 and "\033" not in "".join(text)
    area = [row[10:].replace("o", " ") for row in text[1:-2]]
    heights = [sum(row[c : c + 1].strip() != "" for row in area) for c in range(50)]
    assert heights == sorted(heights, reverse=True) and heights[0] > heights[-1] + 12
    assert (
        text[0].endswith("loss over iterations, o: validation")
        and sum(row.count("o") for row in text[1:]) > 10
    )
    assert text[-1].split()[0] == "0" and text[-1].endswith("199")
    top = float(text[1].split()[0])
    assert 9.5 < top < 10.5  # validation is at 10 when a tenth is done


def test_the_terminal_picture_of_a_single_point(tmp_path):
    history = read_history(write(tmp_path / "a", [line("eval", 0, val_loss=3.0)]))
    assert "3.0" in terminal_text(history, "iterations", 10, color=True)


def test_the_terminal_picture_of_one_huge_loss(tmp_path):
    lines = [line("iter", 0, loss=1e17), line("eval", 0, val_loss=1e17)]
    assert "loss over iterations" in terminal_text(
        read_history(write(tmp_path / "a", lines)), "iterations", 40, False
    )


def test_the_terminal_picture_is_as_wide_as_all_losses_and_blank_where_there_is_none(tmp_path):
    lines = falling(81)
    rare = [text for text in lines if '"kind": "iter"' not in text]
    first = [text for text in lines if '"kind": "iter", "iter": 0,' in text]
    text = terminal_text(read_history(write(tmp_path / "a", rare + first)), "iterations", 60, color=False)
    assert text.split()[-1] == "80"
    marks = [row.find("o") for row in text.splitlines()[1:] if "o" in row]
    assert marks == sorted(marks) and marks[-1] - marks[0] > 35  # falling, over the whole width
    late = [text for text in lines if json.loads(text)["iter"] >= 40]
    text = terminal_text(read_history(write(tmp_path / "b", late)), "iterations", 60, color=False)
    assert all(not row[10:32].strip() for row in text.splitlines()[1:-2])


def test_the_table_has_the_last_iteration_of_a_run_that_goes_on(tmp_path):
    found = results(read_history(write(tmp_path / "a", falling(40)[:-1])))
    assert (found["iterations"], found["tokens"], found["finished"]) == ("39", "3,900", "no")
    found = results(read_history(write(tmp_path / "b", falling(40))))
    assert (found["iterations"], found["tokens"]) == ("40", "4,000")


# -----------------------------------------------------------------------------
# the command line


def test_folders_are_told_from_config_files_and_keys(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "odd.py").mkdir()
    (tmp_path / "mine.py").write_text("over = 'hours'")
    argv = ["out", "odd.py", "mine.py", "--text=True", "a/b", "over=hours"]
    assert split_arguments(argv) == (["out", "odd.py", "a/b"], ["mine.py", "--text=True", "over=hours"])


def test_mistakes_are_one_line_each(run, tmp_path):
    write(tmp_path / "out", falling(20))
    (tmp_path / "empty").mkdir()
    assert run("plot.py", "nowhere", status=1).stderr.startswith("error: there is no folder nowhere; name")
    assert run("plot.py", "empty", status=1).stderr.startswith("error: empty has no metrics.jsonl")
    for argument, message in {
        "--out=a.pdf": "out must end in .png or .svg",
        "--html=True": "html is the page to write, as in --html=run.html",
        "--out=no/a.png": "out is to be written into no, and there is no such folder",
        "--out=.png": "out must end in .png or .svg",
        "--watch=-1": "watch must be at least 0",
        "--watch=1e300": "watch must be at most 1000000.0",
        "--reference=gpt3": "must be '' or 'gpt2_124m'",
    }.items():
        assert message in run("plot.py", "out", argument, status=2).stderr
    both = run("plot.py", "out", "--reference=gpt2_124m", "--over=hours", status=2)
    assert "reference needs over='tokens'" in both.stderr
    assert PlotConfig.__dataclass_fields__["reference"].metadata["choices"] == ("", "gpt2_124m")


def test_the_newest_run_is_drawn_into_its_folder(run, tmp_path, monkeypatch):
    for age, name in enumerate(["out/a", "out-b", "out/a/earlier-1"]):
        write(tmp_path / name, falling(20))
        os.utime(tmp_path / name / "metrics.jsonl", (10**9 - age, 10**9 - age))
    monkeypatch.chdir(tmp_path)
    assert newest(["metrics.jsonl"], "") == os.path.join("out", "a", "metrics.jsonl")
    done = run("plot.py")
    assert done.stderr == f"drawing {os.path.join('out', 'a')}\n"
    assert (
        done.stdout == f"{os.path.join('out', 'a', 'run.png')}: {(size_of(tmp_path / 'out/a/run.png'))} MB\n"
    )
    assert (tmp_path / "out/a/run.png").read_bytes().startswith(b"\x89PNG")
    shutil.rmtree("out")
    shutil.rmtree("out-b")
    assert "train a model, or name its folder" in run("plot.py", status=1).stderr


def size_of(path):
    return f"{path.stat().st_size / 1e6:.2f}"


def test_a_real_run_is_drawn_as_its_log_says(trained, tmp_path):
    """Stopped and resumed: the picture shows each iteration once."""
    keys = """--dataset=toy --device=cpu --compile=False --n_layer=1 --n_head=2 --n_embd=16 --block_size=16
        --batch_size=4 --gradient_accumulation_steps=2 --warmup_iters=2 --lr_decay_iters=40 --eval_interval=10
        --eval_iters=1 --sample_interval=20 --out_dir=real""".split()
    log = trained("train.py", *keys, "--max_iters=20").stdout
    log += trained("train.py", *keys, "--max_iters=40", "--init_from=resume").stdout
    history = read_history(str(tmp_path / "real"))
    printed = dict(re.findall(r"^iter (\d+): loss ([\d.]+)", log, re.M))
    assert history.iters.mean("iterations").tolist() == list(range(40)) == [int(n) for n in printed]
    assert history.iters.mean("loss") == pytest.approx([float(loss) for loss in printed.values()], abs=6e-5)
    assert history.iters.mean("tokens").tolist() == [4 * 2 * 16 * n for n in range(40)]
    evaluated = dict(re.findall(r"^step (\d+): train loss [\d.]+, val loss ([\d.]+)", log, re.M))
    assert history.evals.mean("iterations").tolist() == [0, 10, 20, 30, 40] == [int(n) for n in evaluated]
    losses = [float(loss) for loss in evaluated.values()]
    assert history.evals.mean("val_loss") == pytest.approx(losses, abs=6e-5)
    assert (history.skipped, history.events["resume"].count, history.exact_hours) == (0, 1, True)
    hours = history.iters.mean("hours")
    assert (np.diff(hours) > 0).all() and 0 < hours[-1] < history.evals.mean("hours")[-1] < 0.1

    assert trained("plot.py", "real", "--out=a.png", "--html=a.html").stderr == ""
    page = (tmp_path / "a.html").read_text()
    assert "<th>its iteration</th><td>40</td>" in page and "<th>finished</th><td>yes</td>" in page
    shown = [html.unescape(re.sub("<.*?>", "", text)) for text in re.findall(r"<pre>(.*?)</pre>", page, re.S)]
    printed = dict.fromkeys(re.findall(r"^sample (\d+): (\".*\") -> (\".*\")$", log, re.M))
    texts = [(int(n), json.loads(prompt) + json.loads(text)) for n, prompt, text in printed]
    assert [n for n, _ in texts] == [0] * 3 + [20] * 3 + [40] * 3
    assert sorted(shown) == sorted(printable(text) for _, text in texts)


BLOCKED = (
    "import sys; sys.modules.update(matplotlib=None, plotly=None); from configurator import run_script; "
)


def test_a_wrong_setting_of_matplotlib_is_one_line(tmp_path):
    pytest.importorskip("matplotlib", reason="pip install '.[plot]'")
    command = [sys.executable, "plot.py", write(tmp_path / "out", falling(20)), f"--out={tmp_path / 'a.png'}"]
    done = subprocess.run(command, cwd=ROOT, env=ENV | {"MPLBACKEND": "foo"}, capture_output=True, text=True)
    assert done.returncode == 1 and re.fullmatch(
        r"error: matplotlib does not start: .*'foo'.*\n", done.stderr
    )


def test_without_the_extra_only_the_terminal_is_drawn(tmp_path):
    folder = write(tmp_path / "out", falling(20))

    def plot(*argv, status):
        code = (
            BLOCKED
            + f"import plot; run_script(plot.main, {[folder, *argv]!r}); print('torch' in sys.modules)"
        )
        command = [sys.executable, "-W", "error", "-c", code]
        done = subprocess.run(command, cwd=ROOT, env=ENV, capture_output=True, text=True)
        assert done.returncode == status, done.stderr
        return done

    text = plot("--text=True", status=0)
    assert "loss over tokens" in text.stdout and text.stdout.endswith("False\n")  # and torch is not needed
    assert plot(status=1).stderr == (
        "error: a picture needs matplotlib: pip install '.[plot]'; --text=True draws the loss without it\n"
    )
    page = f"--html={tmp_path / 'a.html'}"
    assert plot(page, status=1).stderr == "error: a page needs plotly: pip install '.[plot]'\n"


def test_the_page_at_the_end_of_a_run_does_no_harm(tmp_path, monkeypatch, capfd):
    folder = write(tmp_path / "out", falling(20))
    assert page_of_run(folder) == os.path.join(folder, "run.html")
    assert (tmp_path / "out/run.html").stat().st_size < 6e6
    (tmp_path / "out/run.html").unlink()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "plotly", None)
        assert page_of_run(folder) is None and capfd.readouterr() == ("", "")
    (tmp_path / "out/metrics.jsonl").unlink()
    assert page_of_run(folder) is None
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("warning: no ") and err.count("\n") == 1
    assert os.listdir(folder) == []


def test_watching_redraws_until_ctrl_c(tmp_path):
    lines = falling(40)
    write(tmp_path / "out", lines[:1])
    command = [
        sys.executable,
        "-u",
        str(ROOT / "plot.py"),
        "out",
        "--text=True",
        "--watch=0.1",
        "--over=iterations",
    ]
    heard = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell's & makes it ignored
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process = subprocess.Popen(command, cwd=tmp_path, env=ENV, preexec_fn=heard, **pipes)
    try:
        assert process.stderr.readline().endswith(b"has no iteration yet that could be drawn; waiting\n")
        for count in (21, len(lines)):
            write(tmp_path / "out", lines[:count])
            last = json.loads(lines[count - 1])["iter"]
            while not re.search(rb"^ +0 .* %d\n$" % last, process.stdout.readline()):
                assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
        assert process.stderr.read() == b"interrupted\n"
    finally:
        process.kill()
        process.communicate()


def test_pictures_of_the_same_run_are_the_same(run, tmp_path):
    write(tmp_path / "out", [*falling(40), *EVENTS])
    for kind in ("svg", "png"):
        run("plot.py", "out", f"--out=a.{kind}")
        run("plot.py", "out", f"--out=b.{kind}")
        assert (tmp_path / f"a.{kind}").read_bytes() == (tmp_path / f"b.{kind}").read_bytes()


# -----------------------------------------------------------------------------
# the page

HOSTILE = "<img src=x onerror=alert(1)>$_{^&\"'</script><b>"


def hostile_run(folder, **config):
    sample = dict(prompt=HOSTILE, text=HOSTILE + "\x1b[2J\x00 and on")
    lines = falling(60, arch=HOSTILE, **config)
    lines.append(line("sample", 30, samples=[dict(prompt="early", text=" text")]))
    lines.append(line("sample", 60, samples=[sample]))
    lines.append(line("done", 60, note=HOSTILE, seconds=HOSTILE, tokens_per_s=HOSTILE))
    return write(folder, [*lines, *EVENTS])


def hostile_names(tmp_path):
    """Two runs in folders with names that are HTML, a formula, or hidden for matplotlib."""
    first = hostile_run(tmp_path / HOSTILE.replace("/", ""), n_layer=3)
    return first, hostile_run(tmp_path / "_x\udcff\x07$y", n_layer=4)


def test_hostile_text_is_shown_as_text(run, tmp_path):
    names = [os.path.basename(folder) for folder in hostile_names(tmp_path)]
    run("plot.py", *names, "--out=a.svg", "--html=a.html")
    run("plot.py", *names, "--out=a.png")
    page = (tmp_path / "a.html").read_text()
    assert "<img" not in page.partition("<body>")[2].replace(scripts(page), "") and "\x1b" not in page
    assert "&lt;img src=x onerror=alert(1)&gt;$_{^&amp;" in page
    svg = xml.etree.ElementTree.parse(tmp_path / "a.svg")
    drawn = ["".join(text.itertext()) for text in svg.iter("{http://www.w3.org/2000/svg}text")]
    assert f"{names[0]}, training" in drawn and "./_x\ufffd\ufffd$y, training" in drawn


def scripts(page):
    """The JavaScript of plotly itself, which has tags in its texts."""
    return max(re.findall(r"<script.*?>(.*?)</script>", page, re.S), key=len)


def test_the_page_says_how_runs_differ_and_ended(run, tmp_path):
    write(tmp_path / "a", falling(40, n_layer=2, out_dir="a", dataset="same"))
    write(tmp_path / "b", [*falling(60, n_layer=3, out_dir="b", dataset="same"), *EVENTS[1:], DONE])
    run("plot.py", "a", "b", "--html=a.html", "--reference=gpt2_124m")
    page = (tmp_path / "a.html").read_text()
    differ = page.partition("Settings that differ")[2].partition("<details>")[0]
    rows = re.findall(r"<tr><th>(\w+)</th><td>(.*?)</td><td>(.*?)</td></tr>", differ)
    # the smaller micro-batch of one of them, too
    assert rows == [
        ("batch_size", "2", "1"),
        ("gradient_accumulation_steps", "5", "10"),
        ("n_layer", "2", "3"),
    ]
    results = dict(re.findall(r"<tr><th>([\w ,%]+)</th><td>.*?</td><td>(.*?)</td></tr>", page))
    assert (results["iterations"], results["tokens"], results["hours"]) == ("60", "6,000", "1")
    assert (results["best validation loss"], results["its iteration"]) == (f"{10.5 - 5 * 50 / 60:.4f}", "50")
    assert (results["peak memory in GB"], results["MFU in %, median"]) == ("3.00", "40.0")
    assert (results["tokens per second, mean"], results["finished"]) == ("190", "yes")
    assert (results["tokens per second, median"], results["checkpoint, times"]) == ("200", "2")
    for result in references("gpt2_124m"):
        assert result["source"] in page


def test_the_page_asks_no_network_for_anything(run, tmp_path):
    write(tmp_path / "out", falling(20))
    run("plot.py", "out", "--html=a.html")
    page = (tmp_path / "a.html").read_text()
    assert "default-src 'none'" in page and not re.search(r"<(script|link|img)[^>]* (src|href)=", page)


class Browser:
    """Headless chromium, asked by chromedriver's W3C WebDriver, which is JSON over HTTP."""

    FLAGS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run
        --disable-background-networking --disable-component-update --disable-sync --window-size=1200,1000"""

    def __init__(self, profile):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        devnull = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.driver = subprocess.Popen(["chromedriver", f"--port={self.port}"], **devnull)
        self.base = ""
        options = dict(args=[*self.FLAGS.split(), f"--user-data-dir={profile}"])
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": dict(browser="ALL")}
        try:
            self.wait_until_it_listens()
            made = self.ask("POST", "/session", dict(capabilities=dict(alwaysMatch=wanted)))
        except BaseException:
            self.driver.kill()
            self.driver.wait()
            raise
        self.base = f"/session/{made['sessionId']}"

    def wait_until_it_listens(self):
        for _ in range(300):
            with contextlib.suppress(OSError):
                return socket.create_connection(("127.0.0.1", self.port)).close()
            time.sleep(0.1)
        raise TimeoutError("chromedriver does not listen")

    def ask(self, method, path, body=None):
        data = json.dumps(body).encode() if body is not None else None
        url = f"http://127.0.0.1:{self.port}{self.base}{path}"
        request = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method=method)
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with direct.open(request, timeout=120) as answer:
            return json.load(answer)["value"]

    def run(self, script):
        return self.ask("POST", "/execute/sync", dict(script=script, args=[]))

    def until(self, script):
        """Runs script until it returns something true, which is returned."""
        for _ in range(1200):
            if value := self.run(script):
                return value
            time.sleep(0.1)
        raise TimeoutError(script)

    def point_at(self, x, y):
        move = dict(type="pointerMove", duration=50, x=round(x), y=round(y))
        pointer = dict(type="pointer", id="mouse", parameters=dict(pointerType="mouse"), actions=[move])
        self.ask("POST", "/actions", dict(actions=[pointer]))

    def close(self):
        with contextlib.suppress(OSError):
            self.ask("DELETE", "")
        self.driver.terminate()
        self.driver.wait()


@pytest.fixture
def browser(tmp_path_factory):
    if not shutil.which("chromedriver"):
        pytest.skip("no chromedriver: apt-get install chromium chromium-driver")
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


def test_the_page_works_in_a_browser(run, tmp_path, browser):
    names = [os.path.basename(folder) for folder in hostile_names(tmp_path)]
    run("plot.py", *names, "--html=a.html", "--reference=gpt2_124m", "--over=tokens")
    browser.ask("POST", "/url", dict(url=(tmp_path / "a.html").as_uri()))
    browser.until("return document.querySelectorAll('.scatterlayer .trace').length > 10")
    assert browser.ask("POST", "/se/log", dict(type="browser")) == []

    titles = browser.run("return [...document.querySelectorAll('.annotation-text')].map(t => t.textContent)")
    assert len(titles) == 7 and titles[0] == "loss (nats per token)" and "peak memory (GB)" in titles
    legend = browser.run("return [...document.querySelectorAll('.legendtext')].map(t => t.textContent)")
    assert f"{names[0]}, validation" in legend and "skipped update" in legend
    assert "llm.c, GPT-2, AdamW (FineWeb)" in legend

    # hovering over iteration 30 in the panel of the losses, whose x axis ends at 1.15 * 59
    panel = "document.querySelector('.xy .nsewdrag').getBoundingClientRect()"
    box = browser.run(f"const r = {panel}; return [r.x, r.y, r.width, r.height]")
    browser.point_at(box[0] + box[2] * 30 / (59 * 1.15), box[1] + box[3] / 2)
    shown = browser.until("return document.querySelector('.hoverlayer').textContent")
    assert "3,000" in shown and f"{names[0]}, training : 7.5000" in shown and "validation : 8.0000" in shown

    # nothing of the hostile text has become an element, or was run
    assert browser.run("return document.querySelectorAll('img, td b, h1 *, summary *').length") == 0
    samples = browser.run("return [...document.querySelectorAll('pre')].map(p => p.textContent)")
    assert HOSTILE * 2 + "\ufffd[2J\ufffd and on" in samples and "early text" in samples
    picture = base64.b64decode(browser.ask("GET", "/screenshot"))
    assert picture.startswith(b"\x89PNG") and len(io.BytesIO(picture).getvalue()) > 20_000
    assert browser.ask("POST", "/se/log", dict(type="browser")) == []


def test_a_picture_has_the_values_of_the_log(tmp_path):
    from matplotlib.figure import Figure
    from plotly import graph_objects

    panels, x_range = make_panels([read_history(write(tmp_path / "a", falling(40)))], "hours")
    axes = Figure().add_subplot()
    draw_panel(axes, panels[0], x_range, "hours")
    drawn = [(line.get_xdata(), line.get_ydata()) for line in axes.lines]
    on_the_page = [(trace.x, trace.y) for trace in traces(panels[0], graph_objects)]
    for training, validation in (drawn, on_the_page):
        assert training[0] == pytest.approx([0.6 * (i + 1) / 3600 for i in range(40)])
        assert training[1] == pytest.approx([10 - 5 * i / 40 for i in range(40)])
        assert validation[1] == pytest.approx([10.5, 9.25, 8.0, 6.75])
