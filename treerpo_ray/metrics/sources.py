"""Sources: which version of this project a result is of."""

import hashlib
import subprocess
from pathlib import Path


def version_of(root: Path) -> str:
    """Commit of the clone at `root`; if there is none, as in a Ray job, a checksum of sources."""

    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        return subprocess.run(command, cwd=root, capture_output=True, text=True).stdout.strip()

    # A folder that is no clone may lie in another one, whose commit says nothing of it.
    if (root / ".git").exists() and (commit := git("describe", "--always")):
        is_dirty = git("status", "--porcelain", "--", "treerpo_ray", "conf", "pyproject.toml")
        return commit + "-dirty" * bool(is_dirty)
    listed = hashlib.sha256()
    for path in sorted([*root.glob("treerpo_ray/**/*.py"), *root.glob("conf/**/*.yaml")]):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        listed.update(f"{path.relative_to(root)} {digest}\n".encode())
    return f"sources-{listed.hexdigest()[:12]}"
