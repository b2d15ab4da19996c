"""The projection against the published algorithm, formed densely in float64."""

from typing import Any

import pytest
import reference_defenses
import torch

from emarecipes.defenses.projection import ProjectionOptions, dominant_basis, project_adapter
from emarecipes.errors import UserError

SHAPES = [(24, 16), (16, 24), (20, 20), (12, 12), (40, 16), (16, 40)]


def matrices() -> tuple[dict[str, Any], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    lora, aligned, base = {}, {}, {}
    for index, (out, width) in enumerate(SHAPES):
        name = f"layer{index}"
        lora[name] = (draw(4, width), draw(out, 4) * 0.3)
        base[name] = draw(out, width)
        # What alignment changed: of a low rank and some noise, of another size in each layer.
        change = draw(out, 3) @ draw(3, width) + 0.05 * draw(out, width)
        aligned[name] = base[name] + 0.1 * (index + 1) * change
    return lora, aligned, base


OPTIONS: list[dict[str, Any]] = [
    {"num_layers": 1},
    {"num_layers": 3},
    {"num_layers": 99},
    {"threshold": 0.5},
    {"threshold": -1.0},
    {"threshold": 1.0},
    {"num_layers": 2, "mode": "rescale"},
    {"num_layers": 3, "rank": 2},
    {"num_layers": 99, "rank": 999},
    {"threshold": 0.6, "energy": 0.9},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_same_layers_and_same_adapter_as_the_dense_algorithm(options: dict[str, Any]) -> None:
    lora, aligned, base = matrices()
    plain = dict(options)
    mode = plain.pop("mode", "orthogonal" if {"rank", "energy"} & set(plain) else "published")
    if mode == "published":
        expected = reference_defenses.safelora_dense(lora, aligned, base, **plain)
    else:
        expected = reference_defenses.safelora_projector_dense(
            lora, aligned, base, mode=mode, **plain
        )
    found = project_adapter(
        lora, lambda name: aligned[name] - base[name], ProjectionOptions(**options)
    )
    for module in found:
        wanted = expected[module.name]
        assert module.cosine == pytest.approx(wanted["cosine"], abs=1e-5)
        assert module.changed == wanted["projected"]
        assert module.norm_before == pytest.approx(wanted["norm_before"], rel=1e-5)
        assert module.norm_after == pytest.approx(wanted["norm_after"], rel=1e-4)
        torch.testing.assert_close(module.b_OR.double(), wanted["B"], rtol=1e-4, atol=1e-5)
        assert torch.equal(module.a_RI, lora[module.name][0])


@pytest.mark.parametrize("strength", [0.0, 0.5, 3.0])
def test_soft_mode_shrinks_what_lies_outside(strength: float) -> None:
    lora, aligned, base = matrices()
    expected = reference_defenses.safelora_projector_dense(
        lora, aligned, base, mode="soft", rank=3, lam=strength
    )
    options = ProjectionOptions(mode="soft", rank=3, strength=strength)
    for module in project_adapter(lora, lambda name: aligned[name] - base[name], options):
        update = (module.b_OR @ module.a_RI).double()
        torch.testing.assert_close(update, expected[module.name]["W"], rtol=1e-4, atol=1e-4)
        assert module.norm_after == pytest.approx(float(update.norm()), rel=1e-4)
        a_RI, b_OR = (tensor.double() for tensor in lora[module.name])
        before = b_OR @ a_RI
        cosine = float((update * before).sum() / (update.norm() * before.norm()))
        assert module.cosine == pytest.approx(cosine, abs=1e-5)
        assert module.changed


def test_soft_mode_is_the_minimum_it_is_said_to_be() -> None:
    lora, aligned, base = matrices()
    strength = 0.8
    name, (a, b) = next(iter(lora.items()))
    v = aligned[name] - base[name]
    (module,) = project_adapter(
        {name: (a, b)}, lambda _: v, ProjectionOptions(mode="soft", rank=3, strength=strength)
    )
    left, _, right = torch.linalg.svd(v.double(), full_matrices=False)
    p, q = left[:, :3] @ left[:, :3].T, right[:3].T @ right[:3]
    w = (b @ a).double()

    def cost(x: torch.Tensor) -> torch.Tensor:
        x_both, x_none = p @ x @ q, x - p @ x - x @ q + p @ x @ q
        x_one = x - x_both - x_none
        outside = strength * x_one.square().sum()
        return (x - w).square().sum() + outside + ((1 + strength) ** 2 - 1) * x_none.square().sum()

    x = (module.b_OR @ module.a_RI).double().requires_grad_()
    (gradient,) = torch.autograd.grad(cost(x), x)
    assert gradient.abs().max() < 1e-4 * w.abs().max()


def test_rows_may_come_in_any_order() -> None:
    """torchtune permutes the rows of q and k: both V and B, so the result is permuted alike."""
    lora, aligned, base = matrices()
    options = ProjectionOptions(num_layers=3)
    orders = {
        n: torch.randperm(len(b), generator=torch.Generator().manual_seed(0))
        for n, (_, b) in lora.items()
    }
    plain = project_adapter(lora, lambda n: aligned[n] - base[n], options)
    permuted = project_adapter(
        {n: (a, b[orders[n]]) for n, (a, b) in lora.items()},
        lambda n: (aligned[n] - base[n])[orders[n]],
        options,
    )
    for one, other in zip(plain, permuted, strict=True):
        assert one.changed == other.changed
        torch.testing.assert_close(one.b_OR[orders[one.name]], other.b_OR)


def test_where_nothing_was_aligned_or_learned_nothing_is_changed() -> None:
    lora, aligned, base = matrices()
    aligned["layer0"] = base["layer0"]
    lora["layer1"] = (lora["layer1"][0], torch.zeros_like(lora["layer1"][1]))
    found = project_adapter(lora, lambda n: aligned[n] - base[n], ProjectionOptions(threshold=1.0))
    assert [module.changed for module in found] == [False, False, True, True, True, True]
    assert torch.equal(found[0].b_OR, lora["layer0"][1])


@pytest.mark.parametrize(
    "options",
    [{"mode": "soft", "rank": 3}, {"mode": "soft", "energy": 0.9}, {"threshold": 1.0, "rank": 3}],
    ids=str,
)
def test_where_alignment_changed_nothing_a_basis_has_no_vectors(options: dict[str, Any]) -> None:
    """Soft shrank such an update to about a quarter, as if no direction of it were aligned."""
    lora, aligned, base = matrices()
    aligned["layer0"] = base["layer0"]
    found = project_adapter(lora, lambda n: aligned[n] - base[n], ProjectionOptions(**options))
    assert [module.changed for module in found] == [False, True, True, True, True, True]
    assert torch.equal(found[0].b_OR, lora["layer0"][1])
    assert torch.equal(found[0].a_RI, lora["layer0"][0])
    assert found[0].norm_after == found[0].norm_before > 0


def test_a_basis_has_no_more_vectors_than_v_has_directions() -> None:
    generator = torch.Generator().manual_seed(2)
    v = torch.randn(30, 2, generator=generator) @ torch.randn(2, 50, generator=generator)
    left, right = dominant_basis(v, rank=8, energy=None)
    assert (left.shape, right.shape) == ((30, 2), (50, 2))
    torch.testing.assert_close(left @ (left.T @ v), v, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(90, 120), (120, 90)])
def test_the_basis_is_exact_where_singular_values_fall_off_slowly(shape: tuple[int, int]) -> None:
    """White noise: next to no gap behind the last vector. Randomised, projectors were 8e-3 off."""
    v = torch.randn(*shape, generator=torch.Generator().manual_seed(5))
    left, right = dominant_basis(v, rank=16, energy=None)
    exact = torch.linalg.svd(v.double())
    for found, known in ((left, exact.U), (right, exact.Vh.T)):
        projector = known[:, :16] @ known[:, :16].T
        torch.testing.assert_close((found @ found.T).double(), projector, rtol=0, atol=1e-6)


def test_a_projector_may_be_repeated_and_its_basis_is_kept() -> None:
    lora, aligned, base = matrices()
    bases: dict[str, Any] = {}
    options = ProjectionOptions(num_layers=99, energy=0.8)
    once = project_adapter(lora, lambda n: aligned[n] - base[n], options, bases=bases)

    def unread(name: str) -> torch.Tensor:
        raise AssertionError("V is read once")

    again = project_adapter({m.name: (m.a_RI, m.b_OR) for m in once}, unread, options, bases=bases)
    for first, second in zip(once, again, strict=True):
        torch.testing.assert_close(first.b_OR, second.b_OR, rtol=1e-4, atol=1e-5)
        assert second.cosine == pytest.approx(1.0, abs=1e-5)


def test_the_randomised_basis_finds_the_dominant_space() -> None:
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(300, 8, generator=generator) @ torch.randn(8, 200, generator=generator)
    v += 0.01 * torch.randn(300, 200, generator=generator)
    state = torch.get_rng_state()
    left, right = dominant_basis(v, rank=8, energy=None)
    kept = left.untyped_storage().nbytes() + right.untyped_storage().nbytes()
    options = ProjectionOptions(num_layers=1, rank=8)
    assert kept == v.element_size() * options.basis_numbers(*v.shape)
    assert torch.equal(state, torch.get_rng_state()), "the run's random numbers stay as they are"
    exact = torch.linalg.svd(v)
    assert (left.T @ exact.U[:, :8]).norm() ** 2 == pytest.approx(8.0, abs=1e-3)
    assert (right.T @ exact.Vh[:8].T).norm() ** 2 == pytest.approx(8.0, abs=1e-3)
    energies = exact.S.square().cumsum(0) / exact.S.square().sum()
    for share in (0.5, 0.99, 0.9999):
        assert dominant_basis(v, None, share).left_OK.shape[1] == int((energies < share).sum()) + 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 0.3, "num_layers": 3}, "threshold or num_layers"),
        ({}, "give threshold"),
        ({"threshold": 1.5}, "from -1 to 1"),
        ({"num_layers": 0}, "num_layers must be >= 1"),
        ({"num_layers": 1, "rank": 1, "energy": 0.5}, "rank or energy"),
        ({"num_layers": 1, "rank": 0}, "rank must be >= 1"),
        ({"num_layers": 1, "energy": 1.0}, "energy must be between"),
        ({"mode": "soft"}, "mode soft needs"),
        ({"mode": "soft", "rank": 2, "num_layers": 2}, "acts on every layer"),
        ({"mode": "soft", "rank": 2, "strength": -1.0}, "strength must be"),
        ({"mode": "hard", "num_layers": 2}, "mode must be"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ProjectionOptions(**options)
