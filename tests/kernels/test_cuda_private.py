"""The cache of built kernels: the user's own, private, and nothing in it is loaded that was changed since."""

import os
import stat

import pytest
from fake_nvcc import fake_nvcc, sources

from memflow_kernels.cuda.builder import BuildError, Recipe, cache_folder, cached_library, find_toolchain, library_of
from memflow_kernels.cuda.builder.private import is_whole, make_private
from memflow_kernels.cuda.builder.toolchain import parse

NOBODY = 65534


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MEMFLOW_CUDA_CACHE", str(tmp_path / "above" / "cache"))
    fake_nvcc(tmp_path / "home" / "bin" / "nvcc", f"echo x >> {tmp_path / 'calls'}")
    return Recipe(sources(tmp_path / "csrc"), find_toolchain(), parse("8.0"), tmp_path / "torch")


def builds(tmp_path) -> int:
    """How often all four files were made."""
    return len((tmp_path / "calls").read_text().split()) // 4


def mode(path) -> str:
    return oct(stat.S_IMODE(path.lstat().st_mode))


def append(library):
    with open(library, "ab") as file:
        file.write(b"x")


def flip(library):
    data = bytearray(library.read_bytes())
    data[len(data) // 2] ^= 1
    library.write_bytes(data)


def link_to_copy(library):
    library.rename(library.with_name("copy.so"))
    library.symlink_to(library.with_name("copy.so"))


def beside(library):
    return library.with_name("memflow_cuda.so.sha256")


DAMAGES = {
    "empty": lambda library: library.write_bytes(b""),
    "cut": lambda library: os.truncate(library, 3),
    "a flipped bit": flip,
    "longer": append,
    "gone": lambda library: library.unlink(),
    "a link": link_to_copy,
    "a dangling link": lambda library: (library.unlink(), library.symlink_to("nowhere")),
    "writable by the group": lambda library: library.chmod(0o620),
    "writable by all": lambda library: library.chmod(0o602),
    "no digest": lambda library: beside(library).unlink(),
    "another digest": lambda library: beside(library).write_text("0" * 64),
    "a digest that is no text": lambda library: beside(library).write_bytes(b"\xff\xfe"),
    "a link to a digest": lambda library: (
        beside(library).rename(library.with_name("d")),
        beside(library).symlink_to(library.with_name("d")),
    ),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_library_that_is_not_as_it_was_built_is_built_again(recipe, tmp_path, damage):
    library = cached_library(recipe)
    good = library.read_bytes()
    assert is_whole(library) and cached_library(recipe) == library and builds(tmp_path) == 1
    damage(library)
    assert not is_whole(library)
    assert cached_library(recipe) == library and builds(tmp_path) == 2
    assert library.read_bytes() == good and not library.is_symlink() and is_whole(library)
    assert mode(library.parent) == "0o700" and mode(library) == mode(beside(library)) == "0o600"


def test_a_folder_that_others_can_write_to_is_closed(recipe, tmp_path):
    library = cached_library(recipe)
    library.parent.chmod(0o777)
    assert not is_whole(library)
    assert cached_library(recipe) == library and mode(library.parent) == "0o700" and is_whole(library)
    assert builds(tmp_path) == 1, "what others could have put there would be theirs"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files to another user")
@pytest.mark.parametrize("what", [lambda library: library, beside], ids=["library", "digest"])
def test_a_file_of_another_user_is_built_again(recipe, tmp_path, what):
    library = cached_library(recipe)
    os.chown(what(library), NOBODY, NOBODY)
    assert cached_library(recipe) == library and builds(tmp_path) == 2
    assert library.stat().st_uid == beside(library).stat().st_uid == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files to another user")
@pytest.mark.parametrize("depth", [0, 1], ids=["of the library", "of the cache"])
def test_a_folder_of_another_user_is_refused(recipe, tmp_path, depth):
    library = cached_library(recipe)
    folder = library.parents[depth]
    append(library)
    os.chown(folder, NOBODY, NOBODY)
    with pytest.raises(BuildError, match=f"cannot be used: {folder} belongs to another user"):
        cached_library(recipe)


def test_whatever_the_umask_the_cache_is_private(recipe, tmp_path):
    before = os.umask(0)
    try:
        library = cached_library(recipe)
    finally:
        os.umask(before)
    for folder in (library.parent, cache_folder(), cache_folder().parent):
        assert mode(folder) == "0o700"
    assert {mode(path) for path in library.parent.iterdir()} == {"0o600"}


def test_a_folder_that_is_a_link_is_refused(recipe, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    place = library_of(recipe).parent
    place.parent.mkdir(parents=True)
    place.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BuildError, match=f"cannot be used: {place} is a link"):
        cached_library(recipe)
    assert not list((tmp_path / "elsewhere").iterdir())


def test_the_lock_follows_no_link_and_empties_nothing(recipe, tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("not ours")
    lock = library_of(recipe).parent / "lock"
    lock.parent.mkdir(parents=True)
    lock.symlink_to(precious)
    with pytest.raises(BuildError, match=r"cannot be used: .*lock"):
        cached_library(recipe)
    assert precious.read_text() == "not ours"
    lock.unlink()
    lock.write_text("kept")
    assert is_whole(cached_library(recipe)) and lock.read_text() == "kept"


def test_a_relative_cache_home_is_ignored(monkeypatch, tmp_path):
    """The standard says so: a library would lie wherever the process happens to run."""
    monkeypatch.delenv("MEMFLOW_CUDA_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "here")
    assert cache_folder() == tmp_path / ".cache" / "memflow" / "cuda"


def test_what_root_prepared_is_used_by_others(recipe, monkeypatch):
    """Images of containers: root built the library, another user runs it."""
    if os.geteuid() != 0:
        pytest.skip("only root can play root")
    library = cached_library(recipe)
    monkeypatch.setattr(os, "geteuid", lambda: NOBODY)
    assert is_whole(library)
    make_private(library.parent)


def test_two_that_make_the_folder_at_once(tmp_path, monkeypatch):
    """What was missing when one looked is there when it comes to make it."""
    (tmp_path / "a" / "b").mkdir(parents=True, mode=0o700)
    monkeypatch.setattr(os.path, "lexists", lambda path: False)
    make_private(tmp_path / "a" / "b")
