"""`python -m tasks.train`, as dvc.yaml runs it."""

from tasks.train.stage import main

main()
