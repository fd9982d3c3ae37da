"""EfficientNet-Lite0 of ImageNet as features: its weights alone, where no onnxruntime reads its graph; and a classifier
of features."""

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from score_sde.training.parts.metrics import Features, resized


STRIDES = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1)


class EfficientNetFeatures(Features):
    """The pooled features (N, 1280) and logits (N, 1000) of EfficientNet-Lite0 (Tan & Le 2019, without
    squeeze-and-excitation), of images of any size.

    Args:
        path: its safetensors: stem, 16 blocks of expand, dw and project, head, fc.
        device: of the images.
        size: height and width to which they are resized.
    """

    name, logits = "EfficientNet-Lite0", True

    def __init__(self, path, device, size=224):
        self.size = size
        self.weights = {name: tensor.to(device).float() for name, tensor in load_file(path).items()}

    def unit(self, x, name, stride=1):
        """Convolution and normalisation; padding as TensorFlow's "same", more of it behind."""
        weight = self.weights[f"{name}.conv.weight"]
        kernel = weight.shape[-1]
        total = [max((-(-size // stride) - 1) * stride + kernel - size, 0) for size in x.shape[-2:]]
        x = F.pad(x, [side for each in reversed(total) for side in (each // 2, each - each // 2)])
        x = F.conv2d(x, weight, stride=stride, groups=x.shape[1] // weight.shape[1])
        mean, variance, scale, shift = (
            self.weights[f"{name}.bn.{part}"] for part in ("running_mean", "running_var", "weight", "bias")
        )
        return F.batch_norm(x, mean, variance, scale, shift, eps=1e-3)

    def __call__(self, images):
        x = F.relu6(self.unit(resized(images, self.size), "stem", 2))
        for i, stride in enumerate(STRIDES):
            name, before = f"blocks.{i}", x
            if f"{name}.expand.conv.weight" in self.weights:
                x = F.relu6(self.unit(x, f"{name}.expand"))
            x = F.relu6(self.unit(x, f"{name}.dw", stride))
            x = self.unit(x, f"{name}.project")
            if stride == 1 and x.shape == before.shape:
                x = x + before
        features = F.relu6(self.unit(x, "head")).mean((2, 3))
        return features, F.linear(features, self.weights["fc.weight"], self.weights["fc.bias"])


def linear_classifier(features, labels, classes, decay=1e-2, steps=300):
    """f(features) -> logits: softmax regression on standardised features (N, D)."""
    mean, std = features.mean(0), features.std(0).clamp_min(1e-6)
    x = (features - mean) / std
    weight = torch.zeros(classes, x.shape[1], requires_grad=True, device=x.device)
    bias = torch.zeros(classes, requires_grad=True, device=x.device)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=steps, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(x, weight, bias), labels) + decay * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    weight, bias = weight.detach(), bias.detach()
    return lambda features: F.linear((features - mean) / std, weight, bias)
