"""Which documents are for training and which for validation, in all phases at once."""

import itertools
import random

import pytest
from conftest import documents, make, prose, slow_shingles, tokens, write_jsonl

import clean
import prepare

pytestmark = pytest.mark.usefixtures("one_process")


def test_one_text_gives_its_last_tenth(tmp_path):
    text = prose(random.Random(8), 3000) + "漢字 é\n"
    (tmp_path / "book.txt").write_text(text, encoding="utf-8")
    meta = make("book.txt", out="out")
    edge = int(0.9 * len(text))
    for phase in (1, 2, 3):
        assert documents("out", phase, "train") == [text[:edge]] and documents("out", phase, "val") == [text[edge:]]
    assert meta["phases"]["1"]["val"]["bytes"] == len(text[edge:].encode())
    assert (tmp_path / "out/phase1_train_00000.bin").samefile("out/phase3_train_00000.bin")


def test_few_documents_are_cut_in_order(tmp_path):
    rng = random.Random(9)
    texts = [prose(rng, n) for n in (300, 50, 200, 20, 30)]
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.md").write_text(text)
    make(*sorted(tmp_path.glob("*.md")), out="out")
    whole = "".join(texts)
    assert "".join(documents("out", 1, "train")) == whole[: int(0.9 * len(whole))]
    assert "".join(documents("out", 1, "val")) == whole[int(0.9 * len(whole)) :]


def test_chats_are_not_cut(tmp_path):
    write_jsonl(tmp_path / "qa.jsonl", [{"question": f"What is {i} + 1?", "answer": f"#### {i + 1}"} for i in range(12)])
    make("qa.jsonl", out="out")
    train, val = documents("out", 1, "train"), documents("out", 1, "val")
    assert len(train) == 10 and len(val) == 2
    assert all(text.startswith("<|im_start|>") and text.endswith("<|im_end|>\n") for text in train + val)


@pytest.mark.parametrize("questions, fraction", [(300, 0.1), (8, 0.02), (2, 0.5)])
def test_answers_to_one_question_are_on_one_side(tmp_path, questions, fraction):
    lines = [{"question": f"What is {q} + 1?", "answer": f"Way {a}.\n#### {q + 1}"} for a in range(4) for q in range(questions)]
    write_jsonl(tmp_path / "samples.jsonl", lines)
    make("samples.jsonl", f"--val_fraction={fraction}", out="out")
    train, val = ({text.partition("<|im_end|>")[0] for text in documents("out", 1, split)} for split in ("train", "val"))
    assert train and val and not train & val and len(train | val) == questions


@pytest.mark.parametrize("questions, fraction", [(300, 0.1), (8, 0.02), (2, 0.5)])
def test_a_question_is_on_one_side_whatever_system_turn_stands_before_it(tmp_path, questions, fraction):
    systems = [None, "Be brief.", "You count.\nAnd check.", "user"]
    chats = [[*([{"role": "system", "content": system}] if system else []), {"role": "user", "content": f"What is {q} + 1?"},
              {"role": "assistant", "content": f"#### {q + 1}"}] for system in systems for q in range(questions)]
    write_jsonl(tmp_path / "chats.jsonl", [{"messages": chat} for chat in chats])
    make("chats.jsonl", f"--val_fraction={fraction}", out="out")
    found = {split: documents("out", 1, split) for split in ("train", "val")}
    assert sorted(found["train"] + found["val"]) == sorted(prepare.render_chat(chat) for chat in chats), "whole, none of them a copy"
    train, val = ({text.partition("<|im_start|>user\n")[2].partition("<|im_end|>")[0] for text in found[split]} for split in found)
    assert train and val and not train & val and len(train | val) == questions
    markup = [int((tokens("out", 1, split) == 1).sum()) for split in found]
    assert sum(markup) == sum(map(len, chats)), "the markup of every turn is special tokens"


def test_split_by_hash_is_stable_and_never_empty(tmp_path):
    rng = random.Random(23)
    texts = [prose(rng, 30) for _ in range(600)]
    write_jsonl(tmp_path / "less.jsonl", [{"text": text} for text in texts[:300]])
    write_jsonl(tmp_path / "more.jsonl", [{"text": text} for text in reversed(texts)])
    make("less.jsonl", out="less")
    make("more.jsonl", out="more")
    less, more = (set(documents(folder, 1, "val")) for folder in ("less", "more"))
    assert 0 < len(less) < 20 and less == more & set(texts[:300])
    for i in range(5):
        write_jsonl(tmp_path / "few.jsonl", [{"text": text} for text in texts[51 * i : 51 * i + 51]])
        make("few.jsonl", out="few")
        assert documents("few", 1, "val") and len(documents("few", 1, "train")) > 40


