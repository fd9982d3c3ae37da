"""The optimizers that `fit` knows by name."""

import torch
from accelerate.utils import DistributedType
from torch import nn


# layers that meet the data, as this package and diffusers name them
OUTERMOST = ("patch_embed", "head_patch_embed", "pos_embed", "token_embed", "conv_in", "proj_out", "conv_out")
# momentum of Muon, and the quintic whose five iterates take singular values in (0, 1] near 1 (Jordan et al. 2024)
MOMENTUM = 0.95
NEWTON_SCHULZ, ITERATIONS = (3.4445, -4.7750, 2.0315), 5


def make_optimizer(config, accelerator, parameters, network):
    """The optimizer of a `LoopConfig` for parameters, those of the network among them. Raises ValueError for one that
    the launcher's way of sharding cannot run."""
    options = {
        "lr": config.learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "weight_decay": config.adam_weight_decay,
        "fused": True,
    }
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, **options)
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise ValueError(
            f"optimizer 'muon' needs whole matrices, which {accelerator.distributed_type.value} shards: use plain "
            f"processes (MULTI_GPU), or optimizer adamw"
        )
    dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
    return Muon(parameters, hidden_matrices(network), dtype, options)


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
        parameters: all that are trained. matrices: those among them that are orthogonalised.
        dtype: in which they are.
        options: of AdamW.
    """

    def __init__(self, parameters, matrices, dtype, options):
        chosen = {id(matrix) for matrix in matrices}
        others = [parameter for parameter in parameters if id(parameter) not in chosen]
        self.dtype = dtype
        super().__init__([{"params": others}, {"params": list(matrices)}], **options)

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
                # AdamW reads a step of every state that it loads
                state |= {"step": torch.zeros(()), "momentum_buffer": torch.zeros_like(matrix)}
            state["step"] += 1
            momentum = state["momentum_buffer"]
            following = momentum.lerp(matrix.grad, 1 - MOMENTUM)
            momentum.copy_(following if kept is None else torch.where(kept > 0, momentum, following))
            step = square_parts(matrix.grad.lerp(momentum, MOMENTUM).flatten(1))
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
