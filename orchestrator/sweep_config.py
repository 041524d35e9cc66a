"""SWEEP.yaml: a base job, a space, and how it is searched. All that can be wrong with it is found here, before Ray starts.

    base: smollm2-lora-cpu.yaml       # beside this file
    output_dir: outputs/my-sweep
    metric: eval/loss                 # a name of METRICS
    mode: min
    num_samples: 8                    # draws of the random keys; grids are run so often
    scheduler: {name: asha, grace_period: 5, reduction_factor: 3}
    space:
      learning_rate: {loguniform: [1e-6, 1e-4]}

`load` reads such a file, `make` takes the same from Python. A new key is a field of SweepConfig and a line in KEYS.
"""

import difflib
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from actors.errors import ConfigError
from orchestrator import config as job_file
from orchestrator import source
from orchestrator.jobs import kept
from orchestrator.metrics import METRICS, entry
from orchestrator.planning import with_changes
from orchestrator.runnable import ensure_runnable, keys, refusals, remarks
from orchestrator.schema import JobConfig
from orchestrator.shared_engines import unshareable
from orchestrator.source import Problem, Source
from orchestrator.space import Space, read_space

Scheduler = Mapping[str, Any]  # its name, and its options

WHOLE = ((int,), "a whole number")
TEXT = ((str,), "text")

KEYS: dict[str, tuple[tuple[type, ...], str]] = {
    "base": TEXT,
    "output_dir": TEXT,
    "metric": TEXT,
    "mode": TEXT,
    "num_samples": WHOLE,
    "max_concurrent": WHOLE,
    "share_engines": ((bool,), "true or false"),
    "seed": WHOLE,
    "scheduler": ((str, Mapping), "asha, pbt or none, or a mapping with that name"),
    "space": ((str, Mapping), "a mapping of keys of the job, or the name of a file with one"),
}
REQUIRED = {
    "base": "name a job file, which lies beside this one",
    "output_dir": "name a folder for the sweep",
    "metric": "name what to compare trials by, for example eval/loss",
    "mode": "say whether a smaller or a larger metric is better: min or max",
    "space": "say which keys are varied, for example learning_rate: {loguniform: [1e-6, 1e-4]}",
}
# Of each scheduler: its options, with their defaults; None = it must be given.
SCHEDULERS: dict[str, dict[str, Any]] = {
    "none": {},
    "asha": {"grace_period": 1, "reduction_factor": 3},  # steps that no trial is stopped before; 1 of so many goes on
    "pbt": {"perturbation_interval": None, "quantile_fraction": 0.25},  # steps; share of the trials that copy the best ones
}
OPTIONS: dict[str, tuple[str, Callable[[float], bool]]] = {  # what each must be
    "grace_period": ("a number of steps, 1 or more", lambda value: value >= 1),
    "reduction_factor": ("above 1", lambda value: value > 1),
    "perturbation_interval": ("a number of steps, 1 or more", lambda value: value >= 1),
    "quantile_fraction": ("above 0 and at most 0.5", lambda value: 0 < value <= 0.5),
}
OF_A_SWEEP = {  # keys of a job that a sweep sets itself
    "output_dir": "each trial has a folder of its own in the sweep's",
    "resume_from_checkpoint": "trials go on from their own checkpoints",
    "auto_resume_from_checkpoints": "trials go on from their own checkpoints",
    "ray_run_name": "each trial is called after the sweep and its number",
    "wandb_run_id": "each trial is a run of its own",
}
# What a resumed job takes from its configuration, not from its checkpoint: what population based training can change.
MAY_CHANGE = (
    "learning_rate", "weight_decay", "max_grad_norm", "adam_beta1", "adam_beta2", "adam_epsilon", "lora_dropout",
    "neftune_noise_alpha", "rl_beta", "trl.beta", "trl.epsilon", "trl.epsilon_high", "trl.temperature", "trl.top_p",
    "trl.reward_weights", "orpo_alpha", "dpo_label_smoothing", "kto_desirable_weight", "kto_undesirable_weight",
    "center_rewards_coefficient",
)  # fmt: skip


