"""A tiny random folder of each model family, written by transformers, and its decoder here.

python tests/family_toys.py       # prints the table of docs/models.md
"""

import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from torch import Tensor, nn
from torchtune.modules.peft import DoRALinear, get_adapter_params, set_trainable_params

from emarecipes.models import lora_model
from emarecipes.models._torchtune_convert import fix_dora_bias
from emarecipes.models.adapters.export import save_adapter
from emarecipes.models.families.blocks import Decoder
from emarecipes.models.families.checkpoint import FolderCheckpointer
from emarecipes.models.families.names import CONFIG_JSON
from emarecipes.models.loss_head import LossHead

RANK, ALPHA = 4, 6.0
ATTENTION = ["q_proj", "k_proj", "v_proj", "output_proj"]
VOCABULARY, ROW = 96, 40
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _rope(**scaling: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4} | scaling}


# Old context 32: rows of 40 have long, short and interpolated waves.
LLAMA3 = _rope(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
_TWO_ROPES = {
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
}
_LONGROPE = _rope(
    rope_type="longrope",
    short_factor=[1.0, 1.5, 2.5],
    long_factor=[4.0, 5.0, 6.0],
    partial_rotary_factor=0.75,
)
_VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1} | {
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def _sized(kind: type, **fields: Any) -> transformers.PretrainedConfig:
    return kind(**SIZES | fields)


def _gemma3_with_vision() -> transformers.PretrainedConfig:
    text = _sized(
        transformers.Gemma3TextConfig, head_dim=16, sliding_window=8, query_pre_attn_scalar=24,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"], **_TWO_ROPES,
    )  # fmt: skip
    return transformers.Gemma3Config(text_config=text.to_dict(), vision_config=_VISION)


def configs() -> dict[str, transformers.PretrainedConfig]:
    """By a name of the case. Windows of 8, on rows of 40."""
    t = transformers
    plain, linear = _rope(), _rope(rope_type="linear", factor=4.0)
    multipliers = {"embedding_multiplier": 12.0, "residual_multiplier": 0.22}
    multipliers |= {"logits_scaling": 0.5, "attention_multiplier": 0.2}
    gemma = {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 24}
    alternating = ["sliding_attention", "full_attention", "sliding_attention"]
    return {
        "llama 2": _sized(t.LlamaConfig, num_key_value_heads=4, **_rope()),
        "llama 3": _sized(t.LlamaConfig, **_rope(rope_theta=5e5)),
        "llama 3.2": _sized(t.LlamaConfig, tie_word_embeddings=True, **LLAMA3),
        "llama, biases": _sized(t.LlamaConfig, attention_bias=True, mlp_bias=True, **_rope()),
        "llama, linear": _sized(t.LlamaConfig, head_dim=10, **linear),
        "smollm2": _sized(
            t.LlamaConfig, hidden_size=36, num_attention_heads=6, tie_word_embeddings=True, **plain
        ),
        "smollm3": _sized(t.SmolLM3Config, no_rope_layers=[1, 0, 1], **_rope()),
        "mistral": _sized(t.MistralConfig, sliding_window=8, **_rope()),
        "mistral 0.3": _sized(t.MistralConfig, sliding_window=None, **_rope(rope_theta=1e6)),
        "qwen2": _sized(
            t.Qwen2Config, use_sliding_window=True, sliding_window=8, max_window_layers=1, **_rope()
        ),
        "qwen2.5": _sized(t.Qwen2Config, tie_word_embeddings=True, **_rope(rope_theta=1e6)),
        "qwen3": _sized(t.Qwen3Config, head_dim=12, **_rope(rope_theta=1e6)),
        "qwen3, tied": _sized(
            t.Qwen3Config, head_dim=16, tie_word_embeddings=True, attention_bias=True, **_rope()
        ),
        "gemma": _sized(t.GemmaConfig, head_dim=16, num_key_value_heads=1, **_rope()),
        "gemma 2": _sized(t.Gemma2Config, layer_types=alternating, **gemma, **_rope()),
        "gemma 3": _sized(t.Gemma3TextConfig, layer_types=alternating, **gemma, **_TWO_ROPES),
        "gemma 3, images": _gemma3_with_vision(),
        "phi-3": _sized(t.Phi3Config, sliding_window=8, **_rope()),
        "phi-4-mini": _sized(
            t.Phi3Config, tie_word_embeddings=True, original_max_position_embeddings=64, **_LONGROPE
        ),
        "olmo 2": _sized(t.Olmo2Config, **_rope(rope_theta=5e5)),
        "granite": _sized(t.GraniteConfig, **multipliers, **plain),
    }


NAMES = list(configs())
FUSED = ("phi-3", "phi-4-mini")


@dataclass
class Toy:
    """A model on disk, in transformers, and here with a random adapter."""

    folder: Path
    hf: nn.Module
    model: Decoder

    @torch.no_grad()
    def logits(self, tokens: Tensor, **inputs: Any) -> Tensor:
        found: Tensor = LossHead(self.model).model(tokens, **inputs)
        return found

    @torch.no_grad()
    def hf_logits(self, tokens: Tensor) -> Tensor:
        return hf_logits(self.hf, tokens)

    def save_adapter(self, folder: Path, **changes: Any) -> Path:
        state = {name: p.detach() for name, p in get_adapter_params(self.model).items()}
        save_adapter(
            state, self.model, CONFIG_JSON, self.folder, folder,
            **{"rank": RANK, "alpha": ALPHA} | changes,
        )  # fmt: skip
        return folder

    def peft(self, folder: Path) -> nn.Module:
        with warnings.catch_warnings():
            # PEFT only warns of adapter weights that are missing or fit nowhere.
            warnings.filterwarnings("error", message=".*adapter keys.*")
            return PeftModel.from_pretrained(load_hf(self.folder), folder).eval()


@torch.no_grad()
def hf_logits(model: nn.Module, tokens: Tensor) -> Tensor:
    found: Tensor = model(tokens).logits.float()
    return found


def load_hf(folder: Path) -> nn.Module:
    # sdpa would leave Gemma 2's soft cap out.
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype="auto"
    ).eval()


