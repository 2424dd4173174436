"""The example that compares published networks: everything but their weights, with small random networks of theirs."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import helpers
import numpy as np
import pytest

import jaxalign

pytest.importorskip("matplotlib", reason='the examples draw: python -m pip install "jaxalign[viz]"')
Image = pytest.importorskip("PIL.Image", reason='networks: python -m pip install "jaxalign[networks]"')
torch = pytest.importorskip("torch", reason='networks: python -m pip install "jaxalign[networks]"')
safetensors = pytest.importorskip("safetensors.torch", reason='networks: python -m pip install "jaxalign[networks]"')
transformers = pytest.importorskip("transformers", reason='networks: python -m pip install "jaxalign[networks]"')
diffusers = pytest.importorskip("diffusers", reason='networks: python -m pip install "jaxalign[networks]"')
pytestmark = [
    pytest.mark.usefixtures("usual_promotion"),
    # The frameworks' own: of what they import, and of options that they renamed.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]
GRID = (32, 32)
TOWER = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
MODELS = ["sam", "dinov2", "dinov3", "dinov3-timm", "clip", "sd"]
CHANNELS = {"sam": 8, "dinov2": 16, "dinov3": 16, "dinov3-timm": 16, "clip": 16, "sd": 16}


# --- small random networks, as files of the names and geometry that the published ones have --------------------------


def save_sam(folder):
    vision = transformers.SamVisionConfig(
        **{**TOWER, "intermediate_size": None}, mlp_dim=16, num_hidden_layers=2, image_size=1024, patch_size=16,
        output_channels=8, window_size=14, global_attn_indexes=[1], num_pos_feats=4, initializer_range=0.02,
    )  # fmt: skip
    prompt = {"hidden_size": 8, "mask_input_channels": 4}
    decoder = {"hidden_size": 8, "mlp_dim": 8, "num_attention_heads": 2, "iou_head_hidden_dim": 8}
    config = transformers.SamConfig(
        vision_config=vision.to_dict(), prompt_encoder_config=prompt, mask_decoder_config=decoder
    )
    transformers.SamModel(config).save_pretrained(folder)


def save_dinov2(folder):
    config = transformers.Dinov2Config(
        hidden_size=16, mlp_ratio=1, num_attention_heads=2, num_hidden_layers=2, image_size=518, patch_size=14
    )
    transformers.Dinov2Model(config).save_pretrained(folder)


def save_dinov3(folder):
    config = transformers.DINOv3ViTConfig(**TOWER, num_hidden_layers=2, patch_size=16, num_register_tokens=4)
    transformers.DINOv3ViTModel(config).save_pretrained(folder)


def save_dinov3_timm(folder):
    timm = pytest.importorskip("timm", reason="timm needs a torchvision that belongs to the torch at hand")
    options = {"depth": 2, "embed_dim": 16, "num_heads": 2, "mlp_ratio": 1}
    model = timm.create_model("vit_small_patch16_dinov3", pretrained=False, num_classes=0, **options)
    timm.models.save_for_hf(model, folder, model_args=options)


def save_clip(folder):
    vision = {**TOWER, "num_hidden_layers": 12, "image_size": 224, "patch_size": 16}
    text = {**TOWER, "num_hidden_layers": 1, "vocab_size": 100, "max_position_embeddings": 8}
    config = transformers.CLIPConfig(vision_config=vision, text_config=text, projection_dim=8)
    transformers.CLIPModel(config).save_pretrained(folder)


def save_sd(folder):
    norm = {"layers_per_block": 1, "norm_num_groups": 4}
    diffusers.AutoencoderKL(
        block_out_channels=(4, 4, 4, 8), down_block_types=("DownEncoderBlock2D",) * 4, latent_channels=4, **norm,
        up_block_types=("UpDecoderBlock2D",) * 4, sample_size=512,
    ).save_pretrained(folder / "vae")  # fmt: skip
    diffusers.UNet2DConditionModel(
        sample_size=64, block_out_channels=(8, 12, 16, 20), cross_attention_dim=12, attention_head_dim=4, **norm
    ).save_pretrained(folder / "unet")
    diffusers.PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
    ).save_pretrained(folder / "scheduler")
    config = transformers.CLIPTextConfig(
        **{**TOWER, "hidden_size": 12}, num_hidden_layers=1, vocab_size=10, bos_token_id=0, eos_token_id=2
    )
    text = transformers.CLIPTextModel(config)
    # As in the published files: weights have the names of transformers 4, the tokenizer has two lists.
    weights = {f"text_model.{name.removeprefix('text_model.')}": value for name, value in text.state_dict().items()}
    config.save_pretrained(folder / "text_encoder")
    safetensors.save_file(weights, folder / "text_encoder" / "model.safetensors", {"format": "pt"})
    (folder / "tokenizer").mkdir()
    vocabulary = {"a</w>": 0, "<|startoftext|>": 1, "<|endoftext|>": 2}
    options = {"model_max_length": 77, "tokenizer_class": "CLIPTokenizer", "pad_token": "<|endoftext|>"}
    for name, text in {
        "vocab.json": json.dumps(vocabulary),
        "merges.txt": "#version: 0.2\n",
        "tokenizer_config.json": json.dumps(options),
    }.items():
        (folder / "tokenizer" / name).write_text(text)


SAVE = {
    "sam": save_sam,
    "dinov2": save_dinov2,
    "dinov3": save_dinov3,
    "dinov3-timm": save_dinov3_timm,
    "clip": save_clip,
    "sd": save_sd,
}


@pytest.fixture(scope="module")
def example():
    transformers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.set_verbosity_error()
    with helpers.example("sam_vs_dino") as module:
        yield module


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A function from a model's name to the folder of a small random one."""
    folders = {}

    def folder_of(model):
        if model not in folders:
            folder = tmp_path_factory.mktemp(model)
            torch.manual_seed(0)
            SAVE[model](folder)
            folders[model] = folder
        return folders[model]

    return folder_of


