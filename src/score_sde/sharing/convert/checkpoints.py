"""What the converters share: reading checkpoints of weights alone, and filling a model by a table.

Every kind of checkpoint has one table, {our key: (their keys, how to combine them)}. A checkpoint whose keys or shapes
are not those of its table is refused, with their names; pickles are read with `weights_only=True` alone.
"""

import argparse
import itertools
import os

import torch
from safetensors.torch import load_file

from ...pipelines.wording import quoted, shortened


def read_checkpoint(path):
    """What a .pt, .pth or .safetensors file holds.

    Raises ValueError for a file that is missing, damaged, or would need code to be run.
    """
    if not os.path.isfile(path):
        raise ValueError(f"checkpoint {path!r} is not a file")
    try:
        if str(path).endswith(".safetensors"):
            return load_file(path)
        # facebookresearch/DiT keeps its command line beside the weights: plain data
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of bytes that are no pickle, anything
        raise ValueError(
            f"{path!r} is no checkpoint that can be read as weights alone (it may be damaged, or hold code, which is "
            f"never run): {shortened(error)}"
        ) from None


def some(names, limit=8):
    """The first names of many, for a message."""
    names = sorted(map(str, names))
    return shortened(", ".join(names[:limit])) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def tensors(state, what):
    """A checkpoint's {name: tensor}. Raises ValueError for anything else, and for tensors that are not all there: empty
    ones, and those of few bytes that repeat themselves to any size."""

    def is_whole(value):
        if not torch.is_tensor(value) or value.layout != torch.strided or value.device.type != "cpu":
            return False
        return 0 < value.numel() * value.element_size() <= value.untyped_storage().nbytes()

    if not isinstance(state, dict) or not state:
        raise ValueError(f"{what}: it holds {quoted(state)}")
    if odd := [name for name, value in state.items() if not (isinstance(name, str) and is_whole(value))]:
        raise ValueError(f"{what}: it holds {some(state)}, of which {some(odd)} is no tensor, or no whole one")
    return dict(state)


def fill(model, table, state, source):
    """Load a checkpoint's tensors into a model by a table {our key: (their keys, function of those tensors)}.

    Raises ValueError, naming the keys, where the checkpoint lacks some, has others, has some of another shape, or holds
    numbers that are not finite.
    """
    expected = {key for keys, _ in table.values() for key in keys}
    problems = []
    if missing := expected - set(state):
        problems.append(f"lacks {some(missing)}")
    if unexpected := set(state) - expected:
        problems.append(f"has the unexpected {some(unexpected)}")
    if not problems:
        bad = [key for key in expected if not torch.isfinite(state[key]).all()]
        problems += [f"holds numbers that are not finite in {some(bad)}"] if bad else []
    if not problems:
        shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
        ours, misshapen = {}, []
        for key, (keys, combine) in table.items():
            theirs = ", ".join(f"{name} {tuple(state[name].shape)}" for name in keys[:2])
            try:
                ours[key] = combine(*[state[name].float() for name in keys])
            except RuntimeError:
                misshapen.append(theirs)
                continue
            if tuple(ours[key].shape) != shapes[key]:
                misshapen.append(f"{theirs} for {key} {shapes[key]}")
        problems += [f"has other shapes: {some(misshapen)}"] if misshapen else []
    if problems:
        raise ValueError(f"{source} doesn't fit {type(model).__name__}: it {'; it '.join(problems)}")
    model.load_state_dict(ours)
    return model.eval()


def same(tensor):
    return tensor


def both(ours, theirs):
    """Table entries of a layer's weight and bias."""
    return {f"{ours}.{name}": ((f"{theirs}.{name}",), same) for name in ("weight", "bias")}


def part(index, count):
    """The function that takes one of equal parts of the rows."""
    return lambda tensor: tensor.chunk(count)[index]


def stacked(*tensors):
    return torch.cat(tensors)


def with_null_row(table):
    """A class table with a row of zeros for the null label, which the network never saw."""
    return torch.cat([table, torch.zeros_like(table[:1])])


def residual_block(ours, block, theirs, names):
    """Table entries of a residual block; `names` are theirs of norm, conv, time, norm, conv and shortcut."""
    own = ["norm1", "conv1", "time_emb_proj", "norm2", "conv2"]
    own += ["conv_shortcut"] if block.conv_shortcut is not None else []
    found = {}
    for name, their_name in zip(own, names, strict=False):
        found |= both(f"{ours}.{name}", f"{theirs}.{their_name}")
    return found


def halve_score(layers):
    """The score by images in [-1, 1] of a network that gives the score by images in [0, 1]: exact in floating point."""
    with torch.no_grad():
        for parameter in itertools.chain.from_iterable(layer.parameters() for layer in layers):
            parameter /= 2


def check_output(folder):
    """The absolute path of a folder that can be written. Raises ValueError for one that holds something."""
    folder = os.path.abspath(folder)
    if os.path.isfile(folder) or os.path.isdir(folder) and os.listdir(folder):
        raise ValueError(f"output {folder!r} exists: choose another folder, or remove it")
    return folder
