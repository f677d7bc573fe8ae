"""
benchmarks/gpu_day.py: what is done again, what takes too long, that a failure is a row; and its first stage,
with a tiny model on a CPU.
Run: pytest tests/test_gpu_day.py
"""

import json
import signal
import subprocess
import sys
import time

import pytest
from conftest import ENV, ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import compare_modded
import gpu_day
import torch
from candidates import CandidatesConfig
from compare_modded import CompareConfig
from gpu_day import Failed, Part, figures_of_a_run
from sampling import BenchmarkConfig
from steps import StepsConfig

from bench import BenchConfig
from configurator import configure
from sologpt import hardware
from sologpt.errors import UserError
from train import TrainConfig

SLEEP = ("-m timeit", "-n1", "-r1", "import time; time.sleep(60)")


@pytest.fixture
def day(tmp_path, monkeypatch, capsys):
    """day(parts, '--key=value', ...) runs a day of those parts; returns their entries in the JSON file, and
    what was printed."""

    def day(parts, *argv):
        monkeypatch.setattr(gpu_day, "parts_of", lambda day: parts)
        flags = ["--device=cpu", f"--dataset={tmp_path}", f"--out_dir={tmp_path / 'out'}"]
        gpu_day.main([*flags, f"--json={tmp_path / 'day.json'}", *argv])
        report = json.loads((tmp_path / "day.json").read_text())
        return report["parts"], capsys.readouterr()

    return day


def test_a_part_is_done_again_only_if_it_failed_or_something_else_was_asked_for(day):
    calls = []

    def work(day, figures, sentences):
        calls.append(day.cfg.size)
        sentences.append("fast")
        if len(calls) == 1:
            raise Failed("too slow")

    parts = [Part("speed", "one", 1, work)]
    assert day(parts)[0]["speed: one"]["status"] == "failed"
    assert day(parts)[0]["speed: one"]["status"] == "done"
    entries, printed = day(parts)
    assert "speed: one: done already" in printed.err and "| speed: one, done | 0 | fast |" in printed.out
    assert len(calls) == 2 and len(entries["speed: one"]["commit"] or 40 * "x") == 40
    day(parts, "--batch_sizes=4")
    assert len(calls) == 2  # which is in the names of the parts that it changes
    day(parts, "--size=tiny")
    assert calls[2:] == ["tiny"]
    # the JSON file has what is of other stages, and the table says that it is not shown
    _, printed = day([Part("tests", "two", 1, lambda *given: None)], "--size=tiny")
    assert "not shown, as of other stages or settings: speed: one" in printed.out


def test_whatever_goes_wrong_in_a_part_is_a_row_and_the_next_one_runs(day):
    def broken(day, figures, sentences):
        sentences.append("until then all was well")
        figures["half"] = 1
        return [][0]

    def sound(day, figures, sentences):
        sentences.append("all well")

    entries, printed = day([Part("smoke", "broken", 1, broken), Part("smoke", "sound", 1, sound)])
    assert entries["smoke: broken"]["status"] == "failed" and entries["smoke: broken"]["figures"] == {
        "half": 1
    }
    assert "| until then all was well |" in printed.out and "| all well |" in printed.out
    assert "| IndexError: list index out of range |" in printed.out


def test_what_takes_too_long_is_stopped_and_comes_last_the_next_time(day):
    order = []

    def endless(day, figures, sentences):
        order.append("endless")
        day.run(*SLEEP)

    def quick(day, figures, sentences):
        order.append("quick")

    start = time.monotonic()
    entries, printed = day([Part("speed", "endless", 1 / 60, endless), Part("speed", "quick", 1, quick)])
    assert time.monotonic() - start < 30 and order == ["endless", "quick"]
    assert entries["speed: endless"]["status"] == "failed"
    assert "Failed: -m timeit -n1 -r1 'import time; time.sleep(60)' was stopped" in printed.out
    later = [Part("speed", "endless", 1 / 60, endless), Part("speed", "new", 1, quick)]
    day(later)
    assert order[2:] == ["quick", "endless"]


def test_what_the_end_of_the_day_cuts_off_is_the_first_to_be_done_again(day):
    order = []

    def long(day, figures, sentences):
        order.append("long")
        if len(order) == 1:
            day.run(*SLEEP)

    def failing(day, figures, sentences):
        order.append("failing")
        raise Failed("no")

    # a part begins only if there are five seconds for it
    entries, printed = day(
        [Part("speed", "long", 9, long), Part("speed", "failing", 9, failing)], "--minutes=0.1"
    )
    assert entries["speed: long"]["status"] == "no time" and order == ["long"]
    assert "the time is up; the same command goes on" in printed.err
    day([Part("speed", "failing", 9, failing)])
    day([Part("speed", "failing", 9, failing), Part("speed", "long", 9, long)])
    assert order == ["long", "failing", "long", "failing"]


