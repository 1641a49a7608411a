"What is trained again: which keys, names and tables change a training, and what `plan` says of it."
import json
import shutil
from dataclasses import asdict, replace

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from conftest import expect_error, modified_times, without_report, write_table

from aptos_fastai.cli import main
from aptos_fastai.common.io import AptosError, file_hash, read_record, write_record
from aptos_fastai.deploy.bundle import lineage
from aptos_fastai.inference.grader import load_grader
from aptos_fastai.inference.model_spec import NOT_REPORTED, copy_members, read_model
from aptos_fastai.pipeline.graph import load_run, outputs_up_to_date
from aptos_fastai.pipeline.network_check import check_init
from aptos_fastai.pipeline.pseudo_labels import read_labels
from aptos_fastai.pipeline.reasons import training_reasons
from aptos_fastai.recipe.sections import Stage
from aptos_fastai.run_folder import WEIGHTS, hash_once

pytestmark = pytest.mark.usefixtures('no_report')
RECIPE = '''
[recipe]
splits = 3

[table.train]
csv = train.csv
images = train_images
id = id_code
grade = diagnosis

[table.test]
csv = test.csv
images = test_images
id = id_code

[stage]
weights = none
arch = test_resnet
size = 32
folds = 2
epochs = 1
bs = 8
keep = last
precision = f32

[stage.first]
train = train

[stage.second]
train = train first:test
init = first

[ensemble.both]
members = first second

[submit]
table = test
final = both
'''


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    "A finished run of `RECIPE`: a folder with recipe.ini, data and runs. Tests must not change it"
    folder = tmp_path_factory.mktemp('finished')
    write_table(folder / 'runs/data', 30)
    write_table(folder / 'runs/data', 8, graded=False, seed=1, name='test')
    (folder / 'recipe.ini').write_text(RECIPE)
    with without_report(): main(['all', *options(folder)])
    return folder


@pytest.fixture
def copied(finished, tmp_path):
    "A copy of the finished run that a test may change"
    shutil.copytree(finished, tmp_path / 'copy')
    return tmp_path / 'copy'


def options(folder, *keys):
    sets = [o for key in keys for o in ('--set', key)]
    return ['--recipe', str(folder / 'recipe.ini'), '--data', str(folder / 'runs/data'), '--runs', str(folder / 'runs'),
            *sets]


def open_run(folder, *keys): return load_run(folder / 'recipe.ini', folder / 'runs/data', folder / 'runs', keys)


def weights_of(folder): return {f'{f.parts[-3]}/{f.parts[-2]}': file_hash(f) for f in folder.rglob(WEIGHTS)}


def edit_recipe(folder, *replacements):
    text = (folder / 'recipe.ini').read_text()
    for old, new in replacements:
        assert old in text
        text = text.replace(old, new)
    (folder / 'recipe.ini').write_text(text)


def reasons(run): return training_reasons(run, run.todo())


NO_TRAINING = [
    ['stage.workers=1'], ['stage.precision=auto'], ['stage.thresholds=optimal'], ['stage.track=tensorboard'],
    ['recipe.owner=Someone', 'recipe.contact=a@b.c'], ['submit.thresholds=0.5 1.5 2.5 3.5'], ['gate.reject=.1'],
    ['stage.labels=hard', 'stage.second.labels=soft'], ['refer.sensitivity=.8'], ['stage.second.tta=d4'],
    ['stage.tta=hflip', 'stage.label_tta=none'], ['stage.second.label_tta=d4'], ['stage.folds=1'],
    ['ensemble.both.weights=1 2']]


@pytest.mark.parametrize('keys', NO_TRAINING, ids=lambda keys: keys[0])
def test_keys_that_change_no_training(finished, keys):
    run = open_run(finished, *keys)
    assert run.todo() == {} and reasons(run) == []
    assert not outputs_up_to_date(run)


