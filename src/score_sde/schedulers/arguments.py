"""What the arguments of a `ScoreSDEScheduler` mean together, and which contradict each other. What each of them may be
alone is in `checks`; what those of stock schedulers mean, in `stock_configs`."""

import inspect
import math

from .checks import NUMBERS, check_arguments, check_choice, check_number
from .paths import PREDICTIONS, SDE_TYPES, TIME_GRIDS, TIME_INPUTS
from .solvers import CORRECTORS, PREDICTORS, VARIANCES, predictor_options
from .stock_configs import GRIDS, VARIANCES_OF_STOCK


# what a network may be beside a denoiser
NETWORK_MAPS = (None, "flow_map", "consistency")
# options of predictors that are arguments, too
_OPTIONS = ("eta", "s_churn", "s_tmin", "s_tmax", "s_noise")


def check_config(build, config):
    """Raise ValueError for an argument that may not be what it is, and for those that contradict each other; `build` is
    the class that takes them."""
    choices = {
        "sde_type": SDE_TYPES,
        "prediction_type": PREDICTIONS,
        "predictor": ("auto", *PREDICTORS),
        "corrector": (None, *CORRECTORS),
        "corrector_position": ("after", "before"),
        "variance_type": (*VARIANCES, *VARIANCES_OF_STOCK, "learned"),
        "timestep_spacing": TIME_GRIDS,
        "time_shift_type": ("exponential", "linear"),
        "interpolation_type": ("linear", "log_linear"),
        "timestep_type": ("discrete", "continuous"),
        "init_noise": (None, "sigma", "unit_data"),
        "use_clipped_model_output": (True, False, None),
        "network_map": NETWORK_MAPS,
    }
    for name, allowed in choices.items():
        check_choice(name, config[name], allowed)
    check_arguments(build, config)
    if sum(config[flag] for flag in GRIDS) > 1:
        raise ValueError(
            "at most one of use_karras_sigmas, use_exponential_sigmas, use_lu_lambdas and use_beta_sigmas can be True"
        )
    for name in ("use_flow_sigmas", "invert_sigmas"):
        if config[name] and config["sde_type"] != "linear":
            raise ValueError(
                f"{name}=True has no counterpart on sde_type {config['sde_type']!r}: pass sde_type='linear', or leave "
                f"it out"
            )
    if config["shift_terminal"] is not None and config["sde_type"] != "linear":
        raise ValueError(
            f"shift_terminal {config['shift_terminal']} is for sde_type 'linear', not for {config['sde_type']!r}"
        )
    if config["domain"] is not None:
        _check_domain(config)
    _check_solver(build, config)
    _check_calibration(config["calibration"])
    _check_map(config)


def _check_map(config):
    """Raise ValueError for what does not go with the kind of map that the network is."""
    network_map, predictor = config["network_map"], config["predictor"]
    original, levels = config["original_inference_steps"], config["num_train_timesteps"]
    if original is not None and original > levels:
        raise ValueError(f"original_inference_steps {original} must be at most num_train_timesteps {levels}")
    maps = predictor in PREDICTORS and PREDICTORS[predictor].maps
    if network_map is None:
        if maps or config["map_steps"] is not None:
            given = f"predictor {predictor!r}" if maps else f"map_steps {config['map_steps']}"
            raise ValueError(
                f"{given} is for a network that maps along the ODE: say how it was trained, network_map='flow_map' or "
                f"'consistency', or leave it out"
            )
        return
    if config["calibration"]:
        raise ValueError(
            f"calibration is of a denoiser's ODE, not for network_map {network_map!r}: pass calibration=None"
        )
    if network_map == "consistency" and predictor not in ("auto", "consistency"):
        raise ValueError(
            f"predictor {predictor!r} needs a network of denoised samples; network_map 'consistency' gives ends of its "
            f"map: pass predictor 'auto' or 'consistency'"
        )
    if network_map == "consistency" and config["corrector"] is not None:
        raise ValueError(
            f"corrector {config['corrector']!r} needs a score, and network_map 'consistency' gives none: leave it out"
        )


# on a domain: the rest has no meaning there, or was not shown to work
ON_DOMAINS = {
    "sde_type": ("ve",),
    "prediction_type": ("score", "epsilon"),
    "predictor": ("auto", "euler", "heun", "ddim", "deis_2", "euler_maruyama", "reverse_diffusion", "none"),
    # langevin's step has no bound where the score vanishes, as it does at much noise
    "corrector": (None, "annealed_langevin"),
    "clip_sample": (False,),
    "thresholding": (False,),
    "init_noise": (None,),
    "network_map": (None,),
}


