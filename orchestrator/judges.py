"""What `ray.judges` says: which entry a reward names, what an entry may not say, and what its actor is built from."""

import os
import re
from collections.abc import Iterator

from actors.specs import JudgeSpec
from orchestrator.schema import JobConfig, JudgeConfig
from orchestrator.source import Problem

PREFIX = "judge."  # of a judge's name in trl.reward_funcs
OF_A_CALL = 0.9  # of ray.reward_timeout_s: the judge gives up first, and says why


def judge_of(config: JobConfig, reward: str) -> JudgeConfig | None:
    """The judge that an entry of trl.reward_funcs names, if it names one."""
    return config.ray.judges.get(reward.removeprefix(PREFIX)) if reward.startswith(PREFIX) else None


def judge_spec(config: JobConfig, reward: str, judge: JudgeConfig) -> JudgeSpec:
    return JudgeSpec(
        path=reward,
        name=reward.removeprefix(PREFIX),
        url=judge.url,
        model=judge.model,
        prompt=judge.prompt,
        api_key_env=judge.api_key_env,
        max_tokens=judge.max_tokens,
        temperature=judge.temperature,
        timeout_s=judge.timeout_s,
        limit_s=OF_A_CALL * config.ray.reward_timeout_s,
        concurrency=judge.concurrency,
        scale=(judge.scale[0], judge.scale[1]),
    )


def problems(config: JobConfig) -> Iterator[Problem]:
    """What the section may not say, and judges that it does not have."""
    for name, judge in config.ray.judges.items():
        yield from _problems_of(config, name, judge)
    for reward in config.trl.reward_funcs or []:
        if reward.startswith(PREFIX) and judge_of(config, reward) is None:
            known = ", ".join(config.ray.judges) or "no judge"
            text = f"{reward} names a judge, and ray.judges has {known}; add it there (a module of yours needs another name)"
            yield Problem("trl.reward_funcs", text)


def missing_keys(config: JobConfig) -> Iterator[Problem]:
    """Variables of the environment that judges of this job need and that are not set."""
    for reward in config.trl.reward_funcs or []:
        judge = judge_of(config, reward)
        if judge and judge.api_key_env and not os.environ.get(judge.api_key_env):
            text = f"{judge.api_key_env} is not set where this command runs; export it with the key of {judge.url}"
            yield Problem(f"ray.judges.{reward.removeprefix(PREFIX)}.api_key_env", text)


def _problems_of(config: JobConfig, name: str, judge: JudgeConfig) -> Iterator[Problem]:
    key = f"ray.judges.{name}"
    if not re.fullmatch(r"[A-Za-z_]\w*", name):
        yield Problem(key, "a judge's name has letters, digits and _ alone; rename it")
    if not re.match(r"https?://.", judge.url):
        yield Problem(f"{key}.url", f"is '{judge.url}'; give the server's address, for example http://127.0.0.1:8000/v1")
    if not judge.model:
        yield Problem(f"{key}.model", "is empty; name a model that the server has")
    if "{completion}" not in judge.prompt:
        text = "does not say where the completion goes; write {completion} there, and {prompt} for what it answers"
        yield Problem(f"{key}.prompt", text)
    if judge.api_key_env is not None and not re.fullmatch(r"[A-Za-z_]\w*", judge.api_key_env):
        text = "takes the name of an environment variable, and never the key; write for example OPENAI_API_KEY"
        yield Problem(f"{key}.api_key_env", text)
    if len(judge.scale) != 2 or judge.scale[0] >= judge.scale[1]:
        text = f"is {judge.scale}; give the lowest and the highest number of an answer, for example [0, 10]"
        yield Problem(f"{key}.scale", text)
    for field in ("max_tokens", "concurrency"):
        if getattr(judge, field) < 1:
            yield Problem(f"{key}.{field}", f"is {getattr(judge, field)}; it must be 1 or more")
    if judge.temperature < 0:
        yield Problem(f"{key}.temperature", f"is {judge.temperature:g}; it must be 0 or more")
    if not 0 < judge.timeout_s < config.ray.reward_timeout_s:
        text = f"is {judge.timeout_s:g}; it must be above 0 and below ray.reward_timeout_s ({config.ray.reward_timeout_s:g})"
        yield Problem(f"{key}.timeout_s", text)