TRAINING = {
    'stage.second.wd=.5': ['second: wd: 0.01 -> 0.5'],
    'stage.second.lr=.002': ['second: lr: 0.001 -> 0.002'],
    'stage.second.precision=bf16': ['second: precision: f32 -> bf16'],
    'stage.second.train=train': ['second: train: train first:test -> train'],
    'stage.second.labels=hard': ['second: pseudo-labels first:test, labels: soft -> hard; '
                                 'pseudo-labels first:test, thresholds: (empty) -> regularised'],
    'stage.second.size=48': ['second: size: 32 -> 48'],
    'stage.second.init=': ['second: init: first -> (empty)'],
    'stage.first.tta=hflip': ['second: pseudo-labels first:test, views: none -> hflip'],
    'stage.first.label_tta=hflip': ['second: pseudo-labels first:test, views: none -> hflip'],
    'stage.folds=3': ['first fold 2, second fold 2: never trained'],
    'augment.rotate=10': ['first: [augment] rotate: 180.0 -> 10.0',
                          'second: [augment] rotate: 180.0 -> 10.0; first is trained again'],
    'stage.first.epochs=2': ['first: epochs: 1 -> 2', 'second: first is trained again'],
    'images.quality=90': ['first: [images] quality: 95 -> 90; table train: images to prepare',
                          'second: [images] quality: 95 -> 90; table train: images to prepare; '
                          'table test: images to prepare; first is trained again'],
}


@pytest.mark.parametrize('key', TRAINING)
def test_plan_says_which_key_makes_a_stage_train(finished, key):
    assert reasons(open_run(finished, key)) == TRAINING[key]


def test_thresholds_of_hard_labels_depend_on_the_views_of_validation_images(finished):
    keys = ['stage.second.labels=hard', 'stage.label_tta=none']
    hard, views = (open_run(finished, *keys, *more) for more in ([], ['stage.tta=hflip']))
    assert hard.fingerprint('second', 0) != views.fingerprint('second', 0)
    assert reasons(views)[0].endswith('pseudo-labels first:test, fit_views: none -> hflip')
    assert 'fit_views' not in hard.inputs('second', 0)['train'][1]             # as runs of older versions have it


def test_nothing_is_trained_of_a_run_that_was_never_started(finished, tmp_path):
    run = load_run(finished / 'recipe.ini', finished / 'runs/data', tmp_path / 'runs')
    assert reasons(run) == ['first, second: never trained']


def test_other_views_score_again_what_was_trained(copied, tmp_path, capsys):
    "The new validation scores are those of a training with these views, and the weights are the old ones"
    key, before = 'stage.second.tta=hflip', weights_of(copied)
    assert list(open_run(copied, key).to_refresh({})) == ['second']
    main(['all', *options(copied, key)])
    out = capsys.readouterr().out
    assert 'stage 1 of' not in out and out.count('scored again, with tta = hflip') == 2
    assert weights_of(copied) == before and outputs_up_to_date(open_run(copied, key))
    assert read_record(copied / 'runs/recipe/second/fold0/stage.json')['settings']['tta'] == 'hflip'

    fresh = tmp_path / 'fresh'
    shutil.copytree(copied, fresh, ignore=shutil.ignore_patterns('second', 'labels'))
    main(['all', *options(fresh, key)])
    assert weights_of(fresh) == before
    for k in (0, 1):
        again, trained = (pd.read_csv(f / f'runs/recipe/second/fold{k}/preds.csv') for f in (copied, fresh))
        assert again.drop(columns=['score', 'feature_distance']).equals(
            trained.drop(columns=['score', 'feature_distance']))
        assert np.allclose(again.score, trained.score, atol=1e-5)
        assert np.allclose(again.feature_distance, trained.feature_distance, rtol=1e-4)
    old = pd.read_csv(tmp_path / 'copy/runs/recipe/first/fold0/preds.csv')
    assert again.score.std() > 1e-4 and len(old) == 10


def test_views_of_a_teacher_change_the_labels_and_train_its_student(copied):
    key, before = 'stage.first.tta=hflip', weights_of(copied)
    old = read_labels(open_run(copied), 'first', 'test', 'soft')
    main(['all', *options(copied, key), '--replace'])
    after = weights_of(copied)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {'second/fold0', 'second/fold1'}
    new = read_labels(open_run(copied, key), 'first', 'test', 'soft')
    assert (old.diagnosis - new.diagnosis).abs().max() > 0


