import hashlib
import time
from urllib.parse import quote

import httpx
import numpy as np
import pytest
from PIL import Image

from backend.download import LabelStudioDownloads
from backend.images import ImageSource
from loop.errors import ImageError, RefusedError, UnreachableError

LEGACY = "ab" * 20
PERSONAL = "head.body.signature"


@pytest.fixture
def png(tmp_path):
    pixels = np.arange(12 * 9 * 3, dtype=np.uint8).reshape(12, 9, 3)
    path = tmp_path / "display" / "project one" / "a+b ü.png"
    path.parent.mkdir(parents=True)
    Image.fromarray(pixels).save(path)
    return path, pixels


@pytest.fixture
def client():
    with httpx.Client(trust_env=False) as client:
        yield client


def _downloads(url, token, client, *, max_bytes=10**6, timeout_s=5.0):
    return LabelStudioDownloads(url, token, client, max_bytes=max_bytes, timeout_s=timeout_s)


def _local(tmp_path, client, **limits):
    return ImageSource(tmp_path / "display", _downloads("", "", client), max_bytes=limits.get("max_bytes", 10**6))


def _value(relative):
    return f"/data/local-files/?d={quote(relative)}"


def test_a_local_file_is_read_where_it_lies(tmp_path, png, client):
    path, pixels = png
    with _local(tmp_path, client).open(_value("project one/a+b ü.png")) as file:
        assert file.path == path
        assert file.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
        np.testing.assert_array_equal(file.pixels(), pixels)


@pytest.mark.parametrize(
    "relative",
    [
        "../secret.png",
        "project one/../../secret.png",
        "..",
        "",
        ".",
        "/",
        "project one",
        "missing.png",
        "a\0b.png",
        "x" * 5000,
        "loop/loop/loop.png",
    ],
)
def test_what_is_no_file_below_the_root_is_refused(tmp_path, png, client, relative):
    Image.new("L", (4, 4)).save(tmp_path / "secret.png")
    (tmp_path / "display" / "loop").symlink_to(tmp_path / "display" / "loop")
    with pytest.raises(ImageError), _local(tmp_path, client).open(_value(relative)):
        pass


def test_an_absolute_path_stays_below_the_root(tmp_path, png, client):
    Image.new("L", (4, 4)).save(tmp_path / "secret.png")
    with (
        pytest.raises(ImageError, match="no such file"),
        _local(tmp_path, client).open(_value(str(tmp_path / "secret.png"))),
    ):
        pass
    with _local(tmp_path, client).open(_value("/project one/a+b ü.png")) as file:
        assert file.path == png[0]


def test_double_quoting_does_not_climb(tmp_path, png, client):
    Image.new("L", (4, 4)).save(tmp_path / "secret.png")
    for value in ("/data/local-files/?d=%2e%2e/secret.png", "/data/local-files/?d=%252e%252e%252fsecret.png"):
        with pytest.raises(ImageError), _local(tmp_path, client).open(value):
            pass


def test_a_link_out_of_the_root_is_refused_and_one_inside_is_not(tmp_path, png, client):
    Image.new("L", (4, 4)).save(tmp_path / "secret.png")
    folder = tmp_path / "display" / "project one"
    (folder / "out.png").symlink_to(tmp_path / "secret.png")
    (folder / "in.png").symlink_to(png[0])
    (tmp_path / "display" / "away").symlink_to(tmp_path)
    for relative in ("project one/out.png", "away/secret.png"):
        with pytest.raises(ImageError, match="leads out"), _local(tmp_path, client).open(_value(relative)):
            pass
    with _local(tmp_path, client).open(_value("project one/in.png")) as file:
        assert file.path == png[0]


def test_a_local_file_over_the_limit_is_refused(tmp_path, png, client):
    with (
        pytest.raises(ImageError, match="over 10"),
        _local(tmp_path, client, max_bytes=10).open(_value("project one/a+b ü.png")),
    ):
        pass


@pytest.mark.parametrize("value", [None, 5, "", ["/data/local-files/?d=a.png"], {}])
def test_a_value_that_is_no_text_is_refused(tmp_path, client, value):
    with pytest.raises(ImageError, match="expected an address"), _local(tmp_path, client).open(value):
        pass


