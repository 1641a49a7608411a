"DataLoaders, augmentation by image and by batch, and views."
import copy
import multiprocessing
import shutil
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import fundus
from fastai.vision.all import (
    Callback,
    CancelFitException,
    PILImage,
    TensorImage,
    Transform,
    load_learner,
    set_seed,
)

from aptos_fastai.common.console import Bars
from aptos_fastai.common.io import AptosError
from aptos_fastai.data.retina import Prep
from aptos_fastai.data.store import prepare_table
from aptos_fastai.inference.views import views
from aptos_fastai.pipeline.scores import predict_scores
from aptos_fastai.pipeline.stage import fit_stage
from aptos_fastai.recipe.sections import Augment, Stage
from aptos_fastai.training import loaders
from aptos_fastai.training.callbacks import History, Reproducible
from aptos_fastai.training.loaders import (
    AugmentParams,
    BatchAugment,
    FundusAugment,
    ReadRetina,
    draw_colour,
    draw_params,
    draw_warp,
    get_dls,
    image_id,
    keep_processes,
    set_epoch,
    start_workers_by_fork,
)
from aptos_fastai.training.model import get_learner

PREP = Prep(size=48)
STATS = ((.5,) * 3, (.5,) * 3)
STAGE = Stage(name='t', train=('t',), arch='test_resnet', weights='none', size=32, bs=8, lr=5e-3)
NO_AUGMENT = Augment(scale=(1., 1.), **dict.fromkeys(
    'brightness contrast saturation hue blur rotate shift shear hflip vflip'.split(), 0.))
GREY = [.299, .587, .114]


@pytest.fixture(scope='module')
def frame(tmp_path_factory):
    "40 prepared images, 30 of them for training"
    folder, rng = tmp_path_factory.mktemp('images'), np.random.default_rng(0)
    ids = [f'p{i}' for i in range(40)]
    files = [str(folder / f'{o}.png') for o in ids]
    for i, file in enumerate(files): cv2.imwrite(file, fundus(rng, grade=i % 5))
    df = pd.DataFrame(dict(id_code=ids, path=files, source='t', diagnosis=[i % 5. for i in range(40)]))
    with Bars() as bars: df = prepare_table(df, folder / 'store', Prep(size=48), bars)
    return df.assign(valid=[i % 4 == 0 for i in range(40)])


def dls_of(frame, aug=None, **kw): return get_dls(frame, STAGE, PREP, aug or Augment(), STATS, **kw)
def images_of(dl): return torch.cat([batch[0] for batch in dl])
def in_order(dls, **kw): return dls.train.new(shuffle=False, drop_last=False, **kw)


def images_of_epoch(dls, epoch, **kw):
    "The training images as they are augmented in an epoch"
    dl = in_order(dls, **kw)
    set_epoch(dl, epoch)
    return images_of(dl)


def smooth_images(n=4, side=64):
    "Images without sharp edges: on them, the two augmentation paths differ only by rounding"
    rng = np.random.default_rng(0)
    return [cv2.GaussianBlur(rng.integers(0, 255, (side, side, 3), dtype=np.uint8), (0, 0), 6) for _ in range(n)]


def test_ids_with_dots_draw_their_own_augmentation(frame, tmp_path):
    "IMG.001 and IMG.002 have one stem before the first dot, and the same pixels here"
    prep = Prep(size=48)
    stored = Path(frame.stored[0])
    keys = set()
    for name in ('IMG.001', 'IMG.002'):
        prepared = tmp_path / f'{name}.{stored.name.removesuffix(prep.suffix).rpartition(".")[2]}{prep.suffix}'
        original = tmp_path / f'{name}.png'
        shutil.copy(stored, prepared)
        shutil.copy(frame.path[0], original)
        assert image_id(prepared, prep) == image_id(original, prep) == name
        im = ReadRetina(prep, 48).encodes(prepared)
        augment = FundusAugment(Augment())
        augment.epoch = 0
        keys.add(np.asarray(augment(im, split_idx=0)).tobytes())
    assert len(keys) == 2


@pytest.mark.skipif(sys.platform != 'linux', reason='forks on Linux alone')
@pytest.mark.parametrize('chosen, expected', [('', 'fork'), ('spawn', 'spawn'), ('forkserver', 'forkserver')])
def test_workers_start_by_fork_unless_the_user_chose_otherwise(monkeypatch, chosen, expected):
    "Where the default is that of Python 3.14"
    context = multiprocessing.context._default_context
    monkeypatch.setattr(context, '_default_context', multiprocessing.get_context('forkserver'))
    monkeypatch.setattr(context, '_actual_context', None)
    assert multiprocessing.get_start_method() == 'forkserver'
    multiprocessing.set_start_method(chosen or None, force=True)
    start_workers_by_fork()
    start_workers_by_fork()
    assert multiprocessing.get_start_method() == expected


