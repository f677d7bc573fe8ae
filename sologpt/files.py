"""Files that are whole or not there: written under another name, synced to disk, then renamed."""

import contextlib
import hashlib
import os


@contextlib.contextmanager
def atomic_file(path, previous=None):
    """Opens a temporary file for writing bytes; on success it is synced to disk and renamed to path, else
    removed.

    What was at path becomes previous, if that is given. At every moment one of the two is there, and whole.
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
    """Makes the open file f, so far under a temporary name, the file at path: first to disk, then the
    name."""
    f.flush()
    os.fsync(f.fileno())
    f.close()
    if previous and os.path.exists(path):
        os.replace(path, previous)
    os.replace(f.name, path)
    sync_folder(os.path.dirname(path) or ".")


def sync_folder(folder):
    """Puts the names in folder on disk, so that a power cut cannot undo a rename.

    Windows does so by itself. A file system that cannot is no reason to fail: the file itself is there.
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
