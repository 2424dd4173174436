"""The shape of the package: what imports what, what is public, what every docstring has."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import jax
import pytest

import jaxalign

PACKAGE = Path(jaxalign.__file__).parent
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")

# A module imports from lower layers only. What a layer is for stands in the docstring of its module.
LAYERS = [
    {"_linalg", "_numbers", "_repr", "_status", "_typing", "_version"},
    {"_arrays"},
    {"_checks", "_features"},
    {"_known_pairs", "_memory", "_positions"},
    {"plan"},
    {"core", "sharding"},
    {"_channels", "_directions", "_problem"},
    {"kernels"},
    {"distances", "bandwidth", "affinity", "pairs"},
    {"operators"},
    {"alignment", "measures"},
    {"_groups"},
    {"_permutations"},
    {"_aggregates", "_null", "_resampling"},
    {"_evidence", "_candidates"},
    {"_rounds"},
    {"matching"},
    {"files"},
    {"io", "streaming"},
    {"grid", "inference", "losses", "spectral"},
    {"scaling"},
    {"colors", "segments"},
]
# On top, for whoever does not only compute: the order among these is theirs.
OUTER = {"__main__", "_draw", "cli", "images", "plots", "report", "interop", "datasets"}
HEAVY = (
    "torch",
    "flax",
    "equinox",
    "transformers",
    "matplotlib",
    "tqdm",
    "scipy",
    "sklearn",
    "onnx",
    "onnxruntime",
    "PIL",
    "skimage",
    "h5py",
    "pyarrow",
)
PUBLIC = {name: value for name, value in vars(jaxalign).items() if inspect.isfunction(value)}


def module_of(path):
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def layer(name):
    if name in OUTER:
        return len(LAYERS)
    found = [i for i, names in enumerate(LAYERS) if name in names]
    assert found, f"jaxalign.{name} has no layer: add it to the table in {Path(__file__).name}"
    return found[0]


def imported_modules(path):
    """The first part below jaxalign of everything that a file of the package imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} line {node.lineno}: imports are absolute here"
            # `from jaxalign import _checks` names a module, `from jaxalign.pairs import Pairs` one too.
            names = [f"jaxalign.{alias.name}" for alias in node.names] if node.module == "jaxalign" else [node.module]
        else:
            continue
        yield from (name.split(".")[1] for name in names if name.startswith("jaxalign."))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_imports_point_downwards(path):
    here = layer(module_of(path))
    for name in imported_modules(path):
        if not (PACKAGE / name).exists() and not (PACKAGE / f"{name}.py").exists():  # a public name, not a module
            assert here == len(LAYERS), f"{path.name} takes {name} from jaxalign itself; take it from its module"
            continue
        below = layer(name)
        together = name == module_of(path) or here == below == len(LAYERS)
        assert below < here or together, f"{path.name} imports jaxalign.{name}, which is not below it"


def test_init_only_reexports():
    for node in ast.parse((PACKAGE / "__init__.py").read_text()).body:
        is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if is_docstring:
            continue
        assert isinstance(node, ast.ImportFrom), f"line {node.lineno}: only `from ... import X as X`"
        assert node.module.split(".")[0] == "jaxalign", f"line {node.lineno}: only what is of this package"
        for alias in node.names:
            assert alias.asname == alias.name, f"line {node.lineno}: {alias.name} without `as {alias.name}`"


def test_importing_the_package_imports_nothing_heavy():
    # In a new interpreter: this one has imported the tests.
    code = f"import sys, jaxalign; print([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent, check=True)
    assert done.stdout.strip() == "[]"


# Distributions whose name is not that of their module.
DISTRIBUTIONS = {"PIL": "pillow", "sklearn": "scikit-learn", "umap": "umap-learn"}
IMPORTED_LATER = {"_draw", "cli", "report"}  # by functions that draw, and by the command line
NAMED_IN_A_MESSAGE = {"pandas"}  # of `to_pandas` alone, which says what to install


