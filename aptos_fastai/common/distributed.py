"""Run on several processes, started by `torchrun run.py all` or `accelerate launch run.py all`.

Rank 0 walks the graph and writes files; the other ranks wait in `worker_loop` for jobs from rank 0.
With one process every function here does its job alone. torch is imported only when there are several processes.
"""
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from aptos_fastai.common.console import Bars, console

PEER_LOST = ('lost the connection to another process of this run. Read its error message, or that of the launcher; '
             'then run the same command again to resume')
JOB_TIMEOUT = timedelta(days=30)             # the other ranks wait this long while rank 0 works alone

_job_group: Any = None                       # process group through which rank 0 broadcasts jobs


def world_size() -> int:
    "Return the number of processes of this run"
    return int(os.environ.get('WORLD_SIZE') or 1)


def rank() -> int:
    "Return the rank of this process; rank 0 leads"
    return int(os.environ.get('RANK') or 0)


def local_world_size() -> int:
    "Return the number of processes on this machine"
    return int(os.environ.get('LOCAL_WORLD_SIZE') or world_size())


def cores() -> int:
    "Return the number of CPU cores for this process: its share of the cores that the machine, Slurm or taskset allows"
    try: n = len(os.sched_getaffinity(0))
    except AttributeError: n = os.cpu_count() or 1     # macOS and Windows
    return max(1, n // local_world_size())


@contextmanager
def process_group() -> Iterator[bool]:
    """Connect the processes while the block runs; yield True in rank 0.

    If a process fails, it ends, and the others lose the connection and end too.
    """
    global _job_group
    if world_size() == 1:
        yield True
        return
    import torch
    import torch.distributed as dist
    cuda = torch.cuda.is_available()
    if cuda: torch.cuda.set_device(int(os.environ.get('LOCAL_RANK', 0)))
    elif os.environ.get('OMP_NUM_THREADS', '1') == '1': torch.set_num_threads(cores())     # torchrun sets 1 by default
    dist.init_process_group('cpu:gloo,cuda:nccl' if cuda else 'gloo')
    _job_group = dist.new_group(backend='gloo', timeout=JOB_TIMEOUT)
    console.quiet = rank() > 0
    yield rank() == 0
    if rank() == 0: _broadcast_job(None)
    _job_group = None
    dist.barrier()
    dist.destroy_process_group()


def is_peer_lost(e: BaseException) -> bool:
    "Return whether a PyTorch exception means that another process has ended"
    if world_size() == 1 or not isinstance(e, RuntimeError): return False
    return any(word in str(e).lower() for word in ('gloo', 'nccl', 'connection', 'peer'))


def _broadcast_job(job: Any) -> Any:
    "Send `job` from rank 0 to every rank; return what rank 0 sent"
    import torch.distributed as dist
    objects = [job]
    dist.broadcast_object_list(objects, 0, group=_job_group)
    return objects[0]


def worker_loop() -> None:
    "Run the jobs that rank 0 sends until it sends None"
    with Bars() as bars:
        while True:
            try: received = _broadcast_job(None)
            except RuntimeError: sys.exit(1)           # rank 0 has ended and has printed why
            if received is None: return
            job, args = received
            job(bars, *args)


def run_on_all_ranks(job: Callable, bars: Bars, *args: Any) -> Any:
    """Run `job(bars, *args)` on every rank; return the result of this rank.

    `job` is a module-level function, so that it can be pickled; it may use `shard` and `all_gather`.
    """
    if world_size() > 1: _broadcast_job((job, args))
    return job(bars, *args)


def shard(n: int) -> range:
    "Return which of `n` items this rank processes: every `world_size`-th"
    return range(rank(), n, world_size())


def all_gather(results: Sequence) -> list:
    "Return the results of all ranks in the order of the items; `results` are this rank's, for its `shard`"
    if world_size() == 1: return list(results)
    import torch.distributed as dist
    of_rank: list[Any] = [None] * world_size()
    dist.all_gather_object(of_rank, list(results))
    total = sum(map(len, of_rank))
    return [of_rank[i % world_size()][i // world_size()] for i in range(total)]
