"""What the rows of a dataset job are read from and how: files and their formats, the tokenizer, and digests of all that.

Another key that changes a row is a field of FormatSpec and a line of format_spec; one that changes the result otherwise goes
into `digest`.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from actors import hub, snapshot
from actors.errors import DataError
from actors.formats.base import FormatSpec
from actors.formats.templates import OWN, template_of
from actors.model import load_tokenizer
from actors.preparing import BUILDERS, PrepareSpec, ensure_type
from actors.reading import SourceFile, SourceSpec
from actors.specs import ModelSpec
from orchestrator.dataset_files import hub_spec, local_files
from orchestrator.jobs import special_tokens
from orchestrator.schema import DatasetConfig, JobConfig

FORMAT_VERSION = 2  # of prepared rows; raise it when the same files would give other ones
# What a tokenizer is read from, in the folder of its model.
TOKENIZER_FILES = ("tokenizer*", "*token*.json", "vocab*", "merges.txt", "*.model", "*chat_template*", "*.py")


def what_to_read(config: JobConfig, search_paths: Sequence[str]) -> tuple[PrepareSpec, list[SourceFile]]:
    sources: list[SourceSpec] = []
    files: list[SourceFile] = []
    for entries, held_out in ((config.datasets, False), (config.test_datasets, True)):
        for entry in entries or []:
            found = local_files(entry, search_paths, held_out=held_out)
            for file, _ in found or []:
                if not file.is_file():
                    raise DataError(f"datasets: there is no file {file}")
            streaming = config.streaming and not held_out
            hub_dataset = hub_spec(entry, held_out=held_out, streaming=streaming) if found is None else None
            source = SourceSpec(format_spec(config, entry), held_out, hub_dataset)
            named = [(entry.path, "hub")] if found is None else [(str(file.absolute()), kind) for file, kind in found]
            files += [SourceFile(len(sources), path, kind) for path, kind in named]
            sources.append(source)
    method = "reward_trainer" if config.reward_model else config.rl or "sft"
    packing = config.sample_packing and method == "sft"
    spec = PrepareSpec(
        method=method,
        sources=tuple(sources),
        tokenizer=config.base_model,
        trust_remote_code=config.trust_remote_code,
        special_tokens=special_tokens(config),
        sequence_len=config.sequence_len,
        packing=packing,
        eval_packing=packing and config.eval_sample_packing is not False,
        cut=config.excess_length_strategy == "truncate",
        tokenizer_digest=_tokenizer_digest(config),
    )
    return spec, files


def ensure_types(spec: PrepareSpec) -> Any:
    """The tokenizer. Raises ConfigError for a type that the method does not have, before anything is read."""
    tokenizer = tokenizer_of(spec.tokenizer, spec.trust_remote_code, spec.special_tokens)
    for source in spec.sources:
        ensure_type(spec.method, source.format)
        BUILDERS[spec.method](source.format, tokenizer)
    return tokenizer


def fingerprint(config: JobConfig, search_paths: Sequence[str]) -> str:
    """Digest of what the rows are made of: how they are read and written, and the files' sizes. A resumed run compares it."""
    spec, files = what_to_read(config, search_paths)
    content = {
        "spec": asdict(replace(spec, tokenizer="")),
        "files": [[file.path, file.kind, None if file.kind == "hub" else Path(file.path).stat().st_size] for file in files],
        "held_out": [config.val_set_size, config.seed],
    }
    return snapshot.digest(json.dumps(content, sort_keys=True).encode())


def digest(config: JobConfig, spec: PrepareSpec, files: Iterable[SourceFile]) -> str:
    """Of everything that changes the result. A hub dataset that changes without its revision goes unseen."""
    stats = [(file, file.kind != "hub" and Path(file.path).stat()) for file in files]
    content = {
        "version": FORMAT_VERSION,
        "spec": asdict(replace(spec, tokenizer="")),
        "files": [[asdict(file), stat and [stat.st_size, stat.st_mtime_ns]] for file, stat in stats],
        "held_out": [config.val_set_size, config.seed if config.val_set_size else None],
    }
    return snapshot.digest(json.dumps(content, sort_keys=True).encode())


def chat_template_text(config: JobConfig) -> str | None:
    """The template that the first dataset's rows are written with; None when it is the tokenizer's own."""
    spec = format_spec(config, (config.datasets or [])[0])
    if spec.chat_template in (None, OWN):
        return None
    return template_of(spec, tokenizer_of(config.base_model, config.trust_remote_code, special_tokens(config)))


def format_spec(config: JobConfig, entry: DatasetConfig) -> FormatSpec:
    """How rows of an entry become tokens. The entry's chat template wins over the job's."""
    own = {f.name: _frozen(getattr(entry, f.name)) for f in fields(FormatSpec) if hasattr(entry, f.name)}
    return FormatSpec(
        **own
        | {
            "chat_template": entry.chat_template or ("jinja" if entry.chat_template_jinja else config.chat_template),
            "chat_template_jinja": _text(entry.chat_template_jinja or config.chat_template_jinja),
            "train_on_inputs": config.train_on_inputs,
            "eot_tokens": tuple(config.eot_tokens or ()),
        }
    )


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _text(template: str | None) -> str | None:
    """A template given as a file, read here: workers may be on machines that lack it."""
    if template and "{" not in template and Path(template).is_file():
        return Path(template).read_text(encoding="utf-8")
    return template


def tokenizer_of(model: str, trust_remote_code: bool, special_tokens: tuple[tuple[str, str], ...] = ()) -> Any:
    return load_tokenizer(ModelSpec(model, "float32", trust_remote_code, special_tokens=special_tokens))


def _tokenizer_digest(config: JobConfig) -> str:
    folder = Path(hub.resolve(config.base_model))
    files = {file for pattern in TOKENIZER_FILES for file in folder.glob(pattern) if file.is_file()}
    return snapshot.digest("".join(file.name + snapshot.digest(file.read_bytes()) for file in sorted(files)).encode())
