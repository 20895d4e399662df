"""Files as others write them: image files in bytes, tars of them, tables."""

import io
import json
import tarfile
from pathlib import Path

import pyarrow
from PIL import Image
from pyarrow import parquet


def picture(colour: str = "red", size: tuple[int, int] = (20, 20), form: str = "PNG", **options) -> bytes:
    """An image file of (width, height) pixels."""
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, form, **options)
    return file.getvalue()


def write_tar(path: Path, files: dict[str, bytes | str | dict]) -> Path:
    """A tar of these files, in this order; a dict is written as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            content = json.dumps(content) if isinstance(content, dict) else content
            data = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_table(path: Path, **columns: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table(columns), path)
    return path


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
