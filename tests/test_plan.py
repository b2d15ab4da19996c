"""The prediction's parts against counts by hand, and what the command says."""

import sys
from functools import cache
from pathlib import Path

import pytest
import torch
import toy_run
from torch.nn import functional as F

from emarecipes.config import load_config
from emarecipes.defenses import KLToReference
from emarecipes.models.loss_head import cross_entropy, term_values
from emarecipes.plan import run_plan
from emarecipes.plan.command import changes
from emarecipes.plan.estimate import Load, MemoryEstimate, estimate
from emarecipes.plan.trace import trace
from emarecipes.training.logit_terms import values_of
from emarecipes.training.settings import check_settings

CONFIGS = toy_run.REPO / "configs"


@cache
def predict(name: str, load: Load, *overrides: str) -> MemoryEstimate:
    raw, origin = load_config(["--config", str(CONFIGS / f"{name}.yaml"), "dtype=bf16", *overrides])
    return estimate(check_settings(raw, origin), origin, load)


def test_a_trace_counts_what_autograd_keeps() -> None:
    """y = silu(x W): keeps x W and y; the backward adds three tensors of this size at most."""
    x = torch.empty(8, 16, device="meta", requires_grad=True)
    weight = torch.empty(16, 32, device="meta")
    found = trace(lambda: F.silu(x @ weight))
    each = 8 * 32 * 4
    assert found.kept == found.forward_peak == 2 * each
    assert 3 * each <= found.backward_peak <= 4 * each + x.nbytes
    assert (found.forward_flops, found.backward_flops) == (2 * 8 * 16 * 32, 2 * 8 * 16 * 32)


def test_attention_keeps_no_scores() -> None:
    q = torch.empty(1, 2, 512, 8, device="meta", requires_grad=True)
    found = trace(lambda: F.scaled_dot_product_attention(q, q, q, is_causal=True))
    assert found.forward_peak < 512 * 512 * 4
    assert found.forward_flops == 2 * 2 * (2 * 512 * 512 * 8)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="a caller keeps its arguments there")
def test_a_chunk_with_kl_holds_four_copies_of_its_logits() -> None:
    """Both models' log-probabilities, and two of: p, their difference, the gradients."""
    hidden = torch.empty(64, 16, device="meta", requires_grad=True)
    weight = torch.empty(16, 50_000, device="meta")
    targets = torch.zeros(64, dtype=torch.long, device="meta")
    kl = values_of(KLToReference())

    def loss() -> torch.Tensor:
        terms = [(cross_entropy, False, False, None), (kl, True, False, None)]
        values = term_values(hidden @ weight, hidden.detach() @ weight, targets, terms)
        return torch.stack([value.sum() for value in values]).sum()

    found = trace(loss)
    assert max(found.forward_peak, found.backward_peak) < 4.1 * 64 * 50_000 * 4


def test_weights_adapter_and_optimizer_by_hand() -> None:
    """SmolLM2-135M: 134,515,008 weights; LoRA of rank 32 on all linear layers."""
    found = predict("smollm2_135m_kl", Load(1, 256), "adapter_dtype=null").parts
    table = 8192 * 32 * 2 * 4  # Rotary, float32.
    assert found["weights"] == pytest.approx(2 * 134_515_008, abs=table + 1)
    wide, narrow, mlp = 576, 192, 1536
    sizes = [(wide, wide)] * 2 + [(wide, narrow)] * 2 + [(wide, mlp)] * 3
    numbers = 30 * sum(32 * (one + other) for one, other in sizes)
    assert found["adapter"] == found["gradients"] == 2 * numbers
    # AdamW: two moments in bf16; its count of steps is four bytes a matrix.
    assert found["optimizer"] == pytest.approx(4 * numbers, rel=1e-3)
    sgd = predict("smollm2_135m_kl", Load(1, 256), "optimizer=torch.optim.SGD")
    assert sgd.parts["optimizer"] == 0
    # In fp32, as shipped; the base stays bf16.
    held = predict("smollm2_135m_kl", Load(1, 256)).parts
    assert held["weights"] == found["weights"]
    assert held["adapter"] == held["gradients"] == 4 * numbers
    assert held["optimizer"] == pytest.approx(8 * numbers, rel=1e-3)
    assert predict("smollm2_135m_average", Load(2, 256)).parts["adapter averages"] == 2 * numbers
    # Frozen layers' adapters are there, and have no gradient and no state.
    frozen = predict("smollm2_135m_kl", Load(1, 256), "freeze_after=10").parts
    assert frozen["adapter"] == held["adapter"]
    assert frozen["gradients"] == pytest.approx(held["gradients"] / 3)
    assert frozen["optimizer"] == pytest.approx(held["optimizer"] / 3)
    # A layer's products keep their rounded matrices until the backward, and nothing else.
    more = held["activations"] - found["activations"]
    assert more == pytest.approx(2 * numbers, rel=0.01)


