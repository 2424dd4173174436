"""The report of `jaxalign grid`: its models, words, tables and figures, and that they agree with the values."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import jax
import memory
import numpy as np
import pytest

import jaxalign
from jaxalign import cli, plots
from jaxalign._aggregates import aggregated
from jaxalign.kernels import RBF, Laplacian
from jaxalign.report import commands, exports, grids, models, words

pytest.importorskip("matplotlib", reason='figures: python -m pip install "jaxalign[viz]"')
pytestmark = pytest.mark.usefixtures("usual_promotion")

NAMES = ["a & b", "c_d", "e%", "f"]  # of models, with characters of LaTeX


def run(*arguments):
    return cli.main([str(one) for one in (*arguments, "--quiet")])


def save_models(folder, samples=60, names=NAMES):
    """Folders of one or two layers, of models that share more and more."""
    rng = np.random.default_rng(0)
    shared = rng.normal(size=(samples, 5))
    for k, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for layer in range(1, min(k, 1) + 2):
            x = shared @ rng.normal(size=(5, 7)) + 0.5 * (4 - k + layer) * rng.normal(size=(samples, 7))
            np.save(folder / name / f"layer {layer}.npy", x.astype(np.float32))
    return folder


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The folder of models, and the report of its four models."""
    folder = save_models(tmp_path_factory.mktemp("models") / "all")
    out = folder.parent / "out"
    options = ("--permutations", 99, "--resamples", 50, "--option", "kernel=linear")
    assert run("grid", folder, *options, "--out", out) == 0  # subfolders are models
    memory.WATCH.drop_programs(more=300)  # pairs of models with other numbers of layers have programs of their own
    return folder, out


def data_of(out):
    return json.loads((out / "grid.json").read_text())


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_four_models_are_compared_in_one_grid(report):
    folder, out = report
    data = data_of(out)
    assert [model["name"] for model in data["models"]] == NAMES
    layers = {f"{n}/{k}": x for n in NAMES for k, x in jaxalign.io.read_features(folder / n).items()}
    expected = jaxalign.compare_grid(layers, kernel="linear")
    assert data["rows"] == list(expected.rows)
    np.testing.assert_allclose(data["values"], expected.values, rtol=1e-5)
    assert jaxalign.ComparisonGrid.from_json(out / "grid.json").itself
    assert [pair["models"] for pair in data["pairs"]] == [[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]]
    for pair in data["pairs"]:
        x, y = ({k: v.values for k, v in jaxalign.io.read_features(folder / NAMES[i]).items()} for i in pair["models"])
        cells = np.asarray(jaxalign.compare_grid(x, y, kernel="linear").values)
        similarity = (cells.max(1).mean() + cells.max(0).mean()) / 2
        assert pair["similarity"] == pytest.approx(similarity, rel=1e-5)
        interval = jaxalign.bootstrap(
            x, y, kernel="linear", aggregate="symmetric_best", key=jax.random.key(0), resamples=50
        )
        assert interval.value == pytest.approx(similarity, rel=1e-5)
        np.testing.assert_allclose([pair["low"], pair["high"]], [interval.low, interval.high], rtol=1e-5)
        null = pair["aggregates"]["symmetric_best"]
        assert null["value"] == pytest.approx(similarity, rel=1e-5)
        assert 0.01 <= null["p_value"] <= 1
        assert data["similarities"][pair["models"][1]][pair["models"][0]] == pair["similarity"]


def test_files_are_those_of_the_manifest_and_force_removes_them(report, tmp_path):
    folder, out = report
    written = set(data_of(out)["written"])
    assert {path.name for path in out.iterdir()} == written | {"grid.json"}
    assert {"grid_c_d_f.tex", "grid_c_d_f.png", "models.pdf", "models.csv", "layers.pdf", "report.html"} <= written
    assert sum(name.startswith("grid_") for name in written) == 6 * 3
    for name in written:
        start = {".pdf": b"%PDF", ".png": b"\x89PNG"}.get(name[-4:], b"")
        assert (out / name).read_bytes().startswith(start)
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in out.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    one = ("grid", folder / "f", "--permutations", 0, "--option", "kernel=linear", "--out", copy)
    assert run(*one, "--force") == 0
    assert not [path.name for path in copy.iterdir() if path.name.startswith(("grid_", "models"))]


def test_csv_equals_the_json(report):
    _, out = report
    data = data_of(out)
    cells = rows_of(out / "grid.csv")
    assert [float(cell["cka"]) for cell in cells] == [v for row in data["values"] for v in row]
    assert [float(cell["corrected"]) for cell in cells] == [v for row in data["statistics"]["corrected"] for v in row]
    assert [f"{cell['row_model']}/{cell['row_layer']}" for cell in cells[:: len(data["columns"])]] == data["rows"]
    similarities = rows_of(out / "models.csv")
    assert [float(row["similarity"]) for row in similarities] == [pair["similarity"] for pair in data["pairs"]]
    assert [float(row["high"]) for row in similarities] == [pair["high"] for pair in data["pairs"]]
    table = {(c["row_model"], c["row_layer"], c["column_model"], c["column_layer"]): float(c["cka"]) for c in cells}
    matches = rows_of(out / "best_matches.csv")
    assert len(matches) == 3 * len(data["rows"])  # in every other model
    for match in matches:
        key = (match["model"], match["layer"], match["other_model"])
        others = {k[3]: v for k, v in table.items() if k[:3] == key}
        assert match["best_match"] == max(others, key=lambda name: others[name])
        assert float(match["cka"]) == pytest.approx(max(others.values()), rel=1e-5)
    order = [(match["model"], match["other_model"]) for match in matches]
    assert order == sorted(order, key=lambda pair: (NAMES.index(pair[0]), NAMES.index(pair[1])))


