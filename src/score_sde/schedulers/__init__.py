"""Noise paths, the solvers that sample along them, and the scheduler that plugs both into diffusers."""

from .paths import EDMSDE, VESDE, VPSDE, CosineVPSDE, DiscreteVPSDE, LinearSDE, SubVPSDE
from .scheduling_discrete_score import DiscreteScoreScheduler
from .scheduling_score_sde import ScoreSDEScheduler


__all__ = [
    "VESDE",
    "VPSDE",
    "CosineVPSDE",
    "DiscreteScoreScheduler",
    "DiscreteVPSDE",
    "EDMSDE",
    "LinearSDE",
    "ScoreSDEScheduler",
    "SubVPSDE",
]