def test_no_worker_loads_images_where_processes_do_not_start_by_fork(monkeypatch):
    monkeypatch.setattr(loaders, 'cores', lambda: 16)
    stage = Stage(name='teacher', train=('train',))
    assert loaders.loader_workers(stage) >= 2 and loaders.loader_workers(replace(stage, workers=3)) == 3
    monkeypatch.setattr(multiprocessing, 'get_start_method', lambda allow_none=False: 'spawn')
    assert loaders.loader_workers(stage) == loaders.loader_workers(replace(stage, workers=0)) == 0
    with pytest.raises(AptosError, match='workers = 3: .* Set workers = 0'):
        loaders.loader_workers(replace(stage, workers=3))


def test_batches(frame):
    dls = dls_of(frame)
    x, y = dls.train.one_batch()
    assert x.shape == (8, 3, 32, 32) and x.dtype == torch.float32 and y.shape == (8,)
    assert -1.001 <= x.min() < x.max() <= 1.001
    assert len(dls.train_ds) == 30 and len(dls.valid_ds) == 10


def test_validation_and_prediction_are_never_augmented(frame):
    augmented, plain = dls_of(frame), dls_of(frame, NO_AUGMENT)
    assert torch.equal(images_of(augmented.valid), images_of(plain.valid))
    assert torch.equal(images_of(augmented.test_dl(frame)), images_of(plain.test_dl(frame)))
    x, y = (next(iter(o.train.new(shuffle=False)))[0] for o in (augmented, plain))
    assert not torch.equal(x, y)


def test_the_draws_of_an_epoch_depend_on_its_number_not_on_the_workers(frame):
    dls = dls_of(frame)
    assert torch.equal(images_of_epoch(dls, 3), images_of_epoch(dls, 3))
    assert not torch.equal(images_of_epoch(dls, 3), images_of_epoch(dls, 4))
    assert torch.equal(images_of_epoch(dls, 3), images_of_epoch(dls, 3, num_workers=2))


@pytest.mark.parametrize('mode', ['image', 'batch'])
def test_without_an_epoch_every_draw_is_random(frame, mode):
    "As in `learn.fit`, `learn.tta` and `show_batch` outside a stage's training"
    train = in_order(dls_of(frame, Augment(mode=mode)))
    assert not torch.equal(images_of(train), images_of(train))


def test_no_augmentation_changes_nothing():
    rng = np.random.default_rng(0)
    assert np.allclose(draw_warp(NO_AUGMENT, rng, 64), [[1, 0, 0], [0, 1, 0]])
    matrix, offset = draw_colour(NO_AUGMENT, rng)
    assert np.allclose(matrix, np.eye(3), atol=1e-3) and offset == 0


def test_warps_cover_the_ranges_of_the_recipe():
    aug = Augment(rotate=30, shift=.1, scale=(.8, 1.2), shear=0, hflip=.5)
    rng = np.random.default_rng(0)
    warps = np.array([draw_warp(aug, rng, 100) for _ in range(4000)])
    linear = warps[:, :, :2]
    scale = np.sqrt(abs(np.linalg.det(linear)))
    flipped = np.linalg.det(linear) < 0
    sign = np.where(flipped, -1, 1)
    angle = np.degrees(np.arctan2(linear[:, 1, 0] * sign, linear[:, 0, 0] * sign))
    centre = np.full(2, 49.5)
    shift = (linear @ centre + warps[:, :, 2] - centre) / 100
    for drawn, low, high in ((scale, .8, 1.2), (angle, -30, 30), (shift, -.1, .1)):
        margin = .02 * (high - low)
        assert low - 1e-6 <= drawn.min() < low + margin
        assert high - margin < drawn.max() <= high + 1e-6
        assert abs(drawn.mean() - (low + high) / 2) < margin
    assert abs(flipped.mean() - .5) < .03


def test_contrast_and_saturation_keep_the_mean_grey():
    im = np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    pixels = im.reshape(-1, 3)
    grey = pixels @ GREY
    rng = np.random.default_rng(1)
    for _ in range(50):
        matrix, offset = draw_colour(Augment(brightness=0, contrast=.5, saturation=.5, hue=.1), rng)
        new_grey = (pixels @ matrix.T + offset * grey.mean()) @ GREY
        assert abs(new_grey - grey).mean() < .5 * abs(grey - grey.mean()).mean() + 1e-6
        assert abs(new_grey.mean() - grey.mean()) < .3


