"Grades diabetic retinopathy (0-4) from fundus photographs with staged fastai training."
__version__ = '0.1.0'
