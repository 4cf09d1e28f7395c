"""A worker of `memflow generate --jobs` and `--ray`: one model, that makes one film after the other."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import torch

from memflow.cli.loading import backend, load, size_and_memory
from memflow.cli.options import Request
from memflow.errors import MemFlowError, OutOfMemory
from memflow.output.video import VideoWriter, marked
from memflow.stream.saved import read_header
from memflow.tellers.records import FOLDER, Task, begin, claimed, finish, is_done, sync
from memflow.tellers.teller import Teller

_SHARE, _SECONDS = 0.05, 30.0  # of the time, at most, goes into states that nobody asked for; nor more often than that


class FilmWorker:
    """Tells stories into the folder of a request.

    Args:
        request: of the stories.
        local: workers on this machine; 0: whoever placed this one has chosen its GPU and its share of the processor.
        index: of this worker.

    Raises:
        MemFlowError: the model cannot be loaded, has no stories of this size, length or memory, or this machine does
            not see the folder.
    """

    def __init__(self, request: Request, local: int, index: int):
        folder = request.output / FOLDER
        if not folder.is_dir():
            raise MemFlowError(f"{folder}: is not there on {platform.node()}; all workers need the same folder")
        if local and request.device is None and torch.cuda.is_available():
            request = replace(request, device=f"cuda:{index % torch.cuda.device_count()}")
        if local and "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, torch.get_num_threads() // local))
        self._request = request
        self._pipeline, self._device, self._about = load(request)
        # What no story could have is said once, and not of each.
        self._asked = size_and_memory(request, self._pipeline)
        if request.seconds_per_prompt is not None:
            self._pipeline.chunks_for(request.seconds_per_prompt)
        self._teller = Teller(self._pipeline, folder, snapshots=request.report)

    def tell(self, task: Task, stopping: Callable[[], bool]) -> Iterator[dict]:
        """Make a film, or the rest of it; where `stopping()`, its state is saved.

        Yields:
            position and length of the story in chunks, frames of the film, those that this worker made; whether it is
            done. What is done already yields nothing.
        """
        with backend(self._request.backend, self._device), claimed(task):
            if is_done(task):
                return
            begin(task)
            try:
                with self._begun(task) as video:
                    yield from self._told(task, video, stopping)
            finally:
                self._teller.end(task.id)

    def _begun(self, task: Task) -> VideoWriter:
        """The film, with the frames that its story goes on from; the story is in the teller then."""
        fps = self._pipeline.fps
        if task.state.exists():
            try:
                known = read_header(task.state, digest=False)["extra"]
                video = VideoWriter.resume(task.film, fps, *marked(known))
                self._teller.resume(task.id)
                return video
            except OutOfMemory:
                raise
            except MemFlowError as error:
                if task.film.stat().st_size and not task.overwrite:
                    raise MemFlowError(f"{error}; --overwrite tells the story anew") from None
            task.state.unlink()
        told = {name: task.told[name] for name in ("prompts", "seconds_per_prompt", "seed")}
        self._teller.begin(id=task.id, **told, **self._asked)
        return VideoWriter(task.film, fps)

    def _told(self, task: Task, video: VideoWriter, stopping: Callable[[], bool]) -> Iterator[dict]:
        stream = self._teller.stream(task.id)
        before, length, saved, cost, last = video.frames, len(stream), stream.position, 0.0, time.monotonic()
        report = None
        if self._request.report:
            from memflow.output.report import MemoryReport  # and matplotlib with it

            report = MemoryReport.of(stream, task.name)

        def step(done: bool = False) -> dict:
            made = video.frames - before
            return {"position": stream.position, "length": length, "frames": video.frames, "made": made, "done": done}

        yield step()
        # A chunk is written while the next one is made.
        with ThreadPoolExecutor(1) as writer:
            writing = Future()
            writing.set_result(b"")
            done = False
            while not done and not stopping():
                turn = self._teller.turn()
                writing.result()
                if turn.error is not None:
                    raise turn.error
                if turn.chunk is None:
                    done = True
                    continue
                writing = writer.submit(video.write, turn.chunk.frames[0].numpy())
                if report is not None:
                    report.add(turn.chunk, turn.snapshot)
                if stream.position < length and self._is_due(stream.position, cost, last):
                    writing.result()
                    start = time.monotonic()
                    self._save(task, video)
                    saved, last = stream.position, time.monotonic()
                    cost = last - start
                yield step()
            writing.result()
            if not done and stream.position > saved:
                self._save(task, video)
        if report is not None and len(report):
            report.save(task.film.with_suffix(".png"))
        if done:
            video.close()
            finish(task, video)
        yield step(done)

    def _is_due(self, position: int, cost: float, last: float) -> bool:
        """Whether a state is to be written. cost: seconds of the last one, which was ready at `last`."""
        if self._request.save_every is not None:
            return position % self._request.save_every == 0
        return time.monotonic() - last > max(_SECONDS, cost / _SHARE)

    def _save(self, task: Task, video: VideoWriter) -> None:
        sync(task.film)
        self._teller.save(task.id, self._about | {"name": task.name} | video.mark)
