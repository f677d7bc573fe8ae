"""
Configuration: precedence, types, what is refused and how it is said.
Reference: the rules written by hand here.
Run: pytest tests/test_configurator.py
"""

import math
import re
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
from conftest import ENV
from hypothesis import given
from hypothesis import strategies as st

from bench import BenchConfig
from configurator import Config, ConfigError, configure, key, usage
from prepare_fineweb import PrepareConfig
from sample import SampleConfig
from train import TrainConfig

ROOT = Path(__file__).parent.parent


@dataclass
class Toy(Config):
    steps: int = key(10, "steps to take", low=1)
    rate: float = key(0.5, "fraction", low=0, below=1)
    share: float = key(1.0, "fraction", above=0, high=1)
    fast: bool = key(True, "hurry")
    name: str = key("toy", "what to call it")
    kind: str = key("a", "which", choices=("a", "b"))


def errors(argv, cls=Toy):
    with pytest.raises(ConfigError) as e:
        configure(cls, argv)
    return str(e.value).splitlines()


def write(folder, text, name="toy.py"):
    path = folder / name
    path.write_text(text)
    return str(path)


def test_later_settings_win_from_left_to_right(tmp_path):
    first, second = write(tmp_path, "steps = 20\nrate = 0.25"), write(tmp_path, "steps = 30", "b.py")
    assert configure(Toy, []) == Toy()
    assert configure(Toy, [first, second]).steps == 30
    assert configure(Toy, [second, first]).steps == 20
    assert configure(Toy, ["--steps=40", first]).steps == 20
    config = configure(Toy, [first, "--steps=40"])
    assert (config.steps, config.rate, config.given) == (40, 0.25, {"steps", "rate"})


def test_values_keep_their_type_and_may_hold_an_equals_sign():
    config = configure(Toy, ["--rate=0", "--name=a=b=c", "--fast=False", "--steps=1_000"])
    assert (config.rate, config.name, config.fast, config.steps) == (0.0, "a=b=c", False, 1000)
    assert type(config.rate) is float
    assert configure(Toy, ["--name=42"]).name == "42"
    assert configure(Toy, ["--name="]).name == ""
    assert configure(Toy, ["--name='x'"]).name == "x"
    assert configure(Toy, ['--name="Yes," he said. "No."']).name == '"Yes," he said. "No."'


@pytest.mark.parametrize(
    "argument, message",
    [
        ("--steps=1.5", "--steps: steps needs an int, not '1.5'"),
        ("--steps=True", "--steps: steps needs an int, not 'True'"),
        ("--steps=0", "--steps: steps must be at least 1, not 0"),
        (f"--steps={2**63}", "--steps: steps is too large: torch and numpy count up to 2**63 - 1"),
        ("--rate=1", "--rate: rate must be below 1, not 1.0"),
        ("--share=0", "--share: share must be above 0, not 0.0"),
        ("--share=1.5", "--share: share must be at most 1, not 1.5"),
        ("--rate=nan", "--rate: rate needs a finite number, not nan"),
        ("--fast=1", "--fast: fast needs a bool, not '1'; write True or False"),
        ("--kind=c", "--kind: kind must be 'a' or 'b', not 'c'"),
        ("--stepz=3", "--stepz: unknown key 'stepz' (did you mean 'steps'?)"),
        ("steps=3", "steps=3: write --steps=3"),
        ("-steps=3", "-steps=3: write --steps=3"),
        ("--fast", "--fast: write --fast=True"),
        ("--no-fast", "--no-fast: write --fast=False"),
        ("--steps", "--steps: write --steps=VALUE"),
        ("--step", "--step: unknown key 'step' (did you mean 'steps'?); keys are written --key=value"),
        ("nowhere.py", "cannot read the config file nowhere.py: No such file or directory"),
    ],
)
def test_a_wrong_argument_is_explained(argument, message):
    assert errors([argument]) == [message]


def test_a_value_after_a_space_is_one_problem_not_two():
    assert errors(["--steps", "5", "--fast", "False", "--step", "5"]) == [
        "--steps 5: write --steps=5",
        "--fast False: write --fast=False",
        "--step: unknown key 'step' (did you mean 'steps'?); keys are written --key=value",
    ]


