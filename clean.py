"""What happens to a document before the tokenizer sees it: its text is cleaned, judged, and compared with all the others.

clean_chunk() is what prepare.py's worker processes run on a few hundred documents at a time; Spool keeps the survivors on
disk and finds the copies among them; assign_splits() decides what is for training and what for validation. Memory grows
with the number of documents only: some 20 bytes for each, beside a chunk per process.
"""

import hashlib
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sources import TRAIN, UNLABELLED, VAL

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>")  # ids 0..3 of every tokenizer
SPECIAL = re.compile("|".join(map(re.escape, SPECIAL_TOKENS)))
CONTROL = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\ufffd\ufffe\uffff]")
EMPTY, BROKEN, REPETITIVE, EXACT_COPY, NEAR_COPY, KEPT = range(6)
FATES = ("empty", "broken", "repetitive", "exact copy", "near copy", "kept")

CHUNK = 1 << 20  # characters of documents that a worker cleans at a time, about 60 MB of its memory

SHINGLE = 5  # words per shingle
BANDS, ROWS = 14, 8  # FineWeb's choice (arXiv:2406.17557): copies of Jaccard .8 are found with probability .92, of .5 with .05
SLOTS = BANDS * ROWS
UNSET = np.uint64(2**64 - 1)
MAX_REPEATED = 0.5  # of a document's shingles: literature stays below .1, manuals and source code below .5, looping text is above .8
MIN_TEXT = 0.25  # letters and digits among the visible bytes: arithmetic has .5, source code .7, prose .9
MAX_WORD = 40  # mean ASCII characters per word: prose and source code have 3 to 10, base64 and minified data hundreds
BUCKETS = 128  # files the keys are spread over: 50 million documents make buckets of 70 MB; macOS allows 256 open files

INDEX = np.dtype([("n_bytes", "<u4"), ("n_chars", "<u4"), ("hash", "<u8"), ("side", "<u8"), ("label", "u1"), ("chat", "u1")])
KEY = np.dtype([("key", "<u8"), ("doc", "<u4")])


def render_chat(messages: list[dict], open_turn: bool = False) -> str:
    """ChatML text of messages ({"role", "content"}); open_turn adds the start of an assistant's turn, to generate from."""
    text = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
    return text + "<|im_start|>assistant\n" if open_turn else text


def clean_text(text: str) -> tuple[str, int, bool]:
    """(clean text, special-token strings removed, broken): one line ending, no control characters, no special tokens, NFC.

    Cleaning a clean text changes nothing. Broken: characters that decoding had lost (U+FFFD) are over a thousandth, or
    control characters over a twentieth of the text.
    """
    n_chars = len(text)
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\ufeff", "")
    for separator in "\x0b\x0c\x85\u2028\u2029":  # page and line separators: removing them would join words
        text = text.replace(separator, "\n")
    lost = text.count("\ufffd")
    text, controls = CONTROL.subn("", text)
    removed, found = 0, 1
    while found and "<|" in text:  # until none is left: removing one can put another together
        text, found = SPECIAL.subn("", text)
        removed += found
    if not unicodedata.is_normalized("NFC", text):
        text = unicodedata.normalize("NFC", text)
    return text, removed, lost * 1000 > n_chars or controls * 20 > n_chars


# ---- vectorised judgement of a chunk of documents ----


