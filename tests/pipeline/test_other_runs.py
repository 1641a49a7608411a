"Ensembles whose members are stages of other runs, named by path."
import json

import pandas as pd
import pytest
from conftest import TABLES, expect_error, without_report, write_table

from aptos_fastai.cli import main
from aptos_fastai.pipeline.graph import load_run

pytestmark = pytest.mark.usefixtures('no_report')
BLEND = '\n[ensemble.blend]\nmembers = teacher {stage}\n'


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    "A finished run `other`, its recipe and its data"
    folder = tmp_path_factory.mktemp('other_runs')
    write_table(folder / 'data', 40)
    write_table(folder / 'data', 10, graded=False, seed=1, name='test')
    (folder / 'other.ini').write_text(RECIPE.replace('size = 32', 'size = 48') + '[stage.start]\n'
                                      '[stage.teacher]\ninit = start\n[submit]\nfinal = teacher\ntable = test\n')
    with without_report(): main(['all', *arguments(folder, 'other')])
    return folder


RECIPE = '''
[images]
size = 64
''' + TABLES + '''
[stage]
train = train
arch = test_resnet
weights = none
size = 32
folds = 2
bs = 8
epochs = 1
precision = f32
tta = none
'''


def arguments(folder, name):
    return ['--recipe', str(folder / f'{name}.ini'), '--data', str(folder / 'data'), '--runs', str(folder / 'runs')]


def write_recipe(folder, name, extra='', stage='../other/teacher', recipe=RECIPE):
    text = recipe + '[stage.teacher]\n' + BLEND.format(stage=stage) + '[submit]\nfinal = blend\ntable = test\n' + extra
    (folder / f'{name}.ini').write_text(text)
    return arguments(folder, name)


def test_a_blend_with_a_stage_of_another_run(runs, capsys):
    args = write_recipe(runs, 'mine')
    main(['all', *args])
    out = ' '.join(capsys.readouterr().out.split())
    assert f'other_teacher: folds 0 1 from {(runs / "runs/other/teacher").resolve()}' in out
    root = runs / 'runs/mine'
    mine = {k: json.loads((root / f'other_teacher/fold{k}/stage.json').read_text()) for k in (0, 1)}
    for k, record in mine.items():
        there = json.loads((runs / f'runs/other/teacher/fold{k}/stage.json').read_text())
        assert record['files']['weights.safetensors'] == there['files']['weights.safetensors']
        assert record['stage'] == 'other_teacher' and record['settings']['init'] == 'other_start'
    oof = pd.read_csv(root / 'oof.csv')
    assert (oof.blend - (oof.teacher + oof.other_teacher) / 2).abs().max() < 1e-5
    theirs = pd.read_csv(runs / 'runs/other/oof.csv').set_index('id_code').teacher
    assert (oof.other_teacher - oof.id_code.map(theirs)).abs().max() < 1e-5
    main(['all', str(root)])                                # opens again from its folder, nothing to do
    assert 'Nothing to do' in capsys.readouterr().out
    main(['predict', str(root), str(runs / 'data/test_images'), '-o', str(runs / 'p.csv')])
    scores = pd.read_csv(root / 'scores.csv').set_index('id_code').score
    predicted = pd.read_csv(runs / 'p.csv')
    ids = predicted.file.str.rsplit('/').str[-1].str.rsplit('.', n=1).str[0]
    assert (predicted.score - ids.map(scores)).abs().max() < .02


@pytest.mark.parametrize('stage, words', [
    ('../other/teecher', ['has no such stage, did you mean teacher?', 'Choose from: start, teacher']),
    ('../nowhere/teacher', ['no run in', '../OTHER/STAGE']),
])
def test_a_member_that_is_not_there(runs, capsys, stage, words):
    expect_error(capsys, ['plan', *write_recipe(runs, 'wrong', stage=stage)], '[ensemble.blend] members = ', *words)


@pytest.mark.parametrize('extra, words', [
    ('[recipe]\nseed = 7\n', 'cannot be a member here: table train: other folds.'),
    ('[augment]\nhue = .3\n', 'hue'), ('[images]\ncrop = none\n', 'crop')])
