"""Gflops and parameters of the DiT family, beside the paper's (Peebles & Xie 2023, Tables 1 and 4, Figure 5).

    python benchmarks/dit_gflops.py

As in the paper a "flop" is one multiply-accumulate, of a forward pass of one sample: 32x32x4 latents, or 64x64x4 for
512 pixels. Nothing is computed: the models have no weights.
"""

import torch
from torch.utils.flop_counter import FlopCounterMode

from score_sde import DiTModel


# name, arguments: the paper's Gflops, and parameters in millions
PUBLISHED = {
    ("DiT-S/8", ()): (0.36, 33.1),
    ("DiT-S/4", ()): (1.41, 32.9),
    ("DiT-S/2", ()): (6.06, 33.0),
    ("DiT-B/8", ()): (1.42, 130.9),
    ("DiT-B/4", ()): (5.56, 130.5),
    ("DiT-B/2", ()): (23.00, 130.5),
    ("DiT-L/8", ()): (5.01, 458.6),
    ("DiT-L/4", ()): (19.69, 458.1),
    ("DiT-L/2", ()): (80.70, 458.1),
    ("DiT-XL/8", ()): (7.39, 675.7),
    ("DiT-XL/4", ()): (29.04, 675.1),
    ("DiT-XL/2", ()): (118.62, 675.1),
    ("DiT-XL/2", (("sample_size", 64),)): (524.5, 675.1),
    ("DiT-XL/2", (("conditioning", "adaln"),)): (118.5, 601),
    ("DiT-XL/2", (("conditioning", "cross_attention"),)): (137.6, 600),
    ("DiT-XL/2", (("conditioning", "in_context"),)): (119.4, 450),
}


def gflops(model):
    """10^9 multiply-accumulates of a forward pass of one image and label."""
    with torch.device("meta"):
        model = type(model).from_config(model.config).eval()
    side = model.config.sample_size
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, model.config.in_channels, side, side), torch.empty(1), torch.zeros(1, dtype=torch.long))
    return counter.get_total_flops() / 2e9


def count(name, arguments=()):
    """(Gflops, millions of parameters) of a model by name and further arguments."""
    with torch.device("meta"):
        model = DiTModel.from_name(name, **dict(arguments)).eval()
    return gflops(model), sum(parameter.numel() for parameter in model.parameters()) / 1e6


def main():
    print("| model | Gflops | of the paper | parameters, millions | of the paper |\n|---|---|---|---|---|")
    for (name, arguments), (gflops, parameters) in PUBLISHED.items():
        own_gflops, own_parameters = count(name, arguments)
        title = ", ".join([name, *(f"{key} {value}" for key, value in arguments)])
        print(f"| {title} | {own_gflops:.2f} | {gflops:.2f} | {own_parameters:.1f} | {parameters:.1f} |")


if __name__ == "__main__":
    main()
