"""Run result: when a run is over."""

from treerpo_ray.config import Config
from treerpo_ray.config.sections import RunConfig
from treerpo_ray.driver.outcome import last_step


def test_a_run_ends_with_the_step_that_reaches_its_tokens_or_with_the_last_of_its_steps() -> None:
    rows = [{"step": 0.0}] + [{"step": step, "tokens/sampled": 10.0} for step in (1.0, 2.0, 3.0)]
    limits = {None: 5, 30: 3, 21: 3, 20: 2, 1: 1, 31: 5}
    for limit, last in limits.items():
        config = Config(run=RunConfig(num_steps=5, max_sampled_tokens=limit))
        assert last_step(config, rows) == last
