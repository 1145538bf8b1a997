r"""Pins equality.py: pairs of answers that are the same, and pairs that are not.

pytest tests/test_equality.py

The letters A1 … A5 name kinds of faults that were found: e-notation, units behind any value, long
answers, markup and blanks, bases.
"""

import pytest

from grading.equality import LONGEST, equal

EQUAL = r"""
# A1: e-notation is a number, on either side
1.07e16 ~ 1.07 \times 10^{16}
1.04e-3 ~ 0.00104
0.00104 ~ 1.04e-3
1.07 \times 10^{16} ~ 1.07e16
6.02e23 ~ 6.02 \cdot 10^{23}
6.02E+23 ~ 6.02 × 10^23
-1.6e-19 ~ -1.6 \times 10^{-19} \text{ C}
3e8 ~ 300000000
3e8 ~ 300,000,000 \text{ m/s}
1e6 ~ 10^6
5e-3 ~ 0.005
4.5e33 ~ 4.5\times10^{33}\mathrm{erg}
6.626 × 10⁻³⁴ ~ 6.626e-34
1e3, 2e3 ~ 1000, 2000
(1e3, 2) ~ (1000, 2)
2e-1 ~ -1+2e
# A2: a unit may follow any value
12\pi ~ 12\pi \text{ cubic inches}
2\sqrt{3} \text{ meters} ~ 2\sqrt{3}
\frac{270}{7} ~ \frac{270}7\text{ degrees}
\frac{\pi}{4} ~ \frac{\pi}{4} \text{ radians}
x^2+1 \text{ cm}^2 ~ 1+x^2
5 \text{ km} ~ 5 kilometers
5\text{ cm}^2 ~ 5 \text{ square centimeters}
60 \text{ miles per hour} ~ 60\text{ mph}
\$18.90 ~ 18.9 \text{ dollars}
5 \text{ hours} ~ 5 hour
90^\circ ~ 90 \text{ degrees}
25^\circ\text{C} ~ 25
50\% ~ 50 \text{ percent}
12 \text{ ways} ~ 12
8\sqrt{2}\ \mathrm{cm} ~ 8\sqrt2
4\pi cm ~ 4\pi
5 \text{ million dollars} ~ 5000000
9.8 \text{ m/s}^2 ~ 9.8 \mathrm{m}/\mathrm{s}^2
5 m ~ 5m
5 \text{ m} ~ 5 m
5kg ~ 5 kg
# A4: blanks and markup
p-q ~ p - q
p - q ~ -q + p
78 ~ \displaystyle 78
78 ~ {78}
78 ~ \boldsymbol{78}
78 ~ **78**
78 ~ $$78$$
# of these kinds, and found later: signs, numbers and blanks that are written in another way
\sqrt{2} ~ √2
2\sqrt{3} ~ 2√3
\sqrt{x+1} ~ √(x+1)
\frac{1}{2} ~ ½
7/2 ~ 3½
7/2 ~ 3 1/2
-7/2 ~ -3 1/2
-3\frac{1}{2} ~ -3 1/2
1000 ~ 1 000
1,234,567 ~ 1 234 567
1234.5 ~ 1 234.5
\frac{1}{3} ~ 0.\overline{3}
1/6 ~ 0.1\overline{6}
\frac{4}{33} ~ 0.\overline{12}
\infty ~ ∞
(-\infty, 2) ~ (−∞, 2)
\emptyset ~ \varnothing
\varnothing ~ ∅
\emptyset ~ \{\}
x \le 3 ~ x ≤ 3
x \geq 3 ~ x ≥ 3
x \le 3 ~ x \leqslant 3
x \neq 3 ~ x ≠ 3
\pm 2 ~ ±2
-7 ~ - 7
7 ~ (7)
5 ~ 5\\
150 min ~ 150 minutes
2 rad ~ 2 \text{ radians}
O'Neil ~ O’Neil
1939-1945 ~ 1939–1945
Tom, Jerry ~ Tom and Jerry
A, B ~ A and B
\frac{1}{3} ~ \boldsymbol{\frac{1}{3}}
\frac{1}{3} ~ \color{red}{\frac13}
(1,2) ~ \left( 1, \, 2 \right)
[0, 1) ~ \left[0,1\right)
\text{Paris} ~ \textbf{Paris}
x ~ {\bf x}
2x+y ~ \textstyle{y + 2x}
# lists
1,3 ~ 1 \text{ and } 3
1, 3 ~ 3, 1
1,2,3 ~ 1, 2, and 3
1,-2 ~ -2 \text{ or } 1
1;3 ~ 1,3
\{1,2\} ~ \{2,1\}
5 \text{ cm}, 3 \text{ m} ~ 5, 3
50\%, 30\% ~ 30\%, 50\%
# A5: bases
2516_9 ~ 2516_{9}
2516_9 ~ 2516_{\text{nine}}
2516_9 ~ 2516
1A_{16} ~ 1A
1101_2 ~ 1101 \text{ (base 2)}
# intervals, matrices, fractions, text
(-\infty, 3] ~ (-\infty,3]
[0,1] \cup [2,3] ~ [2,3]\cup[0,1]
\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix} ~ \begin{pmatrix}1&2\\3&4\end{pmatrix}
\begin{bmatrix} 0.5 \\ 1 \end{bmatrix} ~ \begin{bmatrix} \frac12 \\ 1 \end{bmatrix}
\frac{3}{4} ~ 0.75
\frac{12}{5} ~ \frac{12}5
x = 5 ~ 5
New York ~ the new york.
T-shirt ~ t - shirt
Yes ~ \text{yes}
"""

