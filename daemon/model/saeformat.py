"""Judges a SAELens dictionary by its cfg.json and the shapes of its tensors, before SAELens builds it.

SAELens leaves out what it does not know, fills in what is missing, and names neither. Knows no model.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable, Mapping
from typing import Any

import structlog

from daemon.errors import ConfigError
from daemon.escaping import cut_short
from daemon.model.failures import explained
from daemon.model.weightfiles import named

TRANSCODERS = ("transcoder", "jumprelu_transcoder", "skip_transcoder", "jumprelu_skip_transcoder")
ARCHITECTURES = ("standard", "jumprelu", "topk", "gated", *TRANSCODERS)
TRAINING_ARCHITECTURES = {"batchtopk", "matryoshka_batchtopk"}
EXPORT = "export it for inference (SAELens: save_inference_model, which makes a jumprelu of it)"
# Those that SAELens applies when it encodes.
RUN_TIME_NORMALIZATIONS = ("none", "layer_norm", "constant_norm_rescale")
FOLDS = {  # what SAELens applies in training alone
    "expected_average_only_in": "fold_activation_norm_scaling_factor",
    "covariance_whitening": "fold_activation_whitening",
}
HEAD_KEYS = ("hook_head_index", "hook_point_head_index", "hook_head_index_out")
# Settings of SAELens before version 6, of training or of the data, that change nothing when it encodes.
LEGACY_KEYS = frozenset(
    re.findall(
        r"\w+",
        """
    act_store_device activation_fn activation_fn_kwargs activation_fn_str adam_beta1 adam_beta2
    architecture autocast autocast_lm b_dec_init_method cached_activations_path checkpoint_path
    compile_llm compile_sae dataset dataset_trust_remote_code dead_feature_threshold dead_feature_window
    decoder_heuristic_init decoder_orthogonal_init eval_batch_size_prompts eval_every_n_wandb_logs
    exclude_special_tokens expansion_factor feature_sampling_window finetuning_method
    finetuning_scaling_factor finetuning_tokens from_pretrained_path hook_layer hook_layer_out
    hook_point hook_point_layer init_encoder_as_decoder_transpose is_dataset_tokenized
    jumprelu_bandwidth jumprelu_init_threshold k l0_coefficient l1_coefficient l1_warm_up_steps
    llm_compilation_mode lm_name log_to_wandb lp_norm lr lr_decay_steps lr_end lr_scheduler_name
    lr_warm_up_steps model_kwargs mse_loss_normalization n_batches_in_buffer n_checkpoints
    n_eval_batches n_restart_cycles noise_scale normalize_sae_decoder release resume run_name
    sae_compilation_mode sae_lens_training_version sae_lens_version
    scale_sparsity_penalty_by_decoder_norm seed store_batch_size_prompts streaming tokens_per_buffer
    train_batch_size_tokens trainer training_tokens use_cached_activations use_ghost_grads verbose
    wandb_entity wandb_id wandb_log_frequency wandb_project
