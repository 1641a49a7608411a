"""The command line: `python run.py COMMAND`, or `aptos-fastai COMMAND` once installed.

Each function marked `@command` is a command: its docstring is the help, its parameters are the arguments. It imports
what it calls inside its body, so that `--help` stays fast.
"""
import functools
import io
import math
import os
import signal
import sys
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from inspect import Parameter, Signature, cleandoc, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.core import TyperArgument, TyperCommand
from typer.models import ArgumentInfo

import aptos_fastai
from aptos_fastai.common.disclaimer import DISCLAIMER
from aptos_fastai.common.program import COMMAND, PROGRAM

if TYPE_CHECKING:
    from aptos_fastai.run_folder import Run

UsageError: Any = typer.BadParameter.__mro__[1]     # click's class, which recent versions of typer bundle

HELP_OPTIONS = dict(help_option_names=['-h', '--help'])

app = typer.Typer(rich_markup_mode=None, add_completion=PROGRAM == 'aptos-fastai', context_settings=HELP_OPTIONS)
COMMANDS: dict[str, Callable] = {}           # name -> function


# Parameters of several commands

def argument(name: str, text: str, **settings: Any) -> Any:
    "Return a positional argument, shown as `name` in the help"
    return typer.Argument(metavar=name, help=text, **settings)


def whole_number(text: str) -> int:
    "Return the number in `text`. Raises `BadParameter`"
    try: return int(text)
    except ValueError: raise typer.BadParameter(f'{text} is not a whole number') from None


def image_count(text: str) -> int:
    "Return the number of images in `text`. Raises `BadParameter`, for a folder with where to write it"
    try: return whole_number(text)
    except typer.BadParameter as e:
        if not Path(text).is_dir(): raise
        raise typer.BadParameter(f'{e.message}, but a folder. Write --images before its name') from None


def hours_above_0(text: str) -> float:
    "Return the number of hours in `text`. Raises `BadParameter`"
    try: hours = float(text)
    except ValueError: hours = 0
    if not 0 < hours < math.inf: raise typer.BadParameter(f'{text}: enter a number of hours above 0, as 4 or 0.5')
    return hours


RecipeFile = Annotated[str, typer.Option(metavar='FILE', help='The recipe.')]
Sets = Annotated[list[str] | None, typer.Option(
    '--set', metavar='SECTION.KEY=VALUE', help='Change a key of the recipe for this run. May be repeated.')]
Stage = Annotated[str, argument('STAGE', 'A stage of the recipe.')]
RunPath = Annotated[str, argument('RUN', 'A run folder <runs>/<name>, or a stage folder in it.')]
Model = Annotated[str, argument('MODEL', 'A bundle, a run folder <runs>/<name>, or a stage folder in it.')]
Root = Annotated[str | None, typer.Option(
    metavar='FOLDER', help='Base folder of relative paths in a CSV. Default: the folder of the CSV.')]
Deidentify = Annotated[bool, typer.Option(
    '--deidentify', help='Leave ids, file names, patients and images out of what is written.')]
DeidentifyReport = Annotated[bool, typer.Option(
    '--deidentify', help='Leave ids and images out of report.html. Other files of the run keep the ids.')]
Hours = Annotated[float | None, typer.Option(
    metavar='H', parser=hours_above_0, help='Take at most about H hours: stages that would end later are left out. A '
    'later `all` trains them.')]
Replace = Annotated[bool, typer.Option(
    '--replace', help='Train finished stages again here if their settings or images have changed.')]
TableRecipe = Annotated[str, typer.Option(metavar='FILE', help='The recipe that has the table TABLE.')]
TableData = Annotated[str, typer.Option(
    metavar='FOLDER', help='The folder of the table, for a preset or a table of the recipe.')]
SheetName = Annotated[str, typer.Option(
    '--sheet', metavar='NAME', help='The sheet of an .xlsx file. Default: the only one with data.')]
Images = Annotated[list[str], argument('IMAGES', 'Files, folders, a glob in quotes, or a CSV that names files.')]


