"The command line: its commands, and the parser that is made from them."
import argparse
import inspect
import os
import re
import signal
import sys
import textwrap
import threading
from collections.abc import Callable
from dataclasses import MISSING, fields
from functools import partial

from aptos_fastai.common import distributed
from aptos_fastai.common.io import AptosError, trust


class Commands:
    "What `run.py COMMAND` does. Each method is a command: its docstring is the help, its parameters the arguments; static ones are on no recipe"
    def __init__(self, recipe: str, data: str, runs: str, sets: list[str]): self.recipe, self.data, self.runs, self.sets = recipe, data, runs, sets

    def open(self, node: str = ''):
        from aptos_fastai.pipeline.graph import open_run
        return open_run(self.recipe, self.data, self.runs, self.sets, node)

    def all(self):
        """Train the recipe's whole graph and write submission.csv; what is finished is not done again.

        python run.py all
        python run.py all --data ~/kaggle --runs ~/aptos-runs
        """
        from aptos_fastai.commands import run_all
        run_all(self.open())

    def plan(self, *, images: 'TABLE=N for every table, in quotes: plan for as many images as that, which need not be here' = ''):  # noqa: F722
        """Show what `all` would do: stages, tables, images, time and disk. Trains nothing and writes nothing but the demo's images.

        python run.py plan --recipe recipes/one_table.ini --data ~/idrid
        python run.py plan --images "eyepacs2015=35126 aptos_train=3662 aptos_test=1928"
        """
        from aptos_fastai.pipeline.plan import plan_images, show_plan
        plan_images(self.recipe, self.sets, images) if images else show_plan(self.open())

    def doctor(self):
        """Say what would stop `all` before it does: versions, devices, tables, weights, disk, time; how to get Kaggle's tables where they are missing.

        python run.py doctor --data ~/kaggle
        """
        from aptos_fastai.pipeline.doctor import doctor
        doctor(self.recipe, self.data, self.runs, self.sets)

    def prepare(self):
        """Find, crop and store the retinas of every table, as `all` does by itself; say what was found and what looks bad.

        python run.py prepare --data ~/kaggle
        """
        from aptos_fastai.commands import prepare_all
        prepare_all(self.open())

    def inspect(self, table: 'the table', count: 'how many images are shown' = '24'):  # noqa: F722
        """Make a page of what a table holds: grades, sizes, quality flags, duplicates, and images with their circle, crop and augmentation.

        python run.py inspect aptos_train
        python run.py inspect train 413 --recipe recipes/one_table.ini --data ~/idrid
        """
        from aptos_fastai.reports.table_report import inspect_table
        if not count.isdigit(): raise AptosError(f'{count}: a number of images is needed')
        inspect_table(self.open(), table, int(count))

    def train(self, stage: 'the stage'):   # noqa: F722 (a help text, not a type)
        """Train one stage and whatever it builds on that is not finished.

        python run.py train finetune_256
        """
        from aptos_fastai.commands import train_stage
        train_stage(self.open(stage), stage)

    def label(self, stage: 'the stage or ensemble that labels', table: 'the ungraded table; left out: the submission\'s' = ''):  # noqa: F722
        """Write soft_pseudo_label.csv and hard_pseudo_label.csv for an ungraded table, training what is needed first.

        python run.py label finetune_256
        """
        from aptos_fastai.commands import label_table
        label_table(self.open(stage), stage, table)

    def predict(self, model: 'a bundle, a run\'s folder <runs>/<recipe>, or a stage\'s in it' = '',  # noqa: F722
                *images: 'files, folders, a glob in quotes, or a CSV that names them', output: 'the CSV to write' = 'grades.csv',  # noqa: F722
                backend: 'torch, or for a bundle onnx or openvino' = 'torch', precision: 'f32, or bf16: faster on CPUs that know it' = 'f32'):  # noqa: F722
        """Grade images of your own by a trained model; without arguments write scores.csv: the test images by each submitted stage and ensemble.

        python run.py predict runs/one_table ~/clinic/images -o grades.csv
        python run.py predict
        """
        if not model:
            from aptos_fastai.commands import write_scores
            return write_scores(self.open())
        if not images: raise AptosError(f'predict {model}: name the images, too: files, folders, a glob in quotes or a CSV')
        from aptos_fastai.inference.grade_files import grade_files
        grade_files(model, images, output, backend, precision)

    def submit(self):
        """Write submission.csv and submissions/ from the finished stages.

        python run.py submit --set "submit.thresholds=0.75 1.5 2.5 3.5"
        """
        from aptos_fastai.commands import write_submissions
        write_submissions(self.open())

    def report(self):
        """Write report.html of a finished run anew: kappas, mistakes, ROC, calibration, curves, certainty, shortcuts. `all` ends with it.

        python run.py report
        """
        from aptos_fastai.commands import report_run
        report_run(self.open())

    @staticmethod
    def compare(first: 'a finished run\'s folder, <runs>/<recipe>', second: 'the other one'):  # noqa: F722
        """Put two finished runs side by side: kappa of their common stages and answers on the same images, by a paired bootstrap.

        python run.py compare runs/one_table ~/other-runs/one_table
        """
        from aptos_fastai.pipeline.summary import compare_runs
        compare_runs(first, second)

    @staticmethod
    def export(run: 'a run\'s folder <runs>/<recipe>, or a stage\'s in it'):  # noqa: F722
        """Write a bundle that answers elsewhere: weights as safetensors and ONNX, bundle.json, model card; compares ONNX with PyTorch.

        python run.py export runs/one_table
        """
        from aptos_fastai.deploy.bundle import export_run
        export_run(run)

    @staticmethod
    def explain(model: 'a bundle, a run\'s folder <runs>/<recipe>, or a stage\'s in it',  # noqa: F722
                *images: 'files, folders, a glob in quotes, or a CSV that names them', output: 'the folder to write into' = 'explained'):  # noqa: F722
        """Show where in images their scores come from: the original and its heat map side by side, with the grade in words.

        python run.py explain runs/one_table ~/clinic/eye.jpg -o explained
        """
        from aptos_fastai.inference.explain import explain_files
        if not images: raise AptosError(f'explain {model}: name the images, too: files, folders, a glob in quotes or a CSV')
        explain_files(model, images, output)

    @staticmethod
    def serve(model: 'a bundle, a run\'s folder <runs>/<recipe>, or a stage\'s in it', *, host: 'address to listen on' = '127.0.0.1',  # noqa: F722
              port: 'port to listen on' = '8000'):  # noqa: F722
        """Open a local page that grades images: drop them, read grade, score and heat map, save a CSV; /api/predict for programs.

        python run.py serve runs/one_table
        """
        from aptos_fastai.deploy.serve import serve
        if not port.isdigit() or not 0 < int(port) < 65536: raise AptosError(f'--port {port}: a number from 1 to 65535 is needed')
        serve(model, host, int(port))

    @staticmethod
    def kaggle(run: 'a run\'s folder <runs>/<recipe>, or a stage\'s in it', *, user: 'your Kaggle user name' = 'your-name'):  # noqa: F722
        """Write the folders to upload for the offline code competition: a dataset (weights, this package) and a notebook that answers its test.csv.

        python run.py kaggle runs/settings --user me
        """
        from aptos_fastai.deploy.kaggle import write_kaggle
        write_kaggle(run, user)

    def lr_find(self, stage: 'the stage'):  # noqa: F722
        """Suggest learning rates for a stage and save the curve as lr_find.png in its folder.

        python run.py lr_find pretrain_256
        """
        from aptos_fastai.commands import suggest_rates
        suggest_rates(self.open(stage), stage)

    def batch(self, stage: 'the stage'):  # noqa: F722
        """Find the largest batch (2, 4, 8, …) of a stage that fits this GPU, with the images a second and the memory of each.

        python run.py batch pretrain_512 --data ~/kaggle
        """
        from aptos_fastai.commands import suggest_batch
        suggest_batch(self.open(stage), stage)

    def demo(self, folder: 'where to write the tables' = 'demo_data'):  # noqa: F722
        """Write the synthetic demo's tables as Kaggle's folders, to look at or to pass as --data.

        python run.py demo /tmp/demo
        """
        from aptos_fastai.commands import write_demo_folder
        write_demo_folder(self.recipe, self.sets, folder)

    @staticmethod
    def init(folder: 'where to write them' = '.'):  # noqa: F722
        """Write settings.ini and recipes/ as they were shipped, to start from where there is no clone.

        python run.py init ~/dr
        aptos-fastai init ~/dr && cd ~/dr && aptos-fastai all        (installed without a clone, run.py is aptos-fastai)
        """
        from pathlib import Path

        from aptos_fastai.common.console import say
        from aptos_fastai.recipe import write_recipes
        for f in write_recipes(Path(folder)): say(str(f))

    @staticmethod
    def keys():
        """List every section and key of a recipe with its default, unit and accepted values.

        python run.py keys
        """
        show_keys()


