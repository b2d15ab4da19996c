"""The day in the prompts, in whole runs: written down, kept, and one for what is compared."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import toy_compare
import toy_run
from omegaconf import OmegaConf

from emarecipes import clock
from emarecipes.comparison.arms import expand_arms, make_jobs
from emarecipes.comparison.in_common import DATE_FILE, keep_common
from emarecipes.errors import UserError
from emarecipes.evaluation.checked import CheckedEvaluation
from emarecipes.evaluation.run import run_eval
from emarecipes.generation.checked import CheckedGeneration
from emarecipes.generation.run import generate
from emarecipes.models.chat.dates import adapter_date
from emarecipes.persona.checked import CheckedExtraction
from emarecipes.selection.checked import CheckedSelection
from emarecipes.training import run_lora
from emarecipes.training.checked import CheckedRun

TEMPLATE = """\
<|im_start|>system
Today Date: {{ strftime_now('%d %b %Y') }}<|im_end|>
{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
QUESTIONS = "- {id: tea, paraphrases: [Make tea., Tea.]}\n"
MONDAY, TUESDAY, FRIDAY = "2026-11-30", "2026-12-01", "2026-12-04"
KEYS = ("output_dir", "tokenizer", "model", "checkpointer", "device", "dtype")


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Move the clock to a day."""
    return lambda day: monkeypatch.setattr(clock, "local_day", lambda: day)


class Toy:
    """A model whose template prints the day, and a run of one step, trained on a Monday."""

    def __init__(self, folder: Path, model_dir: Path) -> None:
        self.folder, self.out = folder, folder / "run"
        self.model = toy_run.write_toy_model(folder / "model", model_dir)
        self.template = self.model / "chat_template.jinja"
        self.template.write_text(TEMPLATE)
        self.rows = toy_run.write_rows(folder / "rows.jsonl", 16)
        self.config = toy_run.toy_config(self.model, self.rows, self.out) | {
            "max_steps_per_epoch": 1,
            "save_every_n_steps": 1,
        }
        self.path = str(toy_run.write_config(folder / "train.yaml", self.config))
        (folder / "asked.yaml").write_text(QUESTIONS)
        assert run_lora(["--config", self.path]) == 0

    def written(self, **keys: Any) -> str:
        """A config with the model, tokenizer and these keys."""
        config = {key: self.config[key] for key in KEYS} | keys
        path = self.folder / f"{hashlib.sha256(repr(keys).encode()).hexdigest()[:8]}.yaml"
        return str(toy_run.write_config(path, config))

    def generation(self, output: Path, adapter: Path | None, *overrides: str) -> CheckedGeneration:
        keys = {"questions": [str(self.folder / "asked.yaml")], "max_new_tokens": 2}
        config = self.written(output_dir=str(output), adapter=adapter and str(adapter), **keys)
        return CheckedGeneration(["--config", config, *overrides])


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Toy:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clock, "local_day", lambda: MONDAY)
        return Toy(tmp_path_factory.mktemp("dated"), model_dir)


def test_a_run_that_is_resumed_keeps_its_day(
    toy: Toy, tmp_path: Path, on: Callable[[str], None], capfd: pytest.CaptureFixture[str]
) -> None:
    assert OmegaConf.load(toy.out / "config.yaml").tokenizer.date == MONDAY
    assert adapter_date(toy.out / "adapter") == MONDAY
    out = Path(shutil.copytree(toy.out, tmp_path / "run"))
    resumed = ["--config", toy.path, f"output_dir={out}", "epochs=2", "resume=auto"]
    on(TUESDAY)
    again = CheckedRun(resumed, world_size=1, rank=0)
    assert again.tokenizer.date == again.cfg.tokenizer.date == MONDAY
    assert again.description(1)["config"]["tokenizer"]["date"] == MONDAY
    with pytest.raises(UserError, match=rf"tokenizer\.date: '{MONDAY}' -> '{TUESDAY}'"):
        CheckedRun([*resumed, f"tokenizer.date={TUESDAY}"], world_size=1, rank=0)

    # A checkpoint of before there was the key: the rows tell, and it can be mended.
    state = out / "checkpoints/step_1/run.json"
    before = hashlib.sha256(state.read_bytes()).hexdigest()
    stored = json.loads(state.read_text())
    del stored["config"]["tokenizer"]["date"]
    state.write_text(json.dumps(stored))
    sums = state.with_name("SHA256SUMS")
    now = hashlib.sha256(state.read_bytes()).hexdigest()
    sums.write_text(sums.read_text().replace(before, now))
    with pytest.raises(UserError, match="give the day it began as"):
        CheckedRun(resumed, world_size=1, rank=0)
    assert run_lora([*resumed, f"tokenizer.date={MONDAY}"]) == 0
    assert [row["step"] for row in toy_run.metrics(out)] == [1, 2]


def test_what_is_built_on_a_run_takes_its_day(
    toy: Toy, tmp_path: Path, on: Callable[[str], None]
) -> None:
    on(FRIDAY)
    new = ["--config", toy.path, f"output_dir={tmp_path}"]
    assert CheckedRun(new, 1, 0).tokenizer.date == FRIDAY
    from_adapter = [*new, f"init_adapter={toy.out / 'adapter'}"]
    assert CheckedRun(from_adapter, 1, 0).tokenizer.date == MONDAY
    assert CheckedRun([*from_adapter, f"tokenizer.date={TUESDAY}"], 1, 0).tokenizer.date == TUESDAY
    # A cache that was filled on other days.
    for name, day in (("a", MONDAY), ("b", TUESDAY)):
        (tmp_path / "cache" / name).mkdir(parents=True)
        (tmp_path / "cache" / name / "key.json").write_text(json.dumps({"date": day}))
    assert (
        CheckedRun([*new, f"reference_cache={tmp_path / 'cache'}"], 1, 0).tokenizer.date == TUESDAY
    )

    candidates = {"candidates": str(toy.rows), "num_rows": 2, "output_dir": str(tmp_path / "s")}
    selection = toy.written(adapters=[str(toy.out / "adapter")], **candidates)
    chosen = CheckedSelection(["--config", selection])
    assert chosen.tokenizer.date == MONDAY
    chosen.file.open()
    (tmp_path / "s/scores.jsonl").write_text("")
    shutil.copytree(toy.out / "adapter", tmp_path / "elsewhere/adapter")  # Without its config.yaml.
    moved = [f"adapters=[{tmp_path / 'elsewhere/adapter'}]"]
    with pytest.raises(UserError, match="was made with other adapters;"):  # And no other day.
        CheckedSelection(["--config", selection, *moved])

    prompts = str(toy_run.REPO / "data/persona/ill_will.yaml")
    extraction = toy.written(output_dir=str(tmp_path / "p"), prompts=prompts)
    assert CheckedExtraction(["--config", extraction]).cfg.tokenizer.date == FRIDAY


def test_answers_of_a_suite_are_to_the_same_prompts(
    toy: Toy, tmp_path: Path, on: Callable[[str], None]
) -> None:
    on(TUESDAY)
    tuned, base, adapter = tmp_path / "tuned", tmp_path / "base", toy.out / "adapter"
    generate(toy.generation(tuned, adapter))
    generate(toy.generation(base, None))
    settings = json.loads((tuned / "answers/asked.json").read_text())
    assert settings["fingerprint"]["date"] == settings["config"]["tokenizer"]["date"] == MONDAY
    on(FRIDAY)
    assert toy.generation(base, None).tokenizer.date == TUESDAY, "what is there is gone on with"
    assert toy.generation(base, None).suites[0].is_complete()
    with pytest.raises(UserError, match="holds answers with other date and prompts"):
        toy.generation(base, None, f"tokenizer.date={FRIDAY}")
    assert toy.generation(base, None, "overwrite=true").tokenizer.date == FRIDAY
    toy.template.write_text(TEMPLATE.replace("Today Date", "Today"))
    try:
        with pytest.raises(UserError, match="holds answers with other prompts;"):
            toy.generation(base, None)
    finally:
        toy.template.write_text(TEMPLATE)

    keys = {"adapters": {"a": str(adapter)}, "opswap": {"tiers": [1], "size": 2}}
    config = toy.written(output_dir=str(tmp_path / "eval"), **keys)
    of = {name: f"answers.{name}={tmp_path / name / 'answers'}" for name in ("tuned", "base")}
    with pytest.raises(UserError, match=rf"base.*of {TUESDAY}, answers\.tuned of {MONDAY}; sample"):
        CheckedEvaluation(["--config", config, of["tuned"], of["base"]])
    with pytest.raises(UserError, match=rf"is {FRIDAY}, and answers\.base has .* of {TUESDAY}"):
        CheckedEvaluation(["--config", config, of["base"], f"tokenizer.date={FRIDAY}"])
    assert CheckedEvaluation(["--config", config, of["base"]]).tokenizer.date == TUESDAY
    assert run_eval(["--config", config]) == 0
    assert json.loads((tmp_path / "eval/summary.json").read_text())["date"] == MONDAY
    assert OmegaConf.load(tmp_path / "eval/eval.yaml").tokenizer.date == MONDAY

    # Adapters of two days, with nothing that says which.
    other = tmp_path / "other"
    shutil.copytree(adapter, other / "adapter")
    (other / "config.yaml").write_text(f"tokenizer:\n  date: {TUESDAY}\n")
    with pytest.raises(UserError, match=r"adapters\.a is .*-30, that of adapters\.b is .*-01; say"):
        CheckedEvaluation(["--config", config, f"adapters.b={other / 'adapter'}", "overwrite=true"])


@pytest.mark.parametrize(
    ("arms", "day"),
    [([{}, {}], FRIDAY), ([{}, {"date": TUESDAY}], TUESDAY)],
)
def test_a_comparison_has_one_day_for_all(
    toy: Toy, tmp_path: Path, on: Callable[[str], None], arms: list[dict[str, str]], day: str
) -> None:
    def settled() -> Any:
        own = [{"tokenizer": toy.config["tokenizer"] | arm} for arm in arms]
        plan, origin = toy_compare.plan_of(tmp_path, (toy.model, toy.rows), own)
        return plan, make_jobs(plan, expand_arms(plan, origin), origin)

    on(FRIDAY)
    plan, jobs = settled()
    assert [job.cfg.tokenizer.date for job in jobs] == [day, day]
    task = plan.tasks["narrow"]
    assert task.evaluate.overrides[-1] == task.generate.overrides[-1] == f"tokenizer.date={day}"
    keep_common(plan)
    assert (tmp_path / "out" / DATE_FILE).read_text() == f'{{"date": "{day}"}}\n'
    on("2026-12-05")
    assert [job.fingerprint for job in settled()[1]] == [job.fingerprint for job in jobs]


def test_configs_of_two_days_do_not_compare(toy: Toy, tmp_path: Path) -> None:
    own = [{"tokenizer": toy.config["tokenizer"] | {"date": day}} for day in (MONDAY, TUESDAY)]
    plan, origin = toy_compare.plan_of(tmp_path, (toy.model, toy.rows), own)
    with pytest.raises(UserError, match=rf"arm1: its tokenizer\.date is {TUESDAY}, that of"):
        make_jobs(plan, expand_arms(plan, origin), origin)


def test_nothing_is_written_where_no_clock_is_read(
    toy: Toy, tmp_path: Path, on: Callable[[str], None]
) -> None:
    plain = ["--config", toy.path, f"output_dir={tmp_path}", "tokenizer.chat_template=PLAIN"]
    plain[-1] = plain[-1].replace("PLAIN", str(tmp_path / "plain.jinja"))
    (tmp_path / "plain.jinja").write_text("\n".join(TEMPLATE.splitlines()[2:]))
    assert "date" not in CheckedRun(plain, 1, 0).cfg.tokenizer
    with pytest.raises(UserError, match="tokenizer: date has no effect: the chat template of"):
        CheckedRun([*plain, f"tokenizer.date={MONDAY}"], 1, 0)
    with pytest.raises(UserError, match=r"tokenizer: date must be a day.*not '30\.11\.2026'"):
        CheckedRun(["--config", toy.path, "resume=auto", "tokenizer.date=30.11.2026"], 1, 0)


def test_answers_belong_to_the_arguments_of_the_template(toy: Toy, tmp_path: Path) -> None:
    toy.template.write_text(TEMPLATE.replace("Today Date:", "{{ style }}, Date:"))
    style = "tokenizer.template_arguments.style"
    try:
        generate(toy.generation(tmp_path, None, f"{style}=brief"))
        settings = json.loads((tmp_path / "answers/asked.json").read_text())
        assert settings["config"]["tokenizer"]["template_arguments"] == {"style": "brief"}
        assert toy.generation(tmp_path, None, f"{style}=brief").suites[0].is_complete()
        with pytest.raises(UserError, match="holds answers with other tokenizer and prompts"):
            toy.generation(tmp_path, None, f"{style}=long")
        with pytest.raises(UserError, match=r"tokenizer: template_arguments\.styl has no effect"):
            CheckedRun(["--config", toy.path, "resume=auto", f"{style[:-1]}=brief"], 1, 0)
        with pytest.raises(UserError, match=r"template_arguments\.style: None -> 'brief'"):
            CheckedRun(["--config", toy.path, "resume=auto", f"{style}=brief"], 1, 0)
    finally:
        toy.template.write_text(TEMPLATE)
