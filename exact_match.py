"""Exact match: which number an answer states, problem files whose answers state one, and how sure a share of right answers is.

    final_number("25 + 3 = 28 apples. #### 28") == 28
    for problem in read_problems("data/builtin/problems_val.jsonl", skip_bad=False)[0]: print(problem.question, problem.number)
"""

import collections
import contextlib
import gzip
import hashlib
import json
import math
import re
import zlib
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

from scripts import InputError
from sources import hub_errors, parquet_records, source_files

# --------------------------------------------------------------------------------------------------------------- numbers

CURRENCY = "$€£₹¥"
SIGN = rf"(?<![\w.])(?:[-−–]\s*[{CURRENCY}]?|[{CURRENCY}]\s*[-−]?)?\s*"  # -5, $5, -$5, $-5
GROUPED = r"(?:\d{1,3}(?:,\d{3})+(?!\d|,\d)|\d{1,2}(?:,\d\d)+,\d{3}(?!\d|,\d)|\d+)"  # 1,234,567 or 12,34,567 as in India
NUMBER = re.compile(SIGN + GROUPED + r"(?: \d+/\d+(?!\d|\.\d)"  # 2 1/2
                    r"|(?:\.\d+)?(?:[eE][-+]?\d+(?!\w)|\s*/\s*\d+(?!\d|\.\d))?)"  # 2.5, 2.5e3, 3/4
                    "|" + SIGN + r"\.\d+|\d+(?:\.\d+)?")  # fmt: skip
SUM = re.compile(rf"[\d)]\s*[-+*x×·÷−–]\s*[({CURRENCY}]?\s*\d")  # or a product, or whatever two numbers make
LONGEST_NUMBER = 4000  # characters; Python makes no int of more than 4,300 digits
FRACTION = re.compile(r" ?\\[dt]?frac\s*(?:\{([^{}]*)\}|(\d))\s*(?:\{([^{}]*)\}|(\d))")  # \frac{3}{4}, \frac34
# Behind a number, where reasons and checks begin, whose equals signs lead to other numbers.
ASIDE = re.compile(r"\([^()]*=|\b(?:because|since|as|where|when|if|given)\b|[.!?;]\s(?!\s*=)")
MARK = re.compile(r"####+|\\boxed\s*\{")
HEADING = re.compile(r"\W{0,9}(?:(?:step|part|case|method|problem|question)\s*\d|check|verif)", re.IGNORECASE)  # Markdown has #### too
ANSWER_BELOW = re.compile(r"####\W{0,9}(?:the )?(?:final )?answer[^\w\n]*\n\s*(?=\W{0,9}\d|the answer)", re.IGNORECASE)
PHRASE = re.compile(rf"\banswer\W*(?:is|:|=)\W*?(?=([-−–{CURRENCY}.\d\\].*))", re.IGNORECASE)


def parse_number(text: str) -> Fraction | None:
    """The first number in a short text: 1,234 or $12.50 or -3 or 3/4 or \\frac{3}{4} or 2 1/2 or 1.5e3; where there are equals signs, that
    of the last part which is no sum itself: 72 of both 48 + 24 = 72 and 72 = 48 + 24."""
    text = FRACTION.sub(r" \1\2/\3\4", text).replace("{,}", ",").replace("\\$", "$")
    text = re.sub(r"\\[!,;]", "", text)
    text = re.sub(r"\\[a-z]+|\\[()\[\]]|[{}*\\]", " ", text)
    if (first := NUMBER.search(text)) and (aside := ASIDE.search(text, first.end())):
        text = text[: aside.start()]
    for part in sorted(reversed(text.split("=")), key=lambda part: bool(SUM.search(part))):
        if (match := NUMBER.search(part)) and len(match[0]) <= LONGEST_NUMBER:
            found = re.sub(rf"[,{CURRENCY}]", "", match[0].replace("−", "-").replace("–", "-")).strip()
            if re.search(r"[eE][-+]?\d{3}", found):  # more digits than are worth writing out
                return None
            terms = [term.partition("/") for term in re.sub(r"\s*/\s*", "/", found.lstrip("- ")).split()]
            if any(below and not Fraction(below) for _, _, below in terms):
                return None
            size = sum(Fraction(above) / Fraction(below or 1) for above, _, below in terms)
            return -size if found.startswith("-") else size
    return None


def final_number(text: str) -> Fraction | None:
    """The result that an answer states: what stands behind its last #### or in its last \\boxed{}, or else behind "the answer is".

    Without any of these None: the last number of a text may be anything.
    """
    text = ANSWER_BELOW.sub("#### ", text)
    marks = [mark for mark in MARK.finditer(text) if not HEADING.match(text, mark.end())]
    for mark in reversed(marks):
        rest = text[mark.end() :]
        if mark[0].startswith("#"):
            rest = rest.strip().partition("\n")[0]
        else:
            depth = 1
            for end, character in enumerate(rest):
                depth += (character == "{") - (character == "}")
                if not depth:
                    rest = rest[:end]
                    break
        if (number := parse_number(rest)) is not None:
            return number
    phrases = PHRASE.findall(text) if not marks else []
    return parse_number(phrases[-1]) if phrases else None


