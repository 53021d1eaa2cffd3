"""Stop strings: texts that end an answer wherever in it they are completed.

vLLM sees one request, which here is one step: it ends the step at the token that completes a stop
string begun within it. One that begins in the steps before is found here, and what was sampled
behind its end is discarded. Either way the answer ends at a token that is told by the tokens up to
it, so that those that stay have the distribution and the log-probabilities that they were sampled
with: the token that completes a stop string is the last one, is kept and trained, and the step is
a leaf, as behind an end token.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

from treerpo_ray.algo.tree import Step, StopReason

TOKENS_A_CHARACTER = 4
"""Most tokens of one character: its bytes."""


def end_across_steps(
    step: Step, answer: Sequence[int], stop: Sequence[str], decode: Callable[[list[int]], str]
) -> Step:
    """`step`, ended behind a stop string that begins in the answer before it.

    Args:
        step: One that was sampled after `answer`.
        answer: Tokens of the answer up to the step; no stop string is in them.
        stop: The stop strings.
        decode: Text of tokens, special ones included.

    Returns:
        The step as it is where it completes no such stop string. An error stays one.
    """
    if not stop or not answer or step.stop is StopReason.ERROR:
        return step
    reach = TOKENS_A_CHARACTER * max(map(len, stop))
    before, own = list(answer[-reach:]), step.token_ids[:reach].tolist()
    if not _has(decode([*before, *own]), stop):
        return step
    end = next(n for n in range(1, len(own) + 1) if _has(decode([*before, *own[:n]]), stop))
    return replace(
        step,
        token_ids=step.token_ids[:end],
        logprobs=step.logprobs[:end],
        versions=step.versions[:end],
        stop=StopReason.END_OF_TEXT,
        num_discarded=step.num_discarded + len(step.token_ids) - end,
    )


def _has(text: str, stop: Sequence[str]) -> bool:
    return any(each in text for each in stop)
