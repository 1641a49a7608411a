"""More processes than one: under `torchrun run.py all` or `accelerate launch run.py all` the first of them leads: it walks the graph and writes;
the others do their part of each job that it hands out. With one process every function here is its plain self. Imports torch only where there are more."""
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

from aptos_fastai.common.console import Bars, console

LOST = 'lost touch with another process of this run; if that has ended, its own line, or the launcher, says why; the same command goes on from there'
_jobs = None                                 # the group that jobs are handed out by: waits as long as the leader is at work by itself


def world_size() -> int:
    "Processes of this run"
    return int(os.environ.get('WORLD_SIZE') or 1)


def rank() -> int:
    "Which of them this is; 0 leads"
    return int(os.environ.get('RANK') or 0)


def local_world_size() -> int:
    "Those of them on this machine"
    return int(os.environ.get('LOCAL_WORLD_SIZE') or world_size())


def cores() -> int:
    "CPU cores that this process may use: those of its machine (or Slurm task, or set of processors) shared with its neighbours"
    try: n = len(os.sched_getaffinity(0))
    except AttributeError: n = os.cpu_count() or 1     # macOS, Windows
    return max(1, n // local_world_size())


@contextmanager
def process_group() -> Iterator[bool]:
    "The processes know each other while the block runs; True for the one that leads. A process that fails ends, and the others with it: none waits for it"
    global _jobs
    if world_size() == 1: yield True; return
    import torch
    import torch.distributed as dist
    cuda = torch.cuda.is_available()
    if cuda: torch.cuda.set_device(int(os.environ.get('LOCAL_RANK', 0)))
    elif os.environ.get('OMP_NUM_THREADS', '1') == '1': torch.set_num_threads(cores())      # 1 is what torchrun sets where nobody has
    dist.init_process_group('cpu:gloo,cuda:nccl' if cuda else 'gloo')
    _jobs = dist.new_group(backend='gloo', timeout=timedelta(days=30))
    console.quiet = rank() > 0
    yield rank() == 0
    if rank() == 0: _hand_out(None)
    _jobs = None
    dist.barrier()
    dist.destroy_process_group()


def is_peer_lost(e: BaseException) -> bool:
    "Whether an exception of PyTorch's says that another process is gone"
    return world_size() > 1 and isinstance(e, RuntimeError) and any(o in str(e).lower() for o in ('gloo', 'nccl', 'connection', 'peer'))


def _hand_out(o):
    import torch.distributed as dist
    box = [o]
    dist.broadcast_object_list(box, 0, group=_jobs)
    return box[0]


def worker_loop():
    "Does what the leader hands out, until it has nothing more"
    with Bars() as bars:
        while True:
            try: o = _hand_out(None)
            except RuntimeError: sys.exit(1)           # the leader has ended, and said why
            if o is None: return
            job, args = o
            job(bars, *args)


def run_on_all_ranks(job: Callable, bars: Bars, *args):
    "`job(bars, *args)` in every process; what the leader's returns. `job` is a function of a module, it may use `mine` and `collect`"
    if world_size() > 1: _hand_out((job, args))
    return job(bars, *args)


def shard(n: int) -> range:
    "Of `n` things those that this process does"
    return range(rank(), n, world_size())


def all_gather(parts: Sequence) -> list:
    "What every process made of its `mine`, in the order of the whole"
    if world_size() == 1: return list(parts)
    import torch.distributed as dist
    found = [None] * world_size()
    dist.all_gather_object(found, list(parts))
    return [found[i % world_size()][i // world_size()] for i in range(sum(map(len, found)))]
