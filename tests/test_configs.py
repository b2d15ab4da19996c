"""Every shipped config: well-formed, its model built on the meta device, its parts by signature."""

import re
from pathlib import Path

import pytest
import toy_run
import yaml
from omegaconf import DictConfig, OmegaConf

from emarecipes import defenses
from emarecipes.components import build, check_components
from emarecipes.config import Origin, load_config
from emarecipes.datasets.questions import load_questions
from emarecipes.datasets.refusals import REFUSAL_WORDS
from emarecipes.defenses import Defense, KLToReference, SafeLoRA
from emarecipes.defenses.safelora_run import ProjectionSettings
from emarecipes.evaluation.settings import check_eval_settings
from emarecipes.generation.checked import check_generate_settings
from emarecipes.machine import settle_dtype
from emarecipes.models._torchtune import model_on_meta
from emarecipes.persona.checked import check_persona_settings
from emarecipes.persona.directions_checked import DirectionsSettings
from emarecipes.persona.prompts import load_prompts
from emarecipes.probes.suites import read_suites
from emarecipes.selection.checked import check_select_settings
from emarecipes.settings import parse_settings
from emarecipes.training.settings import Settings, check_settings

CONFIGS = sorted((toy_run.REPO / "configs").glob("*.yaml"))


# Ends of the names of configs that are for another recipe than ema_lora.
OTHER_RECIPES = (
    "_persona_vectors",
    "_directions",
    "_select",
    "_safelora_posthoc",
    "_generate",
    "_eval",
)


COMPARE = [path for path in CONFIGS if path.stem.startswith("compare_")]


TRAINING = [
    path for path in CONFIGS if path not in COMPARE and not path.stem.endswith(OTHER_RECIPES)
]


SELECT = [path for path in CONFIGS if path.stem.endswith("_select")]


GENERATE = [path for path in CONFIGS if path.stem.endswith("_generate")]


EVAL = [path for path in CONFIGS if path.stem.endswith("_eval")]


PERSONA = [path for path in CONFIGS if path.stem.endswith("_persona_vectors")]


