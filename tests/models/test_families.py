"""Each family against transformers and PEFT: logits, gradients, adapters, generation, refusals."""

import json
from dataclasses import replace
from pathlib import Path

import family_toys
import pytest
import torch
import transformers
from family_toys import FUSED, NAMES, RANK, ROW, VOCABULARY, distance, make_toy, tokens
from torchtune.modules import TransformerSelfAttentionLayer
from torchtune.modules.attention_utils import create_block_causal_mask
from torchtune.training import set_activation_checkpointing

from emarecipes.defenses import ModelSource
from emarecipes.models._torchtune_cpu import with_fewer_passes
from emarecipes.models.adapters.export import merge_adapter, save_merged
from emarecipes.models.adapters.layout import adapter_modules
from emarecipes.models.adapters.read import load_adapter
from emarecipes.models.families.blocks import attend, score_mod
from emarecipes.models.families.build import Adapter, build_decoder
from emarecipes.models.families.known import FAMILIES, shape_of
from emarecipes.models.families.names import CONFIG_JSON
from emarecipes.models.loss_head import LossHead
from emarecipes.models.sampling.draw import Sampling
from emarecipes.models.sampling.sampler import sample_answers
from emarecipes.weights_folder import WeightsFolder

# fp32; logits are of 1 to 10, and the adapters move them by 0.2 to 6.
TOLERANCE = 2e-5


WINDOWED = ("mistral", "qwen2", "gemma 2", "gemma 3", "gemma 3, images", "phi-3")


NO_ADAPTER = Adapter((), False, False, RANK, 8.0, 0.0, False, False)


every = pytest.mark.parametrize("name", NAMES)


def source(toy: family_toys.Toy) -> ModelSource:
    return ModelSource(toy.model, toy.folder, CONFIG_JSON)


@every
def test_logits_gradients_and_the_adapter_in_peft(tmp_path: Path, name: str) -> None:
    toy = make_toy(name, tmp_path / "base", adapted=False)
    base = toy.hf_logits(tokens())
    assert distance(toy.logits(tokens()), base) < TOLERANCE
    toy.model = family_toys.load(toy.folder)
    adapted = toy.logits(tokens())
    assert distance(adapted, base) > 0.1
    peft = toy.peft(toy.save_adapter(tmp_path / "adapter"))
    assert distance(family_toys.hf_logits(peft, tokens()), adapted) < TOLERANCE
    for key, parameter in peft.named_parameters():
        parameter.requires_grad_("lora_" in key)
    assert family_toys.gradient_distance(toy, peft) < 1e-5
    again = family_toys.load(toy.folder, adapted=False)
    load_adapter(again, tmp_path / "adapter", source(toy))
    toy.model = again
    assert distance(toy.logits(tokens()), adapted) < TOLERANCE


@pytest.mark.parametrize("name", [name for name in NAMES if name not in FUSED])
def test_dora_in_peft(tmp_path: Path, name: str) -> None:
    toy = make_toy(name, tmp_path / "base", use_dora=True)
    peft = toy.peft(toy.save_adapter(tmp_path / "adapter"))
    adapted = toy.logits(tokens())
    assert distance(adapted, toy.hf_logits(tokens())) > 0.1
    assert distance(family_toys.hf_logits(peft, tokens()), adapted) < TOLERANCE


@every
def test_merged_folder_in_transformers(tmp_path: Path, name: str) -> None:
    """In shards; a model of text and images keeps what is of images."""
    toy = make_toy(name, tmp_path / "base", save={"max_shard_size": "20KB"})
    assert (toy.folder / "model.safetensors.index.json").is_file()
    state = toy.model.state_dict()
    base = {k: t for k, t in state.items() if "lora" not in k}
    adapter = {k: t for k, t in state.items() if "lora" in k}
    merged = merge_adapter(base, adapter, rank=RANK, alpha=family_toys.ALPHA)
    save_merged(merged, toy.model, CONFIG_JSON, toy.folder, tmp_path / "merged")
    hf = family_toys.load_hf(tmp_path / "merged")
    # In float64: what is left is the merged weights' rounding, and not that of two ways to compute.
    hf.double()
    toy.model.double()
    assert distance(family_toys.hf_logits(hf, tokens()), toy.logits(tokens())) < TOLERANCE
    assert {k: t.shape for k, t in hf.state_dict().items()} == {
        k: t.shape for k, t in toy.hf.state_dict().items()
    }
    images = [k for k in hf.state_dict() if "vision" in k or "projector" in k]
    assert all(torch.equal(hf.state_dict()[k], toy.hf.state_dict()[k]) for k in images)
    assert bool(images) == (name == "gemma 3, images")


