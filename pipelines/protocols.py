"""What pipelines ask of networks, schedulers and noise paths, for type checkers and readers."""

from collections.abc import Callable
from typing import Any, Protocol

import torch


# {argument of the network's forward: tensor (B, ...)}
Conditions = dict[str, torch.Tensor]
# f(model_input (B, C, ...), timesteps (B,)) -> output (B, C or 2 C, ...), float32: a network with all that it is told
GuidedNetwork = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
# f(x_t (B, C, ...), t: one time or (B,)) -> estimate of x_0 (B, C, ...)
Denoiser = Callable[[torch.Tensor, Any], torch.Tensor]
Generators = torch.Generator | list[torch.Generator] | None


class Network(Protocol):
    """A model of diffusers. Ours also have `null_conditions(conditions)`."""

    # a mapping whose entries are attributes, too
    config: Any
    dtype: torch.dtype

    def __call__(self, sample: torch.Tensor, timestep: torch.Tensor, /, **conditions: torch.Tensor) -> Any:
        """An object whose `.sample` is the output (B, C or 2 C, ...)."""


class Path(Protocol):
    """Noise as two functions of t in [0, 1]: see `schedulers/paths.py`."""

    def alpha(self, t: Any) -> torch.Tensor: ...

    def sigma(self, t: Any) -> torch.Tensor: ...

    def sample(self, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor: ...

    def add_to_score(self, denoised: torch.Tensor, gradient: torch.Tensor, t: Any) -> torch.Tensor: ...

    def transition(self, s: Any, t: Any) -> tuple[torch.Tensor, torch.Tensor]: ...

    def gaussian_gain(self, t: Any, data_std: float) -> torch.Tensor: ...


class Scheduler(Protocol):
    """A scheduler of diffusers; what stands after `step` only ours has, which `check_own_scheduler` asks for."""

    config: Any
    timesteps: torch.Tensor
    init_noise_sigma: Any
    order: int

    def set_timesteps(self, num_inference_steps: int, device: Any = None, **settings: Any) -> None: ...

    def scale_model_input(self, sample: torch.Tensor, timestep: Any) -> torch.Tensor: ...

    def add_noise(self, x0: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor: ...

    def step(self, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, **settings: Any) -> Any: ...

    path: Path
    t_min: float
    t_max: float
    # where samples live; None for flat space
    domain: Any

    def denoiser(self, network: GuidedNetwork, limited: bool = True) -> Denoiser: ...

    def steered(self, network: GuidedNetwork, steer: Callable[..., torch.Tensor]) -> GuidedNetwork: ...

    def classifier_input(self, x: torch.Tensor, t: Any) -> tuple[torch.Tensor, torch.Tensor]: ...

    def path_time(self, timestep: Any) -> torch.Tensor: ...

    def rewind(self, index: int) -> None: ...
