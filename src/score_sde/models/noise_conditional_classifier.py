"""A classifier of noisy samples, for classifier guidance (Song et al. 2021, section 5; Dhariwal & Nichol 2021).

One self-contained file, like the other models. It knows nothing of noise paths: `ScoreSDEScheduler.classifier_input`
says what it receives, which is the same on every path, so one classifier guides models of any.
"""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import TimestepEmbedding, get_timestep_embedding
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d_blocks import DownBlock2D
from diffusers.utils import BaseOutput
from torch import nn


def check_counts(**values):
    """Raise ValueError for a value that is no whole number from 1 on."""
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} {value!r} must be a whole number, at least 1")


@dataclass
class NoiseConditionalClassifierOutput(BaseOutput):
    """logits: (B, num_classes), float32."""

    logits: torch.Tensor


# diffusers' mixins contradict each other in `config_name`
class NoiseConditionalClassifier(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Residual blocks at falling resolutions, told the noise level, then the mean over all positions: the way down of a
    diffusion U-Net.

    Args:
        sample_size: height and width of the training samples; other sizes are taken too.
        in_channels: channels of the samples.
        num_classes: number of classes.
        block_out_channels: channels at each resolution, multiples of norm_num_groups; each but the first halves height
            and width.
        layers_per_block: residual blocks at each resolution.
        norm_num_groups: groups of the group normalisation.
        dropout: dropout probability inside the residual blocks and before the last layer.
    """

    # whose entries are attributes, other than diffusers says
    config: Any
    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        in_channels: int = 3,
        num_classes: int = 10,
        block_out_channels: tuple[int, ...] = (64, 128, 128),
        layers_per_block: int = 1,
        norm_num_groups: int = 16,
        dropout: float = 0.1,
    ):
        super().__init__()
        check_counts(
            sample_size=sample_size,
            in_channels=in_channels,
            num_classes=num_classes,
            layers_per_block=layers_per_block,
            norm_num_groups=norm_num_groups,
        )
        whole = all(isinstance(channels, int) and channels >= 4 for channels in block_out_channels)
        if not block_out_channels or not whole:
            raise ValueError(f"block_out_channels {block_out_channels} must be one or more whole numbers, at least 4")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout {dropout} must lie in [0, 1)")
        if any(channels % norm_num_groups for channels in block_out_channels):
            raise ValueError(f"norm_num_groups {norm_num_groups} must divide block_out_channels {block_out_channels}")
        first, last = block_out_channels[0], block_out_channels[-1]
        self.conv_in = nn.Conv2d(in_channels, first, 3, padding=1)
        self.time_embed = TimestepEmbedding(first, 4 * first)
        self.down_blocks = nn.ModuleList(
            DownBlock2D(
                in_channels=inputs,
                out_channels=outputs,
                temb_channels=4 * first,
                num_layers=layers_per_block,
                dropout=dropout,
                resnet_groups=norm_num_groups,
                add_downsample=i + 1 < len(block_out_channels),
            )
            for i, (inputs, outputs) in enumerate(zip((first, *block_out_channels), block_out_channels, strict=False))
        )
        self.norm_out = nn.GroupNorm(norm_num_groups, last)
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(last, num_classes))

    def forward(self, sample, half_log_snr, return_dict: bool = True):
        """Classify noisy samples.

        Args:
            sample: x_t / sqrt(alpha^2 + sigma^2), (B, in_channels, H, W).
            half_log_snr: log(alpha / sigma), (B,).
            return_dict: return a `NoiseConditionalClassifierOutput` instead of the tuple (logits,).

        Raises ValueError for another number of channels.
        """
        if sample.ndim != 4 or sample.shape[1] != self.config.in_channels:
            raise ValueError(f"sample must be (B, {self.config.in_channels}, H, W); got {tuple(sample.shape)}")
        # in hundredths, which the sinusoids tell apart
        half_log_snr = half_log_snr.to(sample.device, torch.float32)
        embedding = get_timestep_embedding(100 * half_log_snr, self.conv_in.out_channels)
        embedding = self.time_embed(embedding.to(sample.dtype))
        x = self.conv_in(sample)
        for block in self.down_blocks:
            x, _ = block(x, embedding)
        x = nn.functional.silu(self.norm_out(x)).mean(dim=(2, 3))
        logits = self.head(x).float()
        return NoiseConditionalClassifierOutput(logits=logits) if return_dict else (logits,)