def test_labels_keep_their_own_views(copied, capsys):
    "With `label_tta`, other views of all stages score the images again, and change neither labels nor weights"
    keys, before = ['stage.tta=hflip', 'stage.label_tta=none'], weights_of(copied)
    old = read_labels(open_run(copied), 'first', 'test', 'soft')
    fold = copied / 'runs/recipe/first/fold0'
    labelled = (fold / 'scores_test_none.csv').read_bytes()
    main(['all', *options(copied, *keys)])
    assert weights_of(copied) == before and outputs_up_to_date(open_run(copied, *keys))
    assert capsys.readouterr().out.count('scored again, with tta = hflip') == 4
    assert read_labels(open_run(copied, *keys), 'first', 'test', 'soft').equals(old)
    assert (fold / 'scores_test_none.csv').read_bytes() == labelled
    submitted = pd.read_csv(fold / 'scores_test_hflip.csv')
    assert (submitted.score - old.fold0).abs().max() > 1e-6 and (submitted.score_sd > 0).any()


@pytest.mark.parametrize('finished_by_all', [True, False])
def test_a_finished_fold_is_not_trained_again_unasked(copied, capsys, finished_by_all):
    "With other settings it asks for a name or --replace, and changes nothing"
    root = copied / 'runs/recipe'
    if not finished_by_all: (root / 'summary.json').unlink()
    before = modified_times(copied)
    for command in (['all'], ['train', 'second']):
        expect_error(capsys, [*command, *options(copied, 'stage.second.lr=.02')],
                     f'{root}: finished with other settings', 'second: lr: ', '--name NAME', '--replace',
                     f'To go on with its own settings: python run.py all {root}')
    assert modified_times(copied) == before
    main(['train', 'second', *options(copied, 'stage.second.lr=.02'), '--name', 'other'])
    out = ' '.join(capsys.readouterr().out.split())
    assert f'first: folds 0 1 from {root / "first"}' in out and 'stage 1 of 1: second' in out


def test_prepared_images_may_be_deleted_in_a_finished_run(copied, capsys):
    "They are made again; that is no change of the run"
    shutil.rmtree(copied / 'runs/prepared')
    main(['all', *options(copied)])
    assert 'Nothing to do' in capsys.readouterr().out


def test_a_submission_by_another_recipe_is_refused(copied, capsys):
    "A recipe of another name that blends other members, used with --name of this run"
    root, before = copied / 'runs/recipe', modified_times(copied / 'runs/recipe')
    other = copied / 'other.ini'
    other.write_text((copied / 'recipe.ini').read_text().replace('final = both', 'final = first'))
    args = ['--recipe', other, '--data', options(copied)[3], '--runs', root.parent, '--name', root.name]
    for command in ('submit', 'score'):
        expect_error(capsys, [command, *args], '[submit] final = first', f'{root} has both', f'--run {root}')
    assert modified_times(root) == before
    main(['submit', *options(copied, 'submit.final=first')])         # asked for by --set
    assert 'first, thresholds' in capsys.readouterr().out


def test_a_model_of_other_scores_is_refused(copied):
    "`train` scores again; thresholds, kappa and gate in summary.json are still of the old scores"
    root, key = copied / 'runs/recipe', 'stage.second.tta=hflip'
    assert read_model(root)[0].kappa and read_model(root / 'second')[0].kappa
    main(['train', 'second', *options(copied, key)])
    with pytest.raises(AptosError, match=r'second/fold0 were scored again with tta = hflip.* Run `all` again'):
        read_model(root)
    with pytest.raises(AptosError, match='scored again'): load_grader(root)
    stage = read_model(root / 'second')[0]
    assert stage.kappa == '' and NOT_REPORTED in stage.warnings and stage.members[0].tta == 'hflip'
    assert read_model(root / 'first')[0].kappa
    main(['all', *options(copied, key)])
    assert read_model(root)[0].kappa and read_model(root / 'second')[0].kappa


