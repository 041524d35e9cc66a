"""A job as a run of Weights & Biases: its records under the names of metrics.jsonl, its configuration, its result.

wandb keeps everything in output_dir/wandb first and uploads from there, in a process of its own. Whatever fails on the way
costs one warning and the rest of the upload, never the job. wandb itself finds the credentials; Eagleray neither reads nor
writes them.
"""

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from actors import storage
from actors.errors import ConfigError
from orchestrator.config import dump
from orchestrator.display import Display
from orchestrator.schema import JobConfig

RUN_FILE = "wandb.json"  # in output_dir: the run that a resumed job goes on in
INIT_TIMEOUT_S = 30.0
UPLOAD_TIMEOUT_S = 600.0  # of wandb_log_model: end
FINISH_TIMEOUT_S = 20.0  # of the last records; Ctrl-C waits no longer for a server that does not answer
# what save_pretrained of adapters, models and tokenizers writes
RESULT_FILES = (
    "adapter_*", "model*.safetensors*", "config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json",
    "vocab*", "merges.txt", "chat_template*",
)  # fmt: skip


def wanted(config: JobConfig) -> bool:
    """Whether the job is to be a run of W&B, as Axolotl reads the keys: a project alone switches it on."""
    return bool(config.use_wandb or config.wandb_project) and _mode(config) != "disabled"


def ensure_login(config: JobConfig) -> None:
    """Raises ConfigError when records are to be uploaded and wandb has no credentials. Asks no server."""
    if not wanted(config) or _mode(config) != "online":
        return
    import wandb

    wandb.setup(wandb.Settings(silent=True, mode="online"))
    remedy = "run `wandb login`, or set wandb_mode: offline"
    try:
        known = wandb.login(prompt=False, verify=False)
    except wandb.errors.Error as error:
        raise ConfigError(f"wandb_mode: online, and Weights & Biases refuses the credentials ({error}); {remedy}") from error
    if not known:
        raise ConfigError(f"wandb_mode: online, and there are no credentials for Weights & Biases; {remedy}")


def _mode(config: JobConfig) -> str:
    """online | offline | disabled: the key, else WANDB_MODE or wandb's settings file."""
    if config.wandb_mode:
        return config.wandb_mode
    import wandb

    mode: str = wandb.setup(wandb.Settings(silent=True)).settings.mode
    return {"run": "online", "shared": "online", "dryrun": "offline"}.get(mode, mode)


class WandbRun:
    """The run of one job, from the first record to the last; `resumed` goes on in the run that output_dir names.

    Of steps that are trained again after a resume W&B keeps the first records.
    """

    def __init__(self, config: JobConfig, name: str, resumed: bool, display: Display) -> None:
        self._display = display
        self._output_dir = Path(config.output_dir)
        self._uploads_result = config.wandb_log_model == "end"
        self._run: Any = None
        self._failed = False  # the first failure is told of, and ends what can be given up
        self._guarded(lambda: self._start(config, name, resumed))

    def _start(self, config: JobConfig, name: str, resumed: bool) -> None:
        import wandb

        file = self._output_dir / RUN_FILE
        known = json.loads(file.read_text(encoding="utf-8"))["run_id"] if resumed and file.is_file() else None
        run_id = config.wandb_run_id or known
        mode = _mode(config)
        wandb.setup(wandb.Settings(silent=True))  # before anything of wandb's prints
        self._run = wandb.init(
            project=config.wandb_project,
            entity=config.wandb_entity,
            name=config.wandb_name or config.wandb_run_id or name,
            id=run_id,
            resume="allow" if run_id else None,
            config=yaml.safe_load(dump(config)),
            mode=mode,  # type: ignore[arg-type]
            dir=str(self._output_dir),
            settings=wandb.Settings(
                silent=True,
                console="off",  # stdout is the display's
                allow_val_change=True,  # a resumed job may have another max_steps, or output_dir
                init_timeout=INIT_TIMEOUT_S,
                finish_timeout=FINISH_TIMEOUT_S,
            ),
        )
        storage.write_json(file, {"run_id": self._run.id})
        folder = Path(self._run.dir).parent
        where = self._run.url if mode == "online" else f"offline; `wandb sync {folder}` uploads the run"
        self._display.note(f"Weights & Biases: {where}")

    def write(self, record: Mapping[str, float], step: int) -> None:
        """Log values under their names; they are on their way when this returns."""
        if not self._failed:
            self._guarded(lambda: self._run.log(dict(record), step=step))

    def upload_result(self) -> None:
        """The adapter or model as an artifact of type `model`, if wandb_log_model says so."""
        if self._uploads_result and not self._failed:
            self._guarded(self._upload)

    def _upload(self) -> None:
        import wandb

        artifact = wandb.Artifact(f"model-{self._run.id}", type="model")
        for file in sorted({file for pattern in RESULT_FILES for file in self._output_dir.glob(pattern)}):
            artifact.add_file(str(file), policy="immutable")  # uploaded from where it lies
        logged = self._run.log_artifact(artifact)
        if not self._run.offline:
            with self._display.phase("uploading the result to Weights & Biases"):
                logged.wait(timeout=UPLOAD_TIMEOUT_S)

    def close(self, failed: bool) -> None:
        """Uploads what is left, for a limited time, and ends wandb's process; calling it twice does no harm."""
        import wandb

        run, self._run = self._run, None
        if run is not None:
            self._guarded(lambda: run.finish(exit_code=int(failed)))
        with suppress(Exception):  # it may have died, of which its own hook at exit would print a stack
            wandb.teardown(int(failed))

    def _guarded(self, act: Callable[[], object]) -> None:
        """The fault boundary of W&B: no failure of its leaves this module."""
        try:
            act()
        except Exception as error:
            if not self._failed:
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                self._display.warn(f"Weights & Biases: {reason}; the job goes on without it, and metrics.jsonl has it all")
            self._failed = True
