"""A throw-away Slurm on this machine: root, no systemd, all files in one folder; two GPUs that are character devices.

It runs slurmdbd with MariaDB: without accounting, a killed job is noticed only after minutes.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil

PROGRAMS = ("slurmctld", "slurmd", "slurmdbd", "munged", "mariadbd", "mariadb-install-db", "sbatch", "sacct")
GPUS = 2


def why_not() -> str | None:
    """What is missing to start Slurm on this machine; None if nothing is."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        return f"no {', '.join(missing)}: apt-get install slurm-wlm munge slurmdbd mariadb-server"
    if os.geteuid() != 0:
        return "starting a Slurm takes root"
    return None


@dataclass
class Slurm:
    """`ports`: free ports for slurmctld, slurmd, slurmdbd and MariaDB."""

    folder: Path
    ports: list[int]
    running: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def env(self) -> dict[str, str]:
        return os.environ | {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def up(self) -> None:
        for name in ("state", "spool", "log", "munge", "dev"):
            (self.folder / name).mkdir(parents=True, mode=0o755)
        self.folder.chmod(0o755)
        _resolve_own_name()
        (self.folder / "munge/key").write_bytes(os.urandom(128))
        (self.folder / "munge/key").chmod(0o600)
        for index in range(GPUS):
            os.mknod(self.folder / f"dev/gpu{index}", 0o020666, os.makedev(1, 3))
        for name, text in _configuration(self.folder, self.ports).items():
            (self.folder / name).write_text(text)
            (self.folder / name).chmod(0o600 if name == "slurmdbd.conf" else 0o644)
        munge = self.folder / "munge"
        self._start(
            "munged",
            "--foreground",
            "--force",
            f"--key-file={munge}/key",
            f"--socket={munge}/sock",
            f"--pid-file={munge}/pid",
            f"--log-file={munge}/log",
            f"--seed-file={munge}/seed",
        )
        self._database()
        self._start("slurmdbd", "-D")
        _until(lambda: self.ask("sacctmgr", "-n", "list", "cluster") is not None, "slurmdbd")
        self.ask("sacctmgr", "-i", "add", "cluster", "ci")
        self._start("slurmctld", "-D", "-c")
        self._start("slurmd", "-D")
        _until(lambda: self.ask("sinfo", "-h", "-p", "main", "-o", "%t") == "idle", "a node that is idle")

    def ask(self, *command: str, timeout_s: float = 10) -> str | None:
        """The output of a client command; None if it fails or does not answer."""
        try:
            done = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=timeout_s, check=False)
        except subprocess.TimeoutExpired:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    def down(self) -> None:
        self.ask("scancel", "--user=root")
        time.sleep(1)
        for process in reversed(self.running):
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()

    def _start(self, *command: str) -> None:
        with (self.folder / "log" / f"{command[0]}.out").open("wb") as log:
            self.running.append(
                subprocess.Popen(command, env=self.env, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
            )

    def _database(self) -> None:
        data = self.folder / "mysql"
        subprocess.run(
            [
                "mariadb-install-db",
                "--no-defaults",
                "--user=root",
                f"--datadir={data}",
                "--auth-root-authentication-method=normal",
                "--skip-test-db",
            ],
            check=True,
            capture_output=True,
        )
        self._start(
            "mariadbd",
            "--no-defaults",
            "--user=root",
            f"--datadir={data}",
            f"--socket={data}/sock",
            f"--pid-file={data}/pid",
            "--bind-address=127.0.0.1",
            f"--port={self.ports[3]}",
            "--innodb-buffer-pool-size=64M",
            "--innodb-lock-wait-timeout=900",
        )
        root = ("mariadb", "--no-defaults", "-uroot", "-S", f"{data}/sock", "-e")
        _until(lambda: self.ask(*root, "SELECT 1") is not None, "MariaDB")
        users = [
            f"CREATE USER slurm@'{host}' IDENTIFIED BY 'ci'; GRANT ALL ON acct.* TO slurm@'{host}';"
            for host in ("localhost", "127.0.0.1")
        ]
        subprocess.run([*root, f"CREATE DATABASE acct; {' '.join(users)}"], check=True)


def start(folder: Path) -> Slurm:
    """A running Slurm with the partitions `main` and `high`; jobs of `high` preempt and requeue those of `main`."""
    sockets = [socket.socket() for _ in range(4)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    slurm = Slurm(folder, ports)
    try:
        slurm.up()
    except BaseException:
        slurm.down()
        raise
    return slurm


def _until(holds: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 30
    while not holds():
        if time.monotonic() > deadline:
            raise TimeoutError(f"no {what} in 30 s")
        time.sleep(0.1)


def _resolve_own_name() -> None:
    name = socket.gethostname().partition(".")[0]
    try:
        socket.gethostbyname(name)
    except socket.gaierror:
        with open("/etc/hosts", "a", encoding="utf-8") as hosts:
            hosts.write(f"127.0.0.1 {name}\n")


def _configuration(folder: Path, ports: list[int]) -> dict[str, str]:
    host = socket.gethostname().partition(".")[0]
    memory_mb = psutil.virtual_memory().total // 2**20 - 1024
    controller, node, accounting, database = ports
    slurm = f"""\
ClusterName=ci
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={node}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CryptoType=crypto/munge
AuthInfo=socket={folder}/munge/sock,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=1
JobAcctGatherParams=OverMemoryKill
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={accounting}
AccountingStoragePass={folder}/munge/sock
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=2048
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=1,sched_min_interval=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
EnforcePartLimits=ALL
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
KillWait=1
GresTypes=gpu
NodeName={host} NodeAddr=127.0.0.1 CPUs={os.cpu_count()} RealMemory={memory_mb} Gres=gpu:fake:{GPUS} State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""
    slurmdbd = f"""\
AuthType=auth/munge
AuthInfo=socket={folder}/munge/sock
DbdHost=localhost
DbdPort={accounting}
SlurmUser=root
LogFile={folder}/log/slurmdbd.log
PidFile={folder}/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={database}
StorageUser=slurm
StoragePass=ci
StorageLoc=acct
"""
    return {
        "slurm.conf": slurm,
        "slurmdbd.conf": slurmdbd,
        "gres.conf": f"NodeName={host} Name=gpu Type=fake File={folder}/dev/gpu[0-{GPUS - 1}]\n",
        "cgroup.conf": "CgroupAutomount=no\nConstrainCores=no\nConstrainRAMSpace=no\n",
    }