def test_latex_is_escaped_and_balanced(report):
    _, out = report
    paths = sorted(out.glob("*.tex"))
    assert len(paths) == 8
    for path in paths:
        lines = [line for line in path.read_text().splitlines() if not line.startswith("%")]
        text = "\n".join(lines)
        assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == 1
        assert re.sub(r"\\[{}]", "", text).count("{") == re.sub(r"\\[{}]", "", text).count("}")
        columns = len(re.search(r"\\begin\{tabular\}\{(\w+)\}", text)[1])
        body = [line for line in lines if line.endswith(r"\\")]
        assert len(body) > 1
        for line in body:
            assert len(re.findall(r"(?<!\\)&", line)) == columns - 1
            assert not re.search(r"(?<!\\)[%#_]", line)
    assert r"a \& b & 1.000 &" in (out / "models.tex").read_text()
    assert exports.escape("\\ ~ ^ $ # { } \x1b") == (
        r"\textbackslash{} \textasciitilde{} \textasciicircum{} \$ \# \{ \} \textbackslash{}x1b"
    )
    pair = (out / "grid_c_d_f.tex").read_text()
    data = data_of(out)
    number = f"{data['values'][1][5]:.3f}"  # of the first layers
    assert re.search(rf"layer 1 & \(?{re.escape(number)}\)? &", pair)


def test_names_of_files_can_be_read_by_latex():
    parts = exports.file_parts(["a & b", "A  b", "a-b", "c_d", "%", "é", "vit/b.16", "x" * 99])
    assert parts == ["a-b", "A-b-2", "a-b-3", "c_d", "model", "model-6", "vit-b.16", "x" * 60]


def test_the_page_holds_the_values_and_says_what_they_are(report):
    _, out = report
    data, page = data_of(out), (out / "report.html").read_text()
    shown = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page)[1])
    assert shown == {name: value for name, value in data.items() if name not in ("files", "written")}
    text = page.split("<h2>Files")[0]
    for phrase in (
        "60 samples", "CKA of inner products of centered features (linear kernel)", "The estimator is debiased",
        "99 permutations exchange the samples", "smallest attainable p-value is 0.01", "all 49 comparisons",
        "95% bootstrap intervals (BCa) from 50 resamples of samples",
    ):  # fmt: skip
        assert phrase in text
    assert "<title>CKA of a &amp; b, c_d, e% and f</title>" in page
    details = page.split("<details>")[2]
    for digest in data["provenance"]["sha256"].values():
        assert f"<td>{digest}</td>" in details
    assert f"<td>{data['versions']['jax']}</td>" in details
    assert page.count("data:image/png;base64,") == 2


@pytest.mark.parametrize(
    ("measure", "options", "expected"),
    [
        ("cka", {"kernel": RBF(density=0.1)}, "CKA of RBF affinities whose mean is 0.1. Larger"),
        ("cka", {"kernel": RBF(2.5), "estimator": "biased"}, "RBF affinities with sigma = 2.5"),
        ("cka", {"estimator": "biased"}, "The estimator is biased"),
        ("hsic", {"kernel": Laplacian(diagonal="include")}, "Laplacian affinities whose mean with the diagonal is"),
        ("mutual_knn", {"k": 7}, "Mutual knn (k = 7"),
        ("procrustes", {}, "Procrustes. Smaller values are more similar"),
        ("procrustes", {"normalize": False}, "Procrustes (normalize = False)"),
        ("rsa", {"comparison": "spearman"}, "comparison = spearman"),
        ("pwcca", {}, "The measure is not symmetric"),
    ],
)
def test_the_words_follow_the_options(measure, options, expected):
    assert expected in words.measure_words(measure, options)