@dataclass
class RunOptions:
    "The options of every command that works on a run. `folder` is an argument of commands that have no other"
    folder: Annotated[str, argument('RUN', 'The same as --run.')] = ''
    recipe: RecipeFile = 'settings.ini'
    data: Annotated[str, typer.Option(
        metavar='FOLDER', help='The folder of the tables, or demo: generated images.')] = 'demo'
    runs: Annotated[str, typer.Option(metavar='FOLDER', help='Results go to FOLDER/<name>/.')] = 'runs'
    name: Annotated[str, typer.Option(metavar='NAME', help='Name of the run. Default: that of the recipe.')] = ''
    run: Annotated[str, typer.Option(
        metavar='FOLDER', help='A run folder: recipe, data and earlier --set values are those of this run.')] = ''
    sets: Sets = None
    trusted: Annotated[list[str] | None, typer.Option(
        '--trust', metavar='FILE', help="Load this pickle although its hash is not in the run's records; a pickle can "
        'run code. May be repeated.')] = None

    def load(self, node: str = '', table: str = '') -> 'Run':
        "Return the run; its recipe must have the stage or ensemble `node` and the table `table`"
        from aptos_fastai.pipeline.graph import load_run
        return load_run(self.recipe, self.data, self.runs, self.sets or [], node, self.name, table)

    def resolved(self, given: Collection[str]) -> 'RunOptions':
        "Return the options with those of the run folder, if one was named; `given` are the names of the others"
        from aptos_fastai.common.io import AptosError
        from aptos_fastai.pipeline.run_recipe import check_name, options_of
        folder = self.folder or self.run
        if not folder:
            if self.name: check_name(self.name)
            return self
        if self.folder and self.run: raise AptosError(f'--run {self.run}: {self.folder} was named, too. Name one run.')
        excess = [f'--{name}' for name in ('recipe', 'runs', 'name') if name in given]
        if excess: raise AptosError(f'{excess[0]}: the run folder {folder} has its own. Name one of them.')
        options: Any = options_of(folder, self.data if 'data' in given else '')
        return replace(self, **options)


# From a function to a command

class Command(TyperCommand):
    "A command whose help shows the names of its arguments without Python types and braces"
    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        for parameter in self.params:
            if isinstance(parameter, TyperArgument): parameter.display_type_rich = lambda ctx: None  # type: ignore

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        "Return the parts of the usage line: [OPTIONS] MODEL IMAGES..."
        return [piece.replace('{', '').replace('}', '') for piece in super().collect_usage_pieces(ctx)]


def command(function: Callable) -> Callable:
    "Make `function` a command. A parameter `options: RunOptions` becomes the options of `RunOptions`"
    own = [p for p in signature(function).parameters.values() if p.annotation is not RunOptions]
    shared = run_parameters(own) if uses_run(function) else []

    @functools.wraps(function)
    def parsed(ctx: typer.Context, **values: Any) -> None:
        options = RunOptions(**{p.name: values.pop(p.name) for p in shared})
        given = [p.name for p in shared if ctx.get_parameter_source(p.name).name == 'COMMANDLINE']  # type: ignore
        with error_handling(function.__name__, options.folder or options.run or options.runs if shared else ''):
            if shared: values['options'] = options.resolved(given)
            run_on_rank_0(functools.partial(function, **values), options.trusted or [])

    context = Parameter('ctx', Parameter.KEYWORD_ONLY, annotation=typer.Context)
    parameters = [context, *(p.replace(kind=Parameter.KEYWORD_ONLY) for p in [*own, *shared])]
    parsed.__signature__ = Signature(parameters)      # type: ignore[attr-defined]
    parsed.__annotations__ = {p.name: p.annotation for p in parameters}
    app.command(function.__name__, cls=Command, help=help_text(function), context_settings=HELP_OPTIONS)(parsed)
    COMMANDS[function.__name__] = function
    return function


def run_parameters(own: list[Parameter]) -> list[Parameter]:
    "Return those of `RunOptions` for a command with the parameters `own`: its `folder` only if they have no argument"
    has_argument = any(isinstance(o, ArgumentInfo) for p in own for o in getattr(p.annotation, '__metadata__', ()))
    return [p for p in signature(RunOptions).parameters.values() if p.name != 'folder' or not has_argument]


def uses_run(function: Callable) -> bool:
    "Return whether a command takes the options of `RunOptions`"
    return any(p.annotation is RunOptions for p in signature(function).parameters.values())


def help_text(function: Callable) -> str:
    "Return a command's help from its docstring (a paragraph, an empty line, examples); \\b keeps the examples' lines"
    text, _, examples = cleandoc(function.__doc__ or '').partition('\n\n')
    examples = examples.replace('python run.py', COMMAND)
    lines = examples.split('\n')
    return '\n'.join([text, '', '\b', 'Examples:' if len(lines) > 1 else 'Example:', *(f'  {line}' for line in lines)])


def run_on_rank_0(function: Callable, trusted: list[str]) -> None:
    "Call `function` on rank 0; under torchrun the other ranks wait for the jobs that it sends"
    from aptos_fastai.common import distributed
    from aptos_fastai.common.io import trust
    trust(trusted)
    with distributed.process_group() as is_rank_0:
        if is_rank_0: function()
        else: distributed.worker_loop()


# The end of a command

class Terminated(KeyboardInterrupt):
    "SIGTERM, handled as Ctrl-C"


def _raise_terminated(*_: Any) -> NoReturn: raise Terminated


