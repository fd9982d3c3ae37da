"""A trajectory on a domain."""

import torch

from .trajectory import PlannedTrajectory


class DomainTrajectory(PlannedTrajectory):
    """The plan of flat space on a domain: every stage runs in the tangent space at the sample, whose origin the sample
    is, and the sample follows the geodesic of what it returns. The past goes along by parallel transport.

    On the torus and in the box this is the flat solver on the line that is rolled or folded up. On the sphere, which is
    curved, no solver has an order above 2.
    """

    def step(self, entry, output, x, draw_noise, variance=None, redo_noise=True):
        """As of `PlannedTrajectory`; the denoised samples are the points at the distance sigma^2 score."""
        domain = self.parameterization.domain
        score, origin = domain.tangent(x, output.to(x.dtype)), torch.zeros_like(x)
        tangent, denoised = super().step(entry, score, origin, lambda: domain.tangent(x, draw_noise()))
        for past in (self.memory.samples, self.memory.denoised):
            for i, each in enumerate(past):
                past[i] = domain.transport(x, tangent, each - tangent)
        return domain.step(x, tangent), domain.step(x, denoised)
