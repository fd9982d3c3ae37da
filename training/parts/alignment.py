"""Representation alignment: what a network knows of an image half-way, at its tokens, is to tell what a frozen vision
model sees there in the clean image (REPA, Yu et al. 2025; iREPA, Singh et al. 2025)."""

import hashlib
import inspect
import json
import os
from dataclasses import dataclass, fields
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import nn

from score_sde.pipelines.wording import shortened

from .config import option, unknown
from .precision import frozen


PROJECTIONS = ("mlp", "conv")
# width of the hidden layers of the projection (Yu et al. 2025)
PROJECTION_WIDTH = 2048
# tokens before those of the patches: one of the class, and registers
MOST_OTHER_TOKENS = 16
EPS = 1e-6


@dataclass
class AlignToConfig:
    align_to: str | None = option(
        None,
        "Vision model of transformers, a folder or Hub id, such as facebook/dinov2-base: the features of the images in "
        "it, at each of its patches, are what the network is aligned to. With latents, features that "
        "`score-sde encode-latents --align_to` has put beside them.",
        "alignment",
        common=True,
    )


@dataclass
class AlignConfig(AlignToConfig):
    align_block: int = option(8, "Number of blocks of the network after which its tokens are aligned.", "alignment")
    align_weight: float = option(0.5, "Weight of the alignment beside the loss of the objective.", "alignment")
    align_projection: str = option(
        "mlp",
        "What the tokens go through, which is trained with the network and then left behind: mlp, of three layers for "
        "each token (REPA), or conv, a convolution of 3 x 3 tokens (iREPA).",
        "alignment",
    )
    align_gamma: float | None = option(
        None,
        "Normalise the features over the places of an image, each less so much of their mean, divided by their "
        "standard deviation (iREPA: 0.6); None leaves them as they are (REPA).",
        "alignment",
    )

    def align_problems(self):
        if self.align_to is None:
            own = (each for each in fields(AlignConfig) if each.name != "align_to")
            if given := [each.name for each in own if getattr(self, each.name) != each.default]:
                yield f"{', '.join(given)} need align_to, the vision model that the network is aligned to"
            return
        if self.align_block < 1 or not self.align_weight > 0:
            yield f"align_block {self.align_block} must be at least 1, and align_weight {self.align_weight} positive"
        if self.align_projection not in PROJECTIONS:
            yield unknown("align_projection", self.align_projection, PROJECTIONS)
        if self.align_gamma is not None and not 0 <= self.align_gamma <= 1:
            yield f"align_gamma {self.align_gamma} must lie in [0, 1]"


def check_align_block(network, block):
    """Raise ValueError for a network that doesn't give its tokens away, or not after so many blocks."""
    if "hidden_states_of" not in inspect.signature(network.forward).parameters:
        raise ValueError(
            f"align_to needs the tokens of a network, such as dit's; a {type(network).__name__} gives none"
        )
    if block > network.config.num_layers:
        raise ValueError(f"align_block {block}: the network has {network.config.num_layers} blocks")


