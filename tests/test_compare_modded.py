"""
benchmarks/compare_modded.py, with a script laid out like the one that it reads. Reference: train.py itself.
Run: pytest tests/test_compare_modded.py
"""

import json
import re
import sys

import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import compare_modded
from compare_modded import CompareConfig, Peer, Run, keys_of, new_ids, open_data, read_peer

from configurator import ConfigError, configure
from sologpt import hardware
from sologpt.errors import UserError

# a bigram model; what is outside of definitions and of the loop's beginning would fail
PEER = """
import torch
from torch import nn
from torch.nn import functional as F
import torch.distributed as dist

class GPT(nn.Module):
    def __init__(self, vocab_size, num_layers, model_dim):
        super().__init__()
        self.proj = nn.Embedding(vocab_size, vocab_size).bfloat16()
    def forward(self, inputs, targets):
        return F.cross_entropy(self.proj(inputs).flatten(0, 1), targets.flatten(), reduction="sum")

dist.init_process_group(backend="nccl")

for _ in range(num_trials):
    train_steps = 3250
    model.proj.weight.data.zero_()
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.5 / dist.get_world_size())]
    for group in optimizers[0].param_groups:
        group["initial_lr"] = group["lr"]
    def set_hparams(step):
        for group in optimizers[0].param_groups:
            group["lr"] = group["initial_lr"] * (1 - step / train_steps)
    raise RuntimeError("training begins")
"""
CPU = hardware.Machine(torch.device("cpu"), "float32", None, "")


@pytest.fixture
def modded(byte_data, tmp_path):
    script = tmp_path / "modded" / compare_modded.SCRIPT
    script.parent.mkdir(parents=True)
    script.write_text(PEER)
    return ["--modded=modded", "--dataset=toy", "--size=tiny", "--dtype=float32", "--device=cpu"]


def config(tmp_path, monkeypatch, argv):
    monkeypatch.chdir(tmp_path)
    return configure(CompareConfig, argv)


def test_the_peer_is_what_its_file_says_in_our_number_of_iterations(modded, tmp_path, monkeypatch):
    cfg = config(tmp_path, monkeypatch, [*modded, "--vocab=0"])
    run = Run("peer", 2.0, 10, 1)
    peer = Peer(cfg, keys_of(cfg, run), 320, run, CPU)
    tokens = torch.tensor([[1, 2, 3], [1, 2, 3]])
    assert peer.loss(tokens).item() == pytest.approx(4 * torch.tensor(320.0).log().item())
    peer.iteration(5, iter([tokens]), 1)
    weight = peer.model.proj.weight
    assert weight.dtype == torch.float32  # as --dtype says
    # two sequences, and half of the twofold rate: the gradient of a row is its probabilities less the target
    assert weight[1, 2].item() == pytest.approx(0.5 * 2 * (1 - 1 / 320))
    assert weight[1, 3].item() == pytest.approx(-0.5 * 2 / 320) and weight[3].abs().max() == 0


@pytest.mark.parametrize(
    "flags, message",
    [
        (
            ["--rates=", "--seeds=1,x"],
            "rates='' must be one or more numbers.*\nseeds='1,x' must be",
        ),
        (["--iters=10", "--parts=0.5"], "parts=0.5 of 10 iterations are too few to time"),
        (["--json=nowhere/x.json"], "json is to be written into nowhere, and there is no such folder"),
    ],
)
def test_what_would_fail_after_training_is_refused_before(modded, tmp_path, monkeypatch, flags, message):
    with pytest.raises(ConfigError, match=message):
        config(tmp_path, monkeypatch, [*modded, *flags])


def test_a_file_of_another_layout_is_refused(tmp_path):
    (tmp_path / "peer.py").write_text("for step in range(3):\n    pass\n")
    with pytest.raises(UserError, match="peer.py has no loop that defines set_hparams"):
        read_peer(str(tmp_path / "peer.py"), "float32")


