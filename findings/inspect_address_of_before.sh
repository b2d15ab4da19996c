#!/usr/bin/env bash
# inspect_ai 0.3.285, get_model: a model that was made once is handed out again for the same name and
# settings, though the environment names another server by then. The first server is asked.
#
# Expected: the address that the environment names when get_model is called, as of the API key's absence,
# which is looked up then. (A guess beforehand, from a test of ours that met a server that was gone: so.)
# Seen: both questions reach the first server; no error, no warning. With memoize=False, or base_url
# given, each is asked where it should be.
#
# Exits with 1 if this has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet "inspect_ai==0.3.285" "openai==3.57.0"
cat >"$folder/try.py" <<'PYTHON'
import asyncio
import json
import os
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import inspect_ai
from inspect_ai.model import get_model


class Server(ThreadingHTTPServer):
    """An OpenAI-compatible server that answers with its own name and counts."""

    def __init__(self, name):
        self.name, self.asked = name, 0
        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked += 1
        message = {"role": "assistant", "content": self.server.name}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        body = {"id": "1", "object": "chat.completion", "created": 0, "model": "m"}
        text = json.dumps(body | {"choices": [choice], "usage": usage}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_):
        pass


async def both(**arguments):
    servers = [Server("first"), Server("second")]
    for server in servers:
        os.environ["TOY_BASE_URL"] = server.address
        await get_model("openai-api/toy/m", **arguments).generate("Who are you?")
    return [server.asked for server in servers]


async def main():
    print("inspect_ai", inspect_ai.__version__)
    kept, made = await both(), await both(memoize=False)
    print("questions at the first and the second server:", kept)
    print("with memoize=False:", made)
    sys.exit(0 if (kept, made) == ([2, 0], [1, 1]) else "the behaviour has changed")


os.environ["TOY_API_KEY"] = "none"
asyncio.run(main())
PYTHON
"$folder/venv/bin/python" "$folder/try.py"
