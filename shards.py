"""Token shards, the files between prepare.py and train.py: a header of 256 x int32, then the tokens as uint16.

prepare.py streams tokens into them with ShardWriter; train.py maps them into memory with read_shard, which refuses a file
that is foreign, cut short or of another tokenizer. meta.json beside them says which shards a phase has.
"""

import hashlib
import json
from functools import lru_cache
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from scripts import InputError

MAGIC, VERSION, HEADER = 20260208, 1, 256
END = 0  # <|endoftext|>, the first special token of every tokenizer, stands after each document


def tokenizer_fingerprint(tokenizer_json: str) -> int:
    """The first 4 bytes of the SHA-256 of tokenizer.json's text, as the int32 that a shard's header holds."""
    return int.from_bytes(hashlib.sha256(tokenizer_json.encode()).digest()[:4], "little", signed=True)


def token_bytes(tokenizer: Tokenizer) -> np.ndarray:
    """(vocab_size,) int32: bytes of text each token stands for, 0 for special tokens; what bits per byte divides by."""
    table = np.zeros(tokenizer.get_vocab_size(), np.int32)
    special = tokenizer.get_added_tokens_decoder()
    for token, number in tokenizer.get_vocab().items():
        table[number] = 0 if number in special else len(token)  # byte-level BPE writes each byte as one character
    return table


def shard_header(n_tokens: int, vocab_size: int, n_bytes: int, n_documents: int, fingerprint: int) -> bytes:
    """magic, version, tokens, vocab_size, bytes of text (low, high half), documents that end here, tokenizer fingerprint."""
    header = np.zeros(HEADER, "<i4")
    header[:4] = MAGIC, VERSION, n_tokens, vocab_size
    header[4:6] = np.array([n_bytes], "<i8").view("<i4")
    header[6:8] = n_documents, fingerprint
    return header.tobytes()


def write_shard(path, tokens: np.ndarray, vocab_size: int, n_bytes: int, fingerprint: int, n_documents: int = 0):
    """One whole shard of (N,) uint16 tokens, written to a temporary file and renamed: it exists complete or not at all."""
    temporary = Path(f"{path}.tmp")
    with open(temporary, "wb") as file:
        file.write(shard_header(len(tokens), vocab_size, n_bytes, n_documents, fingerprint))
        file.write(np.ascontiguousarray(tokens, "<u2").tobytes())
    temporary.rename(path)


