"""
The files that a preparation reads: which there are, each once, and whether they are still the same. They are
local, or each has an address like https://... or, on the hub, hf://...
"""

import collections
import contextlib
import errno
import glob
import hashlib
import http.client
import json
import os
import pathlib
import re
import sysconfig
import tempfile
import urllib.parse
import urllib.request

from tqdm import tqdm

from sologpt.errors import UserError, first_line
from sologpt.files import sha256_of

KINDS = (".parquet", ".arrow", ".jsonl", ".ndjson", ".json", ".csv", ".txt")
ENDINGS = KINDS + tuple(kind + packed for packed in (".gz", ".zst") for kind in KINDS[2:])
# what datasets.save_to_disk writes beside its .arrow files
ABOUT_ARROW = ("state.json", "dataset_info.json", "dataset_dict.json")
TIMEOUT = 60  # seconds that a server may be silent


def find_files(source, endings=ENDINGS):
    """Returns (files, passed over) of `source`, the --input of prepare_fineweb.py: paths in a fixed order,
    each real file once, and how many were not taken, a Counter by reason. endings: those that count in a
    folder.

    Raises FileNotFoundError if a part of the source has no file, UserError for an address that cannot be
    reached, and OSError for a folder that cannot be read, unless a pattern leads there.
    """
    passed_over = collections.Counter()
    if source == "stdlib":
        return standard_library(), passed_over
    parts = source.split(",")
    if os.path.exists(source):  # a file may have commas in its name
        parts = [source]
    found = []
    for part in parts:
        if is_address(part):
            status_of(part)
            matching = [part]
        elif os.path.isdir(part):
            matching = files_below(part, endings, passed_over)
        elif os.path.isfile(part):
            matching = [part]
        else:
            matching = matches(part, passed_over)
        if not matching:
            raise FileNotFoundError(f"--input={part}: {nothing_found(part, endings)}")
        found += sorted(matching)
    return each_once(found, passed_over), passed_over


def find_hub_files(repo, subset, split):
    """Returns the addresses of a dataset's files, pinned to its present revision, from the datasets library.
    Raises UserError if there is no such dataset, or its files are of a kind that is not read here."""
    import datasets

    try:
        # tries for half a minute to reach the hub
        builder = datasets.load_dataset_builder(repo, subset or None)
    except Exception as e:  # a wrong name, no network, ...
        raise UserError(f"cannot open {repo} {subset} (--repo, --subset): {first_line(e)}") from e
    found = builder.config.data_files or {}
    if split not in found:
        splits = ", ".join(map(str, found)) or "no files"
        raise UserError(f"{repo} {subset} has no split {split!r} (--split); it has {splits}")
    if not all(name.lower().endswith(ENDINGS) for name in found[split]):
        raise UserError(f"{repo} {subset} has files like {found[split][0]}; it reads {', '.join(ENDINGS)}")
    return list(found[split])


def nothing_found(part, endings):
    """Returns why a part of the source has no files, and what would help."""
    if not os.path.isdir(part):
        return f"no such file or folder with {', '.join(endings)} files"
    others = collections.Counter()
    for _, folders, names in os.walk(part):
        folders[:] = [name for name in folders if not is_hidden(name)]
        others.update(os.path.splitext(name)[1] for name in names if not is_hidden(name))
    others.pop("", None)
    if not others:
        return f"the folder has no {', '.join(endings)} files"
    common = [ending for ending, _ in others.most_common(5)]
    return (
        f"the folder has no {', '.join(endings)} files, but {', '.join(common)}; to read such files as text: "
        f"--endings={common[0]}"
    )


def is_address(path):
    return "://" in path


def name_in(path):
    """Returns the part of a path that names the file: an address may go on with ?key=value. Raises UserError
    for what only looks like an address."""
    if not is_address(path):
        return path
    try:
        return urllib.parse.urlsplit(path).path
    except ValueError as e:
        raise UserError(f"--input={path} is no address: {e}") from None


