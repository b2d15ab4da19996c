"""A GGUF file of a toy Llama, as llama.cpp's converter would write it."""

from pathlib import Path

import gguf
import numpy as np

HEADS, KV_HEADS, HEAD_DIM, WIDTH, MLP = 4, 2, 8, 32, 64
TEMPLATE = "{% for m in messages %}{{ '<|im_start|>' + m.content + '<|im_end|>' }}{% endfor %}"


def meta_order(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Reorder row by row: a head's rows 0..half-1 go to its even places, the others to odd ones."""
    half = weight.shape[0] // num_heads // 2
    result = np.empty_like(weight)
    for head in range(num_heads):
        first = head * 2 * half
        for i in range(half):
            result[first + 2 * i] = weight[first + i]
            result[first + 2 * i + 1] = weight[first + half + i]
    return result


def hf_weights() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    shapes = {
        "self_attn.q_proj": (HEADS * HEAD_DIM, WIDTH),
        "self_attn.k_proj": (KV_HEADS * HEAD_DIM, WIDTH),
        "self_attn.v_proj": (KV_HEADS * HEAD_DIM, WIDTH),
        "self_attn.o_proj": (WIDTH, HEADS * HEAD_DIM),
        "mlp.gate_proj": (MLP, WIDTH),
        "mlp.up_proj": (MLP, WIDTH),
        "mlp.down_proj": (WIDTH, MLP),
        "input_layernorm": (WIDTH,),
        "post_attention_layernorm": (WIDTH,),
    }
    weights = {f"model.layers.0.{part}.weight": shape for part, shape in shapes.items()}
    weights |= {"model.embed_tokens.weight": (10, WIDTH), "model.norm.weight": (WIDTH,)}
    return {n: random.normal(size=s).astype(np.float32) for n, s in weights.items()}


def write_gguf(path: Path) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(10)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "a", "b", "ab", "Ġ", "1", "2", "12"]
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3, 1, 1, 1, 1, 1, 1, 1])
    writer.add_token_merges(["a b", "1 2"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    weights = hf_weights()
    names = {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
    }
    layer = {
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
    names |= {f"blk.0.{g}.weight": f"model.layers.0.{h}.weight" for g, h in layer.items()}
    for name, hf_name in names.items():
        weight = weights[hf_name]
        if "attn_q" in name or "attn_k" in name:
            weight = meta_order(weight, HEADS if "attn_q" in name else KV_HEADS)
        if name == "token_embd.weight":
            kind = gguf.GGMLQuantizationType.Q4_1
            writer.add_tensor(name, gguf.quants.quantize(weight, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
