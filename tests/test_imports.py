"""The import graph of memflow: no circles, few levels. Which room may import which is checked by `make lint`."""

from __future__ import annotations

from functools import cache
from graphlib import CycleError, TopologicalSorter

import pytest

LEVELS = 7

Graph = dict[str, set[str]]


@pytest.fixture(scope="module")
def imports() -> Graph:
    """Module -> the modules of memflow that it imports, inside functions too, not under TYPE_CHECKING."""
    grimp = pytest.importorskip("grimp", reason="grimp is not installed: pip install -e '.[test]'")
    graph = grimp.build_graph("memflow", exclude_type_checking_imports=True, cache_dir=None)
    return {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}


def circles(imports: Graph) -> list[list[str]]:
    """One circle of imports for each group of modules that import each other; breaks them in `imports`."""
    found = []
    while True:
        try:
            TopologicalSorter(imports).prepare()
            return found
        except CycleError as error:
            circle = error.args[1][::-1]  # each imports the next
            group = next((known for known in found if set(known) & set(circle)), None)
            if group is None:
                found.append(circle)
            imports[circle[0]].discard(circle[1])


def longest_chain(imports: Graph) -> list[str]:
    """Modules of which each imports the next, as many as possible. imports: without circles."""

    @cache
    def chain(module: str) -> list[str]:
        return [module, *max((chain(other) for other in sorted(imports[module])), key=len, default=[])]

    return max((chain(module) for module in sorted(imports)), key=len)


def test_the_checks_find_circles_and_chains():
    graph = {"a": {"b"}, "b": {"c", "d"}, "c": {"b"}, "d": {"e"}, "e": set()}
    assert circles(graph) in ([["b", "c", "b"]], [["c", "b", "c"]])
    assert longest_chain({"a": {"b", "e"}, "b": {"d"}, "d": {"e"}, "e": set()}) == ["a", "b", "d", "e"]


def test_there_are_no_circles(imports):
    found = circles({module: set(others) for module, others in imports.items()})
    assert not found, [" -> ".join(circle) for circle in found]


def test_there_are_few_levels(imports):
    graph = {module: set(others) for module, others in imports.items()}
    circles(graph)
    chain = longest_chain(graph)
    assert len(chain) <= LEVELS, " -> ".join(chain)
