"One pretraining for all folds: which images it leaves out, and the proof that no validation image trained an ancestor."
import json
import shutil

import pandas as pd
import pytest
from conftest import TABLES, expect_error, without_report, write_table

from aptos_fastai.cli import main
from aptos_fastai.common.io import AptosError
from aptos_fastai.pipeline.graph import load_run, start_run
from aptos_fastai.pipeline.lineage import check_lineage
from aptos_fastai.recipe.read import read_recipe
from aptos_fastai.recipe.sections import ConfigError
from aptos_fastai.run_folder import Run

RECIPE = '''
[recipe]
splits = 3
[images]
size = 64
[table.old]
csv = old.csv
images = old_images
grade = diagnosis
''' + TABLES + '''
[stage]
arch = test_resnet
weights = none
precision = f32
size = 32
bs = 8
epochs = 1
[stage.pretrain]
train = old
[stage.finetune]
init = pretrain
train = train
folds = 3
[stage.retrain]
init = pretrain
train = train finetune:test
folds = 2
[submit]
final = finetune
table = test
'''
pytestmark = pytest.mark.usefixtures('no_report')
COPIES = 4                                   # images of `train` that are in `old`, too


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "A data folder whose table `old` holds copies of images of `train`, a recipe, and its finished run"
    folder = tmp_path_factory.mktemp('lineage')
    data = folder / 'data'
    old = write_table(data, 30, name='old', seed=5)
    write_table(data, 30)
    write_table(data, 10, graded=False, seed=1, name='test')
    copies = pd.DataFrame(dict(id_code=[f'copy{i}' for i in range(COPIES)], diagnosis=[i % 5 for i in range(COPIES)]))
    for i in range(COPIES): shutil.copy(data / f'train_images/train{i:03}.png', data / f'old_images/copy{i}.png')
    pd.concat([old, copies]).to_csv(data / 'old.csv', index=False)
    (folder / 'recipe.ini').write_text(RECIPE)
    with without_report(): main(['all', *options(folder)])
    return folder


def options(folder, *sets):
    paths = ['--recipe', str(folder / 'recipe.ini'), '--data', str(folder / 'data'), '--runs', str(folder / 'runs')]
    return [*paths, *(o for text in sets for o in ('--set', text))]


def record(folder, stage, fold): return json.loads((folder / f'runs/recipe/{stage}/fold{fold}/stage.json').read_text())


def loaded(folder, *sets): return load_run(folder / 'recipe.ini', folder / 'data', folder / 'runs', sets)


def test_one_pretraining_serves_all_folds(folder):
    pretrained = record(folder, 'pretrain', 0)
    assert not (folder / 'runs/recipe/pretrain/fold1').exists()
    for stage, folds in [('finetune', 3), ('retrain', 2)]:
        for k in range(folds):
            parents = record(folder, stage, k)['parents']
            assert parents['pretrain'] == pretrained['files']['weights.safetensors']['sha256']
    assert record(folder, 'finetune', 2)['trained_on'].keys() == {'pretrain/fold0', 'finetune/fold2'}
    assert loaded(folder).todo() == {}


def test_pretraining_leaves_out_copies_of_all_folds(folder, capsys):
    run = loaded(folder)
    stage, old = run.recipe.stages['pretrain'], run.frames['old']
    left_out = old.id_code[run.held_out(stage, 'old')]
    assert left_out.tolist() == [f'copy{i}' for i in range(COPIES)]
    images = record(folder, 'pretrain', 0)['images']
    assert images['train'] + images['valid'] == 30
    assert images['train'] == record(folder, 'finetune', 1)['trained_on']['pretrain/fold0']
    main(['prepare', *options(folder)])
    assert f'pretrain leaves out {COPIES} of 34 images of old: copies or patients of train' in capsys.readouterr().out


def test_lineage_is_checked_image_by_image(folder, monkeypatch):
    run = loaded(folder)
    for k in range(3): check_lineage(run, 'finetune', k)
    monkeypatch.setattr(Run, 'held_out', lambda self, stage, table: pd.Series(False, self.frames[table].index))
    message = r'finetune fold \d is validated by images that train pretrain fold 0: old copy'
    with pytest.raises(AptosError, match=message):
        for k in range(3): check_lineage(run, 'finetune', k)


def test_copies_of_other_tables_change_the_fingerprint_of_the_pretraining_alone_where_they_are_left_out(folder):
    run, alone = loaded(folder), loaded(folder, 'stage.finetune.folds=1', 'stage.retrain.folds=1')
    assert not alone.held_out(alone.recipe.stages['pretrain'], 'old').any()
    assert run.fingerprint('pretrain', 0) != alone.fingerprint('pretrain', 0)


