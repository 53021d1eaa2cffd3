r"""Math matrices: rows of cells, in an environment of LaTeX or as a list of lists.

\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix} and [[1, 2], [3, 4]] are the same matrix, and its
determinant (vmatrix) is another thing.
"""

import re

from treerpo_ray.verifier._math.claims import IsSame
from treerpo_ray.verifier._math.notation import closing, split

MATRIX = re.compile(r"\\begin\{([a-z]+)\}(.*)\\end\{\1\}", re.DOTALL)
SEPARATOR = re.compile("[,;]")


def is_same_matrix(a: str, b: str, is_same: IsSame) -> bool | None:
    """Compare matrices cell by cell; None if neither text is one."""
    if not any(MATRIX.fullmatch(text.strip()) for text in (a, b)):
        return None
    matrix_a, matrix_b = map(_cells, (a, b))
    if matrix_a is None or matrix_b is None:
        return False
    (kind_a, rows_a), (kind_b, rows_b) = matrix_a, matrix_b
    return (
        kind_a == kind_b
        and [len(row) for row in rows_a] == [len(row) for row in rows_b]
        and all(
            is_same(x.strip(), y.strip())
            for p, q in zip(rows_a, rows_b, strict=True)
            for x, y in zip(p, q, strict=True)
        )
    )


def _cells(text: str) -> tuple[bool, list[list[str]]] | None:
    """Whether a matrix is the determinant of one, and its rows; None: it is no matrix."""
    if found := MATRIX.fullmatch(text.strip()):
        kind, body = found.groups()
        lines = re.split(r"\\\\(?:\[\w+\])?", re.sub(r"^\{[clr|]*\}", "", body.strip()))
        return kind.lower() == "vmatrix", [line.split("&") for line in lines if line.strip()]
    rows = [_listed(row) for row in _listed(text)]
    return (False, rows) if rows and all(rows) else None


def _listed(text: str) -> list[str]:
    """What stands in square brackets, between commas; nothing if there are none around all."""
    text = text.strip()
    if text[:1] != "[" or closing(text, 0) != len(text) - 1 or text[-1] != "]":
        return []
    return split(text[1:-1], SEPARATOR)[::2]
