"""`eagleray eval`: what a run left against the base model it began with, on prompts that it never trained on.

Both models answer them greedily and sampled, and the job's reward functions judge. A dataset job without a reward has its own
records of its held-out rows.
"""

import time
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from actors import storage
from actors.errors import EaglerayError
from actors.specs import SamplingSpec
from actors.types import RolloutGroup, RolloutHeader
from orchestrator import cluster, waits
from orchestrator.answering import Engines, endings, sampling_plan, tokenizer_of
from orchestrator.conversations import ensure_playable
from orchestrator.display import Display
from orchestrator.figures import Answered, Figures, figures, recorded, table
from orchestrator.metrics import METRICS_FILE, read
from orchestrator.plan import MAX_NUM_SEQS, engines
from orchestrator.questions import Questions, questions_for
from orchestrator.results import Result, Weights, find, loadable, step_of
from orchestrator.rewards import ensure_rewards, reward_models, reward_specs
from orchestrator.schema import JobConfig
from orchestrator.scoring import Scorer
from orchestrator.tally import Tally

Measured = dict[str, list[Answered]]  # greedy, sampled


def evaluate(folder: Path, prompts: Path | None, reward: str | None, samples: int | None, display: Display) -> Path:
    """Compares before with after, shows a table, and returns the file in OUTPUT_DIR/eval with all that was found.

    prompts: a file in place of the held-out prompts. reward: in place of the job's reward functions. samples: a prompt; None =
    num_generations. Raises EaglerayError for anything a person can act on, waits.Interrupted on Ctrl-C or SIGTERM.
    """
    if samples is not None and samples < 1:
        raise EaglerayError(f"--samples is {samples}; it must be 1 or more")
    result = find(folder, display)
    online = result.config.rl == "grpo"
    if not online and prompts is None and reward is None:
        return _from_records(result, display)
    if not online and (prompts is None or reward is None):
        raise EaglerayError(
            f"{result.run} is of a job without rewards, so it is asked with both --prompts FILE, rows with a `prompt` and "
            "columns, and --reward module.fn; without both, its records of held-out rows are compared"
        )
    questions = questions_for(result, prompts, display)
    if reward is not None:
        result = replace(result, config=_rewarded_by(reward, result.config))
    with waits.interruptible(), ExitStack() as stack:
        return _Comparison(result, questions, samples or result.config.trl.num_generations, display).run(stack)


def _rewarded_by(name: str, config: JobConfig) -> JobConfig:
    """The job with another reward, which is looked for in the current folder first."""
    config = replace(config, trl=replace(config.trl, reward_funcs=[name], reward_weights=None))
    config.source = replace(config.source, elsewhere=(str(Path.cwd()), *config.source.folders))
    return config


