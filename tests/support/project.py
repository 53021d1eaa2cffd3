"""The project as its tests see it: where it is, and its smallest run."""

import importlib.util
from pathlib import Path
from types import ModuleType

PROJECT = Path(__file__).resolve().parents[2]
SMALL = [
    str(PROJECT / "conf/quickstart.yaml"),
    "prompts.num_problems=64",
    "evaluate.data.num_problems=12",
    "evaluate.num_samples=2",
    "gate.trees_per_step=6",
    "engine.kv_cache_gib=0.125",
    "metrics.wandb_project=null",
    "checkpoint.every=2",
    "engine.max_num_seqs=64",  # a batch asks for more at a time
    "sync.chunk_mib=1",  # so that the weights are several
]
"""The quickstart, small enough for a test."""


def load_script(path: str) -> ModuleType:
    """A script of the project, such as `jobs/train.py`, as a module of its own."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, PROJECT / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
