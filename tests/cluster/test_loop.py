"""The loop on real Ray with a real trainer of a tiny model and engines that sample at random."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray

from actors.errors import ActorError, RewardError, SyncError
from actors.ranks import meeting_place
from actors.specs import RankSpec, RewardSpec, TrainerSpec
from actors.trainer import Trainer
from orchestrator.cluster import Actors
from orchestrator.data import PromptSet, Row
from orchestrator.grpo import Loop
from orchestrator.plan import Node, make_plan
from orchestrator.policies import Policies
from orchestrator.samples import Samples
from orchestrator.schema import JobConfig
from orchestrator.scoring import Scorer
from tests.cluster.fakes import FakeEngine, ReusedTrainer
from tests.tiny import save_llama, trainer_spec

STEPS = 6


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_llama(tmp_path_factory.mktemp("llama"))


class Reused:
    """Actors of one class, to be taken by a test after the other."""

    def __init__(self, cls: type) -> None:
        self.cls = cls
        self.actors: list[Any] = []
        self.taken = 0

    def take(self, *args: Any, **kwargs: Any) -> Any:
        """One that nobody has taken in this test, as if made anew."""
        self.taken += 1
        if self.taken > len(self.actors):
            self.actors.append(ray.remote(self.cls).options(num_cpus=0).remote(*args, **kwargs))
        else:
            self.actors[self.taken - 1].again.remote(*args, **kwargs)  # before all that is asked of it later
        return self.actors[self.taken - 1]


TRAINERS, ENGINES = Reused(ReusedTrainer), Reused(FakeEngine)


@pytest.fixture(autouse=True)
def nothing_taken() -> None:
    TRAINERS.taken = ENGINES.taken = 0


def loop(
    folder: str,
    *,
    staleness: int = 0,
    interval: int = 1,
    lies: tuple[str, ...] = ("",),
    engines: tuple[Any, ...] = (),
    late: int = 0,
    ranks: int = 1,
    spec: TrainerSpec | None = None,
) -> Loop:
    """engines: actors, instead of those that lie as they are told."""
    config = JobConfig(rl="grpo", base_model=folder, learning_rate=1e-2, bf16=False, max_steps=STEPS)
    config.micro_batch_size = 8 // ranks
    config.ray_num_workers = ranks
    config.trl.num_generations = 4
    config.trl.vllm_sync_interval = interval
    config.trl.reward_funcs = ["tests.cluster.fakes.parity"]
    config.ray.max_staleness = staleness
    config.ray.late_steps = late
    engines = engines or tuple(ENGINES.take(lie) for lie in lies)
    config.ray.engines = len(engines)
    rows = tuple(Row(f"w{i} w{i + 1}", {}, "") for i in range(3, 13))
    plan = make_plan(config, [Node("a", {"CPU": 8.0})], len(rows))
    address = meeting_place()
    rank_specs = [(spec or trainer_spec(folder), RankSpec(rank, ranks, address)) for rank in range(ranks)]
    alone = ranks == 1  # ranks that met cannot meet anew
    trainers = tuple(
        TRAINERS.take(*args) if alone else ray.remote(Trainer).options(num_cpus=0).remote(*args) for args in rank_specs
    )
    ray.get([trainer.set_probe.remote([5, 9, 12, 30, 7]) for trainer in trainers])
    actors = Actors(trainers, engines)
    scorer = Scorer(plan, None, [RewardSpec("tests.cluster.fakes.parity", ())], 30.0)
    scorer.wait_ready()
    made = Loop(config, plan, PromptSet(rows, rows[:2], ()), actors, Policies(actors, "float32", 60.0), scorer, print)
    made.start()
    return made


@pytest.mark.parametrize(("staleness", "interval"), [(0, 1), (2, 1), (1, 2)])
def test_no_rollout_is_staler_than_allowed(cluster: None, llama: str, staleness: int, interval: int) -> None:
    made = loop(llama, staleness=staleness, interval=interval)
    records = [made.advance() for _ in range(STEPS)]
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    limit = staleness + interval - 1
    assert max(record["staleness"] for record in records) <= limit
    assert records[-1]["staleness"] > 0 or limit == 0  # the bound is used, not only kept
    assert [record["policy_version"] for record in records] == list(range(1, STEPS + 1))


def test_versions_by_hand(cluster: None, llama: str) -> None:
    made = loop(llama, staleness=1)
    assert [made.version_for(n) for n in range(5)] == [0, 0, 1, 2, 3]
    for _ in range(3):
        made.advance()
    # Batches 0 to 3 are sent before step 3 ends: 0 and 1 with version 0, 2 with 1, 3 with 2.
    assert ray.get(made.actors.engines[0].versions.remote()) == [0, 1, 2]
    assert sorted(made.policies.published) == [2, 3]  # nothing older will be asked for


def test_prompts_are_dealt_to_all_engines(cluster: None, llama: str) -> None:
    engines = tuple(ENGINES.take(takes_s=1.0) for _ in range(2))  # so that neither is done before the other has begun
    ray.get([engine.versions.remote() for engine in engines])
    made = loop(llama, engines=engines)
    record = made.advance()
    assert record["groups"] == 2
    assert [ray.get(engine.versions.remote()) for engine in made.actors.engines] == [[0], [0]]
    assert [len(ray.get(engine.done.remote())) for engine in made.actors.engines] == [1, 1]
    result = made.evaluate()
    assert result.total == 2
    assert [ray.get(engine.versions.remote()) for engine in made.actors.engines] == [[0, 1], [0, 1]]
    assert [len(ray.get(engine.done.remote())) for engine in made.actors.engines] == [2, 2]


def test_an_engine_gets_prompts_by_its_pace(cluster: None, llama: str) -> None:
    fast, slow = (ENGINES.take(takes_s=takes_s) for takes_s in (0.01, 0.1))
    made = loop(llama, engines=(fast, slow))
    made.plan = replace(made.plan, prompts_per_step=10)
    for _ in range(4):
        made.advance()
    counts = [len(ray.get(engine.done.remote())) for engine in (fast, slow)]
    assert sum(counts) == 40
    assert counts[1] <= 5 + 3 * 3, "half of the first batch, whose paces are unknown, and then about a tenth"


def test_what_waits_goes_to_who_is_done_first(cluster: None, llama: str) -> None:
    """Also within the first batch: the engine that is held by one long completion gets nothing more."""
    held = ENGINES.take(takes_s=2.0)
    free = ENGINES.take()
    made = loop(llama, engines=(held, free))
    made.plan = replace(made.plan, prompts_per_step=10)
    made.rollouts.most = 1
    made.advance()
    assert [len(ray.get(engine.done.remote())) for engine in (held, free)] == [1, 9]


def test_a_group_that_its_function_fails_on_is_dropped_and_told(cluster: None, llama: str, tmp_path: Path) -> None:
    prompts = [group.row.prompt for group in loop(llama)._batch(0)]
    made = loop(llama, engines=(ENGINES.take(fails=prompts[:1]),))
    made.config.trl.rollout_func = "game.play"
    made.samples = Samples(tmp_path, print)
    told: list[str] = []
    made.warn = told.append
    record = made.advance()
    made.samples.finish()
    reason = "trl.rollout_func game.play failed on 1 prompts of step 1: TimeoutError: it took too long"
    assert told == [f"{reason}; their completions were dropped"], "and no reward was asked"
    assert (record["groups"], record["samples_dropped"], record["step"]) == (2, 4, 1)
    lines = [json.loads(line) for line in (tmp_path / "rollouts" / "step-000001.jsonl").read_text().splitlines()]
    assert [line["reward"] is None for line in lines] == [line["prompt"] == prompts[0] for line in lines]
    assert made.advance()["samples_dropped"] == 0


def test_a_step_whose_groups_all_fail_ends_the_job(cluster: None, llama: str) -> None:
    prompts = [group.row.prompt for group in loop(llama)._batch(0)]
    made = loop(llama, engines=(ENGINES.take(fails=prompts),))
    made.config.trl.rollout_func = "game.play"
    with pytest.raises(RewardError, match=r"game\.play failed on 2 prompts of step 1: TimeoutError: .* nothing to learn from$"):
        made.advance()


def test_a_long_completion_does_not_hold_its_batch(cluster: None, llama: str, tmp_path: Path) -> None:
    """Others are trained in its place, it comes later with its version, and nothing is trained twice or staler than allowed."""
    made = loop(llama, staleness=2, late=1, lies=("", ""))
    long = made._batch(1)[0].row.prompt
    until = tmp_path / "ends"
    engines = tuple(ENGINES.take(held=long, until=str(until)) for _ in range(2))
    made = loop(llama, staleness=2, late=1, engines=engines)
    made.samples = Samples(tmp_path, print)
    records, states = [], []
    for step in range(STEPS):
        if step == 2:
            until.touch()
        records.append(made.advance())
        states.append(made.state())
    made.samples.finish()
    taken = []
    for step in range(1, STEPS + 1):
        lines = [json.loads(line) for line in (tmp_path / "rollouts" / f"step-{step:06d}.jsonl").read_text().splitlines()]
        taken.append([(line["prompt"], line["policy_version"]) for line in lines[::4]])
    expected = [(group.row.prompt, group.policy_version) for number in range(STEPS) for group in made._batch(number)]
    assert sorted(pair for step in taken for pair in step) == sorted(expected)
    assert (long, 0) in taken[2], "it was not late, so nothing is shown"
    assert max(record["staleness"] for record in records) == 2
    assert states[1][0] == [1, 0], "a resumed job asks for it again"
    made.resume(2, states[1])
    assert [(group.number, group.place) for group in made.in_flight] == [tuple(pair) for pair in states[1]]
    assert made.in_flight[0].row.prompt == long and made.in_flight[0].policy_version == 0


@pytest.mark.parametrize(("lies", "staleness"), [(("before",), 0), (("before",), 1), (("", "nothing"), 0)])
def test_a_sync_that_lies_stops_the_job(cluster: None, llama: str, lies: tuple[str, ...], staleness: int) -> None:
    made = loop(llama, lies=lies, staleness=staleness)
    with pytest.raises(SyncError) as error:
        for _ in range(STEPS):
            made.advance()
    assert f"engine {len(lies) - 1}, installing policy version" in str(error.value)


def test_completions_of_another_version_stop_the_job(cluster: None, llama: str) -> None:
    with pytest.raises(SyncError, match="engine 0 sampled batch 0 with policy version -1, not with 0"):
        loop(llama, lies=("version",)).advance()


def test_evaluation_asks_the_newest_policy_and_training_goes_on_with_its_own(cluster: None, llama: str) -> None:
    made = loop(llama, interval=2)
    made.advance()
    assert made.evaluate().record["step"] == 1
    assert ray.get(made.actors.engines[0].versions.remote()) == [0, 1]
    made.advance()  # the second step of the interval is sampled with version 0, as without the evaluation
    assert ray.get(made.actors.engines[0].versions.remote()) == [0, 1, 0]


def test_groups_without_signal_are_replaced(cluster: None, llama: str, tmp_path: Path) -> None:
    """By other prompts' groups, which the trainer gets and the replaced ones' not; the same ones when it is done again."""

    def learn(folder: Path, steps: int) -> list[dict[str, float]]:
        made = loop(llama, lies=("", ""), staleness=1)
        made.config.ray.max_resamples = 20
        made.samples = Samples(folder, print)
        records = [made.advance() for _ in range(steps)]
        made.samples.finish()
        return records

    records = learn(tmp_path / "a", 4)
    assert all(record["groups"] - record["groups_without_signal"] == 2 for record in records)
    assert max(record["groups"] for record in records) > 2, "no group had to be replaced"
    for record in records:
        path = tmp_path / "a" / "rollouts" / f"step-{int(record['step']):06d}.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        assert len(lines) == 4 * record["groups"]
        replaced = [line["advantage"] is None for line in lines]
        assert sum(replaced) == 4 * record["groups_without_signal"] and all(line["advantage"] != 0.0 for line in lines)
    again = learn(tmp_path / "b", 2)
    assert [record["loss"] for record in again] == pytest.approx([record["loss"] for record in records[:2]], abs=1e-6)


def test_replacing_ends_where_nothing_has_a_signal(cluster: None, llama: str) -> None:
    made = loop(llama)
    made.config.ray.max_resamples = 3
    made.tally.weights = dict.fromkeys(made.tally.weights, 0.0)
    record = made.advance()
    assert (record["groups"], record["groups_without_signal"], record["grad_norm"]) == (8, 8, 0.0)


def test_a_reward_that_fails_on_a_replacement_costs_that_group(
    cluster: None, llama: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And never the step, whose other groups are good."""
    made = loop(llama, staleness=1)
    made.config.ray.max_resamples = 20
    combined = made.tally.combined
    calls = iter(range(100))

    def none_for_replacements(scores: Any, headers: Any) -> Any:
        rewards = combined(scores, headers)
        if next(calls) == 1:
            return [[None] * len(row) for row in rewards]
        return rewards if len(rewards) < 2 else [rewards[0], [0.0] * len(rewards[1])]  # the second one has no signal

    monkeypatch.setattr(made.tally, "combined", none_for_replacements)
    record = made.advance()
    assert record["samples_dropped"] >= 4 and record["grad_norm"] > 0.0


