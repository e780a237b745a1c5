"""The errors that a user meets, each with an exit code for scripts.

====  =======================================================================
code  meaning
====  =======================================================================
0     done
1     an unexpected failure (a bug: the traceback is shown)
2     wrong usage: an option, a config key or a combination that cannot work
3     bad data: a file is damaged, foreign, changed, or has too many bad lines
4     busy: another process is at the same work; try again when it is done
5     a worker, a rank or the machine failed; finished work is kept, run again
6     training diverged: steps are skipped again and again, or weights are not finite; change a setting first
7     three checkpoints in a row could not be written: make room on the disk, then run again
75    a run that is to be started again: stopped by SIGTERM, SIGUSR1 or `max_hours`, saved, and not complete
130   stopped by a person: Ctrl-C, a closed terminal; training, index builds and `prefs generate` go on when run again
141   the reader of the output (head, less) ended before the output did
====  =======================================================================

A scheduler starts a run again after 75, and may do so after 5, a limited number of times without progress. After all
other codes a person has to look first. 75 is EX_TEMPFAIL of sysexits.h, "temporary failure, try again later": shells
and Slurm use no code of that number for ends of their own.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager


class MegazhError(Exception):
    """An error whose message is one line for the person at the terminal: what, where, what to do."""

    exit_code = 1


class UsageError(MegazhError):
    """An option, a config key or a combination of them that cannot work."""

    exit_code = 2


class DataError(MegazhError):
    """A file that is damaged, foreign, changed, or with too many bad records."""

    exit_code = 3


class BusyError(MegazhError):
    """Another process holds a file or folder that this one needs."""

    exit_code = 4


class WorkerError(MegazhError):
    """A worker process, a rank or the machine (disk, memory) failed; the same command continues after finished work."""

    exit_code = 5


class DivergedError(MegazhError):
    """Training that has become useless: steps are skipped again and again, or weights are not finite.

    The same command would end the same way, so schedulers must not start it again by themselves.
    """

    exit_code = 6


class SaveError(MegazhError):
    """Checkpoints could not be written again and again, so that ever more work would be lost."""

    exit_code = 7


class SeveralErrors(MegazhError):
    """Errors that were found together, each of which is one line; the first one decides the exit code."""

    def __init__(self, errors: Sequence[MegazhError]) -> None:
        self.errors = tuple(errors)
        self.exit_code = errors[0].exit_code
        super().__init__("\nerror: ".join(map(str, errors)))  # whoever prints `error: ...` prints one line for each


class Collector:
    """Collects the errors of several checks, so that a user sees all of them at once."""

    def __init__(self) -> None:
        self.errors: list[MegazhError] = []

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Keep a MegazhError that the block raises, and go on behind the block; an error of the same text only once."""
        try:
            yield
        except MegazhError as error:
            self.add(error)

    def add(self, error: MegazhError) -> None:
        """Keep an error; one of the same text only once."""
        for each in error.errors if isinstance(error, SeveralErrors) else (error,):
            if str(each) not in map(str, self.errors):
                self.errors.append(each)

    def raise_all(self) -> None:
        """Raise what was collected: nothing, a single error as it is, several as `SeveralErrors`."""
        if len(self.errors) == 1:
            raise self.errors[0]
        if self.errors:
            raise SeveralErrors(self.errors)


class WriteError(WorkerError, OSError):
    """A file or folder could not be written. Names its path, the size that was needed and the remedy.

    It is an OSError as well, so that those who can do without the file go on as for any other failure of a disk.
    """


class Stopped(KeyboardInterrupt):
    """A signal of a scheduler before a run has begun. It ends a command as Ctrl-C does, with another exit code."""


INTERRUPTED = 130

REQUEUE = 75
"""A run was stopped by its scheduler or its deadline; the same command goes on. EX_TEMPFAIL of sysexits.h."""

READER_GONE = 141
"""128 + SIGPIPE, as shells report programs that SIGPIPE ends."""
