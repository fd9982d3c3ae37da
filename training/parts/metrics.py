"""Distances between two sets of images in the features of a network, and scores of one set.

The names of figures say which features they come from: a Fréchet distance in other features than Inception's is no FID.
"""

import math
import os

import torch
import torch.nn.functional as F

from score_sde.pipelines.wording import shortened
from score_sde.sharing.downloading import check_token


# --- features -----------------------------------------------------------------------------------------------------


class Features:
    """A network that turns images (N, C, H, W) in [-1, 1] into features (N, D) and, where it classifies, logits.

    Attributes: `name`, as it stands beside a figure; `logits`, whether there are any.
    """

    logits = False

    def __call__(self, images):
        """(features, logits or None) of one batch."""
        raise NotImplementedError


@torch.no_grad()
def features_of(network, images, batch_size):
    """Features (N, D) of images (N, C, H, W) that are all there."""
    return torch.cat([network(part)[0] for part in images.split(batch_size)])


class ClassifierFeatures(Features):
    """The channels of the last convolution of a `classifier.train_classifier`, averaged over the image."""

    name, logits = "a small classifier of the training images", True

    def __init__(self, classifier, name=name):
        self.classifier, self.name = classifier, name

    def __call__(self, images):
        # what follows: pooling, flattening, dropout, a linear layer
        maps = self.classifier[:-4](images)
        return maps.mean((2, 3)), self.classifier[-4:](maps)


class TransformersFeatures(Features):
    """A vision model of transformers, by Hub id or folder: its pooled output, or the mean of its last hidden states."""

    def __init__(self, name, device):
        from transformers import AutoImageProcessor, AutoModel

        check_token()
        try:
            processor = AutoImageProcessor.from_pretrained(name, use_fast=False, trust_remote_code=False)
            model = AutoModel.from_pretrained(name, use_safetensors=True, trust_remote_code=False)
        except Exception as error:  # the Hub client's and the reader's of weights have no common class
            raise ValueError(
                f"features {name!r} cannot be opened: {shortened(error)}. Give classifier, inception, an .onnx file, "
                f"or a vision model of transformers that this machine can reach"
            ) from None
        self.model = getattr(model, "vision_model", model).to(device).eval()
        size = getattr(processor, "crop_size", None) or getattr(processor, "size", None) or {}
        self.size, mean, std = (
            size.get("height") or size.get("shortest_edge"),
            processor.image_mean,
            processor.image_std,
        )
        if not (self.size and mean and std):
            raise ValueError(f"features {name!r}: its preprocessor says no size, image_mean or image_std of images")
        self.mean, self.std = (torch.tensor(values, device=device)[:, None, None] for values in (mean, std))
        self.name = os.path.basename(os.path.normpath(name))

    def __call__(self, images):
        images = (resized(images, self.size) / 2 + 0.5 - self.mean) / self.std
        output = self.model(pixel_values=images)
        pooled = getattr(output, "pooler_output", None)
        return (output.last_hidden_state.mean(1) if pooled is None else pooled.flatten(1)), None


class OnnxFeatures(Features):
    """An ONNX graph from RGB images (N, 3, 224, 224) in [-1, 1] to "features" and perhaps "logits"."""

    def __init__(self, path, size=224):
        import onnxruntime

        self.session = onnxruntime.InferenceSession(path, providers=onnxruntime.get_available_providers())
        outputs = [output.name for output in self.session.get_outputs()]
        if "features" not in outputs:
            raise ValueError(f"features {path!r}: the graph has the outputs {', '.join(outputs)}, none named features")
        self.outputs, self.size = [name for name in ("features", "logits") if name in outputs], size
        self.logits = "logits" in outputs
        self.name = os.path.basename(os.path.dirname(os.path.abspath(path)))

    def __call__(self, images):
        inputs = {self.session.get_inputs()[0].name: resized(images, self.size).float().cpu().numpy()}
        # back to where the images are: what is gathered over processes must be on their devices
        found = [torch.from_numpy(array).to(images.device) for array in self.session.run(self.outputs, inputs)]
        return found[0].flatten(1), found[1] if self.logits else None


