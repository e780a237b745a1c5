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
130   stopped by Ctrl-C; finished work is kept, run again
====  =======================================================================
"""


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


INTERRUPTED = 130
