"""One dictionary for each loader of SAELens and each place of a model that its registry has, on a hub, tiny.

They go by the registry's own names; where a loader knows a dictionary's size or layer by heart, the registry
is changed within `registered` to tell it ours.
"""

from __future__ import annotations

import contextlib
import dataclasses
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sae_lens.loading.pretrained_saes_directory import PretrainedSAELookup, get_pretrained_saes_directory

from daemon.config import SaeSection
from tests.support import families, hub_formats, tiny
from tests.support.hub import Hub
from tests.support.hub_formats import Shape, Writer

Support = Literal["packed", "padded", "refused"]
N_LAYERS = 4
HEADS = 64  # width of all heads side by side in the Gemma models: not that of the residual stream

# repository -> family, and what of its configuration is another
MODELS: dict[str, tuple[str, dict[str, object]]] = {
    "tiny/gpt2": ("gpt2", {}),
    "tiny/pythia": ("gpt_neox", {}),
    "tiny/llama": ("llama", {}),
    "tiny/mistral": ("mistral", {}),
    "tiny/gemma-2": ("gemma2", {"head_dim": HEADS // 4}),
    "tiny/gemma-3": ("gemma3", {"head_dim": HEADS // 4}),
    "tiny/qwen3": ("qwen3", {}),
}


@dataclass(frozen=True, slots=True)
class Dictionary:
    """A dictionary on the hub, and how it is to run."""

    release: str
    id: str
    model: str  # of MODELS
    write: Writer
    hook_name: str
    hook_name_out: str = ""  # of a transcoder
    d_in: int = tiny.D_MODEL
    d_sae: int = tiny.D_SAE
    support: Support = "packed"  # read from the packed trunk, by the padded engine, or refused in one line
    says: str = ""  # in the line of a refused one
    overrides: tuple[tuple[str, Any], ...] = ()  # of the settings that the loader knows by heart
    loader: str = ""  # of a release that the registry lacks
    reconstructs: bool = True  # else neither error nor FVU is its own

    @property
    def name(self) -> str:
        """For the name of a test."""
        return f"{self.release}/{self.id}".replace(" ", "-")

    @property
    def loader_name(self) -> str:
        """In NAMED_PRETRAINED_SAE_LOADERS."""
        return self.entry.conversion_func or "sae_lens"

    @property
    def repo(self) -> str:
        return self.entry.repo_id

    @property
    def path(self) -> str:
        """In the repository, as the registry names it."""
        return self.entry.saes_map[self.id]

    @property
    def entry(self) -> PretrainedSAELookup:
        """Of the registry, with the settings that make this one tiny."""
        known = get_pretrained_saes_directory().get(self.release)
        if known is None:
            known = PretrainedSAELookup(
                self.release, f"tiny/{self.release}", self.model, self.loader or None,
                {self.id: self.id}, {}, {}, {}, {}, None,
            )  # fmt: skip
        changed = {**(known.config_overrides or {}), **dict(self.overrides)}
        return dataclasses.replace(known, config_overrides=changed)

    @property
    def section(self) -> SaeSection:
        return SaeSection(release=self.release, id=self.id)

    @property
    def toml(self) -> str:
        return f'[[sae]]\nrelease = "{self.release}"\nid = "{self.id}"\n'

    def save(self, folder: Path) -> None:
        """Write its files into the folder of its repository."""
        shape = Shape(
            hook_name=self.hook_name,
            hook_name_out=self.hook_name_out,
            d_in=self.d_in,
            d_sae=self.d_sae,
            d_out=tiny.D_MODEL if self.hook_name_out else 0,
            model=self.model,
            seed=zlib.crc32(self.name.encode()) % 10_000,
            factor=self.entry.norm_scaling_factor.get(self.id, 1.0),
            layers=N_LAYERS,
        )
        self.write(folder, self.path, shape)


def tiny_sizes(hook: str = "", **others: Any) -> tuple[tuple[str, Any], ...]:
    sizes = {"d_in": tiny.D_MODEL, "d_sae": tiny.D_SAE} | others
    return tuple((sizes | ({"hook_name": hook} if hook else {})).items())


def resid(layer: int, place: str = "post") -> str:
    return f"blocks.{layer}.hook_resid_{place}"


GEMMA_2 = tiny_sizes()
ATTENTION_2 = tiny_sizes(d_in=HEADS)
SCOPE_2 = "gemma-scope-2-1b-pt"
MLP_IN, MLP_OUT, ATTN_OUT = "blocks.1.hook_mlp_in", "blocks.1.hook_mlp_out", "blocks.1.hook_attn_out"
DL = hub_formats.dictionary_learning
OAI = {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 12}, "normalize_activations": "layer_norm"}
V5 = hub_formats.sae_lens_before_6(**OAI, prepend_bos=False, apply_b_dec_to_input=False)
OLD = hub_formats.sae_lens_before_6()
V6 = hub_formats.sae_lens()
BENCH = "sae_bench_pythia70m_sweep"

DICTIONARIES: tuple[Dictionary, ...] = (
    # sae_lens: of version 6, of those before, centred, run-time normalised
    Dictionary("gemma-2-2b-res-matryoshka-dc", resid(1), "tiny/gemma-2", V6, resid(1)),
    Dictionary("gpt2-small-res-jb", resid(1, "pre"), "tiny/gpt2", OLD, resid(1, "pre")),
    Dictionary("gpt2-small-mlp-tm", MLP_OUT, "tiny/gpt2", OLD, MLP_OUT),
    Dictionary("gpt2-small-resid-mid-v5-32k", resid(1, "mid"), "tiny/gpt2", V5, resid(1, "mid")),
    Dictionary("gpt2-small-resid-post-v5-32k", resid(1), "tiny/gpt2", V5, resid(1)),
    Dictionary("gpt2-small-attn-out-v5-32k", ATTN_OUT, "tiny/gpt2", V5, ATTN_OUT),
    Dictionary("gpt2-small-mlp-out-v5-32k", MLP_OUT, "tiny/gpt2", V5, MLP_OUT),
    Dictionary("pythia-70m-deduped-res-sm", resid(1), "tiny/pythia", OLD, resid(1)),
    Dictionary("pythia-70m-deduped-att-sm", ATTN_OUT, "tiny/pythia", OLD, ATTN_OUT),
    Dictionary("pythia-70m-deduped-mlp-sm", MLP_OUT, "tiny/pythia", OLD, MLP_OUT),
    Dictionary("mistral-7b-res-wg", "blocks.8.hook_resid_pre", "tiny/mistral", OLD, resid(2, "pre")),
    # connor_rob_hook_z
    Dictionary(
        "gpt2-small-hook-z-kk", "blocks.1.hook_z", "tiny/gpt2", hub_formats.connor_rob, "blocks.1.attn.hook_z"
    ),
    # gemma_2, gemma_2_transcoder: Gemma Scope 1
    Dictionary(
        "gemma-scope-2b-pt-res-canonical", "layer_1/width_16k/canonical", "tiny/gemma-2",
        hub_formats.gemma_scope_1, resid(1), overrides=GEMMA_2,
    ),
    Dictionary(
        "gemma-scope-2b-pt-mlp-canonical", "layer_1/width_16k/canonical", "tiny/gemma-2",
        hub_formats.gemma_scope_1, MLP_OUT, overrides=GEMMA_2,
    ),
    Dictionary(
        "gemma-scope-2b-pt-att-canonical", "layer_1/width_16k/canonical", "tiny/gemma-2",
        hub_formats.gemma_scope_1, "blocks.1.attn.hook_z", d_in=HEADS, overrides=ATTENTION_2,
    ),
    Dictionary(
        "gemma-scope-2b-pt-res", "embedding/width_4k/average_l0_6", "tiny/gemma-2",
        hub_formats.gemma_scope_1, "hook_embed", overrides=GEMMA_2, support="refused", says="hook_embed",
    ),
    Dictionary(
        "gemma-scope-2b-pt-transcoders", "layer_1/width_16k/average_l0_65", "tiny/gemma-2",
        hub_formats.gemma_scope_1, "blocks.1.ln2.hook_normalized", MLP_OUT,
        overrides=tiny_sizes(d_out=tiny.D_MODEL),
    ),
    # gemma_3: Gemma Scope 2
    Dictionary(
        f"{SCOPE_2}-res-all", "layer_1_width_16k_l0_big", "tiny/gemma-3", hub_formats.gemma_scope_2(),
        resid(1),
    ),
    Dictionary(
        f"{SCOPE_2}-mlp-all", "layer_1_width_16k_l0_big", "tiny/gemma-3", hub_formats.gemma_scope_2(), MLP_OUT
    ),
    Dictionary(
        f"{SCOPE_2}-att-all", "layer_1_width_16k_l0_big", "tiny/gemma-3", hub_formats.gemma_scope_2(),
        "blocks.1.attn.hook_z", d_in=HEADS,
    ),
    Dictionary(
        f"{SCOPE_2}-transcoders-all", "layer_1_width_16k_l0_big", "tiny/gemma-3",
        hub_formats.gemma_scope_2(), MLP_IN, MLP_OUT,
    ),
    Dictionary(
        f"{SCOPE_2}-transcoders-all", "layer_1_width_16k_l0_big_affine", "tiny/gemma-3",
        hub_formats.gemma_scope_2(affine=True), MLP_IN, MLP_OUT,
    ),
    # llama_scope, llama_scope_r1_distill
    Dictionary("llama_scope_lxr_8x", "l1r_8x", "tiny/llama", hub_formats.llama_scope, resid(1)),
    Dictionary("llama_scope_lxm_8x", "l1m_8x", "tiny/llama", hub_formats.llama_scope, MLP_OUT),
    Dictionary("llama_scope_lxa_8x", "l1a_8x", "tiny/llama", hub_formats.llama_scope, ATTN_OUT),
    Dictionary(
        "llama_scope_r1_distill", "l1r_800m_slimpajama", "tiny/llama", hub_formats.llama_scope_r1, resid(1)
    ),
    # dictionary_learning_1
    Dictionary(
        f"{BENCH}_standard_ctx128_0712", f"{resid(3)}__trainer_10", "tiny/pythia", DL("AutoEncoder"), resid(3)
    ),
    Dictionary(
        f"{BENCH}_topk_ctx128_0730", f"{resid(3)}__trainer_0", "tiny/pythia", DL("AutoEncoderTopK"), resid(3)
    ),
    Dictionary(
        f"{BENCH}_gated_ctx128_0730", f"{resid(3)}__trainer_0", "tiny/pythia",
        DL("GatedAutoEncoder"), resid(3),
    ),
    Dictionary(
        "saebench_gemma-2-2b_width-2pow12_date-0108", "blocks.12.hook_resid_post__trainer_0", "tiny/gemma-2",
        DL("MatryoshkaBatchTopKSAE"), resid(1),
    ),
    Dictionary(
        "llama-3.1-8b-instruct-andyrdt", "resid_post_layer_3_trainer_1", "tiny/llama",
        DL("BatchTopKSAE"), resid(3),
    ),
    Dictionary(
        "tiny-jumprelu", "trainer_0", "tiny/llama", DL("JumpReluAutoEncoder"), resid(1),
        loader="dictionary_learning_1",
    ),
    # one each
    Dictionary(
        "deepseek-r1-distill-llama-8b-qresearch", "blocks.19.hook_resid_post", "tiny/llama",
        hub_formats.deepseek_r1, resid(1), overrides=tiny_sizes(resid(1)),
    ),
    Dictionary(
        "goodfire-llama-3.1-8b-instruct", "layer_19", "tiny/llama", hub_formats.goodfire, resid(1),
        overrides=tiny_sizes(resid(1)),
    ),
    Dictionary(
        "qwen-scope-3-1.7b-base-w32k-l50", "layer1", "tiny/qwen3", hub_formats.qwen_scope, resid(1),
        overrides=tiny_sizes(activation_fn_kwargs={"k": 12}),
    ),
    Dictionary(  # SAELens fetches no cfg.json for it, and turns W_dec over; no release of the registry is one
        "tiny-sparsify", "layers.1", "tiny/llama", hub_formats.sparsify, resid(1), loader="sparsify",
        support="refused", says="cfg.json",
    ),
    Dictionary(
        "mwhanna-qwen3-0.6b-transcoders-lowl0", "layer_1", "tiny/qwen3", hub_formats.mwhanna,
        "blocks.1.mlp.hook_in", MLP_OUT,
    ),
    Dictionary(
        "mntss-gemma-2-2b-2.5m-clt-as-per-layer", "layer_1", "tiny/gemma-2", hub_formats.mntss,
        resid(1, "mid"), MLP_OUT, reconstructs=False,
    ),
    Dictionary(
        "temporal-sae-gemma-2-2b", "blocks.12.hook_resid_post", "tiny/gemma-2", hub_formats.temporal,
        resid(1), overrides=(("hook_name", resid(1)),), support="refused", says="temporal",
    ),
)  # fmt: skip
# Not one of them: 67 MB of weights.
WIDE = Dictionary(
    f"{SCOPE_2}-res-all", "layer_2_width_262k_l0_big", "tiny/gemma-3", hub_formats.gemma_scope_2(), resid(2),
    d_sae=262_144,
)  # fmt: skip


def save_dictionaries(hub: Hub, folder: Path, dictionaries: Sequence[Dictionary] = DICTIONARIES) -> None:
    """Put dictionaries on the hub; `folder` keeps their files."""
    for dictionary in dictionaries:
        dictionary.save(folder / dictionary.repo)
    for repo in {dictionary.repo for dictionary in dictionaries}:
        hub.add(repo, folder / repo)


def save_models(hub: Hub, folder: Path, models: Sequence[str] = tuple(MODELS)) -> None:
    """Put models on the hub; `folder` keeps their files."""
    for model in models:
        family, changes = MODELS[model]
        families.save_family(folder / model, family, **changes)
        hub.add(model, folder / model)


@contextlib.contextmanager
def registered(dictionaries: Sequence[Dictionary] = DICTIONARIES) -> Iterator[None]:
    """Have SAELens's registry, in this process, name the dictionaries with their sizes."""
    registry = get_pretrained_saes_directory()
    before = dict(registry)
    register(dictionaries)
    try:
        yield
    finally:
        registry.clear()
        registry.update(before)


def register(dictionaries: Sequence[Dictionary] = (*DICTIONARIES, WIDE)) -> None:
    """`registered` for the rest of the process, for those that a test starts."""
    get_pretrained_saes_directory().update({one.release: one.entry for one in dictionaries})
