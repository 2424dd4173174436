"""Features of layers of models as they are written in the frameworks' own libraries, randomly initialised and small."""

from __future__ import annotations

import subprocess
import sys

import jax
import numpy as np
import pytest

import jaxalign
from jaxalign.interop import capture_features

pytestmark = [
    pytest.mark.usefixtures("usual_promotion"),
    # The frameworks' own: of what they import, and of options that they renamed.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]
RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(5, 3, 32, 32)).astype(np.float32)
ROWS = RNG.normal(size=(20, 8)).astype(np.float32)


# --- torch: transformers and diffusers -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def transformers():
    """The package, with torch."""
    pytest.importorskip("torch")
    module = pytest.importorskip("transformers", reason='networks: python -m pip install "jaxalign[networks]"')
    module.utils.logging.set_verbosity_error()
    return module


def test_dinov2(transformers):
    model = transformers.Dinov2Model(
        transformers.Dinov2Config(
            hidden_size=16, num_hidden_layers=3, num_attention_heads=2, image_size=32, patch_size=4
        )
    )
    found = capture_features(model, IMAGES, layers=["encoder.layer.*", ""], prefix_tokens=1, grid=(4, 4), batch_size=2)
    assert {name: features.shape for name, features in found.items()} == {
        "": (5, 16, 16),
        **{f"encoder.layer.{k}": (5, 16, 16) for k in range(3)},
    }
    # What the model returns as its hidden states is the same.
    import torch

    with torch.no_grad():
        states = model.eval()(torch.from_numpy(IMAGES), output_hidden_states=True).hidden_states
    whole = capture_features(model, IMAGES, layers="encoder.layer.*")
    for features, state in zip(whole.values(), states[1:], strict=True):
        np.testing.assert_allclose(features, state, rtol=1e-4, atol=1e-5)
    classes = capture_features(model, IMAGES, layers="layernorm", tokens="first")["layernorm"]
    np.testing.assert_allclose(classes, model(torch.from_numpy(IMAGES)).pooler_output.detach(), rtol=1e-4, atol=1e-5)


def test_sam(transformers):
    vision = transformers.SamVisionConfig(
        hidden_size=16, output_channels=8, num_hidden_layers=3, num_attention_heads=2, image_size=32, patch_size=4,
        window_size=4, global_attn_indexes=[2], num_pos_feats=8,
    )  # fmt: skip
    model = transformers.SamVisionModel(vision)
    layers = capture_features(model, IMAGES, layers="vision_encoder.layers.*", channel_axis="last", grid=(4, 4))
    assert {features.shape for features in layers.values()} == {(5, 16, 16)}
    neck = capture_features(model, IMAGES, layers=["vision_encoder.neck"])["vision_encoder.neck"]
    assert neck.shape == (5, 64, 8)
    # The network ends with its neck.
    output = capture_features(model, IMAGES, layers="")[""]
    np.testing.assert_allclose(neck, output, rtol=1e-4, atol=1e-5)
    # Windows come first in what windowed attention puts out: 4 a picture.
    with pytest.raises(ValueError, match=r"returned shape .* for 5 samples"):
        capture_features(model, IMAGES, layers="vision_encoder.layers.0.attn")


def test_clip_of_images_and_texts_at_once(transformers):
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**tower, "vocab_size": 100, "max_position_embeddings": 16, "bos_token_id": 1, "eos_token_id": 2}
    vision = {**tower, "image_size": 32, "patch_size": 8}
    model = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision))
    words = RNG.integers(3, 100, (5, 10))
    real = np.ones((5, 10), np.int64)
    real[2, 6:] = 0
    inputs = {"pixel_values": IMAGES, "input_ids": words, "attention_mask": real}
    found = capture_features(model, inputs, layers=["*_model.encoder.layers.*"], tokens="mean", batch_size=3)
    assert {features.shape for features in found.values()} == {(5, 16)}
    # A padded text has the features that it has alone: in causal attention padding after it is not seen.
    short = {key: value[2:3, :6] if value.ndim == 2 else value[2:3] for key, value in inputs.items()}
    alone = capture_features(model, short, layers="text_model.encoder.layers.1", tokens="mean")
    name = "text_model.encoder.layers.1"
    np.testing.assert_allclose(found[name][2:3], alone[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["CLIPVisionModel", "CLIPTextModel", "DINOv3ViTModel"])
def test_patterns_of_the_page_match_all_blocks(transformers, name):
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    model_class = getattr(transformers, name)
    model = model_class(model_class.config_class(**tower))
    images, words = RNG.normal(size=(2, 3, 224, 224)).astype(np.float32), RNG.integers(3, 100, (2, 10))
    pattern = "**layer.*" if name == "DINOv3ViTModel" else "**encoder.layers.*"
    found = capture_features(model, words if name == "CLIPTextModel" else images, layers=pattern, tokens="mean")
    assert [layer.split(".")[-2:] for layer in found] == [[pattern.split(".")[-2].strip("*"), f"{k}"] for k in range(3)]
    assert {features.shape for features in found.values()} == {(2, 16)}


def test_unet_of_stable_diffusion():
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers", reason='networks: python -m pip install "jaxalign[networks]"')
    model = diffusers.UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=12, norm_num_groups=4, attention_head_dim=4,
    )  # fmt: skip
    inputs = {"sample": torch.randn(5, 4, 16, 16), "encoder_hidden_states": torch.randn(5, 7, 12)}
    found = capture_features(
        model,
        inputs,
        layers=["down_blocks.*", "mid_block", "up_blocks.*", ""],  # a dataclass of one tensor; a tuple; tensors
        forward=lambda unet, batch: unet(timestep=261, **batch),
        grid=(8, 8),
    )
    assert {name: features.shape[1:] for name, features in found.items()} == {
        "": (64, 4),
        "down_blocks.0": (64, 8),
        "down_blocks.1": (64, 16),
        "mid_block": (64, 16),
        "up_blocks.0": (64, 16),
        "up_blocks.1": (64, 8),
    }


