"""
What holds for every file: importing it does nothing, the arrows between files point one way, and a
mistake of the user's is one line wherever it is noticed.
Run: pytest tests/test_layout.py
"""

import ast
import subprocess
import sys

import pytest
from conftest import ENV, ROOT

from configurator import run_script
from sologpt.errors import UserError

SCRIPTS = ["train", "sample", "prepare_fineweb", "bench", "plot"]
TOP = [*SCRIPTS, "model", "configurator"]
NOT_OURS_TO_IMPORT = ("__init__", "modeling_sologpt")  # the latter is text that an export copies
PATHS = sorted(ROOT.glob("sologpt/*.py"))
INSIDE = [f"sologpt.{path.stem}" for path in PATHS if path.stem not in NOT_OURS_TO_IMPORT]


def source(module):
    return (ROOT / (module.replace(".", "/") + ".py")).read_text()


def imports(module):
    """The first words of what a module imports, wherever in the file."""
    names = set()
    for node in ast.walk(ast.parse(source(module))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.partition(".")[0])
    return names


def test_the_top_level_shows_the_scripts_the_model_and_the_configurator():
    assert {path.stem for path in ROOT.glob("*.py")} == set(TOP)


def test_arrows_point_from_the_scripts_to_the_model_and_from_all_to_the_package():
    for module in INSIDE:
        assert not imports(module) & {*TOP, "benchmarks"}, module
    assert imports("model") & {*TOP, "sologpt"} == {"sologpt"}
    assert imports("configurator") & {*TOP, "sologpt"} == {"sologpt"}
    assert imports("bench") & {*TOP, "benchmarks"} == {"train", "model", "configurator"}
    for module in ("train", "sample", "prepare_fineweb", "plot"):
        assert not imports(module) & {*SCRIPTS, "benchmarks"}, module


def test_importing_any_file_does_nothing(tmp_path):
    """From a folder that is not the project's, as a notebook elsewhere would with the clone on its path. What
    only some runs need is not imported."""
    script = f"import sys, {', '.join([*TOP, *INSIDE])}; from model import GPT, GPTConfig"
    script += "; print({'wandb', 'trackio', 'tensorboard', 'plotly', 'transformers'} & set(sys.modules))"
    command = [sys.executable, "-c", script]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, env=ENV | {"PYTHONPATH": str(ROOT)})
    assert (process.returncode, process.stdout, process.stderr) == (0, b"set()\n", b"")
    assert not list(tmp_path.iterdir())


def test_a_mistake_of_the_users_is_one_line(capfd):
    def main(argv):
        raise UserError("what, why and which flag\nand a second line")

    with pytest.raises(SystemExit) as left:
        run_script(main, [])
    assert left.value.code == 1 and capfd.readouterr() == ("", "error: what, why and which flag\n")


@pytest.mark.parametrize("module", [*TOP, *INSIDE])
def test_a_mistake_of_the_users_is_no_plain_value_error(module):
    raised = [node for node in ast.walk(ast.parse(source(module))) if isinstance(node, ast.Raise)]
    assert "ValueError" not in {getattr(getattr(node.exc, "func", None), "id", None) for node in raised}


def test_a_fault_of_the_program_keeps_its_traceback():
    def main(argv):
        raise ValueError("ours")

    with pytest.raises(ValueError, match="ours"):
        run_script(main, [])


def test_whoever_reads_the_first_line_only_sees_no_error(byte_data, tiny, tmp_path):
    command = f"{sys.executable} {ROOT / 'train.py'} {' '.join(tiny)} --max_iters=300 | head -n 1"
    process = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, env=ENV)
    assert process.stdout.startswith("device:     cpu") and process.stderr == ""


def test_the_scripts_run_with_docstrings_stripped(tmp_path):
    command = [sys.executable, "-OO", str(ROOT / "train.py"), "--help"]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=ENV)
    assert process.returncode == 0 and "--batch_size=12" in process.stdout and not process.stderr