def mix(h: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser: uint64 -> uint64 with every input bit spread over all output bits."""
    h = h ^ (h >> np.uint64(30))
    h *= np.uint64(0xBF58476D1CE4E5B9)
    h ^= h >> np.uint64(27)
    h *= np.uint64(0x94D049BB133111EB)
    h ^= h >> np.uint64(31)
    return h


def fold_table() -> np.ndarray:
    """(256,) uint8: byte -> its lower-case self inside a word, 0 where words end: white space and the marks of prose.

    Symbols stay (1+2 and 1-2 are two texts), and so do all bytes of non-ASCII characters.
    """
    table = np.arange(256, dtype=np.uint8)
    table[ord("A") : ord("Z") + 1] += 32
    table[:33] = 0
    table[list(b".,;:!?'\"`()[]{}")] = 0
    return table


FOLD = fold_table()
IS_TEXT = np.array([byte >= 128 or chr(byte).isalnum() for byte in range(256)])
BASE = 0x9E3779B97F4A7C15  # odd, so it has an inverse modulo 2^64
SEEDS = mix(np.arange(1, 2 * SLOTS + 1, dtype=np.uint64) * np.uint64(BASE))
BAND_WEIGHTS = mix(SEEDS[:SLOTS] + np.uint64(1)).reshape(BANDS, ROWS) | np.uint64(1)


def powers(base: int, n: int) -> np.ndarray:
    """(n,) uint64: base^0 .. base^(n-1) modulo 2^64."""
    table = np.full(n, base % 2**64, dtype=np.uint64)
    table[:1] = 1
    return np.cumprod(table, out=table)


def shingles(texts: list[bytes]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hashes of all runs of SHINGLE words, of all texts at once.

    Returns (hashes (S,) uint64, text number of each (S,) int64 ascending, is each text text at all (len(texts),) bool).
    A text of fewer words has one shingle. Each Chinese or Japanese character (UTF-8 lead byte 0xE3 to 0xE9) is a word.
    """
    buffer = np.frombuffer(b"\n".join(texts) + b"\n", dtype=np.uint8)
    begin = np.cumsum([0] + [len(t) + 1 for t in texts[:-1]])
    letters = FOLD[buffer]
    in_word = letters != 0
    word_starts = in_word & (buffer >= 0xE3) & (buffer <= 0xE9)
    word_starts[0] |= in_word[0]
    word_starts[1:] |= in_word[1:] & ~in_word[:-1]
    first = np.flatnonzero(word_starts)
    if not len(first):
        return np.empty(0, np.uint64), np.empty(0, np.int64), np.zeros(len(texts), bool)
    # A word's hash is a polynomial in BASE; separators are 0, so summing from word to word is right, and the inverse
    # power takes the position out again.
    n = len(buffer)
    words = np.add.reduceat(letters * powers(BASE, n), first) * powers(pow(BASE, -1, 2**64), n)[first]
    owner = np.searchsorted(begin, first, side="right") - 1
    n_words = np.bincount(owner, minlength=len(texts))

    visible = np.add.reduceat(buffer > 32, begin, dtype=np.int64)
    is_text = np.add.reduceat(IS_TEXT[buffer], begin, dtype=np.int64) >= MIN_TEXT * np.maximum(visible, 1)
    is_text &= np.add.reduceat(in_word & (buffer < 0x80), begin, dtype=np.int64) <= MAX_WORD * n_words

    pad = SHINGLE - 1  # empty words after each text, so that no shingle reaches into the next one
    padded = np.zeros(len(words) + pad * (len(texts) + 1), np.uint64)
    padded[np.arange(len(words)) + pad * owner] = mix(words)
    size = len(words) + pad * len(texts)
    runs = sum(padded[i : i + size] * powers(BASE, SHINGLE)[i] for i in range(SHINGLE))
    of_text = np.repeat(np.arange(len(texts)), n_words + pad)
    place = np.arange(size) - (np.cumsum(n_words + pad) - n_words - pad)[of_text]
    valid = place < np.maximum(n_words - pad, np.minimum(n_words, 1))[of_text]
    return mix(runs[valid]), of_text[valid], is_text


def repeated_share(hashes: np.ndarray, owner: np.ndarray, n_texts: int) -> np.ndarray:
    """(n_texts,) float: share of a text's shingles that have occurred in it before.

    One number in place of the line, paragraph and n-gram repetition rules of Gopher (arXiv:2112.11446, table A1): whatever
    repeats, be it a word, a line or a page, repeats its shingles.
    """
    key = np.sort(owner.astype(np.uint64) << np.uint64(40) | hashes >> np.uint64(24))  # sorted by text, like owner
    repeats = np.bincount(owner[1:][key[1:] == key[:-1]], minlength=n_texts)
    return repeats / np.maximum(np.bincount(owner, minlength=n_texts), 1)


def minhash(hashes: np.ndarray, owner: np.ndarray, n_texts: int) -> np.ndarray:
    """(n_texts, SLOTS) uint64 signatures; two texts agree in a slot with the probability of their Jaccard similarity.

    MinHash (Broder 1997) with one hash per shingle instead of SLOTS: a hash falls into one slot and the least stays.
    Texts with slots still empty go into another round with other hashes, and from round SLOTS on round r fills slot
    r - SLOTS (fast similarity sketching, arXiv:1704.04370). Long texts need two or three rounds, only short ones many.
    """
    signature = np.full((n_texts, SLOTS), UNSET)
    for r in range(2 * SLOTS):
        h = mix(hashes ^ SEEDS[r])
        slot = ((h >> np.uint64(40)) * np.uint64(SLOTS) >> np.uint64(24)).astype(np.int64) if r < SLOTS else r - SLOTS
        value = h & np.uint64(2**40 - 1) | np.uint64(r << 40)  # an earlier round always wins
        np.minimum.at(signature.reshape(-1), owner * SLOTS + slot, value)
        if r < 4 or r % 16 == 15:  # looking costs as much as a round; a round too many changes nothing
            open_texts = (signature == UNSET).any(axis=1)[owner]
            hashes, owner = hashes[open_texts], owner[open_texts]
            if not len(hashes):
                break
    return signature


def band_keys(signature: np.ndarray) -> np.ndarray:
    """(n, SLOTS) -> (n, BANDS) uint64, odd: texts that share a key are near copies (locality-sensitive hashing)."""
    return mix((signature.reshape(-1, BANDS, ROWS) * BAND_WEIGHTS).sum(axis=2, dtype=np.uint64)) | np.uint64(1)


# ---- a chunk of documents, in a worker process ----


class Cleaned(NamedTuple):
    text: bytes  # the survivors' UTF-8, one after the other
    index: np.ndarray  # (n,) INDEX
    keys: np.ndarray  # KEY, ascending; doc counts from 0 within the chunk
    tally: np.ndarray  # (len(FATES), 2) int64: documents and bytes; bytes of what was read, for kept ones of what is kept
    specials: int  # special-token strings removed


def clean_item(item: str | list[dict]) -> tuple[str, int, bool]:
    """clean_text() of a text, or of the chat that question-answer pairs make: real special tokens around clean contents. A chat with an
    empty question or answer is empty; a system turn that is empty is only left out."""
    if isinstance(item, str):
        return clean_text(item)
    messages, removed, broken, empty = [], 0, False, not item
    for pair in item:
        for role, field in (("system", "system"), ("user", "question"), ("assistant", "answer")):
            text, n, bad = clean_text(pair.get(field, ""))
            removed, broken = removed + n, broken or bad
            if text.strip() or role != "system":
                messages.append({"role": role, "content": text.strip()})
                empty = empty or not text.strip()
    return "" if empty else render_chat(messages), removed, broken


def first_question(chat: str) -> str:
    """The first user's turn of a chat's text: what stands before it, a system turn, is not part of the question."""
    return chat[chat.index("<|im_start|>user\n") :].partition("<|im_end|>")[0]


def text_hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.strip().encode(), digest_size=8).digest(), "little")


