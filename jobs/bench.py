"""Benchmarks: each part against something real, side by side in one run; ratios are what counts.

python jobs/bench.py                    # all of them, two to three minutes on two cores
python jobs/bench.py packing learner    # some
Prints a table, and as the last line JSON.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a job has only a working folder

import rich.console
import rich.table

from jobs.benches.learner import bench_learner
from jobs.benches.logprobs import bench_logprobs
from jobs.benches.packing import bench_packing, bench_records
from jobs.benches.request_logprobs import bench_request_logprobs
from jobs.benches.rollout import bench_search, bench_verifier
from jobs.benches.sides import ROUNDS
from jobs.benches.weights import bench_weights
from treerpo_ray.config import load

PROJECT = Path(__file__).resolve().parents[1]
BENCHES = {
    "packing": bench_packing,
    "records": bench_records,
    "learner": bench_learner,
    "logprobs": bench_logprobs,
    "request_logprobs": bench_request_logprobs,
    "verifier": bench_verifier,
    "search": bench_search,
    "weights": bench_weights,
}


def main(arguments: list[str]) -> int:
    """Run the command; returns the exit status."""
    if unknown := set(arguments) - BENCHES.keys():
        print(f"{__doc__}\nunknown: {', '.join(unknown)}", file=sys.stderr)
        return 2
    config = load([str(PROJECT / "conf/quickstart.yaml")])
    rows = [row for name in arguments or BENCHES for row in BENCHES[name](config)]
    table = rich.table.Table(title=f"median of {ROUNDS} rounds, both sides in turns")
    for title in ("what", "ours", "cost", "other", "cost", "ours costs less by"):
        table.add_column(title, justify="right" if title == "cost" else "left")
    for row in rows:
        costs = [f"{cost:.3f} {row.unit}" for cost in (row.ours_cost, row.other_cost)]
        less = f"{row.ratio:.2f}x ({row.low:.2f} to {row.high:.2f})"
        table.add_row(row.name, row.ours, costs[0], row.other, costs[1], less)
    rich.console.Console().print(table)
    print(json.dumps([asdict(row) for row in rows]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
