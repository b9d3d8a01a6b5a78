"""Every example on the pages runs as it stands, against the proxy that served it."""

from __future__ import annotations

import re
import subprocess
import sys
from html import unescape
from pathlib import Path

import pytest

from gateway.tests.live import LiveProxy
from proxysite.pages import PAGES

_BLOCK = re.compile(r'<div class="code" data-language="(\w+)">.*?<pre tabindex="0"><code>(.*?)</code></pre>', re.DOTALL)


def examples(proxy: LiveProxy, path: str, language: str) -> list[str]:
    """Return the code blocks of a page, as a reader copies them."""
    blocks = _BLOCK.findall(proxy.get(path).text)
    return [unescape(re.sub(r"<[^>]+>", "", code)) for kind, code in blocks if kind == language]


def _run(arguments: list[str], room: Path) -> str:
    done = subprocess.run(arguments, cwd=room, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, f"{arguments[-1]}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.mark.parametrize("language", ["zh-hans", "en"])
@pytest.mark.parametrize("name", [name for name in PAGES if name != "conversations"])
def test_the_python_examples_work(own_proxy: LiveProxy, name: str, language: str, tmp_path: Path) -> None:
    for code in examples(own_proxy, f"/{language}/{PAGES[name]}", "python"):
        compile(code, name, "exec")
        if "langchain" not in code:  # it is no dependency of ours
            assert _run([sys.executable, "-c", code], tmp_path).strip() or "open(" in code


@pytest.mark.parametrize("language", ["zh-hans", "en"])
@pytest.mark.parametrize("name", PAGES)
def test_the_curl_examples_work(own_proxy: LiveProxy, name: str, language: str, tmp_path: Path) -> None:
    # A key is known after its first use.
    own_proxy.get("/v1/models", headers={"Authorization": "Bearer sk-sandbox"})
    own_proxy.wait_for_rows("SELECT 1 FROM billing_apikey WHERE last_used_at IS NOT NULL", 1)
    commands = [code for code in examples(own_proxy, f"/{language}/{PAGES[name]}", "bash") if "curl" in code]
    for command in commands:
        output = _run(["bash", "-c", re.sub(r"\bcurl ", "curl -sSf ", command)], tmp_path)
        assert output.rstrip().endswith(("data: [DONE]", "}")) or "-o " in command


def test_the_landing_pages_first_line_streams_an_answer(own_proxy: LiveProxy, tmp_path: Path) -> None:
    first = examples(own_proxy, "/en/", "bash")[0]
    assert own_proxy.url in first
    output = _run(["bash", "-c", first], tmp_path)
    assert "Hello!" in output
    assert output.count("data: ") > 3


def test_the_environment_example_is_what_the_sdk_reads(own_proxy: LiveProxy, tmp_path: Path) -> None:
    exports = next(code for code in examples(own_proxy, "/en/docs/", "bash") if "OPENAI_BASE_URL" in code)
    program = "from openai import OpenAI; print(OpenAI().models.list().data[0].id)"
    assert _run(["bash", "-c", f"{exports}\n{sys.executable} -c '{program}'"], tmp_path).strip()