@pytest.mark.parametrize('sets, message', [
    (['stage.pretrain.train=old train'], r'\[stage.pretrain\] folds = 1: it trains on train, whose folds validate a '
     'stage that builds on it and trains more of them'),
    (['stage.pretrain.folds=2'], r'\[stage.finetune\] folds = 3: its parent pretrain trains only 2. Use at most 2, or '
     'set folds of pretrain to 3, or to 1 if it trains on other tables'),
    (['stage.finetune.folds=1', 'stage.retrain.folds=3'], r'\[stage.finetune\] folds = 1: it trains on train')])
def test_a_parent_of_one_fold_is_refused_where_it_trained_on_validation_images(folder, sets, message):
    with pytest.raises(ConfigError, match=message): read_recipe(folder / 'recipe.ini', sets=sets)


def test_an_ancestor_of_more_folds_below_a_parent_of_one_is_refused(folder):
    "Fold 0 of `first` trains on images of folds 1 and 2, on which fold 0 of `pretrain` and every `finetune` builds"
    sets = ['stage.first.train=train', 'stage.first.folds=3', 'stage.pretrain.init=first']
    with pytest.raises(ConfigError, match=r'\[stage.first\] folds = 3: it trains on train'):
        read_recipe(folder / 'recipe.ini', sets=sets)


# Several seeds

def test_seeds_make_stages_and_their_mean(folder):
    sets = ['stage.finetune.seeds=3', 'stage.pretrain.seeds=2', 'recipe.seed=7']
    recipe = read_recipe(folder / 'recipe.ini', sets=sets)
    assert recipe.members('finetune') == pytest.approx({f'finetune_seed{i}': 1 / 3 for i in (1, 2, 3)})
    assert [recipe.stages[f'finetune_seed{i}'].seed for i in (1, 2, 3)] == [7, 8, 9]
    assert [recipe.stages[f'finetune_seed{i}'].init for i in (1, 2, 3)] == [
        'pretrain_seed1', 'pretrain_seed2', 'pretrain_seed1']
    assert recipe.stages['retrain'].sources[1] == ('finetune', 'test') and recipe.stages['retrain'].seed == 7
    assert recipe.stages['retrain'].init == 'pretrain_seed1'


def test_seeds_share_the_weight_of_their_stage_in_an_ensemble(folder):
    sets = ['stage.finetune.seeds=2', 'stage.retrain.folds=3', 'ensemble.both.members=finetune retrain']
    recipe = read_recipe(folder / 'recipe.ini', sets=sets)
    assert recipe.members('both') == {'finetune_seed1': .25, 'finetune_seed2': .25, 'retrain': .5}
    recipe = read_recipe(folder / 'recipe.ini', sets=[*sets, 'ensemble.both.weights=1 3'])
    assert recipe.members('both') == {'finetune_seed1': .125, 'finetune_seed2': .125, 'retrain': .75}


def test_a_name_that_seeds_would_make_twice_is_refused(folder):
    sets = ['stage.finetune.seeds=2', 'stage.finetune_seed2.train=train']
    with pytest.raises(ConfigError, match=r'\[stage.finetune\] seeds = 2: makes a stage finetune_seed2, which the'):
        read_recipe(folder / 'recipe.ini', sets=sets)


def test_members_that_leave_out_other_images_are_refused_before_training(folder, tmp_path, capsys):
    "`pretrain` leaves out copies of the images that validate `finetune`; `alone`, on which nothing builds, does not"
    sets = ['stage.alone.train=old', 'ensemble.two.members=pretrain alone']
    args = ['plan', *options(folder, *sets)]
    expect_error(capsys, args, 'two averages pretrain and alone, but only one of them is validated by',
                 'images of fold 0: copy', 'Let the same stages build on both, or average other stages.')
    main(['plan', *options(folder, sets[0], 'ensemble.two.members=finetune retrain', 'stage.retrain.folds=3')])


def test_more_seeds_train_only_the_new_ones(folder, tmp_path, capsys):
    "The first seed is the training that was there; the second is another one on the same folds"
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    first = record(tmp_path, 'finetune', 0)
    main(['train', 'finetune', *options(tmp_path, 'stage.finetune.seeds=2')])
    assert 'finetune is called finetune_seed1 now' in capsys.readouterr().out
    one, two = (record(tmp_path, f'finetune_seed{i}', 0) for i in (1, 2))
    assert one['fingerprint'] == first['fingerprint'] and one['files'] == first['files']
    assert two['seed'] == one['seed'] + 1 and two['files'] != one['files']
    scores = [pd.read_csv(tmp_path / f'runs/recipe/finetune_seed{i}/fold0/preds.csv') for i in (1, 2)]
    assert scores[0].id_code.equals(scores[1].id_code) and not scores[0].score.equals(scores[1].score)
    run = loaded(tmp_path, 'stage.finetune.seeds=2')
    with start_run(run, ['finetune_seed1', 'finetune_seed2']) as (run, _):
        mean = run.oof('finetune', 0)
    assert mean.score.to_numpy() == pytest.approx((scores[0].score + scores[1].score).to_numpy() / 2)