def fail(message: str, status: int = 1) -> NoReturn:
    "Print `message` as one line on stderr and exit"
    world_size, rank = (os.environ.get(name) for name in ('WORLD_SIZE', 'RANK'))
    process = f'rank {rank} of {world_size}: ' if int(world_size or 1) > 1 else ''
    print('error: ' + process + ' '.join(message.split()), file=sys.stderr, flush=True)
    sys.exit(status)


@contextmanager
def error_handling(name: str, runs: str) -> Iterator[None]:
    "End a failed command with one line on stderr: exit status 1, 130 after Ctrl-C, 143 after SIGTERM"
    from aptos_fastai.common.io import AptosError
    in_main_thread = threading.current_thread() is threading.main_thread()
    previous = signal.signal(signal.SIGTERM, _raise_terminated) if in_main_thread else None
    try: yield
    except AptosError as e: fail(str(e))
    except KeyboardInterrupt as e: _stopped(e, runs)
    except BrokenPipeError:                  # `| head` closed the pipe, which is no failure
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as e: fail(f'{e.filename or name}: {e.strerror or e}. Finished work is kept.')
    except (MemoryError, RuntimeError) as e: _out_of_memory_or_peer_lost(e, name)
    finally:
        if previous is not None: signal.signal(signal.SIGTERM, previous)


def _stopped(e: KeyboardInterrupt, runs: str) -> NoReturn:
    from aptos_fastai.common import distributed
    status = 143 if isinstance(e, Terminated) or isinstance(e.__context__, Terminated) else 130
    if distributed.rank(): sys.exit(130)     # rank 0 prints the message
    done = f': {e}' if str(e) else ''
    resume = f' Finished work is kept in {runs}; run the same command again to resume.' if runs else ''
    fail(f'stopped{done}.{resume}', status)


def _out_of_memory_or_peer_lost(e: Exception, name: str) -> NoReturn:
    from aptos_fastai.common import distributed
    if distributed.is_peer_lost(e):
        reason = str(e).splitlines()[0].partition('. ')[0][:200]
        fail(f'{distributed.PEER_LOST} ({reason})')
    # PyTorch's OutOfMemoryError by its name, because PyTorch may not be imported
    if not isinstance(e, MemoryError) and type(e).__name__ != 'OutOfMemoryError': raise e
    fail(f'{name}: out of memory. Lower bs or size, or close other programs.')


@functools.cache
def program_parser() -> Any:
    "Return the parser of the program, which holds those of its commands"
    return typer.main.get_command(app)


def main(argv: list[str] | None = None) -> None:
    "Run the command in `argv` (default: the program's arguments). Raises `SystemExit` if it fails"
    if isinstance(sys.stdout, io.TextIOWrapper): sys.stdout.reconfigure(errors='replace')      # cp1252 in a pipe
    parser, program = program_parser(), PROGRAM
    arguments = sys.argv[1:] if argv is None else argv
    name = arguments[0].replace('-', '_') if arguments else ''          # operating-point is operating_point
    if name in COMMANDS:                     # parse its arguments alone: those of the program import pydantic
        arguments = arguments[1:]
        parser, program = parser.commands[name], f'{PROGRAM} {name}'
    try: status = parser.main(args=arguments, prog_name=program, standalone_mode=False)
    except UsageError as e:
        context = getattr(e, 'ctx', None)
        message = e.format_message()
        if not message.endswith(('.', '?')): message += '.'
        fail(f'{message} See {context.command_path if context else PROGRAM} --help.')
    if status: sys.exit(status)


# The commands

def _show_version(wanted: bool) -> None:
    if not wanted: return
    print(f'aptos-fastai {aptos_fastai.__version__}')
    raise typer.Exit


@app.callback(epilog=f'{PROGRAM} COMMAND --help shows the arguments of a command. {DISCLAIMER}')
def program(version: Annotated[bool, typer.Option(
        '--version', callback=_show_version, is_eager=True, help='Show the version and exit.')] = False) -> None:
    "Grade diabetic retinopathy (0-4) from fundus images with staged fastai training."


@command
def all(options: RunOptions, hours: Hours = None, deidentify: DeidentifyReport = False,
        replace: Replace = False) -> None:
    """Train every stage and write submission.csv. Finished stages are skipped.

    python run.py all
    python run.py all --recipe recipes/one_table.ini --data ~/mydata --name large --set stage.size=384
    python run.py all --recipe recipes/one_table.ini --data ~/idrid --hours 0.5
    python run.py all runs/large
    """
    from aptos_fastai.common.clock import seconds
    start = seconds()                        # imports of PyTorch count
    from aptos_fastai import commands
    deadline = commands.Deadline(hours, start) if hours else None
    commands.run_all(options.load(), deidentify, deadline, replace)


Column = Annotated[str, typer.Option(metavar='COLUMN', help='Default: found by names and contents.')]
Ungradable = Annotated[str, typer.Option(
    metavar='VALUES', help='Values of the grade that mean ungradable, separated by |. Default: found.')]