@pytest.mark.slow
def test_all_weights_go_to_the_engines_in_buckets(cluster: None, llama: str, tmp_path: Path) -> None:
    """By two ranks, one of which has them; each bucket written over the last one. A checkpoint brings older policies back."""
    spec = replace(trainer_spec(llama), lora=None, bucket_bytes=4096)
    made = loop(llama, ranks=2, staleness=1, lies=("", ""), spec=spec)
    records = [made.advance() for _ in range(3)]
    assert made.policies.buckets > 5
    assert [record["policy_version"] for record in records] == [1, 2, 3]
    older = [part for v in made.versions_needed() if v != 3 for part in made.policies.published[v]]
    ray.get([t.save.remote(str(tmp_path / "c"), *older) for t in made.actors.trainers])
    state = made.state()
    expected = [made.advance()["loss"] for _ in range(2)]

    resumed = loop(llama, ranks=2, staleness=1, lies=("", ""), spec=spec)
    resumed.policies.published.clear()
    for header, *buckets in ray.get([t.restore.remote(str(tmp_path / "c")) for t in resumed.actors.trainers])[0]:
        resumed.policies.add(header, *map(ray.put, buckets))
    resumed.resume(3, state)
    resumed.start()
    assert [resumed.advance()["loss"] for _ in range(2)] == pytest.approx(expected, abs=1e-6)


