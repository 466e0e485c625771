"""Pages of HTML read back: their structure by Python's parser, what their scripts do in Node."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

IN_NODE = Path(__file__).with_name("page_in_node.js")
VOID = {"meta", "link", "input", "img", "br"}
Tree = list[Any]


class _Reader(HTMLParser):
    """Builds [tag, attributes, children]; every element has to be closed in its turn."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[Tree] = [["#root", {}, []]]

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        element: Tree = [tag, dict(attributes), []]
        assert len(element[1]) == len(attributes), f"<{tag}>: an attribute twice"
        self.open[-1][2].append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1][0] == tag, f"</{tag}> closes <{self.open[-1][0]}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.open[-1][2].append(data)


def read_page(path: Path) -> Tree:
    """The element ``html``; fails where elements are not closed in their turn."""
    reader = _Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    reader.close()
    assert len(reader.open) == 1, f"not closed: {[element[0] for element in reader.open[1:]]}"
    return next(child for child in reader.open[0][2] if child[0] == "html")


def elements(tree: Tree, tag: str | None = None) -> Iterator[Tree]:
    for child in tree[2]:
        if not isinstance(child, str):
            if tag in (None, child[0]):
                yield child
            yield from elements(child, tag)


def block(tree: Tree, name: str) -> Any:
    """The data of a page."""
    (script,) = [one for one in elements(tree, "script") if one[1].get("id") == name]
    return json.loads("".join(script[2]))


def check_structure(tree: Tree) -> None:
    """What makes a page fit for a keyboard, a screen reader and a place without network."""
    assert tree[1]["lang"] == "en"
    ids = [one[1]["id"] for one in elements(tree) if "id" in one[1]]
    assert len(ids) == len(set(ids))
    labelled = {one[1]["for"] for one in elements(tree, "label")}
    assert {one[1]["id"] for one in elements(tree, "input")} <= labelled
    assert all("".join(one[2]).strip() for one in elements(tree, "button"))
    assert sum(1 for _ in elements(tree, "h1")) == sum(1 for _ in elements(tree, "main")) == 1
    assert [one for one in elements(tree, "caption")]
    policy = {one[1].get("http-equiv"): one[1]["content"] for one in elements(tree, "meta") if "content" in one[1]}
    assert policy["Content-Security-Policy"].startswith("default-src 'none'; img-src 'self' file: data:;")
    for one in elements(tree):
        # Links within the page's folder alone; no style or script from elsewhere.
        for name in {"src", "href", "srcset", "action", "poster", "background"} & one[1].keys():
            assert ":" not in one[1][name] or one[1][name].startswith("data:"), one
            assert not one[1][name].startswith("//"), one
        assert not [name for name in one[1] if name.startswith("on")], one
    text = " ".join(piece for one in elements(tree) for piece in one[2] if isinstance(piece, str))
    assert "not for clinical use" in text
    for asks in ("fetch(", "XMLHttpRequest", "WebSocket", "sendBeacon", "EventSource", "@import", "url(", "innerHTML"):
        assert asks not in text
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text


def in_node(tree: Tree, scenario: str, folder: Path) -> Any:
    """What a scenario returns, the body of a function of JavaScript that sees the page; skips where there is no Node.

    Beside ``document``, ``window`` and ``location`` it has ``rows()``, the names in the table as shown, and
    ``key(name)``, a key pressed.
    """
    node = shutil.which("node")
    if node is None:
        pytest.skip("no Node")
    (folder / "tree.json").write_text(json.dumps(tree))
    (folder / "scenario.js").write_text(scenario)
    command = [node, str(IN_NODE), str(folder / "tree.json"), str(folder / "scenario.js")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)
