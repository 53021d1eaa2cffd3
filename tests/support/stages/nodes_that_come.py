"""A cluster whose autoscaler knows nodes for workers, but has started none: prints as JSON what
became of a run's check of it. A process of its own, since it brings its cluster."""

import json
import os

import ray

from tests.support.project import load_script
from treerpo_ray.config import load
from treerpo_ray.driver.cluster import connected

NEEDED = [
    # The nodes of the demonstration: what is there has the one slot, what may come the other.
    *("learner.resources={CPU: 1, rollout_slot: 1}", "verifier.resources={CPU: 1, train_slot: 1}"),
    *("engine.max_engines=2", "engine.max_trees=4"),
]


def main() -> None:
    told: dict[str, object] = {}
    with load_script("jobs/drills/autoscale_demo.py").autoscaling_cluster() as address:
        os.environ["RAY_ADDRESS"] = address
        with connected(load([*NEEDED, "engine.start_timeout_s=1200"])):
            told["slots"] = ray.cluster_resources().get("rollout_slot")
        try:
            with connected(
                load([*NEEDED, "verifier.resources.gone=1", "engine.start_timeout_s=1"])
            ):
                told["refused"] = None
        except ValueError as error:
            told["refused"] = str(error)
    print(json.dumps(told))


if __name__ == "__main__":
    main()
