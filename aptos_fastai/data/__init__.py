"Tables, folds, images: everything before PyTorch."
