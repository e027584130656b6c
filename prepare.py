"""Raw text -> cleaned documents -> byte-level BPE tokenizer -> token shards for the three phases of train.py.

    python prepare.py                        # the built-in corpus, to data/builtin
    python prepare.py mybook.txt             # your own text, to data/mybook
    python prepare.py texts/ --phase2 math.jsonl builtin --vocab_size=8192 --out=data/mine
    python prepare.py hf://datasets/roneneldan/TinyStories/TinyStories-train.txt --vocab_size=4096
    python prepare.py hf://datasets/HuggingFaceFW/fineweb/sample/10BT --max_mb=2000 --vocab_size=8192    # the first 2 GB

Two CPU cores do 5 to 12 MB/s of a large text. Memory stays below 1 GB up to some 30 million documents, because they wait, cleaned, on
disk beside --out (their size and 200 bytes each) while clean.py searches them for copies. data/<name>/ then holds tokenizer.json,
phase{1,2,3}_{train,val}_*.bin and meta.json. It is built in a hidden folder beside its final place and renamed at the very end, so an
interrupted run changes nothing.
"""

import argparse
import contextlib
import fcntl
import functools
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import re
import shlex
import shutil
import sys
import time
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

import clean
import corpus
from clean import EXACT_COPY, FATES, KEPT, NEAR_COPY, SPECIAL, SPECIAL_TOKENS, Splits, Spool, assign_splits, clean_chunk, render_chat
from scripts import ArgumentParser, InputError, locked, run
from shards import ShardWriter, load_meta, read_shard, shard_paths, token_bytes, tokenizer_fingerprint, write_shard
from sources import FILE_TYPES, TRAIN, UNLABELLED, VAL, Reading, Source, data_folder, read_source, source_files
from workers import WORKERS, chunks, ordered_map

# What other files take from here: prepare.py is the face of text preparation, whichever file a part of it stands in.
__all__ = ["SPECIAL_TOKENS", "InputError", "load_meta", "read_shard", "render_chat", "shard_paths", "token_bytes",
           "tokenizer_fingerprint", "write_shard"]
WINDOWS = {1: 256, 2: 1024, 3: 2048}  # tokens train.py reads at a time, per phase
SEGMENT, BATCH = 1 << 14, 1 << 18  # characters the tokenizer learns from as one string, and a process encodes at a time

# Qwen2's pre-tokenizer: contractions, words with the sign before them, single digits (so that numbers are spelled the same
# way at every length), symbols, line ends, spaces.
WORD = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
# Places where WORD always ends a match, so that a text may be encoded in parts: a line end, a space between two letters.
BOUNDARY = re.compile(r"\n(?=\S)|(?<=[^\W\d_])(?= [^\W\d_])")
ENDLESS = re.compile(r"\S{1024}")  # never a word, but the tokenizer's training would take time quadratic in its length


# ---- tokenizer ----


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE; ids 0..3 are SPECIAL_TOKENS, then the 256 bytes, so that any text survives the round trip. There are
    fewer than vocab_size tokens if the texts run out of pairs that occur twice."""
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(WORD), "isolated"), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, min_frequency=2, special_tokens=list(SPECIAL_TOKENS),
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def plain_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of text in which special-token strings are ordinary text. InputError for what is no Unicode text."""
    tokenizer.encode_special_tokens = True
    try:
        return tokenizer.encode(text, add_special_tokens=False).ids
    except TypeError:  # half a surrogate pair, as which Python passes on what it cannot decode
        raise InputError(f"{text[:60]!a} is not UTF-8 text: convert it first") from None
    finally:
        tokenizer.encode_special_tokens = False


def chat_ids(tokenizer: Tokenizer, messages: list[dict], open_turn: bool = False) -> list[int]:
    """Token ids of render_chat(messages, open_turn), in which only the markup is special, whatever the contents hold."""
    start, end = tokenizer.token_to_id("<|im_start|>"), tokenizer.token_to_id("<|im_end|>")
    ids, newline = [], plain_ids(tokenizer, "\n")
    for message in messages:
        ids += [start, *plain_ids(tokenizer, f"{message['role']}\n{message['content']}"), end, *newline]
    return ids + [start, *plain_ids(tokenizer, "assistant\n")] if open_turn else ids


