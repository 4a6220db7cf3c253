"""The Hub of `hub_server`, with the clients that it is for: pushed to from this process, loaded from in a fresh one."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from hub_server import HubServer, connect
from huggingface_hub import HfApi, create_repo, hf_hub_download, upload_folder
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import httpx

CARD = b"---\nlicense: mit\n---\n# Digits\n"
PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(256))
REPO = "tester/digits"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub for this process and those that it starts. `waits`: the seconds between the client's attempts."""
    with HubServer() as server:
        server.waits = connect(server, monkeypatch, tmp_path / "home")
        yield server


@pytest.fixture
def folder(tmp_path):
    """A model of 1 MB, two small files, and one in a folder."""
    folder = tmp_path / "digits"
    (folder / "logs").mkdir(parents=True)
    (folder / "README.md").write_bytes(CARD)
    (folder / "model.safetensors").write_bytes(os.urandom(2**20))
    (folder / "curve.png").write_bytes(PNG)
    (folder / "logs" / "notes.txt").write_text("überall ä")
    return folder


def push(folder, **options):
    repo_id = create_repo("digits", exist_ok=True).repo_id
    return upload_folder(repo_id=repo_id, folder_path=folder, **options)


def download(path, **options) -> bytes:
    return Path(hf_hub_download(REPO, path, **options)).read_bytes()


def contents(folder) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def sent(hub, method, ending) -> list[int | None]:
    """The answers to requests of one kind, and then none."""
    answers = [request.status for request in hub.requests if request.method == method and ending in request.path]
    hub.requests.clear()
    return answers