def test_splits_are_disjoint_over_all_phases_copies_included(tmp_path, monkeypatch):
    rng = random.Random(10)
    texts = [prose(rng, 200) for _ in range(400)]
    edited = [text.replace(text.split()[20], "edited", 1) for text in texts]
    write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts[:300]])
    write_jsonl(tmp_path / "b.jsonl", [{"content": text} for text in edited[100:] + texts[100:150]])
    (tmp_path / "few.txt").write_text(texts[7] + "<|endoftext|>\n" + texts[120])
    job = ("a.jsonl", "--phase2", "b.jsonl", "--phase3", "few.txt", "b.jsonl", "--val_fraction=0.1")
    whole = make(*job, out="out")
    with monkeypatch.context() as patch:
        patch.setattr(clean.Spool, "block", 64)
        assert make(*job, out="blocks") == whole, "documents looked at in one block or in many: the same text"
    found = {split: set() for split in ("train", "val")}
    for phase, split in itertools.product((1, 2, 3), found):
        shards = documents("out", phase, split)
        found[split].update(word for text in shards for word in slow_shingles(text, clean.SHINGLE))
        assert len(shards) > 5
    assert len(found["train"] & found["val"]) <= 2, "the few shingles across edits' ends at most"
    make("few.txt", "--phase2", "a.jsonl", "--phase3", "a.jsonl", out="out")
    tail = documents("out", 1, "val")[-1]
    assert tail and any(text.endswith(tail) for text in documents("out", 2, "val"))
    assert not any(tail in text for text in documents("out", 2, "train")), "what phase 1 holds out, phase 2 holds out"


def test_validation_text_of_its_own(tmp_path):
    rng = random.Random(11)
    texts = [prose(rng, 60) for _ in range(30)]
    write_jsonl(tmp_path / "train.jsonl", [{"text": text} for text in texts])
    write_jsonl(tmp_path / "val.jsonl", [{"text": text} for text in texts[:5] + [prose(rng, 60)]])
    meta = make("train.jsonl", "--val", "val.jsonl", out="out")
    assert documents("out", 2, "train") == texts[5:] and documents("out", 2, "val")[:5] == texts[:5]
    assert [row["exact copy"] for row in meta["cleaning"]] == [0, 5]
    with pytest.raises(prepare.InputError, match="phase 1: train.jsonl leaves no training text.*also validation text"):
        make("train.jsonl", "--val", "train.jsonl", out="out")
    assert documents("out", 2, "train") == texts[5:]


def test_no_question_of_the_validation_text_is_trained_on(tmp_path):
    """Whatever its answer, or the system turn before it."""
    def chat(q, answer, **more):
        return more | {"question": f"What is {q} + 1?", "answer": answer}

    write_jsonl(tmp_path / "train.jsonl", [chat(q, f"Way {way}.\n#### {q + 1}") for way in range(2) for q in range(40)])
    write_jsonl(tmp_path / "val.jsonl", [chat(q, f"So.\n#### {q + 1}") for q in range(8)])
    make("train.jsonl", "--val", "val.jsonl", out="out")
    train, val = ({text.partition("<|im_end|>")[0] for text in documents("out", 1, split)} for split in ("train", "val"))
    assert len(train) == 32 and len(val) == 8 and not train & val and len(documents("out", 1, "train")) == 64


@pytest.mark.parametrize("options, share", [([], 0.1), (["--val_fraction=0.05"], 0.1), (["--val_fraction=0.3"], 0.3)])
def test_how_much_of_a_book_is_held_out(tmp_path, options, share):
    text = prose(random.Random(31), 2000)
    (tmp_path / "book.txt").write_text(text)
    make("book.txt", *options, out="out")
    assert documents("out", 1, "train") == [text[: int((1 - share) * len(text))]]
    assert documents("out", 1, "val") == [text[int((1 - share) * len(text)) :]]


def test_few_documents_shared_by_phases_leave_training_text_in_each(tmp_path):
    rng = random.Random(24)
    (tmp_path / "big.txt").write_text(prose(rng, 20_000))
    (tmp_path / "small.txt").write_text(prose(rng, 1000))  # less than a tenth of both
    make("big.txt", "small.txt", "--phase2", "small.txt", "--phase3", "big.txt", out="out")
    for phase, n in ((1, 2), (2, 1), (3, 1)):
        train, val = documents("out", phase, "train"), documents("out", phase, "val")
        assert len(train) == len(val) == n
        assert [len(a) / len(a + b) for a, b in zip(train, val)] == pytest.approx([0.9] * n, abs=0.01)
    for seed in range(12):  # half of the documents are for validation: of two the hash may choose both or none
        write_jsonl(tmp_path / "two.jsonl", [{"text": prose(random.Random(100 + seed * 2 + i), 100)} for i in range(2)])
        make("two.jsonl", "--val_fraction=0.5", out="two")
        assert len(documents("two", 1, "train")) == len(documents("two", 1, "val")) == 1


def test_a_longer_near_copy_does_not_train_on_what_another_phase_holds_out(tmp_path):
    rng = random.Random(25)
    text = prose(rng, 2000)
    (tmp_path / "short.txt").write_text(text)
    (tmp_path / "long.txt").write_text(text + prose(rng, 250))
    for order in (("short.txt", "long.txt"), ("long.txt", "short.txt")):
        make(order[0], "--phase2", order[1], "--phase3", order[1], out="out")
        found = {split: {s for phase in (1, 2, 3) for text in documents("out", phase, split) for s in slow_shingles(text, clean.SHINGLE)}
                 for split in ("train", "val")}
        assert found["train"] and found["val"] and not found["train"] & found["val"]
