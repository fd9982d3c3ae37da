"""What the config of a stock diffusers scheduler means, key by key: a key that changes the path, the times or the
prediction is honoured, or refused by name; none of these is ignored."""

import inspect

from diffusers import schedulers


# the stock schedulers of a chain of betas, and what each fixes beside its config
ACCEPTED = {
    "DDPMScheduler": {},
    "DDPMParallelScheduler": {},
    "DDIMScheduler": {},
    "DDIMParallelScheduler": {},
    "PNDMScheduler": {},
    "LMSDiscreteScheduler": {},
    "EulerDiscreteScheduler": {},
    "EulerAncestralDiscreteScheduler": {},
    "HeunDiscreteScheduler": {},
    "KDPM2DiscreteScheduler": {},
    "KDPM2AncestralDiscreteScheduler": {},
    "DPMSolverSDEScheduler": {},
    "DPMSolverMultistepScheduler": {"open_end": True},
    "DPMSolverSinglestepScheduler": {"open_end": True},
    "DEISMultistepScheduler": {"open_end": True},
    "UniPCMultistepScheduler": {"open_end": True},
    "SASolverScheduler": {"open_end": True},
    "UnCLIPScheduler": {},
    # their clip_sample has no effect
    "CogVideoXDDIMScheduler": {"clip_sample": False},
    "CogVideoXDPMScheduler": {"clip_sample": False},
}
# those of Song et al. 2021: what each fixes, and all of its keys by their names here
SCORE_SDE = {
    "ScoreSdeVeScheduler": (
        {"sde_type": "ve", "prediction_type": "score", "time_input": "sigma"},
        {"num_train_timesteps": "num_train_timesteps", "sigma_min": "sigma_min", "sigma_max": "sigma_max"}
        | {"sampling_eps": "t_min", "snr": "corrector_snr", "correct_steps": "corrector_steps"},
    ),
    "ScoreSdeVpScheduler": (
        {"sde_type": "vp", "prediction_type": "epsilon", "time_scale": 1.0},
        {"num_train_timesteps": "num_train_timesteps", "beta_min": "beta_min", "beta_max": "beta_max"}
        | {"sampling_eps": "t_min"},
    ),
}
# those of flow matching on the straight path, and what each fixes
FLOW_MATCHING: dict[str, dict] = {
    "FlowMatchEulerDiscreteScheduler": {},
    "FlowMatchHeunDiscreteScheduler": {},
}
# of flow matching, honoured under the same name
FLOW = ("num_train_timesteps", "shift", "use_dynamic_shifting", "time_shift_type", "shift_terminal")
# what only pipelines read, to work out the shift of an image's size
READ_BY_PIPELINES = ("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len")
# those with the same keys that mean something else
REFUSED = {
    "LCMScheduler": "its network is a consistency model, which no solver can sample",
    "TCDScheduler": "its network is a consistency model, which no solver can sample",
    "DDIMInverseScheduler": "it runs from data to noise; take the config of the scheduler that samples",
    "DPMSolverMultistepInverseScheduler": "it runs from data to noise; take the config of the scheduler that samples",
    "FlowMatchLCMScheduler": "its network is a consistency model, which no solver can sample",
    "RePaintScheduler": "it fills masks; take the config of the network's training, and ScoreSDEInversePipeline",
}

# --- keys of the schedulers of a chain of betas -----------------------------------------------------------------------

