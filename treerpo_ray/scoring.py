"""Scoring: leaves get their texts and grades; a verifier that fails too often ends the run."""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

import numpy as np

from treerpo_ray.algo.tree import StopReason
from treerpo_ray.config.verifier import VerifierConfig
from treerpo_ray.records import TreeRecord
from treerpo_ray.verifier.verdict import Answer, Grade, Verdict, weighted
from treerpo_ray.verifier.verifier import Verifier

if TYPE_CHECKING:  # Ray's own actors of a data set import this, too
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

WINDOW = 1000
"""Answers, the newest ones, over which the share is taken."""
MIN_ANSWERS = 200
"""Least number that errors are held against, so that a few at the start do not end a run."""
NUM_EXAMPLES = 3
SHOWN_CHARS = 200


class VerifierFailing(RuntimeError):
    """Too many answers got no verdict."""


class ErrorShare:
    """Counts answers without a verdict; `max_share` of the newest may be such."""

    def __init__(self, *, max_share: float) -> None:
        self.max_share = max_share
        self._has_failed: deque[bool] = deque(maxlen=WINDOW)
        self._examples: deque[str] = deque(maxlen=NUM_EXAMPLES)
        self.fault = ""
        """What a check raised last, on one line."""

    def add(self, question: str, answer: Answer, verdict: Verdict) -> None:
        """Count one answer.

        Raises:
            VerifierFailing: there are more errors than allowed; with examples.
        """
        self._has_failed.append(not verdict.is_reward)
        if verdict.is_reward:
            return
        self._examples.append(
            f"{verdict.value}: answer {_shown(answer.text)} to question {_shown(question)} with "
            f"reference {_shown(', '.join(answer.references))}"
        )
        num, num_failed = len(self._has_failed), sum(self._has_failed)
        if num_failed > self.max_share * max(num, MIN_ANSWERS):
            raise VerifierFailing(
                f"the verifier failed on {num_failed} of the last {num} answers "
                f"({num_failed / num:.0%}), more than verifier.max_error_share="
                f"{self.max_share:g} allows; "
                + (f"a check raised {_shown(self.fault)}; " if self.fault else "")
                + "; ".join(self._examples)
            )


def _shown(text: str) -> str:
    """The end of a text, where an answer stands, as any terminal can print it."""
    return ascii(text if len(text) <= SHOWN_CHARS else f"...{text[-SHOWN_CHARS:]}")


def make_verifiers(
    settings: VerifierConfig,
    *,
    num_workers: int | None = None,
    on_start: Callable[[int], None] = lambda pid: None,
    on_fault: Callable[[str], None] = log.warning,
) -> Iterator[Verifier]:
    """A verifier for each check, the main one first; `num_workers` other than the settings say."""
    for check in settings.weights:
        yield Verifier(
            check=check,
            num_workers=num_workers or settings.num_workers,
            timeout_s=settings.timeout_s,
            memory_mib=settings.memory_mib,
            sources=settings.sources,
            retries=settings.retries,
            concurrency=settings.concurrency,
            env=settings.env,
            on_start=on_start,
            on_fault=on_fault,
        )


class StartScorer(Protocol):
    """As `Scorer` itself, whose arguments these are."""

    def __call__(
        self,
        *,
        settings: VerifierConfig,
        tokenizer: "PreTrainedTokenizerBase",
        on_fault: Callable[[str], None] = ...,
    ) -> "Scorer": ...


