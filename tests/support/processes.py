"""Functions that run in several processes with a process group of gloo, and give what they return.

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
"""Seconds after which a collective that others do not take part in fails."""


ENDED = "it ended without a result: it was killed, or its function could not be imported"


class ProcessFailedError(AssertionError):
    """What has gone wrong in one of several processes."""


def run_processes(number: int, function: Callable[..., Any], *args: Any, timeout: int = TIMEOUT) -> list[Any]:
    """What `function(*args)` returns in each of `number` processes, by rank; all arguments and results are pickled.

    Raises:
        ProcessFailedError: with the tracebacks of those that have failed.
    """
    outcomes = outcomes_of_processes(number, function, *args, timeout=timeout)
    failures = [f"process {rank}:\n{outcome[1]}" for rank, outcome in enumerate(outcomes) if not outcome[0]]
    if failures:
        raise ProcessFailedError("\n".join(failures))
    return [value for _, value in outcomes]


def outcomes_of_processes(
    number: int, function: Callable[..., Any], *args: Any, timeout: int = TIMEOUT
) -> list[tuple[bool, Any]]:
    """Of each process (True, what `function(*args)` has returned), or (False, a traceback)."""
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
    """`args` and the result are pickled here: multiprocessing would share the memory of tensors with who has ended."""
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
    """A port that nobody listens on now, for programs that start a process group of their own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
