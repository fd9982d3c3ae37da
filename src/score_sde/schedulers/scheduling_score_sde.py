"""`ScoreSDEScheduler`: a diffusers scheduler over any noise path and a plan of solver stages.

This file is the interface that pipelines and training scripts meet. The noise mathematics is in `paths`, the solvers in
`solvers`, what a network's numbers mean in `parameterization`, the times of trajectories in `timetables`, their steps
in `trajectory`, times fitted to a model in `calibration`. What arguments may be is in `checks`, what they mean together
in `arguments`, what stock configs mean in `stock_configs`, how configs are kept in `saved_config`, and what else is
read of a stock scheduler in `stock_attributes`.
"""

import inspect
import math
import numbers
import os
import re
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput, logging
from diffusers.utils.torch_utils import randn_tensor

from .arguments import begin_std, check_config, given_options, time_told
from .calibration import calibrate, fitted
from .checks import LARGEST_NFE, NUMBERS, as_list, check_number
from .domain_trajectory import DomainTrajectory
from .domains import build_domain, listed
from .parameterization import Parameterization, per_sample, threshold
from .paths import DiscreteVPSDE, LinearSDE, build_path, expand_all, moved, shifted
from .saved_config import SavedConfig
from .solvers import ON_GIVEN_TIMES, PREDICTORS
from .sphere_kernel import heat_kernel  # noqa: F401 (diffusers copies the files that this one names, and no further)
from .stock_attributes import TABLES, stock_tables, why_not
from .stock_configs import check_boundary, not_of_the_path, of_network
from .timetables import (
    are_of_flow_pipelines,
    check_original,
    ends_of_sigmas,
    first_of,
    given_times,
    grid,
    shift_of,
    solver,
    stock_grid,
    told_ends,
    told_sigmas,
    told_timesteps,
)
from .trajectory import PlannedTrajectory, planned


logger = logging.get_logger(__name__)

# whether this code came out of a folder, where diffusers keeps such code
_CARRIED = __name__.startswith("diffusers_modules.")


@dataclass
class ScoreSDESchedulerOutput(BaseOutput):
    """Output of `ScoreSDEScheduler.step`.

    prev_sample: the sample at the next entry of the plan, the shape and dtype of the sample that went in.
    pred_original_sample: the denoised sample, an estimate of x0 (clipped or thresholded where configured).
    """

    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor | None = None


