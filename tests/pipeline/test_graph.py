"The shipped settings.ini at toy size through the command line, and the truths of its chain."
import json
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, STAGES, TOY, fails, run_of, sets, stamps, toy_args
from safetensors.torch import load_file

from aptos_fastai.cli import main
from aptos_fastai.common.distributed import cores
from aptos_fastai.metrics import apply_thresholds
from aptos_fastai.pipeline.graph import open_run
from aptos_fastai.pipeline.pseudo_labels import read_labels
from aptos_fastai.pipeline.stage import training_frame
from aptos_fastai.run_folder import WEIGHTS, RecordError


def test_every_stage_leaves_its_folder(toy):
    for s in STAGES:
        assert {p.name for p in (toy / s / 'fold0').iterdir()} >= {'learner.pkl', 'weights.safetensors', 'preds.csv', 'history.csv', 'stage.json'}
    assert not list(toy.rglob('*.tmp'))


def test_submission_has_the_sample_submissions_ids_and_order(toy):
    sample = pd.read_csv(next(toy.parent.glob('demo-*/aptos*/sample_submission.csv')), dtype=str)
    sub = pd.read_csv(toy / 'submission.csv', dtype=dict(id_code=str))
    assert list(sub) == ['id_code', 'diagnosis'] and sub.id_code.tolist() == sample.id_code.tolist() and sub.diagnosis.isin(range(5)).all()
    assert {p.stem for p in (toy / 'submissions').iterdir()} == {'finetune_dense', 'finetune_256', 'finetune_512', 'ensemble', 'retrain_512'}
    assert (toy / 'submissions/retrain_512.csv').read_text() == (toy / 'submission.csv').read_text()


def test_scores(toy):
    df, run = pd.read_csv(toy / 'scores.csv'), run_of(toy)
    assert np.allclose(df.ensemble, (df.finetune_dense + df.finetune_256 + df.finetune_512) / 3, atol=1e-5)
    assert np.allclose(df['mean'], df.retrain_512) and (df.grade == apply_thresholds(df['mean'], run.thresholds('retrain_512', 'optimal'))).all()


def test_everything_says_that_it_is_synthetic(toy, capsys):
    assert 'SYNTHETIC' in (toy / 'SYNTHETIC.txt').read_text() and json.loads((toy / 'summary.json').read_text())['synthetic'] is True
    assert all(json.loads((toy / s / 'fold0/stage.json').read_text())['synthetic'] for s in STAGES)
    main(['all', *toy_args(toy)])
    assert 'SYNTHETIC' in capsys.readouterr().out


def test_a_second_all_does_nothing_and_says_so(toy, capsys):
    before = stamps(toy)
    main(['all', *toy_args(toy)])
    assert 'nothing was run' in capsys.readouterr().out
    changed = [p.name for p, t in stamps(toy).items() if before.get(p) != t]
    assert set(changed) <= {'run.json', 'SYNTHETIC.txt'}


def test_a_second_all_loads_no_network_library(toy):
    "It would take longer to load than the whole of it"
    code = (f'import sys\nfrom aptos_fastai.cli import main\nmain({["all", *toy_args(toy)]!r})\n'
            'assert not {"torch", "fastai", "timm", "sklearn", "matplotlib"} & set(sys.modules), "loaded"')
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT)
    assert out.returncode == 0 and 'nothing was run' in out.stdout, out.stderr


def test_a_changed_stage_reruns_itself_and_its_descendants_only(toy):
    run = open_run(str(ROOT / 'settings.ini'), 'demo', str(toy.parent), [o for o in TOY if o != '--set'] + ['stage.finetune_256.wd=0.5'])
    assert list(run.todo()) == ['finetune_256', 'retrain_512']
    assert list(run_of(toy).todo()) == []


def test_what_is_rerun_is_really_rerun(copied, capsys):
    before = stamps(copied)
    main(['all', *toy_args(copied, '--set', 'stage.finetune_dense.wd=0.5')])
    out = capsys.readouterr().out
    assert 'stage 1 of 1: finetune_dense' in out
    changed = {p.relative_to(copied).parts[0] for p, t in stamps(copied).items() if before.get(p) != t}
    assert 'finetune_dense' in changed and not changed & set(STAGES[:6])


