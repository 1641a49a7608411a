"What a fastai user would import: loaders, model, callbacks."
