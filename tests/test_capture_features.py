"""Features of the layers of torch models: what is kept, in which form, and that the model is left as it was."""

from __future__ import annotations

import warnings
from collections import OrderedDict

import numpy as np
import pytest

from jaxalign.interop import capture_features
from jaxalign.io import file_name

torch = pytest.importorskip("torch")
nn = torch.nn


class Block(nn.Module):
    """A layer whose output is a tuple, with an unused part."""

    def __init__(self, width):
        super().__init__()
        self.linear, self.dropout, self.unused = nn.Linear(width, width), nn.Dropout(0.5), nn.Linear(1, 1)

    def forward(self, x):
        return self.dropout(torch.relu(self.linear(x))) + x, None


class Network(nn.Module):
    """Tokens of width 6, eleven blocks, a mapping at the end."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block(6) for _ in range(11))
        self.norm, self.shared = nn.BatchNorm1d(6), nn.Identity()

    def forward(self, tokens, attention_mask=None):
        for block in self.blocks:
            tokens = self.shared(block(tokens)[0])
        normed = self.norm(tokens.mT).mT
        return OrderedDict(tokens=normed, pooled=normed.mean(1), labels=torch.zeros(len(tokens), dtype=torch.int64))


def seeded(make):
    torch.manual_seed(0)
    return make()


@pytest.fixture
def network():
    return seeded(Network)


def some(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def test_values_are_those_of_the_layers_in_evaluation_mode(network):
    x = some(10, 5, 6)
    found = capture_features(network, x, layers=["blocks.*", "norm"], batch_size=4)
    assert list(found) == [*(f"blocks.{k}" for k in range(11)), "norm"]
    network.eval()
    with torch.no_grad():
        expected = x
        for k, block in enumerate(network.blocks):
            expected = block(expected)[0]
            np.testing.assert_allclose(found[f"blocks.{k}"], expected, rtol=1e-5, atol=1e-6)
    # Channels of a normalised (b, c, t) output are its second axis: what comes out is what the layer put out.
    assert found["norm"].shape == (10, 6, 5)


def state_of(model):
    return [(m.training, len(m._forward_hooks)) for m in model.modules()], [
        t.clone() for t in model.state_dict().values()
    ]


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(network, fails):
    network.blocks[3].eval()  # a frozen part
    flags, weights = state_of(network)
    x = some(10, 5, 7 if fails else 6)
    if fails:
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            capture_features(network, x, layers="blocks.*")
    else:
        capture_features(network, x, layers="blocks.*")
    after, weights_after = state_of(network)
    assert after == flags
    assert all(map(torch.equal, weights, weights_after))


def test_a_pattern_is_one_part_of_a_name_or_any(network):
    x = some(4, 5, 6)
    assert list(capture_features(network, x, layers="blocks.1*")) == ["blocks.1", "blocks.10"]
    assert set(capture_features(network, x, layers="**.linear")) == {f"blocks.{k}.linear" for k in range(11)}
    assert list(capture_features(network, x, layers={"last": "blocks.10"})) == ["last"]
    with pytest.raises(ValueError, match="matches 11 layers"):
        capture_features(network, x, layers={"last": "blocks.*"})


def test_a_layer_that_does_not_exist_is_answered_with_those_that_do(network, unchecked_types):
    with pytest.raises(
        ValueError, match=r"no layer 'block\.3'\. Close to it: .*'blocks\.3'.*blocks\.\{0\.\.10\}\.linear"
    ):
        capture_features(network, some(4, 5, 6), layers="block.3")
    with pytest.raises(ValueError, match=r"no layer 'blocks'"):  # a list of modules is never called
        capture_features(network, some(4, 5, 6), layers="blocks")
    with pytest.raises(ValueError, match="layers is empty"):
        capture_features(network, some(4, 5, 6), layers=[])
    with pytest.raises(TypeError, match="names or patterns; got 3"):
        capture_features(network, some(4, 5, 6), layers=[3])


def test_layers_without_a_single_output_are_refused(network):
    with pytest.raises(ValueError, match=r"'blocks\.2\.unused' exists, but the forward pass did not call it"):
        capture_features(network, some(4, 5, 6), layers="blocks.2.unused")
    with pytest.raises(ValueError, match="'shared' is called 11 times"):
        capture_features(network, some(4, 5, 6), layers="shared")


def test_a_part_of_an_output(network):
    x = some(4, 5, 6)
    with pytest.raises(ValueError, match=r"'tokens': torch\.float32 of shape \(4, 5, 6\), 'pooled': .*say which"):
        capture_features(network, x, layers="")
    whole = capture_features(network, x, layers="", output="tokens")[""]
    pooled = capture_features(network, x, layers="", output="pooled")[""]
    np.testing.assert_allclose(pooled, whole.mean(1), rtol=1e-5, atol=1e-6)
    picked = capture_features(network, x, layers="", output=lambda out: out["pooled"] * 2)[""]
    np.testing.assert_array_equal(picked, 2 * pooled)
    with pytest.raises(ValueError, match="there is no part 'cls'"):
        capture_features(network, x, layers="", output="cls")
    with pytest.raises(TypeError, match=r"int64 of shape \(4,\), not a floating-point tensor"):
        capture_features(network, x, layers="", output="labels")


def test_what_is_kept_of_tokens(network):
    x = some(6, 5, 6)
    every = capture_features(network, x, layers="blocks.0")["blocks.0"]

    def kept(**options):
        return capture_features(network, x, layers="blocks.0", **options)["blocks.0"]

    np.testing.assert_array_equal(kept(prefix_tokens=1), every[:, 1:])
    np.testing.assert_allclose(kept(tokens="mean", prefix_tokens=2), every[:, 2:].mean(1), rtol=1e-6)
    np.testing.assert_array_equal(kept(tokens="max", prefix_tokens=1), every[:, 1:].max(1))
    np.testing.assert_array_equal(kept(tokens="first", prefix_tokens=1), every[:, 0])
    np.testing.assert_array_equal(kept(tokens="last"), every[:, -1])
    with pytest.raises(ValueError, match="no tokens beyond its 5"):
        kept(tokens="mean", prefix_tokens=5)


def test_padding_does_not_count(network):
    x, mask = some(3, 5, 6), torch.tensor([[1, 1, 1, 0, 0], [0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    every = capture_features(network, x, layers="blocks.0")["blocks.0"]
    inputs = {"tokens": x, "attention_mask": mask}
    real = mask.numpy().astype(bool)

    def kept(tokens):
        return capture_features(network, inputs, layers="blocks.0", tokens=tokens, batch_size=2)["blocks.0"]

    rows = list(zip(every, real, strict=True))
    np.testing.assert_allclose(kept("mean"), [row[r].mean(0) for row, r in rows], rtol=1e-6)
    np.testing.assert_array_equal(kept("max"), [row[r].max(0) for row, r in rows])
    np.testing.assert_array_equal(kept("first"), [row[r][0] for row, r in rows])
    np.testing.assert_array_equal(kept("last"), [row[r][-1] for row, r in rows])
    inputs["attention_mask"][0] = 0
    with pytest.raises(ValueError, match="a sample without any real token"):
        kept("mean")


def test_maps_and_patches_on_one_grid():
    x = some(5, 3, 12, 18)
    convolution = seeded(lambda: nn.Sequential(nn.Conv2d(3, 8, 3, padding=1)))
    found = capture_features(convolution, x, layers="0", grid=(4, 6))["0"]
    maps = convolution(x).detach()
    expected = nn.functional.interpolate(maps, (4, 6), mode="bilinear", antialias=True, align_corners=False)
    np.testing.assert_allclose(found, expected.flatten(2).mT, atol=1e-5)
    last = nn.Identity()
    moved = capture_features(last, maps.movedim(1, -1), layers="", channel_axis="last", grid=(4, 6))[""]
    np.testing.assert_allclose(moved, found, atol=1e-6)
    # Tokens of a square with one ahead are the same map.
    square = maps[..., :12]
    sequence = torch.cat([torch.zeros(5, 1, 8), square.flatten(2).mT], 1)
    tokens = capture_features(last, sequence, layers="", prefix_tokens=1, grid=(4, 4))[""]
    np.testing.assert_allclose(tokens, capture_features(last, square, layers="", grid=(4, 4))[""], atol=1e-6)
    with pytest.raises(ValueError, match=r"145 tokens after 0 prefix tokens, not the square .* prefix_tokens="):
        capture_features(last, sequence, layers="", grid=(4, 4))


def test_inputs_of_every_form(network):
    x = some(10, 5, 6)
    expected = capture_features(network, x, layers="blocks.4")["blocks.4"]
    dataset = torch.utils.data.TensorDataset(x, torch.arange(10))
    loader = torch.utils.data.DataLoader(dataset, batch_size=3)
    told = []
    for inputs, options in (
        (x.numpy(), {}),
        ((x,), {}),
        ({"tokens": x}, {"batch_size": 7}),
        ([x[:4], x[4:]], {}),
        ((batch for batch in (x[:9], x[9:])), {}),
        (loader, {"forward": lambda model, batch: model(batch[0]), "progress": lambda *said: told.append(said)}),
    ):
        np.testing.assert_allclose(
            capture_features(network, inputs, layers="blocks.4", **options)["blocks.4"], expected, rtol=1e-5, atol=1e-6
        )
    assert told == [("features", done, 10) for done in (3, 6, 9, 10)]


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        ({"a": some(3, 5, 6), "b": some(4, 5, 6)}, ValueError, r"agree in the number of samples .* \[3, 4\]"),
        ("a text", TypeError, "batches; got <class 'str'>"),
        (["a text"], TypeError, "hand out tensors.* got str"),
        ([], ValueError, "has no sample"),
        (3, TypeError, "got <class 'int'>"),
    ],
)
def test_inputs_that_are_none(network, inputs, error, message):
    with pytest.raises(error, match=message):
        capture_features(network, inputs, layers="blocks.0")


def test_outputs_that_are_not_samples_first():
    x = some(6, 5, 4)
    with pytest.raises(ValueError, match=r"put out shape \(30, 4\) for 6 samples"):
        capture_features(nn.Flatten(0, 1), x, layers="")
    with pytest.raises(ValueError, match=r"features of shape \(4, 4\) after ones of shape \(5, 4\)"):
        capture_features(nn.Identity(), [x, x[:, :4]], layers="")
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module.* got builtins\.int"):
        capture_features(3, x, layers="")


def test_half_precision_comes_back_as_float32_and_double_as_it_is():
    x = some(4, 3)
    half = capture_features(nn.Identity(), x.bfloat16(), layers="")[""]
    assert half.dtype == np.float32
    np.testing.assert_array_equal(half, x.bfloat16().float())
    assert capture_features(nn.Identity(), x.double(), layers="")[""].dtype == np.float64


def test_a_later_layer_that_works_in_place_does_not_show():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True))
    found = capture_features(model, some(40, 3), layers="*")
    assert found["0"].min() < 0 <= found["1"].min()


def test_straight_to_files(network, tmp_path):
    x = some(10, 5, 6)
    expected = capture_features(network, x, layers="blocks.*")
    found = capture_features(network, x, layers="blocks.*", out=tmp_path / "features", batch_size=3)
    for name, features in found.items():
        assert isinstance(features, np.memmap)
        assert not features.flags.writeable
        np.testing.assert_allclose(features, expected[name], rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(np.load(tmp_path / "features" / f"{name}.npy"), features)
    assert len(list((tmp_path / "features").iterdir())) == 11
    with pytest.raises(FileExistsError, match=r"blocks\.0\.npy exists"):
        capture_features(network, x, layers="blocks.0", out=tmp_path / "features")
    # What ends early leaves no file that looks complete, nor any other.
    with pytest.raises(ValueError, match="features of shape"):
        capture_features(network, [x, x[:, :4]], layers="blocks.1", out=tmp_path / "other")
    assert not list((tmp_path / "other").iterdir())


def test_file_names_are_ones_everywhere():
    assert file_name("") == "output"
    assert file_name("blocks.0/attn:0") == "blocks.0%2fattn%3a0"
    assert file_name("..") == "output"


def test_to_jax(network):
    import jax

    found = capture_features(network, some(4, 5, 6), layers="blocks.0", to="jax")["blocks.0"]
    assert isinstance(found, jax.Array)


@pytest.mark.parametrize(
    "options", [{"tokens": "cls"}, {"channel_axis": 1}, {"to": "torch"}, {"batch_size": 0}, {"prefix_tokens": -1}]
)
def test_options_are_checked(network, options, unchecked_types):
    name = next(iter(options))
    with pytest.raises(ValueError, match=name):
        capture_features(network, some(4, 5, 6), layers="blocks.0", **options)


def test_compiled_shared_and_scripted_models():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 4)
            self.alias = self.linear

        def forward(self, x):
            return torch.relu(self.alias(x))

    model, x = seeded(Shared), some(5, 3)
    expected = capture_features(model, x, layers=["linear", ""])
    np.testing.assert_array_equal(capture_features(model, x, layers="alias")["alias"], expected["linear"])
    compiled = torch.compile(model, backend="eager")
    np.testing.assert_allclose(capture_features(compiled, x, layers="")[""], expected[""], rtol=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.trace(model, x)
    with pytest.raises(TypeError, match=r"TorchScript .* give the torch\.nn\.Module"):
        capture_features(scripted, x, layers="")


def test_models_that_change_with_their_mode_are_not_changed():
    class Merging(nn.Linear):  # as adapters that are merged for evaluation
        def train(self, mode=True):
            super().train(mode)
            self.weight.data += 1
            return self

    model = nn.Sequential(Merging(3, 4))
    before = model[0].weight.data.clone()
    capture_features(model, some(5, 3), layers="0")
    assert torch.equal(model[0].weight, before)
    assert model[0].training


def test_what_a_batch_is_made_of_is_told(network):
    x = some(6, 5, 6)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, torch.arange(6)), batch_size=3)
    with pytest.raises(TypeError, match=r"forward=lambda model, batch: model\(batch\[0\]\)"):
        capture_features(nn.Linear(6, 2), loader, layers="")
    inputs = {"tokens": x, "attention_mask": torch.zeros(6, 5)}
    with pytest.raises(ValueError, match="attention_mask must be 1 or True"):
        capture_features(network, inputs, layers="blocks.0", tokens="mean")


def test_double_stays_double_on_another_grid():
    maps = some(4, 3, 8, 8).double()
    assert capture_features(nn.Identity(), maps, layers="", grid=(4, 4))[""].dtype == np.float64
    with pytest.raises(TypeError, match="is float64, but jax is set to 32 bits"):
        capture_features(nn.Identity(), maps, layers="", to="jax")
