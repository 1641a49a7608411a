"The shipped settings.ini at toy size through the command line: its files, its chain of stages, and what runs again."
import json
import shutil
import subprocess
import sys

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from conftest import (
    ROOT,
    STAGES,
    TOY_KEYS,
    expect_error,
    modified_times,
    open_toy_run,
    small_options,
    stage_options,
    toy_args,
)
from fastai.vision.all import Interpretation
from safetensors.torch import load_file

from aptos_fastai.cli import main
from aptos_fastai.common.distributed import cores
from aptos_fastai.common.io import AptosError
from aptos_fastai.decisions import DECISION_COLUMNS, P_COLUMNS
from aptos_fastai.inference.grader import load_grader
from aptos_fastai.inference.model_spec import read_model
from aptos_fastai.metrics import apply_thresholds
from aptos_fastai.pipeline.graph import load_run
from aptos_fastai.pipeline.pseudo_labels import read_labels
from aptos_fastai.pipeline.stage import stage_learner, training_frame
from aptos_fastai.pipeline.summary import kappa_result, out_of_fold_grades
from aptos_fastai.run_folder import WEIGHTS, RecordError

UP_TO_DATE = 'Nothing to do: every stage is up to date'


def read_json(path):
    return json.loads(path.read_text())


def small_args(small_recipe, tables, runs):
    "Return the options of a run of `small_recipe` on `tables`"
    return ['--recipe', str(small_recipe), '--data', str(tables), '--runs', str(runs)]


def set_options(*keys):
    return [option for key in keys for option in ('--set', key)]


def weights_sha256(fold_folder):
    return read_json(fold_folder / 'stage.json')['files'][WEIGHTS]['sha256']


# Files of a finished run

def test_every_stage_writes_its_files(toy):
    files = {'learner.pkl', 'weights.safetensors', 'features.safetensors', 'preds.csv', 'history.csv', 'stage.json'}
    for stage in STAGES: assert {p.name for p in (toy / stage / 'fold0').iterdir()} >= files
    assert not list(toy.rglob('*.tmp'))


def test_submission_has_ids_and_order_of_the_sample_submission(toy):
    sample = pd.read_csv(next(toy.parent.glob('demo-*/aptos*/sample_submission.csv')), dtype=str)
    submission = pd.read_csv(toy / 'submission.csv', dtype=dict(id_code=str))
    assert list(submission) == ['id_code', 'diagnosis']
    assert submission.id_code.tolist() == sample.id_code.tolist()
    assert submission.diagnosis.isin(range(5)).all()
    nodes = {p.stem for p in (toy / 'submissions').iterdir()}
    assert nodes == {'finetune_dense', 'finetune_256', 'finetune_512', 'ensemble', 'retrain_512'}
    assert (toy / 'submissions/retrain_512.csv').read_text() == (toy / 'submission.csv').read_text()


def test_scores(toy):
    df, run = pd.read_csv(toy / 'scores.csv'), open_toy_run(toy)
    last = ['score', 'grade', 'grade_low', 'grade_high', 'score_sd', 'ungradable', *DECISION_COLUMNS, *P_COLUMNS]
    assert list(df)[-len(last):] == last
    decision = read_model(toy)[0].decision
    gradable = df.ungradable.isna()
    expected = pd.DataFrame(decision.decide(df.score, df.grade, df.grade_high))
    assert (df.referable[gradable] == expected.referable[gradable]).all()
    assert np.allclose(df.p_referable[gradable], expected.p_referable[gradable], atol=1e-5)
    refused = df[~gradable]
    assert refused[list(P_COLUMNS)].isna().all(axis=None) and (refused.decision == 'not gradable').all()
    assert np.allclose(df.ensemble, (df.finetune_dense + df.finetune_256 + df.finetune_512) / 3, atol=1e-5)
    assert np.allclose(df.score, df.retrain_512)
    assert (df.grade == apply_thresholds(df.score, run.thresholds('retrain_512', run.recipe.submit.thresholds))).all()


def test_every_result_of_the_demo_says_that_it_is_synthetic(toy, capsys):
    assert 'SYNTHETIC DEMO' in (toy / 'SYNTHETIC.txt').read_text()
    assert read_json(toy / 'summary.json')['synthetic'] is True
    for stage in STAGES: assert read_json(toy / stage / 'fold0/stage.json')['synthetic']
    main(['all', *toy_args(toy)])
    assert 'SYNTHETIC DEMO' in capsys.readouterr().out


