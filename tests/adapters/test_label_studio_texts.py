"""What a person reads when Label Studio refuses or is silent, and that the token is never part of it."""

import json
import logging
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from loop.adapters.label_studio_api import LabelStudio
from loop.adapters.label_studio_http import Connection
from loop.errors import ConfigError, LoopError, RefusedError, UnreachableError

TOKEN = "0123456789abcdef0123456789abcdef01234567"
PERSONAL = "eyJhbGciOiJIUzI1NiJ9.eyJ0b2tlbl90eXBlIjoicmVmcmVzaCJ9.c2lnbmF0dXJl"


@dataclass
class Asked:
    """One request as the server saw it."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


Reply = tuple[int, dict[str, str], bytes]


@dataclass
class Scripted:
    """A real server on loopback that answers as `answer` says and notes what it was asked."""

    answer: Callable[[Asked], Reply | None]
    asked: list[Asked] = field(default_factory=list)

    def __post_init__(self) -> None:
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def handle_any(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                asked = Asked(self.command, self.path, dict(self.headers), body)
                outer.asked.append(asked)
                reply = outer.answer(asked)
                if reply is None:
                    return
                status, headers, content = reply
                self.send_response(status)
                for name, value in {"Content-Length": str(len(content)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: Any) -> None:
                pass

        for method in ("GET", "POST", "PATCH", "DELETE"):
            setattr(Handler, f"do_{method}", Handler.handle_any)
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02})
        self.thread.start()

    def stop(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def serve() -> Iterator[Callable[[Callable[[Asked], Reply | None]], Scripted]]:
    running: list[Scripted] = []

    def start(answer: Callable[[Asked], Reply | None]) -> Scripted:
        running.append(Scripted(answer))
        return running[-1]

    yield start
    for server in running:
        server.stop()


def says(status: int, body: Any, **headers: str) -> Callable[[Asked], Reply]:
    content = body.encode() if isinstance(body, str) else json.dumps(body).encode()
    kind = "text/html" if isinstance(body, str) else "application/json"
    return lambda asked: (status, {"Content-Type": kind, **headers}, content)


def refusal(call: Callable[[], Any], kind: type[LoopError] = RefusedError, *, secret: str = TOKEN) -> str:
    """The text of the error that `call` raises; neither it nor its whole traceback holds the secret."""
    with pytest.raises(kind) as caught:
        call()
    everything = "".join(traceback.format_exception(caught.value)) + repr(caught.value)
    assert secret not in everything
    return str(caught.value)


@pytest.mark.parametrize(
    ("status", "body", "expected"),
    [
        (401, {"detail": "Invalid token."}, "401: Invalid token.; give the token of Label Studio's page Account"),
        (
            401,
            {"detail": "Authentication token no longer valid: legacy token authentication has been disabled"},
            "switch legacy tokens on",
        ),
        (403, {"detail": "You do not have permission"}, "ask the administrator"),
        (
            403,
            {"detail": "URL resolves to a reserved network address (block: 127.0.0.0/8)"},
            "start it with ML_BLOCK_LOCAL_IP=false and SSRF_PROTECTION_ENABLED=false",
        ),
        (
            400,
            {"detail": "Validation error", "validation_errors": {"title": ["too short"]}},
            '{"title": ["too short"]}',
        ),
        (500, {"detail": "database is locked"}, "500: database is locked; see Label Studio's log"),
        (500, "<html><body>Server Error</body></html>", "500: a web page; see Label Studio's log"),
        (502, "", "502: a web page"),
        (400, ["one", "two"], "['one', 'two']"),
    ],
)
def test_refusals_say_what_was_asked_what_came_and_what_to_do(serve, status, body, expected):
    server = serve(says(status, body))
    text = refusal(lambda: LabelStudio(server.url, TOKEN).project(7))
    assert f"Label Studio at {server.url} refused GET /api/projects/7/ with {status}" in text
    assert expected in text


def test_token_that_a_server_sends_back_is_blotted_out(serve):
    server = serve(lambda asked: (500, {}, f"failed with {asked.headers['Authorization']}".encode()))
    text = refusal(lambda: LabelStudio(server.url, TOKEN).project(7))
    assert "failed with Token ***" in text


def test_long_answers_lose_their_middle(serve):
    server = serve(says(400, {"detail": "start " + "x" * 50_000 + " the reason"}))
    text = refusal(lambda: LabelStudio(server.url, TOKEN).project(7))
    assert len(text) < 800
    assert "start" in text
    assert text.endswith("the reason")


def test_nothing_listens():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        text = refusal(lambda: LabelStudio(url, TOKEN).check(), UnreachableError)
    assert text.startswith(f"nothing answers at {url} (")
    assert "celloop up" in text


def test_name_that_no_server_has(monkeypatch):
    for proxy in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(proxy, raising=False)
    text = refusal(lambda: LabelStudio("http://label-studio.invalid", TOKEN).check(), UnreachableError)
    assert "nothing answers at http://label-studio.invalid" in text


def test_connection_that_breaks_off(serve):
    server = serve(lambda asked: None)
    text = refusal(lambda: LabelStudio(server.url, TOKEN).project(7), UnreachableError)
    assert "broke off during GET /api/projects/7/" in text
    assert len(server.asked) == 1


def test_answer_that_takes_too_long(serve):
    server = serve(lambda asked: time.sleep(0.5))
    text = refusal(lambda: LabelStudio(server.url, TOKEN, timeout_s=0.1).project(7), UnreachableError)
    assert "did not answer GET /api/projects/7/ within 0.1 s" in text
    assert "not done twice" in text


@pytest.mark.parametrize("status", [500, 408, 409, 429, 503])
def test_a_write_is_sent_once(serve, status):
    server = serve(says(status, {"detail": "later"}))
    refusal(lambda: LabelStudio(server.url, TOKEN).update_project(7, title="abc"))
    assert [asked.method for asked in server.asked] == ["PATCH"]


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_redirect_is_not_followed_and_carries_nothing_away(serve, status):
    elsewhere = serve(says(200, {}))
    server = serve(says(status, "", Location=f"{elsewhere.url}/api/projects/7/?from=here"))
    text = refusal(lambda: LabelStudio(server.url, TOKEN).project(7))
    assert f"sent GET /api/projects/7/ on to {elsewhere.url}/api/projects/7/ ({status})" in text
    assert elsewhere.asked == []
    assert len(server.asked) == 1


def test_redirect_of_the_personal_token_is_not_followed(serve):
    elsewhere = serve(says(200, {"access": "stolen"}))
    server = serve(says(307, "", Location=f"{elsewhere.url}/api/token/refresh/"))
    refusal(lambda: LabelStudio(server.url, PERSONAL).project(7), secret=PERSONAL)
    assert elsewhere.asked == []


@pytest.mark.parametrize(
    ("headers", "expected"),
    [({"Location": "/user/login/?next=/api/"}, "on to /user/login/ (302)"), ({}, "on to nowhere (302)")],
)
def test_redirect_without_a_server_is_not_followed(serve, headers, expected):
    server = serve(says(302, "", **headers))
    assert expected in refusal(lambda: LabelStudio(server.url, TOKEN).project(7))
    assert len(server.asked) == 1


def test_redirect_to_no_address(serve):
    server = serve(says(302, "", Location="http://localhost:port/"))
    text = refusal(lambda: LabelStudio(server.url, TOKEN).project(7), UnreachableError)
    assert "Invalid URL in location header" in text


def test_web_page_in_place_of_json(serve):
    server = serve(says(200, "<html>hello</html>"))
    text = refusal(lambda: LabelStudio(server.url, TOKEN).check())
    assert "text/html; expected JSON. Is this the address of Label Studio?" in text


def test_broken_json_is_refused_without_the_headers_that_came_with_it(serve):
    server = serve(lambda asked: (*says(200, {}, Echo=asked.headers["Authorization"])(asked)[:2], b"{"))
    text = refusal(lambda: LabelStudio(server.url, TOKEN).project(7))
    assert "answered GET /api/projects/7/ with application/json; expected JSON" in text


def test_another_program_at_this_address(serve):
    server = serve(says(200, {"version": "3.17.2"}))
    assert "not as Label Studio does" in refusal(lambda: LabelStudio(server.url, TOKEN).check())


def test_cookies_are_not_kept(serve):
    server = serve(says(200, {}, **{"Set-Cookie": "sessionid=abc; Path=/"}))
    adapter = LabelStudio(server.url, TOKEN)
    adapter.project(1)
    adapter.project(2)
    assert all("Cookie" not in asked.headers for asked in server.asked)
    assert [asked.headers["Authorization"] for asked in server.asked] == [f"Token {TOKEN}"] * 2


def test_address_with_a_path_is_kept(serve):
    server = serve(says(200, {}))
    LabelStudio(f"{server.url}/studio/", TOKEN).project(1)
    assert server.asked[0].path == "/studio/api/projects/1/"


def test_proxy_of_the_environment_is_not_asked_about_this_machine(serve, monkeypatch):
    proxy = serve(says(502, "proxy"))
    for name in ("HTTP_PROXY", "http_proxy"):
        monkeypatch.setenv(name, proxy.url)
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    server = serve(says(200, {"id": 1}))
    assert LabelStudio(server.url, TOKEN).project(1) == {"id": 1}
    assert proxy.asked == []


def test_personal_token_is_traded_once_and_again_when_it_ran_out(serve):
    valid = ["access-1"]

    def answer(asked: Asked) -> Reply:
        if asked.path == "/api/token/refresh/":
            assert json.loads(asked.body) == {"refresh": PERSONAL}
            return says(200, {"access": valid[0]})(asked)
        if asked.headers["Authorization"] != f"Bearer {valid[0]}":
            return says(401, {"detail": f"{asked.headers['Authorization']} has expired"})(asked)
        return says(200, {})(asked)

    server = serve(answer)
    adapter = LabelStudio(server.url, PERSONAL)
    adapter.project(1)
    adapter.project(2)
    assert [asked.path for asked in server.asked] == ["/api/token/refresh/", "/api/projects/1/", "/api/projects/2/"]
    valid[0] = "access-2"
    adapter.project(3)
    assert [asked.path for asked in server.asked[3:]] == [
        "/api/projects/3/",
        "/api/token/refresh/",
        "/api/projects/3/",
    ]
    assert all(PERSONAL not in str(asked.headers) for asked in server.asked)


def test_access_token_that_a_server_sends_back_is_blotted_out(serve):
    access = "access" + "-1"

    def answer(asked: Asked) -> Reply:
        if asked.path == "/api/token/refresh/":
            return says(200, {"access": access})(asked)
        return says(500, {"detail": f"no {asked.headers['Authorization']}"})(asked)

    text = refusal(lambda: LabelStudio(serve(answer).url, PERSONAL).project(1), secret=access)
    assert "no Bearer ***" in text


@pytest.mark.parametrize(
    ("status", "body", "expected"),
    [
        (401, {"detail": f"Token {PERSONAL} is invalid"}, "refused the personal access token with 401: Token *** is"),
        (200, {"token": "x"}, "without an access token"),
        (200, ["x"], "without an access token"),
        (200, "page", "without an access token"),
    ],
)
def test_personal_token_that_is_not_taken(serve, status, body, expected):
    server = serve(says(status, body))
    assert expected in refusal(lambda: LabelStudio(server.url, PERSONAL).project(1), secret=PERSONAL)


@pytest.mark.parametrize("token", ["", "  \n", "abc\ndef", "abc def", "tökén", "abc\x00"])
def test_token_that_can_be_none_is_refused_unseen(token):
    with pytest.raises(ConfigError, match="Account & Settings") as caught:
        LabelStudio("http://127.0.0.1:1", token)
    assert not token.strip() or token not in str(caught.value)


def test_space_around_a_token_is_dropped(serve):
    server = serve(says(200, {}))
    LabelStudio(server.url, f" {TOKEN}\n").project(1)
    assert server.asked[0].headers["Authorization"] == f"Token {TOKEN}"


@pytest.mark.parametrize(
    "url", ["", "127.0.0.1:8080", "localhost", "ftp://localhost", "http://", "http://localhost:port"]
)
def test_address_that_can_be_none_is_refused(url):
    with pytest.raises(ConfigError, match="no address of Label Studio; expected one like"):
        LabelStudio(url, TOKEN)


def test_password_in_the_address_is_refused_unseen():
    with pytest.raises(ConfigError, match="holds a user or password") as caught:
        LabelStudio("http://me:sesame@localhost:8080", TOKEN)
    assert "sesame" not in str(caught.value)


def test_token_is_in_no_log_line_and_no_repr(serve, caplog):
    caplog.set_level(logging.DEBUG)
    server = serve(says(200, {}))
    for token in (TOKEN, PERSONAL):
        adapter = LabelStudio(server.url, token)
        connection = Connection(server.url, token)
        shown = [repr(adapter), str(adapter), repr(connection), repr(vars(connection)), repr(vars(connection._auth))]
        assert all(token not in text for text in shown)
        if token == TOKEN:
            adapter.project(1)
            adapter.update_project(1, title="abc")
    assert "HTTP Request: GET" in caplog.text
    assert TOKEN not in caplog.text
    assert PERSONAL not in caplog.text


def test_numbers_that_json_lacks_are_not_sent(serve):
    server = serve(says(200, {}))
    with pytest.raises(ValueError, match="not JSON compliant"):
        Connection(server.url, TOKEN).send("POST", "/api/x", body={"score": float("nan")})
    assert server.asked == []


@pytest.mark.parametrize("call", ["delete_project", "next_task"])
def test_only_what_is_not_there_is_no_refusal(serve, call):
    server = serve(says(403, {"detail": "no"}))
    assert "403: no" in refusal(lambda: getattr(LabelStudio(server.url, TOKEN), call)(7))


def test_client_of_label_studio_is_imported_by_the_first_question_alone():
    code = "import sys, loop.adapters.label_studio_api as api; api.LabelStudio('http://x', 'y'); print(*sys.modules)"
    asked = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "label_studio_sdk" not in asked.stdout.split()


def test_closed_adapter_frees_its_sockets(serve):
    server = serve(says(200, {}))
    adapter = LabelStudio(server.url, TOKEN)
    adapter.project(1)
    adapter.close()
    with pytest.raises(RuntimeError, match="closed"):
        adapter.project(1)