@command
def fit(csv: Annotated[str, argument('CSV', 'A CSV or .xlsx with a grade for each image, or a folder with a sub-folder '
                                     'for each grade.')],
        images: Annotated[str, argument('IMAGES', 'The folder of its images. Default: the folder of the CSV.')] = '',
        unlabelled: Annotated[str, argument('UNLABELLED', 'A folder of ungraded images, which are predicted and '
                                            'trained on, too.')] = '',
        id: Column = '', grade: Column = '', patient: Column = '', eye: Column = '',
        ungradable: Ungradable = '', sheet: SheetName = '',
        name: Annotated[str, typer.Option(metavar='NAME', help='Name of the run. Default: that of the CSV.')] = '',
        runs: Annotated[str, typer.Option(metavar='FOLDER', help='Results go to FOLDER/NAME/.')] = 'runs',
        hours: Annotated[float | None, typer.Option(
            metavar='H', parser=hours_above_0, help='Choose the settings for about H hours on this machine, and leave '
            'out stages that would end later.')] = None,
        sets: Sets = None, deidentify: DeidentifyReport = False) -> None:
    """Train on a graded table without a recipe. Says which column it takes for id, grade, patient and eye, and why;
    writes the recipe that it uses into the run folder. The run folder grades new images.

    python run.py fit grades.csv images/
    python run.py fit grades.csv images/ --hours 2
    python run.py fit labels.xlsx photos/ unlabelled/ --grade "DR grade" --set stage.epochs=5
    """
    from aptos_fastai import commands
    keys = given(id=id, grade=grade, patient=patient, eye=eye, ungradable=ungradable, sheet=sheet)
    commands.fit(csv, images, unlabelled, name=name, runs=runs, sets=sets or [], ask=ask_user(),
                 deidentify=deidentify, hours=hours, **keys)


@command
def configure(data: Annotated[str, typer.Option(
                  metavar='FOLDER', help='The folder with train.csv and train_images/, and perhaps test.csv and '
                  'test_images/, or one above it.')],
              hours: Annotated[float, typer.Option(
                  metavar='H', parser=hours_above_0, help='How long `all` may take on this machine, hours.')],
              output: Annotated[str, typer.Option(
                  '-o', '--output', metavar='FILE', help='The recipe to write.')] = 'configured.ini',
              runs: Annotated[str, typer.Option(
                  metavar='FOLDER', help='Where results will go. Images prepared there need no time.')] = 'runs',
              sets: Sets = None) -> None:
    """Write a recipe for a number of hours. Times networks on this machine, counts images and grades, and chooses size,
    epochs, folds, views, pseudo-labels and seeds; the recipe says why. Trains nothing.

    python run.py configure --data ~/idrid --hours 4
    python run.py configure --data ~/idrid --hours 0.5 -o half_an_hour.ini
    """
    from aptos_fastai.pipeline.fit import write_configured_recipe
    write_configured_recipe(Path(data), Path(output), Path(runs), sets or [], hours)


def given(**values: str) -> dict[str, str]:
    "Return the options that have a value"
    return {key: value for key, value in values.items() if value}


def ask_user() -> Callable[[str, list[str]], str] | None:
    "Return a function that asks which of some answers is right; None if nobody can answer"
    if not (sys.stdin.isatty() and sys.stdout.isatty()): return None
    from rich.prompt import Prompt  # typer's own prompt takes the choices of the click that it bundles only
    return lambda question, answers: Prompt.ask(question, choices=answers)


@command
def plan(options: RunOptions, images: Annotated[str, typer.Option(
        metavar='"TABLE=N ..."', help='Plan for tables of these sizes, without the data.')] = '') -> None:
    """Show what `all` would train, why, and how long. Writes nothing but the demo's images.

    python run.py plan --recipe recipes/one_table.ini --data ~/idrid
    python run.py plan --images "eyepacs2015=35126 aptos_train=3662 aptos_test=1928"
    """
    from aptos_fastai.pipeline.plan import plan_images, show_plan
    if images: plan_images(options.recipe, options.sets or [], images)
    else: show_plan(options.load())


@command
def doctor(options: RunOptions, images: Annotated[bool, typer.Option(
        '--images', help='Read every image, not only a sample of each table.')] = False) -> None:
    """Check that `all` can run. Checks packages, devices, tables, a sample of the images, weights, disk space and time;
    shows how to download Kaggle's tables if they are missing.

    python run.py doctor --data ~/kaggle
    python run.py doctor --data ~/kaggle --images
    """
    from aptos_fastai.pipeline.doctor import doctor
    doctor(options.recipe, options.data, options.runs, options.sets or [], images, options.name)


@command
def prepare(options: RunOptions) -> None:
    """Find, crop and store the retina of every image. `all` does this itself; this command also lists bad images.

    python run.py prepare --data ~/kaggle
    """
    from aptos_fastai import commands
    commands.prepare_run(options.load())