def test_summary(toy):
    summary = read_json(toy / 'summary.json')
    assert summary['outputs'].keys() == {'submission.csv', 'scores.csv', 'oof.csv'} and summary['inputs_digest']
    names = [result['stage'] for result in summary['stages']]
    assert sorted(names) == sorted([*STAGES, 'ensemble', 'blend'])


# What runs again

def test_a_second_all_does_nothing(toy, capsys):
    before = modified_times(toy)
    main(['all', *toy_args(toy)])
    assert UP_TO_DATE in capsys.readouterr().out
    changed = {p.name for p, t in modified_times(toy).items() if before.get(p) != t}
    assert changed <= {'run.json', 'SYNTHETIC.txt'}


def test_a_second_all_imports_no_network_library(toy):
    "The import would take longer than the rest of the command"
    code = (f'import sys\nfrom aptos_fastai.cli import main\nmain({["all", *toy_args(toy)]!r})\n'
            'assert not {"torch", "fastai", "timm", "sklearn", "matplotlib"} & set(sys.modules), "imported"')
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT)
    assert out.returncode == 0 and UP_TO_DATE in out.stdout, out.stderr


def test_a_changed_stage_and_its_descendants_are_to_do(toy):
    run = load_run(ROOT / 'settings.ini', 'demo', toy.parent, [*TOY_KEYS, 'stage.finetune_256.wd=0.5'])
    assert list(run.todo()) == ['finetune_256', 'retrain_512']
    assert list(open_toy_run(toy).todo()) == []


def test_only_a_changed_stage_trains_again(toy_copy, no_report, capsys):
    before = modified_times(toy_copy)
    main(['all', *toy_args(toy_copy, '--set', 'stage.finetune_dense.wd=0.5', '--replace')])
    assert 'stage 1 of 1: finetune_dense' in capsys.readouterr().out
    changed = {p.relative_to(toy_copy).parts[0] for p, t in modified_times(toy_copy).items() if before.get(p) != t}
    assert 'finetune_dense' in changed and not changed & set(STAGES[:6])


def test_outputs_of_an_older_format_are_replaced(toy_copy, no_report, monkeypatch, capsys):
    monkeypatch.setattr('aptos_fastai.pipeline.graph.SUMMARY_FORMAT', 99)
    main(['all', *toy_args(toy_copy)])
    assert UP_TO_DATE not in capsys.readouterr().out
    main(['all', *toy_args(toy_copy)])
    assert UP_TO_DATE in capsys.readouterr().out


def test_a_truncated_file_makes_its_stage_run_again(toy_copy):
    file = toy_copy / 'pretrain_dense/fold0/weights.safetensors'
    file.write_bytes(file.read_bytes()[:-10])
    assert list(open_toy_run(toy_copy).todo()) == ['pretrain_dense', 'finetune_dense']


def test_changed_files_are_not_loaded(toy_copy):
    from aptos_fastai.pipeline.scores import read_exported
    learner = toy_copy / 'finetune_256/fold0/learner.pkl'
    data = bytearray(learner.read_bytes())
    data[100] ^= 1
    learner.write_bytes(data)
    with pytest.raises(AptosError, match='learner.pkl: content changed'):
        read_exported(open_toy_run(toy_copy), 'finetune_256', 0)
    labels = toy_copy / 'labels/finetune_256/aptos_test/soft_pseudo_label.csv'
    labels.write_text(labels.read_text().replace('0.', '1.'))
    with pytest.raises(AptosError, match='soft_pseudo_label.csv: content changed'):
        read_labels(open_toy_run(toy_copy), 'finetune_256', 'aptos_test', 'soft')


# The chain of stages

def test_a_child_starts_with_its_parents_weights(toy):
    from aptos_fastai.pipeline.stage import stage_learner
    child = stage_learner(open_toy_run(toy), 'finetune_512').model.state_dict()
    parent = load_file(toy / 'pretrain_512/fold0' / WEIGHTS)
    assert len(child) == len(parent)
    assert all((child[k].numpy() == v.numpy()).all() for k, v in parent.items())
    record = read_json(toy / 'finetune_512/fold0/stage.json')
    assert record['parents']['pretrain_512'] == weights_sha256(toy / 'pretrain_512/fold0')


def test_training_changes_the_weights(toy):
    parent, child = (load_file(toy / s / 'fold0' / WEIGHTS) for s in ('pretrain_512', 'finetune_512'))
    assert any((parent[k].numpy() != child[k].numpy()).any() for k in parent)


