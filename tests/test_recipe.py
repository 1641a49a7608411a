import re
from dataclasses import fields

import pytest
from conftest import ROOT, expect_error
from hypothesis import given
from hypothesis import strategies as st

from aptos_fastai.recipe.read import changed, read_recipe
from aptos_fastai.recipe.sections import OLD_KEYS, ConfigError, parse_thresholds

SETTINGS = ROOT / 'settings.ini'
PUBLISHED = ROOT / 'recipes/published.ini'
ONE_TABLE = ROOT / 'recipes/one_table.ini'
SHIPPED = [SETTINGS, *sorted((ROOT / 'recipes').glob('*.ini'))]


@pytest.mark.parametrize('file', SHIPPED, ids=lambda f: f.name)
def test_shipped_recipe_orders_parents_first(file):
    r = read_recipe(file)
    assert set(r.order) == set(r.nodes)
    for name, node in r.nodes.items():
        for parent in node.parents: assert r.order.index(parent) < r.order.index(name)


@pytest.mark.parametrize('file', [SETTINGS, PUBLISHED], ids=lambda f: f.name)
def test_shipped_recipe_has_the_stages_of_the_published_method(file):
    r = read_recipe(file)
    stages = r.stages
    for size in (256, 512):
        pretrain, finetune = stages[f'pretrain_{size}'], stages[f'finetune_{size}']
        assert pretrain.train == ('eyepacs2015',)
        assert finetune.init == f'pretrain_{size}'
        assert finetune.arch == 'legacy_seresnet50'
        assert finetune.size == size
    assert stages['finetune_dense'].init == 'pretrain_dense'
    assert stages['finetune_dense'].arch == 'densenet121'
    assert ('finetune_256', 'aptos_test') in stages['retrain_512'].sources
    assert stages['retrain_512'].init in ('pretrain_512', 'finetune_512')
    assert set(r.ensembles['ensemble'].members) == {'finetune_dense', 'finetune_256', 'finetune_512'}
    assert 'retrain_512' in r.members(r.submit.final)
    assert set(r.submit.also) >= {'finetune_dense', 'finetune_256', 'finetune_512', 'ensemble'}


@pytest.mark.parametrize('file', [SETTINGS, ROOT / 'recipes/gold.ini'], ids=lambda f: f.name)
def test_one_pretraining_serves_the_five_folds_of_the_shipped_stages(file):
    r = read_recipe(file)
    assert {s.name for s in r.stages.values() if s.folds == 1} == {n for n in r.stages if n.startswith('pretrain_')}
    for s in r.stages.values():
        if s.folds == 1: assert r.held_out_tables(s.name) == ['aptos_train']
    assert r.folds_of(r.submit.final) == 5


def test_published_recipe_has_the_published_constants():
    r = read_recipe(PUBLISHED)
    s, a = r.stages['retrain_512'], r.augment
    assert (s.schedule, s.lr, s.wd, s.sqr_mom, s.eps) == ('constant', 2e-4, 0, .999, 1e-8)
    assert (s.bs, s.epochs, s.freeze_epochs, s.keep) == (16, 30, 0, 'last')
    assert (s.loss, s.tta, s.init) == ('smooth_l1', 'hflip', 'pretrain_512')
    assert (r.images.crop, r.images.aspect) == ('none', 'squash')
    assert (a.brightness, a.contrast, a.saturation, a.hue) == (.1, .2, .2, .1)
    assert (a.blur, a.blur_sigma) == (.5, (.1, 2.))
    assert (a.rotate, a.shift, a.scale, a.shear, a.hflip) == (180, .2, (.8, 1.2), .2, .5)
    assert parse_thresholds(s.thresholds) == (.7, 1.5, 2.5, 3.5)
    assert parse_thresholds(r.submit.thresholds) == (.75, 1.5, 2.5, 3.5)


