"""`memflow generate` in several processes, started as torchrun starts them but by forking, which takes no time."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

import numpy as np
import torch
from together import FACTORY

from memflow.cli import main
from memflow.errors import MemFlowError
from memflow.output.video import VideoWriter
from memflow.stream.chunks import ChunkDriver


class Launch:
    """The processes of one `memflow` command line.

    Args:
        size: how many.
        arguments: of the command line.
        folder: where what each says is kept.
        spoilt: number of a process whose model fails in the second chunk.
    """

    def __init__(self, size: int, arguments: list, folder: Path, spoilt: int | None = None):
        with socket.socket() as port:
            port.bind(("127.0.0.1", 0))
            address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port.getsockname()[1]), "WORLD_SIZE": str(size)}
        self.folder, arguments = folder, [str(argument) for argument in arguments]
        self.processes = []
        for rank in range(size):
            place = address | {"RANK": str(rank), "LOCAL_RANK": str(rank), "GLOO_SOCKET_IFNAME": "lo"}
            process = FACTORY.Process(target=_main, args=(arguments, place, folder, rank == spoilt))
            process.start()
            self.processes.append(process)

    def wait(self, seconds: float = 120) -> list[int]:
        """Exit codes; a negative number names the signal that a process died of."""
        end = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
        late = [process for process in self.processes if process.is_alive()]
        for process in late:
            process.kill()
        assert not late, f"still there after {seconds} s: {self.said('err')}"
        return [process.exitcode for process in self.processes]

    def until(self, path: Path, times: int = 1) -> None:
        """Wait until a file has been put there so many times."""
        end, seen = time.monotonic() + 120, set()
        while len(seen) < times:
            assert time.monotonic() < end and all(p.is_alive() for p in self.processes), self.said("err")
            seen |= {path.stat().st_ino} if path.exists() else set()
            time.sleep(0.005)

    def said(self, stream: str) -> list[str]:
        """What every process wrote, stream: out or err."""
        paths = [self.folder / f"{stream}-{rank}" for rank in range(len(self.processes))]
        return [path.read_text() if path.exists() else "" for path in paths]


def written(film: Path) -> np.ndarray:
    """All frames [T, 32, 32, 3] that were given to the film, before they were compressed: that makes one grey level of
    difference many."""
    return np.fromfile(film.with_suffix(".frames"), np.uint8).reshape(-1, 32, 32, 3)


def _recorded(write):
    def recorded(video, frames):
        with video.path.with_suffix(".frames").open("ab") as file:
            file.write(frames.tobytes())
        return write(video, frames)

    return recorded


def _main(arguments: list[str], place: dict[str, str], folder: Path, spoilt: bool) -> None:
    os.environ |= place
    VideoWriter.write = _recorded(VideoWriter.write)
    torch.set_num_threads(1)
    for number, name in ((1, "out"), (2, "err")):
        file = os.open(folder / f"{name}-{place['RANK']}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(file, number)
    if spoilt:
        denoise = ChunkDriver.denoise

        def fails(driver, *rest):
            if driver.position == 1:
                raise MemFlowError("the weights are damaged")
            return denoise(driver, *rest)

        ChunkDriver.denoise = fails
    raise SystemExit(main(arguments))
