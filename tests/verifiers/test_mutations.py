"""No false accept: known answers of every shape, changed in one place in every way that changes what they say."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import pytest

from tempo_megatron.verifiers import self_problem, verify
from tempo_megatron.verifiers.registry import kind_named

#: Of each shape one or more; none is the same after one of the changes below.
GOLDS = [
    *("42", "-7", "1234567", "0.25", "-3.5", "9{,}512", r"\$18", r"75\%", r"\frac{3}{7}", r"-\frac{12}{5}", "3/8"),
    *(r"2\frac{1}{3}", "2^{11}", "7!", r"3\sqrt{5}", r"\sqrt[3]{7}", r"1+\sqrt{2}", r"\frac{1+\sqrt{5}}{2}", r"2\pi"),
    *(
        r"\frac\pi6",
        r"2007+\frac\pi 2",
        r"e^\pi",
        r"\ln 3",
        r"\log_2 5",
        r"\sin 20^\circ",
        r"3-4i",
        "C_{12}^3",
        "A_7^3",
    ),
    *("x^2-5x+6", "(x+1)(x-3)", r"\frac{x+1}{x-2}", "2ab-3c", r"\sin(3x)", "2^{n+1}", "3-2f(x)", "n!+3", r"|x-4|"),
    *(
        "x=5",
        "a_{10}=55",
        "AB=5",
        r"\angle ABC=65^\circ",
        r"S_{\triangle ABC}=6",
        r"P(A)=\frac{2}{7}",
        "f(2)=9",
        r"x=\pm 3",
    ),
    *("f(x)=2x+7", "y=2x+3", "x^2+y^2=7", r"\frac{x^2}{4}+\frac{y^2}{3}=1", "3x+2y-7=0", r"\tan 75^\circ=2+\sqrt3"),
    *(r"\sqrt2\cdot\sqrt8=4", "3+4=7", r"\sin 2x=2\sin x\cos x", "x>3", r"x\le -2", r"2<x\le 7", "f(2)<f(1)<f(4)"),
    *(
        "(3,4]",
        r"[-2,\infty)",
        r"(-\infty,3)\cup(5,\infty)",
        r"x\in[2,9)",
        r"\{x\mid -2\le x<3\}",
        r"x<3\text{ or }x>5",
    ),
    *("(3,7)", "(2,-5,8)", "(x,y)=(3,7)", "A(3,7)", "(2,3),(4,5)", r"\langle 2,5\rangle", r"\vec{a}=(3,5)"),
    *(
        "2,3",
        "-4,7,9",
        r"\{3,5\}",
        r"S=\{3,5\}",
        r"\pm 4",
        r"3\pm\sqrt{7}",
        "n=-4,-2",
        r"x=3\text{ or }x=5",
        "x=100,200",
    ),
    *("5;12", r"$5$;$12$", "x=3;y=5", "x=3,y=5", r"\begin{cases}x=3\\y=5\end{cases}", "2,3;7", "5 cm, 3 cm"),
    *(r"5\text{ cm}", r"12\text{ cm}^2", r"35^\circ", "2516_8", "15.7", r"5\pi\approx15.7", "3:2"),
    *(r"\begin{pmatrix}2&3\\4&5\end{pmatrix}", r"\begin{pmatrix}3\\-2\end{pmatrix}"),
    r"f(x)=\begin{cases}x+3&x>5\\-x&x\le 5\end{cases}",
]

Change = Callable[[str], Iterator[str]]


def replaced(text: str, pattern: str, others: Callable[[str], list[str]]) -> Iterator[str]:
    """``text`` with each match of ``pattern`` replaced by each of the others."""
    for found in re.finditer(pattern, text):
        for other in others(found.group()):
            yield text[: found.start()] + other + text[found.end() :]


def digits(text: str) -> Iterator[str]:
    yield from replaced(text, "[1-9]", lambda d: [str((int(d) + by) % 9 + 1) for by in (0, 4)])


def longer_numbers(text: str) -> Iterator[str]:
    yield from replaced(text, r"(?<!\.)[1-9](?![0-9{}]*\.)", lambda d: [d + "1", d + ".0000001"])


def signs(text: str) -> Iterator[str]:
    yield from replaced(text, r"(?<=[\w})])[+-]|(?<=[(,=;&])-", lambda s: ["-"] if s == "+" else ["+"])
    yield "-" + text if not text.startswith("-") else text[1:]


def brackets(text: str) -> Iterator[str]:
    other = {"(": "[", "[": "(", ")": "]", "]": ")"}
    if re.fullmatch(r"(?:[a-zA-Z\\ {}]*(?:=|\\in))?[(\[].*[)\]]", text) and re.search(r"[,]", text):
        yield from replaced(text, r"[(\[]|[)\]]", lambda b: [other[b]])


def relations(text: str) -> Iterator[str]:
    flipped = {
        "<": [r"\le ", ">"],
        ">": [r"\ge ", "<"],
        r"\le": ["<", r"\ge "],
        r"\ge": [">", r"\le "],
        "=": ["<", r"\ne "],
    }
    yield from replaced(text, r"\\[lg]e(?![a-z])|[<>=]", lambda r: flipped[r])


def names(text: str) -> Iterator[str]:
    """Of variables, points and functions; a bound one is renamed in one place only."""
    yield from replaced(text, r"(?<![\\a-zA-Z{])[a-zA-Z](?![a-zA-Z{])", lambda n: ["w" if n.islower() else "W"])
    yield from replaced(text, "AB", lambda n: ["AD"])


def dropped(text: str) -> Iterator[str]:
    yield from replaced(text, r"[,;]\s*[^,;()\[\]\\]+", lambda _: [""])
    yield from replaced(text, r"\\(?:sqrt|pi|ln|sin|tan|pm)(?![a-z])|[!i]\Z", lambda _: [" "])


def exchanged(text: str) -> Iterator[str]:
    """The first two of ordered things."""
    ordered = ";" in text or re.match(r"(?:\(x,y\)=|A|\\vec\{a\}=)?(?:[(\[]|\\langle)", text)
    if ordered and not text.startswith("x=") and "cup" not in text:
        at = r"^((?:\(x,y\)=|A|\\vec\{a\}=)?(?:[(\[]|\\langle )?)([^,;()]+)([,;])([^,;()\\\]]+)"
        yield re.sub(at, r"\1\4\3\2", text, count=1)


def functions(text: str) -> Iterator[str]:
    other = {r"\sin": r"\cos", r"\tan": r"\cot", r"\ln": r"\log_3", r"\cup": r"\cap", r"\infty": "99", r"\cdot": "+"}
    yield from replaced(text, r"\\(?:sin|tan|ln|cup|infty|cdot)(?![a-z])", lambda f: [other[f]])
    yield from replaced(text, r"\bcm\b", lambda _: ["m", "kg"])
    yield from replaced(text, r"\^\\circ\Z|\\%\Z|_8\Z", lambda _: [r"\text{ kg}"])


def glued(text: str) -> Iterator[str]:
    if not text.startswith("9{"):
        yield from replaced(text, r"\$?[,;]\s*\$?", lambda _: [""])


def extended(text: str) -> Iterator[str]:
    for more in (", 77", "; 77", r"\text{ or }77", "+1", "^2", "w", r"\approx 77", "=77", r"\cdot 3"):
        yield text + more
    for more in ("77,", "77;", "3+", r"\ne ", "<", "w=77=", "not ", r"\sim "):
        yield more + text


#: Mathematically the same.
SAME = {
    (r"\pm 4", r"-\pm 4"),
    ("2,3;7", "3,2;7"),  # one blank of two solutions
    (r"\frac{x^2}{4}+\frac{y^2}{3}=1", r"\frac{x^2}{4}+\frac{y^2}{3}=1^2"),
    *(("3x+2y-7=0", "3x+2y-7=0" + more) for more in ("^2", "w", r"\cdot 3")),
}
CHANGES: list[Change] = [
    *(digits, longer_numbers, signs, brackets, relations, names, dropped, exchanged, functions, glued, extended),
]


@pytest.fixture(scope="module", autouse=True)
def warm() -> None:
    kind_named("math").warm_up()


@pytest.mark.parametrize("gold", GOLDS)
def test_a_gold_accepts_itself(gold: str) -> None:
    assert self_problem(gold, "math") is None


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_changed_gold_is_wrong_and_not_unverified(change: Change) -> None:
    tried = 0
    for gold in GOLDS:
        for mutant in change(gold):
            if mutant == gold or (gold, mutant) in SAME:
                continue
            verdict = verify(rf"\boxed{{{mutant}}}", gold, "math")
            assert (verdict.correct, verdict.verified) == (False, True), (gold, mutant)
            tried += 1
    assert tried >= 10
