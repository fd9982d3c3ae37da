"""`ScoreSDEScheduler`: a diffusers scheduler over any noise path and a plan of solver stages.

This file is the interface that pipelines and training scripts meet. The noise mathematics is in `paths`, the solvers in
`solvers`, what a network's numbers mean in `parameterization`, what stock configs mean in `stock_configs`, times fitted
to a model in `calibration`, what arguments may be in `checks`.
"""

import difflib
import inspect
import json
import math
import numbers
import os
import re
import shutil
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SCHEDULER_CONFIG_NAME, KarrasDiffusionSchedulers, SchedulerMixin
from diffusers.utils import BaseOutput, logging
from diffusers.utils.torch_utils import randn_tensor

from .calibration import calibrate, check_calibration, fitted
from .checks import LARGEST_NFE, NUMBERS, as_list, check_arguments, check_choice, check_number
from .parameterization import Parameterization, per_sample, threshold
from .paths import (
    PREDICTIONS,
    SDE_TYPES,
    TIME_GRIDS,
    TIME_INPUTS,
    DiscreteVPSDE,
    LinearSDE,
    build_path,
    expand_all,
    moved,
    shifted,
    time_grid,
)
from .per_token import step_tokens
from .solvers import (
    CORRECTORS,
    ON_GIVEN_TIMES,
    PREDICTORS,
    VARIANCES,
    Memory,
    Stage,
    automatic,
    plan,
    predictor_options,
)
from .stock_attributes import TABLES, stock_tables, why_not
from .stock_configs import (
    FLOW,
    GRIDS,
    HANDED_ON,
    VARIANCES_OF_STOCK,
    curve,
    from_stock_config,
    not_of_the_path,
    of_network,
    refuse_unknown_meaning,
)


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


