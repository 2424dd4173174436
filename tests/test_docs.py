"""The Python in README.md and docs/ runs, block after block, as a reader would run it."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from benchmarks import page

import jaxalign

ROOT = Path(__file__).parent.parent
FILES = [ROOT / "README.md", *sorted((ROOT / "docs" / "pages").glob("*.md"))]
# What stands for the reader's own data where a page does not make its own.
BEFORE = {
    "alignment.md": """
import jax, jaxalign
key = jax.random.key(0)
features = {name: jax.random.normal(k, (340, 16)) for name, k in zip(("dino", "clip"), jax.random.split(key))}
""",
}
API = sorted((ROOT / "docs" / "pages" / "api").glob("*.md"))
# What a page shows, and what is run in its place, as it takes long: still more samples than are stored (2048), and as
# many for each of eight devices.
SMALLER = {
    "compare.md": {"permutations=999": "permutations=99", "permutations=199": "permutations=39"},
    "measures.md": {"permutations=999": "permutations=99"},
    "pairs.md": {"5000": "2400"},
    "scaling.md": {"(10_000, 64)": "(2400, 64)"},
}
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.mark.slow
@pytest.mark.usefixtures("usual_promotion")
@pytest.mark.parametrize("path", [p for p in FILES if BLOCK.search(p.read_text())], ids=lambda path: path.name)
def test_code_in_the_documentation_runs(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = BLOCK.findall(path.read_text())
    for shown, smaller in SMALLER.get(path.name, {}).items():
        assert any(shown in block for block in blocks)
        blocks = [block.replace(shown, smaller) for block in blocks]
    namespace = {}
    exec(BEFORE.get(path.name, ""), namespace)
    for block in blocks:
        exec(compile(block, path.name, "exec"), namespace)


@pytest.mark.slow
def test_worker_processes_as_the_faq_starts_them_do_not_hang(tmp_path):
    script = tmp_path / "workers.py"
    (code,) = (block for block in BLOCK.findall((ROOT / "docs/pages/faq.md").read_text()) if "multiprocessing" in block)
    script.write_text(code)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    first, both = done.stdout.splitlines()
    assert float(first) > 1
    assert len(set(both.strip("[]").split(", "))) == 2


def test_the_page_on_performance_is_what_was_measured():
    assert page.PAGE.read_text() == page.page(), "python -m tests.benchmarks.page"


def test_links_between_pages_lead_somewhere():
    for path in FILES:
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", path.read_text()):
            if not re.match(r"https?:", target):
                assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_everything_public_has_an_entry_in_the_api_pages():
    told = set(re.findall(r"^::: jaxalign\.([\w.]+)$", "\n".join(p.read_text() for p in API), re.MULTILINE))
    public = {name for name, value in vars(jaxalign).items() if inspect.isfunction(value) or inspect.isclass(value)}
    for module in (jaxalign.measures, jaxalign.losses, jaxalign.plots, jaxalign.sharding, jaxalign.interop):
        short = module.__name__.removeprefix("jaxalign.")
        named = (name for name, value in vars(module).items() if inspect.isfunction(value) and name[0] != "_")
        public |= {f"{short}.{name}" for name in named if vars(module)[name].__module__.startswith(module.__name__)}
    assert public - told == set()