def name_of(source):
    """Returns a short name for `source`, to name a folder and files after: books of ../books/*.txt."""
    if not source:
        return "fineweb"
    path = os.path.realpath(name_in(source.split(",")[0]))
    parts = [part for part in pathlib.Path(path).parts if not set(part) & set("*?[")]
    name = parts[-1].partition(".")[0] or parts[-1]
    return re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-") or "text"


def standard_library():
    """Returns the source files of Python's own library."""
    root = sysconfig.get_paths()["stdlib"]
    found = glob.glob(f"{glob.escape(root)}/**/*.py", recursive=True)
    # files broken on purpose, or not Python's own
    skipped = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
    found = [path for path in found if not skipped & set(os.path.relpath(path, root).split(os.sep))]
    if not found:
        raise FileNotFoundError(
            f"this Python has no library sources in {root}; use --input=FOLDER with your own texts"
        )
    return sorted(found)


def files_below(folder, endings, passed_over):
    """Returns the files below a folder that have one of the endings, in any case. Links are followed,
    but into each real folder once, so that links in a circle end."""
    found, seen = [], set()
    for root, folders, names in os.walk(folder, onerror=raise_error, followlinks=True):
        if os.path.realpath(root) in seen:
            passed_over["linked twice"] += 1
            folders.clear()
            continue
        seen.add(os.path.realpath(root))
        hidden = {name for name in folders + names if is_hidden(name)}
        passed_over["hidden"] += len(hidden)
        folders[:] = sorted(set(folders) - hidden)
        for name in sorted(set(names) - hidden):
            path = os.path.join(root, name)
            if not (name.lower().endswith(endings) and os.path.isfile(path)):
                passed_over[os.path.splitext(name)[1] or "without an ending"] += 1
            elif name.endswith(".arrow") and is_left_over(root, name):
                passed_over["of datasets' caches"] += 1
            else:
                found.append(path)
    if not any(path.lower().endswith(".arrow") for path in found):
        return found
    texts = [path for path in found if os.path.basename(path) not in ABOUT_ARROW]
    passed_over["of datasets' own .json"] += len(found) - len(texts)
    return texts


def is_left_over(folder, name):
    """Whether an .arrow file is not of the dataset that was saved into its folder: a cache, or of an earlier
    saving in other parts. datasets leaves both there, beside the list of the files that count."""
    if name.startswith("cache-"):
        return True
    try:
        with open(os.path.join(folder, "state.json"), encoding="utf-8") as f:
            listed = {entry["filename"] for entry in json.load(f)["_data_files"]}
    except (OSError, ValueError, KeyError, TypeError):  # not a folder of datasets'
        return False
    return name not in listed


def matches(pattern, passed_over):
    """Returns the files that match a pattern like `texts/*.txt`; `**` stands for folders at any depth, and
    does not follow links. As in a shell, what is in folders that may not be read does not match. Names that
    begin with a dot match only if the pattern has such a name. Folders are passed over."""
    start = pathlib.Path(pattern).anchor
    try:
        found = list(pathlib.Path(start).glob(pattern[len(start) :].lstrip("/")))
    except ValueError:  # an empty pattern, or a** for example
        return []
    if not any(is_hidden(name) for name in pathlib.Path(pattern).parts):
        found = [path for path in found if not any(is_hidden(name) for name in path.parts)]
    passed_over["folders"] += sum(path.is_dir() for path in found)
    return [str(path) for path in found if path.is_file()]


def is_hidden(name):
    return name.startswith(".") and name != ".."


def each_once(paths, passed_over):
    """Returns paths without those that lead to the same file as an earlier one."""
    first = {}
    for path in paths:
        first.setdefault(os.path.realpath(path), path)
    passed_over["linked twice"] += len(paths) - len(first)
    return list(first.values())


def raise_error(error):
    raise error


def status_of(path):
    """Returns (path, bytes, time of change): what tells cheaply whether a file has changed. The server of an
    address is asked; what it does not tell is 0 or empty. Raises UserError if it cannot be reached, or sends
    a web page where a file was asked for."""
    if not is_address(path):
        status = os.stat(path)
        return path, status.st_size, status.st_mtime_ns
    try:
        with urllib.request.urlopen(path, timeout=TIMEOUT) as response:
            about = response.headers
    except (OSError, ValueError, http.client.HTTPException) as e:  # no network, no such file or protocol
        raise UserError(f"--input={path} cannot be reached: {getattr(e, 'reason', e)}") from None
    if about.get_content_type() == "text/html" and not name_in(path).lower().endswith((".html", ".htm")):
        raise UserError(
            f"--input={path} is a web page; give the link to the file itself: on GitHub it has raw in it, on "
            f"the hub resolve"
        )
    return path, length_told(about), about.get("ETag") or about.get("Last-Modified", "")


