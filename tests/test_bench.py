"""
bench.py as a user runs it, on tiny models: each row is a process. References: train.py's own log,
arithmetic by hand, the recommendation by hand; memory is really refused (ulimit) and a process is really
killed.
Run: pytest tests/test_bench.py
"""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ENV, ROOT

from bench import NOT_FINITE, BenchConfig, Timed, measure, profile_table, recipe, recommend, training_command
from bench import main as bench_main
from configurator import ConfigError, configure
from sologpt import hardware, shards
from sologpt.errors import UserError

SMALL = (
    "--device=cpu --compile=False --dataset=none --n_layer=2 --n_head=2 --n_embd=64 --block_size=64".split()
)
ROW = re.compile(r"^ +(\d+) +(\d+) +([\d.,]+) +([\d,]+) +([\d.]+) +n/a +([\d.]+) +([\d.]+) +([\d.]+)%$", re.M)


LINUX = pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="reads Linux's /proc")


def numbers(text):
    return [tuple(float(cell.replace(",", "")) for cell in row) for row in ROW.findall(text)]


def test_every_row_has_the_tokens_of_the_iteration_and_the_file_says_the_same(run, tmp_path, monkeypatch):
    monkeypatch.setattr("bench.ROW_SECONDS", 0.5)
    flags = ["--batch_size=2", "--gradient_accumulation_steps=6", "--seed=3", "--learning_rate=1e9"]
    flags += ["--init_from=auto"]
    (tmp_path / "c.py").write_text("real_data = False\nprofile = False")  # nanoGPT's bench.py has these
    out = run("bench.py", "c.py", *SMALL, *flags, "--sweep_batch_size=6,3", "--json=figures.json").stdout
    rows = numbers(out)
    assert [row[:2] for row in rows] == [(3, 4), (6, 2)]
    assert "init_from='auto' is not loaded; the model has the size of n_layer, n_head and n_embd\n" in out
    report = json.loads((tmp_path / "figures.json").read_text())
    assert report["tokens_per_iter"] == 12 * 64 and report["device"] == "cpu" and report["dtype"] == "float32"
    assert report["vocab_size"] == 50304 and "GPT-2's" in out and str(tmp_path) not in json.dumps(report)
    assert (
        report["command"].startswith("python bench.py c.py --device=cpu") and "json" not in report["command"]
    )
    flops = 6 * (50304 * 64 + 2 * 12 * 64**2 + 5 * 64) + 12 * 2 * 64 * 64
    for row, shown in zip(report["rows"], rows, strict=True):
        assert row["status"] == "measured" and row["batch_size"] * row["gradient_accumulation_steps"] == 12
        whole = row["micro_step_ms"] * row["gradient_accumulation_steps"] + row["update_ms"]
        assert row["ms_per_iter"] == pytest.approx(whole) == pytest.approx(shown[2], abs=0.006)
        assert row["tokens_per_s"] == pytest.approx(12 * 64 / whole * 1e3) == pytest.approx(shown[3], abs=0.6)
        assert row["tflops"] == pytest.approx(flops * row["tokens_per_s"] / 1e12)
        assert row["mfu"] is None and row["reserved_memory"] is None
        assert 1e8 < row["peak_memory"] < 4e9 and row["peak_memory"] / 1e9 == pytest.approx(
            shown[5], abs=0.006
        )
        assert row["estimated_memory"] / 1e9 == pytest.approx(shown[6], abs=0.006)
        # 50304 * 64 weights and more; the process
        assert 16 * 3.3e6 < row["estimated_memory"] < row["peak_memory"]
    best = recommend(report["rows"])
    assert report["recommended"] == best
    *_, command, note = out.splitlines()
    assert note.startswith("note: train.py knows no keys of bench.py; remove them there first: c.py:1: unkn")
    command = shlex.split(command)
    assert (
        command[:3] == ["python", "train.py", "c.py"] and command[-2] == f"--batch_size={best['batch_size']}"
    )
    configure(BenchConfig, command[3:])
    assert not [arg for arg in command if "sweep" in arg or "json" in arg or "=2" in arg and "batch" in arg]


