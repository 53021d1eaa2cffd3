"""Tables: what a comparison's report says, for a terminal."""

import sys

import numpy as np
import rich.console
import rich.table

from treerpo_ray.study.comparisons.pairs import Pair
from treerpo_ray.study.comparisons.report import Report


def print_table(table: Report) -> None:
    """Print the table to stdout: Pass@1, then tokens to the best flat arm's level, then pairs."""
    console = rich.console.Console(file=sys.stdout, width=None if sys.stdout.isatty() else 160)
    console.print(_scores(table))
    if table.best_flat:
        console.print(_tokens(table))
        console.print(_levels_in_words(table), highlight=False)
    console.print(_pairs_in_words(table.pairs), highlight=False)


def _scores(table: Report) -> rich.table.Table:
    shown = rich.table.Table(title=f"Pass@1 in % ({table.sampling}), mean over seeds [95 %]")
    for title in (
        "setting",
        "arm",
        "seeds",
        "steps",
        "tokens",
        "Pass@1",
        *(f"ahead of {name}" for name in table.references),
        "same steps",
        "length",
    ):
        shown.add_column(title, justify="left" if title in ("setting", "arm") else "right")
    for line in table.lines:
        shown.add_row(
            line.setting,
            line.arm,
            str(line.num_seeds),
            f"{line.num_steps:.0f}",
            f"{line.sampled_tokens / 1000:.0f} k",
            str(line.pass_at_1),
            *(str(line.ahead.get(name, "")) for name in table.references),
            str(line.same_steps),
            f"{line.length.mean:.1f}",
        )
    return shown


def _tokens(table: Report) -> rich.table.Table:
    shown = rich.table.Table(title="Sampled tokens to the best flat arm's level, over that arm's")
    for title in ("setting", "arm", "answers"):
        shown.add_column(title)
    samples = "/".join(str(number) for number in table.num_samples)
    for title in (f"pass@{samples}", "get there", "after", "ratio"):
        shown.add_column(title, justify="right")
    for line in table.lines:
        needed = line.token_ratio
        row = [line.setting, line.arm, "flat" if line.is_flat else "tree", str(line.pass_at_k)]
        if needed is not None:
            there = [tokens for tokens in needed.tokens if tokens is not None]
            after = f"{np.mean(there) / 1000:.0f} k" if there else ""
            row += [f"{len(there)} of {line.num_seeds}", after, str(needed)]
        shown.add_row(*row)
    return shown


def _levels_in_words(table: Report) -> str:
    levels = {
        line.setting: f"{line.token_ratio.flat}, {line.token_ratio.level:.1f} %"
        for line in table.lines
        if line.token_ratio is not None
    }
    best = "; ".join(f"{setting}: {level}" for setting, level in levels.items())
    return (
        f"Best flat arm, and its training reward over its last tokens: {best}. It is chosen by "
        "these very results, which favours it. >: not all runs get there, a lower bound."
    )


def _pairs_in_words(found: list[Pair]) -> str:
    num_tested = sum(not np.isnan(pair.p) for pair in found)
    words = f"{len(found)} pairs of arms, of which Pass@1 of {num_tested} can be tested"
    if not num_tested:
        return f"{words}: it takes two seeds."
    num_settings = len({pair.setting for pair in found})
    behind: dict[str, list[str]] = {}
    for pair in found:
        if pair.is_told_apart:
            name = pair.arm if num_settings == 1 else f"{pair.arm} ({pair.setting})"
            behind.setdefault(name, []).append(pair.other)
    count = sum(map(len, behind.values()))
    words += f" (Welch). {count} are told apart at 5 % after Holm's correction for all"
    return "\n  ".join(
        [f"{words}.", *(f"{arm} is ahead of {', '.join(own)}" for arm, own in behind.items())]
    )
