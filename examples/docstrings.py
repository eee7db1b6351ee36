"""A real text classification set from files every Python has: which standard-library package wrote this docstring?

    python examples/docstrings.py OUTPUT [--seed 0]

writes OUTPUT/train.jsonl and OUTPUT/dev.jsonl. Source files are parsed, never imported, so the set can be built
wherever the library's sources lie, with or without Tk or a network. It differs a little from one Python version to the
next; on one Python, a seed gives the same rows always.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import json
import math
import os
import random
import re
import sysconfig
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

MIN_ROWS = 3000
MIN_CLASSES, MAX_CLASSES = 8, 12
MIN_CLASS_ROWS, MAX_CLASS_ROWS = 100, 320
MIN_WORDS, MAX_WORDS = 5, 24
DEV_SHARE = 0.2
# two rows are near-duplicates if this share of the words in either is in both ("Return the width of the widget."
# against "Return the height of the widget." has 0.67), or if this many words in a row are the same
NEAR_DUPLICATE = 0.6
SAME_RUN = 5

_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "lib-dynload"}
# what people call a package besides its name
_ALIASES = {"tkinter": r"t?tk|tcl", "idlelib": r"idle", "lib2to3": r"2to3", "unittest": r"tests?", "logging": r"logs?"}


@dataclasses.dataclass(frozen=True)
class Piece:
    """A paragraph of a docstring, or some sentences of it. `origin` tells docstrings apart."""

    text: str
    package: str
    origin: int


@dataclasses.dataclass(frozen=True)
class Docstrings:
    """The data set: rows of {"text": ..., "label": the package's name}."""

    train: list[dict[str, str]]
    dev: list[dict[str, str]]

    def save(self, folder: Path) -> None:
        """Write train.jsonl and dev.jsonl."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, rows in (("train", self.train), ("dev", self.dev)):
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")

    def summary(self) -> str:
        """Return the counts, class by class."""
        train, dev = (Counter(row["label"] for row in rows) for rows in (self.train, self.dev))
        classes = ", ".join(f"{label} {train[label]}+{dev[label]}" for label in sorted(train))
        return f"{len(self.train)} train and {len(self.dev)} dev rows in {len(train)} classes: {classes}"


def build(seed: int = 0, root: Path | None = None) -> Docstrings:
    """Build the data set from the sources under `root`, by default this Python's own standard library.

    Rows are paragraphs of docstrings; if those of the packages are too few, sentences; if those are too few, the
    modules of one file count as packages too.
    """
    root = Path(sysconfig.get_path("stdlib")) if root is None else root
    docstrings = list(_read(root))
    for sentences, modules in ((False, False), (True, False), (True, True)):
        pieces = _pieces(docstrings, sentences, modules, random.Random(seed))
        if len({piece.package for piece in pieces}) >= MIN_CLASSES and len(pieces) >= MIN_ROWS:
            return _split(pieces, random.Random(seed))
    raise RuntimeError(
        f"the standard library must give at least {MIN_ROWS} rows in {MIN_CLASSES} classes, got {len(pieces)} in "
        f"{len({piece.package for piece in pieces})} from {len(docstrings)} docstrings in {root}; "
        "install Python with its sources (.py files), or give the demo other data: --data"
    )


def words(text: str) -> list[str]:
    """Return the words of a text in lower case, numbers and punctuation dropped."""
    return re.findall(r"[a-z]{2,}", text.lower())


def names_package(text: str, package: str) -> bool:
    """Say whether a text names a package: in any case, spaced, hyphenated, inflected, inside a longer word."""
    name = re.sub(r"[^a-z0-9]", "", package.lower())
    stem = name[:-3] if name.endswith("ing") else name
    if stem in re.sub(r"[^a-z0-9]", "", text.lower()):
        return True
    alias = _ALIASES.get(package)
    return alias is not None and bool(re.search(rf"(?<![a-z0-9])({alias})(?![a-z])", text.lower()))


def _read(root: Path) -> Iterator[tuple[str, bool, str]]:
    """Yield (top-level name, is it a package, docstring) of every public part of the library, in a fixed order."""
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = sorted(set(subfolders) - _SKIPPED_FOLDERS)
        for file in sorted(files):
            path = Path(folder, file)
            top = path.relative_to(root).parts[0].removesuffix(".py")
            if path.suffix != ".py" or top.startswith("_"):
                continue
            for docstring in _docstrings(path):
                yield top, path.parent != root, docstring


def _docstrings(path: Path) -> Iterator[str]:
    try:
        with warnings.catch_warnings():
            # invalid escapes in old sources
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        # templates and deliberately broken samples lie among the sources
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            docstring = ast.get_docstring(node)
            if docstring:
                yield docstring


def _pieces(
    docstrings: list[tuple[str, bool, str]], sentences: bool, modules: bool, rng: random.Random
) -> list[Piece]:
    """Return the rows of the largest classes: none names its package, no two are alike, none crowds out the others."""
    found = []
    for origin, (package, is_package, docstring) in enumerate(docstrings):
        if is_package or modules:
            texts = _texts(docstring, sentences)
            found += [Piece(text, package, origin) for text in texts if not names_package(text, package)]
    rng.shuffle(found)
    sizes: defaultdict[str, list[Piece]] = defaultdict(list)
    for piece in _distinct(found):
        sizes[piece.package].append(piece)
    largest = sorted(sizes, key=lambda package: (-len(sizes[package]), package))[:MAX_CLASSES]
    return [
        piece
        for package in largest
        if len(sizes[package]) >= MIN_CLASS_ROWS
        for piece in sizes[package][:MAX_CLASS_ROWS]
    ]


def _texts(docstring: str, sentences: bool) -> Iterator[str]:
    """Yield the paragraphs of a docstring that are prose; those above MAX_WORDS in parts of whole sentences."""
    for paragraph in re.split(r"\n\s*\n", docstring):
        parts = re.split(r"(?<=[.!?])\s+(?=[A-Z])", " ".join(paragraph.split()))
        while parts:
            text = parts.pop(0)
            while not sentences and parts and len(f"{text} {parts[0]}".split()) <= MAX_WORDS:
                text = f"{text} {parts.pop(0)}"
            if ">>>" not in text and len(set(words(text))) >= MIN_WORDS:
                yield " ".join(text.split()[:MAX_WORDS])


def _distinct(pieces: list[Piece]) -> Iterator[Piece]:
    """Yield the pieces of which no earlier one is a near-duplicate.

    Sets with a Jaccard similarity of at least s share a word among the rarest (1 - s) of either, so that only pieces
    with such a word in common need to be compared (prefix filtering, as in Bayardo et al., WWW 2007).
    """
    bags = [set(words(piece.text)) for piece in pieces]
    frequency = Counter(word for bag in bags for word in bag)
    index: defaultdict[str, list[set[str]]] = defaultdict(list)
    seen: set[tuple[str, ...]] = set()
    for piece, bag in zip(pieces, bags, strict=True):
        runs = _runs(words(piece.text))
        rarest = sorted(bag, key=lambda word: (frequency[word], word))
        prefix = rarest[: len(bag) - math.ceil(NEAR_DUPLICATE * len(bag)) + 1]
        alike = any(_jaccard(bag, other) >= NEAR_DUPLICATE for word in prefix for other in index[word])
        if not alike and seen.isdisjoint(runs):
            seen |= runs
            for word in prefix:
                index[word].append(bag)
            yield piece


def _runs(sequence: list[str]) -> set[tuple[str, ...]]:
    return {tuple(sequence[i : i + SAME_RUN]) for i in range(len(sequence) - SAME_RUN + 1)}


def _jaccard(one: set[str], other: set[str]) -> float:
    common = len(one & other)
    return common / (len(one) + len(other) - common)


def _split(pieces: list[Piece], rng: random.Random) -> Docstrings:
    """Split every class 80 to 20; what comes from one docstring stays together, as its parts tell of one another."""
    train: list[dict[str, str]] = []
    dev: list[dict[str, str]] = []
    for package in sorted({piece.package for piece in pieces}):
        mine = [piece for piece in pieces if piece.package == package]
        parts = Counter(piece.origin for piece in mine)
        origins = sorted(parts)
        rng.shuffle(origins)
        held_out: set[int] = set()
        room = DEV_SHARE * len(mine)
        for origin in origins:
            if parts[origin] <= room:
                held_out.add(origin)
                room -= parts[origin]
        for piece in mine:
            (dev if piece.origin in held_out else train).append({"text": piece.text, "label": package})
    rng.shuffle(train)
    rng.shuffle(dev)
    return Docstrings(train, dev)


def main() -> None:
    """Write the data set where the command line says."""
    parser = argparse.ArgumentParser(description="Build a text classification set from the standard library.")
    parser.add_argument("output", type=Path, help="folder for train.jsonl and dev.jsonl")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    docstrings = build(options.seed)
    docstrings.save(options.output)
    print(docstrings.summary())


if __name__ == "__main__":
    main()
