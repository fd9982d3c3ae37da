"""The Diffusion Transformer (DiT) of Peebles & Xie 2023, "Scalable Diffusion Models with Transformers".

One self-contained file: it is copied beside the weights when a model is shared, so it imports torch and diffusers only.
The network knows nothing of noise: it maps (sample, number, label) to a tensor, and the scheduler gives it a meaning.
"""

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin, AttentionModuleMixin, FeedForward
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import nn


# Peebles & Xie 2023, Table 1: layers, hidden size, attention heads.
DIT_SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
DIT_PATCHES = (2, 4, 8)

FREQUENCY_EMBEDDING_SIZE = 256


def modulate(x, shift, scale):
    """Layer norm without parameters, then the shift and scale of adaLN: (B, T, D), (B, D), (B, D) -> (B, T, D)."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def sincos_position_embedding(grid_size, hidden_size):
    """Fixed 2-D sine-cosine positions (grid_size ** 2, hidden_size), float32: columns in the first half, then rows."""
    frequencies = 10000.0 ** (-torch.arange(hidden_size // 4, dtype=torch.float64) / (hidden_size // 4))
    angles = torch.arange(grid_size, dtype=torch.float64).outer(frequencies)
    table = torch.cat([angles.sin(), angles.cos()], dim=1)  # (grid, D/2)
    columns = table.expand(grid_size, -1, -1)
    rows = table.unsqueeze(1).expand(-1, grid_size, -1)
    return torch.cat([columns, rows], dim=-1).flatten(0, 1).to(torch.float32)


class DiTAttnProcessor:
    """Calls diffusers' attention dispatch, so `set_attention_backend` works."""

    _attention_backend = None
    _parallel_config = None

    def __call__(self, attn, hidden_states):
        if attn.fused_projections:
            query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        heads = [x.unflatten(-1, (attn.heads, -1)) for x in (query, key, value)]  # (B, T, heads, D / heads)
        out = dispatch_attention_fn(*heads, backend=self._attention_backend, parallel_config=self._parallel_config)
        return attn.to_out[0](out.flatten(2))  # (B, T, D)


class DiTAttention(nn.Module, AttentionModuleMixin):
    """Multi-head self-attention with diffusers' names for the projections."""

    _default_processor_cls = DiTAttnProcessor
    _available_processors = [DiTAttnProcessor]

    def __init__(self, hidden_size, num_attention_heads):
        super().__init__()
        self.heads = num_attention_heads
        self.use_bias = True
        self.is_cross_attention = False
        self.to_q = nn.Linear(hidden_size, hidden_size)
        self.to_k = nn.Linear(hidden_size, hidden_size)
        self.to_v = nn.Linear(hidden_size, hidden_size)
        self.to_out = nn.ModuleList([nn.Linear(hidden_size, hidden_size)])
        self.set_processor(DiTAttnProcessor())

    def forward(self, hidden_states):
        return self.processor(self, hidden_states)


class DiTBlock(nn.Module):
    """A transformer block with adaLN-Zero conditioning (Peebles & Xie 2023, Fig. 3)."""

    def __init__(self, hidden_size, num_attention_heads, mlp_ratio):
        super().__init__()
        self.attn = DiTAttention(hidden_size, num_attention_heads)
        self.ff = FeedForward(hidden_size, inner_dim=int(hidden_size * mlp_ratio), activation_fn="gelu-approximate")

    def forward(self, hidden_states, modulation):
        """hidden_states (B, T, D); modulation (B, 6, D): shift, scale, gate of attention, then of the MLP."""
        shift_attn, scale_attn, gate_attn, shift_ff, scale_ff, gate_ff = modulation.unbind(1)
        attended = self.attn(modulate(hidden_states, shift_attn, scale_attn))
        hidden_states = hidden_states + gate_attn.unsqueeze(1) * attended
        return hidden_states + gate_ff.unsqueeze(1) * self.ff(modulate(hidden_states, shift_ff, scale_ff))


