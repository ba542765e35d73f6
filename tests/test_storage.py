"""Storage: the same behaviour over files and S3, and typed errors. What goes wrong on the way: test_storage_faults.py."""

from __future__ import annotations

import pickle
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from elastic_lm.errors import AlreadyExistsError, NotFoundError, StorageError
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


@pytest.mark.parametrize("second", [b"first", b"second"])
def test_create_refuses_an_existing_object(storage: Storage, second: bytes) -> None:
    storage.create("c", b"first")
    with pytest.raises(AlreadyExistsError):
        storage.create("c", second)
    assert storage.read("c") == b"first"


def test_of_many_who_create_the_same_exactly_one_succeeds(storage: Storage) -> None:
    def succeeds(number: int) -> bool:
        try:
            storage.create("owner", b"me")
        except AlreadyExistsError:
            return False
        return True

    with ThreadPoolExecutor(16) as pool:
        assert sum(pool.map(succeeds, range(16))) == 1


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


@pytest.mark.parametrize(("offset", "had"), [(2, 2), (4, 0), (9, 0)])
def test_range_past_the_end_is_refused(storage: Storage, offset: int, had: int) -> None:
    storage.write("x", b"0123")
    with pytest.raises(StorageError, match=f"got {had} of 8 bytes at offset {offset}; the object has 4$"):
        storage.read_range("x", offset, 8)


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
