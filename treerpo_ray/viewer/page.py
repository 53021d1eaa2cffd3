"""Page: the viewer and chosen trees as one file, which any browser opens without a server.

The file holds the answers that the server would give. Its content security policy names the
scripts by their hashes, so that nothing else in it can run, and lets nothing be fetched.
"""

import base64
import hashlib
import re
from dataclasses import replace
from pathlib import Path

from treerpo_ray.study.sightings import Change
from treerpo_ray.viewer.reader import RunReader
from treerpo_ray.viewer.server import ASSETS
from treerpo_ray.viewer.wire import to_json

IMPORT = re.compile(r'^import \{([^}]*)\} from "\./([a-z_]+)\.js";\n', re.MULTILINE)
EXPORT = re.compile(r"^export ((?:async )?(?:function|const) )(\w+)", re.MULTILINE)
"""How the viewer's modules take names from each other, and give them."""
SCOPE = "module_"
STYLE = re.compile(r'<link rel="stylesheet" href="assets/([^"]+)">')
SCRIPT = re.compile(r'<script (?:defer|type="module") src="assets/([^"]+)"></script>')
DATA_MARK = "<!-- data -->"
POLICY_MARK = "<!-- policy -->"
MAX_TREES = 8
"""Trees that are taken if none are named."""
MAX_FIXED = 4
"""Problems that training fixed, likewise."""


def write_page(reader: RunReader, refs: list[str], file: Path) -> list[str]:
    """Write a page with the trees `refs`, or if there are none those of the newest saved step that
    have both right and wrong answers, the most mixed ones (without any, those by ticket), and
    problems that training fixed, before and after; returns what it holds.

    Raises:
        ValueError: a tree is not there, or the file cannot be written.
    """
    status = reader.status()
    if not refs and status.tree_steps:
        newest = status.tree_steps[-1]
        trees = reader.trees(newest)
        mixed = [tree for tree in trees if 0 < tree.value < 1]
        most = sorted(mixed or trees, key=lambda tree: abs(tree.value - 0.5) if mixed else 0)
        refs = [f"{newest}:{tree.ticket}" for tree in most[:MAX_TREES]]
        change = reader.change()
        for problem in change.fixed[:MAX_FIXED] if change else ():
            refs += problem.refs
    content = page(embedded(reader, refs))
    try:
        file.write_text(content, encoding="utf-8")
    except OSError as error:
        raise ValueError(f"--html {file}: {error.strerror}") from error
    return refs


def embedded(reader: RunReader, refs: list[str]) -> dict[str, object]:
    """What the page would ask the server for, by the request."""
    trees = [reader.tree(ref) for ref in refs]
    summaries = []
    for step in sorted({tree.step for tree in trees if tree.ticket is not None}):
        own = {tree.ticket for tree in trees if tree.step == step}
        summaries += [found for found in reader.trees(step) if found.ticket in own]
    return {
        "status": reader.status(),
        "curves": reader.curves(),
        "summaries": summaries,
        "trees": {tree.ref: tree for tree in trees},
        "texts": {
            tree.ref: reader.texts(tree.ref, list(range(len(tree.parent)))) for tree in trees
        },
        "change": _of_page(reader.change(), refs),
        "problems": [
            problem for problem in reader.problems() if len({*problem.refs} & {*refs}) > 1
        ],
    }


def _of_page(change: Change | None, refs: list[str]) -> Change | None:
    """A change with the problems alone that the page can show."""
    if change is None:
        return None
    shown = (problem for problem in change.fixed if {*problem.refs} <= {*refs})
    return replace(change, fixed=tuple(shown))


def page(data: dict[str, object]) -> str:
    """The page with all that it loads inside, and its data."""
    html = (ASSETS / "index.html").read_text()
    styles = [(ASSETS / name).read_text() for name in STYLE.findall(html)]
    scripts: list[str] = []

    def inline(match: re.Match[str]) -> str:
        name = match[1]
        is_module = 'type="module"' in match[0]
        content = joined(Path(name).stem) if is_module else (ASSETS / name).read_text()
        if "</script" in content.lower():
            raise ValueError(f"{name} cannot stand inside a page: it holds </script")
        scripts.append(content)
        kind = ' type="module"' if is_module else ""
        return f"<script{kind}>{content}</script>"

    html = STYLE.sub("", html)
    html = SCRIPT.sub(inline, html)
    policy = (
        f"default-src 'none'; script-src {' '.join(map(_hash, scripts))}; "
        f"style-src {_hash(_style(styles))}; img-src data:; base-uri 'none'; form-action 'none'"
    )
    meta = f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
    json = f'<script type="application/json" id="data">{to_json(data)}</script>'
    for mark, content in (
        (POLICY_MARK, f"{meta}\n<style>{_style(styles)}</style>"),
        (DATA_MARK, json),
    ):
        before, found, after = html.partition(mark)
        assert found, f"index.html lacks {mark}"
        html = before + content + after
    return html


def joined(module: str) -> str:
    """A module of the viewer behind those that it imports as one script, each in a scope of its
    own that gives what the module exports."""
    order: list[str] = []

    def visit(name: str) -> None:
        for _, imported in IMPORT.findall(_source(name)):
            if imported not in order:
                visit(imported)
        order.append(name)

    visit(module)
    *imported, last = (_in_scope(name) for name in order)
    scopes = zip(order, imported, strict=False)
    return "".join(f"const {SCOPE}{name} = (() => {{{body}}})();\n" for name, body in scopes) + last


def _in_scope(module: str) -> str:
    """A module's source with its imports taken from the scopes of others, and behind it what it
    gives to them."""
    source = _source(module)
    names = [name for _, name in EXPORT.findall(source)]
    body = EXPORT.sub(r"\1\2", IMPORT.sub(rf"const {{\1}} = {SCOPE}\2;\n", source))
    return f"{body}return {{ {', '.join(names)} }};\n" if names else body


def _source(module: str) -> str:
    return (ASSETS / f"{module}.js").read_text()


def _style(styles: list[str]) -> str:
    return "\n".join(styles)


def _hash(content: str) -> str:
    digest = hashlib.sha256(content.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
