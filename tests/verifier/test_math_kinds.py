"""Kinds of answers: what is the same, and its nearest neighbours that are not, line by line."""

import pytest

from treerpo_ray.verifier._math.equality import is_equal
from treerpo_ray.verifier._math.expression import read
from treerpo_ray.verifier._math.value import is_same_value, ratio_of_differences
from treerpo_ray.verifier.math_answer import check_answer, find_answer, is_answer

SAME = {
    "several values": r"""
-4, 9 ~~ x=-4 or x=9
x=9$ or $x=-4 ~~ x=-4 or x=9
4 and 9 ~~ 4, 9
9; 4 ~~ 4, 9
1, 4, and 9 ~~ 1,4,9
150^\circ, 30^\circ ~~ 30,150
30, 150 ~~ 30,150
\frac{12}{18} or \frac{2}{3} ~~ \frac23
\mp 4 ~~ \pm 4
x_1=-4, x_2=9 ~~ x=-4 or x=9
x=-4, 9 ~~ x=-4 or x=9
x=4 \lor x=9 ~~ 4,9
4; 9; -4 and -9 ~~ 4, 9, -4, -9
\frac{-4 \pm \sqrt9}{2} ~~ -\frac12, -\frac72
""",
    "systems": r"""
x = 4, y = -9 ~~ (4,-9)
y=-9, x=4 ~~ (4,-9)
x=4 and y=-9 ~~ (4,-9)
(x,y)=(4,-9) ~~ (4,-9)
(a_1,a_2)=(4,-9) ~~ (4,-9)
\begin{cases}x=4\\y=-9\end{cases} ~~ (4,-9)
[4;9] ~~ [4,9]
\langle 4,9\rangle ~~ (4,9)
""",
    "named quantities": r"""
p+q=71 ~~ 71
71 ~~ p+q=71
P(X>4)=3/8 ~~ \frac38
\text{Volume}=48 ~~ 48
Volume = 48 ~~ 48
\angle PQR = 40^\circ ~~ 40
f(3)=10 ~~ 10
S_{20}=210 ~~ 210
\overline{PQ}=48 ~~ 48
|PQ|=48 ~~ 48
w^4=-3 ~~ -3
\tan\beta=3 ~~ 3
48=x ~~ 48
Area: 48 ~~ 48
\text{Area: } 48 ~~ 48
T=\{4,9\} ~~ \{9,4\}
x \in \{4,9\} ~~ \{9,4\}
n \equiv 4 \pmod{9} ~~ 4
A_1:A_2=4:9 ~~ 4:9
""",
    "statements": r"""
\log_2 32=5 ~~ 5
5 ~~ \log_2 32=5
3+4=7 ~~ 7
x=7=\frac{14}{2} ~~ 7
\frac{5}{6} \approx 0.83 ~~ \frac56
0.83 ~~ \frac{5}{6} \approx 0.83
x \approx 0.83 ~~ 0.83
u=v ~~ v=u
2u+v=9 ~~ 4u+2v=18
u-v>4 ~~ v-u<-4
""",
    "scientific notation": r"""
7e4 ~~ 70000
7.5e-3 ~~ 0.0075
6.1 \times 10^{21} ~~ 6.1e21
6.1*10^21 ~~ 6.1e+21
6.1x10^{21} ~~ 6.1E21
10^{4} ~~ 1e4
""",
    "matrices": r"""
\left[\begin{array}{rr}4&9\\0&1\end{array}\right] ~~ \begin{pmatrix}4&9\\0&1\end{pmatrix}
\left(\begin{array}{c}4\\9\end{array}\right) ~~ \begin{bmatrix}4\\9\end{bmatrix}
\begin{pmatrix}4\\9\end{pmatrix} ~~ \left(\begin{pmatrix}4\\9\end{pmatrix}\right)
[[4,9],[0,1]] ~~ \begin{pmatrix}4&9\\0&1\end{pmatrix}
\begin{bmatrix}4\\9\end{bmatrix} ~~ [[4], [9]]
""",
    "times of the day": r"""
7:45 p.m. ~~ 7:45 PM
7:45 \text{ a.m.} ~~ 7:45 AM
7 pm ~~ 7:00 \text{ p.m.}
\text{7:45 PM} ~~ 7:45
07:45 am ~~ 7:45 a.m.
""",
    "intervals": r"""
x>4 ~~ (4,\infty)
4 < x ~~ (4,\infty)
t \ge 4 ~~ [4,+\infty)
9 \ge x > 4 ~~ (4,9]
4<g(x)<9 ~~ (4,9)
x<4 or x>9 ~~ (-\infty,4)\cup(9,\infty)
x>4 and x<9 ~~ (4,9)
x \ne 4 ~~ (-\infty,4)\cup(4,\infty)
(4,7)\cup(7,9) ~~ (4,9)\setminus\{7\}
(4,7)\cup[7,9) ~~ (4,9)
\{x \mid 4<x<9\} ~~ 4<x<9
\{x : x \ge 4\} ~~ [4,\infty)
all real numbers ~~ (-\infty,\infty)
|x| \le 4 ~~ [-4,4]
\mathbb{R}\setminus\{4\} ~~ x \ne 4
""",
    "units": r"""
\frac{7}{9} mile ~~ \frac79
7\pi feet per second ~~ 7\pi
7\pi cm^2 ~~ 7\pi
7km ~~ 7
7 \frac{m}{s} ~~ 7
40 km/h ~~ 40
7 \text{ kg m}^{-3} ~~ 7
40^\circ C ~~ 40
2 hours 15 minutes ~~ 2.25 hours
7^\circ 30' ~~ 7.5^\circ
\textdollar 7 ~~ 7
7^{\text{th}} ~~ 7
21st ~~ 21
66\frac23\% ~~ 66.\overline{6}\%
7.5 \mathrm{~m} / \mathrm{s}^2 ~~ 7.5
7 N ~~ 7
4:40 p.m. ~~ 4\!:\!40 \text{ p.m.}
""",
    "numbers": r"""
70 000 ~~ 70000
7 123 456 ~~ 7123456
0.\overline{7} ~~ \frac79
0.1\overline{6} ~~ \frac16
0.1666... ~~ \frac16
7,123 ~~ 7123
1100_{\text{two}} ~~ 1100_2
4:6:8 ~~ 2:3:4
\sqrt{3}:3 ~~ 1:\sqrt3
""",
    "programs": r"""
7*sqrt(3) ~~ 7\sqrt3
(1+sqrt(7))/2 ~~ \frac{1+\sqrt7}{2}
x**3 + 2*x ~~ x^3+2x
3*pi/7 ~~ \frac{3\pi}{7}
exp(-2) ~~ e^{-2}
x^(1/2) ~~ \sqrt{x}
C(6,2) ~~ 15
""",
    "choices": r"""
\textbf{(D)}\ 48 ~~ D
\text{(D) Cone} ~~ \text{(D)}
D: a cone ~~ D
D. 48 ~~ \text{D}
D ~~ (D) Cone
option D ~~ D
""",
    "words": r"""
YES ~~ Yes
no solutions ~~ no solution
May 4 ~~ \text{May 4}
"odd" ~~ \text{odd}
\varnothing ~~ \{\}
""",
    "expressions": r"""
1/3 x + 4 ~~ \frac{x}{3}+4
5/4\pi(2-\sqrt3)^3 ~~ \frac54\pi(2-\sqrt3)^3
\sin 150^\circ ~~ \frac12
4\sin 15^\circ\cos 15^{\circ} ~~ 1
\mathrm{e}^2-\mathrm{i} ~~ e^2-i
K_1+K_{2} ~~ K_2+K_1
z''+z=0 ~~ z^{\prime\prime}+z=0
\binom{52}{5} ~~ 2598960
\binom{n}{2} ~~ \frac{n(n-1)}{2}
3^{2^2} ~~ 81
\sqrt{-9} ~~ 3i
\sqrt[3]{-8} ~~ -2
\frac{1}{i} ~~ -i
\sin^{-1}(1) ~~ \arcsin 1
\lg 1000 ~~ 3
\gcd(a,b) ~~ gcd(a,b)
\frac{9!}{4!5!} ~~ 126
|u-v| ~~ |v-u|
\frac{u^2-v^2}{u-v} ~~ u+v
""",
    "looks": r"""
\large 7 ~~ 7
<b>7</b> ~~ 7
7 \\ ~~ 7
√(7) ~~ \sqrt7
√12 ~~ 2\sqrt3
\sfrac{7}{9} ~~ \frac79
""",
}

