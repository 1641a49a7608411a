#!/usr/bin/env python
"python run.py all: trains the recipe's graph and writes submission.csv; python run.py --help lists the commands."
from aptos_fastai.cli import main

if __name__ == '__main__': main()
