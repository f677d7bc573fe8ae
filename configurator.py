"""
Configuration of a script: defaults < config file(s) < --key=value, applied left to right, typed and checked.

    python train.py config/fineweb_125m.py --learning_rate=6e-4

A script declares its keys as a dataclass, one `name: type = key(default, help)` a line, reads them in its
main(argv) with `cfg = from_command_line(TrainConfig, __doc__, argv)`, and ends in run_script(main). A config
file is plain Python: it runs in its own namespace, which starts with the values so far (so
`lr_decay_iters = max_iters` works), and may do whatever Python may. Run only files that you trust.
"""

if __name__ == "__main__":
    raise SystemExit(
        "error: this configurator.py is not nanoGPT's, and exec'ing it would set nothing; give your script a "
        "copy of nanoGPT's, or read its keys with from_command_line"
    )

import ast
import contextlib
import dataclasses
import difflib
import inspect
import math
import operator
import os
import re
import signal
import sys
import traceback

from sologpt.errors import UserError, out_of_memory

LIMITS = {  # arguments of key(): sign in --help, words in an error, the comparison that must hold
    "low": (">=", "at least", operator.ge),
    "above": (">", "above", operator.gt),
    "below": ("<", "below", operator.lt),
    "high": ("<=", "at most", operator.le),
}


DASHES = ("-", "\N{EN DASH}", "\N{EM DASH}", "\N{MINUS SIGN}")  # what word processors make of it
NANOGPTS = re.compile(r"(train|finetune|eval)_(gpt2|shakespeare)\w*\.py")  # its config files


def key(default, text, *, choices=(), low=None, above=None, below=None, high=None):
    """Returns a dataclass field with its --help text; choices and LIMITS (low, high inclusive) bound it."""
    metadata = dict(text=text, choices=choices, low=low, above=above, below=below, high=high)
    return dataclasses.field(default=default, metadata=metadata)


class Config:
    """Base class of a script's keys; `given` holds the names set in a config file or on the command line."""

    given = frozenset()
    overruled = ()  # names with other values than those given: a finetuned model's, a smaller micro-batch's
    synonyms = {}  # other programs' names of keys, to suggest ours
    arguments = "[FILE.py ...]"  # what may stand before the keys, for --help

    def problems(self):
        """Returns messages about conflicting values; overridden by each script's class."""
        return []

    def with_saved(self, saved):
        """Returns a copy with those values of saved, a dict of anything, that these keys may have."""
        values = {}
        for field in dataclasses.fields(self):
            value = saved.get(field.name)
            if field.type is int and type(value) is float and value.is_integer():  # nanoGPT's max_iters=1e5
                value = int(value)
            with contextlib.suppress(UserError):
                values[field.name] = convert(value, field)
        return dataclasses.replace(self, **values)


class ConfigError(UserError):
    """All that is wrong with a configuration, one problem a line."""


# -----------------------------------------------------------------------------
# one value


def convert(value, field):
    """Returns value in the field's type: an int, and NumPy's float64, become float, nothing else is
    converted. Raises UserError if invalid."""
    if field.type is float and (type(value) is int or isinstance(value, float)):
        try:
            value = float(value)
        except OverflowError:
            raise UserError(f"{field.name} is too large for a float") from None
    if type(value) is not field.type:
        raise UserError(
            f"{field.name} needs {with_article(field.type)}, not {shown(value)} ({with_article(type(value))})"
        )
    if field.type is int and abs(value) >= 2**63:
        raise UserError(f"{field.name} is too large: torch and numpy count up to 2**63 - 1")
    if field.type is float and not math.isfinite(value):
        raise UserError(f"{field.name} needs a finite number, not {value}")
    if field.type is str and "\0" in value:
        raise UserError(f"{field.name} must not contain a NUL character")
    limits = field.metadata
    if limits["choices"] and value not in limits["choices"]:
        raise UserError(f"{field.name} must be {' or '.join(map(repr, limits['choices']))}, not {value!r}")
    for name, (_, words, holds) in LIMITS.items():
        if limits[name] is not None and not holds(value, limits[name]):
            raise UserError(f"{field.name} must be {words} {limits[name]}, not {value}")
    return value