class InceptionFeatures(Features):
    """The Inception network of FID (Heusel et al. 2017) as torch-fidelity and torchmetrics carry it: 2048 features and
    the logits without bias."""

    name, logits = "Inception", True

    def __init__(self, device):
        try:
            from torchmetrics.image.fid import NoTrainInceptionV3

            self.model = NoTrainInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"]).to(device)
        except Exception as error:  # a missing package, or no network for its weights
            raise ValueError(
                f"features 'inception' cannot be opened: {error}. pip install torchmetrics torch-fidelity; "
                f"the weights are downloaded once"
            ) from error

    def __call__(self, images):
        images = images.expand(-1, 3, -1, -1)
        features, logits = self.model.torch_fidelity_forward(((images / 2 + 0.5) * 255).round().to(torch.uint8))
        return features, logits


def resized(images, size):
    """Images (N, 1 or 3, H, W) as RGB of this height and width, by antialiased bicubic interpolation."""
    images = images.expand(-1, 3, -1, -1)
    if images.shape[-2:] != (size, size):
        images = F.interpolate(images, (size, size), mode="bicubic", antialias=True).clamp(-1, 1)
    return images


def open_features(name, device):
    """Features by name: "inception", an .onnx file, or a vision model of transformers by Hub id or folder.

    Raises ValueError, naming the features and what is missing, for any that cannot be opened.
    """
    if name == "inception":
        return InceptionFeatures(device)
    if name.endswith(".onnx"):
        try:
            return OnnxFeatures(name)
        except ImportError as error:
            raise ValueError(f"features {name!r} need onnxruntime: pip install onnxruntime") from error
        except ValueError:
            raise
        except Exception as error:  # onnxruntime's own
            raise ValueError(f"features {name!r} cannot be opened: {error}") from error
    return TransformersFeatures(name, device)


# --- distances ----------------------------------------------------------------------------------------------------
# In float64 on the CPU, where every machine has it.


class Moments:
    """Mean (D,) and covariance (D, D) of features that come in batches, float64, in memory that doesn't grow with their
    number (Chan et al. 1979)."""

    def __init__(self):
        self.count, self.mean, self.scatter = 0, 0.0, 0.0

    def add(self, features):
        """Take in features (N, D)."""
        features = features.cpu().double()
        mean, share = features.mean(0), len(features) / (self.count + len(features))
        deviations, change = features - mean, mean - self.mean
        self.scatter = self.scatter + deviations.T @ deviations + self.count * share * torch.outer(change, change)
        self.mean = self.mean + share * change
        self.count += len(features)

    def result(self):
        """The mean and the unbiased covariance. Raises ValueError for fewer than 2 features."""
        if self.count < 2:
            raise ValueError(f"{self.count} features have no covariance: at least 2 are needed")
        return self.mean, self.scatter / (self.count - 1)


def moments(features, chunk=1000):
    """Mean (D,) and covariance (D, D), float64, of features (N, D)."""
    found = Moments()
    for part in features.split(chunk):
        found.add(part)
    return found.result()


def frechet_distance(mean, covariance, other_mean, other_covariance):
    """Squared Fréchet distance of two normal distributions (Heusel et al. 2017):
    |m - m'|^2 + tr(C + C' - 2 (C C')^1/2); nan where they are not finite.

    The trace of the root is that of (C^1/2 C' C^1/2)^1/2, which is symmetric. Raises ValueError for a covariance that
    has a negative eigenvalue beyond rounding: the root would be imaginary.
    """

    def eigen(matrix, name):
        values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
        if values.min() < -1e-6 * values.abs().max():
            raise ValueError(f"{name} has the eigenvalue {float(values.min()):g}: it is no covariance")
        return values.clamp_min(0), vectors

    change = (mean - other_mean).square().sum()
    if not torch.isfinite(change + covariance.sum() + other_covariance.sum()):
        return math.nan
    values, vectors = eigen(covariance, "the covariance")
    eigen(other_covariance, "the other covariance")
    half = (vectors * values.sqrt()) @ vectors.T
    cross, _ = eigen(half @ other_covariance @ half, "the product of the covariances")
    return float(change + (covariance + other_covariance).trace() - 2 * cross.sqrt().sum())