def test_a_black_image_is_augmented_and_a_validation_image_is_not():
    aug = FundusAugment(Augment())
    im = PILImage.create(np.zeros((32, 32, 3), np.uint8))
    im.key = 7
    assert aug(im, split_idx=0).size == (32, 32) and aug(im, split_idx=1) is im


@pytest.mark.parametrize('aug', [
    Augment(blur=1.), Augment(blur=0., shear=20., vflip=.5),
    Augment(blur=1., rotate=0, shift=0, scale=(1, 1), hue=.3)])
def test_both_paths_apply_a_draw_alike(aug, monkeypatch):
    ims = smooth_images()
    draws = draw_params(aug, np.random.default_rng(3), 64, (len(ims),))
    upcoming = iter([AugmentParams(*(o[i] for o in vars(draws).values())) for i in range(len(ims))])
    monkeypatch.setattr(loaders, 'draw_params', lambda *_: next(upcoming))
    one_by_one = []
    for a in ims:
        im = PILImage.create(a)
        im.key = 0
        one_by_one.append(np.asarray(FundusAugment(aug)(im, split_idx=0)))
    upcoming = iter([draws])
    x = TensorImage(torch.tensor(np.array(ims)).permute(0, 3, 1, 2).float() / 255)
    batch = (BatchAugment(aug)(x, split_idx=0).permute(0, 2, 3, 1) * 255).numpy()
    difference = abs(batch - np.array(one_by_one))
    assert difference.mean() < .8 and np.quantile(difference, .995) < 6
    assert abs(batch - np.array(ims)).mean() > 5


def pixel_statistics(o):
    "Of images (n, side, side, 3): mean, black share, red minus blue, left minus right, roughness"
    return dict(mean=o.mean((1, 2, 3)), black=(o.max(3) == 0).mean((1, 2)),
                red_minus_blue=o[..., 0].mean((1, 2)) - o[..., 2].mean((1, 2)),
                halves=o[:, :32].mean((1, 2, 3)) - o[:, 32:].mean((1, 2, 3)),
                roughness=abs(np.diff(o, axis=1)).mean((1, 2, 3)))


def test_both_paths_draw_from_the_same_distributions():
    "Means and standard deviations of pixel statistics over many draws agree within their standard errors"
    aug, n = Augment(), 600
    im = PILImage.create(smooth_images(1)[0])
    one_by_one = []
    for i in range(n):
        im.key = i
        one_by_one.append(np.asarray(FundusAugment(aug)(im, split_idx=0)) / 255)
    x = TensorImage(torch.tensor(np.array(im)).permute(2, 0, 1)[None].expand(n, -1, -1, -1).float() / 255)
    batch = BatchAugment(aug)(x, split_idx=0).permute(0, 2, 3, 1).numpy()
    a, b = pixel_statistics(np.array(one_by_one)), pixel_statistics(batch)
    for name in a:
        u, v = a[name], b[name]
        assert abs(u.mean() - v.mean()) < 4 * np.hypot(u.std(), v.std()) / n ** .5 + .002, name
        assert .85 < u.std() / v.std() < 1.18, name


def naive_warp(rng, side):
    "Flip, shear, rotate, zoom about the centre and shift, as matrices of homogeneous coordinates"
    angle, shear = np.radians(rng.uniform(-180, 180)), np.radians(rng.uniform(-20, 20))
    zoom = rng.uniform(.8, 1.2)
    mirrored = [-1 if u < p else 1 for u, p in zip(rng.random(2), (.5, .3), strict=True)]
    dx, dy = rng.uniform(-.2, .2, 2) * side
    c = (side - 1) / 2
    to_centre, back = (np.array([[1, 0, s * c], [0, 1, s * c], [0, 0, 1]]) for s in (-1, 1))
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    slant = np.array([[1, np.tan(shear), 0], [0, 1, 0], [0, 0, 1]])
    shift = np.array([[1, 0, dx], [0, 1, dy], [0, 0, 1]])
    return (shift @ back @ np.diag([zoom, zoom, 1]) @ turn @ slant @ np.diag([*mirrored, 1]) @ to_centre)[:2]


