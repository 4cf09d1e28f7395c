"""What the README tells a newcomer to type."""

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BENCHMARKS = (ROOT / "docs" / "benchmarks.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    line.partition(" #")[0].strip()
    for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if line.strip()
]
MEASURING = "memflow-bench run "
# Commands that the tests do not run as they stand, and why.
ELSEWHERE = {
    r"git clone |cd ": "the address is a placeholder",
    r"pip (install|wheel) ": "tests/test_wheel.py installs a wheel, `make test` a clone",
    r"make ": "test_make_targets; `make test` runs these tests",
    r"memflow (download|convert) |.* --model memflow-1.3b": "needs 20 GB of published files; test_options reads them",
    r"memflow serve": "runs until it is stopped; tests/serve",
}


def elsewhere(command: str) -> bool:
    return any(re.match(known, command) for known in ELSEWHERE)


def in_words(command: str, python: str) -> list[str]:
    """The command as arguments; the programs are those of this Python."""
    words = shlex.split(command)
    programs = {"python": [], "memflow": ["-m", "memflow"], "memflow-bench": ["-m", "memflow_bench"]}
    return [python, *programs[words[0]], *words[1:]]


def write_kernels(folder: Path) -> None:
    """mine.py and mine.json as docs/benchmarks.md has them, with the classes that the README names."""
    snippets = (re.search(rf"```{kind}\n(.*?)```", BENCHMARKS.split(heading)[1], re.DOTALL)[1]
                for kind, heading in (("python", "## Add a provider"), ("json", "## Add a case")))  # fmt: skip
    classes = "".join(f"\n\nclass {name}(Mine):\n    name = {name.lower()!r}\n" for name in ("Old", "New"))
    (folder / "mine.py").write_text(next(snippets) + classes)
    (folder / "mine.json").write_text(next(snippets))
