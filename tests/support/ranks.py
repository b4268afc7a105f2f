"""Ranks of a run in processes of their own, as torchrun starts them, but forked from one that has torch loaded."""

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["erd_fast.training.loop", "erd_fast.report"])
_LIMIT_S = 120


def run_ranks(size: int, call: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What ``call(*arguments)`` gives on each of ``size`` ranks; where one raises, an error with its traceback."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results = _CONTEXT.Queue()
    processes = [
        _CONTEXT.Process(target=_rank, args=(rank, size, port, dict(os.environ), results, call, arguments))
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    try:
        found = dict(results.get(timeout=_LIMIT_S) for _ in processes)
    finally:
        for process in processes:
            process.join(timeout=10)
            process.kill()
    failed = [text for kind, text in found.values() if kind == "error"]
    if failed:
        raise AssertionError(failed[0])
    return [found[rank][1] for rank in range(size)]


def _rank(rank, size, port, environment, results, call, arguments) -> None:
    import torch

    os.environ.update(environment)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1")
    os.environ.update(MASTER_PORT=str(port), CUDA_VISIBLE_DEVICES="")
    torch.set_num_threads(1)
    try:
        results.put((rank, ("value", call(*arguments))))
    except BaseException:
        results.put((rank, ("error", traceback.format_exc())))
