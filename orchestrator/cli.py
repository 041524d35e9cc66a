"""The command line. A new command is a function here and its arguments in one of `_add_...`.

Exit codes: 0 done, 1 something that the message explains, 2 a wrong command line, 128 + n ended by signal n.
"""

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from actors.errors import EaglerayError


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    parser = make_parser()
    args, rest = parser.parse_known_args(arguments)
    # argparse gives up on overrides that follow an option.
    if any(word.startswith("-") or "=" not in word for word in rest) or (rest and not hasattr(args, "overrides")):
        parser.error(f"unknown arguments: {' '.join(rest)}")
    if rest:
        args.overrides = [*args.overrides, *rest]
    quieten()
    return exit_code(lambda: args.command(args))


def exit_code(command: Callable[[], int]) -> int:
    """Runs a command; errors for people are one message on stderr, without a traceback."""
    try:
        return int(command())
    except EaglerayError as error:
        print(f"eagleray: {error}", *getattr(error, "__notes__", ()), sep="\n", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _run(args: argparse.Namespace) -> int:
    from orchestrator.config import load
    from orchestrator.display import Display
    from orchestrator.run import run

    return ended(lambda: run(load(args.config, args.overrides), Display()))


def ended(command: Callable[[], object]) -> int:
    """0, or what Ctrl-C and SIGTERM make of it."""
    from orchestrator.waits import Interrupted

    try:
        command()
    except Interrupted as interrupted:
        return interrupted.exit_code
    return 0


def _plan(args: argparse.Namespace) -> int:
    from orchestrator.plan_command import run

    return ended(lambda: run(args.config, args.overrides, args.cluster, as_json=args.json, measure=args.check))


def _sweep(args: argparse.Namespace) -> int:
    from orchestrator.display import Display
    from orchestrator.hardware import AUTO
    from orchestrator.sweep_config import load
    from orchestrator.sweep_plan_command import show
    from orchestrator.sweeps import sweep

    if args.cluster and not args.plan:
        args.error("--cluster says what --plan plans for; add --plan, or leave it out")
    config = load(args.config, args.overrides)
    if not args.plan:
        return ended(lambda: sweep(config, Display()))
    return ended(lambda: show(config, args.cluster or AUTO))


def _submit(args: argparse.Namespace) -> int:
    from orchestrator import ray_jobs
    from orchestrator.config import load
    from orchestrator.runnable import ensure_runnable

    ensure_runnable(load(args.config, args.overrides))
    client = ray_jobs.connect(args.address, args.headers)
    return ray_jobs.submit(client, args.config, args.overrides, wait=not args.no_wait)


def _status(args: argparse.Namespace) -> int:
    from orchestrator import ray_jobs

    return ray_jobs.status(ray_jobs.connect(args.address, args.headers), args.job)


def _logs(args: argparse.Namespace) -> int:
    from orchestrator import ray_jobs

    return ray_jobs.logs(ray_jobs.connect(args.address, args.headers), args.job, follow_it=args.follow)


def _stop(args: argparse.Namespace) -> int:
    from orchestrator import ray_jobs

    return ray_jobs.stop(ray_jobs.connect(args.address, args.headers), args.job)


def _report(args: argparse.Namespace) -> int:
    from orchestrator import report, sweep_report
    from orchestrator.sweep_results import is_sweep

    folder = Path(args.output_dir)
    print(*(sweep_report.report(folder) if is_sweep(folder) else [report.report(folder)]), sep="\n")
    return 0


def _top(args: argparse.Namespace) -> int:
    from orchestrator.top import top

    return top(args.output_dir, args.address, args.once)


def _advise(args: argparse.Namespace) -> int:
    from orchestrator.advise_report import run

    file = Path(args.write) if args.write else None
    return ended(lambda: run(args.data, args.model, args.reward, args.cluster, file))


def _import(args: argparse.Namespace) -> int:
    from orchestrator.import_report import import_report, show

    report = import_report(args.config, args.overrides)
    show(report)
    return 0 if report.would_run else 1


def _merge(args: argparse.Namespace) -> int:
    from orchestrator.merge import merge

    print("\n".join(merge(Path(args.output_dir), Path(args.into) if args.into else None)))
    return 0


def _chat(args: argparse.Namespace) -> int:
    from orchestrator.chat import chat

    return ended(lambda: chat(Path(args.output_dir), args.question, base=args.base))


def _eval(args: argparse.Namespace) -> int:
    from orchestrator.display import Display
    from orchestrator.evaluate import evaluate

    prompts = Path(args.prompts) if args.prompts else None
    return ended(lambda: evaluate(Path(args.output_dir), prompts, args.reward, args.samples, Display()))


def _serve(args: argparse.Namespace) -> int:
    from orchestrator.serve import serve

    folders = [Path(folder) for folder in args.output_dirs]
    options = {name: getattr(args, name) for name in ("host", "port", "replicas", "base", "api_key_env")}
    return ended(lambda: serve(folders, **options))


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="eagleray", description="Post-training of language models on Ray from one YAML."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_jobs(commands)
    _add_watching(commands)
    _add_results(commands)
    return parser


def _add_jobs(commands: Any) -> None:
    """Commands on a job file, or that write one."""

    def job_command(name: str, function: object, text: str) -> argparse.ArgumentParser:
        command: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
        command.add_argument("config", help="a YAML file in Axolotl's dialect")
        command.add_argument("overrides", nargs="*", metavar="key=value", help="such as trl.beta=0.1")
        command.set_defaults(command=function)
        return command

    job_command("run", _run, "Run a job: on the cluster of RAY_ADDRESS, or on this machine.")
    sweep = job_command("sweep", _sweep, "Run many jobs that differ in a few keys, and find the best; again: go on with them.")
    sweep.add_argument("--plan", action="store_true", help="print how many trials fit at once, and for how long; start nothing")
    sweep.add_argument("--cluster", metavar="8x80GB", help="GPUs to plan for; without it, what is there")
    sweep.set_defaults(error=sweep.error)
    sweep.epilog = "The file names a base job and the space that is searched; overrides are of its own keys."
    plan = job_command("plan", _plan, "Print what a job would start, whether it fits, and what would make it fit.")
    plan.add_argument("--cluster", default="auto", metavar="8x80GB", help="GPUSxSIZE, NODESxGPUSxSIZE, or auto: what is there")
    plan.add_argument("--json", action="store_true", help="print it for programs")
    plan.add_argument("--check", action="store_true", help="start each kind of actor for two steps, and measure its memory")
    submit = job_command("submit", _submit, "Run a job through Ray's job API and follow its log.")
    submit.add_argument("--no-wait", action="store_true", help="return once the cluster has it")
    _add_address(submit)
    job_command("import", _import, "Tell what Eagleray makes of each key of an Axolotl file, and whether it would run.")
    advise = commands.add_parser("advise", help="Tell which method rows of data allow, and write a job file for it.")
    advise.add_argument("data", metavar="DATA", help="a file or folder of JSON, CSV, Parquet or Arrow, or a name on the hub")
    advise.add_argument("--model", help="a folder or a name on the hub; by default the small one that comes with Eagleray")
    advise.add_argument("--reward", metavar="FN", help="rewards completions: module.fn, or a reward model")
    advise.add_argument("--cluster", default="auto", metavar="8x80GB", help="GPUs to advise for, or auto: what is there")
    advise.add_argument("--write", metavar="FILE", help="the job file, which must not be there yet; else it is printed")
    advise.set_defaults(command=_advise)


def _add_watching(commands: Any) -> None:
    """Commands on jobs that run."""
    status = commands.add_parser("status", help="List the jobs of a cluster, or say what is known of one.")
    status.add_argument("job", nargs="?", metavar="JOB")
    status.set_defaults(command=_status)
    logs = commands.add_parser("logs", help="Print the log of a job on a cluster.")
    logs.add_argument("job", metavar="JOB")
    logs.add_argument("--follow", action="store_true", help="until the job ends; returns 1 if it did not succeed")
    logs.set_defaults(command=_logs)
    stop = commands.add_parser("stop", help="End a job on a cluster.")
    stop.add_argument("job", metavar="JOB")
    stop.set_defaults(command=_stop)
    for command in (status, logs, stop):
        _add_address(command)
    top = commands.add_parser("top", help="Watch a run while it goes: its curves, its actors and its warnings.")
    top.add_argument("output_dir", metavar="OUTPUT_DIR", nargs="?", help="of a run; none = the newest run of a cluster")
    top.add_argument("--address", help="of the cluster's dashboard, such as http://127.0.0.1:8265")
    top.add_argument("--once", action="store_true", help="print one frame, also into a pipe")
    top.set_defaults(command=_top)


def _add_address(command: argparse.ArgumentParser) -> None:
    command.add_argument("--address", help="of the cluster's dashboard; else RAY_API_SERVER_ADDRESS, or this machine")
    command.add_argument("--headers", metavar="JSON", help="sent along, such as for a proxy; else RAY_JOB_HEADERS")


def _add_results(commands: Any) -> None:
    """Commands on what a run left."""

    def result_command(name: str, function: object, text: str, more: str | None = None) -> argparse.ArgumentParser:
        command: argparse.ArgumentParser = commands.add_parser(name, help=text, description=more)
        command.add_argument("output_dir", metavar="OUTPUT_DIR", help="of a run, or one of its checkpoints")
        command.set_defaults(command=function)
        return command

    report = commands.add_parser("report", help="Draw the curves of a run, or of a sweep's trials, to OUTPUT_DIR/report.png.")
    report.add_argument("output_dir", metavar="OUTPUT_DIR", help="of a run, or of a sweep, which also gets its table as CSV")
    report.set_defaults(command=_report)
    merge = result_command("merge", _merge, "Write the adapter of a run and its base model as one model.")
    merge.add_argument("--into", metavar="FOLDER", help="where to; by default OUTPUT_DIR/merged")
    chat = result_command("chat", _chat, "Ask what a run left: one question, or a conversation.")
    chat.add_argument("question", metavar="PROMPT", nargs="?", help="one question; without it, a conversation until Ctrl-D")
    chat.add_argument("--base", action="store_true", help="ask the base model, as it was before training")
    compare = result_command(
        "eval",
        _eval,
        "Compare what a run left with its base model, on held-out prompts.",
        "Both answer the prompts that the job held out, greedily and sampled, and its reward functions judge. A dataset job's "
        "own records are compared, unless prompts and a reward are named.",
    )
    compare.add_argument("--prompts", metavar="FILE", help="other prompts: rows like those of the job's datasets")
    compare.add_argument("--reward", metavar="FN", help="in place of trl.reward_funcs: module.fn, or a reward model")
    compare.add_argument("--samples", type=int, metavar="N", help="a prompt; by default trl.num_generations")
    serve = commands.add_parser(
        "serve",
        help="Serve what runs left behind an OpenAI-compatible endpoint.",
        description="Serves until it is stopped. One adapter of a base model is merged into its weights and decodes at its "
        "speed; several of one base share an engine as LoRA slots, beside the base model, and decode more slowly.",
    )
    serve.add_argument("output_dirs", metavar="OUTPUT_DIR", nargs="+", help="of runs, or their checkpoints")
    serve.add_argument("--port", type=int, default=8000)
    serve.add_argument("--host", default="127.0.0.1", help="of this machine alone by default; any other needs a key")
    serve.add_argument("--replicas", type=int, default=1, metavar="N", help="of each engine")
    serve.add_argument("--base", action="store_true", help="serve the base model too, also beside one adapter alone")
    serve.add_argument("--api-key-env", metavar="NAME", help="the variable with the key that requests must carry")
    serve.set_defaults(command=_serve)


def quieten() -> None:
    """Libraries keep to errors; what Eagleray has to say goes to stderr, a line each."""
    warnings.filterwarnings("ignore")
    for name, value in {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}.items():
        os.environ.setdefault(name, value)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it tells of kernels that could be faster
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("eagleray: %(message)s"))
    logger = logging.getLogger("eagleray")
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)
