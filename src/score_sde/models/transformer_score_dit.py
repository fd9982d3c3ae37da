"""The Diffusion Transformer (DiT) of Peebles & Xie 2023, "Scalable Diffusion Models with Transformers"; for
videos also that of Ma et al. 2024, "Latte: Latent Diffusion Transformer for Video Generation".

One self-contained file: it is copied beside the weights when a model is shared, so it imports torch and diffusers only.
The network knows nothing of noise: it maps (sample, number, label or sequence) to a tensor, and the scheduler gives it
a meaning; preconditioning, such as EDM's, belongs to the scheduler's prediction types.
"""

import math
import time
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin, AttentionModuleMixin, FeedForward
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.embeddings import apply_rotary_emb, get_timestep_embedding
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.constants import DIFFUSERS_ATTN_BACKEND
from torch import nn
from torch._subclasses import FakeTensor


# Peebles & Xie 2023, Table 1: layers, hidden size, attention heads.
DIT_SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
DIT_PATCHES = (2, 4, 8)

# number of vectors that modulate a block; None where conditioning comes as tokens
CONDITIONINGS = {"adaln_zero": 6, "adaln": 4, "cross_attention": None, "in_context": None}
HAS_ONEDNN = torch.backends.mkldnn.is_available()
POSITION_EMBEDDINGS = ("sincos", "rotary", "sincos_rotary")
POSITION_SCALINGS = ("resize", "extrapolate")
# what isn't said, of samples of numbers and of tokens
DEFAULTS: dict[str, Any] = {"patch_size": 2, "in_channels": 4, "position_embedding": "sincos"}
DEFAULTS |= {"position_scaling": "resize"}
TOKEN_DEFAULTS: dict[str, Any] = {"patch_size": 1, "in_channels": None, "position_embedding": "rotary"}
TOKEN_DEFAULTS |= {"position_scaling": "extrapolate"}

# regions that points lie in, and what is none: as the scheduler names them
DOMAINS = ("torus", "box", "sphere", "flat")

FREQUENCY_EMBEDDING_SIZE = 256
# what a guidance scale is multiplied by before its embedding, so that 0 to 10 are told apart as 1000 time steps are
GUIDANCE_STEPS = 100.0
NORM_EPS = 1e-6
# what a table of positions may hold
MAX_TOKENS = 2**20
# the finest wave of a point's coordinates: 2^16 of them on a circle
MAX_FREQUENCIES = 16
# tables of positions that a model keeps, beside that of its training size
MAX_TABLES = 16
# explicit attention keeps its weights for the gradient: for more keys than this they would be most of what is kept
MAX_EXPLICIT_KEYS = 512


def over_tokens(vectors):
    """Vectors of samples (B, D), or of each token (B, T, D), as they join tokens (B, T, D)."""
    return vectors if vectors.ndim == 3 else vectors.unsqueeze(1)


def modulate(x, shift, scale):
    """Layer norm without parameters, then the shift and scale of adaLN, (B, D) or of each token: (B, T, D) -> the same
    shape."""
    normed = F.layer_norm(x, x.shape[-1:], eps=NORM_EPS)
    return torch.addcmul(over_tokens(shift), normed, 1 + over_tokens(scale))


def position_angles(grid, trained_grid, scaling, frequencies_per_axis, device=None):
    """Angles of sine-cosine and rotary positions along each axis, (size, frequencies_per_axis), float64; frequencies
    10000^(-i / frequencies_per_axis).

    Positions count patches. For another grid than the trained one they go on counting (extrapolate), or are spread over
    the extent that was trained (resize).
    """
    exponents = -torch.arange(frequencies_per_axis, dtype=torch.float64, device=device) / frequencies_per_axis
    axes = []
    for size, trained in zip(grid, trained_grid, strict=True):
        place = torch.arange(size, dtype=torch.float64, device=device)
        place = (place + 0.5) * trained / size - 0.5 if scaling == "resize" else place
        axes.append(place.outer(10000.0**exponents))
    return axes


def on_grid(values, axis, grid):
    """Values (size, n) along one axis for all tokens (T, n), in the order of the patches, row by row."""
    shape = [1] * len(grid)
    shape[axis] = grid[axis]
    return values.reshape(*shape, -1).expand(*grid, -1).flatten(0, len(grid) - 1)


def sincos_position_embedding(grid, trained_grid, scaling, hidden_size, device=None):
    """Fixed sine-cosine positions (T, hidden_size), float32, an equal share for each axis, the last axis first."""
    angles = position_angles(grid, trained_grid, scaling, hidden_size // (2 * len(grid)), device)
    axes = [torch.cat([angle.sin(), angle.cos()], dim=1).float() for angle in angles]
    return torch.cat([on_grid(axes[axis], axis, grid) for axis in reversed(range(len(grid)))], dim=1)


def rotary_position_embedding(grid, trained_grid, scaling, head_size, device=None):
    """Cosines and sines (2, T, head_size), float32, that rotate queries and keys (Su et al. 2021), an equal share of
    the head for each axis."""
    angles = position_angles(grid, trained_grid, scaling, head_size // (2 * len(grid)), device)
    angles = [angle.repeat_interleave(2, dim=1) for angle in angles]
    return torch.stack(
        [
            torch.cat([on_grid(function(angle).float(), axis, grid) for axis, angle in enumerate(angles)], dim=1)
            for function in (torch.cos, torch.sin)
        ]
    )


def convolved(tokens, weight, bias):
    """`F.linear` of tokens (B, T, D), channels last already, by a 1x1 convolution."""
    return F.conv2d(tokens.mT.unsqueeze(2), weight[:, :, None, None], bias).squeeze(2).mT


@cache
def convolution_pays(dtype):
    """Whether this CPU convolves tokens clearly faster than it multiplies matrices: measured, once in a process, in a
    few hundredths of a second."""
    tokens, weight = torch.ones(4, 64, 384, dtype=dtype, device="cpu"), torch.ones(768, 384, dtype=dtype, device="cpu")
    best = dict.fromkeys((F.linear, convolved), math.inf)
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        for _ in range(10):
            for function in best:
                start = time.perf_counter()
                function(tokens, weight, None)
                best[function] = min(best[function], time.perf_counter() - start)
    return 1.2 * best[convolved] < best[F.linear]


class Linear(nn.Linear):
    """`nn.Linear`; of float32 tokens on a CPU, where `convolution_pays`, by oneDNN's 1x1 convolution: it uses all of
    the processor's vector units, which MKL's matrix product on AMD's doesn't. Compiled it is a matrix product: a
    convolution would keep its neighbours from being fused with it."""

    def forward(self, tokens):
        on_cpu = tokens.device.type == "cpu" and tokens.dtype == torch.float32 and tokens.ndim == 3
        # sharded and quantised weights have classes of their own
        eager = type(self.weight) is nn.Parameter and not torch.compiler.is_compiling()
        if on_cpu and eager and HAS_ONEDNN:
            autocast = torch.is_autocast_enabled("cpu")
            if convolution_pays(torch.get_autocast_dtype("cpu") if autocast else tokens.dtype):
                return convolved(tokens, self.weight, self.bias)
        return super().forward(tokens)


class ModulationLinear(nn.Linear):
    """`nn.Linear`; on a CPU autocast leaves it in float32: casting this largest matrix of a DiT, and its gradient back,
    takes longer than its product with one vector for each sample."""

    def forward(self, conditioning):
        if conditioning.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
            return super().forward(conditioning)
        with torch.autocast("cpu", enabled=False):
            return super().forward(conditioning.to(self.weight.dtype)).to(torch.get_autocast_dtype("cpu"))


class ConstantModulation(nn.Module):
    """What modulates the blocks of a network that is told nothing: learned, and the same for every sample."""

    def __init__(self, width):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, conditioning):
        return self.bias.expand(len(conditioning), -1)


def explicit_attention(query, key, value, mask=None):
    """Attention of queries (B, T, heads, d) to keys and values (B, S, heads, d), with mask (B, 1, 1, S), True where a
    key counts, by two matrix products and a softmax; (B, T, heads, d)."""
    query, key, value = (x.transpose(1, 2) for x in (query * query.shape[-1] ** -0.5, key, value))
    logits = query @ key.mT
    if mask is not None:
        logits = logits.masked_fill(~mask, -math.inf)
    return (logits.softmax(dim=-1) @ value).transpose(1, 2)


@cache
def explicit_attention_pays():
    """Whether this CPU differentiates explicit attention in bfloat16 clearly faster than torch's fused one: measured,
    once in a process, in a few hundredths of a second."""
    tokens = torch.ones(8, 64, 4, 64, dtype=torch.bfloat16, device="cpu").requires_grad_()
    best = dict.fromkeys((dispatch_attention_fn, explicit_attention), math.inf)
    own = torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)
    # a block whose activations are recomputed may be what asks first: nothing of this is its own
    with torch.enable_grad(), torch.autocast("cpu", enabled=False), own:
        for _ in range(3):
            for function in best:
                start = time.perf_counter()
                function(tokens, tokens, tokens).backward(tokens.detach())
                best[function] = min(best[function], time.perf_counter() - start)
    return 1.2 * best[explicit_attention] < best[dispatch_attention_fn]


