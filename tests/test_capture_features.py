"""Features of the layers of torch models: what is kept, in which form, and that the model is left as it was."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from functools import partial

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
    with pytest.raises(ValueError, match=r"'tokens': torch\.float32 of shape \(4, 5, 6\), 'pooled': .*choose a part"):
        capture_features(network, x, layers="")
    whole = capture_features(network, x, layers="", output="tokens")[""]
    pooled = capture_features(network, x, layers="", output="pooled")[""]
    np.testing.assert_allclose(pooled, whole.mean(1), rtol=1e-5, atol=1e-6)
    picked = capture_features(network, x, layers="", output=lambda out: out["pooled"] * 2)[""]
    np.testing.assert_array_equal(picked, 2 * pooled)
    with pytest.raises(ValueError, match="has no part 'cls' in its output"):
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
    # Not to the last digit: products in batches of another size are rounded in another order.
    close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    close(kept("mean"), [row[r].mean(0) for row, r in rows])
    close(kept("max"), [row[r].max(0) for row, r in rows])
    close(kept("first"), [row[r][0] for row, r in rows])
    close(kept("last"), [row[r][-1] for row, r in rows])
    inputs["attention_mask"][0] = 0
    with pytest.raises(ValueError, match="a sample without any valid token"):
        kept("mean")


def test_maps_and_patches_on_one_grid():
    x = some(5, 3, 12, 18)
    convolution = seeded(lambda: nn.Sequential(nn.Conv2d(3, 8, 3, padding=1)))
    found = capture_features(convolution, x, layers="0", grid=(4, 6))["Sequential.0"]
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
    with pytest.raises(ValueError, match=r"145 tokens after 0 prefix tokens, which is not a square .* prefix_tokens="):
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
        (["a text"], TypeError, "batches of inputs must be tensors.* got str"),
        ([], ValueError, "has no samples"),
        (3, TypeError, "got <class 'int'>"),
    ],
)
def test_inputs_that_are_none(network, inputs, error, message):
    with pytest.raises(error, match=message):
        capture_features(network, inputs, layers="blocks.0")


def test_outputs_that_are_not_samples_first():
    x = some(6, 5, 4)
    with pytest.raises(ValueError, match=r"returned shape \(30, 4\) for 6 samples"):
        capture_features(nn.Flatten(0, 1), x, layers="")
    with pytest.raises(ValueError, match=r"features of shape \(4, 4\) in one batch and \(5, 4\) in others"):
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
    assert found["Sequential.0"].min() < 0 <= found["Sequential.1"].min()


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
    with pytest.raises(TypeError, match=r"TorchScript .* pass the torch\.nn\.Module"):
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
    with pytest.raises(ValueError, match="attention_mask must be integer or boolean"):
        capture_features(network, inputs, layers="blocks.0", tokens="mean")


def test_double_stays_double_on_another_grid():
    maps = some(4, 3, 8, 8).double()
    assert capture_features(nn.Identity(), maps, layers="", grid=(4, 4))[""].dtype == np.float64
    with pytest.raises(TypeError, match="is float64, but JAX uses 32 bits"):
        capture_features(nn.Identity(), maps, layers="", to="jax")


# --- names, and the order of samples ----------------------------------------------------------------------------------


def test_layers_that_are_numbers_have_the_class_of_the_model_ahead(tmp_path):
    model = nn.Sequential(nn.Sequential(nn.Linear(3, 4), nn.ReLU()), nn.Linear(4, 5))
    x = some(6, 3)
    found = capture_features(model, x, layers="**")
    assert list(found) == ["Sequential.0", "Sequential.0.0", "Sequential.0.1", "Sequential.1"]
    for layers in (
        "0.1",
        "Sequential.0.1",
        ["Sequential.0.1"],
        "0.*1",
        "Sequential.*.1",
    ):  # as torch names it, or we do
        again = capture_features(model, x, layers=layers)
        assert list(again) == ["Sequential.0.1"]
        np.testing.assert_array_equal(again["Sequential.0.1"], found["Sequential.0.1"])
    assert list(capture_features(model, x, layers={"1": "1", "a": "Sequential.0"})) == ["1", "a"]  # own names stay
    capture_features(model, x, layers="1", out=tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["Sequential.1.npy"]
    with pytest.raises(ValueError, match=r"no layer '7'.*\{0\.\.1\}"):
        capture_features(model, x, layers="7")


data = torch.utils.data
DATASET = data.TensorDataset(some(40, 3))


class Shuffled(data.Sampler):
    """Of a library of its own."""

    def __iter__(self):
        return iter(torch.randperm(40))

    def __len__(self):
        return 40


class ShuffledBatches(data.BatchSampler):
    """Batches in random order."""

    def __iter__(self):
        return iter([list(super(ShuffledBatches, self).__iter__())[k] for k in torch.randperm(len(self))])


class Stream(data.IterableDataset):
    """Samples in an order of their own."""

    def __iter__(self):
        return iter(DATASET)


def loader(**options):
    return data.DataLoader(options.pop("dataset", DATASET), **({"batch_size": 8} | options))


RANDOM = {
    "shuffle": lambda: loader(shuffle=True),
    "seeded": lambda: loader(shuffle=True, generator=torch.Generator().manual_seed(0)),
    "subset": lambda: loader(sampler=data.SubsetRandomSampler(range(20))),
    "weighted": lambda: loader(sampler=data.WeightedRandomSampler([1.0] * 40, 40)),
    "batches": lambda: loader(
        batch_sampler=data.BatchSampler(data.RandomSampler(DATASET), 8, False), batch_size=1, shuffle=False
    ),
    "no batches": lambda: loader(batch_size=None, sampler=data.BatchSampler(data.RandomSampler(DATASET), 8, False)),
    "distributed": lambda: loader(sampler=data.DistributedSampler(DATASET, 2, 0, shuffle=True)),
    "another": lambda: loader(sampler=Shuffled()),
    "batches of another": lambda: loader(
        batch_sampler=ShuffledBatches(data.SequentialSampler(DATASET), 8, False), batch_size=1
    ),
    "as workers are ready": lambda: loader(num_workers=2, in_order=False),
}


@pytest.mark.parametrize("kind", RANDOM)
def test_an_order_that_differs_from_network_to_network_is_refused(kind):
    with pytest.raises(
        ValueError, match=r"row i would be a different sample.*shuffle=False.*Subset\(dataset, indices\)"
    ):
        capture_features(nn.Identity(), RANDOM[kind](), layers="")


IN_ORDER = {
    "plain": loader,
    "the way out": lambda: loader(dataset=data.Subset(DATASET, torch.randperm(40).tolist()), shuffle=False),
    "distributed": lambda: loader(sampler=data.DistributedSampler(DATASET, 2, 0, shuffle=False)),
    "another": lambda: loader(sampler=[3, 1, 2] * 10),
    "once": lambda: loader(sampler=iter(range(40))),
    "stream": lambda: loader(dataset=Stream()),
    "batches": lambda: loader(batch_sampler=data.BatchSampler(data.SequentialSampler(DATASET), 8, True), batch_size=1),
}


@pytest.mark.parametrize("kind", IN_ORDER)
def test_an_order_that_is_the_same_for_every_network_is_taken(kind):
    torch.manual_seed(3)
    inputs = IN_ORDER[kind]()
    before = torch.get_rng_state()
    first = list(inputs) if kind != "once" else [[DATASET.tensors[0]]]
    torch.set_rng_state(before)
    found = capture_features(nn.Identity(), inputs, layers="", forward=lambda model, batch: model(batch[0]))
    np.testing.assert_array_equal(found[""], torch.cat([batch[0] for batch in first]))
