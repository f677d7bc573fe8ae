"""
benchmarks/candidates.py: its design against the algebra that it is chosen for, and without any candidate the
recipe itself. benchmarks/recipe.py: a ladder from GPT-2 to the recipe. benchmarks/repeated.py against
train.py. Run: pytest tests/test_candidates.py
"""

import dataclasses
import itertools
import json
import re
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import candidates
import compare_modded
import recipe
from candidates import CANDIDATES, Run, all_runs, effects, orthogonalized, signs
from compare_modded import Ours as Recipe
from compare_modded import keys_of

from sologpt import hardware, shards

CPU = hardware.Machine(torch.device("cpu"), "float32", None, "")


def test_no_effect_mixes_with_another_or_with_those_of_pairs():
    for count, n in ((21, 64), (16, 32), (8, 16), (6, 16), (4, 8)):
        design = signs(count)
        assert design.shape == (n, count) and (design.T @ design == n * np.eye(count)).all()
        assert (design.sum(0) == 0).all()
        for a, b in itertools.combinations(range(count), 2):
            assert (design.T @ (design[:, a] * design[:, b]) == 0).all()
    runs = all_runs(list(CANDIDATES), 400)
    assert len({run.parts for run in runs}) == 64
    for seed in range(16):
        alike = [run for run in runs if run.seed == seed]
        assert len(alike) == 4
        for name in CANDIDATES:
            assert sum(name in run.parts.split() for run in alike) == 2


def test_effects_are_found_again():
    entries = []
    for run in all_runs(list(CANDIDATES), 400):
        parts = run.parts.split()
        loss = 3 - 0.02 * ("gate" in parts) + 0.05 * ("no_smear" in parts)
        loss += 0.1 * run.seed + 0.001 * (len(entries) % 2)
        entries.append(dict(parts=run.parts, seed=run.seed, loss=loss))
    for some in (entries, entries[:58]):
        found = effects(list(CANDIDATES), some)
        for name, effect in dict(gate=-0.02, no_smear=0.05, scale=0.0).items():
            assert abs(found[name][0] - effect) < 3 * found[name][1] < 0.004


@pytest.mark.parametrize("names", [["no_head_decay"], ["gate", "no_smear"], ["gate", "no_smear", "scale"]])
def test_effects_of_few_candidates_are_found_too(names):
    runs = all_runs(names, 400)
    assert len(set(runs)) == len(runs) == 8 and len({run.seed for run in runs}) >= 2
    effect = dict(zip(names, (-0.02, 0.05, 0.0), strict=False))
    entries = []
    for run in runs:
        loss = 3 + 0.1 * run.seed + sum(effect[part] for part in run.parts.split())
        entries.append(dict(parts=run.parts, seed=run.seed, loss=loss))
    found = effects(names, entries)
    for name in names:
        assert found[name][0] == pytest.approx(effect[name], abs=1e-9)


class Small:
    size, compile, dtype, gpt2_learning_rate = "tiny", False, "float32", 2e-3


def test_without_candidates_it_is_the_recipe():
    run = Run("", 1, 20)
    keys = keys_of(Small, run)
    recipe = Recipe(Small, keys, 64, run, CPU)
    without = candidates.Ours(Small, keys, 64, run, CPU)
    without.model.load_state_dict(recipe.model.state_dict(), strict=False)
    for one in (recipe, without):
        one.model.double()  # AdamW and Muon make much of the last bit of a small gradient
    for it in range(3):
        batch = torch.randint(64, (2, 33))
        for one in (recipe, without):
            one.iteration(it, iter([batch]), 1)
    for name, p in recipe.model.named_parameters():
        torch.testing.assert_close(without.model.get_parameter(name), p, rtol=0, atol=1e-9)


class Windows:
    """A batch, as estimate_loss reads data."""

    def __init__(self, batch):
        self.batch = batch.numpy()

    def spread(self, count):
        return np.arange(count)

    def read(self, windows):
        return self.batch[windows]


@pytest.mark.parametrize("name", CANDIDATES)
def test_every_candidate_changes_the_run_and_learns(name):
    batch = torch.randint(64, (4, 33))
    losses = []
    for parts in ("", name):
        torch.manual_seed(0)
        run = Run(parts, 1, 20)
        keys = dataclasses.replace(keys_of(Small, run), warmup_iters=2)
        one = candidates.Ours(Small, keys, 64, run, CPU)
        for it in range(8):
            one.iteration(it, iter([batch]), 1)
        losses.append(one.evaluate(Windows(batch), 4, 4))
    assert losses[0] != losses[1] < 4


