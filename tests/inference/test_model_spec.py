"What a model is, apart from its weights: models and run folders made by hand, without a training."
import json
from collections import Counter
from dataclasses import asdict, replace

import cv2
import numpy as np
import pandas as pd
import pytest
from safetensors.torch import save_file

from aptos_fastai.common.io import AptosError, digest, file_hash, write_csv, write_record
from aptos_fastai.data.retina import Prep
from aptos_fastai.decisions import DecisionSpec, OperatingPoint
from aptos_fastai.inference.eyes import FUSES, EyesSpec, Fusion
from aptos_fastai.inference.gate import FeatureDistance, GateSpec
from aptos_fastai.inference.model_spec import (
    NOT_REPORTED,
    MemberSpec,
    ModelSpec,
    copy_members,
    fold_model,
    preds_file,
    read_distance,
    read_model,
    read_net,
)
from aptos_fastai.inference.referral import fit_decision
from aptos_fastai.metrics import MIDPOINTS, PredictionSets, stratified_group_parts, thresholds_or_midpoints
from aptos_fastai.recipe.sections import Refer, Stage
from aptos_fastai.training.networks import create_model

MEMBER = MemberSpec('w', 'a', 'test_resnet', 'gem', 32, 'none', (0., 0., 0.), (1., 1., 1.), 1.)
MODEL = ModelSpec('run/stage', Prep(size=64), (MEMBER,), MIDPOINTS, .9, False)
EYES = EyesSpec(Fusion(.1, .6, .3), MIDPOINTS, .9, (), DecisionSpec())


# A model

@pytest.mark.parametrize('changed, keys', [
    ('weights', dict(members=(replace(MEMBER, sha256='b'),))),
    ('weights', dict(members=(replace(MEMBER, tta='hflip'),))),
    ('weights', dict(members=(replace(MEMBER, prepared=32),))),
    ('weights', dict(prep=Prep(size=32))),
    ('thresholds', dict(thresholds=(.5, 1.5, 2.5, 3.4))),
    ('thresholds', dict(coverage=.8)),
    ('thresholds', dict(calibration=(((.1,),),) * 5)),
    ('gate', dict(gate=GateSpec(limit=2.))),
    ('operating_point', dict(decision=DecisionSpec((OperatingPoint(2, 'threshold', 1.2, 1.2),)))),
    ('operating_point', dict(decision=DecisionSpec(prevalence=.1))),
    ('eyes', dict(eyes=EYES)),
    ('', dict(members=(replace(MEMBER, file='other', distance='other'),))),
    ('', dict(name='other', kappa='0.9', warnings=('w',), synthetic=True)),
])
def test_digests_name_what_differs(changed, keys):
    own, other = MODEL.digests, replace(MODEL, **keys).digests
    differing = {name for name in own | other if own.get(name) != other.get(name)}
    assert differing == ({changed, 'model'} if changed else set())


def test_a_digest_is_of_what_a_point_decides_by_and_not_of_its_figures():
    point = OperatingPoint(2, 'threshold', 1.2, 1.2)
    one, other = (replace(MODEL, decision=DecisionSpec((o,))) for o in (point, replace(point, note='n', chosen_on='x')))
    assert one.digests == other.digests and one.key == one.digests['model']
    assert one.key != replace(MODEL, decision=DecisionSpec((replace(point, lowest_grade=3),))).key
    assert replace(MODEL, eyes=EYES).key != replace(MODEL, eyes=replace(EYES, thresholds=(0., 1., 2., 3.))).key


def test_digests_are_those_of_models_that_knew_no_prepared_side():
    "A bundle of an older version keeps its digests: `prepared` = 0 is left out"
    member = {k: v for k, v in asdict(MEMBER).items() if k not in ('file', 'distance', 'prepared')}
    assert MODEL.digests['weights'] == digest([[member], asdict(MODEL.prep)])[:12]
    assert {len(o) for o in MODEL.digests.values()} == {12}
    assert list(MODEL.digests) == ['model', 'weights', 'gate', 'operating_point', 'thresholds']