@command
def inspect(options: RunOptions,
            table: Annotated[str, argument('TABLE', 'A table of the recipe, or a CSV or folder as for `fit`.')],
            count: Annotated[int, argument('COUNT', 'How many images to show.', parser=image_count)] = 24,
            images: Annotated[str, typer.Option(
                metavar='FOLDER', help="The folder of a CSV's images. Default: the folder of the CSV.")] = '',
            id: Column = '', grade: Column = '', patient: Column = '', eye: Column = '',
            ungradable: Ungradable = '', sheet: SheetName = '') -> None:
    """Show how a table is understood. Prints how ids were matched, patients, eyes, grades, ungradable images and
    duplicates; writes a page with sizes, quality flags, and images with circle, crop and augmentation.

    python run.py inspect aptos_train
    python run.py inspect train 413 --recipe recipes/one_table.ini --data ~/idrid
    python run.py inspect grades.csv --images photos/
    """
    from aptos_fastai import commands
    keys = given(id=id, grade=grade, patient=patient, eye=eye, ungradable=ungradable, sheet=sheet)
    commands.inspect(options.load, table, count, images, options.runs, options.name, options.sets or [], ask_user(),
                     keys)


@command
def train(options: RunOptions, stage: Stage, replace: Replace = False) -> None:
    """Train one stage. Trains its unfinished parent stages first.

    python run.py train finetune_256
    python run.py train finetune_256 --run runs/large
    """
    from aptos_fastai import commands
    commands.train_stage(options.load(stage), stage, replace)


@command
def tune(options: RunOptions, stage: Stage,
         trials: Annotated[int, typer.Option(
             metavar='N', help='Go on until the sweep has N trials.', parser=whole_number)] = 20) -> None:
    """Try values of a stage's keys by out-of-fold kappa. The recipe's section [tune.STAGE] holds the ranges, Optuna
    chooses. The best values and the recipe's own are measured again on other folds. The recipe stays as it is.

    python run.py tune teacher --recipe recipes/one_table.ini --data ~/idrid --set "tune.teacher.lr=1e-4 1e-2 log"
    python run.py tune teacher --run runs/large --trials 40
    """
    from aptos_fastai import commands
    commands.tune_stage(options.load(stage), stage, trials)


@command
def label(options: RunOptions,
          stage: Annotated[str, argument('STAGE', 'The stage or ensemble that labels.')],
          table: Annotated[str, argument('TABLE', 'An ungraded table. Default: [submit] table.')] = '',
          replace: Replace = False) -> None:
    """Write pseudo-labels of an ungraded table. Writes soft_pseudo_label.csv (scores) and hard_pseudo_label.csv
    (grades); trains the stage first if needed.

    python run.py label finetune_256
    """
    from aptos_fastai import commands
    commands.label_table(options.load(stage), stage, table, replace)


@command
def predict(model: Model, images: Images,
            output: Annotated[str, typer.Option(
                '-o', '--output', metavar='FILE', help='The CSV to write.')] = 'grades.csv',
            backend: Annotated[str, typer.Option(
                metavar='NAME', help='torch; for a bundle also onnx or openvino.')] = 'torch',
            precision: Annotated[str, typer.Option(
                metavar='NAME', help='f32; bf16, faster where it is supported; fp16 on a GPU.')] = 'f32',
            root: Root = None, sheet: SheetName = '', overwrite: Annotated[bool, typer.Option(
                '--overwrite', help='Replace the output if an earlier predict wrote it.')] = False,
            patient: Annotated[str, typer.Option(
                metavar='COLUMN|PATTERN|dicom', help='Write patients.csv, too: a column of the CSV, a regular '
                'expression with a group in parentheses for file names, or the DICOM tags. Default: these, if all '
                'images have them.')] = '',
            eye: Annotated[str, typer.Option(
                metavar='COLUMN|PATTERN|dicom', help='The same for the eye: L, R, OS, OD, left, right.')] = '',
            missing_eye: Annotated[str, typer.Option(
                metavar='NAME', help='A patient with a missing or ungradable eye who is not referred. ungradable: is '
                'not gradable; ignore: the other eye decides.')] = 'ungradable',
            prevalence: Annotated[float | None, typer.Option(
                metavar='P', help='Share of referable images where the model is used, 0 to 1: re-weights the '
                'probabilities. Default: as validated, or [refer] prevalence.')] = None,
            deidentify: Deidentify = False) -> None:
    """Grade new images with a trained model. Writes a CSV and what made it. An interrupted command resumes.

    python run.py predict runs/one_table ~/clinic/images -o grades.csv
    python run.py predict runs/one_table ~/clinic/images --patient "^(\\d+)_" --eye "_([LR])[.]"
    """
    from aptos_fastai.inference.grade_files import grade_files
    from aptos_fastai.inference.patients import Choices
    choices = Choices(patient, eye, missing_eye, deidentify)
    grade_files(model, images, output, backend, precision, root=root, overwrite=overwrite, choices=choices,
                prevalence=prevalence, sheet=sheet)


