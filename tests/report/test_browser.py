"""The page in a real browser, as wide as a screen and as a phone; skipped where there is no chromium."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

BROWSER = shutil.which("chromium")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --allow-file-access-from-files --window-size=1400,1000"
).split()
# A window cannot be as narrow as a phone, a frame can; media queries look at the frame.
FRAME = """<body style="margin:0"><pre></pre>
<iframe src="index.html" width="{width}" height="900" frameborder="0"></iframe>
<script>addEventListener("load", () => {{
  const page = document.querySelector("iframe").contentDocument, width = page.defaultView.innerWidth;
  const name = element => element.tagName + " " + element.textContent.slice(0, 40);
  const all = [...page.querySelectorAll("body *")];
  document.querySelector("pre").textContent = JSON.stringify({{
    width, scroll: page.documentElement.scrollWidth, client: page.documentElement.clientWidth,
    outside: all.filter(e => e.getBoundingClientRect().right > width + 0.5).map(name),
    spilling: all.filter(e => e.clientWidth && e.scrollWidth > e.clientWidth + 1).map(name),
    pictures: [...page.images].map(i => [i.complete, i.naturalWidth, i.currentSrc.slice(0, 22)]),
    loaded: page.defaultView.performance.getEntriesByType("resource").map(e => e.name.slice(0, 60)),
  }});
}})</script></body>"""


@pytest.mark.skipif(BROWSER is None, reason="needs chromium")
@pytest.mark.parametrize(("width", "pixels"), [(1280, 1440), (400, 880)])
def test_nothing_overflows_and_nothing_is_loaded(
    report: tuple[Path, dict[str, Any]], tmp_path: Path, width: int, pixels: int
) -> None:
    shutil.copy(report[0] / "index.html", tmp_path)
    (tmp_path / "frame.html").write_text(FRAME.format(width=width))
    command = [str(BROWSER), *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    done = subprocess.run(
        [*command, (tmp_path / "frame.html").as_uri()], capture_output=True, text=True, timeout=60, check=True
    )
    (text,) = re.findall("<pre>(.*?)</pre>", done.stdout, re.DOTALL)
    seen = json.loads(text.replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">"))
    assert seen["width"] == width
    assert seen["scroll"] <= seen["client"] and seen["outside"] == [] and seen["spilling"] == []
    assert seen["pictures"] == [[True, pixels, "data:image/png;base64,"]] * 10
    assert all(name.startswith("data:") for name in seen["loaded"])
