import pytest
from conftest import ROOT, fails
from hypothesis import given
from hypothesis import strategies as st

from aptos_fastai.recipe import ConfigError, parse_thresholds, read_recipe


@pytest.mark.parametrize('name', ['settings.ini', 'recipes/published.ini', 'recipes/one_table.ini'])
def test_shipped_recipes_read(name):
    r = read_recipe(ROOT / name)
    assert set(r.order) == set(r.nodes)
    for n, o in r.nodes.items(): assert all(r.order.index(p) < r.order.index(n) for p in o.parents)


@pytest.mark.parametrize('name', ['settings.ini', 'recipes/published.ini'])
def test_the_missions_graph_is_whole(name):
    r = read_recipe(ROOT / name)
    s = r.stages
    for size in ('256', '512'):
        assert s[f'finetune_{size}'].init == f'pretrain_{size}' and s[f'pretrain_{size}'].train == ('eyepacs2015',)
        assert s[f'finetune_{size}'].arch == 'legacy_seresnet50' and s[f'finetune_{size}'].size == int(size)
    assert s['finetune_dense'].init == 'pretrain_dense' and s['finetune_dense'].arch == 'densenet121'
    assert ('finetune_256', 'aptos_test') in s['retrain_512'].sources and s['retrain_512'].init in ('pretrain_512', 'finetune_512')
    assert set(r.ensembles['ensemble'].members) == {'finetune_dense', 'finetune_256', 'finetune_512'}
    assert r.submit.final == 'retrain_512' and set(r.submit.also) >= {'finetune_dense', 'finetune_256', 'finetune_512', 'ensemble'}


def test_the_published_constants():
    r = read_recipe(ROOT / 'recipes/published.ini')
    s, a = r.stages['retrain_512'], r.augment
    assert (s.schedule, s.lr, s.wd, s.bs, s.epochs, s.freeze_epochs, s.keep, s.loss, s.tta) == ('constant', 2e-4, 0, 16, 30, 0, 'last', 'smooth_l1', 'hflip')
    assert (s.sqr_mom, s.eps) == (.999, 1e-8)
    assert s.init == 'pretrain_512' and (r.images.crop, r.images.aspect) == ('none', 'squash')
    assert (a.brightness, a.contrast, a.saturation, a.hue, a.blur, a.blur_sigma) == (.1, .2, .2, .1, .5, (.1, 2.))
    assert (a.rotate, a.shift, a.scale, a.shear, a.hflip) == (180, .2, (.8, 1.2), .2, .5)
    assert parse_thresholds(s.thresholds) == (.7, 1.5, 2.5, 3.5) and parse_thresholds(r.submit.thresholds) == (.75, 1.5, 2.5, 3.5)


def test_demo_is_the_same_graph_at_a_small_size():
    big, small = read_recipe(ROOT / 'settings.ini'), read_recipe(ROOT / 'settings.ini', demo=True)
    assert big.order == small.order
    for n, s in small.stages.items():
        assert s.size * small.demo.shrink == big.stages[n].size and s.weights == 'none' and (s.train, s.init) == (big.stages[n].train, big.stages[n].init)


def test_what_is_set_wins_over_the_demos_keys():
    r = read_recipe(ROOT / 'settings.ini', demo=True, sets=['stage.retrain_512.epochs=7', 'stage.lr=.5'])
    assert (r.stages['retrain_512'].epochs, r.stages['finetune_512'].epochs) == (7, 6) and {s.lr for s in r.stages.values()} == {.5}


