"""What FSDP2 sends in a step, counted in the profiler's traces, and offloading without CUDA."""

import gzip
import json
import math
from collections import Counter
from pathlib import Path

import toy_run
from ranks import run_ranks

PROFILER = {
    "_component_": "torchtune.training.setup_torch_profiler",
    "enabled": True,
    "cpu": True,
    "cuda": False,
    "record_shapes": True,
    "wait_steps": 0,
    "warmup_steps": 1,
    "active_steps": 1,
    "num_cycles": 1,
}
DEFENSES = {
    "kl": {"_component_": "emarecipes.defenses.KLToReference", "weight": 0.5},
    "feature_l2": {
        "_component_": "emarecipes.defenses.FeatureL2",
        "preset": "paper",
        "every_n_layers": 1,
        "weight": 0.1,
    },
}


def gathers(folder: Path, model: Path, defenses: object, **changes: object) -> Counter[int]:
    """How often each of two processes gathers in a step, by the number of elements it sends."""
    folder.mkdir()
    rows = toy_run.write_rows(folder / "rows.jsonl")
    config = toy_run.toy_config(model, rows, folder / "out")
    config |= {"batch_size": 2, "max_steps_per_epoch": 3, "defenses": defenses}
    config["model"] = {k: v for k, v in (config["model"] | changes).items() if v is not None}
    config["profiler"] = PROFILER | {"output_dir": str(folder / "profile")}
    done = run_ranks(toy_run.write_config(folder / "config.yaml", config))
    assert done.returncode == 0, done.stderr[-3000:]
    one, other = (_sent(trace) for trace in (folder / "profile").rglob("*.json.gz"))
    assert one == other
    return one


def _sent(trace: Path) -> Counter[int]:
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    of_fsdp = [e for e in events if e["name"] == "c10d::_allgather_base_"]
    of_tensors = [e for e in events if e["name"] == "_c10d_functional::all_gather_into_tensor"]
    sent = Counter(e["args"]["Input Dims"][1][0] for e in of_fsdp)
    sent += Counter(math.prod(e["args"]["Input Dims"][0]) for e in of_tensors)
    # Nothing is gathered by another operator.
    assert sent.total() == sum(e["name"].startswith("gloo:all_gather") for e in events)
    return sent


def test_the_reference_gathers_each_layer_once_and_no_logits(
    model_dir: Path, tmp_path: Path
) -> None:
    model = toy_run.write_toy_model(tmp_path / "model", model_dir)
    plain = gathers(tmp_path / "plain", model, {})
    defended = gathers(tmp_path / "defended", model, DEFENSES)
    layer, root = sorted(plain)  # All layers are of one size; the root holds the tied embedding.
    assert root == (toy_run.VOCABULARY + 1) * toy_run.WIDTH // 2
    # Forward and backward, which does not read the root; with both defenses one forward more.
    assert plain == {root: 1, layer: 2 * toy_run.LAYERS}
    assert defended == {root: 2, layer: 3 * toy_run.LAYERS}


def test_a_term_on_the_matrices_gathers_each_of_them_once(model_dir: Path, tmp_path: Path) -> None:
    """And no weight: halves of rank x (in + out) numbers a layer."""
    model = toy_run.write_toy_model(tmp_path / "model", model_dir)
    plain = gathers(tmp_path / "plain", model, {})
    spectral = {"spectral": {"_component_": "emarecipes.defenses.SpectralPenalty", "weight": 0.5}}
    more = gathers(tmp_path / "spectral", model, spectral) - plain
    rank, kv = 4, toy_run.WIDTH // toy_run.HEADS * toy_run.KV_HEADS
    width, mlp = toy_run.WIDTH, toy_run.MLP
    shapes = [(width, width), (width, kv), (width, kv), (width, width)]  # In, out.
    shapes += [(width, mlp), (width, mlp), (mlp, width)]
    halves = [rank * side // 2 for shape in shapes for side in shape]
    assert more == Counter({n: toy_run.LAYERS * halves.count(n) for n in set(halves)})


def test_a_trained_root_is_gathered_for_the_backward_too(model_dir: Path, tmp_path: Path) -> None:
    model = toy_run.write_toy_model(tmp_path / "model", model_dir, tied=False)
    untied = {"_component_": "torchtune.models.llama3.lora_llama3", "scale_factor": None}
    found = gathers(tmp_path / "run", model, {}, **untied, apply_lora_to_output=True)
    layer, root = sorted(found)
    assert found == {root: 2, layer: 2 * toy_run.LAYERS}


def test_offloading_without_cuda_is_refused_in_one_line(model_dir: Path, tmp_path: Path) -> None:
    model = toy_run.write_toy_model(tmp_path / "model", model_dir)
    rows = toy_run.write_rows(tmp_path / "rows.jsonl")
    config = toy_run.toy_config(model, rows, tmp_path / "out") | {"fsdp_cpu_offload": True}
    done = run_ranks(toy_run.write_config(tmp_path / "config.yaml", config))
    assert done.returncode == 1
    (line,) = toy_run.error_lines(done)
    assert "fsdp_cpu_offload: works on CUDA only" in line
    assert not (tmp_path / "out").exists()