def test_a_summary_without_hashes_of_scores_is_of_an_older_version(copied):
    file = copied / 'runs/recipe/summary.json'
    summary = read_record(file)
    for part in (summary['submission'], *summary['stages']): del part['scores']
    write_record(file, summary)
    with pytest.raises(AptosError, match='older version. Run `all` again'): read_model(copied / 'runs/recipe')
    assert read_model(copied / 'runs/recipe/first')[0].kappa == ''


def test_missing_validation_scores_are_made_again(copied):
    preds = copied / 'runs/recipe/first/fold1/preds.csv'
    old, before = pd.read_csv(preds), weights_of(copied)
    preds.unlink()
    run = open_run(copied)
    assert run.todo() == {} and run.to_refresh({}) == dict(first=[1]) and not outputs_up_to_date(run)
    main(['all', *options(copied)])
    assert weights_of(copied) == before
    assert np.allclose(pd.read_csv(preds).score, old.score, atol=1e-5)


def test_an_interrupted_rescoring_is_done_again(copied, monkeypatch):
    from aptos_fastai.pipeline import refresh

    def killed(*args): raise KeyboardInterrupt
    monkeypatch.setattr(refresh, 'write_csv', killed)
    with pytest.raises(SystemExit): main(['train', 'first', *options(copied, 'stage.tta=hflip')])
    run = open_run(copied)                   # even with the old views: the scores may be half of the new ones
    assert run.todo() == {} and run.to_refresh({}) == dict(first=[0])


def test_a_renamed_stage_is_moved(copied, capsys):
    before = weights_of(copied)
    edit_recipe(copied, ('stage.first]', 'stage.teacher]'), ('first:test', 'teacher:test'),
                ('init = first', 'init = teacher'), ('members = first', 'members = teacher'))
    run = open_run(copied)
    assert run.todo() == {} and run.renamed == dict(teacher='first')
    assert len(run.oof('teacher')) == 20      # read where it is, until `all` moves it
    main(['all', *options(copied)])
    assert 'first is called teacher now' in capsys.readouterr().out
    assert weights_of(copied) == {name.replace('first', 'teacher'): sha for name, sha in before.items()}
    run = open_run(copied)
    assert outputs_up_to_date(run) and not (run.root / 'first').exists()
    record = run.record('second', 0)
    assert record['parents'] == {'teacher': before['first/fold0']} and record['settings']['init'] == 'teacher'
    found = [lineage(run.root, member)['stage'] for member in read_model(run.root)[0].members]
    assert found == ['teacher', 'teacher', 'second', 'second']


def test_a_stage_is_not_moved_to_other_settings(copied):
    edit_recipe(copied, ('stage.second]', 'stage.student]\nwd = .3'), ('first second', 'first student'))
    run = open_run(copied)
    assert run.renamed == {} and reasons(run) == ['student: never trained']


def test_a_renamed_table_is_the_same_table(copied, capsys):
    before = weights_of(copied)
    edit_recipe(copied, ('table.train]', 'table.graded]'), ('train = train', 'train = graded'),
                ('table.test]', 'table.new]'), ('first:test', 'first:new'), ('table = test', 'table = new'))
    assert open_run(copied).todo() == {}     # its images are known from the store, though by another name
    main(['all', *options(copied)])
    assert 'stage 1 of' not in capsys.readouterr().out and weights_of(copied) == before
    run = open_run(copied)
    assert outputs_up_to_date(run) and set(run.oof('both').source) == {'graded'}
    assert len(run.groups(run.oof('both'))) == 20


def test_plan_knows_a_renamed_stage_on_a_renamed_table(copied, capsys):
    edit_recipe(copied, ('stage.first]', 'stage.teacher]'), ('train = train', 'train = graded'),
                ('table.train]', 'table.graded]'), ('first:test', 'teacher:test'), ('init = first', 'init = teacher'),
                ('members = first', 'members = teacher'))
    main(['plan', *options(copied)])
    out = capsys.readouterr().out
    assert 'renamed: first is called teacher now' in out and 'no stage is trained again' in out
    assert 'never trained' not in out and 'to train' not in out
    image = copied / 'runs/data/train_images/train000.png'
    image.rename(image.with_name('other.png'))                     # now it is another table
    change_table(copied, lambda df: df.assign(id_code=df.id_code.replace('train000', 'other')))
    assert 'teacher' in open_run(copied).todo()


