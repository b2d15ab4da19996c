"""Toy models of each family, in torchtune and as a Hugging Face folder, with a random adapter."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from torch import Tensor, nn
from torchtune.models.gemma2 import lora_gemma2
from torchtune.models.llama3 import lora_llama3
from torchtune.models.llama3_2 import lora_llama3_2
from torchtune.models.mistral import lora_mistral
from torchtune.models.phi3 import lora_phi3
from torchtune.models.qwen2 import lora_qwen2
from torchtune.modules.peft import get_adapter_params
from torchtune.training import FullModelHFCheckpointer

from emarecipes.models import _torchtune_convert as convert
from emarecipes.models.adapters import export

RANK, ALPHA = 4, 6.0
# fp32 on logits of about 5; the adapters move them by 0.4 and more.
TOLERANCE = 2e-5
SIZES: dict[str, int] = {
    "vocab_size": 128,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "embed_dim": 64,
    "intermediate_dim": 96,
    "max_seq_len": 64,
}
HF_SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ATTENTION = ["q_proj", "k_proj", "v_proj", "output_proj"]


@dataclass
class Family:
    model_type: str
    builder: Callable[..., nn.Module]
    config: transformers.PretrainedConfig
    extra: dict[str, Any]


def family(name: str) -> Family:
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    base = {"rope_base": 10_000, "norm_eps": 1e-5}
    if name == "llama3_2":
        config = transformers.LlamaConfig(**HF_SIZES, **rope, tie_word_embeddings=True)
        return Family("LLAMA3_2", lora_llama3_2, config, {**base, "scale_factor": 1})
    if name == "llama3":
        config = transformers.LlamaConfig(**HF_SIZES, **rope, tie_word_embeddings=False)
        return Family("LLAMA3", lora_llama3, config, {**base, "apply_lora_to_output": True})
    if name == "qwen2_5":
        config = transformers.Qwen2Config(**HF_SIZES, **rope, tie_word_embeddings=True)
        return Family("QWEN2", lora_qwen2, config, {**base, "tie_word_embeddings": True})
    if name == "mistral":
        config = transformers.MistralConfig(**HF_SIZES, **rope, tie_word_embeddings=False)
        return Family("MISTRAL", lora_mistral, config, base)
    if name == "gemma2":
        # A head of another size than width / heads, a window shorter than the test's sequences,
        # and a query scale of its own.
        config = transformers.Gemma2Config(
            **HF_SIZES, **rope, head_dim=32, sliding_window=5, query_pre_attn_scalar=24
        )
        extra = {"head_dim": 32, "sliding_window_size": 5, "query_pre_attn_scalar": 24}
        return Family("GEMMA2", lora_gemma2, config, {**base, **extra})
    assert name == "phi3"
    config = transformers.Phi3Config(**HF_SIZES, **rope, tie_word_embeddings=False)
    return Family("PHI3_MINI", lora_phi3, config, {**base, "apply_lora_to_output": True})


def randomize(model: nn.Module, scale: float) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0, 0.5 if "norm" in name or "bias" in name else scale)


@dataclass
class Toy:
    """A model on disk, in transformers and, with an adapter, in torchtune."""

    family: Family
    base_dir: Path
    hf: nn.Module
    tune: nn.Module
    base_state: dict[str, Tensor]
    adapter: dict[str, Tensor]
    alpha: float = ALPHA

    def save(self, output_dir: Path, **changes: Any) -> None:
        options = {"rank": RANK, "alpha": self.alpha, **changes}
        state = options.pop("adapter_state", self.adapter)
        export.save_adapter(
            state, self.tune, self.family.model_type, self.base_dir, output_dir, **options
        )

    def save_merged(self, output_dir: Path, **options: Any) -> None:
        export.save_merged(
            options.pop("state", None) or self.merged(),
            self.tune,
            self.family.model_type,
            self.base_dir,
            output_dir,
            **options,
        )

    def merged(self) -> dict[str, Tensor]:
        return export.merge_adapter(self.base_state, self.adapter, rank=RANK, alpha=self.alpha)


def make_toy(
    folder: Path,
    name: str,
    *,
    dora: bool = False,
    modules: list[str] = ATTENTION,
    alpha: float = ALPHA,
    update: float = 0.1,
) -> Toy:
    torch.manual_seed(0)
    chosen = family(name)
    base_dir = folder / "base"
    hf = load_hf(chosen.config)
    randomize(hf, 0.12)
    hf.save_pretrained(base_dir)

    tune = chosen.builder(
        modules,
        apply_lora_to_mlp=True,
        **SIZES,
        **chosen.extra,
        lora_rank=RANK,
        lora_alpha=alpha,
        use_dora=dora,
    ).eval()
    convert.fix_dora_bias(tune)
    checkpointer = FullModelHFCheckpointer(
        str(base_dir), ["model.safetensors"], chosen.model_type, str(folder / "unused")
    )
    base_state = convert.fix_loaded_state(
        checkpointer.load_checkpoint()["model"], chosen.model_type
    )
    missing, unexpected = tune.load_state_dict(base_state, strict=False)
    adapter_params = get_adapter_params(tune)
    assert set(missing) == set(adapter_params) and not unexpected
    with torch.no_grad():
        for key, parameter in adapter_params.items():
            if key.endswith("magnitude"):
                parameter.uniform_(0.5, 2.0)
            else:
                parameter.normal_(0, update)
    adapter = {key: p.detach().clone() for key, p in adapter_params.items()}
    return Toy(chosen, base_dir, hf, tune, base_state, adapter, alpha)


def load_hf(source: transformers.PretrainedConfig | Path) -> nn.Module:
    # sdpa would leave Gemma 2's soft cap out.
    if isinstance(source, Path):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            source, attn_implementation="eager", dtype="auto"
        )
    else:
        model = transformers.AutoModelForCausalLM.from_config(source, attn_implementation="eager")
    return model.eval()


@torch.no_grad()
def tune_logits(toy: Toy) -> Tensor:
    hidden: list[Tensor] = []
    hook = toy.tune.norm.register_forward_hook(lambda _, inputs, __: hidden.append(inputs[0]))
    logits = toy.tune(tokens())
    hook.remove()
    if toy.family.model_type == "GEMMA2":
        # torchtune caps the normed hidden state instead of the logits.
        logits = 30 * torch.tanh(toy.tune.output(toy.tune.norm.rms_norm(hidden[0])) / 30)
    return logits


@torch.no_grad()
def hf_logits(model: nn.Module) -> Tensor:
    return model(tokens()).logits.float()


def tokens() -> Tensor:
    return torch.randint(3, 128, (2, 16), generator=torch.Generator().manual_seed(1))


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def load_peft(toy: Toy, folder: Path) -> nn.Module:
    with warnings.catch_warnings():
        # PEFT only warns of adapter weights that are missing or fit nowhere.
        warnings.filterwarnings("error", message=".*adapter keys.*")
        return PeftModel.from_pretrained(load_hf(toy.base_dir), folder).eval()