APART = {
    "matrices and times": r"""
[[4,9],[0,2]] ~~ \begin{pmatrix}4&9\\0&1\end{pmatrix}
[[4,0],[9,1]] ~~ \begin{pmatrix}4&9\\0&1\end{pmatrix}
[4,9] ~~ \begin{pmatrix}4\\9\end{pmatrix}
[[4,9],[0,1]] ~~ \begin{vmatrix}4&9\\0&1\end{vmatrix}
7:45 p.m. ~~ 7:45 a.m.
7:45 p.m. ~~ 7:54 p.m.
7 pm ~~ 8 pm
""",
    "several values": r"""
x=5 or x=9 ~~ x=-4 or x=9
x=-4 or x=9 ~~ 9
4 or 9 ~~ 9
4, 4, 9 ~~ 4, 9
\{4,4,9\} ~~ \{4,9\}
x=4, 9 ~~ 4, 8
30150 ~~ 30,150
\pm 4 ~~ 4
4\pm 9 ~~ 13
q=-4 or x=9 ~~ x=-4 or x=9
q=-4 or q=9 ~~ x=-4 or x=9
x_1=9, x_2=-4 ~~ x_1=-4, x_2=9
x_2=-4, x_2=9 ~~ x_1=-4, x_2=9
""",
    "systems": r"""
x=-9, y=4 ~~ (4,-9)
y=4, x=-9 ~~ (4,-9)
(b,a)=(4,-9) ~~ (a,b)=(4,-9)
(a,b)=(4,9) ~~ (a,b)=(4,8)
(p,q)\in\{(4,9),(16,81)\} ~~ (p,q)\in\{(4,9),(16,80)\}
[4;9] ~~ (4,9)
(x,y) ~~ (y,x)
""",
    "named quantities": r"""
T=2\sum_{j=1}^{m}j ~~ T=\sum_{j=1}^{m}j
p+q=71 ~~ 72
P(X)=3/8 ~~ P(Y)=3/8
\text{Volume}=48 ~~ \text{Area}=48
3x=48 ~~ 48
3x=48 ~~ x=16
w^2=9 ~~ w=3
n \equiv 4 \pmod{9} ~~ n \equiv 4 \pmod{7}
""",
    "statements": r"""
\log_2 32=4 ~~ \log_2 32=5
\log_2 32=4 ~~ 4
\sin(\frac{\pi}{6})=\frac12 ~~ \cos(\frac{\pi}{3})=1
x+1=x+4 ~~ x+1=x+9
3+4=8 ~~ 8
4=4 ~~ 9=9
\cos(3\pi)=-1 ~~ \cos(\pi)=-1
\frac{5}{6} \approx 0.83 ~~ \frac{5}{6} \approx 0.84
\cos 40^\circ \approx 0.766 ~~ \cos 40^\circ \approx 0.767
97 \approx 100 ~~ 100
0.56=56\% ~~ 056=56\%
""",
    "nearly equal numbers": r"""
1-3^{-90} ~~ 1-3^{-91}
5^{-1999} ~~ 5^{-2000}
\frac{10^{60}+1}{10^{60}} ~~ 1
\sqrt{10^{40}+1} ~~ 10^{20}
e^{-300}+1 ~~ 1
\arctan(10^{50}) ~~ \frac{\pi}{2}
10^{30}+1 ~~ 10^{30}
0.8333333333 ~~ \frac56
""",
    "times and ratios": r"""
4:40 ~~ 2:20
9:20 \text{ pm} ~~ 4:40\text{ pm}
9:30 \text{ am} ~~ 9:30\text{ pm}
1:4:9 ~~ 1:9:4
4:9 ~~ 9:4
0:0 ~~ 4:9
""",
    "letters that are numbers elsewhere": r"""
\gamma+4 ~~ \gamma+9
\gamma ~~ \delta
I^4 ~~ I^9
I+1 ~~ 2
\zeta(4) ~~ \zeta(9)
E_1 ~~ E_2
z'+4 ~~ z+4
""",
    "what has two meanings": r"""
4 9 2 ~~ 9 4 2
2 3 ~~ 6
2 3 ~~ 5
x/2y ~~ \frac{x}{2y}
2^3^2 ~~ 512
--4 ~~ 4
\sin 30 ~~ \frac12
P \setminus Q ~~ Q \setminus P
p \implies q ~~ q \implies p
""",
    "intervals": r"""
x>4 ~~ x \ge 4
x>4 ~~ (-\infty,4)
x<9 and x>-9 ~~ x<9 or x>-9
(4,9)\setminus\{7\} ~~ (4,9)
4<x<9 ~~ 4<x\le 9
\{x \mid x>4\} ~~ \{x \mid x>9\}
x \ne 4 ~~ x \ne 9
|x|<4 ~~ (0,4)
x>4, x<9 ~~ (-\infty,\infty)
x<4 or u>9 ~~ x<4 or x>9
2u+1>v ~~ 2v+1>u
""",
    "units": r"""
7\pi cm^2 ~~ 7\pi cm^3
7 \frac{m}{s} ~~ 7 \frac{km}{h}
40^\circ C ~~ 40^\circ F
2 hours 15 minutes ~~ 2.15 hours
7 million ~~ 7
7^{th} ~~ 8
7 May ~~ 7
""",
    "others": r"""
\textbf{(D)}\ 48 ~~ 48
(D) Cone ~~ C
(A) or (D) ~~ A
May 4 ~~ \text{May 5}
yes ~~ no
7e4 ~~ 7e5
0.\overline{7} ~~ 0.7
0.777... ~~ 0.777
\binom{52}{5} ~~ \binom{52}{6}
\sqrt{-9} ~~ 3
|x| ~~ x
\sqrt{x^2} ~~ x
n! ~~ n
\ln 4 ~~ \log 4
70 000 ~~ 70
1100_{\text{two}} ~~ 1100_3
""",
}

