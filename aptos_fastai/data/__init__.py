"Tables, folds, duplicates and images: everything before PyTorch."
