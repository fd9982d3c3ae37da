"""The times of a trajectory: the grids that the config of a `ScoreSDEScheduler` asks for, auto's own, and times that
are given; and the numbers that stand for times outside, `timesteps` and `sigmas`. The grids' formulas are in `paths`.
"""

import math
import warnings

import torch

from .checks import NUMBERS, as_list, check_number
from .paths import LinearSDE, karras_level_times, shifted, time_grid
from .solvers import automatic
from .stock_configs import GRIDS, curve


# --- grids ------------------------------------------------------------------------------------------------------------


# auto's on domains, on the grid of timestep_spacing
ON_DOMAINS = "deis_2"


def solver(scheduler, n):
    """The predictor of a trajectory of n steps, as `plan` takes it."""
    predictor = scheduler.config.predictor
    if predictor != "auto":
        return predictor
    if scheduler.domain is not None:
        return ON_DOMAINS
    return scheduler.config.network_map or _rule(scheduler, n).predictor


def _rule(scheduler, n):
    """That of auto for n steps."""
    return automatic(n, scheduler._guidance_scale, -float(scheduler.path.half_log_snr(1.0)))


def grid(scheduler, n, t_max, shift=1.0, original=None, strength=1.0):
    """The times of n steps up to t_max; `original` and `strength` as `check_original` takes them."""
    if scheduler.config.predictor != "auto" or scheduler.domain is not None or original is not None:
        return stock_grid(scheduler, n, t_max, shift, original, strength)
    if strength < 1:
        t_max = float(_spaced(scheduler, "skipping", 1, t_max, strength=strength)[0])
    if scheduler.config.network_map is not None:
        return shifted(scheduler.path, _spaced(scheduler, "straight", n, t_max), shift)
    rule = _rule(scheduler, n)
    # half as far as the stock grid: good for data that ask for the whole of it, and for data that ask for none
    center = rule.center - math.log(shift) / 2
    return _spaced(scheduler, "logistic", n, t_max, center=center, width=rule.width, tail=rule.tail)


def stock_grid(scheduler, n, t_max, shift, original=None, strength=1.0):
    """The same, of timestep_spacing and the stock schedulers' keys beside it, whatever the predictor."""
    config = scheduler.config
    spacing = config.timestep_spacing
    if config.use_flow_sigmas and spacing in ("leading", "trailing"):
        # as the stock schedulers have it
        spacing = "linspace"
    if config.original_inference_steps is not None:
        spacing = "skipping"
    times = _spaced(scheduler, spacing, n, t_max, original, rho=config.rho, strength=strength)
    times = _stretched(config, shifted(scheduler.path, times, shift))
    return _curved(scheduler, times, t_max) if curve(config) else times


def _spaced(scheduler, spacing, n, t_max, original=None, **options):
    config = scheduler.config
    return time_grid(
        scheduler.path,
        spacing,
        # a trajectory that stops early takes n steps without an evaluation at its end
        n if config.denoise_final else n + 1,
        scheduler.t_min,
        t_max,
        levels=config.num_train_timesteps,
        offset=config.steps_offset,
        open_end=config.open_end,
        whole_levels=config.whole_levels,
        to_data=config.denoise_final,
        original=original or config.original_inference_steps,
        **options,
    )


def check_original(scheduler, original, strength):
    """Raise ValueError unless a trajectory can be on the first int(original * strength) of `original` steps of
    training, as the pipelines of LCM ask for it; None for the config's."""
    config = scheduler.config
    if original is not None:
        check_number("original_inference_steps", original, 1, config.num_train_timesteps, whole=True)
    check_number("strength", strength, 0, 1)
    if config.original_inference_steps is None and (original is not None or strength < 1):
        given = f"strength {strength:g}" if original is None else f"original_inference_steps {original}"
        raise ValueError(
            f"{given} is of a grid of original steps, as diffusers' LCM and TCD schedulers have it, and this scheduler "
            f"has none: leave it out, or say how many steps the network's training had, "
            f"ScoreSDEScheduler.from_config(scheduler.config, original_inference_steps=50)"
        )


def _stretched(config, times):
    """The times of the linear path, with the last at shift_terminal."""
    if config.shift_terminal is None:
        return times
    return 1 - (1 - times) * (1 - config.shift_terminal) / (1 - times[-1])


