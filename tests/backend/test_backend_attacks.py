"""What somebody may try against the backend, each over a real socket: nothing gets in, out, or stuck."""

import gzip
import io
import logging
import os
import socket
import struct
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import quote

import httpx
import numpy as np
import orjson
import pytest
import tifffile
from PIL import Image

from backend.errors import redact_logs

TOKEN = "0123456789abcdef" * 2 + "01234567"


@pytest.fixture
def log(monkeypatch):
    """log(secrets) -> a stream with what handlers write from now on, as `python -m backend` sets them up."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    monkeypatch.setattr(logging.getLogger(), "handlers", [handler])

    def start(secrets):
        redact_logs(secrets)
        return stream

    return start


def _send(b, raw, wait_s=10.0):
    """What comes back for these bytes, up to the end of the connection."""
    url = b.http.base_url
    with socket.create_connection((url.host, url.port), timeout=wait_s) as connection:
        connection.sendall(raw)
        answer = b""
        try:
            while piece := connection.recv(65536):
                answer += piece
        except (TimeoutError, ConnectionResetError):
            return answer + b"<the backend hung>"
    return answer


def _post(headers, body=b"", path="/predict"):
    head = f"POST {path} HTTP/1.1\r\nHost: b\r\nConnection: close\r\n" + "".join(f"{h}\r\n" for h in headers) + "\r\n"
    return head.encode() + body


# bodies


def test_a_stranger_s_body_is_not_even_received(backend):
    with backend(user="celloop", password="pass-1", body_s=5) as b:
        begin = time.perf_counter()
        assert _send(b, _post(["Content-Length: 30000000"])).startswith(b"HTTP/1.1 401")
        assert time.perf_counter() - begin < 2


LYING = (
    (["Content-Length: abc"], b""),
    (["Content-Length: -5"], b""),
    (["Content-Length: 2", "Content-Length: 5"], b"{}{}{"),
    (["Content-Length: " + "9" * 4000], b""),
    (["Transfer-Encoding: chunked"], b"zz\r\n{}\r\n0\r\n\r\n"),
    (["Transfer-Encoding: gzip, chunked"], b"2\r\n{}\r\n0\r\n\r\n"),
    (["Content-Length: 9999"], b"{}"),
    (["Transfer-Encoding: chunked"], b"2\r\n{}\r\n"),
    (["Content-Length: 2", "Content-Encoding: gzip"], b"{}"),
)


def test_a_body_that_is_not_what_its_header_says(backend):
    with backend(body_s=0.1) as b:
        for headers, body in LYING:
            status = _send(b, _post(headers, body)).split(b"\r\n")[0]
            assert status.startswith((b"HTTP/1.1 4", b"HTTP/1.1 501")), (headers, status)
        assert b.get("/health").status_code == 200


def test_a_request_hidden_behind_another_is_not_served(backend):
    hidden = b"GET /metrics HTTP/1.1\r\nHost: b\r\n\r\n"
    with backend(body_s=0.3) as b:
        both = _send(b, _post(["Content-Length: 4", "Transfer-Encoding: chunked"], b"0\r\n\r\n" + hidden))
        assert both.count(b"HTTP/1.1") <= 1
        assert b"celloop_requests" not in both


def test_chunks_over_the_limit_are_cut_off(backend):
    piece = b"1000\r\n" + b"x" * 4096 + b"\r\n"
    with backend(max_body_bytes=10_000) as b:
        assert b" 413 " in _send(b, _post(["Transfer-Encoding: chunked"], piece * 3)).split(b"\r\n")[0]


def test_a_packed_body_is_not_unpacked(backend):
    bomb = gzip.compress(b" " * 50_000_000)
    with backend("bright") as b:
        reply = b.http.post("/predict", content=bomb, headers={"content-encoding": "gzip"})
        assert reply.status_code == 400
        assert "packed" in reply.json()["detail"]


def test_bodies_that_trickle_are_given_up_and_only_so_many_are_received(backend):
    with backend(body_s=0.5, max_bodies=3) as b:
        url = b.http.base_url
        slow = [socket.create_connection((url.host, url.port), timeout=10) for _ in range(3)]
        for connection in slow:
            connection.sendall(_post(["Content-Length: 100"], b"{"))
        time.sleep(0.2)
        reply = b.http.post("/predict", content=b"{}")
        assert reply.status_code == 503
        assert reply.headers["retry-after"] == "1"
        for connection in slow:
            assert connection.recv(65536).startswith(b"HTTP/1.1 400")
            connection.close()
        assert b.http.post("/predict", content=b"{}").status_code == 400


def test_deep_nesting(backend):
    with backend("bright") as b:
        for opening, closing in ((b"[", b"]"), (b'{"a":', b"}")):
            for depth, status in ((500, 200), (100_000, 400)):
                deep = opening * depth + b"1" + closing * depth
                task = b'{"id": 1, "data": {"image": "/data/local-files/?d=two.png", "deep": ' + deep + b"}}"
                body = b'{"project": "3.1", "tasks": [' + task + b'], "params": {"context": {"result": [' + deep
                assert b.http.post("/predict", content=body + b"]}}}").status_code == 400
                body = b'{"project": "3.1", "tasks": [' + task + b"]}"
                assert b.http.post("/predict", content=body).status_code == status


def test_more_than_a_request_may_ask_for(backend):
    with backend("bright", max_tasks=3, max_prompts=2, max_label_config=2000) as b:
        tasks = [b.task("two.png", i) for i in range(4)]
        assert b.predict_tasks(tasks[:3]).status_code == 200
        reply = b.predict_tasks(tasks)
        assert reply.status_code == 413
        assert "4 where 3" in reply.json()["detail"]
        assert b.click("two.png", *b.keypoints).status_code == 200
        assert b.click("two.png", *b.keypoints, b.keypoints[0]).status_code == 413
        assert b.predict("two.png", label_config=b.config + " " * 2000).status_code == 413


def test_label_configs_that_explode_or_read_files(backend, tmp_path):
    (tmp_path / "secret.txt").write_text("the secret")
    laughs = '<!DOCTYPE l [<!ENTITY a0 "ha">'
    laughs += "".join(f'<!ENTITY a{i} "{f"&a{i - 1};" * 10}">' for i in range(1, 12)) + "]><View>&a11;</View>"
    reader = (
        f'<!DOCTYPE l [<!ENTITY x SYSTEM "file://{tmp_path}/secret.txt">]><View><Text name="t" value="&x;"/></View>'
    )
    with backend("bright") as b:
        for config in (laughs, reader, "<View>" * 3000):
            begin = time.perf_counter()
            reply = b.predict("two.png", label_config=config)
            assert 400 <= reply.status_code < 500
            assert "the secret" not in reply.text
            assert time.perf_counter() - begin < 5


NO_PLACES = ({"x": "a", "y": 1}, {"x": None, "y": 1}, {"x": [1], "y": {}}, {}, [], "x", None)
FAR_PLACES = ({"x": 1e308, "y": 1e308}, {"x": -1e308, "y": 5}, {"x": 1e-308, "y": 2**62})


def test_prompts_that_are_none_or_far_away(backend):
    with backend("bright") as b:
        for value in (*NO_PLACES, *FAR_PLACES):
            reply = b.click("two.png", b.keypoints[0] | {"value": value})
            assert reply.status_code == 200 or 400 <= reply.status_code < 500, value
        assert b.click("two.png", b.keypoints[0]).status_code == 200


# images that claim more than they are


def _png(width, height):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = zlib.compress(b"\0" * min(width * height, 10_000_000), 9)
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def _patched(kind, width, height):
    """A small real file whose header is changed to another size."""
    stream = io.BytesIO()
    Image.new("L", (16, 16)).save(stream, kind)
    data = bytearray(stream.getvalue())
    if kind == "JPEG":
        at = data.index(b"\xff\xc0") + 5
        data[at : at + 4] = struct.pack(">HH", height, width)
    elif kind == "BMP":
        data[18:26] = struct.pack("<ii", width, height)
    else:
        with tifffile.TiffFile(io.BytesIO(bytes(data))) as tiff:
            tags = tiff.pages[0].tags
            for tag, size in (("ImageWidth", width), ("ImageLength", height)):
                code = {3: "<H", 4: "<I"}[int(tags[tag].dtype)]
                data[tags[tag].valueoffset : tags[tag].valueoffset + struct.calcsize(code)] = struct.pack(code, size)
    return bytes(data)


def test_an_image_that_claims_too_much_is_never_decoded(backend, monkeypatch):
    def never(path):
        raise AssertionError("it was decoded")

    monkeypatch.setattr("backend.images.read_image", never)
    with backend("bright") as b:
        for side in (60_000, 10_000):
            files = {kind: _patched(kind, side, side) for kind in ("JPEG", "BMP", "TIFF")} | {"PNG": _png(side, side)}
            for kind, data in files.items():
                assert len(data) < 100_000
                (b.display / "bomb").write_bytes(data)
                for reply in (b.predict("bomb"), b.click("bomb", b.keypoints[0])):
                    assert reply.status_code == 422, kind
                    assert f"claims {side * side} px" in reply.json()["detail"]


def test_all_planes_of_a_stack_count(backend):
    with backend("bright", max_image_pixels=300_000) as b:
        tifffile.imwrite(b.display / "stack.tif", np.zeros((9, 200, 200), np.uint8), compression="zlib")
        tifffile.imwrite(b.display / "colour.tif", np.zeros((300, 300, 3), np.uint8), photometric="rgb")
        assert "claims 360000 px" in b.predict("stack.tif").json()["detail"]
        assert b.predict("two.png").status_code == 200
        assert b.predict("colour.tif").status_code in (200, 422)
        assert "claims" not in b.predict("colour.tif").text


NO_IMAGES = (
    b"RIFF\x24\x00\x00\x00WEBPVP8L\x17\x00\x00\x00\x2f\xff\xff\xff\x0f",
    b"GIF89a\xff\xff\xff\xff\x00\x00\x00",
    b"\x00\x00\x00\x0cjP  \r\n\x87\n",
    b"<svg xmlns='http://www.w3.org/2000/svg' width='90000' height='90000'/>",
    b"%!PS-Adobe-3.0 EPSF-3.0\n",
    b"II*\x00\x08\x00\x00\x00",
    b"II*\x00\x08\x00\x00\x00\xff\xff",
    b"\x89PNG\r\n\x1a\n",
    b"BM",
    b"\xff\xd8\xff\xff\xff",
    b"",
)


def test_other_formats_and_damaged_headers_are_refused(backend):
    with backend("bright") as b:
        for number, data in enumerate(NO_IMAGES):
            (b.display / f"{number}.png").write_bytes(data)
            reply = b.predict(f"{number}.png")
            assert reply.status_code == 422, data
            assert str(b.display) not in reply.text


# paths out of the roots


def test_no_way_out_of_the_image_directory(backend, log):
    with backend("bright") as b:
        root = b.display.parent
        Image.new("L", (64, 64)).save(root / "secret.png")
        (b.display / "link.png").symlink_to(root / "secret.png")
        (b.display / "up").symlink_to("..")
        (b.display / "self").symlink_to("/proc/self")
        os.mkfifo(b.display / "pipe.png")
        ways = [
            "../secret.png",
            "..%2fsecret.png",
            "%2e%2e/secret.png",
            "%252e%252e%252fsecret.png",
            "..\\secret.png",
            "..%5csecret.png",
            "%c0%ae%c0%ae/secret.png",
            "a/../../secret.png",
            "./../secret.png",
            "....//secret.png",
            "/../secret.png",
            "//" + str(root / "secret.png"),
            str(root / "secret.png"),
            "file://" + str(root / "secret.png"),
            "two.png%00.txt",
            "two.png\0",
            "link.png",
            "up/secret.png",
            "self/environ",
            "/dev/zero",
            "/etc/passwd",
            "pipe.png",
            "~/secret.png",
            "two.png/../../secret.png",
            "two.png&d=../secret.png#",
            "x" * 100_000,
        ]
        for way in ways[:-2]:
            for value in (f"/data/local-files/?d={way}", f"/data/local-files/?d={quote(way)}"):
                reply = b.predict_tasks([{"id": 1, "data": {"image": value}}])
                assert reply.status_code == 422, way
                assert str(root) not in reply.text or str(root) in way
        values = ["/data/local-files/../../secret.png", "/data/local-files/?x=two.png", "/data/local-files/"]
        values += [str(root / "secret.png"), f"file://{root}/secret.png", f"/data/local-files/?d={ways[-1]}"]
        for value in values:
            assert b.predict_tasks([{"id": 1, "data": {"image": value}}]).status_code == 422, value[:80]


# other hosts


def test_only_the_label_studio_that_is_configured_is_asked(backend, recorder):
    image = io.BytesIO()
    Image.new("L", (64, 64)).save(image, "PNG")
    studio = recorder(lambda request: (200, {}, image.getvalue()))
    other = recorder(lambda request: (200, {}, image.getvalue()))
    here, there = studio.url.removeprefix("http://"), other.url.removeprefix("http://")
    port = there.partition(":")[2]
    values = [
        f"http://{there}/data/a.png",
        f"//{there}/data/a.png",
        f"/\\{there}/data/a.png",
        f"\\\\{there}/data/a.png",
        f"http://{here}@{there}/data/a.png",
        f"http://user:word@{here}/data/a.png",
        f"http://{here}\\@{there}/data/a.png",
        f"http://{there}\\@{here}/data/a.png",
        f"http://{here}:{port}/data/a.png",
        f"http:/{there}/data/a.png",
        f"http:///{there}/data/a.png",
        f"http://[::1]:{port}/data/a.png",
        f"http://[::ffff:127.0.0.1]:{here.partition(':')[2]}/data/a.png",
        f"http://2130706433:{here.partition(':')[2]}/data/a.png",
        f"http://0x7f.1:{here.partition(':')[2]}/data/a.png",
        f"http://localhost:{here.partition(':')[2]}/data/a.png",
        f"http://127.0.0.1.:{here.partition(':')[2]}/data/a.png",
        f"http://127.0.0.1.example.org:{here.partition(':')[2]}/data/a.png",
        f"http://{here}.example.org/data/a.png",
        f"http://{here}\t.example.org/data/a.png",
        f"http://{there}\n/data/a.png",
        f"ht\ntp://{there}/data/a.png",
        f" http://{there}/data/a.png",
        f"http://127.0.0.1:0{port}/data/a.png",
        f"http://127.0.0.1:+{port}/data/a.png",
        f"http://127.0.0.1:{65536 + int(here.partition(':')[2])}/data/a.png",
        f"https://{here}/data/a.png",
        f"ftp://{here}/data/a.png",
        f"gopher://{here}/_GET",
        "data:image/png;base64,AAAA",
        "javascript:0",
    ]
    with backend("bright", label_studio_url=studio.url, label_studio_token=TOKEN) as b:
        for value in values:
            reply = b.predict_tasks([{"id": 1, "data": {"image": value}}])
            assert 400 <= reply.status_code < 500, value
            assert "word" not in reply.text
        assert studio.received == []
        for value in (f"http://{here}/data/upload/a.png", f"http://{here}#@{there}/", f"HTTP://{here}?@{there}/"):
            assert b.predict_tasks([{"id": 1, "data": {"image": value}}]).status_code == 200, value
        assert other.received == []
        assert ["authorization" in request.headers for request in studio.received] == [True, False, False]


def test_redirects_lead_nowhere(backend, recorder):
    other = recorder(lambda request: (200, {}, b"x"))
    studio = recorder(lambda request: (int(request.path[-3:]), {"location": other.url + "/data/a.png"}, b""))
    with backend("bright", label_studio_url=studio.url, label_studio_token=TOKEN) as b:
        for status in (301, 302, 303, 307, 308):
            value = f"/data/upload/{status}"
            assert b.predict_tasks([{"id": 1, "data": {"image": value}}]).status_code == 502
    assert len(studio.received) == 5
    assert other.received == []


def test_a_packed_image_is_not_unpacked(backend, recorder):
    bomb = gzip.compress(b"\0" * 20_000_000)
    studio = recorder(lambda request: (200, {"content-encoding": "gzip"}, bomb))
    with backend("bright", label_studio_url=studio.url) as b:
        reply = b.predict_tasks([{"id": 1, "data": {"image": "/data/upload/a.png"}}])
        assert reply.status_code == 502
        assert "compression" in reply.json()["detail"]
    assert studio.received[0].headers["accept-encoding"] == "identity"


# secrets


def test_no_token_in_any_reply_or_log(backend, recorder, log):
    secrets = {"label_studio_token": TOKEN, "password": "basic pass/1", "webhook_secret": "hook-secret-1"}

    def answer(request):
        status = int(request.path.rpartition("/")[2].partition(".")[0])
        return status, {"location": f"http://elsewhere/?token={TOKEN}"}, f"token {TOKEN} is wrong".encode()

    studio = recorder(answer)
    basic = httpx.BasicAuth("celloop", secrets["password"])
    with backend("bright", label_studio_url=studio.url, user="celloop", **secrets) as b:
        stream = log(b.parts.settings.secrets())
        said = ""
        for value in (
            *(f"/data/upload/{status}" for status in (301, 401, 403, 404, 500)),
            f"/data/upload/404.png?token={TOKEN}",
            f"{studio.url}/data/{TOKEN}/404.png?access_token=signed-1&sig=signed-2",
            f"http://user:signed-3@{TOKEN}.example.org/a.png?sig=signed-1",
            f"/data/local-files/?d={TOKEN}.png&sig=signed-1",
        ):
            body = orjson.dumps(b.body([{"id": 1, "data": {"image": value}}]))
            reply = b.http.post("/predict", content=body, auth=basic)
            assert 400 <= reply.status_code < 600
            said += reply.text + str(reply.headers)
        header = basic._auth_header
        for headers in ({"authorization": header + "x"}, {"x-celloop-secret": "hook-secret-1x"}):
            for path in ("/predict", "/webhook", f"/{TOKEN}?password={quote(secrets['password'])}"):
                reply = b.http.post(path, content=b"{}", headers=headers)
                said += reply.text
        b.parts.service._images = None

        def fails(*args, **kwargs):
            raise RuntimeError(
                f"GET {studio.url}/?token={TOKEN} as {header} {quote(secrets['password'])} hook-secret-1"
            )

        b.parts.service.predict = fails
        reply = b.http.post("/predict", content=orjson.dumps(b.body([b.task("two.png", 1)])), auth=basic)
        assert reply.status_code == 500
        assert "Traceback" not in reply.text
        said += reply.text
    logged = stream.getvalue()
    assert "RuntimeError" in logged
    assert "***" in logged
    kept_out = (*secrets.values(), quote(secrets["password"]), header.partition(" ")[2], "signed-")
    for secret in kept_out:
        assert secret not in said
        assert secret not in logged


# too much at once


def _click(b, user=""):
    drafts = [{"id": 1, "user": user, "result": []}] if user else []
    task = b.task("two.png", 1) | {"annotations": [], "drafts": drafts}
    return b.predict_tasks([task], params={"context": {"result": [b.keypoints[0]]}})


def test_one_person_s_clicks_are_limited_and_nobody_else_s(backend):
    with backend("bright", clicks_per_s=0.01, click_burst=2) as b:
        assert [_click(b, "ann").status_code for _ in range(3)] == [200, 200, 429]
        refused = _click(b, "ann")
        assert refused.json()["error"] == "TooManyClicksError"
        assert 1 <= int(refused.headers["retry-after"]) <= 100
        assert _click(b, "bob").status_code == 200
        assert [_click(b).status_code for _ in range(3)] == [200, 200, 429]
        assert b.predict("two.png").status_code == 200
        assert b.metric("celloop_failures_total", kind="TooManyClicksError") == 3


def test_a_flood_of_clicks_is_refused_at_once_and_the_rest_is_answered(backend):
    release, begun = threading.Event(), threading.Semaphore(0)
    with backend("bright", waiting_people=2, click_burst=1000, start_s=20) as b:
        real = b.parts.service.click

        def held(*args, **kwargs):
            begun.release()
            release.wait(20)
            return real(*args, **kwargs)

        b.parts.service.click = held
        with ThreadPoolExecutor(40) as people:
            replies = [people.submit(_click, b) for _ in range(40)]
            for _ in range(8):
                assert begun.acquire(timeout=10)
            limit = time.monotonic() + 10
            while sum(reply.done() for reply in replies) < 30 and time.monotonic() < limit:
                assert b.get("/health").status_code == 200
                time.sleep(0.02)
            refused = [reply.result() for reply in replies if reply.done()]
            assert len(refused) == 30
            assert {reply.status_code for reply in refused} == {503}
            assert all(int(reply.headers["retry-after"]) >= 1 for reply in refused)
            assert b.setup().status_code == 200
            release.set()
            answered = [reply.result().status_code for reply in replies]
        assert sorted(answered) == [200] * 10 + [503] * 30
        assert _click(b).status_code == 200


def test_work_that_hangs_never_hangs_a_request(backend):
    release = threading.Event()
    with backend("bright", waiting_people=0, start_s=0.1, click_s=0.4, reply_s=0.6) as b:
        b.parts.service.click = b.parts.service.predict = lambda *args, **kwargs: [release.wait(20), b"{}"][1]
        with ThreadPoolExecutor(8) as people:
            begin = time.perf_counter()
            held = [people.submit(_click, b, f"user {n}") for n in range(8)]
            assert [reply.result().status_code for reply in held] == [503] * 8
            assert time.perf_counter() - begin < 5
        begin = time.perf_counter()
        assert _click(b).status_code == 503
        assert b.predict("two.png").status_code == 503
        assert b.predict_tasks([b.task("two.png", n) for n in range(2)]).status_code == 503
        assert time.perf_counter() - begin < 3
        assert b.get("/health").status_code == 200
        release.set()
        limit = time.monotonic() + 5
        while b.predict("two.png").status_code == 503:
            assert time.monotonic() < limit


def test_an_index_that_hangs_holds_nobody(backend):
    release = threading.Event()
    with backend("bright", lookup_s=0.2) as b:
        b.parts.projects._index = type("Hanging", (), {"projects": lambda self: release.wait(20) and []})()
        with ThreadPoolExecutor(50) as people:
            begin = time.perf_counter()
            replies = list(people.map(lambda n: b.http.get("/versions").status_code, range(50)))
            assert time.perf_counter() - begin < 5
        assert set(replies) == {503}
        release.set()


def test_credentials_of_odd_letters_are_only_wrong(backend, caplog):
    with backend(user="celloop", password="pass-1") as b:
        for value in ("é".encode("latin-1") * 8, b"\xff\xfe==", b"Y2VsbG9vcA", b"=" * 5000):
            raw = (
                b"GET /metrics HTTP/1.1\r\nHost: b\r\nConnection: close\r\nAuthorization: Basic " + value + b"\r\n\r\n"
            )
            assert _send(b, raw).startswith(b"HTTP/1.1 401"), value
    assert "Traceback" not in caplog.text


def test_label_configs_that_take_long_to_read(backend):
    names = "".join(f'<Image name="i{i}" value="$a"/>' for i in range(6000))
    declared = "<!DOCTYPE l [" + "".join(f'<!ENTITY e{i} "&#60;Image/>">' for i in range(2000)) + "]><View/>"
    with backend("bright") as b:
        for config, status in ((f"<View>{names}</View>", 413), (declared, 400)):
            begin = time.perf_counter()
            assert b.predict("two.png", label_config=config).status_code == status
            assert time.perf_counter() - begin < 5


def test_a_line_of_the_log_is_short_whatever_is_sent(backend, caplog):
    with backend("bright") as b:
        task = {"id": 1, "data": {"k" * 1_000_000: 1}}
        assert b.predict_tasks([task]).status_code == 422
        assert b.predict_tasks([task, b.task("two.png", 2)]).status_code == 200
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("backend")]
    assert lines
    assert max(map(len, lines)) < 1000
