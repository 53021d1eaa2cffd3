"""Drain the Ray node of this machine before it goes, so that the trees on its engines move on.

python drain.py pod     # now: a pod's preStop hook, which returns when the node's work has left
python drain.py aws     # once the cloud's metadata service says that it takes the machine back; gcp
"""

import subprocess
import sys
import time
from http.client import HTTPException
from pathlib import Path
from urllib.request import ProxyHandler, Request, build_opener

METADATA = "http://169.254.169.254"
NOTICE_S = {"pod": 25, "aws": 110, "gcp": 25}
"""Time that is left after the notice, a little less than what each of them promises."""
POLL_S = 2.0
PROC = Path("/proc")


def is_noticed(where: str, metadata: str) -> bool:
    """Whether the machine is about to go; not, as long as nobody says so."""
    try:
        if where == "aws":
            ttl = {"X-aws-ec2-metadata-token-ttl-seconds": "60"}
            token = {"X-aws-ec2-metadata-token": _fetch(f"{metadata}/latest/api/token", ttl, "PUT")}
            return bool(_fetch(f"{metadata}/latest/meta-data/spot/instance-action", token))
        preempted = f"{metadata}/computeMetadata/v1/instance/preempted"
        return where == "pod" or _fetch(preempted, {"Metadata-Flavor": "Google"}) == "TRUE"
    except (OSError, HTTPException):  # without a notice AWS answers 404
        return False


def _fetch(url: str, headers: dict[str, str], method: str = "GET") -> str:
    request = Request(url, headers=headers, method=method)
    with build_opener(ProxyHandler({})).open(request, timeout=5) as reply:
        return str(reply.read().decode())


def node_ids(processes: Path) -> list[str]:
    """Ids of the Ray nodes of this machine, from the command lines of their raylets, as its folder
    of processes has them."""
    found = []
    for path in processes.glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue  # it ended meanwhile
        if Path(words[0]).name == "raylet":
            found += [word.partition("=")[2] for word in words if word.startswith("--node_id=")]
    return found


def drain(
    where: str,
    seconds: int,
    *,
    metadata: str = METADATA,
    processes: Path = PROC,
    poll_s: float = POLL_S,
) -> None:
    """Wait for the notice, drain, and wait until Ray has ended the drained node, which it gets
    `seconds` for."""
    while not is_noticed(where, metadata):
        time.sleep(poll_s)
    end = time.monotonic() + seconds
    for node_id in node_ids(processes):
        reason = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", f"{where} ends"]
        deadline = ["--deadline-remaining-seconds", str(seconds)]
        subprocess.run(["ray", "drain-node", "--node-id", node_id, *reason, *deadline], check=False)
    while node_ids(processes) and time.monotonic() < end:
        time.sleep(0.5)


if __name__ == "__main__":
    drain(sys.argv[1], NOTICE_S[sys.argv[1]])
