"""Error share: ends a run whose verifier fails on too many answers, and shows on which."""

from collections import deque

from treerpo_ray.verifier import Answer, Verdict

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
