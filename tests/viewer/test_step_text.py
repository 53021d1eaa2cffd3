"""Texts of steps, token by token."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from tests.support.learning.records import some_training
from tests.support.saved_runs.paper_run import SCRIPT, paper_record
from tests.support.saved_runs.small_run import (
    TOKENIZER,
    save_trees,
    worked_record,
    write_small_run,
)
from treerpo_ray.viewer.reader import RunReader
from treerpo_ray.viewer.step_text import decoded
from treerpo_ray.viewer.wire import to_json


def test_pieces_of_a_step_are_its_text_whatever_its_tokens_are(paper):
    tokenizer = Tokenizer.from_file(str(TOKENIZER))
    reader, record = RunReader(paper), paper_record(0)
    texts = reader.texts("12:0", list(range(80)))
    for text in texts:
        step = record.tree.steps[text.index]
        assert sum(text.num_tokens) == len(step.token_ids)
        assert sum(text.logprob) == pytest.approx(float(step.logprobs.sum()), rel=1e-4)
    whole = "".join("".join(texts[step].text) for step in record.tree.path(8))
    assert whole == tokenizer.decode(record.tree.path_token_ids(8), skip_special_tokens=False)
    assert SCRIPT in "".join("".join(text.text) for text in texts)
    rng = np.random.default_rng(0)
    for _ in range(50):  # bytes that are no text
        token_ids = rng.integers(0, tokenizer.get_vocab_size(), 40).tolist()
        pieces = decoded(tokenizer, token_ids[:3], token_ids)
        assert sum(count for _, count in pieces) == 40
    assert decoded(tokenizer, [], tokenizer.encode("é").ids) == [("é", 2)]
    assert decoded(tokenizer, [], tokenizer.encode("é").ids[:1]) == [("\ufffd", 1)]


def test_without_a_tokenizer_a_step_has_the_answer_of_its_first_leaf(tmp_path):
    folder = write_small_run(tmp_path)
    save_trees(folder, 20, [worked_record(5)])
    config = Path(folder, "config.yaml")
    config.write_text(config.read_text().replace("quickstart/model", "somewhere/else"))
    reader = RunReader(folder)
    assert not reader.tree("20:5").has_texts
    assert [text.answer for text in reader.texts("20:5", [0, 2])] == ["#### 2", "#### 3"]
    assert reader.holding("20:5", "#### 3") == [2]
    model = Path(folder, "checkpoints/step=000012/model")  # of a run that goes on
    model.mkdir(parents=True)
    (model / "tokenizer.json").write_text(TOKENIZER.read_text())
    assert reader.tree("20:5").has_texts and reader.texts("20:5", [0])[0].text == tuple("1+1=")


def test_tokens_tell_the_ratio_of_learner_to_engine_where_they_were_trained_on(tmp_path):
    folder, record = write_small_run(tmp_path), worked_record(5)
    made = some_training(record.tree)  # of the odd steps: log-probabilities 1/4 below the engine's
    save_trees(folder, 20, [replace(record, training=made)])
    reader = RunReader(folder)
    tree = json.loads(to_json(reader.tree("20:5")))
    assert tree["mean_log_ratio"] == [None, -0.25] * 3 and tree["largest_log_ratio"] == 0.25
    assert tree["advantage"] == [None, 1, None, 3, None, 5]  # the learner's own
    first, second = reader.texts("20:5", [0, 1])
    assert np.isnan(first.learner_logprob).all() and len(first.learner_logprob) == len(first.text)
    assert second.learner_logprob == pytest.approx([logprob - 0.25 for logprob in second.logprob])
    assert tree["groups"] == {"kept": 3, "pruned": 0, "errored": 0}
    (line,) = reader.trees(20)
    assert line.groups == tree["groups"]
    save_trees(folder, 21, [record])
    before = json.loads(to_json(reader.tree("21:5")))
    assert before["mean_log_ratio"] == [None] * 6 and before["largest_log_ratio"] is None
