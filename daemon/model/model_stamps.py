"""Makes a model straight of its files where a stamp says that Transformers' modules give the same values.

A stamp is written once the packed engine ran with every layer fused, and once a decoder made without
Transformers gave bit for bit the engine's values. It holds the values of the plain modules, which the decoder
must give again at each start. Knows no SAE.
"""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import structlog
import torch
from torch import Tensor

from daemon.bos import puts_bos
from daemon.model.fused_decoder import (
    ACTIVATIONS,
    EMBEDDING,
    DecoderShape,
    FusedDecoder,
    LayerShape,
    build_decoder,
    tensor_names,
)
from daemon.model.fused_layers import FusedDecoderLayer
from daemon.model.loading import LoadedModel
from daemon.model.location import TEMPLATES, ModelLocation, is_setting
from daemon.model.smollm2 import sha256_of
from daemon.model.stamps import Stamps
from daemon.model.stored_tokenizer import StoredTokenizer, TokenizerFacts
from daemon.model.trunk import Place
from daemon.model.weightfiles import INDEX_NAME, SINGLE_NAME
from daemon.native.rmsnorm_rope_attention import routines

MAX_VALUES = 1 << 24  # plain values that a stamp holds, 4 bytes each

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Probed:
    """A model's values on random texts, as plain modules gave them, and where an engine has them."""

    places: Mapping[str, Place]  # by hook point
    values: Mapping[str, Tensor]  # by hook point (tokens, d)


@dataclass(frozen=True, slots=True)
class VouchedModel:
    model: LoadedModel
    probed: Probed


@dataclass(frozen=True, slots=True)
class ModelStamps:
    """The stamps of models whose packed engine runs in float32 on the host."""

    stamps: Stamps
    use: Mapping[str, Any]  # what it is loaded for: the dictionaries' names

    def find(self, location: ModelLocation) -> VouchedModel | None:
        """The model without Transformers; None where no stamp vouches for it as it is now."""
        found = routines()
        if location.weights_sha256 is None or found is None:
            return None
        try:
            content = self.stamps.read(self._subject(location))
            if content is None:
                return None
            shape = shape_of(content["shape"])
            decoder = build_decoder(shape, read_weights(Path(location.target), shape), found)
            tokenizer = StoredTokenizer(TokenizerFacts(**content["tokenizer"]), location.target)
            model = LoadedModel(
                model=decoder.requires_grad_(False).eval(),
                tokenizer=tokenizer,
                location=location,
                dtype=torch.float32,
                device="cpu",
                **content["model"],
            )
            places = {name: Place(**place) for name, place in content["places"].items()}
            values = {name: unpacked(told) for name, told in content["values"].items()}
            return VouchedModel(model, Probed(places, values))
        except Exception as error:  # then Transformers loads it, and says what is wrong if something is
            log.debug("stamp.not_used", reason=f"{type(error).__name__}: {error}")
            return None

    def remember(
        self, model: LoadedModel, layers: Sequence[torch.nn.Module], probed: Probed, runs: Runs
    ) -> None:
        """Write the stamp of a model that Transformers loaded, whose engine runs these `layers`.

        `runs` gives the engine's values again, and those of another decoder. Writes none where the decoder
        that `find` would make gives others.
        """
        shape = None if model.location.weights_sha256 is None else described(model, layers, probed)
        if shape is None:
            return
        embedding = model.model.get_input_embeddings().weight
        decoder = FusedDecoder(shape, embedding, layers)
        if not runs.alike(decoder, probed.places):
            return
        content = {
            "shape": dataclasses.asdict(shape),
            "tokenizer": dataclasses.asdict(
                TokenizerFacts.of(model.tokenizer, puts_bos=puts_bos(model.tokenizer))
            ),
            "model": {
                "architecture": model.architecture,
                "d_model": model.d_model,
                "n_layers": model.n_layers,
                "vocabulary": model.vocabulary,
                "context": model.context,
                "settings_sha256": model.settings_sha256,
            },
            "places": {
                name: {"layer": place.layer, "side": place.side} for name, place in probed.places.items()
            },
            "values": {name: packed(values) for name, values in probed.values.items()},
        }
        self.stamps.write(self._subject(model.location), content)

    def _subject(self, location: ModelLocation) -> dict[str, Any]:
        """What a stamp of a model is for. Raises OSError."""
        folder = Path(location.target)
        return {
            "weights": location.weights_sha256,
            "files": {name: sha256_of(folder / name) for name in files_beside(folder)},
            **self.use,
        }


