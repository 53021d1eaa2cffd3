"""Benchmarks: each part against something real, side by side in one run; ratios are what counts.

python jobs/bench.py                    # all of them, about five minutes on two cores
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
from jobs.benches.packing import bench_packing
from jobs.benches.rollout import bench_search, bench_verifier
from jobs.benches.sides import ROUNDS
from treerpo_ray.config import load

ROOT = Path(__file__).resolve().parents[1]
BENCHES = {
    "packing": bench_packing,
    "learner": bench_learner,
    "verifier": bench_verifier,
    "search": bench_search,
}


def main(arguments: list[str]) -> int:
    """Run the command; returns the exit status."""
    if unknown := set(arguments) - BENCHES.keys():
        print(f"{__doc__}\nunknown: {', '.join(unknown)}", file=sys.stderr)
        return 2
    config = load([str(ROOT / "conf/quickstart.yaml")])
    rows = [row for name in arguments or BENCHES for row in BENCHES[name](config)]
    table = rich.table.Table(title=f"median of {ROUNDS} rounds, both sides in turns")
    for title in ("what", "ours", "s", "other", "s", "ours is faster by"):
        table.add_column(title, justify="right" if title in ("s",) else "left")
    for row in rows:
        faster = f"{row.ratio:.2f}x ({row.low:.2f} to {row.high:.2f})"
        table.add_row(
            row.name, row.ours, f"{row.ours_s:.3f}", row.other, f"{row.other_s:.3f}", faster
        )
    rich.console.Console().print(table)
    print(json.dumps([asdict(row) for row in rows]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
