"""
bench.py --hours: what a machine can train in a time, against arithmetic by hand and against train.py itself.
Run: pytest tests/test_budget.py
"""

import dataclasses
import json
import math
import re
import shlex
import subprocess
from types import SimpleNamespace

import pytest
from conftest import ROOT

import bench
from configurator import ConfigError, configure
from sologpt import budget, shards
from sologpt.errors import UserError
from sologpt.tokenizer import gpt2_tokenizer
from train import TrainConfig

SMALL = budget.Size(2, 2, 128, params=1_000_000, flops_per_token=6e6)
LARGE = budget.Size(4, 4, 256, params=4_000_000, flops_per_token=24e6)
FAST = budget.Speed(batch_size=8, micro_step=0.08, update=0.01, first=10.0)
SLOW = budget.Speed(batch_size=8, micro_step=0.32, update=0.04, first=20.0)


@pytest.mark.parametrize("arch, head", [("gpt2", 64), ("modern", 128)])
def test_a_shape_has_heads_that_divide_its_width(arch, head):
    assert budget.shape(768, arch) == (12, 768 // head, 768)  # GPT-2's smallest
    for width in budget.WIDTHS:
        n_layer, n_head, n_embd = budget.shape(width, arch)
        assert n_embd == width and width % n_head == 0 and n_layer >= 2
        assert width // n_head in (32, 64, 128)


def test_a_speed_between_two_is_on_the_power_law_through_them():
    middle = budget.Size(3, 3, 192, params=2_000_000, flops_per_token=12e6)
    speed = budget.interpolate(middle, [(LARGE, SLOW), (SMALL, FAST)])
    assert speed.micro_step == pytest.approx(0.16) and speed.update == pytest.approx(0.02)
    assert not speed.measured and speed.first == pytest.approx(10 * math.sqrt(2))
    assert budget.interpolate(SMALL, [(LARGE, SLOW), (SMALL, FAST)]).micro_step == pytest.approx(0.08)


def test_a_plan_by_hand():
    """1,015 s: 15 are for compiling, 3 % of 1,000 for eleven evaluations of 2 * 12 windows, at a third of
    10 ms each: 0.08 s."""
    plan = budget.plan(SMALL, FAST, 1015, block_size=100, most_sequences=512, most_eval_iters=200)
    # 100,000 sequences in 1,000 s are 2,000 iterations of 50: 6 micro-batches of 8
    assert (plan.keys["batch_size"], plan.keys["gradient_accumulation_steps"]) == (8, 6)
    assert plan.keys["eval_iters"] == int(30 / 11 / 0.08)
    evaluating = 11 * plan.keys["eval_iters"] * 0.08
    iters = int((1000 - evaluating) / (6 * 0.08 + 0.01))
    assert plan.tokens == iters * 48 * 100 and plan.ratio == plan.tokens / 1e6
    assert plan.rate == pytest.approx(48 * 100 / 0.49)
    assert plan.keys["eval_interval"] == math.ceil(iters / 10)
    # with more time iterations become as large as they may
    plan = budget.plan(SMALL, FAST, 1e6, block_size=100, most_sequences=512, most_eval_iters=200)
    assert (plan.keys["batch_size"], plan.keys["gradient_accumulation_steps"]) == (8, 64)
    # with little time, smaller than the micro-batch that was measured
    plan = budget.plan(SMALL, FAST, 75, block_size=100, most_sequences=512, most_eval_iters=200)
    assert (plan.keys["batch_size"], plan.keys["gradient_accumulation_steps"]) == (3, 1)


def test_a_plan_that_was_tried_by_hand():
    """1,015 s are 35 until the first iteration, ten evaluations of 2 s, and 1,600 iterations of 0.6 s."""
    planned = budget.plan(SMALL, FAST, 1015, block_size=100, most_sequences=512, most_eval_iters=200)
    plan = budget.as_tried(planned, budget.Trial(startup=35.0, iteration=0.6, evaluation=2.0), 1015)
    assert plan.iters == 1600 and plan.tokens == 1600 * 48 * 100 and plan.rate == pytest.approx(8000)
    assert plan.keys["eval_interval"] == 160 and plan.keys["warmup_iters"] == 80
    assert plan.keys["max_minutes"] == planned.keys["max_minutes"] and plan.keys["batch_size"] == 8


def test_the_width_with_twenty_tokens_for_each_parameter():
    """At 6 * N FLOPs a token, 1,000 s of 1.2e12 FLOP/s are 20 tokens for each of N parameters where
    120 * N**2 = 1.2e15, so N = 3.2M; with N = 12 * width**3 / 64 that is a width of 257."""

    def size_of(width):
        params = 12 * width**3 / 64
        return budget.Size(1, 1, width, params, 6 * params)

    assert budget.WIDTHS[budget.optimal(1.2e12, 1000, size_of)] == 256
    assert budget.optimal(1.0, 1.0, size_of) == 0
    assert budget.WIDTHS[budget.optimal(1e25, 1000, size_of)] == budget.WIDTHS[-1]


def test_hours_measures_and_its_command_trains(run, byte_data, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("bench.ROW_SECONDS", 0.1)
    monkeypatch.setattr("bench.TRIAL_SECONDS", 2.0)
    monkeypatch.setattr("sologpt.budget.FEW_TOKENS", 128)  # 4 * 2 * 16, the most in an iteration here
    (tmp_path / "mine.py").write_text("n_layer = 2; n_head = 2; n_embd = 32; warmup_iters = 2\n")
    flags = [flag for flag in tiny if not flag.startswith(("--n_", "--warmup", "--max_iters", "--lr_decay"))]
    out = run("bench.py", "mine.py", *flags, "--hours=0.001", "--json=hours.json").stdout
    assert "in 0.001 hours, compilation and evaluations included:" in out
    assert "note: without effect, as --hours chooses them: eval_interval\n" in out
    assert out.count("nearest to 20 tokens per parameter") == 1
    command = shlex.split(out.splitlines()[-1])
    assert command[:3] == ["python", "train.py", "mine.py"] and "--max_minutes=0.06" in command
    assert "--beta2=0.99" in command  # iterations this short have few tokens
    rows = json.loads((tmp_path / "hours.json").read_text())["rows"]
    widths = [row["size"]["n_embd"] for row in rows]
    assert widths == sorted(widths) and sum(row["speed"]["measured"] for row in rows) >= 2
    done = run(*command[1:]).stdout
    assert re.search(r"^done: iteration [\d,]+ after 0m\d\ds", done, re.M)


def enough_by_hand(plan):
    """Compilation, 20 s, and two evaluations of 12 windows of each split for each of eval_iters."""
    windows = 2 * 2 * 12 * plan.keys["eval_iters"]
    return 3 * FAST.first + 20 + windows * FAST.micro_step / FAST.batch_size / 3


def test_keys_that_would_end_train_at_once_do_not_reach_the_trial(tmp_path, monkeypatch):
    """And what it is given suffices for two evaluations and four iterations, however long they take."""
    commands = []

    def failing(command, **options):
        commands.append(command)
        raise UserError("seen")

    monkeypatch.setattr("subprocess.run", failing)
    plan = budget.plan(SMALL, FAST, 3600, 64, 8, 1)
    with pytest.raises(UserError, match="seen"):
        bench.run_trial(["--dry_run=True", "--eval_only=True"], plan, "data/toy", str(tmp_path))
    trained = configure(TrainConfig, commands[0][2:])
    assert not trained.dry_run and not trained.eval_only
    assert trained.max_minutes == pytest.approx(enough_by_hand(plan) / 60)
    slow = dataclasses.replace(plan, rate=plan.tokens / plan.iters / 60)  # an iteration a minute
    with pytest.raises(UserError, match="seen"):
        bench.run_trial([], slow, "data/toy", str(tmp_path))
    longer = configure(TrainConfig, commands[1][2:]).max_minutes
    assert longer == pytest.approx((enough_by_hand(plan) - 20 + 4 * 60) / 60) and longer < 60


def test_a_trial_that_the_system_kills_says_so(tmp_path, monkeypatch):
    killed = subprocess.CompletedProcess([], -9, stdout="", stderr="")
    monkeypatch.setattr("subprocess.run", lambda *args, **options: killed)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/metrics.jsonl").write_text('{"kind": "iter"}\n{"kin')
    plan = budget.plan(SMALL, FAST, 3600, 64, 8, 1)
    with pytest.raises(UserError, match="train.py ended with exit status -9: no output"):
        bench.run_trial([], plan, "data/toy", str(tmp_path))


def test_what_was_measured_is_printed_though_the_trial_fails(tmp_path, monkeypatch, capsys):
    killed = subprocess.CompletedProcess([], 1, stdout="", stderr="error: no space left")
    monkeypatch.setattr("subprocess.run", lambda *args, **options: killed)
    monkeypatch.setattr("bench.measure_around_optimum", lambda *args: ({64: FAST, 128: FAST}, [64, 128]))
    cfg = configure(bench.BenchConfig, ["--hours=300", "--device=cpu"])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="train.py ended with exit status 1: no space left"):
        bench.what_can_be_trained(cfg, [], print)
    out = capsys.readouterr().out
    assert "in 300 hours, by the sum of their parts, as the trial failed:\n" in out
    assert out.count("nearest to 20 tokens per parameter") == 1


def test_the_command_for_the_recommended_recipe_is_one_that_train_takes():
    cfg = configure(TrainConfig, [str(ROOT / "config/fineweb_125m_fast.py")])
    plan = budget.plan(SMALL, FAST, 3600, cfg.block_size, cfg.sequences_per_iter, cfg.eval_iters)
    flags = [f"--{name}={value}" for name, value in plan.keys.items()]
    assert configure(TrainConfig, [str(ROOT / "config/fineweb_125m_fast.py"), *flags]).max_minutes == 60


def test_widths_that_do_not_fit_leave_those_that_do(monkeypatch):
    cfg = configure(bench.BenchConfig, ["--hours=300", "--device=cpu"])
    monkeypatch.setattr(bench, "speed_of", lambda cfg, size, tell: FAST if size.n_embd <= 128 else None)

    def size_of(width):
        return budget.Size(1, 1, width, 12 * width**3 / 64, 72 * width**3 / 64)

    measured, widths = bench.measure_around_optimum(cfg, 3600 * 300, size_of, None)
    assert widths == [128] and list(measured) == [128]
    wrong = ["--hours=1", "--profile=True", "--sweep_batch_size=1"]
    with pytest.raises(ConfigError, match="leave sweep_batch_size out\nhours and profile exclude each other"):
        configure(bench.BenchConfig, wrong)


@pytest.mark.parametrize("status", [0, 1])  # 1: as if there were no room for its last checkpoint
def test_a_trial_is_what_its_metrics_say(tmp_path, monkeypatch, status):
    """10 s until the first iteration, of 5 s; three of 2 s; and an evaluation of 3 s."""
    rows = [dict(kind="eval", iter=0, elapsed=9.0), dict(kind="iter", iter=0, dt=5.0, elapsed=15.0)]
    rows += [dict(kind="iter", iter=i, dt=2.0, elapsed=15.0 + 2 * i) for i in (1, 2, 3)]
    rows.append(dict(kind="eval", iter=4, elapsed=24.0))

    def trained(command, **options):
        (tmp_path / "out").mkdir()
        (tmp_path / "out/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return subprocess.CompletedProcess(command, status, "", "")

    monkeypatch.setattr("subprocess.run", trained)
    plan = budget.plan(SMALL, FAST, 3600, 64, 8, 1)
    assert bench.run_trial([], plan, "data/toy", str(tmp_path)) == budget.Trial(10.0, 2.0, 3.0)


def test_random_data_has_the_windows_of_an_evaluation(tmp_path):
    cfg = configure(TrainConfig, ["--block_size=16", "--eval_iters=100"])
    folder = bench.random_dataset(str(tmp_path), cfg, gpt2_tokenizer())
    for windows in shards.open_splits(folder, 16, 50257):
        assert len(windows) == 1200


def test_the_plan_nearest_to_twenty_tokens_for_each_parameter_is_chosen():
    plans = [SimpleNamespace(ratio=ratio) for ratio in (0.5, 9.0, 43.0, 5000.0)]
    assert budget.nearest_to_optimal(plans).ratio == 43.0  # 43 / 20 is less than 20 / 9
