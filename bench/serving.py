"""A folder over HTTP, with ranges of bytes, as stores serve them: a process of its own, so that it costs no other time.

with serve(folder) as url: ...      url + "/name" is a file of the folder
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Ranges(SimpleHTTPRequestHandler):
    """GET answers `Range: bytes=FIRST-LAST` by those bytes (RFC 9110, section 14)."""

    protocol_version = "HTTP/1.1"  # connections stay open

    def do_GET(self):
        path = Path(self.translate_path(self.path))
        if not path.is_file() or "Range" not in self.headers:
            return super().do_GET()
        size = path.stat().st_size
        first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
        start, stop = (int(first), min(size, int(last or size) + 1)) if first else (max(0, size - int(last)), size)
        if start >= stop:
            return self.send_error(416)
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
        self.send_header("Content-Length", str(stop - start))
        self.end_headers()
        with path.open("rb") as file:
            self.wfile.write(os.pread(file.fileno(), stop - start, start))

    def end_headers(self):
        self.send_header("Accept-Ranges", "bytes")
        super().end_headers()

    def log_message(self, *_):
        pass


class Server(ThreadingHTTPServer):
    request_queue_size = (
        1024  # readers open a connection a range, all at once; those that find no room wait for seconds
    )


@contextmanager
def serve(folder: Path) -> Iterator[str]:
    """The address of a server of this folder, which ends with the block."""
    process = subprocess.Popen([sys.executable, __file__, str(folder)], stdout=subprocess.PIPE, text=True)
    try:
        yield process.stdout.readline().strip()
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()


if __name__ == "__main__":
    os.chdir(sys.argv[1])
    server = Server(("127.0.0.1", 0), Ranges)
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()