class ScoreSDEScheduler(SchedulerMixin, ConfigMixin):
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
            inverted_flow_prediction (its negative, of Mochi and OmniGen), edm (preconditioned), or edm_v_prediction
            (its negative, of Stable Video Diffusion).
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
        timestep_spacing: linspace, leading, trailing, to_zero, uniform, quadratic, karras, log_snr, logistic, beta, or
            beta_sigmas, as `paths.time_grid` has them. Not used by auto.
        steps_offset: offset of the leading grid.
        open_end: the linspace and leading grids are those of one level more, without the last, as diffusers'
            DPM-Solver, UniPC, DEIS and SA-Solver have them.
        whole_levels: the linspace grid of discrete_vp is rounded to whole levels; otherwise sigma / alpha is
            interpolated between levels, as diffusers' Euler, Heun, LMS and KDPM2 do.
        rho: exponent of the karras grid.
        calibration: {number of steps: [predictor, times, what they were fitted with]}, written by `calibrate`, for
            auto.
        denoise_final: the last evaluation, at `t_min`, returns the denoised sample. False stops early: the sample at
            `t_min` with its noise.
        t_min: smallest time, in (0, 1); None for the path's own.
        t_max: largest time, in (0, 1]; None for 1, or a little less where alpha(1) = 0 and the predictor, grid or
            prediction type is singular there.
        beta_min, beta_max: of vp and subvp. sigma_min, sigma_max: of ve and edm; on discrete_vp the ends of the grids
            that the use_..._sigmas ask for. beta_start, beta_end, beta_schedule, trained_betas, rescale_betas_zero_snr,
            snr_shift_scale: of discrete_vp, as in diffusers. None means the path's own default. On another path
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
        shift_terminal: on the linear path, the time of the last evaluation, to which grids are stretched (LTX-Video).
            Not used by auto.

    Raises ValueError at construction for every unknown or contradictory value, for every number out of its range
    (`checks.NUMBERS`, and the rows of `solvers.PREDICTORS`), and for options that the predictor doesn't have, with what
    is allowed.
    """

    # two base classes declare it, as a string and as None
    config_name: Any = SCHEDULER_CONFIG_NAME
    _compatibles = [e.name for e in KarrasDiffusionSchedulers]

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
    ):
        check_choice("sde_type", sde_type, SDE_TYPES)
        check_choice("prediction_type", prediction_type, PREDICTIONS)
        check_choice("predictor", predictor, ("auto", *PREDICTORS))
        check_choice("corrector", corrector, (None, *CORRECTORS))
        check_choice("corrector_position", corrector_position, ("after", "before"))
        check_choice("variance_type", variance_type, (*VARIANCES, *VARIANCES_OF_STOCK, "learned"))
        check_choice("timestep_spacing", timestep_spacing, TIME_GRIDS)
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
        check_choice("time_shift_type", time_shift_type, ("exponential", "linear"))
        check_choice("interpolation_type", interpolation_type, ("linear", "log_linear"))
        check_choice("timestep_type", timestep_type, ("discrete", "continuous"))
        check_choice("init_noise", init_noise, (None, "sigma", "unit_data"))
        check_choice("use_clipped_model_output", use_clipped_model_output, (True, False, None))
        check_arguments(type(self), self.config)
        if use_karras_sigmas + use_exponential_sigmas + use_lu_lambdas + use_beta_sigmas > 1:
            raise ValueError(
                "at most one of use_karras_sigmas, use_exponential_sigmas, use_lu_lambdas and use_beta_sigmas can be "
                "True"
            )
        for name in ("use_flow_sigmas", "invert_sigmas"):
            if self.config[name] and sde_type != "linear":
                raise ValueError(
                    f"{name}=True has no counterpart on sde_type {sde_type!r}: pass sde_type='linear', or leave it out"
                )
        if shift_terminal is not None and sde_type != "linear":
            raise ValueError(f"shift_terminal {shift_terminal} is for sde_type 'linear', not for {sde_type!r}")
        self._check_solver()
        self._guidance_scale: float | None = None  # of the trajectory
        check_calibration(self.config.calibration)

        unused = not_of_the_path(self.config)
        self.path = build_path(sde_type, {name: value for name, value in self.config.items() if name not in unused})
        low, high = self._ends_of_sigmas()
        self.t_min = t_min or low or self.path.t_min
        if time_input is None:
            time_input = self.path.time_input
        check_choice("time_input", time_input, TIME_INPUTS)
        default_scale = {"t": num_train_timesteps, "log_sigma": num_train_timesteps / 4}.get(time_input, 1)
        if invert_sigmas:
            default_scale = -num_train_timesteps
        # what the network was trained on must stand in the saved config
        time_scale = float(default_scale if time_scale is None else time_scale)
        default_offset = num_train_timesteps if invert_sigmas else self.path.time_offset
        time_offset = float(default_offset if time_offset is None else time_offset)
        self.register_to_config(time_input=time_input, time_scale=time_scale, time_offset=time_offset)
        self.parameterization = Parameterization(
            self.path, of_network(self.config), sigma_data, time_input, time_scale, time_offset, self._limit
        )
        if sde_type == "discrete_vp":
            chain = inspect.signature(DiscreteVPSDE.from_beta_schedule).parameters
            self.register_to_config(**{name: chain[name].default for name in chain if self.config[name] is None})
        elif self.config.beta_schedule is None:
            self.register_to_config(beta_schedule=f"sde_type={sde_type}")
        # and is handed to stock schedulers: diffusers leaves out what it thinks was left at a default
        if "_use_default_values" in self.config:
            names = HANDED_ON | {*FLOW} if sde_type == "linear" else HANDED_ON
            handed_on = {name for name in names if self.config.get(name) is not None}
            left_out = set(self.config["_use_default_values"])
            self.register_to_config(_use_default_values=sorted(left_out - handed_on))
        self.t_max = t_max or high or self._largest_time()
        if not 0 < self.t_min < self.t_max <= 1:
            raise ValueError(f"0 < t_min < t_max <= 1 is needed; got t_min={self.t_min}, t_max={self.t_max}")

        # standard deviation of the noise that sampling starts from
        alpha, sigma = float(self.path.alpha(self.t_max)), float(self.path.sigma(self.t_max))
        self.init_noise_sigma = {
            None: self.path.prior_std * sigma / float(self.path.sigma(1.0)),
            "sigma": sigma,
            "unit_data": math.hypot(alpha, sigma),
        }[init_noise]
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
        self._plan: list[Stage] | None = None
        # of auto: (its times, its predictor, the stock grid's times or, where timestep_spacing says them, none); None
        # where its times were given
        self._moves_with_stock: tuple | None = None
        self._is_noised = False
        self._begin_index: int | None = None
        self._step_index: int | None = None

    def _given_options(self):
        """The options of the predictor that were given, by their own names or in `predictor_kwargs`.

        Raises ValueError for one that is given twice.
        """
        flat = {name: self.config[name] for name in ("eta", "s_churn", "s_tmin", "s_tmax", "s_noise")}
        defaults = inspect.signature(type(self)).parameters
        given = {
            name: value for name, value in flat.items() if value != defaults[name].default or isinstance(value, bool)
        }
        for name, value in (self.config.predictor_kwargs or {}).items():
            if name in given and given[name] != value:
                raise ValueError(f"{name} is given twice: {given[name]}, and {value} in predictor_kwargs")
            given[name] = value
        row = PREDICTORS.get(self.config.predictor)
        # a fact of the trained network, told also where the predictor has no use for it
        if row is not None and "variance_type" in row.takes:
            own = VARIANCES_OF_STOCK.get(self.config.variance_type, self.config.variance_type)
            given.setdefault("variance_type", own)
        return given

    def _check_solver(self):
        """Raise ValueError for options that the predictor doesn't have, or that contradict each other."""
        if not isinstance(self.config.predictor_kwargs, dict | None):
            raise ValueError(f"predictor_kwargs {self.config.predictor_kwargs!r} must be a dictionary, or None")
        options = predictor_options(self.config.predictor, self._given_options())
        if options.get("s_churn") and self.config.corrector:
            raise ValueError(f"s_churn {options['s_churn']} does not go with a corrector: leave out one of them")
        if self.config.predictor == "none" and self.config.corrector is None:
            raise ValueError(f"predictor 'none' needs a corrector; choose one of {', '.join(CORRECTORS)}")

    def _ends_of_sigmas(self):
        """The times of sigma_min and sigma_max where they are the ends of a grid on a chain of levels, None otherwise.

        Raises ValueError for one that is none of the chain's.
        """
        ends = {"sigma_min": None, "sigma_max": None}
        if self.path.levels and any(self.config[flag] for flag in GRIDS):
            least, most = (float(torch.exp(-self.path.half_log_snr(t))) for t in (self.path.t_min, 1.0))
            for name in ends:
                value = self.config[name]
                if value is not None and not least * (1 - 1e-3) <= value <= most * (1 + 1e-3):
                    raise ValueError(f"{name} {value} is none of the chain's levels, from {least:.4g} to {most:.4g}")
                if value is not None:
                    time = float(self.path.t_from_half_log_snr(-math.log(value)))
                    ends[name] = min(max(time, self.path.t_min), 1.0)
        return ends.values()

    def _largest_time(self):
        """1 where everything that this scheduler computes is finite there, the path's t_max otherwise."""
        try:
            self._build_plan(self._grid(2, 1.0), self._solver(2))
        except ValueError:
            return self.path.t_max
        row = self.parameterization.row(1.0)
        return 1.0 if all(torch.isfinite(value) for value in row) else self.path.t_max

    @classmethod
    def from_config(cls, config=None, return_unused_kwargs=False, **kwargs):
        """A scheduler from a config of ours or of a stock diffusers scheduler: the same path, prediction type, grid and
        clipping as the stock scheduler; the predictor is ours, unless given in `kwargs`.

        Stock configs: see `stock_configs`, which takes every scheduler of diffusers whose path is known, or says why
        not. The last step leads to clean data, wherever the stock scheduler's does.

        Raises ValueError for other schedulers, for a key whose value has no counterpart here, and for keywords that are
        no argument of this class (with return_unused_kwargs they are returned).
        """
        if isinstance(config, dict):
            own = inspect.signature(cls).parameters.keys()
            if not return_unused_kwargs:
                for name in kwargs.keys() - own:
                    nearest = difflib.get_close_matches(name, own, n=1, cutoff=0.0)[0]
                    raise ValueError(f"{name!r} is no argument of {cls.__name__}; the nearest is {nearest!r}")
            if "sde_type" in config:
                refuse_unknown_meaning(config, but=own)
                # a file doesn't hold them
                if "_use_default_values" not in config:
                    config = dict.fromkeys(cls._none_by_default()) | config
            else:
                config = from_stock_config(config, own)
            if kwargs.get("sde_type", config["sde_type"]) != config["sde_type"]:
                config = {name: value for name, value in config.items() if name != "beta_schedule"}
        return super().from_config(config, return_unused_kwargs, **kwargs)

    @classmethod
    def _none_by_default(cls):
        return [name for name, each in inspect.signature(cls).parameters.items() if each.default is None]

    def to_json_string(self) -> str:
        """The config as a file holds it: without the arguments that are None by default, since None is no number to a
        stock scheduler."""
        values, left_out = json.loads(super().to_json_string()), self._none_by_default()
        values = {name: value for name, value in values.items() if value is not None or name not in left_out}
        return json.dumps(values, indent=2, sort_keys=True) + "\n"

    def save_pretrained(self, save_directory, push_to_hub=False, **kwargs):
        """As of every scheduler of diffusers. Where this class came out of a folder, its code goes along."""
        if _CARRIED:
            entry = Path(__file__)
            siblings = re.findall(r"^from \.(\w+) import ", entry.read_text(encoding="utf-8"), re.MULTILINE)
            os.makedirs(save_directory, exist_ok=True)
            for name in (entry.stem, *siblings):
                shutil.copy(entry.with_name(f"{name}.py"), save_directory)
        super().save_pretrained(save_directory, push_to_hub, **kwargs)

    def register_to_config(self, **kwargs):
        """As of every scheduler of diffusers. A `prediction_type`, which training scripts set so, is then the
        network's."""
        if "prediction_type" in kwargs and "parameterization" in vars(self):
            check_choice("prediction_type", kwargs["prediction_type"], PREDICTIONS)
            self.parameterization = replace(self.parameterization, prediction_type=kwargs["prediction_type"])
        super().register_to_config(**kwargs)

    @property
    def config(self) -> Any:
        """The arguments, as a mapping with attributes: `scheduler.config.sde_type`."""
        return super().config

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
        return self.path.sample(original_samples, noise, self._time_inside(timesteps))

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
        entry = self._entry_of_view(timesteps) if is_one_entry and self._plan is not None else None
        if entry is None:
            return self.path_time(timesteps)
        return torch.full(timesteps.shape, self._require_plan()[entry].t_eval, dtype=torch.float64)

    def classifier_input(self, x, t):
        """(input, half_log_snr (B,)) of a `NoiseConditionalClassifier` for samples x (B, C, ...) at path times t, () or
        (B,): the same for every path."""
        return self.path.unit_variance(x, t), per_sample(self.path.half_log_snr(t), x)

    # --- sampling -------------------------------------------------------------------------------------------------

    @property
    def nfe(self):
        """Network evaluations of one trajectory: the length of `timesteps`, but for the last of Wuerstchen's."""
        return len(self._require_plan())

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
                stock_times = self._stock_grid(self.num_inference_steps, self.t_max, self._grid_shift)
            steps = self.num_inference_steps - first
            times = torch.cat([times[:first], self._grid(steps, float(stock_times[first]), self._grid_shift)])
            predictor = self._solver(steps)
        if torch.equal(times, self._times):
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
        self._memory = Memory(self._require_plan())

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device=None,
        timesteps: list | None = None,
        sigmas: list | None = None,
        t_start: float | None = None,
        mu: float | None = None,
        guidance_scale: float | None = None,
    ):
        """Plan a trajectory. Call it before `step`, and again before every new trajectory.

        Args:
            num_inference_steps: number of time steps, at least 1; the network is called `nfe` times. It may be left out
                where times are given, and is their number otherwise.
            device: where `timesteps` shall be.
            timesteps: the falling numbers (as the network receives them) at which to evaluate. On the linear path
                with sigmas, what the network receives at these levels, whatever their own times are (CogView 4); in
                between, as interpolated. A last 0 of Wuerstchen's is left out.
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

        Raises ValueError where none of number, timesteps and sigmas is given, where they contradict each other, or when
        no falling grid of this size exists.
        """
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
        shift = self._shift_of(mu)
        n = num_inference_steps if timesteps is sigmas is None else None
        times = torch.ones(0) if n is not None else self._explicit_times(timesteps, sigmas, shift)
        if n is None and num_inference_steps not in (None, len(times)):
            raise ValueError(f"num_inference_steps {num_inference_steps} does not go with the {len(times)} times given")
        if sigmas is not None and self.config.predictor == "auto" and self._is_of_flow_pipelines(sigmas):
            # what would be told at other levels is not known
            n = len(times) if told is None else None
        inside = isinstance(t_start, numbers.Real) and self.t_min < t_start <= self.t_max
        if t_start is not None and (n is None or not inside):
            raise ValueError(
                f"t_start {t_start} must lie above {self.t_min:g} and at most at {self.t_max:g}, and goes with "
                f"num_inference_steps"
            )
        given = times
        if n is None:
            predictor = ON_GIVEN_TIMES if self.config.predictor == "auto" else self.config.predictor
        elif t_start is None and self._is_calibrated(n):
            times, predictor = fitted(self, n, shift)
        else:
            times = self._grid(n, self.t_max if t_start is None else t_start, shift)
            predictor = self._solver(n)

        self._lay(times, predictor, device)
        if told is not None:
            ends = [0.0, *reversed(times.tolist())], [float(self.timestep(0.0)), *reversed(told)]
            evaluated = [stage.t_eval for stage in self._require_plan()]
            self.timesteps = torch.from_numpy(np.interp(evaluated, *ends)).float().to(device)
        self.num_inference_steps = len(times) - (0 if self.config.denoise_final else 1)
        self._step_index = None
        self._begin_index = None
        self._grid_shift, self._moves_with_stock = shift, None
        if self.config.predictor == "auto" and n is not None and t_start is None:
            self._moves_with_stock = times, predictor, given

    def _lay(self, times, predictor, device=None):
        """Plan an evaluation at each of these times."""
        self._times, self._predictor = times, predictor
        self._plan = self._build_plan(times, predictor)
        evaluated = torch.tensor([stage.t_eval for stage in self._plan], dtype=torch.float64)
        row = self.parameterization.row(evaluated)
        # states are float32
        if not all(torch.isfinite(values.float()).all() for values in row):
            raise ValueError(
                f"prediction_type {self.config.prediction_type!r} says nothing of clean samples at t = {times[0]:g}, "
                f"where alpha is {float(self.path.alpha(times[0])):g}: pass a smaller t_max, or a path with less noise"
            )
        self._rows = list(zip(*(values.tolist() for values in (*row, self.path.alpha(evaluated))), strict=True))
        self._tell(evaluated, device)
        self._memory = Memory(self._plan)
        self._times_there: torch.Tensor | None = None  # on the device of the samples, for `step_tokens`
        self._eta_taken = False

    def _tell(self, times, device=None):
        """Set what users and pipelines read of these times of evaluation."""
        received = self.timestep(times)
        if self.path.levels and torch.equal(received, received.round()):
            received = received.long()
        if self._ends_with_zero():
            received = torch.cat([received, torch.zeros(1).to(received)])
        self.timesteps = received if device is None else moved(received, torch.device(device))
        levels = self._levels(times)
        levels = torch.cat([levels, torch.zeros(1).to(levels)])
        # on the CPU, as the stock schedulers have them
        self.sigmas = (1 - levels if self.config.invert_sigmas else levels).float()

    def _ends_with_zero(self):
        """Whether `timesteps` end with clean data, where nothing is evaluated: Wuerstchen's pipelines leave out the
        last of them."""
        is_told_shares = self.config.beta_schedule == "wuerstchen" and self.config.time_scale == 1
        return is_told_shares and self.config.denoise_final

    def _levels(self, times):
        """The noise levels as diffusers counts them: see `set_timesteps`."""
        return times if isinstance(self.path, LinearSDE) else torch.exp(-self.path.half_log_snr(times))

    @property
    def shift(self):
        """The shift of the grids, unless it is dynamic."""
        return self._shift

    def set_shift(self, shift: float):
        """Set the shift of the grids of `set_timesteps` from now on; it is not saved."""
        check_number("shift", shift, *NUMBERS["shift"])
        self._shift = float(shift)

    def _shift_of(self, mu):
        """The shift of a trajectory with this `mu`."""
        if not self.config.use_dynamic_shifting:
            return self._shift
        if mu is None:
            raise ValueError("use_dynamic_shifting needs the shift of this trajectory: pass mu to set_timesteps")
        shift = math.exp(mu) if self.config.time_shift_type == "exponential" else mu
        check_number(f"the shift of mu {mu},", shift, *NUMBERS["shift"])
        return shift

    def _is_calibrated(self, n):
        return self.config.predictor == "auto" and str(n) in (self.config.calibration or {})

    def _explicit_times(self, timesteps, sigmas, shift):
        """The times of given numbers, as `set_timesteps` takes them."""
        given, name = (sigmas, "sigmas") if timesteps is None else (timesteps, "timesteps")
        values = torch.tensor(as_list(name, given), dtype=torch.float64)
        if timesteps is not None and values[-1] == 0 and len(values) > 1 and self._ends_with_zero():
            values = values[:-1]
        if timesteps is not None:
            times, largest, rounding = self.path_time(values), float(self.timestep(1.0)), 1e-6
        else:
            if values[-1] == 0 and len(values) > 1 and self.config.denoise_final:
                values = values[:-1]
            is_flow = isinstance(self.path, LinearSDE)
            times = values if is_flow else self.path.t_from_half_log_snr(-values.log())
            # published tables are rounded
            largest, rounding = (1.0, 1e-6) if is_flow else (float(torch.exp(-self.path.half_log_snr(1.0))), 1e-3)
        small = values[0] <= largest + rounding * abs(largest) and times[0] <= 1 + rounding
        times = times.clamp_max(1.0)
        if sigmas is not None:
            times = self._stretched(shifted(self.path, times, shift)).clamp_max(self.t_max)
            if isinstance(self.path, LinearSDE) and not self.config.use_flow_sigmas and curve(self.config):
                times = self._curved(times, float(times[0]))
        if not small or not (times.diff() < 0).all() or not times[-1] > 0:
            raise ValueError(f"{name} {values.tolist()} must fall strictly, from at most {largest:g}")
        return times

    def _is_of_flow_pipelines(self, sigmas):
        n = len(sigmas)
        own = torch.linspace(1, 1 / n, n, dtype=torch.float64)
        is_even = bool((torch.tensor(as_list("sigmas", sigmas), dtype=torch.float64) - own).abs().max() < 1e-6)
        return isinstance(self.path, LinearSDE) and is_even

    def _stretched(self, times):
        """The times of the linear path, with the last at shift_terminal."""
        if self.config.shift_terminal is None:
            return times
        return 1 - (1 - times) * (1 - self.config.shift_terminal) / (1 - times[-1])

    def _grid(self, n, t_max, shift=1.0):
        """The times of n steps up to t_max."""
        if self.config.predictor != "auto":
            return self._stock_grid(n, t_max, shift)
        rule = automatic(n, self._guidance_scale)
        # half as far as the stock grid: good for data that ask for the whole of it, and for data that ask for none
        center = rule.center - math.log(shift) / 2
        return self._spaced("logistic", n, t_max, center=center, width=rule.width, tail=rule.tail)

    def _stock_grid(self, n, t_max, shift):
        """The same, of timestep_spacing and the stock schedulers' keys beside it, whatever the predictor."""
        spacing = self.config.timestep_spacing
        if self.config.use_flow_sigmas and spacing in ("leading", "trailing"):
            # as the stock schedulers have it
            spacing = "linspace"
        times = self._spaced(spacing, n, t_max, rho=self.config.rho)
        times = self._stretched(shifted(self.path, times, shift))
        return self._curved(times, t_max) if curve(self.config) else times

    def _spaced(self, spacing, n, t_max, **options):
        return time_grid(
            self.path,
            spacing,
            # a trajectory that stops early takes n steps without an evaluation at its end
            n if self.config.denoise_final else n + 1,
            self.t_min,
            t_max,
            levels=self.config.num_train_timesteps,
            offset=self.config.steps_offset,
            open_end=self.config.open_end,
            whole_levels=self.config.whole_levels,
            **options,
        )

    def _curved(self, times, t_max):
        """As many times, on the grid that one of the use_..._sigmas asks for, between the ends of these or, where the
        config says so, of the path or of its own."""
        n, config, is_flow = len(times), self.config, isinstance(self.path, LinearSDE)
        # log_linear alone takes n of n + 1
        more = not any(config[flag] for flag in GRIDS)
        first, last = float(times[0]), float(times[-1])
        if config.open_end or config.interpolation_type == "log_linear" or not (is_flow or self.path.levels):
            first, last = t_max, self.t_min
        if self.path.levels:
            first = first if config.sigma_max is None else t_max
            last = last if config.sigma_min is None else self.t_min
        return time_grid(
            self.path,
            curve(config),
            n + more,
            last,
            first,
            levels=config.num_train_timesteps,
            rho=config.rho,
            slope=float(is_flow and not config.use_flow_sigmas),
        )[:n]

    def _solver(self, n):
        """The predictor of a trajectory of n steps, as `plan` takes it."""
        return (
            automatic(n, self._guidance_scale).predictor if self.config.predictor == "auto" else self.config.predictor
        )

    def _build_plan(self, times, predictor, options=None):
        return plan(
            self.path,
            times,
            predictor,
            to_data=self.config.denoise_final,
            options=self._given_options() if options is None else options,
            corrector=self.config.corrector,
            corrector_steps=self.config.corrector_steps,
            corrector_snr=self.config.corrector_snr,
            corrector_position=self.config.corrector_position,
        )

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

    def _require_plan(self) -> list[Stage]:
        if self._plan is None:
            raise ValueError("no trajectory is planned: call scheduler.set_timesteps(num_inference_steps) first")
        return self._plan

    def _enter(self, timestep) -> int:
        """The entry of the plan that is next; before the first step, the one at which the trajectory begins."""
        stages = self._require_plan()
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
            if PREDICTORS[self._predictor].multistep:
                # it has no past here: it begins again
                stages[start:] = self._build_plan(self._times[first_step:], self._predictor)
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
        return sample * self._rows[self._enter(timestep)][2]

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
        **kwargs,
    ):
        """Run the next entry of the plan.

        Args:
            model_output: the network's output for `scale_model_input(sample, timestep)`, (B, C, ...); (B, 2 C, ...)
                from a network that learned a variance, which ancestral sampling with learned_range uses.
            timestep: an entry of `timesteps`; it only matters for the first call, which finds its place by it.
            sample: the current sample (B, C, ...), any floating dtype; half precision is computed in float32.
            generator: source of the noise, one or one per sample.
            return_dict: return a `ScoreSDESchedulerOutput` instead of the tuple (prev_sample,).
            prev_timestep: passed by pipelines of UnCLIP and Kandinsky, which pass the next entry of `timesteps`; the
                step goes there anyway.
            use_clipped_model_output: instead of the scheduler's own, unless None.
            per_token_timesteps: (B, L) or (B, 1), what the network received as times of the tokens of a sample
                (B, L, C), whose model_output is then -flow_prediction, as in the pipelines that do so (LTX). Tokens
                with less noise than the plan's next step to its first lower one.
            kwargs: eta, which `DDIMPipeline` passes to every scheduler: above 0, the trajectory's. (Were it a
                parameter, other pipelines would pass 0 and overrule the scheduler's own.)

        Raises ValueError before `set_timesteps`, past the end of the plan, and for shapes that don't fit.
        """
        stages, at = self._require_plan(), self._enter(timestep)
        if kwargs:
            self._take_eta(at, **kwargs)
        if use_clipped_model_output is False and (self.config.clip_sample or self.config.thresholding):
            raise ValueError("use_clipped_model_output=False has no counterpart here: leave it out, or pass True")
        if at >= len(stages):
            raise ValueError(f"all {len(stages)} entries of the plan have run: call set_timesteps again")
        stage, variance = stages[at], None
        if sample.ndim > 1 and model_output.shape[1:2] == (2 * sample.shape[1],):
            model_output, variance = model_output.chunk(2, dim=1)
        elif stage.noise_range is not None and model_output.shape == sample.shape:
            raise ValueError(
                f"variance_type 'learned_range' needs a network with {2 * sample.shape[1]} output channels; "
                f"got {sample.shape[1]}: pass variance_type='fixed_small'"
            )
        if model_output.shape != sample.shape:
            raise ValueError(
                f"model_output has shape {tuple(model_output.shape)}, which does not fit sample {tuple(sample.shape)}"
            )
        dtype = torch.promote_types(sample.dtype, torch.float32)
        x = sample.to(dtype)

        def draw_noise():
            return randn_tensor(x.shape, generator=generator, device=x.device, dtype=dtype)

        if per_token_timesteps is not None:
            if self.config.prediction_type != "flow_prediction" or not isinstance(self.path, LinearSDE):
                raise ValueError(
                    f"per_token_timesteps are for prediction_type 'flow_prediction' of sde_type 'linear', not for "
                    f"{self.config.prediction_type!r} of {self.config.sde_type!r}"
                )
            if self._times_there is None or self._times_there.device != x.device:
                self._times_there = moved(torch.cat([self._times, torch.zeros(1)]).to(dtype), x.device)
            own, times = self.path_time(per_token_timesteps), self._times_there
            prev_sample, denoised = step_tokens(
                stage, self._memory, model_output.to(dtype), x, own, times, self._limit, draw_noise
            )
        else:
            a, b, _, alpha = self._rows[at]
            unlimited = torch.add(a * x, model_output.to(dtype), alpha=b)
            denoised = self._limit(unlimited)
            redone = (
                self.config.use_clipped_model_output if use_clipped_model_output is None else use_clipped_model_output
            )
            if redone is False and denoised is not unlimited:
                # the sample of the clipped one and the noise that the network had
                x = torch.add(x, denoised - unlimited, alpha=alpha)
            if variance is not None:
                variance = variance.to(dtype)
            prev_sample = stage.update(x, denoised, self._memory, draw_noise, variance)
        prev_sample = prev_sample.to(sample.dtype)
        self._step_index = at + 1
        if not return_dict:
            return (prev_sample,)
        return ScoreSDESchedulerOutput(prev_sample=prev_sample, pred_original_sample=denoised.to(sample.dtype))

    def _take_eta(self, at, eta):
        """Plan the rest of the trajectory with this amount of noise, where it is not 0 and not the scheduler's own."""
        options = self._given_options()
        if eta and not self._eta_taken and eta != options.get("eta"):
            self._plan[at:] = self._build_plan(self._times[at // self.order :], self._predictor, options | {"eta": eta})
            self._memory = Memory(self._plan)
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
