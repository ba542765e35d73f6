"""Storage that misbehaves: each operation ends with what was asked, or in time with a typed error that tells no secret."""

from __future__ import annotations

import errno
import itertools
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
import traceback
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import boto3
import pytest

from elastic_lm.errors import AccessDeniedError, AlreadyExistsError, NotFoundError, StorageError
from elastic_lm.storage import FIRST_PAUSE_S, Storage
from tests.conftest import NAMESPACE
from tests.faults import proxy as p
from tests.faults.proxy import Exchange, Fault, FaultyProxy

pytestmark = pytest.mark.slow  # waits for deadlines

_numbers = itertools.count()

CONTENT = bytes(range(256)) * 40
DEADLINE_S = 9.0  # where all is to end well: an attempt has a third of it, also on a busy machine
SHORT_S = 1.5  # where nothing is to come


@pytest.fixture(scope="module")
def bucket(s3_server: str) -> Storage:
    boto3.client("s3").create_bucket(Bucket="faults")
    bucket = Storage.open("s3://faults", deadline_s=DEADLINE_S)
    assert bucket.list() == []  # connected, and so are the folders in it
    return bucket


@pytest.fixture
def storage(proxy: FaultyProxy, bucket: Storage) -> Storage:
    """A folder of its own with one object, `x`. Connections are open already."""
    storage = bucket.child(f"folder-{next(_numbers)}")
    storage.write("x", CONTENT)
    proxy.calm()
    return storage


def lists(storage: Storage) -> bool:
    return storage.list() == ["x"]


def writes(storage: Storage) -> bool:
    storage.write("y", CONTENT)
    return storage.read("y") == CONTENT


def creates(storage: Storage) -> bool:
    storage.create("z", CONTENT)
    return storage.read("z") == CONTENT


def deletes(storage: Storage) -> bool:
    storage.delete("x")
    return not storage.exists("x")


# What an operation asks of the server, and the operation with a look at what came of it.
OPERATIONS: dict[str, tuple[str, Callable[[Storage], bool]]] = {
    "read": ("GET", lambda storage: storage.read("x") == CONTENT),
    "read_range": ("GET", lambda storage: storage.read_range("x", 1000, 5000) == CONTENT[1000:6000]),
    "size": ("HEAD", lambda storage: storage.size("x") == len(CONTENT)),
    "list": ("GET", lists),
    "write": ("PUT", writes),
    "create": ("PUT", creates),
    "delete": ("DELETE", deletes),
}
PASSING: dict[str, Fault] = {
    "500": p.status(500),
    "503": p.status(503),
    "429": p.status(429),
    "409": p.status(409),  # two conditional writes of one object met
    "reset": p.reset,
    "answer lost": p.answer_lost,
    "stalled": p.stalled,
    "late": p.delayed(0.1),
}
IN_THE_BODY: dict[str, Fault] = {
    "truncated": p.truncated,
    "shortened": p.shortened,
    "stalled in the body": p.stalled_in_body,
}


@pytest.mark.s3
@pytest.mark.parametrize("fault", PASSING)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_passing_fault_does_not_show(storage: Storage, proxy: FaultyProxy, operation: str, fault: str) -> None:
    method, succeeds = OPERATIONS[operation]
    rule = proxy.inject(PASSING[fault], on=f"^{method} ", times=1)
    assert succeeds(storage)
    assert len(rule.hits) == 1


@pytest.mark.s3
@pytest.mark.parametrize("fault", IN_THE_BODY)
@pytest.mark.parametrize("operation", ["read", "read_range", "list"])
def test_answer_that_is_cut_is_asked_for_again(
    storage: Storage, proxy: FaultyProxy, operation: str, fault: str
) -> None:
    rule = proxy.inject(IN_THE_BODY[fault], on="^GET ", times=1)
    assert OPERATIONS[operation][1](storage)
    assert len(rule.hits) == 1


@pytest.mark.s3
def test_flipped_bit_in_a_whole_object_is_noticed(storage: Storage, proxy: FaultyProxy) -> None:
    """In a range it is not: there is nothing to compare with. That is why blocks have checksums of our own."""
    rule = proxy.inject(p.flipped, on="^GET ", times=2)
    assert storage.read("x") == CONTENT
    assert len(rule.hits) == 2


@pytest.mark.s3
def test_slow_body_is_waited_for_as_long_as_the_deadline_allows(storage: Storage, proxy: FaultyProxy) -> None:
    proxy.inject(p.slow(bytes_per_s=40_000), on="^GET ")
    assert storage.read_range("x", 0, 8_000) == CONTENT[:8_000]


