import numpy as np
import pandas as pd
import pytest
import torch
from conftest import fundus

from aptos_fastai.common.console import Bars
from aptos_fastai.data.retina import Prep
from aptos_fastai.data.store import prepare_table
from aptos_fastai.inference.views import views
from aptos_fastai.pipeline.scores import predict_scores
from aptos_fastai.recipe import Augment, Stage
from aptos_fastai.training.loaders import (
    BatchAugment,
    FundusAugment,
    draw,
    draw_colour,
    draw_warp,
    get_dls,
    start_epoch,
)
from aptos_fastai.training.model import get_learner

stats = ((.5,) * 3, (.5,) * 3)
stage = Stage(name='t', train=('t',), arch='test_resnet', weights='none', size=32, bs=8, lr=5e-3)
still = Augment(**dict.fromkeys('brightness contrast saturation hue blur rotate shift shear hflip vflip'.split(), 0.), scale=(1., 1.))


@pytest.fixture(scope='module')
def frame(tmp_path_factory):
    import cv2
    d, rng = tmp_path_factory.mktemp('pics'), np.random.default_rng(0)
    for i in range(40): cv2.imwrite(str(d / f'p{i}.png'), fundus(rng, grade=i % 5))
    df = pd.DataFrame(dict(id_code=[f'p{i}' for i in range(40)], path=[str(d / f'p{i}.png') for i in range(40)], source='t',
                           diagnosis=[i % 5. for i in range(40)]))
    with Bars() as bars: df = prepare_table(df, d / 'store', Prep(size=48), bars)
    return df.assign(valid=[i % 4 == 0 for i in range(40)])

def dls(frame, aug=None, **kw): return get_dls(frame, stage, Prep(size=48), aug or Augment(), stats, **kw)


def test_batches(frame):
    d = dls(frame)
    xb, yb = d.train.one_batch()
    assert xb.shape == (8, 3, 32, 32) and xb.dtype == torch.float32 and yb.shape == (8,) and -1.001 <= xb.min() < xb.max() <= 1.001
    assert len(d.train_ds) == 30 and len(d.valid_ds) == 10

def test_validation_and_prediction_are_never_augmented(frame):
    a, b = dls(frame), dls(frame, still)
    assert torch.equal(torch.cat([o[0] for o in a.valid]), torch.cat([o[0] for o in b.valid]))
    assert torch.equal(torch.cat([o[0] for o in a.test_dl(frame)]), torch.cat([o[0] for o in b.test_dl(frame)]))
    x, y = (next(iter(o.train.new(shuffle=False)))[0] for o in (a, b))
    assert not torch.equal(x, y)

def epoch(d, n, **kw):
    dl = d.train.new(shuffle=False, drop_last=False, **kw)
    start_epoch(dl, n)
    return torch.cat([o[0] for o in dl])

def test_an_epoch_is_drawn_from_its_number_whatever_the_workers(frame):
    d = dls(frame)
    assert torch.equal(epoch(d, 3), epoch(d, 3)) and not torch.equal(epoch(d, 3), epoch(d, 4))
    assert torch.equal(epoch(d, 3), epoch(d, 3, num_workers=2))

@pytest.mark.parametrize('on', ['image', 'batch'])
def test_where_no_epoch_is_counted_every_draw_is_new(frame, on):
    "`learn.fit`, `learn.tta` and `show_batch` outside a stage's training"
    train = dls(frame, Augment(on=on)).train.new(shuffle=False, drop_last=False)
    a, b = (torch.cat([o[0] for o in train]) for _ in range(2))
    assert not torch.equal(a, b)

def test_no_change_is_the_image():
    rng = np.random.default_rng(0)
    assert np.allclose(draw_warp(still, rng, 64), [[1, 0, 0], [0, 1, 0]])
    m, lift = draw_colour(still, rng)
    assert np.allclose(m, np.eye(3), atol=1e-3) and lift == 0

def test_warps_cover_what_the_recipe_says():
    aug = Augment(rotate=30, shift=.1, scale=(.8, 1.2), shear=0, hflip=.5)
    rng = np.random.default_rng(0)
    ms = np.array([draw_warp(aug, rng, 100) for _ in range(4000)])
    scale = np.sqrt(abs(np.linalg.det(ms[:, :, :2])))
    flips = np.linalg.det(ms[:, :, :2]) < 0
    angle = np.degrees(np.arctan2(ms[:, 1, 0] * np.where(flips, -1, 1), ms[:, 0, 0] * np.where(flips, -1, 1)))
    c = np.full(2, 49.5)
    move = (ms[:, :, :2] @ c + ms[:, :, 2] - c) / 100
    for got, lo, hi in ((scale, .8, 1.2), (angle, -30, 30), (move, -.1, .1)):
        assert lo - 1e-6 <= got.min() < lo + .02 * (hi - lo)
        assert hi - .02 * (hi - lo) < got.max() <= hi + 1e-6 and abs(got.mean() - (lo + hi) / 2) < .02 * (hi - lo)
    assert abs(flips.mean() - .5) < .03

def test_colour_is_brightness_then_contrast_about_the_mean():
    im = np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    grey = im.reshape(-1, 3) @ [.299, .587, .114]
    rng = np.random.default_rng(1)
    for _ in range(50):
        m, lift = draw_colour(Augment(brightness=0, contrast=.5, saturation=.5, hue=.1), rng)
        m = np.c_[m, np.full(3, lift * grey.mean())]
        assert abs((im.reshape(-1, 3) @ m[:, :3].T + m[:, 3]) @ [.299, .587, .114] - grey).mean() < .5 * abs(grey - grey.mean()).mean() + 1e-6
        assert abs(((im.reshape(-1, 3) @ m[:, :3].T + m[:, 3]) @ [.299, .587, .114]).mean() - grey.mean()) < .3      # the mean grey stays

