#!/usr/bin/env bash
# transformers 5.23.0, from_pretrained(..., gguf_file=...): the tensor rope_freqs.weight of a Llama GGUF,
# in which llama.cpp's converter keeps Llama 3.1's scaling of the rotary frequencies (each is divided by
# its factor), is not read.
#
# Expected: the frequencies are divided, as llama.cpp does, or the file is refused. (A guess beforehand,
# from the loader's table of names: not read, and nothing said.)
# Seen: as guessed. A file whose factors are 1 and one whose factors are 8 give the same logits to the
# bit, on 64 tokens; the model's config has the default rotary embedding. So a Llama 3.1 or 3.2 that is
# read from its GGUF computes with unscaled frequencies.
#
# Exits with 1 if this has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet "torch==2.13.0" "transformers==5.23.0" "gguf==0.19.0" \
	"accelerate==1.15.0"
cat >"$folder/try.py" <<'PYTHON'
import sys
from pathlib import Path

import gguf
import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

HEADS, HEAD_DIM, WIDTH, MLP, VOCABULARY, LENGTH = 2, 16, 32, 64, 12, 64
folder = Path(sys.argv[1])


def write(path, factor):
    random = np.random.default_rng(0)
    shapes = {
        "token_embd": (VOCABULARY, WIDTH),
        "output_norm": (WIDTH,),
        "blk.0.attn_norm": (WIDTH,),
        "blk.0.attn_q": (WIDTH, WIDTH),
        "blk.0.attn_k": (WIDTH, WIDTH),
        "blk.0.attn_v": (WIDTH, WIDTH),
        "blk.0.attn_output": (WIDTH, WIDTH),
        "blk.0.ffn_norm": (WIDTH,),
        "blk.0.ffn_gate": (MLP, WIDTH),
        "blk.0.ffn_up": (MLP, WIDTH),
        "blk.0.ffn_down": (WIDTH, MLP),
    }
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(LENGTH)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_rope_freq_base(500000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list([chr(97 + i) for i in range(VOCABULARY)])
    writer.add_token_types([1] * VOCABULARY)
    writer.add_token_merges([])
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", random.normal(size=shape).astype(np.float32))
    factors = np.full(HEAD_DIM // 2, factor, dtype=np.float32)
    writer.add_tensor("rope_freqs.weight", factors)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def logits(name, divisor=1.0):
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    tokens = torch.arange(LENGTH)[None] % VOCABULARY
    model.model.rotary_emb.inv_freq /= divisor
    with torch.no_grad():
        return model(tokens).logits


for name, factor in (("ones.gguf", 1.0), ("eights.gguf", 8.0)):
    write(folder / name, factor)
    kept = {tensor.name: tensor.data for tensor in gguf.GGUFReader(folder / name).tensors}
    print(name, "rope_freqs.weight:", kept["rope_freqs.weight"].tolist())
config = AutoConfig.from_pretrained(folder, gguf_file="eights.gguf")
print("rope of the config:", getattr(config, "rope_parameters", None))
ones, eights = logits("ones.gguf"), logits("eights.gguf")
difference = (ones - eights).abs().max().item()
wanted = (ones - logits("eights.gguf", divisor=8.0)).abs().max().item()
print("largest difference of the logits:", difference)
print("with the frequencies divided by hand:", wanted)
sys.exit(difference != 0.0 or wanted < 0.01)
PYTHON
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" "$folder/try.py" "$folder"
