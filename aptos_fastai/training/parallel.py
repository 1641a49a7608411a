"Train a stage in several processes: fastai's distributed trainer, on gloo (CPU) and NCCL (GPU)."
import torch.distributed as dist
from fastai.data.core import TfmdDL
from fastai.distributed import DistributedDL, DistributedTrainer
from torch import cuda

from aptos_fastai.training.loaders import ImageDL


class ShardDL(ImageDL, DistributedDL):
    """Load this process's shard of a DataLoader's batches.

    fastai's own class needs CUDA to broadcast the order, and counts one batch too many where the last one is dropped.
    """
    @property
    def source(self) -> TfmdDL:
        "The DataLoader whose shard this is"
        return self.dl

    def _broadcast(self, t: list[int], rank: int) -> list[int]:
        box = [t]
        dist.broadcast_object_list(box, rank)
        return box[0]

    def __len__(self) -> int:
        total = len(self.dl.dataset) if self.dl.n is None else self.dl.n
        n = -(-total // self.world_size)
        return n // self.bs if self.drop_last else -(-n // self.bs)


class DistributedTraining(DistributedTrainer):
    """Train a shard of every batch in each process and average the gradients (`DistributedDataParallel`).

    The steps are the recipe's, whatever the number of processes, but batch normalisation sees one shard at a time.
    Validation scores are gathered. Precision and compilation follow the recipe, not `accelerate config`.
    """
    def __init__(self):
        super().__init__(sync_bn=False, cpu=not cuda.is_available(), mixed_precision='no', dynamo_backend='no')

    def _wrap_dl(self, dl: TfmdDL) -> ShardDL:
        return dl if isinstance(dl, ShardDL) else ShardDL(dl, device=self.learn.model.device)