def fresh(hub, home, code):
    """What a new process without a cache prints."""
    done = subprocess.run([sys.executable, "-c", code], env=hub.environment(home), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


DOWNLOAD = """
import hashlib, json, pathlib
from huggingface_hub import hf_hub_download, snapshot_download

one = hf_hub_download("tester/digits", "logs/notes.txt")
folder = pathlib.Path(snapshot_download("tester/digits"))
files = [path for path in folder.rglob("*") if path.is_file()]
hashes = {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
print(json.dumps([pathlib.Path(one).read_text(encoding="utf-8"), hashes]))
"""


def test_a_folder_comes_back_as_it_was(hub, folder, tmp_path):
    commit = push(folder)
    repo = hub.repos[REPO]
    assert {path: content for path, content in repo.files.items() if path != ".gitattributes"} == contents(folder)
    assert [(made.message, len(made.changed)) for made in repo.commits] == [
        ("initial commit", 1),
        ("Upload folder using huggingface_hub", 4),
    ]
    assert (commit.oid, commit.repo_url.repo_id) == (repo.at("main").oid, REPO)
    assert {path for path, blob in repo.at("main").blobs.items() if blob.lfs} == {"model.safetensors", "curve.png"}
    # The bytes of a large file go to a link of their own, and the token does not go with them.
    assert {request.authorised for request in hub.requests if request.method == "PUT"} == {False}
    assert all(request.authorised for request in hub.requests if request.method == "POST")

    text, hashes = fresh(hub, tmp_path / "fresh", DOWNLOAD)
    assert text == "überall ä"
    assert hashes == {path: hashlib.sha256(content).hexdigest() for path, content in repo.files.items()}


def test_what_the_hub_has_is_not_sent_again(hub, folder):
    push(folder)
    assert sent(hub, "PUT", "") == [200, 200]
    before = hub.repos[REPO].at("main")
    assert push(folder).oid == before.oid
    assert sent(hub, "PUT", "") == []
    assert sent(hub, "POST", "/commit/") == []

    (folder / "curve.png").write_bytes(PNG + b"!")
    push(folder, commit_message="Another curve", delete_patterns="logs/*")
    assert sent(hub, "PUT", "") == [200]
    after = hub.repos[REPO].commits[-1]
    assert (after.message, after.changed) == ("Another curve", {"curve.png": "modified"})
    (folder / "logs" / "notes.txt").unlink()
    push(folder, delete_patterns="logs/*")
    assert hub.repos[REPO].commits[-1].changed == {"logs/notes.txt": "deleted"}


def test_what_a_repository_says_of_itself(hub, folder):
    api = HfApi()
    assert api.whoami()["name"] == "tester"
    first = push(folder).oid
    info = api.model_info(REPO, files_metadata=True)
    sizes = {sibling.rfilename: sibling.size for sibling in info.siblings}
    assert (info.id, info.sha, info.private, sizes["model.safetensors"]) == (REPO, first, False, 2**20)
    assert api.list_repo_files(REPO) == sorted(hub.repos[REPO].files)
    assert [entry.path for entry in api.list_repo_tree(REPO, "logs")] == ["logs/notes.txt"]
    assert [entry.path for entry in api.get_paths_info(REPO, ["logs", "curve.png", "none"])] == ["logs", "curve.png"]
    assert api.file_exists(REPO, "README.md")
    assert not api.file_exists(REPO, "none")
    assert not api.repo_exists("tester/none")
    assert not api.repo_exists(REPO, repo_type="dataset")

    api.create_branch(REPO, branch="wip/one")
    api.create_branch(REPO, branch="wip/one", exist_ok=True)
    assert {ref.name for ref in api.list_repo_refs(REPO).branches} == {"main", "wip/one"}
    (folder / "README.md").write_bytes(CARD + b"More.\n")
    push(folder, revision="wip/one", commit_message="On the branch")
    assert api.list_repo_commits(REPO, revision="wip/one")[0].title == "On the branch"
    assert (api.model_info(REPO).sha, hub.repos[REPO].files["README.md"]) == (first, CARD)
    assert download("README.md", revision="wip/one") == CARD + b"More.\n"
    assert download("README.md", revision=first) == CARD

    # The head that somebody expects to build on is another by now.
    with pytest.raises(HfHubHTTPError, match=r"412 Precondition Failed(?s:.*)A commit has happened since"):
        push(folder, parent_commit=hub.repos[REPO].commits[0].oid)


def test_what_is_missing_or_not_allowed(hub, folder, monkeypatch):
    push(folder)
    hub.create("tester/secret", private=True, files={"config.json": b"{}"})
    hub.create("others/model")
    with pytest.raises(RemoteEntryNotFoundError, match="404"):
        hf_hub_download(REPO, "none")
    with pytest.raises(RevisionNotFoundError, match="Invalid rev id: none"):
        hf_hub_download(REPO, "README.md", revision="none")
    with pytest.raises(RepositoryNotFoundError, match="404"):
        hf_hub_download("tester/none", "README.md")
    with pytest.raises(RevisionNotFoundError, match="Invalid rev id: none"):
        push(folder, revision="none")
    with pytest.raises(HfHubHTTPError, match='the rights to create a model under the namespace "others"'):
        create_repo("others/digits")
    with pytest.raises(HfHubHTTPError, match="403 Forbidden"):
        upload_folder(repo_id="others/model", folder_path=folder)
    with pytest.raises(HfHubHTTPError, match=r"409 Conflict(?s:.*)You already created this model repo"):
        create_repo("digits")
    hub.role = "read"
    with pytest.raises(HfHubHTTPError, match='the rights to create a model under the namespace "tester"'):
        create_repo("new", exist_ok=True)
    with pytest.raises(HfHubHTTPError, match="403 Forbidden"):
        push(folder)  # after `create_repo`, which finds that it exists
    hub.role = "write"

    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    for refused in (lambda: hf_hub_download(REPO, "README.md", force_download=True), lambda: push(folder)):
        with pytest.raises((HfHubHTTPError, ValueError)) as caught:
            refused()
        error = caught.value if isinstance(caught.value, HfHubHTTPError) else caught.value.__cause__
        assert error.response.status_code == 401
        assert "Invalid credentials in Authorization header" in str(error)
    with pytest.raises(HfHubHTTPError, match="The token from HF_TOKEN environment variable is invalid"):
        huggingface_hub.whoami()

    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(RepositoryNotFoundError, match="401"):  # as one that does not exist
        hf_hub_download("tester/secret", "config.json")
    with pytest.raises(HfHubHTTPError, match="401 Unauthorized"):
        push(folder)
    assert hf_hub_download(REPO, "README.md")
    assert hf_hub_download("tester/secret", "config.json", token=hub.token)
    assert not any(request.authorised for request in hub.requests[-4:-2])


# Where a request fails, how, and how often the client tries. Without `hf_xet`, it does not repeat a commit.
FAULTS = [
    ("/repos/create", 401, HfHubHTTPError, "Invalid credentials in Authorization header", 1),
    ("/repos/create", 429, HfHubHTTPError, "429 Too Many Requests", 1),
    ("/validate-yaml", 500, HfHubHTTPError, "500 Internal Server Error", 1),
    ("/preupload/", 403, HfHubHTTPError, "403 Forbidden", 1),
    ("/preupload/", 500, HfHubHTTPError, "500 Internal Server Error", 6),
    ("/objects/batch", 429, HfHubHTTPError, "429 Too Many Requests", 6),
    ("^/lfs/", 403, RuntimeError, "Error while uploading 'model.safetensors'", 1),
    ("^/lfs/", 500, RuntimeError, "Error while uploading 'model.safetensors'", 6),
    ("/verify", 413, RuntimeError, "Error while uploading 'model.safetensors'", 1),
    ("/commit/", 409, HfHubHTTPError, "409 Conflict", 1),
    ("/commit/", 413, HfHubHTTPError, "413 Request Entity Too Large", 1),
    ("/commit/", 500, HfHubHTTPError, "Internal Error - We're working hard", 1),
]


@pytest.mark.parametrize(("path", "status", "error", "message", "attempts"), FAULTS)
def test_a_fault_is_the_exception_that_the_hub_would_cause(hub, folder, path, status, error, message, attempts):
    (folder / "curve.png").unlink()  # with one large file, it is known which of them is refused
    hub.fail(path, status)
    with pytest.raises(error, match=message):
        push(folder)
    assert len([request for request in hub.requests if request.status == status]) == attempts
    assert hub.waits == [1, 2, 4, 8, 8][: attempts - 1]
    hub.heal()
    push(folder)
    assert contents(folder).items() <= hub.repos[REPO].files.items()


def test_a_fault_that_passes_is_waited_for(hub, folder):
    hub.fail("/preupload/", 429, times=2, headers={"Retry-After": "30"})
    hub.fail("^/lfs/", 503, times=1, method="PUT")
    push(folder)
    assert contents(folder).items() <= hub.repos[REPO].files.items()
    assert hub.waits == [31, 31, 1]


def test_the_rest_of_a_fault_is_the_callers_to_say(hub, folder):
    hub.fail("/commit/", 403, times=1, body="This repository is frozen")
    with pytest.raises(HfHubHTTPError, match="403 Forbidden: This repository is frozen"):
        push(folder)
    hub.fail("/validate-yaml", 400, times=1, body={"errors": [{"message": '"license" must be a string'}]})
    with pytest.raises(ValueError, match=r'Invalid metadata in README.md.\n- "license" must be a string'):
        push(folder)
    hub.fail("/validate-yaml", 502, times=1, body=b"<html>Bad gateway</html>")
    with pytest.raises(json.JSONDecodeError):  # the client reads the answer before its status
        push(folder)
    (folder / "README.md").write_text("---\nlicense: mit\n")
    with pytest.raises(ValueError, match="the yaml metadata does not end"):
        push(folder)
    (folder / "README.md").write_text("No metadata\n")
    with pytest.warns(UserWarning, match="empty or missing yaml metadata in repo card"):
        push(folder)


def test_a_download_that_fails(hub, folder):
    push(folder)
    hub.fail("/resolve/", 500, method="HEAD")
    with pytest.raises(LocalEntryNotFoundError, match="An error happened while trying to locate the file"):
        hf_hub_download(REPO, "README.md")
    hub.heal()
    hub.fail("/resolve/", 500, method="GET")
    with pytest.raises(HfHubHTTPError, match="500 Internal Server Error"):
        hf_hub_download(REPO, "README.md")
    hub.heal()
    assert download("README.md") == CARD


def test_a_lost_connection_costs_the_client_one_more_attempt(hub, folder):
    hub.drop("^/lfs/", after_bytes=300_000)
    push(folder)
    assert contents(folder).items() <= hub.repos[REPO].files.items()
    assert hub.waits == [1]
    assert sorted(sent(hub, "PUT", ""), key=str) == [200, 200, None]


def test_an_interrupted_push_goes_on_where_it_was(hub, folder):
    oid = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    hub.drop(oid, after_bytes=300_000, times=None)
    with pytest.raises(RuntimeError, match="Error while uploading 'model") as caught:
        push(folder)
    assert isinstance(caught.value.__cause__, httpx.NetworkError | httpx.RemoteProtocolError)
    assert hub.waits == [1, 2, 4, 8, 8]
    assert set(hub.repos[REPO].files) == {".gitattributes"}
    assert sorted(sent(hub, "PUT", ""), key=str) == [200] + [None] * 6

    hub.heal()
    push(folder)
    assert sent(hub, "PUT", "") == [200]  # the model; the picture is there
    assert contents(folder).items() <= hub.repos[REPO].files.items()


def test_an_answer_that_is_lost(hub, folder):
    """What was asked for is done, and the client cannot know."""
    hub.drop("/commit/", after_bytes=None)
    with pytest.raises(httpx.RemoteProtocolError):
        push(folder)
    assert contents(folder).items() <= hub.repos[REPO].files.items()


def test_parts_of_a_file_and_what_is_not_served(hub, folder):
    push(folder)
    url = f"{hub.endpoint}/{REPO}/resolve/main/curve.png"

    def part(asked):
        answer = httpx.get(url, headers={"Range": f"bytes={asked}"})
        return answer.status_code, answer.content, answer.headers["Content-Range"]

    assert part("2-5") == (206, PNG[2:6], "bytes 2-5/264")
    assert part("260-") == (206, PNG[260:], "bytes 260-263/264")
    assert part("-3") == (206, PNG[-3:], "bytes 261-263/264")
    assert part("264-") == (416, b"", "bytes */264")
    answer = httpx.get(hub.endpoint + "/api/settings/billing")
    assert (answer.status_code, "does not serve GET /api/settings/billing" in answer.text) == (501, True)
    # What the server itself does wrong is not an answer that a test could take for the Hub's.
    with pytest.raises(KeyError, match="content"), HubServer() as server:
        assert httpx.post(server.endpoint + "/api/validate-yaml", json={}).status_code == 501


def test_a_client_with_hf_xet(monkeypatch, tmp_path, folder):
    """Its `upload_folder` is another one, which repeats the commit."""
    pytest.importorskip("hf_xet")
    with HubServer(lfs=False) as hub:
        waits = connect(hub, monkeypatch, tmp_path / "home")
        hub.fail("/commit/", 500, times=2)
        push(folder)
        assert contents(folder).items() <= hub.repos[REPO].files.items()
        assert sent(hub, "POST", "/commit/") == [500, 500, 200]
        assert waits == [1, 2]
        assert push(folder).oid == hub.repos[REPO].at("main").oid
        assert len(hub.repos[REPO].commits) == 2


LOAD = """
import json, timm, torch
from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification

image = torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)
words = torch.arange(8)[None]
with torch.no_grad():
    logits = {
        "bert": AutoModelForSequenceClassification.from_pretrained("tester/bert").eval()(words).logits,
        "timm": timm.create_model("hf_hub:tester/net", pretrained=True).eval()(image),
        "wrapped": AutoModelForImageClassification.from_pretrained("tester/net").eval()(image).logits,
    }
print(json.dumps({name: values[0].tolist() for name, values in logits.items()}))
"""


def test_models_of_transformers_and_timm(hub, bert, tmp_path):
    import timm
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(bert).eval()
    net = timm.create_model("test_efficientnet", num_classes=3).eval()
    image = torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)
    with torch.no_grad():
        expected = {"bert": model(torch.arange(8)[None]).logits, "timm": net(image), "wrapped": net(image)}

    model.push_to_hub("bert", tags=["decay"], private=True)
    model.push_to_hub("bert", revision="wip", commit_message="Once more")
    timm.models.push_to_hf_hub(net, "net", model_config={"label_names": ["a", "b", "c"]})
    # timm 1.0.31 writes down the number of classes twice, and transformers 5.24 passes both on.
    config = json.loads(hub.repos["tester/net"].files["config.json"])
    config.get("model_args", {}).pop("num_classes", None)
    content = json.dumps(config).encode()
    HfApi().upload_file(path_or_fileobj=content, path_in_repo="config.json", repo_id="tester/net")
    repo = hub.repos["tester/bert"]
    assert repo.private
    assert [commit.message for commit in repo.commits] == ["initial commit", "Upload BertForSequenceClassification"]
    assert repo.branches["wip"] == repo.branches["main"]  # nothing had changed
    assert b"- decay" in repo.files["README.md"]
    assert set(hub.repos["tester/net"].files) == {
        ".gitattributes",
        "README.md",
        "config.json",
        "model.safetensors",
        "pytorch_model.bin",
    }

    loaded = fresh(hub, tmp_path / "fresh", LOAD)
    assert hub.repos["tester/net"].files["config.json"] == content
    assert loaded.keys() == expected.keys()
    for name, logits in expected.items():
        torch.testing.assert_close(torch.tensor(loaded[name]), logits[0])