TEXTS = [
    ("the value is $\\frac{3}{8}$", "8"),
    ("so that makes 3^{8}", "8"),
    ("the area is 3\\pi", "3"),
    ("the point is (3,8)", "8"),
    ("it runs from 3-8", "8"),
    ("x=-3 or x=8", "8"),
    ("x \\neq 8", "8"),
    ("The answer is between 3 and 8", "8"),
    ("The answer is $8$ million", "8"),
    ("The answer is $8$ of $9$", "8"),
    ("The answer is 3 or 8", "3"),
    (r"\boxed{3} or \boxed{8}", "8"),
    ("Hence the area is $3\\sqrt{8}$ square units.", "8"),
]


def pairs(blocks: dict[str, str]) -> dict[str, list[list[str]]]:
    return {
        kind: [line.split(" ~~ ") for line in block.strip().split("\n")]
        for kind, block in blocks.items()
    }


@pytest.mark.parametrize("kind", SAME)
def test_an_answer_of_a_kind_is_right_in_every_form(kind):
    rejected = [pair for pair in pairs(SAME)[kind] if not is_equal(*pair)]
    assert rejected == []


@pytest.mark.parametrize("kind", APART)
def test_a_wrong_neighbour_of_a_kind_is_wrong(kind):
    accepted = [pair for pair in pairs(APART)[kind] if is_equal(*pair)]
    assert accepted == []