def clean_chunk(documents: list[tuple[int, str | list[dict]]], keep_odd: bool = False) -> Cleaned:
    """Clean and judge (label, text or question-answer pairs) documents and compute the keys that copies share.

    Chats are compared exactly and not judged for repetition: two problems that differ in one number are two problems,
    and worked solutions repeat their phrases. `side`, which decides the split, is the hash of the text, of a chat that of its first
    question: several answers to one question are on one side, whatever system turn stands before it. With `keep_odd` no text is
    dropped because it looks like none or repeats itself.
    """
    texts, rows, specials = [], [], 0
    tally = np.zeros((len(FATES), 2), np.int64)
    for label, item in documents:
        raw = item if isinstance(item, str) else "".join(text for pair in item for text in pair.values())
        n_raw = len(raw.encode(errors="surrogatepass"))
        text, removed, broken = clean_item(item)
        specials += removed
        try:
            data = text.encode()
        except UnicodeEncodeError:  # half a surrogate pair, which JSON can spell
            broken = True
        if broken or not text.strip():
            tally[BROKEN if broken else EMPTY] += (1, n_raw)
            continue
        chat = not isinstance(item, str)
        digest = text_hash(text)
        texts.append(data)
        rows.append((len(data), len(text), digest, text_hash(first_question(text)) if chat else digest, label, chat))
    index = np.array(rows, dtype=INDEX)
    if not texts:
        return Cleaned(b"", index, np.empty(0, KEY), tally, specials)

    hashes, owner, is_text = shingles(texts)
    chat = index["chat"] > 0
    broken = ~is_text & ~chat & (not keep_odd)
    repetitive = ~broken & ~chat & (not keep_odd) & (repeated_share(hashes, owner, len(texts)) > MAX_REPEATED)
    for fate, drop in ((BROKEN, broken), (REPETITIVE, repetitive)):
        tally[fate] += (drop.sum(), index["n_bytes"][drop].sum(dtype=np.int64))
    keep = ~(broken | repetitive)
    number = np.cumsum(keep) - 1
    compared = np.flatnonzero(keep & ~chat)
    signed = np.isin(owner, compared)
    signature = minhash(hashes[signed], owner[signed], len(texts))[compared]
    near, same = np.empty((len(compared), BANDS), KEY), np.empty(keep.sum(), KEY)
    near["key"], near["doc"] = band_keys(signature), number[compared][:, None]
    same["key"], same["doc"] = index["hash"][keep] & ~np.uint64(1), np.arange(len(same))
    keys = np.concatenate([near.reshape(-1), same])
    keys = keys[np.argsort(keys["key"])]
    index = index[keep]
    tally[KEPT] = len(index), index["n_bytes"].sum(dtype=np.int64)
    return Cleaned(b"".join(t for t, k in zip(texts, keep) if k), index, keys, tally, specials)


