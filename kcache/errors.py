"""Every error that kcache raises on purpose: each message says what was found, what was expected and what to do."""


class KcacheError(Exception):
    """Parent of every error below; `exit_code` is what the command line returns for it."""

    exit_code = 1


class ConfigError(KcacheError, ValueError):
    """Raised when a setting is out of range or two settings contradict each other."""


class SourceError(KcacheError, ValueError):
    """Raised when a source of images cannot be opened or read as a whole."""


class ModelError(KcacheError, ValueError):
    """Raised when a model repository is missing, incomplete or unsafe to load."""


class RunError(KcacheError, ValueError):
    """Raised when a run directory or one of its checkpoints cannot be used."""


class CacheNotFoundError(KcacheError, FileNotFoundError):
    """Raised when there is no cache at the path given."""


class CacheIncompleteError(KcacheError, ValueError):
    """Raised when a cache exists but rows or tables that were asked for are missing."""


class CacheMismatchError(KcacheError, ValueError):
    """Raised when a cache is whole but belongs to another recipe, model, format or schema."""


class CacheBusyError(KcacheError, BlockingIOError):
    """Raised when another process is writing the same cache or run directory."""


class CacheCorruptError(KcacheError, ValueError):
    """Raised when bytes on disk differ from what was committed."""

    exit_code = 4


class UnreadableError(KcacheError, OSError):
    """Raised when the system keeps a file from this process, which says nothing of what is in it."""


class CacheWriteError(KcacheError, OSError):
    """Raised when the system refuses a write: no room, no permission, a read-only file system."""


class StoreError(KcacheError, OSError):
    """Raised when an object store does not do what it is asked: no connection, no permission, no end of trouble."""


class EngineError(KcacheError, RuntimeError):
    """Raised when an engine's machines do not do what they are asked: no cluster, other versions, actors that die."""


class MemoryShortError(KcacheError, MemoryError):
    """Raised when memory ran out, of the machine or of a device, with the flags that take less."""


class RejectedInputsError(KcacheError, ValueError):
    """Raised under `--strict` when the build is done but some inputs were rejected."""

    exit_code = 3


class InputRejected(KcacheError, ValueError):
    """Raised for one input that cannot be cached: costs that sample and nothing else.

    `stage` says where it failed ("source", "decode", "tokenize", "encode"), `reason` why, in one line.
    """

    def __init__(self, stage: str, reason: str) -> None:
        super().__init__(f"{stage}: {reason}")
        self.stage = stage
        self.reason = reason