@LINUX
def test_a_row_without_memory_is_a_row_and_larger_ones_are_not_tried(tmp_path):
    """The limit is a real one, of address space: what the script takes without any model, and 1 GB. The
    logits, their logarithms and gradients of 128 * 16 tokens take 1.2 GB."""
    status = [sys.executable, "-c", "import bench; print(open('/proc/self/status').read())"]
    status = subprocess.run(status, cwd=ROOT, capture_output=True, text=True, env=ENV).stdout
    limit = int(re.search(r"VmPeak:\s+(\d+) kB", status)[1]) + 2**20
    flags = ["--batch_size=1", "--gradient_accumulation_steps=640", "--sweep_batch_size=1,128,160"]
    flags += ["--block_size=16", "--n_embd=32", "--n_layer=1", "--json=figures.json"]
    command = shlex.join([sys.executable, str(ROOT / "bench.py"), *SMALL, *flags])
    limited = ["bash", "-c", f"ulimit -v {limit}; exec {command}"]
    process = subprocess.run(limited, cwd=tmp_path, capture_output=True, text=True, env=ENV)
    assert process.returncode == 0 and "Traceback" not in process.stderr, process.stdout + process.stderr
    rows = json.loads((tmp_path / "figures.json").read_text())["rows"]
    expected = [(1, "measured"), (128, "out of memory"), (160, "not tried")]
    assert [(row["batch_size"], row["status"]) for row in rows] == expected
    assert re.search(r"^ +128 +5 +out of memory\n +160 +4 +not tried$", process.stdout, re.M)


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@LINUX
def test_a_killed_row_is_a_row(tmp_path):
    flags = ["--batch_size=1", "--gradient_accumulation_steps=2", "--sweep_batch_size=1"]
    command = [sys.executable, str(ROOT / "bench.py"), *SMALL, *flags]
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENV
    )
    deadline, victims = time.monotonic() + 60, []
    while not victims and time.monotonic() < deadline:
        time.sleep(0.05)
        for child in children(process.pid):
            if "spawn_main" in Path(f"/proc/{child}/cmdline").read_text():
                victims.append(child)
    os.kill(victims[0], signal.SIGKILL)
    out, err = process.communicate(timeout=60)
    assert re.search(r"^ +1 +2 +killed$", out, re.M), out + err
    assert (
        process.returncode == 1
        and err.startswith("error: no row fits into memory")
        and "Traceback" not in err
    )


def test_the_recommended_row_is_the_smallest_within_one_percent_of_the_fastest():
    def row(ms, memory, status="measured"):
        return dict(status=status, ms_per_iter=ms, peak_memory=memory)

    rows = [
        row(102, 1),
        row(101, 3),
        row(100.5, 2),
        row(100, 4),
        dict(status="out of memory"),
        dict(status="killed"),
    ]
    assert recommend(rows) is rows[2]
    assert recommend([row(100, None), row(99.5, None)])["ms_per_iter"] == 99.5


def test_the_command_keeps_what_was_asked_for_and_drops_what_is_of_the_benchmark():
    argv = [
        "config/x.py",
        "--batch_size=8",
        "--n_layer=3",
        "--sweep_batch_size=8,16",
        "--json=a b",
        "--profile=False",
    ]
    flags = dict(batch_size=16, gradient_accumulation_steps=4)
    expected = "python train.py config/x.py --n_layer=3 --batch_size=16 --gradient_accumulation_steps=4"
    assert training_command(argv, flags) == expected


