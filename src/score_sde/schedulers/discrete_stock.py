"""What diffusers' own discrete schedulers mean, and what their pipelines ask of a scheduler beside `step`.

| diffusers | process | predictor |
|---|---|---|
| `DiscreteDDIMScheduler` | uniform, alpha = 1 - t | ancestral, with corrector_steps gibbs |
| `EntropyBoundScheduler` | uniform | entropy_bounded, at a temperature from t_max to t_min |
| `BlockRefinementScheduler` | absorbing, or as DiffusionGemma has it process="uniform" | confidence, its threshold |

Their configs don't say the vocabulary. Their pipelines count steps up from 0 and tell the network no time.
"""

import torch


INDEXED = {"noise": "log_linear", "alpha_min": 0.0, "prediction_type": "sample", "timestep_type": "index"}
# diffusers' other schedulers of tokens
REFUSED = {
    "AmusedScheduler": "its order of positions adds Gumbel noise to the confidence; build the process, which is "
    "DiscreteScoreScheduler(vocab_size, predictor='confidence', timestep_spacing='cosine')",
    "VQDiffusionScheduler": "its tokens become masks and others, by a rate for each",
}
# what only they have
KEYS = {
    "corrector_selection": "DiscreteDDIMScheduler",
    "entropy_bound": "EntropyBoundScheduler",
    "minimal_topk": "BlockRefinementScheduler",
    "masking_schedule": "AmusedScheduler",
    "num_vec_classes": "VQDiffusionScheduler",
}


def from_stock_config(config, given):
    """The config of a `DiscreteScoreScheduler` with the process and the sampler of the stock scheduler with this
    config; `given` are the keywords of from_config.

    Raises ValueError for schedulers of continuous data, for those without a counterpart, and where the vocabulary is
    not given.
    """
    # only a file says it
    name = config.get("_class_name") or next((each for key, each in KEYS.items() if key in config), None)
    if "sde_type" in config or name == "ScoreSDEScheduler":
        raise ValueError(
            "this is the config of a ScoreSDEScheduler, whose samples are continuous: DiscreteScoreScheduler is for "
            "networks of tokens"
        )
    if name in REFUSED:
        raise ValueError(f"{name} has no counterpart here: {REFUSED[name]}")
    if name not in TAKEN:
        raise ValueError(
            f"no process over tokens is known for the config of {name or 'this scheduler'}: from_config takes its own "
            f"and those of {', '.join(TAKEN)}; build others as DiscreteScoreScheduler(vocab_size, process=..., ...)"
        )
    if "vocab_size" not in given:
        raise ValueError(
            f"the config of {name} does not say the vocabulary: pass vocab_size, the number of the network's logits "
            f"(less the mask's own)"
        )
    stock = {key: value for key, value in config.items() if key not in ("_use_default_values", "_class_name")}
    return stock | INDEXED | TAKEN[name](config, given)


def _of_ddim(config, given):
    ours = {"process": "uniform", "predictor": "ancestral", "temperature": 0.0}
    steps = config.get("corrector_steps", 0)
    if not steps:
        # what it says of a corrector that doesn't run
        ours |= {"corrector_k": 1, "corrector_selection": "random", "corrector_selection_tau": 1.0}
    return ours | {"corrector": "gibbs" if steps else None, "corrector_steps": steps}


def _of_entropy_bound(config, given):
    ours = {"process": "uniform", "predictor": "entropy_bounded"}
    return ours | {"temperature": config["t_max"], "final_temperature": config["t_min"]}


def _of_block_refinement(config, given):
    refuse_editing(config.get("editing_threshold"))
    return {"process": given.get("process", "absorbing"), "predictor": "confidence", "temperature": 0.0}


TAKEN = {
    "DiscreteDDIMScheduler": _of_ddim,
    "EntropyBoundScheduler": _of_entropy_bound,
    "BlockRefinementScheduler": _of_block_refinement,
}


def refuse_editing(editing_threshold):
    """Raise ValueError unless the threshold asks for no editing."""
    if editing_threshold is not None and editing_threshold > 0:
        raise ValueError(
            f"editing_threshold {editing_threshold} replaces tokens that are shown, which the absorbing process keeps: "
            f"pass editing_threshold=None"
        )


def moved_mask(tokens, own, theirs):
    """Tokens with the ids of two masks exchanged: where a vocabulary has its mask at another place than at its end."""
    return torch.where(tokens == own, theirs, torch.where(tokens == theirs, own, tokens))


def without_mask(logits, theirs):
    """Logits (..., V + 1) with that of the mask in place of the last, and the last left out: (..., V)."""
    last = logits[..., -1:]
    place = torch.arange(logits.shape[-1] - 1, device=logits.device) == theirs
    return torch.where(place, last, logits[..., :-1])


def has_ended(tokens, eos_token_id, mask_token_id, prompt_length):
    """Which sequences (B,) of tokens (B, L) have an end after the prompt, and no mask before it."""
    generated = tokens[:, prompt_length:]
    is_end = generated == eos_token_id
    before = is_end.cumsum(1) == 0
    return is_end.any(1) & ~(before & (generated == mask_token_id)).any(1)
