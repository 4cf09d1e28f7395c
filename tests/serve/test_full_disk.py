"""A disk without room, and a picture that cannot be made: said as what they are; one story ends, its place is free."""

from __future__ import annotations

import errno
import os

import pytest
from PIL import Image

from memflow.serve.film import Film


def full(*arguments):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def ends(running, viewer):
    """The last message of a viewer whose story could not go on; others can."""
    last = viewer.rest()[-1]
    assert last["type"] == "error" and viewer.closed == 1011, last
    running.idle()
    with running.started() as other:
        other.until("video.chunk_metadata")
    return last


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_a_journal_that_takes_no_more(serve):
    """Also not when it is closed: what is buffered is tried again then."""
    running = serve()
    with running.started() as viewer:
        film = running.stories.tellings[viewer.messages[0]["request_id"]].film
        film._journal.close()
        film._journal = open("/dev/full", "r+b")  # noqa: SIM115 (the film closes it)
        last = ends(running, viewer)
    assert last["code"] == "disk_full" and "No space left on device" in last["message"]


def test_a_film_that_takes_no_more_goes_on_from_its_state(serve, monkeypatch):
    running = serve()
    with running.started() as viewer:
        id = viewer.messages[0]["request_id"]
        viewer.until("video.chunk_metadata", 2)
        viewer.send("session.save")
        saved = viewer.until("session.saved")["chunks"]
        with monkeypatch.context() as patch:
            patch.setattr(running.stories.tellings[id].film.video, "_append", full)
            last = viewer.rest()[-1]
        assert last["code"] == "disk_full" and "No space left on device" in last["message"]
    running.idle()
    with running.started(None, memflow={"resume": id}) as viewer:
        assert viewer.messages[0]["memflow"]["chunks"] == saved
        viewer.until("video.chunk_metadata")


def test_a_story_that_finds_no_room_leaves_no_file(serve, monkeypatch):
    running = serve()
    with monkeypatch.context() as patch, running.viewer() as viewer:
        patch.setattr(Film, "_write", full)
        viewer.send("session.start", prompt="bo")
        assert viewer.next()["code"] == "disk_full" and viewer.next() is None and viewer.closed == 1011
    running.idle()
    assert list(running.settings.folder.iterdir()) == []


@pytest.mark.parametrize("asked", [{"format": "jpeg"}, {"memflow": {"report": True}}], ids=["pictures", "thumbnails"])
def test_a_picture_that_cannot_be_made_is_no_failure_of_the_model(serve, monkeypatch, asked):
    def save(*arguments, **options):
        raise OSError("encoder error -2 when writing image file")

    running = serve()
    with monkeypatch.context() as patch, running.started(**asked) as viewer:
        patch.setattr(Image.Image, "save", save)
        last = viewer.rest()[-1]
        assert last["code"] == "failed" and viewer.closed == 1011
    assert "cannot be encoded: encoder error -2" in last["message"] and "model" not in last["message"]
    running.idle()
    with running.started(**asked) as other:
        other.until("video.chunk_metadata")