def test_timm():
    timm = pytest.importorskip("timm", reason="timm needs a torchvision that belongs to the torch at hand")
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, embed_dim=16, num_heads=2)
    found = capture_features(model, IMAGES, layers="blocks.*", prefix_tokens=model.num_prefix_tokens, grid=(4, 4))
    assert {features.shape for features in found.values()} == {(5, 16, 16)}


# --- jax: Flax NNX and Linen, Equinox --------------------------------------------------------------------------------


def test_flax_nnx():
    nnx = pytest.importorskip("flax.nnx", reason='python -m pip install "jaxalign[flax]"')

    class Block(nnx.Module):
        def __init__(self, rngs):
            self.linear, self.norm = nnx.Linear(8, 8, rngs=rngs), nnx.BatchNorm(8, rngs=rngs)
            self.dropout, self.unused = nnx.Dropout(0.5, rngs=rngs), nnx.Linear(1, 1, rngs=rngs)

        def __call__(self, x):
            return x + self.dropout(jax.nn.relu(self.norm(self.linear(x))))

    class Network(nnx.Module):
        def __init__(self, rngs):
            self.blocks = nnx.List([Block(rngs) for _ in range(11)])
            self.head = nnx.Linear(8, 2, rngs=rngs)

        def __call__(self, x):
            for block in self.blocks:
                x = block(x)
            return {"logits": self.head(x), "number": 3}

    model = Network(nnx.Rngs(0))
    before = jax.tree.map(np.asarray, nnx.state(model, nnx.Param, nnx.BatchStat))
    found = capture_features(model, ROWS, layers=["blocks.*", "**.linear", ""], batch_size=8)
    assert list(found)[:3] == ["", "blocks.0", "blocks.0.linear"]
    assert list(found)[-2:] == ["blocks.10", "blocks.10.linear"]
    jax.tree.map(np.testing.assert_array_equal, before, nnx.state(model, nnx.Param, nnx.BatchStat))
    assert not model.blocks[0].dropout.deterministic  # still in training
    with pytest.raises(ValueError, match=r"no layer 'block\.1'.*blocks\.\{0\.\.10\}\.norm"):
        capture_features(model, ROWS, layers="block.1")
    with pytest.raises(ValueError, match="did not call it"):
        capture_features(model, ROWS, layers="blocks.0.unused")
    assert "hearing" not in nnx.Linear.__call__.__qualname__
    model.eval()
    expected = ROWS
    for k, block in enumerate(model.blocks):
        expected = block(expected)
        np.testing.assert_allclose(found[f"blocks.{k}"], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found[""], model(ROWS)["logits"], rtol=1e-4, atol=1e-5)


