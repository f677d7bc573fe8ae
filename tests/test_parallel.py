"""
Several processes, started by torchrun, with gloo on a CPU. Reference: the same run by one process.
Run: pytest tests/test_parallel.py
"""

import json
import math
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import ENV, ROOT, TINY, metrics, run_here, write_byte_data

from configurator import configure
from sologpt import checkpoint, fit, hardware, parallel, resume
from sologpt.errors import UserError
from train import Progress, TrainConfig

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
CPU = hardware.Machine(torch.device("cpu"), "float32", None, "")
ARGV = [*TINY.split(), "--gradient_accumulation_steps=4", "--eval_interval=10"]
ARGV += ["--max_iters=30", "--lr_decay_iters=30"]
MODERN = ["--arch=modern", "--optimizer=muon", "--learning_rate=2e-3"]

# what torchrun starts: train.py's main, several times, each with arguments and a fault that process 1 has in
# one of its forward passes in training, of which two are an iteration
SCRIPT = f"""
import itertools, json, os, signal, sys, time
from datetime import timedelta

sys.path.insert(0, {str(ROOT)!r})
import torch
import train
from configurator import run_script
from model import GPT
from sologpt import parallel, shards

forward, rank = GPT.forward, int(os.environ["RANK"])
join, dist = torch.distributed.init_process_group, torch.distributed
# one group for all runs: a second one would look for the first one's addresses
dist.init_process_group = lambda *args, **options: dist.is_initialized() or join(*args, **options)
destroy_process_group, dist.destroy_process_group = dist.destroy_process_group, lambda: None


def nan(loss):
    return loss * float("nan")


def full(loss):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.")


def full_in_update(loss):
    torch.nn.utils.get_total_norm = full
    return loss


def killed(loss):
    os.kill(os.getpid(), signal.SIGKILL)


def data(loss):
    raise shards.DataError("data/toy is gone")


def fault_of_ours(loss):
    raise KeyError("ours")


def hangs(loss):
    time.sleep(600)


for argv, name, at in json.loads(sys.argv[1]):
    calls = itertools.count(1)

    def faulty(self, idx, targets=None):
        logits, loss = forward(self, idx, targets)
        if name and self.training and rank == 1 and next(calls) == at:
            loss = globals()[name](loss)
        return logits, loss

    GPT.forward = faulty
    parallel.TIMEOUT = timedelta(seconds=8 if name == "hangs" else 60)
    run_script(train.main, argv)
group = dist.distributed_c10d._get_default_group()
destroy_process_group()
# or else its threads would sometimes abort the process at its end
assert sys.getrefcount(group) == 2, "something keeps the group of the processes"
del group
"""


