"""Fetches files into the cache folder: the folder MASKGIT_CACHE, by default ~/.cache/maskgit."""
import hashlib
import http.client
import math
import os
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

TRIES = 4


def cache_folder():
    return Path(os.environ.get("MASKGIT_CACHE") or Path.home() / ".cache" / "maskgit")


def download(url, name, sha256=None, size=None, offline=False, folder=None):
    """A file of a folder (None: the cache folder), fetched where it is not there yet -> its path.

    sha256: its checksum, or the first digits of it; size: its bytes; None: unknown, then the server's word is taken.
    offline: never use the network. What arrived of a file before its connection broke off is kept, and the next try or
    call goes on from there. Two processes may ask at once: one fetches, the other waits. Raises OSError where the file is
    not to be had or cannot be written, ValueError for a wrong size or checksum."""
    path = (folder or cache_folder()) / name
    if path.exists():                                       # only a whole file gets its final name
        return path
    if offline:
        raise OSError(f"{path} is not there, and the network is not to be used: fetch {url} elsewhere and put it there")
    import fcntl                                            # not on Windows, where files are put there by hand
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = open(path.with_name(f"{name}.lock"), "wb")
    except OSError as error:
        raise OSError(f"cannot write to the folder {path.parent}: {error.strerror}; choose another with "
                      f"{'--data-dir' if folder else 'MASKGIT_CACHE'}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process, which fetches {name}", file=sys.stderr, flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)                # let go when that process ends, however it ends
        if path.exists():
            return path
        part = path.with_name(f"{name}.part")
        for wait in range(TRIES):
            time.sleep(wait)
            try:
                fetch(url, part, size)
                break
            except http.client.HTTPException as error:
                reason = error
        else:
            raise OSError(f"cannot fetch {url}: {reason}, {TRIES} times; run this again to go on from there")
        if sha256:
            with open(part, "rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if not found.startswith(sha256):
                part.unlink()
                raise ValueError(f"{url} has a wrong checksum (SHA-256 {found}, expected {sha256}): what arrived was "
                                 f"deleted; run this again, or put the right file at {path}")
        os.replace(part, path)
    return path


def fetch(url, part, size):
    """Adds to the file `part` what it lacks. Raises OSError and ValueError as download() does, and HTTPException where the
    connection broke off, so that another try may help."""
    name, have = part.with_suffix(""), part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=30)
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise OSError(f"cannot fetch {url}: the server answers {error.code} {error.reason}; try again later, or put "
                          f"the file at {name} yourself") from error
        if error.headers.get("Content-Range") == f"bytes */{have}":
            return                                          # nothing lies beyond what is there: it is whole
        part.unlink()
        raise http.client.HTTPException("the server has less of it than was there") from error
    except urllib.error.URLError as error:
        raise OSError(f"cannot reach {url} ({error.reason}): check the network, or put the file at {name} "
                      f"yourself") from error
    except (OSError, http.client.HTTPException) as error:
        raise http.client.HTTPException(f"the connection broke off ({error})") from error

    with response:
        if response.status != 206:                          # the server sends all of it, whatever was asked for
            have = 0
        length = response.headers.get("Content-Length")
        total = have + int(length) if length else size
        if size and total != size:
            raise ValueError(f"{url} has {total} bytes, not {size}: put the right file at {name} yourself")
        started, shown, done = time.time(), 0, have
        try:
            with open(part, "ab" if have else "wb", buffering=0) as file:        # unbuffered: a full disk shows in write()
                while chunk := receive(response):
                    done += len(chunk)
                    while chunk:
                        chunk = chunk[file.write(chunk):]
                    if time.time() - shown > 0.5 or done == total:
                        shown = time.time()
                        left = int(((total or done) - done) * (shown - started) / (done - have))
                        print(f"\rfetching {name.name}: {done / 1e6:.1f} of {total / 1e6 if total else math.nan:.1f} MB, "
                              f"{left // 60}:{left % 60:02} left ", end="", file=sys.stderr, flush=True)
                os.fsync(file.fileno())
        except OSError as error:
            raise OSError(f"cannot write {part}: {error.strerror}; free some space, or choose another folder (MASKGIT_CACHE, --data-dir), and run "
                          f"this again") from error
        finally:
            print(file=sys.stderr)
        if total is not None and done != total:
            raise http.client.HTTPException(f"the connection broke off at {done} of {total} bytes")


def receive(response):
    """The next bytes, none at the end. Raises HTTPException, never the OSError that would mean the disk."""
    try:
        return response.read(1 << 17)
    except OSError as error:
        raise http.client.HTTPException(f"the connection broke off ({error})") from error
