"""Data on domains whose every noised distribution is known in closed form."""

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput

from score_sde.schedulers.domains import build_domain, listed


class KernelMixture:
    """A mixture of heat kernels on a domain: Brownian motion from it only widens them. All in float64.

    weights (K,), centers (K, C) on the domain, widths (K,).
    """

    def __init__(self, domain, weights, centers, widths):
        self.name, self.domain = domain, build_domain(listed(domain))
        self.weights, centers, self.widths = (torch.tensor(each).double() for each in (weights, centers, widths))
        self.centers = self.domain.wrap(centers)

    def sample(self, n, generator):
        which = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        return self.domain.perturb(self.centers[which], self.widths[which], generator=generator)

    def _each(self, x, sigma):
        """For every component its center, expanded, and the width that it has."""
        for center, width in zip(self.centers, self.widths, strict=True):
            yield center.reshape(1, -1, *[1] * (x.ndim - 2)).expand_as(x), (width**2 + sigma**2).sqrt()

    def log_density(self, x, sigma=0.0):
        """(B,) at points (B, C, ...), with Brownian motion of standard deviation sigma since."""
        sigma = torch.as_tensor(sigma, dtype=torch.float64)
        logs = [self.domain.log_kernel(x.double(), *each) for each in self._each(x, sigma)]
        return (torch.stack(logs, dim=1) + self.weights.log()).logsumexp(1)

    def score(self, x, sigma):
        """Its gradient, (B, C, ...), of the dtype of x."""
        each = [self.domain.kernel(x.double(), *component) for component in self._each(x, sigma)]
        logs, scores = (torch.stack(part, dim=1) for part in zip(*each, strict=True))
        shares = (logs + self.weights.log()).softmax(1)
        return (shares.reshape(*shares.shape, *[1] * (x.ndim - 1)) * scores).sum(1).to(x.dtype)

    def network(self, scheduler):
        """What a perfectly trained network returns: f(x, timestep) -> score."""
        return lambda x, timestep: self.score(x, scheduler.path.sigma(scheduler.path_time(timestep)))


TORUS = KernelMixture("torus", [0.5, 0.3, 0.2], [[0.3, -3.0], [2.0, 1.0], [-1.0, 3.1]], [0.3, 0.2, 0.5])
BOX = KernelMixture("box", [0.5, 0.3, 0.2], [[1.0, -0.5], [-0.9, 1.0], [0.0, 0.0]], [0.2, 0.1, 0.3])
SPHERE = KernelMixture("sphere", [0.5, 0.3, 0.2], [[1.0, 2, 3], [-1, 0, 0], [0, 1, -1]], [0.3, 0.2, 0.5])
PRODUCT = KernelMixture(
    {"sphere": 3, "torus": 1, "flat": 1},
    [0.6, 0.4],
    [[1.0, 2, 3, 3.0, 1.0], [-1, 0, 0, -2.0, -1.0]],
    [0.3, 0.2],
)
EVERY = {"torus": TORUS, "box": BOX, "sphere": SPHERE, "product": PRODUCT}


class MixtureNetwork(ModelMixin, ConfigMixin):
    """The exact score of `SPHERE`, of samples (B, 3, 1), as the network that a pipeline needs."""

    @register_to_config
    def __init__(self, sample_size=(1,), in_channels=3, out_channels=3):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))
        self.scheduler = None

    def forward(self, sample, timestep):
        return UNet2DOutput(sample=SPHERE.network(self.scheduler)(sample, timestep))