def _curved(scheduler, times, t_max):
    """As many times, on the grid that one of the use_..._sigmas asks for, between the ends of these or, where the
    config says so, of the path or of its own."""
    config, path, is_flow = scheduler.config, scheduler.path, isinstance(scheduler.path, LinearSDE)
    n = len(times)
    # log_linear alone takes n of n + 1
    more = not any(config[flag] for flag in GRIDS)
    first, last = float(times[0]), float(times[-1])
    if config.open_end or config.interpolation_type == "log_linear" or not (is_flow or path.levels):
        first, last = t_max, scheduler.t_min
    if path.levels:
        first = first if config.sigma_max is None else t_max
        last = last if config.sigma_min is None else scheduler.t_min
    return time_grid(
        path,
        curve(config),
        n + more,
        last,
        first,
        levels=config.num_train_timesteps,
        rho=config.rho,
        slope=float(is_flow and not config.use_flow_sigmas),
    )[:n]


def ends_of_sigmas(path, config):
    """The times of sigma_min and sigma_max where they are the ends of a grid on a chain of levels, None otherwise.

    Raises ValueError for one that is none of the chain's.
    """
    ends = {"sigma_min": None, "sigma_max": None}
    if path.levels and any(config[flag] for flag in GRIDS):
        least, most = (float(torch.exp(-path.half_log_snr(t))) for t in (path.t_min, 1.0))
        for name in ends:
            value = config[name]
            if value is not None and not least * (1 - 1e-3) <= value <= most * (1 + 1e-3):
                raise ValueError(f"{name} {value} is none of the chain's levels, from {least:.4g} to {most:.4g}")
            if value is not None:
                time = float(path.t_from_half_log_snr(-math.log(value)))
                ends[name] = min(max(time, path.t_min), 1.0)
    return ends.values()


def shift_of(scheduler, mu):
    """The shift of a trajectory with this `mu`."""
    config = scheduler.config
    if not config.use_dynamic_shifting:
        return scheduler.shift
    if mu is None:
        raise ValueError("use_dynamic_shifting needs the shift of this trajectory: pass mu to set_timesteps")
    shift = math.exp(mu) if config.time_shift_type == "exponential" else mu
    check_number(f"the shift of mu {mu},", shift, *NUMBERS["shift"])
    return shift


# --- times that are given ---------------------------------------------------------------------------------------------


def given_times(scheduler, timesteps, sigmas, shift):
    """The times of given numbers, one of the two, as `ScoreSDEScheduler.set_timesteps` takes them."""
    config, path, is_flow = scheduler.config, scheduler.path, isinstance(scheduler.path, LinearSDE)
    given, name = (sigmas, "sigmas") if timesteps is None else (timesteps, "timesteps")
    values = torch.tensor(as_list(name, given), dtype=torch.float64)
    if timesteps is not None and are_numbers_of_levels(scheduler, timesteps):
        return _numbered(scheduler, values)
    if timesteps is not None and values[-1] == 0 and len(values) > 1 and ends_with_zero(config):
        values = values[:-1]
    if timesteps is not None:
        times, largest, rounding = scheduler.path_time(values), float(scheduler.timestep(1.0)), 1e-6
    else:
        if values[-1] == 0 and len(values) > 1:
            values = values[:-1]
        times = values if is_flow else path.t_from_half_log_snr(-values.log())
        # published tables are rounded
        largest, rounding = (1.0, 1e-6) if is_flow else (float(torch.exp(-path.half_log_snr(1.0))), 1e-3)
    small = values[0] <= largest + rounding * abs(largest) and times[0] <= 1 + rounding
    times = times.clamp_max(1.0)
    if sigmas is not None:
        times = _stretched(config, shifted(path, times, shift)).clamp_max(scheduler.t_max)
        if is_flow and not config.use_flow_sigmas and curve(config):
            times = _curved(scheduler, times, float(times[0]))
    if not small or not (times.diff() < 0).all() or not times[-1] > 0:
        raise ValueError(f"{name} {values.tolist()} must fall strictly, from at most {largest:g}")
    return times


