"""Storage: the same behaviour over files and S3, typed errors, own retries and deadline."""

from __future__ import annotations

import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from elastic_lm.errors import AccessDeniedError, AlreadyExistsError, NotFoundError, StorageError
from elastic_lm.storage import Storage


@pytest.fixture(params=["file", pytest.param("s3", marks=pytest.mark.s3)])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "file":
        return Storage.open(str(tmp_path / "root"))
    return Storage.open(request.getfixturevalue("s3_url"))


def test_object_is_read_back_whole_and_by_range(storage: Storage) -> None:
    storage.write("a/b.bin", b"0123456789")
    assert storage.read("a/b.bin") == b"0123456789"
    assert storage.read_range("a/b.bin", 3, 4) == b"3456"
    assert storage.read_range("a/b.bin", 3, 0) == b""
    assert storage.size("a/b.bin") == 10
    storage.write("a/b.bin", b"new")
    assert storage.read("a/b.bin") == b"new"


def test_missing_object_is_told_by_type(storage: Storage) -> None:
    storage.write("folder/x", b"")
    for name in ("none", "folder"):
        with pytest.raises(NotFoundError, match=name):
            storage.read(name)
        assert not storage.exists(name)
    assert storage.exists("folder/x")
    storage.delete("none")


def test_object_has_the_time_at_which_it_was_stored(storage: Storage) -> None:
    began = time.time()
    storage.write("x", b"y")
    # S3 tells whole seconds, and a file system's clock is a few milliseconds behind.
    assert began - 1.1 <= (storage.modified_s("x") or 0.0) <= time.time() + 0.1
    with pytest.raises(NotFoundError):
        storage.modified_s("none")


def test_create_refuses_an_existing_object(storage: Storage) -> None:
    storage.create("c", b"first")
    with pytest.raises(AlreadyExistsError):
        storage.create("c", b"second")
    assert storage.read("c") == b"first"


def test_list_is_relative_sorted_and_by_prefix(storage: Storage) -> None:
    for name in ("b/2", "a", "b/1", "bc"):
        storage.write(name, b"x")
    storage.child("b").write("deep/3", b"x")
    assert storage.list() == ["a", "b/1", "b/2", "b/deep/3", "bc"]
    assert storage.list("b/") == ["b/1", "b/2", "b/deep/3"]
    assert storage.list("b") == ["b/1", "b/2", "b/deep/3", "bc"]
    assert storage.child("b").list() == ["1", "2", "deep/3"]
    assert storage.list("none/") == storage.child("none").list() == []


def test_deleted_objects_leave_no_empty_folder(tmp_path: Path) -> None:
    storage = Storage.open(str(tmp_path / "root"))
    for path in ("parts/one/a", "parts/one/b", "parts/two/a", "kept/x"):
        storage.write(path, b"")
    storage.delete("parts/one/a")
    assert storage.list() == ["kept/x", "parts/one/b", "parts/two/a"]
    storage.delete("parts/one/b")
    storage.delete("parts/two/a")
    assert [path.name for path in (tmp_path / "root").iterdir()] == ["kept"]
    storage.child("kept").delete("x")
    assert (tmp_path / "root" / "kept").is_dir()  # the folder that was opened stays


def test_writes_do_not_lose_their_folder_to_a_delete_at_the_same_time(tmp_path: Path) -> None:
    storage = Storage.open(str(tmp_path))

    def come_and_go(name: str) -> None:
        for _ in range(200):
            storage.write(f"deep/er/{name}", b"x")
            assert storage.read(f"deep/er/{name}") == b"x"
            storage.delete(f"deep/er/{name}")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(come_and_go, "abcd"))
    assert list(tmp_path.iterdir()) == []


def test_file_in_the_place_of_a_folder_holds_nothing_and_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for storage in (Storage.open(str(tmp_path / "file")), Storage.open(str(tmp_path / "file" / "below"))):
        assert storage.list() == []
        assert not storage.exists("x")
        storage.delete("x")
        for attempt in (lambda: storage.read("x"), lambda: storage.write("x", b""), lambda: storage.create("x", b"")):  # noqa: B023
            with pytest.raises(NotFoundError, match="is a file, not a folder; correct the address"):
                attempt()
    assert (tmp_path / "file").read_text() == ""


