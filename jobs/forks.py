"""Forks: which trees would need the fewest tokens, for the model and the data that a run has.

python jobs/train.py conf/quickstart.yaml conf/forks.yaml run.name=forks
python jobs/forks.py forks
python jobs/forks.py RUN --steps 40    # of any run with metrics.save_trees_every=1
python jobs/forks.py RUN --all-parameters

The first line grows trees of a model that stays as it is, to ask before anything is trained. The
second prints a table: of the run's shape and of smaller ones the tokens that an update needs, over
those of single answers, for as much signal beside its noise. It takes some hundred trees to know.
`as trained` has the run's own credit, and what its loss lets a step weigh; `by rule` is what the
fork rule, by which runs print a line while they train, says of the same trees and shapes. Both are
of the gradient of one layer, as while a run trains, or with `--all-parameters` of the gradient by
all that is trained, which takes a backward pass for each step of a tree. Weights are those of the
newest checkpoint: trees that were grown many updates before it say less of them than it seems. The
last line is JSON.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a job has only a working folder

from treerpo_ray.errors import run_command

if TYPE_CHECKING:
    from treerpo_ray.study.update_shares import ShapeShare


def forks(arguments: list[str]) -> int:
    """Measure, and print the table; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", help="a run folder, or the name of a run")
    parser.add_argument(
        "--steps", type=positive, default=10, help="newest learner steps whose trees are used"
    )
    parser.add_argument(
        "--all-parameters", action="store_true", help="gradients by all that is trained"
    )
    parser.add_argument(
        "--trust-run", action="store_true", help="run code that the folder brings along"
    )
    options = parser.parse_args(arguments)
    from transformers.utils.logging import disable_progress_bar

    from treerpo_ray.config import load
    from treerpo_ray.run_folder.checkpoints import Checkpoints
    from treerpo_ray.run_folder.files import RunFolder, run_at
    from treerpo_ray.study.analysis import Run
    from treerpo_ray.study.update_shares import shape_shares

    disable_progress_bar()  # of loading weights, which would run into the table
    place = run_at(options.run)
    run = Run(place, trusts_code=options.trust_run)
    run.check_code()
    untrusted = [] if options.trust_run else ["model.trust_remote_code=false"]
    folder, config = RunFolder(place), load([f"{place}/config.yaml", *untrusted])
    with Checkpoints(folder, keep=1).newest() as newest:
        if newest is None:
            raise ValueError(f"{place} has no checkpoint, whose weights are measured")
        step, checkpoint = newest
        saved = [each for each in run.tree_steps() if each <= step]
        if not saved:
            raise ValueError(
                f"{place} has no trees up to step {step}: set metrics.save_trees_every=1"
            )
        steps = saved[-options.steps :]
        batches = [run.trees(each) for each in steps]
        by = "by all that is trained" if options.all_parameters else "by the layer before the head"
        print(
            f"{sum(map(len, batches))} trees of learner steps {steps[0]} to {steps[-1]}, by the "
            f"weights after step {step} and gradients {by}",
            file=sys.stderr,
        )
        found = shape_shares(config, checkpoint, batches, by_all_parameters=options.all_parameters)
    print_shares(found)
    shapes = [
        {
            "num_children": each.num_children,
            "tokens": each.tokens,
            "as_trained": each.as_trained and asdict(each.as_trained),
            "by_rule": each.by_rule and asdict(each.by_rule),
        }
        for each in found
    ]
    print(json.dumps({"run": place, "steps": steps, "gradients": by, "shapes": shapes}))
    return 0


def positive(text: str) -> int:
    """A whole number above 0; raises ValueError for another."""
    if (number := int(text)) < 1:
        raise ValueError(f"{number} is not above 0")
    return number


def print_shares(found: "Sequence[ShapeShare]") -> None:
    """Print the table on stderr."""
    import rich.console
    import rich.table

    table = rich.table.Table(title="tokens over those of single answers")
    for title in ("children", "tokens a tree", "as trained", "by rule"):
        table.add_column(title, justify="left" if title == "children" else "right")
    for each in found:
        own, rule = each.as_trained, each.by_rule
        table.add_row(
            str(list(each.num_children)),
            f"{each.tokens:.0f}",
            "too few trees" if own is None else f"{own.value:.2f} ± {own.error:.2f}",
            "" if rule is None else f"{rule.value:.2f} ± {rule.error:.2f}",
        )
    rich.console.Console(stderr=True).print(table)


if __name__ == "__main__":
    sys.exit(run_command(forks, sys.argv[1:]))
