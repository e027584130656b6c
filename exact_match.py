"""Exact match: which number an answer states, which number most answers state, and how sure a share of right ones is.

    final_number("25 + 3 = 28 apples. #### 28") == 28
"""

import collections
import math
import re
from fractions import Fraction

SIGN = r"(?<![\w.])(?:[-−–]\s*[$€£]?|[$€£]\s*[-−]?)?\s*"  # -5, $5, -$5, $-5
NUMBER = re.compile(SIGN + r"(?:\d{1,3}(?:,\d{3})+(?!\d|,\d)|\d+)(?:\.\d+)?(?:\s*/\s*\d+(?!\d|\.\d))?"
                    "|" + SIGN + r"\.\d+|\d+(?:\.\d+)?")  # fmt: skip
LONGEST_NUMBER = 4000  # characters; Python makes no int of more than 4,300 digits
MARK = re.compile(r"####|\\boxed\s*\{")
PHRASE = re.compile(r"\banswer\W*(?:is|:|=)\W*?(?=[-−–$€£.\d\\])(.*)", re.IGNORECASE)


def parse_number(text: str) -> Fraction | None:
    """The first number in a short text: 1,234 or $12.50 or -3 or 3/4 or \\frac{3}{4}; the part behind an equals sign if there is one."""
    text = re.sub(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"\1/\2", text)
    text = text.replace("{,}", ",").replace("\\$", "$")
    text = re.sub(r"\\[!,;]", "", text)
    text = re.sub(r"\\[a-z]+|[{}*\\]", " ", text)
    for part in reversed(text.split("=")):
        if (match := NUMBER.search(part)) and len(match[0]) <= LONGEST_NUMBER:
            found = re.sub(r"[\s,$€£]", "", match[0].replace("−", "-").replace("–", "-"))
            above, _, below = found.partition("/")
            return Fraction(above) / Fraction(below or 1) if Fraction(below or 1) else None
    return None


def final_number(text: str) -> Fraction | None:
    """The result that an answer states: what stands behind its last #### or in its last \\boxed{}, or else behind "the answer is".

    Without any of these None: the last number of a text may be anything.
    """
    marks = list(MARK.finditer(text))
    for mark in reversed(marks):
        rest = text[mark.end() :]
        if mark[0] == "####":
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
    """The number most answers end in, of equals the first; answers without a number do not vote (arXiv:2203.11171)."""
    votes = collections.Counter(final for final in finals if final is not None)
    return max(votes, key=votes.get) if votes else None