def change_table(folder, change):
    df = pd.read_csv(folder / 'runs/data/train.csv')
    change(df).to_csv(folder / 'runs/data/train.csv', index=False)


def test_plan_says_how_a_table_has_changed(copied, capsys):
    change_table(copied, lambda df: df[2:])
    assert reasons(open_run(copied))[0] == ('first: table train: 30 -> 28 images, images of grades 0-4: '
                                            '6 6 6 6 6 -> 5 5 6 6 6')
    main(['plan', *options(copied)])
    out = capsys.readouterr().out
    assert 'To prepare: 0 images' in out and 'to train: first: table train: 30 -> 28 images' in out


def test_swapped_grades_are_seen(copied):
    change_table(copied, lambda df: df.assign(diagnosis=df.diagnosis.to_numpy()[::-1]))
    assert reasons(open_run(copied))[0] == 'first: table train: grades changed'


def test_one_new_image_is_to_be_prepared(copied, capsys):
    change_table(copied, lambda df: pd.concat([df, pd.DataFrame(dict(id_code=['new'], diagnosis=[1]))]))
    shutil.copy(copied / 'runs/data/train_images/train000.png', copied / 'runs/data/train_images/new.png')
    main(['plan', *options(copied)])
    out = capsys.readouterr().out
    assert 'To prepare: 1 images' in out and 'table train: 30 -> 31 images' in out


def test_damaged_files_parents_trained_again_and_unfinished_trainings(copied):
    root = copied / 'runs/recipe'
    (root / 'second/fold1/learner.pkl').unlink()
    assert reasons(open_run(copied)) == ['second fold 1: learner.pkl is missing or has another size']
    record = read_record(root / 'first/fold0/stage.json')
    record['files'][WEIGHTS]['sha256'] = 'of another training'
    write_record(root / 'first/fold0/stage.json', record)
    assert reasons(open_run(copied))[0] == 'second fold 0: first was trained again'
    (root / 'first/fold0/stage.json').unlink()
    write_record(root / 'first/fold0/checkpoint.json', dict(epochs=3))
    assert reasons(open_run(copied))[:1] == ['first fold 0: unfinished after 3 epochs']


def test_a_record_of_an_older_version(copied):
    file = copied / 'runs/recipe/first/fold0/stage.json'
    record = read_record(file)
    del record['inputs']
    write_record(file, dict(record, fingerprint='of another formula'))
    assert reasons(open_run(copied))[0] == 'first fold 0: written by an older version'
    record = read_record(copied / 'runs/recipe/first/fold1/stage.json')
    del record['settings']['ema']
    write_record(copied / 'runs/recipe/first/fold1/stage.json', dict(record, fingerprint='x'))
    assert reasons(open_run(copied))[1] == 'first fold 1: written by an older version, without the key ema'


def test_plan_refuses_before_it_times_steps(copied, capsys):
    for plan in (['plan'], ['plan', '--images', 'train=60 test=20']):
        with pytest.raises(SystemExit): main([*plan, *options(copied, 'stage.optimizer=lbfgs')])
        out, err = capsys.readouterr()
        assert 'recipe.ini [stage.first] optimizer = lbfgs: cannot train' in err and 'starts from' not in out


PROBE = ['stage.epochs=0', 'stage.freeze_epochs=1', 'stage.precision=auto']


@pytest.fixture(scope='module')
def finished_probe(tmp_path_factory):
    folder = tmp_path_factory.mktemp('probe')
    write_table(folder / 'runs/data', 30)
    write_table(folder / 'runs/data', 8, graded=False, seed=1, name='test')
    (folder / 'recipe.ini').write_text(RECIPE)
    main(['train', 'first', *options(folder, *PROBE)])
    return folder


