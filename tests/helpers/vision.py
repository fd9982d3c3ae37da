"""Tiny vision models of transformers with random weights, as folders."""

import json

import torch
import transformers


TINY = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 2, "image_size": 28, "patch_size": 14}
TINY |= {"intermediate_size": 16}
# each with the shape of its features of an image of 28 x 28, None without
MODELS = {
    "Dinov2": (TINY, (8, 2, 2)),
    "Dinov2WithRegisters": (TINY | {"num_register_tokens": 4}, (8, 2, 2)),
    "ViT": (TINY | {"patch_size": 7}, (8, 4, 4)),
    "SiglipVision": (TINY, (8, 2, 2)),
    "ResNet": ({"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}, (16, 4, 4)),
    "Swin": ({"image_size": 28, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 1]}, None),
    "CLIP": ({"vision_config": TINY, "text_config": {"hidden_size": 8, "num_hidden_layers": 1}}, (8, 2, 2)),
}
SHOWN = {"image_processor_type": "BitImageProcessor", "do_normalize": True, "do_resize": True, "do_center_crop": True}
SHOWN |= {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4], "crop_size": {"height": 28, "width": 28}}
SHOWN |= {"size": {"shortest_edge": 28}}


def save_vision(folder, name="Dinov2", seed=0, **changes):
    torch.manual_seed(seed)
    config = getattr(transformers, f"{name}Config")(**MODELS[name][0] if name in MODELS else TINY)
    getattr(transformers, f"{name}Model")(config).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(SHOWN | changes))
    return folder