def naive_colour(rng, rgb, mean_grey):
    "Brightness, contrast, saturation and hue of one colour, one after the other"
    brightness, contrast, saturation = (1 + rng.uniform(-o, o) for o in (.1, .3, .2))
    angle = 2 * np.pi * rng.uniform(-.25, .25)
    yiq = np.array([[.299, .587, .114], [.596, -.274, -.322], [.211, -.523, .312]])
    y, i, q = yiq @ rgb
    turned = np.linalg.inv(yiq) @ [y, np.cos(angle) * i - np.sin(angle) * q, np.sin(angle) * i + np.cos(angle) * q]
    saturated = saturation * turned + (1 - saturation) * (GREY @ turned)
    return brightness * (contrast * saturated + (1 - contrast) * mean_grey)


def test_drawn_matrices_are_those_of_the_steps_one_by_one():
    warp = Augment(rotate=180, shear=20, scale=(.8, 1.2), hflip=.5, vflip=.3, shift=.2)
    colour = Augment(brightness=.1, contrast=.3, saturation=.2, hue=.25)
    rgb, grey = np.array([.7, .4, .2]), .3
    for seed in range(50):
        rngs = [np.random.default_rng(seed) for _ in range(4)]
        assert np.allclose(draw_warp(warp, rngs[0], 65), naive_warp(rngs[1], 65), atol=1e-12)
        matrix, offset = draw_colour(colour, rngs[2])
        assert np.allclose(matrix @ rgb + offset * grey, naive_colour(rngs[3], rgb, grey), atol=1e-12)


def test_a_batch_is_drawn_from_the_distributions_of_single_images():
    "Kolmogorov-Smirnov distances of each entry, and correlations between entries and between neighbours of a batch"
    aug, n = Augment(vflip=.3, shear=10., blur_sigma=(.5, 2.)), 3000
    rng = np.random.default_rng(1)
    singles = [draw_params(aug, rng, 64) for _ in range(n)]
    batch = draw_params(aug, np.random.default_rng(2), 64, (n,))
    names = 'warp', 'colour', 'offset', 'sigma'
    one, all_ = (np.concatenate([np.reshape(o, (n, -1)) for o in parts], 1) for parts in (
        [np.array([getattr(p, k) for p in singles]) for k in names], [getattr(batch, k) for k in names]))
    assert all_.shape == (n, 6 + 9 + 1 + 1)
    grid = np.quantile(one, np.linspace(.01, .99, 60), axis=0)
    share = [(o[None] <= grid[:, None]).mean(1) for o in (one, all_)]
    assert abs(share[0] - share[1]).max() < 1.95 * (2 / n) ** .5           # of two samples, p = .001 each
    assert abs(np.corrcoef(one.T) - np.corrcoef(all_.T)).max() < 5 / n ** .5
    next_to_each_other = [np.corrcoef(o[:-1], o[1:])[0, 1] for o in all_.T]
    assert abs(np.array(next_to_each_other)).max() < 5 / n ** .5


def test_the_batch_path_augments_only_training(frame):
    by_batch, by_image = (dls_of(frame, Augment(mode=mode)) for mode in ('batch', 'image'))
    assert torch.equal(images_of(by_batch.valid), images_of(by_image.valid))
    assert torch.equal(images_of(by_batch.test_dl(frame)), images_of(by_image.test_dl(frame)))
    third = images_of_epoch(by_batch, 3)
    assert torch.equal(third, images_of_epoch(by_batch, 3))
    assert not torch.equal(third, images_of_epoch(by_batch, 4))
    assert torch.equal(third, images_of_epoch(by_batch, 3, num_workers=2))
    assert not torch.equal(third[:8], images_of(in_order(dls_of(frame, NO_AUGMENT)))[:8])


def test_loss_falls_on_a_learnable_toy(frame):
    learn = get_learner(STAGE, dls_of(frame, NO_AUGMENT))
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(12, 5e-3)
    losses = [float(o[0]) for o in learn.recorder.values]
    assert losses[-1] < .6 * losses[0]


@pytest.mark.parametrize('tta, n', [('none', 1), ('hflip', 2), ('rot4', 4), ('d4', 8)])
def test_views_are_different_orders_of_the_same_pixels(tta, n):
    x = torch.rand(2, 3, 4, 4)
    assert len({tuple(v.flatten().tolist()) for v in views(x, tta)}) == n
    for v in views(x, tta): assert torch.equal(v.flatten().sort().values, x.flatten().sort().values)


