"""A real browser without a window: Debian's chromium, or Chrome, where one is installed."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import signal
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

CHROME = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
SECONDS = 120
ANSWER = re.compile(r'<pre id="answer">(.*?)</pre>', re.DOTALL)


def ask(page: Path, script: str, folder: Path, *, width: int = 1200, dark: bool = False) -> tuple[Any, list[str]]:
    """Open a page in a frame of a width, and run a function there.

    Args:
        page: the file.
        script: body of a JavaScript function of the frame's `window`, whose result is returned.
        folder: for the browser's own files.
        width: of the frame, pixels.
        dark: ask for dark colors.

    Returns:
        The function's result, and the lines that the browser's console has: errors and warnings.
    """
    assert CHROME is not None
    folder.mkdir(parents=True, exist_ok=True)
    source = html.escape(page.read_text(encoding="utf-8"), quote=True)
    outer = folder / "outer.html"
    outer.write_text(
        f'<!doctype html><meta charset="utf-8"><iframe id="page" style="border:0;width:{width}px;height:900px" '
        f'srcdoc="{source}"></iframe><pre id="answer"></pre><script>'
        f"const frame = document.getElementById('page');"
        f"frame.addEventListener('load', async () => {{ const answer = await (async (window) => {{ {script} }})"
        f"(frame.contentWindow); document.getElementById('answer').textContent = JSON.stringify(answer); }});</script>",
        encoding="utf-8",
    )
    command = [
        CHROME, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={folder / 'me'}",
        "--enable-logging=stderr", "--virtual-time-budget=20000", "--window-size=1400,1000", "--dump-dom",
        *(["--blink-settings=preferredColorScheme=0"] if dark else []), outer.as_uri(),
    ]  # fmt: skip
    shown, said = _run(command)
    console = [line for line in said.splitlines() if "CONSOLE" in line]
    answer = ANSWER.search(shown)
    assert answer is not None, shown[-500:]
    assert answer.group(1), console or shown[-500:]
    return json.loads(html.unescape(answer.group(1))), console


def _run(command: list[str]) -> tuple[str, str]:
    """Return what the browser prints; its processes are a group, which ends with it."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        shown, said = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        pytest.skip(f"{command[0]} has not opened a page in {SECONDS} s: the machine is too busy for a browser")
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert process.returncode == 0, said[-2000:]
    return shown, said
