"""Duplicates: siblings that were sampled alike. All but one of them are tokens spent twice."""

from treerpo_ray.algo.tree import StopReason, Tree


def count_duplicates(tree: Tree) -> tuple[int, int]:
    """Steps that have the very tokens of an earlier sibling, and steps that have an earlier one.

    A step that a sampler turned down is nobody's sibling here.
    """
    ends = tree.starts + tree.lengths
    num_alike = num_later = 0
    for siblings in tree.siblings:
        for children in siblings.children.tolist():
            sampled = [
                tree.token_ids[tree.starts[child] : ends[child]].tobytes()
                for child in children
                if tree.stops[child] is not StopReason.ERROR
            ]
            num_alike += len(sampled) - len(set(sampled))
            num_later += max(len(sampled) - 1, 0)
    return num_alike, num_later