@pytest.fixture
def local(example, saved, monkeypatch):
    """A function from a model's name to its network, whose files are in a folder."""

    def network_of(model):
        networks = example.pretrained.NETWORKS
        if model in CHANNELS and not Path(networks[model].hub.removeprefix("local-dir:")).is_dir():
            source = "local-dir:" if networks[model].hub.startswith("hf-hub:") else ""
            network = dataclasses.replace(networks[model], hub=f"{source}{saved(model)}")
            monkeypatch.setitem(networks, model, network)
        return networks[model]

    return network_of


def noise_image(side=512):
    return np.random.default_rng(0).integers(0, 256, (side, side, 3)).astype(np.uint8)


# --- features --------------------------------------------------------------------------------------------------------


def test_names_of_the_models(example):
    assert list(example.pretrained.NETWORKS) == MODELS


@pytest.mark.parametrize("model", MODELS)
def test_features_of_a_patch_are_those_of_its_place(example, local, model):
    network = local(model)
    image = noise_image()
    changed = image.copy()
    changed[64:128, 384:448] ^= 255  # rows 4 to 7 and columns 24 to 27 of the grid
    features = example.pretrained.features(network, [image, changed], GRID)
    assert features.shape == (2 * 32 * 32, CHANNELS[model])
    change = np.linalg.norm(np.subtract(*features.reshape(2, *GRID, -1)), axis=-1)
    inside = np.zeros(GRID, bool)
    inside[4:8, 24:28] = True
    around = np.zeros(GRID, bool)
    around[2:10, 22:30] = True  # convolutions see their surroundings
    centroid = np.argwhere(np.ones(GRID)).T @ (change**2).ravel() / (change**2).sum()
    if model == "sd":  # its normalization spans the whole map; any flip would move the centroid by 20 patches
        assert change[inside].mean() > 4 * np.median(change[~around])
        np.testing.assert_allclose(centroid, (5.5, 25.5), atol=6)
    else:
        assert change[inside].mean() > 5 * change[~around].max()
        np.testing.assert_allclose(centroid, (5.5, 25.5), atol=0.5)


