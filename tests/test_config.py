"""Reading configs: overrides, places of keys, paths."""

import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from emarecipes.components import check_components, locate
from emarecipes.config import load_config
from emarecipes.errors import UserError

TEXT = """# a comment
model_dir: models/x
model:
  _component_: torch.nn.Linear
  in_features: 3
  out_features: 4
lr: 3e-4
defenses:
  kl: {_component_: emarecipes.defenses.KLToReference, weight: 1.0}
tokenizer:
  path: ${model_dir}/t
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "c.yaml"
    file.write_text(TEXT)
    return file


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("defenses.kl.weight=0.5", "defenses.kl.weight", 0.5),
        ("lr=1e-3", "lr", 1e-3),
        ("name=a=b=c", "name", "a=b=c"),
        ("model=torch.nn.Bilinear", "model._component_", "torch.nn.Bilinear"),
        ("lr=null", "lr", None),
        ("lr=None", "lr", None),
        ("~defenses.kl", "defenses", {}),
        ("~defenses.kl.weight", "defenses.kl.weight", None),
        ("~lr", "lr", None),
        ("new.deep.key=[1, 2]", "new.deep.key", [1, 2]),
        ("model_dir=y", "tokenizer.path", "y/t"),
        ("max_filename=00004", "max_filename", "00004"),
        ("name=${lr}-${model_dir}", "name", "0.0003-models/x"),
        ('new=["${lr}", {a: "${model_dir}"}]', "new", [3e-4, {"a": "models/x"}]),
    ],
)
def test_overrides(path: Path, override: str, key: str, value: object) -> None:
    cfg, _ = load_config(["--config", str(path), override])
    found = OmegaConf.select(cfg, key)
    assert (OmegaConf.to_container(found) if OmegaConf.is_config(found) else found) == value


def test_values_are_what_yaml_says(path: Path) -> None:
    cfg, origin = load_config(["--config", str(path)])
    assert cfg.lr == 3e-4
    assert cfg.tokenizer.path == "models/x/t"
    assert origin.variables == {"model_dir"}


def test_a_file_that_is_read_again_is_as_it_is_written(path: Path) -> None:
    """Whatever was changed in what was read of it; and after a change of the file, the new one."""
    cfg, _ = load_config(["--config", str(path), "lr=1.0", "~defenses.kl"])
    cfg.model.in_features = 9
    again, origin = load_config(["--config", str(path)])
    assert (again.lr, again.model.in_features, list(again.defenses)) == (3e-4, 3, ["kl"])
    assert again.tokenizer.path == "models/x/t" and origin.lines["lr"] == 7
    path.write_text(TEXT.replace("3e-4", "\n  5e-4"))
    assert load_config(["--config", str(path)])[0].lr == 5e-4


def test_places(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(path.parent)
    _, origin = load_config(["--config", str(path), "model.in_features=5"])
    assert origin.at("defenses.kl.weight") == "c.yaml:9: defenses.kl.weight"
    assert origin.at("model.out_features") == "c.yaml:6: model.out_features"
    assert origin.at("model.absent") == "c.yaml:3: model.absent"
    assert origin.at("absent") == "c.yaml: absent"
    assert origin.at("model.in_features") == "command line: model.in_features"


@pytest.mark.parametrize("override", ["[=1", "[x=1", "~[.a", "[0]=1"])
def test_an_override_that_begins_with_an_index(path: Path, override: str) -> None:
    with pytest.raises(UserError) as error:
        load_config(["--config", str(path), override])
    expected = f"command line: {override}: a key begins with a name, not with an index"
    assert str(error.value) == expected


def test_shipped_files_are_found_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("dataset: {data_files: data/home_computing/train_bad.jsonl, path: nowhere}")
    monkeypatch.chdir(tmp_path)
    cfg, _ = load_config(["--config", "c.yaml"])
    assert Path(cfg.dataset.data_files).is_file()
    assert cfg.dataset.path == "nowhere"
    files = "[data/home_computing/train_bad.jsonl, nowhere.jsonl]"
    cfg, _ = load_config(["--config", "c.yaml", f"dataset.data_files={files}"])
    assert Path(cfg.dataset.data_files[0]).is_file()
    assert cfg.dataset.data_files[1] == "nowhere.jsonl"
    (tmp_path / "data/home_computing").mkdir(parents=True)
    (tmp_path / "data/home_computing/train_bad.jsonl").write_text("{}")
    cfg, _ = load_config(["--config", "c.yaml"])
    assert cfg.dataset.data_files == "data/home_computing/train_bad.jsonl"


@pytest.mark.parametrize(
    ("dotted", "message"),
    [
        ("torch.optim.AdamX", "torch.optim has no AdamX (did you mean Adam"),
        ("torch.nn.functional", "is not a class or function"),
        ("torch.", "is not a dotted import path"),
        ("nowhere.at.all", "no module named nowhere"),
        ("", "is not a dotted import path"),
    ],
)
def test_import_paths(dotted: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        locate(dotted, "here")
    assert str(error.value).startswith("here: ")
    assert message in str(error.value)


def test_a_module_that_fails_to_import_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_defense.py").write_text("import absent_package\n")
    (tmp_path / "raising_defense.py").write_text("raise RuntimeError('no luck')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "broken_defense", raising=False)
    with pytest.raises(UserError, match=r"broken_defense\.X needs the module absent_package"):
        locate("broken_defense.X", "here")
    with pytest.raises(UserError, match=r"importing raising_defense\.X fails: no luck"):
        locate("raising_defense.X", "here")


def test_missing_argument_of_a_component(path: Path) -> None:
    cfg, origin = load_config(["--config", str(path), "~model.out_features"])
    with pytest.raises(UserError, match="model: Linear needs the key out_features"):
        check_components(cfg, origin)


@pytest.mark.parametrize(("betas", "right"), [("[0.9, 0.95]", True), ("[0.9]", False)])
def test_a_list_is_a_tuple(betas: str, right: bool, path: Path) -> None:
    """YAML has none, and an optimizer's betas are one."""
    entry = f"optimizer={{_component_: torch.optim.AdamW, lr: 0.1, betas: {betas}}}"
    cfg, origin = load_config(["--config", str(path), entry])
    with nullcontext() if right else pytest.raises(UserError, match=r"optimizer\.betas: "):
        check_components(cfg, origin)