# fmt: skip
@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--sweep_batch_size=3,x", "sweep_batch_size: batch_size needs an int, not 'x'"),
        (
            "--sweep_batch_size=4,5",
            "sweep_batch_size: 5 does not divide the 12 sequences of an iteration; these do: "
            "1, 2, 3, 4, 6, 12",
        ),
        ("--sweep_batch_size=0", "sweep_batch_size: batch_size must be at least 1, not 0"),
        (
            "--sweep_activation_memory=1.5",
            "sweep_activation_memory: activation_memory must be at most 1, not 1.5",
        ),
        (
            "--sweep_activation_memory=0.5",
            "sweep_activation_memory: activation_memory must be at least 0.8, not 0.5",
        ),
        ("--sweep_loss_chunks=2,,4", "sweep_loss_chunks: loss_chunks needs an int, not ''"),
        ("--profile=True --json=x.json", "profile lists operations at one batch_size: leave json out"),
        ("--sweep_loss_chunk=2", "unknown key 'sweep_loss_chunk' (did you mean 'sweep_loss_chunks'?)"),
    ],
)
def test_nonsense_is_an_error_that_says_what_would_do(flag, message):
    with pytest.raises(ConfigError) as error:
        configure(BenchConfig, ["--batch_size=2", "--gradient_accumulation_steps=6", *flag.split()])
    assert message in str(error.value)


def test_the_sizes_tried_are_those_around_the_configured_one_that_divide_an_iteration():
    def sizes(batch_size, accumulation):
        flags = [f"--batch_size={batch_size}", f"--gradient_accumulation_steps={accumulation}"]
        return configure(BenchConfig, flags).sweep("batch_size")

    assert sizes(8, 64) == [2, 4, 8, 16, 32, 64]
    assert sizes(12, 40) == [3, 6, 12, 24, 48, 96]
    assert sizes(5, 2) == [5, 10]


def test_every_config_of_train_and_nanogpts_keys_are_taken():
    nanogpt = "batch_size block_size bias real_data seed device dtype compile profile".split()
    assert {*nanogpt} <= {*configure(BenchConfig, []).__dataclass_fields__}
    for path in ROOT.glob("config/*.py"):
        configure(BenchConfig, [str(path)])


def test_missing_data_is_an_error_only_if_it_is_to_be_read(run):
    process = run(
        "bench.py", *SMALL, "--batch_size=1", "--gradient_accumulation_steps=1", "--real_data=True", status=1
    )
    assert process.stderr.startswith("error: there is no folder data/none or none for dataset='none'")


def test_a_profile_without_kernels_says_why():
    assert profile_table([(3000.0, 7, "mm")], 12_000.0)[1].split() == ["3.00", "25.0%", "7", "mm"]
    assert "saw no kernels: it needs CUPTI" in profile_table([], 12_000.0)[0]