def test_two_ranks_learn_as_one_does_and_the_death_of_one_ends_the_job(cluster: None, llama: str) -> None:
    keys = ("reward", "loss", "grad_norm", "completion_tokens", "engine_gap")
    one, two = loop(llama), loop(llama, ranks=2)
    for _ in range(2):
        alone, shared = one.advance(), two.advance()
        assert [shared[key] for key in keys] == pytest.approx([alone[key] for key in keys], rel=1e-4, abs=1e-5)
    ray.kill(two.actors.trainers[1])
    with pytest.raises(ActorError, match="trainer 1, .* died"):
        two.advance()


def test_what_was_sampled_is_written_down(cluster: None, llama: str, tmp_path: Path) -> None:
    warnings: list[str] = []
    made = loop(llama, lies=("", ""))
    made.samples = Samples(tmp_path, warnings.append)
    record = made.advance()
    made.evaluate()
    made.samples.finish()
    lines = [json.loads(line) for line in (tmp_path / "rollouts" / "step-000001.jsonl").read_text().splitlines()]
    assert len(lines) == 8
    for line in lines:
        assert line["completion"].startswith(line["prompt"] + " "), "each stands with its own prompt"
        assert line["rewards"] == {"tests.cluster.fakes.parity": line["reward"]}
        assert line["reward"] == float(int(line["completion"].split()[-1]) % 2 == 0)
    assert sum(line["reward"] for line in lines) / 8 == pytest.approx(record["reward"])
    assert sum(line["advantage"] for line in lines) == pytest.approx(0.0, abs=1e-6)
    assert sum(line["tokens"] for line in lines) == record["completion_tokens"]
    held_out = [json.loads(line) for line in (tmp_path / "rollouts" / "held-out-000001.jsonl").read_text().splitlines()]
    assert [line["policy_version"] for line in held_out] == [1, 1]

    made.samples.folder = tmp_path / "file"
    (tmp_path / "file").write_text("no folder")
    made.advance()
    made.samples.finish()
    assert len(warnings) == 1 and "the writer of" in warnings[0] and "file" in warnings[0]


