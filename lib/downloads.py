"""Fetches files into the cache folder: the folder MASKGIT_CACHE, by default ~/.cache/maskgit."""
import hashlib
import http.client
import os
import ssl
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from lib.pictures import Progress

TRIES = 4


def cache_folder():
    return Path(os.environ.get("MASKGIT_CACHE") or Path.home() / ".cache" / "maskgit")


def download(url, name, sha256=None, offline=False, folder=None):
    """A file of a folder (None: the cache folder), fetched where it is not there yet -> its path.

    sha256: its checksum, or the first digits of it; None: unknown. offline: never use the network. What arrived of a
    file before its connection broke off is kept, and the next try or call goes on from there. Two processes may ask at
    once: one fetches, the other waits. Raises OSError where the file is not to be had or cannot be written, ValueError
    for a wrong checksum."""
    path = (folder or cache_folder()) / name
    if path.exists():                                       # only a whole file gets its final name
        return path
    if offline:
        raise OSError(f"{path} is not there, and the network is not to be used: fetch {url} elsewhere and put it there")
    for wait in range(TRIES):
        time.sleep(wait)
        try:
            return fetch(url, path, sha256)
        except (http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError) as error:
            reason = error                                  # the network failed in the middle: another try may help
        except urllib.error.URLError as error:              # no server, or (HTTPError) one that refuses
            raise OSError(f"cannot fetch {url} ({error}): check the network, try again later, or put the file at "
                          f"{path} yourself") from error
        except OSError as error:                            # any other is of the disk
            raise OSError(f"cannot write {path}: {error.strerror}; free some space, or choose another folder "
                          f"(MASKGIT_CACHE, --data-dir), and run this again") from error
    raise OSError(f"cannot fetch {url}: {reason}, {TRIES} times; run this again to go on from there")


def fetch(url, path, sha256):
    """One try of download(). Raises ValueError for a wrong checksum, and whatever breaks it off."""
    part = path.with_name(f"{path.name}.part")
    with locked(path):
        if path.exists():                                   # another process has fetched it meanwhile
            return path
        fetch_rest(url, part, path.name)
        if sha256:
            with open(part, "rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if not found.startswith(sha256):
                part.unlink()
                raise ValueError(f"{url} has a wrong checksum (SHA-256 {found}, expected {sha256}): what arrived was "
                                 f"deleted; run this again, or put the right file at {path}")
        return part.replace(path)


def locked(path):
    """An open file, until whose closing no other process fetches `path`; waits until none does."""
    import fcntl  # Windows has none: files are put there by hand

    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_name(f"{path.name}.lock").open("wb")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"waiting for another process, which fetches {path.name}", file=sys.stderr, flush=True)
        fcntl.flock(lock, fcntl.LOCK_EX)                    # let go when that process ends, however it ends
    return lock


def fetch_rest(url, part, name):
    """Adds to `part` what it lacks to be the file `name`. Raises whatever breaks it off."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=30)
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise
        if error.headers.get("Content-Range") == f"bytes */{have}":
            return                                          # there is no more than we have
        part.unlink()
        raise http.client.HTTPException("the server has less of it than was there") from error
    with response:
        have = have if response.status == 206 else 0        # a server that cannot send the rest alone sends all of it
        length = response.headers.get("Content-Length")
        total = have + int(length) if length else 0         # 0: the server does not tell
        progress = Progress(f"fetching {name}", total / 1e6, "MB", have / 1e6, sys.stderr)
        with open(part, "ab" if have else "wb") as file:
            while chunk := response.read(1 << 17):
                file.write(chunk)
                have += len(chunk)
                if total:
                    progress.show(have / 1e6)
            file.flush()
            os.fsync(file.fileno())
    if total and have != total:
        raise http.client.HTTPException(f"the connection broke off at {have} of {total} bytes")
