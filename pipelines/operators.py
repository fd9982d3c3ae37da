"""Linear measurements of images, y = A x, for `ScoreSDEInversePipeline`: images x are (B, C, H, W) in [-1, 1]."""

import torch
import torch.nn.functional as F
from diffusers.utils.torch_utils import randn_tensor

from .adaptive import in_float64


class Constant:
    """A tensor beside which images of any device and dtype come: moved there once."""

    def __init__(self, tensor):
        self.tensor, self.moved = tensor, {}

    def like(self, x):
        key = (x.device, x.dtype)
        if key not in self.moved:
            with torch.inference_mode(False):
                self.moved[key] = self.tensor.to(x)
        return self.moved[key]


class LinearOperator:
    """A linear measurement as a pair of functions: `operator(x)` is y, `operator.adjoint(y, x.shape)` its adjoint.

    Args:
        forward: f(x (B, C, H, W)) -> y (B, ...), linear and differentiable.
        adjoint: f(y) -> x (B, C, H, W), the transpose of forward: <forward(x), y> = <x, adjoint(y)>. None derives it
            from forward by automatic differentiation.
        gram: the number g for which A A^T y = g y for all y that A can return; None where there is none. Equations are
            then solved by conjugate gradients.
        value_range: (least, largest) value of y for images in [-1, 1], None where it is unknown.
    """

    def __init__(self, forward, adjoint=None, gram=None, value_range=None):
        self.forward, self.transpose, self.gram, self.value_range = forward, adjoint, gram, value_range

    def __call__(self, x):
        return self.forward(x)

    def adjoint(self, y, shape):
        """A^T y for images of this shape (B, C, H, W)."""
        if self.transpose is not None:
            return self.transpose(y)
        with torch.enable_grad():
            x = torch.zeros(shape, dtype=y.dtype, device=y.device, requires_grad=True)
            [transposed] = torch.autograd.grad(self.forward(x), x, y)
        return transposed

    def solve(self, y, shape, prior_variance, noise_variance):
        """(prior_variance A A^T + noise_variance)^-1 y, for y that A can return; the variances are numbers or one per
        sample (B,)."""
        # numbers, or (B, 1) for samples as rows
        prior, noise = (
            variance.to(y).expand(len(y))[:, None] if torch.is_tensor(variance) and variance.ndim else variance
            for variance in (prior_variance, noise_variance)
        )
        if self.gram is not None:
            return (y.flatten(1) / (prior * self.gram + noise)).reshape(y.shape)

        def apply(v):
            there_and_back = self.forward(self.adjoint(v, shape))
            return (prior * there_and_back.flatten(1) + noise * v.flatten(1)).reshape(v.shape)

        return conjugate_gradients(apply, y)

    def pseudo_inverse(self, y, shape):
        """A^+ y = A^T (A A^T)^-1 y: the smallest images of this shape with the measurement y."""
        return self.adjoint(self.solve(y, shape, 1.0, 0.0), shape)

    def check(self, shape, device="cpu", generator=None):
        """The shape of the measurement of images of this shape (B, C, H, W).

        Raises ValueError where forward isn't linear or adjoint isn't its adjoint (the dot-product test, on random
        images), saying by how much.
        """
        a, b = (randn_tensor(shape, generator=generator, device=torch.device(device)) for _ in range(2))
        try:
            y = self.forward(a)
        except RuntimeError as error:
            raise ValueError(f"the operator does not take images of shape {tuple(shape)}: {error}") from error
        sum_of_both, both = self.forward(a - 2 * b), y - 2 * self.forward(b)
        if len(y) != len(a) or not torch.allclose(sum_of_both, both, rtol=1e-3, atol=1e-3 * float(both.abs().max())):
            raise ValueError(
                f"the operator is not linear: A(a - 2 b) differs from A(a) - 2 A(b) by "
                f"{float((sum_of_both - both).abs().max()):g}"
            )
        v = randn_tensor(y.shape, generator=generator, device=torch.device(device))
        back = self.adjoint(v, shape)
        if back.shape != a.shape:
            raise ValueError(f"the adjoint returns shape {tuple(back.shape)} for images of shape {tuple(shape)}")
        left, right = (float(in_float64(one * other).sum()) for one, other in ((y, v), (a, back)))
        if abs(left - right) > 1e-3 * float(y.norm() * v.norm()):
            raise ValueError(
                f"the operator's adjoint is wrong: <A x, y> = {left:g}, <x, A^T y> = {right:g} for random x and y; "
                f"leave adjoint out to derive it"
            )
        return y.shape