def rotated(x, rotary):
    """Queries or keys (B, T, heads, D / heads) turned by (cosines, sines), each (T, D / heads), or of tokens at other
    places in every sample (B, T, D / heads)."""
    if rotary[0].ndim == 2:
        return apply_rotary_emb(x, rotary, sequence_dim=1)
    # as one sequence
    one = tuple(table.flatten(0, 1) for table in rotary)
    return apply_rotary_emb(x.flatten(0, 1)[None], one, sequence_dim=1).view_as(x)


class DiTAttnProcessor:
    """Calls diffusers' attention dispatch, so `set_attention_backend` works. Where no backend is chosen, training in
    bfloat16 on a CPU is explicit for short sequences, if `explicit_attention_pays`."""

    _attention_backend = None
    _parallel_config = None

    def __call__(self, attn, hidden_states, context=None, mask=None, rotary=None):
        if attn.is_cross_attention:
            query = attn.to_q(hidden_states)
            fused = attn.fused_projections
            key, value = attn.to_kv(context).chunk(2, dim=-1) if fused else (attn.to_k(context), attn.to_v(context))
        elif attn.fused_projections:
            query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        query, key, value = (x.unflatten(-1, (attn.heads, -1)) for x in (query, key, value))  # (B, T, heads, D / heads)
        if attn.norm_q is not None:
            query, key = attn.norm_q(query), attn.norm_k(key)
        if rotary is not None:
            query, key = rotated(query, rotary), rotated(key, rotary)
        if self.is_explicit(query, key):
            out = explicit_attention(query, key, value, mask)
        else:
            out = dispatch_attention_fn(
                query,
                key,
                value,
                attn_mask=mask,
                backend=self._attention_backend,
                parallel_config=self._parallel_config,
            )
        return attn.to_out[0](out.flatten(2))  # (B, T, D)

    def is_explicit(self, query, key):
        chosen = self._attention_backend or self._parallel_config or DIFFUSERS_ATTN_BACKEND != "native"
        if chosen or query.device.type != "cpu" or query.dtype != torch.bfloat16 or key.shape[1] > MAX_EXPLICIT_KEYS:
            return False
        trained = query.requires_grad and not torch.compiler.is_compiling()
        return trained and explicit_attention_pays()


class DiTAttention(nn.Module, AttentionModuleMixin):
    """Multi-head attention over the tokens, or from them to a context, with diffusers' names for the projections."""

    _default_processor_cls = DiTAttnProcessor  # type: ignore[assignment]  # diffusers declares it as None
    _available_processors = [DiTAttnProcessor]

    def __init__(self, hidden_size, num_attention_heads, qk_norm=False, is_cross_attention=False):
        super().__init__()
        self.heads = num_attention_heads
        self.use_bias = True
        self.is_cross_attention = is_cross_attention
        self.to_q = Linear(hidden_size, hidden_size)
        self.to_k = Linear(hidden_size, hidden_size)
        self.to_v = Linear(hidden_size, hidden_size)
        self.to_out = nn.ModuleList([Linear(hidden_size, hidden_size)])
        head_size = hidden_size // num_attention_heads
        self.norm_q = nn.RMSNorm(head_size, eps=NORM_EPS) if qk_norm else None
        self.norm_k = nn.RMSNorm(head_size, eps=NORM_EPS) if qk_norm else None
        self.set_processor(DiTAttnProcessor())

    def forward(self, hidden_states, context=None, mask=None, rotary=None, span=None):
        """hidden_states (B, T, D); context (B, S, D) of cross-attention; mask (B, 1, 1, keys), True where a key counts;
        rotary (cosines, sines), each (T, D / heads). With a `span`, tokens attend to each other within spans of so
        many that follow one another, and rotary is of one of these."""
        if span is None:
            return self.processor(self, hidden_states, context, mask, rotary)
        attended = self.processor(self, hidden_states.reshape(-1, span, hidden_states.shape[-1]), None, None, rotary)
        return attended.view_as(hidden_states)


def feed_forward(hidden_size, mlp_ratio, swiglu):
    """The MLP of a block. SwiGLU (Shazeer 2020) has two thirds of the hidden width, for as many parameters."""
    width = int(hidden_size * mlp_ratio)
    if swiglu:
        ff = FeedForward(hidden_size, inner_dim=2 * width // 3, activation_fn="swiglu")
    else:
        ff = FeedForward(hidden_size, inner_dim=width, activation_fn="gelu-approximate")
    ff.net[0].proj = Linear(hidden_size, ff.net[0].proj.out_features)
    ff.net[2] = Linear(ff.net[2].in_features, hidden_size)
    return ff


class DiTBlock(nn.Module):
    """A transformer block with adaLN-Zero or adaLN conditioning (Peebles & Xie 2023, Fig. 3), and where there is a
    context cross-attention to it after the self-attention, without modulation (PixArt-alpha, Chen et al. 2024)."""

    def __init__(self, hidden_size, num_attention_heads, mlp_ratio, qk_norm, swiglu, cross_attention=False):
        super().__init__()
        self.attn = DiTAttention(hidden_size, num_attention_heads, qk_norm)
        self.cross_attn = None
        if cross_attention:
            self.cross_attn = DiTAttention(hidden_size, num_attention_heads, qk_norm, is_cross_attention=True)
        self.ff = feed_forward(hidden_size, mlp_ratio, swiglu)

    def forward(self, hidden_states, modulation, rotary=None, context=None, mask=None, span=None):
        """hidden_states (B, T, D); modulation (B, 6, D): shift, scale, gate of attention, then of the MLP, or of each
        token (B, 6, T, D); for adaLN without the gates; rotary, context and its mask, and the span of self-attention,
        as `DiTAttention` takes them."""
        if modulation.shape[1] == 6:
            shift_attn, scale_attn, gate_attn, shift_ff, scale_ff, gate_ff = modulation.unbind(1)
            attended = self.attn(modulate(hidden_states, shift_attn, scale_attn), rotary=rotary, span=span)
            hidden_states = torch.addcmul(hidden_states, over_tokens(gate_attn), attended)
            hidden_states = self.attend_to(context, mask, hidden_states)
            changed = self.ff(modulate(hidden_states, shift_ff, scale_ff))
            return torch.addcmul(hidden_states, over_tokens(gate_ff), changed)
        shift_attn, scale_attn, shift_ff, scale_ff = modulation.unbind(1)
        attended = self.attn(modulate(hidden_states, shift_attn, scale_attn), rotary=rotary, span=span)
        hidden_states = hidden_states + attended
        hidden_states = self.attend_to(context, mask, hidden_states)
        return hidden_states + self.ff(modulate(hidden_states, shift_ff, scale_ff))

    def attend_to(self, context, mask, hidden_states):
        """The residual branch of cross-attention, where there is one."""
        if self.cross_attn is None:
            return hidden_states
        normed = F.layer_norm(hidden_states, hidden_states.shape[-1:], eps=NORM_EPS)
        return hidden_states + self.cross_attn(normed, context, mask)


class DiTTemporalBlock(DiTBlock):
    """An adaLN-Zero block in which every token attends to those at its place in the other frames (Ma et al. 2024,
    variant 1, whose temporal blocks follow the spatial ones)."""

    def forward(self, hidden_states, modulation, rotary, frames):
        """hidden_states (B, T, D), frame by frame; modulation (B, 6, D); rotary of the frames."""
        tokens = hidden_states.unflatten(1, (frames, -1)).transpose(1, 2).flatten(1, 2)  # place by place
        tokens = super().forward(tokens, modulation, rotary, span=frames)
        return tokens.unflatten(1, (-1, frames)).transpose(1, 2).flatten(1, 2)


class DiTHeadBlock(DiTBlock):
    """An adaLN-Zero block of the wide head, whose every token is modulated by a vector of its own."""

    def __init__(self, hidden_size, num_attention_heads, mlp_ratio, qk_norm, swiglu):
        super().__init__(hidden_size, num_attention_heads, mlp_ratio, qk_norm, swiglu)
        self.adaln = Linear(hidden_size, 6 * hidden_size)

    def forward(self, hidden_states, condition, rotary):
        """hidden_states and condition (B, T, D); rotary as `DiTAttention` takes it."""
        modulation = self.adaln(condition).unflatten(-1, (6, -1)).movedim(2, 1)  # (B, 6, T, D)
        return super().forward(hidden_states, modulation, rotary)


class DiTTokenBlock(nn.Module):
    """A standard transformer block, for conditioning by tokens in the sequence (in-context), or by cross-attention to
    them after the self-attention (Peebles & Xie 2023, section 3.2)."""

    def __init__(self, hidden_size, num_attention_heads, mlp_ratio, qk_norm, swiglu, cross_attention):
        super().__init__()
        self.norm_attn = nn.LayerNorm(hidden_size, eps=NORM_EPS)
        self.attn = DiTAttention(hidden_size, num_attention_heads, qk_norm)
        self.norm_cross = self.cross_attn = None
        if cross_attention:
            self.norm_cross = nn.LayerNorm(hidden_size, eps=NORM_EPS)
            self.cross_attn = DiTAttention(hidden_size, num_attention_heads, qk_norm, is_cross_attention=True)
        self.norm_ff = nn.LayerNorm(hidden_size, eps=NORM_EPS)
        self.ff = feed_forward(hidden_size, mlp_ratio, swiglu)

    def forward(self, hidden_states, context=None, mask=None, rotary=None):
        """hidden_states (B, T, D), in-context tokens among them; context (B, S, D) of cross-attention; mask of the
        context, or in-context of all tokens, and rotary as `DiTAttention` takes them."""
        own_mask = mask if self.cross_attn is None else None
        hidden_states = hidden_states + self.attn(self.norm_attn(hidden_states), mask=own_mask, rotary=rotary)
        if self.cross_attn is not None:
            hidden_states = hidden_states + self.cross_attn(self.norm_cross(hidden_states), context, mask)
        return hidden_states + self.ff(self.norm_ff(hidden_states))


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


def numbers_on(device, numbers):
    """A number, or several, as float32 on a device; for one number nobody waits."""
    if isinstance(numbers, (int, float)):
        return torch.full((), numbers, dtype=torch.float32, device=device)
    return torch.as_tensor(numbers, dtype=torch.float32, device=device)


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


def per_axis(value, dimensions, name):
    """A number, or one for each axis, as a tuple."""
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,) * dimensions
    whole = all(isinstance(each, int) and not isinstance(each, bool) and each > 0 for each in values)
    if len(values) != dimensions or not whole:
        raise ValueError(f"{name} {value!r} must be a positive number, or {dimensions} of them")
    return values


