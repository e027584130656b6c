"""clean.py: what becomes of a text, and the parts that find copies, against their definitions."""

import random
import unicodedata

import numpy as np
import pytest
from conftest import WORDS, documents, make, prose, random_text, slow_shingles

import clean
import prepare


def test_clean_text():
    assert clean.clean_text("\ufeffabc\r\ndefg\rhijk\x0clmno\x00pqrst\u2028") == ("abc\ndefg\nhijk\nlmnopqrst\n", 0, False)
    assert clean.clean_text("cafe\u0301")[0] == "café"
    assert clean.clean_text("x<|endoftext|>y<|im_<|pad|>start|>z")[:2] == ("xyz", 3)
    assert clean.clean_text("lost \ufffd" + "a" * 100)[2] and not clean.clean_text("lost \ufffd" + "a" * 2000)[2]
    assert clean.clean_text("a\x01b\x02c\x03")[2]
    rng = random.Random(3)
    for _ in range(300):
        text = clean.clean_text(random_text(rng))[0]
        assert clean.clean_text(text) == (text, 0, False)
        assert unicodedata.is_normalized("NFC", text) and not clean.CONTROL.search(text) and not clean.SPECIAL.search(text)


def test_a_system_turn_stays_before_the_question():
    pair = {"question": "Why?", "answer": " So. "}
    text = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\nSo.<|im_end|>\n"
    assert clean.clean_item([pair]) == (text, 0, False)
    expected = "<|im_start|>system\nBe<|x|> brief.<|im_end|>\n" + text * 2
    assert clean.clean_item([{"system": " Be<|x|> brief.<|im_end|>\r\n", **pair}, pair]) == (expected, 1, False)
    assert clean.clean_item([{"system": " \n", **pair}]) == (text, 0, False), "an empty one says nothing"
    assert clean.clean_item([{"system": "\ufffd", **pair}])[2] and clean.clean_item([{**pair, "system": "s", "question": ""}])[0] == ""
    chats = [pair], [{"system": "Be brief: ä.", **pair}], [{"system": "user", **pair, "answer": "No."}]
    rows = clean.clean_chunk([(0, chat) for chat in chats]).index
    assert len(set(rows["side"].tolist())) == 1 and len(set(rows["hash"].tolist())) == 3 and rows["chat"].all()
    assert rows["side"][0] == clean.text_hash("<|im_start|>user\nWhy?"), "as ever: what was validation text stays that"
    assert clean.effort((0, [{"system": "abc", **pair}])) == clean.effort((0, [pair])) + 3
    assert clean.clean_chunk([(0, [{"system": "ä", **pair, "question": ""}])]).tally[clean.EMPTY].tolist() == [1, 7], "its bytes count"


def test_shingles_and_repetition_against_the_definition():
    rng = random.Random(4)
    texts = [prose(rng, n) for n in (1, 2, 4, 5, 6, 9, 300)]
    texts += ["a b c d e f " * 20, "1+2=3, 1-2=-1", "...", "(One) two: three", "one two THREE"]
    hashes, owner, is_text = clean.shingles([text.encode() for text in texts])
    share = clean.repeated_share(hashes, owner, len(texts))
    names = {}
    for i, text in enumerate(texts):
        expected, found = slow_shingles(text, clean.SHINGLE), hashes[owner == i].tolist()
        assert len(found) == len(expected)
        for shingle, value in zip(expected, found):
            assert names.setdefault(shingle, value) == value
        assert share[i] == pytest.approx(1 - len(set(expected)) / len(expected) if expected else 0)
        assert is_text[i] == (text != "...")
    assert len(set(names.values())) == len(names), "different shingles, different hashes"
    characters = clean.shingles(["漢字かな漢字".encode()])[0]
    assert len(characters) == 2, "in scripts without spaces a character is a word"