def test_a_child_starts_with_its_parents_weights(toy):
    from aptos_fastai.pipeline.stage import stage_learner
    run = run_of(toy)
    child = stage_learner(run, 'finetune_512').model.state_dict()
    parent = load_file(toy / 'pretrain_512/fold0' / WEIGHTS)
    assert all((child[k].numpy() == v.numpy()).all() for k, v in parent.items()) and len(child) == len(parent)
    rec = json.loads((toy / 'finetune_512/fold0/stage.json').read_text())
    assert rec['parents']['pretrain_512'] == json.loads((toy / 'pretrain_512/fold0/stage.json').read_text())['files'][WEIGHTS]['sha256']


def test_training_moved_the_weights(toy):
    a, b = (load_file(toy / s / 'fold0' / WEIGHTS) for s in ('pretrain_512', 'finetune_512'))
    assert any((a[k].numpy() != b[k].numpy()).any() for k in a)


def test_pseudo_rows_train_and_never_validate_and_no_validation_id_trains(toy):
    run = run_of(toy)
    s = run.recipe.stages['retrain_512']
    labels = {(t, n): read_labels(run, t, n, 'soft') for t, n in s.sources if t}
    f = training_frame(run, s, 0, labels)
    pseudo = f[f.source == 'finetune_256:aptos_test']
    assert len(pseudo) == 20 and not pseudo.valid.any() and np.allclose(pseudo.diagnosis, labels['finetune_256', 'aptos_test'].fold0)
    assert not set(f.id_code[f.valid]) & set(f.id_code[~f.valid]) and f.valid.sum() == 12
    preds = pd.read_csv(toy / 'retrain_512/fold0/preds.csv')
    assert set(preds.id_code) == set(f.id_code[f.valid]) and set(preds.source) == {'aptos_train'}


def test_soft_labels_are_scores_hard_ones_their_grades(toy):
    folder = toy / 'labels/finetune_256/aptos_test'
    soft, hard = (pd.read_csv(folder / f'{k}_pseudo_label.csv', dtype=dict(id_code=str)) for k in ('soft', 'hard'))
    run = run_of(toy)
    assert (hard.diagnosis == apply_thresholds(soft.diagnosis, run.thresholds('finetune_256', 'optimal'))).all() and soft.id_code.equals(hard.id_code)
    note = json.loads((folder / 'provenance.json').read_text())
    assert note['weights']['finetune_256/fold0'] == json.loads((toy / 'finetune_256/fold0/stage.json').read_text())['files'][WEIGHTS]['sha256']


def test_the_exported_learner_answers_in_a_fresh_process(toy):
    "On the original images, with nothing but the package: the scores that predict wrote"
    code = f'''
import pandas as pd, torch
from fastai.vision.all import load_learner
torch.set_num_threads(1)
learn = load_learner(r"{toy / 'finetune_256/fold0/learner.pkl'}")
folder = r"{next(toy.parent.glob('demo-*/aptos*/test_images'))}"
ids = pd.read_csv(r"{toy / 'finetune_256/fold0/scores_aptos_test.csv'}", dtype=dict(id_code=str)).id_code
dl = learn.dls.test_dl(pd.DataFrame(dict(stored=[f"{{folder}}/{{i}}.png" for i in ids])))
with learn.no_bar(): preds = learn.get_preds(dl=dl)[0]
print(*preds.flatten().tolist())
'''
    out = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, cwd='/')
    assert out.returncode == 0, out.stderr
    got = np.array(out.stdout.split(), float)
    run = run_of(toy)
    from aptos_fastai.pipeline.scores import predict_scores, read_exported
    want = predict_scores(read_exported(run, 'finetune_256', 0), run.frames['aptos_test'])
    assert np.allclose(got, want, atol=1e-4) and got.std() > 1e-4


def test_an_export_holds_no_rows(toy):
    data = (toy / 'pretrain_256/fold0/learner.pkl').read_bytes()
    assert not any(i.encode() in data for i in pd.read_csv(toy / 'pretrain_256/fold0/preds.csv').id_code)
    assert len(data) < 1.2 * (toy / 'pretrain_256/fold0' / WEIGHTS).stat().st_size + 200_000


def test_same_seed_same_record(toy, tmp_path):
    main(['train', 'pretrain_256', '--recipe', str(ROOT / 'settings.ini'), '--runs', str(tmp_path), *TOY, '--set', 'stage.workers=1'])
    a, b = (json.loads((o / 'pretrain_256/fold0/stage.json').read_text()) for o in (toy, tmp_path / toy.name))
    assert a['files'][WEIGHTS]['sha256'] == b['files'][WEIGHTS]['sha256'] and a['files']['preds.csv'] == b['files']['preds.csv']


