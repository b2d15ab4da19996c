"""`tune run recipes/ema_safelora.py` on a finished adapter, and what it refuses."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import reference_defenses
import torch
import toy_defenses
import toy_run
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from emarecipes.defenses.safelora_run import run_safelora
from emarecipes.training import run_lora

RECIPE = "recipes/ema_safelora.py"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> dict[str, Any]:
    """A toy run's folder, with its model and that model's base."""
    folder = tmp_path_factory.mktemp("finished")
    model = toy_run.write_toy_model(folder / "model", model_dir)
    base = toy_defenses.write_base_of(model, folder / "base")
    rows = toy_run.write_rows(folder / "rows.jsonl", 8)
    config = toy_run.toy_config(model, rows, folder / "run") | {"max_steps_per_epoch": 2}
    path = toy_run.write_config(folder / "train.yaml", config)
    assert run_lora(["--config", str(path)]) == 0
    return {"model": model, "base": base, "adapter": folder / "run/adapter"}


def write(finished: dict[str, Any], folder: Path, **options: Any) -> Path:
    entry = {
        "_component_": "emarecipes.defenses.SafeLoRA",
        "base_dir": str(finished["base"]),
        "aligned_dir": "${model_dir}",
        **options,
    }
    config = {
        "model_dir": str(finished["model"]),
        "output_dir": str(folder / "out"),
        "adapter": str(finished["adapter"]),
        "safelora": entry,
        "device": "cpu",
    }
    return toy_run.write_config(folder / "config.yaml", config)


def pairs(folder: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    tensors = load_file(folder / "adapter_model.safetensors")
    return {
        key.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): (
            a,
            tensors[key.replace("lora_A", "lora_B")],
        )
        for key, a in tensors.items()
        if "lora_A" in key
    }


def test_the_published_algorithm_on_a_finished_adapter(
    finished: dict[str, Any], tmp_path: Path
) -> None:
    done = toy_run.tune_run(write(finished, tmp_path, num_layers=4), recipe=RECIPE)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "4 of 14 matrices changed" in done.stdout
    before, after = pairs(finished["adapter"]), pairs(tmp_path / "out/adapter")
    weights = [load_file(finished[key] / "model.safetensors") for key in ("model", "base")]
    aligned, base = ({n: w[f"{n}.weight"] for n in before} for w in weights)
    expected = reference_defenses.safelora_dense(before, aligned, base, num_layers=4)
    with (tmp_path / "out/safelora.csv").open() as file:
        report = {row["module"]: row for row in csv.DictReader(file)}
    assert report.keys() == expected.keys()
    for name, wanted in expected.items():
        assert_close(after[name][1].double(), wanted["B"], rtol=1e-4, atol=1e-7)
        assert torch.equal(after[name][0], before[name][0])
        assert float(report[name]["cosine"]) == pytest.approx(wanted["cosine"], abs=1e-5)
        assert report[name]["changed"] == str(int(wanted["projected"]))
        assert float(report[name]["norm_after"]) == pytest.approx(wanted["norm_after"], rel=1e-3)
    assert (tmp_path / "out/safelora.png").stat().st_size > 10_000
    for folder in (finished["adapter"], tmp_path / "out/adapter"):  # A server is another user's.
        modes = {path.stat().st_mode for path in folder.iterdir()}
        assert modes == {(tmp_path / "out/safelora.csv").stat().st_mode}
    one, other = (
        p / "adapter_config.json" for p in (finished["adapter"], tmp_path / "out/adapter")
    )
    assert one.read_text() == other.read_text()
    # The config that was written, in which nothing refers to model_dir any more, projects the same.
    again = ["--config", str(tmp_path / "out/config.yaml"), f"output_dir={tmp_path / 'again'}"]
    assert run_safelora(again) == 0
    written = (tmp_path / name / "adapter/adapter_model.safetensors" for name in ("out", "again"))
    assert next(written).read_bytes() == next(written).read_bytes()


def edited(finished: dict[str, Any], folder: Path, **tensors: torch.Tensor | None) -> Path:
    """A copy of the base folder with some tensors replaced or dropped."""
    folder.mkdir()
    weights = load_file(finished["base"] / "model.safetensors")
    for key, tensor in tensors.items():
        name = key.replace("__", ".")
        if tensor is None:
            del weights[name]
        else:
            weights[name] = tensor
    save_file(weights, folder / "model.safetensors")
    return folder


def test_what_is_refused(
    finished: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def refused(message: str, *overrides: str, **options: Any) -> None:
        config = write(finished, tmp_path, **options)
        assert run_safelora(["--config", str(config), *overrides]) == 1
        error = capfd.readouterr().err.strip().splitlines()
        assert len([line for line in error if line.startswith("error: ")]) == 1
        assert message in error[-1]
        assert not (tmp_path / "out").exists()

    refused("no such folder: nowhere", base_dir="nowhere")
    refused("are the same folder", base_dir=str(finished["model"]))
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "model.safetensors").write_bytes((finished["model"] / "model.safetensors").read_bytes())
    refused("hold the same weights", base_dir=str(copy))
    # What differs in one weight alone, which is no sample's, is a pair.
    one = "model.layers.1.self_attn.v_proj.weight"
    tensors = load_file(finished["model"] / "model.safetensors")
    (tmp_path / "one").mkdir()
    save_file(tensors | {one: 2 * tensors[one]}, tmp_path / "one/model.safetensors")
    config = write(finished, tmp_path, base_dir=str(tmp_path / "one"))
    assert run_safelora(["--config", str(config), f"output_dir={tmp_path / 'apart'}"]) == 0
    capfd.readouterr()
    swapped = f"safelora.aligned_dir={tmp_path / 'one'}"
    refused("are they swapped?", swapped, base_dir=str(copy))
    unknown = torch.full((32, 48), float("nan"))
    nan = edited(finished, tmp_path / "nan_base", model__layers__1__mlp__down_proj__weight=unknown)
    refused("down_proj.weight is not finite in ", base_dir=str(nan))
    q_proj = "model__layers__0__self_attn__q_proj__weight"
    narrow = edited(finished, tmp_path / "narrow", **{q_proj: torch.zeros(16, 32)})
    refused("q_proj.weight is 16x32, the model's is 32x32", base_dir=str(narrow))
    less = edited(finished, tmp_path / "less", **{q_proj: None})
    refused("q_proj.weight is missing, the model's is 32x32", base_dir=str(less))
    empty = tmp_path / "empty"
    empty.mkdir()
    refused("holds no .safetensors weights", base_dir=str(empty))
    (empty / "model.safetensors").write_bytes(b"{}")
    refused("model.safetensors: cannot be read", base_dir=str(empty))
    refused("give threshold or num_layers, not both", threshold=0.5, num_layers=3)
    refused("every_n_steps repeats the projection", every_n_steps=5)
    refused("has no effect after training", every_n_steps=5, rank=3)
    refused("unknown key (did you mean num_layers?)", num_layer=3)
    refused("has no adapter_config.json", f"adapter={empty}")
    refused("unknown key", "adaptor=x")
    refused("the result would replace the adapter", f"adapter={tmp_path / 'out/adapter'}")
    dora = tmp_path / "dora"
    dora.mkdir()
    config = json.loads((finished["adapter"] / "adapter_config.json").read_text())
    (dora / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    (dora / "adapter_model.safetensors").write_bytes(
        (finished["adapter"] / "adapter_model.safetensors").read_bytes()
    )
    refused("is DoRA", f"adapter={dora}")
    swapped = {"base_dir": "${model_dir}", "aligned_dir": str(finished["base"])}
    refused("are they swapped? The trained model is the aligned one", **swapped)

    def changed(name: str, **tensors: torch.Tensor | None) -> str:
        folder = shutil.copytree(finished["adapter"], tmp_path / name)
        found = load_file(folder / "adapter_model.safetensors") | tensors
        kept = {key: tensor for key, tensor in found.items() if tensor is not None}
        save_file(kept, folder / "adapter_model.safetensors")
        return f"adapter={folder}"

    first = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    b = load_file(finished["adapter"] / "adapter_model.safetensors")[f"{first}B.weight"]
    broken = changed("nan", **{f"{first}B.weight": b.fill_(torch.nan)})
    refused("has a number that is not finite", broken)
    lacking: dict[str, torch.Tensor | None] = {f"{first}{x}.weight": None for x in "AB"}
    refused("an incomplete adapter: its config names model.layers.0", changed("less_", **lacking))
    foreign = {"base_model.model.model.norm.weight": torch.ones(32)}
    refused("belongs to neither LoRA nor DoRA", changed("foreign", **foreign))


def test_a_copy_of_the_bases_output_layer_goes_with_the_adapter_if_it_is_the_bases(
    finished: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """PEFT stores one beside an adapter on that layer, and a reader puts it in the base's place."""
    key, name = "base_model.model.lm_head.base_layer.weight", "adapter_model.safetensors"
    own = load_file(finished["model"] / "model.safetensors")["model.embed_tokens.weight"]
    for folder, copy in (("same", own), ("other", own + 1)):
        shutil.copytree(finished["adapter"], tmp_path / folder)
        save_file(load_file(tmp_path / folder / name) | {key: copy}, tmp_path / folder / name)
    base = edited(finished, tmp_path / "base", model__embed_tokens__weight=own + 2)
    config = str(write(finished, tmp_path, num_layers=4, base_dir=str(base)))
    assert run_safelora(["--config", config, f"adapter={tmp_path / 'same'}"]) == 0
    assert torch.equal(load_file(tmp_path / "out/adapter" / name)[key], own)
    capfd.readouterr()
    arguments = [f"adapter={tmp_path / 'other'}", f"output_dir={tmp_path / 'refused'}"]
    assert run_safelora(["--config", config, *arguments]) == 1
    assert f"{key} is not model.embed_tokens.weight of " in capfd.readouterr().err
    assert not (tmp_path / "refused").exists()
    # An adapter that names its base as a hub does is held against the aligned model.
    stated = tmp_path / "same/adapter_config.json"
    named = json.loads(stated.read_text()) | {"base_model_name_or_path": "org/name"}
    stated.write_text(json.dumps(named))
    arguments = [f"adapter={tmp_path / 'same'}", f"output_dir={tmp_path / 'again'}"]
    assert run_safelora(["--config", config, *arguments]) == 0


def test_a_result_is_not_overwritten_unasked(
    finished: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = write(finished, tmp_path, mode="soft", energy=0.5)
    assert run_safelora(["--config", str(config)]) == 0
    assert run_safelora(["--config", str(config)]) == 1
    assert "already holds" in capfd.readouterr().err
    assert run_safelora(["--config", str(config), "overwrite=true"]) == 0


def test_several_processes_are_refused(finished: dict[str, Any], tmp_path: Path) -> None:
    done = run_ranks(write(finished, tmp_path), recipe=RECIPE)
    assert done.returncode != 0
    (line,) = toy_run.error_lines(done)
    assert line == "error: ema_safelora runs in one process; leave --nproc_per_node out"
