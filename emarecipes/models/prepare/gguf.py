"""A model in a GGUF file, written as the files of a Hugging Face folder.

GGUF keeps everything in one file: the weights, quantized and, for Llama, with q and k in Meta's
interleaved order, and the tokenizer and the chat template as metadata. Nothing here imports torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from emarecipes.errors import UserError, disk_errors, first_line
from emarecipes.files import open_to_others, write_json
from emarecipes.models.prepare.gguf_config import model_config, token_ids
from emarecipes.models.prepare.gguf_tokenizer import tokenizer_config, write_tokenizer

if TYPE_CHECKING:
    from gguf import GGUFReader, ReaderTensor

# Of fp32 weights in one file; what is converted at a time.
_FILE_BYTES = 2 * 2**30
_FOUR_BYTES = 4

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
    "output.weight": "lm_head.weight",
}
_LAYER_NAME = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")


def convert(gguf_file: Path, folder: Path) -> None:
    """Write the model of ``gguf_file`` into ``folder`` in Hugging Face's layout.

    The folder gets ``model.safetensors`` (several and an index above 2 GiB), ``config.json``,
    ``generation_config.json``, ``tokenizer.json`` and ``tokenizer_config.json``. A bar counts the
    tensors.

    Args:
        gguf_file: a model of architecture ``llama`` or ``qwen2`` with a byte-level BPE tokenizer.
        folder: an existing folder.

    Raises:
        UserError: the file is broken or cut off; its architecture, tokenizer, a metadata key that
            changes the computation, or a type of its weights is not known; weights are missing.
    """
    reader = _open(gguf_file)
    try:
        meta = {key: field.contents() for key, field in reader.fields.items()}
        names = {tensor.name: _hf_name(tensor.name) for tensor in reader.tensors}
        rope = next((t.data for t in reader.tensors if t.name == "rope_freqs.weight"), None)
        config = model_config(meta, {t.name: _shape(t) for t in reader.tensors}, rope)
        _check_names(config, {name for name in names.values() if name is not None})
        _check_types(reader)
        write_tokenizer(meta, folder / "tokenizer.json")
        write_json(folder / "tokenizer_config.json", tokenizer_config(meta), ensure_ascii=False)
        _write_weights(reader, names, config, folder)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        said = f"has no {error}" if isinstance(error, KeyError) else first_line(error)
        raise UserError(f"{gguf_file}: {said}") from error
    write_json(folder / "config.json", config, ensure_ascii=False)
    # `transformers serve` heeds a request's temperature only where the folder says that it samples.
    sampling = token_ids(meta) | {"do_sample": True}
    write_json(folder / "generation_config.json", sampling, ensure_ascii=False)
    for weights in folder.glob("*.safetensors"):
        open_to_others(weights)


def _open(file: Path) -> GGUFReader:
    from gguf import GGUFReader

    with file.open("rb") as start:
        magic = start.read(4)
    if magic != b"GGUF":
        raise UserError(f"{file}: not a GGUF file (it begins with {magic!r})")
    try:
        return GGUFReader(file)
    except Exception as error:  # It raises what its slices of the file do.
        raise UserError(f"{file}: a broken or cut-off GGUF file ({first_line(error)})") from error


def _shape(tensor: ReaderTensor) -> tuple[int, ...]:
    """Return the shape as other libraries have it: the rows first."""
    return tuple(int(size) for size in reversed(tensor.shape))


def _hf_name(name: str) -> str | None:
    """Return what Hugging Face's Llama and Qwen2 call a tensor; None for one without a weight."""
    if name in _OTHER_TENSORS:
        return _OTHER_TENSORS[name]
    if name == "rope_freqs.weight":
        return None
    match = _LAYER_NAME.fullmatch(name)
    if match is None or match[2] not in _LAYER_TENSORS:
        raise ValueError(f"the weight {name} is not known of this architecture")
    return f"model.layers.{match[1]}.{_LAYER_TENSORS[match[2]]}.{match[3]}"


