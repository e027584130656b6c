"""Where documents come from: the built-in corpus, text, JSONL and parquet files, folders of them, and the Hugging Face hub.

read_source() yields the documents of any of them one by one; a file is never held in memory whole. Reading is how much of a source
to read, what to do about bad lines, and what came of it.
"""

import codecs
import collections
import contextlib
import functools
import gzip
import json
import math
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import corpus
from scripts import InputError

FILE_TYPES = (".txt", ".md", ".jsonl", ".jsonl.gz", ".parquet")
TEXT_FIELDS = (("text",), ("content",), ("question", "answer"), ("messages",))
ENDING = re.compile(r"(?:\.[a-z]\w*)?\.(?:gz|zst|xz|bz2|zip)$|\.[^.\s]+$")  # of what is packed, that of the content too
# What is before it in its line is looked at afterwards: an expression that begins with letters is searched 30 times as fast.
END_LINE = re.compile(r"<\|endoftext\|>(?<![^\r\n]<\|endoftext\|>)[ \t]*(?:\r*\n|\r|\Z)")
PIECE = 1 << 21  # characters; a longer text counts as several documents, cut at paragraph ends
UNLABELLED, TRAIN, VAL = range(3)  # what a source says about the split of its documents


class Source(NamedTuple):
    name: str  # a path, an hf:// address, or "builtin"
    phase: int = 0  # of the built-in corpus, which has other documents for each phase


@dataclass
class Reading:
    """How a source is to be read, and what has been read of it."""

    max_bytes: int | float = math.inf  # of UTF-8 text; then no further file is opened
    skip_bad: bool = False  # leave out records that hold no document instead of raising InputError
    n_bytes: int = 0  # counted only if there is a limit
    n_files: int = 0
    n_bad: int = 0
    first_bad: str = ""  # what is wrong with the first of them

    def bad(self, error: InputError):
        if not self.skip_bad:
            raise InputError(f"{error}, or pass --skip_bad to leave such lines out") from None
        self.n_bad, self.first_bad = self.n_bad + 1, self.first_bad or str(error)


def hub_filesystem():
    from huggingface_hub import HfFileSystem  # half a second to import

    return HfFileSystem()  # finds a token where `hf auth login` or HF_TOKEN put it


@contextlib.contextmanager
def hub_errors(name: str, *more: type[Exception]):
    """What goes wrong with the network or the hub, and the exceptions in `more`, as an InputError."""
    from huggingface_hub.errors import HTTPError

    try:
        yield
    except (OSError, HTTPError, *more) as error:
        raise InputError(f"{name}: {' '.join(str(error).split())}: check the address, the network and hf auth login") from None


def files_below(folder: Path) -> Iterator[Path]:
    """The files below a folder, through links too, each folder once. Hidden ones are left out, except the folder itself."""
    seen = set()
    for root, folders, names in os.walk(folder, followlinks=True):
        here = os.path.realpath(root)
        folders[:] = [] if here in seen else sorted(name for name in folders if not name.startswith("."))
        if here not in seen:
            yield from (path for name in names if not name.startswith(".") and (path := Path(root, name)).is_file())
        seen.add(here)


def source_files(name: str, say: Callable[[str], None] = lambda line: None) -> list[tuple[str, Callable[[], BinaryIO]]]:
    """(name, opener) of the files of a source, sorted; InputError if there is nothing that prepare.py can read. What a folder holds
    besides is said in one line. Hidden files, which editors, Git and Macs keep for themselves, are not part of it."""
    supported = f"expected {' '.join(FILE_TYPES)}, a folder of them, an hf:// address, or builtin"
    if name.startswith("hf://"):
        hub = hub_filesystem()
        with hub_errors(name, ValueError, NotImplementedError):  # what huggingface_hub raises for hf://name and for hf://
            names = [name] if hub.isfile(name) else ["hf://" + found.removeprefix("hf://") for found in sorted(hub.find(name))]
        names = [n for n in names if not any(part.startswith(".") for part in Path(n).parts[len(Path(name).parts) :])]
        sizes = dict.fromkeys(names, 1)
        openers = {n: functools.partial(hub.open, n, "rb") for n in names}
    else:
        path = Path(name)
        if not name or not path.exists():  # Path("") would be the current folder
            raise InputError(f"{name or 'a source without a name'} does not exist: {supported}")
        paths = sorted(files_below(path)) if path.is_dir() else [path]
        sizes = {str(p): p.stat().st_size for p in paths}
        openers = {str(p): functools.partial(open, p, "rb") for p in paths}
    usable = [n for n in openers if n.lower().endswith(FILE_TYPES)]
    if not usable:
        raise InputError(f"{name} {'is' if name in openers else 'holds'} no file that can be read: {supported}")
    if not any(sizes[n] for n in usable):
        raise InputError(f"{name} is empty: expected text in it")
    others = [Path(n).name.lower() for n in sorted(openers.keys() - set(usable))]
    if others:
        endings = collections.Counter(match[0] if (match := ENDING.search(other)) else "without ending" for other in others)
        kinds = [f"{count:,} {ending}" for ending, count in endings.most_common(8)] + ["..."] * (len(endings) > 8)
        say(f"{name}: left out {len(others):,} of {len(usable) + len(others):,} files ({', '.join(kinds)}): "
            f"only {' '.join(FILE_TYPES)} are read, convert the others first")
    return [(n, openers[n]) for n in usable]


