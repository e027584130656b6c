"""The built-in corpus: what docstrings become, who is in which split, and whether the word problems are right."""
import os
import random
import re
import subprocess
import sys
from collections import defaultdict
from fractions import Fraction
from itertools import islice
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import corpus
import word_problems

ROOT = Path(corpus.__file__).parent
SOME = (corpus.STDLIB, "networkx")  # enough for statistics, and parsed in a few seconds
MARKUP = re.compile(r"(?m)>>>|:param|^\.\. |:\w+:`|``|::|https?:|\\|\bdef \w+\(|-{4}|={3}|Copyright")


def prose_of(phase, packages=SOME):
    return [(split, item) for split, item in corpus.documents(phase, packages) if isinstance(item, str)]


DOCSTRING = """Summary line of a function that does something

    The first paragraph is wrapped over
    two lines and uses ``code``, :class:`~torch.nn.Linear` and `a link <http://example.org>`_. It has a second
    sentence (e.g. This one)::

        code = that(must, go)

    .. note:: A note is kept, since it is written for the reader.

    .. code-block:: python

        print("this is not a sentence that should be kept.")

    - The first item of a list is kept as a paragraph
      of its own.
    - short

    >>> f(1)
    This is what the function prints and it is not prose.

    Plain English until here. See https://example.org for the rest. This is cut with it.

    :param x: The description of a parameter in a field list is left out.

    Args:
        x: The description of a parameter in Google's style is left out.

    Parameters
    ----------
    x : int
        The description of a parameter in numpy's style is left out.

    Notes
    -----
    The text of the notes is prose and so it is kept.

    ```
    This is in a fence and is left out.
    ```

    Copyright of somebody, all rights reserved to the author of the text.
"""


def test_a_docstring_becomes_its_prose():
    assert list(corpus.paragraphs(DOCSTRING)) == [
        "Summary line of a function that does something.",
        "The first paragraph is wrapped over two lines and uses code, Linear and a link.",
        "A note is kept, since it is written for the reader.",
        "The first item of a list is kept as a paragraph of its own.",
        "The text of the notes is prose and so it is kept.",
    ]


@pytest.mark.parametrize("text", ["", "Short.", "x : array_like, optional", "foo(a, b=1, *args) -> list of int or None",
                                  "where the sentence starts in the middle of another one.",
                                  "Zwölf Boxkämpfer jagen den Eva quer über den Deich.",
                                  "Licensed under the Apache License, this text is on every file."])
def test_what_is_no_english_paragraph_is_left_out(text):
    assert corpus.prose(text) == ""


def test_a_package_is_read_without_importing_it(tmp_path, monkeypatch, capsys):
    package = tmp_path / "slms_no_such_package"
    (package / "tests").mkdir(parents=True)
    own = '"""The docstring of a module that must never be imported by the corpus."""\n'
    (package / "__init__.py").write_text(own + 'raise SystemExit("imported")\n')
    (package / "broken.py").write_text('"""The docstring of a file that is not valid in this Python."""\nprint "x"\n')
    (package / "tests" / "test_it.py").write_text('"""The docstring of a test is not a part of the corpus at all."""\n')
    (package / "b.py").write_text(
        'class A:\n    """The class comes first and is documented here."""\n'
        '    def f(self):\n        """Its method has a docstring that comes next."""\n'
        '    # A comment of this length is kept, since it tells the reader of the code\n    # why something is done in this place.\n'
        f'def g():\n    {own}')
    monkeypatch.syspath_prepend(tmp_path)
    found = corpus.modules(("slms_no_such_package", "slms_absent_package"))
    assert "slms_absent_package" in capsys.readouterr().err
    assert "slms_no_such_package" not in sys.modules
    assert {module.name.split("/")[-1]: module.units for module in found if module.units} == {
        "__init__": [["The docstring of a module that must never be imported by the corpus."]],
        "b": [["The class comes first and is documented here.", "Its method has a docstring that comes next."],  # g's repeats
              ["A comment of this length is kept, since it tells the reader of the code why something is done in this place."]]}