def test_an_undecodable_file_is_named_by_its_value(tmp_path, client):
    (tmp_path / "display").mkdir()
    (tmp_path / "display" / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    source = _local(tmp_path, client)
    with source.open("/data/local-files/?d=bad.png") as file, pytest.raises(ImageError, match="d=bad") as caught:
        file.pixels()
    assert str(tmp_path) not in str(caught.value)


def test_an_upload_is_fetched_with_the_legacy_token_and_removed_afterwards(tmp_path, png, client, recorder):
    path, pixels = png
    server = recorder(lambda request: (200, {}, path.read_bytes()))
    source = ImageSource(tmp_path, _downloads(server.url + "/", LEGACY, client), max_bytes=10)
    for value in ("/data/upload/3/0123abcd-a.png", server.url + "/data/upload/3/0123abcd-a.png"):
        with source.open(value) as file:
            np.testing.assert_array_equal(file.pixels(), pixels)
            assert file.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
        assert not file.path.exists()
    assert [request.headers.get("authorization") for request in server.received] == [f"Token {LEGACY}"] * 2
    assert {request.path for request in server.received} == {"/data/upload/3/0123abcd-a.png"}


def test_local_files_come_from_label_studio_where_no_root_is_given(png, client, recorder):
    path, pixels = png
    server = recorder(lambda request: (200, {}, path.read_bytes()))
    with ImageSource(None, _downloads(server.url, LEGACY, client), max_bytes=10).open(_value("a/b.png")) as file:
        np.testing.assert_array_equal(file.pixels(), pixels)
    assert server.received[0].path == "/data/local-files/?d=a/b.png"


def test_a_personal_token_is_exchanged_once_and_again_when_it_ran_out(png, client, recorder):
    valid = {"access-1"}

    def answer(request):
        if request.path == "/api/token/refresh/":
            n = sum(r.path == request.path for r in server.received)
            valid.clear()
            valid.add(f"access-{n}")
            return 200, {}, f'{{"access": "access-{n}"}}'.encode()
        held = request.headers.get("authorization", "").removeprefix("Bearer ")
        return (200, {}, png[0].read_bytes()) if held in valid else (401, {}, b"{}")

    server = recorder(answer)
    downloads = _downloads(server.url, PERSONAL, client)
    for _ in range(3):
        assert b"".join(downloads.stream("/data/upload/1/a.png")) == png[0].read_bytes()
    assert sum(request.method == "POST" for request in server.received) == 1
    valid.clear()
    assert b"".join(downloads.stream("/data/upload/1/a.png")) == png[0].read_bytes()
    assert sum(request.method == "POST" for request in server.received) == 2
    assert not any(PERSONAL in request.headers.get("authorization", "") for request in server.received)


@pytest.mark.parametrize("token", [LEGACY, PERSONAL])
def test_a_refused_token_is_named_and_not_repeated(client, recorder, token):
    server = recorder(lambda request: (401, {}, b"{}"))
    with pytest.raises(RefusedError, match="token") as caught:
        list(_downloads(server.url, token, client).stream("/data/upload/1/a.png"))
    assert token not in str(caught.value)


@pytest.mark.parametrize(
    "value",
    [
        "http://example.org/a.png",
        "//example.org/a.png",
        "file:///etc/passwd",
        "ftp://127.0.0.1/a.png",
        "s3://bucket/a.png",
        "http://user:pw@127.0.0.1:{port}/data/a.png",
        "http://127.0.0.1:1/a.png",
        "https://127.0.0.1:{port}/a.png",
        "http://[::1/a.png",
        "http://127.0.0.1:99999999/a.png",
        "/data/../api/users",
        "/data/%2e%2e/api/users",
        "a.png",
    ],
)
def test_other_places_are_never_asked(client, recorder, value):
    server = recorder(lambda request: (200, {}, b""))
    value = value.replace("{port}", server.url.rpartition(":")[2])
    with pytest.raises(ImageError):
        list(_downloads(server.url, LEGACY, client).stream(value))
    assert server.received == []


def test_without_label_studio_nothing_is_fetched(client):
    with pytest.raises(ImageError, match="CELLOOP_LABEL_STUDIO_URL"):
        list(_downloads("", "", client).stream("/data/upload/1/a.png"))


def test_the_token_is_sent_to_data_paths_only(client, recorder):
    server = recorder(lambda request: (200, {}, b"x"))
    assert b"".join(_downloads(server.url, LEGACY, client).stream("/static/a.png")) == b"x"
    assert "authorization" not in server.received[0].headers


def test_a_redirect_is_not_followed(client, recorder):
    other = recorder(lambda request: (200, {}, b"x"))
    server = recorder(lambda request: (302, {"location": other.url + "/data/a.png"}, b""))
    with pytest.raises(RefusedError, match="another address"):
        list(_downloads(server.url, LEGACY, client).stream("/data/upload/1/a.png"))
    assert other.received == []


def test_a_missing_upload_and_a_dead_server(client, recorder):
    server = recorder(lambda request: (404, {}, b""))
    with pytest.raises(RefusedError, match="404"):
        list(_downloads(server.url, LEGACY, client).stream("/data/upload/1/a.png"))
    with pytest.raises(UnreachableError, match="ConnectError"):
        list(_downloads("http://127.0.0.1:1", LEGACY, client).stream("/data/upload/1/a.png"))


def test_a_download_over_the_limit_is_cut_off(client, recorder):
    server = recorder(lambda request: (200, {}, b"x" * 5000))
    with pytest.raises(ImageError, match="larger than 4999"):
        list(_downloads(server.url, LEGACY, client, max_bytes=4999).stream("/data/upload/1/a.png"))
    assert len(b"".join(_downloads(server.url, LEGACY, client, max_bytes=5000).stream("/data/upload/1/a.png"))) == 5000


def test_a_download_that_trickles_is_given_up():
    class Trickle(httpx.SyncByteStream):
        def __iter__(self):
            for _ in range(50):
                time.sleep(0.02)
                yield b"x"

    transport = httpx.MockTransport(lambda request: httpx.Response(200, stream=Trickle()))
    with httpx.Client(transport=transport) as client, pytest.raises(UnreachableError, match="did not arrive"):
        list(_downloads("http://127.0.0.1", LEGACY, client, timeout_s=0.1).stream("/data/upload/1/a.png"))


def test_a_slow_download_is_given_up(client, recorder):
    def slow(request):
        time.sleep(0.5)
        return 200, {}, b"x"

    server = recorder(slow)
    with pytest.raises(UnreachableError, match="Timeout"):
        list(_downloads(server.url, LEGACY, client, timeout_s=0.1).stream("/data/upload/1/a.png"))
