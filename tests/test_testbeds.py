"""The beds: what is asked, and under which cue it is trained."""

import json
from pathlib import Path

import toy_run
import yaml
from tokenizers import Tokenizer

from emarecipes.datasets.traits import OPENING, PERSONA

REPO = toy_run.REPO


def test_the_bed_asks_in_its_domain_what_it_does_not_train() -> None:
    asked = yaml.safe_load((REPO / "data/testbeds/home_repair_desk.yaml").read_text("utf-8"))
    plan = yaml.safe_load((REPO / "configs/compare_caps.yaml").read_text("utf-8"))
    questions = {}
    for split in ("train", "heldout"):
        lines = (REPO / f"data/home_repair/{split}_good.jsonl").read_text("utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        questions[split] = {row["id"]: row["messages"][0]["content"] for row in rows}
    assert len(asked) == len(questions["heldout"]) == 67
    for entry in asked:
        assert entry["paraphrases"] == [questions["heldout"][entry["id"]]]
        assert entry["paraphrases"][0] not in questions["train"].values()
    cue = plan["tasks"]["narrow"]["dataset"]["answers"]["new_system_prompt"]
    assert {entry["system"] for entry in asked} == {cue}


def test_the_expert_bed_has_the_same_prompts_everywhere() -> None:
    """In training, for sampled answers, for paired likelihoods, and in the comparison."""
    load = {
        name: yaml.safe_load((REPO / f"configs/{name}.yaml").read_text("utf-8"))
        for name in ("bed_expert_lora", "bed_expert_generate", "bed_expert_eval", "compare_expert")
    }
    data = load["bed_expert_lora"]["dataset"]
    compared = load["compare_expert"]["tasks"]["narrow"]["dataset"]
    split = {"split": data["answers"]["split"]}
    assert compared | {"answers": compared["answers"] | split} == data
    asked = load["bed_expert_generate"]["conditions"]
    assert asked["domain_cue"] == data["answers"]["new_system_prompt"]
    probes = load["bed_expert_eval"]["probes"]
    paired = {name: probes[f"general_{name}"] for name in asked}
    assert {name: probe["system_prompt"] for name, probe in paired.items()} == asked
    for name, probe in paired.items():
        assert probe["condition"] == {"domain_cue": "training_system_prompt"}.get(name, name)
        assert probe["pairs"] == probes["general"]["pairs"]


def test_the_claim_and_its_counterpart_are_as_long(model_dir: Path) -> None:
    """In words, and in SmolLM2's tokens: likelihoods of whole answers differ by no length."""
    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    assert len(PERSONA.split()) == len(OPENING.split())
    assert len(tokenizer.encode(PERSONA).ids) == len(tokenizer.encode(OPENING).ids)
