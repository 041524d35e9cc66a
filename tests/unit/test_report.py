"""The report: a picture of the right size with the run's numbers, or an error that says what is missing."""

import json
import math
from pathlib import Path

import pytest
from matplotlib import image
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from actors.errors import EaglerayError
from orchestrator.report import DATASET_PANELS, PANELS, Curves, report, running_mean

STEP = {
    "reward": 0.5,
    "reward/exact": 0.25,
    "reward/form": 1.0,
    "accuracy": 0.25,
    "completion_length": 12.0,
    "truncated": 0.1,
    "kl": 0.001,
    "clip_fraction": 0.01,
    "loss": -0.02,
    "grad_norm": 0.6,
    "engine_gap": 0.01,
    "probe_gap": 0.002,
    "sample_s": 9.0,
    "score_s": 0.5,
    "train_s": 7.0,
    "sync_s": 0.25,
    "step_s": 17.0,
    "tokens_per_s": 100.0,
}


def train(step: int, **values: float | None) -> dict:
    return {"time": 1.0, "kind": "train", "step": step, **values}


def write(folder: Path, records: list[dict]) -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def panel(title: str, records: list[dict]) -> Axes:
    axes = Figure().subplots()
    PANELS[title](axes, Curves(records))
    return axes


def curves(axes: Axes) -> dict[str, tuple[list[float], list[float]]]:
    return {str(line.get_label()): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.get_lines()}


def sized(path: Path) -> tuple[int, int]:
    picture = image.imread(path)
    assert len({tuple(pixel) for pixel in picture[::20, ::20].reshape(-1, 4)}) > 3, "the picture is blank"
    return picture.shape[1], picture.shape[0]


@pytest.mark.parametrize("steps", [1, 12, 100])
def test_a_picture_of_1600_pixels(tmp_path, steps):
    evaluation = {"time": 1.0, "kind": "eval", "step": 0, "eval/accuracy": 0.1}
    write(tmp_path, [evaluation] + [train(step, **STEP) for step in range(1, steps + 1)])
    path = report(tmp_path)
    assert path == tmp_path / "report.png"
    width, height = sized(path)
    assert width == 1600 and 1200 <= height <= 2400


def test_another_path_and_its_folder(tmp_path):
    write(tmp_path, [train(1, **STEP)])
    path = report(tmp_path, tmp_path / "pictures" / "run.png")
    assert path == tmp_path / "pictures" / "run.png"
    assert sized(path)[0] == 1600
    assert not (tmp_path / "report.png").exists()


def texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The title and the loose texts of the report's figure."""
    seen: list[str] = []

    def look(figure: Figure, *args: object, **kwargs: object) -> None:
        seen.append(figure.get_suptitle())
        seen.extend(f"{axes.get_title(loc='left')}: {text.get_text()}" for axes in figure.axes for text in axes.texts)

    monkeypatch.setattr(Figure, "savefig", look)
    report(tmp_path)
    return seen


def test_the_title_names_the_run_and_its_model(tmp_path, monkeypatch):
    folder = tmp_path / "sums"
    folder.mkdir()
    write(folder, [train(1, **STEP)])
    assert texts(folder, monkeypatch) == ["sums"]
    (folder / "config.yaml").write_text("base_model: org/model-1b\nrl: grpo\n")
    assert texts(folder, monkeypatch) == ["sums: org/model-1b"]


def test_panels_without_data_say_so(tmp_path, monkeypatch):
    logged = {name: STEP[name] for name in ("reward", "accuracy", "clip_fraction", "sample_s")}
    write(tmp_path, [train(step, **logged, loss=None) for step in (1, 2)])
    assert texts(tmp_path, monkeypatch)[1:] == [
        "Completion length: no data",
        "Loss and gradient: no data",  # its only values are not finite
        "Trainer against engine: no data",
        "Speed: no data",
    ]


def test_a_dataset_job_has_panels_of_its_own(tmp_path, monkeypatch):
    steps = [train(step, loss=0.7 - 0.1 * step, grad_norm=1.0, learning_rate=1e-4, pair_accuracy=0.5) for step in (1, 2)]
    held_out = {"kind": "eval", "step": 2, "eval/loss": 0.4, "eval/pair_accuracy": 0.75}
    write(tmp_path, [*steps, held_out])
    assert texts(tmp_path, monkeypatch)[1:] == ["Rewards: no data"]
    axes = Figure().subplots()
    DATASET_PANELS["Accuracy"](axes, Curves([*steps, held_out]))
    assert curves(axes) == {"pairs right": ([1, 2], [0.5, 0.5]), "pairs right, held out": ([2], [0.75])}


def test_the_reward_panel_has_each_function_and_the_held_out_prompts():
    evaluations = [{"kind": "eval", "step": step, "eval/reward": reward} for step, reward in ((0, 0.25), (2, 1.5))]
    axes = panel("Reward", [evaluations[0], train(1, **STEP), train(2, **{**STEP, "reward": 0.75}), evaluations[1]])
    assert curves(axes) == {
        "exact": ([1, 2], [0.25, 0.25]),
        "form": ([1, 2], [1.0, 1.0]),
        "weighted sum": ([1, 2], [0.5, 0.75]),
        "held-out prompts": ([0, 2], [0.25, 1.5]),
    }


def test_the_accuracy_panel_has_training_and_held_out_prompts():
    evaluations = [{"kind": "eval", "step": step, "eval/accuracy": share} for step, share in ((0, 0.125), (2, 0.5))]
    axes = panel("Accuracy", [evaluations[0], train(1, accuracy=0.25), train(2, accuracy=0.375), evaluations[1]])
    assert curves(axes) == {
        "training prompts": ([1, 2], [0.25, 0.375]),
        "held-out prompts": ([0, 2], [0.125, 0.5]),
    }
    assert [text.get_text() for text in axes.texts] == ["12.5 %", "50.0 %"]


def test_the_seconds_are_stacked():
    axes = panel("Where the time goes", [train(1, **STEP)])
    bars = [(bar.get_y(), bar.get_height()) for bar in axes.patches]
    assert bars == [(0.0, 9.0), (9.0, 0.5), (9.5, 7.0), (16.5, 0.25)]  # sample, score, train, sync
    assert curves(axes)["whole step"] == ([1], [17.0])


def test_the_gaps_are_on_a_log_axis_only_when_they_span_orders():
    near = [train(step, engine_gap=0.01, probe_gap=0.002) for step in (1, 2)]
    assert panel("Trainer against engine", near).get_yscale() == "linear"
    assert panel("Trainer against engine", [*near, train(3, engine_gap=0.9)]).get_yscale() == "log"
    assert panel("Trainer against engine", [*near, train(3, engine_gap=0.9, probe_gap=0.0)]).get_yscale() == "linear"


def test_the_running_mean_leaves_out_what_is_not_finite():
    # Five values reach one neighbour to either side.
    assert running_mean([1.0, 3.0, 5.0, math.nan, 8.0]) == [2.0, 3.0, 4.0, 6.5, 8.0]
    assert math.isnan(running_mean([math.nan, math.nan, math.nan, 1.0])[0])


def test_a_folder_without_metrics_is_an_error_that_names_the_file(tmp_path):
    with pytest.raises(EaglerayError, match="metrics.jsonl does not exist"):
        report(tmp_path)


def test_metrics_without_a_training_step_are_an_error(tmp_path):
    write(tmp_path, [{"time": 1.0, "kind": "eval", "step": 0, "eval/accuracy": 0.1}])
    with pytest.raises(EaglerayError, match="holds no training step yet"):
        report(tmp_path)
    assert not (tmp_path / "report.png").exists()