def _check_names(config: dict[str, Any], found: set[str]) -> None:
    """See whether the file has the weights that its metadata speak of, and no others."""
    parts = [f"{part}.weight" for part in _LAYER_TENSORS.values()]
    if config["model_type"] == "qwen2":
        parts += [f"self_attn.{part}_proj.bias" for part in "qkv"]
    if config.get("attention_bias"):
        parts += [f"self_attn.{part}_proj.bias" for part in "qkvo"]
    if config.get("mlp_bias"):
        parts += [f"mlp.{part}_proj.bias" for part in ("gate", "up", "down")]
    layers = range(config["num_hidden_layers"])
    needed = {f"model.layers.{layer}.{part}" for layer in layers for part in parts}
    needed |= {"model.embed_tokens.weight", "model.norm.weight"}
    needed |= set() if config["tie_word_embeddings"] else {"lm_head.weight"}
    for name in sorted(needed - found):
        raise ValueError(f"lacks the weight {name} (one of {len(needed - found)})")
    for name in sorted(found - needed):
        raise ValueError(f"has the weight {name}, which its metadata do not speak of")


def _check_types(reader: GGUFReader) -> None:
    from gguf.quants import dequantize

    for tensor in {tensor.tensor_type: tensor for tensor in reader.tensors}.values():
        try:
            dequantize(tensor.data[:1], tensor.tensor_type)
        except NotImplementedError:
            raise ValueError(
                f"{tensor.name} is of type {tensor.tensor_type.name}, which the gguf package "
                "cannot dequantize; take a file of another quantization"
            ) from None


def _write_weights(
    reader: GGUFReader, names: dict[str, str | None], config: dict[str, Any], folder: Path
) -> None:
    """Store every tensor in fp32, some two GiB at a time.

    A Q4_1 weight is scale * q + minimum with two fp16 constants and q in 0..15, a Q8_0 weight
    scale * q with q in -127..127: neither fits into the 8 significant bits of bf16. In fp32 the
    folder holds the very numbers the GGUF file stands for, and what a test measures against
    another program is that program's difference and not our rounding.
    """
    from safetensors.numpy import save_file

    files = list(_files([tensor for tensor in reader.tensors if names[tensor.name] is not None]))
    bar = tqdm(
        total=len(reader.tensors), desc="dequantizing", unit="tensor", disable=None, leave=False
    )
    placed: dict[str, str] = {}
    with bar:
        for number, tensors in enumerate(files, start=1):
            weights = {}
            for tensor in tensors:
                weights[str(names[tensor.name])] = _weight(tensor, config)
                bar.update()
            of = f"-{number:05d}-of-{len(files):05d}" if len(files) > 1 else ""
            path = folder / f"model{of}.safetensors"
            # transformers reads a safetensors file only if it says which framework's layout it has.
            with disk_errors(path):
                save_file(weights, path, metadata={"format": "pt"})
            placed |= dict.fromkeys(weights, path.name)
    if len(files) > 1:
        size = sum(int(tensor.n_elements) for part in files for tensor in part) * _FOUR_BYTES
        index = {"metadata": {"total_size": size}, "weight_map": placed}
        write_json(folder / "model.safetensors.index.json", index)


def _files(tensors: list[ReaderTensor]) -> Iterator[list[ReaderTensor]]:
    part: list[ReaderTensor] = []
    size = 0
    for tensor in tensors:
        bytes_of_it = int(tensor.n_elements) * _FOUR_BYTES
        if part and size + bytes_of_it > _FILE_BYTES:
            yield part
            part, size = [], 0
        part.append(tensor)
        size += bytes_of_it
    yield part


def _weight(tensor: ReaderTensor, config: dict[str, Any]) -> NDArray[Any]:
    from gguf.quants import dequantize

    weight = np.asarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
    part = tensor.name.split(".")[-2]  # blk.7.attn_q.weight
    if config["model_type"] == "llama" and part in ("attn_q", "attn_k"):
        key = "num_attention_heads" if part == "attn_q" else "num_key_value_heads"
        return _unpermute(weight, config[key])
    return weight


def _unpermute(weight: NDArray[Any], num_heads: int) -> NDArray[Any]:
    """Order each head's rows for a rotation of halves, from an order for a rotation of pairs.

    Meta's RoPE rotates rows (2i, 2i+1) of a head together, Hugging Face's rows (i, i + half).

    Args:
        weight: [num_heads * head_dim, width], or a bias [num_heads * head_dim].
        num_heads: query heads for q, key-value heads for k.
    """
    pairs = weight.reshape(num_heads, weight.shape[0] // num_heads // 2, 2, -1)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(weight.shape)
