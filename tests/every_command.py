"""Every command that is written down, run as a user would: one after the other, in one home.

python -m tests.every_command FOLDER             # as they stand in README, conf/ and jobs/
python -m tests.every_command FOLDER --reversed  # the last first

Each must do what it says, whatever was run before it: a training trains the run that its own files
describe, in a folder that no other command answers for. Trainings are cut to a few learner steps
(`SHORT`: nothing in it makes another run). Takes about an hour on two cores; what is written for
clusters, GPUs or days is run by the tests that `COVERED` names.
"""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.support.project import PROJECT
from treerpo_ray.config import Config, load
from treerpo_ray.config.files import to_yaml
from treerpo_ray.metrics.rows import latest_rows
from treerpo_ray.run_folder.files import CONFIG_FILE, RunFolder

SHORT = ("run.num_steps=2", "metrics.wandb_project=null")
COVERED = {
    r"bash jobs/test\.sh|bash jobs/first_gpu_run\.sh$|bash jobs/first_gpu_run\.sh machine": "",
    r"jobs/(first_gpu_run|gpu/first_run)\.": "tests/jobs/test_first_gpu_run.py",
    r"ray job submit|RAYJOB": "tests/jobs/test_jobs.py",
    r"jobs/drills/chaos\.py": "tests/jobs/test_chaos.py",
    r"jobs/drills/autoscale_demo\.py": "tests/jobs/test_autoscale_demo.py",
    r"jobs/notebook\.sh": "tests/jobs/test_notebook_script.py",
    r"jobs/forks\.py": "tests/runs/test_training.py",  # of a run with trees
    r"jobs/requirements\.py": "tests/jobs/test_setup.py",
    r"^kubectl |^helm |^docker |^ray (exec|get-auth-token)": "tests/jobs/test_cluster_files.py",
    r"^ray metrics ": "tests/metrics/test_stage_metrics.py",  # it downloads Prometheus
    r"drain\.py": "tests/jobs/test_drain.py",
    r"jobs/compare\.py jobs": "tests/jobs/test_jobs.py",  # days, and its results are there
    r"^pip install": "tests/jobs/test_gpu_setup.py",
    r"^source |^ray metrics launch-prometheus": "",
}
"""Commands that are not run here, and the tests that run what they do; nothing for those that are
the tests themselves, need a GPU or a download, or set up the shell that this runs in."""
KINDS = {
    "--help": "help",
    "--dry-run|conf/hardware": "plan",  # there is no GPU: the plan is what can be seen of it
    r"jobs/train\.py|jobs/quickstart\.sh": "train",
    "--compare": "compare",
    r"jobs/evaluate\.py": "evaluate",
    "make_model": "make_model",
    r"jobs/minimal\.py": "minimal",
    r"jobs/bench\.py|jobs/measure_verifier\.py|jobs/compare\.py --report": "measure",
}
"""What a command is, by what its text has; the first that fits."""
PLACEHOLDERS = {
    "conf/RECIPE.yaml": "conf/treerpo_qwen2.5_math_1.5b.yaml",
    "MODEL_OR_RUN": "treerpo_ray/quickstart/model",
    "MODEL": "treerpo_ray/quickstart/model",
    "~/treerpo_runs/mine": "treerpo_ray/quickstart/model",
    "Qwen/Qwen2.5-Math-1.5B": "treerpo_ray/quickstart/model",
    "RUN_OR_EVALUATION": "compared-0",
    "OTHER": "compared-1",
}
"""What stands for a user's own, and what is taken for it."""
SMALL_INSTEAD = (
    *("model.path=treerpo_ray/quickstart/model", "prompts.path=quickstart:train"),
    *("prompts.question_column=question", "prompts.answer_column=answer"),
    *("evaluate.data.path=quickstart:test", "evaluate.max_tokens=64"),
    *("evaluate.data.question_column=question", "evaluate.data.answer_column=answer"),
    *("tree.num_children=[2]", "tree.step_tokens=[64]", "prompts.max_prompt_tokens=160"),
    *(
        "evaluate.data.max_prompt_tokens=160",
        "prompts.num_problems=512",
        "evaluate.data.num_problems=100",
    ),
)
"""For the recipes: their data and model come from Hugging Face, where these tests do not go."""
DATA = re.compile(r"\b(train|test|math500|gsm8k_test|math_train|answers_misjudged)\.jsonl(\.gz)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """A command as it is written, and where."""

    text: str
    place: str

    @property
    def words(self) -> list[str]:
        return shlex.split(self.text)

    @property
    def covering(self) -> str | None:
        """The test that runs it; None if it is run here."""
        found = [test for pattern, test in COVERED.items() if re.search(pattern, self.text)]
        return found[0] if found else None

    @property
    def kind(self) -> str | None:
        """The method of `Home` that runs it and looks at what it did; None if there is none."""
        found = [kind for pattern, kind in KINDS.items() if re.search(pattern, self.text)]
        return found[0] if found else None


def written_commands() -> list[Command]:
    """All commands in README files, and at the heads of configuration files and jobs."""
    found = []
    for path in (PROJECT / "README.md", PROJECT / "jobs/cluster/README.md"):
        for block in re.findall(r"```bash\n(.*?)```", path.read_text(), re.DOTALL):
            found += _commands_in(block, path)
    for path in [*PROJECT.glob("conf/**/*.yaml"), *PROJECT.glob("jobs/**/*")]:
        if path.suffix in (".yaml", ".sh", ".py"):
            found += _commands_in(_head(path.read_text()), path)
    return found


def _head(text: str) -> str:
    """The comment or docstring that a file begins with, without its marks."""
    if text.startswith('"""'):
        return text.split('"""')[1]
    head = re.match(r"(#.*\n)*", text)
    return re.sub(r"^#( |!.*)?", "", head[0] if head else "", flags=re.MULTILINE)


def _commands_in(text: str, path: Path) -> Iterator[Command]:
    text = text.replace("\\\n", " ")
    for line in text.splitlines():
        words = re.sub(r"\s+#.*", "", line).strip()
        if re.match(r"(python|bash|ray|pip|source|kubectl|helm|docker) \S", words):
            yield Command(text=re.sub(r"\s+", " ", words), place=str(path.relative_to(PROJECT)))


def configuration(words: list[str]) -> Config:
    """The configuration of a training, cut to a few steps."""
    own = [word for word in words if "=" in word or word.endswith(".yaml")]
    own = [str(PROJECT / word) if word.startswith("conf/") else word for word in own]
    if "jobs/quickstart.sh" in words:
        own.insert(0, str(PROJECT / "conf/quickstart.yaml"))
    return load([*own, *SHORT])


class Home:
    """A new user's home folder, in which one command after the other is run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.done: dict[str, str] = {}
        """The configuration that each run folder is of."""
        folder.mkdir(parents=True)
        for name in ("train", "test", "math500", "gsm8k_test", "math_train"):
            rows = [{"question": f"{n}+1=?", "answer": f"{n + 1}"} for n in range(40)]
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        judged = {"answer": "4", "reference": "4", "right": True, "kind": "number"}
        (folder / "answers_misjudged.jsonl").write_text(json.dumps(judged) + "\n")
        self.environment = os.environ | {
            "HOME": str(folder),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "HF_HUB_OFFLINE": "1",
            "WANDB_MODE": "offline",
        }

    def run(self, words: list[str]) -> subprocess.CompletedProcess[str]:
        """Run a command in the project's folder, as this home's user."""
        return subprocess.run(
            words, cwd=PROJECT, env=self.environment, capture_output=True, text=True, check=False
        )

    def do(self, command: Command) -> str:
        """Run a command and look at what it did; returns what that was.

        Raises:
            AssertionError, LookupError, ValueError: it did something else, or told nothing.
        """
        words = [PLACEHOLDERS.get(word, word) for word in command.words]
        words = [DATA.sub(rf"{self.folder}/\1.jsonl", word) for word in words]
        kind = command.kind
        assert kind is not None, "nobody has said what this command must do"
        look: Callable[[list[str]], str] = getattr(self, kind)
        return look(words)

    def train(self, words: list[str]) -> str:
        """A training trains what its files describe, and in no other's folder."""
        before, os.environ["HOME"] = os.environ["HOME"], str(self.folder)
        try:
            config = configuration(words)
        finally:
            os.environ["HOME"] = before
        folder = RunFolder(config.folder)
        assert not folder.exists() or self.done.get(config.folder) == to_yaml(config), "is taken"
        done = self.run([*words, *SHORT])
        if done.returncode == 2 and "make_model" in done.stderr:
            raise ModelMissing(done.stderr.strip().splitlines()[-1])
        result = _json_of(done)
        self.done[config.folder] = to_yaml(config)
        assert result["run"] == config.folder
        assert folder.read_text(CONFIG_FILE) == to_yaml(config)
        rows = [row for row in latest_rows(folder) if row["step"]]
        assert len(rows) == config.run.num_steps
        assert result["sampled_tokens"] == sum(row["tokens/sampled"] for row in rows) > 0
        return f"{Path(config.folder).name}: {len(rows)} steps"

    def plan(self, words: list[str]) -> str:
        """A plan is shown, and nothing is written."""
        before = sorted((self.folder / "treerpo_runs").glob("*"))
        if "qwen" in str(words):  # what it names would be downloaded
            words = [*words, *SMALL_INSTEAD]
        if "--dry-run" not in words:
            words.insert(2, "--dry-run")
        done = self.run(words)
        assert done.returncode == 0, done.stderr[-2000:]
        assert sorted((self.folder / "treerpo_runs").glob("*")) == before, "a plan wrote"
        return f"a plan of {len(done.stderr.splitlines())} lines"

    def help(self, words: list[str]) -> str:
        """Every key is named."""
        done = self.run(words)
        assert done.returncode == 0 and "gate.max_staleness" in done.stdout.replace("\n", " ")
        return f"help of {len(done.stdout.splitlines())} lines"

    def evaluate(self, words: list[str]) -> str:
        """The scores of a model are told."""
        own = ("--benchmarks", "quickstart", "evaluate.max_tokens=64", "evaluate.num_samples=2")
        if "--benchmarks" in words:
            at = words.index("--benchmarks")
            del words[at : at + 2]
        words = [word for word in words if not word.startswith("evaluate.")]
        result = _json_of(self.run([*words, *own]))
        assert 0 < result["scores"]["quickstart"]["pass@1"]["value"] < 1, result
        return f"scores in {result['folder']}"

    def compare(self, words: list[str]) -> str:
        """Two runs are compared."""
        for seed in (0, 1):
            name = f"compared-{seed}"
            if not (self.folder / "treerpo_runs" / name).exists():
                own = [f"run.name={name}", f"run.seed={seed}", *SHORT]
                _json_of(self.run(["python", "jobs/train.py", "conf/quickstart.yaml", *own]))
        return f"differences {list(_json_of(self.run(words))['scores'])}"

    def make_model(self, words: list[str]) -> str:
        """A model is made, or is there."""
        model = self.folder / "treerpo_models" / words[-1]
        if not model.exists():
            done = self.run(words)
            assert done.returncode == 0, done.stderr[-2000:]
        assert (model / "model.safetensors").exists()
        return str(model)

    def minimal(self, words: list[str]) -> str:
        """A training in one process ends well."""
        done = self.run([*words, *SHORT])
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout.splitlines()[-1]

    def measure(self, words: list[str]) -> str:
        """A table is shown."""
        done = self.run(words)
        assert done.returncode == 0, done.stderr[-2000:]
        return f"{len(done.stdout.splitlines())} lines"


class ModelMissing(Exception):
    """A training needs a small model that is still to be made, and says by which command."""


def _json_of(done: subprocess.CompletedProcess[str]) -> dict:
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def main(arguments: list[str]) -> int:
    """Run them all; returns how many did not do what they say."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="a new folder, for the home")
    parser.add_argument("--reversed", action="store_true")
    parser.add_argument("--only", default="", help="a regular expression")
    given = parser.parse_args(arguments)
    commands = [
        each
        for each in written_commands()
        if each.covering is None and re.search(given.only, each.text)
    ]
    waiting = commands[::-1] if given.reversed else commands
    home, num_wrong, is_again = Home(given.folder), 0, False
    while waiting:
        later = []
        for command in waiting:
            start = time.monotonic()
            try:
                told = home.do(command)
            except ModelMissing as missing:
                told = f"waits for its model: {missing}"
                later.append(command)
            except (AssertionError, LookupError, OSError, ValueError) as error:
                num_wrong += 1
                told = f"WRONG: {type(error).__name__} {error}"
            print(f"{command.place}: {command.text}\n    {told}", end=" ")
            print(f"({time.monotonic() - start:.0f} s)", flush=True)
        num_wrong += len(later) if is_again else 0
        waiting, is_again = [] if is_again else later, True
    print(f"{len(commands)} commands, {num_wrong} did not do what they say")
    return num_wrong


if __name__ == "__main__":
    sys.exit(min(main(sys.argv[1:]), 1))
