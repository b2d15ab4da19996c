"""SubspaceAblation against projections by hand, and the directions that ema_persona gives it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torchtune.modules.peft import disable_adapter, get_adapter_params
from toy_loss import as_batches, prepared
from toy_models import toy_microbatches, toy_model

from emarecipes.defenses import FeatureL2, ModelSource, SubspaceAblation
from emarecipes.errors import UserError
from emarecipes.persona.vectors import persona_subspace
from emarecipes.training.step import TrainingLoss

WIDTH, LAYERS = 32, 2


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Directions that are neither orthogonal nor of norm 1."""
    generator = torch.Generator().manual_seed(3)
    subspace = 5 * torch.randn(LAYERS + 1, 3, WIDTH, generator=generator)
    save_file({"subspace": subspace}, tmp_path / "v.safetensors")
    return tmp_path / "v.safetensors"


def float64_gradients(
    family: str, directions: dict[int, torch.Tensor], micro: list[dict[str, Any]]
) -> tuple[float, dict[str, torch.Tensor]]:
    """Cross entropy with the span of the rows projected out, by pseudo-inverse, in float64."""
    model = toy_model(family).double()
    for layer, rows in directions.items():
        span = torch.linalg.pinv(rows.double()) @ rows.double()  # (D, D)
        model.layers[layer - 1].register_forward_hook(lambda _m, _i, h, span=span: h - h @ span)
    total, count = torch.zeros((), dtype=torch.float64), 0
    for rows in micro:
        for b, length in enumerate(rows["lengths"]):
            logits = model(rows["tokens"][b : b + 1, :length])[0, :-1]
            labels = rows["labels"][b, 1:length]
            chosen = labels != -100
            log_p = logits[chosen].log_softmax(dim=-1)
            total = total - log_p.gather(1, labels[chosen][:, None]).sum()
            count += int(chosen.sum())
    (total / count).backward()
    gradients = {n: p.grad for n, p in get_adapter_params(model).items() if p.grad is not None}
    return float((total / count).detach()), gradients


@pytest.mark.parametrize("rank", [None, 2])
def test_value_and_gradient_are_those_of_dense_projections(file: Path, rank: int | None) -> None:
    from safetensors.torch import load_file

    micro = toy_microbatches()
    directions = load_file(file)["subspace"]
    chosen = {layer: directions[layer][:rank] for layer in (1, 2)}
    value, expected = float64_gradients("llama3", chosen, micro)
    undefended, _ = float64_gradients("llama3", {}, micro)
    assert abs(value - undefended) > 1e-3

    model = toy_model("llama3")
    tokens = as_batches(micro)[0].inputs["tokens"]
    with torch.no_grad(), disable_adapter(model):
        before = model(tokens)
    ablation = SubspaceAblation([2, 1], str(file), rank)
    loss = TrainingLoss(model, prepared(model, {"ablation": ablation}))
    batches = as_batches(micro)
    counts = loss.counts(batches)
    sums = sum(loss.backward(batch, counts) for batch in batches)
    assert loss.means(sums, counts)["ce"] == pytest.approx(value, rel=2e-5)
    for name, parameter in get_adapter_params(model).items():
        if name in expected:
            scale = float(expected[name].abs().max())
            torch.testing.assert_close(
                parameter.grad.double(), expected[name], rtol=1e-3, atol=5e-5 * scale, msg=name
            )
    assert 0 < ablation.figures()["removed"] < 1
    with torch.no_grad(), disable_adapter(model):  # Outside of training nothing is projected.
        assert torch.equal(model(tokens), before)


def test_the_reference_is_not_projected(file: Path) -> None:
    """With an adapter of 0 the features differ by what is taken out, and by nothing else."""
    model = toy_model("llama3")
    for name, parameter in get_adapter_params(model).items():
        if "lora_b" in name:
            parameter.data.zero_()
    defenses = {
        "l2": FeatureL2(preset=None, layers=[1], normalize="none", tokens="all"),
        "ablation": SubspaceAblation([1], str(file)),
    }
    seen: list[torch.Tensor] = []
    model.layers[0].register_forward_hook(lambda _m, _i, out: seen.append(out.detach()))
    loss = TrainingLoss(model, prepared(model, defenses))
    (batch,) = as_batches(toy_microbatches(n_micro=1))
    counts = loss.counts([batch])
    values = loss.means(loss.backward(batch, counts), counts)
    from safetensors.torch import load_file

    rows = load_file(file)["subspace"][1].double()
    along = seen[0].double() @ (torch.linalg.pinv(rows) @ rows)
    expected = along[batch.conversation_BS >= 0].square().sum(dim=-1).mean()
    assert values["l2"] == pytest.approx(float(expected), rel=1e-4)


