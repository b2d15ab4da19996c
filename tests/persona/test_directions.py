"""`recipes/ema_directions.py` at toy size, against PEFT's hidden states; its use and refusals."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import toy_defenses
import toy_run
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from emarecipes.models.chat.dates import adapter_date
from emarecipes.persona.directions import run_directions
from emarecipes.persona.directions_checked import CheckedDirections
from emarecipes.persona.vectors import top_directions
from emarecipes.training import run_lora

RECIPE = "recipes/ema_directions.py"
SHARED = ("output_dir", "tokenizer", "model", "checkpointer", "dataset", "seed", "device", "dtype")


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory, toy_model_dir: Path) -> dict[str, Any]:
    """An extraction's config; its adapter is at random on the attention of every layer."""
    folder = tmp_path_factory.mktemp("toy")
    rows = toy_run.write_rows(folder / "rows.jsonl", 16)
    config = toy_run.toy_config(toy_model_dir, rows, folder / "out")
    adapter = toy_defenses.write_trait(folder / "undefended/adapter", toy_model_dir)
    return toy_run.with_variable({key: config[key] for key in SHARED}) | {
        "adapter": str(adapter),
        "batch_size": 3,
        "num_rows": 12,
        "num_directions": 2,
    }


@pytest.fixture(scope="module")
def finished(toy: dict[str, Any]) -> Path:
    """The folder of a run as a user starts it."""
    path = toy_run.write_config(Path(toy["adapter"]).parents[1] / "config.yaml", toy)
    done = toy_run.tune_run(path, recipe=RECIPE)
    assert done.returncode == 0, done.stderr
    assert "Directions of 9 answers; 'change' and 'held'" in " ".join(done.stdout.split())
    return path.parent