""",
    )
)
# What TransformerLens does to weights when it is told to, and the places whose values that changes.
PROCESSING = {
    "fold_ln": re.compile(r".*hook_normalized"),
    "fold_value_biases": re.compile(r".*\.attn\.hook_(z|v|result)"),
    "refactor_factored_attn_matrices": re.compile(r".*\.attn\..*"),
}

log = structlog.get_logger()


def check_dictionary(cfg: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], what: str) -> bool:
    """`cfg` is cfg.json as it stands, `shapes` those of the tensors; returns whether a warning was logged.

    Raises ConfigError.
    """
    if of_training := {"topk_threshold", "log_threshold"} & set(shapes):
        raise ConfigError(f"{what}: a checkpoint of training (it holds {named(of_training)}): {EXPORT}")
    check_types(cfg, what)
    settings = with_defaults(cfg, what)
    architecture = settings["architecture"]
    check_activation(cfg, architecture, what)
    check_foreign(cfg, settings, what)
    check_read(cfg, settings, what)
    of_a_revision = check_places(cfg, settings, what)
    if (mode := settings.get("normalize_activations", "none")) not in (*RUN_TIME_NORMALIZATIONS, *FOLDS):
        raise ConfigError(
            f"{what}: normalize_activations = {shown(mode)} in its cfg.json is not known: expected one of"
            f" {', '.join((*RUN_TIME_NORMALIZATIONS, *FOLDS))}"
        )
    if cfg.get("rescale_acts_by_decoder_norm") and architecture != "topk":
        raise ConfigError(
            f"{what}: rescale_acts_by_decoder_norm, which SAELens leaves out for {architecture}: fold it"
            " (fold_W_dec_norm) and save again"
        )
    check_tensors(settings, shapes, what)
    if unknown := {key for key in cfg if cfg[key] is not None} - known_keys(architecture):
        log.warning(
            "sae.unknown_settings",
            sae=what,
            keys=sorted(unknown)[:10],
            message="SAELens leaves them out: see that they change nothing that the dictionary computes",
        )
    return of_a_revision or bool(unknown)


def check_types(cfg: Mapping[str, Any], what: str) -> None:
    """Raises ConfigError for values that Python would take and misread."""
    metadata = cfg.get("metadata")
    if "metadata" in cfg and not isinstance(metadata, dict):
        raise ConfigError(f"{what}: metadata in its cfg.json is no object: correct it")
    places = [cfg, metadata or {}]
    for key, kinds in {
        "apply_b_dec_to_input": (bool,),
        "rescale_acts_by_decoder_norm": (bool,),
        "finetuning_scaling_factor": (bool,),
        "prepend_bos": (bool, type(None)),
        "architecture": (str,),
        "reshape_activations": (str, type(None)),
        "normalize_activations": (str, bool, type(None)),
        "hook_name": (str, type(None)),
        "hook_name_out": (str, type(None)),
        "hook_point": (str, type(None)),
        "sae_lens_version": (str, type(None)),
        "activation_fn_kwargs": (dict, type(None)),
        "model_from_pretrained_kwargs": (dict, type(None)),
    }.items():
        for place in places:
            if key in place and not isinstance(place[key], kinds):
                raise ConfigError(
                    f"{what}: {key} = {shown(place[key])} in its cfg.json is of the wrong type: correct it"
                )
    for key in ("d_in", "d_sae", "d_out"):
        value = cfg.get(key, 1)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{what}: {key} = {shown(value)} in its cfg.json: expected a number above 0")


def with_defaults(cfg: Mapping[str, Any], what: str) -> dict[str, Any]:
    """`cfg` as SAELens completes it, in the form of version 6. Raises ConfigError."""
    from sae_lens.loading.pretrained_sae_loaders import handle_config_defaulting

    architecture = cfg.get("architecture", "standard")
    if architecture in TRAINING_ARCHITECTURES:
        raise ConfigError(
            f"{what}: a checkpoint of {architecture} training, not a finished dictionary: {EXPORT}"
        )
    if architecture not in ARCHITECTURES:
        close = difflib.get_close_matches(architecture, ARCHITECTURES, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise ConfigError(
            f"{what}: architecture {shown(architecture)} is not supported: {hint}use one of"
            f" {', '.join(ARCHITECTURES)}"
        )
    with explained(what):
        settings: dict[str, Any] = handle_config_defaulting(
            {key: value for key, value in cfg.items() if (key, value) != ("activation_fn_kwargs", None)}
        )
    settings.setdefault("architecture", architecture)
    for key in ("d_in", "d_sae"):
        if key not in settings:
            raise ConfigError(f"{what}: no {key} in its cfg.json: complete it")
    return settings


def check_activation(cfg: Mapping[str, Any], architecture: str, what: str) -> None:
    """SAELens reads an activation function's name only where it is top-k."""
    arguments = dict(cfg.get("activation_fn_kwargs") or {})
    if architecture == "topk":
        k = arguments.pop("k", cfg.get("k"))
        if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= cfg.get("d_sae", 0):
            raise ConfigError(f"{what}: k = {shown(k)} in its cfg.json: expected a number from 1 to d_sae")
        if "k" in cfg and cfg["k"] != k:
            raise ConfigError(f"{what}: k and activation_fn_kwargs in its cfg.json disagree: correct it")
        known: tuple[Any, ...] = (None, "topk")
    else:
        known = (None, "relu")
    for name in (cfg.get("activation_fn_str"), cfg.get("activation_fn")):
        if name not in known:
            raise ConfigError(
                f"{what}: activation function {shown(name)}, which SAELens leaves out for {architecture}:"
                " lensd reads relu, and topk with its k: use another dictionary"
            )
    arguments = {key: value for key, value in arguments.items() if value not in (None, "relu") or key == "k"}
    if arguments:
        raise ConfigError(
            f"{what}: activation_fn_kwargs has {named(map(str, arguments))}, which SAELens leaves out for"
            f" {architecture}: use another dictionary"
        )


