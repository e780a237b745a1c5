"""Start the ranks of a job by DeepSpeed's launcher, which reaches the hosts of a hostfile through pdsh and ssh."""

import re
import shlex
import shutil
import sys

from megazh.cluster.launchers.reach import check_hosts
from megazh.cluster.launchers.transport import Transport, rank_arguments
from megazh.errors import UsageError
from megazh.training.job import Job, Launcher

# DeepSpeed's launcher pastes these variables into command lines for the shells of the hosts, between quotes "".
_EXPORTED = ("MLFLOW", "PYTHON", "MV2", "UCX", "NCCL", "LD_LIBRARY", "PATH")
_UNSAFE = re.compile(r'["$`\\!\x00-\x1f]')
_SAFE_WORD = re.compile(r"[\w@+=:,./-]+", re.ASCII)
_SSH_FAILED = re.compile(r"pdsh@\S+: (\S+): ssh exited with exit code (\d+)")


class DeepSpeed(Transport):
    """DeepSpeed's launcher with pdsh. It needs this folder and this Python under the same paths on each host."""

    name = Launcher.DEEPSPEED

    def command(self, job: Job, attempt: str) -> list[str]:
        """See `Transport.command`. Raises UsageError also where no shell of a host would understand what DeepSpeed's
        launcher pastes together."""
        if job.hostfile is None:
            raise UsageError("--launcher deepspeed needs a hostfile: -H FILE, such as hostfiles/two_nodes")
        if shutil.which("pdsh") is None:
            raise UsageError(
                f"-H {job.hostfile}: several hosts are reached through pdsh, which is not installed (Debian, Ubuntu: "
                "apt-get install pdsh)"
            )
        if not _SAFE_WORD.fullmatch(sys.executable):
            raise UsageError(
                f"{sys.executable}: DeepSpeed's launcher starts no Python whose path has spaces or quotes; move the "
                "environment, or take --launcher mpirun"
            )
        for name, value in self.environment(job).items():
            if name.startswith(_EXPORTED) and _UNSAFE.search(value):
                raise UsageError(f"{name}: DeepSpeed's launcher cannot hand this value on to other hosts; unset it")
        # Its folder is the remote one, too, and pasted into the shell's command as it is: so the root folder.
        words = ["env", "-C", "/", sys.executable, "-P", "-m", "deepspeed.launcher.runner"]
        words += ["--hostfile", str(job.hostfile.absolute()), "--launcher_args=-N"]  # no host's name before each line
        taken = [(host.name, [*(job.devices.ids or map(str, range(host.slots)))][: host.slots]) for host in job.hosts]
        words += ["--include", "@".join(f"{name}:{','.join(slots)}" for name, slots in taken)]
        # Without --force_multi it takes a single host, whichever it is, for this machine. Rank 0's address and port
        # are not its business, but it would call ssh to find an address.
        words += ["--force_multi", "--no_ssh_check", "--master_addr", "127.0.0.1", "--no_local_rank", "--module"]
        arguments = rank_arguments(job, self.name, attempt)
        module = arguments.index("-m") + 1
        return [*words, arguments[module], *map(for_remote_shell, arguments[module + 1 :])]

    def environment(self, job: Job) -> dict[str, str]:
        """See `Transport.environment`. pdsh replaces %h and the like in what is exported, too."""
        result = {**super().environment(job), "PYTHONIOENCODING": "utf-8", "PYTHONSAFEPATH": "1", "PYTHONUTF8": "1"}
        options = "-o BatchMode=yes -o ConnectTimeout=20"  # no question to nobody
        result["PDSH_SSH_ARGS_APPEND"] = f"{result.get('PDSH_SSH_ARGS_APPEND', '')} {options}".strip()
        return {
            name: value.replace("%", "%%") if name.startswith(_EXPORTED) and name != "PATH" else value
            for name, value in result.items()
        }

    def prepare(self, job: Job) -> None:
        """See `Transport.prepare`."""
        check_hosts(job, job.hosts)

    def fault(self, text: str) -> str:
        """See `Transport.fault`: ssh to a host has ended before its ranks have joined."""
        failed = _SSH_FAILED.search(text)
        if failed is None:
            return ""
        words = [line for line in text.splitlines() if re.search(r"(?:error|Error|ssh|bash|sh): ", line)]
        why = f" ({words[0][:200]})" if words and words[0] != failed[0] else ""
        return f"{failed[1]}: DeepSpeed's launcher there ended with exit code {failed[2]}{why}"


def for_remote_shell(argument: str) -> str:
    """An argument as DeepSpeed's launcher has to get it, so that the shells of the hosts see it unchanged.

    The launcher itself puts those with a space between quotes "", and escapes no more than quotes in them; pdsh
    replaces %h, %n and the like.
    """
    argument = argument.replace("%", "%%")
    return re.sub(r"([\\$`])", r"\\\1", argument) if " " in argument else shlex.quote(argument)
