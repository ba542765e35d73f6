"""One layer over object storage and plain files: whole objects, exact ranges, create-only writes, typed errors.

Invariant: an operation ends within its deadline, with what was asked or with a typed error that holds no secret. Retries
and the deadline are ours because the clients differ widely in theirs: with a server that answers 503 for ever, three
clients gave up after 1.5, 12 and 35 s. Credentials and endpoint come from the standard AWS_* variables, never from a URL.
Trade-off: objects are read and written whole or by range, never streamed; the largest we write is a checkpoint part. A
whole object is asked for its size first, because a body may be cut and say that it is all: one request more.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeVar

from elastic_lm.errors import AccessDeniedError, AlreadyExistsError, NotFoundError, StorageError, TooShortError

Result = TypeVar("Result")

SLOWEST_BYTES_PER_S = 10e6  # deadlines grow with the object: a part of 256 MB gets 26 s more
FIRST_PAUSE_S = 0.2
LONGEST_PAUSE_S = 10.0
MOST_LOST_FOLDERS = 10  # in a row, by one write

# Objects up to twice this size are sent in one piece. A multipart upload that is broken off leaves what it has sent in the
# bucket, which is paid for and which no listing shows; S3 takes 5 GiB at a time.
PIECE_BYTES = 5 * 2**29

# A client costs 0.3 s of CPU; sixteen threads that read their first range together must make one, not sixteen.
_connecting = threading.Lock()


class Storage:
    """A folder: `s3://bucket/prefix`, `file:///folder` or a plain path. Picklable; connects on first use, per process.

    Args: `deadline_s` bounds one operation, all its attempts together (plus a second per 10 MB); `retries` bounds how
    often an attempt that failed for a passing reason (5xx, 429, reset, stall, short body) is repeated. A listing has both
    anew for each page of a thousand objects.
    """

    def __init__(self, url: str, *, deadline_s: float = 60.0, retries: int = 8) -> None:
        self.url = _normalised(url)
        self.deadline_s = deadline_s
        self.retries = retries
        self._backend: _Backend | None = None

    @classmethod
    def open(cls, url: str, *, deadline_s: float = 60.0, retries: int = 8) -> Storage:
        """The folder at `url`. Touches nothing yet.    Raises: StorageError when the URL is of an unknown kind."""
        return cls(str(url), deadline_s=deadline_s, retries=retries)

    def __repr__(self) -> str:
        return f"Storage({self.url!r})"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_backend": None}

    def child(self, path: str) -> Storage:
        """The folder `path` inside this one."""
        child = Storage(f"{self.url}/{_checked(path)}", deadline_s=self.deadline_s, retries=self.retries)
        child._backend = self._backend
        return child

    # -- operations --------------------------------------------------------------------------------------------------

    def read(self, path: str) -> bytes:
        """The whole object."""
        size = self._do("read", path, lambda backend, name, limit: backend.size(name, limit))
        return self._do("read", path, lambda backend, name, limit: backend.read(name, size, limit), size=size)

    def read_range(self, path: str, offset: int, length: int) -> bytes:
        """Exactly `length` bytes from `offset`.    Raises: TooShortError when the object ends before."""

        def attempt(backend: _Backend, name: str, limit: float) -> bytes:
            data = backend.read_range(name, offset, length, limit)
            if len(data) == length:
                return data
            told = f"got {len(data)} of {length} bytes at offset {offset}"
            if (size := backend.size(name, limit)) < offset + length:
                raise TooShortError(f"{told}; the object has {size}")
            raise ConnectionError(told)

        return self._do("read_range", path, attempt, size=length)

    def write(self, path: str, data: bytes) -> None:
        """Store the object, replacing what was there. Never seen half written."""
        self._do("write", path, lambda backend, name, limit: backend.write(name, data, limit), size=len(data))

    def create(self, path: str, data: bytes) -> None:
        """Store the object where none is.    Raises: AlreadyExistsError; of several callers exactly one succeeds.

        It stays the caller's own when an answer is lost after the object was stored: each call signs its object.
        """
        signature = secrets.token_hex(16)
        self._do(
            "create", path, lambda backend, name, limit: backend.create(name, data, signature, limit), size=len(data)
        )

    def exists(self, path: str) -> bool:
        """Whether there is an object."""
        try:
            self.size(path)
        except NotFoundError:
            return False
        return True

    def size(self, path: str) -> int:
        """Bytes of the object."""
        return self._do("size", path, lambda backend, name, limit: backend.size(name, limit))

    def modified_s(self, path: str) -> float | None:
        """Unix time at which the object was stored, by storage's own clock; None where it does not say."""
        return self._do("modified_s", path, lambda backend, name, limit: backend.modified_s(name, limit))

    def list(self, prefix: str = "") -> list[str]:
        """Objects below this folder whose relative path begins with `prefix`, sorted. Empty when nothing is there."""
        root, folder = _root(self.url), prefix.rpartition("/")[0]
        place = f"{root}/{folder}" if folder else root
        names, after = self._do("list", "", lambda backend, _, limit: backend.page(place, None, limit))
        while after is not None:
            here = after
            more, after = self._do("list", "", lambda backend, _, limit: backend.page(place, here, limit))  # noqa: B023
            names += more
        return sorted(path for name in names if (path := name[len(root) + 1 :]).startswith(prefix))

    def delete(self, path: str) -> None:
        """Remove the object; no error when it is not there."""

        def attempt(backend: _Backend, name: str, limit: float) -> None:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                backend.delete(name, _root(self.url), limit)

        self._do("delete", path, attempt)

    # -- retries -----------------------------------------------------------------------------------------------------

    def _do(self, verb: str, path: str, attempt: Callable[[_Backend, str, float], Result], *, size: int = 0) -> Result:
        """Run `attempt` until it succeeds, fails for good, or the deadline or the retry budget is spent."""
        started = time.monotonic()
        allowance = size / SLOWEST_BYTES_PER_S
        deadline = started + self.deadline_s + allowance
        name = _root(self.url) + (f"/{_checked(path)}" if path else "")
        what = f"{verb} {self.url}/{path}" if path else f"{verb} {self.url}"
        for number in range(self.retries + 1):
            limit = min(deadline - time.monotonic(), self.deadline_s / 3 + allowance)
            try:
                return attempt(self._connect(), name, max(limit, 0.001))
            except _NoBucketError as error:
                raise NotFoundError(f"{what}: there is no such bucket; make it, or correct the address") from error
            except FileNotFoundError as error:
                raise NotFoundError(f"{what}: there is no such object") from error
            except NotADirectoryError as error:
                raise NotFoundError(
                    f"{what}: a part of this address is a file, not a folder; correct the address"
                ) from error
            except FileExistsError as error:
                raise AlreadyExistsError(f"{what}: an object is there already") from error
            except PermissionError as error:
                raise AccessDeniedError(
                    f"{what}: access denied{_code_of(error)}; check the credentials and the rights on it"
                ) from error
            except TooShortError as error:
                raise TooShortError(f"{what}: {error}") from None
            except Exception as error:  # noqa: BLE001 - clients raise dozens of types for passing faults
                reason = _reason(error)
                if not self._connect().passing(error):
                    raise StorageError(f"{what}: {reason}{_remedy(error)}") from None
            pause = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2**number) * random.uniform(0.5, 1.0)
            if number == self.retries or time.monotonic() + pause + FIRST_PAUSE_S >= deadline:
                break
            time.sleep(pause)
        spent = time.monotonic() - started
        raise StorageError(
            f"{what}: gave up after {number + 1} attempts in {spent:.1f} s (deadline {deadline - started:.0f} s, "
            f"{self.retries} retries); the last said: {reason}; check the address, AWS_ENDPOINT_URL and the network"
        )

    def _connect(self) -> _Backend:
        with _connecting:
            if self._backend is None or self._backend.pid != os.getpid():
                self._backend = _S3() if self.url.startswith("s3://") else _Files()
            return self._backend