def stripes(side, width, grey):
    "Return a JPEG of stripes of `width` pixels, black and `grey` in turn"
    row = np.where(np.arange(side) // width % 2, grey, 0).astype(np.uint8)
    return cv2.imencode('.jpg', np.broadcast_to(row[None, :, None], (side, side, 3)).copy())[1].tobytes()


def test_each_input_side_is_read_from_its_prepared_square():
    "A stripe of two pixels becomes one: the square is reduced by half, and no further"
    model = replace(MODEL, members=(MEMBER, replace(MEMBER, size=16, prepared=32)))
    assert model.sizes == {16, 32} and model.prepared == {32: 64, 16: 32}
    squares = model.squares({64: stripes(64, 2, 200), 32: stripes(32, 2, 100)})
    for side, grey in ((32, 200), (16, 100)):
        expected = np.broadcast_to((np.arange(side) % 2 * grey)[None, :, None], (side, side, 3))
        assert squares[side] == pytest.approx(expected, abs=12)


def test_scores_of_a_fold_are_the_weighted_mean_of_its_members():
    members = tuple(replace(MEMBER, weight=w, fold=k) for w, k in ((.3, 4), (.1, 4), (.6, 0)))
    scores = [np.array([1., 0.]), np.array([3., 2.]), np.array([7., 5.])]
    assert replace(MODEL, members=members).fold_scores(scores) == pytest.approx(np.array([[7, 1.5], [5, .5]]))


def test_a_copy_has_other_file_names_and_the_same_content(tmp_path):
    names = ['s/fold0/w', 's\\fold1\\w', 's/fold0/d', 's/fold1/d']
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    members = tuple(replace(MEMBER, file=w, sha256=file_hash(tmp_path / w), distance=d,
                            distance_sha256=file_hash(tmp_path / d)) for w, d in (names[::2], names[1::2]))
    copied = copy_members(replace(MODEL, members=members), tmp_path, tmp_path / 'to')
    assert [(m.file, m.distance) for m in copied.members] == [('s-fold0-w', 's-fold0-d'), ('s-fold1-w', 's-fold1-d')]
    assert {f.name: f.read_text() for f in (tmp_path / 'to').iterdir()} == {
        's-fold0-w': names[0], 's-fold1-w': names[1], 's-fold0-d': names[2], 's-fold1-d': names[3]}
    (tmp_path / names[0]).write_text('other')
    with pytest.raises(AptosError, match='content changed.*Train again'):
        copy_members(replace(MODEL, members=members), tmp_path, tmp_path / 'to')


def test_a_file_outside_the_model_is_not_read(tmp_path):
    (tmp_path / 'd').write_text('d')
    (tmp_path / 'bundle').mkdir()
    outside = replace(MEMBER, distance='../d', distance_sha256=file_hash(tmp_path / 'd'))
    with pytest.raises(AptosError, match='lies outside .*Do not trust this bundle'):
        read_distance(outside, tmp_path / 'bundle')


def test_what_is_read_is_what_was_written(tmp_path):
    distance = FeatureDistance(np.ones(2, np.float32), np.eye(2, dtype=np.float32), np.full(2, 4, np.float32), 1.)
    distance.write(tmp_path / 'd')
    net = create_model('test_resnet', 'gem', 32, loss='corn')
    save_file(net.state_dict(), tmp_path / 'w')
    member = replace(MEMBER, loss='corn', sha256=file_hash(tmp_path / 'w'), distance='d',
                     distance_sha256=file_hash(tmp_path / 'd'))
    assert read_distance(member, tmp_path).distances([[3., 1.]]) == pytest.approx([1.])          # 2 / the root of 4
    found = read_net(member, tmp_path)
    assert not found.training and all((v == found.state_dict()[k]).all() for k, v in net.state_dict().items())
    (tmp_path / 'd').write_text('other')
    with pytest.raises(AptosError, match='d: content changed.*Export or train again'): read_distance(member, tmp_path)


# Run folders

def write_fold(root, name='s/fold0', n=25, **changes):
    "Write what a model needs of a finished fold: stage.json, its files, and scores that are the grade and noise"
    stage, fold = name.split('/fold')
    folder, fold = root / name, int(fold)
    folder.mkdir(parents=True)
    for name in ('weights.safetensors', 'features.safetensors'): (folder / name).write_text(f'{stage} {fold} {name}')
    y, noise = np.arange(n) % 5, np.random.default_rng(fold).normal(0, .8, n).round(3)
    write_csv(folder / 'preds.csv', pd.DataFrame(dict(
        id_code=[f'0{fold}{i:02}' for i in range(n)], source='t', diagnosis=y, fold=fold,
        score=y + noise, feature_distance=2. + np.arange(n) / n + fold)))
    record = dict(
        stage=stage, fold=fold, synthetic=False, prep=asdict(Prep(size=64)), augment={}, seed=1, mean=[.5] * 3,
        std=[.25] * 3, settings=settings(), pooling='avg',
        gate=dict(reject=.04, ungradable='exclude', rules=dict(how=['circle'], flags=[], red_green=[0., 2.],
                                                               green_blue=[0., 3.])),
        files={f.name: dict(sha256=file_hash(f)) for f in folder.iterdir()})
    write_record(folder / 'stage.json', record | changes)
    return folder


def settings(**keys):
    return asdict(Stage('s', ('t',), arch='test_resnet', size=32, folds=2, tta='hflip', loss='corn')) | keys


def read_stage(folder):
    return {k: v for k, v in json.loads((folder / 'stage.json').read_text()).items() if k != 'record_sha256'}


def oof_of(*folders): return pd.concat([pd.read_csv(o / 'preds.csv', dtype=dict(id_code=str)) for o in folders])


def test_a_stage_without_a_summary_is_the_mean_of_its_folds(tmp_path):
    folders = [write_fold(tmp_path / 'run', f's/fold{k}') for k in (0, 2, 10)]
    (tmp_path / 'run/s/fold3').mkdir()                       # not finished
    model, root = read_model(tmp_path / 'run/s')
    assert root == tmp_path / 'run' and model.name == 'run/s' and not model.synthetic and model.eyes is None
    assert [m.file for m in model.members] == [f's/fold{k}/weights.safetensors' for k in (0, 2, 10)]
    assert [m.fold for m in model.members] == [0, 2, 10]
    assert [m.weight for m in model.members] == pytest.approx([1 / 3] * 3)
    first = model.members[0]
    assert (first.head, first.mean, first.std, first.size) == ('avg', (.5,) * 3, (.25,) * 3, 32)
    assert (first.loss, first.tta) == ('corn', 'hflip')
    assert first.sha256 == file_hash(folders[0] / 'weights.safetensors')
    assert (first.distance, first.distance_sha256) == (
        's/fold0/features.safetensors', file_hash(folders[0] / 'features.safetensors'))
    oof = oof_of(*folders)
    thresholds = thresholds_or_midpoints(settings()['thresholds'], oof.score, oof.diagnosis)[0]
    assert model.thresholds == pytest.approx(tuple(thresholds)) and model.kappa == ''
    assert model.coverage == .9
    assert model.calibration == PredictionSets(.9).fit(oof.score, oof.diagnosis, oof.fold).calibration_
    assert {m.distance_unit for m in model.members} == {np.sort(oof.feature_distance)[-3]}      # 2 of 75 exceed it
    assert model.gate.limit == pytest.approx(1.001) and model.gate.ungradable == 'exclude'
    assert (model.gate.how, model.gate.reject) == (('circle',), .04)
    assert model.gate.scores == pytest.approx((oof.score.min() - .25, oof.score.max() + .25))
    assert model.warnings[0] == NOT_REPORTED
    point = model.decision.point(2)
    assert point.target == 'sensitivity' and point.chosen_on == 'out-of-fold scores of s, 75 images'
    assert point.sensitivity['images'] == 45 and model.decision.point(3).sensitivity['images'] == 30


@pytest.mark.parametrize('folds', [2, 3])
def test_two_folds_are_parted_again_to_measure_a_decision(tmp_path, folds):
    "The other one of two folds is too few images to choose a threshold on"
    oof = oof_of(*(write_fold(tmp_path / 'run', f's/fold{k}') for k in range(folds)))
    oof = oof.reset_index(drop=True).assign(group='t:' + oof.id_code.to_numpy())
    by_fold, parted = (fit_decision(Refer(), oof, parts, f'out-of-fold scores of s, {len(oof)} images', .9)[0]
                       for parts in (oof.fold.to_numpy(), stratified_group_parts(oof.diagnosis, oof.group)))
    assert read_model(tmp_path / 'run/s')[0].decision == (by_fold if folds > 2 else parted) and by_fold != parted


def test_thresholds_of_a_recipe_that_fixes_them(tmp_path):
    write_fold(tmp_path / 'run', settings=settings(thresholds='0.75 1.5 2.5 3.25'))
    assert read_model(tmp_path / 'run/s')[0].thresholds == (.75, 1.5, 2.5, 3.25)


def test_a_fold_of_an_older_version(tmp_path):
    folder = write_fold(tmp_path / 'run')
    record = read_stage(folder)
    for changed in ({k: v for k, v in record.items() if k != 'gate'},
                    record | dict(files={k: v for k, v in record['files'].items() if 'features' not in k})):
        write_record(folder / 'stage.json', changed)
        with pytest.raises(AptosError, match='older version. Run `all` again'): read_model(tmp_path / 'run/s')
    plain = {k: v for k, v in record.items() if k not in ('mean', 'std', 'pooling')}         # of timm's network
    write_record(folder / 'stage.json', plain | dict(settings=settings(head='gem')))
    member, = read_model(tmp_path / 'run/s')[0].members
    assert (member.head, member.mean, member.std) == ('gem', (.5,) * 3, (.5,) * 3)


@pytest.mark.parametrize('changes', [dict(stage='other'), dict(seed=2), dict(augment=dict(hue=.1)),
                                     dict(settings=settings(epochs=3)), dict(prep=asdict(Prep(size=32)))])
def test_folds_that_were_trained_otherwise_are_refused(tmp_path, changes):
    write_fold(tmp_path / 'run')
    write_fold(tmp_path / 'run', 's/fold1', **changes)
    with pytest.raises(AptosError, match=r's/fold1: was trained as .* with other settings than fold0'):
        read_model(tmp_path / 'run/s')


def test_folds_that_were_scored_with_other_views_are_trained_alike(tmp_path):
    for k, tta in enumerate(('none', 'hflip')): write_fold(tmp_path / 'run', f's/fold{k}', settings=settings(tta=tta))
    assert [m.tta for m in read_model(tmp_path / 'run/s')[0].members] == ['none', 'hflip']


def write_summary(root, folds, members, **keys):
    "Write summary.json of a run whose submission is the weighted mean of stages (`members`) with these folds"
    def hashes(name, stage=''):
        return {o: file_hash(root / o / name) for o in folds if o.startswith(stage)}
    decision = asdict(DecisionSpec((OperatingPoint(2, 'threshold', 1.2, 1.2),)))
    common = dict(thresholds=[.6, 1.5, 2.5, 3.5], kappa_text='0.9', warnings=['w'], decision=decision)
    stages = [dict(stage=stage, weights=hashes('weights.safetensors', f'{stage}/'), scores=hashes('preds.csv', stage),
                   **common) for stage in members]
    submission = dict(node='both', members=members, weights=hashes('weights.safetensors'), scores=hashes('preds.csv'),
                      coverage=.8, calibration=[[[.1]]] * 5, distance_units={stage: 3. for stage in members},
                      gate=dict(asdict(GateSpec(reject=.04)), ungradable='exclude'), eyes=None, **common)
    write_record(root / 'summary.json', dict(recipe='r', stages=stages, submission=submission | keys))


@pytest.fixture
def run(tmp_path):
    "The folder of a run whose submission is 0.4 * a (two folds) + 0.6 * b (one fold)"
    folds = 'a/fold0', 'a/fold1', 'b/fold0'
    for fold in folds: write_fold(tmp_path / 'run', fold)
    write_summary(tmp_path / 'run', folds, dict(a=.4, b=.6))
    return tmp_path / 'run'


def test_the_model_of_a_run(run):
    model, root = read_model(str(run))
    assert root == run and (model.name, model.kappa, model.warnings) == ('r/both', '0.9', ('w',))
    assert Counter(m.file.partition('/')[0] for m in model.members) == dict(a=2, b=1)
    assert [m.weight for m in model.members] == [.2, .2, .6] and {m.distance_unit for m in model.members} == {3.}
    assert (model.thresholds, model.coverage, model.calibration) == ((.6, 1.5, 2.5, 3.5), .8, [[[.1]]] * 5)
    assert model.gate.ungradable == 'exclude' and model.decision.point(2).threshold == 1.2


def test_the_model_of_a_run_that_fuses_both_eyes(run):
    write_summary(run, ['b/fold0'], dict(b=1.), eyes=asdict(EYES))
    model = read_model(run)[0]
    assert model.eyes == EYES and model.warnings == ('w', FUSES)


@pytest.mark.parametrize('file, words', [
    ('weights.safetensors', 'a/fold1 was trained again after the submission was made'),
    ('preds.csv', 'the validation images of a/fold1 were scored again with tta = hflip')])
def test_a_run_whose_fold_is_another_one_is_refused(run, file, words):
    record = read_stage(run / 'a/fold1')
    record['files'][file]['sha256'] = '0' * 64
    write_record(run / 'a/fold1/stage.json', record)
    with pytest.raises(AptosError, match=words): read_model(run)


def test_a_reported_stage_is_as_its_run_reports_it(run):
    write_fold(run, 'a/fold2')                                # finished, but not of this run
    model = read_model(run / 'a')[0]
    assert [m.fold for m in model.members] == [0, 1] and [m.weight for m in model.members] == [.5, .5]
    assert (model.thresholds, model.kappa, model.warnings) == ((.6, 1.5, 2.5, 3.5), '0.9', ('w',))
    assert model.coverage == .8 and model.gate.ungradable == 'exclude' and model.decision.point(2).threshold == 1.2
    oof = oof_of(run / 'a/fold0', run / 'a/fold1')
    assert model.calibration == PredictionSets(.8).fit(oof.score, oof.diagnosis, oof.fold).calibration_


def test_a_stage_that_was_trained_after_its_run_is_not_as_reported(run):
    record = read_stage(run / 'a/fold1')
    record['files']['weights.safetensors']['sha256'] = '0' * 64
    write_record(run / 'a/fold1/stage.json', record)
    model = read_model(run / 'a')[0]
    assert model.kappa == '' and model.warnings[0] == NOT_REPORTED and model.coverage == .9


def test_a_fold_as_a_model_has_no_views_and_the_midpoints(run):
    model = fold_model(run, dict(a=.4, b=.6), 0)
    assert [(m.file, m.weight, m.tta) for m in model.members] == [
        ('a/fold0/weights.safetensors', .4, 'none'), ('b/fold0/weights.safetensors', .6, 'none')]
    assert (model.name, model.thresholds, model.coverage, model.prep) == ('fold0', MIDPOINTS, .9, Prep(size=64))
    assert len(fold_model(run, dict(b=1.), 0).members) == 1
    with pytest.raises(AptosError, match='b/fold1: no finished fold here'): fold_model(run, dict(a=.4, b=.6), 1)


@pytest.mark.parametrize('size, prep, prepared', [
    (32, Prep(size=64), [0, 0]),
    (16, Prep(size=32), [0, 32]),
    (64, Prep(size=128), [64, 0]),
    (32, Prep(size=32), None),                               # one input side, two prepared squares
    (16, Prep(size=64, crop='none'), None)])                 # two ways to prepare
def test_members_of_two_sizes(tmp_path, size, prep, prepared):
    root = tmp_path / 'run'
    write_fold(root, 'a/fold0')
    write_fold(root, 'b/fold0', settings=settings(size=size), prep=asdict(prep))
    if prepared is None:
        with pytest.raises(AptosError, match='prepared in 2 ways'): fold_model(root, dict(a=1, b=1), 0)
        return
    model = fold_model(root, dict(a=1, b=1), 0)
    assert [m.prepared for m in model.members] == prepared and model.prep.size == max(64, prep.size)


def test_a_bundle_survives_its_record(tmp_path):
    model = replace(MODEL, eyes=EYES, gate=GateSpec(limit=2., reject=.1))
    write_record(tmp_path / 'bundle.json', dict(model=asdict(model)))
    found, root = read_model(tmp_path)
    assert root == tmp_path and found.digests == model.digests
    assert (found.prep, found.gate, found.decision, found.eyes) == (model.prep, model.gate, model.decision, EYES)
    old = {k: v for k, v in asdict(model).items() if k != 'decision'}
    write_record(tmp_path / 'bundle.json', dict(model=old))
    with pytest.raises(AptosError, match='older version. Export the run again'): read_model(tmp_path)


def test_no_model(tmp_path):
    with pytest.raises(AptosError, match='no model here. Give a bundle'): read_model(tmp_path)
    with pytest.raises(AptosError, match='no finished fold here'): preds_file(tmp_path)


def test_scores_that_were_edited_are_refused(tmp_path):
    folder = write_fold(tmp_path / 'run')
    assert preds_file(folder) == folder / 'preds.csv'
    (folder / 'preds.csv').write_text('id_code\n')
    with pytest.raises(AptosError, match='content changed.*Train again'): read_model(tmp_path / 'run/s')
