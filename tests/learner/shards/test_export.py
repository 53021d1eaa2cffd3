"""Weights as files that transformers reads."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.support.learning.tiny_models import save_tiny_model
from treerpo_ray.learner.shards.export import write_weights


@pytest.mark.parametrize(("architecture", "file_bytes"), [("llama", 2**16), ("qwen2", 2**30)])
def test_weights_in_one_file_or_several_are_those_of_the_model(
    architecture: str, file_bytes: int, tmp_path: Path
) -> None:
    path = save_tiny_model(tmp_path / "model", architecture)
    model = AutoModelForCausalLM.from_pretrained(path)
    folder = tmp_path / "export"
    model.save_pretrained(folder, state_dict={})
    write_weights(folder, model.named_parameters(), file_bytes)
    files = list(folder.glob("*.safetensors"))
    largest = max(weight.nbytes for weight in model.parameters())
    assert (len(files) > 1) == (file_bytes < 2**30)
    assert all(file.stat().st_size < max(file_bytes, largest) + 4096 for file in files)
    found = AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(
        dict(found.named_parameters()), dict(model.named_parameters()), atol=0, rtol=0
    )