def test_all_problems_are_reported_at_once_with_file_and_line(tmp_path):
    path = write(tmp_path, "import math\n\nsteps = 'ten'\nrat = 0.1\n_scratch = 5\nfast = 1\n")
    assert errors([path, "--kind=z", "--nam=x"]) == [
        f"{path}:3: steps needs an int, not 'ten' (a str)",
        f"{path}:4: unknown key 'rat' (did you mean 'rate'?); "
        f"a name of your own may begin with an underscore",
        f"{path}:6: fast needs a bool, not 1 (an int)",
        "--kind: kind must be 'a' or 'b', not 'z'",
        "--nam: unknown key 'nam' (did you mean 'name'?)",
    ]


def test_a_config_of_another_script_is_one_problem(tmp_path):
    names = [f"other_{letter}" for letter in "abcdef"]
    text = "".join(f"{name} = 1\n" for name in names)
    [error] = errors([write(tmp_path, text + "steps = 'x'\nrate = 2.0\n")])
    assert "toy.py sets 6 names that are no keys of this script; is it a config of another one?" in error
    # but each by itself, with its line, if most names are keys, or few are not
    assert len(errors([write(tmp_path, text.replace("other_f = 1\n", ""))])) == 5


@pytest.mark.parametrize("text", ['"a" "b"', '"yes" # maybe', '"a"\n', "'tis", '"a"+"b"', '"', '"a', "'a\\'"])
def test_a_text_that_only_begins_with_a_quote_is_as_it_is(text):
    assert configure(Toy, [f"--name={text}"]).name == text


def test_the_line_of_a_problem_is_that_of_the_last_assignment(tmp_path):
    path = write(tmp_path, "if steps > 4:\n    steps = 'x'\nsteps = 'y'\ndef f():\n    rate = 'z'\n")
    assert errors([path]) == [f"{path}:3: steps needs an int, not 'y' (a str)"]
    inside = write(tmp_path, "def f():\n    rate = 2.0\nsteps = 3\n")
    assert configure(Toy, [inside]).given == {"steps"}


def test_numbers_too_long_to_print_are_explained_too(tmp_path):
    path = write(tmp_path, "name = 10 ** 5000\nsteps = 10 ** 5000\nrate = 10 ** 5000\nfast = 'x' * 9999\n")
    assert errors([path]) == [
        f"{path}:1: name needs a str, not so large a number (an int)",
        f"{path}:2: steps is too large: torch and numpy count up to 2**63 - 1",
        f"{path}:3: rate is too large for a float",
        f"{path}:4: fast needs a bool, not '{'x' * 99} (a str)",
    ]


def test_a_config_file_is_python_that_sees_the_values_so_far(tmp_path):
    text = "import math\ndef half(x): return x / 2\nclass Helper: pass\n"
    text += "steps = steps * 2\nrate = half(math.cos(0))"
    config = configure(Toy, ["--steps=21", write(tmp_path, text)])
    assert (config.steps, config.rate) == (42, 0.5)


def test_a_config_file_cannot_change_the_caller(tmp_path):
    path = write(tmp_path, "name = __name__\n_leak = 1\nfields = None\n")
    [error] = errors([path])
    assert error == f"{path}:3: unknown key 'fields'; a name of your own may begin with an underscore"
    assert callable(fields) and "_leak" not in globals()


def test_imported_names_are_no_keys_but_those_of_a_loop_are(tmp_path):
    text = "from math import pi, tau as t\nimport os.path\nrate = pi / 10\n"
    assert configure(Toy, [write(tmp_path, text)]).rate == pytest.approx(0.314159, abs=1e-6)
    # a module with the name of a key, as json is one of bench.py's
    assert configure(Toy, [write(tmp_path, "import json as name")]).name == Toy.name
    [error] = errors([write(tmp_path, "import json\nname = json")])
    assert ":2: name needs a str, not <module" in error
    path = write(tmp_path, "for i in range(3):\n    steps = 10 + i\n")
    [error] = errors([path])
    assert error == f"{path}:1: unknown key 'i'; a name of your own may begin with an underscore"
    assert configure(Toy, [write(tmp_path, "for _i in range(3):\n    steps = 10 + _i\n")]).steps == 12