def test_summary(toy):
    o = json.loads((toy / 'summary.json').read_text())
    assert [s['stage'] for s in o['stages']][-1] == 'ensemble' and {s['stage'] for s in o['stages']} == {*STAGES, 'ensemble'}
    for s in o['stages']: assert s['kappa_interval'][0] - 1e-9 <= s['kappa'] <= s['kappa_interval'][1] + 1e-9


def test_tampered_files_are_named_and_not_loaded(copied, capsys):
    f = copied / 'finetune_256/fold0/learner.pkl'
    data = bytearray(f.read_bytes()); data[100] ^= 1; f.write_bytes(data)
    with pytest.raises(RecordError, match='learner.pkl: is not what this run wrote'):
        from aptos_fastai.pipeline.scores import read_exported
        read_exported(run_of(copied), 'finetune_256', 0)
    f = copied / 'labels/finetune_256/aptos_test/soft_pseudo_label.csv'
    f.write_text(f.read_text().replace('0.', '1.'))
    with pytest.raises(RecordError, match='soft_pseudo_label.csv: is not what this run wrote'):
        read_labels(run_of(copied), 'finetune_256', 'aptos_test', 'soft')


def test_a_truncated_file_makes_its_stage_run_again(copied):
    f = copied / 'pretrain_dense/fold0/weights.safetensors'
    f.write_bytes(f.read_bytes()[:-10])
    assert list(run_of(copied).todo()) == ['pretrain_dense', 'finetune_dense']


@pytest.mark.parametrize('args, words', [
    (['train', 'finetune'], ['finetune: no such stage', 'finetune_256']), (['label', 'nope'], ['nope: no such stage']),
    (['label', 'finetune_256', 'aptos_train'], ['no ungraded table', 'aptos_test']), (['lr_find', 'nope'], ['no such stage'])])
def test_unknown_names(toy, capsys, args, words): fails(capsys, [*args, *toy_args(toy)], *words)


def test_predict_and_submit_want_trained_stages(toy, tmp_path, capsys):
    fails(capsys, ['submit', '--recipe', ROOT / 'settings.ini', '--runs', tmp_path, *TOY], 'not trained yet', 'run `all`')

def test_submit_with_other_thresholds(copied):
    main(['submit', *toy_args(copied, '--set', 'submit.thresholds=0.75 1.5 2.5 3.5')])
    s, sub = pd.read_csv(copied / 'scores.csv'), pd.read_csv(copied / 'submission.csv')
    assert (sub.diagnosis == apply_thresholds(s['mean'], (.75, 1.5, 2.5, 3.5))).all()


def test_lr_find_saves_its_curve(toy, capsys):
    main(['lr_find', 'pretrain_dense', *toy_args(toy)])
    assert 'valley' in capsys.readouterr().out and (toy / 'pretrain_dense/lr_find.png').stat().st_size > 5000

def test_plan_trains_nothing(toy, capsys):
    before = stamps(toy)
    main(['plan', *toy_args(toy, '--set', 'stage.finetune_512.wd=0.3')])
    out = capsys.readouterr().out
    assert 'GB on disk' in out and 'finetune_512' in out and 'finished' in out and stamps(toy) == before


def test_folds_chain_fold_by_fold(tables, small_recipe, tmp_path):
    "Two folds of teacher and student: each student learns its own fold's labels; together every image of both parts is scored once"
    main(['all', '--recipe', str(small_recipe), '--data', str(tables), '--runs', str(tmp_path / 'runs')])
    root = tmp_path / 'runs/small'
    oof = pd.concat([pd.read_csv(root / f'retrain/fold{k}/preds.csv') for k in (0, 1)])
    folds = pd.read_csv(root / 'folds.csv')
    assert oof.id_code.is_unique and set(oof.id_code) == set(folds.id_code[folds.fold < 2])
    lab = pd.read_csv(root / 'labels/teacher/test/soft_pseudo_label.csv')
    assert list(lab) == ['id_code', 'diagnosis', 'fold0', 'fold1', 'score_sd0', 'score_sd1'] and np.allclose(lab.diagnosis, (lab.fold0 + lab.fold1) / 2, atol=1e-6)
    for k in (0, 1):
        rec = json.loads((root / f'retrain/fold{k}/stage.json').read_text())
        assert rec['parents']['teacher'] == json.loads((root / f'teacher/fold{k}/stage.json').read_text())['files'][WEIGHTS]['sha256']
        assert np.allclose(pd.read_csv(root / f'teacher/fold{k}/scores_test.csv').score, lab[f'fold{k}'], atol=1e-6)


