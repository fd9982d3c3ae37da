"""LoRA adapters (Hu et al. 2021) on a pipeline's network, by diffusers' names and files, with peft; and classes that an
adapter brings, as peft's trainable tokens of the table of classes."""

import torch
from diffusers.loaders import CogVideoXLoraLoaderMixin
from diffusers.loaders.lora_base import LoraBaseMixin

from .bundling import plain_component
from .conditions import number_of_classes
from .wording import few, quoted


# an adapter's rows of the table of classes, as peft calls them
NEW_ROWS = "class_embed.token_adapter.trainable_tokens_delta"


def check_adapter(network, role, tensors):
    """Raise ValueError for the tensors {name: tensor} of an adapter that is of another network, or not finite. `role`
    is the component that the network is, with which the names begin."""
    modules, problems = dict(plain_component(network).named_modules()), []
    for name, tensor in tensors.items():
        place, kind, _ = name.removeprefix(f"{role}.").rsplit(".", 2) if name.count(".") > 2 else (name, "", "")
        layer = modules.get(place)
        weight = getattr(getattr(layer, "base_layer", layer), "weight", None)
        rows = name == f"{role}.{NEW_ROWS}"
        axis = 1 if rows else {"lora_A": 1, "lora_B": 0}.get(kind)
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


def set_classes(network, count):
    """Let the table of a network have so many classes: further ones begin as what stands for none, whose row stays the
    last; those that are too many go."""
    table, before = network.class_embed, number_of_classes(network.config)
    known, none = table.weight.detach()[:before], table.weight.detach()[before:]
    rows = torch.cat([known[:count], none.expand(max(0, count - before), -1), none])
    table.weight, table.num_embeddings = torch.nn.Parameter(rows, table.weight.requires_grad), count + 1
    network.register_to_config(num_classes=count)


class AdapterMixin(LoraBaseMixin):
    """Loading, saving and merging of LoRA adapters, for pipelines with one network: name it before
    `DiffusionPipeline`. `set_adapters`, `unload_lora_weights` and the others are diffusers' own."""

    _lora_loadable_modules = ["transformer", "unet"]
    # of an adapter that brought classes, its name; and how many there were before, and what they are called
    _class_adapter: str | None = None
    _classes_before: tuple[int, dict | None] | None = None

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

        An adapter may bring classes, which follow those of the network until it is unloaded; one at a time does.

        Raises ValueError for an adapter of another model, and for weights that are no safetensors.
        """
        tensors, metadata = self.lora_state_dict(
            pretrained_model_name_or_path_or_dict, return_lora_metadata=True, **kwargs
        )
        role, metadata = self.adapted_component, dict(metadata or {})
        network = plain_component(getattr(self, role))
        if not hasattr(network, "load_lora_adapter"):
            raise ValueError(f"the pipeline's {role}, a {type(network).__name__} of diffusers, takes no adapters")
        check_adapter(network, role, tensors)
        names = metadata.pop(f"{role}.class_names", None)
        indices = metadata.pop(f"{role}.trainable_token_indices", None)
        rows, there = tensors.get(f"{role}.{NEW_ROWS}"), set(getattr(network, "peft_config", {}))
        if rows is not None:
            self._add_classes(network, len(rows), indices, names, hotswap)
            metadata[f"{role}.trainable_token_indices"] = indices
            # diffusers takes the first for one of LoRA's
            tensors = dict(sorted(tensors.items(), key=lambda each: each[0].endswith(NEW_ROWS)))
        try:
            network.load_lora_adapter(
                tensors,
                prefix=role,
                adapter_name=adapter_name,
                metadata=metadata or None,
                hotswap=hotswap,
                _pipeline=self,
            )
        except Exception:
            if rows is not None:
                self._remove_classes(network)
            raise
        if rows is not None:
            [self._class_adapter] = set(network.peft_config) - there

    def _add_classes(self, network, count, indices, names, hotswap):
        """Make room for the classes of an adapter. Raises ValueError where it was trained beside others."""
        known, labels = number_of_classes(network.config), self.config["id2label"]  # type: ignore[attr-defined]
        if self._classes_before is not None or hotswap:
            raise ValueError(
                "this adapter brings classes, as one does that is there: pipe.unload_lora_weights() takes that off, "
                "after pipe.fuse_lora() to keep it"
            )
        if indices != {"class_embed": list(range(known, known + count))}:
            raise ValueError(
                f"this adapter is of another model: it brings {count} classes, not to follow {known} that are known "
                f"({quoted(indices)})"
            )
        new = [str(known + i) for i in range(count)]
        if isinstance(names, list) and len(names) == count and all(isinstance(name, str) for name in names):
            new = names
        self._classes_before = known, labels
        set_classes(network, known + count)
        labels = labels or {str(label): str(label) for label in range(known)}
        self.register_to_config(id2label=labels | {str(known + i): name for i, name in enumerate(new)})  # type: ignore[attr-defined]

    def _remove_classes(self, network):
        """Leave the classes that were there before."""
        count, labels = self._classes_before
        set_classes(network, count)
        self.register_to_config(id2label=labels)  # type: ignore[attr-defined]
        self._classes_before = self._class_adapter = None

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

    def unload_lora_weights(self):
        """Take all adapters off, as diffusers' pipelines do, and with them the classes that one brought; what was fused
        stays."""
        fused = self._class_adapter in self.fused_loras
        super().unload_lora_weights()
        self._merged_adapters = set()
        network = plain_component(getattr(self, self.adapted_component))
        if self._classes_before is not None:
            # peft's wrapper of the table stays behind
            network.class_embed = network.class_embed.token_adapter
            if not fused:
                self._remove_classes(network)
            self._classes_before = self._class_adapter = None

    def fuse_lora(self, components=None, **kwargs):
        """Add the adapters to the weights: as diffusers' pipelines have it, by default in the network."""
        super().fuse_lora(components=components or [self.adapted_component], **kwargs)

    def unfuse_lora(self, components=None, **kwargs):
        """Take the adapters out of the weights again."""
        super().unfuse_lora(components=components or [self.adapted_component], **kwargs)
