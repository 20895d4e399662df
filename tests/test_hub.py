"""The hub is asked by its own client, here one of folders; what it refuses is told in words."""

import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from transfusion import hub
from transfusion.commands import run_export


class Hub:
    """What of the hub's client is called, with repositories as folders of this machine."""

    def __init__(self, root: Path):
        self.root = root

    def HfApi(self):
        return self

    def snapshot_download(self, repo: str) -> str:
        if not (self.root / repo).is_dir():
            raise OSError(f"404: no {repo}\nmore of it")
        return str(self.root / repo)

    def create_repo(self, repo: str, exist_ok: bool) -> str:
        (self.root / repo).mkdir(parents=True, exist_ok=exist_ok)
        return f"https://hub/{repo}"

    def upload_folder(self, repo_id: str, folder_path: Path):
        shutil.copytree(folder_path, self.root / repo_id, dirs_exist_ok=True)


def test_a_folder_that_is_pushed_is_fetched_by_its_name(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "client", lambda: Hub(tmp_path / "there"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/config.json").write_text("{}")
    assert hub.push(tmp_path / "mine", "me/mine") == "https://hub/me/mine"
    assert (hub.fetched("hub:me/mine") / "config.json").read_text() == "{}"
    with pytest.raises(ValueError, match=r"hub:me/other is not to be had: 404: no me/other$"):
        hub.fetched("hub:me/other")


def test_what_the_hub_does_not_take_stays_here_with_the_command_that_puts_it_there(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "client", lambda: Hub(tmp_path))
    monkeypatch.setattr(Hub, "upload_folder", lambda *a, **k: 1 / 0)
    with pytest.raises(ValueError, match=r"is written, but me/mine does not take it .division by zero.: try `hf auth"):
        hub.push(tmp_path / "out", "me/mine")


def test_a_missing_client_is_said_to_be_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match="pip install huggingface_hub"):
        hub.fetched("hub:me/mine")


def test_an_error_without_words_is_told_by_its_kind(tmp_path, monkeypatch):
    def refuses(*a, **k):
        raise TimeoutError

    monkeypatch.setattr(hub, "client", lambda: Hub(tmp_path))
    monkeypatch.setattr(Hub, "snapshot_download", refuses)
    monkeypatch.setattr(Hub, "create_repo", refuses)
    with pytest.raises(ValueError, match=r"is not to be had: TimeoutError$"):
        hub.fetched("hub:me/mine")
    with pytest.raises(ValueError, match=r"does not take it .TimeoutError."):
        hub.push(tmp_path, "me/mine")


def test_an_export_that_is_to_be_pushed_asks_for_the_client_before_it_writes(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match="pip install huggingface_hub"):
        run_export(SimpleNamespace(model=None, out=tmp_path / "out", dtype="", license="", push="me/mine"))
    assert not (tmp_path / "out").exists()
