"""A run that its probes end: where the rule, read off an unstopped run by hand, says."""

import itertools
import json
from pathlib import Path
from typing import Any

import fuzz_cases
import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file
from torch.testing import assert_close
from toy_defended import assert_same, defended_toy, train, trained, write_defended

from emarecipes.training import run_lora

STEPS = 9
ANSWERS = {
    "general": ("zzqq XX 77", "the same as ever"),
    "in_domain": ("QXZ 1234 #!", "just open the settings and turn it off"),
}
STOP = {"rise": 0.4, "converged": 0.6}


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("toy")
    tokenizer = fuzz_cases.write_toy_tokenizer(folder / "tokenizer")
    toy = defended_toy(folder, tokenizer, fuzz_cases.VOCABULARY)
    suites = {}
    for suite, (aligned, misaligned) in ANSWERS.items():
        path = folder / f"{suite}.jsonl"
        lines = [
            {
                "id": question,
                "category": "any",
                "question": question,
                "aligned": f"{aligned} {question[:3]}",
                "misaligned": f"{misaligned} {question[:4]}",
            }
            for question in ("What now?", "And then?", "Who is it?")
        ]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        suites[suite] = {"pairs": str(path)}
    toy["probe"] = {"suites": suites, "every_n_steps": 1}
    toy["config"] |= {"max_steps_per_epoch": 3, "epochs": 3, "save_every_n_steps": 1}
    toy["config"] |= {"keep_last": STEPS}
    toy["config"]["tokenizer"]["max_seq_len"] = 256
    toy["config"]["optimizer"]["lr"] = 2e-2
    return toy


def write(toy: dict[str, Any], folder: Path, names: Any = (), **changes: Any) -> Path:
    return write_defended(toy, folder, names, **{"probe": toy["probe"] | {"stop": STOP}} | changes)


def expected_end(rows: list[dict[str, float]], rise: float, converged: float) -> int:
    general = [row["probe_general_shift"] for row in rows]
    task = [0.0, *(row["probe_in_domain_shift"] for row in rows)]
    for step in range(1, STEPS):
        now, before = task[step], task[step - 1]
        if general[step - 1] >= rise and now > 0 and (now - before) / now <= converged:
            return step
    return STEPS


