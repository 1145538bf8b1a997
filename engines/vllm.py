"""vLLM beside the trainer: the engine to sample with on a GPU; its CPU build is tested here.

    pip install -e ".[vllm]"                                # on a machine with a GPU
    python train_grpo.py --config calc.py --engine=vllm

One request a turn, token ids in and out; turns and groups that begin alike share vLLM's prefix
cache. What an update changed goes over before the next step:

- adapters (tune=lora, qlora) as files in memory, under a new number for each version, never merged.
  The base of qlora is its rounded weights, written out: what the trainer multiplies with;
- full weights on a GPU by CUDA IPC, vLLM's own weight transfer, and elsewhere as a file in memory.

Images go as they were shown, so that vLLM has only to normalise them, with one placeholder for each
in the ids. vLLM writes the ids that stand for them by itself: they are compared with the trainer's
at every request.

vLLM runs in a process of its own that ends with this one, however this one ends.
"""

import asyncio
import logging
import os
import shutil
import signal
import tempfile
from collections import Counter
from multiprocessing import resource_tracker
from pathlib import Path

import torch

from engines.base import Completion, Engine, Sampling, turn_end
from learning import model as models
from learning import optim, whole
from learning.vision import Vision, collapse
from run.config import UserError

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # of adapters, that vLLM has room for


def _package():
    """Imports vllm as it has to be."""
    # Read when vllm is imported, and by its processes. No statistics are sent to anybody.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    # forked, its process would inherit the threads and the memory of this one
    os.environ.setdefault("VLLM_WORKER_MULTIPROCESSING_METHOD", "spawn")
    import vllm
    import vllm.v1.engine.exceptions

    return vllm