# honoured, under the same name
SAME = (
    ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")
    + ("snr_shift_scale", "steps_offset", "clip_sample", "clip_sample_range")
    + ("thresholding", "dynamic_thresholding_ratio", "sample_max_value")
)
# honoured, for these values: what they are here
VALUES = {
    "prediction_type": {"epsilon": "epsilon", "sample": "sample", "original_sample": "sample"}
    | {"v_prediction": "v_prediction"},
    "timestep_spacing": {"linspace": "linspace", "leading": "leading", "trailing": "trailing"},
    # DDPM's names; other schedulers, which add no such noise, say None
    "variance_type": {None: "fixed_small", "fixed_small": "fixed_small", "fixed_small_log": "fixed_small"}
    | {"fixed_large": "fixed_large", "fixed_large_log": "fixed_large", "learned_range": "learned_range"},
}
# honoured, as this timestep_spacing
GRIDS = {"use_karras_sigmas": "karras", "use_exponential_sigmas": "log_snr", "use_lu_lambdas": "log_snr"}
# refused, but for one value; and what to do instead. Those of flow matching are honoured with use_flow_sigmas.
_FLOW = "of flow matching: set use_flow_sigmas, or build ScoreSDEScheduler(sde_type='linear', ...)"
NEUTRAL = {
    "use_flow_sigmas": (False, _FLOW),
    "use_dynamic_shifting": (False, _FLOW),
    "flow_shift": (1.0, _FLOW),
    "shift_terminal": (None, _FLOW),
    "use_beta_sigmas": (False, "a grid of sigma; timestep_spacing='beta' is one of t"),
    "interpolation_type": ("linear", "timestep_spacing='log_snr' is a grid of log sigma"),
    "timestep_type": ("discrete", "build ScoreSDEScheduler(sde_type='edm', time_input='log_sigma', time_scale=0.25)"),
    "invert_sigmas": (False, "its network's time and output run the other way round"),
    "lambda_min_clipped": (-float("inf"), "pass t_max instead"),
    "sigma_min": (None, "pass t_min instead"),
    "sigma_max": (None, "pass t_max instead"),
}
# of the stock scheduler's own steps: they change neither the path nor the times of evaluation nor what the network
# predicts. Wherever its last step leads, ours leads to clean data (or stops early, with denoise_final=False).
SOLVER = (
    ("solver_order", "solver_type", "algorithm_type", "lower_order_final", "euler_at_final", "predict_x0", "solver_p")
    + ("disable_corrector", "predictor_order", "corrector_order", "tau_func", "skip_prk_steps", "noise_sampler_seed")
    + ("set_alpha_to_one", "final_sigmas_type", "time_shift_type", "stochastic_sampling")
)


def from_stock_config(config, own):
    """The config of a `ScoreSDEScheduler` on the path, with the times and the prediction, of the stock scheduler with
    this config. Keys that it lacks, as old files do, have the stock class's defaults. What is none of `own`, our
    arguments, stays in it for the way back.

    Raises ValueError for a scheduler without a known path, and for a key whose value has no counterpart here.
    """
    stock = {key: value for key, value in config.items() if key != "_use_default_values"}
    name = _class_name(stock)
    if name in REFUSED:
        raise ValueError(f"{name} has no counterpart here: {REFUSED[name]}")
    if name not in ACCEPTED and name not in SCORE_SDE and name not in FLOW_MATCHING:
        known = ", ".join((*ACCEPTED, *SCORE_SDE, *FLOW_MATCHING))
        raise ValueError(
            f"no noise path is known for the config of {name or 'this scheduler'}: from_config takes those of {known}; "
            f"build others as ScoreSDEScheduler(sde_type=..., ...)"
        )
    defaults = _defaults(name)
    if not defaults:
        raise ValueError(f"{name} is not importable here, so what its config means is unknown: install what it needs")
    given = defaults | {key: value for key, value in stock.items() if key in defaults}
    if name in SCORE_SDE:
        fixed, names = SCORE_SDE[name]
        return fixed | {ours: given[key] for key, ours in names.items()}

    if name in FLOW_MATCHING or given.get("use_flow_sigmas"):
        return _of_flow_matching(name, given, {key: value for key, value in stock.items() if key not in own})
    refuse_unknown_meaning(stock)
    keys = {*SAME, *VALUES, *GRIDS, *NEUTRAL, *SOLVER}
    # a config in memory may also hold keys of another class, from which it was made
    for key in sorted(given if "_class_name" in stock else given.keys() | stock.keys()):
        if key not in keys and not key.startswith("_"):
            raise ValueError(
                f"{key}={(given | stock)[key]!r} of {name} has no known meaning: leave it out if it changes "
                f"neither the path nor the times nor the prediction"
            )
    ours = {"sde_type": "discrete_vp", "clip_sample": False, "thresholding": False, "timestep_spacing": "linspace"}
    ours |= {key: given[key] for key in SAME if key in given}
    # None would be our default
    for key in SAME:
        if ours.get(key) is None and defaults.get(key) is not None:
            raise ValueError(f"{key}=None of {name} has no meaning: leave it out, or give a value")
    for key, values in VALUES.items():
        if key in given:
            if given[key] not in list(values):
                allowed = ", ".join(map(str, values))
                raise ValueError(f"{key} {given[key]!r} of {name} has no counterpart here; those that have: {allowed}")
            ours[key] = values[given[key]]
    ours |= ACCEPTED[name]
    ours |= {flag: bool(given.get(flag)) for flag in GRIDS}
    flags = [flag for flag in GRIDS if ours[flag]]
    if flags and "open_end" not in ours and ours["timestep_spacing"] != "linspace":
        raise ValueError(
            f"{flags[0]} of {name} reaches as far as its timestep_spacing {ours['timestep_spacing']!r} does, which "
            f"has no counterpart here: set timestep_spacing to 'linspace'"
        )
    # by its name diffusers tells whose the other keys are
    return {key: value for key, value in stock.items() if key not in own} | {"_class_name": name} | ours


