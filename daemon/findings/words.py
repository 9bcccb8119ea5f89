"""The words that a feature promotes and suppresses, by its decoder row through the model's end.

The row goes through the final norm, whose scale is taken as 1, and the unembedding (the logit lens of
nostalgebraist 2020): the logit that one unit of activation adds where the residual stream has that size.
Only the rows, the norm and the unembedding are read, the last one piece by piece. Where something is missing
there are no words, and a reason. Importing it does not import torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from daemon.errors import LensdError
from daemon.escaping import cut_short
from daemon.findings.results import IntArray
from daemon.findings.study import Study

if TYPE_CHECKING:
    from torch import Tensor

WORDS = 10  # each way
PIECE_BYTES = 16 << 20  # of the unembedding that are read at a time
SCALES = ("logit_scale", "lm_head_multiplier")  # of logits, in configurations
DIVISORS = ("logits_scaling",)
SPACES = "\u0120\u2581"  # with which pieces of vocabularies begin where the token begins with a space


@dataclass(frozen=True, slots=True)
class Words:
    """Tokens with their logit per unit of activation, the largest first."""

    promotes: tuple[tuple[str, float], ...] = ()
    suppresses: tuple[tuple[str, float], ...] = ()
    missing: str = ""  # why there are none


def words_of(study: Study, wanted: Mapping[int, IntArray]) -> dict[tuple[int, int], Words]:
    """Return words by (dictionary, feature) of the features (k,) wanted of each dictionary. Never raises."""
    from daemon.findings.found_again import decoder_rows

    found: dict[tuple[int, int], Words] = {}
    end: ModelEnd | str | None = None
    for sae, features in wanted.items():
        try:
            rows = decoder_rows(study.manifest, study.saes[sae], features).rows
            if end is None:
                end = model_end(study)
            said = end if isinstance(end, str) else ""
            listed = [] if isinstance(end, str) else end.words(rows)
        except Exception as error:  # a report without words is a report
            said, listed = reason(error), []
        for place, feature in enumerate(features.tolist()):
            found[sae, feature] = listed[place] if listed else Words(missing=said)
    return found


def model_end(study: Study) -> ModelEnd | str:
    """Return the model's end, or why there is none."""
    from daemon.findings.found_again import model_folder, offline

    try:
        with offline():
            return ModelEnd(model_folder(study.manifest))
    except Exception as error:
        return reason(error)


def reason(error: Exception) -> str:
    """Return one line of what went wrong."""
    said = " ".join(str(error).split())
    if isinstance(error, LensdError):
        return cut_short(said, 200)
    return cut_short(f"{type(error).__name__}: {said}" if said else type(error).__name__, 200)


