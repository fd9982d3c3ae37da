"""Unconditional and class-conditional image generation, in pixels or in the latent space of an autoencoder."""

import copy
import inspect
import math
import operator
import warnings
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image

from .adaptive import probability_flow, reverse_sde
from .bundle_files import read_config  # noqa: F401 (diffusers copies the files that this one names, and no further)
from .bundling import BundleMixin
from .carried_code import write_code  # noqa: F401
from .images import to_mode
from .latents import denormalize_latents, encode_moments, normalize_latents
from .likelihood import log_likelihood
from .wording import quoted  # noqa: F401


@dataclass
class ScoreSDEPipelineOutput(ImagePipelineOutput):
    """Output of `ScoreSDEPipeline`.

    images: a list of PIL images, an array or a tensor, as asked for by output_type.
    nfe: number of network evaluations that every sample took (with guidance, of two samples each).
    """

    nfe: int | None = None


# solver, rtol and atol of every adaptive_solver
ADAPTIVE = {"ode": (probability_flow, 1e-3, 1e-3), "sde": (reverse_sde, 0.02, 2 / 256)}


class ScoreSDEPipeline(BundleMixin, DiffusionPipeline):
    """Sample images from a score-based diffusion model.

    Args:
        scheduler: a `ScoreSDEScheduler`, or a stock diffusers scheduler of the same noise path.
        transformer: a `DiTModel` or diffusers' `DiTTransformer2DModel`; or
        unet: a `ScoreUNetModel` or diffusers' `UNet2DModel`: exactly one of the two.
        vae: an autoencoder of diffusers whose latents the network was trained on; None for a model of pixels.
        id2label: {label: class name}, so that classes can be asked for by name.

    Calls may run in several threads on one pipeline: each works on its own copy of the scheduler, which after a call is
    as it was before (the number of network evaluations is `.nfe` of the output). Not so with feature caches
    (`enable_cache`), offloading, and guiders that hook the network: these change the network while it runs.
    """

    model_cpu_offload_seq = "transformer->unet->vae"
    _optional_components = ["transformer", "unet", "vae"]
    _callback_tensor_inputs = ["latents", "prompt_embeds"]

    def __init__(self, scheduler, transformer=None, unet=None, vae=None, id2label: dict | None = None):
        super().__init__()
        if (transformer is None) == (unet is None):
            raise ValueError("a ScoreSDEPipeline needs exactly one network: either transformer or unet")
        self.register_modules(scheduler=scheduler, transformer=transformer, unet=unet, vae=vae)
        # JSON keys are strings
        self.register_to_config(id2label={str(k): v for k, v in id2label.items()} if id2label else None)
        self.image_processor = VaeImageProcessor(do_resize=False)
        # of one call, on its own view: see `_for_one_call`
        self._called = None
        self._guidance_scale, self._conditions, self._num_timesteps, self._interrupt = 1.0, None, 0, False

    def __setattr__(self, name, value):
        # diffusers would leave out of the saved index what was None before
        if name in self._optional_components and value is not None and name in self.__dict__:
            self.register_to_config(**{name: ("diffusers", type(value).__name__)})
        super().__setattr__(name, value)

    def _for_one_call(self):
        """This pipeline as one call sees it: the same networks, with a scheduler and a state of its own, so that calls
        in several threads don't disturb each other."""
        if self._called is not None:
            return self
        call = copy.copy(self)
        call._called, call.scheduler = self, copy.deepcopy(self.scheduler)
        return call

    @property
    def guidance_scale(self):
        """For callbacks: of the call. They may set `_guidance_scale` for the evaluations that follow."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self):
        """For callbacks: whether guidance_scale is other than 1."""
        return self._guidance_scale != 1

    @property
    def num_timesteps(self):
        """For callbacks: number of network evaluations of the call."""
        return self._num_timesteps

    @property
    def interrupt(self):
        """Whether the call shall end before its next network evaluation: a callback sets `_interrupt` of the pipeline
        that it is given, for that call, anyone that of the pipeline itself, for all of its calls, until the next."""
        return self._interrupt or (self._called is not None and self._called._interrupt)

    @property
    def denoiser(self):
        """The network, whichever component holds it. Raises ValueError where none does."""
        network = self.unet if self.transformer is None else self.transformer
        if network is None:
            raise ValueError("this pipeline holds no network: set its transformer or its unet")
        return network

    @property
    def image_channels(self):
        """Number of channels of the images that the pipeline makes and takes."""
        return (self.denoiser if self.vae is None else self.vae).config.in_channels

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
        """The label that stands for "no class", None for a network that has none or never saw it in training."""
        config = self.denoiser.config
        never = config.get("num_class_embeds") is not None or config.get("class_dropout_prob") == 0
        return None if never else self.num_classes

    def label_ids(self, class_labels, num_classes=None):
        """Class labels given as a number, a name, a tensor or array of them or a list, as a list of numbers from 0 to
        num_classes - 1, by default the network's.

        Raises ValueError for a name or number that the model doesn't know, and for what is neither.
        """
        num_classes = self.num_classes if num_classes is None else num_classes
        if hasattr(class_labels, "tolist"):
            class_labels = class_labels.tolist()
        if not isinstance(class_labels, (list, tuple, range)):
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
            try:
                number = operator.index(label)
            except TypeError:
                number = None
            if number is None or isinstance(label, bool):
                raise ValueError(
                    f"class label {label!r} must be a whole number or a name; class_labels takes one, or a list of one "
                    f"per image"
                )
            if number not in range(num_classes):
                raise ValueError(f"class label {number} is out of range: this model has labels 0 to {num_classes - 1}")
            ids.append(number)
        return ids

    def prepare_labels(self, class_labels, batch_size=None, classifier=None):
        """Class labels as `__call__` takes them, as a list of one number per sample: by default as many samples as
        labels. None for no class.

        Raises ValueError where the network has no classes, or needs one, or for another number of labels than samples.
        """
        num_classes = self.num_classes if classifier is None else classifier.config.num_classes
        if class_labels is None:
            if self.num_classes is not None and self.null_label is None:
                raise ValueError("this network knows no null label: pass class_labels")
            return None
        if num_classes is None:
            raise ValueError("class_labels were given, but the network is unconditional (it has no class table)")
        if self.num_classes not in (None, num_classes):
            raise ValueError(f"the classifier has {num_classes} classes, the network {self.num_classes}")
        labels = self.label_ids(class_labels, num_classes)
        if batch_size is not None and len(labels) == 1:
            labels = labels * batch_size
        if batch_size not in (None, len(labels)):
            raise ValueError(f"{len(labels)} class_labels were given for {batch_size} samples")
        return labels

    def sample_shape(self, batch_size):
        """Shape (batch, channels, height, width) of what the network generates."""
        config = self.denoiser.config
        if config.sample_size is None:
            raise ValueError(
                f"this {type(self.denoiser).__name__} has no sample_size: set the height and width that it was trained "
                f"on, pipe.denoiser.register_to_config(sample_size=32)"
            )
        size = (config.sample_size,) * 2 if isinstance(config.sample_size, int) else tuple(config.sample_size)
        return (batch_size, config.in_channels, *size)

    def guided_network(
        self,
        batch_size,
        class_labels=None,
        guidance_scale=1.0,
        guider=None,
        weaker_network=None,
        classifier=None,
        classifier_scale=1.0,
    ):
        """The network with classes and guidance applied: f(input (B, C, H, W), timesteps (B,)) -> output, float32.

        Args: as for `__call__`.

        Raises ValueError for labels that the network doesn't have, and guidance that it can't follow.
        """
        labels = self.prepare_labels(class_labels, batch_size, classifier)
        if classifier is not None and labels is None:
            raise ValueError("a classifier needs class_labels to lead to")
        if classifier is not None:
            self.check_own_scheduler("a classifier needs")
        for name, scale in (("guidance_scale", guidance_scale), ("classifier_scale", classifier_scale)):
            if not math.isfinite(scale):
                raise ValueError(f"{name} {scale} must be a finite number")
        if guider is not None and guidance_scale != 1:
            raise ValueError(f"guidance_scale {guidance_scale} and a guider were given: the guider has its own scale")
        if weaker_network is not None and guider is None and guidance_scale == 1:
            raise ValueError("weaker_network needs a guidance_scale other than 1, or a guider")
        if (guidance_scale != 1 or guider is not None) and weaker_network is None:
            if self.null_label is None:
                raise ValueError(
                    f"guidance_scale {guidance_scale} needs a class-conditional network with a null label; pass 1"
                )
            if labels is None:
                raise ValueError(f"guidance_scale {guidance_scale} needs class_labels")

        device, call = self._execution_device, self._for_one_call()
        null = None if self.null_label is None else torch.full((batch_size,), self.null_label, device=device)
        classes = None if labels is None else torch.tensor(labels, device=device)
        # what the network is told
        labels = null if classes is None or self.num_classes is None else classes
        # guidance leads from what the one network predicts for the first row to what the other does for the last
        networks = (self.denoiser if weaker_network is None else weaker_network), self.denoiser
        rows = [null if weaker_network is None else labels, labels]
        call._guidance_scale = guidance_scale
        call._conditions = None if labels is None else torch.stack([row for row in rows if row is not None])
        guider, evaluations = copy.deepcopy(guider), 0

        def run(name, network, labels, model_input, timesteps):
            # diffusers' feature caches keep what was computed with a class apart from what was without
            with network.cache_context(name) if hasattr(network, "cache_context") else nullcontext():
                return network(model_input.to(network.dtype), timesteps, class_labels=labels).sample.float()

        def network(model_input, timesteps):
            scale, conditions = call._guidance_scale, call._conditions
            away, to = (None, None) if conditions is None else (conditions[0], conditions[-1])
            alone = conditions is not None and len(conditions) == 1
            if guider is not None and not alone:
                return by_guider(model_input, timesteps, (to, away))
            if scale == 1 or alone:
                return run("with a class", networks[1], to, model_input, timesteps)
            if scale == 0:
                return run("without a class", networks[0], away, model_input, timesteps)
            if weaker_network is None:
                both = torch.cat([to, away]), torch.cat([model_input] * 2), torch.cat([timesteps] * 2)
                towards, origin = run("with a class", networks[1], *both).chunk(2)
            else:
                towards = run("with a class", networks[1], to, model_input, timesteps)
                origin = run("without a class", networks[0], away, model_input, timesteps)
            return origin + scale * (towards - origin)

        def by_guider(model_input, timesteps, labels):
            nonlocal evaluations
            guider.set_state(evaluations, len(call.scheduler.timesteps), timesteps[0])
            evaluations += 1
            names = "with a class", "without a class"
            batches = guider.prepare_inputs({"name": names, "network": networks[::-1], "labels": labels})
            for batch in batches:
                guider.prepare_models(batch.network)
                batch.noise_pred = run(batch.name, batch.network, batch.labels, model_input, timesteps)
                guider.cleanup_models(batch.network)
            return guider(batches).pred

        def towards_class(x, t, denoise):
            with torch.enable_grad():
                noisy = x.detach().requires_grad_()
                model_input, half_log_snr = call.scheduler.classifier_input(noisy, t)
                logits = classifier(model_input.to(classifier.dtype), half_log_snr).logits
                [gradient] = torch.autograd.grad(
                    torch.log_softmax(logits, dim=1)[range(batch_size), classes].sum(), noisy
                )
            return call.scheduler.path.add_to_score(denoise(x, t), classifier_scale * gradient, t)

        return network if classifier is None else call.scheduler.steered(network, towards_class)

    def decode(self, latents):
        """Images (B, channels, height, width) around [-1, 1] of what the network generates: the autoencoder's, or for a
        model of pixels the same."""
        if self.vae is not None:
            latents = self.vae.decode(denormalize_latents(latents, self.vae.config).to(self.vae.dtype)).sample
        return latents.float()

    def to_latents(self, images):
        """What the network works on for images (B, channels, height, width) in [-1, 1], the inverse of `decode`: the
        autoencoder's mean latents, or for a model of pixels the same. Float32.

        Raises ValueError for another shape, number of channels or range.
        """
        if not torch.is_tensor(images) or images.ndim != 4 or images.shape[1] != self.image_channels:
            what = f"shape {tuple(images.shape)}" if torch.is_tensor(images) else f"a {type(images).__name__}"
            raise ValueError(f"images must be a tensor (batch, {self.image_channels}, height, width); got {what}")
        low, high = float(images.min()), float(images.max())
        if not torch.is_floating_point(images) or not -1.001 <= low <= high <= 1.001:
            raise ValueError(f"images must be floating-point in [-1, 1]; got {images.dtype} from {low:g} to {high:g}")
        images = images.to(self._execution_device)
        if self.vae is not None:
            moments, _ = encode_moments(self.vae, images.to(self.vae.dtype))
            images = normalize_latents(moments, self.vae.config)
        return images.float()

    def prepare_image(self, image):
        """What `__call__` takes as `image`, as images (B, channels, height, width) in [-1, 1]. A PIL image of any mode
        becomes grey or RGB, as the model has it, on white where it is transparent.

        Raises ValueError for other types, shapes, numbers of channels and ranges.
        """
        channels, prepared = self.image_channels, []
        for each in image if isinstance(image, (list, tuple)) else [image]:
            if isinstance(each, Image.Image):
                if channels not in (1, 3):
                    raise ValueError(f"a PIL image has no {channels} channels, as this model has: pass a tensor")
                each = np.asarray(to_mode(each, "L" if channels == 1 else "RGB"), dtype=np.float32) / 255
                each = each.reshape(*each.shape[:2], channels)
            if isinstance(each, np.ndarray):
                each = torch.from_numpy(each).movedim(-1, -3) if each.ndim > 2 else torch.from_numpy(each)
            if not torch.is_tensor(each):
                raise ValueError(
                    f"image must be a PIL image, an array or tensor in [0, 1], or a list of them; got a "
                    f"{type(each).__name__}"
                )
            each = each[None] if each.ndim == 3 else each
            if each.ndim != 4 or each.shape[1] != channels or each.shape[2:] != (prepared or [each])[0].shape[2:]:
                raise ValueError(
                    f"image has shape {tuple(each.shape)}; this model takes tensors ({channels}, height, width) and "
                    f"arrays (height, width, {channels}), or batches of them, all of one size"
                )
            low, high = float(each.min()), float(each.max())
            if not torch.is_floating_point(each) or not -0.001 <= low <= high <= 1.001:
                raise ValueError(f"image must be floating-point in [0, 1]; got {each.dtype} from {low:g} to {high:g}")
            prepared.append(each.float())
        if not prepared:
            raise ValueError("image is an empty list")
        return 2 * torch.cat(prepared) - 1

    def _check_data(self, images, samples):
        """Samples of the one that is given."""
        if (images is None) == (samples is None):
            raise ValueError("pass either images or samples")
        samples = self.to_latents(images) if samples is None else samples.to(self._execution_device)
        shape = self.sample_shape(len(samples))
        if samples.shape != shape:
            remedy = ""
            if images is not None and samples.ndim == len(shape):
                sides = zip(images.shape[2:], shape[2:], samples.shape[2:], strict=True)
                wanted = " x ".join(str(side * own // given) for side, own, given in sides)
                remedy = f": resize the images from {' x '.join(map(str, images.shape[2:]))} to {wanted} pixels"
            raise ValueError(f"the model works on samples of shape {shape}, not {tuple(samples.shape)}{remedy}")
        return samples

    @staticmethod
    def _renamed(samples, latents):
        """The one that is given."""
        if latents is None:
            return samples
        if samples is not None:
            raise ValueError("pass samples alone: latents is its old name")
        warnings.warn(
            "pass clean samples as `samples`: `latents` is the noise of `__call__`", FutureWarning, stacklevel=4
        )
        return latents

    @contextmanager
    def _towards_noise(self, images, samples, class_labels, guidance_scale, rtol, atol):
        """(x, denoise) for the way from data to noise, with a progress bar."""
        x = self._check_data(images, samples)
        self.check_adaptive(rtol, atol, "ode")
        network = self.guided_network(len(x), class_labels, guidance_scale)
        denoise, ends = self.scheduler.denoiser(network, limited=False), (self.scheduler.t_min, self.scheduler.t_max)
        with self.progress_bar(total=1.0) as bar:
            yield x, self._with_progress(bar, denoise, *ends)

    @torch.no_grad()
    def encode(
        self, images=None, samples=None, class_labels=None, guidance_scale=1.0, rtol=1e-5, atol=1e-5, latents=None
    ):
        """The noise that the probability-flow ODE carries samples to: their encoding, unique for the data's
        distribution (Song et al. 2021, section 4.3 and appendix D.5). Needs torchdiffeq.

        `pipe(latents=noise, num_inference_steps=None, rtol=..., atol=...)` leads back; with a scheduler that has
        denoise_final=False exactly, up to the tolerances. Codes can be interpolated (`slerp`), or scaled to change the
        temperature.

        Args:
            images: (B, channels, height, width) in [-1, 1], other than `image` of `__call__`; or
            samples: clean samples of what the network generates (for a model of pixels the same as images).
            class_labels, guidance_scale: as for `__call__`.
            rtol, atol: tolerances of the ODE's solution.
            latents: old name of samples.

        Returns noise (B, C, H, W) of unit variance.
        """
        call, samples = self._for_one_call(), self._renamed(samples, latents)
        scheduler = call.scheduler
        with call._towards_noise(images, samples, class_labels, guidance_scale, rtol, atol) as (x, denoise):
            noise = probability_flow(scheduler.path, denoise, x, scheduler.t_min, scheduler.t_max, rtol, atol)
        return noise / scheduler.init_noise_sigma

    @torch.no_grad()
    def log_likelihood(
        self,
        images=None,
        samples=None,
        class_labels=None,
        guidance_scale=1.0,
        trace="rademacher",
        num_probes=1,
        generator=None,
        rtol=1e-5,
        atol=1e-5,
        steps=None,
        latents=None,
    ):
        """The exact log-likelihood of samples under the model's probability-flow ODE (Song et al. 2021, section 4.3).
        Needs torchdiffeq.

        For a model of pixels it is the density of the images in [-1, 1]; `.bits_per_dim()` of the result is that of the
        whole numbers 0 to 255 which `dequantize` made them from. For a latent model it is the density of the normalised
        latents, the likelihood of the images being unknown. Both are at the scheduler's t_min: choose it as small as
        the network was trained.

        Args:
            images: (B, channels, height, width) in [-1, 1], other than `image` of `__call__`; or
            samples: clean samples of what the network generates (for a model of pixels the same as images).
            class_labels: a label or name per sample, for the likelihood given the class; by default, that without.
            guidance_scale: as for `__call__`; 1 is the model's own distribution.
            trace, num_probes, generator: of the divergence's estimate: see `likelihood.log_likelihood`.
            rtol, atol: tolerances of the ODE's adaptive solution.
            steps: instead, number of RK4 steps of four evaluations each.
            latents: old name of samples.

        Returns a `likelihood.Likelihood`.
        """
        call, samples = self._for_one_call(), self._renamed(samples, latents)
        scheduler = call.scheduler
        with call._towards_noise(images, samples, class_labels, guidance_scale, rtol, atol) as (x, denoise):
            return log_likelihood(
                scheduler.path,
                denoise,
                x,
                scheduler.t_min,
                scheduler.t_max,
                scheduler.init_noise_sigma,
                rtol,
                atol,
                trace,
                num_probes,
                generator,
                steps,
            )

    def prepare_trajectories(self, num_samples, class_labels=None, guidance_scale=1.0, generator=None, noise=None):
        """(network, noise) for `ScoreSDEScheduler.calibrate`: the guided network of these classes, by default all in
        turn, and noise (num_samples, C, H, W) for it."""
        if noise is None:
            noise = randn_tensor(self.sample_shape(num_samples), generator=generator, device=self._execution_device)
        if class_labels is None and self.num_classes is not None:
            class_labels = [i % self.num_classes for i in range(len(noise))]
        return self.guided_network(len(noise), class_labels, guidance_scale), noise.to(self._execution_device)

    def check_own_scheduler(self, who_needs):
        """Raise ValueError for a stock scheduler; `who_needs` begins the sentence."""
        if not hasattr(self.scheduler, "denoiser"):
            raise ValueError(
                f"{who_needs} a ScoreSDEScheduler, not a {type(self.scheduler).__name__}: "
                f"pipe.scheduler = ScoreSDEScheduler.from_config(pipe.scheduler.config)"
            )

    def check_adaptive(self, rtol, atol, adaptive_solver):
        """Raise ValueError for what an adaptive solver can't do."""
        if adaptive_solver not in ADAPTIVE:
            raise ValueError(f"adaptive_solver {adaptive_solver!r} is unknown; choose one of {', '.join(ADAPTIVE)}")
        self.check_own_scheduler("adaptive solvers need")
        if any(each is not None and each <= 0 for each in (rtol, atol)):
            raise ValueError(f"rtol={rtol} and atol={atol} must be positive")

    @staticmethod
    def _with_progress(bar, denoise, begin, end):
        """f(x, t) that moves the bar to the share of the way from begin to end that the slowest sample has come."""

        def reporting(x, t):
            share = ((torch.as_tensor(t).cpu().double() - begin) / (end - begin)).min()
            bar.n = max(bar.n, round(float(share), 3))
            bar.refresh()
            return denoise(x, t)

        return reporting

    def sample_adaptively(self, network, noise, rtol, atol, adaptive_solver, generator, image=None, t_start=None):
        """The sample that an adaptive solver reaches from noise, or from an image with noise at t_start; and the number
        of network evaluations."""
        scheduler, nfe = self.scheduler, 0
        bar, t_max, t_min = self.progress_bar(total=1.0), scheduler.t_max, scheduler.t_min
        x = noise * scheduler.init_noise_sigma
        if image is not None:
            t_max = t_start
            x = scheduler.path.sample(image, noise, torch.tensor(t_start, dtype=torch.float64))

        def count(model_input, timesteps):
            nonlocal nfe
            nfe += 1
            return network(model_input, timesteps)

        denoise = self._with_progress(bar, scheduler.denoiser(count), t_max, t_min)
        solve, default_rtol, default_atol = ADAPTIVE[adaptive_solver]
        rtol, atol = (default_rtol if rtol is None else rtol), (default_atol if atol is None else atol)
        arguments = {"generator": generator} if adaptive_solver == "sde" else {}
        x = solve(scheduler.path, denoise, x, t_max, t_min, rtol, atol, **arguments)
        if scheduler.config.denoise_final:
            x = denoise(x, t_min)
        bar.close()
        return x, nfe

    def check_inputs(self, batch_size, generator, output_type, callback_inputs):
        """Raise ValueError for arguments that contradict each other, before any work."""
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type {output_type!r} is unknown; choose one of pil, np, pt, latent")
        if batch_size < 1:
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
        if "prompt_embeds" in callback_inputs and self.num_classes is None:
            raise ValueError("callback_on_step_end_tensor_inputs: prompt_embeds are class labels, which it hasn't")

    @staticmethod
    def callback_inputs(callback, names):
        """The tensors that a callback asks for: those of its own where it is one of diffusers' classes."""
        own = isinstance(callback, (PipelineCallback, MultiPipelineCallbacks))
        return callback.tensor_inputs if own else names

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
        rtol: float | None = None,
        atol: float | None = None,
        adaptive_solver: str = "ode",
        image=None,
        strength: float = 0.6,
        guider=None,
        weaker_network=None,
        classifier=None,
        classifier_scale: float = 1.0,
    ):
        """Generate images.

        Args:
            batch_size: number of images; by default one per class label. A single label is repeated.
            class_labels: a label or class name, or one per image, as a list, tensor or array; None for unconditional
                generation.
            guidance_scale: classifier-free guidance (Ho & Salimans 2022), on every channel: 1 is none, larger values
                follow the class more closely at the cost of variety.
            num_inference_steps: time steps; the number of network evaluations is `.nfe` of the output.
                None leaves the steps to an adaptive solver, which needs our scheduler and takes only the path and the
                final denoising from it.
            generator: source of all noise; with a list of one per image, an image depends on its own seed only.
            latents: the standard normal noise to start from, (batch, channels, height, width), instead of drawing it.
            output_type: pil; np: float (batch, height, width, channels) in [0, 1]; pt: float (batch, channels, height,
                width) in [0, 1]; latent: what the network generates, undecoded.
            return_dict: return an `ImagePipelineOutput` instead of the tuple (images,).
            callback_on_step_end: called as f(pipeline, step, timestep, {"latents": ...}) after every network
                evaluation, or one of `diffusers.callbacks`; a dict that it returns may replace what it was given.
                `pipeline` is the call's own view of this one: `pipeline.scheduler` its scheduler, `num_timesteps`,
                `guidance_scale`; what it sets as `pipeline._guidance_scale` holds from then on, and
                `pipeline._interrupt = True` ends the sampling. Adaptive solvers don't call it.
            callback_on_step_end_tensor_inputs: what it is given: "latents" (the samples so far), or "prompt_embeds":
                the labels that the network is told (2, batch), those that guidance leads away from first; with the
                last row alone, (1, batch), there is no guidance from then on.
            rtol, atol: tolerances of the adaptive solver; by default both 1e-3 for "ode", 0.02 and 2 / 256 for "sde".
            adaptive_solver: "ode", Dormand-Prince 5(4) on the probability-flow ODE (needs torchdiffeq), or "sde", the
                adaptive solver of the reverse SDE of Jolicoeur-Martineau et al. 2021.
            image: begin with this image under noise instead of with noise alone (SDEdit, Meng et al. 2022): a PIL
                image of any mode, an array (height, width, channels) or tensor (channels, height, width) in [0, 1], or
                a batch or list of them; one, or one per image to generate. Needs our scheduler.
            strength: how far into the noise the image goes, in (0, 1]: the path time at which the trajectory begins,
                from 0 for the smallest to 1 for the largest. All num_inference_steps are taken from there.
            guider: one of `diffusers.guiders` instead of guidance_scale, such as ClassifierFreeGuidance(guidance_scale,
                start=0.2, stop=0.8), guidance in an interval of the network evaluations (Kynkaanniemi et al. 2024).
            weaker_network: auto-guidance (Karras et al. 2024): a smaller or less trained network of the same kind;
                guidance then leads away from what it predicts for the same classes.
            classifier: a `NoiseConditionalClassifier` of the same classes (classifier guidance, Song et al. 2021,
                section 5; Dhariwal & Nichol 2021). An unconditional network follows class_labels by it alone; a
                class-conditional one by both, or with guidance_scale=0 by it alone. Needs our scheduler.
            classifier_scale: factor of its gradient; 1 is Bayes' rule.

        Returns:
            `.images` and `.nfe`.

        Raises ValueError for arguments that don't fit the model, before any work.
        """
        self._interrupt = False
        call = self._for_one_call()
        scheduler = call.scheduler
        labels = call.prepare_labels(class_labels, batch_size, classifier)
        if image is not None:
            image = call.prepare_image(image)
        if batch_size is None:
            batch_size = next((len(given) for given in (labels, latents, image) if given is not None), 1)
        callback_inputs = call.callback_inputs(callback_on_step_end, callback_on_step_end_tensor_inputs)
        call.check_inputs(batch_size, generator, output_type, callback_inputs)
        network = call.guided_network(
            batch_size, labels, guidance_scale, guider, weaker_network, classifier, classifier_scale
        )
        if num_inference_steps is None:
            call.check_adaptive(rtol, atol, adaptive_solver)
            if guider is not None:
                raise ValueError("a guider counts steps: pass num_inference_steps with it, not None")
        elif rtol is not None or atol is not None:
            raise ValueError(
                f"rtol={rtol}, atol={atol} are for adaptive solvers: pass num_inference_steps=None with them"
            )

        t_start = None
        if image is not None:
            call.check_own_scheduler("image needs")
            if not 0 < strength <= 1:
                raise ValueError(f"strength {strength} must lie in (0, 1]")
            if len(image) not in (1, batch_size):
                raise ValueError(f"{len(image)} images were given for batch_size {batch_size}")
            image = call._check_data(image, None).expand(batch_size, -1, -1, -1)
            t_start = scheduler.t_min + strength * (scheduler.t_max - scheduler.t_min)

        noise = call.prepare_noise(batch_size, generator, latents)
        if num_inference_steps is None:
            latents, nfe = call.sample_adaptively(
                network, noise, rtol, atol, adaptive_solver, generator, image, t_start
            )
        else:
            if image is None:
                scheduler.set_timesteps(num_inference_steps, device=noise.device)
                latents = noise * scheduler.init_noise_sigma
            else:
                scheduler.set_timesteps(num_inference_steps, device=noise.device, t_start=t_start)
                latents = scheduler.add_noise(image, noise, scheduler.timesteps[:1])
            latents, nfe = call.sample_in_steps(network, latents, generator, callback_on_step_end, callback_inputs)

        images = self.finish(latents, output_type)
        return ScoreSDEPipelineOutput(images=images, nfe=nfe) if return_dict else (images,)

    def prepare_noise(self, batch_size, generator, latents):
        """The noise that sampling starts from: the latents given, or drawn from the generator."""
        shape = self.sample_shape(batch_size)
        if latents is None:
            # half precision is for the network only
            return randn_tensor(shape, generator=generator, device=self._execution_device, dtype=torch.float32)
        if tuple(latents.shape) != shape:
            raise ValueError(f"latents has shape {tuple(latents.shape)}; this model needs {shape}")
        if not torch.isfinite(latents).all():
            raise ValueError("latents holds values that are not finite (nan, infinite)")
        return latents.to(self._execution_device)

    def sample_in_steps(
        self, network, latents, generator, callback=None, callback_inputs=(), entries=None, after_step=None
    ):
        """Carry samples along the timesteps that the scheduler has planned.

        Args:
            network: as `guided_network` returns it.
            callback, callback_inputs: callback_on_step_end and its tensor inputs.
            entries: the entries of the scheduler's timesteps in the order in which they run, by default all in turn.
            after_step: f(latents, entry, next entry or None) -> latents, called after every step.

        Returns the samples at the end, and the number of network evaluations.
        """
        scheduler, channels = self.scheduler, latents.shape[1]
        step_kwargs = {}
        if "generator" in inspect.signature(scheduler.step).parameters:
            step_kwargs["generator"] = generator
        # stock schedulers either use a learned variance or cannot take its channels
        takes_variance = "learned" in str(scheduler.config.get("variance_type"))
        entries = list(range(len(scheduler.timesteps)) if entries is None else entries)
        self._num_timesteps, nfe = len(entries), 0
        for i, entry, following in zip(
            range(len(entries)), self.progress_bar(entries), [*entries[1:], None], strict=True
        ):
            if self.interrupt:
                break
            timestep, nfe = scheduler.timesteps[entry], i + 1
            model_input = scheduler.scale_model_input(latents, timestep)
            output = network(model_input, timestep.expand(len(latents)))
            if not takes_variance:
                output = output[:, :channels]
            latents = scheduler.step(output, timestep, latents, **step_kwargs).prev_sample
            if after_step is not None:
                latents = after_step(latents, entry, following)
            if callback is not None:
                values = {"latents": latents, "prompt_embeds": self._conditions}
                values |= callback(self, i, timestep, {name: values[name] for name in callback_inputs}) or {}
                latents, self._conditions = values["latents"], values["prompt_embeds"]
        return latents, nfe

    def finish(self, latents, output_type):
        """What `__call__` returns as images."""
        images = latents
        if output_type != "latent":
            images = self.image_processor.postprocess(self.decode(latents), output_type=output_type)
        self.maybe_free_model_hooks()
        return images
