"""A Hub on the loopback, in memory: the calls that huggingface_hub makes to push and load models, and nothing else.

Start it with `with serve() as hub:`; a new process reaches it by `environment`, this one by `used_here`. Everything
that was committed stays in `hub.repositories`, a commit after another, each with the files that it changed.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import transformers.utils.hub
import yaml
from huggingface_hub import constants, hf_api


USER = "ada"
TOKEN = "hf_ada"
LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".spm", ".model")


@dataclass
class Commit:
    """One commit: the whole tree after it, and what it changed."""

    oid: str
    message: str
    files: dict[str, bytes]
    changed: list[str]


@dataclass
class Repository:
    """Commits by branch, the newest last."""

    private: bool
    branches: dict[str, list[Commit]] = field(default_factory=dict)

    def find(self, revision: str) -> Commit | None:
        if revision in self.branches:
            return self.branches[revision][-1]
        every = [commit for commits in self.branches.values() for commit in commits]
        return next((commit for commit in every if commit.oid == revision), None)


class Hub(ThreadingHTTPServer):
    """The server and its state."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[str, Repository] = {}
        self.large_files: dict[str, bytes] = {}
        self.lock = threading.Lock()

    def commits(self, name: str, branch: str = "main") -> list[Commit]:
        """What was pushed to a repository, without the empty commit that creates it."""
        return self.repositories[name].branches[branch][1:]