@pytest.mark.parametrize("name", WINDOWED)
def test_a_window_matters_beyond_its_length(tmp_path: Path, name: str) -> None:
    toy = make_toy(name, tmp_path, adapted=False)
    wide = replace(
        toy.model.shape, layers=tuple(replace(x, window=None) for x in toy.model.shape.layers)
    )
    unwindowed = build_decoder(wide, NO_ADAPTER).eval()
    unwindowed.load_state_dict(toy.model.state_dict(), strict=False)
    expected = toy.logits(tokens())
    toy.model = unwindowed
    found = toy.logits(tokens())
    assert distance(found[:, :8], expected[:, :8]) < TOLERANCE
    assert distance(found[:, 8:], expected[:, 8:]) > 1e-2


@pytest.mark.parametrize("name", ["llama 3.2", "qwen3", "olmo 2", "smollm3", *WINDOWED])
def test_packed_conversations_stay_apart(tmp_path: Path, name: str) -> None:
    """As two rows of a batch, in a pack with its document mask and positions."""
    toy = make_toy(name, tmp_path)
    lengths = (15, 25)
    row = tokens(1, ROW)
    mask = create_block_causal_mask([torch.tensor(lengths)])
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    packed = toy.logits(row, mask=mask, input_pos=positions)
    apart = torch.cat([toy.logits(part) for part in row.split(lengths, dim=1)], dim=1)
    assert distance(packed, apart) < TOLERANCE


@pytest.mark.parametrize("name", ["llama 3.2", "qwen3", "olmo 2", "smollm3", "granite", *WINDOWED])
def test_generation_with_a_cache_is_the_whole_forwards(tmp_path: Path, name: str) -> None:
    """Greedy answers beyond the window, of prompts of different lengths, by the slow way."""
    toy = make_toy(name, tmp_path)
    head = LossHead(toy.model)
    prompts = [[5, 9, 3, 20, 7, 30, 31], [6, 4, 40]]
    sampling = Sampling(14, (0,), temperature=0.0)
    found = sample_answers(head, prompts, [0, 1], sampling, batch_size=2)
    for prompt, answer in zip(prompts, found, strict=True):
        row = list(prompt)
        for token in answer.tokens:
            with torch.no_grad():
                assert int(head.model(torch.tensor([row]))[0, -1].argmax()) == token
            row.append(token)


@pytest.mark.parametrize("name", ["gemma 3", "qwen3", "granite"])
def test_hidden_states_are_the_residual_streams(tmp_path: Path, name: str) -> None:
    """Index i is the input of layer i, as in transformers' hidden_states."""
    toy = make_toy(name, tmp_path, adapted=False)
    LossHead(toy.model)
    toy.model.output_hidden_states = [0, 1, 2]
    with torch.no_grad():
        *hidden, _ = toy.model(tokens())
        expected = toy.hf(tokens(), output_hidden_states=True).hidden_states
    assert all(distance(hidden[i], expected[i]) < TOLERANCE for i in range(3))