def outputs_of(model, loaded, pixels):
    """The patches of a network by its own outputs, shape (rows, columns, d)."""
    with torch.no_grad():
        if model == "sam":
            return loaded(pixels).last_hidden_state[0].permute(1, 2, 0)
        if model == "dinov3-timm":
            tokens = loaded.forward_features(pixels)[0, loaded.num_prefix_tokens :]
        elif model == "clip":
            states = loaded(pixels, interpolate_pos_encoding=True, output_hidden_states=True).hidden_states
            tokens = states[-2][0, 1:]
        else:
            tokens = loaded(pixels).last_hidden_state[0, 1 + getattr(loaded.config, "num_register_tokens", 0) :]
    return tokens.reshape(*GRID, -1)


@pytest.mark.parametrize("model", [model for model in MODELS if model != "sd"])
def test_layers_are_what_the_models_return(example, local, model):
    network = local(model)
    loaded = network.load(network.hub).eval()
    (pixels,) = example.pretrained.batches(network, [noise_image()])
    expected = outputs_of(model, loaded, pixels)
    features = example.pretrained.extract(network, loaded, [noise_image()], expected.shape[:2])
    assert expected.shape[:2] == ((64, 64) if model == "sam" else GRID)
    np.testing.assert_allclose(features.reshape(expected.shape), expected, rtol=1e-4, atol=1e-5)


