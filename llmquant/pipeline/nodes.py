"""The nodes (machines) of a run with several ranks: `torchrun --nnodes 2 --node-rank N …` on each of them.

torchrun describes the nodes in the environment: GROUP_RANK is the number of this node, LOCAL_WORLD_SIZE the number of
ranks on it, and WORLD_SIZE that on all nodes. Node 0 is the node of rank 0.

Each rank reads the checkpoint by itself, so every node needs the same files, in a shared folder or in one of its own.
Before the run begins, all ranks compare what takes no time to read (`checkpoint_facts`). While rank 0 hashes the files,
one rank of each other node hashes those of its node, and the hashes are compared.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import socket
import struct
import sys

import torch
import transformers

from llmquant.checkpoints.side_files import code_files
from llmquant.planning.plan import Plan
from llmquant.version import __version__

LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"
"""Network interface that connects the processes of one machine."""
GET_ADDRESS = 0x8915
"""The request of `ioctl` for the IPv4 address of a network interface on Linux (SIOCGIFADDR)."""
ANY_REMOTE_ADDRESS = "192.0.2.1"
"""An address that belongs to no machine. It stands for all machines that the default route leads to."""


def node_number() -> int:
    """Return the number of this node; 0 without torchrun."""
    return int(os.environ.get("GROUP_RANK", "0"))


def has_several_nodes() -> bool:
    """Return whether some ranks run on other nodes than this one."""
    world_size = os.environ.get("WORLD_SIZE", "1")
    return os.environ.get("LOCAL_WORLD_SIZE", world_size) != world_size


def is_on_node_of_main() -> bool:
    """Return whether this process runs on the node of rank 0."""
    return node_number() == 0


def place_of_rank(rank: int) -> str:
    """Return the name of this process for messages: its rank, and its node if there are several."""
    return f"rank {rank} on node {node_number()} ({socket.gethostname()})" if has_several_nodes() else f"rank {rank}"


def checkpoint_facts(plan: Plan) -> dict[str, str]:
    """Return, by name, what must be equal on all ranks and is known without reading any weight.

    These are the versions of the packages, the type of the device, config.json, Python files that may run, and the size
    and the tensors of each file of the checkpoint.
    """
    facts = {
        "llmquant": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": plan.skeleton.device.type,
        "config.json": _short_hash((plan.path / "config.json").read_bytes()),
    }
    tensors: dict[str, list[str]] = {}
    for name, info in sorted(plan.reader.tensors.items()):
        tensors.setdefault(info.file.name, []).append(f"{name} {info.dtype} {tuple(info.shape)} {info.start}")
    for name in code_files(plan.path) if plan.options.trust_remote_code else ():
        facts[name] = _short_hash((plan.path / name).read_bytes())
    for file in plan.reader.shards:
        described = "\n".join(tensors.get(file.name, []))
        facts[file.name] = f"{file.stat().st_size} bytes, tensors {_short_hash(described.encode())}"
    return facts


def _short_hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]


# --- network ---------------------------------------------------------------------------------------------------------


def gloo_interface() -> str | None:
    """Return the network interface through which this rank reaches the others; None if it is not known.

    Ranks that torchrun started on one machine use its loopback interface. Otherwise, it is the interface on the way to
    MASTER_ADDR. On the machine that has this address, its name may lead to the loopback interface, which the others
    cannot reach; then it is the interface of the default route.
    """
    if "LOCAL_WORLD_SIZE" in os.environ and not has_several_nodes():
        return LOOPBACK
    master = os.environ.get("MASTER_ADDR", "")
    address = _own_address(master)
    if address is not None and address.startswith("127.") and master != "localhost" and not master.startswith("127."):
        address = _own_address(ANY_REMOTE_ADDRESS) or address
    return None if address is None else _interface_of(address)


def _own_address(host: str) -> str | None:
    """Return this machine's IPv4 address on the way to a host; None if there is no way. Nothing is sent."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))
            return probe.getsockname()[0]
    except OSError:
        return None


def _interface_of(address: str) -> str | None:
    """Return the network interface that has an IPv4 address; None if it is not known."""
    if address.startswith("127."):
        return LOOPBACK
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe, GET_ADDRESS, struct.pack("256s", name.encode()))
            except OSError:  # the interface has no such address, or the system is not Linux
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None