def test_operations_by_hand() -> None:
    """Linear layers and attention, forward and backward; the frozen weights have no gradient."""
    rows, tokens = 4, 256
    found = predict("smollm2_135m_lora", Load(1, tokens)).flops
    weights = 30 * (2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536) + 49152 * 576
    lora = 30 * 32 * (2 * 1152 + 2 * 768 + 3 * 2112)
    attention = 30 * 2 * tokens * 576  # Products of each token with all others: scores and values.
    # The backward: 1x for inputs of frozen weights, 2x for LoRA, 2.5x for attention.
    expected = 2 * rows * tokens * (2 * weights + 3 * lora + 3.5 * attention)
    assert found == pytest.approx(expected, rel=0.02)
    with_kl = predict("smollm2_135m_kl", Load(1, tokens)).flops
    cached = predict("smollm2_135m_kl", Load(1, tokens), "reference_cache=cache").flops
    assert found < cached < with_kl
    assert (with_kl - found) / found == pytest.approx(0.5, abs=0.06)
    sparse = predict("smollm2_135m_kl", Load(1, tokens), "defenses.kl.every_n_batches=4").flops
    assert sparse - found == pytest.approx((with_kl - found) / 4, rel=1e-6)
    # A term that reads hidden states, in one step of two: either is in 1 - 3/4 * 1/2 of the steps.
    both = ("defenses.kl.every_n_batches=4", "defenses.f._component_=emarecipes.defenses.FeatureL2",
            "defenses.f.every_n_batches=2")  # fmt: skip
    either = predict("smollm2_135m_kl", Load(1, tokens), *both).flops
    layers, head = with_kl - cached, cached - found
    assert either - found == pytest.approx(layers * 5 / 8 + head / 4, rel=1e-6)
    # A reference of which layer 10 of 30 is the last that is read ends there.
    early = [f"defenses.f.{key}" for key in ("preset=null", "layers=[10]", "every_n_layers=null")]
    term = predict("smollm2_135m_lora", Load(1, tokens), both[1], *early).flops
    assert term - found == pytest.approx(layers / 3, rel=1e-6)


def test_devices_share_weights_and_checkpointing_saves_activations() -> None:
    one, four = (predict("llama3_8b_kl", Load(n, 2048)) for n in (1, 4))
    assert four.parts["adapter"] == one.parts["adapter"] / 4
    # Embedding, output and norm, and two layers, are whole: 128256 x 4096 twice, 218 M a layer.
    in_flight = 2 * (2 * 128256 * 4096 + 2 * 218_112_000)
    assert four.parts["weights in flight"] == pytest.approx(in_flight, rel=0.02)
    plain = predict("llama3_8b_kl", Load(1, 2048), "enable_activation_checkpointing=false")
    assert plain.parts["activations"] > 8 * one.parts["activations"]
    assert plain.flops < one.flops
    assert four.tokens == 4 * one.tokens


