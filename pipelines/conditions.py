"""Conditions of a network, {argument of its forward: tensor (B, ...)}: class labels, and whatever else it takes."""

import inspect
import operator

import torch

from .bundling import plain_component


def number_of_classes(config):
    """Number of class labels of a network by its config, None for one without classes."""
    # ours, diffusers' UNet2DModel, diffusers' DiTTransformer2DModel
    for key in ("num_classes", "num_class_embeds", "num_embeds_ada_norm"):
        if config.get(key) is not None:
            return config[key]
    return None


def check_no_tokens(*components):
    """Raise ValueError for a scheduler or a network that is of tokens instead of numbers."""
    for component in components:
        vocab_size = getattr(component, "config", {}).get("vocab_size")
        if vocab_size is not None:
            raise ValueError(
                f"this {type(component).__name__} is of tokens (vocab_size {vocab_size}): use it in a "
                f"ScoreSDETextPipeline"
            )


def sample_channels(config):
    """Number of channels of what a network generates by its config: those of its input less those of a condition."""
    return config["in_channels"] - (config.get("condition_channels") or 0)


def null_conditions(network, conditions):
    """Of conditions, those that the network knows a "none" of, as that, of the same shape: for ours what its own method
    of this name says, for diffusers' DiTTransformer2DModel the label after the last class."""
    if hasattr(network, "null_conditions"):
        return network.null_conditions(conditions)
    null_label = network.config.get("num_embeds_ada_norm")
    if null_label is None or "class_labels" not in conditions:
        return {}
    return {"class_labels": torch.full_like(conditions["class_labels"], null_label)}


def label_ids(class_labels, num_classes, id2label=None):
    """Class labels given as a number, a name, a tensor or array of them or a list, as a list of numbers from 0 to
    num_classes - 1.

    Args:
        id2label: {label: name}, for labels given by name.

    Raises ValueError for a name or number that isn't known, and for what is neither.
    """
    if hasattr(class_labels, "tolist"):
        class_labels = class_labels.tolist()
    if not isinstance(class_labels, (list, tuple, range)):
        class_labels = [class_labels]
    names = {name: int(label) for label, name in (id2label or {}).items()}
    ids = []
    for label in class_labels:
        if isinstance(label, str):
            if label not in names:
                raise ValueError(f"class name {label!r} is unknown; this model knows {', '.join(names) or 'no names'}")
            label = names[label]
        try:
            number = operator.index(label)
        except TypeError:
            number = None
        if number is None or isinstance(label, bool):
            raise ValueError(
                f"class label {label!r} must be a whole number or a name; class_labels takes one, or a list of one "
                f"per sample"
            )
        if number not in range(num_classes):
            raise ValueError(f"class label {number} is out of range: this model has labels 0 to {num_classes - 1}")
        ids.append(number)
    return ids


# conditions that a pipeline makes of other arguments
GIVEN_AS = {
    **dict.fromkeys(("encoder_hidden_states", "encoder_attention_mask", "pooled_projections"), "prompt"),
    "condition_sample": "condition_image",
}


def check_conditions(network, conditions, batch_size=None):
    """Raise ValueError for conditions that aren't tensors of one element per sample, or one for all, that are not
    finite, and for those that the network doesn't take."""
    takes = inspect.signature(plain_component(network).forward).parameters
    for name, value in conditions.items():
        if name not in takes:
            raise ValueError(f"conditions: this {type(network).__name__} takes no {name}, but {', '.join(takes)}")
        if not torch.is_tensor(value) or value.ndim == 0:
            raise ValueError(f"conditions: {name} must be a tensor (batch, ...), not {value!r:.200}")
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise ValueError(f"conditions: {name} holds values that are not finite (nan, infinite)")
        if batch_size is not None and len(value) not in (1, batch_size):
            what = GIVEN_AS.get(name, "element")
            raise ValueError(
                f"conditions: {name} has {len(value)} elements for {batch_size} samples: give one {what} for all, or "
                f"one for each"
            )


def expand(value, batch_size):
    """A tensor (1, ...) or (B, ...) with one element for each of B samples."""
    return value.expand(batch_size, *value.shape[1:])