@pytest.mark.parametrize('keys', [['stage.lr_div=5'], ['stage.layer_decay=.7'], ['stage.drop_path=.1'],
                                  ['augment.rotate=10'], ['stage.precision=f32']], ids=lambda keys: keys[0])
def test_keys_that_a_linear_probe_ignores(finished_probe, keys):
    assert 'first' not in open_run(finished_probe, *PROBE, *keys).todo()


@pytest.mark.parametrize(('key', 'reason'), [
    ('stage.precision=bf16', 'precision: f32 -> bf16'), ('stage.tta=hflip', 'tta: none -> hflip'),
    ('stage.lr=.02', 'lr: 0.001 -> 0.02'), ('stage.epochs=1', 'epochs: 0 -> 1')])
def test_keys_that_train_a_linear_probe(finished_probe, key, reason):
    assert reasons(open_run(finished_probe, *PROBE, key))[0] == f'first: {reason}'


def test_a_linear_probe_in_bf16_trains_again_with_precision_auto(finished_probe, tmp_path):
    shutil.copytree(finished_probe, tmp_path / 'copy')
    for k in (0, 1):
        file = tmp_path / f'copy/runs/recipe/first/fold{k}/stage.json'
        write_record(file, dict(read_record(file), precision='bf16'))
    assert reasons(open_run(tmp_path / 'copy', *PROBE))[0] == 'first: precision: bf16 -> f32'
    assert 'first' not in open_run(tmp_path / 'copy', *PROBE, 'stage.precision=bf16').todo()


@pytest.mark.parametrize(('arch', 'old', 'new', 'fits'), [
    ('test_vit', 64, 96, True), ('test_resnet', 64, 96, True), ('levit_128s', 224, 256, False),
    ('hiera_tiny_224', 224, 256, False)])
def test_weights_of_another_size_are_fitted_before_anything_is_trained(arch, old, new, fits):
    parent = Stage('small', train=('train',), arch=arch, size=old)
    stage = replace(parent, name='large', size=new, init='small')
    if fits: check_init(stage, parent)
    else:
        with pytest.raises(AptosError, match=f'init = small: .* at size = {old} do not fit size = {new} .*not'):
            check_init(stage, parent)


def test_init_of_another_size_stops_all_before_the_parent_trains(copied, capsys, monkeypatch):
    monkeypatch.setattr('aptos_fastai.pipeline.network_check._resampling_problem', lambda *args: 'a reason')
    with pytest.raises(SystemExit):
        main(['train', 'second', *options(copied, 'stage.lr=.1', 'stage.second.size=48'), '--replace'])
    out, err = capsys.readouterr()
    assert '[stage.second] init = first: weights of test_resnet trained at size = 32 do not fit' in err
    assert 'stage 1 of' not in out


