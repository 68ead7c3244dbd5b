import fcntl
import hashlib
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from loop.data.weights import PUBLISHED, Published, check_weights, fetch_weights, models_folder, sha256_of
from loop.errors import CheckpointError, ConfigError, RefusedError, StateError, UnreachableError

CONTENT = np.random.default_rng(0).bytes(3_000_000)
NAME = "net_v1.pth"


class Server:
    """A file over HTTP on loopback; `ranges` off ignores Range, `cut` ends answers after so many bytes."""

    def __init__(self):
        self.content, self.ranges, self.cut, self.status, self.asked = CONTENT, True, None, 200, []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                asked = self.headers.get("Range")
                outer.asked.append(asked)
                start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if asked and outer.ranges else 0
                if outer.status != 200:
                    self.send_error(outer.status)
                    return
                if start >= len(outer.content) and start:
                    self.send_error(416)
                    return
                body = outer.content[start:]
                self.send_response(206 if asked and outer.ranges else 200)
                if asked and outer.ranges:
                    self.send_header("Content-Range", f"bytes {start}-{len(outer.content) - 1}/{len(outer.content)}")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body if outer.cut is None else body[: outer.cut])
                self.close_connection = True

            def log_message(self, *_):
                return

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.http.server_port}/{NAME}"

    def stop(self):
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    running = Server()
    yield running
    running.stop()


@pytest.fixture
def published(server):
    return {NAME: Published(server.url, hashlib.sha256(CONTENT).hexdigest(), len(CONTENT))}


def test_what_is_published_is_whole():
    for name, entry in PUBLISHED.items():
        assert entry.url == f"https://dl.fbaipublicfiles.com/segment_anything/{name}"
        assert re.fullmatch("[0-9a-f]{64}", entry.sha256)
    assert len({entry.sha256 for entry in PUBLISHED.values()}) == 3


def test_where_weights_lie(monkeypatch, tmp_path):
    monkeypatch.setenv("CELLOOP_HOME", str(tmp_path))
    assert models_folder() == tmp_path / "models"
    monkeypatch.delenv("CELLOOP_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert models_folder() == tmp_path / ".cache" / "celloop" / "models"


def test_sha256_of_a_known_text(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, appendix B.1
    assert sha256_of(tmp_path / "abc") == check_weights(tmp_path / "abc") == expected
    with pytest.raises(CheckpointError, match="cannot read"):
        sha256_of(tmp_path / "none")


def test_a_download_is_whole_and_done_once(server, published, tmp_path):
    seen = []
    path = fetch_weights(
        NAME, folder=tmp_path / "new", published=published, progress=lambda here, total: seen.append((here, total))
    )
    assert path.read_bytes() == CONTENT
    assert [p.name for p in path.parent.iterdir()] == [NAME]
    assert seen[-1] == (len(CONTENT), len(CONTENT))
    assert [here for here, _ in seen] == sorted(here for here, _ in seen)
    assert fetch_weights(NAME, folder=tmp_path / "new", published=published) == path
    assert server.asked == [None]


def test_the_folder_is_celloops_own(published, monkeypatch, tmp_path):
    monkeypatch.setenv("CELLOOP_HOME", str(tmp_path))
    assert fetch_weights(NAME, published=published) == tmp_path / "models" / NAME


def test_a_broken_download_goes_on_where_it_stopped(server, published, tmp_path):
    server.cut = 1_000_000
    path = fetch_weights(NAME, folder=tmp_path, published=published)
    assert path.read_bytes() == CONTENT
    starts = [0 if asked is None else int(asked[6:-1]) for asked in server.asked]
    assert starts[0] == 0
    assert starts == sorted(starts)
    assert 3 <= len(starts) <= 6


def test_a_later_call_goes_on_from_the_part(server, published, tmp_path):
    (tmp_path / f"{NAME}.part").write_bytes(CONTENT[:1234])
    fetch_weights(NAME, folder=tmp_path, published=published)
    assert server.asked == ["bytes=1234-"]
    assert (tmp_path / NAME).read_bytes() == CONTENT


@pytest.mark.parametrize("size", [len(CONTENT), len(CONTENT) + 5])
def test_a_part_that_is_whole_or_too_long(server, published, tmp_path, size):
    (tmp_path / f"{NAME}.part").write_bytes((CONTENT + b"12345")[:size])
    assert fetch_weights(NAME, folder=tmp_path, published=published).read_bytes() == CONTENT
    assert len(server.asked) == (size != len(CONTENT))


def test_a_server_without_ranges_sends_it_all_again(server, published, tmp_path):
    server.ranges = False
    (tmp_path / f"{NAME}.part").write_bytes(CONTENT[:1234])
    assert fetch_weights(NAME, folder=tmp_path, published=published).read_bytes() == CONTENT


def test_another_content_is_thrown_away(server, published, tmp_path):
    server.content = bytes(len(CONTENT))
    with pytest.raises(CheckpointError, match="thrown away"):
        fetch_weights(NAME, folder=tmp_path, published=published)
    assert not (tmp_path / NAME).exists()
    server.content = CONTENT
    assert fetch_weights(NAME, folder=tmp_path, published=published).read_bytes() == CONTENT


def test_a_wrong_file_that_lies_there_is_named(published, tmp_path):
    (tmp_path / NAME).write_bytes(b"short")
    with pytest.raises(CheckpointError, match=r"5 bytes.*expected 3000000 bytes.*delete it"):
        fetch_weights(NAME, folder=tmp_path, published=published)


@pytest.mark.parametrize("content", [CONTENT[:100], CONTENT + b"more"])
def test_a_file_of_another_length_does_not_end_in_a_loop(server, published, tmp_path, content):
    server.content = content
    with pytest.raises((UnreachableError, RefusedError), match=re.escape(server.url)):
        fetch_weights(NAME, folder=tmp_path, published=published)
    assert not (tmp_path / NAME).exists()


def test_no_is_said_with_its_number(server, published, tmp_path):
    server.status = 403
    with pytest.raises(RefusedError, match="answered 403"):
        fetch_weights(NAME, folder=tmp_path, published=published)


def test_no_server_says_what_is_kept(published, tmp_path, monkeypatch):
    (tmp_path / f"{NAME}.part").write_bytes(CONTENT[:1234])
    gone = {NAME: published[NAME]._replace(url="http://127.0.0.1:9/x")}
    with pytest.raises(UnreachableError, match="1234 of 3000000 bytes are kept"):
        fetch_weights(NAME, folder=tmp_path, published=gone)
    assert (tmp_path / f"{NAME}.part").read_bytes() == CONTENT[:1234]


def test_one_download_at_a_time(published, tmp_path):
    with (tmp_path / f"{NAME}.part").open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(StateError, match="another process"):
            fetch_weights(NAME, folder=tmp_path, published=published)


def test_an_unknown_name_and_a_place_that_cannot_be_written(published, tmp_path):
    with pytest.raises(ConfigError, match=f"known: {NAME}"):
        fetch_weights("other.pth", folder=tmp_path, published=published)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write"):
        fetch_weights(NAME, folder=tmp_path / "file", published=published)