def run_to(made: Loop, step: int) -> list[dict[str, Any]]:
    return [made.advance() for _ in range(step - made.step)]


def test_a_resumed_loop_repeats_the_uninterrupted_one(cluster: None, llama: str, tmp_path: Path) -> None:
    """Also where the one that stopped was to have fewer steps, and had asked for no more batches."""
    staleness = 2  # with batches in flight, sampled by two older policies
    straight = run_to(loop(llama, staleness=staleness), STEPS)
    for total in (STEPS, 3):
        stopped = loop(llama, staleness=staleness)
        stopped.plan = replace(stopped.plan, total_steps=total)
        run_to(stopped, 3)
        folder = tmp_path / str(total)
        older = [part for v in stopped.versions_needed() if v != 3 for part in stopped.policies.published[v]]
        ray.get(stopped.actors.trainers[0].save.remote(str(folder), *older))
        state = stopped.state()
        assert len(state) == (4 if total == STEPS else 0)

        resumed = loop(llama, staleness=staleness)
        resumed.policies.published.clear()
        for header, buffer in ray.get(resumed.actors.trainers[0].restore.remote(str(folder))):
            resumed.policies.add(header, ray.put(buffer))
        resumed.resume(3, state)
        resumed.start()
        keys = ("step", "loss", "reward", "grad_norm", "staleness", "completion_tokens")
        repeated = [{key: record[key] for key in keys} for record in run_to(resumed, STEPS)]
        assert repeated == [{key: record[key] for key in keys} for record in straight[3:]]