def conversation_ids(tokenizer: Tokenizer, messages: list[dict]) -> list[int]:
    """Tokens of a conversation that the assistant is to go on with, as the beginning of a new document."""
    return [tokenizer.token_to_id("<|endoftext|>"), *chat_ids(tokenizer, messages, open_turn=True)]


# ---- the stages ----


def segments(text: str) -> Iterator[str]:
    """Text in parts that are split into words as the whole is; a long string would cost 200 bytes per character."""
    start = 0
    while len(text) - start > SEGMENT and (match := BOUNDARY.search(text, start + SEGMENT)):
        yield text[start : match.end()]
        start = match.end()
    yield text[start:]


def sample_texts(texts: Iterable[str], n_bytes: int, vocab_size: int) -> Iterator[str]:
    """What the tokenizer learns from: 2 kB per vocabulary entry, 10 to 50 MB in all, evenly spread over n_bytes of text."""
    ratio, credit = min(1.0, min(50e6, max(10e6, 2000 * vocab_size)) / n_bytes), 0.0
    for text in texts:
        credit += ratio * len(text)
        if credit > 0:
            text = text[: max(SEGMENT, int(credit))] if ratio < 1 else text
            credit -= len(text)
            text = SPECIAL.sub("\n", text)  # chat markup is not for merging
            yield from segments(ENDLESS.sub("\\g<0>\n", text))


class Encoder:
    """Texts -> tokens, with a memory: most of a text are words that have been encoded before.

    A piece ends at the next space or line start behind something visible. WORD always ends a match there, so pieces encoded one by
    one give the tokens of the whole.
    """

    PIECE = re.compile(r"\s*\S+(?:(?!\n+\S)[^\S ]\s*\S*)*\n*|\s+")
    MOST = 1 << 20  # characters of the pieces remembered, some 100,000 words and 20 MB

    def __init__(self, tokenizer_json: str):
        self.tokenizer, self.known, self.size = Tokenizer.from_str(tokenizer_json), {}, self.MOST

    def __call__(self, texts: list[str]) -> np.ndarray:
        """(N,) uint16 tokens of the texts, <|endoftext|> after each."""
        if self.size >= self.MOST:
            self.known, self.size = {None: bytes(2)}, 0  # None: the end of a text
        pieces = [piece for text in texts for piece in (*self.PIECE.findall(text), None)]
        new = list(set(pieces).difference(self.known))
        for piece, encoding in zip(new, self.tokenizer.encode_batch_fast(new, add_special_tokens=False)):
            self.known[piece] = array("H", encoding.ids).tobytes()
            self.size += len(piece)
        return np.frombuffer(b"".join(map(self.known.__getitem__, pieces)), np.uint16)


encoder: Encoder | None = None  # of this process


def start_encoder(tokenizer_json: str):
    global encoder
    if multiprocessing.parent_process():  # a worker: the processes are parallel, their threads need not be
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
    encoder = Encoder(tokenizer_json)


def encode_batch(texts: list[str]) -> np.ndarray:
    return encoder(texts)


def encode(texts: Iterable[str], tokenizer_json: str) -> Iterator[np.ndarray]:
    """(N,) uint16 tokens of about BATCH characters of texts at a time, each text followed by <|endoftext|>."""
    return ordered_map(encode_batch, chunks(texts, BATCH, len), WORKERS, start_encoder, tokenizer_json)


# ---- where the result goes ----

OURS = re.compile(r"tokenizer\.json|meta\.json|phase[123]_(train|val)_\d{5}\.bin|problems_(train|val|test)\.jsonl"
                  r"|\.DS_Store")  # which macOS leaves wherever it has shown a folder


