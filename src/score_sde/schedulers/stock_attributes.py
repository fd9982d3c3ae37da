"""What stock pipelines and training scripts read of a scheduler beside its methods: the tables of a chain of betas, as
views on a path."""

import torch


TABLES = ("alphas_cumprod", "final_alpha_cumprod", "alphas", "betas")


def stock_tables(parameterization, n):
    """{name of TABLES: float32 tensor} for the network's timesteps 0 to n - 1; empty where `why_not` says why.

    alphas_cumprod is alpha^2; alphas and betas = 1 - alphas are those of the chain through these levels, from clean
    data; final_alpha_cumprod is that of clean data, where every trajectory leads.
    """
    if why_not(parameterization, n):
        return {}
    alpha2 = parameterization.path.alpha(parameterization.path_time(torch.arange(n))) ** 2
    alphas = alpha2 / torch.cat([torch.ones(1, dtype=torch.float64), alpha2[:-1]])
    tables = {"alphas_cumprod": alpha2, "alphas": alphas, "betas": 1 - alphas}
    return {name: values.float() for name, values in tables.items()} | {"final_alpha_cumprod": torch.ones(())}


def why_not(parameterization, n):
    """Why the tables have no meaning, a sentence; None where they have."""
    path = parameterization.path
    inside = torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    if ((path.alpha(inside) ** 2 + path.sigma(inside) ** 2 - 1).abs() > 1e-9).any():
        return "it means alpha^2 where alpha^2 + sigma^2 = 1, which this path does not keep"
    if parameterization.time_input != "t" or not 0 < parameterization.path_time(float(n - 1)) <= 1 + 1e-9:
        return "it is indexed by whole timesteps, which this network does not receive"
    return None