def test_a_member_of_other_folds_or_images_is_refused_before_training(runs, capsys, extra, words):
    recipe = RECIPE.replace('[images]\n', extra) if 'images' in extra else RECIPE
    args = write_recipe(runs, 'differs', '' if 'images' in extra else extra, recipe=recipe)
    main(['prepare', *args])
    for command in ('plan', 'all'): err = expect_error(capsys, [command, *args], 'cannot be a member here', words)
    assert '\n' not in err.strip()
    assert not (runs / 'runs/differs/teacher').exists()


def test_an_unfinished_member_is_refused_before_training(runs, capsys):
    (runs / 'half.ini').write_text(RECIPE + '[stage.other]\nlr = .02\n[submit]\nfinal = other\n')
    main(['prepare', *arguments(runs, 'half')])
    args = write_recipe(runs, 'early', stage='../half/other')
    expect_error(capsys, ['all', *args], 'half/other/fold0: not finished. Train it in its own run first')


def test_the_stage_has_one_meaning(runs):
    "An equal table is not taken twice, and the lineage has the start of the member"
    args = write_recipe(runs, 'again')
    run = load_run(*args[1::2])
    assert list(run.recipe.tables) == ['train', 'test']
    assert list(run.recipe.stages) == ['teacher', 'other_teacher', 'other_start']
    assert run.ancestors('blend') == {'blend', 'teacher', 'other_teacher', 'other_start'}


def test_a_member_is_of_the_run_that_is_named_and_of_no_other(runs, capsys):
    "The run `like` has the fold that this recipe would train; the named one has another augmentation: refused"
    recipe = RECIPE.replace('[table.train]', '[augment]\nhue = .3\n[table.train]', 1)
    (runs / 'third.ini').write_text(recipe + '[stage.start]\n[stage.teacher]\ninit = start\nsize = 48\n'
                                    '[submit]\nfinal = teacher\n')
    (runs / 'like.ini').write_text(recipe.replace('size = 32', 'size = 48') + '[stage.start]\n'
                                   '[stage.teacher]\ninit = start\n[submit]\nfinal = teacher\n')
    main(['train', 'teacher', *arguments(runs, 'like')])
    args = write_recipe(runs, 'strict', recipe=recipe)
    expect_error(capsys, ['all', *args], 'cannot be a member here: [augment] hue')


def test_a_member_that_was_trained_again_is_taken_again(runs, capsys, tmp_path):
    text = (runs / 'other.ini').read_text()
    (runs / 'source.ini').write_text(text)
    main(['train', 'teacher', *arguments(runs, 'source')])
    args = write_recipe(runs, 'follows', stage='../source/teacher')
    main(['all', *args])

    def weights(name): return (runs / f'runs/{name}/fold0/weights.safetensors').read_bytes()
    assert weights('source/teacher') == weights('follows/source_teacher')
    main(['train', 'teacher', *arguments(runs, 'source'), '--set', 'stage.teacher.lr=.02', '--replace'])
    capsys.readouterr()
    main(['all', *args])
    assert 'source_teacher: folds 0 1 from' in ' '.join(capsys.readouterr().out.split())
    assert weights('source/teacher') == weights('follows/source_teacher')


def test_two_runs_of_one_name_and_runs_that_name_each_other_are_refused(runs, capsys):
    for name in ('a-b', 'a_b'):
        (runs / f'{name}.ini').write_text((runs / 'other.ini').read_text())
        main(['train', 'teacher', *arguments(runs, name)])
    expect_error(capsys, ['plan', *write_recipe(runs, 'both', stage='../a-b/teacher ../a_b/teacher')],
                 'would both be a_b_teacher here')
    expect_error(capsys, ['plan', *write_recipe(runs, 'twice', stage='../a_b/teacher ../../runs/a_b/teacher')],
                 'named twice')
    for name, other in (('one', 'two'), ('two', 'one')):
        write_recipe(runs, name, stage='../other/teacher')
        main(['prepare', *arguments(runs, name)])
        file = runs / f'runs/{name}/recipe.ini'
        file.write_text(file.read_text().replace('../other/', f'../{other}/'))
    expect_error(capsys, ['plan', runs / 'runs/one'], 'takes members from this run')
