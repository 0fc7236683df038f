"""Runs functions in several processes with a gloo process group, and returns their results.

The processes are forked from one that has imported torch and transformers and has run nothing: each starts in some
hundredths of a second.
"""

import contextlib
import multiprocessing
import os
import pickle
import socket
import tempfile
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

_PRELOADED = [
    "torch",
    "transformers.models.llama.modeling_llama",
    "torch.distributed.tensor.parallel",
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint.state_dict",
    "melora_fx",
    "melora_fx.rewriting.rewrite",
]

TIMEOUT = 60
"""Seconds after which a collective fails that other processes do not join."""


ENDED = "it ended without a result: it was killed, or its function could not be imported"


class ProcessFailedError(AssertionError):
    """Raised if one of several processes has failed."""


def run_processes(number: int, function: Callable[..., Any], *args: Any, timeout: int = TIMEOUT) -> list[Any]:
    """Returns what `function(*args)` returns in each of `number` processes, by rank; arguments and results are pickled.

    Raises:
        ProcessFailedError: if a process has failed; it contains the tracebacks.
    """
    outcomes = outcomes_of_processes(number, function, *args, timeout=timeout)
    failures = [f"process {rank}:\n{outcome[1]}" for rank, outcome in enumerate(outcomes) if not outcome[0]]
    if failures:
        raise ProcessFailedError("\n".join(failures))
    return [value for _, value in outcomes]


def outcomes_of_processes(
    number: int, function: Callable[..., Any], *args: Any, timeout: int = TIMEOUT
) -> list[tuple[bool, Any]]:
    """Returns, for each process, (True, the result of `function(*args)`) or (False, a traceback)."""
    context = _context()
    pickled = pickle.dumps(args)
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder, "store"))
        pipes = [context.Pipe(duplex=False) for _ in range(number)]
        processes = [
            context.Process(
                target=_run, args=(rank, number, store, timeout, pipes[rank][1], function, pickled), daemon=True
            )
            for rank in range(number)
        ]
        for process in processes:
            process.start()
        for _, sender in pipes:
            sender.close()
        outcomes = [_outcome(receiver) for receiver, _ in pipes]
        for process in processes:
            process.join()
    return outcomes


def _context() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    return context


def _outcome(receiver: Any) -> tuple[bool, Any]:
    try:
        return pickle.loads(receiver.recv_bytes())
    except EOFError:
        return False, ENDED


def _run(
    rank: int, number: int, store: str, timeout: int, sender: Any, function: Callable[..., Any], args: bytes
) -> None:
    """Unpickles `args` and pickles the result: multiprocessing would share tensors' memory with ended processes."""
    import torch
    import torch.distributed as dist

    torch.manual_seed(0)
    warnings.simplefilter("ignore", FutureWarning)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(number),
        "LOCAL_WORLD_SIZE": str(number),
    }
    try:
        file_store = dist.FileStore(store, number)
        dist.init_process_group(
            "gloo", store=file_store, rank=rank, world_size=number, timeout=timedelta(seconds=timeout)
        )
        sender.send_bytes(pickle.dumps((True, function(*pickle.loads(args)))))
    except BaseException:
        with contextlib.suppress(OSError):
            sender.send_bytes(pickle.dumps((False, traceback.format_exc())))
    finally:
        sender.close()
        with contextlib.suppress(Exception):
            dist.destroy_process_group()
        os._exit(0)


def free_port() -> int:
    """Returns a port that is free now, for programs that start their own process group."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
