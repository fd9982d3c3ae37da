"""The optimizers that `fit` knows by name: those of torch.optim and, where it is installed, of bitsandbytes, by the
names of their classes in lower case; and Muon, our own.

What an optimizer can be told is what its class takes. An option that it doesn't have is refused.
"""

import inspect

import torch
from accelerate.utils import DistributedType
from torch import nn

from score_sde.pipelines.wording import one_line, quoted

from .options import mapping, nearest


# layers that meet the data, as this package and diffusers name them
OUTERMOST = ("patch_embed", "head_patch_embed", "pos_embed", "token_embed", "conv_in", "proj_out", "conv_out")
# momentum of Muon, and the quintic whose five iterates take singular values in (0, 1] near 1 (Jordan et al. 2024)
MOMENTUM = 0.95
NEWTON_SCHULZ, ITERATIONS = (3.4445, -4.7750, 2.0315), 5
# arguments of an optimizer's class that are options of their own
OPTIONS = {"lr": "learning_rate", "betas": "adam_beta1 and adam_beta2", "weight_decay": "adam_weight_decay"}
# and those that are no options: what is trained, how that is computed, ascent, and when the average of ASGD begins,
# which nothing reads
CHOSEN = {"params", "matrices", "dtype", "foreach", "fused", "capturable", "differentiable", "maximize", "t0"}
# classes of torch.optim that don't fit `fit`, and why
UNFIT = {
    "lbfgs": "evaluates the loss several times a step, which training on batches can't",
    "rprop": "compares gradients of all data, not of batches, and reads the learning rate in its first step alone",
    "sparseadam": "is for sparse gradients; those of these networks are dense",
}
# of torch's those that sharding (FSDP2) cannot run, or would change
SHARDED_NOT = {"adafactor"}
# whose kernels leave a step out on the device; where it is the first, that of SGD then goes on with a momentum of what
# lay in memory (torch 2.13), and that of Adagrad isn't there on every device (MPS)
FUSED = ("adamw", "adam", "muon")


def classes_of(module):
    """{name in lower case: class} of the optimizers in a module."""
    base = torch.optim.Optimizer
    found = {name.lower(): each for name, each in vars(module).items() if isinstance(each, type)}
    return {name: each for name, each in found.items() if issubclass(each, base) and each is not base}


def optimizers():
    """{name: class} of torch's optimizers that `fit` can use, and Muon."""
    of_torch = {name: each for name, each in sorted(classes_of(torch.optim).items()) if name not in UNFIT}
    return {"adamw": torch.optim.AdamW, "muon": Muon} | of_torch | {"muon": Muon}


def optimizer_class(name):
    """The class of a name. Raises ValueError for one that there is not, or that doesn't fit, or whose package is not
    installed."""
    if name in UNFIT:
        raise ValueError(f"optimizer {name!r} {UNFIT[name]}: choose another, such as adamw")
    if name in (known := optimizers()):
        return known[name]
    try:
        import bitsandbytes
    except ImportError:
        raise ValueError(
            f"optimizer {quoted(name)} is none of {', '.join(known)}{nearest(name, list(known))}; bitsandbytes, which "
            f"has others (adamw8bit, lion8bit, ...), is not installed: pip install 'score-sde[bitsandbytes]'"
        ) from None
    # where both have a name, it is torch's
    known = known | classes_of(bitsandbytes.optim) | known
    if name not in known:
        raise ValueError(f"optimizer {quoted(name)} is none of {', '.join(known)}{nearest(name, list(known))}")
    return known[name]


def further_arguments(found):
    """What `optimizer_kwargs` can say of a class: the names of its arguments that are no options of their own."""
    names = [name for name in inspect.signature(found).parameters if name not in {*OPTIONS, *CHOSEN}]
    if not found.__module__.startswith("bitsandbytes"):
        return names
    # it takes more than it heeds (0.50): nesterov, bias_correction, ...
    heeded = {"eps", "alpha", "t_alpha", "t_beta3", "min_8bit_size" if "8bit" in found.__name__ else "max_unorm"}
    heeded |= set() if "RMSprop" in found.__name__ else {"momentum"}
    return [name for name in names if name in heeded]