def test_folder_that_cannot_be_listed_is_not_taken_for_an_empty_one(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="name too long"):
        Storage.open(str(tmp_path / ("x" * 300))).list()


@pytest.mark.parametrize("url", ["", "file://"])
def test_empty_address_is_not_the_folder_one_is_in(url: str) -> None:
    with pytest.raises(StorageError, match="names no folder; write . for the one you are in"):
        Storage.open(url)


def test_storage_survives_pickling_and_threads(storage: Storage) -> None:
    storage.write("x", b"y")
    copy: Storage = pickle.loads(pickle.dumps(storage))
    results: list[bytes] = []
    thread = threading.Thread(target=lambda: results.append(copy.read("x") + storage.read("x")))
    thread.start()
    thread.join()
    assert results == [b"yy"]


def test_range_past_the_end_is_refused(tmp_path: Path) -> None:
    storage = Storage.open(str(tmp_path))
    storage.write("x", b"0123")
    with pytest.raises(StorageError, match="2 of 8 bytes at offset 2"):
        storage.read_range("x", 2, 8)


@pytest.mark.parametrize("path", ["../x", "a/../../x", "/etc/passwd", "a\0b"])
def test_path_that_leaves_the_folder_is_refused(tmp_path: Path, path: str) -> None:
    with pytest.raises(StorageError, match="leaves its folder"):
        Storage.open(str(tmp_path)).read(path)


@pytest.mark.parametrize("url", ["s3://", "gs://bucket/x", "s3://key:secret@bucket/x"])
def test_url_of_unknown_kind_is_refused_without_its_secret(url: str) -> None:
    with pytest.raises(StorageError) as caught:
        Storage.open(url)
    assert "secret" not in str(caught.value)


def test_import_is_light() -> None:
    code = "import sys, elastic_lm.storage; print({'s3fs', 'torch', 'ray', 'pyarrow'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"


# -- a server that misbehaves on request ------------------------------------------------------------------------------


class _Faulty(ThreadingHTTPServer):
    """Answers GET with the next scripted status, then with the body for ever."""

    daemon_threads = True
    script: list[int | str]
    num_requests = 0


class _Handler(BaseHTTPRequestHandler):
    server: _Faulty
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.server.num_requests += 1
        fault = self.server.script.pop(0) if len(self.server.script) > 1 else self.server.script[0]
        body = b"0123456789"
        if isinstance(fault, int) and fault >= 400:
            body = b"<Error><Code>Told</Code><Message>no</Message></Error>"
        self.send_response(fault if isinstance(fault, int) else 206)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:4] if fault == "truncated" else body)
        if fault == "truncated":
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Faulty]:
    server = _Faulty(("127.0.0.1", 0), _Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hidden")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("script", [[503, 500, 206], ["truncated", 206]])
def test_passing_fault_is_retried(faulty: _Faulty, script: list[int | str]) -> None:
    faulty.script = script
    assert Storage.open("s3://bucket/x").read_range("y", 0, 10) == b"0123456789"


def test_lasting_fault_ends_within_the_deadline(faulty: _Faulty) -> None:
    faulty.script = [503]
    with pytest.raises(StorageError, match=r"gave up after \d attempts in [0-2]\.\d s"):
        Storage.open("s3://bucket/x", deadline_s=1.0).read_range("y", 0, 10)


@pytest.mark.parametrize(("status", "kind"), [(403, AccessDeniedError), (404, NotFoundError)])
def test_final_answer_is_not_retried_and_tells_no_secret(
    faulty: _Faulty, status: int, kind: type[StorageError]
) -> None:
    faulty.script = [status]
    with pytest.raises(kind) as caught:
        Storage.open("s3://bucket/x").read_range("y", 0, 10)
    assert faulty.num_requests == 1
    assert "hidden" not in str(caught.value)
