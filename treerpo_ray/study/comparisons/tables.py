"""Tables: what a comparison's report says, for a terminal."""

import sys
from collections.abc import Iterable

import rich.console
import rich.table

from treerpo_ray.study.comparisons.intervals import ratio_text
from treerpo_ray.study.comparisons.pairs import Pair
from treerpo_ray.study.comparisons.report import Report

ALIKE = 1.02
"""Answers of arms that differ by no more than this have a fixed form."""


def print_table(table: Report) -> None:
    """Print to stdout: Pass@1, who is ahead of the references, tokens to the best flat arm's level,
    and which arms are told apart."""
    console = rich.console.Console(file=sys.stdout, width=None if sys.stdout.isatty() else 160)
    console.print(_scores(table))
    if table.references:
        console.print(_ahead(table))
    if table.best_flat:
        console.print(_tokens(table))
        console.print(_levels_in_words(table), highlight=False)
    if _has_lengths(table):
        console.print(_lengths(table))
        console.print(_halfway_in_words(table), highlight=False)
    console.print(_pairs_in_words(table.pairs), highlight=False)


def _empty(title: str, *numbers: str) -> rich.table.Table:
    """A table whose rows are arms; narrow terminals break numbers, and cut nothing off."""
    shown = rich.table.Table(title=title)
    for name in ("setting", "arm"):
        shown.add_column(name, no_wrap=True, overflow="fold")
    for name in numbers:
        shown.add_column(name, justify="right", overflow="fold")
    return shown


def _scores(table: Report) -> rich.table.Table:
    title = f"Pass@1 in % ({table.sampling}), mean over seeds [95 %]"
    shown = _empty(title, "seeds", "steps", "tokens", "Pass@1", "same steps", "length")
    for line in table.lines:
        shown.add_row(
            line.setting,
            line.arm,
            str(line.num_seeds),
            f"{line.num_steps:.0f}",
            f"{line.sampled_tokens / 1000:.0f} k",
            str(line.pass_at_1),
            str(line.same_steps),
            f"{line.length.mean:.1f}",
        )
    return shown


def _ahead(table: Report) -> rich.table.Table:
    shown = _empty("Points of Pass@1 ahead of each reference [95 %]", *table.references)
    for line in table.lines:
        ahead = (str(line.ahead.get(name, "")) for name in table.references)
        shown.add_row(line.setting, line.arm, *ahead)
    return shown


def _tokens(table: Report) -> rich.table.Table:
    passed = [f"pass@{'/'.join(map(str, table.num_samples))}"] if table.num_samples != [1] else []
    title = "Sampled tokens to the best flat arm's level, over that arm's"
    shown = _empty(title, "trees", *passed, "tokens", "ratio")
    for line in table.lines:
        needed = line.token_ratio
        row = [line.setting, line.arm, "flat" if line.is_flat else "tree"]
        row += [str(line.pass_at_k)] if passed else []
        if needed is not None:
            tokens = "" if needed.tokens is None else f"{needed.tokens / 1000:.0f} k"
            row += [tokens, str(needed)]
        shown.add_row(*row)
    return shown


def _has_lengths(table: Report) -> bool:
    """Whether answers differ in length: in many tasks they have a fixed form."""
    tokens = [line.halfway.tokens.mean for line in table.lines if line.halfway is not None]
    return bool(tokens) and max(tokens) > ALIKE * min(tokens)


def _lengths(table: Report) -> rich.table.Table:
    title = "Tokens of an answer half-way, and over those of each reference [95 %]"
    shown = _empty(title, "half-way", *table.references)
    for line in table.lines:
        if line.halfway is not None:
            over = (line.halfway.over.get(name) for name in table.references)
            ratios = ("" if each is None else ratio_text(each) for each in over)
            shown.add_row(line.setting, line.arm, str(line.halfway.tokens), *ratios)
    return shown


def _halfway_in_words(table: Report) -> str:
    places = _by_setting(
        (line.setting, f"{line.halfway.level:.1f} %")
        for line in table.lines
        if line.halfway is not None
    )
    return (
        "Half-way: where the training reward is first in the middle between the first and the last "
        f"tenth of the best flat arm's ({places})."
    )


def _levels_in_words(table: Report) -> str:
    best = _by_setting(
        (line.setting, f"{line.token_ratio.flat}, {line.token_ratio.level:.1f} %")
        for line in table.lines
        if line.token_ratio is not None
    )
    return (
        f"Best flat arm, and the level, nine tenths of its last training reward: {best}. It is "
        "chosen by these very results, which favours it. >: the arm does not get there, a lower "
        "bound."
    )


def _by_setting(told: Iterable[tuple[str, str]]) -> str:
    """What all arms of a setting have in common, once for each setting."""
    return "; ".join(f"{setting}: {words}" for setting, words in dict(told).items())


def _pairs_in_words(found: list[Pair]) -> str:
    if not found:
        return "No pair of arms can be tested: it takes two seeds of each."
    num_settings = len({pair.setting for pair in found})
    behind: dict[str, list[str]] = {}
    for pair in found:
        if pair.is_told_apart:
            name = pair.arm if num_settings == 1 else f"{pair.arm} ({pair.setting})"
            behind.setdefault(name, []).append(pair.other)
    words = (
        f"Pass@1 was tested for all {len(found)} pairs of arms with two seeds or more (Welch); at "
        f"5 % after Holm's correction {sum(map(len, behind.values()))} of them differ."
    )
    ahead = (f"{arm} is ahead of {', '.join(own)}" for arm, own in behind.items())
    return "\n  ".join([words, *ahead])
