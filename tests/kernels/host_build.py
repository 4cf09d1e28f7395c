"""The host build of csrc/: the .cu files compiled with g++ through tests/cuda_host, under AddressSanitizer and UBSan.

The library runs in a process of its own (tests/cuda_host/worker.py), which AddressSanitizer may end; what it then says
is the message of the HostError. Builds are kept in a folder per user, keyed by what went in.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import pickle
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
HEADERS = ROOT / "tests" / "cuda_host"
COMMON = ["-std=c++17", "-g1", "-fPIC", "-Wall", "-Wno-unknown-pragmas", f"-I{HEADERS}"]
# -O0: compiling at -O1 takes longer than all the tests save by it
KERNELS = ["-x", "c++", "-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-strict-aliasing"]
SCHEDULER = ["-O2"]


class HostError(AssertionError):
    """The host build stopped: what AddressSanitizer, UBSan or the scheduler found."""


def missing() -> str | None:
    """Why there can be no host build here; None where there can."""
    if shutil.which("g++") is None:
        return "g++ is not installed"
    if sys.platform != "linux":
        return f"the host build of the CUDA kernels runs on Linux, not on {sys.platform}"
    return None if Path(sanitizer()).is_absolute() else "g++ has no AddressSanitizer here (libasan.so is missing)"


@functools.cache
def sanitizer() -> str:
    """Path of libasan.so; a bare name where g++ has none."""
    found = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    return found.stdout.strip()


def cache() -> Path:
    """The folder of the builds, of this user alone."""
    folder = Path(tempfile.gettempdir()) / f"memflow-cuda-host-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to another user")
    return folder


def digest(*parts: bytes) -> str:
    state = hashlib.sha256()
    for part in parts:
        state.update(hashlib.sha256(part).digest())
    return state.hexdigest()[:20]


def once(target: Path, make) -> Path:
    """`target`, made by make(path) if it is not there yet; safe against other processes."""
    import fcntl  # not on every system that collects these tests

    if not target.exists():
        with open(target.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not target.exists():
                unfinished = target.with_suffix(f".{os.getpid()}")
                make(unfinished)
                unfinished.rename(target)
    return target


def compile_object(source: Path, text: bytes, options: list[str], headers: bytes) -> Path:
    """The object of `source` with the content `text`."""
    command = ["g++", *COMMON, *options]

    def make(target: Path) -> None:
        line = [*command, f"-I{source.parent}", "-c", "-", "-o", str(target)]
        if "-x" not in options:
            line[1:1] = ["-x", "c++"]
        done = subprocess.run(line, input=f'#line 1 "{source}"\n'.encode() + text, capture_output=True)
        if done.returncode:
            raise RuntimeError(f"{source.name} does not compile for the host:\n{done.stderr.decode()[:4000]}")

    return once(cache() / f"{source.stem}-{digest(repr(command).encode(), text, headers)}.o", make)


def library(sources: tuple[str, ...] = (), changes: Iterable[tuple[str, str, str]] = ()) -> Path:
    """The shared library of the named .cu files (default: all).

    changes: (file of csrc, a piece of its text that occurs once, what stands there instead), for a broken copy.
    """
    texts = {path.name: path.read_text() for path in sorted(CSRC.iterdir()) if path.suffix in (".cu", ".cuh", ".h")}
    for name, old, new in changes:
        if texts[name].count(old) != 1:
            raise ValueError(f"{name} holds {texts[name].count(old)} times {old!r}; it must be once")
        texts[name] = texts[name].replace(old, new)
    own = {name: text for name, text in texts.items() if not name.endswith(".cu")}
    host = [path for path in sorted(HEADERS.iterdir()) if path.suffix in (".h", ".cpp")]
    runtime = b"".join(path.read_bytes() for path in host if path.suffix == ".h")
    headers = runtime + "\0".join(own.values()).encode()
    folder = CSRC
    if changes:  # the copies of the headers must be found first
        folder = cache() / f"csrc-{digest(headers)}"
        folder.mkdir(exist_ok=True)
        for name, text in own.items():
            once(folder / name, lambda target, text=text: target.write_text(text))
    names = [name for name in texts if name.endswith(".cu") and (not sources or name in sources)]
    jobs = [(folder / name, texts[name].encode(), KERNELS, headers) for name in names]
    jobs += [(path, path.read_bytes(), SCHEDULER, runtime) for path in host if path.suffix == ".cpp"]
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(lambda job: compile_object(*job), jobs))

    def link(target: Path) -> None:
        line = ["g++", "-shared", "-fsanitize=address,undefined", *map(str, objects), "-o", str(target)]
        subprocess.run(line, check=True)

    return once(cache() / f"memflow-{digest(*(path.name.encode() for path in objects))}.so", link)


class Process:
    """A process that has loaded one library and calls its functions."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.start()

    def start(self) -> None:
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the process)
        environment = {
            **os.environ,
            "LD_PRELOAD": sanitizer(),
            "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1:handle_abort=0",
            "UBSAN_OPTIONS": "print_stacktrace=1",
        }
        command = [sys.executable, "-I", str(HEADERS / "worker.py"), str(self.path)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.log}
        self.process = subprocess.Popen(command, env=environment, **pipes)

    def call(self, request: object) -> object:
        """The answer of worker.py. A process that ends instead is started again for the next call."""
        if not self.alive:
            self.start()
        message = pickle.dumps(request)
        try:
            self.process.stdin.write(struct.pack("<q", len(message)) + message)
            self.process.stdin.flush()
            answer = self.process.stdout.read(struct.unpack("<q", self.process.stdout.read(8))[0])
            return pickle.loads(answer)
        except (BrokenPipeError, struct.error, EOFError) as error:
            self.stop()
            self.log.seek(0)
            said = self.log.read().decode(errors="replace")
            self.log.close()
            raise HostError(said[:6000]) from error

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def stop(self) -> None:
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        self.process.wait()

    def close(self) -> None:
        if self.alive:
            self.stop()
        self.log.close()