def start(folder, runs):
    """Returns torchrun's process, which does these runs: arguments, the name of a fault, and its pass."""
    (folder / "script.py").write_text(SCRIPT)
    command = [*TORCHRUN, str(folder / "script.py"), json.dumps(runs)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    return subprocess.Popen(command, cwd=folder, text=True, env=ENV, **pipes)


def both(folder, argv, fault="", at=0):
    """Returns what two processes write to stdout and stderr in a run that fails."""
    with start(folder, [([*ARGV, *argv], fault, at)]) as process:
        out, errors = process.communicate(timeout=600)
    assert process.returncode == 1, out + errors
    return out, errors


def losses(folder):
    return [row["loss"] for row in metrics(folder, "iter")]


def weights(folder):
    return torch.load(folder / "ckpt.pt", weights_only=True)["model"]


def same_losses(folder, other, rel=1e-5):
    """Asserts that two runs have the same losses, of iterations and evaluations, to rounding."""
    assert losses(folder) == pytest.approx(losses(other), rel=rel)
    for name in ("train_loss", "val_loss"):
        found, expected = ([row[name] for row in metrics(of, "eval")] for of in (folder, other))
        assert found == pytest.approx(expected, rel=rel)


def same_weights(folder, other, tolerance):
    ours, theirs = weights(folder), weights(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(ours[name], theirs[name], rtol=0, atol=tolerance) for name in theirs)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with runs of two processes that both live to the end, and in one/ and modern_one/ of one."""
    folder = tmp_path_factory.mktemp("parallel")
    write_byte_data(folder)
    runs = [
        ([*ARGV, "--out_dir=gpt2"], "", 0),
        ([*ARGV, *MODERN, "--out_dir=modern"], "", 0),
        ([*ARGV, "--out_dir=parts", "--max_iters=10"], "", 0),
        ([*ARGV, "--out_dir=dropout", "--dropout=0.2", "--max_iters=12"], "", 0),
        ([*ARGV, "--out_dir=resumed", "--dropout=0.2", "--max_iters=7"], "", 0),
        ([*ARGV, "--out_dir=resumed", "--dropout=0.2", "--max_iters=12", "--init_from=resume"], "", 0),
        ([*ARGV, "--out_dir=nan", "--max_iters=4"], "nan", 4),
        ([*ARGV, "--out_dir=full"], "full", 6),
    ]
    with start(folder, runs) as process:
        out, errors = process.communicate(timeout=600)
    assert process.returncode == 0, out + errors
    (folder / "stdout").write_text(out)
    (folder / "stderr").write_text(errors)
    run_here(folder, "train.py", *ARGV, "--out_dir=one")
    run_here(folder, "train.py", *ARGV, *MODERN, "--out_dir=modern_one")
    return folder


# -----------------------------------------------------------------------------
# the same run


def test_one_process_is_as_it_was(folder, tmp_path, monkeypatch):
    write_byte_data(tmp_path)
    monkeypatch.setattr(torch.distributed, "init_process_group", None)
    monkeypatch.setattr(torch.distributed, "all_reduce", None)
    run_here(tmp_path, "train.py", *ARGV, WORLD_SIZE="1", RANK="0", LOCAL_RANK="0")
    assert losses(tmp_path / "out") == losses(folder / "one")
    same_weights(tmp_path / "out", folder / "one", tolerance=0)


def test_two_processes_train_as_one_does(folder):
    assert len(losses(folder / "gpt2")) == len(losses(folder / "modern")) == 30
    same_losses(folder / "gpt2", folder / "one")
    same_weights(folder / "gpt2", folder / "one", tolerance=1e-5)
    # Muon gives directions that the gradient hardly has, only by rounding, the weight of all others, and so
    # does AdamW, with an eps of 1e-10; with the gradients of half of the micro-batches 1e-2 to 1e-1 differ
    same_losses(folder / "modern", folder / "modern_one", rel=1e-3)
    # not yet in the first iterations, where those show already: by 5e-4 in the second, 4e-3 in the third
    assert losses(folder / "modern")[:4] == pytest.approx(losses(folder / "modern_one")[:4], rel=1e-5)


def test_only_the_first_process_writes(folder):
    out, errors = (folder / "stdout").read_text(), (folder / "stderr").read_text()
    assert out.count("iter 29: loss") == 3 and out.count("done: iteration 30") == 3
    first = out[: out.index("done:")]
    assert "no peak is known for cpu; 2 processes\n" in first
    assert "4 * 4 * 16 = 256 an iteration" in first and "2 micro-batches on each of 2 processes" in first
    assert re.search(r"iter 29: .* mfu n/a, .* tok/s of 2 processes,", first)
    warnings = [line for line in errors.splitlines() if line.startswith("warning:")]
    assert len(warnings) == 2  # one of nan, one of full
    assert not list(folder.glob("*/*.tmp")) and not list(folder.glob("*/.lock"))
    assert metrics(folder / "gpt2", "config")[0]["processes"] == 2


def test_a_run_goes_on_with_another_number_of_processes(folder):
    run_here(folder, "train.py", *ARGV, "--out_dir=parts", "--init_from=resume", "--max_iters=20")
    with start(folder, [([*ARGV, "--out_dir=parts", "--init_from=resume"], "", 0)]) as process:
        out, errors = process.communicate(timeout=600)
    assert process.returncode == 0 and "resuming from parts/ckpt.pt at iteration 20" in out, errors
    assert [row["processes"] for row in metrics(folder / "parts", "resume")] == [1, 2]
    assert losses(folder / "parts") == pytest.approx(losses(folder / "one"), rel=1e-5)


def test_dropout_differs_between_the_processes_and_a_resumed_run_draws_the_same(folder):
    assert losses(folder / "resumed") == losses(folder / "dropout")
    same_weights(folder / "resumed", folder / "dropout", tolerance=0)


# -----------------------------------------------------------------------------
# all do the same


def test_a_gradient_that_is_not_finite_in_one_process_is_no_update_in_any(folder):
    assert [row["iter"] for row in metrics(folder / "nan", "bad_step")] == [1]
    assert all(weight.isfinite().all() for weight in weights(folder / "nan").values())


def test_memory_that_runs_out_in_one_process_makes_all_batches_smaller(folder):
    smaller = "from iteration 2 on batch_size=2, gradient_accumulation_steps=8"
    assert f"out of memory with batch_size=4; {smaller}" in (folder / "stderr").read_text()
    same_losses(folder / "full", folder / "one")


def test_a_signal_ends_all_and_the_run_resumes(folder):
    argv = [*ARGV, "--out_dir=stopped", "--max_iters=3000", "--lr_decay_iters=30"]
    with start(folder, [(argv, "", 0)]) as process:
        next(line for line in process.stdout if line.startswith("iter 20:"))
        process.send_signal(signal.SIGTERM)
        asked = time.monotonic()
        out, errors = process.communicate(timeout=600)
    assert time.monotonic() - asked < 25 and process.returncode != 0
    assert "stopping; Ctrl-C again leaves without saving" in errors and "error:" not in errors
    at, command = re.search(r"stopped at iteration (\d+); continue with: (.*)", out).groups()
    assert command.startswith("torchrun --standalone --nproc_per_node=2 ")
    assert checkpoint.load(folder / "stopped/ckpt.pt")["iter_num"] == int(at) > 20
    run_here(folder, "train.py", *argv, "--init_from=resume", f"--max_iters={int(at) + 1}")
    assert len(losses(folder / "stopped")) == int(at) + 1


def test_kill_9_of_one_process_ends_the_others_within_seconds_and_loses_nothing(folder):
    with start(folder, [([*ARGV, "--out_dir=killed"], "killed", 25)]) as process:
        next(line for line in process.stdout if line.startswith("iter 11:"))
        start_of_end = time.monotonic()
        out, errors = process.communicate(timeout=600)
    assert time.monotonic() - start_of_end < 20 and process.returncode == 1
    lines = [line for line in errors.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and "another process has ended, or not answered for 60 s" in lines[0]
    assert "(killed/ckpt.pt holds iteration 12)" in lines[0]
    run_here(folder, "train.py", *ARGV, "--out_dir=killed", "--init_from=resume")
    same_losses(folder / "killed", folder / "one")
    same_weights(folder / "killed", folder / "one", tolerance=1e-5)


def test_an_error_of_one_process_ends_all_with_one_line(folder):
    _, errors = both(folder, ["--out_dir=data_error"], "data", 25)
    lines = [line for line in errors.splitlines() if line.startswith("error:")]
    assert lines == [
        "error: another process has failed: data/toy is gone (data_error/ckpt.pt holds iteration 12)"
    ]


def test_memory_that_runs_out_in_an_update_of_one_process_ends_all_and_no_weights_differ(folder):
    """The other one has made the update by then, and saves it."""
    _, errors = both(folder, ["--out_dir=update"], "full_in_update", 25)
    [line] = [line for line in errors.splitlines() if line.startswith("error:")]
    assert line.startswith("error: another process has failed: out of memory in the middle of an update")
    assert line.endswith("(update/ckpt.pt holds iteration 13)")
    run_here(folder, "train.py", *ARGV, "--out_dir=update", "--init_from=resume")
    same_losses(folder / "update", folder / "one")
    same_weights(folder / "update", folder / "one", tolerance=1e-5)


def test_a_process_that_hangs_is_given_up(folder):
    _, errors = both(folder, ["--out_dir=hangs"], "hangs", 25)
    first = next(line for line in errors.splitlines() if line.startswith("error:"))
    assert "another process has ended, or not answered for 8 s, or cannot be reached: " in first
    assert "(hangs/ckpt.pt holds iteration 12)" in first


def test_mistakes_are_said_once(folder):
    _, errors = both(folder, ["--gradient_accumulation_steps=3"])
    assert [line for line in errors.splitlines() if line.startswith("error:")] == [
        "error: gradient_accumulation_steps=3 counts the micro-batches of all 2 processes, so it must be a "
        "multiple of 2: --batch_size=3 --gradient_accumulation_steps=4"
    ]


# -----------------------------------------------------------------------------
# without processes


def test_without_torchrun_several_processes_are_refused(run, byte_data, tiny):
    assert (
        "start that many processes with torchrun" in run("train.py", *tiny, status=1, WORLD_SIZE="2").stderr
    )


def test_variables_of_torchrun_that_are_no_numbers_are_refused_in_one_line(run, byte_data, tiny):
    run("train.py", *tiny, "--max_iters=1", WORLD_SIZE="", LOCAL_WORLD_SIZE="")
    text = "error: {} in the environment must be a whole number, {} or more; correct or unset it\n"
    for wrong in ("abc", "0", "-1", "1.5"):
        out = run("train.py", *tiny, status=1, WORLD_SIZE=wrong)
        assert out.stderr == text.format(f"WORLD_SIZE={wrong}", 1)
    out = run("train.py", *tiny, status=1, WORLD_SIZE="2", RANK="x")
    assert out.stderr == text.format("RANK=x", 0)


def test_smaller_micro_batches_are_as_many_for_each_process(monkeypatch):
    assert fit.smaller_batch(6, 24) == (3, 8)
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert fit.smaller_batch(6, 24) == (3, 8)
    assert fit.smaller_batch(4, 24) == (2, 12)
    assert fit.smaller_batch(5, 20) == (1, 20)  # with 2 there would be 10


def test_each_process_takes_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda number: None)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert hardware.own_gpu(torch.device("cuda")) == torch.device("cuda", 1)
    with pytest.raises(UserError, match="leave --device out"):
        hardware.own_gpu(torch.device("cuda:0"))
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="torch sees 2"):
        hardware.own_gpu(torch.device("cuda"))


@pytest.mark.parametrize("other, peak", [(300e12, 400e12), (-math.inf, None)])
def test_mfu_is_measured_against_the_sum_of_the_cards(monkeypatch, other, peak):
    """A card that the table does not know has no peak: minus infinity in the sum, and then None, so n/a."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    for name in ("init_process_group", "all_reduce"):
        monkeypatch.setattr(torch.distributed, name, lambda *args, **options: None)
    monkeypatch.setattr(parallel, "combine", lambda tensors, op: tensors[0].add_(other))
    machine = hardware.Machine(torch.device("cpu"), "float32", 100e12, "device: one")
    joined = hardware.connect_processes(TrainConfig(gradient_accumulation_steps=4), machine)
    assert (joined.peak, joined.line) == (peak, "device: one; 2 processes")


def test_a_backend_that_cannot_work_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    machine = hardware.Machine(torch.device("cpu"), "float32", None, "")
    with pytest.raises(UserError, match="several processes on cpu need --device=cpu and --backend=gloo"):
        hardware.connect_processes(configure(TrainConfig, ["--backend=nccl"]), machine)


def test_the_masks_of_dropout_are_each_processs_own(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")

    def drawn(rank, iter_num):
        monkeypatch.setenv("RANK", str(rank))
        torch.manual_seed(1337)  # as set_up does in each of them
        progress = SimpleNamespace(iter_num=iter_num)
        checkpoint.start_rng(SimpleNamespace(cfg=TrainConfig(), machine=CPU, progress=progress))
        return tuple(torch.rand(4).tolist())

    found = {(rank, it): drawn(rank, it) for rank in range(3) for it in (5, 6)}
    assert found[0, 5] == found[0, 6]  # process 0 goes on from what it has
    assert len(set(found.values())) == 5 and drawn(2, 6) == found[2, 6]


def test_processes_that_would_not_do_the_same_are_refused(monkeypatch):
    sent = []  # what the processes before have said

    def all_reduce(numbers, op):
        assert op == parallel.MAX
        sent.append(numbers)
        return [max(of_all) for of_all in zip(*sent, strict=True)]

    def check(fingerprint, **keys):
        run = dict(cfg=TrainConfig(**keys), machine=CPU, fingerprint=fingerprint, progress=Progress())
        resume.check_alike(SimpleNamespace(**run))

    monkeypatch.setattr(parallel, "all_reduce", all_reduce)
    for _ in range(2):
        check(dict(a="1"))
    for other in (dict(fingerprint=dict(a="2")), dict(fingerprint=dict(a="1"), seed=5)):
        with pytest.raises(UserError, match="the processes differ in command, data or out_dir"):
            check(**other)
        sent.pop()