def show_keys():
    "`keys`, at 80 columns"
    from aptos_fastai.common.console import say
    from aptos_fastai.recipe import KINDS, NAMED
    for name, cls in KINDS.items():
        say(f'\n[{name}.NAME]' if name in NAMED else f'\n[{name}]', 'bold')
        for f in fields(cls):
            if f.name == 'name': continue
            m = f.metadata
            default = 'needed' if f.default is MISSING else ' '.join(map(str, f.default)) if isinstance(f.default, tuple) else str(f.default)
            accepted = f' ({", ".join(m["choices"])})' if m['choices'] else f' ({m["low"]} to {m["high"]})' if m['low'] is not None else ''
            head = f'  {f.name:<14} {default or "empty":<18}'
            say(textwrap.fill(m['help'] + accepted, 80, initial_indent=f'{head} ', subsequent_indent=' ' * 36))


def _commands() -> list[str]: return [n for n in vars(Commands) if not n.startswith('_') and n != 'open']
def _on_a_recipe(command: str) -> bool: return not isinstance(vars(Commands)[command], staticmethod)


def _parameters(command: str) -> list[inspect.Parameter]:
    return list(inspect.signature(getattr(Commands, command)).parameters.values())[_on_a_recipe(command):]


def _add_argument(sub: argparse.ArgumentParser, o: inspect.Parameter):
    "A parameter of a command as its argument: *many, needed, with a default, or keyword-only as an option"
    if o.kind is o.KEYWORD_ONLY:
        short = ['-o'] if o.name == 'output' else []
        sub.add_argument(*short, f'--{o.name}', metavar=o.name.upper(), default=o.default, help=o.annotation + ' (default: %(default)s)' * bool(o.default))
    elif o.kind is o.VAR_POSITIONAL: sub.add_argument(o.name, nargs='*', help=o.annotation)
    elif o.default is o.empty: sub.add_argument(o.name, help=o.annotation)
    else: sub.add_argument(o.name, nargs='?', default=o.default, help=o.annotation)


