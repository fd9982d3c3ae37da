"""The averaged weights of a run: averages of several decays, and power-function averages with their snapshots."""

import copy
import os
import re
from contextlib import contextmanager
from itertools import combinations

import torch
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._foreach_utils import _group_tensors_by_device_and_dtype

from score_sde.ema import PowerFunctionEMA
from score_sde.pipelines.writing import whole_file

from .run_folder import surviving


# the average that is sampled, measured and published, in a checkpoint
MAIN = "ema.safetensors"


def file_of_decay(decay):
    """Where a checkpoint holds the average of a decay beside the main one."""
    return f"ema-decay-{decay:g}.safetensors"


def same_in_file_names(numbers):
    """The first two decays, or widths, whose files would have one name; None where there are none."""
    return next((pair for pair in combinations(numbers, 2) if len({f"{each:g}" for each in pair}) == 1), None)


def list_snapshots(output_dir):
    """The stored power-function averages of a run: (step, sigma_rel, file), by step."""
    folder = os.path.join(output_dir, "ema_snapshots")
    names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    found = [(re.fullmatch(r"step-(\d{8})-sigma_rel-(.+)\.safetensors", name), name) for name in names]
    return [(int(match[1]), float(match[2]), os.path.join(folder, name)) for match, name in found if match]


def gathered(tensor):
    """A tensor in one piece; one that is sharded needs the call of every process."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor):
    """A tensor, of a sharded one this process's shard, which shares its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def trained(network):
    """{name: parameter} of a network, without those that are frozen."""
    return {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}


def placed_like(tensor, parameter):
    """A whole tensor on the device, and in the shards or the memory layout, of a parameter."""
    if not isinstance(parameter, DTensor):
        return torch.empty_like(parameter, requires_grad=False).copy_(tensor)
    return distribute_tensor(tensor.to(parameter.device), parameter.device_mesh, parameter.placements)


