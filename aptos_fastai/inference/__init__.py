"Trained models on new images."
