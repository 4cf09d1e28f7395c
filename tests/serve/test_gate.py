"""Who may use a server: foreign names of it, foreign pages, tokens; and options that would let anybody in."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from memflow.errors import MemFlowError
from memflow.serve.command import settings_of
from memflow.serve.settings import Gate
from tests.serve.conftest import Running, upgrade

SECRET = "a-token-of-some-length"


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example"}, 400),
        ({"Host": "evil.example", "Origin": "http://evil.example"}, 400),  # another name for this address (rebinding)
        ({"Host": "localhost.evil.example"}, 400),
        ({"Host": "127.0.0.1.evil.example"}, 400),
        ({"Host": "[::1"}, 400),
        ({"Host": ""}, 400),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://["}, 403),
        ({"Origin": ""}, 403),
    ],
)
def test_foreign_pages_and_names_are_refused(shared, headers, status):
    assert shared.http.get("/v1/info", headers=headers).status_code == status
    assert shared.http.post("/v1/check", headers=headers, json={"prompt": "bo"}).status_code == status
    assert _handshake(shared, **headers) == 403


def test_own_pages_and_names_are_not(shared):
    own = f"http://127.0.0.1:{shared.port}"
    assert shared.http.get("/v1/info", headers={"Origin": own}).status_code == 200
    assert shared.http.get("/v1/info", headers={"Host": "localhost"}).status_code == 200
    assert shared.http.get("/v1/info", headers={"Host": "192.168.7.9:80"}).status_code == 200
    assert _handshake(shared, Origin=own) == 101
    response = shared.http.get("/v1/info")
    assert "frame-ancestors 'none'" in response.headers["content-security-policy"]
    assert "access-control-allow-origin" not in response.headers


def test_an_origin_that_is_allowed(serve):
    running = serve(origins=("https://tales.example",))
    response = running.http.get("/v1/info", headers={"Origin": "https://tales.example"})
    assert response.status_code == 200 and response.headers["access-control-allow-origin"] == "https://tales.example"
    assert running.http.get("/v1/info", headers={"Host": "tales.example"}).status_code == 200
    assert running.http.get("/v1/info", headers={"Origin": "https://other.example"}).status_code == 403


def test_a_token(serve):
    running = serve(token=SECRET)
    for wrong in ({}, {"Authorization": "Bearer no"}, {"Authorization": SECRET}, {"Cookie": "memflow_token=no"}):
        for path in ("/", "/v1/info", "/metrics"):
            assert running.http.get(path, headers=wrong).status_code == 401
        assert _handshake(running, **wrong) == 403
    assert running.http.get("/v1/info?token=no").status_code == 401
    assert running.http.get("/v1/info?" + "a=1&" * 30).status_code == 401
    assert running.http.get("/?" + "a=1&" * 40 + "token=no").status_code == 401
    assert running.http.get("/health").status_code == 200
    assert running.http.get("/v1/info", headers={"Authorization": f"Bearer {SECRET}"}).status_code == 200
    assert _handshake(running, Authorization=f"bearer {SECRET}") == 101
    page = running.http.get(f"/?token={SECRET}")
    assert page.status_code == 303 and page.headers["location"] == "./"
    assert "HttpOnly" in page.headers["set-cookie"] and "SameSite=strict" in page.headers["set-cookie"]
    assert running.http.get("/v1/info").status_code == 200  # with the cookie
    assert _handshake(running, Cookie=f"memflow_token={SECRET}") == 101
    assert SECRET not in json.dumps(running.http.get("/v1/info").json())


def test_nobody_else_may_reach_a_server_without_a_token():
    from memflow.cli.options import Serving

    for host in ("0.0.0.0", "::", "192.168.1.7", "example.org", "127.0.0.1.example.org"):
        with pytest.raises(MemFlowError, match="--token SECRET is needed"):
            settings_of(Serving(host=host))
    assert settings_of(Serving(host="0.0.0.0", token=SECRET)).token == SECRET
    with pytest.raises(MemFlowError, match="at least 8 characters"):
        settings_of(Serving(token="short"))
    for token in ("geheim\u00e4\u00f6\u00fc", "two\nlines of it", "\u043f\u0430\u0440\u043e\u043b\u044c12"):
        with pytest.raises(MemFlowError, match="ASCII letters, digits and signs"):
            settings_of(Serving(token=token))
    for host in ("127.0.0.1", "::1", "localhost", "127.8.8.8"):
        settings_of(Serving(host=host))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        *(
            ({"token": bad}, "--token must be of ASCII")
            for bad in ("\u65e5" * 9, "\xe4" * 9, "with blanks", "a\nb" * 9)
        ),
        *(
            ({"allow_origin": [bad]}, "--allow-origin .*must be http")
            for bad in ("stories.example.org", "http://", "*", "https://a/b", "https://*.a", "null", "")
        ),
        ({"folder": Path(__file__)}, "--dir .*cannot be made: File exists"),
        ({"folder": Path(__file__) / "x"}, "--dir .*cannot be made: Not a directory"),
    ],
)
def test_options_that_cannot_work(given, message):
    from memflow.cli.options import Serving

    with pytest.raises(MemFlowError, match=message):
        settings_of(Serving(**given))


def test_tokens_are_compared_in_constant_time(monkeypatch):
    from memflow.serve import settings
    from memflow.serve.settings import Settings

    compared = []
    monkeypatch.setattr(settings.hmac, "compare_digest", lambda a, b: compared.append((a, b)) or a == b)
    one = Gate(None, Settings(folder=None, token=SECRET))
    scope = {"type": "http", "path": "/", "query_string": b"", "headers": [(b"authorization", b"Bearer x\xff")]}
    scope["headers"].append((b"host", b"localhost"))
    assert one._refusal(scope)[0] == 401 and compared


def _handshake(running: Running, **headers: str) -> int:
    """The status that a WebSocket is answered with."""
    with socket.create_connection(("127.0.0.1", running.port), 20) as raw:
        raw.sendall(upgrade(running, **headers))
        return int(raw.recv(4096).split()[1])
