"""How a failure is told: the last line names the place, and a defense's author gets a traceback."""

import errno
import json
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fuzz_cases
import pytest
import toy_run
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from emarecipes.command import end_launcher, run_alone
from emarecipes.training import run_lora

DEFENSE = '''
import torch
from torchtune.data import Message
from emarecipes.defenses import Defense
from emarecipes.errors import UserError


class Base(Defense):
    """Fails in the method that it is told to."""

    def __init__(self, method: str, weight: float = 1.0) -> None:
        super().__init__(weight=weight)
        self.method = method
        self.fail("__init__")

    def fail(self, method):
        if method == self.method:
            {}["missing " + method]

    def check(self, source):
        self.fail("check")

    def transform_messages(self, messages, source):
        self.fail("transform_messages")
        return [Message("system", "Be brief.", masked=True), *messages]

    def setup(self, model, context):
        self.fail("setup")

    def begin_step(self, step):
        self.fail("begin_step")

    def policy_forward(self, batch):
        self.fail("policy_forward")
        return super().policy_forward(batch)

    def positions(self, batch):
        self.fail("positions")
        return super().positions(batch)

    def after_step(self, model, step):
        self.fail("after_step")

    def state_dict(self):
        self.fail("state_dict")
        return {}

    def figures(self):
        self.fail("figures")
        return {}


class Broken(Base):
    def logit_term(self, policy_TV, reference_TV):
        self.fail("logit_term")
        term_T = policy_TV.square().mean(dim=-1)
        return term_T.detach() if self.method == "detached logits" else term_T


class BrokenStates(Base):
    hidden_layers = (1,)

    def hidden_term(self, policy, reference, batch):
        self.fail("hidden_term")
        term = policy[1].square().sum()
        return term.detach() if self.method == "detached states" else term


class BrokenOnSecondRank(Defense):
    """Fails in one process alone, while the other waits for it."""

    def __init__(self, kind):
        super().__init__(weight=1.0)
        kinds = {"RuntimeError": RuntimeError, "OSError": OSError, "UserError": UserError}
        self.kind = kinds[kind]

    def logit_term(self, policy_TV, reference_TV):
        if torch.distributed.get_rank() == 1:
            raise self.kind("this shard is cursed")
        return policy_TV.mean(dim=-1)
'''
METHODS = [
    "__init__",
    "check",
    "transform_messages",
    "setup",
    "begin_step",
    "policy_forward",
    "positions",
    "logit_term",
    "hidden_term",
    "after_step",
    "figures",
    "state_dict",
]


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("command")
    sys.path.append(str(folder))
    (folder / "broken_defense.py").write_text(DEFENSE)
    tokenizer = fuzz_cases.write_toy_tokenizer(folder / "tokenizer")
    model = toy_run.write_toy_model(folder / "model", tokenizer, vocabulary=fuzz_cases.VOCABULARY)
    rows = fuzz_cases.write_rows(folder / "rows.jsonl", 8)
    config = toy_run.toy_config(model, rows, folder / "out")
    config["model"]["vocab_size"] = fuzz_cases.VOCABULARY
    return folder, config | {"max_steps_per_epoch": 1, "metric_logger": None, "lr_scheduler": None}


def run(
    toy: tuple[Path, dict[str, Any]],
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
    method: str,
    *overrides: str,
) -> tuple[int, str]:
    tmp_path.mkdir(exist_ok=True)
    config = toy[1] | {"output_dir": str(tmp_path / "out")}
    name = "BrokenStates" if method in ("hidden_term", "detached states") else "Broken"
    config["defenses"] = {"mine": {"_component_": f"broken_defense.{name}", "method": method}}
    path = toy_run.write_config(tmp_path / "config.yaml", config)
    code = run_lora(["--config", str(path), *overrides])
    return code, capfd.readouterr().err


@pytest.mark.parametrize("method", METHODS)
def test_an_exception_in_a_users_defense(
    toy: tuple[Path, dict[str, Any]],
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
    method: str,
) -> None:
    code, err = run(toy, capfd, tmp_path, method, "save_every_n_steps=1")
    assert code == 1
    last = err.splitlines()[-1]
    assert last.startswith("error: ")
    name = "BrokenStates" if method == "hidden_term" else "Broken"
    assert f"{name}.{method}, broken_defense.py:" in last
    assert f"missing {method}" in last
    assert err.count("error: ") == 1
    assert "Traceback (most recent call last)" in err
    assert '{}["missing " + method]' in err  # The line of the user's file.