class VisionModel:
    """A frozen vision model of transformers, whose features of an image are those of its patches, or of a convolutional
    one its last feature map.

    Args:
        source: a folder or Hub id, with its preprocessor_config.json. No code of it is run, and weights are opened as
            safetensors only.

    Attributes: `size` (height, width), to which images are resized, whatever their aspect ratio; `shape`, of the
    features of an image, (C, h, w).

    Raises ValueError for what is none, and for a model without features of patches.
    """

    def __init__(self, source):
        import transformers

        self.source, safe = source, {"trust_remote_code": False}
        try:
            model = transformers.AutoModel.from_pretrained(source, **safe, use_safetensors=True, dtype=torch.float32)
            processor = transformers.AutoImageProcessor.from_pretrained(source, **safe)
        except Exception as error:  # the library has no common class of errors
            raise ValueError(
                f"align_to {source!r} cannot be opened: {shortened(error)}. Give a folder, or the id of a repo on the "
                f"Hub, with a vision model of transformers (config.json, safetensors, preprocessor_config.json)"
            ) from error
        # of CLIP and its kin the half that sees
        self.model = getattr(model, "vision_model", model).eval().requires_grad_(False)
        self.size = size_of(processor, source)
        normal = getattr(processor, "do_normalize", None)
        self.mean, self.std = (
            torch.tensor(getattr(processor, name) if normal else default, dtype=torch.float32).reshape(-1, 1, 1)
            for name, default in (("image_mean", [0.0]), ("image_std", [1.0]))
        )
        pixels = torch.arange(3 * self.size[0] * self.size[1]).reshape(3, *self.size).remainder(256).to(torch.uint8)
        whole = {name: False for name in ("do_resize", "do_center_crop") if hasattr(processor, name)}
        shown = processor(pixels, return_tensors="pt", **whole).pixel_values
        ours = self.shown(pixels[None] / 127.5 - 1)
        if shown.shape != ours.shape or (shown - ours).abs().max() > 1e-3:
            raise ValueError(
                f"align_to {source!r}: its {type(processor).__name__} does more with images than to resize and to "
                f"normalise them by its image_mean and image_std: choose another model"
            )
        self.shape = tuple(self.features(torch.zeros(1, 3, *self.size)).shape[1:])

    def to(self, device):
        self.model, self.mean, self.std = self.model.to(device), self.mean.to(device), self.std.to(device)
        return self

    @cached_property
    def fingerprint(self):
        """A hash of its weights and of how it is shown images, which tells it from another of the same name."""
        shown = [list(self.size), self.mean.flatten().tolist(), self.std.flatten().tolist()]
        digest = hashlib.sha256(json.dumps(shown).encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(name.encode() + tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]

    def facts(self):
        """What latents.json, or training.json, says of it."""
        local = os.path.isdir(self.source)
        return {
            "model": os.path.abspath(self.source) if local else self.source,
            "class": type(self.model).__name__,
            "fingerprint": self.fingerprint,
            "shape": list(self.shape),
        }

    def shown(self, images):
        """What the model is shown of images (B, 1 or 3, height, width) in [-1, 1]."""
        if tuple(images.shape[2:]) != self.size:
            images = F.interpolate(images.float(), self.size, mode="bicubic", align_corners=False, antialias=True)
        return (((images + 1) / 2).clamp(0, 1).expand(-1, 3, -1, -1) - self.mean) / self.std

    @torch.no_grad()
    def features(self, images):
        """Features (B, C, h, w), float32, of images (B, 1 or 3, height, width) in [-1, 1]."""
        found = self.model(pixel_values=self.shown(images)).last_hidden_state
        if found.ndim == 4:
            return found.float()
        patch = getattr(self.model.config, "patch_size", None)
        patch = (patch, patch) if isinstance(patch, int) else tuple(patch or (1, 1))
        height, width = (side // each for side, each in zip(self.size, patch, strict=True))
        others = found.shape[1] - height * width
        if found.ndim != 3 or not 0 <= others <= MOST_OTHER_TOKENS:
            raise ValueError(
                f"align_to {self.source!r}: a {type(self.model).__name__} gives {tuple(found.shape[1:])} for an image, "
                f"which are not the tokens of its patches: choose a model that has them all, such as DINOv2 or ViT, or "
                f"a convolutional one"
            )
        return found[:, others:].mT.unflatten(2, (height, width)).float()

    def of(self, batch):
        """Features of a batch: those that were encoded with latents, or of its images."""
        return batch["features"].float() if "features" in batch else self.features(batch["images"])


def size_of(processor, source):
    """(height, width) of what an image processor makes. Raises ValueError where it doesn't say."""
    size = (
        (getattr(processor, "do_center_crop", None) and processor.crop_size) or getattr(processor, "size", None) or {}
    )
    sides = size.get("height") or size.get("shortest_edge"), size.get("width") or size.get("shortest_edge")
    if None in sides:
        raise ValueError(f"align_to {source!r}: its preprocessor_config.json doesn't say the size of an image")
    return sides


def vision_model_of_latents(facts, source, where):
    """The `VisionModel` that the features in latents are of.

    Args:
        facts: latents.json.
        source: where it is now.
        where: the latents, for messages.

    Raises ValueError for latents without features, and for those of another model.
    """
    if "features" not in facts:
        raise ValueError(
            f"latents {where!r} hold no features of a vision model: encode them anew by `score-sde encode-latents "
            f"--align_to {source}`"
        )
    vision = VisionModel(source)
    if vision.fingerprint != facts["features"]["fingerprint"]:
        raise ValueError(
            f"the features in latents {where!r} are of another vision model, {facts['features']['model']!r}, than the "
            f"one that is now in {source!r}: encode them anew, or pass --align_to with the one they are of"
        )
    return vision


class Projection(nn.Module):
    """From tokens (B, T, D) on a grid (h, w) to features (B, C, h, w)."""

    def __init__(self, kind, width, channels):
        super().__init__()
        self.kind = kind
        if kind == "conv":
            self.layers = nn.Conv2d(width, channels, 3, padding=1)
        else:
            self.layers = nn.Sequential(
                *(nn.Linear(width, PROJECTION_WIDTH), nn.SiLU()),
                *(nn.Linear(PROJECTION_WIDTH, PROJECTION_WIDTH), nn.SiLU()),
                nn.Linear(PROJECTION_WIDTH, channels),
            )

    def forward(self, tokens, grid):
        if self.kind == "conv":
            return self.layers(tokens.mT.unflatten(2, grid))
        return self.layers(tokens).mT.unflatten(2, grid)


class Listening:
    """A network as a function that keeps the tokens after one of its blocks, `tokens`, and the size of its samples,
    `size`."""

    def __init__(self, network, block):
        self.network, self.block = network, block

    def __call__(self, sample, *args, **kwargs):
        output = self.network(sample, *args, hidden_states_of=self.block, **kwargs)
        self.tokens, self.size = output.hidden_states, sample.shape[2:]
        return output


def alignment_loss(projected, features, gamma=None):
    """The negative cosine similarity, (B,), of projected tokens (B, C, h, w) and features (B, C, h', w'), which are
    interpolated to their grid, averaged over it (Yu et al. 2025). With a `gamma` the features are normalised
    over their grid first (Singh et al. 2025)."""
    if gamma is not None:
        mean, std = features.mean((2, 3), keepdim=True), features.std((2, 3), correction=0, keepdim=True)
        features = (features - gamma * mean) / (std + EPS)
    if features.shape[2:] != projected.shape[2:]:
        features = F.interpolate(features, projected.shape[2:], mode="bilinear", align_corners=False, antialias=True)
    return -F.cosine_similarity(projected.float(), features, dim=1).flatten(1).mean(1)


class Alignment:
    """The loss beside that of the objective; `projection` is the module that is trained for it.

    Args:
        config: an `AlignConfig`.
        network: whose tokens are aligned.
        vision: the `VisionModel`.
    """

    def __init__(self, config, network, vision):
        check_align_block(network, config.align_block)
        self.config, self.patch, self.vision = config, network.patch, vision
        self.projection = Projection(config.align_projection, network.config.hidden_size, vision.shape[0])

    def __call__(self, projection, heard, batch):
        """The loss of each sample (B,) of a batch that a `Listening` network has seen."""
        grid = tuple(side // patch for side, patch in zip(heard.size, self.patch, strict=True))
        with frozen(heard.tokens.device, self.config.mixed_precision):
            features = self.vision.of(batch)
        return alignment_loss(projection(heard.tokens, grid), features, self.config.align_gamma)

    def facts(self):
        """What training.json says of it."""
        config = self.config
        how = {"block": config.align_block, "weight": config.align_weight, "projection": config.align_projection}
        return self.vision.facts() | how | {"gamma": config.align_gamma}