def test_the_root_is_whole_in_the_backward_only_if_it_is_trained_or_kept() -> None:
    # Of 32B the peak is where the backward starts: two layers of 490 M numbers, a root of 1.6 G.
    large = "model._component_=torchtune.models.qwen2_5.lora_qwen2_5_32b_instruct"
    four = Load(4, 2048)
    frozen = predict("qwen2_5_7b_kl", four, large).parts["weights in flight"]
    trained = predict("qwen2_5_7b_kl", four, large, "model.apply_lora_to_output=true")
    assert frozen == pytest.approx(2 * 2 * 490e6, rel=0.02)
    assert trained.parts["weights in flight"] - frozen == pytest.approx(
        2 * 2 * 152064 * 5120, rel=0.02
    )
    kept = predict("qwen2_5_7b_kl", four, large, "fsdp_reshard_after_forward=false")
    assert kept.parts["weights in flight"] == pytest.approx(2 * 32.8e9, rel=0.02)


def test_a_term_on_all_tokens_takes_the_head_there() -> None:
    """4 x 256 tokens, a fifth of them labelled."""
    load, everywhere = Load(1, 256, 0.2), "defenses.kl.tokens=all"
    few = ("model.num_layers=2", "reference_cache=cache")
    response, found = (
        predict("smollm2_135m_kl", load, f"defenses.kl.tokens={tokens}", *few)
        for tokens in ("response", "all")
    )
    # Both models' logits and the gradient of one's states at 4/5 of the tokens more.
    more = 1024 - round(1024 * 0.2)
    assert found.flops - response.flops == pytest.approx(3 * 2 * more * 576 * 49152, rel=1e-6)
    assert found.parts["reference"] - response.parts["reference"] == more * 576 * 2
    assert found.peak > response.peak
    # Hidden states: a difference in float32 in each of two layers; the backward is the peak.
    features = ("defenses.f._component_=emarecipes.defenses.FeatureL2", "defenses.f.layers=[10,30]",
                "enable_activation_checkpointing=true")  # fmt: skip
    response, found = (
        predict("smollm2_135m_lora", Load(1, 2048, 0.2), *features, f"defenses.f.tokens={tokens}")
        for tokens in ("response", "all")
    )
    assert found.peak - response.peak == 2 * (8192 - round(8192 * 0.2)) * 576 * 4
    # With all labelled there is no difference.
    whole = Load(1, 256)
    assert predict("smollm2_135m_kl", whole) == predict("smollm2_135m_kl", whole, everywhere)


def test_safelora_repeated_keeps_bases_of_all_adapted_matrices() -> None:
    """Left and right vectors in float32; two weights and their difference beside them."""
    entry = "defenses.safelora"
    once = (f"{entry}._component_=emarecipes.defenses.SafeLoRA", f"{entry}.base_dir=a",
            f"{entry}.aligned_dir=b", "adapter_dtype=null", f"{entry}.rank=8")  # fmt: skip
    wide, narrow, mlp = 576, 192, 1536
    sizes = [(wide, wide)] * 2 + [(wide, narrow)] * 2 + [(wide, mlp)] * 3
    both_sides = 30 * sum(one + other for one, other in sizes)
    load = Load(1, 1)  # So few tokens that the projection is the peak.
    found = predict("smollm2_135m_lora", load, *once).parts
    assert (found["SafeLoRA bases"], found["SafeLoRA"]) == (0, 3 * 4 * wide * mlp)
    repeated = (*once, f"{entry}.every_n_steps=5")
    found = predict("smollm2_135m_lora", load, *repeated).parts
    assert (found["SafeLoRA bases"], found["SafeLoRA"]) == (4 * 8 * both_sides, 3 * 4 * wide * mlp)
    # They stay where the step itself is the peak.
    found = predict("smollm2_135m_lora", Load(1, 2048), *repeated).parts
    assert found["SafeLoRA bases"] == 4 * 8 * both_sides
    assert "SafeLoRA" not in found
    share = (*repeated[:-2], f"{entry}.energy=0.9", repeated[-1])
    found = predict("smollm2_135m_lora", load, *share).parts
    assert found["SafeLoRA bases"] == 4 * 30 * sum(min(size) * sum(size) for size in sizes)


def test_safelora_on_the_output_layer() -> None:
    """Llama-3-8B: the output layer is the largest of the adapted matrices."""
    entry = "defenses.safelora"
    found = predict(
        "llama3_8b_kl", Load(1, 8), f"{entry}._component_=emarecipes.defenses.SafeLoRA",
        f"{entry}.base_dir=a", f"{entry}.aligned_dir=b", "model.apply_lora_to_output=true",
    ).parts  # fmt: skip
    assert found["SafeLoRA"] == 3 * 4 * 4096 * 128256


