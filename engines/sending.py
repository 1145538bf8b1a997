"""Full weights on their way to a `vllm serve` without a file: over the network by gloo, or from GPU
to GPU by NCCL. The other end is `received` in engines/worker.py.

    sender = Sender("nccl", "http://gpu7:8000", workers=2, weights=weights)
    # the server is told sender.address and sender.port, and to receive; meanwhile
    sender.send()
    sender.close()

Each transfer has a group of its own, of the trainer and the workers of one server: nothing is left
of it, so a server that was started anew needs nothing else.
"""

import json
import socket
import time
from urllib.parse import urlsplit

import torch
import torch.distributed as dist

from engines.worker import STUCK, bytes_of, join

EVERY = 0.01  # seconds between looks at who has joined


class Sender:
    """One transfer to one server, whose model `workers` processes share.

    weights: (name, tensor) on the CPU. Raises OSError where the server is not reached.
    """

    def __init__(self, transport: str, url: str, workers: int, weights: list):
        self.transport = transport
        self.workers = workers
        self.weights = weights
        self.is_closed = False
        self.group = None
        # to be reached from there, and from nowhere else
        self.address, listener = _listen_towards(url)
        self.port = listener.getsockname()[1]
        self.store = dist.TCPStore(
            self.address,
            self.port,
            is_master=True,
            wait_for_workers=False,
            timeout=STUCK,
            master_listen_fd=listener.detach(),
        )
        tensors = []
        for name, tensor in weights:
            tensors.append((name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)))
        self.store.set("said", json.dumps({"size": 1 + workers, "tensors": tensors}))

    def send(self) -> None:
        """Sends all weights, one after another, as soon as the workers have joined. Raises
        RuntimeError where one of them is lost."""
        while self.store.add("joined", 0) < self.workers:
            if self.is_closed:
                return
            time.sleep(EVERY)
        self.group = join(self.transport, self.store, 0, 1 + self.workers, self.address)
        for _, tensor in self.weights:
            if self.is_closed:
                return
            if self.transport == "nccl":
                tensor = tensor.cuda()
            self.group.broadcast(bytes_of(tensor), 0).wait()
        if self.transport == "nccl":
            torch.cuda.synchronize()

    def close(self) -> None:
        """Ends it, whether all was sent or not."""
        self.is_closed = True
        if self.group is not None:
            self.group.abort()


def _listen_towards(url: str) -> tuple[str, socket.socket]:
    """Opens a port on the address from which this machine reaches a server."""
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    with socket.create_connection((parts.hostname, port), timeout=5.0) as connection:
        address = connection.getsockname()[0]
        listener = socket.socket(connection.family)
    listener.bind((address, 0))
    listener.listen()
    return address, listener


def check(transport: str) -> None:
    """Checks that this machine has a transport. Raises ValueError with the reason."""
    if transport == "nccl" and not (torch.cuda.is_available() and dist.is_nccl_available()):
        raise ValueError("there is no GPU here that NCCL could send from: use transport=gloo")
