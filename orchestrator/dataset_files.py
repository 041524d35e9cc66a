"""Which files an entry of `datasets` names, where it names local ones.

A folder may be what `save_to_disk` of the datasets library has written, or hold files of several splits, told by their names as
that library tells them: only those of the entry's split are rows to train on.
"""

import json
import logging
import re
from collections.abc import Iterator, Sequence
from glob import glob
from pathlib import Path

from actors.errors import DataError
from actors.reading import HubSpec
from orchestrator.schema import DatasetConfig

log = logging.getLogger("eagleray")

KINDS = ("jsonl", "json", "csv", "parquet", "arrow", "txt", "text")  # by suffix, or as ds_type
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}


def local_files(entry: DatasetConfig, search_paths: Sequence[str], *, held_out: bool = False) -> list[tuple[Path, str]] | None:
    """Files of a local dataset and their KINDS; None for a name that can only be the hub's.

    held_out: whether the entry is of test_datasets. Raises DataError for files that are not there or of no known kind, and for
    a split that there is not.
    """
    found = _found(entry, search_paths)
    if found is None:
        return None
    if entry.split and re.search(r"[\[+]", entry.split):
        raise DataError(
            f"datasets: {entry.path} lies on this machine, and its rows can be neither shared out nor put together by split: "
            f"{entry.split}; write the rows that you want into a file of their own"
        )
    files = _of_folder(found, entry.split, default_split(held_out)) if isinstance(found, Path) else found
    unused = [name for name in ("name", "revision") if getattr(entry, name)]
    if entry.split not in (None, "train") and not isinstance(found, Path):
        unused.append("split")
    if unused:
        log.warning("datasets: %s not used: %s lies on this machine, not on the hub", ", ".join(unused), entry.path)
    kinds = [entry.ds_type or file.suffix.lstrip(".").lower() for file in files]
    for file, kind in zip(files, kinds, strict=True):
        if kind not in KINDS:
            raise DataError(f"datasets: {file} is of no known kind; use one of {', '.join(KINDS)}, or ds_type")
    return list(zip(files, kinds, strict=True))


def default_split(held_out: bool) -> str:
    """Of an entry that names none, as in Axolotl."""
    return "test" if held_out else "train"


def hub_spec(entry: DatasetConfig, *, held_out: bool = False, streaming: bool = False) -> HubSpec:
    """A dataset of the hub, as an entry names it."""
    files = tuple(entry.data_files) if isinstance(entry.data_files, list) else entry.data_files
    return HubSpec(entry.path, entry.name, entry.split or default_split(held_out), files, entry.revision, streaming)


def _found(entry: DatasetConfig, search_paths: Sequence[str]) -> list[Path] | Path | None:
    """Files, or a folder whose files are still to be chosen; None for a name that can only be the hub's."""
    names = [entry.data_files] if isinstance(entry.data_files, str) else entry.data_files or []
    looked = ", ".join([".", *search_paths])
    if entry.path in KINDS and names and not any("://" in name for name in names):
        # as the datasets library has it: {path: json, data_files: rows.jsonl}
        return [file for name in names for file in _somewhere(name, search_paths, looked)]
    for base in ["", *search_paths]:
        path = Path(base) / Path(entry.path).expanduser()
        if path.is_file():
            return [path]
        if path.is_dir():
            return [path / name for name in names] or path
        if any(c in entry.path for c in "*?[") and (matches := sorted(glob(str(path)))):
            return [Path(name) for name in matches]
    named_as_file = entry.path.startswith((".", "/", "~")) or Path(entry.path).suffix.lstrip(".") in KINDS
    if named_as_file or entry.path.count("/") > 1:
        raise DataError(f"datasets: there is no file {entry.path}; looked in {looked}")
    return None


def _somewhere(name: str, search_paths: Sequence[str], looked: str) -> list[Path]:
    """A file, or those of a pattern, in the first folder that has any."""
    for base in ["", *search_paths]:
        if files := [Path(path) for path in sorted(glob(str(Path(base) / Path(name).expanduser())))]:
            return files
    raise DataError(f"datasets: there is no file {name} (data_files); looked in {looked}")


def _of_folder(folder: Path, split: str | None, default: str) -> list[Path]:
    if (folder / "dataset_dict.json").is_file():
        saved = folder / (split or default)
        if not saved.is_dir():
            there = ", ".join(sorted(path.name for path in folder.iterdir() if path.is_dir()))
            raise DataError(f"datasets: {folder} has no split {saved.name}; it has {there}")
        folder = saved
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        return [folder / file["filename"] for file in state["_data_files"]]
    files = sorted(file for file in folder.iterdir() if file.suffix.lstrip(".").lower() in KINDS)
    if not files:
        raise DataError(f"datasets: the folder {folder} holds no file of a known kind")
    return _of_split(folder, files, split, default)


def _of_split(folder: Path, files: list[Path], split: str | None, default: str) -> list[Path]:
    """All of them, where their names tell of no splits, or of one alone and none was asked for."""
    if split and (exact := [file for file in files if re.match(rf"{re.escape(split)}([^a-z0-9].*)?$", file.stem)]):
        return exact
    asked = next(_splits(split), split) if split else default
    splits = {file: next(_splits(file.stem), None) for file in files}
    chosen = [file for file in files if splits[file] == asked]
    told = set(splits.values())
    no_choice = len(told) == 1 and (split is None or (split == "train" and told == {None}))
    if not chosen and not no_choice:
        raise DataError(f"datasets: no file in {folder} is of split {asked}; it has {', '.join(file.name for file in files)}")
    return chosen or files


def _splits(name: str) -> Iterator[str]:
    """Those that a file's name, or a split's, tells of."""
    words = re.split(r"[^a-z]+", name.lower())
    return (split for split, names in SPLITS.items() if any(word in names for word in words))
