"""
Files that exist whole or not at all: written under another name, synced to disk, then renamed.
"""

import contextlib
import hashlib
import os


@contextlib.contextmanager
def atomic_file(path, previous=None):
    """Opens a temporary file to write bytes to; on success it is synced and renamed to path, else removed.

    What was at path becomes previous, if that is given: at every moment one of the two is there, and whole.
    """
    partial = f"{path}.tmp"
    try:
        with open(partial, "wb") as f:
            yield f
            sync_and_rename(f, path, previous)
    except BaseException:
        remove(partial)
        raise


def sync_and_rename(f, path, previous=None):
    """Syncs the open file f, which has a temporary name, to disk, then closes it and renames it to path."""
    f.flush()
    os.fsync(f.fileno())
    f.close()
    if previous and os.path.exists(path):
        os.replace(path, previous)
    os.replace(f.name, path)
    sync_folder(os.path.dirname(path) or ".")


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
