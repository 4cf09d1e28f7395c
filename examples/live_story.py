"""Steer a story while it is told: a client of `memflow serve`, with nothing but the websockets package.

    memflow serve                                  # in another terminal
    python examples/live_story.py live.mp4 "bo, a red ball, jumps on the beach." "mia, a white star, waits."

Every prompt but the first is sent after two seconds of video. The bytes that come are the film.
"""

import asyncio
import json
import sys

from websockets.asyncio.client import connect

ADDRESS = "ws://127.0.0.1:8765/v1/realtime/video"


async def tell(path: str, prompts: list[str], address: str = ADDRESS, seconds: float = 2.0) -> str:
    """Write the film to `path`; returns the id of the story, which the server keeps for a day."""
    async with connect(address, max_size=None) as server:
        total = str(round(seconds * len(prompts)))
        await server.send(json.dumps({"type": "session.start", "prompt": prompts[0], "seconds": total}))
        frames, rate, coming = 0, None, prompts[1:]
        with open(path, "wb") as film:
            async for message in server:
                if isinstance(message, bytes):
                    film.write(message)
                    continue
                message = json.loads(message)
                if message["type"] == "error":
                    raise SystemExit(message["message"])
                if message["type"] == "video.start":
                    story, rate = message["request_id"], message["memflow"]["fps"]
                if message["type"] == "video.chunk_metadata":
                    print(f"{frames / rate:5.2f} s  {message['memflow']['prompt']}")
                    frames += message["num_frames"]
                    if coming and frames / rate >= seconds * (len(prompts) - len(coming)):
                        event = {"event": {"prompt": coming.pop(0)}}
                        await server.send(json.dumps({"type": "session.interaction", "interaction": event}))
    return story


if __name__ == "__main__":
    if len(sys.argv) < 3:
        raise SystemExit(__doc__)
    asyncio.run(tell(sys.argv[1], sys.argv[2:]))
