"Bundles, Kaggle folders and the local server."
