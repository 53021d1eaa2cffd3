"""Sources: which version of this project a result is of, or a machine has."""

import hashlib
import subprocess
from pathlib import Path

CODE = "treerpo_ray/**/*.py"
SETTINGS = "conf/**/*.yaml"


def version_of(root: Path) -> str:
    """Commit of the clone at `root`; if there is none, as in a Ray job, a checksum of sources."""

    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        return subprocess.run(command, cwd=root, capture_output=True, text=True).stdout.strip()

    # A folder that is no clone may lie in another one, whose commit says nothing of it.
    if (root / ".git").exists() and (commit := git("describe", "--always")):
        is_dirty = git("status", "--porcelain", "--", "treerpo_ray", "conf", "pyproject.toml")
        return commit + "-dirty" * bool(is_dirty)
    return f"sources-{checksum_of(root, CODE, SETTINGS)}"


def checksum_of(root: Path, *patterns: str) -> str:
    """Of the files below `root` that fit one of the patterns, with their names; without patterns of
    the code alone, which is the same where it is installed and in a clone."""
    listed = hashlib.sha256()
    for path in sorted(file for pattern in patterns or (CODE,) for file in root.glob(pattern)):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        listed.update(f"{path.relative_to(root)} {digest}\n".encode())
    return listed.hexdigest()[:12]
