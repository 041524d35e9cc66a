"""What `eagleray advise` says beside the job file that it writes."""

import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from actors.errors import ConfigError
from orchestrator.advise import WHY_ELSE, Advice, advise, name_of
from orchestrator.advised_job import percentile
from orchestrator.description import described_adapter
from orchestrator.machines import machines
from orchestrator.plan import trainer_dtype
from orchestrator.schema import JobConfig
from orchestrator.sizing import described

PRINTED = "job.yaml"  # what a file that is printed may be called


def run(data: str, model: str | None, reward: str | None, where: str, file: Path | None) -> None:
    """Advises, and writes the job file, or prints it to stdout and all else to stderr. where: auto, or what is said.

    Raises what `advise` does, and ConfigError for a file that is there already or cannot be written.
    """
    if file is not None and file.exists():
        raise ConfigError(f"--write: {file} is there already, and nothing of yours is overwritten; name another file")
    stream = sys.stderr if file is None else sys.stdout
    console = Console(file=stream, force_terminal=stream.isatty())
    with machines(where) as nodes:
        pass  # a cluster is joined to see its nodes; the rest needs none
    with console.status(f"looking at {data}"):
        advice = advise(data, model, reward, nodes, file.parent if file else Path.cwd(), where)
    if file is not None:
        _write(file, advice.text(str(file)))
    show(advice, console, file)
    if file is None:
        print(advice.text(PRINTED), end="")


def _write(file: Path, text: str) -> None:
    try:
        with file.open("x", encoding="utf-8") as handle:
            handle.write(text)
    except OSError as error:
        raise ConfigError(f"--write: {file} cannot be written: {error.strerror}") from error


def show(advice: Advice, console: Console, file: Path | None) -> None:
    """Prints why this method and these numbers. file: where the job file lies; None = it is printed by itself."""
    named = str(file or PRINTED)
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in _rows(advice).items():
        table.add_row(name, text)
    for index, other in enumerate(advice.others):
        why = Text(f"{name_of(other.method)}, {WHY_ELSE[other.method]}:")
        table.add_row("" if index else "or", Text("\n").join([why, Text(f"  {other.command(named)}", "cyan")]))
    console.print()
    console.print(Text(f"{name_of(advice.method)}: {advice.why}", "bold green"))
    console.print(table)
    console.print()
    if file:
        console.print(Text(f"wrote {file}; to run it: eagleray run {file}", "bold"), soft_wrap=True)


def _rows(advice: Advice) -> dict[str, Text]:
    config, fit, found = advice.config, advice.fit, advice.found
    sample, gpu = found.sample, found.gpu
    looked = "" if sample.total <= len(sample.rows) else f", of which {len(sample.rows):,} were looked at"
    entry = (config.datasets or [])[0]
    read = ", ".join(f"{key}: {value}" for key, value in fit.layout.entry(entry.path).items() if key != "path")
    rows = {
        "data": Text(f"{found.data}: {sample.total:,} rows{looked}; columns {', '.join(sample.columns)}"),
        "read by": Text(read or "prompt, as it stands, and columns for the rewards"),
        "tokens": Text(_lengths(advice)),
        "model": Text(f"{found.model}, {_count(found.size.weights)} weights"),
        "adapter": Text(described_adapter(config, trainer_dtype(config, gpu, "float32"))),
        "machine": Text(f"{described(found.nodes)}: {_placed(config, gpu)}"),
    }
    if config.trl.reward_funcs and config.rl == "grpo":
        rows["reward"] = Text(", ".join(config.trl.reward_funcs))
    if fit.bad:
        first = fit.bad[0]
        text = f"{len(fit.bad)} of the rows looked at cannot be used; the first: {first.place}: {first.reason}"
        rows["left out"] = Text(text, "yellow")
    return rows


def _lengths(advice: Advice) -> str:
    lengths = advice.fit.lengths
    shares = ", ".join(f"{share} % up to {percentile(lengths, share)}" for share in (50, 95, 99))
    what = "prompts: " if advice.method == "grpo" else ""
    most = f"{advice.config.trl.max_completion_length} more for a completion, " if advice.method == "grpo" else ""
    return f"{what}{shares}, the longest {lengths[-1]}; {most}so sequence_len is {advice.config.sequence_len}"


def _placed(config: JobConfig, gpu: bool) -> str:
    ranks = config.ray_num_workers
    trained = f"{ranks} rank{'s that share' if ranks != 1 else ' with'} the model" if gpu else "one rank on CPUs"
    if config.rl != "grpo":
        return trained
    if config.trl.vllm_mode == "colocate":
        return f"{trained}, and an engine on the same GPU, which sleeps while the rank computes"
    parallel = config.vllm.tensor_parallel_size
    engine = f"an engine on {parallel} GPU{'s' if parallel > 1 else ''} of its own" if gpu else "one engine on CPUs"
    return f"{trained}, and {engine}"


def _count(weights: int) -> str:
    return f"{weights / 1e9:.1f} B" if weights >= 1e9 else f"{weights / 1e6:.0f} M"
