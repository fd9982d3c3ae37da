"""Score-based diffusion through SDEs (Song et al. 2021) and Diffusion Transformers for diffusers."""

import importlib
from typing import TYPE_CHECKING


__version__ = "0.1.0"

_EXPORTS = {
    "schedulers": [
        *("CosineVPSDE", "DiscreteVPSDE", "EDMSDE", "LinearSDE", "SubVPSDE", "VESDE", "VPSDE"),
        *("DiscreteScoreScheduler", "ScoreSDEScheduler"),
    ],
    "models": ["DiTModel", "NoiseConditionalClassifier", "ScoreUNetModel"],
    "pipelines": ["ScoreSDEInversePipeline", "ScoreSDEPipeline", "ScoreSDETextPipeline"],
    "sharing": ["load_bundle", "push_to_hub", "save_bundle"],
}
_MODULE_OF = {name: module for module, names in _EXPORTS.items() for name in names}
# diffusers looks these up on the package that a component's class comes from
_DIFFUSERS_BASES = {
    "ModelMixin": "diffusers.models.modeling_utils",
    "SchedulerMixin": "diffusers.schedulers.scheduling_utils",
}

__all__ = sorted(_MODULE_OF)

if TYPE_CHECKING:  # for editors and type checkers, which read and don't run
    from .models import DiTModel, NoiseConditionalClassifier, ScoreUNetModel
    from .pipelines import ScoreSDEInversePipeline, ScoreSDEPipeline, ScoreSDETextPipeline
    from .schedulers import (
        EDMSDE,
        VESDE,
        VPSDE,
        CosineVPSDE,
        DiscreteScoreScheduler,
        DiscreteVPSDE,
        LinearSDE,
        ScoreSDEScheduler,
        SubVPSDE,
    )
    from .sharing import load_bundle, push_to_hub, save_bundle


def __getattr__(name):
    """Import a public name on its first use: `import score_sde` alone is quick."""
    if name in _MODULE_OF:
        return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    if name in _DIFFUSERS_BASES:
        return getattr(importlib.import_module(_DIFFUSERS_BASES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *__all__])
