"""Distances between two sets of images in the features of a network, and scores of one set.

The names of figures say which features they come from: a Fréchet distance in other features than Inception's is no FID.
"""

import os

import torch
import torch.nn.functional as F

from score_sde.pipelines.bundling import check_token, shown


# --- features -----------------------------------------------------------------------------------------------------


class Features:
    """A network that turns images (N, C, H, W) in [-1, 1] into features (N, D) and, where it classifies, logits.

    Attributes: `name`, as it stands beside a figure; `logits`, whether there are any.
    """

    logits = False

    def __call__(self, images):
        """(features, logits or None) of one batch."""
        raise NotImplementedError


class ClassifierFeatures(Features):
    """The channels of the last convolution of a `classifier.train_classifier`, averaged over the image."""

    logits = True

    def __init__(self, classifier, name="a small classifier of the training images"):
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
            # left to itself, transformers asks whether to run the code of a repo
            processor = AutoImageProcessor.from_pretrained(name, use_fast=False, trust_remote_code=False)
            self.model = AutoModel.from_pretrained(name, trust_remote_code=False).to(device).eval()
        except (OSError, ValueError, ImportError) as error:
            raise ValueError(
                f"features {name!r} cannot be opened: {shown(error, 1000)}. Give classifier, inception, an .onnx file, "
                f"or a vision model of transformers that this machine can reach"
            ) from None
        self.model = getattr(self.model, "vision_model", self.model)
        size = getattr(processor, "crop_size", None) or processor.size
        self.size = size.get("height") or size["shortest_edge"]
        self.mean = torch.tensor(processor.image_mean, device=device)[:, None, None]
        self.std = torch.tensor(processor.image_std, device=device)[:, None, None]
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
        found = [torch.from_numpy(array) for array in self.session.run(self.outputs, inputs)]
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
                f"features 'inception' cannot be opened: {error}. pip install 'torchmetrics[image]'; the weights are "
                f"downloaded once"
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


def moments(features):
    """Mean (D,) and covariance (D, D), float64, of features (N, D)."""
    features = features.double()
    return features.mean(0), torch.cov(features.T)


def frechet_distance(mean, covariance, other_mean, other_covariance):
    """Squared Fréchet distance of two normal distributions (Heusel et al. 2017):
    |m - m'|^2 + tr(C + C' - 2 (C C')^1/2).

    The trace of the root is that of (C^1/2 C' C^1/2)^1/2, which is symmetric. Raises ValueError for a covariance that
    has a negative eigenvalue beyond rounding: the root would be imaginary.
    """

    def root(matrix, name):
        values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
        if values.min() < -1e-6 * values.abs().max():
            raise ValueError(f"{name} has the eigenvalue {float(values.min()):g}: it is no covariance")
        return (vectors * values.clamp_min(0).sqrt()) @ vectors.T

    half = root(covariance, "the covariance")
    root(other_covariance, "the other covariance")
    cross = root(half @ other_covariance @ half, "the product of the covariances")
    distance = (mean - other_mean).square().sum() + (covariance + other_covariance - 2 * cross).trace()
    return float(distance)


class _Given(torch.nn.Module):
    """Passes features on to torchmetrics, which would compute them from images."""

    num_features = None

    def forward(self, features):
        return features


def kernel_distance(features, other, subsets=100, subset_size=1000, seed=0):
    """KID (Binkowski et al. 2018) of features (N, D) from other ones, by torchmetrics, as (mean, standard error) over
    random subsets of both."""
    from torchmetrics.image.kid import KernelInceptionDistance

    size = min(subset_size, len(features), len(other))
    metric = KernelInceptionDistance(feature=_Given(), subsets=subsets, subset_size=size)
    metric.update(other.double().cpu(), real=True)
    metric.update(features.double().cpu(), real=False)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        mean, std = metric.compute()
    return float(mean), float(std) / subsets**0.5


def precision_and_recall(real, generated, neighbours=3, chunk=2000):
    """Precision and recall (Kynkäänniemi et al. 2019): the share of generated features (N, D) within the balls around
    the real ones that reach to their k-th neighbour, and the other way round."""

    def radii(points):
        # the nearest is the point itself
        return torch.cat([torch.cdist(part, points).kthvalue(neighbours + 1).values for part in points.split(chunk)])

    def covered(points, centres, radius):
        inside = [(torch.cdist(part, centres) <= radius).any(1) for part in points.split(chunk)]
        return float(torch.cat(inside).double().mean())

    real, generated = real.double(), generated.double()
    return covered(generated, real, radii(real)), covered(real, generated, radii(generated))


def inception_score(logits, splits=10, seed=0):
    """exp of the mean divergence of the classes of an image from those of all (Salimans et al. 2016), by torchmetrics,
    as (mean, standard deviation) over random splits of the logits (N, classes)."""
    from torchmetrics.image.inception import InceptionScore

    metric = InceptionScore(feature=_Given(), splits=splits)
    metric.update(logits.double().cpu())
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        mean, std = metric.compute()
    return float(mean), float(std)
