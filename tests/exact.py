"""Data whose every noised distribution is known in closed form."""

import torch

from score_sde.paths import prediction


class GaussianMixture:
    """A mixture of axis-aligned Gaussians in D dimensions; one component makes it a Gaussian. All in float64.

    weights (K,), means (K, D), variances (K, D).
    """

    def __init__(self, weights, means, variances):
        self.weights, self.means, self.variances = (
            torch.as_tensor(values, dtype=torch.float64) for values in (weights, means, variances)
        )

    def sample(self, n, generator):
        which = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        noise = torch.randn(n, self.means.shape[1], generator=generator, dtype=torch.float64)
        return self.means[which] + self.variances[which].sqrt() * noise

    def noised(self, path, t):
        """Means and variances of the components of x_t."""
        alpha, sigma = path.alpha(t), path.sigma(t)
        return alpha * self.means, alpha**2 * self.variances + sigma**2

    def denoised(self, x, path, t):
        """E[x0 | x_t]: the components' posterior means, each by its share."""
        means, variances = self.noised(path, t)
        squares = (x[:, None] - means) ** 2 / variances + variances.log()
        share = torch.softmax(self.weights.log() - squares.sum(-1) / 2, dim=1)[..., None]
        gains = path.alpha(t) * self.variances / variances
        return (share * (self.means + gains * (x[:, None] - means))).sum(1)

    def flow(self, x, path, t, s):
        """The exact probability-flow map x_t -> x_s, of a single Gaussian."""
        (mean_t, variance_t), (mean_s, variance_s) = self.noised(path, t), self.noised(path, s)
        return mean_s + (variance_s / variance_t).sqrt() * (x - mean_t)

    def network(self, scheduler):
        """What a perfectly trained network returns: f(x, timestep) -> F with x0 = a x_t + b F, for samples (B, D)."""

        def call(scaled_x, timestep):
            t = scheduler.path_time(timestep)
            row = prediction(scheduler.path, scheduler.config.prediction_type, t, scheduler.config.sigma_data)
            x = scaled_x / row.input_scale
            return (self.denoised(x, scheduler.path, t) - row.a * x) / row.b

        return call


GAUSSIAN = GaussianMixture([1.0], [[0.5, -1.0, 0.0, 2.0]], [[0.01, 0.25, 1.0, 4.0]])
MIXTURE = GaussianMixture(
    [0.5, 0.3, 0.2], [[1.0, 1.0], [-1.0, 0.5], [0.0, -1.5]], [[0.05, 0.05], [0.02, 0.1], [0.1, 0.02]]
)