def test_the_augmentation_refuses_nothing_it_is_given(frame):
    aug = FundusAugment(Augment())
    from fastai.vision.all import PILImage
    im = PILImage.create(np.zeros((32, 32, 3), np.uint8)); im.key = 7
    assert aug(im, split_idx=0).size == (32, 32) and aug(im, split_idx=1) is im


def smooth(n=4, side=64):
    "Images without sharp edges, on which rounding is all that the two paths differ by"
    import cv2
    rng = np.random.default_rng(0)
    return [cv2.GaussianBlur(rng.integers(0, 255, (side, side, 3), dtype=np.uint8), (0, 0), 6) for _ in range(n)]

@pytest.mark.parametrize('aug', [Augment(blur=1.), Augment(blur=0., shear=20., vflip=.5), Augment(blur=1., rotate=0, shift=0, scale=(1, 1), hue=.3)])
def test_both_paths_do_the_same_to_the_same_draw(aug, monkeypatch):
    from fastai.vision.all import PILImage, TensorImage

    import aptos_fastai.training.loaders as data
    ims = smooth()
    draws = [draw(aug, np.random.default_rng(i), 64) for i in range(len(ims))]
    one = iter(draws)
    monkeypatch.setattr(data, 'draw', lambda *_: next(one))
    got = []
    for a in ims:
        im = PILImage.create(a); im.key = 0
        got.append(np.asarray(FundusAugment(aug)(im, split_idx=0)))
    one = iter(draws)
    x = TensorImage(torch.tensor(np.array(ims)).permute(0, 3, 1, 2).float() / 255)
    batch = (BatchAugment(aug)(x, split_idx=0).permute(0, 2, 3, 1) * 255).numpy()
    off = abs(batch - np.array(got))
    assert off.mean() < .8 and np.quantile(off, .995) < 6 and abs(batch - np.array(ims)).mean() > 5

def test_both_paths_draw_from_the_same_distributions():
    "Means and spreads of pixel statistics over many draws of each path agree within their standard errors"
    from fastai.vision.all import PILImage, TensorImage
    aug, n = Augment(), 600
    im = PILImage.create(smooth(1)[0])
    a = []
    for i in range(n): im.key = i; a.append(np.asarray(FundusAugment(aug)(im, split_idx=0)) / 255)
    x = TensorImage(torch.tensor(np.array(im)).permute(2, 0, 1)[None].expand(n, -1, -1, -1).float() / 255)
    b = BatchAugment(aug)(x, split_idx=0).permute(0, 2, 3, 1).numpy()
    for stat in (lambda o: o.mean((1, 2, 3)), lambda o: (o.max(3) == 0).mean((1, 2)), lambda o: o[..., 0].mean((1, 2)) - o[..., 2].mean((1, 2)),
                 lambda o: o[:, :32].mean((1, 2, 3)) - o[:, 32:].mean((1, 2, 3)), lambda o: abs(np.diff(o, axis=1)).mean((1, 2, 3))):
        u, v = stat(np.array(a)), stat(b)
        assert abs(u.mean() - v.mean()) < 4 * np.hypot(u.std(), v.std()) / n ** .5 + .002 and .85 < u.std() / v.std() < 1.18

def test_the_batch_path_augments_training_alone(frame):
    a, b = (dls(frame, Augment(**kw)) for kw in (dict(on='batch'), dict(on='image')))
    assert torch.equal(torch.cat([o[0] for o in a.valid]), torch.cat([o[0] for o in b.valid]))
    assert torch.equal(torch.cat([o[0] for o in a.test_dl(frame)]), torch.cat([o[0] for o in b.test_dl(frame)]))
    assert torch.equal(epoch(a, 3), epoch(a, 3)) and not torch.equal(epoch(a, 3), epoch(a, 4)) and torch.equal(epoch(a, 3), epoch(a, 3, num_workers=2))
    plain = torch.cat([o[0] for o in dls(frame, still).train.new(shuffle=False, drop_last=False)])
    assert not torch.equal(epoch(a, 3)[:8], plain[:8])

def test_loss_falls_on_a_learnable_toy(frame):
    learn = get_learner(stage, dls(frame, still))
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(12, 5e-3)
    losses = [float(o[0]) for o in learn.recorder.values]
    assert losses[-1] < .6 * losses[0]

def test_views():
    x = torch.rand(2, 3, 4, 4)
    for tta, n in (('none', 1), ('hflip', 2), ('d4', 8)):
        seen = {tuple(v.flatten().tolist()) for v in views(x, tta)}
        assert len(seen) == n and all(torch.equal(v.sort().values.flatten().sort().values, x.flatten().sort().values) for v in views(x, tta))

def test_scores_are_the_mean_over_views_in_order(frame):
    learn = get_learner(stage, dls(frame))
    one, mirror = predict_scores(learn, frame), predict_scores(learn, frame, 'hflip')
    xs = torch.cat([b[0] for b in learn.dls.test_dl(frame)])
    with torch.no_grad(): other = learn.model.eval()(xs.flip(-1)).flatten().numpy()
    assert np.allclose(mirror, (one + other) / 2, atol=1e-5) and len(one) == len(frame)
    assert np.allclose(predict_scores(learn, frame[::-1])[::-1], one, atol=1e-5)