def wilson(right: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a share of `right` in `n` independent trials (Wilson 1927); unlike +- 2 standard errors it stays in [0, 1]."""
    p, d = right / n, 1 + z * z / n
    middle, half = (p + z * z / (2 * n)) / d, z / d * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def majority(finals: list[Fraction | None]) -> Fraction | None:
    """The number most answers end in, in a tie the first; answers without a number do not vote (arXiv:2203.11171)."""
    votes = collections.Counter(final for final in finals if final is not None)
    return max(votes, key=votes.get) if votes else None


# --------------------------------------------------------------------------------------------------------------- problems


DATA = Path("data/builtin")  # where prepare.py puts the built-in problems


class Problem(NamedTuple):
    question: str
    answer: str  # the worked solution
    number: Fraction  # its result


def problem_key(question: str) -> str:
    """16 hex digits that name a question, spelled the same way whatever its spaces and capitals."""
    return hashlib.sha256(" ".join(question.lower().split()).encode()).hexdigest()[:16]


def make_problem(record, where: str) -> Problem:
    """A Problem of one record. Raises InputError that says what is wrong with it."""
    if isinstance(record, InputError):
        raise record
    if not isinstance(record, dict) or not {"question", "answer"} <= record.keys():
        raise InputError(f"{where}: expected an object with question and answer")
    question, answer = record["question"], record["answer"]
    answer = str(answer) if isinstance(answer, (int, float)) and not isinstance(answer, bool) else answer
    if not isinstance(question, str) or not isinstance(answer, str) or not question.strip():
        raise InputError(f"{where}: question and answer must be text")
    if any("\ud800" <= character <= "\udfff" for character in question + answer):  # JSON can spell half a character
        raise InputError(f"{where}: holds half a surrogate pair, which is not UTF-8 text")
    number = final_number(answer)
    if number is None and NUMBER.fullmatch(answer.strip()):  # the number alone
        number = parse_number(answer)
    if number is None:
        raise InputError(f"{where}: the answer {answer[-40:]!r} ends in no number: expected #### and the result")
    return Problem(question.strip(), answer.strip(), number)


def records(name: str, file) -> Iterator[tuple[str, object]]:
    """(where, record) of a file; the record is an InputError where a line is no JSON."""
    if name.lower().endswith(".parquet"):
        rows = parquet_records(name, file, lambda present: {"question", "answer"} & set(present))
        yield from ((f"{name}:{number}", record) for number, record in enumerate(rows, 1))
        return
    for number, line in enumerate(gzip.GzipFile(fileobj=file) if name.lower().endswith(".gz") else file, 1):
        if line.strip():
            try:
                yield f"{name}:{number}", json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError) as problem:
                yield f"{name}:{number}", InputError(f"{name}:{number}: malformed JSON ({problem})")


def problem_files(name: str) -> list[tuple[str, Callable]]:
    """(name, opener) of the files of a source that can hold problems."""
    return [(path, opener) for path, opener in source_files(name) if not path.lower().endswith((".txt", ".md"))]


def read_problems(name: str, skip_bad: bool) -> tuple[list[Problem], int]:
    """(the problems of a .jsonl, .jsonl.gz or .parquet file, a folder of them or an hf:// address, lines left out); a question that
    comes twice counts once. Raises InputError, for a bad line unless `skip_bad`, and if there is no problem at all."""
    problems, skipped = {}, 0
    for path, opener in problem_files(name):
        try:
            with hub_errors(path) if path.startswith("hf://") else contextlib.nullcontext(), opener() as file:
                for where, record in records(path, file):
                    try:
                        problem = make_problem(record, where)
                    except InputError as error:
                        if not skip_bad:
                            raise InputError(f"{error}: mend it, or pass --skip_bad to leave such lines out") from None
                        skipped += 1
                    else:
                        problems.setdefault(problem_key(problem.question), problem)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise InputError(f"{path} is not a whole gzip file ({error}): download it again") from None
    if not problems:
        raise InputError(f"{name} holds no problems: expected JSON lines with question and answer")
    return list(problems.values()), skipped


def load_problems(name: str, limit: int | None, skip_bad: bool, say: Callable[[str], None]) -> list[Problem]:
    """The first `limit` of read_problems, with one line that says how many there are."""
    if Path(name).parent == DATA and not Path(name).exists():
        raise InputError(f"{name} does not exist: make it with `python prepare.py`, or name other problems")
    problems, skipped = read_problems(name, skip_bad)
    first = f", of which the first {limit:,} are taken" if limit is not None and limit < len(problems) else ""
    say(f"{name}: {len(problems):,} problems{first}" + (f", {skipped:,} bad lines left out" if skipped else ""))
    return problems[:limit]


def refuse_leaks(name: str, paths: list[str], questions: list[str], evals: dict[str, list[Problem]]):
    """InputError if a question to train on is in an evaluation file too, or if the source, one of its files (`paths`) or a folder in
    it calls itself a test split; what is above the source does not matter."""
    above = max(0, len(Path(name).parts) - 1)
    for path in paths:
        parts = Path(path).parts
        if any(re.search(r"(?<![a-z])test(?![a-z])", part.lower()) for part in (*parts[above:], parts[-1])):
            raise InputError(f"{path} is a test split: it may measure a model (--eval), never train one")
    keys = {problem_key(question) for question in questions}
    for held_out, problems in evals.items():
        leaked = len(keys & {problem_key(problem.question) for problem in problems})
        if leaked:
            raise InputError(f"{leaked} of the {len(problems)} questions of {held_out} are in {name} too: train on other problems")
