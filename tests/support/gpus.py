"""Whether tests can use a GPU here, and whether they must."""

import torch
from _pytest.mark.expression import Expression

from treerpo_ray.config import load
from treerpo_ray.preflight.machine import check_gpus, check_vllm


def gpu_fault() -> str | None:
    """Why no test can use a GPU here; None if one can."""
    if torch.version.cuda is None:
        return f"needs a GPU: torch {torch.__version__} is built for CPUs"
    if not torch.cuda.is_available():
        return f"needs a GPU: torch {torch.__version__} finds none that it can use"
    try:
        for check in (check_vllm, check_gpus):
            check(load(["engine.resources={GPU: 1}"]))
    except ValueError as error:
        return f"needs a GPU: {error}"
    return None


def asks_for_gpus(marks: str) -> bool:
    """Whether a `-m` expression chooses tests for their mark `gpu`."""
    if not marks:
        return False
    chosen = Expression.compile(marks)
    return chosen.evaluate(lambda name, **_: name == "gpu") and not chosen.evaluate(
        lambda name, **_: False
    )
