"""`DiscreteScoreScheduler`: a diffusers scheduler for text and other sequences of tokens.

This file is the interface that pipelines and training scripts meet. The process is in `discrete_paths`, the samplers in
`discrete_solvers`, what diffusers' own discrete schedulers and their pipelines mean in `discrete_stock`.
"""

import inspect
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SCHEDULER_CONFIG_NAME, SchedulerMixin
from diffusers.utils import BaseOutput

from .checks import LARGEST_NFE, check_choice, check_number, default_arguments, refuse_unknown_arguments, without_given
from .discrete_paths import (
    DISCRETE_PATHS,
    DISCRETE_PREDICTIONS,
    NOISE_OPTIONS,
    at,
    draw_uniforms,
    likelihood_bound,
    options_of,
)
from .discrete_solvers import (
    AUTOMATIC,
    CORRECTORS,
    PREDICTORS,
    REMASKING_ETA,
    SELECTIONS,
    SPACINGS,
    conditional,
    draw,
    filtered,
    filtered_alike,
    gibbs,
    powers,
    quota,
    remasking,
    shown,
    time_grid,
)
from .discrete_stock import TAKEN, from_stock_config, has_ended, moved_mask, refuse_editing, without_mask
from .paths import as_time, finest, sent


# whether this code came out of a folder, where diffusers keeps such code
_CARRIED = __name__.startswith("diffusers_modules.")

_ORDERS = tuple(name for name, row in PREDICTORS.items() if row.is_order)
# {option: (least, largest) where it is given}
OPTIONS = {"threshold": (0.0, 1.0), "entropy_bound": (0.0, 1e6), "remasking_eta": (0.0, 1.0)}
# {option: (the argument that chooses what it is of, the choices that have a use for it)}
USES = {
    "threshold": ("predictor", _ORDERS),
    "entropy_bound": ("predictor", ("entropy_bounded",)),
    "remasking_eta": ("corrector", ("remasking",)),
    "corrector_k": ("corrector", ("gibbs",)),
    "corrector_selection": ("corrector", ("gibbs",)),
    "corrector_selection_tau": ("corrector", ("gibbs",)),
}
# what the network is told at path time 1
TIME_SCALE = 1000.0


@dataclass
class DiscreteScoreSchedulerOutput(BaseOutput):
    """Output of `DiscreteScoreScheduler.step`.

    prev_sample: the tokens (B, L) at the next entry of the plan.
    pred_original_sample: clean tokens (B, L): those that the step put in, elsewhere the likeliest.
    transfer_index: which tokens (B, L) the step changed.
    changed: (B,) whether any did. Where none did, a network that isn't told the time says the same again.
    sampled_tokens, sampled_probs, editing_transfer_index, pred_logits: what diffusers' discrete schedulers return: the
        clean tokens as above, their probabilities, no edits, and the logits, at the temperature that the config has.
    """

    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor | None = None
    transfer_index: torch.Tensor | None = None
    changed: torch.Tensor | None = None
    sampled_tokens: torch.Tensor | None = None
    sampled_probs: torch.Tensor | None = None
    editing_transfer_index: torch.Tensor | None = None
    pred_logits: torch.Tensor | None = None


class Stage(NamedTuple):
    """An entry of the plan: an evaluation at t. A predictor's leads to s, to clean tokens where s is 0; a corrector's
    stays at t."""

    t: float
    s: float
    corrects: bool = False


