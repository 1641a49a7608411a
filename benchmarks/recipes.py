"""What each ingredient of recipes/one_table.ini is worth, out of fold, on one graded table: python benchmarks/recipes.py --data ~/idrid [VARIANT ...]

Every variant is a run of its own under --runs (default runs/ablation), on the same folds and the same network; what is finished is not trained again.
The table gives kappa by cuts fitted on the other folds, its difference to the first row on the same pictures (paired bootstrap), and minutes of training.
"""
import argparse
import subprocess
import sys
from pathlib import Path

RECIPE = Path(__file__).parents[1] / 'recipes/one_table.ini'
PUBLISHED_AUGMENT = ['augment.hue=.1', 'augment.blur=.5', 'augment.shift=.2', 'augment.scale=.8 1.2', 'augment.shear=.2']
PUBLISHED_PICTURE = ['images.crop=none', 'images.aspect=squash', 'images.size=0']
CONSTANT = ['stage.schedule=constant', 'stage.lr_div=1', 'stage.freeze_epochs=0']
NO_AUGMENT = [f'augment.{k}=0' for k in ('brightness', 'contrast', 'saturation', 'hue', 'rotate', 'shift', 'hflip')] + ['augment.scale=1 1']
VARIANTS = {                                 # name -> (stage, keys)
    'published recipe': ('teacher', [*PUBLISHED_PICTURE, *PUBLISHED_AUGMENT, *CONSTANT, 'stage.lr=2e-4', 'stage.wd=0', 'stage.epochs=30', 'stage.sqr_mom=.999',
                                     'stage.eps=1e-8', 'stage.tta=hflip', 'stage.cuts=.75 1.5 2.5 3.5']),
    'ours': ('teacher', []),
    'ours, retrained with soft labels': ('retrain', []),
    'squashed whole picture': ('teacher', PUBLISHED_PICTURE),
    'constant rate': ('teacher', [*CONSTANT, 'stage.lr=1e-3', 'stage.epochs=12']),
    'average pooling': ('teacher', ['stage.head=avg']),
    'published augmentation': ('teacher', PUBLISHED_AUGMENT),
    'no augmentation': ('teacher', NO_AUGMENT),
    'cut-off left black': ('teacher', ['images.cut_off=black']),
    'one rate and no frozen start': ('teacher', ['stage.lr_div=1', 'stage.freeze_epochs=0', 'stage.epochs=12']),
    'progressive resizing': ('teacher', ['stage.small.train=train', 'stage.small.size=160', 'stage.small.epochs=6', 'stage.teacher.init=small',
                                         'stage.teacher.epochs=6', 'stage.teacher.freeze_epochs=0', 'stage.teacher.lr=1.5e-3']),
    'mean squared error': ('teacher', ['stage.loss=mse']),
}


def trained(name: str, data: str, runs: Path) -> list[str]:
    "Trains a variant and returns its command line"
    stage, sets = VARIANTS[name]
    args = ['--recipe', str(RECIPE), '--data', data, '--runs', str(runs / name.partition(',')[0].replace(' ', '_')), *(o for s in sets for o in ('--set', s))]
    if subprocess.run([sys.executable, str(RECIPE.parents[1] / 'run.py'), 'train', stage, *args], check=False).returncode: sys.exit(1)
    return args


def main(data: str, runs: Path, names: list[str]):
    for n in names: trained(n, data, runs)


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('variants', nargs='*', metavar='VARIANT', help=', '.join(VARIANTS))
    p.add_argument('--data', required=True)
    p.add_argument('--runs', type=Path, default=Path('runs/ablation'))
    a = p.parse_args()
    main(a.data, a.runs, a.variants or list(VARIANTS))
