"""The U-Net of Song et al. 2021, "Score-Based Generative Modeling through Stochastic Differential Equations".

One self-contained file: it is copied beside the weights when a model is shared, so it imports torch and diffusers only.
The network knows nothing of noise: it maps (sample, number, label) to a tensor, and the scheduler gives it a meaning.
"""

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention import AttentionMixin
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import nn


# block_out_channels, layers_per_block, attention_resolutions of the CIFAR-10 models of Song et al. 2021 (appendix H)
UNETS = {"DDPM++": ((128, 256, 256, 256), 4, (16,)), "DDPM++ deep": ((128, 256, 256, 256), 8, (16,))}

NORM_EPS = 1e-6
# "zero" weights are this small instead, as in the original
ZERO_SCALE = 1e-10


def norm_groups(channels):
    return min(channels // 4, 32)


class ResnetBlock(ResnetBlock2D):
    """BigGAN-type residual block, (B, C, H, W) -> (B, out_channels, H, W) or half or twice the height and width; the
    sum is divided by sqrt(2)."""

    def __init__(self, in_channels, out_channels, time_channels, dropout, **resample):
        super().__init__(
            in_channels=in_channels,
            out_channels=out_channels,
            temb_channels=time_channels,
            dropout=dropout,
            groups=norm_groups(in_channels),
            groups_out=norm_groups(out_channels),
            eps=NORM_EPS,
            output_scale_factor=2**0.5,
            use_in_shortcut=in_channels != out_channels or bool(resample),
            **resample,
        )


def attention_block(channels):
    """Single-head self-attention over all positions; the sum is divided by sqrt(2)."""
    return Attention(
        query_dim=channels,
        heads=1,
        dim_head=channels,
        bias=True,
        norm_num_groups=norm_groups(channels),
        eps=NORM_EPS,
        residual_connection=True,
        rescale_output_factor=2**0.5,
    )


class UNetLevel(nn.Module):
    """All blocks of one resolution on the way down or up: residual blocks, attention, and a resampling block.

    On the way down attention follows every residual block and resampling comes last; on the way up it follows the last
    residual block only.
    """

    def __init__(self, channels, out_channels, time_channels, dropout, num_attentions, **resample):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(c, out_channels, time_channels, dropout) for c in channels)
        self.attentions = nn.ModuleList(attention_block(out_channels) for _ in range(num_attentions))
        self.resample = (
            ResnetBlock(out_channels, out_channels, time_channels, dropout, **resample) if resample else None
        )


