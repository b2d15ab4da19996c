"""The capitals bed: what is asked, and under which cue it is trained."""

import json

import toy_run
import yaml

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
