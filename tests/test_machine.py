"""What is chosen for a machine: by faked flags and files, where this one has but one kind."""

import os
import time
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from emarecipes import machine
from emarecipes.config import Origin

ORIGIN = Origin(Path("c.yaml"), {"dtype": 3})


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_shared", {})


def cpu(monkeypatch: pytest.MonkeyPatch, *, promised: bool, speed: float | None = None) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: promised)
    if speed is not None:
        monkeypatch.setattr(machine, "bf16_speed", lambda: speed)


def settled(
    caplog: pytest.LogCaptureFixture,
    dtype: str = "auto",
    kept: str | None = None,
) -> tuple[str, str]:
    cfg: DictConfig = OmegaConf.create({"device": "cpu", "dtype": dtype})
    machine.log.propagate = True
    caplog.clear()
    with caplog.at_level("INFO"):
        machine.settle_dtype(cfg, ORIGIN, kept)
    return cfg.dtype, caplog.text


@pytest.mark.parametrize(
    ("architecture", "promised", "speed", "dtype"),
    [
        ("x86_64", False, None, "fp32"),  # Flags are enough: nothing is timed.
        ("x86_64", True, 1.8, "bf16"),
        ("x86_64", True, 0.1, "fp32"),  # As with ONEDNN_MAX_CPU_ISA=AVX2 on such a CPU.
        ("aarch64", False, 2.0, "bf16"),
        ("aarch64", False, 0.5, "fp32"),
    ],
)
def test_a_cpu_computes_in_what_it_has_units_for(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    architecture: str,
    promised: bool,
    speed: float | None,
    dtype: str,
) -> None:
    monkeypatch.setattr(machine.platform, "machine", lambda: architecture)

    def not_timed() -> float:
        raise AssertionError("timed")

    cpu(monkeypatch, promised=promised, speed=speed)
    if speed is None:
        monkeypatch.setattr(machine, "bf16_speed", not_timed)
    found, said = settled(caplog)
    assert found == dtype
    assert f"dtype: {dtype} (" in said


@pytest.mark.parametrize(("native", "dtype"), [(True, "bf16"), (False, "fp32")])
def test_a_gpu_by_its_units(monkeypatch: pytest.MonkeyPatch, native: bool, dtype: str) -> None:
    asked: list[bool] = []

    def supported(including_emulation: bool = True) -> bool:
        asked.append(including_emulation)
        return native or including_emulation

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert machine.native_precision("cuda").dtype == dtype
    assert asked == [False]


def test_what_goes_on_keeps_its_dtype_and_says_so(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(machine.platform, "machine", lambda: "x86_64")
    cpu(monkeypatch, promised=False, speed=0.1)
    found, said = settled(caplog, kept="bf16")
    assert found == "bf16"
    assert "dtype: bf16, as what goes on was begun; this machine would choose fp32" in said


def test_slow_bf16_is_possible_and_told(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(machine.platform, "machine", lambda: "x86_64")
    cpu(monkeypatch, promised=False, speed=0.125)
    found, said = settled(caplog, dtype="bf16")
    assert found == "bf16"
    assert "c.yaml:3: dtype: bf16 products run at 0.12 of fp32's rate on this CPU" in said
    cpu(monkeypatch, promised=True, speed=2.0)
    monkeypatch.setattr(machine, "_shared", {})
    assert settled(caplog, dtype="bf16") == ("bf16", "")


def test_the_measured_ratio_is_one_of_times() -> None:
    x, w = torch.ones(256, 512), torch.ones(512, 512)
    assert torch.equal((x.bfloat16() @ w.bfloat16()).float(), x @ w)  # Both do the same work.
    assert 0 < machine.bf16_speed() < 100


def test_waiting_is_no_part_of_a_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine with other work a product waits for its turn: bf16 units were not seen there."""
    tried = []
    for _ in range(5):  # Units that have just woken up are slower.
        machine.bf16_speed.cache_clear()
        tried.append(machine.bf16_speed())
    alone = max(tried)
    product, before = torch.mm, torch.get_num_threads()

    def waits(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        time.sleep(0.05 if x.dtype == torch.bfloat16 else 0)
        return product(x, w)

    monkeypatch.setattr(torch, "mm", waits)
    machine.bf16_speed.cache_clear()
    torch.set_num_threads(2)
    try:
        assert machine.bf16_speed() == pytest.approx(alone, rel=0.8)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
        machine.bf16_speed.cache_clear()


@pytest.mark.parametrize(
    ("lines", "files", "cores"),
    [
        ("0::/\n", {"cpu.max": "200000 100000"}, 2),  # A container, as it sees itself.
        ("0::/\n", {"cpu.max": "50000 100000"}, 1),  # Less than one core.
        ("0::/\n", {"cpu.max": "150000 100000"}, 2),
        ("0::/\n", {"cpu.max": "max 100000"}, 64),
        ("0::/a/b\n", {"a/cpu.max": "300000 100000", "a/b/cpu.max": "max 100000"}, 3),
        (
            "4:cpu,cpuacct:/job\n0::/\n",
            {"cpu,cpuacct/job/cpu.cfs_quota_us": "100000",
             "cpu,cpuacct/job/cpu.cfs_period_us": "50000"},
            2,
        ),
        (
            "4:cpu:/job\n",
            {"cpu/job/cpu.cfs_quota_us": "-1", "cpu/job/cpu.cfs_period_us": "100000",
             "cpu/cpu.cfs_quota_us": "400000", "cpu/cpu.cfs_period_us": "100000"},
            4,
        ),
        ("4:memory:/job\n", {"memory/job/cpu.max": "100000 100000"}, 64),
        ("", {}, 64),
    ],
)  # fmt: skip
def test_cores_are_those_that_quotas_allow(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    lines: str,
    files: dict[str, str],
    cores: int,
) -> None:
    (tmp_path / "self").write_text(lines)
    for name, text in files.items():
        (tmp_path / "fs" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "fs" / name).write_text(text + "\n")
    monkeypatch.setattr(machine, "_OWN_CGROUPS", tmp_path / "self")
    monkeypatch.setattr(machine, "_CGROUPS", tmp_path / "fs")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    assert machine.usable_cores() == cores


@pytest.mark.parametrize(
    ("variable", "given_to_tune", "workers", "threads", "said"),
    [
        (None, None, 1, 8, False),
        ("3", None, 1, 3, False),
        ("3", "3", 1, 3, False),
        ("1", "", 2, 4, False),  # torchrun's own 1 is nobody's wish.
        ("1", "1", 2, 1, False),
        ("0", None, 1, 8, True),
        ("many", None, 1, 8, True),
        ("4,2", None, 1, 4, False),
    ],
)
def test_threads_are_the_share_of_the_cores_or_what_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    variable: str | None,
    given_to_tune: str | None,
    workers: int,
    threads: int,
    said: bool,
) -> None:
    for name, value in (
        ("OMP_NUM_THREADS", variable),
        (machine.GIVEN_THREADS, given_to_tune),
        ("LOCAL_WORLD_SIZE", str(workers)),
    ):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    asked: list[int] = []
    monkeypatch.setattr(machine, "usable_cores", lambda: 8)
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    machine.log.propagate = True
    with caplog.at_level("INFO"):
        machine.set_threads()
    assert asked == [threads]
    assert (f"OMP_NUM_THREADS={variable} is no number of threads; using 8" in caplog.text) == said
