"""A pretended CUDA device, whose tensors hold real values, in the CPU's memory, and which counts what it is told to do.

    with PretendedCuda() as cuda:
        model, x = model.to(CUDA), x.to(CUDA)
        with cuda.watched() as work:
            model(x)
    assert len(work.kernels) < 10 and not work.transfers and not work.waits

Counted are

- kernels: operations that make or change a tensor on the device: not views, not memory that is left empty;
- transfers: from the host to the device;
- waits: where the host waits for what is queued: reads of values (`.item()`, `bool`, `.tolist()`, `.cpu()`), results
  whose size the device must tell (`nonzero`, an index of bools), and transfers that are not `non_blocking`.

It refuses what a real one does: tensors of another device beside its own, but for single numbers. `generator()` is a
generator of the device. It has no autocast and no compiler, and knows itself as CUDA only: "cuda" without a number
is refused.
"""

import contextlib
import sys
from dataclasses import dataclass, field
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map


CUDA = torch.device("cuda", 0)
CPU = torch.device("cpu")
aten = torch.ops.aten
COPY, COPY_INTO = aten._to_copy.default, aten.copy_.default
# operations whose arguments may be on different devices; an index is sent to what it is an index of
MIXED = {COPY, COPY_INTO, aten.index.Tensor, aten.index_put_.default, aten.index_put.default}
# the host must know the answer, or its size
READS = {"_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "_unique2", "unique_dim", "bincount"}
READS |= {"unique_consecutive", "repeat_interleave"}
# no kernel runs
NO_KERNELS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resize_", "lift_fresh"}
NO_KERNELS |= {"_unsafe_view", "_reshape_alias", "detach", "alias", "view", "is_pinned", "_fused_sdp_choice", "set_"}


class OnCuda(torch.Tensor):
    """A tensor that says it is on the device. PyTorch, which has none in a build for CPUs, knows it as "meta",
    of which it can make wrappers, index them and go backward."""

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_meta = property(lambda self: False)

    @staticmethod
    def __new__(cls, values):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            values.shape,
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device="meta",
        )

    def __init__(self, values):
        self.values = values

    def __getitem__(self, index):
        # a list would become a tensor where no mode sees it
        parts = index if isinstance(index, tuple) else (index,)
        return super().__getitem__(tuple(torch.tensor(each) if isinstance(each, list) else each for each in parts))

    def untyped_storage(self):
        return self.values.untyped_storage()

    def tolist(self):
        return self.cpu().tolist()

    def __repr__(self):
        return f"OnCuda({self.values})"

    def __deepcopy__(self, memo):
        copied = OnCuda(self.values.clone()).requires_grad_(self.requires_grad)
        return torch.nn.Parameter(copied, self.requires_grad) if isinstance(self, torch.nn.Parameter) else copied

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments=(), options=None):
        return run(function, arguments, options or {})


@dataclass
class Work:
    """What the device was given to do: the operations by name, each with the place in our code that asked for it."""

    kernels: list[str] = field(default_factory=list)
    transfers: list[str] = field(default_factory=list)
    waits: list[str] = field(default_factory=list)

    @property
    def counts(self):
        """(kernels, transfers, waits)."""
        return len(self.kernels), len(self.transfers), len(self.waits)


# of all that watch
watchers: list[Work] = []


def note(kind, function):
    if watchers:
        frame = sys._getframe(1)
        # torch's own, and ours here
        while frame.f_back and ("/torch/" in frame.f_code.co_filename or frame.f_code.co_filename == __file__):
            frame = frame.f_back
        place = "/".join(frame.f_code.co_filename.split("/")[-2:])
        for work in watchers:
            getattr(work, kind).append(f"{function} at {place}:{frame.f_lineno}")


def is_view(function):
    return any(each.alias_info and not each.alias_info.is_write for each in function._schema.returns)


