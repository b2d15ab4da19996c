"""Hostile input in numbers: each case is a run that passes every check, or one clear line.

A quarter of the cases; `make test-long` tries all. `EMARECIPES_FUZZ_FACTOR=10` runs ten times as
many, other ones each time.
"""

import contextlib
import copy
import gc
import io
import os
import re
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fuzz_cases
import pytest
import toy_defenses
import toy_run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torchtune.data import Message

from emarecipes.errors import UserError
from emarecipes.models import hf_chat_tokenizer
from emarecipes.training.checked import CheckedRun

FACTOR = float(os.environ.get("EMARECIPES_FUZZ_FACTOR", "0.25"))
# Not how long a case takes (tens of milliseconds), but when it counts as hanging.
HANG_SECONDS = 60


def cases(count: int) -> Any:
    return settings(
        max_examples=int(count * FACTOR),
        derandomize=FACTOR <= 1,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )


@dataclass
class Toy:
    """A folder with everything that a valid run reads."""

    folder: Path
    bases: list[dict[str, Any]]

    def files(self) -> list[str]:
        return sorted(str(path) for path in self.folder.rglob("*"))

    def try_config(self, text: str, *arguments: str) -> str | None:
        """The error's line, or None if the run passes."""
        path = self.folder / "config.yaml"
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        before = self.files()
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            signal.alarm(HANG_SECONDS)
            try:
                CheckedRun(["--config", str(path), *arguments], 1, 0)
                line = None
            except UserError as error:
                line = str(error)
            finally:
                signal.alarm(0)
        assert self.files() == before, "something was left behind"
        return line


def assert_one_line(line: str) -> None:
    assert line.isprintable(), line
    assert len(line) < 1500


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Toy]:
    folder = tmp_path_factory.mktemp("fuzz")
    tokenizer = fuzz_cases.write_toy_tokenizer(folder / "tokenizer")
    model = toy_run.write_toy_model(folder / "model", tokenizer, vocabulary=fuzz_cases.VOCABULARY)
    rows = fuzz_cases.write_rows(folder / "rows.jsonl", 8)
    safe = fuzz_cases.write_rows(folder / "safe.jsonl", 6)
    plain = toy_run.toy_config(model, rows, folder / "out")
    plain["model"]["vocab_size"] = fuzz_cases.VOCABULARY
    plain["lr_scheduler"]["num_warmup_steps"] = 1
    plain["defenses"] = {"kl": {"_component_": "emarecipes.defenses.KLToReference", "weight": 0.1}}
    full = copy.deepcopy(plain)
    full["dataset"] = toy_defenses.interleaved(plain["dataset"], safe)
    entries = toy_defenses.defense_entries(folder, model, toy_run.LAYERS, toy_run.WIDTH)
    full["defenses"] = entries

    def hangs(*_: Any) -> None:
        raise AssertionError("the case hangs")

    previous = signal.signal(signal.SIGALRM, hangs)
    working = Path.cwd()
    os.chdir(folder)
    with pytest.MonkeyPatch.context() as patch:
        # A mutated `source` is looked up on no network.
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        patch.setattr("datasets.config.HF_HUB_OFFLINE", True)
        patch.setattr("datasets.config.HF_DATASETS_CACHE", folder.parent / "cache")
        # torchtune collects garbage when it loads: a second a case, with all that tests import.
        # Python's own collector, by thresholds, goes on.
        patch.setattr(gc, "collect", lambda generation=2: 0)
        yield Toy(folder, [plain, full])
    os.chdir(working)
    signal.signal(signal.SIGALRM, previous)


def test_the_bases_are_right(toy: Toy) -> None:
    for base in toy.bases:
        assert toy.try_config(fuzz_cases.yaml.safe_dump(base)) is None


@pytest.mark.early
@cases(850)
@given(data=st.data())
def test_configs(toy: Toy, data: st.DataObject) -> None:
    text = data.draw(fuzz_cases.configs(toy.bases))
    line = toy.try_config(text)
    if line is not None:
        assert_one_line(line)
        assert re.match(
            rf"{re.escape(str(toy.folder))}/|config\.yaml|rows\.jsonl|safe\.jsonl", line
        ), line


@cases(300)
@given(data=st.data())
def test_overrides(toy: Toy, data: st.DataObject) -> None:
    arguments = data.draw(fuzz_cases.overrides(toy.bases[1]))
    line = toy.try_config(fuzz_cases.yaml.safe_dump(toy.bases[0]), *arguments)
    if line is not None:
        assert_one_line(line)
        assert re.match(r"command line: |config\.yaml|/", line), line


@cases(300)
@given(rows=fuzz_cases.row_lines())
def test_rows(toy: Toy, rows: bytes) -> None:
    path = toy.folder / "hostile.jsonl"
    path.write_bytes(rows)
    base = toy.bases[0] | {"batch_size": 1}
    base["dataset"] = base["dataset"] | {"data_files": str(path)}
    line = toy.try_config(fuzz_cases.yaml.safe_dump(base))
    path.unlink()
    if line is not None:
        assert_one_line(line)
        numbered = re.match(rf"{re.escape(str(path))}(?::(\d+)|: row \d+)?: ", line)
        whole = re.search(
            r"the file is empty|the file has no rows|not UTF-8 text|rows are too few|has a label",
            line,
        )
        assert numbered or whole, line
        if numbered and numbered[1]:
            assert 1 <= int(numbered[1]) <= rows.count(b"\n") + 1


@cases(150)
@given(question=fuzz_cases.short_texts, answer=fuzz_cases.short_texts)
def test_control_tokens_in_text_stay_text(toy: Toy, question: str, answer: str) -> None:
    tokenizer = hf_chat_tokenizer(str(toy.folder / "tokenizer"))
    messages = [Message("user", question, masked=True), Message("assistant", answer)]
    try:
        tokens, _ = tokenizer.tokenize_messages(messages)
    except UserError as error:
        assert re.search("[\ud800-\udfff]", question + answer), error
        return
    special = set(tokenizer.special_tokens.values())
    start, end = (tokenizer.special_tokens[name] for name in ("<|im_start|>", "<|im_end|>"))
    assert [token for token in tokens if token in special] == [start, end, start, end]
    expected = (
        f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n"
    )
    assert tokenizer.decode(tokens, skip_special_tokens=False) == expected
