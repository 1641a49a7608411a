"A stage on its way: what a killed training goes on from, epoch by epoch."
import io
from pathlib import Path

import torch
from fastai.callback.core import Callback
from fastai.learner import Learner
from fastai.torch_core import get_model
from fastcore.foundation import L

from aptos_fastai.common.console import say
from aptos_fastai.common.io import file_hash, read_record, write_bytes, write_record

BEST = 'best.safetensors'                    # of a training that could not end
NOTE = 'checkpoint.json'                     # names the file that counts, with its hash; written after it


class Checkpoint(Callback):
    """Writes after every epoch all that the next one depends on: weights, optimizer, the epochs so far with the best one's weights, the moving average.

    Order and augmentation of an epoch depend on its number alone (`callbacks.Reproducible`), so that a resumed training is, on the CPU, equal to the bit.
    `parts` are the callbacks with a state of their own (`state`, `load`).
    """
    order = 65                               # after History
    def __init__(self, folder: Path, key: str, parts: list): self.folder, self.key, self.parts, self.resumed = Path(folder), key, parts, []

    def after_epoch(self):
        n = len(self.parts[0].rows)
        if n == self.begun: return           # an epoch that is skipped on the way to where it stopped
        buffer, file = io.BytesIO(), f'checkpoint-{n}.pt'
        torch.save(dict(model=get_model(self.model).state_dict(), opt=_plain(self.opt.state_dict()), parts=[p.state() for p in self.parts]), buffer)
        write_bytes(self.folder / file, buffer.getbuffer())
        write_record(self.folder / NOTE, dict(key=self.key, file=file, hash=file_hash(self.folder / file), epochs=n, resumed=self.resumed))
        self.begun = n
        for f in self.folder.glob('checkpoint-*.pt'):
            if f.name != file: f.unlink(missing_ok=True)

    def load(self, learn: Learner) -> dict | None:
        "Puts weights and `parts` as they were after the last finished epoch of this very training, and returns the optimizer's state; None where there is none"
        self.begun = 0
        o = read_record(self.folder / NOTE)
        if not o or o['key'] != self.key: return None
        path = self.folder / Path(o['file']).name
        if not path.is_file() or file_hash(path) != o['hash']:
            say(f'  {path}: is not what this run wrote (its hash differs): not loaded, the stage begins anew', 'yellow')
            return None
        saved = torch.load(path, map_location='cpu', weights_only=True)
        learn.model.load_state_dict(saved['model'])
        for p, s in zip(self.parts, saved['parts'], strict=True): p.load(s, learn.model)
        self.begun, self.resumed = o['epochs'], [*o['resumed'], o['epochs']]
        return dict(state=saved['opt']['state'], hypers=L(saved['opt']['hypers']))


def _plain(opt: dict) -> dict:
    "fastai's optimizer state in types that load without a pickle's freedom"
    return dict(state=[dict(s) for s in opt['state']], hypers=[{k: float(v) for k, v in h.items()} for h in opt['hypers']])


def epochs_kept(folder: Path) -> int:
    "Finished epochs that a training in `folder` could go on from"
    o = read_record(Path(folder) / NOTE)
    return o['epochs'] if o else 0


def clear_checkpoint(folder: Path):
    "The stage is finished: nothing is left to go on from, nor of an earlier attempt that could not end"
    for f in [Path(folder) / NOTE, Path(folder) / BEST, *Path(folder).glob('checkpoint-*.pt')]: f.unlink(missing_ok=True)