def kernel_distance(features, other, subsets=100, subset_size=1000, seed=0):
    """KID (Binkowski et al. 2018) of features (N, D) from other ones: the unbiased squared maximum mean discrepancy of
    the kernel (x y / D + 1)^3, as (mean, standard error) over random subsets of both, drawn as torchmetrics draws them.

    Raises ValueError for fewer than 2 features.
    """
    size = min(subset_size, len(features), len(other))
    if size < 2:
        raise ValueError(f"a kernel distance needs at least 2 features of each; got {len(features)} and {len(other)}")
    generator = torch.Generator().manual_seed(seed)

    def drawn(points):
        return points[torch.randperm(len(points), generator=generator)[:size]].cpu().double()

    def kernel(x, y):
        return (x @ y.T).div_(x.shape[1]).add_(1).pow_(3)

    def within(x):
        products = kernel(x, x)
        return (products.sum() - products.trace()) / (size * (size - 1))

    found = []
    for _ in range(subsets):
        y, x = drawn(other), drawn(features)
        found.append(within(x) + within(y) - 2 * kernel(x, y).mean())
    found = torch.stack(found)
    return float(found.mean()), float(found.std(unbiased=False)) / subsets**0.5


def precision_and_recall(real, generated, neighbours=3, chunk=500, device="cpu"):
    """Precision and recall (Kynkäänniemi et al. 2019): the share of generated features (N, D) within the balls around
    the real ones that reach to their k-th neighbour, and the other way round. On the CPU in float64, on another device
    in float32.

    Raises ValueError for features that have fewer neighbours.
    """
    if min(len(real), len(generated)) <= neighbours:
        raise ValueError(
            f"{neighbours} neighbours need at least {neighbours + 1} features of each; got {len(real)} and "
            f"{len(generated)}"
        )
    device = torch.device(device)
    # distances to what is near are differences of large numbers: smaller ones around the mean
    centre = real.mean(0)
    dtype = torch.float64 if device.type == "cpu" else torch.float32
    real, generated = ((points - centre).to(device, dtype) for points in (real, generated))

    def radii(points):
        # the nearest is the point itself
        return torch.cat([torch.cdist(part, points).kthvalue(neighbours + 1).values for part in points.split(chunk)])

    def covered(points, centres, radius):
        inside = [(torch.cdist(part, centres) <= radius).any(1) for part in points.split(chunk)]
        return float(torch.cat(inside).float().mean())

    return covered(generated, real, radii(real)), covered(real, generated, radii(generated))


def inception_score(logits, splits=10, seed=0):
    """exp of the mean divergence of the classes of an image from those of all (Salimans et al. 2016), as (mean,
    standard deviation) over random splits of the logits (N, classes), drawn as torchmetrics draws them.

    Raises ValueError for fewer logits than splits.
    """
    if len(logits) < splits:
        raise ValueError(f"{splits} splits need at least as many logits; got {len(logits)}")
    order = torch.randperm(len(logits), generator=torch.Generator().manual_seed(seed))
    scores = []
    for part in logits.cpu()[order].double().log_softmax(1).chunk(splits):
        of_all = part.logsumexp(0) - math.log(len(part))
        divergence = part.exp() * (part - of_all)
        scores.append(divergence.sum(1).mean().exp())
    scores = torch.stack(scores)
    return float(scores.mean()), float(scores.std(unbiased=len(scores) > 1))
