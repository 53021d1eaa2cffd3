"""Train a model: files and overrides say how, a run of the same name goes on where it was.

python jobs/train.py conf/quickstart.yaml
python jobs/train.py conf/quickstart.yaml run.name=mine gate.max_staleness=0
python jobs/train.py --dry-run conf/math_cpu.yaml prompts.path=train.jsonl
ray job submit --working-dir . -- python jobs/train.py conf/quickstart.yaml
"""

import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a job has only a working folder

from treerpo_ray.config.files import describe, load
from treerpo_ray.metrics.console import Console


def main(arguments: list[str]) -> int:
    """Run the command; returns the exit status."""
    if {"-h", "--help"} & set(arguments):
        print(f"{__doc__}\nSections and keys, with their defaults:\n{describe()}")
        return 0
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    is_dry = "--dry-run" in arguments
    try:
        config = load([argument for argument in arguments if argument != "--dry-run"])
        from treerpo_ray.driver.cluster import check_vllm
        from treerpo_ray.driver.plan import plan_lines, preflight

        found = preflight(config)
        print("\n".join(plan_lines(config, found)), file=sys.stderr)
        if is_dry:
            return 0
        check_vllm(config)
        inputs = found.inputs()
        from treerpo_ray.driver.outcome import describe_outcome, summary_json
        from treerpo_ray.driver.run import run
        from treerpo_ray.errors import RunFailed

        console = Console(config.run.num_steps)
        outcome = run(config, inputs, console)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RunFailed as error:
        print(f"failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped at once; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    console.note(describe_outcome(config, outcome))
    print(summary_json(config, outcome))
    return 0 if outcome.is_complete else 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
