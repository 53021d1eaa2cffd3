"""Step text: the tokens of a step as pieces of text that can be shown and coloured."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from treerpo_ray.algo.tree import ROOT, Tree
from treerpo_ray.records import TreeRecord

NUM_CONTEXT = 8
"""Tokens before a step that it is decoded with: a character may begin in the step before, and
some tokenizers write the first token of a text without its space."""
NUM_BEGINNING = 24
"""Tokens of a step whose text stands in the drawing."""
MAX_PENDING = 8
"""Tokens after which bytes that are no text are shown as such; a character has four bytes."""
NO_TEXT = "\ufffd"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepText:
    """Text of a step; the lists have an entry a piece, which is a token or, where characters are
    made of several, more."""

    index: int
    text: tuple[str, ...]
    num_tokens: tuple[int, ...]
    logprob: tuple[float, ...]
    """Log-probability (nats) of the piece's tokens when they were sampled: their sum."""
    learner_logprob: tuple[float, ...]
    """The same under the learner before it was trained on them; NaN where it was not, or it is
    not stored."""
    version: tuple[int, ...]
    """Version of the weights that sampled its last token."""
    answer: str | None
    """Instead of pieces, where the tokenizer is not at hand: the whole answer of the first leaf
    at or below the step."""


def step_text(tokenizer: Tokenizer | None, record: TreeRecord, index: int) -> StepText:
    """Text of one step.

    Raises:
        ValueError: the tree has no such step.
    """
    tree = record.tree
    if not 0 <= index < len(tree):
        raise ValueError(f"step {index}: the tree of ticket {record.ticket} has {len(tree)} steps")
    step = tree.steps[index]
    pieces: list[tuple[str, int]] = []
    if tokenizer is not None:
        above = int(tree.parents[index])
        before = tree.prompt_ids.tolist() + (tree.path_token_ids(above) if above != ROOT else [])
        pieces = decoded(tokenizer, before[-NUM_CONTEXT:], step.token_ids.tolist())
    learned = np.full(len(step.token_ids), np.nan, np.float32)
    if record.training is not None:
        first = int(tree.starts[index])
        learned = record.training.logprobs[first : first + len(step.token_ids)]
    logprobs, of_learner, versions, place = [], [], [], 0
    for _, count in pieces:
        logprobs.append(float(step.logprobs[place : place + count].sum()))
        of_learner.append(float(learned[place : place + count].sum()))
        versions.append(int(step.versions[place + count - 1]))
        place += count
    return StepText(
        index=index,
        text=tuple(text for text, _ in pieces),
        num_tokens=tuple(count for _, count in pieces),
        logprob=tuple(logprobs),
        learner_logprob=tuple(of_learner),
        version=tuple(versions),
        answer=None if tokenizer is not None else first_answer(record, index),
    )


def decoded(
    tokenizer: Tokenizer, context: Sequence[int], token_ids: Sequence[int]
) -> list[tuple[str, int]]:
    """Text of tokens in pieces, each with its number of tokens; special tokens are shown.

    A token that ends within a character is in one piece with those that complete it.
    """
    stream = DecodeStream(ids=list(context), skip_special_tokens=False)
    pieces: list[tuple[str, int]] = []
    pending = 0
    for place, token_id in enumerate(token_ids):
        pending += 1
        try:
            text = stream.step(tokenizer, token_id)
        except Exception as error:  # the library's own for bytes that it cannot follow
            if "Invalid prefix" not in str(error):
                raise
            text = None
        if text is None and pending >= MAX_PENDING:
            text = tokenizer.decode(token_ids[place + 1 - pending : place + 1])
            stream = DecodeStream(skip_special_tokens=False)
        if text is not None:
            pieces.append((text, pending))
            pending = 0
    return pieces if not pending else [*pieces, (NO_TEXT, pending)]


def beginnings(tokenizer: Tokenizer | None, record: TreeRecord) -> list[str]:
    """How the text of each step begins; empty where it cannot be told."""
    tree = record.tree
    if tokenizer is None:
        leaves = dict(zip(tree.leaves, record.leaf_texts, strict=True))
        is_whole = {leaf for leaf in leaves if tree.parents[leaf] == ROOT}
        return [leaves[index] if index in is_whole else "" for index in range(len(tree))]
    first = [step.token_ids[:NUM_BEGINNING].tolist() for step in tree.steps]
    return tokenizer.decode_batch(first, skip_special_tokens=True)


def holding(tokenizer: Tokenizer | None, record: TreeRecord, text: str) -> list[int]:
    """Steps whose own text holds `text`, in whatever case; without a tokenizer leaves whose answer
    does."""
    wanted, tree = text.casefold(), record.tree
    if tokenizer is None:
        answers = zip(tree.leaves, record.leaf_texts, strict=True)
        return [leaf for leaf, answer in answers if wanted in answer.casefold()]
    texts = tokenizer.decode_batch([step.token_ids.tolist() for step in tree.steps])
    return [index for index, own in enumerate(texts) if wanted in own.casefold()]


def first_answer(record: TreeRecord, index: int) -> str:
    """The whole answer of the first leaf at or below a step."""
    tree = record.tree
    leaf = first_leaf(tree, index)
    return record.leaf_texts[tree.leaves.index(leaf)]


def first_leaf(tree: Tree, index: int) -> int:
    """The first leaf at or below a step."""
    while index in tree.children:
        index = tree.children[index][0]
    return index