def check_foreign(cfg: Mapping[str, Any], settings: Mapping[str, Any], what: str) -> None:
    """Raises ConfigError for settings that say that the dictionary is of another architecture.

    SAELens before version 6 wrote those of JumpReLU training for every architecture.
    """
    architecture = settings["architecture"]
    known = fields_of(architecture)
    before_version_6 = settings.get("metadata") is not cfg.get("metadata")
    foreign = [] if before_version_6 else [key for key in cfg if key.startswith("jumprelu_")]
    for key in ("k", *foreign):
        if cfg.get(key) is not None and key not in known:
            raise ConfigError(
                f"{what}: {key} = {shown(cfg[key])} in its cfg.json, which a {architecture} does not have:"
                " correct the architecture, or remove it if the dictionary was trained without"
            )


def check_read(cfg: Mapping[str, Any], settings: Mapping[str, Any], what: str) -> None:
    """Raises ConfigError for settings that stand where SAELens does not read them, and differ from what it
    reads: version 6 looks in metadata alone, and without a version at the top level alone.
    """
    read = settings.get("metadata") or {}
    for key in ("hook_name", "hook_name_out", "prepend_bos", "model_from_pretrained_kwargs"):
        for place, where, remedy in (
            (cfg, "at the top level of its cfg.json", "move it into metadata"),
            (cfg.get("metadata") or {}, "in metadata", "add sae_lens_version, 6.0.0 or later, to metadata"),
        ):
            value = place.get(key)
            if value is not None and value != read.get(key) and (value != {} or read.get(key)):
                raise ConfigError(
                    f"{what}: {key} = {shown(value)} {where}, where SAELens leaves it out and reads"
                    f" {shown(read.get(key))}: {remedy}, or remove it"
                )


def check_places(cfg: Mapping[str, Any], settings: Mapping[str, Any], what: str) -> bool:
    """Where the dictionary reads, and of what model; returns whether that is a revision, which is logged."""
    metadata = settings.get("metadata") or {}
    for key in HEAD_KEYS:
        for place in (cfg, metadata):
            if place.get(key) is not None:
                raise ConfigError(
                    f"{what}: reads one head alone ({key} = {shown(place[key])}), which lensd does not: use a"
                    " dictionary of all heads (hook_z) or of the residual stream"
                )
    reshape = settings.get("reshape_activations") or "none"
    hook = metadata.get("hook_name") or ""
    if reshape not in ("none", "hook_z") or (reshape == "hook_z" and not hook.endswith("_z")):
        raise ConfigError(
            f"{what}: reshape_activations = {shown(reshape)} at {shown(hook)}: expected none,"
            " or hook_z at a hook_z"
        )
    processed = metadata.get("model_from_pretrained_kwargs") or {}
    for key, value in processed.items():
        if key in (*PROCESSING, "center_writing_weights") and not isinstance(value, bool | None):
            raise ConfigError(f"{what}: {key} = {shown(value)} in its cfg.json: expected true or false")
    for place in (hook, metadata.get("hook_name_out") or ""):
        for key, changed in PROCESSING.items():
            if processed.get(key) and changed.fullmatch(place):
                raise ConfigError(
                    f"{what}: was trained on weights that TransformerLens had processed ({key}), which"
                    f" changes the values at {place}: use one with from_pretrained_no_processing"
                )
    if (
        revision := processed.get("revision")
        or processed.get("checkpoint_value")
        or processed.get("checkpoint_index")
    ):
        log.warning(
            "sae.trained_on_a_revision",
            sae=what,
            revision=str(revision),
            message="see that the model is that one",
        )
    return bool(revision)