BAD_RECIPES = [
    (['stage.teacher.epoch=3'], 'stage.teacher] epoch: no such key, did you mean epochs?; accepted'),
    (['stage.epochs=three'], 'epochs = three: a whole number is needed'),
    (['stage.epochs=1.5'], 'a whole number is needed'),
    (['stage.lr=fast'], 'lr = fast: a number is needed'),
    (['stage.epochs=0'], 'from 1 to 1000 is accepted'),
    (['stage.lr=nan'], 'from 0 to 10 is accepted'),
    (['stage.loss=l1'], 'accepted: smooth_l1, mse'),
    (['stage.thresholds=1 2 3'], 'accepted: optimal, regularised, or four rising numbers'),
    (['submit.thresholds=3 2 1 0'], 'four rising numbers'),
    (['augment.scale=1.2 .8'], 'two rising numbers are needed'),
    (['table.train.group=('], 'not a regular expression'),
    (['table.train.csv='], 'csv: is empty'),
    (['stages.epochs=1'], '[stages]: no such section'),
    (['table.a b.csv=x'], '[table.a b]: no such section'),
    (['table.x.csv=x'], 'images: is missing'),
    (['submit.final=retrian'], 'no such stage or ensemble; there are teacher, retrain, both'),
    (['submit.table=train'], 'this table is graded'),
    (['submit.table=nope'], 'no such table; tables: train, test'),
    (['stage.retrain.init=teach'], 'init = teach: no such stage'),
    (['stage.retrain.init=teacher', 'stage.retrain.arch=resnet18'], 'that stage is tf_efficientnet_lite0 + gem'),
    (['stage.teacher.init=retrain'], 'go round in a loop'),
    (['stage.teacher.train=test'], 'this table has no grades'),
    (['stage.teacher.train=teacher:train'], 'this table has grades of its own'),
    (['stage.retrain.train=teacher:test'], 'a graded table is needed'),
    (['stage.retrain.train=train tutor:test'], 'no such stage or ensemble'),
    (['stage.retrain.train=train nope'], 'no such table'),
    (['stage.folds=6'], '[recipe] splits = 5 is the most'),
    (['stage.teacher.folds=2'], 'teacher, which it builds on, has only 2'),
    (['ensemble.e.members=teacher nope'], 'no such stage'),
    (['ensemble.e.members=teacher', 'ensemble.e.weights=1 2'], '1 numbers are needed'),
    (['ensemble.teacher.members=retrain'], 'a stage has this name already'),
    (['epochs=3'], 'SECTION.KEY=VALUE is needed'),
    (['demo.stage.tutor.epochs=3'], 'there is no such stage'),
]

def test_bad_pairs_of_networks():
    with pytest.raises(ConfigError, match='BIG:SMALL'): read_recipe(ROOT / 'settings.ini', demo=True, sets=['demo.archs=a'])


def test_a_broken_file(tmp_path):
    (tmp_path / 'x.ini').write_text('epochs = 3\n')
    with pytest.raises(ConfigError, match='x.ini'): read_recipe(tmp_path / 'x.ini')
    (tmp_path / 'x.ini').write_bytes(b'[stage]\nlr = \xff\xfe')
    with pytest.raises(ConfigError, match='x.ini'): read_recipe(tmp_path / 'x.ini')
    (tmp_path / 'x.ini').write_text('[stage]\nlr = 1\nlr = 2\n')
    with pytest.raises(ConfigError, match='already exists'): read_recipe(tmp_path / 'x.ini')
    with pytest.raises(ConfigError, match='no such recipe'): read_recipe(tmp_path / 'nope.ini')


@given(st.text(max_size=30))
def test_any_text_is_read_or_named(tmp_path_factory, text):
    file = tmp_path_factory.getbasetemp() / 'any.ini'
    file.write_text('[stage]\nlr = ' + text, encoding='utf-8')
    with pytest.raises(ConfigError): read_recipe(file)


@pytest.mark.parametrize('sets, words', BAD_RECIPES, ids=[str(b[0]) for b in BAD_RECIPES])
def test_bad_recipes(tables, tmp_path, capsys, sets, words):
    args = [o for s in sets for o in ('--set', s)]
    fails(capsys, ['all', '--recipe', ROOT / 'recipes/one_table.ini', '--data', tables, '--runs', tmp_path / 'runs', *args], words)
    assert not (tmp_path / 'runs').exists()