@command
def verify(model: Model, grades: Annotated[str, argument('GRADES', 'A CSV that `predict` wrote.')],
           sample: Annotated[int, typer.Option(
               metavar='N', help='Predict so many images again.', parser=whole_number)] = 20,
           every: Annotated[bool, typer.Option('--all', help='Predict every image again.')] = False,
           images: Annotated[list[str] | None, typer.Option(
               metavar='IMAGES', help='The images as they were given to `predict`: a folder, a CSV, a file. May be '
               'repeated. Default: the files that the column file names.')] = None,
           root: Root = None, sheet: SheetName = '') -> None:
    """Check that predictions came from a model. Compares the model with the CSV's audit file, the rows with the model's
    thresholds, and predicts a sample of the images again. Exit status 0 only if everything agrees.

    python run.py verify runs/one_table grades.csv
    python run.py verify runs/one_table/bundle grades.csv --images ~/clinic/images --all
    """
    from aptos_fastai.inference.verify import verify_grades
    verify_grades(model, grades, None if every else sample, images or [], root, sheet)


@command
def score(options: RunOptions) -> None:
    """Predict the test table. Writes scores.csv.

    python run.py score
    """
    from aptos_fastai import commands
    commands.score_run(options.load())


@command
def submit(options: RunOptions) -> None:
    """Write submission.csv. Also writes submissions/, a file for each submitted stage and ensemble. Trains nothing.

    python run.py submit --set "submit.thresholds=0.75 1.5 2.5 3.5"
    """
    from aptos_fastai import commands
    commands.submit_run(options.load())


@command
def report(options: RunOptions, deidentify: DeidentifyReport = False) -> None:
    """Write report.html of a finished run again. Shows kappa, errors, ROC, calibration and learning curves; `all`
    writes it too.

    python run.py report
    python run.py report runs/large
    """
    from aptos_fastai import commands
    commands.report_run(options.load(), deidentify)


@command
def runs(folder: Annotated[str, argument('FOLDER', 'The folder of the runs. Default: runs.')] = '',
         runs: Annotated[str, typer.Option(metavar='FOLDER', help='The same.')] = '') -> None:
    """List the runs of a folder, the best first. Shows kappa with its interval, changed keys, training time and date,
    and what unfinished runs lack.

    python run.py runs
    """
    from aptos_fastai.common.io import AptosError
    from aptos_fastai.pipeline.run_list import list_runs
    if folder and runs: raise AptosError(f'--runs {runs}: {folder} was named, too. Name one folder.')
    list_runs(folder or runs or 'runs')


@command
def compare(results: Annotated[list[str], argument('RESULTS', 'Finished run folders <runs>/<name>, stages or ensembles '
                                                   'of them as <runs>/<name>:STAGE, or the folders of two '
                                                   'evaluations. The first is the reference.')]) -> None:
    """Compare finished runs, stages or two evaluations. Shows the difference of kappa on the same images, with a paired
    bootstrap; the evaluations are of two models on one table.

    python run.py compare runs/one_table ~/other-runs/one_table
    python run.py compare runs/a runs/b runs/c:teacher
    python run.py compare runs/a/evaluations/clinic runs/b/evaluations/clinic
    """
    from aptos_fastai.pipeline.compare import compare_results
    compare_results(results)


@command
def evaluate(model: Model,
             table: Annotated[str, argument(
                 'TABLE', 'A CSV with grades, a folder of class folders, a preset, or a table of the recipe.')],
             images: Annotated[str, argument(
                 'IMAGES', "The folder of the CSV's images. Default: the folder of the CSV.")] = '',
             recipe: TableRecipe = '', data: TableData = '',
             id: Column = '', grade: Column = '', patient: Column = '', eye: Column = '', ungradable: Ungradable = '',
             sheet: SheetName = '',
             prevalence: Annotated[float | None, typer.Option(
                 metavar='P', help='Prevalence of referable retinopathy for PPV and NPV, 0 to 1. Default: that of the '
                 'table.')] = None,
             by: Annotated[list[str] | None, typer.Option(
                 metavar='COLUMN', help='A column of subgroups: site, camera, sex, age. May be repeated. Default: all '
                 'that the table carries.')] = None,
             include_seen: Annotated[bool, typer.Option(
                 '--include-seen', help='Count images that the model was trained on, too: optimistic.')] = False,
             skip_missing: Annotated[bool, typer.Option(
                 '--skip-missing', help='Leave out rows without an image; they are counted and listed in '
                 'missing_images.csv.')] = False,
             output: Annotated[str, typer.Option(
                 '-o', '--output', metavar='FOLDER', help='The folder to write to. Default: '
                 'MODEL/evaluations/TABLE.')] = '', deidentify: Deidentify = False) -> None:
    """Evaluate a model on graded images. Shows kappa, AUC, sensitivity, specificity, calibration and subgroups with
    intervals; leaves out images that the model was trained on; writes a report.

    python run.py evaluate runs/one_table ~/clinic/grades.csv ~/clinic/images --prevalence 0.1
    python run.py evaluate runs/one_table messidor2 --data ~/messidor2
    """
    from aptos_fastai import commands
    from aptos_fastai.inference.evaluate import Choices
    keys = given(id=id, grade=grade, patient=patient, eye=eye, ungradable=ungradable, sheet=sheet)
    choices = Choices(prevalence, by or (), include_seen, output, skip_missing)
    commands.evaluate_model(model, table, choices, deidentify, images=images, recipe=recipe, data=data, ask=ask_user(),
                            **keys)


