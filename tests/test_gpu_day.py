"""
benchmarks/gpu_day.py, with stages that take no time: what is done again, and that a failure is a row.
Run: pytest tests/test_gpu_day.py
"""

import json
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu_day
from gpu_day import Failed, figures_of_a_run

from sologpt.errors import UserError


@pytest.fixture
def day(tmp_path, monkeypatch, capsys):
    """day(stage, '--key=value', ...) runs a day whose only stage, speed, is that function; returns its entry
    in the JSON file and what was printed."""

    def day(stage, *argv):
        monkeypatch.setitem(gpu_day.STAGES, "speed", stage)
        flags = ["--device=cpu", "--stages=speed", f"--dataset={tmp_path}", f"--out_dir={tmp_path / 'out'}"]
        gpu_day.main([*flags, f"--json={tmp_path / 'day.json'}", *argv])
        report = json.loads((tmp_path / "day.json").read_text())
        return report["stages"]["speed"], capsys.readouterr()

    return day


def test_a_stage_is_done_again_only_if_it_failed_or_something_else_was_asked_for(day):
    calls = []

    def stage(day, figures, sentences):
        calls.append(day.size.batch_sizes)
        sentences.append("fast")
        if len(calls) == 1:
            raise Failed("too slow")

    assert day(stage)[0]["status"] == "failed"
    assert day(stage)[0]["status"] == "done"
    entry, printed = day(stage)
    assert "speed is done already" in printed.err and "| speed, done | 0 | fast |" in printed.out
    assert len(calls) == 2
    day(stage, "--batch_sizes=4")
    day(stage, "--batch_sizes=4", "--modded=elsewhere")  # which this stage does not use
    assert calls[2:] == [(4,)]
    day(stage, "--size=tiny")
    day(stage, "--size=tiny", "--nanogpt=../nanoGPT")
    assert calls[3:] == [(2, 4), (2, 4)]


def test_whatever_goes_wrong_in_a_stage_is_a_row(day):
    def stage(day, figures, sentences):
        sentences.append("until then all was well")
        return [][0]

    entry, printed = day(stage)
    assert entry["status"] == "failed" and "| until then all was well |" in printed.out
    assert "| IndexError: list index out of range |" in printed.out


def test_tests_that_fail_are_a_failed_stage(day, tmp_path, monkeypatch):
    (tmp_path / "test_gpu.py").write_text("(")
    run = gpu_day.Day.run

    def run_broken(self, script, *argv):
        return run(self, script, *argv[:-1], str(tmp_path / "test_gpu.py"))

    monkeypatch.setattr(gpu_day.Day, "run", run_broken)
    entry, _ = day(gpu_day.tests)
    assert entry["status"] == "failed" and entry["figures"]["status"] != 0


def test_losses_that_are_not_finite_are_read():
    found = figures_of_a_run("step 20: train loss nan, val loss nan, nan bits/byte\n", "")
    assert list(found["val_losses"]) == [20]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--batch_sizes=0"], "batch_sizes='0' must be positive numbers"),
        (["--json=nowhere/x.json"], "json='nowhere/x.json': there is no such folder"),
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