def optimizer_arguments(config):
    """The arguments by which the optimizer of a `LoopConfig` is made. Raises ValueError for an option that it doesn't
    have, or whose value it refuses."""
    name, found = config.optimizer, optimizer_class(config.optimizer)
    parameters, known = inspect.signature(found).parameters, further_arguments(found)
    more = mapping("optimizer_kwargs", config.optimizer_kwargs)
    for each in more:
        if each in parameters and each in OPTIONS:
            raise ValueError(f"optimizer_kwargs: {each} is said by {OPTIONS[each]}: leave it out")
        if each not in known:
            raise ValueError(
                f"optimizer_kwargs: {each!r} is none of what optimizer {name!r} has, {', '.join(known)}"
                f"{nearest(each, known)}"
            )
    betas, decay = {"adam_beta1": config.adam_beta1, "adam_beta2": config.adam_beta2}, config.adam_weight_decay
    given = [option for option, value in betas.items() if "betas" not in parameters and value is not None]
    given += ["adam_weight_decay"] if decay and "weight_decay" not in parameters else []
    if given:
        raise ValueError(
            f"{', '.join(given)}: optimizer {name!r} doesn't have that: leave it out, or say null where a "
            f"YAML file has it; optimizer_kwargs takes {', '.join(known)}"
        )
    try:
        found([nn.Parameter(torch.zeros(1))], lr=1.0, **more)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise ValueError(
            f"optimizer {name!r} with optimizer_kwargs {config.optimizer_kwargs}: {one_line(error)}"
        ) from None
    arguments = {"lr": config.learning_rate} | more
    if "betas" in parameters:
        own = parameters["betas"].default
        first = [default if value is None else value for value, default in zip(betas.values(), own, strict=False)]
        arguments["betas"] = (*first, *own[2:])
    if "weight_decay" in parameters:
        arguments["weight_decay"] = decay
    return arguments


def check_optimizer(config, accelerator):
    """Raise ValueError for the optimizer of a `LoopConfig` where the launcher's way of sharding, or the device, cannot
    run it."""
    name, found = config.optimizer, optimizer_class(config.optimizer)
    of_torch = found.__module__.startswith("torch.")
    sharded = accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
    if sharded and (not of_torch or name in SHARDED_NOT):
        raise ValueError(
            f"optimizer {name!r} needs whole matrices, which {accelerator.distributed_type.value} shards: use plain "
            f"processes (MULTI_GPU), or optimizer adamw"
        )
    if of_torch or found is Muon:
        return
    # one of as many values as it keeps in 8 bits, and one of fewer
    parameters = [nn.Parameter(torch.zeros(size, size, device=accelerator.device)) for size in (64, 4)]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    try:
        found(parameters, **optimizer_arguments(config)).step()
    except Exception as error:  # bitsandbytes has several
        raise ValueError(
            f"optimizer {name!r} of bitsandbytes doesn't run on the device {accelerator.device.type!r}: "
            f"{one_line(error) or type(error).__name__}"
        ) from error


def make_optimizer(config, accelerator, parameters, network):
    """The optimizer of a `LoopConfig` for parameters, those of the network among them."""
    found, arguments = optimizer_class(config.optimizer), optimizer_arguments(config)
    if config.optimizer in FUSED:
        arguments["fused"] = True
    if found is Muon:
        dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
        return Muon(parameters, hidden_matrices(network), dtype, **arguments)
    return found(parameters, **arguments)


def leave_out(optimizer, skipped):
    """Let the next step of a prepared optimizer change nothing where `skipped`, a tensor on the device, is 1 and not 0.
    Fused kernels look at it themselves; for others the host does, which waits for the device."""
    if getattr(optimizer.optimizer, "_step_supports_amp_scaling", False):
        optimizer.optimizer.found_inf = skipped
    elif skipped:
        # a parameter without a gradient keeps its value and its state
        optimizer.zero_grad(set_to_none=True)


def hidden_matrices(network):
    """The trained weights of a network's linear and convolutional layers, but for those that meet the data."""
    kinds = nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d
    layers = [
        module
        for name, module in network.named_modules()
        if isinstance(module, kinds) and not name.startswith(OUTERMOST)
    ]
    return [layer.weight for layer in layers if layer.weight.requires_grad]


