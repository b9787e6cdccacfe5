"""A hub on the loopback: the endpoints that huggingface_hub uses, and faults on request.

    with Hub() as hub:
        hub.add("org/model", {"config.json": b"{}"})
        hub.fail("GET", "/resolve/", status=503, times=2)
        HfApi(endpoint=hub.url).model_info("org/model")

Commits are whole trees in memory. A file of LARGE bytes or a safetensors is an LFS object, whose id
is its SHA-256; any other's is that of its git blob. A request with a token that is not in `tokens`
is refused; one without sees no private repository.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = 10_000_000
TOKEN = "hf_" + "loopback" * 4


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def git_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def is_lfs(path: str, content: bytes) -> bool:
    return path.endswith((".safetensors", ".bin")) or len(content) >= LARGE


@dataclass
class Repo:
    """One repository: commits by id, each a tree; branches and tags by name."""

    private: bool = False
    gated: bool = False
    trees: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, tree: dict[str, bytes], branch: str = "main") -> str:
        content = repr((len(self.trees), sorted(tree.items()))).encode()
        commit = hashlib.sha1(content).hexdigest()
        self.trees[commit] = tree
        self.refs[branch] = commit
        return commit


@dataclass
class Fault:
    """What happens to requests whose method and path match, `times` times."""

    method: str
    path: str
    times: float
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b"{}"
    # of a file that is sent: its content changed; or only its first bytes sent; or slowly
    change: object = None
    cut: int | None = None
    delay: float = 0.0
    # what was asked for is done, and only the answer is this one
    lost: bool = False
    then: object = None


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_):
        """A client that hung up is what some faults are about."""


class Hub:
    """The server; `requests` has a line "METHOD path" each, `faults` what goes wrong."""

    def __init__(self):
        self.repos: dict[str, Repo] = {}
        self.lfs: dict[str, bytes] = {}
        self.tokens, self.requests, self.faults = {TOKEN}, [], []
        # path -> what the listing says instead of the truth
        self.listed_oids: dict[str, str] = {}
        # hears of each part of a file that is asked for, as "bytes=1000-"
        self.on_range = lambda text: None
        self.lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = _Server(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def add(self, name: str, files: dict[str, bytes], branch: str = "main", **options) -> str:
        """A commit, of a new repository or on top of another; its id."""
        repo = self.repos.setdefault(name, Repo(**options))
        return repo.commit(dict(files), branch)

    def files(self, name: str, ref: str = "main") -> dict[str, bytes]:
        repo = self.repos[name]
        return repo.trees[repo.refs.get(ref, ref)]

    def fail(self, method: str, path: str, times: float = 1, **what) -> None:
        """Let the next requests go wrong; `path` is searched for as a regular expression."""
        self.faults.append(Fault(method, path, times, **what))

    def count(self, method: str, path: str) -> int:
        """Requests seen."""
        found = (line.split(" ", 1) for line in self.requests)
        return sum(m == method and re.search(path, p) is not None for m, p in found)


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        self._serve("GET")

    do_HEAD = lambda self: self._serve("HEAD")  # noqa: E731
    do_POST = lambda self: self._serve("POST")  # noqa: E731
    do_PUT = lambda self: self._serve("PUT")  # noqa: E731

    def _serve(self, method: str) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length) if length else self._chunks()
        parts = urlsplit(self.path)
        self.where, self.query = unquote(parts.path), parse_qs(parts.query)
        with self.hub.lock:
            self.hub.requests.append(f"{method} {self.where}")
            self.fault = self._next_fault(method)
        if self.fault:
            # not time.sleep, which a test may have taken away from the client
            threading.Event().wait(self.fault.delay)
            if self.fault.then:
                self.fault.then()
            if self.fault.status and not self.fault.lost:
                return self._send(self.fault.status, self.fault.body, self.fault.headers)
        for verb, form, answer in _ROUTES:
            match = re.fullmatch(form, self.where)
            if match and method in verb.split():
                return answer(self, **match.groupdict())
        return self._refuse(404, "EntryNotFound")

    def _chunks(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return b""
        found = b""
        while size := int(self.rfile.readline(), 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return found

    def _next_fault(self, method: str):
        for fault in self.hub.faults:
            if fault.times > 0 and fault.method == method and re.search(fault.path, self.where):
                fault.times -= 1
                return fault
        return None

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        if self.fault and self.fault.lost:
            status, body, headers = self.fault.status, self.fault.body, self.fault.headers
        self.send_response(status)
        headers = {"Content-Length": str(len(body)), **(headers or {})}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, content, status: int = 200) -> None:
        self._send(status, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _refuse(self, status: int, code: str = "", message: str = "") -> None:
        headers = {"X-Error-Code": code} if code else {}
        headers |= {"X-Error-Message": message} if message else {}
        self._send(status, json.dumps({"error": message or code}).encode(), headers)

    def _token(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def _may_write(self) -> bool:
        if self._token() in self.hub.tokens:
            return True
        self._refuse(401, message="Invalid credentials in Authorization header")
        return False

    def _repo(self, repo: str, is_content: bool = False) -> Repo | None:
        """The repository, or an answer that says why not."""
        found, token = self.hub.repos.get(repo), self._token()
        if token and token not in self.hub.tokens:
            self._refuse(401, message="Invalid credentials in Authorization header")
        elif found is None or (found.private and not token):
            self._refuse(404 if token else 401, "RepoNotFound")
        elif found.gated and is_content and not token:
            self._refuse(403, "GatedRepo")
        else:
            return found
        return None

    def _tree(self, repo: Repo | None, revision: str) -> tuple[str, dict[str, bytes]] | None:
        if repo is None:
            return None
        commit = repo.refs.get(revision, revision)
        if commit not in repo.trees:
            self._refuse(404, "RevisionNotFound")
            return None
        return commit, repo.trees[commit]

    # what is asked

    def whoami(self):
        if self._may_write():
            self._json(
                {"type": "user", "name": "org", "orgs": [], "auth": {"type": "access_token"}}
            )

    def info(self, repo, revision="main"):
        found = self.hub.repos.get(repo)
        tree = self._tree(self._repo(repo), revision)
        if tree:
            siblings = [{"rfilename": path} for path in tree[1]]
            about = {"id": repo, "modelId": repo, "private": found.private, "gated": found.gated}
            self._json({**about, "sha": tree[0], "siblings": siblings})

    def tree(self, repo, revision):
        tree = self._tree(self._repo(repo, is_content=True), revision)
        if not tree:
            return
        rows = []
        for path, content in sorted(tree[1].items()):
            row = {"type": "file", "path": path, "size": len(content), "oid": git_id(content)}
            if is_lfs(path, content):
                oid = self.hub.listed_oids.get(path, sha256(content))
                row["lfs"] = {"oid": oid, "size": len(content), "pointerSize": 134}
            else:
                row["oid"] = self.hub.listed_oids.get(path, row["oid"])
            rows.append(row)
        self._json(rows)

    def resolve(self, repo, revision, path):
        tree = self._tree(self._repo(repo, is_content=True), revision)
        if not tree:
            return
        commit, files = tree
        if path not in files:
            self._refuse(404, "EntryNotFound")
            return
        content = files[path]
        oid = sha256(content) if is_lfs(path, content) else git_id(content)
        headers = {"ETag": f'"{oid}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if is_lfs(path, content):
            headers |= {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(content))}
        if self.fault and self.fault.change:
            content = self.fault.change(content)
        status, total = 200, len(content)
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted:
            self.hub.on_range(wanted[0])
            start = int(wanted[1])
            content, status = content[start:], 206
            headers["Content-Range"] = f"bytes {start}-{total - 1}/{total}"
        if self.command == "GET" and self.fault and self.fault.cut is not None:
            self._cut(content, status, headers)
            return
        self._send(status, content, headers)

    def _cut(self, content, status, headers):
        """Announce all of a file, send the start of it and hang up."""
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content[: self.fault.cut])
        self.close_connection = True

    # what is written

    def create(self):
        if not self._may_write():
            return
        asked = json.loads(self.body)
        name = f"{asked.get('organization') or 'org'}/{asked['name']}"
        if name in self.hub.repos:
            self._json({"error": "exists", "url": f"{self.hub.url}/{name}"}, 409)
            return
        private = asked.get("private") or asked.get("visibility") == "private"
        self.hub.add(name, {".gitattributes": b"*.safetensors filter=lfs\n"}, private=private)
        self._json({"url": f"{self.hub.url}/{name}", "name": name})

    def branch(self, repo, revision):
        if not self._may_write():
            return
        refs = self.hub.repos[repo].refs
        if revision in refs:
            self._json({"error": "exists"}, 409)
            return
        refs[revision] = refs[json.loads(self.body or b"{}").get("startingPoint") or "main"]
        self._json({})

    def validate(self):
        self._json({"errors": [], "warnings": []})

    def preupload(self, repo, revision):
        tree = self._tree(self._repo(repo), revision)
        if not tree or not self._may_write():
            return
        rows = []
        for asked in json.loads(self.body)["files"]:
            large = is_lfs(asked["path"], b"") or asked["size"] >= LARGE
            row = {"path": asked["path"], "uploadMode": "lfs" if large else "regular"}
            rows.append({**row, "shouldIgnore": False})
        self._json({"files": rows})

    def batch(self, repo):
        if not self._may_write():
            return
        objects = []
        for asked in json.loads(self.body)["objects"]:
            upload = {"href": f"{self.hub.url}/lfs/{asked['oid']}"}
            verify = {"href": f"{self.hub.url}/verify/{repo}"}
            actions = {"upload": upload, "verify": verify}
            has = asked["oid"] in self.hub.lfs
            objects.append({**asked, **({} if has else {"actions": actions})})
        self._json({"transfer": "basic", "objects": objects})

    def put(self, oid):
        if sha256(self.body) != oid:
            self._refuse(400, message="not the bytes of this id")
            return
        self.hub.lfs[oid] = self.body
        self._json({})

    def verify(self, repo):
        self._json({}, 200 if json.loads(self.body)["oid"] in self.hub.lfs else 404)

    def commit(self, repo, revision):
        if not self._may_write():
            return
        lines = [json.loads(line) for line in self.body.splitlines() if line.strip()]
        found = self.hub.repos[repo]
        parent = lines[0]["value"].get("parentCommit")
        if parent and parent != found.refs[revision]:
            self._refuse(412, message="the branch has moved")
            return
        files = dict(found.trees[found.refs[revision]])
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.lfs[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        commit = found.commit(files, revision)
        url = f"{self.hub.url}/{repo}/commit/{commit}"
        self._json({"success": True, "commitOid": commit, "commitUrl": url})


_NAME = r"(?P<repo>[\w.-]+/[\w.-]+)"
_REVISION = r"(?P<revision>.+?)"
_ROUTES = [
    ("GET", r"/api/whoami-v2", _Handler.whoami),
    ("POST", r"/api/repos/create", _Handler.create),
    ("POST", r"/api/validate-yaml", _Handler.validate),
    ("GET", rf"/api/models/{_NAME}", _Handler.info),
    ("GET", rf"/api/models/{_NAME}/revision/{_REVISION}", _Handler.info),
    ("GET", rf"/api/models/{_NAME}/tree/{_REVISION}", _Handler.tree),
    ("POST", rf"/api/models/{_NAME}/branch/{_REVISION}", _Handler.branch),
    ("POST", rf"/api/models/{_NAME}/preupload/{_REVISION}", _Handler.preupload),
    ("POST", rf"/api/models/{_NAME}/commit/{_REVISION}", _Handler.commit),
    ("GET HEAD", rf"/{_NAME}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler.resolve),
    ("POST", rf"/{_NAME}\.git/info/lfs/objects/batch", _Handler.batch),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", _Handler.put),
    ("POST", rf"/verify/{_NAME}", _Handler.verify),
]
