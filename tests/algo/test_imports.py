"""The mathematics must be usable without a cluster and without an engine."""

import subprocess
import sys

IMPORT_ALL_WITHOUT_RAY_AND_VLLM = """
import importlib, pkgutil, sys
sys.modules["ray"] = sys.modules["vllm"] = None  # importing them now raises ImportError
import treerpo_ray.algo
names = [module.name for module in pkgutil.iter_modules(treerpo_ray.algo.__path__)]
for name in names:
    importlib.import_module(f"treerpo_ray.algo.{name}")
print(*sorted(names))
"""


def test_every_module_of_algo_imports_without_ray_and_vllm() -> None:
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL_WITHOUT_RAY_AND_VLLM], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    modules = {"advantages", "backup", "groups", "loss", "packing", "tree"}
    assert modules <= set(done.stdout.split())