class ModelEnd:
    """A model's final norm, unembedding and vocabulary, from its folder."""

    def __init__(self, folder: Path) -> None:
        """Raises LensdError where the end of such a model is not known, and what libraries raise."""
        import torch
        from transformers import AutoConfig

        from daemon.model.auto_class import auto_class
        from daemon.model.weightfiles import model_tensors

        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        with torch.device("meta"):
            model = auto_class(config).from_config(config, trust_remote_code=False)
        self._folder = folder
        self._tensors = model_tensors(folder, "the model")
        self._stored = stored_names(model, self._tensors)
        norm_name = final_norm_name(model)
        self._norm_weight, self._centres = self._norm(model.get_submodule(norm_name), norm_name)
        output = model.get_output_embeddings()
        tied = bool(getattr(config.get_text_config(), "tie_word_embeddings", False))
        module = model.get_input_embeddings() if tied or output is None else output
        self._unembedding = self._name_of(name_of_module(model, module) + ".weight")
        self._scale = logit_scale(config.get_text_config())
        self._spell = Vocabulary(folder)

    def words(self, rows: Tensor) -> list[Words]:
        """Return words of decoder rows (k, d_model)."""
        import torch

        directions = rows - rows.mean(-1, keepdim=True) if self._centres else rows
        directions = directions * self._norm_weight * self._scale
        logits = torch.cat([directions @ piece.T for piece in self._pieces(rows.shape[-1])], dim=-1)
        known = self._spell.known(logits.shape[-1])
        logits[:, torch.from_numpy(~known)] = torch.nan
        return [self._words(one.numpy()) for one in logits]

    def _words(self, logits: np.ndarray[Any, np.dtype[np.float32]]) -> Words:
        order = np.argsort(logits)[: int(np.isfinite(logits).sum())]  # NaN comes last
        promoted, suppressed = order[::-1][:WORDS].tolist(), order[:WORDS].tolist()
        return Words(
            tuple((self._spell.spelled(token), float(logits[token])) for token in promoted),
            tuple((self._spell.spelled(token), float(logits[token])) for token in suppressed),
        )

    def _pieces(self, d_model: int) -> Any:
        """Give rows of the unembedding, (n, d_model) at a time."""
        with self._open(self._unembedding) as file:
            weights = file.get_slice(self._unembedding)
            vocabulary, width = weights.get_shape()
            if width != d_model:
                raise LensdError(f"the unembedding reads {width} numbers, the residual stream has {d_model}")
            size = max(PIECE_BYTES // (4 * width), 1)
            for first in range(0, vocabulary, size):
                yield weights[first : first + size].float()

    def _norm(self, module: Any, name: str) -> tuple[Tensor, bool]:
        """Return what the final norm multiplies values with (d_model,), and whether it takes their mean away.

        Families define it in their own ways, such as 1 + weight: so the module is asked.
        """
        import torch

        module.to_empty(device="cpu")
        for parameter, tensor in module.named_parameters():
            stored = self._name_of(f"{name}.{parameter}")
            with self._open(stored) as file:
                tensor.data = file.get_tensor(stored).float()
        d = int(next((p.shape[0] for p in module.parameters()), 0)) or self._width()
        probe = torch.ones(d)
        probe[1::2] = -1
        if d % 2:
            probe[-3:] = torch.tensor([2.0, -1.0, -1.0])
        with torch.no_grad():
            weight = (module(probe) - module(-probe)) / (2 * probe) * probe.square().mean().sqrt()
            moved = module(probe + 1) - module(probe)
        return weight, bool(moved.abs().max() < 1e-3 * weight.abs().max())

    def _width(self) -> int:
        return int(max(self._tensors.values(), key=lambda entry: entry.shape).shape[-1])

    def _name_of(self, parameter: str) -> str:
        """Return the name in the checkpoint, which may lack or have more of what comes before it."""
        inner = parameter.split(".", 1)[-1]
        alike = [
            stored
            for name, stored in self._stored.items()
            if name == parameter or parameter.endswith(f".{name}") or name.endswith(f".{inner}")
        ]
        exact = self._stored.get(parameter)
        if exact is None and len(alike) != 1:
            raise LensdError(f"the model's files have no {parameter}")
        return exact or alike[0]

    def _open(self, tensor: str) -> Any:
        from safetensors import safe_open

        from daemon.model.weightfiles import INDEX_NAME, SINGLE_NAME, read_object

        path = self._folder / SINGLE_NAME
        if not path.is_file():
            path = self._folder / read_object(self._folder / INDEX_NAME, "the model")["weight_map"][tensor]
        return safe_open(path, framework="pt")


def stored_names(model: Any, tensors: Iterable[str]) -> dict[str, str]:
    """Return names in the checkpoint by the names that Transformers gives tensors when it loads them."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, apply_renamings

    rules = [rule for rule in get_model_conversion_mapping(model) if isinstance(rule, WeightRenaming)]
    return {apply_renamings(name, rules): name for name in tensors}


def logit_scale(config: Any) -> float:
    """Return by how much a family multiplies its logits."""
    factors = [getattr(config, name, None) or 1.0 for name in SCALES]
    divisors = [getattr(config, name, None) or 1.0 for name in DIVISORS]
    return float(math.prod(factors) / math.prod(divisors))


def final_norm_name(model: Any) -> str:
    """Return the norm beside a decoder's layers, by its name in the model. Raises LensdError."""
    from torch import nn

    text = model.get_decoder() if hasattr(model, "get_decoder") else model.base_model
    found: list[str] = []
    for owner, module in text.named_modules():
        children = dict(module.named_children())
        if any(isinstance(child, nn.ModuleList) and len(child) for child in children.values()):
            prefix = f"{owner}." if owner else ""
            found = [prefix + name for name in last_norms(children)]
            break
    if len(found) != 1:
        raise LensdError(f"{type(model).__name__}: which norm is its last is not known")
    base = name_of_module(model, text)
    return f"{base}.{found[0]}" if base else found[0]


def last_norms(children: Mapping[str, Any]) -> list[str]:
    """Return the first norm that a decoder declares behind its layers, else those that it calls final."""
    from torch import nn

    names = list(children)
    layers = next(place for place, name in enumerate(names) if isinstance(children[name], nn.ModuleList))
    norms = [
        name
        for name, child in children.items()
        if "norm" in type(child).__name__.lower() and not list(child.children())
    ]
    behind = [name for name in norms if name in names[layers:]]
    return behind[:1] or [name for name in norms if "final" in name]


def name_of_module(model: Any, wanted: Any) -> str:
    return next(str(name) for name, module in model.named_modules() if module is wanted)


class Vocabulary:
    """The words of a model's tokens."""

    def __init__(self, folder: Path) -> None:
        if (folder / "tokenizer.json").is_file():
            from tokenizers import Tokenizer

            self._backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
        else:
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
            self._backend = tokenizer.backend_tokenizer
        self._names = {token: name for name, token in self._backend.get_vocab().items()}

    def known(self, size: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Return (size,) whether a row of the unembedding belongs to a token."""
        found = np.zeros(size, np.bool_)
        found[[token for token in self._names if token < size]] = True
        return found

    def spelled(self, token: int) -> str:
        """Return the token as text; a space that it begins with is kept."""
        text = str(self._backend.decode([token], skip_special_tokens=False))
        begins = self._names[token][:1] in SPACES and self._names[token] != ""
        return f" {text}" if begins and not text.startswith(" ") else text