def trained_on(run, node, k):
    "Groups of every graded image that fold k of a node has seen, itself or through what it was built on"
    seen = set()
    for m in run.recipe.members(node):
        s = run.recipe.stages[m]
        for t, n in s.sources:
            f = run.frames[n]
            seen |= trained_on(run, t, k) if t else set(f.group[f.fold != k])
        if s.init: seen |= trained_on(run, s.init, k)
    return seen


def lineage_is_clean(run):
    for n in run.recipe.order:
        for k in run.folds_of(n):
            o = run.oof(n, k).merge(pd.concat(run.frames.values())[['source', 'id_code', 'group']], on=['source', 'id_code'])
            assert len(o) and not set(o.group) & trained_on(run, n, k), f'{n} fold {k}'
            for m in run.recipe.members(n):                      # what its record says it trained on is what the frames say
                s = run.recipe.stages[m]
                f = training_frame(run, s, k, {(t, name): read_labels(run, t, name, s.labels) for t, name in s.sources if t})
                assert run.record(m, k)['images'] == dict(train=int((~f.valid).sum()), valid=int(f.valid.sum()))
                assert not set(f.group[~f.valid]) & set(o.group)


def test_no_image_is_validated_by_what_was_trained_on_it(toy, tables, small_recipe, tmp_path):
    lineage_is_clean(run_of(toy))
    keys = ['stage.retrain.init=teacher', 'stage.last.train=train both:test', 'submit.final=last']
    (tables / 'test_images/test003.png').write_bytes((tables / 'train_images/train003.png').read_bytes())           # an ungraded duplicate of a graded image
    main(['all', '--recipe', str(small_recipe), '--data', str(tables), '--runs', str(tmp_path / 'runs'), *(o for k in keys for o in ('--set', k))])
    run = open_run(str(small_recipe), str(tables), str(tmp_path / 'runs'), keys)
    lineage_is_clean(run)
    assert {n: list(run.folds_of(n)) for n in run.recipe.order} == dict.fromkeys(['teacher', 'retrain', 'both', 'last'], [0, 1])
    note = json.loads((run.root / 'labels/both/test/provenance.json').read_text())
    assert set(note['weights']) == {f'{m}/fold{k}' for m in ('teacher', 'retrain') for k in (0, 1)}


@pytest.mark.parametrize('scores, words', [([np.nan] + [1.] * 11, '1 of 12 validation scores are not numbers'),
                                           ([.3] * 12, 'all 12 scores are 0.3; train it longer')])
def test_scores_that_cannot_be_graded_are_named(toy, tmp_path, monkeypatch, scores, words):
    run = run_of(toy)
    preds = pd.read_csv(toy / 'finetune_256/fold0/preds.csv', dtype=dict(id_code=str)).assign(score=scores)
    preds.to_csv(tmp_path / 'preds.csv', index=False)
    monkeypatch.setattr(type(run), 'verified', lambda *_: tmp_path / 'preds.csv')
    with pytest.raises(RecordError, match='finetune_256: .*' + words): run.thresholds('finetune_256', 'optimal')


def test_members_must_have_validated_the_same_images(toy, tmp_path, monkeypatch):
    run, real = run_of(toy), type(run_of(toy)).verified
    def other(self, stage, fold, file):
        if stage != 'finetune_512': return real(self, stage, fold, file)
        p = pd.read_csv(real(self, stage, fold, file), dtype=dict(id_code=str))
        p.assign(id_code=p.id_code + 'x').to_csv(tmp_path / 'preds.csv', index=False)
        return tmp_path / 'preds.csv'
    monkeypatch.setattr(type(run), 'verified', other)
    with pytest.raises(RecordError, match='finetune_512 was validated on other images'): run.oof('ensemble')


