r"""Math expression: reads one scalar expression, in LaTeX or plain, into a tree of terms.

What may be read in two ways is not read at all: numbers side by side, x/2y, a tower of powers
without braces, a command that isn't known. An answer that cannot be read equals only its own
spelling. The grammars that there are guess instead: latex2sympy2, which math-verify uses, reads
`\gamma+1` as 1, `y'` as y, `2 3` as 5 and `6/2(3)` as 6/5, and each is a reward for a wrong answer.
"""

from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

from treerpo_ray.verifier._math.tokens import Unreadable, tokens

MAX_CHARS = 300


FUNCTIONS = frozenset(
    (
        *("sin", "cos", "tan", "cot", "sec", "csc", "arcsin", "arccos", "arctan", "arccot"),
        *("arcsec", "arccsc", "sinh", "cosh", "tanh", "coth", "ln", "log", "lg", "exp"),
        *("max", "min", "gcd", "lcm"),
    )
)


ANGULAR = frozenset(("sin", "cos", "tan", "cot", "sec", "csc"))


GREEK = (
    *("alpha", "beta", "gamma", "delta", "epsilon", "varepsilon", "zeta", "eta", "theta"),
    *("vartheta", "iota", "kappa", "lambda", "mu", "nu", "xi", "rho", "varrho", "sigma", "tau"),
    *("upsilon", "phi", "varphi", "chi", "psi", "omega", "Gamma", "Delta", "Theta", "Lambda"),
    *("Xi", "Pi", "Sigma", "Upsilon", "Phi", "Psi", "Omega"),
)


SYMBOLS = frozenset(f"\\{name}" for name in (*GREEK, "ell", "hbar", "infty", "emptyset", "partial"))


MARKS = frozenset(
    ("\\overline", "\\overrightarrow", "\\vec", "\\hat", "\\bar", "\\tilde", "\\mathbb")
)


SHAPES = frozenset(("\\angle", "\\triangle", "\\mathcal"))


TIMES = frozenset(("*", "\\cdot", "\\times"))


OVER = frozenset(("/", "\\div"))


CLOSERS = {"(": ")", "[": "]", "{": "}", "\\lfloor": "\\rfloor", "\\lceil": "\\rceil", "|": "|"}


class Term(NamedTuple):
    """A part of an expression: a number, symbol or constant by `name`, or what `parts` make."""

    kind: str
    parts: tuple["Term", ...] = ()
    number: Fraction = Fraction(0)
    name: str = ""


@lru_cache(maxsize=4096)
def read(text: str) -> Term | None:
    """The expression that the text writes; None if it cannot be read."""
    if len(text) > MAX_CHARS:
        return None
    try:
        return _Reader(text).whole()
    except Unreadable:
        return None


def number_term(number: Fraction) -> Term:
    return Term("number", number=number)


def quotient(top: Term, bottom: Term) -> Term:
    if top.kind == bottom.kind == "number" and bottom.number:
        return number_term(top.number / bottom.number)
    return Term("*", (top, Term("^", (bottom, number_term(Fraction(-1))))))


def negative(term: Term) -> Term:
    return number_term(-term.number) if term.kind == "number" else Term("-", (term,))


