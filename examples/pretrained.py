"""The pretrained networks of sam_vs_dino.py: where each is loaded from, what it sees, and which layer is captured.

Every network sees the same square of an image, at a size for which it has 32 x 32 patches (SAM: 64 x 64).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

import jaxalign

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class Network:
    """A pretrained network, and how to take features of patches from it.

    Attributes:
        name: its name in figures.
        hub: its name on the Hugging Face hub, or a folder with the same files.
        load: a function of `hub` that returns the model.
        layer: the layer to capture.
        pixels: the side of the square that the network sees.
        normalization: mean and standard deviation of the color channels.
        prefix_tokens: the number of tokens before the patches: a class token and registers.
        forward: a function of the model and a batch, if the model is not called with the pixels alone.
    """

    name: str
    hub: str
    load: Callable[[str], Any]
    layer: str
    pixels: int
    normalization: tuple[Sequence[float], Sequence[float]]
    prefix_tokens: int = 0
    forward: Callable[[Any, Any], Any] | None = None


def from_transformers(class_name: str) -> Callable[[str], Any]:
    """A function that loads a model of transformers."""

    def load(hub: str) -> Any:
        import transformers

        transformers.utils.logging.set_verbosity_error()  # a checkpoint has more weights than those of this part
        model, info = getattr(transformers, class_name).from_pretrained(hub, output_loading_info=True)
        if info["missing_keys"]:  # transformers only warns, and leaves these weights random
            raise RuntimeError(f"{hub} has no weights for {sorted(info['missing_keys'])} of {class_name}.")
        return model

    return load


def from_timm(hub: str) -> Any:
    """Load a model of timm for images of any size."""
    import timm

    return timm.create_model(hub, pretrained=True, num_classes=0, dynamic_img_size=True)


def stable_diffusion(hub: str) -> Any:
    """Load the parts of Stable Diffusion that see an image: VAE and U-Net, with the embedding of an empty text."""
    import diffusers
    import torch
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    diffusers.utils.logging.set_verbosity_error()
    vae = AutoencoderKL.from_pretrained(hub, subfolder="vae")
    unet = UNet2DConditionModel.from_pretrained(hub, subfolder="unet")
    model: Any = torch.nn.ModuleDict({"vae": vae, "unet": unet})
    tokenizer = CLIPTokenizer.from_pretrained(hub, subfolder="tokenizer")
    tokens = tokenizer("", padding="max_length", max_length=tokenizer.model_max_length, return_tensors="pt")
    with torch.no_grad():
        text = CLIPTextModel.from_pretrained(hub, subfolder="text_encoder")(tokens["input_ids"])
    model.register_buffer("empty_text", text.last_hidden_state)
    model.scheduler = DDPMScheduler.from_pretrained(hub, subfolder="scheduler")
    return model


def denoise(model: Any, pixels: Any, timestep: int = 261) -> Any:
    """One denoising step of noisy latents, as in DIFT (arXiv:2306.03881). Every image gets the same noise."""
    import torch

    latents = model["vae"].encode(pixels).latent_dist.mode() * model["vae"].config.scaling_factor
    noise = torch.randn(latents.shape[1:], generator=torch.Generator().manual_seed(0)).to(latents)
    steps = torch.full((len(latents),), timestep, device=latents.device)
    noisy = model.scheduler.add_noise(latents, noise.expand_as(latents), steps)
    return model["unet"](noisy, steps, encoder_hidden_states=model.empty_text.expand(len(latents), -1, -1))


def any_size(model: Any, pixels: Any) -> Any:
    """Call a model of transformers with images of another size than it was trained on."""
    return model(pixels, interpolate_pos_encoding=True)


NETWORKS = {
    # The neck is the input of the mask decoder.
    "sam": Network(
        "SAM", "facebook/sam-vit-base", from_transformers("SamVisionModel"), "vision_encoder.neck", 1024, IMAGENET
    ),
    "dinov2": Network(
        "DINOv2", "facebook/dinov2-small", from_transformers("Dinov2Model"), "layernorm", 448, IMAGENET, prefix_tokens=1
    ),
    # A class token and four registers. The hub asks for consent to Meta's license.
    "dinov3": Network(
        "DINOv3",
        "facebook/dinov3-vits16-pretrain-lvd1689m",
        from_transformers("DINOv3ViTModel"),
        "norm",
        512,
        IMAGENET,
        prefix_tokens=5,
    ),
    # The same weights, converted by timm.
    "dinov3-timm": Network(
        "DINOv3 (timm)",
        "hf-hub:timm/vit_small_patch16_dinov3.lvd1689m",
        from_timm,
        "norm",
        512,
        IMAGENET,
        prefix_tokens=5,
    ),
    # The last layer but one: the last serves the class token. The pattern also matches the names of transformers 4.
    "clip": Network(
        "CLIP",
        "openai/clip-vit-base-patch16",
        from_transformers("CLIPVisionModel"),
        "**encoder.layers.10",
        512,
        CLIP,
        prefix_tokens=1,
        forward=any_size,
    ),
    "sd": Network(
        "Stable Diffusion",
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        stable_diffusion,
        "unet.up_blocks.1",
        512,
        HALF,
        forward=denoise,
    ),
}


def features(network: Network, images: Sequence[np.ndarray], grid: tuple[int, int]) -> np.ndarray:
    """Load a network and return the features of the patches of images, shape (images * patches, d)."""
    try:
        model = network.load(network.hub)
    except ImportError as error:
        raise SystemExit(f'{network.name} needs more packages ({error}): pip install "jaxalign[networks]"') from error
    except AttributeError as error:
        raise SystemExit(f"{network.name} needs a newer version ({error}): pip install -U transformers timm") from error
    except OSError as error:
        raise SystemExit(unreachable(network, error)) from error
    return extract(network, model, images, grid)


def unreachable(network: Network, error: Exception) -> str:
    """What to do if the weights cannot be downloaded."""
    hub = network.hub.removeprefix("hf-hub:")
    return (
        f"The weights of {network.name}, {hub}, could not be loaded: {error}\n"
        "The first run downloads them from https://huggingface.co. Without a connection:\n"
        "  - run the same command on another machine, and copy its folder ~/.cache/huggingface here; or\n"
        "  - leave out --pretrained: the features that jaxalign ships need no download.\n"
        f"If access is restricted, accept the license at https://huggingface.co/{hub} and run `hf auth login`"
        + (", or use --models dinov3-timm." if hub == NETWORKS["dinov3"].hub else ".")
    )


def extract(network: Network, model: Any, images: Sequence[np.ndarray], grid: tuple[int, int]) -> np.ndarray:
    """The features of the patches of images, shape (images * patches, d), image by image in row-major order."""
    import torch

    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    captured = jaxalign.interop.capture_features(
        model,
        batches(network, images),
        layers={network.name: network.layer},
        prefix_tokens=network.prefix_tokens,
        grid=grid,
        forward=network.forward,
    )[network.name]
    return captured.reshape(-1, captured.shape[-1])


def batches(network: Network, images: Sequence[np.ndarray]) -> Iterator[Any]:
    """The pixels that a network sees, image by image: tensors of shape (1, 3, pixels, pixels).

    Not by the processors of the models: some crop the image and others do not, so patch k would not be the same place.
    """
    import torch

    mean, std = (np.asarray(values, np.float32) for values in network.normalization)
    for image in images:
        pixels = (square(image, network.pixels).astype(np.float32) / 255 - mean) / std
        yield torch.from_numpy(pixels).permute(2, 0, 1)[None].contiguous()


def square(image: np.ndarray, pixels: int) -> np.ndarray:
    """The center square of an image, resized."""
    side = min(image.shape[:2])
    top, left = ((size - side) // 2 for size in image.shape[:2])
    center = np.asarray(image[top : top + side, left : left + side], np.float32)
    resized = jax.image.resize(center, (pixels, pixels, 3), "bilinear", antialias=True)
    return np.clip(np.asarray(resized).round(), 0, 255).astype(np.uint8)