def test_the_null_in_words():
    summary = {"permutations": 23, "samples": 100, "groups": 4, "what": "images or texts", "smallest_p_value": 1 / 24}
    summary["threshold"] = [[0.1]]
    assert "23 permutations exchange whole images or texts, 4 in all" in words.null_words(summary, 100, 9)
    assert "smallest attainable p-value is 0.0417" in words.null_words(summary, 100, 9)
    moved = {**summary, "what": "images that are flipped and rotated"}
    assert "flip and rotate the grid of each of 4 images, of 100 of the 400" in words.null_words(moved, 400, 9)
    assert "Calibrated values are 0 up to" in words.null_words(summary, 100, 9)
    assert "Values are not calibrated" in words.null_words({**summary, "threshold": [[np.nan]]}, 100, 9)
    assert words.null_words(None, 100, 9) == "No p-values (--permutations 0)."


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (("--measure", "procrustes"), "measure 'procrustes' with these options has no bootstrap"),
        (("--groups", "groups.txt"), "the bootstrap needs at least 10 groups; got 6"),
    ],
)
def test_a_report_without_intervals_says_why(options, problem, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(save_models(tmp_path, names=["a", "b", "c"]))
    (tmp_path / "groups.txt").write_text("\n".join(str(k // 10) for k in range(60)))
    assert run("grid", "a", "b", "c", "--permutations", 0, "--density", 0.2, *options, "--out", "out") == 0
    assert problem in capsys.readouterr().out
    data = data_of(tmp_path / "out")
    assert problem in data["words"]["intervals"]
    assert {pair["low"] for pair in data["pairs"]} == {None}
    assert all(row["low"] == "" for row in rows_of(tmp_path / "out" / "models.csv"))
    best = data["pairs"][0]["similarity"]
    cells = np.array(data["values"])[:1, 1:3]
    larger = data["direction"] == "similarity"
    assert best == pytest.approx(float(aggregated(cells, "symmetric_best", larger_is_better=larger)), rel=1e-6)


def test_a_measure_without_a_largest_value_has_no_map(tmp_path):
    save_models(tmp_path / "all", names=["a", "b", "c"])
    options = ("--measure", "hsic", "--option", "kernel=linear", "--permutations", 0, "--resamples", 0)
    assert run("grid", tmp_path / "all", *options, "--out", tmp_path / "out") == 0
    data = data_of(tmp_path / "out")
    assert data["words"]["map"] == ""
    assert data["similarities"][0][0] is None


def test_resamples_are_none_or_several(capsys):
    with pytest.raises(SystemExit):
        run("grid", "a", "b", "--resamples", 1, "--out", "out")
    assert "'1' is not 0, or a whole number from 2 to 100,000" in capsys.readouterr().err


def test_a_finished_report_is_not_computed_again(report, monkeypatch):
    folder, out = report
    monkeypatch.setattr(grids, "compare_grid", lambda *args, **kwargs: 1 / 0)
    options = ("--permutations", 99, "--option", "kernel=linear", "--out", out, "--resume")
    assert run("grid", folder, "--resamples", 50, *options) == 0
    with pytest.raises(ZeroDivisionError):  # another model
        run("grid", folder / "f", folder / "e%", "--option", "kernel=linear", "--out", out.parent / "other")


def test_layers_of_one_name_are_refused():
    def model(name, layer):
        return models.Model(name, Path(name), commands.Input({layer: np.ones((4, 2))}, {}, (), {}), 0)

    assert list(models.all_layers([model("a", "x"), model("b", "x")], "rows")) == ["a/x", "b/x"]
    with pytest.raises(ValueError, match="two layers have the same names"):
        models.all_layers([model("a", "b/x"), model("a/b", "x")], "rows")


def test_names_of_models(tmp_path):
    for run_name in ("first", "second"):
        save_models(tmp_path / run_name, names=["x"])
    paths = [tmp_path / "first" / "x", tmp_path / "second" / "x"]
    assert [model.name for model in models.read_models(paths, "samples")] == ["first/x", "second/x"]
    assert [model.name for model in models.read_models([paths[0], paths[0]], "samples")] == ["x", "x"]
    (alone,) = models.read_models([tmp_path / "first"], "samples")  # a folder of one model
    assert (alone.name, alone.layers) == ("x", ("layer 1",))


def test_a_model_named_twice_among_several(tmp_path, capsys):
    save_models(tmp_path, names=["a", "b"])
    paths = [tmp_path / "a", tmp_path / "b", tmp_path / "b" / ".." / "a"]
    assert run("grid", *paths, "--out", tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert re.search(r"inputs: .*a is named twice\. Name each model once\.\n$", said)
    assert run("grid", *paths[:2], "--permutations", 0, "--option", "kernel=linear", "--out", tmp_path / "out") == 0


@pytest.mark.usefixtures("unchecked_types")
def test_the_map_of_resamples_is_turned_onto_the_map():
    rng = np.random.default_rng(0)
    places = rng.normal(size=(5, 2))
    draws = places + 0.01 * rng.normal(size=(200, 5, 2))
    distances, resampled = (np.linalg.norm(x[..., :, None, :] - x[..., None, :, :], axis=-1) for x in (places, draws))
    ax = plots.models(distances, resampled=resampled)
    points = ax.lines[0].get_xydata()
    for point, ellipse in zip(points, ax.patches, strict=True):
        np.testing.assert_allclose(ellipse.center, point, atol=0.01)
        assert 0.01 < ellipse.width <= ellipse.height < 0.08  # of 4.9 standard deviations
    with pytest.raises(ValueError, match=r"resampled must have shape \(b, 5, 5\)"):
        plots.models(distances, resampled=distances)
