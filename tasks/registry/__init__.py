"""All that is asked of MLflow: runs, versions, aliases and their log, signatures."""
