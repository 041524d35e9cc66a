"""The prompts of `eagleray eval`: a file's, or those that the job held out, found again from its configuration."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from actors import storage
from actors.chat import prompt_token_ids
from actors.errors import DataError, EaglerayError
from orchestrator.answering import tokenizer_of
from orchestrator.data import PromptSet, Row, load_prompts, without_long_prompts
from orchestrator.display import Display
from orchestrator.online_job import PROMPTS_DIGEST
from orchestrator.results import Result
from orchestrator.schema import DatasetConfig, JobConfig


@dataclass(frozen=True)
class Questions:
    """Prompts, and where they are from, for a person."""

    rows: tuple[Row, ...]
    source: str


def questions_for(result: Result, file: Path | None, display: Display) -> Questions:
    """The rows of a file, which are like those of the job's datasets, or those that the job held out.

    Raises EaglerayError where it held none out, and where nobody can know any more which.
    """
    config = result.config
    tokenizer = tokenizer_of(result)
    template = config.trl.chat_template_kwargs or {}

    def tokens(prompt: Any) -> int:
        return len(prompt_token_ids(tokenizer, prompt, template))

    if file is not None:
        transform = config.datasets[0].type if config.rl == "grpo" and config.datasets else None
        entry = DatasetConfig(path=str(file.expanduser().resolve()), type=transform)
        alone = replace(config, datasets=[entry], test_datasets=None, val_set_size=0.0)
        prompts = without_long_prompts(alone, load_prompts(alone, config.source.folders), tokens)
        return Questions(prompts.train, str(file))
    if not config.test_datasets and not config.val_set_size:
        raise EaglerayError(f"{result.run} held no prompts out (test_datasets, val_set_size); name a file by --prompts")
    there = replace(config, datasets=_found(config, config.datasets), test_datasets=_found(config, config.test_datasets))
    prompts = without_long_prompts(there, load_prompts(there, config.source.folders), tokens)
    _ensure_held_out(result, prompts, display)
    sources = [entry.path for entry in config.test_datasets or []]
    if config.val_set_size:
        sources.append(f"val_set_size {config.val_set_size:g} of {', '.join(entry.path for entry in config.datasets or [])}")
    return Questions(prompts.held_out, " and ".join(sources))


def _found(config: JobConfig, entries: list[DatasetConfig] | None) -> list[DatasetConfig]:
    """With the paths of those that are where the run found them: another file of that name in the current folder is not it."""
    found = []
    for entry in entries or []:
        places = (Path(folder) / Path(entry.path).expanduser() for folder in config.source.folders)
        found.append(replace(entry, path=next((str(place) for place in places if place.exists()), entry.path)))
    return found


def _ensure_held_out(result: Result, prompts: PromptSet, display: Display) -> None:
    """Raises DataError where the rows have changed since, so that what val_set_size holds out now was trained on."""
    newest = result.folder if (result.folder / storage.STATE).is_file() else storage.newest_checkpoint(result.run)
    if result.config.val_set_size:
        if newest is None:
            display.warn("the run has no checkpoint, so nobody can check that its prompts are the same, and those held out too")
        elif storage.read_state(newest)["job"].get(PROMPTS_DIGEST) != prompts.fingerprint:
            raise DataError(
                "datasets: the prompts are not those of the run any more, so nobody knows which it held out; put them back, or "
                "name a file by --prompts"
            )
    known = {json.dumps(row.prompt, sort_keys=True, default=str) for row in prompts.train}
    seen = sum(json.dumps(row.prompt, sort_keys=True, default=str) in known for row in prompts.held_out)
    if seen:
        display.warn(f"{seen} of the {len(prompts.held_out)} held-out prompts are among those trained on, too")
