"""The methods that train on a dataset, one file each: TRL's trainer, fed with rows that are tokens already.

A new method is a file with a `build` of the signature `Build`, and a line in METHODS.
"""

from collections.abc import Callable
from typing import Any

from actors.methods import dpo, kto, orpo, reward, sft
from actors.methods.base import Inputs

Build = Callable[[Inputs], Any]  # to a trainer that is ready to train

METHODS: dict[str, Build] = {
    "sft": sft.build,
    "dpo": dpo.build,
    "ipo": dpo.build,
    "kto": kto.build,
    "orpo": orpo.build,
    "reward_trainer": reward.build,
}
