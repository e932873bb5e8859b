"""Start a two-node Slurm on this machine, as root: eight fake GPUs per node, and a partition that preempts."""

from __future__ import annotations

import os
import random
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.limits import HANGS

TOOLS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue")
CONFIG = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={root}/munge/munge.sock
CredType=cred/munge
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_min_interval=100000
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
SlurmdParameters=config_overrides
JobRequeue=1
ReturnToService=2
KillWait=30
MessageTimeout=100
TCPTimeout=30
MinJobAge=600
GresTypes=gpu
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={one} CPUs=2 RealMemory=8000 Gres=gpu:8 State=UNKNOWN
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.1 Port={two} CPUs=2 RealMemory=8000 Gres=gpu:8 State=UNKNOWN
PartitionName=batch Nodes=node[1-2] Default=YES State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=600
PartitionName=high Nodes=node[1-2] State=UP PriorityTier=10 PreemptMode=OFF
"""


def lacks() -> str:
    """Return why Slurm cannot be started here; empty if it can."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None and not Path(f"/usr/sbin/{tool}").exists()]
    if missing:
        return f"{', '.join(missing)} not installed (apt-get install slurm-wlm munge)"
    return "" if os.geteuid() == 0 else "a Slurm of its own needs root"


def _port() -> int:
    """Return a free port, below Linux's ephemeral ports and above those of `slurm/body.sh`."""
    for port in random.sample(range(30000, 32000), 100):
        with suppress(OSError), socket.create_server(("", port)):
            return port
    raise RuntimeError("none of a hundred ports could be opened")


@contextmanager
def running(root: Path) -> Iterator[dict[str, str]]:
    """Run the cluster; yield the environment variables for its commands."""
    for name in ("state", "log", "spool/node1", "spool/node2", "munge"):
        (root / name).mkdir(parents=True)
    root.chmod(0o755)
    key = root / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    places = {"root": root, "host": socket.gethostname().split(".")[0], "port": _port(), "one": _port(), "two": _port()}
    (root / "slurm.conf").write_text(CONFIG.format(**places))
    for number in range(8):
        os.mknod(root / f"gpu{number}", 0o020666, os.makedev(1, 3))
    (root / "gres.conf").write_text(f"NodeName=node[1-2] Name=gpu File={root}/gpu[0-7]\n")
    environment = os.environ | {"SLURM_CONF": f"{root}/slurm.conf", "PATH": f"{os.environ['PATH']}:/usr/sbin"}
    munge = ["--force", "--num-threads=2", f"--key-file={key}", f"--socket={root}/munge/munge.sock"]
    munge += [f"--pid-file={root}/munged.pid", f"--log-file={root}/log/munged.log", f"--seed-file={root}/munge/seed"]
    try:
        for call in (["munged", *munge], ["slurmctld"], ["slurmd", "-N", "node1"], ["slurmd", "-N", "node2"]):
            subprocess.run(call, env=environment, check=True, capture_output=True)
        until = time.monotonic() + HANGS
        while _states(environment) != ["idle", "idle"]:
            if time.monotonic() > until:
                raise RuntimeError(f"the nodes did not come up: {_states(environment)}")
            time.sleep(0.2)
        yield environment
    finally:
        subprocess.run(["scancel", "--user=root"], env=environment, check=False, capture_output=True)
        time.sleep(1)
        for pid in root.glob("*.pid"):
            subprocess.run(["kill", pid.read_text().strip()], check=False, capture_output=True)


def _states(environment: dict[str, str]) -> list[str]:
    call = ["sinfo", "-h", "-N", "-p", "batch", "-o", "%T"]
    return subprocess.run(call, env=environment, check=False, capture_output=True, text=True).stdout.split()