def read_shard(path, vocab_size: int | None = None, fingerprint: int | None = None) -> tuple[dict, np.memmap]:
    """(header as a dict, (N,) uint16 tokens mapped from disk); InputError if the file is missing, foreign, of another
    version, cut short, or (where given) of another vocab_size or tokenizer fingerprint."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path} does not exist: make it with python prepare.py")
    size, again = path.stat().st_size, "make the data again with python prepare.py"
    header = np.fromfile(path, "<i4", HEADER)
    if size < HEADER * 4 or header[0] != MAGIC:
        raise InputError(f"{path} is not a token shard of prepare.py: {again}")
    if header[1] != VERSION:
        raise InputError(f"{path} has shard version {header[1]}, this code reads version {VERSION}: {again}")
    names = ("n_tokens", "vocab_size", "n_documents", "fingerprint")
    fields = dict(zip(names, header[[2, 3, 6, 7]].tolist()), n_bytes=int(header[4:6].copy().view("<i8")[0]))
    if size != HEADER * 4 + 2 * fields["n_tokens"]:
        raise InputError(f"{path} holds {size - HEADER * 4} bytes of tokens, its header says {2 * fields['n_tokens']}: {again}")
    for name, expected in (("vocab_size", vocab_size), ("fingerprint", fingerprint)):
        if expected is not None and fields[name] != expected:
            raise InputError(f"{path} was made with another tokenizer ({name} {fields[name]}, expected {expected}): {again}")
    return fields, np.memmap(path, "<u2", "r", HEADER * 4, (fields["n_tokens"],))


def load_tokenizer(folder: Path) -> tuple[str, Tokenizer]:
    """(the text of tokenizer.json of a data folder, the Tokenizer). Raises InputError."""
    try:
        text = (folder / "tokenizer.json").read_text(encoding="utf-8")
        return text, Tokenizer.from_str(text)
    except Exception as problem:  # the only type that the tokenizers library raises
        raise InputError(f"{folder}/tokenizer.json is not a tokenizer ({problem}): make the data again with prepare.py") from problem


def load_meta(folder) -> dict:
    """meta.json of a data folder: vocab_size, special_tokens, fingerprint, phases[n][split] with documents, bytes, tokens and
    shards, and what cleaning did. InputError if there is none."""
    path = Path(folder) / "meta.json"
    if not path.is_file():
        command = "python prepare.py" if Path(folder) == Path("data/builtin") else f"python prepare.py SOURCE --out={folder}"
        raise InputError(f"{folder} holds no prepared data: make it with {command}")
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        meta = None
    try:
        whole = "fingerprint" in meta and type(meta["vocab_size"]) is int
        for split in (split for splits in meta["phases"].values() for split in splits.values()):
            whole = whole and all(isinstance(name, str) for name in split["shards"])
    except (AttributeError, KeyError, TypeError):
        whole = False
    if not whole:
        raise InputError(f"{path} is not a meta.json of prepare.py: make the data again with --out={folder}")
    return meta


def shard_paths(folder, phase: int, split: str) -> list[Path]:
    """The shards of a phase (1, 2, 3) and split ("train", "val") in order, as meta.json lists them."""
    try:
        return [Path(folder) / name for name in load_meta(folder)["phases"][str(phase)][split]["shards"]]
    except KeyError:
        raise InputError(f"{folder}/meta.json lists no {split} shards of phase {phase}: make the data again with prepare.py") from None


@lru_cache(maxsize=2)
def epoch_order(n_windows: int, seq_len: int, seed: int, phase: int, epoch: int) -> tuple[np.ndarray, int]:
    """The order of the windows in one pass over the data, and the shift of their grid: each pass cuts at other places."""
    rng = np.random.default_rng((seed, phase, epoch))
    return rng.permutation(n_windows), int(rng.integers(seq_len))


class Windows:
    """The token shards of one phase and split, cut into windows of seq_len + 1 tokens."""

    def __init__(self, folder: Path, phase: int, split: str, seq_len: int, vocab_size: int, fingerprint: int):
        paths = self.paths = shard_paths(folder, phase, split)
        self.seq_len, self.vocab_size = seq_len, vocab_size
        self.shards = [read_shard(path, vocab_size, fingerprint)[1] for path in paths]
        self.counts = [(len(shard) - 1) // seq_len for shard in self.shards]
        self.n_tokens, self.n_windows = sum(map(len, self.shards)), sum(self.counts)
        if self.n_windows < 1:
            longest = max(zip(map(len, self.shards), paths), default=(0, f"{folder}/phase{phase}_{split}_*.bin"))
            raise InputError(
                f"{longest[1]} holds {longest[0]:,} tokens, a window of phase {phase} needs {seq_len + 1:,}:"
                f" prepare more text{', raise its --val_fraction' * (split == 'val')} or lower --seq_len"
            )
        self.firsts = np.cumsum([0, *self.counts])  # number of the first window of each shard

    def read(self, window: int, offset: int = 0) -> np.ndarray:
        """The seq_len + 1 tokens of a window, the grid of windows being moved by `offset` tokens. Raises InputError where a shard is
        damaged, so that the embedding is never asked for a row that it does not have."""
        s = int(np.searchsorted(self.firsts, window, side="right")) - 1
        start = offset + int(window - self.firsts[s]) * self.seq_len
        start = min(start, len(self.shards[s]) - self.seq_len - 1)
        tokens = self.shards[s][start : start + self.seq_len + 1]
        if tokens.max() >= self.vocab_size:
            raise InputError(f"{self.paths[s]} is damaged: token {tokens.max()} of {self.vocab_size}: make the data again with prepare.py")
        return tokens

    def batch(self, seed: int, phase: int, first: int, count: int) -> np.ndarray:
        """Training examples first to first + count of the endless sequence that (seed, phase) determine: [count, seq_len + 1]"""
        rows = []
        for n in range(first, first + count):
            order, offset = epoch_order(self.n_windows, self.seq_len, seed, phase, n // self.n_windows)
            rows.append(self.read(order[n % self.n_windows], offset))
        return np.stack(rows).astype(np.int64)


class ShardWriter:
    """Streams tokens into <stem>_00000.bin, <stem>_00001.bin, ... of limit tokens each; documents run over shard ends."""

    def __init__(self, folder: Path, stem: str, tokenizer_json: str, limit: int):
        self.folder, self.stem, self.limit = folder, stem, limit
        self.fingerprint = tokenizer_fingerprint(tokenizer_json)
        self.bytes_of = token_bytes(Tokenizer.from_str(tokenizer_json))
        self.file, self.digest = None, hashlib.sha256()
        self.total = {"documents": 0, "bytes": 0, "tokens": 0, "shards": []}

    def write(self, tokens: np.ndarray):
        """(N,) uint16"""
        while len(tokens):
            if self.file is None:
                name = f"{self.stem}_{len(self.total['shards']):05d}.bin"
                self.total["shards"].append(name)
                self.file, self.count = (self.folder / name).open("wb"), {"documents": 0, "bytes": 0, "tokens": 0}
                self.file.write(bytes(HEADER * 4))  # the real header comes last
            part, tokens = np.split(tokens, [self.limit - self.count["tokens"]])
            data = part.astype("<u2").tobytes()
            self.file.write(data)
            self.digest.update(data)
            for name, n in (("documents", (part == END).sum()), ("bytes", self.bytes_of[part].sum()), ("tokens", len(part))):
                self.count[name] += int(n)
                self.total[name] += int(n)
            if self.count["tokens"] == self.limit:
                self.close()

    def close(self) -> dict:
        """Complete the shard under way; what has been written in all, as meta.json says it."""
        if self.file is not None:
            self.file.seek(0)
            n = self.count
            self.file.write(shard_header(n["tokens"], len(self.bytes_of), n["bytes"], n["documents"], self.fingerprint))
            self.file.close()
            self.file = None
        return self.total | {"sha256": self.digest.hexdigest()}