def test_pack_keeps_order_and_sizes():
    rng = random.Random(0)
    for _ in range(200):
        units = [["x" * rng.randint(1, 30) for _ in range(rng.randint(1, 6))] for _ in range(rng.randint(0, 30))]
        texts = list(corpus.pack(units, 20, 60))
        flat = [paragraph for unit in units for paragraph in unit]
        packed = [paragraph for text in texts for paragraph in text.split("\n\n")]
        assert packed == flat[:len(packed)] and len("\n\n".join(flat[len(packed):])) < 20
        assert all(20 <= len(text) <= 60 for text in texts)


def test_the_prose_is_prose():
    texts = [text for _, text in prose_of(1)]
    assert sum(map(len, texts)) > 500_000
    assert all(corpus.SHORT <= len(text) <= corpus.LONG for text in texts)
    everything = "\n".join(texts)
    assert everything.isascii() and not MARKUP.search(everything)
    assert sum(char.isalpha() or char.isspace() for char in everything) > 0.93 * len(everything)
    paragraphs = [paragraph for text in texts for paragraph in text.split("\n\n")]
    assert len(set(paragraphs)) == len(paragraphs)
    assert all(paragraph == " ".join(paragraph.split()) for paragraph in paragraphs)
    assert sum(paragraph[-1] in ".!?" for paragraph in paragraphs) > 0.95 * len(paragraphs)
    assert sum(map(len, paragraphs)) / len(paragraphs) > 80


def test_long_documents_fill_a_window_and_hold_the_same_prose():
    short, long = prose_of(1), prose_of(3)
    assert min(len(text) for _, text in long) >= corpus.WINDOW
    paragraphs = {phase: {paragraph for _, text in texts for paragraph in text.split("\n\n")} for phase, texts in ((1, short), (3, long))}
    assert len(paragraphs[1] ^ paragraphs[3]) < 0.02 * len(paragraphs[1])  # no more than the remainders at the end of the splits
    assert prose_of(2) == [x for split in ("train", "val") for x in [item for item in short if item[0] == split][::2]]


def test_no_paragraph_is_in_both_splits_of_any_phase():
    found = {"train": set(), "val": set()}
    for phase in (1, 2, 3):
        for split, text in prose_of(phase):
            found[split].update(text.split("\n\n"))
    assert not found["train"] & found["val"]
    assert 0.01 < len(found["val"]) / len(found["train"]) < 0.1


FINGERPRINT = """
import corpus, hashlib
if __name__ == "__main__":
    sha = hashlib.sha256()
    for phase in (1, 2, 3):
        for document in corpus.documents(phase, ("jinja2", "fsspec")):
            sha.update(repr(document).encode())
    print(sha.hexdigest())
"""


def test_the_same_in_every_process():
    digests = [subprocess.run([sys.executable, "-c", FINGERPRINT], cwd=ROOT, env=os.environ | {"PYTHONHASHSEED": seed}, check=True,
                              capture_output=True, text=True).stdout for seed in ("0", "7")]
    assert digests[0] == digests[1] and len(digests[0]) == 65


# Word problems


LITERALS = {2: "half|twice|two", 3: "third", 4: "four", 7: "week"}  # numbers that a question names in words


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_every_solution_is_right_and_uses_what_the_question_says(split):
    for problem in word_problems.problems(split, 3000):
        question, answer = problem["question"], problem["answer"]
        assert "{" not in question + answer and "  " not in question and question.endswith("?")
        known = {int(number) for number in re.findall(r"\d+", question)}
        assert max(known) <= 99
        *lines, last = answer.split("\n")
        assert 1 <= len(lines) <= 4
        for line in lines:
            shown, left, sign, right, result, again = re.fullmatch(
                r"(.+) = \$?<<(\d+)([-+*/])(\d+)=(\d+)>>(\d+) [^<>{}]*\.", line).groups()
            assert shown == f"{left} {sign} {right}" and result == again
            x, y = int(left), int(right)
            assert int(result) == {"+": x + y, "-": x - y, "*": x * y, "/": Fraction(x, y)}[sign]
            assert 2 <= int(result) <= 99
            for operand in (x, y):
                assert operand in known or re.search(LITERALS[operand], question), (operand, problem)
            known.add(int(result))
        assert last == f"#### {result}"