class _Comparison:
    """Both models' answers to the same questions, by the same engines."""

    def __init__(self, result: Result, questions: Questions, samples: int, display: Display) -> None:
        trl = result.config.trl
        extra = endings(result.config, tokenizer_of(result))
        self.result = result
        self.config = result.config
        self.questions = questions
        self.display = display
        self.samplings = {
            "greedy": SamplingSpec(1, trl.max_completion_length, temperature=0.0, extra=extra),
            "sampled": SamplingSpec(
                samples, trl.max_completion_length, trl.temperature, trl.top_p, trl.top_k, trl.min_p or 0.0, extra
            ),
        }

    def run(self, stack: ExitStack) -> Path:
        models = reward_models(self.config)
        ensure_playable(self.config, self.questions.rows)
        weights = stack.enter_context(loadable(self.result, self.display))
        with self.display.phase("starting Ray"):
            stack.enter_context(cluster.connected())
        plan = sampling_plan(self.config, cluster.nodes(), engines(self.config), models)
        conversational = any(not isinstance(row.prompt, str) for row in self.questions.rows)
        ensure_rewards(self.config, plan, conversational=conversational)
        group = stack.enter_context(cluster.placed(plan))
        self.scorer = Scorer(plan, group, reward_specs(self.config, plan), self.config.ray.reward_timeout_s)
        self.tally = Tally(self.config, models)
        with self.display.phase("loading rewards"):
            for note in self.scorer.wait_ready():
                self.display.warn(note)
        together = len(self.questions.rows) * self.samplings["sampled"].num_generations
        completions = min(together, MAX_NUM_SEQS)
        self.engines = Engines(
            self.result, plan, group, self.display, window=plan.max_model_len, completions=completions
        )
        self.engines.load(Weights(self.config.base_model, None))
        before = self._measured("before")
        self.engines.load(weights)
        after = self._measured("after")
        judge = next(iter(self.tally.judging), None)
        found = {side: {how: figures(a, judge) for how, a in m.items()} for side, m in (("before", before), ("after", after))}
        path = self._write(found, before, after)
        self._show(found, path)
        return path

    def _measured(self, side: str) -> Measured:
        with self.display.phase(f"{len(self.questions.rows)} prompts, {side} training"):
            return {how: self._answers(sampling) for how, sampling in self.samplings.items()}

    def _answers(self, sampling: SamplingSpec) -> list[Answered]:
        rows = self.questions.rows
        asked = self.engines.ask(rows, sampling, self.config.seed)
        timeout_s = self.config.ray.rollout_timeout_s
        headers: list[RolloutHeader] = [waits.fetch(header, "an engine, answering", timeout_s) for header, _ in asked]
        groups: list[RolloutGroup] = [waits.fetch(group, "an engine, answering", timeout_s) for _, group in asked]
        calls = [
            self.scorer.submit(row, group, header.failure)
            for row, (_, group), header in zip(rows, asked, headers, strict=True)
        ]
        scores = self.scorer.collect(calls)
        for told in self.tally.failed(headers, scores, ", which do not count"):
            self.display.warn(told)
        combined = self.tally.combined(scores, headers)
        answers = []
        for group, header, rewards, said in zip(groups, headers, combined, scores, strict=True):
            by_function = {score.function: score.rewards for score in said}
            completions = group.messages or group.texts
            answers.append(Answered(completions, header.written_tokens, header.truncated, tuple(rewards), by_function))
        return answers

    def _write(self, found: dict[str, dict[str, Figures]], before: Measured, after: Measured) -> Path:
        sides = {"before": before, "after": after}
        answers = [
            {
                "prompt": row.prompt,
                "place": row.place,
                **{side: {how: a[i].as_json() for how, a in measured.items()} for side, measured in sides.items()},
            }
            for i, row in enumerate(self.questions.rows)
        ]
        return write(self.result, {
            "prompts": self.questions.source,
            "reward_funcs": self.config.trl.reward_funcs,
            "reward_weights": self.config.trl.reward_weights,
            "sampling": {how: asdict(sampling) for how, sampling in self.samplings.items()},
            "seed": self.config.seed,
            **found,
            "answers": answers,
        })  # fmt: skip

    def _show(self, found: dict[str, dict[str, Figures]], path: Path) -> None:
        sampled = self.samplings["sampled"]
        titles = {
            "greedy": "greedy",
            "sampled": f"{sampled.num_generations} samples a prompt, at temperature {sampled.temperature:g}",
        }
        for how, title in titles.items():
            self.display.header(title, table(found["before"][how], found["after"][how]))
        show_end(self.result, f"{len(self.questions.rows)} prompts of {self.questions.source}", path, self.display)


def show_end(result: Result, what: str, path: Path, display: Display) -> None:
    display.summary(f"{result.name} against {result.config.base_model}", [f"asked    {what}", f"written  {path}"])


def write(result: Result, found: dict[str, Any]) -> Path:
    """Into a new file of OUTPUT_DIR/eval."""
    folder = result.run / "eval"
    folder.mkdir(exist_ok=True)
    now = time.localtime()
    stem = time.strftime("%Y%m%d-%H%M%S", now)
    names = (folder / f"{stem}{suffix}.json" for suffix in ("", *(f"-{n}" for n in range(2, 100))))
    path = next(name for name in names if not name.exists())
    about = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z", now),
        "base_model": result.config.base_model,
        "result": str(result.folder),
        "step": step_of(result),
    }
    storage.write_json(path, {**about, **found})
    return path


def _from_records(result: Result, display: Display) -> Path:
    """Before and after as the job itself measured them, up to the step of a checkpoint."""
    last = step_of(result)
    records = [record for record in read(result.run / METRICS_FILE) if record["kind"] == "eval"]
    records = [record for record in records if last is None or record["step"] <= last]
    if len(records) < 2:
        raise EaglerayError(
            f"{result.run} has no records of held-out rows before and after; hold some out by val_set_size or test_datasets, "
            "or ask it with --prompts FILE --reward module.fn"
        )
    before, after = recorded(records[0]), recorded(records[-1])
    path = write(result, {"prompts": "held-out rows, as recorded by the job", "before": before, "after": after})
    display.header(f"held-out rows, step {records[0]['step']} against step {records[-1]['step']}", table(before, after))
    show_end(result, f"nothing: these are the job's own records, in {result.run / METRICS_FILE}", path, display)
    return path