def _of_flow_matching(name, given, hidden):
    """The config of the straight path for a stock scheduler of flow matching, or with use_flow_sigmas; `hidden` is what
    goes along for the way back and for pipelines."""
    for key in (*GRIDS, "use_beta_sigmas"):
        if given.get(key):
            remedy = NEUTRAL[key][1] if key in NEUTRAL else "a grid of sigma, not of sigma / alpha; leave it out"
            raise ValueError(f"{key}={given[key]!r} of {name} has no counterpart here: {remedy}")
    prediction = "flow_prediction" if name in FLOW_MATCHING else given["prediction_type"]
    if prediction not in ("flow_prediction", *VALUES["prediction_type"]):
        raise ValueError(f"prediction_type {prediction!r} of {name} has no counterpart here")
    ours = {"sde_type": "linear", "prediction_type": VALUES["prediction_type"].get(prediction, prediction)}
    honoured = (*FLOW, "thresholding", "dynamic_thresholding_ratio", "sample_max_value")
    ours |= {key: given[key] for key in honoured if key in given} | {"timestep_spacing": "linspace"}
    levels = given["num_train_timesteps"]
    if given.get("invert_sigmas"):
        # time and output run from noise to data
        ours |= {"prediction_type": "inverse_flow_prediction", "time_scale": -levels, "time_offset": levels}
    # where their grids end: those of DPM-Solver at 0, but for the step that leads there
    if name in FLOW_MATCHING:
        least = 1 / levels
        shift = 1 if given.get("use_dynamic_shifting") else given["shift"]
        # twice shifted, as there: by the class and by set_timesteps; with one level theirs has no grid of its own
        t_min = shift * least / (1 + (shift - 1) * least) if levels > 1 else None
        return hidden | {"_class_name": name} | ours | {"t_min": t_min}
    ours |= {"shift": given["flow_shift"], "open_end": True}
    ours |= {"t_min": 1 / levels} if name == "UniPCMultistepScheduler" else {"t_min": 1e-6, "t_max": 1 - 1 / levels}
    return hidden | {"_class_name": name} | ours


def refuse_unknown_meaning(config, but=()):
    """Raise ValueError where a key of NEUTRAL, but for those named in `but`, has a value with no counterpart here."""
    if config.get("sde_type") == "linear":
        but = (*but, "use_flow_sigmas", "flow_shift", "invert_sigmas")
    for key, (neutral, remedy) in NEUTRAL.items():
        if key not in but and config.get(key) not in (None, neutral):
            raise ValueError(
                f"{key}={config[key]!r} has no counterpart in from_config, which takes {neutral!r}: {remedy}"
            )


def _class_name(config):
    """The stock class that a config is of; None where it can not be told."""
    if isinstance(config.get("_class_name"), str):
        return config["_class_name"]
    # in memory it does not say: the class with the most keys, all of which it has
    sizes = {
        name: len(_defaults(name))
        for name in (*ACCEPTED, *SCORE_SDE, *FLOW_MATCHING, *REFUSED)
        if _defaults(name).keys() <= config.keys()
    }
    return max((name for name in sizes if sizes[name]), key=sizes.get, default=None)


def _defaults(name):
    """{argument: default} of a scheduler class of diffusers; empty where what it needs is not installed."""
    parameters = inspect.signature(getattr(schedulers, name)).parameters.values()
    return {each.name: each.default for each in parameters if each.kind == each.POSITIONAL_OR_KEYWORD}
