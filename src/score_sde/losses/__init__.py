"""Training objectives, each a combination of a density over times, a weighting and a row of what the network predicts.

Every denoising objective is a weighted squared error of the denoised sample, E_t[w(t) |x0 - x0_hat|^2], per dimension.
The published ones, by the names that `score-sde train` takes:

| objective | time_density | weighting | prediction_type |
|---|---|---|---|
| DDPM "simple" (Ho et al. 2020); score matching with weight sigma^2 (Song et al. 2021) | uniform | simple | epsilon |
| SMLD, NCSN (Song & Ermon 2019) | levels | simple | score |
| maximum likelihood (Song et al. 2021b): weight g^2, importance-sampled t | importance | likelihood | any |
| iDDPM and DiT (Nichol & Dhariwal 2021): `hybrid_loss` | levels | simple | epsilon, learned variance |
| EDM (Karras et al. 2022) | log_normal | edm | edm |
| min-SNR-gamma (Hang et al. 2023) | uniform | min_snr | any |
| P2 (Choi et al. 2022) | uniform | p2 | any |
| flow matching, SiT (Ma et al. 2024) | uniform | velocity | flow_prediction |
| SD3 (Esser et al. 2024) | logit_normal | velocity | flow_prediction |
| JiT (Li & He 2025), in pixels: mean 0.8, std 0.8, least_time 0.05 | logit_normal | velocity | sample |

On a variance-preserving or linear path with the prediction of the last column, the weighting "output" is the same as
simple, edm and velocity: the plain mean squared error of the network's output; "sample" is that of the denoised sample.
`sliced_score_matching` needs no noise of its own.

Noise on tokens has one objective, the evidence bound, in two forms; `DiscreteObjective` takes as time_density uniform,
alpha (uniform in alpha) or importance (uniform in log(1 - alpha)):

| objective | loss | prediction_type |
|---|---|---|
| MDLM (Sahoo et al. 2024), MD4 (Shi et al. 2024): cross entropy of masked tokens | elbo | sample |
| UDLM (Schiff et al. 2025): uniform noise | elbo | leave_one_out |
| SEDD (Lou et al. 2024): denoising score entropy | score_entropy | score |

Flow maps, for one to four evaluations, have two objectives, by the velocity of the data or of a teacher:

| objective | function | where the map leads | velocity |
|---|---|---|---|
| MeanFlow (Geng et al. 2025): error_weight adaptive | `continuous_loss` | anywhere | the data's, `guided` or not |
| sCT, sCD (Lu & Song 2025): error_weight normalized, warmup | `continuous_loss` | t_min | the data's; a teacher's |
| easy consistency tuning (Geng et al. 2025b): `tuning_times` | `composed_loss` | t_min | the data's |
| consistency training, distillation (Song et al. 2023) | `composed_loss` | t_min | the data's; a teacher's |
| self-consistency of shortcut models (Frans et al. 2025) | `composed_loss` | anywhere | of the map itself |

All take `conditions`, {keyword of the network's forward: tensor (B, ...)}, of which `drop_conditions` leaves some out
for guidance, and, but for flow maps, a `mask` of the elements that count.
"""

from .conditions import drop_conditions
from .denoising import (
    INVERSE_DENSITIES,
    TIME_DENSITIES,
    WEIGHTINGS,
    Objective,
    denoising_loss,
    discretized_log_likelihood,
    hybrid_loss,
    sliced_score_matching,
    uniform_times,
    vlb_terms,
)
from .discrete import DISCRETE_INVERSE_DENSITIES, DISCRETE_LOSSES, DISCRETE_TIME_DENSITIES, DiscreteObjective
from .few_step import (
    ERROR_WEIGHTS,
    composed_loss,
    composed_velocity,
    continuous_loss,
    flow_map,
    guided,
    heun_velocity,
    mean_velocity,
    mean_velocity_and_slope,
    mean_velocity_and_wide_slope,
    straight_sample,
    tuning_times,
    working_derivative,
)
from .few_step_objectives import FEW_STEP_METHODS, FewStepObjective


__all__ = [
    "DISCRETE_INVERSE_DENSITIES",
    "DISCRETE_LOSSES",
    "DISCRETE_TIME_DENSITIES",
    "ERROR_WEIGHTS",
    "FEW_STEP_METHODS",
    "INVERSE_DENSITIES",
    "TIME_DENSITIES",
    "WEIGHTINGS",
    "DiscreteObjective",
    "FewStepObjective",
    "Objective",
    "composed_loss",
    "composed_velocity",
    "continuous_loss",
    "denoising_loss",
    "discretized_log_likelihood",
    "drop_conditions",
    "flow_map",
    "guided",
    "heun_velocity",
    "hybrid_loss",
    "mean_velocity",
    "mean_velocity_and_slope",
    "mean_velocity_and_wide_slope",
    "sliced_score_matching",
    "straight_sample",
    "tuning_times",
    "uniform_times",
    "vlb_terms",
    "working_derivative",
]
