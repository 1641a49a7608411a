"How the user started the program: installed, or in a clone."
import os
import sys

PROGRAM = 'aptos-fastai' if os.path.basename(sys.argv[0]).startswith('aptos-fastai') else 'run.py'
COMMAND = PROGRAM if PROGRAM == 'aptos-fastai' else f'python {PROGRAM}'       # what to type before a command's name
