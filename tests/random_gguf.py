"""A random GGUF file of an architecture, quantized in many ways, with a tokenizer that works."""

import json
from itertools import cycle
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from chat_families import byte_level

Type = gguf.GGMLQuantizationType
LAYERS, HEADS, KV_HEADS, WIDTH, MLP = 2, 4, 2, 256, 512  # K-types have rows of 256
CONTROL, OWN = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], ["<tool_call>"]
UNUSED = ["[PAD353]", "[PAD354]"]
TEMPLATE = "{% for m in messages %}{{ '<|im_start|>' + m.content + '<|im_end|>' }}{% endfor %}"
TYPES = (Type.Q4_K, Type.Q5_0, Type.Q6_K, Type.Q8_0, Type.F16, Type.BF16, Type.Q4_0)
# Where a block of a K-type has its half-precision scales; the gguf package cannot write these.
_SCALES = {Type.Q4_K: slice(0, 4), Type.Q6_K: slice(208, 210)}


def vocabulary() -> tuple[list[str], list[str], list[int]]:
    """Tokens, merges and kinds."""
    model = json.loads(byte_level([]).to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    merges = [" ".join(merge) for merge in model["merges"]]
    kinds = [1] * len(tokens) + [3] * len(CONTROL) + [4] * len(OWN) + [5] * len(UNUSED)
    return tokens + CONTROL + OWN + UNUSED, merges, kinds


def write_random(
    path: Path,
    kind: str = "qwen2",
    pre: str = "qwen2",
    *,
    tied: bool = False,
    meta: dict[str, Any] | None = None,
    without: str | None = None,
    rope_freqs: np.ndarray | None = None,
) -> Path:
    """Write a file.

    Args:
        path: Of it.
        kind: Its architecture.
        pre: Its pre-tokenizer.
        tied: Leave the output layer out.
        meta: Further metadata, texts and whole numbers.
        without: A tensor that is left out.
        rope_freqs: The tensor `rope_freqs.weight`.
    """
    tokens, merges, kinds = vocabulary()
    first = tokens.index(CONTROL[0])
    writer = gguf.GGUFWriter(path, kind)
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    meta = {"tokenizer.ggml.model": "gpt2"} | (meta or {})
    for key, value in meta.items():
        writer.add_string(key, value) if isinstance(value, str) else writer.add_uint32(key, value)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(first)
    writer.add_eos_token_id(first + 2)
    writer.add_pad_token_id(first)
    writer.add_add_bos_token(pre == "llama-bpe")
    writer.add_chat_template(TEMPLATE)

    head = WIDTH // HEADS
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (len(tokens), WIDTH)}
    for layer in range(LAYERS):
        part = {
            "attn_norm.weight": (WIDTH,),
            "attn_q.weight": (WIDTH, WIDTH),
            "attn_k.weight": (KV_HEADS * head, WIDTH),
            "attn_v.weight": (KV_HEADS * head, WIDTH),
            "attn_output.weight": (WIDTH, WIDTH),
            "ffn_norm.weight": (WIDTH,),
            "ffn_gate.weight": (MLP, WIDTH),
            "ffn_up.weight": (MLP, WIDTH),
            "ffn_down.weight": (WIDTH, MLP),
        }
        if kind == "qwen2":
            part |= {f"attn_{x}.bias": part[f"attn_{x}.weight"][:1] for x in "qkv"}
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in part.items()}
    shapes["output_norm.weight"] = (WIDTH,)
    if not tied:
        shapes["output.weight"] = (len(tokens), WIDTH)
    random, types = np.random.default_rng(0), cycle(TYPES)
    for name, shape in shapes.items():
        if name == without:
            continue
        weight = random.normal(size=shape, scale=0.08 if len(shape) > 1 else 0.5)
        if len(shape) == 1:
            writer.add_tensor(name, weight.astype(np.float32))
            continue
        chosen = next(types)
        writer.add_tensor(name, _quantized(weight, chosen, random), raw_dtype=chosen)
    if rope_freqs is not None:
        writer.add_tensor("rope_freqs.weight", rope_freqs.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _quantized(weight: np.ndarray, kind: Type, random: np.random.Generator) -> np.ndarray:
    if kind not in _SCALES:
        return gguf.quants.quantize(weight.astype(np.float32), kind)
    of_block, size = gguf.GGML_QUANT_SIZES[kind]
    rows, columns = weight.shape
    blocks = random.integers(0, 256, (rows, columns // of_block, size), dtype=np.uint8)
    scales = np.full(_SCALES[kind].stop - _SCALES[kind].start, 5e-5, np.float16)
    blocks[..., _SCALES[kind]] = scales[: len(scales) // 2].view(np.uint8)
    return blocks.reshape(rows, -1)