def test_a_name_that_is_imported_and_assigned_to_is_not_ignored(tmp_path):
    path = write(tmp_path, "from math import pi as speed\nspeed = 5e-4\n")
    [error] = errors([path])
    assert error.startswith(f"{path}:2: unknown key 'speed'")


def test_a_key_that_a_config_file_imports_or_gives_a_function_is_not_ignored(tmp_path, monkeypatch):
    (tmp_path / "shared_by_runs.py").write_text("steps = 7\nrate = 0.25\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    path = write(tmp_path, "from shared_by_runs import rate, steps\nsteps = steps * 2\n")
    config = configure(Toy, [path])
    assert (config.rate, config.steps) == (0.25, 14)
    path = write(tmp_path, "def total():\n    return 5\n\nsteps = total\n")
    [error] = errors([path])
    assert error.startswith(f"{path}:4: steps needs an int, not <function total")


@pytest.mark.parametrize(
    "text",
    [
        "from shared_by_runs import *",
        "from shared_by_runs import steps",
        "with open(_path) as _f:\n    exec(_f.read())",
        "exec('steps = 7')",
        "globals()['steps'] = 7",
        "globals().update(steps=7)",
        "globals().update([('steps', 7)])",
        "def _set():\n    globals()['steps'] = 7\n\n_set()",
    ],
)
def test_a_key_is_given_however_a_config_file_sets_it_also_to_its_default(tmp_path, monkeypatch, text):
    path = tmp_path / "shared_by_runs.py"
    path.write_text("steps = 7\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "shared_by_runs", raising=False)
    text = f"_path = {str(path)!r}\n{text}\n"
    config = configure(Toy, ["--steps=7", "--rate=0.25", write(tmp_path, text)])
    assert config.steps == 7 and config.given == {"steps", "rate"}
    config = configure(Toy, [write(tmp_path, text)])
    assert config.given == {"steps"}
    assert configure(Toy, [write(tmp_path, "_rate = rate\n")]).given == frozenset()


def test_an_expression_that_is_too_long_is_one_line(tmp_path):
    for text in (f"steps = {'-' * 200_000}1", f"steps = {'1+' * 50_000}1"):
        path = write(tmp_path, text)
        assert errors([path]) == [f"{path}: an expression in it is too long for Python"]


def test_a_dash_of_a_word_processor_is_taken_for_what_it_was():
    for dash in "–—−":
        assert errors([f"{dash}steps=3"]) == [f"{dash}steps=3: write --steps=3"]
        assert errors([f"{dash}{dash}steps", "3"]) == [f"{dash}{dash}steps 3: write --steps=3"]
        assert errors([f"{dash}{dash}steps", f"{dash}{dash}rate=0.3"]) == [
            f"{dash}{dash}steps: write --steps=VALUE",
            f"{dash}{dash}rate=0.3: write --rate=0.3",
        ]


def test_saved_values_are_taken_if_they_could_be_given():
    saved = dict(steps=9.0, rate=0, fast="yes", name="x", other=3)
    config = Toy().with_saved(saved)
    assert (config.steps, config.rate, config.fast, config.name) == (9, 0.0, Toy().fast, "x")
    for steps, rate in ((0, math.nan), (2.5, math.inf), (10**400, 10**400), (True, None), ([], {})):
        assert Toy().with_saved(dict(steps=steps, rate=rate)) == Toy()


def test_a_value_that_is_not_utf8_is_refused_and_one_that_is_comes_through_any_locale():
    assert errors(["--name=caf\udce9"]) == [
        "--name: name is not UTF-8 text: unexpected end of data at byte 3"
    ]
    assert configure(Toy, ["--name=caf\udcc3\udca9"]).name == "café"  # as a locale without é passes it on


def test_a_config_file_is_utf8_whatever_its_comments_say(tmp_path):
    assert configure(Toy, [write(tmp_path, "# --encoding=bytes\nname = 'ü'")]).name == "ü"
    (tmp_path / "latin.py").write_bytes(b"name = '\xfc'")
    assert errors([str(tmp_path / "latin.py")])[0].endswith(
        "can't decode byte 0xfc in position 8: invalid start byte"
    )


@pytest.mark.parametrize(
    "text, message",
    [
        ("steps = = 3", ":1: invalid syntax"),
        ("steps = 1\nrate = oops", ":2: NameError: name 'oops' is not defined"),
        (
            "rate = np.sqrt(4)",
            ":1: NameError: name 'np' is not defined; a config file imports what it uses",
        ),
        ("steps = 1 / 0", ":1: ZeroDivisionError: division by zero"),
        ("steps = 1\0", ":1: source code string cannot contain null bytes"),
        ("raise SystemExit('no')", ":1: SystemExit: no"),
    ],
)
def test_a_broken_config_file_names_its_line(tmp_path, text, message):
    path = write(tmp_path, text)
    assert errors([path]) == [path + message]


def test_a_number_of_numpys_is_a_float_and_any_float_is_no_int(tmp_path):
    path = write(tmp_path, "import numpy as np\nrate = 3e-4 * np.sqrt(4)")
    rate = configure(Toy, [path]).rate
    assert type(rate) is float and rate == 6e-4
    assert errors([write(tmp_path, "steps = 1e3")]) == [f"{path}:1: steps needs an int, not 1000.0 (a float)"]


def test_true_in_a_config_file_is_no_number_and_a_number_is_not_true(tmp_path):
    path = write(tmp_path, "steps = True\nrate = True\nfast = 1")
    assert errors([path]) == [
        f"{path}:1: steps needs an int, not True (a bool)",
        f"{path}:2: rate needs a float, not True (a bool)",
        f"{path}:3: fast needs a bool, not 1 (an int)",
    ]


def test_a_script_that_execs_it_as_nanogpts_do_is_told_so(tmp_path):
    text = f"batch_size = 12\nexec(open({str(ROOT / 'configurator.py')!r}).read())\nprint(batch_size)\n"
    command = [sys.executable, write(tmp_path, text, "mine.py"), "--batch_size=3"]
    process = subprocess.run(command, capture_output=True, text=True, env=ENV)
    assert process.returncode == 1 and process.stdout == ""
    assert process.stderr.startswith("error: this configurator.py is not nanoGPT's")


def test_a_misspelt_file_name_is_guessed():
    assert "did you mean config/fineweb_125m.py?" in errors(["config/fineweb_124m.py"], TrainConfig)[0]
    assert "did you mean" not in errors(["train_gpt.py"], TrainConfig)[0]  # train.py is no config


def test_values_at_odds_are_reported_with_the_rest():
    found = errors(["--n_embd=770", "--device"], TrainConfig)
    assert found == [
        "--device: write --device=VALUE",
        "n_embd=770 is not divisible by n_head=12; set n_embd to 768 or 780, or change n_head",
    ]


@pytest.mark.parametrize("path", sorted(ROOT.glob("config/*.py")), ids=lambda path: path.name)
def test_every_config_of_ours_loads_and_its_token_arithmetic_holds(path):
    config = configure(TrainConfig, [str(path)])
    product = config.batch_size * config.gradient_accumulation_steps * config.block_size
    sizes = f"{config.batch_size} * {config.gradient_accumulation_steps} * {config.block_size}"
    text = path.read_text()
    compile(path.read_bytes(), path, "exec")  # as Python's own tools read it, coding cookies and all
    assert f"# {sizes} = {product:,} tokens per iteration" in text
    total = config.max_iters * product
    assert f"{config.max_iters:,} iterations of {product:,}" in text
    assert f"{total / 1e9:.1f}B tokens" in text or f"{total / 1e6:.1f}M tokens" in text


# nanoGPT's keys as its train.py and sample.py declare them, each with a value of its type
NANOGPT_TRAIN = """
import time
out_dir = 'out-x'; eval_interval = 5; log_interval = 1; eval_iters = 40; eval_only = False
always_save_checkpoint = False; init_from = 'gpt2-xl'
wandb_log = False; wandb_project = 'shakespeare'; wandb_run_name = 'ft-' + str(time.time())
dataset = 'shakespeare'; gradient_accumulation_steps = 5 * 8; batch_size = 1; block_size = 1024
n_layer = 12; n_head = 12; n_embd = 768; dropout = 0.0; bias = False
learning_rate = 3e-5; max_iters = 20; weight_decay = 1e-1; beta1 = 0.9; beta2 = 0.95; grad_clip = 1.0
decay_lr = False; warmup_iters = 2000; lr_decay_iters = 600000; min_lr = 6e-5
backend = 'gloo'; device = 'cuda'; dtype = 'float16'; compile = True
"""
NANOGPT_SAMPLE = """
init_from = 'resume'; out_dir = 'out'; start = 'x'; num_samples = 3; max_new_tokens = 5; temperature = 0.8
top_k = 200; seed = 1; device = 'cpu'; dtype = 'bfloat16'; compile = False
"""


@pytest.mark.parametrize("cls, text", [(TrainConfig, NANOGPT_TRAIN), (SampleConfig, NANOGPT_SAMPLE)])
def test_every_key_of_nanogpt_is_accepted(tmp_path, cls, text):
    configure(cls, [write(tmp_path, text)])


@pytest.mark.parametrize(
    "script, cls",
    [
        ("train.py", TrainConfig),
        ("sample.py", SampleConfig),
        ("prepare_fineweb.py", PrepareConfig),
        ("bench.py", BenchConfig),
    ],
)
def test_help_lists_every_key_and_a_wrong_key_exits_with_2(run, script, cls):
    shown = run(script, "--help")
    assert not shown.stderr and f"usage: python {script} " in shown.stdout
    listed = re.findall(r"^  --(\w+)=", shown.stdout, re.M)
    assert sorted(listed) == sorted(field.name for field in fields(cls))
    assert listed[0] == next(iter(cls.__annotations__))  # bench.py's own keys before train.py's
    for field in fields(cls):
        assert f"--{field.name}={field.default!r}" in shown.stdout and field.metadata["text"] in shown.stdout
    wrong = run(script, "--devise=cpu", status=2)
    assert not wrong.stdout
    hint = "" if cls is PrepareConfig else " (did you mean 'device'?)"
    expected = [f"--devise: unknown key 'devise'{hint}", f"python {script} --help lists every key"]
    assert wrong.stderr.splitlines() == expected


@pytest.mark.parametrize(
    "name, hint",
    [
        (
            "config/train_shakespeare_char.py",
            "did you mean config/shakespeare_char.py? (nanoGPT's own configs",
        ),
        (
            "config/train_gpt2.py",
            "nanoGPT's own configs run here: copy the file from github.com/karpathy/nanoGPT",
        ),
        ("config/nothing_like_it.py", "No such file or directory\n"),
    ],
)
def test_a_config_of_nanogpts_that_is_not_here_is_explained(name, hint):
    with pytest.raises(ConfigError) as error:
        configure(TrainConfig, [name])
    assert hint in f"{error.value}\n"


def test_usage_shows_choices_and_limits():
    shown = usage(Toy, "Doc.", "toy.py")
    assert "which ('a', 'b')" in shown and "fraction [>= 0, < 1]" in shown


words = st.one_of(
    st.text(max_size=12), st.sampled_from(["--", "--steps", "5", "--fast", "=", "-", "--no-name"])
)
settings = st.builds("--{}={}".format, st.sampled_from([f.name for f in fields(Toy)]), st.text(max_size=12))


@given(st.lists(st.one_of(words, settings), max_size=6))
def test_no_argument_list_raises_anything_but_a_config_error(argv):
    try:
        config = configure(Toy, argv)
    except ConfigError as e:
        assert str(e)
    else:
        assert all(type(getattr(config, f.name)) is f.type for f in fields(Toy))


@given(st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.booleans(), st.text())
def test_what_python_prints_is_what_is_set(i, x, flag, text):
    if not (2**63 > i >= 1 and 0 <= x < 1) or "\0" in text or text.startswith(("'", '"')):
        return
    config = configure(Toy, [f"--steps={i}", f"--rate={x}", f"--fast={flag}", f"--name={text}"])
    assert (config.steps, config.rate, config.fast, config.name) == (i, x, flag, text)


@pytest.mark.parametrize(
    "argument, hint",
    [
        ("--lr=3e-4", "unknown key 'lr' (did you mean 'learning_rate'?)"),
        ("--wd=0.1", "unknown key 'wd' (did you mean 'weight_decay'?)"),
        ("fineweb_125m", "did you mean config/fineweb_125m.py?"),
        ("config/fineweb125m.py", "did you mean config/fineweb_125m.py?"),
    ],
)
def test_what_other_programs_take_is_understood(argument, hint):
    with pytest.raises(ValueError, match=re.escape(hint)):
        configure(TrainConfig, [argument])