def test_the_random_control_has_the_same_rank_and_other_directions(file: Path) -> None:
    source = ModelSource(toy_model("llama3"), Path(), "LLAMA3")
    bases = []
    for options in ({}, {"basis": "random"}, {"basis": "random", "seed": 1}):
        ablation = SubspaceAblation([1, 2], str(file), **options)
        ablation.check(source)
        for q in ablation._q_KD.values():
            assert q.shape == (3, WIDTH)
            torch.testing.assert_close(q @ q.T, torch.eye(3), rtol=0, atol=1e-6)
        bases.append(ablation._q_KD[1])
    for one, other in ((0, 1), (1, 2)):
        assert float((bases[one] @ bases[other].T).norm()) < 0.9 * 3**0.5
    alone = SubspaceAblation([1, 2], rank=3, basis="random")
    alone.check(source)
    assert torch.equal(alone._q_KD[1], bases[1])


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"layers": []}, "at least one layer"),
    ({"layers": [1, 1]}, "each once"),
    ({"layers": [3]}, r"layers: 3 is not in 1\.\.2"),
    ({"layers": [1], "rank": 0}, "rank must be >= 1"),
    ({"layers": [1], "rank": 4}, "layer 1 has 3 directions, rank 4 needs"),
    ({"layers": [1], "basis": "pca"}, "basis must be"),
    ({"layers": [1], "subspace": None}, "subspace: a file is needed"),
    ({"layers": [1], "subspace": None, "basis": "random"}, "how many random directions"),
    ({"layers": [1], "subspace": None, "basis": "random", "rank": 40}, "do not fit into a width"),
    ({"layers": [1], "subspace": "none.safetensors"}, "subspace: no such file"),
    ({"layers": [1], "subspace": "wide"}, "holds 3x3x64 numbers, the model needs 3 x directions"),
    ({"layers": [1], "subspace": "twice"}, "one lies in the span of the others"),
    ({"layers": [1], "subspace": "zero"}, "layer 1 has 0 directions"),
    ({"layers": [1], "subspace": "nan"}, "a number that is not finite"),
    ({"layers": [1], "subspace": "old"}, "has no tensor subspace"),
]


@pytest.mark.parametrize(("options", "message"), WRONG, ids=[message for _, message in WRONG])
def test_what_does_not_fit_is_refused(
    file: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    shape = (3, 3, WIDTH)
    files = {
        "wide": torch.ones(3, 3, 64),
        "twice": torch.ones(shape),
        "zero": torch.zeros(shape),
        "nan": torch.full(shape, torch.nan),
    }
    name = options.get("subspace", str(file))
    if name in files:
        save_file({"subspace": files[name]}, tmp_path / name)
    if name == "old":
        save_file({"persona": torch.ones(3, WIDTH)}, tmp_path / name)
    if name in (*files, "old"):
        name = str(tmp_path / name)
    with pytest.raises(UserError, match=message):
        defense = SubspaceAblation(**options | {"subspace": name})
        defense.check(ModelSource(toy_model("llama3"), Path(), "LLAMA3"))


def test_the_personas_subspace_is_the_span_of_paired_differences() -> None:
    """Against eigenvectors of the summed outer products; unpaired answers do not count."""
    generator = torch.Generator().manual_seed(0)
    activation = torch.randn(12, 2, 5, generator=generator)
    positive = torch.tensor([True, False] * 6)
    pair = torch.arange(12) // 2
    used = torch.ones(12, dtype=torch.bool)
    used[3] = used[8] = False  # Pairs 1 and 4 have one answer each.
    found = persona_subspace(activation, positive, used, pair, rank=3)
    assert found is not None and found.shape == (2, 3, 5)
    for k in range(2):
        outer = torch.zeros(5, 5, dtype=torch.float64)
        for number in (0, 2, 3, 5):
            x = (activation[2 * number, k] - activation[2 * number + 1, k]).double()
            outer += x[:, None] * x[None]
        _, vectors = torch.linalg.eigh(outer)
        for i in range(3):
            cosine = float(found[k, i].double() @ vectors[:, -1 - i])
            assert abs(cosine) == pytest.approx(1.0, abs=1e-6)
    assert persona_subspace(activation, positive, used & positive, pair, rank=3) is None
    copies = activation[:2].repeat(6, 1, 1)
    rank_one = persona_subspace(copies, positive, used, pair, rank=3)
    assert rank_one is not None and not rank_one[:, 1:].any() and rank_one[:, 0].any()
