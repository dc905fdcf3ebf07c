"""The embedded data: real text and a labelled task that need no network.

Both come from documentation that is on the machine already: Python's own reference (`pydoc_data.topics`) and the
docstrings of the standard library and of packages that mixtune depends on. Docstrings are read from the source files by
`ast`; no package is imported.

    pretraining stream           Python's reference, docstrings of the standard library and of `TEXT_PACKAGES`
    fine-tuning, classification  which of `LABELLED_PACKAGES` does this docstring belong to? (names blotted out)
    fine-tuning, generation      the first line of a docstring of `LABELLED_PACKAGES`, from its body

The two sets of packages have nothing in common, so that the task's text is new to a pretrained model.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from ..errors import RefusedError

VERSION = 1
"""Raise it whenever the code below gives other text for the same packages."""

# Name on import -> name of the distribution.
TEXT_PACKAGES = {
    "datasets": "datasets",
    "fsspec": "fsspec",
    "kfp": "kfp",
    "pydantic": "pydantic",
    "rich": "rich",
    "typer": "typer",
}
LABELLED_PACKAGES = {
    "huggingface_hub": "huggingface_hub",
    "matplotlib": "matplotlib",
    "mlflow": "mlflow",
    "numpy": "numpy",
    "pandas": "pandas",
    "scipy": "scipy",
    "sklearn": "scikit-learn",
    "sqlalchemy": "sqlalchemy",
}
STDLIB_CHARACTERS = 350_000
PACKAGE_CHARACTERS = 150_000
PASSAGE_CHARACTERS = 2_000
SHORTEST_CHARACTERS = 150
EXAMPLES_PER_LABEL = 600
EXAMPLE_CHARACTERS = 400

_SKIPPED_FOLDERS = {"tests", "test", "testing", "_vendor", "site-packages", "dist-packages", "idlelib", "lib2to3"}
# Words that hold a package's name, and its usual import aliases, each with the path of modules that follows.
_NAMES = r"hugging[ _-]?face|the hub\b|matplotlib|pyplot|pylab|mlflow|numpy|pandas|scipy|scikit|sklearn|sqlalchemy|sqla"
_ALIASES = r"hf(?:_\w+)?|mpl|plt|np|npt|npy|pd|sp|spy|sa"
_PATH = r"(?:[./-][A-Za-z_][\w./-]*)*"
_GIVEAWAY = re.compile(
    rf"(?<!\w)\w*(?:{_NAMES})\w*{_PATH}|(?<![A-Za-z0-9])(?:{_ALIASES})(?![A-Za-z0-9]){_PATH}", re.IGNORECASE
)
_BLOT = "___"
_SURROGATE = re.compile("[\ud800-\udfff]")


def versions() -> dict[str, str]:
    """What the embedded data depends on: Python, this code and every package that is read.

    Raises:
        RefusedError: naming the packages that are not installed.
    """
    found = {"python": platform.python_version(), "embedded": str(VERSION)}
    missing = []
    for distribution in (*TEXT_PACKAGES.values(), *LABELLED_PACKAGES.values()):
        try:
            found[distribution] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            missing.append(distribution)
    if missing:
        raise RefusedError(f"source: embedded needs the packages {', '.join(missing)}, which are not installed")
    return found


def texts() -> Iterator[tuple[str, str]]:
    """The pretraining stream: pairs of a passage of documentation and where it stands, in a fixed order."""
    from pydoc_data.topics import topics

    for name, topic in sorted(topics.items()):
        for number, passage in enumerate(passages(topic), start=1):
            yield passage, f"python reference, {name}, passage {number}"
    sources = [("stdlib", Path(sysconfig.get_paths()["stdlib"]), STDLIB_CHARACTERS)]
    sources += [(name, _folder(name), PACKAGE_CHARACTERS) for name in TEXT_PACKAGES]
    for name, root, characters in sources:
        total = 0
        for docstring, where in _docstrings(root, name):
            if total >= characters:
                break
            if len(docstring) >= SHORTEST_CHARACTERS:
                total += len(docstring)
                yield docstring, where


def classification() -> Iterator[tuple[str, str, str]]:
    """The labelled task: triples of a docstring's beginning, its package and where it stands, in a fixed order."""
    for name, label in LABELLED_PACKAGES.items():
        seen: set[str] = set()
        for docstring, where in _docstrings(_folder(name), name):
            text = shortened(blotted(shortened(docstring, 4 * EXAMPLE_CHARACTERS)))
            if len(text) < SHORTEST_CHARACTERS or text in seen:
                continue
            seen.add(text)
            yield text, label, where
            if len(seen) == EXAMPLES_PER_LABEL:
                break


def generation() -> Iterator[tuple[str, str, str]]:
    """The other task: triples of a docstring's body, its first line and where it stands, in a fixed order."""
    for name in LABELLED_PACKAGES:
        seen: set[tuple[str, str]] = set()
        for docstring, where in _docstrings(_folder(name), name):
            first, _, body = docstring.partition("\n")
            body = shortened(body.strip("\n"))
            if len(body) < SHORTEST_CHARACTERS or not 10 <= len(first) <= 100 or (body, first) in seen:
                continue
            seen.add((body, first))
            yield f"{body}\n\nSummary:\n", first, where
            if len(seen) == EXAMPLES_PER_LABEL:
                break


def blotted(text: str) -> str:
    """Hides the names and import aliases of the labelled packages, with the paths of modules that follow them.

    >>> blotted("Uses np.linalg.norm of NumPy.")
    'Uses ___ of ___.'
    """

    def hide(match: re.Match[str]) -> str:
        end = match.group()[len(match.group().rstrip("./-")) :]
        return _BLOT + end

    return _GIVEAWAY.sub(hide, text)


def shortened(text: str, characters: int = EXAMPLE_CHARACTERS) -> str:
    """The beginning of a text, cut between words."""
    if len(text) <= characters:
        return text
    beginning = text[:characters]
    if not (beginning[-1].isspace() or text[characters].isspace()):
        beginning = beginning.rsplit(None, 1)[0]
    return beginning.rstrip()


def passages(text: str, characters: int = PASSAGE_CHARACTERS) -> Iterator[str]:
    """Cuts a long text between paragraphs into passages of about `characters` characters."""
    passage: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text.strip("\n")):
        if passage and sum(map(len, passage)) + len(paragraph) > characters:
            yield "\n\n".join(passage)
            passage = []
        passage.append(paragraph.rstrip())
    if any(passage):
        yield "\n\n".join(passage)


def _folder(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise RefusedError(f"source: embedded needs the package {name}, which is not installed")
    return Path(next(iter(spec.submodule_search_locations)))


def _docstrings(root: Path, name: str) -> Iterator[tuple[str, str]]:
    """Docstrings of a source tree, each once. Files come in an order that mixes the subpackages and never changes."""
    files: list[str] = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _SKIPPED_FOLDERS]
        files += [Path(folder, name).relative_to(root).as_posix() for name in names if name.endswith(".py")]
    seen: set[str] = set()
    for relative in sorted(files, key=lambda relative: hashlib.sha256(relative.encode()).hexdigest()):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse((root / relative).read_bytes())
        except (SyntaxError, ValueError, OSError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                docstring = ast.get_docstring(node)
                if docstring and docstring not in seen and not _SURROGATE.search(docstring):
                    seen.add(docstring)
                    yield docstring, f"{name}/{relative}, {getattr(node, 'name', 'module')}"
