"""What our code adds to each of vLLM's workers, beside the trainer and in `vllm serve`.

    VLLM_SERVER_DEV_MODE=1 PYTHONPATH=. vllm serve out/calc_sft \
        --worker-extension-cls engines.worker.Worker …

It needs nothing else of nanotool: on another machine, this file in a folder `engines` will do.
"""

import json
import os
import select
import signal
import socket
import threading
from collections.abc import Iterator
from datetime import timedelta

STUCK = timedelta(seconds=120)  # for a connection to be made, or one tensor to go over


def join(transport: str, store, rank: int, size: int, address: str):
    """Makes the group of a trainer, which is rank 0, and a server's workers. It is beside those
    that torch.distributed knows by name, of which both sides have their own. address: of this
    machine, at which the others reach it."""
    import torch.distributed as dist

    if transport == "gloo":
        options = dist.ProcessGroupGloo._Options()
        # else that of the machine's name, which is 127.0.1.1 on many
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=address)]
        kind = dist.ProcessGroupGloo
    else:
        options = dist.ProcessGroupNCCL.Options()
        kind = dist.ProcessGroupNCCL
    options._timeout = STUCK
    return kind(store, rank, size, options)


def address_towards(host: str, port: int) -> str:
    """Returns the address of this machine from which it reaches another one."""
    family, kind, *_, place = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(place)  # nothing is sent
        return probe.getsockname()[0]


def bytes_of(tensor):
    """Returns a tensor's memory as bytes: every transport knows those, whatever the dtype."""
    import torch

    return tensor.flatten().view(torch.uint8)


def received(transport: str, address: str, port: int, device) -> Iterator[tuple]:
    """Yields the (name, tensor) that engines/sending.py sends from there, as they arrive."""
    import torch
    import torch.distributed as dist

    store = dist.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=STUCK)
    said = json.loads(store.get("said"))
    here = address_towards(address, port)
    group = join(transport, store, store.add("joined", 1), said["size"], here)
    for name, dtype, shape in said["tensors"]:
        place = device if transport == "nccl" else "cpu"
        tensor = torch.empty(shape, dtype=getattr(torch, dtype), device=place)
        group.broadcast(bytes_of(tensor), 0).wait()
        yield name, tensor


class Worker:
    """Becomes a base class of vLLM's own worker (its worker_extension_cls)."""

    weights_name = ""  # of the full weights that it was given last; "" for those it began with

    def end_with(self, trainer: int) -> None:
        """Ends vLLM's processes when the trainer was killed: nobody else would."""
        handle = os.pidfd_open(trainer)  # a pid alone may be another's by then

        def watch():
            select.select([handle], [], [])
            if os.getppid() not in (1, trainer):  # this one may be a worker below vLLM's own
                os.kill(os.getppid(), signal.SIGKILL)
            os._exit(1)

        threading.Thread(target=watch, name="end_with", daemon=True).start()

    def what_it_has(self, file: str) -> dict:
        """Says which weights it has, and whether it can read a file of the trainer's."""
        return {"name": self.weights_name, "reads": os.access(file, os.R_OK)}

    def take_weights(self, file: str, name: str = "") -> None:
        """Replaces all weights by those of a safetensors file, by vLLM's own reload. What has that
        name already is not loaded again: several ranks give the same to a server that they share,
        and the first of them may sample from it by then."""
        from safetensors.torch import load_file

        if name and name == self.weights_name:
            return
        self._reload(iter(load_file(file).items()), name)

    def receive_weights(self, transport: str, address: str, port: str, name: str) -> None:
        """Replaces all weights by those that the trainer sends from there, "gloo" or "nccl"."""
        self._reload(received(transport, address, int(port), self.device), name)

    def _reload(self, weights: Iterator[tuple], name: str) -> None:
        self.weights_name = ""
        self.reload_weights(weights_iterator=weights)
        if self.device.type == "cpu":
            self._repack_tied_head()
        self.weights_name = name

    def _repack_tied_head(self) -> None:
        """Makes a tied head multiply with the new embedding: on a CPU it has a packed copy of it,
        made when it was loaded, and the reload replaces the embedding only."""
        from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

        for layer in self.get_model().modules():
            if "cpu_linear" in vars(layer) and layer.weight.numel():
                dispatch_cpu_unquantized_gemm(layer, remove_weight=False)