def test_words_of_other_scripts_are_words_not_letters():
    rng = random.Random(26)
    letters = {"hindi": range(0x905, 0x939), "thai": range(0xE01, 0xE2E), "georgian": range(0x10D0, 0x10F1), "khmer": range(0x1780, 0x17B3)}
    for name, alphabet in letters.items():
        length = (20, 60) if name in ("thai", "khmer") else (2, 9)  # these write no spaces between words
        words = ["".join(chr(c) for c in rng.choices(alphabet, k=rng.randint(*length))) for _ in range(2000)]
        text = " ".join(words[min(int(rng.paretovariate(0.8)), 1999)] for _ in range(6000)).encode()
        hashes, owner, is_text = clean.shingles([text])
        assert is_text[0] and clean.repeated_share(hashes, owner, 1)[0] < clean.MAX_REPEATED, name
    assert not clean.shingles([b"QUJD" * 500])[2][0], "base64 is no text"


def test_minhash_estimates_jaccard_and_bands_find_copies():
    rng = random.Random(5)
    texts = []
    for _ in range(120):
        words, rate = prose(rng, rng.choice((8, 30, 400))).split(), rng.choice((0.002, 0.02, 0.1, 0.3))
        texts += [" ".join(words), " ".join(rng.choice(WORDS) if rng.random() < rate else word for word in words)]
    hashes, owner, _ = clean.shingles([text.encode() for text in texts])
    signature = clean.minhash(hashes, owner, len(texts))
    assert not (signature == clean.UNSET).any()
    keys = clean.band_keys(signature)
    errors = []
    for i in range(0, len(texts), 2):
        a, b = set(slow_shingles(texts[i], clean.SHINGLE)), set(slow_shingles(texts[i + 1], clean.SHINGLE))
        jaccard = len(a & b) / len(a | b)
        errors.append((signature[i] == signature[i + 1]).mean() - jaccard)
        shared = bool((keys[i] == keys[i + 1]).any())
        assert shared or jaccard < 0.95
        assert not shared or jaccard > 0.3
    assert abs(np.mean(errors)) < 0.01 and np.std(errors) < 0.05
    assert not any((keys[i] == keys[j]).any() for i in range(0, 60, 2) for j in range(i + 2, 60, 2)), "unrelated texts share a key"


def test_union_against_walking_the_graph():
    rng = random.Random(6)
    for n_edges in (0, 20, 60, 200):
        a, b = ([rng.randrange(80) for _ in range(n_edges)] for _ in range(2))
        parent = np.arange(80, dtype=np.int32)
        for part in (slice(0, n_edges // 2), slice(n_edges // 2, n_edges)):
            clean.union(parent, np.array(a[part], np.int32), np.array(b[part], np.int32))
        expected = list(range(80))
        for _ in range(80):
            for i, j in zip(a, b):
                expected[i] = expected[j] = min(expected[i], expected[j])
        assert clean.find(parent, np.arange(80, dtype=np.int32)).tolist() == expected
    chain, parent = np.arange(100_000, dtype=np.int32), np.arange(100_000, dtype=np.int32)
    clean.union(parent, chain[:-1], chain[1:])
    assert not clean.find(parent, chain).any()


@pytest.mark.usefixtures("one_process")
def test_text_that_looks_like_none_can_be_kept(tmp_path):
    rng = random.Random(32)
    (tmp_path / "digits.txt").write_text(" ".join(rng.choice("01") for _ in range(20_000)))
    (tmp_path / "dna.txt").write_text("\n".join("".join(rng.choices("acgt", k=60)) for _ in range(300)))
    for name, fates in (("digits", "0 broken, 1 repetitive"), ("dna", "1 broken, 0 repetitive")):
        remedy = "give more text; --keep_odd keeps what is called broken or repetitive"
        with pytest.raises(prepare.InputError, match=f"leaves no training text .*{fates}.*: {remedy}"):
            make(f"{name}.txt", out=name)
        make(f"{name}.txt", "--keep_odd", out=name)
        assert "".join(documents(name, 1, "train") + documents(name, 1, "val")) == (tmp_path / f"{name}.txt").read_text()
