"""Unconditional and class-conditional image generation, in pixels or in the latent space of an autoencoder."""

import inspect

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor

from .bundling import BundleMixin
from .latents import denormalize_latents


class ScoreSDEPipeline(BundleMixin, DiffusionPipeline):
    """Sample images from a score-based diffusion model.

    Args:
        scheduler: a `ScoreSDEScheduler`, or a stock diffusers scheduler of the same noise path.
        transformer: a `DiTModel` or diffusers' `DiTTransformer2DModel`; or
        unet: a `ScoreUNetModel` or diffusers' `UNet2DModel`: exactly one of the two.
        vae: an autoencoder of diffusers whose latents the network was trained on; None for a model of pixels.
        id2label: {label: class name}, so that classes can be asked for by name.
    """

    model_cpu_offload_seq = "transformer->unet->vae"
    _optional_components = ["transformer", "unet", "vae"]
    _callback_tensor_inputs = ["latents"]

    def __init__(self, scheduler, transformer=None, unet=None, vae=None, id2label: dict | None = None):
        super().__init__()
        if (transformer is None) == (unet is None):
            raise ValueError("a ScoreSDEPipeline needs exactly one network: either transformer or unet")
        self.register_modules(scheduler=scheduler, transformer=transformer, unet=unet, vae=vae)
        # JSON keys are strings
        self.register_to_config(id2label={str(k): v for k, v in id2label.items()} if id2label else None)
        self.image_processor = VaeImageProcessor()

    @property
    def denoiser(self):
        """The network, whichever component holds it."""
        return self.unet if self.transformer is None else self.transformer

    @property
    def num_classes(self):
        """Number of class labels of the network, None for an unconditional one."""
        config = self.denoiser.config
        # ours, diffusers' UNet2DModel, diffusers' DiTTransformer2DModel
        for key in ("num_classes", "num_class_embeds", "num_embeds_ada_norm"):
            if config.get(key) is not None:
                return config[key]
        return None

    @property
    def null_label(self):
        """The label that stands for "no class", None for a network that has none."""
        return None if self.denoiser.config.get("num_class_embeds") is not None else self.num_classes

    def label_ids(self, class_labels):
        """Class labels given as a number, a name, a tensor or a list of numbers and names, as a list of numbers.

        Raises ValueError for a name or number that the model doesn't know.
        """
        if torch.is_tensor(class_labels):
            class_labels = class_labels.tolist()
        if isinstance(class_labels, (int, str)):
            class_labels = [class_labels]
        names = {name: int(label) for label, name in (self.config.id2label or {}).items()}
        ids = []
        for label in class_labels:
            if isinstance(label, str):
                if label not in names:
                    raise ValueError(
                        f"class name {label!r} is unknown; this model knows {', '.join(names) or 'no names'}"
                    )
                label = names[label]
            if label not in range(self.num_classes):
                raise ValueError(
                    f"class label {label} is out of range: this model has labels 0 to {self.num_classes - 1}"
                )
            ids.append(int(label))
        return ids

    def check_inputs(self, batch_size, class_labels, guidance_scale, generator, output_type, callback_inputs):
        """Raise ValueError for arguments that contradict the model or each other, before any work."""
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type {output_type!r} is unknown; choose one of pil, np, pt, latent")
        if class_labels is not None and self.num_classes is None:
            raise ValueError("class_labels were given, but the network is unconditional (it has no class table)")
        if guidance_scale != 1 and self.null_label is None:
            raise ValueError(
                f"guidance_scale {guidance_scale} needs a class-conditional network with a null label; pass 1"
            )
        if class_labels is None and self.num_classes is not None and self.null_label is None:
            raise ValueError("this network knows no null label: pass class_labels")
        if guidance_scale != 1 and class_labels is None:
            raise ValueError(f"guidance_scale {guidance_scale} needs class_labels")
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size {batch_size} must be at least 1")
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(
                f"{len(generator)} generators were given for {batch_size} images: pass one, or one per image"
            )
        unknown = [name for name in callback_inputs if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs {unknown} are unknown; choose from {self._callback_tensor_inputs}"
            )

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int | None = None,
        class_labels=None,
        guidance_scale: float = 1.0,
        num_inference_steps: int = 50,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end=None,
        callback_on_step_end_tensor_inputs: list[str] = ("latents",),
    ):
        """Generate images.

        Args:
            batch_size: number of images; by default one per class label. A single label is repeated.
            class_labels: a label or class name, or one per image; None for unconditional generation.
            guidance_scale: classifier-free guidance (Ho & Salimans 2022), on every channel: 1 is none, larger values
                follow the class more closely at the cost of variety.
            num_inference_steps: time steps; the number of network evaluations is `scheduler.nfe` with our scheduler.
            generator: source of all noise; with a list of one per image, an image depends on its own seed only.
            latents: the standard normal noise to start from, (batch, channels, height, width), instead of drawing it.
            output_type: pil; np: float (batch, height, width, channels) in [0, 1]; pt: float (batch, channels, height,
                width) in [0, 1]; latent: what the network generates, undecoded.
            return_dict: return an `ImagePipelineOutput` instead of the tuple (images,).
            callback_on_step_end: called as f(pipeline, step, timestep, {"latents": ...}) after every network
                evaluation; a dict that it returns may replace "latents".

        Returns:
            `.images`.

        Raises ValueError for arguments that don't fit the model, before any work.
        """
        labels = None
        if class_labels is not None and self.num_classes is not None:
            labels = self.label_ids(class_labels)
            if batch_size is not None and len(labels) == 1:
                labels = labels * batch_size
            if batch_size not in (None, len(labels)):
                raise ValueError(f"{len(labels)} class_labels were given for batch_size {batch_size}")
            batch_size = len(labels)
        if batch_size is None:
            batch_size = 1 if latents is None else latents.shape[0]
        self.check_inputs(
            batch_size, class_labels, guidance_scale, generator, output_type, callback_on_step_end_tensor_inputs
        )

        network, device = self.denoiser, self._execution_device
        size = network.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        shape = (batch_size, network.config.in_channels, height, width)
        if latents is None:
            # half precision is for the network only
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        elif tuple(latents.shape) != shape:
            raise ValueError(f"latents has shape {tuple(latents.shape)}; this model needs {shape}")
        latents = latents.to(device) * self.scheduler.init_noise_sigma

        self.scheduler.set_timesteps(num_inference_steps, device=device)
        guided = guidance_scale != 1
        if labels is not None:
            labels = torch.tensor(labels + [self.null_label] * (batch_size if guided else 0), device=device)
        elif self.null_label is not None:
            labels = torch.full((batch_size,), self.null_label, device=device)

        step_kwargs = {}
        if "generator" in inspect.signature(self.scheduler.step).parameters:
            step_kwargs["generator"] = generator
        # stock schedulers either use a learned variance or cannot take its channels
        takes_variance = "learned" in str(self.scheduler.config.get("variance_type"))
        for i, timestep in enumerate(self.progress_bar(self.scheduler.timesteps)):
            model_input = self.scheduler.scale_model_input(latents, timestep).to(network.dtype)
            if guided:
                model_input = torch.cat([model_input, model_input])
            output = network(model_input, timestep.expand(len(model_input)), class_labels=labels).sample
            if guided:
                conditional, unconditional = output.chunk(2)
                output = unconditional + guidance_scale * (conditional - unconditional)
            if not takes_variance:
                output = output[:, : latents.shape[1]]
            latents = self.scheduler.step(output, timestep, latents, **step_kwargs).prev_sample
            if callback_on_step_end is not None:
                values = {"latents": latents}
                tensors = {name: values[name] for name in callback_on_step_end_tensor_inputs}
                latents = (callback_on_step_end(self, i, timestep, tensors) or {}).get("latents", latents)

        images = latents
        if output_type != "latent":
            if self.vae is not None:
                images = self.vae.decode(denormalize_latents(latents, self.vae.config).to(self.vae.dtype)).sample
            images = self.image_processor.postprocess(images.float(), output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)
