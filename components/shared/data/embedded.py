"""The embedded data: real text and a labelled task, available offline.

Both are made of documentation that is installed already: Python's own reference (`pydoc_data.topics`) and the docstrings
of the standard library and of packages that mixtune depends on. `ast` reads the docstrings from the source files; no
package is imported.

    pretraining stream           Python's reference, docstrings of the standard library and of `TEXT_PACKAGES`
    fine-tuning, classification  which of `LABELLED_PACKAGES` a docstring belongs to (package names are hidden)
    fine-tuning, generation      the first line of a docstring of `LABELLED_PACKAGES`, from its body

The two sets of packages are disjoint, so that the task's text is new to a pretrained model.
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
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from ..errors import RefusedError

VERSION = 1
"""Increase it whenever a change of the code below changes the text for the same packages."""

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
# Identifiers that contain a package's name, and its usual import aliases, each with the module path that follows.
_NAMES = r"hugging[ _-]?face|the hub\b|matplotlib|pyplot|pylab|mlflow|numpy|pandas|scipy|scikit|sklearn|sqlalchemy|sqla"
_ALIASES = r"hf(?:_\w+)?|mpl|plt|np|npt|npy|pd|sp|spy|sa"
_PATH = r"(?:[./-][A-Za-z_][\w./-]*)*"
_GIVEAWAY = re.compile(
    rf"(?<!\w)\w*(?:{_NAMES})\w*{_PATH}|(?<![A-Za-z0-9])(?:{_ALIASES})(?![A-Za-z0-9]){_PATH}", re.IGNORECASE
)
_BLOT = "___"
_Definition = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
# What can contain a definition.
_BLOCKS = (ast.stmt, ast.ExceptHandler, ast.match_case)
_SURROGATE = re.compile("[\ud800-\udfff]")


def versions() -> dict[str, str]:
    """Returns the versions that the embedded data depends on: of Python, of this code and of every package that is read.

    Raises:
        RefusedError: if packages are not installed; names them.
    """
    installed = {"python": platform.python_version(), "embedded": str(VERSION)}
    missing = []
    for distribution in (*TEXT_PACKAGES.values(), *LABELLED_PACKAGES.values()):
        try:
            installed[distribution] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            missing.append(distribution)
    if missing:
        raise RefusedError(f"source: embedded needs the packages {', '.join(missing)}, which are not installed")
    return installed


def texts() -> Iterator[tuple[str, str]]:
    """Yields the pretraining stream: pairs of a passage of documentation and its location, in a fixed order."""
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
    """Yields the labelled task: triples of the beginning of a docstring, its package and its location, in a fixed order."""
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
    """Yields the generation task: triples of a docstring's body, its first line and its location, in a fixed order."""
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
    """Hides names and import aliases of the labelled packages, including module paths that follow them.

    >>> blotted("Uses np.linalg.norm of NumPy.")
    'Uses ___ of ___.'
    """

    def hide(match: re.Match[str]) -> str:
        end = match.group()[len(match.group().rstrip("./-")) :]
        return _BLOT + end

    return _GIVEAWAY.sub(hide, text)


def shortened(text: str, characters: int = EXAMPLE_CHARACTERS) -> str:
    """Returns the beginning of a text, cut between words."""
    if len(text) <= characters:
        return text
    beginning = text[:characters]
    if not (beginning[-1].isspace() or text[characters].isspace()):
        beginning = beginning.rsplit(None, 1)[0]
    return beginning.rstrip()


def passages(text: str, characters: int = PASSAGE_CHARACTERS) -> Iterator[str]:
    """Splits a long text at paragraph breaks into passages of about `characters` characters."""
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
    """Yields the docstrings of a source tree without duplicates. A fixed order mixes the files of the subpackages."""
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
        for node in _definitions(tree):
            docstring = ast.get_docstring(node)
            if docstring and docstring not in seen and not _SURROGATE.search(docstring):
                seen.add(docstring)
                yield docstring, f"{name}/{relative}, {getattr(node, 'name', 'module')}"


def _definitions(tree: ast.Module) -> Iterator[_Definition]:
    """Yields the module, classes and functions in the order of `ast.walk`, which would also visit every expression."""
    nodes: deque[ast.AST] = deque([tree])
    while nodes:
        node = nodes.popleft()
        if isinstance(node, _Definition):
            yield node
        for _, value in ast.iter_fields(node):
            if isinstance(value, list):
                nodes.extend(item for item in value if isinstance(item, _BLOCKS))
