"""What is in the files of a folder."""

import zipfile
from pathlib import Path


def contents(folder: Path) -> list[bytes]:
    """Of every file, and of every part of those that are archives, as torch.save writes them."""
    found = []
    for path in folder.rglob("*"):
        if path.is_file():
            found.append(path.read_bytes())
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as parts:
                found += [parts.read(name) for name in parts.namelist()]
    return found
