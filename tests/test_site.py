"""The guide as a site: every link and anchor leads somewhere, and every page is in its navigation."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.guide import ROOT


def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={"NO_MKDOCS_2_WARNING": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    pages = [page for page in (ROOT / "docs").rglob("*.md") if page.name != "README.md"]
    for page in pages:
        assert (tmp_path / "site" / page.relative_to(ROOT / "docs").with_suffix("") / "index.html").is_file()
    assert (tmp_path / "site" / "index.html").is_file() and len(pages) > 15
    told = (tmp_path / "site" / "index.html").read_text(encoding="utf-8")
    assert all(f'{page.relative_to(ROOT / "docs").with_suffix("")}/"' in told for page in pages), (
        "not in the navigation"
    )
