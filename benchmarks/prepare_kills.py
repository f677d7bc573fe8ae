"""
Kills prepare_fineweb.py (kill -9) at random moments and starts it again, until it has been killed --kills
times; then lets it finish, and compares every file with those of a run that was left alone.

    python benchmarks/prepare_kills.py --input=FOLDER [--kills=20] [--seed=0] [any option of
    prepare_fineweb.py]
"""

import argparse
import hashlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def start(folder, options):
    argv = [sys.executable, os.path.join(ROOT, "prepare_fineweb.py"), *options, f"--out_dir={folder}"]
    return subprocess.Popen(argv, stdout=subprocess.DEVNULL, start_new_session=True)


def contents(folder):
    found = {}
    for name in sorted(os.listdir(folder)):
        with open(os.path.join(folder, name), "rb") as f:
            found[name] = hashlib.sha256(f.read()).hexdigest()
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args, options = parser.parse_known_args()
    moments = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        if start(f"{folder}/whole", options).wait():
            raise SystemExit("the run that is left alone failed")
        alone = time.perf_counter() - began
        spent, kills, finished = 0.0, 0, 0
        while kills < args.kills:
            moment = moments.uniform(0, 0.6 * alone)
            process, began = start(f"{folder}/killed", options), time.perf_counter()
            try:
                process.wait(moment)
                finished += 1  # before its moment came: the next one begins from nothing
                if contents(f"{folder}/killed") != contents(f"{folder}/whole"):
                    raise SystemExit(f"after {kills} kills the files differ")
                os.rename(f"{folder}/killed", f"{folder}/finished{finished}")
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.wait()
                kills += 1
                there = sorted(os.listdir(f"{folder}/killed")) if os.path.exists(f"{folder}/killed") else []
                print(
                    f"kill {kills} after {moment:.2f} s: "
                    f"{len([n for n in there if n.endswith('.bin')])} shards there"
                )
            spent += time.perf_counter() - began
        if start(f"{folder}/killed", options).wait():
            raise SystemExit("the last run failed")
        same = contents(f"{folder}/killed") == contents(f"{folder}/whole")
        print(
            f"{kills} kills, {finished + 1} finished folders, "
            f"{len(contents(f'{folder}/whole'))} files each: ",
            end="",
        )
        print("every sha256 equals that of the run left alone" if same else "THE FILES DIFFER")
        raise SystemExit(not same)
