"""Duplicates: siblings that were sampled alike. All but one of them are tokens spent twice."""

from treerpo_ray.algo.tree import StopReason, Tree


def count_duplicates(tree: Tree) -> tuple[int, int]:
    """Steps that have the very tokens of an earlier sibling, and steps that have an earlier one.

    A step that a sampler turned down is nobody's sibling here.
    """
    tokens, size = tree.token_ids.tobytes(), tree.token_ids.itemsize
    starts, ends = size * tree.starts, size * (tree.starts + tree.lengths)
    steps = zip(tree.parents.tolist(), starts.tolist(), ends.tolist(), tree.stops, strict=True)
    sampled = [
        (parent, tokens[start:end])
        for parent, start, end, stop in steps
        if stop is not StopReason.ERROR
    ]
    num_first = len({parent for parent, _ in sampled})
    return len(sampled) - len(set(sampled)), len(sampled) - num_first
