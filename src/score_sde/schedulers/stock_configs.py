"""What the config of a stock diffusers scheduler means, key by key: a key that changes the path, the times or the
prediction is honoured, or refused by name; none of these is ignored. Keys keep their names and values here, so that the
stock scheduler can be made again from a config of ours."""

import inspect
import math

import torch
from diffusers import schedulers

from .paths import DiscreteVPSDE, wuerstchen_betas


# --- the classes ------------------------------------------------------------------------------------------------------

# their linspace grids have times between levels
_BETWEEN = {"whole_levels": False}
# their grids of noise levels reach as far as the path
_OPEN = {"open_end": True}
# their rescale_betas_zero_snr leaves the last level no signal at all
_TO_NOISE = {"exact_zero_snr": True}
# the stock schedulers of a chain of betas, and what each fixes beside its config
ACCEPTED: dict[str, dict] = {
    "DDPMScheduler": _TO_NOISE,
    "DDPMParallelScheduler": _TO_NOISE,
    "DDIMScheduler": {"use_clipped_model_output": False} | _TO_NOISE,
    "DDIMParallelScheduler": {"use_clipped_model_output": False} | _TO_NOISE,
    "PNDMScheduler": {},
    "LMSDiscreteScheduler": _BETWEEN,
    "EulerDiscreteScheduler": _BETWEEN,
    "EulerAncestralDiscreteScheduler": _BETWEEN,
    "HeunDiscreteScheduler": _BETWEEN,
    "KDPM2DiscreteScheduler": _BETWEEN,
    "KDPM2AncestralDiscreteScheduler": _BETWEEN,
    "DPMSolverSDEScheduler": _BETWEEN,
    "DPMSolverMultistepScheduler": _OPEN,
    "DPMSolverSinglestepScheduler": _OPEN,
    "DEISMultistepScheduler": _OPEN,
    "UniPCMultistepScheduler": _OPEN,
    "SASolverScheduler": _OPEN,
    "UnCLIPScheduler": {},
    # their clip_sample has no effect
    "CogVideoXDDIMScheduler": {"use_clipped_model_output": None} | _TO_NOISE,
    "CogVideoXDPMScheduler": {"use_clipped_model_output": None} | _TO_NOISE,
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
# those of Karras et al. 2022, and the time that their networks are told
EDM: dict[str, dict] = {
    "EDMEulerScheduler": {"time_input": "log_sigma", "time_scale": 0.25},
    "EDMDPMSolverMultistepScheduler": {"time_input": "log_sigma", "time_scale": 0.25},
    "CosineDPMSolverMultistepScheduler": {"time_input": "atan_sigma", "time_scale": 2 / math.pi},
}
# those of flow matching on the straight path, and what each fixes
FLOW_MATCHING: dict[str, dict] = {
    "FlowMatchEulerDiscreteScheduler": {},
    "FlowMatchHeunDiscreteScheduler": {},
    # its grid is made by FlowMatchEuler from the same config
    "LTXEulerAncestralRFScheduler": {},
    "MiniMaxH3Scheduler": {
        "invert_sigmas": True,
        "time_scale": -1.0,
        "time_offset": 1.0,
        "timestep_spacing": "to_zero",
    },
}
WUERSTCHEN = "DDPMWuerstchenScheduler"
# those whose networks map along the ODE, and what each fixes; number of steps as the pipelines of each have it
_CONSISTENCY = {"network_map": "consistency", "predictor": "consistency"}
MAPS: dict[str, dict] = {
    "LCMScheduler": _CONSISTENCY | _TO_NOISE | {"map_steps": 4},
    # to its level 0, whose noise stays; gamma is the default of its step; its clip_sample has no effect
    "TCDScheduler": _CONSISTENCY
    | _TO_NOISE
    | {"map_steps": 4, "predictor_kwargs": {"gamma": 0.3}, "denoise_final": False}
    | {"use_clipped_model_output": None},
    "CMStochasticIterativeScheduler": _CONSISTENCY
    | {"map_steps": 1, "sde_type": "edm", "prediction_type": "edm_consistency", "denoise_final": False}
    | {"timestep_spacing": "karras_levels", "time_input": "log_sigma", "time_scale": 250.0, "time_offset": 0.0},
    # its networks are told 0 in the end
    "FlowMapEulerDiscreteScheduler": {"network_map": "flow_map", "predictor": "flow_map", "map_steps": 4}
    | {"sde_type": "linear", "prediction_type": "flow_prediction", "timestep_spacing": "to_zero", "t_min": 1e-9},
}
TAKEN = (*ACCEPTED, *SCORE_SDE, *EDM, *FLOW_MATCHING, WUERSTCHEN, *MAPS)

_INVERSE = "it runs from data to noise; take the config of the scheduler that samples"
_TOKENS = "its samples are tokens, whose noise is not Gaussian"
_STAGES = "it changes the size of the sample within a trajectory, and adds noise as it does"
# those that mean something else, some by the same keys
REFUSED = {
    "FlowMatchLCMScheduler": "it changes the size of the sample within a trajectory, or the grid as it does",
    "ConsistencyDecoderScheduler": "its network decodes latents, in two fixed steps",
    "SCMScheduler": "its path, the cosine and sine of an angle, with noise of the data's standard deviation, is none "
    "here (cosine_vp has an offset), and its pipelines pass angles beside the number of steps, to a grid that ends "
    "with 0",
    "PiflowScheduler": "its network returns a policy for a whole step, not one denoised sample",
    "DDIMInverseScheduler": _INVERSE,
    "DPMSolverMultistepInverseScheduler": _INVERSE,
    "RePaintScheduler": "it fills masks; take the config of the network's training, and ScoreSDEInversePipeline",
    "IPNDMScheduler": "its noise sin(pi t / 2) is that of no path here; cosine_vp has an offset",
    "KarrasVeScheduler": "its pipeline, not the scheduler, rescales the network's input",
    "HeliosScheduler": _STAGES,
    "HeliosDMDScheduler": _STAGES,
    "RFD4ProteinaScheduler": "it rescales the network's score to another temperature, for two modalities at once",
    "AmusedScheduler": _TOKENS,
    "BlockRefinementScheduler": _TOKENS,
    "DiscreteDDIMScheduler": _TOKENS,
    "EntropyBoundScheduler": _TOKENS,
    "VQDiffusionScheduler": _TOKENS,
}

# --- keys of the schedulers of a chain of betas -----------------------------------------------------------------------

# honoured, under the same name
SAME = (
    ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")
    + ("snr_shift_scale", "steps_offset", "clip_sample", "clip_sample_range")
    + ("thresholding", "dynamic_thresholding_ratio", "sample_max_value")
    + ("sigma_min", "sigma_max", "interpolation_type", "timestep_type", "use_flow_sigmas", "time_shift_type")
)
# honoured, for these values
VALUES = {
    "prediction_type": ("epsilon", "sample", "original_sample", "v_prediction"),
    "timestep_spacing": ("linspace", "leading", "trailing"),
    "variance_type": (None, "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned")
    + ("learned_range",),
}
# of variance_type: what they are in `solvers`; schedulers that add no such noise say None
VARIANCES_OF_STOCK = {None: "fixed_small", "fixed_small_log": "fixed_small", "fixed_large_log": "fixed_large"}
# honoured, as this timestep_spacing
GRIDS = {"use_karras_sigmas": "karras", "use_exponential_sigmas": "log_snr", "use_lu_lambdas": "log_snr"}
GRIDS |= {"use_beta_sigmas": "beta_sigmas"}
# refused, but for one value; and what to do instead. Those of flow matching are honoured with use_flow_sigmas.
_FLOW = "of flow matching: set use_flow_sigmas, or build ScoreSDEScheduler(sde_type='linear', ...)"
NEUTRAL = {
    "use_dynamic_shifting": (False, _FLOW),
    "flow_shift": (1.0, _FLOW),
    "shift_terminal": (None, _FLOW),
}
# of the stock scheduler's own steps: they change neither the path nor the times of evaluation nor what the network
# predicts. Wherever its last step leads, ours leads to clean data (or stops early, with denoise_final=False).
SOLVER = (
    ("solver_order", "solver_type", "algorithm_type", "lower_order_final", "euler_at_final", "predict_x0", "solver_p")
    + ("disable_corrector", "predictor_order", "corrector_order", "tau_func", "skip_prk_steps", "noise_sampler_seed")
    + ("set_alpha_to_one", "final_sigmas_type", "stochastic_sampling")
)
# honoured, as t_max
CUT = "lambda_min_clipped"
# of LCM and TCD: honoured under the same name; and refused where LCM mixes the sample into the denoised one by it, when
# a trajectory has such times
ORIGINAL, BOUNDARY = "original_inference_steps", "timestep_scaling"

# --- keys of the others -----------------------------------------------------------------------------------------------

# of flow matching, honoured under the same name
FLOW = ("num_train_timesteps", "shift", "use_dynamic_shifting", "time_shift_type", "shift_terminal", "invert_sigmas")
# what only pipelines read, to work out the shift of an image's size
READ_BY_PIPELINES = ("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len")
# of CMStochasticIterativeScheduler, honoured under the same name, but for those that follow
OF_CM = ("num_train_timesteps", "sigma_min", "sigma_max", "sigma_data", "rho")
CLIP_OF_CM, NOISE_OF_CM = "clip_denoised", "s_noise"
# of EDM, honoured under the same name
OF_EDM = ("num_train_timesteps", "sigma_min", "sigma_max", "sigma_data", "rho", "prediction_type") + (
    "thresholding",
    "dynamic_thresholding_ratio",
    "sample_max_value",
)
SCHEDULES = {"karras": "karras", "exponential": "log_snr"}

# arguments of ours that stock schedulers have, too; with FLOW on the linear path
HANDED_ON = {*SAME, *VALUES, *GRIDS, "sde_type"}
_CHAIN = (*inspect.signature(DiscreteVPSDE.from_beta_schedule).parameters,)[1:]


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
    if "process" in stock:
        raise ValueError(f"DiscreteScoreScheduler has no counterpart here: {_TOKENS}")
    if name not in TAKEN:
        raise ValueError(
            f"no noise path is known for the config of {name or 'this scheduler'}: from_config takes those of "
            f"{', '.join(TAKEN)}; build others as ScoreSDEScheduler(sde_type=..., ...)"
        )
    defaults = _defaults(name)
    if not defaults:
        raise ValueError(f"{name} is not importable here, so what its config means is unknown: install what it needs")
    given = defaults | {key: value for key, value in stock.items() if key in defaults}
    if name in FLOW_MATCHING or given.get("use_flow_sigmas"):
        ours = _of_flow_matching(name, given, stock)
    elif name in SCORE_SDE:
        fixed, names = SCORE_SDE[name]
        ours = fixed | {mine: given[key] for key, mine in names.items()}
    elif name in EDM:
        ours = _of_edm(name, given)
    elif name == "CMStochasticIterativeScheduler":
        if given[NOISE_OF_CM] != 1:
            raise ValueError(f"{NOISE_OF_CM}={given[NOISE_OF_CM]!r} of {name} has no counterpart here: leave it out")
        ours = MAPS[name] | {key: given[key] for key in OF_CM} | {"clip_sample": given[CLIP_OF_CM]}
    elif name == "FlowMapEulerDiscreteScheduler":
        ours = MAPS[name] | given
    elif name == WUERSTCHEN:
        ours = {"sde_type": "discrete_vp", "beta_schedule": "wuerstchen", "time_scale": 1.0, "time_offset": 0.0}
        ours |= {"timestep_spacing": "to_zero"}
        if given != defaults:
            betas = wuerstchen_betas(1000, offset=given["s"], scaler=given["scaler"])
            ours |= {"trained_betas": betas.tolist()}
    else:
        ours = _of_chain(name, given, stock, defaults)
    # what the class has, and what others have of which this was made; by the name diffusers tells whose the keys are
    hidden = {key: value for key, value in (stock | given).items() if key not in own}
    return hidden | {"_class_name": name} | ours


def _of_chain(name, given, stock, defaults):
    """The config of discrete_vp for a stock scheduler of a chain of betas; of edm for SVD's."""
    refuse_unknown_meaning(stock)
    keys = {*SAME, *VALUES, *GRIDS, *NEUTRAL, *SOLVER, CUT, ORIGINAL, BOUNDARY}
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
            if given[key] not in values:
                allowed = ", ".join(map(str, values))
                raise ValueError(f"{key} {given[key]!r} of {name} has no counterpart here; those that have: {allowed}")
            ours[key] = given[key]
    ours |= (ACCEPTED | MAPS)[name]
    if name in MAPS:
        ours[ORIGINAL] = given[ORIGINAL]
    ours["exact_zero_snr"] = bool(ours.get("exact_zero_snr") and ours.get("rescale_betas_zero_snr"))
    ours |= {flag: bool(given.get(flag)) for flag in GRIDS}
    has_grid = any(ours[flag] for flag in GRIDS)
    is_leading = ours["timestep_spacing"] == "leading"
    if "whole_levels" in ours:
        ours["init_noise"] = "unit_data" if is_leading else "sigma"
    if given.get("timestep_type") == "continuous" and given["prediction_type"] == "v_prediction":
        ours |= {"time_input": "log_sigma", "time_scale": 0.25, "time_offset": 0.0}
        if has_grid and None not in (given["sigma_min"], given["sigma_max"]):
            # levels beyond the chain's
            ours |= {"sde_type": "edm", "preconditioned": True, "sigma_data": 1.0}
    if given.get(CUT, -math.inf) > -math.inf and not has_grid:
        path = _chain(given)
        times = torch.arange(1, path.levels + 1, dtype=torch.float64) / path.levels
        levels = int((path.half_log_snr(times) >= given[CUT]).sum())
        if levels < path.levels and ours["timestep_spacing"] != "linspace":
            raise ValueError(
                f"{CUT}={given[CUT]!r} of {name} has no counterpart with timestep_spacing "
                f"{ours['timestep_spacing']!r}: set timestep_spacing to 'linspace'"
            )
        ours["t_max"] = levels / path.levels
    return ours


def check_boundary(config, timesteps):
    """Raise ValueError where an evaluation by a config of ours, made of LCM's, is at so little noise that LCM's c_skip
    counts; `timesteps` is what the network receives. TCD, whose trajectories end with noise, has the key without use.
    """
    if config.get(BOUNDARY) is None or config["network_map"] != "consistency" or not config["denoise_final"]:
        return
    last = float(timesteps[-1])
    skip = 0.25 / ((last * config[BOUNDARY]) ** 2 + 0.25)
    if skip > 1e-4:
        raise ValueError(
            f"{BOUNDARY}={config[BOUNDARY]!r} of LCMScheduler has no counterpart at timestep {last:g}, where it mixes "
            f"{skip:.2g} of the sample into the denoised one: let the trajectory end at more noise, by fewer steps, "
            f"fewer {ORIGINAL} or other timesteps"
        )


def _of_edm(name, given):
    """The config of edm for a stock scheduler of Karras et al. 2022."""
    if given["sigma_schedule"] not in SCHEDULES:
        raise ValueError(f"sigma_schedule {given['sigma_schedule']!r} of {name} is unknown: {', '.join(SCHEDULES)}")
    if given["prediction_type"] not in ("epsilon", "v_prediction"):
        raise ValueError(
            f"prediction_type {given['prediction_type']!r} of {name} has no counterpart here; those that have: "
            f"epsilon, v_prediction"
        )
    ours = {"sde_type": "edm", "preconditioned": True, "init_noise": "unit_data", "time_offset": 0.0}
    ours |= {"timestep_spacing": SCHEDULES[given["sigma_schedule"]]} | EDM[name]
    return ours | {key: given[key] for key in OF_EDM if key in given}


def _of_flow_matching(name, given, stock):
    """The config of the straight path for a stock scheduler of flow matching, or with use_flow_sigmas."""
    if name == "LTXEulerAncestralRFScheduler":
        for key in ("eta", "s_noise"):
            if given[key] != 1.0:
                raise ValueError(
                    f"{key}={given[key]!r} of {name} has no counterpart in from_config: leave it out, and pass "
                    f"predictor='heun', eta=... for noise"
                )
        flow = _defaults("FlowMatchEulerDiscreteScheduler")
        given = flow | {key: value for key, value in stock.items() if key in flow} | given
    prediction = "flow_prediction" if name in FLOW_MATCHING else given["prediction_type"]
    if prediction not in ("flow_prediction", *VALUES["prediction_type"]):
        raise ValueError(f"prediction_type {prediction!r} of {name} has no counterpart here")
    ours = {"sde_type": "linear", "prediction_type": prediction, "timestep_spacing": "linspace"}
    honoured = (*FLOW, *GRIDS, "thresholding", "dynamic_thresholding_ratio", "sample_max_value")
    ours |= {key: given[key] for key in honoured if key in given}
    if name in FLOW_MATCHING:
        ours |= FLOW_MATCHING[name]
        if ours.get("invert_sigmas"):
            ours["prediction_type"] = "inverted_flow_prediction"
        if "num_train_timesteps" not in given:
            return ours
        # where their grids end
        least = 1 / given["num_train_timesteps"]
        shift = 1 if given.get("use_dynamic_shifting") else given["shift"]
        # twice shifted, as there: by the class and by set_timesteps; with one level theirs has no grid of its own
        t_min = shift * least / (1 + (shift - 1) * least) if given["num_train_timesteps"] > 1 else None
        return ours | {"t_min": t_min}

    # their betas have no effect
    carried = (*_CHAIN, "steps_offset", "sigma_min", "sigma_max", "use_flow_sigmas", "timestep_spacing")
    ours |= {key: given[key] for key in (*carried, "variance_type") if key in given}
    ours |= {"shift": given["flow_shift"], "open_end": True}
    levels = given["num_train_timesteps"]
    grids = [flag for flag in GRIDS if given.get(flag)]
    if not grids:
        # those of DPM-Solver end at 0, but for the step that leads there
        least = {"t_min": 1 / levels} if name == "UniPCMultistepScheduler" else {"t_min": 1e-6, "t_max": 1 - 1 / levels}
        return ours | least
    if name != "UniPCMultistepScheduler" or grids != ["use_karras_sigmas"]:
        raise ValueError(
            f"{grids[0]} of {name} has no counterpart with use_flow_sigmas: its levels are the chain's, above 1, where "
            f"the stock scheduler itself returns nan; leave it out"
        )
    # sigma / alpha of the chain's ends
    path = _chain(given)
    ends = {"sigma_min": 1 / levels, "sigma_max": 1.0}
    low, high = (given[key] or math.exp(-float(path.half_log_snr(t))) for key, t in ends.items())
    return ours | {"t_min": low / (1 + low), "t_max": high / (1 + high)}


def _chain(given):
    """The path of the betas of a stock scheduler."""
    return DiscreteVPSDE.from_beta_schedule(**{key: given[key] for key in _CHAIN if key in given})


def refuse_unknown_meaning(config, but=()):
    """Raise ValueError where a key of NEUTRAL, but for those named in `but`, has a value with no counterpart here."""
    if config.get("sde_type") == "linear":
        but = (*but, "flow_shift")
    for key, (neutral, remedy) in NEUTRAL.items():
        if key not in but and config.get(key) not in (None, neutral):
            raise ValueError(
                f"{key}={config[key]!r} has no counterpart in from_config, which takes {neutral!r}: {remedy}"
            )


def not_of_the_path(config):
    """The keys of a config of ours that its path is not made of: those of its grid, those that are in it for a stock
    scheduler, and beta_schedule where it says that there is none."""
    unused = set()
    if config["beta_schedule"] == f"sde_type={config['sde_type']}":
        unused.add("beta_schedule")
    if config["sde_type"] == "discrete_vp" or config["use_flow_sigmas"]:
        unused |= {"sigma_min", "sigma_max"}
    if config["sde_type"] != "discrete_vp" and (config["use_flow_sigmas"] or config["timestep_type"] == "continuous"):
        unused |= {*_CHAIN}
    return unused - {"num_train_timesteps"}


def of_network(config):
    """The row of `paths.PREDICTIONS` of a config of ours. Raises ValueError where preconditioned has none."""
    prediction_type = config["prediction_type"]
    if not config["preconditioned"]:
        return prediction_type
    rows = {"epsilon": "edm", "v_prediction": "edm_v_prediction"}
    if prediction_type not in rows:
        raise ValueError(f"preconditioned needs prediction_type epsilon or v_prediction; got {prediction_type!r}")
    return rows[prediction_type]


def curve(config):
    """The timestep_spacing that one of diffusers' keys asks for, beside the one of this name; None without."""
    alone = "log_snr" if config["interpolation_type"] == "log_linear" else None
    return next((grid for flag, grid in GRIDS.items() if config[flag]), alone)


def _class_name(config):
    """The stock class that a config is of; None where it can not be told."""
    if isinstance(config.get("_class_name"), str):
        return config["_class_name"]
    # in memory it does not say: the class with the most keys, all of which it has
    sizes = {name: len(_defaults(name)) for name in (*TAKEN, *REFUSED) if _defaults(name).keys() <= config.keys()}
    name = max((name for name in sizes if sizes[name]), key=sizes.get, default=None)
    if name in ("LCMScheduler", "TCDScheduler"):
        raise ValueError(
            "LCMScheduler and TCDScheduler have the same keys: say whose config this is, "
            "from_config({'_class_name': 'LCMScheduler'} | config)"
        )
    return name


def _defaults(name):
    """{argument: default} of a scheduler class of diffusers; empty where what it needs is not installed."""
    parameters = inspect.signature(getattr(schedulers, name)).parameters.values()
    return {each.name: each.default for each in parameters if each.kind == each.POSITIONAL_OR_KEYWORD}