# -- backends: they raise OSErrors of the standard kinds; `limit` is seconds for this attempt -------------------------


class _NoBucketError(FileNotFoundError):
    """Not the object is missing, but all that it could be in."""


class _Backend(Protocol):
    pid: int

    def read(self, name: str, size: int, limit: float) -> bytes: ...
    def read_range(self, name: str, offset: int, length: int, limit: float) -> bytes: ...
    def write(self, name: str, data: bytes, limit: float) -> None: ...
    def create(self, name: str, data: bytes, signature: str, limit: float) -> None: ...
    def size(self, name: str, limit: float) -> int: ...
    def modified_s(self, name: str, limit: float) -> float | None: ...
    def page(self, name: str, after: str | None, limit: float) -> tuple[list[str], str | None]: ...
    def delete(self, name: str, folder: str, limit: float) -> None: ...
    def passing(self, error: Exception) -> bool: ...


class _Files:
    """Files. Writes go to a neighbour and are renamed (or linked, which fails when the name is taken)."""

    def __init__(self) -> None:
        self.pid = os.getpid()

    def read(self, name: str, size: int, limit: float) -> bytes:
        return self._object(name).read_bytes()

    def read_range(self, name: str, offset: int, length: int, limit: float) -> bytes:
        with self._object(name).open("rb") as file:
            file.seek(offset)
            return file.read(length)

    def write(self, name: str, data: bytes, limit: float) -> None:
        with _neighbour(name, data) as temporary:
            temporary.replace(name)

    def create(self, name: str, data: bytes, signature: str, limit: float) -> None:
        with _neighbour(name, data) as temporary:
            try:
                os.link(temporary, name)
            except FileExistsError:  # also told where a network file system lost its own answer
                if temporary.stat().st_nlink < 2:
                    raise

    def size(self, name: str, limit: float) -> int:
        return self._object(name).stat().st_size

    def modified_s(self, name: str, limit: float) -> float | None:
        return self._object(name).stat().st_mtime

    def page(self, name: str, after: str | None, limit: float) -> tuple[list[str], str | None]:
        walk = os.walk(name, onerror=_raise_unless_gone)
        paths = (os.path.join(folder, file) for folder, _, files in walk for file in files)
        return [path for path in paths if not _TEMPORARY.search(path)], None

    def delete(self, name: str, folder: str, limit: float) -> None:
        """And the folders below `folder` that it leaves empty: an object store knows no such thing."""
        self._object(name).unlink()
        parent = os.path.dirname(name)
        with contextlib.suppress(OSError):  # it holds something else
            while parent.startswith(f"{folder}/"):
                os.rmdir(parent)
                parent = os.path.dirname(parent)

    def passing(self, error: Exception) -> bool:
        return False

    def _object(self, name: str) -> Path:
        """A folder is not an object: an object store knows no such thing."""
        if os.path.isdir(name):
            raise FileNotFoundError(name)
        return Path(name)