class DiscreteScoreScheduler(SchedulerMixin, ConfigMixin):
    """Sample tokens from a model of their clean values or of their concrete score.

    The process (`process`, `noise`) and the meaning of the network's output (`prediction_type`) are facts of the
    trained network; predictor, corrector and grid are free to choose at any time:
    `DiscreteScoreScheduler.from_config(scheduler.config, predictor="first_hitting")`.

    | predictor | what it is for | process | source |
    |---|---|---|---|
    | auto | the default: first_hitting with masks, else ancestral, by measurement | both | |
    | ancestral | the exact posterior of each token | both | Austin et al. 2021; Sahoo et al. 2024 |
    | tweedie | the same from the concrete score, as SEDD samples | both | Lou et al. 2024, Eq. 19 |
    | tau_leaping | Euler steps of the reverse rates | both | Campbell et al. 2022 |
    | first_hitting | random order; exact with as many steps as tokens | absorbing | Zheng et al. 2024 |
    | dilated | positions far apart first; exact with as many steps as tokens | absorbing | Luxembourg et al. 2025 |
    | confidence | the likeliest drawn tokens first | both | Chang et al. 2022 |
    | margin | the largest margin between the two likeliest first | absorbing | Kim et al. 2025 |
    | entropy_bounded | the least entropy first, more at once where that costs little | both | Ben-Hamu et al. 2025 |

    Those that order positions (the last five) show with every step as many as the process would, rounded; with no more
    free positions than steps one at a time, when first_hitting, dilated and margin draw from the model's own
    distribution without error, and so does entropy_bounded with an entropy_bound of 0 (with another it shows more at
    once); none of them with a threshold. The others draw all positions independently of each other within a step.

    Args:
        vocab_size: number V of tokens. With process "absorbing" the mask is token V, the extra row of the network's
            table.
        process: absorbing (a token becomes the mask) or uniform (a token becomes any).
        noise: of the survival alpha(t): log_linear, cosine, geometric, or polynomial, as `discrete_paths` has them; or
            a function alpha(t), which no config file holds.
        prediction_type: sample (logits of the clean token), leave_one_out (the same given the other tokens only; of
            uniform) or score (log of the concrete score p_t(y) / p_t(x)).
        predictor: see the table.
        corrector: None, gibbs (uniform only: tokens drawn anew given all others, an evaluation each), or remasking
            (absorbing with predictor ancestral: shown tokens are masked again; ReMDM, Wang et al. 2025).
        corrector_steps: evaluations of gibbs after each predictor step but the last; None for 1 with it, else 0.
        corrector_k: positions that gibbs draws anew in one evaluation; 1 that is chosen at random keeps the
            distribution exactly.
        corrector_selection: which: random, lowest_log_margin, lowest_maxprob, or lowest_current_prob.
        corrector_selection_tau: how random the selection is: Gumbel noise of this size is added to its scores.
        remasking_eta: of remasking, from 0 (none) to 1 (all that the marginals allow); None for 0.05.
        threshold: predictors that order positions also show all drawn tokens with a larger probability; None for none.
        entropy_bound: of entropy_bounded, nats; None for 0.1.
        temperature: of the clean tokens' distribution, where `step` isn't told one.
        final_temperature: the temperature falls linearly, from `temperature` at the first step, to this after the last,
            whatever `step` is told (DiffusionGemma's pipeline tells 0); None for no change.
        timestep_spacing: linspace (equal parts of t), survival (of alpha), or cosine (the share of noise falls as a
            cosine: MaskGIT); None for the predictor's own: survival where it orders positions, else linspace.
        alpha_min, exponent, sigma_min, sigma_max: of the noise; None for its own default.
        timestep_type: "time": `timesteps` are 1000 t, what the network is told; "index": they count the steps up from
            0, as those of diffusers' discrete schedulers in their pipelines.
    """

    # two base classes declare it, as a string and as None
    config_name: Any = SCHEDULER_CONFIG_NAME
    _compatibles = list(TAKEN)
    order = 1

    @register_to_config
    def __init__(
        self,
        vocab_size: int,
        process: str = "absorbing",
        noise: str = "log_linear",
        prediction_type: str = "sample",
        predictor: str = "auto",
        corrector: str | None = None,
        corrector_steps: int | None = None,
        corrector_k: int = 1,
        corrector_selection: str = "random",
        corrector_selection_tau: float = 1.0,
        remasking_eta: float | None = None,
        threshold: float | None = None,
        entropy_bound: float | None = None,
        temperature: float = 1.0,
        final_temperature: float | None = None,
        timestep_spacing: str | None = None,
        timestep_type: str = "time",
        alpha_min: float | None = None,
        exponent: float | None = None,
        sigma_min: float | None = None,
        sigma_max: float | None = None,
    ):
        check_choice("process", process, DISCRETE_PATHS)
        check_choice("prediction_type", prediction_type, DISCRETE_PREDICTIONS)
        check_choice("predictor", predictor, ("auto", *PREDICTORS))
        check_choice("corrector", corrector, (None, *CORRECTORS))
        check_choice("corrector_selection", corrector_selection, SELECTIONS)
        check_choice("timestep_spacing", timestep_spacing, (None, *SPACINGS))
        check_choice("timestep_type", timestep_type, ("time", "index"))
        of_noise = dict(zip(NOISE_OPTIONS, (alpha_min, exponent, sigma_min, sigma_max), strict=True))
        given = {name: value for name, value in of_noise.items() if value is not None}
        self.path = DISCRETE_PATHS[process](vocab_size, noise, **given)
        self.t_min, self.t_max = self.path.t_min, self.path.t_max
        self.num_inference_steps: int | None = None
        self._plan: list[Stage] | None = None
        self._step_index: int | None = None
        self._check_options()
        if corrector_steps is None:
            self.register_to_config(corrector_steps=int(corrector == "gibbs"))
        # what diffusers notes in model_index.json, to find the class again: after `import score_sde` the package, which
        # has it; in a folder that carries the code, the file
        if type(self) is DiscreteScoreScheduler:
            self.__module__ = __name__.split(".")[-1 if _CARRIED else 0]
        self.timesteps = self.timestep(torch.linspace(1, 0, 1001, dtype=torch.float64)[:-1])

    def _check_options(self):
        """Raise ValueError for numbers out of their range, and for options without a use here."""
        config = self.config
        for name in ("temperature", "final_temperature"):
            if config[name] is not None:
                check_number(name, config[name], 0, 1e3)
        check_number("corrector_k", config.corrector_k, 1, 10**6, whole=True)
        check_number("corrector_selection_tau", config.corrector_selection_tau, 1e-6, 1e6)
        for name, (least, largest) in OPTIONS.items():
            if config[name] is not None:
                check_number(name, config[name], least, largest)
        defaults = default_arguments(type(self))
        for name, (choice, users) in USES.items():
            if config[name] != defaults[name] and config[choice] not in users:
                raise ValueError(
                    f"{name} {config[name]} is for {', '.join(users)}, not for {config[choice]!r}: leave it out"
                )
        if config.predictor != "auto" and config.process not in PREDICTORS[config.predictor].processes:
            raise ValueError(f"predictor {config.predictor!r} is for process 'absorbing', not for {config.process!r}")
        if config.corrector == "gibbs" and config.process != "uniform":
            raise ValueError(
                "corrector 'gibbs' is for process 'uniform': on 'absorbing' a shown token is certain; use 'remasking'"
            )
        if config.corrector == "remasking" and (config.process, config.predictor) != ("absorbing", "ancestral"):
            raise ValueError(
                f"corrector 'remasking' is for process 'absorbing' and predictor 'ancestral', not for "
                f"{config.process!r} and {config.predictor!r}"
            )
        if config.corrector_steps is not None:
            check_number("corrector_steps", config.corrector_steps, 0, 10**4, whole=True)
            if bool(config.corrector_steps) != (config.corrector == "gibbs"):
                raise ValueError(
                    f"corrector_steps {config.corrector_steps} does not go with corrector {config.corrector!r}: "
                    f"pass corrector='gibbs' with at least 1, or neither"
                )

    @classmethod
    def from_config(cls, config=None, return_unused_kwargs=False, **kwargs):
        """A scheduler from a config of ours, or of a discrete scheduler of diffusers: the same process and sampler (see
        `discrete_stock`; their vocabulary is given as vocab_size). Where another predictor, corrector or noise is
        given, what the config holds for its own and the new one has no use for is left behind: options, and the
        corrector remasking with another predictor than ancestral.

        Raises ValueError for schedulers of continuous data and others without a counterpart, and for keywords that are
        no argument of this class (with return_unused_kwargs they are returned).
        """
        if isinstance(config, dict):
            own = inspect.signature(cls).parameters.keys()
            if not return_unused_kwargs:
                refuse_unknown_arguments(cls, kwargs, own)
            if "process" not in config:
                config = from_stock_config(config, kwargs)
            for name, default in cls._of_other_choices(config, kwargs).items():
                kwargs.setdefault(name, default)
        return super().from_config(config, return_unused_kwargs, **kwargs)

    @classmethod
    def _of_other_choices(cls, config, given):
        """{argument: its default} of what a config of ours holds for a predictor, corrector or noise that it chose,
        where another is given and has no use for it."""
        defaults = default_arguments(cls)
        chosen = defaults | {name: value for name, value in config.items() if name in defaults} | given
        # remasking is a way of the predictor ancestral; gibbs is of any
        left = []
        if "predictor" in given and chosen["corrector"] == "remasking" and chosen["predictor"] != "ancestral":
            left = ["corrector"]
            chosen["corrector"] = given.get("corrector")
        changed = {
            name for name in ("predictor", "corrector", "noise") if chosen[name] != config.get(name, defaults[name])
        }
        left += [name for name, (choice, users) in USES.items() if choice in changed and chosen[choice] not in users]
        if "corrector" in changed:
            left.append("corrector_steps")
        if "noise" in changed:
            left += [name for name in NOISE_OPTIONS if name not in options_of(chosen["noise"])]
        return {name: defaults[name] for name in left}

    @property
    def config(self) -> Any:
        """The arguments, as a mapping with attributes: `scheduler.config.process`."""
        return super().config

    def register_to_config(self, **kwargs):
        """As of every scheduler of diffusers, but what is given by position is remembered as given."""
        super().register_to_config(**without_given(type(self), kwargs))

    def save_pretrained(self, save_directory, push_to_hub=False, **kwargs):
        """As of every scheduler of diffusers. Where this class came out of a folder, its code goes along.

        Raises ValueError for noise that is a function.
        """
        if callable(self.config.noise):
            raise ValueError(f"noise {self.config.noise} is a function, which no config file holds: choose one by name")
        if _CARRIED:
            entry = Path(__file__)
            siblings = re.findall(r"^from \.(\w+) import ", entry.read_text(encoding="utf-8"), re.MULTILINE)
            os.makedirs(save_directory, exist_ok=True)
            for name in (entry.stem, *siblings):
                shutil.copy(entry.with_name(f"{name}.py"), save_directory)
        super().save_pretrained(save_directory, push_to_hub, **kwargs)

    # --- facts about the process, for networks, pipelines and training ---------------------------------------------

    @property
    def mask_token_id(self):
        """The id of the mask, V; None for process uniform."""
        return self.path.mask_token_id

    def timestep(self, t):
        """The number that the network receives as time at path time t: 1000 t, float32, the shape of t."""
        return (TIME_SCALE * as_time(t)).float()

    def path_time(self, timesteps):
        """Path time in [0, 1], float64, of the number(s) that the network receives: the inverse of `timestep`."""
        return as_time(timesteps) / TIME_SCALE

    def told_timesteps(self, sample, timestep):
        """The numbers (B,) that the network receives as time for tokens (B, L) at this entry () of `timesteps`.

        With masks, it is told the time at which as many tokens are masks on average, which is how it saw such tokens in
        training. The plan's time, by which the step goes, is the same only where all positions are free and none is
        shown by its order; and what the network says of a mask does not depend on the time. The scale of its concrete
        score does: tau_leaping and tweedie, which take it as it is, and uniform noise are told the timestep.
        """
        of_scale = PREDICTORS[self.predictor].of_score and self.config.prediction_type == "score"
        return timestep.expand(len(sample)) if self.mask_token_id is None or of_scale else self._of_masks(sample)

    def timesteps_beside(self, given, sample, t):
        """The numbers (B,) that the network receives as time for tokens (B, L) at path times t, () or (B,). Where some
        of them are `given`, (B, L) bool or None for none, it is that of the masks, as in `told_timesteps`, unless the
        noise is uniform or the network says the concrete score."""
        timesteps = sent(self.timestep(t), sample.device, torch.float32).expand(len(sample))
        if given is None or self.mask_token_id is None or self.config.prediction_type == "score":
            return timesteps
        return torch.where(given.any(-1), self._of_masks(sample), timesteps)

    def _of_masks(self, sample):
        """The numbers (B,) of the times at which on average as many tokens are masks as of (B, L)."""
        shown = (sample != self.mask_token_id).to(finest(sample.device)).mean(-1)
        first, last = float(self.path.alpha(0.0)), float(self.path.alpha(1.0))
        return self.timestep(self.path.t_from_alpha(shown.clamp(last, first)))

    def add_noise(self, original_samples, timesteps, generator=None):
        """Tokens at the noise of timesteps, () or (B,), as the network has them, for clean tokens (B, L).

        Raises ValueError for ids outside of the vocabulary and timesteps outside of 0 to 1000.
        """
        return self.path.corrupt(original_samples, self._time_inside(timesteps), generator)

    def _time_inside(self, timesteps):
        t = self.path_time(timesteps)
        # up to the rounding of float32
        if t.device.type == "cpu" and not ((t >= 0) & (t <= 1 + 1e-6)).all():
            raise ValueError(f"timesteps {timesteps} must lie between 0 (clean tokens) and {TIME_SCALE:g} (noise)")
        return t.clamp(0, 1)

    def init_noise(self, shape, generator=None, device=None):
        """Tokens (B, L) of pure noise, from which sampling starts: masks, or uniformly random ones."""
        return self.path.prior(shape, generator, device)

    def clean_log_probs(self, model_output, sample, t):
        """log p(x0 | x_t) (B, L, V), normed, of the network's output for tokens (B, L) at path time t, () or (B,)."""
        return DISCRETE_PREDICTIONS[self.config.prediction_type](self.path, model_output, sample, t)

    def likelihood_bound(self, network, tokens, u, generator=None, given=None):
        """An unbiased estimate of an upper bound on -log p of tokens (B, L): nats (B,), float64. See
        `discrete_paths.likelihood_bound`, whose u, generator and given these are.

        Args:
            network: f(x_t (B, L), timesteps (B,)) -> output (B, L, V), as `step` takes it.

        Raises ValueError where the network's output is not finite.
        """

        def denoise(x_t, t):
            log_p0 = self.clean_log_probs(network(x_t, self.timesteps_beside(given, x_t, t)), x_t, t)
            self._check_numbers(log_p0, t)
            return log_p0

        return likelihood_bound(self.path, denoise, tokens, u, self.t_min, self.t_max, generator, given)

    def finished(self, sample, free_mask=None):
        """Which of the samples (B, L) no further step changes, (B,): with absorbing noise and no corrector, those
        without a mask among their free positions (all, or those of free_mask (B, L))."""
        if self.mask_token_id is None or self.config.corrector is not None:
            return torch.zeros(len(sample), dtype=torch.bool, device=sample.device)
        masked = sample == self.mask_token_id
        return ~(masked if free_mask is None else masked & free_mask).any(1)

    # --- sampling ---------------------------------------------------------------------------------------------------

    @property
    def nfe(self):
        """Network evaluations of one trajectory at most: the entries of the plan."""
        return len(self._require_plan())

    @property
    def step_index(self):
        """Position in the plan, None before the first step."""
        return self._step_index

    def set_timesteps(self, num_inference_steps, device=None, block_length=None):
        """Plan a trajectory. Call it before `step`, and again before every new trajectory or block.

        Args:
            num_inference_steps: predictor steps, at least 1; a corrector's evaluations come on top.
            device: where `timesteps` shall be.
            block_length: passed by pipelines that go block by block; the free positions are counted in each step.
        """
        check_number("num_inference_steps", num_inference_steps, 1, LARGEST_NFE, whole=True)
        self.num_inference_steps = num_inference_steps
        self.predictor = self.config.predictor
        if self.predictor == "auto":
            self.predictor = AUTOMATIC[self.config.process]
        row = PREDICTORS[self.predictor]
        spacing = self.config.timestep_spacing or row.spacing
        # where alpha is 0 there is no score
        t_max = self.path.t_max if row.of_score else 1.0
        times = [*time_grid(self.path, spacing, num_inference_steps, t_max).tolist(), 0.0]
        self._plan = []
        for t, s in zip(times, times[1:], strict=False):
            self._plan.append(Stage(t, s))
            if s and self.config.timestep_type == "time":
                self._plan += [Stage(s, s, corrects=True)] * self.config.corrector_steps
        if self.config.timestep_type == "index":
            self.timesteps = torch.arange(num_inference_steps, device=device)
        else:
            evaluated = torch.tensor([stage.t for stage in self._plan], dtype=torch.float64)
            self.timesteps = self.timestep(evaluated).to(device)
        self._step_index = None

    def _require_plan(self) -> list[Stage]:
        if self._plan is None:
            raise ValueError("no trajectory is planned: call scheduler.set_timesteps(num_inference_steps) first")
        return self._plan

    def _enter(self, timestep) -> int:
        """The entry of the plan that is next; before the first step, the one at which the trajectory begins."""
        if self.config.timestep_type == "index":
            return int(timestep)
        if self._step_index is not None:
            return self._step_index
        found = (self.timesteps == torch.as_tensor(timestep).to(self.timesteps)).nonzero()
        if len(found) == 0:
            raise ValueError(
                f"timestep {float(timestep):g} is none of this trajectory's: pass one of scheduler.timesteps"
            )
        return int(found[0])

    def step(
        self,
        model_output,
        timestep,
        sample,
        generator=None,
        return_dict: bool = True,
        *,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        free_mask=None,
        origin_output=None,
        guidance_scale: float = 1.0,
        mask_token_id: int | None = None,
        sampling_method: str = "auto",
        threshold: float | None = None,
        editing_threshold: float | None = None,
        minimal_topk: int | None = None,
        prompt_mask=None,
    ):
        """Run the next entry of the plan.

        Args:
            model_output: the network's output for `sample`, (B, L, V), any floating dtype; computed in float32 or more.
            timestep: an entry of `timesteps`; it only matters for the first call, which finds its place by it.
            sample: the current tokens (B, L), int64.
            generator: source of the draws, one or one per sample.
            return_dict: return a `DiscreteScoreSchedulerOutput` instead of the tuple (prev_sample,).
            temperature: of the clean tokens' distribution; 0 takes the likeliest. None for the config's.
            top_k: draw from the k likeliest tokens only. top_p: from the fewest that together have this probability.
            free_mask: (B, L) or (L,) bool, the positions that may change: all but prompts, given tokens, and what lies
                outside of the block that is in turn. None for all.
            origin_output: what the network says without what guidance leads to, as model_output; None for no guidance.
            guidance_scale: w of classifier-free guidance: p^w p_origin^(1 - w), normed, takes the place of p for each
                token (Schiff et al. 2025), whichever the prediction type. With absorbing noise p is of the clean
                tokens, so that as many are shown as without guidance. With uniform noise it is the step itself,
                p(x_s | x_t) (ancestral, tweedie), or its rates, which need no norm (tau_leaping); of what orders
                positions it is of the clean tokens, which that draws, and of gibbs each token's given all others.
                Filters leave those tokens that they leave of guided clean ones.
            mask_token_id, sampling_method, threshold, editing_threshold, minimal_topk, prompt_mask: as the pipelines
                LLaDA2 and DiffusionGemma pass them: the id that stands for the mask, whose logit is then one of V + 1;
                "greedy" is temperature 0; the config's threshold; None or 0; of the pipeline alone; the positions (L,)
                that are not free.

        Raises ValueError before `set_timesteps`, past the end of the plan, and for shapes, ids and numbers that don't
        fit.
        """
        plan, entry = self._require_plan(), self._enter(timestep)
        if not 0 <= entry < len(plan):
            raise ValueError(f"all {len(plan)} entries of the plan have run: call set_timesteps again")
        stage = plan[entry]
        if entry == 0 or self._step_index is None:
            # tokens of the uniform process, of which none shows whether it is noise: which have been shown
            self._kept = torch.zeros_like(sample, dtype=torch.bool)
        refuse_editing(editing_threshold)
        check_choice("sampling_method", sampling_method, ("auto", "greedy", "multinomial"))
        if sampling_method == "greedy":
            temperature = 0.0
        if temperature is None or self.config.final_temperature is not None:
            temperature = self._temperature(stage)
        if prompt_mask is not None:
            free_mask = ~prompt_mask if free_mask is None else free_mask & ~prompt_mask
        logits = model_output
        if mask_token_id is not None:
            self._check_mask(mask_token_id, model_output)
            sample = moved_mask(sample, self.mask_token_id, mask_token_id)
        outputs = [model_output] if origin_output is None else [model_output, origin_output]
        if mask_token_id is not None:
            outputs = [without_mask(each, mask_token_id) for each in outputs]
        self.check_limits(temperature, top_k, top_p, guidance_scale)
        is_free = self._check(outputs[0], sample, free_mask)
        if origin_output is None and guidance_scale != 1:
            raise ValueError(f"guidance_scale {guidance_scale} needs origin_output, what guidance leads away from")
        if outputs[-1].shape != outputs[0].shape:
            raise ValueError(
                f"origin_output has shape {tuple(outputs[-1].shape)}, model_output {tuple(outputs[0].shape)}: pass "
                f"what the same network says of the same tokens"
            )
        outputs = [each.to(torch.promote_types(each.dtype, torch.float32)) for each in outputs]
        clean_ones = [self._clean(each, sample, stage.t) for each in outputs]
        own = clean_ones[0] if len(outputs) == 1 else powers(clean_ones[0], clean_ones[1], guidance_scale)
        is_filtered = temperature != 1 or top_k is not None or top_p is not None
        log_p0 = filtered(own, temperature, top_k, top_p)
        # at temperature 0 every token is certain: positions are judged without it
        judged = own if temperature == 0 else log_p0

        row = PREDICTORS[self.predictor]
        # [(log p0, the network's output where it is the score itself)] of what the step is made of: with uniform noise
        # under guidance, of both sides
        raw = self.config.prediction_type == "score" and not is_filtered
        parts = [(log_p0, outputs[0] if raw and len(outputs) == 1 else None)]
        if len(outputs) == 2 and self.mask_token_id is None:
            alike = [filtered_alike(each, log_p0, temperature) for each in clean_ones] if is_filtered else clean_ones
            parts = [(each, output if raw else None) for each, output in zip(alike, outputs, strict=True)]
        if stage.corrects:
            prev_sample = self._correct(
                stage.t, sample, [each for each, _ in parts], guidance_scale, is_free, generator
            )
        elif row.is_order:
            prev_sample = self._show(stage, sample, log_p0, judged, is_free, generator, threshold)
        else:
            if threshold is not None and threshold < 1:
                raise ValueError(
                    f"threshold {threshold} is for predictors that order positions ({', '.join(_ORDERS)}), not for "
                    f"{self.predictor!r}: pass threshold=1.0"
                )
            probabilities = log_p0.exp() if not stage.s else self._transition(stage, sample, parts, guidance_scale)
            prev_sample = draw(probabilities, draw_uniforms(sample.shape, generator, sample.device))
            prev_sample = torch.where(is_free, prev_sample, sample)
        self._step_index = entry + 1

        # what is told of the step, in the ids of the caller
        transferred = prev_sample != sample
        put_in = transferred & (prev_sample < self.config.vocab_size)
        clean = torch.where(is_free & ~put_in, log_p0.argmax(-1), prev_sample)
        probability = at(judged, clean.clamp_max(self.config.vocab_size - 1)).exp()
        if mask_token_id is not None:
            prev_sample, clean = (moved_mask(each, self.mask_token_id, mask_token_id) for each in (prev_sample, clean))
        if not return_dict:
            return (prev_sample,)
        return DiscreteScoreSchedulerOutput(
            prev_sample=prev_sample,
            pred_original_sample=clean,
            transfer_index=transferred,
            changed=transferred.any(-1),
            sampled_tokens=clean,
            sampled_probs=probability,
            editing_transfer_index=torch.zeros_like(transferred),
            pred_logits=logits if self.config.final_temperature is None else logits / temperature,
        )

    def step_correct(self, model_output, timestep, sample, generator=None, return_dict: bool = True):
        """One evaluation of the corrector gibbs after the step at this entry of `timesteps`, as DiffusionGemma's
        pipeline runs it: with timestep_type "index", whose plan has none of it."""
        plan = self._require_plan()
        if self.config.corrector != "gibbs" or self.config.timestep_type != "index":
            raise ValueError("step_correct is for corrector 'gibbs' and timestep_type 'index'; others correct in step")
        is_free = self._check(model_output, sample)
        t = plan[int(timestep)].s
        output = model_output.to(torch.promote_types(model_output.dtype, torch.float32))
        parts = [self._clean(output, sample, t)]
        prev_sample = self._correct(t, sample, parts, 1.0, is_free, generator)
        changed = prev_sample != sample
        if not return_dict:
            return (prev_sample,)
        return DiscreteScoreSchedulerOutput(
            prev_sample=prev_sample, transfer_index=changed, changed=changed.any(-1), pred_logits=model_output
        )

    def check_eos_finished(
        self, cur_x, sampled_tokens, final_transfer, finished, eos_token_id, mask_token_id, prompt_length
    ):
        """Which sequences (B,) are done, for LLaDA2's pipeline: those that were, and those into which this step put an
        end after which no mask is left before it."""
        put_in = (final_transfer & (sampled_tokens == eos_token_id)).any(1)
        return finished | put_in & has_ended(cur_x, eos_token_id, mask_token_id, prompt_length)

    def check_block_should_continue(self, step_idx, masks_remaining, finished, **kwargs):
        """Whether LLaDA2's pipeline goes on with its block: while masks and steps are left. There are no edits."""
        return bool(masks_remaining) and step_idx < self.num_inference_steps and not bool(finished.all())

    def _temperature(self, stage):
        """The config's temperature for this stage."""
        first, last = self.config.temperature, self.config.final_temperature
        if last is None:
            return first
        steps = [each for each in self._require_plan() if not each.corrects]
        done = sum(each.t > stage.t for each in steps)
        return last + (first - last) * (len(steps) - done) / len(steps)

    def _check_mask(self, mask_token_id, model_output):
        """Raise ValueError unless this id can stand for the mask."""
        if self.mask_token_id is None:
            raise ValueError(f"process 'uniform' has no mask: leave out mask_token_id {mask_token_id}")
        if not 0 <= mask_token_id <= self.mask_token_id or model_output.shape[-1] != self.path.num_states:
            raise ValueError(
                f"mask_token_id {mask_token_id} must be one of {self.path.num_states} logits, vocab_size and the "
                f"mask's own; model_output has {model_output.shape[-1]}"
            )

    def _clean(self, output, sample, t):
        """`clean_log_probs`. Raises ValueError where the network's output is not finite: what was drawn by it would be
        masks, or no tokens at all."""
        log_p0 = self.clean_log_probs(output, sample, t)
        # on a device the check would wait for it in every step
        if sample.device.type == "cpu" or self._step_index is None:
            self._check_numbers(log_p0, t)
        return log_p0

    def _check_numbers(self, log_p0, t):
        """Raise ValueError where log-probabilities at time t, or at times (B,), are none."""
        failed = log_p0.isnan().flatten(1).any(1)
        if failed.any():
            t = torch.as_tensor(t).expand(len(failed))[failed.cpu()][0]
            raise ValueError(
                f"model_output is not finite (nan, infinite) at timestep {float(self.timestep(t)):g}: the training of "
                f"the network failed, or its numbers overflow in half precision; use bfloat16 or float32"
            )

    @staticmethod
    def check_limits(temperature=None, top_k=None, top_p=None, guidance_scale=1.0):
        """Raise ValueError for what `step` would refuse of these; None stands for none."""
        if temperature is not None:
            check_number("temperature", temperature, 0, 1e3)
        if top_k is not None:
            check_number("top_k", top_k, 1, 10**9, whole=True)
        if top_p is not None:
            check_number("top_p", top_p, 1e-6, 1)
        check_number("guidance_scale", guidance_scale, -1e6, 1e6)

    def _check(self, model_output, sample, free_mask=None):
        """Raise ValueError for what does not fit; return the free positions (B, L)."""
        vocab_size = self.config.vocab_size
        if sample.device.type == "cpu" or self._step_index is None:
            self.path.check_tokens(sample, self.path.num_states)
        if model_output.shape != (*sample.shape, vocab_size):
            raise ValueError(
                f"model_output has shape {tuple(model_output.shape)}; tokens {tuple(sample.shape)} and vocab_size "
                f"{vocab_size} need {(*sample.shape, vocab_size)}: the network must be one of tokens, with this "
                f"vocabulary"
            )
        if free_mask is None:
            return torch.ones_like(sample, dtype=torch.bool)
        if free_mask.dtype != torch.bool or free_mask.shape not in (sample.shape, sample.shape[1:]):
            raise ValueError(
                f"free_mask must be bool of shape {tuple(sample.shape)} or {tuple(sample.shape[1:])}; got "
                f"{free_mask.dtype} {tuple(free_mask.shape)}"
            )
        return free_mask.to(sample.device).expand(sample.shape)

    def _transition(self, stage, sample, parts, guidance_scale):
        """Probabilities (B, L, S or V) of each token at stage.s, of [(log p0, log score or None)], as `step` has it:
        one, or of both sides of guidance."""
        row = PREDICTORS[self.predictor]
        stages = [log_p0 for log_p0, _ in parts]
        if row.of_score:
            scores = [self.path.score(each, sample, stage.t) if said is None else said for each, said in parts]
            stages = scores
            if row.of_rates and len(scores) == 2:
                stages = [guidance_scale * scores[0] + (1 - guidance_scale) * scores[1]]
        if self.config.corrector == "remasking":
            eta = REMASKING_ETA if self.config.remasking_eta is None else self.config.remasking_eta
            return remasking(self.path, sample, stages[0], stage.t, stage.s, eta)
        found = [row.stage(self.path, sample, each, stage.t, stage.s) for each in stages]
        return found[0] if len(found) == 1 else powers(found[0].log(), found[1].log(), guidance_scale).exp()

    def _show(self, stage, sample, log_p0, judged, is_free, generator, threshold):
        """Put drawn clean tokens at those open positions that are first in the predictor's order, noise at the rest."""
        row = PREDICTORS[self.predictor]
        drawn = draw(log_p0.exp(), draw_uniforms(sample.shape, generator, sample.device))
        uniforms = draw_uniforms(sample.shape, generator, sample.device)
        is_open = is_free & (sample == self.mask_token_id) if self.mask_token_id is not None else is_free & ~self._kept
        number = quota(self.path, is_open.sum(-1), stage.t, stage.s)
        if self.mask_token_id is None and row.keeps:
            # of all, as many as should be shown by then
            number = quota(self.path, is_free.sum(-1), 1.0, stage.s) - (is_free & self._kept).sum(-1)
        elif self.mask_token_id is None and stage.s:
            number = torch.zeros_like(number)
        options = {name: self.config[name] for name in row.options if self.config[name] is not None}
        priority, at_once = row.stage(judged, drawn, is_open, uniforms, number, **options)
        now = shown(priority, is_open, number, uniforms)
        if at_once is not None:
            now |= is_open & at_once
        threshold = self.config.threshold if threshold is None else threshold
        if threshold is not None:
            now |= is_open & (at(judged, drawn).exp() > threshold)
        if self.mask_token_id is not None:
            return torch.where(now, drawn, sample)
        if row.keeps:
            self._kept = self._kept | now
        noise = self.init_noise(sample.shape, generator, sample.device)
        return torch.where(now, drawn, torch.where(is_open, noise, sample))

    def _correct(self, t, sample, parts, guidance_scale, is_free, generator):
        """Tokens of which gibbs has drawn some anew, by log p0 (B, L, V), one or those of both sides of guidance."""
        both = draw_uniforms((len(sample), 2, sample.shape[1]), generator, sample.device)
        found = [conditional(self.path, sample, each, t) for each in parts]
        return gibbs(
            sample,
            found[0] if len(found) == 1 else powers(found[0], found[1], guidance_scale),
            is_free,
            both.unbind(1),
            k=self.config.corrector_k,
            selection=self.config.corrector_selection,
            tau=self.config.corrector_selection_tau,
        )
