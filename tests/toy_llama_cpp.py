"""A model folder as an f32 GGUF, and llama.cpp's own server with it (package `xllamacpp`)."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file

needs_llama_cpp = pytest.mark.skipif(
    importlib.util.find_spec("xllamacpp") is None,
    reason="llama.cpp's server is not installed: pip install xllamacpp",
)
SERVER = """
import sys, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, adapter = sys.argv[1], sys.argv[2]
params.n_ctx, params.n_parallel, params.warmup = 2048, 1, False
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
if adapter:
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(adapter, float(sys.argv[3]))]
server = xllamacpp.Server(params)
print("LISTENING", server.listening_address, flush=True)
sys.stdin.read()
"""


def write_base(folder: Path, output: Path, pre: str = "smollm") -> Path:
    """Write a folder of a family as llama.cpp's converter would, as far as toys need it.

    q's and k's rows of Llama go into Meta's order; Gemma's norms multiply by 1 + weight. Of a model
    with images, the text's part.
    """
    config = json.loads((folder / "config.json").read_text())
    config = config.get("text_config", config)
    kind = str(config["model_type"])
    kind = {"mistral": "llama", "gemma3_text": "gemma3"}.get(kind, kind)
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    rope = config.get("rope_parameters") or config
    rope = rope.get("full_attention", rope)
    writer = gguf.GGUFWriter(output, kind)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(int(head_dim * rope.get("partial_rotary_factor", 1)))
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if rope.get("rope_type") == "longrope":  # Short factors up to the original context, then long.
        original = config["original_max_position_embeddings"]
        writer.add_rope_scaling_orig_ctx_len(original)
        grown = config["max_position_embeddings"] / original
        writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(grown) / math.log(original)))
        for length in ("short", "long"):
            factors = np.array(rope[f"{length}_factor"], dtype=np.float32)
            writer.add_tensor(f"rope_factors_{length}.weight", factors)
    if kind in ("gemma2", "gemma3"):
        writer.add_sliding_window(config["sliding_window"])
    if kind == "gemma2":
        writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    writer.add_vocab_size(config["vocab_size"])
    _add_tokenizer(writer, folder, config["vocab_size"], pre)
    names = gguf.get_tensor_name_map(_architecture(kind), config["num_hidden_layers"])
    for name, weight in load_file(folder / "model.safetensors").items():
        if "vision" in name or "multi_modal" in name:
            continue
        name = name.replace("language_model.", "")
        rows = {"q_proj": heads, "k_proj": kv_heads}.get(name.split(".")[-2])
        if kind == "llama" and rows:
            weight = np.concatenate([_pairs(head) for head in np.split(weight, rows)])
        if kind.startswith("gemma") and name.endswith("norm.weight"):
            weight = 1 + weight
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), weight.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return output


def _pairs(head: np.ndarray) -> np.ndarray:
    """Row i of the first half to place 2 i, of the second to 2 i + 1."""
    half = len(head) // 2
    order = [row for i in range(half) for row in (i, half + i)]
    return head[order]


def _architecture(kind: str) -> gguf.MODEL_ARCH:
    return next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == kind)


def _add_tokenizer(writer: gguf.GGUFWriter, folder: Path, vocabulary: int, pre: str) -> None:
    if not (folder / "tokenizer.json").exists():
        writer.add_tokenizer_model("none")
        return
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    config = json.loads((folder / "tokenizer_config.json").read_text())
    ids: dict[str, int] = tokenizer["model"]["vocab"]
    special = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    by_id = {number: token for token, number in (ids | special).items()}
    tokens = [by_id.get(i, f"[PAD{i}]") for i in range(vocabulary)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    kinds = [3 if token in special else 1 if i in by_id else 5 for i, token in enumerate(tokens)]
    writer.add_token_types(kinds)
    merges = tokenizer["model"]["merges"]
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    writer.add_eos_token_id(tokens.index(config["eos_token"]))
    writer.add_bos_token_id(tokens.index(config.get("bos_token") or config["eos_token"]))
    writer.add_add_bos_token(False)
    writer.add_chat_template(config["chat_template"])


@contextmanager
def llama_server(model: Path, adapter: Path | None = None, scale: float = 1.0) -> Iterator[str]:
    """Run the server in a process of its own; gives its address, with /v1."""
    command = [sys.executable, "-c", SERVER, str(model), str(adapter or ""), str(scale)]
    log = model.with_suffix(".server.log")
    with log.open("w") as stderr:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert process.stdin is not None and process.stdout is not None
        try:
            # Its own messages go to stdout too.
            said = []
            for line in process.stdout:
                said.append(line)
                if line.startswith("LISTENING "):
                    yield line.split()[1] + "/v1"
                    return
            raise AssertionError("".join([*said, log.read_text()])[-3000:])
        finally:
            process.stdin.close()
            process.kill()
            process.wait()
