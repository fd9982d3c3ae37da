"""The components of a pipeline and what it is told: data in and out, conditions, guidance. How it comes from noise to
samples stands in `trajectory_pipeline.py`."""

import copy
import dataclasses
import math
import warnings
from dataclasses import dataclass, replace

import numpy as np
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils import BaseOutput
from PIL import Image

from .adapters import AdapterMixin
from .bundling import BundleMixin, plain_component
from .calls import CallMixin
from .conditions import check_conditions, check_no_tokens, expand, null_conditions, sample_channels
from .guidance import guided, knows_guidance, steered_by_classifier
from .image_conditions import Measurement, at_size
from .kinds import SQUARES_ALONE, Kind, Points, check_rate, divisors_of_sides, kind_of
from .latents import (
    AUTOENCODERS,
    check_only_size,
    data_axes,
    data_channels,
    decode_latents,
    denormalize_latents,
    encode_moments,
    normalize_latents,
    spatial_factor,
)
from .prompts import (
    PROMPT_SETTINGS,
    check_prompt_settings,
    encode,
    encoder_width,
    fingerprint,
    lengths,
    open_text_encoder,
    tokenize,
)
from .protocols import Conditions, Generators, GuidedNetwork, Network, Scheduler
from .units import UNITS, as_given, as_saved, check_units, to_data_units, to_unit_scale
from .wording import check_finite, few, quoted


# pixels that an autoencoder decodes or encodes at once: 16 images of 512 x 512
PIXELS_AT_ONCE = 2**22


@dataclass
class ScoreSDEPipelineOutput(BaseOutput):
    """Output of a pipeline.

    images: what it made, whatever the kind: images as a list of PIL images, an array or a tensor, as asked for by
        output_type; signals and sound as an array or a tensor (B, C, length); videos as a list of lists of PIL images,
        an array or a tensor. Also as `audios` and `frames`, as diffusers' pipelines of sound and of videos call it.
    nfe: number of network evaluations that every sample took (with guidance, of two samples each).
    sampling_rate: of sound, in Hz; frame_rate: of videos, in frames a second; None of anything else.
    """

    images: list[Image.Image] | list[list[Image.Image]] | np.ndarray | torch.Tensor
    nfe: int | None = None
    sampling_rate: float | None = None
    frame_rate: float | None = None

    @property
    def audios(self):
        return self.images

    @property
    def frames(self):
        return self.images