@pytest.mark.parametrize(
    ("method", "name"),
    [("detached logits", "logit_term"), ("detached states", "hidden_term")],
)
def test_a_term_without_gradient(
    toy: tuple[Path, dict[str, Any]],
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
    method: str,
    name: str,
) -> None:
    code, err = run(toy, capfd, tmp_path, method)
    assert code == 1
    assert f"error: defenses.mine: what {name} returns carries no gradient" in err.splitlines()[-1]
    assert "Traceback" not in err
    code, _ = run(toy, capfd, tmp_path / "measured", method, "defenses.mine.weight=0")
    assert code == 0


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("OSError", r"BrokenOnSecondRank.logit_term, broken_defense.py:\d+: OSError: "),
        ("UserError", ""),
    ],
)
def test_one_process_of_two_fails(
    toy: tuple[Path, dict[str, Any]], tmp_path: Path, kind: str, expected: str
) -> None:
    folder, config = toy
    config = config | {"output_dir": str(tmp_path / "out")}
    config["defenses"] = {"mine": {"_component_": "broken_defense.BrokenOnSecondRank"}}
    config["defenses"]["mine"]["kind"] = kind
    path = toy_run.write_config(tmp_path / "config.yaml", config)
    done = toy_run.tune_run(path, processes=2, cwd=folder)
    if "ProcessLookupError" in done.stderr:  # torchrun's own, of a process that ended by itself.
        done = toy_run.tune_run(path, processes=2, cwd=folder)
    assert done.returncode == 1
    lines = done.stderr.strip().splitlines()
    expected = f"error: rank 1: {expected}this shard is cursed"
    assert re.fullmatch(expected, lines[-1]), done.stderr[-3000:]
    assert "FAILED" in done.stderr  # The launcher's summary, above.
    assert "Skipping import of cpp extensions" not in done.stderr


def test_a_full_disk_is_one_line_in_every_recipe(capfd: pytest.CaptureFixture[str]) -> None:
    def write(_: Sequence[str]) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/disk/scores.jsonl")

    assert run_alone("ema_eval", write, []) == 1
    expected = "error: /disk/scores.jsonl: No space left on device; make room\n"
    assert capfd.readouterr().err == expected


def test_a_reader_that_has_gone_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """As `| head` goes: no traceback, nor one when Python ends and flushes what is left."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as output:
        monkeypatch.setattr(sys, "stdout", output)
        assert run_alone("keys", lambda argv: print("text"), []) == 1
    assert capfd.readouterr().err == "error: what reads the output has gone\n"


def test_the_launcher_is_interrupted(capsys: pytest.CaptureFixture[str]) -> None:
    end_launcher(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert capsys.readouterr().err == "error: interrupted\n"


@pytest.mark.parametrize("silent", [0, 1])
def test_a_silent_process_is_the_launchers_first_failure(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, silent: int
) -> None:
    """Both fail within a second, and one leaves no line: the other's ends the output."""
    error_file = tmp_path / "error.json"
    extra = {"timestamp": str(int(time.time()) + 5)}
    message = {"message": "error: why", "line": "error: why", "extraInfo": extra}
    error_file.write_text(json.dumps({"message": message}))
    files = [str(error_file), "none"] if silent else ["none", str(error_file)]
    failures = {rank: ProcessFailure(rank, 100 + rank, 1, file) for rank, file in enumerate(files)}
    failed = ChildFailedError("ema_lora.py", failures)
    assert failed.get_first_failure()[0] == silent
    end_launcher(ChildFailedError, failed, None)
    err = capsys.readouterr().err
    assert err.splitlines()[-1] == "error: why"
    assert "Root Cause" in err


def test_other_exceptions_of_the_launcher_are_python_s(
    capsys: pytest.CaptureFixture[str],
) -> None:
    try:
        raise LookupError("strange")
    except LookupError:
        end_launcher(*sys.exc_info())  # type: ignore[arg-type]
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.endswith("LookupError: strange\n")