@pytest.mark.parametrize("n_head", [1, 6])  # 128 and 768 wide: there the head has the embedding's rate
def test_the_heads_own_settings_are_those_of_no_other_parameter(n_head):
    settings = []
    for parts in ("", "no_head_decay faster_head"):
        run = Run(parts, 1, 20)
        keys = dataclasses.replace(keys_of(Small, run), n_head=n_head, n_embd=128 * n_head)
        one = candidates.Ours(Small, keys, 64, run, CPU)
        names = {p: name for name, p in one.model.named_parameters()}
        groups = one.optimizers["optimizer"].param_groups
        kinds = {names[p]: (g.get("rate"), g["weight_decay"]) for g in groups for p in g["params"]}
        assert len(kinds) == sum(len(g["params"]) for g in groups)  # none twice
        settings.append(kinds)
    usual, changed = settings
    assert usual.pop("lm_head.weight") == (6 / n_head, 0.1)
    assert changed.pop("lm_head.weight") == (12 / n_head, 0.0)
    assert changed == usual


def test_other_coefficients_bring_all_singular_values_near_one():
    matrices = torch.linalg.svd(torch.randn(2, 48, 32), full_matrices=False)
    spread = torch.logspace(-2, 0, 32)
    found = orthogonalized(matrices.U * spread @ matrices.Vh, {"polar_express"})
    values = torch.linalg.svdvals(found)
    assert 0.85 < values.min() and values.max() < 1.15


def trained_rung(parts, batch, iters):
    torch.manual_seed(0)
    run = recipe.Run(parts, 1, 20)
    rung = recipe.Rung(Small, keys_of(Small, run), 64, run, CPU)
    for it in range(iters):
        rung.iteration(it, iter([batch]), 1)
    return rung


@pytest.mark.parametrize("model, parts", [("gpt2", 0), ("ours", len(recipe.PARTS))])
def test_the_ladder_goes_from_gpt2_to_the_recipe(model, parts):
    batch = torch.randint(64, (2, 33))
    rung = trained_rung(parts, batch, 3)
    torch.manual_seed(0)
    run = compare_modded.Run(model, 1.0, 20, 1)
    end = Recipe(Small, keys_of(Small, run), 64, run, CPU)
    for it in range(3):
        end.iteration(it, iter([batch]), 1)
    for name, p in end.model.named_parameters():
        assert torch.equal(rung.model.get_parameter(name), p)


def test_every_part_of_the_ladder_changes_the_run_and_learns():
    batch = torch.randint(64, (4, 33))
    rungs = [trained_rung(parts, batch, 8) for parts in range(len(recipe.PARTS) + 1)]
    losses = [rung.evaluate(Windows(batch), 4, 4) for rung in rungs]
    assert len(set(losses)) == len(losses) and max(losses) < 4.2

    names = list(recipe.PARTS)
    tied = [rung.model.lm_head.weight is rung.model.transformer.wte.weight for rung in rungs]
    assert tied == [parts <= names.index("head") for parts in range(len(rungs))]
    for part, parameter in dict(smear="smear", table="transformer.wve.weight").items():
        without = rungs[names.index(part)].model.get_parameter(parameter)
        assert torch.equal(without, trained_rung(names.index(part), batch, 0).model.get_parameter(parameter))


def test_tokens_to_a_loss_are_those_of_the_mean_curve():
    curves = [[(0, 6.0), (100, 4.0), (200, 3.0)], [(0, 6.0), (100, 4.0), (200, 1.0)]]
    assert recipe.tokens_to(3.0, curves) == 150
    assert recipe.tokens_to(1.9, curves) is None


def test_repeated_data_is_read_shifted_or_the_same(byte_data, tiny, tmp_path, run, spawn, monkeypatch):
    argv = [*tiny, "--schedule=wsd", "--block_size=128"]  # an epoch is 10 iterations and a half
    spawn("benchmarks/repeated.py", *argv, "--epochs=2", "--seeds=7", "--json=found.json")
    found = json.loads((tmp_path / "found.json").read_text())["runs"]
    losses = []
    for kind in ("shifted", "same"):
        monkeypatch.setattr(shards.Windows, "shifting", kind == "shifted")
        out = run("train.py", *argv, "--seed=7", "--max_iters=21", f"--out_dir={kind}").stdout
        losses += re.findall(r"^step 21: train loss ([\d.]+), val loss ([\d.]+)", out, re.M)
    assert losses == [(f"{entry['train_loss']:.4f}", f"{entry['val_loss']:.4f}") for entry in found]
    assert losses[0] != losses[1]