def effort(document: tuple[int, str | list[dict]]) -> int:
    """What cleaning a (label, text or question-answer pairs) document takes, in characters."""
    _, item = document
    return 100 + (len(item) if isinstance(item, str) else sum(len(text) for pair in item for text in pair.values()))


# ---- all documents, on disk ----


def find(parent: np.ndarray, docs: np.ndarray) -> np.ndarray:
    """The root of each document's cluster. Every round halves the paths, so that long chains of copies cost little."""
    while True:
        up = parent[docs]
        further = parent[up]
        if np.array_equal(up, further):
            return up
        parent[docs] = further


def union(parent: np.ndarray, a: np.ndarray, b: np.ndarray):
    """Join the clusters of a[i] and b[i] for all i at once; a cluster's root is its first document, in any order of calls."""
    while len(a):
        a, b = find(parent, a), find(parent, b)
        apart = a != b
        a, b = a[apart], b[apart]
        np.minimum.at(parent, np.maximum(a, b), np.minimum(a, b))  # of several parents one stays; the rest come again


class Spool:
    """The documents that passed, in files under folder: their text, an index row each, and the keys that copies share."""

    block = 1 << 13  # documents looked at together, few so that lists of them stay small

    def __init__(self, folder: Path):
        folder.mkdir()
        self.folder, self.n = folder, 0
        self.text = (folder / "text").open("w+b")
        self.index = (folder / "index").open("w+b")
        self.buckets = [(folder / f"keys_{i:03d}").open("w+b") for i in range(BUCKETS)]

    def add(self, cleaned: Cleaned):
        self.text.write(cleaned.text)
        self.index.write(cleaned.index.tobytes())
        cleaned.keys["doc"] += self.n
        edges = np.searchsorted(cleaned.keys["key"], np.arange(1, BUCKETS, dtype=np.uint64) * np.uint64(2**64 // BUCKETS))
        for bucket, keys in zip(self.buckets, np.split(cleaned.keys, edges)):
            bucket.write(keys.tobytes())
        self.n += len(cleaned.index)

    def clusters(self) -> tuple[np.ndarray, np.ndarray]:
        """(root (n,) int32: the first document of each document's cluster, exact (n,) bool: an earlier one is the same)."""
        root, exact = np.arange(self.n, dtype=np.int32), np.zeros(self.n, bool)
        for bucket in self.buckets:
            bucket.seek(0)
            keys = np.frombuffer(bucket.read(), dtype=KEY)
            bucket.close()
            Path(bucket.name).unlink()
            order = np.lexsort((keys["doc"], keys["key"]))
            key, doc = keys["key"][order], keys["doc"][order].astype(np.int32)
            same = np.append(False, key[1:] == key[:-1])[: len(key)]  # as the one before
            first = doc[~same][np.cumsum(~same) - 1]  # of all that share a key
            union(root, first[same], doc[same])
            exact[doc[same & (key & np.uint64(1) == 0)]] = True
        for start in range(0, self.n, self.block):
            root[start : start + self.block] = find(root, root[start : start + self.block])
        return root, exact

    def rows(self, start: int, stop: int) -> Iterator[tuple[int, np.ndarray]]:
        """(number of the first, their index rows) of documents start..stop, block by block."""
        for first in range(start, stop, self.block):
            self.index.seek(first * INDEX.itemsize)
            n = min(self.block, stop - first)
            yield first, np.frombuffer(self.index.read(n * INDEX.itemsize), dtype=INDEX)

    def texts(self, wanted: np.ndarray) -> Iterator[tuple[int, str]]:
        """(number, text) of the documents where wanted (n,) is true, in order."""
        self.text.flush()
        position = 0
        with open(self.text.name, "rb", buffering=1 << 20) as text:
            for first, rows in self.rows(0, self.n):
                for doc, n_bytes in enumerate(rows["n_bytes"].tolist(), first):
                    if wanted[doc]:
                        text.seek(position)
                        yield doc, text.read(n_bytes).decode()
                    position += n_bytes

    def close(self):
        for file in (self.text, self.index, *self.buckets):
            file.close()


# ---- which documents each phase keeps, and in which split ----

HEAD, TAIL = 1, 2  # parts of a document: all training text is HEAD, all validation text TAIL, a document cut in two has both


class Splits(NamedTuple):
    parts: dict[int, np.ndarray]  # phase -> (n,) uint8: HEAD, TAIL, both, or 0 for a document the phase does not use
    cut: dict[int, float]  # document of both -> share of its characters that is HEAD; of its copies no phase uses another
    exact: np.ndarray  # (n,) bool: an earlier document, of any phase, has the same text

    def wanted(self, phase: int, split: str) -> np.ndarray:
        return self.parts[phase] & (HEAD if split == "train" else TAIL) > 0

    def text(self, doc: int, text: str, split: str) -> str:
        """The training or validation part of a document."""
        edge = round(self.cut[doc] * len(text)) if doc in self.cut else len(text) if split == "train" else 0
        return text[:edge] if split == "train" else text[edge:]


def of_cluster(values: np.ndarray, root: np.ndarray) -> np.ndarray:
    """values[root], without an int64 copy of root."""
    out = np.empty(len(root), values.dtype)
    for start in range(0, len(root), Spool.block):
        out[start : start + Spool.block] = values[root[start : start + Spool.block]]
    return out


def first_of_cluster(root: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    """(n,) bool: the first candidate of each cluster."""
    seen, keep = np.zeros(len(root), bool), np.zeros(len(root), bool)
    for start in range(0, len(root), Spool.block):
        docs = start + np.flatnonzero(candidates[start : start + Spool.block])
        clusters, first = np.unique(root[docs], return_index=True)
        keep[docs[first[~seen[clusters]]]] = True
        seen[clusters] = True
    return keep


def assign_splits(spool: Spool, phases: dict[int, list[tuple[int, int]]], val_fraction: float) -> Splits:
    """Documents of each phase (ranges of spool's documents), one per cluster of copies, and their split.

    A cluster is on the same side in all phases: validation if a source says so for one of its documents, training if one
    says that, else by the hash of its first text (of a chat: its first question). If val_fraction of a phase's unlabelled
    documents is less than one, the last tenth of their text (or val_fraction, if that is more) is for validation instead;
    documents that a phase with fewer of them has already divided are left as they are.
    """
    root, exact = spool.clusters()
    n = spool.n
    label, below = np.empty(n, np.uint8), np.empty(n, bool)
    is_val, labelled, divided = (np.zeros(n, bool) for _ in range(3))  # of a cluster, at its root
    asked = [np.empty(0, np.uint64)]  # the questions (sides) of validation sources
    for first, rows in spool.rows(0, n):
        block = slice(first, first + len(rows))
        label[block], below[block] = rows["label"], rows["side"] < np.uint64(val_fraction * 2**64)
        is_val[root[block][rows["label"] == VAL]] = True
        labelled[root[block][rows["label"] != UNLABELLED]] = True
        asked.append(rows["side"][rows["label"] == VAL])
    is_val |= below & ~labelled
    barred = of_cluster(is_val, root) & (label == TRAIN)  # training text that is also validation text
    asked = np.unique(np.concatenate(asked))
    if len(asked):
        for first, rows in spool.rows(0, n):  # or another answer to a question of it
            barred[first : first + len(rows)] |= (rows["label"] == TRAIN) & np.isin(rows["side"], asked)
    free = of_cluster(~labelled, root)
    del label, below, labelled  # a byte per document each
    kept, cut = {}, {}
    for phase, ranges in phases.items():
        candidates = np.zeros(n, bool)
        for start, stop in ranges:
            candidates[start:stop] = ~barred[start:stop]
        kept[phase] = first_of_cluster(root, candidates)
    for phase in sorted(phases, key=lambda phase: int((kept[phase] & free).sum())):
        few, ours = (kept[phase] & free).sum() < 1 / val_fraction, kept[phase] & free & ~of_cluster(divided, root)
        if few and ours.any():
            for doc, share in cut_last(spool, ours, max(0.1, val_fraction)).items():
                is_val[root[doc]], divided[root[doc]] = share == 0, True
                if 0 < share < 1:
                    cut[doc] = share
        elif ours.any():
            val = of_cluster(is_val, root) & kept[phase]
            if not val.any() or (val == kept[phase]).all():  # the hash has put all on one side
                is_val[root[smallest_side(spool, ours)]] ^= True
    side = np.where(of_cluster(is_val, root), np.uint8(TAIL), np.uint8(HEAD))
    side[list(cut)] = HEAD | TAIL
    for doc in cut:  # in place of its copies, which may be longer: their training part could hold its validation part
        for docs in kept.values():
            copies = docs & (root == root[doc])
            docs[copies] = False
            docs[doc] = copies.any()
    return Splits({phase: kept.pop(phase) * side for phase in phases}, cut, exact)


def cut_last(spool: Spool, docs: np.ndarray, part: float) -> dict[int, float]:
    """{document: training share} of those where docs is true when the last `part` of their characters is split off.

    Of a tenth the cut is at int(0.9 * characters), which is where char-rnn and nanoGPT cut tinyshakespeare; chats stay whole.
    """
    rows = np.concatenate([rows[docs[first : first + len(rows)]] for first, rows in spool.rows(0, spool.n)])
    ends = np.cumsum(rows["n_chars"], dtype=np.int64)
    shares = np.clip((int((1 - part) * int(ends[-1])) - ends + rows["n_chars"]) / rows["n_chars"], 0.0, 1.0)
    chat = rows["chat"] > 0
    shares[chat] = np.floor(shares[chat])
    shares[chat & np.isin(rows["side"], rows["side"][chat & (shares == 0)])] = 0  # the other answers to those questions
    return dict(zip(np.flatnonzero(docs).tolist(), shares.tolist()))


def smallest_side(spool: Spool, docs: np.ndarray) -> list[int]:
    """Of the documents where docs is true those with the smallest `side`: one, or all answers to one question."""
    best, found = 2**64, []
    for first, rows in spool.rows(0, spool.n):
        candidates = np.flatnonzero(docs[first : first + len(rows)])
        sides = rows["side"][candidates]
        if len(sides) and int(sides.min()) <= best:
            found = [] if int(sides.min()) < best else found
            best = int(sides.min())
            found += (first + candidates[sides == best]).tolist()
    return found