def third_party(tree, *, nested):
    """Distributions that a module imports when it is imported itself, and with `nested` those it imports later."""
    nodes = list(ast.walk(tree))
    if not nested:
        later = {id(n) for f in nodes if isinstance(f, ast.FunctionDef) for n in ast.walk(f)}
        nodes = [node for node in nodes if id(node) not in later]
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    roots = {name.split(".")[0] for name in names} - sys.stdlib_module_names - {"jaxalign", ""}
    return {DISTRIBUTIONS.get(root, root) for root in roots}


def test_what_is_imported_is_what_is_required():
    file = PACKAGE.parent / "pyproject.toml"
    if not file.exists():  # an installed package, not the repository
        pytest.skip("no pyproject.toml beside the package")
    project = tomllib.loads(file.read_text())["project"]

    def names(requirements):
        return {re.match(r"[\w-]+", requirement)[0] for requirement in requirements}

    trees = {path: ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")}
    at_all = set().union(*(third_party(tree, nested=True) for tree in trees.values()))
    first = (tree for path, tree in trees.items() if module_of(path) not in IMPORTED_LATER)
    at_once = set().union(*(third_party(tree, nested=False) for tree in first))
    required, extras = names(project["dependencies"]), project["optional-dependencies"]
    assert at_once == required
    for_users = set().union(*(names(extras[name]) for name in extras if name not in ("test", "docs", "dev")))
    assert at_all - required - {"scipy"} <= for_users | NAMED_IN_A_MESSAGE  # jax requires scipy


def test_every_module_that_the_pages_document_is_exported():
    # One that is there only because another module imports it may be gone tomorrow.
    pages = PACKAGE.parent / "docs" / "pages" / "api"
    if not pages.exists():  # an installed package, not the repository
        pytest.skip("no docs beside the package")
    told = "".join(page.read_text() for page in pages.glob("*.md"))
    exported = {alias.name for node in ast.parse((PACKAGE / "__init__.py").read_text()).body
                if isinstance(node, ast.ImportFrom) for alias in node.names}  # fmt: skip
    assert set(re.findall(r"^::: jaxalign\.(\w+)", told, re.MULTILINE)) <= exported


def test_importing_the_package_starts_no_backend():
    # The number of devices, and whether there is a GPU, is for the program to set after its imports.
    code = "import jax, jaxalign; jax.config.update('jax_num_cpu_devices', 3); print(len(jax.devices('cpu')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent, check=True)
    assert done.stdout.strip() == "3"


def test_the_suite_has_its_eight_devices():
    # A setting changed by a file that is only collected (a benchmark, for its doctests) would spoil the sharding tests.
    assert len(jax.devices("cpu")) == 8


def test_there_is_something_public():
    assert {"rbf_affinity", "solve_sigma", "mean_density", "squared_distances"} <= set(PUBLIC)


@pytest.mark.parametrize("name", PUBLIC)
def test_docstring_says_what_goes_in_what_comes_out_and_what_goes_wrong(name):
    function = PUBLIC[name]
    doc = inspect.getdoc(function)
    assert doc, f"{name} has no docstring"
    for section in ("Args:", "Returns:", "Raises:", "Examples:"):
        assert f"\n{section}" in doc, f"{name}: no {section}"
    for parameter in inspect.signature(function).parameters:
        assert f"    {parameter}" in doc, f"{name}: {parameter} is not described"
    assert ">>>" in doc, f"{name}: the example is not one that runs"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_every_module_says_what_it_is_for(path):
    assert ast.get_docstring(ast.parse(path.read_text()))


@pytest.mark.parametrize("name", sorted(set().union(*LAYERS)))
def test_every_layer_of_the_table_exists(name):
    # Otherwise the table would rot.
    assert importlib.import_module(f"jaxalign.{name}")


def test_the_citation_is_of_this_version():
    citation = PACKAGE.parent / "CITATION.cff"
    if not citation.exists():  # an installed package, not the repository
        pytest.skip("no CITATION.cff beside the package")
    assert f"version: {jaxalign.__version__}\n" in citation.read_text()