def test_an_answer_is_no_part_of_what_the_text_says():
    accepted = [(text, find_answer(text)) for text, part in TEXTS if check_answer(text, (part,))]
    assert accepted == []


def test_what_is_read_has_one_meaning():
    """Of each text the value worked out by hand; None where another reader could find another."""
    by_hand = {
        r"-2^2": "-4",
        r"2^{3^2}": "512",
        r"2\frac{1}{2}": "2.5",
        r"2\frac{x}{2}": "x",
        r"(2)\frac{1}{2}": "1",
        r"2^2\frac{1}{2}": "2",
        r"6/2*3": "9",
        r"1/2 x": "0.5x",
        r"\frac12x": "x/2",
        r"\sin 2x": r"\sin(2x)",
        r"\sin^2 x\cos x": r"(\sin(x))^2*\cos(x)",
        r"\log_2 8+1": "4",
        r"x^2y": "yx^2",
        r"|x-1|y": "y|1-x|",
        r"5\%": "0.05",
        r"3!+1": "7",
        r"\lfloor -2.5\rfloor": "-3",
        r"\sqrt2x": r"x\sqrt{2}",
    }
    assert [text for text, value in by_hand.items() if not is_same_value(text, value)] == []
    two_meanings = (
        "2 3",
        "x2",
        "x/yz",
        "2^3^2",
        "x!!",
        r"\foo",
        r"a\oplus b",
        "(1",
        "1)",
        "|1",
        "",
    )
    assert [text for text in two_meanings if read(text) is not None] == []


