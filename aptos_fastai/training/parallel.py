"A stage's training in several processes: fastai's distributed trainer, on gloo as on NCCL."

import torch.distributed as dist
from fastai.data.core import TfmdDL
from fastai.distributed import DistributedDL, DistributedTrainer
from torch import cuda


class PartDL(DistributedDL):
    "Each process's part of a DataLoader: fastai's own needs CUDA for its broadcast, and counts a batch too many where the last is dropped"
    def _broadcast(self, t: list[int], rank: int) -> list[int]:
        box = [t]
        dist.broadcast_object_list(box, rank)
        return box[0]

    def __len__(self) -> int:
        n = -(-len(self.dl.dataset if self.dl.n is None else range(self.dl.n)) // self.world_size)
        return n // self.bs if self.drop_last else -(-n // self.bs)


class DistributedTraining(DistributedTrainer):
    """Every process trains its part of each batch, gradients are averaged (`DistributedDataParallel`), validation scores are gathered:
    the recipe's steps, whatever the number of processes. Batch normalisation counts each process's part. Precision and compilation are the recipe's, whatever
    `accelerate config` says."""
    def __init__(self): super().__init__(sync_bn=False, cpu=not cuda.is_available(), mixed_precision='no', dynamo_backend='no')
    def _wrap_dl(self, dl: TfmdDL) -> PartDL: return dl if isinstance(dl, PartDL) else PartDL(dl, device=self.learn.model.device)
