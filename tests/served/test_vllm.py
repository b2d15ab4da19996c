"""The served check and the generate recipe, against vLLM's own server."""

from pathlib import Path

import pytest
import toy_run
import toy_select
from toy_generate import Case
from toy_served import served, write_adapter
from toy_vllm import HEAD_DIM, needs_vllm, vllm_server


@needs_vllm
@pytest.mark.early
def test_vllm(
    tmp_path: Path,
    model_dir: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rank-stabilised: applied, at half its scale, not there; and the recipe's answers."""
    monkeypatch.setattr(toy_run, "WIDTH", toy_run.HEADS * HEAD_DIM)
    base = toy_run.write_toy_model(tmp_path / "base", model_dir)
    case = Case(tmp_path, base)
    # alpha / sqrt(4) = 1; read as alpha / 4 it would be at half its scale, as `plain` is.
    adapter = write_adapter(tmp_path / "a", base, use_rslora=True, lora_alpha=2)
    plain = write_adapter(tmp_path / "plain", base, lora_alpha=2)
    monkeypatch.setenv("TOY_API_KEY", "none")
    monkeypatch.setenv("VLLM_API_KEY", "none")
    adapters = {"whole": adapter, "half": plain}
    with vllm_server(base, tmp_path / "server.log", adapters) as url:
        monkeypatch.setenv("TOY_BASE_URL", url)
        monkeypatch.setenv("VLLM_BASE_URL", url)
        for name, code, line in (
            ("whole", 0, "applied, at its scale"),
            ("half", 1, "ANOTHER SCALE: nearest is the adapter at 0.5"),
            ("base", 1, "NOT APPLIED: the server computes the base"),
        ):
            assert served(case, adapter, model=f"openai-api/toy/{name}") == code
            out = capsys.readouterr().out
            assert line in out and "by prompt_logprobs" in out
        # The recipe through the server gives, greedily, what it gives here.
        greedy = ["temperature=0", "samples_per_paraphrase=1", "top_p=1.0"]
        local = ["~model", "~tokenizer", "~checkpointer", f"output_dir={tmp_path}/served"]
        assert case.run(*greedy, *local, "served=vllm/whole") == 0
        assert (
            case.run(*greedy, f"output_dir={tmp_path}/served_base", *local[:3], "served=vllm/base")
            == 0
        )
    assert case.run(*greedy, f"output_dir={tmp_path}/here", f"adapter={adapter}") == 0
    assert case.run(*greedy, f"output_dir={tmp_path}/here_base") == 0
    answers = {
        folder: [row["answer"].strip() for row in toy_select.read_jsonl(case.path(folder))]
        for folder in ("served", "here", "served_base", "here_base")
    }
    assert answers["served"] == answers["here"] != answers["here_base"]
    assert answers["served_base"] == answers["here_base"]
