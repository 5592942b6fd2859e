"""A Hugging Face Hub on this machine: enough of its protocol to publish to and load from, with faults to switch on.

with HubStandIn() as hub:
    run(env={**os.environ, **hub.environment(cache_folder)})
    hub.fail("PUT", "/lfs/", drop_after=1000)
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN = "hf_the_token_that_this_hub_knows"
USER = "someone"
LFS_SUFFIXES = (".safetensors", ".png", ".bin")


@dataclass
class Fault:
    """A request that goes wrong. `times` counts down; `drop_after` closes the connection after that many bytes;
    `action` happens before the request is answered as it would be."""

    method: str
    pattern: str
    status: int | None = None
    drop_after: int | None = None
    action: Callable[[], object] | None = None
    times: int = 1
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Blob:
    content: bytes
    lfs: bool

    @property
    def oid(self) -> str:
        """As preupload answers: sha256 of a large file, git's hash of a regular one."""
        if self.lfs:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()


@dataclass
class Repo:
    kind: str
    name: str
    private: bool
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)  # sha -> tree
    refs: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, tree: dict[str, Blob], message: str, ref: str) -> str:
        text = json.dumps([message, len(self.commits), {path: blob.oid for path, blob in sorted(tree.items())}])
        sha = hashlib.sha1(text.encode()).hexdigest()
        self.commits[sha] = tree
        self.refs[ref] = sha
        self.messages.append(message)
        return sha

    def resolve(self, revision: str) -> str | None:
        return self.refs.get(revision, revision if revision in self.commits else None)