def test_demo_is_the_same_graph_at_a_small_size():
    full, demo = read_recipe(SETTINGS), read_recipe(SETTINGS, demo=True)
    assert full.order == demo.order
    for name, s in demo.stages.items():
        assert s.size * demo.demo.shrink == full.stages[name].size
        assert s.weights == 'none'
        assert (s.train, s.init) == (full.stages[name].train, full.stages[name].init)


def test_set_overrides_the_demo_keys():
    r = read_recipe(SETTINGS, demo=True, sets=['stage.retrain_512.epochs=7', 'stage.lr=.5'])
    assert r.stages['retrain_512'].epochs == 7
    assert r.stages['finetune_512'].epochs == 6
    assert {s.lr for s in r.stages.values()} == {.5}


BAD_RECIPES = [                              # --set values and words of the message
    (['stage.teacher.epoch=3'], '[stage.teacher] epoch: no such key, did you mean epochs? Accepted keys: train,'),
    (['images.tint=graham'], '[images] tint: no such key. Accepted keys: crop,'),
    (['images.colour=graham'], '[images] colour: removed in 0.1.0'),
    (['images.skip_bad=yes'], '[images] skip_bad: renamed in 0.1.0. Write skip_unreadable.'),
    (['stage.cuts=shrunken'], 'cuts: renamed in 0.1.0. Write thresholds; its value shrunken is now regularised.'),
    (['submit.cuts=optimal'], '[submit] cuts: renamed in 0.1.0. Write thresholds'),
    (['augment.on=picture'], '[augment] on: renamed in 0.1.0. Write mode; its value picture is now image.'),
    (['augment.mode=picture'], 'mode = picture: no such value. Accepted: auto, image, batch.'),
    (['stage.epochs=three'], 'epochs = three: enter a whole number from 0 to 1000.'),
    (['stage.epochs=1.5'], 'epochs = 1.5: enter a whole number from 0 to 1000.'),
    (['stage.epochs=-1'], 'epochs = -1: enter a whole number from 0 to 1000.'),
    (['stage.lr=fast'], 'lr = fast: enter a number from 0 to 10.'),
    (['stage.lr=nan'], 'lr = nan: enter a number from 0 to 10.'),
    (['stage.loss=l1'], 'loss = l1: no such value. Accepted: smooth_l1, mse, corn, cross_entropy.'),
    (['stage.thresholds=1 2 3'], 'enter optimal, regularised or four increasing numbers.'),
    (['submit.thresholds=3 2 1 0'], 'enter optimal, regularised or four increasing numbers.'),
    (['augment.scale=1.2 .8'], 'scale = 1.2 .8: enter two numbers, the smaller one first.'),
    (['augment.blur_sigma=1'], 'blur_sigma = 1: enter two numbers, the smaller one first.'),
    (['table.train.group=('], 'invalid regular expression'),
    (['table.train.group=^\\d+'], r'[table.train] group = ^\d+: no group in parentheses'),
    (['stage.score.train=train'], '[stage.score]: score is a column of scores.csv or oof.csv. Choose another name.'),
    (['ensemble.grade_low.members=teacher'], '[ensemble.grade_low]: grade_low is a column of scores.csv or oof.csv.'),
    (['stage.group.train=train'], '[stage.group]: group is a column of'),
    (['stage.teacher_grade.train=train'], '[stage.teacher_grade]: teacher_grade is a column of'),
    (['submit.final='], '[submit] final: empty. Enter: stage or ensemble'),
    (['table.train.preset=aptos'], '[table.train] preset = aptos: no such preset, did you mean aptos2019? Accepted: '),
    (['table.train.csv='], '[table.train] grade = diagnosis: this table has no csv. Write grade = folder'),
    (['stage.teacher.validate=test'], 'validate = test: no graded table of `train`. Accepted: train'),
    (['ensemble.x.weights=1'], '[ensemble.x] members: missing. Enter: stages'),
    (['table.train.where=Usage'], 'where = Usage: write COLUMN = VALUE'),
    (['table.train.patient=p', 'table.train.block=3'], 'block = 3: this table has the key patient, too.'),
    (['table.train.carry=site | score'], '[table.train] carry = score: oof.csv has a column or a stage of this name'),
    (['stages.epochs=1'], '[stages]: no such section. Accepted: [recipe]'),
    (['table.a b.csv=x'], '[table.a b]: no such section'),
    (['recipe.x.seed=1'], '[recipe.x]: no such section'),
    (['demo.images.size=64'], '[demo.images]: no such section'),
    (['demo.stage.tutor.epochs=3'], '[demo.stage.tutor]: no such stage. Stages: teacher, retrain.'),
    (['submit.final=retrian'], 'no such stage or ensemble. Accepted: teacher, retrain, both.'),
    (['submit.table=train'], 'table = train: this table is graded. Name an ungraded table.'),
    (['submit.table=nope'], 'no such table. Tables: train, test.'),
    (['stage.retrain.init=teach'], 'init = teach: no such stage. Stages: teacher, retrain.'),
    (['stage.retrain.init=teacher', 'stage.retrain.arch=resnet18'], 'that stage is tf_efficientnet_lite0 + auto'),
    (['stage.teacher.init=retrain'], 'the stages form a cycle:'),
    (['stage.teacher.train=test'], 'train = test: this table is ungraded. Write STAGE:test'),
    (['stage.teacher.train=teacher:train'], 'train = teacher:train: this table is graded. Write train alone.'),
    (['stage.retrain.train=teacher:test'], 'all tables are pseudo-labelled. Add a graded table.'),
    (['stage.retrain.train=train tutor:test'], 'train = tutor:test: no such stage or ensemble'),
    (['stage.retrain.train=train nope'], 'train = nope: no such table'),
    (['stage.retrain.source_weights=1'], 'enter one number above 0 for each of the 2 entries of train.'),
    (['stage.folds=6'], 'folds = 6: the maximum is [recipe] splits = 5.'),
    (['stage.teacher.folds=2'], 'folds = 5: its parent teacher trains only 2. Use at most 2, or'),
    (['ensemble.e.members=teacher nope'], 'members = nope: no such stage'),
    (['ensemble.e.members=teacher', 'ensemble.e.weights=1 2'], 'enter one number for each of the 1 members'),
    (['ensemble.teacher.members=retrain'], '[ensemble.teacher]: a stage has the same name. Rename one of them.'),
    (['epochs=3'], '--set epochs=3: enter SECTION.KEY=VALUE'),
    (['stage.folds=1', 'stage.retrain.labels=hard'],
     '[stage.retrain] labels = hard: its teacher teacher has one fold, so its thresholds are fitted on the images that '
     'validate retrain. Set folds = 2 or more for both, or [stage.teacher] thresholds = 0.5 1.5 2.5 3.5.'),
    (['table.train.group=^(.)', 'table.train.block=10'], 'block = 10: this table has the key group, too.'),
    (['table.train.block=-1'], 'block = -1: enter a whole number from 0 to 10000.'),
]