def test_ctrl_c_stops_the_process_that_runs(tmp_path):
    flags = ["--size=tiny", "--device=cpu", "--stages=smoke", f"--out_dir={tmp_path / 'out'}"]
    command = [sys.executable, "benchmarks/gpu_day.py", *flags, f"--json={tmp_path / 'day.json'}"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if line.startswith("smoke: float32 ..."):
            break
    time.sleep(1)  # its train.py is starting
    process.send_signal(signal.SIGINT)
    assert "interrupted" in process.communicate(timeout=20)[1]
    others = subprocess.run(["pgrep", "-f", f"train.py.*{tmp_path}"], capture_output=True, text=True)
    assert process.returncode and not others.stdout


class Understood(Exception):
    """A script of the project would take this command line."""


@pytest.mark.parametrize("size", ["124m", "tiny"])
@pytest.mark.parametrize("peers", [True, False])
def test_every_script_takes_the_command_lines_that_it_is_given(tmp_path, monkeypatch, peers, size):
    (tmp_path / compare_modded.SCRIPT).parent.mkdir(parents=True)
    for name in ("model.py", compare_modded.SCRIPT):
        (tmp_path / name).touch()
    (tmp_path / "meta.json").write_text('{"encoding": "gpt2", "vocab_size": 50257, "eot_token": 50256}')
    argv = [f"--size={size}", f"--out_dir={tmp_path}", "--minutes=60"]
    if peers:
        argv += [f"--nanogpt={tmp_path}", f"--modded={tmp_path}"]
    configs = {"train.py": TrainConfig, "bench.py": BenchConfig, "steps.py": StepsConfig}
    configs |= {"compare_modded.py": CompareConfig, "candidates.py": CandidatesConfig}
    configs |= {"sampling.py": BenchmarkConfig}
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(hardware, "pick_dtype", lambda asked, device: ("bfloat16", ""))
    monkeypatch.setattr(hardware, "available_memory", lambda device: 11e9)
    monkeypatch.setattr(hardware, "device_name", lambda device: "a card")
    monkeypatch.setattr(gpu_day, "has_fp8", lambda device: True)
    cfg = configure(gpu_day.DayConfig, argv)
    day = gpu_day.Day(cfg, torch.device("cuda"), {})
    day.dataset = str(tmp_path)
    figures = dict(losses={"0": 1.0}, tokens_per_s=1e5)
    day.entries["smoke: bfloat16"] = dict(
        status="done", asked=gpu_day.asked_of("smoke", day), figures=figures
    )
    used = set()
    trained = []

    def run(script, *argv, **options):
        name = script.rpartition("/")[2]
        if name != "-m pytest":
            configure(configs[name], list(argv))
        if name == "train.py":
            trained.append(argv[0])
        used.add(name)
        raise Understood

    monkeypatch.setattr(day, "run", run)
    for part in gpu_day.parts_of(day):
        with pytest.raises(Understood):
            part.work(day, {}, [])
    assert trained.count(day.size.modern) == (1 if size == "124m" else len(trained))
    assert used == {*configs, "-m pytest"} - (set() if peers else {"steps.py"})


def test_what_bench_says_before_it_ends_with_an_error_is_a_figure(day, monkeypatch):
    """As where not even its one micro-batch fits: the JSON file is there, and the exit status is 1."""

    def run(self, script, *argv, **options):
        path = next(arg for arg in argv if arg.startswith("--json=")).removeprefix("--json=")
        with open(path, "w") as f:
            json.dump(dict(rows=[dict(status="out of memory")]), f)
        return "", "error: no row fits into memory", 1

    monkeypatch.setattr(gpu_day.Day, "run", run)
    part = Part("speed", "gpt2, 64", 1, lambda *given: gpu_day.bench(*given, config="x.py", batch_size=64))
    entry = day([part])[0]["speed: gpt2, 64"]
    assert entry["status"] == "done" and entry["sentences"] == ["out of memory"]


def test_tests_that_fail_are_a_failed_part(day, tmp_path, monkeypatch):
    file = tmp_path / "test_gpu.py"
    part = Part("tests", "values", 1, lambda *given: gpu_day.gpu_tests(*given, file=str(file)))
    file.write_text("(")
    entry = day([part])[0]["tests: values"]
    assert entry["status"] == "failed" and entry["figures"]["status"] != 0


def test_what_a_stopped_process_had_written_is_kept(day, tmp_path):
    script = tmp_path / "endless.py"
    script.write_text("import time\nprint('test_quick PASSED', flush=True)\ntime.sleep(100)\n")
    part = Part("tests", "values", 0.1, lambda day, figures, sentences: day.run(str(script)))
    entry = day([part])[0]["tests: values"]
    assert entry["status"] == "failed" and entry["figures"]["output"] == ["test_quick PASSED"]


def test_memory_that_lacks_beside_nanogpt_is_a_figure_and_an_error_is_not(day, monkeypatch):
    part = Part("speed", "beside nanoGPT, 8", 1, lambda *given: gpu_day.beside_nanogpt(*given, batch_size=8))
    errors = ["steps.py ended with 1: no module named x", "steps.py ended with 1: CUDA out of memory. Tried"]

    def measured(self, *argv):
        raise Failed(errors.pop(0))

    monkeypatch.setattr(gpu_day.Day, "measured", measured)
    assert day([part])[0]["speed: beside nanoGPT, 8"]["status"] == "failed"
    entry = day([part])[0]["speed: beside nanoGPT, 8"]
    assert entry["status"] == "done" and entry["sentences"] == ["memory is not enough for all three"]


def test_the_first_stage_on_a_cpu(byte_data, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", ENV["OMP_NUM_THREADS"])  # for train.py, as in the other tests
    flags = ["--size=tiny", "--device=cpu", "--stages=smoke", f"--out_dir={tmp_path / 'out'}"]
    flags.append(f"--dataset={byte_data}")  # instead of preparing one
    gpu_day.main([*flags, f"--json={tmp_path / 'day.json'}"])
    parts = json.loads((tmp_path / "day.json").read_text())["parts"]
    assert [(title, entry["status"]) for title, entry in parts.items()] == [
        ("smoke: float32", "done"),
        ("smoke: recipe", "done"),
        ("smoke: resume", "done"),
    ], capsys.readouterr().out
    figures = parts["smoke: float32"]["figures"]
    assert list(figures["losses"]) == [str(i) for i in range(30)]
    assert 5.7 < figures["losses"]["0"] < 5.8  # ln 320
    assert figures["losses"]["29"] < 4 and figures["attention"] == "FLASH_ATTENTION"
    assert figures["tokens_per_s"] > 0 and figures["warnings"] == []
    # a CPU resumes to the bit; the log has four digits
    assert parts["smoke: resume"]["figures"]["difference"] == 0
    assert not (tmp_path / "out/run").exists()


def test_losses_that_do_not_fall_fail():
    class Broken:
        def train(self, *argv):
            return figures_of_a_run("".join(line.format(i) for i in range(9)), "")

    line = "iter {}: loss nan, time 1.00ms, mfu 9.00%, 1 TFLOP/s, 1,000 tok/s, norm nan, lr 1\n"
    sentences = []
    with pytest.raises(Failed, match="the loss does not fall"):
        gpu_day.train_thirty(Broken(), {}, sentences, "config.py", "bfloat16")
    assert "loss nan to nan, 1,000 tokens/s, MFU 9.0%" in sentences[0]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--batch_sizes=0"], "batch_sizes='0' must be positive numbers"),
        (["--json=nowhere/x.json"], "json is to be written into nowhere, and there is no such folder"),
        (["--nanogpt=nowhere"], "nanogpt='nowhere' has no model.py; give a checkout"),
        (["--stages=smoke,speeed"], "stages has speeed; there are smoke, "),
    ],
)
def test_what_would_fail_later_is_refused_at_once(flags, message, capsys):
    with pytest.raises(SystemExit):
        gpu_day.main(["--device=cpu", *flags])
    assert message in capsys.readouterr().err


def test_data_that_are_not_ready_in_time_are_one_line(tmp_path, monkeypatch):
    def late(self, *argv, **options):
        raise Failed("stopped as the time was up: prepare_fineweb.py")

    monkeypatch.setattr(gpu_day.Day, "run", late)
    with pytest.raises(UserError, match="stopped as the time was up: prepare_fineweb.py"):
        gpu_day.main(["--device=cpu", f"--out_dir={tmp_path}", f"--json={tmp_path / 'day.json'}"])