@contextmanager
def serve() -> Iterator[Hub]:
    """A Hub for as long as the block runs."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()


def environment(hub: Hub, cache: Path) -> dict[str, str]:
    """Environment variables of a process that takes this server for the Hub, with caches of its own."""
    return {"HF_ENDPOINT": hub.url, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN}


@contextmanager
def used_here(hub: Hub, cache: Path) -> Iterator[None]:
    """The same for this process, which has read its environment long ago, for as long as the block runs."""
    with pytest.MonkeyPatch.context() as patch:
        files = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        settings = {"ENDPOINT": hub.url, "HUGGINGFACE_CO_URL_TEMPLATE": files, "HF_HUB_CACHE": str(cache)}
        for name, value in {**settings, "HF_HUB_DISABLE_XET": True}.items():
            patch.setattr(constants, name, value)
        # Each keeps the address that was in force when it was made, perhaps by another test.
        patch.setattr(hf_api.api, "endpoint", hub.url)
        patch.setattr(transformers.utils.hub, "_hf_api", None)
        patch.setenv("HF_TOKEN", TOKEN)
        yield


def metadata_errors(readme: str) -> list[str]:
    """What is wrong with the front matter of a model card, by the rules that the Hub documents for it."""
    match = re.match(r"---\n(.*?)\n---", readme, re.DOTALL)
    data = yaml.safe_load(match[1]) if match else None
    if not isinstance(data, dict):
        return ["no front matter"]
    errors = []
    languages = data.get("language", [])
    for language in languages if isinstance(languages, list) else [languages]:
        if not re.fullmatch(r"[a-z]{2,3}(-[A-Za-z]+)?|multilingual|code", str(language)):
            errors.append(f"language {language!r} is no ISO 639 code")
    for name in ("tags", "metrics"):
        if not all(isinstance(value, str) for value in data.get(name, [])):
            errors.append(f"{name} must be a list of texts")
    for model in data.get("model-index", []):
        for result in model["results"] if model.get("name") else [{}]:
            needed = [("task", "type"), ("dataset", "type"), ("dataset", "name")]
            errors += [f"model-index: {a}.{b} is missing" for a, b in needed if not result.get(a, {}).get(b)]
            for metric in result.get("metrics") or [{}]:
                errors += [f"model-index: metrics.{key} is missing" for key in ("type", "value") if key not in metric]
    return errors


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _oid(path: str, content: bytes) -> str:
    return hashlib.sha256(content).hexdigest() if path.endswith(LFS_SUFFIXES) else _git_oid(content)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, format, *args):
        pass

    def do_HEAD(self):
        self.handle_read()

    def do_GET(self):
        self.handle_read()

    def do_PUT(self):
        path, content = urlsplit(self.path).path, self.body()
        self.server.large_files[path.removeprefix("/lfs/")] = content
        self.answer({})

    def do_POST(self):
        with self.server.lock:
            self.handle_write(urlsplit(self.path).path, self.body())

    def body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def answer(self, content, status: int = 200, **headers: str):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def refuse(self, status: int, message: str, code: str = ""):
        self.answer({"error": message}, status, **({"X_Error_Code": code} if code else {}), X_Error_Message=message)

    @property
    def is_signed_in(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def handle_read(self):
        path = unquote(urlsplit(self.path).path).strip("/")
        if path == "api/whoami-v2":
            if not self.is_signed_in:
                return self.refuse(401, "Invalid credentials in Authorization header")
            return self.answer({"type": "user", "name": USER, "orgs": [], "auth": {"type": "access_token"}})
        about = re.fullmatch(r"api/models/([^/]+/[^/]+)(?:/(revision|tree|refs)(?:/([^/]+))?)?", path)
        file = re.fullmatch(r"([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if not about and not file:
            return self.refuse(404, f"no such page: {path}")
        name, kind, revision = about.groups() if about else (file[1], "resolve", file[2])
        repository = self.server.repositories.get(name)
        if repository is None or (repository.private and not self.is_signed_in):
            return self.refuse(404 if self.is_signed_in else 401, "Repository not found", "RepoNotFound")
        if kind == "refs":
            branches = repository.branches.items()
            names = [{"name": b, "ref": f"refs/heads/{b}", "targetCommit": c[-1].oid} for b, c in branches]
            return self.answer({"branches": names, "tags": [], "converts": []})
        commit = repository.find(revision or "main")
        if commit is None:
            return self.refuse(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        if kind == "tree":
            entries = [
                {"type": "file", "path": path, "size": len(content), "oid": _git_oid(content)}
                for path, content in commit.files.items()
            ]
            return self.answer(entries)
        if kind != "resolve":
            siblings = [{"rfilename": path} for path in commit.files]
            return self.answer({"id": name, "sha": commit.oid, "private": repository.private, "siblings": siblings})
        if file[3] not in commit.files:
            return self.refuse(404, "Entry not found", "EntryNotFound")
        content = commit.files[file[3]]
        return self.answer(content, ETag=f'"{_oid(file[3], content)}"', X_Repo_Commit=commit.oid)

    def handle_write(self, path: str, body: bytes):
        if path == "/api/validate-yaml":
            errors = [{"message": message} for message in metadata_errors(json.loads(body)["content"])]
            return self.answer({"errors": errors, "warnings": []}, 400 if errors else 200)
        if not self.is_signed_in:
            return self.refuse(401, "Invalid username or password.")
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**asked, "actions": {"upload": {"href": f"{self.server.url}/lfs/{asked['oid']}"}}}
                if asked["oid"] not in self.server.large_files
                else asked
                for asked in json.loads(body)["objects"]
            ]
            return self.answer({"transfer": "basic", "objects": objects}, Content_Type="application/vnd.git-lfs+json")
        match = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit|branch)/(.+)", path)
        if match is None:
            return self.refuse(404, f"no such page: {path}")
        name, action, revision = match[1], match[2], unquote(match[3])
        if name not in self.server.repositories:
            return self.refuse(404, "Repository not found", "RepoNotFound")
        branches = self.server.repositories[name].branches
        if action == "branch":
            if revision in branches:
                return self.refuse(409, "Reference already exists")
            branches[revision] = branches["main"][:]
            return self.answer({})
        if revision not in branches:
            return self.refuse(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        if action == "preupload":
            files = branches[revision][-1].files
            modes = []
            for file in json.loads(body)["files"]:
                mode = {"path": file["path"], "shouldIgnore": False}
                mode["uploadMode"] = "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular"
                if file["path"] in files:
                    mode["oid"] = _oid(file["path"], files[file["path"]])
                modes.append(mode)
            return self.answer({"files": modes})
        return self.commit(name, branches[revision], [json.loads(line) for line in body.splitlines() if line])

    def create(self, asked: dict):
        name = f"{asked.get('organization') or USER}/{asked['name']}"
        if not name.startswith(f"{USER}/"):
            return self.refuse(
                403, f"You don't have the rights to create a model under the namespace {asked['organization']!r}"
            )
        url = f"{self.server.url}/{name}"
        if name in self.server.repositories:
            return self.answer({"error": "You already created this model repo", "url": url}, 409)
        is_private = asked.get("private", False) or asked.get("visibility") == "private"
        first = Commit(hashlib.sha1(name.encode()).hexdigest(), "initial commit", {}, [])
        self.server.repositories[name] = Repository(is_private, {"main": [first]})
        return self.answer({"url": url, "name": name, "id": name})

    def commit(self, name: str, branch: list[Commit], lines: list[dict]):
        files, changed, message = dict(branch[-1].files), [], ""
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
                continue
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.large_files[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
            else:
                return self.refuse(400, f"unknown operation {line['key']}")
            changed.append(value["path"])
        oid = hashlib.sha1(f"{name} {branch[-1].oid} {len(branch)} {message}".encode()).hexdigest()
        branch.append(Commit(oid, message, files, sorted(changed)))
        url = f"{self.server.url}/{name}/commit/{oid}"
        return self.answer({"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""})