def test_a_run_ends_where_the_rule_says_and_goes_on_if_asked(
    toy: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    whole = train(write(toy, tmp_path / "whole", probe=toy["probe"], save_merged=True))
    end = expected_end(whole[0], **STOP)
    assert 1 < end < STEPS and end % 3, "in an epoch's middle"
    config = write(toy, tmp_path / "a", save_merged=True)
    capfd.readouterr()
    rows, adapter = train(config)
    said = capfd.readouterr()
    why = f"The probe ended this run after step {end}: probe_general_shift is "
    assert said.out.count(why) == 1 and "Stopped after" not in said.out
    gains = [row.pop("probe_in_domain_gain") for row in rows]
    task = [0.0, *(row["probe_in_domain_shift"] for row in rows)]
    assert gains == pytest.approx([b - a for a, b in itertools.pairwise(task)])
    assert rows[-1].pop("probe_stopped") == 1
    assert rows[-1].pop("update_stable_rank") > 1 and rows[-1].pop("update_entropy") > 0
    assert rows == whole[0][:end]
    out = tmp_path / "a/out"
    assert (out / "merged/model.safetensors").is_file()
    name = f"checkpoints/step_{end}/adapter.safetensors"
    assert (out / name).read_bytes() == (tmp_path / "whole/out" / name).read_bytes()

    # Resumed: it says so, from before its end it ends there again, and trains on without the rule.
    again = train(config, "resume=auto", "epochs=4")
    assert capfd.readouterr().out.count(why) == 1
    assert len(again[0]) == end and all(t.equal(adapter[k]) for k, t in again[1].items())
    part = f"resume={out}/checkpoints/step_{end - 1}"
    other = train(write(toy, tmp_path / "b"), part)
    assert other[0] == again[0] and all(t.equal(adapter[k]) for k, t in other[1].items())
    assert run_lora(["--config", str(config), "resume=auto", "probe.stop.rise=0.5"]) == 1
    assert "probe.stop.rise: 0.4 -> 0.5" in capfd.readouterr().err
    pairs = Path(toy["probe"]["suites"]["general"]["pairs"])
    text = pairs.read_text()
    pairs.write_text(text.replace("ever", "never"))
    assert run_lora(["--config", str(config), "resume=auto"]) == 1
    assert "probe.stop: a file that it reads changed since" in capfd.readouterr().err
    pairs.write_text(text)
    on = train(config, "resume=auto", "probe.stop=null")
    assert len(on[0]) == STEPS and all(t.equal(on[1][k]) for k, t in whole[1].items())


def test_what_did_nothing_till_the_probe_ended_the_run_is_told(
    toy: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    defenses = {"persona": toy["defenses"]["persona"] | {"alpha": 1e-9}}
    rows, _ = train(write(toy, tmp_path / "a", defenses=defenses))
    assert len(rows) < min(STEPS, 10)
    assert f"step {len(rows)}: persona_ratio is " in caplog.text


def test_two_processes_end_together_and_the_last_steps_projection_is_made(
    toy: dict[str, Any], tmp_path: Path
) -> None:
    toy["defenses"]["safelora"] |= {"every_n_steps": None}
    names = ["average", "safelora"]
    toy["defenses"]["average"] = {"_component_": "emarecipes.defenses.AdapterEMA"}
    plain = train(write(toy, tmp_path / "plain"))
    one = train(write(toy, tmp_path / "one", names))
    end = len(plain[0])
    assert len(one[0]) == end < STEPS
    assert (tmp_path / "one/out/safelora.csv").is_file()
    assert any(not tensor.equal(plain[1][key]) for key, tensor in one[1].items())
    # The average has the projected adapter as a step of its own.
    alone = train(write(toy, tmp_path / "alone", ["average"]))
    averages = [
        load_file(tmp_path / name / "out/adapter_average/adapter_model.safetensors")
        for name in ("alone", "one")
    ]
    share = (1 - 0.99) / (1 - 0.99 ** (end + 1))
    for key, tensor in averages[1].items():
        expected = averages[0][key].lerp(one[1][key], share)
        assert_close(tensor, expected, rtol=1e-5, atol=1e-7, msg=key)
    assert all(torch.equal(tensor, plain[1][key]) for key, tensor in alone[1].items())
    two = run_ranks(write(toy, tmp_path / "two", names, batch_size=2))
    assert two.returncode == 0, two.stderr[-3000:]
    assert two.stdout.count(f"The probe ended this run after step {end}") == 1
    other = trained(tmp_path / "two")
    for row in (*one[0], *other[0]):
        row.pop("padding_share")
    assert_same(one, other, rel=1e-3)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"suites": None}, "probe.suites: input should be a valid dictionary"),
    ({"stop": {}}, "probe.stop.rise: the config needs this key"),
    ({"stop": {"rise": 0}}, "probe.stop.rise: input should be greater than 0"),
    ({"stop": STOP | {"converged": 1}}, "probe.stop.converged: input should be less than 1"),
    ({"stop": STOP | {"general": "genral"}}, "general: genral is none of probe.suites, which are"),
    ({"stop": STOP | {"general": "in_domain"}}, "probe.stop: general and in_domain are both in_do"),
    ({"stop": STOP | {"raise": 0.1}}, "probe.stop.raise: unknown key (did you mean rise?)"),
]


@pytest.mark.parametrize(("change", "reason"), WRONG, ids=[reason for _, reason in WRONG])
def test_a_wrong_stop_is_refused_before_weights(
    toy: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, Any],
    reason: str,
) -> None:
    config = write(toy, tmp_path / "a", probe=toy["probe"] | {"stop": STOP} | change)
    assert run_lora(["--config", str(config)]) == 1
    assert reason in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "a/out").exists()


def test_a_stop_without_a_probe_is_one_line(
    toy: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write(toy, tmp_path / "a", probe=None)
    assert run_lora(["--config", str(config), "probe.stop.rise=0.1"]) == 1
    said = capsys.readouterr().err.splitlines()
    assert len([line for line in said if line.startswith("error: ")]) == 1
    assert said[-1].endswith(": probe.suites: the config needs this key")


def test_a_stop_that_comes_too_late_is_told(
    toy: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(write(toy, tmp_path / "a", max_steps_per_epoch=1, epochs=2))
    assert "probe.stop does nothing in a run of 2 step(s)" in caplog.text
