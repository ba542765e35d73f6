"""Errors that users meet. Each message says the rule, the values and the remedy.

Every class takes the message as its only constructor argument, so that it survives pickling on its way through Ray.
"""


class ElasticLMError(Exception):
    """Base of all errors that elastic-lm raises on purpose."""


def without_frames(error: BaseException) -> BaseException:
    """`error`, to be carried to another thread: what lived in its frames, and in those of what it came from, is let go.

    A frame holds its callers. An error that one of them keeps would otherwise keep all that until a garbage collection.
    """
    seen: set[int] = set()
    chain: list[BaseException | None] = [error]
    while chain:
        link = chain.pop()
        if link is not None and id(link) not in seen:
            seen.add(id(link))
            link.__traceback__ = None
            chain += [link.__cause__, link.__context__]
    return error


class ConfigError(ElasticLMError):
    """A run's configuration breaks a rule; found before any actor starts."""


class UnfitError(ConfigError):
    """A fork changes what its parent's state, or the parent's other choices, cannot take, whenever it is tried."""


class DataError(ElasticLMError):
    """Data that must not be trained on (corrupt, missing, mismatched), with the place where it was found."""


class StorageError(ElasticLMError):
    """Object storage did not do what was asked within its deadline and retry budget."""


class NotFoundError(StorageError):
    """The object does not exist."""


class TooShortError(StorageError):
    """The object ends before what was asked of it."""


class AlreadyExistsError(StorageError):
    """A create-only write found the object there."""


class AccessDeniedError(StorageError):
    """Storage refused the credentials."""


class UnavailableError(StorageError):
    """Storage gave no answer for as long as a run waits for one."""


class CheckpointError(ElasticLMError):
    """A checkpoint is incomplete, damaged or belongs to another run identity."""


class CheckpointVersionError(CheckpointError):
    """A checkpoint was written by another version of elastic-lm, in a format that this one does not read."""


class TrackingError(ElasticLMError):
    """A tracker (TensorBoard, Weights & Biases) did not take what somebody asked to be written there."""


class ClusterError(ElasticLMError):
    """The Ray cluster cannot run what was asked."""


class OwnershipError(ElasticLMError):
    """The run belongs to another job, which trains it."""


class SupersededError(OwnershipError):
    """The run belonged to this process until another owner took over."""