def expected_shapes(settings: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The tensors of an architecture, by name."""
    architecture = settings["architecture"]
    d_in, d_sae = settings["d_in"], settings["d_sae"]
    d_out = settings.get("d_out", 768) if architecture in TRANSCODERS else d_in  # SAELens's own default
    shapes = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_out), "b_dec": (d_out,)}
    if architecture == "gated":
        return shapes | dict.fromkeys(("b_gate", "b_mag", "r_mag"), (d_sae,))
    shapes["b_enc"] = (d_sae,)
    if "jumprelu" in architecture:
        shapes["threshold"] = (d_sae,)
    if "skip" in architecture:
        shapes["W_skip"] = (d_out, d_in)
    return shapes


def check_tensors(settings: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], what: str) -> None:
    """Raises ConfigError where a tensor is missing, left over or of another shape than cfg.json says."""
    expected = expected_shapes(settings)
    architecture = settings["architecture"]
    left_over, lost = set(shapes) - set(expected), set(expected) - set(shapes)
    if left_over & {"scaling_factor", "finetuning_scaling_factor"}:
        raise ConfigError(
            f"{what}: uses a scaling_factor on its features, which SAELens no longer applies: fold it into"
            " W_dec (W_dec *= scaling_factor[:, None], features as they are), or use one without finetuning"
        )
    if lost:
        raise ConfigError(
            f"{what}: its weights lack {named(lost)}, which a {architecture}"
            f" has{f' (they hold {named(left_over)})' if left_over else ''}: use complete weights,"
            " or correct the architecture"
        )
    if left_over:
        raise ConfigError(
            f"{what}: its weights hold {named(left_over)}, which a {architecture} does not have: correct the"
            " architecture in its cfg.json"
        )
    wrong = {name: shape for name, shape in expected.items() if shapes[name] != shape}
    for name, shape in wrong.items():
        if len(shape) == 2 and shapes[name] == shape[::-1] and len(wrong) <= 3:
            raise ConfigError(
                f"{what}: {name} is {shapes[name]}, transposed: expected {shape}: transpose it and save again"
            )
    if wrong:
        for key, width in zip(("d_in", "d_sae"), shapes["W_enc"], strict=False):
            fitting = expected_shapes({**settings, key: width})
            if width != settings[key] and all(shapes[name] == shape for name, shape in fitting.items()):
                raise ConfigError(
                    f"{what}: {key} = {settings[key]} in its cfg.json,"
                    f" but its weights have {width}: correct it"
                )
        name, shape = next(iter(wrong.items()))
        raise ConfigError(
            f"{what}: {name} is {shapes[name]}, where its cfg.json asks for {shape}: use the weights and the"
            " cfg.json that were saved together"
        )


def known_keys(architecture: str) -> set[str]:
    """Keys of cfg.json that are understood, or known to change nothing when the dictionary encodes."""
    from sae_lens.config import LanguageModelSAERunnerConfig
    from sae_lens.loading.pretrained_sae_loaders import LLM_METADATA_KEYS

    # SAELens adds the runner's settings to those of a dictionary in training
    runner = {field.name for field in dataclasses.fields(LanguageModelSAERunnerConfig)}
    known = fields_of(architecture) | runner | LEGACY_KEYS | set(LLM_METADATA_KEYS)
    return known | {"rescale_acts_by_decoder_norm"}


def fields_of(architecture: str) -> set[str]:
    """The settings of an architecture, and of its training, in SAELens."""
    from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY

    classes: list[Any] = [
        registry[architecture][1]
        for registry in (SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY)
        if architecture in registry
    ]
    return {field.name for kind in classes for field in dataclasses.fields(kind)}


def check_folded(mode: str, what: str) -> None:
    """Raises ConfigError where a loaded dictionary's input would not be normalised as it was in training."""
    if mode not in RUN_TIME_NORMALIZATIONS:
        raise ConfigError(
            f"{what}: normalize_activations = {mode}, which SAELens leaves out when it encodes: fold it first"
            f" ({FOLDS.get(mode, 'into the weights')}) and save again"
        )


def shown(value: Any) -> str:
    """A value of a configuration for a message: never long."""
    return cut_short(repr(value))


def judged(load: Callable[..., Any], what: str, warned: list[bool]) -> Callable[..., Any]:
    """A loader of SAELens's that checks configuration and tensors before a dictionary is made of them.

    `warned` is told whether a warning was logged.
    """

    def loader(*args: Any, **kwargs: Any) -> Any:
        loaded = load(*args, **kwargs)
        cfg, tensors = loaded[0], loaded[1]
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        warned.append(check_dictionary(cfg, shapes, what))
        return loaded

    return loader