@dataclass(frozen=True)
class SweepConfig:
    """A whole sweep, checked."""

    base: JobConfig
    space: Space
    output_dir: Path  # absolute
    metric: str
    mode: str  # min | max
    num_samples: int = 1  # draws of the random keys; a grid is run so often
    max_concurrent: int | None = None  # trials at once; None = as many as fit
    share_engines: bool = False  # GRPO trials with LoRA adapters sample on the same engines
    seed: int = 42  # of the draws
    scheduler: Scheduler = field(default_factory=lambda: {"name": "none"})

    @property
    def trials(self) -> int:
        """How many there will be."""
        return self.space.trials(self.num_samples)

    @property
    def sizes(self) -> list[tuple[str, dict[str, Any]]]:
        """The space's values that a plan looks at; an entry of a list, such as datasets[0].path, is no matter of room."""
        known = set(keys())
        return [(key, params) for key, params in self.space.samples() if known.issuperset(params)]

    @property
    def variants(self) -> list[JobConfig]:
        """What trials may look like: the base with each of the space's values, one at a time."""
        return [with_changes(self.base, params) for _, params in self.sizes]


def load(path: str | Path, overrides: Sequence[str] = ()) -> SweepConfig:
    """Reads a sweep file; `overrides` are `key=value` of the sweep's own keys. Raises ConfigError for all that is wrong."""
    data, where = source.read(path, overrides)
    where.raise_if_any(_keys(data))
    where.raise_if_any(Problem(key, f"is missing; {text}") for key, text in REQUIRED.items() if data.get(key) is None)
    given = {key: value for key, value in data.items() if value is not None}
    base = job_file.load(_beside(Path(path), given.pop("base"), where, "base"))
    if isinstance(given["space"], str):
        file = _beside(Path(path), given["space"], where, "space")
        given["space"], spaces, prefix = *source.read(file), ""
    else:
        spaces, prefix = where, "space."
    return _checked(base, given, where, spaces, prefix)


def make(base: JobConfig, **given: Any) -> SweepConfig:
    """A sweep from Python; given: its keys, as in a file, without `base`; None = the default. Raises ConfigError."""
    where = Source("sweep()")
    given = {key: value for key, value in given.items() if value is not None}
    given["output_dir"] = str(given["output_dir"])
    where.raise_if_any(_keys(given))
    return _checked(base, given, where, where, "space.")


def _beside(sweep: Path, name: str, where: Source, key: str) -> Path:
    for path in (sweep.parent / Path(name).expanduser(), Path(name).expanduser()):
        if path.is_file():
            return path
    problem = Problem(key, f"there is no file {name}, neither beside {sweep} nor here; correct the name")
    raise ConfigError(where.describe(problem))


def _keys(data: Mapping[str, Any]) -> Iterator[Problem]:
    """Names and types of the sweep's own keys."""
    for key, value in data.items():
        if key not in KEYS:
            close = difflib.get_close_matches(str(key), KEYS, n=1)
            of_job = "it is a key of the job: put it under space, or into the base"
            yield Problem(str(key), f"no sweep has this key; {of_job if key in keys() else _meant(close, KEYS)}")
            continue
        kinds, words = KEYS[key]
        wrong = not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds)
        if value is not None and wrong:
            yield Problem(key, f"takes {words}, not {value!r}; correct the value")


def _meant(close: Sequence[str], names: Sequence[str] | Mapping[str, Any]) -> str:
    return f"did you mean {close[0]}?" if close else f"it has {', '.join(names)}"


def _checked(base: JobConfig, given: Mapping[str, Any], where: Source, spaces: Source, prefix: str) -> SweepConfig:
    """spaces: where the space is written, `prefix` before its keys."""
    ensure_runnable(base)
    scheduler, problems = _scheduler(given.get("scheduler", "none"))
    where.raise_if_any(problems)
    space, wrong = read_space(given["space"])
    spaces.raise_if_any(Problem(f"{prefix}{key}", text) for key, text in wrong)
    config = SweepConfig(
        **{
            **given,
            "base": base,
            "space": space,
            "output_dir": Path(kept(given["output_dir"])),
            "scheduler": scheduler,
        }
    )
    where.raise_if_any(_contradictions(config))
    spaces.raise_if_any(Problem(f"{prefix}{key}", text) for key, text in _values(config))
    if config.share_engines and (text := unshareable(base, config.variants)):
        where.raise_if_any([Problem("share_engines", text)])
    return config