def test_pseudo_labelled_images_train_but_never_validate(toy):
    run = open_toy_run(toy)
    stage = run.recipe.stages['retrain_512']
    labels = {(teacher, table): read_labels(run, teacher, table, 'soft') for teacher, table in stage.sources if teacher}
    frame = training_frame(run, stage, 0, labels)
    pseudo = frame[frame.source == 'finetune_256:aptos_test']
    assert len(pseudo) == 20 and not pseudo.valid.any()
    assert np.allclose(pseudo.diagnosis, labels['finetune_256', 'aptos_test'].fold0)
    valid_ids = set(frame.id_code[frame.valid])
    assert frame.valid.sum() == 12 and not valid_ids & set(frame.id_code[~frame.valid])
    preds = pd.read_csv(toy / 'retrain_512/fold0/preds.csv')
    assert set(preds.id_code) == valid_ids and set(preds.source) == {'aptos_train'}


def test_soft_labels_are_scores_and_hard_labels_their_grades(toy):
    folder, run = toy / 'labels/finetune_256/aptos_test', open_toy_run(toy)
    soft, hard = (pd.read_csv(folder / f'{k}_pseudo_label.csv', dtype=dict(id_code=str)) for k in ('soft', 'hard'))
    thresholds = run.thresholds('finetune_256', run.label_thresholds('finetune_256'))
    assert (hard.diagnosis == apply_thresholds(soft.diagnosis, thresholds)).all() and soft.id_code.equals(hard.id_code)
    weights = read_json(folder / 'provenance.json')['weights']
    assert weights['finetune_256/fold0'] == weights_sha256(toy / 'finetune_256/fold0')


def test_folds_of_a_student_learn_from_the_same_folds_of_the_teacher(small):
    root = small / 'runs/small'
    oof = pd.concat([pd.read_csv(root / f'retrain/fold{k}/preds.csv') for k in (0, 1)])
    folds = pd.read_csv(root / 'folds.csv')
    assert oof.id_code.is_unique and set(oof.id_code) == set(folds.id_code[folds.fold < 2])
    labels = pd.read_csv(root / 'labels/teacher/test/soft_pseudo_label.csv')
    assert list(labels) == ['id_code', 'diagnosis', 'fold0', 'fold1', 'score_sd0', 'score_sd1']
    assert np.allclose(labels.diagnosis, (labels.fold0 + labels.fold1) / 2, atol=1e-6)
    for k in (0, 1):
        record = read_json(root / f'retrain/fold{k}/stage.json')
        assert record['parents']['teacher'] == weights_sha256(root / f'teacher/fold{k}')
        scores = pd.read_csv(root / f'teacher/fold{k}/scores_test_hflip.csv').score
        assert np.allclose(scores, labels[f'fold{k}'], atol=1e-6)


def test_a_grader_of_several_folds_gives_the_sets_of_its_run(small):
    root = small / 'runs/small'
    submission = read_json(root / 'summary.json')['submission']
    assert [len(by_fold) for by_fold in submission['calibration']] == [2] * 5
    assert submission['kappa_text'].count('over blocks of 2 ids') == 1
    expected = pd.read_csv(root / 'scores.csv', dtype=dict(id_code=str))
    found = load_grader(root).predict([small / f'data/test_images/{i}.png' for i in expected.id_code])
    assert np.allclose(found.score, expected.score, atol=1e-4)
    graded = found.grade.notna()
    for column in ('grade_low', 'grade_high'): assert (found[column] == expected[column])[graded].all()


def groups_trained_on(run, node, k):
    "Return the groups of every graded image that fold k of a node or of its ancestors has trained on"
    seen = set()
    for member in run.recipe.members(node):
        stage = run.recipe.stages[member]
        for teacher, table in stage.sources:
            frame = run.frames[table]
            seen |= groups_trained_on(run, teacher, k) if teacher else set(frame.group[frame.fold != k])
        if stage.init: seen |= groups_trained_on(run, stage.init, k)
    return seen


def assert_no_leak(run):
    "Check that no fold of any node validates an image of a group that it, or an ancestor, was trained on"
    groups = pd.concat(run.frames.values())[['source', 'id_code', 'group']]
    for node in run.recipe.order:
        for k in run.folds_of(node):
            oof = run.oof(node, k).merge(groups, on=['source', 'id_code'])
            assert len(oof) and not set(oof.group) & groups_trained_on(run, node, k), f'{node} fold {k}'
            for member in run.recipe.members(node): assert_recorded_images(run, member, k, set(oof.group))