@command
def export(run: RunPath,
           parity: Annotated[int | None, typer.Option(
               metavar='N', help='Compare backends on N images. Default: 200.', parser=whole_number)] = None,
           deidentify: Deidentify = False) -> None:
    """Write a bundle that predicts without the run. It holds weights (safetensors, ONNX), bundle.json and a model card;
    ONNX and bf16 are compared with PyTorch f32.

    python run.py export runs/one_table
    """
    from aptos_fastai.deploy.bundle import export_run
    export_run(run, parity, deidentify)


@command
def operating_point(model: Model,
                    sensitivity: Annotated[str, typer.Option(
                        metavar='S', help='The sensitivity to reach, 0.5 to 0.999; two numbers in quotes: for '
                        'referable and for sight-threatening retinopathy.')] = '',
                    specificity: Annotated[str, typer.Option(
                        metavar='S', help='The specificity to reach; beside --sensitivity: a second point.')] = '',
                    threshold: Annotated[str, typer.Option(
                        metavar='SCORE', help='A fixed score instead.')] = '',
                    table: Annotated[str, typer.Option(
                        metavar='TABLE', help="Choose on these graded images, as for `evaluate`. Default: the model's "
                        'out-of-fold scores.')] = '',
                    images: Annotated[str, typer.Option(
                        metavar='FOLDER', help='The folder of its images. Default: the folder of the CSV.')] = '',
                    recipe: TableRecipe = '', data: TableData = '',
                    id: Column = '', grade: Column = '', patient: Column = '', eye: Column = '',
                    ungradable: Ungradable = '', sheet: SheetName = '',
                    skip_missing: Annotated[bool, typer.Option(
                        '--skip-missing', help='Leave out rows of TABLE without an image.')] = False,
                    output: Annotated[str, typer.Option(
                        '-o', '--output', metavar='FOLDER', help='The bundle to write. Default: a new folder in the '
                        'run, or beside the bundle.')] = '') -> None:
    """Choose another operating point for a model. It is the score from which on an image is referred. Writes a new
    bundle; weights and grades stay the same.

    python run.py operating_point runs/one_table --sensitivity 0.95
    python run.py operating_point runs/one_table/bundle --specificity 0.9 --table clinic.csv --images photos/
    """
    from aptos_fastai.deploy.operating_point import write_operating_point
    from aptos_fastai.recipe.read import parse_refer
    refer = parse_refer(given(sensitivity=sensitivity, specificity=specificity, threshold=threshold))
    keys = given(id=id, grade=grade, patient=patient, eye=eye, ungradable=ungradable, sheet=sheet)
    write_operating_point(model, refer, output, table, skip_missing, images=images, recipe=recipe, data=data,
                          ask=ask_user(), **keys)


@command
def explain(model: Model, images: Images,
            output: Annotated[str, typer.Option(
                '-o', '--output', metavar='FOLDER', help='The folder to write to.')] = 'explained',
            root: Root = None, sheet: SheetName = '') -> None:
    """Write images beside their heat maps. A heat map shows which regions raised the score.

    python run.py explain runs/one_table ~/clinic/eye.jpg -o explained
    """
    from aptos_fastai.inference.explain import explain_files
    explain_files(model, images, output, root=root, sheet=sheet)


@command
def review(run: RunPath,
           share: Annotated[float, typer.Option(
               metavar='FRACTION', help='List this fraction of the validated images.')] = .1,
           reviewer: Annotated[str, typer.Option(
               metavar='NAME', help='Who decides. Default: the page asks.')] = '',
           host: Annotated[str, typer.Option(metavar='ADDRESS', help='Listen on this address.')] = '127.0.0.1',
           port: Annotated[int, typer.Option(
               metavar='PORT', help='Listen on this port.', parser=whole_number)] = 8001) -> None:
    """Serve a local web page to review labels. It shows the images whose labels the out-of-fold scores contradict most,
    and duplicates with unequal grades; decisions go to relabels.csv in the run folder.

    python run.py review runs/one_table --reviewer "A. Reader"
    """
    if not 0 < port < 65536: fail(f'--port {port}: choose a port from 1 to 65535')
    from aptos_fastai.deploy.review import review
    review(run, host, port, share, reviewer)


