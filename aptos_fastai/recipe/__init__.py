"The recipe: settings.ini as checked, frozen dataclasses. Imports no PyTorch."
