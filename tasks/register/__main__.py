"""`python -m tasks.register`, as dvc.yaml runs it."""

from tasks.register.stage import main

main()
