"""`python -m tasks.merge`, as dvc.yaml runs it."""

from tasks.merge.stage import main

main()