def test_a_file_is_hashed_once(tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr('aptos_fastai.run_folder.file_hash', lambda file: read.append(file) or file_hash(file))
    file = tmp_path / 'a.pth'
    file.write_bytes(b'1')
    first = hash_once(str(file))
    assert hash_once(str(file)) == first == file_hash(file) and len(read) == 1
    file.write_bytes(b'22')
    assert hash_once(str(file)) == file_hash(file) != first and len(read) == 2


def test_plan_of_a_run_with_outdated_outputs_only(copied, capsys):
    main(['plan', *options(copied, 'stage.second.tta=hflip')])
    out = capsys.readouterr().out
    assert 'no stage is trained again' in out and 'only new scores of the validation images: second' in out
    assert 'never trained' not in out and json.loads((copied / 'runs/recipe/second/fold0/stage.json').read_text())[
        'settings']['tta'] == 'none'


# Sizes: each stage reads squares of its own size

def test_a_larger_stage_changes_no_other_training(copied):
    before = weights_of(copied)
    keys = ['stage.larger.train=train', 'stage.larger.size=48', 'submit.also=larger']
    run = open_run(copied, *keys)
    assert list(run.todo()) == ['larger']
    main(['all', *options(copied, *keys)])
    after, run = weights_of(copied), open_run(copied, *keys)
    assert {name: after[name] for name in before} == before and len(after) == len(before) + 2
    assert run.todo() == {} and outputs_up_to_date(run)
    assert run.record('larger', 0)['prep']['size'] == 48 and run.record('first', 0)['prep']['size'] == 32


def test_size_of_images_makes_all_stages_train(finished):
    run = open_run(finished, 'images.size=48')
    assert list(run.todo()) == ['first', 'second']
    assert reasons(run)[0].startswith('first: [images] size: 32 -> 48')


def test_members_of_two_sizes_score_an_original_as_the_run_did(copied):
    "Each network of the model gets squares prepared at its own size: by the run from the store, by a grader from files"
    keys = ['stage.second.size=48', 'stage.second.init=', 'submit.final=both']
    main(['all', *options(copied, *keys), '--replace'])
    run, (model, root) = open_run(copied, *keys), read_model(copied / 'runs/recipe')
    assert model.prep.size == 48 and model.prepared == {32: 32, 48: 48}
    files = run.frames['test'].path.tolist()
    scores = load_grader(root).predict(files).set_index('file').score
    expected = pd.read_csv(root / 'scores.csv').set_index('id_code').score
    assert np.allclose(scores[files], expected[run.frames['test'].id_code], atol=1e-4)
    folder = model_folder(model, root, copied / 'bundle')
    bundled = load_grader(folder).predict(files).score
    assert np.allclose(bundled, scores[files], atol=1e-6)


def model_folder(model, root, folder):
    "Write what a grader needs of a bundle to `folder`"
    copied_model = copy_members(model, root, folder)
    write_record(folder / 'bundle.json', dict(model=asdict(copied_model), parity=[], files={}))
    assert read_model(folder)[0].digests == model.digests
    return folder


def test_a_file_of_initial_weights_is_compared_by_content(tmp_path, capsys):
    write_table(tmp_path / 'runs/data', 30)
    write_table(tmp_path / 'runs/data', 8, graded=False, seed=1, name='test')
    (tmp_path / 'recipe.ini').write_text(RECIPE)
    file, moved = tmp_path / 'a.pth', tmp_path / 'b.pth'
    net = timm.create_model('test_resnet', pretrained=False)
    torch.save(net.state_dict(), file)
    main(['train', 'first', *options(tmp_path, f'stage.weights={file}')])
    before = weights_of(tmp_path)
    file.rename(moved)
    assert 'first' not in open_run(tmp_path, f'stage.weights={moved}').todo()
    assert 'first' not in open_run(tmp_path, f'stage.weights={file}').todo()           # no longer there
    absent, record = tmp_path / 'absent.pth', tmp_path / 'runs/recipe/first/fold0/stage.json'
    assert f'first: weights: {absent}: no such file' in reasons(open_run(tmp_path, f'stage.weights={absent}'))
    main(['plan', *options(tmp_path, f'stage.weights={absent}')])
    assert f'[stage.first] weights = {absent}: no such file' in capsys.readouterr().out
    for command in (['train', 'first'], ['all']):
        args = [*command, *options(tmp_path, f'stage.weights={absent}')]
        expect_error(capsys, args, f'first: weights: {absent}: no such file', '--replace')
        with pytest.raises(SystemExit): main([*args, '--replace'])
        assert '[stage.first] weights = ' in (err := capsys.readouterr().err) and 'no such file' in err
    assert read_record(record)['settings']['weights'] == str(file) and weights_of(tmp_path) == before
    main(['train', 'first', *options(tmp_path, f'stage.weights={moved}')])             # records where the file is now
    assert read_record(record)['settings']['weights'] == str(moved) and weights_of(tmp_path) == before
    torch.save({name: tensor + 1 for name, tensor in net.state_dict().items()}, moved)
    run = open_run(tmp_path, f'stage.weights={moved}')
    assert run.todo()['first'] == [0, 1]
    assert f'first: weights: {moved} has another content' in reasons(run)
    assert 'first: weights: none -> imagenet' not in reasons(run)
    main(['train', 'first', *options(tmp_path, f'stage.weights={moved}'), '--replace'])
    assert before.keys() == weights_of(tmp_path).keys() and not before.items() & weights_of(tmp_path).items()