def shown(value):
    """Returns the repr of any value from a config file, cut short."""
    try:
        return repr(value)[:100]
    except ValueError:
        return "so large a number"  # Python prints no more than 4,300 digits


def parse(text, field):
    """Returns the value of --key=text, still to be checked by convert. Raises UserError for another type."""
    try:
        if field.type is bool:
            return {"True": True, "False": False}[text]
        if field.type is int:
            return int(text, 0)
        if field.type is float:
            return float(text)
        return unquote(os.fsencode(text).decode())  # UTF-8, whatever the locale made of it
    except UnicodeDecodeError as e:
        raise UserError(f"{field.name} is not UTF-8 text: {e.reason} at byte {e.start}") from None
    except (ValueError, KeyError):
        hint = "; write True or False" if field.type is bool else ""
        raise UserError(f"{field.name} needs {with_article(field.type)}, not {text!r}{hint}") from None


def unquote(text):
    """Returns a Python string literal's value, other text as it is: not every shell removes single quotes."""
    if not re.fullmatch(r"""(["'])(\\.|(?!\1)[^\\])*\1""", text, re.DOTALL):
        return text  # also a text that only begins with a quote
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def with_article(kind):
    """Returns a type's name with its article: an int."""
    return f"an {kind.__name__}" if kind.__name__[0] in "aeiou" else f"a {kind.__name__}"


def unknown(name, fields, synonyms):
    near = [synonyms[name]] if name in synonyms else difflib.get_close_matches(name, fields, n=1)
    if not near:
        return f"unknown key {name!r}"
    return f"unknown key {name!r} (did you mean {near[0]!r}?)"


# -----------------------------------------------------------------------------
# one file, one command line


def read_file(path, fields, values, synonyms):
    """Returns (new values, problems) of the config file at path, whose namespace starts with `values`."""
    try:
        namespace, lines = run_file(path, values)
    except ConfigError as e:
        return {}, [str(e)]
    new, problems = {}, []
    strangers = 0
    for name, value in sorted(namespace.items(), key=lambda item: lines.get(item[0], 0)):
        imported = inspect.ismodule(value) and name not in lines  # as json, a key of bench.py
        ignored = inspect.ismodule(value) or inspect.isroutine(value) or inspect.isclass(value)
        if name.startswith("_") or imported or (ignored and name not in fields):
            continue
        where = f"{path}:{lines[name]}" if name in lines else path
        try:
            if name not in fields:
                strangers += 1
                raise UserError(
                    f"{unknown(name, fields, synonyms)}; a name of your own may begin with an underscore"
                )
            if name in lines or name in namespace.assigned or value is not values[name]:
                new[name] = convert(value, fields[name])
        except UserError as e:
            problems.append(f"{where}: {e}")
    if strangers > max(5, len(new)):
        text = f"{path} sets {strangers} names that are no keys of this script"
        return {}, [f"{text}; is it a config of another one? (see --help for its keys)"]
    return new, problems


class Namespace(dict):
    """The namespace of a config file. assigned: all names that were set, even to the value they had, also by
    an import or by another file that it executes."""

    def __init__(self, values):
        super().__init__(values)
        self.assigned = set()

    def __setitem__(self, name, value):
        self.assigned.add(name)
        super().__setitem__(name, value)

    def update(self, values=(), **more):
        for name, value in dict(values, **more).items():
            self[name] = value