UNEQUAL = r"""
# A1
1.07e16 ~ 1.07 \times 10^{15}
1.07e16 ~ 1.07e-16
1.04e-3 ~ 1.04
6.02e23 ~ 6.02 \cdot 10^{22}
3e8 ~ 38
1e6 ~ 10^5
1000 ~ 10^3
2e+1 ~ 21
2e ~ 2
1e3, 2e3 ~ 1000, 200
1e400 ~ 1e401
5 ~ 5e1
-1.6e-19 ~ 1.6e-19
# A2
5\text{ km} ~ 5\text{ m}
5\text{ hours} ~ 5 minutes
12\pi \text{ cubic inches} ~ 12\pi \text{ square inches}
5 \text{ cm}^2 ~ 5 \text{ cm}^3
5 \text{ cm}^2 ~ 5 \text{ cm}
2\sqrt{3} \text{ meters} ~ 2\sqrt{3} \text{ feet}
2\sqrt{3} \text{ meters} ~ 3\sqrt{2}
\frac{270}{7}\text{ degrees} ~ \frac{270}{7}\text{ radians}
\$5 ~ 5 \text{ euros}
50\% ~ 50 \text{ cm}
50\% ~ 0.5
60 \text{ mph} ~ 60 \text{ km/h}
5 \text{ apples} ~ 5 \text{ oranges}
5 \text{ million} ~ 5
5 \text{ or more} ~ 5
5 \text{ AM} ~ 5 \text{ PM}
25^\circ\text{C} ~ 25^\circ\text{F}
5 \text{ cm}, 3 \text{ m} ~ 5 \text{ m}, 3 \text{ cm}
9.8 \text{ m/s}^2 ~ 9.8 \text{ m/s}
5 km ~ 5 m
5 g ~ 5kg
5 m ~ 5 s
5\,\text{km}/\text{h} ~ 5\,\text{m}/\text{s}
# A4
p-q ~ q - p
78 ~ \boldsymbol{87}
78 ~ {7}{8}
7, 8 ~ 78
\sqrt{2} ~ √3
\frac{1}{2} ~ ¾
7/2 ~ 2 1/2
31/2 ~ 3 1/2
1 ~ 1 1/0
1000 ~ 10 00
10000 ~ 1 0000
0.3 ~ 0.\overline{3}
0.\overline{3} ~ 0.333
0.\overline{12} ~ 0.\overline{21}
\infty ~ -∞
\emptyset ~ 0
\emptyset ~ \{0\}
x \le 3 ~ x ≥ 3
x < 3 ~ x ≤ 3
\pm 2 ~ 2
150 min ~ 150 hours
5 rad ~ 5 deg
1939-1945 ~ 1939–1946
Tom, Jerry ~ Tom and Terry
5 ~ 5 or more
2 ~ 2 thirds
\{7, 8\} ~ \{78\}
\frac{1}{3} ~ \boldsymbol{\frac{3}{1}}
# lists
1,3 ~ 1 \text{ and } 4
1,3 ~ 1
1,3 ~ 1,3,5
(1,3) ~ (3,1)
1 \text{ or } 8 ~ 18
# A5
2516_9 ~ 2516_8
2516_8 ~ 2516_{9}
1101_2 ~ 1101_{3}
AB_{16} ~ AB_{12}
2516_9 ~ 2517_9
2516_{\text{nine}} ~ 2516_{\text{eight}}
12_3, 21_3 ~ 12_3, 21_4
1101_2 ~ 1101 base 3
2516 ~ 2516_9
# intervals, matrices, fractions, text
[0,1) ~ (0,1]
[0,1] ~ (0,1)
(-\infty, 3] ~ (-\infty, 3)
[0,1] \cup [2,3] ~ [0,1] \cup [2,4]
\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix} ~ \begin{pmatrix} 1 & 3 \\ 2 & 4 \end{pmatrix}
\begin{pmatrix} 1 \\ 2 \end{pmatrix} ~ \begin{pmatrix} 2 \\ 1 \end{pmatrix}
\frac{3}{4} ~ 0.7
\frac{3}{4} ~ \frac{4}{3}
0.5 ~ 5
.5 ~ 5
x = 5 ~ x = -5
New York ~ York New
Yes ~ No
x > 3 ~ x < 3
T-shirt ~ shirt-T
"""


def pairs(text):
    lines = [line for line in text.strip().splitlines() if not line.startswith("# ")]
    return [tuple(line.split(" ~ ")) for line in lines]


@pytest.mark.parametrize("gold, said", pairs(EQUAL))
def test_the_same_answer_is_equal_whichever_way_it_is_written(gold, said):
    """A1, A2, A4, A5."""
    assert equal(said, gold)
    assert equal(gold, gold)


@pytest.mark.parametrize("gold, said", pairs(UNEQUAL))
def test_another_answer_is_not_equal(gold, said):
    """A1, A2, A4, A5."""
    assert not equal(said, gold)


def test_there_are_at_least_sixty_of_each():
    assert len(pairs(EQUAL)) >= 60
    assert len(pairs(UNEQUAL)) >= 60


@pytest.mark.parametrize(
    "gold, said",
    [
        ("x+1," * 200, "x+1," * 200),
        ("x+1," * 200, "x + 1, " * 200),
        (r"\frac{1}{2}+" * 100, r"\displaystyle " + r"\frac{1}{2} + " * 100),
        ("a proof " * 100, "A proof " * 100),
        ("y" * 1000, r"\boldsymbol{" + "y" * 1000 + "}"),
    ],
)
def test_a_long_answer_is_equal_to_itself(gold, said):
    """A3: equal text needs no parser."""
    assert len(gold) > LONGEST
    assert equal(gold, gold)
    assert not equal(gold + "+2", gold)
    assert equal(said, gold)


def test_nothing_is_not_equal_to_nothing():
    assert not equal("", "")
    assert not equal(" ", "")
    assert not equal("5", "")
