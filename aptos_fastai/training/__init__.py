"Data loaders, model, callbacks and weights: what a fastai user imports."
