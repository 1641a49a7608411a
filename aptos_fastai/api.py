"The Python API: what `from aptos_fastai import …` gives."