class _Reader:
    """Reads tokens from left to right by the usual precedences."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._tokens = tokens(text)
        self._at = 0
        self._num_bars = 0

    def whole(self) -> Term:
        term = self._sum()
        if self._next is not None:
            raise Unreadable(self._text)
        return term

    @property
    def _next(self) -> str | Fraction | None:
        return self._tokens[self._at] if self._at < len(self._tokens) else None

    def _take(self) -> str | Fraction:
        if self._next is None:
            raise Unreadable(self._text)
        self._at += 1
        return self._tokens[self._at - 1]

    def _takes(self, token: str) -> bool:
        if self._next == token:
            self._at += 1
            return True
        return False

    def _expect(self, token: str) -> None:
        if not self._takes(token):
            raise Unreadable(self._text)

    def _sum(self) -> Term:
        parts = [self._signed(self._product)]
        while self._next in ("+", "-"):
            if self._take() == "+":
                parts.append(self._signed(self._product))
            else:
                parts.append(negative(self._signed(self._product)))
        return parts[0] if len(parts) == 1 else Term("+", tuple(parts))

    def _signed(self, read: Callable[[], Term]) -> Term:
        if self._takes("-"):
            return negative(read())
        self._takes("+")
        return read()

    def _product(self) -> Term:
        product = factor = self._mixed()
        has_slash = False
        while self._next is not None:
            if self._next in TIMES:
                self._take()
                factor = self._signed(self._mixed)
                product = Term("*", (product, factor))
            elif self._next in OVER:
                self._take()
                is_number = product.kind == "number"
                factor = self._signed(self._factor)
                product = quotient(product, factor)
                has_slash = not (is_number and factor.kind == "number")
                continue
            elif self._starts_factor():
                if has_slash or (isinstance(self._next, Fraction) and factor.kind != "!"):
                    raise Unreadable(self._text)  # x/2y and 2 3
                factor = self._factor()
                product = Term("*", (product, factor))
            else:
                break
            has_slash = False if self._next in TIMES else has_slash
        return product

    def _mixed(self) -> Term:
        """A factor, or a whole number and a fraction of whole numbers, which are added."""
        first, start = self._next, self._at
        factor = self._factor()
        is_whole = isinstance(first, Fraction) and first.denominator == 1
        if not is_whole or self._at > start + 1:
            return factor
        match self._tokens[self._at : self._at + 3]:
            case [Fraction() as top, "/", Fraction() as bottom] if top < bottom:
                if top.denominator == bottom.denominator == 1:
                    self._at += 3
                    return number_term(factor.number + top / bottom)
        if self._next == "\\frac":
            before = self._at
            fraction = self._factor()
            if fraction.kind == "number" and fraction.number > 0:
                return number_term(factor.number + fraction.number)
            self._at = before
        return factor

    def _starts_factor(self) -> bool:
        token = self._next
        if isinstance(token, Fraction) or token is None:
            return token is not None
        if token == "|":
            return not self._num_bars
        return token[0].isalpha() or token in CLOSERS or self._is_command(token)

    def _is_command(self, token: str) -> bool:
        return token.startswith("\\") and (
            token in SYMBOLS
            or token in MARKS
            or token in SHAPES
            or token[1:] in FUNCTIONS
            or token in ("\\frac", "\\sqrt", "\\binom", "\\pi")
        )

    def _factor(self) -> Term:
        base = self._base()
        has_power = False
        while self._next in ("^", "!", "%", "\\%"):
            token = self._take()
            if token == "!":
                if self._next == "!" or (has_power and base.kind == "^"):
                    raise Unreadable(self._text)
                base = Term("!", (base,))
            elif token == "^":
                if has_power:
                    raise Unreadable(self._text)
                base, has_power = self._power(base), True
            else:
                base = quotient(base, number_term(Fraction(100)))
        return base

    def _power(self, base: Term) -> Term:
        if self._takes("\\circ"):
            return Term("degrees", (base,))
        if self._next == "{" and self._tokens[self._at + 1 : self._at + 3] == ["\\circ", "}"]:
            self._at += 3
            return Term("degrees", (base,))
        exponent = self._signed(self._base)
        return Term("^", (base, exponent))

    def _base(self) -> Term:
        token = self._take()
        if isinstance(token, Fraction):
            return number_term(token)
        if token in CLOSERS:
            return self._bracket(token)
        if token[0].isalpha() or token in SYMBOLS or token in MARKS or token in SHAPES:
            return self._symbol(token)
        match token:
            case "\\pi":
                return Term("constant", name="pi")
            case "\\frac":
                return quotient(self._argument(), self._argument())
            case "\\binom":
                return Term("binomial", (self._argument(), self._argument()))
            case "\\sqrt":
                return self._root()
        if token[1:] in FUNCTIONS:
            return self._function(token[1:])
        raise Unreadable(self._text)

    def _bracket(self, opener: str) -> Term:
        bars, self._num_bars = self._num_bars, int(opener == "|")
        inner = self._sum()
        self._num_bars = bars
        self._expect(CLOSERS[opener])
        name = {"|": "abs", "\\lfloor": "floor", "\\lceil": "ceiling"}.get(opener)
        return Term(name, (inner,)) if name else inner

    def _argument(self) -> Term:
        """What a command takes: a group, or one token, of a number its first digit."""
        if self._takes("{"):
            return self._bracket("{")
        token = self._next
        if isinstance(token, Fraction):
            digits = str(token)
            if not digits.isdecimal():
                raise Unreadable(self._text)
            if len(digits) > 1:
                self._tokens[self._at] = Fraction(int(digits[1:]))
                return number_term(Fraction(int(digits[0])))
        return self._base()

    def _root(self) -> Term:
        degree = number_term(Fraction(2))
        if self._takes("["):
            degree = self._bracket("[")
        return Term("^", (self._argument(), quotient(number_term(Fraction(1)), degree)))

    def _symbol(self, token: str) -> Term:
        """A letter with its index and primes, or what a mark over letters makes of them."""
        name = token
        if token in MARKS or token in SHAPES:
            name += " " + (self._raw() if self._next == "{" else self._letters())
        if self._takes("_"):
            name += "_" + self._raw()
        while self._takes("'"):
            name += "'"
        if name in ("e", "i"):
            return Term("constant", name=name)
        if self._next == "(" and name[0] in "fghC":
            return self._applied(name)
        return Term("symbol", name=name)

    def _letters(self) -> str:
        name = ""
        while isinstance(self._next, str) and self._next.isalpha():
            name += str(self._take())
        if not name:
            raise Unreadable(self._text)
        return name

    def _raw(self) -> str:
        """The spelling of a token or of a group in braces, without the braces."""
        if not self._takes("{"):
            return str(self._take())
        depth, name = 1, ""
        while depth:
            token = self._take()
            depth += (token == "{") - (token == "}")
            name += str(token) if depth else ""
        return name

    def _applied(self, name: str) -> Term:
        """The value of a function that isn't known; C(n, k) is a binomial."""
        parts = self._list()
        if name[0] != "C":
            return Term("applied", parts, name=name)
        if name == "C" and len(parts) == 2:
            return Term("binomial", parts)
        if len(parts) > 1:
            raise Unreadable(self._text)
        return Term("*", (Term("symbol", name=name), parts[0]))

    def _list(self) -> tuple[Term, ...]:
        self._expect("(")
        parts = [self._sum()]
        while self._takes(","):
            parts.append(self._sum())
        self._expect(")")
        return tuple(parts)

    def _function(self, name: str) -> Term:
        if name in ("max", "min", "gcd", "lcm"):
            return Term(name, self._list())
        base: Term | None = None
        power: Term | None = None
        if name == "log" and self._takes("_"):
            base = self._argument_of_index()
        if self._takes("^"):
            power = self._signed(self._base)
        argument = self._bare_argument()
        if power == number_term(Fraction(-1)):
            if name not in ANGULAR:
                raise Unreadable(self._text)
            name, power = f"arc{name}", None
        parts = (argument,) if base is None else (argument, base)
        term = Term({"lg": "log"}.get(name, name), parts)
        return term if power is None else Term("^", (term, power))

    def _argument_of_index(self) -> Term:
        """The base of a logarithm; of digits without braces all, as in log_10(x)."""
        return self._bracket("{") if self._takes("{") else self._base()

    def _bare_argument(self) -> Term:
        """A group in brackets, or factors side by side up to an operator, bracket or function."""
        if self._next in ("(", "[", "{", "|"):
            return self._base()
        parts = [self._factor()] if self._is_simple() else []
        while self._is_simple() and not isinstance(self._next, Fraction):
            parts.append(self._factor())
        if not parts or self._next in OVER or isinstance(self._next, Fraction):
            raise Unreadable(self._text)
        product = parts[0]
        for part in parts[1:]:
            product = Term("*", (product, part))
        return product

    def _is_simple(self) -> bool:
        token = self._next
        if not isinstance(token, str):
            return token is not None
        return (
            token[0].isalpha()
            or token == "{"
            or (self._is_command(token) and token[1:] not in FUNCTIONS)
        )
