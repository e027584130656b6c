"""exact_match.py: the number an answer states, the vote of several, and the interval of a share."""

import math
from fractions import Fraction

import pytest

from exact_match import final_number, majority, wilson
from word_problems import problems as word_problems


@pytest.mark.parametrize(
    "text, number",
    [
        ("48 / 2 = <<48/2=24>>24\n#### 24", 24), ("#### 1,234,567", 1234567), ("#### $12.50", "12.5"), ("#### 42 apples", 42),
        ("#### -7", -7), ("#### \u22127", -7), ("#### -$7", -7), ("#### $-7", -7), ("####\n42", 42), ("#### **42**.", 42),
        ("#### 18%", 18), ("#### .5", "1/2"), ("#### 2.0", 2), ("#### 6 * 7 = 42", 42), ("#### 3/4", "3/4"), ("#### 5\nand #### 6", 6),
        (r"so \boxed{42}", 42), (r"\boxed{1{,}234}", 1234), (r"\boxed{\$1\,234.5}", "1234.5"), (r"\boxed{\frac{3}{4}}", "3/4"),
        (r"\boxed{\text{42 apples}}", 42), (r"\boxed{x = -3}", -3), ("#### Step 2: add 5\n" + r"\boxed{12}", 12),
        ("The answer is $\\boxed{9}$.", 9), ("**Answer:** 3 eggs", 3), ("The final answer is $18.", 18),
        ("The answer is $1,234, which is a lot.", 1234), ("#### 1,234, as computed", 1234), ("#### 12,34", 12), ("#### 3/4.", "3/4"),
        (r"The answer is \frac{3}{4}.", "3/4"), ("#### 3/4.5", 3), ("#### --5", -5), ("#### - -5", -5), ("The answer is \u2013 -5.", -5),
        ("#### " + "7" * 5000, None), ("#### 1/" + "7" * 5000, None),
        ("there are 5 of them", None), ("####", None), ("the answer is unknown, 5", None), ("#### 1/0", None), ("", None),
    ],
)  # fmt: skip
def test_final_number(text, number):
    assert final_number(text) == (None if number is None else Fraction(number))


def test_the_reference_of_every_word_problem_is_found():
    for problem in word_problems("val", 200):
        assert final_number(problem["answer"]) == int(problem["answer"].rpartition("####")[2])


def test_wilson_is_where_the_score_test_rejects():
    for right, n in ((0, 7), (3, 10), (90, 100), (600, 600)):
        low, high = wilson(right, n)
        for bound, start in ((low, 0.0), (high, 1.0)):
            a, b = start, right / n  # |right/n - p| = 1.96 sqrt(p (1 - p) / n) between these, by bisection
            for _ in range(60):
                p = (a + b) / 2
                a, b = (p, b) if abs(right / n - p) > 1.96 * math.sqrt(p * (1 - p) / n) else (a, p)
            assert bound == pytest.approx(b, abs=1e-9)
    assert wilson(0, 7)[0] == 0 and wilson(600, 600)[1] == 1


def test_majority():
    assert majority([Fraction(2), None, Fraction(3), Fraction(3)]) == 3
    assert majority([Fraction(2), Fraction(3)]) == 2 and majority([None, None]) is None and majority([None, None, Fraction(5)]) == 5
