"""A folder of pictures: flat, or with one subfolder for each class."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from frostglass.core.errors import BadInput
from frostglass.vision.datasets import DATASETS, Catalogue, shown
from frostglass.vision.decoding import EXTENSIONS, Picture, decode

FLAT_CLASSES = 10
"""Labels of a flat folder are the position of the image modulo this."""


@DATASETS.register()
def folder(path: str) -> Catalogue:
    """Image files of a folder, or of its subfolders, each of which is a class.

    Images directly in the folder win: subfolders are then ignored, and the notes say so. Names are sorted. Hidden
    files, files whose extension promises no image and folders further down are ignored, and counted in the notes.

    Raises:
        BadInput: a folder that is missing, unreadable or without any image.
    """
    root = Path(path).expanduser()
    try:
        there, listed = root.exists(), root.is_dir()
    except OSError as problem:  # a folder above it may not be entered, or the name is too long
        raise _unreadable(root, problem) from None
    if not there:
        raise BadInput(f"dataset: folder {shown(root)} does not exist; give the path of a folder with images.")
    if not listed:
        raise BadInput(f"dataset: {shown(root)} is a file, not a folder; give the folder that holds the images.")
    images, below, ignored = _listing(root)
    if images:
        notes = ["The images lie in one folder without classes, so their labels are arbitrary: position modulo 10."]
        if below:
            notes.append(f"{_number(len(below), 'subfolder')} beside the images ignored.")
        return _catalogue(images, [i % FLAT_CLASSES for i in range(len(images))], FLAT_CLASSES, root, notes, ignored)
    return _classes(root, below, ignored)


def _classes(root: Path, below: Sequence[Path], ignored: int) -> Catalogue:
    images: list[Path] = []
    labels: list[int] = []
    notes: list[str] = []
    words: list[str] = []
    passed = deeper = 0
    visited = {parent.resolve() for parent in (root, *root.resolve().parents)}
    for sub in below:
        real = sub.resolve()
        if real in visited:  # a link back up, or a second link to the same folder
            passed += 1
            continue
        visited.add(real)
        files, folders, others = _listing(sub)
        ignored, deeper = ignored + others, deeper + len(folders)
        if files:
            images += files
            labels += [len(words)] * len(files)
            words.append(sub.name)
        else:
            passed += 1
    if not images:
        raise BadInput(
            f"dataset: folder {shown(root)} holds no image ({', '.join(sorted(EXTENSIONS))}), nor does a folder in it; "
            "give a folder with images."
        )
    if passed:
        notes.append(f"{_number(passed, 'subfolder')} ignored: without images, or a link to one already read.")
    if deeper:
        notes.append(f"{_number(deeper, 'folder')} below the class folders ignored.")
    found = _catalogue(images, labels, len(words), root, notes, ignored)
    return replace(found, words=tuple(shown(Path(word)) for word in words))


def _catalogue(
    images: Sequence[Path], labels: Sequence[int], classes: int, root: Path, notes: list[str], ignored: int
) -> Catalogue:
    if ignored:
        notes.append(f"{_number(ignored, 'file')} ignored: hidden, or without the extension of an image.")

    def read(rows: Sequence[int]) -> Iterable[Picture]:
        return (decode(images[row], shown(images[row])) for row in rows)

    names = [shown(image.relative_to(root)) for image in images]
    return Catalogue(names, labels, classes, read, tuple(notes))


def _listing(directory: Path) -> tuple[list[Path], list[Path], int]:
    """(image files, folders, how many other files), sorted by name; hidden ones count as others."""
    images, folders, others = [], [], 0
    try:
        with os.scandir(directory) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    others += 1
                elif _is_folder(entry):
                    folders.append(Path(directory, entry.name))
                elif Path(entry.name).suffix.lower() in EXTENSIONS:
                    images.append(Path(directory, entry.name))
                else:
                    others += 1
    except OSError as problem:
        raise _unreadable(directory, problem) from None
    return sorted(images), sorted(folders), others


def _unreadable(directory: Path, problem: OSError) -> BadInput:
    fix = "correct the path" if problem.errno == errno.ENAMETOOLONG else "change its permissions"
    return BadInput(f"dataset: folder {shown(directory)} cannot be read ({problem.strerror}); {fix}.")


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link in a circle
        return False


def _number(n: int, noun: str) -> str:
    return f"{n} {noun}{'' if n == 1 else 's'}"