def test_ours_is_what_train_does(modded, tmp_path, monkeypatch, run):
    cfg = config(tmp_path, monkeypatch, [*modded, "--vocab=0", "--eval_windows=12"])
    one = Run("ours", 2.0, 12, 7)
    found = compare_modded.train(cfg, one)
    keys = keys_of(cfg, one)
    same = "n_layer n_head n_embd block_size batch_size gradient_accumulation_steps learning_rate".split()
    same += "min_lr warmup_iters max_iters lr_decay_iters beta2 seed compile dtype".split()
    argv = [f"--{name}={getattr(keys, name)}" for name in same]
    recipe = ROOT / "config/fineweb_125m_fast.py"
    out = run("train.py", recipe, *argv, "--dataset=toy", "--device=cpu", "--eval_iters=1").stdout
    losses = [float(loss) for loss in re.findall(r"^step \d+: train loss .*, val loss ([\d.]+)", out, re.M)]
    assert [found["curve"][0][1], found["loss"]] == pytest.approx(losses, abs=6e-5)
    assert found["curve"][-1][0] == 12 * 4 * 2 * 32
    assert (keys.learning_rate, keys.max_iters) == (8e-3, 12)  # twice the config's
    # 1 % of the iterations to warm up, as in the config
    assert keys_of(cfg, Run("ours", 1.0, 300, 7)).warmup_iters == 3


def test_the_most_frequent_ids_stay_apart(modded, tmp_path, monkeypatch):
    cfg = config(tmp_path, monkeypatch, [*modded, "--vocab=3"])
    train, val, rows = open_data(cfg, 32)
    ids = new_ids(train, 3)
    # a space in six places of "pack my box with jugs now. ", and then "o", in two
    assert rows == 3 and ids[ord(" ")] == 0 and sorted(ids.tolist())[:3] == [0, 1, 2]
    assert val.read(val.spread(4)).max() == 2


def test_runs_are_made_once_and_shown(modded, run, tmp_path):
    few = ["--iters=20", "--rates=1", "--parts=0.5", "--seeds=1", "--models=peer,ours", "--vocab=0"]
    out = run("compare_modded.py", *modded, *few, "--json=found.json").stdout
    table = [line.split(" | ") for line in out.splitlines()[2:]]
    assert [row[0] for row in table] == ["| peer", "| ours", "| ours"]
    assert [row[2] for row in table] == ["0.01M", "0.01M", "0.00M"]
    before = (tmp_path / "found.json").read_text()
    assert len(json.loads(before)["runs"]) == 3
    assert run("compare_modded.py", *modded, *few, "--json=found.json").stdout == out
    assert (tmp_path / "found.json").read_text() == before


def one_fails(cfg, run):
    if run.seed == 2:
        raise RuntimeError("out of luck")
    return dict(model=run.model, rate=run.rate, iters=run.iters, seed=run.seed, curve=[], loss=1.0)


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_run_that_fails_takes_no_other_with_it(modded, tmp_path, monkeypatch, jobs):
    cfg = config(tmp_path, monkeypatch, [*modded, f"--jobs={jobs}", "--json=found.json"])
    results = compare_modded.Results(cfg, one_fails)
    runs = [Run("ours", 1.0, 10, seed) for seed in (1, 2, 3)]
    with pytest.raises(UserError, match=r"seed=2\): out of luck"):
        results.make(runs)
    kept = json.loads((tmp_path / "found.json").read_text())["runs"]
    assert sorted(entry["seed"] for entry in kept) == [1, 3]


def test_runs_of_another_recipe_are_not_taken_for_todays(modded, tmp_path, monkeypatch):
    cfg = config(tmp_path, monkeypatch, [*modded, "--json=found.json"])
    results = compare_modded.Results(cfg, one_fails)
    results.make([Run("ours", 1.0, 10, 1)])
    assert compare_modded.Results(cfg, one_fails).of(Run("ours", 1.0, 10, 1))
    content = json.loads((tmp_path / "found.json").read_text())
    assert content["about"]["recipes"]["ours"]["beta2"] == 0.99
    content["about"]["recipes"]["ours"]["beta2"] = 0.95
    (tmp_path / "found.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="runs of other settings or of another recipe"):
        compare_modded.Results(cfg, one_fails)