class Scorer:
    """Gives every leaf of a tree its text and its grade.

    Args:
        settings: Its checks and their processes.
        tokenizer: The policy's.
        on_start: Told the process id of each process that grades.
        on_fault: Told, once for each place in a check, why an answer has no verdict.

    Raises:
        UserCodeError: a check cannot be used, or fails its own test.
    """

    def __init__(
        self,
        *,
        settings: VerifierConfig,
        tokenizer: "PreTrainedTokenizerBase",
        on_start: Callable[[int], None] = lambda pid: None,
        on_fault: Callable[[str], None] = log.warning,
    ) -> None:
        self.tokenizer = tokenizer
        self.weights = tuple(settings.weights.values())
        self.error_share = ErrorShare(max_share=settings.max_error_share)

        def tell(reason: str) -> None:
            self.error_share.fault = reason.strip().rpartition("\n")[2]
            on_fault(reason)

        self._ending = ExitStack()
        with self._ending:  # what was started ends where another fails
            self.verifiers = [
                self._ending.enter_context(each)
                for each in make_verifiers(settings, on_start=on_start, on_fault=tell)
            ]
            for verifier in self.verifiers:
                verifier.self_test()
            self._ending = self._ending.pop_all()

    def score(self, records: list[TreeRecord]) -> list[TreeRecord]:
        """The same trees with texts and verdicts; all leaves are graded in one go.

        Raises:
            VerifierFailing: more answers than `verifier.max_error_share` got no verdict.
        """
        texts = [self._leaf_texts(record) for record in records]
        answers = [
            Answer(
                text=text,
                references=record.answers,
                is_cut_off=record.tree.steps[leaf].stop is StopReason.BOUNDARY,
                question=record.question,
                row=record.row,
            )
            for record, leaf_texts in zip(records, texts, strict=True)
            for leaf, text in zip(record.tree.leaves, leaf_texts, strict=True)
        ]
        graded = self.grade(answers)
        for answer, grade in zip(answers, graded, strict=True):
            self.error_share.add(answer.question, answer, grade.verdict)
        grades, now = iter(graded), time.time()
        return [
            replace(record, leaf_texts=leaf_texts, scored_at_s=now, row="{}").graded(
                [self._grade(record, leaf, next(grades)) for leaf in record.tree.leaves]
            )
            for record, leaf_texts in zip(records, texts, strict=True)
        ]

    def grade(self, answers: list[Answer]) -> list[Grade]:
        """Grades by all checks together, by their weights."""
        found = [verifier.grade(answers) for verifier in self.verifiers]
        if len(found) == 1:
            return found[0]
        return [weighted(grades, self.weights) for grades in zip(*found, strict=True)]

    def group(self, records: list[TreeRecord]) -> list[list[int] | None]:
        """Which leaves of each scored tree have equal answers; see `Verifier.group`."""
        return self.verifiers[0].group(
            [
                [
                    Answer(
                        text=text,
                        references=(),
                        is_cut_off=record.tree.steps[leaf].stop is StopReason.BOUNDARY,
                    )
                    for leaf, text in zip(record.tree.leaves, record.leaf_texts, strict=True)
                ]
                for record in records
            ]
        )

    def _leaf_texts(self, record: TreeRecord) -> tuple[str, ...]:
        tree = record.tree
        ids = [tree.path_token_ids(leaf) for leaf in tree.leaves]
        return tuple(self.tokenizer.batch_decode(ids, skip_special_tokens=True))

    @staticmethod
    def _grade(record: TreeRecord, leaf: int, grade: Grade) -> Grade:
        """An answer that the engine broke off has no grade of its own."""
        is_error = record.tree.steps[leaf].stop is StopReason.ERROR
        return Grade.without_reward(Verdict.ERRORED) if is_error else grade

    def close(self) -> None:
        """End the verifiers' processes."""
        self._ending.close()


def with_noise(tree: TreeRecord, verifier: VerifierConfig, seed: int) -> TreeRecord:
    """The tree as a verifier with the configured error rates would have scored it."""
    if not verifier.false_positive_rate and not verifier.false_negative_rate:
        return tree
    return add_noise(
        tree,
        false_positive_rate=verifier.false_positive_rate,
        false_negative_rate=verifier.false_negative_rate,
        seed=seed,
    )


def add_noise(
    record: TreeRecord, *, false_positive_rate: float, false_negative_rate: float, seed: int
) -> TreeRecord:
    """The tree with verdicts turned over, each leaf by its own draw.

    A reward of 0 becomes correct with probability `false_positive_rate`, one of 1 becomes wrong
    with `false_negative_rate`; partial credit and what errored stay. The same seed, ticket and
    number of redraws draw the same.
    """
    rng = np.random.default_rng((seed, record.ticket, record.num_redraws))
    draws = rng.random(len(record.verdicts))

    def noisy(grade: Grade, draw: float) -> Grade:
        if grade.reward == 1:
            return Grade(Verdict.WRONG, 0.0) if draw < false_negative_rate else grade
        is_turned = grade.reward == 0 and draw < false_positive_rate
        return Grade(Verdict.CORRECT, 1.0) if is_turned else grade

    rewards = record.rewards[list(record.tree.leaves)].tolist()
    return record.graded(list(map(noisy, map(Grade, record.verdicts, rewards), draws)))
