"""The literal commands, as typed after installation, from several folders."""

import subprocess
import sys
from pathlib import Path

import pytest
import toy_run
from omegaconf import OmegaConf
from ranks import run_ranks

from emarecipes.training import run_lora


@pytest.fixture(scope="module")
def toy_config(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Path:
    folder = tmp_path_factory.mktemp("launch")
    model = toy_run.write_toy_model(folder / "model", model_dir)
    rows = toy_run.write_rows(folder / "rows.jsonl", 12)
    config = toy_run.toy_config(model, rows, folder / "out")
    config |= {
        "max_steps_per_epoch": 1,
        "defenses": {"kl": {"_component_": "emarecipes.defenses.KLToReference"}},
    }
    return toy_run.write_config(folder / "config.yaml", config)


def test_tune_ls_lists_our_recipes_and_torchtunes() -> None:
    listing = subprocess.run(
        [toy_run.TUNE, "ls"], capture_output=True, text=True, check=True
    ).stdout
    assert "recipes/ema_lora.py" in listing
    for path in (toy_run.REPO / "configs").glob("*.yaml"):
        assert f"configs/{path.name}" in listing
    assert "lora_finetune_single_device" in listing


@pytest.mark.early
@pytest.mark.parametrize(
    ("recipe", "processes"),
    [("recipes/ema_lora.py", 0), (str(toy_run.REPO / "recipes/ema_lora.py"), 1)],
    ids=["by name", "by path, with torchrun"],
)
def test_from_another_folder(toy_config: Path, tmp_path: Path, recipe: str, processes: int) -> None:
    done = toy_run.tune_run(
        toy_config, f"output_dir={tmp_path}/out",
        processes=processes, recipe=recipe, cwd=tmp_path, cold=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "out/adapter/adapter_config.json").is_file()


@pytest.mark.early
@pytest.mark.parametrize("processes", [0, 2])
def test_shipped_config_with_the_real_model(
    model_dir: Path, tmp_path: Path, processes: int
) -> None:
    """From another folder: config, data and model are found where the clone is."""
    done = toy_run.tune_run(
        Path("configs/smollm2_135m_kl.yaml"),
        "defenses.kl.weight=0.5",
        "max_steps_per_epoch=2",
        "batch_size=1",
        "tokenizer.max_seq_len=256",
        f"output_dir={tmp_path}/out",
        processes=processes,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Warning" not in done.stderr
    first, second = toy_run.metrics(tmp_path / "out")
    assert first["kl"] == 0.0
    assert 3 < first["ce"] < 6
    assert second["loss"] == pytest.approx(second["ce"] + 0.5 * second["kl"])
    saved = OmegaConf.load(tmp_path / "out/config.yaml")
    assert saved.defenses.kl.weight == 0.5
    assert saved.provenance.processes == max(processes, 1)
    assert saved.provenance.packages.torchtune == "0.6.1"
    assert len(next(iter(saved.provenance.data_files.values()))) == 64


def test_removing_the_defense(toy_config: Path, tmp_path: Path) -> None:
    done = toy_run.tune_run(toy_config, "~defenses.kl", f"output_dir={tmp_path}/out")
    assert done.returncode == 0, done.stderr[-2000:]
    (row,) = toy_run.metrics(tmp_path / "out")
    assert "kl" not in row
    assert row["loss"] == row["ce"]


def test_a_runs_own_config_runs_again(toy_config: Path, tmp_path: Path) -> None:
    assert run_lora(["--config", str(toy_config), f"output_dir={tmp_path}/one"]) == 0
    assert run_lora(["--config", f"{tmp_path}/one/config.yaml", f"output_dir={tmp_path}/two"]) == 0
    one, two = (toy_run.metrics(tmp_path / name) for name in ("one", "two"))
    assert [m["loss"] for m in one] == [m["loss"] for m in two]


@pytest.mark.parametrize("processes", [0, 2])
def test_a_mistake_gives_one_line_and_a_failing_exit(
    toy_config: Path, tmp_path: Path, processes: int
) -> None:
    done = toy_run.tune_run(
        toy_config, "defenses.kl.wieght=2", f"output_dir={tmp_path}/out", processes=processes
    )
    assert done.returncode != 0
    (line,) = toy_run.error_lines(done)
    assert "defenses.kl.wieght: unknown key (did you mean weight?)" in line
    if not processes:
        assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_too_few_rows_for_two_processes(toy_config: Path, tmp_path: Path) -> None:
    done = run_ranks(toy_config, "batch_size=8", f"output_dir={tmp_path}/out")
    assert done.returncode != 0
    assert "12 rows are too few for one step of 16: batch_size 8" in done.stderr


def test_torchtunes_own_recipe_still_runs(toy_config: Path, tmp_path: Path) -> None:
    done = toy_run.tune_run(
        toy_config,
        f"output_dir={tmp_path}/out",
        f"checkpointer.output_dir={tmp_path}/out",
        recipe="lora_finetune_single_device",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "out/epoch_0/adapter_config.json").is_file()


def test_the_hook_imports_nothing_at_start_up() -> None:
    code = (
        "import sys; before = set(sys.modules); import importlib; "
        "importlib.reload(sys.modules['_emarecipes_launch']); "
        "assert '_emarecipes_launch' in before; "
        "assert not {'torch', 'torchtune', 'emarecipes', 'pathlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("program", "stays"),
    [("/bin/tune", True), ("recipes/ema_lora.py", True), ("fortune", False), ("-c", False)],
)
def test_torchtune_is_imported_without_collecting(program: str, stays: bool) -> None:
    """And in our commands what was imported is in no later collection."""
    code = """
import gc, sys
from types import SimpleNamespace
from emarecipes import _launch
sys.argv = [sys.argv[1], *sys.argv]
_launch._load_without_collecting(SimpleNamespace(), lambda module: print(gc.isenabled()))
print(gc.isenabled(), gc.get_freeze_count() > 1000)
"""
    command = [sys.executable, "-c", code, program]
    assert subprocess.check_output(command, text=True).split() == ["False", "True", str(stays)]


def test_what_trains_is_imported_so_too() -> None:
    code = """
import gc, sys
sys.argv = ["/bin/tune"]
import emarecipes, torchtune
before = gc.get_freeze_count()
import emarecipes.training
print(gc.isenabled(), gc.get_freeze_count() > before + 1000)
"""
    command = [sys.executable, "-c", code]
    assert subprocess.check_output(command, text=True).split() == ["True", "True"]


def test_torchtune_gets_of_torchao_what_others_do_not() -> None:
    """Where `emarecipes` is imported and no .pth was read, too."""
    code = """
import sys
from importlib.util import find_spec
del sys.modules["_emarecipes_launch"]
sys.meta_path[:] = [finder for finder in sys.meta_path if finder.__module__ != "_emarecipes_launch"]
import emarecipes
import torchao.dtypes, torchao.quantization
def there():
    names = ("int4_weight_only", "int8_dynamic_activation_int4_weight")
    owners = [*((torchao.quantization, name) for name in names)]
    return [hasattr(*pair) for pair in (*owners, (torchao.dtypes, "TensorCoreTiledLayout"))]
before, moved = there(), find_spec("torchao.dtypes.nf4tensor") is None
from torchtune.training.quantization import Int8DynActInt4WeightQuantizer
from torchtune.modules.common_utils import NF4Tensor
from torchao.dtypes.nf4tensor import NF4Tensor as named
assert there() == before and named is NF4Tensor
home = "torchao.quantization.quantize_.workflows.nf4.nf4_tensor"
assert NF4Tensor.__module__ == (home if moved else "torchao.dtypes.nf4tensor")
assert not moved or sys.modules[home].__spec__.name == home
if not before[1]:
    try:
        Int8DynActInt4WeightQuantizer().quantize(None)
    except NotImplementedError as error:
        told = "calls torchao's int8_dynamic_activation_int4_weight, which torchao "
        assert told in str(error) and "\\n" not in str(error), error
    else:
        raise AssertionError
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(("command", "loaded"), [("run", False), ("download", True)])
def test_a_run_does_without_what_downloads_need(command: str, loaded: bool) -> None:
    """Whoever imports kagglehub later has the true one."""
    code = """
import sys
sys.argv = ["tune", *sys.argv[1:]]
from torchtune._cli import download, tune
print("kagglehub" in sys.modules, download.model_download is not None)
import kagglehub, kagglehub.auth
print(callable(kagglehub.model_download), callable(kagglehub.auth.set_kaggle_credentials))
"""
    printed = subprocess.check_output([sys.executable, "-c", code, command], text=True).split()
    assert printed == [str(loaded), str(loaded), "True", "True"]
