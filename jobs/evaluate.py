"""Evaluate a model on benchmarks, or compare two evaluations problem by problem.

python jobs/evaluate.py Qwen/Qwen2.5-Math-1.5B --benchmarks math500,aime24
python jobs/evaluate.py ~/treerpo_runs/mine --benchmarks gsm8k evaluate.num_samples=16
python jobs/evaluate.py MODEL --benchmarks math500 evaluate.benchmarks.math500.path=math500.jsonl
python jobs/evaluate.py --compare RUN_OR_EVALUATION OTHER
python jobs/evaluate.py --json MODEL    # JSON lines on stdout; --quiet: warnings and scores alone
ray job submit --working-dir . -- python jobs/evaluate.py MODEL --benchmarks math500

MODEL is a model folder, a Hugging Face id, a run folder or the name of a run; a folder may be a URI
(s3://...) whose model is fetched to this machine. Benchmarks and sampling settings (the paper's)
stand in conf/benchmarks.yaml; all benchmarks are taken if none is named. Files (.yaml) and
overrides (section.key=value) come after it. Prompt template, arguments of the chat template and
stop strings are the run's; of a model they are prompts.chat_template_args.enable_thinking=false
and the like.
A run is graded by its own check. Where that is a file which is not here as it was, the code that
the run brings along is shown and not run: --trust-run runs it, and code of the model's own, too.
The scores go to stdout as a table and, unless that is a terminal, one line of JSON; with every
sample they lie in eval-NAME/eval beside the run, in BENCHMARK.json and .parquet. Their mean is over
the paper's four benchmarks if those are among them, otherwise over all.
"""

import json
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a job has only a working folder

from treerpo_ray.errors import run_command

if TYPE_CHECKING:
    import rich.console


def main(arguments: list[str]) -> int:
    """Run the command; returns the exit status."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    command = compare if "--compare" in arguments else evaluate
    if {"-h", "--help"} & set(arguments) or not arguments:
        command = describe
    return run_command(command, [argument for argument in arguments if argument != "--compare"])


def describe(arguments: list[str]) -> int:
    """Print what stands at the head of this file."""
    print(__doc__)
    return 0


def evaluate(arguments: list[str]) -> int:
    """Evaluate, and print the table and one line of JSON."""
    from treerpo_ray.metrics.output import console_for  # light: the first line is there in no time

    names: list[str] = []
    console, rest = console_for(arguments)
    if "--benchmarks" in rest:
        at = rest.index("--benchmarks")
        if at + 1 == len(rest):
            raise ValueError("--benchmarks: name them, as in --benchmarks math500,aime24")
        names = rest[at + 1].split(",")
        del rest[at : at + 2]
    if not rest or rest[0].startswith("-") or "=" in rest[0] or rest[0].endswith(".yaml"):
        raise ValueError("the model comes first: a folder, a Hugging Face id or a run")
    with console.stage("loading the libraries"):
        from treerpo_ray.driver.benchmarks import (
            configure,
            place_of,
            run_benchmarks,
            what_is_evaluated,
        )
        from treerpo_ray.evaluate.report import plain, table, with_mean
        from treerpo_ray.preflight.machine import check_vllm
        from treerpo_ray.preflight.trial import TRUST

    trusts_run, model = TRUST in rest, place_of(rest[0])
    own = [argument for argument in rest[1:] if argument != TRUST]
    config, told = configure(model, names, own, trusts_run=trusts_run), what_is_evaluated(model)
    check_vllm(config)
    found = run_benchmarks(config, model, console, trusts_run=trusts_run)
    scores = with_mean({name: each.scores for name, each in found.items()})
    one = next(iter(found.values()))
    shown = table(scores, model=told, verifier=config.verifier.identity, sampling=one.sampling)
    fields = {"folder": config.folder, **one.sampling_fields, "scores": plain(scores)}
    tell(shown, fields, arguments)
    return 0


def compare(places: list[str]) -> int:
    """Print two evaluations and what they differ in as tables and one line of JSON."""
    from treerpo_ray.evaluate.report import comparison

    pair = [place for place in places if place != "--json"]
    if len(pair) != 2:
        raise ValueError(
            "--compare takes two: runs or evaluations (names, folders, files in eval/)"
        )
    found = comparison(*pair)
    tell(found.tables, found.fields, places)
    return 0


def tell(shown: "rich.console.Group", fields: dict[str, object], arguments: list[str]) -> None:
    """Print a table, and the same as JSON for whatever reads it; a person has the table alone."""
    from treerpo_ray.evaluate.report import show

    if "--json" not in arguments:
        show(shown)
    if "--json" in arguments or not sys.stdout.isatty():
        print(json.dumps(fields))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
