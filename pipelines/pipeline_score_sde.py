"""Generation of images or signals, unconditional or by classes and other conditions, in the data themselves or in the
latent space of an autoencoder."""

from collections.abc import Sequence

import torch

from .adapters import AdapterMixin  # noqa: F401
from .adaptive import probability_flow  # noqa: F401 (diffusers copies the files that this one names, and no further)
from .bundle_files import read_config  # noqa: F401
from .bundling import BundleMixin  # noqa: F401
from .calls import CallMixin  # noqa: F401
from .carried_code import write_code  # noqa: F401
from .conditions import expand
from .coordinates import Coordinates  # noqa: F401
from .denoising_pipeline import ScoreSDEPipelineOutput
from .guidance import guided  # noqa: F401
from .image_conditions import at_size  # noqa: F401
from .images import to_mode  # noqa: F401
from .kinds import kind_of  # noqa: F401
from .latents import normalize_latents  # noqa: F401
from .likelihood import log_likelihood  # noqa: F401
from .operators import LinearOperator  # noqa: F401
from .pictures import save_grid  # noqa: F401
from .prompts import encode  # noqa: F401
from .protocols import Generators
from .scatter import save_scatter  # noqa: F401
from .sounds import save_wav  # noqa: F401
from .trajectory_pipeline import TrajectoryPipeline
from .units import UNITS  # noqa: F401
from .wording import quoted  # noqa: F401
from .writing import whole_file  # noqa: F401


