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
        (r"\boxed{2\frac{1}{2}}", "5/2"), (r"\boxed{-2\frac12}", "-5/2"), (r"\boxed{\frac12}", "1/2"), (r"\boxed{-\dfrac34}", "-3/4"),
        (r"\boxed{3\cdot\frac{1}{2} = \frac{3}{2}}", "3/2"), ("#### 2 1/2", "5/2"), ("#### -2 1/2 miles", "-5/2"), ("#### 1/2 of 8 = 4", 4),
        ("#### 1.5e3", 1500), ("#### 25e-1", "5/2"), ("#### 1e9999", None), ("#### 3 eggs", 3), ("#### 12e3a", 12),
        ("#### 12,34,567", 1234567), ("#### 1,23,456.5", "123456.5"), ("#### -\u20b9500", -500), ("#### \u00a51,000", 1000),
        ("The answer is \u20b9500.", 500), (r"\boxed{\text{so } \(x = 5\)}", 5), ("#### (x = 5)", 5), ("#### x = 5 (since 2x = 10)", 5),
        ("#### 12 (with x = 3)", 12), ("#### 12 because 2 * x = 3", 12), ("#### 5. Check: 2 + 2 = 4", 5), ("#### 5! = 120", 120),
        ("#### 2 * (3 + 4) = 14", 14), ("#### 3 * 1.5 = 4.5", "4.5"), ("#### 5 apples + 3 apples = 8 apples", 8),
        ("The answer is 12 because x = 3.", 12), ("The answer is 5. Check: 2 + 2 = 4", 5), ("The answer is: 5 + 3 = 8", 8),
        ("the answer is 5, not 6. The answer is 7", 7), ("the answer is 5 and then the answer is 7", 7), ("The answer is not 5", None),
        ("#### Step 1: add\n4 + 8 = 12\n#### Step 2\n12 * 2 = 24\n#### Final Answer\n24", 24), ("#### **Final answer:**\n\n$24", 24),
        ("#### Answer\nThe answer is 24 because 2 * 12 = 24.", 24), ("#### Answer\nAfter selling 5 apples 24 are left.", None),
        ("#### Step 1: add 4 + 8 = 12. The answer is 12.", 12), ("#### Step 1: add 4 and 8 to get 12", None),
        ("#### 24\n#### Check 1: 24 / 2 = 12", 24), ("#### Step 1\nx\n**Answer:** 12", 12),
        ("#### " + "7" * 5000, None), ("#### " + "7" * 3990 + "e99", 10**99 * int("7" * 3990)), ("#### 1/" + "7" * 5000, None),
        ("#### 72 = 48 + 24", 72), ("#### Total = 72 = 48 + 24", 72), ("#### 6 = 2 x 3", 6), ("#### 2 + 2 = 4 = 1 + 3", 4),
        ("#### $10 = $4 + $6", 10), ("#### x = 10-15", 10),
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