class HubError(Exception):
    def __init__(self, status: int, message: str, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


class HubStandIn:
    """The server. A context manager; `repos` and `requests` may be looked at while it runs."""

    def __init__(self):
        self.repos: dict[tuple[str, str], Repo] = {}
        self.lfs: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str]] = []
        self.forbidden: set[str] = set()  # namespaces the token may not write to
        self.lock = threading.RLock()

    def __enter__(self) -> "HubStandIn":
        hub = self

        class Handler(_Handler):
            stand_in = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()

    def environment(self, cache) -> dict[str, str]:
        """Variables that make huggingface_hub talk to this server; they are read when it is imported."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_TOKEN": TOKEN,
            "HF_HOME": str(cache),
            "NO_PROXY": "127.0.0.1",
        }

    def fail(self, method: str, pattern: str, **kwargs) -> Fault:
        """Switch a fault on for requests whose path matches."""
        fault = Fault(method, pattern, **kwargs)
        self.faults.append(fault)
        return fault

    def repo(self, name: str, kind: str = "model") -> Repo:
        return self.repos[kind, name]

    def files(self, name: str, revision: str = "main", kind: str = "model") -> dict[str, bytes]:
        """Path -> content at a revision."""
        repo = self.repo(name, kind)
        return {path: blob.content for path, blob in repo.commits[repo.resolve(revision)].items()}


class _Handler(BaseHTTPRequestHandler):
    """One request. Each route is a method; its pattern's groups are its arguments."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1  # one packet an answer
    disable_nagle_algorithm = True
    stand_in: HubStandIn

    def log_message(self, *_):
        pass

    def do_GET(self):
        self._answer()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def _answer(self):
        parts = urlsplit(self.path)
        self.query, path = parse_qs(parts.query), parts.path
        with self.stand_in.lock:
            self.stand_in.requests.append((self.command, unquote(path)))
        fault = self._fault(path)
        if fault is not None and fault.drop_after is not None:
            self.rfile.read(min(fault.drop_after, int(self.headers.get("Content-Length") or 0)))
            self.close_connection = True
            self.connection.close()
            return
        self.body = self._read_body()
        if fault is not None and fault.action is not None:
            fault.action()
        elif fault is not None:
            self._send(fault.status, {"error": f"switched-on fault {fault.status}"}, fault.headers)
            return
        try:
            for method, pattern, route in _ROUTES:
                match = re.fullmatch(pattern, path)
                if match and self.command in method.split():
                    with self.stand_in.lock:
                        route(self, **{key: unquote(value or "") for key, value in match.groupdict().items()})
                    return
            raise HubError(404, f"no route for {self.command} {path}")
        except HubError as error:
            headers = {"X-Error-Message": error.message}
            if error.code:
                headers["X-Error-Code"] = error.code
            self._send(error.status, {"error": error.message}, headers)

    def _fault(self, path: str) -> Fault | None:
        with self.stand_in.lock:
            for fault in self.stand_in.faults:
                if fault.times > 0 and fault.method == self.command and re.search(fault.pattern, unquote(path)):
                    fault.times -= 1
                    return fault
        return None

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            chunks = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _send(self, status: int, content=None, headers: dict[str, str] | None = None):
        data = content if isinstance(content, bytes) else json.dumps(content or {}).encode()
        self.send_response(status)
        for name, value in {
            "Content-Length": str(len(data)),
            "Content-Type": "application/json",
            **(headers or {}),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _token(self) -> str | None:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None

    def _require_write(self, name: str):
        if self._token() != TOKEN:
            raise HubError(401, "Invalid credentials in Authorization header")
        if name.split("/")[0] in self.stand_in.forbidden:
            raise HubError(
                403, f"You don't have the rights to create or write under the namespace {name.split('/')[0]}"
            )

    def _repo(self, kind: str, name: str) -> Repo:
        repo = self.stand_in.repos.get((kind or "model", name))
        if repo is None or (repo.private and self._token() != TOKEN):
            raise HubError(404 if self._token() == TOKEN else 401, "Repository not found", "RepoNotFound")
        return repo

    def _sha(self, repo: Repo, revision: str) -> str:
        sha = repo.resolve(revision)
        if sha is None:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha

    def whoami(self):
        self._require_write(USER)
        self._send(200, {"type": "user", "name": USER, "orgs": []})

    def create_repo(self):
        asked = json.loads(self.body)
        kind, name = asked.get("type") or "model", f"{asked.get('organization') or USER}/{asked['name']}"
        self._require_write(name)
        if (kind, name) in self.stand_in.repos:
            url = f"{self.stand_in.url}/{'spaces/' if kind == 'space' else ''}{name}"
            self._send(409, {"error": "You already created this repo", "url": url, "name": name})
            return
        private = asked.get("visibility") == "private" or asked.get("private") is True
        repo = self.stand_in.repos[kind, name] = Repo(kind, name, private)
        repo.commit({".gitattributes": Blob(b"*.safetensors filter=lfs\n", False)}, "initial commit", "main")
        self._send(200, {"url": f"{self.stand_in.url}/{'spaces/' if kind == 'space' else ''}{name}", "name": name})

    def repo_info(self, kind, name, revision="main"):
        repo = self._repo(kind, name)
        sha = self._sha(repo, revision or "main")
        siblings = [{"rfilename": path} for path in sorted(repo.commits[sha])]
        info = {"id": name, "modelId": name, "sha": sha, "private": repo.private, "siblings": siblings, "tags": []}
        self._send(200, info)

    def tree(self, kind, name, revision):
        repo = self._repo(kind, name)
        entries = []
        for path, blob in sorted(repo.commits[self._sha(repo, revision)].items()):
            entry = {"type": "file", "path": path, "size": len(blob.content), "oid": blob.oid}
            if blob.lfs:
                entry["lfs"] = {"oid": blob.oid, "size": len(blob.content), "pointerSize": 130}
            entries.append(entry)
        self._send(200, entries)

    def refs(self, kind, name):
        repo = self._repo(kind, name)
        branches = [{"name": ref, "ref": f"refs/heads/{ref}", "targetCommit": sha} for ref, sha in repo.refs.items()]
        self._send(200, {"branches": branches, "tags": [], "converts": []})

    def create_branch(self, kind, name, revision):
        self._require_write(name)
        repo = self._repo(kind, name)
        if revision in repo.refs:
            raise HubError(409, f"Reference {revision} already exists")
        repo.refs[revision] = repo.refs["main"]
        self._send(200)

    def validate_yaml(self):
        content = json.loads(self.body)["content"]
        match = re.match(r"^---\r?\n(.*?)\r?\n---(\r?\n|$)", content, re.DOTALL)
        errors = []
        try:
            data = yaml.safe_load(match.group(1)) if match else {}
            errors += [] if isinstance(data, dict) else [{"message": "front matter is no mapping"}]
            if isinstance(data, dict) and data.get("license") is not None and not isinstance(data["license"], str):
                errors.append({"message": '"license" must be a string'})
        except yaml.YAMLError as error:
            errors.append({"message": str(error)})
        self._send(400 if errors else 200, {"errors": errors, "warnings": []})

    def preupload(self, kind, name, revision):
        repo = self._repo(kind, name)
        if "create_pr" not in self.query:
            self._require_write(name)
        tree, files = repo.commits[self._sha(repo, revision)], []
        for file in json.loads(self.body)["files"]:
            lfs = file["path"].endswith(LFS_SUFFIXES)
            entry = {"path": file["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
            if file["path"] in tree:
                entry["oid"] = tree[file["path"]].oid
            files.append(entry)
        self._send(200, {"files": files})

    def lfs_batch(self, kind, name):
        self._repo(kind.removesuffix("s/") if kind else "model", name)
        objects = []
        for entry in json.loads(self.body)["objects"]:
            if entry["oid"] not in self.stand_in.lfs:
                href = f"{self.stand_in.url}/lfs/{entry['oid']}"
                entry = {**entry, "actions": {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}}
            objects.append(entry)
        self._send(200, {"transfer": "basic", "objects": objects})

    def lfs_put(self, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise HubError(400, "content does not match its oid")
        self.stand_in.lfs[oid] = self.body
        self._send(200)

    def lfs_verify(self, oid):
        self._send(200 if oid in self.stand_in.lfs else 404)

    def commit(self, kind, name, revision):
        repo = self._repo(kind, name)
        if "create_pr" not in self.query:
            self._require_write(name)
        parent = self._sha(repo, revision)
        lines = [json.loads(line) for line in self.body.splitlines()]
        [header] = [line["value"] for line in lines if line["key"] == "header"]
        if header.get("parentCommit") not in (None, parent):
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        tree = dict(repo.commits[parent])
        for line in lines:
            self._apply(tree, line["key"], line["value"])
        ref, url = revision, None
        if "create_pr" in self.query:
            ref = f"refs/pr/{sum(key.startswith('refs/pr') for key in repo.refs) + 1}"
            url = f"{self.stand_in.url}/{name}/discussions/{ref.split('/')[-1]}"
        sha = repo.commit(tree, header["summary"], ref)
        answer = {"success": True, "commitOid": sha, "commitUrl": f"{self.stand_in.url}/{name}/commit/{sha}"}
        self._send(200, {**answer, "pullRequestUrl": url})

    def _apply(self, tree: dict[str, Blob], key: str, value: dict):
        if key == "file":
            tree[value["path"]] = Blob(base64.b64decode(value["content"]), False)
        elif key == "lfsFile":
            if value["oid"] not in self.stand_in.lfs:
                raise HubError(400, f"LFS object {value['oid']} was never uploaded")
            tree[value["path"]] = Blob(self.stand_in.lfs[value["oid"]], True)
        elif key == "deletedFile" and tree.pop(value["path"], None) is None:
            raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")

    def resolve(self, kind, name, revision, path):
        repo = self._repo(kind.removesuffix("s/") if kind else "model", name)
        sha = self._sha(repo, revision)
        blob = repo.commits[sha].get(path)
        if blob is None:
            raise HubError(404, "Entry not found", "EntryNotFound")
        headers = {"ETag": f'"{blob.oid}"', "X-Repo-Commit": sha, "Content-Type": "application/octet-stream"}
        if blob.lfs:
            headers |= {"X-Linked-Etag": f'"{blob.oid}"', "X-Linked-Size": str(len(blob.content))}
        self._send(200, blob.content, headers)


_NAME = r"(?P<name>[^/]+/[^/]+)"
_API = rf"/api/(?P<kind>model|space)s/{_NAME}"
_ROUTES = [
    ("GET", "/api/whoami-v2", _Handler.whoami),
    ("POST", "/api/repos/create", _Handler.create_repo),
    ("POST", "/api/validate-yaml", _Handler.validate_yaml),
    ("GET", _API, _Handler.repo_info),
    ("GET", rf"{_API}/revision/(?P<revision>.+)", _Handler.repo_info),
    ("GET", rf"{_API}/tree/(?P<revision>[^/]+)(/.*)?", _Handler.tree),
    ("GET", rf"{_API}/refs", _Handler.refs),
    ("POST", rf"{_API}/branch/(?P<revision>.+)", _Handler.create_branch),
    ("POST", rf"{_API}/preupload/(?P<revision>.+)", _Handler.preupload),
    ("POST", rf"{_API}/commit/(?P<revision>.+)", _Handler.commit),
    ("POST", rf"/(?P<kind>spaces/)?{_NAME}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", "/lfs/(?P<oid>[0-9a-f]{64})", _Handler.lfs_put),
    ("POST", "/lfs/(?P<oid>[0-9a-f]{64})/verify", _Handler.lfs_verify),
    ("GET HEAD", rf"/(?P<kind>spaces/)?{_NAME}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler.resolve),
]
