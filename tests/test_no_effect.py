"""What came to nothing is told: two names for one adapter, a term of no step, a projection."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from emarecipes.defenses import ModelSource, PersonaSteering
from emarecipes.defenses.projection import ModuleProjection
from emarecipes.defenses.safelora import write_projection_report
from emarecipes.evaluation.run import _Evaluation
from emarecipes.training.run_log import print_summary


def test_two_names_for_one_adapter(capsys: pytest.CaptureFixture[str]) -> None:
    def tell(**digests: str) -> str:
        scorer = SimpleNamespace(adapter_fingerprint=lambda path: digests[path])
        evaluation: Any = SimpleNamespace(adapters={n: n for n in digests}, scorer=scorer)
        _Evaluation.tell_same(evaluation)
        return capsys.readouterr().out

    assert tell(a="1", b="2", c="1") == "a and c are the same adapter: their files do not differ.\n"
    assert tell(a="1", b="2") == ""


def test_a_term_that_no_step_had_rows_for(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def summary(**weights: float) -> str:
        figures = {"loss": 1.0, "ce": 1.0, "kl": 0.5}
        counters: Any = SimpleNamespace(
            step=2, tokens=9, seconds=1.0, skipped=0, first=figures, last=figures
        )
        loss: Any = SimpleNamespace(names=["ce", *weights], weights=[1.0, *weights.values()])
        print_summary(loss, counters, 0, output_dir=tmp_path, ended=None)
        return capsys.readouterr().out

    expected = "No step had rows for own: without effect in this run."
    assert expected in summary(kl=0.1, own=1.0)
    assert "without effect" not in summary(kl=0.1, own=0.0)


def test_a_projection_that_changed_no_layer(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one = ModuleProjection("layers.0", 0.9, False, 1.0, 1.0, torch.ones(1, 1), torch.ones(1, 1))
    write_projection_report(tmp_path / "a.csv", [one, one._replace(name="layers.1", changed=True)])
    assert not caplog.text
    write_projection_report(tmp_path / "a.csv", [one])
    assert "SafeLoRA changed none of 1 layers" in caplog.text


def test_vectors_of_another_model(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of the same shape, they would steer as any direction does."""

    def told(model: str | None) -> str:
        caplog.clear()
        path = tmp_path / "v.safetensors"
        metadata = None if model is None else {"model": model}
        save_file({"persona": torch.ones(3, 4)}, path, metadata=metadata)
        layers: Any = SimpleNamespace(
            layers=[0, 0], tok_embeddings=SimpleNamespace(embedding_dim=4)
        )
        source = ModelSource(layers, tmp_path / "trained", "LLAMA3")
        PersonaSteering(str(path), layer=1).check(source)
        return caplog.text

    assert told(None) == told("trained") == ""
    assert "was made with other, and trained is trained" in told("other")
