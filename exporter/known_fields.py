"""Reads a ``config.json`` whole: what is not known to change nothing, and is not read, is refused by its name."""

from __future__ import annotations

from pathlib import Path

from exporter.families import FAMILIES, Config
from flowspec_edge.errors import CheckpointError

WITH_IMAGES = {"Gemma3ForConditionalGeneration": "Gemma3ForCausalLM"}
"""Models that see images too, and what they are without: a text model in ``text_config``, whose tensors are named below
TEXT_PREFIX.
"""
TEXT_PREFIX = "language_model."

_READ = frozenset(
    {
        *("architectures", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings", "rms_norm_eps", "hidden_act"),
        *("rope_theta", "rope_scaling", "rope_parameters", "tie_word_embeddings", "attention_bias", "mlp_bias"),
        *("bos_token_id", "eos_token_id", "max_sequence_length", "quantization_config"),
    }
)
_HARMLESS = frozenset(
    {
        # what the file is and who wrote it
        *("model_type", "torch_dtype", "dtype", "transformers_version", "_name_or_path", "name_or_path", "auto_map"),
        *("tokenizer_class", "_commit_hash", "transformers.js_config", "is_llama_config", "architecture", "license"),
        *(
            "unsloth_version",
            "unsloth_fixed",
            "_attn_implementation_autoset",
            "_attn_implementation",
            "custom_pipelines",
        ),
        *("attn_implementation", "_attn_implementation_internal", "_flash_attn_2_enabled", "use_flash_attn"),
        *("seed", "_sliding_window_pattern", "custom_pipelines"),
        # training alone
        *("initializer_range", "attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "pretraining_tp"),
        *("gradient_checkpointing", "use_liger_kernel", "router_aux_loss_coef", "finetuning_task", "problem_type"),
        # how a runtime runs it, and what it returns
        *("use_cache", "cache_implementation", "return_dict", "torchscript", "use_bfloat16", "chunk_size_feed_forward"),
        *("return_dict_in_generate", "output_scores", "output_attentions", "output_hidden_states", "use_return_dict"),
        # tokens, and defaults of sampling
        *("pad_token_id", "unk_token_id", "sep_token_id", "decoder_start_token_id", "prefix", "suppress_tokens"),
        *("begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id", "bad_words_ids", "do_sample"),
        *("temperature", "top_k", "top_p", "typical_p", "max_length", "min_length", "max_new_tokens", "num_beams"),
        *("num_beam_groups", "num_return_sequences", "repetition_penalty", "length_penalty", "no_repeat_ngram_size"),
        *("encoder_no_repeat_ngram_size", "diversity_penalty", "early_stopping", "remove_invalid_values"),
        *("exponential_decay_length_penalty",),
        # heads of classifiers
        *("id2label", "label2id", "num_labels", "classifier_dropout", "task_specific_params"),
    }
)
"""Fields that change nothing of what a model computes."""
_NEUTRAL: Config = {
    **{"partial_rotary_factor": 1.0, "logit_scale": 1.0, "embedding_multiplier": 1.0, "logits_scaling": 1.0},
    **{"residual_multiplier": 1.0, "is_causal": True, "use_rope": True},
}
"""The values of fields of other families with which they change nothing."""


_OF_BOTH = ("bos_token_id", "eos_token_id", "quantization_config")
"""Fields beside ``text_config`` that are the text model's too."""


def read_family(path: Path, config: Config) -> tuple[str, Config]:
    """The one architecture that a config names, and the config with transformers' values of what it leaves out.

    Raises:
        CheckpointError: the architecture is not among :data:`FAMILIES`, or a field may change what the model computes
            and is not read.
    """
    architectures = config.get("architectures") or []
    architecture = ", ".join(map(str, architectures)) or "none"
    if architecture in WITH_IMAGES and isinstance(text := config.get("text_config"), dict):
        shared = {name: config[name] for name in _OF_BOTH if name in config}
        architecture, config = WITH_IMAGES[architecture], {**shared, **text}
    if architecture not in FAMILIES:
        supported = ", ".join([*FAMILIES, *WITH_IMAGES])
        raise CheckpointError(f"{path}: architecture {architecture} is not supported; supported: {supported}")
    _refuse_unknown(path, config, architecture)
    return architecture, {**FAMILIES[architecture].defaults, **config}


def _refuse_unknown(path: Path, config: Config, architecture: str) -> None:
    family = FAMILIES[architecture]
    known = _READ | family.reads | _HARMLESS
    neutral = {**_NEUTRAL, **family.must_be}
    for name, value in config.items():
        if name in known and name not in family.must_be:
            continue
        if name in neutral:
            if value is None or value == neutral[name]:
                continue
            raise CheckpointError(f"{path}: {name} is {value!r:.80}, which is not supported with {architecture}")
        if value is None or value is False or value in (0, "", [], {}):
            continue
        raise CheckpointError(
            f"{path}: {name} is {value!r:.80}, a field that is not known with {architecture}, so the text might not be "
            "the model's; where it changes nothing, take it out of the file"
        )
