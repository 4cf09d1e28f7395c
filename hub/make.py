"""The folder that the Hugging Face kernels hub takes: `build/torch-universal` with the kernels, and a card.

    python hub/make.py OUT                      # OUT/build/torch-universal/..., OUT/README.md
    python -c "from kernels import get_local_kernel; from pathlib import Path; print(get_local_kernel(Path('OUT')))"

Universal: Python files, plain torch and the Triton kernels, for every GPU, system and Python. The CUDA C++ kernels are
not in it. The name under which it is loaded, and so that of its torch ops, carries a digest of the files: two versions
load side by side. Contract read in the package kernels 0.17.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "memflow_kernels"
VERSION = 1  # of the interface, as the hub counts: raised where a caller has to change something


def make(folder: Path, package: Path = PACKAGE) -> Path:
    """Write the layout.

    Args:
        folder: where; must not hold a `build` already.
        package: the sources of memflow_kernels.

    Returns:
        The folder of the variant.
    """
    variant = folder / "build" / "torch-universal"
    shutil.copytree(package, variant, ignore=shutil.ignore_patterns("__pycache__", "*.so", "csrc", "py.typed"))
    metadata = {
        "id": f"memflow_kernels_{digest(variant)}",
        "name": "memflow-kernels",
        "version": VERSION,
        "license": "Apache-2.0",
        "python-depends": ["einops"],
        "backend": {"type": "cpu"},  # the hub knows no "any"; what is needed at least
    }
    (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
    shutil.copy(ROOT / "hub" / "card.md", folder / "README.md")
    shutil.copy(ROOT / "LICENSE", folder / "LICENSE")
    return variant


def digest(folder: Path) -> str:
    """Of all files, names and contents."""
    found = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        found.update(f"{path.relative_to(folder).as_posix()}\0{path.stat().st_size}\0".encode())
        found.update(path.read_bytes())
    return found.hexdigest()[:12]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", metavar="OUT", type=Path)
    given = parser.parse_args().folder
    try:
        print(make(given))
    except OSError as error:
        parser.error(f"{given}: the layout cannot be written: {error.strerror or error}")
