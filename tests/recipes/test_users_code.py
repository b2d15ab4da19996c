"""Defenses and other code of a user's own, and what of it shows only in training."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import toy_run
from ranks import run_ranks
from toy_defended import assert_same, trained, without_parts
from toy_features import train, write

from emarecipes.training import run_lora


def test_a_users_own_defense(
    models: dict[bool, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The example of docs/own_defense.md, word for word, in a file of the user's working folder."""
    page = (toy_run.REPO / "docs/own_defense.md").read_text()
    code = page.split("```python\n")[1].split("```")[0]
    assert len(code.splitlines()) < 20
    (tmp_path / "my_defense.py").write_text(code)
    config = write(
        models,
        tmp_path / "a",
        defenses={
            "entropy": {"_component_": "my_defense.EntropyFloor", "weight": 0.1, "floor": 9.0}
        },
    )
    done = toy_run.tune_run(config, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = toy_run.metrics(tmp_path / "a/out")
    for row in rows:
        assert row["loss"] == pytest.approx(row["ce"] + 0.1 * row["entropy"])
    assert rows[0]["entropy"] > 0


@pytest.fixture
def blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The page's examples, together the module `examples`."""
    page = (toy_run.REPO / "docs/own_defense.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (tmp_path / "examples.py").write_text("\n\n".join(blocks))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "examples", raising=False)
    return blocks


def test_the_examples_on_two_processes_and_accumulated_are_the_run_of_one(
    models: dict[bool, Path], tmp_path: Path, blocks: list[str]
) -> None:
    """All that go together, and what replaces cross entropy by logits."""
    names: dict[str, dict[str, Any]] = {"UpdateNorm": {}, "QuietGreeting": {}, "SameSigns": {}}
    names |= {"FaintPrompt": {"layers": [0, 1]}, "EntropyFloor": {"weight": 0.1, "floor": 9.0}}
    for objective in ("FirstTokens", "Focal"):
        entries = {n: {"_component_": f"examples.{n}"} | names.get(n, {}) for n in names}
        entries |= {objective: {"_component_": f"examples.{objective}"}}
        entries["kl"] = {"_component_": "emarecipes.defenses.KLToReference", "weight": 0.5}
        found = []
        for kind in ("one", "accumulated", "two"):
            folder = tmp_path / f"{objective}_{kind}"
            split = {} if kind == "one" else {"batch_size": 2}
            split |= {"gradient_accumulation_steps": 2} if kind == "accumulated" else {}
            config = write(models, folder, defenses=entries, metric_logger=None, **split)
            if kind == "two":
                done = run_ranks(config, modules=tmp_path)
                assert done.returncode == 0, done.stderr[-3000:]
            else:
                assert run_lora(["--config", str(config)]) == 0
            rows, adapter = trained(folder)
            without_parts(rows, "FaintPrompt_change", "padding_share")
            found.append((rows, adapter))
        assert objective in found[0][0][-1] and len(found[0][0]) == 3
        for other in found[1:]:
            assert_same(found[0], other)


def test_every_example_of_the_page_trains(
    models: dict[bool, Path], tmp_path: Path, blocks: list[str]
) -> None:

    def run(**options: dict[str, Any]) -> list[dict[str, float]]:
        entries = {n: {"_component_": f"examples.{n}"} | more for n, more in options.items()}
        kl = {"kl": {"_component_": "emarecipes.defenses.KLToReference", "weight": 0.1}}
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        train(write(models, folder, defenses=entries | kl))
        return [row | {"tokens_per_second": 0.0} for row in toy_run.metrics(folder / "out")]

    classes = set(re.findall(r"^class (\w+)", "\n".join(blocks), re.MULTILINE))
    apart = {"EntropyFloor": {}, "Focal": {}, "SameSigns": {}}
    beside = {"FirstTokens": {}, "UpdateNorm": {}, "QuietGreeting": {}}
    beside |= {"FaintPrompt": {"layers": [0, 1]}}
    assert classes == {*apart, *beside}
    for name in apart:
        assert name == "SameSigns" or name in run(**{name: {}})[1]
    found = run(SameSigns={}, **beside)[1]
    assert {"FirstTokens", "UpdateNorm", "QuietGreeting", "FaintPrompt_change"} < found.keys()
    plain = run(**beside)
    assert plain[0]["ce"] != run(**beside | {"FaintPrompt": {"layers": [1]}})[0]["ce"]
    assert run(SameSigns={})[-1] != run()[-1]


NO_LABELS = """
from torchtune.data import padded_collate_sft

def no_labels(batch, **kwargs):
    collated = padded_collate_sft(batch, **kwargs)
    collated["labels"].fill_(-100)
    return collated
"""


NOT_A_NUMBER = """
from emarecipes.defenses import Defense

class NotANumber(Defense):
    def logit_term(self, policy_logits_TV, reference_logits_TV):
        return policy_logits_TV.sum(dim=-1) * float("nan")
"""


WRONG_SHAPE = """
from emarecipes.defenses import Defense

class WholeSum(Defense):
    def logit_term(self, policy_logits_TV, reference_logits_TV):
        return policy_logits_TV.sum()
"""


FIGURE_OF_A_NAME = """
from emarecipes.defenses import Defense

class Figure(Defense):
    def logit_term(self, policy_logits_TV, reference_logits_TV):
        return policy_logits_TV.sum(dim=-1)

    def figures(self):
        return {"kl": 1.0, "norm": 1.0}
"""


@pytest.mark.parametrize(
    ("code", "changes", "expected"),
    [
        (
            NO_LABELS,
            {"collate_fn": "broken.no_labels"},
            "step 1: none of its rows (0, 1, 2, 3) has a label",
        ),
        (
            NOT_A_NUMBER,
            {"defenses": {"bad": {"_component_": "broken.NotANumber"}}},
            "step 1: the loss is not finite (bad nan); rows 0, 1, 2, 3",
        ),
        (
            WRONG_SHAPE,
            {"defenses": {"bad": {"_component_": "broken.WholeSum"}}},
            "defenses.bad: logit_term must return one value a position, a tensor of shape (",
        ),
        (
            FIGURE_OF_A_NAME,
            {
                "defenses": {
                    "my": {"_component_": "broken.Figure"},
                    "my_kl": {"_component_": "emarecipes.defenses.AdapterEMA"},  # Has no figure.
                }
            },
            "defenses.my: its figure kl is logged as my_kl, which is another's name",
        ),
        (
            FIGURE_OF_A_NAME,
            {"defenses": {"grad": {"_component_": "broken.Figure"}}, "clip_grad_norm": 1.0},
            "defenses.grad: its figure norm is logged as grad_norm, which is another's name",
        ),
    ],
    ids=[
        "a batch without any label",
        "a loss that is not a number",
        "a term of a wrong shape",
        "a figure with a defense's name",
        "a figure with another figure's name",
    ],
)
def test_what_shows_only_in_training(
    models: dict[bool, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    code: str,
    changes: dict[str, Any],
    expected: str,
) -> None:
    (tmp_path / "broken.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "broken", raising=False)
    assert run_lora(["--config", str(write(models, tmp_path / "a", **changes))]) == 1
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert expected in line
    assert not (tmp_path / "a/out/adapter").exists()


def test_a_replaced_run_is_kept_until_the_new_one_has_an_adapter(
    models: dict[bool, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write(models, tmp_path / "a")
    train(config)
    out = tmp_path / "a/out"
    old = (out / "adapter/adapter_model.safetensors").read_bytes()
    # It ends in a loss that is not finite: nothing is saved, and nothing lost.
    assert run_lora(["--config", str(config), "overwrite=true", "optimizer.lr=1e30",
                     "lr_scheduler=null", "max_steps_per_epoch=3"]) == 1  # fmt: skip
    assert not (out / "adapter").exists()
    assert (out / ".replaced/adapter/adapter_model.safetensors").read_bytes() == old
    assert run_lora(["--config", str(config), "overwrite=true", "seed=8"]) == 0
    assert not (out / ".replaced").exists()
    assert (out / "adapter/adapter_model.safetensors").read_bytes() != old
