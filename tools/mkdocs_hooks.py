"""Hooks of mkdocs.yml: pages from outside docs/, the executed notebook, and links that hold in both places.

A link in the repository's Markdown is relative to its file, so that it works in a checkout. On the site it is
turned into a link to that file's page; a file that is no page, such as a module, is named without a link.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import nbformat
from mkdocs.structure.files import File, Files
from nbclient import NotebookClient
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = "examples/look_twice.ipynb"
PAGES = {  # of the site, by the file that they are made of
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "bench/LOG.md": "speed-log.md",
    "deploy/jetson/README.md": "jetson.md",
    "train/LOG.md": "training-log.md",
    NOTEBOOK: "look_twice.md",
}
LINK = re.compile(r"\[([^\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages from outside docs/."""
    for source, page in PAGES.items():
        if source != NOTEBOOK:
            files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    for name, content in _execute().items():
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn links to files of the repository into links to pages."""
    sources = {name: source for source, name in PAGES.items()}
    name = page.file.src_uri
    folder = (ROOT / sources.get(name, f"docs/{name}")).parent

    def link(found: re.Match[str]) -> str:
        text, target, anchor = found[1], found[2], found[3] or ""
        if ":" in target or name == PAGES[NOTEBOOK]:
            return found[0]
        path = Path(os.path.normpath(folder / target)).relative_to(ROOT).as_posix()
        if path.startswith("docs/"):
            path = path.removeprefix("docs/")
        elif path in PAGES:
            path = PAGES[path]
        elif (ROOT / path).exists():
            return text
        return f"[{text}]({os.path.relpath(path, Path(name).parent)}{anchor})"

    return LINK.sub(link, markdown)


def _execute() -> dict[str, str | bytes]:
    """The notebook's page and its pictures. Raises what a cell raises."""
    path = ROOT / NOTEBOOK
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(path.parent)}}).execute()
    text, resources = MarkdownExporter().from_notebook_node(notebook)
    return {PAGES[NOTEBOOK]: text, **resources["outputs"]}