class ScoreUNetModel(ModelMixin, ConfigMixin, AttentionMixin):
    """The score U-Net in its DDPM++ configuration (Song et al. 2021, appendix H): residual blocks of BigGAN type that
    also resample, skip connections rescaled by 1/sqrt(2), a sinusoidal embedding of time. The defaults are the
    published CIFAR-10 model.

    In training mode each sample's label is replaced by the null label, once for the whole network, with probability
    `class_dropout_prob`, so that classifier-free guidance works.

    Args:
        sample_size: height and width of the training images; the network itself takes other sizes too.
        in_channels: channels of the input.
        out_channels: channels of the output; those of the input when None.
        block_out_channels: channels at each resolution, multiples of 4; each but the first halves height and width.
        layers_per_block: residual blocks at each resolution on the way down, one more on the way up.
        attention_resolutions: heights (at `sample_size`) of the feature maps that have self-attention.
        dropout: dropout probability inside the residual blocks.
        num_classes: number of class labels, or None for an unconditional model. The label `num_classes` itself is the
            null label.
        class_dropout_prob: probability, in [0, 1], that a training sample's label is replaced by the null label.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["ResnetBlock", "Attention"]
    _skip_layerwise_casting_patterns = ["norm", "time_embed", "conv_in", "conv_out"]

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        in_channels: int = 3,
        out_channels: int | None = None,
        block_out_channels: tuple[int, ...] = (128, 256, 256, 256),
        layers_per_block: int = 4,
        attention_resolutions: tuple[int, ...] = (16,),
        dropout: float = 0.1,
        num_classes: int | None = None,
        class_dropout_prob: float = 0.1,
    ):
        super().__init__()
        levels = len(block_out_channels)
        if any(channels % 4 or channels % norm_groups(channels) for channels in block_out_channels):
            raise ValueError(
                f"block_out_channels {tuple(block_out_channels)} must be multiples of 4, and of 32 from 128 channels on"
            )
        if sample_size % 2 ** (levels - 1):
            raise ValueError(
                f"sample_size {sample_size} must be a multiple of {2 ** (levels - 1)} for {levels} resolutions"
            )
        resolutions = [sample_size // 2**level for level in range(levels)]
        if not set(attention_resolutions) <= set(resolutions):
            raise ValueError(f"attention_resolutions {tuple(attention_resolutions)} must be among {resolutions}")
        if num_classes is not None and num_classes < 1:
            raise ValueError(f"num_classes {num_classes} must be at least 1, or None for an unconditional model")
        if not 0 <= class_dropout_prob <= 1:
            raise ValueError(f"class_dropout_prob {class_dropout_prob} must lie in [0, 1]")
        self.register_to_config(out_channels=in_channels if out_channels is None else out_channels)

        first = block_out_channels[0]
        time_channels = 4 * first
        common = {"time_channels": time_channels, "dropout": dropout}
        self.time_embed = nn.Sequential(
            nn.Linear(first, time_channels), nn.SiLU(), nn.Linear(time_channels, time_channels)
        )
        self.class_embed = nn.Embedding(num_classes + 1, time_channels) if num_classes is not None else None
        self.conv_in = nn.Conv2d(in_channels, first, 3, padding=1)

        # down: `skips` are the channels of every feature map that the way up will see again
        self.down_blocks, skips, channels = nn.ModuleList(), [first], first
        for level, out in enumerate(block_out_channels):
            attends, last = resolutions[level] in attention_resolutions, level == levels - 1
            inputs = [channels] + [out] * (layers_per_block - 1)
            resample = {} if last else {"down": True}
            self.down_blocks.append(
                UNetLevel(inputs, out, num_attentions=layers_per_block * attends, **common, **resample)
            )
            skips += [out] * (layers_per_block + (not last))
            channels = out

        self.mid_block = UNetLevel([channels, channels], channels, num_attentions=1, **common)

        self.up_blocks = nn.ModuleList()
        for level in reversed(range(levels)):
            out = block_out_channels[level]
            inputs = [before + skips.pop() for before in [channels] + [out] * layers_per_block]
            resample = {"up": True} if level else {}
            attends = resolutions[level] in attention_resolutions
            self.up_blocks.append(UNetLevel(inputs, out, num_attentions=int(attends), **common, **resample))
            channels = out

        self.norm_out = nn.GroupNorm(norm_groups(channels), channels, eps=NORM_EPS)
        self.conv_out = nn.Conv2d(channels, self.config.out_channels, 3, padding=1)
        self.gradient_checkpointing = False
        self.initialize_weights()

    @classmethod
    def from_name(cls, name: str, **overrides):
        """A published model by its name, "DDPM++" or "DDPM++ deep" (Song et al. 2021, appendix H); `overrides` are
        constructor arguments that replace its own. Raises ValueError for an unknown name."""
        if name not in UNETS:
            raise ValueError(f"model name {name!r} is unknown; choose one of {', '.join(UNETS)}")
        keys = ("block_out_channels", "layers_per_block", "attention_resolutions")
        return cls(**(dict(zip(keys, UNETS[name], strict=True)) | overrides))

    def initialize_weights(self):
        """Initialise as the original does: Xavier uniform, queries, keys and values by sqrt(0.1) of it, and (almost)
        zero in the last layer of every residual branch and of the network."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, ResnetBlock):
                nn.init.xavier_uniform_(module.conv2.weight, gain=ZERO_SCALE**0.5)
            elif isinstance(module, Attention):
                for projection in (module.to_q, module.to_k, module.to_v):
                    nn.init.xavier_uniform_(projection.weight, gain=0.1**0.5)
                nn.init.xavier_uniform_(module.to_out[0].weight, gain=ZERO_SCALE**0.5)
        nn.init.xavier_uniform_(self.conv_out.weight, gain=ZERO_SCALE**0.5)
        if self.class_embed is not None:
            nn.init.normal_(self.class_embed.weight, std=0.02)

    def forward(self, sample, timestep, class_labels=None, return_dict: bool = True):
        """Run the network.

        Args:
            sample: (B, in_channels, H, W); H and W are multiples of 2^(number of resolutions - 1).
            timestep: the number(s) that the scheduler's `timesteps` hold; a scalar or (B,).
            class_labels: (B,) integers in [0, num_classes], `num_classes` being the null label; None means the null
                label for every sample. Must be None for an unconditional model.
            return_dict: return a `UNet2DOutput` instead of a tuple.

        Returns:
            `.sample` of shape (B, out_channels, H, W).

        Raises ValueError for an input of the wrong shape and for labels given to an unconditional model.
        """
        factor = 2 ** (len(self.config.block_out_channels) - 1)
        channels = self.config.in_channels
        if sample.ndim != 4 or sample.shape[1] != channels or sample.shape[2] % factor or sample.shape[3] % factor:
            raise ValueError(
                f"sample has shape {tuple(sample.shape)}; this model takes (batch, {channels}, height, width) with "
                f"height and width multiples of {factor}"
            )
        time = self.embed_conditioning(timestep, class_labels, sample.shape[0], sample.dtype)  # (B, 4 C_0)

        hidden = self.conv_in(sample)  # (B, C_0, H, W)
        skips = [hidden]
        for level in self.down_blocks:
            for i, resnet in enumerate(level.resnets):
                hidden = self.run(resnet, hidden, time)
                if level.attentions:
                    hidden = self.run(level.attentions[i], hidden)
                skips.append(hidden)
            if level.resample is not None:
                hidden = self.run(level.resample, hidden, time)
                skips.append(hidden)

        before, after = self.mid_block.resnets
        hidden = self.run(before, hidden, time)
        hidden = self.run(self.mid_block.attentions[0], hidden)
        hidden = self.run(after, hidden, time)

        for level in self.up_blocks:
            for resnet in level.resnets:
                hidden = self.run(resnet, torch.cat([hidden, skips.pop()], dim=1), time)
            for attention in level.attentions:
                hidden = self.run(attention, hidden)
            if level.resample is not None:
                hidden = self.run(level.resample, hidden, time)

        output = self.conv_out(nn.functional.silu(self.norm_out(hidden)))  # (B, out_channels, H, W)
        return UNet2DOutput(sample=output) if return_dict else (output,)

    def run(self, block, *inputs):
        """Call a block, recomputing it in the backward pass when gradient checkpointing is on."""
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(block, *inputs)
        return block(*inputs)

    def embed_conditioning(self, timestep, class_labels, batch_size, dtype):
        """Sum of the embeddings of time and label, (B, 4 C_0)."""
        device = self.conv_in.weight.device
        timestep = torch.as_tensor(timestep, device=device).expand(batch_size)
        # sines first, the last frequency exactly 1/10000, as in the original
        frequencies = get_timestep_embedding(timestep, self.config.block_out_channels[0], downscale_freq_shift=1)
        embedding = self.time_embed(frequencies.to(dtype))
        if self.class_embed is None:
            if class_labels is not None:
                raise ValueError("class_labels were given to a model without classes (num_classes=None)")
            return embedding

        null_label = self.config.num_classes
        if class_labels is None:
            class_labels = torch.full((batch_size,), null_label, device=device)
        if tuple(class_labels.shape) != (batch_size,):
            raise ValueError(f"class_labels has shape {tuple(class_labels.shape)}; the batch needs ({batch_size},)")
        if self.training and self.config.class_dropout_prob > 0:
            dropped = torch.rand(batch_size, device=device) < self.config.class_dropout_prob
            class_labels = class_labels.masked_fill(dropped, null_label)
        return embedding + self.class_embed(class_labels)
