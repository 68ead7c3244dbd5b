"""How the doctor mends, on a server that answers as Label Studio was recorded to; the real one is in tests/services."""

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import SecretStr

from flows.local import doctor_mend
from flows.local.doctor import _tried
from flows.local.doctor_mend import addresses, queue, webhooks
from flows.local.doctor_project import FaultError
from loop.adapters.index import ImageRow
from loop.adapters.label_studio_api import QueuedTask, QueueState
from loop.adapters.label_studio_hooks import Backend, Hook
from loop.adapters.label_studio_http import Connection
from loop.adapters.label_studio_tokens import enable_legacy_tokens
from loop.errors import RefusedError, StateError, UnreachableError
from loop.labelstudio.interface import Interface, label_config

BLOCKED = "URL resolves to a reserved network address (block: 127.0.0.0/8)"
Reply = tuple[int, dict[str, str], Any]


class Recorder:
    """Answers by path and notes method, path, body and headers of each request."""

    def __init__(self, replies: dict[str, Reply]) -> None:
        self.asked: list[tuple[str, str, bytes, dict[str, str]]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                outer.asked.append((self.command, self.path, body, dict(self.headers)))
                status, headers, said = replies.get(f"{self.command} {self.path}", (404, {}, {"detail": "none"}))
                content = json.dumps(said).encode()
                self.send_response(status)
                for name, value in {"Content-Type": "application/json", **headers}.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: Any) -> None:
                pass

        for method in ("GET", "POST"):
            setattr(Handler, f"do_{method}", Handler.answer)
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02})
        self.thread.start()

    def stop(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def serve() -> Iterator[Callable[[dict[str, Reply]], Recorder]]:
    running: list[Recorder] = []

    def start(replies: dict[str, Reply]) -> Recorder:
        running.append(Recorder(replies))
        return running[-1]

    yield start
    for one in running:
        one.stop()


def refused(detail: str, **faults: Any) -> dict[str, Any]:
    return {"detail": detail, **({"validation_errors": faults} if faults else {})}


CHOICE = ['"none of these" is not a valid choice.']
TAKES_BOTH: dict[str, Reply] = {
    "POST /api/ml/": (400, {}, refused("Validation error", auth_method=CHOICE)),
    "POST /api/webhooks/": (400, {}, refused("Validation error", actions={"0": CHOICE})),
}


def probe(server: Recorder, backend: str = "http://127.0.0.1:9", **more: Any) -> Any:
    return SimpleNamespace(
        connection=Connection(server.url, "0" * 40),
        endpoints=SimpleNamespace(backend_url=backend, label_studio_url=server.url),
        row=SimpleNamespace(ls_project_id=3),
        name="cells",
        interface=Interface.parse(label_config()),
        task=SimpleNamespace(id=8, data={"image": "/data/local-files/?d=a.png"}),
        **{"attached": list, **more},
    )


def test_addresses_that_label_studio_takes_and_what_it_was_asked(serve: Any) -> None:
    server = serve(TAKES_BOTH)
    assert "know each other" in addresses(probe(server))
    backend, hook = (json.loads(body) for _, _, body, _ in server.asked)
    assert (backend["project"], backend["url"], backend["auth_method"]) == (3, "http://127.0.0.1:9", "none of these")
    assert (hook["url"], hook["actions"]) == ("http://127.0.0.1:9/webhook", ["none of these"])


@pytest.mark.parametrize(
    ("replies", "cure"),
    [
        (
            {"POST /api/ml/": (403, {}, refused(BLOCKED)), "POST /api/webhooks/": (403, {}, refused(BLOCKED))},
            "start Label Studio with ML_BLOCK_LOCAL_IP=false and SSRF_PROTECTION_ENABLED=false",
        ),
        ({"POST /api/webhooks/": (403, {}, refused(BLOCKED))}, "start Label Studio with SSRF_PROTECTION_ENABLED=false"),
        ({"POST /api/ml/": (500, {}, refused("Can't resolve hostname backend"))}, "give the backend an address"),
        (
            {"POST /api/webhooks/": (400, {}, refused("Validation error", url=["Enter a valid URL."], actions={}))},
            "with a dot in its name",
        ),
    ],
)
def test_an_address_that_is_refused_is_a_fault_that_a_person_mends(
    serve: Any, replies: dict[str, Reply], cure: str
) -> None:
    with pytest.raises(FaultError) as found:
        addresses(probe(serve(TAKES_BOTH | replies)))
    assert cure in found.value.cure
    assert found.value.mend is None


def test_a_backend_that_only_this_machine_reaches_is_a_fault(serve: Any) -> None:
    well = serve({"GET /health": (200, {}, {"status": "UP"})})
    silent = [Backend(1, f"{well.url}/", "celloop", False, "it timed out")]
    with pytest.raises(FaultError, match="though this machine does: it timed out"):
        addresses(probe(serve(TAKES_BOTH), well.url, attached=lambda: silent))
    away = [Backend(1, "http://127.0.0.1:9", "celloop", False, "")]
    assert "know each other" in addresses(probe(serve(TAKES_BOTH), attached=lambda: away))


def test_pictures_at_another_address_than_the_backend_reads_are_a_fault(serve: Any) -> None:
    server = serve(TAKES_BOTH)
    looked = probe(server)
    looked.task.data["image"] = f"{server.url}/data/upload/1/a.png"
    assert "know each other" in addresses(looked)
    looked.task.data["image"] = "http://label-studio:8080/data/upload/1/a.png"
    with pytest.raises(FaultError, match="task 8 lies at http://label-studio:8080"):
        addresses(looked)


def test_which_webhooks_ring_for_nobody(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    alive = serve({})
    here = "http://127.0.0.1:9"
    hooks = [
        Hook(1, f"{here}/webhook", False, True),  # made by Label Studio, beside the right one
        Hook(2, f"{here}/webhook", True, False),  # the right one
        Hook(3, "http://127.0.0.1:7/webhook", True, False),  # of an earlier port
        Hook(4, "http://127.0.0.1:8/webhook", False, True),  # left behind by a backend
        Hook(5, "http://127.0.0.1:6/webhook", False, True),  # of a backend that is attached
        Hook(6, f"{alive.url}/webhook", False, True),  # somebody listens
        Hook(7, "http://127.0.0.1:8/webhook", False, False),  # a person's own
    ]
    removed: list[int] = []
    monkeypatch.setattr(doctor_mend, "hooks_of", lambda *_: hooks)
    monkeypatch.setattr(doctor_mend, "remove_hook", lambda _, number: removed.append(number))
    attached = [Backend(1, "http://127.0.0.1:6", "other", False, "")]
    with pytest.raises(FaultError, match="3 webhooks of project cells") as found:
        webhooks(probe(serve({}), attached=lambda: attached))
    assert found.value.mend is not None
    assert found.value.mend().startswith("removed 3 webhooks")
    assert removed == [1, 3, 4]


def fault(detail: str, mend: Callable[[], str] | None) -> FaultError:
    return FaultError(detail, "do this", mend)


def test_mending_goes_on_until_nothing_is_left() -> None:
    wrong = ["first", "second"]

    def look() -> str:
        if wrong:
            raise fault(wrong[0], lambda: f"mended the {wrong.pop(0)}")
        return "all well"

    left = _tried("x", look)
    assert (left.outcome, left.detail, left.cure, left.mended) == ("fault", "first", "do this", ())
    check = _tried("x", look, mend=True)
    assert (check.outcome, check.detail, check.mended) == (
        "mended",
        "all well",
        ("mended the first", "mended the second"),
    )


def test_what_a_mend_does_not_put_right_stays_a_fault() -> None:
    def look() -> str:
        raise fault("stubborn", lambda: "tried")

    check = _tried("x", look, mend=True)
    assert (check.outcome, check.detail, check.cure, check.mended) == ("fault", "stubborn", "do this", ("tried",))


def test_a_mend_that_fails_says_why() -> None:
    def fail() -> str:
        raise StateError("a round runs; wait for it")

    def look() -> str:
        raise fault("wrong", fail)

    check = _tried("x", look, mend=True)
    assert (check.outcome, check.detail) == ("fault", "wrong; it could not be mended: a round runs; wait for it")


LOGIN: dict[str, Reply] = {
    "GET /user/login/": (200, {"Set-Cookie": "csrftoken=before; Path=/"}, {}),
    "POST /user/login/": (302, {"Location": "/projects/", "Set-Cookie": "csrftoken=after; Path=/"}, {}),
    "POST /api/jwt/settings": (200, {}, {"legacy_api_tokens_enabled": True}),
}


def test_legacy_tokens_are_switched_on_as_a_person_does_it(serve: Any) -> None:
    server = serve(LOGIN)
    enable_legacy_tokens(server.url, "ann@lab.org", SecretStr("secret-word"))
    _, login, settings = server.asked
    assert b"email=ann%40lab.org" in login[2]
    assert b"csrfmiddlewaretoken=before" in login[2]
    assert json.loads(settings[2]) == {"api_tokens_enabled": True, "legacy_api_tokens_enabled": True}
    assert {name.lower(): value for name, value in settings[3].items()}["x-csrftoken"] == "after"


def test_a_wrong_password_or_right_is_told_without_it(serve: Any) -> None:
    server = serve(LOGIN | {"POST /user/login/": (200, {}, {})})
    with pytest.raises(RefusedError, match=r"does not let ann@lab\.org in") as found:
        enable_legacy_tokens(server.url, "ann@lab.org", SecretStr("secret-word"))
    assert "secret-word" not in str(found.value)
    server = serve(LOGIN | {"POST /api/jwt/settings": (403, {}, {})})
    with pytest.raises(RefusedError, match="answered 403 to /api/jwt/settings"):
        enable_legacy_tokens(server.url, "ann@lab.org", SecretStr("secret-word"))
    with pytest.raises(UnreachableError, match="nothing answers"):
        enable_legacy_tokens("http://127.0.0.1:9", "ann@lab.org", SecretStr("secret-word"))


def test_a_silent_webhook_on_another_machine_is_named_and_left_to_a_person(
    serve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = "http://127.0.0.1:9"
    hooks = [
        Hook(1, f"{here}/webhook", True, False),
        Hook(2, "http://localhost:7/webhook", False, True),  # another name than the backend's
        Hook(3, "http://127.0.0.1:7/webhook", False, True),
    ]
    removed: list[int] = []
    monkeypatch.setattr(doctor_mend, "hooks_of", lambda *_: [hook for hook in hooks if hook.id not in removed])
    monkeypatch.setattr(doctor_mend, "remove_hook", lambda _, number: removed.append(number))
    looked = probe(serve({}))
    check = _tried("webhooks", lambda: webhooks(looked), mend=True)
    assert removed == [3]
    assert (check.outcome, len(check.mended)) == ("fault", 1)
    assert "http://localhost:7/webhook (number 2)" in check.detail
    assert "unless you need them" in check.cure


def queue_probe(tmp_path: Path, **state: Any) -> Any:
    """A project whose queue is as given; what is published is told by `published`, one answer a question."""
    right = {"version": "v-r1", "sampling": "Uncertainty sampling", "versions": {"v-r1": 1}, "scored": 1}
    found = QueueState(**{**right, "first": (QueuedTask(1, 0.5, False, 1),), "unscored": (), **state})
    row = ImageRow(1, "i1", "0" * 64, "", "", 1, score=0.5, rank=1)
    published = ["v-r1"]
    named: list[dict[str, Any]] = []
    return SimpleNamespace(
        name="cells",
        row=SimpleNamespace(ls_project_id=3),
        index=SimpleNamespace(
            project=lambda _: SimpleNamespace(published_version=published[0], ls_project_id=3),
            images=lambda *_, **__: [row],
            rounds=lambda _: [],
        ),
        studio=SimpleNamespace(queue=lambda *_, **__: found, update_project=lambda _, **changed: named.append(changed)),
        workspace=SimpleNamespace(root=tmp_path),
        published=published,
        named=named,
    )


def test_the_version_that_is_named_is_the_one_that_is_published_when_it_is_mended(tmp_path: Path) -> None:
    looked = queue_probe(tmp_path, version="")
    with pytest.raises(FaultError, match="the project names no version") as found:
        queue(looked)
    looked.published[0] = "v-r2"  # a round has ended meanwhile
    assert found.value.mend is not None
    assert "named v-r2" in found.value.mend()
    assert looked.named == [{"model_version": "v-r2"}]


def test_what_neither_a_mend_nor_a_round_takes_away_is_left_to_a_person(tmp_path: Path) -> None:
    with pytest.raises(FaultError, match="2 of ''") as found:
        queue(queue_probe(tmp_path, versions={"v-r1": 1, "": 2}))
    assert found.value.mend is None
    assert found.value.cure.startswith("delete them in Label Studio")