def _raise_unless_gone(error: OSError) -> None:
    """What cannot be listed is no empty folder: leaving it out would lose text or checkpoints without a word."""
    if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
        raise error


_TEMPORARY = re.compile(r"\.[0-9a-f]{12}\.part$")


class _neighbour:
    """A complete, flushed copy of `data` beside `name`; removed on leaving if it is still there."""

    def __init__(self, name: str, data: bytes) -> None:
        self._path = Path(f"{name}.{secrets.token_hex(6)}.part")
        self._data = data

    def __enter__(self) -> Path:
        try:
            with self._opened() as file:
                file.write(self._data)
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            self._path.unlink(missing_ok=True)
            raise
        return self._path

    def __exit__(self, *_: object) -> None:
        self._path.unlink(missing_ok=True)

    def _opened(self) -> BinaryIO:
        """The file in its folder, which a `delete` at the same time may have found empty and removed again."""
        folder = self._path.parent
        for _ in range(MOST_LOST_FOLDERS):
            try:
                folder.mkdir(parents=True, exist_ok=True)
                return self._path.open("wb")
            except FileNotFoundError:
                continue
            except FileExistsError as error:  # told, too, when the folder went between two looks at it
                if folder.is_file():
                    raise NotADirectoryError(str(folder)) from error
        raise OSError("its folder cannot be made there; correct the address")


