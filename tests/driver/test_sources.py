"""Sources: a version tells the code and the settings that a result is of, and nothing else."""

import re
import subprocess
from pathlib import Path

from treerpo_ray.driver.sources import checksum_of, version_of


def test_outside_a_clone_the_version_tells_code_and_settings_and_nothing_else(
    tmp_path: Path,
) -> None:
    def version(**changes: str) -> str:
        files = {"treerpo_ray/algo/loss.py": "1", "conf/a.yaml": "b: 2"} | changes
        root = tmp_path / str(len(list(tmp_path.iterdir())))
        for name, text in files.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(text)
        return version_of(root)

    first = version()
    assert re.fullmatch("sources-[0-9a-f]{12}", first)
    assert first == version() == version(**{"runs/log.py": "", "treerpo_ray/model/weights": "w"})
    changed = [{"conf/a.yaml": "b: 3"}, {"treerpo_ray/algo/loss.py": "2"}, {"conf/c.yaml": ""}]
    assert len({first, *(version(**change) for change in changed)}) == 4


def test_of_a_clone_the_version_is_the_commit(tmp_path: Path) -> None:
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e"]
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "first"]):
        subprocess.run([*git, *command], check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout
    clean = version_of(tmp_path)
    assert len(clean) >= 4 and commit.startswith(clean)
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf/new.yaml").touch()
    assert version_of(tmp_path) == f"{clean}-dirty"


def test_a_clone_in_a_folder_that_belongs_to_another_clone_is_none(tmp_path: Path) -> None:
    """Such as the working folder of a Ray job below somebody's home."""
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    (tmp_path / "job").mkdir()
    assert version_of(tmp_path / "job").startswith("sources-")


def test_a_checksum_of_code_alone_is_the_same_where_it_is_installed(tmp_path: Path) -> None:
    for name in ("clone", "installed"):
        (tmp_path / name / "treerpo_ray").mkdir(parents=True)
        (tmp_path / name / "treerpo_ray/task.py").write_text("1")
    (tmp_path / "clone/conf").mkdir()
    (tmp_path / "clone/conf/a.yaml").write_text("b: 2")
    assert checksum_of(tmp_path / "clone") == checksum_of(tmp_path / "installed")
    (tmp_path / "clone/treerpo_ray/task.py").rename(tmp_path / "clone/treerpo_ray/tasks.py")
    assert checksum_of(tmp_path / "clone") != checksum_of(tmp_path / "installed")