class ScoreSDEPipeline(TrajectoryPipeline):
    """Sample images from a score-based diffusion model; or signals and sound, where the network has one axis, or videos
    and other volumes, where it has three: see `kinds.kind_of`.

    Args:
        scheduler: a `ScoreSDEScheduler`, or a stock diffusers scheduler of the same noise path.
        transformer: a `DiTModel` or diffusers' `DiTTransformer2DModel`; or
        unet: a `ScoreUNetModel` or diffusers' `UNet2DModel`: exactly one of the two.
        vae: an autoencoder of diffusers whose latents the network was trained on; None for a model of pixels.
        id2label: {label: class name}, so that classes can be asked for by name.
        text_encoder, tokenizer, prompt_settings: for a network that follows words: see `DenoisingPipeline`.
        condition_from: for a network that sees an image beside the sample: see `DenoisingPipeline`.
        sampling_rate, frame_rate: for a network of sound, and of videos: see `DenoisingPipeline`.

    Calls may run in several threads on one pipeline: each works on its own copy of the scheduler, which after a call is
    as it was before (the number of network evaluations is `.nfe` of the output). Not so with feature caches
    (`enable_cache`), offloading, and guiders that hook the network: these change the network while it runs.
    """

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int | None = None,
        class_labels=None,
        guidance_scale: float = 1.0,
        num_inference_steps: int | str | None = "auto",
        generator: Generators = None,
        latents: torch.Tensor | None = None,
        output_type: str | None = None,
        return_dict: bool = True,
        callback_on_step_end=None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        rtol: float | None = None,
        atol: float | None = None,
        adaptive_solver: str = "ode",
        image=None,
        strength: float = 0.6,
        guider=None,
        weaker_network=None,
        classifier=None,
        classifier_scale: float = 1.0,
        conditions: dict[str, torch.Tensor] | None = None,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        prompt_embeds: torch.Tensor | None = None,
        prompt_attention_mask: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        negative_prompt_attention_mask: torch.Tensor | None = None,
        condition_image=None,
        height: int | None = None,
        width: int | None = None,
    ):
        """Generate images.

        Args:
            batch_size: number of images; by default as many as labels, prompts, conditions, latents or images are
                given. A single one is for all.
            class_labels: a label or class name, or one per image, as a list, tensor or array; None for unconditional
                generation.
            guidance_scale: classifier-free guidance (Ho & Salimans 2022), on every channel: 1 is none, larger values
                follow the class more closely at the cost of variety.
            num_inference_steps: time steps; the number of network evaluations is `.nfe` of the output. "auto": 50, or
                as many as a flow map or consistency model was made for, map_steps of the scheduler.
                None leaves the steps to an adaptive solver, which needs our scheduler and takes only the path and the
                final denoising from it; of a flow map it needs rtol or atol, and is the same as "auto" without.
            generator: source of all noise; with a list of one per image, an image depends on its own seed only.
            latents: the standard normal noise to start from, (batch, channels, height, width), of signals (batch,
                channels, length), of videos (batch, channels, frames, height, width), instead of drawing it; on a
                domain, points of it.
            output_type: of images pil, the default; np: float (batch, height, width, channels) in [0, 1]; pt: float
                (batch, channels, height, width) in [0, 1]. Of videos the same with frames after the batch: lists of PIL
                images, (batch, frames, height, width, channels), (batch, frames, channels, height, width). Of signals,
                sound and other volumes np, the default, or pt: (batch, channels, ...), in the units of the training
                data. latent: what the network generates, undecoded.
            return_dict: return a `ScoreSDEPipelineOutput` instead of the tuple (images,).
            callback_on_step_end: called as f(pipeline, step, timestep, {"latents": ...}) after every network
                evaluation, or one of `diffusers.callbacks`; a dict that it returns may replace what it was given.
                `pipeline` is the call's own view of this one: `pipeline.scheduler` its scheduler, `num_timesteps`,
                `guidance_scale`; what it sets as `pipeline._guidance_scale` holds from then on, and
                `pipeline._interrupt = True` ends the sampling. Adaptive solvers don't call it.
            callback_on_step_end_tensor_inputs: what it is given: "latents" (the samples so far), and conditions by
                their names, such as "class_labels": what the network is told (2, batch, ...), what guidance leads away
                from first; with the last row alone, (1, batch, ...), there is no guidance from then on.
                "prompt_embeds", as callbacks of diffusers have it, is the first of them: the labels.
            rtol, atol: tolerances of the adaptive solver; by default both 1e-3 for "ode", 0.02 and 2 / 256 for "sde".
            adaptive_solver: "ode", Dormand-Prince 5(4) on the probability-flow ODE (needs torchdiffeq), or "sde", the
                adaptive solver of the reverse SDE of Jolicoeur-Martineau et al. 2021.
            image: begin with this image under noise instead of with noise alone (SDEdit, Meng et al. 2022): a PIL
                image of any mode, an array (height, width, channels) or tensor (channels, height, width) in [0, 1], or
                a batch or list of them; one, or one per image to generate. A video is a list of these, or with frames
                first; a signal or sound an array or tensor (channels, length), or a batch or list. Needs our scheduler.
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
            conditions: what else the network takes, {argument of its forward: tensor (B, ...)}, such as
                encoder_hidden_states; one element per image, or one for all. guidance_scale leads away from what the
                network's `null_conditions` has in their place.
            prompt: words that a network with a text encoder follows, a text or one per image; an empty one is none.
            negative_prompt: words that guidance leads away from, instead of none; a text or one per image.
            prompt_embeds, negative_prompt_embeds: instead, sequences that were encoded before, (B, S, width), with
                prompt_attention_mask, negative_prompt_attention_mask (B, S) of what counts, by default all.
            condition_image: what the network sees beside the sample, such as a small image to enlarge, one in grey, or
                a mask, as it was trained: a PIL image, an array or tensor in [0, 1], or a batch or list of them, one,
                or one per image. See `encode_condition`.
            height, width: of the images in pixels; by default those of the network's sample_size. Multiples of its
                patch, or of what a U-Net halves away, times the factor of the autoencoder.

        Returns:
            `.images` and `.nfe`.

        Raises ValueError for arguments that don't fit the model, before any work.
        """
        self._interrupt = False
        call = self._for_one_call()
        call.set_size(height, width)
        scheduler = call.scheduler
        if condition_image is not None:
            conditions = call.add_condition_image(conditions, condition_image)
        conditions = call.add_prompt(conditions, "prompt", prompt, prompt_embeds, prompt_attention_mask)
        negative = call.add_prompt(
            None, "negative_prompt", negative_prompt, negative_prompt_embeds, negative_prompt_attention_mask
        )
        conditions = call.prepare_conditions(class_labels, conditions, batch_size, classifier)
        if image is not None:
            image = call.prepare_image(image)
        if batch_size is None:
            given = (*conditions.values(), latents, image)
            batch_size = next((len(each) for each in given if each is not None and len(each) != 1), 1)
        is_map = scheduler.config.get("network_map") is not None
        if num_inference_steps == "auto" or num_inference_steps is rtol is atol is None and is_map:
            num_inference_steps = call.default_steps()
        callback_inputs = call.callback_inputs(callback_on_step_end, callback_on_step_end_tensor_inputs)
        call.check_inputs(batch_size, generator, output_type, callback_inputs, conditions)
        network = call.guided_network(
            batch_size, None, guidance_scale, guider, weaker_network, classifier, classifier_scale, conditions, negative
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
            image = expand(call.check_data(image, None), batch_size)
            t_start = scheduler.t_min + strength * (scheduler.t_max - scheduler.t_min)

        noise = call.prepare_noise(batch_size, generator, latents, begins=image is None)
        if num_inference_steps is None:
            latents, nfe = call.sample_adaptively(
                network, noise, rtol, atol, adaptive_solver, generator, image, t_start
            )
        else:
            told = call.told_of_guidance(guidance_scale, guider, classifier)
            if image is None:
                scheduler.set_timesteps(num_inference_steps, device=noise.device, **told)
                latents = noise * scheduler.init_noise_sigma
            else:
                scheduler.set_timesteps(num_inference_steps, device=noise.device, t_start=t_start, **told)
                latents = scheduler.add_noise(image, noise, scheduler.timesteps[:1])
            latents, nfe = call.sample_in_steps(network, latents, generator, callback_on_step_end, callback_inputs)

        call._end_call()
        images = self.finish(latents, output_type)
        return ScoreSDEPipelineOutput(images=images, nfe=nfe, **self.rates) if return_dict else (images,)