def run(function, arguments, options):
    """An operation on the values; what it returns is on the device if it is asked for there, or any argument is."""
    name = function.overloadpacket.__name__
    # an empty one is made where no mode sees it
    arguments, options = tree_map(
        lambda x: OnCuda(torch.empty_like(x, device=CPU)) if type(x) is torch.Tensor and x.is_meta else x,
        (arguments, options),
    )
    tensors = [leaf for leaf in tree_leaves((arguments, options)) if isinstance(leaf, torch.Tensor)]
    wrapped = [tensor for tensor in tensors if isinstance(tensor, OnCuda)]
    others = [tensor for tensor in tensors if not isinstance(tensor, OnCuda)]
    target = options.get("device")
    target = None if target is None else torch.device(target)
    on_cuda = target.type in ("cuda", "meta") if target is not None else bool(wrapped)
    if function is COPY and on_cuda and wrapped and options.get("dtype") in (None, wrapped[0].dtype):
        # it is there
        return OnCuda(wrapped[0].values)
    if name == "_pin_memory":
        return arguments[0].clone()
    if name == "_fused_sdp_choice":
        # by plain operations, which the CPU has, too
        return 0
    if wrapped and function not in MIXED and any(tensor.ndim for tensor in others):
        raise RuntimeError(f"{function}: expected all tensors to be on the same device, but found cuda:0 and cpu")
    count(function, name, arguments, options, wrapped, others, on_cuda)
    options = {key: CPU if key == "device" and value is not None else value for key, value in options.items()}
    values = tree_map(lambda x: x.values if isinstance(x, OnCuda) else x, (arguments, options))
    found = function(*values[0], **values[1])
    if function is COPY_INTO:
        return arguments[0]
    # what changed its argument returns that argument
    own = {id(tensor.values): tensor for tensor in wrapped}

    def wrap(result):
        if not isinstance(result, torch.Tensor) or not on_cuda:
            return result
        return own.get(id(result)) if id(result) in own else OnCuda(result)

    return tree_map(wrap, found)


def count(function, name, arguments, options, wrapped, others, on_cuda):
    if function is COPY_INTO:
        to, source = (isinstance(tensor, OnCuda) for tensor in arguments[:2])
        blocks = not (arguments[2] if len(arguments) > 2 else options.get("non_blocking", False))
    else:
        to, source, blocks = on_cuda, bool(wrapped), not options.get("non_blocking", False)
    if function in (COPY, COPY_INTO) and to != source:
        if to and not (function is COPY_INTO and not arguments[1].ndim):
            note("transfers", function)
        if to and function is COPY_INTO and not arguments[1].ndim:
            # a number is an argument of the kernel that fills
            note("kernels", function)
        elif blocks or source:
            note("waits", function)
        return
    if function in MIXED and wrapped and any(tensor.ndim for tensor in others):
        note("transfers", function)
        note("waits", function)
    booleans = name in ("index", "index_put_", "index_put") and any(
        isinstance(each, torch.Tensor) and each.dtype in (torch.bool, torch.uint8) for each in arguments[1]
    )
    if wrapped and (name in READS or booleans):
        note("waits", function)
    if name not in NO_KERNELS and not is_view(function) and (on_cuda or wrapped):
        note("kernels", function)


class _Generator(torch.Generator):
    device = property(lambda self: CUDA)


def generator(seed=0):
    """A generator of the device."""
    return _Generator().manual_seed(seed)


class PretendedCuda(TorchDispatchMode):
    """While it is on, tensors can be made on the device and moved there."""

    def __enter__(self):
        # torch.tensor(..., device="cuda") makes it on the CPU first, where modes don't see it
        torch._C._set_only_lift_cpu_tensors(True)
        self.patches = [
            mock.patch.object(torch.cuda, "_lazy_init", lambda: None),
            mock.patch.object(torch.cuda, "current_device", lambda: 0),
        ]
        for each in self.patches:
            each.start()
        return super().__enter__()

    def __exit__(self, *error):
        for each in self.patches:
            each.stop()
        torch._C._set_only_lift_cpu_tensors(False)
        return super().__exit__(*error)

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        return run(function, arguments, options or {})

    @contextlib.contextmanager
    def watched(self):
        """What the device is given to do inside, as a `Work`."""
        work = Work()
        watchers.append(work)
        try:
            yield work
        finally:
            watchers.remove(work)
