"""`python -m tasks.evaluate`, as dvc.yaml runs it."""

from tasks.evaluate.stage import main

main()
