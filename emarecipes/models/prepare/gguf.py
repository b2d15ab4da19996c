"""A Llama model in a GGUF file, written as the files of a Hugging Face folder.

GGUF keeps everything in one file: the weights, quantized and with q and k in Meta's interleaved
order, and the tokenizer and the chat template as metadata. Nothing here imports torch.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from emarecipes.errors import disk_errors
from emarecipes.files import write_json

if TYPE_CHECKING:
    from gguf import GGUFReader

_NORMAL, _CONTROL = 1, 3  # gguf.TokenType

_LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OTHER_TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
}


def convert(gguf_file: Path, folder: Path) -> None:
    """Write the model of ``gguf_file`` into ``folder`` in Hugging Face's layout.

    The folder gets ``model.safetensors``, ``config.json``, ``generation_config.json``,
    ``tokenizer.json`` and ``tokenizer_config.json``. A bar counts the tensors.

    Args:
        gguf_file: a model of architecture ``llama`` with tied embeddings and a byte-level BPE
            tokenizer that splits digits one by one (SmolLM2's).
        folder: an existing folder.

    Raises:
        ValueError: the file is of another architecture or has another tokenizer. The models that
            can be prepared are fixed by their checksums, so this is a mistake in our table.
    """
    from gguf import GGUFReader

    reader = GGUFReader(gguf_file)
    meta = {key: field.contents() for key, field in reader.fields.items()}
    kind = (meta["general.architecture"], meta["tokenizer.ggml.model"], meta["tokenizer.ggml.pre"])
    if kind != ("llama", "gpt2", "smollm"):
        raise ValueError(f"{gguf_file.name}: cannot convert a model of kind {kind}")

    _write_weights(reader, meta, folder / "model.safetensors")
    _write_tokenizer(meta, folder / "tokenizer.json")
    write_json(folder / "config.json", _model_config(meta), ensure_ascii=False)
    write_json(folder / "generation_config.json", _token_ids(meta), ensure_ascii=False)
    write_json(folder / "tokenizer_config.json", _tokenizer_config(meta), ensure_ascii=False)
    # safetensors makes its files readable by their owner alone.
    shutil.copymode(folder / "config.json", folder / "model.safetensors")


def _write_weights(reader: GGUFReader, meta: dict[str, Any], path: Path) -> None:
    """Store every tensor in fp32.

    A Q4_1 weight is scale * q + minimum with two fp16 constants and q in 0..15, a Q8_0 weight
    scale * q with q in -127..127: neither fits into the 8 significant bits of bf16. In fp32 the
    folder holds the very numbers the GGUF file stands for, and what a test measures against
    another program is that program's difference and not our rounding.
    """
    from gguf.quants import dequantize
    from safetensors.numpy import save_file

    heads = {
        "attn_q": meta["llama.attention.head_count"],
        "attn_k": meta["llama.attention.head_count_kv"],
    }
    tensors: dict[str, np.ndarray] = {}
    bar = tqdm(reader.tensors, desc="dequantizing", unit="tensor", disable=None, leave=False)
    for tensor in bar:
        weight = np.asarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        if tensor.name in _OTHER_TENSORS:
            tensors[_OTHER_TENSORS[tensor.name]] = weight
            continue
        _, layer, part, suffix = tensor.name.split(".")  # blk.7.attn_q.weight
        if part in heads:
            weight = _unpermute(weight, heads[part])
        tensors[f"model.layers.{layer}.{_LAYER_TENSORS[part]}.{suffix}"] = weight
    # transformers reads a safetensors file only if it says which framework's layout it has.
    with disk_errors(path):
        save_file(tensors, path, metadata={"format": "pt"})


def _unpermute(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Order each head's rows for a rotation of halves, from an order for a rotation of pairs.

    Meta's RoPE rotates rows (2i, 2i+1) of a head together, Hugging Face's rows (i, i + half).

    Args:
        weight: [num_heads * head_dim, width].
        num_heads: query heads for q, key-value heads for k.
    """
    rows, width = weight.shape
    pairs = weight.reshape(num_heads, rows // num_heads // 2, 2, width)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows, width)


def _token_ids(meta: dict[str, Any]) -> dict[str, Any]:
    return {
        "bos_token_id": meta["tokenizer.ggml.bos_token_id"],
        "eos_token_id": meta["tokenizer.ggml.eos_token_id"],
        "pad_token_id": meta["tokenizer.ggml.padding_token_id"],
    }


def _model_config(meta: dict[str, Any]) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        **_token_ids(meta),
        "head_dim": meta["llama.rope.dimension_count"],
        "hidden_act": "silu",
        "hidden_size": meta["llama.embedding_length"],
        "intermediate_size": meta["llama.feed_forward_length"],
        "max_position_embeddings": meta["llama.context_length"],
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": meta["llama.attention.head_count"],
        "num_hidden_layers": meta["llama.block_count"],
        "num_key_value_heads": meta["llama.attention.head_count_kv"],
        # GGUF keeps the fp32 neighbour of 1e-05.
        "rms_norm_eps": float(f"{meta['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_scaling": None,
        "rope_theta": meta["llama.rope.freq_base"],
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "use_cache": True,
        "vocab_size": meta["llama.vocab_size"],
    }


def _write_tokenizer(meta: dict[str, Any], path: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens: list[str] = meta["tokenizer.ggml.tokens"]
    # Byte-level tokens spell a space as another letter, so the one space is the separator.
    merges = [
        (left, right) for left, right in (m.split(" ") for m in meta["tokenizer.ggml.merges"])
    ]
    bpe = models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges)
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in _special_tokens(meta)]
    )
    tokenizer.save(str(path))


def _special_tokens(meta: dict[str, Any]) -> dict[str, int]:
    """Return the control tokens and their ids, in the order of the ids."""
    types = meta["tokenizer.ggml.token_type"]
    if not set(types) <= {_NORMAL, _CONTROL}:
        raise ValueError(f"token types {sorted(set(types))}: only normal and control are known")
    named = zip(meta["tokenizer.ggml.tokens"], types, strict=True)
    return {token: i for i, (token, kind) in enumerate(named) if kind == _CONTROL}


def _tokenizer_config(meta: dict[str, Any]) -> dict[str, Any]:
    tokens = meta["tokenizer.ggml.tokens"]
    special = {
        str(i): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
        for token, i in _special_tokens(meta).items()
    }
    return {
        "add_prefix_space": False,
        "added_tokens_decoder": special,
        "bos_token": tokens[meta["tokenizer.ggml.bos_token_id"]],
        "chat_template": meta["tokenizer.chat_template"],
        "clean_up_tokenization_spaces": False,
        "eos_token": tokens[meta["tokenizer.ggml.eos_token_id"]],
        "model_max_length": meta["llama.context_length"],
        "pad_token": tokens[meta["tokenizer.ggml.padding_token_id"]],
        # The class that takes tokenizer.json as it is: a named one brings its own pre-tokenizer.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": tokens[meta["tokenizer.ggml.unknown_token_id"]],
    }