def test_stable_diffusion_denoises_a_latent_image_under_an_empty_text(example, local):
    network = local("sd")
    loaded = network.load(network.hub).eval()
    features = example.pretrained.extract(network, loaded, [noise_image()] * 2, GRID)
    np.testing.assert_array_equal(*np.split(features, 2))  # the same noise
    # By hand: 1 - beta_t has the product that the diffusion keeps of the image after step t.
    kept = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)[261]
    (pixels,) = example.pretrained.batches(network, [noise_image()])
    text = transformers.CLIPTextModel.from_pretrained(network.hub, subfolder="text_encoder")
    outputs = []
    loaded["unet"].up_blocks[1].register_forward_hook(lambda _, inputs, output: outputs.append(output))
    with torch.no_grad():
        latents = 0.18215 * loaded["vae"].encode(pixels).latent_dist.mean
        assert latents.shape == (1, 4, 64, 64)
        noise = torch.randn(4, 64, 64, generator=torch.Generator().manual_seed(0))
        noisy = float(kept**0.5) * latents + float((1 - kept) ** 0.5) * noise
        empty = text(torch.tensor([[1] + 76 * [2]])).last_hidden_state
        loaded["unet"](noisy, 261, encoder_hidden_states=empty)
    assert outputs[0].shape == (1, 16, *GRID)
    np.testing.assert_allclose(features[:1024], outputs[0][0].flatten(1).T, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("model", ["dinov2", "dinov3", "dinov3-timm", "clip"])
def test_a_wrong_number_of_tokens_raises(example, local, model):
    network = local(model)
    for number in (network.prefix_tokens - 1, network.prefix_tokens + 1):
        wrong = dataclasses.replace(network, prefix_tokens=number)
        with pytest.raises(ValueError, match="not a square number"):
            example.pretrained.features(wrong, [noise_image()], GRID)


def test_missing_weights_raise(example, saved, tmp_path):
    weights = safetensors.load_file(saved("dinov2") / "model.safetensors")
    del weights["layernorm.bias"]
    safetensors.save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    shutil.copy(saved("dinov2") / "config.json", tmp_path)
    with pytest.raises(RuntimeError, match=r"no weights for \['layernorm.bias'\] of Dinov2Model"):
        example.pretrained.from_transformers("Dinov2Model")(str(tmp_path))


# --- pixels ----------------------------------------------------------------------------------------------------------


def processed(model, image):
    """Pixels by the processor of a model, which does not need to resize."""
    as_is = {"do_resize": False, "do_center_crop": False}
    imagenet = transformers.image_utils
    moments = {"image_mean": imagenet.IMAGENET_DEFAULT_MEAN, "image_std": imagenet.IMAGENET_DEFAULT_STD}
    if model == "sd":
        from diffusers.image_processor import VaeImageProcessor

        return VaeImageProcessor().preprocess(Image.fromarray(image))
    if model == "dinov3-timm":
        timm = pytest.importorskip("timm", reason="timm needs a torchvision that belongs to the torch at hand")
        config = timm.get_pretrained_cfg("vit_small_patch16_dinov3.lvd1689m")
        moments = {"image_mean": config.mean, "image_std": config.std}
    try:
        processor = {
            "sam": lambda: transformers.SamImageProcessor(),
            "dinov2": lambda: transformers.BitImageProcessor(**moments, **as_is),
            "dinov3-timm": lambda: transformers.BitImageProcessor(**moments, **as_is),
            "dinov3": lambda: transformers.DINOv3ViTImageProcessor(do_resize=False),
            "clip": lambda: transformers.CLIPImageProcessor(**as_is),
        }[model]()
    except (ImportError, AttributeError):
        pytest.skip(f"the processor of {model} needs a torchvision that belongs to the torch at hand")
    return processor(images=[image], return_tensors="pt")["pixel_values"]


@pytest.mark.parametrize("model", MODELS)
def test_pixels_are_those_of_the_processors(example, model):
    network = example.pretrained.NETWORKS[model]
    image = noise_image(network.pixels)
    (pixels,) = example.pretrained.batches(network, [image])
    assert pixels.shape == (1, 3, network.pixels, network.pixels)
    assert pixels.dtype == torch.float32
    np.testing.assert_allclose(pixels, processed(model, image), atol=1e-5)


def test_the_center_square_is_cut(example):
    image = np.zeros((30, 50, 3), np.uint8)
    image[:15, 10:25] = 200  # the upper left quarter of the square
    square = example.pretrained.square(image, 60)
    assert square.shape == (60, 60, 3)
    assert (square[:28, :28] == 200).all()
    assert (square[32:] == 0).all()
    assert (square[:, 32:] == 0).all()


def test_the_hub_names_timm_s_model(example):
    timm = pytest.importorskip("timm", reason="timm needs a torchvision that belongs to the torch at hand")
    config = timm.get_pretrained_cfg("vit_small_patch16_dinov3.lvd1689m")
    assert example.pretrained.NETWORKS["dinov3-timm"].hub == f"hf-hub:{config.hf_hub_id}"


# --- the command -----------------------------------------------------------------------------------------------------


def photographs(folder):
    """Two files of different size; in one the camera was turned."""
    pictures = np.asarray(jaxalign.datasets.load_patch_features().pictures)[:2]
    paths = [folder / "turned.jpg", folder / "wide.png"]
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to the right
    Image.fromarray(np.rot90(pictures[0])).save(paths[0], exif=exif, quality=95)
    Image.fromarray(np.pad(pictures[1], ((0, 0), (50, 50), (0, 0)))).save(paths[1])
    return paths, pictures


def test_figures_of_photographs(example, local, tmp_path, capsys):
    for model in ("sam", "dinov2", "clip"):
        local(model)
    paths, pictures = photographs(tmp_path)
    patches = example.from_hub(["sam", "dinov2", "clip"], paths, grid=(8, 8))
    assert {name: x.shape for name, x in patches.features.items()} == {
        "SAM": (128, 8),
        "DINOv2": (128, 16),
        "CLIP": (128, 16),
    }
    expected = np.stack([example.pretrained.square(picture, 448) for picture in pictures])
    assert np.abs(patches.pictures.astype(float) - expected).mean() < 4  # JPEG
    scores = example.main(patches, tmp_path / "out")
    assert set(scores) == {"top1", "before", "after"}
    assert np.isfinite(list(scores.values())).all()
    printed = capsys.readouterr().out
    assert f"features of SAM, {local('sam').hub}" in printed
    assert "64 held-out patches of 2 images" in printed
    assert [line.split(":")[0].strip() for line in printed.splitlines()[4:7]] == [
        "SAM to DINOv2",
        "SAM to CLIP",
        "DINOv2 to CLIP",
    ]
    for name in ("colors.png", "matches.png"):
        with Image.open(tmp_path / "out" / name) as figure:
            assert min(figure.size) > 200


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--images", "a.jpg"], "--images needs --pretrained"),
        (["--pretrained", "--models", "sam", "sam"], "two or more different networks"),
        (["--pretrained", "--grid", "1"], "--grid must be from 2 to 64"),
        (["--pretrained", "--models", "vgg"], "'dinov3-timm', 'clip', 'sd'"),
    ],
)
def test_options_that_do_not_fit(example, capsys, arguments, message):
    with pytest.raises(SystemExit):
        example.parse(arguments)
    assert message.replace("'", "") in capsys.readouterr().err.replace("'", "")