class DenoisingPipeline(CallMixin, BundleMixin, AdapterMixin, DiffusionPipeline):  # type: ignore[misc]  # a bundle has fewer options
    """A score-based diffusion model: scheduler, network, and an autoencoder where there is one.

    Args:
        scheduler: a `ScoreSDEScheduler`, or a stock diffusers scheduler of the same noise path.
        transformer: a `DiTModel` or diffusers' `DiTTransformer2DModel`; or
        unet: a `ScoreUNetModel` or diffusers' `UNet2DModel`: exactly one of the two.
        vae: an autoencoder of diffusers whose latents the network was trained on; None for a model of pixels.
        id2label: {label: class name}, so that classes can be asked for by name.
        text_encoder, tokenizer: of `transformers`, for a network that follows words.
        prompt_settings: how they are used, those of `prompts.PROMPT_SETTINGS` that differ: max_tokens, layers, pooled;
            and text_encoder, the id on the Hub of an encoder that is opened when a prompt is given first, with its
            fingerprint.
        condition_from: for a network that sees an image beside the sample: what that is of the image which is to be
            made, by name, such as downsample:4 (`image_conditions.Measurement`); None for any other.
        data_mean, data_std: of the data that a network without an autoencoder was trained on, numbers, or one for each
            channel: what goes in and comes out is in the data's own units, and the network sees (data - mean) / std.
            None where these are the same.
        sampling_rate: in Hz, of a network of one axis whose samples are sound; None for other signals.
        frame_rate: in frames a second, of a network of three axes whose samples are videos; None for other volumes.
        columns: names of the numbers that a point has in the data, with commas between them, for a network whose
            samples are points.
        coordinates: latitude_longitude, where these are the data's form of points of a sphere; None for points as the
            domain has them.
    """

    model_cpu_offload_seq = "text_encoder->transformer->unet->vae"  # type: ignore[assignment]  # declared as None
    _optional_components = ["transformer", "unet", "vae", "text_encoder", "tokenizer"]
    _callback_tensor_inputs = ["latents", "prompt_embeds"]

    scheduler: Scheduler
    transformer: Network | None
    unet: Network | None

    def __init__(
        self,
        scheduler,
        transformer=None,
        unet=None,
        vae=None,
        id2label: dict | None = None,
        text_encoder=None,
        tokenizer=None,
        prompt_settings: dict | None = None,
        condition_from: str | None = None,
        data_mean: int | float | list[float] | dict | None = None,
        data_std: int | float | list[float] | dict | None = None,
        sampling_rate: int | float | None = None,
        frame_rate: int | float | None = None,
        columns: str | None = None,
        coordinates: str | None = None,
    ):
        super().__init__()
        check_prompt_settings(prompt_settings or {})
        if data_std is not None and vae is not None:
            raise ValueError("data_std is of a model without an autoencoder, whose own config scales its latents")
        if condition_from is not None:
            Measurement(condition_from)
        if (text_encoder is None) != (tokenizer is None):
            raise ValueError("text_encoder and tokenizer belong together: pass both or neither")
        if (transformer is None) == (unet is None):
            raise ValueError("a ScoreSDEPipeline needs exactly one network: either transformer or unet")
        network = unet if transformer is None else transformer
        check_no_tokens(scheduler, network)
        check_units(data_mean, data_std, sample_channels(network.config))
        rates = {"sampling_rate": sampling_rate, "frame_rate": frame_rate}
        for name, rate in rates.items():
            if rate is not None:
                check_rate(name, rate)
                vae_config = None if vae is None else vae.config
                kind_of(network.config, vae_config, **rates, vae_axes=data_axes(plain_component(vae)))
        self.register_modules(
            scheduler=scheduler,
            transformer=transformer,
            unet=unet,
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
        )
        # JSON keys are strings
        self.register_to_config(id2label={str(k): v for k, v in id2label.items()} if id2label else None)
        self.register_to_config(prompt_settings=prompt_settings or None)
        self.register_to_config(condition_from=condition_from, **rates)
        self.register_to_config(data_mean=as_saved(data_mean), data_std=as_saved(data_std))
        self.register_to_config(columns=columns, coordinates=coordinates)
        # an encoder that the settings name, and its tokenizer: used, but not saved
        self._named_encoder: tuple | None = None
        # of one call, on its own view
        self._size: tuple[int, ...] | None = None
        if (columns or coordinates) and not isinstance(self.kind, Points):
            raise ValueError("columns and coordinates are of points: of a network whose sample_size is (1,)")

    def __setattr__(self, name, value):
        # diffusers would leave out of the saved index what was None before
        if name in self._optional_components and value is not None and name in self.__dict__:
            library = "transformers" if name in ("text_encoder", "tokenizer") else "diffusers"
            self.register_to_config(**{name: (library, type(value).__name__)})
        super().__setattr__(name, value)

    @property
    def denoiser(self) -> Network:
        """The network, whichever component holds it. Raises ValueError where none does."""
        network = self.unet if self.transformer is None else self.transformer
        if network is None:
            raise ValueError("this pipeline holds no network: set its transformer or its unet")
        return network

    @property
    def units(self) -> dict:
        """{"data_mean", "data_std"} of the data, None where what the network sees are the data themselves."""
        return {name: as_given(self.config[name]) for name in UNITS}

    @property
    def kind(self) -> Kind:
        """The kind of data that it makes, which owns their shape, noise and output: see `kinds.py`."""
        vae, vae_config = plain_component(self.vae), None if self.vae is None else self.vae.config
        told = self.rates | {"data_std": self.config["data_std"], "coordinates": self.of_points}
        kind = kind_of(self.denoiser.config, vae_config, **told, vae_axes=data_axes(vae))
        return kind if self._size is None else replace(kind, size=self._size)

    @property
    def of_points(self) -> dict:
        """What `Coordinates` of points are told beside their network."""
        columns = self.config["columns"]
        told = {"columns": columns and tuple(columns.split(",")), "on_sphere": self.config["coordinates"]}
        told |= {"mean": self.units["data_mean"], "std": self.units["data_std"]}
        domain = self.scheduler.config.get("domain")
        return told if domain is None else told | {"domain": domain}

    @property
    def rates(self) -> dict:
        """{"sampling_rate", "frame_rate"}: of sound in Hz, of videos in frames a second, None of anything else."""
        return {name: self.config.get(name) for name in ("sampling_rate", "frame_rate")}

    @property
    def image_channels(self) -> int | None:
        """Number of channels of the data that the pipeline makes and takes; None where an autoencoder doesn't say."""
        return self.kind.data_channels

    def sample_shape(self, batch_size: int) -> tuple[int, ...]:
        """Shape of what the network generates: (batch, channels, height, width), of signals (batch, channels,
        length)."""
        return self.kind.sample_shape(batch_size)

    def set_size(self, height: int | None = None, width: int | None = None):
        """Let a call, on its own view of the pipeline, work on images of this height and width in pixels; None is what
        the network was made for.

        Raises ValueError for a size that the network or the autoencoder can't have, naming the nearest ones, and for
        data that are no images.
        """
        if height is None and width is None:
            return
        network, factor = self.denoiser, spatial_factor(self.vae)
        size = self.kind.of_size(height, width, divisors_of_sides(network.config), factor).size
        if type(network).__name__ in SQUARES_ALONE and len(set(size)) > 1:
            raise ValueError(
                f"a {type(network).__name__} makes squares alone, not height {size[0] * factor} and width "
                f"{size[1] * factor}: convert it by score_sde.sharing.convert into a DiTModel"
            )
        check_only_size(plain_component(self.vae), [side * factor for side in size])
        self._size = size

    def set_size_of(self, images, samples):
        """`set_size` by images or videos, or by clean samples of what the network generates. Other data stay as they
        are."""
        given, wanted = (images if samples is None else samples), self.sample_shape(1)
        if torch.is_tensor(given) and given.ndim == len(wanted) and self.kind.name in ("image", "video"):
            factor = 1 if samples is None else spatial_factor(self.vae)
            self.set_size(*(side * factor for side in given.shape[-2:]))

    def prepare_conditions(
        self, class_labels=None, conditions: dict | None = None, batch_size: int | None = None, classifier=None
    ) -> Conditions:
        """All conditions as {argument of the network's forward: tensor (B, ...)} on the pipeline's device, class labels
        as numbers first; without a batch_size as many as each is given for. Those that were given already may be given
        again.

        Args: as for `__call__`.

        Raises ValueError for what the network doesn't have, or has another number of elements than there are samples.
        """
        others = dict(conditions or {})
        own = others.pop("class_labels", None)
        if own is not None and class_labels is not None:
            raise ValueError("class_labels were given twice: as such, and among the conditions")
        labels = self.prepare_labels(own if class_labels is None else class_labels, batch_size, classifier)
        check_conditions(self.denoiser, others, batch_size)
        found = {} if labels is None else {"class_labels": torch.tensor(labels)}
        found |= {name: value if batch_size is None else expand(value, batch_size) for name, value in others.items()}
        return {name: value.to(self._execution_device) for name, value in found.items()}

    @property
    def prompt_settings(self) -> dict:
        """How prompts are encoded: `prompts.PROMPT_SETTINGS`, with what this pipeline says."""
        return PROMPT_SETTINGS | (self.config["prompt_settings"] or {})

    @property
    def takes_prompts(self) -> bool:
        """Whether it has a text encoder, or the name of one."""
        return self.text_encoder is not None or self.prompt_settings["text_encoder"] is not None

    def open_encoder(self):
        """(text encoder, tokenizer): the components, or those that the settings name, opened once and not saved.

        Raises ValueError where there are none, and for a repo that holds another encoder than that of the training.
        """
        if self.text_encoder is not None:
            return self.text_encoder, self.tokenizer
        pipeline, settings = self._called or self, self.prompt_settings
        if pipeline._named_encoder is None:
            if settings["text_encoder"] is None:
                raise ValueError(
                    "a prompt was given, but this pipeline has no text encoder: pass text_encoder= and tokenizer= to "
                    "from_pretrained, or prompt_embeds instead"
                )
            opened = open_text_encoder(settings["text_encoder"])
            if settings["fingerprint"] not in (None, fingerprint(*opened)):
                raise ValueError(
                    f"the text encoder in {quoted(settings['text_encoder'])} is not the one that this model was "
                    f"trained with: pass that as text_encoder= and tokenizer= to from_pretrained"
                )
            pipeline.use_named_encoder(*opened)
        text_encoder, tokenizer = pipeline._named_encoder
        return text_encoder.to(self._execution_device), tokenizer

    def use_named_encoder(self, text_encoder, tokenizer):
        """Encode prompts by these, which are those that the settings name, and leave them out of what is saved."""
        self._named_encoder = text_encoder, tokenizer

    def encode_prompt(self, prompt: str | list[str]) -> Conditions:
        """What the network is told of prompts, one or a list: {argument of its forward: tensor (B, ...)}, as
        `conditions` of every method takes them. An empty prompt is none.

        Warns of prompts that are cut off. Raises ValueError for what is no text, and for an encoder of another width
        than the network takes.
        """
        prompts = [prompt] if isinstance(prompt, str) else prompt
        if not isinstance(prompts, (list, tuple)) or not prompts or not all(isinstance(each, str) for each in prompts):
            raise ValueError(f"a prompt is a text, or a list of texts, not {quoted(prompt)}")
        text_encoder, tokenizer = self.open_encoder()
        settings, wanted = self.prompt_settings, self.denoiser.config.get("cross_attention_dim")
        width = encoder_width(text_encoder, settings)
        if wanted not in (None, width):
            raise ValueError(
                f"the text encoder, a {type(text_encoder).__name__}, makes vectors of width {width}; the network takes "
                f"{wanted} (cross_attention_dim)"
            )
        most = settings["max_tokens"]
        if long := [each for each, n in zip(prompts, lengths(tokenizer, prompts), strict=True) if n > most]:
            warnings.warn(f"cut off after {most} tokens: {few(map(quoted, long))}", stacklevel=3)
        device = self._execution_device
        ids, mask = tokenize(tokenizer, prompts, most)
        return encode(text_encoder, ids.to(device), mask.to(device), settings)

    def add_prompt(self, conditions, kind, prompt=None, embeds=None, mask=None) -> Conditions:
        """Conditions with what a prompt says, which is given as texts, or encoded as `embeds` (B, S, width) with a
        `mask` (B, S) of what counts, all by default. `kind` is prompt or negative_prompt.

        Raises ValueError for both, for a mask alone, and for what is among the conditions already.
        """
        told: Conditions = {}
        if prompt is not None and embeds is not None:
            raise ValueError(f"{kind} and {kind}_embeds were given: pass one of them")
        if mask is not None and embeds is None:
            raise ValueError(f"{kind}_attention_mask needs {kind}_embeds")
        if prompt is not None:
            told = self.encode_prompt(prompt)
        elif embeds is not None:
            if not torch.is_tensor(embeds) or embeds.ndim != 3:
                raise ValueError(f"{kind}_embeds must be a tensor (batch, sequence, width), not {quoted(embeds)}")
            mask = torch.ones(embeds.shape[:2], dtype=torch.bool) if mask is None else mask
            told = {"encoder_hidden_states": embeds, "encoder_attention_mask": mask.bool()}
        if twice := [name for name in told if name in (conditions or {})]:
            raise ValueError(f"{', '.join(twice)} were given twice: by {kind}, and among the conditions")
        return {**(conditions or {}), **told}

    @property
    def takes_condition_image(self) -> bool:
        """Whether the network sees an image beside the sample."""
        return bool(self.denoiser.config.get("condition_channels"))

    def condition_shape(self) -> tuple[int, ...]:
        """Shape (channels, height, width) of a condition image as a user gives it. Raises ValueError for a size that
        what it is measured by doesn't divide."""
        kind, channels = self.kind, self.denoiser.config["condition_channels"]
        factor, source = spatial_factor(self.vae), self.config["condition_from"]
        size = tuple(side * factor for side in kind.size)
        if self.vae is not None:
            channels = data_channels(self.vae.config)
        if source is not None:
            measurement = Measurement(source)
            if any(side % measurement.factor for side in size):
                raise ValueError(
                    f"height {size[0]} and width {size[1]} must be multiples of {measurement.factor} pixels, of which "
                    f"{source} makes one of the condition_image"
                )
            channels, size = measurement.channels(channels), tuple(side // measurement.factor for side in size)
        return (channels, *size)

    def encode_condition(self, condition_image, height: int | None = None, width: int | None = None) -> Conditions:
        """What the network is told of condition images, {"condition_sample": (B, condition_channels, ...)}, as
        `conditions` of every method takes it.

        Args:
            condition_image: a PIL image, an array (height, width, channels) or tensor (channels, height, width) in
                [0, 1], or a batch or list of them, of `condition_shape`. One that was measured smaller than the image
                (downsample) is given so, and grey where colours are to be found.
            height, width: of the images that are to be made, where they are not of the network's own size.

        Raises ValueError for a model that sees none, and for another size or number of channels.
        """
        if height is not None or width is not None:
            call = copy.copy(self)
            call.set_size(height, width)
            return call.encode_condition(condition_image)
        if not self.takes_condition_image:
            raise ValueError(
                f"condition_image was given, but this {type(self.denoiser).__name__} sees none beside the sample: it "
                f"has no condition_channels"
            )
        (channels, *size), kind = self.condition_shape(), self.kind
        images = dataclasses.replace(kind, data_channels=channels).prepare(condition_image, "condition_image")
        if list(images.shape[2:]) != size:
            source = self.config["condition_from"]
            found, wanted = (" x ".join(map(str, each)) for each in (images.shape[2:], size))
            raise ValueError(
                f"condition_image is of {found} {kind.unit}; this model takes {wanted}"
                + (f", as {source} makes them" if source else ": resize it, or pass height and width")
            )
        factor = spatial_factor(self.vae)
        images = at_size(images, [side * factor for side in kind.size])
        if self.vae is not None:
            images = images.expand(-1, data_channels(self.vae.config), -1, -1)
        return {"condition_sample": self.to_sample_space(images)}

    def add_condition_image(self, conditions, condition_image) -> Conditions:
        """Conditions with those of condition images. Raises ValueError for what is among them already."""
        told = self.encode_condition(condition_image)
        if "condition_sample" in (conditions or {}):
            raise ValueError("condition_sample was given twice: by condition_image, and among the conditions")
        return {**(conditions or {}), **told}

    def guided_network(
        self,
        batch_size: int,
        class_labels=None,
        guidance_scale=1.0,
        guider=None,
        weaker_network=None,
        classifier=None,
        classifier_scale=1.0,
        conditions=None,
        negative_conditions=None,
    ) -> GuidedNetwork:
        """The network with its conditions and guidance applied: f(input (B, C, ...), timesteps (B,)) -> output,
        float32.

        Args: as for `__call__`; negative_conditions: conditions that guidance leads away from, by default those that
            stand for none.

        Raises ValueError for conditions that the network doesn't have, and guidance that it can't follow.
        """
        given = self.prepare_conditions(class_labels, conditions, batch_size, classifier)
        classes = given.get("class_labels")
        if classifier is not None and classes is None:
            raise ValueError("a classifier needs class_labels to lead to")
        if classifier is not None:
            self.check_own_scheduler("a classifier needs")
            self.check_denoises("a classifier needs")
        for name, scale in (("guidance_scale", guidance_scale), ("classifier_scale", classifier_scale)):
            check_finite(name, scale)
        self.check_map()
        told_scale = guidance_scale
        if knows_guidance(self.denoiser.config):
            self.check_learned_guidance(guidance_scale, guider, weaker_network, negative_conditions)
            guidance_scale = 1.0
        if guider is not None and guidance_scale != 1:
            raise ValueError(f"guidance_scale {guidance_scale} and a guider were given: the guider has its own scale")
        if weaker_network is not None and guider is None and guidance_scale == 1:
            raise ValueError("weaker_network needs a guidance_scale other than 1, or a guider")

        # what the network is told, and what guidance leads away from
        own = dict(given)
        if self.num_classes is None:
            own.pop("class_labels", None)
        elif classes is None:
            # any label, for the null label of its shape
            anything = {"class_labels": torch.zeros(batch_size, dtype=torch.long, device=self._execution_device)}
            own = null_conditions(self.denoiser, anything) | own
        if self.takes_condition_image and "condition_sample" not in own:
            shape = (batch_size, self.denoiser.config["condition_channels"], *self.kind.size)
            if not null_conditions(self.denoiser, {"condition_sample": torch.zeros(shape)}):
                raise ValueError(
                    f"this network always saw an image beside the sample: pass condition_image, of shape "
                    f"{self.condition_shape()}"
                )
        negative = self.prepare_negative(negative_conditions, batch_size)
        if negative and ((guidance_scale == 1 and guider is None) or weaker_network is not None):
            raise ValueError(
                "a negative prompt needs a guidance_scale other than 1, or a guider, and no weaker_network"
            )
        # from what is not wanted, to none
        own = null_conditions(self.denoiser, {name: each for name, each in negative.items() if name not in own}) | own
        null = null_conditions(self.denoiser, own) | negative
        if (guidance_scale != 1 or guider is not None) and weaker_network is None:
            if not given and not negative and (null or self.takes_prompts):
                needed = [] if self.num_classes is None else ["class_labels"]
                needed += ["a prompt or its embeddings"] if self.takes_prompts else []
                needed += ["condition_image"] if self.takes_condition_image else []
                raise ValueError(f"guidance_scale {guidance_scale} needs {' or '.join(needed) or 'conditions'}")
            if not null:
                raise ValueError(
                    f"guidance_scale {guidance_scale} needs a class-conditional network with a null label, or one that "
                    f"was trained without its other conditions, too; pass 1"
                )
        away = own if weaker_network is not None else own | null
        for name in away:
            if name not in own or away[name].shape != own[name].shape:
                lengths = [tuple(each[name].shape) if name in each else "none" for each in (own, away)]
                raise ValueError(f"{name} of the prompt and the negative prompt must be of one shape, not {lengths}")
        rows = [away, own] if null or weaker_network is not None else [own]

        call = self._for_one_call()
        call._guidance_scale = told_scale
        call._conditions = {name: torch.stack([row[name] for row in rows]) for name in own}
        origin = self.denoiser if weaker_network is None else weaker_network
        network = guided(call, (origin, self.denoiser), guider)
        if classifier is None:
            return network
        return steered_by_classifier(call.scheduler, network, classifier, classes, classifier_scale)

    def check_learned_guidance(self, guidance_scale, guider, weaker_network, negative):
        """Raise ValueError for guidance other than that which the network has learned."""
        folded = self.denoiser.config.get("folded_guidance")
        if folded is not None and guidance_scale not in (1, folded):
            raise ValueError(
                f"guidance_scale {guidance_scale}: this network has learned guidance with the scale {folded} alone; "
                f"pass {folded}, or leave it out"
            )
        others = {"guider": guider, "weaker_network": weaker_network, "negative_prompt": negative or None}
        if given := [name for name, value in others.items() if value is not None]:
            raise ValueError(
                f"{', '.join(given)}: this network has learned its guidance (guidance_embeds or folded_guidance), and "
                f"takes no other; leave it out"
            )

    def check_map(self):
        """Raise ValueError for a network that can't be what the scheduler says."""
        if self.scheduler.config.get("network_map") == "flow_map" and not self.denoiser.config.get("two_times"):
            raise ValueError(
                f"the scheduler has network_map 'flow_map', and this {type(self.denoiser).__name__} cannot be told a "
                f"second time (two_times in its config): take the network that the scheduler is of"
            )

    def check_denoises(self, who_needs, in_steps=True):
        """Raise ValueError where the network gives no denoised samples, but ends of its map; `who_needs` begins the
        sentence, `in_steps` says whether the scheduler's predictor is used."""
        config = self.scheduler.config
        network_map, predictor = config.get("network_map"), config.get("predictor")
        if network_map == "consistency":
            raise ValueError(f"{who_needs} denoised samples; a consistency model gives none: take its teacher")
        if network_map == "flow_map" and in_steps and predictor in ("auto", "flow_map", "consistency"):
            raise ValueError(
                f"{who_needs} denoised samples, which a flow map gives where it is told its own time: set "
                f"pipe.scheduler = ScoreSDEScheduler.from_config(pipe.scheduler.config, predictor='dpmpp_2m')"
            )

    def prepare_negative(self, conditions, batch_size) -> Conditions:
        """Conditions that guidance leads away from, (B, ...) on the pipeline's device. Raises ValueError for what the
        network doesn't take."""
        check_conditions(self.denoiser, conditions or {}, batch_size)
        device = self._execution_device
        return {name: expand(value, batch_size).to(device) for name, value in (conditions or {}).items()}

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Images (B, channels, height, width) around [-1, 1] of what the network generates: the autoencoder's, or for a
        model of pixels the same. An autoencoder decodes `PIXELS_AT_ONCE`, and at least one image."""
        if self.vae is None:
            return to_data_units(latents.float(), self.units)
        vae, at_once = plain_component(self.vae), 1
        if type(vae).__name__ in AUTOENCODERS and data_axes(vae) == 2:
            at_once = max(1, PIXELS_AT_ONCE // (math.prod(latents.shape[2:]) * spatial_factor(vae) ** 2))
        parts = denormalize_latents(latents, self.vae.config).to(self.vae.dtype).split(at_once)
        return torch.cat([decode_latents(self.vae, part).float() for part in parts])

    def to_latents(self, images: torch.Tensor) -> torch.Tensor:
        """What the network works on for images (B, channels, height, width) in [-1, 1], the inverse of `decode`: the
        autoencoder's mean latents, or for a model of pixels the same. Float32.

        Raises ValueError for another shape, number of channels or range.
        """
        return self.to_sample_space(self.kind.accepted(images))

    def to_sample_space(self, images: torch.Tensor) -> torch.Tensor:
        """`to_latents` without its checks."""
        images = images.to(self._execution_device)
        if self.vae is not None:
            parts = images.to(self.vae.dtype).split(max(1, PIXELS_AT_ONCE // math.prod(images.shape[2:])))
            moments = torch.cat([encode_moments(self.vae, part)[0] for part in parts])
            return normalize_latents(moments, self.vae.config).float()
        return to_unit_scale(images.float(), self.units)

    def prepare_image(self, image) -> torch.Tensor:
        """What `__call__` takes as `image`, as data (B, channels, ...) in the units of `decode`: see the kind of data.
        Raises ValueError for other types, shapes, numbers of channels and ranges."""
        return self.kind.prepare(image)

    def check_data(self, images, samples) -> torch.Tensor:
        """Clean samples (B, C, ...) of what the network generates, of the one that is given: data, or samples. Raises
        ValueError for both, neither, and another shape than the network's."""
        if (images is None) == (samples is None):
            raise ValueError("pass either images or samples")
        samples = self.to_latents(images) if samples is None else samples.to(self._execution_device)
        kind, shape = self.kind, self.sample_shape(len(samples))
        if samples.shape != shape:
            remedy = ""
            if images is not None and samples.ndim == len(shape):
                # of a video the frames first, which an autoencoder takes together
                sides = zip(images.shape[2:], shape[2:], samples.shape[2:], strict=True)
                size = [side * own // given for side, own, given in sides]
                if kind.name in ("image", "video"):
                    size[-2:] = [side * spatial_factor(self.vae) for side in shape[-2:]]
                found, wanted = (" x ".join(map(str, each)) for each in (images.shape[2:], size))
                remedy = f": resize the {kind.name}s from {found} to {wanted} {kind.unit}"
                remedy += ", or say their height and width" if kind.name in ("image", "video") else ""
            raise ValueError(f"the model works on samples of shape {shape}, not {tuple(samples.shape)}{remedy}")
        return samples

    @property
    def domain(self):
        """The domain that samples live on, as the scheduler has it; None for flat space."""
        return getattr(self.scheduler, "domain", None)

    def prepare_noise(
        self, batch_size: int, generator: Generators, latents: torch.Tensor | None, begins: bool = True
    ) -> torch.Tensor:
        """The noise that sampling starts from, given as latents or drawn from the generator: standard normal, or, where
        a trajectory on a domain begins with it, points of that."""
        shape, domain = self.sample_shape(batch_size), self.domain if begins else None
        if latents is None and domain is not None:
            return domain.prior(shape, generator, self._execution_device)
        if latents is None:
            return self.kind.noise(batch_size, generator, self._execution_device)
        if tuple(latents.shape) != shape:
            other_size = self.kind.name == "image" and tuple(latents.shape[:2]) == shape[:2] and latents.ndim == 4
            remedy = ", or the height and width that they are for" if other_size else ""
            raise ValueError(f"latents has shape {tuple(latents.shape)}; this model needs {shape}{remedy}")
        if not torch.isfinite(latents).all():
            raise ValueError("latents holds values that are not finite (nan, infinite)")
        if domain is not None:
            domain.check(latents)
        return latents.to(self._execution_device)

    def finish(self, samples: torch.Tensor, output_type: str | None = None):
        """What `__call__` returns as images."""
        images = samples if output_type == "latent" else self.kind.output(self.decode(samples), output_type)
        self.maybe_free_model_hooks()
        return images

    def check_own_scheduler(self, who_needs):
        """Raise ValueError for a stock scheduler; `who_needs` begins the sentence."""
        if not hasattr(self.scheduler, "denoiser"):
            raise ValueError(
                f"{who_needs} a ScoreSDEScheduler, not a {type(self.scheduler).__name__}: "
                f"pipe.scheduler = ScoreSDEScheduler.from_config(pipe.scheduler.config)"
            )

    def told_of_guidance(self, guidance_scale, guider=None, classifier=None):
        """What `set_timesteps` is told of guidance: its scale, where a scheduler of ours asks and it is known."""
        if not hasattr(self.scheduler, "denoiser") or guider is not None or classifier is not None:
            return {}
        return {"guidance_scale": guidance_scale}

    def check_inputs(self, batch_size, generator, output_type, callback_inputs, conditions):
        """Raise ValueError for arguments that contradict each other, before any work."""
        self.kind.check_output_type(output_type)
        self.check_call(batch_size, generator, callback_inputs, conditions)
        if "prompt_embeds" in callback_inputs and not conditions and self.num_classes is None:
            raise ValueError("callback_on_step_end_tensor_inputs: prompt_embeds are class labels, which it hasn't")
