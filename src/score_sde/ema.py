"""Power-function averages of weights, and their reconstruction after training (Karras et al. 2024, "Analyzing and
Improving the Training Dynamics of Diffusion Models", section 3 and appendix C): what diffusers' `EMAModel` lacks.

An average at step t weighs the weights of step s <= t by the profile p(s) = (gamma + 1) s^gamma / t^(gamma + 1). Its
relative width sigma_rel, the standard deviation of the profile as a share of t, names it. The profiles of the averages
that were stored, of some widths at some steps, add up to that of any other width and step, nearly.
"""

import math

import torch
from diffusers.training_utils import EMAModel


# that of gamma = 0, the mean of all steps
LARGEST_SIGMA_REL = 1 / math.sqrt(12)


def sigma_rel_of(gamma):
    """Relative width of the profile with this exponent (section 3.1)."""
    return math.sqrt(gamma + 1) / ((gamma + 2) * math.sqrt(gamma + 3))


def gamma_of(sigma_rel):
    """Exponent of the profile of this relative width: the largest root of (gamma + 2)^2 (gamma + 3) sigma_rel^2 =
    gamma + 1, by Viète's formula.

    Raises ValueError outside (0, 1/sqrt(12)), where gamma would not be positive.
    """
    if not 0 < sigma_rel < LARGEST_SIGMA_REL:
        raise ValueError(f"sigma_rel {sigma_rel} must lie in (0, {LARGEST_SIGMA_REL:.4f})")
    # with u = gamma + 7/3: u^3 = p u + q
    p, q = 1 / 3 + sigma_rel**-2, -2 / 27 - 4 / 3 * sigma_rel**-2
    return 2 * math.sqrt(p / 3) * math.cos(math.acos(1.5 * q / p * math.sqrt(3 / p)) / 3) - 7 / 3


class PowerFunctionEMA(EMAModel):
    """diffusers' `EMAModel` with the decay beta(t) = (1 - 1/t)^(gamma + 1) at step t = 1, 2, ...

    Over T steps it weighs step t by the integral of the profile from t - 1 to t, exactly.
    """

    def __init__(self, parameters, sigma_rel, foreach=True):
        super().__init__(parameters, foreach=foreach)
        self.gamma = gamma_of(sigma_rel)

    def get_decay(self, optimization_step):
        return (1 - 1 / optimization_step) ** (self.gamma + 1)


def inner_product(steps, gammas, other_steps, other_gammas):
    """Integral of the product of two profiles (appendix C.3); broadcasts."""
    first, last = torch.minimum(steps, other_steps), torch.maximum(steps, other_steps)
    scale = (gammas + 1) * (other_gammas + 1) / (gammas + other_gammas + 1)
    return scale * (first / steps) ** gammas * (first / other_steps) ** other_gammas / last


def reconstruction_weights(steps, sigma_rels, step, sigma_rel):
    """How the average of one profile is a sum of stored ones, by least squares over the profiles (appendix C.3).

    Args:
        steps, sigma_rels: of the stored averages, lists.
        step, sigma_rel: of the profile to approximate.

    Returns:
        The weight of each stored average, float64, and the relative error of the profile: the norm of what is left of
        it over its own norm.
    """
    t, gammas = (torch.tensor(x, dtype=torch.float64) for x in (steps, [gamma_of(s) for s in sigma_rels]))
    own = torch.tensor([step, gamma_of(sigma_rel)], dtype=torch.float64)
    gram = inner_product(t[:, None], gammas[:, None], t, gammas)
    overlap = inner_product(t, gammas, *own)
    # neighbouring profiles are almost parallel: the smallest of the solutions that are equal up to rounding
    weights = torch.linalg.lstsq(gram, overlap[:, None], driver="gelsd").solution[:, 0]
    norm = inner_product(*own, *own)
    left = norm - 2 * weights @ overlap + weights @ gram @ weights
    return weights, float((left / norm).clamp_min(0).sqrt())
