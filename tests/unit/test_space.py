"""What a sweep varies: how a space is written, which values are tried before it starts, and what trials get of it."""

from typing import Any

import pytest
from ray import tune

from orchestrator.space import expanded, read_space

WRITTEN: dict[str, Any] = {
    "learning_rate": {"loguniform": [1e-6, 1e-4]},
    "lora_r": {"choice": [8, 16]},
    "warmup_steps": {"randint": [0, 10]},
    "trl.beta": [0, 0.04, 0.1],
    "_batches": [{"micro_batch_size": 1, "sequence_len": 64}, {"micro_batch_size": 2, "sequence_len": 32}],
}


def test_a_file_and_python_say_the_same() -> None:
    from_file, problems = read_space(WRITTEN)
    from_python, _ = read_space(
        {
            "learning_rate": tune.loguniform(1e-6, 1e-4),
            "lora_r": tune.choice([8, 16]),
            "warmup_steps": tune.randint(0, 10),
            "trl.beta": tune.grid_search([0, 0.04, 0.1]),
            "_batches": WRITTEN["_batches"],
        }
    )
    assert problems == []
    assert from_file.texts() == from_python.texts()
    assert from_file.texts()["learning_rate"] == "loguniform [1e-06, 0.0001]"
    assert len(set(from_file.texts().values())) == 5
    assert from_file.keys == ("learning_rate", "lora_r", "warmup_steps", "trl.beta", "micro_batch_size", "sequence_len")


def test_each_value_and_the_ends_of_each_range_are_tried() -> None:
    space, _ = read_space(WRITTEN)
    tried = [(key, tuple(params.values())) for key, params in space.samples()]
    assert tried == [
        ("learning_rate", (1e-6,)),
        ("learning_rate", (1e-4,)),
        ("lora_r", (8,)),
        ("lora_r", (16,)),
        ("warmup_steps", (0,)),
        ("warmup_steps", (9,)),  # 10 is never drawn
        ("trl.beta", (0,)),
        ("trl.beta", (0.04,)),
        ("trl.beta", (0.1,)),
        ("_batches", (1, 64)),
        ("_batches", (2, 32)),
    ]


def test_grids_are_multiplied_and_draws_are_not() -> None:
    space, _ = read_space(WRITTEN)
    assert space.trials(2) == 2 * 3 * 2
    assert read_space({"learning_rate": {"uniform": [0.1, 0.2]}})[0].trials(5) == 5


def test_keys_that_go_together_become_keys_of_the_job() -> None:
    assert expanded({"lora_r": 8, "_": {"micro_batch_size": 2, "sequence_len": 32}}) == {
        "lora_r": 8,
        "micro_batch_size": 2,
        "sequence_len": 32,
    }


def test_what_a_population_changes_stays_in_its_range() -> None:
    space, _ = read_space(WRITTEN)
    assert space.mutations().keys() == {"learning_rate", "lora_r", "warmup_steps"}
    assert space.mutations()["lora_r"] == [8, 16]
    changed = space.clipped({"learning_rate": 1.2e-4, "lora_r": 16, "warmup_steps": 12, "trl.beta": 0.04})
    assert changed == {"learning_rate": 1e-4, "lora_r": 16, "warmup_steps": 9, "trl.beta": 0.04}


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (3, "takes no 3; write a list of values, or one of {grid: [...]}"),
        ({"lognormal": [0, 1]}, "write a list of values, or one of"),
        ({"uniform": [2, 1]}, "the lower one first"),
        ({"uniform": [1]}, "uniform takes two numbers, [lowest, highest], not [1]"),
        ({"randint": [0.5, 2]}, "randint takes two whole numbers"),
        ({"loguniform": [0, 1]}, "two positive numbers"),
        ({"choice": 8}, "choice takes a list, not 8"),
        ([], "has no values"),
        ([{1, 2}], "no YAML file can hold"),
        (tune.randn(), "has no ends"),
        (tune.sample_from(lambda _: 1), "is a function"),
    ],
)
def test_what_is_no_domain(value: Any, said: str) -> None:
    _, problems = read_space({"learning_rate": value})
    ((key, text),) = problems
    assert key == "learning_rate" and said in text


def test_keys_that_go_together_are_mappings() -> None:
    _, problems = read_space({"_": [1, 2]})
    assert problems == [("_", "takes a list of mappings: keys of the job that go together")]


@pytest.mark.parametrize(
    "written",
    [
        {"learning_rate": [0.1], "_": [{"lora_r": 8}, {"learning_rate": 0.2}]},
        {"learning_rate": {"uniform": [0.1, 0.2]}, "_": [{"learning_rate": 0.2, "lora_r": 8}]},
    ],
)
def test_a_key_that_is_varied_twice_is_told_of(written: dict[str, Any]) -> None:
    """One of both would have no effect, and trials would be repeated."""
    assert read_space(written)[1] == [("_", "varies learning_rate, and so does learning_rate; leave it out of one of them")]


def test_two_groups_of_keys_have_none_in_common() -> None:
    again = {f"_{name}": [{"lora_r": 8, "lora_alpha": 16}, {"lora_r": 16, "lora_alpha": 16}] for name in ("one", "two")}
    assert read_space(again)[1] == [("_two", "varies lora_r, and so does _one; leave it out of one of them")]


def test_the_ends_of_whole_numbers_are_those_that_are_drawn() -> None:
    """The upper end of randint is never drawn, that of qrandint is."""
    space, _ = read_space({"lora_r": tune.randint(4, 9), "max_steps": tune.qrandint(0, 10, 5)})
    assert [params for _, params in space.samples()] == [{"lora_r": 4}, {"lora_r": 8}, {"max_steps": 0}, {"max_steps": 10}]
    assert {tune.qrandint(0, 10, 5).sample() for _ in range(200)} == {0, 5, 10}