def _check_domain(config):
    """Raise ValueError for what has no meaning on a domain."""
    for name, allowed in ON_DOMAINS.items():
        if config[name] not in allowed:
            raise ValueError(
                f"{name} {config[name]!r} has no meaning on domain {config['domain']!r}; choose one of "
                f"{', '.join(map(str, allowed))}"
            )


def _check_solver(build, config):
    """Raise ValueError for options that the predictor doesn't have, or that contradict each other."""
    if not isinstance(config["predictor_kwargs"], dict | None):
        raise ValueError(f"predictor_kwargs {config['predictor_kwargs']!r} must be a dictionary, or None")
    options = predictor_options(config["predictor"], given_options(build, config))
    if options.get("s_churn") and config["corrector"]:
        raise ValueError(f"s_churn {options['s_churn']} does not go with a corrector: leave out one of them")
    if config["predictor"] == "none" and config["corrector"] is None:
        raise ValueError(f"predictor 'none' needs a corrector; choose one of {', '.join(CORRECTORS)}")


def _check_calibration(calibration):
    """Raise ValueError unless `calibration` holds what `calibrate` writes: None, or {number of steps: [predictor,
    times, what they were fitted with]}, the last of which may be left out."""
    if not isinstance(calibration, dict | None):
        raise ValueError(f"calibration {calibration!r} must be a dictionary, as `calibrate` writes it, or None")
    for n, entry in (calibration or {}).items():
        if not isinstance(entry, (list, tuple)) or len(entry) not in (2, 3) or not isinstance(entry[1], (list, tuple)):
            raise ValueError(f"calibration {n!r} must hold a predictor and a list of times, not {entry!r}")
        predictor, times, *made_with = entry
        check_choice(f"predictor of calibration {n!r}", predictor, PREDICTORS)
        for time in times:
            check_number(f"time of calibration {n!r}", time, 0, 1)
        falls = all(a > b for a, b in zip(times, times[1:], strict=False))
        if str(len(times)) != n or not falls or not times or times[-1] <= 0:
            raise ValueError(f"calibration {n!r} must hold as many times, falling strictly from at most 1: {times}")
        for facts in made_with:
            if not isinstance(facts, dict):
                raise ValueError(f"calibration {n!r} must say in a dictionary what it was fitted with, not {facts!r}")
            check_number(f"shift of calibration {n!r}", facts.get("shift", 1.0), *NUMBERS["shift"])


def given_options(build, config):
    """The options of the predictor that were given, by their own names or in `predictor_kwargs`.

    Raises ValueError for one that is given twice.
    """
    flat, defaults = {name: config[name] for name in _OPTIONS}, inspect.signature(build).parameters
    given = {name: value for name, value in flat.items() if value != defaults[name].default or isinstance(value, bool)}
    for name, value in (config["predictor_kwargs"] or {}).items():
        if name in given and given[name] != value:
            raise ValueError(f"{name} is given twice: {given[name]}, and {value} in predictor_kwargs")
        given[name] = value
    row = PREDICTORS.get(config["predictor"])
    # a fact of the trained network, told also where the predictor has no use for it
    if row is not None and "variance_type" in row.takes:
        own = VARIANCES_OF_STOCK.get(config["variance_type"], config["variance_type"])
        given.setdefault("variance_type", own)
    return given


def time_told(path, config):
    """{time_input, time_scale, time_offset} of a network, with the path's own where the config says None."""
    time_input = path.time_input if config["time_input"] is None else config["time_input"]
    check_choice("time_input", time_input, TIME_INPUTS)
    levels, is_inverted = config["num_train_timesteps"], config["invert_sigmas"]
    scale, offset = config["time_scale"], config["time_offset"]
    if scale is None:
        own = {"t": levels, "log_sigma": levels / 4}.get(time_input, 1)
        scale = -levels if is_inverted else own
    if offset is None:
        offset = levels if is_inverted else path.time_offset
    return {"time_input": time_input, "time_scale": float(scale), "time_offset": float(offset)}


def begin_std(path, config, t_max):
    """The standard deviation of the noise that sampling starts from at t_max."""
    alpha, sigma = float(path.alpha(t_max)), float(path.sigma(t_max))
    return {
        None: path.prior_std * sigma / float(path.sigma(1.0)),
        "sigma": sigma,
        "unit_data": math.hypot(alpha, sigma),
    }[config["init_noise"]]