@pytest.mark.parametrize(("size", "smaller"), [(4, [2, 1]), (3, [1]), (6, [3, 1]), (1, [])])
def test_smaller_batches_of_the_same_step_come_before_more_devices(
    size: int, smaller: list[int]
) -> None:
    overrides = [f"batch_size={size}", "gradient_accumulation_steps=2", "model.num_layers=2"]
    config = str(CONFIGS / "smollm2_135m_kl.yaml")
    raw, origin = load_config(["--config", config, "dtype=bf16", *overrides])
    found = [text for text, _ in changes(check_settings(raw, origin), origin, Load(1, 64))]
    sizes = [f"batch_size={n} gradient_accumulation_steps={2 * size // n}" for n in smaller]
    assert found == [
        "enable_activation_checkpointing=true", *sizes, "--gpus 2", "--gpus 4", "--gpus 8"
    ]  # fmt: skip


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(CONFIGS / "llama3_8b_kl.yaml")
    assert run_plan([config, "--row-tokens", "2048", "--gpu-memory", "80"]) == 0
    assert "Fits 80 GB" in capsys.readouterr().out
    arguments = [config, "--row-tokens", "2048", "--gpu-memory", "20"]
    assert run_plan([*arguments, "enable_activation_checkpointing=false"]) == 1
    out = capsys.readouterr().out
    assert out.index("enable_activation_checkpointing=true: ") < out.index("batch_size=2 ")
    assert "and it fits" in out
    assert run_plan([config, "--gpu-memory", "1", "batch_size=1"]) == 1
    assert "it still does not fit" in capsys.readouterr().out
    assert run_plan([config, "batchsize=2"]) == 1
    assert "error: command line: batchsize: unknown key" in capsys.readouterr().err
    assert run_plan([config, "tokenizer.max_seq_len=null"]) == 1
    assert "say --row-tokens N" in capsys.readouterr().err
    assert run_plan([config, "--row-tokens", "999999"]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert "rows of 999999 tokens, and the model takes " in line


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["model.lora_rank=0"], "command line: model.lora_rank: must be > 0, not 0"),
        (["model.lora_alpha=0"], "command line: model.lora_alpha: must be > 0, not 0"),
        (["freeze_after=100"], "freeze_after: must be from 1 to 29, as the model has 30 layers"),
        (["optimizer._component_=torch.optim.LBFGS", "~optimizer.weight_decay"], "needs a closure"),
        (["optimizer._component_=torch.optim.SparseAdam", "~optimizer.weight_decay"],
         "SparseAdam takes sparse gradients alone"),
        (["optimizer._component_=torch.optim.Muon", "model.use_dora=true"],
         "Muon is for matrices" if hasattr(torch.optim, "Muon") else "has no Muon: it came"),
        (["optimizer._component_=torchao.optim.AdamW8bit", "--gpus", "2"],
         "AdamW8bit's state cannot be stored from 2 processes"),
    ],
)  # fmt: skip
def test_what_training_refuses_is_not_planned(
    capsys: pytest.CaptureFixture[str], overrides: list[str], said: str
) -> None:
    assert run_plan([str(CONFIGS / "smollm2_135m_kl.yaml"), *overrides]) == 1
    [line] = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert said in line


def test_no_more_devices_where_the_optimizer_is_for_one(capsys: pytest.CaptureFixture[str]) -> None:
    config = str(CONFIGS / "smollm2_135m_kl.yaml")
    arguments = [config, "--gpu-memory", "1.6", "batch_size=1", "--row-tokens", "64"]
    arguments += ["enable_activation_checkpointing=true"]
    for optimizer, offered in (("torch.optim.AdamW", True), ("torchao.optim.AdamW8bit", False)):
        assert run_plan([*arguments, f"optimizer._component_={optimizer}"]) == 1
        assert ("--gpus 2: " in capsys.readouterr().out) == offered