class DiTModel(ModelMixin, ConfigMixin, AttentionMixin, PeftAdapterMixin):
    """Diffusion Transformer with adaLN-Zero conditioning (Peebles & Xie 2023).

    A freshly initialised model outputs exactly zero. In training mode each sample's label is replaced by the null
    label, once for the whole network, with probability `class_dropout_prob`, so that classifier-free guidance works.

    Args:
        sample_size: height and width of the (square) input, in pixels or latent cells.
        patch_size: side of a patch; must divide `sample_size`.
        in_channels: channels of the input.
        hidden_size: width D of the tokens; a multiple of `num_attention_heads` and of 4.
        num_layers: number of transformer blocks.
        num_attention_heads: heads per block.
        num_classes: number of class labels, or None for an unconditional model. The label `num_classes` itself is the
            null label.
        class_dropout_prob: probability, in [0, 1], that a training sample's label is replaced by the null label.
        learn_sigma: predict a variance beside the mean: the output then has twice the channels of the input.
        out_channels: channels of the output; derived from `learn_sigma` when None.
        mlp_ratio: hidden width of the MLP in units of `hidden_size`.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["DiTBlock"]
    _repeated_blocks = ["DiTBlock"]
    _skip_layerwise_casting_patterns = ["patch_embed", "adaln", "proj_out"]

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 384,
        num_layers: int = 12,
        num_attention_heads: int = 6,
        num_classes: int | None = 1000,
        class_dropout_prob: float = 0.1,
        learn_sigma: bool = False,
        out_channels: int | None = None,
        mlp_ratio: float = 4.0,
    ):
        super().__init__()
        if sample_size % patch_size:
            raise ValueError(f"patch_size {patch_size} must divide sample_size {sample_size}")
        if hidden_size % num_attention_heads or hidden_size % 4:
            raise ValueError(
                f"hidden_size {hidden_size} must be a multiple of num_attention_heads {num_attention_heads} and of 4"
            )
        if num_classes is not None and num_classes < 1:
            raise ValueError(f"num_classes {num_classes} must be at least 1, or None for an unconditional model")
        if not 0 <= class_dropout_prob <= 1:
            raise ValueError(f"class_dropout_prob {class_dropout_prob} must lie in [0, 1]")
        derived_channels = in_channels * (2 if learn_sigma else 1)
        if out_channels not in (None, derived_channels):
            raise ValueError(
                f"out_channels {out_channels} contradicts in_channels {in_channels} with learn_sigma={learn_sigma}: "
                f"leave it out, or pass {derived_channels}"
            )
        # stock pipelines read config.out_channels as a number
        self.register_to_config(out_channels=derived_channels)

        self.patch_embed = nn.Linear(in_channels * patch_size**2, hidden_size)
        positions = sincos_position_embedding(sample_size // patch_size, hidden_size)
        self.register_buffer("positions", positions, persistent=False)
        self.time_embed = nn.Sequential(
            nn.Linear(FREQUENCY_EMBEDDING_SIZE, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )
        self.class_embed = nn.Embedding(num_classes + 1, hidden_size) if num_classes is not None else None
        # the modulation of every block (6 D each) and of the output layer (2 D), in one matrix product a forward
        self.adaln = nn.Linear(hidden_size, (6 * num_layers + 2) * hidden_size)
        self.blocks = nn.ModuleList(DiTBlock(hidden_size, num_attention_heads, mlp_ratio) for _ in range(num_layers))
        self.proj_out = nn.Linear(hidden_size, patch_size**2 * derived_channels)
        self.gradient_checkpointing = False
        self.initialize_weights()

    @classmethod
    def from_name(cls, name: str, **overrides):
        """A model of the paper by its name, "DiT-{S,B,L,XL}/{2,4,8}" (Peebles & Xie 2023, Table 1), for 1000 classes
        and 32x32x4 latents with a learned variance; `overrides` are constructor arguments that replace these.

        Raises ValueError for an unknown name.
        """
        names = {f"DiT-{size}/{patch}": (size, patch) for size in DIT_SIZES for patch in DIT_PATCHES}
        if name not in names:
            raise ValueError(f"model name {name!r} is unknown; choose one of {', '.join(names)}")
        size, patch_size = names[name]
        num_layers, hidden_size, num_attention_heads = DIT_SIZES[size]
        config = {
            "patch_size": patch_size,
            "num_layers": num_layers,
            "hidden_size": hidden_size,
            "num_attention_heads": num_attention_heads,
            "learn_sigma": True,
        }
        return cls(**(config | overrides))

    def initialize_weights(self):
        """Initialise as the original does: Xavier uniform, embeddings N(0, 0.02), and zero modulation and output."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for block in self.blocks:
            for projection in (block.attn.to_q, block.attn.to_k, block.attn.to_v):
                # the original initialises one fused (3 D, D) matrix, whose Xavier bound is smaller by sqrt(2)
                nn.init.xavier_uniform_(projection.weight, gain=2**-0.5)
        nn.init.normal_(self.time_embed[0].weight, std=0.02)
        nn.init.normal_(self.time_embed[2].weight, std=0.02)
        if self.class_embed is not None:
            nn.init.normal_(self.class_embed.weight, std=0.02)
        for zeroed in (self.adaln, self.proj_out):
            nn.init.zeros_(zeroed.weight)
            nn.init.zeros_(zeroed.bias)

    def forward(self, hidden_states, timestep, class_labels=None, return_dict: bool = True):
        """Run the network.

        Args:
            hidden_states: (B, in_channels, sample_size, sample_size).
            timestep: the number(s) that the scheduler's `timesteps` hold; a scalar or (B,).
            class_labels: (B,) integers in [0, num_classes], `num_classes` being the null label; None means the null
                label for every sample. Must be None for an unconditional model.
            return_dict: return a `Transformer2DModelOutput` instead of a tuple.

        Returns:
            `.sample` of shape (B, out_channels, sample_size, sample_size).

        Raises ValueError for an input of the wrong shape and for labels given to an unconditional model.
        """
        batch_size = hidden_states.shape[0]
        expected = (self.config.in_channels, self.config.sample_size, self.config.sample_size)
        if hidden_states.ndim != 4 or tuple(hidden_states.shape[1:]) != expected:
            raise ValueError(
                f"hidden_states has shape {tuple(hidden_states.shape)}; this model takes (batch, *{expected})"
            )

        conditioning = self.embed_conditioning(timestep, class_labels, batch_size, hidden_states.dtype)  # (B, D)
        modulation = self.adaln(F.silu(conditioning)).unflatten(1, (-1, self.config.hidden_size))  # (B, 6 L + 2, D)

        patches = self.patchify(hidden_states)  # (B, T, C p p)
        hidden_states = self.patch_embed(patches) + self.positions.to(patches.dtype)  # (B, T, D)
        for index, block in enumerate(self.blocks):
            block_modulation = modulation[:, 6 * index : 6 * index + 6]
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(block, hidden_states, block_modulation)
            else:
                hidden_states = block(hidden_states, block_modulation)  # (B, T, D)
        shift, scale = modulation[:, -2:].unbind(1)
        sample = self.unpatchify(self.proj_out(modulate(hidden_states, shift, scale)))  # (B, out_channels, H, W)

        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def embed_conditioning(self, timestep, class_labels, batch_size, dtype):
        """Sum of the embeddings of time and label, (B, D)."""
        device = self.adaln.weight.device
        timestep = torch.as_tensor(timestep, device=device).expand(batch_size)
        # cosines first, frequencies 10000 ** (-i / 128), as in the original
        frequencies = get_timestep_embedding(
            timestep, FREQUENCY_EMBEDDING_SIZE, flip_sin_to_cos=True, downscale_freq_shift=0
        )
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

    def patchify(self, x):
        """(B, C, H, W) -> (B, T, C p p), row by row."""
        p, side = self.config.patch_size, self.config.sample_size // self.config.patch_size
        x = x.reshape(x.shape[0], x.shape[1], side, p, side, p)
        return x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)

    def unpatchify(self, tokens):
        """(B, T, p p C) -> (B, C, H, W)."""
        p, side = self.config.patch_size, self.config.sample_size // self.config.patch_size
        x = tokens.reshape(tokens.shape[0], side, side, p, p, self.config.out_channels)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(x.shape[0], -1, side * p, side * p)
