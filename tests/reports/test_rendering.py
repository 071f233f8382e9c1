"""The page as a browser shows it: nothing overflows at desktop and phone width, light and dark differ.

Skipped where there is no Chromium.
"""

from __future__ import annotations

import json
import re
import shutil
import struct
import subprocess
import zlib
from html import escape, unescape
from pathlib import Path

import pytest
from support.runs import run_data

from optgptq.reports.page import report_page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
LONG = "model.layers.0." + "a_very_long_module_name" * 8
# Written into a copy of the page for the test: the page itself has no script, and its policy forbids one.
MEASURE = """<script>
const wide = [...document.querySelectorAll("body *")].filter(e => !e.closest(".scroll, pre, .skip")
  && e.getBoundingClientRect().right > window.innerWidth + 1).map(e => e.tagName);
const text = document.querySelectorAll(".picture svg text").length;
const page = document.documentElement.scrollWidth;
parent.document.title = JSON.stringify({inner: window.innerWidth, page, wide, text});
</script></body>"""


def browse(*arguments: str, profile: Path) -> subprocess.CompletedProcess[str]:
    assert CHROMIUM is not None
    quiet = ["--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update"]
    command = [CHROMIUM, "--headless", "--no-sandbox", *quiet, "--disable-sync", "--hide-scrollbars"]
    command += [f"--user-data-dir={profile}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = run_data(8, names=[LONG, "model.layers.1.q"], manifest={"warnings": ["w" * 900, "a warning"]})
    path = tmp_path_factory.mktemp("page") / "page.html"
    path.write_text(report_page(data).replace("<details>", "<details open>"), encoding="utf-8")
    return path


@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_is_wider_than_the_window(page: Path, tmp_path: Path, width: int) -> None:
    text = page.read_text(encoding="utf-8")
    text = re.sub(r"<meta http-equiv[^>]*>", "", text).replace("</body>", MEASURE)
    # A window has a least width of its own; a frame has not.
    frame = (
        f'<title></title><iframe style="border: 0; width: {width}px; height: 900px" srcdoc="{escape(text)}"></iframe>'
    )
    measured = tmp_path / "measured.html"
    measured.write_text(f"<!doctype html><meta charset=utf-8>{frame}", encoding="utf-8")
    shown = browse("--window-size=1400,1000", "--dump-dom", measured.as_uri(), profile=tmp_path / "profile").stdout
    found = re.search(r"<title>(.*?)</title>", shown)
    assert found is not None
    sizes = json.loads(unescape(found[1]))
    assert sizes["inner"] == width
    assert sizes["page"] <= width
    assert sizes["wide"] == []
    assert sizes["text"] > 20


@pytest.mark.parametrize("width", [1280, 390])
def test_light_and_dark_are_what_they_are_called(page: Path, tmp_path: Path, width: int) -> None:
    brightness = {}
    for scheme, number in (("dark", 0), ("light", 1)):
        picture = tmp_path / f"{scheme}.png"
        setting = f"--blink-settings=preferredColorScheme={number}"
        arguments = [setting, f"--window-size={width},900", f"--screenshot={picture}", page.as_uri()]
        browse(*arguments, profile=tmp_path / "profile")
        brightness[scheme] = mean_brightness(picture.read_bytes())
    assert brightness["dark"] < 80
    assert brightness["light"] > 200


def mean_brightness(png: bytes) -> float:
    """Return the mean of the bytes of a PNG of 8-bit colours, 0 to 255, by its first pixel of each row."""
    width, height, depth, kind = struct.unpack(">IIBB", png[16:26])
    assert depth == 8
    assert kind in (2, 6)
    place, data = 8, b""
    while place < len(png):
        length, name = struct.unpack(">I4s", png[place : place + 8])
        data += png[place + 8 : place + 8 + length] if name == b"IDAT" else b""
        place += length + 12
    rows = zlib.decompress(data)
    stride = 1 + width * (3 if kind == 2 else 4)
    # The left margin of the page: a row may be stored as its difference to the row above.
    values, before = [], [0, 0, 0]
    for row in range(height):
        filtered, *pixel = rows[row * stride : row * stride + 4]
        before = [
            (value + (above if filtered in (2, 4) else above // 2 if filtered == 3 else 0)) % 256
            for value, above in zip(pixel, before, strict=True)
        ]
        values.append(sum(before) / 3)
    return sum(values) / len(values)