def run_file(path, values):
    """Returns (Namespace of the config file at path after its run, {name: line of its last assignment}).
    Raises ConfigError, with the line where there is one."""
    source = read_source(path)
    namespace = Namespace(values | dict(__name__="config", __file__=path))
    try:
        tree = ast.parse(source, path)
    except (SyntaxError, ValueError) as e:  # ValueError: a NUL character, before Python 3.11.4
        line = getattr(e, "lineno", None) or 1
        raise ConfigError(f"{path}:{line}: {getattr(e, 'msg', e)}") from None
    except (RecursionError, MemoryError):
        raise ConfigError(f"{path}: an expression in it is too long for Python") from None
    try:
        exec(compile(tree, path, "exec"), namespace)
    except (Exception, SystemExit) as e:  # whatever a user's file may raise
        lines = [frame.lineno for frame in traceback.extract_tb(e.__traceback__) if frame.filename == path]
        where = f"{path}:{lines[-1]}" if lines else path
        hint = ""
        if isinstance(e, NameError) and e.name in {"np", "torch", *sys.stdlib_module_names}:
            hint = "; a config file imports what it uses"  # in nanoGPT it has the imports of train.py
        raise ConfigError(f"{where}: {type(e).__name__}: {e}{hint}") from None
    lines = last_lines(tree)
    for name in (imported_names(tree) - lines.keys()) & namespace.keys() - values.keys():
        del namespace[name]
    return namespace, lines


def last_lines(tree):
    """Returns {name: the last line of a config file that assigns to it}, functions left out."""
    lines = {}
    nodes = list(tree.body)
    while nodes:
        node = nodes.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef)):
            continue
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            lines[node.id] = max(node.lineno, lines.get(node.id, 0))
        nodes.extend(ast.iter_child_nodes(node))
    return lines


def imported_names(tree):
    """Returns the names that the import statements of a config file bind."""
    nodes = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    return {(alias.asname or alias.name).partition(".")[0] for node in nodes for alias in node.names}


def read_source(path):
    """Returns the text of the config file at path. Raises ConfigError, which suggests a similar file name."""
    try:
        # as text: "--encoding=bytes" in a comment is no coding cookie
        with open(path, encoding="utf-8-sig") as f:
            return f.read()
    except ValueError as e:  # not UTF-8, or no path at all
        raise ConfigError(f"cannot read the config file {path!r}: {e}") from None
    except OSError as e:
        near = similar_file(path)
        hint = f"; did you mean {near}?" if near else ""
        if NANOGPTS.fullmatch(os.path.basename(path)):
            hint += " (nanoGPT's own configs run here: copy the file from github.com/karpathy/nanoGPT)"
        raise ConfigError(f"cannot read the config file {path}: {e.strerror}{hint}") from None


def similar_file(path):
    """Returns the path of a config file whose name is much like that of path, beside it or in config/; None
    if there is none."""
    folder, name = os.path.split(path)
    scripts = os.listdir(os.path.dirname(os.path.abspath(__file__)))
    for place in (folder, os.path.join(folder, "config")):
        names = os.listdir(place or ".") if os.path.isdir(place or ".") else []
        names = [n for n in names if n.endswith(".py") and n not in scripts]
        near = difflib.get_close_matches(name.removesuffix(".py") + ".py", names, n=1, cutoff=0.7)
        if near and name:
            return os.path.join(place, near[0])
    return None


def malformed(argument, following, fields, synonyms):
    """Returns (problem, whether the following argument is part of it) for an argument unlike --key=value."""
    name = argument.lstrip("".join(DASHES))
    if "=" in name:
        return f"{argument}: write --{name}", False
    bare = name.replace("-", "_")
    flag = bare.removeprefix("no_")
    if flag in fields and fields[flag].type is bool:
        negated = bare not in fields
        if not negated and following in ("True", "False"):
            return f"{argument} {following}: write --{bare}={following}", True
        return f"{argument}: write --{flag}={not negated}", False
    if bare not in fields:
        has_value = following is not None and not following.startswith(DASHES)
        has_value = has_value and not following.endswith(".py")
        return f"{argument}: {unknown(bare, fields, synonyms)}; keys are written --key=value", has_value
    if following is None or following.startswith(tuple(2 * dash for dash in DASHES)):
        return f"{argument}: write --{bare}=VALUE", False
    return f"{argument} {following}: write --{bare}={following}", True


