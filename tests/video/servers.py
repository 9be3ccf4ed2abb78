"""Local servers in place of remote ones: an object store, and web servers with different abilities."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

MOTO = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
server.stop()
"""


@contextmanager
def object_store() -> Iterator[str]:
    """Yield the address of an S3 server in its own process, which ends when this one's pipe closes."""
    process = subprocess.Popen([sys.executable, "-c", MOTO], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        assert process.stdin is not None
        process.stdin.close()


def aws_environment(patch: pytest.MonkeyPatch, address: str, *, credentials: bool = True) -> None:
    """Set the variables as a user of a private S3 server would, and clear s3fs's cache of the previous ones."""
    import s3fs

    values = {"AWS_ENDPOINT_URL": address, "AWS_ALLOW_HTTP": "true", "AWS_REGION": "us-east-1"}
    values |= {"AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true"}
    values |= dict.fromkeys(("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"), "/nonexistent")
    for name, value in values.items():
        patch.setenv(name, value)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        patch.setenv(name, "test") if credentials else patch.delenv(name, raising=False)
    s3fs.S3FileSystem.clear_instance_cache()


@contextmanager
def serve(handler: type[BaseHTTPRequestHandler] | partial) -> Iterator[str]:
    """Yield the address of a web server in a thread."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class WholeFiles(SimpleHTTPRequestHandler):
    """Python's own server, without range requests."""

    def log_message(self, *_):
        pass


class Ranges(WholeFiles):
    """Server with range requests, like common web servers."""

    def do_GET(self):
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(404)
            return
        content = path.read_bytes()
        first, last = 0, len(content) - 1
        if "Range" in self.headers:
            start, _, stop = self.headers["Range"].removeprefix("bytes=").partition("-")
            first, last = int(start), min(int(stop or last), last)
        self.send_response(206 if "Range" in self.headers else 200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(last - first + 1))
        self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
        self.end_headers()
        self.wfile.write(content[first : last + 1])


class Refuses(BaseHTTPRequestHandler):
    """Server that answers 403 to everything, in S3's wording."""

    status = 403
    BODY = b"<?xml version='1.0'?><Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(self.BODY)))
        self.send_header("Content-Type", "application/xml")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(self.BODY)

    def do_HEAD(self):
        self.do_GET()

    def do_PUT(self):
        self.do_GET()