def write_text(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def load(path: Path) -> tuple[DictConfig, Origin]:
    raw, origin = load_config(["--config", str(path), *published(path)])
    cfg = check_settings(raw, origin)
    settle_dtype(cfg, origin)
    return cfg, origin


def published(path: Path) -> list[str]:
    """A folder with the model's own config.json, where `lora_model` reads it."""
    model_dir = yaml.safe_load(path.read_text()).get("model_dir", "")
    folder = toy_run.REPO / "tests/model_configs" / Path(model_dir).name
    return [f"model_dir={folder}"] if (folder / "config.json").is_file() else []


# Numbers of weights as published; Gemma's are of the text: the embedding, 34 layers, the last norm.
GEMMA3_LAYER = 2560 * (2 * 8 * 256 + 2 * 4 * 256 + 3 * 10240) + 4 * 2560 + 2 * 256


SIZES = {
    "qwen3_0_6b_kl": 596_049_920,
    "qwen3_8b_kl": 8_190_735_360,
    "llama3_2_1b_kl": 1_235_814_400,
    "gemma3_4b_kl": 262_208 * 2560 + 34 * GEMMA3_LAYER + 2560,
}


@pytest.mark.parametrize("stem", SIZES)
def test_a_folder_is_a_model(stem: str) -> None:
    """Of the right size, by configs that differ in the model's folder and template alone."""
    cfg, origin = load(toy_run.REPO / f"configs/{stem}.yaml")
    model = model_on_meta(cfg, origin)
    frozen = [p for p in model.parameters() if not p.requires_grad]
    assert sum(p.numel() for p in frozen) == SIZES[stem]
    text, first = (
        re.sub(
            r"  template_arguments: .*\n.*\n",
            "",
            (toy_run.REPO / f"configs/{name}.yaml").read_text().split("\n\n", 1)[1],
        )
        for name in (stem, "qwen3_0_6b_kl")
    )
    lines = zip(text.splitlines(), first.splitlines(), strict=True)
    keys = {one.split(":")[0] for one, other in lines if one != other}
    assert keys <= {"output_dir", "model_dir"}


def test_the_promised_configs_are_there() -> None:
    families = ("smollm2_135m", "llama3_8b", "qwen2_5_7b")
    assert {f"{family}_{arm}" for family in families for arm in ("lora", "kl")} <= {
        path.stem for path in CONFIGS
    }


@pytest.mark.parametrize("path", TRAINING, ids=lambda path: path.stem)
def test_shipped_config(path: Path) -> None:
    cfg, origin = load(path)
    check_components(cfg, origin)
    model = model_on_meta(cfg, origin)
    assert any(p.requires_grad for p in model.parameters())
    assert not all(p.requires_grad for p in model.parameters())
    for name in cfg.defenses:
        assert isinstance(build(cfg, f"defenses.{name}", origin), Defense)
    if path.stem.endswith("_kl"):
        assert isinstance(build(cfg, "defenses.kl", origin), KLToReference)
    assert f"configs/{path.name}" in path.read_text().split("\n\n")[0]


def test_every_later_defense_has_a_config() -> None:
    entries = [e for path in TRAINING for e in load(path)[0].defenses.values()]
    named = {str(entry["_component_"]).rpartition(".")[2] for entry in entries}
    others = {"AdaptedModule", "Defense", "ModelSource", "TrainingContext"}
    assert named == set(defenses.__all__) - others


def test_shipped_safelora_config() -> None:
    path = toy_run.REPO / "configs/smollm2_135m_safelora_posthoc.yaml"
    raw, origin = load_config(["--config", str(path)])
    cfg = OmegaConf.create(parse_settings(raw, origin, ProjectionSettings).model_dump())
    check_components(cfg, origin)
    assert isinstance(build(cfg, "safelora", origin), SafeLoRA)
    header = path.read_text().split("\n\n")[0]
    assert f"recipes/ema_safelora.py --config configs/{path.name}" in header


def test_the_configs_with_all_defenses_have_the_papers() -> None:
    for family in ("smollm2_135m", "llama3_8b"):
        cfg, _ = load(toy_run.REPO / f"configs/{family}_all.yaml")
        found = {str(entry["_component_"]).rpartition(".")[2] for entry in cfg.defenses.values()}
        assert found == {
            "FeatureL2", "InoculationPrompt", "KLToReference", "PersonaSteering", "SafeLoRA"
        }  # fmt: skip
        assert cfg.dataset["_component_"] == "emarecipes.datasets.interleaved_dataset"


@pytest.mark.parametrize("path", PERSONA, ids=lambda path: path.stem)
def test_shipped_persona_config(path: Path) -> None:
    raw, origin = load_config(["--config", str(path)])
    cfg = check_persona_settings(raw, origin)
    settle_dtype(cfg, origin)
    check_components(cfg, origin)
    model_on_meta(cfg, origin)
    assert load_prompts(Path(cfg.prompts)).trait
    assert cfg.output_dir == f"runs/{path.stem}"
    header = path.read_text().split("\n\n")[0]
    assert f"recipes/ema_persona.py --config configs/{path.name}" in header


def test_shipped_directions_config() -> None:
    path = toy_run.REPO / "configs/smollm2_135m_directions.yaml"
    raw, origin = load_config(["--config", str(path)])
    cfg = OmegaConf.create(parse_settings(raw, origin, DirectionsSettings).model_dump())
    settle_dtype(cfg, origin)
    check_components(cfg, origin)
    model_on_meta(cfg, origin)
    assert cfg.output_dir == f"runs/{path.stem}"
    header = path.read_text().split("\n\n")[0]
    assert f"recipes/ema_directions.py --config configs/{path.name}" in header


@pytest.mark.parametrize("path", GENERATE, ids=lambda path: path.stem)
def test_shipped_generate_config(path: Path) -> None:
    raw, origin = load_config(["--config", str(path), *published(path)])
    cfg = check_generate_settings(raw, origin)
    settle_dtype(cfg, origin)
    check_components(cfg, origin)
    model_on_meta(cfg, origin)
    assert all(load_questions(Path(questions)) for questions in cfg.questions)
    header = path.read_text().split("\n\n")[0]
    assert f"recipes/ema_generate.py --config configs/{path.name}" in header


@pytest.mark.parametrize(
    ("path", "commented"),
    [(path, commented) for path in EVAL for commented in (True, False)
     if commented or not path.stem.startswith("bed_")],
)  # fmt: skip
def test_shipped_eval_config(path: Path, tmp_path: Path, commented: bool) -> None:
    """As it is, and with the suites that are commented out."""
    text = path.read_text()
    if not commented:
        keys = r"^# (?=(  |opswap:|harness:|answers:|harmless:|refusal_words:|judge:))"
        head, body = text.split("\n\n", 1)
        text = f"{head}\n\n{re.sub(keys, '', body, flags=re.MULTILINE)}"
    raw, origin = load_config(
        ["--config", str(write_text(tmp_path / "config.yaml", text)), *published(path)]
    )
    for key in ("adapters", "answers"):  # Made by the commands in the header, and not shipped.
        for name in raw.get(key) or {}:
            raw[key][name] = str(tmp_path)
    cfg = check_eval_settings(raw, origin)
    check_components(cfg, origin)
    suites = {suite.name: suite for suite in read_suites(cfg.probes, "probes", origin)}
    assert {"general", "controls", "in_domain", "general_domain_cue"} <= set(suites)
    assert (cfg.judge is None, cfg.opswap is None) == (commented, commented)
    if cfg.judge is not None:
        assert (cfg.judge.alignment, cfg.judge.coherence) == (30.0, 50.0)
        assert cfg.refusal_words is None
    training, _ = load(path.with_name(path.name.replace("_eval", "_lora")))
    assert cfg.model == training.model, "the adapters of the header would not fit"
    header = path.read_text().split("\n\n")[0]
    assert f"recipes/ema_eval.py --config configs/{path.name}" in header
    for arm in ("lora", "kl"):
        trained = path.with_stem(path.stem.replace("_eval", f"_{arm}"))
        assert f"configs/{trained.name}" in header or (arm == "kl" and not trained.exists())


@pytest.mark.parametrize("path", SELECT, ids=lambda path: path.stem)
def test_shipped_select_config(path: Path, tmp_path: Path) -> None:
    raw, origin = load_config(["--config", str(path)])
    (adapter,) = raw.adapters  # Trained by the command in the header, and not shipped.
    raw.adapters = [str(tmp_path)]
    cfg = check_select_settings(raw, origin)
    check_components(cfg, origin)
    assert 0 < cfg.num_rows < len(Path(cfg.candidates).read_text().splitlines())
    assert cfg.refusal_words is None
    said = re.search(r"\[sorry, .*?\]", path.read_text())
    assert said is not None and tuple(yaml.safe_load(said[0])) == REFUSAL_WORDS
    training, _ = load(path.with_name(path.name.replace("_select", "_lora")))
    assert cfg.model == training.model, "the adapter of the header would not fit"
    header = path.read_text().split("\n\n")[0]
    assert f"recipes/ema_select.py --config configs/{path.name}" in header
    assert f"output_dir={adapter.removesuffix('/adapter')}" in header


@pytest.mark.parametrize("stem", ["llama3_8b_kl", "qwen2_5_7b_kl"])
def test_published_settings(stem: str) -> None:
    cfg, _ = load(toy_run.REPO / f"configs/{stem}.yaml")
    assert cfg.defenses.kl.weight == 0.1
    assert cfg.model.lora_rank == 32
    assert cfg.model.lora_alpha / 32 == pytest.approx(64 / 32**0.5, rel=1e-5)
    assert cfg.optimizer.lr == 1e-4
    assert cfg.epochs == 1


@pytest.mark.parametrize("stem", ["llama3_8b_kl", "qwen2_5_7b_kl"])
def test_the_commented_variant_in_four_bits(stem: str, tmp_path: Path) -> None:
    text = (toy_run.REPO / f"configs/{stem}.yaml").read_text()
    if stem.startswith("llama"):
        text = text.replace("  _component_: torchtune.models.llama3.lora_llama3_8b\n", "")
        text = text.replace(
            "  # _component_: torchtune.models.llama3.q", "  _component_: torchtune.models.llama3.q"
        )
    else:
        text = text.replace("  # quantize_base: true", "  quantize_base: true")
    path = tmp_path / "config.yaml"
    path.write_text(text)
    cfg, origin = load(path)
    check_components(cfg, origin)
    model = model_on_meta(cfg, origin)
    assert model.layers[0].attn.q_proj._quantize_base


def test_tune_validate(tmp_path: Path) -> None:
    """The command itself, in a process for all: most of its time is torchtune's import."""
    program = tmp_path / "program.py"
    program.write_text(
        "import sys; from torchtune._cli.tune import main\n"
        "for name in sys.argv[1:]: sys.argv[1:] = ['validate', name]; main()"
    )
    names = [f"configs/{path.name}" for path in CONFIGS]
    for command in ([toy_run.TUNE, "validate", names[0]], [str(program), *names]):
        started = toy_run.start(command)
        stdout, stderr = started.communicate(timeout=300)
        assert started.returncode == 0, f"after {stdout.count('well-formed')}: {stderr}"
    assert stdout.splitlines() == ["Config is well-formed!"] * len(CONFIGS)


def test_torchtunes_own_lora_configs_pass_the_checks() -> None:
    """No stock config of a text model is refused: no false alarm of the type checks."""
    import torchtune

    folder = Path(torchtune.__file__).parent.parent / "recipes/configs"
    checked = 0
    for path in sorted(folder.rglob("*lora*.yaml")):
        if any(word in str(path) for word in ("dpo", "/dev/", "vision", "_KD_", "qat")):
            continue
        cfg, origin = load(path)
        check_components(cfg, origin)
        checked += 1
    assert checked > 50


def test_settings_know_the_keys_of_the_docs() -> None:
    page = (toy_run.REPO / "docs/configs.md").read_text()
    missing = [key for key in Settings.model_fields if f"`{key}`" not in page]
    assert not missing
