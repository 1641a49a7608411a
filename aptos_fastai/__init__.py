"Grades diabetic retinopathy (0-4) from fundus images with staged fastai training."
import warnings

__version__ = '0.1.0'

warnings.filterwarnings('ignore', message='.torch.jit.script. is deprecated', category=FutureWarning)     # timm's own use of it
warnings.filterwarnings('ignore', message='IProgress not found')                                          # in notebooks: the bars of libraries, none of ours
warnings.filterwarnings('ignore', message="The 'mode.chained_assignment' option is deprecated")           # fastai's own use of it


def load_grader(path, backend='torch', precision='f32'):
    "The `aptos_fastai.grader.Grader` of a bundle, a run folder or a stage's folder: `load_grader(path).predict(files)` gives a DataFrame"
    from aptos_fastai.inference.grader import load_grader as load  # PyTorch is only imported where it is used
    return load(path, backend, precision)