def test_flax_linen():
    linen = pytest.importorskip("flax.linen", reason='python -m pip install "jaxalign[flax]"')

    class Network(linen.Module):
        @linen.compact
        def __call__(self, x):
            x = linen.Conv(4, (3, 3), name="first")(x)
            x = linen.BatchNorm(use_running_average=True)(x)
            return linen.Dense(5)(linen.relu(x))

    images = np.moveaxis(IMAGES, 1, -1)
    model = Network()
    variables = model.init(jax.random.key(0), images)
    found = capture_features(model.bind(variables), images, layers=["**", ""], grid=(4, 4), batch_size=3)
    assert {name: features.shape for name, features in found.items()} == {
        "": (5, 16, 5),
        "BatchNorm_0": (5, 16, 4),
        "Dense_0": (5, 16, 5),
        "first": (5, 16, 4),
    }
    whole = capture_features(model.bind(variables), images, layers="first")["first"]
    _, kept = model.apply(variables, images, capture_intermediates=True)
    np.testing.assert_allclose(
        whole.reshape(5, 32, 32, 4), kept["intermediates"]["first"]["__call__"][0], rtol=1e-4, atol=1e-5
    )
    with pytest.raises(TypeError, match=r"pass module\.bind\(variables\)"):
        capture_features(model, images, layers="first")


def test_equinox():
    equinox = pytest.importorskip("equinox", reason='python -m pip install "jaxalign[equinox]"')
    keys = jax.random.split(jax.random.key(0), 2)
    model = equinox.nn.MLP(8, 4, 16, 2, key=keys[0])
    found = capture_features(model, ROWS, layers=["layers.*", ""], batch_size=8)
    assert {name: features.shape[1] for name, features in found.items()} == {
        "": 4,
        "layers.0": 16,
        "layers.1": 16,
        "layers.2": 4,
    }
    np.testing.assert_allclose(found["layers.0"], jax.vmap(model.layers[0])(ROWS), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found[""], jax.vmap(model)(ROWS), rtol=1e-4, atol=1e-5)
    convolution = equinox.nn.Sequential(
        [equinox.nn.Conv2d(3, 4, 3, padding=1, key=keys[1]), equinox.nn.Lambda(jax.nn.relu), equinox.nn.Dropout(0.5)]
    )
    maps = capture_features(convolution, IMAGES, layers="**", tokens="mean")  # channels first, as there
    assert maps["layers.0"].shape == (5, 4)
    np.testing.assert_array_equal(maps["layers.1"], maps["layers.2"])  # no dropout in evaluation mode
    assert (maps["layers.1"] > maps["layers.0"]).all()


def test_layers_inside_a_transformation_are_refused_in_words():
    equinox = pytest.importorskip("equinox")

    class Tokens(equinox.Module):
        linear: equinox.nn.Linear

        def __call__(self, x, scale=1.0):
            return jax.vmap(self.linear)(x) * scale

    model = Tokens(equinox.nn.Linear(8, 4, key=jax.random.key(0)))
    x = np.ones((3, 5, 8), np.float32)
    with pytest.raises(ValueError, match="'linear' is called inside a transformation"):
        capture_features(model, x, layers="linear")
    whole = capture_features(model, x, layers="")[""]
    assert whole.shape == (3, 5, 4)
    twice = capture_features(model, {"x": x, "scale": np.float32(2)}, layers="")[""]  # of all samples
    np.testing.assert_allclose(twice, 2 * whole, rtol=1e-6)


def test_classes_that_inherit_their_call_are_heard_once():
    nnx = pytest.importorskip("flax.nnx")

    class Inherits(nnx.Linear):
        pass

    class Calls(nnx.Linear):
        def __call__(self, x):
            return super().__call__(x) + 1

    class Network(nnx.Module):
        def __init__(self, rngs):
            self.a, self.b, self.c = (kind(8, 8, rngs=rngs) for kind in (nnx.Linear, Inherits, Calls))

        def __call__(self, x, train):
            assert not train  # a flag of Python, not traced
            return self.c(self.b(self.a(x)))

    model = Network(nnx.Rngs(0))
    torch = pytest.importorskip("torch") if "torch" in sys.modules else None
    rows = ROWS if torch is None else torch.from_numpy(ROWS)
    found = capture_features(model, {"x": rows, "train": False}, layers=["a", "b", "c"])
    np.testing.assert_allclose(found["c"], model.c(found["b"]), rtol=1e-4, atol=1e-5)


def test_layers_of_two_networks_go_into_a_grid():
    equinox = pytest.importorskip("equinox")
    a, b = (equinox.nn.MLP(8, 4, 16, 2, key=jax.random.key(k)) for k in range(2))
    rows = np.random.default_rng(1).normal(size=(60, 8)).astype(np.float32)
    grid = jaxalign.compare_grid(*(capture_features(model, rows, layers="layers.*") for model in (a, b)))
    assert grid.values.shape == (3, 3)
    assert np.isfinite(grid.values).all()


def test_none_of_the_frameworks_is_imported_for_it():
    heavy = ("torch", "flax", "equinox", "transformers")
    code = f"import sys, jaxalign; jaxalign.interop.capture_features; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
