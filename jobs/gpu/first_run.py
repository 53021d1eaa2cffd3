"""One part of `first_gpu_run.sh`: what it finds goes to FOLDER/PART.json, as far as it gets.

python jobs/gpu/first_run.py PART FOLDER [--rehearse]     # one of PARTS, below
python jobs/gpu/first_run.py verdict FOLDER PART...
"""

import importlib.util
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a script has only its own folder

from jobs.gpu import ray_parts, torch_parts
from jobs.gpu.workload import REAL, REHEARSAL, Sizes, Tell

TORCH_ALONE = ("machine", "model", "attention", "learner", "sharded")
"""Parts that run where Ray and vLLM are not installed."""
PARTS: dict[str, Callable[[Sizes, Path, Tell], None]] = {
    "machine": torch_parts.machine,
    "model": torch_parts.model,
    "attention": torch_parts.attention,
    "learner": torch_parts.learner,
    "sharded": torch_parts.sharded,
    "engine": ray_parts.engine,
    "train": ray_parts.train,
    "options": ray_parts.options,
}


@contextmanager
def written(file: Path) -> Iterator[Tell]:
    """What is told goes to a file at once: a part that is ended from outside loses nothing."""
    found: dict[str, object] = {"status": "not finished"}

    def tell(**results: object) -> None:
        found.update(results)
        file.write_text(json.dumps(found, indent=1))

    tell()
    start = time.monotonic()
    try:
        yield tell
        if found["status"] == "not finished":  # else it says why it was left out
            tell(status="ok")
    except Exception as error:
        traceback.print_exc()
        tell(status=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
    finally:
        tell(seconds=round(time.monotonic() - start, 1))


def verdict(folder: Path, parts: list[str]) -> int:
    """Print what became of the parts as a line of JSON; returns the exit status."""
    found = {}
    for part in parts:
        file = folder / f"{part}.json"
        found[part] = json.loads(file.read_text()) if file.exists() else {"status": "not started"}
    told = {part: result["status"] for part, result in found.items()}
    is_well = all(status == "ok" or status.startswith("left out") for status in told.values())
    results = {part: {k: v for k, v in r.items() if k != "status"} for part, r in found.items()}
    print(json.dumps({"is_well": is_well, "parts": told, "folder": str(folder), **results}))
    return 0 if is_well else 1


def main(arguments: list[str]) -> int:
    """Run a part; returns the exit status."""
    part, place, *others = arguments
    folder = Path(place).resolve()
    if part == "verdict":
        return verdict(folder, others)
    sizes = REHEARSAL if "--rehearse" in others else REAL
    with written(folder / f"{part}.json") as tell:
        if part not in TORCH_ALONE:
            lacking = [name for name in ("ray", "vllm") if importlib.util.find_spec(name) is None]
            if lacking:
                tell(status=f"left out: {' and '.join(lacking)} not installed")
                return 0
        PARTS[part](sizes, folder, tell)
        if part in TORCH_ALONE and (loaded := {"ray", "vllm"} & sys.modules.keys()):
            raise RuntimeError(f"this part is to need neither, and has imported {sorted(loaded)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
