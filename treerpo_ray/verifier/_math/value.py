r"""Math value: whether two expressions, or both sides of two equations, have the same value.

Values are worked out by mpmath to as many digits as it takes to tell them apart: with the sizes of
all numbers and powers in it M bits, two rational expressions differ by more than 2^-2M unless they
are equal, and the values are right to 2^-4M. Unknowns are drawn as generic numbers, positive,
negative and mixed, so that |x| is not x; f(x) is a generic function. What would take long (a number
of more than a few thousand digits) has no value.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import mpmath

from treerpo_ray.verifier._math.expression import ANGULAR, Term, read

Value = Any
"""A real or complex number of mpmath, which has no types."""


MAX_BITS = 20_000  # of all numbers and powers of an expression together


MAX_FUNCTION_BITS = 2_500  # the same where functions are worked out, which takes far longer


FIRST_BITS = 64  # enough to tell sizes


SPARE_BITS = 160


SCALES = (1, 12, -3, 0)
"""Size of the unknowns at each probe; at 0 each has a size and a sign of its own."""


DRAW_BITS = 128


WHOLE_PROBES = range(len(SCALES), 16)
"""Probes at which unknowns are whole numbers, for factorials; some may be of negative numbers."""


MAX_WHOLE = 24


MIN_WHOLE_PROBES = 3


class NoValue(ValueError):
    """The expression has no value, or none within bounds."""


def is_same_value(a: str, b: str) -> bool:
    """Whether both are expressions that can be read, and have the same value."""
    first, second = read(a), read(b)
    if first is None or second is None:
        return False
    return first == second or _is_same(first, second)


def ratio_of_differences(a: tuple[str, str], b: tuple[str, str]) -> float | None:
    """The c with left - right of `a` always c times that of `b`; None if there is none.

    There is none either where the difference does not depend on an unknown, which is a statement
    about numbers, or is 0 everywhere.
    """
    differences = []
    for left, right in (map(read, a), map(read, b)):
        if left is None or right is None:
            return None
        differences.append(Term("+", (left, Term("-", (right,)))))
    try:
        bits = _bits(differences)
        ratios, firsts = [], []
        for probe in range(len(SCALES)):  # a factorial in an equation has no value at these
            first, second = (
                _Evaluation(bits=bits, probe=probe).value(term) for term in differences
            )
            if _is_zero(first, bits) or _is_zero(second, bits):
                return None
            ratios.append(first / second)
            firsts.append(first)
    except NoValue:
        return None
    is_constant = all(_is_close(value, firsts[0], bits) for value in firsts[1:])
    is_multiple = all(_is_close(ratio, ratios[0], bits) for ratio in ratios[1:])
    if is_constant or not is_multiple or not _is_real(ratios[0], bits):
        return None
    return float(ratios[0].real)


def real_value(text: str) -> Fraction | None:
    """Nearly the value of a real number, to put numbers into order; None if it is no such thing."""
    term = read(text)
    if term is None or _has_unknown(term):
        return None
    try:
        bits = _bits([term])
        value = _Evaluation(bits=bits, probe=0).value(term)
    except NoValue:
        return None
    if not _is_real(value, bits):
        return None
    return Fraction(*mpmath.libmp.to_rational(value.real._mpf_))


def _is_same(a: Term, b: Term) -> bool:
    is_complex = _has(a, "i") or _has(b, "i")
    num_same = 0
    probes = _probes(a, b)
    try:
        bits = _bits([a, b])
    except NoValue:
        return False
    for probe in probes:
        try:
            first, second = (_Evaluation(bits=bits, probe=probe).value(term) for term in (a, b))
        except NoValue:
            if probes is WHOLE_PROBES:
                continue
            return False
        if _is_close(first, second, bits):
            num_same += 1
        # Where neither is real, both lie outside of what they are about.
        elif is_complex or len(probes) == 1 or _is_real(first, bits) or _is_real(second, bits):
            return False
    return num_same >= (MIN_WHOLE_PROBES if probes is WHOLE_PROBES else 1)


def _probes(*terms: Term) -> range:
    if not any(map(_has_unknown, terms)):
        return range(1)
    is_of_wholes = any(_has(term, "!") or _has(term, "binomial") for term in terms)
    return WHOLE_PROBES if is_of_wholes else range(len(SCALES))


def _has(term: Term, what: str) -> bool:
    """Whether something of that kind, or the constant of that name, is in the term."""
    is_it = term.kind == what or (term.kind == "constant" and term.name == what)
    return is_it or any(_has(part, what) for part in term.parts)


def _has_unknown(term: Term) -> bool:
    return term.kind in ("symbol", "applied") or any(map(_has_unknown, term.parts))


def _bits(terms: Sequence[Term]) -> int:
    """Digits in base 2 that tell the values of the terms apart, if anything does.

    Raises:
        NoValue: they are too many.
    """
    size, num_functions = 0, 0
    probes = _probes(*terms)
    for term in terms:
        for probe in probes if _has_unknown(term) else probes[:1]:
            rough = _Evaluation(bits=FIRST_BITS, probe=probe)
            try:
                rough.value(term)
            except NoValue:
                if probes is not WHOLE_PROBES:
                    raise
            size, num_functions = max(size, rough.size), max(num_functions, rough.num_functions)
    size *= len(terms)
    if num_functions and size > MAX_FUNCTION_BITS:
        raise NoValue
    return SPARE_BITS + 4 * size


def _is_close(a: Value, b: Value, bits: int) -> bool:
    return bool(abs(a - b) <= mpmath.ldexp(max(1, abs(a), abs(b)), -bits // 2))


def _is_zero(value: Value, bits: int) -> bool:
    return _is_close(value, mpmath.mpf(0), bits)


def _is_real(value: Value, bits: int) -> bool:
    return _is_zero(value.imag, bits)


class _Evaluation:
    """The value of a term to so many bits, with unknowns as they are at a probe.

    `size` then counts the bits of its numbers and powers, `num_functions` what is no arithmetic.
    """

    def __init__(self, *, bits: int, probe: int) -> None:
        self.size = 0
        self.num_functions = 0
        self._bits, self._probe = bits, probe

    def value(self, term: Term) -> Value:
        """Raises NoValue where there is none."""
        with mpmath.workprec(self._bits):
            try:
                value = self._value(term)
            except (ArithmeticError, ValueError, TypeError) as error:
                raise NoValue from error
        if not mpmath.isfinite(value):
            raise NoValue
        return value

    def _value(self, term: Term) -> Value:
        match term.kind:
            case "number":
                top, bottom = term.number.numerator, term.number.denominator
                self._add_size(top.bit_length() + bottom.bit_length())
                return mpmath.mpf(top) / bottom
            case "constant":
                return {"pi": +mpmath.pi, "e": +mpmath.e, "i": mpmath.mpc(0, 1)}[term.name]
            case "symbol":
                return self._unknown(term.name)
            case "^":
                return self._power(*term.parts)
        values = [self._value(part) for part in term.parts]
        match term.kind:
            case "+":
                return mpmath.fsum(values)
            case "-":
                return -values[0]
            case "*":
                return values[0] * values[1]
            case "degrees":
                return values[0]
        self.num_functions += term.kind not in ("!", "binomial", "abs")
        if term.kind == "applied":
            return mpmath.cos(
                sum(
                    (value * (index + 2) for index, value in enumerate(values)),
                    self._draw(term.name),
                )
            )
        if term.kind in ANGULAR and _has_degrees(term.parts[0]):
            values[0] *= mpmath.pi / 180
        for value in values:
            self._add_size(abs(mpmath.mag(value)) if value else 0)
        return self._function(term.kind, values)

    def _add_size(self, bits: float) -> None:
        if not bits < MAX_BITS:
            raise NoValue
        self.size += int(bits)
        if self.size > MAX_BITS:
            raise NoValue

    def _unknown(self, name: str) -> Value:
        """A number like no other, of the size and the sign that the probe says."""
        drawn = self._draw(name)
        if self._probe in WHOLE_PROBES:
            return mpmath.floor(drawn * MAX_WHOLE)
        scale = SCALES[self._probe]
        if scale:
            return drawn * scale
        sign = self._draw(f"{name} sign")
        return (drawn * 30 if sign > 1 else -drawn) * sign

    def _draw(self, name: str) -> Value:
        """Between 0.2 and 1.2, the same for the same name and probe."""
        digest = hashlib.sha256(f"{self._probe} {name}".encode(errors="replace")).digest()
        drawn = int.from_bytes(digest[: DRAW_BITS // 8])
        return mpmath.mpf(1) / 5 + mpmath.ldexp(drawn, -DRAW_BITS)

    def _power(self, base_term: Term, exponent_term: Term) -> Value:
        base, exponent = self._value(base_term), self._value(exponent_term)
        if not base:
            if not (isinstance(exponent, mpmath.mpf) and exponent > 0):
                raise NoValue
            return base
        self._add_size(abs(exponent) * max(1, abs(mpmath.mag(base))))
        fraction = exponent_term.number if exponent_term.kind == "number" else None
        if self._is_tiny(base) and not (fraction is not None and fraction > 0):
            raise NoValue  # 1 / 0 but for rounding
        if mpmath.isint(exponent):
            return base ** int(exponent.real)
        self.num_functions += 1
        is_negative = isinstance(base, mpmath.mpf) and base < 0
        if is_negative and fraction is not None and fraction.denominator % 2:
            return (-1) ** fraction.numerator * (-base) ** exponent  # the cube root of -8 is -2
        return mpmath.power(base, exponent)

    def _function(self, kind: str, values: list[Value]) -> Value:
        whole = [self._whole(value) for value in values]
        if kind in ("ln", "log") and any(map(self._is_tiny, values)):
            raise NoValue
        match kind:
            case "log":
                return mpmath.log(values[0]) / mpmath.log(values[1] if len(values) > 1 else 10)
            case "exp":
                self._add_size(abs(values[0]) * 2)
                return mpmath.exp(values[0])
            case "!":
                return self._factorial(whole[0])
            case "binomial":
                return self._binomial(*whole)
            case "floor" | "ceiling":
                if whole[0] is not None:
                    return mpmath.mpf(whole[0])
                return mpmath.floor(values[0]) if kind == "floor" else mpmath.ceil(values[0])
            case "gcd" | "lcm":
                return mpmath.mpf(self._of_wholes(kind, whole))
            case "max":
                return max(values)
            case "min":
                return min(values)
        value = FUNCTION[kind](values[0])
        if kind in ANGULAR and self._is_tiny(1 / value if value else 1):
            raise NoValue  # a pole but for rounding
        return value

    def _is_tiny(self, value: Value) -> bool:
        """Whether it is 0 but for rounding, as far as that can be told."""
        if not value:
            return True
        return self._bits > FIRST_BITS and bool(mpmath.mag(value) < -self._bits // 2)

    def _whole(self, value: Value) -> int | None:
        """The whole number that a value is, but for rounding."""
        nearest = mpmath.nint(value.real)
        return int(nearest) if _is_close(value, nearest, self._bits) else None

    def _of_wholes(self, kind: str, whole: list[int | None]) -> int:
        numbers = [number for number in whole if number is not None]
        if len(numbers) < len(whole):
            raise NoValue
        return math.gcd(*numbers) if kind == "gcd" else math.lcm(*numbers)

    def _factorial(self, whole: int | None) -> Value:
        if whole is None or whole < 0:
            raise NoValue
        self._add_size(whole * whole.bit_length())
        return mpmath.mpf(math.factorial(whole))

    def _binomial(self, top: int | None, bottom: int | None) -> Value:
        if top is None or bottom is None or bottom < 0 or top < 0:
            raise NoValue
        self._add_size(max(1, min(bottom, top - bottom)) * top.bit_length())
        return mpmath.mpf(math.comb(top, bottom))


def _has_degrees(term: Term) -> bool:
    return term.kind == "degrees" or any(map(_has_degrees, term.parts))


FUNCTION: dict[str, Callable[[Value], Value]] = {
    "sin": mpmath.sin,
    "cos": mpmath.cos,
    "tan": mpmath.tan,
    "cot": mpmath.cot,
    "sec": mpmath.sec,
    "csc": mpmath.csc,
    "arcsin": mpmath.asin,
    "arccos": mpmath.acos,
    "arctan": mpmath.atan,
    "arccot": mpmath.acot,
    "arcsec": mpmath.asec,
    "arccsc": mpmath.acsc,
    "sinh": mpmath.sinh,
    "cosh": mpmath.cosh,
    "tanh": mpmath.tanh,
    "coth": mpmath.coth,
    "ln": mpmath.log,
    "abs": abs,
}
