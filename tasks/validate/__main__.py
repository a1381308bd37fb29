"""`python -m tasks.validate`, as dvc.yaml runs it."""

from tasks.validate.stage import main

main()