def test_a_seed_of_its_own_leaves_the_folds_as_they_are(folder):
    run, other = loaded(folder), loaded(folder, 'stage.finetune.seed=5')
    assert other.todo(['finetune']) == {'finetune': [0, 1, 2]} and other.todo(['pretrain']) == {}
    assert run.frames['train'].fold.equals(other.frames['train'].fold)


# Weights from a file

def test_weights_that_know_validation_images_are_named(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    weights = tmp_path / 'runs/recipe/finetune/fold1/weights.safetensors'
    sets = ['stage.pretrain.folds=2', 'stage.finetune.folds=2', f'stage.finetune.weights={weights}',
            'stage.finetune.init=']
    shutil.copy(tmp_path / 'recipe.ini', tmp_path / 'other.ini')
    args = ['--recipe', str(tmp_path / 'other.ini'), *options(tmp_path, *sets)[2:]]
    main(['all', *args])
    warnings = json.loads((tmp_path / 'runs/other/summary.json').read_text())['submission']['warnings']
    assert 'weights.safetensors was trained on 30 images of train, which validate: optimistic' in warnings
    stage = json.loads((tmp_path / 'runs/other/finetune/fold1/stage.json').read_text())
    assert stage['origin'] == dict(known=True, note='', seen=dict(old=34, train=30))


def test_weights_of_unknown_origin_are_named(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    weights = tmp_path / 'copied.safetensors'
    shutil.copy(tmp_path / 'runs/recipe/pretrain/fold0/weights.safetensors', weights)
    main(['all', *options(tmp_path, f'stage.pretrain.weights={weights}'), '--replace'])
    warnings = json.loads((tmp_path / 'runs/recipe/summary.json').read_text())['submission']['warnings']
    assert 'the images that copied.safetensors was trained on are unknown: if some of them validate, this is ' \
           'optimistic' in warnings


def test_a_model_knows_the_images_of_a_pretraining_that_served_all_folds(folder):
    from aptos_fastai.inference.model_spec import read_model
    from aptos_fastai.inference.training_images import training_images
    root = folder / 'runs/recipe'
    known, note = training_images(read_model(root)[0], root)
    assert len(known) == 60 and note == ''   # of `old` and `train`, copies once


def test_a_table_that_a_stage_does_not_train_on_changes_what_it_may_see(folder, tmp_path):
    "A stage with a table that only trains, `old`: copies of images of another graded table of the run are left out"
    shutil.copytree(folder / 'data', tmp_path / 'data')
    write_table(tmp_path / 'data', 20, name='small', seed=9)
    table = '[table.small]\ncsv = small.csv\nimages = small_images\ngrade = diagnosis\n'
    head = RECIPE[:RECIPE.index('[stage.pretrain]')].replace('splits = 3', 'splits = 2')
    alone = head.replace(RECIPE[RECIPE.index('[table.train]'):RECIPE.index('[table.test]')], '') + table + \
        '[stage.pre]\ntrain = small old\nvalidate = small\nfolds = 2\n'
    both = head + table + '[stage.pre]\ntrain = small old\nvalidate = small\nfolds = 2\n' \
        '[stage.fine]\ntrain = train\ninit = pre\nfolds = 2\n'
    prepared = {}
    for name, text, final in (('alone', alone, 'pre'), ('both', both, 'fine')):
        (tmp_path / f'{name}.ini').write_text(f'{text}[submit]\nfinal = {final}\n')
        run = load_run(tmp_path / f'{name}.ini', tmp_path / 'data', tmp_path / 'runs')
        with start_run(run) as (run, _): prepared[name] = run
    stage = prepared['both'].recipe.stages['pre']
    left_out = [prepared['both'].left_out_for_others(stage, 'old', k) for k in (0, 1)]
    assert sum(o.sum() for o in left_out) == COPIES
    for k in (0, 1):
        assert not prepared['alone'].left_out_for_others(stage, 'old', k).any()
        seen = prepared['both'].training_part(stage, 'old', k)
        assert not (seen & left_out[k]).any()
        same = prepared['both'].fingerprint('pre', k) == prepared['alone'].fingerprint('pre', k)
        assert same == (not left_out[k].any())