@command
def dicom_report(model: Model,
                 image: Annotated[str, argument('IMAGE', 'A fundus image as a DICOM file.')],
                 output: Annotated[str, typer.Option(
                     '-o', '--output', metavar='FILE', help='The DICOM file to write.')] = 'report.dcm') -> None:
    """Write the grade of a DICOM image as DICOM. The structured report (TID 1500) belongs to the image's study. It
    holds score, grade, decision and model; names are not copied.

    python run.py dicom_report runs/one_table ~/clinic/IM000001 -o report.dcm
    """
    from aptos_fastai.deploy.structured_report import write_dicom_report
    write_dicom_report(model, image, output)


@command
def serve(model: Model,
          host: Annotated[str, typer.Option(metavar='ADDRESS', help='Listen on this address.')] = '127.0.0.1',
          port: Annotated[int, typer.Option(
              metavar='PORT', help='Listen on this port.', parser=whole_number)] = 8000,
          allow_host: Annotated[list[str] | None, typer.Option(
              '--allow-host', metavar='NAME', help='Serve requests to this host name, too: that of a proxy. May be '
              'repeated.')] = None,
          log: Annotated[str, typer.Option(
              metavar='FILE', help='Append a line of JSON for each request to FILE: hashes, grades and decisions, no '
              'images.')] = '',
          log_names: Annotated[bool, typer.Option('--log-names', help='Log the file names of images, too.')] = False,
          backend: Annotated[str, typer.Option(
              metavar='NAME', help='torch; for a bundle also onnx or openvino.')] = 'torch',
          precision: Annotated[str, typer.Option(metavar='NAME', help='f32, bf16, or fp16 on a GPU.')] = 'f32',
          prevalence: Annotated[float | None, typer.Option(
              metavar='P', help='Prevalence of referable retinopathy where the model is used, 0 to 1: re-weights the '
              'probabilities.')] = None) -> None:
    """Serve a local web page that grades images. The page shows decisions, grades, probabilities, heat maps and
    patients and saves a CSV; programs use /api/predict, which /docs describes.

    python run.py serve runs/one_table
    python run.py serve runs/one_table --log requests.jsonl
    """
    if not 0 < port < 65536: fail(f'--port {port}: choose a port from 1 to 65535')
    if log_names and not log: fail('--log-names: name the log with --log FILE')
    from aptos_fastai.deploy.serve import serve
    serve(model, host, port, allow_host=allow_host or (), log=log, log_names=log_names, backend=backend,
          precision=precision, prevalence=prevalence)


@command
def kaggle(run: RunPath,
           user: Annotated[str, typer.Option(metavar='NAME', help='Your Kaggle user name.')] = 'your-name') -> None:
    """Write a dataset and a notebook for Kaggle. The notebook predicts offline; the dataset holds weights and package.

    python run.py kaggle runs/settings --user me
    """
    from aptos_fastai.deploy.kaggle import write_kaggle
    write_kaggle(run, user)


@command
def lr_find(options: RunOptions, stage: Stage) -> None:
    """Suggest learning rates for a stage. Saves the curve as lr_find.png in its folder.

    python run.py lr_find pretrain_256
    """
    from aptos_fastai import commands
    commands.find_learning_rate(options.load(stage), stage)


@command
def find_batch_size(options: RunOptions, stage: Stage) -> None:
    """Find the largest batch size that fits this GPU. Times training steps of a stage with 2, 4, 8, ... images.

    python run.py find_batch_size pretrain_512 --data ~/kaggle
    """
    from aptos_fastai import commands
    commands.find_batch_size(options.load(stage), stage)


@command
def demo(folder: Annotated[str, argument('FOLDER', 'The folder to write to.')] = 'demo_data',
         recipe: RecipeFile = 'settings.ini', sets: Sets = None) -> None:
    """Write the synthetic demo's tables to a folder. They look like Kaggle's folders and can be passed as --data.

    python run.py demo /tmp/demo
    """
    from aptos_fastai import commands
    commands.write_demo_folder(recipe, sets or [], folder)


@command
def init(folder: Annotated[str, argument('FOLDER', 'The folder to write to.')] = '.') -> None:
    """Write settings.ini and recipes/ as shipped. For an installation without a clone.

    python run.py init ~/dr
    """
    from aptos_fastai.common.console import say
    from aptos_fastai.recipe.files import write_recipes
    for file in write_recipes(Path(folder)): say(str(file))


@command
def keys() -> None:
    """List every section and key of a recipe. Shows default, unit and accepted values.

    python run.py keys
    """
    from aptos_fastai import commands
    commands.show_keys()