def _recipe_options() -> argparse.ArgumentParser:
    "What every command on a recipe takes"
    p = argparse.ArgumentParser(add_help=False)
    add = p.add_argument_group('the run').add_argument
    add('--recipe', default='settings.ini', metavar='FILE', help='the recipe (default: %(default)s)')
    add('--data', default='demo', metavar='FOLDER', help='folder of the tables, or demo: synthetic images (default: %(default)s)')
    add('--runs', default='runs', metavar='FOLDER', help='where results go, as FOLDER/<recipe name>/ (default: %(default)s)')
    add('--set', dest='sets', action='append', default=[], metavar='SECTION.KEY=VALUE', help='a key of the recipe, for this run; may be repeated')
    add('--trust', action='append', default=[], metavar='FILE', help='a pickle that this run did not write and may read all the same; may be repeated')
    return p


def get_parser() -> argparse.ArgumentParser:
    "The command line, made from the methods of `Commands`; it goes by the name it was called by"
    called = 'aptos-fastai' if os.path.basename(sys.argv[0]).startswith('aptos-fastai') else 'run.py'
    p = argparse.ArgumentParser(prog=called, description='Grades diabetic retinopathy (0-4) from fundus images: staged fastai training.',
                                epilog=f'{called} COMMAND --help tells more. No medical device.')
    subs, options = p.add_subparsers(dest='command', metavar='COMMAND', required=True), _recipe_options()
    for name in _commands():
        head, _, example = inspect.cleandoc(getattr(Commands, name).__doc__).partition('\n\n')
        if called != 'run.py': example = example.replace('python run.py', called)
        sub = subs.add_parser(name, help=re.split(r'[;:.] |\.$', head)[0], description=textwrap.fill(head, 80),
                              parents=[options] if _on_a_recipe(name) else [],
                              epilog='example' + ('s:\n  ' if '\n' in example else ':\n  ') + example.replace('\n', '\n  '),
                              formatter_class=argparse.RawDescriptionHelpFormatter)
        for o in _parameters(name): _add_argument(sub, o)
    return p