def length_told(headers):
    """Returns the bytes that a file has by its server's answer; 0 if that does not tell."""
    try:
        return max(0, int(headers.get("Content-Length", 0)))
    except ValueError:
        return 0


def download(address):
    """Returns the file at an address as a temporary one, open at its beginning. Raises ConnectionError if the
    server cannot be reached or the connection breaks off. Nothing is kept: reading it again downloads it
    again."""
    file = tempfile.TemporaryFile()
    try:
        with urllib.request.urlopen(address, timeout=TIMEOUT) as response:
            size = length_told(response.headers)
            with tqdm(total=size or None, unit="B", unit_scale=True, desc="download", disable=None) as bar:
                while block := response.read(2**20):
                    file.write(block)
                    bar.update(len(block))
        if size and file.tell() != size:  # urllib does not notice
            raise ConnectionError(f"the connection ended after {file.tell():,} of {size:,} bytes")
        file.seek(0)
    except BaseException as e:
        file.close()
        if isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"no room for it in {tempfile.gettempdir()}; set TMPDIR to another folder") from e
        if isinstance(e, (OSError, http.client.HTTPException)):
            raise ConnectionError(str(getattr(e, "reason", e))) from e
        raise
    return file


def size_of(path):
    return status_of(path)[1]


def times_of(files):
    """Returns a digest of names, sizes and times of change: what tells cheaply that nothing has changed."""
    entries = [status_of(path) for path in files]
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()


def contents_of(files, skip_bad_files=False):
    """Returns a digest of names and contents. Reads every local file; of an address, its status counts. One
    that cannot be read is an OSError, unless those are to be skipped."""
    digest = hashlib.sha256()
    for path in files:
        try:
            content = str(status_of(path)) if is_address(path) else sha256_of(path)
        except OSError:
            if not skip_bad_files:
                raise
            content = "cannot be read"
        digest.update(os.fsencode(path) + b"\0" + content.encode())
    return digest.hexdigest()


# -----------------------------------------------------------------------------
# how much text there is, for the estimates of time and disk


def text_bytes(path, text_key):
    """Returns the approximate bytes of text in a file; 0: unknown."""
    size = size_of(path)
    name = name_in(path).lower()
    if name.endswith((".gz", ".zst")):
        return 4 * size
    # a damaged file is reported when its turn comes
    with contextlib.suppress(OSError, ValueError, RecursionError):
        if name.endswith(".parquet") and not is_address(path):
            return column_bytes(path, text_key)
        if name.endswith((".jsonl", ".ndjson")) and not is_address(path):
            return int(size * share_of_text(path, text_key))
    return size


def column_bytes(path, text_key):
    """Returns the bytes of a column of a Parquet file, decompressed."""
    import pyarrow.parquet

    footer = pyarrow.parquet.read_metadata(path)
    groups = [footer.row_group(i) for i in range(footer.num_row_groups)]
    columns = [group.column(i) for group in groups for i in range(group.num_columns)]
    return sum(column.total_uncompressed_size for column in columns if column.path_in_schema == text_key)


def share_of_text(path, text_key):
    """Returns the share of a .jsonl file's first megabyte that is text under text_key; 1.0 if that has no
    whole line."""
    with open(path, "rb") as f:
        lines = f.read(2**20).splitlines(keepends=True)
    if len(lines) > 1:
        del lines[-1]  # cut off, perhaps
    rows = [json.loads(line) for line in lines if line.strip()]
    texts = [row.get(text_key) or "" for row in rows if isinstance(row, dict)]
    found = sum(len(text.encode("utf-8", "replace")) for text in texts if isinstance(text, str))
    return found / max(1, sum(map(len, lines)))