def write_folder(
    name: str, folder: Path, changes: dict[str, Any] | None = None, **save: Any
) -> nn.Module:
    """A random model, norms and biases off their neutral values; `changes` of its config."""
    torch.manual_seed(0)
    config = configs()[name]
    config.update(changes or {})
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "norm" in key:
                parameter.add_(0.3 * torch.randn(parameter.shape))
            else:
                parameter.normal_(0, 0.3 if "bias" in key else 0.2)
    model.save_pretrained(folder, **save)
    return model


def make_toy(
    name: str, folder: Path, *, adapted: bool = True, save: Any = None, **changes: Any
) -> Toy:
    hf = write_folder(name, folder, **save or {})
    return Toy(folder, hf, load(folder, adapted=adapted, **changes))


def load(folder: Path, *, adapted: bool = True, **changes: Any) -> Decoder:
    """Built and loaded as recipes do; with `adapted` the adapter has an effect."""
    lora = {"lora_rank": RANK, "lora_alpha": ALPHA, "apply_lora_to_mlp": True}
    model = lora_model(str(folder), **{"lora_attn_modules": ATTENTION} | lora | changes)
    state = FolderCheckpointer(str(folder)).load_checkpoint()["model"]
    missing, unexpected = model.load_state_dict(state, strict=False)
    adapter = get_adapter_params(model)
    assert set(missing) == set(adapter) and not unexpected
    fix_dora_bias(model)
    set_trainable_params(model, adapter)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, DoRALinear):
                module.initialize_dora_magnitude()
        for key, parameter in adapter.items() if adapted else ():
            if key.endswith("magnitude"):
                parameter.mul_(1 + 0.2 * torch.rand(parameter.shape))
            else:
                parameter.normal_(0, 0.2)
    return model.eval()


def tokens(rows: int = 2, length: int = ROW) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, VOCABULARY, (rows, length), generator=generator)


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


def gradient_distance(toy: Toy, peft: nn.Module) -> float:
    """Largest distance of any LoRA factor's gradient over the largest gradient, to PEFT's.

    Of the sum of logits times fixed random numbers. PEFT's rows are brought back by `read_adapter`
    as its adapters are: gradients are saved as an adapter.
    """
    weights = torch.randn(2, ROW, VOCABULARY, generator=torch.Generator().manual_seed(2))
    head = LossHead(toy.model)
    (head.model(tokens()) * weights).sum().backward()
    (peft(tokens()).logits.float() * weights).sum().backward()
    return _compared(toy, peft)


def _compared(toy: Toy, peft: nn.Module) -> float:
    from emarecipes.models.adapters.layout import adapter_modules

    theirs = dict(peft.named_parameters())
    worst = scale = 0.0
    for name, rows in adapter_modules(toy.model, CONFIG_JSON, toy.folder).items():
        module = toy.model.get_submodule(name)
        hf = f"base_model.model.{rows.hf_name.removesuffix('.weight')}"
        a = theirs[f"{hf}.lora_A.default.weight"].grad
        b = rows.take(theirs[f"{hf}.lora_B.default.weight"].grad)
        own_a, own_b = module.lora_a.weight.grad, module.lora_b.weight.grad
        if len(a) != len(own_a):  # Fused: this part's ranks are one block.
            blocks = zip(a.split(RANK), b.split(RANK, dim=1), strict=True)
            a, b = min(blocks, key=lambda block: distance(block[0], own_a))
        worst = max(worst, distance(a, own_a), distance(b, own_b))
        scale = max(scale, float(own_a.abs().max()), float(own_b.abs().max()))
    return worst / scale


def main() -> None:
    print("| case | logits | adapter's effect | by PEFT | gradient |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for name in NAMES:
        with tempfile.TemporaryDirectory() as folder:
            toy = make_toy(name, Path(folder) / "base", adapted=False)
            base = toy.hf_logits(tokens())
            plain = distance(toy.logits(tokens()), base)
            toy.model = load(toy.folder)
            adapted = toy.logits(tokens())
            peft = toy.peft(toy.save_adapter(Path(folder) / "adapter"))
            by_peft = distance(hf_logits(peft, tokens()), adapted)
            for key, parameter in peft.named_parameters():
                parameter.requires_grad_("lora_" in key)
            gradient = gradient_distance(toy, peft)
            print(
                f"| {name} | {plain:.1e} | {distance(adapted, base):.1f} | {by_peft:.1e} "
                f"| {gradient:.1e} |"
            )


if __name__ == "__main__":
    main()
