"""A pretended Apple GPU, whose tensors hold real values, in the CPU's memory. It refuses what a real one refuses:
float64, and tensors of another device beside its own. PyTorch knows it as "meta", which every build has."""

import sys
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from score_sde.pipelines import adaptive
from score_sde.schedulers import paths


APPLE = torch.device("meta")
CPU_GENERATOR = torch.Generator
# operations whose arguments may be on different devices
TRANSFERS = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class OnApple(torch.Tensor):
    """A tensor that says it is on the device."""

    @staticmethod
    def __new__(cls, values):
        if values.dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")
        return torch.Tensor._make_wrapper_subclass(
            cls, values.shape, strides=values.stride(), dtype=values.dtype, device=APPLE
        )

    def __init__(self, values):
        self.values = values

    def tolist(self):
        return self.values.tolist()

    def __repr__(self):
        return f"OnApple({self.values})"

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments=(), options=None):
        return run(function, arguments, options or {})


def run(function, arguments, options):
    """An operation on the values; what it returns is on the device if it is asked for there, or any argument is."""
    # an empty one is made where no mode sees it
    arguments, options = tree_map(
        lambda x: OnApple(torch.empty_like(x, device="cpu")) if type(x) is torch.Tensor and x.is_meta else x,
        (arguments, options),
    )
    tensors = [leaf for leaf in tree_leaves((arguments, options)) if isinstance(leaf, torch.Tensor)]
    wrapped = [tensor for tensor in tensors if isinstance(tensor, OnApple)]
    target = torch.device(options["device"]).type if options.get("device") is not None else None
    on_apple = target == APPLE.type or (target is None and bool(wrapped))
    if function not in TRANSFERS and wrapped:
        # a number is taken from any device
        others = [tensor for tensor in tensors if not isinstance(tensor, OnApple) and tensor.ndim]
        if others:
            raise RuntimeError(f"{function}: expected all tensors to be on the same device, but found mps:0 and cpu")
    if function is torch.ops.aten._to_copy.default and wrapped and options.get("dtype") == torch.float64:
        raise TypeError(f"{function}: to float64, from a device that has none")
    options = {name: torch.device("cpu") if name == "device" else value for name, value in options.items()}
    values = tree_map(lambda x: x.values if isinstance(x, OnApple) else x, (arguments, options))
    found = function(*values[0], **values[1])
    # what changed its argument returns that argument
    own = {id(tensor.values): tensor for tensor in wrapped}

    def wrap(result):
        if not isinstance(result, torch.Tensor) or not on_apple:
            return result
        return own.get(id(result)) if id(result) in own else OnApple(result)

    if function is torch.ops.aten.copy_.default:
        return arguments[0]
    return tree_map(wrap, found)


def as_tensor(data, dtype=None, device=None):
    tensor = data if isinstance(data, torch.Tensor) else torch.tensor(data, dtype=dtype)
    return tensor.to(device or tensor.device, dtype or tensor.dtype)


class AppleMode(TorchDispatchMode):
    """While it is on, tensors can be made on the device and moved there, and the package knows what it lacks."""

    def __enter__(self):
        self.known = [mock.patch.object(module, "WITHOUT_FLOAT64", {APPLE.type}) for module in (paths, adaptive)]
        # the fused optimizer, which Apple's GPUs have
        where = sys.modules["torch.optim.optimizer"]
        self.known.append(mock.patch.object(where, "_get_fused_kernels_supported_devices", lambda: [APPLE.type]))
        self.known.append(mock.patch.object(torch, "Generator", lambda device=None: CPU_GENERATOR()))
        self.known.append(mock.patch.object(torch, "get_device_module", lambda device: torch.random))
        # would make a number where no mode sees it
        self.known.append(mock.patch.object(torch, "as_tensor", as_tensor))
        for each in self.known:
            each.start()
        return super().__enter__()

    def __exit__(self, *error):
        for each in self.known:
            each.stop()
        return super().__exit__(*error)

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        return run(function, arguments, options or {})