@pytest.mark.parametrize(
    ("a", "b", "ratio"),
    [
        (("x+2y", "3"), ("2x+4y", "6"), 0.5),
        (("y", "2x-13"), ("2x-y-13", "0"), -1.0),
        (("x", "1"), ("x", "2"), None),
        (("x+1", "x+2"), ("x+1", "x+3"), None),
        (("x", "x"), ("2x", "2x"), None),
        ((r"\ln e", "1"), (r"\ln e", "2"), None),
    ],
)
def test_an_equation_is_a_multiple_of_another(a, b, ratio):
    assert ratio_of_differences(a, b) == ratio


@pytest.mark.parametrize(
    ("reference", "answer"),
    [
        (r"We subtract 4 from 19 and get $\boxed{15}$ in the end.", "15"),
        ("It is 19 less 4. The answer is 15.", "15"),
        ("19 - 4 = 15\n#### 15", "15"),
        ("60 * 2002 = 120,120\n#### 120,120", "120120"),
        (r"Either $x=\boxed{3}$ or $x=\boxed{8}$.", "3, 8"),
        ("<think>19</think><answer>15</answer>", "15"),
        ("15", "15"),
    ],
)
def test_the_answer_of_a_worked_solution_is_taken_out_of_it(reference, answer):
    assert check_answer(rf"\boxed{{{answer}}}", (reference,)) is True
    assert check_answer(r"\boxed{97}", (reference,)) is False
    assert check_answer(reference, (reference,)) is True
    assert is_answer(reference)


def test_what_is_no_answer_is_told_from_one():
    prose = "First we add the two sides. Then what is left is the number of all the ways."
    none = [prose, "$$", "", "9" * 2000, "We add.\nThen we take away."]
    assert [text for text in none if is_answer(text)] == []
    some = ["7", r"\text{no such number}", r"\cos t=0 \text{ where } t=\frac{\pi}{2}+k\pi", "A, B"]
    assert [text for text in some if not is_answer(text)] == []