@contextlib.contextmanager
def replacing(out: Path) -> Iterator[Path]:
    """An empty folder beside out to build in, which becomes out if all goes well; what a killed run left is tidied up first."""
    if out.is_symlink():  # to another disk, say: the folder is there, and its neighbours must be too
        out = out.resolve()
    if out.name in ("", ".."):
        raise InputError(f"--out={out} names no folder of its own: expected one such as data/mine")
    if out.exists():
        foreign = [p.name for p in sorted(out.iterdir()) if not OURS.fullmatch(p.name)] if out.is_dir() else [out.name]
        if foreign:
            raise InputError(f"{out} holds {foreign[0]}, which prepare.py did not make: choose another --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    lock, old, new = (out.parent / f".{out.name}.{kind}" for kind in ("lock", "old", "new"))

    def tidy():
        if old.exists() and not out.exists():  # stopped between the two renames below
            old.rename(out)
        shutil.rmtree(old, ignore_errors=True)
        shutil.rmtree(new, ignore_errors=True)

    with lock.open("w") as file:
        # A lockf ends with this process, and worker processes do not inherit it; a run that held it may have removed the file, just now.
        if not locked(fcntl.lockf, file) or not os.fstat(file.fileno()).st_nlink:
            raise InputError(f"{out} is being written by another prepare.py: wait for it or choose another --out")
        try:
            tidy()
            new.mkdir()
            yield new
            if out.exists():
                out.rename(old)
            new.rename(out)
        except OSError as error:
            error.filename = error.filename or str(new)  # a failed write does not say where
            raise
        finally:
            tidy()
            lock.unlink()


# ---- the main job ----


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(prog="prepare.py", description=__doc__)
    parser.add_argument("source", nargs="*", help="text of every phase that has no sources of its own (default: builtin): "
                        f"{' '.join(FILE_TYPES)}, folders, hf:// addresses, or builtin for the built-in corpus")
    for phase in WINDOWS:
        parser.add_argument(f"--phase{phase}", nargs="+", metavar="SOURCE", help=f"sources of phase {phase}")
    parser.add_argument("--val", nargs="+", metavar="SOURCE", help="validation text of all phases (default: split off the sources)")
    parser.add_argument("--field", help="field of .jsonl and .parquet that holds the text "
                        "(default: text, content, question + answer, messages)")
    parser.add_argument("--max_mb", type=float, help="read only so many MB (a million bytes of text, before cleaning) of each source, from "
                        "the first file on; the built-in corpus is always whole")
    parser.add_argument("--skip_bad", action="store_true", help="leave out malformed lines of .jsonl and rows of .parquet: not UTF-8, no "
                        "JSON, without the text (default: stop at the first)")
    parser.add_argument("--keep_odd", action="store_true", help="leave out no document because it looks like no text or repeats itself: "
                        "for numbers, DNA, invented languages")
    vocabulary = parser.add_mutually_exclusive_group()
    vocabulary.add_argument("--vocab_size", type=int, default=1024, help="260 to 65536 (default 1024)")
    vocabulary.add_argument("--tokenizer", type=Path, help="train none, take this tokenizer.json of prepare.py or the one in a folder: "
                            "for a model that is there and is to learn this text (train.py --init)")
    parser.add_argument("--out", type=Path, help="folder to write (default: data/ and the name of the first source but builtin)")
    parser.add_argument("--push", metavar="USER/NAME", help="then publish the folder as a data set on the Hugging Face Hub")
    parser.add_argument("--val_fraction", type=float, default=0.02, help="share of the documents kept for validation (default 0.02); "
                        "if that is less than one document, the last tenth of the text is, or this share if it is more")
    parser.add_argument("--shard_tokens", type=int, default=100_000_000, help="tokens per shard (default 100 million)")
    args = parser.parse_args(argv)
    for name, low, high in (("vocab_size", 260, 65536), ("val_fraction", 0.0001, 0.5), ("shard_tokens", 1024, 2**31 - 1)):
        if not low <= getattr(args, name) <= high:
            raise InputError(f"--{name}={getattr(args, name)} is out of range: expected {low} to {high}")
    if args.max_mb is not None and not 1e-6 <= args.max_mb < math.inf:
        raise InputError(f"--max_mb={args.max_mb:g} is out of range: expected a positive number of megabytes")
    named = itertools.chain(args.source, args.val or [], *(getattr(args, f"phase{phase}") or [] for phase in WINDOWS))
    if args.max_mb is not None and not set(named) - {"builtin"}:
        raise InputError(f"--max_mb={args.max_mb:g} would limit nothing, the built-in corpus is always whole: leave it out or name sources")
    if args.source and all(getattr(args, f"phase{phase}") for phase in WINDOWS):
        raise InputError(f"{args.source[0]} would not be read, every phase has sources of its own: give it to --phase1, 2 or 3")
    if "builtin" in (args.val or []):
        raise InputError("--val=builtin: the built-in corpus brings its own validation text: leave --val out")
    args.tokenizer = args.tokenizer and read_tokenizer(args.tokenizer)
    return args


def speed(n_bytes: int, start: float) -> str:
    seconds = time.perf_counter() - start
    return f"{n_bytes / 1e6:.2f} MB in {seconds:.1f} s ({n_bytes / 1e6 / seconds:.1f} MB/s)"


def clean_sources(spool: Spool, sources: list, files: dict, args: argparse.Namespace) -> dict:
    """Read and clean sources [(source, label)] into spool: (source, label) -> ((first, end) of its documents, tally, specials, Reading)."""
    start, result, work = time.perf_counter(), {}, functools.partial(clean_chunk, keep_odd=args.keep_odd)
    max_bytes = math.inf if args.max_mb is None else round(args.max_mb * 1e6)
    with tqdm(desc="cleaning", unit="B", unit_scale=True, disable=None, leave=False) as bar:
        for source, label in sources:
            first, tally, specials = spool.n, np.zeros((len(FATES), 2), np.int64), 0
            reading = Reading(max_bytes, args.skip_bad)
            documents = read_source(source, files.get(source), label, args.field, reading)
            for cleaned in ordered_map(work, chunks(documents, clean.CHUNK, clean.effort), WORKERS):
                spool.add(cleaned)
                tally, specials = tally + cleaned.tally, specials + cleaned.specials
                bar.update(int(cleaned.tally[:, 1].sum()))
            result[source, label] = ((first, spool.n), tally, specials, reading)
            if reading.n_bad and not tally.any():
                raise InputError(f"{source.name}: all {reading.n_bad:,} lines are bad, the first: {reading.first_bad}")
    print(f"read and cleaned {speed(sum(tally[:, 1].sum() for _, tally, _, _ in result.values()), start)}")
    for (source, _), (*_, reading) in result.items():
        if args.max_mb is not None and source.name != "builtin":
            print(f"{source.name}: {reading.n_bytes / 1e6:.2f} MB of text, from {reading.n_files:,} of {len(files[source]):,} files "
                  f"(--max_mb={args.max_mb:g})")
        if reading.n_bad:
            print(f"{source.name}: {reading.n_bad:,} bad lines left out, the first: {reading.first_bad}")
    return result


def cleaning_table(spool: Spool, splits: Splits, result: dict) -> list[dict]:
    """Print what became of the documents of each source; a row per source, as meta.json keeps it."""
    used, table = np.logical_or.reduce([parts > 0 for parts in splits.parts.values()]), []
    for (source, label), ((start, stop), tally, specials, reading) in result.items():
        for first, rows in spool.rows(start, stop):
            block = slice(first, first + len(rows))
            for fate, dropped in ((EXACT_COPY, splits.exact[block]), (NEAR_COPY, ~splits.exact[block])):
                dropped = dropped & ~used[block]
                moved = np.array([dropped.sum(), rows["n_bytes"][dropped].sum(dtype=np.int64)])
                tally[fate] += moved
                tally[KEPT] -= moved
        name = source.name + (f" (phase {source.phase})" if source.phase else "") + (" (validation)" if label == VAL else "")
        counts = {"documents": tally[:, 0].sum(), "bytes": tally[:, 1].sum(), **dict(zip(FATES, tally[:, 0])), "kept bytes": tally[KEPT, 1]}
        table.append({"source": name, **{key: int(n) for key, n in counts.items()}, "special tokens removed": specials,
                      "bad lines": reading.n_bad})
    headings = ("documents", "MB", *FATES, "kept MB")
    print(f"\n{'source':32}" + "".join(f"{heading:>11}" for heading in headings))
    for row in table:
        values = (row["documents"], f"{row['bytes'] / 1e6:.2f}", *(row[fate] for fate in FATES), f"{row['kept bytes'] / 1e6:.2f}")
        print(f"{row['source'][-32:]:32}" + "".join(f"{value:>11}" for value in values))
    removed = sum(row["special tokens removed"] for row in table)
    print(f"removed {removed} special-token strings from the text\n" if removed else "")
    return table


def check_phases(splits: Splits, wanted: dict[int, list], table: list[dict], val: list[str] | None):
    """InputError if a phase lacks training or validation text."""
    fates = ", ".join(f"{sum(row[fate] for row in table)} {fate}" for fate in FATES)
    for phase, sources in wanted.items():
        names = " ".join(dict.fromkeys(source.name for source, label in sources if label != VAL))
        for split, which in (("train", "training"), ("val", "validation")):
            if not splits.wanted(phase, split).any():
                remedy = f"all of it is also validation text (--val={' '.join(val)})" if val and split == "train" else "give more text"
                if any(row["broken"] or row["repetitive"] for row in table):
                    remedy += "; --keep_odd keeps what is called broken or repetitive"
                raise InputError(f"phase {phase}: {names} leaves no {which} text ({fates}): {remedy}")


def make_tokenizer(spool: Spool, splits: Splits, vocab_size: int) -> Tokenizer:
    """Train the tokenizer on a sample of the training text of all phases."""
    start = time.perf_counter()
    train = np.logical_or.reduce([splits.wanted(phase, "train") for phase in splits.parts])
    n_bytes = sum(int(rows["n_bytes"][train[first : first + len(rows)]].sum(dtype=np.int64)) for first, rows in spool.rows(0, spool.n))
    texts = (splits.text(doc, text, "train") for doc, text in spool.texts(train))
    tokenizer = train_tokenizer(sample_texts(texts, n_bytes, vocab_size), vocab_size)
    size = tokenizer.get_vocab_size()
    fewer = "" if size == vocab_size else f", not {vocab_size}: no other pair occurs twice in the text"
    print(f"tokenizer trained in {time.perf_counter() - start:.1f} s: {size} tokens{fewer}")
    return tokenizer


def read_tokenizer(path: Path) -> str:
    """The text of a tokenizer.json that prepare.py wrote, or that a folder of it holds. InputError for any other: Encoder relies on
    where ours cuts words, and the special tokens have to be 0 to 3."""
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        raise InputError(f"--tokenizer={path} does not exist: name a tokenizer.json of prepare.py, or a folder that holds one")
    try:
        text = path.read_text(encoding="utf-8")
        Tokenizer.from_str(text)
        ours, theirs = json.loads(train_tokenizer([], 260).to_str()), json.loads(text)
    except Exception as problem:  # the only type that the tokenizers library raises
        raise InputError(f"--tokenizer={path} is not a tokenizer ({problem}): name a tokenizer.json of prepare.py") from problem
    differ = [key for key in ours if key != "model" and ours[key] != theirs.get(key)]
    if differ or len(theirs["model"]["vocab"]) > 65536:
        raise InputError(f"--tokenizer={path} is not one of prepare.py ({', '.join(differ)}): leave it out, a new one is trained then")
    return text


def write_splits(spool: Spool, splits: Splits, tokenizer_json: str, folder: Path, limit: int) -> dict:
    """Write the shards of all phases: phase -> split -> documents, bytes, tokens, shards, sha256 of the tokens."""
    phases, n_bytes, start = {}, 0, time.perf_counter()
    for phase in splits.parts:
        phases[str(phase)] = {}
        for split in ("train", "val"):
            chosen = splits.wanted(phase, split)
            twin = next((p for p in range(1, phase) if np.array_equal(splits.wanted(p, split), chosen)), None)
            if twin:  # the same text: the same shards under another name
                total = dict(phases[str(twin)][split])
                total["shards"] = [name.replace(f"phase{twin}", f"phase{phase}") for name in total["shards"]]
                for old, name in zip(phases[str(twin)][split]["shards"], total["shards"]):
                    try:
                        os.link(folder / old, folder / name)
                    except OSError:  # a file system without hard links
                        shutil.copyfile(folder / old, folder / name)
            else:
                writer = ShardWriter(folder, f"phase{phase}_{split}", tokenizer_json, limit)
                texts = (splits.text(doc, text, split) for doc, text in spool.texts(chosen))
                with tqdm(desc=f"phase {phase} {split}", unit="B", unit_scale=True, disable=None, leave=False) as bar:
                    for tokens in encode(texts, tokenizer_json):
                        writer.write(tokens)
                        bar.update(writer.total["bytes"] - bar.n)
                        bar.set_postfix_str(f"{writer.total['tokens']:,} tokens")
                total = writer.close()
                n_bytes += total["bytes"]
            phases[str(phase)][split] = total
    print(f"tokenised {speed(n_bytes, start)}\n")
    return phases


def print_phases(phases: dict, shard_tokens: int):
    rows = [(phase, split, total) for phase, parts in phases.items() for split, total in parts.items()]
    print("phase  split   documents        MB      tokens  bytes/token")
    for phase, split, n in rows:
        print(f"{phase:5}  {split:5} {n['documents']:11,} {n['bytes'] / 1e6:9.2f} {n['tokens']:11,} {n['bytes'] / n['tokens']:12.3f}")
    for phase, split, n in rows:
        if (most := min(n["tokens"], shard_tokens)) <= WINDOWS[int(phase)]:
            remedy = "prepare more text, raise --val_fraction," if split == "val" else "prepare more text"
            remedy, where = ("raise --shard_tokens", " in a shard") if n["tokens"] > shard_tokens else (remedy, "")
            print(f"warning: phase {phase} {split} has {most} tokens{where}, a window of phase {phase} needs {WINDOWS[int(phase)] + 1}: "
                  f"{remedy} or lower --seq_len in training")


def write_problems(folder: Path):
    """The word problems of the built-in corpus as files of their own: training as in phase 2, for distillation and its test."""
    for split, count in (("train", corpus.TRAIN_PROBLEMS), ("val", corpus.VAL_PROBLEMS), ("test", corpus.VAL_PROBLEMS)):
        with open(folder / f"problems_{split}.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps(problem, ensure_ascii=False) + "\n" for problem in corpus.problems(split, count))


def build(args: argparse.Namespace, folder: Path, wanted: dict[int, list], files: dict[Source, list]):
    """All stages, from the sources each phase wants to a complete data folder."""
    spool = Spool(folder / "spool")
    sources = sorted(dict.fromkeys(itertools.chain(*wanted.values())), key=lambda s: s[1] != VAL)  # first comes what is never dropped
    result = clean_sources(spool, sources, files, args)
    ranges = {phase: [result[source][0] for source in wanted[phase]] for phase in wanted}
    splits = assign_splits(spool, ranges, args.val_fraction)
    table = cleaning_table(spool, splits, result)
    check_phases(splits, wanted, table, args.val)
    tokenizer_json = args.tokenizer or make_tokenizer(spool, splits, args.vocab_size).to_str()
    vocab_size = Tokenizer.from_str(tokenizer_json).get_vocab_size()
    (folder / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")
    phases = write_splits(spool, splits, tokenizer_json, folder, args.shard_tokens)
    spool.close()
    shutil.rmtree(spool.folder)
    print_phases(phases, args.shard_tokens)
    if any(source.name == "builtin" for source, _ in sources):
        write_problems(folder)
    contents = [tokenizer_json] + [f"{phase} {split} {total['sha256']}" for phase in phases for split, total in phases[phase].items()]
    meta = {"vocab_size": vocab_size, "special_tokens": SPECIAL_TOKENS, "phases": phases, "cleaning": table, "max_mb": args.max_mb,
            "sources": {phase: [source.name for source, _ in wanted[phase]] for phase in wanted},
            "fingerprint": hashlib.sha256("\n".join(contents).encode()).hexdigest()}
    (folder / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")


def main(argv: list[str] | None = None):
    """Prepare data as the command line (or argv) says; train.py calls main([]) for the default data. Raises InputError."""
    args = parse(argv)
    names = {phase: getattr(args, f"phase{phase}") or args.source or ["builtin"] for phase in WINDOWS}
    label = TRAIN if args.val else UNLABELLED
    val = [(Source(name), VAL) for name in dict.fromkeys(args.val or [])]
    wanted = {phase: val + [(Source(name, phase if name == "builtin" else 0), label) for name in dict.fromkeys(names[phase])]
              for phase in names}
    notes, files = [], {}
    for source, _ in dict.fromkeys(itertools.chain(*wanted.values())):
        if source.name != "builtin" and source not in files:
            files[source] = source_files(source.name, notes.append)
    out = args.out or data_folder([*args.source, *itertools.chain(*names.values())])
    with replacing(out) as folder:
        for note in notes:  # not before it is clear that there is no error to say
            print(note, file=sys.stderr)
        build(args, folder, wanted, files)
    if args.push:
        import publish  # here, because it needs torch, which takes seconds to import

        publish.push_data(out, args.push)
        print(f"published as {args.push}")
    print(f"next: python train.py{'' if out == Path('data/builtin') else f' --data={shlex.quote(str(out))}'}")


if __name__ == "__main__":
    run(main)
