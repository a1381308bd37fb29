"""`python -m tasks.render`, as dvc.yaml runs it."""

from tasks.render.stage import main

main()
