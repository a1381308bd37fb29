"""Takes the pictures of README and docs in headless Chromium: MLflow's pages of a workspace, its data and models."""

from __future__ import annotations

import base64
import json
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from websockets.sync.client import connect as open_socket

ROOT = Path(__file__).resolve().parent.parent
SETTLE_S = 8
CLOSE_ASSISTANT = "document.querySelector('[data-component-id=\"mlflow.assistant.chat_panel.close\"]')?.click()"


def main() -> None:
    """Serve MLflow for the workspace given as the first argument (else this clone) and photograph it."""
    from flows.comparison.page import write
    from tasks.core.stage import quiet_libraries
    from tasks.orchestration.params import load_params
    from tasks.registry.client import EXPERIMENT, connect, tracking_uri

    quiet_libraries()
    workspace = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT).resolve()
    model = load_params(workspace / "params.yaml").register_.model
    experiment = connect(workspace).get_experiment_by_name(EXPERIMENT)
    if experiment is None:
        sys.exit(f"{workspace} has run nothing yet: make run")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "ui",
        "--backend-store-uri",
        tracking_uri(workspace),
        "--port",
        str(port),
    ]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}/#"
    try:
        while not _answers(f"http://127.0.0.1:{port}/health"):
            time.sleep(0.5)
        with chromium() as send:
            charts = f"{address}/experiments/{experiment.experiment_id}/runs?compareRunsMode=CHART"
            photograph(send, charts, ROOT / "docs" / "runs.png", (1400, 800))
            photograph(send, f"{address}/models/{model}", ROOT / "docs" / "model.png", (1400, 900))
            profile = workspace / "data" / "validation" / "index.html"
            photograph(send, profile.as_uri(), ROOT / "docs" / "data.png", (1100, 900))
            photograph(send, write(workspace).as_uri(), ROOT / "docs" / "comparison.png", (1200, 1500))
            with pages(workspace) as ui:
                photograph(send, f"{ui}/promotions/{challenger(workspace)}", ROOT / "docs" / "ui.png", (1200, 1150))
    finally:
        server.terminate()
        server.wait()


@contextmanager
def pages(workspace: Path) -> Iterator[str]:
    """Run `temper ui` without a model; yield the address of its pages."""
    command = [sys.executable, "-m", "flows.cli", "ui", "--no-model", "--port", "0"]
    server = subprocess.Popen(command, cwd=workspace, stderr=subprocess.PIPE, text=True)
    try:
        said = (re.search(r"pages at (\S+);", line) for line in server.stderr or [])
        yield next(match[1] for match in said if match)
    finally:
        server.terminate()
        server.wait()


def challenger(workspace: Path) -> str:
    """Return the newest version that the gate let through and that is not champion, else the newest."""
    from flows.registry.history import history

    found = history(workspace)
    others = [each for each in found["versions"] if each["version"] != found["champion"]]
    passed = [each for each in others if each["passed"]]
    return str((passed or others or found["versions"])[-1]["version"])


def _answers(address: str) -> bool:
    try:
        return httpx.get(address).is_success
    except httpx.HTTPError:
        return False


@contextmanager
def chromium() -> Iterator[Any]:
    """Run a headless Chromium with one empty page; yield a function that sends it a devtools command."""
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        sys.exit("no Chromium on the path")
    with tempfile.TemporaryDirectory() as profile:
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--hide-scrollbars"]
        command = [found, *flags, f"--user-data-dir={profile}", "--remote-debugging-port=0", "about:blank"]
        browser = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        try:
            said = (re.search(r"ws://127\.0\.0\.1:(\d+)/", line) for line in browser.stderr or [])
            port = next(match[1] for match in said if match)
            page = next(p for p in httpx.get(f"http://127.0.0.1:{port}/json").json() if p["type"] == "page")
            with open_socket(page["webSocketDebuggerUrl"], max_size=None) as page_socket:

                def send(method: str, **params: Any) -> dict[str, Any]:
                    page_socket.send(json.dumps({"id": 1, "method": method, "params": params}))
                    while (answer := json.loads(page_socket.recv())).get("id") != 1:
                        pass
                    result: dict[str, Any] = answer["result"]
                    return result

                yield send
        finally:
            browser.terminate()
            browser.wait()


def photograph(send: Any, address: str, picture: Path, size: tuple[int, int]) -> None:
    """Open a page, let it settle, close what stands beside it, and save what it shows."""
    send("Emulation.setDeviceMetricsOverride", width=size[0], height=size[1], deviceScaleFactor=1, mobile=False)
    send("Page.navigate", url=address)
    time.sleep(SETTLE_S)
    send("Runtime.evaluate", expression=CLOSE_ASSISTANT)
    time.sleep(SETTLE_S)
    picture.write_bytes(base64.b64decode(send("Page.captureScreenshot", format="png")["data"]))
    print(f"{picture.relative_to(ROOT)}: {address}")


if __name__ == "__main__":
    main()
