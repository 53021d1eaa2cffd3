"""Compare methods: train every arm of a comparison, then tabulate and plot what there is.

python jobs/compare.py jobs/comparisons/main.yaml
python jobs/compare.py jobs/comparisons/main.yaml run.root=/data/runs   # overrides for all runs
python jobs/compare.py --report jobs/comparisons/main.yaml              # only the table and plot
ray job submit --working-dir . -- python jobs/compare.py jobs/comparisons/main.yaml

Results lie beside the file, in a folder of its name, one small file a run; runs that have one are
not run again.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a job has only a working folder

from treerpo_ray.comparison import Comparison, read_comparison, read_results
from treerpo_ray.evaluate import Evaluation


def main(arguments: list[str]) -> int:
    """Run the command; returns the exit status."""
    if {"-h", "--help"} & set(arguments) or not arguments:
        print(__doc__)
        return 0
    from treerpo_ray.comparison_report import print_table, report, write_plot

    is_report = "--report" in arguments
    path, *common = [argument for argument in arguments if argument != "--report"]
    folder = Path(path).with_suffix("")
    try:
        comparison = read_comparison(path)
        num_failed = 0 if is_report else run_trials(comparison, folder, common)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    results = read_results(comparison, folder)
    if not results:
        print(f"there are no results in {folder} yet", file=sys.stderr)
        return 1
    table = report(comparison, results)
    table.write(folder)
    print_table(table)
    write_plot(comparison, results, folder)
    return 1 if num_failed else 0


def run_trials(comparison: Comparison, folder: Path, common: list[str]) -> int:
    """Run what has no result yet; returns how many runs failed."""
    from treerpo_ray import evaluate
    from treerpo_ray.cluster import check_vllm
    from treerpo_ray.comparison import result_of, result_path, write_result
    from treerpo_ray.console import Console
    from treerpo_ray.plan import load_inputs
    from treerpo_ray.train import RunFailed, run

    configs = {trial: comparison.config(trial, common) for trial in comparison.trials()}
    num_failed = 0
    starts: dict[str, Evaluation] = {}
    for number, (trial, config) in enumerate(configs.items(), 1):
        if result_path(trial, folder).is_file():
            continue
        check_vllm(config)
        console = Console(config.run.num_steps)
        console.note(f"run {number} of {len(configs)}: {trial.setting}, {trial.arm}, {trial.seed}")
        # The start is the same for all arms: it is evaluated once for each setting.
        if (start := starts.get(trial.setting)) is not None:
            evaluate.save(start, config.folder)
        try:
            outcome = run(config, load_inputs(config), console)
        except RunFailed as error:
            print(f"failed: {trial}: {error}", file=sys.stderr)
            num_failed += 1
            continue
        if not outcome.is_complete:
            raise KeyboardInterrupt
        result = result_of(trial, config)
        starts[trial.setting] = result.before
        write_result(result, folder)
    return num_failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