@pytest.mark.s3
@pytest.mark.parametrize("whole", [True, False])
def test_large_object_has_the_time_that_its_size_needs(storage: Storage, proxy: FaultyProxy, whole: bool) -> None:
    content = bytes(12_000_000)
    storage.write("large", content)
    proxy.inject(p.slow(bytes_per_s=12e6), on="^GET ")
    assert (storage.read("large") if whole else storage.read_range("large", 0, len(content))) == content


@pytest.mark.s3
def test_burst_is_ridden_out_with_pauses_that_double_and_differ(storage: Storage, proxy: FaultyProxy) -> None:
    patient = Storage.open(storage.url, deadline_s=30)
    rule = proxy.inject(p.status(503), times=5)
    assert patient.read_range("x", 0, 10) == CONTENT[:10]
    pauses = [later - earlier for earlier, later in pairwise(rule.hits)]
    longest = [FIRST_PAUSE_S * 2**number for number in range(len(pauses))]
    assert all(pause >= most / 2 for pause, most in zip(pauses, longest, strict=True))
    shares = {round(pause / most, 3) for pause, most in zip(pauses, longest, strict=True)}
    assert len(shares) > 1, "jitter keeps those apart who failed together"


@pytest.mark.s3
@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (p.status(503), "The proxy says 503"),
        (p.status(429), "The proxy says 429"),
        (p.reset, "EndpointConnectionError|HTTPClientError|ConnectionClosedError"),
        (p.truncated, "ClientPayloadError|ResponseStreamingError|IncompleteRead"),
        (p.shortened, "got 5000 of 10000 bytes"),
    ],
    ids=["503", "429", "reset", "truncated", "shortened"],
)
def test_lasting_fault_ends_with_the_last_attempt(
    storage: Storage, proxy: FaultyProxy, fault: Fault, told: str
) -> None:
    storage.retries = 3
    rule = proxy.inject(fault, on="^GET ")
    with pytest.raises(StorageError, match=rf"gave up after 4 attempts in .* the last said: .*({told})"):
        storage.read_range("x", 0, 10_000)
    assert len(rule.hits) in (4, 8)  # of a connection that breaks the client tries another one by itself


@pytest.mark.s3
@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (p.stalled, "no answer, or not all of it, within 0.. s"),
        (p.stalled_in_body, "no answer, or not all of it, within 0.. s"),
        (p.slow(1_000), "no answer, or not all of it, within 0.. s"),
    ],
    ids=["stalled", "stalled in body", "slow"],
)
def test_lasting_silence_ends_within_the_deadline(
    storage: Storage, proxy: FaultyProxy, fault: Fault, told: str
) -> None:
    storage.deadline_s = SHORT_S
    rule = proxy.inject(fault, on="^GET ")
    began = time.monotonic()
    with pytest.raises(StorageError, match=rf"gave up after \d attempts in .* the last said: .*({told})"):
        storage.read_range("x", 0, 10_000)
    assert time.monotonic() - began < DEADLINE_S
    assert 1 < len(rule.hits) <= 10


