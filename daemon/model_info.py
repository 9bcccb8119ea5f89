"""Describes the loaded model and its dictionaries, as manifests, columns and metrics name them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

SEPARATOR = ","  # of the devices of one model
STORES = ("cpu", "disk")  # hold weights for other devices to compute with


@dataclass(frozen=True, slots=True)
class Fit:
    """How well a dictionary does, as far as it is known."""

    l0: float | None = None  # mean number of active features
    fvu: float | None = None  # fraction of variance unexplained


@dataclass(frozen=True, slots=True)
class SaeInfo:
    """One loaded dictionary, as the manifest and the columns name it."""

    hook_name: str  # what it reads
    hook_name_out: str  # what its reconstruction is to equal: of a transcoder another place
    layer: int
    d_in: int
    d_sae: int
    d_out: int
    architecture: str
    source: str  # release and id, or the path's last component
    weights_sha256: str
    settings_sha256: str = ""  # of all that its configuration says
    name: str = ""  # the prefix of its columns; l{layer} where none is given
    prepend_bos: bool = True  # whether the texts that it reads begin with BOS
    revision: str | None = None  # the commit of a hub's
    neuronpedia_id: str | None = field(default=None, compare=False)  # MODEL/SET; it changes no result

    def __post_init__(self) -> None:
        if not self.name:
            object.__setattr__(self, "name", default_name(self.layer))

    @property
    def identity(self) -> tuple[str | int | bool | None, ...]:
        """All of it that changes results or their columns."""
        return tuple(value for key, value in asdict(self).items() if key != "neuronpedia_id")

    @property
    def has_own_name(self) -> bool:
        """Whether its name says more than its layer."""
        return self.name != default_name(self.layer)

    @property
    def where(self) -> str:
        """Where it reads the model, with its name before it if that says more than its layer."""
        return f"{self.name} ({self.hook_name})" if self.has_own_name else self.hook_name


def default_name(layer: int) -> str:
    """The name of a dictionary that is the only one of its layer."""
    return f"l{layer}"


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """The loaded model, as the manifest and `lensd_model_info` name it."""

    name: str
    architecture: str
    d_model: int
    n_layers: int
    dtype: str
    device: str  # or several: those that compute, then what else holds weights, "cuda:0,cuda:1,cpu"
    engine: str  # "packed", or "padded" where the model can't be packed
    weights_sha256: str | None  # None where the weights came from a hub
    saes: tuple[SaeInfo, ...]
    cards: tuple[Fit, ...] = ()  # of each SAE, by its makers; empty where what is read is not comparable
    settings_sha256: str = ""  # of its configuration, its tokenizer and, of a hub's, its commit
    revision: str | None = None  # the commit of a hub's
    log_probs: bool = False  # whether it predicts the tokens of texts
    bits: str = (
        ""  # "invariant" where results are the same bits in any batch, else what was not, or not tried
    )

    @property
    def known_fits(self) -> tuple[Fit, ...]:
        """Of each SAE what is known of it that files can be compared with."""
        return self.cards or (Fit(),) * len(self.saes)

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(sae.layer for sae in self.saes)

    @property
    def names(self) -> tuple[str, ...]:
        """The prefixes of the SAEs' columns."""
        return tuple(sae.name for sae in self.saes)

    @property
    def reads_both_ways(self) -> bool:
        """Whether some SAEs read a text with BOS before it, and some without."""
        return len({sae.prepend_bos for sae in self.saes}) > 1


def compute_devices(device: str) -> tuple[str, ...]:
    """The devices that compute, of `ModelInfo.device`."""
    names = device.split(SEPARATOR)
    return tuple(name for name in names if name not in STORES) or ("cpu",)
