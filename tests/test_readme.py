"""
The README and docs/: the quick start runs, tables and claims are those of the project, links lead somewhere.
Run: pytest tests/test_readme.py
"""

import re
import shlex

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text()


def test_the_quick_start_runs_and_ends_in_text(run):
    """The commands of the README in their order, the training cut down to 60 of its iterations."""
    line = re.search(r"^python3 -m venv .*prepare_fineweb.*$", README, re.M)[0]
    commands = [shlex.split(command) for command in line.split(" && ") if command.startswith("python ")]
    assert [command[1] for command in commands] == ["prepare_fineweb.py", "train.py", "sample.py"]
    prepare, train, sample = (command[1:] for command in commands)
    run(*prepare)
    config = [ROOT / arg if arg.startswith("config/") else arg for arg in train]
    out = run(*config, "--max_iters=60", "--lr_decay_iters=60", "--warmup_iters=10", "--eval_iters=4")
    assert re.search(r"^step 0: train loss 5\.768", out.stdout, re.M)
    final = re.search(r"^step 60: train loss [\d.]+, val loss ([\d.]+)", out.stdout, re.M)
    assert float(final[1]) < 3.5
    text = run(*sample, "--max_new_tokens=30").stdout
    assert text.count("---------------\n") == 3 and text.startswith("def ")


def test_every_file_is_in_the_table():
    table = set(re.findall(r"^\| `(\w+\.py|\w+/)` \|", README, re.M))
    folders = {"config/", "tests/", "sologpt/", "benchmarks/", "docs/"}
    assert table == {path.name for path in ROOT.glob("*.py")} | folders
    assert all((ROOT / folder).is_dir() for folder in folders)


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md"), ROOT / "benchmarks/README.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_link_leads_somewhere(page):
    for target, _, anchor in re.findall(r"\]\((?!http)([^)#]*)(#([^)]+))?\)", page.read_text()):
        path = page.parent / target if target else page
        assert path.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", path.read_text(), re.M)
            assert anchor in {re.sub(r"[^\w -]", "", text.lower()).replace(" ", "-") for text in headings}, (
                anchor
            )


def test_the_readme_is_short_and_names_every_page():
    assert len(README.split()) <= 2000
    for page in ROOT.glob("docs/*.md"):
        assert f"(docs/{page.name})" in README, page.name


def test_every_config_is_in_the_table_with_its_tokens():
    for path in ROOT.glob("config/*.py"):
        row = re.search(rf"^\| `config/{path.name}` \|.*$", README, re.M)[0]
        product = re.search(r"# ([\d *]+ = [\d,]+) tokens per iteration", path.read_text())[1]
        total = re.search(r"# ([\d.]+[BM]) tokens:", path.read_text())[1]
        assert product in row and f"| {total} |" in row


def test_every_variable_that_turns_on_a_test_is_named():
    tests = "".join(path.read_text() for path in ROOT.glob("tests/*.py"))
    for name in re.findall(r'os\.environ\.get\("(\w+)"\)', tests):
        assert f"`{name}`" in README


def test_the_page_of_costs_is_what_its_script_prints(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import cost

    assert (ROOT / "docs/cost.md").read_text() == cost.page() + "\n"


def test_the_page_of_costs_by_hand(monkeypatch):
    """GPT-2 124M, 5.24B tokens: at 9.34 s for 524,288 tokens that is 10,000 * 9.344 s = 26 h."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import cost

    need = cost.needs(cost.settings_of(ROOT / "config/fineweb_125m.py"))
    assert need["tokens"] == 10_000 * 524_288
    # weights four times, best.pt's among them, and two moments three times, of 4 bytes
    assert need["checkpoints"] == pytest.approx(10 * 4 * 124_373_760, rel=1e-6)
    cards = {card.name: card for card in cost.CARDS}
    assert cost.cell(cards["RTX 4070"], "fineweb_125m.py", need, {}) == "26 h p"
    measured = {("NVIDIA GeForce RTX 4070", "fineweb_125m.py"): 1e12}
    assert cost.cell(cards["RTX 4070"], "fineweb_125m.py", need, measured) == "1245 h m"
    for device, config in (("NVIDIA GeForce RTX 4070 Ti", "fineweb_125m.py"), ("RTX 4070", "fineweb_40m.py")):
        measured = {(device, config): 1e12}
        assert cost.cell(cards["RTX 4070"], "fineweb_125m.py", need, measured) == "26 h p"
    # 25.5 TFLOP/s at 55 to 82 % of it
    assert cost.cell(cards["RTX 3060"], "fineweb_125m.py", need, {}) == "59 h to 89 h e"


def test_the_cells_of_the_notebook_page_are_commands_of_ours(run):
    text = (ROOT / "docs/notebook.md").read_text()
    assert text.count("```python") == 6
    commands = [shlex.split(line) for line in re.findall(r"^!python (.*)$", text, re.M)]
    assert [command[0] for command in commands] == ["prepare_fineweb.py", "train.py", "plot.py", "sample.py"]
    run(*commands[0])
    train = [ROOT / arg if arg.startswith("config/") else arg for arg in commands[1]]
    out = run(*train, "--max_iters=6", "--eval_iters=1", "--eval_interval=3", page=True).stdout
    assert "page:       out-quickstart/run.html" in out
    assert run(*commands[2]).stdout.startswith("out-quickstart/run.png")
    assert run(*commands[3], "--max_new_tokens=5").stdout.count("---------------") == 3
