"""Files that exist whole or not at all: written under another name, synced to disk, then renamed. Folders
that belong to one process at a time."""

import contextlib
import glob
import hashlib
import os
import re
import shutil
import socket
import sys

from sologpt.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    import msvcrt


@contextlib.contextmanager
def atomic_file(path, previous=None):
    """Opens a temporary file to write bytes to; on success it is synced and renamed to path, else removed.

    What was at path becomes previous, if that is given: at every moment one of the two is there, and whole;
    where there are hard links, path always is.
    """
    partial = temporary_name(path)
    try:
        with open(partial, "wb") as f:
            yield f
            sync_and_rename(f, path, previous)
    except BaseException:
        remove(partial)
        raise


def temporary_name(path):
    """Returns the name under which this process writes a file until it is whole."""
    return f"{path}.{os.getpid()}.tmp"


def remove_temporary(path):
    """Removes what processes that were killed had not finished writing under temporary names of path."""
    for partial in [f"{path}.tmp", *glob.glob(f"{glob.escape(path)}.*.tmp")]:
        remove(partial)


def unwritable(key, path):
    """Returns messages, none or one, if the file that a key names cannot be written."""
    if os.path.isdir(path):
        return [f"{key}={path!r} is a folder; give a file in it"]
    folder = os.path.dirname(path)
    if folder and not os.path.isdir(folder):
        return [f"{key} is to be written into {folder}, and there is no such folder"]
    return []


def sync_and_rename(f, path, previous=None):
    """Syncs the open file f, which has a temporary name, to disk, then closes it and renames it to path."""
    f.flush()
    os.fsync(f.fileno())
    f.close()
    if previous and os.path.exists(path):
        keep_as(path, previous)
    os.replace(f.name, path)
    sync_folder(os.path.dirname(path) or ".")


def keep_as(path, previous):
    """Gives the file at path the name previous, too, or only that one where there are no hard links."""
    second_name = temporary_name(previous)
    try:
        os.link(path, second_name)
    except OSError:
        os.replace(path, previous)
        return
    try:
        os.replace(second_name, previous)
    finally:
        remove(second_name)  # still there if previous is that very file already


def sync_folder(folder):
    """Syncs the names in folder to disk, so that a power cut cannot undo a rename.

    Windows does so by itself. A file system that cannot is no reason to fail: the file itself is on disk.
    """
    if os.name == "posix":
        with contextlib.suppress(OSError):
            handle = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)


def remove(path):
    with contextlib.suppress(FileNotFoundError):
        os.remove(path)


def sha256_of(path):
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def newest(names, hint):
    """Returns the path of the youngest file of one of the names where configs put their runs: out/, out-mine/
    or out/mine/. Raises FileNotFoundError if there is none."""
    paths = []
    for name in names:
        paths += [*glob.glob(f"out*/{name}"), *glob.glob(f"out*/*/{name}")]
    # runs that a later one has moved aside
    paths = [path for path in paths if not re.fullmatch(r"earlier-\d+", path.split(os.sep)[-2])]
    if not paths:
        raise FileNotFoundError(f"no {names[0]} in out*/ or out*/*/: train a model, or {hint}")
    return max(paths, key=os.path.getmtime)


def make_folder(folder):
    """Makes a folder if need be. Raises UserError for a file, no name, and where a ~ is still there: no shell
    replaces one after `--out_dir=`, and the folder would be called that."""
    if not folder or os.path.isfile(folder):
        raise UserError(f"{os.fspath(folder)!r} is no folder to write into; name another one")
    if os.fspath(folder).startswith("~") and not os.path.isdir(folder):
        raise UserError(f"{folder}: the shell has left the ~ as it is; write {os.path.expanduser(folder)}")
    os.makedirs(folder, exist_ok=True)


def free_bytes(path):
    """Returns how much is free on the disk of a folder that need not be there yet."""
    folder = path
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder) or "."
    return shutil.disk_usage(folder).free


# -----------------------------------------------------------------------------
# a folder belongs to one process


@contextlib.contextmanager
def sole_use(folder):
    """Makes the folder if need be, and keeps other processes that ask for the same out of it until the `with`
    ends.

    The lock is the kernel's and ends with the process, however that dies; the file .lock only says whose it
    is. A folder that was made here and is still empty at the end is removed. Raises UserError, naming the
    other process, and OSError if the folder cannot be written.
    """
    made = not os.path.isdir(folder)
    make_folder(folder)
    path = os.path.join(folder, ".lock")
    f = open_lock(path, folder)
    try:
        f.truncate(0)
        f.write(f"process {os.getpid()} on {socket.gethostname()} ({os.path.basename(sys.argv[0])})")
        f.flush()
        yield
    finally:
        if os.name == "posix":  # before it is unlocked, so that nobody removes the file of another
            remove(path)
            f.close()
        else:
            f.close()
            with contextlib.suppress(OSError):
                os.remove(path)
        if made:
            with contextlib.suppress(OSError):  # it is not empty
                os.rmdir(folder)


def open_lock(path, folder):
    """Returns the file at path, open and locked."""
    while True:
        f = open(path, "a+", encoding="utf-8")
        if not lock(f):
            f.seek(0)
            owner = f.read() or "another process"
            f.close()
            raise UserError(f"{folder} is in use by {owner}; wait for it, or choose another --out_dir")
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(f.fileno()), os.stat(path)):
                return f
        f.close()  # whoever had it locked has removed the file meanwhile


def lock(f):
    """Locks an open file. Returns False if another process has locked it. A file system without locks, as
    some network ones are, is no reason not to train: that is a warning."""
    try:
        if os.name == "posix":
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            f.seek(2**20)  # beyond the text: on Windows nobody else can read what is locked
            msvcrt.locking(f.fileno(), msvcrt.LK_NBLCK, 1)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as e:
        print(f"warning: cannot lock {f.name}: {e}; start nothing else that writes there", file=sys.stderr)
    return True