@pytest.mark.parametrize('sets, words', BAD_RECIPES, ids=[' '.join(sets) for sets, _ in BAD_RECIPES])
def test_a_bad_recipe_stops_before_anything_runs(tables, tmp_path, capsys, sets, words):
    options = [option for text in sets for option in ('--set', text)]
    runs = tmp_path / 'runs'
    expect_error(capsys, ['all', '--recipe', ONE_TABLE, '--data', tables, '--runs', runs, *options], words)
    assert not runs.exists()


@pytest.mark.parametrize('sets', [['stage.folds=2'], ['stage.folds=1', 'stage.teacher.thresholds=.5 1.5 2.5 3.5']])
def test_hard_labels_need_thresholds_of_other_images(sets):
    assert read_recipe(ONE_TABLE, sets=['stage.retrain.labels=hard', *sets]).stages['retrain'].labels == 'hard'


def test_hard_labels_of_an_ensemble_use_the_thresholds_of_submit():
    sets = ['stage.folds=1', 'stage.last.train=train both:test', 'stage.last.labels=hard']
    with pytest.raises(ConfigError, match=r'or \[submit\] thresholds = 0.5'): read_recipe(ONE_TABLE, sets=sets)
    read_recipe(ONE_TABLE, sets=[*sets, 'submit.thresholds=.5 1.5 2.5 3.5'])