def parts_of(domain, channels):
    """[(name, slice of the channels)] of a domain: a name, {name: number of channels}, or a list of such pairs, in
    their order. Raises ValueError for an unknown name and for numbers that are not those of the channels."""
    if isinstance(domain, str):
        domain = {domain: channels}
    found, start = [], 0
    for name, size in domain.items() if isinstance(domain, dict) else domain:
        if name not in DOMAINS:
            raise ValueError(f"domain {name!r} is unknown; choose one of {', '.join(DOMAINS)}, or {{name: channels}}")
        check_counts(**{f"domain {name}": size})
        found.append((name, slice(start, start + size)))
        start += size
    if start != channels:
        raise ValueError(f"domain {domain!r} has {start} channels, the samples have {channels}")
    return found


@dataclass
class DiTModelOutput(Transformer2DModelOutput):
    """Also the tokens (B, T, D) after the block that was asked for."""

    hidden_states: torch.Tensor | None = None


# diffusers' mixins contradict each other in `config_name`, and declare as None what is to be set
class DiTModel(ModelMixin, ConfigMixin, AttentionMixin, CacheMixin, PeftAdapterMixin):  # type: ignore[misc]
    """Diffusion Transformer (Peebles & Xie 2023) for signals, images, or videos; or for sequences of tokens.

    A freshly initialised model outputs exactly zero. Who trains it for classifier-free guidance replaces the conditions
    of a share `class_dropout_prob` of the samples by those of `null_conditions`; the network itself drops nothing.

    With a `vocab_size` V it takes token ids (B, L) and returns logits (B, L, V), of a fresh model those of the uniform
    distribution. Ids go from 0 to V, the last of them that of the mask, which is never predicted. There is no attention
    mask: sequences of different lengths are filled up by tokens of the vocabulary, which the network sees as it sees
    the others.

    Args:
        sample_size: size of the training samples in pixels or latent cells, a number or one for each axis. Other sizes
            are taken too.
        patch_size: side of a patch, a number or one for each axis; must divide `sample_size`; by default 2. The axes
            are as many as there are numbers here or in `sample_size`, from 1 to 3 (a signal, an image, a video with its
            frames first), or 2 where both are one number. Tokens have one axis and patches of 1.
        in_channels: channels of the input, with those of the condition; by default 4. Tokens have none.
        hidden_size: width D of the tokens; a multiple of `num_attention_heads`, and of twice the number of axes.
        num_layers: number of transformer blocks.
        num_attention_heads: heads per block.
        num_classes: number of class labels, or None for an unconditional model. The label `num_classes` itself is the
            null label. (The default is ImageNet's, of tokens too.)
        class_dropout_prob: probability, in [0, 1], that a training sample's conditions are replaced by those that stand
            for none; at 0 the model has none.
        learn_sigma: predict a variance beside the mean: the output then has twice the channels of the sample.
        out_channels: channels of the output; derived from `learn_sigma` when None.
        mlp_ratio: hidden width of the MLP in units of `hidden_size`.
        conditioning: how time and label reach the blocks (section 3.2): adaln_zero, adaln, cross_attention (to a
            sequence of both), or in_context (both as further tokens). Where the network is told neither, the modulation
            of adaln_zero and adaln is one learned constant, and the blocks of in_context are plain ones.
        cross_attention_dim: width of `encoder_hidden_states`, a sequence such as an encoded text; None for a model
            without. The blocks attend to it by cross-attention (with adaln_zero or adaln as PixArt-alpha, Chen et al.
            2024; with cross_attention in one sequence with time and label), or it joins the tokens (in_context).
        shared_adaln: one modulation for all blocks, with a learned offset for each (PixArt-alpha, Chen et al. 2024),
            instead of one matrix for every block.
        qk_norm: RMS norm of queries and keys, for each head (Dehghani et al. 2023).
        swiglu: SwiGLU in the MLPs (Shazeer 2020) instead of GELU.
        position_embedding: sincos, added to the tokens, the default; rotary, on queries and keys (RoPE, Su et al.
            2021), the default of token ids; or both, sincos_rotary. Rotary positions tell distances alone, from which a
            sequence of nothing but masks cannot be told where it begins and ends: where places have a meaning, as in
            texts that each fill a sequence of their own, take both.
        position_scaling: positions in samples of another size: resize spreads them over the extent that was trained,
            the default; extrapolate goes on counting, the default of token ids.
        frequency_shift: the lowest frequency of the timestep's embedding is 10000^(-127 / (128 - frequency_shift)): 0
            as the original has it, 1 as diffusers does.
        pooled_projection_dim: width of `pooled_projections`, one vector for each sample such as a text's mean, whose
            embedding is added to that of time (Esser et al. 2024); None for a model without.
        condition_channels: channels of `condition_sample`, such as an image that the sample is made from, which the
            network sees beside the sample: the last of in_channels; None for a model without.
        vocab_size: number V of tokens, without the mask, of a network of token ids; None for samples of numbers.
        tied_head: logits are products with the rows of the token table, after a linear layer (D, D), instead of having
            a matrix of their own (D, V).
        time_conditioning: tell the network the time. Masks alone say how noisy a sequence is (MDLM, Sahoo et al. 2024,
            section 3.4), so that the network of an absorbing process needs no time; its `timestep` is then not read.
        two_times: the network can be told a second time, `timestep_to`: that which a flow map leads to. What it adds is
            zero at first.
        guidance_embeds: the network can be told a guidance scale, `guidance`, whose effect it has learned
            (guidance-distilled, Meng et al. 2023): one evaluation then does the work of two. What it adds is zero at
            first.
        folded_guidance: the one guidance scale whose effect the network has learned; None for none.
        factorized_attention: of videos, whose first axis are frames: tokens attend to those of their own frame, and in
            a further block after each to those at their own place in all frames (Latte, Ma et al. 2024, variant 1),
            instead of all to all. What these blocks add is zero at first, so that a video model can begin as an image
            model of its frames (`with_frames`). Frames are told apart by rotary positions. Needs conditioning
            adaln_zero or adaln.
        domain: where points lie, as the scheduler has it: torus, box, sphere, flat, or {name: channels} of several in
            their order, which the config holds as a list; None for samples without such a region. Coordinates are seen
            with the cosines and sines of their 1-, 2-, 4-, ... fold, angles by these alone, so that the network is
            periodic in them; and what it returns on a sphere is tangent.
        num_frequencies: how many such multiples, at least 1 on a torus; only with a domain.
        head_hidden_size: width of a shallow head behind the blocks, DiT^DH (Zheng et al. 2025, after DDT, Wang et al.
            2025), for patches of more numbers than hidden_size, as of a representation autoencoder: it sees the patches
            again at this width, and what comes from the blocks, with time and label, modulates each of its tokens. None
            for none. Needs conditioning adaln_zero or adaln, and samples of numbers.
        head_num_layers, head_num_attention_heads: of the head; heads as many as num_attention_heads unless given.
        patch_bottleneck: channels that a patch is projected to before hidden_size, by two linear layers with nothing
            between, as JiT has it (Li & He 2025) for large patches of pixels; None for one layer.
    """

    # whose entries are attributes, other than diffusers says
    config: Any
    _supports_gradient_checkpointing = True
    _no_split_modules = ["DiTBlock", "DiTTemporalBlock", "DiTHeadBlock", "DiTTokenBlock"]  # type: ignore[assignment]
    _repeated_blocks = ["DiTBlock", "DiTTemporalBlock", "DiTHeadBlock", "DiTTokenBlock"]
    _skip_layerwise_casting_patterns = ["patch_embed", "token_embed", "adaln", "norm", "proj_out"]  # type: ignore[assignment]

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, ...] = 32,
        patch_size: int | tuple[int, ...] | None = None,
        in_channels: int | None = None,
        hidden_size: int = 384,
        num_layers: int = 12,
        num_attention_heads: int = 6,
        num_classes: int | None = 1000,
        class_dropout_prob: float = 0.1,
        learn_sigma: bool = False,
        out_channels: int | None = None,
        mlp_ratio: float = 4.0,
        conditioning: str = "adaln_zero",
        cross_attention_dim: int | None = None,
        shared_adaln: bool = False,
        qk_norm: bool = False,
        swiglu: bool = False,
        position_embedding: str | None = None,
        position_scaling: str | None = None,
        frequency_shift: float = 0.0,
        pooled_projection_dim: int | None = None,
        condition_channels: int | None = None,
        vocab_size: int | None = None,
        tied_head: bool = False,
        time_conditioning: bool = True,
        two_times: bool = False,
        guidance_embeds: bool = False,
        folded_guidance: float | None = None,
        factorized_attention: bool = False,
        domain: str | dict | list | None = None,
        num_frequencies: int = 4,
        head_hidden_size: int | None = None,
        head_num_layers: int = 2,
        head_num_attention_heads: int | None = None,
        patch_bottleneck: int | None = None,
    ):
        super().__init__()
        if two_times and (vocab_size is not None or not time_conditioning):
            raise ValueError(
                "two_times needs time_conditioning and no vocab_size: a flow map takes samples of numbers from one "
                "time to another; leave it out"
            )
        if guidance_embeds and (vocab_size is not None or not time_conditioning):
            raise ValueError("guidance_embeds needs time_conditioning and no vocab_size: leave it out")
        check_guidance(guidance_embeds, folded_guidance)
        if vocab_size is not None:
            sample_size = self.check_tokens(
                vocab_size, sample_size, patch_size, in_channels, learn_sigma, out_channels, condition_channels
            )
        elif tied_head:
            raise ValueError("tied_head needs a vocab_size: other samples have no token table")
        defaults = DEFAULTS if vocab_size is None else TOKEN_DEFAULTS
        patch_size = defaults["patch_size"] if patch_size is None else patch_size
        in_channels = defaults["in_channels"] if in_channels is None else in_channels
        position_embedding = position_embedding or defaults["position_embedding"]
        position_scaling = position_scaling or defaults["position_scaling"]
        sizes = [size for size in (patch_size, sample_size) if isinstance(size, (tuple, list))]
        dimensions = len(sizes[0]) if sizes else 2
        if dimensions not in (1, 2, 3):
            raise ValueError(f"patch_size {patch_size} and sample_size {sample_size} must have 1, 2 or 3 axes")
        self.patch = per_axis(patch_size, dimensions, "patch_size")
        sample = per_axis(sample_size, dimensions, "sample_size")
        if any(size % patch for size, patch in zip(sample, self.patch, strict=True)):
            near = nearest_sizes(sample, self.patch)
            raise ValueError(f"patch_size {patch_size} must divide sample_size {sample_size}: {near}")
        tokens = math.prod(size // patch for size, patch in zip(sample, self.patch, strict=True))
        if tokens > MAX_TOKENS:
            raise ValueError(
                f"sample_size {sample_size} with patch_size {patch_size} makes {tokens:,} tokens, more than "
                f"{MAX_TOKENS:,}: choose larger patches"
            )
        if in_channels is not None:
            check_counts(in_channels=in_channels)
        if patch_bottleneck is not None:
            if vocab_size is not None:
                raise ValueError(f"patch_bottleneck {patch_bottleneck} is of patches, which tokens have none of")
            check_counts(patch_bottleneck=patch_bottleneck)
        check_counts(
            hidden_size=hidden_size,
            num_layers=num_layers,
            num_attention_heads=num_attention_heads,
        )
        if cross_attention_dim is not None:
            check_counts(cross_attention_dim=cross_attention_dim)
        if pooled_projection_dim is not None:
            check_counts(pooled_projection_dim=pooled_projection_dim)
        if condition_channels is not None and in_channels is not None:
            check_counts(condition_channels=condition_channels)
            if condition_channels >= in_channels:
                raise ValueError(
                    f"condition_channels {condition_channels} are a part of in_channels {in_channels}, which must be "
                    f"more: those of the sample, too"
                )
        if factorized_attention and dimensions != 3:
            raise ValueError(
                f"factorized_attention is of videos, with 3 axes, the frames first: give a sample_size (frames, "
                f"height, width), not {sample_size}, or leave it out"
            )
        # what one table of positions is of
        axes = 2 if factorized_attention else dimensions
        if hidden_size % num_attention_heads or hidden_size % (2 * axes):
            raise ValueError(
                f"hidden_size {hidden_size} must be a multiple of num_attention_heads {num_attention_heads} and of "
                f"{2 * axes}"
            )
        for name, value, choices in (
            ("conditioning", conditioning, CONDITIONINGS),
            ("position_embedding", position_embedding, POSITION_EMBEDDINGS),
            ("position_scaling", position_scaling, POSITION_SCALINGS),
        ):
            if value not in choices:
                raise ValueError(f"{name} {value!r} is unknown; choose one of {', '.join(choices)}")
        is_rotary = "rotary" in position_embedding
        turned = 2 * axes if is_rotary else 2 if factorized_attention else 1
        if hidden_size // num_attention_heads % turned:
            raise ValueError(
                f"rotary positions{'' if is_rotary else ' of frames'} need heads of a multiple of "
                f"{turned} channels; hidden_size {hidden_size} with {num_attention_heads} heads has "
                f"{hidden_size // num_attention_heads}"
            )
        vectors = CONDITIONINGS[conditioning]
        if factorized_attention and vectors is None:
            raise ValueError(f"factorized_attention needs conditioning 'adaln_zero' or 'adaln', not {conditioning!r}")
        if shared_adaln and vectors is None:
            raise ValueError(f"shared_adaln needs conditioning 'adaln_zero' or 'adaln', not {conditioning!r}")
        head_heads = head_num_attention_heads or num_attention_heads
        if head_hidden_size is not None:
            check_counts(
                head_hidden_size=head_hidden_size, head_num_layers=head_num_layers, head_num_attention_heads=head_heads
            )
            if vectors is None or vocab_size is not None or factorized_attention:
                raise ValueError(
                    "head_hidden_size needs conditioning 'adaln_zero' or 'adaln', no vocab_size and no "
                    "factorized_attention: leave it out"
                )
            turned = 2 * dimensions if is_rotary else 1
            if head_hidden_size % (head_heads * turned):
                raise ValueError(
                    f"head_hidden_size {head_hidden_size} must be a multiple of head_num_attention_heads {head_heads}"
                    + (f", and with rotary positions each head of {turned}" if turned > 1 else "")
                )
        elif head_num_attention_heads is not None or head_num_layers != 2:
            raise ValueError("head_num_layers and head_num_attention_heads need head_hidden_size: leave them out")
        if num_classes is not None:
            check_counts(num_classes=num_classes)
        if not 0 <= class_dropout_prob <= 1:
            raise ValueError(f"class_dropout_prob {class_dropout_prob} must lie in [0, 1]")
        if not (math.isfinite(mlp_ratio) and int(hidden_size * mlp_ratio) >= 2):
            raise ValueError(f"mlp_ratio {mlp_ratio} of hidden_size {hidden_size} must make 2 channels at least")
        if not 0 <= frequency_shift < FREQUENCY_EMBEDDING_SIZE // 2:
            raise ValueError(
                f"frequency_shift {frequency_shift} must be at least 0 and below {FREQUENCY_EMBEDDING_SIZE // 2}"
            )
        derived_channels = None
        if in_channels is not None:
            derived_channels = (in_channels - (condition_channels or 0)) * (2 if learn_sigma else 1)
        if out_channels not in (None, derived_channels):
            raise ValueError(
                f"out_channels {out_channels} contradicts in_channels {in_channels} with learn_sigma={learn_sigma}"
                + (f" and condition_channels={condition_channels}" if condition_channels else "")
                + f": leave it out, or pass {derived_channels}"
            )
        seen_channels = in_channels
        self.parts: list[tuple[str, slice]] = []
        if domain is not None:
            if vocab_size is not None or learn_sigma:
                raise ValueError(f"domain {domain!r} is of points, which are no tokens and have no learn_sigma")
            self.parts = parts_of(domain, derived_channels)
            if not isinstance(domain, str):
                # files keep no order of keys
                domain = [[name, part.stop - part.start] for name, part in self.parts]
            least = 1 if "torus" in [name for name, _ in self.parts] else 0
            if not isinstance(num_frequencies, int) or not least <= num_frequencies <= MAX_FREQUENCIES:
                raise ValueError(
                    f"num_frequencies {num_frequencies} must be a whole number from {least} to {MAX_FREQUENCIES}"
                )
            angles = sum(part.stop - part.start for name, part in self.parts if name == "torus")
            seen_channels = in_channels + 2 * num_frequencies * (derived_channels or 0) - angles
        told = time_conditioning or num_classes is not None or pooled_projection_dim is not None
        if conditioning == "cross_attention" and not told and cross_attention_dim is None:
            raise ValueError(
                "conditioning 'cross_attention' has nothing to attend to without time_conditioning, num_classes and "
                "cross_attention_dim: choose in_context, whose blocks are then plain ones"
            )
        # stock pipelines read config.out_channels as a number
        self.register_to_config(
            sample_size=sample_size,
            patch_size=patch_size,
            in_channels=in_channels,
            out_channels=derived_channels,
            position_embedding=position_embedding,
            position_scaling=position_scaling,
            domain=domain,
        )

        self.trained_grid = tuple(size // patch for size, patch in zip(sample, self.patch, strict=True))
        self.patch_embed = self.token_embed = None
        if vocab_size is None:
            numbers = seen_channels * math.prod(self.patch)
            embed = Linear(patch_bottleneck or numbers, hidden_size)
            first = [] if patch_bottleneck is None else [Linear(numbers, patch_bottleneck, bias=False)]
            self.patch_embed = nn.Sequential(*first, embed) if first else embed
        else:
            # the last row is that of the mask
            self.token_embed = nn.Embedding(vocab_size + 1, hidden_size)
        kinds = {"sincos": "sincos" in position_embedding, "rotary": is_rotary, "frames": factorized_attention}
        kinds["head"] = head_hidden_size is not None and is_rotary
        for kind in [kind for kind, has in kinds.items() if has]:
            table = self.position_table(kind, self.trained_positions(kind))
            self.register_buffer(f"{kind}_table", table, persistent=False)
        # of other sizes
        self.other_positions: dict[tuple, torch.Tensor] = {}
        self.time_embed = None
        if time_conditioning:
            self.time_embed = nn.Sequential(
                nn.Linear(FREQUENCY_EMBEDDING_SIZE, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
            )
        self.time_to_embed = None
        if two_times:
            self.time_to_embed = nn.Sequential(
                nn.Linear(FREQUENCY_EMBEDDING_SIZE, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
            )
        self.guidance_embed = None
        if guidance_embeds:
            self.guidance_embed = nn.Sequential(
                nn.Linear(FREQUENCY_EMBEDDING_SIZE, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
            )
        self.class_embed = nn.Embedding(num_classes + 1, hidden_size) if num_classes is not None else None
        self.context_embed = nn.Linear(cross_attention_dim, hidden_size) if cross_attention_dim is not None else None
        self.pooled_embed = None
        if pooled_projection_dim is not None:
            self.pooled_embed = nn.Sequential(
                nn.Linear(pooled_projection_dim, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
            )

        self.adaln = self.block_offsets = self.norm_out = None
        if vectors is not None:
            # the modulation of every block and, without a head, of the output layer (2 D), in one matrix product a
            # forward
            of_output = 2 if head_hidden_size is None else 0
            width = (vectors * (1 if shared_adaln else num_layers) + of_output) * hidden_size
            self.adaln = ModulationLinear(hidden_size, width) if told else ConstantModulation(width)
            if shared_adaln:
                self.block_offsets = nn.Parameter(torch.zeros(num_layers, vectors, hidden_size))
            self.blocks = nn.ModuleList(
                DiTBlock(hidden_size, num_attention_heads, mlp_ratio, qk_norm, swiglu, cross_attention_dim is not None)
                for _ in range(num_layers)
            )
        else:
            self.blocks = nn.ModuleList(
                DiTTokenBlock(
                    hidden_size, num_attention_heads, mlp_ratio, qk_norm, swiglu, conditioning == "cross_attention"
                )
                for _ in range(num_layers)
            )
            self.norm_out = nn.LayerNorm(hidden_size, eps=NORM_EPS)
        # under the name by which diffusers' caches know such blocks
        self.temporal_transformer_blocks = self.temporal_adaln = self.temporal_offsets = None
        if factorized_attention:
            width = 6 * (1 if shared_adaln else num_layers) * hidden_size
            self.temporal_adaln = ModulationLinear(hidden_size, width) if told else ConstantModulation(width)
            if shared_adaln:
                self.temporal_offsets = nn.Parameter(torch.zeros(num_layers, 6, hidden_size))
            self.temporal_transformer_blocks = nn.ModuleList(
                DiTTemporalBlock(hidden_size, num_attention_heads, mlp_ratio, qk_norm, swiglu)
                for _ in range(num_layers)
            )
        self.head_blocks = None
        if head_hidden_size is not None:
            self.head_patch_embed = Linear(seen_channels * math.prod(self.patch), head_hidden_size)
            self.head_condition = Linear(hidden_size, head_hidden_size)
            self.head_blocks = nn.ModuleList(
                DiTHeadBlock(head_hidden_size, head_heads, mlp_ratio, qk_norm, swiglu) for _ in range(head_num_layers)
            )
            self.head_adaln = Linear(head_hidden_size, 2 * head_hidden_size)
        outputs = math.prod(self.patch) * derived_channels if vocab_size is None else vocab_size
        self.proj_out = Linear(head_hidden_size or hidden_size, hidden_size if tied_head else outputs)
        self.gradient_checkpointing = False
        self.initialize_weights()

    @staticmethod
    def check_tokens(vocab_size, sample_size, patch_size, in_channels, learn_sigma, out_channels, condition_channels):
        """The size (L,) of sequences of tokens. Raises ValueError for what they don't have."""
        check_counts(vocab_size=vocab_size)
        refused = {
            "in_channels": in_channels,
            "out_channels": out_channels,
            "condition_channels": condition_channels,
            "learn_sigma": learn_sigma or None,
            "patch_size": None if patch_size in (None, 1, (1,), [1]) else patch_size,
        }
        if given := {name: value for name, value in refused.items() if value is not None}:
            raise ValueError(
                f"{', '.join(f'{name} {value!r}' for name, value in given.items())} contradicts vocab_size "
                f"{vocab_size}: tokens have neither channels, a variance nor patches; leave it out"
            )
        return per_axis(sample_size, 1, "sample_size, the number of tokens (L,),")

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
        """Initialise as the original does: Xavier uniform, embeddings N(0, 0.02), and zero modulation and output; zero,
        too, where cross-attention joins blocks with modulation, and what a second time and a guidance scale add."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for block in (*self.blocks, *(self.temporal_transformer_blocks or ()), *(self.head_blocks or ())):
            for projection in (block.attn.to_q, block.attn.to_k, block.attn.to_v):
                # the original initialises one fused (3 D, D) matrix, whose Xavier bound is smaller by sqrt(2)
                nn.init.xavier_uniform_(projection.weight, gain=2**-0.5)
        of_time = () if self.time_embed is None else (self.time_embed[0], self.time_embed[2])
        for embedding in (*of_time, self.class_embed, self.token_embed):
            if embedding is not None:
                nn.init.normal_(embedding.weight, std=0.02)
        zeroed = [self.proj_out]
        for embedding in (self.time_to_embed, self.guidance_embed):
            if embedding is not None:
                nn.init.normal_(embedding[0].weight, std=0.02)
                zeroed.append(embedding[2])
        if self.adaln is not None:
            zeroed += [self.adaln, *(block.cross_attn.to_out[0] for block in self.blocks if block.cross_attn)]
        if self.temporal_adaln is not None:
            zeroed.append(self.temporal_adaln)
        if self.head_blocks is not None:
            zeroed += [self.head_adaln, *(block.adaln for block in self.head_blocks)]
        for layer in zeroed:
            for parameter in layer.parameters():
                nn.init.zeros_(parameter)

    def with_two_times(self):
        """A copy of the model that can be told a second time, two_times, and at first gives the same output whatever
        that is. Raises ValueError for a model that cannot."""
        return self.with_further(two_times=True)

    def with_guidance_embeds(self):
        """The same of a guidance scale, guidance_embeds."""
        return self.with_further(guidance_embeds=True)

    def with_frames(self, num_frames: int):
        """A copy of a model of images as one of videos of so many frames, (B, C, num_frames, height, width), with
        factorized_attention, that at first gives for each frame what the model gives for it as an image. Raises
        ValueError for a model that cannot."""
        if len(self.patch) != 2:
            raise ValueError(f"with_frames is of a model of images; this one's samples have {len(self.patch)} axes")
        size = per_axis(self.config.sample_size, 2, "sample_size")
        return self.with_further(
            sample_size=(num_frames, *size), patch_size=(1, *self.patch), factorized_attention=True
        )

    def with_further(self, **arguments):
        """A copy of the model with these arguments, too, whose weights are the same, each in its own dtype, beside
        those that come with them."""
        model = type(self)(**self.config | arguments).to(self.device)
        own = {name: value.clone() for name, value in self.state_dict().items()}
        others = {name: value.to(self.dtype) for name, value in model.state_dict().items() if name not in own}
        model.load_state_dict(own | others, assign=True)
        return model.train(self.training)

    def enable_cache(self, config):
        """As diffusers' `CacheMixin.enable_cache`, whose hooks are told of our blocks here."""
        from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry

        for block_class in (DiTBlock, DiTTemporalBlock, DiTHeadBlock, DiTTokenBlock):
            TransformerBlockRegistry.register(block_class, TransformerBlockMetadata(return_hidden_states_index=0))
        super().enable_cache(config)

    def null_conditions(self, conditions):
        """What stands for "none" of conditions, for classifier-free guidance (Ho & Salimans 2022).

        Args:
            conditions: {argument of `forward`: tensor (B, ...)}.

        Returns {argument: tensor of the same shape} for those that have it: class_labels, the null label;
        encoder_hidden_states and pooled_projections, zeros, whose embeddings are biases that are learned, and
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
        hidden_states,
        timestep,
        class_labels=None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        return_dict: bool = True,
        pooled_projections=None,
        condition_sample=None,
        timestep_to=None,
        guidance=None,
        hidden_states_of: int | None = None,
        kept_tokens=None,
    ):
        """Run the network. What is on another device than `hidden_states` is sent to it.

        Args:
            hidden_states: (B, C, *size) with 1 to 3 axes, each a multiple of the patch; C is in_channels less
                condition_channels. With a vocab_size token ids (B, L), int64, from 0 to vocab_size, of any length.
            timestep: the number(s) that the scheduler's `timesteps` hold, whole or not; a scalar or (B,). Not read
                without time_conditioning: None will do.
            class_labels: (B,) integers in [0, num_classes], `num_classes` being the null label; None means the null
                label for every sample. Must be None for an unconditional model.
            encoder_hidden_states: (B, S, cross_attention_dim), for a model with cross_attention_dim; None means what
                stands for none (`null_conditions`) for every sample.
            encoder_attention_mask: (B, S), True or 1 where an element of the sequence counts, at least one of each;
                None for all.
            return_dict: return a `Transformer2DModelOutput` instead of a tuple.
            pooled_projections: (B, pooled_projection_dim), for a model with pooled_projection_dim; None as above.
            condition_sample: (B, condition_channels, *size), seen beside the sample, for a model with
                condition_channels; None as above.
            timestep_to: the time that the map leads to, in the same numbers as `timestep`, for a model with two_times;
                None means `timestep` itself, so that such a model is an ordinary one, too.
            guidance: the guidance scale(s), a number or (B,), for a model with guidance_embeds; None means 1.
            hidden_states_of: a number of blocks, from 1 to num_layers, whose outcome is returned, too.
            kept_tokens: (B, K) numbers of tokens, row by row, the only ones of each sample that `routed_blocks` see:
                the others go around these as they are (TREAD, Krause et al. 2025). It is for training; None for all.

        Returns:
            `.sample` of shape (B, out_channels, *size), with a vocab_size (B, L, vocab_size); with
            hidden_states_of also `.hidden_states`, the tokens (B, T, D) after so many blocks, row by row.

        Raises ValueError for an input of the wrong shape, for labels or another condition that the model doesn't
        have, for those that are missing where training always showed them (a class_dropout_prob of 0), and, on the
        CPU, for token ids and labels out of range.
        """
        self.check_shape(hidden_states)
        if kept_tokens is not None and not self.routed_blocks:
            raise ValueError(
                "kept_tokens need a model of 3 blocks at least, with conditioning adaln_zero or adaln and without "
                "factorized_attention"
            )
        seen: Any = None
        if hidden_states_of is not None:
            if hidden_states_of not in range(1, self.config.num_layers + 1):
                raise ValueError(
                    f"hidden_states_of {hidden_states_of}: this model has blocks 1 to {self.config.num_layers}"
                )
            seen = []
        points = hidden_states
        if self.parts:
            hidden_states = self.with_waves(points)
        hidden_states = self.with_condition(hidden_states, condition_sample)  # (B, in_channels, *size)
        if self.token_embed is None:
            grid = tuple(side // patch for side, patch in zip(hidden_states.shape[2:], self.patch, strict=True))
        else:
            grid, hidden_states = tuple(hidden_states.shape[1:]), self.token_embed(hidden_states)  # (B, L, D)
        if encoder_attention_mask is not None:
            encoder_attention_mask = encoder_attention_mask.to(hidden_states.device, torch.bool)
        time = self.embed_time(timestep, timestep_to, guidance, hidden_states)  # (B, D), as label and pooled
        label = self.embed_label(class_labels, hidden_states)
        pooled = self.embed_pooled(pooled_projections, hidden_states)
        time = time if pooled is None else pooled if time is None else time + pooled
        context = self.embed_context(encoder_hidden_states, encoder_attention_mask, hidden_states)  # (B, S, D)

        tokens = patches = hidden_states
        if self.patch_embed is not None:
            patches = self.patchify(hidden_states)  # (B, T, C * patch)
            tokens = self.patch_embed(patches)  # (B, T, D)
        if "sincos" in self.config.position_embedding:
            positions = self.embed_positions("sincos", self.grid_of_attention(grid)).to(tokens.dtype)
            if self.config.factorized_attention:
                positions = positions.repeat(grid[0], 1)
            tokens = tokens + positions
        if self.adaln is not None:
            mask = None if encoder_attention_mask is None else encoder_attention_mask[:, None, None]
            conditioning = time if label is None else label if time is None else time + label
            if conditioning is None:
                # a constant modulation asks only for how many
                conditioning = tokens.new_zeros(len(tokens), 1)
            tokens = self.run_modulated(tokens, conditioning, grid, context, mask, seen, kept_tokens)
            if self.head_blocks is not None:
                tokens = self.run_head(tokens, conditioning, patches, grid)
        else:
            condition = [part.unsqueeze(1) for part in (time, label) if part is not None]
            tokens = self.run_with_tokens(tokens, condition, context, encoder_attention_mask, grid, seen)
        sample = self.proj_out(tokens)
        if self.token_embed is None:
            sample = self.unpatchify(sample, grid)  # (B, out_channels, *size)
            sample = self.tangent(sample, points) if self.parts else sample
        elif self.config.tied_head:
            sample = F.linear(sample, self.token_embed.weight[:-1])  # (B, L, vocab_size)
        if hidden_states_of is not None:
            chosen = seen[hidden_states_of - 1]
            return DiTModelOutput(sample=sample, hidden_states=chosen) if return_dict else (sample, chosen)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    @property
    def routed_blocks(self):
        """The blocks that some tokens may go around, a range: behind the second and up to the fourth from the end, as
        Krause et al. 2025 have them, of fewer than 12 blocks a share of that; none where a model cannot."""
        if self.adaln is None or self.config.factorized_attention:
            return range(0)
        depth = self.config.num_layers
        return range(max(1, min(2, depth // 4)), depth - max(1, min(4, depth // 3)))

    def run_modulated(self, tokens, conditioning, grid, context=None, mask=None, seen=None, kept=None):
        """The blocks of adaln_zero and adaln and, without a head, the last norm: (B, T, D), (B, D), a context
        (B, S, D) with its mask (B, 1, 1, S) -> (B, T, D). A list `seen` gets the tokens after each block. Of `kept`
        tokens (B, K) alone are those in the routed blocks."""
        modulation = self.adaln(F.silu(conditioning)).unflatten(1, (-1, self.config.hidden_size))
        # the gradient of a split is one concatenation; that of slices would sum as many whole matrices
        vectors = CONDITIONINGS[self.config.conditioning]
        count, rest = divmod(modulation.shape[1], vectors)
        of_blocks = modulation.split([vectors] * count + [rest], dim=1)
        rotary = self.rotary_positions(self.grid_of_attention(grid))
        frames, span, of_frames = None, None, ()
        if self.temporal_adaln is not None:
            frames, span = grid[0], math.prod(grid[1:])
            modulation = self.temporal_adaln(F.silu(conditioning)).unflatten(1, (-1, self.config.hidden_size))
            of_frames = modulation.split(6, dim=1)
            rotary_of_frames = tuple(self.embed_positions("frames", grid[:1]))
        routed = range(0) if kept is None else self.routed_blocks
        for index, block in enumerate(self.blocks):
            if routed and index == routed.start:
                every, rotary_of_all, place = tokens, rotary, kept.unsqueeze(2).expand(-1, -1, tokens.shape[2])
                tokens = tokens.gather(1, place)
                rotary = rotary and tuple(table[kept] for table in rotary)
            shared = self.block_offsets is not None
            own = of_blocks[0] + self.block_offsets[index] if shared else of_blocks[index]
            tokens = self.run(block, tokens, own, rotary, context, mask, span)
            if frames is not None:
                own = of_frames[0] + self.temporal_offsets[index] if shared else of_frames[index]
                temporal_block = self.temporal_transformer_blocks[index]
                tokens = self.run(temporal_block, tokens, own, rotary_of_frames, frames)
            if seen is not None:
                seen.append(every.scatter(1, place, tokens.to(every.dtype)) if index in routed else tokens)
            if routed and index == routed[-1]:
                tokens, rotary = every.scatter(1, place, tokens.to(every.dtype)), rotary_of_all
        return tokens if self.head_blocks is not None else modulate(tokens, *of_blocks[-1].unbind(1))

    def run_head(self, tokens, conditioning, patches, grid):
        """The wide head and its last norm: tokens (B, T, D) from the blocks, (B, D), patches (B, T, C * patch) ->
        (B, T, head_hidden_size)."""
        condition = F.silu(self.head_condition(F.silu(tokens + conditioning.unsqueeze(1))))
        hidden_states, rotary = self.head_patch_embed(patches), None
        if "rotary" in self.config.position_embedding:
            rotary = tuple(self.embed_positions("head", grid))
        for block in self.head_blocks:
            hidden_states = self.run(block, hidden_states, condition, rotary)
        return modulate(hidden_states, *self.head_adaln(condition).chunk(2, dim=-1))

    def run_with_tokens(self, tokens, condition, context, mask, grid, seen=None):
        """The blocks of cross_attention and in_context and the last norm; `condition` are the tokens of time and label,
        (B, 1, D) each, as far as there are any; `seen` as of `run_modulated`."""
        parts = [*condition, *([] if context is None else [context])]
        sequence = torch.cat(parts, dim=1) if parts else tokens[:, :0]  # (B, S, D)
        if mask is not None:
            mask = F.pad(mask, (len(condition), 0), value=True)
        if self.config.conditioning == "cross_attention":
            mask = mask if mask is None else mask[:, None, None]
            rotary = self.rotary_positions(grid)
            for block in self.blocks:
                tokens = self.run(block, tokens, sequence, mask, rotary)
                if seen is not None:
                    seen.append(tokens)
            return self.norm_out(tokens)
        count = tokens.shape[1]
        if mask is not None:
            mask = F.pad(mask, (count, 0), value=True)[:, None, None]
        rotary = self.rotary_positions(grid, sequence.shape[1])
        tokens = torch.cat([tokens, sequence], dim=1)
        for block in self.blocks:
            tokens = self.run(block, tokens, None, mask, rotary)
            if seen is not None:
                seen.append(tokens[:, :count])
        return self.norm_out(tokens[:, :count])

    def run(self, block, *inputs):
        """Call a block, recomputing it in the backward pass when gradient checkpointing is on."""
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(block, *inputs)
        return block(*inputs)

    def check_shape(self, hidden_states):
        """Raise ValueError unless this is a sample (B, C, *size) with axes that the patches divide, or token ids (B, L)
        where these are wanted."""
        if self.token_embed is not None:
            whole = not (hidden_states.is_floating_point() or hidden_states.is_complex())
            if hidden_states.ndim != 2 or not whole:
                raise ValueError(
                    f"hidden_states has shape {tuple(hidden_states.shape)} and {hidden_states.dtype}; this model takes "
                    f"token ids (batch, length), int64"
                )
            remedy = f", of which {self.config.vocab_size} (vocab_size) is the mask: use the tokenizer of the training"
            check_ids("token id", hidden_states, self.config.vocab_size, remedy)
            return
        channels = self.config.in_channels - (self.config.condition_channels or 0)
        size = tuple(hidden_states.shape[2:])
        fits = len(size) == len(self.patch) and all(side % p == 0 for side, p in zip(size, self.patch, strict=True))
        if not fits or hidden_states.shape[1] != channels:
            raise ValueError(
                f"hidden_states has shape {tuple(hidden_states.shape)}; this model takes (batch, {channels}, *size) "
                f"with {len(self.patch)} axes that are multiples of {self.patch}"
            )

    def with_condition(self, hidden_states, condition_sample):
        """A sample (B, C, *size) with the channels that it is seen beside behind it, (B, in_channels, *size). Raises
        ValueError for those that don't fit."""
        channels = self.config.condition_channels
        if channels is None:
            if condition_sample is not None:
                raise ValueError("condition_sample was given to a model without condition_channels")
            return hidden_states
        wanted = (len(hidden_states), channels, *hidden_states.shape[2:])
        if condition_sample is None:
            if self.config.class_dropout_prob == 0:
                raise ValueError(f"condition_sample is missing: this model needs {wanted}")
            condition_sample = hidden_states.new_zeros(wanted)
        if tuple(condition_sample.shape) != wanted:
            raise ValueError(f"condition_sample has shape {tuple(condition_sample.shape)}; this model takes {wanted}")
        return torch.cat([hidden_states, condition_sample.to(hidden_states)], dim=1)

    def with_waves(self, points):
        """Points (B, C, *size) with the waves of their coordinates behind them, those that are angles as waves alone:
        the domain of what a network is told then has no edge where a torus has none."""
        multiples = 2.0 ** torch.arange(self.config.num_frequencies, device=points.device)
        multiples = multiples.reshape(-1, *[1] * (points.ndim - 1))
        phases = (multiples * points.float().unsqueeze(1)).flatten(1, 2)
        kept = [points[:, part] for name, part in self.parts if name != "torus"]
        return torch.cat([*kept, phases.cos().to(points.dtype), phases.sin().to(points.dtype)], dim=1)

    def tangent(self, sample, points):
        """The output at points, both (B, C, *size), without what leads off a sphere."""
        changed = []
        for name, part in self.parts:
            vector, place = sample[:, part], points[:, part]
            off = (vector * place).sum(1, keepdim=True) if name == "sphere" else None
            changed.append(vector if off is None else vector - off * place)
        return torch.cat(changed, dim=1)

    def grid_of_attention(self, grid):
        """Of a grid of patches that within which the blocks attend: all of it, or a frame."""
        return grid[1:] if self.config.factorized_attention else grid

    def trained_positions(self, kind):
        """The grid that a table of positions is of in training: that of the attention, or the frames alone."""
        return self.trained_grid[:1] if kind == "frames" else self.grid_of_attention(self.trained_grid)

    def position_table(self, kind, grid, device=None):
        """Of a grid of patches: of kind sincos (T, D), which is added to the tokens; else cosines and sines (2, T,
        D / heads): rotary, of frames with factorized_attention, or of the head, whose width is its own."""
        config = self.config
        build, width = rotary_position_embedding, config.hidden_size // config.num_attention_heads
        if kind == "sincos":
            build, width = sincos_position_embedding, config.hidden_size
        elif kind == "head":
            width = config.head_hidden_size // (config.head_num_attention_heads or config.num_attention_heads)
        return build(grid, self.trained_positions(kind), config.position_scaling, width, device)

    def embed_positions(self, kind, grid):
        """`position_table` on the model's device and in its dtype, worked out once for every grid; in a compiled model
        as a part of its graph, where it is small."""
        own = getattr(self, f"{kind}_table")
        if grid == self.trained_positions(kind):
            return own
        if torch.compiler.is_compiling():
            # Apple's GPUs have no float64
            device = None if own.device.type == "mps" else own.device
            return self.position_table(kind, grid, device).to(own)
        key = (kind, grid, own.device, own.dtype)
        table = self.other_positions.get(key)
        # FakeTensors have no values to keep
        if table is None or isinstance(own, FakeTensor):
            # that training can use, too
            with torch.inference_mode(False):
                table = self.position_table(kind, grid).to(own)
            if not isinstance(table, FakeTensor):
                for oldest in list(self.other_positions)[: 1 - MAX_TABLES]:
                    self.other_positions.pop(oldest, None)
                self.other_positions[key] = table
        return table

    def rotary_positions(self, grid, num_extra_tokens=0):
        """(cosines, sines) for a grid of patches and for further tokens, which aren't rotated; None without rotary
        positions."""
        if "rotary" not in self.config.position_embedding:
            return None
        cosines, sines = self.embed_positions("rotary", grid)
        if num_extra_tokens == 0:
            return cosines, sines
        return F.pad(cosines, (0, 0, 0, num_extra_tokens), value=1), F.pad(sines, (0, 0, 0, num_extra_tokens))

    def embed_time(self, timestep, timestep_to, guidance, hidden_states):
        """The embedding of one or two times, and of a guidance scale (B, D), in the dtype of `hidden_states`; None
        without time_conditioning. Raises ValueError for a second time or a scale that the model doesn't take."""
        if timestep_to is not None and self.time_to_embed is None:
            raise ValueError("timestep_to was given to a model without two_times")
        if guidance is not None and self.guidance_embed is None:
            raise ValueError("guidance was given to a model without guidance_embeds")
        if self.time_embed is None:
            return None
        time = self.time_embed(self.frequencies(timestep, hidden_states))
        if self.time_to_embed is not None:
            to = timestep if timestep_to is None else timestep_to
            time = time + self.time_to_embed(self.frequencies(to, hidden_states))
        if self.guidance_embed is not None:
            scale = GUIDANCE_STEPS * numbers_on(hidden_states.device, 1.0 if guidance is None else guidance)
            time = time + self.guidance_embed(self.frequencies(scale, hidden_states))
        return time

    def frequencies(self, timestep, hidden_states):
        """Cosines and sines of a time (B, FREQUENCY_EMBEDDING_SIZE), in the dtype of `hidden_states`."""
        timestep = numbers_on(hidden_states.device, timestep)
        # cosines first
        frequencies = get_timestep_embedding(
            timestep.expand(len(hidden_states)),
            FREQUENCY_EMBEDDING_SIZE,
            flip_sin_to_cos=True,
            downscale_freq_shift=self.config.frequency_shift,
        )
        return frequencies.to(hidden_states.dtype)

    def embed_label(self, class_labels, hidden_states):
        """The embedding of the label (B, D); None for an unconditional model. Raises ValueError for labels that don't
        fit."""
        batch_size, device = len(hidden_states), hidden_states.device
        if self.class_embed is None:
            if class_labels is not None:
                raise ValueError("class_labels were given to a model without classes (num_classes=None)")
            return None
        if class_labels is None:
            class_labels = torch.full((batch_size,), self.config.num_classes, device=device)
        if tuple(class_labels.shape) != (batch_size,):
            raise ValueError(f"class_labels has shape {tuple(class_labels.shape)}; the batch needs ({batch_size},)")
        check_ids("class label", class_labels, self.config.num_classes, ", of which the last is no class (num_classes)")
        return self.class_embed(class_labels.to(device))

    def embed_context(self, encoder_hidden_states, mask, hidden_states):
        """The tokens (B, S, D) of a sequence; None for a model without. Raises ValueError for one that doesn't fit."""
        width = self.config.cross_attention_dim
        if encoder_hidden_states is None:
            if mask is not None:
                raise ValueError("encoder_attention_mask was given without encoder_hidden_states")
            if width is None:
                return None
            if self.config.class_dropout_prob == 0:
                raise ValueError(f"encoder_hidden_states is missing: this model needs (batch, sequence, {width})")
            encoder_hidden_states = hidden_states.new_zeros(len(hidden_states), 1, width)
        elif width is None:
            raise ValueError("encoder_hidden_states were given to a model without cross_attention_dim")
        batch_size, shape = len(hidden_states), tuple(encoder_hidden_states.shape)
        if len(shape) != 3 or shape[0] != batch_size or shape[2] != width:
            raise ValueError(
                f"encoder_hidden_states has shape {shape}; this model takes ({batch_size}, sequence, {width})"
            )
        if mask is not None and tuple(mask.shape) != shape[:2]:
            raise ValueError(f"encoder_attention_mask has shape {tuple(mask.shape)}; the sequence needs {shape[:2]}")
        return self.context_embed(encoder_hidden_states.to(hidden_states.device))

    def embed_pooled(self, pooled_projections, hidden_states):
        """The embedding (B, D) of one vector for each sample; None for a model without. Raises ValueError for vectors
        that don't fit."""
        width, batch_size = self.config.pooled_projection_dim, len(hidden_states)
        if pooled_projections is None:
            if width is None:
                return None
            if self.config.class_dropout_prob == 0:
                raise ValueError(f"pooled_projections is missing: this model needs (batch, {width})")
            pooled_projections = hidden_states.new_zeros(batch_size, width)
        elif width is None:
            raise ValueError("pooled_projections were given to a model without pooled_projection_dim")
        if tuple(pooled_projections.shape) != (batch_size, width):
            raise ValueError(
                f"pooled_projections has shape {tuple(pooled_projections.shape)}; this model takes "
                f"({batch_size}, {width})"
            )
        return self.pooled_embed(pooled_projections.to(hidden_states.device))

    def patchify(self, x):
        """(B, C, *size) -> (B, T, C * patch), the patches row by row."""
        sides = [n for side, p in zip(x.shape[2:], self.patch, strict=True) for n in (side // p, p)]
        axes = len(self.patch)
        x = x.reshape(*x.shape[:2], *sides)
        x = x.permute(0, *range(2, 2 * axes + 2, 2), 1, *range(3, 2 * axes + 3, 2))
        return x.flatten(axes + 1).flatten(1, axes)

    def unpatchify(self, tokens, grid):
        """(B, T, patch * C) -> (B, C, *size)."""
        axes = len(self.patch)
        x = tokens.reshape(tokens.shape[0], *grid, *self.patch, self.config.out_channels)
        order = [n for axis in range(axes) for n in (1 + axis, 1 + axes + axis)]
        size = [count * p for count, p in zip(grid, self.patch, strict=True)]
        return x.permute(0, 2 * axes + 1, *order).reshape(x.shape[0], -1, *size)