def assert_recorded_images(run, name, k, valid_groups):
    "Check that the record of a stage counts the images of its training frame, which holds no validation group"
    stage = run.recipe.stages[name]
    labels = {(teacher, table): read_labels(run, teacher, table, stage.labels)
              for teacher, table in stage.sources if teacher}
    frame = training_frame(run, stage, k, labels)
    assert run.record(name, k)['images'] == dict(train=int((~frame.valid).sum()), valid=int(frame.valid.sum()))
    assert not set(frame.group[~frame.valid]) & valid_groups


def test_no_image_is_validated_by_a_model_trained_on_it(toy, tables, small_recipe, tmp_path):
    assert_no_leak(open_toy_run(toy))
    keys = ['stage.retrain.init=teacher', 'stage.last.train=train both:test', 'submit.final=last']
    graded = (tables / 'train_images/train003.png').read_bytes()
    (tables / 'test_images/test003.png').write_bytes(graded)           # an ungraded duplicate of a graded image
    main(['train', 'last', *small_args(small_recipe, tables, tmp_path / 'runs'), *set_options(*keys)])
    run = load_run(small_recipe, tables, tmp_path / 'runs', keys)
    assert_no_leak(run)
    folds = {node: list(run.folds_of(node)) for node in run.recipe.order}
    assert folds == dict.fromkeys(['teacher', 'retrain', 'both', 'last'], [0, 1])
    weights = read_json(run.root / 'labels/both/test/provenance.json')['weights']
    assert set(weights) == {f'{member}/fold{k}' for member in ('teacher', 'retrain') for k in (0, 1)}


def test_uncertain_labels_are_used_and_sources_weighted(small_copy, capsys):
    root = small_copy / 'runs/small'
    shutil.rmtree(root / 'labels')
    main(['label', 'teacher', *small_options(small_copy)])
    args = ['train', 'retrain', *small_options(small_copy, 'stage.retrain.ema=.9'), '--replace']
    main([*args, '--set', 'stage.retrain.source_weights=1 2'])
    record = read_json(root / 'retrain/fold0/stage.json')
    graded = (pd.read_csv(root / 'folds.csv').fold != 0).sum()
    assert record['images']['train'] == graded + 10 and record['settings']['source_weights'] == [1, 2]
    expect_error(capsys, [*args, '--set', 'stage.retrain.source_weights=1'], 'source_weights = 1')


def test_the_moving_average_is_validated_and_kept(small, small_copy):
    "With decay 0 the average equals the weights; with a high decay it is near where training began"
    def trained(folder, *keys):
        if keys: main(['train', 'teacher', *small_options(folder, 'stage.folds=1', *keys), '--replace'])
        fold = folder / 'runs/small/teacher/fold0'
        assert f'stage.ema={read_json(fold / "stage.json")["settings"]["ema"]}' in keys or not keys
        return load_file(fold / WEIGHTS), pd.read_csv(fold / 'preds.csv').score
    plain, plain_scores = trained(small)
    no_decay, no_decay_scores = trained(small_copy, 'stage.ema=1e-09')
    slow, slow_scores = trained(small_copy, 'stage.ema=0.99')
    assert all(np.allclose(plain[k], no_decay[k], atol=1e-4) for k in plain)
    assert np.allclose(plain_scores, no_decay_scores, atol=1e-3)
    assert any(not np.allclose(plain[k], slow[k], atol=1e-3) for k in plain)
    assert not np.allclose(plain_scores, slow_scores, atol=1e-3)


# Exported learners

@pytest.mark.filterwarnings('ignore:__array__ implementation')       # of PyTorch's tensors that matplotlib draws
def test_fastai_shows_results_and_the_largest_losses(toy):
    learn = stage_learner(open_toy_run(toy), 'finetune_256')
    with learn.no_bar():
        learn.show_results(max_n=2)
        found = Interpretation.from_learner(learn)
        found.plot_top_losses(2)
    losses, rows = found.top_losses(2)
    titles = [ax.get_title() for number in plt.get_fignums()[-2:] for ax in plt.figure(number).axes]
    plt.close('all')
    grades = learn.dls.valid_ds.items.diagnosis.iloc[rows.tolist()]
    assert len(titles) == 4 and all(title.startswith('grade ') for title in titles)
    assert [title.partition(',')[0] for title in titles[2:]] == [f'grade {grade:.0f}' for grade in grades]
    assert [title.rpartition(' ')[2] for title in titles[2:]] == [f'{loss:.2f}' for loss in losses.tolist()]


