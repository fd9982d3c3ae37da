"""LoRA adapters (Hu et al. 2021) on a pipeline's network, by diffusers' names and files, with peft."""

import torch
from diffusers.loaders import CogVideoXLoraLoaderMixin
from diffusers.loaders.lora_base import LoraBaseMixin

from .bundling import plain_component
from .wording import few


def check_adapter(network, role, tensors):
    """Raise ValueError for the tensors {name: tensor} of an adapter that is of another network, or not finite. `role`
    is the component that the network is, with which the names begin."""
    modules, problems = dict(plain_component(network).named_modules()), []
    for name, tensor in tensors.items():
        place, kind, _ = name.removeprefix(f"{role}.").rsplit(".", 2) if name.count(".") > 2 else (name, "", "")
        layer = modules.get(place)
        weight = getattr(getattr(layer, "base_layer", layer), "weight", None)
        axis = {"lora_A": 1, "lora_B": 0}.get(kind)
        if not name.startswith(f"{role}.") or axis is None or weight is None:
            problems.append(f"it has {name}")
        elif tensor.ndim < 2 or weight.ndim < 2 or tensor.shape[axis] != weight.shape[axis]:
            problems.append(
                f"its {name} of shape {tuple(tensor.shape)} is for another layer than {tuple(weight.shape)}"
            )
        elif not torch.isfinite(tensor).all():
            raise ValueError(f"the adapter's {name} is not finite: its training failed, or the file is damaged")
    if problems or not tensors:
        raise ValueError(
            f"this adapter is of another model than this {type(network).__name__}, the pipeline's {role}: "
            f"{few(problems) or 'it is empty'}"
        )


class AdapterMixin(LoraBaseMixin):
    """Loading, saving and merging of LoRA adapters, for pipelines with one network: name it before
    `DiffusionPipeline`. `set_adapters`, `unload_lora_weights` and the others are diffusers' own."""

    _lora_loadable_modules = ["transformer", "unet"]

    @property
    def adapted_component(self):
        """The name of the component that is the network."""
        return "unet" if getattr(self, "transformer", None) is None else "transformer"

    @classmethod
    def lora_state_dict(cls, pretrained_model_name_or_path_or_dict, **kwargs):
        """The tensors of an adapter in a folder, in a repo on the Hub or given, of safetensors only: as diffusers'
        pipelines have it."""
        kwargs["use_safetensors"] = True
        return CogVideoXLoraLoaderMixin.lora_state_dict(pretrained_model_name_or_path_or_dict, **kwargs)

    def load_lora_weights(self, pretrained_model_name_or_path_or_dict, adapter_name=None, hotswap=False, **kwargs):
        """Put an adapter on the network: pytorch_lora_weights.safetensors in a folder or a repo on the Hub, or its
        tensors.

        Args:
            pretrained_model_name_or_path_or_dict, adapter_name, hotswap: as diffusers' pipelines have them.
            kwargs: of the download, and `weight_name`, of the file.

        Raises ValueError for an adapter of another model, and for weights that are no safetensors.
        """
        tensors, metadata = self.lora_state_dict(
            pretrained_model_name_or_path_or_dict, return_lora_metadata=True, **kwargs
        )
        role = self.adapted_component
        check_adapter(getattr(self, role), role, tensors)
        plain_component(getattr(self, role)).load_lora_adapter(
            tensors, prefix=role, adapter_name=adapter_name, metadata=metadata, hotswap=hotswap, _pipeline=self
        )

    @classmethod
    def save_lora_weights(
        cls,
        save_directory,
        transformer_lora_layers=None,
        unet_lora_layers=None,
        is_main_process=True,
        weight_name=None,
        save_function=None,
        safe_serialization=True,
        transformer_lora_adapter_metadata=None,
        unet_lora_adapter_metadata=None,
    ):
        """Write an adapter as diffusers' pipelines do: its tensors, as peft's `get_peft_model_state_dict` gives them,
        and its config."""
        layers = {"transformer": transformer_lora_layers, "unet": unet_lora_layers}
        layers = {role: each for role, each in layers.items() if each}
        if not layers:
            raise ValueError("save_lora_weights needs transformer_lora_layers or unet_lora_layers")
        metadata = {"transformer": transformer_lora_adapter_metadata, "unet": unet_lora_adapter_metadata}
        cls._save_lora_weights(
            save_directory=save_directory,
            lora_layers=layers,
            lora_metadata={role: metadata[role] for role in layers},
            is_main_process=is_main_process,
            weight_name=weight_name,
            save_function=save_function,
            safe_serialization=safe_serialization,
        )

    def fuse_lora(self, components=None, **kwargs):
        """Add the adapters to the weights: as diffusers' pipelines have it, by default in the network."""
        super().fuse_lora(components=components or [self.adapted_component], **kwargs)

    def unfuse_lora(self, components=None, **kwargs):
        """Take the adapters out of the weights again."""
        super().unfuse_lora(components=components or [self.adapted_component], **kwargs)
