"""See the trees of a run: in the browser, or as one page to keep.

python -m treerpo_ray.viewer quickstart                  # a run by its name, folder or URI
python -m treerpo_ray.viewer quickstart --html page.html # one file that needs no server
python -m treerpo_ray.viewer quickstart --html page.html --tree 12:280 --tree e36:test-7

The page follows a run that goes on. It is served to this machine alone; from another one, forward
the port: ssh -L 8300:127.0.0.1:8300 MACHINE. A tree is named STEP:TICKET, the answers of an
evaluation eSTEP:PROBLEM, as in the address of the page that shows it.
"""

import argparse
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from treerpo_ray.errors import run_command

if TYPE_CHECKING:
    from treerpo_ray.viewer.reader import RunReader

PORT = 8300
"""Where the page is, if the port is free."""


def main(arguments: list[str]) -> int:
    """Run the command; returns the exit status."""
    return run_command(view, arguments)


def view(arguments: list[str]) -> int:
    """Serve the viewer until it is interrupted, or write the page."""
    from treerpo_ray.viewer.reader import RunReader

    options = _options(arguments)
    reader = RunReader(options.run)
    if options.html:
        from treerpo_ray.viewer.page import write_page

        trees = write_page(reader, options.tree, Path(options.html))
        print(f"{options.html}: {len(trees)} trees of {options.run} {' '.join(trees)}".rstrip())
        return 0
    if options.tree:
        raise ValueError("--tree goes with --html; the served page has all trees")
    serve(reader, options.port)
    return 0


def serve(reader: "RunReader", port: int) -> None:
    """Serve the page on this machine until a signal ends it.

    Raises:
        ValueError: the port is not to be had.
    """
    import uvicorn

    from treerpo_ray.viewer.server import HOST, make_app

    listening = bind(HOST, port)
    print(f"http://{HOST}:{listening.getsockname()[1]}  (Ctrl-C ends it)", flush=True)
    settings = uvicorn.Config(
        make_app(reader), log_level="warning", server_header=False, lifespan="off"
    )
    uvicorn.Server(settings).run(sockets=[listening])


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens at that port; at any free one for 0.

    Raises:
        ValueError: another process has the port.
    """
    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        listening.listen()
    except OSError as error:
        listening.close()
        raise ValueError(f"--port {port}: {error.strerror}; --port 0 takes a free one") from error
    return listening


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m treerpo_ray.viewer",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", metavar="RUN", help="a run's name, folder or URI")
    parser.add_argument("--port", type=int, default=PORT, help=f"{PORT} if not given; 0: any")
    parser.add_argument("--html", metavar="FILE", help="write a page instead of serving one")
    parser.add_argument(
        "--tree",
        metavar="STEP:TICKET",
        action="append",
        default=[],
        help="a tree of the page, again for each; some of the newest step if none is named",
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