def test_an_exported_learner_predicts_in_a_fresh_process(toy):
    "On original images, with nothing but the package, it gives the scores of the run"
    fold = toy / 'finetune_256/fold0'
    code = f'''
import pandas as pd, torch
from fastai.vision.all import Path, PILImage, load_learner
torch.set_num_threads(1)
learn = load_learner(r"{fold / 'learner.pkl'}")
folder = r"{next(toy.parent.glob('demo-*/aptos*/test_images'))}"
ids = pd.read_csv(r"{fold / 'scores_aptos_test_hflip.csv'}", dtype=dict(id_code=str)).id_code
dl = learn.dls.test_dl(pd.DataFrame(dict(stored=[f"{{folder}}/{{i}}.png" for i in ids])))
with learn.no_bar(): preds = learn.get_preds(dl=dl)[0]
file = f"{{folder}}/{{ids[0]}}.png"
with learn.no_bar():
    for path in file, Path(file): assert abs(float(learn.predict(path)[2]) - float(preds[0])) < 1e-3
    try: learn.predict(PILImage.create(file))           # nobody has cropped it
    except AssertionError: pass
    else: raise SystemExit("an opened image is accepted")
print(*preds.flatten().tolist())
'''
    out = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, cwd='/')
    assert out.returncode == 0, out.stderr
    scores = np.array(out.stdout.split(), float)
    from aptos_fastai.pipeline.scores import predict_scores, read_exported
    run = open_toy_run(toy)
    expected = predict_scores(read_exported(run, 'finetune_256', 0), run.frames['aptos_test'])
    assert np.allclose(scores, expected, atol=1e-4) and scores.std() > 1e-4


def test_an_exported_learner_contains_no_rows(toy):
    fold = toy / 'pretrain_256/fold0'
    data = (fold / 'learner.pkl').read_bytes()
    assert not any(i.encode() in data for i in pd.read_csv(fold / 'preds.csv').id_code)
    assert len(data) < 1.2 * (fold / WEIGHTS).stat().st_size + 200_000


# Commands

@pytest.mark.parametrize('args, words', [
    (['train', 'finetune'], ['finetune: no such stage', 'finetune_256']),
    (['label', 'nope'], ['nope: no such stage']),
    (['label', 'finetune_256', 'aptos_train'], ['no such ungraded table', 'aptos_test']),
    (['lr_find', 'nope'], ['nope: no such stage'])])
def test_unknown_names(toy, capsys, args, words):
    expect_error(capsys, [*args, *toy_args(toy)], *words)


def test_score_and_submit_need_trained_stages(small_copy, capsys):
    for stage in ('teacher', 'retrain'): shutil.rmtree(small_copy / 'runs/small' / stage)
    for command in ('score', 'submit'):
        expect_error(capsys, [command, *small_options(small_copy)], 'not trained yet', 'Run `all`')


def test_score_writes_the_scores_of_all(toy_copy, capsys):
    before = (toy_copy / 'scores.csv').read_bytes()
    (toy_copy / 'scores.csv').unlink()
    main(['score', *toy_args(toy_copy)])
    assert (toy_copy / 'scores.csv').read_bytes() == before and '20 images scored' in capsys.readouterr().out


def test_submit_with_other_thresholds(toy_copy, capsys):
    main(['submit', *toy_args(toy_copy, '--set', 'submit.thresholds=0.75 1.5 2.5 3.5')])
    scores, submission = pd.read_csv(toy_copy / 'scores.csv'), pd.read_csv(toy_copy / 'submission.csv')
    assert (submission.diagnosis == apply_thresholds(scores.score, (.75, 1.5, 2.5, 3.5))).all()
    assert 'still use the thresholds of the last `all`' in capsys.readouterr().out


def test_submit_after_the_grades_changed(small_copy, capsys):
    file = small_copy / 'data/train.csv'
    df = pd.read_csv(file)
    df.assign(diagnosis=df.diagnosis.to_numpy()[::-1]).to_csv(file, index=False)
    args = ['submit', *small_options(small_copy)]
    expect_error(capsys, args, 'trained with other settings, grades or images', 'Run `all`')


