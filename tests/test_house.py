"""The house: rules of the sources that no linter knows.

- A constructor takes by position at most the one thing that the object is of, as in
  `RunFolder(place)` and `Router(replicas)`; a function, a number and what has a default go by their
  names. A dataclass of more than two fields takes all of them by name.
- A folder holds at most a dozen modules, a class is one noun of at most 400 lines, and a function
  fits on a screen.
- The mathematics can be used without a cluster and without an engine.
- What a test changes is handed in: none replaces a part of the project. What two test files need
  is in `tests/support`: none imports another.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache

from tests.support.project import PROJECT

PLAIN = {
    "Checkpoints": "a folder, and how many of them it keeps",
    "Policy": "a model and its tokenizer, as everywhere in transformers",
}
PLAIN_DATA = {
    "Interval": "low and high, as in mathematics",
    "StoreUpdate": "made by vLLM, of a dictionary",
}
"""Classes whose order is plain, and why."""
NUMBERS = {"bool", "int", "float"}


@cache
def modules() -> tuple[ast.Module, ...]:
    folders = (PROJECT / "treerpo_ray", PROJECT / "jobs")
    paths = (path for folder in folders for path in sorted(folder.rglob("*.py")))
    return tuple(ast.parse(path.read_text()) for path in paths)


def classes() -> Iterator[ast.ClassDef]:
    """All but errors, which are raised with a message."""
    for module in modules():
        for node in ast.walk(module):
            bases = [ast.unparse(base) for base in getattr(node, "bases", ())]
            if isinstance(node, ast.ClassDef) and not any(base.endswith("Error") for base in bases):
                yield node


def constructors() -> Iterator[tuple[str, ast.arguments]]:
    """By the names of their classes."""
    for node in classes():
        for made in node.body:
            if isinstance(made, ast.FunctionDef) and made.name == "__init__":
                yield node.name, made.args


def types_of_functions() -> set[str]:
    """How they are written: `Callable`, and names such as `Warn` that stand for one."""
    return {"Callable"} | {
        ast.unparse(node.targets[0])
        for module in modules()
        for node in module.body
        if isinstance(node, ast.Assign) and ast.unparse(node.value).startswith("Callable[")
    }


def test_a_constructor_takes_by_position_at_most_what_the_object_is_of() -> None:
    functions = types_of_functions()
    assert "Warn" in functions and len(list(constructors())) > 40

    def is_plain(taken: ast.arguments) -> bool:
        own = [*taken.posonlyargs, *taken.args][1:]
        kinds = [ast.unparse(each.annotation) for each in own if each.annotation]
        return (
            len(own) <= 1
            and not taken.defaults
            and not any(kind in NUMBERS or kind.partition("[")[0] in functions for kind in kinds)
        )

    assert {name for name, taken in constructors() if not is_plain(taken)} == PLAIN.keys()


def test_a_dataclass_of_more_than_two_fields_takes_them_by_name() -> None:
    found: dict[str, bool] = {}
    for node in classes():
        how = [ast.unparse(each) for each in node.decorator_list]
        fields = [each for each in node.body if isinstance(each, ast.AnnAssign)]
        if len(fields) > 2 and any(each.startswith("dataclass") for each in how):
            found[node.name] = any("kw_only=True" in each for each in how)
    assert len(found) > 80
    assert {name for name, is_by_name in found.items() if not is_by_name} == PLAIN_DATA.keys()


MOST_MODULES = 12


def test_a_folder_holds_at_most_a_dozen_modules() -> None:
    folders: dict[str, int] = {}
    for top in ("treerpo_ray", "jobs", "tests"):
        for path in (PROJECT / top).rglob("*.py"):
            if path.name not in ("__init__.py", "conftest.py"):
                place = str(path.parent.relative_to(PROJECT))
                folders[place] = folders.get(place, 0) + 1
    assert len(folders) > 30
    assert {place: count for place, count in folders.items() if count > MOST_MODULES} == {}


MOST_LINES = {ast.ClassDef: 400, ast.FunctionDef: 60, ast.AsyncFunctionDef: 60}


def test_a_function_fits_on_a_screen_and_a_class_has_at_most_400_lines() -> None:
    sizes: dict[str, int] = {}
    for module in modules():
        for node in ast.walk(module):
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                size = (node.end_lineno or 0) - node.lineno + 1
                sizes[f"{node.name} {size}"] = size - MOST_LINES[type(node)]
    assert len(sizes) > 1000
    assert [name for name, excess in sizes.items() if excess > 0] == []


IMPORT_ALL_WITHOUT_RAY_AND_VLLM = """
import importlib, pkgutil, sys
sys.modules["ray"] = sys.modules["vllm"] = None  # importing them now raises ImportError
import treerpo_ray.algo
start = "treerpo_ray.algo."
names = [module.name for module in pkgutil.walk_packages(treerpo_ray.algo.__path__, start)]
for name in names:
    importlib.import_module(name)
print(*sorted(name.removeprefix(start) for name in names))
"""


def test_every_module_of_algo_imports_without_ray_and_vllm() -> None:
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL_WITHOUT_RAY_AND_VLLM], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    modules = {
        "advantages.forms",
        "advantages.baselines",
        "backup",
        "groups",
        "loss",
        "packing",
        "tree",
    }
    assert modules <= set(done.stdout.split())


def own_names(module: ast.Module) -> set[str]:
    """What a test file has of the project under which name."""
    found = set()
    for node in ast.walk(module):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in OWN:
            found |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            names = [alias for alias in node.names if alias.name.split(".")[0] in OWN]
            found |= {(alias.asname or alias.name).split(".")[0] for alias in names}
    return found


OWN = {"treerpo_ray", "jobs"}


def replaced(module: ast.Module) -> Iterator[str]:
    """What a test file has `monkeypatch.setattr` replace, as it is written."""
    for node in ast.walk(module):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "monkeypatch.setattr":
            yield ast.unparse(node.args[0])


def test_no_test_replaces_a_part_of_the_project() -> None:
    num_replaced = 0
    for path in sorted((PROJECT / "tests").rglob("*.py")):
        module = ast.parse(path.read_text())
        for target in replaced(module):
            num_replaced += 1
            first = target.strip("'\"").split(".")[0]
            assert first not in own_names(module) | OWN, f"{path}: {target}"
    assert num_replaced > 20, "of other people's code"


def test_no_test_file_imports_another() -> None:
    files = sorted((PROJECT / "tests").rglob("test_*.py"))
    assert len(files) > 100
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            module = (isinstance(node, ast.ImportFrom) and node.module) or ""
            assert not module.rpartition(".")[2].startswith("test_"), f"{path}: {module}"