class ScoreSDEScheduler(SavedConfig):
    """Sample from a score-based diffusion model: reverse SDE, probability-flow ODE, predictor-corrector.

    The path (`sde_type` and its parameters) and the meaning of the network's output (`prediction_type`) are facts of
    the trained network; predictor, corrector and grid are free to choose at any time:
    `ScoreSDEScheduler.from_config(scheduler.config, predictor="heun")`. Samples are x_t = alpha x0 + sigma noise as the
    path has them: they are not rescaled. `num_inference_steps` counts time steps; `nfe`, the length of `timesteps`,
    counts network evaluations.

    | predictor | what it is for | order | evaluations a step | source |
    |---|---|---|---|---|
    | auto | the default: the best measured predictor and grid for the number of steps | | 1 | below |
    | rising_1, _2, _3, _4 | ODE with guidance: Adams whose order rises to 4 | 2, 2, 2, 3 | 1 | below |
    | adams_1, _2, _3, _4 | ODE: Adams in straight coordinates; _1 for few guided steps | 2, 3, 4, 5 | 1 | below |
    | dpmpp_3b | ODE, 5 to 9 steps: dpmpp_3m in a bounded variable | 3 | 1 | below |
    | dpmpp_2m, _3m | ODE, exponential multistep; SDE with eta | 2, 3 | 1 | Lu et al. 2022b; Xue et al. 2023 |
    | dpmpp_2s, _3s | the same, single-step | 2, 3 | 2, 3 | Lu et al. 2022a, 2022b |
    | unipc_1, _2, _3 | dpmpp with a free corrector; diffusers' UniPC | 2, 3, 4 | 1 | Zhao et al. 2023 |
    | deis_1, _2, _3 | ODE, multistep in the predicted noise | 1, 2, 3 | 1 | Zhang & Chen 2023 |
    | ddim | ODE, noise eta; diffusers' DDIM and, for eta = 0, Euler | 1 | 1 | Song et al. 2021b |
    | euler | ODE, Euler in t; flow matching's Euler | 1 | 1 | Song et al. 2021, Eq. 13 |
    | heun | ODE, trapezoid rule; with s_churn EDM's stochastic sampler | 2 | 2 | Karras et al. 2022 |
    | rk4 | ODE to high accuracy, classical Runge-Kutta | 4 | 4 | |
    | ancestral | DDPM's chain on any path; learned variance | | 1 | Ho et al. 2020 |
    | euler_maruyama | SDE with noise eta g | | 1 | Song et al. 2021, Eq. 6 |
    | reverse_diffusion | SDE, for Song's PC sampler | | 1 | Song et al. 2021, Eq. 46 |
    | none | a corrector alone: NCSN's annealed Langevin | | 0 | Song & Ermon 2019 |
    | flow_map | a network that is a flow map: its steps, with gamma noise between | | 1 | Kim et al. 2024 |
    | consistency | one that leads to data: re-noised to the next time, gamma 1 | | 1 | Song et al. 2023 |

    ODE is the probability-flow ODE, SDE the reverse SDE. With `eta` heun, rk4, dpmpp_2s and dpmpp_3s step to a lower
    level and add noise from there (ancestral sampling).

    `auto` takes a predictor and a logistic grid of lambda by the number of steps and by `guidance_scale` of
    `set_timesteps` (`solvers.AUTOMATIC`, `solvers.UNGUIDED`), whatever `timestep_spacing` says; on times that are given
    it takes rising_1, robust on most of them; or, where the scheduler was calibrated for a number of steps, what was
    found then (`calibrate`). adams and dpmpp_3b extrapolate past evaluations by polynomials in a variable that stays
    finite at clean data, so that their last step has the order of the others; adams does so with the velocity of flow
    matching, noise - x0, in the coordinates x / (alpha + sigma), sigma / (alpha + sigma), where data and noise have the
    same scale. Guided fields bend most at high noise: rising_1 to rising_4 are adams whose order, there 1 or 2 with a
    corrector, rises to 4 with lambda, the earlier the more steps there are. The rules were chosen by error on mixtures
    with known scores; benchmarks/README.md shows them on others.

    A network may be trained to lead along the ODE, `network_map`: a flow map from one time to another, or a consistency
    model, which leads to t_min. It is the same prediction of the same path: in the coordinates x / (alpha + sigma) the
    step of a flow map is that of ddim with the denoised sample that the network gives when it is told where to
    (`timesteps_to`). For such a network `auto` is the predictor of that name, in equal steps of sigma / (alpha +
    sigma). A flow map that is told its own time is an ordinary network, too, and takes every predictor.

    A corrector (`langevin` with Song's signal-to-noise rule, or `annealed_langevin`) adds `corrector_steps` evaluations
    to every step of any predictor. Samplers of the papers as settings:

    - DDPM: predictor="ancestral", as many steps as training had;
    - Song's PC sampler: predictor="reverse_diffusion", corrector="langevin", corrector_position="before", 1000 steps
      (corrector_snr=0.16 on ve; their code scales the step by 1 - beta on vp);
    - NCSN with step size epsilon: predictor="none", corrector="annealed_langevin", corrector_position="before",
      corrector_steps=100, corrector_snr=epsilon**0.5 / (2 * sigma_min), timestep_spacing="log_snr";
    - EDM's stochastic sampler: predictor="heun", timestep_spacing="karras", s_churn=40, s_tmin=0.05, s_tmax=50,
      s_noise=1.003. The trajectory begins at its first noise level, without churn there.

    In stock pipelines: `DDPMPipeline` and `DiTPipeline` start from unit noise and don't scale the network's input, so
    they fit the paths whose prior is standard normal (vp, subvp, cosine_vp, discrete_vp, linear) with any prediction
    type but edm; the pipelines of Stable Diffusion fit every path and type. `DiTPipeline` passes no generator to
    `step`, so its stochastic samplers draw from the global one.

    Args:
        num_train_timesteps: number of the network's training time steps; for discrete_vp, of noise levels.
        sde_type: vp, subvp, ve, cosine_vp, discrete_vp, edm, or linear.
        prediction_type: epsilon, sample (once original_sample), score, v_prediction, flow_prediction,
            inverted_flow_prediction (its negative, of Mochi and OmniGen), edm (preconditioned), edm_v_prediction
            (its negative, of Stable Video Diffusion), or edm_consistency (edm with a consistency model's scalings).
        predictor: see the table.
        predictor_kwargs: options of the predictor, {name: number}, as its row in `solvers.PREDICTORS` names them:
            eta and the s_... below, which may also be arguments of their own, and whatever a solver has for itself.
        eta: amount of noise: 0 to 1 for ddim, heun, rk4, dpmpp_2s and dpmpp_3s, 0 and above for euler_maruyama,
            dpmpp_2m, dpmpp_3m, dpmpp_3b and unipc; None for the predictor's own default, 1 for euler_maruyama, else 0.
        variance_type: what the network learned of the noise, which ancestral uses: fixed_small (the posterior's; also
            None), fixed_large (the transition's), or learned_range (between them, from a network with twice the
            channels, such as DiT). diffusers' fixed_small_log and fixed_large_log are the same; ancestral has no use
            for its "learned".
        s_churn, s_tmin, s_tmax, s_noise: of euler, heun, rk4, dpmpp_2s and dpmpp_3s, and refused elsewhere: noise
            added before the steps that begin at noise levels sigma / alpha from s_tmin to s_tmax (None: no limit)
            (Karras et al. 2022).
        corrector: None, langevin, or annealed_langevin.
        corrector_steps: Langevin steps with each predictor step.
        corrector_snr: signal-to-noise ratio r of the corrector's step size.
        corrector_position: "after" each predictor step but the last, to clean data, or "before" each.
        timestep_spacing: linspace, leading, trailing, to_zero, uniform, quadratic, karras, log_snr, logistic, beta,
            beta_sigmas, straight, karras_levels, or skipping, as `paths.time_grid` has them. Not used by auto.
        steps_offset: offset of the leading grid.
        open_end: the linspace and leading grids are those of one level more, without the last, as diffusers'
            DPM-Solver, UniPC, DEIS and SA-Solver have them.
        whole_levels: the linspace grid of discrete_vp is rounded to whole levels; otherwise sigma / alpha is
            interpolated between levels, as diffusers' Euler, Heun, LMS and KDPM2 do.
        rho: exponent of the karras grid.
        calibration: {number of steps: [predictor, times, what they were fitted with]}, written by `calibrate`, for
            auto.
        denoise_final: the last evaluation, at `t_min`, returns the denoised sample. False stops early: the sample at
            `t_min` with its noise, to which the last of given times leads, too.
        t_min: smallest time, in (0, 1); None for the path's own.
        t_max: largest time, in (0, 1]; None for 1, or a little less where alpha(1) = 0 and the predictor, grid or
            prediction type is singular there.
        beta_min, beta_max: of vp and subvp. sigma_min, sigma_max: of ve and edm; on discrete_vp the ends of the grids
            that the use_..._sigmas ask for. beta_start, beta_end, beta_schedule, trained_betas, rescale_betas_zero_snr,
            snr_shift_scale: of discrete_vp, as in diffusers; exact_zero_snr: the last level of
            rescale_betas_zero_snr has no signal at all, as with diffusers' DDIM and DDPM, instead of alpha = 2^-12, as
            with its Euler and DPM-Solver. None means the path's own default. On another path
            beta_schedule is "sde_type=..." in the config: a name at which the stock schedulers raise, to which their
            own betas would be another path.
        sigma_data: standard deviation of the data, for prediction type edm.
        preconditioned: prediction_type epsilon and v_prediction are those of diffusers' EDM schedulers, which is edm
            with the sign of either.
        time_input: what the network receives as time is time_scale q + time_offset, where q is "t", "sigma" (of
            x_t / alpha), "log_sigma" (its natural logarithm) or "atan_sigma". None for the path's own: t for all (with
            offset -1 on discrete_vp, which gives 0 to num_train_timesteps - 1), but log_sigma for edm.
        time_scale: None for num_train_timesteps with "t", a quarter of it with "log_sigma" (1000 times the c_noise of
            Karras et al.), 1 with "sigma" and "atan_sigma".
        time_offset: None for the path's own.
        clip_sample: clip the denoised sample to [-clip_sample_range, clip_sample_range]: for pixels only.
        thresholding: dynamic thresholding of the denoised sample (Saharia et al. 2022): the
            dynamic_thresholding_ratio-quantile of its magnitude, between 1 and sample_max_value, becomes 1.
        use_clipped_model_output: the noise that a clipped (or thresholded) sample stands for is worked out anew, as in
            DDIM's step with the argument of this name; False leaves the noise as the network had it, DDIM's default.
            None: nothing is clipped, whatever the flags say (CogVideoX).
        use_karras_sigmas, use_exponential_sigmas, use_lu_lambdas, use_beta_sigmas: diffusers' names of timestep_spacing
            "karras", "log_snr", "log_snr" and "beta_sigmas", which then lie between the ends of the grid that
            timestep_spacing names, or the path's with open_end, or sigma_max and sigma_min; at most one of them. On the
            linear path they are grids of sigma, after the shift, but with use_flow_sigmas of sigma / alpha.
        interpolation_type: "linear", or "log_linear": without one of these flags, n of n + 1 levels of log_snr.
        use_flow_sigmas, timestep_type: of a stock scheduler on the linear path, or ("continuous") on edm, whose betas
            are in the config for the way back.
        invert_sigmas: on the linear path, the network receives 1 - t and returns inverted_flow_prediction (Mochi).
        init_noise: standard deviation of the noise that sampling starts from: None for the path's prior, "sigma" for
            sigma(t_max), "unit_data" for that of data of unit variance with their noise.
        shift: of the grids, see `paths.shifted`: what SD3, FLUX and Wan call shift or flow_shift. The grid of auto
            moves half as far in lambda.
        use_dynamic_shifting: the shift comes with each trajectory, as `mu` of `set_timesteps`: e^mu, or mu itself with
            time_shift_type "linear" instead of "exponential".
        network_map: what the network was trained to be: None, a denoiser; flow_map, told a second time it leads there,
            and told its own it is a denoiser; consistency, it leads to t_min, whether it is told or not.
        map_steps: number of steps that such a network was made for, which pipelines take by themselves; None for 2.
        original_inference_steps: of a consistency model as diffusers' LCM and TCD schedulers have it: the grid is
            skipping, whatever timestep_spacing says, of this number of steps of training, of which `set_timesteps` may
            take another number or a part (strength); None for neither.
        shift_terminal: on the linear path, the time of the last evaluation, to which grids are stretched (LTX-Video).
            Not used by auto.
        domain: where samples (B, C, ...) live: None for flat space, torus (angles in radians in [-pi, pi)), box ([-1,
            1], reflected), sphere (unit vectors along axis 1), or of a product the number of entries of axis 1 by name,
            in their order, {"torus": 2, "flat": 1}. It goes with ve and prediction type score, a tangent vector, or
            epsilon, -sigma times that; sigma_min and sigma_max are by default the domain's. See `domains`.

    Raises ValueError at construction for every unknown or contradictory value, for every number out of its range
    (`checks.NUMBERS`, and the rows of `solvers.PREDICTORS`), and for options that the predictor doesn't have, with what
    is allowed.
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        sde_type: str = "vp",
        prediction_type: str = "epsilon",
        predictor: str = "auto",
        eta: float | None = None,
        variance_type: str | None = "fixed_small",
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float | None = None,
        s_noise: float = 1.0,
        corrector: str | None = None,
        corrector_steps: int = 1,
        corrector_snr: float = 0.16,
        corrector_position: str = "after",
        timestep_spacing: str = "linspace",
        steps_offset: int = 0,
        open_end: bool = False,
        rho: float = 7.0,
        calibration: dict | None = None,
        denoise_final: bool = True,
        t_min: float | None = None,
        t_max: float | None = None,
        beta_min: float | None = None,
        beta_max: float | None = None,
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        beta_start: float | None = None,
        beta_end: float | None = None,
        beta_schedule: str | None = None,
        trained_betas: list[float] | None = None,
        rescale_betas_zero_snr: bool = False,
        snr_shift_scale: float | None = None,
        sigma_data: float = 0.5,
        time_input: str | None = None,
        time_scale: float | None = None,
        time_offset: float | None = None,
        clip_sample: bool = False,
        clip_sample_range: float = 1.0,
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        predictor_kwargs: dict | None = None,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_lu_lambdas: bool = False,
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        time_shift_type: str = "exponential",
        shift_terminal: float | None = None,
        use_clipped_model_output: bool | None = True,
        use_beta_sigmas: bool = False,
        use_flow_sigmas: bool = False,
        invert_sigmas: bool = False,
        interpolation_type: str = "linear",
        whole_levels: bool = True,
        timestep_type: str = "discrete",
        preconditioned: bool = False,
        init_noise: str | None = None,
        exact_zero_snr: bool = False,
        network_map: str | None = None,
        map_steps: int | None = None,
        original_inference_steps: int | None = None,
        domain: str | dict | list | None = None,
    ):
        if trained_betas is not None:
            # an array or tensor, as a list: what a config can hold
            self.register_to_config(trained_betas=as_list("trained_betas", trained_betas))
            if len(self.config.trained_betas) != num_train_timesteps:
                logger.warning(
                    f"num_train_timesteps {num_train_timesteps} becomes {len(self.config.trained_betas)}, as many as "
                    f"trained_betas holds"
                )
                num_train_timesteps = len(self.config.trained_betas)
                self.register_to_config(num_train_timesteps=num_train_timesteps)
        if domain is not None:
            self.register_to_config(domain=listed(domain))
        check_config(type(self), self.config)
        if network_map is not None and map_steps is None:
            self.register_to_config(map_steps=2)

        unused = not_of_the_path(self.config)
        of_path = {name: value for name, value in self.config.items() if name not in unused}
        self.domain = None if domain is None else build_domain(self.config.domain, sigma_max)
        if self.domain is not None:
            of_path["sigma_min"] = sigma_min or self.domain.sigma_min
            of_path["sigma_max"] = sigma_max or self.domain.sigma_max
        self.path = build_path(sde_type, of_path)
        low, high = ends_of_sigmas(self.path, self.config)
        self.t_min = t_min or low or self.path.t_min
        # what the network was trained on must stand in the saved config
        told = time_told(self.path, self.config)
        self.register_to_config(**told)
        self.parameterization = Parameterization(
            self.path, of_network(self.config), sigma_data, limit=self._limit, domain=self.domain, **told
        )
        if sde_type == "discrete_vp":
            chain = inspect.signature(DiscreteVPSDE.from_beta_schedule).parameters
            self.register_to_config(**{name: chain[name].default for name in chain if self.config[name] is None})
        elif self.config.beta_schedule is None:
            self.register_to_config(beta_schedule=f"sde_type={sde_type}")
        self._hand_on()
        self._guidance_scale: float | None = None  # of the trajectory
        self.t_max = t_max or high or self._largest_time()
        if not 0 < self.t_min < self.t_max <= 1:
            raise ValueError(f"0 < t_min < t_max <= 1 is needed; got t_min={self.t_min}, t_max={self.t_max}")

        # standard deviation of the noise that sampling starts from
        self.init_noise_sigma = begin_std(self.path, self.config, self.t_max) if self.domain is None else 1.0
        # entries of the plan per time step: where img2img pipelines may cut `timesteps`
        evaluations = 1 if predictor == "auto" else PREDICTORS[predictor].evaluations
        self.order = evaluations + (corrector_steps if corrector else 0)
        self._shift = float(shift)
        # the training times, as the stock schedulers have them before set_timesteps
        shift_in_training = 1.0 if use_dynamic_shifting else self._shift
        ends = shifted(self.path, torch.tensor([self.t_max, self.t_min], dtype=torch.float64), 1 / shift_in_training)
        times = torch.linspace(float(ends[0]), float(ends[1]), num_train_timesteps, dtype=torch.float64)
        self._tell(shifted(self.path, times, shift_in_training))
        # what stock pipelines and training scripts read, as the stock schedulers have it
        for name, values in stock_tables(self.parameterization, num_train_timesteps).items():
            setattr(self, name, values)
        # what diffusers notes in model_index.json, to find the class again: after `import score_sde` the package, which
        # has it; in a folder that carries the code, the file
        if type(self) is ScoreSDEScheduler:
            self.__module__ = __name__.split(".")[-1 if _CARRIED else 0]
        self.num_inference_steps: int | None = None
        self._trajectory: PlannedTrajectory | None = None
        # of a network of two times, and whether anyone has asked for them
        self._timesteps_to: torch.Tensor | None = None
        self._ends_are_told = False
        # of auto: (its times, its predictor, the stock grid's times or, where timestep_spacing says them, none); None
        # where its times were given
        self._moves_with_stock: tuple | None = None
        self._is_noised = False
        self._begin_index: int | None = None
        self._step_index: int | None = None

    def _largest_time(self):
        """1 where everything that this scheduler computes is finite there, the path's t_max otherwise."""
        try:
            planned(self, grid(self, 2, 1.0), solver(self, 2))
        except ValueError:
            return self.path.t_max
        row = self.parameterization.row(1.0)
        return 1.0 if all(torch.isfinite(value) for value in row) else self.path.t_max

    def save_pretrained(self, save_directory, push_to_hub=False, **kwargs):
        """As of every scheduler of diffusers. Where this class came out of a folder, its code goes along."""
        if _CARRIED:
            entry = Path(__file__)
            siblings = re.findall(r"^from \.(\w+) import ", entry.read_text(encoding="utf-8"), re.MULTILINE)
            os.makedirs(save_directory, exist_ok=True)
            for name in (entry.stem, *siblings):
                shutil.copy(entry.with_name(f"{name}.py"), save_directory)
        super().save_pretrained(save_directory, push_to_hub, **kwargs)

    def __getattr__(self, name):
        if name in TABLES and (reason := why_not(self.parameterization, self.config.num_train_timesteps)):
            raise AttributeError(
                f"{name} has no meaning with sde_type {self.config.sde_type!r} and time_input "
                f"{self.config.time_input!r}: {reason}; read scheduler.path at scheduler.path_time(timesteps)"
            )
        return super().__getattr__(name)

    # --- facts about the noise, for training scripts --------------------------------------------------------------

    def __len__(self):
        return self.config.num_train_timesteps

    def timestep(self, t):
        """The number that the network receives as time at path time t: float32, the shape of t."""
        return self.parameterization.timestep(t)

    def path_time(self, timesteps):
        """Path time in [0, 1], float64, of the number(s) that the network receives: the inverse of `timestep`."""
        return self.parameterization.path_time(timesteps)

    def _time_inside(self, timesteps):
        """Path time in [0, 1] of timesteps as `add_noise` takes them."""
        t = self.path_time(timesteps)
        if t.numel() == 0:
            raise ValueError("no timestep is left to begin at: strength times num_inference_steps must be at least 1")
        # up to the rounding of float32
        inside = (t >= -1e-6) & (t <= 1 + 1e-6)
        if t.device.type == "cpu" and not inside.all():
            ends = [float(self.timestep(end)) for end in (0.0, 1.0)]
            raise ValueError(f"timesteps {timesteps} must lie between {ends[0]:g} (clean data) and {ends[1]:g} (noise)")
        return torch.where(inside, t, math.nan).clamp(0, 1)

    def add_noise(self, original_samples, noise, timesteps):
        """x_t for clean samples (B, ...), noise of the same shape, and timesteps () or (B,) as the network has them.

        Raises ValueError for timesteps outside of the path's, from clean data to noise. On an accelerator, which would
        have to be waited for, what they give is nan.
        """
        self._is_noised = True
        t = self._time_inside(timesteps)
        if self.domain is not None:
            return self.domain.perturb(original_samples, self.path.sigma(t), noise)
        return self.path.sample(original_samples, noise, t)

    def scale_noise(self, sample, timestep, noise):
        """`add_noise` as pipelines of flow matching call it."""
        return self.add_noise(sample, noise, timestep)

    def get_velocity(self, sample, noise, timesteps):
        """alpha noise - sigma x0, the target of v_prediction, for clean samples, noise and timesteps as in
        `add_noise`."""
        t = self._time_inside(timesteps)
        alpha, sigma = expand_all((self.path.alpha(t), self.path.sigma(t)), sample)
        return alpha * noise - sigma * sample

    def denoiser(self, network, limited=True):
        """The network as a function f(x, t) -> denoised samples, for samples x (B, C, ...) and path times t: one
        number, or one per sample.

        Args:
            network: f(input, timesteps (B,)) -> output (B, C, ...), or (B, 2 C, ...) with a learned variance.
            limited: clip or threshold the denoised samples where configured, as in sampling; otherwise they are the
                model's own, as its likelihood needs them.
        """
        return self.parameterization.denoiser(network, limited)

    def steered(self, network, steer):
        """A network whose denoised samples are `steer(x, t, denoise)` instead of `denoise(x, t)`, the network's own:
        for whatever is known beside the model, `Path.add_to_score`. It serves every sampler.

        Args:
            network: f(input, timesteps (B,)) -> output (B, C, ...), or (B, 2 C, ...) with a learned variance.
            steer: f(x (B, C, ...), t (B,), denoise) -> denoised samples (B, C, ...). The times of the planned
                trajectory are on the CPU, wherever x is: nothing has to wait for them.

        Returns a function such as `network`; a learned variance stays what it was.
        """
        return self.parameterization.steered(network, steer, self._known_time)

    def _known_time(self, timesteps):
        """`path_time`, float64 on the CPU where these are one entry of `timesteps`, expanded."""
        is_one_entry = timesteps.numel() == 1 or timesteps.stride() == (0,)
        entry = self._entry_of_view(timesteps) if is_one_entry and self._trajectory is not None else None
        if entry is None:
            return self.path_time(timesteps)
        return torch.full(timesteps.shape, self._planned().stages[entry].t_eval, dtype=torch.float64)

    def classifier_input(self, x, t):
        """(input, half_log_snr (B,)) of a `NoiseConditionalClassifier` for samples x (B, C, ...) at path times t, () or
        (B,): the same for every path."""
        return self.path.unit_variance(x, t), per_sample(self.path.half_log_snr(t), x)

    def init_noise(self, shape, generator=None, device=None, dtype=torch.float32):
        """What a trajectory begins with at t_max, (B, C, ...): noise of the standard deviation init_noise_sigma; on a
        domain uniform points. With a list of generators, each draws its own."""
        if self.domain is not None:
            return self.domain.prior(shape, generator, device, dtype)
        noise = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        return noise * self.init_noise_sigma

    # --- sampling -------------------------------------------------------------------------------------------------

    @property
    def nfe(self):
        """Network evaluations of one trajectory: the length of `timesteps`, but for the last of Wuerstchen's."""
        return len(self._planned().stages)

    @property
    def timesteps_to(self):
        """What a network of two times is told as `timestep_to` at each entry of `timesteps`, (nfe,) float32: the time
        that its map leads to, or its own. None for networks that are no maps (`network_map`)."""
        self._ends_are_told = True
        return self._timesteps_to

    @property
    def step_index(self):
        """Position in the plan, None before the first step."""
        return self._step_index

    @property
    def begin_index(self):
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0):
        """Start the next trajectory at this entry of `timesteps` (image-to-image).

        Stock pipelines cut `timesteps` where the stock grid has the noise that they mean, and auto has times of its
        own: from this entry on it lays them anew, in place, as pipelines hold views of `timesteps`, from the stock
        grid's time at this entry. Where no noise is added then, by `add_noise` or `scale_noise`, the sample is from a
        trajectory that stopped at this entry (SDXL's denoising_start), and the times stay what they were.
        """
        self._begin_index, self._is_noised = begin_index, False
        if self._moves_with_stock is not None:
            self._begin_with_stock(begin_index)

    def _begin_with_stock(self, begin_index):
        """Lay the times from this entry on so that they begin where the stock grid's do; at entry 0, as they were."""
        times, predictor, stock_times = self._moves_with_stock
        first, inside = divmod(begin_index, self.order)
        if begin_index and not inside and first < len(times):
            if not len(stock_times):
                # not before it is asked for: not every path has such a grid
                stock_times = stock_grid(self, self.num_inference_steps, self.t_max, self._grid_shift)
            steps = self.num_inference_steps - first
            times = torch.cat([times[:first], grid(self, steps, float(stock_times[first]), self._grid_shift)])
            predictor = solver(self, steps)
        if torch.equal(times, self._planned().times):
            return
        if not torch.is_floating_point(self.timesteps):
            times = self.path_time(self.timestep(times).round())
        told = self.timesteps
        self._lay(times, predictor)
        self.timesteps = told.copy_(self.timesteps)

    def rewind(self, begin_index: int):
        """Go on at this entry of `timesteps`, within a trajectory: the steps before are forgotten, the sample is what
        the caller makes of it (`Path.transition` adds the noise that leads back)."""
        self._begin_index, self._step_index = begin_index, None
        self._planned().forget()

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device=None,
        timesteps: list | None = None,
        sigmas: list | None = None,
        t_start: float | None = None,
        mu: float | None = None,
        guidance_scale: float | None = None,
        original_inference_steps: int | None = None,
        strength: float = 1.0,
    ):
        """Plan a trajectory. Call it before `step`, and again before every new trajectory.

        Args:
            num_inference_steps: number of time steps, at least 1; the network is called `nfe` times. It may be left out
                where times are given, and is their number otherwise.
            device: where `timesteps` shall be.
            timesteps: the falling numbers (as the network receives them) at which to evaluate. On the linear path
                with sigmas, what the network receives at these levels, whatever their own times are (CogView 4); in
                between, as interpolated. A last 0 of Wuerstchen's is left out. Where the network receives log sigma
                and timestep_spacing is karras_levels, as of diffusers' CMStochasticIterativeScheduler, whole numbers
                (int, not float) are those of levels instead, as there: 0 to num_train_timesteps - 1, of which 0 has
                the most noise and comes first although it is given last.
            sigmas: the falling noise levels at which to evaluate, as diffusers counts them: sigma / alpha, but
                sigma itself on the linear path, before they are shifted. A last 0 is where every trajectory leads, and
                is left out; a first one of all noise is the largest that the predictor can begin at, where that is
                less. The levels from 1 to 1 / n that flow pipelines pass are for `auto` nothing but their number.
            t_start: path time in (0, 1] at which the num_inference_steps begin, instead of t_max: from an image with
                its noise (image-to-image). The leading grid, which does not begin at t_max either, doesn't know it.
            mu: of use_dynamic_shifting; without, it is not used.
            guidance_scale: of classifier-free guidance, by which `auto` chooses: what is best without guidance (0 to 1)
                is unstable with much of it. None where it isn't known, as in stock pipelines: what holds for 1 to 12.
                Other predictors don't use it.
            original_inference_steps: as the pipelines of LCM pass it, instead of that of the config: the grid is that
                of this number of steps, also with `auto`.
            strength: as they pass it, from 0 to 1: the num_inference_steps are taken of the first int(strength *
                original_inference_steps) of the original steps, so that they begin at less noise. `auto` begins there
                in a grid of its own. Of given timesteps it leaves the last int(strength * number).

        Raises ValueError where none of number, timesteps and sigmas is given, where they contradict each other, when no
        falling grid of this size exists, and for original_inference_steps or a strength below 1 without the config's
        original_inference_steps.
        """
        check_original(self, original_inference_steps, strength)
        is_of_original = original_inference_steps is not None or strength < 1
        if is_of_original and (sigmas is not None or t_start is not None):
            raise ValueError("original_inference_steps and strength go with num_inference_steps or timesteps alone")
        if is_of_original and timesteps is not None:
            timesteps = first_of(self, timesteps, original_inference_steps, strength)
        told = None
        if timesteps is not None and sigmas is not None and isinstance(self.path, LinearSDE):
            told, timesteps = as_list("timesteps", timesteps), None
            if len(told) != len(sigmas):
                raise ValueError(f"timesteps and sigmas must be of one length; got {len(told)} and {len(sigmas)}")
        if timesteps is not None and sigmas is not None or num_inference_steps is timesteps is sigmas is None:
            raise ValueError("pass either num_inference_steps or timesteps or sigmas")
        if num_inference_steps is not None:
            check_number("num_inference_steps", num_inference_steps, 1, LARGEST_NFE // self.order, whole=True)
        if guidance_scale is not None:
            check_number("guidance_scale", guidance_scale, -math.inf, math.inf)
        self._guidance_scale = guidance_scale
        shift = shift_of(self, mu)
        n = num_inference_steps if timesteps is sigmas is None else None
        times = torch.ones(0) if n is not None else given_times(self, timesteps, sigmas, shift)
        if n is None and num_inference_steps not in (None, len(times)):
            raise ValueError(f"num_inference_steps {num_inference_steps} does not go with the {len(times)} times given")
        if sigmas is not None and self.config.predictor == "auto" and are_of_flow_pipelines(self.path, sigmas):
            # what would be told at other levels is not known
            n = len(times) if told is None else None
        inside = isinstance(t_start, numbers.Real) and self.t_min < t_start <= self.t_max
        if t_start is not None and (n is None or not inside):
            raise ValueError(
                f"t_start {t_start} must lie above {self.t_min:g} and at most at {self.t_max:g}, and goes with "
                f"num_inference_steps"
            )
        given = times
        if n is None or original_inference_steps is not None:
            own = self.config.network_map or ON_GIVEN_TIMES
            predictor = own if self.config.predictor == "auto" else self.config.predictor
        else:
            predictor = solver(self, n)
        if n is None:
            # all that are given are evaluated at, but for the end itself, up to the rounding of float32
            if not self.config.denoise_final and times[-1] > self.t_min * (1 + 1e-5):
                times = torch.cat([times, torch.full((1,), self.t_min).to(times)])
        elif t_start is None and not is_of_original and self._is_calibrated(n):
            times, predictor = fitted(self, n, shift)
        else:
            begin = self.t_max if t_start is None else t_start
            times = grid(self, n, begin, shift, original_inference_steps, strength)

        self._lay(times, predictor, device)
        if told is not None:
            ends = [0.0, *reversed(given.tolist())], [float(self.timestep(0.0)), *reversed(told)]
            evaluated = self._planned().evaluated
            self.timesteps = torch.from_numpy(np.interp(evaluated, *ends)).float().to(device)
        self.num_inference_steps = len(times) - (0 if self.config.denoise_final else 1)
        self._step_index = None
        self._begin_index = None
        self._grid_shift, self._moves_with_stock = shift, None
        if self.config.predictor == "auto" and n is not None and t_start is None and not is_of_original:
            self._moves_with_stock = times, predictor, given

    def _lay(self, times, predictor, device=None):
        """Plan an evaluation at each of these times."""
        stages = planned(self, times, predictor)
        walk = PlannedTrajectory if self.domain is None else DomainTrajectory
        self._trajectory = walk(self.parameterization, times, predictor, stages)
        self._tell(self._trajectory.evaluated, device)
        check_boundary(self.config, self.timestep(self._trajectory.evaluated))
        self._timesteps_to, self._ends_are_told = None, False
        if self.config.network_map is not None:
            ends = told_ends(self, stages)
            self._timesteps_to = ends if device is None else moved(ends, torch.device(device))
        self._eta_taken = False

    def _tell(self, times, device=None):
        """Set what users and pipelines read of these times of evaluation."""
        received = told_timesteps(self, times)
        self.timesteps = received if device is None else moved(received, torch.device(device))
        # on the CPU, as the stock schedulers have them
        self.sigmas = told_sigmas(self, times)

    @property
    def shift(self):
        """The shift of the grids, unless it is dynamic."""
        return self._shift

    def set_shift(self, shift: float):
        """Set the shift of the grids of `set_timesteps` from now on; it is not saved."""
        check_number("shift", shift, *NUMBERS["shift"])
        self._shift = float(shift)

    def _is_calibrated(self, n):
        return self.config.predictor == "auto" and str(n) in (self.config.calibration or {})

    @torch.no_grad()
    def calibrate(
        self,
        model,
        nfe: int | list[int],
        *,
        noise=None,
        num_samples: int = 16,
        class_labels=None,
        guidance_scale: float = 1.0,
        generator: torch.Generator | None = None,
        reference_steps: int = 100,
        sweeps: int = 6,
        conditions: dict | None = None,
        mu: float | None = None,
        call: dict | None = None,
    ):
        """Fit the times of `nfe` network evaluations to a model, for predictor "auto".

        From a few samples of noise, the ends of trajectories of nfe steps are compared with those of reference_steps
        steps. The best of some fifty pairs of predictor and grid, and then, one after another, its times are chosen for
        the smallest difference (geometric mean and root mean square over the samples, at equal weight). The result goes
        into the config, as `calibration`: `set_timesteps(nfe)` uses it from then on, and it is saved with the
        scheduler. For every nfe it costs reference_steps + 52 (nfe - 1) + sweeps nfe (nfe - 1) network evaluations of
        all samples, as the progress bar counts them: 800 for 8.

        Args:
            model: a `ScoreSDEPipeline`; a pipeline of diffusers whose scheduler this is, with `call`; or a function
                f(input (B, C, ...), timesteps (B,)) -> output (B, C, ...), which needs `noise`.
            nfe: a number of evaluations of at least 2, or several.
            noise: standard normal, (B, C, ...), instead of drawing num_samples of the model's size.
            class_labels, guidance_scale, conditions: for the `ScoreSDEPipeline`; by default its classes in turn.
                Guidance changes the trajectories: calibrate with the scale that will be used.
            generator: source of the noise that the pipeline draws.
            sweeps: how often every time is tried.
            mu: of use_dynamic_shifting, for a function.
            call: arguments of the pipeline of diffusers as it will be used, such as {"prompt": [...], "guidance_scale":
                7.5, "height": 512}, but for num_inference_steps; 8 prompts or more, for the times are fitted to them.
                For every nfe it is called once, and its guidance, shift and embeddings are those of that call. What
                guides or controls in a part of the steps, or caches, is refused.

        Returns {nfe: (error before, error after)}, each the root of geometric mean times root mean square. With the
        times, the config says what they were fitted with: guidance_scale where it is known, shift, evaluations. Where
        the shift is another, they move with it as the grids do; at another guidance_scale they stay.

        Raises ValueError for another predictor than "auto", with a corrector, or without a final denoising; for a
        model whose output is not finite; and for pipelines whose network is no function of sample and time.
        """
        return calibrate(
            self,
            model,
            nfe,
            noise,
            num_samples,
            class_labels,
            guidance_scale,
            generator,
            conditions,
            mu,
            call,
            reference_steps,
            sweeps,
        )

    def _planned(self) -> PlannedTrajectory:
        if self._trajectory is None:
            raise ValueError("no trajectory is planned: call scheduler.set_timesteps(num_inference_steps) first")
        return self._trajectory

    def _enter(self, timestep) -> int:
        """The entry of the plan that is next; before the first step, the one at which the trajectory begins."""
        trajectory = self._planned()
        if self._step_index is not None:
            return self._step_index
        start = self._position(timestep) if self._begin_index is None else self._begin_index
        if start and self._begin_index is None and self._moves_with_stock is not None:
            warnings.warn(
                f"the trajectory begins at entry {start} of auto's own times, at timestep {self.timesteps[start]:g}: a "
                f"pipeline that counts steps on the stock grid, and does not call set_begin_index, means another time; "
                f"give the scheduler a predictor that takes timestep_spacing, such as 'unipc_2'",
                stacklevel=3,
            )
        if start:
            first_step, inside = divmod(start, self.order)
            if inside:
                raise ValueError(
                    f"a trajectory cannot begin at entry {start}, inside a time step: pass a multiple of {self.order}"
                )
            if PREDICTORS[trajectory.predictor].multistep:
                # it has no past here: it begins again
                trajectory.replace(start, planned(self, trajectory.times[first_step:], trajectory.predictor))
        self._step_index = start
        return start

    def _position(self, timestep):
        """The first entry of `timesteps` that equals `timestep`."""
        if torch.is_tensor(timestep):
            # pipelines may pass one for each sample
            timestep = timestep.reshape(-1)[0] if timestep.ndim else timestep
            if (entry := self._entry_of_view(timestep)) is not None:
                return entry
        found = (self.timesteps == torch.as_tensor(timestep).to(self.timesteps.device)).nonzero()
        if len(found) == 0:
            raise ValueError(
                f"timestep {float(timestep):g} is none of this trajectory's: pass one of scheduler.timesteps"
            )
        return int(found[0])

    def _entry_of_view(self, timestep):
        """The entry of `timesteps` that this is a view of, as in a loop over them: found without waiting for the
        device. None where it is none."""
        if self.timesteps.untyped_storage().data_ptr() == timestep.untyped_storage().data_ptr():
            return timestep.storage_offset() - self.timesteps.storage_offset()
        return None

    def scale_model_input(self, sample, timestep=None):
        """What the network receives for a sample: the sample itself, but for prediction type edm, whose input has unit
        variance."""
        if (
            self._begin_index
            and self._step_index is None
            and self._moves_with_stock is not None
            and not self._is_noised
        ):
            self._begin_with_stock(0)
        if not self.parameterization.prediction_type.startswith("edm"):
            return sample
        return sample * self._planned().rows[self._enter(timestep)][2]

    def step(
        self,
        model_output,
        timestep,
        sample,
        generator=None,
        return_dict: bool = True,
        prev_timestep=None,
        use_clipped_model_output: bool | None = None,
        per_token_timesteps=None,
        eta: float | None = None,
    ):
        """Run the next entry of the plan.

        Args:
            model_output: the network's output for `scale_model_input(sample, timestep)`, (B, C, ...); (B, 2 C, ...)
                from a network that learned a variance, which ancestral sampling with learned_range uses.
            timestep: an entry of `timesteps`; it only matters for the first call, which finds its place by it.
            sample: the current sample (B, C, ...), any floating dtype; half precision is computed in float32.
            generator: source of the noise, one or one per sample.
            return_dict: return a `ScoreSDESchedulerOutput` instead of the tuple (prev_sample, pred_original_sample).
            prev_timestep: passed by pipelines of UnCLIP and Kandinsky, which pass the next entry of `timesteps`; the
                step goes there anyway.
            use_clipped_model_output: instead of the scheduler's own, unless None.
            per_token_timesteps: (B, L) or (B, 1), what the network received as times of the tokens of a sample
                (B, L, C), whose model_output is then -flow_prediction, as in the pipelines that do so (LTX). Tokens
                with less noise than the plan's next step to its first lower one.
            eta: passed by stock pipelines: above 0, the trajectory's amount of noise. 0, which is their default, and
                None leave the scheduler's own.

        Raises ValueError before `set_timesteps`, past the end of the plan, and for shapes that don't fit.
        """
        trajectory, at = self._planned(), self._enter(timestep)
        self._take_eta(at, eta)
        if use_clipped_model_output is False and (self.config.clip_sample or self.config.thresholding):
            raise ValueError("use_clipped_model_output=False has no counterpart here: leave it out, or pass True")
        if at >= self.nfe:
            raise ValueError(f"all {self.nfe} entries of the plan have run: call set_timesteps again")
        if self.config.network_map == "flow_map" and not self._ends_are_told:
            self._check_told(trajectory.stages[at])
        variance = None
        if sample.ndim > 1 and model_output.shape[1:2] == (2 * sample.shape[1],):
            model_output, variance = model_output.chunk(2, dim=1)
        elif trajectory.stages[at].noise_range is not None and model_output.shape == sample.shape:
            raise ValueError(
                f"variance_type 'learned_range' needs a network with {2 * sample.shape[1]} output channels; "
                f"got {sample.shape[1]}: pass variance_type='fixed_small'"
            )
        if model_output.shape != sample.shape:
            raise ValueError(
                f"model_output has shape {tuple(model_output.shape)}, which does not fit sample {tuple(sample.shape)}"
            )
        dtype = torch.promote_types(sample.dtype, torch.float32)
        # a copy: pipelines may write what comes next into the sample itself, which later steps still need
        x = sample.to(dtype, copy=True)

        def draw_noise():
            return randn_tensor(x.shape, generator=generator, device=x.device, dtype=dtype)

        if per_token_timesteps is not None:
            if self.config.prediction_type != "flow_prediction" or not isinstance(self.path, LinearSDE):
                raise ValueError(
                    f"per_token_timesteps are for prediction_type 'flow_prediction' of sde_type 'linear', not for "
                    f"{self.config.prediction_type!r} of {self.config.sde_type!r}"
                )
            own = self.path_time(per_token_timesteps)
            prev_sample, denoised = trajectory.step_tokens(at, model_output, x, draw_noise, own)
        else:
            redone = (
                self.config.use_clipped_model_output if use_clipped_model_output is None else use_clipped_model_output
            )
            prev_sample, denoised = trajectory.step(at, model_output, x, draw_noise, variance, redone)
        prev_sample, denoised = prev_sample.to(sample.dtype), denoised.to(sample.dtype)
        self._step_index = at + 1
        if not return_dict:
            return (prev_sample, denoised)
        return ScoreSDESchedulerOutput(prev_sample=prev_sample, pred_original_sample=denoised)

    def _check_told(self, stage):
        """Raise ValueError where a flow map should have been told the time that it leads to."""
        if stage.t_to is not None:
            raise ValueError(
                "this loop or pipeline has not told its network, a flow map, where to lead: pass an entry of "
                "scheduler.timesteps_to as timestep_to, as a ScoreSDEPipeline does; or take it for an ordinary network "
                "by a predictor such as 'ddim'"
            )

    def _take_eta(self, at, eta):
        """Plan the rest of the trajectory with this amount of noise, where it is not 0 and not the scheduler's own."""
        trajectory, options = self._planned(), given_options(type(self), self.config)
        if eta and not self._eta_taken and eta != options.get("eta"):
            times, options = trajectory.times[at // self.order :], options | {"eta": eta}
            trajectory.replace(at, planned(self, times, trajectory.predictor, options))
        self._eta_taken = True

    def _limit(self, denoised):
        """Clip or threshold the denoised sample where configured."""
        if self.config.use_clipped_model_output is None:
            return denoised
        if self.config.clip_sample and not self.config.thresholding:
            return denoised.clamp(-self.config.clip_sample_range, self.config.clip_sample_range)
        if not self.config.thresholding:
            return denoised
        return threshold(denoised, self.config.dynamic_thresholding_ratio, self.config.sample_max_value)