def are_numbers_of_levels(scheduler, timesteps):
    """Whether these number levels, 0 the noisiest, and are not what the network receives: whole numbers (by their type)
    where it receives log sigma and the grid is karras_levels, as of diffusers' CMStochasticIterativeScheduler."""
    is_numbered = scheduler.config.timestep_spacing == "karras_levels"
    if not is_numbered or scheduler.parameterization.time_input != "log_sigma":
        return False
    return not torch.is_floating_point(torch.as_tensor(timesteps))


def _numbered(scheduler, numbers):
    """The times of levels of karras_levels, given as in diffusers by their falling numbers."""
    config, levels = scheduler.config, scheduler.config.num_train_timesteps
    if not (numbers.diff() < 0).all() or numbers[0] >= levels or numbers[-1] < 0:
        raise ValueError(
            f"timesteps {numbers.long().tolist()} are whole, so that they number levels of noise, as with diffusers' "
            f"CMStochasticIterativeScheduler, and must fall strictly, from at most {levels - 1} to at least 0, the "
            f"noisiest: pass floats for what the network receives"
        )
    return karras_level_times(scheduler.path, numbers.flip(0), scheduler.t_min, scheduler.t_max, levels, config.rho)


def first_of(scheduler, timesteps, original, strength):
    """Of given timesteps those that LCM's pipelines mean by a strength: the last int(strength * number).

    Raises ValueError where none is left. Warns of those that are none of the `original` steps, where it is given.
    """
    timesteps = as_list("timesteps", timesteps)
    if original is not None:
        size = scheduler.config.num_train_timesteps // original
        others = [value for value in timesteps if (value + 1) % size or not 0 < value + 1 <= size * original]
        if others:
            warnings.warn(
                f"timesteps {others} are none of the {original} original_inference_steps, the multiples of {size} "
                f"less 1: they are evaluated, though the network may not have been trained there",
                stacklevel=3,
            )
    left = int(len(timesteps) * strength)
    if not left:
        raise ValueError(f"strength {strength:g} leaves none of the {len(timesteps)} timesteps: pass more of either")
    return timesteps[-left:]


def are_of_flow_pipelines(path, sigmas):
    """Whether these are the levels from 1 to 1 / n that the pipelines of flow matching pass, whatever the scheduler."""
    n = len(sigmas)
    own = torch.linspace(1, 1 / n, n, dtype=torch.float64)
    is_even = bool((torch.tensor(as_list("sigmas", sigmas), dtype=torch.float64) - own).abs().max() < 1e-6)
    return isinstance(path, LinearSDE) and is_even


# --- what is told of times --------------------------------------------------------------------------------------------


def told_timesteps(scheduler, times):
    """`timesteps` for these times of evaluation: what the network receives; whole numbers where a chain's are."""
    received = scheduler.timestep(times)
    if scheduler.path.levels and torch.equal(received, received.round()):
        received = received.long()
    if ends_with_zero(scheduler.config):
        received = torch.cat([received, torch.zeros(1).to(received)])
    return received


def ends_with_zero(config):
    """Whether `timesteps` end with clean data, where nothing is evaluated: Wuerstchen's pipelines leave out the last of
    them."""
    is_told_shares = config.beta_schedule == "wuerstchen" and config.time_scale == 1
    return is_told_shares and config.denoise_final


def told_ends(scheduler, stages):
    """`timesteps_to` for these stages: float32; nearer to clean data than t_min no network was trained."""
    ends = [stage.t_eval if stage.t_to is None else max(stage.t_to, scheduler.t_min) for stage in stages]
    return scheduler.timestep(torch.tensor(ends, dtype=torch.float64))


def noise_levels(path, times):
    """The noise levels of times as diffusers counts them: see `ScoreSDEScheduler.set_timesteps`."""
    return times if isinstance(path, LinearSDE) else torch.exp(-path.half_log_snr(times))


def told_sigmas(scheduler, times):
    """`sigmas` for these times of evaluation: float32, and a last one of clean data."""
    levels = noise_levels(scheduler.path, times)
    levels = torch.cat([levels, torch.zeros(1).to(levels)])
    return (1 - levels if scheduler.config.invert_sigmas else levels).float()
