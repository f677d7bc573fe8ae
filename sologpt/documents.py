"""
The documents in the files that are prepared, of any kind: read a little at a time, so that memory does not
depend on the size of a file.

A reader yields (text, ends); ends is False where the next text continues the document.
"""

import codecs
import csv
import functools
import io
import itertools
import json
import os
import re
import sys
import time
from typing import NamedTuple

from sologpt.errors import UserError, first_line
from sologpt.source import download, is_address, name_in
from sologpt.tokenizer import EOT

# characters sent to a worker together: 0.1 s of its time, next to which sending them costs little
CHUNK = 2**20
# characters; a longer document is processed in parts, so that memory does not depend on the input
LONGEST = 2**22
LINE = re.compile(rb"(\xef\xbb\xbf)?\s*\{[^\r\n]")  # how a file with an object a line begins
PAUSES = (1, 2, 4, 8, 16, 32)  # seconds between attempts to reach the hub, on top of the hub library's own


# -----------------------------------------------------------------------------
# one reader for each kind of file


def open_file(path):
    """Returns a file, local, on the hub or at another address, open for reading bytes; .gz and .zst are
    decompressed. Raises UserError for a compressed file without a byte."""
    codec = {".gz": "gzip", ".zst": "zstd"}.get(os.path.splitext(name_in(path))[1].lower())
    if path.startswith("hf://"):
        import fsspec  # comes with datasets

        raw = fsspec.open(path, "rb").open()
    elif is_address(path):
        raw = download(path)
    else:
        if codec and not os.path.getsize(path):
            raise UserError("empty, which is no valid compressed file")
        raw = open(path, "rb")
    if not codec:
        return raw
    import pyarrow  # comes with datasets; Python itself reads .zst only from 3.14 on

    return io.BufferedReader(pyarrow.CompressedInputStream(raw, codec))


def read_text(path, divide):
    """Yields the documents of a text file: split at <|endoftext|> if it has any, else as `divide` says."""
    separator, held = EOT, ""
    if divide != "file" and not contains(path, EOT.encode()):
        separator = {"blank_line": "\n\n", "line": "\n"}[divide]
    utf8 = codecs.getincrementaldecoder("utf-8-sig")()
    # where line ends divide documents, \r\n and \r become \n
    newlines = io.IncrementalNewlineDecoder(None, translate=separator != EOT)
    with open_file(path) as f:
        block = None
        while block != b"":  # the empty one at the end lets the decoders finish
            block = f.read(CHUNK)
            if block.count(0) > 10 + len(block) // 100:
                raise UserError("not text: it has many NUL bytes, as an archive or UTF-16 has")
            if len(block) < 1024 and block.startswith(b"version https://git-lfs.github.com/spec/"):
                raise UserError("only names the file that Git LFS keeps elsewhere; get it with: git lfs pull")
            try:
                held += newlines.decode(utf8.decode(block, final=not block), final=not block)
            except UnicodeDecodeError as e:
                held += newlines.decode(e.object[: e.start].decode())
                yield from ((text, True) for text in held.split(separator)[:-1])
                raise utf8_error(path) from None
            *whole, held = held.split(separator)
            yield from ((text, True) for text in whole)
            while len(held) > LONGEST + len(separator):  # so that no separator is cut in two
                end = safe_cut(held, LONGEST)
                yield held[:end], False
                held = held[end:]
    if held:
        yield held, True


def utf8_error(path):
    """Returns the UserError for a file that is not UTF-8. It is read again: whoever found that knows only the
    place in a block."""
    utf8 = codecs.getincrementaldecoder("utf-8")()
    done = 0
    with open_file(path) as f:
        while block := f.read(CHUNK):
            try:
                utf8.decode(block, final=len(block) < CHUNK)
            except UnicodeDecodeError as e:
                at = done + len(block) - len(e.object) + e.start
                return UserError(f"not UTF-8 text: {e.reason} at byte {at}")
            done += len(block)
    return UserError("not UTF-8 text")


def contains(path, wanted):
    before = b""
    with open_file(path) as f:
        while block := f.read(CHUNK):
            if wanted in before + block:
                return True
            before = (before + block)[-len(wanted) :]
    return False


def read_jsonl(path, text_key):
    """Yields the text_key of each line's JSON object; null is an empty text."""
    with open_file(path) as f:
        yield from texts_of_lines(f, text_key)


