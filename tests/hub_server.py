"""A Hugging Face Hub on loopback: what `huggingface_hub`, transformers and timm ask for to push a model and to load it.

    with HubServer() as hub:
        subprocess.run([...], env=hub.environment(tmp_path))  # or connect(hub, monkeypatch, tmp_path), in this process
        assert "model.safetensors" in hub.repos[f"{hub.user}/digits"].files
        assert [request.status for request in hub.requests if request.method == "PUT"] == [200]

Model repositories only, without pull requests. Large files travel by plain LFS, for which a client that has `hf_xet`
needs ``HF_HUB_DISABLE_XET=1``: it does not ask the Hub. ``HubServer(lfs=False)`` takes every file inside the commit, so
that such a client can be tested as it comes; its `upload_folder` is another than that of a client without.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import importlib
import json
import os
import re
import secrets
import socket
import struct
import threading
import time
import types
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import cached_property
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

__all__ = ["Commit", "HubServer", "Repo", "Request", "connect"]

# What a new repository begins with, and so what the Hub stores as LFS by its name alone.
LFS_SUFFIXES = ".bin .ckpt .gz .h5 .npy .npz .onnx .pkl .pt .pth .safetensors .tar .zip".split()
GITATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()
LARGEST_REGULAR_FILE = 10 * 2**20

# What the Hub says with these, where the client or a user reads the words.
MESSAGES = {
    401: "Invalid credentials in Authorization header",
    403: "Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request",
    429: "We had to rate limit you",
    500: "Internal Error - We're working hard to fix this as soon as possible!",
}
ANONYMOUS = "Invalid username or password."


class Request(NamedTuple):
    """One request, in the order of the answers."""

    method: str
    path: str  # without the query
    status: int | None  # None: the connection was closed instead
    authorised: bool  # whether it carried the token; the bytes of a large file never do


@dataclass(frozen=True)
class Blob:
    """A file's content, with the names that git and LFS have for it."""

    content: bytes
    lfs: bool

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @cached_property
    def pointer(self) -> bytes:
        lines = ["version https://git-lfs.github.com/spec/v1", f"oid sha256:{self.sha256}", f"size {len(self.content)}"]
        return "".join(line + "\n" for line in lines).encode()

    @cached_property
    def oid(self) -> str:
        stored = self.pointer if self.lfs else self.content
        return hashlib.sha1(b"blob %d\0" % len(stored) + stored).hexdigest()

    @property
    def etag(self) -> str:
        """What a client compares its own file with."""
        return self.sha256 if self.lfs else self.oid

    def describe(self, path: str) -> dict[str, Any]:
        entry = {"type": "file", "path": path, "oid": self.oid, "size": len(self.content)}
        if self.lfs:
            entry["lfs"] = {"oid": self.sha256, "size": len(self.content), "pointerSize": len(self.pointer)}
        return entry


@dataclass(frozen=True)
class Commit:
    oid: str
    message: str
    description: str
    parent: str | None
    branch: str
    date: str
    changed: dict[str, str]  # path: "added", "modified", "unchanged" or "deleted"
    blobs: dict[str, Blob] = field(repr=False)

    @property
    def files(self) -> dict[str, bytes]:
        return {path: blob.content for path, blob in self.blobs.items()}


@dataclass
class Repo:
    id: str
    private: bool
    commits: list[Commit] = field(default_factory=list)  # of every branch, the oldest first
    branches: dict[str, str] = field(default_factory=dict)  # name: oid of its last commit
    objects: dict[str, bytes] = field(default_factory=dict, repr=False)  # LFS, by sha256; committed or not

    @property
    def files(self) -> dict[str, bytes]:
        return self.at("main").files

    def at(self, revision: str) -> Commit | None:
        """The commit that a branch's name, or a hash of 7 digits or more, stands for."""
        oid = self.branches.get(revision.removeprefix("refs/heads/"), revision)
        found = [commit for commit in self.commits if len(oid) >= 7 and commit.oid.startswith(oid)]
        return found[-1] if found else None

    def commit(self, branch: str, message: str, changes: dict[str, Blob | None], description: str = "") -> Commit:
        """``changes``: path: its new content, or None to delete it."""
        parent = self.at(branch)
        blobs = dict(parent.blobs) if parent else {}
        changed = {}
        for path, blob in changes.items():
            before = blobs.pop(path, None)
            if blob is None:
                changed[path] = "deleted"
                continue
            blobs[path] = blob
            changed[path] = "added" if before is None else "unchanged" if before == blob else "modified"
        date = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        content = json.dumps([parent and parent.oid, message, len(self.commits), {k: v.oid for k, v in blobs.items()}])
        oid = hashlib.sha1(content.encode()).hexdigest()
        commit = Commit(oid, message, description, parent and parent.oid, branch, date, changed, blobs)
        self.commits.append(commit)
        self.branches[branch] = oid
        return commit