def numbers_of(split, count):
    found = defaultdict(set)
    for index, numbers, _ in islice(word_problems.examples(split, 0), count):
        found[index].add(numbers)
    return found


def test_validation_numbers_do_not_occur_in_training():
    train, val = numbers_of("train", 20_000), numbers_of("val", 2000)
    assert set(train) == set(val) == set(range(len(word_problems.STORIES)))
    assert all(len(train[index]) >= 25 and len(val[index]) >= 2 for index in train)
    assert not any(train[index] & val[index] for index in train)


def test_held_out_stories_are_new_but_their_operations_are_not():
    assert len(word_problems.STORIES) >= 30 and len(word_problems.HELD_OUT) >= 6
    stories = word_problems.STORIES + word_problems.HELD_OUT
    phrasings = [phrasing for story in stories for phrasing in story.phrasings]
    assert len(set(phrasings)) == len(phrasings) and all(len(story.phrasings) >= 2 for story in stories)
    assert {len(story.steps) for story in word_problems.STORIES} == {1, 2, 3, 4}
    parts = (word_problems.STORIES, word_problems.HELD_OUT)
    signs = [{word_problems.STEP.fullmatch(step)[2] for story in part for step in story.steps} for part in parts]
    assert signs[0] == set("+-*/") and signs[1] <= signs[0]
    assert len(numbers_of("test", 300)) == len(word_problems.HELD_OUT)


def test_every_phrasing_names_every_number():
    for story in word_problems.STORIES + word_problems.HELD_OUT:
        for phrasing in story.phrasings:
            assert all(f"{{{name}}}" in phrasing for name in story.ranges), phrasing


def test_words_fit_together():
    for words in word_problems.PLURALS.values():
        assert all(re.fullmatch(r"[a-z]+[^s]s", word) for word in words)
    for seed in range(200):
        words = word_problems.draw_words(random.Random(seed))
        assert len({words["name"], words["friend"], words["third"]}) == 3
        assert words["name"] in word_problems.NAMES[words["he"]] and words["his"] == {"she": "her", "he": "his"}[words["he"]]
        assert words["fruits"] == words["fruit"] + "s" and words["fruits"] != words["fruits2"]


def test_problems_are_unique_and_a_larger_count_continues_a_smaller():
    problems = list(word_problems.problems("train", 5000))
    assert len({problem["question"] for problem in problems}) == 5000
    assert problems[:50] == list(word_problems.problems("train", 50)) != list(word_problems.problems("train", 50, seed=1))
    assert list(word_problems.problems("val", 0)) == []


def test_phases_two_and_three_hold_different_problems(monkeypatch):
    monkeypatch.setattr(corpus, "TRAIN_PROBLEMS", 500)
    monkeypatch.setattr(corpus, "VAL_PROBLEMS", 60)
    single, grouped = ([document for document in corpus.documents(phase, ("jinja2",)) if isinstance(document[1], list)] for phase in (2, 3))
    assert [len(item) for _, item in single] == [1] * 560
    assert [item[0] for split, item in single if split == "val"] == list(word_problems.problems("val", 60))
    sizes = [len(item) for _, item in grouped]
    assert max(sizes) <= 20 and sum(size < 8 for size in sizes) <= 2  # what remains at the end of each split
    assert sum(len(item) for split, item in grouped if split == "val") == 60
    asked = [{problem["question"] for _, item in documents for problem in item} for documents in (single, grouped)]
    assert len(asked[0]) == len(asked[1]) == 560 and not asked[0] & asked[1]


def test_what_does_not_exist_is_an_error():
    with pytest.raises(ValueError, match="no phase 4"):
        next(corpus.documents(4))
    with pytest.raises(ValueError, match="'valid'"):
        next(word_problems.problems("valid", 1))
    run = subprocess.run([sys.executable, "corpus.py", "4"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 2 and run.stderr.startswith("error: which phase?") and run.stderr.count("\n") == 1
