"""What mkdocs.yml cannot say: addresses come from pyproject.toml, the README is the first page, and links that leave
docs/ lead to the repository (or, for pictures, to a copy of the file)."""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath

import tomllib
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
URLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]
# Pages that are not there are left out, and those that are not named here come under "More".
NAV = {
    "Start": ["index.md", "install.md", "friends.md"],
    "Attention": ["from-attention.md", "integrations.md", "training.md", "comparison.md"],
    "Stories": ["python.md", "models.md", "memory.md", "serving.md", "distributed.md"],
    "Kernels": ["kernels.md", "cuda.md", "benchmarks.md"],
    "Reference": ["api/memflow_kernels.md", "api/memflow.md", "design.md", "faults.md"],
}
_LINK = re.compile(r"(\]\()([^)#\s]+)([^)]*\))")
_PICTURES = (".png", ".jpg", ".svg", ".gif", ".mp4")


def on_config(config):
    """Addresses, and the navigation over the pages that exist."""
    config.site_url, config.repo_url, config.repo_name = URLS["Documentation"], URLS["Repository"], "Repository"
    docs = Path(config.docs_dir)
    pages = {str(path.relative_to(docs).as_posix()) for path in docs.rglob("*.md")} | {"index.md"}
    pages_of = {title: [page for page in names if page in pages] for title, names in NAV.items()}
    pages_of["Start"][0] = {"Overview": "index.md"}
    nav = [{title: found} for title, found in pages_of.items()]
    more = sorted(pages - {page for names in NAV.values() for page in names})
    config.nav = [*nav, {"More": more}] if more else nav
    return config


def on_files(files, config):
    """The README as first page, and the pictures outside docs/ that pages show."""
    readme = (ROOT / "README.md").read_text()
    files.append(File.generated(config, "index.md", content=moved(readme, ".", config)))
    texts = [(readme, ".")] + [(Path(file.abs_src_path).read_text(), "docs") for file in files if _is_page(file)]
    for text, folder in texts:
        for target in (match[2] for match in _LINK.finditer(text)):
            path = _place(target, folder)
            if path is None or path.suffix not in _PICTURES or path.parts[0] == "docs":
                continue
            if f"repository/{path}" not in files.src_uris:
                files.append(File.generated(config, f"repository/{path}", abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Links as the site has them."""
    if page.file.src_uri == "index.md":
        return markdown
    return moved(markdown, str(PurePosixPath("docs", page.file.src_uri).parent), config)


def moved(markdown: str, folder: str, config) -> str:
    """`markdown` of a file in `folder` of the repository, its links to files as the site has them."""
    here = PurePosixPath(folder)
    base = here.relative_to("docs") if here.parts[:1] == ("docs",) else PurePosixPath(".")

    def link(match: re.Match) -> str:
        path = _place(match[2], folder)
        if path is None:
            return match[0]
        if path.parts[:1] == ("docs",):
            target = path.relative_to("docs")
        elif str(path) == "README.md":
            target = PurePosixPath("index.md")
        elif path.suffix in _PICTURES:
            target = PurePosixPath("repository") / path
        else:
            return f"{match[1]}{URLS['Repository']}/blob/main/{path}{match[3]}"
        return f"{match[1]}{os.path.relpath(target, base)}{match[3]}"

    return _LINK.sub(link, markdown)


def _place(target: str, folder: str) -> PurePosixPath | None:
    """Where in the repository a link leads; None for an address, and for what is not there (which strict mode says)."""
    if "://" in target or target.startswith(("mailto:", "#")):
        return None
    path = PurePosixPath(os.path.normpath(PurePosixPath(folder) / target))
    return path if (ROOT / path).exists() else None


def _is_page(file) -> bool:
    return file.src_uri.endswith(".md") and file.src_uri != "index.md"
