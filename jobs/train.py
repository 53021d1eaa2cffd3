"""Train a model: files and overrides say how, a run of the same name goes on where it was.

python jobs/train.py conf/quickstart.yaml
python jobs/train.py conf/quickstart.yaml run.name=mine gate.max_staleness=0
python jobs/train.py --dry-run conf/math_cpu.yaml prompts.path=train.jsonl
python jobs/train.py --quiet conf/quickstart.yaml   # warnings and the result alone
python jobs/train.py --json conf/quickstart.yaml    # all of it as JSON lines on stdout
ray job submit --working-dir . -- python jobs/train.py conf/quickstart.yaml
"""

import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a job has only a working folder

from treerpo_ray.errors import run_command
from treerpo_ray.stop import STOPPED


def train(arguments: list[str]) -> int:
    """Check all input, train and print the result; returns the exit status."""
    if {"-h", "--help"} & set(arguments):
        from treerpo_ray.config.keys import describe

        print(f"{__doc__}\nSections and keys, with their defaults:\n{describe()}")
        return 0
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    from treerpo_ray.metrics.output import console_for  # light: the first line is there in no time

    console, others = console_for(arguments)
    own = [argument for argument in others if argument != "--dry-run"]
    if not own:
        raise ValueError("name a configuration, such as conf/quickstart.yaml; --help tells more")
    with console.stage("loading the libraries"):
        from treerpo_ray.config.files import load

        config = load(own)
        from treerpo_ray.driver.next_steps import next_steps
        from treerpo_ray.driver.plan import plan_lines
        from treerpo_ray.driver.result import describe_result, summary_json
        from treerpo_ray.driver.run import run
        from treerpo_ray.driver.start import look_at_folder
        from treerpo_ray.preflight.inputs import preflight
        from treerpo_ray.preflight.machine import check_vllm

    with console.stage("checking model and data"):
        earlier = look_at_folder(config)
        found = preflight(config)
        if "--dry-run" not in arguments:
            found.check_looked_up()
        plan = plan_lines(config, found)
    console.print_plan(plan)
    found.check_memory()
    if "--dry-run" in arguments:
        if earlier.result is not None:
            again = "another run.name starts a new one"
            console.note(f"{config.folder} holds this run complete; {again}")
        return 0
    check_vllm(config)
    inputs = found.inputs()
    result = run(config, inputs, earlier, console)
    console.note(describe_result(config, result))
    if result.is_complete:
        for purpose, command in next_steps(config, own, result.sampled_tokens):
            console.print_command(purpose, command)
    print(summary_json(config, result))
    return 0 if result.is_complete else STOPPED


def main(arguments: list[str]) -> int:
    """Run the command; returns the exit status."""
    stopped = "stopped at once; the same command goes on from the last checkpoint, if there is one"
    return run_command(train, arguments, stopped=stopped)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
