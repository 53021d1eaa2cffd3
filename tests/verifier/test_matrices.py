"""Matrices: the same cells in the same places, however they are written."""

import pytest

from treerpo_ray.verifier._math.matrices import is_same_matrix

SQUARE = r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}"


def compared(a: str, b: str) -> bool | None:
    return is_same_matrix(a, b, lambda x, y: x == y)


@pytest.mark.parametrize(
    ("other", "is_same"),
    [
        (SQUARE.replace("pmatrix", "bmatrix"), True),
        (r" \begin{array}{cc} 1 & 2 \\[1ex] 3 & 4 \\ \end{array} ", True),
        ("[[1, 2], [3, 4]]", True),
        ("[[1, 2], [4, 3]]", False),
        ("[[1, 2, 3], [4]]", False),
        ("[1, 2, 3, 4]", False),
        (SQUARE.replace("pmatrix", "vmatrix"), False),
        ("1", False),
    ],
)
def test_cells_are_compared_row_by_row_whatever_is_around_them(other: str, is_same: bool) -> None:
    assert compared(SQUARE, other) is compared(other, SQUARE) is is_same


def test_two_lists_are_no_matrices() -> None:
    assert compared("[[1, 2], [3, 4]]", "[[1, 2], [3, 4]]") is None
    assert compared("7", "7") is None


def test_cells_are_the_same_as_whoever_asks_says() -> None:
    seen: list[tuple[str, str]] = []
    assert is_same_matrix(SQUARE, "[[a,b],[c,d]]", lambda x, y: not seen.append((x, y)))
    assert seen == [("1", "a"), ("2", "b"), ("3", "c"), ("4", "d")]