class Averages:
    """The averages of a network's parameters, but for frozen ones, all updated after each step.

    Args:
        network: the network that is trained, its parameters sharded or not.
        whole: of a sharded network a copy on the host that isn't, for the averages, in the processes that want one;
            else None.
    """

    def __init__(self, config, network, whole=None):
        self.network, self.whole, self.widths, self._teacher = network, whole, {}, None
        self.trained = trained(network)  # asking for them takes a while, of some hundreds
        parameters = list(self.trained.values())
        self.sharded = any(isinstance(parameter, DTensor) for parameter in parameters)
        # file in a checkpoint -> average
        self.emas = {MAIN: EMAModel(parameters, decay=config.ema_decay, foreach=True)}
        for decay in config.further_ema_decays:
            self.emas[file_of_decay(decay)] = EMAModel(parameters, decay=decay, foreach=True)
        if config.ema_snapshot_steps:
            self.widths = {f"ema-sigma_rel-{width:g}.safetensors": width for width in config.ema_sigma_rel}
        self.emas |= {file: PowerFunctionEMA(parameters, width) for file, width in self.widths.items()}

    @torch.no_grad()
    def step(self, skipped):
        """Update all averages by the weights of a step; `skipped`, a tensor on the device that is 1 where the step
        changed nothing and else 0, keeps them as they are. `EMAModel.step` would need to look at it from the host."""
        weights = [local(parameter) for parameter in self.trained.values()]
        for ema in self.emas.values():
            ema.optimization_step += 1
            ema.cur_decay_value = ema.get_decay(ema.optimization_step)
            averages = [local(average) for average in ema.shadow_params]
            for pair, _ in _group_tensors_by_device_and_dtype([averages, weights]).values():
                # average -= (1 - decay) (average - weight), in one kernel without a copy, which looks at `skipped`
                # itself: gradient descent by the gradient -weight turned round, with a weight decay of 1
                torch._fused_sgd_(
                    *pair,
                    [],
                    lr=1 - ema.cur_decay_value,
                    weight_decay=1.0,
                    maximize=True,
                    momentum=0.0,
                    dampening=0.0,
                    nesterov=False,
                    is_first_step=False,
                    found_inf=skipped,
                )

    @property
    def teacher(self):
        """The network with the main average, in evaluation mode, without gradients. Its parameters are the average
        itself, and its buffers those of the network: it follows every step, and nothing is copied for it.

        Raises ValueError for a sharded network.
        """
        if self.sharded:
            raise ValueError("the average of a sharded network is no teacher: train this task without FSDP")
        if self._teacher is None:
            self._teacher = copy.deepcopy(self.network).eval().requires_grad_(False)
            averages = dict(zip(self.trained, self.emas[MAIN].shadow_params, strict=True))
            for name, own in self._teacher.named_parameters():
                own.data, own.grad = averages.get(name, own.data), None
            for own, module in zip(self._teacher.modules(), self.network.modules(), strict=True):
                own._buffers.update(module._buffers)
        return self._teacher

    def tensors(self, file, wanted=True):
        """One of the averages in one piece, {name of the parameter: tensor}, on the host if it was sharded. Every
        process must ask for it; where it isn't wanted, the result is empty."""
        found = {}
        for name, average in zip(self.trained, self.emas[file].shadow_params, strict=True):
            tensor = gathered(average)  # one at a time: all of them may not fit the device
            if wanted:
                found[name] = (tensor.cpu() if self.sharded else tensor).contiguous()
        return found

    def save(self, folder, accelerator):
        """Write all averages into a checkpoint, from the main process, and return what went wrong, or None. Every
        process must call this, and none leaves early: the others would wait for its shards."""
        problem = None
        for file in self.emas:
            tensors = self.tensors(file, wanted=accelerator.is_main_process)
            if accelerator.is_main_process and problem is None:
                try:
                    save_file(tensors, os.path.join(folder, file))
                except Exception as error:  # safetensors has its own for a full disk
                    problem = error
        return problem

    def state(self):
        """What a checkpoint holds beside the tensors: {file: numbers}."""
        states = {file: ema.state_dict() for file, ema in self.emas.items()}
        return {file: {k: v for k, v in state.items() if k != "shadow_params"} for file, state in states.items()}

    def load(self, folder, states):
        self._teacher = None
        for file, ema in self.emas.items():
            stored = load_file(os.path.join(folder, file))
            averages = [placed_like(stored[name], parameter) for name, parameter in self.trained.items()]
            ema.load_state_dict({**states[file], "shadow_params": averages})

    def save_snapshots(self, config, accelerator, run, step):
        """Store the power-function averages of this step. One that finds no room is missing later, no more."""
        for file, width in self.widths.items():
            tensors = self.tensors(file, wanted=accelerator.is_main_process)
            if accelerator.is_main_process:
                folder = os.path.join(config.output_dir, "ema_snapshots")
                path = os.path.join(folder, f"step-{step:08d}-sigma_rel-{width:g}.safetensors")
                with surviving(f"snapshot {path}"):
                    os.makedirs(folder, exist_ok=True)
                    with whole_file(path) as temporary:
                        save_file(tensors, temporary, metadata={"run_id": run.id})

    def publish(self):
        """Leave the main average in the network, or in its whole copy, in evaluation mode, and return that; None in a
        process without the whole of a sharded network. Every process must call this."""
        if not self.sharded:
            self.emas[MAIN].copy_to(self.trained.values())
            return self.network.eval()
        averages, device = self.tensors(MAIN, wanted=self.whole is not None), next(self.network.parameters()).device
        if self.whole is None:
            return None
        self.whole.load_state_dict(averages, strict=False)  # all but the buffers and what is frozen
        try:
            self.whole.to(device)
        except torch.OutOfMemoryError:
            print("the whole network does not fit the device: it is sampled on the host, slowly")
            self.whole.to("cpu")
        return self.whole.eval()

    @contextmanager
    def averaged_network(self):
        """The network with the main average, for a while; None in a process without the whole of a sharded network.
        Every process must enter and leave."""
        own = {parameter: parameter.data for parameter in self.network.parameters()}
        averages = dict(zip(self.trained.values(), self.emas[MAIN].shadow_params, strict=True))
        try:
            # batches of other sizes, without gradients: not worth compiling for
            with torch.compiler.set_stance("force_eager"):
                if self.sharded:
                    yield self.publish()
                else:
                    for parameter, average in averages.items():
                        parameter.data = average  # itself: nothing is copied
                    yield self.network.eval()
        finally:
            if not self.sharded:
                for parameter, data in own.items():
                    parameter.data = data
                self.network.train()
            elif self.whole is not None:
                self.whole.to("cpu")