_KIND_OF_STATUS: dict[int, Callable[[str], OSError]] = {
    401: PermissionError,
    403: PermissionError,
    404: FileNotFoundError,
    412: FileExistsError,
}
_KIND_OF_CODE: dict[str, Callable[[str], OSError]] = {"NoSuchBucket": _NoBucketError}
_PASSING_STATUS = {408, 409, 425, 429}  # of those that blame the request
_PASSING_CODES = {"BadDigest", "IncompleteBody", "RequestTimeout", "XAmzContentSHA256Mismatch"}  # told as 400


class _S3:
    """s3fs, with its listing cache and its own retries off. Every call carries its own time limit."""

    def __init__(self) -> None:
        import s3fs

        self.pid = os.getpid()
        self._fs = s3fs.S3FileSystem(
            use_listings_cache=False,
            skip_instance_cache=True,
            config_kwargs={"connect_timeout": 5, "read_timeout": 20, "retries": {"max_attempts": 0}},
        )
        self._fs.retries = 1

    def read(self, name: str, size: int, limit: float) -> bytes:
        data: bytes = self._call(self._fs._cat_file, name, max_concurrency=1, limit=limit)
        if len(data) != size and len(data) != self.size(name, limit):
            raise ConnectionError(f"got {len(data)} of {size} bytes")
        return data

    def read_range(self, name: str, offset: int, length: int, limit: float) -> bytes:
        if length == 0:
            return b""
        try:
            data: bytes = self._call(self._fs._cat_file, name, start=offset, end=offset + length, limit=limit)
        except OSError as error:
            if _answer(error)[0] == 416:  # it begins behind the end
                return b""
            raise
        # Some servers answer a range request with the whole object.
        return data[offset : offset + length] if len(data) > length else data

    def write(self, name: str, data: bytes, limit: float) -> None:
        self._call(self._fs._pipe_file, name, data, chunksize=PIECE_BYTES, limit=limit)

    def create(self, name: str, data: bytes, signature: str, limit: float) -> None:
        signed = {_SIGNATURE: signature}
        try:
            self._call(
                self._fs._pipe_file, name, data, chunksize=PIECE_BYTES, mode="create", Metadata=signed, limit=limit
            )
        except FileExistsError:
            # The answer to an earlier request of ours may have been lost after the object was stored. That need not have
            # been an earlier attempt: the client repeats a PUT by itself when it loses a connection that it had open.
            if self._signature(name, limit) != signature:
                raise

    def size(self, name: str, limit: float) -> int:
        return int(self._head(name, limit)["ContentLength"])

    def modified_s(self, name: str, limit: float) -> float | None:
        stamp = self._head(name, limit).get("LastModified")
        return None if stamp is None else stamp.timestamp()

    def page(self, name: str, after: str | None, limit: float) -> tuple[list[str], str | None]:
        # As a prefix with its slash: a sibling whose name merely begins the same is another folder.
        bucket, _, prefix = f"{name}/".partition("/")
        token = {} if after is None else {"ContinuationToken": after}
        found = self._call(self._fs._call_s3, "list_objects_v2", Bucket=bucket, Prefix=prefix, limit=limit, **token)
        keys = [entry["Key"] for entry in found.get("Contents", [])]
        names = [f"{bucket}/{key}" for key in keys if not key.endswith("/")]
        return names, found["NextContinuationToken"] if found.get("IsTruncated") else None

    def delete(self, name: str, folder: str, limit: float) -> None:
        self._call(self._fs._rm_file, name, limit=limit)

    def passing(self, error: Exception) -> bool:
        status, code = _answer(error)
        return not 300 <= status < 500 or status in _PASSING_STATUS or code in _PASSING_CODES

    def _signature(self, name: str, limit: float) -> str | None:
        try:
            return self._head(name, limit).get("Metadata", {}).get(_SIGNATURE)
        except FileNotFoundError:  # neither ours nor in the way any more
            raise ConnectionError("an object was there, and is gone") from None

    def _head(self, name: str, limit: float) -> dict[str, Any]:
        bucket, _, key = name.partition("/")
        if not key:
            raise FileNotFoundError(name)
        answer: dict[str, Any] = self._call(self._fs._call_s3, "head_object", Bucket=bucket, Key=key, limit=limit)
        return answer

    def _call(self, function: Callable[..., Any], *args: Any, limit: float, **kwargs: Any) -> Any:
        import botocore.exceptions  # type: ignore[import-untyped]
        from fsspec.asyn import sync
        from fsspec.exceptions import FSTimeoutError

        try:
            return sync(self._fs.loop, function, *args, timeout=limit, **kwargs)
        except (botocore.exceptions.NoCredentialsError, botocore.exceptions.PartialCredentialsError) as error:
            raise PermissionError("no credentials") from error
        except FSTimeoutError:
            raise TimeoutError(f"no answer, or not all of it, within {limit:.1f} s") from None
        except OSError as error:
            # s3fs goes by error codes, of which servers have their own; the status of the answer is in the cause.
            status, code = _answer(error)
            kind = _KIND_OF_CODE.get(code) or _KIND_OF_STATUS.get(status)
            if kind is not None:
                raise kind(str(args[0])) from error
            raise


