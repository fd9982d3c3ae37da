"""The U-Nets of Song et al. 2021, "Score-Based Generative Modeling through Stochastic Differential Equations" (DDPM++
and NCSN++), and of Dhariwal & Nichol 2021, "Diffusion Models Beat GANs on Image Synthesis" (ADM).

One self-contained file: it is copied beside the weights when a model is shared, so it imports torch and diffusers only.
The network knows nothing of noise: it maps (sample, number, label or sequence) to a tensor, and the scheduler gives it
a meaning.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import GaussianFourierProjection, get_timestep_embedding
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import nn


# standard deviation of the frequencies of the Fourier embedding, in the published models
FOURIER_SCALE = 16
# what a guidance scale is multiplied by before its embedding, so that 0 to 10 are told apart as 1000 time steps are
GUIDANCE_STEPS = 100.0

NCSNPP = {
    "time_embedding_type": "fourier",
    "fir": True,
    "progressive_input": "residual",
    "scale_by_sigma": True,
}
ADM = {
    "architecture": "adm",
    "layers_per_block": 2,
    "attention_resolutions": (32, 16, 8),
    "attention_head_dim": 64,
    "resnet_time_scale_shift": "scale_shift",
    "dropout": 0.0,
    "num_classes": 1000,
    "learn_sigma": True,
}
# What each published model changes in the defaults: CIFAR-10, of VP and of VE (Song et al. 2021, appendix H), and
# ImageNet with classes (Dhariwal & Nichol 2021, appendix I and the released checkpoints)
UNETS: dict[str, dict[str, Any]] = {
    "DDPM++": {},
    "DDPM++ deep": {"layers_per_block": 8},
    "NCSN++": NCSNPP,
    "NCSN++ deep": NCSNPP | {"layers_per_block": 8},
    "ADM-64": ADM
    | {"sample_size": 64, "block_out_channels": (192, 384, 576, 768), "layers_per_block": 3, "dropout": 0.1},
    "ADM-128": ADM
    | {
        "sample_size": 128,
        "block_out_channels": (256, 256, 512, 768, 1024),
        "attention_head_dim": None,
        "num_attention_heads": 4,
    },
    "ADM-256": ADM | {"sample_size": 256, "block_out_channels": (256, 256, 512, 512, 1024, 1024)},
    "ADM-512": ADM
    | {"sample_size": 512, "block_out_channels": (128, 256, 256, 512, 512, 1024, 1024), "model_channels": 256},
}


class BlockStyle(NamedTuple):
    """Where the networks of Song et al. 2021 and of Dhariwal & Nichol 2021 differ in every block."""

    min_group_channels: int  # a group norm has as many groups as this allows, up to 32
    norm_eps: float
    rescale: float  # divides the sum of a residual branch and its input
    resample_shortcut: bool  # resampling blocks have a 1x1 convolution in their shortcut
    attends_always: bool  # on the way up attention follows every residual block of a resolution, not the last one only
    cosines_first: bool  # in the positional embedding of time
    frequency_shift: int  # 1: the last frequency of that embedding is exactly 1/10000; 0: the next one would be
    ddpm_init: bool  # the initialisation of DDPM instead of PyTorch's own
    last_gain: float  # Xavier gain in the last layer of every residual branch and of the network

    def groups(self, channels):
        groups = min(channels // self.min_group_channels, 32)
        if channels % groups:
            raise ValueError(
                f"block_out_channels lead to a group norm of {channels} channels, which is no multiple of its {groups} "
                f"groups; choose multiples of 32 from {32 * self.min_group_channels} channels on"
            )
        return groups

    def norm(self, channels):
        return nn.GroupNorm(self.groups(channels), channels, eps=self.norm_eps)


ARCHITECTURES = {
    # the originals scale "zero" weights by 1e-10 in variance
    "ncsnpp": BlockStyle(4, 1e-6, 2**0.5, True, False, False, 1, True, 1e-5),
    "adm": BlockStyle(1, 1e-5, 1.0, False, True, True, 0, False, 0.0),
}


def check_counts(**values):
    """Raise ValueError for a value that is no whole number from 1 on."""
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} {value!r} must be a whole number, at least 1")


def nearest_sizes(sizes, divisors):
    """What sizes could be instead that their divisors do not divide, in words: "9 could be 8 or 10"."""
    found = {}
    for size, divisor in zip(sizes, divisors, strict=True):
        if size % divisor:
            below = size // divisor * divisor
            found[size] = " or ".join(str(each) for each in (below, below + divisor) if each)
    return ", ".join(f"{size} could be {near}" for size, near in found.items())


def check_ids(what, ids, most, remedy):
    """Raise ValueError for whole numbers that are not from 0 to `most`. Of those on the CPU alone: to look at others
    would be to wait for their device, and where they are there, the device itself stops."""
    has_values = type(ids) is torch.Tensor and not torch.compiler.is_compiling()
    if ids.device.type != "cpu" or not has_values or not ids.numel():
        return
    low, high = (int(each) for each in ids.aminmax())
    if low < 0 or high > most:
        raise ValueError(f"{what} {low if low < 0 else high} is not among 0 to {most}{remedy}")


def check_guidance(guidance_embeds, folded_guidance):
    """Raise ValueError for a folded_guidance that is no finite number, or stands beside guidance_embeds."""
    if folded_guidance is None:
        return
    number = isinstance(folded_guidance, (int, float)) and not isinstance(folded_guidance, bool)
    if not number or not math.isfinite(folded_guidance):
        raise ValueError(f"folded_guidance {folded_guidance!r} must be a finite number, or None")
    if guidance_embeds:
        raise ValueError(f"folded_guidance {folded_guidance} contradicts guidance_embeds: leave out one of them")


# what the sizes of samples are called, by their number of axes
AXES = {1: ("length",), 2: ("height", "width"), 3: ("frames", "height", "width")}


def along(dimensions, number, beside=1):
    """What is `number` in height and width; of a signal, an image of one row, in its width alone."""
    return (beside, number) if dimensions == 1 else number


def convolution(dimensions, in_channels, out_channels):
    """A convolution over 3 x 3 pixels, of a signal over 3 values."""
    return nn.Conv2d(in_channels, out_channels, along(dimensions, 3), padding=along(dimensions, 1, 0))


class FIRResample(nn.Module):
    """Half or twice the height and width, of a signal its width, each channel through the low-pass filter [1, 3, 3, 1]
    (Song et al. 2021, appendix H, after StyleGAN2). diffusers' `downsample_2d` and `upsample_2d` give the same, the
    latter some sixty times slower."""

    def __init__(self, up=False, stride=2, padding=1, dimensions=2):
        super().__init__()
        self.up, self.stride, self.padding = up, along(dimensions, stride), along(dimensions, padding, 0)
        # twice the gain in each direction makes up for the zeros between the values
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=torch.float32) / (4 if up else 8)
        self.register_buffer("kernel", taps[None] if dimensions == 1 else taps.outer(taps), persistent=False)

    def forward(self, hidden):
        channels = hidden.shape[1]
        convolve = F.conv_transpose2d if self.up else F.conv2d
        kernel = self.kernel.to(hidden.dtype).expand(channels, 1, -1, -1)
        return convolve(hidden, kernel, stride=self.stride, padding=self.padding, groups=channels)


class ResnetBlock(ResnetBlock2D):
    """BigGAN-type residual block, (B, C, H, W) -> (B, out_channels, H, W) or half or twice the height and width."""

    def __init__(
        self, in_channels, out_channels, time_channels, dropout, style, time_scale_shift, fir, dimensions, **resample
    ):
        super().__init__(
            in_channels=in_channels,
            out_channels=out_channels,
            temb_channels=time_channels,
            dropout=dropout,
            groups=style.groups(in_channels),
            groups_out=style.groups(out_channels),
            eps=style.norm_eps,
            time_embedding_norm=time_scale_shift,
            output_scale_factor=style.rescale,
            use_in_shortcut=in_channels != out_channels or (bool(resample) and style.resample_shortcut),
            **resample,
        )
        if fir and self.up:
            self.upsample = FIRResample(up=True, dimensions=dimensions)
        elif fir and self.down:
            self.downsample = FIRResample(dimensions=dimensions)
        if dimensions == 1:
            self.conv1 = convolution(1, in_channels, out_channels)
            self.conv2 = convolution(1, out_channels, out_channels)
            if not fir and self.up:
                self.upsample = nn.Upsample(scale_factor=(1, 2))
            elif not fir and self.down:
                self.downsample = nn.AvgPool2d((1, 2))


class UNetAttnProcessor:
    """Calls diffusers' attention dispatch, so `set_attention_backend` works."""

    _attention_backend = None
    _parallel_config = None

    def __call__(self, attn, hidden, encoder_hidden_states=None, attention_mask=None):
        tokens = attn.group_norm(hidden).flatten(2).transpose(1, 2)  # (B, H W, C)
        told = tokens if encoder_hidden_states is None else encoder_hidden_states  # (B, S, cross_attention_dim)
        projected = (attn.to_q(tokens), attn.to_k(told), attn.to_v(told))
        out = dispatch_attention_fn(
            *(each.unflatten(-1, (attn.heads, -1)) for each in projected),
            attn_mask=attention_mask,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        out = attn.to_out[0](out.flatten(2)).transpose(1, 2).reshape(hidden.shape)  # (B, C, H, W)
        return (out + hidden) / attn.rescale_output_factor


class FrameAttnProcessor:
    """Self-attention over the frames (B frames, C, H, W) at each place, told apart by sines and cosines of their
    numbers."""

    _attention_backend = None
    _parallel_config = None

    def __call__(self, attn, hidden, encoder_hidden_states=None, attention_mask=None, frames=1):
        batch, channels, *size = hidden.shape
        tokens = attn.group_norm(hidden).unflatten(0, (-1, frames)).permute(0, 3, 4, 1, 2).flatten(0, 2)
        numbers = get_timestep_embedding(torch.arange(frames, device=hidden.device), channels)
        tokens = tokens + numbers.to(hidden.dtype)  # (B H W, frames, C)
        projected = (attn.to_q(tokens), attn.to_k(tokens), attn.to_v(tokens))
        out = dispatch_attention_fn(
            *(each.unflatten(-1, (attn.heads, -1)) for each in projected),
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        out = attn.to_out[0](out.flatten(2)).reshape(batch // frames, *size, frames, channels)
        return hidden + out.permute(0, 3, 4, 1, 2).flatten(0, 1)


def attention_block(channels, style, num_heads, head_dim, context_dim=None, over_frames=False):
    """Self-attention over all positions, in `num_heads` heads or, if given, in heads of `head_dim` channels; with
    `context_dim` from the positions to a sequence of that width; or at each position over the frames."""
    heads = num_heads if head_dim is None else channels // head_dim
    return Attention(
        query_dim=channels,
        cross_attention_dim=context_dim,
        heads=heads,
        dim_head=channels // heads,
        bias=True,
        norm_num_groups=style.groups(channels),
        eps=style.norm_eps,
        residual_connection=True,
        # a sequence that says nothing leaves the features as they are
        rescale_output_factor=style.rescale if context_dim is None else 1.0,
        processor=FrameAttnProcessor() if over_frames else UNetAttnProcessor(),
    )


class FrameLayer(nn.Module):
    """What the frames of a video tell each other, at each place: by a convolution over three of them and, where the
    frames have self-attention, by attention over all. It adds zero at first (Blattmann et al. 2023, "Align your
    Latents", whose image layers, too, see frame by frame)."""

    def __init__(self, channels, style, attention=None):
        super().__init__()
        self.norm = style.norm(channels)
        self.conv = nn.Conv2d(channels, channels, (3, 1), padding=(1, 0))
        self.attention = None if attention is None else attention(channels, over_frames=True)

    def forward(self, hidden, frames):
        """(B frames, C, H, W), to the same."""
        moving = F.silu(self.norm(hidden)).unflatten(0, (-1, frames)).transpose(1, 2).flatten(3)  # (B, C, frames, H W)
        moving = self.conv(moving).unflatten(3, hidden.shape[2:]).transpose(1, 2).flatten(0, 1)
        hidden = hidden + moving
        return hidden if self.attention is None else self.attention(hidden, frames=frames)


class FourierEmbedding(GaussianFourierProjection):
    """sin and cos of 2 pi w log(sigma), (B,) -> (B, 2 embedding_size), for fixed random frequencies w.

    The frequencies stay in float32 when the network is cast: the products reach hundreds of radians, and rounding in
    bfloat16 would move them by whole ones.
    """

    def _apply(self, function, recurse=True):
        def without_rounding(tensor):
            moved = function(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(without_rounding, recurse)


class InputResidual(nn.Module):
    """Progressive input of type "residual": the pyramid is downsampled by a convolution, and its sum with the features
    becomes both."""

    def __init__(self, pyramid_channels, channels, fir, rescale, dimensions):
        super().__init__()
        self.rescale = rescale
        pad = nn.ZeroPad2d((0, 1, 0, int(dimensions > 1)))
        self.downsample = nn.Sequential(
            FIRResample(stride=1, padding=2, dimensions=dimensions) if fir else pad,
            nn.Conv2d(pyramid_channels, channels, along(dimensions, 3), stride=along(dimensions, 2)),
        )

    def forward(self, pyramid, hidden):
        """pyramid (B, pyramid_channels, 2H, 2W) and hidden (B, channels, H, W), to the next of both."""
        hidden = (self.downsample(pyramid) + hidden) / self.rescale
        return hidden, hidden


class InputSkip(nn.Module):
    """Progressive input of type "input_skip": the downsampled image joins the features behind a 1x1 convolution."""

    def __init__(self, image_channels, channels, fir, combine, dimensions):
        super().__init__()
        self.combine = combine
        self.downsample = FIRResample(dimensions=dimensions) if fir else nn.AvgPool2d(along(dimensions, 2))
        self.conv = nn.Conv2d(image_channels, channels, 1)

    def forward(self, pyramid, hidden):
        """pyramid (B, image_channels, 2H, 2W) and hidden (B, channels, H, W), to the next of both; "cat" doubles the
        channels."""
        pyramid = self.downsample(pyramid)
        image = self.conv(pyramid)
        return pyramid, torch.cat([image, hidden], dim=1) if self.combine == "cat" else image + hidden


class UNetLevel(nn.Module):
    """All blocks of one resolution: residual blocks, the attention that follows each or only the last of them, after
    each of these the attention to a sequence where there is one, of videos a layer over the frames, a resampling block,
    and a step of the progressive input or output."""

    def __init__(
        self,
        channels,
        out_channels,
        num_attentions,
        resnet,
        attention,
        to_context,
        progressive=None,
        over_frames=None,
        halve_frames=False,
        **resample,
    ):
        super().__init__()
        self.resnets = nn.ModuleList(resnet(c, out_channels) for c in channels)
        self.attentions = nn.ModuleList(attention(out_channels) for _ in range(num_attentions))
        self.cross_attentions = None
        if to_context is not None and num_attentions:
            self.cross_attentions = nn.ModuleList(to_context(out_channels) for _ in range(num_attentions))
        self.frame_layers = None
        if over_frames is not None:
            attending = attention if num_attentions else None
            self.frame_layers = nn.ModuleList(over_frames(out_channels, attention=attending) for _ in channels)
        # resampling halves or doubles the frames, too
        self.halve_frames = halve_frames
        self.resample = resnet(out_channels, out_channels, **resample) if resample else None
        self.progressive = progressive
        self.gradient_checkpointing = False

    def blocks(self):
        """Residual blocks, each with the attention that follows it, or None, that to a sequence, or None, and its layer
        over the frames, or None."""
        without = [None] * (len(self.resnets) - len(self.attentions))
        crossing = self.cross_attentions or [None] * len(self.attentions)
        over_frames = self.frame_layers or [None] * len(self.resnets)
        return zip(self.resnets, [*without, *self.attentions], [*without, *crossing], over_frames, strict=True)

    @staticmethod
    def for_frames(frames, *values):
        """What is told of each sample (B, ...), for every frame of it (B frames, ...); None stays None."""
        if frames is None:
            return values
        return [each if each is None else each.repeat_interleave(frames, dim=0) for each in values]

    def run(self, block, *inputs):
        """Call a block, recomputing it in the backward pass when gradient checkpointing is on."""
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(block, *inputs)
        return block(*inputs)

    def attend(self, layers, hidden, context, mask, frames):
        """The attention, or None, that to the context, or None, and the layer over the frames, or None, in turn."""
        attention, crossing, over_frames = layers
        if attention is not None:
            hidden = self.run(attention, hidden)
        if crossing is not None:
            hidden = self.run(crossing, hidden, context, mask)
        return hidden if over_frames is None else self.run(over_frames, hidden, frames)


class DownLevel(UNetLevel):
    """One resolution on the way down."""

    def forward(self, hidden, pyramid, time, context, mask, frames=None):
        """hidden (B, C, H, W), of videos (B frames, C, H, W), the image of the progressive input, time (B, 4
        model_channels), a sequence and its mask, to (hidden, pyramid) for the next resolution and the features that the
        way up will see again."""
        skips, (time, context, mask) = [], self.for_frames(frames, time, context, mask)
        for resnet, *layers in self.blocks():
            hidden = self.attend(layers, self.run(resnet, hidden, time), context, mask, frames)
            skips.append(hidden)
        if self.resample is not None:
            hidden = self.run(self.resample, hidden, time)
            if self.progressive is not None:
                pyramid, hidden = self.progressive(pyramid, hidden)
            if self.halve_frames:
                # means of two
                hidden = hidden.unflatten(0, (-1, 2)).mean(1)
                pyramid = pyramid if self.progressive is None else pyramid.unflatten(0, (-1, 2)).mean(1)
            skips.append(hidden)
        return hidden, pyramid, skips


class MiddleLevel(UNetLevel):
    """Two residual blocks at the lowest resolution, with attention between them."""

    def forward(self, hidden, time, context, mask, frames=None):
        time, context, mask = self.for_frames(frames, time, context, mask)
        before, after = self.resnets
        crossing, over_frames = self.cross_attentions or [None], self.frame_layers or [None, None]
        layers = self.attentions[0], crossing[0], over_frames[0]
        hidden = self.attend(layers, self.run(before, hidden, time), context, mask, frames)
        return self.attend((None, None, over_frames[1]), self.run(after, hidden, time), context, mask, frames)


class UpLevel(UNetLevel):
    """One resolution on the way up."""

    def forward(self, hidden, skips, time, context, mask, frames=None):
        """hidden (B, C, H, W), of videos (B frames, C, H, W), what the way down left for each residual block, the last
        one first, time (B, 4 model_channels), a sequence and its mask, to hidden for the next resolution and the image
        of the progressive output, None without."""
        time, context, mask = self.for_frames(frames, time, context, mask)
        for (resnet, *layers), skip in zip(self.blocks(), skips, strict=True):
            hidden = self.run(resnet, torch.cat([hidden, skip], dim=1), time)
            hidden = self.attend(layers, hidden, context, mask, frames)
        image = None if self.progressive is None else self.progressive(hidden)
        if self.resample is not None:
            hidden = self.run(self.resample, hidden, time)
            if self.halve_frames:
                hidden = hidden.repeat_interleave(2, dim=0)
        return hidden, image


# diffusers' mixins contradict each other in `config_name`, and declare as None what is to be set
class ScoreUNetModel(ModelMixin, ConfigMixin, AttentionMixin, PeftAdapterMixin):  # type: ignore[misc]
    """The score U-Net: DDPM++ and NCSN++ (Song et al. 2021, appendix H) and ADM (Dhariwal & Nichol 2021). The defaults
    are the published CIFAR-10 model DDPM++; `from_name` knows the others.

    Who trains it for classifier-free guidance replaces the conditions of a share `class_dropout_prob` of the samples by
    those of `null_conditions`; the network itself drops nothing.

    With `dimensions` 1 it is a network of signals (B, C, length), all of whose layers are those of an image along one
    axis. With 3 it is one of videos or other volumes (B, C, frames, height, width): each frame goes through the layers
    of an image, and behind these through a convolution and attention over the frames at each place, which add zero at
    first, so that it can begin as a network of images (`with_frames`).

    Args:
        sample_size: height and width of the training images, (length,) of signals, (frames, height, width) of videos,
            one number where they are the same; the network itself takes other sizes too.
        in_channels: channels of the input, with those of the condition.
        out_channels: channels of the output; those of the sample, or twice as many with `learn_sigma`, when None.
        block_out_channels: channels at each resolution, multiples of 4; each but the first halves height and width.
        layers_per_block: residual blocks at each resolution on the way down, one more on the way up.
        attention_resolutions: heights (at `sample_size`) of the feature maps that have self-attention.
        dropout: dropout probability inside the residual blocks.
        num_classes: number of class labels, or None for an unconditional model. The label `num_classes` itself is the
            null label.
        class_dropout_prob: probability, in [0, 1], that a training sample's label is replaced by the null label; at 0
            the model has none.
        architecture: "ncsnpp" (DDPM++ and NCSN++: the sum of a residual branch and its input is divided by sqrt(2)) or
            "adm" (no division; zero instead of almost zero in the last layer of each residual branch; attention after
            every residual block on the way up too).
        model_channels: a quarter of the width of the time embedding, a multiple of 4; `block_out_channels[0]` when
            None.
        time_embedding_type: "positional", or "fourier" for random features of the logarithm of the timestep, which
            must then be a positive noise level (Song et al. 2021, appendix H).
        resnet_time_scale_shift: how time enters a residual block: "default" adds it to the features, "scale_shift"
            scales and shifts the group norm (adaptive group normalisation, Dhariwal & Nichol 2021, section 3.1).
        num_attention_heads: heads of each self-attention.
        attention_head_dim: channels of each head, instead of a number of heads.
        fir: resample through the low-pass filter [1, 3, 3, 1] instead of by averages and nearest neighbours.
        progressive_input: how each lower resolution on the way down sees the image again: "none", "residual" or
            "input_skip" (Song et al. 2021, appendix H).
        progressive_combine: whether "input_skip" adds the image to the features ("sum") or concatenates it ("cat").
        progressive_output: "output_skip" sums images of every resolution on the way up; "none" makes one of the last.
        learn_sigma: predict a variance beside the mean: the output then has twice the channels of the sample.
        scale_by_sigma: divide the output by the timestep, a noise level. It is here only because the published VE
            models were trained so; otherwise preconditioning belongs to the scheduler's prediction types.
        cross_attention_dim: width of `encoder_hidden_states`, a sequence such as an encoded text, to which every
            self-attention is followed by a cross-attention; None for a model without.
        pooled_projection_dim: width of `pooled_projections`, one vector for each sample such as a text's mean, whose
            embedding is added to that of time; None for a model without.
        condition_channels: channels of `condition_sample`, such as an image that the sample is made from, which the
            network sees beside the sample: the last of in_channels; None for a model without.
        two_times: the network can be told a second time, `timestep_to`: that which a flow map leads to. What it adds is
            zero at first.
        guidance_embeds: the network can be told a guidance scale, `guidance`, whose effect it has learned
            (guidance-distilled, Meng et al. 2023): one evaluation then does the work of two. What it adds is zero at
            first.
        folded_guidance: the one guidance scale whose effect the network has learned; None for none.
        dimensions: axes of the samples: 1 of signals, 2 of images, 3 of videos and other volumes, the frames first.
        halve_frames: of videos, each lower resolution has half the frames, too, means of two; otherwise it has all.
    """

    # whose entries are attributes, other than diffusers says
    config: Any
    # lists of `DownLevel` and `UpLevel`
    down_blocks: Any
    up_blocks: Any
    _supports_gradient_checkpointing = True
    _no_split_modules = ["ResnetBlock", "Attention", "FrameLayer"]  # type: ignore[assignment]
    _skip_layerwise_casting_patterns = ["norm", "time_embed", "conv_in", "conv_out"]  # type: ignore[assignment]
    _keep_in_fp32_modules = ["fourier"]  # type: ignore[assignment]

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, ...] = 32,
        in_channels: int = 3,
        out_channels: int | None = None,
        block_out_channels: tuple[int, ...] = (128, 256, 256, 256),
        layers_per_block: int = 4,
        attention_resolutions: tuple[int, ...] = (16,),
        dropout: float = 0.1,
        num_classes: int | None = None,
        class_dropout_prob: float = 0.1,
        architecture: str = "ncsnpp",
        model_channels: int | None = None,
        time_embedding_type: str = "positional",
        resnet_time_scale_shift: str = "default",
        num_attention_heads: int = 1,
        attention_head_dim: int | None = None,
        fir: bool = False,
        progressive_input: str = "none",
        progressive_combine: str = "sum",
        progressive_output: str = "none",
        learn_sigma: bool = False,
        scale_by_sigma: bool = False,
        cross_attention_dim: int | None = None,
        pooled_projection_dim: int | None = None,
        condition_channels: int | None = None,
        two_times: bool = False,
        guidance_embeds: bool = False,
        folded_guidance: float | None = None,
        dimensions: int = 2,
        halve_frames: bool = False,
    ):
        super().__init__()
        check_guidance(guidance_embeds, folded_guidance)
        if dimensions not in AXES or isinstance(dimensions, bool):
            raise ValueError(f"dimensions {dimensions!r} must be 1, 2 or 3")
        if halve_frames and dimensions != 3:
            raise ValueError(f"halve_frames is of videos, with dimensions 3, not {dimensions}: leave it out")
        for name, value, choices in (
            ("architecture", architecture, ARCHITECTURES),
            ("time_embedding_type", time_embedding_type, ("positional", "fourier")),
            ("resnet_time_scale_shift", resnet_time_scale_shift, ("default", "scale_shift")),
            ("progressive_input", progressive_input, ("none", "residual", "input_skip")),
            ("progressive_combine", progressive_combine, ("sum", "cat")),
            ("progressive_output", progressive_output, ("none", "output_skip")),
        ):
            if value not in choices:
                raise ValueError(f"{name} {value!r} is unknown; choose one of {', '.join(choices)}")
        levels = len(block_out_channels)
        whole = all(isinstance(channels, int) and channels >= 4 for channels in block_out_channels)
        if not levels or not whole or any(channels % 4 for channels in block_out_channels):
            raise ValueError(f"block_out_channels {tuple(block_out_channels)} must be one or more multiples of 4")
        model_channels = block_out_channels[0] if model_channels is None else model_channels
        sides = tuple(sample_size) if isinstance(sample_size, (tuple, list)) else (sample_size,) * dimensions
        if len(sides) != dimensions:
            words = {1: "a length", 2: "a height and a width", 3: "frames, a height and a width"}[dimensions]
            raise ValueError(f"sample_size {sample_size} must be one number, or {words}")
        for side in sides:
            check_counts(sample_size=side)
        check_counts(
            in_channels=in_channels,
            layers_per_block=layers_per_block,
            model_channels=model_channels,
            num_attention_heads=num_attention_heads,
        )
        optional = {
            "out_channels": out_channels,
            "num_classes": num_classes,
            "attention_head_dim": attention_head_dim,
            "cross_attention_dim": cross_attention_dim,
            "pooled_projection_dim": pooled_projection_dim,
            "condition_channels": condition_channels,
        }
        check_counts(**{name: value for name, value in optional.items() if value is not None})
        if model_channels % 4:
            raise ValueError(f"model_channels {model_channels} must be a multiple of 4")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout {dropout} must lie in [0, 1)")
        # of each axis what it must be a multiple of
        self.divisors = (2 ** (levels - 1),) * dimensions
        if dimensions == 3 and not halve_frames:
            self.divisors = (1, *self.divisors[1:])
        if any(side % divisor for side, divisor in zip(sides, self.divisors, strict=True)):
            raise ValueError(
                f"sample_size {sample_size} must be a multiple of {2 ** (levels - 1)} for {levels} resolutions"
                + (", apart from the frames" if self.divisors[0] == 1 < levels else "")
                + f": {nearest_sizes(sides, self.divisors)}"
            )
        height = sides[1] if dimensions == 3 else sides[0]
        resolutions = [height // 2**level for level in range(levels)]
        if not set(attention_resolutions) <= set(resolutions):
            raise ValueError(f"attention_resolutions {tuple(attention_resolutions)} must be among {resolutions}")
        attends = [resolution in attention_resolutions for resolution in resolutions]
        if attention_head_dim is not None and num_attention_heads != 1:
            raise ValueError(
                f"num_attention_heads {num_attention_heads} and attention_head_dim {attention_head_dim} were both "
                "given; leave one at its default"
            )
        # the lowest resolution attends in any case, in the middle block
        attending = {c for c, attend in zip(block_out_channels, attends, strict=True) if attend}
        divisors = {"num_attention_heads": num_attention_heads, "attention_head_dim": attention_head_dim}
        for name, divisor in divisors.items():
            for channels in attending | {block_out_channels[-1]}:
                if divisor is not None and channels % divisor:
                    raise ValueError(f"{name} {divisor} must divide the {channels} channels of a self-attention")
        if progressive_combine == "cat" and progressive_input != "input_skip":
            raise ValueError(
                f"progressive_combine 'cat' needs progressive_input 'input_skip', not {progressive_input!r}"
            )
        if scale_by_sigma and time_embedding_type != "fourier":
            raise ValueError(
                f"scale_by_sigma needs a noise level as timestep, hence time_embedding_type 'fourier', not "
                f"{time_embedding_type!r}"
            )
        if not 0 <= class_dropout_prob <= 1:
            raise ValueError(f"class_dropout_prob {class_dropout_prob} must lie in [0, 1]")
        sample_channels = in_channels - (condition_channels or 0)
        if sample_channels < 1:
            raise ValueError(
                f"condition_channels {condition_channels} are a part of in_channels {in_channels}, which must be more: "
                f"those of the sample, too"
            )
        if learn_sigma and out_channels not in (None, 2 * sample_channels):
            raise ValueError(
                f"out_channels {out_channels} contradicts in_channels {in_channels} with learn_sigma=True"
                + (f" and condition_channels={condition_channels}" if condition_channels else "")
                + f": leave it None or {2 * sample_channels}"
            )
        if out_channels is None:
            out_channels = sample_channels * (2 if learn_sigma else 1)
        self.register_to_config(out_channels=out_channels, model_channels=model_channels)

        style = ARCHITECTURES[architecture]
        first = block_out_channels[0]
        time_channels = 4 * model_channels
        resnet = partial(
            ResnetBlock,
            time_channels=time_channels,
            dropout=dropout,
            style=style,
            time_scale_shift=resnet_time_scale_shift,
            fir=fir,
            dimensions=dimensions,
        )
        attention = partial(attention_block, style=style, num_heads=num_attention_heads, head_dim=attention_head_dim)
        to_context = None if cross_attention_dim is None else partial(attention, context_dim=cross_attention_dim)

        over_frames: dict[str, Any] = {}
        if dimensions == 3:
            over_frames = {"over_frames": partial(FrameLayer, style=style), "halve_frames": halve_frames}

        fourier = time_embedding_type == "fourier"
        self.fourier = FourierEmbedding(model_channels, scale=FOURIER_SCALE) if fourier else None
        time_features = model_channels * (2 if fourier else 1)
        self.time_embed = nn.Sequential(
            nn.Linear(time_features, time_channels), nn.SiLU(), nn.Linear(time_channels, time_channels)
        )
        self.time_to_embed = None
        if two_times:
            self.time_to_embed = nn.Sequential(
                nn.Linear(time_features, time_channels), nn.SiLU(), nn.Linear(time_channels, time_channels)
            )
        self.guidance_embed = None
        if guidance_embeds:
            self.guidance_embed = nn.Sequential(
                nn.Linear(model_channels, time_channels), nn.SiLU(), nn.Linear(time_channels, time_channels)
            )
        self.class_embed = nn.Embedding(num_classes + 1, time_channels) if num_classes is not None else None
        self.pooled_embed = None
        if pooled_projection_dim is not None:
            self.pooled_embed = nn.Sequential(
                nn.Linear(pooled_projection_dim, time_channels), nn.SiLU(), nn.Linear(time_channels, time_channels)
            )
        self.conv_in = convolution(dimensions, in_channels, first)

        # down: `skips` are the channels of every feature map that the way up will see again
        self.down_blocks, skips, channels, pyramid_channels = nn.ModuleList(), [first], first, in_channels
        for level, out in enumerate(block_out_channels):
            inputs = [channels] + [out] * (layers_per_block - 1)
            progressive: nn.Module | None = None
            resample: dict[str, Any] = {}
            channels = out
            skips += [out] * layers_per_block
            if level < levels - 1:
                resample = {"down": True}
                if progressive_input == "residual":
                    progressive = InputResidual(pyramid_channels, out, fir, style.rescale, dimensions)
                    pyramid_channels = out
                elif progressive_input == "input_skip":
                    progressive = InputSkip(in_channels, out, fir, progressive_combine, dimensions)
                    channels = 2 * out if progressive_combine == "cat" else out
                skips.append(channels)
            num_attentions = layers_per_block * attends[level]
            resample |= over_frames
            self.down_blocks.append(
                DownLevel(inputs, out, num_attentions, resnet, attention, to_context, progressive, **resample)
            )

        self.mid_block = MiddleLevel([channels, channels], channels, 1, resnet, attention, to_context, **over_frames)

        self.up_blocks = nn.ModuleList()
        for level in reversed(range(levels)):
            out = block_out_channels[level]
            inputs = [before + skips.pop() for before in [channels] + [out] * layers_per_block]
            resample, progressive = {}, None
            if level:
                resample = {"up": True}
                if progressive_output == "output_skip":
                    to_image = convolution(dimensions, out, out_channels)
                    progressive = nn.Sequential(style.norm(out), nn.SiLU(), to_image)
            num_attentions = attends[level] * (len(inputs) if style.attends_always else 1)
            resample |= over_frames
            self.up_blocks.append(
                UpLevel(inputs, out, num_attentions, resnet, attention, to_context, progressive, **resample)
            )
            channels = out
        upsample = nn.Upsample(scale_factor=along(dimensions, 2))
        self.image_upsample = FIRResample(up=True, dimensions=dimensions) if fir else upsample

        self.norm_out = style.norm(channels)
        self.conv_out = convolution(dimensions, channels, out_channels)
        self.gradient_checkpointing = False
        self.initialize_weights()

    @classmethod
    def from_name(cls, name: str, **overrides):
        """A published model by its name: "DDPM++", "NCSN++" (Song et al. 2021, appendix H; each also " deep") and
        "ADM-64", "ADM-128", "ADM-256", "ADM-512" (Dhariwal & Nichol 2021, with the 1000 classes of ImageNet);
        `overrides` are constructor arguments that replace its own. Raises ValueError for an unknown name."""
        if name not in UNETS:
            raise ValueError(f"model name {name!r} is unknown; choose one of {', '.join(UNETS)}")
        return cls(**(UNETS[name] | overrides))

    def initialize_weights(self):
        """Initialise as the originals do. "ncsnpp": Xavier uniform, queries, keys and values by sqrt(0.1) of it, and
        (almost) zero in the last layer of every residual branch and of the network. "adm": PyTorch's defaults, and
        exactly zero in those last layers. What a second time and a guidance scale add is zero in both, and so is what
        layers over the frames do."""
        style = ARCHITECTURES[self.config.architecture]

        def initialize_last(layer):
            nn.init.xavier_uniform_(layer.weight, gain=style.last_gain)
            nn.init.zeros_(layer.bias)

        if style.ddpm_init:
            for module in self.modules():
                if isinstance(module, (nn.Linear, nn.Conv2d)):
                    nn.init.xavier_uniform_(module.weight)
                    nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, ResnetBlock):
                initialize_last(module.conv2)
            elif isinstance(module, Attention):
                if style.ddpm_init:
                    for projection in (module.to_q, module.to_k, module.to_v):
                        nn.init.xavier_uniform_(projection.weight, gain=0.1**0.5)
                initialize_last(module.to_out[0])
        for level in self.up_blocks:
            if level.progressive is not None:
                initialize_last(level.progressive[-1])
        initialize_last(self.conv_out)
        zeroed = [each[2] for each in (self.time_to_embed, self.guidance_embed) if each is not None]
        for module in self.modules():
            if isinstance(module, FrameLayer):
                zeroed += [module.conv] if module.attention is None else [module.conv, module.attention.to_out[0]]
        for layer in zeroed:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        if self.class_embed is not None and style.ddpm_init:
            nn.init.normal_(self.class_embed.weight, std=0.02)

    def with_two_times(self):
        """A copy of the model that can be told a second time, two_times, and at first gives the same output whatever
        that is. Raises ValueError for a model that cannot."""
        return self.with_further(two_times=True)

    def with_guidance_embeds(self):
        """The same of a guidance scale, guidance_embeds."""
        return self.with_further(guidance_embeds=True)

    def with_frames(self, num_frames: int):
        """A copy of a model of images as one of videos of so many frames, (B, C, num_frames, height, width), that at
        first gives for each frame what the model gives for it as an image. Raises ValueError for a model that
        cannot."""
        if self.config.dimensions != 2:
            raise ValueError(
                f"with_frames is of a model of images; this one's samples have {self.config.dimensions} axes"
            )
        size = self.config.sample_size
        size = (size, size) if isinstance(size, int) else size
        return self.with_further(sample_size=(num_frames, *size), dimensions=3)

    def with_further(self, **arguments):
        """A copy of the model with these arguments, too, whose weights are the same, each in its own dtype, beside
        those that come with them."""
        model = type(self)(**self.config | arguments).to(self.device)
        own = {name: value.clone() for name, value in self.state_dict().items()}
        others = {name: value.to(self.dtype) for name, value in model.state_dict().items() if name not in own}
        model.load_state_dict(own | others, assign=True)
        return model.train(self.training)

    def null_conditions(self, conditions):
        """What stands for "none" of conditions, for classifier-free guidance (Ho & Salimans 2022).

        Args:
            conditions: {argument of `forward`: tensor (B, ...)}.

        Returns {argument: tensor of the same shape} for those that have it: class_labels, the null label;
        encoder_hidden_states and pooled_projections, zeros, of which the network learns biases, and
        encoder_attention_mask, one element; condition_sample, zeros. Nothing with a class_dropout_prob of 0, where
        training showed none of them.
        """
        null = {}
        if self.config.class_dropout_prob > 0:
            if self.config.num_classes is not None and "class_labels" in conditions:
                null["class_labels"] = torch.full_like(conditions["class_labels"], self.config.num_classes)
            for name in ("encoder_hidden_states", "pooled_projections", "condition_sample"):
                if name in conditions:
                    null[name] = torch.zeros_like(conditions[name])
            if "encoder_attention_mask" in conditions:
                # one element, however many a text had
                mask = conditions["encoder_attention_mask"]
                first = torch.arange(mask.shape[1], device=mask.device) == 0
                null["encoder_attention_mask"] = first.to(mask.dtype).expand_as(mask)
        return null

    def forward(
        self,
        sample,
        timestep,
        class_labels=None,
        return_dict: bool = True,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        pooled_projections=None,
        condition_sample=None,
        timestep_to=None,
        guidance=None,
    ):
        """Run the network. What is on another device than `sample` is sent to it.

        Args:
            sample: (B, C, H, W), of signals (B, C, L), of videos (B, C, frames, H, W); C is in_channels less
                condition_channels, L, H and W are multiples of 2^(number of resolutions - 1), with halve_frames the
                frames, too.
            timestep: the number(s) that the scheduler's `timesteps` hold; a scalar or (B,). Noise levels, positive,
                with `time_embedding_type="fourier"`.
            class_labels: (B,) integers in [0, num_classes], `num_classes` being the null label; None means the null
                label for every sample. Must be None for an unconditional model.
            return_dict: return a `UNet2DOutput` instead of a tuple.
            encoder_hidden_states: (B, S, cross_attention_dim), for a model with cross_attention_dim; None means what
                stands for none (`null_conditions`) for every sample.
            encoder_attention_mask: (B, S), True or 1 where an element of the sequence counts, at least one of each;
                None for all.
            pooled_projections: (B, pooled_projection_dim), for a model with pooled_projection_dim; None as above.
            condition_sample: (B, condition_channels, *size), seen beside the sample, for a model with
                condition_channels; None as above.
            timestep_to: the time that the map leads to, in the same numbers as `timestep`, for a model with two_times;
                None means `timestep` itself, so that such a model is an ordinary one, too.
            guidance: the guidance scale(s), a number or (B,), for a model with guidance_embeds; None means 1.

        Returns:
            `.sample` of shape (B, out_channels, *size).

        Raises ValueError for an input of the wrong shape, for labels or another condition that the model doesn't
        have, for those that are missing where training always showed them (a class_dropout_prob of 0), and, on the
        CPU, for labels out of range.
        """
        self.check_shape(sample)
        timestep = self.checked_time("timestep", timestep, sample)  # (B,)
        if timestep_to is not None:
            if self.time_to_embed is None:
                raise ValueError("timestep_to was given to a model without two_times")
            timestep_to = self.checked_time("timestep_to", timestep_to, sample)
        if guidance is not None and self.guidance_embed is None:
            raise ValueError("guidance was given to a model without guidance_embeds")
        if self.guidance_embed is not None:
            guidance = self.checked_time("guidance", 1.0 if guidance is None else guidance, sample)
        time = self.embed_conditioning(timestep, timestep_to, guidance, class_labels, sample)  # (B, 4 model_channels)
        pooled = self.given_or_none(
            "pooled_projections", pooled_projections, (len(sample),), "pooled_projection_dim", sample
        )
        if self.pooled_embed is not None:
            time = time + self.pooled_embed(pooled)
        context, mask = self.context_and_mask(encoder_hidden_states, encoder_attention_mask, sample)

        batch = len(sample)
        sample = self.with_condition(sample, condition_sample)  # (B, in_channels, *size)
        pyramid = self.as_images(sample)  # (B, in_channels, H, W), of videos (B frames, ...), and so on
        hidden = self.conv_in(pyramid)  # (B, C_0, H, W)
        skips = [hidden]
        for level in self.down_blocks:
            hidden, pyramid, own = level(hidden, pyramid, time, context, mask, self.frames_of(hidden, batch))
            skips += own
        hidden = self.mid_block(hidden, time, context, mask, self.frames_of(hidden, batch))
        image = 0
        for level in self.up_blocks:
            own = [skips.pop() for _ in level.resnets]
            hidden, of_level = level(hidden, own, time, context, mask, self.frames_of(hidden, batch))
            if of_level is not None:
                image = self.image_upsample(image + of_level)  # (B, out_channels, 2H', 2W')
                image = image.repeat_interleave(2, dim=0) if level.halve_frames else image

        output = image + self.conv_out(F.silu(self.norm_out(hidden)))  # (B, out_channels, H, W)
        if self.config.dimensions == 1:
            output = output.squeeze(2)
        elif self.config.dimensions == 3:
            output = output.unflatten(0, (batch, -1)).transpose(1, 2)
        if self.config.scale_by_sigma:
            output = (output / timestep.view(-1, *[1] * (output.ndim - 1))).to(output.dtype)
        return UNet2DOutput(sample=output) if return_dict else (output,)

    def check_shape(self, sample):
        """Raise ValueError unless this is a sample (B, C, *size) with axes that the resolutions divide."""
        channels = self.config.in_channels - (self.config.condition_channels or 0)
        size, names = sample.shape[2:], AXES[self.config.dimensions]
        fits = len(size) == len(names) and all(n % divisor == 0 for n, divisor in zip(size, self.divisors, strict=True))
        if not fits or sample.shape[1] != channels:
            divided = [name for name, divisor in zip(names, self.divisors, strict=True) if divisor == self.divisors[-1]]
            raise ValueError(
                f"sample has shape {tuple(sample.shape)}; this model takes (batch, {channels}, {', '.join(names)}) "
                f"with {' and '.join(divided)} multiples of {self.divisors[-1]}"
            )

    def as_images(self, sample):
        """A sample (B, C, *size) as images: a signal as one of a single row (B, C, 1, L), a video as its frames (B
        frames, C, H, W)."""
        if self.config.dimensions == 1:
            return sample.unsqueeze(2)
        return sample.transpose(1, 2).flatten(0, 1) if self.config.dimensions == 3 else sample

    def frames_of(self, hidden, batch):
        """How many frames features (B frames, ...) of so many videos have; None of other samples."""
        return len(hidden) // batch if self.config.dimensions == 3 else None

    @staticmethod
    def checked_time(name, timestep, sample):
        """One time or one for each sample, as float32 (B,). Raises ValueError for another shape."""
        if isinstance(timestep, (int, float)):
            # a kernel fills it in: nobody waits
            timestep = torch.full((), timestep, dtype=torch.float32, device=sample.device)
        timestep = torch.as_tensor(timestep, dtype=torch.float32, device=sample.device)
        if timestep.shape not in ((), (1,), sample.shape[:1]):
            raise ValueError(
                f"{name} has shape {tuple(timestep.shape)}; it must be a number or have shape ({sample.shape[0]},)"
            )
        return timestep.expand(sample.shape[0])

    def with_condition(self, sample, condition_sample):
        """A sample (B, C, *size) with the channels that it is seen beside behind it, (B, in_channels, *size). Raises
        ValueError for those that don't fit."""
        channels = self.config.condition_channels
        if channels is None:
            if condition_sample is not None:
                raise ValueError("condition_sample was given to a model without condition_channels")
            return sample
        wanted = (len(sample), channels, *sample.shape[2:])
        if condition_sample is None:
            if self.config.class_dropout_prob == 0:
                raise ValueError(f"condition_sample is missing: this model needs {wanted}")
            condition_sample = sample.new_zeros(wanted)
        if tuple(condition_sample.shape) != wanted:
            raise ValueError(f"condition_sample has shape {tuple(condition_sample.shape)}; this model takes {wanted}")
        return torch.cat([sample, condition_sample.to(sample)], dim=1)

    def given_or_none(self, name, value, shape, width_name, sample):
        """A condition (*shape, width) on the sample's device, or zeros for one that isn't given; None for a model
        without. `shape` may have None for any length. Raises ValueError for one that doesn't fit."""
        width = self.config[width_name]
        if value is None and width is not None and self.config.class_dropout_prob > 0:
            return sample.new_zeros([1 if side is None else side for side in shape] + [width])
        if (value is None) != (width is None):
            raise ValueError(
                f"{name} were given to a model without {width_name}"
                if width is None
                else f"{name} is missing: this model needs vectors of width {width}"
            )
        if value is not None:
            fits = value.ndim == len(shape) + 1 and value.shape[-1] == width
            if not fits or any(side not in (None, own) for side, own in zip(shape, value.shape, strict=False)):
                wanted = ", ".join("sequence" if side is None else str(side) for side in shape)
                raise ValueError(f"{name} has shape {tuple(value.shape)}; this model takes ({wanted}, {width})")
        return value if value is None else value.to(sample.device)

    def context_and_mask(self, encoder_hidden_states, mask, sample):
        """The sequence (B, S, cross_attention_dim) and which of it counts (B, 1, 1, S), each None where there is none.
        Raises ValueError for those that don't fit."""
        if mask is not None and encoder_hidden_states is None:
            raise ValueError("encoder_attention_mask was given without encoder_hidden_states")
        context = self.given_or_none(
            "encoder_hidden_states", encoder_hidden_states, (len(sample), None), "cross_attention_dim", sample
        )
        if mask is None:
            return context, None
        if mask.shape != context.shape[:2]:
            raise ValueError(
                f"encoder_attention_mask has shape {tuple(mask.shape)}; the sequence needs {tuple(context.shape[:2])}"
            )
        return context, mask.to(sample.device, torch.bool)[:, None, None]

    def time_features(self, timestep, sample):
        """Waves of times (B,), in the dtype of `sample`."""
        if self.fourier is not None:
            return self.fourier(timestep.float()).to(sample.dtype)
        return self.positional_features(timestep, sample)

    def positional_features(self, numbers, sample):
        """Sines and cosines of numbers (B,), (B, model_channels), in the dtype of `sample`."""
        style = ARCHITECTURES[self.config.architecture]
        features = get_timestep_embedding(
            numbers,
            self.config.model_channels,
            flip_sin_to_cos=style.cosines_first,
            downscale_freq_shift=style.frequency_shift,
        )
        return features.to(sample.dtype)

    def embed_conditioning(self, timestep, timestep_to, guidance, class_labels, sample):
        """Sum of the embeddings of one or two times (B,), a guidance scale (B,) and label (B,), (B, 4
        model_channels)."""
        embedding = self.time_embed(self.time_features(timestep, sample))
        if self.time_to_embed is not None:
            to = timestep if timestep_to is None else timestep_to
            embedding = embedding + self.time_to_embed(self.time_features(to, sample))
        if self.guidance_embed is not None:
            embedding = embedding + self.guidance_embed(self.positional_features(GUIDANCE_STEPS * guidance, sample))
        if self.class_embed is None:
            if class_labels is not None:
                raise ValueError("class_labels were given to a model without classes (num_classes=None)")
            return embedding

        batch_size = timestep.shape[0]
        if class_labels is None:
            class_labels = torch.full((batch_size,), self.config.num_classes, device=timestep.device)
        if tuple(class_labels.shape) != (batch_size,):
            raise ValueError(f"class_labels has shape {tuple(class_labels.shape)}; the batch needs ({batch_size},)")
        check_ids("class label", class_labels, self.config.num_classes, ", of which the last is no class (num_classes)")
        return embedding + self.class_embed(class_labels.to(sample.device))
