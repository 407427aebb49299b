"""Build the documentation as a site with search, in build/site. Run by `make site`.

The pages are those that one reads in the repository: this script copies them into one folder, turns links between them into
links within the site, and hands the folder to MkDocs with docs/mkdocs.yml. A link that leads nowhere fails the build.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[1]
STAGED: Final = ROOT / "build" / "site-pages"
# Pages outside docs/, by their place in the site.
ELSEWHERE: Final = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "deploy/README.md": "deploy.md",
    "deploy/datadog/README.md": "datadog.md",
    "examples/README.md": "examples.md",
    "loadtest/README.md": "loadtest.md",
}
_LINK: Final = re.compile(r"(\]\()([^)\s#]*)(#[^)\s]*)?(\))")


def stage() -> None:
    """Copy the pages, and the files that they link to, into one folder."""
    shutil.rmtree(STAGED, ignore_errors=True)
    STAGED.mkdir(parents=True)
    pages = {f"docs/{path.name}": path.name for path in sorted((ROOT / "docs").glob("*.md"))} | ELSEWHERE
    for source, place in pages.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        (STAGED / place).write_text(_LINK.sub(partial(_moved, source=source, pages=pages), text), encoding="utf-8")
    for picture in (ROOT / "docs").glob("*.svg"):
        shutil.copy(picture, STAGED)


def _moved(link: re.Match[str], source: str, pages: dict[str, str]) -> str:
    """Return a link of a page as it is within the site; other files are copied along."""
    opening, target, anchor, closing = link.group(1), link.group(2), link.group(3) or "", link.group(4)
    if not target or ":" in target:
        return link.group()
    name = os.path.normpath(Path(source).parent / target)
    if name in pages:
        return f"{opening}{pages[name]}{anchor}{closing}"
    if name in {Path(page).parent.as_posix() for page in ELSEWHERE} - {"."}:
        return f"{opening}{pages[f'{name}/README.md']}{anchor}{closing}"
    path = ROOT / name
    if path.is_file() and path.suffix != ".svg":
        place = STAGED / "files" / name.replace("/", "-")
        place.parent.mkdir(exist_ok=True)
        shutil.copy(path, place)
        return f"{opening}files/{place.name}{closing}"
    # A folder of the repository has no page; the strict build rejects the rest.
    return f"{opening}{ELSEWHERE['deploy/README.md'] if path.is_dir() else target}{anchor}{closing}"


def main() -> int:
    """Build the site; return the exit status of MkDocs."""
    stage()
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", "docs/mkdocs.yml"]
    return subprocess.run(command, cwd=ROOT, check=False, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}).returncode


if __name__ == "__main__":
    sys.exit(main())