@dataclass
class Fault:
    path: str
    method: str | None
    times: int | None  # how often it still strikes; None: every time
    answer: Answer | None  # None: the connection is closed
    after_bytes: int | None = None


class HubServer:
    """A Hub with one user; a context manager that serves while it is open.

    Args:
        user: whose ``token`` it is. Others' namespaces are closed to them, except those of ``organizations``.
        role: "read": the token may only read, as on the Hub the first that people make often does.
        lfs: whether large and binary files are uploaded by LFS, or inside the commit like the text files.
    """

    def __init__(self, user="tester", token="hf_test", organizations=(), role="write", lfs=True):
        self.user = user
        self.token = token
        self.organizations = list(organizations)
        self.role = role
        self.lfs = lfs
        self.repos: dict[str, Repo] = {}
        self.requests: list[Request] = []
        self.errors: list[Exception] = []  # of this server itself; leaving the context raises the first
        self.signature = secrets.token_hex(8)  # of the links to upload a large file, which need no token
        self.lock = threading.RLock()
        self._faults: list[Fault] = []

    def __enter__(self):
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.hub = self
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        # Polled often, because `shutdown` waits for the next poll.
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind, error, traceback):
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        if self.errors and kind is None:
            raise self.errors[0]

    def fail(self, path, status=500, times=None, body=None, headers=None, method=None):
        """Answer requests whose path has a match of the regular expression ``path`` with ``status``, without doing
        what they ask. Of several faults that match, the first that was set strikes. ``body``: the message, or a dict
        for the whole JSON, or bytes."""
        if not isinstance(body, bytes | dict):
            answer = _error(status, body or MESSAGES.get(status, HTTPStatus(status).phrase), headers=headers)
        else:
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            kind = "application/json" if isinstance(body, dict) else "text/plain"
            answer = Answer(status, content, {"Content-Type": kind, **(headers or {})})
        self._faults.append(Fault(path, method, times, answer))

    def drop(self, path, after_bytes=0, times=1, method=None):
        """Close the connection when ``after_bytes`` of a matching request's body have been read. None: do what it asks,
        and close the connection instead of answering."""
        self._faults.append(Fault(path, method, times, None, after_bytes))

    def heal(self):
        """No more faults."""
        with self.lock:
            self._faults.clear()

    def environment(self, home) -> dict[str, str]:
        """The environment of a process that uses this Hub, with its caches and settings in the folder ``home``."""
        others = {key: value for key, value in os.environ.items() if not re.match("HF_|HUGGINGFACE|TRANSFORMERS_", key)}
        variables = {
            "HF_ENDPOINT": self.endpoint,
            "HF_TOKEN": self.token,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_TELEMETRY": "1",  # else the client asks for a list of programs that may be running it
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }
        return others | variables | ({"HF_HUB_DISABLE_XET": "1"} if self.lfs else {})

    def create(self, repo_id: str, private=False, files: dict[str, bytes] | None = None) -> Repo:
        """A repository as its creation on the Hub leaves it, and with ``files`` in a second commit."""
        repo = self.repos[repo_id] = Repo(repo_id, private)
        repo.commit("main", "initial commit", {".gitattributes": Blob(GITATTRIBUTES, False)})
        if files:
            blobs = {path: Blob(content, self.is_lfs(path, content)) for path, content in files.items()}
            repo.objects |= {blob.sha256: blob.content for blob in blobs.values() if blob.lfs}
            repo.commit("main", "Upload files", blobs)
        return repo

    def is_lfs(self, path: str, sample: bytes, size: int | None = None) -> bool:
        """Whether the Hub asks for a file by LFS: by its name, its size, or for not being text."""
        size = len(sample) if size is None else size
        try:
            sample[:512].decode()
            text = b"\0" not in sample[:512]
        except UnicodeDecodeError as error:
            text = error.start > 508  # else a character that the sample cuts
        named = Path(path).suffix in LFS_SUFFIXES
        return self.lfs and size > 0 and (named or not text or size > LARGEST_REGULAR_FILE)

    def _fault(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self._faults:
                if fault.times == 0 or fault.method not in (None, method) or not re.search(fault.path, path):
                    continue
                if fault.times is not None:
                    fault.times -= 1
                return fault
        return None


def connect(hub: HubServer, monkeypatch, home) -> list[float]:
    """Let this process, and those that it starts, use the Hub until the test ends.

    What the process has read from its environment is replaced. The client does not wait before it tries again; how many
    seconds it would have waited is added to the list that is returned.
    """
    import huggingface_hub
    from huggingface_hub import constants, file_download, hf_api
    from huggingface_hub.utils import _http

    environment = hub.environment(home)
    for key in set(os.environ) - set(environment):
        monkeypatch.delenv(key)
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    home = Path(home)
    settings = {
        "ENDPOINT": hub.endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": hub.lfs,
        "HF_HUB_DISABLE_TELEMETRY": True,
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": False,
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_TOKEN_PATH": str(home / "token"),  # a test without HF_TOKEN must not find the user's own
        "HF_STORED_TOKENS_PATH": str(home / "stored_tokens"),
    }
    for name, value in settings.items():
        monkeypatch.setattr(constants, name, value)
    # `huggingface_hub.utils.tqdm` is also the name of a class.
    bars = importlib.import_module("huggingface_hub.utils.tqdm")
    monkeypatch.setattr(bars, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    # The functions of `huggingface_hub` are methods of this one, and transformers has its own.
    monkeypatch.setattr(hf_api.api, "endpoint", hub.endpoint)
    with contextlib.suppress(ImportError):
        import transformers.utils.hub

        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None, raising=False)  # older ones have none

    waits: list[float] = []
    for module in (_http, file_download):
        monkeypatch.setattr(module, "time", types.SimpleNamespace(sleep=waits.append, time=time.time))
    huggingface_hub.utils.close_session()  # connections to a server of an earlier test
    return waits


class Answer(NamedTuple):
    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = {}  # noqa: RUF012 -- never changed


class _Refused(Exception):
    def __init__(self, answer: Answer):
        super().__init__(answer)
        self.answer = answer


def _json(data: Any, status: int = 200) -> Answer:
    return Answer(status, json.dumps(data).encode(), {"Content-Type": "application/json"})


def _error(status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None) -> Answer:
    """``code``: what the client tells a missing repository, revision and file apart by."""
    said = {"Content-Type": "application/json", "X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
    return Answer(status, json.dumps({"error": message}).encode(), said | (headers or {}))


class _Server(ThreadingHTTPServer):
    hub: HubServer
    daemon_threads = True

    def handle_error(self, request, client_address):
        """Nothing: a client that goes away is not this server's error, which are kept in `HubServer.errors`."""


# A repository's name, which old ones have without a user's, and a revision; both as they stand in a path, quoted.
ID = "(?P<repo>[^/]+(?:/[^/]+)?)"
REVISION = "(?P<revision>[^/]+)"
API = f"/api/models/{ID}"
ROUTES = [
    ("GET", "/api/whoami-v2", "whoami"),
    ("HEAD", "/api/telemetry/.+", "telemetry"),
    ("POST", "/api/repos/create", "create"),
    ("POST", "/api/validate-yaml", "validate_yaml"),
    ("GET", API, "info"),
    ("GET", f"{API}/revision/{REVISION}", "info"),
    ("GET", f"{API}/tree/{REVISION}(?:/(?P<folder>.+))?", "tree"),
    ("GET", f"{API}/commits/{REVISION}", "commits"),
    ("GET", f"{API}/refs", "refs"),
    ("GET", f"{API}/xet-(read|write)-token/.+", "xet_token"),
    ("POST", f"{API}/paths-info/{REVISION}", "paths_info"),
    ("POST", f"{API}/preupload/{REVISION}", "preupload"),
    ("POST", f"{API}/commit/{REVISION}", "commit"),
    ("POST", f"{API}/branch/{REVISION}", "branch"),
    ("POST", rf"/{ID}\.git/info/lfs/objects/batch", "lfs_batch"),
    ("POST", rf"/{ID}\.git/info/lfs/verify", "lfs_verify"),
    ("PUT", f"/lfs/{ID}/(?P<oid>[0-9a-f]{{64}})", "lfs_put"),
    ("GET", f"/{ID}/resolve/{REVISION}/(?P<file>.+)", "resolve"),
    ("HEAD", f"/{ID}/resolve/{REVISION}/(?P<file>.+)", "resolve"),
    ("GET", "(?:/api)?/(?:datasets|spaces)/(?P<repo>.+)", "no_such_type"),
    ("HEAD", "(?:/api)?/(?:datasets|spaces)/(?P<repo>.+)", "no_such_type"),
]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each answer waits 40 ms, its head and body being sent one by one
    timeout = 60

    def log_message(self, *args):
        """Nothing: `HubServer.requests` has them all."""

    def do_GET(self):
        self.hub: HubServer = self.server.hub
        split = urlsplit(self.path)
        self.route, self.query = split.path, parse_qs(split.query)
        self.authorised = self.headers.get("Authorization") == f"Bearer {self.hub.token}"
        fault = self.hub._fault(self.command, self.route)
        if fault and fault.answer is None and fault.after_bytes is not None:
            return self._hang_up(fault.after_bytes)
        self.body = self._read_body()
        answer = fault.answer if fault and fault.answer else self._answer()
        if fault and fault.answer is None:
            return self._hang_up(0)
        self._record(answer.status)
        self._send(answer)

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def _record(self, status: int | None):
        with self.hub.lock:
            self.hub.requests.append(Request(self.command, self.route, status, self.authorised))

    def _read_body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _hang_up(self, after_bytes: int):
        self.rfile.read(min(after_bytes, int(self.headers.get("Content-Length", 0))))
        self._record(None)
        # A reset and not an orderly end: what a broken network looks like from the other side.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True

    def _send(self, answer: Answer):
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)

    def _answer(self) -> Answer:
        try:
            # A wrong token is refused even where none is needed.
            if "Authorization" in self.headers and not self.authorised:
                message = ANONYMOUS if self.route == "/api/whoami-v2" else MESSAGES[401]
                return _error(401, message)
            for method, pattern, name in ROUTES:
                if method == self.command and (match := re.fullmatch(pattern, self.route)):
                    parts = {key: unquote(part) for key, part in match.groupdict().items() if part is not None}
                    with self.hub.lock:
                        return getattr(self, name)(**parts)
            return _error(501, f"{Path(__file__).name} does not serve {self.command} {self.route}")
        except _Refused as refused:
            return refused.answer
        except Exception as error:
            self.hub.errors.append(error)
            return _error(501, f"{Path(__file__).name}: {error!r}")  # not one that the client tries again

    def _find(self, repo: str, write: bool = False) -> Repo:
        """The repository, or the refusal: without a token, one that may not be seen and one that does not exist look
        the same."""
        found = self.hub.repos.get(repo)
        if not self.authorised and (write or found is None or found.private):
            raise _Refused(_error(401, ANONYMOUS, "RepoNotFound"))
        if found is None:
            raise _Refused(_error(404, "Repository not found", "RepoNotFound"))
        if write and not self._may_write(repo):
            raise _Refused(_error(403, MESSAGES[403]))
        return found

    def _may_write(self, repo: str) -> bool:
        return self.hub.role == "write" and repo.split("/")[0] in (self.hub.user, *self.hub.organizations)

    def _commit_of(self, repo: Repo, revision: str) -> Commit:
        if (commit := repo.at(revision)) is None:
            raise _Refused(_error(404, f"Invalid rev id: {revision}", "RevisionNotFound"))
        return commit

    # Accounts and repositories

    def whoami(self) -> Answer:
        if not self.authorised:
            return _error(401, ANONYMOUS)
        token = {"displayName": "tests", "role": self.hub.role, "createdAt": "2024-01-01T00:00:00.000Z"}
        orgs = [{"type": "org", "name": name, "roleInOrg": self.hub.role} for name in self.hub.organizations]
        user = {"type": "user", "id": "0" * 24, "name": self.hub.user, "fullname": self.hub.user, "orgs": orgs}
        return _json(user | {"isPro": False, "auth": {"type": "access_token", "accessToken": token}})

    def telemetry(self) -> Answer:
        return Answer()

    def create(self) -> Answer:
        asked = json.loads(self.body)
        namespace = asked.get("organization") or self.hub.user
        repo_id = f"{namespace}/{asked['name']}"
        url = f"{self.hub.endpoint}/{repo_id}"
        if not self.authorised:
            return _error(401, ANONYMOUS)
        if asked.get("type", "model") != "model":
            return _error(501, f"{Path(__file__).name} keeps only models")
        if not self._may_write(repo_id):
            return _error(403, f'You don\'t have the rights to create a model under the namespace "{namespace}"')
        if repo_id in self.hub.repos:
            return _json({"error": "You already created this model repo", "url": url}, 409)
        self.hub.create(repo_id, private=asked.get("visibility") == "private" or bool(asked.get("private")))
        return _json({"url": url, "name": repo_id, "id": "1" * 24})

    def validate_yaml(self) -> Answer:
        """Only whether there is a block of metadata: the standard library has no YAML."""
        content = json.loads(self.body)["content"].lstrip()
        if not content.startswith("---\n"):
            return _json({"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]})
        if "\n---" not in content:
            return _json({"errors": [{"message": "the yaml metadata does not end"}], "warnings": []}, 400)
        return _json({"errors": [], "warnings": []})

    def info(self, repo: str, revision: str = "main") -> Answer:
        found = self._find(repo)
        commit = self._commit_of(found, revision)
        siblings = [{"rfilename": path} for path in sorted(commit.blobs)]
        if "blobs" in self.query:
            for sibling in siblings:
                entry = commit.blobs[sibling["rfilename"]].describe(sibling["rfilename"])
                lfs = {"sha256": entry["lfs"]["oid"], **entry["lfs"]} if "lfs" in entry else None
                sibling |= {"blobId": entry["oid"], "size": entry["size"], "lfs": lfs}
        names = {"id": repo, "modelId": repo, "author": repo.split("/")[0], "sha": commit.oid}
        dates = {"createdAt": found.commits[0].date, "lastModified": commit.date}
        flags = {"private": found.private, "gated": False, "disabled": False, "downloads": 0, "likes": 0, "tags": []}
        return _json(names | dates | flags | {"siblings": siblings})

    def commits(self, repo: str, revision: str) -> Answer:
        found = self._find(repo)
        commit, history = self._commit_of(found, revision), []
        while commit:
            authors = [{"user": self.hub.user}]
            entry = {"id": commit.oid, "title": commit.message, "message": commit.description, "date": commit.date}
            history.append(entry | {"authors": authors})
            commit = found.at(commit.parent) if commit.parent else None
        return _json(history)

    def refs(self, repo: str) -> Answer:
        branches = self._find(repo).branches.items()
        heads = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": oid} for name, oid in branches]
        return _json({"branches": heads, "converts": [], "tags": [], "pullRequests": []})

    def branch(self, repo: str, revision: str) -> Answer:
        found = self._find(repo, write=True)
        if revision in found.branches:
            return _error(409, "Reference already exists")
        start = json.loads(self.body or b"{}").get("startingPoint", "main")
        found.branches[revision] = self._commit_of(found, start).oid
        return Answer()

    # Reading

    def tree(self, repo: str, revision: str, folder: str = "") -> Answer:
        commit = self._commit_of(self._find(repo), revision)
        prefix = folder + "/" if folder else ""
        entries = _entries(commit, prefix)
        if folder and not entries:
            return _error(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        if self.query.get("recursive", ["false"])[0].lower() != "true":
            entries = [entry for entry in entries if "/" not in entry["path"].removeprefix(prefix)]
        return _json(entries)

    def paths_info(self, repo: str, revision: str) -> Answer:
        commit = self._commit_of(self._find(repo), revision)
        paths = [path.strip("/") for path in parse_qs(self.body.decode()).get("paths", [])]
        return _json([entry for entry in _entries(commit) if entry["path"] in paths])

    def resolve(self, repo: str, revision: str, file: str) -> Answer:
        commit = self._commit_of(self._find(repo), revision)
        head = {"X-Repo-Commit": commit.oid}
        if file not in commit.blobs:
            return _error(404, "Entry not found", "EntryNotFound", head)
        blob = commit.blobs[file]
        head |= {"ETag": f'"{blob.etag}"', "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        if blob.lfs:
            head |= {"X-Linked-Etag": f'"{blob.etag}"', "X-Linked-Size": str(len(blob.content))}
        match = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if not match or self.command == "HEAD":
            return Answer(200, blob.content, head)
        size = len(blob.content)
        first, last = match.groups()
        start = int(first) if first else max(size - int(last), 0)
        stop = min(int(last) + 1, size) if first and last else size
        if start >= stop:
            return Answer(416, b"", head | {"Content-Range": f"bytes */{size}"})
        return Answer(206, blob.content[start:stop], head | {"Content-Range": f"bytes {start}-{stop - 1}/{size}"})

    def no_such_type(self, repo: str) -> Answer:
        self._find("")

    def xet_token(self, repo: str) -> Answer:
        return _error(404, f"{Path(__file__).name} has no xet storage: set HF_HUB_DISABLE_XET=1")

    # Writing: a client asks how to send each file, sends those of LFS, and then commits all

    def preupload(self, repo: str, revision: str) -> Answer:
        commit = self._commit_of(self._find(repo, write=True), revision)
        answers = []
        for file in json.loads(self.body)["files"]:
            path, sample = file["path"], base64.b64decode(file["sample"])
            lfs = self.hub.is_lfs(path, sample, file["size"])
            answer = {"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
            if path in commit.blobs:  # the client leaves out of its commit what is the same
                answer["oid"] = commit.blobs[path].etag
            answers.append(answer)
        return _json({"files": answers})

    def lfs_batch(self, repo: str) -> Answer:
        found = self._find(repo, write=True)
        objects = []
        for asked in json.loads(self.body)["objects"]:
            entry = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in found.objects:
                upload = f"{self.hub.endpoint}/lfs/{repo}/{asked['oid']}?signature={self.hub.signature}"
                verify = f"{self.hub.endpoint}/{repo}.git/info/lfs/verify"
                entry["actions"] = {"upload": {"href": upload}, "verify": {"href": verify}}
            objects.append(entry)
        return _json({"transfer": "basic", "objects": objects})

    def lfs_put(self, repo: str, oid: str) -> Answer:
        if self.query.get("signature") != [self.hub.signature]:
            return Answer(403, b"SignatureDoesNotMatch", {"Content-Type": "text/plain"})
        if hashlib.sha256(self.body).hexdigest() != oid:
            return Answer(400, b"XAmzContentSHA256Mismatch", {"Content-Type": "text/plain"})
        self.hub.repos[repo].objects[oid] = self.body
        return Answer()

    def lfs_verify(self, repo: str) -> Answer:
        found = self._find(repo, write=True)
        asked = json.loads(self.body)
        if len(found.objects.get(asked["oid"], b"")) != asked["size"]:
            return _error(404, "Object does not exist or has another size")
        return Answer()

    def commit(self, repo: str, revision: str) -> Answer:
        found = self._find(repo, write=True)
        if "create_pr" in self.query:
            return _error(501, f"{Path(__file__).name} opens no pull requests")
        parent = self._commit_of(found, revision)
        if revision not in found.branches:
            return _error(400, f"{revision} is not a branch")
        header, changes = {}, {}
        for line in self.body.splitlines():
            item = json.loads(line)
            key, value = item["key"], item["value"]
            if key == "header":
                header = value
            elif key == "file":
                changes[value["path"]] = Blob(base64.b64decode(value["content"]), False)
            elif key == "lfsFile":
                if value["oid"] not in found.objects:
                    return _error(400, f"LFS pointer of {value['path']} points to a file that does not exist")
                changes[value["path"]] = Blob(found.objects[value["oid"]], True)
            elif key in ("deletedFile", "deletedFolder"):
                gone = [path for path in parent.blobs if path == value["path"]]
                if key == "deletedFolder":
                    gone = [path for path in parent.blobs if path.startswith(value["path"].rstrip("/") + "/")]
                if not gone:
                    return _error(404, "A file with this name doesn't exist", "EntryNotFound")
                changes |= dict.fromkeys(gone)
            else:
                return _error(501, f"{Path(__file__).name} does not commit a {key}")
        if not parent.oid.startswith(header.get("parentCommit") or ""):
            return _error(412, "A commit has happened since. Please refresh and try again.")
        commit = found.commit(revision, header["summary"], changes, header.get("description", ""))
        url = f"{self.hub.endpoint}/{repo}/commit/{commit.oid}"
        return _json({"success": True, "commitOid": commit.oid, "commitUrl": url, "hookOutput": ""})


def _entries(commit: Commit, prefix: str = "") -> list[dict[str, Any]]:
    """The files below a folder, and the folders."""
    files = [blob.describe(path) for path, blob in sorted(commit.blobs.items()) if path.startswith(prefix)]
    folders = {str(parent) for entry in files for parent in Path(entry["path"]).parents}
    return [
        {"type": "directory", "path": folder, "oid": hashlib.sha1(folder.encode()).hexdigest(), "size": 0}
        for folder in sorted(folders)
        if folder != "." and folder.startswith(prefix)
    ] + files
