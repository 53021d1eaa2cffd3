"""Rows of metrics that hold what was measured of places to fork."""

MEASURED = {"children": 4.0, "token_share_se": 0.1, "best_children": 4.4, "gain": 1.7}
MEASURED |= {"within": 0.9, "before": 40.0, "after": 10.0}
MEASURED |= {"num_prefixes": 240.0, "num_trees": 60.0}


def measured_forks(*shares: float) -> dict[str, float]:
    """With these shares of the tokens, the first at depth 1."""
    return {
        f"fork/{name}_depth_{depth}": value
        for depth, share in enumerate(shares, 1)
        for name, value in (MEASURED | {"token_share": share}).items()
    }
