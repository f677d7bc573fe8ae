"""
What preparing data survives: kills, sources that change, and folders that nobody has tidied up.

    python benchmarks/prepare_faults.py --input=FOLDER [--kills=20] [--rounds=20] [--seed=0] [any option of
    prepare_fineweb.py]

Kills: kill -9 at random moments while FOLDER is prepared, started again until it has been killed --kills
times; then it finishes, and every file is compared with those of a run that was left alone.
Changes: of a source of random texts, killed as well, one letter is exchanged: it must be refused, and go on
to the same files when the letter is back. Folders: trees of links in a circle, pipes, odd names, hidden and
empty files, in which every document must be found once. Each --rounds times.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
SMALL = ["--encoding=bytes", "--workers=1", "--shard_tokens=100000", "--val_tokens=20000"]
ODD_NAMES = ["a b", "[a-z]", "*", "new\nline", "'", '"', "ü", "\udcff", "--input=x", "a,b", "~", "$HOME", "."]


def start(options, folder):
    argv = [sys.executable, ROOT / "prepare_fineweb.py", *options, f"--out_dir={folder}"]
    return subprocess.Popen(
        argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def finish(process):
    """Returns the exit status of a process and the last line of its stderr; all of it with a traceback."""
    _, err = process.communicate()
    last = err.rstrip("\n").rpartition("\n")[2]
    return process.returncode, err if "Traceback" in err else last


def killed_after(process, seconds):
    """Returns whether process was killed at that time; else it has ended before."""
    try:
        process.communicate(timeout=seconds)
        return False
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.communicate()
        return True


def contents(folder):
    """Returns the sha256 of each file in a folder; meta.json without the times of its source's files."""
    found = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    if "meta.json" in found:
        meta = json.loads(found["meta.json"])
        meta.pop("source_times", None)
        found["meta.json"] = json.dumps(meta).encode()
    return {name: hashlib.sha256(data).hexdigest() for name, data in found.items()}


def alone(options, folder):
    """Prepares without any fault. Returns the contents of folder, and the seconds it took."""
    began = time.perf_counter()
    status, error = finish(start(options, folder))
    if status:
        raise SystemExit(f"the run that is left alone failed: {error}")
    return contents(folder), time.perf_counter() - began


def try_kills(folder, options, times, rng):
    """Returns how many preparations ended with other files, and how many there were."""
    expected, seconds = alone(options, folder / "alone")
    lost = kills = finished = 0
    while True:
        out = folder / f"killed{finished}"
        process = start(options, out)
        if kills < times and killed_after(process, rng.uniform(0, 0.6 * seconds)):
            kills += 1
            continue
        finish(process)
        finished += 1
        lost += contents(out) != expected
        if kills == times:
            return lost, finished


def write_texts(folder, rng):
    """Writes some files of random letters into folder. Returns their paths."""
    folder.mkdir(parents=True)
    for number in range(rng.randint(1, 8)):
        lines = [
            "".join(rng.choices("abcdefgh ", k=rng.randint(1, 3000))) for _ in range(rng.randint(1, 400))
        ]
        (folder / f"{number}.txt").write_text("\n\n".join(lines))
    return sorted(folder.iterdir())


def try_change(folder, rng):
    """Returns whether a source that has changed is refused, and one that is as before continued."""
    paths = write_texts(folder / "source", rng)
    options = [*SMALL, f"--input={folder / 'source'}", "--txt_documents=blank_line"]
    expected, _ = alone(options, folder / "alone")
    out = folder / "out"
    process = start(options, out)
    while process.poll() is None and not any(out.glob("*.bin")):
        time.sleep(0.002)  # without a whole shard there would be nothing to mix with
    killed_after(process, rng.uniform(0, 0.05))
    path = rng.choice(paths)
    before = path.read_bytes()
    place = rng.randrange(len(before))
    path.write_bytes(before[:place] + b"x" + before[place + 1 :])
    status, error = finish(start(options, out))
    if status != 1 or not error.startswith("error") or "source" not in error:
        print(f"LOST: a changed source ends with {status}: {error}", file=sys.stderr)
        return False
    path.write_bytes(before)
    status, error = finish(start(options, out))
    return status == 0 and contents(out) == expected


def grow(folder, rng, depth=0):
    """Fills a folder at random. Returns how many documents, of a line each, are in it."""
    folder.mkdir(parents=True)
    documents = 0
    for number in range(rng.randint(2, 6)):
        name = f"{number}{rng.choice(ODD_NAMES)}"
        kind = rng.choice(["text", "text", "text", "empty", "hidden", "other", "pipe", "link", "folder"])
        if kind == "text":
            lines = rng.randint(1, 30)
            (folder / f"{name}.txt").write_text("".join(f"{rng.random()}\n" for _ in range(lines)))
            documents += lines
        elif kind == "empty":
            (folder / f"{name}.txt").touch()
        elif kind == "hidden":
            (folder / f".{name}.txt").write_text("hidden\n")
        elif kind == "other":
            (folder / f"{name}.csv").write_text("a,b\n")
        elif kind == "pipe":
            os.mkfifo(folder / f"{name}.txt")
        elif kind == "link":
            visible = [path for path in folder.iterdir() if not path.name.startswith(".")]
            target = rng.choice([folder, *folder.parents[: depth + 1], *visible, folder / "gone"])
            (folder / f"{name}.txt").symlink_to(target)
        elif depth < 4:
            documents += grow(folder / name, rng, depth + 1)
    return documents


def try_folder(folder, rng):
    """Returns whether every document of an untidy folder was found once, within a minute."""
    expected = grow(folder / "source", rng)
    options = [*SMALL, f"--input={folder / 'source'}", "--txt_documents=line"]
    process = start(options, folder / "out")
    if killed_after(process, 60):
        print(f"LOST: {folder} took more than a minute", file=sys.stderr)
        return False
    if expected < 2:  # nothing for one of the two splits
        return process.returncode == 1
    meta = json.loads((folder / "out/meta.json").read_text())
    found = meta["train"]["documents"] + meta["val"]["documents"]
    if found != expected:
        print(f"LOST: {found} documents instead of {expected}", file=sys.stderr)
    return process.returncode == 0 and found == expected


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=20, help="of changes, and of folders")
    parser.add_argument("--seed", type=int, default=0)
    args, options = parser.parse_known_args()
    rng = random.Random(args.seed)
    total = 0
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        print("| fault | times | lost |\n|---|---|---|", flush=True)
        lost, finished = try_kills(folder / "kills", options, args.kills, rng)
        print(f"| kill -9, {finished} preparations in all | {args.kills} | {lost} |", flush=True)
        total += lost
        for name, attempt in (("a source changes", try_change), ("an untidy folder", try_folder)):
            lost = sum(not attempt(folder / name / str(number), rng) for number in range(args.rounds))
            print(f"| {name} | {args.rounds} | {lost} |", flush=True)
            total += lost
    raise SystemExit(total > 0)