async def start(
    name: str,
    policy=None,
    dtype: str = "float32",
    full: bool = False,
    lora_r: int = 0,
    sleeps: bool = True,
    tensor_parallel_size: int = 1,
    kv_cache_gib: float = 0.0,
    vision: Vision | None = None,
    trains_tower: bool = False,
    **vllm_options,
) -> "VllmEngine":
    """Starts vLLM on the model `name`, or on an adapter and its base; takes half a minute.

    policy: the model that is trained, or None; needed where its base is rounded (qlora). full:
    whole weights will be synced; lora_r: adapters of this rank will be. sleeps: gives its GPU
    memory away between rollouts. kv_cache_gib: 0 is what gpu_memory_utilization leaves on a GPU,
    and 1 on a CPU. vision: None where no image will come: a tower is left out then. trains_tower:
    adapters will have layers of it. vllm_options: of vLLM's own, max_model_len among them. To be
    awaited on the event loop on which the engine will be used. UserError if it does not start.
    """
    vllm = _package()
    has_gpu = torch.cuda.is_available()
    is_adapter = models.is_adapter(name)
    compute_dtype = torch.float32 if dtype == "float32" else torch.bfloat16  # mixed: its products
    sleeps = sleeps and has_gpu
    by_ipc = full and has_gpu and tensor_parallel_size == 1

    rank = lora_r
    if is_adapter:
        models.check_usable_alone(name)
    if is_adapter and not rank:
        rank = models.adapter_settings(name)["r"]
    options = {
        "tokenizer": models.find(name),
        "dtype": _name_of(compute_dtype),
        "tensor_parallel_size": tensor_parallel_size,
        "enable_sleep_mode": sleeps,
        **vllm_options,
        **_fixed_options(has_gpu, kv_cache_gib, vllm_options["max_model_len"]),
        **_adapter_options(rank),
    }
    if vision is not None:
        options |= _vision_options(vision, vllm_options["max_model_len"])
        if rank and (trains_tower or (is_adapter and whole.is_of_tower(models.find(name)))):
            options["enable_tower_connector_lora"] = True
    elif whole.has_tower(models.base_of(name)):
        options["language_model_only"] = True  # its tower would take memory, and no image comes
    if by_ipc:  # its handles are pickled, between processes of one user on one machine
        os.environ.setdefault("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
        options["weight_transfer_config"] = vllm.config.WeightTransferConfig(backend="ipc")

    if policy is not None and models.is_quantized(policy):
        # two 4-bit weights count as one; written out, each takes four bytes at most
        with _folder(8 * optim.count(policy)[1]) as folder:
            models.save_dequantized(policy, name, dtype, folder)
            llm = _started(options | {"model": folder})
    else:
        llm = _started(options | {"model": models.base_of(name)})
    engine = VllmEngine(llm, compute_dtype, full, sleeps, by_ipc, sees=vision is not None)
    try:
        await engine.begin(models.find(name) if is_adapter else "")
    except BaseException:
        await engine.close()
        raise
    return engine


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _fixed_options(has_gpu: bool, kv_cache_gib: float, max_model_len: int) -> dict:
    """Collects the options that do not depend on the model."""
    options = {
        "enable_prefix_caching": True,
        "logprobs_mode": "processed_logprobs",  # of the distribution that was sampled from
        "generation_config": "vllm",  # the model's own would add stop tokens and a top_p
        "worker_extension_cls": "engines.worker.Worker",
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
    }
    if not has_gpu:
        # A prompt in chunks ends vLLM's process on a CPU, where noise has a seed for each request
        # ("CPU Generator does not use offset", 0.32).
        options["enable_chunked_prefill"] = False
        options["max_num_batched_tokens"] = max(2048, max_model_len)
    if kv_cache_gib or not has_gpu:
        options["kv_cache_memory_bytes"] = int((kv_cache_gib or 1) * 2**30)
    return options


def _adapter_options(rank: int) -> dict:
    """Gives the options for adapters of this rank; none for 0."""
    if rank > RANKS[-1]:
        raise UserError(f"lora_r = {rank}: vLLM takes at most {RANKS[-1]}")
    if not rank:
        return {}
    return {
        "enable_lora": True,
        "max_lora_rank": next(size for size in RANKS if size >= rank),
        # two: requests that are still being sampled keep the adapter that they began with
        "max_loras": 2,
        "max_cpu_loras": 2,
    }


def _vision_options(vision: Vision, max_model_len: int) -> dict:
    """Gives the options for models that are shown images."""
    # as many images as there is room for, each of a token at least: max_tokens is the limit
    options = {"limit_mm_per_prompt": {"image": max_model_len, "video": 0}}
    if vision.family.has_grid:
        # what is set aside for an image is for one of the size that is shown, and that fits
        side = vision.processor.patch_size * vision.processor.merge_size
        smallest = vision.processor.size["shortest_edge"]
        largest = min(vision.processor.size["longest_edge"], max_model_len * side**2)
        size = {"shortest_edge": min(smallest, largest), "longest_edge": largest}
        options["mm_processor_kwargs"] = {"size": size}
    else:
        # PIL's: torchvision's makes another small image of the whole, 7e-4 to 2e-3 in logprobs.
        # (`backend="pil"`, its newer name, ends SmolVLM's processor: its videos have no such one.)
        options["mm_processor_kwargs"] = {"use_fast": False}
    return options


def _started(options: dict):
    """Starts vLLM's AsyncLLM; UserError if it does not start."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    # Ctrl-C goes to all processes of a terminal. Those that are begun here inherit that they do not
    # hear it: vLLM would end, while the trainer still wants to finish its step. Python's resource
    # tracker lifts the block when it starts, so it has to run already.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return AsyncLLM.from_engine_args(AsyncEngineArgs(**options))
    except (ValueError, RuntimeError, OSError) as error:
        why = " ".join(str(error).split())[:300]
        raise UserError(
            f"vLLM did not start on {options['model']!r}: {why} (its own lines are above; set "
            "VLLM_LOGGING_LEVEL=INFO for more)"
        ) from error
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class VllmEngine(Engine):
    """vLLM's AsyncLLM as an engine, made by `start`."""

    def __init__(
        self, llm, dtype: torch.dtype, full: bool, sleeps: bool, by_ipc: bool, sees: bool = False
    ):
        self.llm = llm
        self.dtype = dtype  # of its weights
        self.full = full
        self.sleeps = sleeps
        self.by_ipc = by_ipc
        self.sees = sees  # it has a tower, and may be asked with images
        self.asleep = False
        self.requests = 0  # so far: each has a number
        self.adapters = 0  # so far: each has a number
        self.adapter = None  # vLLM's LoRARequest of the version in use
        self.flying = Counter()  # requests that are being sampled, by version
        self.ready = asyncio.Event()  # clear while full weights are exchanged
        self.ready.set()

    async def begin(self, adapter: str) -> None:
        """Prepares, once, a vLLM that runs. adapter: a folder, to be used until the first sync."""
        # no traceback of its own when its process has died: ours is one sentence
        logging.getLogger("vllm.v1.engine.async_llm").setLevel(logging.CRITICAL)
        await self._alive(self.llm.collective_rpc("end_with", args=(os.getpid(),)))
        if self.by_ipc:
            from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

            request = WeightTransferInitRequest(init_info={"packed": False})
            await self._alive(self.llm.init_weight_transfer_engine(request))
        if adapter:
            await self._adopt(adapter, 0)

    @property
    def has_died(self) -> bool:
        return self.llm.errored

    async def generate(self, ids: list[int], images: list, sampling: Sampling) -> Completion:
        from vllm import SamplingParams

        params = SamplingParams(
            temperature=sampling.temperature,
            top_p=1.0,
            seed=sampling.seed,
            max_tokens=sampling.max_new_tokens,
            stop_token_ids=list(sampling.stop_ids),
            ignore_eos=True,  # only what the format says ends a turn
            stop=list(sampling.stop_strings),
            detokenize=bool(sampling.stop_strings),
            skip_special_tokens=False,
            logprobs=0,  # of the sampled token alone
            output_kind=_final_only(),
        )
        out = (await self._ask(ids, images, params)).outputs[0]
        finish = turn_end(out.finish_reason, out.stop_reason)
        new = list(out.token_ids)
        pairs = zip(new, out.logprobs, strict=True)
        logprobs = [by_token[token].logprob for token, by_token in pairs]
        return Completion(new, logprobs, finish)

    async def prompt_logprobs(self, ids: list[int], images: list = ()) -> list[list[float]]:
        from vllm import SamplingParams

        params = SamplingParams(
            temperature=0.0, max_tokens=1, prompt_logprobs=0, output_kind=_final_only()
        )
        out = await self._ask(ids, images, params)
        pairs = zip(ids[1:], out.prompt_logprobs[1:], strict=True)
        return [[by_token[token].logprob for token, by_token in pairs]]

    async def _ask(self, ids: list[int], images: list, params):
        """Returns vLLM's last word on one request."""
        await self.ready.wait()
        version = self.version
        adapter = self.adapter
        self.requests += 1
        # salted: whatever another version has left in the prefix cache is never used
        prompt = {"prompt_token_ids": ids, "cache_salt": f"version {version}"}
        if images:
            prompt["prompt_token_ids"] = collapse(ids, images)
            prompt["multi_modal_data"] = {"image": [picture.shown for picture in images]}
            prompt["mm_processor_kwargs"] = {"do_resize": False}  # each has its size already
        answers = self.llm.generate(prompt, params, str(self.requests), lora_request=adapter)
        self.flying[version] += 1
        try:
            async for answer in answers:
                out = answer  # there is only one, when all is sampled
        except _package().v1.engine.exceptions.EngineDeadError:
            raise _dead() from None
        except ValueError as error:
            if not images:
                raise
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"vLLM refuses a prompt with {len(images)} images: {reason}") from error
        finally:
            self.flying[version] -= 1
        if out.prompt_token_ids != ids:
            raise UserError(_other_ids(ids, out.prompt_token_ids, images))
        return out

    async def _alive(self, call):
        """Returns the result of a call to vLLM's process. UserError if that dies meanwhile: vLLM
        itself would wait for ever."""
        task = asyncio.ensure_future(call)
        try:
            while not task.done():
                await asyncio.wait((task,), timeout=0.5)
                if not task.done() and self.llm.errored:
                    raise _dead()
            return task.result()
        except _package().v1.engine.exceptions.EngineDeadError:
            raise _dead() from None
        finally:
            task.cancel()

    async def sync(self, model, version: int) -> None:
        """Makes vLLM sample, from now on, from these weights. What is being sampled keeps those it
        began with: with adapters both are there for a while, full weights wait for it, and what is
        asked for meanwhile waits for them. Wakes vLLM's weights if it sleeps, but not its cache:
        `wake` does, when the trainer has given back its memory."""
        if self.asleep:
            torch.cuda.empty_cache()  # what the trainer has kept for its next step
            await self._alive(self.llm.wake_up(["weights"]))
        if models.adapters_of(model):
            size = sum(p.nbytes for p in model.parameters() if p.requires_grad)
            with _folder(size) as folder:
                models.save_adapter(model, folder)
                await self._adopt(folder, version)
        else:
            self.ready.clear()
            try:
                await self._drain(self.version)
                if self.by_ipc:
                    await self._hand_over(model)
                else:
                    await self._write(model)
                if self.sees:  # what the old tower made of an image; a known one would end vLLM
                    await self._alive(self.llm.reset_encoder_cache())
                self.version = version
            finally:
                self.ready.set()
        await self._alive(self.llm.reset_prefix_cache())

    async def _adopt(self, folder: str, version: int) -> None:
        """Samples from the adapter in `folder`, and drops the one before it when nobody uses it."""
        from vllm.lora.request import LoRARequest

        old_adapter = self.adapter
        old_version = self.version
        self.adapters += 1  # a number never stands for two adapters
        adapter = LoRARequest(f"version-{version}-{self.adapters}", self.adapters, folder)
        await self._alive(self.llm.add_lora(adapter))
        self.adapter = adapter
        self.version = version
        if old_adapter:
            await self._drain(old_version)
            await self._alive(self.llm.remove_lora(old_adapter.lora_int_id))

    async def _drain(self, version: int) -> None:
        """Waits until nobody is sampled from this version any more."""
        while self.flying[version]:
            await asyncio.sleep(0.01)

    async def _write(self, model) -> None:
        """Gives vLLM full weights through a file in memory."""
        from safetensors.torch import save_file

        weights = dict(self._weights(model))
        with _folder(sum(weight.nbytes for weight in weights.values())) as folder:
            file = Path(folder) / "weights.safetensors"
            save_file(weights, file)
            del weights  # or they would be here, in the file, and in vLLM at once
            await self._alive(self.llm.collective_rpc("take_weights", args=(str(file),)))

    def _weights(self, model) -> list[tuple[str, torch.Tensor]]:
        """Lists (name, weight) of all weights, as vLLM takes them."""
        return [
            (name, weight.to(self.dtype).contiguous()) for name, weight in models.weights_of(model)
        ]

    async def _hand_over(self, model) -> None:
        """Gives vLLM full weights from GPU memory to GPU memory, by handles to it."""
        from torch.multiprocessing.reductions import reduce_tensor
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        gpu = str(torch.cuda.get_device_properties(model.device).uuid)
        pairs = self._weights(model)
        info = {
            "names": [name for name, _ in pairs],
            "dtype_names": [_name_of(self.dtype)] * len(pairs),
            "shapes": [list(weight.shape) for _, weight in pairs],
            "ipc_handles": [{gpu: reduce_tensor(weight)[1]} for _, weight in pairs],
        }
        torch.cuda.synchronize()
        request = WeightTransferUpdateRequest(update_info=info)
        await self._alive(self.llm.start_weight_update())
        await self._alive(self.llm.update_weights(request))
        await self._alive(self.llm.finish_weight_update())
        del pairs  # not before: a handle does not keep the memory that it points to
        torch.cuda.ipc_collect()

    async def sleep(self) -> None:
        """Gives vLLM's GPU memory to the trainer: the cache, and the weights too, which go to main
        memory (adapters) or nowhere (full: the next sync brings all of them). On a CPU nothing."""
        if self.sleeps and not self.asleep:
            await self._alive(self.llm.sleep(level=2 if self.full else 1))
            self.asleep = True

    async def wake(self) -> None:
        """Takes the memory of the cache back, after a sync."""
        if self.asleep:
            await self._alive(self.llm.wake_up(["kv_cache"]))
            self.asleep = False

    async def close(self) -> None:
        self.llm.shutdown()
        self.llm.shutdown = lambda: None  # which its __del__ calls, when modules are gone already


def _final_only():
    from vllm.sampling_params import RequestOutputKind

    return RequestOutputKind.FINAL_ONLY


def _other_ids(ours: list[int], theirs: list[int], images: list) -> str:
    """Says that vLLM sampled behind another prompt than the trainer's."""
    told = f"vLLM confirms a prompt of {len(theirs)} other token ids than the {len(ours)} it is for"
    if not images:
        return told
    return (
        f"{told}, with {len(images)} images in it: its image processor is set otherwise than that "
        "of the trainer, so get all files of the model (processor_config.json), or use "
        "engine=transformers"
    )


def _dead() -> UserError:
    return UserError(
        "vLLM's process has died (killed for memory? its own lines are above): what was saved is "
        "whole, so go on with --resume=true"
    )


def _folder(size: int) -> tempfile.TemporaryDirectory:
    """Makes a folder in memory if `size` bytes fit twice, else on the disk, as in a container whose
    /dev/shm is too small for anything."""
    memory = Path("/dev/shm")
    place = None  # the disk
    if memory.is_dir() and os.access(memory, os.W_OK):
        if shutil.disk_usage(memory).free > 2 * size:
            place = memory
    return tempfile.TemporaryDirectory(prefix="nanotool-", dir=place)