def test_a_fold_that_lacks_a_grade_is_said(tables, small_recipe, tmp_path, capsys):
    df = pd.read_csv(tables / 'train.csv')
    df['diagnosis'] = np.where(df.diagnosis == 4, 3, df.diagnosis); df.loc[7, 'diagnosis'] = 4
    df.to_csv(tables / 'train.csv', index=False)
    main(['prepare', '--recipe', str(small_recipe), '--data', str(tables), '--runs', str(tmp_path / 'runs')])
    assert 'train: no image in fold ' in (out := capsys.readouterr().out) and 'of grade 4' in out and 'splits = 5' in out


def test_grades_changed_since_training_are_told(tables, small_recipe, tmp_path, capsys):
    args = ['--recipe', str(small_recipe), '--data', str(tables), '--runs', str(tmp_path / 'runs')]
    main(['all', *args])
    df = pd.read_csv(tables / 'train.csv')
    df.assign(diagnosis=df.diagnosis.to_numpy()[::-1]).to_csv(tables / 'train.csv', index=False)
    fails(capsys, ['submit', *args], 'trained with other settings, grades or images', 'run `all`')


def test_the_moving_average_is_what_is_validated_and_kept(tables, small_recipe, tmp_path):
    "With decay 0 the average is the weights themselves; with a high one it is near where training began"
    def weights(name, *keys):
        args = ['--recipe', str(small_recipe), '--data', str(tables), '--runs', str(tmp_path / name), *(o for k in keys for o in ('--set', k))]
        main(['train', 'teacher', *args, '--set', 'stage.epochs=2'])
        return load_file(tmp_path / name / 'small/teacher/fold0' / WEIGHTS), pd.read_csv(tmp_path / name / 'small/teacher/fold0/preds.csv').score
    (plain, s0), (same, s1), (slow, s2) = weights('a'), weights('b', 'stage.ema=1e-9'), weights('c', 'stage.ema=.99')
    assert all(np.allclose(plain[k], same[k], atol=1e-4) for k in plain) and np.allclose(s0, s1, atol=1e-3)
    assert not np.allclose(s0, s2, atol=1e-3) and any(not np.allclose(plain[k], slow[k], atol=1e-3) for k in plain)


def test_uncertain_labels_are_left_out_and_sources_weighed(tables, small_recipe, tmp_path, capsys):
    args = ['--recipe', str(small_recipe), '--data', str(tables), '--runs', str(tmp_path / 'runs')]
    main(['label', 'teacher', *args])

    keys = ['--set', 'stage.retrain.source_weights=1 2', '--set', 'stage.retrain.ema=.9']
    main(['train', 'retrain', *args, *keys])
    rec = json.loads((tmp_path / 'runs/small/retrain/fold0/stage.json').read_text())
    assert rec['images']['train'] == (pd.read_csv(tmp_path / 'runs/small/folds.csv').fold != 0).sum() + 10 and rec['settings']['source_weights'] == [1, 2]
    fails(capsys, ['train', 'retrain', *args, '--set', 'stage.retrain.source_weights=1'], 'source_weights = 1.0: 2 numbers above 0')


def test_bad_images_stop_all_or_are_skipped_but_answered(tables, small_recipe, tmp_path, capsys):
    for f in ('train_images/train007.png', 'test_images/test004.png'): (tables / f).write_bytes(b'no image')
    args = ['all', '--recipe', str(small_recipe), '--data', str(tables), '--runs', str(tmp_path / 'runs')]
    fails(capsys, args, '1 of 40 images of train cannot be used: train007', 'prepared.csv', 'skip_unreadable = yes')
    assert not list((tmp_path / 'runs').rglob('stage.json'))
    main([*args, '--set', 'images.skip_unreadable=yes'])
    out = capsys.readouterr().out
    assert 'skipped (skip_unreadable = yes)' in out and '1 images of test have no score' in out
    sub, scores = (pd.read_csv(tmp_path / f'runs/small/{f}.csv').set_index('id_code') for f in ('submission', 'scores'))
    assert len(sub) == 10 and sub.diagnosis['test004'] == sub.diagnosis.mode()[0] and np.isnan(scores['mean']['test004'])
    main([*args, '--set', 'images.skip_unreadable=yes'])
    assert 'nothing was run' in capsys.readouterr().out


def test_prepare_says_what_it_found(tables, small_recipe, tmp_path, capsys):
    main(['prepare', '--recipe', str(small_recipe), '--data', str(tables), '--runs', str(tmp_path / 'runs')])
    out = capsys.readouterr().out
    assert 'circle 40' in out and 'circle 10' in out and 'prepared.csv' in out


