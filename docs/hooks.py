"""Pages of the site for the examples. In the repository, links lead to the scripts; on the site, to these pages."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
WIDE = "---\nhide: [toc]\n---"  # without the table of contents, 120 characters of code fit


def on_files(files: Files, config: Any) -> Files:
    """Add a page for each example and notebook, for the changelog, and for the licenses of the data."""
    for path in sorted((ROOT / "examples").glob("*.py")):
        source = path.read_text()
        title = (ast.get_docstring(ast.parse(source)) or path.stem).splitlines()[0].rstrip(".")
        content = f"{WIDE}\n\n# {path.stem}\n\n{title}.\n\n````python\n{source}````\n"
        files.append(File.generated(config, f"examples/{path.stem}.md", content=content))
    for path in sorted((ROOT / "examples" / "notebooks").glob("*.ipynb")):
        cells = ((cell["cell_type"], "".join(cell["source"])) for cell in json.loads(path.read_text())["cells"])
        parts = [WIDE] + [text if kind == "markdown" else f"````python\n{text}\n````" for kind, text in cells]
        files.append(File.generated(config, f"examples/notebooks/{path.stem}.md", content="\n\n".join(parts) + "\n"))
    for name, path in (("changelog", ROOT / "CHANGELOG.md"), ("data", ROOT / "jaxalign" / "data" / "README.md")):
        files.append(File.generated(config, f"{name}.md", content=path.read_text()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Replace links to files of the repository by links to their pages."""
    up = "../" * page.file.src_uri.count("/")
    markdown = re.sub(r"\]\((?:\.\./)+examples/(\w+)\.py\)", rf"]({up}examples/\1.md)", markdown)
    markdown = re.sub(
        r"\]\((?:(?:\.\./)+examples/notebooks/)?(\w+)\.ipynb\)", rf"]({up}examples/notebooks/\1.md)", markdown
    )
    markdown = re.sub(r"\]\((?:\.\./)+CHANGELOG\.md\)", rf"]({up}changelog.md)", markdown)
    return re.sub(r"\]\((?:\.\./)+jaxalign/data/README\.md\)", rf"]({up}data.md)", markdown)