def test_lr_find_saves_its_curve(toy, capsys):
    main(['lr_find', 'pretrain_dense', *toy_args(toy)])
    assert 'valley' in capsys.readouterr().out and (toy / 'pretrain_dense/lr_find.png').stat().st_size > 5000


def test_prepare_prints_what_it_found(tables, small_recipe, tmp_path, capsys):
    main(['prepare', *small_args(small_recipe, tables, tmp_path / 'runs')])
    out = capsys.readouterr().out
    assert 'circle 40' in out and 'circle 10' in out and 'prepared.csv' in out


def test_plan_trains_nothing(toy, capsys):
    before = modified_times(toy)
    main(['plan', *toy_args(toy, '--set', 'stage.finetune_512.wd=0.3')])
    out = capsys.readouterr().out
    assert 'GB on disk' in out and 'finetune_512' in out and 'finished' in out and modified_times(toy) == before


def test_plan_notes_missing_weights_which_stop_all(tables, small_recipe, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr('aptos_fastai.training.weights._hub_problem', lambda arch: 'no connection')
    args = [*small_args(small_recipe, tables, tmp_path / 'runs'), '--set', 'stage.weights=imagenet']
    main(['plan', *args])
    out = capsys.readouterr().out
    assert 'estimate:' in out and out.count('[stage.teacher] weights = imagenet: not available for test_resnet') == 1
    expect_error(capsys, ['all', *args], '[stage.teacher] weights = imagenet: not available', 'weights = none')


def test_plan_of_a_finished_run(toy, capsys):
    main(['plan', *toy_args(toy)])
    assert UP_TO_DATE in capsys.readouterr().out


def test_plan_for_hypothetical_tables(small_recipe, tmp_path, monkeypatch, capsys):
    "Time and disk space grow in step with the images; nothing is read or written"
    monkeypatch.chdir(tmp_path)
    def one_second(stage, precisions, n):
        return dict.fromkeys(precisions, 1.), dict.fromkeys([*precisions, 'f32'], .1), 1000
    monkeypatch.setattr('aptos_fastai.training.precision.step_seconds', one_second)
    from aptos_fastai.pipeline.plan import FOLD_SECONDS, hypothetical_run, plan_cost
    from aptos_fastai.recipe.read import read_recipe
    plans = []
    for n in (100, 1000):
        run = hypothetical_run(read_recipe(small_recipe), f'train={n} test={n // 10}')
        plans.append(plan_cost(run, {stage: [0, 1] for stage in run.recipe.stages}))
    assert plans[1].new_images == 1100
    assert plans[1].seconds == pytest.approx(10 * plans[0].seconds - 9 * 4 * FOLD_SECONDS)
    # 1 s to train an image, .1 s to score one. Each fold validates 200 images once an epoch and once in two views,
    # scores the 100 test images in two views, and the training images for its feature distances
    forward = .1 * (200 + 2 * (200 + 100))
    teacher, retrain = 1.1 * 800 + forward + FOLD_SECONDS, 1.1 * 900 + forward + FOLD_SECONDS
    assert plans[1].seconds == pytest.approx(2 * (teacher + retrain) + 1100 * .03 / cores())
    monkeypatch.setattr('aptos_fastai.common.console.LOG_SECONDS', -1)
    main(['plan', '--recipe', str(small_recipe), '--images', 'train=1000000 test=5'])
    out = capsys.readouterr().out
    assert 'To prepare: 1000005 images' in out and 'timing networks: 1/2 stages teacher' in out
    assert {p.name for p in tmp_path.iterdir()} == {'small.ini'}


@pytest.mark.parametrize('images', ['test=5', 'train=5 test=x', 'train=5 test=0', 'train=5 test=3 other=2'])
def test_plan_for_hypothetical_tables_needs_every_table(small_recipe, capsys, images):
    expect_error(capsys, ['plan', '--recipe', small_recipe, '--images', images], f'--images "{images}"')


def test_plan_for_a_hypothetical_graded_table_alone(small_recipe, capsys):
    main(['plan', '--recipe', str(small_recipe), '--images', 'train=50'])
    out = capsys.readouterr().out
    assert 'teacher' in out and 'retrain' not in out


def test_thresholds_change_the_weights_only_where_they_choose_the_epoch(small_recipe, tables, tmp_path):
    def fingerprint(*sets):
        return load_run(small_recipe, tables, tmp_path / 'runs', sets).fingerprint('teacher', 0)
    assert fingerprint() == fingerprint('stage.thresholds=optimal')                       # keep = last
    by_kappa = fingerprint('stage.keep=kappa')
    assert by_kappa != fingerprint('stage.keep=kappa', 'stage.thresholds=optimal')


# Errors and warnings

def run_with_scores(toy, tmp_path, monkeypatch, scores):
    "Return the toy run with other validation scores of finetune_256"
    run = open_toy_run(toy)
    preds = pd.read_csv(toy / 'finetune_256/fold0/preds.csv', dtype=dict(id_code=str))
    preds.assign(**scores(preds)).to_csv(tmp_path / 'preds.csv', index=False)
    monkeypatch.setattr(type(run), 'verified_file', lambda *_: tmp_path / 'preds.csv')
    return run


def test_scores_that_are_not_finite(toy, tmp_path, monkeypatch):
    run = run_with_scores(toy, tmp_path, monkeypatch, lambda preds: dict(score=[np.nan] + [1.] * 11))
    words = 'finetune_256: 1 of 12 validation scores are not finite numbers'
    with pytest.raises(RecordError, match=words): run.thresholds('finetune_256', 'optimal')


@pytest.mark.parametrize('scores, words', [
    (lambda preds: dict(score=.3), 'all 12 scores are 0.3'),
    (lambda preds: dict(score=preds.index % 2, diagnosis=preds.index % 2 * 4), 'the optimal thresholds are all 0.5')],
                         ids=['equal', 'two values'])
def test_thresholds_that_cannot_be_fitted_become_the_midpoints(toy, tmp_path, monkeypatch, scores, words):
    run = run_with_scores(toy, tmp_path, monkeypatch, scores)
    thresholds, reason = run.fitted_thresholds('finetune_256', 'optimal')
    assert thresholds.tolist() == [.5, 1.5, 2.5, 3.5] and words in reason
    oof = run.oof('finetune_256')
    valid = oof.assign(group=run.groups(oof), grade=out_of_fold_grades(run, oof, 'optimal'))
    result = kappa_result(run, 'finetune_256', valid)
    assert result['thresholds'] == [.5, 1.5, 2.5, 3.5]
    assert any(words in text and 'the midpoints 0.5 1.5 2.5 3.5 are used' in text for text in result['warnings'])


def test_ensemble_members_must_validate_the_same_images(toy, tmp_path, monkeypatch):
    run = open_toy_run(toy)
    verified_file = type(run).verified_file

    def with_other_ids(self, stage, fold, file):
        path = verified_file(self, stage, fold, file)
        if stage != 'finetune_512': return path
        preds = pd.read_csv(path, dtype=dict(id_code=str))
        preds.assign(id_code=preds.id_code + 'x').to_csv(tmp_path / 'preds.csv', index=False)
        return tmp_path / 'preds.csv'
    monkeypatch.setattr(type(run), 'verified_file', with_other_ids)
    with pytest.raises(RecordError, match='finetune_512 was validated on other images'): run.oof('ensemble')


def test_folds_without_a_grade_are_reported(tables, small_recipe, tmp_path, capsys):
    df = pd.read_csv(tables / 'train.csv')
    df['diagnosis'] = np.where(df.diagnosis == 4, 3, df.diagnosis)
    df.loc[7, 'diagnosis'] = 4                # the only image of grade 4: in one fold, missing in another
    df.to_csv(tables / 'train.csv', index=False)
    main(['prepare', *small_args(small_recipe, tables, tmp_path / 'runs')])
    out = capsys.readouterr().out
    assert 'train: fold ' in out and 'has no image of grade 4' in out and 'Lower [recipe] splits = 5' in out


def test_unreadable_images_stop_all_or_get_the_most_frequent_grade(tables, small_recipe, no_report, tmp_path, capsys):
    for file in ('train_images/train007.png', 'test_images/test004.png'): (tables / file).write_bytes(b'no image')
    args = ['all', *small_args(small_recipe, tables, tmp_path / 'runs')]
    expect_error(capsys, args, 'train007', 'prepared.csv', 'skip_unreadable = yes')
    assert not list((tmp_path / 'runs').rglob('stage.json'))
    args += ['--set', 'images.skip_unreadable=yes']
    main(args)
    assert 'test: 1 image without a score' in capsys.readouterr().out
    root = tmp_path / 'runs/small'
    submission, scores = (pd.read_csv(root / f'{name}.csv').set_index('id_code') for name in ('submission', 'scores'))
    assert len(submission) == 10 and submission.diagnosis['test004'] == submission.diagnosis.mode()[0]
    assert np.isnan(scores.score['test004'])
    main(args)
    assert UP_TO_DATE in capsys.readouterr().out


def test_missing_images_are_left_out_if_asked_for(tables, small_recipe, no_report, tmp_path, capsys):
    for file in ('train_images/train007.png', 'test_images/test004.png'): (tables / file).unlink()
    args = ['all', *small_args(small_recipe, tables, tmp_path / 'runs')]
    expect_error(capsys, args, '1 of 40 ids have no image', 'train007', '--set images.skip_unreadable=yes')
    args += ['--set', 'images.skip_unreadable=yes']
    main(args)
    out = ' '.join(capsys.readouterr().out.split())
    assert 'train: 1 of 40 ids have no image and are left out: train007' in out
    assert 'test: 1 image without a score' in out and '2 ids without an image -> ' in out
    root = tmp_path / 'runs/small'
    assert pd.read_csv(root / 'missing_images.csv').to_numpy().tolist() == [['train', 'train007'], ['test', 'test004']]
    folds, submission = (pd.read_csv(root / f'{name}.csv') for name in ('folds', 'submission'))
    folds = folds[folds.source == 'train']
    assert len(folds) == 39 and 'train007' not in set(folds.id_code) and len(submission) == 10
    main(args)
    assert UP_TO_DATE in capsys.readouterr().out


def test_results_of_another_data_folder_are_not_overwritten(small_copy, tmp_path, capsys):
    shutil.copytree(small_copy / 'data', tmp_path / 'other')
    args = ['all', *small_args(small_copy / 'small.ini', tmp_path / 'other', small_copy / 'runs')]
    expect_error(capsys, args, 'belongs to the data folder', '--runs')
    shutil.rmtree(small_copy / 'data')
    expect_error(capsys, args, f'all {small_copy / "runs/small"} --data {tmp_path / "other"}, once')


def test_batch_size_above_the_table(tables, small_recipe, tmp_path, capsys):
    args = ['all', *small_args(small_recipe, tables, tmp_path / 'runs')]
    expect_error(capsys, [*args, '--set', 'stage.bs=64'], 'fold 0 has only', 'training images. Set it to')
    assert not (tmp_path / 'runs').exists()


def test_a_diverging_stage_is_named(tables, small_recipe, tmp_path, capsys):
    keys = ('lr=10', 'loss=mse', 'schedule=constant', 'epochs=30', 'head=avg', 'wd=10')
    args = ['train', 'teacher', *small_args(small_recipe, tables, tmp_path / 'runs'), *stage_options(*keys)]
    assert 'ower' in expect_error(capsys, args, '[stage.teacher] fold 0, epoch')     # lower the learning rate


def test_missing_data_folder(capsys, tmp_path):
    args = ['all', '--recipe', ROOT / 'settings.ini', '--runs', tmp_path / 'r', '--data']
    expect_error(capsys, [*args, tmp_path / 'nowhere'], 'nowhere: ', '--data demo')
    expect_error(capsys, [*args, tmp_path], 'trainLabels.csv', '--data demo')
    assert not (tmp_path / 'r').exists()


def test_runs_is_a_file(capsys, tmp_path):
    (tmp_path / 'r').write_text('')
    args = ['all', '--runs', tmp_path / 'r', '--recipe', ROOT / 'settings.ini']
    expect_error(capsys, args, 'is a file. Choose a folder with --runs')


def test_real_images_through_the_recipe(idrid, no_report, tmp_path):
    "recipes/one_table.ini at toy size on 60 graded images of IDRiD and 10 others: tables, crop, two stages, grades"
    for name, n in dict(train=60, test=10).items():
        pd.read_csv(idrid / f'{name}.csv').head(n).to_csv(tmp_path / f'{name}.csv', index=False)
        (tmp_path / f'{name}_images').symlink_to(idrid / f'{name}_images')
    keys = ('size=32', 'folds=1', 'epochs=1', 'freeze_epochs=0', 'arch=test_resnet', 'weights=none', 'tta=none')
    main(['all', '--recipe', str(ROOT / 'recipes/one_table.ini'), '--data', str(tmp_path), '--runs',
          str(tmp_path / 'runs'), '--set', 'images.size=64', *stage_options(*keys)])
    submission = pd.read_csv(tmp_path / 'runs/one_table/submission.csv')
    assert len(submission) == 10 and submission.id_code[0] == 'test_IDRiD_001'