def test_scores_are_the_mean_over_views_in_order(frame):
    learn = get_learner(STAGE, dls_of(frame))
    plain, flipped = predict_scores(learn, frame), predict_scores(learn, frame, 'hflip')
    x = images_of(learn.dls.test_dl(frame))
    with torch.no_grad(): mirrored = learn.model.eval()(x.flip(-1)).flatten().numpy()
    assert np.allclose(flipped, (plain + mirrored) / 2, atol=1e-5) and len(plain) == len(frame)
    assert np.allclose(predict_scores(learn, frame[::-1])[::-1], plain, atol=1e-5)


class SeenImages(Callback):
    "Keep the images of every batch, in training and validation, and the ids of the loader processes that ran then"
    order = 1000
    def __init__(self): self.images, self.processes = [], set()
    def before_batch(self):
        self.images.append(self.x.clone())
        self.processes |= process_ids()


class Fails(Transform):
    "Fail for every training image"
    split_idx = 0
    def encodes(self, im: PILImage): raise AptosError('image p1: cannot be read')


def process_ids(): return {p.pid for p in multiprocessing.active_children()}


def worker_dls(frame, workers=2, aug=None, **kw):
    return get_dls(frame, replace(STAGE, workers=workers, **kw), PREP, aug or Augment(), STATS)


def two_fits(dls, block):
    "Train one epoch, then two, with `Reproducible`; return what was seen, and the weights"
    set_seed(1)
    learn = get_learner(STAGE, dls)
    seen, hist = SeenImages(), History('last')
    with block(dls), learn.no_bar(), learn.no_logging():
        for epochs in (1, 2): learn.fit(epochs, cbs=[Reproducible(7, hist), hist, seen])
    return seen, learn.model.state_dict()


@pytest.mark.parametrize('weighted', [False, True])
@pytest.mark.parametrize('workers', [pytest.param(1, marks=pytest.mark.slow), 2])
def test_kept_processes_load_what_others_do(frame, workers, weighted):
    "Order, augmentation, weights and PyTorch's generator are those of no process and of processes of every epoch"
    frame = frame.assign(weight=np.linspace(1, 5, 40))
    weights = (1.,) if weighted else ()
    results, draws = [], set()
    for n, block in [(0, keep_processes), (workers, lambda dls: nullcontext()), (workers, keep_processes)]:
        results.append(two_fits(worker_dls(frame, n, source_weights=weights), block))
        draws.add(float(torch.rand(1)))
        assert not process_ids()
    none, others, kept = (len(seen.processes) for seen, _ in results)
    assert none == 0 and others > workers == kept
    assert len(results[0][0].images) == 3 * (3 + 1) and len(draws) == 1
    for seen, state in results[1:]:
        assert all(map(torch.equal, seen.images, results[0][0].images))
        assert all(map(torch.equal, state.values(), results[0][1].values()))


def test_a_stage_keeps_its_processes_through_both_phases(frame):
    stage, seen, hist = replace(STAGE, workers=2, freeze_epochs=1, epochs=2), SeenImages(), History('last')
    fit_stage(get_learner(stage, worker_dls(frame)), stage, [Reproducible(7, hist), hist, seen])
    assert len(hist.rows) == 3 and len(seen.processes) == 2 and not process_ids()


def test_random_draws_in_kept_processes_are_those_of_others(frame):
    "Without an epoch: images differ between epochs, and the global seed decides them"
    seen = []
    for block in (keep_processes, lambda dls: nullcontext()):
        dls = worker_dls(frame)
        train = in_order(dls)
        dls.loaders[0] = train
        set_seed(4)
        with block(dls): seen += [images_of(train), images_of(train)]
    assert torch.equal(seen[0], seen[2]) and torch.equal(seen[1], seen[3]) and not torch.equal(seen[0], seen[1])


def test_after_an_interrupted_iteration_the_next_one_is_right(frame):
    dls, expected = worker_dls(frame), [images_of_epoch(dls_of(frame), e) for e in range(3)]
    train = dls.loaders[0] = in_order(dls)
    with keep_processes(dls):
        for epoch in range(3):
            set_epoch(train, epoch)
            for _ in train: break
            assert not process_ids()
            assert torch.equal(images_of(train), expected[epoch]) and len(process_ids()) == 2
            unfinished = iter(train)
            first = next(unfinished)[0]
            assert torch.equal(images_of(train), expected[epoch])           # beside the unfinished one
            assert len(images_of(dls.valid)) == 10
            assert torch.equal(torch.cat([first, *(b[0] for b in unfinished)]), expected[epoch])
    assert not process_ids()


