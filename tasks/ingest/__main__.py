"""`python -m tasks.ingest`, as dvc.yaml runs it."""

from tasks.ingest.stage import main

main()
