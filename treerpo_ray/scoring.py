"""Scoring: leaves get their texts and verdicts; a verifier that fails too often ends the run."""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from treerpo_ray.algo.tree import StopReason
from treerpo_ray.config.sections import VerifierConfig
from treerpo_ray.records import TreeRecord
from treerpo_ray.verifier.verdict import Answer, Verdict
from treerpo_ray.verifier.verifier import Verifier

if TYPE_CHECKING:  # Ray's own actors of a data set import this, too
    from transformers import PreTrainedTokenizerBase


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

    def __init__(self, max_share: float) -> None:
        self.max_share = max_share
        self._has_failed: deque[bool] = deque(maxlen=WINDOW)
        self._examples: deque[str] = deque(maxlen=NUM_EXAMPLES)

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
                f"{self.max_share:g} allows; " + "; ".join(self._examples)
            )


def _shown(text: str) -> str:
    """The end of a text, where an answer stands, as any terminal can print it."""
    return ascii(text if len(text) <= SHOWN_CHARS else f"...{text[-SHOWN_CHARS:]}")


class Scorer:
    """Gives every leaf of a tree its text and its verdict."""

    def __init__(
        self,
        settings: VerifierConfig,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        on_start: Callable[[int], None] = lambda pid: None,
    ) -> None:
        self.tokenizer = tokenizer
        self.verifier = Verifier(
            check=settings.check,
            num_workers=settings.num_workers,
            timeout_s=settings.timeout_s,
            memory_mib=settings.memory_mib,
            on_start=on_start,
        )
        self.verifier.self_test()
        self.error_share = ErrorShare(settings.max_error_share)

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
            )
            for record, leaf_texts in zip(records, texts, strict=True)
            for leaf, text in zip(record.tree.leaves, leaf_texts, strict=True)
        ]
        graded = self.verifier.grade(answers)
        questions = [record.question for record in records for _ in record.tree.leaves]
        for question, answer, verdict in zip(questions, answers, graded, strict=True):
            self.error_share.add(question, answer, verdict)
        verdicts = iter(graded)
        now = time.time()
        return [
            replace(
                record,
                leaf_texts=leaf_texts,
                verdicts=tuple(
                    self._verdict(record, leaf, next(verdicts)) for leaf in record.tree.leaves
                ),
                scored_at_s=now,
            )
            for record, leaf_texts in zip(records, texts, strict=True)
        ]

    def group(self, records: list[TreeRecord]) -> list[list[int] | None]:
        """Which leaves of each scored tree have equal answers; see `Verifier.group`."""
        return self.verifier.group(
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
    def _verdict(record: TreeRecord, leaf: int, verdict: Verdict) -> Verdict:
        """An answer that the engine broke off has no verdict of its own."""
        is_error = record.tree.steps[leaf].stop is StopReason.ERROR
        return Verdict.ERRORED if is_error else verdict

    def close(self) -> None:
        """End the verifier's processes."""
        self.verifier.close()


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
    with `false_negative_rate`; what errored stays. The same seed, ticket and number of redraws
    draw the same.
    """
    rng = np.random.default_rng((seed, record.ticket, record.num_redraws))
    draws = rng.random(len(record.verdicts))

    def noisy(verdict: Verdict, draw: float) -> Verdict:
        if verdict is Verdict.CORRECT:
            return Verdict.WRONG if draw < false_negative_rate else verdict
        return Verdict.CORRECT if verdict.is_reward and draw < false_positive_rate else verdict

    verdicts = map(noisy, record.verdicts, draws)
    return replace(record, verdicts=tuple(verdicts))
