"""Exported folders on the Hugging Face hub: fetched from it, and put there.

hub:OWNER/NAME   ->  fetched(...)   the folder, here          names a model (pretrained.py) or a codec (codec/load.py)
folder           ->  push(...)      OWNER/NAME there          transfusion export RUN OUT --push OWNER/NAME
"""

from pathlib import Path
from types import ModuleType

HUB = "hub:"


def client() -> ModuleType:
    """The hub's own client; ValueError says how to get it."""
    try:
        import huggingface_hub
    except ImportError:
        raise ValueError("the hub needs its client: pip install huggingface_hub") from None
    return huggingface_hub


def fetched(name: str) -> Path:
    """The folder of the files of hub:OWNER/NAME, fetched unless they are here."""
    try:
        return Path(client().snapshot_download(name.removeprefix(HUB)))
    except Exception as error:  # of the network, of the hub, of a name that is none: all are told in words
        raise ValueError(f"{name} is not to be had: {first_line(error)}") from None


def push(folder: Path, repo: str) -> str:
    """Puts an exported folder into the repository OWNER/NAME of the hub; returns its address."""
    api = client().HfApi()
    try:
        url = api.create_repo(repo, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder)
    except Exception as error:  # as above; the folder stays
        raise ValueError(
            f"{folder} is written, but {repo} does not take it ({first_line(error)}): try `hf auth login`, "
            f"then `hf upload {repo} {folder}`"
        ) from None
    return str(url)


def first_line(error: Exception) -> str:
    """What an error says; the name of its kind where it says nothing."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__
