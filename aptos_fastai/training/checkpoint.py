"Save and resume a stage's training state every epoch."
import io
from pathlib import Path

import torch
from fastai.callback.core import Callback
from fastai.learner import Learner
from fastai.torch_core import get_model

from aptos_fastai.common.console import say
from aptos_fastai.common.io import AptosError, file_hash, read_record, verify_file, write_bytes, write_record
from aptos_fastai.training.callbacks import EMACallback, History
from aptos_fastai.training.optimizer import optimizer_state

BEST_WEIGHTS = 'best.safetensors'            # the best epoch of a training that diverged
CHECKPOINT_RECORD = 'checkpoint.json'        # names the current checkpoint file and its hash; written after it


class Checkpoint(Callback):
    """Save a checkpoint after every epoch and resume from it.

    It holds the weights, the optimizer's state and the states of `history` and `ema`. `key` identifies the settings,
    data and parents of the training: a checkpoint with another key is ignored, with a message. `callbacks.Reproducible`
    seeds each epoch by its number, so on the CPU a resumed training is bit for bit the same as an uninterrupted one.
    """
    order = 65                               # after History
    def __init__(self, folder: Path, key: str, history: History, ema: EMACallback | None = None):
        self.folder, self.key, self.hist = Path(folder), key, history
        self.stateful: list[History | EMACallback] = [history] if ema is None else [history, ema]
        self.saved_epochs = 0
        self.resumed: list[int] = []         # the epochs after which this training was resumed

    def after_epoch(self) -> None:
        epochs = len(self.hist.rows)
        if epochs == self.saved_epochs: return           # an epoch that `start_epoch` skips
        state = dict(model=get_model(self.model).state_dict(), opt=optimizer_state(self.opt),
                     callbacks=[cb.state_dict() for cb in self.stateful])
        buffer = io.BytesIO()
        torch.save(state, buffer)
        file = self.folder / f'checkpoint-{epochs}.pt'
        write_bytes(file, buffer.getbuffer())
        write_record(self.folder / CHECKPOINT_RECORD,
                     dict(key=self.key, file=file.name, hash=file_hash(file), epochs=epochs, resumed=self.resumed))
        self.saved_epochs = epochs
        for old in self.folder.glob('checkpoint-*.pt'):
            if old.name != file.name: old.unlink(missing_ok=True)

    def load(self, learn: Learner) -> dict | None:
        "Restore weights and callbacks from the checkpoint and return the optimizer's state; without a checkpoint, None"
        record = read_record(self.folder / CHECKPOINT_RECORD)
        if not record: return None
        if record['key'] != self.key:
            say(f'  {self.folder}: its checkpoint is of other settings or images, so training starts over', 'yellow')
            return None
        file = self.folder / Path(record['file']).name
        try: verify_file(file, record['hash'], 'The checkpoint is ignored and the stage restarts.')
        except AptosError as e:
            say(f'  {e}', 'yellow')
            return None
        saved = torch.load(file, map_location='cpu', weights_only=True)
        learn.model.load_state_dict(saved['model'])
        for cb, state in zip(self.stateful, saved['callbacks'], strict=True): cb.load_state_dict(state, learn.model)
        self.saved_epochs, self.resumed = record['epochs'], [*record['resumed'], record['epochs']]
        return saved['opt']


def finished_epochs(folder: Path) -> int:
    "Return how many epochs the checkpoint in `folder` holds"
    record = read_record(Path(folder) / CHECKPOINT_RECORD)
    return record['epochs'] if record else 0


def clear_checkpoint(folder: Path) -> None:
    "Delete the checkpoint of a finished stage, and the best weights of earlier attempts"
    for f in [Path(folder) / CHECKPOINT_RECORD, Path(folder) / BEST_WEIGHTS, *Path(folder).glob('checkpoint-*.pt')]:
        f.unlink(missing_ok=True)
