"""
Draw one or several runs, while they train or afterwards.

    python plot.py                                      # the newest run, into its folder as run.png
    python plot.py out out-2 --out=both.svg
    python plot.py out --html=run.html                  # a page that shows values, settings and samples
    python plot.py out --text=True --watch=10           # in the terminal, every 10 s until Ctrl-C

A run is the out_dir of train.py, or a copy of its metrics.jsonl. Without --text it
needs pip install '.[plot]'.
"""

import os
import shutil
import sys
import time
from dataclasses import dataclass

from configurator import Config, from_command_line, key, run_script
from sologpt.figures import FORMATS, terminal_text, write_picture
from sologpt.files import newest, unwritable
from sologpt.history import NothingYet, find_metrics, read_history
from sologpt.page import write_page


@dataclass
class PlotConfig(Config):
    arguments = "[FOLDER ...] [FILE.py ...]"

    out: str = key(
        "", ".png or .svg to write; empty: run.png in the first folder, unless html or text is given"
    )
    html: str = key("", "page to write: one file that needs no network")
    text: bool = key(False, "draw the loss in the terminal")
    over: str = key("tokens", "the horizontal axis", choices=("tokens", "iterations", "hours"))
    reference: str = key("", "published runs to compare with, over tokens", choices=("", "gpt2_124m"))
    watch: float = key(0.0, "draw again after this many seconds, until Ctrl-C; 0: draw once", low=0, high=1e6)

    def problems(self):
        """Returns messages about conflicting values."""
        found = []
        if self.out and os.path.splitext(self.out)[1] not in FORMATS:
            found.append(f"out must end in {' or '.join(FORMATS)}, not {self.out!r}; a page is --html=")
        if self.html and not self.html.endswith(".html"):
            found.append(f"html is the page to write, as in --html=run.html, not {self.html!r}")
        for name in ("out", "html"):
            found += unwritable(name, getattr(self, name))
        if self.reference and self.over != "tokens":
            found.append(
                f"reference needs over='tokens', not {self.over!r}: the published runs had other batches"
            )
        return found


def split_arguments(argv):
    """Returns (folders of runs, everything else) of a command line."""
    folders = [arg for arg in argv if is_run(arg)]
    return folders, [arg for arg in argv if not is_run(arg)]


def is_run(argument):
    if os.path.exists(argument):
        return not argument.endswith(".py") or os.path.isdir(argument)
    return not argument.startswith("-") and "=" not in argument and not argument.endswith(".py")


def draw(folders, cfg):
    """Reads the runs, writes the files that cfg asks for and prints what it has written."""
    histories = [read_history(folder) for folder in folders]
    for history in histories:
        if history.skipped:
            text = f"lines of metrics.jsonl left out as damaged or of an unknown kind: {history.skipped:,}"
            print(f"warning: {history.name}: {text}", file=sys.stderr)
    picture = cfg.out
    if not (cfg.out or cfg.html or cfg.text):
        picture = os.path.join(os.path.dirname(find_metrics(folders[0])), "run.png")
    written = []
    if picture:
        write_picture(histories, picture, cfg.over, cfg.reference)
        written.append(picture)
    if cfg.html:
        write_page(histories, cfg.html, cfg.over, cfg.reference)
        written.append(cfg.html)
    if cfg.text:
        show(histories, cfg)
    for path in written:
        print(f"{path}: {os.path.getsize(path) / 1e6:.2f} MB")


def show(histories, cfg):
    """Prints the losses of the runs; on a terminal that is watched, in place of what was there."""
    terminal = sys.stdout.isatty()
    width = shutil.get_terminal_size().columns
    color = terminal and "NO_COLOR" not in os.environ
    texts = [terminal_text(history, cfg.over, width, color) for history in histories]
    if terminal and cfg.watch:
        print("\033[H\033[J", end="")  # to the corner, and clear
    print("\n\n".join(texts))


def main(argv):
    folders, rest = split_arguments(argv)
    cfg = from_command_line(PlotConfig, __doc__, rest)
    if not folders:
        folders = [os.path.dirname(newest(["metrics.jsonl"], "name its folder"))]
        print(f"drawing {folders[0]}", file=sys.stderr)
    drawn = None
    while True:
        try:
            changed = [os.stat(find_metrics(folder)).st_mtime_ns for folder in folders]
            if changed != drawn:
                drawn = changed
                draw(folders, cfg)
        except (NothingYet, FileNotFoundError) as e:  # moved aside by a run that begins
            if not cfg.watch:
                raise
            print(f"{e}; waiting", file=sys.stderr)
        if not cfg.watch:
            return
        time.sleep(cfg.watch)


if __name__ == "__main__":
    run_script(main)