def configure(cls, argv):
    """Returns an instance of cls: its defaults, changed by argv's files and --key=value, left to right.

    cls is a dataclass derived from Config whose fields are made by key(). Prints nothing. Raises ConfigError
    with every problem found: unreadable files, unknown keys, wrong types, values out of range or in conflict.
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}
    values = {name: f.default for name, f in fields.items()}
    given, problems = set(), []
    arguments = list(argv)
    while arguments:
        argument = arguments.pop(0)
        if argument.startswith("--") and "=" in argument:
            name, text = argument[2:].split("=", 1)
            try:
                if name not in fields:
                    raise UserError(unknown(name, fields, cls.synonyms))
                new = {name: convert(parse(text, fields[name]), fields[name])}
            except UserError as e:
                new = {}
                problems.append(f"--{name}: {e}")
        elif argument.startswith(DASHES) or ("=" in argument and not os.path.exists(argument)):
            new = {}
            following = arguments[0] if arguments else None
            problem, takes_next = malformed(argument, following, fields, cls.synonyms)
            problems.append(problem)
            if takes_next:
                del arguments[0]
        else:
            new, found = read_file(argument, fields, values, cls.synonyms)
            problems += found
        values.update(new)
        given.update(new)
    config = cls(**values)
    config.given = frozenset(given)
    problems += config.problems()
    if problems:
        raise ConfigError("\n".join(problems))
    return config


# -----------------------------------------------------------------------------
# the command line of a script


def usage(cls, doc, script):
    """Returns the --help text: the script's docstring, and every key's type, default, limits and meaning."""
    lines = [doc.strip(), "", f"usage: python {script} {cls.arguments} [--key=value ...]", "", "keys:"]
    own_first = sorted(dataclasses.fields(cls), key=lambda f: f.name not in cls.__annotations__)
    for f in own_first:
        text, limits = f.metadata["text"], f.metadata
        if limits["choices"]:
            text += f" ({', '.join(map(repr, limits['choices']))})"
        bounds = [f"{sign} {limits[name]}" for name, (sign, *_) in LIMITS.items() if limits[name] is not None]
        if bounds:
            text += f" [{', '.join(bounds)}]"
        lines.append(f"  --{f.name}={f.default!r}".ljust(40) + f" {f.type.__name__:5s} {text}")
    return "\n".join(lines)


def from_command_line(cls, doc, argv):
    """Returns configure(cls, argv). Exits with 0 after printing --help, with 2 after problems, on stderr."""
    script = os.path.basename(sys.argv[0])
    if "--help" in argv or "-h" in argv:
        print(usage(cls, doc or "", script))  # python -OO leaves no docstrings
        sys.exit(0)
    try:
        return configure(cls, argv)
    except ConfigError as e:
        print(f"{e}\npython {script} --help lists every key", file=sys.stderr)
        sys.exit(2)


def run_script(main, argv=None):
    """Runs main(argv), all that a script does; argv is that of the command line unless given.

    A mistake of the user's (UserError, OSError, not enough memory) is one line on stderr and exit status 1; a
    fault of the program keeps its traceback. Text is UTF-8 whatever the locale, each line of stdout written
    at once."""
    if argv is None:
        argv = sys.argv[1:]
    prepare_streams()
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # see the first lines of train.py
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main(argv)
    except BrokenPipeError:  # whoever read the output, `head` perhaps, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or flushing at the end fails again
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as e:
        if not isinstance(e, (UserError, OSError)) and not out_of_memory(e):
            raise
        message = str(e) or "not enough memory"
        print(f"error: {message}".partition("\n")[0], file=sys.stderr)
        sys.exit(1)


def prepare_streams():
    """Makes stdin, stdout and stderr UTF-8; each line of stdout is written at once."""
    open_closed_streams()
    options = dict(
        stdin=dict(errors="surrogateescape"),  # whoever encodes the text finds what is not UTF-8
        stdout=dict(errors="backslashreplace", line_buffering=True),
        stderr=dict(errors="backslashreplace"),
    )
    for name, how in options.items():
        if hasattr(getattr(sys, name), "reconfigure"):  # not in a notebook
            getattr(sys, name).reconfigure(encoding="utf-8", **how)


def open_closed_streams():
    """Gives a stream that was closed (`2>&-` in a shell) to the null device, so that writing to it does
    nothing and no file that is opened later gets its number, to which libraries may write."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))