def test_other_tables_and_copies_in_the_block_load_their_own_images(frame, tmp_path):
    dls, expected = worker_dls(frame), images_of(dls_of(frame).test_dl(frame[::-1]))
    learn = get_learner(STAGE, dls)
    with keep_processes(dls), learn.no_bar(), learn.no_logging():
        learn.fit(1)
        kept = process_ids()
        assert torch.equal(images_of(dls.test_dl(frame[::-1])), expected) and process_ids() == kept
        scores = learn.get_preds(dl=dls.test_dl(frame[::-1]))[0]
        learn.validate()
        dl = copy.deepcopy(dls.valid)
        dl.dataset, dl.n = dls.test_dl(frame[::-1]).dataset, len(frame)
        assert torch.equal(images_of(dl), expected)
        assert dls.train.one_batch()[0].shape == (8, 3, 32, 32)
        assert process_ids() == kept
        learn.path = tmp_path
        learn.export('learner.pkl')
    assert not process_ids()
    with pytest.warns(UserWarning, match='pickle'): loaded = load_learner(tmp_path / 'learner.pkl')
    with loaded.no_bar(): assert torch.equal(loaded.get_preds(dl=loaded.dls.test_dl(frame[::-1]))[0], scores)
    assert not process_ids()


def test_the_lr_finder_in_the_block(frame):
    losses = []
    for workers in (0, 2):
        set_seed(2)
        dls = worker_dls(frame, workers, NO_AUGMENT)
        learn = get_learner(STAGE, dls)
        with keep_processes(dls), learn.no_bar(), learn.no_logging(): learn.lr_find(num_it=10, show_plot=False)
        losses.append(torch.stack(learn.recorder.losses))
        assert not process_ids()
    assert torch.equal(*losses) and len(losses[0]) > 5


ERRORS = [('before_batch', KeyboardInterrupt), ('after_train', CancelFitException), ('before_validate', AptosError),
          ('after_epoch', KeyboardInterrupt)]
OTHER_ERRORS = [pytest.param(event, error, marks=pytest.mark.slow) for event, _ in ERRORS
                for error in (KeyboardInterrupt, AptosError, CancelFitException) if (event, error) not in ERRORS]


@pytest.mark.parametrize('event, error', ERRORS + OTHER_ERRORS)
def test_no_process_is_left_after_an_error(frame, event, error):
    dls, started = worker_dls(frame), set()
    learn = get_learner(STAGE, dls)

    def fail(_):
        started.update(process_ids())
        raise error('stop')
    caught = None
    try:
        with keep_processes(dls), learn.no_bar(), learn.no_logging(): learn.fit(2, cbs=Callback(**{event: fail}))
    except (KeyboardInterrupt, AptosError) as e: caught = e                # its traceback holds the DataLoader
    assert isinstance(caught, error) != (error is CancelFitException)
    assert started and not process_ids()


def test_an_error_in_a_kept_process_reaches_the_user(frame):
    "And the block can be used again"
    dls = worker_dls(frame)
    with keep_processes(dls):
        before = images_of(dls.valid)
        dls.train.after_item.add(Fails())                                    # after the processes started
        with pytest.raises(AptosError, match='image p1: cannot be read'): images_of(dls.train)
        assert not process_ids()
        assert torch.equal(images_of(dls.valid), before)
    assert not process_ids()


def test_a_killed_process_is_an_error_and_not_a_hang(frame):
    dls = worker_dls(frame)
    with keep_processes(dls):
        before = images_of(dls.valid)
        for p in multiprocessing.active_children():
            p.kill()
            p.join()
        with pytest.raises(RuntimeError, match='DataLoader worker'): images_of(dls.valid)
        assert torch.equal(images_of(dls.valid), before)


def test_shards_come_from_kept_processes(frame, monkeypatch):
    pytest.importorskip('accelerate', reason='the extra `parallel`')
    from aptos_fastai.training.parallel import ShardDL
    monkeypatch.setattr(ShardDL, '_broadcast', lambda self, t, rank: t)

    def shards(dls): return [ShardDL(dls.valid, rank=r, world_size=2, device='cpu') for r in (0, 1)]
    dls, expected = worker_dls(frame), [images_of(dl) for dl in shards(worker_dls(frame, 0))]
    with keep_processes(dls):
        for _ in range(2):
            for dl, images in zip(shards(dls), expected, strict=True): assert torch.equal(images_of(dl), images)
            assert len(process_ids()) == 2
    assert len(torch.cat(expected)) == 10 and not process_ids()
