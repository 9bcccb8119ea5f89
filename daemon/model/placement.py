"""The devices of a model whose layers Transformers and Accelerate spread over those of a host.

Accelerate hooks modules: a hook moves a module's inputs to its device and, of weights that are offloaded,
fetches them for each call. Knows nothing about SAEs and texts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from daemon.model.trunk import UnknownModel, decoder_layers
from daemon.model_info import SEPARATOR, STORES, compute_devices

WEIGHTS_SHARE = 0.85  # of the memory that is free
DeviceMap = str | Mapping[str, int | str]  # "auto", or a device by the name of each module


@dataclass(frozen=True, slots=True)
class Placement:
    """The devices on which the parts of a spread model are computed."""

    name: str  # all of them, then what else holds weights: "cuda:0,cuda:1,cpu"
    embeddings: str  # takes the tokens
    layers: tuple[str, ...]  # of each decoder layer, in order; empty where these can't be found
    held: tuple[str, ...]  # what holds the weights of each decoder layer

    @property
    def offloads(self) -> bool:
        """Whether weights are fetched for each call from where they lie."""
        return self.name != SEPARATOR.join(compute_devices(self.name))

    @classmethod
    def of(cls, model: Any) -> Placement | None:
        """Where `from_pretrained` put a model that it was given a `device_map` for; None for one device."""
        given = getattr(model, "hf_device_map", {})
        devices = {part: device_name(device) for part, device in given.items()}
        holders = dict.fromkeys(devices.values())
        if len(holders) < 2 and "disk" not in holders:
            return None
        main = device_name(model._hf_hook.execution_device)  # computes the parts that are offloaded
        computing = [device for device in holders if device not in STORES] or [main]
        stores = [device for device in STORES if device in holders and device not in computing]
        try:
            path = path_of(model, decoder_layers(model))
            count = len(model.get_submodule(path))
        except UnknownModel:
            path, count = "", 0

        held_by = [mapped(devices, f"{path}.{number}") or main for number in range(count)]
        return cls(
            name=SEPARATOR.join([*computing, *stores]),
            embeddings=str(tokens_device(model)),
            layers=tuple(main if device in STORES else device for device in held_by),
            held=tuple(held_by),
        )

    def after(self, layer: int) -> str:
        """The device that holds the output of a decoder layer; -1 for the input of the first."""
        return self.layers[layer] if 0 <= layer < len(self.layers) else self.embeddings


def asked_map(setting: str) -> DeviceMap | None:
    """The map that `model.device_map` asks for: none on a Mac, whose one GPU has the host's memory."""
    return "auto" if setting == "auto" and not torch.backends.mps.is_available() else None


def free_memory() -> dict[int | str, int] | None:
    """The bytes that weights may take of each GPU and of the host, as Accelerate asks; None without GPUs.

    The rest of a GPU is for dictionaries and batches.
    """
    if not torch.cuda.is_available():
        return None
    from transformers.integrations.accelerate import get_max_memory

    found: dict[int | str, int] = get_max_memory()
    return {device: int(WEIGHTS_SHARE * size) for device, size in found.items()}


def device_name(device: int | str | torch.device) -> str:
    """As torch calls it; Accelerate numbers CUDA devices."""
    name: str = f"cuda:{device}" if isinstance(device, int) else str(device)
    return name


def path_of(model: nn.Module, part: nn.Module) -> str:
    """The name of one of a model's modules."""
    names: Iterator[str] = (name for name, module in model.named_modules() if module is part)
    return next(names)


def mapped(devices: Mapping[str, str], part: str) -> str | None:
    """The device of a part: by its own name, else by what holds it, else by its first inner part."""
    holder = part
    while holder not in devices and holder:
        holder = holder.rpartition(".")[0]
    if holder in devices:
        return devices[holder]
    return next((device for name, device in devices.items() if name.startswith(f"{part}.")), None)


def tokens_device(model: Any) -> torch.device:
    """The device that a Hugging Face model takes token ids on."""
    embeddings = model.get_input_embeddings()
    device = embeddings._hf_hook.execution_device if embeddings.weight.is_meta else embeddings.weight.device
    return torch.device(device_name(device))


def weight_of(model: Any, name: str, parameter: Tensor) -> Tensor:
    """A parameter, read from where it was offloaded to."""
    if parameter.device.type != "meta":
        return parameter
    from transformers.integrations.accelerate import load_offloaded_parameter

    weight: Tensor = load_offloaded_parameter(model, name)
    return weight


def is_hooked(module: nn.Module) -> bool:
    """Whether Accelerate's hooks run at each call of a module."""
    return hasattr(module, "_hf_hook")


def lighten_hooks(layers: Iterable[nn.Module]) -> None:
    """Take Accelerate's hooks off the layers that lie on one device whole; one moves each layer's inputs.

    Accelerate hooks every module inside a layer, which costs a large share of the time of small batches.
    """
    from accelerate.hooks import remove_hook_from_module

    for layer in layers:
        if not is_hooked(layer):
            continue
        devices = {tensor.device for tensor in (*layer.parameters(), *layer.buffers())}
        if len(devices) == 1 and "meta" not in {device.type for device in devices}:
            remove_hook_from_module(layer, recurse=True)
            move_inputs(layer, *devices)


def move_inputs(layer: nn.Module, device: torch.device) -> None:
    """Have a layer called with all its tensors on its device."""

    def moved(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        return on_device(args, device), on_device(kwargs, device)

    layer.register_forward_pre_hook(moved, with_kwargs=True)


def on_device(values: Any, device: torch.device) -> Any:
    """The same arguments, tensors in tuples, lists and dicts included, on a device."""
    if isinstance(values, Tensor):
        return values.to(device)
    if type(values) in (tuple, list):
        return type(values)(on_device(value, device) for value in values)
    if type(values) is dict:
        return {name: on_device(value, device) for name, value in values.items()}
    return values