def conjugate_gradients(apply, y, iterations=50, tolerance=1e-5):
    """The solution v of apply(v) = y for a symmetric positive semidefinite map, for every sample (B, ...) its own; it
    stops where all residuals are below the tolerance times |y|, which on an accelerator, that would have to be waited
    for, is looked at after every fifth step."""

    def dot(a, b):
        return (a * b).flatten(1).sum(1).reshape(-1, *[1] * (y.ndim - 1))  # (B, 1, ...)

    solution, residual = torch.zeros_like(y), y
    direction, square = residual, dot(residual, residual)
    target = tolerance**2 * square
    every = 1 if y.device.type == "cpu" else 5
    for i in range(iterations):
        if i and i % every == 0 and bool((square <= target).all()):
            break
        image = apply(direction)
        curvature = dot(direction, image)
        step = torch.where((square > target) & (curvature > 0), square / curvature, 0.0)
        solution = solution + step * direction
        residual = residual - step * image
        square, before = dot(residual, residual), square
        direction = residual + torch.where(before > 0, square / before, 0.0) * direction
    return solution


def inpainting(mask):
    """Only the pixels where the mask is 1 or True are known; the measurement is 0 elsewhere.

    Args:
        mask: (H, W), (C, H, W) or (B, C, H, W), a tensor or array; C and B may be 1.

    Raises ValueError for other values than 0 and 1.
    """
    mask = torch.as_tensor(mask)
    known = Constant(mask)
    values = mask.unique().tolist()
    if not set(values) <= {0, 1}:
        raise ValueError(f"the mask's values must be 0 (unknown) or 1 (known); it has {values[:5]}")

    def keep(x):
        if mask.ndim > x.ndim or any(own not in (1, size) for own, size in zip(mask.shape[::-1], x.shape[::-1])):  # noqa: B905
            raise ValueError(f"a mask of shape {tuple(mask.shape)} does not fit images of shape {tuple(x.shape)}")
        return x * known.like(x)

    return LinearOperator(keep, keep, gram=1.0, value_range=(-1, 1))


# of red, green and blue in grey (ITU-R 601), as Pillow has it
LUMINANCE = (0.299, 0.587, 0.114)


def colourisation(channels=3, weights=None):
    """Only the mean of the channels is known, (B, 1, H, W): the image in grey. Up to its scale it is one of the
    decoupled coordinates of Song et al. 2021, appendix I.2.

    Args:
        weights: of the channels in the mean, whose sum is 1, such as `LUMINANCE`; None for the same.

    Raises ValueError for weights of another number or sum.
    """
    weights = [1 / channels] * channels if weights is None else [float(each) for each in weights]
    if len(weights) != channels or not min(weights) >= 0 or abs(sum(weights) - 1) > 1e-4:
        raise ValueError(f"weights {weights} of {channels} channels must be as many, none negative, and sum to 1")

    def to_grey(x):
        if x.shape[1] != channels:
            raise ValueError(f"colourisation of {channels} channels does not fit images of shape {tuple(x.shape)}")
        # numbers of the host, which nothing waits for
        return sum(weight * x[:, i : i + 1] for i, weight in enumerate(weights))

    def to_channels(y):
        return torch.cat([weight * y for weight in weights], 1)

    return LinearOperator(to_grey, to_channels, gram=sum(each**2 for each in weights), value_range=(-1, 1))


def super_resolution(factor):
    """Only the means of squares of factor x factor pixels are known, (B, C, H / factor, W / factor)."""

    def shrink(x):
        if x.shape[2] % factor or x.shape[3] % factor:
            raise ValueError(f"super-resolution by {factor} does not fit images of shape {tuple(x.shape)}")
        return F.avg_pool2d(x, factor)

    def spread(y):
        return y.repeat_interleave(factor, 2).repeat_interleave(factor, 3) / factor**2

    return LinearOperator(shrink, spread, gram=1 / factor**2, value_range=(-1, 1))


def deblurring(kernel):
    """Only a blurred image is known, (B, C, H, W); beyond its edges the image is reflected.

    Args:
        kernel: (k, k) with odd k; or the standard deviation in pixels of a Gaussian one.

    Raises ValueError for a kernel of another shape.
    """
    if isinstance(kernel, (int, float)):
        offsets = torch.arange(-int(3 * kernel + 0.5), int(3 * kernel + 0.5) + 1, dtype=torch.float64)
        weights = torch.exp(-(offsets**2) / (2 * kernel**2))
        kernel = torch.outer(weights, weights) / weights.sum() ** 2
    kernel = torch.as_tensor(kernel)
    if kernel.ndim != 2 or kernel.shape[0] != kernel.shape[1] or kernel.shape[0] % 2 == 0:
        raise ValueError(f"kernel must be (k, k) with odd k; got shape {tuple(kernel.shape)}")
    margin = kernel.shape[0] // 2
    largest, weights = float(kernel.abs().sum()), Constant(kernel)

    def blur(x):
        weight = weights.like(x).expand(x.shape[1], 1, -1, -1)
        return F.conv2d(F.pad(x, [margin] * 4, mode="reflect"), weight, groups=x.shape[1])

    return LinearOperator(blur, value_range=(-largest, largest))
