"""Generate docs/tutorial.ipynb from docs/tutorial.md: text as Markdown cells, commands as code cells.

Usage: python scripts/notebook.py [--check]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGE, NOTEBOOK = DOCS / "tutorial.md", DOCS / "tutorial.ipynb"
INDENT = "    "


def cells(page: str) -> list[tuple[str, str]]:
    """Split a page into ("markdown" or "code", text); each indented line is a command with its own cell."""
    found: list[tuple[str, str]] = []
    text: list[str] = []

    def end_text() -> None:
        if any(line.strip() for line in text):
            found.append(("markdown", "\n".join(text).strip()))
        text.clear()

    for line in page.splitlines():
        if line.startswith(INDENT):
            end_text()
            found.append(("code", in_a_cell(line.strip())))
        elif line.startswith("#"):
            end_text()
            text.append(line)
        else:
            text.append(line)
    end_text()
    return found


def in_a_cell(command: str) -> str:
    """Return a shell command in notebook syntax: pip runs in the kernel's environment, other commands in a shell."""
    return f"%{command}" if command.startswith("pip ") else f"!{command}"


def notebook(page: str) -> str:
    """Convert a page to notebook JSON, format 4.5."""
    made = []
    for number, (kind, text) in enumerate(cells(page)):
        cell: dict[str, Any] = {"cell_type": kind, "id": f"cell-{number}", "metadata": {}}
        if kind == "code":
            cell |= {"execution_count": None, "outputs": []}
        made.append(cell | {"source": text.splitlines(keepends=True)})
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return json.dumps({"cells": made, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}, indent=1) + "\n"


def main(words: list[str]) -> int:
    """Write the notebook, or with --check verify it; return the exit status."""
    made = notebook(PAGE.read_text(encoding="utf-8"))
    if words == ["--check"]:
        if NOTEBOOK.is_file() and NOTEBOOK.read_text(encoding="utf-8") == made:
            return 0
        print(f"{NOTEBOOK} does not match {PAGE}: run python scripts/notebook.py")
        return 1
    NOTEBOOK.write_text(made, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
