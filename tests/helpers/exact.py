"""Data whose every noised distribution is known in closed form."""

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput

from score_sde.schedulers.paths import prediction


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


class GaussianImages(ModelMixin, ConfigMixin):
    """Images of 3 x 2 x 2 pixels with a Gaussian distribution, as the network that a pipeline needs: the exact denoised
    sample (prediction type "sample"), with the posterior of any linear measurement in closed form.

    isotropic: of standard deviation 0.5; otherwise all pixels are correlated.
    """

    SHAPE = (1, 3, 2, 2)

    @register_to_config
    def __init__(self, isotropic=False, sample_size=(2, 2), in_channels=3):
        super().__init__()
        # pipelines ask for a network's device and dtype
        self.unused = torch.nn.Parameter(torch.zeros(1))
        factor = torch.randn(12, 12, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
        correlated = factor @ factor.T / 30 + 0.02 * torch.eye(12)
        self.covariance = 0.25 * torch.eye(12, dtype=torch.float64) if isotropic else correlated
        self.mean = torch.linspace(-0.5, 0.5, 12, dtype=torch.float64)
        self.variances, self.vectors = torch.linalg.eigh(self.covariance)
        self.scheduler = None

    def forward(self, sample, timestep, class_labels=None):
        path, t = self.scheduler.path, self.scheduler.path_time(timestep)[:, None]
        alpha, sigma = path.alpha(t), path.sigma(t)
        gain = alpha * self.variances / (alpha**2 * self.variances + sigma**2)
        centred = (sample.flatten(1) - alpha * self.mean) @ self.vectors
        denoised = self.mean + (centred * gain) @ self.vectors.T
        return UNet2DOutput(sample=denoised.reshape(sample.shape).to(sample.dtype))

    def measure(self, operator, noise_std, seed=5):
        """The measurement of a random image, and the posterior's mean (12,) and covariance (12, 12)."""
        generator = torch.Generator().manual_seed(seed)
        basis = torch.eye(12, dtype=torch.float64).reshape(12, *self.SHAPE[1:])
        matrix = torch.stack([operator(image[None]).flatten() for image in basis], dim=1)
        image = self.mean + torch.linalg.cholesky(self.covariance) @ torch.randn(12, generator=generator).double()
        known = matrix.abs().sum(1) > 0
        y = matrix @ image + noise_std * known * torch.randn(len(matrix), generator=generator)
        a = matrix[known]
        inverse = torch.linalg.inv(a @ self.covariance @ a.T + noise_std**2 * torch.eye(len(a)))
        gain = self.covariance @ a.T @ inverse
        shape = operator(torch.zeros(self.SHAPE)).shape
        mean = self.mean + gain @ (y[known] - a @ self.mean)
        return y.reshape(shape).float(), mean, self.covariance - gain @ a @ self.covariance

    @staticmethod
    def distance(samples, mean, covariance):
        """How far the samples' mean is from this one, in its standard deviations, the largest over the dimensions; and
        how far their covariance is, relative, in the Frobenius norm."""
        x = samples.flatten(1).double()
        offset = (x.mean(0) - mean) / covariance.diagonal().sqrt()
        return float(offset.abs().max()), float((x.T.cov() - covariance).norm() / covariance.norm())


# relative: diffusers keeps its noise levels in float32
TOLERANCE = 5e-4