def data_folder(names: list[str]) -> Path:
    """data/<stem of the first source that is not the built-in corpus>, where its data goes."""
    source = next((name for name in names if name != "builtin"), "builtin")
    name = source.rstrip("/").rpartition("/")[2] if source.startswith("hf://") else Path(source).resolve().name
    for suffix in FILE_TYPES:
        name = name[: -len(suffix)] if name.lower().endswith(suffix) else name
    if name == "builtin" != source:
        raise InputError(f"{source} would go to data/builtin, where the built-in corpus has its place: name another folder with --out")
    return Path("data") / name


def pieces(text: str, most: int | None = None) -> Iterator[str]:
    """Text in parts of at most `most` (PIECE) characters that end at a paragraph, line or word; joined they are the text."""
    most = most or PIECE
    while len(text) > most:
        ends = (text.rfind(mark, most // 2, most) + len(mark) for mark in ("\n\n", "\n", " "))
        cut = next((end for end in ends if end > most // 2), most)
        yield text[:cut]
        text = text[cut:]
    yield text


def read_text(name: str, file: BinaryIO) -> Iterator[str]:
    """Documents of a text file: separated by lines of <|endoftext|>, else the whole file; never held whole in memory."""
    undecoded, rest, offset = b"", "", 0
    while True:
        block = file.read(1 << 20)
        data = undecoded + block
        try:
            text, used = codecs.utf_8_decode(data, "strict", not block)
        except UnicodeDecodeError as error:
            encoding = "UTF-16" if data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) and not offset else "LATIN1"
            raise InputError(f"{name} is not UTF-8 at byte {offset + error.start}: convert it first, for example with "
                             f"iconv -f {encoding} -t UTF-8") from None
        offset, undecoded, rest = offset + used, data[used:], rest + text
        lines = max(rest.rfind("\n"), rest.rfind("\r")) + 1 if block else len(rest)  # a separator counts when its line is complete
        *whole, tail = END_LINE.split(rest[:lines])
        for document in whole:
            yield from pieces(document)
        *whole, rest = pieces(tail + rest[lines:])
        yield from whole
        if not block:
            if rest:
                yield rest
            return


def choose_fields(present: Iterable[str], field: str | None, where: str) -> tuple[str, ...]:
    for names in ((field,),) if field else TEXT_FIELDS:
        if all(name in present for name in names):
            return names
    found = " ".join(", ".join(present).split()) or "none"
    raise InputError(f"{where}: no field {field or 'text, content, question + answer or messages'}, found {found}: "
                     f"name the field that holds the text with --field")


def item_of(record, field: str | None, where: str) -> str | list[dict]:
    """A record's document: a text, or a chat as a list of {"question", "answer"}, the first with "system" if the chat has such a turn.
    InputError if it has none; a record that is an InputError could not be read."""
    if isinstance(record, InputError):
        raise record
    if not isinstance(record, dict):
        raise InputError(f"{where}: holds {type(record).__name__}, expected one JSON object per line: mend or drop the line")
    names = choose_fields(record, field, where)
    values = ["" if record[name] is None else record[name] for name in names]
    if names == ("messages",):
        try:
            turns = [(message["role"], message["content"]) for message in values[0]]
            system = dict(turns[:1]) if turns and turns[0][0] == "system" else {}
            rest = turns[len(system) :]
            pairs = [{"question": asked, "answer": told} for (_, asked), (_, told) in zip(rest[::2], rest[1::2], strict=True)]
            right = [role for role, _ in rest] == ["user", "assistant"] * len(pairs) and all(isinstance(text, str) for _, text in turns)
            if system:
                pairs[0] = system | pairs[0]
        except (TypeError, KeyError, ValueError, IndexError):
            right = False
        if not right:
            raise InputError(f"{where}: messages are not turns of user and assistant, before them at most one of system, "
                             '[{"role": "user", "content": "..."}, ...]: mend or drop the line, or name another field with --field')
        return pairs
    for name, value in zip(names, values):
        if not isinstance(value, str):
            raise InputError(f"{where}: field {name} holds {type(value).__name__}, expected a string: name another with --field")
    return values[0] if len(names) == 1 else [dict(zip(names, values))]


def jsonl_records(name: str, file: BinaryIO) -> Iterator[tuple[str, object]]:
    """(where, record) of the lines of a file that are not empty; the record is an InputError where a line is no JSON."""
    for number, line in enumerate(file, 1):
        if line.strip():
            where = f"{name}:{number}"
            try:
                record = json.loads(line.decode("utf-8-sig"))
            except UnicodeDecodeError as error:
                record = InputError(f"{where}: not UTF-8 at byte {error.start} of the line: convert the file first")
            except (ValueError, RecursionError) as error:
                record = InputError(f"{where}: malformed JSON ({error}): expected one object per line: mend or drop the line")
            yield where, record


def text_records(name: str, file: BinaryIO, field: str | None) -> Iterator[tuple[str, object]]:
    """(where, record) of the rows of a parquet file; in one without the text's column all of them are the InputError that says so."""
    lacking = None

    def choose(present: list[str]) -> tuple[str, ...]:
        nonlocal lacking
        try:
            return choose_fields(present, field, name)
        except InputError as error:
            lacking = error
            return ()

    for number, record in enumerate(parquet_records(name, file, choose), 1):
        yield f"{name}:{number}", lacking or record


def parquet_records(name: str, file: BinaryIO, choose: Callable[[list[str]], Iterable[str]]) -> Iterator[dict | InputError]:
    """The rows of a parquet file, of the columns that `choose` picks of all their names; an InputError where one is not UTF-8."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise InputError(f"{name}: .parquet files need pyarrow: pip install pyarrow") from None
    number = 0
    try:
        table = parquet.ParquetFile(file, pre_buffer=False, buffer_size=1 << 20)  # else whole row groups wait in memory
        for batch in table.iter_batches(batch_size=256, columns=list(choose(table.schema_arrow.names))):
            try:
                yield from batch.to_pylist()
            except UnicodeDecodeError:  # in one of its rows
                for row in range(batch.num_rows):
                    try:
                        yield from batch.slice(row, 1).to_pylist()
                    except UnicodeDecodeError as error:
                        yield InputError(f"{name}:{number + row + 1}: a field is not UTF-8 ({error}): convert the file first")
            number += batch.num_rows
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{name} is not a whole parquet file ({' '.join(str(error).split())[:200]}): download it again") from None


def read_records(records: Iterable[tuple[str, object]], field: str | None, reading: Reading) -> Iterator[str | list[dict]]:
    for where, record in records:
        try:
            item = item_of(record, field, where)
        except InputError as error:
            reading.bad(error)
        else:
            yield item


def read_files(files, field: str | None, reading: Reading) -> Iterator[str | list[dict]]:
    """The documents of files [(name, opener)], one after the other."""
    for name, opener in files:
        kind = name.lower()
        try:
            with hub_errors(name) if name.startswith("hf://") else contextlib.nullcontext(), opener() as file:
                reading.n_files += 1
                if kind.endswith((".txt", ".md")):
                    items = read_text(name, file)
                elif kind.endswith(".parquet"):
                    items = read_records(text_records(name, file, field), field, reading)
                else:
                    lines = gzip.GzipFile(fileobj=file) if kind.endswith(".gz") else file
                    items = read_records(jsonl_records(name, lines), field, reading)
                for item in items:
                    yield from pieces(item) if isinstance(item, str) else (item,)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise InputError(f"{name} is not a whole gzip file ({error}): download it again") from None
        except OSError as error:
            error.filename = error.filename or name  # a failed read does not say where
            raise


def first_bytes(items: Iterable[str | list[dict]], reading: Reading) -> Iterator[str | list[dict]]:
    """The items that make reading.max_bytes of UTF-8 text. A text that is too long for what is left of them is cut, after a paragraph,
    line or word; a chat is whole and may exceed it."""
    for item in items:
        text = item if isinstance(item, str) else "".join(text for pair in item for text in pair.values())
        left = reading.max_bytes - reading.n_bytes
        data = text.encode(errors="surrogatepass")
        end = len(data) >= left
        if len(data) > left and isinstance(item, str):
            most = len(data[:left].decode(errors="ignore"))
            item = next(pieces(item, most)) if most else ""
            data = item.encode(errors="surrogatepass")
        reading.n_bytes += len(data)
        if item:
            yield item
        if end:
            return


def read_source(source: Source, files, label: int, field: str | None,
                reading: Reading | None = None) -> Iterator[tuple[int, str | list[dict]]]:
    """(label, item) of a source's documents: UNLABELLED, or TRAIN or VAL where the split is given. The built-in corpus says
    it itself; its validation part is left out where other text serves for that (label TRAIN)."""
    if source.name == "builtin":
        for split, item in corpus.documents(source.phase):
            if split == "train" or label == UNLABELLED:
                yield TRAIN if split == "train" else VAL, item
        return
    reading = reading or Reading()
    items = read_files(files, field, reading)
    with contextlib.closing(items):  # the file in which the limit is reached
        for item in items if reading.max_bytes == math.inf else first_bytes(items, reading):
            yield label, item
