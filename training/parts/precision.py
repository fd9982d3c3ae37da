"""Whether bfloat16 pays on a device, and in what networks compute that are not trained."""

import time
from contextlib import nullcontext

import torch
from accelerate.state import PartialState
from accelerate.utils import broadcast_object_list


# how many times as fast as float32 it must be: a network is more than matrix products
PAYS = 1.3


def frozen(device, precision):
    """A context for networks that are not trained and come before one that is, such as its autoencoder: bfloat16 with a
    `mixed_precision` of "bf16", else float32, as the range of float16 is too small for some."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


def choose_kernels(config, accelerator):
    """Say how a device computes: with TF32, in convolutions, too, or without."""
    torch.set_float32_matmul_precision("high" if config.allow_tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = config.allow_tf32
    if accelerator.device.type != "cuda":
        return
    major, _ = torch.cuda.get_device_capability(accelerator.device)
    # TF32 and bfloat16 came after float16
    has_faster = major >= 8 or (major == 7 and "fp16" in config.precisions)
    if config.mixed_precision == "no" and not config.allow_tf32 and has_faster:
        faster = "--mixed_precision bf16, or --allow_tf32 true," if major >= 8 else "--mixed_precision fp16"
        accelerator.print(f"float32 leaves this GPU's tensor cores unused: {faster} is several times as fast")


def automatic_precision():
    """ "bf16" where it pays on this machine, else "no": the same in every process. On a GPU that has it, it does; on a
    CPU it is measured, in a tenth of a second. Before there is an `Accelerator`."""
    state = PartialState(cpu=not torch.accelerator.is_available())
    if state.device.type == "cuda":
        precision, why = ("bf16", "has") if torch.cuda.is_bf16_supported(including_emulation=False) else ("no", "lacks")
        why = f"this GPU {why} bfloat16"
    elif state.device.type == "cpu":
        gain = gain_of_bfloat16()
        precision = "bf16" if gain >= PAYS else "no"
        why = f"on this CPU matrix products in bfloat16 are {gain:.1f} times as fast as in float32"
    else:
        precision, why = "no", f"bfloat16 on {state.device.type} was never measured"
    precision, why = broadcast_object_list([precision, why])
    if state.is_main_process:
        print(f"mixed_precision {precision}: {why}")
    return precision


def gain_of_bfloat16(rows=512, width=256, rounds=5):
    """How many times as fast a CPU computes the two matrix products of a block, and their gradients, under autocast."""
    x = torch.randn(rows, width)
    layers = torch.nn.Sequential(torch.nn.Linear(width, 4 * width), torch.nn.Linear(4 * width, width))
    best = {}
    for _ in range(rounds):
        for enabled in (False, True):
            start = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                layers(x).sum().backward()
            best[enabled] = min(time.perf_counter() - start, best.get(enabled, float("inf")))
    return best[False] / best[True]