class Muon(torch.optim.AdamW):
    """Muon (Jordan et al. 2024) for the matrices within a network, AdamW for everything else.

    The step of a matrix is its momentum with all singular values near 1, times 0.2 sqrt(max(rows, columns)): the size
    of an AdamW step, whose learning rate and weight decay it thus takes (Liu et al. 2025, Eq. 4). A kernel counts as a
    matrix of output channels by all else; a matrix of more than four times as many rows as columns, such as that of
    all modulations of a DiT, as several square ones.

    Args:
        params: all that are trained. matrices: those among them that are orthogonalised.
        dtype: in which they are.
        momentum: of the matrices, in [0, 1).
        lr, betas, eps, weight_decay, fused: of AdamW.

    Raises ValueError for a momentum out of its range.
    """

    def __init__(
        self,
        params,
        matrices=(),
        dtype=torch.float32,
        lr=1e-3,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.0,
        momentum=MOMENTUM,
        fused=True,
    ):
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum {momentum} must lie in [0, 1)")
        chosen = {id(matrix) for matrix in matrices}
        others = [parameter for parameter in params if id(parameter) not in chosen]
        self.dtype, self.momentum = dtype, momentum
        groups = [{"params": others}, {"params": list(matrices)}]
        super().__init__(groups, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=fused)

    @torch.no_grad()
    def step(self, closure=None):
        group = self.param_groups[1]
        # gradients that are not finite change nothing, as in the fused AdamW
        kept = getattr(self, "found_inf", None)
        # {shape: ([matrix, ...], [its step in parts, ...])}: those of one shape are orthogonalised together
        stacks: dict[tuple, tuple[list, list]] = {}
        for matrix in group["params"]:
            if matrix.grad is None:
                continue
            state = self.state[matrix]
            if not state:
                # AdamW reads a step of every state that it loads; none is counted here
                state |= {"step": torch.zeros(()), "momentum_buffer": torch.zeros_like(matrix)}
            momentum = state["momentum_buffer"]
            following = momentum.lerp(matrix.grad, 1 - self.momentum)
            momentum.copy_(following if kept is None else torch.where(kept > 0, momentum, following))
            step = square_parts(matrix.grad.lerp(momentum, self.momentum).flatten(1))
            of_shape, steps = stacks.setdefault(step.shape[1:], ([], []))
            of_shape.append(matrix)
            steps.append(step)
            # nothing is left of it for AdamW
            matrix.grad = None
        for (rows, columns), (of_shape, steps) in stacks.items():
            directions = orthogonalized(torch.cat(steps).to(self.dtype)).split([len(step) for step in steps])
            rate = group["lr"] * 0.2 * max(rows, columns) ** 0.5
            for matrix, step in zip(of_shape, directions, strict=True):
                change = matrix * -(group["lr"] * group["weight_decay"]) - rate * step.reshape(matrix.shape)
                matrix.add_(change if kept is None else torch.where(kept > 0, 0.0, change))
        return super().step(closure)


def square_parts(matrix):
    """A matrix (rows, columns) as (1, rows, columns), or of more than four times as many rows as columns and a multiple
    of them as (rows / columns, columns, columns)."""
    rows, columns = matrix.shape
    stacked = rows > 4 * columns and rows % columns == 0
    return matrix.reshape(-1, columns, columns) if stacked else matrix[None]


def orthogonalized(matrices):
    """Matrices (n, rows, columns) with their singular values taken near 1, between about 0.7 and 1.2, by five
    steps of Newton-Schulz; those far smaller than the largest stay smaller."""
    a, b, c = NEWTON_SCHULZ
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / x.flatten(1).norm(dim=1).clamp_min(1e-7)[:, None, None]
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        # b + c gram and its like, on the diagonal alone: `baddbmm` would copy what it adds
        polynomial = gram * c
        polynomial.diagonal(dim1=1, dim2=2).add_(b)
        polynomial = gram @ polynomial
        polynomial.diagonal(dim1=1, dim2=2).add_(a)
        x = polynomial @ x
    return x.mT if tall else x
