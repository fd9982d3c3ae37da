"""Inverse problems: images from a linear measurement of them, by an unconditional (or class-conditional) model."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers.utils.torch_utils import randn_tensor

from .adapters import AdapterMixin  # noqa: F401
from .adaptive import check_finite, rms
from .bundle_files import read_config  # noqa: F401 (diffusers copies the files that this one names, and no further)
from .bundling import BundleMixin  # noqa: F401
from .calls import CallMixin  # noqa: F401
from .carried_code import write_code  # noqa: F401
from .conditions import null_conditions  # noqa: F401
from .coordinates import Coordinates  # noqa: F401
from .denoising_pipeline import ScoreSDEPipelineOutput
from .guidance import guided  # noqa: F401
from .image_conditions import at_size  # noqa: F401
from .images import to_mode  # noqa: F401
from .kinds import kind_of  # noqa: F401
from .latents import normalize_latents  # noqa: F401
from .likelihood import log_likelihood  # noqa: F401
from .operators import LinearOperator, conjugate_gradients
from .pictures import save_grid  # noqa: F401
from .prompts import encode  # noqa: F401
from .protocols import Generators
from .scatter import save_scatter  # noqa: F401
from .sounds import save_wav  # noqa: F401
from .trajectory_pipeline import TrajectoryPipeline
from .units import UNITS  # noqa: F401
from .wording import check_choice
from .writing import whole_file  # noqa: F401


@dataclass
class ScoreSDEInversePipelineOutput(ScoreSDEPipelineOutput):
    """Output of `ScoreSDEInversePipeline`: images and nfe as of `ScoreSDEPipeline`, and

    residual: (B,), root mean square of the difference between the measurement of each image and the one given.
    """

    residual: torch.Tensor | None = None


METHODS = ("pigdm", "tmpd", "dps", "replacement", "repaint")


class ScoreSDEInversePipeline(TrajectoryPipeline):
    r"""Sample images x0 given a measurement y = A x0 + noise_std n, with standard normal noise n.

    A is a `LinearOperator`: `inpainting`, `colourisation`, `super_resolution`, `deblurring` (`pipelines.operators`), or
    any pair of functions. The same components as `ScoreSDEPipeline`, whose folders it opens; the scheduler is ours. Any
    of its samplers may be used; where a paper has its own, it is named.

    Methods, with D the denoised sample (the network's estimate of x0) and J its derivative by x_t:

    - pigdm (Song et al. 2023, "Pseudoinverse-guided diffusion models"): the likelihood of x_t as if x0 | x_t were
      normal around D with the variance r^2 that data of standard deviation `data_std` would have; its gradient counts
      by r^2 instead of (sigma / alpha)^2 (`adaptive_weight`), without which the strongest directions of real data are
      corrected many times over. Any sampler, adaptive ones too. One backward pass an evaluation.
    - tmpd (Boys et al. 2024, "Tweedie moment projected diffusions"): the same with the covariance that the model itself
      has, sigma^2 / alpha J, and no weight. Any sampler. Exact for Gaussian data. A backward pass for each step of
      conjugate gradients.
    - dps (Chung et al. 2023, "Diffusion posterior sampling"): after every step, a step of length `step_size` down the
      gradient of |y - A D|. The paper's sampler: predictor="ancestral", 1000 steps. One backward pass an evaluation.
      The only one for latent models: A then measures the decoded images.
    - replacement (Song et al. 2021, appendix I): after every step, what is known of the sample is replaced by the
      measurement under the noise of that time. The paper's sampler: predictor="reverse_diffusion",
      corrector="langevin", corrector_position="before", 1000 steps. No backward pass.
    - repaint (Lugmayr et al. 2022): replacement; and every `jump_length` time steps, `resamplings` - 1 times back by as
      many, so that the rest of the image comes to fit. The paper's sampler: predictor="ancestral", 250 steps.

    How far each is from the exact posterior of Gaussian data stands in benchmarks/README.md. Threads: as for
    `ScoreSDEPipeline`.
    """

    @torch.no_grad()
    def __call__(
        self,
        operator: LinearOperator,
        measurement: torch.Tensor,
        method: str = "pigdm",
        noise_std: float = 0.0,
        batch_size: int | None = None,
        class_labels=None,
        guidance_scale: float = 1.0,
        num_inference_steps: int | None = 100,
        generator: Generators = None,
        latents: torch.Tensor | None = None,
        output_type: str | None = None,
        return_dict: bool = True,
        callback_on_step_end=None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        data_std: float | None = None,
        adaptive_weight: bool = True,
        cg_steps: int = 5,
        step_size: float = 1.0,
        jump_length: int = 10,
        resamplings: int = 10,
        rtol: float | None = None,
        atol: float | None = None,
        adaptive_solver: str = "ode",
        conditions: dict[str, torch.Tensor] | None = None,
        height: int | None = None,
        width: int | None = None,
    ):
        """Sample images given their measurement.

        Args:
            operator: the measurement of images in [-1, 1].
            measurement: y, (B, ...) of the shape that the operator returns: one, or one per image.
            method: pigdm, tmpd, dps, replacement, or repaint: see the class.
            noise_std: standard deviation of the measurement's noise, for all but dps.
            batch_size: number of images; by default as many as measurements, labels, conditions or latents are given.
            class_labels, guidance_scale, generator, latents, output_type, return_dict, callback_on_step_end,
            callback_on_step_end_tensor_inputs, conditions: as for `ScoreSDEPipeline`; what a network is told of words
            are conditions, too: conditions=pipe.encode_prompt("a red hat"), and so is an image that it sees beside the
            sample: conditions=pipe.encode_condition(image).
            num_inference_steps: time steps; None leaves them to an adaptive solver (pigdm and tmpd), with rtol, atol
                and adaptive_solver as for `ScoreSDEPipeline`.
            data_std: of pigdm: standard deviation of the data; by default sigma_data of the scheduler's config.
            adaptive_weight: of pigdm: the paper's weight; False is Bayes' rule, exact for data that are independent and
                normal with data_std in every dimension.
            cg_steps: of tmpd: largest number of steps of conjugate gradients.
            step_size: of dps, for each step.
            jump_length, resamplings: of repaint, in time steps.
            height, width: of the images that were measured, in pixels, as for `ScoreSDEPipeline`.

        Returns:
            `.images`, `.nfe` and `.residual`.

        Raises ValueError for arguments that don't fit the model or each other, an operator that isn't linear or whose
        adjoint is wrong, a measurement of another shape, range or with NaN, all before any work; FloatingPointError
        where the network's output is not finite.
        """
        check_choice("method", method, METHODS)
        self._interrupt = False
        call = self._for_one_call()
        call.set_size(height, width)
        scheduler = call.scheduler
        call.check_own_scheduler("inverse problems need")
        if call.vae is not None and method != "dps":
            raise ValueError(
                f"method {method!r} needs a model of pixels: what an autoencoder decodes is not linear in the latents. "
                f"Pass method='dps', or use a model of pixels"
            )
        conditions = call.prepare_conditions(class_labels, conditions, batch_size)
        if batch_size is None:
            given = (*conditions.values(), latents, measurement)
            batch_size = next((len(each) for each in given if each is not None and len(each) != 1), 1)
        callback_inputs = call.callback_inputs(callback_on_step_end, callback_on_step_end_tensor_inputs)
        call.check_inputs(batch_size, generator, output_type, callback_inputs, conditions)
        positive = {"data_std": data_std, "cg_steps": cg_steps, "step_size": step_size, "jump_length": jump_length}
        wrong = {name: value for name, value in positive.items() if value is not None and not value > 0}
        if wrong or resamplings < 1 or not noise_std >= 0:
            raise ValueError(
                f"{wrong or ''} resamplings {resamplings} and noise_std {noise_std}: all must be positive, noise_std 0 "
                f"or more"
            )
        if num_inference_steps is None:
            if method not in ("pigdm", "tmpd"):
                raise ValueError(
                    f"method {method!r} needs num_inference_steps: adaptive solvers are for pigdm and tmpd"
                )
            call.check_adaptive(rtol, atol, adaptive_solver)
        if call.domain is not None:
            raise ValueError(f"inverse problems are solved in flat space, not on domain {call.domain.name!r}")
        if method in ("pigdm", "tmpd", "dps"):
            call.check_denoises(f"method {method!r} needs", in_steps=num_inference_steps is not None)
        y = call._check_measurement(operator, measurement, batch_size, noise_std)
        network = call.guided_network(batch_size, None, guidance_scale, conditions=conditions)
        noise = call.prepare_noise(batch_size, generator, latents)

        of_samples, y_of_samples = (operator, y) if method == "dps" else call._of_samples(operator, y)
        problem = _Problem(call, of_samples, y_of_samples, noise_std, generator)
        after_step = entries = None
        if num_inference_steps is not None:
            told = call.told_of_guidance(guidance_scale)
            scheduler.set_timesteps(num_inference_steps, device=noise.device, **told)
        network = problem.checked(network) if num_inference_steps is None else problem.watched(network)
        if method in ("pigdm", "tmpd"):
            if method == "pigdm":
                known = scheduler.config.sigma_data if call.units["data_std"] is None else 1.0
                data_std = known if data_std is None else data_std
                steer = problem.pseudoinverse_guidance(data_std, adaptive_weight)
            else:
                steer = problem.tweedie_guidance(cg_steps)
            network = scheduler.steered(network, steer)
        elif method == "dps":
            network, after_step = problem.descent(network, step_size)
        else:
            problem.read_levels()
            after_step = problem.replace
            if method == "repaint":
                entries = problem.resampled(jump_length * scheduler.order, resamplings)

        if num_inference_steps is None:
            x, nfe = call.sample_adaptively(network, noise, rtol, atol, adaptive_solver, generator)
        else:
            x, nfe = call.sample_in_steps(
                network,
                noise * scheduler.init_noise_sigma,
                generator,
                callback_on_step_end,
                callback_inputs,
                entries,
                after_step,
            )
            problem.check_watched()
        residual = rms(y - operator(call.decode(x)))
        call._end_call()
        images = self.finish(x, output_type)
        if not return_dict:
            return (images,)
        return ScoreSDEInversePipelineOutput(images=images, nfe=nfe, **self.rates, residual=residual)

    def _of_samples(self, operator, y):
        """The operator on what the network sees, and its measurement, for one of data in units of their own."""
        if self.units["data_std"] is None:
            return operator, y

        def forward(x):
            return operator(self.decode(x)) - operator(self.decode(torch.zeros_like(x)))

        origin = self.decode(torch.zeros(self.sample_shape(len(y)), device=y.device))
        return LinearOperator(forward), y - operator(origin)

    def _check_measurement(self, operator, measurement, batch_size, noise_std):
        """The measurement, one per image, on the pipeline's device. Raises ValueError for what doesn't fit."""
        device = self._execution_device
        if not hasattr(operator, "pseudo_inverse"):
            raise ValueError(
                f"operator is a {type(operator).__name__}, not a LinearOperator: build it by pipelines.operators, or "
                f"as LinearOperator(forward, adjoint)"
            )
        if not torch.is_tensor(measurement) or not torch.is_floating_point(measurement):
            raise ValueError("measurement must be a floating-point tensor: operator(images), for images in [-1, 1]")
        if not torch.isfinite(measurement).all():
            raise ValueError("measurement holds values that are not finite")
        images = self.decode(torch.zeros(self.sample_shape(batch_size), device=device)).shape
        # not from the caller's generator: the check doesn't change what is drawn
        shape = operator.check(images, device, torch.Generator().manual_seed(0))
        if measurement.shape[1:] != shape[1:] or len(measurement) not in (1, batch_size):
            raise ValueError(
                f"measurement has shape {tuple(measurement.shape)}; of {batch_size} images of this model the operator "
                f"makes {tuple(shape)}"
            )
        if operator.value_range is not None and self.units["data_std"] is None:
            low, high = (float(each) for each in (measurement.min(), measurement.max()))
            least, largest = operator.value_range
            margin = 6 * noise_std + 1e-3 * (largest - least)
            if low < least - margin or high > largest + margin:
                raise ValueError(
                    f"measurement has values from {low:g} to {high:g}; of images in [-1, 1] this operator makes values "
                    f"from {least:g} to {largest:g}, and noise_std is {noise_std:g}"
                )
        return measurement.to(device, torch.float32).expand(batch_size, *shape[1:])


class _Problem:
    """What a measurement adds to sampling: the two guidances and `descent` to the network, `replace` to steps."""

    def __init__(self, pipeline, operator, y, noise_std, generator):
        self.pipeline, self.operator, self.y = pipeline, operator, y
        self.noise_std, self.generator = noise_std, generator
        self.shape = pipeline.sample_shape(len(y))
        self.scheduler, self.path = pipeline.scheduler, pipeline.scheduler.path
        # of every evaluation: whether its output is finite, and the timestep
        self.evaluations: list[tuple[torch.Tensor, torch.Tensor]] = []

    def watched(self, network):
        """The network, whose outputs `check_watched` looks at in the end: within a trajectory nobody waits for the
        device."""

        def call(model_input, timesteps):
            output = network(model_input, timesteps)
            self.evaluations.append((torch.isfinite(output).all(), timesteps[0]))
            return output

        return call

    def check_watched(self):
        """Raise FloatingPointError where an output of the network was not finite."""
        finite = [each for each, _ in self.evaluations]
        if finite and not bool(torch.stack(finite).all()):
            _, timestep = self.evaluations[torch.stack(finite).tolist().index(False)]
            t = float(self.scheduler.path_time(timestep.cpu()))
            raise FloatingPointError(f"the network's output is not finite near t = {t:g}")

    def checked(self, network):
        """The network, with an error where its output is not finite: adaptive solvers would not come to an end."""

        def call(model_input, timesteps):
            output = network(model_input, timesteps)
            check_finite(output, self.scheduler.path_time(timesteps))
            return output

        return call

    def _guidance(self, solve, weigh=None):
        """A steering function, as `ScoreSDEScheduler.steered` takes it, that adds to the score the gradient of
        log p(y | x_t), J^T A^T solve(y - A D, t, covariance), times weigh(t). covariance(v) = A sigma^2 / alpha J^T A^T
        v is that of the measurement, without its noise."""

        def steer(x, t, denoise):
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                denoised = denoise(x, t)

                def back(direction):
                    """J^T A^T direction."""
                    direction = self.operator.adjoint(direction, x.shape)
                    return torch.autograd.grad(denoised, x, direction, retain_graph=True)[0]

                def covariance(direction):
                    # J is symmetric where the model is a score
                    along = back(direction)
                    return self.operator(self.path.add_to_score(torch.zeros_like(along), along, t))

                gradient = back(solve(self.y - self.operator(denoised.detach()), t, covariance))
            if weigh is not None:
                gradient = self.path.expand_to(weigh(t), x) * gradient
            return self.path.add_to_score(denoised.detach(), gradient, t)

        return steer

    def pseudoinverse_guidance(self, data_std, adaptive_weight):
        """The steering function of pigdm."""

        def solve(error, t, _):
            variance = self.path.sigma(t) ** 2 * self.path.gaussian_gain(t, data_std)
            variance = self.path.expand_to(variance, error)
            # a number where the host knows that it is one
            variance = variance.flatten() if variance.ndim else float(variance)
            return self.operator.solve(error, self.shape, variance, self.noise_std**2)

        def weigh(t):
            # r^2 / (sigma / alpha)^2
            return self.path.alpha(t) ** 2 * self.path.gaussian_gain(t, data_std)

        return self._guidance(solve, weigh if adaptive_weight else None)

    def tweedie_guidance(self, cg_steps):
        """The steering function of tmpd."""

        def solve(error, t, covariance):
            return conjugate_gradients(lambda v: covariance(v) + self.noise_std**2 * v, error, iterations=cg_steps)

        return self._guidance(solve)

    def descent(self, network, step_size):
        """(network, after_step) of dps."""
        gradients = []

        def steer(x, t, denoise):
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                denoised = denoise(x, t)
                distance = (self.y - self.operator(self.pipeline.decode(denoised))).flatten(1).norm(dim=1)
                gradients[:] = torch.autograd.grad(distance.sum(), x)
            return denoised.detach()

        def after_step(x, entry, following):
            return x - step_size * gradients[0]

        return self.scheduler.steered(network, steer), after_step

    def read_levels(self):
        """Read the times and noise levels of all entries, once."""
        self.times = self.scheduler.path_time(self.scheduler.timesteps.cpu())[: self.scheduler.nfe]
        levels = self.path.alpha(self.times), self.path.sigma(self.times)
        self.levels = list(zip(*(each.tolist() for each in levels), strict=True))

    def _reached(self, entry):
        """(alpha, sigma, missing) of the sample after this entry: `missing` is the variance that its noise has beyond
        the measurement's own. The last entry leads to clean data."""
        alpha, sigma = self.levels[entry + 1] if entry + 1 < len(self.levels) else (1.0, 0.0)
        return alpha, sigma, sigma**2 - (alpha * self.noise_std) ** 2 / (self.operator.gram or 1.0)

    def replace(self, x, entry, following):
        """after_step of replacement; and of repaint, where the next entry may be an earlier one."""
        alpha, sigma, missing = self._reached(entry)
        # below the measurement's own noise, the model alone goes on
        if missing >= 0:
            known = alpha * self.y + math.sqrt(missing) * self.operator(self._noise(x))
            x = x + self.operator.pseudo_inverse(known - self.operator(x), x.shape)
        if following is not None and following <= entry:
            scale, std = self.levels[following]
            if sigma > 0:
                scale, std = map(float, self.path.transition(self.times[entry + 1], self.times[following]))
            x = scale * x + std * self._noise(x)
            self.scheduler.rewind(following)
        return x

    def _noise(self, x):
        return randn_tensor(x.shape, generator=self.generator, device=x.device, dtype=x.dtype)

    def resampled(self, jump_length, resamplings):
        """RePaint's order of the planned entries: every stretch of jump_length entries `resamplings` times, as long as
        the measurement is replaced at its end."""
        entries, order = list(range(self.scheduler.nfe)), []
        for begin in range(0, len(entries), jump_length):
            stretch = entries[begin : begin + jump_length]
            _, _, missing = self._reached(stretch[-1])
            order += stretch * (resamplings if missing >= 0 else 1)
        return order