@pytest.mark.s3
def test_server_that_is_not_there_is_named_with_its_remedy(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(StorageError, match="http://127.0.0.1:9/bucket/x.*; check the address, AWS_ENDPOINT_URL and"):
        Storage.open("s3://bucket", deadline_s=5.0, retries=1).read("x")


@pytest.mark.s3
def test_secret_in_the_servers_address_is_not_told(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server.replace("://", "://somebody:hunter2@"))
    with pytest.raises(StorageError) as caught:
        Storage.open("s3://bucket", deadline_s=0.5).read("x")
    assert "hunter2" not in tell(caught.value)


@pytest.mark.s3
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize(("code", "kind"), [(403, AccessDeniedError), (404, NotFoundError), (400, StorageError)])
def test_final_answer_stops_at_once_and_tells_no_secret(
    storage: Storage, proxy: FaultyProxy, operation: str, code: int, kind: type[StorageError]
) -> None:
    method, succeeds = OPERATIONS[operation]
    rule = proxy.inject(p.status(code), on=f"^{method} ")
    if (operation, code) == ("delete", 404):  # it is not there, which is what was asked
        storage.delete("x")
    else:
        with pytest.raises(kind, match=f"^{operation} {storage.url}") as caught:
            succeeds(storage)
        told = tell(caught.value)
        assert os.environ["AWS_SECRET_ACCESS_KEY"] not in told and "Signature" not in told
    assert len(rule.hits) == 1 + (
        (operation, code) == ("size", 400)
    )  # botocore asks once whether the region is another


def tell(error: BaseException) -> str:
    """All that a log would show of it."""
    return "".join(traceback.format_exception(error))


@pytest.mark.s3
def test_refusal_says_what_s3_calls_it(storage: Storage, proxy: FaultyProxy) -> None:
    proxy.inject(p.status(403, "RequestTimeTooSkewed"))
    with pytest.raises(AccessDeniedError, match=r"access denied \(RequestTimeTooSkewed\); check"):
        storage.read_range("x", 0, 1)


@pytest.mark.s3
def test_bucket_that_is_missing_is_no_empty_folder(s3_server: str) -> None:
    nowhere = Storage.open("s3://no-such-bucket/folder")
    for attempt in (nowhere.list, lambda: nowhere.write("x", b""), lambda: nowhere.create("x", b"")):
        with pytest.raises(NotFoundError, match="there is no such bucket; make it, or correct the address"):
            attempt()
    assert not nowhere.exists("x")


# -- create-only writes ------------------------------------------------------------------------------------------------


@pytest.mark.s3
@pytest.mark.parametrize("num_lost", [1, 2, 3])
@pytest.mark.parametrize("connected", [True, False])  # over an open connection the client repeats a PUT by itself
def test_create_whose_answer_is_lost_is_its_callers_and_nobody_elses(
    storage: Storage, proxy: FaultyProxy, num_lost: int, connected: bool
) -> None:
    mine = storage if connected else Storage.open(storage.url, deadline_s=DEADLINE_S)
    lost = proxy.inject(p.answer_lost, on="^PUT .*/owner", times=num_lost)
    mine.create("owner", b"somebody")
    assert len(lost.hits) == num_lost
    for other in (mine, Storage.open(storage.url)):  # with the same words, too
        with pytest.raises(AlreadyExistsError):
            other.create("owner", b"somebody")
    assert storage.read("owner") == b"somebody"


@pytest.mark.s3
def test_create_that_loses_its_answer_and_then_the_race_is_refused(storage: Storage, proxy: FaultyProxy) -> None:
    """Ours never arrived; another's did before we tried again."""
    proxy.inject(lambda exchange: [storage.create("owner", b"other"), exchange.reset()], on="^PUT .*/owner", times=1)
    with pytest.raises(AlreadyExistsError):
        Storage.open(storage.url).create("owner", b"mine")
    assert storage.read("owner") == b"other"


@pytest.mark.s3
def test_create_in_the_way_of_which_was_something_that_is_gone_succeeds(storage: Storage, proxy: FaultyProxy) -> None:
    storage.create("owner", b"other")
    proxy.inject(lambda exchange: [storage.delete("owner"), p.passed(exchange)], on="^HEAD .*/owner", times=1)
    storage.create("owner", b"mine")
    assert storage.read("owner") == b"mine"


# -- listings in pages -------------------------------------------------------------------------------------------------


@pytest.mark.s3
def test_each_page_of_a_listing_is_tried_anew(
    storage: Storage, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one operation, a long listing would hardly ever get through a storm, and never within one deadline."""
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "3")
    names = [f"{number:02}" for number in range(12)]
    for name in names:
        storage.write(name, b"")
    asked: Counter[str] = Counter()

    def refuse_the_first_time(exchange: Exchange) -> None:
        asked[exchange.path] += 1
        (p.status(503) if asked[exchange.path] == 1 else p.passed)(exchange)

    proxy.inject(refuse_the_first_time)
    assert Storage.open(storage.url, retries=1).list() == [*names, "x"]
    assert list(asked.values()) == [2] * 5


# -- files -------------------------------------------------------------------------------------------------------------

NOBODY = 65534
IN_A_PROCESS = """
import os, resource, sys
from elastic_lm.errors import StorageError
from elastic_lm.storage import Storage
def attempt(action):
    try:
        action()
        print("done")
    except StorageError as error:
        print(type(error).__name__, error)
"""


def told_by(script: str, *, tmpfs: Path | None = None) -> list[str]:
    """Lines of a new interpreter that runs `script` after the imports; with a file system of 1 MB mounted at `tmpfs`."""
    root = Path(__file__).parents[1]
    command = [sys.executable, "-c", IN_A_PROCESS + textwrap.dedent(script)]
    if tmpfs is not None:
        mount = f"mount -t tmpfs -o size=1m tmpfs {shlex.quote(str(tmpfs))}"
        command = [*NAMESPACE, "/bin/sh", "-c", f"{mount} && {shlex.join(command)}"]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=60, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_object_larger_than_is_allowed_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    lines = told_by(f"""
        storage = Storage.open({str(tmp_path)!r})
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        attempt(lambda: storage.write("x", bytes(20_000)))
        attempt(lambda: storage.create("x", bytes(20_000)))
        attempt(lambda: storage.write("x", bytes(9_000)))
    """)
    for verb, line in zip(("write", "create"), lines, strict=False):
        assert line.startswith(f"StorageError {verb} file://{tmp_path}/x: OSError: [Errno {errno.EFBIG}]")
        assert line.endswith("or a limit of this process (ulimit -f), allows")
    assert lines[2:] == ["done"]
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_folder_without_the_right_to_write_is_refused_at_once(tmp_path: Path) -> None:
    """Root may write everywhere, so there the process becomes nobody first."""
    with tempfile.TemporaryDirectory() as folder:  # one that nobody may enter, unlike pytest's own
        os.chmod(folder, 0o755)
        Path(folder, "x").write_bytes(b"kept")
        os.chmod(folder, 0o555)
        lines = told_by(f"""
            storage = Storage.open({folder!r})
            if os.getuid() == 0:
                os.setuid({NOBODY})
            attempt(lambda: storage.write("x", b""))
            attempt(lambda: storage.create("y", b""))
            attempt(lambda: storage.child("deep/er").write("y", b""))
            attempt(lambda: storage.delete("x"))
            attempt(lambda: print(storage.read("x"), storage.list()))
        """)
        os.chmod(folder, 0o755)
    for verb, line in zip(("write", "create", "write", "delete"), lines, strict=False):
        assert line.startswith(f"AccessDeniedError {verb} file://{folder}/") and line.endswith("rights on it")
    assert lines[4:] == ["b'kept' ['x']", "done"]


@pytest.mark.mount
def test_full_disk_keeps_what_it_had_and_goes_on_when_there_is_room(tmp_path: Path) -> None:
    lines = told_by(
        f"""
        storage = Storage.open({str(tmp_path)!r})
        storage.write("a", bytes(600_000))
        attempt(lambda: storage.write("b", bytes(600_000)))
        attempt(lambda: storage.create("b", bytes(600_000)))
        attempt(lambda: storage.write("a", bytes(600_001)))
        print(storage.list(), storage.size("a"))
        storage.delete("a")
        attempt(lambda: storage.create("b", bytes(600_000)))
        print(os.listdir({str(tmp_path)!r}))
        """,
        tmpfs=tmp_path,
    )
    for verb, line in zip(("write", "create", "write"), lines, strict=False):
        assert line.startswith(f"StorageError {verb} file://{tmp_path}/")
        assert line.endswith("No space left on device; free some space on that disk")
    assert lines[3:] == ["['a'] 600000", "done", "['b']"]


@pytest.mark.mount
def test_file_system_that_became_read_only_is_still_read(tmp_path: Path) -> None:
    lines = told_by(
        f"""
        storage = Storage.open({str(tmp_path)!r})
        storage.write("deep/a", b"kept")
        assert os.system("mount -o remount,ro {tmp_path}") == 0
        attempt(lambda: storage.write("deep/a", b""))
        attempt(lambda: storage.create("b", b""))
        attempt(lambda: storage.delete("deep/a"))
        print(storage.list(), storage.read("deep/a"))
        """,
        tmpfs=tmp_path,
    )
    for verb, line in zip(("write", "create", "delete"), lines, strict=False):
        assert line.startswith(f"StorageError {verb} file://{tmp_path}/")
        assert "read-only; choose another place" in line
    assert lines[3:] == ["['deep/a'] b'kept'"]


def test_folder_that_vanishes_is_empty_and_comes_back_with_the_next_object(tmp_path: Path) -> None:
    storage = Storage.open(str(tmp_path / "root"))
    storage.write("deep/a", b"x")
    shutil.rmtree(tmp_path / "root")
    assert storage.list() == [] and not storage.exists("deep/a")
    for attempt in (lambda: storage.read("deep/a"), lambda: storage.read_range("deep/a", 0, 1)):
        with pytest.raises(NotFoundError, match="there is no such object"):
            attempt()
    storage.delete("deep/a")
    storage.create("deep/b", b"y")
    assert storage.list() == ["deep/b"]