def _scheduler(written: Any) -> tuple[Scheduler, list[Problem]]:
    said = {"name": written} if isinstance(written, str) else dict(written)
    name = said.get("name")
    if name not in SCHEDULERS:
        names = ", ".join(SCHEDULERS)
        return {}, [Problem("scheduler", f"there is none called {name!r}; its name is one of {names}")]
    options = SCHEDULERS[name]
    problems = [
        Problem(f"scheduler.{key}", f"{name} has no such option; it has {', '.join(options) or 'none'}")
        for key in sorted(said.keys() - {"name", *options})
    ]
    scheduler = {"name": name, **options, **{key: said[key] for key in options if key in said}}
    for key in options:
        value = scheduler[key]
        if value is None:
            problems.append(Problem(f"scheduler.{key}", f"is missing; {name} needs it: a number of steps"))
        elif isinstance(value, bool) or not isinstance(value, int | float) or not OPTIONS[key][1](value):
            problems.append(Problem(f"scheduler.{key}", f"is {value!r}; it must be {OPTIONS[key][0]}"))
    return scheduler, problems


def _contradictions(config: SweepConfig) -> Iterator[Problem]:
    """What the sweep's keys say together, and with the base job."""
    if config.mode not in ("min", "max"):
        yield Problem("mode", f"is {config.mode!r}; it must be min or max")
    for key in ("num_samples", "max_concurrent"):
        value = getattr(config, key)
        if value is not None and value < 1:
            yield Problem(key, f"is {value}; it must be 1 or more")
    if not config.space.domains:
        yield Problem("space", "has no keys, so every trial would be the base job; add at least one")
    yield from _metric(config)
    if config.base.wandb_run_id:
        yield Problem("base", "wandb_run_id: each trial is a run of its own; leave it out of the base")
    if config.scheduler["name"] == "pbt":
        yield from _population(config)


def _metric(config: SweepConfig) -> Iterator[Problem]:
    try:
        entry(config.metric)
    except KeyError:
        close = difflib.get_close_matches(config.metric, METRICS, n=3, cutoff=0.5)
        yield Problem("metric", f"no job measures '{config.metric}'; {_meant(close, METRICS)}")
        return
    varied = {"test_datasets", "val_set_size"} & set(config.space.keys)
    if config.metric.startswith("eval/") and not (config.base.test_datasets or config.base.val_set_size or varied):
        text = f"{config.metric} needs rows that are held out; set val_set_size or test_datasets in the base"
        yield Problem("metric", text)


def _population(config: SweepConfig) -> Iterator[Problem]:
    """What population based training needs."""
    changes = config.space.mutations()
    if not changes:
        yield Problem("scheduler", "pbt changes keys that are drawn, and the space has grids only; write choice or a range")
    for key in changes:
        if key not in MAY_CHANGE:
            yield Problem(f"space.{key}", f"pbt cannot change it in the middle of a job; it can change {', '.join(MAY_CHANGE)}")
    if config.trials < 2:
        yield Problem("num_samples", "pbt compares trials that run at the same time; give it 2 or more")
    elif config.max_concurrent is not None and config.max_concurrent < config.trials:
        text = f"pbt compares trials that run at the same time, here all {config.trials}; leave it out, or lower num_samples"
        yield Problem("max_concurrent", text)
    if config.base.save_strategy == "no":
        yield Problem("base", "save_strategy: pbt copies checkpoints, so the base must save some; remove `save_strategy: no`")


def _values(config: SweepConfig) -> Iterator[tuple[str, str]]:
    """Values that no job can have: each is put into the base alone, and read as a job file is."""
    with tempfile.TemporaryDirectory(prefix="eagleray-") as folder:
        file = Path(folder) / "base.yaml"
        file.write_text(job_file.dump(config.base), encoding="utf-8")
        for key, params in config.space.samples():
            if own := next((name for name in params if name in OF_A_SWEEP), None):
                yield key, f"{own} is the sweep's to set: {OF_A_SWEEP[own]}; remove it"
                return
            if problem := _problem(file, params):
                told = ", ".join(f"{name}={json.dumps(value)}" for name, value in params.items())
                of_itself = problem.key in params and len(params) == 1
                yield key, f"with {told}: {'' if of_itself else f'{problem.key}: '}{problem.text}"


def _problem(base: Path, params: Mapping[str, Any]) -> Problem | None:
    """The first thing that is wrong with the job that the parameters make of the base."""
    try:
        reading = job_file.interpret(base, job_file.overrides_of(params))
    except ConfigError as error:
        return Problem(next(iter(params)), str(error))
    found = [*reading.misread, *reading.contradictions] or refusals(reading.config)
    unused = [note for note in (*reading.notes, *([] if found else remarks(reading.config))) if note.key in params]
    return next(iter([*found, *unused]), None)