@pytest.mark.parametrize("name", ["qwen3", "gemma 2", "gemma 3", "phi-4-mini", "granite"])
def test_checkpointing_and_fewer_passes_change_nothing(tmp_path: Path, name: str) -> None:
    toy = make_toy(name, tmp_path)

    def gradients() -> list[torch.Tensor]:
        toy.model.zero_grad(set_to_none=True)
        toy.model(tokens()).square().mean().backward()
        return [p.grad.clone() for p in toy.model.parameters() if p.grad is not None]

    plain = gradients()
    assert plain and all(bool(g.any()) for g in plain)
    with_fewer_passes(toy.model)
    scale = max(float(g.abs().max()) for g in plain)
    for one, other in zip(plain, gradients(), strict=True):
        assert distance(one, other) < 1e-5 * scale
    set_activation_checkpointing(toy.model, {TransformerSelfAttentionLayer})
    for one, other in zip(plain, gradients(), strict=True):
        assert distance(one, other) < 1e-5 * scale


def test_flex_attention_s_scores_are_the_windows_and_caps() -> None:
    """`score_mod` by hand against `attend`; on a GPU packed rows go that way."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 12, 8, generator=generator) for _ in range(3))
    mask = create_block_causal_mask([torch.tensor([5, 7])])
    for cap, window in ((None, 3), (2.0, None), (2.0, 3)):
        change = score_mod(cap, window)
        assert change is not None
        at = torch.arange(12)
        score = q @ k.transpose(2, 3) * 0.3
        none = torch.tensor(0)
        score = change(score, none, none, at[:, None], at[None])
        score = score.masked_fill(~mask[:, None], float("-inf"))
        expected = torch.softmax(score, -1) @ v
        assert distance(attend(q, k, v, mask, 0.3, cap, window), expected) < 1e-6
    assert score_mod(None, None) is None


@pytest.mark.parametrize("kind", list(FAMILIES))
def test_what_a_config_leaves_out_is_as_in_transformers(kind: str) -> None:
    """Sizes that a class has no general value for are given; all else from the class alone."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 96}
    sizes |= {"num_hidden_layers": 30, "num_attention_heads": 32}
    config = transformers.AutoConfig.for_model(kind, **sizes)
    written = json.loads(config.to_json_string(use_diff=False))
    assert shape_of({"model_type": kind} | sizes, "") == shape_of(written, "")


def test_quantized_base(tmp_path: Path) -> None:
    """As torchtune's QLoRA: adapted weights, and the others without a bias, in 4 bits."""
    shape = replace(
        shape_of(json.loads(family_toys.configs()["qwen2"].to_json_string(use_diff=False)), ""),
        width=256, heads=4, kv_heads=2, head_dim=64, mlp_width=512, vocabulary=VOCABULARY,
    )  # fmt: skip
    adapter = replace(NO_ADAPTER, attention=("q_proj", "k_proj"), quantize_base=True)
    torch.manual_seed(0)
    model = build_decoder(shape, adapter).eval()
    state = model.state_dict()  # Dequantized by torchtune's hook.
    exact = build_decoder(shape, replace(adapter, quantize_base=False)).eval()
    exact.load_state_dict(state)
    four_bit = [n for n, p in model.named_parameters() if "NF4" in type(p.data).__name__]
    assert len(four_bit) == 3 * 6  # q, k; output_proj; gate, up, down. v has a bias and no LoRA.
    row = tokens(1, 12)
    assert distance(model(row), exact(row)) < 1e-4


@every
def test_where_adapted_weights_lie(tmp_path: Path, name: str) -> None:
    """SafeLoRA and AsFT read other folders' weights by these names and rows."""
    toy = make_toy(name, tmp_path)
    weights = WeightsFolder(tmp_path)
    found = adapter_modules(toy.model, CONFIG_JSON, tmp_path)
    assert len(found) == 7 * len(toy.model.layers)
    for module, rows in found.items():
        own = toy.model.get_submodule(module).weight
        assert weights.shape(rows.hf_name) == rows.hf_shape
        assert torch.equal(rows.take(weights.read(rows.hf_name)), own)


@pytest.mark.early
@pytest.mark.parametrize("name", ["gemma 2", "gemma 3", "phi-4-mini"])
def test_layers_compile_as_one_graph(tmp_path: Path, name: str) -> None:
    toy = make_toy(name, tmp_path)
    expected = toy.logits(tokens())
    for layer in toy.model.layers:
        layer.compile(backend="eager", fullgraph=True)
    assert distance(toy.logits(tokens()), expected) < TOLERANCE
