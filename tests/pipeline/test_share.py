"Finished folds of one run serve the other runs of the folder: same settings, images, folds and parents."
import json

import pytest
from conftest import modified_times, small_options

from aptos_fastai.cli import main
from aptos_fastai.pipeline import stage as stage_module
from aptos_fastai.pipeline.graph import load_run
from aptos_fastai.pipeline.share import with_shared
from aptos_fastai.run_folder import RecordError, Run

pytestmark = pytest.mark.usefixtures('no_report')


@pytest.fixture
def first(small_copy):
    "A finished run, and the arguments of others beside it"
    main(['prepare', *small_options(small_copy)])              # the copy's images have moved
    return small_copy / 'runs/small', small_options(small_copy)


@pytest.fixture
def trained(monkeypatch):
    "The folds that are trained, instead of trained by other runs"
    calls, train = [], stage_module.train_fold
    monkeypatch.setattr(stage_module, 'train_fold', lambda run, name, k, bars: calls.append(f'{name}/{k}') or train(
        run, name, k, bars))
    return calls


def test_a_run_takes_what_another_run_has_trained(first, trained, capsys):
    root, args = first
    before = modified_times(root)
    main(['plan', *args, '--name', 'second'])
    out = capsys.readouterr().out
    assert f'shared: teacher: folds 0 1 from {root / "teacher"}' in ' '.join(out.split())
    assert not (root.parent / 'second/teacher').exists()
    main(['all', *args, '--name', 'second', '--set', 'stage.retrain.lr=.02'])
    out = ' '.join(capsys.readouterr().out.split())
    assert f'teacher: folds 0 1 from {root / "teacher"}, trained with the same settings on the same images' in out
    assert trained == ['retrain/0', 'retrain/1']
    second = root.parent / 'second'
    weights = 'teacher/fold0/weights.safetensors'
    assert (second / weights).samefile(root / weights)
    assert json.loads((second / 'summary.json').read_text())['stages']
    assert modified_times(root) == before                   # the first run is untouched


def test_nothing_is_searched_or_counted_twice_for_images_that_are_not_prepared(tables, small_recipe, tmp_path,
                                                                                monkeypatch):
    run = load_run(small_recipe, tables, tmp_path / 'runs')
    facts = run.table_facts
    monkeypatch.setattr(Run, 'fingerprint', None)
    found = with_shared(run, run.recipe.stages)
    assert found.shared == {} and found.table_facts is facts
    with pytest.raises(RecordError, match='no prepared images of'): run.prepared_record(next(iter(run.frames)))


def test_other_settings_images_or_seeds_are_not_shared(first, capsys):
    root, args = first
    recipe, data, runs = args[1::2]

    def shared(*sets): return with_shared(load_run(recipe, data, runs, sets, name='second'), ['teacher']).shared
    assert len(shared()) == 2 and len(shared('stage.tta=none')) == 2           # other views: scored again
    for key in ('stage.lr=1e-2', 'recipe.seed=7', 'images.crop=none', 'augment.hue=.1'): assert not shared(key), key


def test_a_child_of_parents_trained_here_is_not_taken(first, trained, capsys):
    "The fingerprints agree, but not the weights of the parents"
    root, args = first
    third = root.parent / 'third'
    main(['train', 'teacher', *args, '--name', 'third', '--set', 'stage.precision=bf16'])
    assert 'teacher/0' in trained                           # in another precision: not taken
    trained.clear()
    main(['train', 'retrain', *args, '--name', 'third', '--set', 'stage.teacher.precision=bf16'])
    assert trained == ['retrain/0', 'retrain/1'] and (third / 'retrain/fold1/stage.json').is_file()


def test_a_damaged_fold_of_another_run_is_trained_here(first, trained, capsys):
    root, args = first
    weights = root / 'teacher/fold0/weights.safetensors'
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    main(['train', 'teacher', *args, '--name', 'second'])
    out = ' '.join(capsys.readouterr().out.split())
    assert f'{weights}: content changed since it was written (SHA-256 differs). teacher fold 0 is not taken.' in out
    assert trained == ['teacher/0']


def test_deleting_one_run_leaves_the_other_whole(first, trained, capsys):
    import shutil
    root, args = first
    main(['train', 'teacher', *args, '--name', 'second'])
    shutil.rmtree(root)
    main(['all', *args, '--name', 'second'])
    assert trained == ['retrain/0', 'retrain/1'] and (root.parent / 'second/submission.csv').is_file()
