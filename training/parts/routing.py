"""Token routing: in training, a random share of a transformer's tokens goes around its middle blocks, which then take
less time (TREAD, Krause et al. 2025). The loss and the network are the same."""

import inspect
import math
from dataclasses import dataclass

from .config import option
from .few_steps import DENOISING


@dataclass
class RoutingConfig:
    token_routing: float = option(
        0.0,
        "Share of the tokens of each sample, drawn anew at every step, that go around the middle blocks of a dit in "
        "training (TREAD: 0.5): faster steps; 0 for none. Sampling and evaluation take all of them.",
        "speed and memory",
    )

    def routing_problems(self):
        if not 0 <= self.token_routing < 1:
            yield f"token_routing {self.token_routing} must be at least 0 and below 1"
        if self.token_routing and self.method != DENOISING:
            yield f"token_routing is of {DENOISING}, and not of method {self.method}: leave it out"


def check_routing(network):
    """Raise ValueError for a network whose tokens cannot go around blocks."""
    if "kept_tokens" not in inspect.signature(network.forward).parameters:
        raise ValueError(f"token_routing needs a network of tokens, such as dit; a {type(network).__name__} has none")
    if not network.routed_blocks:
        raise ValueError(
            "token_routing needs a network of 3 blocks at least, with conditioning adaln_zero or adaln and without "
            "factorized_attention"
        )


class Routed:
    """A network as a function in which a share of the tokens, drawn by `loop.Draws`, goes around the routed blocks.

    Args:
        network: the one to call, which may be wrapped.
        patch: sides of its patches.
    """

    def __init__(self, network, patch, share, draws):
        self.network, self.patch, self.share, self.draws = network, patch, share, draws

    def __call__(self, sample, *args, **kwargs):
        tokens = math.prod(side // each for side, each in zip(sample.shape[2:], self.patch, strict=True))
        kept = max(1, tokens - round(self.share * tokens))
        order = self.draws.uniforms((tokens,)).argsort(dim=1)
        return self.network(sample, *args, kept_tokens=order[:, :kept].sort(dim=1).values, **kwargs)