class Runs:
    """The values of an engine on the texts that it was probed on."""

    def __init__(self, values: Mapping[str, Tensor], run: Any) -> None:
        """`values` by hook point (K, d); `run(decoder)` yields the rows (K, d) that each layer is given or
        gives, the first layer's input first.
        """
        self._values, self._run = values, run

    def alike(self, decoder: FusedDecoder, places: Mapping[str, Place]) -> bool:
        """Whether another decoder gives bit for bit the same."""
        rows: Iterator[Tensor] = self._run(decoder)
        of_layer: dict[int, list[str]] = {}
        for name, place in places.items():
            of_layer.setdefault(place.last_layer, []).append(name)
        for number, given in enumerate(rows, start=-1):
            if not all(torch.equal(self._values[name], given) for name in of_layer.pop(number, ())):
                return False
        return not of_layer


def described(model: LoadedModel, layers: Sequence[torch.nn.Module], probed: Probed) -> DecoderShape | None:
    """A model whose decoder `FusedDecoder` can be; None where it can't."""
    rotary = getattr(model.model.base_model, "rotary_emb", None)
    inv_freq = getattr(rotary, "inv_freq", None)
    simple = all(
        not place.path and place.change is None and not place.ahead for place in probed.places.values()
    )
    if inv_freq is None or not simple or sum(map(Tensor.numel, probed.values.values())) > MAX_VALUES:
        return None
    shapes = []
    for layer in layers:
        if not isinstance(layer, FusedDecoderLayer):
            return None
        heads, activation = layer.heads, type(layer.products[2].act).__name__
        if activation not in ACTIVATIONS:
            return None
        shapes.append(
            LayerShape(
                heads=heads.heads,
                key_heads=heads.key_heads,
                d_head=heads.d_head,
                scale=heads.scale,
                window=heads.window,
                epsilon=layer.epsilons[0],
                mlp_epsilon=layer.epsilons[1],
                activation=activation,
            )
        )
    names = files_of_tensors(Path(model.location.target))
    prefix = next((at for at in ("model.", "") if at + EMBEDDING in names), None)
    if prefix is None:
        return None
    shape = DecoderShape(
        layers=tuple(shapes),
        inv_freq=tuple(inv_freq.float().tolist()),
        rotary_scale=float(getattr(rotary, "attention_scaling", 1.0)),
        prefix=prefix,
    )
    return shape if set(tensor_names(shape, names)) <= set(names) else None


def shape_of(told: Mapping[str, Any]) -> DecoderShape:
    layers = tuple(LayerShape(**layer) for layer in told["layers"])
    return DecoderShape(**{**told, "layers": layers, "inv_freq": tuple(told["inv_freq"])})


def read_weights(folder: Path, shape: DecoderShape) -> dict[str, Tensor]:
    """The tensors of a decoder in float32, mapped where the files have them so."""
    from safetensors import safe_open

    files = files_of_tensors(folder)
    wanted = tensor_names(shape, files)
    found: dict[str, Tensor] = {}
    for path in sorted({files[name] for name in wanted}):
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name).float() for name in wanted if files[name] == path}
    return found


def files_of_tensors(folder: Path) -> dict[str, Path]:
    """The weight file that has each tensor of a model's folder."""
    from safetensors import safe_open

    found: dict[str, Path] = {}
    single = folder / SINGLE_NAME
    paths = [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
    for path in paths if single.is_file() or (folder / INDEX_NAME).is_file() else ():
        with safe_open(path, framework="pt") as file:
            found |= dict.fromkeys(file.keys(), path)
    return found


def files_beside(folder: Path) -> list[str]:
    """The files of a model's folder that it and its tokenizer are made of, besides weights."""
    names = [
        path.relative_to(folder).as_posix() for at in (".", TEMPLATES) for path in (folder / at).glob("*")
    ]
    return [name for name in sorted(names) if is_setting(name) and (folder / name).is_file()]


def packed(values: Tensor) -> dict[str, Any]:
    """float32 (n, d) as JSON has it."""
    told = base64.b64encode(values.float().contiguous().numpy().tobytes()).decode()
    return {"shape": list(values.shape), "float32": told}


def unpacked(told: Mapping[str, Any]) -> Tensor:
    array = np.frombuffer(base64.b64decode(told["float32"]), np.float32).reshape(told["shape"])
    return torch.from_numpy(array.copy())