def test_another_data_folder_is_not_written_over(tables, small_recipe, tmp_path, capsys):
    args = ['--recipe', str(small_recipe), '--runs', str(tmp_path / 'runs')]
    main(['train', 'teacher', '--data', str(tables), *args])
    shutil.copytree(tables, tmp_path / 'other')
    fails(capsys, ['all', '--data', tmp_path / 'other', *args], 'holds a run on', '--runs')

def test_batch_larger_than_the_table(tables, small_recipe, tmp_path, capsys):
    args = ['all', '--recipe', small_recipe, '--data', tables, '--runs', tmp_path / 'runs']
    fails(capsys, [*args, '--set', 'stage.bs=64'], 'images train in fold 0; set it to')
    assert not (tmp_path / 'runs').exists()

def test_diverging_stage_is_named(tables, small_recipe, tmp_path, capsys):
    fails(capsys, ['train', 'teacher', '--recipe', small_recipe, '--data', tables, '--runs', tmp_path / 'runs', *sets('lr=10', 'loss=mse', 'schedule=constant',
          'epochs=30', 'head=avg', 'wd=10')], '[stage.teacher] fold 0, epoch', 'lower the stage')

def test_missing_data_folder(capsys, tmp_path):
    args = ['all', '--recipe', ROOT / 'settings.ini', '--runs', tmp_path / 'r', '--data']
    fails(capsys, [*args, tmp_path / 'nowhere'], 'nowhere: no such data folder', '--data demo')
    fails(capsys, [*args, tmp_path], 'no trainLabels.csv in', '--data demo')
    assert not (tmp_path / 'r').exists()

def test_runs_is_a_file(capsys, tmp_path):
    (tmp_path / 'r').write_text('')
    fails(capsys, ['all', '--runs', tmp_path / 'r', '--recipe', ROOT / 'settings.ini'], 'is a file')

def test_real_images_through_the_recipe(idrid, tmp_path):
    "recipes/one_table.ini on IDRiD, at toy size: tables, crop, two stages, the answers for its 103"
    main(['all', '--recipe', str(ROOT / 'recipes/one_table.ini'), '--data', str(idrid), '--runs', str(tmp_path), '--set', 'images.size=64',
          *sets('size=32', 'folds=1', 'epochs=1', 'freeze_epochs=0', 'arch=test_resnet', 'weights=none', 'tta=none')])
    sub = pd.read_csv(tmp_path / 'one_table/submission.csv')
    assert len(sub) == 103 and sub.id_code[0] == 'test_IDRiD_001'


def test_plan_of_images_that_are_not_here(small_recipe, tmp_path, monkeypatch, capsys):
    "Time and disk grow in step with the images; nothing is read or written"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('aptos_fastai.training.precision.step_seconds', lambda stage, which, n: ({p: 1. for p in which}, .1, 1000))
    from aptos_fastai.pipeline.plan import costs, made_up
    from aptos_fastai.recipe import read_recipe
    found = []
    for n in (1000, 10000):
        run = made_up(read_recipe(small_recipe), f'train={n} test={n // 10}')
        found.append(costs(run, {s: [0, 1] for s in run.recipe.stages}))
    # 800 images an epoch at 1 s; 200 validated each epoch and twice over two views; the test table, scored by both for the answer, over two views
    assert found[0].new == 1100 and found[1].seconds == pytest.approx(10 * found[0].seconds)
    teacher, retrain = 800 + .1 * (200 + 2 * (200 + 100)), 900 + .1 * (200 + 2 * (200 + 100))
    assert found[0].seconds == pytest.approx(2 * (teacher + retrain) + 1100 * .03 / cores())
    main(['plan', '--recipe', str(small_recipe), '--images', 'train=1000000 test=5'])
    assert 'To prepare: 1000005 images' in capsys.readouterr().out and {p.name for p in tmp_path.iterdir()} == {'small.ini'}

@pytest.mark.parametrize('images', ['train=5', 'train=5 test=x', 'train=5 test=0', 'train=5 test=3 other=2'])
def test_plan_of_images_wants_every_table(small_recipe, capsys, images):
    fails(capsys, ['plan', '--recipe', small_recipe, '--images', images], f'--images "{images}"', 'needed')