def test_few_images_get_regularised_thresholds_by_default():
    r = read_recipe(ONE_TABLE)
    assert {s.thresholds for s in r.stages.values()} == {r.submit.thresholds} == {'regularised'}


def test_bad_demo_archs():
    with pytest.raises(ConfigError, match='archs = a: enter BIG:SMALL pairs'):
        read_recipe(SETTINGS, demo=True, sets=['demo.archs=a'])


@pytest.mark.parametrize('content, words', [
    (b'epochs = 3\n', 'invalid recipe'),
    (b'[stage]\nlr = \xff\xfe', 'is no recipe'),
    (b'[stage]\nlr = 1\nlr = 2\n', 'already exists')])
def test_an_invalid_file(tmp_path, content, words):
    (tmp_path / 'x.ini').write_bytes(content)
    with pytest.raises(ConfigError, match=f'x.ini: .*{words}'): read_recipe(tmp_path / 'x.ini')


def test_a_missing_file(tmp_path):
    with pytest.raises(ConfigError, match='nope.ini: no such recipe'): read_recipe(tmp_path / 'nope.ini')


@given(st.text(max_size=30))
def test_any_value_is_read_or_raises_config_error(tmp_path_factory, text):
    file = tmp_path_factory.getbasetemp() / 'any.ini'
    file.write_text('[stage]\nlr = ' + text, encoding='utf-8')
    with pytest.raises(ConfigError): read_recipe(file)


def test_a_set_of_a_key_that_every_stage_has_is_refused(tmp_path):
    file = tmp_path / 'r.ini'
    file.write_text('[table.train]\ncsv = train.csv\nimages = images\ngrade = g\n[stage]\nepochs = 3\n'
                    '[stage.a]\ntrain = train\nepochs = 4\n[stage.b]\ntrain = train\n[submit]\nfinal = b\n')
    assert read_recipe(file, sets=['stage.epochs=9']).stages['b'].epochs == 9
    file.write_text(file.read_text().replace('[stage.b]\n', '[stage.b]\nepochs = 5\n'))
    with pytest.raises(ConfigError, match=r'stage.epochs=9: changes nothing, .*--set stage.a.epochs=VALUE'):
        read_recipe(file, sets=['stage.epochs=9'])
    assert read_recipe(file, demo=True, sets=['stage.epochs=9']).stages['a'].epochs == 9      # by [demo.stage]


def test_a_key_of_all_stages_may_be_changed_for_one_of_them_later(tmp_path):
    "As `tune` does, whose recipe has one stage: the earlier --set is then without effect, which is meant"
    file = tmp_path / 'r.ini'
    file.write_text('[table.train]\ncsv = train.csv\nimages = images\ngrade = g\n[stage.a]\ntrain = train\n'
                    '[submit]\nfinal = a\n')
    recipe = changed(read_recipe(file, sets=['stage.keep=kappa']), ['stage.a.keep=last'])
    assert recipe.stages['a'].keep == 'last'


def test_old_keys_are_no_keys_and_name_keys_that_exist():
    for section, keys in OLD_KEYS.items():
        known = {f.name for f in fields(section)}
        for key, advice in keys.items():
            assert key not in known and advice.startswith(('renamed in ', 'removed in '))
            if advice.startswith('renamed'): assert re.search(r'Write (\w+)', advice)[1] in known


def test_a_recipe_saved_with_a_byte_order_mark_is_read(tmp_path):
    (tmp_path / 'mine.ini').write_bytes(b'\xef\xbb\xbf' + SETTINGS.read_bytes())
    assert read_recipe(tmp_path / 'mine.ini').order == read_recipe(SETTINGS).order