_SIGNATURE = "created-by"  # the name of the metadata that tells whose object it is


def _answer(error: BaseException | None) -> tuple[int, str]:
    """Status and S3's error code of the server's answer that led to `error`; 0 and nothing when there was none."""
    while error is not None:
        if isinstance(response := getattr(error, "response", None), dict):
            return response["ResponseMetadata"]["HTTPStatusCode"], response.get("Error", {}).get("Code", "")
        error = error.__cause__
    return 0, ""


# -- names -----------------------------------------------------------------------------------------------------------


def _normalised(url: str) -> str:
    if url.startswith("s3://"):
        if "@" in url or "?" in url:
            raise StorageError("an s3:// URL holds a bucket and a prefix only; credentials belong into AWS_* variables")
        if not url[5:].strip("/"):
            raise StorageError(f"{url!r} names no bucket; write s3://bucket/prefix")
        return "s3://" + "/".join(_parts(url[5:]))
    if not url.removeprefix("file://"):
        raise StorageError("an empty address names no folder; write . for the one you are in")
    if url.startswith("file://"):
        return "file://" + os.path.abspath(url[7:])
    if "://" in url:
        raise StorageError(
            f"{url.split('://')[0]}:// is not supported; use s3://bucket/prefix, file:///folder or a path"
        )
    return "file://" + os.path.abspath(os.path.expanduser(url))


def _parts(path: str) -> Iterator[str]:
    return (part for part in path.split("/") if part)


def _root(url: str) -> str:
    return url.partition("://")[2]


def _checked(path: str) -> str:
    """A relative path inside the folder, or StorageError."""
    if path.startswith("/") or ".." in path.split("/") or "\0" in path:
        raise StorageError(f"{path!r} leaves its folder; use a relative path without '..'")
    return "/".join(_parts(path))


def _reason(error: Exception) -> str:
    """The error in a line, without what addresses may hold of secrets: what is before an @, or is a query with a signature."""
    text = re.sub(r"\?\S*", "", str(error).strip().split("\n")[0])
    text = re.sub(r"://[^/@\s]*@", "://", text)[:300]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _code_of(error: Exception) -> str:
    """What S3 calls it: a clock that is wrong and a key that is unknown are both refused."""
    code = _answer(error)[1]
    return f" ({code})" if re.fullmatch(r"[A-Z][A-Za-z]{0,59}", code) else ""


_REMEDIES = {
    errno.ENOSPC: "free some space on that disk",
    errno.EDQUOT: "free some space, or have the quota raised",
    errno.EFBIG: "the object is larger than this file system, or a limit of this process (ulimit -f), allows",
    errno.EROFS: "that file system is read-only; choose another place, or have it mounted for writing",
}


def _remedy(error: Exception) -> str:
    told = _REMEDIES.get(getattr(error, "errno", None) or 0)
    return f"; {told}" if told else ""