def texts_of_lines(f, text_key):
    """Yields what read_jsonl yields, of a file that is open for reading bytes."""
    for number, line in enumerate(f, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as e:
            raise UserError(f"line {number} is not JSON: {e}") from None
        yield text_of(row, text_key, f"line {number}"), True


def text_of(row, text_key, place):
    """Returns the text of a row of JSON; null is an empty one."""
    if not isinstance(row, dict):
        raise UserError(f"{place} is {json_type(row)}, not an object with a text under {text_key!r}")
    if text_key not in row:
        check_column(row, text_key, f"{place} has ")
    text = row[text_key]
    if not isinstance(text, str | None):
        raise UserError(f"{place} has {json_type(text)} under {text_key!r} (--text_key), not a text")
    return text or ""


def json_type(value):
    """Returns what JSON calls a value."""
    names = {str: "a string", bool: "true or false", list: "an array", dict: "an object", type(None): "null"}
    return names.get(type(value), "a number")


def read_json(path, text_key):
    """Yields the strings of a JSON array, or the text_key of its objects; null is an empty text. Many files
    with an object a line are called .json too, and are read as such."""
    bytes_file = open_file(path)
    if not hasattr(bytes_file, "peek"):
        bytes_file = io.BufferedReader(bytes_file)
    with io.TextIOWrapper(bytes_file, encoding="utf-8-sig") as f:
        if LINE.match(bytes_file.peek(CHUNK)):
            yield from texts_of_lines(bytes_file, text_key)
            return
        try:
            for number, item in enumerate(items_of(f), 1):
                if not isinstance(item, str):
                    item = text_of(item, text_key, f"item {number}")
                yield item, True
        except UnicodeDecodeError:
            raise utf8_error(path) from None


def items_of(f):
    """Yields the items of the JSON array in a text file. Keeps little more of it than its longest item."""
    decode = json.JSONDecoder().raw_decode
    mark = re.compile(r"\s*\[\s*(\])?")  # before the next item; the first one begins the array
    problem = "neither a JSON array nor an object a line"
    held = ""  # text that was read, of which items before `at` are done
    at = 0
    before = 0  # characters before held
    while True:
        block = f.read(max(CHUNK, len(held) - at))  # twice as much as before, until the item is whole
        before += at
        held = held[at:] + block
        at = 0
        try:
            while found := mark.match(held, at):
                if found[1]:
                    if held[found.end() :].strip() or f.read(CHUNK).strip():
                        raise UserError("something follows the JSON array")
                    return
                item, at = decode(held, found.end())
                yield item
                mark = re.compile(r"\s*(?:,\s*|(\]))")
                problem = "Expecting ',' or ']'"
            raise json.JSONDecodeError(problem, held, len(held) - len(held[at:].lstrip()))
        except json.JSONDecodeError as e:
            # an error where the text read so far ends may only be that
            if not block or (e.pos < len(held) - 16 and not e.msg.startswith("Unterminated")):
                raise UserError(f"character {before + e.pos:,}: {e.msg}") from None


def read_csv(path, text_key):
    """Yields the text_key column of a .csv file, whose first row names the columns."""
    csv.field_size_limit(2**26)  # where a quote is missing, the rest of the file is one text
    with io.TextIOWrapper(open_file(path), encoding="utf-8-sig", newline="") as f:
        rows = csv.DictReader(f, strict=True)
        try:
            names = rows.fieldnames or ["nothing"]
            check_column(names, text_key)
            if names.count(text_key) > 1:
                raise UserError(f"{names.count(text_key)} columns are called {text_key!r}")
            for row in rows:
                if None in row or None in row.values():
                    raise csv.Error("not as many columns as the first row")
                yield row[text_key], True
        except UnicodeDecodeError:
            raise utf8_error(path) from None
        except csv.Error as e:
            raise UserError(f"line {rows.reader.line_num:,}: {e}") from None


def read_parquet(path, text_key):
    """Yields the text_key column; null is an empty text. Few rows at a time: a row group may be the file."""
    import pyarrow.parquet

    with open_file(path) as f:
        table = pyarrow.parquet.ParquetFile(f, buffer_size=2**20, page_checksum_verification=True)
        check_column(table.schema_arrow.names, text_key)
        for rows in table.iter_batches(16, columns=[text_key]):
            yield from texts_of(rows[text_key], text_key)


def read_arrow(path, text_key):
    """Yields the text_key column; null is an empty text. The file is a stream, as datasets saves, or of
    Arrow's file format."""
    import pyarrow.ipc

    # mapped, as a batch may be the whole file
    opened = open_file(path) if is_address(path) else pyarrow.memory_map(path)
    with opened as f:
        is_stream = f.read(6) != b"ARROW1"
        f.seek(0)
        table = pyarrow.ipc.open_stream(f) if is_stream else pyarrow.ipc.open_file(f)
        check_column(table.schema.names, text_key)
        batches = table if is_stream else map(table.get_batch, range(table.num_record_batches))
        for batch in batches:
            texts = batch[text_key]
            texts.validate(full=True)
            for first in range(0, len(texts), 16):
                yield from texts_of(texts[first : first + 16], text_key)
        if not is_stream:
            return
        read_to = f.tell()
        f.seek(-8, os.SEEK_END)
        if f.read() != b"\xff\xff\xff\xff\0\0\0\0":
            raise UserError("the end of the stream is missing: whatever wrote it was cut off")
        if f.tell() != read_to:
            raise UserError("another stream follows the first one; give each a file of its own")


def check_column(there, text_key, start=""):
    if text_key not in there:
        raise UserError(f"{start}no text under {text_key!r} (--text_key); it has {', '.join(there)}")


def texts_of(column, text_key):
    for text in column.to_pylist():
        if not isinstance(text, str | None):
            raise UserError(f"{text_key!r} (--text_key) holds {type(text).__name__}, not text")
        yield text or "", True


# -----------------------------------------------------------------------------
# cutting long texts


# between a letter and " a", or between the end of a line and a letter
SAFE = re.compile(r"(?<=[^\W\d_])(?= [^\W\d_])|(?<=\S\n)(?=[^\W\d_])")


def safe_cut(text, longest):
    """Returns a place up to `longest` where a cut changes no token, as all of tiktoken's patterns end a piece
    there; if the 100,000 characters before `longest` have none, `longest` itself."""
    places = [match.start() for match in SAFE.finditer(text, longest - 100_000, longest)]
    return places[-1] if places else longest


def pieces(text, longest):
    """Yields the text in pieces of at most `longest` characters."""
    while len(text) > longest:
        end = safe_cut(text, longest)
        yield text[:end]
        text = text[end:]
    yield text


# -----------------------------------------------------------------------------
# all files, in chunks of about CHUNK characters


class Part(NamedTuple):
    text: str
    begins: bool  # a document begins here
    whole: bool  # and ends here too


def retrying(rows, temporary=Exception):
    """Yields what rows() yields. After a failure that may be temporary, pauses, calls it again and skips what
    has been yielded already. After the last pause raises ConnectionError, or the error of a damaged file."""
    done, pauses = 0, iter(PAUSES)
    while True:
        try:
            for row in itertools.islice(rows(), done, None):
                yield row
                done, pauses = done + 1, iter(PAUSES)
            return
        except (ValueError, FileNotFoundError, ImportError):  # a wrong name, a damaged file
            raise
        except temporary as e:
            reason = first_line(e)
            pause = next(pauses, None)
            if pause is None and is_damage(e):
                raise
            if pause is None:
                raise ConnectionError(
                    f"the source cannot be reached ({reason}); the same command continues later"
                ) from e
            print(f"the source cannot be reached ({reason}); trying again in {pause} s", file=sys.stderr)
            time.sleep(pause)


def is_damage(error):
    """Whether an error that does not go away is one of the file and not of the network: of all OSErrors,
    pyarrow's for damaged bytes alone have no number and no kind."""
    return isinstance(error, RecursionError) or (type(error) is OSError and error.errno is None)


def read_parts(path, cfg):
    """Yields the Parts of the documents of one file."""
    name = name_in(path).lower().removesuffix(".gz").removesuffix(".zst")
    readers = dict(parquet=read_parquet, arrow=read_arrow, csv=read_csv)
    readers |= dict(jsonl=read_jsonl, ndjson=read_jsonl, json=read_json)
    if reader := readers.get(name.rpartition(".")[2]):
        read = functools.partial(reader, path, cfg.text_key)
    else:
        read = functools.partial(read_text, path, cfg.txt_documents)
    if path.startswith("hf://"):
        texts = retrying(read)  # each library below has network errors of its own
    elif is_address(path):
        texts = retrying(read, ConnectionError)  # once it is downloaded, all other failures are the file's
    else:
        texts = read()
    begins = True
    for text, ends in texts:
        *others, last = pieces(text, LONGEST)
        for piece in others:
            yield Part(piece, begins, False)
            begins = False
        yield Part(last, begins, begins and ends)
        begins = ends


class Position(NamedTuple):
    """How far the source has been read, and what was skipped on the way."""

    file: int = 0
    part: int = 0
    empty: int = 0
    bad_files: int = 0


def read_chunks(files, cfg, position):
    """Yields (position, parts): about CHUNK characters of text, and where to continue reading after them."""
    chunk, size = [], 0
    _, skip, empty, bad_files = position
    for number in range(position.file, len(files)):
        done = 0
        try:
            for part in read_parts(files[number], cfg):
                done += 1
                if done <= skip:
                    continue
                if part.whole and (not part.text or part.text.isspace()):
                    empty += 1
                    continue
                chunk.append(part)
                size += len(part.text)
                if size >= CHUNK:
                    yield Position(number, done, empty, bad_files), chunk
                    chunk, size = [], 0
        except ConnectionError:
            raise
        except Exception as e:  # of many kinds, from decompression to Parquet
            what = f"cannot read {files[number]} after {done:,} documents: {first_line(e)}"
            if not cfg.skip_bad_files:
                raise UserError(f"{what}. Repair it, or skip the rest: --skip_bad_files=True") from e
            print(f"{what}. Continuing with the next file", file=sys.stderr)
            bad_files += 1
        skip = 0
    yield Position(len(files), 0, empty, bad_files), chunk