def _asked_for(argv: list[str] | None) -> tuple[str, Callable[[], None], list[str], str]:
    "The command's name, the command itself with its arguments, what is trusted, and where a run goes"
    args = vars(get_parser().parse_args(argv))
    name, trusted = args.pop('command'), args.pop('trust', [])
    common = {k: args.pop(k) for k in ('recipe', 'data', 'runs', 'sets') if k in args}
    options = {o.name: args.pop(o.name) for o in _parameters(name) if o.kind is o.KEYWORD_ONLY}
    given = [v for o in _parameters(name) if o.name in args for v in (args[o.name] if o.kind is o.VAR_POSITIONAL else [args[o.name]])]
    return name, partial(getattr(Commands(**common) if common else Commands, name), *given, **options), trusted, common.get('runs', '')


def main(argv: list[str] | None = None):
    "Runs the command that `argv` (default: the program's own) names; a failure is one line on stderr and exit status 1, Ctrl-C 130, SIGTERM 143"
    name, command, trusted, runs = _asked_for(argv)
    was = signal.signal(signal.SIGTERM, _terminated) if threading.current_thread() is threading.main_thread() else None
    try:
        trust(trusted)
        with distributed.process_group() as leads:
            if leads: command()
            else: distributed.worker_loop()
    except AptosError as e: sys.exit(_failed(str(e)))
    except KeyboardInterrupt as e:
        if distributed.rank(): sys.exit(130)       # the first one says it
        where = f'{e}; ' if str(e) else ''
        _failed(f'stopped; {where}what is finished stays: the same command goes on from there ({runs})' if runs else 'stopped')
        sys.exit(143 if isinstance(e, Terminated) or isinstance(e.__context__, Terminated) else 130)
    except BrokenPipeError: os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())     # `| head` is no failure
    except OSError as e: sys.exit(_failed(f'{e.filename or name}: {e.strerror or e}; nothing that was finished is lost'))
    except (MemoryError, RuntimeError) as e:
        if distributed.is_peer_lost(e): sys.exit(_failed(f'{distributed.LOST} ({str(e).splitlines()[0].partition(". ")[0][:200]})'))
        if not isinstance(e, MemoryError) and type(e).__name__ != 'OutOfMemoryError': raise      # PyTorch's, which is not imported here
        sys.exit(_failed(f'{name}: out of memory; set bs or size lower, or close other programs'))
    finally:
        if was is not None: signal.signal(signal.SIGTERM, was)


class Terminated(KeyboardInterrupt):
    "SIGTERM: as Ctrl-C"


def _terminated(*_): raise Terminated


def _failed(line: str) -> int:
    who = f'rank {distributed.rank()} of {distributed.world_size()}: ' if distributed.world_size() > 1 else ''
    print('error: ' + who + ' '.join(line.split()), file=sys.stderr, flush=True)
    return 1