def test_what_fails_without_the_compiler_is_not_its_fault(monkeypatch):
    cfg = configure(BenchConfig, [*SMALL, "--compile=False"])
    timed = Timed(cfg, hardware.find_machine(cfg))
    monkeypatch.setattr(timed.model, "forward", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        timed.warm_up()


def test_a_model_that_computes_nonsense_is_no_row():
    cfg = configure(BenchConfig, [*SMALL, "--batch_size=1", "--gradient_accumulation_steps=1"])
    timed = Timed(cfg, hardware.find_machine(cfg))
    timed.model.transformer.wte.weight.data[:, 3] = float("nan")
    with pytest.raises(FloatingPointError, match="gradients not finite"):
        measure(timed, 0.1)


def test_a_row_of_nonsense_leaves_the_others(monkeypatch, tmp_path, capsys):
    statuses = iter([(NOT_FINITE, {}), ("out of memory", {})])
    monkeypatch.setattr("bench.run_row", lambda cfg, tell: next(statuses))
    flags = ["--batch_size=4", "--gradient_accumulation_steps=2", "--sweep_batch_size=2,4,8"]
    with pytest.raises(UserError, match="no row was measured: try --dtype=float32"):
        bench_main([*SMALL, *flags, f"--json={tmp_path / 'x.json'}"])
    rows = json.loads((tmp_path / "x.json").read_text())["rows"]
    assert [row["status"] for row in rows] == ["gradients not finite", "out of memory", "not tried"]
    monkeypatch.setattr("bench.run_row", lambda cfg, tell: (NOT_FINITE, {}))
    with pytest.raises(UserError, match="gradients not finite: try --dtype=float32"):
        bench_main([*SMALL, "--hours=1"])


def test_no_matrix_is_timed_with_gradients_of_zeros(tmp_path, monkeypatch):
    """As a new modern model would be, whose blocks and head give zeros at first."""
    monkeypatch.chdir(tmp_path)
    cfg = configure(BenchConfig, [*SMALL, "--arch=modern", "--optimizer=muon", "--n_head=1"])
    timed = Timed(cfg, hardware.find_machine(cfg))
    timed.warm_up()
    timed.one_micro_step()
    still = [name for name, p in timed.model.named_parameters() if p.dim() == 2 and not p.grad.any()]
    assert not still


def test_a_profile_of_real_data_names_the_operations_that_take_the_time(run, byte_data):
    argv = ["--batch_size=1", "--gradient_accumulation_steps=1", "--profile=True", "--real_data=True"]
    argv += ["--n_embd=256"]
    out = run("bench.py", *SMALL, "--dataset=toy", *argv, OMP_NUM_THREADS="1").stdout
    assert "bytes, of data/toy" in out and "random" not in out
    listed = [line.split() for line in out.splitlines() if line.split()[-1].startswith("aten::")]
    assert listed[0][-1] == "aten::mm"  # half of the time at this width
    times = [float(line[0]) for line in listed]
    assert times == sorted(times, reverse=True) and 5 < len(times) <= 15


def test_a_file_that_cannot_be_written_is_refused_before_anything_is_measured(run, tmp_path):
    out = run("bench.py", "--json=nowhere/x.json", status=2)
    assert "json is to be written into nowhere, and there is no such folder" in out.stderr
    (tmp_path / "there").mkdir()
    out = run("bench.py", "--json=there", status=2)
    assert "json='there' is a folder; give a file in it" in out.stderr


def test_a_config_file_with_a_key_that_train_lacks_is_refused_before_train_is_to_run_with_it(run, tmp_path):
    (tmp_path / "c.py").write_text("real_data = False")
    error = run("bench.py", "c.py", "--hours=1", status=1).stderr
    expected = "error: train.py is to take the same files, without keys of bench.py: c.py:1: unknown key "
    assert error.startswith(f"{expected}'real_data'")


def test_the_recommended_config_is_found_from_anywhere(tmp_path, monkeypatch):
    assert recipe() == "config/fineweb_125m_fast.py"
    monkeypatch.chdir(tmp_path)
    assert os.path.samefile(recipe(), ROOT / "config/fineweb_125m_fast.py")


def test_a_row_by_a_clock_that_moves_in_the_work_only(monkeypatch):
    """A micro-step takes 3 s, an update 2: six and one are 20 s, timed in blocks of three."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    flags = ["--batch_size=2", "--gradient_accumulation_steps=6", "--peak_flops=1e12"]
    cfg = configure(BenchConfig, [*SMALL, *flags])
    timed = Timed(cfg, hardware.find_machine(cfg))

    def taking(seconds, work):
        def slow():
            now[0] += seconds
            work()

        return slow

    timed.one_micro_step = taking(3, timed.one_micro_step)
    timed.one_update = taking(2, timed.one_update)
    row = measure(timed, 40.0)
    assert row["block"] == 3 and row["spread"] == 0 and row["first_micro_step_s"] == 3
    assert (row["micro_step_ms"], row["update_ms"], row["ms_per_iter"]) == (3000, 2000, 20000)
    assert row["tokens_per_s"] == pytest.approx(12 * 64 / 20)
    assert row["mfu"] == pytest.approx(row["tflops"])  # a share of 1 TFLOP/s


def test_real_data_are_what_is_timed(byte_data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--dataset=toy", "--block_size=16", "--batch_size=2", "--real_data=True"]
    cfg = configure(BenchConfig, [*SMALL, *flags])
    windows = shards.Windows(shards.find_shards(byte_data, "train"), 16, 257)
    expected = windows.read(windows.training(0, 2, cfg.seed))
    assert next(Timed(cfg, hardware.find_machine(cfg)).batches).tolist() == expected.tolist()
