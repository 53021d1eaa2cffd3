"""Compare methods: train every arm of a comparison, then tabulate and plot what there is.

python jobs/compare.py jobs/comparisons/main.yaml
python jobs/compare.py jobs/comparisons/main.yaml run.root=/data/runs   # overrides for all runs
python jobs/compare.py --report jobs/comparisons/main.yaml              # only tables and plots
python jobs/compare.py --report jobs/comparisons/*.yaml                 # and ratio.png of them all
ray job submit --working-dir . -- python jobs/compare.py /shared/comparisons/main.yaml

Results lie beside the file, in a folder of its name, one small file a run; runs that have one are
not run again. Runs share one Ray session and its engines where these can serve them all. A Ray job
works in a copy of the project that goes when it ends: there, name a file that lies elsewhere.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a job has only a working folder

from treerpo_ray.errors import run_command


def compare(arguments: list[str]) -> int:
    """Train what has no result yet, then tabulate and plot; returns the exit status."""
    if {"-h", "--help"} & set(arguments) or not set(arguments) - {"--report"}:
        print(__doc__)
        return 0
    from treerpo_ray.study.comparisons.comparison import read_comparison, read_results
    from treerpo_ray.study.comparisons.curves import write_plot
    from treerpo_ray.study.comparisons.forecasts import Forecast, forecasts, write_forecasts
    from treerpo_ray.study.comparisons.report import report
    from treerpo_ray.study.comparisons.runner import Trials
    from treerpo_ray.study.comparisons.tables import print_table

    is_report = "--report" in arguments
    given = [argument for argument in arguments if argument != "--report"]
    paths = [each for each in given if "=" not in each] if is_report else given[:1]
    common = [each for each in given if each not in paths]
    num_failed, found = 0, list[Forecast]()
    for path in paths:
        folder = Path(path).with_suffix("")
        comparison = read_comparison(path)
        configs = comparison.configs(common)
        if not is_report:
            num_failed = Trials(configs=configs, folder=folder).run()
        results = read_results(configs, folder)
        if not results:
            print(f"there are no results in {folder} yet", file=sys.stderr)
            num_failed += 1
            continue
        table = report(comparison, results)
        table.write(folder)
        print_table(table)
        write_plot(comparison, results, folder)
        own = forecasts(comparison, results)
        write_forecasts(own, folder)
        found += own
    if len(paths) > 1:
        write_forecasts(found, Path(paths[0]).parent)
    return 1 if num_failed else 0


def main(arguments: list[str]) -> int:
    """Run the command; returns the exit status."""
    stopped = "stopped; the same command goes on where it was"
    return run_command(compare, arguments, stopped=stopped)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
