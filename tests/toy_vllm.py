"""vLLM's own server with adapters, from an environment of its own: it pins another torch."""

import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

# Some Python that imports vllm. Where it does not, that is an error and no skip.
PYTHON = os.environ.get("EMARECIPES_VLLM_PYTHON", "")
needs_vllm = pytest.mark.skipif(
    not PYTHON,
    reason="EMARECIPES_VLLM_PYTHON names no Python with vLLM, which pins a torch of its own "
    "(docs/serving.md)",
)
# A size of heads that its attention on CPUs computes.
HEAD_DIM = 32
_STARTS_WITHIN = 300


@contextmanager
def vllm_server(model: Path, log: Path, adapters: Mapping[str, Path], *more: str) -> Iterator[str]:
    """Run the server in a process of its own, fp32; gives its address, with /v1.

    Args:
        model: The base's folder, by the name `base`.
        log: Where its messages go.
        adapters: PEFT folders, by the names that requests have.
        more: Further options.
    """
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
    command = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--served-model-name", "base", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "512"]
    command += ["--max-num-seqs", "8", *more]
    if adapters:
        # One more than there are: on a CPU a base's request that shares a batch with an adapter's
        # gets what is in the last place.
        command += ["--enable-lora", "--max-loras", str(len(adapters) + 1), "--lora-modules"]
        command += [f"{name}={folder}" for name, folder in adapters.items()]
    offline = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    small = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    small["VLLM_CPU_KVCACHE_SPACE"] = "1"
    with log.open("w") as messages:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=messages, stderr=messages,
            env=_without_its_own() | offline | small, cwd=log.parent, start_new_session=True,
        )  # fmt: skip
        try:
            _wait(process, f"http://127.0.0.1:{port}/health", log)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            # Its engine and workers are processes of their own.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _without_its_own() -> dict[str, str]:
    """The environment but for what vLLM reads, such as the key that it then asks for."""
    left_out = ("VLLM_", "PYTHONPATH")
    return {name: value for name, value in os.environ.items() if not name.startswith(left_out)}


def _wait(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    until = time.monotonic() + _STARTS_WITHIN
    while process.poll() is None and time.monotonic() < until:
        with suppress(OSError), urllib.request.urlopen(url, timeout=10):
            return
        time.sleep(0.5)
    raise AssertionError(f"vLLM does not answer at {url}:\n{log.read_text()[-3000:]}")
