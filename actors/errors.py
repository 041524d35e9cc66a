"""The exceptions of Eagleray, one tree, each a message for a person.

They cross process borders, so each takes a single string and nothing else: Ray can pickle them as they are.
A new kind of failure gets a class here when someone handles it differently from the others.
"""


class EaglerayError(Exception):
    """Base of all failures whose message says what was wrong, where, and what to do."""


class ConfigError(EaglerayError):
    """The configuration cannot mean a job: unknown key, wrong type, contradiction, missing file or function."""


class DataError(EaglerayError):
    """A dataset cannot be read, is empty, or holds too many bad rows."""


class RewardError(EaglerayError):
    """A judge cannot be asked, or there is nothing usable for a whole batch."""


class SyncError(EaglerayError):
    """An engine does not serve the policy that the trainer published."""


class CheckpointError(EaglerayError):
    """A checkpoint is missing a part or does not match its digest."""


class ActorError(EaglerayError):
    """An actor died, hung or could not be placed."""
