"""`python -m tasks.base`, as dvc.yaml runs it."""

from tasks.base.stage import main

main()