def test_images_that_cannot_be_read(example, tmp_path):
    text = tmp_path / "text.jpg"
    text.write_text("no image")
    for path in (text, tmp_path / "missing.jpg"):
        with pytest.raises(SystemExit, match=rf"--images: .*{path.name} cannot be read .*use JPEG or PNG"):
            example.from_hub(["sam", "dinov2"], [path], GRID)


@pytest.mark.parametrize(("model", "package"), [("sam", "transformers"), ("sd", "diffusers"), ("dinov3-timm", "timm")])
def test_a_missing_package_is_named_with_its_command(example, monkeypatch, model, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit, match=rf'{package}.*pip install "jaxalign\[networks\]"'):
        example.from_hub([model], [], GRID)


def test_an_old_version_is_named_with_its_command(example):
    network = example.pretrained.NETWORKS["dinov3"]
    newer = dataclasses.replace(network, load=example.pretrained.from_transformers("DINOv9Model"))
    with pytest.raises(SystemExit, match=r"DINOv3 needs a newer version .*DINOv9Model.*pip install -U transformers"):
        example.pretrained.features(newer, [noise_image()], GRID)


@pytest.mark.parametrize("model", MODELS)
def test_an_unreachable_hub_is_named_with_ways_out(example, monkeypatch, tmp_path, model):
    network = example.pretrained.NETWORKS[model]
    if model == "dinov3-timm":
        pytest.importorskip("timm", reason="timm needs a torchvision that belongs to the torch at hand")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(SystemExit) as error:
        example.pretrained.features(network, [noise_image()], GRID)
    message = str(error.value)
    hub = network.hub.removeprefix("hf-hub:")
    assert message.startswith(f"The weights of {network.name}, {hub}, could not be loaded")
    for way in ("copy its folder ~/.cache/huggingface", "leave out --pretrained", f"https://huggingface.co/{hub}"):
        assert way in message
    assert ("dinov3-timm" in message) == (model == "dinov3")


@pytest.mark.slow
def test_command_with_weights_in_the_cache_of_the_hub(example, saved, tmp_path):
    """Nothing but the weights is missing: a cache under the published names is all that the command needs."""
    models = MODELS if has_timm() else [model for model in MODELS if model != "dinov3-timm"]
    for model in models:
        hub = example.pretrained.NETWORKS[model].hub.removeprefix("hf-hub:")
        folder = tmp_path / "hub" / f"models--{hub.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text("0" * 40)
        (folder / "snapshots").mkdir()
        (folder / "snapshots" / ("0" * 40)).symlink_to(saved(model))
    paths, _ = photographs(tmp_path)
    arguments = ["--pretrained", "--models", *models, "--images", *map(str, paths), "--out", str(tmp_path / "out")]
    command = [sys.executable, "-W", "ignore", helpers.EXAMPLES / "sam_vs_dino.py", *arguments]
    offline = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=offline, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"Stable Diffusion: {2 * 128} held-out patches of 2 images" in done.stdout
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"colors.png", "matches.png"}
    assert "UNEXPECTED" not in done.stderr


def has_timm():
    with contextlib.suppress(ImportError, RuntimeError):
        import timm

        return bool(timm)
    return False
