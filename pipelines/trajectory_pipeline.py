"""Ways between noise and data: along the scheduler's time steps, by solvers that choose their own, and back from data
to noise, for encodings and likelihoods."""

import inspect
import warnings
from contextlib import contextmanager
from dataclasses import replace

import torch

from .adaptive import probability_flow, reverse_sde
from .denoising_pipeline import DenoisingPipeline
from .likelihood import Likelihood, dequantized, log_likelihood
from .protocols import Denoiser, GuidedNetwork
from .units import log_scale
from .wording import check_choice


# solver, rtol and atol of every adaptive_solver
ADAPTIVE = {"ode": (probability_flow, 1e-3, 1e-3), "sde": (reverse_sde, 0.02, 2 / 256)}


class TrajectoryPipeline(DenoisingPipeline):
    """What comes from noise to samples, or back: `ScoreSDEPipeline` and `ScoreSDEInversePipeline` are both."""

    def sample_in_steps(
        self,
        network: GuidedNetwork,
        latents: torch.Tensor,
        generator,
        callback=None,
        callback_inputs=(),
        entries=None,
        after_step=None,
    ) -> tuple[torch.Tensor, int]:
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
        entries = list(range(getattr(scheduler, "nfe", len(scheduler.timesteps))) if entries is None else entries)
        ends = getattr(scheduler, "timesteps_to", None)
        self._num_timesteps, nfe = len(entries), 0
        for i, entry, following in zip(
            range(len(entries)), self.progress_bar(entries), [*entries[1:], None], strict=True
        ):
            if self.interrupt:
                break
            timestep, nfe = scheduler.timesteps[entry], i + 1
            self._timestep_to = None if ends is None else ends[entry]
            model_input = scheduler.scale_model_input(latents, timestep)
            output = network(model_input, timestep.expand(len(latents)))
            if not takes_variance:
                output = output[:, :channels]
            latents = scheduler.step(output, timestep, latents, **step_kwargs).prev_sample
            if after_step is not None:
                latents = after_step(latents, entry, following)
            if callback is not None:
                latents = self.call_back(callback, callback_inputs, i, timestep, latents)
        self._timestep_to = None
        return latents, nfe

    def default_steps(self) -> int:
        """The time steps of a call that says nothing of them."""
        config = self.scheduler.config
        return 50 if config.get("network_map") is None else config["map_steps"]

    def check_adaptive(self, rtol, atol, adaptive_solver):
        """Raise ValueError for what an adaptive solver can't do."""
        check_choice("adaptive_solver", adaptive_solver, ADAPTIVE)
        self.check_own_scheduler("adaptive solvers need")
        self.check_denoises("adaptive solvers, encodings and likelihoods need", in_steps=False)
        if any(each is not None and each <= 0 for each in (rtol, atol)):
            raise ValueError(f"rtol={rtol} and atol={atol} must be positive")
        if self.domain is not None and adaptive_solver != "ode":
            raise ValueError(
                f"adaptive_solver {adaptive_solver!r} has no meaning on domain {self.domain.name!r}: 'ode'"
            )

    def sample_adaptively(
        self, network: GuidedNetwork, noise, rtol, atol, adaptive_solver, generator, image=None, t_start=None
    ) -> tuple[torch.Tensor, int]:
        """The sample that an adaptive solver reaches from noise, or from an image with noise at t_start; and the number
        of network evaluations."""
        scheduler, nfe = self.scheduler, 0
        bar, t_max, t_min = self.progress_bar(total=1.0), scheduler.t_max, scheduler.t_min
        x = noise * scheduler.init_noise_sigma
        if image is not None:
            t_max = t_start
            time = torch.tensor(t_start, dtype=torch.float64)
            x = scheduler.path.sample(image, noise, time)
            if self.domain is not None:
                x = self.domain.perturb(image, scheduler.path.sigma(time), noise)

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
        return x if self.domain is None else self.domain.wrap(x), nfe

    @staticmethod
    def _with_progress(bar, denoise: Denoiser, begin: float, end: float) -> Denoiser:
        """f(x, t) that moves the bar to the share of the way from begin to end that the slowest sample has come."""

        def reporting(x, t):
            share = ((torch.as_tensor(t).cpu().double() - begin) / (end - begin)).min()
            bar.n = max(bar.n, round(float(share), 3))
            bar.refresh()
            return denoise(x, t)

        return reporting

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
    def _towards_noise(self, images, samples, class_labels, guidance_scale, rtol, atol, conditions):
        """(x, denoise) for the way from data to noise, with a progress bar."""
        self.set_size_of(images, samples)
        x = self.check_data(images, samples)
        self.check_adaptive(rtol, atol, "ode")
        network = self.guided_network(len(x), class_labels, guidance_scale, conditions=conditions)
        denoise, ends = self.scheduler.denoiser(network, limited=False), (self.scheduler.t_min, self.scheduler.t_max)
        with self.progress_bar(total=1.0) as bar:
            yield x, self._with_progress(bar, denoise, *ends)

    @torch.no_grad()
    def encode(
        self,
        images=None,
        samples=None,
        class_labels=None,
        guidance_scale=1.0,
        rtol=1e-5,
        atol=1e-5,
        latents=None,
        conditions=None,
    ) -> torch.Tensor:
        """The noise that the probability-flow ODE carries samples to: their encoding, unique for the data's
        distribution (Song et al. 2021, section 4.3 and appendix D.5). Needs torchdiffeq.

        `pipe(latents=noise, num_inference_steps=None, rtol=..., atol=...)` leads back; with a scheduler that has
        denoise_final=False exactly, up to the tolerances. Codes can be interpolated (`slerp`), or scaled to change the
        temperature.

        Args:
            images: (B, channels, height, width) in [-1, 1], other than `image` of `__call__`, of any size that the
                network can have; or
            samples: clean samples of what the network generates (for a model of pixels the same as images).
            class_labels, guidance_scale, conditions: as for `__call__`.
            rtol, atol: tolerances of the ODE's solution.
            latents: old name of samples.

        Returns noise (B, C, H, W) of unit variance; on a domain, points of it.
        """
        call, samples = self._for_one_call(), self._renamed(samples, latents)
        scheduler = call.scheduler
        with call._towards_noise(images, samples, class_labels, guidance_scale, rtol, atol, conditions) as (x, denoise):
            noise = probability_flow(scheduler.path, denoise, x, scheduler.t_min, scheduler.t_max, rtol, atol)
        return noise / scheduler.init_noise_sigma if call.domain is None else call.domain.wrap(noise)

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
        conditions=None,
        dequantization=None,
    ) -> Likelihood:
        """The exact log-likelihood of samples under the model's probability-flow ODE (Song et al. 2021, section 4.3).
        Needs torchdiffeq.

        For a model of pixels it is the density of the images in [-1, 1]; `.bits_per_dim()` of the result is that of the
        whole numbers 0 to 255 which `dequantize` made them from. For a latent model it is the density of the normalised
        latents, the likelihood of the images being unknown. For a model with a `data_std`, of data in their own units
        it is the density in these, and of `samples` that of what the network sees; on a domain the density by its own
        volume: area, on a sphere. All are at the scheduler's t_min: choose it as small as the network was trained.

        Args:
            images: (B, channels, height, width) in [-1, 1], other than `image` of `__call__`, of any size that the
                network can have; or
            samples: clean samples of what the network generates (for a model of pixels the same as images).
            class_labels: a label or name per sample, for the likelihood given the class; by default, that without.
            guidance_scale, conditions: as for `__call__`; a scale of 1 is the model's own distribution.
            trace, num_probes, generator: of the divergence's estimate: see `likelihood.log_likelihood`.
            rtol, atol: tolerances of the ODE's adaptive solution.
            steps: instead, number of RK4 steps of four evaluations each.
            latents: old name of samples.
            dequantization: None for images that are samples of a density already; or how noise is added to images of
                whole numbers, as n / 127.5 - 1, for a bound in `.bits_per_dim()` of the result: uniform, as
                `likelihood.dequantize` has it, or truncated_normal, that of t_min cut to the number's bin. For models
                of pixels.

        Returns a `likelihood.Likelihood`.
        """
        call, samples = self._for_one_call(), self._renamed(samples, latents)
        scheduler, entropy = call.scheduler, None
        if dequantization is not None and (call.vae or call.domain or call.units["data_std"]):
            raise ValueError(f"dequantization {dequantization!r} is of the images of a model of pixels: leave it out")
        with call._towards_noise(images, samples, class_labels, guidance_scale, rtol, atol, conditions) as (x, denoise):
            if dequantization is not None:
                x, entropy = dequantized(x, dequantization, scheduler.path, scheduler.t_min, generator)
            found = log_likelihood(
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
                call.domain,
            )
        # the same distribution, in other units
        change = log_scale(x.shape[1:], call.units) if samples is None else 0.0
        return replace(found, log_prob=found.log_prob - change, entropy=entropy)

    def prepare_trajectories(
        self, num_samples, class_labels=None, guidance_scale=1.0, generator=None, noise=None, conditions=None
    ):
        """(network, noise) for `ScoreSDEScheduler.calibrate`: the guided network of these classes, by default all in
        turn, and other conditions, and noise (num_samples, C, H, W) for it."""
        if noise is None:
            noise = self.kind.noise(num_samples, generator, self._execution_device)
        if class_labels is None and self.num_classes is not None:
            class_labels = [i % self.num_classes for i in range(len(noise))]
        network = self.guided_network(len(noise), class_labels, guidance_scale, conditions=conditions)
        return network, noise.to(self._execution_device)
