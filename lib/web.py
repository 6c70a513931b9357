"""Serves one page on this machine and answers its questions, which demo.py defines.

A question is a POST. Its answer is lines of JSON: {"waits": true} while the server is busy with
another request, then what the question tells, and {"end": true} or {"error": ...}. A page that no
longer wants an answer closes the connection; telling it another line then raises ConnectionError.
"""
import contextlib
import json
import socket
import threading
import traceback
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

from lib.errors import UserError, out_of_memory

FILES = {
    "/": ("index.html", "text/html"),
    "/style.css": ("style.css", "text/css"),
    "/app.js": ("app.js", "text/javascript"),
}
MAX_UPLOAD = 20_000_000                     # bytes of a request, so of a photo

Tell = Callable[[dict], None]               # sends one line of an answer
Question = Callable[[bytes, Tell], None]    # takes the body of a request


class PageServer(ThreadingHTTPServer):
    """A server of the page in `folder`, on 127.0.0.1. Raises UserError if the port is taken.

    questions: by path, such as "/about"; one is answered at a time. run_id: what the page's header
    X-Run must be, if it sends one, so that a page of another run does not ask this server."""

    def __init__(self, port: int, folder: Path, questions: dict[str, Question], run_id: str):
        self.folder = folder
        self.questions = questions
        self.run_id = run_id
        self.lock = threading.Lock()        # held while a question is answered
        try:
            super().__init__(("127.0.0.1", port), Handler)
        except OSError as error:
            raise UserError(f"port {port} is not available ({error.strerror}): choose another with "
                            f"--port") from error


class Handler(BaseHTTPRequestHandler):
    """Answers one request, in a thread of its own.

    Only the server's own page may ask: no page of another site (Origin), and none under another
    name that leads to this machine (Host)."""
    timeout = 60

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError, TimeoutError):        # the page has gone
            super().handle()

    def do_GET(self) -> None:
        if self.is_admitted(FILES):
            name, kind = FILES[self.path]
            self.start(200, f"{kind}; charset=utf-8")
            self.wfile.write((self.server.folder / name).read_bytes())

    def do_POST(self) -> None:
        if not self.is_admitted(self.server.questions):
            return
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > MAX_UPLOAD:
            self.refuse(413, f"this file is larger than {MAX_UPLOAD // 1_000_000} MB: reduce it")
            return
        body = self.rfile.read(int(length))
        self.start(200)
        if self.headers.get("X-Run", self.server.run_id) != self.server.run_id:
            self.tell({"error": "the server now has another run: reload this page"})
            return
        self.answer(self.server.questions[self.path], body)

    def is_admitted(self, paths: dict) -> bool:
        """Returns True if the page asks for one of these paths, and refuses other requests."""
        host = self.headers.get("Host", "")
        origin = self.headers.get("Origin")
        is_local = urlsplit("//" + host).hostname in ("127.0.0.1", "localhost")
        if not is_local or origin not in (None, "http://" + host):
            self.refuse(403, "only the page of this server may ask")
            return False
        if self.path not in paths:
            self.refuse(404, "there is nothing here but the page itself")
            return False
        return True

    def answer(self, question: Question, body: bytes) -> None:
        """Sends the answer when its turn has come. Of errors, only a UserError's text is sent."""
        while not self.server.lock.acquire(timeout=0.2):
            self.tell({"waits": True})
        try:
            question(body, self.tell)
            self.tell({"end": True})
        except UserError as error:
            self.tell({"error": str(error)})
        except (ConnectionError, TimeoutError):                         # the page has gone
            raise
        except Exception as error:
            if out_of_memory(error):
                self.tell({"error": "out of memory: ask for fewer images"})
            else:
                traceback.print_exc()
                self.tell({"error": "internal error: see the terminal in which demo.py runs"})
        finally:
            self.server.lock.release()

    def tell(self, news: dict) -> None:
        """Sends a line of JSON. Raises ConnectionError if the page has gone."""
        self.wfile.write(json.dumps(news).encode() + b"\n")

    def refuse(self, status: int, reason: str) -> None:
        """Answers with an error, and reads what is still being sent.

        Without that the sender would only see a broken connection."""
        self.start(status)
        self.tell({"error": reason})
        self.connection.shutdown(socket.SHUT_WR)
        while self.rfile.read(1 << 16):
            pass

    def start(self, status: int, kind: str = "application/x-ndjson") -> None:
        """Sends the head of an answer. The page loads nothing from elsewhere and is in no frame."""
        self.send_response(status)
        self.send_header("Content-Security-Policy", (
            "default-src 'none'; connect-src 'self'; img-src data:; style-src 'self'; "
            "script-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'"))
        self.send_header("Cache-Control", "no-store")
        self.send_header("Content-Type", kind)
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        """Keeps requests off the terminal."""
