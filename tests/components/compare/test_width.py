"""The report in a browser: what its first screen shows, and that nothing scrolls sideways in a narrow panel."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from .made import INTERPOLATED, MIXED, Made, compare, write_all

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
WIDTH, HEIGHT = 600, 950
"""The panel beside the graph in Kubeflow's UI, in pixels."""
MEASURE = """<script>window.onload = () => {
  const edge = document.querySelector(".first").getBoundingClientRect().bottom;
  document.querySelectorAll("details").forEach(one => one.open = true);
  const wide = [...document.querySelectorAll(".scroll")].filter(one => one.scrollWidth > one.clientWidth + 1);
  document.title = JSON.stringify([Math.round(edge), document.documentElement.scrollWidth <= innerWidth,
                                   wide.map(one => one.getAttribute("aria-label"))]);
}</script></head>"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report on as many candidates as the demo has, with a long name and several sources."""
    folder = tmp_path_factory.mktemp("report")
    name = "mixed, forgetting at most 0.05"
    mixed = [
        Made("mixed-0.1", "mixed", forgets=0.7, right=0.66, mix_weight=0.1),
        MIXED,
        Made("mixed-budget-0.05", "mixed", forgets=0.1, right=0.63, name=name, realised=0.7, budget=0.05),
    ]
    sources = ("python/library", "numpy", "a source with a long name")
    found = write_all(folder, *mixed, alphas=(INTERPOLATED,), source=lambda index: sources[index % 3])
    made = compare(folder, found, beat_trivial=False)
    text = Path(made.artifacts["report"].path).read_text(encoding="utf-8")
    (folder / "page.html").write_text(text.replace("</head>", MEASURE, 1), encoding="utf-8")
    return folder / "page.html"


@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium")
def test_the_first_screen_of_a_panel_has_the_table_and_nothing_scrolls_sideways(page: Path) -> None:
    assert BROWSER is not None
    command = [BROWSER, "--headless", "--no-sandbox", f"--window-size={WIDTH},{HEIGHT}", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = re.search(r"<title>\[(\d+),(\w+),(.*)\]</title>", done.stdout)
    assert found
    assert int(found[1]) <= HEIGHT, "verdict, figure and table end below the first screen"
    assert (found[2], found[3]) == ("true", "[]")