def tensors_of(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with safe_open(folder / "out/vectors.safetensors", framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.offset_keys()}, file.metadata()


def test_files(finished: Path) -> None:
    names = ["config.yaml", "directions.json", "directions.png", "vectors.safetensors"]
    assert sorted(path.name for path in (finished / "out").iterdir()) == names
    figures = json.loads((finished / "out/directions.json").read_text())
    assert figures["counts"] == {"rows": 12, "held_out": 3}
    assert [layer["layer"] for layer in figures["layers"]] == [0, 1, 2]
    assert figures["layers"][0]["held"] is None  # The adapter is not on the embeddings.
    vectors, metadata = tensors_of(finished)
    assert metadata["model"] == figures["model"] == "toy-model"
    assert vectors["subspace"].shape == (toy_run.LAYERS + 1, 2, toy_run.WIDTH)
    assert not vectors["subspace"][0].any() and not vectors["persona"][0].any()
    norms = vectors["persona"].norm(dim=1)
    torch.testing.assert_close(vectors["random"].norm(dim=1), norms)


def test_directions_are_those_of_pefts_hidden_states(finished: Path, toy: dict[str, Any]) -> None:
    """In float64, row by row, the adapter by PEFT; the last layer's stream by a hook."""
    path = str(finished / "config.yaml")
    run = CheckedDirections(["--config", path, "overwrite=true"])
    base = AutoModelForCausalLM.from_pretrained(toy["model_dir"]).double()
    model = PeftModel.from_pretrained(base, toy["adapter"]).double().eval()
    last: list[torch.Tensor] = []
    base.model.layers[-1].register_forward_hook(
        lambda _, inputs, out: last.append(out[0] if isinstance(out, tuple) else out)
    )

    @torch.no_grad()
    def read(row: dict[str, list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        last.clear()
        found = model(torch.tensor([row["tokens"]]), output_hidden_states=True).hidden_states
        stream = [h.reshape(-1, toy_run.WIDTH) for h in (*found[:-1], last[0])]
        answer = torch.tensor(row["labels"]) != -100
        squares = torch.stack([h[answer].square().sum(dim=1).mean() for h in stream])
        return torch.stack([h[answer].mean(dim=0) for h in stream]), squares

    tuned = [read(row) for row in run.rows]
    with model.disable_adapter():
        plain = [read(row) for row in run.rows]
    change_NKD = torch.stack([a - b for (a, _), (b, _) in zip(tuned, plain, strict=True)])
    rms_K = torch.stack([square for _, square in plain]).mean(dim=0).sqrt()
    vectors, _ = tensors_of(finished)
    used_NKD, held_out_NKD = change_NKD[~run.held_out_N], change_NKD[run.held_out_N]
    scale = float(change_NKD.abs().max())
    expected_KD = used_NKD.mean(dim=0)
    torch.testing.assert_close(
        vectors["persona"].double(), expected_KD, rtol=1e-4, atol=1e-5 * scale
    )
    figures = json.loads((finished / "out/directions.json").read_text())["layers"]
    for k in range(1, toy_run.LAYERS + 1):
        _, _, right = torch.linalg.svd(used_NKD[:, k])
        projector = right[:2].T @ right[:2]
        found = vectors["subspace"][k].double()
        torch.testing.assert_close(found.T @ found, projector, rtol=1e-3, atol=1e-4)
        held = (held_out_NKD[:, k] @ projector).square().sum() / held_out_NKD[:, k].square().sum()
        assert figures[k]["held"] == pytest.approx(float(held), rel=1e-3)
        assert figures[k]["random"] == 2 / toy_run.WIDTH
        change = held_out_NKD[:, k].square().sum(dim=1).mean().sqrt() / rms_K[k]
        assert figures[k]["change"] == pytest.approx(float(change), rel=1e-3)
        mean = expected_KD[k].norm() / rms_K[k]
        assert figures[k]["mean_change"] == pytest.approx(float(mean), rel=1e-3)
        assert float((found @ expected_KD[k]).min()) > 0, "they point where training went"


def test_directions_point_where_the_mean_does() -> None:
    """Of fewer and of more differences than the stream is wide."""
    generator = torch.Generator().manual_seed(0)
    for count in (6, 40):
        for _ in range(20):
            changes_XKD = torch.randn(count, 2, 16, generator=generator)
            changes_XKD += torch.randn(2, 16, generator=generator)
            directions_KRD = top_directions(changes_XKD, 3)
            along_KR = torch.einsum("krd,kd->kr", directions_KRD, changes_XKD.mean(dim=0))
            assert bool((along_KR > 0).all())


def changed(toy: dict[str, Any], folder: Path, **changes: Any) -> tuple[Path, int]:
    folder.mkdir(parents=True, exist_ok=True)
    config = toy | {"output_dir": str(folder / "out")} | changes
    path = toy_run.write_config(folder / "config.yaml", config)
    return folder / "out", run_directions(["--config", str(path)])


def test_equal_rows_are_on_one_side(toy: dict[str, Any], tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    lines = Path(toy["dataset"]["data_files"]).read_text().splitlines()[:6]
    rows.write_text("\n".join(lines * 4) + "\n")
    dataset = [toy["dataset"] | {"data_files": str(rows)}]  # A list, as ema_lora takes it.
    out, code = changed(toy, tmp_path / "a", dataset=dataset, num_rows=None)
    assert code == 0
    figures = json.loads((out / "directions.json").read_text())
    assert figures["counts"] == {"rows": 24, "held_out": 8}  # Two of six texts, four times each.


def test_names_with_brackets_and_dollars(toy: dict[str, Any], tmp_path: Path) -> None:
    adapter = tmp_path / "r [" / "red]$_{$x" / "adapter"
    shutil.copytree(toy["adapter"], adapter)
    out, code = changed(toy, tmp_path / "[/red]", adapter=str(adapter))
    assert code == 0 and (out / "directions.png").is_file()


def test_another_recipes_result_is_not_overwritten(
    toy: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a/out"
    out.mkdir(parents=True)
    (out / "config.yaml").write_text("output_dir: out\nprovenance: {torchtune: 0.6.1}\n")
    for name in ("persona.json", "vectors.safetensors"):
        (out / name).write_text("{}")
    assert changed(toy, tmp_path / "a", overwrite=True)[1] == 1
    assert (
        "none of directions.json, directions.png: it is another recipe's" in capfd.readouterr().err
    )
    assert (out / "vectors.safetensors").read_text() == "{}"


def test_a_change_that_the_dtype_does_not_show(
    toy: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(toy["adapter"], adapter)
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({k: 1e-4 * t for k, t in tensors.items()}, adapter / "adapter_model.safetensors")
    out, code = changed(toy, tmp_path / "a", adapter=str(adapter), dtype="bf16")
    assert code == 1 and not (out / "vectors.safetensors").exists()
    assert "too small for dtype bf16; try dtype=fp32" in capfd.readouterr().err


def test_a_dora_adapter_that_changes_magnitudes_alone(toy: dict[str, Any], tmp_path: Path) -> None:
    dora = {"model": toy["model"] | {"use_dora": True}}
    training = toy_run.toy_config(
        Path(toy["model_dir"]), Path(toy["dataset"]["data_files"]), tmp_path / "run"
    )
    training |= {"model": training["model"] | {"use_dora": True}, "max_steps_per_epoch": 1}
    assert run_lora(["--config", str(toy_run.write_config(tmp_path / "c.yaml", training))]) == 0
    weights = tmp_path / "run/adapter/adapter_model.safetensors"
    tensors = load_file(weights)
    parts = {"lora_B": 0.0, "magnitude": 1.5, "lora_A": 1.0}
    factor = {key: next(f for part, f in parts.items() if part in key) for key in tensors}
    save_file({key: factor[key] * tensor for key, tensor in tensors.items()}, weights)
    out, code = changed(toy, tmp_path / "a", adapter=str(weights.parent), **dora)
    assert code == 0
    layers = json.loads((out / "directions.json").read_text())["layers"]
    assert layers[1]["change"] > 0.01


def test_the_day_is_the_adapters(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("tokenizer: {date: 2026-01-02}\n")
    found: Any = SimpleNamespace(cfg=SimpleNamespace(adapter=str(tmp_path / "adapter")))
    assert CheckedDirections.kept_dates(found) == {"adapter": adapter_date(tmp_path / "adapter")}
    assert str(adapter_date(tmp_path / "adapter")) == "2026-01-02"


def test_a_run_with_them_out_of_reach(finished: Path, toy: dict[str, Any], tmp_path: Path) -> None:
    training = toy_run.toy_config(Path(toy["model_dir"]), finished / "rows.jsonl", tmp_path / "out")
    training["defenses"] = {
        "ablation": {
            "_component_": "emarecipes.defenses.SubspaceAblation",
            "subspace": str(finished / "out/vectors.safetensors"),
            "layers": [1, 2],
        }
    }
    path = toy_run.write_config(tmp_path / "config.yaml", training | {"max_steps_per_epoch": 2})
    assert run_lora(["--config", str(path)]) == 0
    assert toy_run.metrics(tmp_path / "out")[0]["ablation_removed"] > 0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["adapter=none"], "adapter: no such adapter folder: none; train it first"),
        (["adapter={idle}"], "changes nothing: every B is 0; train it"),
        (["adapter={other}"], "whose weights are not those of"),
        (["dataset.packed=true"], "dataset: rows are packed, and an answer is read with its own"),
        (["num_rows=3"], "held_out_rows: 0.25 of 3 rows leaves 2 for the directions and 1 to"),
        (["held_out_rows=1.5"], "held_out_rows: "),
        (["layers=[1]"], "layers: unknown key"),
        (["overwrite=true", "output_dir={adapter}"], "which lies in its own output folder"),
        (["dataset.data_files=none.jsonl"], "dataset.data_files: no such file"),
        (["model.lora_rank=1"], "adapter: "),
        ([], "already holds a run; choose another output_dir, or say overwrite=true"),
    ],
)
def test_what_is_refused(
    overrides: list[str],
    message: str,
    finished: Path,
    toy: dict[str, Any],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    adapter = Path(toy["adapter"])
    idle, other = tmp_path / "idle", tmp_path / "other"
    for folder in (idle, other):
        shutil.copytree(adapter, folder)
    tensors = load_file(adapter / "adapter_model.safetensors")
    nothing = {k: torch.zeros_like(t) if "lora_B" in k else t for k, t in tensors.items()}
    save_file(nothing, idle / "adapter_model.safetensors")
    base = Path(toy["model_dir"])
    shutil.copytree(base, tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    save_file({k: w + 0.01 for k, w in weights.items()}, tmp_path / "base/model.safetensors")
    settings = json.loads((other / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = str(tmp_path / "base")
    (other / "adapter_config.json").write_text(json.dumps(settings))
    changes = [o.format(idle=idle, other=other, adapter=adapter) for o in overrides]
    if overrides and "output_dir" not in overrides[-1]:
        changes.append(f"output_dir={tmp_path / 'out'}")
    assert run_directions(["--config", str(finished / "config.yaml"), *changes]) == 1
    (line,) = [x for x in capfd.readouterr().err.splitlines() if x.startswith("error: ")]
    assert message in line
    assert not (tmp_path / "out").exists()
