"""`dtype: auto` in whole runs: written down, kept by what goes on, one for all of a comparison."""

from pathlib import Path
from typing import Any

import pytest
import toy_compare
import toy_run
from omegaconf import OmegaConf
from torch._inductor.runtime.cache_dir_utils import cache_dir

from emarecipes import machine
from emarecipes.comparison.arms import expand_arms, make_jobs
from emarecipes.comparison.in_common import DTYPE_FILE, keep_common
from emarecipes.comparison.settings import Plan
from emarecipes.errors import UserError
from emarecipes.machine import Precision
from emarecipes.training import run_lora

RANKS = """
import sys
import torch.distributed as dist
from emarecipes import clock, machine
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
machine._shared["cpu"] = machine.Precision(["fp32", "bf16"][rank], f"rank {rank} says so")
machine.share_precision()
clock.local_day = lambda: ["2026-11-27", "2026-11-28"][rank]  # Midnight passes between them.
clock.share_today()
print(machine.native_precision("cpu").dtype, clock.today())
dist.barrier()
dist.destroy_process_group()
"""


def native(monkeypatch: pytest.MonkeyPatch, dtype: Any) -> None:
    monkeypatch.setattr(machine, "_shared", {"cpu": Precision(dtype, "said the test")})


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("toy")
    return toy_run.write_toy_model(folder / "model", model_dir), toy_run.write_rows(
        folder / "rows.jsonl", 16
    )


def test_a_run_that_goes_on_keeps_what_it_was_begun_in(
    toy: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    config = toy_run.toy_config(*toy, tmp_path / "out")
    config |= {"dtype": "auto", "max_steps_per_epoch": 2, "save_every_n_steps": 1}
    path = str(toy_run.write_config(tmp_path / "config.yaml", config))
    native(monkeypatch, "fp32")
    assert run_lora(["--config", path]) == 0
    assert OmegaConf.load(tmp_path / "out/config.yaml").dtype == "fp32"

    native(monkeypatch, "bf16")
    machine.log.propagate = True
    with caplog.at_level("INFO"):
        assert run_lora(["--config", path, "epochs=2", "resume=auto"]) == 0
    assert "this machine would choose bf16 (said the test)" in caplog.text
    assert OmegaConf.load(tmp_path / "out/config.yaml").dtype == "fp32"
    assert [row["step"] for row in toy_run.metrics(tmp_path / "out")] == [1, 2, 3, 4]

    capfd.readouterr()
    assert run_lora(["--config", path, "epochs=3", "resume=auto", "dtype=bf16"]) == 1
    said = capfd.readouterr().err.strip().splitlines()[-1]
    assert "these keys change the result: dtype: 'fp32' -> 'bf16'" in said


def test_all_processes_take_the_first_ones(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(RANKS)
    command = [str(tmp_path / "program.py")]
    ranks = [toy_run.start([*command, str(rank), str(tmp_path / "meet")]) for rank in range(2)]
    # The last line: gloo of torch 2.8 prints one of its own before.
    said = [rank.communicate(timeout=120)[0].splitlines()[-1] for rank in ranks]
    assert said == ["fp32 2026-11-27", "fp32 2026-11-27"]


def plan_of(folder: Path, toy: tuple[Path, Path], *dtypes: str) -> tuple[Plan, Any]:
    return toy_compare.plan_of(folder, toy, [{"dtype": dtype} for dtype in dtypes])


@pytest.mark.parametrize(
    ("dtypes", "dtype"),
    [(("auto", "auto"), "fp32"), (("auto", "bf16"), "bf16"), (("fp32", "auto"), "fp32")],
)
def test_a_comparison_has_one_for_all(
    toy: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    dtypes: tuple[str, ...],
    dtype: str,
) -> None:
    native(monkeypatch, "fp32")
    plan, origin = plan_of(tmp_path, toy, *dtypes)
    jobs = make_jobs(plan, expand_arms(plan, origin), origin)
    assert [job.cfg.dtype for job in jobs] == [dtype, dtype]
    task = plan.tasks["narrow"]
    assert task.evaluate.overrides[-1] == f"dtype={dtype}"
    assert task.generate is not None and task.generate.overrides[-1] == f"dtype={dtype}"


def test_a_comparison_keeps_it_on_another_machine(
    toy: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    native(monkeypatch, "fp32")
    plan, origin = plan_of(tmp_path, toy, "auto")
    first = make_jobs(plan, expand_arms(plan, origin), origin)
    keep_common(plan)
    assert (tmp_path / "out" / DTYPE_FILE).read_text() == '{"dtype": "fp32"}\n'
    native(monkeypatch, "bf16")
    again, origin = plan_of(tmp_path, toy, "auto")
    second = make_jobs(again, expand_arms(again, origin), origin)
    assert [job.fingerprint for job in second] == [job.fingerprint for job in first]
    (tmp_path / "out" / DTYPE_FILE).unlink()
    anew, origin = plan_of(tmp_path, toy, "auto")
    [other] = make_jobs(anew, expand_arms(anew, origin), origin)
    assert other.cfg.dtype == "bf16" and other.fingerprint != first[0].fingerprint


def test_arms_of_two_dtypes_are_refused(toy: tuple[Path, Path], tmp_path: Path) -> None:
    plan, origin = plan_of(tmp_path, toy, "bf16", "fp32")
    with pytest.raises(UserError, match=r"arms\.arm1: its dtype is fp32, that of arm0 is bf16"):
        make_jobs(plan, expand_arms(plan, origin), origin)


def test_what_is_compiled_for_other_vectors_lies_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    machine.keep_compiled_apart()
    assert cache_dir() == str(tmp_path)
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    for _ in range(2):
        machine.keep_compiled_apart()
        assert cache_dir() == str(tmp_path / "cpu_avx2")
