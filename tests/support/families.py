"""Tiny random models of the decoder families, as Hugging Face builds them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from tests.support import tiny

TOKENS = {"vocab_size": tiny.BOS + 1, "bos_token_id": tiny.BOS, "eos_token_id": tiny.BOS, "pad_token_id": 0}
COMMON = TOKENS | {
    "hidden_size": tiny.D_MODEL,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}
GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
GPT2 = TOKENS | {"n_embd": tiny.D_MODEL, "n_layer": 4, "n_head": 4, "n_positions": 512}
OPT = TOKENS | {
    "hidden_size": tiny.D_MODEL,
    "ffn_dim": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "word_embed_proj_dim": tiny.D_MODEL,
}
WINDOW = 8  # tokens, shorter than the texts of the tests
SLIDING = {"sliding_window": WINDOW}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
LATENT = {  # attention of DeepSeek's kind
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
VISION = {  # a tower for pictures
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
SEEING = ("llava", "mistral3", "gemma3_seeing", "qwen2_vl")  # language models with such a tower
ENCODER_DECODER = {"d_model": tiny.D_MODEL, "d_kv": 8, "d_ff": 64, "num_layers": 4, "num_heads": 4}

# name -> (configuration class, settings)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2Config", GPT2),
    "gpt_neox": ("GPTNeoXConfig", COMMON),
    "llama": ("LlamaConfig", COMMON | GROUPED),
    "mistral": ("MistralConfig", COMMON | GROUPED | SLIDING),
    "gemma2": (
        "Gemma2Config",
        COMMON | GROUPED | SLIDING | {"attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 16},
    ),
    "gemma3": ("Gemma3TextConfig", COMMON | GROUPED | SLIDING),
    "qwen2": ("Qwen2Config", COMMON | {"num_key_value_heads": 2}),
    "qwen3": ("Qwen3Config", COMMON | GROUPED),
    "phi": ("PhiConfig", COMMON),
    "gptj": ("GPTJConfig", GPT2 | {"rotary_dim": 4}),
    "bloom": ("BloomConfig", TOKENS | {"hidden_size": tiny.D_MODEL, "n_layer": 4, "n_head": 4}),
    # Those that only the sweep and the tests of the probe build.
    "gpt_neox_sequential": ("GPTNeoXConfig", COMMON | {"use_parallel_residual": False}),
    "ministral": ("MinistralConfig", COMMON | GROUPED | SLIDING),
    "mixtral": ("MixtralConfig", COMMON | GROUPED | LOCAL_EXPERTS),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        COMMON | EXPERTS | {"num_key_value_heads": 2, "shared_expert_intermediate_size": 24},
    ),
    "qwen3_moe": ("Qwen3MoeConfig", COMMON | GROUPED | EXPERTS),
    "qwen3_next": (
        "Qwen3NextConfig",
        COMMON
        | GROUPED
        | EXPERTS
        | {
            "shared_expert_intermediate_size": 24,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
    ),
    "gemma": ("GemmaConfig", COMMON | GROUPED),
    "gemma4": ("Gemma4TextConfig", COMMON | GROUPED | SLIDING | {"hidden_size_per_layer_input": 8}),
    "gemma3n": (
        "Gemma3nTextConfig",
        COMMON
        | GROUPED
        | SLIDING
        | {
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": tiny.BOS + 1,
            "num_kv_shared_layers": 0,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "activation_sparsity_pattern": [0.0] * 4,
        },
    ),
    "phi3": ("Phi3Config", COMMON | {"num_key_value_heads": 2}),
    "phimoe": ("PhimoeConfig", COMMON | LOCAL_EXPERTS | {"num_key_value_heads": 2}),
    "olmo": ("OlmoConfig", COMMON),
    "olmo2": ("Olmo2Config", COMMON),
    "olmo3": ("Olmo3Config", COMMON | SLIDING),
    "olmoe": ("OlmoeConfig", COMMON | {"num_experts": 4, "num_experts_per_tok": 2}),
    "gpt_bigcode": ("GPTBigCodeConfig", GPT2),
    "opt": ("OPTConfig", OPT),
    "opt_post_norm": (
        "OPTConfig",
        OPT
        | {
            "word_embed_proj_dim": 16,
            "do_layer_norm_before": False,
        },
    ),
    "stablelm": ("StableLmConfig", COMMON | {"num_key_value_heads": 2}),
    "stablelm_parallel": (
        "StableLmConfig",
        COMMON | {"num_key_value_heads": 2, "use_parallel_residual": True},
    ),
    "cohere": ("CohereConfig", COMMON | {"num_key_value_heads": 2}),
    "cohere2": ("Cohere2Config", COMMON | SLIDING | {"num_key_value_heads": 2}),
    "deepseek_v2": ("DeepseekV2Config", COMMON | LATENT),
    "deepseek_v3": ("DeepseekV3Config", COMMON | LATENT),
    "glm": ("GlmConfig", COMMON | GROUPED),
    "glm4": ("Glm4Config", COMMON | GROUPED),
    "granite": ("GraniteConfig", COMMON | {"num_key_value_heads": 2, "residual_multiplier": 0.22}),
    "granitemoe": (
        "GraniteMoeConfig",
        COMMON | LOCAL_EXPERTS | {"num_key_value_heads": 2, "residual_multiplier": 0.22},
    ),
    "smollm3": ("SmolLM3Config", COMMON | {"num_key_value_heads": 2}),
    "starcoder2": ("Starcoder2Config", COMMON | {"num_key_value_heads": 2}),
    "nemotron": ("NemotronConfig", COMMON | GROUPED),
    "exaone4": ("Exaone4Config", COMMON | SLIDING | {"num_key_value_heads": 2}),
    "ernie4_5": ("Ernie4_5Config", COMMON | GROUPED),
    "seed_oss": ("SeedOssConfig", COMMON | GROUPED),
    "hunyuan": ("HunYuanDenseV1Config", COMMON | GROUPED),
    "minimax_m2": ("MiniMaxM2Config", COMMON | GROUPED | LOCAL_EXPERTS),
    "biogpt": ("BioGptConfig", COMMON),
    "persimmon": ("PersimmonConfig", COMMON),
    "arcee": ("ArceeConfig", COMMON | GROUPED),
    "apertus": ("ApertusConfig", COMMON | {"num_key_value_heads": 2}),
    "gpt_neo": (
        "GPTNeoConfig",
        TOKENS
        | {
            "hidden_size": tiny.D_MODEL,
            "num_layers": 4,
            "num_heads": 4,
            "intermediate_size": 64,
            "max_position_embeddings": 512,
            "attention_types": [[["global", "local"], 2]],
            "window_size": WINDOW,
        },
    ),
    "codegen": ("CodeGenConfig", GPT2 | {"rotary_dim": 4}),
    "openai_gpt": ("OpenAIGPTConfig", GPT2),
    "falcon": ("FalconConfig", COMMON | {"multi_query": True, "parallel_attn": True, "bias": False}),
    "falcon_sequential": (
        "FalconConfig",
        COMMON | {"multi_query": False, "parallel_attn": False, "alibi": True, "bias": True},
    ),
    "falcon_grouped": (
        "FalconConfig",
        COMMON | {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": False},
    ),
    "mpt": ("MptConfig", TOKENS | {"d_model": tiny.D_MODEL, "n_layers": 4, "n_heads": 4, "max_seq_len": 512}),
    "xglm": (
        "XGLMConfig",
        TOKENS | {"d_model": tiny.D_MODEL, "ffn_dim": 64, "num_layers": 4, "attention_heads": 4},
    ),
    "gpt_oss": ("GptOssConfig", COMMON | GROUPED | LOCAL_EXPERTS | SLIDING),
    "llama4": (
        "Llama4TextConfig",
        COMMON | GROUPED | LOCAL_EXPERTS | {"intermediate_size_mlp": 64, "attention_chunk_size": 64},
    ),
    "mamba": ("MambaConfig", TOKENS | {"hidden_size": tiny.D_MODEL, "num_hidden_layers": 4, "state_size": 8}),
    "mamba2": (
        "Mamba2Config",
        TOKENS
        | {
            "hidden_size": tiny.D_MODEL,
            "num_hidden_layers": 4,
            "state_size": 8,
            "num_heads": 8,
            "head_dim": 8,
            "n_groups": 2,
        },
    ),
    "recurrent_gemma": (
        "RecurrentGemmaConfig",
        COMMON | {"num_key_value_heads": 1, "lru_width": 32, "attention_window_size": WINDOW},
    ),
    "rwkv": ("RwkvConfig", TOKENS | {"hidden_size": tiny.D_MODEL, "num_hidden_layers": 4}),
    "jamba": (
        "JambaConfig",
        COMMON
        | {
            "num_key_value_heads": 2,
            "num_experts": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "mamba_d_state": 8,
            "use_mamba_kernels": False,
        },
    ),
    "lfm2": (
        "Lfm2Config",
        COMMON
        | {
            "num_key_value_heads": 2,
            "layer_types": ["conv", "full_attention", "conv", "full_attention"],
            "block_auto_adjust_ff_dim": False,
        },
    ),
    "bert": ("BertConfig", COMMON),
    "bert_decoder": ("BertConfig", COMMON | {"is_decoder": True}),
    "roberta": ("RobertaConfig", COMMON | {"max_position_embeddings": 514}),
    "electra": ("ElectraConfig", COMMON | {"embedding_size": tiny.D_MODEL}),
    "llava": (
        "LlavaConfig",
        {
            "text_config": {"model_type": "llama"} | COMMON | GROUPED,
            "vision_config": {"model_type": "clip_vision_model"} | VISION,
            "image_token_index": 5,
        },
    ),
    "mistral3": (
        "Mistral3Config",
        {
            "text_config": {"model_type": "mistral"} | COMMON | GROUPED | SLIDING,
            "vision_config": {"model_type": "pixtral"} | VISION,
            "image_token_index": 5,
        },
    ),
    "gemma3_seeing": (
        "Gemma3Config",
        {
            "text_config": COMMON | GROUPED | SLIDING,
            "vision_config": {"model_type": "siglip_vision_model"} | VISION,
            "mm_tokens_per_image": 4,
        },
    ),
    "qwen2_vl": (
        "Qwen2VLConfig",
        {
            "text_config": COMMON
            | {
                "num_key_value_heads": 2,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
            },
            "vision_config": {
                "depth": 2,
                "embed_dim": 32,
                "hidden_size": 32,
                "num_heads": 4,
                "mlp_ratio": 2,
                "patch_size": 8,
            },
            "image_token_id": 5,
            "video_token_id": 6,
            "vision_start_token_id": 7,
            "vision_end_token_id": 8,
        },
    ),
    "t5": ("T5Config", TOKENS | ENCODER_DECODER),
    "ctrl": ("CTRLConfig", GPT2 | {"dff": 64}),
    "xlnet": ("XLNetConfig", TOKENS | {"d_model": tiny.D_MODEL, "n_layer": 4, "n_head": 4, "d_inner": 64}),
}
PACKED = ("gpt2", "gpt_neox", "llama", "mistral", "gemma2", "gemma3", "qwen2", "qwen3", "phi")


def save_family(folder: Path, family: str, **changes: object) -> Path:
    """A random model of the family: attention is not uniform, and no norm or bias is the same everywhere."""
    torch.manual_seed(0)
    name, settings = FAMILIES[family]
    config = getattr(transformers, name)(**{**settings, **changes})
    encodes = config.is_encoder_decoder
    kind = transformers.AutoModelForSeq2SeqLM if encodes else transformers.AutoModelForCausalLM
    if family in SEEING:
        kind = transformers.AutoModelForImageTextToText
    model = kind.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3)
            else:
                parameter += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    tiny.byte_tokenizer().save_pretrained(folder)
    return folder
