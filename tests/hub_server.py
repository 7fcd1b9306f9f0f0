"""A hub on 127.0.0.1: the part of the Hugging Face HTTP protocol that a download of a model uses.

    with HubServer({"config.json": b"{}"}) as hub:
        ... a process with HF_ENDPOINT=hub.endpoint ...
    hub.downloaded()   # names of the files whose content was asked for

It serves one repository, REPO, and stops by itself: connections after 10 seconds without a word,
the server after LIFETIME_SECONDS whatever its user does.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Collection, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

REPO = "test-org/Tiny-Model-0.1B"
LIFETIME_SECONDS = 120.0


def commit_of(revision: str) -> str:
    """The commit that a branch or tag of the served repository points to."""
    return hashlib.sha1(revision.encode()).hexdigest()


class HubServer:
    """Serves `files` as revision "main", and `revisions` under their names.

    refuse: an (HTTP status, X-Error-Code) for every request; refuse_files: only for file contents.
    cut: file name -> number of bytes after which the connection drops, however often it is tried.
    stall: names of files that are announced and then never sent.
    """

    def __init__(
        self,
        files: Mapping[str, bytes],
        *,
        revisions: Mapping[str, Mapping[str, bytes]] | None = None,
        refuse: tuple[int, str] | None = None,
        refuse_files: tuple[int, str] | None = None,
        cut: Mapping[str, int] | None = None,
        stall: Collection[str] = (),
    ) -> None:
        self.revisions = {"main": files, **(revisions or {})}
        self.refuse = refuse
        self.refuse_files = refuse_files
        self.cut = dict(cut or {})
        self.stall = stall
        self.stopping = threading.Event()
        self.requests: list[tuple[str, str]] = []  # (method, path), in order of arrival

        class Handler(_Handler):
            hub = self

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._alarm = threading.Timer(LIFETIME_SECONDS, self._server.shutdown)
        self._thread.daemon = self._alarm.daemon = True

    def __enter__(self) -> HubServer:
        self._thread.start()
        self._alarm.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._alarm.cancel()
        self.stopping.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=10)

    def downloaded(self) -> set[str]:
        """Names of the files whose content was asked for; HEAD requests do not count."""
        paths = [path for method, path in self.requests if method == "GET" and "/resolve/" in path]
        return {path.split("/resolve/")[1].partition("/")[2] for path in paths}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 10
    disable_nagle_algorithm = True
    hub: HubServer

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path))
        if self.hub.refuse:
            return self._error(*self.hub.refuse)
        api = re.fullmatch(rf"/api/models/{re.escape(REPO)}/(revision|tree)/(.+)", path)
        content = re.fullmatch(rf"/{re.escape(REPO)}/resolve/([^/]+)/(.+)", path)
        if not (api or content):
            return self._error(404, "RepoNotFound")
        revision = api[2] if api else content[1] if content else ""
        name = next((n for n in self.hub.revisions if revision in (n, commit_of(n))), None)
        if name is None:
            return self._error(404, "RevisionNotFound")
        files, commit = self.hub.revisions[name], commit_of(name)
        if content:
            return self._file(files, commit, content[2])
        if api and api[1] == "tree":
            return self._json(
                [
                    {"type": "file", "path": n, "size": len(data), "oid": _etag(data)}
                    for n, data in files.items()
                ]
            )
        siblings = [{"rfilename": n} for n in files]
        return self._json({"id": REPO, "sha": commit, "siblings": siblings, "tags": []})

    def _file(self, files: Mapping[str, bytes], commit: str, name: str) -> None:
        if self.hub.refuse_files:
            return self._error(*self.hub.refuse_files)
        if name not in files:
            return self._error(404, "EntryNotFound")
        data = files[name]
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(wanted[1]) if wanted else 0
        self.send_response(206 if wanted else 200)
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - start))
        self.send_header("ETag", f'"{_etag(data)}"')
        self.send_header("X-Repo-Commit", commit)
        self.end_headers()
        if self.command == "GET" and name in self.hub.stall:
            self.hub.stopping.wait(LIFETIME_SECONDS)
            self.close_connection = True
        elif self.command == "GET":
            end = self.hub.cut.get(name, len(data))
            self.wfile.write(data[start:end])
            self.close_connection = end < len(data)

    def _json(self, value: Any) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def _error(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", "the test hub refuses this request")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the tests read `requests`."""


def _etag(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
